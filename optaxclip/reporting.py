"""What happened, in plain words."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip.explosions import (
    COUNTS,
    RULES,
    DetectExplosionsState,
    Step,
    read_step,
)
from optaxclip.recording import STATES, find_states, scope_names
from optaxclip.responses import NUM_UNTIL_GIVEN_UP, SkipExplosionsState


class ExplosionError(ArithmeticError):
    """A run has exploded and cannot go on; the message says what happened."""


def raise_if_exploded(opt_state: Any, params: Any = None) -> None:
    """Raises if training has exploded and nothing has saved it; for the training loop.

    That is: if a `skip_explosions` has given up, after 100 non-finite steps in a row;
    if a `detect_explosions` has seen a non-finite step that no `skip_explosions`
    skipped; or if the state of an optimizer inside `skip_explosions` holds NaN, or an
    array with inf. Never on an explosion that was survived.

    It waits for the step, reads some scalars and, with `skip_explosions`, the inner
    state once: call it every some steps, outside `jit`.

    Args:
      opt_state: Any tree, as for `metrics`.
      params: The parameters, or any tree of their structure: names the leaf that led.

    Raises:
      ExplosionError: With the step, the rule, the leaf, the numbers, and what to try.
      ValueError: If there is no explosion state in `opt_state`, if two have the same
        label, or if `params` does not fit.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(optaxclip.detect_explosions(), optax.sgd(0.1))
      >>> params = {"w": jnp.ones(2)}
      >>> _, opt_state = tx.update({"w": jnp.array([1.0, jnp.nan])}, tx.init(params))
      >>> raise_if_exploded(opt_state, params)
      Traceback (most recent call last):
      ...
      optaxclip.reporting.ExplosionError: explosions: step 0 was not finite...
    """
    states = {
        label: state
        for label, state in find_states(opt_state).items()
        if isinstance(state, DetectExplosionsState | SkipExplosionsState)
    }
    if not states:
        raise ValueError(
            "found no state of detect_explosions, skip_explosions or stabilize"
        )
    counts = jax.device_get({label: _noticed(x).counts for label, x in states.items()})
    num_nonfinite = {
        label: int(values[COUNTS.index("nonfinite")])
        for label, values in counts.items()
    }
    num_skipped = max(
        (
            num_nonfinite[label]
            for label, state in states.items()
            if isinstance(state, SkipExplosionsState)
        ),
        default=0,
    )
    for label, state in states.items():
        explosions = _noticed(state)
        if isinstance(state, SkipExplosionsState):
            if bool(state.gave_up):
                what = (
                    f"gave up after {NUM_UNTIL_GIVEN_UP} non-finite steps in a row, "
                    "none of which was taken"
                )
                raise ExplosionError(
                    f"{label}: {what}. {_story(label, explosions, params)} Try a "
                    "smaller learning rate, rollback=True or an earlier "
                    "checkpoint, and look at the data and the precision of that step."
                )
            if name := _nonfinite_leaf(state.inner_state):
                raise ExplosionError(
                    f"{label}: the inner state {name!r} holds inf or NaN, although no "
                    "step that was not finite was taken: the optimizer made it out of "
                    "finite gradients. Try larger constants in its denominators, or a "
                    "clip before it."
                )
        elif num_nonfinite[label] > num_skipped:
            raise ExplosionError(
                f"{label}: {_story(label, explosions, params)} Nothing skipped it. Try "
                "optaxclip.stabilize(optimizer), a smaller learning rate, or a clip, "
                "and look at the data and the precision of that step."
            )


def _noticed(state: Any) -> DetectExplosionsState:
    return state.explosions if isinstance(state, SkipExplosionsState) else state


def _story(label: str, state: DetectExplosionsState, params: Any) -> str:
    """How the last explosion began and became non-finite."""
    state = jax.device_get(state)
    names = scope_names(state.layout, len(state.baseline), label, params)
    began, bad = (read_step(state, which) for which in ("began", "nonfinite"))

    def leaf_of(step: Step) -> str:
        if params is None:
            return f"leaf {int(step.leaf)}"
        return f"leaf {names[int(step.leaf)]!r}"

    if np.isfinite(bad.norm):
        where = f"the loss was {bad.loss:g}, with finite gradients"
    else:
        where = f"{leaf_of(bad)} held inf or NaN"
    story = f"step {int(bad.step)} was not finite: {where}."
    if 0 <= began.step < bad.step:
        signals = [
            ("norm", "the norm", began.norm, began.norm_limit),
            ("share", "the share of that leaf in it", began.share, began.share_limit),
            ("loss", "the loss", began.loss, began.loss_limit),
        ]
        reasons = [
            f"{what} was {value:.3g}, above its limit {limit:.3g}"
            for rule, what, value, limit in signals
            if began.fired[RULES.index(rule)]
        ]
        story += (
            f" It began on step {int(began.step)}: {'; '.join(reasons)}. "
            f"{leaf_of(began).capitalize()} had grown most, and the norm by "
            f"{float(began.growth):.2f}x per step over the last {_num_known(began)}."
        )
    return story


def _num_known(step: Step) -> int:
    return int(np.sum(step.recent > 0))


def _nonfinite_leaf(inner_state: Any) -> str | None:
    """The path of an array with NaN, or, unless it is a single number, with inf."""
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(
            inner_state, is_leaf=lambda x: isinstance(x, STATES)
        )
        if not isinstance(x, STATES) and jnp.issubdtype(x.dtype, jnp.inexact)
    }
    flags = jax.device_get(_have_nonfinite(list(found.values())))
    return next((name for name, flag in zip(found, flags, strict=True) if flag), None)


@jax.jit
def _have_nonfinite(arrays: list[jax.Array]) -> list[jax.Array]:
    # A single number may be +inf on purpose: the best loss so far, before any.
    return [jnp.any(~jnp.isfinite(x) if x.ndim else jnp.isnan(x)) for x in arrays]
