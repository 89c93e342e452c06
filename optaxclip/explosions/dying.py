"""A network that has died: most of its leaves have gradients of exactly 0.

Internal. Steps that are too large may take the units of a network to where their
derivative is 0, as that of a ReLU is below zero. Then the gradients of all layers
beneath are 0 and nothing is learned, while neither the loss nor the norm is above a
limit. So where a snapshot is due and most leaves are dead, the older one is tried. The
data may be the reason as well; it is better only if the leaves live there on the same
batches, at a loss of at most twice the level.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip.explosions.rising import Rise
from optaxclip.explosions.settings import Settings
from optaxclip.explosions.state import Verdict

MIN_ALIVE = 3
"""A network is alive with at least one in `MIN_ALIVE` of the leaves that were. Not one
in two: of a loss whose penalty is on the weights alone, the biases have gradients of 0
where the rest of it is. The zoo's networks that die keep 1 leaf of 4 to 18."""
NUM_DEAD = 16
"""Steps in a row, as many as `rising` asks: a choice. A phase that trains few of the
leaves may be as long, and then costs the two steps of a trial in vain."""


def count_living(
    settings: Settings, seen: Verdict, now: dict[str, Any], is_healthy: jax.Array
) -> dict[str, jax.Array]:
    """The next of those `COUNTS` that tell how many leaves live."""
    # As for a rise: not without a loss to compare, nor where it would die again.
    is_compared = settings.has_snapshots and seen.has_loss_rule
    if not is_compared or settings.cool_down is None:
        return {}
    # Where all gradients are 0, as without a reward, a step says nothing; nor does one
    # whose loss is non-finite, of which there is no level.
    is_known = is_healthy & (seen.num_alive > 0) & jnp.isfinite(seen.signal)
    num = jnp.where(is_known, seen.num_alive, 0)
    most = {name: jnp.maximum(now[name], num) for name in ("most_alive", "next_most")}
    is_dead = MIN_ALIVE * num < most["most_alive"]
    in_a_row = jnp.where(is_dead, now["dead_in_a_row"] + 1, 0)
    return most | {"dead_in_a_row": jnp.where(is_known, in_a_row, now["dead_in_a_row"])}


def has_died(now: dict[str, Any]) -> jax.Array:
    """Whether the network has died; in a trial, whether it had before."""
    return now["dead_in_a_row"] >= NUM_DEAD


def lives(seen: Verdict, now: dict[str, Any]) -> jax.Array:
    """Whether a step shows that the network is alive."""
    return MIN_ALIVE * seen.num_alive >= now["most_alive"]


def twice_level(rise: Rise) -> jax.Array:
    """The loss up to which a snapshot of a living network is better."""
    return rise.level + jnp.abs(rise.level)


def follow_living(
    now: dict[str, Any],
    is_over: jax.Array,
    is_failed: jax.Array,
    is_copied: jax.Array,
    is_swapped: jax.Array,
) -> dict[str, jax.Array]:
    """The same counts, as a `Decision` moves the snapshots."""
    most = jnp.where(is_swapped, now["next_most"], now["most_alive"])
    return {
        # What was put aside is the snapshot from now on.
        "most_alive": jnp.where(is_failed, 0, most),
        "next_most": jnp.where(is_copied, 0, now["next_most"]),
        # Steps that say nothing would leave it as it is, and start trial after trial.
        "dead_in_a_row": jnp.where(is_over, 0, now["dead_in_a_row"]),
    }
