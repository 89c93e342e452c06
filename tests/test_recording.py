"""The flight recorder: what it keeps, what is read of it, and what is told."""

import math
import re
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

PARAMS = {"a": jnp.full(3, 2.0), "b": {"c": jnp.full((2, 2), 0.5)}, "n": jnp.arange(2)}


def grads_of(a, c) -> Any:
    """Gradients whose leaves have these norms."""
    return {
        "a": jnp.zeros(3).at[1].set(a),
        "b": {"c": jnp.full((2, 2), c / 2)},
        "n": PARAMS["n"],
    }


def run(tx, norms, losses=None, params: Any = PARAMS) -> Any:
    """The state after gradients of these norms `[num_steps, 2]`, in one scan."""
    norms = jnp.asarray(norms, jnp.float32)
    losses = jnp.ones(len(norms)) if losses is None else jnp.asarray(losses)

    def step(state, x):
        (a, c), loss = x
        _, state = tx.update(grads_of(a, c), state, params, value=loss)
        return state, ()

    scan = jax.jit(lambda state: lax.scan(step, state, (norms, losses))[0])
    return scan(tx.init(params))


def noise(num_steps, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.exp(0.3 * rng.standard_normal((num_steps, 2))).astype(np.float32)


def total(norms) -> np.ndarray:
    return np.sqrt(np.sum(np.square(np.asarray(norms, float)), axis=-1))


@pytest.mark.parametrize("num_steps", [0, 1, 255, 256, 10_000])
def test_the_last_256_steps_come_back_in_order(num_steps):
    norms, losses = noise(num_steps), noise(num_steps, 1)[:, 0]
    state = run(optaxclip.record(), norms, losses)
    found = optaxclip.history(state, PARAMS)
    first = max(0, num_steps - 256)
    np.testing.assert_array_equal(found.step, np.arange(first, num_steps))
    np.testing.assert_allclose(found.loss, losses[first:], rtol=1e-6)
    np.testing.assert_allclose(found.norms[:, :2], norms[first:], rtol=1e-6)
    np.testing.assert_array_equal(found.norms[:, 2], 0)
    np.testing.assert_allclose(found.norm, total(norms[first:]), rtol=1e-6)
    assert found.names == ["a", "b/c", "n"]
    assert not found.fired.any()
    assert np.all(found.limit == np.inf)
    metrics = optaxclip.metrics(state, PARAMS)
    if num_steps:
        largest = total(norms).max()
        np.testing.assert_allclose(
            metrics["gradients/largest_norm"], largest, rtol=1e-6
        )
        np.testing.assert_allclose(metrics["gradients/loss"], losses[-1], rtol=1e-6)


def test_what_is_not_finite_is_kept_and_counted():
    norms = [(1, 1), (math.inf, 1), (2, math.nan), (3, 4), (1, 1)]
    state = run(optaxclip.record(), norms, [1, 1, 1, 1, math.nan])
    found = optaxclip.history(state)
    # An element that is inf makes the norm inf; one that is NaN makes it NaN.
    np.testing.assert_allclose(found.norms[:, 0], [1, math.inf, 2, 3, 1])
    np.testing.assert_allclose(found.norms[:, 1], [1, 1, math.nan, 4, 1])
    assert found.fired[:, 0].tolist() == [False, True, True, False, True]
    assert not found.fired[:, 1:].any()
    metrics = optaxclip.metrics(state)
    assert metrics["gradients/num_nonfinite"] == 3
    assert metrics["gradients/largest_norm"] == 5


def test_history_and_metrics_give_back_what_stands_as_a_mark_in_the_state():
    norms = [(1, 1), (math.inf, math.nan), (math.nan, 3)]
    losses = [-math.inf, math.nan, -math.inf]
    state = run(optaxclip.record(), norms, losses)
    rows = np.asarray(state["gradients"].rows)
    assert not np.isnan(rows).any()
    assert not (rows == -math.inf).any()
    found = optaxclip.history(state)
    np.testing.assert_array_equal(found.norms[:, :2], np.asarray(norms, np.float32))
    np.testing.assert_array_equal(found.loss, losses)
    metrics = optaxclip.metrics(state)
    assert metrics["gradients/loss"] == -math.inf
    assert math.isnan(metrics["gradients/norm"])


@pytest.mark.slow
def test_before_the_first_step_there_is_no_limit():
    found = optaxclip.metrics(optaxclip.detect_explosions().init(PARAMS))
    assert found["explosions/norm_limit"] == math.inf
    assert found["explosions/loss_limit"] == math.inf
    assert found["explosions/norm"] == 0


def test_a_loss_that_is_not_given_is_infinite_in_metrics_and_nan_in_history():
    tx = optaxclip.record()
    _, state = tx.update(grads_of(3, 4), tx.init(PARAMS))
    with jax.debug_nans(True):
        assert optaxclip.metrics(state)["gradients/loss"] == math.inf
    assert np.isnan(optaxclip.history(state).loss).all()
    assert not optaxclip.history(state).fired.any()


@pytest.mark.parametrize("size", [3e38, 1e30, 1e-30])
def test_norms_of_any_size(size):
    state = run(optaxclip.record(), [(size, size / 2)])
    largest = float(np.finfo(np.float32).max)
    expected = min(float(total([size, size / 2])), largest)
    found = optaxclip.history(state)
    np.testing.assert_allclose(found.norm, [expected], rtol=1e-6)
    metrics = optaxclip.metrics(state)
    np.testing.assert_allclose(metrics["gradients/norm"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradients/squared_share/0"], 0.8, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradients/squared_share/1"], 0.2, rtol=1e-5)


@pytest.mark.slow
def test_recorders_before_and_after_a_clip_and_after_the_optimizer():
    tx = optax.chain(
        optaxclip.record("before", window=4),
        optaxclip.clip_by_norm(1.0),
        optaxclip.record("after", window=4),
        optax.sgd(0.1),
        optaxclip.record("updates", window=4),
    )
    params = {"a": jnp.ones(1), "b": jnp.ones(4)}
    state = tx.init(params)
    for size in (0.5, 8.0):
        grads = {"a": jnp.array([size]), "b": jnp.zeros(4)}
        _, state = tx.update(grads, state, params)
    norms = [optaxclip.history(state, label=x).norm for x in ("before", "after")]
    np.testing.assert_allclose(norms, [[0.5, 8], [0.5, 1]], rtol=1e-6)
    metrics = optaxclip.metrics(state, params)
    np.testing.assert_allclose(metrics["updates/ratio/a"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(metrics["updates/ratio/b"], 0)
    np.testing.assert_allclose(metrics["updates/ratio"], 0.1 / math.sqrt(5), rtol=1e-6)
    with pytest.raises(ValueError, match=re.escape("['after', 'before', 'updates']")):
        optaxclip.history(state)
    assert optaxclip.explain(state).count("\n") == 2


def test_ratios_where_parameters_are_zero_unknown_stacked_or_hidden():
    tx = optaxclip.record(stacked=lambda name: name == "layers")
    params = {"layers": jnp.array([[3.0, 4.0], [0.0, 0.0]]), "w": jnp.array([2.0])}
    tx = optax.masked(tx, {"layers": True, "w": False})
    _, state = tx.update(params, tx.init(params), params)
    grads = {"layers": jnp.ones((2, 2)), "w": jnp.ones(1)}
    _, state = tx.update(grads, state, params)
    metrics = optaxclip.metrics(state, params)
    np.testing.assert_allclose(
        metrics["gradients/ratio/layers[0]"], math.sqrt(2) / 5, rtol=1e-6
    )
    assert metrics["gradients/ratio/layers[1]"] == math.inf
    np.testing.assert_allclose(metrics["gradients/ratio"], 2 / 5, rtol=1e-6)
    assert "gradients/ratio/w" not in metrics


def test_ratios_need_the_parameters_themselves():
    state = run(optaxclip.record(), [(1, 1)])
    shapes = jax.eval_shape(lambda: PARAMS)
    names = set(optaxclip.metrics(state, shapes))
    assert names < set(optaxclip.metrics(state, PARAMS))
    assert not [name for name in names if "ratio" in name]
    assert "gradients/norm/b/c" in names


@pytest.mark.slow
def test_a_leaf_has_vanished_when_it_was_small_in_a_whole_window():
    tx = optaxclip.record(window=4)
    small = [(1, 1e-7)] * 4
    for norms, expected in [
        (small[:3], 0),
        (small, 1),
        ([*small, (1, 1e-5)], 0),
        ([(1, 1), *small], 1),
        ([(1e30, 1e23)] * 4, 1),
        ([(math.nan, 1)] * 4, 0),
        ([(1, 0), (1, 0), (math.nan, 0), (1, 0)], 1),
    ]:
        metrics = optaxclip.metrics(run(tx, norms), PARAMS)
        assert metrics["gradients/is_vanished/b/c"] == expected, norms
        assert metrics["gradients/is_vanished/a"] == 0
    # The leaf of integers has no norm, and so has vanished as soon as one can.
    state = run(tx, small)
    assert optaxclip.metrics(state, PARAMS)["gradients/num_vanished"] == 2
    assert "2 of 3 norms have vanished" in optaxclip.explain(state, PARAMS)
    assert "'b/c', 'n'." in optaxclip.explain(state, PARAMS)


@pytest.mark.parametrize(
    ("per", "expected"),
    [("tree", [[5]]), (lambda name: name[:1], [[3, 4, 0]]), ("leaf", [[3, 4, 0]])],
)
def test_per_tree_leaf_or_group(per, expected):
    state = run(optaxclip.record(per=per), [(3, 4)])
    found = optaxclip.history(state)
    np.testing.assert_allclose(found.norms, expected, rtol=1e-6)
    np.testing.assert_allclose(found.norm, [5], rtol=1e-6)
    np.testing.assert_allclose(optaxclip.metrics(state)["gradients/norm"], 5, rtol=1e-6)
    largest = optaxclip.metrics(state)["gradients/largest_norm"]
    np.testing.assert_allclose(largest, 5, rtol=1e-6)


def test_groups_have_their_names_where_params_are_given():
    per = {"a": "first", "b/c": "other", "n": "other"}.__getitem__
    tx = optax.chain(
        optaxclip.record(per=per), optaxclip.clip_by_norm(10.0, per=per), optax.sgd(1.0)
    )
    state = run(tx, [(3, 4), (3, math.nan)])
    assert optaxclip.history(state, PARAMS).names == ["first", "other"]
    assert optaxclip.history(state).names == ["0", "1"]
    found = optaxclip.metrics(state, PARAMS)
    np.testing.assert_allclose(found["gradients/norm/first"], 3, rtol=1e-6)
    np.testing.assert_allclose(found["clip/norm/first"], 3, rtol=1e-6)
    assert math.isnan(found["gradients/norm/other"])
    assert "that of 'other' was the first non-finite" in optaxclip.explain(
        state, PARAMS
    )
    restored = flax.serialization.from_bytes(
        tx.init(PARAMS), flax.serialization.to_bytes(state)
    )
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert optaxclip.history(restored, PARAMS).names == ["first", "other"]
    mapped = optax.tree_map_params(tx, lambda x: x, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


def test_runs_under_vmap_are_read_one_by_one():
    tx, norms = optaxclip.record(window=16), noise(8 * 20).reshape(8, 20, 2)
    states = jax.vmap(lambda norms: run(tx, norms))(jnp.asarray(norms))
    with pytest.raises(ValueError, match="reads one run"):
        optaxclip.history(states)
    for i in range(8):
        found = optaxclip.history(jax.tree.map(lambda x, i=i: x[i], states))
        np.testing.assert_allclose(found.norms[:, :2], norms[i, 4:], rtol=1e-6)


def test_only_the_steps_that_a_cond_takes_are_kept():
    tx = optaxclip.record()

    def step(state, i):
        def take(state):
            return tx.update(grads_of(i.astype(jnp.float32), 0.0), state)[1]

        return lax.cond(i % 3 == 0, take, lambda state: state, state), ()

    state, _ = jax.jit(lambda s: lax.scan(step, s, jnp.arange(10)))(tx.init(PARAMS))
    np.testing.assert_allclose(optaxclip.history(state).norms[:, 0], [0, 3, 6, 9])


def test_stabilize_has_a_recorder_that_sees_skipped_steps_limits_and_rules():
    tx = optaxclip.stabilize(optax.sgd(0.1), rollback=False)
    params = {"a": PARAMS["a"], "b": PARAMS["b"]}

    def step(state, size):
        grads = jax.tree.map(lambda x: jnp.full_like(x, size), params)
        return tx.update(grads, state, params, value=size)[1], ()

    sizes = jnp.array([1.0] * 100 + [50.0, math.nan, 1.0])
    state, _ = jax.jit(lambda s: lax.scan(step, s, sizes))(tx.init(params))
    found = optaxclip.history(state, params)
    np.testing.assert_allclose(found.norm, sizes * math.sqrt(7), rtol=1e-6)
    np.testing.assert_allclose(found.loss, sizes)
    assert found.fired[100].tolist() == [False, True, False, True]
    assert found.fired[101].tolist() == [True, False, False, False]
    assert found.fired.sum() == 3
    np.testing.assert_allclose(found.limit[100], 3 * math.sqrt(7), rtol=1e-5)
    metrics = optaxclip.metrics(state, params)
    np.testing.assert_allclose(metrics["explosions/norm/a"], math.sqrt(3), rtol=1e-6)
    assert metrics["explosions/num_nonfinite"] == 1
    text = optaxclip.explain(state, params)
    for part in (
        "2 of 103 steps exploded: 1 non-finite, 1 by the norm, 1 by the loss.",
        "2 were skipped, and parameters went back 0 times.",
        "Step 101 was non-finite: leaf 'a' held inf or NaN.",
        "It began on step 100: the norm was 132, above its limit 7.94; the loss was 50",
        "The norm had grown by about 50x per step since step 99, from 2.65 to 132",
    ):
        assert part in text, text


def test_columns_are_what_a_table_takes():
    norms = noise(5)
    found = optaxclip.history(run(optaxclip.record(), norms), PARAMS).columns()
    assert list(found)[:5] == ["step", "loss", "loss_limit", "norm", "limit"]
    assert list(found)[-3:] == ["norm/a", "norm/b/c", "norm/n"]
    assert all(column.shape == (5,) for column in found.values())
    np.testing.assert_allclose(found["norm/b/c"], norms[:, 1], rtol=1e-6)


def test_the_first_leaf_that_is_non_finite_is_named():
    norms = noise(50)
    norms[40:45] *= 4.0 ** np.arange(1, 6)[:, None]
    norms[45, 1] = math.inf
    text = optaxclip.explain(run(optaxclip.record(), norms), PARAMS)
    assert "1 of 50 steps were non-finite." in text
    assert "On step 45 that of 'b/c' was the first non-finite." in text
    assert re.search(r"by about [34]\.\d*x per step since step 3[89]", text), text
    quiet = optaxclip.explain(run(optaxclip.record(), noise(50)), PARAMS)
    assert quiet == "gradients: 0 of 50 steps were non-finite."


def test_names_are_unchanged_and_large_norms_without_overflow():
    params = {"Dense_0": {"Kernel": jnp.ones(2)}, "b": jnp.ones(2)}
    tx = optaxclip.detect_explosions(norm=3.2e38, share=None)
    state = tx.init(params)
    for size in [2e38] * 40 + [3.3e38]:
        grads = {"Dense_0": {"Kernel": jnp.array([size, 0.0])}, "b": jnp.zeros(2)}
        _, state = jax.jit(tx.update)(grads, state)
    story = optaxclip.explain(state, params)
    assert (
        "Leaf 'Dense_0/Kernel' had grown most. The norm had grown by about 1.65x"
        in story
    )


@pytest.mark.parametrize("loss", [2.0, pytest.param(math.nan, marks=pytest.mark.slow)])
def test_a_tree_without_leaves_is_told(loss):
    tx = optaxclip.detect_explosions(loss=1.0)
    _, state = jax.jit(tx.update)({}, tx.init({}), value=loss)
    for params in (None, {}):
        assert "1 of 1 steps exploded" in optaxclip.explain(state, params)
    assert optaxclip.metrics(state, {})["explosions/num_exploded"] == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be >= 1"),
        ({"window": 2.0}, TypeError, "window must be a whole number"),
        ({"top": 0}, ValueError, "top must be >= 1"),
        ({"top": True}, TypeError, "top must be a whole number"),
        ({"per": "unit"}, ValueError, 'not per "unit"'),
        ({"per": "layer"}, ValueError, "per must be"),
        ({"label": ""}, TypeError, "label must be a name"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        optaxclip.record(**arguments)


def test_states_that_cannot_be_read():
    with pytest.raises(ValueError, match="found no state of record"):
        optaxclip.history(optax.sgd(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="found no state of record"):
        optaxclip.explain(optaxclip.clip_by_norm(1.0).init(PARAMS))
    state = run(optaxclip.record(), [(1, 1)])
    with pytest.raises(ValueError, match=r"label='x' is no recorder; found \['grad"):
        optaxclip.history(state, label="x")
    for read in (optaxclip.history, optaxclip.metrics, optaxclip.explain):
        with pytest.raises(ValueError, match="does not have the structure"):
            read(state, {"a": jnp.ones(3)})
    twice = optax.chain(optaxclip.record(), optaxclip.record()).init(PARAMS)
    for read in (optaxclip.history, optaxclip.metrics, optaxclip.explain):
        with pytest.raises(ValueError, match="two transformations have the label"):
            read(twice)
    tx = optaxclip.record()
    with pytest.raises(ValueError, match=re.escape("not of shape (2,)")):
        tx.update(PARAMS, tx.init(PARAMS), value=jnp.ones(2))


# --- The largest norms alone

EXPERTS = {"b": jnp.ones(2), "moe": jnp.ones((3, 4, 5))}


def stacked(name) -> int:
    return 2 if name == "moe" else 0


def run_experts(tx, norms, losses) -> Any:
    """The state after gradients of these norms `[num_steps, 13]`."""

    def step(state, x):
        norms, loss = x
        grads = jax.tree.map(jnp.zeros_like, EXPERTS)
        grads["b"] = grads["b"].at[0].set(norms[0])
        grads["moe"] = grads["moe"].at[:, :, 2].set(norms[1:].reshape(3, 4))
        return tx.update(grads, state, EXPERTS, value=loss)[1], ()

    scan = jax.jit(lambda state: lax.scan(step, state, (norms, losses))[0])
    return scan(tx.init(EXPERTS))


@pytest.fixture(scope="module")
def kept() -> Any:
    """Norms, and the states of records of all and of the 4 largest."""
    rng = np.random.default_rng(0)
    norms = np.exp(rng.standard_normal((12, 13))).astype(np.float32)
    norms[9, 7], norms[10, 1:7], norms[11, 0] = math.inf, math.nan, 3e38
    norms[11, 5] = 3e38  # the norm of all is beyond the largest float
    norms = jnp.asarray(norms)
    records = [optaxclip.record(window=8, stacked=stacked, top=k) for k in (None, 4)]
    return norms, *[run_experts(tx, norms, jnp.ones(12)) for tx in records]


def test_of_the_largest_norms_the_order_the_scopes_and_the_rest_are_kept(kept):
    norms, whole, state = kept
    names = optaxclip.leaf_names(EXPERTS, stacked=stacked)
    found, all_of_them = (optaxclip.history(x, EXPERTS) for x in (state, whole))
    assert found.names == ["top/1", "top/2", "top/3", "top/4", "rest"]
    assert found.ranked is not None
    for i, row in enumerate(np.asarray(norms[4:])):
        order = np.argsort(-np.where(row < np.inf, row, np.inf), kind="stable")
        assert found.ranked[i].tolist() == [names[k] for k in order[:4]]
        np.testing.assert_allclose(found.norms[i, :4], row[order[:4]], rtol=1e-6)
        np.testing.assert_allclose(found.norms[i, 4], total(row[order[4:]]), rtol=1e-6)
        assert found.scope_name(i, 0) == names[order[0]]
        assert found.scope_name(i, 4) == "rest"
    np.testing.assert_allclose(found.norm, all_of_them.norm, rtol=1e-6)
    np.testing.assert_array_equal(found.fired, all_of_them.fired)
    assert all_of_them.ranked is None
    assert all_of_them.scope_name(0, 6) == names[6]
    columns = found.columns()
    np.testing.assert_array_equal(columns["scope/top/2"], found.ranked[:, 1])
    assert optaxclip.history(state).scope_name(0, 0).isdigit()
    size = 4 * 8 * (6 + 2 * 4 + 1)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == size + 8


@pytest.mark.slow
def test_metrics_of_the_largest_norms_are_those_of_a_record_of_all(kept):
    _, whole, state = kept
    for top in (10, 3, None):
        found, expected = (
            optaxclip.metrics(x, EXPERTS, top=top) for x in (state, whole)
        )
        chex.assert_trees_all_close(
            {name: x for name, x in found.items() if "/top/" not in name},
            {name: expected[name] for name in found if "/top/" not in name},
            rtol=1e-6,
        )
        ranks = [name for name in found if name.endswith("/index")]
        assert len(ranks) == min(top or 4, 4)
        missing = {name.split("/")[1] for name in set(expected) - set(found)}
        assert missing <= {"num_vanished", "top"} | (
            {"norm", "ratio", "squared_share", "is_vanished"} if top is None else set()
        )
    found, expected = (optaxclip.metrics(x, EXPERTS) for x in (state, whole))
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
    inside = jax.jit(optaxclip.metrics)(state, EXPERTS)
    chex.assert_trees_all_close(inside, found, rtol=1e-6)


def test_the_scopes_of_the_largest_norms_are_named_in_words(kept):
    norms, _, _ = kept
    tx = optaxclip.record(window=8, stacked=stacked, top=4)
    state = run_experts(tx, norms[:10], jnp.ones(10))
    text = optaxclip.explain(state, EXPERTS)
    assert "On step 9 that of 'moe[1, 2]' was the first non-finite." in text
    state = run_experts(tx, norms[:11], jnp.ones(11))
    text = optaxclip.explain(state, EXPERTS)
    assert "that of 'moe[1, 2]' was the first non-finite" in text  # one explosion
    state = run_experts(tx, norms[10:11], jnp.ones(1))
    assert "On step 0 more than 4 norms became non-finite." in optaxclip.explain(state)
    # Of the last rank nothing vanishes, however small it is.
    tiny = jnp.ones((8, 13)).at[:, 1:].set(1e-9)
    text = optaxclip.explain(run_experts(tx, tiny, jnp.ones(8)), EXPERTS)
    assert text == "gradients: 0 of 8 steps were non-finite."


@pytest.mark.slow
def test_a_record_of_more_ranks_than_scopes_keeps_all():
    records = [optaxclip.record(top=k) for k in (None, 3, 2)]
    states = [run(tx, noise(4)) for tx in records]
    for tx, state in zip(records, states, strict=True):
        mapped = optax.tree_map_params(tx, lambda x: x, state)
        assert jax.tree.structure(mapped) == jax.tree.structure(state)
        restored = flax.serialization.from_bytes(
            tx.init(PARAMS), flax.serialization.to_bytes(state)
        )
        assert jax.tree.structure(restored) == jax.tree.structure(state)
    chex.assert_trees_all_equal(*map(optaxclip.metrics, states[:2]))
    chex.assert_trees_all_equal(
        *(optaxclip.history(x, PARAMS).columns() for x in states[:2])
    )
    assert optaxclip.history(states[2]).names == ["top/1", "top/2", "rest"]
    for reader in (optaxclip.metrics, optaxclip.history):
        with pytest.raises(ValueError, match="does not have the structure"):
            reader(states[2], {"a": jnp.ones(3)})
    grads = {"a": jnp.ones(3), "b": jnp.ones(1)}
    with pytest.raises(ValueError, match="do not have the leaves that init was given"):
        optaxclip.record(top=2).update(grads, states[2])


def test_updates_pass_and_half_precision_is_measured_in_float32():
    tx = optaxclip.record()
    grads = {"w": jnp.full(10_000, 0.1, jnp.bfloat16)}
    found, state = tx.update(grads, tx.init(grads))
    chex.assert_trees_all_equal(found, grads)
    expected = 100 * float(jnp.bfloat16(0.1))
    np.testing.assert_allclose(optaxclip.history(state).norm, [expected], rtol=1e-5)
