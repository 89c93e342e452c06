"""The race of a constant step with a clip: its function, its counts, its table."""

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def faster() -> Any:
    return importlib.import_module("faster_with_clipping")


def naive_steps(distance, rate, limit, tolerance, max_steps):
    """Gradient descent in float64; None if it does not arrive."""
    point = np.array([distance, 1.0])
    for steps in range(max_steps + 1):
        if not np.abs(point).max() < 100:
            return None
        gradient = np.sinh(point)
        norm = np.linalg.norm(gradient)
        if norm <= tolerance:
            return steps
        point = point - rate * gradient * min(1, limit / norm)
    return None


@pytest.mark.slow
def test_the_function_is_smooth_in_the_sense_of_the_paper(faster):
    points = np.random.default_rng(0).normal(size=(100, 2)) * 4
    gradients = jax.vmap(jax.grad(faster.objective))(points)
    hessians = jax.vmap(jax.hessian(faster.objective))(points)
    curvatures = np.linalg.norm(hessians, ord=2, axis=(1, 2))
    norms = np.linalg.norm(gradients, axis=1)
    assert (curvatures <= (1 + norms) * (1 + 1e-5)).all()  # L0 = L1 = 1
    assert curvatures.max() > 1000  # and there is no L

    for distance in (2.0, 5.0):
        x, y = np.meshgrid(np.linspace(0, 6, 601), np.linspace(0, 6, 601))
        below = np.cosh(x) + np.cosh(y) <= np.cosh(distance) + np.cosh(1)
        m = np.max(np.hypot(np.sinh(x), np.sinh(y)), where=below, initial=0)
        np.testing.assert_allclose(faster.largest_gradient(distance), m, rtol=0.02)


def test_a_race_is_won_as_by_hand(faster):
    # At 2 * distance / sinh(distance) x jumps from side to side: above, it diverges.
    unstable = 2 * 4 / math.sinh(4)
    rates = np.array([0.1, 0.95, 1.05, 100, 0.5]) * unstable
    limits = np.full(5, np.inf)
    steps = [naive_steps(4, rate, np.inf, 1e-3, 400) for rate in rates]
    assert steps[2] is steps[3] is None
    found, winner, arrived = faster.race(4, rates, limits, 1e-3, 400)
    finished = {i: n for i, n in enumerate(steps) if n is not None}
    assert int(winner) == min(finished, key=finished.__getitem__)
    assert int(found) == min(finished.values())
    assert arrived
    for lanes in ([2], [3], [2, 3]):
        assert not faster.race(4, rates[lanes], limits[lanes], 1e-3, 400)[2]

    for rate, limit in (faster.THEOREM, (1.0, 4.0), (0.3, 0.5)):
        one = np.array([rate]), np.array([limit])
        expected = naive_steps(9, rate, limit, 1e-3, 400)
        assert expected is not None
        assert int(faster.race(9, *one, 1e-3, 400)[0]) == expected
        assert int(faster.race(9, *one, 1e-3, 3)[0]) == 3  # gives up
        norms = faster.norms_along(9, (rate, limit), expected)
        np.testing.assert_allclose(norms[0], np.linalg.norm(np.sinh([9, 1])), rtol=1e-5)
        assert norms[-1] <= 1e-3 < norms[-2]


@pytest.mark.slow
def test_the_numbers_are_those_of_the_theory_and_of_the_table(
    faster, tmp_path, capsys, monkeypatch
):
    drawn, draw = {}, faster.draw
    monkeypatch.setattr(
        faster,
        "draw",
        lambda path, result: drawn.update(result.table) or draw(path, result),
    )
    few = np.geomspace(0.1, 10, 5)
    monkeypatch.setattr(faster, "TUNED_RATES", few)
    monkeypatch.setattr(faster, "TUNED_LIMITS", few)
    result = faster.main(largest=8, max_steps=500, logdir=tmp_path / "new")
    capped = result["capped"].tolist()
    assert capped == [False] * 6 + [True]  # the last needs about 690
    assert result["distance"].tolist() == list(range(2, 9))

    rate, limit = result["pair"]
    total = {
        (a, b): sum(naive_steps(x, a, b, 1e-3, 2000) or 1e9 for x in range(2, 9))
        for a in few
        for b in few
    }
    assert total[rate, limit] == min(total.values())
    rows = zip(
        *(result[n] for n in ("distance", "rate", "constant", "theorem 3", "tuned")),
        strict=True,
    )
    for distance, step, constant, theorem, tuned in rows:
        assert theorem == naive_steps(
            distance, *faster.THEOREM, tolerance=1e-3, max_steps=500
        )
        assert tuned == naive_steps(distance, rate, limit, 1e-3, 500)
        naive = naive_steps(distance, step, np.inf, 1e-3, 500)
        if distance == 8:
            assert (constant, naive) == (500, None)
            continue
        assert naive is not None
        assert abs(constant - naive) <= 1
        assert step < 2 * distance / math.sinh(distance)
        if distance >= 5:
            # y' = -sinh(y) from 1 on, in steps of the largest size that is stable.
            time = math.log(math.tanh(0.5) / math.tanh(1e-3 / 2))
            bound = time * math.sinh(distance) / (2 * distance)
            assert 0.97 * bound < constant < 1.2 * bound

    lines = capsys.readouterr().out.splitlines()
    for i, line in enumerate(lines[2:9]):
        cells = [cell.strip() for cell in line.split("|")]
        sign = ">=" if capped[i] else ""
        counts = [result[name][i] for name in faster.KINDS]
        assert cells[0] == str(result["distance"][i])
        assert cells[2:5] == [f"{sign}{counts[0]}", str(counts[1]), str(counts[2])]
        ratios = [f"{sign}{counts[0] / count:.3g}" for count in counts[1:]]
        assert cells[5] == ", ".join(ratios)
    for name in ("M", *faster.KINDS):
        np.testing.assert_array_equal(drawn[name], result[name])

    from matplotlib.image import imread

    assert result["picture"] == tmp_path / "new" / "faster_with_clipping.png"
    assert imread(result["picture"]).shape[:2] == (500, 1300)


@pytest.mark.parametrize(
    ("name", "value"), [("largest", 16), ("tolerance", 0.0), ("max_steps", 0)]
)
def test_a_knob_out_of_range_is_named(faster, name, value):
    with pytest.raises(
        faster.cli.InputError, match=f"^{name} must be from .* got {value}$"
    ):
        faster.main(**{name: value})


def test_a_best_at_the_edge_is_refused(faster):
    assert faster.inside(np.array([1.0, 2.0, 3.0]), jnp.array(1)) == 2
    for edge in (0, 2):
        with pytest.raises(RuntimeError, match="edge"):
            faster.inside(np.array([1.0, 2.0, 3.0]), edge)
