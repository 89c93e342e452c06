"""Tasks of likelihoods, labels, sequences and pictures that chose nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from tasks.sequences import rnn_init, unroll
from tasks.task import (
    Task,
    cross_entropy,
    dense,
    dense_init,
    digits,
    draw_digits,
    normal,
    squared_error,
    supervised,
)


def wind() -> Task:
    """Directions of the wind, and how sure each of them is (von Mises)."""

    def draw(key, step):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (48, 4))
        spread = jnp.exp(-1.7 - 0.5 * x[:, 0])
        angle = x[:, 1] + jnp.sin(2 * x[:, 2])
        return x, angle + spread * jax.random.normal(keys[1], (48,))

    def loss(outputs, angle):
        size = jnp.sqrt(jnp.square(outputs).sum(-1) + 1e-6)
        fit = outputs[:, 0] * jnp.cos(angle) + outputs[:, 1] * jnp.sin(angle)
        log_total = math.log(2 * math.pi) + jnp.log(jax.scipy.special.i0e(size)) + size
        return (log_total - fit).mean()

    return supervised(lambda key: dense_init(key, 4, 32, 2, gain=1), dense, draw, loss)


def shares() -> Task:
    """Shares between 0 and 1, many near an end (Kumaraswamy); either sign."""

    def draw(key, step):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (48, 5))
        a = jnp.exp(1.2 * jnp.sin(x[:, 0]) + 0.5 * x[:, 1])
        b = jnp.exp(1 + x[:, 2] * jnp.tanh(x[:, 3]))
        y = (1 - jax.random.uniform(keys[1], (48,)) ** (1 / b)) ** (1 / a)
        return x, jnp.clip(y, 1e-4, 1 - 1e-4)

    def loss(outputs, y):
        log_a, log_b = outputs[:, 0], outputs[:, 1]
        a, b, log_y = jnp.exp(log_a), jnp.exp(log_b), jnp.log(y)
        log_rest = jnp.log(-jnp.expm1(a * log_y))
        return -(log_a + log_b + (a - 1) * log_y + (b - 1) * log_rest).mean()

    return supervised(lambda key: dense_init(key, 5, 32, 2, gain=1), dense, draw, loss)


def faint_signal() -> Task:
    """A function of ten numbers, in heavy-tailed noise of 18 times its variance."""

    def true(x):
        return (jnp.sin(x[:, 0]) + 0.5 * x[:, 1] * x[:, 2])[:, None]

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (32, 10))
        return x, true(x) + 2 * jax.random.t(keys[1], 3.0, (32, 1))

    def loss(params, batch, extra):
        return squared_error(dense(params, batch[0]), batch[1])

    def measure(task, params, batch, extra, key):
        x = jax.random.normal(key, (256, 10))
        return squared_error(dense(params, x), true(x))

    return Task(
        lambda key: dense_init(key, 10, 24, 1, gain=1), draw, loss, measure=measure
    )


def pseudo_labels(num: int = 200) -> Task:
    """Digits, of which 200 have labels; the others have those they seem to have.

    The weight of the others rises for 300 steps.
    """

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        images, labels = map(jnp.asarray, digits())
        index = jax.random.randint(keys[0], (16,), 0, num)
        other, _ = draw_digits(keys[1], 48)
        blurred = other + 0.5 * jax.random.normal(keys[2], other.shape)
        known = images[index].reshape(16, -1), labels[index]
        return *known, other, blurred, jnp.minimum(step / 300, 1.0)

    def loss(params, batch, extra):
        x, y, other, blurred, weight = batch
        guess = jax.lax.stop_gradient(jax.nn.softmax(dense(params, other)))
        logs = jax.nn.log_softmax(dense(params, blurred))
        each = -jnp.take_along_axis(logs, guess.argmax(-1)[:, None], 1)[:, 0]
        is_sure = guess.max(-1) > 0.8
        return cross_entropy(dense(params, x), y) + weight * (is_sure * each).mean()

    def measure(task, params, batch, extra, key):
        x, y = draw_digits(key, 256)
        return cross_entropy(dense(params, x), y)

    return Task(lambda key: dense_init(key, 196, 48, 10), draw, loss, measure=measure)


def sparse_gates(price: float = 0.02) -> Task:
    """Digits by ever fewer pixels: the price of an open gate rises (L0)."""

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        noise = jax.random.uniform(keys[1], (196,), minval=0.01, maxval=0.99)
        return *draw_digits(keys[0]), noise, price * jnp.minimum(step / 400, 1.0)

    def loss(params, batch, extra):
        x, y, noise, price = batch
        wide = jnp.log(noise / (1 - noise)) + params["gates"]
        gate = jnp.clip(1.2 * jax.nn.sigmoid(2 * wide) - 0.1, 0, 1)
        num_open = jax.nn.sigmoid(params["gates"] + 1).sum()
        return cross_entropy(dense(params["net"], gate * x), y) + price * num_open

    def measure(task, params, batch, extra, key):
        return loss(params, (*draw_digits(key, 128), jnp.full(196, 0.5), price), extra)

    return Task(
        lambda key: {"net": dense_init(key, 196, 32, 10), "gates": jnp.ones(196)},
        draw,
        loss,
        measure=measure,
    )


def brackets(length: int = 20) -> Task:
    """Which of three brackets closes next, nested ever deeper after each 150 steps."""

    def draw(key, step, params=None, extra=None):
        most = 1 + jnp.minimum(step // 150, 3)

        def move(carry, key):
            keys = jax.random.split(key, 2)
            depth, stack = carry
            is_new = jax.random.bernoulli(keys[0], 0.5) & (depth < most) | (depth == 0)
            kind = jax.random.randint(keys[1], (), 0, 3)
            kind = jnp.where(is_new, kind, stack[depth - 1])
            stack = jnp.where(is_new, stack.at[depth].set(kind), stack)
            depth += jnp.where(is_new, 1, -1)
            return (depth, stack), (kind, is_new)

        def one(key):
            start = jnp.int32(0), jnp.zeros(5, int)
            return jax.lax.scan(move, start, jax.random.split(key, length))[1]

        return jax.vmap(one)(jax.random.split(key, 24))

    def loss(params, batch, extra):
        kind, is_new = batch
        x = jax.nn.one_hot(kind + 3 * is_new, 6, dtype=params["in"].dtype)
        logits = dense(params["out"], unroll("gru", params, x[:, :-1])[0])
        logs = jax.nn.log_softmax(logits)
        each = -jnp.take_along_axis(logs, kind[:, 1:, None], -1)[..., 0]
        return each.mean(where=~is_new[:, 1:])

    def measure(task, params, batch, extra, key):
        return loss(params, draw(key, 600), extra)

    return Task(lambda key: rnn_init(key, "gru", 6, 3), draw, loss, measure=measure)


def fast_weights(num: int = 12, width: int = 16) -> Task:
    """What was last said of a symbol, from a matrix that a delta rule writes."""

    def init(key):
        keys = jax.random.split(key, 6)
        return {
            "key": jax.random.normal(keys[0], (8, width)),
            "value": jax.random.normal(keys[1], (6, width)),
            "to key": normal(keys[2], width, width),
            "to value": normal(keys[3], width, width),
            "strength": normal(keys[4], width, 1),
            "out": dense_init(keys[5], width, 6, gain=1),
        }

    def draw(key, step):
        keys = jax.random.split(key, 3)
        names = jax.random.randint(keys[0], (32, num), 0, 8)
        facts = jax.random.randint(keys[1], (32, num), 0, 6)
        asked = jnp.take_along_axis(
            names, jax.random.randint(keys[2], (32, 1), 0, num), 1
        )
        last = num - 1 - jnp.argmax((names == asked)[:, ::-1], axis=1)[:, None]
        return (names, facts, asked), jnp.take_along_axis(facts, last, 1)[:, 0]

    def apply(params, x):
        names, facts, asked = x

        def keys(names):
            return jax.nn.softmax(params["key"][names] @ params["to key"])

        def write(memory, fact):
            k, v, strength = fact
            missing = v - (memory * k[:, None]).sum(-1)
            return memory + (strength * missing)[..., None] * k[:, None], ()

        values = params["value"][facts]
        strength = 4 * jax.nn.sigmoid(params["key"][names] @ params["strength"])
        told = keys(names), values @ params["to value"], strength
        told = jax.tree.map(lambda x: x.swapaxes(0, 1), told)
        start = jnp.zeros((len(names), width, width), values.dtype)
        memory = jax.lax.scan(write, start, told)[0]
        return dense(params["out"], (memory * keys(asked)).sum(-1))

    return supervised(init, apply, draw, cross_entropy)


def growing_pattern(length: int = 16) -> Task:
    """One rule for all cells grows a digit from a single cell (cellular automaton)."""
    target = digits()[0][3].reshape(7, 2, 7, 2).mean((1, 3))
    seed = np.zeros((4, 7, 7, 8), np.float32)
    seed[:, 3, 3, 1:] = 1

    def sense(x):
        along = [jnp.roll(x, 1, axis) - jnp.roll(x, -1, axis) for axis in (1, 2)]
        return jnp.concatenate([x, *along], axis=-1)

    def draw(key, step, params, extra):
        is_on = jax.random.bernoulli(key, 0.5, (length, 4, 7, 7, 1))
        return is_on.astype(jnp.float32)

    def loss(params, batch, extra):
        def grow(x, is_on):
            return x + is_on * dense(params, sense(x)), ()

        return squared_error(jax.lax.scan(grow, seed, batch)[0][..., 0], target)

    return Task(lambda key: dense_init(key, 24, 32, 8, gain=0.5), draw, loss)
