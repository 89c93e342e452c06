"""In anybody's training code: what stands around, inside and behind `stabilize`."""

import functools
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

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.full(3, 2.0, jnp.float32)}


def like(size, params: Any = PARAMS, dtype=None) -> Any:
    return jax.tree.map(lambda x: jnp.full_like(x, size, dtype), params)


@functools.cache
def update_of(tx) -> Any:
    def update(grads, state, params, value):
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return jax.jit(update)


def train(tx, sizes, params: Any = PARAMS, state: Any = None, dtype=None) -> Any:
    """(parameters, state) after gradients of these elements, which are the losses."""
    state = tx.init(params) if state is None else state
    for size in sizes:
        grads = like(size, params, dtype)
        params, state = update_of(tx)(grads, state, params, jnp.float32(size))
    return params, state


def stabilize(inner, **arguments) -> Any:
    """With a fixed limit on the loss, so that three explosions are a rollback."""
    usual: dict = {"norm": None, "share": None, "loss": 10.0, "rollback": True}
    return optaxclip.skip_explosions(inner, **usual | arguments)


FINE, BAD = [1.0], [1e3] * 3
"""A healthy step; what makes a rollback, which two healthy ones then confirm."""


def rollbacks(state, label="explosions") -> int:
    return int(optaxclip.metrics(state)[f"{label}/num_rollbacks"])


# The types of parameters, gradients and state.


@pytest.mark.parametrize(
    "dtypes",
    [
        ("bfloat16", "float32"),
        pytest.param(("float32", "bfloat16"), marks=pytest.mark.slow),
    ],
)
def test_gradients_of_another_type_than_the_parameters(dtypes):
    """The moments widen in the first step, as those of `adam` alone; then no more."""
    dtype, gradients = map(jnp.dtype, dtypes)
    params = like(1.0, dtype=dtype)
    bare = optax.with_extra_args_support(optax.adam(0.1))
    tx = stabilize(bare)
    found, state = train(tx, FINE * 4, params, dtype=gradients)
    expected, inner = train(bare, FINE * 4, params, dtype=gradients)
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal(state["explosions"].inner_state, inner)
    again, later = train(tx, [*BAD, *FINE * 2], found, state, gradients)
    assert rollbacks(later) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(later, state)
    chex.assert_trees_all_equal(again, params)
    chex.assert_trees_all_equal(later["explosions"].inner_state, inner)
    num_compiled = update_of(tx)._cache_size()
    assert num_compiled == update_of(bare)._cache_size()


@pytest.mark.slow
def test_snapshots_widen_with_the_parameters():
    """After `init` on bfloat16 a rollback still gives back float32 parameters."""
    tx = stabilize(optax.sgd(0.1))
    params = jax.tree.map(lambda x: x + jnp.float32(1 / 3), PARAMS)
    state = tx.init(like(0, dtype=jnp.bfloat16))
    later, state = train(tx, FINE * 3, params, state)
    after, state = train(tx, [*BAD, *FINE * 2], later, state)
    assert rollbacks(state) == 1
    chex.assert_trees_all_close(after, params, rtol=2e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wide"),
    [
        ("clip", "gradients"),
        ("record", "loss"),
        ("stabilize", "parameters"),
        ("stabilize", "gradients"),
        ("stabilize", "all"),
    ],
)
def test_wide_beside_narrow_under_strict_promotion(strict, x64, name, wide):
    """Also through a rollback; the dtypes are those that a user chose."""

    def dtype(what):
        return jnp.float64 if wide in (what, "all") else jnp.bfloat16

    params: Any = {"w": jnp.ones(3, dtype("parameters"))}
    updates: Any = None
    tx: Any = {
        "clip": lambda: optaxclip.clip_by_norm(optaxclip.limits.zscore(2.0)),
        "record": optaxclip.record,
        "stabilize": lambda: stabilize(optax.identity()),
    }[name]()
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    for size in FINE + BAD + FINE + FINE:
        grads = {"w": jnp.full(3, size, dtype("gradients"))}
        loss = jnp.asarray(size, dtype("loss"))
        updates, state = tx.update(grads, state, params, value=loss)
        # As `optax.apply_updates`, which adds narrow to wide and so is not strict.
        update = updates["w"].astype(dtype("parameters"))
        params = {"w": params["w"] + update}
    assert updates["w"].dtype == dtype("gradients")
    chex.assert_tree_all_finite(params)
    if name == "stabilize":
        assert rollbacks(state) == 1
    if name != "clip":
        optaxclip.history(state, params)
        optaxclip.explain(state, params)
    optaxclip.metrics(state, params)


@pytest.mark.slow
def test_parameters_widened_after_init():
    params = like(1 / 3)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx = stabilize(optax.adam(0.1))
    before, state = train(tx, FINE * 4, params, tx.init(narrow))
    after, state = train(tx, [*BAD, *FINE * 2], before, state)
    assert rollbacks(state) == 1
    chex.assert_trees_all_close(after, params, rtol=2e-7)


@pytest.mark.slow
def test_a_scan_that_carries_wider_parameters_than_it_needs():
    """The type of a state that is wide enough does not change."""
    params = like(1.0, dtype=jnp.bfloat16)
    tx = stabilize(optax.adam(0.1))

    def step(carry, size):
        params, state = carry
        grads = like(1.0, params, jnp.float32)
        updates, state = tx.update(grads, state, params, value=size)
        return (optax.apply_updates(params, updates), state), ()

    carry = params, tx.init(like(0.0))
    sizes = jnp.array([*FINE * 3, *BAD, *FINE * 2])
    (_, state), _ = jax.jit(lambda c: lax.scan(step, c, sizes))(carry)
    assert rollbacks(state) == 1


# What is found in the state by its name.


def test_names_find_the_present_and_no_snapshot():
    inner = optax.inject_hyperparams(optax.adam)(0.1)
    tx = optax.chain(stabilize(inner), optax.contrib.reduce_on_plateau())
    bare = optax.chain(inner, optax.contrib.reduce_on_plateau())
    state, expected = (x.init(PARAMS) for x in (tx, bare))
    for name in ("mu", "nu", "learning_rate", "b1", "scale", "best_value"):
        chex.assert_trees_all_equal(
            optax.tree.get(state, name), optax.tree.get(expected, name)
        )
    state: Any = stabilize(optax.lbfgs()).init(PARAMS)
    for name in ("value", "grad", "count"):
        optax.tree.get(state, name)
    state = stabilize(optax.adam(0.1)).init(PARAMS)
    assert optax.tree.get(state, "count") == 0
    assert isinstance(optax.tree.get(state, "ScaleByAdamState").mu, dict)


@pytest.mark.slow
def test_lbfgs_reads_its_value_and_gradient_from_the_state():
    tx = stabilize(optax.lbfgs())

    def loss_of(params):
        return sum(jnp.sum((x - 0.5) ** 2) for x in jax.tree.leaves(params))

    @jax.jit
    def step(params, state):
        value, grad = optax.value_and_grad_from_state(loss_of)(params, state=state)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=loss_of
        )
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state = step(params, state)
    assert loss_of(params) < 1e-6


@pytest.mark.parametrize("masks", [False, True])
def test_specs_of_the_parameters_are_those_of_the_snapshots(masks):
    inner = optax.adam(0.1)
    if masks:
        inner = optax.masked(inner, {"w": True, "b": False})
    tx = stabilize(inner)
    state: Any = optax.tree_map_params(
        tx,
        lambda _, spec: spec,
        tx.init(PARAMS),
        {"w": "spec of w", "b": "spec of b"},
        transform_non_params=lambda _: "none",
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    found = jax.tree.leaves(state["explosions"].snapshots.older)
    assert found == ["spec of b", "spec of w"]


@pytest.mark.parametrize("bad", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_hyperparameter_set_inside_jit_may_be_a_python_number(bad):
    tx = stabilize(optax.inject_hyperparams(optax.sgd)(0.1))
    grads = {
        name: jnp.full_like(x, jnp.nan if bad else 1) for name, x in PARAMS.items()
    }

    @jax.jit
    def step(state):
        state["explosions"].inner_state.hyperparams["learning_rate"] = 0.01
        return tx.update(grads, state, PARAMS, value=jnp.array(1.0))

    state = tx.init(PARAMS)
    updates, found = step(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, state)
    rate = found["explosions"].inner_state.hyperparams["learning_rate"]
    assert rate == jnp.float32(0.01)
    assert not rate.weak_type
    for x in jax.tree.leaves(updates):
        np.testing.assert_array_equal(x, jnp.float32(0 if bad else -0.01))


# What a rollback takes back.


def test_a_rollback_leaves_what_the_user_and_the_clock_decided():
    schedule = optax.linear_schedule(1.0, 0.5, 100)
    inner = optax.chain(
        optax.add_noise(0.0, 0.0, jax.random.key(0)),
        optax.inject_hyperparams(optax.adam)(0.1, b1=schedule),
        optax.scale_by_schedule(schedule),
        optaxclip.clip_by_norm(schedule),
        optaxclip.record(window=4),
    )
    tx = stabilize(inner)
    params, state = train(tx, FINE * 4)
    hyperparams = state["explosions"].inner_state[1].hyperparams
    hyperparams["learning_rate"] = jnp.float32(0.01)
    params, state = train(tx, FINE, params, state)
    before = state["explosions"].inner_state
    _, state = train(tx, [*BAD, *FINE * 2], params, state)
    assert rollbacks(state) == 1
    noise, injected, scheduled, clip, record = state["explosions"].inner_state
    assert injected.hyperparams["learning_rate"] == jnp.float32(0.01)
    assert injected.count == injected.hyperparams_states["b1"].count == 5
    assert scheduled.count == clip["clip"].limit_state.num_steps == 5
    assert clip["clip"].num_steps == record["gradients"].num_steps == 5
    assert noise.rng_key == before[0].rng_key
    # And what the optimizer has learned: nothing of a skipped step is in it.
    assert injected.inner_state[0].count == 5
    assert np.all(injected.inner_state[0].mu["w"] > 0)


@pytest.mark.slow
def test_a_run_that_was_saved_without_it_goes_on_from_its_moments():
    """Put into `inner_state` before the first step; the first snapshot is made then."""
    bare = optax.adam(0.1)
    params, saved = train(optax.with_extra_args_support(bare), FINE * 5)
    tx = stabilize(bare)
    state = tx.init(PARAMS)
    state["explosions"] = state["explosions"]._replace(inner_state=saved)
    later, state = train(tx, FINE * 3, params, state)
    inner = state["explosions"].inner_state
    assert inner[0].count == 8
    after, state = train(tx, [*BAD, *FINE * 2], later, state)
    assert rollbacks(state) == 1
    chex.assert_trees_all_equal(state["explosions"].inner_state, inner)
    chex.assert_trees_all_close(after, params, rtol=2e-7)


# What stands behind a rollback, and from where it returns.


@pytest.mark.slow
def test_a_rollback_that_something_undoes_is_told():
    tx = optax.chain(stabilize(optax.identity()), optax.scale(-0.01))
    _, state = train(tx, [*FINE * 3, *BAD, *FINE * 2])
    assert rollbacks(state) == 0
    assert optaxclip.metrics(state)["explosions/num_blocked_rollbacks"] == 1
    assert "1 time they did not go back where they should" in optaxclip.explain(state)


@pytest.mark.slow
def test_a_rollback_inside_of_schedule_free_is_told():
    tx = optax.contrib.schedule_free(stabilize(optax.sgd(0.1)), 0.1)
    _, state = train(tx, [*FINE * 3, *BAD, *FINE * 2])
    assert rollbacks(state) == 0
    assert optaxclip.metrics(state)["explosions/num_blocked_rollbacks"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "factor"), [("bfloat16", 100), ("float32", 1e8)])
def test_a_rollback_from_parameters_that_have_grown_far(dtype, factor):
    """The first update misses by a rounding of theirs, so the second trial decides."""
    start = {"w": jnp.linspace(-1, 1, 6, dtype=dtype), "b": jnp.ones(3, dtype)}
    tx = stabilize(optax.sgd(0.0))
    _, state = train(tx, FINE * 2, start)
    params = jax.tree.map(lambda x: (factor * x).astype(dtype), start)
    for _ in range(5):
        is_near = np.allclose(params["w"], start["w"], rtol=0.1)
        params, state = train(tx, FINE if is_near else BAD[:1], params, state)
    assert rollbacks(state) == 1
    chex.assert_trees_all_close(params, start, rtol=float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize(
    "rollback", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_parameters_that_are_nan_from_outside_are_told_at_once(rollback):
    tx = optaxclip.skip_explosions(optax.sgd(0.1), rollback=rollback, loss=10.0)
    params, state = train(tx, FINE * 2)
    params["w"] = params["w"].at[0, 0].set(jnp.nan)
    params, state = train(tx, [jnp.nan], params, state)
    with pytest.raises(optaxclip.ExplosionError, match="parameters hold NaN"):
        optaxclip.raise_if_exploded(state, params)
    assert optaxclip.metrics(state)["explosions/gave_up"] == rollback


@pytest.mark.slow
@pytest.mark.parametrize("rollback", [True, False])
def test_inf_that_the_optimizer_makes_out_of_finite_gradients_is_mended(rollback):
    """In float16 the square of 300 is inf, in the second moment for ever."""
    params = like(1.0, dtype=jnp.float16)
    tx = stabilize(optax.adam(0.1), rollback=rollback, snapshot_every=5)
    params, state = train(tx, FINE * 3, params)
    huge = like(300.0, params)
    params, state = update_of(tx)(huge, state, params, jnp.float32(1))
    assert not np.all(np.isfinite(optax.tree.get(state, "nu")["w"]))
    params, state = train(tx, FINE * 3, params, state)  # here a snapshot is due
    chex.assert_tree_all_finite(optax.tree.get(state, "nu"))
    metrics = optaxclip.metrics(state)
    for name in ("num_mended", "num_exploded", "num_skipped"):
        assert metrics[f"explosions/{name}"] == 1
    chex.assert_tree_all_finite(jax.tree.leaves(state["explosions"].snapshots))
    after, state = train(tx, FINE * 12, params, state)
    assert np.all(after["w"] < params["w"])
    assert optaxclip.metrics(state)["explosions/num_mended"] == 1
    told = "1 time the optimizer had made inf or NaN out of finite gradients"
    assert told in optaxclip.explain(state)
    optaxclip.raise_if_exploded(state, params)


@pytest.mark.slow
def test_what_alone_is_non_finite_in_the_updates_is_told_by_a_detector_inside():
    """Its elements become 0. The state stays finite, so nothing else shows it."""
    root = optax.stateless(lambda updates, _: jax.tree.map(jnp.sqrt, updates))
    detector = optaxclip.detect_explosions(label="updates")
    tx = stabilize(optax.chain(root, detector, optax.sgd(0.1)))
    params = like(1.0)
    state = tx.init(params)
    for size in (4.0, -4.0, 4.0):
        params, state = update_of(tx)(like(size, params), state, params, jnp.float32(1))
    np.testing.assert_allclose(params["w"], 0.6, rtol=1e-6)
    metrics = optaxclip.metrics(state)
    assert metrics["explosions/num_exploded"] == 0
    assert metrics["updates/num_exploded/nonfinite"] == 1
    with pytest.raises(optaxclip.ExplosionError, match="updates: step 1 was non-fin"):
        optaxclip.raise_if_exploded(state, params)


@pytest.mark.parametrize("params", [[1.0, [2.0]], (1.0,), 1.0, {}], ids=str)
def test_parameters_may_be_any_tree(params):
    params = jax.tree.map(jnp.asarray, params)
    tx = optaxclip.stabilize(optax.adam(0.1))
    state = jax.eval_shape(tx.init, params)
    _, new = jax.eval_shape(update_of(tx), params, state, params, jnp.float32(1))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


# Accumulation.


def test_accumulation_around_it_is_told_at_once():
    tx = optax.MultiSteps(stabilize(optax.sgd(0.1)), 4).gradient_transformation()
    tx = optax.with_extra_args_support(tx)
    _, state = train(tx, FINE)
    optaxclip.raise_if_exploded(state, PARAMS)
    _, state = train(tx, [jnp.nan], PARAMS, state)
    with pytest.raises(optaxclip.ExplosionError) as error:
        optaxclip.raise_if_exploded(state, PARAMS)
    assert "around optax.MultiSteps" in str(error.value)
    assert "should_skip_update_fn=optax.skip_not_finite" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["stabilize around", "skip_not_finite"])
def test_of_accumulation_one_micro_batch_is_lost(order):
    sgd = optax.sgd(0.1)
    if order == "stabilize around":
        tx = stabilize(optax.MultiSteps(sgd, 4).gradient_transformation())
    else:
        skip = optax.skip_not_finite
        many = optax.MultiSteps(stabilize(sgd), 4, should_skip_update_fn=skip)
        tx = optax.with_extra_args_support(many.gradient_transformation())
    params, state = train(tx, [1.0, jnp.nan, 2.0, 3.0])
    chex.assert_trees_all_equal(params, PARAMS)
    params, state = train(tx, [4.0], params, state)
    expected = jax.tree.map(lambda x: x - 0.25, PARAMS)
    chex.assert_trees_all_close(params, expected, rtol=1e-6)
    optaxclip.raise_if_exploded(state, params)


@pytest.mark.skipif(not hasattr(optax, "microbatch"), reason="Optax has it not yet")
def test_of_microbatching_the_whole_step_is_lost():
    def loss_fn(params, batch):
        return jnp.mean(batch) * jnp.sum(params["w"])

    function = jax.value_and_grad(loss_fn)
    mean = optax.microbatching.AccumulationType.MEAN
    summed = optax.microbatch(function, 1, microbatch_size=2, accumulator=mean)
    tx = stabilize(optax.sgd(0.1))

    @jax.jit
    def step(params, state, batch):
        loss, grads = summed(params, batch)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    batch = jnp.ones(8)
    params, state = step(params, state, batch)
    np.testing.assert_allclose(params["w"], 0.9, rtol=1e-6)
    kept, state = step(params, state, batch.at[5].set(jnp.nan))
    chex.assert_trees_all_equal(kept, params)
    params, state = step(kept, state, batch)
    np.testing.assert_allclose(params["w"], 0.8, rtol=1e-6)


# Derivatives.


@pytest.mark.slow
def test_derivatives_through_a_rollback():
    """With respect to the initial parameters."""
    tx = stabilize(optax.sgd(0.25, 0.5))

    def end(size):
        def step(carry, loss):
            params, state = carry
            grads = params - 0.5
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), ()

        params: Any = size * jnp.ones(3)
        losses = jnp.array([1.0, 1.0, *BAD, *FINE * 3])
        (params, _), _ = lax.scan(step, (params, tx.init(params)), losses)
        return params[0]

    # One step from the snapshot, which is where it began, with the moment of two more.
    moment = 0.5 * (0.5 + 0.75) + 1
    expected = 1 - 0.25 * moment
    np.testing.assert_allclose(jax.jit(jax.grad(end))(1.0), expected, rtol=1e-6)
