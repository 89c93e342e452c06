"""Published methods that also scale up: they set a norm, or keep it in a band."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import ArrayLike

from optaxclip.clipping.by_norm import clip_by_norm
from optaxclip.limits.targets import ema_band, mean_over_rms
from optaxclip.norms.names import Per, Stacked, Where


def gradient_stabilizer(
    # The defaults of the published code.
    decay: ArrayLike = 0.6,
    *,
    squares_decay: ArrayLike = 0.999,
    per: Per = "leaf",
    where: Where | None = None,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "clip",
) -> optax.GradientTransformationExtraArgs:
    """GradientStabilizer: replaces the norm of each array by a steady one.

    `clip_by_norm(limits.mean_over_rms(...), respond="set", per="leaf")`: whatever the
    norm is, it becomes the mean of the norms over their root mean square, both moving
    averages: about 1 for norms that are alike. It needs no threshold. A single
    spike of any size comes out at most `(1 - decay) / sqrt(1 - squares_decay)` long,
    12.6 with the defaults, and growing ones in a row up to 15.8. The scale of gradients
    is lost: put it before an optimizer that is indifferent to it, such as Adam.

    Unlike the reference, a gradient that holds inf or NaN is contained (there it passes
    as it is), and norms under 1e-12 are scaled like all others.

    Args:
      decay: Decay of the mean per step, within (0, 1).
      squares_decay: Decay of the mean of the squares per step, within (0, 1).
      per: "tree", "leaf", or a function of names; not "unit".
      where: A common argument, see `help(optaxclip)`.
      specs: Likewise.
      stacked: Likewise.
      label: Likewise.

    Returns:
      The transformation, with the state `{label: ClipByNormState}`.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> clip = optaxclip.gradient_stabilizer()
      >>> grads = {"w": jnp.array([30.0, 40.0])}
      >>> updates, state = jax.jit(clip.update)(grads, clip.init(grads))
      >>> print(updates["w"].round(3))
      [0.6 0.8]

    Reference: Huang et al., arXiv:2502.17055.
    """
    limit = mean_over_rms(decay, squares_decay=squares_decay)
    return clip_by_norm(
        limit,
        respond="set",
        per=per,
        where=where,
        specs=specs,
        stacked=stacked,
        label=label,
    )


def aggc(
    # Without defaults: the published scripts pass 0.95 and 0.6, a band that is empty.
    low: ArrayLike,
    high: ArrayLike,
    *,
    # Both of the published scripts.
    decay: ArrayLike = 0.95,
    min_norm: ArrayLike = 0.01,
    per: Per = "leaf",
    where: Where | None = None,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "clip",
) -> optax.GradientTransformationExtraArgs:
    """AGGC: keeps each group's norm in a band around its moving average.

    The band is `[max(min_norm, low * mean), high * mean]`; the mean learns the norms
    that come out. A spike of any size raises it by `(1 - decay) * (high - 1)` at most.
    It follows a lasting rise by 10 within `2.3 / ((1 - decay) * (high - 1))` steps.

    Unlike the reference, the mean starts with the first norm (there at 0, so that the
    second gradient is cut to a few percent), and learns no non-finite norms (there
    one NaN ends the clipping). A band that is empty is refused: with a `high` below 1
    the mean falls by a few percent in every step, forever.

    Args:
      low: Lower end in units of the mean, within [0, 1).
      high: Upper end in units of the mean, > 1.
      decay: Decay of the mean per step, within (0, 1).
      min_norm: Smaller norms, but zero, are raised to this one at least, >= 0.
      per: "tree", "leaf", or a function of names, as in the paper: all arrays of one
        kind are a group. Not "unit".
      where: A common argument, see `help(optaxclip)`.
      specs: Likewise.
      stacked: Likewise.
      label: Likewise.

    Returns:
      The transformation, with the state `{label: ClipByNormState}`.

    Example:
      >>> import optax, optaxclip
      >>> kind = lambda name: name.split("/")[-2]  # "layers_3/q_proj/kernel"
      >>> tx = optax.chain(optaxclip.aggc(0.5, 2.0, per=kind), optax.adamw(1e-3))

    Reference: Li et al., arXiv:2601.11864.
    """
    limit = ema_band(low, high, decay=decay, min_norm=min_norm)
    return clip_by_norm(
        limit, per=per, where=where, specs=specs, stacked=stacked, label=label
    )
