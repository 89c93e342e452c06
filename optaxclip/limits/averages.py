"""Limits learned from moving averages of the norms.

Only positive finite norms are learned: a zero gradient says nothing about how large a
healthy one is, and would hold a limit at zero.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optaxclip.checks import check_length, check_number
from optaxclip.limits.limit import Limit, cast_like, keep_finite, refuse_units
from optaxclip.numerics import normalize_norms, root_mean_square


class ZScoreState(NamedTuple):
    """State of `zscore`; each array in the shape of the norms."""

    mean: jax.Array
    """Moving average of the norms, outliers at their limit."""
    std: jax.Array
    """Moving standard deviation of the same."""
    num_seen: jax.Array
    """int32: number of norms seen, up to `warmup`; from there on one more for every
    outlier and one less for any other norm, within `warmup` and `2 * warmup`."""


class EmaState(NamedTuple):
    """State of `ema`; each array in the shape of the norms."""

    mean: jax.Array
    """Moving average of the clipped norms, in warm-up their minimum; 0 before."""
    num_seen: jax.Array
    """int32: number of norms seen, up to `warmup`."""


class QuantileState(NamedTuple):
    """State of `quantile`."""

    limit: jax.Array
    """The next limit, in the shape of the norms."""


def zscore(
    # The defaults of the published code.
    max_zscore: ArrayLike = 2.5,
    *,
    decay: ArrayLike = 0.97,
    warmup: int = 25,
) -> Limit:
    """Limits a norm to `max_zscore` standard deviations above its moving average.

    `mean + max_zscore * std`; an outlier, beyond that, gets the lower limit `mean +
    max_zscore * std * max_zscore / z` for its z-score z: the larger, the nearer to the
    mean. Then mean and std learn from the norm, or from the limit of an outlier.

    Mean and std start as those of the first `warmup` norms, with a limit of +inf. When
    outliers outnumber the other norms by `warmup`, outliers too are learned as they
    are: the limit follows a change of 10x to a factor of 2 within `3 * warmup` steps
    upward (a few hundred where heavy tails hide it), `9 / (1 - decay)` downward.

    A spike in the warm-up counts in full; a later one, of any size, moves the mean by
    `(1 - decay) * max_zscore * std` at most, and std by a factor `sqrt(decay + (1 -
    decay) * (decay * max_zscore)**2)`: 1.07 by default.

    Args:
      max_zscore: Largest z-score, in standard deviations, > 0.
      decay: Decay of mean and variance per step, within (0, 1).
      warmup: Number of norms in the warm-up, at least 2.

    Returns:
      The limit. State: 3 numbers per scope.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> limit = optaxclip.limits.zscore(2.0, warmup=2)
      >>> state, update = limit.init(jnp.ones(())), jax.jit(limit.update)
      >>> for norm in [1.0, 3.0, 100.0]:
      ...     value, state = update(jnp.array(norm), state, None)
      ...     print(round(float(value), 3))
      inf
      inf
      2.041

    Reference: Kumar et al., arXiv:2504.02507, algorithm 1 (per tree: ZClip).
    """
    check_number("max_zscore", max_zscore, lambda x: x > 0, "> 0")
    check_number("decay", decay, lambda x: 0 < x < 1, "within (0, 1)")
    warmup = check_length("warmup", warmup, 2)

    def init(sizes):
        refuse_units("zscore", sizes)
        return ZScoreState(
            mean=jnp.zeros_like(sizes),
            std=jnp.zeros_like(sizes),
            num_seen=jnp.zeros(sizes.shape, jnp.int32),
        )

    def update(norms, state, param_norms=None):
        del param_norms
        mean, std, num_seen = state
        max_z, rate = cast_like(norms, max_zscore, 1 - decay)
        is_warmup = num_seen < warmup
        # The reference adds 1e-6 to std; relative to the mean, units do not matter.
        distance = max_z * (std + 1e-6 * mean)
        excess = norms - mean  # compared itself: it may underflow
        is_outlier = ~is_warmup & (excess > distance)
        lowered = mean + max_z * std * (distance / jnp.where(is_outlier, excess, 1))
        limits = jnp.where(is_outlier, lowered, mean + distance)
        limits = jnp.where(is_warmup, jnp.inf, limits)

        # In warm-up the weights of a mean over all norms so far.
        n = (num_seen + 1).astype(norms.dtype)
        rate = jnp.where(is_warmup, 1 / n, rate)
        widening = jnp.where(is_warmup, jnp.sqrt(n / jnp.maximum(n - 1, 1)), 1)
        is_lowered = is_outlier & (num_seen < 2 * warmup - 1)
        x = jnp.where(is_lowered, limits, norms)
        mean = mean + rate * (x - mean)
        std = root_mean_square(std, widening * jnp.abs(x - mean), rate)
        balance = jnp.where(is_outlier, num_seen + 1, num_seen - 1)
        balance = jnp.clip(balance, warmup, 2 * warmup)
        num_seen = jnp.where(is_warmup, num_seen + 1, balance)
        return limits, keep_finite(norms, ZScoreState(mean, std, num_seen), state)

    return Limit(init, update)


def ema(
    multiple: ArrayLike,
    *,
    # The defaults of the published code.
    decay: ArrayLike = 0.98,
    warmup: int = 100,
    max_warmup_norm: ArrayLike = float("inf"),
) -> Limit:
    """Limits a norm to a multiple of the moving average of the clipped norms.

    `multiple * mean`, and then `mean = decay * mean + (1 - decay) * min(norm, limit)`.
    Up to the `warmup`-th norm the mean is the smallest clipped norm, and all scopes
    together are clipped to `max_warmup_norm`: with `total` for the root of the sum of
    their norms' squares, the limit is `norm * max_warmup_norm / total`, +inf if the
    total is below.

    Later the limit grows by `1 + (1 - decay) * (multiple - 1)` in a step at most,
    whatever the spike. It follows a change of 10x to a factor of 2 within
    `2.3 / ((1 - decay) * min(multiple - 1, 1))` steps upward and `3.4 / (1 - decay)`
    downward: 2300 and 170 with 1.05 and 0.98.

    As published, the warm-up counts in full: a norm smaller by a factor s (of a layer
    that starts next to zero, as in LoRA), or, with a cap, a spike s times `total` in
    any scope, lowers the limit by s. For 1.05 and 0.98 to recover from 1000 takes 6900
    steps.

    Args:
      multiple: The limit in units of the mean, > 1.
      decay: Decay of the mean per step, within (0, 1).
      warmup: The first norm of a scope with a learned limit is its `warmup`-th that is
        finite and not zero; at least 2.
      max_warmup_norm: The limit for all scopes together before, > 0.

    Returns:
      The limit. State: 2 numbers per scope.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> limit = optaxclip.limits.ema(2.0, decay=0.5, warmup=2)
      >>> state, update = limit.init(jnp.ones(())), jax.jit(limit.update)
      >>> for norm in [1.0, 100.0, 1.0]:
      ...     value, state = update(jnp.array(norm), state, None)
      ...     print(value)
      inf
      2.0
      3.0

    Reference: Wang et al., arXiv:2502.11034, algorithm 1 (per leaf: AdaGC).
    """
    check_number("multiple", multiple, lambda x: x > 1, "> 1")
    check_number("decay", decay, lambda x: 0 < x < 1, "within (0, 1)")
    check_number("max_warmup_norm", max_warmup_norm, lambda x: x > 0, "> 0")
    warmup = check_length("warmup", warmup, 2)

    def init(sizes):
        refuse_units("ema", sizes)
        return EmaState(jnp.zeros_like(sizes), jnp.zeros(sizes.shape, jnp.int32))

    def update(norms, state, param_norms=None):
        del param_norms
        factor, rate, cap = cast_like(norms, multiple, 1 - decay, max_warmup_norm)
        info = jnp.finfo(norms.dtype)
        shares, total = normalize_norms(norms)
        is_capped = (total > cap) & (shares > 0)  # 0: non-finite, or zero
        warm_limits = jnp.minimum(cap, info.max) * shares
        warm_limits = jnp.where(is_capped, warm_limits, jnp.inf)
        is_warmup = state.num_seen < warmup - 1
        limits = jnp.where(is_warmup, warm_limits, factor * state.mean)

        clipped = jnp.minimum(norms, limits)
        smallest = jnp.where(state.mean > 0, state.mean, clipped)
        smallest = jnp.minimum(smallest, clipped)
        # Not decay * mean + rate * clipped: decay + rate is not 1 in float32, which
        # adds up where every norm is clipped to a multiple of the mean.
        moved = state.mean + rate * (clipped - state.mean)
        mean = jnp.where(is_warmup, smallest, moved)
        # Where the growth in a step underflows, the mean would stay forever.
        growth = jnp.maximum(rate * jnp.minimum(factor - 1, 1), info.eps)
        learned = EmaState(
            mean=jnp.maximum(mean, info.tiny / growth),
            num_seen=jnp.minimum(state.num_seen + 1, warmup),
        )
        return limits, keep_finite(norms, learned, state)

    return Limit(init, update)


def quantile(
    target: ArrayLike = 0.5,
    *,
    # The values that the paper recommends.
    initial_norm: ArrayLike = 0.1,
    rate: ArrayLike = 0.2,
) -> Limit:
    """Tracks a quantile of the norms with one number: a share `target` stays unclipped.

    After each step the limit is multiplied by `exp(rate * target)` if the norm exceeded
    it, else by `exp(rate * (target - 1))`. It follows a change of 10x to a factor of 2
    within `2.4 / (rate * target)` steps upward, `2.4 / (rate * (1 - target))`
    downward, and a spike of any size moves it by no more than any other norm.

    Args:
      target: Share of the norms that the limit lets pass, within (0, 1).
      initial_norm: The first limit, > 0.
      rate: Size of the change per step, > 0.

    Returns:
      The limit. State: 1 number per scope.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> limit = optaxclip.limits.quantile(0.5)
      >>> state, update = limit.init(jnp.ones(())), jax.jit(limit.update)
      >>> for _ in range(100):
      ...     value, state = update(jnp.array(5.0), state, None)
      >>> print(4.5 < value < 5.5)
      True

    Reference: Andrew et al., arXiv:1905.03871, algorithm 1.
    """
    check_number("target", target, lambda x: 0 < x < 1, "within (0, 1)")
    check_number(
        "initial_norm", initial_norm, lambda x: 0 < x < np.inf, "within (0, inf)"
    )
    check_number("rate", rate, lambda x: 0 < x < np.inf, "within (0, inf)")

    def init(sizes):
        refuse_units("quantile", sizes)
        return QuantileState(jnp.full_like(sizes, initial_norm))

    def update(norms, state, param_norms=None):
        del param_norms
        limits = state.limit
        share, speed = cast_like(norms, target, rate)
        change = jnp.exp(speed * (share - (norms <= limits).astype(norms.dtype)))
        info = jnp.finfo(norms.dtype)
        learned = QuantileState(jnp.clip(limits * change, info.tiny, info.max))
        return limits, keep_finite(norms, learned, state)

    return Limit(init, update)
