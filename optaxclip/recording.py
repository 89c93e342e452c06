"""The flight recorder: the last steps of a run, kept on the device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip.checks import check_label, check_length
from optaxclip.clipping import counted
from optaxclip.norms import measure, measure_leaves, saturating_cast, total_of
from optaxclip.scopes import (
    Layout,
    Per,
    Scopes,
    Stacked,
    check_per,
    find_scopes,
    layout_of,
)

WINDOW = 256
"""Number of steps that a recorder keeps."""


class RecordState(NamedTuple):
    """State of `record`, as `{label: RecordState}`; `history` puts it in order.

    The arrays of the window are rings: step `i` stands in row `i % window`.
    """

    norms: jax.Array
    """float32 `[window, num_scopes]`: the norm of each scope."""
    numbers: jax.Array
    """float32 `[window, 3]`: the loss, NaN where not given; the limit of the norm of
    all updates, +inf for none; and, as the bits of a whole number, which of the rules
    (not finite, norm, share, loss) fired."""
    largest: jax.Array
    """float32 `[]`: the largest finite norm of all updates so far."""
    counts: jax.Array
    """int32 `[2]`: number of steps so far, and of those that were not finite."""
    layout: Layout
    """No arrays: what kind of scopes these are, and how `params` names them."""


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
    tells of them and `plot` draws them. What is not finite is kept as it is.

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
      (num_scopes + 3)` bytes and a few.

    Raises:
      ValueError: If an argument is out of range, or in `update` if `value` has axes.
      TypeError: If an argument is of the wrong type.

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
    if per == "unit":
        raise ValueError(
            'record keeps one norm per tree, leaf or group, not per "unit"'
        )

    def scopes_of(tree):
        return find_scopes(tree, per, specs=specs, stacked=stacked)

    def init(params):
        norms, _ = jax.eval_shape(lambda: _measure(params, scopes_of(params)))
        return {label: empty(norms, window, layout_of(params, per, stacked))}

    def update(updates, state, params=None, **extra_args):
        del params
        norms, norm = _measure(updates, scopes_of(updates))
        loss = loss_of(extra_args.get("value"), norm.dtype)
        is_finite = norm < jnp.inf
        if extra_args.get("value") is not None:
            is_finite &= jnp.isfinite(loss)
        limit = jnp.full_like(norm, jnp.inf)
        new = pushed(state[label], norms, norm, loss, limit, ~is_finite[None])
        return updates, {label: new}

    return optax.GradientTransformationExtraArgs(init, update)


def empty(norms: Any, window: int, layout: Layout) -> RecordState:
    """A state before the first step, for norms of this shape."""
    return RecordState(
        norms=jnp.zeros((window, *norms.shape), jnp.float32),
        numbers=jnp.zeros((window, 3), jnp.float32),
        largest=jnp.zeros([], jnp.float32),
        counts=jnp.zeros([2], jnp.int32),
        layout=layout,
    )


def pushed(
    state: RecordState,
    norms: jax.Array,
    norm: jax.Array,
    loss: jax.Array,
    limit: jax.Array,
    fired: jax.Array,
) -> RecordState:
    """The state with one more step, in the place of the oldest.

    Args:
      state: The state before.
      norms: `[num_scopes]`.
      norm: Of all updates, `[]`.
      loss: `[]`.
      limit: Of that norm, `[]`.
      fired: bool: which rules did, "not finite" first.
    """
    window = len(state.norms)
    row = state.counts[0] % window
    bits = jnp.sum(jnp.where(fired, 2.0 ** np.arange(len(fired)), 0))
    numbers = jnp.stack([saturating_cast(x, jnp.float32) for x in (loss, limit)])
    norm = saturating_cast(norm, jnp.float32)
    is_larger = (norm > state.largest) & (norm < jnp.inf)
    return RecordState(
        norms=lax.dynamic_update_index_in_dim(
            state.norms, saturating_cast(norms, jnp.float32), row, 0
        ),
        numbers=lax.dynamic_update_index_in_dim(
            state.numbers, jnp.append(numbers, bits.astype(jnp.float32)), row, 0
        ),
        largest=jnp.where(is_larger, norm, state.largest),
        counts=counted(state.counts, jnp.stack([jnp.ones([], bool), fired[0]])),
        layout=state.layout,
    )


def loss_of(value: Any, dtype: Any) -> jax.Array:
    """The loss that a training loop gives, NaN for none; the error of one with axes."""
    if value is None:
        return jnp.full([], jnp.nan, dtype)
    value = jnp.asarray(value)
    if value.ndim:
        raise ValueError(
            f"value= must be a single number, the loss, not of shape {value.shape}"
        )
    wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    return saturating_cast(wide, dtype)


def _measure(tree: Any, scopes: Scopes) -> tuple[jax.Array, jax.Array]:
    """Norms `[num_scopes]`, and of all updates together."""
    if scopes.kind == "leaf":
        return measure_leaves(tree, scopes)
    norms, _ = measure(tree, scopes, 2)
    norms = lax.stop_gradient(norms)
    if scopes.kind == "tree":
        return norms[None], norms
    return norms, total_of(norms)
