"""The private run clips each example, adds the right noise, and accounts for it."""

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def private() -> Any:
    return importlib.import_module("private_mnist")


@pytest.fixture
def grads() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"w": (6, 3, 2), "b": (6, 4)}
    sizes = np.array([0.1, 0.5, 1, 3, 10, 1e20], np.float32)  # the last overflows
    return {
        name: (
            rng.normal(size=shape) * sizes.reshape(-1, *[1] * (len(shape) - 1))
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(tree[name]) for name in sorted(tree)])


def test_the_sum_is_of_clipped_gradients_and_no_bad_one_poisons_it(private, grads):
    key, mask = jax.random.key(0), np.array([1, 1, 0, 1, 1, 1], bool)
    private_sum = jax.jit(private.private_sum)
    total, norms = private_sum(grads, mask, key, 1.5, 0.0)
    rows = [{n: x[i].astype(float) for n, x in grads.items()} for i in range(6)]
    lengths = np.array([np.linalg.norm(flat(row)) for row in rows])
    clipped = [flat(r) * min(1, 1.5 / n) for r, n in zip(rows, lengths, strict=True)]
    np.testing.assert_allclose(norms, lengths, rtol=1e-6)
    want = np.sum(np.array(clipped)[mask], axis=0)
    np.testing.assert_allclose(flat(total), want, rtol=1e-5, atol=1e-6)
    for left_out in range(6):  # the sensitivity, which the noise is in proportion to
        fewer = mask & (np.arange(6) != left_out)
        less, _ = private_sum(grads, fewer, key, 1.5, 0.0)
        assert np.linalg.norm(flat(total) - flat(less)) <= 1.5 * (1 + 1e-5)

    for bad in (np.nan, np.inf, -np.inf):
        poisoned = {name: x.copy() for name, x in grads.items()}
        poisoned["w"][3, 1, 1] = bad
        got, _ = private_sum(poisoned, mask, key, 1.5, 2.0)
        without = mask & (np.arange(6) != 3)
        want, _ = private_sum(grads, without, key, 1.5, 2.0)
        np.testing.assert_array_equal(flat(got), flat(want))
        assert np.isfinite(flat(got)).all()


def test_the_noise_has_the_standard_deviation_and_each_batch_its_own(private):
    grads = {"w": jnp.ones((2, 200, 100)), "b": jnp.ones((2, 20_000))}
    nobody = jnp.zeros(2, bool)
    keys = jax.random.split(jax.random.key(0))
    private_sum = jax.jit(private.private_sum)
    noise = [private_sum(grads, nobody, key, 1.5, 1.95)[0] for key in keys]
    for tree in noise:
        for name in tree:
            # Of 20,000 samples, the mean is normal and the variance nearly so.
            x = np.asarray(tree[name], float).ravel() / 1.95
            assert abs(x.mean()) < 4 / math.sqrt(x.size)
            assert abs(x.var() - 1) < 4 * math.sqrt(2 / x.size)
    pairs = [noise[0]["w"].ravel(), noise[0]["b"], noise[1]["w"].ravel()]
    correlations = np.corrcoef(np.array(pairs))[np.triu_indices(3, k=1)]
    assert np.abs(correlations).max() < 4 / math.sqrt(20_000)


def test_every_example_is_in_every_batch_with_the_same_probability(private):
    indices, mask = private.poisson_batches(50, 0.2, 4000, seed=1)
    assert indices.shape == mask.shape
    member = np.zeros([4000, 50], int)
    for row, batch, kept in zip(member, indices, mask, strict=True):
        np.add.at(row, batch[kept], 1)
    assert member.max() == 1  # nobody twice
    sizes = mask.sum(axis=1)
    np.testing.assert_array_equal(sizes, member.sum(axis=1))
    assert sizes.max() == mask.shape[1]  # none cut off
    assert abs(sizes.var() / (50 * 0.2 * 0.8) - 1) < 0.15  # binomial
    deviations = (member.mean(axis=0) - 0.2) / math.sqrt(0.2 * 0.8 / 4000)
    assert np.abs(deviations).max() < 4.5


def test_epsilon_is_the_published_one_but_for_the_conversion(private):
    sigma, q, steps = 1.3, 256 / 60_000, 15 * (60_000 // 256)

    def renyi(alpha: int) -> float:
        """Of the sampled Gaussian mechanism: Mironov et al., 1908.10530, eq. (30)."""
        terms = [
            math.comb(alpha, k)
            * (1 - q) ** (alpha - k)
            * q**k
            * math.exp((k * k - k) / (2 * sigma**2))
            for k in range(alpha + 1)
        ]
        return steps * math.log(sum(terms)) / (alpha - 1)

    orders = range(2, 40)
    published = min(renyi(a) + math.log(1e5) / (a - 1) for a in orders)
    assert round(published, 2) == private.PUBLISHED[0] == 1.19
    # Proposition 12 of Canonne et al., 2004.00010, gives less for the same.
    improved = min(
        renyi(a) + math.log1p(-1 / a) + math.log(1e5 / a) / (a - 1) for a in orders
    )
    rdp = private.epsilon("RDP", sigma, 256, 60_000, 15)
    assert rdp == pytest.approx(improved, rel=0.01)
    assert 0.8 < private.epsilon("PLD", sigma, 256, 60_000, 15) < rdp < 1.19
    assert private.epsilon("RDP", 0.0, 256, 60_000, 15) == math.inf


class Linear(nnx.Module):
    """In place of the CNN, which takes long to compile."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.head = nnx.Linear(784, 10, rngs=rngs)

    def __call__(self, image):
        return self.head(image.ravel())


def test_the_network_is_the_tutorials(private):
    graphdef, params = nnx.split(private.CNN(rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(params)) == 26_010
    image = jnp.zeros((28, 28))
    logits = jax.eval_shape(lambda x: nnx.merge(graphdef, params)(x), image)
    assert logits.shape == (10,)


@pytest.mark.slow
def test_main_reports_what_it_draws(private, tmp_path, capsys, monkeypatch):
    drawn, draw = {}, private.draw

    def remember(path, runs, spent, limit):
        drawn.update(runs=runs, spent=spent, limit=limit)
        draw(path, runs, spent, limit)

    given, added, private_sum, apply = [], [], private.private_sum, optax.apply_updates

    def spy_sum(grads, mask, key, max_norm, stddev):
        total, norms = private_sum(grads, mask, key, max_norm, stddev)
        seen = (max_norm, stddev, total["head"]["bias"][...])
        jax.debug.callback(lambda *x: given.append(x), *seen, ordered=True)
        return total, norms

    def spy_apply(params, updates):
        bias = updates["head"]["bias"][...]
        jax.debug.callback(added.append, bias, ordered=True)
        return apply(params, updates)

    monkeypatch.setattr(private, "CNN", Linear)
    monkeypatch.setattr(private, "draw", remember)
    monkeypatch.setattr(private, "private_sum", spy_sum)
    monkeypatch.setattr(optax, "apply_updates", spy_apply)
    full = private.load()
    small = type(full)(*(x[:40] for x in full))
    monkeypatch.setattr(private, "load", lambda data: small)
    result = private.main(batch_size=10, epochs=2, max_norm=3.0, logdir=tmp_path)
    jax.effects_barrier()
    limits, stddevs, sums = (np.array(x) for x in zip(*given, strict=True))
    np.testing.assert_allclose(limits, np.repeat([3, 3, np.inf], 8))
    np.testing.assert_allclose(stddevs, np.repeat([3 * 1.3, 0, 0], 8))
    np.testing.assert_allclose(np.array(added), -0.25 / 10 * sums, rtol=1e-6)
    runs = drawn["runs"]
    assert list(runs) == ["private", "clip, no noise", "no clip, no noise"]
    assert drawn["limit"] == 3.0
    for name, (accuracies, norms) in runs.items():
        assert accuracies.shape == (2,)
        assert len(norms) == 8
        assert result[name]["accuracy"] == accuracies[-1]
        limit = math.inf if name.startswith("no clip") else 3.0
        valid = norms[~np.isnan(norms)]
        assert result[name]["clipped"] == pytest.approx((valid > limit).mean())
        np.testing.assert_array_equal(norms[0], runs["private"][1][0])
    assert result["clip, no noise"]["clipped"] > 0
    assert (runs["private"][1][1:] != runs["clip, no noise"][1][1:]).any()
    assert drawn["spent"][-1] == result["private"]["RDP"]
    assert (
        result["clip, no noise"]["RDP"]
        == result["no clip, no noise"]["PLD"]
        == math.inf
    )
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(runs, lines[1:4], strict=True):
        cells = [cell.strip() for cell in line.split("|")]
        assert cells == [name, *(f"{x:.3f}" for x in result[name].values())]
    assert result["picture"] == tmp_path / "private_mnist.png"
    assert result["picture"].exists()


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_a_knob_out_of_range_is_named(private, value):
    for name in ("noise_multiplier", "max_norm", "learning_rate", "batch_size"):
        with pytest.raises(private.cli.InputError, match=f"^{name} must be positive"):
            private.main(**{name: value})


@pytest.mark.slow
def test_a_batch_is_no_larger_than_the_training_set(private):
    with pytest.raises(
        private.cli.InputError, match=r"^batch_size is 5000, of only 4000 "
    ):
        private.main(batch_size=5000)
