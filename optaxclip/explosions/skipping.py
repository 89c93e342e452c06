"""Skips exploded steps, cools down, and rolls back.

Internal but for `skip_explosions`. `deciding.decide` says whether a step is skipped;
the rest is here. `_accept` clips what is accepted, and makes the rules forget what is
skipped; `_apply` runs the inner optimizer, or keeps its state; `_cool_down` scales its
updates; `_skip_or_roll_back` makes them zero, or the way to a snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from optaxclip.checks import (
    check_label,
    check_structure,
    check_transformation,
    own_state,
    with_extra_args,
)
from optaxclip.clipping.rescaling import limit_updates
from optaxclip.explosions.carried import first_carried, pack_carried, unpack_carried
from optaxclip.explosions.counting import count_response
from optaxclip.explosions.deciding import Decision, decide
from optaxclip.explosions.detecting import make_detection
from optaxclip.explosions.moments import drop_overflow, mend_moments
from optaxclip.explosions.rules import LOSS_LIMIT, MAX_GAP, NORM_LIMIT, SHARE_LIMIT
from optaxclip.explosions.selecting import update_or_keep
from optaxclip.explosions.settings import check_settings
from optaxclip.explosions.snapshots import (
    check_can_roll_back,
    compare_with_snapshot,
    empty_snapshots,
    go_back,
    is_on_host,
    move_snapshots,
    way_back,
)
from optaxclip.explosions.state import (
    COUNTS,
    NUM_SKIPPED,
    DetectExplosionsState,
    SkipExplosionsState,
    Snapshots,
    Verdict,
)
from optaxclip.limits.limit import LimitLike
from optaxclip.norms.names import Stacked
from optaxclip.norms.scopes import find_scopes
from optaxclip.numerics import is_gradient, scale
from optaxclip.recording import WINDOW


def skip_explosions(
    inner: optax.GradientTransformation,
    *,
    norm: LimitLike | None = NORM_LIMIT,
    share: LimitLike | None = SHARE_LIMIT,
    loss: LimitLike | None = LOSS_LIMIT,
    # More than the 3 to 5 that start a trial: a row is tried before it is taken.
    max_consecutive: int = 10,
    cool_down: ArrayLike | None = None,
    # A cut to 1/10 is back after 462 healthy steps, one to 1/64 after 834.
    recovery: ArrayLike = 1.005,
    rollback: bool | Literal["host"] = False,
    # A rollback loses 50 to 100 steps; 1/50 of the parameters is copied per step.
    snapshot_every: int = 50,
    rollback_after: int = 3,
    give_up_after: int = 100,
    max_gap: int = MAX_GAP,
    window: int = WINDOW,
    specs: Any = None,
    stacked: Stacked | None = None,
    columns: Sequence[str] = (),
    label: str = "explosions",
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer: skips the steps that explode.

    A step is skipped if `detect_explosions` would notice an explosion, unless the share
    of a leaf alone exceeds its limit, or the loss alone is non-finite. The updates are
    zeros, the inner state stays, bit for bit, and the rules learn nothing from it.
    Explosions that persist, or recur as outliers, are taken in the end, clipped to the
    limit on the norm, and so is a norm alone that is an outlier. A step with non-finite
    gradients is never taken; after `give_up_after` in a row the run is given up. All of
    it step by step, and what goes where in a trainer, is in
    `help(optaxclip.explosions)`.

    Updates that `inner` makes non-finite out of finite gradients become 0. They are not
    counted: another read of every update can cost more than the step. To count them,
    pass `chain(optimizer, detect_explosions(label="updates"))` as `inner`.

    The update of a rollback is `snapshot - params`, and it has to be applied as it is:
    put `skip_explosions` around everything that changes updates. It needs the memory of
    two copies of the parameters; with `rollback="host"` that of the host (of the kind
    "pinned_host"), and on the device as much as the gradients, because the updates are
    stored before they are applied. That needs JAX 0.10, and has been run on CPUs only.

    Args:
      inner: The optimizer; it gets all extra arguments.
      norm: As in `detect_explosions`.
      share: Likewise; what it alone notices is not skipped.
      loss: As in `detect_explosions`.
      max_consecutive: From which explosion in a row on they are taken; at least 1, 10
        by default.
      cool_down: The factor by which a rollback reduces the updates, within (0, 1]; None
        for off. Without `rollback`, the `rollback_after`-th explosion in a row reduces
        them.
      recovery: Growth of the factor in a healthy step, up to 1; >= 1, 1.005 by default.
      rollback: Whether to roll back; `update` then needs `params`. "host" keeps the
        snapshots in the memory of the host.
      snapshot_every: Number of healthy steps between snapshots; at least 1, 50 by
        default. From 10 on, a loss that rises slowly is noticed too.
      rollback_after: How many losses above their limit in a row (norms where there is
        no rule on the loss) start the trial of a snapshot; at least 1, 3 by default,
        because one or two are often the fault of their batches. Up to two more where
        outliers recur, and three more early, where the limit may be low by chance.
      give_up_after: How many non-finite steps in a row end the run; at least 1, 100 by
        default. A dynamic loss scale needs up to 24 to fall from 2**24 to 1.
      max_gap: As in `detect_explosions`.
      window: As in `detect_explosions`.
      specs: A common argument, see `help(optaxclip)`.
      stacked: Likewise.
      columns: Likewise.
      label: Likewise.

    Returns:
      The transformation, with the state `{label: SkipExplosionsState}`.

    Raises:
      ValueError: In `update` without `params` if there is a rollback, or if `inner`
        changes the structure of its state; in `init` if a platform gives no memory of
        its host.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.skip_explosions(optax.adam(1e-3))
      >>> params, grads = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, jnp.nan])}
      >>> updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
      >>> print(updates["w"], optaxclip.metrics(state)["explosions/skipped_fraction"])
      [0. 0.] 1.0
    """
    detection = make_detection(
        norm,
        share,
        loss,
        specs,
        stacked,
        columns,
        max_gap=max_gap,
        window=window,
        num_skipped=NUM_SKIPPED,
    )
    settings = check_settings(
        max_consecutive=max_consecutive,
        rollback_after=rollback_after,
        give_up_after=give_up_after,
        snapshot_every=snapshot_every,
        cool_down=cool_down,
        recovery=recovery,
        rollback=rollback,
    )
    on_host = rollback == "host"
    check_label(label)
    check_transformation("inner", inner)
    inner = with_extra_args(inner)

    def init(params):
        return {
            label: SkipExplosionsState(
                explosions=detection.init(params),
                inner_state=inner.init(params),
                carried=first_carried(),
                snapshots=empty_snapshots(params, on_host=on_host) if rollback else (),
            )
        }

    def update(updates, state, params=None, **extra_args):
        state = own_state(state, label, SkipExplosionsState)
        if rollback:
            check_can_roll_back(state.snapshots, params, on_host=on_host)
        before = state.explosions
        explosions, seen = detection.update(updates, extra_args, before, params)
        # Found anew in each trace: the updates may be wider than the parameters.
        scopes = find_scopes(updates, "leaf", specs=specs, stacked=stacked)
        now = COUNTS.unpack(explosions.record.counts)
        carried = unpack_carried(state.carried)
        compared = compare_with_snapshot(
            settings, seen, now, carried.rise, state.snapshots, params, updates, scopes
        )
        steps = before.counts.steps
        is_spoiled, mended = mend_moments(
            steps, state.inner_state, updates, params, scopes, inner.init
        )
        decision = decide(settings, seen, now, carried, compared, is_spoiled)
        updates, explosions = _accept(decision, seen, updates, explosions, before)
        is_skipped_after_copies, snapshots = move_snapshots(
            decision, steps, params, state.snapshots
        )
        updates, inner_state = _apply(
            lambda x: inner.update(updates, x, params, **extra_args),
            state.inner_state,
            is_skipped_after_copies,
            mended,
        )
        # Without it the updates are not touched, not even by a factor of 1.
        if cool_down is not None:
            updates = _cool_down(updates, decision.carried.scale)
        updates = drop_overflow(updates, params)
        updates = _skip_or_roll_back(
            updates, params, decision, is_skipped_after_copies, snapshots
        )
        explosions = count_response(explosions, seen, decision, is_skipped_after_copies)
        carried = pack_carried(decision.carried)
        state = SkipExplosionsState(explosions, inner_state, carried, snapshots)
        return updates, {label: state}

    return optax.GradientTransformationExtraArgs(init, update)


def _accept(
    decision: Decision,
    seen: Verdict,
    updates: Any,
    explosions: DetectExplosionsState,
    before: DetectExplosionsState,
) -> tuple[Any, DetectExplosionsState]:
    """Limits what is accepted, and makes the rules forget what is skipped."""

    def keep(new, old):
        return jnp.where(decision.is_skipped, old, new)

    # What comes of bad parameters would soon look healthy. Not `update_or_keep`: these
    # are few numbers, and nothing is saved.
    kept = jax.tree.map(keep, explosions.rule_states, before.rule_states)
    # An accepted step may be a thousand times too large; at the limit it is usual.
    updates = limit_updates(updates, decision.is_accepted, seen.norm, seen.norm_limit)
    return updates, explosions._replace(rule_states=kept)


def _apply(
    update: Callable[[Any], tuple[Any, Any]],
    inner_state: Any,
    is_skipped: jax.Array,
    mended: Any,
) -> tuple[Any, Any]:
    """Runs the inner optimizer; its state stays, but mended, if the step is skipped."""

    def update_inner(inner_state):
        updates, new = update(inner_state)
        check_structure(inner_state, new)
        return updates, new

    return update_or_keep(update_inner, inner_state, is_skipped, mended)


def _cool_down(updates: Any, factor: jax.Array) -> Any:
    """Scales the updates by the factor of the last rollbacks."""

    def cool(u):
        if not is_gradient(u):
            return u
        u = jnp.asarray(u)  # it may be a Python number, or NumPy's float64
        return scale(u, factor.astype(u.real.dtype))

    return jax.tree.map(cool, updates)


def _skip_or_roll_back(
    updates: Any,
    params: Any,
    decision: Decision,
    is_skipped: jax.Array,
    snapshots: Snapshots | tuple[()],
) -> Any:
    """Makes updates 0 if the step is skipped, or the way to the snapshot."""

    def skip(u, param=None, snapshot=None):
        if not is_gradient(u):
            return u
        # Not a product with 0, which NaN would survive.
        if_skipped = jnp.zeros_like(u)
        if snapshot is not None:
            way = way_back(u, jnp.asarray(param), snapshot)
            if_skipped = lax.select(decision.is_at_snapshot, way, if_skipped)
        return lax.select(is_skipped, if_skipped, u)

    if not isinstance(snapshots, Snapshots):
        return jax.tree.map(skip, updates)
    if not is_on_host(snapshots.older):
        return jax.tree.map(skip, updates, params, snapshots.older)
    # A select would fetch the snapshot in every step.
    updates = jax.tree.map(skip, updates)
    return go_back(decision.is_at_snapshot, updates, params, snapshots.older)
