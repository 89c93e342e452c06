"""How large may an update be: limits on norms."""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike


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


class ScheduleState(NamedTuple):
    """State of `schedule`."""

    num_steps: jax.Array
    """int32 `[]`: the number of steps so far."""


class ZScoreState(NamedTuple):
    """State of `zscore`; each array in the shape of the norms."""

    mean: jax.Array
    """Moving average of the norms, outliers at their limit."""
    std: jax.Array
    """Moving standard deviation of the same."""
    num_seen: jax.Array
    """int32: number of norms seen, up to `warmup`; from there on one more for every
    outlier and one less for any other norm, within `warmup` and `2 * warmup`."""


class PercentileState(NamedTuple):
    """State of `percentile`."""

    recent: jax.Array
    """The last norms `[..., window]` in a ring, +inf where there is none yet."""
    ordered: jax.Array
    """The same `[..., window]`, ascending."""
    position: jax.Array
    """int32, in the shape of the norms: the place in `recent` of the next one."""


class EmaState(NamedTuple):
    """State of `ema`; each array in the shape of the norms."""

    mean: jax.Array
    """Moving average of the clipped norms, in warm-up their minimum; 0 before."""
    num_seen: jax.Array
    """int32: number of norms seen, up to `warmup`."""


class WindowSigmaState(NamedTuple):
    """State of `window_sigma`."""

    recent: jax.Array
    """The last norms `[..., window]` in a ring, +inf where there is none yet."""
    position: jax.Array
    """int32, in the shape of the norms: the place in `recent` of the next one."""


class QuantileState(NamedTuple):
    """State of `quantile`."""

    limit: jax.Array
    """The next limit, in the shape of the norms."""


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
    _check("max_norm", max_norm, lambda x: x >= 0, ">= 0")

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
    _check("max_ratio", max_ratio, lambda x: x >= 0, ">= 0")
    _check("eps", eps, lambda x: x >= 0, ">= 0")

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
            ratio, least = _like(norm, max_ratio, eps)
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
    _check("max_rms", max_rms, lambda x: x >= 0, ">= 0")

    def init(sizes):
        return RmsState(jax.tree.map(jnp.sqrt, sizes))

    def update(norms, state, param_norms=None):
        del param_norms

        def limit_of(norm, root):
            (largest,) = _like(norm, max_rms)
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


# From here on the limits learn. Only norms that are finite and not zero enter: a zero
# gradient says nothing of how large a healthy one is, and would hold a limit at zero.


def zscore(
    max_zscore: ArrayLike = 2.5, *, decay: ArrayLike = 0.97, warmup: int = 25
) -> Limit:
    """Limits a norm to so many standard deviations above its moving average.

    `mean + max_zscore * std`; an outlier, beyond that, gets the lower limit `mean +
    max_zscore * std * max_zscore / z` for its z-score z: the larger, the nearer to the
    mean. Then mean and std learn from the norm, or from the limit of an outlier.

    Mean and std start as those of the first `warmup` norms, with a limit of +inf. When
    outliers outnumber the other norms by `warmup`, outliers too are learned as they
    are: the limit follows a change of 10x to a factor of 2 within `3 * warmup` steps
    upwards (a few hundred where heavy tails hide it), `9 / (1 - decay)` downwards.

    A spike in the warm-up counts in full; a later one, of any size, moves the mean by
    `(1 - decay) * max_zscore * std` at most, and std by a factor `sqrt(decay + (1 -
    decay) * (decay * max_zscore)**2)`: 1.07 by default.

    Args:
      max_zscore: Largest z-score, in standard deviations, > 0.
      decay: Of mean and variance, in a step, within (0, 1).
      warmup: Number of norms in the warm-up, at least 2.

    Returns:
      The limit, per tree, leaf or group. State: 3 numbers a scope.

    Raises:
      ValueError: If an argument is out of range, or at `init` per unit.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = zscore(2.0, warmup=2)
      >>> state = limit.init(jnp.ones(()))
      >>> for norm in [1.0, 3.0, 100.0]:
      ...     value, state = limit.update(jnp.array(norm), state, None)
      ...     print(round(float(value), 3))
      inf
      inf
      2.041

    Reference: Kumar et al., arXiv:2504.02507, algorithm 1 (per tree: ZClip).
    """
    _check("max_zscore", max_zscore, lambda x: x > 0, "> 0")
    _check("decay", decay, lambda x: 0 < x < 1, "within (0, 1)")
    warmup = _check_length("warmup", warmup, 2)

    def init(sizes):
        _refuse_units("zscore", sizes)
        return ZScoreState(
            mean=jnp.zeros_like(sizes),
            std=jnp.zeros_like(sizes),
            num_seen=jnp.zeros(sizes.shape, jnp.int32),
        )

    def update(norms, state, param_norms=None):
        del param_norms
        mean, std, num_seen = state
        max_z, rate = _like(norms, max_zscore, 1 - decay)
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
        std = _root_mean_square(std, widening * jnp.abs(x - mean), rate)
        balance = jnp.where(is_outlier, num_seen + 1, num_seen - 1)
        balance = jnp.clip(balance, warmup, 2 * warmup)
        num_seen = jnp.where(is_warmup, num_seen + 1, balance)
        return limits, _keep(norms, ZScoreState(mean, std, num_seen), state)

    return Limit(init, update)


def percentile(percent: ArrayLike = 10.0, *, window: int = 1024) -> Limit:
    """Limits a norm to a percentile of the last norms, its own included.

    Exact, with linear interpolation, as `numpy.percentile`. Learns the norms before the
    clip: after a lasting change it follows within `window` steps. One spike of any size
    moves the limit by one place in their order at most.

    Args:
      percent: The percentile, within [0, 100].
      window: Number of norms remembered, at least 1.

    Returns:
      The limit, per tree, leaf or group. State: two windows a scope.

    Raises:
      ValueError: If an argument is out of range, or at `init` per unit.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = percentile(50.0, window=3)
      >>> state = limit.init(jnp.ones(()))
      >>> for norm in [1.0, 2.0, 9.0, 3.0]:
      ...     value, state = limit.update(jnp.array(norm), state, None)
      ...     print(value)
      1.0
      1.5
      2.0
      3.0

    Reference: Seetharaman et al., arXiv:2007.14469 (per tree: AutoClip).
    """
    _check("percent", percent, lambda x: 0 <= x <= 100, "within [0, 100]")
    window = _check_length("window", window, 1)

    def init(sizes):
        _refuse_units("percentile", sizes)
        recent, position = _empty_ring(sizes, window)
        return PercentileState(recent, jnp.copy(recent), position)

    def update(norms, state, param_norms=None):
        del param_norms
        recent, position, oldest = _push(state.recent, state.position, norms)
        # Take the oldest out of the ordered norms; put the new one between the last
        # that is smaller and the first that is larger. To sort them in every step takes
        # longer than all the rest of a small step.
        ordered = state.ordered
        without = jnp.where(ordered < oldest, ordered, _shifted(ordered, -1, jnp.inf))
        new = norms[..., None]
        ordered = jnp.maximum(_shifted(without, 1, 0), jnp.minimum(new, without))
        state = _keep(norms, PercentileState(recent, ordered, position), state)

        # In hundredths of a place, exact for percents without decimals.
        (percents,) = _like(norms, percent)
        num = jnp.sum(state.ordered < jnp.inf, axis=-1, dtype=jnp.int32)
        last = jnp.maximum(num - 1, 0)
        hundredths = percents * last.astype(norms.dtype)
        place = jnp.floor(hundredths / 100)
        share = (hundredths - 100 * place) / 100
        low, high = (
            jnp.take_along_axis(state.ordered, index[..., None], axis=-1)[..., 0]
            for index in (
                jnp.minimum(place.astype(jnp.int32), last),
                jnp.minimum(place.astype(jnp.int32) + 1, last),
            )
        )
        rise = jnp.where(high > low, high, 0) - jnp.where(high > low, low, 0)
        return low + share * rise, state

    return Limit(init, update)


def ema(
    multiple: ArrayLike,
    *,
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
    `2.3 / ((1 - decay) * min(multiple - 1, 1))` steps upwards and `3.4 / (1 - decay)`
    downwards: 2300 and 170 with 1.05 and 0.98.

    As published, the warm-up counts in full: a norm smaller by a factor s (of a layer
    that starts next to zero, as in LoRA), or, with a cap, a spike s times `total` in
    any scope, lowers the limit by s. For 1.05 and 0.98 to recover from 1000 takes 6900
    steps.

    Args:
      multiple: The limit in units of the mean, > 1.
      decay: Of the mean, in a step, within (0, 1).
      warmup: The first norm of a scope with a learned limit is its `warmup`-th that is
        finite and not zero; at least 2.
      max_warmup_norm: The limit for all scopes together before, > 0.

    Returns:
      The limit, per tree, leaf or group. State: 2 numbers a scope.

    Raises:
      ValueError: If an argument is out of range, or at `init` per unit.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = ema(2.0, decay=0.5, warmup=2)
      >>> state = limit.init(jnp.ones(()))
      >>> for norm in [1.0, 100.0, 1.0]:
      ...     value, state = limit.update(jnp.array(norm), state, None)
      ...     print(value)
      inf
      2.0
      3.0

    Reference: Wang et al., arXiv:2502.11034, algorithm 1 (per leaf: AdaGC).
    """
    _check("multiple", multiple, lambda x: x > 1, "> 1")
    _check("decay", decay, lambda x: 0 < x < 1, "within (0, 1)")
    _check("max_warmup_norm", max_warmup_norm, lambda x: x > 0, "> 0")
    warmup = _check_length("warmup", warmup, 2)

    def init(sizes):
        _refuse_units("ema", sizes)
        return EmaState(jnp.zeros_like(sizes), jnp.zeros(sizes.shape, jnp.int32))

    def update(norms, state, param_norms=None):
        del param_norms
        factor, rate, cap = _like(norms, multiple, 1 - decay, max_warmup_norm)
        info = jnp.finfo(norms.dtype)
        shares, total = _shares(norms)
        is_capped = (total > cap) & (shares > 0)  # 0: not finite, or zero
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
        # Where the growth in a step underflows, the mean would stay for ever.
        growth = jnp.maximum(rate * jnp.minimum(factor - 1, 1), info.eps)
        learned = EmaState(
            mean=jnp.maximum(mean, info.tiny / growth),
            num_seen=jnp.minimum(state.num_seen + 1, warmup),
        )
        return limits, _keep(norms, learned, state)

    return Limit(init, update)


def window_sigma(sigmas: ArrayLike = 3.0, *, window: int = 128) -> Limit:
    """Limits a norm to so many standard deviations above the mean of the last norms.

    `mean + sigmas * max(std, 0.01 * mean)` over the last `window` norms before the
    clip, without its own; +inf until half of them are there. The floor of 1 % keeps a
    small rise after a flat stretch from being a spike.

    After a lasting change it follows within `window` steps. It is not robust: a spike
    of s means raises the limit to about `s * (1 / window + sigmas / sqrt(window))`
    means, for `window` steps.

    Args:
      sigmas: Number of standard deviations, >= 0; the source clips at 3, skips at 6.
      window: Number of norms remembered, at least 2.

    Returns:
      The limit, per tree, leaf or group. State: one window a scope.

    Raises:
      ValueError: If an argument is out of range, or at `init` per unit.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = window_sigma(2.0, window=4)
      >>> state = limit.init(jnp.ones(()))
      >>> for norm in [1.0, 3.0, 100.0]:
      ...     value, state = limit.update(jnp.array(norm), state, None)
      ...     print(round(float(value), 3))
      inf
      inf
      4.0

    Reference: OLMo-core, `optim/skip_step_optimizer.py`; Levanter,
    `optim/clip_update_norm.py`.
    """
    _check("sigmas", sigmas, lambda x: x >= 0, ">= 0")
    window = _check_length("window", window, 2)

    def init(sizes):
        _refuse_units("window_sigma", sizes)
        return WindowSigmaState(*_empty_ring(sizes, window))

    def update(norms, state, param_norms=None):
        del param_norms
        is_known = state.recent < jnp.inf
        num = jnp.sum(is_known, axis=-1, keepdims=True).astype(norms.dtype)
        values = jnp.where(is_known, state.recent, 0)
        # In units of the largest: squares of norms overflow.
        unit = _divisor(jnp.max(values, axis=-1, keepdims=True))
        values = values / jnp.where(num > 0, unit, 1)
        mean = jnp.sum(values, axis=-1, keepdims=True) / jnp.maximum(num, 1)
        squares = jnp.where(is_known, jnp.square(values - mean), 0)
        variance = jnp.sum(squares, axis=-1, keepdims=True) / jnp.maximum(num, 1)
        variance = jnp.maximum(variance, jnp.square(0.01 * mean))
        (factor,) = _like(norms, sigmas)
        std = jnp.sqrt(jnp.where(num > 0, variance, 1))
        limits = jnp.where(
            num >= max(2, window // 2), (mean + factor * std) * unit, jnp.inf
        )
        recent, position, _ = _push(state.recent, state.position, norms)
        learned = WindowSigmaState(recent, position)
        return limits[..., 0], _keep(norms, learned, state)

    return Limit(init, update)


def quantile(
    target: ArrayLike = 0.5, *, initial_norm: ArrayLike = 0.1, rate: ArrayLike = 0.2
) -> Limit:
    """Tracks a quantile of the norms with one number: a share `target` stays unclipped.

    After each step the limit is multiplied by `exp(rate * target)` if the norm exceeded
    it, else by `exp(rate * (target - 1))`. It follows a change of 10x to a factor of 2
    within `2.4 / (rate * target)` steps upwards, `2.4 / (rate * (1 - target))`
    downwards, and a spike of any size moves it by no more than any other norm.

    Args:
      target: Share of the norms that the limit lets pass, within (0, 1).
      initial_norm: The first limit, > 0.
      rate: Of the change in a step, > 0.

    Returns:
      The limit, per tree, leaf or group. State: 1 number a scope.

    Raises:
      ValueError: If an argument is out of range, or at `init` per unit.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> limit = quantile(0.5)
      >>> state = limit.init(jnp.ones(()))
      >>> for _ in range(100):
      ...     value, state = limit.update(jnp.array(5.0), state, None)
      >>> print(4.5 < value < 5.5)
      True

    Reference: Andrew et al., arXiv:1905.03871, algorithm 1.
    """
    _check("target", target, lambda x: 0 < x < 1, "within (0, 1)")
    _check("initial_norm", initial_norm, lambda x: 0 < x < np.inf, "within (0, inf)")
    _check("rate", rate, lambda x: 0 < x < np.inf, "within (0, inf)")

    def init(sizes):
        _refuse_units("quantile", sizes)
        return QuantileState(jnp.full_like(sizes, initial_norm))

    def update(norms, state, param_norms=None):
        del param_norms
        limits = state.limit
        share, speed = _like(norms, target, rate)
        change = jnp.exp(speed * (share - (norms <= limits).astype(norms.dtype)))
        info = jnp.finfo(norms.dtype)
        learned = QuantileState(jnp.clip(limits * change, info.tiny, info.max))
        return limits, _keep(norms, learned, state)

    return Limit(init, update)


def as_limit(max_norm: LimitLike) -> Limit:
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


def _check(name: str, value: Any, fits: Callable[[float], bool], what: str) -> None:
    known = known_value(name, value)
    if known is not None and not fits(known):
        raise ValueError(f"{name} must be {what}, not {value!r}")


def _check_length(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{name} must be a whole number, not {value!r}; optax.inject_hyperparams "
            "takes it in static_args="
        )
    if not least <= int(value) < 2**30:
        raise ValueError(f"{name} must be >= {least} and < 2**30, not {value!r}")
    return int(value)


def _refuse_units(name: str, sizes: Any) -> None:
    if isinstance(sizes, tuple):
        raise ValueError(
            f"limits.{name} learns, which per unit no limit does: use it per tree, "
            "leaf or group"
        )


def _like(norms: jax.Array, *values: Any) -> list[jax.Array]:
    return [jnp.asarray(value, norms.dtype) for value in values]


def _keep(norms: jax.Array, learned: Any, state: Any) -> Any:
    """What a limit learned, in the scopes whose norm is finite and not zero.

    NaN, from a traced argument that is NaN in this step, is not kept either.
    """
    learns = (norms > 0) & (norms < jnp.inf)

    def keep(new, old):
        where = learns[(...,) + (None,) * (new.ndim - norms.ndim)]
        return jnp.where(where & (new == new), new, old)

    return jax.tree.map(keep, learned, state)


def _empty_ring(sizes: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    recent = jnp.full((*sizes.shape, window), jnp.inf, sizes.dtype)
    return recent, jnp.zeros(sizes.shape, jnp.int32)


def _push(recent: jax.Array, position: jax.Array, norms: jax.Array):
    """The ring and its position after the norms took the places of the oldest."""
    places = lax.broadcasted_iota(jnp.int32, recent.shape, recent.ndim - 1)
    is_here = places == position[..., None]
    oldest = jnp.min(jnp.where(is_here, recent, jnp.inf), axis=-1, keepdims=True)
    recent = jnp.where(is_here, norms[..., None], recent)
    return recent, (position + 1) % recent.shape[-1], oldest


def _shifted(values: jax.Array, by: int, fill: float) -> jax.Array:
    """Moves values along the last axis by 1 or -1."""
    end = jnp.full_like(values[..., :1], fill)
    parts = [end, values[..., :-1]] if by > 0 else [values[..., 1:], end]
    return jnp.concatenate(parts, axis=-1)


def _root_mean_square(first: jax.Array, second: jax.Array, share: jax.Array):
    """`sqrt((1 - share) * first**2 + share * second**2)`; the squares may overflow."""
    unit = _divisor(jnp.maximum(first, second))
    unit = jnp.where(unit > 0, unit, 1)
    first, second = jnp.square(first / unit), jnp.square(second / unit)
    mean = first + share * (second - first)
    return jnp.where(mean > 0, unit * jnp.sqrt(jnp.where(mean > 0, mean, 1)), 0)


def _shares(norms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(norms / total, total) for the root of the sum of the squares of finite norms."""
    finite = jnp.where(norms < jnp.inf, norms, 0)  # NaN is not
    unit = _divisor(jnp.max(finite, initial=0))
    ratios = finite / jnp.where(unit > 0, unit, 1)
    squares = jnp.sum(jnp.square(ratios))
    root = jnp.sqrt(jnp.where(unit > 0, squares, 1))
    return ratios / root, unit * root


def _divisor(largest: jax.Array) -> jax.Array:
    """What to divide norms by: XLA multiplies with 1 / x, which must not underflow."""
    return jnp.minimum(largest, jnp.finfo(largest.dtype).max / 4)
