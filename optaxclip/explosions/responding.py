"""The parts of a response, in the order in which `skip_explosions` calls them.

Internal. `check_trial` says where a trial is, `move_between` takes snapshots and mends
moments, `respond` makes the updates that are applied, `count_response` counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip.explosions.deciding import Decision, is_trial_in
from optaxclip.explosions.moments import are_spoiled, find_moments, mended
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
    count,
)
from optaxclip.norms.scopes import Scopes
from optaxclip.numerics import add, is_gradient, scale
from optaxclip.xla import after, materialize

CHECK_EVERY = 3
"""Steps between two looks at the moments of the inner state. Each look reads them once
more; until the next one, the parameter of a non-finite moment is not updated."""


def check_trial(
    state: SkipExplosionsState,
    seen: Verdict,
    now: dict[str, jax.Array],
    params: Any,
    updates: Any,
    scopes: Scopes,
) -> tuple[jax.Array, jax.Array]:
    """Whether a trial is not at the snapshot, and whether the parameters hold NaN."""
    if not isinstance(state.snapshots, Snapshots):
        return jnp.zeros([], bool), jnp.zeros([], bool)
    is_due = is_trial_in(now["phase"]) | seen.has_nonfinite_updates
    return compare(is_due, params, state.snapshots.older, updates, scopes)


class Moved(NamedTuple):
    """What is known before the inner optimizer is updated."""

    is_spoiled: jax.Array
    """The inner state holds non-finite moments, which are 0 in `kept`."""
    is_skipped: jax.Array
    """For that reason, or as `decide` asked."""
    kept: Any
    """The inner state of a step that is skipped."""
    snapshots: Snapshots | tuple[()]


def move_between(
    decision: Decision,
    state: SkipExplosionsState,
    params: Any,
    updates: Any,
    scopes: Scopes,
) -> Moved:
    """Moves between snapshots, and resets moments that are non-finite.

    A rollback leaves the inner state as it is. The steps that exploded were skipped, so
    they are not in its moments; and what the user or the clock decides stays, such as
    hyperparameters and the counts of schedules.
    """
    num_steps = count(state.explosions, "steps")
    is_due = num_steps % CHECK_EVERY == CHECK_EVERY - 1
    # By place and not by tree: a state may hold anything beside its moments.
    leaves, structure = jax.tree.flatten(state.inner_state)
    places = find_moments(state.inner_state, updates)
    moments = [jnp.asarray(leaves[i]) for i in places]
    is_spoiled = are_spoiled(is_due, moments, list(places.values()), scopes)
    for i, moment in zip(places, moments, strict=True):
        leaves[i] = mended(is_spoiled, moment)
    is_skipped, snapshots = decision.is_skipped | is_spoiled, state.snapshots
    if isinstance(snapshots, Snapshots):
        done, snapshots = move(decision, num_steps, params, snapshots)
        is_skipped = after(done, is_skipped)
    kept = jax.tree.unflatten(structure, leaves)
    return Moved(is_spoiled, materialize(is_skipped), kept, snapshots)


def respond(
    updates: Any,
    params: Any,
    moved: Moved,
    decision: Decision,
    factor: jax.Array | None,
) -> Any:
    """The updates to apply: cooled down, zero if skipped, or the way to a snapshot."""

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
        nothing = jnp.zeros_like(u)
        u = lax.select(jnp.isfinite(applied), u, nothing)
        if snapshot is not None and param is not None:
            way_back = way_to(u, param, snapshot)
            nothing = lax.select(decision.is_at_snapshot, way_back, nothing)
        return lax.select(moved.is_skipped, nothing, u)

    trees = [updates] if params is None else [updates, params]
    if not isinstance(moved.snapshots, Snapshots):
        return jax.tree.map(of_leaf, *trees)
    older = moved.snapshots.older
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
    counts["skipped"] += (is_spoiled & ~decision.is_skipped).astype(jnp.int32)
    is_skipped = decision.is_skipped | is_spoiled
    counts["last_skipped"] = jnp.where(
        is_skipped, counts["steps"] - 1, counts["last_skipped"]
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
