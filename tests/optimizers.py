"""The optimizers of Optax, and the comparison of two programs bit by bit."""

import functools
import inspect
import types
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

ARGUMENTS: dict[str, dict[str, Any]] = {
    "adafactor": {"min_dim_size_to_factor": 2, "momentum": 0.9},
    "noisy_sgd": {"key": 0},
    "rmsprop": {"momentum": 0.9, "centered": True},
    "sgd": {"momentum": 0.9, "nesterov": True},
    "galore": {"rank": 2, "update_proj_gap": 2},
    "sophia": {"update_interval": 2},
}
# It needs the gradients of each example; a wrapper, below.
NO_OPTIMIZERS = {"dpsgd", "schedule_free"}


def optimizers_of(module) -> dict[str, Any]:
    """What takes a learning rate and is no part of another."""
    return {
        name: function
        for name, function in vars(module).items()
        if isinstance(function, types.FunctionType | functools.partial)
        and not name.startswith(("_", "scale_by_"))
        and name not in NO_OPTIMIZERS
        and any("learning_rate" in x for x in inspect.signature(function).parameters)
    }


def make_optimizer(module, name):
    function = optimizers_of(module)[name]
    arguments = dict(ARGUMENTS.get(name, {}))
    if "learning_rate" in inspect.signature(function).parameters:
        arguments["learning_rate"] = 0.1
    return function(**arguments)


def op_by_op(function) -> Any:
    """Traces as `jax.jit` does, but compiles each operation alone.

    XLA contracts products and sums where it fuses them, so two programs that compute
    the same values in other fusions differ by roundings. It is quicker, too: the
    programs share the operations.
    """
    traced = {}

    def call(*args):
        leaves, structure = jax.tree.flatten(args)
        types = structure, tuple(map(jax.typeof, leaves))
        if types not in traced:
            closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
            traced[types] = jex.jaxpr_as_fun(closed), jax.tree.structure(shape)
        run, structure = traced[types]
        return jax.tree.unflatten(structure, run(*leaves))

    return call


def bits(x) -> bytes:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = map(jax.tree.leaves, (found, expected))
    for x, y in zip(*leaves, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert bits(x) == bits(y), (x, y)
