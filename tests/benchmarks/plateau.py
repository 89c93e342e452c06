"""How often `stabilize` takes back a healthy run that has nothing more to learn.

    python tests/benchmarks/plateau.py

A linear regression with noisy targets is fitted within some hundred steps. From then on
its loss is noise, and the parameters move around their best values, so that the loss
falls on the way back to earlier ones whether or not the steps are at fault.
"""

import datetime
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optaxclip

OPTIMIZERS = {
    "SGD": optax.sgd(0.05),
    "SGD with momentum": optax.sgd(0.01, momentum=0.9),
    "Adam": optax.adam(0.03),
    "Adam, small steps": optax.adam(1e-3),
}
SIZE, NOISE = 20, 3.0
NUM_STEPS, SEEDS = 10_000, 8


def loss_of(params, key, batch: int) -> jax.Array:
    """The mean squared error of a new batch."""
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (batch, SIZE))
    y = x @ jnp.linspace(-1, 1, SIZE) + NOISE * jax.random.normal(keys[1], (batch,))
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


def train(optimizer: Any, batch: int, key: jax.Array) -> Any:
    """The state of `stabilize` in the end."""
    tx = optaxclip.stabilize(optimizer)
    params = {"w": jax.random.normal(key, (SIZE,)), "b": jnp.zeros([])}

    def step_once(carry, step):
        params, state = carry
        key_of_step = jax.random.fold_in(key, step)
        value, grads = jax.value_and_grad(loss_of)(params, key_of_step, batch)
        updates, state = tx.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), ()

    carry = params, tx.init(params)
    (_, last), _ = jax.lax.scan(step_once, carry, jnp.arange(NUM_STEPS))
    state: Any = last
    return state["explosions"].explosions


def main() -> None:
    """Prints the rollbacks of each optimizer and size of the batches."""
    jax.config.update("jax_disable_most_optimizations", True)
    device, today = jax.devices()[0].platform, datetime.date.today()
    print(f"JAX {jax.__version__} on {device}, {os.cpu_count()} cores, {today}.")
    keys = jax.random.split(jax.random.key(1), SEEDS)
    for name, optimizer in OPTIMIZERS.items():
        for batch in (4, 32):
            run = functools.partial(train, optimizer, batch)
            counts = jax.jit(jax.vmap(run))(keys).counts
            print(
                f"{name}, batches of {batch}: {counts.rollbacks.sum()} rollbacks and "
                f"{counts.skipped.sum()} skipped steps in {SEEDS} runs of "
                f"{NUM_STEPS} steps.",
                flush=True,
            )


if __name__ == "__main__":
    main()
