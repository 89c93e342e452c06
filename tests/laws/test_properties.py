"""Random trees of random dtypes and magnitudes, limits on both sides of the norm."""

from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import optaxclip
import reference

pytestmark = pytest.mark.usefixtures("quick_by_default")

DTYPES = {
    "float16": (2.0**-11, 1e-3, 6e4),
    "bfloat16": (2.0**-8, 1e-37, 3e38),
    "float32": (1e-6, 1e-37, 3e38),
    "complex64": (1e-6, 1e-37, 2e38),
}
SHAPES = (3,), (2, 3)
# Few trees, so that few programs are compiled; all magnitudes.
TREES = [
    *([name] for name in DTYPES),
    ["float32", "bfloat16"],
    ["complex64", "float16"],
    ["bfloat16", "float32"],
    ["float16", "float16"],
]


@st.composite
def trees(draw):
    leaves = []
    for shape, name in zip(SHAPES, draw(st.sampled_from(TREES)), strict=False):
        _, low, high = DTYPES[name]
        exponents = st.floats(np.log(low), np.log(high))
        values = st.one_of(st.just(0.0), exponents.map(np.exp))
        signs = st.sampled_from([-1.0, 1.0])
        size = int(np.prod(shape))
        x = np.array(draw(st.lists(values, min_size=size, max_size=size)))
        x *= draw(st.lists(signs, min_size=size, max_size=size))
        if name == "complex64":
            x = x * np.exp(1j * draw(st.floats(0, 6)))
        leaves.append(jnp.asarray(x.reshape(shape), name))
    return leaves


@jax.jit
def clip_per_tree(leaves, limit) -> tuple[Any, Any]:
    clip: Any = optaxclip.clip_by_norm(limit)
    updates, state = clip.update(leaves, clip.init(leaves))
    return updates, state["clip"].norm


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(trees(), st.floats(-3, 3), st.booleans())
def test_clip_by_norm(leaves, offset, far):
    true_norm = float(reference.norm(leaves))
    largest = float(jnp.finfo(jnp.float32).max)
    limit = np.clip(true_norm * 10.0 ** (offset * (8 if far else 1)), 1e-37, largest)
    limit = float(np.float32(limit))
    updates, norm = clip_per_tree(leaves, limit)

    np.testing.assert_allclose(norm, min(true_norm, largest), rtol=1e-6)
    for update, leaf in zip(updates, leaves, strict=True):
        assert update.dtype == leaf.dtype
        if true_norm <= limit * (1 - 1e-6):
            assert np.asarray(update).tobytes() == np.asarray(leaf).tobytes()
    if true_norm <= limit * (1 + 1e-6):
        return
    excess = max(DTYPES[leaf.dtype.name][0] for leaf in leaves)
    after = float(reference.norm(updates))
    # Elements that become subnormal may become zero, and float16 rounds its own.
    lost = 1e-37 + 6e-8 * any(leaf.dtype == jnp.float16 for leaf in leaves)
    assert after <= limit * (1 + excess) + lost * 4
    expected = reference.clip(leaves, limit)
    for update, right in zip(updates, expected, strict=True):
        rtol = 2 * DTYPES[update.dtype.name][0]
        np.testing.assert_allclose(
            reference.wide(update).astype(complex),
            right.astype(complex),
            rtol=rtol,
            atol=6e-8 if update.dtype == jnp.float16 else 2e-38,
        )


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(
    trees(), st.integers(0, 2), st.sampled_from([np.inf, -np.inf, np.nan])
)
def test_what_is_not_finite_is_contained(leaves, position, bad):
    first = np.array(leaves[0])
    first.flat[position] = bad
    leaves = [jnp.asarray(first), *leaves[1:]]
    updates, norm = clip_per_tree(leaves, 1.0)
    assert not np.isfinite(norm)
    for update, leaf in zip(updates, leaves, strict=True):
        finite = np.isfinite(reference.wide(leaf))
        found = reference.wide(update)
        assert np.all(found[finite] == 0)
        assert np.all(np.isnan(found[~finite]))
