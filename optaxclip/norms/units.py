"""Which axis of a leaf counts its output units."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax

UnitAxis = int | Callable[[str], int]
"""The axis that counts output units; a function gives that of the leaf of a name."""


def find_unit_axis(
    name: str, shape: tuple[int, ...], num_stacked: int, unit_axis: UnitAxis
) -> int:
    """The axis of output units in a leaf, behind its stacked axes; never negative."""
    axis = operator.index(unit_axis(name) if callable(unit_axis) else unit_axis)
    num_axes = len(shape) - num_stacked
    if not -num_axes <= axis < num_axes:
        raise ValueError(
            f"unit_axis= gives {name!r} axis {axis}, but without its stacked axes its "
            f"shape is {shape[num_stacked:]}"
        )
    return num_stacked + axis % num_axes


def default_unit_axes(tree: Any) -> list[int]:
    """For each leaf 0 in a layer of Equinox, whose weights are `[out, in]`; else -1."""

    def walk(structure, axis):
        if jax.tree_util.treedef_is_leaf(structure):
            return [axis] * structure.num_leaves  # `None` has none
        kind, _ = structure.node_data()
        # By its name: Equinox need not be installed. A module of the user's own, which
        # may hold arrays of any layout, is none of its layers unless it inherits one.
        if issubclass(kind, tuple | list | dict):
            child_axis = axis
        else:
            bases = [base.__module__ for base in kind.__mro__]
            child_axis = 0 if any(x.startswith("equinox.nn") for x in bases) else -1
        return [
            found for child in structure.children() for found in walk(child, child_axis)
        ]

    return walk(jax.tree.structure(tree), -1)
