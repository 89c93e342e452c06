"""Snapshots in the memory of the host: the same run, and nothing travels but them."""

import functools
from typing import Any

import chex
import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optaxclip
from optaxclip.explosions import snapshots
from optaxclip.explosions.trials import PHASES

needs_host_memory = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="JAX before 0.10 has no types of memory"
)
pytestmark = pytest.mark.usefixtures("quick_to_compile")

PARAMS = {"a": jnp.arange(8.0).reshape(4, 2), "b": jnp.ones(3, jnp.bfloat16)}
# A rollback that is confirmed, and one whose snapshot is no better.
SIZES = np.array([1] * 12 + [1e3] * 3 + [1] * 7 + [1e3] * 8, np.float32)


def make(rollback) -> optax.GradientTransformationExtraArgs:
    return optaxclip.skip_explosions(
        optax.adam(0.1), rollback=rollback, snapshot_every=5, cool_down=0.1
    )


def step(tx, carry, size) -> Any:
    params, state = carry
    grads = jax.tree.map(lambda x: size.astype(x.dtype) * jnp.ones_like(x), params)
    updates, state = tx.update(grads, state, params, value=size)
    return (optax.apply_updates(params, updates), state), None


@functools.cache
def once(rollback) -> Any:
    tx = make(rollback)
    return jax.jit(lambda carry, size: step(tx, carry, size)[0], donate_argnums=0)


def train(rollback, params: Any = PARAMS, sizes=SIZES) -> Any:
    # Copies, since what is donated is gone.
    carry = jax.tree.map(jnp.copy, params), make(rollback).init(params)
    for size in sizes:
        carry = once(rollback)(carry, size)
    return carry


@functools.cache
def train_on_device() -> list[np.ndarray]:
    return as_numbers(train(True))


def as_numbers(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def kinds_of(tree: Any) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


@needs_host_memory
@pytest.mark.slow
def test_the_run_is_that_of_snapshots_on_the_device():
    carry = train("host")
    assert optaxclip.metrics(carry[1])["explosions/num_rollbacks"] == 1
    assert PHASES[carry[1]["explosions"].explosions.counts.phase] == "accepting"
    chex.assert_trees_all_equal(as_numbers(carry), train_on_device())


@needs_host_memory
def test_all_of_the_snapshots_are_there_and_nothing_else():
    params, state = train("host")
    mine = state["explosions"]
    assert kinds_of(mine.snapshots) == {"pinned_host"}
    assert kinds_of((params, mine._replace(snapshots=()))) == {"device"}


@needs_host_memory
@pytest.mark.slow
@pytest.mark.parametrize("how", ["scan", "vmap"])
def test_in_one_program(how):
    tx = make("host")

    def run(params):
        carry = params, tx.init(params)
        return lax.scan(lambda *x: step(tx, *x), carry, SIZES)[0]

    if how == "scan":
        found = jax.jit(run)(PARAMS)
    else:
        members = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
        found = jax.jit(jax.vmap(run))(members)
        found = jax.tree.map(lambda x: x[0], jax.device_get(found))
    chex.assert_trees_all_close(as_numbers(found[0]), train_on_device()[:2], rtol=1e-6)


@needs_host_memory
@pytest.mark.slow
def test_shards_stay_where_they_are():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    sharding = {"a": PartitionSpec("x"), "b": PartitionSpec()}
    sharding = jax.tree.map(lambda spec: NamedSharding(mesh, spec), sharding)
    carry = train("host", jax.device_put(PARAMS, sharding))
    for copy in carry[1]["explosions"].snapshots:
        assert copy["a"].sharding.is_equivalent_to(
            sharding["a"].with_memory_kind("pinned_host"), 2
        )
    chex.assert_trees_all_close(as_numbers(carry[0]), train_on_device()[:2], rtol=1e-6)


def moves_of(jaxpr, is_in_loop=False):
    """Whether each move of an array, of a whole program, is in a loop."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "device_put":
            yield is_in_loop
        inner = is_in_loop or eqn.primitive.name == "while"
        for sub in jex.core.jaxprs_in_params(eqn.params):
            yield from moves_of(sub, inner)


@needs_host_memory
def test_nothing_travels_in_a_healthy_step():
    """All moves are in the loops of `run_if`, which a healthy step does not enter."""
    tx = make("host")
    carry = PARAMS, tx.init(PARAMS)
    jaxpr = jax.jit(lambda *x: step(tx, *x)).trace(carry, SIZES[0]).jaxpr
    moves = list(moves_of(jaxpr.jaxpr))
    # Two leaves: the newer snapshot; back for the comparison, and for the update.
    assert moves == [True] * 6


@needs_host_memory
def test_a_state_that_was_read_into_other_memory():
    tx = make("host")
    carry = train("host", sizes=SIZES[:12])
    saved = serialization.to_bytes(carry)
    made = PARAMS, tx.init(PARAMS)
    carry = serialization.from_bytes(made, saved)
    with pytest.raises(ValueError, match="must be in the memory of the host"):
        step(tx, carry, SIZES[0])
    carry = jax.device_put(carry, jax.tree.map(lambda x: x.sharding, made))
    for size in SIZES[12:]:
        carry = once("host")(carry, size)
    chex.assert_trees_all_equal(as_numbers(carry), train_on_device())


@needs_host_memory
@pytest.mark.slow
def test_parameters_that_widen_take_the_snapshots_with_them():
    tx = make("host")
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    carry: Any = PARAMS, tx.init(narrow)
    for size in SIZES[:20]:
        carry = once("host")(carry, size)
    snapshot = carry[1]["explosions"].snapshots.older
    assert snapshot["a"].dtype == jnp.float32
    assert kinds_of(snapshot) == {"pinned_host"}


def test_an_error_where_the_host_gives_no_memory(monkeypatch):
    """As on JAX 0.7, where what is put there stays on the device."""
    monkeypatch.setattr(snapshots, "put", lambda x, memory: x)
    with pytest.raises(ValueError, match="does not give"):
        make("host").init(PARAMS)
    with pytest.raises(ValueError, match="does not give"):
        jax.eval_shape(optaxclip.stabilize(optax.sgd(0.1), rollback="host").init, {})


@pytest.mark.parametrize("wrong", ["device", None, 1])
def test_errors_of_rollback(wrong):
    with pytest.raises(TypeError, match='rollback must be True, False or "host"'):
        make(wrong)
