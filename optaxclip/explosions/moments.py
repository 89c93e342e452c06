"""Moments that the inner optimizer has made non-finite: finds and resets them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip.clipping.by_norm import ClipByNormState
from optaxclip.explosions.nodes import LEAF, is_like, num_leaves, split_node
from optaxclip.explosions.snapshots import CLOCKS
from optaxclip.explosions.state import SkipExplosionsState
from optaxclip.norms.scopes import Scopes
from optaxclip.numerics import accumulator, is_gradient, widen
from optaxclip.xla import run_if, tie


def are_spoiled(
    when: jax.Array, inner_state: Any, updates: Any, scopes: Scopes
) -> jax.Array:
    """Whether a moment is non-finite. Costs nothing unless `when`."""
    places = _moments(inner_state, updates)
    leaves = jax.tree.leaves(inner_state)
    moments = lax.stop_gradient([leaves[i] for i in places])

    def highest_level(flag, _):
        levels = [jnp.zeros(leaf.part_shape, jnp.float32) for leaf in scopes.leaves]
        for x, i in zip(tie(flag, moments), places.values(), strict=True):
            axes = tuple(set(range(x.ndim)) - set(scopes.leaves[i].kept))
            # A sum, as in `compare`: inf - inf is NaN. 0 * x would be a product with
            # an array of zeros.
            x = widen(x, accumulator([x]))
            total = jnp.sum(x - x, axes)
            levels[i] = jnp.where(jnp.isnan(total), 1, levels[i])
        level: Any = scopes.collapse(levels, "max")
        return jnp.max(level, initial=0)

    if not places:
        return jnp.zeros([], bool)
    _, level = run_if(when, highest_level, jnp.zeros([], jnp.float32))
    return level > 0


def mend(when: jax.Array, inner_state: Any, updates: Any) -> tuple[jax.Array, Any]:
    """(False, the inner state with 0 for moments that are non-finite).

    Costs nothing unless `when`. What follows must depend on the False, see `run_if`.
    """
    leaves, structure = jax.tree.flatten(inner_state)
    places = _moments(inner_state, updates)

    def without_nonfinite(_, moments):
        return [jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)) for x in moments]

    moments = [jnp.asarray(leaves[i]) for i in places]
    done, moments = run_if(when, without_nonfinite, moments)
    for i, x in zip(places, moments, strict=True):
        leaves[i] = x
    return done, jax.tree.unflatten(structure, leaves)


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
        # Their inf and NaN are on purpose: no limit yet, or what was recorded.
        if isinstance(tree, (ClipByNormState, SkipExplosionsState, *CLOCKS)):
            return
        if is_like(tree, updates):
            collect(tree, updates, place, 0)
        elif structure != LEAF:
            for child in children:
                visit(child, place)
                place += num_leaves(child)

    visit(state, 0)
    return found
