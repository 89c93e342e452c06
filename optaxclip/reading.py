"""What happened: reads the states of optaxclip's transformations."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

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
EMPTY = {"layout", "limit_state", "snapshots"}
"""Their fields that may hold no arrays, which some checkpoints leave out."""

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
        found = explosions_of(self)
        return found[-1][0] if found else None

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


def explosions_of(history: History) -> list[tuple[int, int]]:
    """The first and the last row of each explosion that is kept."""
    exploded = np.flatnonzero(history.fired.any(axis=1))
    first_of = np.flatnonzero(np.diff(exploded, prepend=-np.inf) > MAX_GAP)
    return [(int(rows[0]), int(rows[-1])) for rows in np.split(exploded, first_of)[1:]]


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
    check_one_run(label, recorders[label])
    state = record_of(recorders[label])
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
        names=scope_names(state.layout, norms.shape[1], label, params_of(params)),
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
        for path, state in jax.tree.leaves_with_path(tree, is_leaf=_is_found):
            if not isinstance(state, (*STATES, dict)):
                continue
            if isinstance(state, dict):
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} was a state of optaxclip and is a "
                    "dictionary: restore the checkpoint into the tree of "
                    "tx.init(params), as its template"
                )
            label = getattr(path[-1], "key", None) if path else None
            if not isinstance(label, str):
                raise ValueError(
                    f"a {type(state).__name__} has lost its label: give the whole "
                    "state of the optimizer"
                )
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


def _is_found(x: Any) -> bool:
    """Whether it is a state, or was one before a checkpoint made it a dictionary."""
    if isinstance(x, dict) and len(x) > 1:
        names = set(x)
        return any(set(s._fields) - EMPTY <= names <= set(s._fields) for s in STATES)
    return isinstance(x, STATES)


def params_of(params: Any) -> Any:
    """The parameters, also of a training state that holds them."""
    is_train_state = hasattr(params, "params") and hasattr(params, "opt_state")
    return params.params if is_train_state else params


def runs_of(state: Any) -> tuple[int, ...]:
    """The axes of a state of several runs, as `jax.vmap` stacks them; () for one."""
    if isinstance(state, ClipByNormState):
        return np.shape(state.num_steps)
    return np.shape(record_of(state).counts)[:-1]


def check_one_run(label: str, state: Any) -> None:
    """Raises the error of a state of several runs."""
    if runs_of(state):
        raise ValueError(
            f"{label!r} holds runs {list(runs_of(state))}, and this reads one run: "
            "give jax.tree.map(lambda x: x[i], opt_state)"
        )


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


# Jitted on their own, for `history` and `explain`, which would else start a dozen small
# programs.
@jax.jit
def _totals(norms: Any) -> jax.Array:
    """The norm of all updates on each step, `[num_steps]`."""
    return jax.vmap(total_of)(jnp.asarray(norms))


@jax.jit
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
