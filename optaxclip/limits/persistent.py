"""Limits for signals that stay above their past: rules for detection, not clips."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optaxclip.checks import check_length, check_number
from optaxclip.limits.limit import Limit, cast_like, keep_finite, refuse_units
from optaxclip.numerics import safe_log
from optaxclip.packing import Packing, View

RISE = Packing(floats=("mean", "change", "last", "num_seen", "num_above"))
"""How `SustainedRiseState.memory` is packed."""
LOWEST = Packing(floats=("mean", "lowest", "num_seen", "num_above"))
"""How `LowestState.memory` is packed."""
START = Packing(floats=("mean", "num_seen"))
"""How `StartState.memory` is packed."""


class SustainedRiseState(NamedTuple):
    """State of `sustained_rise`."""

    memory: jax.Array
    """`[..., 5]`: moving averages of the logarithm of the norms and of its change from
    step to step; the last logarithm; the number of norms seen, up to `window`, and of
    those in a row above the limit, up to `patience`. `numbers` reads it."""

    @property
    def numbers(self) -> View:
        """What `memory` holds by its names, `[...]` each."""
        return View(RISE, self.memory)


class LowestState(NamedTuple):
    """State of `above_lowest`."""

    memory: jax.Array
    """`[..., 4]`: the moving average of the norms; the smallest that it has been, +inf
    before the first norm and 0 after a negative one; how many norms it holds; and how
    many of the last norms in a row were above the limit. `numbers` reads it."""

    @property
    def numbers(self) -> View:
        """As of a `SustainedRiseState`."""
        return View(LOWEST, self.memory)


class StartState(NamedTuple):
    """State of `fraction_of_start`."""

    memory: jax.Array
    """`[..., 2]`: the mean logarithm of the first norms; and how many it holds, up to
    `num_steps`, or -1 once a norm has been negative. `numbers` reads it."""

    @property
    def numbers(self) -> View:
        """As of a `SustainedRiseState`."""
        return View(START, self.memory)


# Those of the rule on shares: `explosions/rules.py` says where they come from.
def sustained_rise(
    max_ratio: ArrayLike = 5.0, *, window: int = 64, patience: int = 3
) -> Limit:
    """Limits a norm that stays above its slow moving average, as in an explosion.

    `mean * max(change**2.5, max_ratio)`, where mean is the geometric moving average of
    the norms and change that of their ratio, up or down, from step to step; +inf unless
    the last `patience - 1` norms were above that too. It is meant for the share of a
    leaf in the global norm: a layer that explodes under larger ones shows nowhere else.

    After a lasting rise of any size the limit follows within about `window` steps.

    Args:
      max_ratio: Lower bound of the limit, as a multiple of the mean, > 1.
      window: Number of steps over which the averages forget, at least 2; at first they
        are plain averages.
      patience: How many norms in a row must be above for the last of them to exceed
        the limit, at least 1.

    Returns:
      The limit. State: 5 numbers per scope.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> limit = optaxclip.limits.sustained_rise(patience=2)
      >>> state, update = limit.init(jnp.ones(())), jax.jit(limit.update)
      >>> for norm in [1.0] * 50 + [8.0, 8.0]:
      ...     value, state = update(jnp.array(norm), state, None)
      >>> print(round(float(value), 1))
      5.2
    """
    check_number("max_ratio", max_ratio, lambda x: x > 1, "> 1")
    window = check_length("window", window, 2)
    patience = check_length("patience", patience, 1)

    def init(sizes):
        refuse_units("sustained_rise", sizes)
        return SustainedRiseState(_first(RISE, sizes))

    def update(norms, state, param_norms=None):
        del param_norms
        before = state.numbers
        (least,) = cast_like(norms, max_ratio)
        # 2.5 mean changes are about two standard deviations of normal noise.
        limits = jnp.exp(before.mean + jnp.maximum(2.5 * before.change, jnp.log(least)))
        is_above = (before.num_seen > 0) & (norms > limits)
        num_above = jnp.where(is_above, before.num_above + 1, 0)
        # One value above is the fault of its batch as often as of the run.
        limits = jnp.where(num_above >= patience, limits, jnp.inf)

        log = safe_log(norms)
        difference = jnp.where(before.num_seen > 0, jnp.abs(log - before.last), 0)
        # A plain mean until the window is full, then a moving one.
        rate = jnp.maximum(1 / (before.num_seen + 1), 1 / window)
        rate_of_change = jnp.maximum(1 / jnp.maximum(before.num_seen, 1), 1 / window)
        learned = {
            "mean": before.mean + rate * (log - before.mean),
            "change": before.change + rate_of_change * (difference - before.change),
            "last": log,
            "num_seen": jnp.minimum(before.num_seen + 1, window),
            "num_above": jnp.minimum(num_above, patience),
        }
        learned = SustainedRiseState(RISE.stack(learned))
        return limits, keep_finite(norms, learned, state)

    return Limit(init, update)


# Those of the rule on the loss: `explosions/rules.py` says what other numbers do. A
# length of 8 means that an explosion is noticed 7 steps after it has passed the limit.
def above_lowest(
    max_ratio: ArrayLike = 8.0, *, min_level: ArrayLike = 0.01, window: int = 8
) -> Limit:
    """Limits norms that stay far above the lowest level so far.

    `max_ratio` times the smallest moving average of the norms, or `min_level` if that
    is larger; +inf unless the last `window - 1` norms were above that too. It is meant
    for the loss: what rises by a little in each step exceeds no limit on its recent
    past, however far it rises. Once a norm has been negative, ratios mean nothing, and
    there is no longer a limit.

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
      The limit. State: 4 numbers per scope.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> limit = optaxclip.limits.above_lowest(window=2)
      >>> state, update = limit.init(jnp.ones(())), jax.jit(limit.update)
      >>> for loss in [2.0, 1.0, 3.0, 12.5, 13.0]:
      ...     value, state = update(jnp.array(loss), state, None)
      >>> print(round(float(value), 1))
      12.0
    """
    check_number("max_ratio", max_ratio, lambda x: x > 1, "> 1")
    check_number("min_level", min_level, lambda x: x >= 0, ">= 0")
    window = check_length("window", window, 2)

    def init(sizes):
        refuse_units("above_lowest", sizes)
        return LowestState(_first(LOWEST, sizes, lowest=jnp.inf))

    def update(norms, state, param_norms=None):
        del param_norms
        before = state.numbers
        ratio, least = cast_like(norms, max_ratio, min_level)
        limits = ratio * jnp.maximum(before.lowest, least)
        limits = jnp.where(before.lowest > 0, limits, jnp.inf)
        num_above = jnp.where(norms > limits, before.num_above + 1, 0)
        is_lasting = num_above >= window
        limits = jnp.where(is_lasting, limits, jnp.inf)

        # The difference of two finite norms is finite, their sum may not be.
        num_seen = jnp.minimum(before.num_seen + 1, window)
        mean = before.mean + (norms - before.mean) / num_seen
        # After an alarm the level of today is the one to rise from.
        lowest = jnp.where(is_lasting, mean, jnp.minimum(before.lowest, mean))
        learned = {
            "mean": mean,
            "lowest": lowest,
            "num_seen": num_seen,
            "num_above": jnp.where(is_lasting, 0, num_above),
        }
        learned = LOWEST.stack(learned)
        learned = jnp.where((norms > 0)[..., None], learned, 0)
        return limits, keep_finite(jnp.abs(norms), LowestState(learned), state)

    return Limit(init, update)


# For 1e-3 see START in `explosions/rules.py`. The mean is of 8 norms, so that a first
# one that is 1000 times too large raises the floor by 1000**(1 / 8) = 2.4.
def fraction_of_start(fraction: ArrayLike = 1e-3, *, num_steps: int = 8) -> Limit:
    """Limits norms to a fraction of where they began: a floor for other limits.

    `fraction` times the geometric mean of the first `num_steps` norms. Without noise a
    loss and its gradient fall by any factor, and then rise again by nearly as much;
    what is far below the start is no explosion. As in `maximum(log_quantile(),
    fraction_of_start())`. Once a norm has been negative, ratios mean nothing, and the
    limit is -inf: the other one decides.

    Args:
      fraction: The limit in units of the first norms, >= 0.
      num_steps: Of how many norms the mean is, at least 1.

    Returns:
      The limit. State: 2 numbers per scope.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> limit = optaxclip.limits.fraction_of_start(0.01, num_steps=2)
      >>> state, update = limit.init(jnp.ones(())), jax.jit(limit.update)
      >>> for loss in [100.0, 25.0, 3.0]:
      ...     value, state = update(jnp.array(loss), state, None)
      >>> print(round(float(value), 3))
      0.5
    """
    check_number("fraction", fraction, lambda x: x >= 0, ">= 0")
    num_steps = check_length("num_steps", num_steps, 1)

    def init(sizes):
        refuse_units("fraction_of_start", sizes)
        return StartState(_first(START, sizes))

    def update(norms, state, param_norms=None):
        del param_norms
        mean, num_seen = state.numbers.mean, state.numbers.num_seen
        (share,) = cast_like(norms, fraction)
        limits = jnp.where(num_seen > 0, share * jnp.exp(mean), 0)
        limits = jnp.where(num_seen < 0, -jnp.inf, limits)
        is_first = (num_seen >= 0) & (num_seen < num_steps)
        num = jnp.maximum(num_seen + 1, 1)
        # Of logarithms, so that one large norm among the first hardly counts.
        next_mean = mean + (safe_log(norms) - mean) / num
        learned = {
            "mean": jnp.where(is_first, next_mean, mean),
            "num_seen": jnp.where(is_first, num, num_seen),
        }
        learned = START.stack(learned)
        learned = jnp.where((norms > 0)[..., None], learned, -1)
        return limits, keep_finite(jnp.abs(norms), StartState(learned), state)

    return Limit(init, update)


def _first(packing: Packing, sizes: jax.Array, **others: float) -> jax.Array:
    """The memory before the first norm: zeros, but for `others`."""
    start = packing.pack_known(dict.fromkeys(packing.names, 0.0) | others)
    shape = (*sizes.shape, len(packing.names))
    return jnp.broadcast_to(start.astype(sizes.dtype), shape)
