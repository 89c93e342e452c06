"""Skips exploded steps, cools down, and rolls back.

`deciding.decide` says whether a step is skipped, on the verdict of `detecting` and on
whether `moments.mend_moments` found any to mend. Then `responding.unlearn` takes back
what the rules learned, `selecting.update_or_keep` keeps the state of the inner
optimizer, and `responding.respond` makes the updates zero, or the way to a snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.checks import (
    check_label,
    check_structure,
    check_transformation,
    own_state,
    with_extra_args,
)
from optaxclip.clipping.rescaling import limit_updates
from optaxclip.explosions.deciding import FIRST, carried_of, decide, numbers_of
from optaxclip.explosions.detecting import make_detection
from optaxclip.explosions.moments import mend_moments
from optaxclip.explosions.responding import (
    check_trial,
    count_response,
    move_snapshots,
    respond,
    unlearn,
)
from optaxclip.explosions.rules import LOSS_LIMIT, MAX_GAP, NORM_LIMIT, SHARE_LIMIT
from optaxclip.explosions.selecting import update_or_keep
from optaxclip.explosions.settings import check_settings
from optaxclip.explosions.snapshots import (
    check_is_on_host,
    empty_snapshots,
)
from optaxclip.explosions.state import (
    CARRIED,
    COUNTS,
    NUM_SKIPPED,
    SkipExplosionsState,
    with_skipped,
    with_values,
)
from optaxclip.limits.limit import LimitLike
from optaxclip.norms.names import Stacked
from optaxclip.norms.scopes import find_scopes
from optaxclip.recording import WINDOW


def skip_explosions(
    inner: optax.GradientTransformation,
    *,
    norm: LimitLike | None = NORM_LIMIT,
    share: LimitLike | None = SHARE_LIMIT,
    loss: LimitLike | None = LOSS_LIMIT,
    max_consecutive: int = 10,
    cool_down: ArrayLike | None = None,
    recovery: ArrayLike = 1.005,
    rollback: bool | Literal["host"] = False,
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

    A step is skipped if `detect_explosions` would notice an explosion, unless the loss
    alone is non-finite: the updates are zeros, the inner state stays, bit for bit, and
    the rules learn nothing from it. From the `max_consecutive`-th explosion in a row
    on, finite ones are taken as a change of regime. The first of a row, with a norm of
    at most ten times its limit, is taken too if two others came in the 128 steps
    before, early in a run if one did. Where such a step is taken, a norm above its
    limit is clipped to it. A step with non-finite gradients is never taken; after
    `give_up_after` in a row the run is given up. `help(optaxclip.explosions)` says all
    of this step by step, what `rollback` and `cool_down` add, and what goes where in a
    trainer.

    Updates that `inner` makes non-finite out of finite gradients become 0. They are not
    counted: another read of every update can cost more than the step. To count them,
    pass `chain(optimizer, detect_explosions(label="updates"))` as `inner`.

    The update of a rollback is `snapshot - params`, and it has to be applied as it is:
    put `skip_explosions` around everything that changes updates. It needs the memory of
    two copies of the parameters; with `rollback="host"` that of the host, of the kind
    "pinned_host". Then one copy goes there every `snapshot_every` healthy steps and
    where a trial starts, and one comes back in each step of a trial, of non-finite
    gradients, and in up to 16 before a snapshot is due if the loss has risen; in all
    other steps nothing travels. But the updates are stored before they are applied,
    which takes as much memory as the gradients. It needs JAX 0.10, and has been run on
    CPUs only.

    Args:
      inner: The optimizer; it gets all extra arguments.
      norm: As in `detect_explosions`.
      share: As in `detect_explosions`.
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
        outliers recur.
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
        inner_state = inner.init(params)
        snapshots = empty_snapshots(params, on_host=on_host) if rollback else ()
        return {
            label: SkipExplosionsState(
                explosions=detection.init(params),
                inner_state=inner_state,
                carried=jnp.array(FIRST, jnp.float32),
                snapshots=snapshots,
            )
        }

    def update(updates, state, params=None, **extra_args):
        state = own_state(state, label, SkipExplosionsState)
        if on_host:
            check_is_on_host(state.snapshots)
        if rollback and params is None:
            raise ValueError(
                "a rollback is an update from the parameters: call "
                "update(updates, state, params) with params, or give rollback=False"
            )
        explosions, seen = detection.update(
            updates, extra_args, state.explosions, params
        )
        # Found anew in each trace: the updates may be wider than the parameters.
        scopes = find_scopes(updates, "leaf", specs=specs, stacked=stacked)
        now = COUNTS.unpack(explosions.record.counts)
        carried = carried_of(CARRIED.unpack(state.carried))
        is_away, is_broken, pull = check_trial(
            state, seen, now, params, updates, scopes, carried.rise, settings
        )
        is_spoiled, kept = mend_moments(
            state.explosions.counts.steps,
            state.inner_state,
            updates,
            params,
            scopes,
            inner.init,
        )
        decision = decide(settings, seen, now, carried, is_away, is_spoiled, pull)
        explosions = unlearn(explosions, state.explosions, decision.is_skipped)
        # An accepted step may be a thousand times too large; at the limit it is usual.
        updates = limit_updates(
            updates, decision.is_accepted, seen.norm, seen.norm_limit
        )
        is_skipped, snapshots = move_snapshots(decision, state, params)

        def update_inner(inner_state):
            found, new = inner.update(updates, inner_state, params, **extra_args)
            check_structure(inner_state, new)
            return found, new

        updates, inner_state = update_or_keep(
            update_inner, state.inner_state, is_skipped, kept
        )
        # Without it the updates are not touched, not even by a factor of 1.
        factor = decision.carried.scale if cool_down is not None else None
        updates = respond(updates, params, decision, is_skipped, snapshots, factor)
        explosions = with_skipped(explosions, seen.event, now["skipped"], is_skipped)
        counts = count_response(now, decision, is_spoiled, is_broken)
        state = SkipExplosionsState(
            explosions=with_values(explosions, counts),
            inner_state=inner_state,
            carried=CARRIED.pack(numbers_of(decision.carried)),
            snapshots=snapshots,
        )
        return updates, {label: state}

    return optax.GradientTransformationExtraArgs(init, update)
