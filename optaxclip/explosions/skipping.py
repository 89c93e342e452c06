"""Skips exploded steps, cools down, and rolls back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.checks import (
    check_label,
    check_length,
    check_number,
    check_structure,
    check_transformation,
    own_state,
    takes_value,
    value_of,
)
from optaxclip.clipping.rescaling import limit_updates
from optaxclip.explosions.deciding import Cooling, Settings, decide, is_look_in
from optaxclip.explosions.detecting import Detector
from optaxclip.explosions.moments import are_spoiled, mend
from optaxclip.explosions.rules import LOSS_LIMIT, MAX_GAP, NORM_LIMIT, SHARE_LIMIT
from optaxclip.explosions.selecting import update_or_keep
from optaxclip.explosions.snapshots import compare, move, snapshot_of, widen_snapshots
from optaxclip.explosions.state import (
    BROKEN,
    COUNTS,
    SkipExplosionsState,
    Snapshots,
    count,
    with_values,
)
from optaxclip.limits.limit import LimitLike
from optaxclip.norms.names import Stacked
from optaxclip.numerics import add, is_gradient, scaled
from optaxclip.recording import WINDOW
from optaxclip.xla import once, side_by_side

CHECK_EVERY = 3
"""Steps between two looks at the moments of the inner state. Each look reads them once
more, and until the next one an element that is not finite stands still."""


def skip_explosions(
    inner: optax.GradientTransformation,
    *,
    norm: LimitLike | None = NORM_LIMIT,
    share: LimitLike | None = SHARE_LIMIT,
    loss: LimitLike | None = LOSS_LIMIT,
    max_consecutive: int = 10,
    cool_down: ArrayLike | None = None,
    recovery: ArrayLike = 1.005,
    rollback: bool = False,
    snapshot_every: int = 50,
    rollback_after: int = 3,
    give_up_after: int = 100,
    max_gap: int = MAX_GAP,
    window: int = WINDOW,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "explosions",
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer: skips the steps that explode.

    A step is skipped if `detect_explosions` would notice an explosion: the updates are
    zeros, the inner state stays, bit for bit, and the rules learn nothing from it. A
    loss that is not finite while the gradients are is counted, and its step is taken.
    If explosions persist, that is a change of regime: from the `max_consecutive`-th in
    a row on the finite ones are taken and learned, with gradients clipped to the limit
    on the norm, until the rules find them usual. A non-finite step is never taken;
    after `give_up_after` in a row the run is given up, as `metrics` and
    `raise_if_exploded` say; with `rollback` at once where the parameters are NaN. Where
    `inner` itself makes something that is not finite, or an update would overflow the
    dtype of its parameter, those elements become 0. Where what it made stands in its
    moments, and so would stay, the inner state goes back to the snapshot's within 3
    steps, without rollback those moments to 0; that is an explosion too, and its step
    is skipped (`explosions/mended`).

    Put it around `optax.MultiSteps`, so that a bad micro-batch alone is lost. Within
    it, NaN would stay in what is accumulated, which `raise_if_exploded` tells; that
    needs `should_skip_update_fn=optax.skip_not_finite`.

    Two more responses are off unless asked for.

    To roll back: skipped steps leave the parameters as they are, so when the loss (the
    norm, if no loss is given) exceeds its limit `rollback_after` times in a row, these
    are no odd batches: the data have changed, or the parameters are bad. To tell which,
    parameters and inner state go back to those of a quiet step, `snapshot_every` to
    `2 * snapshot_every` quiet steps ago, for two batches. If the excess is gone, or at
    least half of it, that is the rollback; if not, they come back as they were, and the
    explosions are accepted. Ten non-finite steps in a row do the same. The update is
    `snapshot - params`, twice, so that rounding does not matter: it has to be applied
    as it is. So put `skip_explosions` around everything that changes updates, also
    `optax.contrib.schedule_free`; behind a learning rate of its own, as in
    `chain(skip_explosions(scale_by_adam()), scale(-1e-3))`, it undoes nothing, which
    `explosions/blocked_rollbacks` counts and `explain` tells. That takes the memory
    of two copies of both, and on healthy steps one read of one copy of the parameters.
    What the optimizer has learned goes back; what the user or the clock decides stays:
    the counts of schedules, the `hyperparams` of `optax.inject_hyperparams`, random
    keys, and records. The first snapshot is of what the first step is given, so that
    the moments of a run without `skip_explosions` may be put in before it:
    `state[label] = state[label]._replace(inner_state=saved)`.

    To cool down: a rollback within the first 64 steps reduces the updates to
    `cool_down`, a later one to 1/16 at most, since the steps were right for some time;
    one that follows another within 300 steps by 1/8, to `cool_down` or less, down to
    1/4096. Each quiet step multiplies that factor by `recovery`, up to 1. Without
    rollback, the `rollback_after`-th explosion in a row multiplies it by `cool_down`.

    Args:
      inner: The optimizer; it gets all extra arguments.
      norm: As in `detect_explosions`.
      share: As in `detect_explosions`.
      loss: As in `detect_explosions`.
      max_consecutive: From which explosion in a row on they are taken; at least 1.
      cool_down: The factor of the updates, within (0, 1]; None for off.
      recovery: Growth of that factor in a quiet step, >= 1.
      rollback: Whether to roll back; `update` then needs `params`.
      snapshot_every: Number of quiet steps between snapshots, at least 1.
      rollback_after: How many explosions in a row make a rollback, at least 1. One or
        two are often the fault of their batches.
      give_up_after: How many non-finite steps in a row end the run, at least 1. A
        dynamic loss scale needs up to 24 to fall from 2**24 to 1.
      max_gap: As in `detect_explosions`.
      window: As in `detect_explosions`.
      specs: As in `detect_explosions`.
      stacked: As in `clip_by_norm`.
      label: Under which name the state and the metrics appear.

    Returns:
      The transformation, with the state `{label: SkipExplosionsState}`.

    Raises:
      ValueError: If an argument is out of range; in `update` if `value` has axes, or
        without `params` where they are needed.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.skip_explosions(optax.adam(1e-3))
      >>> params, grads = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, jnp.nan])}
      >>> updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
      >>> print(updates["w"], optaxclip.metrics(state)["explosions/skipped"])
      [0. 0.] 1.0
    """
    detector = Detector(
        norm, share, loss, specs, stacked, max_gap=max_gap, window=window
    )
    check_number("recovery", recovery, lambda x: x >= 1, ">= 1")
    if cool_down is not None:
        check_number("cool_down", cool_down, lambda x: 0 < x <= 1, "within (0, 1]")
    if not isinstance(rollback, bool):
        raise TypeError(f"rollback must be True or False, not {rollback!r}")
    settings = Settings(
        max_consecutive=check_length("max_consecutive", max_consecutive, 1),
        rollback_after=check_length("rollback_after", rollback_after, 1),
        give_up_after=check_length("give_up_after", give_up_after, 1),
        snapshot_every=check_length("snapshot_every", snapshot_every, 1),
        cool_down=cool_down,
        recovery=recovery,
        has_snapshots=rollback,
    )
    check_label(label)
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    is_given_value = takes_value(inner.update)

    def init(params):
        inner_state = inner.init(params)
        snapshots = ()
        if rollback:
            # Two: a buffer that appears twice cannot be donated.
            present = snapshot_of(params, inner_state)
            older, newer = (jax.tree.map(jnp.zeros_like, present) for _ in range(2))
            snapshots = Snapshots(older, newer)
        return {
            label: SkipExplosionsState(
                explosions=detector.init(params),
                inner_state=inner_state,
                cooling=jnp.array([1, jnp.inf], jnp.float32),
                snapshots=snapshots,
            )
        }

    def update(updates, state, params=None, **extra_args):
        state = own_state(state, label, SkipExplosionsState)
        if rollback and params is None:
            raise ValueError(
                "a rollback is an update from the parameters: call "
                "update(updates, state, params) with params, or give rollback=False"
            )
        value = value_of(extra_args)
        explosions, seen = detector.update(updates, value, state.explosions, params)
        now = {name: count(explosions, name) for name in COUNTS}
        is_away = is_broken = jnp.zeros([], bool)
        if isinstance(state.snapshots, Snapshots):
            is_look = is_look_in(now["phase"])
            is_away, is_broken = compare(
                is_look | seen.has_nonfinite_updates,
                params,
                state.snapshots.older[0],
                updates,
                detector.scopes_of(params),
            )
        decision = decide(settings, seen, now, Cooling(*state.cooling), is_away)
        # What comes of bad parameters would soon look usual.
        explosions = explosions._replace(
            rule_states=jax.tree.map(
                lambda new, old: jnp.where(decision.is_skipped, old, new),
                explosions.rule_states,
                state.explosions.rule_states,
            )
        )
        updates = limit_updates(
            updates, decision.is_accepted, seen.norm, seen.norm_limit
        )
        num_steps = count(state.explosions, "steps")
        inner_state, snapshots = state.inner_state, state.snapshots
        is_due = decision.is_copied | (num_steps % CHECK_EVERY == CHECK_EVERY - 1)
        is_spoiled = are_spoiled(
            is_due & (num_steps > 0),
            inner_state,
            updates,
            detector.scopes_of(updates),
        )
        if isinstance(snapshots, Snapshots):
            done, inner_state, snapshots = move(
                decision, is_spoiled, num_steps, params, inner_state, snapshots
            )
        else:
            done, inner_state = mend(is_spoiled, inner_state, updates)
        is_skipped = once(decision.is_skipped | is_spoiled | done)

        if not is_given_value:
            extra_args.pop("value", None)

        def update_inner(state):
            found, new = inner.update(updates, state, params, **extra_args)
            check_structure(state, new)
            return found, new

        updates, inner_state = update_or_keep(update_inner, inner_state, is_skipped)

        scale = decision.cooling.scale

        def respond(u, param=None, snapshot=None):
            if not is_gradient(u):
                return u
            # They may be Python numbers, or NumPy's float64.
            u = jnp.asarray(u)
            param = None if param is None else jnp.asarray(param)
            if cool_down is not None:
                u = scaled(u, scale.astype(u.real.dtype))
            after = u if param is None else add(param, u).astype(param.dtype)
            u = jnp.where(~is_skipped & jnp.isfinite(after), u, jnp.zeros_like(u))
            if snapshot is None or param is None:
                return u
            way_back = add(snapshot, -param).astype(u.dtype)
            return jnp.where(decision.is_at_snapshot, way_back, u)

        trees = [updates] if params is None else [updates, params]
        if isinstance(snapshots, Snapshots):
            present = snapshot_of(params, inner_state)
            snapshots = widen_snapshots(snapshots, present)
            trees.append(snapshots.older[0])
        updates = jax.tree.map(respond, *trees)
        counts = now | decision.counts
        gave_up = counts["gave_up"].astype(jnp.int32)
        counts["gave_up"] = jnp.where(is_broken, BROKEN, gave_up)
        is_new = is_spoiled & (counts["last"] < counts["steps"] - 1)
        counts["exploded"] += is_new.astype(jnp.int32)
        counts["skipped"] += (is_spoiled & ~decision.is_skipped).astype(jnp.int32)
        counts["mended"] += is_spoiled.astype(jnp.int32)
        counts["last"] = jnp.where(is_new, counts["steps"] - 1, counts["last"])
        state = SkipExplosionsState(
            explosions=with_values(explosions, counts),
            inner_state=inner_state,
            cooling=side_by_side(decision.cooling),
            snapshots=snapshots,
        )
        return updates, {label: state}

    return optax.GradientTransformationExtraArgs(init, update)
