"""Of 300 leaves, who led the explosion? What TensorBoard's pages say in one look.

    python tests/benchmarks/tensorboard_page.py [--logdir DIR]
    tensorboard --logdir DIR

A run of 300 steps, of which the last explode: the gradient of one kernel of 300 leaves
grows by 1.6 a step. All of `metrics` goes to the scalars, which have no names for so
many leaves; what `explain` says to the texts, and what `plot` draws to the images.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from jax import lax
from tensorboardX import SummaryWriter

import optaxclip

NUM_STEPS = 300
BEGINS, GROWTH = 285, 1.6
LEADING = "block_087/kernel"


def initial_params() -> Any:
    keys = jax.random.split(jax.random.key(0), 150)
    return {
        f"block_{i:03}": {"bias": jnp.ones(8), "kernel": jax.random.normal(key, (8, 8))}
        for i, key in enumerate(keys)
    }


@jax.jit
def run(params):
    """The parameters and the state at the end, and the metrics of each step."""
    tx = optaxclip.stabilize(optax.adam(1e-3))

    def step(carry, x):
        params, opt_state = carry
        key, factor = x
        block, leaf = LEADING.split("/")
        noise = 1 + 0.1 * jax.random.normal(key)
        grads = jax.tree.map(lambda p: noise * p, params)
        grads[block][leaf] *= factor
        loss = 1 + 0.01 * noise
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), optaxclip.metrics(opt_state, params)

    keys = jax.random.split(jax.random.key(1), NUM_STEPS)
    factors = GROWTH ** jnp.maximum(jnp.arange(NUM_STEPS) - BEGINS + 1, 0)
    return lax.scan(step, (params, tx.init(params)), (keys, factors))


def main(logdir: Path = Path("runs/tensorboard_page")) -> str | None:
    """Writes the page, and says which leaf it names.

    Args:
      logdir: Where the events go.
    """
    (params, opt_state), found = jax.device_get(run(initial_params()))
    last = NUM_STEPS - 1
    with SummaryWriter(str(logdir)) as writer:
        for name, values in found.items():
            for step, value in enumerate(values):
                writer.add_scalar(name, value, step)
        writer.add_text("explain", optaxclip.explain(opt_state, params), last)
        writer.add_figure(
            "run", optaxclip.plot(optaxclip.history(opt_state, params)), last
        )
    leaf = optaxclip.leading_leaf(opt_state, params)
    print(f"Of {len(optaxclip.leaf_names(params))} leaves {leaf!r} led the explosion.")
    print(f"{len(found)} scalars a step: tensorboard --logdir {logdir}")
    return leaf


if __name__ == "__main__":
    tyro.cli(main)
