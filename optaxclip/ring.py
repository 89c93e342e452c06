"""The rows of the last steps, one for each, that a recorder keeps. Internal."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.extras import Columns, num_parts
from optaxclip.norms.names import Layout
from optaxclip.numerics import saturating_cast

COLUMNS = ("loss", "loss_limit", "limit", "largest", "fired", "leaf")
"""What a recorder keeps of a step besides the norms: the loss, `NO_LOSS` where not
given; the limits of the loss and of the norm of all updates, +inf for none; the largest
finite norm of all updates so far; as the bits of a whole number, which of the rules
(not finite, norm, share, loss) fired; and the leaf that led, -1 for none and in
`record`."""


class RecordState(NamedTuple):
    """State of `record`, as `{label: RecordState}`; `history` puts it in order.

    A ring: step `i` stands in row `i % window`.
    """

    rows: jax.Array
    """float32 `[window, 6 + 2 * num_columns + num_scopes]`: the `COLUMNS`, two parts of
    each number of the user's own, and the norm of each scope. One array, since every
    array of a state costs a small step some microseconds."""
    counts: jax.Array
    """int32 `[2]`: number of steps so far, and of those that were non-finite;
    `detect_explosions` appends what it counts."""
    layout: Layout
    """No arrays: what kind of scopes these are, and how `params` names them."""
    columns: Columns | tuple[()] = ()
    """No arrays: the names of the user's own numbers, () for none."""

    @property
    def norms(self) -> jax.Array:
        """`[window, num_scopes]`."""
        return self.rows[..., self.num_others :]

    @property
    def record(self) -> RecordState:
        """Itself, as `record` of what holds one."""
        return self

    @property
    def runs(self) -> tuple[int, ...]:
        """The axes of several runs, as `jax.vmap` stacks them; () for one."""
        return np.shape(self.counts)[:-1]

    @property
    def read_by_metrics(self) -> RecordState:
        """The state without what `metrics` does not read."""
        return self

    @property
    def num_others(self) -> int:
        """What stands in a row before the norms."""
        return len(COLUMNS) + num_parts(self.columns)

    @property
    def num_scopes(self) -> int:
        """Of how many scopes it keeps a norm."""
        return self.rows.shape[-1] - self.num_others


def empty(
    num_scopes: int,
    window: int,
    counts: jax.Array,
    layout: Layout,
    own: Columns | tuple[()],
) -> RecordState:
    """A state before the first step, without limits."""
    head = [jnp.inf if name.endswith("limit") else 0 for name in COLUMNS]
    row = jnp.asarray(head + [0] * (num_parts(own) + num_scopes), jnp.float32)
    return RecordState(jnp.tile(row, (window, 1)), counts, layout, own)


def append(
    state: RecordState,
    columns: dict[str, jax.Array],
    tag: list[jax.Array],
    norms: jax.Array,
    norm: jax.Array,
    counts: jax.Array,
) -> RecordState:
    """The state with one more step, in the place of the oldest.

    Args:
      state: The state before.
      columns: The `COLUMNS` but "largest", each `[]`; no "leaf" for none.
      tag: As `parts_of_tag` gives it.
      norms: `[num_scopes]`.
      norm: Of all updates, `[]`.
      counts: The next `counts`.
    """
    # Before the first step this is the last row, which is empty: its largest is 0.
    before, _ = rows_of(state, state.counts[0] - 1)
    narrow = saturating_cast(norm, jnp.float32)
    is_larger = (narrow > before["largest"]) & (narrow < jnp.inf)
    columns = {"leaf": jnp.full([], -1), **columns}
    columns["largest"] = jnp.where(is_larger, narrow, before["largest"])
    head = [*(columns[name] for name in COLUMNS), *tag]
    head = jnp.stack([x.astype(norms.dtype) for x in head])
    row = saturating_cast(jnp.concatenate([head, norms]), jnp.float32)
    # One row in place. To shift the others would copy the record in each step.
    place = state.counts[0] % len(state.rows)
    rows = lax.dynamic_update_index_in_dim(state.rows, row, place, 0)
    return state._replace(rows=rows, counts=counts)


def rows_of(state: RecordState, steps: Any) -> tuple[dict[str, Any], Any]:
    """Each of the `COLUMNS` by its name, and the norms, of steps that are kept.

    Args:
      state: The state.
      steps: int `[...]`: their indices; of one below 0 all norms are 0.

    Returns:
      (`{name: [...]}`, `[..., num_scopes]`).
    """
    rows = state.rows[steps % len(state.rows)]
    columns = {name: rows[..., i] for i, name in enumerate(COLUMNS)}
    return columns, rows[..., state.num_others :]
