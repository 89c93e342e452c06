"""Which clip lets Muon train at a larger learning rate?

python examples/studies/muon.py                              # no download

A small transformer learns to continue Python's manual, from the help texts that Python
ships. Its matrices are trained by Muon, all else by Adam. Every clip gets the same
runs: the same parameters and texts for five seeds, at five learning rates.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import optaxclip
from optaxclip import limits

sys.path.insert(0, str(Path(__file__).parents[1]))
import cli
from python_manual import final_losses, load_texts, mean_loss, stack_models

NUM_BLOCKS = 2
NUM_HEADS = 4
WARMUP_STEPS = 20  # a tenth of the default run
ADAM_SHARE = 0.1  # Adam's learning rate, as a share of Muon's
ROW = "{:12} | {}"


class Result(NamedTuple):
    """What the study found.

    Attributes:
        losses: By the name of the clip, the final losses `[rates, seeds]`.
        rates: The learning rates of Muon.
        chance: A run that ends at this loss or above has diverged.
        seconds: How long all the training took.
    """

    losses: dict[str, np.ndarray]
    rates: tuple[float, ...]
    chance: float
    seconds: float


class Block(nnx.Module):
    """Attention and a network of two layers, each behind a norm."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norms = nnx.List(nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.rise = nnx.Linear(width, 4 * width, rngs=rngs)
        self.fall = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From `[batch, length, width]` to the same."""
        batch_size, length, width = x.shape
        heads = (batch_size, length, NUM_HEADS, width // NUM_HEADS)
        parts = jnp.split(self.qkv(self.norms[0](x)), 3, axis=-1)
        queries, keys, values = (part.reshape(heads) for part in parts)
        mixed = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
        x += self.out(mixed.reshape(x.shape))
        hidden = jax.nn.gelu(self.rise(self.norms[1](x)))
        return x + self.fall(hidden)


class Transformer(nnx.Module):
    """Says at every place of a text which character comes next."""

    def __init__(self, num_chars: int, width: int, length: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(num_chars, width, rngs=rngs)
        self.place = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List(Block(width, rngs=rngs) for _ in range(NUM_BLOCKS))
        self.head = nnx.Linear(width, num_chars, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Returns the logits `[batch, length, num_chars]` of int `[batch, length]`."""
        x = self.embed(text) + self.place(jnp.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def is_muons(name: str) -> bool:
    """Whether a leaf is trained by Muon: a matrix of a block."""
    return name.startswith("blocks") and name.endswith("kernel")


def labels_of(params: Any) -> Any:
    """The tree with "muon" or "adam" for each leaf."""
    names = optaxclip.leaf_names(params)
    labels = ["muon" if is_muons(name) else "adam" for name in names]
    return jax.tree.unflatten(jax.tree.structure(params), labels)


def adam(rate: Any) -> Any:
    """For all but the matrices, with a smaller learning rate."""
    return optax.adam(lambda count: ADAM_SHARE * rate(count))


def muon(rate: Any, rest: Any) -> Any:
    """Muon for the matrices, and another optimizer for all else."""
    # Of a kernel `[inputs, outputs]`, as Flax has them.
    dimensions = optax.contrib.MuonDimensionNumbers(0, 1)

    def all_matrices(params):
        return jax.tree.map(lambda _: dimensions, params)

    by_label: Any = {
        "muon": optax.contrib.muon(rate, muon_weight_dimension_numbers=all_matrices),
        "adam": rest,
    }
    return optax.partition(by_label, labels_of)


def plain(rate: Any, *clips: Any) -> Any:
    """Clips, and then Muon with Adam."""
    return optax.chain(*clips, muon(rate, adam(rate)))


ARMS: dict[str, Callable[[Any], Any]] = {
    "none": plain,
    "global": lambda rate: plain(rate, optaxclip.clip_by_norm(1.0)),
    "of the rest": lambda rate: plain(
        rate, optaxclip.clip_by_norm(1.0, where=lambda name: not is_muons(name))
    ),
    "spectral": lambda rate: plain(
        rate, optaxclip.clip_by_spectral_norm(limits.zscore())
    ),
    "stable Adam": lambda rate: muon(rate, optaxclip.stable_adam(adam(rate))),
}


def train(
    arm: str, graphdef: Any, params: Any, texts: np.ndarray, rates: jax.Array, bar: tqdm
) -> np.ndarray:
    """Trains all learning rates and seeds at once; the losses `[steps, rates, seeds]`.

    From parameters `[seeds, ...]` and texts `[steps, seeds, batch, length + 1]`.
    """
    loss_fn = partial(mean_loss, graphdef)

    def train_one(rate, params, texts):
        tx = ARMS[arm](optax.warmup_constant_schedule(0.0, rate, WARMUP_STEPS))

        def step(carry, text):
            params, opt_state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, text)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (params, opt_state), loss

        _, losses = jax.lax.scan(step, (params, tx.init(params)), texts)
        return losses

    of_seeds = jax.vmap(train_one, (None, 0, 1))
    of_rates_and_seeds = jax.vmap(of_seeds, (0, None, None))
    losses = np.asarray(jax.jit(of_rates_and_seeds)(rates, params, texts))
    bar.update()
    return np.moveaxis(losses, 2, 0)


def run(
    *,
    steps: int,
    seeds: int,
    rates: tuple[float, ...],
    width: int,
    batch_size: int,
    length: int,
) -> Result:
    """Trains under each clip, from the same parameters on the same texts."""
    texts, num_chars, chance = load_texts((steps, seeds, batch_size), length)
    models = [
        Transformer(num_chars, width, length, rngs=nnx.Rngs(seed))
        for seed in range(seeds)
    ]
    graphdef, state = stack_models(models)
    params = nnx.to_pure_dict(state)
    losses = {}
    start = time.perf_counter()
    with tqdm(total=len(ARMS), unit="clip") as bar:
        for arm in ARMS:
            bar.set_description(arm)
            of_steps = train(arm, graphdef, params, texts, jnp.array(rates), bar)
            losses[arm] = final_losses(of_steps)
    seconds = time.perf_counter() - start
    return Result(losses, rates, chance, seconds)


def report(result: Result) -> None:
    """Prints the losses of each clip, and what it buys."""
    _, seeds = result.losses["none"].shape
    print(f"median loss of {seeds} seeds at each learning rate; * some seed diverged")
    print(ROW.format("clip", " ".join(f"{rate:7g}" for rate in result.rates)))
    for arm, losses in result.losses.items():
        cells = []
        for of_rate in losses:
            star = "*" if np.any(of_rate >= result.chance) else " "
            cells.append(f"{np.median(of_rate):6.3f}{star}")
        print(ROW.format(arm, " ".join(cells)))

    for arm, losses in result.losses.items():
        medians = np.median(losses, axis=1)
        best = result.rates[int(np.argmin(medians))]
        fine = [
            rate
            for rate, of_rate in zip(result.rates, losses, strict=True)
            if np.all(of_rate < result.chance)
        ]
        print(
            f"{arm}: best {medians.min():.3f} at {best:g}; every seed trains up to "
            f"{max(fine, default=0):g}"
        )
    print(f"{result.seconds:.0f} s")


def main(
    *,
    steps: int = 200,
    seeds: int = 5,
    rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5),
    width: int = 64,
    batch_size: int = 8,
    length: int = 64,
) -> dict[str, Any]:
    """Trains a transformer by Muon under five clips, and says which one helped.

    Args:
        steps: Training steps of each run.
        seeds: Runs for each clip and learning rate, all at once.
        rates: Learning rates of Muon; that of Adam is a tenth.
        width: Size of each layer, a multiple of 4.
        batch_size: Texts in each step.
        length: Characters in each text.
    """
    knobs: dict[str, Any] = {
        "steps": steps,
        "seeds": seeds,
        "batch_size": batch_size,
        "width": width,
        "length": length,
    }
    cli.check_positive(knobs)
    result = run(rates=rates, **knobs)
    report(result)
    return dict(result.losses)


if __name__ == "__main__":
    cli.run(main)
