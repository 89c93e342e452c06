"""How large may an update be: limits on norms, fixed or learned."""

from optaxclip.fixed_limits import Limit as Limit
from optaxclip.fixed_limits import LimitLike as LimitLike
from optaxclip.fixed_limits import RmsState as RmsState
from optaxclip.fixed_limits import ScheduleState as ScheduleState
from optaxclip.fixed_limits import as_limit as as_limit
from optaxclip.fixed_limits import constant as constant
from optaxclip.fixed_limits import minimum as minimum
from optaxclip.fixed_limits import params as params
from optaxclip.fixed_limits import rms as rms
from optaxclip.fixed_limits import schedule as schedule
from optaxclip.learned_limits import DriftState as DriftState
from optaxclip.learned_limits import EmaState as EmaState
from optaxclip.learned_limits import LowestState as LowestState
from optaxclip.learned_limits import PercentileState as PercentileState
from optaxclip.learned_limits import QuantileState as QuantileState
from optaxclip.learned_limits import WindowSigmaState as WindowSigmaState
from optaxclip.learned_limits import ZScoreState as ZScoreState
from optaxclip.learned_limits import above_lowest as above_lowest
from optaxclip.learned_limits import drift as drift
from optaxclip.learned_limits import ema as ema
from optaxclip.learned_limits import log_quantile as log_quantile
from optaxclip.learned_limits import percentile as percentile
from optaxclip.learned_limits import quantile as quantile
from optaxclip.learned_limits import window_sigma as window_sigma
from optaxclip.learned_limits import zscore as zscore
