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

START_Y = 1.0  # of every run; x starts at the distance
THEOREM = (0.1, 1.0)  # step size and limit: 1 / (10 L0) and min(10 L0, L0 / L1)
# What the searches try; the best must lie inside. Constant steps are these over M.
CONSTANT = np.geomspace(0.1, 100, 241)
TUNED_RATES = np.geomspace(0.01, 10, 25)
TUNED_LIMITS = np.geomspace(0.1, 100, 25)
TUNED_MAX_STEPS = 2000  # a pair that needs more from some distance is not the best
KINDS = {
    "constant": "best constant step, searched for each start",
    "theorem 3": "clip with the constants of theorem 3",
    "tuned": "clip, one searched pair for all starts",
}
COLORS = dict(zip(KINDS, np.take(curves.COLORS, [3, 0, 2]), strict=True))
ROW = "{:>8} | {:>8} | {:>9} | {:>9} | {:>5} | {}"


class Result(NamedTuple):
    """What the study found.

    Attributes:
        table: Arrays `[distances]`: the `distance`, its `M`, the best constant `rate`,
            whether that did not arrive (`capped`), and the steps of each of `KINDS`.
        pair: The step size and the limit that were searched for all starts.
        norms: Of the gradient in the run of each of `KINDS` from the last distance.
    """

    table: dict[str, np.ndarray]
    pair: tuple[float, float]
    norms: list[jax.Array]


def objective(point: jax.Array) -> jax.Array:
    """Returns f at a point `[2]`."""
    return jnp.sum(jnp.cosh(point))


def largest_gradient(distance: Any) -> float:
    """Returns M, the norm where y is 0 and x as large as f(distance, 1) allows."""
    cosh_x = np.cosh(distance) + np.cosh(START_Y) - 1
    return np.sqrt(cosh_x**2 - 1)


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
    winner = jnp.nanargmin(norms)  # a candidate at NaN has diverged
    return steps, winner, norms[winner] <= tolerance


def count_steps(
    distance: Any, setting: tuple[float, float], tolerance: float, max_steps: int
) -> int:
    """Returns the steps of one run, whose setting is its step size and its limit."""
    rate, limit = setting
    steps, _, _ = race(
        distance, np.array([rate]), np.array([limit]), tolerance, max_steps
    )
    return int(steps)


def norms_along(distance: float, setting: Any, steps: int) -> jax.Array:
    """Returns the norms of the gradient in one run, `[steps + 1]`."""
    start = jnp.array([distance, START_Y])
    _, norms = jax.lax.scan(lambda x, _: step(x, *setting), start, length=steps + 1)
    return norms


def find_pair(distances: np.ndarray, tolerance: float) -> tuple[float, float]:
    """Returns the step size and limit with the fewest steps from all distances."""

    def count(distance, rate, limit):
        steps, _, arrived = race(
            distance, rate[None], limit[None], tolerance, TUNED_MAX_STEPS
        )
        return jnp.where(arrived, steps, jnp.inf)

    grids = np.meshgrid(distances, TUNED_RATES, TUNED_LIMITS, indexing="ij")
    counts = jax.jit(jnp.vectorize(count))(*grids).sum(axis=0)
    best_rate, best_limit = np.unravel_index(counts.argmin(), counts.shape)
    return inside(TUNED_RATES, best_rate), inside(TUNED_LIMITS, best_limit)


def inside(grid: np.ndarray, best: Any) -> float:
    """Returns the best of a grid; RuntimeError if it is at the edge."""
    if not 0 < best < len(grid) - 1:
        raise RuntimeError(f"{grid[best]:g}, the best, is at the edge of what is tried")
    return float(grid[best])


def measure(
    distance: Any, pair: tuple[float, float], tolerance: float, max_steps: int
) -> dict[str, Any]:
    """Returns a row of the table: what there is to know of one distance."""
    m = largest_gradient(distance)
    rates = CONSTANT / m
    no_limits = np.full(len(rates), np.inf)
    steps, best, arrived = race(distance, rates, no_limits, tolerance, max_steps)
    return {
        "distance": distance,
        "M": m,
        # If none arrived, then the best is only the one that came closest.
        "rate": inside(rates, best) if arrived else float(rates[best]),
        "capped": not arrived,
        "constant": int(steps),
        "theorem 3": count_steps(distance, THEOREM, tolerance, max_steps),
        "tuned": count_steps(distance, pair, tolerance, max_steps),
    }


def run(*, largest: int, tolerance: float, max_steps: int) -> Result:
    """Counts the steps of each of `KINDS`, from each distance."""
    distances = np.arange(2, largest + 1)
    pair = find_pair(distances, tolerance)
    bar = tqdm(distances, unit="distance", mininterval=1)
    rows = [measure(distance, pair, tolerance, max_steps) for distance in bar]
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}

    last = rows[-1]
    settings = {
        "constant": (last["rate"], np.inf),
        "theorem 3": THEOREM,
        "tuned": pair,
    }
    norms = [norms_along(largest, settings[kind], last[kind]) for kind in KINDS]
    return Result(table, pair, norms)


def report(result: Result) -> None:
    """Prints the searched pair, a row for each distance, and the first and last ratio.

    A ratio is the number of steps without a clip over that with one.
    """
    rate, limit = result.pair
    print(f"tuned: step size {rate:.3g}, limit {limit:.3g}")
    print(ROW.format("distance", "M", *KINDS, "ratios"))
    ratios_of_theorem = []
    for values in zip(*result.table.values(), strict=True):
        row = dict(zip(result.table, values, strict=True))
        # A constant step that did not arrive needs more steps than were counted.
        sign = ">=" if row["capped"] else ""
        of_theorem = f"{sign}{row['constant'] / row['theorem 3']:.3g}"
        of_tuned = f"{sign}{row['constant'] / row['tuned']:.3g}"
        cells = (
            row["distance"],
            f"{row['M']:.3g}",
            f"{sign}{row['constant']}",
            row["theorem 3"],
            row["tuned"],
            f"{of_theorem}, {of_tuned}",
        )
        print(ROW.format(*cells))
        ratios_of_theorem.append(f"{of_theorem} at M = {row['M']:.3g}")
    print(
        "steps without / with theorem 3's clip: "
        f"from {ratios_of_theorem[0]} to {ratios_of_theorem[-1]}"
    )


def draw(path: Path, result: Result) -> None:
    """Draws the steps and their ratios over M, and the norms of the longest runs."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplot_mosaic([["steps", "ratios", "norms"]])
    m = result.table["M"]
    constant = result.table["constant"]
    capped = result.table["capped"]
    for kind, norms in zip(KINDS, result.norms, strict=True):
        counts = result.table[kind]
        line = {"color": COLORS[kind], "marker": "o", "markersize": 4}
        axes["steps"].plot(m, counts, label=KINDS[kind], **line)
        axes["ratios"].plot(m, constant / counts, **line)
        axes["norms"].plot(np.arange(1, 1 + len(norms)), norms, color=COLORS[kind])

    # What theorem 4 says of the slope, through the last distance that was counted.
    slope = m / (np.log(m) + 1)
    last = np.flatnonzero(~capped)[-1]
    for panel, values in (
        ("steps", constant),
        ("ratios", constant / result.table["theorem 3"]),
    ):
        line = slope * values[last] / slope[last]
        axes[panel].plot(m, line, "k--", linewidth=1, label="slope M / (log M + 1)")
    if capped.any():
        axes["steps"].plot(m[capped], constant[capped], "k^", label="at least so many")

    distance = result.table["distance"][-1]
    for panel, title, unit in (
        ("steps", "steps until the gradient is small", "M"),
        ("ratios", "steps of the best constant step / steps", "M"),
        ("norms", f"norm of the gradient, from distance {distance}", "step"),
    ):
        axes[panel].set_title(title, loc="left", fontsize="medium")
        axes[panel].set(xscale="log", yscale="log", xlabel=unit)
        axes[panel].grid(alpha=0.3)
        axes[panel].spines[["top", "right"]].set_visible(False)
    handles, labels = axes["steps"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
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
    for name, value, low, high in (
        ("largest", largest, 3, 15),
        ("tolerance", tolerance, 1e-6, 0.1),
        ("max_steps", max_steps, 500, 10**9),
    ):
        if not low <= value <= high:
            raise cli.InputError(f"{name} must be from {low} to {high}, got {value}")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    logdir = logdir or Path("runs", "faster_with_clipping", stamp)
    result = run(largest=largest, tolerance=tolerance, max_steps=max_steps)
    report(result)
    picture = logdir / "faster_with_clipping.png"
    draw(picture, result)
    print(f"the picture is {picture.resolve()}")
    return result.table | {"pair": result.pair, "picture": picture}


if __name__ == "__main__":
    cli.run(main)
