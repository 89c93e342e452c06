"""What a run recorded reaches dashboards, checkpoints and tables as it was."""

import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import PurePosixPath
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pandas
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import SummaryWriter

import optaxclip

pytestmark = pytest.mark.usefixtures("quick_to_compile")

NUM_STEPS = 20
BAD_STEPS = {7: jnp.inf, 13: jnp.nan}  # what is in the gradient of a bias then

TRANSFORMATIONS: dict[str, Any] = {
    "recorded": optax.chain(
        optaxclip.record("gradients", window=8),
        optaxclip.clip_by_norm(1.0),
        optax.adam(1e-2),
        optaxclip.record("updates"),
    ),
    "stabilized": optaxclip.stabilize(optax.adam(1e-2)),
}


def initial_params():
    rng = np.random.default_rng(0)
    return {
        "rnn": {
            "kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
            "bias": jnp.zeros(3),
        },
        "head": jnp.asarray(rng.normal(size=3), jnp.float32),
    }


@functools.cache
def compiled_step(name):
    tx = TRANSFORMATIONS[name]

    @jax.jit
    def step(params, opt_state, x, bad):
        def loss_fn(params):
            state = jnp.tanh(x @ params["rnn"]["kernel"] + params["rnn"]["bias"])
            return jnp.mean((state @ params["head"] - 1) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        grads["rnn"]["bias"] += bad
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        updates = jax.tree.map(lambda u: jnp.where(jnp.isfinite(u), u, 0), updates)
        return optax.apply_updates(params, updates), opt_state

    return step


def start(name):
    return initial_params(), TRANSFORMATIONS[name].init(initial_params())


def train(name, run, steps):
    """The parameters and states after each of these steps."""
    runs = []
    for i in steps:
        x = np.random.default_rng(i).normal(size=(8, 4)).astype(np.float32)
        run = compiled_step(name)(*run, x, BAD_STEPS.get(i, 0.0))
        runs.append(run)
    return runs


# A detector has a recorder inside.
QUICK = [pytest.param("recorded", marks=pytest.mark.slow), "stabilized"]


@pytest.fixture(scope="module", params=QUICK)
def written(request, tmp_path_factory):
    """The directory of a run's events, and its metrics after each step."""
    name = request.param
    directory = tmp_path_factory.mktemp("events")
    read_metrics, steps = jax.jit(optaxclip.metrics), []
    with SummaryWriter(str(directory)) as writer:
        for i, (params, opt_state) in enumerate(
            train(name, start(name), range(NUM_STEPS))
        ):
            metrics = jax.device_get(read_metrics(opt_state, params))
            for key, value in metrics.items():
                writer.add_scalar(key, value, i)
            steps.append(metrics)
    return name, directory, steps


def read_events(directory) -> dict[str, dict[int, float]]:
    """The curves as TensorBoard reads them, `{name: {step: value}}`."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: {scalar.step: scalar.value for scalar in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


# --- TensorBoard


def test_tensorboard_reads_every_name_step_and_value(written):
    _, directory, steps = written
    read = read_events(directory)
    assert read.keys() == steps[0].keys()
    for name, curve in read.items():
        assert list(curve) == list(range(NUM_STEPS)), name
        expected = np.array([metrics[name] for metrics in steps], np.float32)
        found = np.array(list(curve.values()), np.float32)
        np.testing.assert_array_equal(found, expected, name)


def test_the_curves_are_of_a_run_with_inf_and_nan(written):
    """So that the equality above is about them."""
    name, directory, _ = written
    label = "gradients" if name == "recorded" else "explosions"
    read = read_events(directory)
    total, bias, head = (
        np.array(list(read[f"{label}/norm{leaf}"].values()))
        for leaf in ("", "/rnn/bias", "/head")
    )
    assert np.isinf(total[7])
    assert np.isinf(bias[7])
    assert np.isnan(total[13])
    assert np.isnan(bias[13])
    finite = np.delete(total, list(BAD_STEPS))
    assert np.isfinite(finite).all()
    assert np.unique(finite).size > NUM_STEPS // 2
    assert np.isfinite(head).all()
    assert list(read[f"{label}/num_nonfinite"].values()) == [0] * 7 + [1] * 6 + [2] * 7
    if name == "recorded":
        assert read["clip/norm"][0] == pytest.approx(total[0], rel=1e-6)
        updates = np.array(list(read["updates/norm"].values()))
        assert np.isfinite(updates[:7]).all()
        assert (updates[:7] < total[:7]).all()
        assert list(read["updates/num_nonfinite"].values())[:8] == [0] * 7 + [1]
    else:
        assert read["explosions/norm_limit"][0] == np.inf
        assert list(read["explosions/num_skipped"].values())[-1] == 2


KILLED = """
import os, signal, sys
import jax.numpy as jnp
import optaxclip
from tensorboardX import SummaryWriter

recorder = optaxclip.record()
state = recorder.init({"w": jnp.zeros(2)})
writer = SummaryWriter(sys.argv[1])
for i in range(20):
    _, state = recorder.update({"w": jnp.full(2, float(i))}, state)
    for name, value in optaxclip.metrics(state, {"w": 0}).items():
        writer.add_scalar(name, float(value), i)
    writer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_what_was_flushed_outlives_a_killed_process(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    read = read_events(tmp_path)
    assert len(read) >= 6, read.keys()
    # The flush of tensorboardX does not wait for its queue, of up to ten scalars.
    for curve in read.values():
        assert list(curve) == list(range(len(curve)))
        assert len(curve) >= 18
    for name in ("gradients/norm", "gradients/norm/w"):
        norms = {i: pytest.approx(2**0.5 * i) for i in read[name]}
        assert read[name] == norms


# --- MLflow


def for_mlflow(found: dict[str, Any]) -> dict[str, Any]:
    """By the line of the guide."""
    (line,) = re.findall(r"(\{re\.sub.*\})\n", optaxclip.tracking.__doc__ or "")
    return eval(line, {"re": re, "found": found})


def folders_that_are_files(names) -> set[str]:
    """Of a store that has a file for each name."""
    return {str(x) for name in names for x in PurePosixPath(name).parents} & set(names)


def test_names_for_mlflow_are_files_of_their_own():
    params = initial_params() | {"layers": {"bias": jnp.ones((2, 3))}, "~": jnp.ones(1)}
    clip = optaxclip.clip_by_norm(
        1.0, per="leaf", stacked=lambda name: "layers" in name
    )
    tx = optax.chain(clip, optaxclip.record())
    names = jax.eval_shape(optaxclip.metrics, tx.init(params), params)
    assert "clip/norm/layers/bias[0]" in names
    assert "gradients/norm" in folders_that_are_files(names)
    found = for_mlflow(names)
    assert len(found) == len(names)
    assert not folders_that_are_files(found)
    for name in found:
        # As `mlflow.utils.validation` checks them.
        assert re.fullmatch(r"[/\w.\- :]*", name)
        assert os.path.normpath(name) == name


# --- Checkpoints


@pytest.mark.parametrize("name", QUICK)
def test_a_restored_recorder_has_the_history_and_goes_on(name, tmp_path):
    label = "gradients" if name == "recorded" else "explosions"
    saved = train(name, start(name), range(10))[-1]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        restored: Any = checkpointer.restore(tmp_path / "checkpoint", start(name))
    chex.assert_trees_all_equal(restored, saved)

    def histories(run):
        params, opt_state = run
        return optaxclip.history(opt_state, params, label=label)

    kept = histories(restored)
    chex.assert_trees_all_equal(kept, histories(saved))
    # The ring of eight has gone round once, and step 7 was non-finite.
    assert list(kept.step) == list(range(2 if name == "recorded" else 0, 10))
    assert kept.step[kept.fired[:, 0]].tolist() == [7]
    assert kept.names == ["head", "rnn/bias", "rnn/kernel"]

    found, expected = (
        train(name, run, range(10, NUM_STEPS))[-1] for run in (restored, saved)
    )
    chex.assert_trees_all_equal(found, expected)
    assert list(histories(found).step)[-1] == NUM_STEPS - 1
    chex.assert_trees_all_equal(histories(found), histories(expected))


# --- Tables


def test_pandas_takes_the_columns():
    params, opt_state = train("recorded", start("recorded"), range(NUM_STEPS))[-1]
    kept = optaxclip.history(opt_state, params, label="gradients")
    table = pandas.DataFrame(kept.columns())
    rules = ["nonfinite", "norm_exploded", "share_exploded", "loss_exploded"]
    leaves = ["norm/head", "norm/rnn/bias", "norm/rnn/kernel"]
    floats = ["loss", "loss_limit", "norm", "limit"]
    assert list(table.columns) == ["step", *floats, *rules, *leaves]
    columns = {name: table[name].to_numpy() for name in table.columns}
    assert columns["step"].tolist() == list(range(12, NUM_STEPS))
    assert np.issubdtype(columns["step"].dtype, np.integer)
    assert {columns[name].dtype for name in rules} == {np.dtype(bool)}
    assert {columns[name].dtype for name in floats + leaves} == {np.dtype(np.float32)}

    is_bad = [False, True] + [False] * 6
    assert columns["nonfinite"].tolist() == is_bad
    assert not any(columns[name].any() for name in rules[1:])
    assert np.isposinf(columns["limit"]).all()
    assert np.isfinite(columns["loss"]).all()
    assert np.isnan(columns["norm"]).tolist() == is_bad
    np.testing.assert_array_equal(columns["loss"], kept.loss)
    norms = np.stack([columns[name] for name in leaves], axis=1)
    np.testing.assert_array_equal(norms, kept.norms)
    whole = np.sqrt(np.sum(norms.astype(float) ** 2, axis=1))
    np.testing.assert_allclose(columns["norm"], whole, rtol=1e-6)
