"""The last values of a signal, as they came and in order, in one array. Internal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def empty_window(like: jax.Array, size: int) -> jax.Array:
    """A window `[..., size]` for each element of `like`; +inf for no value yet."""
    return jnp.full((*like.shape, size), jnp.inf, like.dtype)


def push(window: jax.Array, values: jax.Array) -> jax.Array:
    """The window without its oldest value, which is the first, and with a new one."""
    return jnp.concatenate([window[..., 1:], values[..., None]], axis=-1)


def empty_ordered_window(like: jax.Array, size: int) -> jax.Array:
    """Windows `[..., 2, 1 + size]`: the values as they came, and the same ascending.

    Before the first stands their number, before the others 0. One array, since every
    array of a state costs a small step some microseconds; and no `Packing`, from which
    to take the numbers apart and put them together would be loops of their own.
    """
    window = jnp.full((*like.shape, 2, 1 + size), jnp.inf, like.dtype)
    _, columns = _rows_and_columns(window)
    return jnp.where(columns > 0, window, 0)


def push_in_order(window: jax.Array, values: jax.Array) -> jax.Array:
    """As `push`, for ordered windows.

    Takes the oldest out of the order, and puts the new one between the last that is
    smaller and the first that is larger. To sort them in every step takes longer than
    all the rest of a small step; so does any formula that XLA cannot fuse into one
    loop, such as one with a concatenation.
    """
    size = window.shape[-1] - 1
    oldest, new = window[..., :1, 1:2], values[..., None, None]
    left, right = _shifted(window, -1, jnp.inf), _shifted(window, 1, 0)
    rows, columns = _rows_and_columns(window)
    recent = jnp.where(columns == size, new, left)
    recent = jnp.where(columns == 0, jnp.minimum(window + 1, size), recent)
    without = jnp.where(window < oldest, window, left)
    # To the left of the first stands no value: as if it were -inf, which is not kept,
    # since the sum of an array with +inf and -inf is NaN.
    right = jnp.where(columns == 1, -jnp.inf, right)
    right_of_without = jnp.where(right < oldest, right, window)
    ordered = jnp.maximum(right_of_without, jnp.minimum(new, without))
    ordered = jnp.where(columns == 0, 0, ordered)
    return jnp.where(rows == 0, recent, ordered)


def num_known(window: jax.Array) -> jax.Array:
    """int32: how many values an ordered window holds."""
    return window[..., 0, 0].astype(jnp.int32)


def largest_of(window: jax.Array, num: int) -> jax.Array:
    """The largest of the last `num` values of an ordered window; 0 if there is none."""
    values = window[..., 0, -num:]
    return jnp.max(jnp.where(values < jnp.inf, values, 0), axis=-1)


def smallest_of(window: jax.Array) -> jax.Array:
    """The smallest value of an ordered window; +inf if there is none."""
    return window[..., 1, 1]


def percentiles_of(
    window: jax.Array, percents: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where percentiles `[num]` of the values lie, as `numpy.percentile` has them.

    Returns:
      (low, high, share), each `[..., num]`: the percentile is `low + share * (high -
      low)`, between two neighbors in the order; +inf if there is no value.
    """
    ordered = window[..., 1, :]
    # In hundredths of a place, exact for percents without decimals.
    last = jnp.maximum(num_known(window) - 1, 0)[..., None]
    percents = jnp.expand_dims(percents, range(last.ndim - 1))
    hundredths = percents * last.astype(ordered.dtype)
    place = jnp.floor(hundredths / 100)
    share = (hundredths - 100 * place) / 100
    low = 1 + jnp.minimum(place.astype(jnp.int32), last)
    high = jnp.minimum(low + 1, 1 + last)
    low, high = (jnp.take_along_axis(ordered, x, axis=-1) for x in (low, high))
    return low, high, share


def _rows_and_columns(window: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, columns = (
        lax.broadcasted_iota(jnp.int32, window.shape, window.ndim - i) for i in (2, 1)
    )
    return rows, columns


def _shifted(values: jax.Array, by: int, fill: float) -> jax.Array:
    """Moves values along the last axis by 1 or -1."""
    none = [(0, 0, 0)] * (values.ndim - 1)
    return lax.pad(values, jnp.asarray(fill, values.dtype), [*none, (by, -by, 0)])
