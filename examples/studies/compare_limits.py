"""Which clip helps at a learning rate at which training without one diverges?

python examples/studies/compare_limits.py                    # no download

An LSTM learns to continue Python's manual, from the help texts that Python ships. Every
clip gets the same runs: the same parameters, texts and learning rate, for five seeds.
"""

import math
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

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
# Not here, since this is SGD: `gradient_stabilizer` takes the size of the gradients
# away, and `stable_adam` is for Adam.
BEHIND = {"Levanter"}  # sees the updates, and so stands behind the optimizer
COLORS = dict(zip(CLIPS, ("#000000", *curves.COLORS[:-1], "#999999"), strict=True))
MEASURES = "clip/norm", "clip/limit", "clip/clipped_fraction"
ROW = "{:8} | {:22} | {:16} | {:24} | {:8} | {}"


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


def load_texts(shape: tuple[int, ...], length: int) -> tuple[np.ndarray, int, float]:
    """Texts from Python's manual, `[*shape, length + 1]`, and how many characters.

    Also the loss of knowing each character's frequency alone: a run that ends above it
    has diverged.
    """
    chars = list("\n".join(dict.fromkeys(topics.values())))
    _, text, counts = np.unique(chars, return_inverse=True, return_counts=True)
    places = np.random.default_rng(0).integers(len(text) - length, size=(*shape, 1))
    texts = text[places + np.arange(length + 1)].astype(np.int32)
    return texts, len(counts), float(np.mean(np.log(len(text) / counts[text])))


def train(tx: Any, graphdef: Any, params: Any, texts: np.ndarray, bar: tqdm) -> Any:
    """Trains all seeds at once.

    From parameters `[seeds, ...]` and texts `[steps, seeds, batch, length + 1]` to the
    losses, norms before the clip, limits, and shares of the steps so far that were
    clipped, `[steps, seeds]` each; per array the largest that one has. Limit and share
    are +inf for SPAM, which clips elements.
    """
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels

    def loss_fn(params, text):
        logits = nnx.merge(graphdef, params)(text[:, :-1])
        return cross_entropy(logits, text[:, 1:]).mean()

    def step(carry, text):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, text)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = optaxclip.metrics(opt_state)
        measures = [metrics.get(name, jnp.inf) for name in MEASURES]
        return (optax.apply_updates(params, updates), opt_state), (loss, *measures)

    advance = jax.jit(lambda carry, texts: jax.lax.scan(jax.vmap(step), carry, texts))
    carry, measures = (params, jax.vmap(tx.init)(params)), []
    for start in range(0, len(texts), 20):
        carry, part = advance(carry, texts[start : start + 20])
        measures.append(jax.device_get(part))
        bar.update(len(part[0]))
    return [np.concatenate(parts) for parts in zip(*measures, strict=True)]


def spikes(losses: np.ndarray, *, factor: float = 1.2, window: int = 50) -> np.ndarray:
    """Counts the steps whose loss exceeds `factor` times the median of those before.

    The median is of the `window` steps before, or of as many as there are; a loss that
    is non-finite is +inf. From `[steps, seeds]` to `[seeds]`.
    """
    losses = np.where(np.isfinite(losses), losses.astype(float), np.inf)
    before = (losses[max(0, i - window) : i or 1] for i in range(len(losses)))
    medians = np.array([np.median(values, axis=0) for values in before])
    return np.sum(losses > factor * medians, axis=0)


def draw(path: Path, runs: dict[str, Any], result: dict[str, Any]) -> None:
    """Draws the losses, the norms with their limits, and the loss of each seed."""
    figure = Figure(figsize=(2.2 * len(runs), 8), layout="constrained")
    rows: Any = [[f"{n}: {what}" for n in runs] for what in ("loss", "norm, limit")]
    rows.append(["final loss of each seed"] * len(runs))
    axes = figure.subplot_mosaic(rows, height_ratios=[3, 3, 2])
    *others, end_axis = axes.values()
    for i, (name, (losses, norms, limits, _)) in enumerate(runs.items()):
        color, loss_axis, norm_axis = COLORS[name], others[i], others[i + len(runs)]
        for axis, values in ((loss_axis, losses), (norm_axis, norms)):
            values = np.sort(np.minimum(np.nan_to_num(values, nan=np.inf), 100))
            steps = np.arange(1, len(values) + 1)
            axis.fill_between(steps, *values[:, [0, -1]].T, color=color, alpha=0.2)
            axis.plot(steps, np.median(values, axis=1), color=color)
        norm_axis.plot(np.median(limits, axis=1), "k--", linewidth=1)
        ends = np.minimum(result[name]["loss"], 100)
        end_axis.plot(ends, [name] * len(ends), "o", color=color, alpha=0.6)
        loss_axis.set(ylim=(0.9, 110), yscale="log")
        norm_axis.set(ylim=(0.03, 110), yscale="log", xlabel="step")
    end_axis.set(xscale="log", xlim=(0.9, 110), ylim=(len(runs) - 0.5, -0.5))
    end_axis.xaxis.set_major_formatter("{x:g}")
    for title, axis in axes.items():
        axis.set_title(title, loc="left", fontsize="medium")
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


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
    """Trains the same two-layer LSTM by SGD under seven clips, and says which helped.

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
    knobs = {"steps": steps, "seeds": seeds, "learning_rate": learning_rate}
    knobs |= {"hidden": hidden, "batch_size": batch_size, "length": length}
    cli.check_positive(knobs | ({"warmup": warmup} if warmup else {}))
    logdir = logdir or Path("runs", "compare_limits", time.strftime("%Y%m%d-%H%M%S"))
    texts, num_chars, chance = load_texts((steps, seeds, batch_size), length)
    models = [LSTM(num_chars, hidden, rngs=nnx.Rngs(seed)) for seed in range(seeds)]
    graphdefs, states = zip(*map(nnx.split, models), strict=True)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    rate = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
    print(f"of {seeds} seeds the median (least to largest), and how many a clip helped")
    print(ROW.format("clip", "loss", "spikes", "clipped", "diverged", "helped"))
    runs, result = {}, {}
    with tqdm(total=len(CLIPS) * steps, unit="step") as bar:
        for name, clip in CLIPS.items():
            bar.set_description(name)
            parts = clip, optax.sgd(rate)
            tx = optax.chain(*(parts[::-1] if name in BEHIND else parts))
            runs[name] = losses, *_, share = train(tx, graphdefs[0], params, texts, bar)
            last = losses[-max(1, steps // 20) :].mean(axis=0, dtype=float)
            last = np.where(np.isfinite(last), last, np.inf)
            found = {"loss": last, "spikes": spikes(losses), "clipped": share[-1]}
            cells = [
                f"{np.median(x):{form}} ({x.min():{form}} to {x.max():{form}})"
                for x, form in zip(found.values(), ("#.3g", ".0f", ".1%"), strict=True)
            ]
            if np.isinf(found["clipped"]).all():
                cells[-1] = "-"
            found["diverged"] = int(np.sum(last >= chance))
            found["helped"] = int(np.sum(last < result.get("none", found)["loss"]))
            tqdm.write(ROW.format(name, *cells, found["diverged"], found["helped"]))
            result[name] = found
    medians = {n: f"{n} {np.median(x['loss']):#.3g}" for n, x in result.items()}
    helped = [medians[n] for n in runs if result[n]["helped"] == seeds] or ["nothing"]
    print(f"{medians['none']}; helped every seed: {', '.join(helped)}")
    picture = logdir / "compare_limits.png"
    draw(picture, runs, result)
    print(f"the picture is {picture.resolve()}")
    return result | {"picture": picture}


if __name__ == "__main__":
    cli.run(main)
