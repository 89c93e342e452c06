"""Numbers of the user's own: which batch a step had, exactly, wherever it is read."""

import functools
import re
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import lax

import optaxclip
from optaxclip.extras import parts_of_tag

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PARAMS = {"a": jnp.ones(3), "b": jnp.ones(2)}
COLUMNS = ("batch", "learning_rate")
SGD = optax.sgd(0.1)
RECORDERS: dict[str, Any] = {
    "record": optaxclip.record(columns=COLUMNS, window=64),
    "detect_explosions": optaxclip.detect_explosions(columns=COLUMNS, window=64),
    "skip_explosions": optaxclip.skip_explosions(SGD, columns=COLUMNS, window=64),
    "stabilize": optaxclip.stabilize(SGD, columns=COLUMNS),
}
# The others share their code, and are slow.
QUICK_RECORDERS = [
    pytest.param(name, marks=[] if name == "stabilize" else pytest.mark.slow)
    for name in RECORDERS
]
LARGEST = 2**31 - 1


def grads_of(size) -> Any:
    return jax.tree.map(lambda x: jnp.full_like(x, size), PARAMS)


@functools.partial(jax.jit, static_argnums=0)
def run(tx, state, sizes, batches, rates) -> Any:
    """The state after gradients of these sizes, in one scan."""

    def step(state, x):
        size, batch, rate = x
        tag = {"batch": batch, "learning_rate": rate, "of another": 1}
        _, state = tx.update(grads_of(size), state, PARAMS, value=size, tag=tag)
        return state, ()

    return lax.scan(step, state, (sizes, batches, rates))[0]


def trained(tx, num_steps, *, bad=()):
    """The state, and the tags of each step, of which `bad` explode."""
    sizes = np.ones(num_steps, np.float32)
    sizes[list(bad)] = 50
    batches = (LARGEST - 7 * np.arange(num_steps)).astype(np.int32)
    rates = np.float32(1e-3) * np.arange(1, num_steps + 1, dtype=np.float32)
    return run(tx, tx.init(PARAMS), sizes, batches, rates), batches, rates


@pytest.mark.parametrize("name", QUICK_RECORDERS)
@pytest.mark.parametrize("num_steps", [pytest.param(3, marks=pytest.mark.slow), 300])
def test_history_gives_back_what_was_given(name, num_steps):
    state, batches, rates = trained(RECORDERS[name], num_steps)
    kept = optaxclip.history(state, PARAMS)
    assert list(kept.tags) == list(COLUMNS)
    np.testing.assert_array_equal(kept.tags["batch"], batches[kept.step])
    np.testing.assert_array_equal(kept.tags["learning_rate"], rates[kept.step])
    assert kept.names == ["a", "b"]
    np.testing.assert_allclose(kept.norms, np.sqrt([[3, 2]] * len(kept.step)), 1e-6)
    assert list(kept.columns())[:4] == ["step", *COLUMNS, "loss"]
    metrics = optaxclip.metrics(state, PARAMS)
    (label,) = state
    np.testing.assert_allclose(metrics[f"{label}/norm/b"], np.sqrt(2), 1e-6)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32])
def test_every_whole_number_of_32_bits_is_exact(dtype):
    limits = np.iinfo(dtype)
    near = [limits.min, limits.min + 1, limits.max - 1, limits.max, 0, 1]
    near += [n for n in (-1, 2**24 - 1, 2**24, 2**24 + 1, -(2**24) - 1)]
    values = np.array([n for n in near if limits.min <= n <= limits.max], dtype)
    state: Any = optaxclip.record(columns=["n"]).init(PARAMS)
    columns = state["gradients"].columns

    def parts(n):
        return jnp.stack(parts_of_tag(columns, {"tag": {"n": n}}))

    found = np.asarray(jax.jit(jax.vmap(parts))(values), np.float64).sum(axis=1)
    assert found.astype(object).tolist() == values.astype(object).tolist()


def test_whole_numbers_of_64_bits_are_exact_up_to_48(x64, strict):
    tx = optaxclip.record(columns=["n"])
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    values = [2**48 - 1, -(2**48), 2**40 + 1, 3]
    for n in values:
        _, state = update(PARAMS, state, tag={"n": np.int64(n)})
    assert optaxclip.history(state).tags["n"].tolist() == values


def test_other_numbers_are_a_float32_and_may_be_nonfinite():
    tx = optaxclip.record(columns=["x"])
    state, values = tx.init(PARAMS), [0.1, -1e30, np.inf, np.nan]
    for x in values:
        _, state = tx.update(PARAMS, state, tag={"x": x})
    _, state = tx.update(PARAMS, state, tag={"x": jnp.bfloat16(0.5)})
    expected = np.array([*values, 0.5], np.float32)
    np.testing.assert_array_equal(optaxclip.history(state).tags["x"], expected)


@pytest.mark.parametrize(
    ("name", "num_steps", "bad"),
    [
        # As long as other runs of it here, so that it is compiled once.
        ("stabilize", 300, 40),
        pytest.param("detect_explosions", 120, 100, marks=pytest.mark.slow),
        pytest.param("detect_explosions", 300, 100, marks=pytest.mark.slow),
    ],
)
def test_a_report_names_the_batch_even_when_its_row_is_gone(name, num_steps, bad):
    state, batches, _ = trained(RECORDERS[name], num_steps, bad=[bad])
    assert (optaxclip.history(state).step[0] > bad) == (num_steps == 300)
    text = optaxclip.explain(state, PARAMS)
    rate = f"{(bad + 1) / 1000:.3f}"
    assert f"on step {bad}, batch {batches[bad]}, learning_rate {rate}: " in text


@pytest.mark.slow
def test_each_explosion_and_what_is_nonfinite_are_told_with_their_batch():
    tx = RECORDERS["stabilize"]
    state, batches, _ = trained(tx, 120, bad=[80, 100, 102])
    sizes, batch = np.full(1, np.nan, np.float32), np.full(1, 38212, np.int32)
    rate = np.ones(1, np.float32)
    text = optaxclip.explain(run(tx, state, sizes, batch, rate), PARAMS)
    for part in (
        "Step 120, batch 38212, learning_rate 1, was non-finite: leaf 'a' held",
        f"\n- step 80, batch {batches[80]}, learning_rate 0.081: the norm was",
        f"\n- steps 100, batch {batches[100]}, learning_rate 0.101, to 102, batch "
        f"{batches[102]}, learning_rate 0.103: the norm was",
    ):
        assert part in text, text
    tx = RECORDERS["record"]
    state = run(tx, tx.init(PARAMS), sizes, batch, rate)
    text = optaxclip.explain(state, PARAMS)
    assert "On step 0, batch 38212, learning_rate 1, all norms became" in text


def test_a_picture_has_a_panel_for_each():
    state, batches, rates = trained(RECORDERS["record"], 20)
    figure = optaxclip.plot(optaxclip.history(state, PARAMS))
    axes = {x.get_label(): x for x in figure.axes}
    assert list(axes)[-2:] == ["tag/batch", "tag/learning_rate"]
    for name, values, scale in [
        ("batch", batches, "linear"),
        ("learning_rate", rates, "log"),
    ]:
        panel = axes[f"tag/{name}"]
        assert panel.get_title(loc="left") == name
        assert panel.get_yscale() == scale
        np.testing.assert_array_equal(panel.get_lines()[0].get_ydata(), values)


def test_a_picture_marks_a_tag_that_is_nonfinite():
    tx = optaxclip.record(columns=["logit"])
    state = tx.init(PARAMS)
    for x in [1.5, np.inf, 2.5, np.nan]:
        _, state = tx.update(PARAMS, state, tag={"logit": x})
    figure = optaxclip.plot(optaxclip.history(state))
    (panel,) = [x for x in figure.axes if x.get_label() == "tag/logit"]
    (marks,) = [x for x in panel.get_lines() if x.get_label() == "not finite"]
    assert list(np.asarray(marks.get_xdata())) == [1, 3]


@pytest.mark.parametrize("name", RECORDERS)
def test_without_columns_the_state_holds_the_arrays_that_it_had(name):
    factories: dict[str, Any] = {
        "record": optaxclip.record(window=64),
        "detect_explosions": optaxclip.detect_explosions(window=64),
        "skip_explosions": optaxclip.skip_explosions(SGD, window=64),
        "stabilize": optaxclip.stabilize(SGD),
    }
    (state,) = factories[name].init(PARAMS).values()
    (tagged,) = RECORDERS[name].init(PARAMS).values()
    assert state.record.rows.shape[1] == 6 + 2
    assert tagged.record.rows.shape[1] == 6 + 4 + 2
    assert state.record.num_scopes == tagged.record.num_scopes == 2


@pytest.mark.parametrize("name", QUICK_RECORDERS)
def test_a_checkpoint_brings_them_back(name, tmp_path):
    tx = RECORDERS[name]
    state, *_ = trained(tx, 300)
    template = jax.tree.map(jnp.zeros_like, tx.init(PARAMS))
    found = [
        flax.serialization.from_bytes(template, flax.serialization.to_bytes(state))
    ]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        found.append(checkpointer.restore(tmp_path / "state", template))
    for restored in found:
        chex.assert_trees_all_equal(restored, state)
        kept, expected = (optaxclip.history(x, PARAMS) for x in (restored, state))
        chex.assert_trees_all_equal(kept, expected)


@pytest.mark.slow
def test_runs_side_by_side_have_tags_of_their_own():
    tx = RECORDERS["stabilize"]
    states = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(3))
    step = jax.vmap(
        lambda state, batch: tx.update(
            grads_of(1.0), state, PARAMS, tag={"batch": batch, "learning_rate": 0.5}
        )[1]
    )
    states = step(states, jnp.array([7, LARGEST, -1]))
    for i, batch in enumerate([7, LARGEST, -1]):
        kept = optaxclip.history(jax.tree.map(lambda x, i=i: x[i], states), PARAMS)
        assert kept.tags["batch"].tolist() == [batch]


@pytest.mark.slow
def test_a_recorder_inside_and_one_outside_read_the_same_tag():
    inner = optax.chain(optaxclip.record("inside", columns=["batch"]), SGD)
    accumulated: Any = optax.MultiSteps(inner, 1)
    tx = optaxclip.stabilize(accumulated, columns=COLUMNS)
    state = run(tx, tx.init(PARAMS), np.ones(1), np.array([5]), np.ones(1))
    assert optaxclip.history(state, label="inside").tags["batch"].tolist() == [5]
    assert optaxclip.history(state, label="explosions").tags["batch"].tolist() == [5]


def test_an_optimizer_that_takes_no_tag_is_given_none():
    """`optax.contrib.sam` would raise."""
    inner = optax.contrib.sam(SGD, SGD, sync_period=2)
    for columns in ((), COLUMNS):
        tx = optaxclip.stabilize(inner, columns=columns)
        state = tx.init(PARAMS)
        jax.eval_shape(lambda tx=tx, state=state: run(tx, state, *[jnp.ones(1)] * 3))


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ("batch", TypeError, "columns must be a sequence of names, not 'batch'"),
        (3, TypeError, "columns must be a sequence of names, not 3"),
        ([""], TypeError, "columns must be names, not ''"),
        ([1], TypeError, "columns must be names, not 1"),
        (["loss"], ValueError, "columns must be other names than step, loss,"),
        (["norm/w"], ValueError, "without a slash, not 'norm/w'"),
        (["a", "a"], ValueError, "columns must be different names, not ('a', 'a')"),
    ],
)
def test_names_that_cannot_be(columns, error, message):
    for make in (
        lambda: optaxclip.record(columns=columns),
        lambda: optaxclip.stabilize(SGD, columns=columns),
    ):
        with pytest.raises(error, match=re.escape(message)):
            make()


@pytest.mark.parametrize(
    ("tag", "error", "message"),
    [
        (None, TypeError, "update needs tag={'batch': ..., 'learning_rate': ...}"),
        (3, TypeError, "for columns=; not 3"),
        ({"bacth": 1, "learning_rate": 1}, ValueError, "tag= lacks ['batch'] of the"),
        ({"batch": jnp.ones(2), "learning_rate": 1}, ValueError, "of shape (2,)"),
        ({"batch": True, "learning_rate": 1}, TypeError, "'batch' is of bool"),
        ({"batch": 1j, "learning_rate": 1}, TypeError, "'batch' is of complex64"),
    ],
)
@pytest.mark.parametrize("name", ["record", "stabilize"])
def test_a_tag_that_does_not_fit(name, tag, error, message):
    tx = RECORDERS[name]
    extra_args = {} if tag is None else {"tag": tag}
    with pytest.raises(error, match=re.escape(message)):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extra_args)


def test_whole_numbers_of_python_and_numpy_are_exact_without_x64():
    recorder = optaxclip.record(columns=("batch",))
    for value in (
        np.int64(3_000_000_000),
        np.int64(2**40 + 1),
        2**40 + 1,
        -(2**40) - 1,
    ):
        _, state = recorder.update(PARAMS, recorder.init(PARAMS), tag={"batch": value})
        assert optaxclip.history(state).tags["batch"][0] == int(value)
