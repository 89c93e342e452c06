"""Singular values by products of matrices alone: the largest, and all of them limited.

No decomposition: accelerators multiply matrices a hundred times faster than they
decompose them. All matrices here are `[m, n]` with a Frobenius norm of 1, in float32 or
wider, and their products are not rounded to less, as accelerators do unless told.
Internal.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.numerics import where

NUM_LANCZOS = 24
"""Steps of the Lanczos process: of a matrix of random elements, whose singular values
are the most crowded, the largest is then found to 0.5 %, of most to a rounding."""

# Odd polynomials a x + b x^3 + c x^5, each the closest to 1 on what the one before made
# of its interval, as in the Polar Express (Amsel et al., arXiv:2505.16932, algorithm
# 1); scaled so that each maps [first column, 1] into [first column of the next, 1], and
# found with 0.1 % of room above 1, so that roundings do not grow. The last ends within
# 0.08 % of 1. Steps before take the first one again: one made for them would grow small
# values by 2 % more, and bring large ones down to where roundings count.
POLYNOMIALS = np.array(
    [
        (0.0213, 4.16803, -11.90304, 8.72289),
        (0.0885, 3.89765, -9.84769, 6.94095),
        (0.338, 3.01918, -4.81882, 2.79709),
        (0.8467, 2.03615, -1.59359, 0.55739),
    ]
)
# Where min(sigma, 1) has its kink, the sign is not reached: an error of 0.15 %.
KINK = POLYNOMIALS[0, 0]
# The cubic closest to 0.999 / sqrt(x) on [1/2, 1], to 0.05 %; the constant comes first.
# The 0.1 % keep what is rounded, or near the kink, below the limit.
INVERSE_ROOT = 2.60271, -3.63601, 2.98754, -0.95572

matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def adjoint(x: jax.Array) -> jax.Array:
    """The conjugate transpose."""
    return x.mT.conj()


def largest_singular_value(x: jax.Array) -> jax.Array:
    """The largest singular value, at most 0.5 % too small and never too large.

    Golub-Kahan-Lanczos: 24 products with a vector from each side, which give a
    bidiagonal matrix with the same largest singular value.
    """
    tiny = jnp.finfo(x.real.dtype).tiny
    # Of random elements, which no gradient is orthogonal to but by chance.
    start = np.random.default_rng(0).standard_normal(x.shape[1])
    # A sum, so that under `vmap` it is sharded as the matrices are.
    v = jnp.zeros_like(x[0]) + jnp.asarray(start / np.linalg.norm(start), x.dtype)

    def normalize(vector):
        # Zero, once the process has found all there is.
        size = jnp.sqrt(jnp.sum(jnp.square(vector.real) + jnp.square(vector.imag)))
        return vector / jnp.maximum(size, tiny).astype(x.dtype), size

    def step(carry, _):
        v, u, beta = carry
        u, alpha = normalize(matmul(x, v) - beta.astype(x.dtype) * u)
        v, beta = normalize(matmul(adjoint(x), u) - alpha.astype(x.dtype) * v)
        return (v, u, beta), (alpha, beta)

    start = v, jnp.zeros_like(x[:, 0]), jnp.zeros_like(x[0, 0].real)
    num_steps = min(NUM_LANCZOS, *x.shape)
    _, (alpha, beta) = lax.scan(step, start, length=num_steps)
    # The bidiagonal matrix times its transpose.
    coupling = beta[:-1] * alpha[1:]
    gram = jnp.diag(jnp.square(alpha) + jnp.square(beta))
    gram = gram + jnp.diag(coupling, 1) + jnp.diag(coupling, -1)

    def square(power, _):
        power = power / jnp.maximum(jnp.trace(power), tiny)
        return matmul(power, power), None

    # The 1024th power holds the largest eigenvalue alone.
    power, _ = lax.scan(square, gram, length=10)
    mean = jnp.sum(gram * power) / jnp.maximum(jnp.trace(power), tiny)
    return jnp.sqrt(mean)


def orthogonalize(x: jax.Array, smallest: jax.Array) -> jax.Array:
    """Brings singular values of at least `smallest`, at most 1, to [0.9992, 1].

    Smaller ones end between 0 and that.

    The quintic Newton-Schulz iteration of Muon, with other polynomials: each step
    multiplies small ones by 4, so that it takes 3 + log(1 / smallest) / log(4) at most.
    """
    floors, *coefficients = jnp.asarray(POLYNOMIALS.T, x.real.dtype)
    # As the next one's interval begins where this one's image does.
    following = jnp.append(floors[1:], 1)
    places = jnp.arange(len(floors))

    def step(carry):
        x, smallest = carry
        place = jnp.maximum(jnp.sum(smallest >= floors) - 1, 0)
        # An index, where `vmap` runs over devices, would need to be told a sharding.
        chosen = (places == place).astype(floors.dtype)
        *factors, end = (jnp.sum(chosen * row) for row in (*coefficients, following))
        a, b, c = (factor.astype(x.dtype) for factor in factors)
        gram = matmul(adjoint(x), x)
        factor = b * gram + c * matmul(gram, gram)
        grown = a.real * smallest
        return a * x + matmul(x, factor), where(smallest < floors[0], grown, end)

    return lax.while_loop(lambda carry: carry[1] < 1, step, (x, smallest))[0]


def soften_singular_values(x: jax.Array, limit: jax.Array) -> jax.Array:
    """`s / sqrt(1 + (s / limit)**2)`, in units of the limit, for each singular value s.

    These are the first rows of the orthogonal factor of the matrix above the limit
    times the identity. SPECTRA takes the root of `limit**2 + s**2` instead, whose
    range, the square of this one's, is beyond float32 where the largest s is 3000 times
    the limit.
    """
    identity = jnp.eye(x.shape[1], dtype=x.dtype)
    below = limit.astype(x.dtype) * identity
    largest = jnp.sqrt(1 + jnp.square(limit))  # of the two together, at most
    both = jnp.concatenate([x, below]) / largest.astype(x.dtype)
    return orthogonalize(both, limit / largest)[: x.shape[0]]


def cap_singular_values(x: jax.Array, limit: jax.Array) -> jax.Array:
    """`min(s, limit)`, in units of the limit, for each singular value s."""
    # What is soft has squares t = s^2 / (limit^2 + s^2), over 1/2 beyond the limit, and
    # min(s / limit, 1) is its root divided by that of max(t, 1 - t): of numbers from
    # 1/2 to 1, so that nothing is rounded to more than the limit.
    soft = soften_singular_values(x, limit)
    one = jnp.eye(x.shape[1], dtype=x.dtype)
    beyond = matmul(adjoint(soft), soft) - one / 2
    sign = orthogonalize(2 * beyond, jnp.full_like(limit, KINK))
    larger = one / 2 + matmul(beyond, sign)
    *lower, highest = INVERSE_ROOT
    inverse_root = highest * one
    for coefficient in reversed(lower):
        inverse_root = coefficient * one + matmul(larger, inverse_root)
    return matmul(soft, inverse_root)
