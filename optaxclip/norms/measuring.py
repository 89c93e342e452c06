"""How large an update is: norms per tree, leaf, unit or group.

`reduction` does the arithmetic, and rescues sums that overflow.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip.checks import STATIC, check_by_name
from optaxclip.norms.names import Per, Stacked
from optaxclip.norms.reduction import reduce_leaves, reduce_scopes
from optaxclip.norms.scopes import Scopes, find_scopes
from optaxclip.norms.units import UnitAxis, check_unit_axis


def global_norm(tree: Any, *, ord: float = 2, specs: Any = None) -> jax.Array:
    """Gives the norm of all leaves of a tree together.

    `(sum |x|**ord) ** (1/ord)`, exact to rounding for every finite input: nothing
    overflows, underflows or is added up in a narrow dtype. A norm beyond the largest
    float reads as the largest float; inf and NaN mean that the input holds one.

    Args:
      tree: Arrays of any float or complex dtype. Other leaves (`None`, integers, bools,
        keys, float0, zero-size) have norm 0. Inside `jax.shard_map`, the local shards.
      ord: Any number >= 1, or `math.inf`.
      specs: Inside `jax.shard_map`, the tree (or prefix) of `PartitionSpec`s that the
        leaves have. Under `jit` with sharded arrays it is not needed.

    Returns:
      float32 `[]`; float64 if a leaf is float64 or complex128.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tree = {"w": jnp.array([3e30, 0.0]), "b": jnp.array([4e30])}
      >>> print(optaxclip.global_norm(tree))
      5e+30
    """
    return _norms(tree, "tree", ord, specs, None)


def leaf_norms(
    tree: Any, *, ord: float = 2, specs: Any = None, stacked: Stacked | None = None
) -> jax.Array:
    """Gives the norm of each leaf, in the order of `jax.tree.leaves` and `leaf_names`.

    Args:
      tree: As in `global_norm`.
      ord: As in `global_norm`.
      specs: As in `global_norm`.
      stacked: For a leaf's name, how many of its leading axes run over layers or
        experts (True is 1); each of these arrays is then a leaf of its own.

    Returns:
      `[num_leaves]`, dtype as in `global_norm`.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tree = {"b": jnp.array([-1.0]), "w": jnp.array([[3.0, 4.0]])}
      >>> print(optaxclip.leaf_norms(tree))
      [1. 5.]
    """
    return _norms(tree, "leaf", ord, specs, stacked)


def unit_norms(
    tree: Any,
    *,
    unit_axis: UnitAxis | None = None,
    ord: float = 2,
    specs: Any = None,
    stacked: Stacked | None = None,
) -> Any:
    """Gives the norm of each output unit: over all axes of a leaf but one.

    Vectors and scalars are one unit each (Brock et al., arXiv:2102.06171, section 4.1),
    as is the bias of a convolution in Equinox.

    Args:
      tree: As in `global_norm`.
      unit_axis: The axis that counts output units, or a function of names; without
        stacked axes. By default the last, in layers of Equinox but embeddings the
        first.
      ord: As in `global_norm`.
      specs: As in `global_norm`. The result is sharded as that axis is.
      stacked: As in `leaf_norms`; the norms of such a leaf have shape
        `[layers, units]`, or `[layers]` where each layer is a vector.

    Returns:
      The tree with an array `[units]` (or `[]`) for each leaf, dtype as in
      `global_norm`.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tree = {"kernel": jnp.array([[3.0, 1.0], [4.0, 0.0]])}
      >>> print(optaxclip.unit_norms(tree)["kernel"])
      [5. 1.]
    """
    norms = _norms(tree, "unit", ord, specs, stacked, unit_axis)
    structure = jax.tree.structure(tree)
    return jax.tree.unflatten(structure, norms if structure.num_leaves else ())


def group_norms(
    tree: Any,
    group: Callable[[str], str],
    *,
    ord: float = 2,
    specs: Any = None,
    stacked: Stacked | None = None,
) -> jax.Array:
    """Gives the norm of each group of leaves, in the order of `group_names`.

    Args:
      tree: As in `global_norm`.
      group: Gives the name of the group for the name of a leaf.
      ord: As in `global_norm`.
      specs: As in `global_norm`.
      stacked: As in `leaf_norms`.

    Returns:
      `[num_groups]`, dtype as in `global_norm`.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tree = {"a": {"w": jnp.array(3.0), "b": jnp.array(4.0)}, "c": jnp.array(1.0)}
      >>> print(optaxclip.group_norms(tree, lambda name: name.split("/")[0]))
      [5. 1.]
    """
    check_by_name(group=group)
    return _norms(tree, group, ord, specs, stacked)


def check_ord(ord: Any) -> None:
    """Raises the error of an `ord` that is no number >= 1."""
    # It decides which program is made, and so cannot be traced.
    if isinstance(ord, bool) or not isinstance(ord, numbers.Real):
        raise TypeError(f"ord must be a Python number, not {ord!r}; {STATIC}")
    if not float(ord) >= 1:
        raise ValueError(f"ord must be >= 1 or inf, not {ord!r}")


def measure(tree: Any, scopes: Scopes, ord: float) -> tuple[Any, Any]:
    """Norms and their excess, both in the shape that `scopes.collapse` gives.

    The true norm is `norm * excess`: excess is 1 unless the true norm is beyond the
    largest float, where `norm` saturates.
    """
    leaves = zip(jax.tree.leaves(tree), scopes.leaves, strict=True)
    # Leaves that are no gradients have no norm, and `scopes` fills in their zeros.
    gradients = [_as_array(x) for x, leaf in leaves if leaf.is_gradient]
    return reduce_scopes(gradients, scopes=scopes, ord=float(ord))


def measure_leaves(tree: Any, scopes: Scopes) -> tuple[jax.Array, jax.Array]:
    """Norms `[num_leaves]`, and of all leaves together; without derivatives.

    For shares in the norm of all: one read, and one more if that is unsafe, with one
    unit for all leaves. So elements under 1e-19 may count as 0 unless the norm of all
    is under 2e-10; but a leaf that is zero costs nothing, and a thousand leaves compile
    as fast as one norm of all.
    """
    leaves = zip(jax.tree.leaves(tree), scopes.leaves, strict=True)
    # Records and detectors alone come here, and nobody takes their derivative.
    gradients = [
        lax.stop_gradient(_as_array(x)) for x, leaf in leaves if leaf.is_gradient
    ]
    return reduce_leaves(gradients, scopes=scopes)


def _norms(
    tree: Any,
    per: Per,
    ord: float,
    specs: Any,
    stacked: Stacked | None,
    unit_axis: UnitAxis | None = None,
) -> Any:
    check_ord(ord)
    check_by_name(stacked=stacked)
    check_unit_axis(unit_axis)
    scopes = find_scopes(tree, per, specs=specs, stacked=stacked, unit_axis=unit_axis)
    return measure(tree, scopes, ord)[0]


def _as_array(x: Any) -> jax.Array:
    """The array; zeros for one of which only shape and dtype are given."""
    # `init` may be given shapes alone, as the tests of Optax ask.
    is_abstract = isinstance(x, jax.ShapeDtypeStruct)
    return jnp.zeros_like(x) if is_abstract else jnp.asarray(x)
