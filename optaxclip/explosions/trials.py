"""Trials of a snapshot: earlier parameters, tried on two batches.

Internal. `deciding` has the table of the phases, and says what becomes of the steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip.explosions.carried import Carried
from optaxclip.explosions.cooling import EARLY
from optaxclip.explosions.dying import has_died, lives
from optaxclip.explosions.recurring import num_passed
from optaxclip.explosions.settings import Settings
from optaxclip.explosions.state import Verdict

PHASES = ("training", "first trial", "second trial", "accepting")
TRAINING, FIRST_TRIAL, SECOND_TRIAL, ACCEPTING = range(len(PHASES))

NUM_NONFINITE = 10
"""Non-finite gradients in a row before a trial. They are never applied, so waiting
costs little; a loss scale that starts 2**9 too high is not the parameters' fault."""
NUM_DOUBTFUL = 3
"""So many suspect steps more are necessary in the first `EARLY`: until then a limit is
a multiple of the largest loss so far, which may be low by chance. The steps are
skipped, so waiting costs little. Runs that begin with nothing to learn:
`tests/benchmarks/README.md`, "Nothing to learn"."""
MAX_DOUBTFUL = 4.0
"""Not where all of the row are above so many times the limit. If those wait too, no
seed of the zoo's "missed and false" and "stock" is saved, which explode again."""


def is_trial_in(phase: jax.Array) -> jax.Array:
    """Whether a step is a trial of the snapshot."""
    return (phase == FIRST_TRIAL) | (phase == SECOND_TRIAL)


def is_suspect(seen: Verdict) -> jax.Array:
    """Whether a step speaks against its parameters."""
    return seen.signal > seen.signal_limit


class Comparison(NamedTuple):
    """What the older snapshot says of the parameters, where it is asked."""

    is_away: jax.Array
    """Whether a trial is not at the parameters of the snapshot."""
    is_broken: jax.Array
    """Whether the parameters hold NaN."""
    pull: jax.Array
    """See `Rise.pulls`; 0 where it is of no use."""


class Trial(NamedTuple):
    """How a trial of the snapshot goes on; bool `[]` each."""

    is_started: jax.Array
    is_failed: jax.Array
    """The snapshot is not better, or was not reached: what was put aside comes back."""
    is_confirmed: jax.Array
    """It succeeded: that is a rollback."""
    is_blocked: jax.Array
    """It failed because the snapshot was not reached: the updates were not applied as
    they were."""

    @property
    def is_over(self) -> jax.Array:
        """It has ended, either way."""
        return self.is_confirmed | self.is_failed


def next_trial(
    settings: Settings,
    seen: Verdict,
    now: dict[str, Any],
    carried: Carried,
    is_away: jax.Array,
    is_change: jax.Array,
    is_doubted: jax.Array,
) -> Trial:
    """Starts a trial, ends it, or goes on: the table of phases in `deciding`.

    Args:
      settings: The arguments.
      seen: What is known of the step.
      now: The `COUNTS`, with this step.
      carried: As it was before.
      is_away: Whether a trial is not at the parameters of the snapshot.
      is_change: Whether the step is taken as a change for good.
      is_doubted: Whether the loss has slowly risen, or the network has died.
    """
    is_trial = is_trial_in(now["phase"])
    if not settings.has_snapshots:
        return Trial(*(jnp.zeros_like(is_trial),) * 4)
    num_doubtful = jnp.where(_is_doubtful(seen, now, carried), NUM_DOUBTFUL, 0)
    num_needed = settings.rollback_after + num_doubtful + num_passed(now)
    is_persistent = now["suspect_in_a_row"] >= num_needed
    is_nonfinite = now["nonfinite_updates_in_a_row"] >= NUM_NONFINITE
    is_due = ((is_persistent & ~is_change) | is_nonfinite) & ~is_trial
    # At age 0 no step was applied since the snapshot: it is what the run has.
    is_started = (is_due & (now["age"] > 0)) | is_doubted
    is_better = (seen.signal <= carried.to_beat) & ~seen.has_nonfinite_updates
    is_better &= lives(seen, now) | ~has_died(now)
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


def halve_excess(seen: Verdict, lowest_signal: jax.Array) -> jax.Array:
    """The signal at which half of the excess is gone; +inf if none is known.

    The rest may be usual for the snapshot: the limit has followed the run since.
    """
    # Halves first: the sum of the two may overflow.
    middle = 0.5 * seen.signal_limit + 0.5 * lowest_signal
    return jnp.where(lowest_signal < jnp.inf, middle, jnp.inf)


def _is_doubtful(seen: Verdict, now: dict[str, Any], carried: Carried) -> jax.Array:
    """Whether the limit may be low by chance: not if all of the row are far above."""
    lowest = jnp.minimum(seen.signal, carried.lowest_signal)
    # The signal may be negative.
    most = seen.signal_limit + (MAX_DOUBTFUL - 1) * jnp.abs(seen.signal_limit)
    return (now["steps"] <= EARLY) & (lowest <= most)
