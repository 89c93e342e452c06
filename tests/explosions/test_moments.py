"""What the inner optimizer makes non-finite out of finite gradients, in any state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import optaxclip
from optaxclip.explosions import moments

pytestmark = pytest.mark.usefixtures("quick_to_compile")

MATRIX = {"w": 0.5 * jnp.ones((3, 4)), "b": 0.5 * jnp.ones(3)}
SCALAR = jnp.float32(0.5)
CASES: dict[str, tuple[Any, Any]] = {
    "novograd, a number for each leaf": (optax.novograd(0.1), MATRIX),
    "dog, a number for all": (optax.contrib.dog(init_step=("heuristic", 1e-2)), MATRIX),
    "adam of a single parameter": (optax.adam(0.1), SCALAR),
    "sm3, a vector for each axis": (optax.sm3(0.1), MATRIX),
    "adafactor, factored": (
        optax.adafactor(0.1, min_dim_size_to_factor=2, clipping_threshold=None),
        MATRIX,
    ),
}


@functools.cache
def update_of(name) -> Any:
    tx: Any = optaxclip.skip_explosions(
        CASES[name][0], norm=1e35, share=None, loss=None
    )
    return tx, jax.jit(tx.update)


def take_steps(name, sizes, params: Any, state: Any) -> Any:
    for size in sizes:
        grads = jax.tree.map(lambda x, size=size: jnp.full_like(x, size), params)
        updates, state = update_of(name)[1](grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name.startswith("dog") else pytest.mark.slow)
        for name in CASES
    ],
)
def test_whatever_of_the_state_a_square_made_inf_is_mended(name):
    params = CASES[name][1]
    params, state = take_steps(name, [1.0], params, update_of(name)[0].init(params))
    # A finite gradient whose square is not.
    params, state = take_steps(name, [1e30], params, state)
    assert not all(
        np.isfinite(x).all() for x in jax.tree.leaves(state["explosions"].inner_state)
    )
    before, state = take_steps(name, [1.0] * 3, params, state)
    for x in jax.tree.leaves(state["explosions"].inner_state):
        assert np.isfinite(x).all()
    assert optaxclip.metrics(state)["explosions/num_mended"] == 1
    assert optaxclip.metrics(state)["explosions/num_exploded"] == 1
    after, _ = take_steps(name, [1.0] * 3, before, state)
    for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert np.all(x != y)


def best_of(start: float) -> Any:
    """As `optax.contrib.reduce_on_plateau`, which knows no best loss at first."""

    def init(params):
        return {"best": jnp.float32(start), "rate": jnp.float32(0.25)}

    def update(updates, state, params=None, **extra_args):
        value = extra_args["value"]
        best = jnp.minimum(state["best"], value)
        rate = jnp.where(value == 1e4, jnp.inf, state["rate"])
        return updates, {"best": best, "rate": rate}

    return optax.GradientTransformationExtraArgs(init, update)


def test_a_number_that_is_inf_from_the_start_stays_and_others_are_as_at_the_start():
    tx: Any = optaxclip.skip_explosions(
        best_of(np.inf), norm=None, share=None, loss=None
    )
    update, state = jax.jit(tx.update), tx.init(MATRIX)
    for value in [np.inf, np.inf, np.inf, 1e4]:
        _, state = update(MATRIX, state, MATRIX, value=jnp.float32(value))
        found = state["explosions"].inner_state
    assert found == {"best": 1e4, "rate": np.inf}
    for _ in range(3):
        _, state = update(MATRIX, state, MATRIX, value=jnp.float32(np.inf))
    assert state["explosions"].inner_state == {"best": 1e4, "rate": 0.25}


@pytest.mark.parametrize(
    "inner",
    [
        optax.adamw(1e-3),
        optax.sgd(0.1, momentum=0.9),
        optax.lion(1e-3),
        optax.chain(optaxclip.zclip(), optaxclip.record(), optax.adam(1e-3)),
        optax.inject_hyperparams(optax.adam)(1e-3),
        optax.MultiSteps(optax.adam(1e-3), 2),
    ],
    ids=["adamw", "momentum", "lion", "ours", "hyperparameters", "MultiSteps"],
)
def test_a_usual_optimizer_has_nothing_else_to_look_at(inner):
    assert moments.find_others(inner.init(MATRIX), MATRIX) == []


def test_what_one_device_alone_has_made_inf_is_mended_on_all():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("x",), auto, devices=jax.devices("cpu")[:8])
    spec = jax.sharding.PartitionSpec("x")
    specs = {"w": spec, "b": jax.sharding.PartitionSpec()}
    tx: Any = optaxclip.skip_explosions(
        optax.novograd(0.1), norm=1e35, share=None, loss=None, specs=specs
    )

    def run(grads):
        params = jax.tree.map(jnp.ones_like, grads)
        updates, state = grads, tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
            grads = jax.tree.map(jnp.ones_like, grads)
        return updates, state["explosions"].explosions.counts.mended[None]

    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(specs,), out_specs=(specs, spec), check_vma=False
    )
    grads = {"w": jnp.ones((16, 2)).at[5].set(1e30), "b": jnp.ones(3)}
    updates, num_mended = jax.jit(sharded)(grads)
    assert num_mended.tolist() == [1] * 8
    assert not np.any(updates["b"])
