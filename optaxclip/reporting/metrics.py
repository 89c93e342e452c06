"""Reads scalars for dashboards out of optimizer states."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from optaxclip.clipping.by_norm import ClipByNormState
from optaxclip.explosions.leading import fitted_growth
from optaxclip.explosions.rules import RULES
from optaxclip.explosions.state import (
    DetectExplosionsState,
    SkipExplosionsState,
    count,
    read_step,
)
from optaxclip.norms.measuring import measure_leaves
from optaxclip.norms.names import (
    Layout,
    LeafLayout,
    PerLeaf,
    PerTree,
    PerUnit,
    leaf_layouts,
    scope_leaves,
    scope_names,
)
from optaxclip.norms.scopes import find_scopes
from optaxclip.numerics import divided, shares_of, total_of
from optaxclip.recording import NO_LOSS, RecordState, rows_of
from optaxclip.reporting.history import totals_of
from optaxclip.reporting.states import (
    find_states,
    noticed_of,
    params_of,
    record_of,
    runs_of,
)

VANISHED = 1e-6
"""A leaf has vanished if its norm is at most this share of the norm of all updates."""


NUM_SPLIT = 8
"""So many numbers at a time are taken out of an array: XLA compiles a kernel for each,
and a thousand of them for a minute."""


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
    | `explosions/in_a_row` | how many steps in a row, up to the last, were no good |
    | `explosions/began` | the step on which the last explosion began; -1 for none |
    | `explosions/leaf` | the index of the leaf that led then; -1 for none |
    | `explosions/growth` | the growth of the norm per step, in the last eight |
    | `explosions/norm_limit`, `loss_limit` | the limits in the last step |
    | `explosions/skipped` | skip only: the share of all steps so far it skipped |
    | `explosions/num_skipped` | skip only: their number |
    | `explosions/gave_up` | skip only: 1 if it gave up after non-finite steps |
    | `explosions/scale` | skip only: the factor of the updates, below 1 to cool down |
    | `explosions/rollbacks` | skip only: the number of rollbacks |
    | `explosions/mended` | skip only: how often the optimizer's state went back alone |
    | `explosions/blocked_rollbacks` | skip only: of those that something undid |

    Each `record` gives, under its label, and `detect_explosions` and `skip_explosions`
    besides the above:

    | name | value |
    |---|---|
    | `gradients/norm` | the norm of all updates, in the last step |
    | `gradients/norm/<scope>` | the norm of that scope |
    | `gradients/share/<scope>` | its share of the sum of the squares |
    | `gradients/vanished/<scope>` | 1 if at most 1e-6 of all in the whole window |
    | `gradients/ratio`, `gradients/ratio/<leaf>` | the norm / that of the parameters |
    | `gradients/loss` | the loss; +inf if it was not given |
    | `gradients/largest` | the largest finite norm of all updates so far |
    | `gradients/nonfinite` | the number of steps so far that were not finite |

    `gradients/share` is the largest of them, `gradients/vanished` their number. Ratios
    are known per leaf, where `params` holds the parameters; +inf for one that is zero.

    Outside `jit` it compiles one program for each structure of states and parameters.

    Args:
      opt_state: Any tree: the state of a chain, of `optax.masked`, `partition`,
        `MultiSteps` or `inject_hyperparams`; a Flax `TrainState` or `nnx.Optimizer`.
        May hold several runs, as `jax.vmap` stacks them.
      params: The parameters, a `TrainState`, or any tree of their structure: names the
        leaves; without it they are numbered. Ratios read them once, and of several runs
        need those of each, stacked alike.

    Returns:
      `{name: scalar}`, inside or outside `jit`; of several runs `{name: [runs]}`; empty
      if there is nothing to report.

    Raises:
      ValueError: If two transformations have the same label, if `params` does not fit
        the state, or if a checkpoint without a template has made a state a dictionary.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> tx = optax.chain(optaxclip.clip_by_norm(1.0), optax.adam(1e-3))
      >>> _, opt_state = tx.update(params, tx.init(params), params)
      >>> print(metrics(opt_state)["clip/norm"], metrics(opt_state)["clip/fraction"])
      5.0 1.0
    """
    states = {
        label: _without_optimizer(x) for label, x in find_states(opt_state).items()
    }
    leaves, structure = jax.tree.flatten(params_of(params))
    structure = None if params is None else structure
    if not all(isinstance(x, jax.Array | np.ndarray) for x in leaves):
        leaves = []
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((states, leaves))):
        return {
            name: value
            for names, values in _columns(states, leaves, structure)
            for name, value in zip(names, jnp.unstack(values, axis=-1), strict=True)
        }
    packed = _pack(states, leaves, structure=structure)
    values = [
        [x for i in range(block.shape[-2]) for x in _split(block, i)]
        for block in packed.blocks
    ]
    return {name: values[block][place] for name, block, place in packed.places}


def _without_optimizer(state: Any) -> Any:
    """The state without what `metrics` does not read."""
    if isinstance(state, ClipByNormState):
        return state._replace(limit_state=())
    if isinstance(state, SkipExplosionsState):
        explosions = _without_optimizer(state.explosions)
        return state._replace(explosions=explosions, inner_state=(), snapshots=())
    if isinstance(state, DetectExplosionsState):
        return state._replace(rule_states=((), (), ()))
    return state


def _columns(
    states: dict[str, Any], leaves: list[jax.Array], structure: Any
) -> list[tuple[list[str], jax.Array]]:
    """(names, values `[..., num_names]`) for all that is told; `[...]` are the runs.

    Args:
      states: By their label.
      leaves: Of the parameters, of as many runs; none where they are not known.
      structure: Of the parameters; None where it is not known.
    """
    params = None
    if structure is not None:
        params = structure.unflatten(leaves or [0] * structure.num_leaves)
    found = []
    for label, state in states.items():
        runs = runs_of(state)

        def read(state, params, label=label):
            if isinstance(state, ClipByNormState):
                return _clip_metrics(state)
            parts = _record_metrics(label, record_of(state), params)
            if not isinstance(state, RecordState):
                parts.append(_explosion_metrics(state))
            return parts

        has_params = leaves and all(x.shape[: len(runs)] == runs for x in leaves)
        over = params if has_params or not runs else None
        for _ in runs:
            read = jax.vmap(read)
        is_clip = isinstance(state, ClipByNormState)
        layout = (state if is_clip else record_of(state)).layout
        for part in read(state, over):
            for column, values in part.items():
                names = [f"{label}/{column}"]
                if values.ndim > len(runs):
                    scopes = scope_names(layout, values.shape[-1], label, params)
                    names = [f"{names[0]}/{scope}" for scope in scopes]
                else:
                    values = values[..., None]
                found.append((names, values))
    return found


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks"],
    meta_fields=["places"],
)
@dataclasses.dataclass(frozen=True)
class _Packed:
    blocks: list[jax.Array]
    """`[..., num_rows, NUM_SPLIT]`, one for each dtype."""
    places: tuple[tuple[str, int, int], ...]
    """(name, block, place in the block) of each number."""


@functools.partial(jax.jit, static_argnames=("structure",))
def _pack(states: dict[str, Any], leaves: list[jax.Array], *, structure: Any):
    """All of `_columns` in few arrays, compiled once for each structure."""
    found: dict[Any, list[jax.Array]] = {}
    places = []
    for names, values in _columns(states, leaves, structure):
        parts = found.setdefault((values.dtype, values.shape[:-1]), [])
        block = list(found).index((values.dtype, values.shape[:-1]))
        place = sum(x.shape[-1] for x in parts)
        places += [(name, block, place + i) for i, name in enumerate(names)]
        parts.append(values)
    blocks = []
    for (_, runs), parts in found.items():
        block = jnp.concatenate(parts, axis=-1)
        padding = [(0, 0)] * len(runs) + [(0, -block.shape[-1] % NUM_SPLIT)]
        blocks.append(jnp.pad(block, padding).reshape(*runs, -1, NUM_SPLIT))
    return _Packed(blocks, tuple(places))


@jax.jit
def _split(block: jax.Array, row: jax.Array) -> list[jax.Array]:
    """The numbers of one row, `[...]` each."""
    values = lax.dynamic_index_in_dim(block, row, axis=-2, keepdims=False)
    return list(jnp.unstack(values, axis=-1))


def _record_metrics(
    label: str, state: RecordState, params: Any
) -> list[dict[str, jax.Array]]:
    last, norms = rows_of(state, state.counts[0] - 1)
    result = {
        "norm": total_of(norms),
        "loss": jnp.where(last["loss"] == NO_LOSS, jnp.inf, last["loss"]),
        "largest": last["largest"],
        "nonfinite": state.counts[1],
    }
    if isinstance(state.layout, PerTree):
        return [result]
    shares = jnp.square(shares_of(norms)[0])
    has_vanished = have_vanished(state).astype(jnp.int32)
    result |= {
        "share": jnp.max(shares, initial=0),
        "vanished": jnp.sum(has_vanished),
    }
    columns = {"norm": norms, "share": shares, "vanished": has_vanished}
    ratios = _ratios(norms, state.layout, label, params)
    if ratios is not None:
        result["ratio"], columns["ratio"] = ratios
    return [result, columns]


@jax.jit
def have_vanished(state: RecordState) -> jax.Array:
    """Which scopes had nearly no norm in a whole window."""
    totals = totals_of(state.norms)
    # On a step that is not finite no norm is small but 0.
    totals = jnp.where(totals < jnp.inf, totals, 0)
    is_small = state.norms <= VANISHED * totals[:, None]
    return jnp.all(is_small, axis=0) & (state.counts[0] >= len(state.norms))


def _ratios(norms: jax.Array, layout: Layout, label: str, params: Any):
    """Norms in units of those of the parameters; None where these are not known."""
    leaves = jax.tree.leaves(params)
    is_known = all(isinstance(x, jax.Array | np.ndarray) for x in leaves)
    if params is None or not is_known or not isinstance(layout, PerLeaf):
        return None
    found = scope_leaves(layout, len(norms), label, params)
    tree = [leaves[i] for i, _ in found]
    scopes = find_scopes(tree, "leaf", stacked=lambda i: found[int(i)][1] > 0)
    param_norms, param_norm = measure_leaves(tree, scopes)

    def ratio(norm, unit):
        quotient = divided(norm, jnp.where(unit > 0, unit, 1))
        return jnp.where((unit > 0) | (norm == 0), quotient, jnp.inf)

    unit = param_norm.astype(norms.dtype)
    units = param_norms.astype(norms.dtype)
    return ratio(total_of(norms), unit), ratio(norms, units)


def _explosion_metrics(state: Any) -> dict[str, jax.Array]:
    result, noticed = {}, noticed_of(state)
    if isinstance(state, SkipExplosionsState):
        num_skipped = count(noticed, "skipped")
        num_steps = jnp.maximum(count(noticed, "steps"), 1)
        result = {
            "num_skipped": num_skipped,
            "skipped": num_skipped.astype(jnp.float32) / num_steps.astype(jnp.float32),
            "gave_up": state.gave_up.astype(jnp.int32),
            "scale": state.scale,
            "rollbacks": count(noticed, "rollbacks"),
            "mended": count(noticed, "mended"),
            "blocked_rollbacks": count(noticed, "blocked_rollbacks"),
        }
    last_step = count(noticed, "steps") - 1
    last, _ = rows_of(noticed.record, last_step)
    has_exploded = (count(noticed, "last") == last_step) & (last_step >= 0)
    began = read_step(noticed, "began")
    return {
        "exploded": has_exploded.astype(jnp.int32),
        "count": count(noticed, "exploded"),
        **{f"count/{rule}": count(noticed, rule) for rule in RULES},
        "in_a_row": count(noticed, "in_a_row"),
        "began": began.step,
        "leaf": began.leaf,
        "growth": fitted_growth(noticed.record),
        "norm_limit": last["limit"],
        "loss_limit": last["loss_limit"],
    } | result


def _clip_metrics(state: ClipByNormState) -> list[dict[str, jax.Array]]:
    fields = state.norm, state.limit, state.num_clipped, state.num_nonfinite
    norm, limit, num_clipped, num_nonfinite = map(jax.tree.leaves, fields)
    (num_steps,) = jax.tree.leaves(state.num_steps)
    num_steps = jnp.maximum(num_steps, 1).astype(jnp.float32)
    columns = {
        "norm": norm,
        "norm_after": list(map(_norm_after, norm, limit)),
        "limit": limit,
        "fraction": [n.astype(jnp.float32) / num_steps for n in num_clipped],
        "nonfinite": num_nonfinite,
    }
    if isinstance(state.layout, PerTree):
        return [{column: value for column, (value,) in columns.items()}]
    columns = {
        column: _per_name(values, state.layout) for column, values in columns.items()
    }
    largest = {name: jnp.max(values, initial=0) for name, values in columns.items()}
    return [largest, columns]


def _norm_after(norm: jax.Array, limit: jax.Array) -> jax.Array:
    fits = ~jnp.isfinite(norm) | (norm <= limit)
    return jnp.where(fits, norm, jnp.where(limit > 0, limit, 0))


def _per_name(arrays: list[jax.Array], layout: Layout) -> jax.Array:
    """One number for each name; per unit the largest of a leaf, or of each layer."""
    if not isinstance(layout, PerUnit):
        return jnp.asarray(arrays[0])
    leaves = leaf_layouts(layout.tree) or [LeafLayout(())] * len(arrays)
    rows = [
        jnp.max(jnp.reshape(array, (max(len(leaf.layers), 1), -1)), axis=1, initial=0)
        for array, leaf in zip(arrays, leaves, strict=True)
    ]
    return jnp.concatenate(rows) if rows else jnp.zeros(0)
