"""Limits that are learned from the norms of the run.

Only norms that are finite and not zero enter: a zero gradient says nothing of how large
a healthy one is, and would hold a limit at zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optaxclip import windows
from optaxclip.checks import check_length, check_number
from optaxclip.fixed_limits import Limit, like
from optaxclip.norms import divisor, shares_of


class ZScoreState(NamedTuple):
    """State of `zscore`; each array in the shape of the norms."""

    mean: jax.Array
    """Moving average of the norms, outliers at their limit."""
    std: jax.Array
    """Moving standard deviation of the same."""
    num_seen: jax.Array
    """int32: number of norms seen, up to `warmup`; from there on one more for every
    outlier and one less for any other norm, within `warmup` and `2 * warmup`."""


class PercentileState(NamedTuple):
    """State of `percentile` and of `log_quantile`."""

    window: jax.Array
    """`[..., 2, 1 + window]`: the last norms as they came, and the same ascending; +inf
    where there is none yet. Before the first stands their number, before the others
    0."""


class EmaState(NamedTuple):
    """State of `ema`; each array in the shape of the norms."""

    mean: jax.Array
    """Moving average of the clipped norms, in warm-up their minimum; 0 before."""
    num_seen: jax.Array
    """int32: number of norms seen, up to `warmup`."""


class WindowSigmaState(NamedTuple):
    """State of `window_sigma`."""

    window: jax.Array
    """`[..., window]`: the last norms as they came; +inf where there is none yet."""


class QuantileState(NamedTuple):
    """State of `quantile`."""

    limit: jax.Array
    """The next limit, in the shape of the norms."""


class DriftState(NamedTuple):
    """State of `drift`."""

    memory: jax.Array
    """`[..., 5]`: moving averages of the logarithm of the norms and of its change from
    step to step; the last logarithm; the number of norms seen, up to `window`, and of
    those in a row above the limit, up to `patience`."""


class LowestState(NamedTuple):
    """State of `above_lowest`."""

    memory: jax.Array
    """`[..., 4]`: the moving average of the norms; the smallest that it has been, +inf
    before the first norm and 0 after a negative one; how many norms it holds; and how
    many of the last norms in a row were above the limit."""


def zscore(
    max_zscore: ArrayLike = 2.5, *, decay: ArrayLike = 0.97, warmup: int = 25
) -> Limit:
    """Limits a norm to so many standard deviations above its moving average.

    `mean + max_zscore * std`; an outlier, beyond that, gets the lower limit `mean +
    max_zscore * std * max_zscore / z` for its z-score z: the larger, the nearer to the
    mean. Then mean and std learn from the norm, or from the limit of an outlier.

    Mean and std start as those of the first `warmup` norms, with a limit of +inf. When
    outliers outnumber the other norms by `warmup`, outliers too are learned as they
    are: the limit follows a change of 10x to a factor of 2 within `3 * warmup` steps
    upwards (a few hundred where heavy tails hide it), `9 / (1 - decay)` downwards.

    A spike in the warm-up counts in full; a later one, of any size, moves the mean by
    `(1 - decay) * max_zscore * std` at most, and std by a factor `sqrt(decay + (1 -
    decay) * (decay * max_zscore)**2)`: 1.07 by default.

    Args:
      max_zscore: Largest z-score, in standard deviations, > 0.
      decay: Of mean and variance, in a step, within (0, 1).
      warmup: Number of norms in the warm-up, at least 2.

    Returns:
      The limit, per tree, leaf or group. State: 3 numbers a scope.

    Raises:
      ValueError: If an argument is out of range, or at `init` per unit.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = zscore(2.0, warmup=2)
      >>> state = limit.init(jnp.ones(()))
      >>> for norm in [1.0, 3.0, 100.0]:
      ...     value, state = limit.update(jnp.array(norm), state, None)
      ...     print(round(float(value), 3))
      inf
      inf
      2.041

    Reference: Kumar et al., arXiv:2504.02507, algorithm 1 (per tree: ZClip).
    """
    check_number("max_zscore", max_zscore, lambda x: x > 0, "> 0")
    check_number("decay", decay, lambda x: 0 < x < 1, "within (0, 1)")
    warmup = check_length("warmup", warmup, 2)

    def init(sizes):
        _refuse_units("zscore", sizes)
        return ZScoreState(
            mean=jnp.zeros_like(sizes),
            std=jnp.zeros_like(sizes),
            num_seen=jnp.zeros(sizes.shape, jnp.int32),
        )

    def update(norms, state, param_norms=None):
        del param_norms
        mean, std, num_seen = state
        max_z, rate = like(norms, max_zscore, 1 - decay)
        is_warmup = num_seen < warmup
        # The reference adds 1e-6 to std; relative to the mean, units do not matter.
        distance = max_z * (std + 1e-6 * mean)
        excess = norms - mean  # compared itself: it may underflow
        is_outlier = ~is_warmup & (excess > distance)
        lowered = mean + max_z * std * (distance / jnp.where(is_outlier, excess, 1))
        limits = jnp.where(is_outlier, lowered, mean + distance)
        limits = jnp.where(is_warmup, jnp.inf, limits)

        # In warm-up the weights of a mean over all norms so far.
        n = (num_seen + 1).astype(norms.dtype)
        rate = jnp.where(is_warmup, 1 / n, rate)
        widening = jnp.where(is_warmup, jnp.sqrt(n / jnp.maximum(n - 1, 1)), 1)
        is_lowered = is_outlier & (num_seen < 2 * warmup - 1)
        x = jnp.where(is_lowered, limits, norms)
        mean = mean + rate * (x - mean)
        std = _root_mean_square(std, widening * jnp.abs(x - mean), rate)
        balance = jnp.where(is_outlier, num_seen + 1, num_seen - 1)
        balance = jnp.clip(balance, warmup, 2 * warmup)
        num_seen = jnp.where(is_warmup, num_seen + 1, balance)
        return limits, _keep(norms, ZScoreState(mean, std, num_seen), state)

    return Limit(init, update)


def percentile(percent: ArrayLike = 10.0, *, window: int = 1024) -> Limit:
    """Limits a norm to a percentile of the last norms, its own included.

    Exact, with linear interpolation, as `numpy.percentile`. Learns the norms before the
    clip: after a lasting change it follows within `window` steps. One spike of any size
    moves the limit by one place in their order at most.

    Args:
      percent: The percentile, within [0, 100].
      window: Number of norms remembered, at least 1.

    Returns:
      The limit, per tree, leaf or group. State: two windows a scope.

    Raises:
      ValueError: If an argument is out of range, or at `init` per unit.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = percentile(50.0, window=3)
      >>> state = limit.init(jnp.ones(()))
      >>> for norm in [1.0, 2.0, 9.0, 3.0]:
      ...     value, state = limit.update(jnp.array(norm), state, None)
      ...     print(value)
      1.0
      1.5
      2.0
      3.0

    Reference: Seetharaman et al., arXiv:2007.14469 (per tree: AutoClip).
    """
    check_number("percent", percent, lambda x: 0 <= x <= 100, "within [0, 100]")
    window = check_length("window", window, 1)

    def init(sizes):
        _refuse_units("percentile", sizes)
        return PercentileState(windows.empty_ordered_window(sizes, window))

    def update(norms, state, param_norms=None):
        del param_norms
        learned = PercentileState(windows.push_in_order(state.window, norms))
        state = _keep(norms, learned, state)
        (percents,) = like(norms, [percent])
        low, high, share = windows.percentiles_of(state.window, percents)
        rise = jnp.where(high > low, high, 0) - jnp.where(high > low, low, 0)
        return (low + share * rise)[..., 0], state

    return Limit(init, update)


def ema(
    multiple: ArrayLike,
    *,
    decay: ArrayLike = 0.98,
    warmup: int = 100,
    max_warmup_norm: ArrayLike = float("inf"),
) -> Limit:
    """Limits a norm to a multiple of the moving average of the clipped norms.

    `multiple * mean`, and then `mean = decay * mean + (1 - decay) * min(norm, limit)`.
    Up to the `warmup`-th norm the mean is the smallest clipped norm, and all scopes
    together are clipped to `max_warmup_norm`: with `total` for the root of the sum of
    their norms' squares, the limit is `norm * max_warmup_norm / total`, +inf if the
    total is below.

    Later the limit grows by `1 + (1 - decay) * (multiple - 1)` in a step at most,
    whatever the spike. It follows a change of 10x to a factor of 2 within
    `2.3 / ((1 - decay) * min(multiple - 1, 1))` steps upwards and `3.4 / (1 - decay)`
    downwards: 2300 and 170 with 1.05 and 0.98.

    As published, the warm-up counts in full: a norm smaller by a factor s (of a layer
    that starts next to zero, as in LoRA), or, with a cap, a spike s times `total` in
    any scope, lowers the limit by s. For 1.05 and 0.98 to recover from 1000 takes 6900
    steps.

    Args:
      multiple: The limit in units of the mean, > 1.
      decay: Of the mean, in a step, within (0, 1).
      warmup: The first norm of a scope with a learned limit is its `warmup`-th that is
        finite and not zero; at least 2.
      max_warmup_norm: The limit for all scopes together before, > 0.

    Returns:
      The limit, per tree, leaf or group. State: 2 numbers a scope.

    Raises:
      ValueError: If an argument is out of range, or at `init` per unit.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = ema(2.0, decay=0.5, warmup=2)
      >>> state = limit.init(jnp.ones(()))
      >>> for norm in [1.0, 100.0, 1.0]:
      ...     value, state = limit.update(jnp.array(norm), state, None)
      ...     print(value)
      inf
      2.0
      3.0

    Reference: Wang et al., arXiv:2502.11034, algorithm 1 (per leaf: AdaGC).
    """
    check_number("multiple", multiple, lambda x: x > 1, "> 1")
    check_number("decay", decay, lambda x: 0 < x < 1, "within (0, 1)")
    check_number("max_warmup_norm", max_warmup_norm, lambda x: x > 0, "> 0")
    warmup = check_length("warmup", warmup, 2)

    def init(sizes):
        _refuse_units("ema", sizes)
        return EmaState(jnp.zeros_like(sizes), jnp.zeros(sizes.shape, jnp.int32))

    def update(norms, state, param_norms=None):
        del param_norms
        factor, rate, cap = like(norms, multiple, 1 - decay, max_warmup_norm)
        info = jnp.finfo(norms.dtype)
        shares, total = shares_of(norms)
        is_capped = (total > cap) & (shares > 0)  # 0: not finite, or zero
        warm_limits = jnp.minimum(cap, info.max) * shares
        warm_limits = jnp.where(is_capped, warm_limits, jnp.inf)
        is_warmup = state.num_seen < warmup - 1
        limits = jnp.where(is_warmup, warm_limits, factor * state.mean)

        clipped = jnp.minimum(norms, limits)
        smallest = jnp.where(state.mean > 0, state.mean, clipped)
        smallest = jnp.minimum(smallest, clipped)
        # Not decay * mean + rate * clipped: decay + rate is not 1 in float32, which
        # adds up where every norm is clipped to a multiple of the mean.
        moved = state.mean + rate * (clipped - state.mean)
        mean = jnp.where(is_warmup, smallest, moved)
        # Where the growth in a step underflows, the mean would stay for ever.
        growth = jnp.maximum(rate * jnp.minimum(factor - 1, 1), info.eps)
        learned = EmaState(
            mean=jnp.maximum(mean, info.tiny / growth),
            num_seen=jnp.minimum(state.num_seen + 1, warmup),
        )
        return limits, _keep(norms, learned, state)

    return Limit(init, update)


def window_sigma(sigmas: ArrayLike = 3.0, *, window: int = 128) -> Limit:
    """Limits a norm to so many standard deviations above the mean of the last norms.

    `mean + sigmas * max(std, 0.01 * abs(mean))` over the last `window` norms before the
    clip, without its own; +inf until half of them are there. The floor of 1 % keeps a
    small rise after a flat stretch from being a spike. A loss may have either sign.

    After a lasting change it follows within `window` steps. It is not robust: a spike
    of s means raises the limit to about `s * (1 / window + sigmas / sqrt(window))`
    means, for `window` steps.

    Args:
      sigmas: Number of standard deviations, >= 0; the source clips at 3, skips at 6.
      window: Number of norms remembered, at least 2.

    Returns:
      The limit, per tree, leaf or group. State: one window a scope.

    Raises:
      ValueError: If an argument is out of range, or at `init` per unit.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = window_sigma(2.0, window=4)
      >>> state = limit.init(jnp.ones(()))
      >>> for norm in [1.0, 3.0, 100.0]:
      ...     value, state = limit.update(jnp.array(norm), state, None)
      ...     print(round(float(value), 3))
      inf
      inf
      4.0

    Reference: OLMo-core, `optim/skip_step_optimizer.py`; Levanter,
    `optim/clip_update_norm.py`.
    """
    check_number("sigmas", sigmas, lambda x: x >= 0, ">= 0")
    window = check_length("window", window, 2)

    def init(sizes):
        _refuse_units("window_sigma", sizes)
        return WindowSigmaState(windows.empty_window(sizes, window))

    def update(norms, state, param_norms=None):
        del param_norms
        is_known = state.window < jnp.inf
        num = jnp.sum(is_known, axis=-1, keepdims=True).astype(norms.dtype)
        values = jnp.where(is_known, state.window, 0)
        # In units of the largest: squares of norms overflow.
        unit = divisor(jnp.max(jnp.abs(values), axis=-1, keepdims=True))
        values = values / jnp.where(num > 0, unit, 1)
        mean = jnp.sum(values, axis=-1, keepdims=True) / jnp.maximum(num, 1)
        squares = jnp.where(is_known, jnp.square(values - mean), 0)
        variance = jnp.sum(squares, axis=-1, keepdims=True) / jnp.maximum(num, 1)
        variance = jnp.maximum(variance, jnp.square(0.01 * mean))
        (factor,) = like(norms, sigmas)
        std = jnp.sqrt(jnp.where(num > 0, variance, 1))
        limits = jnp.where(
            num >= max(2, window // 2), (mean + factor * std) * unit, jnp.inf
        )
        learned = WindowSigmaState(windows.push(state.window, norms))
        # The sign says nothing here: a loss may be negative.
        return limits[..., 0], _keep(jnp.abs(norms), learned, state)

    return Limit(init, update)


def quantile(
    target: ArrayLike = 0.5, *, initial_norm: ArrayLike = 0.1, rate: ArrayLike = 0.2
) -> Limit:
    """Tracks a quantile of the norms with one number: a share `target` stays unclipped.

    After each step the limit is multiplied by `exp(rate * target)` if the norm exceeded
    it, else by `exp(rate * (target - 1))`. It follows a change of 10x to a factor of 2
    within `2.4 / (rate * target)` steps upwards, `2.4 / (rate * (1 - target))`
    downwards, and a spike of any size moves it by no more than any other norm.

    Args:
      target: Share of the norms that the limit lets pass, within (0, 1).
      initial_norm: The first limit, > 0.
      rate: Of the change in a step, > 0.

    Returns:
      The limit, per tree, leaf or group. State: 1 number a scope.

    Raises:
      ValueError: If an argument is out of range, or at `init` per unit.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = quantile(0.5)
      >>> state = limit.init(jnp.ones(()))
      >>> for _ in range(100):
      ...     value, state = limit.update(jnp.array(5.0), state, None)
      >>> print(4.5 < value < 5.5)
      True

    Reference: Andrew et al., arXiv:1905.03871, algorithm 1.
    """
    check_number("target", target, lambda x: 0 < x < 1, "within (0, 1)")
    check_number(
        "initial_norm", initial_norm, lambda x: 0 < x < np.inf, "within (0, inf)"
    )
    check_number("rate", rate, lambda x: 0 < x < np.inf, "within (0, inf)")

    def init(sizes):
        _refuse_units("quantile", sizes)
        return QuantileState(jnp.full_like(sizes, initial_norm))

    def update(norms, state, param_norms=None):
        del param_norms
        limits = state.limit
        share, speed = like(norms, target, rate)
        change = jnp.exp(speed * (share - (norms <= limits).astype(norms.dtype)))
        info = jnp.finfo(norms.dtype)
        learned = QuantileState(jnp.clip(limits * change, info.tiny, info.max))
        return limits, _keep(norms, learned, state)

    return Limit(init, update)


def log_quantile(
    power: ArrayLike = 3.0,
    *,
    min_ratio: ArrayLike = 3.0,
    max_jump: ArrayLike = 5.0,
    early_jump: ArrayLike | None = None,
    min_level: ArrayLike = 0.0,
    window: int = 128,
) -> Limit:
    """Limits a norm or a loss by the spread of the last ones above their median.

    `median * max((high / median)**power, min_ratio)`, where high is the 95th percentile
    of the last `window` norms before the clip, without its own; but no more than
    `max_jump` times the largest of the last `window / 4`. Until half of the window is
    there, the limit is `early_jump` times that, from the second norm on.

    On a logarithmic scale that is a multiple of the spread above the median: it needs
    no Gaussian tail, and units do not matter. A loss may have either sign: where any of
    the window is negative, the scale is linear, and the limit `median + max(2 * power *
    spread, (min_ratio - 1) * abs(median))` from `window / 8` losses on, with the larger
    of the distances of the 5th and 95th percentiles from the median as the spread.

    After a lasting rise of any size, norms are below the limit again after 5 % of the
    window (7 steps of 128), and the limit has forgotten the old ones after `window`
    steps. A single spike moves the limit by one place in the order of the norms.

    Args:
      power: How many times as far above the median as the 95th percentile, on a
        logarithmic scale, >= 0.
      min_ratio: The least limit in units of the median, >= 1.
      max_jump: The largest limit in units of the largest recent norm, >= 1.
      early_jump: The limit in these units until half of the window is there, >= 1; by
        default `max_jump`.
      min_level: A smaller median or largest norm counts as this, >= 0; for a loss
        near 0, which jumps by any factor.
      window: Number of norms remembered, at least 4.

    Returns:
      The limit, per tree, leaf or group. State: two windows a scope.

    Raises:
      ValueError: If an argument is out of range, or at `init` per unit.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = log_quantile(window=4)
      >>> state = limit.init(jnp.ones(()))
      >>> for norm in [1.0, 2.0, 100.0]:
      ...     value, state = limit.update(jnp.array(norm), state, None)
      ...     print(round(float(value), 3))
      inf
      5.0
      4.243
    """
    check_number("power", power, lambda x: x >= 0, ">= 0")
    check_number("min_ratio", min_ratio, lambda x: x >= 1, ">= 1")
    check_number("max_jump", max_jump, lambda x: x >= 1, ">= 1")
    early_jump = max_jump if early_jump is None else early_jump
    check_number("early_jump", early_jump, lambda x: x >= 1, ">= 1")
    check_number("min_level", min_level, lambda x: x >= 0, ">= 0")
    window = check_length("window", window, 4)

    def init(sizes):
        _refuse_units("log_quantile", sizes)
        return PercentileState(windows.empty_ordered_window(sizes, window))

    def update(norms, state, param_norms=None):
        del param_norms
        exponent, least, jump, early, level = like(
            norms, power, min_ratio, max_jump, early_jump, min_level
        )
        num = windows.num_known(state.window)
        low, high, share = windows.percentiles_of(
            state.window, jnp.asarray([5, 50, 95], norms.dtype)
        )
        low, high = (jnp.where(x < jnp.inf, x, 1) for x in (low, high))
        log_low, log_high = _log(low), _log(high)
        logs = log_low + share * (log_high - log_low)
        median, spread = logs[..., 1], logs[..., 2] - logs[..., 1]
        limits = jnp.exp(median + jnp.maximum(exponent * spread, jnp.log(least)))
        largest = windows.largest_of(state.window, window // 4)
        first_limits = early * jnp.maximum(largest, level)
        first_limits = jnp.where(num > 0, first_limits, jnp.inf)
        has_half = num >= window // 2
        limits = jnp.minimum(limits, jump * largest)
        limits = jnp.maximum(limits, least * level)
        limits = jnp.where(has_half, limits, first_limits)
        # Once a loss has changed its sign, ratios to its median mean nothing: a scale
        # for each sign would make an event of every change.
        lowest = windows.smallest_of(state.window)
        values = low + share * (high - low)
        below, middle, above = (values[..., i] for i in range(3))
        spread = jnp.maximum(above - middle, middle - below)
        rise = jnp.maximum(2 * exponent * spread, (least - 1) * jnp.abs(middle))
        linear = jnp.where(num >= window // 8, middle + rise, jnp.inf)
        limits = jnp.where(lowest > 0, limits, linear)
        learned = PercentileState(windows.push_in_order(state.window, norms))
        return limits, _keep(jnp.abs(norms), learned, state)

    return Limit(init, update)


def drift(max_ratio: ArrayLike = 5.0, *, window: int = 64, patience: int = 3) -> Limit:
    """Limits a norm that stays above its slow moving average, as in an explosion.

    `mean * max(change**2.5, max_ratio)`, where mean is the geometric moving average of
    the norms and change that of their ratio, up or down, from step to step; +inf unless
    the last `patience - 1` norms were above that too. It is meant for the share of a
    leaf in the global norm: a layer that explodes under larger ones shows nowhere else.

    After a lasting rise of any size the limit follows within about `window` steps.

    Args:
      max_ratio: The least limit in units of the mean, > 1.
      window: Number of steps over which the averages forget; at first they are plain
        averages.
      patience: How many norms in a row must be above for the last of them to exceed
        the limit, at least 1.

    Returns:
      The limit, per tree, leaf or group. State: 5 numbers a scope.

    Raises:
      ValueError: If an argument is out of range, or at `init` per unit.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = drift(patience=2)
      >>> state = limit.init(jnp.ones(()))
      >>> for norm in [1.0] * 50 + [8.0, 8.0]:
      ...     value, state = limit.update(jnp.array(norm), state, None)
      >>> print(round(float(value), 1))
      5.2
    """
    check_number("max_ratio", max_ratio, lambda x: x > 1, "> 1")
    window = check_length("window", window, 2)
    patience = check_length("patience", patience, 1)

    def init(sizes):
        _refuse_units("drift", sizes)
        return DriftState(jnp.zeros((*sizes.shape, 5), sizes.dtype))

    def update(norms, state, param_norms=None):
        del param_norms
        mean, change, previous, num_seen, num_above = (
            state.memory[..., i] for i in range(5)
        )
        (least,) = like(norms, max_ratio)
        limits = jnp.exp(mean + jnp.maximum(2.5 * change, jnp.log(least)))
        is_above = (num_seen > 0) & (norms > limits)
        num_above = jnp.where(is_above, num_above + 1, 0)
        limits = jnp.where(num_above >= patience, limits, jnp.inf)

        log = _log(norms)
        difference = jnp.where(num_seen > 0, jnp.abs(log - previous), 0)
        rate = jnp.maximum(1 / (num_seen + 1), 1 / window)
        rate_of_change = jnp.maximum(1 / jnp.maximum(num_seen, 1), 1 / window)
        learned = [
            mean + rate * (log - mean),
            change + rate_of_change * (difference - change),
            log,
            jnp.minimum(num_seen + 1, window),
            jnp.minimum(num_above, patience),
        ]
        return limits, _keep(norms, DriftState(jnp.stack(learned, axis=-1)), state)

    return Limit(init, update)


def above_lowest(
    max_ratio: ArrayLike = 8.0, *, min_level: ArrayLike = 0.01, window: int = 8
) -> Limit:
    """Limits norms that stay far above the lowest level so far.

    `max_ratio` times the smallest moving average of the norms, or `min_level` if that
    is larger; +inf unless the last `window - 1` norms were above that too. It is meant
    for the loss: what rises by a little in each step exceeds no limit on its recent
    past, however far it rises. Once a norm has been negative, ratios mean nothing, and
    there is no limit any more.

    After a lasting rise of any size, one norm in `window` is above the limit, and the
    level starts afresh.

    Args:
      max_ratio: The limit in units of the lowest level, > 1. Of 424 healthy runs of the
        zoo in `tests/benchmarks` the loss of 32 stays above 8 times, of 47 above 4
        times; the data change in 24 of these.
      min_level: The smallest level, >= 0, in units of the loss. A penalty that starts
        at zero grows by any factor.
      window: Number of norms that must be above in a row, and over which the average
        forgets, at least 2.

    Returns:
      The limit, per tree, leaf or group. State: 4 numbers a scope.

    Raises:
      ValueError: If an argument is out of range, or at `init` per unit.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = above_lowest(window=2)
      >>> state = limit.init(jnp.ones(()))
      >>> for loss in [2.0, 1.0, 3.0, 12.5, 13.0]:
      ...     value, state = limit.update(jnp.array(loss), state, None)
      >>> print(round(float(value), 1))
      12.0
    """
    check_number("max_ratio", max_ratio, lambda x: x > 1, "> 1")
    check_number("min_level", min_level, lambda x: x >= 0, ">= 0")
    window = check_length("window", window, 2)

    def init(sizes):
        _refuse_units("above_lowest", sizes)
        start = jnp.asarray([0, jnp.inf, 0, 0], sizes.dtype)
        return LowestState(jnp.broadcast_to(start, (*sizes.shape, 4)))

    def update(norms, state, param_norms=None):
        del param_norms
        mean, lowest, num_seen, num_above = (state.memory[..., i] for i in range(4))
        ratio, least = like(norms, max_ratio, min_level)
        limits = ratio * jnp.maximum(lowest, least)
        limits = jnp.where(lowest > 0, limits, jnp.inf)
        num_above = jnp.where(norms > limits, num_above + 1, 0)
        is_lasting = num_above >= window
        limits = jnp.where(is_lasting, limits, jnp.inf)

        # The difference of two finite norms is finite, their sum may not be.
        num_seen = jnp.minimum(num_seen + 1, window)
        mean = mean + (norms - mean) / num_seen
        lowest = jnp.where(is_lasting, mean, jnp.minimum(lowest, mean))
        learned = jnp.stack(
            [
                mean,
                lowest,
                num_seen,
                jnp.where(is_lasting, 0, num_above),
            ],
            axis=-1,
        )
        learned = jnp.where((norms > 0)[..., None], learned, 0)
        return limits, _keep(jnp.abs(norms), LowestState(learned), state)

    return Limit(init, update)


def _refuse_units(name: str, sizes: Any) -> None:
    if isinstance(sizes, tuple):
        raise ValueError(
            f"limits.{name} learns, which per unit no limit does: use it per tree, "
            "leaf or group"
        )


def _keep(norms: jax.Array, learned: Any, state: Any) -> Any:
    """What a limit learned, in the scopes whose norm is finite and not zero.

    NaN, from a traced argument that is NaN in this step, is not kept either.
    """
    learns = (norms > 0) & (norms < jnp.inf)

    def keep(new, old):
        where = learns[(...,) + (None,) * (new.ndim - norms.ndim)]
        return jnp.where(where & (new == new), new, old)

    return jax.tree.map(keep, learned, state)


def _log(norms: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(norms, jnp.finfo(norms.dtype).tiny))


def _root_mean_square(first: jax.Array, second: jax.Array, share: jax.Array):
    """`sqrt((1 - share) * first**2 + share * second**2)`; the squares may overflow."""
    unit = divisor(jnp.maximum(first, second))
    unit = jnp.where(unit > 0, unit, 1)
    first, second = jnp.square(first / unit), jnp.square(second / unit)
    mean = first + share * (second - first)
    return jnp.where(mean > 0, unit * jnp.sqrt(jnp.where(mean > 0, mean, 1)), 0)
