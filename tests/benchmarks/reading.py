"""`metrics` in every step takes at most 2 % of the time of an LSTM's training step.

    python tests/benchmarks/reading.py

The model of `examples/lstm_mnist.py` trains under `stabilize`, in a `jax.lax.scan` that
returns the metrics of every step and in one that does not, in turns.
"""

import datetime
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import optaxclip
from lstm_step import IMAGES, LABELS, lstm_mnist, measure


def trainer(num_steps: int, *, reads: bool) -> Callable[[], None]:
    """A function that trains for `num_steps`, with the metrics of each or without."""
    config = lstm_mnist.resolve("default", len(IMAGES))
    model = lstm_mnist.LSTM(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    tx = optaxclip.stabilize(optax.adam(config.learning_rate))
    images, labels = jnp.asarray(IMAGES), jnp.asarray(LABELS)
    shape = num_steps, config.batch_size
    batches = np.random.default_rng(2).integers(0, len(IMAGES), shape)

    def loss_fn(params, batch):
        logits = nnx.merge(graphdef, params)(images[batch])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels
        return losses(logits, labels[batch]).mean()

    def step(carry, batch):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        params = optax.apply_updates(params, updates)
        found = optaxclip.metrics(opt_state, params) if reads else {}
        return (params, opt_state), (loss, found)

    @jax.jit
    def train(carry):
        return jax.lax.scan(step, carry, jnp.asarray(batches))

    carry: Any = params, tx.init(params)

    def run() -> None:
        nonlocal carry
        carry, measures = train(carry)
        jax.block_until_ready((carry, measures))

    return run


def interval(ratios: np.ndarray) -> str:
    """The median, and an interval of 95 % over draws of rounds."""
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return f"{np.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def main(*, repetitions: int = 100, steps: int = 20) -> None:
    """Prints what reading the metrics adds to the step.

    Args:
        repetitions: Rounds that time every arm once.
        steps: Training steps in each time.
    """
    arms = {
        name: trainer(steps, reads=name == "metrics")
        for name in ("nothing", "metrics", "nothing again")
    }
    times = measure(arms, repetitions)
    alone = times["nothing"]
    milliseconds = np.median(alone) / steps * 1e3
    device, today = jax.devices()[0].platform, datetime.date.today()
    print(f"JAX {jax.__version__} on {device}, {os.cpu_count()} cores, {today}.")
    print(f"Medians of {repetitions} rounds of {steps} steps; intervals of 95 %.")
    print(f"A step takes {milliseconds:.3g} ms without metrics.")
    print(f"With them it takes {interval(times['metrics'] / alone)} times as long.")
    print(f"Without again: {interval(times['nothing again'] / alone)} times (A/A).")


if __name__ == "__main__":
    tyro.cli(main)
