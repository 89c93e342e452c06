"""Nodes of a tree, one level at a time. Internal."""

from __future__ import annotations

from typing import Any

import jax
import optax

LEAF = jax.tree.structure(0)


def split_node(tree: Any) -> tuple[list, Any]:
    """The children of a node, and its structure alone."""
    return jax.tree.flatten(tree, is_leaf=lambda x: x is not tree)


def is_like(tree: Any, params: Any) -> bool:
    """Whether a tree has the structure of the parameters, with some perhaps masked."""
    if tree is None or isinstance(tree, optax.MaskedNode):
        return True
    (children, structure), (others, other) = map(split_node, (tree, params))
    return structure == other and (
        structure == LEAF or all(map(is_like, children, others))
    )


def num_leaves(tree: Any) -> int:
    """How many leaves a tree has."""
    return len(jax.tree.leaves(tree))
