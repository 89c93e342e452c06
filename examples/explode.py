"""Trains twice with corrupted batches: with a clip, and under `optaxclip.stabilize`.

python examples/lstm_mnist.py --explode                      # no download
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import curves
import jax
import numpy as np
import optax
from cli import InputError
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from mnist import Mnist, shuffled

import optaxclip

# By what to multiply the images of consecutive batches. The largest float32 is 3e38:
# what is multiplied by 1e38 holds inf.
FAULTS = ((1e2,), (1e1, 1e2, 1e3, 1e4), (1e3, 1e6, 1e38), (1e6,), (1e4,) * 5)
COLORS = {"plain": curves.COLORS[3], "stabilized": curves.COLORS[0]}
LEAST_STEPS = 60


def compare(
    build: Callable[..., Any], config: Any, digits: Mnist, *, seed: int, logdir: Path
) -> dict[str, Any]:
    """Trains twice with the same corrupted batches, and says how both runs ended.

    Writes events of both runs, and a picture.

    Args:
        build: `lstm_mnist.build`.
        config: Its settings; the stabilized run goes without their clip.
        digits: The images, of which some are corrupted on the way into a batch.
        seed: Decides the parameters, the order of the images, and what is corrupted.
        logdir: Where to write.

    Returns:
        `{"plain": run, "stabilized": run, "corrupted": steps, "picture": path}`: runs
        as `fit` returns them, and a title; steps from 0.
    """
    if config.steps < LEAST_STEPS:
        raise InputError(f"--explode needs {LEAST_STEPS} steps, got {config.steps}")
    shape = config.steps, config.batch_size
    batches = shuffled(len(digits.train_labels), shape, seed=seed)
    images, labels, batches, corrupted = corrupt(digits, batches, seed=seed)
    digits = digits._replace(train_images=images, train_labels=labels)
    bare = dataclasses.replace(config, clip="nothing")
    runs = {
        "plain": build(config, seed=seed, measured=False, wrap=watched),
        "stabilized": build(bare, seed=seed, measured=False, wrap=optaxclip.stabilize),
    }
    result: dict[str, Any] = {}
    for name, built in runs.items():
        with curves.Recorder(logdir / name, num_steps=config.steps) as recorder:
            result[name] = fit(built, digits, batches, recorder)
    result["plain"]["title"] = f"plain, --clip {config.clip}"
    result["stabilized"]["title"] = "optaxclip.stabilize"
    print(f"{len(corrupted)} of {config.steps} batches are corrupted")
    for run in result.values():
        right = len(np.intersect1d(run["skipped"], corrupted))
        wrong = len(run["skipped"]) - right
        print(
            f"{run['title']}: test accuracy {run['accuracy']:.4f} after {run['steps']} "
            f"steps; skipped {right} corrupted batches and {wrong} other, rolled back "
            f"{run['rollbacks']} times"
        )
        if run["error"]:
            print(f"  stopped by {run['error']}")
    picture = logdir / "explode.png"
    draw(picture, result, corrupted)
    print(f"the picture is {picture.resolve()}")
    return result | {"corrupted": corrupted, "picture": picture}


def watched(chain: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the chain behind what notices an explosion and does nothing."""
    return optax.chain(optaxclip.detect_explosions(), chain)


def corrupt(
    digits: Mnist, batches: np.ndarray, *, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Corrupts some batches: scales their images by `FAULTS`, shuffles their labels.

    Returns:
        images: float32, those of the training set, and after them the corrupted ones.
        labels: The same of the labels.
        batches: Those given, but the corrupted ones take the images at the end.
        steps: The steps of the corrupted batches, from 0.
    """
    rng = np.random.default_rng(seed)
    images, labels = [digits.train_images.astype(np.float32)], [digits.train_labels]
    batches, steps = batches.copy(), []
    period = len(batches) // (len(FAULTS) + 1)
    for i, factors in enumerate(FAULTS, 1):
        start = i * period + int(rng.integers(period // 2))
        for step, factor in enumerate(factors, start):
            with np.errstate(over="ignore"):
                images.append(images[0][batches[step]] * np.float32(factor))
            labels.append(rng.permutation(labels[0][batches[step]]))
            batches[step] = np.arange(batches.shape[1]) + sum(map(len, labels[:-1]))
            steps.append(step)
    return np.concatenate(images), np.concatenate(labels), batches, steps


def fit(
    built: Any, digits: Mnist, batches: np.ndarray, recorder: curves.Recorder
) -> dict[str, Any]:
    """Trains what `build` returned, until the end or an explosion that killed it.

    Returns:
        accuracy: On the test set.
        steps: How many steps it took.
        skipped: Which of them were skipped, from 0.
        rollbacks: How many times it went back to earlier parameters.
        params: The last parameters.
        error: What `optaxclip.raise_if_exploded` says, or None.
        history: Loss and norm of each step where finite, `{name: {step: value}}`.
    """
    carry, _, train, accuracy = built
    images, labels, *test = jax.device_put(digits)
    train = jax.jit(train, donate_argnums=0)
    skipped, error = [0], None
    length = min(50, len(batches) // 5)
    for start in range(0, len(batches), length):
        carry, measures = train(carry, batches[start : start + length], images, labels)
        losses, metrics = jax.device_get(measures)
        counts = metrics.get("explosions/num_skipped", np.zeros(len(losses), int))
        for step, loss in enumerate(losses, start):
            i = step - start
            skipped.append(int(counts[i]))
            values = {"loss": loss, "norm": metrics["explosions/norm"][i]}
            recorder.add(step, {n: x for n, x in values.items() if np.isfinite(x)})
        recorder.bar.update(len(losses))
        try:
            optaxclip.raise_if_exploded(carry[1], carry[0])
        except optaxclip.ExplosionError as explosion:
            error = str(explosion)
            break
    return {
        "accuracy": float(accuracy(carry[0], *test)),
        "steps": len(skipped) - 1,
        "skipped": np.flatnonzero(np.diff(skipped)).tolist(),
        "rollbacks": int(
            optaxclip.metrics(carry[1]).get("explosions/num_rollbacks", 0)
        ),
        "params": carry[0],
        "error": error,
        "history": recorder.history,
    }


def draw(path: Path, runs: dict[str, Any], corrupted: list[int]) -> None:
    """Draws the loss and the norm of both runs, whole and where the plain one ends."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle("LSTM on MNIST, some batches corrupted", x=0.01, ha="left")
    panels: Any = figure.subplots(2, 2, sharey="row", width_ratios=[2, 1])
    end = max(runs["plain"]["history"]["loss"]) + 1
    titles = {"loss": "training loss", "norm": "norm of the gradient"}
    bands, ends = {"color": "#cccccc", "linewidth": 3}, {"linestyle": ":"}
    marks = {"linestyle": "", "marker": "v", "markeredgecolor": "black"}
    for (whole, near), (what, title) in zip(panels, titles.items(), strict=True):
        name = f"{title}, and its median of 15 steps"
        whole.set_title(name, loc="left", size="medium")
        whole.set_xlim(0, max(run["steps"] for run in runs.values()))
        near.set_title(f"{title} around step {end}", loc="left", size="medium")
        near.set_xlim(end - 10.5, end + 10.5)
        highest = max(max(run["history"][what].values()) for run in runs.values())
        for axis in (whole, near):
            for step in corrupted:
                axis.axvline(step, zorder=0, **bands)
            axis.axvline(end, color=COLORS["plain"], **ends)
            axis.set_xlabel("step")
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        for name, run in runs.items():
            values, skipped, color = run["history"][what], run["skipped"], COLORS[name]
            # What was non-finite has no height: its mark stands above all others.
            heights = [values.get(step, 3 * highest) for step in skipped]
            steps, values = np.array(list(values.items())).T
            blocks = np.lib.stride_tricks.sliding_window_view(values, 15)
            whole.plot(steps, values, color=color, linewidth=0.5, alpha=0.35)
            whole.plot(steps[7:-7], np.median(blocks, axis=1), color=color)
            near.plot(steps, values, color=color, marker=".")
            for axis in (whole, near):
                axis.plot(skipped, heights, color=color, zorder=3, **marks)
    legend: dict[str, Any] = {
        f"{run['title']}: test accuracy {run['accuracy']:.1%}": {"color": COLORS[name]}
        for name, run in runs.items()
    }
    legend[f"plain is non-finite from step {end}"] = {"color": COLORS["plain"], **ends}
    legend["corrupted batch"] = bands
    marks["color"] = COLORS["stabilized"]
    legend["skipped (at the top: non-finite)"] = marks
    handles = [Line2D([], [], label=label, **style) for label, style in legend.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)
