"""How often `stabilize` takes back a healthy run that has nothing more to learn.

    python tests/benchmarks/plateau.py

A linear regression with noisy targets is fitted within some hundred steps. From then on
its loss is noise, and the parameters move around their best values, so that the loss
falls on the way back to earlier ones whether or not the steps are at fault.
"""

import datetime
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from tasks.running import HEALTHY, Run, find_skips, train
from tasks.task import Task, dense, dense_init, squared_error, supervised

OPTIMIZERS = {
    "SGD": (optax.sgd, 0.05),
    "SGD with momentum": (functools.partial(optax.sgd, momentum=0.9), 0.01),
    "Adam": (optax.adam, 0.03),
    "Adam, small steps": (optax.adam, 1e-3),
}
SIZE, NOISE = 20, 3.0
NUM_STEPS, SEEDS = 10_000, 8


def regression(batch: int) -> Task:
    """The task, with batches of a size."""

    def draw(key, step):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (batch, SIZE))
        y = x @ jnp.linspace(-1, 1, SIZE)[:, None]
        return x, y + NOISE * jax.random.normal(keys[1], y.shape)

    return supervised(lambda key: dense_init(key, SIZE, 1), dense, draw, squared_error)


def main() -> None:
    """Prints the rollbacks of each optimizer and size of the batches."""
    jax.config.update("jax_disable_most_optimizations", True)
    device, today = jax.devices()[0].platform, datetime.date.today()
    print(f"JAX {jax.__version__} on {device}, {os.cpu_count()} cores, {today}.")
    for name, (optimizer, rate) in OPTIMIZERS.items():
        for batch in (4, 32):
            run = Run(HEALTHY, regression(batch), optimizer, rate, steps=NUM_STEPS)
            found = train(run, optaxclip.stabilize, SEEDS)
            (state,) = find_skips(found.state)
            counts = state.explosions.counts
            print(
                f"{name}, batches of {batch}: of {SEEDS} x {NUM_STEPS} steps "
                f"{np.sum(counts.skipped)} are skipped, and "
                f"{np.sum(counts.rollbacks)} confirm a rollback.",
                flush=True,
            )


if __name__ == "__main__":
    main()
