"""The list of skipped steps is exactly those, after many steps and a kill."""

import functools
import json
import os
import signal
import subprocess
import sys
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optaxclip

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PARAMS = {"w": jnp.ones(3)}
TX = optaxclip.stabilize(optax.sgd(0.0), columns=["batch"])


def sizes_of(num_steps, bad) -> np.ndarray:
    sizes = np.ones(num_steps, np.float32)
    for step, size in bad.items():
        sizes[step] = size
    return sizes


@functools.partial(jax.jit, static_argnums=0)
def run(tx, state, sizes, batches) -> Any:
    """(the state after gradients of these sizes, whether each was taken)."""

    def step(state, x):
        size, batch = x
        grads = jax.tree.map(lambda x: jnp.full_like(x, size), PARAMS)
        tag = {"batch": batch}
        _, state = tx.update(grads, state, PARAMS, value=size, tag=tag)
        return state, optaxclip.taken(state)

    return lax.scan(step, state, (sizes, batches))


def batches_of(num_steps) -> np.ndarray:
    return (2**31 - 1 - 3 * np.arange(num_steps)).astype(np.int32)


def test_they_are_those_that_were_not_taken_with_batch_and_rules():
    """Among them two trials of a rollback, against which no rule says anything."""
    bad = {70: 50.0, 90: np.nan, 200: 50.0, 201: 60.0, 202: 70.0}
    sizes, batches = sizes_of(400, bad), batches_of(400)
    state, was_taken = run(TX, TX.init(PARAMS), sizes, batches)
    found = optaxclip.skipped_steps(state)
    skipped = np.flatnonzero(~np.asarray(was_taken))
    assert [x["step"] for x in found] == skipped.tolist()
    assert [x["batch"] for x in found] == batches[skipped].tolist()
    rules = {x["step"]: x["rules"] for x in found}
    both = ["norm", "loss"]
    assert rules[70] == rules[200] == rules[201] == rules[202] == both
    assert rules[90] == ["nonfinite"]
    assert {203, 204} <= set(rules)
    assert rules[203] == rules[204] == []
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
def test_they_outlive_the_record():
    sizes, batches = sizes_of(400, {70: 50.0, 90: np.nan}), batches_of(400)
    state, _ = run(TX, TX.init(PARAMS), sizes, batches)
    assert optaxclip.history(state).step[0] > 90
    found = [(x["step"], x["batch"]) for x in optaxclip.skipped_steps(state)]
    assert found == [(70, batches[70]), (90, batches[90])]


@pytest.mark.parametrize("num_bad", [0, 1, 64, 65, 79])
def test_the_last_64_are_kept_in_order(num_bad):
    bad = [5 * i + 3 for i in range(num_bad)]
    sizes = sizes_of(400, dict.fromkeys(bad, np.nan))
    state, _ = run(TX, TX.init(PARAMS), sizes, np.arange(400, dtype=np.int32))
    found = optaxclip.skipped_steps(state)
    assert [x["step"] for x in found] == bad[-64:]
    assert [x["batch"] for x in found] == bad[-64:]
    assert optaxclip.metrics(state)["explosions/num_skipped"] == num_bad


@pytest.mark.slow
def test_a_step_whose_moments_were_mended_is_among_them():
    tx = optaxclip.skip_explosions(optax.adam(1e-3), columns=["batch"])
    state: Any = tx.init(PARAMS)
    for step in range(6):
        if step == 4:
            (adam, rest) = state["explosions"].inner_state
            mu = jax.tree.map(lambda x: x.at[0].set(jnp.inf), adam.mu)
            inner = (adam._replace(mu=mu), rest)
            state["explosions"] = state["explosions"]._replace(inner_state=inner)
        tag = {"batch": 100 + step}
        _, state = tx.update(PARAMS, state, PARAMS, tag=tag)
    assert optaxclip.metrics(state)["explosions/num_mended"] == 1
    assert optaxclip.skipped_steps(state) == [{"step": 5, "batch": 105, "rules": []}]


@pytest.mark.slow
def test_without_columns_they_have_no_tags():
    tx = optaxclip.skip_explosions(optax.sgd(0.1))
    state, _ = run(tx, tx.init(PARAMS), sizes_of(6, {4: np.inf}), batches_of(6))
    assert optaxclip.skipped_steps(state) == [{"step": 4, "rules": ["nonfinite"]}]


@pytest.mark.slow
def test_a_tag_that_is_nonfinite_is_none_and_others_have_few_digits():
    tx = optaxclip.skip_explosions(optax.sgd(0.1), columns=["logit", "rate"])
    state = tx.init(PARAMS)
    grads = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    for logit in (np.inf, np.nan, -1.5):
        tag = {"logit": logit, "rate": 0.1}
        _, state = tx.update(grads, state, PARAMS, tag=tag)
    found = optaxclip.skipped_steps(state)
    assert [x["logit"] for x in found] == [None, None, -1.5]
    assert [x["rate"] for x in found] == [0.1] * 3
    json.dumps(found, allow_nan=False)


@pytest.mark.slow
def test_of_several_runs_each_has_its_own_list():
    sizes = np.stack(
        [sizes_of(9, bad) for bad in ({}, {3: np.nan}, {4: np.nan, 7: 9e9})]
    )
    batches = np.broadcast_to(np.arange(9, dtype=np.int32), sizes.shape)
    states = jax.vmap(lambda s, b: run(TX, TX.init(PARAMS), s, b)[0])(sizes, batches)
    found = optaxclip.skipped_steps(states)
    assert [[x["batch"] for x in one] for one in found] == [[], [3], [4, 7]]
    again = jax.tree.map(lambda x: x[None], states)
    assert optaxclip.skipped_steps(again) == [found]


@pytest.mark.usefixtures("x64", "strict")
@pytest.mark.slow
def test_all_of_it_under_strict_promotion_and_with_64_bits():
    tx = optaxclip.stabilize(optax.sgd(0.1), columns=["batch"])
    params = {"w": jnp.ones(3, jnp.float32), "x": jnp.ones(2, jnp.float64)}
    state = tx.init(params)
    for batch, size in [(2**40, 1.0), (2**40 + 1, jnp.nan)]:
        grads = jax.tree.map(lambda x, size=size: x * size, params)
        tag = {"batch": jnp.int64(batch)}
        _, state = tx.update(grads, state, params, value=jnp.ones([]), tag=tag)
    found = optaxclip.skipped_steps(state)
    assert found == [{"step": 1, "batch": 2**40 + 1, "rules": ["nonfinite"]}]
    assert optaxclip.leading_leaf(state, params) == "w"
    for read in (optaxclip.metrics, jax.jit(optaxclip.metrics)):
        metrics = read(state, params, zeros=params)
        assert metrics["explosions/window/skipped_fraction"] == 0.5
        assert metrics["explosions/window/nonfinite_fraction"] == 0.5
    assert f"batch {2**40 + 1}" in optaxclip.explain(state, params)


def test_which_state_is_meant():
    plain = optaxclip.detect_explosions().init(PARAMS)
    with pytest.raises(ValueError, match="found no state of skip_explosions"):
        optaxclip.skipped_steps(plain)
    inner = optaxclip.skip_explosions(optax.sgd(0.1), label="inner")
    tx = optaxclip.skip_explosions(inner, label="outer")
    with pytest.raises(ValueError, match=r"give label=, one of \['inner', 'outer'\]"):
        optaxclip.skipped_steps(tx.init(PARAMS))
    assert optaxclip.skipped_steps(tx.init(PARAMS), label="inner") == []


# --- Killed and started again


def train(path: str, num_steps: int, die_at: int) -> list[Any]:
    """Trains from the last checkpoint on; the skipped steps in the end."""
    tx = optaxclip.stabilize(optax.adam(1e-2), columns=["batch"])
    template: Any = PARAMS, tx.init(PARAMS)
    carry: Any = template
    start = 0
    if os.path.exists(path):
        with open(path, "rb") as file:
            carry = flax.serialization.from_bytes(template, file.read())
        _, state = carry
        start = int(state["explosions"].record.num_steps)

    @jax.jit
    def step(carry, size, batch):
        params, state = carry
        grads = jax.tree.map(lambda x: size * x, params)
        tag = {"batch": batch}
        updates, state = tx.update(grads, state, params, value=size, tag=tag)
        return optax.apply_updates(params, updates), state

    for i in range(start, num_steps):
        if i == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        size = np.float32(BAD.get(i, 1.0))
        carry = step(carry, size, np.int32(batch_of(i)))
        if i % 10 == 9:
            with open(path + ".new", "wb") as file:
                file.write(flax.serialization.to_bytes(carry))
            os.replace(path + ".new", path)
    _, state = carry
    return optaxclip.skipped_steps(state)


BAD = {13: np.nan, 37: np.inf, 42: np.nan, 76: 1e6, 301: np.nan, 344: -np.inf}
KILLED_AT = 45
NUM_STEPS = 350


def batch_of(step: int) -> int:
    return 2**30 + 7919 * step


@pytest.mark.slow
def test_killed_and_restored_they_are_exactly_the_skipped_ones(tmp_path):
    """The record of 256 steps has long lost the first ones."""
    path = str(tmp_path / "checkpoint")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def start(die_at: int) -> subprocess.CompletedProcess:
        command = [sys.executable, __file__, path, str(die_at)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    killed = start(KILLED_AT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    restarted = start(-1)
    assert restarted.returncode == 0, restarted.stderr
    found = json.loads(restarted.stdout)
    assert [x["step"] for x in found] == list(BAD)
    assert [x["batch"] for x in found] == [batch_of(step) for step in BAD]
    chex.assert_trees_all_equal(found, train(str(tmp_path / "unharmed"), NUM_STEPS, -1))


if __name__ == "__main__":
    print(json.dumps(train(sys.argv[1], NUM_STEPS, int(sys.argv[2]))))
