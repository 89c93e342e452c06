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
from optaxclip.xla import run_if, tie

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

LEAST_SIDE = 1024
"""From this number of rows and columns on, few singular values beyond the limit are
clipped alone. On CPU that pays for smaller ones, too. On GPU it has not been timed;
there many small products may take longer than a few large ones."""
NUM_ROUNDS = 4
"""How often that finds some and clips them, before all are clipped by products. A
choice: a round costs 48 products with a vector, little beside one with a matrix."""

matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def adjoint(x: jax.Array) -> jax.Array:
    """The conjugate transpose."""
    return x.mT.conj()


def largest_singular_value(x: jax.Array) -> jax.Array:
    """The largest singular value, at most 0.5 % too small and never too large."""
    alpha, beta, *_ = bidiagonalize(x, starts_of(x, 1)[0], keep=False)
    return largest_of(alpha, beta)


def starts_of(x: jax.Array, number: int) -> jax.Array:
    """Unit vectors `[number, n]` of random elements.

    No gradient is orthogonal to them but by chance.
    """
    starts = np.random.default_rng(0).standard_normal((number, x.shape[1]))
    starts /= np.linalg.norm(starts, axis=1, keepdims=True)
    # A sum, so that under `vmap` they are sharded as the matrices are.
    return jnp.zeros_like(x[:1]) + jnp.asarray(starts, x.dtype)


def bidiagonalize(
    x: jax.Array, start: jax.Array, *, keep: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Golub-Kahan-Lanczos: 24 products with a vector from each side.

    Returns the diagonal `alpha` and what stands right of it, `beta`, of an upper
    bidiagonal matrix B. If `keep`, also orthonormal columns with `x V = U B`, of which
    each new one is made orthogonal to those before; else without columns.
    """
    num_steps = min(NUM_LANCZOS, *x.shape)

    def normalize(vector, basis):
        # Twice, since once leaves roundings where little remains.
        for _ in range(2):
            vector = vector - matmul(basis, left_product(vector, basis))
        size = jnp.sqrt(jnp.sum(jnp.square(vector.real) + jnp.square(vector.imag)))
        # Zero, once the process has found all there is but roundings.
        is_new = size > 8 * jnp.finfo(size.dtype).eps
        size = where(is_new, size, 0)
        return where(is_new, vector, 0) / where(is_new, size, 1).astype(x.dtype), size

    def step(carry, place):
        v, u, beta, left, right = carry
        right = right + jnp.outer(v, place)
        u, alpha = normalize(matmul(x, v) - beta.astype(x.dtype) * u, left)
        left = left + jnp.outer(u, place)
        v, beta = normalize(left_product(u, x) - alpha.astype(x.dtype) * v, right)
        return (v, u, beta, left, right), (alpha, beta)

    places = jnp.eye(num_steps, num_steps if keep else 0, dtype=x.dtype)
    u, zero = jnp.zeros_like(x[:, 0]), jnp.zeros_like(x[0, 0].real)
    bases = (jnp.zeros_like(jnp.outer(vector, places[0])) for vector in (u, start))
    carry, (alpha, beta) = lax.scan(step, (start, u, zero, *bases), places)
    *_, left, right = carry
    return alpha, beta, left, right


def left_product(u: jax.Array, x: jax.Array) -> jax.Array:
    """The conjugate transpose of `x` times the vector `u`."""
    # Written as that, XLA's CPU compiler would transpose the matrix each time.
    return matmul(u.conj(), x).conj()


def largest_of(alpha: jax.Array, beta: jax.Array) -> jax.Array:
    """The largest singular value of what `bidiagonalize` found."""
    tiny = jnp.finfo(alpha.dtype).tiny
    # The bidiagonal matrix, and the last beta, times its transpose.
    coupling = beta[:-1] * alpha[1:]
    gram = jnp.diag(jnp.square(alpha) + jnp.square(beta))
    gram = gram + jnp.diag(coupling, 1) + jnp.diag(coupling, -1)

    def square(power, _):
        power = power / jnp.maximum(jnp.trace(power), tiny)
        return matmul(power, power), None

    # The 1024th power holds the largest eigenvalue alone.
    power, _ = lax.scan(square, gram, length=10)
    mean = jnp.sum(gram * power) / jnp.maximum(jnp.trace(power), tiny)
    # Never too large: that of equal elements was 6 roundings above the true one.
    return jnp.sqrt(mean) * (1 - 16 * jnp.finfo(alpha.dtype).eps)


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


@jax.custom_jvp
def cap_singular_values(x: jax.Array, limit: jax.Array) -> jax.Array:
    """`min(s, limit)`, in units of the limit, for each singular value s."""
    if min(x.shape) < LEAST_SIDE:
        return cap_all(x, limit)[0]
    return cap_first(x, limit)


@cap_singular_values.defjvp
def _(primals, tangents):
    # That of the process in `cap_leading` would be one of its roundings.
    return jax.jvp(lambda x, limit: cap_all(x, limit)[0], primals, tangents)


def cap_first(x: jax.Array, limit: jax.Array) -> jax.Array:
    """The same: of few that exceed the limit, these alone are looked for."""
    is_done, found = cap_leading(x, limit)
    return run_if(~is_done, lambda flag, _: cap_all(tie(flag, x), limit)[0], found)[1]


def cap_leading(x: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether few singular values exceed the limit; and the result if so.

    In the space that `bidiagonalize` finds, x is a matrix of 24 rows, which is clipped
    there. Of equal singular values each round finds one or a few; the last one finds
    that all fit.
    """
    starts = starts_of(x, NUM_ROUNDS + 1)
    rounds = jnp.arange(NUM_ROUNDS + 1)

    def step(carry):
        y, place, _, _ = carry
        chosen = jnp.where(rounds[:, None] == place, starts, jnp.zeros_like(starts))
        alpha, beta, left, right = bidiagonalize(y, jnp.sum(chosen, 0), keep=True)
        found = largest_of(alpha, beta)
        lower = jnp.diag(alpha) + jnp.diag(beta[:-1], -1)
        clipped, beyond = cap_all(lower, limit)
        for _ in range(3):  # The 8th power: nothing of what is hardly beyond.
            beyond = matmul(beyond, beyond)
        # How far those that exceed the limit are from being singular vectors.
        rest = beta[-1] * jnp.sqrt(jnp.sum(jnp.square(beyond[-1])))
        fits = found <= limit * (1 + 1e-3)
        # Beyond 2000 times the limit, roundings of what is large count.
        is_known = fits | ((rest <= 2e-3 * limit) & (found <= 2000 * limit))
        change = matmul(left, (limit * clipped - lower).mT.astype(x.dtype))
        y = jnp.where(fits, y, y + matmul(change, adjoint(right)))
        return y, place + 1, fits, is_known

    def goes_on(carry):
        _, place, fits, is_known = carry
        return ~fits & is_known & (place <= NUM_ROUNDS)

    zero = jnp.zeros_like(limit + x[0, 0].real)
    start = x, zero.astype(rounds.dtype), zero > 0, zero <= 0
    y, _, fits, _ = lax.while_loop(goes_on, step, start)
    return fits, y / limit.astype(x.dtype)


def cap_all(x: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`min(s, limit)`, in units of the limit, for each singular value s.

    Also the projection `[n, n]` to the right vectors of those beyond the limit.
    """
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
    return matmul(soft, inverse_root), (one + sign) / 2
