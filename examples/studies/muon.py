"""Which clip lets Muon train at a larger learning rate?

python examples/studies/muon.py                              # no download

A small transformer learns to continue Python's manual, from the help texts that Python
ships. Its matrices are trained by Muon, all else by Adam. Every clip gets the same
runs: the same parameters and texts for five seeds, at five learning rates.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from compare_limits import load_texts

COLUMNS = "{:12} | {}"


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
        heads = (*x.shape[:2], 4, x.shape[2] // 4)
        q, k, v = (
            part.reshape(heads)
            for part in jnp.split(self.qkv(self.norms[0](x)), 3, axis=-1)
        )
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x += self.out(mixed.reshape(x.shape))
        return x + self.fall(jax.nn.gelu(self.rise(self.norms[1](x))))


class Transformer(nnx.Module):
    """Says at every place of a text which character comes next."""

    def __init__(self, num_chars: int, width: int, length: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(num_chars, width, rngs=rngs)
        self.place = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List(Block(width, rngs=rngs) for _ in range(2))
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
    """For all but the matrices, with a tenth of the step."""
    return optax.adam(lambda count: 0.1 * rate(count))


def muon(rate: Any, rest: Any) -> Any:
    """Muon for the matrices, and another optimizer for all else."""
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
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels

    def loss_fn(params, text):
        logits = nnx.merge(graphdef, params)(text[:, :-1])
        return cross_entropy(logits, text[:, 1:]).mean()

    def run(rate, params, texts):
        tx = ARMS[arm](optax.warmup_constant_schedule(0.0, rate, 20))

        def step(carry, text):
            params, opt_state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, text)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        return jax.lax.scan(step, (params, tx.init(params)), texts)[1]

    runs = jax.vmap(jax.vmap(run, (None, 0, 1)), (0, None, None))
    losses = np.asarray(jax.jit(runs)(rates, params, texts))
    bar.update()
    return np.moveaxis(losses, 2, 0)


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
    knobs = {"steps": steps, "seeds": seeds, "batch_size": batch_size}
    cli.check_positive(knobs | {"width": width, "length": length})
    texts, num_chars, chance = load_texts((steps, seeds, batch_size), length)
    models = [
        Transformer(num_chars, width, length, rngs=nnx.Rngs(seed))
        for seed in range(seeds)
    ]
    graphdefs, states = zip(*map(nnx.split, models), strict=True)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    params = nnx.to_pure_dict(params)
    print(f"median loss of {seeds} seeds at each learning rate; * some seed diverged")
    print(COLUMNS.format("clip", " ".join(f"{rate:7g}" for rate in rates)))
    result = {}
    start = time.perf_counter()
    with tqdm(total=len(ARMS), unit="clip") as bar:
        for arm in ARMS:
            bar.set_description(arm)
            losses = train(arm, graphdefs[0], params, texts, jnp.array(rates), bar)
            last = losses[-max(1, steps // 20) :].mean(axis=0, dtype=float)
            last = np.where(np.isfinite(last), last, np.inf)
            result[arm] = last
            has_diverged = np.any(last >= chance, axis=1).tolist()
            cells = [
                f"{x:6.3f}{'*' if bad else ' '}"
                for x, bad in zip(np.median(last, axis=1), has_diverged, strict=True)
            ]
            tqdm.write(COLUMNS.format(arm, " ".join(cells)))
    for arm, last in result.items():
        # What a clip buys: the best of all learning rates, and how large one may be.
        medians = np.median(last, axis=1)
        fine = [r for r, x in zip(rates, last, strict=True) if (x < chance).all()]
        best = rates[int(np.argmin(medians))]
        print(
            f"{arm}: best {medians.min():.3f} at {best:g}; every seed trains up to "
            f"{max(fine, default=0):g}"
        )
    print(f"{time.perf_counter() - start:.0f} s")
    return result


if __name__ == "__main__":
    cli.run(main)
