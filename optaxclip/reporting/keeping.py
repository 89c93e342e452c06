"""Skips the rest of a training state where `skip_explosions` has skipped the step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip.reporting.states import find_skipping


def taken(opt_state: Any, *, label: str | None = None) -> jax.Array:
    """Tells whether the last step was applied, inside `jit` or outside.

    A step that `skip_explosions` or `stabilize` skipped was not, nor was one in which a
    rollback tries a snapshot. An explosion that was accepted was applied.

    Args:
      opt_state: Any tree with the state after the step, as for `metrics`.
      label: That of the `skip_explosions` or `stabilize`; None where there is one.

    Returns:
      bool `[]`, True before the first step; of several runs `[runs]`.

    Raises:
      ValueError: If there is no such state in `opt_state`, or more than one and no
        label.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.skip_explosions(optax.sgd(0.1))
      >>> params, grads = {"w": jnp.ones(1)}, {"w": jnp.array([jnp.nan])}
      >>> _, state = jax.jit(tx.update)(grads, tx.init(params), params)
      >>> print(optaxclip.taken(state))
      False
    """
    return ~find_skipping(opt_state, label).detection.is_skipped


def keep(opt_state: Any, new: Any, old: Any, *, label: str | None = None) -> Any:
    """Gives what a step made of a state, or the old state if the step was skipped.

    For what the optimizer does not hold: batch statistics, a moving average of the
    parameters, a loss scale, a random key. Of a skipped step nothing is left in them.
    A rollback does not take them back: they stay as they were after the last step that
    was applied, and that step was healthy.

    Args:
      opt_state: The state after the step.
      new: Any tree of arrays, after the step.
      old: The same tree before it.
      label: As for `taken`.

    Returns:
      A tree like `old`: `new` where the step was taken. Of several runs, arrays begin
      with the axis of the runs.

    Raises:
      ValueError: As `taken`, and if `new` has another structure than `old`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.skip_explosions(optax.sgd(0.1))
      >>> params, grads = {"w": jnp.ones(1)}, {"w": jnp.array([jnp.nan])}
      >>> _, state = jax.jit(tx.update)(grads, tx.init(params), params)
      >>> old, new = {"mean": jnp.array(0.5)}, {"mean": jnp.array(jnp.nan)}
      >>> print(optaxclip.keep(state, new, old)["mean"])
      0.5
    """
    was = taken(opt_state, label=label)

    # Not a product with 0: NaN of a bad batch would stay.
    def select(x, y):
        where = was.reshape(was.shape + (1,) * (jnp.ndim(y) - was.ndim))
        return jnp.where(where, x, y)

    return jax.tree.map(select, new, old)
