"""Which elements a norm is over; reduces parts to scopes and back. Internal."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from optaxclip.norms.names import (
    Per,
    Stacked,
    Where,
    group_names,
    is_chosen,
    leaf_names,
    path_name,
    stacked_shape,
)
from optaxclip.norms.units import UnitAxis, default_unit_axes, find_unit_axis
from optaxclip.xla import replicate, store

_MOST_FUSED = 100
"""Parts of more leaves than this are stored before they are summed, see `store`. What
that avoids was 3.8 s of 7.6 s at 1000 leaves (2026-11-22); it grows with their cube, so
at 100 it is a thousandth."""


class Leaf(NamedTuple):
    """How one leaf is measured. Static."""

    shape: tuple[int, ...]
    """Shape of the leaf."""
    kept: tuple[int, ...]
    """Axes that are not summed: each of their indices is a part with its own sum."""
    is_gradient: bool
    """False for leaves that `where` leaves out, and for integers, keys, float0 and
    zero-size leaves: their norm is 0."""
    mesh_axes: tuple[str, ...]
    """Manual mesh axes, sorted, over which the summed axes are sharded."""
    kept_mesh_axes: tuple[str, ...]
    """Manual mesh axes, sorted, over which the kept axes are sharded."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the leaf's parts: of the axes that are kept."""
        return tuple(self.shape[axis] for axis in self.kept)


class Scopes(NamedTuple):
    """The scopes of a tree's norms. Static and hashable, so it can key a jit cache."""

    kind: str
    """One of "tree", "leaf", "unit" and "group"."""
    leaves: tuple[Leaf, ...]
    """One for each leaf, in the order of `jax.tree.leaves`."""
    groups: tuple[tuple[int, ...], ...] = ()
    """For "group": the parts (leaves, or layers of stacked ones) of each group."""

    def collapse(self, parts: list, reduce: Literal["sum", "max"]):
        """Combines the parts of all leaves, on all devices, into one value per scope.

        Gives `[]` per tree, `[num_leaves]` per leaf, `[num_groups]` per group and, per
        unit, a tuple with one array a leaf.
        """
        return self._combine(self._reduce_over_mesh(parts, reduce), reduce, jnp)

    def spread(self, values) -> list:
        """The inverse of `collapse`: for each leaf the values that broadcast to it."""
        if self.kind == "tree":
            return [values] * len(self.leaves)
        if self.kind == "group":
            group_of = {
                part: g for g, group in enumerate(self.groups) for part in group
            }
            members = [group_of[part] for part in sorted(group_of)]
            values = values[np.array(members, int)]
        if self.kind != "unit":
            values = jax.lax.split(
                values, [math.prod(leaf.part_shape) for leaf in self.leaves]
            )
        return [
            value.reshape(
                [n if i in leaf.kept else 1 for i, n in enumerate(leaf.shape)]
            )
            for value, leaf in zip(values, self.leaves, strict=True)
        ]

    def anywhere(self, flag):
        """Whether a flag of the norms is set on any device; only per unit can it be."""
        is_kept = any(leaf.kept_mesh_axes for leaf in self.leaves)
        return self.on_any_device(flag) if is_kept else flag

    def on_any_device(self, flag):
        """Whether a flag is set on any device of those over which a leaf is sharded."""
        axes = {
            axis
            for leaf in self.leaves
            for axis in leaf.kept_mesh_axes + leaf.mesh_axes
        }
        if not axes:
            return flag
        return jax.lax.psum(flag.astype(jnp.int32), tuple(sorted(axes))) > 0

    def any_of(self, flags: list[bool]):
        """Whether one of its leaves has its flag set, for each scope, as NumPy."""
        parts = [
            np.full(leaf.part_shape, float(flag))
            for leaf, flag in zip(self.leaves, flags, strict=True)
        ]
        return jax.tree.map(lambda x: x > 0, self._combine(parts, "max", np))

    def sizes(self):
        """float32: the number of elements in each scope, over all devices."""
        axis_sizes = jax.sharding.get_abstract_mesh().shape
        parts = [
            np.full(
                leaf.part_shape,
                leaf.is_gradient
                * math.prod(n for i, n in enumerate(leaf.shape) if i not in leaf.kept)
                * math.prod(axis_sizes[axis] for axis in leaf.mesh_axes),
                np.float64,
            )
            for leaf in self.leaves
        ]
        return jax.tree.map(
            lambda size: jnp.asarray(size, jnp.float32), self._combine(parts, "sum", np)
        )

    def _combine(self, parts: list, reduce: str, numpy: Any):
        if self.kind == "unit":
            return tuple(parts)
        if not parts:
            parts = [numpy.zeros(0, np.float32)]
        if numpy is jnp:
            # On a mesh with explicit axes, experts spread over devices cannot be joined
            # with layers. What travels is one number for each.
            parts = [replicate(part) for part in parts]
        flat = numpy.concatenate([part.reshape(-1) for part in parts])
        if self.kind == "leaf":
            return flat
        total = getattr(numpy, reduce)
        if self.kind == "tree":
            if numpy is jnp and len(parts) > _MOST_FUSED:
                flat = store(flat)
            return total(flat, initial=0)
        if not self.groups:  # of a tree without leaves
            return flat
        return numpy.stack([total(flat[np.array(group)]) for group in self.groups])

    def _reduce_over_mesh(self, parts: list, reduce: str) -> list:
        # All parts that need the same mesh axes travel in one all-reduce; with them
        # only parts that are sharded alike, which per unit they may be.
        parts = list(parts)
        over_mesh = {"sum": jax.lax.psum, "max": jax.lax.pmax}[reduce]
        kinds = [(leaf.mesh_axes, leaf.kept_mesh_axes) for leaf in self.leaves]
        for kind in sorted(set(kinds)):
            axes, _ = kind
            if not axes:
                continue
            members = [i for i, other in enumerate(kinds) if other == kind]
            flat = jnp.concatenate([parts[i].reshape(-1) for i in members])
            flat = over_mesh(flat, axes)
            shapes = [self.leaves[i].part_shape for i in members]
            pieces = jax.lax.split(flat, [math.prod(shape) for shape in shapes])
            for i, piece, shape in zip(members, pieces, shapes, strict=True):
                parts[i] = piece.reshape(shape)
        return parts


def find_scopes(
    tree: Any,
    per: Per,
    *,
    specs: Any = None,
    stacked: Stacked | None = None,
    where: Where | None = None,
    unit_axis: UnitAxis | None = None,
) -> Scopes:
    """The scopes that `per` makes of a tree; the errors of the other arguments."""
    paths_and_leaves = jax.tree.leaves_with_path(tree)
    names = leaf_names(tree, stacked=stacked)
    axes = default_unit_axes(tree) if per == "unit" else [-1] * len(paths_and_leaves)
    leaves = []
    for (path, leaf), spec, default in zip(
        paths_and_leaves, _leaf_specs(specs, paths_and_leaves), axes, strict=True
    ):
        shape, name = np.shape(leaf), path_name(path)
        is_measured = is_chosen(name, leaf, where)
        kept = ()
        if per != "tree":
            kept = tuple(range(len(stacked_shape(name, shape, stacked))))
            if per == "unit" and len(shape) - len(kept) > 1:
                axis = default if unit_axis is None or not is_measured else unit_axis
                if axis is not None:
                    kept += (find_unit_axis(name, shape, len(kept), axis),)
        entries = tuple(spec) + (None,) * (len(shape) - len(spec))
        kept_mesh_axes = _sorted_axes([entries[axis] for axis in kept])
        if per != "unit" and kept_mesh_axes:
            raise ValueError(
                f"{name!r} is sharded over its layers by {spec}; with per={per!r} and "
                "stacked= every device needs all layers"
            )
        mesh_axes = _sorted_axes([e for i, e in enumerate(entries) if i not in kept])
        leaves.append(Leaf(shape, kept, is_measured, mesh_axes, kept_mesh_axes))
    if isinstance(per, str):
        if per == "unit" and not leaves:
            # One number stands for a tuple of arrays of any length, so that the state
            # fits every other in `optax.tree_map_params`.
            per = "tree"
        return Scopes(per, tuple(leaves))
    groups: dict[str, list[int]] = {
        group: [] for group in group_names(tree, per, stacked=stacked)
    }
    for part, name in enumerate(names):
        groups[per(name)].append(part)
    return Scopes("group", tuple(leaves), tuple(map(tuple, groups.values())))


def check_per(per: Any) -> None:
    """Raises the error of an unknown scope."""
    if per not in ("tree", "leaf", "unit") and not callable(per):
        raise ValueError(
            f'per must be "tree", "leaf", "unit" or a function of a name, not {per!r}'
        )


def _leaf_specs(specs: Any, paths_and_leaves: list) -> list[PartitionSpec]:
    if specs is None:
        return [PartitionSpec()] * len(paths_and_leaves)
    # Matched by path, not by structure: specs may be a prefix of the tree, and a
    # `MaskedNode` in the tree may stand where specs has a whole subtree.
    flat = jax.tree.leaves_with_path(
        specs, is_leaf=lambda spec: spec is None or isinstance(spec, PartitionSpec)
    )
    by_path = dict(flat)
    found = []
    for path, _ in paths_and_leaves:
        prefixes = [path[:n] for n in range(len(path) + 1)]
        spec = next((by_path[p] for p in prefixes if p in by_path), None)
        if not isinstance(spec, PartitionSpec):
            raise ValueError(
                f"specs must have a PartitionSpec for {path_name(path)!r} "
                f"(P() if it is replicated), not {spec!r}"
            )
        found.append(spec)
    return found


def mesh_axes_of(tree: Any, specs: Any) -> list[tuple[tuple[str, ...], ...]]:
    """For each leaf and each of its axes, the manual mesh axes that it is sharded over.

    In the order of the spec, which is that of the shards.
    """
    paths_and_leaves = jax.tree.leaves_with_path(tree)
    found = []
    for (_, leaf), spec in zip(
        paths_and_leaves, _leaf_specs(specs, paths_and_leaves), strict=True
    ):
        entries = tuple(spec) + (None,) * (np.ndim(leaf) - len(spec))
        found.append(tuple(_manual_axes([entry]) for entry in entries))
    return found


def _sorted_axes(entries: list[Any]) -> tuple[str, ...]:
    return tuple(sorted(_manual_axes(entries)))


def _manual_axes(entries: list[Any]) -> tuple[str, ...]:
    """The axes in entries of a spec that are those of a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Manual not in types.values():
        return ()
    axes = []
    for entry in entries:
        for axis in entry if isinstance(entry, tuple) else (entry,):
            if isinstance(axis, str) and axis not in types:
                raise ValueError(
                    f"specs names the mesh axis {axis!r}; the mesh has {tuple(types)}"
                )
            if types.get(axis) == AxisType.Manual:
                axes.append(axis)
    return tuple(axes)
