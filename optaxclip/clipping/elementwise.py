"""SPAM's clip: each element by the mean of its own squares so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optaxclip.checks import (
    check_by_name,
    check_leaves,
    check_length,
    check_number,
)
from optaxclip.norms.names import Where, is_chosen, leaf_names
from optaxclip.numerics import (
    accumulator,
    next_count,
    root_mean_square,
    saturating_cast,
    widen,
)


class SpamState(NamedTuple):
    """State of `spam`."""

    num_steps: jax.Array
    """int32 `[]`: the number of steps so far."""
    rms: Any
    """The tree with, for each leaf that is clipped, the root of the moving average of
    its squares from 0, in float32 or wider; 0 `[]` for any other."""


def spam(
    # The defaults of the published code.
    threshold: ArrayLike = 5000.0,
    *,
    decay: ArrayLike = 0.999,
    warmup: int = 20,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SPAM's clip: cuts each element whose square is far above the mean of its squares.

    Where `g**2 > threshold * v`, g becomes `sign(g) * sqrt(threshold * v)`; then v, the
    moving average of the squares from 0, learns what came out. The method's resets of
    Adam's moments are not part of it.

    The state holds one number for each element, as large as the gradients in float32,
    and each step reads and writes it once. Unlike in the reference, which shares the v
    of its Adam, an element that had no gradient yet is not clipped (there it stays 0
    forever), and inf and NaN are not learned: inf becomes the bound, where there is
    one, and NaN stays NaN.

    Args:
      threshold: The largest square in units of the mean of the squares, > 0.
      decay: Decay of that mean per step, within (0, 1).
      warmup: The first step that is clipped, counted from 1; at least 2.
      where: True for the names of the leaves to clip; others pass through.

    Returns:
      The transformation, with the state `SpamState`.

    Raises:
      ValueError: At `init` or in `update` if a leaf to clip is complex.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> clip = optaxclip.spam(4.0, decay=0.5, warmup=2)
      >>> state = clip.init(jnp.zeros(2))
      >>> for grads in [jnp.array([1.0, 1.0]), jnp.array([9.0, 1.0])]:
      ...     updates, state = clip.update(grads, state)
      >>> print(updates.round(3))
      [1.414 1.   ]

    Reference: Huang et al., arXiv:2501.06842.
    """
    check_number("threshold", threshold, lambda x: x > 0, "> 0")
    check_number("decay", decay, lambda x: 0 < x < 1, "within (0, 1)")
    warmup = check_length("warmup", warmup, 2)
    check_by_name(where=where)

    def chosen(tree):
        flags = []
        for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
            is_clipped = is_chosen(name, leaf, where)
            if is_clipped and jnp.iscomplexobj(leaf):
                raise ValueError(f"spam cannot clip complex values: {name!r}")
            flags.append(is_clipped)
        return jax.tree.unflatten(jax.tree.structure(tree), flags)

    def init(params):
        def zeros(is_clipped, x):
            if not is_clipped:
                return jnp.zeros([])
            return jnp.zeros_like(x, dtype=accumulator([x]))

        rms = jax.tree.map(zeros, chosen(params), params)
        return SpamState(num_steps=jnp.zeros([], jnp.int32), rms=rms)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        if not isinstance(state, SpamState):
            raise ValueError(f"state must be the SpamState that init gave, not {state}")
        is_warmup = state.num_steps + 1 < warmup

        def clip(is_clipped, x, rms):
            if not is_clipped:
                return x, rms
            x = jnp.asarray(x)
            factor = jnp.sqrt(jnp.asarray(threshold, rms.dtype))
            has_none = is_warmup | (rms == 0)
            bound = jnp.where(has_none, jnp.inf, factor * rms)
            # The updates may be wider than the parameters.
            wide = widen(x, accumulator([x, rms]))
            bound = bound.astype(wide.dtype)
            clipped = jnp.clip(wide, -bound, bound)
            rate = jnp.asarray(1 - decay, rms.dtype)
            size = saturating_cast(jnp.abs(clipped), rms.dtype)
            learned = root_mean_square(rms, size, rate)
            learned = jnp.where(jnp.isfinite(wide), learned, rms)
            return clipped.astype(x.dtype), learned

        flags = jax.tree.leaves(chosen(updates))
        leaves, structure = jax.tree.flatten(updates)
        before = jax.tree.leaves(state.rms)
        found = [
            np.shape(x) if flag else () for x, flag in zip(leaves, flags, strict=True)
        ]
        check_leaves([rms.shape for rms in before], found, updates, None)
        pairs = list(map(clip, flags, leaves, before))
        updates, rms = (
            jax.tree.unflatten(structure, [pair[i] for pair in pairs]) for i in (0, 1)
        )
        return updates, SpamState(next_count(state.num_steps), rms)

    return optax.GradientTransformationExtraArgs(init, update)
