"""Moments that the inner optimizer has made non-finite: finds and resets them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip.clipping.by_norm import ClipByNormState
from optaxclip.clipping.by_value import ClipByValueState
from optaxclip.explosions.nodes import LEAF, is_like, num_leaves, split_node
from optaxclip.explosions.state import DetectExplosionsState, SkipExplosionsState
from optaxclip.limits.limit import ScheduleState
from optaxclip.norms.scopes import Scopes
from optaxclip.numerics import accumulator, add, is_gradient, widen
from optaxclip.recording import RecordState
from optaxclip.xla import run_if, tie

OURS = (
    ClipByNormState,
    ClipByValueState,
    DetectExplosionsState,
    RecordState,
    ScheduleState,
    SkipExplosionsState,
)
"""States that hold inf and NaN on purpose: no limit yet, or what was recorded."""


def are_spoiled(
    when: jax.Array, inner_state: Any, updates: Any, scopes: Scopes
) -> jax.Array:
    """Whether a moment is non-finite. Costs nothing unless `when`."""
    places = _moments(inner_state, updates)
    leaves = jax.tree.leaves(inner_state)
    moments = lax.stop_gradient([leaves[i] for i in places])

    def highest_level(flag, _):
        found: list[Any] = [
            jnp.zeros(leaf.part_shape, jnp.float32) for leaf in scopes.leaves
        ]
        sums: dict[int, jax.Array] = {}
        for x, i in zip(tie(flag, moments), places.values(), strict=True):
            # A sum, as in `compare`: inf - inf is NaN. 0 * x would be a product with
            # an array of zeros.
            x = widen(x, accumulator([x]))
            sums[i] = add(sums[i], x - x) if i in sums else x - x
        for i, x in sums.items():
            axes = tuple(set(range(x.ndim)) - set(scopes.leaves[i].kept))
            found[i] = jnp.isnan(jnp.sum(x, axes)).astype(jnp.float32)
        level: Any = scopes.collapse(found, "max")
        return jnp.max(level, initial=0)

    if not places:
        return jnp.zeros([], bool)
    _, level = run_if(when, highest_level, jnp.zeros([], jnp.float32))
    return level > 0


def mended(when: jax.Array, inner_state: Any, updates: Any) -> Any:
    """The inner state, `when` it is spoiled with 0 for moments that are non-finite."""
    leaves, structure = jax.tree.flatten(inner_state)
    for i in _moments(inner_state, updates):
        x = jnp.asarray(leaves[i])
        finite = lax.select(jnp.isfinite(x), x, jnp.zeros_like(x))
        leaves[i] = lax.select(when, finite, x)
    return jax.tree.unflatten(structure, leaves)


def _moments(state: Any, updates: Any) -> dict[int, int]:
    """Leaves of a state, each with the leaf of the updates whose moment it is.

    Those are floating, of the same shape, and within a tree like the updates. What we
    keep of a run is none: limits and records hold inf and NaN on purpose. Nor is a
    single number, which may be anything.
    """
    found: dict[int, int] = {}
    if jax.tree.structure(updates) == LEAF and np.ndim(updates) == 0:
        return found

    def collect(tree, like, place, index):
        """From leaf `place` of the state on, and from leaf `index` of the updates."""
        if tree is None or isinstance(tree, optax.MaskedNode):
            return
        (children, structure), (others, _) = map(split_node, (tree, like))
        if structure == LEAF:
            if is_gradient(tree) and np.shape(tree) == np.shape(like):
                found[place] = index
            return
        for child, other in zip(children, others, strict=True):
            collect(child, other, place, index)
            place, index = place + num_leaves(child), index + num_leaves(other)

    def visit(tree, place):
        children, structure = split_node(tree)
        if isinstance(tree, OURS):
            return
        if is_like(tree, updates):
            collect(tree, updates, place, 0)
        elif structure != LEAF:
            for child in children:
                visit(child, place)
                place += num_leaves(child)

    visit(state, 0)
    return found
