"""The names of leaves, layers and groups, and the layout that a state keeps of them."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from optaxclip.checks import check_by_name
from optaxclip.numerics import is_gradient

Per = Literal["tree", "leaf", "unit"] | Callable[[str], str]
"""What one norm is taken over; a function maps a leaf's name to its group's name."""


Stacked = Callable[[str], bool | int]
"""For the name of a leaf, how many of its leading axes run over layers, experts or
other arrays of their own; True stands for 1."""


Where = Callable[[str], bool]
"""True for the names of the leaves that are measured and clipped."""


def is_chosen(name: str, leaf: Any, where: Where | None) -> bool:
    """Whether a leaf is measured and clipped: a gradient, and not left out."""
    return is_gradient(leaf) and (where is None or bool(where(name)))


def leaf_names(tree: Any, *, stacked: Stacked | None = None) -> list[str]:
    """Names the leaves of a tree by their path, in the order of `jax.tree.leaves`.

    Args:
      tree: Any tree. The trailing `/value` of Flax nnx variables is left out; a tree
        that is a single array is called "array".
      stacked: For a leaf's name, how many of its leading axes run over layers (or
        layers and experts); True is 1. Each layer gets a name of its own.

    Returns:
      One name per leaf, or per layer of a stacked leaf.

    Raises:
      ValueError: If `stacked` gives a leaf more axes than it has.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> params = {"rnn": {"hh": jnp.ones((2, 3))}, "bias": jnp.ones(3)}
      >>> optaxclip.leaf_names(params)
      ['bias', 'rnn/hh']
      >>> optaxclip.leaf_names(params, stacked=lambda name: name == "rnn/hh")
      ['bias', 'rnn/hh[0]', 'rnn/hh[1]']
    """
    check_by_name(stacked=stacked)
    names = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = path_name(path)
        names += layer_names(name, stacked_shape(name, np.shape(leaf), stacked))
    return names


def stacked_shape(
    name: str, shape: tuple[int, ...], stacked: Stacked | None
) -> tuple[int, ...]:
    """The lengths of a leaf's stacked axes; () if it is not stacked."""
    num_axes = 0 if stacked is None else stacked(name)
    if not isinstance(num_axes, numbers.Integral | np.bool_) or int(num_axes) < 0:
        raise TypeError(
            f"stacked= must give {name!r} True, False or a number of axes, not "
            f"{num_axes!r}"
        )
    if int(num_axes) > len(shape):
        raise ValueError(
            f"stacked= gives {name!r} {int(num_axes)} leading axes, but its shape is "
            f"{shape}"
        )
    return shape[: int(num_axes)]


def layer_names(name: str, layers: tuple[int, ...]) -> list[str]:
    """The names of a leaf's layers; its own if it is not stacked."""
    if not layers:
        return [name]
    return [f"{name}[{', '.join(map(str, layer))}]" for layer in np.ndindex(*layers)]


def group_names(
    tree: Any, group: Callable[[str], str], *, stacked: Stacked | None = None
) -> list[str]:
    """Names the groups into which `group` puts the leaves of a tree, in their order.

    Args:
      tree: Any tree.
      group: Gives the name of the group for the name of a leaf (see `leaf_names`).
      stacked: As in `leaf_names`.

    Returns:
      The groups' names, sorted: the order of every array `[num_groups]`.

    Raises:
      TypeError: If a group's name is not a string.

    Example:
      >>> import optaxclip
      >>> params = {"rnn": {"hh": 1.0, "ih": 1.0}, "head": {"kernel": 1.0}}
      >>> optaxclip.group_names(params, lambda name: name.split("/")[0])
      ['head', 'rnn']
    """
    check_by_name(group=group)
    groups = [group(name) for name in leaf_names(tree, stacked=stacked)]
    for name in groups:
        if not isinstance(name, str):
            raise TypeError(
                f"per= must give each group a string for a name, not {name!r}"
            )
    return sorted(set(groups))


class LeafLayout(NamedTuple):
    """Layout of one leaf."""

    layers: tuple[tuple[tuple[()], ...], ...]
    """For each stacked axis a () for each of its layers: `shape` without numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the stacked axes; () if the leaf is not stacked."""
        return tuple(map(len, self.layers))


class AnyTree(tuple):
    """A nested tuple that equals every other.

    In the layout of a tree without leaves, such as the stand-in for all parameters that
    `optax.tree_map_params` gives to `init`: the state fits every other.
    """

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    def __hash__(self):
        return 0


class PerTree(NamedTuple):
    """Layout of one norm over all leaves."""

    kind = "tree"


# To JAX a layout is one static node: with the children of the parameters as its own,
# the state of other parameters would be of another structure.
@jax.tree_util.register_static
class PerLeaf(NamedTuple):
    """Layout of one norm a leaf."""

    kind = "leaf"
    tree: Any
    """The tree as nested tuples, with a `LeafLayout` for each leaf and a `MaskedNode`
    where one hides others; () if no leaf is stacked and none is hidden."""


@jax.tree_util.register_static
class PerUnit(NamedTuple):
    """Layout of one array of norms a leaf."""

    kind = "unit"
    tree: Any
    """As in `PerLeaf`."""


@jax.tree_util.register_static
class PerGroup(NamedTuple):
    """Layout of one norm a group."""

    kind = "group"
    names: Any
    """Of the groups, in their order. Nothing else knows them: `params` names leaves."""


Layout = PerTree | PerLeaf | PerUnit | PerGroup
"""The scopes of a state; `kind` as of `Scopes`. It holds no arrays, and no names but
those of groups: a tree without leaves, which `jit` and checkpoints take for structure.
"""


def layout_of(tree: Any, per: Per, stacked: Stacked | None) -> Layout:
    """The layout of a transformation's state, from the tree given to `init`."""
    if per == "tree":
        return PerTree()
    if per not in ("leaf", "unit"):
        names = group_names(tree, per, stacked=stacked)
        return PerGroup(tuple(names) if names else AnyTree())
    paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
    leaves = [
        leaf
        if isinstance(leaf, optax.MaskedNode)
        else LeafLayout(
            tuple(
                ((),) * n
                for n in stacked_shape(path_name(path), np.shape(leaf), stacked)
            )
        )
        for path, leaf in paths_and_leaves
    ]
    is_plain = all(isinstance(leaf, LeafLayout) and not leaf.layers for leaf in leaves)
    remaining = iter(leaves)

    def nested(structure):
        if jax.tree_util.treedef_is_leaf(structure) and structure.num_leaves:  # no None
            return next(remaining)
        return tuple(map(nested, structure.children()))

    layout = PerLeaf if per == "leaf" else PerUnit
    if not leaves:
        return layout(AnyTree())
    return layout(() if is_plain else nested(structure))


def path_name(path: tuple) -> str:
    """The name of a leaf at a path."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]  # a Flax nnx variable
    return jax.tree_util.keystr(path, simple=True, separator="/") or "array"


def leaf_layouts(node: Any) -> list[LeafLayout]:
    """The layouts of all leaves below a node of a layout's tree."""
    if isinstance(node, LeafLayout):
        return [node]
    return [leaf for child in node for leaf in leaf_layouts(child)]


def scope_names(layout: Layout, num_scopes: int, label: str, params: Any) -> list[str]:
    """The names of a state's scopes from `params`; without it their numbers."""
    if params is not None and isinstance(layout, PerGroup):
        return list(layout.names)
    if params is None or not isinstance(layout, PerLeaf | PerUnit):
        return [str(i) for i in range(num_scopes)]
    names = leaf_names(params)
    return [
        name
        for i, layers in scope_leaves(layout, num_scopes, label, params)
        for name in layer_names(names[i], layers)
    ]


def scope_leaves(
    layout: Any, num_scopes: int, label: str, params: Any
) -> list[tuple[int, tuple[int, ...]]]:
    """Which leaves of `params` a state has, and the lengths of their stacked axes.

    `layout`: one per leaf or per unit.
    """
    structure = jax.tree.structure(params)
    error = ValueError(
        f"params, with {structure.num_leaves} leaves, does not have the structure that "
        f"{label!r} was made for"
    )
    if layout.tree == ():
        if structure.num_leaves != num_scopes:
            raise error
        return [(i, ()) for i in range(num_scopes)]
    remaining = iter(range(structure.num_leaves))

    def walk(node, structure):
        if isinstance(node, optax.MaskedNode):  # hides a leaf or a whole subtree
            for _ in range(structure.num_leaves):
                next(remaining)
            return []
        if isinstance(node, LeafLayout):
            if not jax.tree_util.treedef_is_leaf(structure):
                raise error
            return [(next(remaining), node.shape)]
        children = structure.children()
        if len(children) != len(node):
            raise error
        return [
            found for pair in zip(node, children, strict=True) for found in walk(*pair)
        ]

    return walk(layout.tree, structure)
