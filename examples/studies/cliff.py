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

LOW, HIGH = (4.0, -3.5), (6.0, -1.5)  # the part of the surface, (w, b), with the starts
STYLES = {
    "none": (curves.COLORS[3], "-", "without a clip"),
    "norm": ("#000000", "--", "clipped by norm"),
}
NUM_DRAWN = 80  # steps of each path
FACTORS = 0.1, 0.3, 1, 3, 10  # of the learning rate, for the starts of the grid
MIDDLE = FACTORS.index(1)
ROW = "{:5} | {:12} | {:16} | {:16} | {:10} | {}"


def loss_fn(params: jax.Array) -> jax.Array:
    """Returns the loss at `[w, b]`."""
    w, b = params
    x = jnp.float32(0.5)
    x, _ = jax.lax.scan(lambda x, _: (w * jax.nn.sigmoid(x) + b, None), x, length=50)
    return (jax.nn.sigmoid(x) - 0.7) ** 2


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
    axes = (np.linspace(*ends, num) for ends in zip(LOW, HIGH, strict=True))
    return np.stack(np.meshgrid(*axes), axis=-1).astype(np.float32)


def inside(points: np.ndarray) -> np.ndarray:
    """Returns the path of `[steps, 3]`, cut at the edge where it leaves the surface."""
    stays = ((points[:, :2] >= LOW) & (points[:, :2] <= HIGH)).all(axis=1)
    if stays.all():
        return points
    out = int(np.argmin(stays))
    last, leap = points[out - 1], points[out] - points[out - 1]
    room = np.where(leap[:2] > 0, HIGH, LOW) - last[:2]
    shares = np.divide(room, leap[:2], out=np.ones(2), where=leap[:2] != 0)
    return np.vstack([points[:out], last + min(1, *shares) * leap])


def draw(path: Path, result: dict[str, Any]) -> None:
    """Draws the surface with both paths, and where the starts of a grid end."""
    figure = Figure(figsize=(12, 10), layout="constrained")
    rows: Any = [["surface", "contour"], ["none", "norm"]]
    options: Any = {"surface": {"projection": "3d", "computed_zorder": False}}
    axes: Any = figure.subplot_mosaic(
        rows, per_subplot_kw=options, height_ratios=[1.3, 1]
    )
    places = grid(400)
    w, b = np.moveaxis(places, -1, 0)
    losses = np.asarray(jax.jit(jax.vmap(jax.vmap(loss_fn)))(places))
    axes["surface"].plot_surface(w, b, losses, cmap="viridis", rcount=200, ccount=200)
    contours = axes["contour"].contourf(w, b, losses, 40, cmap="viridis")
    figure.colorbar(contours, ax=axes["contour"], label="loss", ticks=np.arange(5) / 10)
    for axis in axes.values():
        axis.set(xlabel="w", ylabel="b", xlim=(LOW[0], HIGH[0]), ylim=(LOW[1], HIGH[1]))
    points, image = np.zeros([0, 3]), contours
    for name, (color, line, label) in STYLES.items():
        run = result[name]
        points = np.column_stack([run["points"], run["losses"]])[: NUM_DRAWN + 1]
        points = inside(points)
        style = {"color": color, "linestyle": line, "linewidth": 1.6, "label": label}
        axes["surface"].plot(*points.T, zorder=5, **style)
        axes["contour"].plot(*points.T[:2], **style)
        ends = np.clip(run["ends"][MIDDLE], 1e-6, 0.5)
        image = axes[name].pcolormesh(*np.moveaxis(grid(len(ends)), -1, 0), ends)
        image.set(cmap="magma_r", norm="log", clim=(1e-6, 0.5))
        axes[name].set_title(f"final loss of each start, {label}", loc="left")
    low, high = points.min(axis=0), points.max(axis=0)  # of the clipped path
    ends = (low[0] - 0.2, high[0] + 0.2), (low[1] - 0.1, high[1] + 0.3)
    axes["contour"].set(xlim=ends[0], ylim=ends[1])
    figure.colorbar(image, ax=[axes["none"], axes["norm"]], label="final loss")
    start, loss = result["none"]["points"][0], result["none"]["losses"][0]
    dot = {"marker": "o", "color": "white", "markeredgecolor": "black", "zorder": 6}
    axes["contour"].plot(*start, **dot)
    axes["surface"].plot(*start, loss, **dot)
    axes["surface"].view_init(elev=32, azim=75)
    axes["surface"].locator_params(nbins=5)
    axes["surface"].set_box_aspect((1, 1, 0.6), zoom=0.95)
    axes["surface"].set_zlabel("loss")
    axes["surface"].set_title(f"the loss, and {NUM_DRAWN} steps of each", loc="left")
    lands = "the longest step without a clip goes to ({:.3g}, {:.3g})"
    lands = lands.format(*result["none"]["lands"])
    axes["contour"].set_title(f"the same from above; {lands}", loc="left", fontsize=9)
    axes["surface"].legend(loc="upper left", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


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
    knobs = {"learning_rate": learning_rate, "max_norm": max_norm, "steps": steps}
    cli.check_positive(knobs | {"starts": starts, "good": good})
    for name, value, *ends in zip("wb", (w, b), LOW, HIGH, strict=True):
        if not ends[0] <= value <= ends[1]:
            raise cli.InputError(
                f"{name} must be between {ends[0]} and {ends[1]}, got {value}"
            )
    logdir = logdir or Path("runs", "cliff", time.strftime("%Y%m%d-%H%M%S"))
    start, rates = jnp.array([w, b], jnp.float32), learning_rate * np.array(FACTORS)
    print(ROW.format("clip", "largest norm", "at w, b", "lands at w, b", "loss", "far"))
    result: dict[str, Any] = {}
    for name, limit in (("none", math.inf), ("norm", max_norm)):
        run = jax.jit(partial(descend, max_norm=limit, steps=steps))
        last = jax.jit(lambda start, rate, run=run: run(start, rate)[1][-1])
        points, losses, norms = jax.device_get(run(start, learning_rate))
        worst = int(np.argmax(norms[:-1]))
        found = {"norm": norms[worst], "at": points[worst], "lands": points[worst + 1]}
        many = jax.vmap(jax.vmap(last, (0, None)), (0, None))
        bar = tqdm(rates, desc=f"starts, {name}", unit="rate", leave=False)
        found["ends"] = np.array([many(grid(starts), rate) for rate in bar])
        found["good"] = np.mean(found["ends"] < good, axis=(1, 2))
        result[name] = found | {"points": points, "losses": losses}
        at, lands = ("{:.4g}, {:.4g}".format(*found[key]) for key in ("at", "lands"))
        far = np.linalg.norm(points[worst + 1] - points[worst])
        cells = f"{found['norm']:.3g}", at, lands, f"{losses[-1]:.2g}", f"{far:.3g}"
        print(ROW.format(name, *cells))
    print(f"\nstarts of {starts * starts} that end below a loss of {good}:")
    print(ROW.format("clip", *(f"rate {rate:.3g}" for rate in rates)))
    for name, found in result.items():
        print(ROW.format(name, *(f"{share:.1%}" for share in found["good"])))
    none, norm = (found["losses"][-1] for found in result.values())
    print(
        f"after {steps} steps the loss is {none:.2g} without a clip, {norm:.2g} with "
        f"it; of the starts {result['none']['good'][MIDDLE]:.1%} and "
        f"{result['norm']['good'][MIDDLE]:.1%} end below {good}"
    )
    picture = logdir / "cliff.png"
    draw(picture, result)
    print(f"the picture is {picture.resolve()}")
    return result | {"picture": picture}


if __name__ == "__main__":
    cli.run(main)
