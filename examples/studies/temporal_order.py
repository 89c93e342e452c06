"""Does a recurrent network learn what it must remember, with and without clipping?

python examples/studies/temporal_order.py                    # no download

The temporal-order task of Pascanu et al. (arXiv:1211.5063): among distractors an A or B
stands near the start of a sequence, and another before its middle; at the end a tanh
RNN says which two. All seeds train at once by SGD, from the paper's "smart tanh".
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
from matplotlib.figure import Figure
from tqdm import tqdm

import optaxclip

sys.path.insert(0, str(Path(__file__).parents[1]))
import cli
import curves

NUM_SYMBOLS = 6  # A, B and four distractors
NUM_CLASSES = 4  # AA, AB, BA, BB
HIDDEN = 50
NUM_CONNECTIONS = 15  # of each unit to the units of the step before, at first
RADIUS = 0.95  # spectral, of the recurrent matrix at first
BATCH_SIZE = 20
EVERY = 500  # steps from check to check
NUM_TEST = 1000  # fresh sequences in a check
SOLVED = 0.01  # an error below this is a solution
COLORS = {"without": curves.COLORS[3], "with": curves.COLORS[0]}
COUNTS = ("solved", "at the end", "NaN")
SPREADS = ("steps", "radius", "largest norm")
ROW = "{:6} | {:8} | {:6} | {:10} | {:3} | {:19} | {:25} | {}"


class Run(NamedTuple):
    """What the checks found at one length, `[checks, arms, seeds]` each.

    Attributes:
        errors: On fresh sequences.
        radii: Of the recurrent matrix, spectral.
        norms: The largest of the gradient since the check before.
    """

    errors: np.ndarray
    radii: np.ndarray
    norms: np.ndarray


class Result(NamedTuple):
    """What the study found.

    Attributes:
        runs: The checks, by length.
        summaries: What they amount to, by length and arm: the numbers of seeds in
            `COUNTS`, and of each seed the numbers in `SPREADS`.
    """

    runs: dict[int, Run]
    summaries: dict[int, dict[str, dict[str, Any]]]


def sequences(key: jax.Array, length: int, num: int) -> tuple[jax.Array, jax.Array]:
    """Draws sequences, int `[length, num]`, and their classes `[num]`."""
    # Of a length T, what matters stands in [T/10, 2T/10) and in [4T/10, 5T/10).
    keys = jax.random.split(key, 3)
    first, second = jax.random.randint(keys[0], (2, num), 0, 2)
    place = jax.random.randint(keys[1], (2, num), 0, length // 10)
    symbols = jax.random.randint(keys[2], (length, num), 2, NUM_SYMBOLS)
    steps = jnp.arange(length)[:, None]
    symbols = jnp.where(steps == length // 10 + place[0], first, symbols)
    symbols = jnp.where(steps == 4 * length // 10 + place[1], second, symbols)
    return symbols, 2 * first + second


def smart_tanh(seed: int) -> dict[str, Any]:
    """Returns parameters with a sparse recurrent matrix of spectral radius 0.95."""
    rng = np.random.default_rng(seed)
    recurrent = rng.normal(size=(HIDDEN, HIDDEN))
    for row in recurrent:
        row[rng.permutation(HIDDEN)[NUM_CONNECTIONS:]] = 0
    params = {
        "input": 0.01 * rng.normal(size=(NUM_SYMBOLS, HIDDEN)),
        "recurrent": RADIUS * recurrent / spectral_radius(recurrent),
        "bias": np.zeros(HIDDEN),
        "output": 0.01 * rng.normal(size=(HIDDEN, NUM_CLASSES)),
        "output_bias": np.zeros(NUM_CLASSES),
    }
    return jax.tree.map(np.float32, params)


def spectral_radius(matrices: np.ndarray) -> np.ndarray:
    """Returns the largest |eigenvalue| of matrices `[..., n, n]`; NaN if not finite."""
    finite: Any = np.isfinite(matrices).all(axis=(-2, -1), keepdims=True)
    eigenvalues = np.linalg.eigvals(np.where(finite, matrices, 0))
    return np.where(finite[..., 0, 0], np.abs(eigenvalues).max(axis=-1), np.nan)


def logits_of(params: Any, symbols: jax.Array) -> jax.Array:
    """Reads int `[length, num]` from start to end; returns the logits `[num, 4]`."""
    inputs = jax.nn.one_hot(symbols, NUM_SYMBOLS) @ params["input"] + params["bias"]
    state, _ = jax.lax.scan(
        lambda state, x: (jnp.tanh(x + state @ params["recurrent"]), None),
        jnp.zeros_like(inputs[0]),
        inputs,
    )
    return state @ params["output"] + params["output_bias"]


def train(params: Any, limits: Any, rate: float, length: int, steps: int) -> Run:
    """Trains all arms and seeds at once, from parameters `[arms, seeds, ...]`.

    The first of the checks is before the first step. Each arm has one of the limits.
    """
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels

    def loss_fn(params, symbols, classes):
        return cross_entropy(logits_of(params, symbols), classes).mean()

    def step(params, limit, key):
        grads = jax.grad(loss_fn)(params, *sequences(key, length, BATCH_SIZE))
        tx = optax.chain(optaxclip.clip_by_norm(limit), optax.sgd(rate))
        updates, state = tx.update(grads, tx.init(params))
        params = optax.apply_updates(params, updates)
        return params, optaxclip.metrics(state)["clip/norm"]

    def error(params, key):
        symbols, classes = sequences(key, length, NUM_TEST)
        return (logits_of(params, symbols).argmax(axis=1) != classes).mean()

    # Each seed has sequences of its own, the same under every limit.
    step_all = jax.vmap(jax.vmap(step, in_axes=(0, None, 0)), in_axes=(0, 0, None))
    error_all = jax.jit(jax.vmap(jax.vmap(error), in_axes=(0, None)))
    advance = jax.jit(
        partial(jax.lax.scan, lambda params, keys: step_all(params, limits, keys))
    )
    num_arms, num_seeds, _ = params["bias"].shape
    norms = np.zeros((1, num_arms, num_seeds))
    checks = []
    all_keys = jax.random.split(jax.random.key(0), 1 + steps // EVERY)
    for i, key in enumerate(tqdm(all_keys, desc=f"length {length}", unit="check")):
        keys = jax.random.split(key, (1 + EVERY, num_seeds))
        if i > 0:
            params, norms = advance(params, keys[1:])
        errors = error_all(params, keys[0])
        radii = spectral_radius(np.asarray(params["recurrent"]))
        checks.append(Run(errors, radii, norms.max(axis=0)))
    return jax.tree.map(lambda *values: np.stack(values), *checks)


def summarize(run: Run, arm: int) -> dict[str, Any]:
    """Returns what the checks of one arm amount to."""
    errors, radii, norms = (values[:, arm] for values in run)
    solved = errors < SOLVED
    radius = radii[-1]
    steps = EVERY * np.arange(len(errors))[:, None]
    return {
        "solved": solved.any(axis=0).sum(),
        "at the end": solved[-1].sum(),
        "NaN": np.isnan(radius).sum(),
        "steps": np.where(solved, steps, np.inf).min(axis=0),
        "radius": radius,
        "largest norm": norms.max(axis=0),
    }


def run(
    *,
    lengths: tuple[int, ...],
    steps: int,
    seeds: int,
    max_norm: float,
    learning_rate: float,
) -> Result:
    """Trains with and without clipping at each length, from the same parameters."""
    limits = jnp.array([math.inf, max_norm])  # in the order of COLORS
    starts = [smart_tanh(seed) for seed in range(seeds)]
    params = jax.tree.map(lambda *leaves: jnp.array([leaves, leaves]), *starts)
    runs = {
        length: train(params, limits, learning_rate, length, steps)
        for length in lengths
    }
    summaries = {
        length: {arm: summarize(checks, i) for i, arm in enumerate(COLORS)}
        for length, checks in runs.items()
    }
    return Result(runs, summaries)


def report(result: Result) -> None:
    """Prints a row for each length and arm, and how many runs solve the task."""
    seeds = next(iter(result.runs.values())).errors.shape[-1]
    print(f"of {seeds} seeds: how many solve it, and the median (least to largest)")
    print(ROW.format("length", "clipping", *COUNTS, *SPREADS))
    num_solved = dict.fromkeys(COLORS, 0)
    for length, of_arms in result.summaries.items():
        for arm, found in of_arms.items():
            counts = [found[name] for name in COUNTS]
            spreads = [
                f"{np.median(values):.5g} ({min(values):.5g} to {max(values):.5g})"
                for values in (found[name] for name in SPREADS)
            ]
            print(ROW.format(length, arm, *counts, *spreads))
            num_solved[arm] += found["solved"]
    num_runs = len(result.runs) * seeds
    print(
        f"of {num_runs} runs {num_solved['with']} solve it with clipping, "
        f"{num_solved['without']} without"
    )


def draw(path: Path, result: Result) -> None:
    """Draws the error and the spectral radius of every seed, for each length."""
    num_lengths = len(result.runs)
    figure = Figure(figsize=(1 + 3.3 * num_lengths, 6), layout="constrained")
    axes = figure.subplots(2, num_lengths, sharex=True, sharey="row", squeeze=False)
    for column, (length, checks) in zip(axes.T, result.runs.items(), strict=True):
        error_axis, radius_axis = column
        draw_seeds(error_axis, checks.errors, mark=1 - 1 / NUM_CLASSES)
        draw_seeds(radius_axis, checks.radii, mark=1)
        error_axis.set_title(f"length {length}", loc="left", fontsize="medium")
        radius_axis.set_xlabel("step")
    axes[0, 0].set_ylabel("error on fresh sequences")
    axes[1, 0].set_ylabel("spectral radius")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def draw_seeds(axis: Any, values: np.ndarray, *, mark: float) -> None:
    """Draws a line for each arm and seed of `[checks, arms, seeds]`, and the mark."""
    steps = EVERY * np.arange(len(values))
    for i, (arm, color) in enumerate(COLORS.items()):
        lines = axis.plot(steps, values[:, i], color=color, alpha=0.8)
        lines[0].set_label(f"{arm} clipping")  # of the seeds one, for the legend
    axis.axhline(mark, color="black", ls=":", label="guessing; a radius of 1")
    axis.spines[["top", "right"]].set_visible(False)


def main(
    *,
    lengths: tuple[int, ...] = (20, 40),
    steps: int = 20_000,
    seeds: int = 5,
    max_norm: float = 1.0,
    learning_rate: float = 0.01,
    logdir: Path | None = None,
) -> dict[Any, Any]:
    """Trains with and without clipping at each length, and counts who solves the task.

    Args:
        lengths: Symbols in a sequence, at least 10; each length is a run of its own.
        steps: Training steps of each run, at least 500 and in whole 500s.
        seeds: Networks at each length, with and without clipping.
        max_norm: Where the norm of the gradient is clipped.
        learning_rate: Of plain SGD.
        logdir: Where to write; by default a new directory in runs/temporal_order.
    """
    knobs: dict[str, Any] = {
        "seeds": seeds,
        "max_norm": max_norm,
        "learning_rate": learning_rate,
    }
    cli.check_positive(knobs, finite=True)
    if steps < EVERY or steps % EVERY or min(lengths, default=0) < 10:
        raise cli.InputError(
            f"steps in whole {EVERY}s and lengths of 10 or more are needed, "
            f"got {steps} and {lengths}"
        )
    logdir = logdir or Path("runs/temporal_order", time.strftime("%Y%m%d-%H%M%S"))
    result = run(lengths=lengths, steps=steps, **knobs)
    report(result)
    picture = logdir / "temporal_order.png"
    draw(picture, result)
    print(f"the picture is {picture.resolve()}")
    return result.summaries | {"picture": picture}


if __name__ == "__main__":
    cli.run(main)
