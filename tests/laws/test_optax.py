"""What Optax's own tests ask of its clips and optimizers, asked of them inside ours."""

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax import lax

import optaxclip
from optimizers import assert_same_bits, make_optimizer, op_by_op, optimizers_of

pytestmark = [
    pytest.mark.usefixtures("quick_to_compile"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]

MODULE_OF = {x: optax.contrib for x in optimizers_of(optax.contrib)}
MODULE_OF |= {x: optax for x in optimizers_of(optax)}


every_optimizer = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in MODULE_OF]
)


# Every optimizer in every wrapper, to the bit.


def in_chain(inner) -> optax.GradientTransformation:
    """Behind limits that nothing reaches, and with what only measures on both sides."""
    return optax.chain(
        optaxclip.clip_by_value(1e6),
        optaxclip.clip_by_norm(1e6, label="global"),
        optaxclip.clip_by_norm(1e6, per="leaf", label="leaf"),
        optaxclip.detect_explosions(),
        inner,
        optaxclip.record(),
    )


WRAPPERS: dict[str, Any] = {
    "in a chain": in_chain,
    "skip_explosions": optaxclip.skip_explosions,
    "stabilize": optaxclip.stabilize,
    "stabilize, no rollback": lambda inner: optaxclip.stabilize(inner, rollback=False),
}


def loss_of(params) -> Any:
    """A quartic valley; no gradient in it is far from the one before."""
    return sum(jnp.sum((x - 0.3) ** 4) for x in jax.tree.leaves(params))


def arguments_of(name, params) -> tuple[Any, dict[str, Any]]:
    """The gradients, and what any optimizer may ask for beside them."""
    value, grads = jax.value_and_grad(loss_of)(params)
    arguments = {"value": value, "grad": grads, "value_fn": loss_of}
    if name == "sophia":
        arguments["obj_fn"] = loss_of
    return grads, arguments


def train(name, tx, dtype, num_steps=12) -> Any:
    """All parameters on the way, and the last state."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state):
        grads, arguments = arguments_of(name, params)
        updates, state = tx.update(grads, state, params, **arguments)
        return optax.apply_updates(params, updates), state

    step = op_by_op(step)
    shape = jnp.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3)
    params = {"w": shape, "b": jnp.linspace(0.5, 1.5, 3, dtype=dtype)}
    state, path = tx.init(params), []
    for _ in range(num_steps):
        params, state = step(params, state)
        path.append(params)
    return path, state


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@every_optimizer
def test_trains_as_the_bare_one_to_the_bit(name, dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    expected, _ = train(name, make_optimizer(MODULE_OF[name], name), dtype)
    chex.assert_tree_all_finite(expected)
    for wrap in WRAPPERS.values():
        tx = wrap(make_optimizer(MODULE_OF[name], name))
        found, state = train(name, tx, dtype)
        assert optaxclip.metrics(state)["explosions/num_exploded"] == 0
        assert_same_bits(found, expected)


# It converges where the bare one does.

SETTINGS: dict[str, dict[str, Any]] = {
    "acprop": {"learning_rate": 1e-3},
    "adabelief": {"learning_rate": 1e-2},
    "adadelta": {"learning_rate": 0.1},
    "adafactor": {"learning_rate": 5e-3},
    "adagrad": {"learning_rate": 1.0},
    "adam": {"learning_rate": 0.1},
    "adamax": {"learning_rate": 0.1},
    "adamaxw": {"learning_rate": 0.1},
    "adamw": {"learning_rate": 0.1},
    "adan": {"learning_rate": 0.1},
    "ademamix": {"learning_rate": 1e-3},
    "adopt": {"learning_rate": 1e-2},
    "amsgrad": {"learning_rate": 0.1},
    "cocob": {},
    "dadapt_adamw": {"learning_rate": 0.1},
    "dog": {"learning_rate": 1.0},
    "dowg": {"learning_rate": 1.0},
    "fromage": {"learning_rate": 5e-3},
    "lamb": {"learning_rate": 1e-3},
    "lars": {"learning_rate": 1.0},
    "lbfgs": {},
    "lion": {"learning_rate": 1e-2, "weight_decay": 1e-4},
    "madgrad": {"learning_rate": 1e-2},
    "momo": {"learning_rate": 0.1},
    "momo_adam": {"learning_rate": 0.1},
    "muon": {"learning_rate": 1e-2},
    "nadam": {"learning_rate": 1e-2},
    "nadamw": {"learning_rate": 1e-2},
    "noisy_sgd": {"learning_rate": 1e-3, "eta": 1e-4, "key": 0},
    "novograd": {"learning_rate": 1e-3},
    "optimistic_adam_v2": {"learning_rate": 2e-3},
    "optimistic_gradient_descent": {"learning_rate": 2e-3, "alpha": 0.7, "beta": 0.1},
    "polyak_sgd": {"max_learning_rate": 1.0},
    "prodigy": {"learning_rate": 0.1},
    "radam": {"learning_rate": 5e-3},
    "rmsprop": {"learning_rate": 5e-3, "momentum": 0.9},
    "rprop": {"learning_rate": 0.1},
    "schedule_free_adamw": {"learning_rate": 1e-2, "warmup_steps": 5000},
    "schedule_free_sgd": {"learning_rate": 1e-2, "warmup_steps": 5000},
    "sgd": {"learning_rate": 1e-3, "momentum": 0.9},
    "sign_sgd": {"learning_rate": 0.1},
    "signum": {"learning_rate": 1e-2},
    "sm3": {"learning_rate": 1.0},
    "yogi": {"learning_rate": 0.1},
}
"""Learning rates with which Optax's tests let them converge in 10,000 steps."""


def squared(x) -> jax.Array:
    return (x * jnp.conj(x)).real


def parabola(dtype) -> Any:
    """(start, minimum, function)."""
    minimum = jnp.array([1.0, -1.0, 1.0], dtype)
    if jnp.iscomplexobj(minimum):
        minimum = minimum * (1 + 1j)
    start = jnp.array([-1.0, 10.0, 1.0], dtype)
    return start, minimum, lambda x: jnp.sum(squared(x - minimum))


def rosenbrock(dtype) -> Any:
    """(start, minimum, function)."""
    a = jnp.array(1 + 1j if dtype == "complex64" else 1, dtype)

    def valley(x):
        return squared(a - x[0]) + 100 * squared(x[1] - x[0] ** 2)

    return jnp.zeros(2, dtype), jnp.stack([a, a**2]), valley


def run_on(function, tx, start) -> Any:
    """(parameters after 10,000 steps, values on the way, state at the end)."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, _):
        x, state = carry
        value, grad = jax.value_and_grad(function)(x)
        grad = jnp.conj(grad)
        more = {"value": value, "grad": grad, "value_fn": function}
        updates, state = tx.update(grad, state, x, **more)
        return (optax.apply_updates(x, updates), state), value

    run = jax.jit(lambda carry: lax.scan(step, carry, length=10_000))
    (x, state), values = run((start, tx.init(start)))
    return x, values, state


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("surface", [parabola, rosenbrock])
@every_optimizer
def test_converges_where_the_bare_one_does(name, surface, dtype):
    """Within 3 %; the bare one within 1 %, and without an explosion on its way."""
    if name not in SETTINGS:
        pytest.skip("Optax does not let it run on these surfaces")
    tx = getattr(MODULE_OF[name], name)(**SETTINGS[name])
    start, minimum, function = surface(dtype)
    try:
        bare, values, _ = run_on(function, tx, start)
    except (TypeError, ValueError) as error:
        pytest.skip(f"alone it does not take these parameters: {error}")
    if not np.allclose(bare, minimum, rtol=1e-2, atol=1e-2):
        pytest.skip("alone it does not converge")
    if np.max(values) > 2 * values[0]:
        pytest.skip("alone it explodes")
    found, _, state = run_on(function, optaxclip.stabilize(tx), start)
    metrics = optaxclip.metrics(state)
    if not metrics["explosions/num_exploded"]:
        # Only roundings differ, see above; fromage makes them large.
        assert metrics["explosions/num_skipped"] == 0
        assert metrics["explosions/scale"] == 1
        return
    np.testing.assert_allclose(found, minimum, rtol=3e-2, atol=3e-2)


# What wraps an optimizer that is wrapped.


@every_optimizer
def test_its_hyperparameters_can_be_injected(name):
    factory = getattr(MODULE_OF[name], name)
    settings = SETTINGS.get(name, {"learning_rate": 0.1})
    params = {"w": -jnp.ones((2, 3)), "b": jnp.ones((2, 5, 2))}
    grads, arguments = arguments_of(name, params)

    def updates_of(tx):
        tx = optax.with_extra_args_support(tx)
        state = jax.jit(tx.init)(params)
        return jax.jit(lambda s: tx.update(grads, s, params, **arguments)[0])(state)

    try:
        updates_of(optax.inject_hyperparams(factory)(**settings))
    except TypeError as error:
        pytest.skip(f"bare, too, some of its arguments cannot be traced: {error}")

    @functools.wraps(factory)  # from whose signature the hyperparameters are read
    def stabilized(*args, **kwargs):
        return optaxclip.stabilize(factory(*args, **kwargs))

    injected = updates_of(optax.inject_hyperparams(stabilized)(**settings))
    chex.assert_trees_all_close(injected, updates_of(stabilized(**settings)), rtol=1e-3)


@every_optimizer
def test_accumulation_in_it_is_that_of_the_bare_one(name):
    bare: Any = optax.MultiSteps(make_optimizer(MODULE_OF[name], name), 2)
    tx = optaxclip.stabilize(bare, max_norm=1e6)
    params = {"w": jnp.array([1.0, 2.0], jnp.bfloat16)}
    grads, arguments = arguments_of(name, params)
    found = []
    for optimizer in (bare, tx):
        update = jax.jit(
            lambda s, tx=optimizer: tx.update(grads, s, params, **arguments)
        )
        state, updates = optimizer.init(params), []
        for _ in range(4):
            update_now, state = update(state)
            updates.append(update_now)
        found.append(updates)
    chex.assert_trees_all_equal_dtypes(*found)
    chex.assert_trees_all_close(*found, rtol=1e-2)  # a rounding of bfloat16
    assert not np.any(found[1][0]["w"])


# Sharded parameters.


@every_optimizer
def test_types_of_a_sharded_state_stay(name):
    """Of `init` and `update`, under `jit` and without, on a mesh of explicit axes."""
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((8,), ("x",), explicit, devices=jax.devices("cpu")[:8])
    sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "x"))
    bare = optax.with_extra_args_support(make_optimizer(MODULE_OF[name], name))
    tx = optaxclip.stabilize(bare)

    def types(function, *args):
        return jax.tree.map(jax.typeof, function(*args))

    with jax.set_mesh(mesh):
        params = jnp.full((2, 8, 4), 0.5, jnp.float16, out_sharding=sharding)
        _, arguments = arguments_of(name, params)

        def step_of(tx):
            return lambda x, state: tx.update(x, state, x, **arguments)

        try:
            of_bare = types(jax.jit(step_of(bare)), params, bare.init(params))
        except Exception as error:
            pytest.skip(f"alone it does not run: {error}")
        state = tx.init(params)
        assert types(jax.jit(tx.init), params) == types(tx.init, params)
        eager = types(step_of(tx), params, state)
        assert types(jax.jit(step_of(tx)), params, state) == eager
    updates, after = eager
    assert updates == of_bare[0]
    assert after["explosions"].inner_state == of_bare[1]
    before = jax.tree.map(jax.typeof, state)["explosions"]
    assert after["explosions"].snapshots == before.snapshots
    assert after["explosions"].explosions == before.explosions


# Clips, with the numbers of Optax's tests.

UPDATES = (jnp.array([500.0, 5.0]), jnp.array([300.0, 3.0]))
PARAMS = (jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))


def test_clip():
    for limit, expected in (1e6, UPDATES), (1.0, jax.tree.map(jnp.ones_like, UPDATES)):
        tx = optaxclip.clip_by_value(limit)
        chex.assert_trees_all_equal(tx.update(UPDATES, tx.init(UPDATES))[0], expected)


@pytest.mark.parametrize(
    ("make", "sizes_of"),
    [
        (optaxclip.clip_by_norm, lambda tree: [optax.tree.norm(tree)]),
        pytest.param(
            optaxclip.block_rms,
            lambda tree: [jnp.sqrt(jnp.mean(x**2)) for x in jax.tree.leaves(tree)],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            optaxclip.agc,
            lambda tree: jax.tree.leaves(
                jax.tree.map(
                    lambda x, p: jnp.linalg.norm(x) / jnp.linalg.norm(p), tree, PARAMS
                )
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip"],
)
def test_clips_by_ever_smaller_limits(make, sizes_of):
    """Clipped again and again, an update is what it is when it is clipped once."""
    updates = UPDATES
    for i in range(1, 51):
        tx = make(1 / i)
        updates, _ = tx.update(updates, tx.init(PARAMS), PARAMS)
        np.testing.assert_allclose(sizes_of(updates), 1 / i, rtol=1e-6)
        once, _ = tx.update(UPDATES, tx.init(PARAMS), PARAMS)
        chex.assert_trees_all_close(updates, once, rtol=1e-5)


@pytest.mark.slow
def test_per_example_clip():
    """The norms are 0.5, sqrt(50), sqrt(70) and 0."""
    grads = [
        jnp.array([[0, -0.5], [3, 4], [5, 6], [0, 0]]),
        jnp.array([[0.0], [5], [-3], [0]]),
    ]
    tx = optaxclip.clip_by_norm(1.0)

    def clip(example):
        return tx.update(example, tx.init(example))

    clipped, states = jax.vmap(clip)(grads)
    sums = [np.sum(x, axis=0) for x in jax.tree.leaves(clipped)]
    a, b = math.sqrt(50), math.sqrt(70)
    np.testing.assert_allclose(sums[0], [3 / a + 5 / b, -0.5 + 4 / a + 6 / b], 1e-6)
    np.testing.assert_allclose(sums[1], [5 / a - 3 / b], rtol=1e-6)
    fractions = optaxclip.metrics(states)["clip/clipped_fraction"]
    np.testing.assert_array_equal(fractions, [0, 1, 1, 0])


# `apply_if_finite`, and what is better.


@pytest.mark.slow
@pytest.mark.parametrize("make", [optaxclip.skip_explosions, optaxclip.stabilize])
@pytest.mark.parametrize("momentum", [None, 0.0])
def test_apply_if_finite(make, momentum):
    """It takes the fifth NaN, after two and two; ours never takes one."""
    tx = make(optax.sgd(1.0, momentum))
    params = jnp.array(0.0)
    state, expected = tx.init(params), 0.0
    update = jax.jit(lambda g, s, p, value: tx.update(g, s, p, value=value))
    for grad in (1, jnp.nan, jnp.nan, 1, jnp.nan, jnp.nan, jnp.nan):
        gradient = jax.grad(lambda p, x: p * x)(params, jnp.float32(grad))
        value = jnp.float32(1)
        updates, state = update(gradient, state, params, value)
        params = optax.apply_updates(params, updates)
        is_taken = bool(np.isfinite(grad))
        expected -= is_taken
        assert params == expected
        is_finite = optaxclip.metrics(state)["explosions/is_exploded"] == 0
        assert is_finite == is_taken
    metrics = optaxclip.metrics(state)
    assert metrics["explosions/num_skipped"] == 5
    assert metrics["explosions/num_in_a_row"] == 3


@pytest.mark.slow
def test_apply_if_finite_where_the_devices_differ():
    """NaN that the function itself makes, on one of eight, skips the step on all."""
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("i",), automatic, devices=jax.devices("cpu")[:8])
    tx = optaxclip.stabilize(optax.sgd(1.0), rollback=False)

    def step(params, state, x):
        def value_of(params):
            return jnp.sum(jnp.arctanh(x) * params)

        # Of parameters that all devices share, and so the sum over them.
        grad = jax.grad(value_of)(params)
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    specs = {"in_specs": (jax.P(), jax.P(), jax.P("i")), "out_specs": jax.P()}
    run = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    params = jnp.array(0.0)
    state = tx.init(params)
    half = jnp.full(8, 0.5)
    two = half.at[3].set(2.0)
    num_taken = 0
    for x in (half, two, two, half, two, two, two):
        params, state = run(params, state, x)
        num_taken += x is half
        np.testing.assert_allclose(params, -8 * np.arctanh(0.5) * num_taken, rtol=1e-5)
    assert optaxclip.metrics(state)["explosions/num_skipped"] == 5
