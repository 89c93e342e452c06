"""What does back-propagation through time multiply, and which run will explode?

python examples/studies/bptt.py                              # no download

Networks recall the first number of a sequence. The largest Lyapunov exponent, that of
tangents going forwards, predicts the growth of the gradients dC/da_t going backwards.
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

RADII = 0.5, 0.75, 1.0, 1.25, 1.5  # spectral, of the recurrent matrix
RATE, EVERY, SHAPE = 0.01, 25, (4, 25, 16, 64)  # rounds, steps, batch, length
TIMES, GAPS, STEPS = np.arange(2, 65), 2 ** np.arange(1, 7) - 1, np.arange(4) * EVERY
ROW = "{:4} | {:6} | {:22} | {:22} | {:8} | {:8} | {}"
HEAD = "predicted growth", "measured growth", "foretold", "exploded", "clipped"


def rnn(activation: Any, params: Any, state: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the next state of a simple recurrent network."""
    return activation(params["W"] @ state + params["U"] * x + params["b"])


def lstm(params: Any, state: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the next state: the outputs h, then the memory c."""
    h, c = jnp.split(state, 2)
    *gates, new = jnp.split(rnn(jnp.asarray, params, h, x), 4)
    i, f, o = map(jax.nn.sigmoid, gates)
    c = f * c + i * jnp.tanh(new)
    return jnp.concatenate([o * jnp.tanh(c), c])


CELLS = dict(tanh=partial(rnn, jnp.tanh), ReLU=partial(rnn, jax.nn.relu), LSTM=lstm)


def initialise(name: str, hidden: int, seeds: int) -> Any:
    """Returns Gaussian weights `[radii, seeds, ...]`, the same for each radius."""
    gates, size = (4, 2 * hidden) if name == "LSTM" else (1, hidden)
    rng, many = np.random.default_rng(0), (len(RADII), 1, 1)
    weights = rng.normal(size=(seeds, gates, hidden, hidden))
    weights /= np.abs(np.linalg.eigvals(weights)).max(-1)[..., None, None]
    weights = np.multiply.outer(RADII, weights.reshape(seeds, gates * hidden, hidden))
    params = {"W": weights, "U": np.tile(rng.normal(size=weights.shape[1:3]), many)}
    params["V"] = np.tile(rng.normal(size=(seeds, size)) / np.sqrt(size), many)
    forget = np.repeat(np.eye(4)[1, :gates], hidden)  # the usual bias of an LSTM
    params["b"] = np.tile(forget, (len(RADII), seeds, 1))
    return jax.tree.map(np.float32, params)


def unroll(cell: Any, params: Any, xs: Any, copies: Any, nudges: Any) -> jax.Array:
    """Returns the states a_1 to a_T; step t takes its copies and adds its nudge."""

    def step(state, place):
        x, copy, nudge = place
        return (cell(params | copy, state, x) + nudge,) * 2

    return jax.lax.scan(step, jnp.zeros(params["V"].size), (xs, copies, nudges))[1]


def loss_fn(params: Any, cell: Any, xs: Any, copies: Any, nudges: Any) -> jax.Array:
    """Returns C, the mean squared error of sequences `[batch, length]`."""
    states = jax.vmap(partial(unroll, cell, params), (0, None, 0))(xs, copies, nudges)
    return jnp.mean((states[:, -1] @ params["V"] - xs[:, 0]) ** 2)


def measure(cell: Any, params: Any, xs: Any, gaps: Any, powers: int = 15) -> Any:
    """Returns what a batch tells of one network, without any Jacobian.

    `predicted`, exp of the Lyapunov exponent, is the growth per step of tangents in the
    middle half; `measured` that of dC/da_t going backwards. The others are norms: of
    dC/da_t, of what step t adds to dC/dW, and of da_T/da_{T-gap}.
    """
    length, norm = xs.shape[1], optaxclip.global_norm
    nudges = jnp.zeros([*xs.shape, params["V"].size])
    zero, start = nudges[0, 0], jax.random.normal(jax.random.key(0), params["V"].shape)
    copies = {"W": jnp.broadcast_to(params["W"], (length, *params["W"].shape))}
    added, grads = jax.grad(loss_fn, (3, 4))(params, cell, xs, copies, nudges)

    def nudged(place, x, nudge):
        return unroll(cell, params, x, {}, nudges[0].at[place].set(nudge))

    def growth(vectors):
        logs = jnp.log(jax.vmap(jax.vmap(norm))(vectors)).mean(axis=0)
        times = jnp.arange(1.0 * length)[length // 4 : -(length // 4)]
        return jnp.exp(jnp.polyfit(times, logs[times.astype(int)], 1)[0]), jnp.exp(logs)

    def power(vector, gap):
        run = partial(nudged, length - 1 - gap, xs[0])
        image = jax.jvp(run, (zero,), (vector / norm(vector),))[1][-1]
        return jax.vjp(run, zero)[1](nudges[0].at[-1].set(image / norm(image)))[0]

    tangents = jax.vmap(lambda x: jax.jvp(partial(nudged, 0, x), (zero,), (start,))[1])
    vectors, many = jnp.broadcast_to(start, (len(gaps), start.size)), jax.vmap(power)
    vectors = jax.lax.fori_loop(0, powers, lambda _, v: many(v, gaps), vectors)
    found = {"predicted": growth(tangents(xs))[0], "added": jax.vmap(norm)(added)}
    found |= {"measured": 1 / growth(grads)[0], "states": growth(grads)[1]}
    return found | {"spectral": jax.vmap(norm)(vectors)}


def train(cell: Any, max_norm: float, batches: Any, params: Any) -> Any:
    """Returns losses, and what the first batch tells before each round of training."""
    tx = optax.chain(optaxclip.clip_by_norm(max_norm), optax.sgd(RATE))

    def step(carry, xs):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, cell, xs, {}, 0 * xs)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def one_round(carry, part):
        found = measure(cell, carry[0], batches[0, 0], GAPS)
        carry, losses = jax.lax.scan(step, carry, part)
        return carry, found | {"losses": losses}

    return jax.lax.scan(one_round, (params, tx.init(params)), batches)[1]


def draw(path: Path, result: dict[str, Any]) -> None:
    """Draws the first network of each radius at first and at last, and all growths."""
    figure = Figure(figsize=(11, 12), layout="constrained")
    axes = figure.subplots(4, len(CELLS), squeeze=False, sharex="row", sharey="row")
    panels: list[Any] = [("states", "norm of dC/da_t", "t", TIMES)]
    panels.append(("added", "norm of step t in dC/dW", "t", TIMES))
    panels.append(("spectral", "spectral norm of da_T/da_k", "T - k", GAPS))
    panels.append(("predicted", "growth per step (x: seen)", "training step", STEPS))
    for (row, column), axis in np.ndenumerate(axes):
        key, title, label, xs = panels[row]
        axis.set(title=f"{list(CELLS)[column]}: {title}", xlabel=label, yscale="log")
        for i, color in enumerate(curves.COLORS[: len(RADII)]):
            values = result[key][column, i]
            if key == "predicted":
                axis.plot(xs, values.T, color=color)
                axis.plot(xs, result["measured"][column, i].T, "x", color=color)
            else:
                first, last = values[0, [0, -1], -len(xs) :]
                axis.plot(xs, first, color=color, label=f"radius {RADII[i]}")
                axis.plot(xs, last, ":", color=color)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
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
    draws, runs = np.random.default_rng(0).uniform(-1, 1, SHAPE), []
    for name in tqdm(CELLS, unit="network"):
        params, found = initialise(name, hidden, seeds), {}
        for clip, max_norm in (("none", np.inf), ("clip", 1.0)):
            run = partial(train, CELLS[name], max_norm, np.float32(draws))
            found |= jax.device_get(jax.jit(jax.vmap(jax.vmap(run)))(params))
            found[clip] = ~np.isfinite(found["losses"]).all(axis=(-1, -2))
        runs.append(found | {"foretold": found["predicted"][..., 0] > 1})
    result = {key: np.stack([run[key] for run in runs]) for key in runs[0]}
    print(ROW.format("net", "radius", *HEAD))
    for at in np.ndindex(len(CELLS), len(RADII)):
        both = (result[key][at][:, 0] for key in ("predicted", "measured"))
        cells = [f"{np.median(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in both]
        counts = (result[key][at].sum() for key in ("foretold", "none", "clip"))
        print(ROW.format(list(CELLS)[at[0]], RADII[at[1]], *cells, *counts))
    off = np.abs(result["measured"] / result["predicted"] - 1)
    told, none, clip = (result[key] for key in ("foretold", "none", "clip"))
    first, ever = off[..., 0].max(), off.max()
    print(f"growth as predicted within {first:.1%} at first, {ever:.1%} ever;", end=" ")
    print(f"foretold: {(told & none).sum()} of {none.sum()} explosions,", end=" ")
    print(f"{(told > none).sum()} others; clipped {clip.sum()} of {none.size} explode")
    draw(picture := logdir / "bptt.png", result)
    print(f"the picture is {picture.resolve()}")
    return result | {"picture": picture}


if __name__ == "__main__":
    cli.run(main)
