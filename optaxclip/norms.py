"""How large an update is: norms per tree, leaf, unit or group, exact for any input."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.scopes import Per, Scopes, Stacked, find_scopes, is_gradient


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

    Raises:
      TypeError, ValueError: If `ord` or `specs` is not as described.

    Example:
      >>> import jax.numpy as jnp
      >>> print(global_norm({"w": jnp.array([3e30, 0.0]), "b": jnp.array([4e30])}))
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
      stacked: True for the names of leaves whose axis 0 runs over layers (scanned
        layers); each layer is then a leaf of its own.

    Returns:
      `[num_leaves]`, dtype as in `global_norm`.

    Raises:
      TypeError, ValueError: If `ord`, `specs` or `stacked` is not as described.

    Example:
      >>> import jax.numpy as jnp
      >>> print(leaf_norms({"b": jnp.array([-1.0]), "w": jnp.array([[3.0, 4.0]])}))
      [1. 5.]
    """
    return _norms(tree, "leaf", ord, specs, stacked)


def unit_norms(
    tree: Any, *, ord: float = 2, specs: Any = None, stacked: Stacked | None = None
) -> Any:
    """Gives the norm of each output unit: over all axes of a leaf but the last.

    Vectors and scalars are one unit each (Brock et al., arXiv:2102.06171, section 4.1).

    Args:
      tree: As in `global_norm`.
      ord: As in `global_norm`.
      specs: As in `global_norm`. The result is sharded as the last axis is.
      stacked: As in `leaf_norms`; the norms of such a leaf have shape
        `[layers, units]`, or `[layers]` where each layer is a vector.

    Returns:
      The tree with an array `[units]` (or `[]`) for each leaf, dtype as in
      `global_norm`.

    Raises:
      TypeError, ValueError: If `ord`, `specs` or `stacked` is not as described.

    Example:
      >>> import jax.numpy as jnp
      >>> print(unit_norms({"kernel": jnp.array([[3.0, 1.0], [4.0, 0.0]])})["kernel"])
      [5. 1.]
    """
    norms = _norms(tree, "unit", ord, specs, stacked)
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

    Raises:
      TypeError, ValueError: If an argument is not as described.

    Example:
      >>> import jax.numpy as jnp
      >>> tree = {"a": {"w": jnp.array(3.0), "b": jnp.array(4.0)}, "c": jnp.array(1.0)}
      >>> print(group_norms(tree, lambda name: name.split("/")[0]))
      [5. 1.]
    """
    return _norms(tree, group, ord, specs, stacked)


def check_ord(ord: Any) -> None:
    """Raises the error of an `ord` that is no number >= 1."""
    if isinstance(ord, bool) or not isinstance(ord, numbers.Real):
        raise TypeError(
            f"ord must be a Python number, not {ord!r}; with optax.inject_hyperparams "
            'name it in static_args=("ord",)'
        )
    if not float(ord) >= 1:
        raise ValueError(f"ord must be >= 1 or inf, not {ord!r}")


def measure(tree: Any, scopes: Scopes, ord: float) -> tuple[Any, Any]:
    """Norms and their excess, both in the shape that `scopes.collapse` gives.

    The true norm is `norm * excess`: excess is 1 unless the true norm is beyond the
    largest float, where `norm` saturates.
    """
    leaves = zip(jax.tree.leaves(tree), scopes.leaves, strict=True)
    gradients = [_as_array(x) for x, leaf in leaves if leaf.is_gradient]
    return _measure(gradients, scopes=scopes, ord=float(ord))


def measure_leaves(tree: Any, scopes: Scopes) -> tuple[jax.Array, jax.Array]:
    """Norms `[num_leaves]`, and of all leaves together; without derivatives.

    For shares in the norm of all: one read, and one more if that is unsafe, with one
    unit for all leaves. So elements under 1e-19 may count as 0 unless the norm of all
    is under 2e-10; but a leaf that is zero costs nothing, and a thousand leaves compile
    as fast as one norm of all.
    """
    leaves = zip(jax.tree.leaves(tree), scopes.leaves, strict=True)
    gradients = [
        lax.stop_gradient(_as_array(x)) for x, leaf in leaves if leaf.is_gradient
    ]
    return _measure_leaves(gradients, scopes=scopes)


def accumulator(leaves: list) -> np.dtype:
    """The dtype in which leaves are measured: float32, or float64 if one of them is."""
    dtypes = {jnp.result_type(x) for x in leaves if is_gradient(x)}
    is_wide = dtypes & {np.dtype(np.float64), np.dtype(np.complex128)}
    return np.dtype(np.float64 if is_wide else np.float32)


def promoted(*dtypes: Any) -> np.dtype:
    """The dtype that holds them all, also where a user forbids implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def widened(x: jax.Array, dtype: Any) -> jax.Array:
    """Casts to a real dtype, or to the complex dtype made of it."""
    if _is_complex(x):
        dtype = {np.dtype("float32"): np.complex64}.get(dtype, np.complex128)
    return x.astype(dtype)


def where(condition: Any, x: Any, y: Any) -> jax.Array:
    """`jnp.where` whose numbers take the condition's sharding.

    On a mesh with explicit axes `jnp.where` refuses a number beside a sharded array.
    """
    dtype = jnp.result_type(x, y)
    x, y = (
        value if np.ndim(value) else jnp.full_like(condition, value, dtype)
        for value in (x, y)
    )
    return jnp.where(condition, x, y)


def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies by a real factor: a complex one would turn inf into NaN."""
    if _is_complex(x):
        return lax.complex(x.real * factor, x.imag * factor)
    return x * factor


def divided(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """Divides by a real divisor, also where its reciprocal would be subnormal.

    XLA divides by multiplying with the reciprocal.
    """
    is_large = divisor > jnp.finfo(divisor.dtype).max / 2.0**32
    shrink = where(is_large, 2.0**-64, jnp.ones_like(divisor))
    x, divisor = scaled(x, shrink), divisor * shrink
    if _is_complex(x):
        return lax.complex(x.real / divisor, x.imag / divisor)
    return x / divisor


def once(x: jax.Array) -> jax.Array:
    """The numbers or flags themselves.

    XLA computes again what is cheap in every loop that reads it, but no division.
    """
    if x.dtype == bool:
        return once(x.astype(jnp.float32)) > 0
    return x / where(jnp.isnan(x), 2, jnp.ones_like(x))


def side_by_side(values: Sequence[jax.Array]) -> jax.Array:
    """As `jnp.stack` of single numbers, with which XLA would not fuse."""
    place = lax.iota(jnp.int32, len(values))
    found = jnp.zeros(len(values), values[0].dtype)
    for i, x in enumerate(values):
        found = jnp.where(place == i, x, found)
    return found


def saturating_cast(norm: jax.Array, dtype: Any) -> jax.Array:
    """Casts to another dtype; a finite norm stays finite."""
    if norm.dtype == dtype:
        return norm
    if jnp.finfo(dtype).max >= jnp.finfo(norm.dtype).max:  # nothing is too large
        return norm.astype(dtype)
    largest = jnp.finfo(dtype).max.astype(norm.dtype)
    saturated = where(jnp.isfinite(norm), jnp.minimum(norm, largest), norm)
    return saturated.astype(dtype)


def divisor(largest: jax.Array) -> jax.Array:
    """What to divide norms by: XLA multiplies with 1 / x, which must not underflow."""
    return jnp.minimum(largest, jnp.finfo(largest.dtype).max / 4)


def shares_of(norms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(norms / total, total) for the root of the sum of the norms' squares.

    Both without the norms that are not finite, whose shares are 0.
    """
    finite = jnp.where(norms < jnp.inf, norms, 0)  # NaN is not
    unit = divisor(jnp.max(finite, initial=0))
    ratios = finite / jnp.where(unit > 0, unit, 1)
    squares = jnp.sum(jnp.square(ratios))
    root = jnp.sqrt(jnp.where(unit > 0, squares, 1))
    return ratios / root, unit * root


def total_of(norms: jax.Array) -> jax.Array:
    """The root of the sum of the norms' squares; inf or NaN where one of them is."""
    total = jnp.minimum(shares_of(norms)[1], jnp.finfo(norms.dtype).max)
    return jnp.where(jnp.all(norms < jnp.inf), total, jnp.sum(norms))


def _norms(tree: Any, per: Per, ord: float, specs: Any, stacked: Stacked | None) -> Any:
    check_ord(ord)
    return measure(tree, find_scopes(tree, per, specs=specs, stacked=stacked), ord)[0]


# Jitted on its own, so that a loop without jit compiles it once and not on every step.
@functools.partial(jax.jit, static_argnames=("scopes",))
def _measure_leaves(gradients: list[jax.Array], *, scopes: Scopes):
    dtype = accumulator(gradients)
    largest = float(jnp.finfo(dtype).max)

    def norm_of(total, unit):
        root = jnp.sqrt(total)
        return where(jnp.isfinite(root), jnp.minimum(root * unit, largest), root)

    (sums, total), (units, unit) = _sums_of_powers(
        gradients, scopes, 2, dtype, one_unit=True
    )
    return norm_of(sums, units), norm_of(total, unit)


@functools.partial(jax.jit, static_argnames=("scopes", "ord"))
def _measure(gradients: list[jax.Array], *, scopes: Scopes, ord: float):
    dtype = accumulator(gradients)

    @jax.custom_jvp
    def norms_and_excess(gradients):
        if ord in (1, 2):
            sums, units = _sums_of_powers(gradients, scopes, ord, dtype)
            roots = jax.tree.map(lambda x: _root(x, ord), sums)
        else:
            values = [widened(x, dtype) for x in gradients]
            roots, units = _relative_to_peak(values, scopes, ord, dtype)
        largest = float(jnp.finfo(dtype).max)

        def saturate(root, unit):
            norm = jnp.minimum(root * unit, largest)
            return where(jnp.isfinite(root), norm, root)

        def exceed(root, unit):
            # Smaller by 2**64 on the way, where it cannot overflow.
            excess = root * (unit * 2.0**-64) * (2.0**64 / largest)
            return where(jnp.isfinite(root), jnp.maximum(excess, 1), 1)

        return tuple(jax.tree.map(f, roots, units) for f in (saturate, exceed))

    @norms_and_excess.defjvp
    def _(primals, tangents):
        (gradients,), (d_gradients,) = primals, tangents
        norms, excess = norms_and_excess(gradients)
        slopes = _slopes(gradients, norms, excess, scopes, ord, dtype)
        products = [
            (slope.conj() * widened(tangent, dtype)).real
            for slope, tangent in zip(slopes, d_gradients, strict=True)
        ]
        d_norms = _total(products, scopes, "sum", dtype)
        return (norms, excess), (d_norms, jax.tree.map(jnp.zeros_like, excess))

    return norms_and_excess(gradients)


def _sums_of_powers(
    gradients: list, scopes: Scopes, ord: float, dtype: Any, *, one_unit: bool = False
):
    """(sums, units) for ord 1 and 2: one read, and one more if a sum is unsafe.

    With `one_unit` all scopes share that of the second read, which is made if their sum
    is unsafe; both results are pairs, of the scopes and of all together.
    """
    # A sum under `low` may have lost elements to underflow. Scaled by 2**-shift the
    # largest float can be raised to `ord` and added up 2**40 times without overflow;
    # by 2**shift, the smallest is far from underflow. Powers of two are exact.
    maxexp = jnp.finfo(dtype).maxexp
    shift, low = 11 * maxexp // 16, 2.0 ** (-maxexp // 2)
    up, down = jnp.asarray(2.0**shift, dtype), jnp.asarray(2.0**-shift, dtype)
    narrow = iter([4 * jnp.finfo(x.dtype).maxexp <= maxexp for x in gradients])
    can_leave = scopes.any_of(
        [leaf.is_gradient and not next(narrow) for leaf in scopes.leaves]
    )
    shapes = can_leave
    if one_unit:
        can_leave = np.any(can_leave)

    def sums_of(values):
        return _total([_power(x, ord) for x in values], scopes, "sum", dtype)

    def is_safe(sums, can_leave):
        return ~can_leave | ((sums >= low) & (sums < jnp.inf))

    def to_judge(sums: Any) -> Any:
        return jnp.sum(sums) if one_unit else sums

    def goes_on(state):
        sums, _, _, num_reads = state
        sums = to_judge(sums)
        safe = jax.tree.leaves(jax.tree.map(is_safe, sums, can_leave))
        is_unsafe = functools.reduce(jnp.logical_or, [~jnp.all(x) for x in safe])
        return (num_reads == 0) | ((num_reads == 1) & scopes.anywhere(is_unsafe))

    def read(state):
        sums, first, _, num_reads = state
        units = jax.tree.map(
            lambda total, can: where(
                is_safe(total, can), 1, where(total < low, down, up)
            ),
            to_judge(sums),
            can_leave,
        )
        # Divided, since XLA does not compute a division again for every leaf.
        scale = jax.tree.map(lambda unit: 1 / unit, units)
        # The barrier ties the gradients to the loop's state: XLA would otherwise hoist
        # their conversion to float32 out of the loop and into every healthy step.
        values = []
        factors = [scale] * len(gradients) if one_unit else _spread(scale, scopes)
        for x, factor in zip(gradients, factors, strict=True):
            x, factor = lax.optimization_barrier((x, factor))
            values.append(scaled(widened(x, dtype), factor))
        sums = sums_of(values)
        if one_unit and starts_in_loop:
            first = where(num_reads == 0, sums, first)
        return sums, first, units, num_reads + 1

    # The first read stands before the loop, which in a healthy step then has no turn: a
    # plain sum of squares is the fastest. With very many small leaves it is the number
    # of kernels that costs, to compile and to start: the loop makes the first read too.
    size = sum(x.size for x in gradients)
    starts_in_loop = scopes.kind != "unit" and len(gradients) > max(100, size / 2**15)
    if starts_in_loop:
        sums = jax.tree.map(lambda can: jnp.ones(can.shape, dtype), shapes)
    else:
        # The barrier keeps an optimizer from sharing the squares, which XLA would then
        # store; with the 0 it is another than the barrier of the clip.
        values = [lax.optimization_barrier((x, np.float32(0)))[0] for x in gradients]
        sums = sums_of([widened(x, dtype) for x in values])
    first: Any = sums if one_unit else ()
    units = jax.tree.map(jnp.ones_like, to_judge(sums))
    if starts_in_loop or any(can.any() for can in jax.tree.leaves(can_leave)):
        # A loop and not a `cond`, of which `vmap` runs both sides.
        state = sums, first, units, jnp.asarray(not starts_in_loop, jnp.int32)
        sums, first, units, _ = lax.while_loop(goes_on, read, state)
    if not one_unit:
        return sums, units
    # Beside one that overflows, or is not finite, small ones would be lost.
    is_kept = is_safe(first, np.True_)
    each = where(is_kept, first, sums), where(is_kept, 1, units)
    return (each[0], to_judge(sums)), (each[1], units)


def _relative_to_peak(values: list, scopes: Scopes, ord: float, dtype: Any):
    """(roots, units) for any ord: the largest element is the unit of all others."""
    peaks = _total([_largest_part(x) for x in values], scopes, "max", dtype)
    units = jax.tree.map(lambda p: where((p > 0) & (p < jnp.inf), p, 1), peaks)
    ratios = [
        jnp.abs(divided(x, unit))
        for x, unit in zip(values, _spread(units, scopes), strict=True)
    ]
    if any(map(_is_complex, values)):  # |z| may exceed its larger part by sqrt(2)
        tops = _total(ratios, scopes, "max", dtype)
    else:
        tops = jax.tree.map(lambda p, unit: p / unit, peaks, units)
    if not math.isinf(ord):
        safe = jax.tree.map(lambda top: where(top > 0, top, 1), tops)
        ratios = [r / top for r, top in zip(ratios, _spread(safe, scopes), strict=True)]
        sums = _total([_power(r, ord) for r in ratios], scopes, "sum", dtype)
        tops = jax.tree.map(lambda top, total: top * _root(total, ord), tops, sums)
    return tops, units


def _slopes(gradients, norms, excess, scopes: Scopes, ord: float, dtype: Any) -> list:
    """The derivative of the norm by each element; 0 where the norm is 0."""
    norms = jax.tree.map(lambda n: where(n > 0, n, 1), norms)
    ratios = [
        divided(divided(widened(x, dtype), n), e)
        for x, n, e in zip(
            gradients, _spread(norms, scopes), _spread(excess, scopes), strict=True
        )
    ]
    if ord == 2:
        return ratios
    if math.isinf(ord):  # the elements that share the maximum share the slope
        is_peak = [
            (jnp.abs(r) > 1 - 8 * jnp.finfo(dtype).eps).astype(dtype) for r in ratios
        ]
        counts = _total(is_peak, scopes, "sum", dtype)
        counts = _spread(jax.tree.map(lambda n: jnp.maximum(n, 1), counts), scopes)
        return [
            scaled(jnp.sign(r), p / n)
            for r, p, n in zip(ratios, is_peak, counts, strict=True)
        ]
    return [scaled(jnp.sign(r), jnp.abs(r) ** (ord - 1)) for r in ratios]


def _total(values: list, scopes: Scopes, reduce: Literal["sum", "max"], dtype: Any):
    """Reduces one array for each gradient to one value for each scope."""
    remaining = iter(values)
    parts = []
    for leaf in scopes.leaves:
        if leaf.is_gradient:
            axes = tuple(i for i in range(len(leaf.shape)) if i not in leaf.kept)
            parts.append(getattr(jnp, reduce)(next(remaining), axis=axes))
        else:
            parts.append(jnp.zeros(leaf.part_shape, dtype))
    return scopes.collapse(parts, reduce)


def _spread(values: Any, scopes: Scopes) -> list:
    """The values of each scope, for each gradient."""
    spread = zip(scopes.spread(values), scopes.leaves, strict=True)
    return [value for value, leaf in spread if leaf.is_gradient]


def _as_array(x: Any) -> jax.Array:
    """The array; zeros for one of which only shape and dtype are given."""
    is_abstract = isinstance(x, jax.ShapeDtypeStruct)
    return jnp.zeros_like(x) if is_abstract else jnp.asarray(x)


def _power(x: jax.Array, ord: float) -> jax.Array:
    if ord == 2:
        return x.real * x.real + x.imag * x.imag if _is_complex(x) else x * x
    return jnp.abs(x) if ord == 1 else jnp.abs(x) ** ord


def _root(x: jax.Array, ord: float) -> jax.Array:
    return jnp.sqrt(x) if ord == 2 else x if ord == 1 else x ** (1 / ord)


def _largest_part(x: jax.Array) -> jax.Array:
    # NaN reads as inf: not every collective's maximum keeps a NaN.
    parts = [x.real, x.imag] if _is_complex(x) else [x]
    sizes = [where(jnp.isnan(part), jnp.inf, jnp.abs(part)) for part in parts]
    return functools.reduce(jnp.maximum, sizes)


def _is_complex(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.complexfloating)
