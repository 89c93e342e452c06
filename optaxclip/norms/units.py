"""Which axis of a leaf counts its output units. Internal."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import jax

from optaxclip.checks import STATIC
from optaxclip.norms.names import path_name

UnitAxis = int | Callable[[str], int]
"""The axis that counts output units; a function gives that of the leaf of a name."""


def find_unit_axis(
    name: str, shape: tuple[int, ...], num_stacked: int, unit_axis: UnitAxis
) -> int:
    """The axis of output units in a leaf, behind its stacked axes; never negative."""
    axis: Any = unit_axis(name) if callable(unit_axis) else unit_axis
    if not _is_axis(axis):
        raise TypeError(f"unit_axis= must give {name!r} a whole number, not {axis!r}")
    num_axes = len(shape) - num_stacked
    if not -num_axes <= axis < num_axes:
        raise ValueError(
            f"unit_axis= gives {name!r} axis {axis}, but without its stacked axes its "
            f"shape is {shape[num_stacked:]}"
        )
    return num_stacked + axis % num_axes


def check_unit_axis(unit_axis: Any) -> None:
    """Raises the error of a `unit_axis` that is neither a number nor a function."""
    if unit_axis is None or callable(unit_axis) or _is_axis(unit_axis):
        return
    raise TypeError(
        "unit_axis must be a whole number, or a function of a leaf's name, not "
        f"{unit_axis!r}; {STATIC}"
    )


def _is_axis(axis: Any) -> bool:
    return isinstance(axis, numbers.Integral) and not isinstance(axis, bool)


def default_unit_axes(tree: Any) -> list[int | None]:
    """For each leaf, the axis that counts output units; None where it is one unit.

    0 in a layer of Equinox, whose weights are `[out, in]`, but for the bias of a
    convolution, `[out, 1, 1]`, which is one unit, and embeddings; else the last.
    """

    def walk(structure, axis):
        if jax.tree_util.treedef_is_leaf(structure):
            return [axis] * structure.num_leaves  # `None` has none
        kind, _ = structure.node_data()
        if not issubclass(kind, tuple | list | dict):
            axis = _axis_in(kind)
        return [found for child in structure.children() for found in walk(child, axis)]

    axes = walk(jax.tree.structure(tree), -1)
    paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
    return [
        None if axis == 0 and path_name(path[-1:]).startswith("bias") else axis
        for path, axis in zip(paths, axes, strict=True)
    ]


def _axis_in(kind: type) -> int:
    """The axis that counts output units in a module of some kind."""
    # By its name: Equinox need not be installed. A module of the user's own, which may
    # hold arrays of any layout, is none of its layers unless it inherits one.
    layers = [x.__name__ for x in kind.__mro__ if x.__module__.startswith("equinox.nn")]
    return 0 if layers and "Embedding" not in layers else -1
