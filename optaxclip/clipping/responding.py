"""Which norm a scope gets for the one it has: what each response makes of a limit.

A target of +inf leaves the scope as it is. One that is negative or NaN, from a traced
limit, gives zeros. Internal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from optaxclip.clipping.rescaling import fits_limit
from optaxclip.limits.limit import Band, Limit, LimitLike, as_limit
from optaxclip.numerics import divide, where

Respond = Literal["cap", "soft", "set"]
"""What becomes of a norm n with the limit c: `min(n, c)`, `n * c / (n + c)`, or c."""


def cap(norm: jax.Array, excess: jax.Array, limit: jax.Array) -> jax.Array:
    """At most the limit."""
    return where(fits_limit(norm, excess, limit), jnp.inf, limit.astype(norm.dtype))


def soft(norm: jax.Array, excess: jax.Array, limit: jax.Array) -> jax.Array:
    """A little less than the norm far below the limit, nearly the limit far above."""
    limit = limit.astype(norm.dtype)
    is_limit = (limit > 0) & (limit < jnp.inf)
    target = where(is_limit, _soften(norm, excess, limit), limit)
    return set_to(norm, excess, target)


@jax.custom_jvp
def _soften(norm: jax.Array, excess: jax.Array, limit: jax.Array) -> jax.Array:
    """`n * c / (n + c)` for the true norm n, `norm * excess`, and the limit c."""
    is_large, ratio = _smaller_to_larger(norm, excess, limit)
    return where(is_large, limit, norm) / (1 + ratio)


@_soften.defjvp
def _soften_jvp(primals, tangents):
    # By hand, (c / (n + c))^2 and (n / (n + c))^2: that of a ratio leaves the range of
    # floats early.
    d_norm, _, d_limit = tangents
    is_large, ratio = _smaller_to_larger(*primals)
    smaller, larger = ratio / (1 + ratio), 1 / (1 + ratio)
    by_norm = jnp.square(where(is_large, smaller, larger))
    by_limit = jnp.square(where(is_large, larger, smaller))
    return _soften(*primals), by_norm * d_norm + by_limit * d_limit


def _smaller_to_larger(
    norm: jax.Array, excess: jax.Array, limit: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether the norm is above the limit, and the ratio of the two, at most 1."""
    is_large = norm > limit
    smaller, larger = where(is_large, limit, norm), where(is_large, norm, limit)
    ratio = divide(smaller, where(larger > 0, larger, 1))
    return is_large, where(is_large, divide(ratio, excess), ratio)


def set_to(norm: jax.Array, excess: jax.Array, limit: jax.Array) -> jax.Array:
    """The limit, also for a smaller norm; a zero has no direction and stays."""
    del excess
    return where(norm == 0, jnp.inf, limit.astype(norm.dtype))


RESPONSES: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]]
RESPONSES = {"cap": cap, "soft": soft, "set": set_to}


def raise_to(target: jax.Array, norm: jax.Array, least: jax.Array, limit: jax.Array):
    """The target; where the norm is below `least`, that, but never above the limit."""
    # +inf stands for a bound that is not yet learned.
    is_known = (least > 0) & (least < jnp.inf)
    least = jnp.minimum(least, limit).astype(norm.dtype)
    # As much room as `fits_limit` has.
    room = 1 - 4 * jnp.finfo(norm.dtype).eps
    is_low = is_known & (norm > 0) & (norm < least * room)
    return where(is_low, least, target)


def band(max_norm: LimitLike, min_norm: LimitLike | None) -> Limit:
    """One limit for both bounds."""
    upper = as_limit(max_norm, may_be_band=min_norm is None)
    if min_norm is None:
        return upper
    lower = as_limit(min_norm, "min_norm")

    def init(sizes):
        return upper.init(sizes), lower.init(sizes)

    def update(norms, state, param_norms=None):
        # Both learn from the norms that came in.
        most, upper_state = upper.update(norms, state[0], param_norms)
        least, lower_state = lower.update(norms, state[1], param_norms)
        return Band(most, least), (upper_state, lower_state)

    return Limit(init, update, upper.needs_params or lower.needs_params, is_band=True)


def check_respond(respond: str) -> None:
    """Raises the error of an unknown response."""
    if respond not in tuple(RESPONSES):
        raise ValueError(f"respond must be one of {tuple(RESPONSES)}, not {respond!r}")
