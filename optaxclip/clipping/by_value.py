"""Clips each element of an update."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip.checks import check_scheduled, known_value
from optaxclip.clipping.by_norm import Bound
from optaxclip.norms.names import leaf_names
from optaxclip.numerics import is_gradient, next_count, where


class ClipByValueState(NamedTuple):
    """State of `clip_by_value` with a schedule."""

    num_steps: jax.Array
    """int32 `[]`: the number of steps so far."""


def clip_by_value(
    max_value: Bound, *, min_value: Bound | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clips every element of the updates to `[min_value, max_value]`.

    `min(max(g, min_value), max_value)`: +-inf become the bound, NaN stays NaN.

    Args:
      max_value: The upper bound, in the unit of the updates: a number, or a function
        of the number of steps so far (an Optax schedule).
      min_value: The lower bound, likewise; `-max_value` by default.

    Returns:
      The transformation. Without state, but for the count that a schedule needs.

    Raises:
      ValueError: If a bound is NaN or `min_value > max_value` (where both are Python
        numbers; otherwise `max_value` wins), or if a leaf is complex.
      TypeError: If a bound is neither a number nor callable.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> clip = optaxclip.clip_by_value(1.0, min_value=-0.5)
      >>> updates, _ = clip.update(jnp.array([-2.0, 0.25, jnp.inf]), clip.init(None))
      >>> print(updates)
      [-0.5   0.25  1.  ]

    Reference: Mikolov, "Statistical language models based on neural networks" (2012),
    section 3.2.2.
    """
    bounds: list[Bound] = [max_value]
    if min_value is not None:
        bounds.append(min_value)
    known = [
        None if callable(bound) else known_value(name, bound)
        for name, bound in zip(("max_value", "min_value"), bounds, strict=False)
    ]
    for value in known:
        if value is not None and math.isnan(value):
            raise ValueError("max_value and min_value must not be NaN")
    highest, lowest = known[0], known[-1]
    if highest is not None and lowest is not None:
        lowest = -highest if min_value is None else lowest
        if lowest > highest:
            raise ValueError(
                f"min_value must be <= max_value, not {lowest!r} > {highest!r}"
            )

    def refuse_complex(tree):
        for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
            if is_gradient(leaf) and jnp.iscomplexobj(leaf):
                raise ValueError(f"clip_by_value cannot order complex values: {name!r}")

    has_schedule = any(map(callable, bounds))

    def init(params):
        refuse_complex(params)
        if has_schedule:
            return ClipByValueState(num_steps=jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        refuse_complex(updates)
        if has_schedule and not isinstance(state, ClipByValueState):
            raise ValueError(
                "state must be what init gave, a ClipByValueState, not "
                f"{type(state).__name__}"
            )
        values = [_value_of(bound, state) for bound in bounds]
        high = values[0]
        low = values[1] if min_value is not None else -jnp.asarray(high)

        def clip(x):
            if not is_gradient(x):
                return x
            x = jnp.asarray(x)
            return jnp.clip(x, _bound_for(low, x.dtype), _bound_for(high, x.dtype))

        if isinstance(state, ClipByValueState):
            state = ClipByValueState(next_count(state.num_steps))
        return jax.tree.map(clip, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _value_of(bound, state):
    """A bound on this step."""
    if not callable(bound):
        return bound
    value = bound(state.num_steps)
    check_scheduled(value)
    return value


def _bound_for(bound, dtype):
    """A bound in the dtype of a leaf; a finite one stays finite."""
    bound = jnp.asarray(bound)
    # A cast alone would make a large float32 bound inf in float16.
    info = jnp.finfo(dtype)
    finite = jnp.clip(bound, float(info.min), float(info.max))
    return where(jnp.isinf(bound), bound, finite).astype(dtype)
