"""Published methods that compare a gradient with the mean of its squares so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.checks import (
    check_label,
    check_length,
    check_number,
    check_transformation,
    own_state,
    with_extra_args,
)
from optaxclip.clipping.by_norm import ClipByNormState
from optaxclip.clipping.rescaling import rescale_scopes
from optaxclip.clipping.responding import cap
from optaxclip.norms.measuring import measure
from optaxclip.norms.names import Stacked, Where, layout_of, leaf_names
from optaxclip.norms.scopes import find_scopes
from optaxclip.numerics import (
    accumulator,
    divide,
    increment,
    is_gradient,
    next_count,
    root_mean_square,
    saturating_cast,
    widen,
)


class SpamState(NamedTuple):
    """State of `spam`."""

    num_steps: jax.Array
    """int32 `[]`: the number of steps so far."""
    rms: Any
    """The tree with, for each leaf that is clipped, the root of the moving average of
    its squares from 0, in float32 or wider; 0 `[]` for any other."""


def spam(
    # The defaults of the published code.
    threshold: ArrayLike = 5000.0,
    *,
    decay: ArrayLike = 0.999,
    warmup: int = 20,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SPAM's clip: cuts each element whose square is far above the mean of its squares.

    Where `g**2 > threshold * v`, g becomes `sign(g) * sqrt(threshold * v)`; then v, the
    moving average of the squares from 0, learns what came out. The method's resets of
    Adam's moments are not part of it.

    The state holds one number for each element, as large as the gradients in float32,
    and each step reads and writes it once. Unlike in the reference, which shares the v
    of its Adam, an element that had no gradient yet is not clipped (there it stays 0
    forever), and inf and NaN are not learned: inf becomes the bound, NaN stays NaN.

    Args:
      threshold: The largest square in units of the mean of the squares, > 0.
      decay: Decay of that mean per step, within (0, 1).
      warmup: The first step that is clipped, counted from 1; at least 2.
      where: True for the names of the leaves to clip; others pass through.

    Returns:
      The transformation, with the state `SpamState`.

    Raises:
      ValueError: At `init` or in `update` if a leaf to clip is complex.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> clip = optaxclip.spam(4.0, decay=0.5, warmup=2)
      >>> state = clip.init(jnp.zeros(2))
      >>> for grads in [jnp.array([1.0, 1.0]), jnp.array([9.0, 1.0])]:
      ...     updates, state = clip.update(grads, state)
      >>> print(updates.round(3))
      [1.414 1.   ]

    Reference: Huang et al., arXiv:2501.06842, section 4.2.
    """
    check_number("threshold", threshold, lambda x: x > 0, "> 0")
    check_number("decay", decay, lambda x: 0 < x < 1, "within (0, 1)")
    warmup = check_length("warmup", warmup, 2)

    def chosen(tree):
        flags = []
        for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
            is_clipped = is_gradient(leaf) and (where is None or bool(where(name)))
            if is_clipped and jnp.iscomplexobj(leaf):
                raise ValueError(f"spam cannot clip complex values: {name!r}")
            flags.append(is_clipped)
        return jax.tree.unflatten(jax.tree.structure(tree), flags)

    def init(params):
        def zeros(is_clipped, x):
            if not is_clipped:
                return jnp.zeros([])
            return jnp.zeros_like(x, dtype=accumulator([x]))

        rms = jax.tree.map(zeros, chosen(params), params)
        return SpamState(num_steps=jnp.zeros([], jnp.int32), rms=rms)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        is_warmup = state.num_steps + 1 < warmup

        def clip(is_clipped, x, rms):
            if not is_clipped:
                return x, rms
            x = jnp.asarray(x)
            factor = jnp.sqrt(jnp.asarray(threshold, rms.dtype))
            has_none = is_warmup | (rms == 0)
            bound = jnp.where(has_none, jnp.inf, factor * rms)
            wide = widen(x, rms.dtype)
            clipped = jnp.clip(wide, -bound, bound)
            rate = jnp.asarray(1 - decay, rms.dtype)
            learned = root_mean_square(rms, jnp.abs(clipped), rate)
            learned = jnp.where(jnp.isfinite(wide), learned, rms)
            return clipped.astype(x.dtype), learned

        flags = jax.tree.leaves(chosen(updates))
        leaves, structure = jax.tree.flatten(updates)
        pairs = list(map(clip, flags, leaves, jax.tree.leaves(state.rms)))
        updates, rms = (
            jax.tree.unflatten(structure, [pair[i] for pair in pairs]) for i in (0, 1)
        )
        return updates, SpamState(next_count(state.num_steps), rms)

    return optax.GradientTransformationExtraArgs(init, update)


def stable_adam(
    inner: optax.GradientTransformation,
    *,
    max_rms: ArrayLike = 1.0,
    # Those of Adam in Optax.
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    where: Where | None = None,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "clip",
) -> optax.GradientTransformationExtraArgs:
    """StableAdamW's clip: smaller updates where Adam's second moments lag behind.

    With `rms = sqrt(mean(g**2 / max(v, eps**2)))` of each array, for the gradient g and
    Adam's bias-corrected second moment v, its update is divided by `max(1, rms /
    max_rms)`. `block_rms()` behind Adam is another method: it measures Adam's update,
    which a large gradient does not enlarge while v lags.

    Args:
      inner: An Adam-like transformation: one of its states has the fields `nu`, a tree
        like the parameters, and `count`. As in the paper, `optax.adamw(...)` as a
        whole, or `optax.scale_by_adam()` alone, so that weight decay is not scaled.
        Leaves that `optax.masked` or `partition` hides from it are not clipped.
      max_rms: The largest `rms` whose update is left as it is, > 0.
      b2: The decay of `nu`, as given to `inner`.
      eps: The least root of v that counts, > 0.
      where: A common argument, see `help(optaxclip)`.
      specs: Likewise.
      stacked: Likewise.
      label: Likewise.

    Returns:
      The transformation, with the state `({label: ClipByNormState}, inner_state)`. In
      it `norm` is `rms`, and `limit` is `max_rms`.

    Raises:
      ValueError: At `init` if `inner` has no such state, or several.

    Example:
      >>> import optax, optaxclip
      >>> tx = optaxclip.stable_adam(optax.adamw(1e-3, b2=0.95), b2=0.95)

    Reference: Wortsman et al., arXiv:2304.13013, section 3.4, algorithm 2.
    """
    check_transformation("inner", inner)
    check_number("max_rms", max_rms, lambda x: x > 0, "> 0")
    check_number("b2", b2, lambda x: 0 < x < 1, "within (0, 1)")
    check_number("eps", eps, lambda x: x > 0, "> 0")
    check_label(label)
    inner = with_extra_args(inner)

    def scopes_of(tree):
        return find_scopes(tree, "leaf", specs=specs, stacked=stacked, where=where)

    def init(params):
        inner_state = inner.init(params)
        nu, _ = _second_moments(inner_state, params)
        scopes = scopes_of(_measured(params, nu))
        like, _ = jax.eval_shape(lambda: measure(params, scopes, 2))
        state = ClipByNormState(
            num_steps=jnp.zeros([], jnp.int32),
            norm=jnp.zeros_like(like),
            limit=jnp.full_like(like, jnp.inf),
            num_clipped=jnp.zeros_like(like, jnp.int32),
            num_nonfinite=jnp.zeros_like(like, jnp.int32),
            limit_state=(),
            target=(),
            layout=layout_of(params, "leaf", stacked),
        )
        return {label: state}, inner_state

    def update(updates, state, params=None, **extra_args):
        own, inner_state = state
        before = own_state(own, label, ClipByNormState)
        moved, inner_state = inner.update(updates, inner_state, params, **extra_args)
        nu, count = _second_moments(inner_state, updates)
        updates = _measured(updates, nu)
        scopes = scopes_of(updates)
        ratios = jax.tree.map(_ratio_to(count, b2, eps), updates, nu)
        norms, excess = measure(ratios, scopes, 2)
        roots = jnp.sqrt(jnp.maximum(scopes.sizes(), 1)).astype(norms.dtype)
        rms = norms / roots
        limit = jnp.full_like(rms, max_rms)
        target = cap(rms, excess, limit)
        state = ClipByNormState(
            num_steps=next_count(before.num_steps),
            norm=saturating_cast(rms, before.norm.dtype),
            limit=limit.astype(before.limit.dtype),
            num_clipped=increment(
                before.num_clipped, jnp.isfinite(rms) & (target < jnp.inf)
            ),
            num_nonfinite=increment(before.num_nonfinite, ~jnp.isfinite(rms)),
            limit_state=(),
            target=(),
            layout=before.layout,
        )
        moved = rescale_scopes(moved, scopes, rms, excess, target)
        return moved, ({label: state}, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _ratio_to(count: jax.Array, b2: ArrayLike, eps: ArrayLike) -> Any:
    """g, v -> |g| / max(sqrt(v), eps), with the bias correction of v."""

    def ratio(g, v):
        if not is_gradient(g):
            return g
        dtype = accumulator([g])
        rate = jnp.asarray(1 - b2, dtype)
        weight = -jnp.expm1(count.astype(dtype) * jnp.log1p(-rate))
        root = jnp.sqrt(jnp.abs(v).astype(dtype) / weight)
        root = jnp.maximum(root, jnp.asarray(eps, dtype))
        return divide(jnp.abs(widen(jnp.asarray(g), dtype)), root)

    return ratio


def _measured(tree: Any, nu: Any) -> Any:
    """The tree with integers in place of leaves that Adam does not see."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_hidden)
    pairs = zip(leaves, jax.tree.leaves(nu, is_leaf=_is_hidden), strict=True)
    return structure.unflatten(
        [0 if _is_hidden(v) and not _is_hidden(x) else x for x, v in pairs]
    )


def _is_hidden(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _second_moments(state: Any, like: Any) -> tuple[Any, Any]:
    """`nu` and `count` of the only Adam in a state; the error of none or several."""

    def is_adam(x):
        return hasattr(x, "nu") and hasattr(x, "count")

    found = [x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)]
    # A `MaskedNode` stands for a leaf that is hidden, here or from Adam alone.
    structure = jax.tree.structure(like, is_leaf=_is_hidden)
    found = [
        x for x in found if jax.tree.structure(x.nu, is_leaf=_is_hidden) == structure
    ]
    if len(found) != 1:
        raise ValueError(
            "inner must have one state with second moments nu of all parameters and "
            f"count, as optax.scale_by_adam has; found {len(found)}"
        )
    return found[0].nu, found[0].count
