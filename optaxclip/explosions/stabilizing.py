"""The recommended stack in one call."""

from __future__ import annotations

from typing import Any

import optax

from optaxclip import limits
from optaxclip.checks import check_transformation
from optaxclip.clipping.by_norm import clip_by_norm
from optaxclip.explosions.rules import LOSS_LIMIT, NORM_LIMIT, SHARE_LIMIT
from optaxclip.explosions.skipping import skip_explosions
from optaxclip.norms.names import Stacked


def stabilize(
    optimizer: optax.GradientTransformation,
    *,
    max_norm: limits.LimitLike | None = None,
    norm: limits.LimitLike | None = NORM_LIMIT,
    share: limits.LimitLike | None = SHARE_LIMIT,
    loss: limits.LimitLike | None = LOSS_LIMIT,
    rollback: bool = True,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "explosions",
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer in the recommended stack, without a number to choose.

    `skip_explosions(optimizer, cool_down=1/64, recovery=1.002, rollback=True)`: skips
    steps whose norm, share of a leaf or loss is an outlier for the run; where that
    persists and earlier parameters are better, returns to them with smaller steps. Give
    the loss as `value=`, of either sign: it is the best witness against the parameters,
    and what diverges slowly shows nowhere else.

    Args:
      optimizer: The optimizer; it gets all extra arguments.
      max_norm: Clips the gradients before it as well, as `clip_by_norm(max_norm)`: a
        number, schedule or limit.
      norm: As in `detect_explosions`; None for no such rule.
      share: Likewise.
      loss: Likewise.
      rollback: Whether to keep two copies of the parameters to return to. Without them
        it only skips, and far fewer runs are saved.
      specs: As in `detect_explosions`.
      stacked: As in `clip_by_norm`.
      label: Under which name the state and the metrics appear.

    Returns:
      The transformation, with the state `{label: SkipExplosionsState}`. `update` needs
      `params` for the rollback.

    Raises:
      ValueError: If an argument is out of range; in `update` if `value` has axes, or
        without `params` where they are needed.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.stabilize(optax.adam(1e-3))
      >>> params = {"w": jnp.ones(2)}
      >>> state = tx.init(params)
      >>> update = jax.jit(tx.update)
      >>> for g in [jnp.ones(2), jnp.full(2, jnp.inf)]:
      ...     updates, state = update({"w": g}, state, params, value=jnp.array(1.0))
      ...     params = optax.apply_updates(params, updates)
      >>> print(params["w"] < 1, optaxclip.metrics(state)["explosions/is_exploded"])
      [ True  True] 1
    """
    check_transformation("optimizer", optimizer)
    if max_norm is not None:
        clip = clip_by_norm(max_norm, specs=specs, stacked=stacked)
        optimizer = optax.chain(clip, optimizer)
    return skip_explosions(
        optimizer,
        norm=norm,
        share=share,
        loss=loss,
        # 1/64, since steps that explode may be a hundred times too large, and a search
        # in smaller cuts loses a snapshot's age with each. 1.002: what exploded at 1
        # and is stable at 1/16 explodes again when it recovers within some hundred
        # steps, often too slowly to be noticed.
        cool_down=1 / 64 if rollback else None,
        recovery=1.002,
        rollback=rollback,
        specs=specs,
        stacked=stacked,
        label=label,
    )
