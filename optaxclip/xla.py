"""What is written so only for the compiler. Internal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.numerics import where


def materialize(x: jax.Array) -> jax.Array:
    """The numbers or flags themselves.

    XLA computes again what is cheap in every loop that reads it, but no division.
    """
    if x.dtype == bool:
        return materialize(x.astype(jnp.float32)) > 0
    return x / where(jnp.isnan(x), 2, jnp.ones_like(x))


def stack_scalars(values: Sequence[jax.Array]) -> jax.Array:
    """As `jnp.stack` of single numbers, with which XLA would not fuse."""
    place = lax.iota(jnp.int32, len(values))
    found = jnp.zeros(len(values), values[0].dtype)
    for i, x in enumerate(values):
        found = jnp.where(place == i, x, found)
    return found


def replace_where(when, new, old):
    """(False, `new` if `when`, else `old`): two trees; costs nothing if not.

    A loop of at most one turn, since a select would read and write all. What reads
    `new`, or takes its place, must depend on the False: XLA then runs it after the
    loop, and need not copy it. Derivatives are those of the select.
    """

    @jax.custom_jvp
    def choose(when, new, old):
        def body(carry):
            flag, old = carry
            old = jax.tree.map(
                lambda x, y: jnp.where(flag, x.astype(y.dtype), y), new, old
            )
            return jnp.zeros_like(flag), old

        return lax.while_loop(lambda carry: carry[0], body, (when, old))

    @choose.defjvp
    def _(primals, tangents):
        when, *_ = primals
        done, chosen = choose(*primals)

        def select(x, y):
            if y.dtype == jax.dtypes.float0:
                return y
            return jnp.where(when, x.astype(y.dtype), y)

        _, new, old = tangents
        no_tangent: Any = np.zeros(np.shape(done), jax.dtypes.float0)
        return (done, chosen), (no_tangent, jax.tree.map(select, new, old))

    return choose(when, new, old)
