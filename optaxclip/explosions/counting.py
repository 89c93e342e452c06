"""Counts the steps, the rules that fired, and what was done. Internal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip.explosions.deciding import Decision
from optaxclip.explosions.state import (
    BROKEN,
    COUNTS,
    NUM_ONSETS,
    NUM_SKIPPED,
    DetectExplosionsState,
    Verdict,
)
from optaxclip.numerics import increment


def count_step(state: DetectExplosionsState, verdict: Verdict) -> jax.Array:
    """The next `COUNTS`, before any response."""
    counts, fired = state.record.counts, verdict.fired
    flags = fired._asdict() | {"exploded": verdict.is_exploded}
    # Such a count goes back to 0 on the first step of which its flag is not true.
    in_a_row = {
        "in_a_row": verdict.is_bad,
        "nonfinite_in_a_row": fired.nonfinite,
        "nonfinite_updates_in_a_row": verdict.has_nonfinite_updates,
        # Not by the share of a leaf: that may be large at good parameters.
        "suspect_in_a_row": fired.loss if verdict.has_loss_rule else fired.norm,
    }
    # All at once, and not count by count, which would be a chain of small kernels.
    grown = increment(
        counts, COUNTS.flags(flags | in_a_row | {"steps": jnp.ones([], bool)})
    )
    is_reset = COUNTS.flags({name: ~flag for name, flag in in_a_row.items()})
    is_last = COUNTS.flags({"last": verdict.is_exploded})
    # The number of steps before this one is its index.
    index = state.counts.steps
    return jnp.where(is_reset, 0, jnp.where(is_last, index, grown))


def count_response(
    state: DetectExplosionsState,
    seen: Verdict,
    decision: Decision,
    is_skipped_after_copies: jax.Array,
) -> DetectExplosionsState:
    """The state that knows what became of the step.

    Args:
      state: What was noticed, with this step.
      seen: What is known of it.
      decision: What becomes of it.
      is_skipped_after_copies: See `move_snapshots`.
    """
    now, step = state.counts, state.counts.steps - 1
    gave_up = decision.counts["gave_up"].astype(jnp.int32)
    # The rules may have counted this step already.
    is_new = decision.is_mended & ~seen.is_exploded
    counts = decision.counts | {
        "gave_up": jnp.where(decision.is_broken, BROKEN, gave_up),
        "exploded": now.exploded + is_new.astype(jnp.int32),
        "last_skipped": jnp.where(decision.is_skipped, step, now.last_skipped),
        "mended": now.mended + decision.is_mended.astype(jnp.int32),
        "last": jnp.where(is_new, step, now.last),
    }
    row = lax.broadcasted_iota(jnp.int32, (len(state.events), 1), 0)
    is_here = is_skipped_after_copies
    is_here &= row == NUM_ONSETS + now.skipped % NUM_SKIPPED
    return state._replace(
        # A select, which fuses with the one that makes the first two rows, and not a
        # write at an index: that would be an array and a kernel of its own.
        events=jnp.where(is_here, seen.event, state.events),
        record=state.record._replace(
            counts=COUNTS.replace(state.record.counts, counts)
        ),
    )
