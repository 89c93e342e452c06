"""What blew up inside a `jax.lax.scan` that nobody could look into?

python examples/scan_training.py                             # no download
python examples/scan_training.py --watch 50                  # a picture as it goes

The whole training is one `jax.lax.scan` under `jit`: no Python runs between the steps,
and nothing leaves the device before the last. A learning rate that rises too far makes
it explode. What optaxclip kept in the optimizer state comes back from inside the scan:
the norm of every leaf in each of the last 256 steps, and where the explosion began. The
same run under `optaxclip.stabilize` survives.
"""

import functools
import math
import time
from pathlib import Path
from typing import Any

import cli
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip

NUM_INPUTS = 4


def init(key: jax.Array, hidden: int, layers: int) -> dict[str, dict[str, jax.Array]]:
    """Makes the parameters of an MLP with one output, `{layer: {name: array}}`."""
    sizes = [NUM_INPUTS, *[hidden] * (layers - 1), 1]
    return {
        f"layer{i}": {
            "kernel": jax.random.normal(key, shape) * math.sqrt(2 / shape[0]),
            "bias": jnp.zeros(shape[1]),
        }
        for i, (key, *shape) in enumerate(
            zip(jax.random.split(key, layers), sizes[:-1], sizes[1:], strict=True)
        )
    }


def loss_fn(params: Any, x: jax.Array) -> jax.Array:
    """Returns the mean squared error against the sum of the sines of the inputs."""
    target = jnp.sum(jnp.sin(x), axis=1)
    *layers, head = params.values()
    for layer in layers:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean(((x @ head["kernel"] + head["bias"])[:, 0] - target) ** 2)


def train(tx: Any, carry: Any, keys: jax.Array, *, batch_size: int) -> Any:
    """Trains one step for each key, inside one scan, on data made there.

    Returns:
        carry: The parameters and the state of the optimizer, as they were given.
        losses: `[steps]`.
    """

    def step(carry, key):
        params, opt_state = carry
        x = jax.random.normal(key, (batch_size, NUM_INPUTS))
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return (optax.apply_updates(params, updates), opt_state), loss

    return jax.lax.scan(step, carry, keys)


def main(
    *,
    steps: int = 300,
    learning_rate: float = 0.25,
    hidden: int = 64,
    layers: int = 5,
    batch_size: int = 64,
    seed: int = 0,
    watch: int | None = None,
    logdir: Path | None = None,
) -> dict[str, Any]:
    """Trains an MLP twice, in one scan each, and says what happened in there.

    Watched, each is several scans, one after the other, with the same results.

    Args:
        steps: Training steps, of which the last 256 are kept.
        learning_rate: That of the last step of SGD; it rises linearly from 0.
        hidden: Units in each layer.
        layers: Layers.
        batch_size: Examples in each step.
        seed: Decides the parameters and the examples.
        watch: Steps between two drawings of the picture; by default the last alone.
        logdir: Where to write; by default a new directory in runs/scan_training.

    Returns:
        `{"plain": run, "stabilized": run}`; each run has its `losses`, its `history`,
        its `picture`, as `story` what `explain` says, the step on which its last
        explosion `began`, and the leading `leaf` then, both None for none.
    """
    knobs = {"steps": steps, "learning_rate": learning_rate, "hidden": hidden}
    knobs |= {"layers": layers, "batch_size": batch_size}
    every = steps if watch is None else watch
    cli.check_positive(knobs | {"watch": every})
    logdir = logdir or Path("runs", "scan_training", time.strftime("%Y%m%d-%H%M%S"))
    logdir.mkdir(parents=True, exist_ok=True)
    init_key, data_key = jax.random.split(jax.random.key(seed))
    params, keys = init(init_key, hidden, layers), jax.random.split(data_key, steps)
    sgd = optax.sgd(optax.linear_schedule(0.0, learning_rate, steps))
    runs = {
        "plain": optax.chain(optaxclip.detect_explosions(), sgd),
        "stabilized": optaxclip.stabilize(sgd),
    }
    result = {}
    for name, tx in runs.items():
        run = jax.jit(functools.partial(train, tx, batch_size=batch_size))
        carry, chunks, figure = (params, tx.init(params)), [], None
        picture = logdir / f"{name}.png"
        for start in range(0, steps, every):
            # Equally long chunks are one compiled program.
            carry, losses = run(carry, keys[start : start + every])
            chunks.append(losses)
            kept = optaxclip.history(carry[1], params)
            figure = optaxclip.plot(kept, picture, figure=figure)
            if start == 0:
                print(f"{name}: the picture is {picture.resolve()}")
        losses, opt_state = np.concatenate(chunks), carry[1]
        metrics = optaxclip.metrics(opt_state)
        began = int(metrics["explosions/began"])
        leaf = int(metrics["explosions/leading_leaf"])
        result[name] = found = {
            "losses": losses,
            "history": optaxclip.history(opt_state, params),
            "picture": picture,
            "story": optaxclip.explain(opt_state, params),
            "began": began if began >= 0 else None,
            "leaf": optaxclip.leaf_names(params)[leaf] if began >= 0 else None,
        }
        print(f"{name}: the loss went from {losses[0]:.3g} to {losses[-1]:.3g}")
        print(f"{found['story']}\n")
    return result


if __name__ == "__main__":
    cli.run(main)
