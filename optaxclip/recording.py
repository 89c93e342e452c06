"""The flight recorder: the norm of every leaf in the last steps, kept on the device.

`record` passes updates through and keeps the norm of every leaf of the last 256 steps,
and the loss, in the state of the optimizer. That works inside `jit`, `vmap` and
`lax.scan`, and a checkpoint holds the records as well. On a large model it costs next
to nothing, since a clip needs the norms anyway. `detect_explosions`, `skip_explosions`
and `stabilize` have a recorder of their own.

```python
>>> import jax.numpy as jnp, optax, optaxclip
>>> tx = optax.chain(
...     optaxclip.record("before"), optaxclip.clip_by_norm(1.0), optax.sgd(0.1),
...     optaxclip.record("updates"),
... )
>>> params = {"w": jnp.ones(2), "b": jnp.ones(1)}
>>> opt_state = tx.init(params)
>>> for size in [0.5, 1.0, 8.0]:
...     grads = {"w": jnp.array([size, 0.0]), "b": jnp.zeros(1)}
...     updates, opt_state = tx.update(grads, opt_state, params, value=jnp.array(1.0))
>>> kept = optaxclip.history(opt_state, params, label="before")
>>> print(kept.step, kept.norm, kept.names, kept.norms[:, 1])
[0 1 2] [0.5 1.  8. ] ['b', 'w'] [0.5 1.  8. ]
>>> metrics = optaxclip.metrics(opt_state, params)
>>> print(metrics["before/norm/w"], metrics["updates/ratio/w"].round(4))
8.0 0.0707

```

## Where to put it

| place in the chain | what it records |
|---|---|
| first | the gradients |
| behind a clip | the clipped gradients |
| last | the updates of the parameters |

Several recorders may stand in one chain, under different labels.

## What it keeps

* The norm of each leaf, or of each group with `per=`; not of each unit. Inf and NaN are
  kept as they are.
* The loss, where the training loop gives it as `value=loss`.
* `window=` sets the number of steps, 256 by default.
* The state takes `4 * window * (num_scopes + 6)` bytes and a few. That is 6 KiB and 1
  KiB a leaf by default.

## Who reads it

`metrics` reads the last step, `history` all steps that are kept, `explain` describes
them, and `plot` draws them; see `help(optaxclip.reporting)`. Nothing is read on the
host until one of them is called. `examples/scan_training.py` explodes on purpose.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip.checks import (
    check_label,
    check_leaves,
    check_length,
    is_real,
    own_state,
    value_of,
)
from optaxclip.norms.measuring import measure, measure_leaves
from optaxclip.norms.names import Layout, Per, Stacked, layout_of
from optaxclip.norms.scopes import Scopes, check_per, find_scopes
from optaxclip.numerics import increment, promote, root_sum_squares, saturating_cast

WINDOW = 256
"""Number of steps that a recorder keeps."""
COLUMNS = ("loss", "loss_limit", "limit", "largest", "fired", "leaf")
"""What a recorder keeps of a step besides the norms: the loss, `NO_LOSS` where not
given; the limits of the loss and of the norm of all updates, +inf for none; the largest
finite norm of all updates so far; as the bits of a whole number, which of the rules
(not finite, norm, share, loss) fired; and the leaf that led, -1 for none and in
`record`."""

NO_LOSS = -(2.0**96)
"""Stands for a loss that was not given. Not NaN, which `jax_debug_nans` refuses; and a
sum of 2**30 of them is still finite."""


class RecordState(NamedTuple):
    """State of `record`, as `{label: RecordState}`; `history` puts it in order.

    A ring: step `i` stands in row `i % window`.
    """

    rows: jax.Array
    """float32 `[window, 6 + num_scopes]`: the `COLUMNS` and the norm of each scope. One
    array, since every array of a state costs a small step some microseconds."""
    counts: jax.Array
    """int32 `[2]`: number of steps so far, and of those that were non-finite;
    `detect_explosions` appends what it counts."""
    layout: Layout
    """No arrays: what kind of scopes these are, and how `params` names them."""

    @property
    def norms(self) -> jax.Array:
        """`[window, num_scopes]`."""
        return self.rows[..., len(COLUMNS) :]

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
    def num_scopes(self) -> int:
        """Of how many scopes it keeps a norm."""
        return self.rows.shape[-1] - len(COLUMNS)


def record(
    label: str = "gradients",
    *,
    window: int = WINDOW,
    per: Per = "leaf",
    specs: Any = None,
    stacked: Stacked | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Passes updates through, and keeps the norms of the last steps on the device.

    Also the loss, where the training loop gives it: `update(grads, state, params,
    value=loss)`. `metrics` reads the last step, `history` all that are kept, `explain`
    tells of them and `plot` draws them. What is non-finite is kept as it is.

    Several recorders may stand in a chain, under different labels: before a clip, after
    it, after the optimizer. `detect_explosions`, `skip_explosions` and `stabilize` have
    one of their own, under their label.

    Args:
      label: Under which name the state and the metrics appear.
      window: Number of steps that are kept, at least 1.
      per: What one norm is taken over, as in `clip_by_norm`, but not "unit". Per leaf,
        elements under 1e-19 may count as 0 unless the norm of all is under 2e-10.
      specs: As in `clip_by_norm`; inside `jax.shard_map`, `value` must have been
        reduced over the devices.
      stacked: As in `clip_by_norm`.

    Returns:
      The transformation, with the state `{label: RecordState}`: `4 * window *
      (num_scopes + 6)` bytes and a few.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(
      ...     optaxclip.record("before"), optaxclip.clip_by_norm(1.0),
      ...     optaxclip.record("after"), optax.sgd(0.1),
      ... )
      >>> params = {"w": jnp.ones(2)}
      >>> state = tx.init(params)
      >>> for size in [0.5, 3.0]:
      ...     updates, state = tx.update({"w": jnp.array([size, 0.0])}, state, params)
      >>> for label in ["before", "after"]:
      ...     print(optaxclip.history(state, params, label=label).norm.round(3))
      [0.5 3. ]
      [0.5 1. ]
    """
    check_label(label)
    window = check_length("window", window, 1)
    check_per(per)
    # Units are too many for a record: as many numbers as a bias has, in every step.
    if per == "unit":
        raise ValueError(
            'record keeps one norm per tree, leaf or group, not per "unit"'
        )

    def scopes_of(tree):
        return find_scopes(tree, per, specs=specs, stacked=stacked)

    def init(params):
        norms, _ = jax.eval_shape(lambda: _measure(params, scopes_of(params)))
        counts = jnp.zeros([2], jnp.int32)
        layout = layout_of(params, per, stacked)
        return {label: empty(norms.size, window, counts, layout)}

    def update(updates, state, params=None, **extra_args):
        before, value = own_state(state, label, RecordState), value_of(extra_args)
        norms, norm = _measure(updates, scopes_of(updates))
        check_leaves([(before.num_scopes,)], [norms.shape], updates, params)
        loss = loss_of(value, norm.dtype)
        is_finite = norm < jnp.inf
        if value is not None:
            is_finite &= jnp.isfinite(loss)
        counts = increment(before.counts, jnp.stack([jnp.ones([], bool), ~is_finite]))
        # The row is that of a detector, so that all readers know one kind of row.
        none = jnp.full_like(norm, jnp.inf)
        columns = {"loss": loss, "loss_limit": none, "limit": none, "fired": ~is_finite}
        return updates, {label: append(before, columns, norms, norm, counts)}

    return optax.GradientTransformationExtraArgs(init, update)


def empty(
    num_scopes: int, window: int, counts: jax.Array, layout: Layout
) -> RecordState:
    """A state before the first step, without limits."""
    head = [jnp.inf if name.endswith("limit") else 0 for name in COLUMNS]
    row = jnp.asarray(head + [0] * num_scopes, jnp.float32)
    return RecordState(jnp.tile(row, (window, 1)), counts, layout)


def append(
    state: RecordState,
    columns: dict[str, jax.Array],
    norms: jax.Array,
    norm: jax.Array,
    counts: jax.Array,
) -> RecordState:
    """The state with one more step, in the place of the oldest.

    Args:
      state: The state before.
      columns: The `COLUMNS` but "largest", each `[]`; no "leaf" for none.
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
    head = jnp.stack([columns[name].astype(norms.dtype) for name in COLUMNS])
    row = saturating_cast(jnp.concatenate([head, norms]), jnp.float32)
    # One row in place. To shift the others would copy the record in each step.
    place = state.counts[0] % len(state.rows)
    rows = lax.dynamic_update_index_in_dim(state.rows, row, place, 0)
    return RecordState(rows=rows, counts=counts, layout=state.layout)


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
    return columns, rows[..., len(COLUMNS) :]


def loss_of(value: Any, dtype: Any) -> jax.Array:
    """The loss that a training loop gives, or `NO_LOSS`; the error of one with axes."""
    if value is None:
        return jnp.full([], NO_LOSS, dtype)
    value = jnp.asarray(value)
    if not is_real(value.dtype):
        raise TypeError(
            f"value= must be a real number, the loss, not of {value.dtype}: of a "
            "complex one give value=loss.real"
        )
    if value.ndim:
        raise ValueError(
            f"value= must be a single number, the loss, not of shape {value.shape}"
        )
    wide = value.astype(promote(value.dtype, jnp.float32))
    return saturating_cast(wide, dtype)


def _measure(tree: Any, scopes: Scopes) -> tuple[jax.Array, jax.Array]:
    """Norms `[num_scopes]`, and of all updates together."""
    if scopes.kind == "leaf":
        return measure_leaves(tree, scopes)
    norms, _ = measure(tree, scopes, 2)
    # A derivative of a record means nothing, and costs a pass.
    norms = lax.stop_gradient(norms)
    if scopes.kind == "tree":
        return norms[None], norms
    return norms, root_sum_squares(norms)
