"""The states of detection and skipping, and how to read them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.explosions.rules import RULES
from optaxclip.numerics import saturating_cast
from optaxclip.ring import RecordState
from optaxclip.xla import stack_scalars

COUNTS = (
    "steps",
    *RULES,
    "exploded",
    "skipped",
    "rollbacks",
    "blocked_rollbacks",
    "mended",
    "in_a_row",
    "nonfinite_in_a_row",
    "nonfinite_updates_in_a_row",
    "suspect_in_a_row",
    "gave_up",
    "phase",
    "age",
    "strikes",
    "last_rollback",
    "last_cut",
    "last_outlier",
    "last_outlier_but_one",
    "last_skipped",
    "last",
)
"""What each element of `DetectExplosionsState.record.counts` is."""

NUM_SKIPPED = 64
"""The last so many skipped steps stay known, however long ago they were."""
NUM_TOLD = 2
"""Rows of `events` before them."""
AFTER_SKIPPED = 2 ** len(RULES)
"""The bit in "fired" of a row that says that the step before it was skipped: whether
its own step is, is decided after the row is written."""


class DetectExplosionsState(NamedTuple):
    """State of `detect_explosions`, as `{label: DetectExplosionsState}`.

    Few arrays, since each of them costs a small step some microseconds; `metrics` and
    `raise_if_exploded` name what they hold.
    """

    events: jax.Array
    """int32 `[2, 9 + 2 * num_columns]`, `[66, ...]` in `skip_explosions`: two steps,
    which are the one on which the last explosion began (after `max_gap` steps without
    one), and the first of the last non-finite ones in a row; and the last 64 that were
    skipped, of which the one after `i` others is in row `2 + i % 64`. Of each its index
    (-1 for none); the leading leaf (the first that was non-finite, or else the one that
    had grown most, on average since 1, 9, 17, ... 57 steps before; -1 if none had); as
    bits, which of the four rules fired; and, as the bits of a float32, the norm, the
    share of the leading leaf, the loss (`NO_LOSS` where not given), the limits of these
    (+inf for none), and the two parts of each number of the user's own."""
    rule_states: tuple[Any, Any, Any]
    """States of the limits on norm, share and loss."""
    record: RecordState
    """Of the last `window` steps, per leaf. Its `counts`, int32 `[24]`: the number of
    steps; on how many of them the four rules fired (non-finite, norm, share, loss) and
    on how many any; how many `skip_explosions` skipped, its rollbacks, those that did
    not reach the parameters, and how often it mended the inner state; how many in a
    row, up to the last step, were bad (exploded, and not by a loss alone that is
    non-finite), were non-finite, had non-finite updates, and spoke against the
    parameters (by the loss, or without one by the norm); whether it gave up, 2 for NaN
    in the parameters; where it stands in a rollback (`trials.PHASES`), healthy steps
    since the older snapshot, cuts of the updates in succession, the number of steps at
    the last rollback and at the last cut; and the last two outliers (see `recurring`),
    the last step that was skipped, and that exploded. -1 for none."""

    @property
    def detection(self) -> DetectExplosionsState:
        """Itself, as `detection` of what holds one."""
        return self

    @property
    def read_by_metrics(self) -> DetectExplosionsState:
        """As of a `RecordState`."""
        return self._replace(rule_states=((), (), ()))


def count(state: DetectExplosionsState, name: str) -> jax.Array:
    """One of the `COUNTS`."""
    return state.record.counts[..., COUNTS.index(name)]


def with_values(
    state: DetectExplosionsState, values: dict[str, jax.Array]
) -> DetectExplosionsState:
    """The state with other `COUNTS`."""
    counts = state.record.counts
    # All in one array: each array of a state costs a small step microseconds.
    new = [values.get(name, counts[i]) for i, name in enumerate(COUNTS)]
    counts = stack_scalars([jnp.asarray(x, jnp.int32) for x in new])
    return state._replace(record=state.record._replace(counts=counts))


class Event(NamedTuple):
    """What is known of one step; see `DetectExplosionsState`."""

    step: jax.Array
    leaf: jax.Array
    fired: jax.Array
    norm: jax.Array
    share: jax.Array
    loss: jax.Array
    norm_limit: jax.Array
    share_limit: jax.Array
    loss_limit: jax.Array
    tag: jax.Array
    """The two parts of each number of the user's own."""


NUM_OF_EVENT = len(Event._fields) - 1
"""Numbers of an event before those of the user's own."""


def read_step(state: DetectExplosionsState, which: str) -> Event:
    """The step "began" or "nonfinite" of a state."""
    # Rows of one array and not two states: each array costs microseconds.
    row = state.events[("began", "nonfinite").index(which)]
    step, leaf, fired = row[:3]
    numbers = lax.bitcast_convert_type(row[3:], jnp.float32)
    signals_and_limits, tag = jnp.split(numbers, [NUM_OF_EVENT - 3])
    return Event(step, leaf, flags_of(fired), *signals_and_limits, tag=tag)


def with_skipped(
    state: DetectExplosionsState,
    event: jax.Array,
    num_skipped: jax.Array,
    is_skipped: jax.Array,
) -> DetectExplosionsState:
    """The state that knows a step as skipped, if it is.

    Args:
      state: The state.
      event: The step, as a row of `events`.
      num_skipped: How many were skipped before.
      is_skipped: Whether it is.
    """
    row = lax.broadcasted_iota(jnp.int32, (len(state.events), 1), 0)
    # A select, which fuses with the one that makes the first two rows: the list is no
    # array and no kernel of its own.
    is_here = is_skipped & (row == NUM_TOLD + num_skipped % NUM_SKIPPED)
    return state._replace(events=jnp.where(is_here, event, state.events))


def flags_of(fired: Any) -> Any:
    """Bool `[..., 4]`: which of the `RULES` fired, of the bits of whole numbers."""
    return (fired[..., None] >> np.arange(len(RULES), dtype=np.int32)) % 2 == 1


class Verdict(NamedTuple):
    """What is known of one step; all arrays are scalars but `event`."""

    is_bad: jax.Array
    """Whether it exploded, and not by a loss alone that is non-finite: with finite
    gradients that says nothing, as where float16 overflows in the loss."""
    has_nonfinite_updates: jax.Array
    norm: jax.Array
    norm_limit: jax.Array
    signal: jax.Array
    """What tells bad parameters from a bad batch: the loss, or the norm where no loss
    is given or no rule looks at it."""
    signal_limit: jax.Array
    event: jax.Array
    """The step as a row of `events`, `[9 + 2 * num_columns]`."""
    has_loss_rule: bool
    """Whether the signal is the loss; known while tracing."""


def as_bits(x: jax.Array) -> jax.Array:
    """The bits of a float32, as a whole number."""
    return lax.bitcast_convert_type(saturating_cast(x, jnp.float32), jnp.int32)


class Snapshots(NamedTuple):
    """Two copies of the parameters; zeros before the first step."""

    older: Any
    """The copy that a trial tries."""
    newer: Any
    """Its successor, due after `snapshot_every` healthy steps; in a trial, what was put
    aside."""


BROKEN = 2
"""The count "gave_up" where it is because the parameters are NaN."""


class SkipExplosionsState(NamedTuple):
    """State of `skip_explosions`, as `{label: SkipExplosionsState}`."""

    explosions: DetectExplosionsState
    """What was noticed."""
    inner_state: Any
    """State of the wrapped transformation."""
    carried: jax.Array
    """float32 `[9]`, the numbers of a `deciding.Carried`: the factor of the updates,
    below 1 while they cool down; two signals, and what is known of the level of the
    loss. +inf for none."""
    snapshots: Snapshots | tuple[()]
    """() without rollback."""

    @property
    def detection(self) -> DetectExplosionsState:
        """What was noticed."""
        return self.explosions

    @property
    def record(self) -> RecordState:
        """That of the detection."""
        return self.explosions.record

    @property
    def read_by_metrics(self) -> SkipExplosionsState:
        """As of a `RecordState`."""
        explosions = self.explosions.read_by_metrics
        return self._replace(explosions=explosions, inner_state=(), snapshots=())

    @property
    def scale(self) -> jax.Array:
        """Factor of the updates: float32 `[]`."""
        return self.carried[..., 0]

    @property
    def gave_up(self) -> jax.Array:
        """Whether it gave up, on non-finite steps or NaN in parameters: bool `[]`."""
        return count(self.explosions, "gave_up") > 0


def was_taken(state: SkipExplosionsState) -> jax.Array:
    """Whether the last step was not skipped; True before any. bool `[...]`."""
    noticed = state.detection
    last_step = count(noticed, "steps") - 1
    return (count(noticed, "last_skipped") != last_step) | (last_step < 0)
