"""StableAdamW's clip: gradients beside Adam's second moments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.checks import (
    check_by_name,
    check_label,
    check_number,
    check_transformation,
    own_state,
    with_extra_args,
)
from optaxclip.clipping.by_norm import ClipByNormState, first_state, next_state
from optaxclip.clipping.rescaling import rescale_scopes
from optaxclip.clipping.responding import cap
from optaxclip.norms.measuring import measure
from optaxclip.norms.names import Stacked, Where, layout_of
from optaxclip.norms.scopes import find_scopes
from optaxclip.numerics import (
    accumulator,
    divide,
    is_gradient,
    saturating_cast,
    widen,
)


def stable_adam(
    inner: optax.GradientTransformation,
    *,
    # The 1 of `max(1, RMS_t)` in arXiv:2304.13013, algorithm 2.
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
      inner: An Adam-like transformation: one of its states has the fields `nu`, the
        second moments of all elements, and `count`. As in the paper, `optax.adamw(...)`
        as a whole, or `optax.scale_by_adam()` alone, so that weight decay is not
        scaled. Not Adamax: its `nu` is no second moment, which nothing can check.
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
    check_by_name(where=where, stacked=stacked)
    check_label(label)
    inner = with_extra_args(inner)

    def scopes_of(tree):
        return find_scopes(tree, "leaf", specs=specs, stacked=stacked, where=where)

    def init(params):
        inner_state = inner.init(params)
        nu, _ = _second_moments(inner_state, params)
        scopes = scopes_of(_measured(params, nu))
        like, _ = jax.eval_shape(lambda: measure(params, scopes, 2))
        state = first_state(like, (), layout_of(params, "leaf", stacked))
        return {label: state}, inner_state

    def update(updates, state, params=None, **extra_args):
        if not isinstance(state, tuple) or len(state) != 2:
            raise ValueError(f"state must be what init gave, a pair, not {state}")
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
        dtype = before.norm.dtype
        state = next_state(
            before,
            saturating_cast(rms, dtype),
            limit.astype(dtype),
            ~(target < jnp.inf),
            (),
        )
        # The parameters, and so the updates made for them, may be wider.
        dtype = accumulator(jax.tree.leaves((moved, rms)))
        rms, excess, target = (x.astype(dtype) for x in (rms, excess, target))
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
        # An Adam that has not begun, as under accumulation, has no moments to lag.
        has_begun = count > 0
        square = jnp.abs(v).astype(dtype) / jnp.where(has_begun, weight, 1)
        root = jnp.where(has_begun, jnp.sqrt(square), jnp.inf)
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


def _is_belief(x: Any) -> bool:
    return isinstance(x, optax.ScaleByBeliefState)


def _fits(nu: Any, like: Any) -> bool:
    """Whether there is a second moment of each element; NovoGrad has one of a leaf."""

    def fits(v, x):
        return _is_hidden(v) or not is_gradient(x) or jnp.shape(v) == jnp.shape(x)

    return jax.tree.all(jax.tree.map(fits, nu, like, is_leaf=_is_hidden))


def _second_moments(state: Any, like: Any) -> tuple[Any, Any]:
    """`nu` and `count` of the only Adam in a state; the error of none or several."""

    def is_adam(x):
        # Every tuple has a method of the name "count".
        has_count = hasattr(x, "count") and not callable(x.count)
        # That of AdaBelief is the variance around the mean.
        return has_count and hasattr(x, "nu") and not _is_belief(x)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)]
    found = [(_expanded(x.nu, like), x.count) for x in found]
    found = [(nu, count) for nu, count in found if nu is not None and _fits(nu, like)]
    if len(found) != 1:
        raise ValueError(
            "inner must have one state with second moments nu of all parameters and "
            f"count, as optax.scale_by_adam has; found {len(found)}"
        )
    return found[0]


def _expanded(nu: Any, like: Any) -> Any:
    """`nu` with a `MaskedNode` for each leaf that it hides; None if it does not fit."""

    def expand(v, subtree):
        # It may stand for a whole subtree.
        hidden = jax.tree.map(lambda _: v, subtree, is_leaf=_is_hidden)
        return hidden if _is_hidden(v) else v

    try:
        found = jax.tree.map(expand, nu, like, is_leaf=_is_hidden)
    except (ValueError, TypeError):  # of a tree with another structure
        return None
    structures = (jax.tree.structure(x, is_leaf=_is_hidden) for x in (found, like))
    return found if len(set(structures)) == 1 else None
