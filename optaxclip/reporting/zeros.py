"""The share of exact zeros in each leaf, for `metrics`. Internal."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip.norms.names import leaf_names
from optaxclip.numerics import is_gradient
from optaxclip.reporting.scalars import TOP, ranked_names

MOST_COUNTED = 2**31 - 1
"""So many zeros an int32 can count."""
ZEROS = "zeros"
"""The label of these scalars, beside those of the states."""


def check_zeros(tree: Any) -> None:
    """Raises the error of what holds no array, as True in place of the gradients."""
    leaves = jax.tree.leaves(tree)
    if leaves and not any(hasattr(x, "dtype") for x in leaves):
        raise TypeError(
            f"zeros must be a tree of arrays, such as the gradients, not {tree!r}"
        )


def _num_zeros(x: Any) -> jax.Array:
    """The number of exact zeros, in float32 `[]`."""
    # Whole numbers: a float32 that counts one by one stops at 2**24. Along as many axes
    # as an int32 can count, all of most leaves; none alone is longer than that.
    shape, axes, size = jnp.shape(x), [], 1
    for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
        if size * shape[axis] <= MOST_COUNTED:
            axes.append(axis)
            size *= shape[axis]
    nums = jnp.sum(x == 0, axis=tuple(axes), dtype=jnp.int32).astype(jnp.float32)
    if not nums.ndim:
        return nums
    # The mean of shares is 1 if all are zeros, which a sum of numbers may miss.
    return jnp.mean(nums / size) * jnp.float32(math.prod(shape))


def zero_scalars(tree: Any, top: int) -> list[tuple[list[str], jax.Array]]:
    """As `scalars_of`, of a tree of one run: the share in all, and in each leaf."""
    leaves = [x if is_gradient(x) else jnp.zeros(0) for x in jax.tree.leaves(tree)]
    if not leaves:
        return []
    nums = jnp.stack(list(map(_num_zeros, leaves)))
    sizes = jnp.array([jnp.size(x) for x in leaves], jnp.float32)
    whole = jnp.sum(nums) / jnp.maximum(jnp.sum(sizes), 1)
    shares = nums / jnp.maximum(sizes, 1)
    found = [([f"{ZEROS}/fraction"], whole[None])]
    if len(leaves) <= top:
        names = [f"{ZEROS}/fraction/{name}" for name in leaf_names(tree)]
        return [*found, (names, shares)]
    shares, index = lax.top_k(shares, top)
    columns = {"index": index, "fraction": shares}
    for column, values in columns.items():
        found.append((ranked_names(ZEROS, TOP + column, len(values)), values))
    return found
