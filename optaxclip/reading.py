"""What happened: reads the states of optaxclip's transformations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip.clipping import ClipByNormState
from optaxclip.explosions import (
    MAX_GAP,
    RULES,
    DetectExplosionsState,
    count,
    fitted_growth,
    flags_of,
    read_step,
)
from optaxclip.norms import divided, measure_leaves, shares_of, total_of
from optaxclip.recording import NO_LOSS, RecordState, rows_of
from optaxclip.responses import SkipExplosionsState
from optaxclip.scopes import (
    Layout,
    LeafLayout,
    PerLeaf,
    PerTree,
    PerUnit,
    find_scopes,
    leaf_names,
)

VANISHED = 1e-6
"""A leaf has vanished if its norm is at most this share of the norm of all updates."""

STATES = ClipByNormState, RecordState, DetectExplosionsState, SkipExplosionsState
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
    | `explosions/in_a_row` | how many steps in a row, up to the last, were no good |
    | `explosions/began` | the step on which the last explosion began; -1 for none |
    | `explosions/leaf` | the index of the leaf that led then; -1 for none |
    | `explosions/growth` | the growth of the norm per step, in the last eight |
    | `explosions/norm_limit`, `loss_limit` | the limits in the last step |
    | `explosions/skipped` | skip only: the share of all steps so far it skipped |
    | `explosions/num_skipped` | skip only: their number |
    | `explosions/gave_up` | skip only: 1 if the last `give_up_after` were non-finite |
    | `explosions/scale` | skip only: the factor of the updates, below 1 to cool down |
    | `explosions/rollbacks` | skip only: the number of rollbacks |

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

    Args:
      opt_state: Any tree: the state of a chain, of `optax.masked`, `partition`,
        `MultiSteps` or `inject_hyperparams`; a Flax `TrainState` or `nnx.Optimizer`.
      params: The parameters, or any tree of their structure: names the leaves; without
        it they are numbered. Ratios read them once.

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
            continue
        result |= _record_metrics(label, record_of(state), params)
        if not isinstance(state, RecordState):
            result |= _explosion_metrics(label, state)
    return result


class History(NamedTuple):
    """The last steps of a run, in time order; see `history`."""

    step: np.ndarray
    """int `[num_steps]`: their indices, from 0 for the first of the run."""
    loss: np.ndarray
    """float32 `[num_steps]`: NaN where it was not given."""
    loss_limit: np.ndarray
    """float32 `[num_steps]`: the limit of the loss; +inf for none, and in `record`."""
    norm: np.ndarray
    """float32 `[num_steps]`: the norm of all updates."""
    limit: np.ndarray
    """float32 `[num_steps]`: the limit of that norm; +inf for none, and in `record`."""
    fired: np.ndarray
    """bool `[num_steps, 4]`: whether the step was not finite, and whether norm, share
    and loss exceeded their limits, which `record` does not judge."""
    leaf: np.ndarray
    """int `[num_steps]`: the index in `names` of the leaf that led: the first not
    finite, or that had grown most since every eighth of the 64 steps before; -1 if none
    had, and in `record`."""
    norms: np.ndarray
    """float32 `[num_steps, num_scopes]`: the norm of each scope."""
    names: list[str]
    """The name of each scope, or its number."""

    @property
    def began(self) -> int | None:
        """The row on which the last explosion began, of those kept; None for none."""
        exploded = np.flatnonzero(self.fired.any(axis=1))
        if not len(exploded):
            return None
        is_first = np.diff(exploded, prepend=-np.inf) > MAX_GAP
        return int(exploded[is_first][-1])

    def columns(self) -> dict[str, np.ndarray]:
        """One column for each number of a step, as `pandas.DataFrame` takes them.

        Returns:
          `{name: [num_steps]}`: "step", "loss", "loss_limit", "norm", "limit", the
          rules "nonfinite", "norm_exploded", "share_exploded" and "loss_exploded", and
          "norm/<scope>".
        """
        fired = ["nonfinite", *(f"{rule}_exploded" for rule in RULES[1:])]
        return (
            {
                "step": self.step,
                "loss": self.loss,
                "loss_limit": self.loss_limit,
                "norm": self.norm,
                "limit": self.limit,
            }
            | dict(zip(fired, self.fired.T, strict=True))
            | _by_name({"norm": self.norms.T}, self.names)
        )


def history(opt_state: Any, params: Any = None, *, label: str | None = None) -> History:
    """Reads the steps that a recorder kept, on the host.

    Args:
      opt_state: Any tree, as for `metrics`; of one run: with `jax.vmap` over runs, the
        state of one of them, `jax.tree.map(lambda x: x[0], opt_state)`.
      params: The parameters, or any tree of their structure: names the leaves; without
        it they are numbered.
      label: That of the `record`, `detect_explosions` or `skip_explosions`; may be
        left out where there is only one.

    Returns:
      The `History`, NumPy arrays in time order. `pandas.DataFrame(history.columns())`.

    Raises:
      ValueError: If there is no such recorder, or more than one and no label, or if
        `params` does not fit the state.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> recorder = optaxclip.record(window=3)
      >>> grads = {"b": jnp.array([4.0]), "w": jnp.array([3.0])}
      >>> state = recorder.init(grads)
      >>> for _ in range(5):
      ...     _, state = recorder.update(grads, state)
      >>> kept = optaxclip.history(state, grads)
      >>> print(kept.step, kept.norm, kept.names, kept.norms[0])
      [2 3 4] [5. 5. 5.] ['b', 'w'] [4. 3.]
    """
    recorders = find_recorders(opt_state)
    if label is None and len(recorders) == 1:
        (label,) = recorders
    if label not in recorders:
        raise ValueError(f"label={label!r} is no recorder; found {sorted(recorders)}")
    state = record_of(recorders[label])
    if state.counts.ndim > 1:
        raise ValueError(
            "history reads one run: give jax.tree.map(lambda x: x[i], opt_state)"
        )
    state = jax.device_get(state)
    window, num_steps = len(state.rows), int(state.counts[0])
    step = np.arange(max(0, num_steps - window), num_steps)
    columns, norms = rows_of(state, step)
    return History(
        step=step,
        loss=np.where(columns["loss"] == NO_LOSS, np.float32(np.nan), columns["loss"]),
        loss_limit=columns["loss_limit"],
        norm=np.asarray(_totals(norms)),
        limit=columns["limit"],
        fired=flags_of(columns["fired"].astype(int)),
        leaf=columns["leaf"].astype(int),
        norms=norms,
        names=scope_names(state.layout, norms.shape[1], label, params),
    )


def find_recorders(opt_state: Any) -> dict[str, Any]:
    """The states that hold a recorder, by their label; the error of none."""
    found = {
        label: state
        for label, state in find_states(opt_state).items()
        if not isinstance(state, ClipByNormState)
    }
    if not found:
        raise ValueError(
            "found no state of record, detect_explosions or skip_explosions"
        )
    return found


def record_of(state: Any) -> RecordState:
    """The recorder of a `record`, `detect_explosions` or `skip_explosions`."""
    return state if isinstance(state, RecordState) else noticed_of(state).record


def noticed_of(state: Any) -> DetectExplosionsState:
    """What a `detect_explosions` or `skip_explosions` noticed."""
    return state.explosions if isinstance(state, SkipExplosionsState) else state


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


def _record_metrics(label: str, state: RecordState, params: Any):
    last, norms = rows_of(state, state.counts[0] - 1)
    result = {
        "norm": total_of(norms),
        "loss": jnp.where(last["loss"] == NO_LOSS, jnp.inf, last["loss"]),
        "largest": last["largest"],
        "nonfinite": state.counts[1],
    }
    if not isinstance(state.layout, PerTree):
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
        names = scope_names(state.layout, len(norms), label, params)
        result |= _by_name(columns, names)
    return {f"{label}/{name}": value for name, value in result.items()}


def _totals(norms: Any) -> jax.Array:
    """The norm of all updates on each step, `[num_steps]`."""
    return jax.vmap(total_of)(jnp.asarray(norms))


def have_vanished(state: RecordState) -> jax.Array:
    """Which scopes had nearly no norm in a whole window."""
    totals = _totals(state.norms)
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
    found = _scope_leaves(layout, len(norms), label, params)
    tree = [leaves[i] for i, _ in found]
    scopes = find_scopes(tree, "leaf", stacked=lambda i: found[int(i)][1] > 0)
    param_norms, param_norm = measure_leaves(tree, scopes)

    def ratio(norm, unit):
        quotient = divided(norm, jnp.where(unit > 0, unit, 1))
        return jnp.where((unit > 0) | (norm == 0), quotient, jnp.inf)

    unit = param_norm.astype(norms.dtype)
    units = param_norms.astype(norms.dtype)
    return ratio(total_of(norms), unit), ratio(norms, units)


def _explosion_metrics(label: str, state: Any) -> dict[str, jax.Array]:
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
        }
    last_step = count(noticed, "steps") - 1
    last, _ = rows_of(noticed.record, last_step)
    has_exploded = (count(noticed, "last") == last_step) & (last_step >= 0)
    began = read_step(noticed, "began")
    result = {
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
    largest = {name: jnp.max(values, initial=0) for name, values in columns.items()}
    result = largest | _by_name(columns, names)
    return {f"{label}/{name}": value for name, value in result.items()}


def _by_name(columns: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {
        f"{column}/{name}": value
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
    return [
        name
        for i, num_layers in _scope_leaves(layout, num_scopes, label, params)
        for name in [f"{names[i]}[{k}]" for k in range(num_layers)] or [names[i]]
    ]


def _scope_leaves(
    layout: PerLeaf | PerUnit, num_scopes: int, label: str, params: Any
) -> list[tuple[int, int]]:
    """Which leaves of `params` a state has, and how many layers, 0 if not stacked."""
    structure = jax.tree.structure(params)
    error = ValueError(
        f"params, with {structure.num_leaves} leaves, does not have the structure that "
        f"{label!r} was made for"
    )
    if layout.tree == ():
        if structure.num_leaves != num_scopes:
            raise error
        return [(i, 0) for i in range(num_scopes)]
    remaining = iter(range(structure.num_leaves))

    def walk(node, structure):
        if isinstance(node, optax.MaskedNode):  # hides a leaf or a whole subtree
            for _ in range(structure.num_leaves):
                next(remaining)
            return []
        if isinstance(node, LeafLayout):
            if not jax.tree_util.treedef_is_leaf(structure):
                raise error
            return [(next(remaining), len(node.layers))]
        children = structure.children()
        if len(children) != len(node):
            raise error
        return [
            found for pair in zip(node, children, strict=True) for found in walk(*pair)
        ]

    return walk(layout.tree, structure)
