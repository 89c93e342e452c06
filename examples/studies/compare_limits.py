"""Which clip helps at a learning rate at which training without one diverges?

python examples/studies/compare_limits.py                    # no download

An LSTM learns to continue Python's manual, from the help texts that Python ships. Every
clip gets the same runs: the same parameters, texts and learning rate, for five seeds.
"""

import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import optaxclip

sys.path.insert(0, str(Path(__file__).parents[1]))
import cli
import curves
from python_manual import final_losses, load_texts, mean_loss, spikes, stack_models

CLIPS = {
    "none": optaxclip.clip_by_norm(math.inf),  # measures, and never clips
    "fixed": optaxclip.clip_by_norm(1.0),
    "ZClip": optaxclip.zclip(),
    "AutoClip": optaxclip.autoclip(),
    "AdaGC": optaxclip.adagc(),
    "AGGC": optaxclip.aggc(0.5, 2.0),  # has no defaults; these are of its docstring
    "SPAM": optax.chain(optaxclip.record("clip", window=1), optaxclip.spam()),
    "Levanter": optaxclip.clip_by_historical_norm(),
}
# Not here, since this is SGD: `gradient_stabilizer` and "set" take the size of the
# gradients away, "soft" is a smaller learning rate as well, and `stable_adam` is for
# Adam. AGGC is a band, `with_global` two of these; the spectral clip is in `muon.py`.
BEHIND = {"Levanter"}  # sees the updates, and so stands behind the optimizer
UPDATES = 20  # in units of gradients: they are drawn larger by the learning rate
COLORS = dict(zip(CLIPS, ("#000000", *curves.COLORS[:-1], "#999999"), strict=True))
MEASURES = ("clip/norm", "clip/limit", "clip/clipped_fraction")
CHUNK = 20  # steps between two updates of the progress bar
COLUMNS = 4  # of the picture
HIGHEST = 100  # higher losses and norms, as of a diverged run, are drawn here
ROW = "{:8} | {:22} | {:16} | {:24} | {:8} | {}"


class Run(NamedTuple):
    """What was measured in the runs of one clip, `[steps, seeds]` each.

    Attributes:
        losses: The training losses.
        norms: Before the clip; per array the largest that one has.
        limits: Of the norms; per array the largest, and +inf for SPAM, which clips
            elements.
        clipped: The share of the steps so far that were clipped; +inf for SPAM.
    """

    losses: np.ndarray
    norms: np.ndarray
    limits: np.ndarray
    clipped: np.ndarray


class Result(NamedTuple):
    """What the study found.

    Attributes:
        runs: What was measured, by the name of the clip.
        summaries: What that amounts to, by the same name: of each seed the final
            `loss`, the number of `spikes` and the share of steps `clipped`; how many
            seeds `diverged`, and how many the clip `helped`.
    """

    runs: dict[str, Run]
    summaries: dict[str, dict[str, Any]]


class LSTM(nnx.Module):
    """Says at every place of a text which character comes next."""

    def __init__(self, num_chars: int, hidden: int, *, rngs: nnx.Rngs):
        cells = [nnx.OptimizedLSTMCell(hidden, hidden, rngs=rngs) for _ in range(2)]
        self.embed = nnx.Embed(num_chars, hidden, rngs=rngs)
        self.rnns = nnx.List(nnx.RNN(cell, rngs=False) for cell in cells)
        self.head = nnx.Linear(hidden, num_chars, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Returns the logits `[batch, length, num_chars]` of int `[batch, length]`."""
        x: Any = self.embed(text)
        zeros = jnp.zeros([len(x), x.shape[-1]])
        for rnn in self.rnns:
            x = rnn(x, initial_carry=(zeros, zeros))
        return self.head(x)


def train(tx: Any, graphdef: Any, params: Any, texts: np.ndarray, bar: tqdm) -> Run:
    """Trains all seeds at once.

    From parameters `[seeds, ...]` and texts `[steps, seeds, batch, length + 1]`.
    """
    loss_fn = partial(mean_loss, graphdef)

    def step(carry, text):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, text)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = optaxclip.metrics(opt_state)
        measures: Any = [metrics.get(name, jnp.inf) for name in MEASURES]
        params = optax.apply_updates(params, updates)
        return (params, opt_state), Run(loss, *measures)

    advance = jax.jit(lambda carry, texts: jax.lax.scan(jax.vmap(step), carry, texts))
    carry = (params, jax.vmap(tx.init)(params))
    parts = []
    for start in range(0, len(texts), CHUNK):
        carry, part = advance(carry, texts[start : start + CHUNK])
        parts.append(jax.device_get(part))
        bar.update(len(part.losses))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def summarize(run: Run, without: Run, chance: float) -> dict[str, Any]:
    """Returns what the runs of a clip amount to, beside those without a clip."""
    last = final_losses(run.losses)
    return {
        "loss": last,
        "spikes": spikes(run.losses),
        "clipped": run.clipped[-1],
        "diverged": int(np.sum(last >= chance)),
        "helped": int(np.sum(last < final_losses(without.losses))),
    }


def run(
    *,
    steps: int,
    seeds: int,
    learning_rate: float,
    warmup: int,
    hidden: int,
    batch_size: int,
    length: int,
) -> Result:
    """Trains under each clip, from the same parameters on the same texts."""
    texts, num_chars, chance = load_texts((steps, seeds, batch_size), length)
    models = [LSTM(num_chars, hidden, rngs=nnx.Rngs(seed)) for seed in range(seeds)]
    graphdef, params = stack_models(models)
    # The first step already moves: its rate is one part in warmup + 1.
    rate = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
    runs = {}
    with tqdm(total=len(CLIPS) * steps, unit="step") as bar:
        for name, clip in CLIPS.items():
            bar.set_description(name)
            sgd = optax.sgd(rate)
            tx = optax.chain(sgd, clip) if name in BEHIND else optax.chain(clip, sgd)
            runs[name] = train(tx, graphdef, params, texts, bar)
    summaries = {
        name: summarize(of_clip, runs["none"], chance) for name, of_clip in runs.items()
    }
    return Result(runs, summaries)


def report(result: Result) -> None:
    """Prints a row for each clip, and which of them helped every seed."""

    def spread(values, form):
        median, least, largest = np.median(values), values.min(), values.max()
        return f"{median:{form}} ({least:{form}} to {largest:{form}})"

    seeds = len(result.summaries["none"]["loss"])
    print(f"of {seeds} seeds the median (least to largest), and how many a clip helped")
    print(ROW.format("clip", "loss", "spikes", "clipped", "diverged", "helped"))
    for name, found in result.summaries.items():
        counts_steps = np.isfinite(found["clipped"]).any()
        cells = (
            spread(found["loss"], "#.3g"),
            spread(found["spikes"], ".0f"),
            spread(found["clipped"], ".1%") if counts_steps else "-",
            found["diverged"],
            found["helped"],
        )
        print(ROW.format(name, *cells))

    medians = {
        name: f"{name} {np.median(found['loss']):#.3g}"
        for name, found in result.summaries.items()
    }
    helped = [
        medians[name]
        for name, found in result.summaries.items()
        if found["helped"] == seeds
    ]
    print(f"{medians['none']}; helped every seed: {', '.join(helped or ['nothing'])}")


def draw(path: Path, result: Result) -> None:
    """Draws the losses, the norms with their limits, and the loss of each seed."""
    names = list(result.runs)
    rows: Any = []
    for start in range(0, len(names), COLUMNS):
        block = names[start : start + COLUMNS]
        empty = ["."] * (COLUMNS - len(block))
        rows.append([f"{name}: loss" for name in block] + empty)
        rows.append([norm_title(name) for name in block] + empty)
    heights = [3] * len(rows) + [2.5]
    rows.append(["final loss of each seed"] * COLUMNS)
    figure = Figure(figsize=(2.2 * COLUMNS, 0.8 * sum(heights)), layout="constrained")
    axes = figure.subplot_mosaic(rows, height_ratios=heights)
    for name, of_clip in result.runs.items():
        loss_axis, norm_axis = axes[f"{name}: loss"], axes[norm_title(name)]
        unit = UPDATES if name in BEHIND else 1
        draw_spread(loss_axis, of_clip.losses, COLORS[name])
        draw_spread(norm_axis, of_clip.norms, COLORS[name], unit=unit)
        norm_axis.plot(np.median(of_clip.limits, axis=1), "k--", linewidth=1)
        loss_axis.set(ylim=(0.9, 110), yscale="log")
        norm_axis.set(ylim=(0.03 * unit, 110 * unit), yscale="log", xlabel="step")

    end_axis = axes["final loss of each seed"]
    for name, found in result.summaries.items():
        ends = np.minimum(found["loss"], HIGHEST)
        end_axis.plot(ends, [name] * len(ends), "o", color=COLORS[name], alpha=0.6)
    end_axis.set(xscale="log", xlim=(0.9, 110), ylim=(len(names) - 0.5, -0.5))
    end_axis.set_xticks([1, 2, 5, 10, 20, 50, 100])
    end_axis.xaxis.set_major_formatter("{x:g}")

    for title, axis in axes.items():
        axis.set_title(title, loc="left", fontsize="medium")
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def norm_title(name: str) -> str:
    """The title of the axis of its norms."""
    return f"{name}: update, limit" if name in BEHIND else f"{name}: norm, limit"


def draw_spread(axis: Any, values: np.ndarray, color: str, *, unit: float = 1) -> None:
    """Draws the median of `[steps, seeds]`, and the range of the seeds around it."""
    values = np.minimum(np.nan_to_num(values, nan=np.inf), HIGHEST * unit)
    steps = np.arange(1, len(values) + 1)
    axis.fill_between(
        steps, values.min(axis=1), values.max(axis=1), color=color, alpha=0.2
    )
    axis.plot(steps, np.median(values, axis=1), color=color)


def main(
    *,
    steps: int = 400,
    seeds: int = 5,
    learning_rate: float = 20.0,
    warmup: int = 50,
    hidden: int = 64,
    batch_size: int = 16,
    length: int = 64,
    logdir: Path | None = None,
) -> dict[str, Any]:
    """Trains the same two-layer LSTM by SGD under each clip, and says which helped.

    Args:
        steps: Training steps of each run.
        seeds: Runs for each clip, all at once.
        learning_rate: The learning rate after its warm-up.
        warmup: Steps in which the learning rate rises linearly to that; may be 0.
        hidden: Units in each layer.
        batch_size: Texts in each step.
        length: Characters in each text.
        logdir: Where to write; by default a new directory in runs/compare_limits.
    """
    knobs: dict[str, Any] = {
        "steps": steps,
        "seeds": seeds,
        "learning_rate": learning_rate,
        "hidden": hidden,
        "batch_size": batch_size,
        "length": length,
    }
    cli.check_positive(knobs)
    if warmup:
        cli.check_positive({"warmup": warmup})
    logdir = logdir or Path("runs", "compare_limits", time.strftime("%Y%m%d-%H%M%S"))
    result = run(warmup=warmup, **knobs)
    report(result)
    picture = logdir / "compare_limits.png"
    draw(picture, result)
    print(f"the picture is {picture.resolve()}")
    return result.summaries | {"picture": picture}


if __name__ == "__main__":
    cli.run(main)
