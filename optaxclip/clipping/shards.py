"""Whole arrays from their shards in `jax.shard_map`, and shards of these. Internal."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

MeshAxes = tuple[tuple[str, ...], ...]
"""For each axis of an array, the manual mesh axes that it is sharded over."""


def whole_shape(shape: tuple[int, ...], mesh_axes: MeshAxes) -> tuple[int, ...]:
    """The shape of the whole array, from that of a shard."""
    lengths = jax.sharding.get_abstract_mesh().shape
    return tuple(
        n * math.prod(lengths[name] for name in names)
        for n, names in zip(shape, mesh_axes, strict=True)
    )


def join_shards(x: jax.Array, mesh_axes: MeshAxes) -> jax.Array:
    """The whole array, the same on each device."""
    names = [name for names in mesh_axes for name in names]
    if not names:
        return x
    # A sum and no all-gather, which `shard_map` takes for different on each device.
    whole = jnp.zeros(whole_shape(x.shape, mesh_axes), x.dtype)
    placed = lax.dynamic_update_slice(whole, x, _start(x.shape, mesh_axes))
    return lax.psum(placed, tuple(names))


def own_shard(
    whole: jax.Array, shape: tuple[int, ...], mesh_axes: MeshAxes
) -> jax.Array:
    """The part of a whole array that this device holds, which has the shape."""
    if not any(mesh_axes):
        return whole
    return lax.dynamic_slice(whole, _start(shape, mesh_axes), shape)


def _start(shape: tuple[int, ...], mesh_axes: MeshAxes) -> list:
    """The index of the shard's first element in the whole array."""
    return [
        lax.axis_index(names) * n if names else 0
        for n, names in zip(shape, mesh_axes, strict=True)
    ]
