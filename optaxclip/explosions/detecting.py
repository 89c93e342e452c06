"""Notices explosions: applies the rules to each step."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip.checks import (
    check_label,
    check_leaves,
    check_length,
    own_state,
    value_of,
)
from optaxclip.explosions.leading import STEPS_BEFORE, have_grown, leading_leaf
from optaxclip.explosions.rules import (
    LOSS_LIMIT,
    MAX_GAP,
    NORM_LIMIT,
    RULES,
    SHARE_LIMIT,
)
from optaxclip.explosions.state import (
    COUNTS,
    DetectExplosionsState,
    Event,
    Verdict,
    as_bits,
    count,
)
from optaxclip.limits.limit import LimitLike, as_limit
from optaxclip.norms.measuring import measure_leaves
from optaxclip.norms.names import Stacked, layout_of
from optaxclip.norms.scopes import Scopes, find_scopes
from optaxclip.numerics import divide, increment, promote, saturating_cast
from optaxclip.recording import WINDOW, append, empty, loss_of, rows_of
from optaxclip.xla import materialize, stack_scalars


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

    A step explodes if it is non-finite, in any leaf or in the loss, or if one of three
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
      >>> print(optaxclip.metrics(state)["explosions/num_exploded/norm"])
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
            events=jnp.asarray([step] * 2, jnp.int32),
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
        dtype = _dtype_of(state.rule_states, norm)
        norms, norm = (saturating_cast(x, dtype) for x in (norms, norm))
        is_positive = (norm > 0) & (norm < jnp.inf)
        shares = divide(norms, jnp.where(is_positive, norm, 1))
        loss = loss_of(value, dtype)
        is_finite = norm < jnp.inf
        # Nothing of a step enters a rule when any of its leaves is non-finite.
        signals = norm, jnp.where(is_finite, shares, 0), loss
        if value is not None:
            is_finite &= jnp.isfinite(loss)

        highest, rule_states = self._limits_of(signals, state.rule_states, value)
        # The leaf stands in the record: so the rows before are read before the new one
        # is written, or XLA would copy them all.
        now, last = count(state, "steps"), count(state, "last")
        _, before = rows_of(state.record, now - STEPS_BEFORE)
        leaf = leading_leaf(norms, before)
        # A share also rises when the other leaves fall.
        has_grown = (now >= STEPS_BEFORE[-1]) & have_grown(norms, before)
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
        step = Event(now, leaf, bits, *map(as_bits, numbers))
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
        events = jnp.where(is_told, stack_scalars(step), state.events)
        record = append(state.record, columns, norms, norm, counts)
        signal, limit = (loss, loss_limit) if has_loss_rule else (norm, norm_limit)
        evidence = (saturating_cast(x, jnp.float32) for x in (signal, limit))
        verdict = Verdict(is_bad, has_nonfinite_updates, norm, norm_limit, *evidence)
        return DetectExplosionsState(events, rule_states, record), verdict

    def _limits_of(self, signals, rule_states, value):
        """The limit of each signal, +inf for none, and the next states of the rules."""
        highest, states = [], []
        for limit, signal, rule_state in zip(
            self.limits, signals, rule_states, strict=True
        ):
            bound = jnp.full_like(signal, jnp.inf)
            if limit is not None and not (value is None and signal is signals[2]):
                found, rule_state = limit.update(signal, rule_state, None)
                bound = jnp.broadcast_to(found, signal.shape).astype(signal.dtype)
            highest.append(materialize(bound))
            states.append(rule_state)
        return highest, (states[0], states[1], states[2])


def _dtype_of(rule_states: Any, norm: jax.Array) -> Any:
    """The dtype of the signals: what rules have kept stays of its type.

    Also where the updates are wider than the parameters that `init` was given.
    """
    kept = [x.dtype for x in jax.tree.leaves(rule_states)]
    floats = [dtype for dtype in kept if jnp.issubdtype(dtype, jnp.floating)]
    return promote(jnp.float32, *floats) if floats else norm.dtype


def _counted(counts, flags, in_a_row):
    """The next `COUNTS`, before any response."""
    grown = increment(
        counts, _by_count(flags | in_a_row | {"steps": jnp.ones([], bool)})
    )
    is_reset = _by_count({name: ~flag for name, flag in in_a_row.items()})
    is_last = _by_count({"last": flags["exploded"]})
    return jnp.where(is_reset, 0, jnp.where(is_last, counts[0], grown))


def _by_count(flags: dict[str, jax.Array]) -> jax.Array:
    """bool, one for each of the `COUNTS`."""
    return stack_scalars([flags.get(name, jnp.zeros([], bool)) for name in COUNTS])
