"""What happened: reads the states of optaxclip's transformations."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip.clipping import ClipByNormState
from optaxclip.scopes import Layout, PerLeaf, PerTree, PerUnit, leaf_names


def metrics(opt_state: Any, params: Any = None) -> dict[str, jax.Array]:
    """Reads scalars out of every optaxclip state in an optimizer state.

    Each `clip_by_norm` gives, under its label:

    | name | value |
    |---|---|
    | `clip/norm` | the norm before the clip, in the last step |
    | `clip/norm_after` | the norm after it; inf or NaN where the update was |
    | `clip/limit` | the limit |
    | `clip/fraction` | the share of all steps so far that were clipped |
    | `clip/nonfinite` | the number of steps so far with inf or NaN |

    With more than one scope these are the largest of them, and each scope has its own
    under its name: `clip/norm/rnn/hh/kernel`; per unit, a leaf's largest. Groups are
    numbered, in the order of `group_names`.

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
    labels: set[str] = set()
    for path, state in jax.tree.leaves_with_path(
        opt_state, is_leaf=lambda x: isinstance(x, ClipByNormState)
    ):
        if not isinstance(state, ClipByNormState):
            continue
        label = path[-1].key
        if label in labels:
            raise ValueError(
                f"two transformations have the label {label!r}: give them different "
                "ones with label="
            )
        labels.add(label)
        result |= _clip_metrics(label, state, params)
    return result


def _clip_metrics(label: str, state: ClipByNormState, params: Any):
    norm, limit, num_clipped, num_nonfinite = (
        _per_name(field, state.layout)
        for field in (state.norm, state.limit, state.num_clipped, state.num_nonfinite)
    )
    (num_steps,) = jax.tree.leaves(state.num_steps)
    fits = ~jnp.isfinite(norm) | (norm <= limit)
    columns = {
        "norm": norm,
        "norm_after": jnp.where(fits, norm, jnp.where(limit > 0, limit, 0)),
        "limit": limit,
        "fraction": num_clipped / jnp.maximum(num_steps, 1).astype(jnp.float32),
        "nonfinite": num_nonfinite,
    }
    if isinstance(state.layout, PerTree):
        return {f"{label}/{column}": value for column, value in columns.items()}
    names = _scope_names(state.layout, len(norm), label, params)
    return {
        f"{label}/{column}": jnp.max(values, initial=0)
        for column, values in columns.items()
    } | {
        f"{label}/{column}/{name}": value
        for column, values in columns.items()
        for name, value in zip(names, values, strict=True)
    }


def _per_name(field: Any, layout: Layout) -> jax.Array:
    """One number for each name; per unit the largest of a leaf, or of each layer."""
    arrays = list(map(jnp.asarray, jax.tree.leaves(field)))
    if not isinstance(layout, PerUnit):
        return arrays[0]
    entries = [e for e in layout.entries if not isinstance(e, optax.MaskedNode)]
    rows = [
        array.reshape(max(len(entry), 1), -1).max(axis=1, initial=0)
        for array, entry in zip(arrays, entries or [()] * len(arrays), strict=True)
    ]
    return jnp.concatenate(rows) if rows else jnp.zeros(0)


def _scope_names(layout: Layout, num_scopes: int, label: str, params: Any) -> list[str]:
    numbers = [str(i) for i in range(num_scopes)]
    if params is None or not isinstance(layout, PerLeaf | PerUnit):
        return numbers
    names = leaf_names(params)
    entries = layout.entries or ((),) * num_scopes
    if len(entries) != len(names):
        raise ValueError(
            f"params has {len(names)} leaves, but {label!r} was made for {len(entries)}"
        )
    scope_names = []
    for name, entry in zip(names, entries, strict=True):
        if isinstance(entry, optax.MaskedNode):
            continue
        layers = [f"{name}[{layer}]" for layer in range(len(entry))]
        scope_names += layers or [name]
    return scope_names
