"""Gradient clipping for JAX and Optax that is right for every finite gradient."""

from optaxclip import limits as limits
from optaxclip.clipping import ClipByNormState as ClipByNormState
from optaxclip.clipping import ClipByValueState as ClipByValueState
from optaxclip.clipping import clip_by_norm as clip_by_norm
from optaxclip.clipping import clip_by_value as clip_by_value
from optaxclip.explosions import DetectExplosionsState as DetectExplosionsState
from optaxclip.explosions import detect_explosions as detect_explosions
from optaxclip.methods import adagc as adagc
from optaxclip.methods import agc as agc
from optaxclip.methods import autoclip as autoclip
from optaxclip.methods import block_rms as block_rms
from optaxclip.methods import stabilize as stabilize
from optaxclip.methods import zclip as zclip
from optaxclip.norms import global_norm as global_norm
from optaxclip.norms import group_norms as group_norms
from optaxclip.norms import leaf_norms as leaf_norms
from optaxclip.norms import unit_norms as unit_norms
from optaxclip.plotting import plot as plot
from optaxclip.reading import History as History
from optaxclip.reading import history as history
from optaxclip.reading import metrics as metrics
from optaxclip.recording import RecordState as RecordState
from optaxclip.recording import record as record
from optaxclip.reporting import ExplosionError as ExplosionError
from optaxclip.reporting import explain as explain
from optaxclip.reporting import raise_if_exploded as raise_if_exploded
from optaxclip.responses import SkipExplosionsState as SkipExplosionsState
from optaxclip.responses import skip_explosions as skip_explosions
from optaxclip.scopes import group_names as group_names
from optaxclip.scopes import leaf_names as leaf_names

__version__ = "0.1.0"
