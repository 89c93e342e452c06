"""How to respond to an update that is too large: scale it down, or cut its elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from optaxclip.checks import check_label, check_leaves, known_value, own_state
from optaxclip.limits import LimitLike, as_limit
from optaxclip.norms import (
    check_ord,
    divided,
    measure,
    saturating_cast,
    scaled,
    where,
    widened,
)
from optaxclip.scopes import (
    Layout,
    Per,
    Stacked,
    check_per,
    find_scopes,
    is_gradient,
    layout_of,
    leaf_names,
)


class ClipByNormState(NamedTuple):
    """State of `clip_by_norm`, as `{label: ClipByNormState}`.

    Each array has the shape of the norms: `[]` per tree, `[num_leaves]` per leaf,
    `[num_groups]` per group; per unit it is a tuple with one array a leaf.
    """

    num_steps: jax.Array
    """int32 `[]`: the number of steps so far."""
    norm: Any
    """float32 (float64 if a parameter is): norms of the last step, before the clip."""
    limit: Any
    """As `norm`: the limits of the last step; +inf before the first."""
    num_clipped: Any
    """int32: on how many steps so far the norm exceeded its limit."""
    num_nonfinite: Any
    """int32: on how many steps so far the scope held inf or NaN."""
    limit_state: Any
    """State of the limit."""
    layout: Layout
    """No arrays: the kind of the scopes, so that `metrics` can name them."""


class ClipByValueState(NamedTuple):
    """State of `clip_by_value` with a schedule."""

    num_steps: jax.Array
    """int32 `[]`: the number of steps so far."""


Bound = ArrayLike | Callable[[jax.Array], ArrayLike]


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
      >>> import jax.numpy as jnp
      >>> clip = clip_by_value(1.0, min_value=-0.5)
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

    def init(params):
        refuse_complex(params)
        if any(map(callable, bounds)):
            return ClipByValueState(num_steps=jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        refuse_complex(updates)
        values = [b(state.num_steps) if callable(b) else b for b in bounds]
        high = values[0]
        low = values[1] if min_value is not None else -jnp.asarray(high)

        def clip(x):
            if not is_gradient(x):
                return x
            x = jnp.asarray(x)
            return jnp.clip(x, _bound_for(low, x.dtype), _bound_for(high, x.dtype))

        if isinstance(state, ClipByValueState):
            state = ClipByValueState(_next(state.num_steps))
        return jax.tree.map(clip, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def clip_by_norm(
    max_norm: LimitLike,
    *,
    per: Per = "tree",
    ord: float = 2,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "clip",
) -> optax.GradientTransformationExtraArgs:
    """Scales the updates of each scope down to a norm of at most `max_norm`.

    `g * min(1, max_norm / norm)`. An update at or below its limit comes out
    bit-identical. If a scope holds inf or NaN, these become NaN and its other elements
    0; other scopes are not touched.

    "Global" is what the transformation sees: under `per="tree"` all leaves together,
    under a function of names the leaves of one group, and inside `optax.partition` or
    `optax.masked` only the leaves that they let through. To clip by the norm of the
    whole tree, put the clip before the partition.

    Args:
      max_norm: The limit, in the unit of the norm: a number >= 0, a function of the
        number of steps so far (an Optax schedule), or a `Limit`. A traced limit
        that is negative or NaN gives zeros.
      per: What one norm is taken over. "tree": all leaves. "leaf": each array. "unit":
        each output unit, over all axes but the last; vectors whole. A function from a
        leaf's name (`"rnn/hh/kernel"`) to the name of its group: each group.
      ord: Order of the norm: any number >= 1, or `math.inf`.
      specs: Inside `jax.shard_map`, the tree (or prefix) of `PartitionSpec`s that the
        parameters have.
      stacked: True for the names of leaves whose axis 0 runs over layers (scanned
        layers); each layer then counts as a leaf of its own.
      label: Under which name the state and the metrics appear.

    Returns:
      The transformation, with the state `{label: ClipByNormState}`.

    Raises:
      ValueError: If an argument is out of range, or at `init` if `specs` or `stacked`
        does not fit the parameters.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> clip = clip_by_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> updates, state = clip.update(grads, clip.init(grads))
      >>> print(jnp.round(updates["w"], 3), state["clip"].norm)
      [0.6 0.8] 5.0

    Reference: Pascanu et al., arXiv:1211.5063, section 3.2, algorithm 1.
    """
    limit = as_limit(max_norm)
    check_per(per)
    check_ord(ord)
    check_label(label)

    def scopes_of(tree):
        return find_scopes(tree, per, specs=specs, stacked=stacked)

    def init(params):
        scopes = scopes_of(params)
        like, _ = jax.eval_shape(lambda: measure(params, scopes, ord))

        def full(value, dtype=None):
            # New arrays on each call: a buffer that appears twice cannot be donated.
            # Sharded, and inside `shard_map` varying, as the norms are.
            return jax.tree.map(lambda norm: jnp.full_like(norm, value, dtype), like)

        state = ClipByNormState(
            num_steps=jnp.zeros([], jnp.int32),
            norm=full(0),
            limit=full(jnp.inf),
            num_clipped=full(0, jnp.int32),
            num_nonfinite=full(0, jnp.int32),
            limit_state=limit.init(
                jax.tree.map(lambda n, norm: n.astype(norm.dtype), scopes.sizes(), like)
            ),
            layout=layout_of(params, per, stacked),
        )
        return {label: state}

    def update(updates, state, params=None, **extra_args):
        del extra_args
        state = own_state(state, label, ClipByNormState)
        scopes = scopes_of(updates)
        norms, excess = measure(updates, scopes, ord)
        made_for, found = (
            [x.shape for x in jax.tree.leaves(tree)] for tree in (state.norm, norms)
        )
        check_leaves(made_for, found, updates, params)
        seen = jax.tree.map(
            lambda n, like: saturating_cast(n, like.dtype), norms, state.norm
        )
        param_norms = None
        if limit.needs_params and params is not None:
            param_scopes = scopes_of(params)
            if [x.shape for x in param_scopes.leaves] != [
                x.shape for x in scopes.leaves
            ]:
                raise ValueError(
                    "the limit compares each scope with its parameters, but params do "
                    "not have the leaves of the updates; optax.masked hides leaves"
                )
            param_norms, _ = measure(params, param_scopes, ord)
            param_norms = jax.tree.map(
                lambda n, like: saturating_cast(n, like.dtype), param_norms, seen
            )
        limits, limit_state = limit.update(seen, state.limit_state, param_norms)
        limits = jax.tree.map(
            lambda x, n: jnp.broadcast_to(x, n.shape).astype(n.dtype), limits, seen
        )
        fits = jax.tree.map(_fits, norms, excess, limits)
        state = ClipByNormState(
            num_steps=_next(state.num_steps),
            norm=seen,
            limit=limits,
            num_clipped=jax.tree.map(
                lambda total, fit, n: counted(total, ~fit & jnp.isfinite(n)),
                state.num_clipped,
                fits,
                norms,
            ),
            num_nonfinite=jax.tree.map(
                lambda total, n: counted(total, ~jnp.isfinite(n)),
                state.num_nonfinite,
                norms,
            ),
            limit_state=limit_state,
            layout=state.layout,
        )
        pre = jax.tree.map(_power_of_two, norms, limits)
        post = jax.tree.map(_factor, norms, excess, limits, fits, pre)

        def clip(x, leaf, *numbers):
            if not leaf.is_gradient:
                return x
            # Without the barrier XLA shares the conversion of a bfloat16 leaf with the
            # norm, and stores the whole leaf in float32.
            x = lax.optimization_barrier(jnp.asarray(x))
            return _rescaled(widened(x, numbers[0].dtype), *numbers).astype(x.dtype)

        leaves, structure = jax.tree.flatten(updates)
        numbers = map(scopes.spread, (pre, post, norms, excess, limits))
        leaves = map(clip, leaves, scopes.leaves, *numbers)
        return jax.tree.unflatten(structure, leaves), {label: state}

    return optax.GradientTransformationExtraArgs(init, update)


def _fits(norm, excess, limit):
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


def _power_of_two(norm, limit):
    """The first of two factors: 1, unless limit / norm is too small for one float."""
    tiny = jnp.finfo(norm.dtype).tiny
    limit = limit.astype(norm.dtype)
    return 1 / where((limit > 0) & (limit < tiny * norm), 1 / tiny, 1)


def _factor(norm, excess, limit, fits, pre):
    """The second factor: limit / norm, 1 if it fits, 0 if one of the two is bad."""
    is_bad = ~jnp.isfinite(norm) | ~(limit > 0)
    limit = limit.astype(norm.dtype) / excess
    dividend = where(fits, 1, where(is_bad, 0, limit))
    return dividend / where(fits | is_bad, 1, norm * pre)


@jax.custom_jvp
def _rescaled(x, pre, post, norm, excess, limit):
    """Multiplies by pre * post, which is 1 or limit / (norm * excess)."""
    return scaled(scaled(x, pre), post)


@_rescaled.defjvp
def _rescaled_jvp(primals, tangents):
    # By hand, in ratios: the derivative of 1 / norm leaves the range of floats early.
    x, pre, post, norm, excess, _ = primals
    d_x, _, _, d_norm, _, d_limit = tangents
    is_clipped = (pre < 1) | (post < 1)
    direction = divided(divided(x, where(norm > 0, norm, 1)), excess)
    direction = where(is_clipped & jnp.isfinite(norm), direction, 0)
    d_x = d_x - scaled(direction, d_norm)
    d_out = scaled(scaled(d_x, pre), post) + scaled(
        direction, d_limit.astype(norm.dtype)
    )
    return _rescaled(*primals), d_out


def _bound_for(bound, dtype):
    """A bound in the dtype of a leaf; a finite one stays finite."""
    bound = jnp.asarray(bound)
    info = jnp.finfo(dtype)
    finite = jnp.clip(bound, float(info.min), float(info.max))
    return where(jnp.isinf(bound), bound, finite).astype(dtype)


def _next(count):
    return jnp.asarray(optax.safe_increment(count))


def counted(total, increment):
    """One more where `increment` is True; stays at the largest integer."""
    return where(increment, _next(total), total)
