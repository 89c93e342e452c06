"""What the readers make of any state that somebody gives them, and of mistakes."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import optaxclip

pytestmark = pytest.mark.usefixtures("quick_to_compile")

READERS = {
    "metrics": optaxclip.metrics,
    "history": functools.partial(optaxclip.history, label="record"),
    "explain": optaxclip.explain,
    "raise_if_exploded": optaxclip.raise_if_exploded,
}
TX = optax.chain(
    optaxclip.record("record", window=4, stacked=lambda name: name == "w"),
    optaxclip.clip_by_norm(1.0, label="tree"),
    optaxclip.clip_by_norm(1.0, per="unit", label="unit"),
    optaxclip.skip_explosions(optax.adam(0.1)),
)


def params_of(member: int = 0) -> Any:
    return {"w": jnp.ones((2, 3)) + member, "b": jnp.full(2, 0.5)}


@functools.cache
def one_run(member: int = 0) -> Any:
    """The state of a run after three healthy steps, filled in without any."""
    rng = np.random.default_rng(member)

    def fill(path, x):
        x, noise = np.array(x), rng.uniform(1, 2, x.shape)
        match path[-1].name if hasattr(path[-1], "name") else "":
            case "rows":
                x[:3, 6:] = noise[:3, 6:]
            case "counts":
                x[0] = 3
            case "num_steps":
                x += 3
            case "told":
                pass
            case _ if x.dtype == np.float32:
                x += noise.astype(np.float32)
        return jnp.asarray(x)

    return jax.tree.map_with_path(fill, TX.init(params_of()))


def test_metrics_outside_jit_compiles_once_for_a_structure():
    params = {str(i): jnp.ones(i) for i in range(11, 18)}
    tx = optax.chain(optaxclip.record("a"), optaxclip.clip_by_norm(1.0, per="leaf"))
    first, second = tx.init(params), tx.init(params)
    compiled: list[str] = []

    def listen(event, duration_secs, **kwargs):
        del duration_secs, kwargs
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    optaxclip.metrics(first, params)
    num_first = len(compiled)
    assert 1 <= num_first <= 3, "one program, and one to split each of two dtypes"
    optaxclip.metrics(second, params)
    optaxclip.metrics(first, params)
    assert len(compiled) == num_first


def test_metrics_of_numpy_arrays_are_plain_arrays():
    state, params = one_run(), params_of()
    expected = optaxclip.metrics(state, params)
    assert all(isinstance(x, jax.Array) and x.shape == () for x in expected.values())
    found = optaxclip.metrics(jax.device_get(state), jax.device_get(params))
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


def test_metrics_of_runs_stacked_by_vmap_are_those_of_each():
    members = [params_of(i) for i in range(3)]
    runs = [one_run(i) for i in range(3)]
    params, states = (
        jax.tree.map(lambda *x: jnp.stack(x), *trees) for trees in (members, runs)
    )
    found = optaxclip.metrics(states, params)
    for i, member in enumerate(members):
        expected = optaxclip.metrics(runs[i], member)
        one = {name: x[i] for name, x in found.items()}
        chex.assert_trees_all_close(one, expected, rtol=1e-6)
    # Those of one run give the names, and no ratios.
    several = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *x.shape)), states)
    named = optaxclip.metrics(several, members[0])
    assert set(named) == {name for name in found if "ratio" not in name}
    assert {x.shape for x in named.values()} == {(2, 3)}


@pytest.mark.parametrize("name", ["history", "explain", "raise_if_exploded"])
def test_what_reads_one_run_refuses_several(name):
    states = jax.tree.map(lambda x: jnp.stack([x, x]), one_run())
    with pytest.raises(ValueError, match=r"holds runs \[2\], and this reads one run"):
        READERS[name](states, params_of())
    READERS[name](jax.tree.map(lambda x: x[0], states), params_of())


@pytest.mark.parametrize("name", READERS)
def test_every_reader_under_strict_promotion(strict, name):
    state = one_run()
    READERS[name](state, params_of())
    READERS[name](jax.device_get(state), params_of())


# --- What is told, and of what.


PER_LEAF: dict[str, Any] = {
    "record": optaxclip.record(),
    "detect_explosions": optaxclip.detect_explosions(),
}


@functools.cache
def scan_of(name: str) -> Any:
    def step(state, x):
        size, loss = x
        grads = {"a": size[:1], "b": size[1:]}
        return PER_LEAF[name].update(grads, state, value=loss)[1], ()

    state = PER_LEAF[name].init({"a": jnp.ones(1), "b": jnp.ones(1)})
    return jax.jit(lambda sizes: jax.lax.scan(step, state, sizes)[0])


def told_of(name: str, sizes: Any, losses: Any = None) -> str:
    """What `explain` says after gradients of these norms."""
    losses = np.ones(len(sizes)) if losses is None else losses
    state = scan_of(name)(jax.tree.map(jnp.float32, (sizes, losses)))
    return optaxclip.explain(state, {"a": jnp.ones(1), "b": jnp.ones(1)})


def noise() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.exp(0.4 * rng.standard_normal((120, 2)))


@pytest.mark.parametrize("name", ["record", "detect_explosions"])
def test_noise_before_a_batch_of_nan_is_not_told_as_growth(name):
    norms = noise()
    norms[49] = 1.3 * norms[:49].max(axis=0)  # the largest so far, and healthy
    norms[50] = np.nan
    text = told_of(name, norms)
    assert "grown" not in text, text
    norms[46:50] *= 5.0 ** np.arange(1, 5)[:, None]
    text = told_of(name, norms)
    assert "The norm had grown by" in text, text


def test_an_explosion_of_the_loss_alone_tells_of_no_growth():
    losses = np.ones(120)
    losses[50] = 100
    text = told_of("detect_explosions", noise(), losses)
    assert "step 50: the loss was 100, above its limit" in text
    assert "grown" not in text, text


def test_every_explosion_that_is_kept_is_told_in_a_line():
    norms, losses = noise(), np.ones(120)
    norms[40, 0] = 50
    norms[70:73, 1] = np.nan
    losses[100] = 200
    text = told_of("detect_explosions", norms, losses)
    first, *lines = text.split("\n")
    assert "The last explosion began on step 100" in first
    limit = r"above its limit [\d.]+"
    expected = [
        rf"- step 40: the norm was 50, {limit}; leaf 'a' had grown most\.",
        r"- steps 70 to 72: leaf 'b' was not finite\.",
        rf"- step 100: the loss was 200, {limit}\.",
    ]
    assert len(lines) == len(expected), text
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    lines = told_of("record", norms).split("\n")
    assert len(lines) == 1, "one explosion, which the first line tells"


def test_a_checkpoint_read_without_a_template_is_told(tmp_path):
    state = one_run()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state")
    as_bytes = serialization.msgpack_restore(serialization.to_bytes(state))
    for read in READERS.values():
        for found in (restored, as_bytes, restored[-1]):
            with pytest.raises(ValueError, match="was a state of optaxclip and is a"):
                read(found)


def test_a_train_state_stands_for_its_parameters():
    params = params_of()
    state = TrainState.create(apply_fn=lambda: None, params=params, tx=TX)
    state = state.replace(opt_state=one_run())
    expected = optaxclip.metrics(state.opt_state, params)
    chex.assert_trees_all_equal(optaxclip.metrics(state, state), expected)
    assert READERS["history"](state, state).names == ["b", "w[0]", "w[1]"]
    assert optaxclip.explain(state, state) == optaxclip.explain(state, params)
    optaxclip.raise_if_exploded(state, state)
