"""A skipped step leaves nothing in the rest of the training state either."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optaxclip

pytestmark = pytest.mark.usefixtures("quick_to_compile")

NUM_STEPS = 50
BAD_STEPS = 0, 30
TX = optaxclip.stabilize(optax.adam(1e-2))


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(1)(x)


def batches() -> Any:
    """NaN is in the inputs, and so in all that a network makes of them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_STEPS, 8, 3)).astype(np.float32)
    return x, x.sum(-1, keepdims=True)


@functools.cache
def start() -> Any:
    init = jax.jit(functools.partial(Network().init, train=False))
    variables = init(jax.random.key(0), jnp.ones((8, 3)))
    params, statistics = variables["params"], variables["batch_stats"]
    return params, (statistics, params), TX.init(params)


def step(carry, batch) -> Any:
    """(carry, outputs); the one line that is tested is that with `keep`."""
    params, rest, opt_state = carry
    x, y = batch

    def loss_of(params):
        found, changed = Network().apply(
            {"params": params, "batch_stats": rest[0]},
            x,
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.mean((found - y) ** 2), changed["batch_stats"]

    (loss, statistics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, opt_state = TX.update(grads, opt_state, params, value=loss)
    params = optax.apply_updates(params, updates)
    average = optax.incremental_update(params, rest[1], 0.1)
    rest = optaxclip.keep(opt_state, (statistics, average), rest)
    return (params, rest, opt_state), optaxclip.taken(opt_state)


@functools.cache
def scanned() -> Any:
    return jax.jit(lambda carry, data: lax.scan(step, carry, data))


@pytest.mark.slow
def test_a_bad_batch_at_any_step_leaves_nothing():
    """Parameters, batch statistics and their average are those of the run without."""
    x, y = batches()
    for bad in range(NUM_STEPS):
        poisoned = np.insert(x, bad, np.nan, axis=0), np.insert(y, bad, 0, axis=0)
        (*found, _), taken = scanned()(start(), poisoned)
        (*expected, _), _ = scanned()(start(), (x, y))
        chex.assert_tree_all_finite(found)
        chex.assert_trees_all_equal(found, expected)
        assert np.flatnonzero(~taken).tolist() == [bad]


@pytest.mark.slow
def test_bad_batches_at_two_steps_leave_nothing():
    """The same in a loop, which compiles less."""
    run, found, expected, taken = jax.jit(step), start(), start(), []
    for i, (x, y) in enumerate(zip(*batches(), strict=True)):
        if i in BAD_STEPS:
            found, was_taken = run(found, (x * np.nan, y))
            taken.append(bool(was_taken))
        found, _ = run(found, (x, y))
        expected, _ = run(expected, (x, y))
    assert taken == [False] * len(BAD_STEPS)
    chex.assert_tree_all_finite(found[:2])
    chex.assert_trees_all_equal(found[:2], expected[:2])


@pytest.mark.slow
def test_step_by_step_it_is_what_a_scan_gives():
    x, y = batches()
    x[3] = np.nan
    (*expected, _), _ = scanned()(start(), (x[:9], y[:9]))
    carry, run = start(), jax.jit(step)
    for batch in zip(x[:9], y[:9], strict=True):
        carry, _ = run(carry, batch)
    chex.assert_trees_all_close(carry[:2], tuple(expected), rtol=1e-5)


def sizes_taken(sizes, tx=None) -> list[list[int]]:
    """Of steps with these losses and gradients: taken, is_skipped, is_rolled_back."""
    tx = optaxclip.stabilize(optax.sgd(1e-3)) if tx is None else tx
    params = {"w": jnp.ones(2)}
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for size in sizes:
        grads = {"w": jnp.full(2, size)}
        updates, state = update(grads, state, params, value=jnp.float32(abs(size)))
        params = optax.apply_updates(params, updates)
        metrics = optaxclip.metrics(state)
        names = "is_skipped", "is_rolled_back"
        row = [optaxclip.taken(state), *(metrics[f"explosions/{x}"] for x in names)]
        found.append([int(x) for x in row])
    return found


def test_a_rollback_and_its_trials_are_told():
    """Three explosions, of which the third starts the trials, and two of these."""
    found = sizes_taken([1.0] * 4 + [1e3] * 3 + [1.0] * 3)
    taken, skipped = [1, 0, 0], [0, 1, 0]
    assert found == [taken] * 4 + [skipped] * 4 + [[0, 1, 1]] + [taken]


def test_an_accepted_explosion_was_taken():
    tx = optaxclip.skip_explosions(optax.sgd(1e-3), max_consecutive=3)
    found = sizes_taken([1.0] * 4 + [1e3] * 3, tx)
    assert [row[0] for row in found] == [1] * 4 + [0, 0, 1]


@pytest.mark.slow
def test_a_step_whose_moments_were_mended_was_skipped():
    tx = optaxclip.skip_explosions(optax.adam(1e-3), norm=None, share=None, loss=None)
    params = {"w": jnp.ones(2, jnp.float16)}
    state, taken = tx.init(params), []
    for size in (1.0, 300.0, 1.0):  # the square of 300 is inf
        grads = {"w": jnp.full(2, size, jnp.float16)}
        _, state = tx.update(grads, state, params)
        taken.append(bool(optaxclip.taken(state)))
    assert taken == [True, True, False]


def test_before_the_first_step():
    state = TX.init({"w": jnp.ones(2)})
    assert optaxclip.taken(state)
    assert optaxclip.keep(state, jnp.array(1.0), jnp.array(0.0)) == 1


@pytest.mark.slow
def test_several_runs():
    tx = optaxclip.skip_explosions(optax.sgd(0.1))
    params = {"w": jnp.ones((3, 2))}
    grads = {"w": jnp.ones((3, 2)).at[1].set(jnp.nan)}
    states = jax.jit(jax.vmap(tx.init))(params)
    _, states = jax.jit(jax.vmap(tx.update))(grads, states, params)
    assert optaxclip.taken(states).tolist() == [True, False, True]
    kept = optaxclip.keep(states, jnp.ones((3, 4)), jnp.zeros((3, 4)))
    np.testing.assert_array_equal(kept[:, 0], [1, 0, 1])


@pytest.mark.slow
def test_keys_and_whole_numbers_are_kept_as_they_are():
    tx = optaxclip.skip_explosions(optax.sgd(0.1))
    params = jnp.ones(1)
    _, state = tx.update(jnp.array([jnp.nan]), tx.init(params), params)
    old = {"key": jax.random.key(1), "num": jnp.array(3, jnp.int8)}
    new = {"key": jax.random.key(2), "num": jnp.array(4, jnp.int8)}
    kept = optaxclip.keep(state, new, old)
    assert kept["num"].dtype == jnp.int8
    assert kept["num"] == 3
    assert jax.random.key_data(kept["key"])[-1] == 1


@pytest.mark.slow
def test_which_state_is_meant():
    params = jnp.ones(1)
    tx = optax.chain(
        optaxclip.skip_explosions(optax.identity(), label="a"),
        optaxclip.skip_explosions(optax.identity(), label="b", norm=0.5),
    )
    _, state = tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match=r"give label=, one of \['a', 'b'\]"):
        optaxclip.taken(state)
    assert optaxclip.taken(state, label="a")
    assert not optaxclip.taken(state, label="b")
    with pytest.raises(ValueError, match="no state of skip_explosions or stabilize w"):
        optaxclip.taken(state, label="c")
    with pytest.raises(ValueError, match=r"no state of skip_explosions or stabilize$"):
        optaxclip.taken(optaxclip.detect_explosions().init(params))
