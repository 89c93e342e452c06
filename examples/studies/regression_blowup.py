"""Why is a small regression NaN at once, and what saves it: clipping or weight decay?

python examples/studies/regression_blowup.py                 # no download

An MLP of 25 units learns scikit-learn's `make_regression` by SGD with momentum. Every
arm gets the same parameters and batches, for ten seeds. Much-copied versions subtract
targets `[batch]` from outputs `[batch, 1]`, which broadcasts, without an error, to the
differences of every output to every target. That loss is least where every output is
the mean target: its gradients are smaller, NaN comes later, and nothing can be learned.
"""

import functools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import make_regression
from tqdm import tqdm

import optaxclip

sys.path.insert(0, str(Path(__file__).parents[1]))
import cli
from curves import COLORS

NUM_FEATURES, HIDDEN, BATCH_SIZE, FIRST_STEPS = 20, 25, 128, 30
BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK = COLORS
ROW = "{:17} | {:31} | {:8} | {}"


def make_mlp(seed: int) -> nnx.Sequential:
    """Returns an MLP with Xavier uniform weights and biases of 0.01."""
    linear = functools.partial(
        nnx.Linear,
        kernel_init=nnx.initializers.xavier_uniform(),
        bias_init=nnx.initializers.constant(0.01),
        rngs=nnx.Rngs(seed),
    )
    return nnx.Sequential(linear(NUM_FEATURES, HIDDEN), nnx.relu, linear(HIDDEN, 1))


def make_arms(num_params: int, weight_decay: float) -> dict[str, Any]:
    """Returns of each arm what stands before SGD, if its loss broadcasts, its line."""
    norm, value = optaxclip.clip_by_norm, optaxclip.clip_by_value
    decay = optax.add_decayed_weights(weight_decay)
    small = num_params**-0.5  # with this value clip the norm is at most 1
    return {
        "none": (optax.identity(), False, BLACK, "-"),
        "none, broadcast": (optax.identity(), True, BLACK, "--"),
        "L2": (decay, False, ORANGE, ":"),
        "value 1": (value(1.0), False, RED, "-"),
        f"value {small:.4f}": (value(small), False, PINK, "-"),
        "norm 1": (norm(1.0), False, BLUE, "-"),
        "norm 1 per leaf": (norm(1.0, per="leaf"), False, GREEN, "-"),
        "norm 1 and L2": (optax.chain(norm(1.0), decay), False, SKY, ":"),
        "norm 1, broadcast": (norm(1.0), True, BLUE, "--"),
    }


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean over `[batch, 1]`; over all pairs, if targets are `[batch]`."""
    return jnp.mean((outputs - targets) ** 2)


def train(tx: Any, graphdef: Any, broadcasts: bool, params: Any, *data: Any) -> Any:
    """Trains one run; `data` are x, targets `[n, 1]`, indices `[epochs, steps, batch]`.

    Returns:
        final_loss: On all of the data, without the mistake.
        measures: The loss, and the norms of the gradient and of its two weight matrices
            before any clip, `[epochs, steps]` each.
    """
    x, y, batches = data

    def loss_fn(params, x, y):
        return squared_error(nnx.merge(graphdef, params)(x), y)

    def step(carry, batch):
        params, opt_state = carry
        targets = y[batch, 0] if broadcasts else y[batch]
        loss, grads = jax.value_and_grad(loss_fn)(params, x[batch], targets)
        parts = grads, *(grads["layers"][i]["kernel"] for i in (0, 2))
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), (loss, *map(optaxclip.global_norm, parts))

    epoch = functools.partial(jax.lax.scan, step)
    (params, _), measures = jax.lax.scan(epoch, (params, tx.init(params)), batches)
    return loss_fn(params, x, y), measures


def first_nan(losses: np.ndarray) -> np.ndarray:
    """Returns the first epoch with NaN, from 1, or 0; of `[seeds, epochs, steps]`."""
    is_nan = np.isnan(losses).any(axis=-1)
    return np.where(is_nan.any(axis=-1), is_nan.argmax(axis=-1) + 1, 0)


def draw(path: Path, arms: dict[str, Any], runs: dict[str, Any]) -> None:
    """Draws means of the epochs, and the first steps; of the seeds the medians."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplot_mosaic("LF;HO")
    for i, (name, run) in enumerate(runs.items()):
        # Behind NaN, ReLU makes zeros.
        run = [np.where(np.isfinite(run[0]), x, np.inf).astype(float) for x in run]
        losses, norms, *matrices = run
        first = norms.reshape(len(norms), -1)[:, :FIRST_STEPS]
        means = [x.mean(axis=-1) for x in (losses, *matrices)]
        color, line = arms[name][2:]
        for panel, values in zip("LHOF", (*means, first), strict=True):
            values = np.median(values, axis=0)
            steps, axis = np.arange(1, len(values) + 1), axes[panel]
            axis.plot(steps, values, color=color, linestyle=line, label=name)
            place = {"transform": axis.get_xaxis_transform(), "clip_on": False}
            for end in steps[np.isinf(values)][:1]:
                axis.plot(end, 1, "X", color=color, markersize=10 - i, **place)
    for panel, title, unit, limits in (
        ("L", "training loss, mean of an epoch", "epoch", (0.3, 1e6)),
        ("F", "gradient norm in the first steps", "step", (1, 1e39)),
        ("H", "gradient norm of the hidden weights, mean", "epoch", (1, 1e4)),
        ("O", "gradient norm of the output weights, mean", "epoch", (1, 1e4)),
    ):
        axes[panel].set(yscale="log", ylim=limits, xlabel=unit)
        axes[panel].set_title(title, loc="left", fontsize="medium", pad=10)
        axes[panel].grid(alpha=0.3)
        axes[panel].spines[["top", "right"]].set_visible(False)
    axes["L"].plot([], "X", color="grey", label="the median is no longer finite")
    handles = axes["L"].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(
    *,
    epochs: int = 50,
    seeds: int = 10,
    learning_rate: float = 0.07,
    weight_decay: float = 0.01,
    logdir: Path | None = None,
) -> dict[str, Any]:
    """Trains the same MLP in nine ways, and says which of them end well.

    Args:
        epochs: Passes over the data, each shuffled anew and without the last 104 of the
            1000 examples, which do not fill a batch.
        seeds: Runs for each arm, all at once.
        learning_rate: The learning rate; the momentum is 0.8.
        weight_decay: L2 adds this times the parameters to the gradient, after the clip.
        logdir: Where to write; by default a new directory in runs/regression_blowup.
    """
    knobs = {"epochs": epochs, "seeds": seeds, "learning_rate": learning_rate}
    cli.check_positive(knobs | {"weight_decay": weight_decay})
    logdir = logdir or Path("runs", "regression_blowup", time.strftime("%Y%m%d-%H%M%S"))
    data = make_regression(1000, NUM_FEATURES, noise=0.1, random_state=1)
    x, y = (jnp.asarray(array, jnp.float32).reshape(1000, -1) for array in data)
    order = np.tile(np.arange(len(x)), (seeds, epochs, 1))
    order = np.random.default_rng(0).permuted(order, axis=-1)
    batches = order[..., : len(x) // BATCH_SIZE * BATCH_SIZE]
    batches = batches.reshape(seeds, epochs, -1, BATCH_SIZE)
    models = [nnx.split(make_mlp(seed)) for seed in range(seeds)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(m[1] for m in models))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(models[0][1]))
    print(f"of {seeds} seeds the median (least to largest)")
    print(ROW.format("arm", "final loss", "max norm", "NaN from epoch; 0: never"))
    arms, runs, result = make_arms(num_params, weight_decay), {}, {}
    for name, (transform, broadcasts, *_) in (bar := tqdm(arms.items(), unit="arm")):
        bar.set_description(name)
        tx = optax.chain(transform, optax.sgd(learning_rate, momentum=0.8))
        run = functools.partial(train, tx, models[0][0], broadcasts)
        run = jax.jit(jax.vmap(run, in_axes=(0, None, None, 0)))
        loss, runs[name] = jax.device_get(run(params, x, y, batches))
        losses, norms, *_ = runs[name]
        loss, norm = np.where(np.isfinite(loss), loss, np.inf), norms[norms < np.inf]
        found = {"loss": loss, "first_nan": first_nan(losses), "max_norm": norm.max()}
        cell = f"{np.median(loss):.3g} ({loss.min():.3g} to {loss.max():.3g})"
        epochs_of_nan = " ".join(map(str, found["first_nan"]))
        tqdm.write(ROW.format(name, cell, f"{norm.max():.3g}", epochs_of_nan))
        result[name] = found
    ends = sorted((np.median(found["loss"]), name) for name, found in result.items())
    ends = "; ".join(f"{name} {loss:.3g}" for loss, name in ends)
    print(f"final losses, lowest first: {ends}")
    print(f"a value clip at 1 lets the norm be up to {num_params**0.5:.3g}, not 1")
    picture = logdir / "regression_blowup.png"
    draw(picture, arms, runs)
    print(f"the picture is {picture.resolve()}")
    return result | {"picture": picture}


if __name__ == "__main__":
    cli.run(main)
