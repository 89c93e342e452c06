"""Makes the scalars of each kind of state for `metrics`. Internal."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip.clipping.by_norm import ClipByNormState
from optaxclip.explosions.leading import fitted_growth
from optaxclip.explosions.rules import RULES
from optaxclip.extras import NO_LOSS
from optaxclip.norms.measuring import measure_leaves
from optaxclip.norms.names import (
    LeafLayout,
    leaf_layouts,
    scope_leaves,
    scope_names,
)
from optaxclip.norms.scopes import find_scopes
from optaxclip.numerics import divide, normalize_norms, root_sum_squares
from optaxclip.reporting.history import totals_of
from optaxclip.reporting.windowed import windowed_metrics
from optaxclip.ring import RecordState, largest_scopes, rows_of, scopes_of_ranks

TOP = "top/"
"""Begins the name of what is told of the largest scopes alone."""
VANISHED = 1e-6
"""A leaf has vanished if its norm is at most this share of the norm of all updates.

Its square, 1e-12 of their sum, is then far below a rounding of that sum (6e-8)."""


def scalars_of(
    states: dict[str, Any],
    leaves: list[jax.Array],
    structure: Any,
    top: int,
    window: int | None,
) -> list[tuple[list[str], jax.Array]]:
    """(names, values `[..., num_names]`) for all that is told; `[...]` are the runs.

    Args:
      states: By their label.
      leaves: Of the parameters, of as many runs; none where they are not known.
      structure: Of the parameters; None where it is not known.
      top: With more scopes than so many there are only the largest.
      window: As in `metrics`.
    """
    params = None
    if structure is not None:
        params = structure.unflatten(leaves or [0] * structure.num_leaves)
    found = []
    # A recorder ranks the scopes; ranks of each clip as well would be many names.
    is_recorded = any(x.has_record for x in states.values())
    for label, state in states.items():
        kept = state.record if state.has_record else state
        runs, layout = kept.runs, kept.layout

        def read(state, params, label=label):
            if not state.has_record:
                return _clip_metrics(state, top, is_ranked=not is_recorded)
            parts = _record_metrics(label, state, params, top, window)
            if state.has_rules:
                parts.append(_explosion_metrics(state))
            return parts

        # Of several runs each needs its own: one tree would be taken apart.
        has_params = leaves and all(x.shape[: len(runs)] == runs for x in leaves)
        over = params if has_params or not runs else None
        # One `vmap` for each axis of runs, so that the code reads one run.
        for _ in runs:
            read = jax.vmap(read)
        for part in read(state, over):
            for column, values in part.items():
                names = [f"{label}/{column}"]
                if column.startswith(TOP):
                    names = ranked_names(label, column, values.shape[-1])
                elif values.ndim > len(runs):
                    scopes = scope_names(layout, values.shape[-1], label, params)
                    names = [f"{names[0]}/{scope}" for scope in scopes]
                else:
                    values = values[..., None]
                found.append((names, values))
    return found


def ranked_names(label: str, column: str, num: int) -> list[str]:
    """Names by rank, which stay the same whatever the values are."""
    return [f"{label}/{TOP}{k + 1}/{column.removeprefix(TOP)}" for k in range(num)]


def _record_metrics(
    label: str, holder: Any, params: Any, top: int, window: int | None
) -> list[dict[str, jax.Array]]:
    state: RecordState = holder.record
    last, norms = rows_of(state, state.num_steps - 1)
    totals = totals_of(state.norms)
    num_steps = jnp.maximum(state.num_steps, 1).astype(jnp.float32)
    result = {
        "norm": root_sum_squares(norms),
        "loss": jnp.where(last["loss"] == NO_LOSS, jnp.inf, last["loss"]),
        "largest_norm": last["largest"],
        "num_nonfinite": state.num_nonfinite,
        "nonfinite_fraction": state.num_nonfinite.astype(jnp.float32) / num_steps,
    }
    result |= windowed_metrics(holder, totals, window)
    if state.layout.kind == "tree":
        return [result]
    shares = jnp.square(normalize_norms(norms)[0])
    if state.num_ranks:
        return [result, *_ranked_metrics(label, state, norms, shares, params, top)]
    # A number, since trackers do not take flags.
    has_vanished = vanished_of(state, totals).astype(jnp.int32)
    result |= {
        "squared_share": jnp.max(shares, initial=0),
        "num_vanished": jnp.sum(has_vanished),
    }
    columns = {"norm": norms, "squared_share": shares, "is_vanished": has_vanished}
    found = _measure_params(label, state, params)
    if found is not None:
        units, unit = (x.astype(norms.dtype) for x in found)
        result["ratio"] = _ratio(root_sum_squares(norms), unit)
        columns["ratio"] = _ratio(norms, units)
    if len(norms) > top:
        columns = _largest(norms, top)  # the order of the shares
    return [result, columns]


def _largest(norms: jax.Array, top: int) -> dict[str, jax.Array]:
    """The largest norms and whose they are."""
    index = largest_scopes(norms, top)
    return {f"{TOP}index": index, f"{TOP}norm": norms[index]}


def _ranked_metrics(
    label: str,
    state: RecordState,
    norms: jax.Array,
    shares: jax.Array,
    params: Any,
    top: int,
) -> list[dict[str, jax.Array]]:
    """Of a record of the largest norms, which does not know of any that vanish."""
    largest = slice(min(top, state.num_ranks))
    result = {"squared_share": jnp.max(shares[: state.num_ranks], initial=0)}
    found = _measure_params(label, state, params)
    if found is not None:
        unit = found[1].astype(norms.dtype)
        result["ratio"] = _ratio(root_sum_squares(norms), unit)
    scopes = scopes_of_ranks(state, state.num_steps - 1)
    columns = {f"{TOP}index": scopes[largest], f"{TOP}norm": norms[largest]}
    return [result, columns]


@jax.jit
def have_vanished(state: RecordState) -> jax.Array:
    """Which scopes had nearly no norm in a whole window."""
    return vanished_of(state, totals_of(state.norms))


def vanished_of(state: RecordState, totals: jax.Array) -> jax.Array:
    """The same, where the norms of all updates are known, one for each row."""
    # On a step that is non-finite no norm is small but 0.
    totals = jnp.where(totals < jnp.inf, totals, 0)
    is_small = state.norms <= VANISHED * totals[:, None]
    return jnp.all(is_small, axis=0) & (state.num_steps >= len(state.norms))


def _measure_params(label: str, state: RecordState, params: Any):
    """Norms of the parameters, and of all; None where these are not known."""
    leaves = jax.tree.leaves(params)
    is_known = all(isinstance(x, jax.Array | np.ndarray) for x in leaves)
    if params is None or not is_known or state.layout.kind != "leaf":
        return None
    found = scope_leaves(state.layout, state.num_scopes, label, params)
    tree = [leaves[i] for i, _ in found]
    scopes = find_scopes(tree, "leaf", stacked=lambda i: len(found[int(i)][1]))
    return measure_leaves(tree, scopes)


def _ratio(norm: jax.Array, unit: jax.Array) -> jax.Array:
    """Norms in units of those of the parameters."""
    quotient = divide(norm, jnp.where(unit > 0, unit, 1))
    # Of a leaf that starts at zero any norm is infinitely large; none is none.
    return jnp.where((unit > 0) | (norm == 0), quotient, jnp.inf)


def _explosion_metrics(state: Any) -> dict[str, jax.Array]:
    result, noticed = {}, state.detection
    # Before the first step a share is 0, not NaN.
    num_steps = jnp.maximum(noticed.counts.steps, 1).astype(jnp.float32)
    num_exploded = noticed.counts.exploded
    if state.is_skipping:
        num_skipped = noticed.counts.skipped
        result = {
            "is_skipped": noticed.is_skipped.astype(jnp.int32),
            "is_rolled_back": noticed.is_rolled_back.astype(jnp.int32),
            "num_skipped": num_skipped,
            "skipped_fraction": num_skipped.astype(jnp.float32) / num_steps,
            "gave_up": state.gave_up.astype(jnp.int32),
            "scale": state.scale,
            "num_rollbacks": noticed.counts.rollbacks,
            "num_mended": noticed.counts.mended,
            "num_blocked_rollbacks": noticed.counts.blocked_rollbacks,
        }
    last, _ = rows_of(noticed.record, noticed.counts.steps - 1)
    began = noticed.began
    return {
        "is_exploded": noticed.is_exploded.astype(jnp.int32),
        "num_exploded": num_exploded,
        "exploded_fraction": num_exploded.astype(jnp.float32) / num_steps,
        **{f"num_exploded/{rule}": getattr(noticed.counts, rule) for rule in RULES},
        "num_in_a_row": noticed.counts.in_a_row,
        "began": began.step,
        "leading_leaf": began.leaf,
        "growth": fitted_growth(noticed.record),
        "norm_limit": last["limit"],
        "loss_limit": last["loss_limit"],
    } | result


def _clip_metrics(
    state: ClipByNormState, top: int, *, is_ranked: bool
) -> list[dict[str, jax.Array]]:
    fields = state.norm, state.limit, state.num_clipped, state.num_nonfinite
    norm, limit, num_clipped, num_nonfinite = map(jax.tree.leaves, fields)
    (num_steps,) = jax.tree.leaves(state.num_steps)
    num_steps = jnp.maximum(num_steps, 1).astype(jnp.float32)
    # Of a cap the target is the limit, for norms above it.
    target = jax.tree.leaves(state.target) or [
        jnp.where(n <= x, jnp.inf, x) for n, x in zip(norm, limit, strict=True)
    ]
    columns = {
        "norm": norm,
        "norm_after": list(map(_norm_after, norm, target)),
        "limit": limit,
        "clipped_fraction": [n.astype(jnp.float32) / num_steps for n in num_clipped],
        "num_nonfinite": num_nonfinite,
    }
    if state.layout.kind == "tree":
        return [{column: value for column, (value,) in columns.items()}]
    columns = {
        column: _per_name(values, state.layout) for column, values in columns.items()
    }
    largest = {name: jnp.max(values, initial=0) for name, values in columns.items()}
    if len(columns["norm"]) <= top:
        return [largest, columns]
    return [largest, _largest(columns["norm"], top)] if is_ranked else [largest]


def _norm_after(norm: jax.Array, target: jax.Array) -> jax.Array:
    is_left = ~jnp.isfinite(norm) | (target == jnp.inf)
    return jnp.where(is_left, norm, jnp.where(target > 0, target, 0))


def _per_name(arrays: list[jax.Array], layout: Any) -> jax.Array:
    """One number for each name; per unit the largest of a leaf, or of each layer."""
    if layout.kind != "unit":
        return jnp.asarray(arrays[0])
    leaves = leaf_layouts(layout.tree) or [LeafLayout(())] * len(arrays)
    rows = [
        jnp.max(array, axis=tuple(range(len(leaf.shape), array.ndim)), initial=0)
        for array, leaf in zip(arrays, leaves, strict=True)
    ]
    rows = [jnp.reshape(row, -1) for row in rows]
    return jnp.concatenate(rows) if rows else jnp.zeros(0)
