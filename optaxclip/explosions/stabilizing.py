"""The recommended stack in one call. Internal but for `stabilize`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import optax

from optaxclip import limits
from optaxclip.checks import check_transformation, with_extra_args
from optaxclip.clipping.by_norm import clip_by_norm
from optaxclip.explosions.rules import LOSS_LIMIT, NORM_LIMIT, SHARE_LIMIT
from optaxclip.explosions.skipping import skip_explosions
from optaxclip.norms.names import Stacked


def stabilize(
    inner: optax.GradientTransformation,
    *,
    max_norm: limits.LimitLike | None = None,
    norm: limits.LimitLike | None = NORM_LIMIT,
    share: limits.LimitLike | None = SHARE_LIMIT,
    loss: limits.LimitLike | None = LOSS_LIMIT,
    rollback: bool | Literal["host"] = True,
    specs: Any = None,
    stacked: Stacked | None = None,
    columns: Sequence[str] = (),
    label: str = "explosions",
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer in the recommended stack, without a number to choose.

    `skip_explosions(inner, cool_down=1/64, recovery=1.002, rollback=True)`: skips
    steps whose norm or loss is an outlier for the run. If explosions persist and
    earlier parameters are better, it returns to these with smaller steps.
    Give the loss as `value=`, of either sign: it shows best whether the parameters are
    bad, and nothing else shows slow divergence. The update of a rollback has to be
    applied as it is: put nothing behind `stabilize` in a chain, or around it.

    Args:
      inner: The optimizer; it gets all extra arguments.
      max_norm: Clips what the optimizer gets, as `clip_by_norm(max_norm)`; the rules
        see the gradients before that. A number, schedule or limit; None for no clip.
        Any clip inside takes the memory of the gradients once more.
      norm: As in `detect_explosions`; None for no such rule.
      share: Likewise; what it alone notices is not skipped.
      loss: Likewise.
      rollback: Whether to keep two copies of the parameters to return to, with "host"
        in the memory of the host, see `skip_explosions`. Without them it only skips,
        and far fewer runs are saved.
      specs: A common argument, see `help(optaxclip)`.
      stacked: Likewise.
      columns: Likewise.
      label: Likewise.

    Returns:
      The transformation, with the state `{label: SkipExplosionsState}`. `update` needs
      `params` for the rollback.

    Raises:
      ValueError: In `update` without `params` if there is a rollback, or if `inner`
        changes the structure of its state.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.stabilize(optax.adam(1e-3))
      >>> params = {"w": jnp.ones(2)}
      >>> state = tx.init(params)
      >>> update = jax.jit(tx.update)
      >>> for g in [jnp.ones(2), jnp.inf * jnp.ones(2)]:
      ...     updates, state = update({"w": g}, state, params, value=jnp.array(1.0))
      ...     params = optax.apply_updates(params, updates)
      >>> print(params["w"] < 1, optaxclip.metrics(state)["explosions/is_exploded"])
      [ True  True] 1
    """
    check_transformation("inner", inner)
    if max_norm is not None:
        clip = clip_by_norm(max_norm, specs=specs, stacked=stacked)
        inner = optax.chain(clip, with_extra_args(inner))
    return skip_explosions(
        inner,
        norm=norm,
        share=share,
        loss=loss,
        # 1/64, because steps that explode may be a hundred times too large, and a
        # search in smaller cuts loses a snapshot's age with each. 1.002: what exploded
        # at 1 and is stable at 1/16 explodes again when it recovers within some hundred
        # steps, often too slowly to be noticed; so from 1/16 it takes 1388 steps.
        cool_down=1 / 64 if rollback else None,
        recovery=1.002,
        rollback=rollback,
        specs=specs,
        stacked=stacked,
        columns=columns,
        label=label,
    )
