"""What does clipping do at a cliff of the loss?

python examples/studies/cliff.py                             # no download

The recurrent unit with two parameters of Pascanu, Mikolov and Bengio (2013, arXiv:
1211.5063, section 2.3 and figure 6): x_t = w sigmoid(x_{t-1}) + b from x_0 = 0.5, with
the loss (sigmoid(x_50) - 0.7)^2. Gradient descent walks on it with and without a clip.
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

# The corners (w, b) of the part of the surface that has the cliff and all starts.
LOW = (4.0, -3.5)
HIGH = (6.0, -1.5)
UNROLLED = 50  # steps of the recurrent unit, as in the paper
TARGET = 0.7  # for the sigmoid of its last state, as in the paper
NUM_DRAWN = 80  # steps of each path that are drawn
# The starts of the grid also have learning rates around the one that was asked for.
FACTORS = np.array([0.1, 0.3, 1, 3, 10])
MIDDLE = 2  # the index of the factor 1
LOSSES = (1e-6, 0.5)  # the range of colors for final losses; no loss exceeds 0.49
STYLES = {
    "none": {"color": curves.COLORS[3], "linestyle": "-", "label": "without a clip"},
    "norm": {"color": "#000000", "linestyle": "--", "label": "clipped by norm"},
}
ROW = "{:5} | {:12} | {:16} | {:16} | {:10} | {}"


def loss_fn(params: jax.Array) -> jax.Array:
    """Returns the loss at `[w, b]`."""
    w, b = params
    x = jnp.float32(0.5)
    x, _ = jax.lax.scan(
        lambda x, _: (w * jax.nn.sigmoid(x) + b, None), x, length=UNROLLED
    )
    return (jax.nn.sigmoid(x) - TARGET) ** 2


def descend(start: jax.Array, rate: Any, max_norm: float, steps: int) -> Any:
    """Returns the points `[steps + 1, 2]`, their losses and the norms there."""
    tx = optax.chain(optaxclip.clip_by_norm(max_norm), optax.sgd(rate))

    def step(carry, _):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        measures = params, loss, optaxclip.global_norm(grads)
        return (optax.apply_updates(params, updates), opt_state), measures

    return jax.lax.scan(step, (start, tx.init(start)), length=steps + 1)[1]


def grid(num: int) -> np.ndarray:
    """Returns the places `[num, num, 2]`: w grows in each row, b from row to row."""
    ws = np.linspace(LOW[0], HIGH[0], num)
    bs = np.linspace(LOW[1], HIGH[1], num)
    return np.stack(np.meshgrid(ws, bs), axis=-1).astype(np.float32)


def inside(points: np.ndarray) -> np.ndarray:
    """Returns the path of `[steps, 3]`, cut at the edge where it leaves the surface."""
    stays = ((points[:, :2] >= LOW) & (points[:, :2] <= HIGH)).all(axis=1)
    if stays.all():
        return points
    first_outside = int(np.argmin(stays))
    last = points[first_outside - 1]
    leap = points[first_outside] - last
    # How much of the leap stays inside, along w and along b; all where it is zero.
    room = np.where(leap[:2] > 0, HIGH, LOW) - last[:2]
    shares = np.divide(room, leap[:2], out=np.ones(2), where=leap[:2] != 0)
    edge = last + min(1, *shares) * leap
    return np.vstack([points[:first_outside], edge])


def run(
    *,
    w: float,
    b: float,
    learning_rate: float,
    max_norm: float,
    steps: int,
    starts: int,
    good: float,
) -> dict[str, dict[str, Any]]:
    """Descends from (w, b), and from a grid of starts, with and without a clip.

    Returns:
        For "none" and "norm", of the path from (w, b): all `points` and `losses`, the
        largest `norm`, the point `at` which it is, and the one where that step `lands`.
        Of the grid: the final losses `ends`, `[rates, starts, starts]`, and for each
        rate the share of them that is `good`.
    """
    start = jnp.array([w, b], jnp.float32)
    result: dict[str, dict[str, Any]] = {}
    for name, limit in (("none", math.inf), ("norm", max_norm)):
        walk = jax.jit(partial(descend, max_norm=limit, steps=steps))
        points, losses, norms = jax.device_get(walk(start, learning_rate))
        worst = int(np.argmax(norms[:-1]))

        last_loss = jax.jit(lambda start, rate, walk=walk: walk(start, rate)[1][-1])
        last_losses = jax.vmap(jax.vmap(last_loss, (0, None)), (0, None))
        rates = learning_rate * FACTORS
        bar = tqdm(rates, desc=f"starts, {name}", unit="rate", leave=False)
        ends = np.array([last_losses(grid(starts), rate) for rate in bar])

        result[name] = {
            "norm": norms[worst],
            "at": points[worst],
            "lands": points[worst + 1],
            "ends": ends,
            "good": np.mean(ends < good, axis=(1, 2)),
            "points": points,
            "losses": losses,
        }
    return result


def report(result: dict[str, Any], *, learning_rate: float, good: float) -> None:
    """Prints the largest step of each path, and how many starts end well."""
    print(ROW.format("clip", "largest norm", "at w, b", "lands at w, b", "loss", "far"))
    for name, found in result.items():
        far = np.linalg.norm(found["lands"] - found["at"])
        cells = (
            f"{found['norm']:.3g}",
            "{:.4g}, {:.4g}".format(*found["at"]),
            "{:.4g}, {:.4g}".format(*found["lands"]),
            f"{found['losses'][-1]:.2g}",
            f"{far:.3g}",
        )
        print(ROW.format(name, *cells))

    none = result["none"]
    norm = result["norm"]
    num_starts = none["ends"][MIDDLE].size
    print(f"\nstarts of {num_starts} that end below a loss of {good}:")
    rates = learning_rate * FACTORS
    print(ROW.format("clip", *(f"rate {rate:.3g}" for rate in rates)))
    for name, found in result.items():
        print(ROW.format(name, *(f"{share:.1%}" for share in found["good"])))

    num_steps = len(none["losses"]) - 1
    print(
        f"after {num_steps} steps the loss is {none['losses'][-1]:.2g} without a clip, "
        f"{norm['losses'][-1]:.2g} with it; of the starts {none['good'][MIDDLE]:.1%} "
        f"and {norm['good'][MIDDLE]:.1%} end below {good}"
    )


def draw(path: Path, result: dict[str, Any]) -> None:
    """Draws the surface with both paths, and where the starts of a grid end."""
    figure = Figure(figsize=(12, 10), layout="constrained")
    # Matplotlib would hide a path, which lies on the surface, behind it.
    options: Any = {"surface": {"projection": "3d", "computed_zorder": False}}
    axes: Any = figure.subplot_mosaic(
        [["surface", "contour"], ["none", "norm"]],
        per_subplot_kw=options,
        height_ratios=[1.3, 1],
    )
    contours = draw_surface(axes["surface"], axes["contour"])
    figure.colorbar(contours, ax=axes["contour"], label="loss", ticks=np.arange(5) / 10)
    for axis in axes.values():
        axis.set(xlabel="w", ylabel="b", xlim=(LOW[0], HIGH[0]), ylim=(LOW[1], HIGH[1]))
    draw_paths(axes["surface"], axes["contour"], result)
    draw_ends(axes["none"], result, "none")
    image = draw_ends(axes["norm"], result, "norm")
    figure.colorbar(image, ax=[axes["none"], axes["norm"]], label="final loss")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def draw_surface(surface: Any, contour: Any) -> Any:
    """Draws the loss, in perspective and from above; returns the contours."""
    places = grid(400)
    w, b = np.moveaxis(places, -1, 0)
    losses = np.asarray(jax.jit(jax.vmap(jax.vmap(loss_fn)))(places))
    surface.plot_surface(w, b, losses, cmap="viridis", rcount=200, ccount=200)
    surface.view_init(elev=32, azim=75)
    surface.locator_params(nbins=5)
    surface.set_box_aspect((1, 1, 0.6), zoom=0.95)
    surface.set_zlabel("loss")
    return contour.contourf(w, b, losses, 40, cmap="viridis")


def draw_paths(surface: Any, contour: Any, result: dict[str, Any]) -> None:
    """Draws the first steps of both paths, and their start, into both panels."""
    paths = {}
    for name, style in STYLES.items():
        points = np.column_stack([result[name]["points"], result[name]["losses"]])
        paths[name] = inside(points[: NUM_DRAWN + 1])
        w, b, loss = paths[name].T
        surface.plot(w, b, loss, zorder=5, linewidth=1.6, **style)
        contour.plot(w, b, linewidth=1.6, **style)

    w, b = result["none"]["points"][0]
    loss = result["none"]["losses"][0]
    dot = {"marker": "o", "color": "white", "markeredgecolor": "black", "zorder": 6}
    surface.plot(w, b, loss, **dot)
    contour.plot(w, b, **dot)
    surface.set_title(f"the loss, and {NUM_DRAWN} steps of each", loc="left")
    surface.legend(loc="upper left", frameon=False)

    # From above, what is around the clipped path.
    low = paths["norm"].min(axis=0)
    high = paths["norm"].max(axis=0)
    contour.set_xlim(low[0] - 0.2, high[0] + 0.2)
    contour.set_ylim(low[1] - 0.1, high[1] + 0.3)
    lands = "({:.3g}, {:.3g})".format(*result["none"]["lands"])
    contour.set_title(
        f"the same from above; the longest step without a clip goes to {lands}",
        loc="left",
        fontsize=9,
    )


def draw_ends(axis: Any, result: dict[str, Any], name: str) -> Any:
    """Draws the final loss of each start, at the learning rate that was asked for."""
    ends = np.clip(result[name]["ends"][MIDDLE], *LOSSES)
    w, b = np.moveaxis(grid(len(ends)), -1, 0)
    image = axis.pcolormesh(w, b, ends)
    image.set(cmap="magma_r", norm="log", clim=LOSSES)
    axis.set_title(f"final loss of each start, {STYLES[name]['label']}", loc="left")
    return image


def main(
    *,
    w: float = 4.8,
    b: float = -2.8,
    learning_rate: float = 0.1,
    max_norm: float = 1.0,
    steps: int = 400,
    starts: int = 40,
    good: float = 0.01,
    logdir: Path | None = None,
) -> dict[str, Any]:
    """Descends from one start, and from a grid of them, with and without a clip.

    Args:
        w: Where the drawn run starts, between 4 and 6.
        b: The same for b, between -3.5 and -1.5.
        learning_rate: The learning rate of gradient descent.
        max_norm: The limit of the clip.
        steps: Steps of each run.
        starts: Starts along each axis of the grid.
        good: A run whose final loss is below this has succeeded.
        logdir: Where to write; by default a new directory in runs/cliff.
    """
    knobs: dict[str, Any] = {
        "learning_rate": learning_rate,
        "max_norm": max_norm,
        "steps": steps,
        "starts": starts,
        "good": good,
    }
    cli.check_positive(knobs)
    for name, value, low, high in zip("wb", (w, b), LOW, HIGH, strict=True):
        if not low <= value <= high:
            raise cli.InputError(
                f"{name} must be between {low} and {high}, got {value}"
            )
    logdir = logdir or Path("runs", "cliff", time.strftime("%Y%m%d-%H%M%S"))
    result = run(w=w, b=b, **knobs)
    report(result, learning_rate=learning_rate, good=good)
    picture = logdir / "cliff.png"
    draw(picture, result)
    print(f"the picture is {picture.resolve()}")
    return result | {"picture": picture}


if __name__ == "__main__":
    cli.run(main)
