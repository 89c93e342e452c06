"""Notices explosions: applies the rules to each step.

Internal but for `detect_explosions`. `make_detection` is behind that and behind
`skip_explosions`; `_judge` makes the `Verdict` of a step, and nothing after it asks
again what has fired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip.checks import (
    check_by_name,
    check_label,
    check_leaves,
    check_length,
    own_state,
    value_of,
)
from optaxclip.explosions.counting import count_step
from optaxclip.explosions.leading import STEPS_BEFORE, have_grown, leading_leaf
from optaxclip.explosions.rules import (
    LOSS_LIMIT,
    MAX_GAP,
    NORM_LIMIT,
    SHARE_LIMIT,
    Bounds,
    Fired,
    Signals,
    apply_rules,
    fired_of,
    first_states,
    signals_of,
)
from optaxclip.explosions.state import (
    COUNTS,
    EVENT,
    NUM_ONSETS,
    DetectExplosionsState,
    Verdict,
)
from optaxclip.extras import check_columns, num_parts, parts_of_tag
from optaxclip.limits.limit import LimitLike, as_limit
from optaxclip.norms.measuring import measure_leaves
from optaxclip.norms.names import Stacked, layout_of
from optaxclip.norms.scopes import find_scopes
from optaxclip.numerics import saturating_cast
from optaxclip.packing import bits_of
from optaxclip.recording import WINDOW
from optaxclip.ring import append, empty, rows_of


def detect_explosions(
    *,
    norm: LimitLike | None = NORM_LIMIT,
    share: LimitLike | None = SHARE_LIMIT,
    loss: LimitLike | None = LOSS_LIMIT,
    max_gap: int = MAX_GAP,
    window: int = WINDOW,
    specs: Any = None,
    stacked: Stacked | None = None,
    columns: Sequence[str] = (),
    label: str = "explosions",
) -> optax.GradientTransformationExtraArgs:
    """Notices explosions, and records when and where they began.

    A step explodes if it is non-finite, in any leaf or in the loss, or if one of three
    signals exceeds its limit: the norm of all updates, the share of a leaf in it, and
    the loss, where the training loop gives it: `update(grads, state, params,
    value=loss)`. A share counts only in a leaf whose own norm has grown twentyfold
    within the last 64 steps. Updates pass through; `metrics` reads the verdict, and
    `raise_if_exploded` raises on a non-finite step that nothing skipped.

    Placed after the optimizer, it watches the norm of the updates instead of the
    gradients. Labels in different places of a chain have to differ.

    Args:
      norm: Limit on the norm: a number, a schedule or a `Limit`; None for no such rule.
        By default `limits.log_quantile()`, but at least `limits.fraction_of_start()`;
        `optaxclip/explosions/rules.py` says why these numbers.
      share: Limit on the share of each leaf, within [0, 1], likewise. By default
        `limits.sustained_rise()`.
      loss: Limit on the loss, likewise; it may have either sign. By default the smaller
        of `limits.log_quantile(2.4, min_ratio=1.7, early_jump=2.5, min_level=0.01)` and
        `limits.above_lowest()`, but at least `limits.fraction_of_start()`.
      max_gap: Explosions at most this many steps apart count as one; at least 1, 10
        by default.
      window: Number of steps that the record keeps; at least 64, 256 by default.
      specs: A common argument, see `help(optaxclip)`.
      stacked: Likewise.
      columns: Likewise.
      label: Likewise.

    Returns:
      The transformation, with the state `{label: DetectExplosionsState}`: at most 3 KiB
      and 20 bytes per leaf; and the record for `history`, of 256 steps 6 KiB and 1 KiB
      per leaf. Of 18,432 stacked experts that is 19 MB. The record keeps all of them,
      because the share rule compares each with its own past.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> detect = optaxclip.detect_explosions()
      >>> update = jax.jit(detect.update)
      >>> state = detect.init({"w": jnp.ones(2)})
      >>> for size in [1.0, 1.1, 0.9, 50.0]:
      ...     grads = {"w": jnp.array([size, size])}
      ...     _, state = update(grads, state, value=jnp.array(0.5))
      >>> print(optaxclip.metrics(state)["explosions/num_exploded/norm"])
      1
    """
    check_label(label)
    detection = make_detection(
        norm, share, loss, specs, stacked, columns, max_gap=max_gap, window=window
    )

    def init(params):
        return {label: detection.init(params)}

    def update(updates, state, params=None, **extra_args):
        state = own_state(state, label, DetectExplosionsState)
        state, _ = detection.update(updates, extra_args, state, params)
        return updates, {label: state}

    return optax.GradientTransformationExtraArgs(init, update)


class Detection(NamedTuple):
    """The two functions behind `detect_explosions` and `skip_explosions`."""

    init: Callable[[Any], DetectExplosionsState]
    """parameters -> state before the first step."""
    update: Callable[..., tuple[DetectExplosionsState, Verdict]]
    """(updates, extra arguments, state, parameters) -> (state, verdict)."""


def make_detection(
    norm, share, loss, specs, stacked, columns, *, max_gap, window, num_skipped=0
) -> Detection:
    """Detection with the arguments of `detect_explosions`; raises their errors.

    `num_skipped`: of how many skipped steps there is room in `events`.
    """
    max_gap = check_length("max_gap", max_gap, 1)
    window = check_length("window", window, 64)
    own = check_columns(columns)
    check_by_name(stacked=stacked)
    given = {"norm": norm, "share": share, "loss": loss}
    rules = [None if x is None else as_limit(x, name) for name, x in given.items()]
    if any(rule is not None and rule.needs_params for rule in rules):
        raise ValueError(
            "a rule compares a signal with its past, not with parameters: "
            "limits.params is no limit for it"
        )

    def init(params):
        scopes = find_scopes(params, "leaf", specs=specs, stacked=stacked)
        # Their number and dtype alone: nothing of the parameters is read.
        norms, _ = jax.eval_shape(lambda: measure_leaves(params, scopes))
        sizes = scopes.sizes().astype(norms.dtype)
        first = {name: np.inf if name.endswith("limit") else 0 for name in EVENT.names}
        first |= {"step": -1, "leaf": -1}
        step = EVENT.pack_known(first, [0] * num_parts(own))
        counts = [-1 if name.startswith("last") else 0 for name in COUNTS.names]
        return DetectExplosionsState(
            events=jnp.asarray([step] * (NUM_ONSETS + num_skipped), jnp.int32),
            rule_states=first_states(rules, sizes),
            record=empty(
                norms.size,
                window,
                jnp.asarray(counts, jnp.int32),
                layout_of(params, "leaf", stacked),
                own,
            ),
        )

    def update(updates, extra_args, state, params=None):
        value = value_of(extra_args)
        tag = parts_of_tag(state.record.columns, extra_args)
        scopes = find_scopes(updates, "leaf", specs=specs, stacked=stacked)
        norms, norm = measure_leaves(updates, scopes)
        check_leaves([(state.record.num_scopes,)], [norms.shape], updates, params)
        signals = signals_of(norms, norm, value, state.rule_states)
        bounds, rule_states = apply_rules(rules, signals, state.rule_states)
        leaf, has_grown = _compare_leaves(state, signals)
        fired = fired_of(signals, bounds, has_grown)
        # Known while tracing, so that no step selects between loss and norm.
        has_loss_rule = value is not None and rules[2] is not None
        verdict = _judge(state, signals, bounds, fired, leaf, tag, has_loss_rule)
        flags = list(fired)
        if num_skipped:
            # Of the step before: whether this one is skipped is not decided yet.
            flags.append(state.is_skipped)
        columns = {
            "loss": signals.loss,
            "loss_limit": bounds.loss,
            "limit": bounds.norm,
            "fired": bits_of(flags),
            "leaf": leaf,
        }
        counts = count_step(state, verdict)
        record = append(state.record, columns, tag, signals.norms, signals.norm, counts)
        events = _next_events(state, verdict, max_gap)
        return DetectExplosionsState(events, rule_states, record), verdict

    return Detection(init, update)


def _compare_leaves(
    state: DetectExplosionsState, signals: Signals
) -> tuple[jax.Array, jax.Array]:
    """The leading leaf, and of each leaf whether its share counts."""
    # The rows before this step are read before it is written, or XLA would copy the
    # record.
    now = state.counts.steps
    _, before = rows_of(state.record, now - STEPS_BEFORE)
    leaf = leading_leaf(signals.norms, before)
    # A share also rises when the other leaves fall.
    return leaf, (now >= STEPS_BEFORE[-1]) & have_grown(signals.norms, before)


def _judge(
    state: DetectExplosionsState,
    signals: Signals,
    bounds: Bounds,
    fired: Fired,
    leaf: jax.Array,
    tag: Any,
    has_loss_rule: bool,
) -> Verdict:
    """What is known of the step."""
    signal, limit = signals.norm, bounds.norm
    if has_loss_rule:
        signal, limit = signals.loss, bounds.loss
    has_nonfinite_updates = ~signals.has_finite_updates
    return Verdict(
        is_exploded=fired.any(),
        fired=fired,
        leaf=leaf,
        # Not `fired.nonfinite`: a loss that overflows says nothing of finite gradients.
        # Nor `fired.share`, see `Verdict.is_bad`.
        is_bad=has_nonfinite_updates | fired.norm | fired.loss,
        has_nonfinite_updates=has_nonfinite_updates,
        norm=signals.norm,
        norm_limit=bounds.norm,
        # A loss of float64 may be finite and beyond float32.
        signal=saturating_cast(signal, jnp.float32),
        signal_limit=saturating_cast(limit, jnp.float32),
        num_alive=jnp.sum(signals.norms > 0, dtype=jnp.int32),
        event=_pack_event(state.counts.steps, leaf, fired, signals, bounds, tag),
        has_loss_rule=has_loss_rule,
    )


def _pack_event(
    now: jax.Array,
    leaf: jax.Array,
    fired: Fired,
    signals: Signals,
    bounds: Bounds,
    tag: Any,
) -> jax.Array:
    """The step as a row of `events`."""
    share, share_limit = (
        # Without a leading leaf, -1, it is that of the last one.
        x[leaf] if x.size else jnp.zeros([], x.dtype)
        for x in (signals.shares, bounds.shares)
    )
    numbers = signals.norm, share, signals.loss, bounds.norm, share_limit, bounds.loss
    values = dict(zip(EVENT.names, (now, leaf, bits_of(fired), *numbers), strict=True))
    return EVENT.pack(values, tag)


def _next_events(
    state: DetectExplosionsState, verdict: Verdict, max_gap: int
) -> jax.Array:
    """The events with this step as an onset, if it is one."""
    now, last = state.counts.steps, state.counts.last
    begins = verdict.is_exploded & ((last < 0) | (now - last > max_gap))
    turns_nonfinite = verdict.fired.nonfinite & (state.counts.nonfinite_in_a_row == 0)
    row = lax.broadcasted_iota(jnp.int32, (len(state.events), 1), 0)
    # A select for both rows: each write at an index is a kernel of its own.
    is_onset = ((row == 0) & begins) | ((row == 1) & turns_nonfinite)
    return jnp.where(is_onset, verdict.event, state.events)
