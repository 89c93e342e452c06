"""The states of detection and skipping, and how to read them. Internal."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from optaxclip.explosions.rules import RULES, Fired
from optaxclip.packing import Packing, View, flags_of
from optaxclip.ring import RecordState

COUNTS = Packing(
    ints=(
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
        "dead_in_a_row",
        "most_alive",
        "next_most",
        "last_skipped",
        "last",
    )
)
"""How `DetectExplosionsState.record.counts` is packed; `state.counts` reads it."""

EVENT = Packing(
    ints=("step", "leaf", "fired"),
    floats=("norm", "share", "loss", "norm_limit", "share_limit", "loss_limit"),
)
"""How a row of `DetectExplosionsState.events` is packed; `event_of` reads it. The parts
of the user's own numbers stand behind these."""

CARRIED = Packing(
    floats=(
        "scale",
        "lowest_signal",
        "to_beat",
        "first",
        "level",
        "last",
        "noise",
        "older",
        "older_noise",
        "newer",
        "newer_noise",
        "pulls",
        "squares",
    )
)
"""How `SkipExplosionsState.carried` is packed: a `carried.Carried`."""

NUM_ONSETS = 2
"""The first rows of `events`: where the last explosion began, and where the last
non-finite steps did."""
NUM_SKIPPED = 64
"""The rows behind these: the last skipped steps, however long ago they were. Chosen by
size: 64 rows of nine int32 are 2304 bytes, whatever the number of leaves."""
FLAGS = (*RULES, "after_skipped")
"""The flags in "fired" of a row. The last says that the step before it was skipped:
whether its own step is, is decided after the row is written."""


class DetectExplosionsState(NamedTuple):
    """State of `detect_explosions`, as `{label: DetectExplosionsState}`.

    Few arrays, because each of them costs a small step some microseconds; `metrics` and
    `raise_if_exploded` name what they hold.
    """

    events: jax.Array
    """int32 `[2, 9 + 2 * num_columns]`, `[66, ...]` in `skip_explosions`: two steps,
    which are the one on which the last explosion began (after `max_gap` steps without
    one), and the first of the last non-finite ones in a row; and the last 64 that were
    skipped, of which the one after `i` others is in row `2 + i % 64`. Of each its index
    (-1 for none); the leading leaf (the first that was non-finite, or else the one that
    had grown most, on average since 1, 9, 17, ... 57 steps before; -1 if none had);
    which of the four rules fired; the norm, the share of the leading leaf, the loss
    (`NO_LOSS` where not given), the limits of these (+inf for none); and the two parts
    of each number of the user's own. `began` and `first_nonfinite` read it."""
    rule_states: tuple[Any, Any, Any]
    """States of the limits on norm, share and loss."""
    record: RecordState
    """Of the last `window` steps, per leaf. Its `counts`, int32 `[27]`: the number of
    steps; on how many of them the four rules fired (non-finite, norm, share, loss) and
    on how many any; how many `skip_explosions` skipped, its rollbacks, those that did
    not reach the parameters, and how often it mended the inner state; how many in a
    row, up to the last step, were bad (see `Verdict`), were non-finite, had non-finite
    updates, and spoke against the parameters (by the loss, or without one by the norm);
    whether it gave up, 2 for NaN in the parameters; where it stands in a rollback
    (`trials.PHASES`), healthy steps since the older snapshot, cuts of the updates in
    succession, the number of steps at the last rollback and at the last cut; and the
    last two outliers (see `recurring`); how many steps in a row most leaves had
    gradients of 0, and the most leaves that had others, since each of the two snapshots
    (see `dying`); the last step that was skipped, and that exploded. -1 for none."""

    # What kind of a state it is, for those that read all kinds.
    has_record = True
    has_rules = True
    is_skipping = False

    @property
    def counts(self) -> View:
        """The `COUNTS` by their names: int32 `[]` each."""
        return View(COUNTS, self.record.counts)

    @property
    def began(self) -> Event:
        """The step on which the last explosion began."""
        return event_of(self.events[..., 0, :])

    @property
    def first_nonfinite(self) -> Event:
        """The first of the last non-finite steps in a row."""
        return event_of(self.events[..., 1, :])

    # What a step was is read from the counts: they stay known until the next of a kind,
    # and a flag of its own would be one more number to write in each step.

    @property
    def is_exploded(self) -> jax.Array:
        """Whether the last step exploded; False before any. bool `[...]`."""
        return self._is_last_step(self.counts.last)

    @property
    def is_skipped(self) -> jax.Array:
        """Whether `skip_explosions` skipped the last step; likewise."""
        return self._is_last_step(self.counts.last_skipped)

    @property
    def is_rolled_back(self) -> jax.Array:
        """Whether the last step confirmed a rollback; likewise."""
        return self._is_last_step(self.counts.last_rollback - 1)

    def _is_last_step(self, index: jax.Array) -> jax.Array:
        steps = self.counts.steps
        # Before the first step both are -1.
        return (index == steps - 1) & (steps > 0)

    @property
    def detection(self) -> DetectExplosionsState:
        """Itself, as `detection` of what holds one."""
        return self

    @property
    def read_by_metrics(self) -> DetectExplosionsState:
        """As of a `RecordState`."""
        return self._replace(rule_states=((), (), ()))


class Event(NamedTuple):
    """What is known of one step; see `DetectExplosionsState`."""

    step: jax.Array
    leaf: jax.Array
    fired: jax.Array
    """bool `[..., 4]`: which of the `RULES`."""
    norm: jax.Array
    share: jax.Array
    loss: jax.Array
    norm_limit: jax.Array
    share_limit: jax.Array
    loss_limit: jax.Array
    tag: jax.Array
    """The two parts of each number of the user's own."""


def event_of(row: Any) -> Event:
    """A row of `events`, or several: `[..., 9 + 2 * num_columns]`."""
    event = Event(**EVENT.unpack(row), tag=EVENT.read_others(row))
    return event._replace(fired=flags_of(event.fired, len(RULES)))


class Verdict(NamedTuple):
    """What is known of one step; all arrays are scalars but `event`."""

    is_exploded: jax.Array
    """Whether any rule fired."""
    fired: Fired
    """Which of them."""
    leaf: jax.Array
    """The index of the leading leaf, -1 for none."""
    is_bad: jax.Array
    """Whether it exploded, and not by a loss alone that is non-finite: with finite
    gradients that says nothing, as where float16 overflows in the loss. Nor by a share
    alone: it rises first where a layer explodes, but also where one wakes up late, and
    without those steps such a layer is not learned."""
    has_nonfinite_updates: jax.Array
    norm: jax.Array
    norm_limit: jax.Array
    signal: jax.Array
    """What tells bad parameters from a bad batch: the loss, or the norm where no loss
    is given or no rule looks at it."""
    signal_limit: jax.Array
    num_alive: jax.Array
    """How many leaves have gradients that are not all 0."""
    event: jax.Array
    """The step as a row of `events`, `[9 + 2 * num_columns]`."""
    has_loss_rule: bool
    """Whether the signal is the loss; known while tracing."""


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
    """float32 `[9]`, the numbers of a `carried.Carried`: the factor of the updates,
    below 1 while they cool down; two signals, and what is known of the level of the
    loss. +inf for none. `scale` reads the first."""
    snapshots: Snapshots | tuple[()]
    """() without rollback."""

    # What kind of a state it is, for those that read all kinds.
    has_record = True
    has_rules = True
    is_skipping = True

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
        return CARRIED.read(self.carried, "scale")

    @property
    def gave_up(self) -> jax.Array:
        """Whether it gave up, on non-finite steps or NaN in parameters: bool `[]`."""
        return self.explosions.counts.gave_up > 0
