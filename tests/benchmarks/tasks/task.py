"""What a task is: parameters, batches, a loss, and what is judged in the end."""

import dataclasses
import functools
import importlib
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
mnist: Any = importlib.import_module("mnist")


def no_extra(params):
    del params
    return ()


def same_extra(extra, params, batch):
    del params, batch
    return extra


def loss_on_clean_batch(task, params, batch, extra, key):
    del key
    return task.loss(params, batch, extra)


def with_nothing_left_out(loss: Callable) -> Callable:
    """The measure that is a loss with `is_all`, by which nothing is left out."""

    def measure(task, params, batch, extra, key):
        del task, key
        return loss(params, batch, extra, is_all=True)

    return measure


@dataclasses.dataclass(frozen=True)
class Task:
    """A learning problem.

    Attributes:
        init: From a key to parameters, a tree of float32 arrays.
        batch: From `(key, step, params, extra)` to a tree of arrays. Reinforcement
            learning acts with `params` here; no gradient flows through.
        loss: From `(params, batch, extra)` to a number, or, where there are `players`,
            to `{player: number}`, of which each player reduces its own.
        extra: From the first parameters to what else a training loop carries: a frozen
            base, a target network, the data of a rollout.
        follow: From `(extra, params, batch)` to the next `extra`, after each step.
        measure: From `(task, params, batch, extra, key)` to what the run is judged by,
            in float32 on a clean batch; smaller is better. By default the loss.
        players: Names of the subtrees of `params` with an optimizer each.
    """

    init: Callable[[jax.Array], Any]
    batch: Callable[..., Any]
    loss: Callable[[Any, Any, Any], Any]
    extra: Callable[[Any], Any] = no_extra
    follow: Callable[[Any, Any, Any], Any] = same_extra
    measure: Callable[..., jax.Array] = loss_on_clean_batch
    players: tuple[str, ...] = ()


def supervised(init: Callable, apply: Callable, draw: Callable, loss: Callable) -> Task:
    """A task of outputs `apply(params, x)` and targets: `draw(key, step)` -> (x, y)."""
    return Task(
        init=init,
        batch=lambda key, step, params, extra: draw(key, step),
        loss=lambda params, batch, extra: loss(apply(params, batch[0]), batch[1]),
    )


def normal(key, num_in: int, num_out: int, gain: float = 1.0) -> jax.Array:
    """A matrix at the scale of its number of inputs."""
    return gain / math.sqrt(num_in) * jax.random.normal(key, (num_in, num_out))


def dense_init(key, *widths: int, gain: float = math.sqrt(2)) -> dict[str, jax.Array]:
    """Parameters of `dense`: kernels `w0`, `w1`, ..., and biases of zeros."""
    keys = jax.random.split(key, len(widths) - 1)
    params = {}
    for i, (num_in, num_out) in enumerate(itertools.pairwise(widths)):
        params[f"w{i}"] = normal(keys[i], num_in, num_out, gain)
        params[f"b{i}"] = jnp.zeros(num_out)
    return params


def dense(params, x, act: Callable = jax.nn.relu) -> jax.Array:
    """A multilayer perceptron, with `act` between its layers."""
    for i in range(len(params) // 2):
        x = act(x) if i else x
        x = x @ params[f"w{i}"] + params[f"b{i}"]
    return x


def cross_entropy(outputs, labels) -> jax.Array:
    logs = jax.nn.log_softmax(outputs)
    return -jnp.take_along_axis(logs, labels[..., None], axis=-1).mean()


def squared_error(outputs, targets) -> jax.Array:
    return jnp.square(outputs - targets).mean()


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """4,000 MNIST digits in 14 x 14, standardized: float32 images, int32 labels."""
    data = mnist.load()
    images = data.train_images.reshape(-1, 14, 2, 14, 2).mean((2, 4)) / 255
    return ((images - 0.1307) / 0.3081).astype(np.float32), data.train_labels


def draw_digits(key, num: int = 32, *, flat: bool = True):
    """Random digits: images `[num, 196]` or `[num, 14, 14]`, and labels."""
    images, labels = map(jnp.asarray, digits())
    index = jax.random.randint(key, (num,), 0, len(labels))
    images = images[index]
    return images.reshape(num, -1) if flat else images, labels[index]


@functools.cache
def manual() -> np.ndarray:
    """Python's manual as int32; all but the 31 most frequent characters are one."""
    text = np.array(list("\n".join(dict.fromkeys(topics.values()))))
    _, index, counts = np.unique(text, return_inverse=True, return_counts=True)
    ranks = np.argsort(np.argsort(-counts))
    return np.minimum(ranks, 31)[index].astype(np.int32)


def draw_text(key, num: int = 8, length: int = 24):
    """Random stretches of the manual: characters, and the ones that follow them."""
    text = jnp.asarray(manual())
    start = jax.random.randint(key, (num, 1), 0, len(text) - length - 1)
    text = text[start + jnp.arange(length + 1)]
    return text[:, :-1], text[:, 1:]


def draw_blobs(key, num: int = 64) -> jax.Array:
    """Points of 8 Gaussians on a circle of radius 2: `[num, 2]`."""
    keys = jax.random.split(key)
    angle = 2 * jnp.pi * jax.random.randint(keys[0], (num,), 0, 8) / 8
    centers = 2 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return centers + 0.1 * jax.random.normal(keys[1], (num, 2))
