"""The clips give the numbers of `torch.nn.utils`, which most people come from."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip

torch = pytest.importorskip("torch")

# Torch divides by norm + 1e-6, and both round a few times.
RTOL = 3e-6

SHAPES = [(5,), (3, 4), (2, 3, 2, 2), (1,), (17, 1), ()]


def random_tree(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"leaf{i}": np.asarray(rng.normal(size=shape) * 10 ** rng.uniform(-2, 1))
        .astype(np.float32)
        .reshape(shape)
        for i, shape in enumerate(SHAPES)
    }


def as_parameters(tree, dtype):
    parameters = []
    for x in tree.values():
        gradient = torch.tensor(x).to(dtype)
        parameter = torch.nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


def gradients_of(parameters):
    return [np.asarray(p.grad.to(torch.float32)) for p in parameters]


def clipped(clip: Any, tree, dtype):
    tree = jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
    updates, state = clip.update(tree, clip.init(tree))
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(updates)], state


@pytest.mark.parametrize("ord", [1, 1.5, 2, 3, math.inf])
@pytest.mark.parametrize("factor", [0.01, 0.5, 0.99])
def test_clip_grad_norm_above_the_limit(ord, factor):
    for seed in range(3):
        tree = random_tree(seed)
        max_norm = factor * float(optaxclip.global_norm(tree, ord=ord))
        parameters = as_parameters(tree, torch.float32)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=ord)
        found, state = clipped(
            optaxclip.clip_by_norm(max_norm, ord=ord), tree, jnp.float32
        )
        np.testing.assert_allclose(state["clip"].norm, float(norm), rtol=RTOL)
        assert int(state["clip"].num_clipped) == 1
        for ours, theirs in zip(found, gradients_of(parameters), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=RTOL)


@pytest.mark.parametrize("ord", [1, 2, math.inf])
@pytest.mark.parametrize("factor", [1.01, 100.0, math.inf])
def test_clip_grad_norm_below_the_limit_changes_no_bit(ord, factor):
    tree = random_tree(0)
    max_norm = factor * float(optaxclip.global_norm(tree, ord=ord))
    parameters = as_parameters(tree, torch.float32)
    torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=ord)
    found, state = clipped(optaxclip.clip_by_norm(max_norm, ord=ord), tree, jnp.float32)
    assert int(state["clip"].num_clipped) == 0
    expected = zip(found, gradients_of(parameters), tree.values(), strict=True)
    for ours, theirs, given in expected:
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(ours, given)


@pytest.mark.parametrize("ord", [1, 2, math.inf])
def test_clip_grad_norm_of_bfloat16(ord):
    tree = random_tree(1)
    max_norm = 0.3 * float(optaxclip.global_norm(tree, ord=ord))
    parameters = as_parameters(tree, torch.bfloat16)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=ord)
    found, state = clipped(
        optaxclip.clip_by_norm(max_norm, ord=ord), tree, jnp.bfloat16
    )
    # Torch rounds the norm and the factor to bfloat16 as well; we do not.
    np.testing.assert_allclose(state["clip"].norm, float(norm), rtol=2**-6)
    for ours, theirs in zip(found, gradients_of(parameters), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2**-5)


def test_clip_grad_norm_of_each_parameter():
    tree = random_tree(2)
    norms = np.asarray(optaxclip.leaf_norms(tree))
    max_norm = float(np.median(norms))
    parameters = as_parameters(tree, torch.float32)
    expected = [float(torch.nn.utils.clip_grad_norm_(p, max_norm)) for p in parameters]
    found, state = clipped(
        optaxclip.clip_by_norm(max_norm, per="leaf"), tree, jnp.float32
    )
    np.testing.assert_allclose(state["clip"].norm, expected, rtol=RTOL)
    np.testing.assert_array_equal(state["clip"].num_clipped, norms > max_norm)
    for ours, theirs in zip(found, gradients_of(parameters), strict=True):
        # Torch's 1e-6 weighs more on a small norm.
        np.testing.assert_allclose(ours, theirs, rtol=RTOL + 1e-6 / max_norm)


@pytest.mark.parametrize("max_value", [0.0, 0.1, 1.0, 1e6])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clip_grad_value(max_value, dtype):
    tree = random_tree(3)
    parameters = as_parameters(tree, getattr(torch, dtype))
    torch.nn.utils.clip_grad_value_(parameters, max_value)
    found, _ = clipped(optaxclip.clip_by_value(max_value), tree, getattr(jnp, dtype))
    for ours, theirs in zip(found, gradients_of(parameters), strict=True):
        np.testing.assert_array_equal(ours, theirs)
