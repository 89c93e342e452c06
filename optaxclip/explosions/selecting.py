"""Updates an optimizer or keeps its state, at no cost when it is updated. Internal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer


def update_or_keep(
    update: Callable[[Any], tuple[Any, Any]],
    state: Any,
    keep: jax.Array,
    kept: Any = None,
) -> tuple[Any, Any]:
    """`update(state)`, with the state `kept` where `keep` is True.

    Runs the jaxpr of `update` equation by equation, and selects each new value of the
    state where it is computed; all that follows reads the selected one. That is the
    same value, or belongs to updates that the caller drops; in these old and new states
    may be mixed, also where a callback or the condition of a loop sees them.

    To select at the end would be right but slow: XLA copies every moment of Adam,
    because the updates still read the new one when the selected one takes the place of
    the old.

    Args:
      update: state -> (updates, new state); the new state has the type of the old.
      state: A tree of arrays.
      keep: bool `[]`.
      kept: A tree of the type of `state`, by default itself.

    Returns:
      (updates, state); the updates mean nothing where the state is kept.
    """
    kept = state if kept is None else kept
    is_traced = any(isinstance(x, Tracer) for x in jax.tree.leaves((state, keep)))
    if not is_traced:
        # Nothing is compiled, so there is no copy to avoid.
        updates, new = update(state)
        return updates, jax.tree.map(lambda x, y: _select(keep, x, y), kept, new)
    # Numbers that the user puts into a state have no type to compare.
    state, kept = (jax.tree.map(_as_array, tree) for tree in (state, kept))
    old, structure = jax.tree.flatten(state)
    other: list = []  # what is no array, and so cannot leave a traced function

    def flat_update(*leaves):
        updates, new = update(jax.tree.unflatten(structure, leaves))
        leaves, updates_structure = jax.tree.flatten(updates)
        is_array = [
            hasattr(x, "dtype") and x.dtype != jax.dtypes.float0 for x in leaves
        ]
        other[:] = [
            updates_structure,
            [None if known else x for x, known in zip(leaves, is_array, strict=True)],
        ]
        arrays = [x for x, known in zip(leaves, is_array, strict=True) if known]
        return structure.flatten_up_to(new), arrays

    jaxpr = jax.make_jaxpr(flat_update)(*old)
    num_arrays = len(jaxpr.out_avals) - len(old)
    wanted = [*jax.tree.leaves(kept), *[None] * num_arrays]
    outputs = _evaluate(jaxpr, old, wanted, keep)
    arrays = iter(outputs[len(old) :])
    updates_structure, leaves = other
    leaves = [next(arrays) if x is None else x for x in leaves]
    return (
        jax.tree.unflatten(updates_structure, leaves),
        jax.tree.unflatten(structure, outputs[: len(old)]),
    )


def _evaluate(closed: Any, args: list, kept: list, keep: jax.Array) -> list:
    """The outputs of a jaxpr. `kept`: the value to keep of each, None for any other."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))
    wanted: dict = {}
    for atom, old in zip(jaxpr.outvars, kept, strict=True):
        if old is None or isinstance(atom, jex.Literal):
            continue
        if atom.aval.dtype == old.dtype and atom.aval.shape == old.shape:
            wanted.setdefault(atom, old)

    def read(atom):
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    computed = set()
    for eqn in jaxpr.eqns:
        inputs = list(map(read, eqn.invars))
        olds = [wanted.get(v) for v in eqn.outvars]
        if any(old is not None for old in olds) and _is_plain_jit(eqn):
            found = _evaluate(eqn.params["jaxpr"], inputs, olds, keep)
        else:
            found = [
                new if old is None else _select(keep, old, new)
                for old, new in zip(olds, _apply(jaxpr, eqn, inputs), strict=True)
            ]
        values |= dict(zip(eqn.outvars, found, strict=True))
        computed |= set(eqn.outvars)
    # Left are literals, inputs passed through, values of another type than the state,
    # and one that is the state of two leaves at once, selected for the first of them.
    outputs = []
    for atom, old in zip(jaxpr.outvars, kept, strict=True):
        is_selected = old is None or (
            not isinstance(atom, jex.Literal)
            and atom in computed
            and wanted.get(atom) is old
        )
        new = read(atom)
        outputs.append(new if is_selected else _select(keep, old, new))
    return outputs


def _apply(jaxpr: Any, eqn: Any, inputs: list) -> list:
    """The outputs of one equation, as a jaxpr of its own."""
    inputs_of = {
        v: x
        for v, x in zip(eqn.invars, inputs, strict=True)
        if not isinstance(v, jex.Literal)
    }
    alone = jaxpr.replace(
        constvars=[],
        invars=list(inputs_of),
        outvars=eqn.outvars,
        eqns=[eqn],
        effects=eqn.effects,
    )
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, []))(*inputs_of.values())


def _is_plain_jit(eqn: Any) -> bool:
    """Whether an equation is a nested `jit` that says nothing about shardings."""
    shardings = [
        *eqn.params.get("in_shardings", ["none"]),
        *eqn.params.get("out_shardings", ["none"]),
    ]
    return all(str(x) == "UnspecifiedValue" for x in shardings)


def _as_array(x: Any) -> Any:
    return x if hasattr(x, "dtype") else jnp.asarray(x)


def _select(keep: jax.Array, old: Any, new: Any) -> jax.Array:
    if old is new:
        return old
    if jax.typeof(old) == jax.typeof(new):
        # What `jnp.where` traces for each leaf takes much of the time to compile.
        return lax.select(keep, old, new)
    return jnp.where(keep, old, new)
