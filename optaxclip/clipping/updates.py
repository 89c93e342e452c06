"""Published methods for the updates that an optimizer makes: put them behind it."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import ArrayLike

from optaxclip import limits
from optaxclip.clipping.by_norm import clip_by_norm
from optaxclip.norms.names import Per, Stacked, Where


def block_rms(
    # The threshold d of Adafactor, section 6.
    max_rms: ArrayLike = 1.0,
    *,
    where: Where | None = None,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "clip",
) -> optax.GradientTransformationExtraArgs:
    """Block RMS: clips the root mean square of each array, as Adafactor does.

    `clip_by_norm(limits.rms(max_rms), per="leaf")`: `g / max(1, rms(g) / max_rms)`.

    Unlike `optax.clip_by_block_rms`, it is right where the squares of the elements
    overflow or underflow, and takes the layers of a scanned array apart with
    `stacked=`. Adafactor applies it to updates: put it after `scale_by_*`.

    Args:
      max_rms: The largest root mean square, in the unit of the updates, >= 0.
      where: A common argument, see `help(optaxclip)`.
      specs: Likewise.
      stacked: Likewise.
      label: Likewise.

    Returns:
      The transformation, with the state `{label: ClipByNormState}`.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> clip = optaxclip.block_rms(1.0)
      >>> grads = {"w": jnp.full((2, 2), 3.0), "b": jnp.array([0.5])}
      >>> updates, _ = clip.update(grads, clip.init(grads))
      >>> print(updates["w"].round(3), updates["b"])
      [[1. 1.]
       [1. 1.]] [0.5]

    Reference: Shazeer and Stern, arXiv:1804.04235, section 6.
    """
    limit = limits.rms(max_rms)
    return clip_by_norm(
        limit, per="leaf", where=where, specs=specs, stacked=stacked, label=label
    )


def clip_by_historical_norm(
    # The two numbers of the reference.
    sigmas: ArrayLike = 3.0,
    *,
    window: int = 128,
    per: Per = "tree",
    where: Where | None = None,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "clip",
) -> optax.GradientTransformationExtraArgs:
    """Levanter's update clip: clips updates far above the last norms of updates.

    `clip_by_norm(limits.window_sigma(sigmas, window=window))`: the limit is `sigmas`
    standard deviations above the mean of the last `window` norms. Put it behind the
    optimizer, so that it sees updates.

    Unlike the reference, non-finite norms are not learned (there one NaN ends the
    clipping for `window` steps), nor are norms of zero (there learned, so that steps
    without updates lower the limit); and the standard deviation counts as at least 1 %
    of the mean (there as 1e-6, so that after a flat stretch any rise is clipped).

    Args:
      sigmas: The limit, in standard deviations above the mean, > 0.
      window: Number of norms remembered, at least 2.
      per: "tree", "leaf", or a function of names; not "unit".
      where: A common argument, see `help(optaxclip)`.
      specs: Likewise.
      stacked: Likewise.
      label: Likewise.

    Returns:
      The transformation, with the state `{label: ClipByNormState}`.

    Example:
      >>> import optax, optaxclip
      >>> tx = optax.chain(optax.adam(1e-3), optaxclip.clip_by_historical_norm())

    Reference: Levanter, `optim/clip_update_norm.py`.
    """
    limit = limits.window_sigma(sigmas, window=window)
    return clip_by_norm(
        limit, per=per, where=where, specs=specs, stacked=stacked, label=label
    )
