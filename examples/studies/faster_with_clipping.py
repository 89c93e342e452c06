"""How much faster is gradient descent with a clip than with the best constant step?

python examples/studies/faster_with_clipping.py              # no download

Zhang et al., "Why gradient clipping accelerates training" (2020, arXiv:1905.11881): the
curvature of f(x, y) = cosh(x) + cosh(y) has no bound, but is at most L0 + L1 times the
norm of the gradient, with L0 = L1 = 1. From (distance, 1) a constant step has to be
small for the steep x, and is then slow along the flat y. A clip makes only steep steps
small. M is the largest norm of the gradient where f is at most what it is at the start.
"""

import sys
import time
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

START_Y = 1.0
THEOREM = (0.1, 1.0)  # step size and limit: 1 / (10 L0) and min(10 L0, L0 / L1)
# What the searches try: constant steps times M; step sizes, and limits of the norm.
CONSTANT = np.geomspace(0.1, 100, 241)
TUNED = (np.geomspace(0.01, 10, 25), np.geomspace(0.1, 100, 25))
KINDS = {
    "constant": "best constant step, searched for each start",
    "theorem 3": "clip with the constants of theorem 3",
    "tuned": "clip, one searched pair for all starts",
}
COLORS = dict(zip(KINDS, np.take(curves.COLORS, [3, 0, 2]), strict=True))
ROW = "{:>8} | {:>8} | {:>9} | {:>9} | {:>5} | {}"


def objective(point: jax.Array) -> jax.Array:
    """Returns f at a point `[2]`."""
    return jnp.sum(jnp.cosh(point))


def largest_gradient(distance: Any) -> float:
    """Returns M, the norm where y is 0 and x as large as f(distance, 1) allows."""
    return np.sqrt((np.cosh(distance) + np.cosh(START_Y) - 1) ** 2 - 1)


def step(point: jax.Array, rate: Any, limit: Any) -> Any:
    """Makes one step of gradient descent with a clip; also returns the norm before."""
    tx = optax.chain(optaxclip.clip_by_norm(limit), optax.sgd(rate))
    grads = jax.grad(objective)(point)
    updates, _ = tx.update(grads, tx.init(point))
    return optax.apply_updates(point, updates), optaxclip.global_norm(grads)


@jax.jit
def race(distance: Any, rates: Any, limits: Any, tolerance: Any, max_steps: Any) -> Any:
    """Runs candidates with rates and limits `[n]` together, until the first arrives.

    Returns:
        steps: Until a norm was at most `tolerance`, or `max_steps`.
        winner: The index of the candidate with the smallest norm.
        arrived: Whether that is at most `tolerance`.
    """
    norms_at = jax.vmap(lambda point: optaxclip.global_norm(jax.grad(objective)(point)))

    def go_on(carry):
        steps, points = carry
        return (steps < max_steps) & ~jnp.any(norms_at(points) <= tolerance)

    def advance(carry):
        steps, points = carry
        return steps + 1, jax.vmap(step)(points, rates, limits)[0]

    points = jnp.tile(jnp.array([distance, START_Y]), (len(rates), 1))
    steps, points = jax.lax.while_loop(go_on, advance, (0, points))
    norms = norms_at(points)
    winner = jnp.nanargmin(norms)  # NaN has diverged
    return steps, winner, norms[winner] <= tolerance


def norms_along(distance: float, setting: Any, steps: int) -> jax.Array:
    """Returns the norms of the gradient in one run, `[steps + 1]`."""
    start = jnp.array([distance, START_Y])
    return jax.lax.scan(lambda x, _: step(x, *setting), start, length=steps + 1)[1]


def find_pair(distances: np.ndarray, tolerance: float) -> tuple[float, float]:
    """Returns the step size and limit with the fewest steps from all distances."""

    def count(distance, rate, limit):
        steps, _, arrived = race(distance, rate[None], limit[None], tolerance, 2000)
        return jnp.where(arrived, steps, jnp.inf)

    grids = np.meshgrid(distances, *TUNED, indexing="ij")
    counts = jax.jit(jnp.vectorize(count))(*grids).sum(axis=0)
    i, j = np.unravel_index(counts.argmin(), counts.shape)
    return inside(TUNED[0], i), inside(TUNED[1], j)


def inside(grid: np.ndarray, best: Any) -> float:
    """Returns the best of a grid; RuntimeError if it is at the edge."""
    if not 0 < best < len(grid) - 1:
        raise RuntimeError(f"{grid[best]:g}, the best, is at the edge of what is tried")
    return float(grid[best])


def draw(path: Path, result: dict[str, Any], norms: list[jax.Array]) -> None:
    """Draws the steps and their ratios over M, and the norms of the longest runs."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplot_mosaic("SRN")
    m, capped, constant = (result[name] for name in ("M", "capped", "constant"))
    last, slope = np.flatnonzero(~capped)[-1], m / (np.log(m) + 1)
    for (name, color), run in zip(COLORS.items(), norms, strict=True):
        line = {"color": color, "marker": "o", "markersize": 4}
        axes["S"].plot(m, result[name], label=KINDS[name], **line)
        axes["R"].plot(m, constant / result[name], **line)
        axes["N"].plot(np.arange(1, 1 + len(run)), run, color=color)
    for panel, values in ("S", constant), ("R", constant / result["theorem 3"]):
        line = slope * values[last] / slope[last]
        axes[panel].plot(m, line, "k--", linewidth=1, label="slope M / (log M + 1)")
    if capped.any():
        axes["S"].plot(m[capped], constant[capped], "k^", label="at least so many")
    for panel, title, unit in (
        ("S", "steps until the gradient is small", "M"),
        ("R", "steps of the best constant step / steps", "M"),
        ("N", f"norm of the gradient, from distance {result['distance'][-1]}", "step"),
    ):
        axes[panel].set_title(title, loc="left", fontsize="medium")
        axes[panel].set(xscale="log", yscale="log", xlabel=unit)
        axes[panel].grid(alpha=0.3)
        axes[panel].spines[["top", "right"]].set_visible(False)
    handles = axes["S"].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(
    *,
    largest: int = 14,
    tolerance: float = 1e-3,
    max_steps: int = 1_000_000,
    logdir: Path | None = None,
) -> dict[str, Any]:
    """Counts the steps from growing distances, with a constant step and with a clip.

    Args:
        largest: The distances are 2, 3, ... to this, at most 15: from further away
            float32 is too coarse for the updates of the best constant step.
        tolerance: A run has arrived when the norm of the gradient is at most this.
        max_steps: Where to give up, at least 500; the table then says ">=".
        logdir: Where to write; by default a new directory in runs/faster_with_clipping.
    """
    knobs = {"largest": (largest, 3, 15), "tolerance": (tolerance, 1e-6, 0.1)}
    for name, knob in (knobs | {"max_steps": (max_steps, 500, 10**9)}).items():
        value, low, high = knob
        if not low <= value <= high:
            raise cli.InputError(f"{name} must be from {low} to {high}, got {value}")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    logdir = logdir or Path("runs", "faster_with_clipping", stamp)
    distances = np.arange(2, largest + 1)
    pair = find_pair(distances, tolerance)
    print(f"tuned: step size {pair[0]:.3g}, limit {pair[1]:.3g}")
    print(ROW.format("distance", "M", *KINDS, "ratios"))
    rows = []
    for distance in tqdm(distances, unit="distance", mininterval=1):
        m = largest_gradient(distance)
        rates, no_limits = CONSTANT / m, np.full(len(CONSTANT), np.inf)
        steps, best, arrived = race(distance, rates, no_limits, tolerance, max_steps)
        rate = inside(rates, best) if arrived else float(rates[best])
        counts = [int(steps)]
        for one in (np.array([THEOREM]).T, np.array([pair]).T):
            counts.append(int(race(distance, *one, tolerance, max_steps)[0]))
        rows.append((distance, m, rate, not arrived, *counts))
        sign = "" if arrived else ">="
        ratios = ", ".join(f"{sign}{counts[0] / count:.3g}" for count in counts[1:])
        cells = distance, f"{m:.3g}", f"{sign}{counts[0]}", *counts[1:], ratios
        tqdm.write(ROW.format(*cells))
    names = "distance", "M", "rate", "capped", *KINDS
    result: Any = dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True))
    ends = [f"{'>=' * row[3]}{row[4] / row[5]:.3g} at M = {row[1]:.3g}" for row in rows]
    print(f"steps without / with theorem 3's clip: from {ends[0]} to {ends[-1]}")
    settings = (result["rate"][-1], np.inf), THEOREM, pair
    norms = map(norms_along, [largest] * 3, settings, rows[-1][4:])
    picture = logdir / "faster_with_clipping.png"
    draw(picture, result, list(norms))
    print(f"the picture is {picture.resolve()}")
    return result | {"pair": pair, "picture": picture}


if __name__ == "__main__":
    cli.run(main)
