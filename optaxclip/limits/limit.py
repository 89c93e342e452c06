"""What a limit is, and the limits that are given: a number or a schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.checks import check_number, check_scheduled


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
    # A field, so that clips with other limits do not read the parameters for nothing.
    needs_params: bool = False
    """Whether `update` reads `param_norms`; only then are they measured."""

    is_band: bool = False
    """Whether `update` gives a `Band` and not limits; only `clip_by_norm` takes one."""

    def __repr__(self) -> str:  # as signatures and messages show it
        name = getattr(self.init, "__qualname__", "of a user").split(".")[0]
        return f"<Limit {name}>"


class Band(NamedTuple):
    """An upper and a lower limit, each in the shape of the norms."""

    upper: Any
    """The largest norms; +inf for none."""
    lower: Any
    """The smallest norms; 0 or +inf for none."""


class ScheduleState(NamedTuple):
    """State of `schedule`."""

    num_steps: jax.Array
    """int32 `[]`: the number of steps so far."""


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

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> limit = optaxclip.limits.constant(2.0)
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
        # Traced, `max_norm` was not checked: the clip turns what is bad into zeros.
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

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> limit = optaxclip.limits.schedule(lambda count: 10.0 / (1 + count))
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
        # As `lambda count: limits.zscore()`, whose error would come from deep inside.
        if isinstance(limit, Limit):
            raise TypeError("a schedule gave a Limit, and not a number: call it first")
        check_scheduled(limit)
        limits = jax.tree.map(lambda n: jnp.full_like(n, limit), norms)
        return limits, ScheduleState(
            num_steps=jnp.asarray(optax.safe_increment(state.num_steps))
        )

    return Limit(init, update)


def as_limit(
    max_norm: LimitLike, name: str = "max_norm", *, may_be_band: bool = False
) -> Limit:
    """Turns a number into `constant` and a function into `schedule`.

    `name` is the argument's, for the errors of a number.
    """
    if isinstance(max_norm, Limit):
        if max_norm.is_band and not may_be_band:
            raise ValueError(
                f"{max_norm} has a lower bound, which clip_by_norm alone can take"
            )
        return max_norm
    if callable(max_norm):
        return schedule(max_norm)
    check_number(name, max_norm, lambda x: x >= 0, ">= 0")
    return constant(max_norm)


def cast_like(norms: jax.Array, *values: Any) -> list[jax.Array]:
    """The values in the dtype of the norms."""
    return [jnp.asarray(value, norms.dtype) for value in values]


def refuse_units(name: str, sizes: Any) -> None:
    """Raises the error of a learned limit per unit."""
    if isinstance(sizes, tuple):
        raise ValueError(
            f"limits.{name} learns, which per unit no limit does: use it per tree, "
            "leaf or group"
        )


def keep_finite(norms: jax.Array, learned: Any, state: Any) -> Any:
    """What a limit learned, in the scopes whose norm is finite and not zero.

    NaN, from a traced argument that is NaN in this step, is not kept either.
    """
    learns = (norms > 0) & (norms < jnp.inf)

    def keep(new, old):
        # A state may have more axes than the norms, such as that of a window.
        where = learns[(...,) + (None,) * (new.ndim - norms.ndim)]
        return jnp.where(where & (new == new), new, old)

    return jax.tree.map(keep, learned, state)
