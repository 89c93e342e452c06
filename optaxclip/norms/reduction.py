"""Sums of powers that neither overflow nor underflow, and the norms made of them.

For ord 1 and 2 the plain sum is computed first: one read of the gradients. Only where
it is not safe, a loop in `_sums_of_powers` reads them once more, divided by a power of
two from `_SafeRange`: the rescue. Any other ord always divides by the largest element
(`_relative_to_peak`). Internal.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip.norms.scopes import Scopes
from optaxclip.numerics import accumulator, divide, is_complex, scale, where, widen
from optaxclip.xla import read_apart, repeat_while, tie_both

# Without a read before the loop XLA has a quarter fewer instructions to compile: 300
# leaves of 64 elements then take 20 % less time, of 16,384 10 %, but 100 leaves of 64
# only 0.3 s less (JAX 0.10.2 on x86-64, 2026-11-30). The second bound is twice as large
# a leaf, 128 KiB in float32: to read it takes about as long as to start some kernels.
_MANY_LEAVES = 100
_SMALL_LEAF = 2**15


# Jitted on its own, so that a loop without jit compiles it once and not on every step.
@functools.partial(jax.jit, static_argnames=("scopes",))
def reduce_leaves(gradients: list[jax.Array], *, scopes: Scopes):
    """Norms `[num_leaves]`, and the norm of all leaves, with one unit for all."""
    dtype = accumulator(gradients)
    largest = float(jnp.finfo(dtype).max)

    def norm_of(total, unit):
        root = jnp.sqrt(total)
        return where(jnp.isfinite(root), jnp.minimum(root * unit, largest), root)

    all_leaves = _Sharing(jnp.sum, np.any, lambda unit: [unit] * len(gradients))
    sums, first, unit = _sums_of_powers(gradients, scopes, 2, dtype, all_leaves)
    # A leaf whose plain sum was safe keeps it: in the unit that another leaf needs, its
    # squares could underflow.
    is_kept = _SafeRange.of(dtype).is_safe(first, np.True_)
    norms = norm_of(where(is_kept, first, sums), where(is_kept, 1, unit))
    return norms, norm_of(jnp.sum(sums), unit)


@functools.partial(jax.jit, static_argnames=("scopes", "ord"))
def reduce_scopes(gradients: list[jax.Array], *, scopes: Scopes, ord: float):
    """The norm of each scope, and by what factor the true norm exceeds it."""
    dtype = accumulator(gradients)

    @jax.custom_jvp
    def norms_and_excess(gradients):
        if ord in (1, 2):
            each = _Sharing(lambda x: x, lambda x: x, lambda x: _spread(x, scopes))
            sums, _, units = _sums_of_powers(gradients, scopes, ord, dtype, each)
            roots = jax.tree.map(lambda x: _root(x, ord), sums)
        else:
            values = [widen(x, dtype) for x in gradients]
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
            (slope.conj() * widen(tangent, dtype)).real
            for slope, tangent in zip(slopes, d_gradients, strict=True)
        ]
        d_norms = _total(products, scopes, "sum", dtype)
        return (norms, excess), (d_norms, jax.tree.map(jnp.zeros_like, excess))

    return norms_and_excess(gradients)


class _Sharing(NamedTuple):
    """Which scopes are rescued together, divided by the same unit."""

    join: Callable[[Any], Any]
    """From the sums of the scopes to those that are judged, one for each unit."""
    join_flags: Callable[[Any], Any]
    """The same for flags: true where any of them is."""
    spread: Callable[[Any], list]
    """From one value for each unit to one for each gradient."""


def _sums_of_powers(
    gradients: list, scopes: Scopes, ord: float, dtype: Any, sharing: _Sharing
):
    """(sums, first, units) for ord 1 and 2: one read, and one more if a sum is unsafe.

    `sums` come from the last read, whose elements were divided by `units`; `first` come
    from the first read, which divides by 1.
    """
    safe = _SafeRange.of(dtype)
    maxexp = jnp.finfo(dtype).maxexp
    # Powers of a dtype with a quarter of the accumulator's exponents always fit, as of
    # float16 in float32; bfloat16 has as many exponents as float32.
    fits = iter([4 * jnp.finfo(x.dtype).maxexp <= maxexp for x in gradients])
    scopes_to_check = scopes.any_of(
        [leaf.is_gradient and not next(fits) for leaf in scopes.leaves]
    )
    needs_check = sharing.join_flags(scopes_to_check)

    def sums_of(values):
        return _total([_power(x, ord) for x in values], scopes, "sum", dtype)

    def needs_a_read(state):
        sums, _, _, num_reads = state
        are_safe = jax.tree.map(safe.is_safe, sharing.join(sums), needs_check)
        any_unsafe = [~jnp.all(x) for x in jax.tree.leaves(are_safe)]
        is_unsafe = functools.reduce(jnp.logical_or, any_unsafe)
        return (num_reads == 0) | ((num_reads == 1) & scopes.anywhere(is_unsafe))

    def read(state):
        sums, first, _, num_reads = state
        units = jax.tree.map(safe.unit_of, sharing.join(sums), needs_check)
        # Inverted by a division: XLA would compute what is cheaper again for each leaf.
        inverses = jax.tree.map(lambda unit: 1 / unit, units)
        pairs = zip(gradients, sharing.spread(inverses), strict=True)
        tied = itertools.starmap(tie_both, pairs)
        sums = sums_of([scale(widen(x, dtype), factor) for x, factor in tied])
        if starts_in_loop:
            keep = functools.partial(where, num_reads == 0)
            first = jax.tree.map(keep, sums, first)
        return sums, first, units, num_reads + 1

    # The first read stands before the loop, which in a healthy step then has no turn: a
    # plain sum of squares is the fastest. With very many small leaves it is the number
    # of kernels that costs, to compile and to start: the loop makes the first read too.
    mean_size = sum(x.size for x in gradients) / max(len(gradients), 1)
    are_many = len(gradients) > _MANY_LEAVES and mean_size < _SMALL_LEAF
    starts_in_loop = scopes.kind != "unit" and are_many
    if starts_in_loop:
        # They stand for sums that are safe, so that the first read divides by 1.
        sums = jax.tree.map(lambda x: jnp.ones(x.shape, dtype), scopes_to_check)
    else:
        values = [read_apart(x, "norm") for x in gradients]
        sums = sums_of([widen(x, dtype) for x in values])
    units = jax.tree.map(jnp.ones_like, sharing.join(sums))
    state: Any = sums, sums, units, jnp.asarray(0 if starts_in_loop else 1, jnp.int32)
    if starts_in_loop or any(x.any() for x in jax.tree.leaves(needs_check)):
        state = repeat_while(needs_a_read, read, state)
    return state[:3]


class _SafeRange(NamedTuple):
    """The sums of a plain read that are right, and the units for those that are not."""

    low: float
    """A sum below may have lost elements to underflow."""
    up: jax.Array
    """Unit where a sum overflows: the largest float, divided by it, can be raised to
    `ord` and added up 2**40 times. A power of two, which is exact; so is `down`."""
    down: jax.Array
    """Unit where a sum is low: the smallest float, divided by it, is far from it."""

    @classmethod
    def of(cls, dtype: Any) -> _SafeRange:
        maxexp = jnp.finfo(dtype).maxexp
        shift = 11 * maxexp // 16
        up, down = (jnp.asarray(2.0**x, dtype) for x in (shift, -shift))
        return cls(2.0 ** (-maxexp // 2), up, down)

    def is_safe(self, total: jax.Array, needs_check: Any) -> jax.Array:
        return ~needs_check | ((total >= self.low) & (total < jnp.inf))

    def unit_of(self, total: jax.Array, needs_check: Any) -> jax.Array:
        unit = where(total < self.low, self.down, self.up)
        return where(self.is_safe(total, needs_check), 1, unit)


def _relative_to_peak(values: list, scopes: Scopes, ord: float, dtype: Any):
    """(roots, units) for any ord: the largest element is the unit of all others."""
    peaks = _total([_largest_part(x) for x in values], scopes, "max", dtype)
    units = jax.tree.map(lambda p: where((p > 0) & (p < jnp.inf), p, 1), peaks)
    ratios = [
        jnp.abs(divide(x, unit))
        for x, unit in zip(values, _spread(units, scopes), strict=True)
    ]
    if any(map(is_complex, values)):  # |z| may exceed its larger part by sqrt(2)
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
        divide(divide(widen(x, dtype), n), e)
        for x, n, e in zip(
            gradients, _spread(norms, scopes), _spread(excess, scopes), strict=True
        )
    ]
    if ord == 2:
        return ratios
    if math.isinf(ord):  # the elements that share the maximum share the slope
        # Both divisions round, and so did the norm: 8 eps are room for that.
        is_peak = [
            (jnp.abs(r) > 1 - 8 * jnp.finfo(dtype).eps).astype(dtype) for r in ratios
        ]
        counts = _total(is_peak, scopes, "sum", dtype)
        counts = _spread(jax.tree.map(lambda n: jnp.maximum(n, 1), counts), scopes)
        return [
            scale(jnp.sign(r), p / n)
            for r, p, n in zip(ratios, is_peak, counts, strict=True)
        ]
    return [scale(jnp.sign(r), jnp.abs(r) ** (ord - 1)) for r in ratios]


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


def _power(x: jax.Array, ord: float) -> jax.Array:
    if ord == 2:
        return x.real * x.real + x.imag * x.imag if is_complex(x) else x * x
    return jnp.abs(x) if ord == 1 else jnp.abs(x) ** ord


def _root(x: jax.Array, ord: float) -> jax.Array:
    return jnp.sqrt(x) if ord == 2 else x if ord == 1 else x ** (1 / ord)


def _largest_part(x: jax.Array) -> jax.Array:
    # NaN reads as inf: not every collective's maximum keeps a NaN.
    parts = [x.real, x.imag] if is_complex(x) else [x]
    sizes = [where(jnp.isnan(part), jnp.inf, jnp.abs(part)) for part in parts]
    return functools.reduce(jnp.maximum, sizes)
