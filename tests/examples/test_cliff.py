"""The walk at the cliff is gradient descent, and what is said of it is so."""

import importlib
from typing import Any

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def cliff() -> Any:
    return importlib.import_module("cliff")


def naive(w: float, b: float) -> tuple[float, np.ndarray]:
    """The loss and its gradient in float64, by forward sensitivities."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    x, slopes = 0.5, np.zeros(2)
    for _ in range(50):
        s = sigmoid(x)
        x, slopes = w * s + b, np.array([s, 1]) + w * s * (1 - s) * slopes
    s = sigmoid(x)
    return (s - 0.7) ** 2, 2 * (s - 0.7) * s * (1 - s) * slopes


def test_the_paths_are_those_of_gradient_descent(cliff):
    start = np.array([4.2, -2.5])
    for limit in (np.inf, 0.1):
        run = jax.jit(lambda start, limit=limit: cliff.descend(start, 0.3, limit, 12))
        points, losses, norms = run(np.float32(start))
        place, longest = start, 0
        for i in range(13):
            loss, gradient = naive(*place)
            norm = np.linalg.norm(gradient)
            np.testing.assert_allclose(points[i], place, rtol=1e-4)
            np.testing.assert_allclose(losses[i], loss, rtol=1e-3)
            np.testing.assert_allclose(norms[i], norm, rtol=1e-3)
            longest = max(longest, norm)
            place = place - 0.3 * gradient * min(1, limit / norm)
        assert longest > 0.15  # the limit matters


@pytest.mark.slow
def test_what_is_printed_is_what_happened(cliff, tmp_path, capsys):
    result = cliff.main(steps=70, starts=3, good=0.1, logdir=tmp_path / "new")
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    for i, (name, limit) in enumerate((("none", np.inf), ("norm", 1.0))):
        found = result[name]
        points = found["points"]
        assert points.shape == (71, 2)
        moved = np.linalg.norm(np.diff(points, axis=0), axis=1)
        worst = int(moved.argmax()) if name == "none" else None
        assert moved.max() <= 0.1 * min(limit, found["norm"]) * 1.001 + 1e-6
        if worst is not None:
            np.testing.assert_array_equal(found["at"], points[worst])
            np.testing.assert_array_equal(found["lands"], points[worst + 1])
        assert found["ends"].shape == (5, 3, 3)
        np.testing.assert_allclose(found["good"], (found["ends"] < 0.1).mean((1, 2)))
        assert lines[i + 1][0].strip() == name
        assert lines[i + 1][1].strip() == f"{found['norm']:.3g}"
        assert lines[i + 1][4].strip() == f"{found['losses'][-1]:.2g}"
        assert [x.strip() for x in lines[i + 6][1:]] == [
            f"{x:.1%}" for x in found["good"]
        ]
    assert result["none"]["norm"] > 1  # it met the cliff

    from matplotlib.image import imread

    assert result["picture"] == tmp_path / "new" / "cliff.png"
    assert imread(result["picture"]).shape[:2] == (1000, 1200)


def test_a_path_is_cut_where_it_leaves_the_surface(cliff):
    path = np.array([[5.0, -2.0, 0.1], [5.5, -2.0, 0.2], [7.5, -2.0, 0.6], [5, -2, 0]])
    cut = cliff.inside(path)
    np.testing.assert_allclose(cut, [path[0], path[1], [6.0, -2.0, 0.3]])
    np.testing.assert_array_equal(cliff.inside(path[:2]), path[:2])


@pytest.mark.parametrize(
    "name", ["learning_rate", "max_norm", "steps", "starts", "good"]
)
def test_a_knob_out_of_range_is_named(cliff, name):
    with pytest.raises(cliff.cli.InputError, match=f"^{name} must be positive, got 0$"):
        cliff.main(**{name: 0})
    with pytest.raises(
        cliff.cli.InputError, match=r"^w must be between 4.0 and 6.0, got 7$"
    ):
        cliff.main(w=7)
