"""Losses that rise too slowly for any rule, and whether the parameters are at fault.

Internal. A loss may rise by a little in each step, or jump before the rules know
enough, and stay there. So when a snapshot is due, the level of the loss is compared
with that at the older snapshot. But where values are learned from their own
predictions, the loss of a healthy run rises too, and is lower at the snapshot. Where
the gradients point tells them apart: if the steps were at fault, the loss falls on the
way back to the snapshot; if the targets move, it falls on the way on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip.explosions.state import Verdict

RISE = 1.2
"""The level that is asked about, in units of that at the snapshot. Healthy runs reach
it too, so it decides nothing alone. Some that are at fault rise by little more: the
zoo's "rows of digits", "three scales" and "selective copying"."""
MIN_NOISE = 1.0
"""Nor is a rise asked about that noise explains: less than this many times the noise.
Of a normal loss, 1 is 4.4 standard errors of the difference of two levels. How many
healthy runs were taken back before: `tests/benchmarks/README.md`, "Nothing to learn".
"""
MIN_FIRST_NOISE = 1.5
"""The same above the first loss, which may be low by chance: 1.6 standard errors. With
2, a seed of "rows of digits" is lost; with 1, four times as many runs that begin with
nothing to learn are taken back, of those with momentum on batches of 4."""
MIN_OF_FIRST = 0.5
"""Nor is a level asked about below this part of the first loss. Without noise, momentum
that overshoots a minimum lets a loss rise by any factor as well, and fall again: that
of Lion on a parabola falls from 24 to 0.005, and rises to 0.06."""
FAR = 1.2
"""A level is far above the first loss, in units of it: less may be noise. A choice."""
SPAN = 16
"""Steps over which the level forgets: short against the age of a snapshot."""
NUM_PULLS = 16
"""Steps before a snapshot is due of which the gradients are asked: those of them in
which the loss has risen already."""
LEAST_PULL = 3.0
"""How many standard errors of a sum around zero the sum of the pulls must be above it:
16 equal ones are 4, and 10 are necessary. With 8 steps and 2 errors the zoo's healthy
"TD(0), SGD" is rolled back to its harm; with the sign of the last pull alone, four of
its kind are."""


class Rise(NamedTuple):
    """What is remembered of the level of the loss, float32 each."""

    first: jax.Array
    """The loss of the first healthy step; +inf before it."""
    level: jax.Array
    """Moving average of the loss over healthy steps; +inf before the first."""
    last: jax.Array
    """The last loss; +inf before the first."""
    noise: jax.Array
    """Moving average of how far a loss is from the last one, so that a trend is none;
    0 before the first."""
    older: jax.Array
    """What it was when the older snapshot was taken, or the last trial failed; +inf
    before the first step."""
    older_noise: jax.Array
    """The noise then; 0 before the first step."""
    newer: jax.Array
    """What the level was when the newer snapshot was taken."""
    newer_noise: jax.Array
    """The noise then."""
    pulls: jax.Array
    """Sum of the last pulls. A pull is the cosine of the gradients and the way from the
    older snapshot to the parameters: where it is positive, the loss falls on the way
    back."""
    squares: jax.Array
    """Sum of their squares."""

    @property
    def middle(self) -> jax.Array:
        """Half of the rise above it is gone."""
        return 0.5 * self.level + 0.5 * self.older


def is_of_use(rise: Rise, now: dict[str, Any], snapshot_every: int) -> jax.Array:
    """Whether the pull of a step is of use: bool `[]`.

    If the loss has risen, and the step is one of the last before a snapshot is due.
    """
    return _has_risen(rise) & (_num_left(now, snapshot_every) < NUM_PULLS)


def learn(
    rise: Rise,
    seen: Verdict,
    now: dict[str, Any],
    pull: jax.Array,
    is_healthy: jax.Array,
    snapshot_every: int,
) -> Rise:
    """The next one, if the step is healthy; else the same.

    `pull` is 0 where it is of no use.
    """
    if not seen.has_loss_rule:
        return rise
    # The first loss is its own level: inf - inf would make the average NaN for good.
    before = jnp.where(rise.level < jnp.inf, rise.level, seen.signal)
    # At first as a plain mean does.
    rate = jnp.maximum(1 / now["steps"], 1 / SPAN)
    level = before + rate * (seen.signal - before)
    distance = jnp.where(rise.last < jnp.inf, jnp.abs(seen.signal - rise.last), 0)
    noise = rise.noise + rate * (distance - rise.noise)
    # Not of a loss that is non-finite: its step is healthy where its gradients are.
    is_known = is_healthy & jnp.isfinite(seen.signal)
    first = jnp.where(rise.first < jnp.inf, rise.first, level)
    older = jnp.where(rise.older < jnp.inf, rise.older, level)
    num_asked = min(NUM_PULLS, snapshot_every)
    is_kept = _num_left(now, snapshot_every) < num_asked - 1
    pulls, squares = (jnp.where(is_kept, x, 0) for x in (rise.pulls, rise.squares))
    return Rise(
        first=jnp.where(is_known, first, rise.first),
        level=jnp.where(is_known, level, rise.level),
        last=jnp.where(is_known, seen.signal, rise.last),
        noise=jnp.where(is_known, noise, rise.noise),
        older=jnp.where(is_known, older, rise.older),
        older_noise=rise.older_noise,
        newer=rise.newer,
        newer_noise=rise.newer_noise,
        pulls=jnp.where(is_healthy, pulls + pull, rise.pulls),
        squares=jnp.where(is_healthy, squares + pull * pull, rise.squares),
    )


def is_at_fault(rise: Rise) -> jax.Array:
    """Whether the loss has risen, and the gradients agree where it falls: back.

    Asked where a snapshot is due.
    """
    is_pulled = rise.pulls > LEAST_PULL * jnp.sqrt(rise.squares)
    return _has_risen(rise) & is_pulled


def has_only_risen(rise: Rise) -> jax.Array:
    """Whether no known level was below the first loss, and the last are far above it.

    Then the steps were never right.
    """
    lowest = jnp.minimum(rise.level, rise.newer)
    is_above = (rise.older >= rise.first) & (lowest > FAR * rise.first)
    # Of a loss of either sign ratios mean nothing.
    return (rise.first > 0) & is_above


def follow(
    rise: Rise,
    is_confirmed: jax.Array,
    is_failed: jax.Array,
    is_copied: jax.Array,
    is_swapped: jax.Array,
) -> Rise:
    """The levels of the snapshots, as a `Decision` moves these."""
    older = jnp.where(is_swapped, rise.newer, rise.older)
    older_noise = jnp.where(is_swapped, rise.newer_noise, rise.older_noise)
    is_over = is_confirmed | is_failed
    pulls, squares = (jnp.where(is_over, 0, x) for x in (rise.pulls, rise.squares))
    return Rise(
        first=rise.first,
        # The parameters are those of the snapshot again.
        level=jnp.where(is_confirmed, rise.older, rise.level),
        last=rise.last,
        noise=jnp.where(is_confirmed, rise.older_noise, rise.noise),
        older=jnp.where(is_failed, rise.level, older),
        older_noise=jnp.where(is_failed, rise.noise, older_noise),
        newer=jnp.where(is_copied, rise.level, rise.newer),
        newer_noise=jnp.where(is_copied, rise.noise, rise.newer_noise),
        pulls=pulls,
        squares=squares,
    )


def _has_risen(rise: Rise) -> jax.Array:
    """Whether the level is far above that of the older snapshot."""
    least = jnp.maximum(RISE * rise.older, MIN_OF_FIRST * rise.first)
    # One loss has no noise yet.
    is_first = rise.older == rise.first
    of_first, of_later = MIN_FIRST_NOISE * rise.noise, MIN_NOISE * rise.older_noise
    least = jnp.maximum(least, rise.older + jnp.where(is_first, of_first, of_later))
    # Of a loss of either sign ratios mean nothing.
    return (rise.older > 0) & (rise.level > least) & (rise.level < jnp.inf)


def _num_left(now: dict[str, Any], snapshot_every: int) -> jax.Array:
    """How many healthy steps after this one until a snapshot is due."""
    return (-now["age"] - 1) % snapshot_every
