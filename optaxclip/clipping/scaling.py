"""Scales parameters by factors that are known only at the step, as QK-clip does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip.norms.names import leaf_names
from optaxclip.numerics import accumulator, is_gradient, scale, widen
from optaxclip.xla import reshard


def scale_params() -> optax.GradientTransformationExtraArgs:
    """Multiplies parameters by factors given to `update`, after the optimizer's step.

    Last in a chain, it makes updates `u` of parameters `p` lead to `factor * (p + u)`
    instead of `p + u`. Leaves without a factor, and elements whose factor is 1, keep
    their updates bit-identical. So do elements whose factor is not a finite number > 0,
    such as the factor of a logit of inf or NaN.

    `update` takes `factors=`, a dictionary from the names of leaves (see `leaf_names`)
    to their factors: numbers, or arrays that broadcast to the leaf, as `[heads, 1]` for
    one of shape `[width, heads, size]`. Without it nothing is scaled.

    Returns:
      The transformation, without a state.

    Raises:
      ValueError: In `update`, if no leaf has one of the names, if a factor does not
        broadcast to its leaf, or without `params`.
      TypeError: In `update`, if `factors` is no dictionary.

    Example:
      QK-clip: heads whose largest logit is over 100 are brought down to it.

      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(optax.sgd(0.1), optaxclip.scale_params())
      >>> params = {"query": jnp.ones((4, 2, 3)), "key": jnp.ones((4, 2, 3))}
      >>> grads = optax.tree.zeros_like(params)
      >>> max_logits = jnp.array([50.0, 400.0])  # of each head, over the batch
      >>> root = jnp.sqrt(jnp.minimum(1, 100 / max_logits))[:, None]
      >>> updates, _ = tx.update(
      ...     grads, tx.init(params), params, factors={"query": root, "key": root}
      ... )
      >>> print(optax.apply_updates(params, updates)["key"][0, :, 0])
      [1.  0.5]

    Reference: Kimi Team, arXiv:2507.20534, section 2.1, algorithm 1.
    """

    def update(updates, state, params=None, *, factors=None, **extra_args):
        del extra_args
        if factors is None:
            return updates, state
        if not isinstance(factors, dict):
            raise TypeError(
                "factors must be a dictionary from names of leaves to their factors, "
                f"not {factors!r}"
            )
        if params is None:
            raise ValueError("scale_params scales parameters: give params to update")
        names = leaf_names(updates)
        unknown = sorted(set(factors) - set(names))
        if unknown:
            raise ValueError(f"factors names {unknown}; the leaves are {names}")
        leaves, structure = jax.tree.flatten(updates)
        # By name: `None` or a `MaskedNode` may stand for the update of a parameter.
        values = dict(zip(leaf_names(params), jax.tree.leaves(params), strict=True))
        leaves = [
            _scaled(name, u, values[name], factors[name]) if name in factors else u
            for name, u in zip(names, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _scaled(name: str, update: Any, param: Any, factor: Any) -> Any:
    """The update that leads to `factor * (param + update)`."""
    if np.size(update) == 0:
        return update
    if not is_gradient(update):
        raise ValueError(f"factors names {name!r}, whose updates are no numbers")
    update, param = jnp.asarray(update), jnp.asarray(param)
    dtype = accumulator([update, param])
    factor = jnp.asarray(factor, dtype)
    padding = (1,) * (update.ndim - factor.ndim)
    if factor.ndim > update.ndim or any(
        n not in (1, size)
        for n, size in zip(padding + factor.shape, update.shape, strict=True)
    ):
        raise ValueError(
            f"the factor of {name!r} has shape {factor.shape}, which does not "
            f"broadcast to {update.shape}"
        )
    factor = jnp.broadcast_to(factor, update.shape)
    factor = reshard(factor, jax.typeof(update).sharding.spec)
    is_scaled = (factor > 0) & (factor < jnp.inf) & (factor != 1)
    wide = widen(update, dtype)
    # The change and not the product: beside large parameters the update of a factor
    # near 1 would be lost.
    change = scale(widen(param, dtype) + wide, factor - 1)
    return jnp.where(is_scaled, (wide + change).astype(update.dtype), update)
