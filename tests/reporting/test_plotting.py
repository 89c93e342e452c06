"""`plot` draws what a recorder kept, whatever the numbers are; `leading` names."""

import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import optaxclip
from optaxclip.explosions.leading import STEPS_BEFORE, leading_leaf
from optaxclip.reporting.drawing import ALARM, MAX_NAME_LENGTH, ZERO
from optaxclip.reporting.history import History
from optaxclip.reporting.plotting import leading, plot

NUM_STEPS = 30


def history_of(
    norms: Any,
    *,
    names: list[str] | None = None,
    loss: Any = np.nan,
    loss_limit: float = np.inf,
    limit: float = np.inf,
    leaf: int = -1,
    fired: dict[int, str] | None = None,
    start: int = 0,
) -> History:
    """A history with these norms; `fired` says which rule did on which step,
    and `leaf` which led on any."""
    norms = np.asarray(norms, np.float32)
    num_steps, num_scopes = norms.shape
    rules = ("nonfinite", "norm", "share", "loss")
    with np.errstate(over="ignore"):
        norm = np.linalg.norm(norms.astype(np.float64), axis=1).astype(np.float32)
    return History(
        step=np.arange(start, start + num_steps),
        loss=np.broadcast_to(np.asarray(loss, np.float32), [num_steps]),
        loss_limit=np.full(num_steps, loss_limit, np.float32),
        norm=norm,
        limit=np.full(num_steps, limit, np.float32),
        fired=np.array(
            [
                [(fired or {}).get(i) == rule for rule in rules]
                for i in range(start, start + num_steps)
            ]
        ),
        leaf=np.full(num_steps, leaf),
        norms=norms,
        names=names or [f"layer_{i}/kernel" for i in range(num_scopes)],
    )


def random_norms(num_scopes: int, num_steps: int = NUM_STEPS) -> np.ndarray:
    return np.exp(np.random.default_rng(0).normal(size=(num_steps, num_scopes)))


def exploding(num_scopes: int, leader: int) -> History:
    """One scope grows from step 120 on, and is NaN at the end."""
    norms = random_norms(num_scopes)
    norms[20:, leader] = 100.0 * 4.0 ** np.arange(10)
    norms[28:, leader] = np.nan
    fired = dict.fromkeys(range(120, 128), "norm") | {128: "nonfinite"}
    fired |= {129: "nonfinite"}
    return history_of(norms, loss=2.0, limit=50.0, leaf=leader, fired=fired, start=100)


def panels(figure: Figure) -> dict[Any, Axes]:
    """The axes by name, without the color bar."""
    return {
        axes.get_label(): axes
        for axes in figure.axes
        if axes.get_label() != "<colorbar>"
    }


def line(axes: Axes, label: str) -> Line2D:
    (found,) = [x for x in axes.get_lines() if x.get_label() == label]
    return found


def labels(axes: Axes) -> list[Any]:
    return axes.get_legend_handles_labels()[1]


def steps(axes: Axes, label: str) -> list[float]:
    return list(np.asarray(line(axes, label).get_xdata()))


def color_map(axes: Axes) -> QuadMesh:
    (found,) = [x for x in axes.collections if isinstance(x, QuadMesh)]
    return found


def test_the_largest_norms_are_drawn_as_such_and_none_leads():
    history = exploding(9, 3)
    names = [*(f"top/{k}" for k in range(1, 9)), "rest"]
    ranked = np.full((len(history.step), 8), "moe[1, 2]")
    figure = optaxclip.plot(history._replace(names=names, ranked=ranked))
    assert list(panels(figure)) == ["loss", "norm", "scopes"]
    axes = panels(figure)["scopes"]
    assert axes.get_title("left") == "the 8 largest norms, and that of the rest"
    assert not [label for label in labels(axes) if "led" in label]


@pytest.mark.parametrize(
    ("num_scopes", "loss", "expected"),
    [
        (0, np.nan, ["norm"]),
        (1, np.nan, ["norm"]),
        (1, 2.0, ["loss", "norm"]),
        (5, 2.0, ["loss", "norm", "scopes"]),
        (7, np.nan, ["norm", "scopes"]),
        (8, np.nan, ["norm", "scopes", "map"]),
        (300, 2.0, ["loss", "norm", "scopes", "map"]),
    ],
)
def test_panels(num_scopes, loss, expected):
    figure = plot(history_of(random_norms(num_scopes), loss=loss))
    assert list(panels(figure)) == expected
    has_map = "map" in expected
    assert len(figure.axes) == len(expected) + has_map  # the color bar
    for name in {"norm", "scopes"} & set(expected):
        assert panels(figure)[name].get_yscale() == "log"
    assert figure.axes[len(expected) - 1].get_xlabel() == "step"


@pytest.mark.parametrize(
    ("suffix", "magic"),
    [
        (".png", b"\x89PNG"),
        pytest.param(".pdf", b"%PDF", marks=pytest.mark.slow),
        pytest.param(".svg", b"<?xml", marks=pytest.mark.slow),
    ],
)
def test_saves(tmp_path, suffix, magic):
    path = tmp_path / f"picture{suffix}"
    figure = plot(exploding(3, 1), path)
    content = path.read_bytes()
    assert content.startswith(magic)
    if suffix == ".png":
        width, height = (int.from_bytes(content[i : i + 4]) for i in (16, 20))
        assert [width, height] == list((figure.get_size_inches() * 120).astype(int))


def test_saves_nothing_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plot(exploding(3, 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_scopes", [5, 300])
def test_leader_stands_out(num_scopes):
    history = exploding(num_scopes, 3)
    axes = panels(plot(history))["scopes"]
    leader = line(axes, "layer_3/kernel led")
    np.testing.assert_array_equal(leader.get_xdata(), history.step)
    np.testing.assert_array_equal(leader.get_ydata(), history.norms[:, 3])
    assert leader.get_color() == ALARM
    curves = [x for x in axes.get_lines() if len(np.asarray(x.get_xdata())) > 2]
    assert len(curves) == num_scopes
    for other in set(curves) - {leader}:
        assert other.get_linewidth() < leader.get_linewidth() / 2
        assert other.get_zorder() < leader.get_zorder()
        assert other.get_color() != ALARM
    assert steps(axes, "it is non-finite") == [128, 129]


def test_few_scopes_have_each_a_color_and_many_none():
    few = panels(plot(exploding(7, 3)))["scopes"]
    others = [f"layer_{i}/kernel" for i in range(7) if i != 3]
    assert labels(few) == [*others, "layer_3/kernel led", "it is non-finite"]
    assert len({line(few, label).get_color() for label in labels(few)[:-1]}) == 7
    many = panels(plot(exploding(8, 3)))["scopes"]
    assert labels(many) == ["layer_3/kernel led", "it is non-finite"]
    greys = {x.get_color() for x in many.get_lines()} - {ALARM}
    assert len(greys) == 1


def test_marks_of_each_rule():
    norms = random_norms(2)
    norms[9] = np.inf
    loss = np.arange(NUM_STEPS, dtype=np.float32)
    loss[20] = np.nan
    fired = {2: "norm", 3: "norm", 5: "share", 6: "loss", 9: "nonfinite"}
    history = history_of(norms, loss=loss, limit=9.0, fired=fired | {20: "nonfinite"})
    history.fired[2, 2] = True  # the share too, which the norm outranks
    axes = panels(plot(history))
    assert steps(axes["norm"], "above its limit") == [2, 3]
    assert steps(axes["norm"], "share or loss above its limit") == [5, 6]
    assert steps(axes["norm"], "not finite") == [9, 20]
    assert steps(axes["loss"], "above its limit") == [6]
    assert steps(axes["loss"], "not finite") == [20]
    marks = line(axes["norm"], "above its limit")
    np.testing.assert_array_equal(marks.get_ydata(), history.norm[[2, 3]])
    limit = line(axes["norm"], "its limit")
    np.testing.assert_array_equal(limit.get_ydata(), history.limit)
    kinds = ["above its limit", "share or loss above its limit", "not finite"]
    assert len({str(line(axes["norm"], kind).get_marker()) for kind in kinds}) == 3


def test_nonfinite_stands_at_the_upper_edge():
    figure = plot(exploding(1, 0))
    figure.draw_without_rendering()
    axes = panels(figure)["norm"]
    marks = line(axes, "not finite")
    shown = marks.get_transform().transform(marks.get_xydata())
    places = axes.transAxes.inverted().transform(shown)
    np.testing.assert_allclose(places[:, 1], 1)
    np.testing.assert_allclose(places[:, 0], (np.array([28, 29]) + 0.5) / NUM_STEPS)


def test_healthy_run_marks_nothing():
    axes = panels(plot(history_of(random_norms(5), loss=2.0)))
    assert labels(axes["loss"]) == labels(axes["norm"]) == []
    assert labels(axes["scopes"]) == [f"layer_{i}/kernel" for i in range(5)]
    assert len({x.get_linewidth() for x in axes["scopes"].get_lines()}) == 1
    colors = {x.get_color() for panel in axes.values() for x in panel.get_lines()}
    assert ALARM not in colors


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([1.0, 2.0, 3.0], "log"),
        ([1.0, np.nan, np.inf], "log"),
        ([1.0, 0.0, 3.0], "linear"),
        ([1.0, -2.0, np.nan], "linear"),
        ([np.inf, np.inf, np.nan], "linear"),
    ],
)
def test_scale_of_the_loss(losses, scale):
    figure = plot(history_of(random_norms(1, 3), loss=losses))
    figure.draw_without_rendering()
    assert panels(figure)["loss"].get_yscale() == scale


def test_loss_of_some_steps():
    losses = [1.0, np.nan, 2.0, np.nan]
    axes = panels(plot(history_of(random_norms(1, 4), loss=losses)))["loss"]
    assert labels(axes) == []
    losses[1] = np.inf
    axes = panels(plot(history_of(random_norms(1, 4), loss=losses)))["loss"]
    assert steps(axes, "not finite") == [1]


def test_zeros_are_left_out():
    norms = random_norms(3)
    norms[10, 0] = 0
    norms[:, 2] = 0
    axes = panels(plot(history_of(norms)))["scopes"]
    drawn = np.asarray(line(axes, "layer_0/kernel").get_ydata())
    assert np.flatnonzero(np.isnan(drawn)).tolist() == [10]
    assert np.isnan(np.asarray(line(axes, "layer_2/kernel (zero)").get_ydata())).all()
    low, high = axes.get_ylim()
    assert norms[norms > 0].min() / 3 < low < high < norms.max() * 3


def test_number_between_two_gaps_is_a_dot():
    numbers = np.array([1.0, np.nan, 2.0, np.inf, 3.0, 3.0])
    for axes in plot(history_of(numbers[:, None], loss=numbers)).axes:
        (dots,) = [x for x in axes.get_lines() if x.get_marker() == "."]
        np.testing.assert_array_equal(dots.get_xydata(), [[0, 1], [2, 2]])


@pytest.mark.parametrize(
    ("num_scopes", "leader"),
    [
        (41, 7),
        # The others are slow: the same with other names, or in other places.
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in ((8, 0), (40, 7), (300, 20))
        ),
        pytest.param(300, 298, marks=pytest.mark.slow),
    ],
)
def test_names_of_the_map_do_not_overlap(num_scopes, leader):
    figure = plot(exploding(num_scopes, leader))
    figure.draw_without_rendering()
    axes = panels(figure)["map"]
    names = axes.get_yticklabels()
    assert len(names) == num_scopes if num_scopes <= 40 else 15 < len(names) <= 21
    for row, name in zip(axes.get_yticks(), names, strict=True):
        assert name.get_text() == f"layer_{row:.0f}/kernel"
        assert (name.get_color() == ALARM) == (row == leader)
    assert leader in axes.get_yticks()
    boxes = sorted((x.get_window_extent() for x in names), key=lambda box: box.y0)
    for below, above in itertools.pairwise(boxes):
        assert below.y1 <= above.y0 + 1


def test_map_has_a_cell_for_each_norm():
    norms = random_norms(9)
    norms[4, 2] = 0
    norms[5, 2] = np.nan
    norms[6, 2] = np.inf
    norms[7, 2] = 1e30
    figure = plot(history_of(norms))
    figure.draw_without_rendering()
    axes = panels(figure)["map"]
    mesh = color_map(axes)
    colors = np.reshape(mesh.get_facecolor(), (9, NUM_STEPS, 4))
    assert to_hex(colors[2, 4]) == ZERO
    assert to_hex(colors[2, 5]) == to_hex(colors[2, 6]) == ALARM
    special = [to_rgba(ZERO), to_rgba(ALARM)]
    others = np.delete(colors.reshape(-1, 4), [2 * NUM_STEPS + i for i in (4, 5, 6)], 0)
    for color in special:
        assert not np.isclose(others, color).all(axis=1).any()
    medians = [np.median(x[(x > 0) & np.isfinite(x)]) for x in norms.T]
    order = np.argsort(norms[0] / medians)
    brightness = colors[order, 0, :3].sum(axis=1)
    assert (np.diff(brightness) >= 0).all()
    assert labels(axes) == ["zero", "not finite"]
    low, high = mesh.get_clim()
    assert 0.01 < low < high < 100  # despite 1e30
    assert axes.yaxis_inverted()
    assert figure.axes[-1].get_xlabel().startswith("norm")


def test_map_of_equal_norms_tells_zero():
    norms = np.full((2, 9), 3.0)
    norms[0, 5] = 0
    figure = plot(history_of(norms))
    figure.draw_without_rendering()
    colors = np.reshape(color_map(panels(figure)["map"]).get_facecolor(), (9, 2, 4))
    is_white = np.isclose(colors, to_rgba(ZERO)).all(axis=2)
    assert np.argwhere(is_white).tolist() == [[5, 0]]


def test_long_and_odd_names():
    long = "encoder/" + "very_long_module_name/" * 8 + "kernel"
    names = [long, "_hidden/w", "cost$per$unit"]
    figure = plot(history_of(random_norms(3), names=names))
    figure.draw_without_rendering()
    axes = panels(figure)["scopes"]
    shortened, hidden, cost = labels(axes)
    assert len(shortened) == MAX_NAME_LENGTH
    start, end = shortened.split("…")
    assert long.startswith(start)
    assert long.endswith(end)
    assert hidden.strip() == "_hidden/w"
    assert cost == r"cost\$per\$unit"  # no formula
    assert axes.get_position().width > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e-45, 3e38, 2.0])
@pytest.mark.parametrize(("num_steps", "num_scopes"), [(1, 9), (4, 2)])
def test_no_numbers_make_trouble(value, num_steps, num_scopes):
    history = history_of(
        np.full((num_steps, num_scopes), value),
        loss=-value,
        limit=value,
        fired={0: "norm", 2: "loss", 3: "nonfinite"},
    )
    plot(history).draw_without_rendering()


def test_few_steps_have_whole_ticks():
    figure = plot(history_of(random_norms(2, 1), loss=2.0, start=17))
    figure.draw_without_rendering()
    axes = panels(figure)["norm"]
    low, high = axes.get_xlim()
    assert [x for x in axes.get_xticks() if low <= x <= high] == [17]


def pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.parametrize("num_scopes", [2, pytest.param(9, marks=pytest.mark.slow)])
def test_a_figure_is_drawn_anew_in_place(num_scopes):
    """It shows what a new one would, whatever it showed before."""
    last = exploding(num_scopes, 1)
    figure = plot(history_of(random_norms(num_scopes, 5)))  # without a loss
    size = figure.get_size_inches()
    for history in (history_of(random_norms(num_scopes), loss=3.0), last):
        assert plot(history, figure=figure) is figure
    assert list(panels(figure)) == list(panels(plot(last)))
    np.testing.assert_array_equal(figure.get_size_inches(), size)
    fresh = plot(last)
    fresh.set_size_inches(*size)
    np.testing.assert_array_equal(pixels(figure), pixels(fresh))


def test_a_figure_of_the_users_own_keeps_its_size(tmp_path):
    figure = Figure(figsize=(7, 6))
    figure.subplots().plot([1, 2])
    path = tmp_path / "live.png"
    plot(exploding(3, 1), path, figure=figure)
    assert list(panels(figure)) == ["loss", "norm", "scopes"]
    content = path.read_bytes()
    width, height = (int.from_bytes(content[i : i + 4]) for i in (16, 20))
    assert (width, height) == (7 * 120, 6 * 120)
    # Else titles and legends would cover each other.
    assert type(figure.get_layout_engine()).__name__ == "ConstrainedLayoutEngine"


def test_a_figure_stays_as_it_was_if_nothing_can_be_drawn():
    figure = plot(exploding(3, 1))
    before = pixels(figure)
    history = exploding(3, 1)
    with pytest.raises(ValueError, match="no steps"):
        plot(history_of(np.zeros((0, 2))), figure=figure)
    with pytest.raises(ValueError, match="other steps"):
        plot(history, after=history_of(random_norms(3)), figure=figure)
    np.testing.assert_array_equal(pixels(figure), before)
    wrong: Any = figure.axes[0]
    with pytest.raises(TypeError, match=r"^figure must be a Figure of matplotlib, not"):
        plot(history, figure=wrong)


def test_no_global_state(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # cannot be imported
    plot(exploding(9, 1)).draw_without_rendering()


@pytest.mark.parametrize("module", ["matplotlib", "matplotlib.figure"])
def test_missing_matplotlib(monkeypatch, module):
    for name in [x for x in sys.modules if x.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "optaxclip\[report\]"$'):
        plot(exploding(2, 1))


def test_empty_history():
    with pytest.raises(ValueError, match=r"^history holds no steps$"):
        plot(history_of(np.zeros((0, 2))))
    recorder = optaxclip.record()
    state = recorder.init({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="no steps"):
        plot(optaxclip.history(state))


@pytest.mark.slow
def test_draws_what_a_detector_kept():
    detect = optaxclip.detect_explosions(norm=5.0)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = detect.init(params)
    for size in [1.0, 1.0, 1.0, 100.0, jnp.nan]:
        updates = {"a": jnp.full(2, 0.1), "b": jnp.full(2, size)}
        _, state = jax.jit(detect.update)(updates, state, value=jnp.array(1.0))
    history = optaxclip.history(state, params)
    axes = panels(plot(history))
    assert steps(axes["norm"], "above its limit") == [3]
    assert steps(axes["norm"], "not finite") == [4]
    assert leading(history) == 1
    assert labels(axes["scopes"]) == ["a", "b led", "it is non-finite"]


def test_leading_is_that_of_the_first_step_of_the_last_explosion():
    norms = np.ones((40, 3))
    history = history_of(norms, fired=dict.fromkeys((5, 15, 26, 30), "norm"))
    leaf = np.full(40, -1)
    leaf[[5, 26, 30]] = 0, 1, 2
    assert leading(history) is None
    assert leading(history._replace(leaf=leaf)) == 1
    assert leading(history_of(norms, leaf=1)) is None  # without an explosion


def test_leading_is_the_first_that_is_not_finite():
    norms = np.ones((4, 4))
    norms[3] = [1e9, 1, np.inf, np.nan]
    assert leading(history_of(norms, fired={3: "nonfinite"})) == 2


def test_leading_in_a_recorder_is_by_the_rule_of_a_detector():
    norms = np.ones((40, 3))
    norms[20:, 1] = 2.0
    norms[39, 2] = 1.2
    assert leading(history_of(norms, fired={39: "nonfinite"})) == 1  # the loss
    before = norms[39 - STEPS_BEFORE[STEPS_BEFORE <= 39]]
    assert leading_leaf(norms[39], before) == 1
    assert leading(history_of(norms[:20], fired={19: "nonfinite"})) is None


def test_the_limit_of_the_loss_is_drawn():
    axes = panels(plot(history_of(random_norms(2), loss=2.0, loss_limit=5.0)))["loss"]
    assert np.asarray(line(axes, "its limit").get_ydata()).tolist() == [5] * NUM_STEPS
    axes = panels(plot(history_of(random_norms(2), loss=2.0)))["loss"]
    assert "its limit" not in labels(axes)


def test_clipped_steps_are_marked_beside_the_norm_after_the_clip():
    norms = random_norms(2)
    before, after = history_of(norms), history_of(np.minimum(norms, 1.5))
    axes = panels(plot(before, after=after))["norm"]
    drawn = np.asarray(line(axes, "after the clip").get_ydata())
    np.testing.assert_allclose(drawn, after.norm)
    is_clipped = (norms > 1.5).any(axis=1)
    assert 0 < is_clipped.sum() < NUM_STEPS
    assert steps(axes, "clipped") == list(np.flatnonzero(is_clipped))
    with pytest.raises(ValueError, match="other steps"):
        plot(before, after=history_of(norms[1:]))
