"""How to notice an explosion, and to say where and when it began."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip import limits
from optaxclip.checks import (
    check_label,
    check_leaves,
    check_length,
    own_state,
    value_of,
)
from optaxclip.clipping import counted
from optaxclip.limits import LimitLike, as_limit
from optaxclip.norms import (
    divided,
    measure_leaves,
    once,
    promoted,
    saturating_cast,
    side_by_side,
    total_of,
)
from optaxclip.recording import WINDOW, RecordState, empty, loss_of, pushed, rows_of
from optaxclip.scopes import Scopes, Stacked, find_scopes, layout_of

RULES = ("nonfinite", "norm", "share", "loss")
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
    "last",
)
"""What each element of `DetectExplosionsState.record.counts` is."""
NUM_FITTED = 8
"""To the norms of so many steps the growth is fitted."""

NORM_LIMIT = limits.log_quantile()
SHARE_LIMIT = limits.drift()
# A loss jumps less than a norm: with an early jump of 5 most runs of the zoo that
# explode from their first steps are missed, with 2 twice as many early steps of healthy
# ones are flagged. Near zero, as at the minimum of a function without noise or where a
# penalty begins, a healthy loss jumps by any factor. The second limit is for one that
# rises smoothly.
LOSS_LIMIT = limits.minimum(
    limits.log_quantile(2.4, min_ratio=1.7, early_jump=2.5, min_level=0.01),
    limits.above_lowest(),
)

MIN_GROWTH = 20.0
"""A share counts only where the leaf's own norm has grown by this factor as well.

That is its geometric mean growth over the last 64 steps; before, no share counts. A
share alone also rises when the other leaves fall. On the recorded traces of
`tests/benchmarks/detection.py` 3 to 20 notice the same, 40 misses one run of six; the
larger, the fewer false alarms where gates that start at zero open during a warm-up.
"""
MIN_KNOWN = 5
"""In that mean, of the eight steps that stand for the last 64, this many must have a
norm: more than half, so that neither non-finite steps nor zeros blind the rule."""
MAX_GAP = 10
"""Explosions at most this many steps apart are one: a run that is skipped, rolled back
and accepted again is flagged with gaps of a few steps."""

# The leaf that led has grown most since the steps that are so many before.
_BEFORE = np.arange(1, 64, 8, dtype=np.int32)


class DetectExplosionsState(NamedTuple):
    """State of `detect_explosions`, as `{label: DetectExplosionsState}`.

    Few arrays, since each of them costs a small step some microseconds; `metrics` and
    `raise_if_exploded` name what they hold.
    """

    told: jax.Array
    """int32 `[2, 9]`: two steps, which are the one on which the last explosion began
    (after ten without one), and the first of the last non-finite ones in a row. Of each
    its index (-1 for none); the leaf that led (the first that was not finite, or else
    the one that had grown most since every eighth of the 64 steps before; -1 if none
    had); as bits, which of the four rules fired; and, as the bits of a float32, the
    norm, the share of the leaf that led, the loss (`NO_LOSS` where not given), and the
    limits of these (+inf for none)."""
    rule_states: tuple[Any, Any, Any]
    """States of the limits on norm, share and loss."""
    record: RecordState
    """Of the last 256 steps, per leaf. Its `counts`, int32 `[20]`: the number of steps;
    on how many of them the four rules fired (not finite, norm, share, loss) and on how
    many any; how many `skip_explosions` skipped, its rollbacks, those that did not
    reach the parameters, and how often it mended the inner state; how many in a row, up
    to the last step, were no good (exploded, and not by a loss alone that is not
    finite), were not finite, had updates that were not, and spoke against the
    parameters (by the loss, or without one by the norm); whether it gave up, 2 for NaN
    in the parameters; where it stands in a rollback (`deciding.PHASES`), quiet steps
    since the older snapshot, rollbacks in succession, the step of the last; and the
    last step that exploded. -1 for none."""


def detect_explosions(
    *,
    norm: LimitLike | None = NORM_LIMIT,
    share: LimitLike | None = SHARE_LIMIT,
    loss: LimitLike | None = LOSS_LIMIT,
    max_gap: int = MAX_GAP,
    window: int = WINDOW,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "explosions",
) -> optax.GradientTransformationExtraArgs:
    """Notices exploding updates, and remembers when and where it began.

    A step explodes if it is not finite, in any leaf or in the loss, or if one of three
    signals exceeds its limit: the norm of all updates, the share of a leaf in it, and
    the loss, where the training loop gives it: `update(grads, state, params,
    value=loss)`. A share counts only in a leaf whose own norm has grown twentyfold
    within the last 64 steps. Updates pass through; `metrics` reads the verdict, and
    `raise_if_exploded` tells it.

    Placed after the optimizer, it watches the norm of the updates instead of the
    gradients. Labels in different places of a chain have to differ.

    Args:
      norm: Limit on the norm: a number, a schedule or a `Limit`; None for no such rule.
        By default `limits.log_quantile()`.
      share: Limit on the share of each leaf, within [0, 1], likewise. By default
        `limits.drift()`.
      loss: Limit on the loss, likewise; it may have either sign. By default the smaller
        of `limits.log_quantile(2.4, min_ratio=1.7, early_jump=2.5, min_level=0.01)` and
        `limits.above_lowest()`.
      max_gap: Explosions at most this many steps apart are told as one, at least 1.
      window: Number of steps that the record keeps, at least 64.
      specs: As in `clip_by_norm`; inside `jax.shard_map`, `value` must have been
        reduced over the devices.
      stacked: As in `clip_by_norm`.
      label: Under which name the state and the metrics appear.

    Returns:
      The transformation, with the state `{label: DetectExplosionsState}`: under 3 KiB
      and 20 bytes a leaf; and the record of 256 steps for `history`, 6 KiB and 1 KiB a
      leaf.

    Raises:
      ValueError: If an argument is out of range, or in `update` if `value` has axes.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> detect = optaxclip.detect_explosions()
      >>> update = jax.jit(detect.update)
      >>> state = detect.init({"w": jnp.ones(2)})
      >>> for size in [1.0, 1.1, 0.9, 50.0]:
      ...     grads = {"w": jnp.array([size, size])}
      ...     _, state = update(grads, state, value=jnp.array(0.5))
      >>> print(optaxclip.metrics(state)["explosions/count/norm"])
      1
    """
    detector = Detector(
        norm, share, loss, specs, stacked, max_gap=max_gap, window=window
    )
    check_label(label)

    def init(params):
        return {label: detector.init(params)}

    def update(updates, state, params=None, **extra_args):
        state = own_state(state, label, DetectExplosionsState)
        state, _ = detector.update(updates, value_of(extra_args), state, params)
        return updates, {label: state}

    return optax.GradientTransformationExtraArgs(init, update)


def count(state: DetectExplosionsState, name: str) -> jax.Array:
    """One of the `COUNTS`."""
    return state.record.counts[..., COUNTS.index(name)]


def with_values(
    state: DetectExplosionsState, values: dict[str, jax.Array]
) -> DetectExplosionsState:
    """The state with other `COUNTS`."""
    counts = state.record.counts
    new = [values.get(name, counts[i]) for i, name in enumerate(COUNTS)]
    counts = side_by_side([jnp.asarray(x, jnp.int32) for x in new])
    return state._replace(record=state.record._replace(counts=counts))


class Step(NamedTuple):
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


def read_step(state: DetectExplosionsState, which: str) -> Step:
    """The step "began" or "nonfinite" of a state."""
    row = state.told[("began", "nonfinite").index(which)]
    step, leaf, fired, *numbers = row
    numbers = (lax.bitcast_convert_type(x, jnp.float32) for x in numbers)
    return Step(step, leaf, flags_of(fired), *numbers)


def flags_of(fired: Any) -> Any:
    """Bool `[..., 4]`: which of the `RULES` fired, of the bits of whole numbers."""
    return (fired[..., None] >> np.arange(len(RULES), dtype=np.int32)) % 2 == 1


def fitted_growth(record: RecordState) -> jax.Array:
    """Growth of the norm per step in the last eight, as far as they are finite.

    `exp` of the slope of a line fitted to the logarithms.
    """
    steps = record.counts[0] - NUM_FITTED + jnp.arange(NUM_FITTED, dtype=jnp.int32)
    norms = jax.vmap(total_of)(rows_of(record, steps)[1])
    is_known = (norms > 0) & (norms < jnp.inf)  # 0 in rows without a step yet
    logs = jnp.log(jnp.where(is_known, norms, 1))
    times = jnp.arange(norms.size, dtype=norms.dtype)
    num_known = jnp.maximum(jnp.sum(is_known), 1).astype(norms.dtype)
    center = jnp.sum(times, where=is_known) / num_known
    distances = jnp.where(is_known, times - center, 0)
    squares = jnp.sum(jnp.square(distances))
    return jnp.exp(jnp.sum(distances * logs) / jnp.where(squares > 0, squares, 1))


class Verdict(NamedTuple):
    """What is known of one step; all are scalars."""

    is_bad: jax.Array
    """Whether it exploded, and not by a loss alone that is not finite: with finite
    gradients that says nothing, as where float16 overflows in the loss."""
    has_nonfinite_updates: jax.Array
    norm: jax.Array
    norm_limit: jax.Array
    evidence: jax.Array
    """The signal that speaks of the parameters: the loss, or without one the norm."""
    evidence_limit: jax.Array


class Detector:
    """The rules of one transformation, and how their state goes on."""

    def __init__(self, norm, share, loss, specs, stacked, *, max_gap, window):
        self.specs, self.stacked = specs, stacked
        self.max_gap = check_length("max_gap", max_gap, 1)
        self.window = check_length("window", window, 64)
        self.limits = [
            None if limit is None else as_limit(limit) for limit in (norm, share, loss)
        ]
        if any(limit is not None and limit.needs_params for limit in self.limits):
            raise ValueError(
                "a rule compares a signal with its past, not with parameters: "
                "limits.params is no limit for it"
            )

    def scopes_of(self, tree) -> Scopes:
        """Of the leaves of a tree."""
        return find_scopes(tree, "leaf", specs=self.specs, stacked=self.stacked)

    def init(self, params) -> DetectExplosionsState:
        """The state before the first step."""
        scopes = self.scopes_of(params)
        norms, _ = jax.eval_shape(lambda: measure_leaves(params, scopes))
        dtype = norms.dtype
        sizes = scopes.sizes().astype(dtype)
        numbers = np.array([0, 0, 0, np.inf, np.inf, np.inf], np.float32)
        step = [-1, -1, 0, *numbers.view(np.int32)]
        counts = [-1 if name.startswith("last") else 0 for name in COUNTS]
        counts = jnp.asarray(counts, jnp.int32)
        layout = layout_of(params, "leaf", self.stacked)
        return DetectExplosionsState(
            told=jnp.asarray([step] * 2, jnp.int32),
            rule_states=self._rule_states(sizes),
            record=empty(norms.size, self.window, counts, layout),
        )

    def _rule_states(self, sizes):
        sizes = jnp.sum(sizes), sizes, jnp.ones([], sizes.dtype)
        norm, share, loss = (
            () if limit is None else limit.init(size)
            for limit, size in zip(self.limits, sizes, strict=True)
        )
        return norm, share, loss

    def update(
        self, updates, value, state, params=None
    ) -> tuple[DetectExplosionsState, Verdict]:
        """The state after a step that is taken, and what is known of the step."""
        norms, norm = measure_leaves(updates, self.scopes_of(updates))
        check_leaves([(state.record.num_scopes,)], [norms.shape], updates, params)
        # What the rules have kept stays of its type, also if the updates are wider.
        kept = [x.dtype for x in jax.tree.leaves(state.rule_states)]
        floats = [dtype for dtype in kept if jnp.issubdtype(dtype, jnp.floating)]
        dtype = promoted(jnp.float32, *floats) if floats else norm.dtype
        norms, norm = (saturating_cast(x, dtype) for x in (norms, norm))
        is_positive = (norm > 0) & (norm < jnp.inf)
        shares = divided(norms, jnp.where(is_positive, norm, 1))
        loss = loss_of(value, dtype)
        is_finite = norm < jnp.inf
        # Nothing of a step enters a rule when any of its leaves is not finite.
        signals = norm, jnp.where(is_finite, shares, 0), loss
        if value is not None:
            is_finite &= jnp.isfinite(loss)

        highest, rule_states = [], []
        for limit, signal, rule_state in zip(
            self.limits, signals, state.rule_states, strict=True
        ):
            bound = jnp.full_like(signal, jnp.inf)
            if limit is not None and not (value is None and signal is loss):
                found, rule_state = limit.update(signal, rule_state, None)
                bound = jnp.broadcast_to(found, signal.shape).astype(dtype)
            highest.append(once(bound))
            rule_states.append(rule_state)
        # The leaf stands in the record: so the rows before are read before the new one
        # is written, or XLA would copy them all.
        now, last = count(state, "steps"), count(state, "last")
        _, before = rows_of(state.record, now - _BEFORE)
        leaf = _leading_leaf(norms, before)
        # A share also rises when the other leaves fall.
        has_grown = (now >= _BEFORE[-1]) & _have_grown(norms, before)
        exceeds = [
            (x > limit) & (x < jnp.inf)
            for x, limit in zip(signals, highest, strict=True)
        ]
        exceeds[1] &= has_grown
        fired = [~is_finite] + [jnp.any(x) for x in exceeds]
        is_exploded = functools.reduce(jnp.logical_or, fired)
        leaf_share, leaf_limit = (
            x[leaf] if x.size else jnp.zeros([], dtype) for x in (shares, highest[1])
        )
        norm_limit, _, loss_limit = highest
        bits = jnp.asarray(sum(jnp.where(x, 2**i, 0) for i, x in enumerate(fired)))
        numbers = norm, leaf_share, loss, norm_limit, leaf_limit, loss_limit
        step = Step(now, leaf, bits, *map(_as_bits, numbers))
        is_first = is_exploded & ((last < 0) | (now - last > self.max_gap))
        is_nonfinite_first = ~is_finite & (count(state, "nonfinite_in_a_row") == 0)
        row = lax.broadcasted_iota(jnp.int32, (2, 1), 0)
        is_told = jnp.where(row == 0, is_first, is_nonfinite_first)
        has_loss_rule = value is not None and self.limits[2] is not None
        has_nonfinite_updates = ~(norm < jnp.inf)
        is_bad = functools.reduce(jnp.logical_or, fired[1:], has_nonfinite_updates)
        counts = _counted(
            state.record.counts,
            dict(zip(RULES, fired, strict=True)) | {"exploded": is_exploded},
            {
                "in_a_row": is_bad,
                "nonfinite_in_a_row": ~is_finite,
                "nonfinite_updates_in_a_row": has_nonfinite_updates,
                "suspect_in_a_row": fired[3] if has_loss_rule else fired[1],
            },
        )
        columns = {"loss": loss, "loss_limit": loss_limit, "limit": norm_limit}
        columns |= {"fired": bits, "leaf": leaf}
        state = DetectExplosionsState(
            told=jnp.where(is_told, side_by_side(step), state.told),
            rule_states=(rule_states[0], rule_states[1], rule_states[2]),
            record=pushed(state.record, columns, norms, norm, counts),
        )
        signal, limit = (loss, loss_limit) if has_loss_rule else (norm, norm_limit)
        verdict = Verdict(
            is_bad=is_bad,
            has_nonfinite_updates=has_nonfinite_updates,
            norm=norm,
            norm_limit=norm_limit,
            evidence=saturating_cast(signal, jnp.float32),
            evidence_limit=saturating_cast(limit, jnp.float32),
        )
        return state, verdict


def _leading_leaf(norms, before):
    """The first that is not finite, or has grown most; -1 if none has.

    Args:
      norms: `[num_leaves]`.
      before: `[num_steps, num_leaves]`: those of earlier steps.
    """
    if not norms.size:
        return jnp.full([], -1, jnp.int32)
    growth = jnp.sum(_log_growth(norms, before), axis=0)
    growth = jnp.where(norms < jnp.inf, growth, jnp.inf)  # NaN is not
    leaf = jnp.argmax(growth)
    return jnp.where(growth[leaf] > 0, leaf, -1).astype(jnp.int32)


def _have_grown(norms, before):
    """Which leaves have by `MIN_GROWTH`; of steps that were not finite none counts."""
    is_finite = jnp.all(before < jnp.inf, axis=1, keepdims=True)  # NaN is not
    before = jnp.where(is_finite, before, 0)
    num = jnp.sum(before > 0, axis=0)
    divisor = jnp.maximum(num, 1).astype(norms.dtype)
    mean = jnp.sum(_log_growth(norms, before), axis=0) / divisor
    return (mean > math.log(MIN_GROWTH)) & (num >= MIN_KNOWN)


def _log_growth(norms, before):
    """Logarithms `[num_steps, num_leaves]` of the growth; 0 where it is not known."""
    before = before.astype(norms.dtype)
    is_known = (before > 0) & (before < jnp.inf) & (norms > 0)[None]
    now, then = (jnp.log(jnp.where(is_known, x, 1)) for x in (norms[None], before))
    return now - then


def _counted(counts, flags, in_a_row):
    """The next `COUNTS`, before any response."""
    grown = counted(counts, _by_count(flags | in_a_row | {"steps": jnp.ones([], bool)}))
    is_reset = _by_count({name: ~flag for name, flag in in_a_row.items()})
    is_last = _by_count({"last": flags["exploded"]})
    return jnp.where(is_reset, 0, jnp.where(is_last, counts[0], grown))


def _by_count(flags: dict[str, jax.Array]) -> jax.Array:
    """bool, one for each of the `COUNTS`."""
    return side_by_side([flags.get(name, jnp.zeros([], bool)) for name in COUNTS])


def _as_bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(saturating_cast(x, jnp.float32), jnp.int32)
