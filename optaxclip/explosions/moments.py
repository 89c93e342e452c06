"""Moments that the inner optimizer has made non-finite: finds and resets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip.clipping.by_norm import ClipByNormState
from optaxclip.clipping.by_value import ClipByValueState
from optaxclip.explosions.state import DetectExplosionsState, SkipExplosionsState
from optaxclip.limits.limit import ScheduleState
from optaxclip.norms.scopes import Scopes
from optaxclip.numerics import accumulator, add, is_gradient, widen
from optaxclip.ring import RecordState
from optaxclip.xla import materialize, run_if, tie

CHECK_EVERY = 3
"""Steps between two looks at the moments of the inner state. Each look reads them once
more; until the next one, the parameter of a non-finite moment is not updated."""
OURS = (
    ClipByNormState,
    ClipByValueState,
    DetectExplosionsState,
    RecordState,
    ScheduleState,
    SkipExplosionsState,
)
"""States that hold inf and NaN on purpose: no limit yet, or what was recorded."""


_LEAF = jax.tree.structure(0)


def mend_moments(
    num_steps: jax.Array, inner_state: Any, updates: Any, scopes: Scopes
) -> tuple[jax.Array, Any]:
    """Whether moments were found to be non-finite, and the state with 0 for those.

    It looks on every third step, by their number before this one.
    """
    is_due = num_steps % CHECK_EVERY == CHECK_EVERY - 1
    # By their places among the leaves: a state may hold anything beside its moments.
    leaves, structure = jax.tree.flatten(inner_state)
    places = find_moments(inner_state, updates)
    moments = [jnp.asarray(leaves[i]) for i in places]
    is_spoiled = are_spoiled(is_due, moments, list(places.values()), scopes)
    for i, moment in zip(places, moments, strict=True):
        leaves[i] = mended(is_spoiled, moment)
    return materialize(is_spoiled), jax.tree.unflatten(structure, leaves)


def are_spoiled(
    when: jax.Array, moments: Sequence[jax.Array], of: Sequence[int], scopes: Scopes
) -> jax.Array:
    """Whether a moment is non-finite. Costs nothing unless `when`.

    `of`: for each moment, of which leaf it is.
    """
    # A flag has no derivative, and reverse mode would need one through the loop.
    moments = lax.stop_gradient(moments)

    def highest_level(flag, _):
        found: list[Any] = [
            jnp.zeros(leaf.part_shape, jnp.float32) for leaf in scopes.leaves
        ]
        sums: dict[int, jax.Array] = {}
        for x, i in zip(tie(flag, moments), of, strict=True):
            # A sum, as in `compare`: inf - inf is NaN. 0 * x would be a product with
            # an array of zeros.
            x = widen(x, accumulator([x]))
            sums[i] = add(sums[i], x - x) if i in sums else x - x
        for i, x in sums.items():
            axes = tuple(set(range(x.ndim)) - set(scopes.leaves[i].kept))
            found[i] = jnp.isnan(jnp.sum(x, axes)).astype(jnp.float32)
        level: Any = scopes.collapse(found, "max")
        return jnp.max(level, initial=0)

    if not of:
        return jnp.zeros([], bool)
    _, level = run_if(when, highest_level, jnp.zeros([], jnp.float32))
    return level > 0


def mended(when: jax.Array, moment: jax.Array) -> jax.Array:
    """A moment, `when` it is spoiled with 0 for elements that are non-finite."""
    finite = lax.select(jnp.isfinite(moment), moment, jnp.zeros_like(moment))
    return lax.select(when, finite, moment)


def find_moments(state: Any, updates: Any) -> dict[int, int]:
    """Leaves of a state, each with the leaf of the updates whose moment it is.

    Those are floating, of the same shape, and within a tree like the updates. What we
    keep of a run is none: limits and records hold inf and NaN on purpose. Nor is a
    single number, which may be anything.
    """
    found: dict[int, int] = {}
    if jax.tree.structure(updates) == _LEAF and np.ndim(updates) == 0:
        return found

    def collect(tree, like, place, index):
        """From leaf `place` of the state on, and from leaf `index` of the updates."""
        if tree is None or isinstance(tree, optax.MaskedNode):
            return
        (children, structure), (others, _) = map(_split_node, (tree, like))
        if structure == _LEAF:
            if is_gradient(tree) and np.shape(tree) == np.shape(like):
                found[place] = index
            return
        for child, other in zip(children, others, strict=True):
            collect(child, other, place, index)
            place, index = place + _num_leaves(child), index + _num_leaves(other)

    def visit(tree, place):
        children, structure = _split_node(tree)
        if isinstance(tree, OURS):
            return
        if _is_like(tree, updates):
            collect(tree, updates, place, 0)
        elif structure != _LEAF:
            for child in children:
                visit(child, place)
                place += _num_leaves(child)

    visit(state, 0)
    return found


def _split_node(tree: Any) -> tuple[list, Any]:
    """The children of a node, and its structure alone."""
    return jax.tree.flatten(tree, is_leaf=lambda x: x is not tree)


def _is_like(tree: Any, params: Any) -> bool:
    """Whether a tree has the structure of the parameters, with some perhaps masked."""
    if tree is None or isinstance(tree, optax.MaskedNode):
        return True
    (children, structure), (others, other) = map(_split_node, (tree, params))
    return structure == other and (
        structure == _LEAF or all(map(_is_like, children, others))
    )


def _num_leaves(tree: Any) -> int:
    """How many leaves a tree has."""
    return len(jax.tree.leaves(tree))
