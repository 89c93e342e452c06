"""Brings an update to a limit: the one implementation. Internal."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip.norms.scopes import Scopes, find_scopes
from optaxclip.numerics import accumulator, divide, scale, where, widen
from optaxclip.xla import read_apart


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


def power_of_two(norm, target):
    """The first of two factors: 1, unless target / norm is outside of one float."""
    tiny = jnp.finfo(norm.dtype).tiny
    is_small = (target > 0) & (target < tiny * norm)
    is_large = (norm > 0) & (norm < tiny * target) & (target < jnp.inf)
    return 1 / where(is_small, 1 / tiny, where(is_large, tiny, 1))


def rescale_factor(norm, excess, target, pre):
    """The second factor: target / norm, 1 if it is +inf, 0 if one of the two is bad."""
    is_bad = ~jnp.isfinite(norm) | ~(target > 0)
    is_left = ~is_bad & (target == jnp.inf)
    dividend = where(is_left, 1, where(is_bad, 0, target / excess))
    return dividend / where(is_left | is_bad, 1, norm * pre)


@jax.custom_jvp
def rescale(x, pre, post, norm, excess, target):
    """Multiplies by pre * post, which is 1 or target / (norm * excess)."""
    return scale(scale(x, pre), post)


@rescale.defjvp
def _rescale_jvp(primals, tangents):
    # By hand, in ratios: the derivative of 1 / norm leaves the range of floats early.
    x, pre, post, norm, excess, target = primals
    d_x, _, _, d_norm, _, d_target = tangents
    direction = divide(divide(x, where(norm > 0, norm, 1)), excess)
    direction = where((target < jnp.inf) & jnp.isfinite(norm), direction, 0)
    d_x = d_x - scale(direction, d_norm)
    d_out = scale(scale(d_x, pre), post) + scale(direction, d_target)
    return rescale(*primals), d_out


def rescale_scopes(
    updates: Any, scopes: Scopes, norms: Any, excess: Any, targets: Any
) -> Any:
    """The updates with each scope brought from its norm to its target."""
    pre = jax.tree.map(power_of_two, norms, targets)
    post = jax.tree.map(rescale_factor, norms, excess, targets, pre)

    def rescaled(x, leaf, *numbers):
        if not leaf.is_gradient:
            return x
        x = read_apart(jnp.asarray(x), "clip")
        return rescale(widen(x, numbers[0].dtype), *numbers).astype(x.dtype)

    leaves, structure = jax.tree.flatten(updates)
    numbers = map(scopes.spread, (pre, post, norms, excess, targets))
    return jax.tree.unflatten(structure, map(rescaled, leaves, scopes.leaves, *numbers))


def limit_updates(
    updates: Any, when: jax.Array, norm: jax.Array, limit: jax.Array
) -> Any:
    """The updates, where `when` with a norm of all of at most its limit."""
    is_large = when & ~(norm <= limit)
    # A norm beyond the largest float is not known: it gives zeros, as one of +inf.
    is_known = norm < jnp.finfo(norm.dtype).max
    norm = jnp.where(is_large, jnp.where(is_known, norm, jnp.inf), 1)
    target = jnp.where(is_large, limit, jnp.inf)
    # The updates may be wider than the parameters, for which the norm was cast.
    dtype = accumulator(jax.tree.leaves(updates))
    norm, target = norm.astype(dtype), target.astype(dtype)
    scopes = find_scopes(updates, "tree")
    return rescale_scopes(updates, scopes, norm, jnp.ones_like(norm), target)
