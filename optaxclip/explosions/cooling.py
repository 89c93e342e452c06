"""By how much a rollback makes the next updates smaller, and how they recover.

Internal; `help(optaxclip.explosions)` says it step by step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip.explosions.rising import Rise, has_only_risen
from optaxclip.explosions.settings import Settings
from optaxclip.xla import materialize

RECURRENCE = 300
"""Steps after a cut within which another one has the same cause: three times the age of
the oldest snapshot by default, so that the cause had time to return."""
EARLY = 64
"""Half of the window of the rules. A rollback before this step cuts the scale in full,
because the run was never healthy with its steps."""
LATER_CUT = 1 / 16
"""The lowest scale that a first cut after `EARLY` sets, from above it: the steps were
right for some time. Not where the loss has only risen: with it a seed of the zoo's
"GPT, too large steps" ends at 3.01, near the start; with a full cut at 2.59."""
REPEATED_CUT = 1 / 8
"""The factor of a cut that soon follows another one: the scale that explodes again
is near the one that is stable."""
LEAST_SCALE = 2**-12
"""The lowest scale of all: three cuts after one to 1/16 from which nothing recovered. A
run that still explodes there is not saved by smaller steps."""


def cool(
    settings: Settings,
    scale: jax.Array,
    rise: Rise,
    now: dict[str, Any],
    is_cut: jax.Array,
    is_healthy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The cuts in succession if this step is one, and the scale after it.

    `is_cut`: it is a rollback after which the updates are to be smaller.
    """
    strikes = _next_strikes(now)
    if settings.cool_down is None:
        return strikes, scale
    cut = jnp.asarray(settings.cool_down, jnp.float32)
    if settings.has_snapshots:
        lower = _cut_scale(scale, rise, now, strikes, cut)
    else:
        # Once a row, at the step that would start a trial, not at each one after it.
        is_cut = now["in_a_row"] == settings.rollback_after
        lower = scale * cut
    # It may be traced, and so not checked.
    growth = jnp.clip(settings.recovery, 1, 1 / LEAST_SCALE)
    grown = jnp.minimum(scale * jnp.where(is_healthy, growth, 1), 1)
    scale = jnp.where(is_cut, jnp.maximum(lower, LEAST_SCALE), grown)
    return strikes, materialize(scale).astype(jnp.float32)


def _next_strikes(now: dict[str, Any]) -> jax.Array:
    """The cuts in succession, this step among them."""
    is_repeated = now["steps"] - now["last_cut"] < RECURRENCE
    # Before the first cut `last_cut` is -1, as if one had just been.
    is_repeated &= now["strikes"] > 0
    return jnp.where(is_repeated, now["strikes"] + 1, 1)


def _cut_scale(
    scale: jax.Array,
    rise: Rise,
    now: dict[str, Any],
    strikes: jax.Array,
    cut: jax.Array,
) -> jax.Array:
    """The scale after a rollback, at most the one before it."""
    # The snapshot was better, so the steps are too large, by an unknown factor.
    # If they were never right, or not at LATER_CUT either, the cut is full.
    is_full = (now["steps"] < EARLY) | (scale <= LATER_CUT) | has_only_risen(rise)
    once = jnp.where(is_full, cut, jnp.maximum(cut, LATER_CUT))
    again = jnp.minimum(cut, scale * REPEATED_CUT)
    lower = jnp.where(strikes == 1, once, again)
    return jnp.minimum(lower, scale)
