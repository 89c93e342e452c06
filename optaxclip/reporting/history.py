"""Reads the steps that a recorder kept, as NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip.explosions.rules import MAX_GAP, RULES
from optaxclip.extras import NO_LOSS, named_tags, plain_number
from optaxclip.norms.names import scope_names
from optaxclip.numerics import root_sum_squares
from optaxclip.packing import flags_of
from optaxclip.reporting.states import (
    check_one_run,
    find_recorders,
    params_of,
)
from optaxclip.ring import rows_of, scopes_of_ranks, tags_of


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
    """bool `[num_steps, 4]`: whether the step was non-finite, and whether norm, share
    and loss exceeded their limits, which `record` does not judge."""
    leaf: np.ndarray
    """int `[num_steps]`: the index in `names` of the leading leaf: the first that was
    non-finite, or else the one that had grown most, on average since 1, 9, 17, ... 57
    steps before; -1 if none had, and in `record`."""
    norms: np.ndarray
    """float32 `[num_steps, num_scopes]`: the norm of each scope. Of `record(top=k)`
    `[num_steps, k + 1]`: the largest k, and the norm of all other scopes together."""
    names: list[str]
    """The name of each scope, or its number. With `top=k`, the ranks: "top/1"
    to "top/k", and "rest"."""
    tags: Mapping[str, np.ndarray] = MappingProxyType({})
    """Of each name in `columns=`, float64 `[num_steps]`: what was given as `tag=`.
    Whole numbers are exact up to 2**48, all others were kept as a float32."""
    ranked: np.ndarray | None = None
    """With `top=k`, str `[num_steps, k]`: the scopes that have the ranks, by name or
    number; else None."""

    def scope_name(self, row: int, scope: int) -> str:
        """The name of a scope, or of the one that has the rank in that row."""
        if self.ranked is None or scope >= self.ranked.shape[1]:
            return self.names[scope]
        return str(self.ranked[row, scope])

    def step_name(self, row: int) -> str:
        """The step in a row and its tags: "605, batch 38212"."""
        return step_name(
            self.step[row], {name: x[row] for name, x in self.tags.items()}
        )

    @property
    def began(self) -> int | None:
        """The row on which the last explosion began, of those kept; None for none."""
        found = explosions_of(self)
        return found[-1][0] if found else None

    def columns(self) -> dict[str, np.ndarray]:
        """One column for each number of a step, as `pandas.DataFrame` takes them.

        Returns:
          `{name: [num_steps]}`: "step", the user's own columns, "loss", "loss_limit",
          "norm", "limit", the rules "nonfinite", "norm_exploded", "share_exploded" and
          "loss_exploded", and "norm/<scope>"; with `top=k` also "scope/<rank>".
        """
        fired = ["nonfinite", *(f"{rule}_exploded" for rule in RULES[1:])]
        found = (
            {"step": self.step}
            | dict(self.tags)
            | {
                "loss": self.loss,
                "loss_limit": self.loss_limit,
                "norm": self.norm,
                "limit": self.limit,
            }
            | dict(zip(fired, self.fired.T, strict=True))
            | by_name({"norm": self.norms.T}, self.names)
        )
        if self.ranked is not None:
            found |= by_name({"scope": self.ranked.T}, self.names[:-1])
        return found


def step_name(step: Any, tags: dict[str, Any]) -> str:
    """A step and its tags: "605, batch 38212"."""
    shown = [f"{name} {_shown(x)}" for name, x in tags.items()]
    return ", ".join([str(int(step)), *shown])


def _shown(value: Any) -> str:
    """A whole number in full, any other in six digits."""
    number = plain_number(value)
    return str(number) if isinstance(number, int) else f"{number:.6g}"


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
    state = recorders[label].record
    state = jax.device_get(state)
    window, num_steps = len(state.rows), int(state.num_steps)
    step = np.arange(max(0, num_steps - window), num_steps)
    columns, norms = rows_of(state, step)
    names = scope_names(state.layout, state.num_scopes, label, params_of(params))
    ranked = None
    if state.num_ranks:
        ranked = np.array(names)[scopes_of_ranks(state, step)]
        names = [f"top/{rank + 1}" for rank in range(state.num_ranks)] + ["rest"]
    return History(
        step=step,
        loss=np.where(columns["loss"] == NO_LOSS, np.float32(np.nan), columns["loss"]),
        loss_limit=columns["loss_limit"],
        norm=np.asarray(totals_of(norms)),
        limit=columns["limit"],
        fired=flags_of(columns["fired"].astype(int), len(RULES)),
        leaf=columns["leaf"].astype(int),
        norms=norms,
        names=names,
        tags=named_tags(state.columns, tags_of(state, step)),
        ranked=ranked,
    )


# Jitted on their own, for `history` and `explain`, which would else start a dozen small
# programs.
@jax.jit
def totals_of(norms: Any) -> jax.Array:
    """The norm of all updates on each step, `[num_steps]`."""
    return jax.vmap(root_sum_squares)(jnp.asarray(norms))


def by_name(columns: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """`{"column/name": value}` of columns that hold one value for each name."""
    return {
        f"{column}/{name}": value
        for column, values in columns.items()
        for name, value in zip(names, values, strict=True)
    }
