"""The regression that explodes: its loss, its training, and what it says."""

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optaxclip

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def blowup() -> Any:
    return importlib.import_module("regression_blowup")


def test_targets_of_another_shape_are_compared_with_every_output(blowup):
    outputs, targets = np.random.default_rng(0).normal(size=(2, 16, 1)) * [[[3]], [[9]]]
    outputs, targets = outputs.astype(np.float32), targets.astype(np.float32)
    right = blowup.squared_error(outputs, targets)
    np.testing.assert_allclose(right, np.mean((outputs - targets) ** 2), rtol=1e-5)
    # All pairs: what the outputs miss the mean target by, and a variance that stays.
    wrong = blowup.squared_error(outputs, targets[:, 0])
    pairs = np.mean((outputs - targets.mean()) ** 2) + targets.var()
    np.testing.assert_allclose(wrong, pairs, rtol=1e-5)
    grads = jax.grad(blowup.squared_error)(outputs, targets[:, 0])
    expected = 2 / 16 * (outputs - targets.mean())
    np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=1e-6)


def numpy_training(weights, x, y, batches, clip, broadcasts):
    """SGD with momentum on the MLP, by hand, in float64; what `train` returns."""
    weights = [np.asarray(w, np.float64) for w in weights]
    traces, measures = [np.zeros_like(w) for w in weights], []

    def forward(x):
        hidden = np.maximum(x @ weights[1] + weights[0], 0)
        return hidden, hidden @ weights[3] + weights[2]

    for batch in batches.reshape(-1, batches.shape[-1]):
        hidden, outputs = forward(x[batch])
        targets = y[batch, 0] if broadcasts else y[batch]
        errors = outputs - targets
        slopes = 2 * errors.mean(axis=1, keepdims=True) / len(batch)
        back = slopes @ weights[3].T * (hidden > 0)
        grads = [back.sum(0), x[batch].T @ back, slopes.sum(0), hidden.T @ slopes]
        norm = math.sqrt(sum(np.sum(g**2) for g in grads))
        kernels = [np.linalg.norm(grads[i]) for i in (1, 3)]
        measures.append((np.mean(errors**2), norm, *kernels))
        for i, grad in enumerate(clip(grads, norm)):
            traces[i] = 0.8 * traces[i] + grad
            weights[i] = weights[i] - 0.07 * traces[i]
    loss = np.mean((forward(x)[1] - y) ** 2)
    return loss, np.array(measures).reshape(*batches.shape[:2], 4)


def by_norm(grads, norm):
    return [g * min(1, 1 / norm) for g in grads]


def by_value(grads, norm):
    return [np.clip(g, -1, 1) for g in grads]


@pytest.mark.parametrize(
    ("clip", "naive", "broadcasts"),
    [
        (optaxclip.clip_by_norm(1.0), by_norm, False),
        pytest.param(
            optaxclip.clip_by_value(1.0), by_value, True, marks=pytest.mark.slow
        ),
    ],
)
def test_it_trains_as_by_hand(blowup, clip, naive, broadcasts):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 20)), 50 * rng.normal(size=(24, 1))
    batches = np.stack([rng.permutation(24).reshape(3, 8) for _ in range(2)])
    graphdef, params = nnx.split(blowup.make_mlp(0))
    weights = jax.tree.leaves(params)  # bias before kernel, in both layers
    assert [w.shape for w in weights] == [(25,), (20, 25), (1,), (25, 1)]
    for bias in weights[::2]:
        np.testing.assert_allclose(bias, 0.01)
    for kernel in weights[1::2]:  # Xavier: uniform up to sqrt(6 / (inputs + outputs))
        bound = math.sqrt(6 / sum(kernel.shape))
        assert 0.85 * bound < jnp.abs(kernel).max() <= bound

    tx = optax.chain(clip, optax.sgd(0.07, momentum=0.8))
    data = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), batches
    loss, measures = jax.jit(
        lambda: blowup.train(tx, graphdef, broadcasts, params, *data)
    )()
    expected, expected_measures = numpy_training(
        weights, x, y, batches, naive, broadcasts
    )
    np.testing.assert_allclose(np.stack(measures, -1), expected_measures, rtol=1e-3)
    np.testing.assert_allclose(loss, expected, rtol=1e-3)


@pytest.mark.slow
def test_what_it_returns_is_what_it_prints_and_draws(
    blowup, tmp_path, capsys, monkeypatch
):
    arms, drawn = blowup.make_arms(551, 0.01), {}
    assert list(arms) == [
        *("none", "none, broadcast", "L2", "value 1", "value 0.0426", "norm 1"),
        *("norm 1 per leaf", "norm 1 and L2", "norm 1, broadcast"),
    ]
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.0, 2.0])}
    for name, norm in (("value 1", 3**0.5), ("norm 1", 1), ("norm 1 per leaf", 2**0.5)):
        updates, _ = arms[name][0].update(grads, arms[name][0].init(grads))
        np.testing.assert_allclose(optaxclip.global_norm(updates), norm, rtol=1e-5)
    few = {name: arms[name] for name in ("none", "none, broadcast", "norm 1")}
    draw = blowup.draw
    monkeypatch.setattr(blowup, "make_arms", lambda num_params, decay: few)
    monkeypatch.setattr(
        blowup,
        "draw",
        lambda path, result: drawn.update(result.runs) or draw(path, result),
    )
    result = blowup.main(epochs=6, seeds=2, logdir=tmp_path / "new")

    assert list(drawn) == list(few)
    assert list(result) == [*few, "picture"]
    lines = capsys.readouterr().out.splitlines()
    for line, (name, (losses, norms, *kernels)) in zip(
        lines[2:5], drawn.items(), strict=True
    ):
        assert losses.shape == norms.shape == (2, 6, 7)
        for kernel in kernels:
            assert (kernel <= norms)[np.isfinite(norms)].all()
        found = result[name]
        for epoch, of_seed in zip(found["first_nan"], losses, strict=True):
            alive = of_seed[: epoch - 1] if epoch else of_seed
            assert not np.isnan(alive).any()
            assert epoch == 0 or np.isnan(of_seed[epoch - 1]).any()
        assert found["max_norm"] == norms[np.isfinite(norms)].max()
        assert ((found["loss"] == np.inf) == (found["first_nan"] > 0)).all()
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[0] == name
        assert cells[1].startswith(f"{np.median(found['loss']):.3g} (")
        assert cells[2] == f"{found['max_norm']:.3g}"
        assert cells[3] == " ".join(map(str, found["first_nan"]))
    assert result["none"]["first_nan"].tolist() == [1, 1]
    assert result["norm 1"]["first_nan"].tolist() == [0, 0]
    assert (result["norm 1"]["loss"] < 0.9 * drawn["norm 1"][0][:, 0, 0]).all()
    assert (result["none, broadcast"]["first_nan"] > 1).any()

    from matplotlib.image import imread

    assert result["picture"] == tmp_path / "new" / "regression_blowup.png"
    assert imread(result["picture"]).shape[:2] == (800, 1100)


@pytest.mark.parametrize("name", ["epochs", "seeds", "learning_rate", "weight_decay"])
def test_a_knob_out_of_range_is_named(blowup, name):
    with pytest.raises(
        blowup.cli.InputError, match=f"^{name} must be positive, got 0$"
    ):
        blowup.main(**{name: 0})
