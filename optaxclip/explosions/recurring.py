"""Mild explosions that recur, as where batches of a rare kind are part of the data.

Internal. Whoever skips each batch of a rare kind never learns that kind. So the third
of its explosions is taken and learned, early the second; and what explodes and passes,
again and again, is less of a reason to doubt the parameters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip.explosions.state import Verdict

MILD = 10.0
"""A finite explosion is mild if loss and norm are at most so many times their limits.
In the zoo's "rare positives" those of the rare kind reach 8 times. With 30, and with a
memory of 128 steps, 7 of 12 seeds of its run with too large steps were saved, not 10.
"""
MEMORY = 64
"""The third mild explosion within so many steps is taken: half of the window of the
rules, so that what recurs in it is learned. In the first so many steps of a run it is
the second; where it was that later too, a seed of "deep classifier, rising step" was
lost. And each of the two before makes one more suspect step necessary for a trial."""


def find_mild(
    seen: Verdict, now: dict[str, Any], is_trial: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether a mild explosion begins, and whether it recurs, so that it is taken.

    It begins where no step before it exploded: the others of a row are skipped.
    """
    is_mild = seen.signal <= MILD * jnp.abs(seen.signal_limit)
    # Without a limit on the norm there is none to clip to.
    is_mild &= (seen.norm <= MILD * seen.norm_limit) & (seen.norm_limit < jnp.inf)
    is_mild &= (now["in_a_row"] == 1) & ~seen.has_nonfinite_updates & ~is_trial
    # Early the rules know too little to doubt it twice.
    is_early = now["steps"] <= MEMORY
    before = jnp.where(is_early, now["last_mild"], now["last_mild_but_one"])
    return is_mild, is_mild & (before >= 0) & (_step(now) - before <= MEMORY)


def remember(
    now: dict[str, Any], is_mild: jax.Array, is_over: jax.Array
) -> dict[str, jax.Array]:
    """The two that are remembered after this step; none if `is_over`."""
    steps = {
        "last_mild": jnp.where(is_mild, _step(now), now["last_mild"]),
        "last_mild_but_one": jnp.where(
            is_mild, now["last_mild"], now["last_mild_but_one"]
        ),
    }
    return {name: jnp.where(is_over, -1, step) for name, step in steps.items()}


def num_passed(now: dict[str, Any]) -> jax.Array:
    """How many of the remembered were not long ago, and before this row.

    0 to 2; 0 or 1 if this row began mildly, since then its first step is one of them.
    """
    began = _step(now) - now["in_a_row"] + 1
    steps = jnp.stack([now["last_mild"], now["last_mild_but_one"]])
    return jnp.sum((steps >= 0) & (steps < began) & (_step(now) - steps <= MEMORY))


def _step(now: dict[str, Any]) -> jax.Array:
    """The index of this step."""
    return now["steps"] - 1
