"""The comparison of limits runs, and counts what it says."""

import importlib
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CLIPS = ["none", "fixed", "ZClip", "AutoClip", "AdaGC", "AGGC", "SPAM", "Levanter"]
PER_ARRAY = {"AdaGC", "AGGC"}
FLAGS: dict[str, Any] = {"steps": 20, "seeds": 2, "hidden": 4, "batch_size": 2}
FLAGS |= {"length": 4, "warmup": 0}


@pytest.fixture(scope="module")
def compare() -> Any:
    return importlib.import_module("compare_limits")


@pytest.fixture
def drawn(compare, monkeypatch) -> dict[str, Any]:
    """What `main` gives to `draw`: losses, norms, limits and shares of each clip."""
    runs, draw = {}, compare.draw

    def remember(path, result):
        runs.update(result.runs)
        draw(path, result)

    monkeypatch.setattr(compare, "draw", remember)
    return runs


# One test, since each worker of pytest-xdist would compile the programs anew.
@pytest.mark.slow
def test_every_clip_gets_the_same_run_and_the_result_tells_it(
    compare, drawn, tmp_path, capsys, monkeypatch
):
    given, train = [], compare.train

    def remember(tx, graphdef, params, texts, bar):
        given.append((params, texts))
        return train(tx, graphdef, params, texts, bar)

    monkeypatch.setattr(compare, "train", remember)
    result = compare.main(learning_rate=5.0, logdir=tmp_path / "new", **FLAGS)
    assert list(drawn) == CLIPS
    assert list(result) == [*CLIPS, "picture"]

    params, texts = given[0]
    for same_params, same_texts in given:
        assert same_params is params
        assert same_texts is texts
    assert texts.shape == (20, 2, 2, 5)
    for a, b in (texts[0], params["head"]["kernel"][...]):  # the seeds differ
        assert (a != b).any()
    for name, (losses, norms, limits, shares) in drawn.items():
        assert {x.shape for x in (losses, norms, limits, shares)} == {(20, 2)}
        np.testing.assert_allclose(losses[0], drawn["none"][0][0], rtol=1e-6)
        assert losses[-1].mean() < losses[0].mean()
        found = result[name]
        np.testing.assert_allclose(found["loss"], losses[-1])
        np.testing.assert_array_equal(found["spikes"], compare.spikes(losses))
        if name not in {*PER_ARRAY, "SPAM"}:  # give the largest of any array, or none
            clipped = (norms > limits).mean(axis=0)
            np.testing.assert_allclose(found["clipped"], clipped, rtol=1e-6)
        assert found["diverged"] == (found["loss"] > 3.25).sum()
        assert found["helped"] == (found["loss"] < result["none"]["loss"]).sum()

    assert (drawn["none"][2] == np.inf).all()
    assert (drawn["fixed"][2] == 1).all()
    assert (drawn["ZClip"][2] == np.inf).all()  # its baseline takes 25 steps
    _, norms, limits, _ = drawn["AutoClip"]
    percentiles = [np.percentile(norms[: i + 1], 10, axis=0) for i in range(20)]
    np.testing.assert_allclose(limits, percentiles, rtol=1e-5)
    # For the first 99 steps AdaGC clips to the global norm 1, as the fixed clip does.
    for i in (0, 3):
        np.testing.assert_allclose(drawn["AdaGC"][i], drawn["fixed"][i], rtol=1e-2)
    assert (np.isfinite(drawn["AdaGC"][2]) == (drawn["fixed"][1] > 1)).all()
    # SPAM clips from its 20th step on.
    np.testing.assert_allclose(drawn["SPAM"][0][:4], drawn["none"][0][:4], rtol=1e-5)
    assert np.isinf(drawn["SPAM"][2:]).all()
    # It sees the updates: the gradients of the first step, times the learning rate.
    np.testing.assert_allclose(drawn["Levanter"][1][0], 5 * drawn["none"][1][0], 1e-5)

    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(CLIPS, lines[2 : 2 + len(CLIPS)], strict=True):
        cells = [cell.strip() for cell in line.split("|")]
        loss = result[name]["loss"]
        assert cells[0] == name
        assert cells[1].startswith(f"{np.median(loss):#.3g} ({loss.min():#.3g} to ")
        assert (cells[3] == "-") == (name == "SPAM")
        assert cells[4:] == [str(result[name][key]) for key in ("diverged", "helped")]
    helped = [name for name in CLIPS if result[name]["helped"] == 2] or ["nothing"]
    assert [part.split()[0] for part in lines[-2].split(": ")[1].split(", ")] == helped
    assert lines[-2].startswith("none ")

    from matplotlib.image import imread

    assert result["picture"] == tmp_path / "new" / "compare_limits.png"
    pixels = imread(result["picture"])[..., :3]
    assert pixels.shape == (800, 220 * len(CLIPS), 3)
    for name in CLIPS:
        color = compare.COLORS[name]
        rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(axis=-1) < 0.01).sum() > 100, name


@pytest.mark.slow
def test_what_is_not_finite_has_diverged(compare, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "CLIPS", {"none": compare.CLIPS["none"]})
    result = compare.main(learning_rate=3e38, logdir=tmp_path, **FLAGS)
    assert not np.isfinite(drawn["none"][0][-1]).all()
    assert (result["none"]["loss"] == np.inf).all()
    assert result["none"]["diverged"] == 2
    assert result["none"]["helped"] == 0
    assert result["picture"].exists()


def test_a_spike_is_a_leap_above_the_median_before(compare):
    losses = np.full([100, 5], 2.0)
    losses[[10, 80], 1] = 2.5
    losses[[10, 80], 2] = 2.3
    losses[40:, 3] = 3.0  # the new normal, once half of the window
    losses[20, 4], losses[30, 4] = np.nan, np.inf
    np.testing.assert_array_equal(compare.spikes(losses), [0, 2, 0, 25, 2])
    np.testing.assert_array_equal(compare.spikes(losses, factor=1.1)[:3], [0, 2, 2])
    np.testing.assert_array_equal(compare.spikes(losses, window=10)[3], 5)
    assert compare.spikes(losses[:1]).tolist() == [0] * 5


@pytest.mark.parametrize(
    "name", ["steps", "seeds", "learning_rate", "warmup", "length"]
)
def test_a_knob_out_of_range_is_named(compare, name):
    with pytest.raises(
        compare.cli.InputError, match=f"^{name} must be positive, got -1$"
    ):
        compare.main(**{name: -1})
    if name != "warmup":
        with pytest.raises(
            compare.cli.InputError, match=f"^{name} .* positive, got 0$"
        ):
            compare.main(**{name: 0})
