"""What the inner optimizer has made non-finite, in its state or updates: resets it.

Internal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from optaxclip.numerics import accumulator, add, is_gradient, where, widen
from optaxclip.ring import RecordState
from optaxclip.xla import materialize, run_if, tie

CHECK_EVERY = 3
"""Steps between two looks at the moments of the inner state.

Each look reads them once more: with 3, a third of a read per step. Until the next look,
the parameter of a non-finite moment is not updated."""
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
    num_steps: jax.Array,
    inner_state: Any,
    updates: Any,
    params: Any,
    scopes: Scopes,
    init: Callable[[Any], Any],
) -> tuple[jax.Array, Any]:
    """Whether the optimizer has made its state non-finite, and the state without that.

    Moments become 0 there, and all other arrays what they were at the start. It looks
    on every third step, by their number before this one.

    Args:
      num_steps: Before this step.
      inner_state: That of the optimizer.
      updates: The gradients.
      params: The parameters; None where they are not known.
      scopes: The leaves of the updates.
      init: That of the optimizer.
    """
    is_due = num_steps % CHECK_EVERY == CHECK_EVERY - 1
    # By their places among the leaves: a state may hold anything beside its moments.
    leaves, structure = jax.tree.flatten(inner_state)
    of = find_moments(inner_state, updates)
    others = find_others(inner_state, updates)
    moments = [jnp.asarray(leaves[i]) for i in of]
    like = updates if params is None else params

    def at_start(flag):
        # Or XLA would be free to make it in each step, before the loop.
        tied = jax.tree.map(lambda x: _tie_array(flag, x), like)
        first = jax.tree.leaves(init(tied))
        return [jnp.asarray(first[i]) for i in others]

    is_spoiled, found = look(
        is_due,
        moments,
        list(of.values()),
        [jnp.asarray(leaves[i]) for i in others],
        at_start,
        scopes,
    )
    for i, moment in zip(of, moments, strict=True):
        leaves[i] = mend(is_spoiled, moment)
    for i, other in zip(others, found, strict=True):
        leaves[i] = other
    return materialize(is_spoiled), jax.tree.unflatten(structure, leaves)


def drop_overflow(updates: Any, params: Any) -> Any:
    """Updates that are 0 wherever the new parameter would not be finite."""

    def drop(u, param=None):
        if not is_gradient(u):
            return u
        applied = u = jnp.asarray(u)
        if param is not None:
            # A finite update may still overflow the dtype of its parameter.
            param = jnp.asarray(param)
            applied = add(param, u).astype(param.dtype)
        return lax.select(jnp.isfinite(applied), u, jnp.zeros_like(u))

    return jax.tree.map(drop, *([updates] if params is None else [updates, params]))


def look(
    when: jax.Array,
    moments: Sequence[jax.Array],
    of: Sequence[int],
    others: Sequence[jax.Array],
    at_start: Callable[[jax.Array], Sequence[jax.Array]],
    scopes: Scopes,
) -> tuple[jax.Array, Sequence[jax.Array]]:
    """Whether any is non-finite, and the others mended. Costs nothing unless `when`.

    Args:
      when: Whether it looks.
      moments: The moments.
      of: For each of them, of which leaf it is.
      others: What else may have become non-finite.
      at_start: Flag of the loop -> the others before the first step.
      scopes: The leaves.
    """
    # A flag has no derivative, and reverse mode would need one through the loop.
    moments, others = lax.stop_gradient((moments, others))

    def highest_level(flag, carry):
        _, others = carry
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
        pairs = list(zip(others, at_start(flag), strict=True)) if others else []
        flags = [jnp.any(are_spoiled(*pair)) for pair in pairs]
        others = [where(are_spoiled(x, first), first, x) for x, first in pairs]
        levels: Any = scopes.collapse(found, "max")
        level = jnp.max(levels, initial=0)
        if flags:
            is_bad = scopes.on_any_device(jnp.any(jnp.stack(flags)))
            level = jnp.maximum(level, is_bad.astype(level.dtype))
        return level, others

    if not of and not others:
        return jnp.zeros([], bool), others
    _, (level, others) = run_if(
        when, highest_level, (jnp.zeros([], jnp.float32), others)
    )
    return level > 0, others


def are_spoiled(x: jax.Array, first: jax.Array) -> jax.Array:
    """Which elements became non-finite; none that was so at the start.

    +inf at the start stays: it may be the best loss before any.
    """
    return ~jnp.isfinite(x) & (x != first) & ~jnp.isnan(first)


def mend(when: jax.Array, moment: jax.Array) -> jax.Array:
    """A moment, `when` it is spoiled with 0 for elements that are non-finite."""
    # One by one: the other moments of the leaf are as good as before.
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
            # A factored moment has another shape; `find_others` finds it.
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


def find_others(state: Any, updates: Any) -> list[int]:
    """Leaves of a state that are floating, and no moments, by their places.

    None of what we keep of a run, and no hyperparameter: that is the user's. Nor what
    is larger than every leaf of the updates, such as the memory of L-BFGS: to replace
    it could cost a pass over it in every step.
    """
    largest = max((np.size(x) for x in jax.tree.leaves(updates)), default=0)
    moments = find_moments(state, updates)

    def flags(tree):
        return jax.tree.map(lambda _: isinstance(tree, OURS), tree)

    # A flag for each leaf, because their paths do not say whose state they are in.
    are_ours = jax.tree.map(flags, state, is_leaf=lambda x: isinstance(x, OURS))
    return [
        place
        for place, ((path, x), is_ours) in enumerate(
            zip(
                jax.tree.leaves_with_path(state), jax.tree.leaves(are_ours), strict=True
            )
        )
        if is_gradient(x)
        and not is_ours
        and place not in moments
        and np.size(x) <= largest
        and all(getattr(key, "name", None) != "hyperparams" for key in path)
    ]


def _tie_array(flag: jax.Array, x: Any) -> Any:
    """As `tie`, of an array alone: parameters may be numbers and functions too."""
    return tie(flag, lax.stop_gradient(x)) if isinstance(x, jax.Array) else x


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
