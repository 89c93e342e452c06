"""Arithmetic inside the range of floats, and saturating counters. Internal."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer


def is_gradient(leaf: Any) -> bool:
    """Whether a leaf is measured and clipped; all others pass through untouched."""
    if not hasattr(leaf, "dtype"):  # a Python number, a function, a name
        return isinstance(leaf, float | complex)
    return jnp.issubdtype(leaf.dtype, jnp.inexact) and math.prod(np.shape(leaf)) > 0


def accumulator(leaves: list) -> np.dtype:
    """The dtype in which leaves are measured: float32, or float64 if one of them is."""
    dtypes = {jnp.result_type(x) for x in leaves if is_gradient(x)}
    is_wide = dtypes & {np.dtype(np.float64), np.dtype(np.complex128)}
    return np.dtype(np.float64 if is_wide else np.float32)


def promote(*dtypes: Any) -> np.dtype:
    """The dtype that holds them all, also where a user forbids implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def widen(x: jax.Array, dtype: Any) -> jax.Array:
    """Casts to a real dtype, or to the complex dtype made of it."""
    if is_complex(x):
        dtype = {np.dtype("float32"): np.complex64}.get(dtype, np.complex128)
    return x.astype(dtype)


def where(condition: Any, x: Any, y: Any) -> jax.Array:
    """`jnp.where` whose numbers take the condition's sharding.

    On a mesh with explicit axes `jnp.where` refuses a number beside a sharded array.
    """
    dtype = jnp.result_type(x, y)

    def placed(value):
        if np.ndim(value):
            return value
        if not np.ndim(condition):
            return jnp.asarray(value, dtype)
        if not isinstance(value, Tracer):
            return jnp.full_like(condition, value, dtype)
        # An older JAX's `full_like` refuses what differs between devices already.
        return jnp.ones_like(condition, dtype) * value

    return jnp.where(condition, placed(x), placed(y))


def scale(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies by a real factor: a complex one would turn inf into NaN."""
    if is_complex(x):
        return lax.complex(x.real * factor, x.imag * factor)
    return x * factor


def divide(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """Divides by a real divisor, also where its reciprocal would be subnormal.

    XLA divides by multiplying with the reciprocal.
    """
    # 2**64 keeps the reciprocal of every finite divisor a normal number.
    is_large = divisor > jnp.finfo(divisor.dtype).max / 2.0**32
    shrink = where(is_large, 2.0**-64, jnp.ones_like(divisor))
    x, divisor = scale(x, shrink), divisor * shrink
    if is_complex(x):
        return lax.complex(x.real / divisor, x.imag / divisor)
    return x / divisor


def saturating_cast(norm: jax.Array, dtype: Any) -> jax.Array:
    """Casts to another dtype; a finite norm stays finite."""
    if norm.dtype == dtype:
        return norm
    if jnp.finfo(dtype).max >= jnp.finfo(norm.dtype).max:  # nothing is too large
        return norm.astype(dtype)
    # Compared in the wider dtype: after the cast the norm would be inf already.
    largest = jnp.finfo(dtype).max.astype(norm.dtype)
    saturated = where(jnp.isfinite(norm), jnp.minimum(norm, largest), norm)
    return saturated.astype(dtype)


def without_nan(norm: jax.Array) -> jax.Array:
    """+inf in place of NaN: a state that holds no NaN adds up to none."""
    return where(jnp.isnan(norm), jnp.inf, norm)


def safe_unit(largest: jax.Array) -> jax.Array:
    """What to divide norms by: XLA multiplies with 1 / x, which must not underflow."""
    # 4 is the least power of two: 4 / max is just above the smallest normal number.
    return jnp.minimum(largest, jnp.finfo(largest.dtype).max / 4)


def safe_log(norms: jax.Array) -> jax.Array:
    """The logarithm; of 0 that of the smallest normal number, which is finite."""
    return jnp.log(jnp.maximum(norms, jnp.finfo(norms.dtype).tiny))


def normalize_norms(norms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(norms / total, total) for the root of the sum of the norms' squares.

    Both without the norms that are non-finite, whose shares are 0.
    """
    finite = jnp.where(norms < jnp.inf, norms, 0)  # NaN is not
    # Squares of ratios to the largest norm neither overflow nor underflow.
    unit = safe_unit(jnp.max(finite, initial=0))
    ratios = finite / jnp.where(unit > 0, unit, 1)
    squares = jnp.sum(jnp.square(ratios))
    root = jnp.sqrt(jnp.where(unit > 0, squares, 1))
    return ratios / root, unit * root


def root_sum_squares(norms: jax.Array) -> jax.Array:
    """The root of the sum of the norms' squares; inf or NaN where one of them is."""
    total = jnp.minimum(normalize_norms(norms)[1], jnp.finfo(norms.dtype).max)
    return jnp.where(jnp.all(norms < jnp.inf), total, jnp.sum(norms))


def root_mean_square(
    first: jax.Array, second: jax.Array, share: jax.Array
) -> jax.Array:
    """`sqrt((1 - share) * first**2 + share * second**2)`; the squares may overflow."""
    unit = safe_unit(jnp.maximum(first, second))
    unit = jnp.where(unit > 0, unit, 1)
    first, second = jnp.square(first / unit), jnp.square(second / unit)
    mean = first + share * (second - first)
    return jnp.where(mean > 0, unit * jnp.sqrt(jnp.where(mean > 0, mean, 1)), 0)


def is_complex(x: jax.Array) -> bool:
    """Whether an array is complex."""
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def next_count(count):
    """One more; stays at the largest integer."""
    return jnp.asarray(optax.safe_increment(count))


def increment(total, when):
    """One more where `when` is True; stays at the largest integer."""
    return where(when, next_count(total), total)


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """The sum, also of two dtypes where a user forbids implicit promotion."""
    dtype = promote(x.dtype, y.dtype)
    return x.astype(dtype) + y.astype(dtype)
