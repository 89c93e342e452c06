"""Explosions: what is noticed, skipped, accepted, undone and told."""

import functools
import math
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optaxclip
from optaxclip import limits
from optaxclip.explosions.leading import fitted_growth
from optaxclip.explosions.recurring import num_passed
from optaxclip.explosions.rules import RULES
from optaxclip.explosions.state import COUNTS
from optaxclip.explosions.trials import PHASES

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PARAMS = {"a": jnp.ones(3), "b": {"c": 2 * jnp.ones((2, 2))}}
ONLY_NONFINITE: Any = {"norm": None, "share": None, "loss": None}


def grads_of(size, like: Any = PARAMS) -> Any:
    """Gradients with a norm of `size` in each leaf."""
    return jax.tree.map(lambda x: np.full_like(x, size / math.sqrt(x.size)), like)


def healthy(num, seed=0) -> Any:
    rng = np.random.default_rng(seed)
    return np.exp(0.2 * rng.standard_normal(num)).astype(np.float32)


@functools.cache
def update_of(tx) -> Any:
    return jax.jit(lambda g, s, p, value: tx.update(g, s, p, value=value))


apply_updates = jax.jit(optax.apply_updates)


def run(tx, sizes, losses=None, state: Any = None, params: Any = PARAMS) -> Any:
    """(parameters, state) after gradients of these sizes, and the updates."""
    state = tx.init(params) if state is None else state
    losses = np.ones(len(sizes)) if losses is None else losses
    found = []
    for size, loss in zip(sizes, losses, strict=True):
        grads = size if isinstance(size, dict) else grads_of(size)
        updates, state = update_of(tx)(grads, state, params, jnp.float32(loss))
        params = apply_updates(params, updates)
        found.append(updates)
    return params, state, found


def fired(state) -> list[str]:
    flags = optaxclip.history(state).fired[-1]
    return [rule for rule, flag in zip(RULES, flags, strict=True) if flag]


def is_zero(updates) -> bool:
    return not any(np.any(x) for x in jax.tree.leaves(updates))


DETECT = optaxclip.detect_explosions()
SKIP = optaxclip.skip_explosions(optax.sgd(0.01, momentum=0.9))
SKIP_PLAIN = optaxclip.skip_explosions(optax.identity())
MEND = optaxclip.skip_explosions(optax.adam(0.1), norm=1e35, loss=3.0)

STABILIZE = optaxclip.stabilize(optax.sgd(1e-6))
BAD, FINE = [1e3] * 3, [1.0] * 2
"""Three explosions, and two steps at the snapshot that are fine: one rollback."""


def explode(tx, sizes, state: Any = None, params: Any = PARAMS) -> Any:
    """As `run`, with the sizes as losses, which speak against the parameters."""
    return run(tx, sizes, sizes, state, params)


@pytest.mark.parametrize(
    ("size", "loss", "rules"),
    [
        (1.0, 1.0, []),
        (50.0, 1.0, ["norm"]),
        (1.0, 50.0, ["loss"]),
        (50.0, 50.0, ["norm", "loss"]),
        (math.nan, 1.0, ["nonfinite"]),
        (math.inf, 1.0, ["nonfinite"]),
        (1.0, math.nan, ["nonfinite"]),
        (1.0, math.inf, ["nonfinite"]),
        (2e38, 1.0, ["norm"]),
        (0.0, 1.0, []),
        (1.0, -5.0, []),
    ],
)
def test_which_rules_fire(size, loss, rules):
    _, state, _ = run(DETECT, healthy(20))
    _, state, updates = run(DETECT, [size], [loss], state)
    assert fired(state) == rules
    chex.assert_trees_all_equal(updates[0], grads_of(size))


@pytest.mark.parametrize(
    ("size", "rules"),
    [(0.9e-3, []), (1.1e-3, ["norm"]), (2.0, ["norm", "loss"])],
)
def test_what_is_far_below_the_start_is_no_explosion(size, rules):
    """Norm and loss begin at 1 and fall to 1e-6: up to 1/1000 they may rise again."""
    falling = 10.0 ** np.linspace(0, -6, 60)
    before = [1.0] * 8 + falling.tolist() + [1e-6] * 128
    _, state, _ = run(DETECT, before, before)
    assert optaxclip.metrics(state)["explosions/num_exploded"] == 0
    _, state, _ = run(DETECT, [size], [size], state)
    assert fired(state) == rules


@pytest.mark.slow
def test_a_layer_that_explodes_under_a_larger_one():
    _, state, _ = run(DETECT, healthy(100))
    grads = {"a": grads_of(1.0)["a"], "b": grads_of(1e-3)["b"]}
    _, state, _ = run(DETECT, [grads] * 300, state=state)
    assert not fired(state)
    for step in range(3):
        grads["b"] = grads_of(4e-2)["b"]
        _, state, _ = run(DETECT, [grads], state=state)
        assert fired(state) == (["share"] if step == 2 else [])
    last = state["explosions"].began
    assert last.leaf == 1
    np.testing.assert_allclose(last.share, 4e-2, rtol=1e-3)


def test_the_leaf_that_led():
    _, state, _ = run(DETECT, healthy(20))
    for leaf, name in enumerate(("a", "b")):
        grads = grads_of(1.0) | {name: grads_of(100.0)[name]}
        _, after, _ = run(DETECT, [grads], state=state)
        assert after["explosions"].began.leaf == leaf
        # Beside one that is non-finite no growth counts.
        other = "ba"[leaf]
        grads = grads | {other: grads_of(math.nan)[other]}
        _, after, _ = run(DETECT, [grads], state=state)
        assert after["explosions"].began.leaf == 1 - leaf


def naive_leaf(norms, step) -> int:
    """The leaf that led on a step, in float64 and one by one."""
    now = norms[step].astype(float)
    if not np.isfinite(now).all():
        return int(np.flatnonzero(~np.isfinite(now))[0])
    growth = np.zeros(len(now))
    for leaf in range(len(now)):
        for ago in (1, 9, 17, 25, 33, 41, 49, 57):
            before = norms[step - ago, leaf] if ago <= step else 0
            if now[leaf] > 0 and 0 < before < np.inf:
                growth[leaf] += np.log(now[leaf] / before)
    return int(np.argmax(growth)) if growth.max() > 0 else -1


def test_the_leaf_that_led_is_that_of_a_naive_search():
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(size=(300, 4))).astype(np.float32)
    norms[rng.random(norms.shape) < 0.1] = 0
    norms[rng.random(norms.shape) < 0.02] = np.nan
    norms[[50, 90], [1, 2]] = np.inf
    norms[100:110] = norms[100]  # no growth but against the past
    norms[120] = 1e-3  # less than ever
    detect = optaxclip.detect_explosions()

    @jax.jit
    def run_all(norms):
        def step(state, norms):
            return detect.update(list(norms), state)[1], ()

        return jax.lax.scan(step, detect.init([jnp.zeros([])] * 4), norms)[0]

    for start, end in ((0, 256), (44, 300)):  # all that the record keeps
        found = optaxclip.history(run_all(norms[:end])).leaf
        expected = [naive_leaf(norms[:end], step) for step in range(end)]
        np.testing.assert_array_equal(found, expected[start:])
        assert set(expected) == {-1, 0, 1, 2, 3}


@pytest.mark.slow
def test_no_leaf_leads_on_the_first_step():
    tx = optaxclip.detect_explosions(norm=1.0)
    _, state, _ = run(tx, [grads_of(0.0) | {"b": grads_of(9.0)["b"]}])
    assert optaxclip.metrics(state)["explosions/leading_leaf"] == -1
    assert "grown most" not in optaxclip.explain(state, PARAMS)


def test_counts_and_the_step_at_which_it_began():
    sizes = [*healthy(20), 50, 1, math.nan, math.nan, *healthy(11), 900, 1]
    _, state, _ = run(DETECT, sizes)
    state = state["explosions"]
    counts = COUNTS.unpack(np.asarray(state.record.counts))
    assert counts == {
        "steps": 37,
        "nonfinite": 2,
        "norm": 2,
        "share": 0,
        "loss": 0,
        "exploded": 4,
        "skipped": 0,
        "rollbacks": 0,
        "in_a_row": 0,
        "nonfinite_in_a_row": 0,
        "nonfinite_updates_in_a_row": 0,
        "suspect_in_a_row": 0,
        "gave_up": 0,
        "blocked_rollbacks": 0,
        "mended": 0,
        "phase": 0,
        "age": 0,
        "strikes": 0,
        "last_rollback": -1,
        "last_cut": -1,
        "last_outlier": -1,
        "last_outlier_but_one": -1,
        "dead_in_a_row": 0,
        "most_alive": 0,
        "next_most": 0,
        "last_skipped": -1,
        "last": 35,
    }
    assert state.first_nonfinite.step == 22
    # 22 and 23 belong to the explosion of 20, 35 comes more than ten steps later.
    assert state.began.step == 35
    _, state, _ = run(DETECT, sizes[:30])
    assert state["explosions"].began.step == 20


def test_the_growth_of_the_norm():
    fitted = jax.jit(fitted_growth)
    sizes = [1.0] * 20 + [1.3**i for i in range(8)]
    for bad in (math.nan, math.inf):
        _, state, _ = run(DETECT, [*sizes, bad])
        growth = fitted(state["explosions"].record)
        np.testing.assert_allclose(growth, 1.3, rtol=1e-5)
    _, state, _ = run(DETECT, [3.0])
    assert fitted(state["explosions"].record) == 1
    _, state, _ = run(DETECT, [1.0, 2.0, 4.0])
    growth = fitted(state["explosions"].record)
    np.testing.assert_allclose(growth, 2, rtol=1e-6)


@pytest.mark.slow
def test_any_limit_is_a_rule():
    tx = optaxclip.detect_explosions(
        norm=10.0, share=0.9, loss=limits.window_sigma(6.0, window=8)
    )
    _, state, _ = run(tx, [0.1] * 65, [-1, -2] * 32 + [-1])
    assert fired(state) == []
    assert fired(run(tx, [8.0], [5.0], state)[1]) == ["norm", "loss"]
    assert fired(run(tx, [1.0], [-1.5], state)[1]) == []
    for size, rules in {1.0: [], 3.0: ["share"]}.items():  # tenfold, thirtyfold
        grads = grads_of(0.1) | {"b": grads_of(size)["b"]}
        assert fired(run(tx, [grads], [-1.5], state)[1]) == rules
    tx = optaxclip.detect_explosions(**ONLY_NONFINITE)
    assert fired(run(tx, [1.0, 1e30], [1.0, 1e30])[1]) == []


def test_after_the_optimizer_the_norm_is_that_of_the_update():
    tx = optax.chain(optax.sgd(1e-3), optaxclip.detect_explosions())
    _, state, _ = run(tx, [1.0])
    norm = optaxclip.metrics(state)["explosions/norm"]
    np.testing.assert_allclose(norm, 1e-3 * math.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize("tx", [DETECT, pytest.param(SKIP, marks=pytest.mark.slow)])
def test_trees_without_leaves_and_losses_of_other_types(tx):
    assert jax.jit(tx.update)({}, tx.init({}), {})[0] == {}
    state = jax.eval_shape(tx.init, PARAMS)
    for value in (1, jnp.bfloat16(3), None):
        _, new = jax.eval_shape(tx.update, PARAMS, state, PARAMS, value=value)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    with pytest.raises(ValueError, match=re.escape("not of shape (2,)")):
        jax.eval_shape(tx.update, PARAMS, state, PARAMS, value=jnp.ones(2))


@pytest.mark.slow
def test_100_000_heavy_tailed_steps():
    rng = np.random.default_rng(0)
    norms = np.exp(0.5 * rng.standard_normal(100_000)).astype(np.float32)
    losses = np.exp(0.2 * rng.standard_normal(100_000)).astype(np.float32)
    tx: Any = optaxclip.skip_explosions(optax.sgd(1e-9))

    def step(state, row):
        _, state = tx.update({"a": row[:1]}, state, value=row[1])
        return state, state["explosions"].explosions.record.counts

    state = tx.init({"a": jnp.ones(1)})
    rows = np.stack([norms, losses], axis=1)
    state, counts = jax.jit(lambda *args: lax.scan(step, *args))(state, rows)
    counts = COUNTS.unpack(np.asarray(counts)[-1])
    assert counts["steps"] == 100_000
    assert counts["exploded"] <= 100  # 10 in 10,000
    assert counts["share"] == counts["nonfinite"] == 0
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init({"a": jnp.ones(1)}))


# What others do, and what this library must not do.


@pytest.mark.slow
def test_apply_if_finite_applies_the_nan_in_the_end():
    theirs = optax.with_extra_args_support(optax.apply_if_finite(optax.adam(0.1), 3))
    ours = optaxclip.skip_explosions(optax.adam(0.1))
    sizes = [1.0] + [math.nan] * 120 + [1.0] * 5
    params, _, _ = run(theirs, sizes)
    assert np.isnan(params["a"]).all()
    params, state, found = run(ours, sizes)
    chex.assert_tree_all_finite((params, state["explosions"].inner_state))
    assert all(is_zero(updates) for updates in found[1:121])
    expected, _, _ = run(ours, [1.0] * 6)
    chex.assert_trees_all_equal(params, expected)


@pytest.mark.slow
def test_apply_if_finite_tests_only_the_incoming_gradients():
    inner = optax.stateless(lambda u, p: jax.tree.map(lambda x: x / (x - 1), u))
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    theirs = optax.with_extra_args_support(optax.apply_if_finite(inner, 3))
    assert not np.isfinite(run(theirs, [grads])[0]["a"]).any()
    params, _, _ = run(optaxclip.skip_explosions(inner), [grads])
    chex.assert_trees_all_equal(params, PARAMS)


def skip_by_product(tx, sigmas=6.0, window=128) -> Any:
    """As Levanter and OLMo-core: the update times 0, and every norm is learned."""

    def init(params):
        return tx.init(params), jnp.zeros(window), jnp.zeros([], jnp.int32)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        inner, norms, num = state
        norm = optaxclip.global_norm(updates)
        known = jnp.arange(window) < num
        mean, std = jnp.mean(norms, where=known), jnp.std(norms, where=known)
        taken = (norm - mean <= sigmas * std) | (num < window // 2)
        norms = norms.at[num % window].set(norm)
        updates, new = tx.update(updates, inner, params)
        factor = taken.astype(jnp.float32)
        updates = jax.tree.map(lambda x: factor * x, updates)
        return updates, (new, norms, num + 1)

    return optax.GradientTransformationExtraArgs(init, update)


@pytest.mark.slow
def test_levanter_lets_the_nan_through_and_is_blind_afterward():
    theirs = skip_by_product(optax.sgd(0.01))
    params, _, _ = run(theirs, [*healthy(70), math.nan])
    assert np.isnan(params["a"]).all()
    # Blind: a window with a NaN compares as False; nothing is taken, spike or not.
    _, state, _ = run(theirs, [*healthy(70), math.nan])
    _, _, found = run(theirs, [1.0], state=state)
    assert is_zero(found[0])
    params, state, found = run(SKIP, [*healthy(70), math.nan])
    chex.assert_tree_all_finite(params)
    assert is_zero(found[-1])
    assert not is_zero(run(SKIP, [1.0], state=state)[2][0])
    assert is_zero(run(SKIP, [100.0], state=state)[2][0])


def skip_above_ema(tx, multiple=20.0, decay=0.99) -> Any:
    """As axlearn: only accepted steps are learned."""

    def init(params):
        return tx.init(params), jnp.ones([])

    def update(updates, state, params=None, **extra_args):
        del extra_args
        inner, mean = state
        norm = optaxclip.global_norm(updates)
        taken = norm < multiple * mean
        updates, new = tx.update(updates, inner, params)
        updates, inner = jax.tree.map(
            lambda x, y: jnp.where(taken, x, y),
            (updates, new),
            (jax.tree.map(jnp.zeros_like, updates), inner),
        )
        mean = jnp.where(taken, decay * mean + (1 - decay) * norm, mean)
        return updates, (inner, mean)

    return optax.GradientTransformationExtraArgs(init, update)


@pytest.mark.slow
def test_axlearn_rejects_a_new_regime_for_ever():
    sizes = [*healthy(100), *(100 * healthy(500, seed=1))]
    _, _, found = run(skip_above_ema(optax.sgd(1e-6)), sizes)
    assert all(is_zero(updates) for updates in found[100:])
    _, _, found = run(SKIP, sizes)
    is_skipped = [is_zero(updates) for updates in found[100:]]
    assert is_skipped[:9] == [True] * 9
    assert sum(is_skipped) <= 12


# The responses.


@pytest.mark.slow
@pytest.mark.parametrize("max_consecutive", [1, 2, 10])
def test_a_change_of_regime_is_accepted_within_max_consecutive(max_consecutive):
    tx = optaxclip.skip_explosions(optax.sgd(0.01), max_consecutive=max_consecutive)
    _, state, _ = run(tx, healthy(70))
    _, state, found = run(tx, [1e3] * 30, state=state)
    is_skipped = [is_zero(updates) for updates in found]
    assert is_skipped == [True] * (max_consecutive - 1) + [False] * (
        31 - max_consecutive
    )
    metrics = optaxclip.metrics(state)
    np.testing.assert_allclose(
        metrics["explosions/skipped_fraction"], (max_consecutive - 1) / 100, rtol=1e-6
    )


@pytest.mark.usefixtures("x64", "strict")
def test_outliers_are_counted_in_32_bits():
    """A sum of flags has 64, and cannot be compared with a count of steps then."""
    now = {"steps": 9, "in_a_row": 1, "last_outlier": 4, "last_outlier_but_one": 2}
    found = num_passed({name: jnp.int32(x) for name, x in now.items()})
    assert (found, found.dtype) == (2, jnp.int32)


@pytest.mark.parametrize(
    ("gap", "size", "is_taken"),
    [
        pytest.param(5, 20.0, True, marks=pytest.mark.slow),
        (125, 20.0, True),
        (126, 20.0, False),
        (5, 28.0, True),
        (5, 32.0, False),
        (5, 1e3, False),
    ],
)
def test_the_third_outlier_within_128_steps_is_taken(gap, size, is_taken):
    """It is clipped and learned; above ten times the limit it is skipped each time."""
    sizes = [*healthy(128), size, 1.0, size, *healthy(gap)]
    _, state, found = explode(SKIP_PLAIN, sizes)
    limit = np.asarray(optaxclip.metrics(state)["explosions/norm_limit"])
    rules = state["explosions"].explosions.rule_states
    assert [i for i, updates in enumerate(found) if is_zero(updates)] == [128, 130]
    _, state, found = explode(SKIP_PLAIN, [size], state=state)
    assert optaxclip.metrics(state)["explosions/num_exploded"] == 3
    expected = limit if is_taken else 0
    np.testing.assert_allclose(optaxclip.global_norm(found[0]), expected, rtol=0.05)
    learned = jax.tree.map(
        lambda x, y: np.any(x != y),
        rules,
        state["explosions"].explosions.rule_states,
    )
    assert any(jax.tree.leaves(learned)) == is_taken


@pytest.mark.parametrize(("num", "is_taken"), [(1, True), (42, True), (43, False)])
def test_in_the_first_64_steps_the_second_outlier_is_taken(num, is_taken):
    _, _, found = explode(SKIP_PLAIN, [*healthy(20), 20.0, *healthy(num), 20.0])
    skipped = [i for i, updates in enumerate(found) if is_zero(updates)]
    assert skipped == ([20] if is_taken else [20, 21 + num])


def test_an_outlier_may_have_any_loss():
    """As a first reward where values are near zero: hundreds of times the usual loss.

    Each 50th step is one, so three of them are within 128.
    """
    sizes, losses = healthy(320), healthy(320, seed=1)
    sizes[100::50] *= 8
    losses[100::50] *= 500
    _, state, found = run(SKIP_PLAIN, sizes, losses)
    assert [i for i, updates in enumerate(found) if is_zero(updates)] == [100, 150]
    assert optaxclip.metrics(state)["explosions/num_exploded"] == 5


@pytest.mark.parametrize(
    ("size", "loss", "is_taken"),
    [
        (20.0, 1.0, True),
        (20.0, -50.0, True),
        (20.0, 50.0, False),
        (20.0, math.inf, False),
        (20.0, math.nan, False),
        (32.0, 1.0, False),
    ],
)
def test_an_outlier_of_the_norm_alone_is_clipped(size, loss, is_taken):
    """As a first reward: skipped each time, it would never be learned."""
    _, state, _ = run(SKIP_PLAIN, healthy(128))
    limit = np.asarray(optaxclip.metrics(state)["explosions/norm_limit"])
    _, state, found = run(SKIP_PLAIN, [size], [loss], state)
    assert optaxclip.metrics(state)["explosions/num_exploded"] == 1
    expected = limit if is_taken else 0
    np.testing.assert_allclose(optaxclip.global_norm(found[0]), expected, rtol=0.05)


def test_where_no_loss_is_known_an_outlier_of_the_norm_is_skipped():
    """All are inf, and so is their limit."""
    _, _, found = run(SKIP_PLAIN, [*healthy(20), 20.0], [math.inf] * 21)
    assert [i for i, updates in enumerate(found) if is_zero(updates)] == [20]


def test_only_the_first_in_a_row_is_an_outlier():
    sizes = [20.0, 1.0, 20.0, 1.0, 20.0, 20.0, math.nan, 20.0, 1.0, 20.0]
    _, _, found = explode(SKIP_PLAIN, [*healthy(128), *sizes])
    skipped = [i for i, updates in enumerate(found[128:]) if is_zero(updates)]
    assert skipped == [0, 2, 5, 6, 7]


def test_while_updates_are_cooled_down_no_outlier_is_taken():
    tx = optaxclip.skip_explosions(optax.identity(), cool_down=0.5, recovery=1.0)
    _, state, _ = explode(tx, [1.0, *[math.nan] * 3, *healthy(128)])
    assert state["explosions"].scale == 0.5
    _, _, found = explode(tx, [20.0, 1.0] * 3, state=state)
    assert [is_zero(updates) for updates in found] == [True, False] * 3


def test_batches_of_a_rare_kind_are_learned():
    """One of eight is six times larger: after the second of them none is skipped."""
    sizes = healthy(320)
    sizes[64::8] *= 6
    _, state, found = explode(SKIP_PLAIN, sizes)
    assert [i for i, updates in enumerate(found) if is_zero(updates)] == [64, 72]
    assert state["explosions"].explosions.counts.last < 200


def test_what_explodes_and_passes_makes_a_trial_less_likely():
    """Two outliers passed: five suspect steps are needed and not three."""
    before = [*healthy(128), 8.0, 1.0, 8.0, 1.0]
    params, state, _ = explode(STABILIZE, before)
    for num, phase in [(4, "training"), (1, "first trial")]:
        params, state, _ = explode(STABILIZE, [1e3] * num, state, params)
        assert PHASES[state["explosions"].explosions.counts.phase] == phase


@pytest.mark.parametrize("tx", [SKIP_PLAIN, STABILIZE], ids=["skip", "rollback"])
def test_a_loss_of_inf_does_not_keep_large_norms_from_being_accepted(tx):
    """In float16 the loss may overflow, with finite gradients."""
    sizes = [*healthy(80), *[1e3] * 12]
    _, _, found = run(tx, sizes, [*[1.0] * 80, *[math.inf] * 12])
    assert [is_zero(updates) for updates in found[80:]] == [True] * 9 + [False] * 3


@pytest.mark.slow
def test_an_explosion_that_is_the_only_one_of_its_row_may_be_accepted():
    tx = optaxclip.skip_explosions(optax.sgd(1e-6), rollback=True, max_consecutive=1)
    _, _, found = explode(tx, [*healthy(80), 1e3, 1.0, 1e3])
    assert not any(map(is_zero, found))


def test_a_rollback_without_a_cut_keeps_the_next_cut_a_first_one():
    _, state, _ = explode(STABILIZE, [*healthy(80), *BAD, *FINE])
    uncut = [*[1.0] * 400, *BAD, 100.0, 100.0]
    _, state, _ = explode(STABILIZE, [*uncut, *[1.0] * 70, *BAD, *FINE], state=state)
    assert optaxclip.metrics(state)["explosions/num_rollbacks"] == 3
    assert state["explosions"].scale == 1 / 16


@pytest.mark.parametrize(("first", "scale"), [(1.0, 1 / 64), (2.0, 1 / 16)])
def test_a_later_cut_is_full_if_the_loss_has_only_risen(first, scale):
    """From 1 to 1.5 in 100 steps; or that after a step with a loss of 2."""
    losses = [first, *np.linspace(1, 1.5, 100), *BAD, *FINE]
    _, state, _ = run(STABILIZE, [*healthy(101), *BAD, *FINE], losses)
    assert optaxclip.metrics(state)["explosions/num_rollbacks"] == 1
    assert state["explosions"].scale == scale


@pytest.mark.slow
def test_without_a_limit_on_the_norm_no_outlier_is_taken():
    tx = optaxclip.skip_explosions(optax.sgd(1e-6), norm=None)
    _, _, found = explode(tx, [*healthy(20), 5.0, 1.0, 5.0, 1.0, 5.0])
    assert [is_zero(updates) for updates in found[20:]] == [True, False] * 2 + [True]


def test_a_row_of_large_norms_does_not_accept_a_loss_that_explodes():
    """Twelve norms above their limit, of which the first is taken, and those from the
    tenth on; then the loss grows."""
    norms = [*healthy(128), *[20.0] * 12]
    params, state, found = run(STABILIZE, norms)
    expected = [False, *[True] * 8, *[False] * 3]
    assert [is_zero(updates) for updates in found[-12:]] == expected
    _, state, found = run(STABILIZE, [20.0] * 5, [1e6] * 3 + [1.0] * 2, state, params)
    assert optaxclip.metrics(state)["explosions/num_rollbacks"] == 1
    assert is_zero(found[0])


def test_what_is_accepted_may_grow_tenfold_and_not_further():
    """1e3 is accepted; of 27e3 the first leads to the snapshot and the second back."""
    params, state, _ = explode(STABILIZE, [*healthy(20), *BAD, 1e3])
    last_skipped = []
    for size in [1e3, 3e3, 9e3, *[27e3] * 3]:
        params, state, _ = explode(STABILIZE, [size], state, params)
        last_skipped.append(int(state["explosions"].explosions.counts.last_skipped))
    assert last_skipped == [23, 23, 23, 27, 28, 28]
    assert optaxclip.metrics(state)["explosions/num_rollbacks"] == 0


def test_a_snapshot_that_is_better_but_suspect_does_not_cut_the_steps():
    """The data have changed: so it is with classes that are added."""
    _, state, _ = explode(STABILIZE, [*healthy(80), *BAD, 100.0, 100.0])
    assert optaxclip.metrics(state)["explosions/num_rollbacks"] == 1
    assert state["explosions"].scale == 1
    # Nor does it make the next cut a repeated one.
    _, state, _ = explode(STABILIZE, [*[1.0] * 70, *BAD, *FINE], state=state)
    assert optaxclip.metrics(state)["explosions/num_rollbacks"] == 2
    assert state["explosions"].scale == 1 / 16


@pytest.mark.slow
def test_what_is_accepted_is_clipped_until_it_is_usual():
    tx = optaxclip.skip_explosions(optax.sgd(1.0))
    _, state, _ = run(tx, healthy(130))
    before = np.asarray(optaxclip.metrics(state)["explosions/norm_limit"])
    _, state, found = run(tx, [math.nan, *[1e3] * 30], state=state)
    sizes = np.array([optaxclip.global_norm(updates) for updates in found])
    assert list(sizes[:9]) == [0] * 9
    np.testing.assert_allclose(sizes[9:16], before, rtol=0.05)  # of a place or two
    assert optaxclip.metrics(state)["explosions/is_exploded"] == 0
    np.testing.assert_allclose(sizes[-1], 1e3 * math.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)]
)
def test_an_accepted_norm_of_any_size_is_at_most_its_limit(dtype):
    params = {"a": jnp.ones(4, dtype), "mask": jnp.ones(3, int)}
    tx = optaxclip.skip_explosions(
        optax.identity(), norm=2.0, share=None, loss=None, max_consecutive=1
    )
    for size, expected in [(1.0, 1), (8.0, 2), (1e38, 2), (3e38, 0)]:
        grads = {"a": jnp.full(4, size / 2, dtype), "mask": params["mask"]}
        if expected == 0:  # beyond the largest float
            grads["a"] = grads["a"] * 2
        updates, _ = update_of(tx)(grads, tx.init(params), params, None)
        norm = optaxclip.global_norm(updates)
        np.testing.assert_allclose(norm, expected, rtol=8 * float(jnp.finfo(dtype).eps))
        assert updates["a"].dtype == dtype
        np.testing.assert_array_equal(updates["mask"], params["mask"])


@pytest.mark.parametrize(
    "limit", [pytest.param(-1.0, marks=pytest.mark.slow), math.nan]
)
def test_what_is_accepted_with_a_bad_limit_is_zero(limit):
    tx = optaxclip.skip_explosions(
        optax.identity(), norm=lambda _: limit, share=None, loss=1.0, max_consecutive=1
    )
    _, _, found = run(tx, [2.0], [5.0])
    assert is_zero(found[0])


@pytest.mark.parametrize("bad", [1e60, 1e-60])
def test_a_number_is_a_limit_for_norms_beyond_float32(x64, bad):
    tx = optaxclip.detect_explosions(norm=bad, share=None, loss=None)
    params = {"a": jnp.ones(2, jnp.float64)}
    for size, expected in ((0.1 * bad, 0), (10 * bad, 1)):
        _, state = jax.jit(tx.update)({"a": jnp.full(2, size)}, tx.init(params))
        assert state["explosions"].counts.norm == expected


@pytest.mark.slow
def test_a_limit_with_a_narrow_state_narrows_no_norm():
    def update(norms, state, param_norms):
        del param_norms
        return jnp.full_like(norms, jnp.inf), state

    narrow = optaxclip.limits.Limit(lambda sizes: jnp.ones([], jnp.bfloat16), update)
    tx = optaxclip.detect_explosions(norm=narrow, share=None, loss=None)
    grads = {"a": jnp.array([100_000.6])}
    _, state = tx.update(grads, tx.init(grads))
    found = optaxclip.metrics(state)["explosions/norm"]
    np.testing.assert_allclose(found, 100_000.6, rtol=1e-6)


@pytest.mark.slow
def test_gradients_wider_than_the_parameters_stay_as_they_are(x64):
    params = {"a": jnp.ones(2, jnp.float32)}
    grads = {"a": jnp.array([1 / 3, 1e-50], jnp.float64)}
    tx = optaxclip.skip_explosions(optax.identity())
    updates, _ = jax.jit(tx.update)(grads, tx.init(params))
    chex.assert_trees_all_equal(updates, grads)


def test_parameters_that_accepted_steps_ruin_are_taken_back():
    """Kicks that grow, all of them finite; beyond 2 the loss is NaN."""
    tx = optaxclip.stabilize(optax.sgd(0.05))
    rng = np.random.default_rng(0)
    noise = rng.choice([-1, 1], 500) * np.exp(0.1 * rng.standard_normal(500))
    kicks = np.zeros(500)
    kicks[200:230] = 10 * 1.6 ** np.arange(30)

    def step(carry, x):
        params, state = carry
        noise, kick = x
        is_bad = params["a"] > 2
        grad = jnp.where(kick > 0, -kick, 0.2 * (params["a"] - 1) + noise)
        grads = {"a": jnp.where(is_bad, jnp.nan, grad)}
        loss = jnp.where(is_bad, jnp.nan, 1 + 0.1 * noise)
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), ()

    carry = {"a": jnp.ones([])}, tx.init({"a": jnp.ones([])})
    given = jnp.float32(noise), jnp.float32(kicks)
    (params, state), _ = jax.jit(lambda c: lax.scan(step, c, given))(carry)
    assert params["a"] < 2
    metrics = optaxclip.metrics(state)
    assert metrics["explosions/num_rollbacks"] > 1
    assert metrics["explosions/num_in_a_row"] == 0


def test_gives_up_after_100_non_finite_steps_in_a_row_and_never_takes_one():
    _, state, _ = run(SKIP, [1.0] + [math.nan] * 99)
    assert not state["explosions"].gave_up
    optaxclip.raise_if_exploded(state)
    _, state, found = run(SKIP, [math.nan], state=state)
    assert is_zero(found[0])
    assert optaxclip.metrics(state)["explosions/gave_up"] == 1
    with pytest.raises(optaxclip.ExplosionError, match="100 non-finite steps in a row"):
        optaxclip.raise_if_exploded(state, PARAMS)
    _, state, _ = run(SKIP, [1.0], state=state)
    assert not state["explosions"].gave_up


def test_cool_down_after_explosions_in_a_row_and_recovery():
    tx = optaxclip.skip_explosions(optax.sgd(1.0), cool_down=0.5, recovery=1.1)
    nans = [math.nan] * 3
    _, state, found = run(tx, [1.0, *nans[:2], 1.0, *nans, 1.0, 1.0])
    sizes = [optaxclip.leaf_norms(updates)[0] for updates in found]
    expected = [1, 0, 0, 1, 0, 0, 0, 0.55, 0.605]
    np.testing.assert_allclose(sizes, expected, rtol=1e-6)
    np.testing.assert_allclose(state["explosions"].scale, 0.605, rtol=1e-6)
    _, state, _ = run(tx, [*nans, 1.0] * 20, state=state)
    np.testing.assert_allclose(state["explosions"].scale, 1.1 * 2**-12, rtol=1e-6)
    _, state, _ = run(tx, [1.0] * 100, state=state)
    assert state["explosions"].scale == 1


@pytest.mark.slow
def test_recovery_may_be_at_once():
    tx = optaxclip.skip_explosions(optax.sgd(1.0), cool_down=0.01, recovery=math.inf)
    _, state, found = run(tx, [1.0, *[math.nan] * 3, 1.0])
    np.testing.assert_allclose(optaxclip.leaf_norms(found[-1])[0], 1)
    assert state["explosions"].scale == 1


@pytest.mark.slow
def test_stabilize_cools_down_when_it_happens_again():
    _, state, _ = explode(STABILIZE, [*healthy(8), *BAD, *FINE])
    metrics = optaxclip.metrics(state)
    assert metrics["explosions/num_skipped"] == 5
    assert metrics["explosions/num_rollbacks"] == 1
    np.testing.assert_allclose(state["explosions"].scale, 1 / 64, rtol=1e-6)
    _, later, _ = explode(STABILIZE, [1.0] * 10, state=state)
    scale = 1.002**10 / 64
    np.testing.assert_allclose(later["explosions"].scale, scale, rtol=1e-5)
    _, state, _ = explode(STABILIZE, [*BAD, *FINE], state=later)
    assert optaxclip.metrics(state)["explosions/num_rollbacks"] == 2
    np.testing.assert_allclose(state["explosions"].scale, scale / 8, rtol=1e-5)


@pytest.mark.parametrize(
    ("before", "size", "num"), [(20, 10.0, 6), (20, 100.0, 3), (80, 10.0, 3)]
)
def test_early_losses_not_far_above_their_limit_need_more_of_them(before, size, num):
    """Early the limit may be low by chance: it is 3.2 here."""
    for exploded, rollbacks in ((num - 1, 0), (num, 1)):
        sizes = [*healthy(before), *[size] * exploded, *FINE]
        _, state, _ = explode(STABILIZE, sizes)
        assert optaxclip.metrics(state)["explosions/num_rollbacks"] == rollbacks


def test_without_a_rule_on_the_loss_the_norm_speaks_against_the_parameters():
    tx = optaxclip.stabilize(optax.sgd(1e-6), loss=None)
    _, state, _ = run(tx, [*healthy(8), *BAD, *FINE])  # with losses of 1
    assert optaxclip.metrics(state)["explosions/num_rollbacks"] == 1


@pytest.mark.slow
def test_a_rollback_long_after_another_is_a_first_one():
    _, state, _ = explode(STABILIZE, [*healthy(8), *BAD, *FINE])
    _, state, _ = explode(STABILIZE, [*healthy(300), *BAD, *FINE], state=state)
    assert optaxclip.metrics(state)["explosions/num_rollbacks"] == 2
    assert state["explosions"].scale == 1 / 64


@pytest.mark.parametrize(
    "trials", [pytest.param([1e3], marks=pytest.mark.slow), [1.0, 1e3]]
)
def test_what_outlasts_the_snapshot_is_accepted(trials):
    """The parameters come back, to a rounding, and the steps are taken, clipped."""
    tx = optaxclip.stabilize(optax.sgd(0.01))
    before, state, _ = explode(tx, healthy(20))
    params, state, _ = explode(tx, BAD, state=state, params=before)
    assert not np.allclose(params["a"], before["a"], atol=1e-3)  # at the snapshot
    inner = state["explosions"].inner_state
    params, state, _ = explode(tx, trials, state=state, params=params)
    chex.assert_trees_all_close(params, before, rtol=2e-7)
    chex.assert_trees_all_equal(state["explosions"].inner_state, inner)
    _, state, found = explode(tx, [1e3], state=state, params=params)
    metrics = optaxclip.metrics(state)
    assert metrics["explosions/num_rollbacks"] == 0
    assert metrics["explosions/scale"] == 1
    norm = optaxclip.global_norm(found[0])
    np.testing.assert_allclose(norm, 0.01 * metrics["explosions/norm_limit"], rtol=1e-5)


def test_rollback_returns_to_a_quiet_step():
    tx = optaxclip.skip_explosions(optax.adam(0.1), rollback=True, snapshot_every=5)
    history = []
    params: Any = PARAMS
    state: Any = None
    for size in healthy(17):
        history.append(params)
        params, state, _ = explode(tx, [size], state=state, params=params)
    # Snapshots at steps 4, 9 and 14; the one of 9 is the older when it explodes.
    before, inner = params, state["explosions"].inner_state
    params, state, _ = explode(tx, [1e3, 1e3], state=state, params=params)
    chex.assert_trees_all_equal(params, before)
    expected = history[9]
    for size, num in ((1e3, 0), (1.0, 0), (1.0, 1)):
        params, state, _ = explode(tx, [size], state=state, params=params)
        assert optaxclip.metrics(state)["explosions/num_rollbacks"] == num
        chex.assert_trees_all_close(params, expected, rtol=2e-7)
    # What exploded was skipped, so nothing of it is in the moments.
    chex.assert_trees_all_equal(state["explosions"].inner_state, inner)
    older, newer = state["explosions"].snapshots
    chex.assert_trees_all_equal(older, expected)
    # The newer is what exploded. It never takes the place of the older.
    chex.assert_trees_all_equal(newer, before)
    _, state, _ = explode(tx, [1.0] * 5, state=state, params=params)
    chex.assert_trees_all_equal(state["explosions"].snapshots.older, older)


def test_rollback_is_exact_in_two_steps():
    """At first to a rounding of the larger, then to one of the snapshot."""
    _, state, _ = explode(STABILIZE, healthy(20))
    for factor in (1.5, -3.0, 1e6):
        params = jax.tree.map(lambda x, f=factor: f * x, PARAMS)
        for again, larger in enumerate((params, PARAMS)):
            after, _, _ = explode(STABILIZE, [*BAD, 0.0][: 3 + again], state, params)
            trees = map(jax.tree.leaves, jax.device_get((after, PARAMS, larger)))
            for x, y, size in zip(*trees, strict=True):
                assert np.all(abs(x - y) <= 1.2e-7 * np.maximum(abs(size), abs(y)))


def test_ten_non_finite_steps_are_a_reason_to_roll_back():
    """One by one they say nothing of the parameters; a loss scale may be too large."""
    tx = optaxclip.skip_explosions(optax.sgd(1.0), rollback=True, **ONLY_NONFINITE)
    params, state, _ = run(tx, [1.0] + [math.nan] * 9)
    chex.assert_trees_all_close(params["a"], PARAMS["a"] - grads_of(1.0)["a"])
    params, state, _ = run(tx, [math.nan], state=state, params=params)
    chex.assert_trees_all_equal(params, PARAMS)
    _, state, _ = run(tx, FINE, state=state, params=params)
    assert optaxclip.metrics(state)["explosions/num_rollbacks"] == 1


@pytest.mark.slow
def test_how_many_until_a_rollback_and_until_it_gives_up():
    tx = optaxclip.skip_explosions(
        optax.sgd(1e-6), rollback=True, rollback_after=5, give_up_after=7
    )
    for num, rollbacks in ((4, 0), (5, 1)):
        sizes = [*healthy(8), *[1e3] * num, *FINE]
        _, state, _ = explode(tx, sizes)
        assert optaxclip.metrics(state)["explosions/num_rollbacks"] == rollbacks
    for num, gave_up in ((6, 0), (7, 1)):
        _, state, _ = run(tx, [1.0] + [math.nan] * num)
        assert optaxclip.metrics(state)["explosions/gave_up"] == gave_up
    with pytest.raises(optaxclip.ExplosionError, match="after 7 non-finite steps"):
        optaxclip.raise_if_exploded(state)


@pytest.mark.slow
def test_how_far_apart_explosions_are_one_and_how_many_steps_are_kept():
    tx = optaxclip.detect_explosions(max_gap=30, window=64)
    _, state, _ = run(tx, [*healthy(20), 50, *healthy(20), 900])
    assert state["explosions"].began.step == 20
    assert len(run(tx, healthy(80))[1]["explosions"].record.rows) == 64


def test_without_params_a_rollback_raises():
    tx = optaxclip.skip_explosions(optax.sgd(1.0), rollback=True)
    with pytest.raises(ValueError, match="with params"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.slow
@pytest.mark.parametrize("num_bad", [3, 14])
def test_stabilize_survives_what_kills_the_optimizer(num_bad):
    """From the tenth on they are accepted, and clipped to what was usual."""
    scales = jnp.ones(400).at[200 : 200 + num_bad].set(1e4)

    def losses(params, scale):
        return scale * jnp.sum(jnp.square(params["a"]) ** 2)

    def train(tx):
        tx = optax.with_extra_args_support(tx)

        def step(carry, scale):
            params, state = carry
            loss, grads = jax.value_and_grad(losses)(params, scale)
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), loss

        carry = {"a": jnp.ones(3)}, tx.init({"a": jnp.ones(3)})
        return jax.jit(lambda c: lax.scan(step, c, scales))(carry)

    (params, _), _ = train(optax.sgd(0.3))
    assert not np.isfinite(params["a"]).all()
    (params, state), found = train(optaxclip.stabilize(optax.sgd(0.3)))
    chex.assert_tree_all_finite(params)
    assert found[-1] < found[0] / 100
    assert np.max(found / scales) == found[0]
    optaxclip.raise_if_exploded(state, params)


@pytest.mark.slow
def test_stabilize_takes_a_fixed_limit_too():
    tx = optaxclip.stabilize(optax.sgd(1.0), max_norm=0.5, rollback=False)
    _, state, found = run(tx, [1.0])
    np.testing.assert_allclose(optaxclip.global_norm(found[0]), 0.5, rtol=1e-6)
    assert optaxclip.metrics(state)["clip/limit"] == 0.5


# What the host is told.


def test_the_message_of_an_explosion_names_step_rule_leaf_and_numbers():
    sizes = [*healthy(20), 50.0, 100.0, grads_of(1.0) | {"b": grads_of(math.inf)["b"]}]
    _, state, _ = run(DETECT, sizes)
    with pytest.raises(optaxclip.ExplosionError) as error:
        optaxclip.raise_if_exploded(state, PARAMS)
    message = str(error.value)
    for part in (
        "step 22 was non-finite: leaf 'b/c' held inf or NaN",
        "It began on step 20: the norm was 70.7, above its limit",
        "had grown most. The norm had grown by",
        "optaxclip.stabilize",
    ):
        assert part in message
    with pytest.raises(optaxclip.ExplosionError, match="leaf 1 held"):
        optaxclip.raise_if_exploded(state)


def test_the_message_of_a_loss_that_is_not_finite():
    _, state, _ = run(DETECT, [1.0], [math.inf])
    with pytest.raises(optaxclip.ExplosionError, match="the loss was inf, with finite"):
        optaxclip.raise_if_exploded(state, PARAMS)


@pytest.mark.slow
def test_nothing_is_raised_on_what_was_survived():
    tx = optax.chain(optaxclip.detect_explosions(label="gradients"), SKIP)
    _, state, _ = run(tx, [*healthy(20), 50.0, math.nan, *[1e3] * 20])
    optaxclip.raise_if_exploded(state, PARAMS)
    _, state, _ = run(DETECT, [*healthy(20), 50.0, 1.0])
    optaxclip.raise_if_exploded(state, PARAMS)


def test_what_the_inner_transformation_made_is_found_in_its_state():
    # A finite gradient whose square is not: a second moment that stays inf for ever.
    _, state, _ = run(MEND, [1e30])
    with pytest.raises(optaxclip.ExplosionError, match=r"0/nu/a.* holds inf or NaN"):
        optaxclip.raise_if_exploded(state, PARAMS)


def test_the_rules_learn_nothing_of_a_step_whose_moments_are_mended():
    _, state, _ = run(MEND, [1.0, 1e30])  # its square is inf in the second moment
    before = state["explosions"].explosions
    _, state, found = run(MEND, [1.0], state=state)
    after = state["explosions"].explosions
    assert after.counts.mended - before.counts.mended == 1
    assert is_zero(found[0])
    assert jax.tree.leaves(after.rule_states)
    chex.assert_trees_all_equal(after.rule_states, before.rule_states)


def test_a_state_without_explosions_is_an_error():
    with pytest.raises(ValueError, match="found no state"):
        optaxclip.raise_if_exploded(optax.adam(0.1).init(PARAMS))


def test_equal_labels_are_an_error_also_inside_a_skip():
    tx = optaxclip.skip_explosions(optax.chain(DETECT, optax.sgd(0.1)))
    with pytest.raises(ValueError, match="label 'explosions'"):
        optaxclip.metrics(tx.init(PARAMS))


def test_the_state_is_small():
    params = {str(i): jnp.ones(2) for i in range(100)}
    bare = optax.adam(1e-3)
    tx = optaxclip.stabilize(bare, rollback=False)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(t.init(params))) for t in (tx, bare)]
    record = 256 * 4 * (100 + 3)
    skipped_steps = 64 * 4 * 9
    assert sizes[0] - sizes[1] < 4 * 1024 + 40 * 100 + record + skipped_steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_consecutive": 0}, "max_consecutive must be >= 1"),
        ({"rollback_after": 0}, "rollback_after must be >= 1"),
        ({"give_up_after": 0}, "give_up_after must be >= 1"),
        ({"max_gap": 0}, "max_gap must be >= 1"),
        ({"window": 63}, "window must be >= 64"),
        ({"snapshot_every": 0}, "snapshot_every must be >= 1"),
        ({"cool_down": 0.0}, "cool_down must be within (0, 1]"),
        ({"cool_down": 1.5}, "cool_down must be within (0, 1]"),
        ({"recovery": 0.9}, "recovery must be >= 1"),
        ({"norm": -1.0}, "norm must be >= 0"),
        ({"share": -1.0}, "share must be >= 0"),
        ({"loss": -1.0}, "loss must be >= 0"),
        ({"norm": limits.params()}, "limits.params"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        optaxclip.skip_explosions(optax.sgd(0.1), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_consecutive": 2.0},
        {"rollback": 1},
        {"label": ""},
        {"cool_down": "half"},
        {"norm": "large"},
    ],
)
def test_bad_types(arguments):
    with pytest.raises(TypeError):
        optaxclip.skip_explosions(optax.sgd(0.1), **arguments)


def test_count_reads_by_name():
    _, state, _ = run(DETECT, [1.0, math.nan])
    assert state["explosions"].counts.steps == 2
    assert state["explosions"].counts.nonfinite_in_a_row == 1


@pytest.mark.slow
def test_a_loss_narrower_than_the_norm(x64):
    """It is widened, and nothing overflows on the way."""
    params = {"a": jnp.ones(2, jnp.float64)}
    state = DETECT.init(params)
    _, state = DETECT.update(params, state, value=jnp.float32(0.5))
    assert optaxclip.metrics(state)["explosions/loss"] == 0.5
