"""What becomes of a step: taken, skipped, or a look at earlier parameters.

Internal; `skip_explosions` says what it is for. A finite explosion may be the fault of
the batch, of the data from now on, or of the parameters. Steps that are skipped leave
the parameters as they are, so the batches that follow test the same parameters again;
and two batches at those of the snapshot tell the last two causes apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optaxclip.explosions.state import Verdict
from optaxclip.xla import materialize

PHASES = ("training", "first look", "second look", "accepting")
"""Of a rollback: none; the next batch is the first, or the second, at the snapshot; it
was no better, so that what was found is accepted for `NUM_ACCEPTED` quiet steps."""
TRAINING, FIRST_LOOK, SECOND_LOOK, ACCEPTING = range(len(PHASES))


NUM_NONFINITE = 10
"""Non-finite gradients in a row before a rollback. They are never applied, so waiting
costs little; a loss scale that starts 2**9 too high is not the parameters' fault."""
RECURRENCE = 300
"""Steps after a rollback within which another one is for the same cause: three times
the age of the oldest snapshot by default, so that the cause had time to return."""
EARLY = 64
"""Steps before which a rollback cuts the scale in full: the run was never healthy with
its steps. 64 is half of the rules' window."""
FIRST_CUT = 1 / 16
"""To which a later one cuts it: the steps were right for some time."""
LATER_CUT = 1 / 8
"""By which a rollback cuts the scale that soon follows another: the scale that explodes
again is near what is stable."""
NUM_ACCEPTED = 16
"""For so many quiet steps after a snapshot was no better, what is not far above what
was found then is accepted: `limits.above_lowest` needs 8 to follow."""
LEAST_SCALE = 2**-12


class Settings(NamedTuple):
    """The arguments of `skip_explosions` that decide."""

    max_consecutive: int
    rollback_after: int
    give_up_after: int
    snapshot_every: int
    cool_down: ArrayLike | None
    recovery: ArrayLike
    has_snapshots: bool


class Cooling(NamedTuple):
    """Numbers that `SkipExplosionsState.cooling` holds, float32 each."""

    scale: jax.Array
    """Factor of the updates."""
    least: jax.Array
    """The least evidence against the parameters among the last in a row."""


class Decision(NamedTuple):
    """What becomes of a step; bool `[]` but for the last two."""

    is_accepted: jax.Array
    """Taken although it exploded, clipped to the limit on the norm."""
    is_skipped: jax.Array
    is_started: jax.Array
    """The parameters are put aside, and go back to the snapshot."""
    is_returned: jax.Array
    """They come back: the snapshot was no better."""
    is_at_snapshot: jax.Array
    """They are to be those of the older snapshot after this step."""
    is_copied: jax.Array
    """A snapshot is due."""
    is_replaced: jax.Array
    """The newer snapshot takes the place of the older."""
    counts: dict[str, jax.Array]
    """New values of `COUNTS`."""
    cooling: Cooling


def decide(
    settings: Settings,
    seen: Verdict,
    now: dict[str, Any],
    cooling: Cooling,
    is_away: jax.Array,
) -> Decision:
    """Decides on one step.

    Args:
      settings: The arguments.
      seen: What is known of the step.
      now: The `COUNTS`, with this step.
      cooling: As it was before.
      is_away: Whether a look is not at the parameters of the snapshot.
    """
    phase, is_finite = now["phase"], ~seen.has_nonfinite_updates
    is_look = is_look_in(phase)
    is_finite_explosion = seen.is_bad & is_finite & ~is_look
    is_accepted = is_finite_explosion & _is_change(settings, seen, now, cooling)
    is_quiet = ~seen.is_bad & ~is_look

    least = cooling.least
    is_suspect, is_better = _is_better(seen, least, is_finite)
    is_started, is_returned, is_confirmed, is_blocked = _turns(
        settings, now, is_accepted, is_better, is_away
    )
    is_skipped = (seen.is_bad & ~is_accepted) | is_look | is_started

    is_accepting = is_returned | (is_confirmed & is_suspect)
    is_training = is_confirmed & ~is_suspect
    following = jnp.where(is_look, phase + 1, phase)
    is_settled = _is_settled(settings, now, is_quiet)
    for flag, value in [
        (is_started, FIRST_LOOK),
        (is_accepting, ACCEPTING),
        (is_training | is_settled, TRAINING),
    ]:
        following = jnp.where(flag, value, following)
    age, is_copied, is_second = _next_age(settings, now, is_quiet, is_accepted)
    age = jnp.where(is_confirmed | is_returned, 0, age)
    strikes, cooled = _cut(settings, cooling, now, is_confirmed, is_quiet)
    is_kept = is_look | ((phase == ACCEPTING) & ~is_started)
    least = jnp.where(is_kept, least, _least_evidence(seen, now, least, phase))
    last = jnp.where(is_confirmed, now["steps"], now["last_rollback"])
    return Decision(
        is_accepted=is_accepted,
        is_skipped=materialize(is_skipped),
        is_started=materialize(is_started),
        is_returned=materialize(is_returned),
        is_at_snapshot=materialize(is_started | (is_look & ~is_confirmed)),
        is_copied=materialize(is_copied),
        is_replaced=materialize(is_second | is_returned),
        counts={
            "phase": following,
            "age": age,
            "strikes": jnp.where(is_confirmed, strikes, now["strikes"]),
            "last_rollback": last,
            "skipped": now["skipped"] + is_skipped.astype(jnp.int32),
            "rollbacks": now["rollbacks"] + is_confirmed.astype(jnp.int32),
            "blocked_rollbacks": now["blocked_rollbacks"]
            + is_blocked.astype(jnp.int32),
            "gave_up": now["nonfinite_updates_in_a_row"] >= settings.give_up_after,
        },
        cooling=cooled._replace(least=least),
    )


def _is_change(settings, seen, now, cooling) -> jax.Array:
    """Whether an explosion is a change for good, and so its step is taken."""
    # Once there was a quiet step, up to twice what was found then: more is news.
    least = cooling.least
    is_usual = (seen.signal <= least + jnp.abs(least)) & (least < jnp.inf)
    is_usual = (now["phase"] == ACCEPTING) & (is_usual | (now["age"] <= 1))
    return is_usual | (now["in_a_row"] >= settings.max_consecutive)


def _is_better(seen, least, is_finite) -> tuple[jax.Array, jax.Array]:
    """Whether a look still speaks against the parameters, and if much less.

    Half of the excess must be gone. The rest may be usual for the snapshot: the limit
    has followed the run since.
    """
    middle = seen.signal_limit + 0.5 * (least - seen.signal_limit)
    is_suspect = seen.signal > seen.signal_limit
    return is_suspect, is_finite & (~is_suspect | (seen.signal <= middle))


def _turns(settings, now, is_accepted, is_better, is_away):
    """Whether a rollback is started, undone, confirmed, or blocked from outside."""
    is_look = is_look_in(now["phase"])
    if not settings.has_snapshots:
        return (jnp.zeros_like(is_look),) * 4
    is_due = now["suspect_in_a_row"] >= settings.rollback_after
    is_due &= ~is_look & ~is_accepted
    is_due |= (now["nonfinite_updates_in_a_row"] >= NUM_NONFINITE) & ~is_look
    # Before any step is applied, the parameters are those of the snapshot.
    is_started = is_due & (now["age"] > 0)
    # From parameters that have grown far the first update may miss the snapshot by a
    # rounding of theirs: then the second look decides. Whoever misses it twice does not
    # apply the updates as they are.
    is_second = now["phase"] == SECOND_LOOK
    is_blocked = is_second & is_away
    is_returned = is_blocked | (is_look & ~is_away & ~is_better)
    return is_started, is_returned, is_second & ~is_away & is_better, is_blocked


def _is_settled(settings, now, is_quiet) -> jax.Array:
    """Whether a change that was accepted has been quiet for long enough."""
    num_quiet = min(NUM_ACCEPTED, settings.snapshot_every)
    return (now["phase"] == ACCEPTING) & (now["age"] >= num_quiet) & is_quiet


def _next_age(settings, now, is_quiet, is_accepted):
    """Quiet steps since the older snapshot; whether one is due, and replaces it."""
    every = settings.snapshot_every
    age = now["age"] + is_quiet.astype(jnp.int32)
    age = jnp.where(is_accepted, jnp.maximum(age, 1), age)
    is_second = is_quiet & (age == 2 * every)
    is_copied = is_quiet & (is_second | (age == every))
    return jnp.where(is_second, every, age), is_copied, is_second


def _cut(settings, cooling, now, is_confirmed, is_quiet) -> tuple[jax.Array, Cooling]:
    """The rollbacks in succession if this is one, and the scale after the step."""
    is_recurrent = now["steps"] - now["last_rollback"] < RECURRENCE
    is_recurrent &= now["strikes"] > 0
    strikes = jnp.where(is_recurrent, now["strikes"] + 1, 1)
    is_cut = is_confirmed
    if not settings.has_snapshots:
        is_cut = now["in_a_row"] == settings.rollback_after
    is_early = now["steps"] < EARLY
    return strikes, _cool(settings, cooling, strikes, is_early, is_cut, is_quiet)


def is_look_in(phase: jax.Array) -> jax.Array:
    """Whether a step is a look at the snapshot."""
    return (phase == FIRST_LOOK) | (phase == SECOND_LOOK)


def _least_evidence(seen, now, least, phase):
    """The least evidence in the present row; +inf if it is of non-finite steps."""
    is_first = (now["suspect_in_a_row"] <= 1) | (phase == ACCEPTING)
    found = jnp.where(is_first, seen.signal, jnp.minimum(least, seen.signal))
    is_known = (now["suspect_in_a_row"] > 0) & ~seen.has_nonfinite_updates
    return jnp.where(is_known, found, jnp.inf)


def _cool(settings, cooling, strikes, is_early, is_cut, is_quiet) -> Cooling:
    """The scale after a step; `strikes`: the rollbacks in succession, with this one."""
    if settings.cool_down is None:
        return cooling
    cut = jnp.asarray(settings.cool_down, jnp.float32)
    lower = cooling.scale * cut
    if settings.has_snapshots:
        # The snapshot was better, so the steps are too large, by an unknown factor.
        is_full = is_early | (cooling.scale <= FIRST_CUT)
        first = jnp.where(is_full, cut, jnp.maximum(cut, FIRST_CUT))
        later = jnp.minimum(cut, cooling.scale * LATER_CUT)
        lower = jnp.where(strikes == 1, first, later)
        lower = jnp.minimum(lower, cooling.scale)
    growth = jnp.clip(settings.recovery, 1, 1 / LEAST_SCALE)
    grown = jnp.minimum(cooling.scale * jnp.where(is_quiet, growth, 1), 1)
    scale = materialize(jnp.where(is_cut, jnp.maximum(lower, LEAST_SCALE), grown))
    return Cooling(scale=scale.astype(jnp.float32), least=cooling.least)
