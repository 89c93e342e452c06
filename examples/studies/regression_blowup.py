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
from typing import Any, NamedTuple

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

NUM_EXAMPLES = 1000
NUM_FEATURES = 20
HIDDEN = 25
BATCH_SIZE = 128  # the last 104 examples of each shuffle do not fill a batch
MOMENTUM = 0.8
FIRST_STEPS = 30  # are drawn one by one
BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK = COLORS
ROW = "{:17} | {:31} | {:8} | {}"


class Arm(NamedTuple):
    """One way to train, and how its curves look."""

    transform: optax.GradientTransformation  # stands before SGD
    broadcasts: bool  # whether the loss has the mistake
    color: str
    line: str


class Measures(NamedTuple):
    """What is measured at each step: the loss, and the norms before any clip."""

    losses: Any
    norms: Any  # of the whole gradient
    hidden: Any  # of the gradient of the hidden weights
    output: Any  # of the gradient of the output weights


class Result(NamedTuple):
    """What the study found, by the names of the arms."""

    num_params: int  # of the network
    arms: dict[str, Arm]
    runs: dict[str, Measures]  # `[seeds, epochs, steps]` each
    summaries: dict[str, dict[str, Any]]  # `loss` and `first_nan` of seeds, `max_norm`


def make_mlp(seed: int) -> nnx.Sequential:
    """Returns an MLP with Xavier uniform weights and biases of 0.01."""
    linear = functools.partial(
        nnx.Linear,
        kernel_init=nnx.initializers.xavier_uniform(),
        bias_init=nnx.initializers.constant(0.01),
        rngs=nnx.Rngs(seed),
    )
    return nnx.Sequential(linear(NUM_FEATURES, HIDDEN), nnx.relu, linear(HIDDEN, 1))


def make_arms(num_params: int, weight_decay: float) -> dict[str, Arm]:
    """Returns the ways to train, by name."""
    nothing = optax.identity()
    norm = optaxclip.clip_by_norm(1.0)
    per_leaf = optaxclip.clip_by_norm(1.0, per="leaf")
    value = optaxclip.clip_by_value
    small = num_params**-0.5  # with this value clip the norm is at most 1
    decay = optax.add_decayed_weights(weight_decay)
    return {
        "none": Arm(nothing, False, BLACK, "-"),
        "none, broadcast": Arm(nothing, True, BLACK, "--"),
        "L2": Arm(decay, False, ORANGE, ":"),
        "value 1": Arm(value(1.0), False, RED, "-"),
        f"value {small:.4f}": Arm(value(small), False, PINK, "-"),
        "norm 1": Arm(norm, False, BLUE, "-"),
        "norm 1 per leaf": Arm(per_leaf, False, GREEN, "-"),
        "norm 1 and L2": Arm(optax.chain(norm, decay), False, SKY, ":"),
        "norm 1, broadcast": Arm(norm, True, BLUE, "--"),
    }


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean over `[batch, 1]`; over all pairs, if targets are `[batch]`."""
    return jnp.mean((outputs - targets) ** 2)


def train(
    tx: Any, graphdef: Any, broadcasts: bool, params: Any, x: Any, y: Any, batches: Any
) -> tuple[jax.Array, Measures]:
    """Trains one run on targets `[n, 1]`; batches are indices `[epochs, steps, batch]`.

    Returns:
        final_loss: On all of the data, without the mistake.
        measures: `[epochs, steps]` each.
    """

    def loss_fn(params, x, y):
        return squared_error(nnx.merge(graphdef, params)(x), y)

    def step(carry, batch):
        params, opt_state = carry
        targets = y[batch, 0] if broadcasts else y[batch]
        loss, grads = jax.value_and_grad(loss_fn)(params, x[batch], targets)
        measures = Measures(
            losses=loss,
            norms=optaxclip.global_norm(grads),
            hidden=optaxclip.global_norm(grads["layers"][0]["kernel"]),
            output=optaxclip.global_norm(grads["layers"][2]["kernel"]),
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), measures

    epoch = functools.partial(jax.lax.scan, step)
    start = (params, tx.init(params))
    (params, _), measures = jax.lax.scan(epoch, start, batches)
    return loss_fn(params, x, y), measures


def first_nan(losses: np.ndarray) -> np.ndarray:
    """Returns the first epoch with NaN, from 1, or 0; of `[seeds, epochs, steps]`."""
    is_nan = np.isnan(losses).any(axis=-1)
    return np.where(is_nan.any(axis=-1), is_nan.argmax(axis=-1) + 1, 0)


def make_data() -> tuple[jax.Array, jax.Array]:
    """Returns the features `[n, 20]` and the targets `[n, 1]`."""
    data = make_regression(NUM_EXAMPLES, NUM_FEATURES, noise=0.1, random_state=1)
    x, y = data[:2]
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)[:, None]


def shuffle(seeds: int, epochs: int) -> np.ndarray:
    """Returns the indices of each batch, `[seeds, epochs, steps, batch]`."""
    order = np.tile(np.arange(NUM_EXAMPLES), (seeds, epochs, 1))
    order = np.random.default_rng(0).permuted(order, axis=-1)
    num_steps = NUM_EXAMPLES // BATCH_SIZE
    whole = order[..., : num_steps * BATCH_SIZE]
    return whole.reshape(seeds, epochs, num_steps, BATCH_SIZE)


def run(
    *, epochs: int, seeds: int, learning_rate: float, weight_decay: float
) -> Result:
    """Trains each arm from the same parameters on the same batches."""
    x, y = make_data()
    batches = shuffle(seeds, epochs)
    models = [make_mlp(seed) for seed in range(seeds)]
    graphdefs, states = zip(*map(nnx.split, models), strict=True)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(states[0]))
    arms = make_arms(num_params, weight_decay)
    runs, summaries = {}, {}
    bar = tqdm(arms.items(), unit="arm")
    for name, arm in bar:
        bar.set_description(name)
        tx = optax.chain(arm.transform, optax.sgd(learning_rate, momentum=MOMENTUM))
        train_one = functools.partial(train, tx, graphdefs[0], arm.broadcasts)
        train_all = jax.jit(jax.vmap(train_one, in_axes=(0, None, None, 0)))
        loss, measures = jax.device_get(train_all(params, x, y, batches))
        runs[name] = measures
        finite_norms = measures.norms[measures.norms < np.inf]
        summaries[name] = {
            "loss": np.where(np.isfinite(loss), loss, np.inf),
            "first_nan": first_nan(measures.losses),
            "max_norm": finite_norms.max(),
        }
    return Result(num_params, arms, runs, summaries)


def report(result: Result) -> None:
    """Prints a row for each arm, and the order in which they end."""
    seeds = len(result.summaries["none"]["loss"])
    print(f"of {seeds} seeds the median (least to largest)")
    print(ROW.format("arm", "final loss", "max norm", "NaN from epoch; 0: never"))
    ends = []
    for name, found in result.summaries.items():
        loss = found["loss"]
        median = np.median(loss)
        cells = (
            f"{median:.3g} ({loss.min():.3g} to {loss.max():.3g})",
            f"{found['max_norm']:.3g}",
            " ".join(map(str, found["first_nan"])),
        )
        print(ROW.format(name, *cells))
        ends.append((median, name))
    lowest_first = "; ".join(f"{name} {median:.3g}" for median, name in sorted(ends))
    print(f"final losses, lowest first: {lowest_first}")
    largest = result.num_params**0.5
    print(f"a value clip at 1 lets the norm be up to {largest:.3g}, not 1")


def draw(path: Path, result: Result) -> None:
    """Draws means of the epochs, and the first steps; of the seeds the medians."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplot_mosaic([["losses", "first"], ["hidden", "output"]])
    for i, (name, measures) in enumerate(result.runs.items()):
        # Behind NaN, ReLU makes zeros.
        finite = np.isfinite(measures.losses)
        losses, norms, hidden, output = (
            np.where(finite, values, np.inf).astype(float) for values in measures
        )
        of_panel = {
            "losses": losses.mean(axis=-1),
            "hidden": hidden.mean(axis=-1),
            "output": output.mean(axis=-1),
            "first": norms.reshape(len(norms), -1)[:, :FIRST_STEPS],
        }
        for panel, values in of_panel.items():
            # Smaller from arm to arm, as crosses at the same step cover each other.
            draw_median(axes[panel], name, result.arms[name], values, cross=10 - i)

    for panel, title, unit, limits in (
        ("losses", "training loss, mean of an epoch", "epoch", (0.3, 1e6)),
        ("first", "gradient norm in the first steps", "step", (1, 1e39)),
        ("hidden", "gradient norm of the hidden weights, mean", "epoch", (1, 1e4)),
        ("output", "gradient norm of the output weights, mean", "epoch", (1, 1e4)),
    ):
        axes[panel].set(yscale="log", ylim=limits, xlabel=unit)
        axes[panel].set_title(title, loc="left", fontsize="medium", pad=10)
        axes[panel].grid(alpha=0.3)
        axes[panel].spines[["top", "right"]].set_visible(False)
    axes["losses"].plot([], "X", color="gray", label="the median is no longer finite")
    handles, labels = axes["losses"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def draw_median(axis: Any, name: str, arm: Arm, values: Any, *, cross: int) -> None:
    """Draws the median of `[seeds, steps]`.

    Where that ceases to be finite, a `cross` of this size stands on the upper edge.
    """
    medians = np.median(values, axis=0)
    steps = np.arange(1, len(medians) + 1)
    axis.plot(steps, medians, color=arm.color, linestyle=arm.line, label=name)
    ends = steps[np.isinf(medians)]
    if len(ends):
        at_edge = {"transform": axis.get_xaxis_transform(), "clip_on": False}
        axis.plot(ends[0], 1, "X", color=arm.color, markersize=cross, **at_edge)


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
    knobs: dict[str, Any] = {
        "epochs": epochs,
        "seeds": seeds,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
    }
    cli.check_positive(knobs)
    logdir = logdir or Path("runs", "regression_blowup", time.strftime("%Y%m%d-%H%M%S"))
    result = run(**knobs)
    report(result)
    picture = logdir / "regression_blowup.png"
    draw(picture, result)
    print(f"the picture is {picture.resolve()}")
    return result.summaries | {"picture": picture}


if __name__ == "__main__":
    cli.run(main)
