"""Brings an update to a limit: the one implementation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip.numerics import accumulator, divide, is_gradient, scale, where, widen


def fits_limit(norm, excess, limit):
    """Whether the true norm is finite and at most its limit.

    But for four roundings, so that what comes out of a clip fits: in the result itself,
    such room would show.
    """
    limit = limit.astype(norm.dtype)
    is_beyond = (excess > 1) & (limit < jnp.inf)
    room = limit * (1 + 4 * jnp.finfo(norm.dtype).eps)
    is_low = norm <= jnp.maximum(limit, room)  # the product may be flushed to 0
    return jnp.isfinite(norm) & is_low & ~is_beyond


# Both factors end in a division of scalars, which XLA computes once; a `where` at the
# end it would compute again for every element, in the loop that reads it.


def power_of_two(norm, limit):
    """The first of two factors: 1, unless limit / norm is too small for one float."""
    tiny = jnp.finfo(norm.dtype).tiny
    limit = limit.astype(norm.dtype)
    return 1 / where((limit > 0) & (limit < tiny * norm), 1 / tiny, 1)


def clip_factor(norm, excess, limit, fits, pre):
    """The second factor: limit / norm, 1 if it fits, 0 if one of the two is bad."""
    is_bad = ~jnp.isfinite(norm) | ~(limit > 0)
    limit = limit.astype(norm.dtype) / excess
    dividend = where(fits, 1, where(is_bad, 0, limit))
    return dividend / where(fits | is_bad, 1, norm * pre)


@jax.custom_jvp
def rescale(x, pre, post, norm, excess, limit):
    """Multiplies by pre * post, which is 1 or limit / (norm * excess)."""
    return scale(scale(x, pre), post)


@rescale.defjvp
def _rescale_jvp(primals, tangents):
    # By hand, in ratios: the derivative of 1 / norm leaves the range of floats early.
    x, pre, post, norm, excess, _ = primals
    d_x, _, _, d_norm, _, d_limit = tangents
    is_clipped = (pre < 1) | (post < 1)
    direction = divide(divide(x, where(norm > 0, norm, 1)), excess)
    direction = where(is_clipped & jnp.isfinite(norm), direction, 0)
    d_x = d_x - scale(direction, d_norm)
    d_out = scale(scale(d_x, pre), post) + scale(direction, d_limit.astype(norm.dtype))
    return rescale(*primals), d_out


def limit_updates(
    updates: Any, when: jax.Array, norm: jax.Array, limit: jax.Array
) -> Any:
    """The updates, where `when` with a norm of at most its limit."""
    is_large = when & ~(norm <= limit)
    # Zeros if the limit is bad, or the norm not known: beyond the largest float.
    is_good = (limit > 0) & (norm < jnp.finfo(norm.dtype).max)
    dividend = jnp.where(is_large, jnp.where(is_good, limit, 0), 1)
    factor = dividend / jnp.where(is_large, norm, 1)  # computed once, see `materialize`

    def limited(u):
        if not is_gradient(u):
            return u
        # The barrier is that of `clip_by_norm`.
        u = lax.optimization_barrier(jnp.asarray(u))
        dtype = accumulator([u])
        return scale(widen(u, dtype), factor.astype(dtype)).astype(u.dtype)

    return jax.tree.map(limited, updates)
