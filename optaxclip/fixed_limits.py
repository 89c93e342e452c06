"""Limits that are fixed, scheduled, or given by the parameters or sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.checks import check_number


class Limit(NamedTuple):
    """The largest norm that each scope may have in a step; may learn from the norms.

    A limit works elementwise on norms of any shape: `[]` per tree, `[num_leaves]` per
    leaf, `[num_groups]` per group; per unit they are a tuple with one array a leaf.
    """

    init: Callable[[Any], Any]
    """sizes -> state. `sizes`: the number of elements in each scope, in the shape and
    dtype of the norms. The state holds arrays only and never changes its type."""
    update: Callable[[Any, Any, Any], tuple[Any, Any]]
    """(norms, state, param_norms) -> (limits, state). `norms`: float32 (float64 if a
    leaf is), before the clip; `param_norms`: the parameters' norms in the same shape,
    or None where they are not known; `limits` in the shape of `norms`, +inf for none.
    """
    needs_params: bool = False
    """Whether `update` reads `param_norms`; only then are they measured."""

    def __repr__(self) -> str:  # as signatures and messages show it
        name = getattr(self.init, "__qualname__", "of a user").split(".")[0]
        return f"<Limit {name}>"


class ScheduleState(NamedTuple):
    """State of `schedule`."""

    num_steps: jax.Array
    """int32 `[]`: the number of steps so far."""


class RmsState(NamedTuple):
    """State of `rms`."""

    sqrt_size: Any
    """The root of the number of elements, in the shape of the norms."""


LimitLike = ArrayLike | Callable[[jax.Array], ArrayLike] | Limit
"""What can be given for a limit: a number, a schedule, or a limit."""


def constant(max_norm: ArrayLike) -> Limit:
    """Gives every scope the same limit on every step.

    Args:
      max_norm: The limit, in units of the norm; any number >= 0, inf for no limit.

    Returns:
      The limit.

    Raises:
      ValueError: If `max_norm` is a Python number that is negative or NaN, or has axes.
      TypeError: If it is no number.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = constant(2.0)
      >>> limits, _ = limit.update(jnp.array([1.0, 9.0]), limit.init(jnp.ones(2)), None)
      >>> print(limits)
      [2. 2.]
    """
    check_number("max_norm", max_norm, lambda x: x >= 0, ">= 0")

    def init(sizes):
        del sizes
        return optax.EmptyState()

    def update(norms, state, param_norms=None):
        del param_norms
        return jax.tree.map(lambda n: jnp.full_like(n, max_norm), norms), state

    return Limit(init, update)


def schedule(max_norm: Callable[[jax.Array], ArrayLike]) -> Limit:
    """Gives every scope the limit that an Optax schedule has for the step.

    Args:
      max_norm: Gives the limit for the number of steps so far (int32, from 0), for
        instance `optax.linear_schedule(10.0, 1.0, 1000)`. Where it is negative or NaN
        the clip gives zeros.

    Returns:
      The limit.

    Raises:
      TypeError: If `max_norm` is not callable.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = schedule(lambda count: 10.0 / (1 + count))
      >>> state = limit.init(jnp.ones(()))
      >>> for _ in range(2):
      ...     value, state = limit.update(jnp.array(1.0), state, None)
      ...     print(value)
      10.0
      5.0
    """
    if not callable(max_norm):
        raise TypeError(f"max_norm must be a function of the count, not {max_norm!r}")

    def init(sizes):
        del sizes
        return ScheduleState(jnp.zeros([], jnp.int32))

    def update(norms, state, param_norms=None):
        del param_norms
        limit = max_norm(state.num_steps)
        if isinstance(limit, Limit):
            raise TypeError("max_norm gave a Limit, and not a number: call it first")
        limits = jax.tree.map(lambda n: jnp.full_like(n, limit), norms)
        return limits, ScheduleState(
            num_steps=jnp.asarray(optax.safe_increment(state.num_steps))
        )

    return Limit(init, update)


def params(max_ratio: ArrayLike = 0.01, *, eps: ArrayLike = 1e-3) -> Limit:
    """Gives every scope a fraction of the norm of its parameters.

    `max_ratio * max(norm of the parameters, eps)`. Learns nothing. A parameter that is
    inf or NaN gives its scope the limit inf or NaN.

    Args:
      max_ratio: The limit in units of the parameters' norm, >= 0.
      eps: The least norm that parameters count for, so that those that start at zero
        can grow, >= 0.

    Returns:
      The limit; `update` needs `params` and raises ValueError without.

    Raises:
      ValueError: If an argument is out of range.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = params(0.1)
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
            ratio, least = like(norm, max_ratio, eps)
            return ratio * jnp.maximum(param_norm, least)

        return jax.tree.map(limit_of, norms, param_norms), state

    return Limit(init, update, needs_params=True)


def rms(max_rms: ArrayLike = 1.0) -> Limit:
    """Gives every scope the norm that elements of a root mean square have.

    `max_rms * sqrt(number of elements)`. Learns nothing.

    Args:
      max_rms: The largest root mean square, in the unit of the updates, >= 0.

    Returns:
      The limit.

    Raises:
      ValueError: If `max_rms` is out of range.
      TypeError: If it is no number.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = rms(0.5)
      >>> state = limit.init(jnp.array([4.0, 100.0]))
      >>> print(limit.update(jnp.ones(2), state, None)[0])
      [1. 5.]

    Reference: Shazeer and Stern, arXiv:1804.04235, section 6 (per leaf).
    """
    check_number("max_rms", max_rms, lambda x: x >= 0, ">= 0")

    def init(sizes):
        return RmsState(jax.tree.map(jnp.sqrt, sizes))

    def update(norms, state, param_norms=None):
        del param_norms

        def limit_of(norm, root):
            (largest,) = like(norm, max_rms)
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

    Raises:
      ValueError: If a limit that is a number is out of range.
      TypeError: If a limit is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = minimum(schedule(lambda count: 10.0 / (1 + count)), 8.0)
      >>> norms = jnp.array(1.0)
      >>> capped, state = limit.update(norms, limit.init(norms), None)
      >>> print(capped, limit.update(norms, state, None)[0])
      8.0 5.0
    """
    pair = as_limit(first), as_limit(second)

    def init(sizes):
        return tuple(limit.init(sizes) for limit in pair)

    def update(norms, state, param_norms=None):
        limits, states = zip(
            *(
                limit.update(norms, part, param_norms)
                for limit, part in zip(pair, state, strict=True)
            ),
            strict=True,
        )
        return jax.tree.map(jnp.minimum, *limits), states

    return Limit(init, update, any(limit.needs_params for limit in pair))


def as_limit(max_norm: LimitLike) -> Limit:
    """Turns a number into `constant` and a function into `schedule`."""
    if isinstance(max_norm, Limit):
        return max_norm
    return schedule(max_norm) if callable(max_norm) else constant(max_norm)


def like(norms: jax.Array, *values: Any) -> list[jax.Array]:
    """The values in the dtype of the norms."""
    return [jnp.asarray(value, norms.dtype) for value in values]
