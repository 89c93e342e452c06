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

NUM_SYMBOLS, NUM_CLASSES = 6, 4  # A, B and four distractors; AA, AB, BA, BB
HIDDEN, BATCH_SIZE = 50, 20
EVERY, NUM_TEST, SOLVED = 500, 1000, 0.01  # steps to a check; its sequences and error
COLORS = {"without": curves.COLORS[3], "with": curves.COLORS[0]}
HEADS = "solved", "at the end", "NaN", "steps", "radius", "largest norm"
ROW = "{:6} | {:8} | {:6} | {:10} | {:3} | {:19} | {:25} | {}"


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
        row[rng.permutation(HIDDEN)[15:]] = 0
    params = {
        "input": 0.01 * rng.normal(size=(NUM_SYMBOLS, HIDDEN)),
        "recurrent": 0.95 * recurrent / spectral_radius(recurrent),
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


def train(params: Any, limits: Any, rate: float, length: int, steps: int) -> Any:
    """Trains all limits and seeds at once, from parameters `[limits, seeds, ...]`.

    Returns the test errors, the spectral radii, and the largest norms of the gradient
    since the check before, `[checks, limits, seeds]` each, from before the first step.
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
    advance = jax.jit(partial(jax.lax.scan, lambda p, keys: step_all(p, limits, keys)))
    checks, norms = [], np.zeros((1, *params["bias"].shape[:2]))
    all_keys = jax.random.split(jax.random.key(0), 1 + steps // EVERY)
    for i, key in enumerate(tqdm(all_keys, desc=f"length {length}", unit="check")):
        keys = jax.random.split(key, (1 + EVERY, norms.shape[-1]))
        if i:
            params, norms = advance(params, keys[1:])
        radii = spectral_radius(np.asarray(params["recurrent"]))
        checks.append((error_all(params, keys[0]), radii, norms.max(axis=0)))
    return [np.stack(values) for values in zip(*checks, strict=True)]


def draw(path: Path, runs: dict[int, Any]) -> None:
    """Draws the error and the spectral radius of every seed, for each length."""
    figure = Figure(figsize=(1 + 3.3 * len(runs), 6), layout="constrained")
    axes = figure.subplots(2, len(runs), sharex=True, sharey="row", squeeze=False)
    for column, (length, run) in zip(axes.T, runs.items(), strict=True):
        steps = EVERY * np.arange(len(run[0]))
        for axis, values, line in zip(column, run, (0.75, 1), strict=False):
            for i, (arm, color) in enumerate(COLORS.items()):
                lines = axis.plot(steps, values[:, i], color=color, alpha=0.8)
                lines[0].set_label(f"{arm} clipping")
            axis.axhline(line, color="black", ls=":", label="guessing; a radius of 1")
            axis.spines[["top", "right"]].set_visible(False)
        column[0].set_title(f"length {length}", loc="left", fontsize="medium")
        column[1].set_xlabel("step")
    axes[0, 0].set_ylabel("error on fresh sequences")
    axes[1, 0].set_ylabel("spectral radius")
    legend = axes[0, 0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


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
    knobs = {"seeds": seeds, "max_norm": max_norm, "learning_rate": learning_rate}
    cli.check_positive(knobs, finite=True)
    if steps < EVERY or steps % EVERY or min(lengths, default=0) < 10:
        what = f"steps in whole {EVERY}s and lengths of 10 or more are needed"
        raise cli.InputError(f"{what}, got {steps} and {lengths}")
    logdir = logdir or Path("runs/temporal_order", time.strftime("%Y%m%d-%H%M%S"))
    limits = jnp.array([math.inf, max_norm])  # in the order of COLORS
    params = jax.tree.map(lambda *x: jnp.array([x, x]), *map(smart_tanh, range(seeds)))
    print(f"of {seeds} seeds: how many solve it, and the median (least to largest)")
    print(ROW.format("length", "clipping", *HEADS))
    runs, result = {}, {length: {} for length in lengths}
    for length in lengths:
        runs[length] = train(params, limits, learning_rate, length, steps)
        for i, arm in enumerate(COLORS):
            errors, radii, norms = (x[:, i] for x in runs[length])
            solved, end = errors < SOLVED, radii[-1]
            after = np.where(solved, EVERY * np.arange(len(errors))[:, None], np.inf)
            spreads = after.min(axis=0), end, norms.max(axis=0)
            counts = solved.any(axis=0).sum(), solved[-1].sum(), np.isnan(end).sum()
            result[length][arm] = dict(zip(HEADS, (*counts, *spreads), strict=True))
            cells = (
                f"{np.median(x):.5g} ({min(x):.5g} to {max(x):.5g})" for x in spreads
            )
            print(ROW.format(length, arm, *counts, *cells))
    none, clip = (sum(r[arm]["solved"] for r in result.values()) for arm in COLORS)
    print(f"of {len(runs) * seeds} runs {clip} solve it with clipping, {none} without")
    picture = logdir / "temporal_order.png"
    draw(picture, runs)
    print(f"the picture is {picture.resolve()}")
    return result | {"picture": picture}


if __name__ == "__main__":
    cli.run(main)
