"""Which leaf leads an explosion, and how fast the norm grows. Internal."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip.explosions.rules import MIN_GROWTH, MIN_KNOWN
from optaxclip.numerics import root_sum_squares
from optaxclip.ring import RecordState, rows_of

NUM_FITTED = 8
"""The last steps to whose norms the growth is fitted. The squares of their distances
from the middle add up to 42, so noise of 10 % in each norm changes the growth per step
by 10 % / sqrt(42), that is 1.5 %."""
STEPS_BEFORE = np.arange(1, 64, 8, dtype=np.int32)
"""How far back a leaf is looked at, to find the one that has grown most on average:
every eighth of the last 64 steps. 64 is the shortest window of a record, and a leaf
costs eight logarithms in each step."""


def fitted_growth(record: RecordState) -> jax.Array:
    """Growth of the norm per step in the last eight."""
    steps = record.num_steps - NUM_FITTED + jnp.arange(NUM_FITTED, dtype=jnp.int32)
    return fit_growth(jax.vmap(root_sum_squares)(rows_of(record, steps)[1]))


def fit_growth(norms: Any) -> jax.Array:
    """Growth per step of the norms `[num_steps]` that are finite and not 0.

    `exp` of the slope of a line fitted to the logarithms; 1 with fewer than two.
    """
    is_known = (norms > 0) & (norms < jnp.inf)  # 0 in rows without a step yet
    # Masked, not dropped: the shapes are fixed. The log of 1 adds nothing to the slope.
    logs = jnp.log(jnp.where(is_known, norms, 1))
    times = jnp.arange(norms.size, dtype=norms.dtype)
    num_known = jnp.maximum(jnp.sum(is_known), 1).astype(norms.dtype)
    center = jnp.sum(times, where=is_known) / num_known
    distances = jnp.where(is_known, times - center, 0)
    squares = jnp.sum(jnp.square(distances))
    return jnp.exp(jnp.sum(distances * logs) / jnp.where(squares > 0, squares, 1))


def leading_leaf(norms, before):
    """The first that is non-finite, or has grown most; -1 if none has.

    Args:
      norms: `[num_leaves]`.
      before: `[num_steps, num_leaves]`: those of earlier steps.
    """
    if not norms.size:
        return jnp.full([], -1, jnp.int32)
    growth = jnp.sum(_log_growth(norms, before), axis=0)
    growth = jnp.where(norms < jnp.inf, growth, jnp.inf)  # NaN is not
    leaf = jnp.argmax(growth)
    return jnp.where(growth[leaf] > 0, leaf, -1).astype(jnp.int32)


def have_grown(norms, before):
    """Which leaves have by `MIN_GROWTH`; of steps that were non-finite none counts."""
    is_finite = jnp.all(before < jnp.inf, axis=1, keepdims=True)  # NaN is not
    before = jnp.where(is_finite, before, 0)
    num = jnp.sum(before > 0, axis=0)
    divisor = jnp.maximum(num, 1).astype(norms.dtype)
    mean = jnp.sum(_log_growth(norms, before), axis=0) / divisor
    return (mean > math.log(MIN_GROWTH)) & (num >= MIN_KNOWN)


def _log_growth(norms, before):
    """Logarithms `[num_steps, num_leaves]` of the growth; 0 where it is not known."""
    before = before.astype(norms.dtype)
    is_known = (before > 0) & (before < jnp.inf) & (norms > 0)[None]
    now, then = (jnp.log(jnp.where(is_known, x, 1)) for x in (norms[None], before))
    return now - then
