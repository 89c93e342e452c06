"""What the example measures without Jacobians is what the Jacobians say."""

import importlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def bptt() -> Any:
    return importlib.import_module("bptt")


def slope(logs: np.ndarray) -> float:
    """The least squares slope over the middle half."""
    times = np.arange(len(logs))[len(logs) // 4 : -(len(logs) // 4)]
    return float(np.polyfit(times, logs[times], 1)[0])


@pytest.mark.parametrize("name", ["tanh", pytest.param("LSTM", marks=pytest.mark.slow)])
def test_products_are_those_of_full_jacobians(bptt, name):
    cell, length = bptt.CELLS[name], 8
    params = jax.tree.map(lambda x: x[-1, 0], bptt.initialize(name, 4, 1))
    xs = np.random.default_rng(1).uniform(-1, 1, (3, length)).astype(np.float32)
    gaps = np.array([1, 3, 7])
    run = jax.jit(lambda xs: bptt.measure(cell, params, xs, gaps, powers=100))
    found = jax.device_get(run(xs))

    size = params["V"].size
    jacobian = jax.jit(jax.jacobian(lambda a, x: cell(params, a, x)))
    pull = jax.jit(jax.jacobian(lambda w, a, x: cell(params | {"W": w}, a, x)))
    start = np.asarray(jax.random.normal(jax.random.key(0), (size,)))
    forwards, backwards, added = [], [], np.zeros([length, *params["W"].shape])
    for sequence in xs:
        states = [np.zeros(size, np.float32)]
        for x in sequence:
            states.append(np.asarray(cell(params, states[-1], x)))
        steps = [
            np.asarray(jacobian(*each))
            for each in zip(states[:-1], sequence, strict=True)
        ]
        if np.array_equal(sequence, xs[0]):
            for gap, spectral in zip(gaps, found["spectral"], strict=True):
                product = np.linalg.multi_dot([np.eye(size), *steps[: -gap - 1 : -1]])
                expected = np.linalg.norm(product, ord=2)
                np.testing.assert_allclose(spectral, expected, rtol=1e-4)
        tangents = [start]
        for step in steps[1:]:
            tangents.append(step @ tangents[-1])
        error = states[-1] @ params["V"] - sequence[0]
        gradients = [2 * error * params["V"] / len(xs)]
        for step in reversed(steps[1:]):
            gradients.insert(0, step.T @ gradients[0])
        forwards.append(np.log(np.linalg.norm(tangents, axis=1)))
        backwards.append(np.log(np.linalg.norm(gradients, axis=1)))
        for t, gradient in enumerate(gradients):
            added[t] += np.tensordot(
                gradient, pull(params["W"], states[t], sequence[t]), 1
            )

    forwards, backwards = np.mean(forwards, axis=0), np.mean(backwards, axis=0)
    np.testing.assert_allclose(found["states"], np.exp(backwards), rtol=1e-4)
    np.testing.assert_allclose(found["predicted"], np.exp(slope(forwards)), rtol=1e-4)
    np.testing.assert_allclose(found["measured"], np.exp(-slope(backwards)), rtol=1e-4)
    norms = np.linalg.norm(added.reshape(length, -1), axis=1)
    np.testing.assert_allclose(found["added"], norms, rtol=1e-4)
    whole = jax.grad(bptt.loss_fn)(params, cell, xs, {}, 0 * xs)["W"]
    np.testing.assert_allclose(added.sum(axis=0), whole, rtol=1e-3, atol=1e-6)


def test_the_lstm_has_its_gates(bptt):
    rng = np.random.default_rng(0)
    params = {"W": rng.normal(size=(12, 3)), "U": rng.normal(size=12)}
    params = jax.tree.map(np.float32, params | {"b": rng.normal(size=12)})
    h, c = rng.normal(size=(2, 3)).astype(np.float32)
    z = params["W"] @ h + params["U"] * 0.5 + params["b"]
    i, f, o = 1 / (1 + np.exp(-z[:9].reshape(3, 3)))
    c_next = f * c + i * np.tanh(z[9:])
    state = bptt.lstm(params, jnp.concatenate([h, c]), jnp.float32(0.5))
    expected = np.concatenate([o * np.tanh(c_next), c_next])
    np.testing.assert_allclose(state, expected, rtol=1e-4, atol=1e-6)
    weights = bptt.initialize("LSTM", 5, 2)
    gates = weights["W"].reshape(len(bptt.RADII), 2, 4, 5, 5)
    found = np.abs(np.linalg.eigvals(gates)).max(axis=-1)
    for radius, each in zip(bptt.RADII, found, strict=True):
        np.testing.assert_allclose(each, radius, rtol=1e-4)
    np.testing.assert_array_equal(weights["b"][0, 0], np.repeat([0, 1, 0, 0], 5))


def test_a_linear_network_grows_by_its_spectral_radius(bptt):
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    xs = np.random.default_rng(1).uniform(-1, 1, (2, 12)).astype(np.float32)
    cell, gaps = bptt.partial(bptt.rnn, jnp.asarray), np.array([1, 4, 11])
    run = jax.jit(lambda params: bptt.measure(cell, params, xs, gaps))
    for radius in (0.5, 1.25):
        params = {"W": radius * rotation, "U": np.ones(6), "b": np.ones(6)}
        params = jax.tree.map(np.float32, params | {"V": np.arange(1, 7)})
        found = run(params)
        np.testing.assert_allclose(found["predicted"], radius, rtol=1e-5)
        np.testing.assert_allclose(found["measured"], radius, rtol=1e-5)
        powers = radius ** gaps.astype(float)
        np.testing.assert_allclose(found["spectral"], powers, rtol=1e-5)


@pytest.mark.slow
def test_what_is_printed_is_what_the_runs_did(bptt, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bptt, "CELLS", {"ReLU": bptt.CELLS["ReLU"]})
    monkeypatch.setattr(bptt, "RADII", (0.5, 2.5))
    monkeypatch.setattr(bptt, "STEPS_PER_ROUND", 12)
    monkeypatch.setattr(bptt, "BATCH_SIZE", 2)
    result = bptt.main(seeds=2, hidden=6, logdir=tmp_path)
    for name in ("foretold", "none"):
        assert not result[name][0, 0].any()
    assert result["none"][0, 1].any()
    np.testing.assert_array_equal(result["foretold"], result["predicted"][..., 0] > 1)
    lines = capsys.readouterr().out.splitlines()
    for i, line in enumerate(lines[1:3]):
        cells = [cell.strip() for cell in line.split("|")]
        counts = [result[key][0, i].sum() for key in ("foretold", "none", "clip")]
        assert cells[4:] == [str(count) for count in counts]
        for cell, key in zip(cells[2:4], ("predicted", "measured"), strict=True):
            assert cell.startswith(f"{np.median(result[key][0, i, :, 0]):.3f} (")
    told, none = result["foretold"], result["none"]
    said = lines[3].split("foretold: ")[1]
    hits, all_, others = map(int, re.findall(r"\d+", said)[:3])
    assert (hits, all_, others) == (
        (told & none).sum(),
        none.sum(),
        (told > none).sum(),
    )
    assert result["picture"] == tmp_path / "bptt.png"
    assert result["picture"].exists()


@pytest.mark.parametrize("name", ["seeds", "hidden"])
def test_a_knob_out_of_range_is_named(bptt, name):
    with pytest.raises(bptt.cli.InputError, match=f"^{name} must be positive, got 0$"):
        bptt.main(**{name: 0})
