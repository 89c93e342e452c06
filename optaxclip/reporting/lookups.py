"""Single questions of a training script: which steps were skipped, which leaf led."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from optaxclip.explosions.rules import RULES
from optaxclip.explosions.state import (
    COUNTS,
    NUM_ONSETS,
    NUM_SKIPPED,
    event_of,
)
from optaxclip.extras import Columns, named_tags, plain_number
from optaxclip.norms.names import scope_names
from optaxclip.reporting.states import (
    check_one_run,
    find_skipping,
    find_states,
    params_of,
)


def skipped_steps(opt_state: Any, *, label: str | None = None) -> list[Any]:
    """Lists the last 64 steps that were skipped, for the data loader, on the host.

    They stay known when their rows have left the record, and a checkpoint of
    `opt_state` holds them. A step that tried a snapshot was skipped, too; its batch
    is suspect only if its "rules" are not empty.

    Args:
      opt_state: Any tree with the state, as for `metrics`.
      label: That of the `skip_explosions` or `stabilize`; None where there is one.

    Returns:
      In time order, for each `{"step": its index from 0, <name>: its tag, ..., "rules":
      those that fired}`, as `json.dumps` takes it; the rules are "nonfinite", "norm",
      "share" and "loss". A tag that is non-finite is None. Of several runs, as
      `jax.vmap` stacks them, one such list for each.

    Raises:
      ValueError: If there is no such state in `opt_state`, or more than one and no
        label.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.skip_explosions(optax.sgd(0.1), columns=["batch"])
      >>> params = {"w": jnp.ones(1)}
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for batch, g in [(38211, 1.0), (38212, jnp.nan), (38213, 1.0)]:
      ...     grads, tag = {"w": jnp.array([g])}, {"batch": batch}
      ...     updates, state = update(grads, state, params, tag=tag)
      >>> print(optaxclip.skipped_steps(state))
      [{'step': 1, 'batch': 38212, 'rules': ['nonfinite']}]
    """
    state = find_skipping(opt_state, label)
    counts, events = jax.device_get((state.record.counts, state.explosions.events))
    return _of_runs(np.asarray(counts), np.asarray(events), state.record.columns)


def _of_runs(
    counts: np.ndarray, events: np.ndarray, columns: Columns | tuple[()]
) -> list[Any]:
    """As `skipped_steps`, of as many runs as there are axes before the usual ones."""
    if counts.ndim > 1:
        runs = zip(counts, events, strict=True)
        return [_of_runs(*run, columns) for run in runs]
    num_skipped = int(COUNTS.read(counts, "skipped"))
    order = np.arange(max(0, num_skipped - NUM_SKIPPED), num_skipped)
    skipped = jax.device_get(event_of(events[NUM_ONSETS + order % NUM_SKIPPED]))
    tags = named_tags(columns, skipped.tag)
    return [
        {"step": int(skipped.step[i])}
        | {name: _for_json(values[i]) for name, values in tags.items()}
        | {"rules": [RULES[rule] for rule in np.flatnonzero(skipped.fired[i])]}
        for i in range(len(order))
    ]


def _for_json(value: Any) -> int | float | None:
    # JSON has no number that is inf or NaN, though Python would write one.
    return plain_number(value) if math.isfinite(value) else None


def leading_leaf(
    opt_state: Any, params: Any, *, label: str | None = None
) -> str | None:
    """Names the leading leaf of the last explosion, when it began; on the host.

    That is the first leaf that was non-finite, or else the one that had grown most. Its
    index is `explosions/leading_leaf` in `metrics`, where a name cannot be a value.

    Args:
      opt_state: Any tree with the state, as for `metrics`; of one run.
      params: The parameters, a `TrainState`, or any tree of their structure: names the
        leaves.
      label: That of the `detect_explosions`, `skip_explosions` or `stabilize`; None
        where there is one.

    Returns:
      The name; None before any explosion, and where no leaf had grown.

    Raises:
      ValueError: If there is no such state in `opt_state`, or more than one and no
        label; if it holds several runs, or `params` does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.stabilize(optax.adam(1e-3))
      >>> params = {"rnn": {"hh": jnp.ones(2)}, "head": jnp.ones(2)}
      >>> state = tx.init(params)
      >>> print(optaxclip.leading_leaf(state, params))
      None
      >>> grads = {"rnn": {"hh": jnp.array([1.0, jnp.nan])}, "head": jnp.ones(2)}
      >>> updates, state = jax.jit(tx.update)(grads, state, params)
      >>> print(optaxclip.leading_leaf(state, params))
      rnn/hh
    """
    found = {
        name: state
        for name, state in find_states(opt_state).items()
        if state.has_rules and label in (None, name)
    }
    if not found:
        of_label = "" if label is None else f" with the label {label!r}"
        raise ValueError(
            "found no state of detect_explosions, skip_explosions or stabilize"
            f"{of_label}"
        )
    if len(found) > 1:
        raise ValueError(f"give label=, one of {sorted(found)}")
    ((label, state),) = found.items()
    check_one_run(label, state)
    record = state.record
    names = scope_names(record.layout, record.num_scopes, label, params_of(params))
    leaf = int(jax.device_get(state.detection).began.leaf)
    return names[leaf] if leaf >= 0 else None
