"""The flight recorder: the norm of every leaf in the last steps, kept on the device.

`record` passes updates through. It keeps the norm of every leaf in the last 256 steps,
and the loss, in the state of the optimizer. That works inside `jit`, `vmap` and
`lax.scan`, and a checkpoint holds the record as well. On a large model it costs next to
nothing, because a clip needs the norms anyway. `detect_explosions`, `skip_explosions`
and `stabilize` have a recorder of their own.

```python
>>> import jax, jax.numpy as jnp, optax, optaxclip
>>> tx = optax.chain(
...     optaxclip.record("before"), optaxclip.clip_by_norm(1.0), optax.sgd(0.1),
...     optaxclip.record("updates"),
... )
>>> params = {"w": jnp.ones(2), "b": jnp.ones(1)}
>>> opt_state, update = tx.init(params), jax.jit(tx.update)
>>> for size in [0.5, 1.0, 8.0]:
...     grads = {"w": jnp.array([size, 0.0]), "b": jnp.zeros(1)}
...     updates, opt_state = update(grads, opt_state, params, value=jnp.array(1.0))
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
* Numbers of your own, `columns=`, such as the index of the batch.
* `window=` sets the number of steps, 256 by default.
* The state takes a little more than `4 * window * (num_scopes + 6 + 2 * num_columns)`
  bytes. That is 6 KiB and 1 KiB a leaf by default. With `top=k`, `2 * k + 1` stands in
  place of `num_scopes`.

## Thousands of experts

An array `[layers, experts, in, out]` with 48 layers of 384 experts has 18,432 norms,
and a record of all of them takes 19 MB. With `top=10` the record keeps the ten largest
of each step and their scopes, in 28 KB. It also keeps the norm of all other scopes
together, so the norm of all updates stays exact. Vanished leaves are then not reported.

```python
>>> recorder = optaxclip.record(top=2, stacked=lambda name: 2 * (name == "experts"))
>>> model = {"experts": jnp.ones((2, 3, 4, 4)), "router": jnp.ones(3)}
>>> grads = {"experts": model["experts"].at[1, 2].set(9.0), "router": jnp.ones(3)}
>>> _, opt_state = jax.jit(recorder.update)(grads, recorder.init(model))
>>> kept = optaxclip.history(opt_state, model)
>>> print(kept.names, kept.norms[0].round(2))
['top/1', 'top/2', 'rest'] [36.    4.    8.19]
>>> print(kept.ranked[0], optaxclip.metrics(opt_state)["gradients/top/1/index"])
['experts[1, 2]' 'experts[0, 0]'] 5

```

## Which batch was it?

Every recorder can keep numbers of your own: `columns=` names them once, and every
`update` gives them as `tag=`. `history` reads them, `plot` shows them, and `explain`
prints them beside each step that it names.

```python
>>> tx = optaxclip.detect_explosions(columns=("batch", "learning_rate"))
>>> opt_state, update = tx.init(params), jax.jit(tx.update)
>>> for batch, size in [(38210, 1.0), (38211, 1.1), (38212, jnp.nan)]:
...     grads, tag = {"w": jnp.full(2, size), "b": jnp.zeros(1)}, {"batch": batch}
...     tag |= {"learning_rate": 0.1}
...     _, opt_state = update(grads, opt_state, value=jnp.array(1.0), tag=tag)
>>> print(optaxclip.history(opt_state).tags["batch"])
[38210. 38211. 38212.]
>>> print(optaxclip.explain(opt_state, params).split(". ")[1])
Step 2, batch 38212, learning_rate 0.1, was non-finite: leaf 'w' held inf or NaN.

```

A whole number is kept exactly if it has at most 32 bits, or is at most 2**48. Any other
number is kept as a float32.

## Who reads it

`metrics` reads the last step, `history` all steps that are kept, `explain` describes
them, and `plot` draws them; see `help(optaxclip.reporting)`. Nothing is read on the
host until one of them is called. `examples/scan_training.py` explodes on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optaxclip.checks import (
    check_by_name,
    check_label,
    check_leaves,
    check_length,
    own_state,
    value_of,
)
from optaxclip.extras import check_columns, loss_of, parts_of_tag
from optaxclip.norms.measuring import measure, measure_leaves
from optaxclip.norms.names import Per, Stacked, layout_of
from optaxclip.norms.scopes import Scopes, check_per, find_scopes
from optaxclip.numerics import increment, next_count, root_sum_squares
from optaxclip.ring import COUNTS, append, empty
from optaxclip.ring import RecordState as RecordState

WINDOW = 256
"""Number of steps that a recorder keeps: 1 KiB a leaf.

A choice: the longest memory of the default rules, 128 steps, twice."""


def record(
    label: str = "gradients",
    *,
    window: int = WINDOW,
    per: Per = "leaf",
    specs: Any = None,
    stacked: Stacked | None = None,
    columns: Sequence[str] = (),
    top: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Passes updates through, and keeps the norms of the last steps on the device.

    Also the loss, where the training loop gives it: `update(grads, state, params,
    value=loss)`. `metrics` reads the last step, `history` all that are kept, `explain`
    describes them and `plot` draws them. Inf and NaN are kept as they are.

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
      columns: A common argument, see `help(optaxclip)`.
      top: Of each step, how many of the largest norms are kept, with their scopes and
        the norm of all others together. All are kept by default, and if there are no
        more scopes than that.

    Returns:
      The transformation, with the state `{label: RecordState}`: `4 * window *
      (num_scopes + 6 + 2 * num_columns)` bytes and a few; with `top`, `2 * top + 1`
      in place of `num_scopes`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(
      ...     optaxclip.record("before"), optaxclip.clip_by_norm(1.0),
      ...     optaxclip.record("after"), optax.sgd(0.1),
      ... )
      >>> params = {"w": jnp.ones(2)}
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for size in [0.5, 3.0]:
      ...     updates, state = update({"w": jnp.array([size, 0.0])}, state, params)
      >>> for label in ["before", "after"]:
      ...     print(optaxclip.history(state, params, label=label).norm.round(3))
      [0.5 3. ]
      [0.5 1. ]
    """
    check_label(label)
    check_by_name(stacked=stacked)
    window = check_length("window", window, 1)
    own = check_columns(columns)
    top = top if top is None else check_length("top", top, 1)
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
        counts = jnp.zeros(len(COUNTS.names), jnp.int32)
        layout = layout_of(params, per, stacked)
        return {label: empty(norms.size, window, counts, layout, own, top)}

    def update(updates, state, params=None, **extra_args):
        before, value = own_state(state, label, RecordState), value_of(extra_args)
        norms, norm = _measure(updates, scopes_of(updates))
        check_leaves([(before.num_scopes,)], [norms.shape], updates, params)
        loss = loss_of(value, norm.dtype)
        is_finite = norm < jnp.inf
        if value is not None:
            is_finite &= jnp.isfinite(loss)
        counts = {
            "steps": next_count(before.num_steps),
            "nonfinite": increment(before.num_nonfinite, ~is_finite),
        }
        # A row like a detector's, so that all readers know one kind of row.
        none = jnp.full_like(norm, jnp.inf)
        columns = {"loss": loss, "loss_limit": none, "limit": none, "fired": ~is_finite}
        tag = parts_of_tag(before.columns, extra_args)
        return updates, {
            label: append(before, columns, tag, norms, norm, COUNTS.pack(counts))
        }

    return optax.GradientTransformationExtraArgs(init, update)


def _measure(tree: Any, scopes: Scopes) -> tuple[jax.Array, jax.Array]:
    """Norms `[num_scopes]`, and of all updates together."""
    if scopes.kind == "leaf":
        # One unit for all leaves: a leaf that is zero then costs no second read.
        return measure_leaves(tree, scopes)
    norms, _ = measure(tree, scopes, 2)
    # A derivative of a record means nothing, and costs a pass.
    norms = lax.stop_gradient(norms)
    if scopes.kind == "tree":
        return norms[None], norms
    return norms, root_sum_squares(norms)
