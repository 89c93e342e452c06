"""Limits that follow from parameters or sizes, and the choice between two limits."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.checks import check_number
from optaxclip.limits.limit import Limit, LimitLike, as_limit, cast_like
from optaxclip.numerics import divide, normalize_norms, root_sum_squares


class RmsState(NamedTuple):
    """State of `rms`."""

    sqrt_size: Any
    """The root of the number of elements, in the shape of the norms."""


# Both are those of AGC, arXiv:2102.06171, section 4: 0.01 is for batches of 4096.
def params(max_ratio: ArrayLike = 0.01, *, eps: ArrayLike = 1e-3) -> Limit:
    """Gives every scope a fraction of the norm of its parameters.

    `max_ratio * max(norm of the parameters, eps)`. Learns nothing. A parameter that is
    inf or NaN gives its scope the limit inf or NaN.

    Args:
      max_ratio: The limit in units of the parameters' norm, >= 0.
      eps: Lower bound of the parameters' norm, so that those that start at zero can
        grow, >= 0.

    Returns:
      The limit; `update` needs `params` and raises ValueError without.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> limit = optaxclip.limits.params(0.1)
      >>> norms, param_norms = jnp.ones(2), jnp.array([5.0, 0.0])
      >>> limits, _ = limit.update(norms, limit.init(norms), param_norms)
      >>> print([round(float(x), 6) for x in limits])
      [0.5, 0.0001]

    Reference: Brock et al., arXiv:2102.06171, section 4, equation 3 (per unit: AGC).
    """
    check_number("max_ratio", max_ratio, lambda x: x >= 0, ">= 0")
    check_number("eps", eps, lambda x: x >= 0, ">= 0")

    def init(sizes):
        del sizes
        return optax.EmptyState()

    def update(norms, state, param_norms=None):
        if param_norms is None:
            raise ValueError(
                "this limit is a fraction of the parameters' norm: call "
                "update(updates, state, params) with params"
            )

        def limit_of(norm, param_norm):
            # Traced, a float64 number would widen the norms.
            ratio, least = cast_like(norm, max_ratio, eps)
            return ratio * jnp.maximum(param_norm, least)

        return jax.tree.map(limit_of, norms, param_norms), state

    return Limit(init, update, needs_params=True)


# The threshold d of Adafactor, arXiv:1804.04235, section 6.
def rms(max_rms: ArrayLike = 1.0) -> Limit:
    """Gives every scope the norm that elements of a root mean square have.

    `max_rms * sqrt(number of elements)`. Learns nothing.

    Args:
      max_rms: The largest root mean square, in the unit of the updates, >= 0.

    Returns:
      The limit.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> limit = optaxclip.limits.rms(0.5)
      >>> state = limit.init(jnp.array([4.0, 100.0]))
      >>> print(limit.update(jnp.ones(2), state, None)[0])
      [1. 5.]

    Reference: Shazeer and Stern, arXiv:1804.04235, section 6 (per leaf).
    """
    check_number("max_rms", max_rms, lambda x: x >= 0, ">= 0")

    def init(sizes):
        # Here and not in each step: the sizes do not change.
        return RmsState(jax.tree.map(jnp.sqrt, sizes))

    def update(norms, state, param_norms=None):
        del param_norms

        def limit_of(norm, root):
            (largest,) = cast_like(norm, max_rms)
            return largest * root.astype(norm.dtype)

        return jax.tree.map(limit_of, norms, state.sqrt_size), state

    return Limit(init, update)


def minimum(first: LimitLike, second: LimitLike) -> Limit:
    """Gives every scope the smaller of two limits; both learn from the same norms.

    Args:
      first: A limit, a number or a schedule.
      second: The same.

    Returns:
      The limit; its state is the pair of their states.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> falling = optaxclip.limits.schedule(lambda count: 10.0 / (1 + count))
      >>> limit = optaxclip.limits.minimum(falling, 8.0)
      >>> norms = jnp.array(1.0)
      >>> capped, state = limit.update(norms, limit.init(norms), None)
      >>> print(capped, limit.update(norms, state, None)[0])
      8.0 5.0
    """
    return _chosen(jnp.minimum, first, second)


def maximum(first: LimitLike, second: LimitLike) -> Limit:
    """Gives every scope the larger of two limits; both learn from the same norms.

    Args:
      first: A limit, a number or a schedule.
      second: The same.

    Returns:
      The limit; its state is the pair of their states.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> falling = optaxclip.limits.schedule(lambda count: 10.0 / (1 + count))
      >>> limit = optaxclip.limits.maximum(falling, 8.0)
      >>> norms = jnp.array(1.0)
      >>> first, state = limit.update(norms, limit.init(norms), None)
      >>> print(first, limit.update(norms, state, None)[0])
      10.0 8.0
    """
    return _chosen(jnp.maximum, first, second)


def with_global(limit: LimitLike, max_norm: LimitLike) -> Limit:
    """Gives every scope a limit, and all scopes together one on their global norm.

    Each norm is first brought to its own limit. Where the root of the sum of the
    squares is then still above `max_norm`, all are scaled down together. So both hold
    with one read of the updates. It needs norms of order 2. With "set" or a lower
    bound, which raise norms, `max_norm` does not hold.

    Args:
      limit: Of each leaf or group: a limit, a number or a schedule.
      max_norm: Of all of them together: the same. It learns from global norms.

    Returns:
      The limit; its state is the pair of their states.

    Raises:
      ValueError: At `init` per unit.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> limit = optaxclip.limits.with_global(4.0, 2.5)
      >>> norms = jnp.array([3.0, 100.0])
      >>> print(limit.update(norms, limit.init(norms), None)[0])
      [1.5 2. ]
    """
    own, together = as_limit(limit, "limit"), as_limit(max_norm)

    def init(sizes):
        # Units may be spread over devices, which a limit does not know.
        if isinstance(sizes, tuple):
            raise ValueError("limits.with_global works per leaf or group, not per unit")
        return own.init(sizes), together.init(sizes.sum())

    def update(norms, state, param_norms=None):
        limits, own_state = own.update(norms, state[0], param_norms)
        limits = jnp.broadcast_to(limits, norms.shape).astype(norms.dtype)
        # Without the scopes that are non-finite, which the clip contains.
        clipped = jnp.minimum(norms, jnp.maximum(limits, 0))
        clipped = jnp.where(norms < jnp.inf, clipped, 0)
        shares, total = normalize_norms(clipped)
        param_norm = None if param_norms is None else root_sum_squares(param_norms)
        bound, state = together.update(total, state[1], param_norm)
        # Not `total > bound`: a bad bound gives zeros, as everywhere.
        is_over = ~(total <= bound)
        # A bound of +inf would make NaN of a derivative of 0.
        bound = jnp.where(is_over, bound, 1).astype(norms.dtype)
        # bound / total, which itself may be beyond the largest float.
        largest = jnp.max(clipped, initial=0)
        factor = divide(
            bound * jnp.max(shares, initial=0), jnp.where(largest > 0, largest, 1)
        )
        # Where a share underflows, the factor does not, or what both give does.
        is_normal = shares >= jnp.finfo(shares.dtype).tiny
        joint = jnp.where(is_normal, shares * bound, clipped * factor)
        joint = jnp.where(is_over & (clipped > 0), joint, jnp.inf)
        return jnp.minimum(limits, joint), (own_state, state)

    return Limit(init, update, own.needs_params or together.needs_params)


def _chosen(
    choose: Any,
    first: LimitLike,
    second: LimitLike,
) -> Limit:
    """Chooses between two limits."""
    pair = as_limit(first, "first"), as_limit(second, "second")

    def init(sizes):
        return tuple(limit.init(sizes) for limit in pair)

    def update(norms, state, param_norms=None):
        # Both learn what came in: of clipped norms one would follow the other down.
        limits, states = zip(
            *(
                limit.update(norms, part, param_norms)
                for limit, part in zip(pair, state, strict=True)
            ),
            strict=True,
        )
        return jax.tree.map(choose, *limits), states

    # The name of the limit in signatures and messages.
    init.__qualname__ = choose.__name__
    return Limit(init, update, any(limit.needs_params for limit in pair))
