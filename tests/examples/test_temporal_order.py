"""The task is the paper's, and the run with and without clipping what it says."""

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def order() -> Any:
    return importlib.import_module("temporal_order")


@pytest.mark.slow
@pytest.mark.parametrize("length", [10, 25, 40])
def test_two_symbols_stand_where_the_paper_has_them(order, length):
    symbols, classes = order.sequences(jax.random.key(1), length, 2000)
    assert symbols.shape == (length, 2000)
    seen: tuple[set, set] = set(), set()
    for row, label in zip(np.asarray(symbols).T, np.asarray(classes), strict=True):
        places = np.flatnonzero(row < 2)
        assert len(places) == 2
        for place, before in zip(places, seen, strict=True):
            before.add(int(place))
        assert label == 2 * row[places[0]] + row[places[1]]
    tenth = length // 10
    starts = tenth, 4 * length // 10
    assert seen == tuple(set(range(start, start + tenth)) for start in starts)
    assert set(np.unique(symbols)) == set(range(6))
    shares = np.bincount(classes, minlength=4) / 2000
    np.testing.assert_allclose(shares, 0.25, atol=0.05)


def radius_by_powers(matrix: np.ndarray) -> float:
    """Gelfand: |W^k|^(1/k) goes to the spectral radius, here for k = 2^20."""
    power, log_scale = matrix.astype(float), 0.0
    for _ in range(20):
        norm = np.linalg.norm(power)
        power, log_scale = (
            (power / norm) @ (power / norm),
            2 * (log_scale + np.log(norm)),
        )
    return math.exp((log_scale + np.log(np.linalg.norm(power))) / 2**20)


def test_it_starts_sparse_with_a_spectral_radius_of_095(order):
    recurrent = order.smart_tanh(3)["recurrent"]
    assert recurrent.dtype == np.float32
    assert ((recurrent != 0).sum(axis=1) == 15).all()
    assert radius_by_powers(recurrent) == pytest.approx(0.95, rel=1e-4)
    others = order.smart_tanh(4)["recurrent"]
    matrices = np.stack([2 * recurrent, others * np.nan, others])
    radii = order.spectral_radius(matrices)
    np.testing.assert_allclose(radii, [1.9, np.nan, 0.95], rtol=1e-5)


def by_hand(
    params: dict[str, Any], symbols: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits, and the gradients of the loss by back-propagation through time."""
    inputs = np.eye(6)[symbols]
    states = [np.zeros((len(classes), len(params["bias"])))]
    for x in inputs:
        past = states[-1] @ params["recurrent"]
        states.append(np.tanh(x @ params["input"] + past + params["bias"]))
    logits = states[-1] @ params["output"] + params["output_bias"]
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    errors = (chances - np.eye(4)[classes]) / len(classes)
    grads = {name: np.zeros(np.shape(x)) for name, x in params.items()}
    grads["output"], grads["output_bias"] = states[-1].T @ errors, errors.sum(axis=0)
    back = errors @ params["output"].T
    for x, before, after in zip(
        inputs[::-1], states[-2::-1], states[:0:-1], strict=True
    ):
        back = back * (1 - after**2)
        grads["input"] += x.T @ back
        grads["recurrent"] += before.T @ back
        grads["bias"] += back.sum(axis=0)
        back = back @ params["recurrent"].T
    return logits, grads


@pytest.mark.slow
def test_training_is_that_of_a_plain_loop(order, monkeypatch):
    monkeypatch.setattr(order, "EVERY", 3)
    monkeypatch.setattr(order, "NUM_TEST", 40)
    limits, rate, length, seeds = [math.inf, 0.02], 1.0, 10, 2
    starts = [order.smart_tanh(seed) for seed in range(seeds)]
    params = jax.tree.map(lambda *x: np.array([x, x]), *starts)
    errors, radii, norms = order.train(params, jnp.array(limits), rate, length, 3)
    assert errors.shape == radii.shape == norms.shape == (2, 2, seeds)
    np.testing.assert_allclose(radii[0], 0.95, rtol=1e-5)
    key = jax.random.split(jax.random.key(0), 2)[1]
    keys = jax.random.split(key, (4, seeds))
    for i, limit in enumerate(limits):
        for seed, start in enumerate(starts):
            now = {name: x.astype(float) for name, x in start.items()}
            seen = []
            for key in keys[1:, seed]:
                batch = map(np.asarray, order.sequences(key, length, order.BATCH_SIZE))
                _, grads = by_hand(now, *batch)
                seen.append(math.sqrt(sum((g**2).sum() for g in grads.values())))
                shrink = min(1, limit / seen[-1])
                now = {name: x - rate * shrink * grads[name] for name, x in now.items()}
            assert norms[1, i, seed] == pytest.approx(max(seen), rel=1e-3)
            assert radii[1, i, seed] == pytest.approx(
                radius_by_powers(now["recurrent"]), rel=1e-4
            )
            symbols, classes = map(
                np.asarray, order.sequences(keys[0, seed], length, 40)
            )
            logits, _ = by_hand(now, symbols, classes)
            wrong = (logits.argmax(axis=1) != classes).mean()
            assert errors[1, i, seed] == pytest.approx(wrong, abs=1 / 40)
    assert (norms[1] > 0.02).all()  # so the second arm clipped


@pytest.mark.slow
def test_the_result_tells_the_runs(order, tmp_path, capsys, monkeypatch):
    nan, shape = np.nan, (3, 2, 3)  # checks, arms, seeds
    errors = np.full(shape, 0.75)
    errors[1:, 0, 0], errors[1, 0, 1], errors[2, 1] = 0.001, 0.0, [0.0, 0.0099, 0.01]
    radii, norms = np.arange(18.0).reshape(shape), np.arange(18.0).reshape(shape) % 7
    radii[2, 0, 2] = nan
    given = []

    def train(*arguments):
        given.append(arguments)
        return order.Run(errors, radii, norms)

    monkeypatch.setattr(order, "train", train)
    knobs: dict[str, Any] = {"lengths": (20, 30), "seeds": 3, "steps": 1000}
    result = order.main(max_norm=2.0, logdir=tmp_path, **knobs)
    assert [arguments[2:] for arguments in given] == [
        (0.01, 20, 1000),
        (0.01, 30, 1000),
    ]
    for params, limits, *_ in given:
        np.testing.assert_array_equal(limits, [np.inf, 2])
        for leaf in jax.tree.leaves(params):
            assert leaf.shape[:2] == (2, 3)
            np.testing.assert_array_equal(leaf[0], leaf[1])  # the arms start alike
    without, clipped = result[20]["without"], result[30]["with"]
    assert [without[name] for name in ("solved", "at the end", "NaN")] == [2, 1, 1]
    assert [clipped[name] for name in ("solved", "at the end", "NaN")] == [2, 2, 0]
    np.testing.assert_array_equal(without["steps"], [500, 500, np.inf])
    np.testing.assert_array_equal(clipped["steps"], [1000, 1000, np.inf])
    np.testing.assert_array_equal(clipped["radius"], radii[2, 1])
    np.testing.assert_array_equal(clipped["largest norm"], norms[:, 1].max(axis=0))
    lines = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in lines[5].split("|")]
    assert cells[:5] == ["30", "with", "2", "2", "0"]
    assert cells[5] == "1000 (1000 to inf)"
    assert lines[6] == "of 6 runs 4 solve it with clipping, 4 without"
    assert result["picture"] == tmp_path / "temporal_order.png"
    assert result["picture"].exists()


@pytest.mark.parametrize("name", ["seeds", "max_norm", "learning_rate"])
def test_a_knob_out_of_range_is_named(order, name):
    for value in (0, -1, math.nan, math.inf):
        with pytest.raises(order.cli.InputError, match=f"^{name} must be positive"):
            order.main(**{name: value})
    for knobs in ({"steps": 499}, {"steps": 0}, {"lengths": (20, 9)}, {"lengths": ()}):
        with pytest.raises(order.cli.InputError, match=r"^steps in .* lengths .* got"):
            order.main(**knobs)
