"""The laws of every public transformation, over a registry that grows with them."""

import functools
from collections.abc import Iterable
from typing import Any

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import optaxclip
import reference
from optaxclip.numerics import is_gradient
from registry import REGISTRY

pytestmark = pytest.mark.usefixtures("quick_by_default")


# Slow in some laws, beside the rows that are slow in all. Of what learns in a law of a
# few programs, a recorder stands for all; "stabilize" is scanned, stacked, donated and
# wrapped by tests of its own.
SLOW_TO_DONATE = {"adagc", "stable_adam", "clip_by_value schedule", "stabilize"}
SLOW_TO_COMPOSE = SLOW_TO_SCAN = SLOW_TO_DONATE
SLOW_WITHOUT_JIT = {"stabilize", "adagc", "stable_adam"}


def names(also_slow: Iterable[str] = (), among: Iterable[str] = REGISTRY) -> list[Any]:
    slow = {name for name in among if REGISTRY[name].slow} | set(also_slow)
    marks = {name: [pytest.mark.slow] if name in slow else [] for name in among}
    return [pytest.param(name, marks=marks[name]) for name in among]


@pytest.fixture(params=names())
def name(request):
    return request.param


@pytest.fixture
def transformation(name):
    return REGISTRY[name].make()


@functools.cache
def compiled(name: str) -> Any:
    """The update under `jit`, compiled once for all laws that use it."""
    return jax.jit(REGISTRY[name].make().update)


@pytest.fixture(autouse=True)
def _strict(strict):
    pass


def updates_at(step, dtype=jnp.float32):
    """Updates with every kind of leaf; on some steps too large, or not finite."""
    scale = jnp.asarray([0.1, 3.0, 1e30, jnp.nan, 0.0, 1e-30, jnp.inf])[step % 7]
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return (jnp.asarray(rng.standard_normal(shape), jnp.float32) * scale).astype(
            dtype
        )

    return {
        "w": leaf(2, 3),
        "b": leaf(3),
        "n": {"scalar": leaf(), "half": leaf(2, 2, 2).astype(jnp.bfloat16)},
        "int": jnp.arange(3),
        "none": None,
        "empty": jnp.zeros((0, 2)),
    }


def assert_same_type(a, b):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    chex.assert_trees_all_equal_structs(a, b)
    weak = [[x.weak_type for x in jax.tree.leaves(tree)] for tree in (a, b)]
    assert weak[0] == weak[1]


def assert_close_states(found, expected):
    # Some states hold differences of logarithms, each rounded to 1.2e-7.
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=3e-7)


def run(transformation: Any, num_steps=7, update=None):
    update = update or transformation.update
    state = transformation.init(updates_at(0))
    outputs = []
    for step in range(num_steps):
        updates, state = update(updates_at(step), state, updates_at(0))
        outputs.append(updates)
    return outputs, state


# Without jit the first step of "stabilize" compiles a thousand small operations.
@pytest.mark.parametrize("name", names(SLOW_WITHOUT_JIT))
def test_updates_and_state_keep_their_types(transformation):
    state = transformation.init(updates_at(0))
    for update in (transformation.update, jax.jit(transformation.update)):
        for step in range(2):
            updates, new_state = update(updates_at(step), state, updates_at(0))
            assert_same_type(updates_at(step), updates)
            assert_same_type(state, new_state)
            state = new_state


def test_state_holds_arrays_under_its_label(name, transformation):
    state = transformation.init(updates_at(0))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    label = REGISTRY[name].label
    if label is not None:
        assert list(state) == [label]
        assert hasattr(state[label], "_fields")
    if REGISTRY[name].is_stateless:
        assert not jax.tree.leaves(state)


@pytest.mark.parametrize("name", names(SLOW_WITHOUT_JIT))
def test_jit_equals_eager_and_traces_once(transformation):
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(transformation.update, n=1))
    found, found_state = run(transformation, update=update)
    expected, expected_state = run(transformation)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    assert_close_states(found_state, expected_state)


@pytest.mark.parametrize(
    "name", names(among=[name for name in REGISTRY if REGISTRY[name].reference])
)
def test_equals_the_naive_reference(name, transformation):
    params, state = updates_at(0), transformation.init(updates_at(0))
    naive = REGISTRY[name].reference
    assert naive is not None
    for step in range(7):
        updates = updates_at(step)
        found, state = compiled(name)(updates, state, params)
        leaves, found = (
            [x for x in jax.tree.leaves(tree) if is_gradient(x)]
            for tree in (updates, found)
        )
        for x, expected in zip(found, naive(leaves), strict=True):
            rtol = 2**-8 if x.dtype == jnp.bfloat16 else 1e-6
            np.testing.assert_allclose(
                reference.wide(x), reference.wide(expected), rtol=rtol
            )


def test_init_takes_shapes_for_parameters():
    params = updates_at(0)
    shapes = jax.eval_shape(lambda: params)
    for name, row in REGISTRY.items():
        init = row.make().init
        expected = jax.eval_shape(init, params)
        assert_same_type(jax.eval_shape(init, shapes), expected)
        if not row.slow:  # also outside of any tracing, where arrays are made
            found = init(shapes)
            assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(found)), name
            assert_same_type(found, expected)


@pytest.mark.parametrize("wrapper", ["none", "masked", "partition"])
def test_optax_maps_over_the_parameters_in_the_state(wrapper):
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    specs = {"w": PartitionSpec("x"), "b": PartitionSpec()}
    labels = {"w": "clipped", "b": "plain"}
    wrap: Any = {
        "none": lambda tx: tx,
        "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
        "partition": lambda tx: optax.partition(
            {"clipped": tx, "plain": optax.sgd(1.0)}, labels
        ),
    }[wrapper]
    for name, row in REGISTRY.items():
        tx = wrap(optax.chain(row.make(), optax.trace(0.9)))
        state = jax.eval_shape(tx.init, params)
        found = optax.tree_map_params(tx, lambda x: x.update(dtype=jnp.int8), state)
        num_changed = jax.tree.map(lambda x, y: x.dtype != y.dtype, found, state)
        # The trace, in "stabilize" the snapshots, and second moments.
        num_others = {"stabilize": 2, "spam": 1, "stable_adam": 1}
        num_copies = 1 + num_others.get(name, 0)
        num_leaves = 2 if wrapper == "none" else 1
        assert sum(jax.tree.leaves(num_changed)) == num_copies * num_leaves, name
        shardings = optax.tree_map_params(
            tx,
            lambda _, spec: spec,
            state,
            specs,
            transform_non_params=lambda _: PartitionSpec(),
            is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        )
        # Of norms per unit the tuple of a field has one spec: a prefix of the state.
        shardings = jax.tree.leaves(jax.tree.broadcast(shardings, state))
        assert shardings.count(PartitionSpec("x")) == num_copies, name


@pytest.mark.parametrize("name", names(SLOW_TO_SCAN))
def test_scan_and_cond(name, transformation):
    params = updates_at(0)

    def body(state, step):
        updates = updates_at(step)
        updates, state = jax.lax.cond(
            step >= 0,
            lambda state: transformation.update(updates, state, params),
            lambda state: (updates, state),
            state,
        )
        return state, updates

    state = transformation.init(updates_at(0))
    state, found = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(7)))(state)
    outputs, expected_state = run(transformation, update=compiled(name))
    assert_close_states(state, expected_state)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", names(SLOW_TO_DONATE))
def test_state_can_be_donated(name, transformation):
    update = jax.jit(transformation.update, donate_argnums=(1,))
    _, state = run(transformation, update=update)
    _, expected = run(transformation, update=compiled(name))
    assert_close_states(state, expected)


@pytest.mark.parametrize("name", names(SLOW_TO_SCAN))
def test_vmap_equals_a_loop_over_the_runs(name, transformation):
    runs = [updates_at(step) for step in range(7)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    state = transformation.init(updates_at(0))
    update = jax.vmap(transformation.update, in_axes=(0, None, None))
    found, found_state = jax.jit(update)(stacked, state, updates_at(0))
    single = compiled(name)
    # By which two compiled programs may differ: of matrices 1e6 times their limit, each
    # of ten steps multiplies roundings of 6e-8 by up to 12 / 0.09.
    rtol = 1e-4 if name.startswith("clip_by_spectral_norm") else 1e-6
    for i, updates in enumerate(runs):
        expected, expected_state = single(updates, state, updates_at(0))
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], found), expected, rtol=rtol
        )
        assert_close_states(
            jax.tree.map(lambda x, i=i: x[i], found_state), expected_state
        )


HAS_METRICS = [x for x in REGISTRY if not x.startswith(("clip_by_value", "scale_"))]
SLOW_TO_STACK = set(HAS_METRICS) - {"clip_by_norm", "record"}


@pytest.mark.parametrize("name", names(SLOW_TO_STACK, HAS_METRICS))
def test_metrics_of_stacked_states_are_those_of_each_run(name, transformation):
    state = transformation.init(updates_at(0))
    runs = [compiled(name)(updates_at(i), state, updates_at(0))[1] for i in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    # Ratios need the parameters of each run.
    params = jax.tree.map(lambda x: jnp.stack([x] * 4), updates_at(0))
    found = optaxclip.metrics(stacked, params)
    expected = [optaxclip.metrics(run, updates_at(0)) for run in runs]
    assert set(found) == set(expected[0])
    for key, values in found.items():
        of_runs = [float(metrics[key]) for metrics in expected]
        np.testing.assert_allclose(values, of_runs, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize(
    "other", [pytest.param(3, marks=pytest.mark.slow), jax.nn.relu]
)
def test_leaves_may_be_numbers_and_what_is_no_array(other):
    tree = {"w": np.ones((2, 3)), "b": 4.0, "c": np.float64(-3.0), "other": other}
    for name, row in REGISTRY.items():
        tx = row.make()

        def step(tx=tx):
            state = tx.init(tree)
            updates, new_state = tx.update(tree, state, tree)
            assert updates["other"] is other
            return {**updates, "other": None}, state, new_state

        updates, state, new_state = jax.eval_shape(step)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(updates)), name
        assert_same_type(new_state, state)


HEALTHY_STEPS = 0, 1, 2, 4, 5  # of `updates_at`, of any size and zero


def has_sum(tree):
    """Whether no NaN comes of adding up all floats, as a check of replicas does."""
    floats = [
        np.asarray(x, np.float32)
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return not np.isnan(sum(map(np.sum, floats)))


def test_what_comes_of_healthy_steps_has_a_sum(name, transformation):
    # +inf may stand for no limit; NaN or -inf beside it stand for nothing.
    params, state = updates_at(0), transformation.init(updates_at(0))
    updates = params
    for step in (None, *HEALTHY_STEPS * 2):
        if step is not None:
            updates, state = compiled(name)(updates_at(step), state, params)
        assert has_sum((updates, state)), step


# The moments of an optimizer are its own: NaN in its gradients is NaN in them.
OPTIMIZERS = {"spam", "stable_adam"}


@pytest.mark.parametrize(
    "name", names(among=[x for x in REGISTRY if x not in OPTIMIZERS])
)
def test_the_state_has_a_sum_after_any_step_and_loss(name, transformation):
    params, state = updates_at(0), transformation.init(updates_at(0))
    losses = 1.0, -jnp.inf, 2.0, jnp.nan, jnp.inf
    for step in range(14):
        loss = {"value": jnp.asarray(losses[step % 5])}
        _, state = compiled(name)(updates_at(step), state, params, **loss)
        assert has_sum(state), step


@pytest.mark.parametrize("name", names(set(REGISTRY) - {"clip_by_norm", "record"}))
def test_no_operation_of_a_healthy_step_makes_a_nan(transformation):
    params, state = updates_at(0), transformation.init(updates_at(0))
    steps = [updates_at(step) for step in HEALTHY_STEPS]
    with jax.debug_nans(True):
        for updates in steps:
            _, state = transformation.update(updates, state, params)


@pytest.mark.parametrize("name", names(set(REGISTRY) - {"adagc"}))
def test_a_step_passes_the_checks_of_jax(transformation):
    updates = updates_at(0)
    state = jax.eval_shape(transformation.init, updates)
    with jax.enable_checks(True):
        jax.eval_shape(transformation.update, updates, state, updates)


@pytest.mark.parametrize("name", names(set(REGISTRY)))
def test_a_step_with_jit_disabled_is_that_under_jit(name, transformation):
    params, state = updates_at(0), transformation.init(updates_at(0))
    for step in (1, 3):
        with jax.disable_jit():
            found = transformation.update(updates_at(step), state, params)
        expected = compiled(name)(updates_at(step), state, params)
        chex.assert_trees_all_close(found[0], expected[0], rtol=1e-6)
        assert_close_states(found[1], expected[1])
        assert_same_type(found, expected)


def test_lowers_for_cpu_gpu_and_tpu(transformation):
    updates = updates_at(0)
    state = transformation.init(updates)
    exported = jax.export.export(
        jax.jit(lambda *args: jax.tree.leaves(transformation.update(*args))),
        platforms=("cpu", "cuda", "tpu"),
    )(updates, state, updates)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert "callback" not in exported.mlir_module()


@pytest.mark.parametrize("name", names(SLOW_TO_COMPOSE))
def test_composes_with_the_wrappers_of_optax(name, transformation):
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    labels = {"w": "clipped", "b": "plain"}
    for tx in (
        optax.chain(transformation, optax.sgd(1.0)),
        optax.masked(transformation, {"w": True, "b": False}),
        optax.partition({"clipped": transformation, "plain": optax.sgd(1.0)}, labels),
        optax.apply_if_finite(transformation, 3),
        optax.MultiSteps(
            optax.chain(transformation, optax.sgd(1.0)), 2
        ).gradient_transformation(),
    ):
        tx: Any = optax.with_extra_args_support(tx)
        state = tx.init(params)
        step = jax.jit(tx.update)
        updates = params
        # A spike after a warm-up; MultiSteps halves it.
        for size in [5.0] * 7 + [5000.0]:
            grads = jax.tree.map(lambda x, size=size: size * x, params)
            # Some wrappers rely on promotion themselves.
            with jax.numpy_dtype_promotion("standard"):
                updates, new_state = step(grads, state, params, value=jnp.float32(1))
            assert_same_type(state, new_state)
            state = new_state
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        largest = np.abs(updates["w"]).max()
        assert (largest == 0) == (REGISTRY[name].response == "skips")
        assert (largest > 2000) == (REGISTRY[name].response == "passes")


def test_update_takes_any_extra_argument_and_no_params(name, transformation):
    updates = updates_at(1)
    params = updates if REGISTRY[name].needs_params else None

    def update(state):
        return transformation.update(
            updates, state, params, value=1.0, something_else="x"
        )

    state = transformation.init(updates)
    _, new = jax.eval_shape(update, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


@pytest.mark.parametrize("name", names(SLOW_WITHOUT_JIT))
def test_other_leaves_pass_untouched(transformation):
    updates = updates_at(1)
    found, _ = transformation.update(updates, transformation.init(updates), updates)
    assert found["int"] is updates["int"]
    assert found["empty"].shape == (0, 2)
