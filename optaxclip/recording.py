"""What happened: reads the states of optaxclip's transformations."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip.clipping import ClipByNormState
from optaxclip.explosions import (
    RULES,
    DetectExplosionsState,
    count,
    read_step,
)
from optaxclip.responses import SkipExplosionsState
from optaxclip.scopes import (
    Layout,
    LeafLayout,
    PerLeaf,
    PerTree,
    PerUnit,
    leaf_names,
)

STATES = ClipByNormState, DetectExplosionsState, SkipExplosionsState
"""The kinds of states that can be read."""


def metrics(opt_state: Any, params: Any = None) -> dict[str, jax.Array]:
    """Reads scalars out of every optaxclip state in an optimizer state.

    Each `clip_by_norm` gives, under its label:

    | name | value |
    |---|---|
    | `clip/norm` | the norm before the clip, in the last step |
    | `clip/norm_after` | the norm after it; inf or NaN where the update was |
    | `clip/limit` | the limit; +inf for none, as in a warm-up |
    | `clip/fraction` | the share of all steps so far that were clipped |
    | `clip/nonfinite` | the number of steps so far with inf or NaN |

    With more than one scope a clip gives the largest of them, and each scope its own
    under its name: `clip/norm/rnn/hh/kernel`; per unit, a leaf's largest. Groups are
    numbered, in the order of `group_names`.

    Each `detect_explosions` and `skip_explosions` gives, under its label:

    | name | value |
    |---|---|
    | `explosions/exploded` | 1 if the last step exploded, else 0 |
    | `explosions/count` | the number of steps so far that did |
    | `explosions/count/nonfinite`, `norm`, `share`, `loss` | the same for each rule |
    | `explosions/in_a_row` | how many in a row did, up to the last step |
    | `explosions/began` | the step on which the last explosion began; -1 for none |
    | `explosions/leaf` | the index of the leaf that led then; -1 for none |
    | `explosions/growth` | the growth of the norm per step, fitted to the last eight |
    | `explosions/norm`, `norm_limit`, `loss`, `loss_limit` | of the last step |
    | `explosions/skipped` | skip only: the share of all steps so far it skipped |
    | `explosions/num_skipped` | skip only: their number |
    | `explosions/gave_up` | skip only: 1 if the last 100 steps were not finite |
    | `explosions/scale` | skip only: the factor of the updates, below 1 to cool down |
    | `explosions/rollbacks` | skip only: the number of rollbacks |

    Args:
      opt_state: Any tree: the state of a chain, of `optax.masked`, `partition`,
        `MultiSteps` or `inject_hyperparams`; a Flax `TrainState` or `nnx.Optimizer`.
      params: The parameters, or any tree of their structure: names the leaves; without
        it they are numbered.

    Returns:
      `{name: scalar}`, inside or outside `jit`; empty if there is nothing to report.

    Raises:
      ValueError: If two transformations have the same label, or if `params` does not
        fit the state.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> tx = optax.chain(optaxclip.clip_by_norm(1.0), optax.adam(1e-3))
      >>> _, opt_state = tx.update(params, tx.init(params), params)
      >>> print(metrics(opt_state)["clip/norm"], metrics(opt_state)["clip/fraction"])
      5.0 1.0
    """
    result: dict[str, jax.Array] = {}
    for label, state in find_states(opt_state).items():
        if isinstance(state, ClipByNormState):
            result |= _clip_metrics(label, state, params)
        else:
            result |= _explosion_metrics(label, state)
    return result


def find_states(opt_state: Any) -> dict[str, Any]:
    """The states of optaxclip in any tree by their label; the error of equal labels."""
    found: dict[str, Any] = {}

    def visit(tree):
        for path, state in jax.tree.leaves_with_path(
            tree, is_leaf=lambda x: isinstance(x, STATES)
        ):
            if not isinstance(state, STATES):
                continue
            label = path[-1].key
            if label in found:
                raise ValueError(
                    f"two transformations have the label {label!r}: give them "
                    "different ones with label="
                )
            found[label] = state
            if isinstance(state, SkipExplosionsState):
                visit(state.inner_state)

    visit(opt_state)
    return found


def _explosion_metrics(label: str, state: Any) -> dict[str, jax.Array]:
    result = {}
    if isinstance(state, SkipExplosionsState):
        num_skipped, num_rollbacks = state.num_responses
        num_steps = jnp.maximum(count(state.explosions, "steps"), 1)
        result = {
            "num_skipped": num_skipped,
            "skipped": num_skipped.astype(jnp.float32) / num_steps.astype(jnp.float32),
            "gave_up": state.gave_up.astype(jnp.int32),
            "scale": state.scale,
            "rollbacks": num_rollbacks,
        }
        state = state.explosions
    last = read_step(state, "last")
    result = {
        "exploded": jnp.any(last.fired).astype(jnp.int32),
        "count": count(state, "exploded"),
        **{f"count/{rule}": count(state, rule) for rule in RULES},
        "in_a_row": count(state, "in_a_row"),
        "began": read_step(state, "began").step,
        "leaf": read_step(state, "began").leaf,
        "growth": last.growth,
        "norm": last.norm,
        "norm_limit": last.norm_limit,
        "loss": last.loss,
        "loss_limit": last.loss_limit,
    } | result
    return {f"{label}/{name}": value for name, value in result.items()}


def _clip_metrics(label: str, state: ClipByNormState, params: Any):
    fields = state.norm, state.limit, state.num_clipped, state.num_nonfinite
    norm, limit, num_clipped, num_nonfinite = map(jax.tree.leaves, fields)
    (num_steps,) = jax.tree.leaves(state.num_steps)
    columns = {
        "norm": norm,
        "norm_after": list(map(_norm_after, norm, limit)),
        "limit": limit,
        "fraction": [
            n / jnp.maximum(num_steps, 1).astype(jnp.float32) for n in num_clipped
        ],
        "nonfinite": num_nonfinite,
    }
    if isinstance(state.layout, PerTree):
        return {f"{label}/{column}": value for column, (value,) in columns.items()}
    columns = {
        column: _per_name(values, state.layout) for column, values in columns.items()
    }
    names = scope_names(state.layout, len(columns["norm"]), label, params)
    return {
        f"{label}/{column}": jnp.max(values, initial=0)
        for column, values in columns.items()
    } | {
        f"{label}/{column}/{name}": value
        for column, values in columns.items()
        for name, value in zip(names, values, strict=True)
    }


def _norm_after(norm: jax.Array, limit: jax.Array) -> jax.Array:
    fits = ~jnp.isfinite(norm) | (norm <= limit)
    return jnp.where(fits, norm, jnp.where(limit > 0, limit, 0))


def _per_name(arrays: list[jax.Array], layout: Layout) -> jax.Array:
    """One number for each name; per unit the largest of a leaf, or of each layer."""
    if not isinstance(layout, PerUnit):
        return jnp.asarray(arrays[0])
    leaves = _leaf_layouts(layout.tree) or [LeafLayout(())] * len(arrays)
    rows = [
        jnp.max(jnp.reshape(array, (max(len(leaf.layers), 1), -1)), axis=1, initial=0)
        for array, leaf in zip(arrays, leaves, strict=True)
    ]
    return jnp.concatenate(rows) if rows else jnp.zeros(0)


def _leaf_layouts(node: Any) -> list[LeafLayout]:
    if isinstance(node, LeafLayout):
        return [node]
    return [leaf for child in node for leaf in _leaf_layouts(child)]


def scope_names(layout: Layout, num_scopes: int, label: str, params: Any) -> list[str]:
    """The names of a state's scopes from `params`; without it their numbers."""
    if params is None or not isinstance(layout, PerLeaf | PerUnit):
        return [str(i) for i in range(num_scopes)]
    names = leaf_names(params)
    error = ValueError(
        f"params, with {len(names)} leaves, does not have the structure that {label!r} "
        "was made for"
    )
    if layout.tree == ():
        if len(names) != num_scopes:
            raise error
        return names
    remaining = iter(names)

    def walk(node, structure):
        if isinstance(node, optax.MaskedNode):  # hides a leaf or a whole subtree
            for _ in range(structure.num_leaves):
                next(remaining)
            return []
        if isinstance(node, LeafLayout):
            if not jax.tree_util.treedef_is_leaf(structure):
                raise error
            name = next(remaining)
            return [f"{name}[{i}]" for i in range(len(node.layers))] or [name]
        children = structure.children()
        if len(children) != len(node):
            raise error
        return [
            name for pair in zip(node, children, strict=True) for name in walk(*pair)
        ]

    return walk(layout.tree, jax.tree.structure(params))
