"""Takes snapshots of the parameters, and moves between them. Internal."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.explosions.deciding import Decision
from optaxclip.explosions.state import Snapshots
from optaxclip.norms.scopes import Scopes
from optaxclip.numerics import accumulator, is_gradient, promote, widen
from optaxclip.xla import replace_where, run_if, tie


def move(
    decision: Decision, num_steps: jax.Array, params: Any, snapshots: Snapshots
) -> tuple[jax.Array, Snapshots]:
    """(False, the snapshots) after a decision; free if it moves none.

    Each step depends on the one before, so that XLA copies nothing. The first snapshot
    is of what the first step is given, and not of what `init` was: parameters may have
    been read from a checkpoint in between.
    """
    present = snapshot_of(params)
    older, newer = widen_snapshots(snapshots, present)
    done, older = replace_where(decision.is_replaced | (num_steps == 1), newer, older)
    is_copied = decision.is_copied | decision.is_started | (num_steps == 0)
    done, newer = replace_where(is_copied | done, present, newer)
    return done, Snapshots(older, newer)


def compare(
    when: jax.Array, params: Any, snapshot: Any, updates: Any, scopes: Scopes
) -> tuple[jax.Array, jax.Array]:
    """Whether parameters are not those of a snapshot, and whether they hold NaN.

    The norm of a leaf's difference may be four roundings of the leaf: what an update
    leaves from eight times as far. Both False, at no cost, unless `when`.
    """

    def level_of(leaf, x, y, u):
        """`[layers]` or `[]`: 2 where there is NaN, 1 where they differ, else 0."""
        if not leaf.is_gradient:
            return jnp.zeros(leaf.part_shape, jnp.float32)
        x, y, u = map(jnp.asarray, (x, y, u))  # they may be Python numbers
        eps = max(float(jnp.finfo(z.dtype).eps) for z in (x, u) if is_gradient(z))
        axes = tuple(i for i in range(x.ndim) if i not in leaf.kept)
        x, y = (widen(z, accumulator([x, y])) for z in (x, y))
        # Sums, since for them alone XLA stores nothing for every element; nor does it
        # where a number would be multiplied with each, so `eps` stands outside.
        distance, size = (jnp.sum((z * z.conj()).real, axes) for z in (x - y, y))
        is_away = ~(distance <= (4 * eps) ** 2 * size)
        return jnp.where(jnp.isnan(distance), 2, is_away.astype(jnp.float32))

    def highest_level(flag, _):
        leaves = map(jax.tree.leaves, (*tie(flag, (params, snapshot)), updates))
        levels = list(map(level_of, scopes.leaves, *leaves))
        level: Any = scopes.collapse(levels, "max")
        return jnp.max(level, initial=0)

    params = snapshot_of(params)
    params, snapshot = lax.stop_gradient((params, snapshot))
    _, level = run_if(when, highest_level, jnp.zeros([], jnp.float32))
    return level > 0, level > 1


def empty_snapshots(params: Any) -> Snapshots:
    """Two of zeros; each has buffers of its own, or they could not be donated."""
    present = snapshot_of(params)
    older, newer = (jax.tree.map(jnp.zeros_like, present) for _ in range(2))
    return Snapshots(older, newer)


def snapshot_of(params: Any) -> Any:
    """What a snapshot is of, as arrays; zeros for a function among the leaves."""

    def as_array(x):
        numbers = int | float | complex | np.ndarray | np.generic
        if isinstance(x, numbers):
            return jnp.asarray(x, jnp.result_type(x))  # not of a weak type
        return x if hasattr(x, "dtype") else jnp.zeros([], bool)

    return jax.tree.map(as_array, params)


def widen_snapshots(snapshots: Snapshots, present: Any) -> Snapshots:
    """Snapshots that can hold the present parameters.

    Parameters may widen after `init`: then they take the snapshots with them, once. One
    that is wide enough keeps its type, so that a state whose type `lax.scan` can carry
    keeps that.
    """

    def widen(x, y):
        if x.dtype == y.dtype:
            return x
        return x.astype(promote(x.dtype, y.dtype))

    older, newer = (jax.tree.map(widen, copy, present) for copy in snapshots)
    return Snapshots(older, newer)
