"""A network most of whose gradients have become 0: what is tried, and what is left."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip.explosions.dying import MIN_ALIVE, NUM_DEAD
from optaxclip.explosions.state import COUNTS

pytestmark = pytest.mark.usefixtures("quick_to_compile")

DUE = 50
"""Healthy steps until the first snapshot is due."""
NONE = {"num_exploded": 0, "num_skipped": 0, "num_rollbacks": 0}
IN_VAIN = NONE | {"num_skipped": 2}


def start(size: float) -> Any:
    """A unit `u`, two weights of its output, and a bias."""
    hidden = {name: jnp.float32(size) for name in ("u", "v", "w")}
    return hidden | {"bias": jnp.float32(0)}


def network(params: Any, inputs: jax.Array) -> jax.Array:
    """Mean squared error of targets 2 * inputs. Below 0 the unit is dead."""
    unit = jax.nn.relu(params["u"] * inputs)
    return 0.5 * jnp.mean(
        jnp.square(unit * params["v"] * params["w"] + params["bias"] - 2 * inputs)
    )


class Case(NamedTuple):
    """What happens to the network."""

    killed_at: int = -1
    """Before this step the unit is moved far below zero; -1 for never."""
    blind_from: int = 1000
    """From this step on inputs are 0, so that no parameters have other gradients."""
    bias_until: int = 1000
    """From this step on the gradient of the bias is 0."""
    size: float = 0.5
    rate: float = 0.02


@functools.cache
def training(protect: Callable, shown: Any) -> Callable:
    """The training under `protect(optimizer)`, as a function of the case."""

    def train(case: Case):
        tx = optax.with_extra_args_support(protect(optax.sgd(case.rate)))

        def step_once(carry, step):
            params, state = carry
            is_killed = step == case.killed_at
            params = params | {"u": jnp.where(is_killed, -5.0, params["u"])}
            inputs = jnp.where(step >= case.blind_from, 0, jnp.arange(2.0))
            loss, grads = jax.value_and_grad(network)(params, inputs)
            grads = grads | {
                "bias": jnp.where(step < case.bias_until, grads["bias"], 0)
            }
            given = {} if shown is None else {"value": shown * loss}
            updates, state = tx.update(grads, state, params, **given)
            return (optax.apply_updates(params, updates), state), (loss, state)

        params = start(case.size)
        return jax.lax.scan(step_once, (params, tx.init(params)), jnp.arange(250))[1]

    return jax.jit(train)


def train(
    case: Case, protect: Callable = optaxclip.stabilize, *, shown: Any = 1.0
) -> tuple[jax.Array, Any]:
    """The loss of each step, and the state after it.

    `shown`: by what the loss is multiplied where `update` sees it; None for no loss.
    """
    return training(protect, shown)(jax.tree.map(jnp.asarray, case))


def numbers_after(state: Any, num_steps: int) -> dict[str, int]:
    """What was counted after so many steps."""
    told = optaxclip.metrics(jax.tree.map(lambda x: x[num_steps - 1], state))
    return {name: int(told[f"explosions/{name}"]) for name in NONE}


def test_a_network_that_steps_have_killed_is_taken_back():
    loss, state = train(Case(killed_at=3))
    expected = NONE | {"num_skipped": 3, "num_rollbacks": 1}
    assert numbers_after(state, DUE - 1) == NONE
    assert numbers_after(state, DUE + 2) == expected
    assert numbers_after(state, 250) == expected
    last: Any = jax.tree.map(lambda x: x[-1], state)
    norms = optaxclip.history(last).norms
    # Dead from the fourth step on: the bias alone. Then both trials, and it lives.
    np.testing.assert_array_equal(norms[DUE - 1] > 0, [True, False, False, False])
    assert np.all(norms[-1] > 0)
    np.testing.assert_allclose(loss[DUE : DUE + 3], loss[0], rtol=1e-6)
    scale = state["explosions"].scale
    assert scale[DUE] == 1
    assert scale[DUE + 1] < 0.2
    told = optaxclip.explain(last)
    assert "or most gradients had become 0, and earlier parameters were tried" in told


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(blind_from=30), IN_VAIN),
        # Seen at the snapshot, that loss is above its limit.
        (Case(killed_at=3, size=3.0, rate=1e-4), IN_VAIN | {"num_exploded": 1}),
        (Case(killed_at=DUE - NUM_DEAD + 1), NONE),
        (Case(killed_at=3, bias_until=0), NONE),
    ],
    ids=["by the data", "from a loss far above", "only lately", "all gradients are 0"],
)
def test_what_the_snapshot_does_not_mend_is_left_alone(case, expected):
    _, state = train(case)
    assert numbers_after(state, DUE + 10) == expected


@pytest.mark.parametrize("bias_until", [1000, DUE + 1])
def test_data_that_leave_the_gradients_0_are_tried_once(bias_until):
    """Also where no gradient is left after that, so that no step says anything."""
    _, state = train(Case(blind_from=30, bias_until=bias_until))
    assert numbers_after(state, 250) == IN_VAIN


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protect", "shown"),
    [
        (optaxclip.stabilize, None),
        (optaxclip.stabilize, np.inf),
        (lambda x: optaxclip.skip_explosions(x, rollback=True), 1.0),
    ],
    ids=["no loss", "inf", "no smaller steps"],
)
def test_without_a_loss_or_smaller_steps_nothing_is_tried(protect, shown):
    _, state = train(Case(killed_at=3), protect, shown=shown)
    found = numbers_after(state, 2 * DUE)
    assert found["num_skipped"] == found["num_rollbacks"] == 0


def test_the_counts_are_those_of_a_naive_count():
    """Leaves live at random, few of them in long stretches; through three snapshots."""
    rng = np.random.default_rng(0)
    num_leaves, num_steps = 5, 190
    rare = (np.arange(num_steps) // 24 % 2)[:, None]
    lives = rng.random((num_steps, num_leaves)) < np.where(rare, 0.15, 0.6)
    params = [jnp.ones(2)] * num_leaves
    tx = optaxclip.stabilize(optax.sgd(0.0), norm=None, share=None)

    def step_once(state, is_alive):
        grads = [jnp.full(2, x, jnp.float32) for x in is_alive]
        _, state = tx.update(grads, state, params, value=jnp.float32(1))
        kept: Any = state
        return state, kept["explosions"].explosions.record.counts

    _, counts = jax.jit(lambda: jax.lax.scan(step_once, tx.init(params), lives))()
    counts = COUNTS.unpack(np.asarray(counts)[-1])
    older = newer = in_a_row = 0
    for i, is_alive in enumerate(lives):
        num = int(is_alive.sum())
        older, newer = max(older, num), max(newer, num)
        if num:
            in_a_row = in_a_row + 1 if MIN_ALIVE * num < older else 0
        if (i + 1) % DUE == 0:
            assert in_a_row < NUM_DEAD  # no trial
            older, newer = older if i < DUE else newer, 0
    assert counts["skipped"] == 0
    found = [counts[x] for x in ("most_alive", "next_most", "dead_in_a_row")]
    np.testing.assert_array_equal(found, (older, newer, in_a_row))
    assert in_a_row > 0
    assert 0 < newer < older
