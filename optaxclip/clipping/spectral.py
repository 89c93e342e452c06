"""Clips the singular values of matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from optaxclip.checks import check_by_name, check_label, check_leaves, own_state
from optaxclip.clipping.by_norm import ClipByNormState, first_state, next_state
from optaxclip.clipping.rescaling import fits_limit
from optaxclip.clipping.shards import (
    MeshAxes,
    join_shards,
    own_shard,
    whole_shape,
)
from optaxclip.clipping.singular import (
    cap_singular_values,
    largest_singular_value,
    soften_singular_values,
)
from optaxclip.limits.limit import LimitLike, as_limit
from optaxclip.norms.measuring import measure
from optaxclip.norms.names import Stacked, Where, layout_of
from optaxclip.norms.scopes import Leaf, Scopes, find_scopes, mesh_axes_of
from optaxclip.numerics import (
    divide,
    saturating_cast,
    scale,
    where,
    widen,
)
from optaxclip.xla import replicate, reshard, run_if, tie


def clip_by_spectral_norm(
    max_norm: LimitLike,
    *,
    smooth: bool = False,
    where: Where | None = None,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "clip",
) -> optax.GradientTransformationExtraArgs:
    """Limits the singular values of each matrix to at most `max_norm`.

    `min(s, max_norm)` for each singular value s, or if `smooth` SPECTRA's
    `s / sqrt(1 + (s / max_norm)**2)`; singular vectors stay. A matrix whose largest
    singular value is at most its limit comes out bit-identical, unless `smooth`.

    Matrices are leaves with two axes, besides those that are `stacked`. All others, as
    vectors and the kernels of convolutions, pass through untouched, with norm 0. Of a
    matrix that holds inf or NaN, these become NaN and its other elements 0.

    The norm is the largest singular value, at most 0.5 % too small. Of norms up to
    10,000 times the limit, results are within 0.3 % of the limit of the formula; of
    larger ones, what is below 1e-6 of the Frobenius norm shrinks with it. Of a matrix
    with at least 1024 rows and columns, of which few singular values exceed the limit,
    these alone are clipped: what exceeds it by up to 0.6 % may stay. Of a sharded
    matrix, each device works on the whole; of stacked ones that lie on several devices,
    each works on its own. Derivatives through the clip are forward ones (`jax.jvp`): in
    reverse mode JAX raises an error of `while_loop`.

    Args:
      max_norm: The limit, as in `clip_by_norm`; a `Limit` learns from each matrix.
      smooth: Also shrinks what is below the limit, smoothly.
      where: A common argument, see `help(optaxclip)`.
      specs: Likewise.
      stacked: Likewise; each layer or expert is a matrix.
      label: Likewise.

    Returns:
      The transformation, with the state `{label: ClipByNormState}`, per leaf.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> clip = optaxclip.clip_by_spectral_norm(1.0)
      >>> grads = {"w": jnp.array([[3.0, 0.0], [0.0, 0.5]]), "b": jnp.array([9.0])}
      >>> updates, state = clip.update(grads, clip.init(grads))
      >>> print(updates["w"].round(2) + 0, updates["b"], state["clip"].norm.round(2))
      [[1.  0. ]
       [0.  0.5]] [9.] [0. 3.]

    Reference: Jiang et al., arXiv:2603.14315, equation 4 for `smooth`.
    """
    limit = as_limit(max_norm)
    check_by_name(where=where, stacked=stacked)
    check_label(label)
    if not isinstance(smooth, bool):
        raise TypeError(f"smooth must be True or False, not {smooth!r}")

    def scopes_of(tree):
        return find_scopes(tree, "leaf", specs=specs, stacked=stacked, where=where)

    def init(params):
        scopes = scopes_of(params)
        like, _ = jax.eval_shape(lambda: measure(params, scopes, 2))

        limit_state = limit.init(scopes.sizes().astype(like.dtype))
        layout = layout_of(params, "leaf", stacked)
        return {label: first_state(like, limit_state, layout, has_target=smooth)}

    def update(updates, state, params=None, **extra_args):
        del extra_args
        state = own_state(state, label, ClipByNormState)
        scopes = scopes_of(updates)
        mesh_axes = mesh_axes_of(updates, specs)
        norms, frobenius, excess = _measure(updates, scopes, mesh_axes)
        check_leaves([state.norm.shape], [norms.shape], updates, params)
        dtype = state.norm.dtype
        seen = saturating_cast(norms, dtype)
        param_norms = None
        if limit.needs_params and params is not None:
            param_axes = mesh_axes_of(params, specs)
            param_norms, _, _ = _measure(params, scopes_of(params), param_axes)
            check_leaves([state.norm.shape], [param_norms.shape], updates, params)
            param_norms = saturating_cast(param_norms, dtype)
        limits, limit_state = limit.update(seen, state.limit_state, param_norms)
        limits = jnp.broadcast_to(limits, seen.shape).astype(dtype)
        fits = fits_limit(norms, excess, limits)
        targets = _soften_norms(seen, limits) if smooth else ()
        state = next_state(state, seen, limits, fits, limit_state, targets)
        limits = limits.astype(norms.dtype)
        if smooth:
            # Of what is smaller by this, it changes no digit.
            eps = jnp.finfo(norms.dtype).eps
            fits = norms <= limits * eps**0.5
        leaves, structure = jax.tree.flatten(updates)
        numbers = map(scopes.spread, (frobenius, excess, limits, fits))
        function = soften_singular_values if smooth else cap_singular_values
        leaves = [
            _clip(function, x, leaf, *values) if _is_matrix(leaf) else x
            for x, leaf, *values in zip(
                leaves, scopes.leaves, mesh_axes, *numbers, strict=True
            )
        ]
        return jax.tree.unflatten(structure, leaves), {label: state}

    return optax.GradientTransformationExtraArgs(init, update)


def _soften_norms(norms: jax.Array, limits: jax.Array) -> jax.Array:
    """What becomes of the largest singular values; +inf where they stay."""
    # s / sqrt(1 + (s / c)**2) by the smaller of the two: no square overflows.
    small, large = jnp.minimum(norms, limits), jnp.maximum(norms, limits)
    ratio = divide(small, where(large > 0, large, 1))
    soft = where(limits > 0, small / jnp.sqrt(1 + jnp.square(ratio)), 0)
    return where(limits == jnp.inf, jnp.inf, soft)


def _is_matrix(leaf: Leaf) -> bool:
    """Whether a leaf is a matrix, or matrices along the axes that are kept."""
    return leaf.is_gradient and len(leaf.shape) - len(leaf.kept) == 2


def _measure(
    tree: Any, scopes: Scopes, mesh_axes: list[MeshAxes]
) -> tuple[Any, Any, Any]:
    """Largest singular values; Frobenius norms, and by what the true ones exceed them.

    Each `[num_leaves]`; the first is 0 of what is no matrix.
    """
    frobenius, excess = measure(tree, scopes, 2)
    parts = []
    for x, leaf, axes, size, extra in zip(
        jax.tree.leaves(tree),
        scopes.leaves,
        mesh_axes,
        scopes.spread(frobenius),
        scopes.spread(excess),
        strict=True,
    ):
        if not _is_matrix(leaf):
            parts.append(jnp.zeros(leaf.part_shape, frobenius.dtype))
            continue
        matrices = _units(x, axes, size, extra)
        share = replicate(_each(largest_singular_value, matrices))
        size, extra = size[..., 0, 0], extra[..., 0, 0]
        norm = jnp.minimum(share * extra * size, jnp.finfo(size.dtype).max)
        parts.append(where(jnp.isfinite(size), norm, size))
    # They are of whole matrices: nothing is left to combine over devices.
    norms = jnp.concatenate([x.reshape(-1) for x in parts] or [jnp.zeros_like(excess)])
    return norms, frobenius, excess


def _units(x: Any, axes: MeshAxes, size: jax.Array, extra: jax.Array) -> jax.Array:
    """The matrices `[..., m, n]`, m >= n, each with a Frobenius norm of 1.

    In the dtype of `size`; zeros for one that is zero or holds inf or NaN.
    """
    x = _whole(join_shards(widen(jnp.asarray(x), size.dtype), axes))
    is_known = jnp.isfinite(size) & (size > 0)
    x = divide(divide(x, where(is_known, size, 1)), extra)
    x = jnp.where(is_known, x, jnp.zeros_like(x))
    return x.mT if x.shape[-2] < x.shape[-1] else x


def _clip(
    function: Callable, x, leaf: Leaf, axes: MeshAxes, size, extra, limit, fits
) -> jax.Array:
    """A leaf whose matrices are clipped to their limits, but for those that fit."""
    x = jnp.asarray(x)

    def clip(flag, x):
        known = tie(flag, x)
        is_bad = ~jnp.isfinite(size) | ~(limit > 0)
        # Below this, roundings of what is large would be raised to the limit: what is
        # smaller is scaled instead.
        least = 8 * jnp.finfo(size.dtype).eps
        cut = divide(divide(limit, where(size > 0, size, 1)), extra)
        cut = jnp.clip(where(fits | is_bad, 1, cut), least)
        matrices = _units(known, axes, size, extra)
        clipped = _each(function, matrices, cut[..., 0, 0])
        shape = whole_shape(leaf.shape, axes)
        clipped = clipped.mT if shape[-2] < shape[-1] else clipped
        clipped = own_shard(clipped, leaf.shape, axes)
        clipped = scale(clipped, where(is_bad, 0, limit)).astype(x.dtype)
        # Zero times inf or NaN is NaN, which stays visible.
        known = _whole(known)
        clipped = jnp.where(jnp.isfinite(size), clipped, known * 0)
        clipped = jnp.where(fits, known, clipped)
        return reshard(clipped, jax.typeof(x).sharding.spec)

    return run_if(~jnp.all(fits), clip, x)[1]


def _each(function: Callable, matrices: jax.Array, *numbers: jax.Array) -> jax.Array:
    """The function of each matrix, and of the numbers that belong to it."""
    spec = jax.typeof(matrices).sharding.spec[:-2]
    numbers = tuple(reshard(x, PartitionSpec(*spec)) for x in numbers)
    # Axis by axis: joined into one, experts would have to lie on one device.
    for _ in range(matrices.ndim - 2):
        function = jax.vmap(function)
    return function(matrices, *numbers)


def _whole(x: jax.Array) -> jax.Array:
    """Whole matrices, on a mesh with explicit axes; layers and experts stay apart."""
    # There a product does not choose by itself what it sums over the devices.
    spec = jax.typeof(x).sharding.spec[:-2]
    return reshard(x, PartitionSpec(*spec, None, None))
