"""How often `stabilize` takes back a healthy run that has nothing more to learn.

    python tests/benchmarks/plateau.py

A linear regression with noisy targets is fitted within some hundred steps. From then on
its loss is noise, and the parameters move around their best values, so that the loss
falls on the way back to earlier ones whether or not the steps are at fault. And many
short runs begin there, as a model that is only tuned further: the first losses, of
which a limit is learned, may be low by chance.
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
BEST = np.linspace(-1, 1, SIZE, dtype=np.float32)[:, None]
# Where a run starts: its steps and seeds.
STARTS = {"drawn at random": (10_000, 8), "the best ones": (300, 512)}


def regression(start: str, batch: int) -> Task:
    """The task, with batches of a size."""

    def init(key):
        if start == "the best ones":
            return {"w0": jnp.asarray(BEST), "b0": jnp.zeros(1)}
        return dense_init(key, SIZE, 1)

    def draw(key, step):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (batch, SIZE))
        noise = jax.random.normal(keys[1], (batch, 1))
        return x, x @ BEST + NOISE * noise

    return supervised(init, dense, draw, squared_error)


def main() -> None:
    """Prints the rollbacks of each start, optimizer and size of the batches."""
    jax.config.update("jax_disable_most_optimizations", True)
    device, today = jax.devices()[0].platform, datetime.date.today()
    print(f"JAX {jax.__version__} on {device}, {os.cpu_count()} cores, {today}.")
    for start, (num_steps, seeds) in STARTS.items():
        print(f"Parameters {start}, {seeds} runs of {num_steps} steps each:")
        for name, (optimizer, rate) in OPTIMIZERS.items():
            for batch in (4, 32):
                task = regression(start, batch)
                run = Run(HEALTHY, task, optimizer, rate, steps=num_steps)
                found = train(run, optaxclip.stabilize, seeds)
                (state,) = find_skips(found.state)
                counts = state.explosions.counts
                print(
                    f"{name}, batches of {batch}: {np.sum(counts.skipped)} steps are "
                    f"skipped, and {np.sum(counts.rollbacks)} confirm a rollback.",
                    flush=True,
                )


if __name__ == "__main__":
    main()
