"""The rules for an explosion: their signals, default limits, and what they find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import limits
from optaxclip.extras import loss_of
from optaxclip.numerics import divide, promote, saturating_cast
from optaxclip.xla import materialize

RULES = ("nonfinite", "norm", "share", "loss")

# The figures below are false alarms in 10,000 healthy steps of the 72 recorded runs on
# which the rules were tuned, and percent of their explosions that are noticed.
# `tests/benchmarks/constants.py` changes each number alone and prints them.

# Below 1/1000 of where norm and loss began nothing has exploded. Without noise both
# fall by any factor, and a schedule-free average lets them rise again by nearly as
# much. Two runs of `tests/laws/test_optax.py` were rolled back five times without this.
# On the recorded runs no fraction from 0 to 0.1 changes a figure, and neither does a
# mean of 4 or 16 steps: 1/1000 of 8 is a choice.
START = limits.fraction_of_start(1e-3)

# As set here: 7.3 false alarms, and 99.7 % noticed. With a power of 2: 14.7 alarms; of
# 6: 98.9 %. With a min_ratio of 2: 9.2 alarms; of 6: 99.1 %. With a max_jump of 2.5:
# 8.5 alarms; of 10: the same. With a window of 64: 7.9 alarms; of 256: 7.0, for twice
# the memory.
NORM_LIMIT = limits.maximum(
    limits.log_quantile(power=3.0, min_ratio=3.0, max_jump=5.0, window=128), START
)

# All three are choices: half and twice of each give the same there, since MIN_GROWTH,
# below, decides. 64 steps are those over which the growth of a leaf is measured. 3 in a
# row, because one value above is as often the fault of its batch: the alarm comes two
# steps after the share has risen.
SHARE_LIMIT = limits.sustained_rise(5.0, window=64, patience=3)

# A loss jumps less than a norm. With a power of 1.8: 18.0 alarms; of 3.4: 98.0 %. With
# a min_ratio of 1.4: 7.5 alarms; of 2.4: 99.1 %. With an early_jump of 2, twice as many
# early steps are flagged; with 5 none, but most runs of the zoo that explode from their
# first steps are missed. min_level: near zero, as at the minimum of a function without
# noise or where a penalty begins, a healthy loss jumps by any factor; the recorded runs
# are never there. The second limit is for a loss that rises smoothly. With 4 times in
# place of 8: 7.5 alarms; with 4 steps: 8.1; with 16 of either: the same.
LOSS_LIMIT = limits.maximum(
    limits.minimum(
        limits.log_quantile(power=2.4, min_ratio=1.7, early_jump=2.5, min_level=0.01),
        limits.above_lowest(8.0, window=8),
    ),
    START,
)

MIN_GROWTH = 20.0
"""A share counts only where the leaf's own norm has grown by this factor as well.

That is its geometric mean growth over the last 64 steps; before, no share counts. A
share alone also rises when the other leaves fall. On the recorded runs 3 to 20 notice
the same, and 40 misses one run of six; the larger, the fewer false alarms where gates
that start at zero open during a warm-up.
"""
MIN_KNOWN = 5
"""In that mean, of the eight steps that stand for the last 64, this many must have a
norm: more than half, so that neither non-finite steps nor zeros blind the rule."""
MAX_GAP = 10
"""Explosions at most this many steps apart are one: a run that is skipped, rolled back
and accepted again is flagged with gaps of a few steps."""


class Signals(NamedTuple):
    """What is measured of a step; of one dtype, see `signals_of`."""

    norms: jax.Array
    """Of each leaf: `[num_leaves]`. All else is `[]`, but for `shares`."""
    norm: jax.Array
    shares: jax.Array
    """Of each leaf in the norm; 0 on a step of which any leaf is non-finite."""
    loss: jax.Array
    """`recording.NO_LOSS` where it is not given."""
    has_finite_updates: jax.Array
    is_finite: jax.Array
    """The updates, and the loss if it is given."""
    has_loss: bool


class Bounds(NamedTuple):
    """The limit of each signal, +inf for none."""

    norm: jax.Array
    shares: jax.Array
    loss: jax.Array


class Fired(NamedTuple):
    """Which of the `RULES` fired."""

    nonfinite: jax.Array
    norm: jax.Array
    share: jax.Array
    loss: jax.Array

    def any(self) -> jax.Array:
        """Whether the step exploded."""
        return self.nonfinite | self.norm | self.share | self.loss


def signals_of(norms: jax.Array, norm: jax.Array, value: Any, rule_states: Any):
    """The signals, of the dtype in which rules have kept earlier ones.

    Also where the updates are wider than the parameters that `init` was given.
    """
    kept = [x.dtype for x in jax.tree.leaves(rule_states)]
    floats = [dtype for dtype in kept if jnp.issubdtype(dtype, jnp.floating)]
    dtype = promote(jnp.float32, *floats) if floats else norm.dtype
    norms, norm = (saturating_cast(x, dtype) for x in (norms, norm))
    is_positive = (norm > 0) & (norm < jnp.inf)
    shares = divide(norms, jnp.where(is_positive, norm, 1))
    loss = loss_of(value, dtype)
    is_finite = has_finite_updates = norm < jnp.inf
    # Nothing of a step enters a rule when any of its leaves is non-finite.
    shares = jnp.where(has_finite_updates, shares, 0)
    if value is not None:
        is_finite &= jnp.isfinite(loss)
    has_loss = value is not None
    return Signals(norms, norm, shares, loss, has_finite_updates, is_finite, has_loss)


def first_states(rules: Sequence[limits.Limit | None], sizes: jax.Array) -> Any:
    """The states of the rules on norm, share and loss before the first step.

    Args:
      rules: Their limits, None for no rule.
      sizes: `[num_leaves]`: the number of elements of each.
    """
    of_signals = jnp.sum(sizes), sizes, jnp.ones([], sizes.dtype)
    norm, share, loss = (
        () if rule is None else rule.init(size)
        for rule, size in zip(rules, of_signals, strict=True)
    )
    return norm, share, loss


def apply_rules(
    rules: Sequence[limits.Limit | None], signals: Signals, states: Any
) -> tuple[Bounds, Any]:
    """The limits of a step, and the next states of the rules."""
    bounds, after = [], []
    of_rules = signals.norm, signals.shares, signals.loss
    for name, rule, x, state in zip(RULES[1:], rules, of_rules, states, strict=True):
        bound = jnp.full_like(x, jnp.inf)
        if rule is not None and (name != "loss" or signals.has_loss):
            found, state = rule.update(x, state, None)
            bound = jnp.broadcast_to(found, x.shape).astype(x.dtype)
        bounds.append(materialize(bound))
        after.append(state)
    return Bounds(*bounds), (after[0], after[1], after[2])


def fired_of(signals: Signals, bounds: Bounds, has_grown: jax.Array) -> Fired:
    """Which rules fire. `has_grown`: of each leaf, whether a share counts."""

    def exceeds(x, limit):
        return (x > limit) & (x < jnp.inf)

    return Fired(
        nonfinite=~signals.is_finite,
        norm=exceeds(signals.norm, bounds.norm),
        share=jnp.any(exceeds(signals.shares, bounds.shares) & has_grown),
        loss=exceeds(signals.loss, bounds.loss),
    )
