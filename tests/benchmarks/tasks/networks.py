"""Tasks of networks without recurrence or attention, and of structured parameters."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tasks.task import (
    Task,
    cross_entropy,
    dense,
    dense_init,
    digits,
    draw_digits,
    draw_text,
    normal,
    squared_error,
    supervised,
)


def draw_changing(change: int | None = None, num: int = 32, *, flat: bool = True):
    """Draws digits; the labels are the next ones for good from step `change` on."""

    def draw(key, step):
        x, y = draw_digits(key, num, flat=flat)
        is_changed = change is not None and step >= change
        return x, jnp.where(is_changed, (y + 1) % 10, y)

    return draw


def relative_error(task, params, batch, extra, key):
    """A measure: the loss as part of the targets' mean square."""
    del key
    return task.loss(params, batch, extra) / jnp.square(batch[1]).mean()


def regression(degrees: float | None = None, change: int | None = None) -> Task:
    """Linear targets in the hundreds; their noise is of a t-distribution."""
    coefficients = np.random.default_rng(0).uniform(0, 100, (2, 20))

    def draw(key, step):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (32, 20))
        is_changed = change is not None and step >= change
        y = x @ jnp.asarray(coefficients, jnp.float32)[jnp.int32(is_changed)]
        if degrees is not None:
            y += 30 * jax.random.t(keys[1], degrees, (32,))
        return x, y[:, None]

    return supervised(
        lambda key: dense_init(key, 20, 25, 1), dense, draw, squared_error
    )


def classifier(
    depth: int = 1,
    change: int | None = None,
    batch_size: int = 32,
    act=jax.nn.relu,
    gain: float = math.sqrt(2),
) -> Task:
    """A multilayer perceptron classifies digits."""
    return supervised(
        lambda key: dense_init(key, 196, *[32] * depth, 10, gain=gain),
        functools.partial(dense, act=act),
        draw_changing(change, batch_size),
        cross_entropy,
    )


def zero_head(depth: int = 2) -> Task:
    """Classifies digits; the last kernel is zero at first."""
    task = classifier(depth)

    def init(key):
        return task.init(key) | {f"w{depth}": jnp.zeros((32, 10))}

    return dataclasses.replace(task, init=init)


def conv(kernel, x) -> jax.Array:
    """A convolution of stride 2 as one product; cheap where kernels are vmapped."""
    size, _, num_in, num_out = kernel.shape
    steps = (x.shape[1] - size) // 2 + 1
    patches = [
        x[:, i : i + 2 * steps - 1 : 2, j : j + 2 * steps - 1 : 2]
        for i in range(size)
        for j in range(size)
    ]
    kernel = kernel.reshape(size**2 * num_in, num_out)
    return jnp.concatenate(patches, axis=-1) @ kernel


def conv_net() -> Task:
    """A convolutional network classifies digits."""

    def init(key):
        keys = jax.random.split(key, 3)
        gain = math.sqrt(2)
        return {
            "conv0": normal(keys[0], 16, 8, gain).reshape(4, 4, 1, 8),
            "bias0": jnp.zeros(8),
            "conv1": normal(keys[1], 16 * 8, 16, gain).reshape(4, 4, 8, 16),
            "bias1": jnp.zeros(16),
            "head": dense_init(keys[2], 4 * 16, 10),
        }

    def apply(params, x):
        x = x[..., None]
        for i in range(2):
            x = jax.nn.relu(conv(params[f"conv{i}"], x) + params[f"bias{i}"])
        return dense(params["head"], x.reshape(len(x), -1))

    return supervised(init, apply, draw_changing(flat=False), cross_entropy)


def residual(
    gain: float = 1.0,
    depth: int = 6,
    gate: float | None = None,
    is_scalar: bool = False,
    zero_out: bool = False,
) -> Task:
    """Residual blocks on digits; `gate` is the first value of what multiplies them."""

    def init(key):
        keys = jax.random.split(key, depth + 2)
        params = {
            "in": normal(keys[-1], 196, 32),
            "head": dense_init(keys[-2], 32, 10, gain=1),
        }
        for i in range(depth):
            kernels = dense_init(keys[i], 32, 32, 32, gain=1.4 * gain)
            block: dict[str, Any] = {"dense": kernels}
            if zero_out:
                block["dense"]["w1"] *= 0
            if gate is not None:
                block["gate"] = jnp.full(() if is_scalar else (32,), gate)
            params[f"block{i}"] = block
        return params

    return supervised(init, apply_residual, draw_changing(), cross_entropy)


def apply_residual(params, x):
    x = x @ params["in"]
    for i in range(len(params) - 2):
        block = params[f"block{i}"]
        x += block.get("gate", 1) * dense(block["dense"], x)
    return dense(params["head"], x)


def rezero() -> Task:
    """Residual blocks, each multiplied by a number that is zero at first."""
    return residual(gate=0.0, is_scalar=True)


def layer_scale() -> Task:
    """Residual blocks, of which each feature is multiplied by 1e-5 at first."""
    return residual(gate=1e-5)


def zero_projections() -> Task:
    """Residual blocks whose last kernels are zero at first."""
    return residual(zero_out=True)


@functools.cache
def frozen() -> dict[str, np.ndarray]:
    """A network for digits, random but for its fitted last layer; tasks adapt it."""
    rng = np.random.default_rng(0)
    images, labels = digits()
    x = images.reshape(-1, 196)
    params = {}
    for i, num_in in enumerate([196, 64]):
        params[f"w{i}"] = rng.normal(0, math.sqrt(2 / num_in), (num_in, 64))
        x = np.maximum(x @ params[f"w{i}"], 0)
    targets = 8 * np.eye(10)[labels] - 0.8
    params["w2"] = np.linalg.lstsq(x, targets, rcond=None)[0]
    params |= {f"b{i}": np.zeros(n) for i, n in enumerate([64, 64, 10])}
    return {name: x.astype(np.float32) for name, x in params.items()}


def frozen_base(params):
    del params
    return jax.tree.map(jnp.asarray, frozen())


def lora(rank: int = 4) -> Task:
    """Adapts a frozen network by products of low rank that are zero at first."""

    def init(key):
        sizes = [196, 64, 64, 10]
        keys = jax.random.split(key, 3)
        return {
            f"w{i}": {
                "a": normal(keys[i], sizes[i], rank),
                "b": jnp.zeros((rank, sizes[i + 1])),
            }
            for i in range(3)
        }

    def loss(params, batch, extra):
        adapted = {name: extra[name] + x["a"] @ x["b"] for name, x in params.items()}
        return cross_entropy(dense(extra | adapted, batch[0]), batch[1])

    draw = draw_changing(0)
    return Task(
        init, lambda key, step, params, extra: draw(key, step), loss, frozen_base
    )


def control() -> Task:
    """Steers a frozen network by a copy between layers that are zero at first."""

    def init(key):
        del key
        copy = {name: jnp.asarray(x) for name, x in frozen().items()}
        copy |= {"w2": jnp.zeros((64, 64)), "b2": jnp.zeros(64)}
        return {"copy": copy, "hint": jnp.zeros((2, 196))}

    def batch(key, step, params, extra):
        keys = jax.random.split(key)
        x, y = draw_digits(keys[0])
        hint = jax.random.randint(keys[1], (32,), 0, 2)
        return x, jax.nn.one_hot(hint, 2), (y + hint) % 10

    def loss(params, batch, extra):
        x, hint, y = batch
        steer = dense(params["copy"], x + hint @ params["hint"])
        hidden = jax.nn.relu(x @ extra["w0"] + extra["b0"])
        hidden = jax.nn.relu(hidden @ extra["w1"] + extra["b1"])
        return cross_entropy((hidden + steer) @ extra["w2"] + extra["b2"], y)

    return Task(init, batch, loss, frozen_base)


def poisson(waves: int = 2) -> Task:
    """A physics-informed network: u'' = f on [0, 1], and u is zero at both ends."""

    def solution(params, x):
        return x * (1 - x) * dense(params, x[None], jnp.tanh)[0]

    def apply(params, x):
        second = jax.grad(jax.grad(solution, argnums=1), argnums=1)
        return jax.vmap(second, (None, 0))(params, x)

    def draw(key, step):
        x = jax.random.uniform(key, (32,))
        return x, -((waves * jnp.pi) ** 2) * jnp.sin(waves * jnp.pi * x)

    return supervised(
        lambda key: dense_init(key, 1, 32, 32, 1), apply, draw, squared_error
    )


def runge_kutta(slope, start, num: int = 12, time: float = 0.1) -> jax.Array:
    """The states `[num, ...]` after each of `num` steps of order 4."""

    def step(x, _):
        k1 = slope(x)
        k2 = slope(x + time / 2 * k1)
        k3 = slope(x + time / 2 * k2)
        k4 = slope(x + time * k3)
        x += time / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x, x

    return jax.lax.scan(step, start, length=num)[1]


def neural_ode() -> Task:
    """The slopes of a cubic spiral are learned through a solver."""

    def cubic(x):
        return x**3 @ jnp.array([[-0.1, 2.0], [-2.0, -0.1]], x.dtype)

    def apply(params, x):
        return runge_kutta(lambda x: dense(params, x**3, jnp.tanh), x)

    def draw(key, step):
        x = jax.random.uniform(key, (16, 2), minval=-1.5, maxval=1.5)
        return x, runge_kutta(cubic, x)

    return supervised(
        lambda key: dense_init(key, 2, 32, 2, gain=1), apply, draw, squared_error
    )


def factorization(scale: float = 1e-3) -> Task:
    """Factors, tiny at first, of a matrix of rank 4, of which entries are seen."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(40, 4)) @ rng.normal(size=(4, 40)) / 2

    def init(key):
        keys = jax.random.split(key)
        return {
            "rows": scale * jax.random.normal(keys[0], (40, 8)),
            "columns": scale * jax.random.normal(keys[1], (40, 8)),
        }

    def apply(params, index):
        return (params["rows"][index[0]] * params["columns"][index[1]]).sum(-1)

    def draw(key, step):
        index = jax.random.randint(key, (2, 256), 0, 40)
        return index, jnp.asarray(matrix, jnp.float32)[index[0], index[1]]

    return supervised(init, apply, draw, squared_error)


def negative_sampling(outputs, signs):
    return -jax.nn.log_sigmoid(signs * outputs).sum(-1).mean()


def skip_gram() -> Task:
    """Embeddings of 1,024 pairs of characters; those at hand have gradients alone."""

    def init(key):
        keys = jax.random.split(key)
        return {
            "center": normal(keys[0], 16, 1024).T,
            "context": normal(keys[1], 16, 1024).T,
        }

    def apply(params, tokens):
        center = params["center"][tokens[:, 0]]
        return jnp.einsum("ni,nji->nj", center, params["context"][tokens[:, 1:]])

    def draw(key, step):
        keys = jax.random.split(key)
        text, _ = draw_text(keys[0], 64, 4)
        pairs = 32 * text[:, ::2] + text[:, 1::2]
        negative = jax.random.choice(keys[1], pairs[:, 1], (64, 5))
        tokens = jnp.concatenate([pairs, negative], axis=1)
        return tokens, jnp.array([1, -1, -1, -1, -1, -1])

    return supervised(init, apply, draw, negative_sampling)


def unit(x) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


def contrastive() -> Task:
    """Pairs of masked digits are told from others (InfoNCE); learns the temperature."""

    def init(key):
        net = dense_init(key, 196, 64, 16)
        return {"net": net, "temperature": jnp.log(0.07)}

    def draw(key, step):
        keys = jax.random.split(key)
        x, _ = draw_digits(keys[0])
        return x * jax.random.bernoulli(keys[1], 0.3, (2, 1, 196)), jnp.arange(32)

    def apply(params, x):
        views = unit(dense(params["net"], x))
        logits = views[0] @ views[1].T * jnp.exp(-params["temperature"])
        return jnp.stack([logits, logits.T])

    def loss(outputs, labels):
        return cross_entropy(outputs, jnp.stack([labels, labels]))

    return supervised(init, apply, draw, loss)


def experts(is_hard: bool = False) -> Task:
    """Experts classify digits, mixed by a router; if `is_hard`, the likeliest alone."""

    def init(key):
        keys = jax.random.split(key)
        networks = jax.vmap(lambda key: dense_init(key, 196, 16, 10))
        return {
            "router": normal(keys[0], 196, 4),
            "experts": networks(jax.random.split(keys[1], 4)),
        }

    def apply(params, x):
        share = jax.nn.softmax(x @ params["router"])
        if is_hard:
            share *= jax.nn.one_hot(share.argmax(-1), 4, dtype=x.dtype)
        outputs = jax.vmap(dense, (0, None))(params["experts"], x)
        return jnp.einsum("ne,eni->ni", share, outputs)

    return supervised(init, apply, draw_changing(), cross_entropy)


def coordinates(frequency: float = 30.0) -> Task:
    """A network of sines (SIREN) of the coordinates of an image of 9 digits."""

    def init(key):
        params = dense_init(key, 2, 48, 48, 1)
        for i, bound in enumerate([1 / 2, *[math.sqrt(6 / 48) / frequency] * 2]):
            shape, key = params[f"w{i}"].shape, jax.random.fold_in(key, i)
            params[f"w{i}"] = bound * jax.random.uniform(key, shape, minval=-1)
        return params

    def apply(params, x):
        return dense(params, x, lambda x: jnp.sin(frequency * x))

    def draw(key, step):
        image = jnp.asarray(digits()[0][:9]).reshape(3, 3, 14, 14)
        image = image.transpose(0, 2, 1, 3).reshape(42, 42)
        index = jax.random.randint(key, (64, 2), 0, 42)
        return index / 21 - 1, image[index[:, 0], index[:, 1], None]

    return supervised(init, apply, draw, squared_error)


def deep_linear(depth: int = 6, gain: float = 1.0) -> Task:
    """A product of matrices learns a linear map."""
    matrix = np.random.default_rng(0).normal(size=(16, 16)) / 4

    def draw(key, step):
        x = jax.random.normal(key, (32, 16))
        return x, x @ jnp.asarray(matrix, jnp.float32)

    return supervised(
        lambda key: dense_init(key, *[16] * (depth + 1), gain=gain),
        functools.partial(dense, act=lambda x: x),
        draw,
        squared_error,
    )


def copied(every: int):
    """Copies the parameters after each `every` steps."""

    def follow(extra, params, batch):
        is_due = extra["age"] % every == 0
        copy = jax.tree.map(
            lambda new, old: jnp.where(is_due, new, old), params, extra["copy"]
        )
        return {"copy": copy, "age": extra["age"] + 1}

    return follow


def moving_target(every: int = 100, discount: float = 0.9) -> Task:
    """Rewards and a copy's value of the next state, as in Q-learning, are learned."""

    def batch(key, step, params, extra):
        x = jax.random.normal(key, (32, 4))
        return x, jnp.roll(x, 1, axis=1), 2 * jnp.abs(x[:, :1])

    def loss(params, batch, extra):
        x, after, reward = batch
        return squared_error(
            dense(params, x), reward + discount * dense(extra["copy"], after)
        )

    return Task(
        init=lambda key: dense_init(key, 4, 32, 1),
        batch=batch,
        loss=loss,
        extra=lambda params: {"copy": params, "age": jnp.int32(1)},
        follow=copied(every),
    )


def autoencoder() -> Task:
    """Digits pass through 16 numbers."""

    def draw(key, step):
        x, _ = draw_digits(key)
        return x, x

    return supervised(
        lambda key: dense_init(key, 196, 64, 16, 64, 196, gain=1),
        functools.partial(dense, act=jnp.tanh),
        draw,
        squared_error,
    )


def triplets(margin: float = 1.0) -> Task:
    """Digits are to be nearer to those of their class than to others, by a margin."""

    def loss(outputs, labels):
        difference = outputs[:, None] - outputs
        distance = jnp.square(difference).sum(-1)
        is_same = (labels[:, None] == labels).astype(distance.dtype)
        excess = distance[:, :, None] - distance[:, None] + margin
        is_pair = is_same - jnp.eye(len(labels), dtype=distance.dtype)
        weights = is_pair[:, :, None] * (1 - is_same)[:, None]
        return (weights * jax.nn.relu(excess)).sum() / jnp.maximum(weights.sum(), 1)

    return supervised(
        lambda key: dense_init(key, 196, 48, 8, gain=0.5),
        dense,
        draw_changing(num=24),
        loss,
    )


def towers(stages: tuple[float, ...] = (1.0, 3.0, 10.0)) -> Task:
    """A product of two networks, of targets whose scale grows every 200 steps."""

    def init(key):
        keys = jax.random.split(key)
        return {name: dense_init(keys[i], 8, 32, 8) for i, name in enumerate("ab")}

    def apply(params, x):
        return (dense(params["a"], x[:, :8]) * dense(params["b"], x[:, 8:])).mean(-1)

    def draw(key, step):
        x = jax.random.normal(key, (32, 16))
        y = jnp.tanh(x[:, :8].sum(-1)) * x[:, 8:12].sum(-1) / 2
        return x, jnp.array(stages)[jnp.minimum(step // 200, len(stages) - 1)] * y

    task = supervised(init, apply, draw, squared_error)
    return dataclasses.replace(task, measure=relative_error)
