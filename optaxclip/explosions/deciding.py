"""What becomes of a step: taken, skipped, or a trial of earlier parameters.

Internal; `skip_explosions` says what it is for. A finite explosion may be the fault of
the batch, of the data from now on, or of the parameters. Steps that are skipped leave
the parameters as they are, so the batches that follow test the same parameters again;
and two batches at those of the snapshot tell the last two causes apart. What becomes of
the updates of a step that is skipped, `responding.respond` says.

| phase | next phase |
|---|---|
| training | first trial, when a rollback is due |
| first trial | accepting if the snapshot is reached and not better; else second trial |
| second trial | accepting if not reached, not better, or suspect; else training |
| accepting | training after `NUM_ACCEPTED` healthy steps; or first trial, as above |

A second trial that is better is a rollback. The signal is the loss, or the norm where
there is no rule on the loss; a step is suspect where it is above its limit. What
`lowest_signal` stands for depends on the phase:

| phase | `lowest_signal` |
|---|---|
| training | the lowest signal of the suspect steps in a row, +inf for none |
| first and second trial | the one before the trial, which the snapshot has to beat |
| accepting | the same; up to twice of it is accepted, at first ten times |

A step is healthy if it is not bad (see `Verdict`), mends nothing, and is no trial.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optaxclip.explosions.cooling import cool
from optaxclip.explosions.recurring import find_outlier, num_passed, remember
from optaxclip.explosions.state import Verdict
from optaxclip.xla import materialize

PHASES = ("training", "first trial", "second trial", "accepting")
TRAINING, FIRST_TRIAL, SECOND_TRIAL, ACCEPTING = range(len(PHASES))

NUM_NONFINITE = 10
"""Non-finite gradients in a row before a trial. They are never applied, so waiting
costs little; a loss scale that starts 2**9 too high is not the parameters' fault."""
NUM_ACCEPTED = 16
"""For so many healthy steps after a trial that failed, an explosion is accepted if its
signal is at most twice `lowest_signal`: `limits.above_lowest` takes 8 steps to
follow."""
MAX_EXCESS = 9.0
"""While `age` is at most 1, up to ten times `lowest_signal` is accepted."""


class Settings(NamedTuple):
    """The arguments of `skip_explosions` that decide."""

    max_consecutive: int
    rollback_after: int
    give_up_after: int
    snapshot_every: int
    cool_down: ArrayLike | None
    recovery: ArrayLike
    has_snapshots: bool


class Carried(NamedTuple):
    """Two numbers that go from step to step, float32 each."""

    scale: jax.Array
    """Factor of the updates."""
    lowest_signal: jax.Array
    """See the table above."""


class Decision(NamedTuple):
    """What becomes of a step; bool `[]` but for the last two."""

    is_accepted: jax.Array
    """It exploded and is taken, clipped to the limit on the norm."""
    is_skipped: jax.Array
    """It exploded and is not accepted, or moments are mended, or it is a trial."""
    is_started: jax.Array
    """A trial starts: the parameters are put aside, and go back to the snapshot."""
    is_at_snapshot: jax.Array
    """This step leads to the older snapshot; after a trial that failed, the parameters
    that were put aside are that."""
    is_copied: jax.Array
    """A snapshot is due."""
    is_replaced: jax.Array
    """The newer snapshot takes the place of the older."""
    counts: dict[str, jax.Array]
    """New values of `COUNTS`."""
    carried: Carried


def decide(
    settings: Settings,
    seen: Verdict,
    now: dict[str, Any],
    carried: Carried,
    is_away: jax.Array,
    is_spoiled: jax.Array,
) -> Decision:
    """Decides on one step.

    Args:
      settings: The arguments.
      seen: What is known of the step.
      now: The `COUNTS`, with this step.
      carried: As it was before.
      is_away: Whether a trial is not at the parameters of the snapshot.
      is_spoiled: Whether moments of the inner state were found to be non-finite.
    """
    phase = now["phase"]
    is_trial = is_trial_in(phase)
    is_healthy = ~(seen.is_bad | is_spoiled | is_trial)
    is_change = _is_change(settings, seen, now, carried.lowest_signal)
    trial = _next_trial(settings, seen, now, carried.lowest_signal, is_change, is_away)
    is_outlier, is_recurring = find_outlier(seen, now, is_trial)
    # It starts no trial: after another outlier, one suspect step is not enough.
    is_recurring &= phase == TRAINING
    # What was before a trial was of other parameters, or of other data. While updates
    # are cooled down, explosions are more likely the fault of the steps.
    is_over = trial.is_confirmed | trial.is_failed | (carried.scale < 1)
    is_accepted = (is_change | is_recurring) & ~is_spoiled
    is_skipped = (seen.is_bad & ~is_accepted) | is_spoiled
    is_skipped |= is_trial | trial.is_started
    age, is_copied, is_swapped = _next_age(settings, now, is_healthy, is_accepted)
    # If the snapshot is better but suspect as well, it is the data that have changed.
    is_cut = trial.is_confirmed & ~_is_suspect(seen)
    strikes, scale = cool(settings, carried.scale, now, is_cut, is_healthy)
    return Decision(
        is_accepted=is_accepted,
        is_skipped=materialize(is_skipped),
        is_started=materialize(trial.is_started),
        is_at_snapshot=materialize(trial.is_started | (is_trial & ~trial.is_confirmed)),
        is_copied=materialize(is_copied),
        is_replaced=materialize(is_swapped | trial.is_failed),
        counts={
            "phase": _next_phase(settings, now, trial, is_cut, is_healthy),
            "age": jnp.where(trial.is_confirmed | trial.is_failed, 0, age),
            **remember(now, is_outlier, is_over),
            "strikes": jnp.where(is_cut, strikes, now["strikes"]),
            "last_cut": jnp.where(is_cut, now["steps"], now["last_cut"]),
            "last_rollback": jnp.where(
                trial.is_confirmed, now["steps"], now["last_rollback"]
            ),
            "skipped": now["skipped"] + is_skipped.astype(jnp.int32),
            "rollbacks": now["rollbacks"] + trial.is_confirmed.astype(jnp.int32),
            "blocked_rollbacks": now["blocked_rollbacks"]
            + trial.is_blocked.astype(jnp.int32),
            "gave_up": now["nonfinite_updates_in_a_row"] >= settings.give_up_after,
        },
        carried=Carried(
            scale, _next_lowest_signal(seen, now, carried, trial.is_started)
        ),
    )


def is_trial_in(phase: jax.Array) -> jax.Array:
    """Whether a step is a trial of the snapshot."""
    return (phase == FIRST_TRIAL) | (phase == SECOND_TRIAL)


def _is_suspect(seen: Verdict) -> jax.Array:
    """Whether a step speaks against its parameters."""
    return seen.signal > seen.signal_limit


def _is_change(settings, seen, now, lowest_signal) -> jax.Array:
    """Whether a step that exploded is taken, as a change for good."""
    # Up to twice the lowest of the row, or of before the trial; at first ten times. If
    # no step was applied since the snapshot, anything: there is nothing to go back to.
    excess = jnp.where(now["age"] <= 1, MAX_EXCESS, 1)
    is_usual = seen.signal <= lowest_signal + excess * jnp.abs(lowest_signal)
    is_usual = (is_usual & (lowest_signal < jnp.inf)) | (now["age"] == 0)
    # The first of a row is the lowest itself.
    is_usual |= (now["phase"] == TRAINING) & (now["suspect_in_a_row"] <= 1)
    # A row of norms too large says nothing of a loss that is. A loss of inf is counted
    # in no such row.
    is_suspect = now["suspect_in_a_row"] > 0
    num_in_a_row = jnp.where(is_suspect, now["suspect_in_a_row"], now["in_a_row"])
    is_change = num_in_a_row >= settings.max_consecutive
    if settings.has_snapshots:
        is_change &= is_usual | ~is_suspect
    is_change |= (now["phase"] == ACCEPTING) & is_usual
    is_finite_explosion = seen.is_bad & ~seen.has_nonfinite_updates
    return is_finite_explosion & ~is_trial_in(now["phase"]) & is_change


class Trial(NamedTuple):
    """How a trial of the snapshot goes on; bool `[]` each."""

    is_started: jax.Array
    is_failed: jax.Array
    """The snapshot is not better, or was not reached: what was put aside comes back."""
    is_confirmed: jax.Array
    """It succeeded: that is a rollback."""
    is_blocked: jax.Array
    """It failed since the snapshot was not reached: the updates were not applied as
    they were."""


def _next_trial(settings, seen, now, lowest_signal, is_change, is_away) -> Trial:
    """Starts a trial, ends it, or goes on: the table of phases above.

    `is_away`: the parameters of a trial are not those of the snapshot.
    """
    is_trial = is_trial_in(now["phase"])
    if not settings.has_snapshots:
        return Trial(*(jnp.zeros_like(is_trial),) * 4)
    num_needed = settings.rollback_after + num_passed(now)
    is_persistent = now["suspect_in_a_row"] >= num_needed
    is_nonfinite = now["nonfinite_updates_in_a_row"] >= NUM_NONFINITE
    is_due = ((is_persistent & ~is_change) | is_nonfinite) & ~is_trial
    # At age 0 no step was applied since the snapshot: it is what the run has.
    is_started = is_due & (now["age"] > 0)
    # Half of the excess must be gone. The rest may be usual for the snapshot: the limit
    # has followed the run since.
    middle = seen.signal_limit + 0.5 * (lowest_signal - seen.signal_limit)
    is_better = ~_is_suspect(seen) | (seen.signal <= middle)
    is_better &= ~seen.has_nonfinite_updates & ~jnp.isnan(seen.signal)
    # From parameters that have grown far the first update may miss the snapshot by a
    # rounding of theirs: then the second trial decides. Whoever misses it twice does
    # not apply the updates as they are.
    is_second = now["phase"] == SECOND_TRIAL
    is_blocked = is_second & is_away
    return Trial(
        is_started=is_started,
        is_failed=is_blocked | (is_trial & ~is_away & ~is_better),
        is_confirmed=is_second & ~is_away & is_better,
        is_blocked=is_blocked,
    )


def _next_phase(settings, now, trial, is_cut, is_healthy) -> jax.Array:
    """The phase of the next step. `is_cut`: a rollback after which training goes on."""
    phase = now["phase"]
    # A snapshot that is better may still be suspect: then the rest is accepted.
    is_accepting = trial.is_failed | (trial.is_confirmed & ~is_cut)
    num_accepted = min(NUM_ACCEPTED, settings.snapshot_every)
    is_settled = (phase == ACCEPTING) & (now["age"] >= num_accepted) & is_healthy
    is_training = is_cut | is_settled
    # The next in order, unless a trial starts or has ended.
    following = jnp.where(is_trial_in(phase), phase + 1, phase)
    following = jnp.where(trial.is_started, FIRST_TRIAL, following)
    following = jnp.where(is_accepting, ACCEPTING, following)
    return jnp.where(is_training, TRAINING, following)


def _next_lowest_signal(seen, now, carried, is_started) -> jax.Array:
    """See the table above; +inf if a step in the row was non-finite."""
    phase, lowest = now["phase"], carried.lowest_signal
    is_first = (now["suspect_in_a_row"] <= 1) | (phase == ACCEPTING)
    found = jnp.where(is_first, seen.signal, jnp.minimum(lowest, seen.signal))
    is_known = (now["suspect_in_a_row"] > 0) & ~seen.has_nonfinite_updates
    is_kept = is_trial_in(phase) | ((phase == ACCEPTING) & ~is_started)
    return jnp.where(is_kept, lowest, jnp.where(is_known, found, jnp.inf))


def _next_age(settings, now, is_healthy, is_accepted):
    """Healthy steps since the older snapshot; whether one is due, and takes its place.

    An accepted step makes it 1 at least: it was applied. After 2 * `snapshot_every` the
    newer snapshot is the older one, of age `snapshot_every`.
    """
    every = settings.snapshot_every
    age = now["age"] + is_healthy.astype(jnp.int32)
    age = jnp.where(is_accepted, jnp.maximum(age, 1), age)
    is_swapped = is_healthy & (age == 2 * every)
    is_copied = is_healthy & (is_swapped | (age == every))
    return jnp.where(is_swapped, every, age), is_copied, is_swapped
