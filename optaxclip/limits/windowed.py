"""Limits learned from a window of the last norms."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optaxclip.checks import check_length, check_number
from optaxclip.limits import windows
from optaxclip.limits.limit import Limit, cast_like, keep_finite, refuse_units
from optaxclip.numerics import safe_log, safe_unit


class PercentileState(NamedTuple):
    """State of `percentile` and of `log_quantile`."""

    window: jax.Array
    """`[..., 2, 1 + window]`: the last norms as they came, and the same ascending; +inf
    where there is none yet. Before the first stands their number, before the others
    0."""


class WindowSigmaState(NamedTuple):
    """State of `window_sigma`."""

    window: jax.Array
    """`[..., window]`: the last norms as they came; +inf where there is none yet."""


# The paper advises 10, of all norms so far. 1024 of them are a choice: 103 norms lie
# below the percentile, and the two windows take 8 KiB a scope.
def percentile(percent: ArrayLike = 10.0, *, window: int = 1024) -> Limit:
    """Limits a norm to a percentile of the last norms, its own included.

    Exact, with linear interpolation, as `numpy.percentile`. Learns the norms before the
    clip: after a lasting change it follows within `window` steps. One spike of any size
    moves the limit by one place in their order at most.

    Args:
      percent: The percentile, within [0, 100].
      window: Number of norms remembered, at least 1.

    Returns:
      The limit. State: two windows per scope.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> limit = optaxclip.limits.percentile(50.0, window=3)
      >>> state, update = limit.init(jnp.ones(())), jax.jit(limit.update)
      >>> for norm in [1.0, 2.0, 9.0, 3.0]:
      ...     value, state = update(jnp.array(norm), state, None)
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
        refuse_units("percentile", sizes)
        return PercentileState(windows.empty_ordered_window(sizes, window))

    def update(norms, state, param_norms=None):
        del param_norms
        learned = PercentileState(windows.push_in_order(state.window, norms))
        # Learned first: as in the reference its own norm is part of the percentile.
        state = keep_finite(norms, learned, state)
        (percents,) = cast_like(norms, [percent])
        low, high, share = windows.percentiles_of(state.window, percents)
        rise = jnp.where(high > low, high, 0) - jnp.where(high > low, low, 0)
        return (low + share * rise)[..., 0], state

    return Limit(init, update)


# Levanter clips at 3 and keeps 128.
def window_sigma(sigmas: ArrayLike = 3.0, *, window: int = 128) -> Limit:
    """Limits a norm to `sigmas` standard deviations above the mean of the last norms.

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
      The limit. State: one window per scope.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> limit = optaxclip.limits.window_sigma(2.0, window=4)
      >>> state, update = limit.init(jnp.ones(())), jax.jit(limit.update)
      >>> for norm in [1.0, 3.0, 100.0]:
      ...     value, state = update(jnp.array(norm), state, None)
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
        refuse_units("window_sigma", sizes)
        return WindowSigmaState(windows.empty_window(sizes, window))

    def update(norms, state, param_norms=None):
        del param_norms
        is_known = state.window < jnp.inf
        num = jnp.sum(is_known, axis=-1, keepdims=True).astype(norms.dtype)
        values = jnp.where(is_known, state.window, 0)
        # In units of the largest: squares of norms overflow.
        unit = safe_unit(jnp.max(jnp.abs(values), axis=-1, keepdims=True))
        values = values / jnp.where(num > 0, unit, 1)
        mean = jnp.sum(values, axis=-1, keepdims=True) / jnp.maximum(num, 1)
        squares = jnp.where(is_known, jnp.square(values - mean), 0)
        variance = jnp.sum(squares, axis=-1, keepdims=True) / jnp.maximum(num, 1)
        variance = jnp.maximum(variance, jnp.square(0.01 * mean))
        (factor,) = cast_like(norms, sigmas)
        std = jnp.sqrt(jnp.where(num > 0, variance, 1))
        limits = jnp.where(
            num >= max(2, window // 2), (mean + factor * std) * unit, jnp.inf
        )
        learned = WindowSigmaState(windows.push(state.window, norms))
        # The sign says nothing here: a loss may be negative.
        return limits[..., 0], keep_finite(jnp.abs(norms), learned, state)

    return Limit(init, update)


# Those of the rule on the norm: `explosions/rules.py` says what other numbers do.
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
    full, the limit is `early_jump` times the largest of these; +inf for the first norm.

    On a logarithmic scale that is a multiple of the spread above the median: it needs
    no Gaussian tail, and units do not matter. A loss may have either sign: where any of
    the window is negative, the scale is linear, and the limit `median + max(2 * power *
    spread, (min_ratio - 1) * abs(median))` from `window / 8` losses on, with the larger
    of the distances of the 5th and 95th percentiles from the median as the spread.

    After a lasting rise of any size, norms are below the limit again after 5 % of the
    window (7 steps of 128), and the limit has forgotten the old ones after `window`
    steps. A single spike moves the limit by one place in the order of the norms.

    Args:
      power: The limit is this many times as far above the median as the 95th
        percentile is, on a logarithmic scale; >= 0.
      min_ratio: Lower bound of the limit, as a multiple of the median, >= 1.
      max_jump: Upper bound, as a multiple of the largest recent norm, >= 1.
      early_jump: The limit in these units until half of the window is there, >= 1; by
        default `max_jump`.
      min_level: The limit is at least `min_ratio` times this, and `early_jump` times
        this at first; >= 0. For a loss near 0, which jumps by any factor.
      window: Number of norms remembered, at least 4.

    Returns:
      The limit. State: two windows per scope.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> limit = optaxclip.limits.log_quantile(window=4)
      >>> state, update = limit.init(jnp.ones(())), jax.jit(limit.update)
      >>> for norm in [1.0, 2.0, 100.0]:
      ...     value, state = update(jnp.array(norm), state, None)
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
        refuse_units("log_quantile", sizes)
        return PercentileState(windows.empty_ordered_window(sizes, window))

    def update(norms, state, param_norms=None):
        del param_norms
        exponent, least, jump, early, level = cast_like(
            norms, power, min_ratio, max_jump, early_jump, min_level
        )
        num = windows.num_known(state.window)
        # Six outliers among 128 do not reach the 95th percentile. Where logarithms are
        # normal it is 1.64 standard deviations up: a power of 3 allows 4.9.
        low, high, share = windows.percentiles_of(
            state.window, jnp.asarray([5, 50, 95], norms.dtype)
        )
        low, high = (jnp.where(x < jnp.inf, x, 1) for x in (low, high))
        log_low, log_high = safe_log(low), safe_log(high)
        logs = log_low + share * (log_high - log_low)
        # Upwards only: small norms are no explosion, however small they are.
        median, spread = logs[..., 1], logs[..., 2] - logs[..., 1]
        limits = jnp.exp(median + jnp.maximum(exponent * spread, jnp.log(least)))
        # Nothing healthy jumps far above all of the last quarter of the window: of 128
        # norms 32, after which one that was large and taken is forgotten here.
        largest = windows.largest_of(state.window, window // 4)
        first_limits = early * jnp.maximum(largest, level)
        first_limits = jnp.where(num > 0, first_limits, jnp.inf)
        # A spread is known from half of the window on, where four of 64 norms lie
        # above the percentile; before, a jump is all there is.
        has_half = num >= window // 2
        limits = jnp.minimum(limits, jump * largest)
        # Near zero a healthy loss jumps by any factor.
        limits = jnp.maximum(limits, least * level)
        limits = jnp.where(has_half, limits, first_limits)
        # Once a loss has changed its sign, ratios to its median mean nothing: a scale
        # for each sign would make an event of every change.
        lowest = windows.smallest_of(state.window)
        values = low + share * (high - low)
        below, middle, above = (values[..., i] for i in range(3))
        spread = jnp.maximum(above - middle, middle - below)
        # A small spread raises the limit above by `power * spread`. Here it is twice
        # that, a choice: the largest recent loss does not bound this limit.
        rise = jnp.maximum(2 * exponent * spread, (least - 1) * jnp.abs(middle))
        # Sooner than half of the window (16 losses of 128), because no jump is judged.
        linear = jnp.where(num >= window // 8, middle + rise, jnp.inf)
        limits = jnp.where(lowest > 0, limits, linear)
        learned = PercentileState(windows.push_in_order(state.window, norms))
        return limits, keep_finite(jnp.abs(norms), learned, state)

    return Limit(init, update)
