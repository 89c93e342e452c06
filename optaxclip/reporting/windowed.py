"""Shares, percentiles, and SpikeScore of the last steps of a record. Internal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip.explosions.rules import RULES
from optaxclip.explosions.state import FLAGS
from optaxclip.extras import NO_LOSS
from optaxclip.numerics import safe_unit
from optaxclip.packing import flags_of
from optaxclip.ring import RecordState, rows_of

PERCENTILES = (50, 90, 99)

# As in OLMo-core, `src/olmo_core/train/callbacks/stability_monitor.py`.
NUM_BEFORE = 128
"""A spike is judged by the mean of so many values before it."""
NUM_DEVIATIONS = 6.0
"""It exceeds that by more than so many standard deviations."""
LEAST_DEVIATION = 1e-10
"""With a smaller one nothing is a spike."""


def windowed_metrics(state, norms: jax.Array, window: int | None) -> dict:
    """Scalars over the last steps.

    Args:
      state: One that holds a record.
      norms: Of all updates, on each step in the order of the record's rows.
      window: Number of steps, at most those that are kept; None for these.
    """
    record: RecordState = state.record
    num_kept = len(record.rows)
    length = num_kept if window is None else min(window, num_kept)
    # Of the last steps in time order; a step below 0 has not been.
    steps = record.num_steps - num_kept + jnp.arange(num_kept, dtype=jnp.int32)
    norms = norms[steps % num_kept]
    columns, _ = rows_of(record, steps)
    losses = columns["loss"]
    last = slice(num_kept - length, None)
    found = _percentiles(norms[last], steps[last] >= 0)
    # Rows before the first step are zeros: no flag is set in them.
    flags = flags_of(columns["fired"][last].astype(jnp.int32), len(FLAGS))
    fired = flags[:, : len(RULES)]
    num_steps = jnp.clip(record.num_steps, 1, length)
    nums = {"nonfinite": _num(fired[:, RULES.index("nonfinite")])}
    if state.has_rules:
        nums["exploded"] = _num(jnp.any(fired, axis=1))
    if state.is_skipping:
        # Each is of the step before; that of the last step stands in no row yet.
        after_skipped = flags[1:, FLAGS.index("after_skipped")]
        nums["skipped"] = _num(after_skipped) + _num(state.detection.is_skipped)
    found |= {f"{kind}_fraction": _share(num, num_steps) for kind, num in nums.items()}
    if num_kept > NUM_BEFORE:
        # A loss that was not given is no spike, and those after it cannot be judged.
        losses = jnp.where(losses == NO_LOSS, -jnp.inf, losses)
        is_spike = _are_spikes(norms, steps) | _are_spikes(losses, steps)
        length = min(length, num_kept - NUM_BEFORE)
        num_spikes = _num(is_spike[-length:])
        found["spike_score"] = _share(num_spikes, jnp.clip(record.num_steps, 1, length))
    return {f"window/{name}": value for name, value in found.items()}


def _num(flags: jax.Array) -> jax.Array:
    return jnp.sum(flags, dtype=jnp.int32)


def _share(num: jax.Array, num_steps: jax.Array) -> jax.Array:
    return num.astype(jnp.float32) / num_steps.astype(jnp.float32)


def _percentiles(norms: jax.Array, is_step: jax.Array) -> dict[str, jax.Array]:
    """Norms that so many percent of the finite ones do not exceed; 0 without any."""
    is_known = is_step & (norms < jnp.inf)  # NaN is not
    ordered = jnp.sort(jnp.where(is_known, norms, jnp.inf))
    num = _num(is_known)
    places = {p: jnp.maximum(-(-num * p // 100) - 1, 0) for p in PERCENTILES}
    return {
        f"norm_p{p}": jnp.where(num > 0, ordered[place], 0)
        for p, place in places.items()
    }


def _are_spikes(values: jax.Array, steps: jax.Array) -> jax.Array:
    """Which values are spikes, from the `NUM_BEFORE`-th on; bool `[num_others]`.

    As OLMo-core tells them: none until so many are known before it, and none after one
    of these that was non-finite.
    """
    num = len(values) - NUM_BEFORE
    before = values[np.arange(num)[:, None] + np.arange(NUM_BEFORE)]
    is_finite = jnp.isfinite(before)
    is_known = jnp.all(is_finite, axis=1) & (steps[:num] >= 0)
    before = jnp.where(is_finite, before, 0)
    # In units of the largest: squares of norms may be no float32.
    unit = safe_unit(jnp.max(jnp.abs(before), axis=1))
    unit = jnp.where(unit > 0, unit, 1)
    ratios = before / unit[:, None]
    mean = jnp.mean(ratios, axis=1)
    deviation = jnp.sqrt(jnp.mean(jnp.square(ratios - mean[:, None]), axis=1))
    exceeds = values[NUM_BEFORE:] / unit > mean + NUM_DEVIATIONS * deviation
    return is_known & exceeds & (deviation * unit >= LEAST_DEVIATION)
