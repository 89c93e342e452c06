"""The rows of the last steps, one for each, that a recorder keeps. Internal."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.extras import Columns, marked, num_parts, unmarked
from optaxclip.norms.names import AnyTree, Layout
from optaxclip.numerics import root_sum_squares, saturating_cast
from optaxclip.packing import Packing

COLUMNS = Packing(floats=("loss", "loss_limit", "limit", "largest", "fired", "leaf"))
"""What a recorder keeps of a step besides the norms: the loss, `NO_LOSS` where not
given; the limits of the loss and of the norm of all updates, +inf for none; the largest
finite norm of all updates so far; as the bits of a whole number, which of the rules
(not finite, norm, share, loss) fired; and the leaf that led, -1 for none and in
`record`."""

COUNTS = Packing(ints=("steps", "nonfinite"))
"""How `RecordState.counts` is packed, and how the counts of a detector begin."""


# As a layout: static. A number of scopes would be an array of the state.
@jax.tree_util.register_static
class Top(NamedTuple):
    """That a recorder keeps the largest norms alone."""

    num: int
    """How many of them."""
    num_scopes: Any
    """Of how many scopes."""


class RecordState(NamedTuple):
    """State of `record`, as `{label: RecordState}`; `history` puts it in order.

    A ring: step `i` stands in row `i % window`.
    """

    rows: jax.Array
    """float32 `[window, 6 + 2 * num_columns + num_scopes]`: the `COLUMNS`, two parts of
    each number of the user's own, and the norm of each scope. Of the `top` largest: the
    scope of each rank, the norm of each, and that of all other scopes together. NaN and
    -inf are marked, see `extras.marked`; `rows_of` gives them back. One array, since
    every array of a state costs a small step some microseconds."""
    counts: jax.Array
    """int32 `[2]`: number of steps so far, and of those that were non-finite;
    `detect_explosions` appends what it counts. `num_steps` and `num_nonfinite` read
    it."""
    layout: Layout
    """No arrays: what kind of scopes these are, and how `params` names them."""
    columns: Columns | tuple[()] = ()
    """No arrays: the names of the user's own numbers, () for none."""
    top: Top | tuple[()] = ()
    """No arrays: () where the norm of every scope is kept."""

    # What kind of a state it is, for those that read all kinds.
    has_record = True
    has_rules = False
    is_skipping = False

    @property
    def num_steps(self) -> jax.Array:
        """int32 `[]`: the number of steps so far."""
        return COUNTS.read(self.counts, "steps")

    @property
    def num_nonfinite(self) -> jax.Array:
        """int32 `[]`: how many of them were non-finite."""
        return COUNTS.read(self.counts, "nonfinite")

    @property
    def norms(self) -> jax.Array:
        """`[window, num_norms]`; the root of their sum of squares is that of all."""
        return unmarked(self.rows[..., self.num_others :])

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
        return len(COLUMNS.names) + num_parts(self.columns) + self.num_ranks

    @property
    def num_ranks(self) -> int:
        """How many of the largest norms it keeps; 0 if it keeps all."""
        return _num_ranks(self.top)

    @property
    def num_scopes(self) -> int:
        """How many scopes there are."""
        if isinstance(self.top, Top) and self.num_ranks:
            return self.top.num_scopes
        return self.rows.shape[-1] - self.num_others


def empty(
    num_scopes: int,
    window: int,
    counts: jax.Array,
    layout: Layout,
    own: Columns | tuple[()],
    top: int | None = None,
) -> RecordState:
    """A state before the first step, without limits."""
    # Without leaves, as `optax.tree_map_params` makes one, it fits every other.
    kept = () if top is None else Top(top, num_scopes or AnyTree())
    num_norms = 2 * _num_ranks(kept) + 1 if _num_ranks(kept) else num_scopes
    head = [jnp.inf if name.endswith("limit") else 0 for name in COLUMNS.names]
    row = jnp.asarray(head + [0] * (num_parts(own) + num_norms), jnp.float32)
    return RecordState(jnp.tile(row, (window, 1)), counts, layout, own, kept)


def _num_ranks(top: Top | tuple[()]) -> int:
    """Of no more scopes than that, all are kept."""
    if not isinstance(top, Top) or not isinstance(top.num_scopes, int):
        return 0
    return top.num if top.num < top.num_scopes else 0


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
    before, _ = rows_of(state, state.num_steps - 1)
    narrow = saturating_cast(norm, jnp.float32)
    is_larger = (narrow > before["largest"]) & (narrow < jnp.inf)
    columns = {"leaf": jnp.full([], -1), **columns}
    columns["largest"] = jnp.where(is_larger, narrow, before["largest"])
    if state.num_ranks:
        norms = _largest(norms, state.num_ranks)
    head = COLUMNS.pack(columns, tag)
    row = marked(jnp.concatenate([head, saturating_cast(norms, jnp.float32)]))
    # One row in place. To shift the others would copy the record in each step.
    place = state.num_steps % len(state.rows)
    rows = lax.dynamic_update_index_in_dim(state.rows, row, place, 0)
    return state._replace(rows=rows, counts=counts)


def scopes_of_ranks(state: RecordState, steps: Any) -> Any:
    """The scopes of the norms that are kept, the largest first: int `[..., top]`."""
    rows = state.rows[steps % len(state.rows)]
    first = state.num_others - state.num_ranks
    return rows[..., first : state.num_others].astype(jnp.int32)


def largest_scopes(norms: jax.Array, num: int) -> jax.Array:
    """Those of the largest norms, in their order: int `[num]`.

    What is non-finite is larger than all, and NaN too.
    """
    return lax.top_k(jnp.where(norms < jnp.inf, norms, jnp.inf), num)[1]


def _largest(norms: jax.Array, num: int) -> jax.Array:
    """The scopes of the largest norms, these norms, and that of the rest together."""
    scopes = largest_scopes(norms, num)
    rest = root_sum_squares(norms.at[scopes].set(0))
    # As one array: of scopes that are taken apart XLA sorts all norms.
    return jnp.concatenate([scopes.astype(norms.dtype), norms[scopes], rest[None]])


def tags_of(state: RecordState, steps: Any) -> Any:
    """The parts of the user's own numbers: `[..., 2 * num_columns]`."""
    rows = _unmarked_rows(state, steps)
    return rows[..., len(COLUMNS.names) : state.num_others - state.num_ranks]


def rows_of(state: RecordState, steps: Any) -> tuple[dict[str, Any], Any]:
    """Each of the `COLUMNS` by its name, and the norms, of steps that are kept.

    Args:
      state: The state.
      steps: int `[...]`: their indices; of one below 0 all norms are 0.

    Returns:
      (`{name: [...]}`, `[..., num_norms]`).
    """
    rows = _unmarked_rows(state, steps)
    return COLUMNS.unpack(rows), rows[..., state.num_others :]


def _unmarked_rows(state: RecordState, steps: Any) -> Any:
    return unmarked(state.rows[steps % len(state.rows)])
