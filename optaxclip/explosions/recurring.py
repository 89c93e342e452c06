"""Outliers that are taken, as where batches of a rare kind are part of the data.

Internal. An outlier is a step that is bad (see `Verdict`) where the step before it was
not, with finite gradients of a norm of at most `MAX_RATIO` times its limit, whatever
the loss. Whoever skips each batch of a rare kind never learns that kind. So an outlier
is taken, clipped, if its loss is usual, or if two others came in the 128 steps before;
early, if one did. Outliers that come alone, again and again, are less of a reason to
doubt the parameters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip.explosions.cooling import EARLY
from optaxclip.explosions.state import Verdict

MAX_RATIO = 10.0
"""What is larger is more likely corrupt, and is skipped each time: where it is taken as
well, clipped, the zoo's "regression, inputs x1000" with each 40th batch corrupt ends at
29 to 73 in four seeds, and not at 5 to 8."""
MEMORY = 128
"""The third outlier within so many steps is taken: the window of the rules. In the
first `EARLY` steps it is the second. Of the zoo's "deep classifier, rising step" one
seed of four was lost where it was the second later too, and two where it was the first,
whatever its loss. Each of the two before makes one more suspect step necessary for a
trial."""


def find_outlier(
    seen: Verdict, now: dict[str, Any], is_trial: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether the step is an outlier, and whether it is taken.

    Its loss may be of any size: that of a rare kind may be hundreds of times the usual
    one, as a first reward where values are near zero. Its norm is clipped.
    """
    is_outlier = seen.is_bad & ~seen.has_nonfinite_updates & ~is_trial
    is_outlier &= (now["in_a_row"] == 1) & (seen.norm <= MAX_RATIO * seen.norm_limit)
    # Without a limit on the norm there is none to clip to.
    is_outlier &= seen.norm_limit < jnp.inf
    # Early the rules know too little to doubt it twice.
    before = jnp.where(
        now["steps"] <= EARLY, now["last_outlier"], now["last_outlier_but_one"]
    )
    is_taken = (before >= 0) & (_step(now) - before <= MEMORY)
    if seen.has_loss_rule:
        # A norm that is clipped does no harm where the loss is usual. A reward that
        # comes once in 50 steps is never learned if those are skipped.
        is_taken |= (seen.signal <= seen.signal_limit) & jnp.isfinite(seen.signal)
    return is_outlier, is_outlier & is_taken


def remember(
    now: dict[str, Any], is_outlier: jax.Array, is_over: jax.Array
) -> dict[str, jax.Array]:
    """The two that are remembered after this step; none if `is_over`."""
    steps = {
        "last_outlier": jnp.where(is_outlier, _step(now), now["last_outlier"]),
        "last_outlier_but_one": jnp.where(
            is_outlier, now["last_outlier"], now["last_outlier_but_one"]
        ),
    }
    return {name: jnp.where(is_over, -1, step) for name, step in steps.items()}


def num_passed(now: dict[str, Any]) -> jax.Array:
    """How many of the remembered were not long ago, and before this row.

    0 to 2; from the second step of a row that an outlier began 0 or 1, because that
    is one of the two.
    """
    began = _step(now) - now["in_a_row"] + 1
    steps = jnp.stack([now["last_outlier"], now["last_outlier_but_one"]])
    is_one = (steps >= 0) & (steps < began) & (_step(now) - steps <= MEMORY)
    return jnp.sum(is_one, dtype=jnp.int32)


def _step(now: dict[str, Any]) -> jax.Array:
    """The index of this step."""
    return now["steps"] - 1
