"""How large may an update be: limits on norms."""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike


class Limit(NamedTuple):
    """The largest norm that each scope may have in a step; may learn from the norms.

    A limit works elementwise on norms of any shape: `[]` per tree, `[num_leaves]` per
    leaf, `[num_groups]` per group; per unit they are a tuple with one array a leaf.
    """

    init: Callable[[Any], Any]
    """sizes -> state. `sizes`: float32, the number of elements in each scope, in the
    shape of the norms. The state holds arrays only and never changes its type."""
    update: Callable[[Any, Any, Any], tuple[Any, Any]]
    """(norms, state, param_norms) -> (limits, state). `norms`: float32 (float64 if a
    leaf is), before the clip; `param_norms`: the parameters' norms in the same shape,
    or None where they are not known; `limits` in the shape of `norms`, +inf for none.
    """
    needs_params: bool = False
    """Whether `update` reads `param_norms`; only then are they measured."""


class ScheduleState(NamedTuple):
    """State of `schedule`."""

    num_steps: jax.Array
    """int32 `[]`: the number of steps so far."""


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
    known = known_value("max_norm", max_norm)
    if known is not None and not known >= 0:
        raise ValueError(f"max_norm must be >= 0, not {max_norm!r}")

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
        limits = jax.tree.map(lambda n: jnp.full_like(n, limit), norms)
        return limits, ScheduleState(
            num_steps=jnp.asarray(optax.safe_increment(state.num_steps))
        )

    return Limit(init, update)


def as_limit(max_norm: ArrayLike | Callable[[jax.Array], ArrayLike] | Limit) -> Limit:
    """Turns a number into `constant` and a function into `schedule`."""
    if isinstance(max_norm, Limit):
        return max_norm
    return schedule(max_norm) if callable(max_norm) else constant(max_norm)


def known_value(name: str, value: Any) -> float | None:
    """The value of a number; None for a JAX array, which may be traced.

    Raises the error of an argument that is not a single real number.
    """
    if not isinstance(value, numbers.Real | np.ndarray | jax.Array):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if isinstance(value, np.ndarray | jax.Array) and value.ndim:
        raise ValueError(f"{name} must be a single number, not {value!r}")
    return None if isinstance(value, jax.Array) else float(value)
