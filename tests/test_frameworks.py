"""The clips inside other libraries: the same chain, the same result, traced once."""

import functools
import itertools
import operator
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import flax.serialization
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optaxclip

pytestmark = pytest.mark.usefixtures("quick_by_default")

MAX_NORM = 0.75
STATIC = ("ord", "per", "label", "specs", "stacked")


@pytest.fixture(autouse=True)
def fresh_trace_counter():
    chex.clear_trace_counter()


def traced_once(function) -> Any:
    """Goes under `jit`: an error if the function is traced a second time."""
    return chex.assert_max_traces(function, 1)


# --- One linear model in five frameworks


class Run(NamedTuple):
    losses: list
    weights: list  # before the first step and after each
    opt_state: Any


def initial_weights():
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=3), jnp.float32),
    }


def batches(num: int = 8, bad: int | None = None):
    """Fresh data on each step, from a teacher far away: every gradient is large."""
    rng = np.random.default_rng(1)
    for step in range(num):
        x = rng.normal(size=(16, 4)).astype(np.float32)
        y = x @ np.full((4, 3), 3.0, np.float32) + 2
        yield jnp.asarray(x), jnp.asarray(y * np.nan if step == bad else y)


def squared_error(prediction, y):
    return jnp.mean(jnp.sum((prediction - y) ** 2, axis=-1))


def copied(weights):
    return jax.tree.map(lambda x: np.array(x), weights)


def run_plain(tx, *, with_value: bool) -> Run:
    def loss_fn(params, x, y):
        return squared_error(x @ params["w"] + params["b"], y)

    @jax.jit
    @traced_once
    def step(params, opt_state, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        extra = {"value": loss} if with_value else {}
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, loss

    params = initial_weights()
    opt_state = tx.init(params)
    losses, weights = [], [copied(params)]
    for x, y in batches():
        params, opt_state, loss = step(params, opt_state, x, y)
        losses.append(float(loss))
        weights.append(copied(params))
    return Run(losses, weights, opt_state)


def run_nnx(tx, *, with_value: bool) -> Run:
    @nnx.jit
    @traced_once
    def step(model, optimizer, x, y):
        loss, grads = nnx.value_and_grad(lambda m: squared_error(m(x), y))(model)
        extra = {"value": loss} if with_value else {}
        optimizer.update(model, grads, **extra)
        return loss

    def read(model):
        return copied({"w": model.kernel[...], "b": model.bias[...]})

    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model.kernel[...] = initial_weights()["w"]
    assert model.bias is not None
    model.bias[...] = initial_weights()["b"]
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses, weights = [], [read(model)]
    for x, y in batches():
        losses.append(float(step(model, optimizer, x, y)))
        weights.append(read(model))
    as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure  # of an older Flax
    return Run(losses, weights, as_pure(optimizer.opt_state))


def run_linen(tx, *, with_value: bool) -> Run:
    model = nn.Dense(3)

    @jax.jit
    @traced_once
    def step(state, x, y):
        def loss_fn(params):
            return squared_error(state.apply_fn({"params": params}, x), y)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        if not with_value:
            return state.apply_gradients(grads=grads), loss
        updates, opt_state = state.tx.update(
            grads, state.opt_state, state.params, value=loss
        )
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, loss

    def read(state):
        return copied({"w": state.params["kernel"], "b": state.params["bias"]})

    params = {"kernel": initial_weights()["w"], "bias": initial_weights()["b"]}
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    # `create` counts with a Python number, which would be traced anew as an array.
    state = state.replace(step=jnp.zeros([], jnp.int32))
    losses, weights = [], [read(state)]
    for x, y in batches():
        state, loss = step(state, x, y)
        losses.append(float(loss))
        weights.append(read(state))
    return Run(losses, weights, state.opt_state)


class EquinoxModel(eqx.Module):
    """A layer with leaves that are no parameters: a function, a number, nothing."""

    linear: eqx.nn.Linear
    activation: Any = staticmethod(lambda x: x)
    repeats: int = 1
    norm: Any = None

    def __call__(self, x):
        return self.activation(self.linear(x)) * self.repeats


def run_equinox(tx, *, with_value: bool) -> Run:
    @eqx.filter_jit
    @traced_once
    def step(model, opt_state, x, y):
        @eqx.filter_value_and_grad
        def loss_and_grads(model):
            return squared_error(jax.vmap(model)(x), y)

        loss, grads = loss_and_grads(model)
        extra = {"value": loss} if with_value else {}
        updates, opt_state = tx.update(
            grads, opt_state, eqx.filter(model, eqx.is_inexact_array), **extra
        )
        return eqx.apply_updates(model, updates), opt_state, loss

    def read(model):
        return copied({"w": model.linear.weight.T, "b": model.linear.bias})

    model = EquinoxModel(eqx.nn.Linear(4, 3, key=jax.random.key(0)))
    model = eqx.tree_at(
        lambda m: (m.linear.weight, m.linear.bias),
        model,
        (initial_weights()["w"].T, initial_weights()["b"]),
    )
    params = eqx.filter(model, eqx.is_inexact_array)
    assert any(x is None for x in jax.tree.leaves(params, is_leaf=lambda x: x is None))
    opt_state = tx.init(params)
    losses, weights = [], [read(model)]
    for x, y in batches():
        model, opt_state, loss = step(model, opt_state, x, y)
        losses.append(float(loss))
        weights.append(read(model))
    return Run(losses, weights, opt_state)


def run_haiku(tx, *, with_value: bool) -> Run:
    model = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(3)(x)))

    @jax.jit
    @traced_once
    def step(params, opt_state, x, y):
        loss, grads = jax.value_and_grad(
            lambda params: squared_error(model.apply(params, x), y)
        )(params)
        extra = {"value": loss} if with_value else {}
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, loss

    params = model.init(jax.random.key(0), jnp.ones((1, 4)))
    chex.assert_trees_all_equal_shapes(params, {"linear": initial_weights()})
    params: Any = {"linear": initial_weights()}
    opt_state = tx.init(params)
    losses, weights = [], [copied(params["linear"])]
    for x, y in batches():
        params, opt_state, loss = step(params, opt_state, x, y)
        losses.append(float(loss))
        weights.append(copied(params["linear"]))
    return Run(losses, weights, opt_state)


RUNS = {
    "plain": run_plain,
    "nnx": run_nnx,
    "linen": run_linen,
    "equinox": run_equinox,
    "haiku": run_haiku,
}
# But for plain JAX they are slow: by default each trains as that does, below.
every_framework = pytest.mark.parametrize(
    "run",
    [
        pytest.param(run, id=name, marks=[] if name == "plain" else pytest.mark.slow)
        for name, run in RUNS.items()
    ],
)


def naive_clipped_sgd(max_norm: float):
    """The weights and losses of SGD with step size 1 and a norm clip, in float64."""
    w, b = (np.asarray(initial_weights()[name], np.float64) for name in "wb")
    weights, losses = [{"w": w, "b": b}], []
    for x, y in batches():
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = x @ w + b - y
        losses.append(np.mean(np.sum(error**2, axis=1)))
        d_w, d_b = 2 * x.T @ error / len(x), 2 * error.sum(axis=0) / len(x)
        norm = np.sqrt(np.sum(d_w**2) + np.sum(d_b**2))
        assert norm > max_norm
        w, b = w - d_w * max_norm / norm, b - d_b * max_norm / norm
        weights.append({"w": w, "b": b})
    return weights, losses


@every_framework
def test_sgd_steps_have_the_length_of_the_limit(run):
    tx = optax.chain(optaxclip.clip_by_norm(MAX_NORM), optax.sgd(1.0))
    losses, weights, opt_state = run(tx, with_value=False)
    for before, after in itertools.pairwise(weights):
        step = jax.tree.map(operator.sub, after, before)
        length = np.sqrt(sum(np.sum(x**2) for x in step.values()))
        np.testing.assert_allclose(length, MAX_NORM, rtol=1e-5)
    expected_weights, expected_losses = naive_clipped_sgd(MAX_NORM)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    chex.assert_trees_all_close(weights, expected_weights, rtol=1e-4, atol=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    assert int(optax.tree.get(opt_state, "num_clipped")) == len(losses)


PLATEAU = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)


@pytest.mark.skipif(
    any(x.weak_type for x in jax.tree.leaves(PLATEAU.init(jnp.zeros(1)))),
    reason="the plateau of this Optax changes the type of its state in its first step",
)
@every_framework
def test_value_passes_by_the_clips_to_the_one_that_needs_it(run):
    tx = optax.chain(
        optaxclip.clip_by_norm(MAX_NORM),
        optaxclip.clip_by_value(MAX_NORM / 4),
        PLATEAU,
        optax.sgd(1.0),
    )
    losses, weights, opt_state = run(tx, with_value=True)
    best = optax.tree.get(opt_state, "best_value")
    np.testing.assert_allclose(best, min(losses), rtol=1e-6)
    assert losses[-1] < losses[0]
    step = jax.tree.map(operator.sub, weights[1], weights[0])
    largest = max(np.abs(x).max() for x in step.values())
    np.testing.assert_allclose(largest, MAX_NORM / 4, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(RUNS) - {"plain"}))
def test_every_framework_trains_as_plain_jax_does(name):
    tx = optax.chain(optaxclip.clip_by_norm(MAX_NORM, per="leaf"), optax.adam(0.3))
    expected = run_plain(tx, with_value=False)
    found = RUNS[name](tx, with_value=False)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    chex.assert_trees_all_close(found.weights, expected.weights, rtol=1e-5, atol=1e-6)
    assert expected.losses[-1] < expected.losses[0]


# The recipes of `help(optaxclip.trainers)` do so as well, and the loop of the README.
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_framework_skips_a_bad_batch(name, monkeypatch):
    bad = functools.partial(batches, bad=3)
    monkeypatch.setitem(globals(), "batches", bad)
    tx = optaxclip.stabilize(optax.adam(0.3))
    losses, weights, opt_state = RUNS[name](tx, with_value=True)
    assert np.flatnonzero(np.isnan(losses)).tolist() == [3]
    pairs = itertools.pairwise(weights)
    assert [(x["w"] != y["w"]).all() for x, y in pairs] == [True] * 3 + [False] + [
        True
    ] * 4
    chex.assert_trees_all_equal(weights[4], weights[3])
    chex.assert_tree_all_finite(weights)
    skipped = optaxclip.skipped_steps(opt_state)
    assert skipped == [{"step": 3, "rules": ["nonfinite"]}]


# --- Optax's wrappers


def grads_of(seed: int, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)
    shapes = {"a": {"kernel": (3, 4), "bias": (4,)}, "z": (5,)}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def naive_norm(tree) -> float:
    return np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(tree)))


def naive_clip(tree, max_norm: float):
    factor = min(1.0, max_norm / naive_norm(tree))
    return jax.tree.map(lambda x: np.asarray(x) * np.float32(factor), tree)


def test_masked_clips_by_the_norm_of_what_it_lets_through():
    grads = grads_of(0)
    mask = {"a": {"kernel": True, "bias": False}, "z": True}
    tx = optax.masked(optaxclip.clip_by_norm(0.5), mask)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    seen = naive_clip({"kernel": grads["a"]["kernel"], "z": grads["z"]}, 0.5)
    expected = {
        "a": {"kernel": seen["kernel"], "bias": grads["a"]["bias"]},
        "z": seen["z"],
    }
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    np.testing.assert_array_equal(updates["a"]["bias"], grads["a"]["bias"])


@pytest.mark.parametrize("partition", [optax.partition, optax.multi_transform])
def test_partition_clips_each_part_by_its_own_norm(partition):
    grads = grads_of(0)
    tx = partition(
        {
            "head": optaxclip.clip_by_norm(0.5, label="head"),
            "body": optaxclip.clip_by_norm(0.25, label="body"),
        },
        {"a": "body", "z": "head"},
    )
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    expected = {"a": naive_clip(grads["a"], 0.25), "z": naive_clip(grads["z"], 0.5)}
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    chex.assert_trees_all_equal_structs(tx.init(grads), state)


def test_a_clip_before_the_partition_sees_the_whole_tree():
    grads = grads_of(0)
    tx = optax.chain(
        optaxclip.clip_by_norm(0.5),
        optax.partition(
            {"head": optax.sgd(1.0), "body": optax.sgd(2.0)},
            {"a": "body", "z": "head"},
        ),
    )
    updates, _ = tx.update(grads, tx.init(grads))
    clipped = naive_clip(grads, 0.5)
    expected = {
        "a": jax.tree.map(lambda x: -2 * x, clipped["a"]),
        "z": -clipped["z"],
    }
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_multi_steps_clips_the_mean_gradient():
    tx = optax.MultiSteps(
        optax.chain(optaxclip.clip_by_norm(0.5), optax.sgd(1.0)), every_k_schedule=2
    )

    @jax.jit
    @traced_once
    def step(grads, state):
        return tx.update(grads, state)

    state = tx.init(grads_of(0))
    for i in range(4):
        updates, state = step(grads_of(i), state)
        mean = jax.tree.map(lambda x, y: (x + y) / 2, grads_of(i - i % 2), grads_of(i))
        expected = jax.tree.map(lambda x, i=i: -x * (i % 2), naive_clip(mean, 0.5))
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-7)
    assert int(optax.tree.get(state.inner_opt_state, "num_clipped")) == 2


def test_apply_if_finite_leaves_the_state_of_a_skipped_step():
    clip = optax.chain(optaxclip.clip_by_norm(0.5), optax.adam(0.1))
    tx = optax.apply_if_finite(clip, max_consecutive_errors=5)
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), grads_of(1))

    @jax.jit
    @traced_once
    def step(grads, state):
        return tx.update(grads, state)

    _, state = step(grads_of(0), tx.init(grads_of(0)))
    updates, skipped = step(bad, state)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, bad))
    chex.assert_trees_all_equal(skipped.inner_state, state.inner_state)
    updates, state = step(grads_of(2), skipped)
    reference = clip.init(grads_of(0))
    for seed in (0, 2):
        expected, reference = clip.update(grads_of(seed), reference)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    assert int(optax.tree.get(state, "num_nonfinite")) == 0


# --- inject_hyperparams


def injected(**kwargs) -> Any:
    factory = optax.inject_hyperparams(optaxclip.clip_by_norm, static_args=STATIC)
    return factory(**kwargs)


def injected_value_clip(**kwargs) -> Any:
    return optax.inject_hyperparams(optaxclip.clip_by_value)(**kwargs)


@pytest.mark.parametrize("per", ["tree", "leaf", "unit", lambda name: name[0]])
def test_an_injected_number_clips_as_the_number_itself(per):
    options: Any = {"per": per, "ord": 1, "label": "own", "stacked": lambda n: n == "z"}
    tx = injected(max_norm=0.5, **options)
    plain = optaxclip.clip_by_norm(0.5, **options)
    grads = grads_of(0)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
    expected, expected_state = jax.jit(plain.update)(grads, plain.init(grads))
    chex.assert_trees_all_equal(updates, expected)
    chex.assert_trees_all_equal(state.inner_state, expected_state)


@pytest.mark.parametrize("as_number", [float, jnp.bfloat16])
def test_an_injected_number_can_change_with_bfloat16_gradients(as_number):
    grads = grads_of(0, jnp.bfloat16)
    tx = injected(max_norm=2.0)
    state = tx.init(grads)
    assert state.hyperparams["max_norm"].dtype == jnp.bfloat16
    for limit in (2.0, 0.5, 100.0):
        state.hyperparams["max_norm"] = as_number(limit)
        updates, new_state = jax.jit(tx.update)(grads, state, grads)
        chex.assert_trees_all_equal_dtypes(updates, grads)
        norm = naive_norm(updates)
        assert norm <= min(limit, naive_norm(grads)) * (1 + 2**-8)
        np.testing.assert_allclose(norm, min(limit, naive_norm(grads)), rtol=2**-8)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            new_state.inner_state, state.inner_state
        )
        assert float(new_state.inner_state["clip"].limit) == limit
        state = new_state
    assert int(state.inner_state["clip"].num_clipped) == 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_injected_schedule_sets_the_limit_and_is_traced_once(dtype):
    tx = injected(max_norm=optax.linear_schedule(1.0, 0.25, 3))

    @jax.jit
    @traced_once
    def step(grads, state):
        return tx.update(grads, state, grads)

    state = tx.init(grads_of(0, dtype))
    for i, limit in enumerate((1.0, 0.75, 0.5, 0.25, 0.25)):
        updates, state = step(grads_of(i, dtype), state)
        rtol = 1e-6 if dtype == jnp.float32 else 2**-8
        np.testing.assert_allclose(
            float(state.hyperparams["max_norm"]), limit, rtol=rtol
        )
        np.testing.assert_allclose(
            float(state.inner_state["clip"].limit), limit, rtol=rtol
        )
        np.testing.assert_allclose(naive_norm(updates), limit, rtol=rtol)


@pytest.mark.parametrize("per", ["tree", "unit"])
def test_a_bad_injected_number_gives_zeros(per):
    grads = grads_of(0)
    zeros = jax.tree.map(jnp.zeros_like, grads)
    tx = injected(max_norm=-1.0, per=per)
    state, update = tx.init(grads), jax.jit(tx.update)
    chex.assert_trees_all_equal(update(grads, state, grads)[0], zeros)
    for bad in (np.nan, -np.inf):
        state.hyperparams["max_norm"] = jnp.float32(bad)
        chex.assert_trees_all_equal(update(grads, state, grads)[0], zeros)
    state.hyperparams["max_norm"] = jnp.float32(np.inf)
    chex.assert_trees_all_equal(update(grads, state, grads)[0], grads)


def test_an_injected_number_clips_values():
    grads = grads_of(0)
    cases: Any = (({}, -0.5), ({"min_value": -0.125}, -0.125))
    for numbers, low in cases:
        tx = injected_value_clip(max_value=0.5, **numbers)
        state = tx.init(grads)
        updates, state = jax.jit(tx.update)(grads, state, grads)
        expected = jax.tree.map(lambda x, low=low: np.clip(x, low, 0.5), grads)
        chex.assert_trees_all_equal(updates, expected)
        state.hyperparams["max_value"] = 0.25
        updates, state = jax.jit(tx.update)(grads, state, grads)
        assert max(float(x.max()) for x in jax.tree.leaves(updates)) == 0.25


def test_an_injected_schedule_clips_values_of_bfloat16():
    tx = injected_value_clip(max_value=optax.linear_schedule(1.0, 0.5, 2))
    grads = grads_of(0, jnp.bfloat16)

    @jax.jit
    @traced_once
    def step(grads, state):
        return tx.update(grads, state, grads)

    state = tx.init(grads)
    for bound in (1.0, 0.75, 0.5):
        updates, state = step(grads, state)
        expected = jax.tree.map(lambda x, b=bound: jnp.clip(x, -b, b), grads)
        chex.assert_trees_all_equal(updates, expected)


# --- Checkpoints


def stacked_params() -> Any:
    """A tree with scanned layers; also the gradient of step `seed`, below."""
    return {
        "layers": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))},
        "head": jnp.ones((4, 2)),
        "scale": jnp.ones([]),
    }


def stacked_grads(step: int):
    rng = np.random.default_rng(step)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 3, x.dtype), stacked_params()
    )


def is_stacked(name: str) -> bool:
    return name.startswith("layers/")


SCOPES: dict[str, Any] = {
    "tree": {},
    "stacked leaf": {"per": "leaf", "stacked": is_stacked},
    "unit": {"per": "unit"},
    "stacked unit": {"per": "unit", "stacked": is_stacked},
    "group": {"per": lambda name: name.split("/")[0], "stacked": is_stacked},
}


def through_state_dict(state, template, directory):
    del directory
    state_dict = flax.serialization.to_state_dict(state)
    return flax.serialization.from_state_dict(template, state_dict)


def through_bytes(state, template, directory):
    path = directory / "checkpoint.msgpack"
    path.write_bytes(flax.serialization.to_bytes(state))
    return flax.serialization.from_bytes(template, path.read_bytes())


def through_orbax(state, template, directory):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "checkpoint", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(directory / "checkpoint", template)


def through_orbax_by_shapes(state, template, directory):
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    return through_orbax(state, shapes, directory)


@functools.cache
def interrupted_run(scope: str) -> Any:
    """What trains on, the untrained start, and a run after three steps and six."""
    options = SCOPES[scope]
    mask = {"layers": {"kernel": True, "bias": True}, "head": False, "scale": True}
    masked = optaxclip.clip_by_norm(1.0, label="masked", **SCOPES["stacked leaf"])
    tx = optax.chain(
        optaxclip.clip_by_norm(optax.linear_schedule(4.0, 1.0, 5), **options),
        optax.masked(masked, mask),
        optax.trace(0.9),
    )

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def train(run, steps):
        for i in steps:
            run = step(*run, stacked_grads(i))
        return run

    start = stacked_params(), tx.init(stacked_params())
    saved = train(start, range(3))
    return train, start, saved, train(saved, range(3, 6))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scope", "round_trip"),
    [
        ("stacked leaf", through_bytes),
        ("unit", through_orbax),
        ("stacked unit", through_state_dict),
        *(
            pytest.param(scope, round_trip, marks=pytest.mark.slow)
            for scope in ("tree", "group")
            for round_trip in (through_bytes, through_orbax)
        ),
        ("stacked leaf", through_orbax_by_shapes),
    ],
)
def test_a_restored_run_goes_on_as_if_it_never_stopped(scope, round_trip, tmp_path):
    train, start, saved, expected = interrupted_run(scope)
    restored = round_trip(saved, start, tmp_path)
    chex.assert_trees_all_equal(restored, saved)
    chex.assert_trees_all_equal_dtypes(restored, saved)
    found = train(restored, range(3, 6))
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal_dtypes(found, expected)
    _, state = expected
    assert max(map(np.max, jax.tree.leaves(state[0]["clip"].num_clipped))) > 0


LEARNED = {
    "zclip": optaxclip.zclip(1.0, per="leaf"),
    "autoclip": optaxclip.autoclip(window=64),
    "adagc": optaxclip.adagc(),
    "agc": optaxclip.agc(stacked=lambda name: name.startswith("layers")),
    "window_sigma": optaxclip.clip_by_norm(optaxclip.limits.window_sigma(2.0)),
    "quantile": optaxclip.clip_by_norm(optaxclip.limits.quantile()),
}


def long_run() -> Any:
    """One run for each learned limit: what trains on, the start, after 100 steps."""
    sizes = np.random.default_rng(0).lognormal(size=200).astype(np.float32)

    @jax.jit
    def train(runs, sizes):
        def step(runs, size):
            new = {}
            for name, (params, state) in runs.items():
                grads = jax.tree.map(lambda x: size * (1 + x), params)
                updates, state = LEARNED[name].update(grads, state, params)
                updates = jax.tree.map(lambda x: -1e-4 * x, updates)
                new[name] = optax.apply_updates(params, updates), state
            return new, None

        return jax.lax.scan(step, runs, sizes)[0]

    start = {
        n: (stacked_params(), clip.init(stacked_params()))
        for n, clip in LEARNED.items()
    }
    return functools.partial(train, sizes=sizes[100:]), start, train(start, sizes[:100])


@pytest.mark.slow
def test_learned_limits_go_on_from_a_checkpoint_at_step_100(tmp_path):
    go_on, start, saved = long_run()
    found = go_on(through_orbax(saved, start, tmp_path))
    chex.assert_trees_all_equal(found, go_on(saved))

    # All have clipped since, for which those that learn needed what they had learned.
    def forget(name):
        params, state = saved[name]
        fresh = start[name][1]["clip"].limit_state
        return params, {"clip": state["clip"]._replace(limit_state=fresh)}

    others = go_on({name: forget(name) for name in saved})
    for name in LEARNED:
        totals = [
            sum(map(np.sum, jax.tree.leaves(runs[name][1]["clip"].num_clipped)))
            for runs in (saved, found)
        ]
        assert totals[0] < totals[1], name
        same = jax.tree.map(np.array_equal, others[name][0], found[name][0])
        assert all(jax.tree.leaves(same)) == (name == "agc"), name


@pytest.mark.parametrize("round_trip", [through_bytes, through_orbax])
def test_metrics_reads_a_restored_state(round_trip, tmp_path):
    _, start, saved, _ = interrupted_run("tree")
    params, state = saved
    _, restored = round_trip(saved, start, tmp_path)
    expected = optaxclip.metrics(state, params)
    assert "masked/norm/layers/bias[1]" in expected
    chex.assert_trees_all_equal(optaxclip.metrics(restored, params), expected)


# --- Reading the state, and the transformations of JAX


def test_optax_finds_the_fields_of_the_state_by_name():
    grads = grads_of(0)
    tx = optax.chain(optaxclip.clip_by_norm(0.5), optax.adam(0.1))
    _, state = tx.update(grads, tx.init(grads), grads)
    np.testing.assert_allclose(
        optax.tree.get(state, "norm"), naive_norm(grads), rtol=1e-6
    )
    assert float(optax.tree.get(state, "limit")) == 0.5
    assert int(optax.tree.get(state, "num_clipped")) == 1
    assert int(optax.tree.get(state, "num_nonfinite")) == 0
    assert isinstance(optax.tree.get(state, "clip"), optaxclip.ClipByNormState)
    assert isinstance(optax.tree.get(state, "count"), jax.Array), "that of adam alone"


def test_optax_tells_two_clips_apart_by_their_labels():
    grads = grads_of(0)
    tx = optax.chain(
        optaxclip.clip_by_norm(0.5, label="first"),
        optaxclip.clip_by_norm(0.25, label="second"),
    )
    _, state = tx.update(grads, tx.init(grads))
    for label, limit in (("first", 0.5), ("second", 0.25)):
        assert float(optax.tree.get(state, label).limit) == limit
    with pytest.raises(KeyError, match="norm"):
        optax.tree.get(state, "norm")


@pytest.mark.parametrize("scope", ["tree", "stacked leaf"])
def test_a_scan_carries_the_state(scope):
    tx = optax.chain(optaxclip.clip_by_norm(1.0, **SCOPES[scope]), optax.sgd(0.1))
    steps = [stacked_grads(i) for i in range(3)]

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, optaxclip.metrics(state)["clip/norm"]

    expected = start = stacked_params(), tx.init(stacked_params())
    carry, norms = jax.lax.scan(
        step, start, jax.tree.map(lambda *x: jnp.stack(x), *steps)
    )
    for i, grads in enumerate(steps):
        expected, norm = jax.jit(step)(expected, grads)
        np.testing.assert_allclose(norms[i], norm, rtol=1e-6)
    chex.assert_trees_all_close(carry, expected, rtol=1e-5)


@pytest.mark.parametrize("scope", ["tree", "stacked unit"])
def test_a_cond_chooses_between_a_step_and_none(scope):
    tx = optaxclip.clip_by_norm(1.0, **SCOPES[scope])
    grads, state = stacked_grads(0), tx.init(stacked_params())

    @jax.jit
    def maybe_step(is_on, state):
        return jax.lax.cond(
            is_on, lambda s: tx.update(grads, s), lambda s: (grads, s), state
        )

    chex.assert_trees_all_equal(maybe_step(False, state), (grads, state))
    expected = jax.jit(tx.update)(grads, state)
    chex.assert_trees_all_close(maybe_step(True, state), expected, rtol=1e-6)


@pytest.mark.parametrize("scope", ["tree", "stacked leaf", "unit"])
def test_the_state_can_be_donated(scope):
    tx = optax.chain(
        optaxclip.clip_by_norm(optax.constant_schedule(1.0), **SCOPES[scope]),
        optaxclip.clip_by_norm(1.0, label="again", **SCOPES[scope]),
        optax.trace(0.9),
    )

    # jit donates no argument that it does not read, unless told to keep it.
    @functools.partial(jax.jit, donate_argnums=(0, 1), keep_unused=True)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = stacked_params(), tx.init(stacked_params())
    for i in range(3):
        given = state
        params, state = step(params, state, stacked_grads(i))
        assert all(x.is_deleted() for x in jax.tree.leaves(given))
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))
