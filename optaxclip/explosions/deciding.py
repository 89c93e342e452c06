"""What becomes of a step: taken, skipped, or a trial of earlier parameters.

Internal; `skip_explosions` says what it is for. A finite explosion may be the fault of
the batch, of the data from now on, or of the parameters. Steps that are skipped leave
the parameters as they are, so the batches that follow test the same parameters again;
and two batches at those of the snapshot tell the last two causes apart. They are tried
as well where the loss has risen too slowly for any rule, and where most gradients have
become 0: see `rising` and `dying`. `decide` decides whether a step is skipped;
`skipping` does it.

| phase | next phase |
|---|---|
| training | first trial, when a rollback is due, or the parameters are doubted |
| first trial | accepting if the snapshot is reached and not better; else second trial |
| second trial | accepting if not reached, not better, suspect, or dead; else training |
| accepting | training after `NUM_ACCEPTED` healthy steps; or first trial, as above |

A second trial that is better is a rollback. The signal is the loss, or the norm where
there is no rule on the loss; a step is suspect where it is above its limit,
and dead if the network had died. What `lowest_signal` stands for depends on the phase:

| phase | `lowest_signal` |
|---|---|
| training | the lowest signal of the suspect steps in a row, +inf for none |
| first and second trial | the one before; the level, if parameters are doubted |
| accepting | the same; up to twice of it is accepted, at first ten times |

A step is healthy if it is not bad (see `Verdict`), mends nothing, and is no trial.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip.explosions.carried import Carried
from optaxclip.explosions.cooling import cool
from optaxclip.explosions.dying import (
    count_living,
    follow_living,
    has_died,
    twice_level,
)
from optaxclip.explosions.recurring import find_outlier, remember
from optaxclip.explosions.rising import Rise, follow, is_at_fault, learn
from optaxclip.explosions.settings import Settings
from optaxclip.explosions.state import Verdict
from optaxclip.explosions.trials import (
    ACCEPTING,
    FIRST_TRIAL,
    TRAINING,
    Comparison,
    Trial,
    halve_excess,
    is_suspect,
    is_trial_in,
    next_trial,
)
from optaxclip.xla import materialize

NUM_ACCEPTED = 16
"""For this many healthy steps after a trial that failed, an explosion is accepted if
its signal is at most twice `lowest_signal`. `limits.above_lowest` takes 8 steps to
follow; this is twice that."""
MAX_EXCESS = 9.0
"""While `age` is at most 1, up to ten times `lowest_signal` is accepted: the ratio that
an outlier may have too (`recurring.MAX_RATIO`). It was not measured alone."""


class Decision(NamedTuple):
    """What becomes of a step; bool `[]` but for the last two."""

    is_accepted: jax.Array
    """It exploded and is taken, clipped to the limit on the norm."""
    is_skipped: jax.Array
    """It exploded and is not accepted, or moments are mended, or it is a trial."""
    is_mended: jax.Array
    """Moments of the inner state were non-finite."""
    is_broken: jax.Array
    """The parameters hold NaN."""
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
    """Those of the `COUNTS` that change."""
    carried: Carried


class Aging(NamedTuple):
    """How the snapshots age in a step."""

    age: jax.Array
    """Healthy steps since the older one."""
    is_copied: jax.Array
    """A copy is due."""
    is_swapped: jax.Array
    """The newer one takes the place of the older."""
    is_doubted: jax.Array
    """They stay, and the older one is to be tried: the loss has slowly risen, or the
    network has died."""


def decide(
    settings: Settings,
    seen: Verdict,
    now: dict[str, Any],
    carried: Carried,
    compared: Comparison,
    is_spoiled: jax.Array,
) -> Decision:
    """Decides on one step.

    Args:
      settings: The arguments.
      seen: What is known of the step.
      now: The `COUNTS`, with this step.
      carried: As it was before.
      compared: What the snapshot says of the parameters.
      is_spoiled: Whether moments of the inner state were found to be non-finite.
    """
    is_trial = is_trial_in(now["phase"])
    is_healthy = ~(seen.is_bad | is_spoiled | is_trial)
    every = settings.snapshot_every
    rise = learn(carried.rise, seen, now, compared.pull, is_healthy, every)
    now = now | count_living(settings, seen, now, is_healthy)
    is_change = _is_change(settings, seen, now, carried.lowest_signal)
    is_outlier, is_taken = find_outlier(seen, now, is_trial)
    # It starts no trial: after another outlier, one suspect step is not enough.
    is_taken &= now["phase"] == TRAINING
    is_accepted = (is_change | is_taken) & ~is_spoiled
    is_doubted = is_at_fault(rise) | has_died(now)
    aging = _age_snapshots(every, now, is_doubted, is_healthy, is_accepted)
    trial = next_trial(
        settings, seen, now, carried, compared.is_away, is_change, aging.is_doubted
    )
    # Here alone it is decided that a step is skipped.
    is_skipped = (seen.is_bad & ~is_accepted) | is_spoiled
    is_skipped |= is_trial | trial.is_started
    # If the snapshot is better but suspect as well, it is the data that have changed.
    is_back = trial.is_confirmed & ~is_suspect(seen)
    # To the rules all is suspect that lives, if they know of the dead alone.
    is_cut = trial.is_confirmed & (is_back | has_died(now))
    is_back &= ~has_died(now)
    strikes, scale = cool(settings, carried.scale, rise, now, is_cut, is_healthy)
    return Decision(
        is_accepted=is_accepted,
        is_skipped=materialize(is_skipped),
        is_mended=is_spoiled,
        is_broken=compared.is_broken,
        is_started=materialize(trial.is_started),
        is_at_snapshot=materialize(trial.is_started | (is_trial & ~trial.is_confirmed)),
        is_copied=materialize(aging.is_copied),
        is_replaced=materialize(aging.is_swapped | trial.is_failed),
        counts={
            "phase": _next_phase(settings, now, trial, is_back, is_healthy),
            "age": jnp.where(trial.is_over, 0, aging.age),
            # What was before a trial was of other parameters, or of other data. While
            # updates are cooled down, explosions are rather the fault of the steps.
            **remember(now, is_outlier, trial.is_over | (carried.scale < 1)),
            "strikes": jnp.where(is_cut, strikes, now["strikes"]),
            "last_cut": jnp.where(is_cut, now["steps"], now["last_cut"]),
            "gave_up": now["nonfinite_updates_in_a_row"] >= settings.give_up_after,
            **_increment_counts(now, trial, is_skipped),
            **follow_living(
                now, trial.is_over, trial.is_failed, aging.is_copied, aging.is_swapped
            ),
        },
        carried=_next_carried(seen, now, carried, trial, aging, rise, scale),
    )


def _increment_counts(
    now: dict[str, Any], trial: Trial, is_skipped: jax.Array
) -> dict[str, jax.Array]:
    """Increments the skip and rollback counts."""
    done = {
        "skipped": is_skipped,
        "rollbacks": trial.is_confirmed,
        "blocked_rollbacks": trial.is_blocked,
    }
    last = jnp.where(trial.is_confirmed, now["steps"], now["last_rollback"])
    counts = {name: now[name] + x.astype(jnp.int32) for name, x in done.items()}
    return counts | {"last_rollback": last}


def _is_change(
    settings: Settings, seen: Verdict, now: dict[str, Any], lowest_signal: jax.Array
) -> jax.Array:
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
    has_suspect = now["suspect_in_a_row"] > 0
    num_in_a_row = jnp.where(has_suspect, now["suspect_in_a_row"], now["in_a_row"])
    is_change = num_in_a_row >= settings.max_consecutive
    if settings.has_snapshots:
        is_change &= is_usual | ~has_suspect
    is_change |= (now["phase"] == ACCEPTING) & is_usual
    is_finite_explosion = seen.is_bad & ~seen.has_nonfinite_updates
    return is_finite_explosion & ~is_trial_in(now["phase"]) & is_change


def _next_phase(
    settings: Settings,
    now: dict[str, Any],
    trial: Trial,
    is_back: jax.Array,
    is_healthy: jax.Array,
) -> jax.Array:
    """The phase of the next step. `is_back`: after a rollback, training goes on."""
    phase = now["phase"]
    # A snapshot that is better may still be suspect: then the rest is accepted.
    is_accepting = trial.is_failed | (trial.is_confirmed & ~is_back)
    num_accepted = min(NUM_ACCEPTED, settings.snapshot_every)
    is_settled = (phase == ACCEPTING) & (now["age"] >= num_accepted) & is_healthy
    is_training = is_back | is_settled
    # The next in order, unless a trial starts or has ended.
    following = jnp.where(is_trial_in(phase), phase + 1, phase)
    following = jnp.where(trial.is_started, FIRST_TRIAL, following)
    following = jnp.where(is_accepting, ACCEPTING, following)
    return jnp.where(is_training, TRAINING, following)


def _next_carried(
    seen: Verdict,
    now: dict[str, Any],
    carried: Carried,
    trial: Trial,
    aging: Aging,
    rise: Rise,
    scale: jax.Array,
) -> Carried:
    """What goes on to the next step."""
    lowest = _next_lowest_signal(seen, now, carried, trial.is_started)
    doubted = jnp.where(has_died(now), twice_level(rise), rise.middle)
    to_beat = jnp.where(aging.is_doubted, doubted, halve_excess(seen, lowest))
    return Carried(
        scale=scale,
        # If the trial fails, the level is what explosions are compared with.
        lowest_signal=jnp.where(aging.is_doubted, rise.level, lowest),
        to_beat=jnp.where(trial.is_started, to_beat, carried.to_beat),
        rise=follow(
            rise, trial.is_confirmed, trial.is_failed, aging.is_copied, aging.is_swapped
        ),
    )


def _next_lowest_signal(
    seen: Verdict, now: dict[str, Any], carried: Carried, is_started: jax.Array
) -> jax.Array:
    """See the table above; +inf if a step in the row was non-finite."""
    phase, lowest = now["phase"], carried.lowest_signal
    is_first = (now["suspect_in_a_row"] <= 1) | (phase == ACCEPTING)
    found = jnp.where(is_first, seen.signal, jnp.minimum(lowest, seen.signal))
    is_known = (now["suspect_in_a_row"] > 0) & ~seen.has_nonfinite_updates
    is_kept = is_trial_in(phase) | ((phase == ACCEPTING) & ~is_started)
    return jnp.where(is_kept, lowest, jnp.where(is_known, found, jnp.inf))


def _age_snapshots(
    every: int,
    now: dict[str, Any],
    is_doubted: jax.Array,
    is_healthy: jax.Array,
    is_accepted: jax.Array,
) -> Aging:
    """Counts healthy steps since the older snapshot, and says what is due.

    An accepted step makes it 1 at least: it was applied. After 2 * `snapshot_every` the
    newer snapshot is the older one, of age `snapshot_every`.
    """
    age = now["age"] + is_healthy.astype(jnp.int32)
    age = jnp.where(is_accepted, jnp.maximum(age, 1), age)
    is_swapped = is_healthy & (age == 2 * every)
    is_copied = is_healthy & (is_swapped | (age == every))
    is_doubted &= is_copied & (now["phase"] == TRAINING)
    return Aging(
        age=jnp.where(is_swapped, every, age),
        # Snapshots stay while the older one is tried.
        is_copied=is_copied & ~is_doubted,
        is_swapped=is_swapped & ~is_doubted,
        is_doubted=is_doubted,
    )
