"""Raises when a run has exploded and nothing has saved it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip.explosions.state import (
    BROKEN,
    COUNTS,
    SkipExplosionsState,
)
from optaxclip.numerics import is_gradient
from optaxclip.reporting.explaining import SKIPPING, story_of
from optaxclip.reporting.history import history
from optaxclip.reporting.states import (
    STATES,
    check_one_run,
    find_states,
)


class ExplosionError(ArithmeticError):
    """A run has exploded and cannot go on; the message says what happened."""


def raise_if_exploded(opt_state: Any, params: Any = None) -> None:
    """Raises if training has exploded and nothing has saved it; for the training loop.

    It raises

    * if a `skip_explosions` has given up, after `give_up_after` non-finite steps in a
      row;
    * if the parameters of a `skip_explosions` are NaN, or if what `optax.MultiSteps`
      around it has accumulated is non-finite;
    * if a `detect_explosions` has seen a non-finite step that nothing skipped;
    * if the state of an optimizer inside `skip_explosions` holds NaN, or an array with
      inf.

    It never raises on an explosion that was survived.

    It waits for the step, reads some scalars and, with `skip_explosions`, the inner
    state once: call it every few steps, outside `jit`.

    Args:
      opt_state: Any tree, as for `metrics`.
      params: The parameters, or any tree of their structure: names the leading leaf.
        Of parameters that are NaN it raises at once; without them when it gives up.

    Raises:
      ExplosionError: With the step, the rule, the leaf, the numbers, and what to try.
      ValueError: If there is no explosion state in `opt_state`, if two have the same
        label, or if `params` does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(optaxclip.detect_explosions(), optax.sgd(0.1))
      >>> params, grads = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, jnp.nan])}
      >>> _, opt_state = jax.jit(tx.update)(grads, tx.init(params))
      >>> optaxclip.raise_if_exploded(opt_state, params)
      Traceback (most recent call last):
      ...
      optaxclip.reporting.guarding.ExplosionError: explosions: step 0 was non-finite...
    """
    states = {
        label: state
        for label, state in find_states(opt_state).items()
        if state.has_rules
    }
    if not states:
        raise ValueError(
            "found no state of detect_explosions, skip_explosions or stabilize"
        )
    for label, state in states.items():
        check_one_run(label, state)
    # NaN there outlives every skipped step.
    for accumulator in _accumulators(opt_state):
        if name := _nonfinite_leaf(accumulator):
            raise ExplosionError(
                f"what optax.MultiSteps accumulates holds inf or NaN, in {name!r}, and "
                f"will forever: put {SKIPPING} around optax.MultiSteps, or give that "
                "should_skip_update_fn=optax.skip_not_finite."
            )
    counts = jax.device_get({label: x.record.counts for label, x in states.items()})
    num_nonfinite = {
        label: int(COUNTS.read(values, "nonfinite")) for label, values in counts.items()
    }
    num_skipped = max(
        (num_nonfinite[label] for label, state in states.items() if state.is_skipping),
        default=0,
    )
    for label, state in states.items():
        if state.is_skipping:
            _check_skipping(label, state, params)
        # A detector in front of `skip_explosions` sees what that has skipped.
        elif num_nonfinite[label] > num_skipped:
            kept = history({label: state}, params, label=label)
            story = story_of(state, kept, params)
            raise ExplosionError(
                f"{label}: {story[:1].lower()}{story[1:]} Nothing skipped it. Try "
                "optaxclip.stabilize(optimizer), a smaller learning rate, or a clip, "
                "and look at the data and the precision of that step."
            )


def _check_skipping(label: str, state: SkipExplosionsState, params: Any) -> None:
    """Raises if `skip_explosions` could not save the run."""
    is_broken = int(state.detection.counts.gave_up) == BROKEN
    if is_broken or _is_stuck(state, params):
        raise ExplosionError(
            f"{label}: the parameters hold NaN, which no update can mend. No "
            "step that was taken has made it: go back to a checkpoint."
        )
    if bool(state.gave_up):
        num = int(state.detection.counts.nonfinite_updates_in_a_row)
        kept = history({label: state}, params, label=label)
        story = story_of(state.detection, kept, params)
        raise ExplosionError(
            f"{label}: gave up after {num} non-finite steps in a row, none of which "
            f"was taken. {story} Try a smaller learning rate, rollback=True or an "
            "earlier checkpoint, and look at the data and the precision of that step."
        )
    # It is mended within three steps, unless it is not known as a moment.
    if name := _nonfinite_leaf(state.inner_state):
        raise ExplosionError(
            f"{label}: the inner state {name!r} holds inf or NaN, although every "
            "applied gradient was finite: the optimizer produced it. Try larger "
            "constants in its denominators, or a clip before it."
        )


def _accumulators(opt_state: Any) -> list[Any]:
    """What each `optax.MultiSteps` has accumulated, but for those inside of ours."""
    kinds = (*STATES, optax.MultiStepsState)
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds))
    return [x.acc_grads for x in leaves if isinstance(x, optax.MultiStepsState)]


def _is_stuck(state: SkipExplosionsState, params: Any) -> bool:
    """Whether the last step was non-finite since parameters are NaN."""
    leaves = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    arrays = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    if not int(state.detection.counts.nonfinite_updates_in_a_row):
        return False
    return any(bool(jnp.any(jnp.isnan(x))) for x in arrays)


def _nonfinite_leaf(inner_state: Any) -> str | None:
    """The path of an array with NaN, or, unless it is a single number, with inf."""
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(
            inner_state, is_leaf=lambda x: isinstance(x, STATES)
        )
        if not isinstance(x, STATES) and is_gradient(x)
    }
    flags = jax.device_get(_have_nonfinite(list(found.values())))
    return next((name for name, flag in zip(found, flags, strict=True) if flag), None)


@jax.jit
def _have_nonfinite(arrays: list[jax.Array]) -> list[jax.Array]:
    # A single number may be +inf on purpose: the best loss so far, before any.
    return [jnp.any(~jnp.isfinite(x) if x.ndim else jnp.isnan(x)) for x in arrays]
