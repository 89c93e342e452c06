"""Tasks of sequences, sounds, and waves, drawn after all others."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from tasks.sequences import (
    rnn_init,
    transformer,
    transformer_init,
    unroll,
)
from tasks.task import (
    Task,
    cross_entropy,
    dense,
    dense_init,
    draw_text,
    manual,
    squared_error,
    supervised,
)


def translation(length: int = 6) -> Task:
    """Reverses three to six symbols, ever more after its own ones; losses add up."""

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "reader": rnn_init(keys[0], "gru", 16, 1),
            "writer": rnn_init(keys[1], "gru", 16, 9),
            "embed": jax.random.normal(keys[2], (9, 16)),
        }

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        place = jnp.arange(length)
        end = jax.random.randint(keys[0], (24, 1), 3, length + 1)
        x = jax.random.randint(keys[1], (24, length), 1, 9) * (place < end)
        y = jnp.take_along_axis(x, jnp.maximum(end - 1 - place, 0), 1) * (place < end)
        is_own = jax.random.bernoulli(
            keys[2], 0.7 * jnp.minimum(step / 400, 1), y.shape
        )
        return x, y, is_own

    def loss(params, batch, extra):
        x, y, is_own = batch
        embed, writer = params["embed"], params["writer"]
        _, state = unroll("gru", params["reader"], embed[x])

        def write(carry, now):
            state, before = carry
            target, is_own = now
            hidden, state = unroll("gru", writer, embed[before][:, None], state)
            logs = jax.nn.log_softmax(dense(writer["out"], hidden[:, 0]))
            each = jnp.take_along_axis(logs, target[:, None], 1)[:, 0]
            return (state, jnp.where(is_own, logs.argmax(-1), target)), each

        carry = state, jnp.zeros(len(x), int)
        logs = jax.lax.scan(write, carry, (y.T, is_own.T))[1].T
        return -(logs * (y > 0)).sum(-1).mean()

    def measure(task, params, batch, extra, key):
        x, y, _ = draw(key, 0, params, extra)
        return loss(params, (x, y, jnp.ones(y.shape, bool)), extra)

    return Task(init, draw, loss, measure=measure)


def corpora(length: int = 16) -> Task:
    """A transformer reads text, then also counting, then also what repeats itself."""
    shares = jnp.log(jnp.array([[1, 1e-3, 1e-3], [0.5, 0.5, 1e-3], [0.3, 0.3, 0.4]]))

    def draw(key, stage):
        keys = jax.random.split(key, 4)
        first = jax.random.randint(keys[1], (2, 12, 1), 0, 32)
        repeated = jax.random.randint(keys[2], (12, 5), 0, 32)
        rows = jnp.stack(
            [
                draw_text(keys[0], 12, length + 1)[0],
                (first[0] + jnp.arange(length + 1) * first[1]) % 32,
                jnp.tile(repeated, (1, 4))[:, : length + 1],
            ]
        )
        kind = jax.random.categorical(keys[3], shares[stage], shape=(12,))
        rows = rows[kind, jnp.arange(12)]
        return rows[:, :-1], rows[:, 1:]

    def loss(params, batch, extra):
        return cross_entropy(transformer(params, batch[0]), batch[1])

    return Task(
        lambda key: transformer_init(key, std=0.05),
        lambda key, step, params, extra: draw(key, jnp.minimum(step // 200, 2)),
        loss,
        measure=lambda task, params, batch, extra, key: loss(params, draw(key, 2), ()),
    )


def carried_state(length: int = 16, lasts: int = 60) -> Task:
    """Eight streams of text, read on with the last state; new ones after 60 steps."""
    text = jnp.asarray(manual())

    def read(params, before, extra):
        return unroll("lstm", params, params["embed"][before], extra)

    def init(key):
        keys = jax.random.split(key)
        embed = jax.random.normal(keys[0], (32, 16))
        return rnn_init(keys[1], "lstm", 16, 32) | {"embed": embed}

    def draw(key, step, params, extra):
        key = jax.random.fold_in(jax.random.key(1), step // lasts)
        start = jax.random.randint(key, (8, 1), 0, len(text) - length * lasts - 1)
        seen = text[start + step % lasts * length + jnp.arange(length + 1)]
        return seen[:, :-1], seen[:, 1:], step % lasts == lasts - 1

    def loss(params, batch, extra):
        hidden, _ = read(params, batch[0], extra)
        return cross_entropy(dense(params["out"], hidden), batch[1])

    def follow(extra, params, batch):
        state = read(params, batch[0], extra)[1]
        return jax.tree.map(lambda x: jnp.where(batch[2], 0, x), state)

    return Task(
        init,
        draw,
        loss,
        lambda params: (jnp.zeros((8, 32)), jnp.zeros((8, 32))),
        follow,
    )


def separation(num: int = 48) -> Task:
    """Two sounds from their sum, in decibels, by whichever order is better."""

    def draw(key, step):
        keys = jax.random.split(key, 3)
        low = jnp.array([[1.0], [7.0]])
        pitch = jax.random.uniform(keys[0], (32, 2, 1), minval=low, maxval=low + 3)
        turn = jax.random.uniform(keys[1], (32, 2, 1), maxval=2 * jnp.pi)
        loud = jnp.exp(0.7 * jax.random.normal(keys[2], (32, 2, 1)))
        time = jnp.linspace(0, 2 * jnp.pi, num)
        sounds = loud * jnp.sin(pitch * time + turn)
        return sounds.sum(1), sounds

    def decibels(guess, true):
        scale = (guess * true).sum(-1) / (jnp.square(true).sum(-1) + 1e-6)
        target = scale[..., None] * true
        error = jnp.square(guess - target).sum(-1)
        ratio = (jnp.square(target).sum(-1) + 1e-6) / (error + 1e-6)
        return 10 / math.log(10) * jnp.log(ratio).mean(-1)

    def apply(params, x):
        return dense(params, x).reshape(-1, 2, num)

    def loss(guess, true):
        return -jnp.maximum(
            decibels(guess, true), decibels(guess[:, ::-1], true)
        ).mean()

    return supervised(
        lambda key: dense_init(key, num, 96, 96, 2 * num), apply, draw, loss
    )


def waves(num: int = 40, length: int = 90) -> Task:
    """How fast a string carries waves, place by place, from what is heard along it."""
    true = 1 + 0.3 * np.sin(np.arange(num) / 3) * (np.arange(num) > 12)

    def heard(speed, start):
        place = jnp.arange(num)
        first = jnp.exp(-0.2 * jnp.square(place - start[:, None]))

        def move(carry, _):
            now, before = carry
            bend = jnp.roll(now, 1, -1) + jnp.roll(now, -1, -1) - 2 * now
            after = (2 * now - before + 0.3 * speed * bend) * (place > 0)
            return (after, now), after[:, ::6]

        return jax.lax.scan(move, (first, first), length=length)[1]

    def draw(key, step):
        start = jax.random.uniform(key, (4,), minval=3, maxval=num - 3)
        return start, heard(jnp.array(true, jnp.float32), start)

    def apply(params, start):
        return heard(jnp.exp(params), start)

    return supervised(
        lambda key: 0.02 * jax.random.normal(key, (num,)), apply, draw, squared_error
    )
