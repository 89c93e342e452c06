"""Norms to aim at: what `clip_by_norm` sets, and a band that it keeps norms in."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optaxclip.checks import check_number
from optaxclip.limits.limit import Band, Limit, cast_like, keep_finite, refuse_units
from optaxclip.numerics import divide, root_mean_square


class MeanOverRmsState(NamedTuple):
    """State of `mean_over_rms`; each array in the shape of the norms."""

    mean: jax.Array
    """Moving average of the norms, with bias correction; 0 before the first."""
    rms: jax.Array
    """Root of the moving average of their squares, likewise."""
    num_seen: jax.Array
    """int32: number of norms seen; stays at 2**30."""


class EmaBandState(NamedTuple):
    """State of `ema_band`."""

    mean: jax.Array
    """Moving average of the norms after the clip, in the shape of the norms; 0 before
    the first."""


def mean_over_rms(
    # The defaults of the published code.
    decay: ArrayLike = 0.6,
    *,
    squares_decay: ArrayLike = 0.999,
) -> Limit:
    """Gives the mean of the norms in units of their root mean square: a norm to set.

    `mean / sqrt(mean of squares)`, both moving averages with the bias correction of
    Adam, the present norm included. It is near 1 where norms are alike, and small where
    a rare large one fills the mean of the squares. It has no unit: 1000 times larger
    gradients give the same. So it is meant for `respond="set"`, before an optimizer
    that is indifferent to the scale of a gradient, such as Adam.

    Args:
      decay: Decay of the mean per step, within (0, 1).
      squares_decay: Decay of the mean of the squares per step, within (0, 1).

    Returns:
      The limit. State: 3 numbers per scope.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> limit = optaxclip.limits.mean_over_rms(0.5)
      >>> state = limit.init(jnp.ones(()))
      >>> for norm in [2.0, 2.0, 20.0]:
      ...     value, state = limit.update(jnp.array(norm), state, None)
      ...     print(round(float(value), 3))
      1.0
      1.0
      1.053

    Reference: Huang et al., arXiv:2502.17055 (per leaf: GradientStabilizer).
    """
    check_number("decay", decay, lambda x: 0 < x < 1, "within (0, 1)")
    check_number("squares_decay", squares_decay, lambda x: 0 < x < 1, "within (0, 1)")

    def init(sizes):
        refuse_units("mean_over_rms", sizes)
        return MeanOverRmsState(
            mean=jnp.zeros_like(sizes),
            rms=jnp.zeros_like(sizes),
            num_seen=jnp.zeros(sizes.shape, jnp.int32),
        )

    def update(norms, state, param_norms=None):
        del param_norms
        n = (state.num_seen + 1).astype(norms.dtype)
        # The weights of a mean with bias correction: 1 for the first norm.
        rate, squares_rate = (
            x / -jnp.expm1(n * jnp.log1p(-x))
            for x in cast_like(norms, 1 - decay, 1 - squares_decay)
        )
        learned = MeanOverRmsState(
            mean=state.mean + rate * (norms - state.mean),
            rms=root_mean_square(state.rms, norms, squares_rate),
            num_seen=jnp.minimum(state.num_seen + 1, 2**30),
        )
        state = keep_finite(norms, learned, state)
        is_known = state.rms > 0
        target = divide(state.mean, jnp.where(is_known, state.rms, 1))
        return jnp.where(is_known, target, jnp.inf), state

    return Limit(init, update)


def ema_band(
    low: ArrayLike, high: ArrayLike, *, decay: ArrayLike, min_norm: ArrayLike
) -> Limit:
    """Keeps a norm within two multiples of the moving average of the clipped norms.

    `[max(min_norm, low * mean), high * mean]`, and then the mean learns the norm that
    came out. See `aggc`.
    """
    check_number("low", low, lambda x: 0 <= x < 1, "within [0, 1)")
    check_number("high", high, lambda x: x > 1, "> 1")
    check_number("decay", decay, lambda x: 0 < x < 1, "within (0, 1)")
    check_number("min_norm", min_norm, lambda x: x >= 0, ">= 0")

    def init(sizes):
        refuse_units("ema_band", sizes)
        return EmaBandState(jnp.zeros_like(sizes))

    def update(norms, state, param_norms=None):
        del param_norms
        less, more, least, rate = cast_like(norms, low, high, min_norm, 1 - decay)
        is_first = state.mean == 0
        upper = jnp.where(is_first, jnp.inf, more * state.mean)
        lower = jnp.maximum(least, less * state.mean)
        clipped = jnp.minimum(jnp.maximum(norms, lower), upper)
        mean = state.mean + rate * (clipped - state.mean)
        learned = EmaBandState(jnp.where(is_first, clipped, mean))
        return Band(upper, lower), keep_finite(norms, learned, state)

    return Limit(init, update, is_band=True)
