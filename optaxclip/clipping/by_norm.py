"""Clips updates by their norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from optaxclip.checks import check_label, check_leaves, own_state
from optaxclip.clipping.rescaling import clip_factor, fits_limit, power_of_two, rescale
from optaxclip.limits.limit import LimitLike, as_limit
from optaxclip.norms.measuring import check_ord, measure
from optaxclip.norms.names import Layout, Per, Stacked, layout_of
from optaxclip.norms.scopes import check_per, find_scopes
from optaxclip.numerics import increment, next_count, saturating_cast, widen


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

    @property
    def runs(self) -> tuple[int, ...]:
        """The axes of several runs, as `jax.vmap` stacks them; () for one."""
        return np.shape(self.num_steps)

    @property
    def read_by_metrics(self) -> ClipByNormState:
        """The state without what `metrics` does not read."""
        return self._replace(limit_state=())


Bound = ArrayLike | Callable[[jax.Array], ArrayLike]


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
      ValueError: At `init` if `specs` or `stacked` does not fit the parameters, or in
        `update` without `params` if the limit needs them.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> clip = optaxclip.clip_by_norm(1.0)
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
        fits = jax.tree.map(fits_limit, norms, excess, limits)
        state = ClipByNormState(
            num_steps=next_count(state.num_steps),
            norm=seen,
            limit=limits,
            num_clipped=jax.tree.map(
                lambda total, fit, n: increment(total, ~fit & jnp.isfinite(n)),
                state.num_clipped,
                fits,
                norms,
            ),
            num_nonfinite=jax.tree.map(
                lambda total, n: increment(total, ~jnp.isfinite(n)),
                state.num_nonfinite,
                norms,
            ),
            limit_state=limit_state,
            layout=state.layout,
        )
        pre = jax.tree.map(power_of_two, norms, limits)
        post = jax.tree.map(clip_factor, norms, excess, limits, fits, pre)

        def clip(x, leaf, *numbers):
            if not leaf.is_gradient:
                return x
            # Without the barrier XLA shares the conversion of a bfloat16 leaf with the
            # norm, and stores the whole leaf in float32.
            x = lax.optimization_barrier(jnp.asarray(x))
            return rescale(widen(x, numbers[0].dtype), *numbers).astype(x.dtype)

        leaves, structure = jax.tree.flatten(updates)
        numbers = map(scopes.spread, (pre, post, norms, excess, limits))
        leaves = map(clip, leaves, scopes.leaves, *numbers)
        return jax.tree.unflatten(structure, leaves), {label: state}

    return optax.GradientTransformationExtraArgs(init, update)
