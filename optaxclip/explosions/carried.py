"""The numbers that `skip_explosions` carries from step to step. Internal."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip.explosions.rising import Rise
from optaxclip.explosions.state import CARRIED


class Carried(NamedTuple):
    """Float32 each, packed in `SkipExplosionsState.carried`."""

    scale: jax.Array
    """Factor of the updates."""
    lowest_signal: jax.Array
    """See the second table of `deciding`."""
    to_beat: jax.Array
    """In a trial, the signal up to which the snapshot is better."""
    rise: Rise


def first_carried() -> jax.Array:
    """Packed, before the first step: no signal is known, and nothing is scaled."""
    first = dict.fromkeys(CARRIED.names, math.inf)
    zeros = ("noise", "older_noise", "newer_noise", "pulls", "squares")
    first |= {"scale": 1.0} | dict.fromkeys(zeros, 0.0)
    return jnp.asarray(CARRIED.pack_known(first), jnp.float32)


def unpack_carried(packed: Any) -> Carried:
    """The numbers by their names."""
    numbers = CARRIED.unpack(packed)
    rise = Rise(**{name: numbers[name] for name in Rise._fields})
    own = {name: x for name, x in numbers.items() if name not in Rise._fields}
    return Carried(**own, rise=rise)


def pack_carried(carried: Carried) -> jax.Array:
    """The numbers in one array."""
    return CARRIED.pack(carried._asdict() | carried.rise._asdict())
