"""Tells in words what happened."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from optaxclip.explosions.rules import RULES
from optaxclip.explosions.state import DetectExplosionsState, Event
from optaxclip.extras import named_tags
from optaxclip.reporting.growth import growth_of, leading_at
from optaxclip.reporting.history import History, explosions_of, history, step_name
from optaxclip.reporting.scalars import VANISHED, have_vanished
from optaxclip.reporting.states import find_recorders

SKIPPING = "stabilize or skip_explosions"

NUM_HEALTHY_AFTER = 64
"""After this many healthy steps `explain` calls the run healthy: half the window of the
default limits, with which they know the run again after a change."""


def explain(opt_state: Any, params: Any = None) -> str:
    """Tells in plain words what the recorders of a run have seen.

    Of each `record`, `detect_explosions` and `skip_explosions` one line: how many steps
    exploded and what became of them; of the last explosion when and by which rule
    it began, the leading leaf, and how the norm had grown; and which leaves have
    vanished. It waits for the step and reads the records: call it at the end, or after
    a crash on a checkpoint.

    Args:
      opt_state: Any tree, as for `metrics`; of one run.
      params: The parameters, or any tree of their structure: names the leaves.

    Returns:
      One line for each recorder; and one for each explosion that is kept, if several.

    Raises:
      ValueError: If there is no recorder in `opt_state`, if two have the same label, or
        if `params` does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(optaxclip.detect_explosions(), optax.sgd(0.1))
      >>> params = {"w": jnp.ones(1)}
      >>> opt_state, update = tx.init(params), jax.jit(tx.update)
      >>> for size in [1.0, 1.1, 1.0, 1.2, 3.0, 30.0]:
      ...     _, opt_state = update({"w": jnp.array([size])}, opt_state)
      >>> for sentence in optaxclip.explain(opt_state, params).split(". "):
      ...     print(sentence)
      explosions: 1 of 6 steps exploded: 1 by the norm
      The last explosion began on step 5: the norm was 30, above its limit 15
      Leaf 'w' had grown most
      The norm had grown by about 5x per step since step 3, from 1.2 to 30
      No loss was given as value=, so the rule on it was silent.
    """
    return "\n".join(
        line
        for label, state in find_recorders(opt_state).items()
        for line in _lines(label, state, params)
    )


def _lines(label: str, state: Any, params: Any) -> list[str]:
    kept = history({label: state}, params, label=label)
    lines = [f"{label}: {' '.join(_sentences(kept, state, params))}"]
    explosions = explosions_of(kept)
    if len(explosions) > 1:
        lines += [_line(kept, first, last, params) for first, last in explosions]
    return lines


def _line(kept: History, first: int, last: int, params: Any) -> str:
    """One explosion of several, in a line."""
    reasons = []
    nonfinite, norm, share, loss = kept.fired[first]
    has_finite_norms = np.isfinite(kept.norms[first]).all()
    leader = leading_at(kept, first)
    if nonfinite:
        where = "the loss"
        if not has_finite_norms:
            where = _leaf_name(kept, first, leader, params)
        reasons.append(f"{where} was non-finite")
    if norm:
        reasons.append(
            f"the norm was {kept.norm[first]:.3g}, above its limit "
            f"{kept.limit[first]:.3g}"
        )
    if share:
        reasons.append("the share of a leaf in the norm exceeded its limit")
    if loss:
        reasons.append(
            f"the loss was {kept.loss[first]:.3g}, above its limit "
            f"{kept.loss_limit[first]:.3g}"
        )
    if (norm or share) and has_finite_norms and leader >= 0:
        leaf = _leaf_name(kept, first, leader, params)
        reasons.append(f"{leaf} had grown most")
    steps = f"step {kept.step_name(first)}"
    if last > first:
        comma = "," if kept.tags else ""
        steps = f"steps {kept.step_name(first)}{comma} to {kept.step_name(last)}"
    return f"- {steps}: {'; '.join(reasons)}."


def _leaf_name(kept: History, row: int, leaf: Any, params: Any) -> str:
    name = kept.scope_name(row, int(leaf))
    return f"leaf {name if params is None else repr(name)}"


def _sentences(kept: History, state: Any, params: Any) -> list[str]:
    state = jax.device_get(state)
    if not state.has_rules:
        num_nonfinite, num_steps = state.record.num_nonfinite, state.record.num_steps
        found = [f"{num_nonfinite} of {num_steps} steps were non-finite."]
        if kept.began is not None:
            found += [_first_nonfinite(kept, kept.began), *growth_of(kept, kept.began)]
    else:
        noticed = state.detection
        found = [_counted(state)]
        if noticed.counts.exploded:
            found += [story_of(noticed, kept, params), *_aftermath(state)]
        if len(kept.step) and np.isnan(kept.loss).all():
            found.append("No loss was given as value=, so the rule on it was silent.")
    # Of the largest norms none vanishes.
    vanished = (
        []
        if kept.ranked is not None
        else [
            repr(name)
            for name, has in zip(kept.names, have_vanished(state.record), strict=True)
            if has
        ]
    )
    if vanished:
        names = ", ".join(vanished[:3]) + (", ..." if len(vanished) > 3 else "")
        found.append(
            f"{len(vanished)} of {len(kept.names)} norms have vanished, at most "
            f"{VANISHED:g} of the whole in the last {len(kept.step)} steps: {names}."
        )
    return found


def _counted(state: Any) -> str:
    noticed = state.detection
    numbers = {rule: int(getattr(noticed.counts, rule)) for rule in RULES}
    words = ["non-finite", "by the norm", "by the share of a leaf", "by the loss"]
    reasons = [
        f"{number} {how}"
        for how, number in zip(words, numbers.values(), strict=True)
        if number
    ]
    num_exploded, num_skipped = (
        int(getattr(noticed.counts, name)) for name in ("exploded", "skipped")
    )
    text = f"{num_exploded} of {noticed.counts.steps} steps exploded"
    text += f": {', '.join(reasons)}." if reasons else "."
    if state.is_skipping and num_exploded + num_skipped:
        num_rollbacks = int(noticed.counts.rollbacks)
        if not num_exploded:
            text += " But the loss had risen, or most gradients had become 0, "
            text += "and earlier parameters were tried."
        was = "was" if num_skipped == 1 else "were"
        text += f" {num_skipped} {was} skipped, and parameters went back "
        text += f"{_times(num_rollbacks)}."
        if num_mended := int(noticed.counts.mended):
            text += (
                f" {_times(num_mended)} the optimizer had made inf or NaN out of "
                "finite gradients, and these moments were reset."
            )
        if num_blocked := int(noticed.counts.blocked_rollbacks):
            text += (
                f" {_times(num_blocked)} they did not go back where they should have: "
                f"something changes the updates after {SKIPPING}, which has to stand "
                "around it."
            )
    return text


def _times(num: int) -> str:
    return "1 time" if num == 1 else f"{num} times"


def _aftermath(state: Any) -> list[str]:
    """Whether the run went on as a healthy one."""
    noticed = state.detection
    num_since = int(noticed.counts.steps - 1 - noticed.counts.last)
    # After a rollback it was no false alarm, whatever came then.
    if num_since < NUM_HEALTHY_AFTER or noticed.counts.rollbacks:
        return []
    return [
        f"The {num_since} steps since have been healthy, and nothing was rolled back: "
        "it was a false alarm, a bad batch, or a change that the run got over."
    ]


def _first_nonfinite(kept: History, first: int) -> str:
    """Which scope was the first in the last stretch of non-finite steps kept."""
    step = kept.step_name(first)
    if kept.tags:
        step += ","
    num_nonfinite = np.sum(~np.isfinite(kept.norms[first]))
    if not num_nonfinite:
        return f"On step {step} the loss was {kept.loss[first]:g}."
    if num_nonfinite == len(kept.names):
        what = "all" if kept.ranked is None else f"more than {num_nonfinite - 1}"
        return f"On step {step} {what} norms became non-finite."
    name = kept.scope_name(first, leading_at(kept, first))
    return f"On step {step} that of {name!r} was the first non-finite."


def story_of(state: DetectExplosionsState, kept: History, params: Any) -> str:
    """How the last explosion began, and became non-finite if one did."""
    state = jax.device_get(state)
    began, bad = state.began, state.first_nonfinite

    def leaf_of(step: Event) -> str:
        return _leaf_name(kept, 0, step.leaf, params)

    def name_of(step: Event) -> str:
        tags = named_tags(state.record.columns, np.asarray(step.tag))
        return step_name(step.step, tags)

    comma = "," if state.record.columns else ""

    story = []
    if bad.step >= 0:
        if np.isfinite(bad.norm):
            where = f"the loss was {bad.loss:g}, with finite gradients"
        else:
            where = f"{leaf_of(bad)} held inf or NaN"
        story.append(f"Step {name_of(bad)}{comma} was non-finite: {where}.")
    if began.step not in (-1, bad.step):
        leaf = leaf_of(began) if began.leaf >= 0 else "a leaf"
        share = f"the share of {leaf} in the norm"
        signals = [
            ("norm", "the norm", began.norm, began.norm_limit),
            ("share", share, began.share, began.share_limit),
            ("loss", "the loss", began.loss, began.loss_limit),
        ]
        reasons = ["it was non-finite"] * bool(began.fired[0]) + [
            f"{what} was {value:.3g}, above its limit {limit:.3g}"
            if value > limit and (rule != "share" or began.leaf >= 0)
            else "the share of a leaf in the norm exceeded its limit"
            for rule, what, value, limit in signals
            if began.fired[RULES.index(rule)]
        ]
        what = "It" if began.step < bad.step else "The last explosion"
        story.append(f"{what} began on step {name_of(began)}: {'; '.join(reasons)}.")
    # An explosion of the loss alone says nothing of a leaf.
    is_of_leaf = began.fired[[RULES.index("norm"), RULES.index("share")]].any()
    if is_of_leaf and began.leaf >= 0 and np.isfinite(began.norm):
        story.append(f"L{leaf_of(began)[1:]} had grown most.")
    if kept.began is not None:
        story += growth_of(kept, kept.began)
    return " ".join(story)
