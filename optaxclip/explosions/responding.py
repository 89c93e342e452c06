"""The parts of a response, in the order in which `skip_explosions` calls them.

Internal. `check_trial` says where a trial is, `move_snapshots` takes snapshots,
`respond` makes the updates that are applied, `count_response` counts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip.explosions.deciding import Decision
from optaxclip.explosions.rising import Rise, is_of_use
from optaxclip.explosions.settings import Settings
from optaxclip.explosions.snapshots import (
    compare,
    go_back,
    is_on_host,
    move,
    snapshot_of,
    way_to,
)
from optaxclip.explosions.state import (
    BROKEN,
    DetectExplosionsState,
    SkipExplosionsState,
    Snapshots,
    Verdict,
)
from optaxclip.explosions.trials import TRAINING, is_trial_in
from optaxclip.norms.scopes import Scopes
from optaxclip.numerics import add, is_gradient, saturating_cast, scale
from optaxclip.xla import after


def check_trial(
    state: SkipExplosionsState,
    seen: Verdict,
    now: dict[str, jax.Array],
    params: Any,
    updates: Any,
    scopes: Scopes,
    rise: Rise,
    settings: Settings,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the snapshot says of the parameters, where it is asked.

    Whether a trial is not at the snapshot, whether the parameters hold NaN, and the
    pull of the step, see `Rise`.
    """
    if not isinstance(state.snapshots, Snapshots):
        return jnp.zeros([], bool), jnp.zeros([], bool), jnp.zeros([], jnp.float32)
    is_asked = (now["phase"] == TRAINING) & ~seen.is_bad
    is_asked &= is_of_use(rise, now, settings.snapshot_every)
    # Without smaller steps the loss would rise again, and be taken back, for ever.
    is_asked &= settings.cool_down is not None
    is_due = is_trial_in(now["phase"]) | seen.has_nonfinite_updates | is_asked
    is_away, is_broken, slope = compare(
        is_due, params, state.snapshots.older, updates, scopes
    )
    norm = lax.stop_gradient(saturating_cast(seen.norm, jnp.float32))
    pull = slope / jnp.where(norm > 0, norm, 1)
    # None of what overflows.
    is_known = is_asked & (jnp.abs(pull) < jnp.inf)
    # Where nothing is non-finite, they may hold inf for good, as a mask does.
    return is_away, is_broken & ~is_asked, jnp.where(is_known, pull, 0)


def move_snapshots(
    decision: Decision, state: SkipExplosionsState, params: Any
) -> tuple[jax.Array, Snapshots | tuple[()]]:
    """(is_skipped, snapshots): those after a decision, and what it says of the step.

    What reads the flag waits for the copies, so that they are made before the
    parameters are overwritten.

    A rollback leaves the inner state as it is. The steps that exploded were skipped, so
    they are not in its moments; and what the user or the clock decides stays, such as
    hyperparameters and the counts of schedules.
    """
    if not isinstance(state.snapshots, Snapshots):
        return decision.is_skipped, state.snapshots
    num_steps = state.explosions.counts.steps
    done, snapshots = move(decision, num_steps, params, state.snapshots)
    return after(done, decision.is_skipped), snapshots


def respond(
    updates: Any,
    params: Any,
    decision: Decision,
    is_skipped: jax.Array,
    snapshots: Snapshots | tuple[()],
    factor: jax.Array | None,
) -> Any:
    """The updates to apply.

    Of a step that is taken, cooled down, and 0 wherever the new parameter would not be
    finite. Of one that is skipped zeros, or the way to a snapshot.
    """

    def of_leaf(u, param=None, snapshot=None):
        if not is_gradient(u):
            return u
        # They may be Python numbers, or NumPy's float64.
        u = jnp.asarray(u)
        param = None if param is None else jnp.asarray(param)
        if factor is not None:
            u = scale(u, factor.astype(u.real.dtype))
        # A finite update may still overflow the dtype of its parameter.
        applied = u if param is None else add(param, u).astype(param.dtype)
        zero = if_skipped = jnp.zeros_like(u)
        u = lax.select(jnp.isfinite(applied), u, zero)
        if snapshot is not None and param is not None:
            way_back = way_to(u, param, snapshot)
            if_skipped = lax.select(decision.is_at_snapshot, way_back, zero)
        return lax.select(is_skipped, if_skipped, u)

    trees = [updates] if params is None else [updates, params]
    if not isinstance(snapshots, Snapshots):
        return jax.tree.map(of_leaf, *trees)
    older = snapshots.older
    if not is_on_host(older):
        return jax.tree.map(of_leaf, *trees, older)
    # A select would fetch the snapshot in every step.
    updates = jax.tree.map(of_leaf, *trees)
    return go_back(decision.is_at_snapshot, updates, snapshot_of(params), older)


def count_response(
    now: dict[str, jax.Array],
    decision: Decision,
    is_spoiled: jax.Array,
    is_broken: jax.Array,
) -> dict[str, jax.Array]:
    """The `COUNTS` after the response."""
    counts = now | decision.counts
    gave_up = counts["gave_up"].astype(jnp.int32)
    counts["gave_up"] = jnp.where(is_broken, BROKEN, gave_up)
    # The rules may have flagged this step already, which then counts once.
    is_new = is_spoiled & (counts["last"] < counts["steps"] - 1)
    counts["exploded"] += is_new.astype(jnp.int32)
    counts["last_skipped"] = jnp.where(
        decision.is_skipped, counts["steps"] - 1, counts["last_skipped"]
    )
    counts["mended"] += is_spoiled.astype(jnp.int32)
    counts["last"] = jnp.where(is_new, counts["steps"] - 1, counts["last"])
    return counts


def unlearn(
    explosions: DetectExplosionsState, before: DetectExplosionsState, when: jax.Array
) -> DetectExplosionsState:
    """The state without what the rules learned, `when` the step is skipped.

    What comes of bad parameters would soon look healthy.
    """

    def keep(new, old):
        return jnp.where(when, old, new)

    # Not `update_or_keep`: these are few numbers, and nothing is saved.
    kept = jax.tree.map(keep, explosions.rule_states, before.rule_states)
    return explosions._replace(rule_states=kept)
