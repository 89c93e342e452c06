"""Takes snapshots of parameters and inner state, and moves between them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip.clipping.by_norm import ClipByNormState
from optaxclip.clipping.by_value import ClipByValueState
from optaxclip.explosions.deciding import Decision
from optaxclip.explosions.nodes import LEAF, is_like, num_leaves, split_node
from optaxclip.explosions.state import DetectExplosionsState, Snapshots
from optaxclip.limits.limit import ScheduleState
from optaxclip.norms.scopes import Scopes
from optaxclip.numerics import accumulator, is_gradient, promote, widen
from optaxclip.recording import RecordState
from optaxclip.xla import replace_where, run_if, tie

CLOCKS = (
    optax.ScaleByScheduleState,
    ScheduleState,
    ClipByValueState,
    RecordState,
    DetectExplosionsState,
)
"""States that a rollback leaves as they are: they count the steps of the run, or tell
of them."""


def move(
    decision: Decision,
    is_spoiled: jax.Array,
    num_steps: jax.Array,
    params: Any,
    inner_state: Any,
    snapshots: Snapshots,
) -> tuple[jax.Array, Any, Snapshots]:
    """(False, the inner state, the snapshots) after a decision; free if it moves none.

    Each step depends on the one before, so that XLA copies nothing. The first snapshot
    is of what the first step is given, and not of what `init` was: parameters and
    moments may have been read from a checkpoint in between.
    """
    present = snapshot_of(params, inner_state)
    older, newer = widen_snapshots(snapshots, present)
    done, older = replace_where(decision.is_replaced | (num_steps == 1), newer, older)
    # A snapshot of moments that are non-finite would be of no use.
    is_copied = decision.is_copied & ~is_spoiled
    is_copied |= decision.is_started | (num_steps == 0)
    done, newer = replace_where(is_copied | done, present, newer)
    is_exchanged = decision.is_started | decision.is_returned | is_spoiled
    leaves, structure = jax.tree.flatten(inner_state)
    olds, is_kept = jax.tree.leaves(older[1]), _kept(inner_state)
    olds = [x if keep else y for x, y, keep in zip(leaves, olds, is_kept, strict=True)]
    done, leaves = replace_where(is_exchanged | done, olds, leaves)
    return done, jax.tree.unflatten(structure, leaves), Snapshots(older, newer)


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
        # Sums, since for them alone XLA stores nothing for every element.
        distance, size = (jnp.sum((z * z.conj()).real, axes) for z in (x - y, y))
        is_away = ~(distance <= (4 * eps) ** 2 * size)
        has_nan = jnp.isnan(jnp.sum(x, axes))
        return jnp.where(has_nan, 2, is_away.astype(jnp.float32))

    def highest_level(flag, _):
        leaves = map(jax.tree.leaves, (*tie(flag, (params, snapshot)), updates))
        levels = list(map(level_of, scopes.leaves, *leaves))
        level: Any = scopes.collapse(levels, "max")
        return jnp.max(level, initial=0)

    params, _ = snapshot_of(params, ())
    params, snapshot = lax.stop_gradient((params, snapshot))
    _, level = run_if(when, highest_level, jnp.zeros([], jnp.float32))
    return level > 0, level > 1


def empty_snapshots(params: Any, inner_state: Any) -> Snapshots:
    """Two of zeros; each has buffers of its own, or they could not be donated."""
    present = snapshot_of(params, inner_state)
    older, newer = (jax.tree.map(jnp.zeros_like, present) for _ in range(2))
    return Snapshots(older, newer)


def snapshot_of(params: Any, inner_state: Any) -> tuple[Any, Any]:
    """What a snapshot is of, as arrays; zeros for a function among the leaves."""

    def as_array(x):
        numbers = int | float | complex | np.ndarray | np.generic
        if isinstance(x, numbers):
            return jnp.asarray(x, jnp.result_type(x))  # not of a weak type
        return x if hasattr(x, "dtype") else jnp.zeros([], bool)

    return jax.tree.map(as_array, (params, _unnamed(inner_state, params)))


def _unnamed(tree: Any, params: Any) -> Any:
    """The tree with plain tuples for all its nodes but those like the parameters.

    These keep theirs, so that what is said of parameters (`optax.tree_map_params`,
    shardings by name or in boxes) holds for their copies.
    """
    children, structure = split_node(tree)
    if not children or structure == LEAF or is_like(tree, params):
        return tree
    return tuple(_unnamed(x, params) for x in children)


def _kept(state: Any) -> list[bool]:
    """For each leaf of an inner state, whether a rollback leaves it as it is.

    That is what the user or the clock decides, and what tells of the run; what the
    optimizer has learned goes back.
    """
    children, structure = split_node(state)
    if structure == LEAF:
        return [_is_key(state)]
    fields = getattr(state, "_fields", ())
    if isinstance(state, CLOCKS):
        learned = set()
    elif isinstance(state, ClipByNormState):
        learned = {"limit_state"}
    elif "hyperparams" in fields:  # of optax.inject_hyperparams
        learned = {"inner_state"}
    else:
        return [flag for child in children for flag in _kept(child)]
    return [
        flag
        for name, child in zip(fields, children, strict=True)
        for flag in (_kept(child) if name in learned else [True] * num_leaves(child))
    ]


def _is_key(x: Any) -> bool:
    """Whether an array holds keys, of the new kind or the old one."""
    dtype = jnp.result_type(x)
    return jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32


def widen_snapshots(snapshots: Snapshots, present: Any) -> Snapshots:
    """Snapshots that can hold the present parameters and inner state.

    The first gradients may be wider than the parameters that `init` was given, and
    widen the moments: then these take the snapshots with them, once. One that is wide
    enough keeps its type, so that a state whose type `lax.scan` can carry keeps that.
    """

    def widen(x, y):
        if x.dtype == y.dtype:
            return x
        return x.astype(promote(x.dtype, y.dtype))

    older, newer = (jax.tree.map(widen, copy, present) for copy in snapshots)
    return Snapshots(older, newer)
