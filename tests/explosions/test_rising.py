"""A loss that rises too slowly for any rule: what is tried, and what is left alone."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import optaxclip
from optaxclip.explosions.carried import unpack_carried
from optaxclip.explosions.rising import (
    MIN_FIRST_NOISE,
    NUM_PULLS,
    RISE,
    SPAN,
    Rise,
    follow,
    has_only_risen,
    is_at_fault,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")

START = {"a": jnp.ones(3), "b": jnp.full((2, 2), 0.5)}
DUE = 50
"""Healthy steps until the first snapshot is due."""


def bowl(params, step, key):
    del step, key
    return 0.5 * optax.tree.norm(params, squared=True)


def receding(params, step, key):
    """The target runs away faster than it is followed."""
    ahead: Any = optax.tree.add(params, optax.tree.full_like(params, -2 - 0.05 * step))
    return bowl(ahead, step, key)


def harder(params, step, key):
    """Up to step 60 the data become harder at all parameters, and pull them back."""
    del key
    total: Any = optax.tree.sum(params)
    slope = jnp.where(step < 20, -1.0, 0.2) * (total - jax.lax.stop_gradient(total))
    return slope + 10 + 0.3 * jnp.minimum(step, 60)


def noisy(params, step, key):
    """From step 30 on a larger loss that nothing explains, and gradients of noise."""
    noise = optax.tree.random_like(key, params)
    return optax.tree.vdot(noise, params) + jnp.where(step < 30, 10.0, 30.0)


def below_zero(params, step, key):
    """Far above its first level, of which there is no half."""
    return bowl(params, step, key) - 2.5


def harder_and_one_outlier(params, step, key):
    """A healthy step after the snapshot was tried in vain, six times the level."""
    return harder(params, step, key) + jnp.where(step == DUE + 2, 100.0, 0.0)


def bowl_and_noise(params, step, key):
    """The first loss is low by chance."""
    return bowl(params, step, key) + 3 - 2 * (-1.0) ** step


LOSSES = [
    bowl,
    bowl_and_noise,
    receding,
    harder,
    noisy,
    below_zero,
    harder_and_one_outlier,
]


class Trained(NamedTuple):
    """A run: of each step the parameters before it, gradients, loss and state after."""

    params: Any
    grads: Any
    loss: Any
    state: Any

    def numbers_after(self, num_steps: int) -> dict[str, int]:
        """What was counted after so many steps."""
        state = jax.tree.map(lambda x: x[num_steps - 1], self.state)
        told = optaxclip.metrics(state)
        names = "num_exploded", "num_skipped", "num_rollbacks"
        return {name: int(told[f"explosions/{name}"]) for name in names}


@functools.cache
def training(protect: Callable, has_loss: bool = True) -> Callable:
    """The training under `protect(optimizer)`, as a function of step size and loss."""

    def loss_of(params, step, key, which):
        return jax.lax.switch(which, LOSSES, params, step, key)

    def train(rate, which) -> Trained:
        tx = optax.with_extra_args_support(protect(optax.sgd(rate)))

        def step_once(carry, step):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(0), step)
            value, grads = jax.value_and_grad(loss_of)(params, step, key, which)
            given = {"value": value} if has_loss else {}
            updates, state = tx.update(grads, state, params, **given)
            after = optax.apply_updates(params, updates)
            return (after, state), Trained(params, grads, value, state)

        return jax.lax.scan(step_once, (START, tx.init(START)), jnp.arange(250))[1]

    return jax.jit(train)


def train(protect: Callable, rate: float, loss: Callable, **options: Any) -> Trained:
    which = jnp.int32(LOSSES.index(loss))
    return training(protect, **options)(jnp.float32(rate), which)


def bare(optimizer):
    return optimizer


def short(every: int) -> Callable:
    return lambda optimizer: optaxclip.skip_explosions(
        optimizer, rollback=True, snapshot_every=every, cool_down=0.01
    )


def a_rise(**known: float) -> Rise:
    """With these numbers, and gradients that all point back."""
    numbers = dict.fromkeys(Rise._fields, 0.0)
    numbers |= {"newer": math.inf, "pulls": 4.0, "squares": 1.0} | known
    return Rise(**{name: jnp.float32(x) for name, x in numbers.items()})


TOO_LARGE = 2.01
"""The step size that makes the loss of `bowl` 2 % larger in each step."""
NONE = {"num_exploded": 0, "num_skipped": 0, "num_rollbacks": 0}


def test_steps_that_are_a_little_too_large_are_taken_back():
    found = train(optaxclip.stabilize, TOO_LARGE, bowl)
    expected = {"num_exploded": 0, "num_skipped": 3, "num_rollbacks": 1}
    assert found.numbers_after(DUE - 1) == NONE
    assert found.numbers_after(DUE + 2) == expected
    assert found.numbers_after(250) == expected
    # Both trials, and where it goes on.
    np.testing.assert_allclose(found.loss[DUE : DUE + 3], found.loss[0], rtol=1e-6)
    assert found.loss[-1] < 1e-3 * found.loss[0]
    state = jax.tree.map(lambda x: x[-1], found.state)
    told = optaxclip.explain(state, START)
    assert "the loss had risen, or most gradients had become 0, and earlier" in told
    assert "earlier parameters were tried. 3 were skip" in told


@pytest.mark.parametrize(
    ("rate", "loss", "num"),
    [(TOO_LARGE, bowl, DUE - 1), (0.01, receding, DUE), (0.01, receding, 2 * DUE - 1)],
)
def test_the_level_and_the_pulls_are_those_of_a_naive_count(rate, loss, num):
    """While the older snapshot is of the first step: through two periods."""
    found = train(optaxclip.stabilize, rate, loss)
    flat: Any = jax.vmap(lambda tree: jax.flatten_util.ravel_pytree(tree)[0])
    params, grads = flat(found.params), flat(found.grads)
    level, noise, pulls, copied = found.loss[0], 0.0, [], ()
    for i in range(num):
        rise = max((RISE - 1) * found.loss[0], MIN_FIRST_NOISE * noise)
        has_risen = level > found.loss[0] + rise
        rate = max(1 / (i + 1), 1 / SPAN)
        level += rate * (found.loss[i] - level)
        noise += rate * (abs(found.loss[i] - found.loss[max(i - 1, 0)]) - noise)
        if i == DUE - 1:
            copied = level, noise
        if i % DUE == DUE - NUM_PULLS:
            pulls = []
        if i % DUE >= DUE - NUM_PULLS and has_risen:
            way = params[i] - params[0]
            size = np.linalg.norm(way) * np.linalg.norm(grads[i])
            pulls.append(float(way @ grads[i] / size))
    rise = unpack_carried(found.state["explosions"].carried[num - 1]).rise
    np.testing.assert_allclose(rise.level, level, rtol=1e-5)
    np.testing.assert_allclose(rise.noise, noise, rtol=1e-4)
    if num > DUE:
        np.testing.assert_allclose((rise.newer, rise.newer_noise), copied, rtol=1e-4)
    np.testing.assert_allclose(rise.older, found.loss[0], rtol=1e-6)
    np.testing.assert_allclose(rise.pulls, sum(pulls), rtol=1e-5)
    np.testing.assert_allclose(rise.squares, sum(np.square(pulls)), rtol=1e-5)
    assert len(pulls) >= NUM_PULLS - 1


@pytest.mark.parametrize(
    ("rate", "loss"),
    [(0.01, receding), (0.01, noisy), (2.005, below_zero), (2.001, bowl)],
    ids=["target", "noise", "negative", "little"],
)
def test_what_the_steps_are_not_at_fault_for_is_left_alone(rate, loss):
    found = train(optaxclip.stabilize, rate, loss)
    assert found.numbers_after(2 * DUE) == NONE
    alone = train(bare, rate, loss)
    first, second = (
        jax.tree.map(lambda x: x[: 2 * DUE], run.params) for run in (found, alone)
    )
    chex.assert_trees_all_close(first, second, rtol=1e-5)
    is_higher = np.mean(found.loss[DUE - SPAN : DUE]) > RISE * found.loss[0]
    assert is_higher == (loss is not bowl)


@pytest.mark.parametrize(
    ("first", "older", "level", "is_risen"),
    [
        (1.0, 0.5, 0.61, True),
        (1.0, 0.5, 0.59, False),
        (1.0, 0.1, 0.51, True),
        (1.0, 0.1, 0.49, False),
        (24.0, 0.005, 0.06, False),
        (1e-6, 0.5e-6, 0.61e-6, True),
        (1e-6, 0.5e-6, 0.59e-6, False),
        (-5.0, -1.0, 2.0, False),
        (-5.0, 1.0, 2.0, True),
        (math.inf, math.inf, math.inf, False),
    ],
)
def test_how_far_a_loss_has_risen(first, older, level, is_risen):
    """By a fifth, to half of the first loss at least, from above zero; in any unit."""
    assert is_at_fault(a_rise(first=first, older=older, level=level)) == is_risen


@pytest.mark.parametrize(
    ("older", "noise", "older_noise", "is_risen"),
    [
        (2.0, 9.0, 1.9, True),
        (2.0, 0.0, 2.1, False),
        (1.0, 1.9, 9.0, True),
        (1.0, 2.1, 0.0, False),
    ],
)
def test_a_rise_is_larger_than_the_noise(older, noise, older_noise, is_risen):
    """To 4: than it was at the older snapshot. Of a first loss, 1, it is not known."""
    noises = {"noise": noise, "older_noise": older_noise}
    assert is_at_fault(a_rise(first=1.0, older=older, level=4.0, **noises)) == is_risen


def test_a_rise_that_noise_explains_is_left_alone():
    found = train(optaxclip.stabilize, TOO_LARGE, bowl_and_noise)
    assert found.numbers_after(DUE + 2) == NONE
    assert np.mean(found.loss[DUE - SPAN : DUE]) > 2 * found.loss[0]


@pytest.mark.parametrize(
    ("flag", "now", "older", "newer"),
    [
        ("is_confirmed", (2.0, 0.2), (2.0, 0.2), (3.0, 0.3)),
        ("is_failed", (1.0, 0.1), (1.0, 0.1), (3.0, 0.3)),
        ("is_copied", (1.0, 0.1), (2.0, 0.2), (1.0, 0.1)),
        ("is_swapped", (1.0, 0.1), (3.0, 0.3), (3.0, 0.3)),
    ],
)
def test_level_and_noise_move_with_the_snapshots(flag, now, older, newer):
    known = {"level": 1.0, "noise": 0.1, "older": 2.0, "older_noise": 0.2}
    before = a_rise(**known, first=4.0, newer=3.0, newer_noise=0.3)
    flags = dict.fromkeys(("is_confirmed", "is_failed", "is_copied", "is_swapped"))
    flags = {name: jnp.bool(name == flag) for name in flags}
    found = follow(before, **flags)
    np.testing.assert_allclose((found.level, found.noise), now)
    np.testing.assert_allclose((found.older, found.older_noise), older)
    np.testing.assert_allclose((found.newer, found.newer_noise), newer)


@pytest.mark.parametrize(
    ("first", "older", "newer", "level", "is_so"),
    [
        (1.0, 1.0, math.inf, 1.3, True),
        (1.0, 1.0, 1.3, 1.3, True),
        (1.0, 1.0, 1.3, 1.1, False),
        (1.0, 1.0, 1.1, 1.3, False),
        (1.0, 0.9, 1.3, 1.3, False),
        (-1.0, 1.0, 1.0, 1.0, False),
        (math.inf, math.inf, math.inf, math.inf, False),
    ],
)
def test_whether_a_loss_has_only_risen(first, older, newer, level, is_so):
    """Above its first level at the older snapshot, and by a fifth since the newer."""
    found = a_rise(first=first, level=level, older=older, newer=newer)
    assert has_only_risen(found) == is_so


def test_a_snapshot_that_is_no_better_costs_two_steps():
    found = train(optaxclip.stabilize, 0.05, harder)
    assert found.numbers_after(4 * DUE) == NONE | {"num_skipped": 2}
    alone = train(bare, 0.05, harder)
    here = jax.tree.map(lambda x: x[4 * DUE], found.params)
    two_before = jax.tree.map(lambda x: x[4 * DUE - 2], alone.params)
    chex.assert_trees_all_close(here, two_before, atol=1e-5)


def test_soon_after_a_trial_in_vain_up_to_ten_times_the_level_is_accepted():
    found = train(optaxclip.stabilize, 0.05, harder_and_one_outlier)
    assert found.numbers_after(4 * DUE) == NONE | {"num_exploded": 1, "num_skipped": 2}


@pytest.mark.slow
@pytest.mark.parametrize(("every", "num"), [(8, 0), (10, 1), (16, 1)])
def test_a_snapshot_needs_ten_steps_to_be_compared(every, num):
    found = train(short(every), 2.02, bowl)
    assert found.numbers_after(60)["num_rollbacks"] == num


@pytest.mark.slow
def test_without_smaller_steps_nothing_is_taken_back():
    """It would rise again, for ever."""

    def skip(optimizer):
        return optaxclip.skip_explosions(optimizer, rollback=True)

    assert train(skip, TOO_LARGE, bowl).numbers_after(2 * DUE) == NONE


def test_an_infinite_mask_among_the_parameters_is_no_reason_to_give_up():
    tx = optaxclip.stabilize(optax.sgd(1e-3))
    params: Any = {"w": jnp.ones(2), "mask": jnp.array([0, -jnp.inf])}
    state = tx.init(params)
    grads = {"w": jnp.ones(2), "mask": jnp.zeros(2)}
    update = jax.jit(tx.update)
    for i in range(DUE - 2):  # the last of them is compared
        updates, state = update(grads, state, params, value=1 + 0.03 * jnp.float32(i))
        params = optax.apply_updates(params, updates)
    optaxclip.raise_if_exploded(state, params)


def test_without_a_loss_nothing_is_known_of_its_level():
    found = train(optaxclip.stabilize, 2.02, bowl, has_loss=False)
    assert found.numbers_after(DUE + 2) == NONE
    norms = optaxclip.history(jax.tree.map(lambda x: x[DUE - 1], found.state)).norm
    assert np.mean(norms[-SPAN:]) > RISE * norms[0]


def test_on_eight_devices_the_pulls_are_those_of_the_whole():
    """Each device holds an eighth; the gradients of two point on, not back."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    rates = jnp.array([2.02] * 6 + [0.01] * 2)

    def train_on(specs):
        tx = optaxclip.stabilize(optax.scale(-1.0), specs=specs)

        def loop(params, rates):
            def step_once(carry, step):
                params, state = carry
                loss = 0.5 * jnp.sum(params**2)
                if specs is not None:
                    loss = jax.lax.psum(loss, "data")
                updates: Any
                updates, state = tx.update(params, state, params, value=loss)
                # Before a trial or a rollback asks for anything.
                updates = jnp.where(step < DUE - 1, updates * rates, updates)
                kept: Any = state
                after = optax.apply_updates(params, updates), state
                return after, kept["explosions"].carried

            (params, state), carried = jax.lax.scan(
                step_once, (params, tx.init(params)), jnp.arange(DUE + 2)
            )
            return params, carried, optaxclip.metrics(state)

        return loop

    start = jnp.ones(8)
    whole = jax.jit(train_on(None))(start, rates)
    shards = jax.jit(
        jax.shard_map(
            train_on(spec),
            mesh=mesh,
            in_specs=(spec, spec),
            out_specs=(spec, PartitionSpec(), PartitionSpec()),
            check_vma=False,
        )
    )(start, rates)
    chex.assert_trees_all_close(shards, whole, rtol=1e-5)
    assert whole[2]["explosions/num_rollbacks"] == 1
