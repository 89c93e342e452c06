"""Finds the states of optaxclip in any optimizer state. Internal."""

from __future__ import annotations

from typing import Any

import jax

from optaxclip.clipping.by_norm import ClipByNormState
from optaxclip.explosions.state import DetectExplosionsState, SkipExplosionsState
from optaxclip.ring import RecordState

STATES = ClipByNormState, RecordState, DetectExplosionsState, SkipExplosionsState
"""The kinds of states that can be read."""
EMPTY = {"layout", "columns", "top", "limit_state", "target", "snapshots"}
"""Their fields that may hold no arrays, which some checkpoints leave out."""


def find_recorders(opt_state: Any) -> dict[str, Any]:
    """The states that hold a recorder, by their label; the error of none."""
    states = find_states(opt_state)
    found = {label: x for label, x in states.items() if x.has_record}
    if not found:
        raise ValueError(
            "found no state of record, detect_explosions or skip_explosions"
        )
    return found


def find_skipping(opt_state: Any, label: str | None) -> SkipExplosionsState:
    """The state of `skip_explosions`; the errors of none, and of several unlabeled."""
    found = {
        name: state
        for name, state in find_states(opt_state).items()
        if state.is_skipping and label in (None, name)
    }
    if not found:
        of_label = "" if label is None else f" with the label {label!r}"
        raise ValueError(f"found no state of skip_explosions or stabilize{of_label}")
    if len(found) > 1:
        raise ValueError(f"give label=, one of {sorted(found)}")
    (state,) = found.values()
    return state


def find_states(opt_state: Any) -> dict[str, Any]:
    """The states of optaxclip in any tree by their label; the error of equal labels."""
    found: dict[str, Any] = {}

    def visit(tree):
        for path, state in jax.tree.leaves_with_path(tree, is_leaf=_is_found):
            if not isinstance(state, (*STATES, dict)):
                continue
            # Some checkpoints give named tuples back as dictionaries, and the metrics
            # would be missing without a word.
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
            # A clip or a recorder may stand inside of what skips.
            visit(getattr(state, "inner_state", ()))

    visit(opt_state)
    return found


def _is_found(x: Any) -> bool:
    """Whether it is a state, or was one before a checkpoint made it a dictionary."""
    if isinstance(x, dict) and len(x) > 1:
        # Fields without arrays may be gone, so not all names have to be there.
        names = set(x)
        return any(set(s._fields) - EMPTY <= names <= set(s._fields) for s in STATES)
    return isinstance(x, STATES)


def params_of(params: Any) -> Any:
    """The parameters, also of a training state that holds them."""
    # As that of Flax, by its fields: the library does not import Flax.
    is_train_state = hasattr(params, "params") and hasattr(params, "opt_state")
    return params.params if is_train_state else params


def check_one_run(label: str, state: Any) -> None:
    """Raises the error of a state with a record, of several runs."""
    runs = state.record.runs
    if runs:
        raise ValueError(
            f"{label!r} holds runs {list(runs)}, and this reads one run: "
            "give jax.tree.map(lambda x: x[i], opt_state)"
        )
