"""Published clipping methods, each a limit and a scope."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import ArrayLike

from optaxclip import limits
from optaxclip.clipping.by_norm import clip_by_norm
from optaxclip.norms.names import Per, Stacked, Where
from optaxclip.norms.units import UnitAxis


def zclip(
    # The three numbers of the reference, bluorion-com/ZClip.
    max_zscore: ArrayLike = 2.5,
    *,
    decay: ArrayLike = 0.97,
    warmup: int = 25,
    max_norm: limits.LimitLike | None = None,
    per: Per = "tree",
    where: Where | None = None,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "clip",
) -> optax.GradientTransformationExtraArgs:
    """ZClip: pulls norms that are outliers back toward their moving average.

    `clip_by_norm(limits.zscore(max_zscore, decay=decay, warmup=warmup))`: the limit of
    an outlier with z-score z is `mean + max_zscore**2 / z * std`.

    Unlike the reference, it has no cap unless `max_norm` is given (its default of 1.0
    hides the method), learns no non-finite norms (one NaN there ends the clipping), and
    learns outliers as they are once they outnumber the other norms by `warmup` (there,
    a lasting rise is clipped to the old mean forever). It does not clip in its first
    `warmup` steps: give `max_norm` where these may explode.

    Args:
      max_zscore: Largest z-score, in standard deviations, > 0.
      decay: Decay of mean and variance per step, within (0, 1).
      warmup: Number of norms before the clip starts, at least 2.
      max_norm: A limit on top, also during the warm-up: a number, schedule or limit.
      per: "tree", "leaf", or a function of names; not "unit".
      where: A common argument, see `help(optaxclip)`.
      specs: Likewise.
      stacked: Likewise.
      label: Likewise.

    Returns:
      The transformation, with the state `{label: ClipByNormState}`.

    Example:
      >>> import optax, optaxclip
      >>> tx = optax.chain(optaxclip.zclip(), optax.adam(1e-3))

    Reference: Kumar et al., arXiv:2504.02507, algorithm 1.
    """
    limit = limits.zscore(max_zscore, decay=decay, warmup=warmup)
    if max_norm is not None:
        # Not by default: where norms are above 1, a cap of 1 is all that clips.
        limit = limits.minimum(limit, limits.as_limit(max_norm))
    return clip_by_norm(
        limit, per=per, where=where, specs=specs, stacked=stacked, label=label
    )


def autoclip(
    # The paper advises 10. A window of 1024 norms is ours: all of them have no end.
    percent: ArrayLike = 10.0,
    *,
    window: int = 1024,
    per: Per = "tree",
    where: Where | None = None,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "clip",
) -> optax.GradientTransformationExtraArgs:
    """AutoClip: clips to a percentile of the norms seen so far.

    `clip_by_norm(limits.percentile(percent, window=window))`. It clips about
    `100 - percent` % of all steps, by design.

    Unlike the reference, it remembers the last `window` norms (there all, so that the
    state grows with the run, or in its package 1000, without the current one), and
    learns no norms that are non-finite (there one NaN makes every later gradient NaN)
    or zero.

    Args:
      percent: The percentile, within [0, 100].
      window: Number of norms remembered, at least 1; as in the paper where it is not
        less than the number of steps.
      per: "tree", "leaf", or a function of names; not "unit".
      where: A common argument, see `help(optaxclip)`.
      specs: Likewise.
      stacked: Likewise.
      label: Likewise.

    Returns:
      The transformation, with the state `{label: ClipByNormState}`.

    Example:
      >>> import optax, optaxclip
      >>> tx = optax.chain(optaxclip.autoclip(), optax.adam(1e-3))

    Reference: Seetharaman et al., arXiv:2007.14469.
    """
    limit = limits.percentile(percent, window=window)
    return clip_by_norm(
        limit, per=per, where=where, specs=specs, stacked=stacked, label=label
    )


def adagc(
    # The four numbers of the paper.
    multiple: ArrayLike = 1.05,
    *,
    decay: ArrayLike = 0.98,
    warmup: int = 100,
    max_warmup_norm: ArrayLike = 1.0,
    per: Per = "leaf",
    where: Where | None = None,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "clip",
) -> optax.GradientTransformationExtraArgs:
    """AdaGC: clips each array near the moving average of its own clipped norms.

    `clip_by_norm(limits.ema(multiple, decay=decay, warmup=warmup, max_warmup_norm=...),
    per="leaf")`: the limit is `multiple * mean`; up to the `warmup`-th step all arrays
    are clipped together to `max_warmup_norm`.

    By design it clips most steps, and as published a leaf whose gradient is tiny in the
    warm-up stays so for thousands of steps (see `limits.ema`). Unlike the reference, a
    leaf whose gradient is exactly zero then warms up later, and non-finite norms are
    not learned. The clip alone: chain it with any optimizer.

    Args:
      multiple: The limit in units of the mean, > 1.
      decay: Decay of the mean per step, within (0, 1).
      warmup: The first step whose limit is learned, at least 2 (see `limits.ema`).
      max_warmup_norm: The fixed global limit before that step, > 0.
      per: "tree", "leaf", or a function of names; not "unit".
      where: A common argument, see `help(optaxclip)`.
      specs: Likewise.
      stacked: Likewise.
      label: Likewise.

    Returns:
      The transformation, with the state `{label: ClipByNormState}`.

    Example:
      >>> import optax, optaxclip
      >>> tx = optax.chain(optaxclip.adagc(), optax.adamw(1e-3))

    Reference: Wang et al., arXiv:2502.11034, algorithm 1.
    """
    limit = limits.ema(
        multiple, decay=decay, warmup=warmup, max_warmup_norm=max_warmup_norm
    )
    return clip_by_norm(
        limit, per=per, where=where, specs=specs, stacked=stacked, label=label
    )


def agc(
    # Both are those of the NFNets, section 4.
    max_ratio: ArrayLike = 0.01,
    *,
    eps: ArrayLike = 1e-3,
    unit_axis: UnitAxis | None = None,
    where: Where | None = None,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "clip",
) -> optax.GradientTransformationExtraArgs:
    """AGC: clips each output unit to a fraction of the norm of its weights.

    `clip_by_norm(limits.params(max_ratio, eps=eps), per="unit")`: the limit is
    `max_ratio * max(norm of the weights, eps)`. A unit is what the last axis of a Flax
    kernel counts, and the first of a layer's weights in Equinox, over all other axes; a
    vector is one unit, and so is a bias in Equinox.

    Unlike `optax.adaptive_grad_clip`, it sums a kernel of any rank over all axes but
    the last (optax: rank 3 over the first alone, and `[1, out]` is one unit), takes the
    layers of a scanned kernel `[layers, in, out]` apart with `stacked=`, and is right
    for gradients below 1e-6 or beyond 1e19.

    Args:
      max_ratio: The limit in units of the weights' norm, >= 0. The paper takes 0.01 for
        batches of 4096, and more for smaller ones.
      eps: The least norm that weights count for, >= 0.
      unit_axis: As in `clip_by_norm`.
      where: A common argument, see `help(optaxclip)`.
      specs: Likewise.
      stacked: Likewise.
      label: Likewise.

    Returns:
      The transformation, with the state `{label: ClipByNormState}`; `update` needs
      `params`.

    Raises:
      ValueError: In `update` without `params`.

    Example:
      The paper leaves out the last linear layer.

      >>> import jax.numpy as jnp, optaxclip
      >>> params = {"body": jnp.ones((4, 2)), "head": jnp.ones((2, 1))}
      >>> tx = optaxclip.agc(where=lambda name: "head" not in name)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> print(updates["body"][0].round(3), updates["head"][0])
      [0.01 0.01] [1.]

    Reference: Brock et al., arXiv:2102.06171, section 4, equation 3.
    """
    limit = limits.params(max_ratio, eps=eps)
    return clip_by_norm(
        limit,
        per="unit",
        unit_axis=unit_axis,
        where=where,
        specs=specs,
        stacked=stacked,
        label=label,
    )
