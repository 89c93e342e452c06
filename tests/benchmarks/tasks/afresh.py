"""Tasks of pictures, graphs, tags and tables that were drawn afresh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from tasks.networks import conv
from tasks.sequences import rnn_init, unroll
from tasks.task import (
    Task,
    cross_entropy,
    dense,
    dense_init,
    draw_digits,
    normal,
    squared_error,
    supervised,
)


def denoiser(width: int = 4) -> Task:
    """Digits without the noise of poor cameras, by a U-Net of two resolutions."""
    sizes = {
        "in": (1, width),
        "down": (width, 2 * width),
        "middle": (2 * width, 2 * width),
        "up": (3 * width, width),
        "out": (width, 1),
    }

    def init(key):
        keys = jax.random.split(key, len(sizes))
        pairs = zip(keys, sizes.items(), strict=True)
        return {name: dense_init(k, 9 * a, b) for k, (name, (a, b)) in pairs}

    def draw(key, step):
        keys = jax.random.split(key, 3)
        x, _ = draw_digits(keys[0], 6, flat=False)
        noise = jax.random.uniform(keys[1], (6, 1, 1), minval=0.2)
        return x + noise * jax.random.normal(keys[2], x.shape), x

    return supervised(init, u_net, draw, squared_error)


def u_net(params, x) -> jax.Array:
    """A picture and what is added to it, from itself and from one of half its size."""
    x = x[..., None]
    fine = jax.nn.relu(dense(params["in"], around(x)))
    coarse = jax.nn.relu(dense(params["down"], around(fine[:, ::2, ::2])))
    coarse = jax.nn.relu(dense(params["middle"], around(coarse)))
    both = jnp.concatenate([fine, coarse.repeat(2, 1).repeat(2, 2)], axis=-1)
    both = jax.nn.relu(dense(params["up"], around(both)))
    return (x + dense(params["out"], around(both)))[..., 0]


def around(x) -> jax.Array:
    """Of each pixel the 3 x 3 around it, as features."""
    size = x.shape[1]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [x[:, i : i + size, j : j + size] for i in range(3) for j in range(3)]
    return jnp.concatenate(parts, axis=-1)


def boxes() -> Task:
    """Which digit is in a noisy picture, and in which box (Huber's loss)."""

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "conv0": normal(keys[0], 16, 8, math.sqrt(2)).reshape(4, 4, 1, 8),
            "conv1": normal(keys[1], 72, 12, math.sqrt(2)).reshape(3, 3, 8, 12),
            "head": dense_init(keys[2], 108, 32, 13),
        }

    def apply(params, x):
        x = jax.nn.relu(conv(params["conv0"], x[..., None]))
        x = jax.nn.relu(conv(params["conv1"], x))
        return dense(params["head"], x.reshape(len(x), -1))

    def loss(outputs, target):
        error = jnp.abs(outputs[:, 10:] - target[1])
        huber = jnp.where(error < 1, jnp.square(error) / 2, error - 0.5)
        return cross_entropy(outputs[:, :10], target[0]) + huber.sum(-1).mean()

    return supervised(init, apply, draw_boxes, loss)


def draw_boxes(key, step, size: int = 16):
    """Digits of 7 to 14 pixels, somewhere; their labels, centers, and sizes."""
    keys = jax.random.split(key, 4)
    x, label = draw_digits(keys[0], 16, flat=False)
    wide = jax.random.uniform(keys[1], (16, 1, 1), minval=7.0, maxval=14.0)
    place = (size - wide) * jax.random.uniform(keys[2], (16, 2, 1))
    pixel = 14 / wide * (jnp.arange(size) - place)
    weights = jax.nn.relu(1 - jnp.abs(pixel[..., None] - jnp.arange(14)))
    x = weights[:, 0] @ (x + 0.42) @ weights[:, 1].swapaxes(1, 2) - 0.42
    box = jnp.concatenate([place + wide / 2 - 8, 8 * jnp.log(wide / 10)], axis=1)
    return x + 0.2 * jax.random.normal(keys[3], x.shape), (label, box[..., 0] / 4)


def communities(num: int = 20) -> Task:
    """To which of four groups each node of a graph belongs, by graph attention."""

    def init(key):
        keys = jax.random.split(key, 4)
        layers = [attention_init(keys[0], 8), attention_init(keys[1], 24)]
        return {"layers": layers, "head": dense_init(keys[2], 24, 4, gain=1)}

    def draw(key, step):
        keys = jax.random.split(key, 3)
        group = jax.random.randint(keys[0], (4, num), 0, 4)
        chance = jnp.where(group[:, None] == group[..., None], 0.3, 0.04)
        upper = jnp.triu(jax.random.bernoulli(keys[1], chance), 1)
        linked = upper | upper.swapaxes(1, 2) | jnp.eye(num, dtype=bool)
        noise = jax.random.normal(keys[2], (4, num, 8))
        return (noise + 1.2 * jax.nn.one_hot(group, 8), linked), group

    def apply(params, inputs):
        x, linked = inputs
        for layer in params["layers"]:
            x = jax.nn.elu(attend(layer, x, linked))
        return dense(params["head"], x)

    return supervised(init, apply, draw, cross_entropy)


def attention_init(key, num_in: int, heads: int = 2, width: int = 12):
    """Parameters of `attend`."""
    keys = jax.random.split(key, 3)
    return {
        "w": normal(keys[0], num_in, heads * width).reshape(num_in, heads, width),
        "from": normal(keys[1], width, heads).T,
        "to": normal(keys[2], width, heads).T,
    }


def attend(params, x, linked) -> jax.Array:
    """Of each node the mean of its neighbors, weighted by two scores of each pair."""
    x = jnp.einsum("gni,ihw->ghnw", x, params["w"])
    of = (x * params["from"][:, None]).sum(-1)
    to = (x * params["to"][:, None]).sum(-1)
    scores = jax.nn.leaky_relu(to[..., None] + of[..., None, :], 0.2)
    weights = jax.nn.softmax(jnp.where(linked[:, None], scores, -1e4), axis=-1)
    x = (weights @ x).swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1)


def tagger(tags: int = 5, words: int = 30) -> Task:
    """Tags of words that mean several things, by a chain of fields (BiGRU-CRF)."""

    def init(key):
        keys = jax.random.split(key, 4)
        return {
            "embed": jax.random.normal(keys[0], (words, 12)),
            "ahead": rnn_init(keys[1], "gru", 12, tags, width=16),
            "back": rnn_init(keys[2], "gru", 12, tags, width=16),
            "next": 0.1 * jax.random.normal(keys[3], (tags, tags)),
        }

    def loss(params, batch, extra):
        word, tag = batch
        x = params["embed"][word.T]
        hidden = unroll("gru", params["ahead"], x)[0]
        scores = dense(params["ahead"]["out"], hidden)
        hidden = unroll("gru", params["back"], x[:, ::-1])[0][:, ::-1]
        scores += dense(params["back"]["out"], hidden)
        return chain_loss(scores.swapaxes(0, 1), params["next"], tag)

    return Task(init, draw_tags(tags, words), loss)


def draw_tags(tags: int, words: int, length: int = 10):
    """A chain of tags, and a word for each: `draw` of a task."""
    rng = np.random.default_rng(0)
    log_next = np.log(rng.dirichlet(np.full(tags, 0.4), tags) + 1e-3)
    log_word = np.log(rng.dirichlet(np.full(words, 0.15), tags) + 1e-4)

    def draw(key, step, params, extra):
        def follow(tag, key):
            tag = jax.random.categorical(key, jnp.asarray(log_next)[tag])
            return tag, tag

        keys = jax.random.split(key, length + 1)
        tag = jax.lax.scan(follow, jnp.zeros(16, int), keys[1:])[1]
        return jax.random.categorical(keys[0], jnp.asarray(log_word)[tag]), tag

    return draw


def chain_loss(scores, follows, tag) -> jax.Array:
    """Minus the log-chance of tags `[time, num]` by scores of each and of pairs."""

    def add(total, score):
        return jax.nn.logsumexp(total[..., None] + follows, axis=1) + score, ()

    total = jax.lax.scan(add, scores[0], scores[1:])[0]
    chosen = jnp.take_along_axis(scores, tag[..., None], -1)[..., 0].sum(0)
    chosen += follows[tag[:-1], tag[1:]].sum(0)
    return (jax.nn.logsumexp(total, axis=-1) - chosen).mean()


@functools.cache
def shop(items: int = 200, days: int = 140) -> np.ndarray:
    """What a shop sold: counts of each item on each day, `[items, days]`."""
    rng = np.random.default_rng(0)
    day = np.arange(days)
    week = 0.5 * np.sin(2 * np.pi * (day / 7 + rng.uniform(size=(items, 1))))
    trend = np.cumsum(0.05 * rng.standard_normal((items, days)), axis=1)
    is_cheap = rng.uniform(size=(items, days)) < 0.05
    level = rng.normal(1.5, 1.0, (items, 1))
    mean = np.exp(level + week + trend + 1.2 * is_cheap)
    return rng.poisson(mean * rng.gamma(4, 1 / 4, mean.shape)).astype(np.float32)


def sales(length: int = 14) -> Task:
    """How many of an item are sold next day (LSTM, negative binomial; DeepAR)."""

    def init(key):
        return rnn_init(key, "lstm", 8, 2, width=24)

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        sold = jnp.asarray(shop())
        item = jax.random.randint(keys[0], (16, 1), 0, sold.shape[0])
        day = jax.random.randint(keys[1], (16, 1), 0, sold.shape[1] - length)
        day += jnp.arange(length + 1)
        return sold[item, day], day % 7

    def loss(params, batch, extra):
        sold, weekday = batch
        weekday = jax.nn.one_hot(weekday[:, 1:], 7, dtype=sold.dtype)
        x = jnp.concatenate([jnp.log1p(sold[:, :-1, None]), weekday], axis=-1)
        outputs = dense(params["out"], unroll("lstm", params, x)[0])
        return negative_binomial(outputs, sold[:, 1:])

    return Task(init, draw, loss)


def negative_binomial(outputs, y) -> jax.Array:
    """Minus the log-chance of counts, by logarithms of their mean and of their size."""
    log_mean, log_size = outputs[..., 0], outputs[..., 1]
    size, log_both = jnp.exp(log_size), jnp.logaddexp(log_mean, log_size)
    gammas = jax.lax.lgamma(y + size) - jax.lax.lgamma(size)
    each = gammas - jax.lax.lgamma(y + 1) + y * (log_mean - log_both)
    return -(each + size * (log_size - log_both)).mean()
