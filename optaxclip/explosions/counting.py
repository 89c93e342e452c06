"""Counts the steps, the rules that fired, and what was done. Internal."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optaxclip.explosions.state import COUNTS, DetectExplosionsState, Verdict
from optaxclip.numerics import increment
from optaxclip.xla import stack_scalars


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
        counts, _by_count(flags | in_a_row | {"steps": jnp.ones([], bool)})
    )
    is_reset = _by_count({name: ~flag for name, flag in in_a_row.items()})
    is_last = _by_count({"last": verdict.is_exploded})
    # `counts[0]` is the index of this step: the steps before it.
    return jnp.where(is_reset, 0, jnp.where(is_last, counts[0], grown))


def _by_count(flags: dict[str, jax.Array]) -> jax.Array:
    """bool, one for each of the `COUNTS`."""
    no = jnp.zeros([], bool)
    return stack_scalars([flags.get(name, no) for name in COUNTS.names])
