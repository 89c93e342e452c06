"""What does back-propagation through time multiply, and which run will explode?

python examples/studies/bptt.py                              # no download

Networks recall the first number of a sequence. The largest Lyapunov exponent, of
tangents going forward, predicts the growth of the gradients dC/da_t going backward.
If it is positive on the first batch, before any update, an explosion is foretold.
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import optaxclip

sys.path.insert(0, str(Path(__file__).parents[1]))
import cli
import curves
from gradient_growth import loss_fn, measure

RADII = (0.5, 0.75, 1.0, 1.25, 1.5)  # spectral, of the recurrent matrix
LEARNING_RATE = 0.01
MAX_NORM = 1.0  # of the runs with a clip
NUM_ROUNDS = 4  # of training; before each, the first batch is measured
STEPS_PER_ROUND = 25
BATCH_SIZE = 16
LENGTH = 64  # of a sequence
TIMES = np.arange(2, LENGTH + 1)  # that are drawn: step 1 starts at 0, and adds nothing
GAPS = 2 ** np.arange(1, 7) - 1  # T - k for da_T/da_k, up to the whole length
ROW = "{:4} | {:6} | {:22} | {:22} | {:8} | {:8} | {}"


def rnn(activation: Any, params: Any, state: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the next state of a simple recurrent network."""
    return activation(params["W"] @ state + params["U"] * x + params["b"])


def lstm(params: Any, state: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the next state: the outputs, then the memory."""
    outputs, memory = jnp.split(state, 2)
    before_gates = rnn(jnp.asarray, params, outputs, x)
    into, forget, out, new = jnp.split(before_gates, 4)
    memory = jax.nn.sigmoid(forget) * memory + jax.nn.sigmoid(into) * jnp.tanh(new)
    outputs = jax.nn.sigmoid(out) * jnp.tanh(memory)
    return jnp.concatenate([outputs, memory])


CELLS = {
    "tanh": partial(rnn, jnp.tanh),
    "ReLU": partial(rnn, jax.nn.relu),
    "LSTM": lstm,
}


def initialize(name: str, hidden: int, seeds: int) -> Any:
    """Returns Gaussian weights `[radii, seeds, ...]`, the same for each radius."""
    num_gates = 4 if name == "LSTM" else 1
    state_size = 2 * hidden if name == "LSTM" else hidden
    rng = np.random.default_rng(0)

    # The matrix of each gate gets a spectral radius of 1, and then all of RADII.
    gates = rng.normal(size=(seeds, num_gates, hidden, hidden))
    gates /= np.abs(np.linalg.eigvals(gates)).max(-1)[..., None, None]
    recurrent = gates.reshape(seeds, num_gates * hidden, hidden)
    inputs = rng.normal(size=(seeds, num_gates * hidden))
    output = rng.normal(size=(seeds, state_size)) / np.sqrt(state_size)
    biases = np.zeros((num_gates, hidden))
    if name == "LSTM":
        biases[1] = 1  # the usual bias of the gate that forgets

    num_radii = len(RADII)
    params = {
        "W": np.multiply.outer(RADII, recurrent),
        "U": np.tile(inputs, (num_radii, 1, 1)),
        "V": np.tile(output, (num_radii, 1, 1)),
        "b": np.tile(biases.ravel(), (num_radii, seeds, 1)),
    }
    return jax.tree.map(np.float32, params)


def train(cell: Any, max_norm: float, batches: Any, params: Any) -> Any:
    """Returns losses, and what the first batch shows before each round of training."""
    tx = optax.chain(optaxclip.clip_by_norm(max_norm), optax.sgd(LEARNING_RATE))

    def step(carry, xs):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, cell, xs, {}, 0 * xs)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), loss

    def one_round(carry, batches_of_round):
        params, _ = carry
        found = measure(cell, params, batches[0, 0], GAPS)
        carry, losses = jax.lax.scan(step, carry, batches_of_round)
        return carry, found | {"losses": losses}

    start = (params, tx.init(params))
    _, found = jax.lax.scan(one_round, start, batches)
    return found


def run(*, seeds: int, hidden: int) -> dict[str, np.ndarray]:
    """Trains each network with the clip and without.

    Returns:
        What `measure` returns, with an axis for the rounds, and the `losses`, all of
        the runs with the clip; and of each network whether an explosion was `foretold`
        and whether it exploded without the clip (`none`) and with it (`clip`). They
        begin with `[networks, radii, seeds]`.
    """
    shape = (NUM_ROUNDS, STEPS_PER_ROUND, BATCH_SIZE, LENGTH)
    batches = np.float32(np.random.default_rng(0).uniform(-1, 1, shape))
    networks = []
    for name in tqdm(CELLS, unit="network"):
        params = initialize(name, hidden, seeds)
        found = {}
        for clip, max_norm in (("none", np.inf), ("clip", MAX_NORM)):
            train_one = partial(train, CELLS[name], max_norm, batches)
            train_all = jax.jit(jax.vmap(jax.vmap(train_one)))
            found |= jax.device_get(train_all(params))
            found[clip] = ~np.isfinite(found["losses"]).all(axis=(-1, -2))
        # Before any update, so the same with the clip and without.
        found["foretold"] = found["predicted"][..., 0] > 1
        networks.append(found)
    return {key: np.stack([found[key] for found in networks]) for key in networks[0]}


def report(result: dict[str, np.ndarray]) -> None:
    """Prints a row for each kind of network and radius, and how right it foretold."""

    def spread(values):
        return f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    heads = ("predicted growth", "measured growth", "foretold", "exploded", "clipped")
    print(ROW.format("net", "radius", *heads))
    for i, name in enumerate(CELLS):
        for j, radius in enumerate(RADII):
            cells = (
                spread(result["predicted"][i, j, :, 0]),
                spread(result["measured"][i, j, :, 0]),
                result["foretold"][i, j].sum(),
                result["none"][i, j].sum(),
                result["clip"][i, j].sum(),
            )
            print(ROW.format(name, radius, *cells))

    differences = np.abs(result["measured"] / result["predicted"] - 1)
    foretold = result["foretold"]
    exploded = result["none"]
    print(
        f"growth as predicted within {differences[..., 0].max():.1%} at first, "
        f"{differences.max():.1%} ever; "
        f"foretold: {(foretold & exploded).sum()} of {exploded.sum()} explosions, "
        f"{(foretold & ~exploded).sum()} others; "
        f"clipped {result['clip'].sum()} of {exploded.size} explode"
    )


def draw(path: Path, result: dict[str, Any]) -> None:
    """Draws the first network of each radius at first and at last, and all growths."""
    figure = Figure(figsize=(11, 12), layout="constrained")
    axes = figure.subplots(4, len(CELLS), squeeze=False, sharex="row", sharey="row")
    panels = (
        ("states", "norm of dC/da_t", "t", TIMES),
        ("added", "norm of step t in dC/dW", "t", TIMES),
        ("spectral", "spectral norm of da_T/da_k", "T - k", GAPS),
    )
    for column, name in enumerate(CELLS):
        for row, (key, title, label, xs) in enumerate(panels):
            axis = axes[row, column]
            axis.set(title=f"{name}: {title}", xlabel=label, yscale="log")
            for i, radius in enumerate(RADII):
                color = curves.COLORS[i]
                of_rounds = result[key][column, i, 0]
                at_first = of_rounds[0, -len(xs) :]
                at_last = of_rounds[-1, -len(xs) :]
                axis.plot(xs, at_first, color=color, label=f"radius {radius}")
                axis.plot(xs, at_last, ":", color=color)

        axis = axes[-1, column]
        axis.set(title=f"{name}: growth per step (x: seen)", yscale="log")
        axis.set_xlabel("training step")
        steps = STEPS_PER_ROUND * np.arange(NUM_ROUNDS)
        for i in range(len(RADII)):
            color = curves.COLORS[i]
            axis.plot(steps, result["predicted"][column, i].T, color=color)
            axis.plot(steps, result["measured"][column, i].T, "x", color=color)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(*, seeds: int = 4, hidden: int = 64, logdir: Path | None = None) -> Any:
    """Predicts the growth of gradients, and trains with a clip at norm 1 and without.

    Args:
        seeds: Networks of each kind and spectral radius.
        hidden: Units of each network.
        logdir: Where to write; by default a new directory in runs/bptt.
    """
    cli.check_positive({"seeds": seeds, "hidden": hidden})
    logdir = logdir or Path("runs", "bptt", time.strftime("%Y%m%d-%H%M%S"))
    result = run(seeds=seeds, hidden=hidden)
    report(result)
    picture = logdir / "bptt.png"
    draw(picture, result)
    print(f"the picture is {picture.resolve()}")
    return result | {"picture": picture}


if __name__ == "__main__":
    cli.run(main)
