"""Clips updates by their norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optaxclip.checks import check_by_name, check_label, check_leaves, own_state
from optaxclip.clipping.rescaling import fits_limit, rescale_scopes
from optaxclip.clipping.responding import (
    RESPONSES,
    Respond,
    band,
    check_respond,
    raise_to,
)
from optaxclip.limits.limit import LimitLike
from optaxclip.norms.measuring import check_ord, measure
from optaxclip.norms.names import Layout, Per, Stacked, Where, layout_of
from optaxclip.norms.scopes import Scopes, check_per, find_scopes
from optaxclip.norms.units import UnitAxis, check_unit_axis
from optaxclip.numerics import increment, next_count, saturating_cast, without_nan


class ClipByNormState(NamedTuple):
    """State of `clip_by_norm`, as `{label: ClipByNormState}`.

    Each array has the shape of the norms: `[]` per tree, `[num_leaves]` per leaf,
    `[num_groups]` per group; per unit it is a tuple with one array a leaf.
    """

    num_steps: jax.Array
    """int32 `[]`: the number of steps so far."""
    norm: Any
    """float32 (float64 if a parameter is): norms of the last step, before the clip;
    +inf where the scope held inf or NaN."""
    limit: Any
    """As `norm`: the limits of the last step; +inf before the first."""
    num_clipped: Any
    """int32: on how many steps so far the norm exceeded its limit."""
    num_nonfinite: Any
    """int32: on how many steps so far the scope held inf or NaN."""
    limit_state: Any
    """State of the limit."""
    target: Any
    """As `norm`: the norms that the response asked for; +inf for those left as they
    were. () for a cap, where they follow from norm and limit."""
    layout: Layout
    """No arrays: the kind of the scopes, so that `metrics` can name them."""

    # What kind of a state it is, for those that read all kinds.
    has_record = False
    has_rules = False
    is_skipping = False

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
    min_norm: LimitLike | None = None,
    respond: Respond = "cap",
    per: Per = "tree",
    where: Where | None = None,
    unit_axis: UnitAxis | None = None,
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
      min_norm: A lower bound: smaller norms, except zero, are scaled up to it. Given as
        `max_norm`, which wins where it is smaller; none where negative, NaN or +inf.
      respond: What becomes of a norm n with the limit c. "cap": `min(n, c)`. "soft":
        `n * c / (n + c)`, smooth. "set": c, also for smaller norms, except zero.
      per: What one norm is taken over. "tree": all leaves. "leaf": each array. "unit":
        each output unit, over all axes but `unit_axis`; a vector is one unit. A
        function from a leaf's name (`"rnn/hh/kernel"`) to that of its group: each
        group.
      where: True for the names of the leaves to measure and clip; others pass through.
      unit_axis: For "unit", the axis that counts output units, or a function of names;
        without stacked axes. By default as in `unit_norms`.
      ord: Order of the norm: any number >= 1, or `math.inf`.
      specs: Inside `jax.shard_map`, the tree (or prefix) of `PartitionSpec`s that the
        parameters have.
      stacked: For a leaf's name, how many of its leading axes run over layers or
        experts (True is 1); each of these arrays then counts as a leaf of its own.
      label: Under which name the state and the metrics appear.

    Returns:
      The transformation, with the state `{label: ClipByNormState}`.

    Raises:
      ValueError: At `init` if `specs`, `stacked` or `unit_axis` does not fit the
        parameters, or in `update` without `params` if the limit needs them.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> clip = optaxclip.clip_by_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> updates, state = clip.update(grads, clip.init(grads))
      >>> print(jnp.round(updates["w"], 3), state["clip"].norm)
      [0.6 0.8] 5.0

    Reference: Pascanu et al., arXiv:1211.5063, section 3.2, algorithm 1; "soft": Bu et
    al., arXiv:2206.07136.
    """
    check_per(per)
    check_ord(ord)
    check_respond(respond)
    check_by_name(where=where, stacked=stacked)
    check_unit_axis(unit_axis)
    check_label(label)
    limit = band(max_norm, min_norm)
    if limit.is_band and respond != "cap":
        raise ValueError(f'a lower bound needs respond="cap", not {respond!r}')
    if unit_axis is not None and per != "unit":
        raise ValueError(f'unit_axis= needs per="unit", not {per!r}')
    is_cap = respond == "cap" and not limit.is_band

    def scopes_of(tree):
        return find_scopes(
            tree, per, specs=specs, stacked=stacked, where=where, unit_axis=unit_axis
        )

    def init(params):
        scopes = scopes_of(params)
        like, _ = jax.eval_shape(lambda: measure(params, scopes, ord))

        sizes = jax.tree.map(lambda n, x: n.astype(x.dtype), scopes.sizes(), like)
        layout = layout_of(params, per, stacked)
        state = first_state(like, limit.init(sizes), layout, has_target=not is_cap)
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
        seen = _cast(norms, state.norm)
        param_norms = None
        if limit.needs_params and params is not None:
            param_norms = _measure_params(params, scopes_of(params), scopes, ord)
            param_norms = _cast(param_norms, seen)
        found, limit_state = limit.update(seen, state.limit_state, param_norms)
        limits, least = found if limit.is_band else (found, None)
        limits = _broadcast(limits, seen)
        targets = jax.tree.map(RESPONSES[respond], norms, excess, limits)
        if least is not None:
            least = _broadcast(least, seen)
            targets = jax.tree.map(raise_to, targets, norms, least, limits)
        fits = jax.tree.map(fits_limit, norms, excess, limits)
        kept = () if is_cap else _cast(targets, seen)
        state = next_state(state, seen, limits, fits, limit_state, kept)
        updates = rescale_scopes(updates, scopes, norms, excess, targets)
        return updates, {label: state}

    return optax.GradientTransformationExtraArgs(init, update)


def first_state(
    like: Any, limit_state: Any, layout: Layout, *, has_target: bool = False
) -> ClipByNormState:
    """The state before the first step, for norms `like` these."""

    def full(value, dtype=None):
        # New arrays on each call: a buffer that appears twice cannot be donated.
        # Sharded, and inside `shard_map` varying, as the norms are.
        return jax.tree.map(lambda norm: jnp.full_like(norm, value, dtype), like)

    return ClipByNormState(
        num_steps=jnp.zeros([], jnp.int32),
        norm=full(0),
        limit=full(jnp.inf),
        num_clipped=full(0, jnp.int32),
        num_nonfinite=full(0, jnp.int32),
        limit_state=limit_state,
        target=full(jnp.inf) if has_target else (),
        layout=layout,
    )


def next_state(
    state: ClipByNormState,
    norms: Any,
    limits: Any,
    fits: Any,
    limit_state: Any,
    targets: Any = (),
) -> ClipByNormState:
    """The state after a step.

    Args:
      state: The state before.
      norms: In the dtypes of the state, as are the limits and the targets.
      limits: One for each norm.
      fits: Whether each norm is at most its limit.
      limit_state: The next one.
      targets: What the response asks for; () for a cap.
    """
    return ClipByNormState(
        num_steps=next_count(state.num_steps),
        norm=jax.tree.map(without_nan, norms),
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
        # Where the limit is NaN the clip gives zeros. No state is to hold NaN.
        target=jax.tree.map(lambda x: jnp.where(jnp.isnan(x), 0, x), targets),
        layout=state.layout,
    )


def _cast(norms: Any, like: Any) -> Any:
    """The norms in the dtypes of others; finite ones stay finite."""
    return jax.tree.map(lambda n, other: saturating_cast(n, other.dtype), norms, like)


def _broadcast(limits: Any, norms: Any) -> Any:
    """The limits in the shapes and dtypes of the norms."""
    return jax.tree.map(
        lambda x, n: jnp.broadcast_to(x, n.shape).astype(n.dtype), limits, norms
    )


def _measure_params(params: Any, own: Scopes, scopes: Scopes, ord: float) -> Any:
    """The norms of the parameters, whose scopes must be those of the updates."""
    if [x.shape for x in own.leaves] != [x.shape for x in scopes.leaves]:
        raise ValueError(
            "the limit compares each scope with its parameters, but params do not have "
            "the leaves of the updates; optax.masked hides leaves"
        )
    return measure(params, own, ord)[0]
