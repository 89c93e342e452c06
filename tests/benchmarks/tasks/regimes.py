"""Tasks that change while they are learned, or whose training has sudden phases."""

import jax
import jax.numpy as jnp
import numpy as np

from tasks.networks import classifier
from tasks.task import (
    Task,
    cross_entropy,
    dense,
    dense_init,
    digits,
    draw_digits,
    squared_error,
    supervised,
)


def classifier_of(draw) -> Task:
    return supervised(
        lambda key: dense_init(key, 196, 32, 32, 10), dense, draw, cross_entropy
    )


def alternating(every: int = 100, num: int = 2) -> Task:
    """Digits whose pixels are in one of `num` orders, for `every` steps each."""
    rng = np.random.default_rng(0)
    orders = np.stack([rng.permutation(196) for _ in range(num)])

    def draw(key, step):
        x, y = draw_digits(key)
        return x[:, jnp.asarray(orders)[step // every % num]], y

    return classifier_of(draw)


def shards(every: int = 40) -> Task:
    """Four of five digits are of the two classes of a shard, read for 40 steps."""
    images, labels = digits()
    order = np.argsort(labels, kind="stable")

    def draw(key, step):
        keys = jax.random.split(key, 3)
        first = step // every % 5 * (len(order) // 5)
        inside = first + jax.random.randint(keys[0], (32,), 0, len(order) // 5)
        any = jax.random.randint(keys[1], (32,), 0, len(order))
        is_inside = jax.random.bernoulli(keys[2], 0.8, (32,))
        index = jnp.asarray(order)[jnp.where(is_inside, inside, any)]
        return jnp.asarray(images.reshape(-1, 196))[index], jnp.asarray(labels)[index]

    task = classifier_of(draw)
    return Task(
        task.init,
        task.batch,
        task.loss,
        measure=lambda task, params, batch, extra, key: task.loss(
            params, draw_digits(key, 128), extra
        ),
    )


def pruning(start: int = 300, share: float = 0.9) -> Task:
    """A classifier of digits, most weights of which are removed at step 300."""
    base = classifier(2)

    def pruned(params):
        return jax.tree.map(
            lambda x: (
                (jnp.abs(x) >= jnp.quantile(jnp.abs(x), share)).astype(x.dtype)
                if x.ndim > 1
                else jnp.ones_like(x)
            ),
            params,
        )

    def draw(key, step, params, extra):
        return *draw_digits(key), jnp.asarray(step)

    def loss(params, batch, masks):
        params = jax.tree.map(jnp.multiply, params, masks)
        return cross_entropy(dense(params, batch[0]), batch[1])

    def follow(masks, params, batch):
        return jax.lax.cond(batch[2] == start, lambda: pruned(params), lambda: masks)

    return Task(
        base.init,
        draw,
        loss,
        lambda params: jax.tree.map(jnp.ones_like, params),
        follow,
    )


def smoothing(start: int = 300, share: float = 0.3) -> Task:
    """Digits with smoothed labels, until step 300; judged by the bare labels."""

    def draw(key, step):
        x, y = draw_digits(key)
        part = jnp.where(step < start, share, 0.0)
        return x, (1 - part) * jax.nn.one_hot(y, 10) + part / 10

    def loss(outputs, chances):
        return -(chances * jax.nn.log_softmax(outputs)).sum(-1).mean()

    task = supervised(lambda key: dense_init(key, 196, 32, 32, 10), dense, draw, loss)
    return Task(
        task.init,
        task.batch,
        task.loss,
        measure=lambda task, params, batch, extra, key: cross_entropy(
            dense(params, batch[0]), batch[1].argmax(-1)
        ),
    )


def late_dropout(start: int = 200, rate: float = 0.5) -> Task:
    """Digits; from step 200 on, a half of all hidden units is left out."""
    base = classifier(1)

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        is_kept = jax.random.bernoulli(keys[1], 1 - rate, (32, 32)) / (1 - rate)
        return *draw_digits(keys[0]), jnp.where(step < start, 1.0, is_kept)

    def loss(params, batch, extra):
        x, y, is_kept = batch
        hidden = jax.nn.relu(x @ params["w0"] + params["b0"]) * is_kept
        return cross_entropy(hidden @ params["w1"] + params["b1"], y)

    return Task(
        base.init,
        draw,
        loss,
        measure=lambda task, params, batch, extra, key: task.loss(
            params, (*batch[:2], jnp.ones((32, 32))), extra
        ),
    )


def shrinking_batches() -> Task:
    """Digits in batches of 64, then 16 from step 200 on, and 4 from step 400 on."""

    def draw(key, step):
        x, y = draw_digits(key, 64)
        return x, {"y": y, "is_used": jnp.arange(64) < 64 // 4 ** (step // 200)}

    def loss(outputs, targets):
        logs = jax.nn.log_softmax(outputs)
        each = -jnp.take_along_axis(logs, targets["y"][:, None], axis=-1)[:, 0]
        return (each * targets["is_used"]).sum() / targets["is_used"].sum()

    task = supervised(lambda key: dense_init(key, 196, 32, 10), dense, draw, loss)
    return Task(
        task.init,
        task.batch,
        task.loss,
        measure=lambda task, params, batch, extra, key: cross_entropy(
            dense(params, batch[0]), batch[1]["y"]
        ),
    )


def hard_examples(num: int = 8) -> Task:
    """Digits, of which the 8 worst of each batch of 64 are learned; judged by all."""

    def loss(params, batch, extra, num=num):
        logs = jax.nn.log_softmax(dense(params, batch[0]))
        each = -jnp.take_along_axis(logs, batch[1][:, None], axis=-1)[:, 0]
        return jax.lax.top_k(each, num)[0].mean()

    return Task(
        init=lambda key: dense_init(key, 196, 32, 10),
        batch=lambda key, step, params, extra: draw_digits(key, 64),
        loss=loss,
        measure=lambda task, params, batch, extra, key: loss(params, batch, extra, 64),
    )


def adversarial(start: int = 150, size: float = 0.2) -> Task:
    """Digits, moved to where the loss rises most from step 150 on."""

    def draw(key, step, params, extra):
        x, y = draw_digits(key)
        slope = jax.grad(lambda x: cross_entropy(dense(params, x), y))(x)
        return x + jnp.where(step < start, 0, size) * jnp.sign(slope), y

    return Task(
        init=lambda key: dense_init(key, 196, 32, 10),
        batch=draw,
        loss=lambda params, batch, extra: cross_entropy(
            dense(params, batch[0]), batch[1]
        ),
    )


def modular_addition(modulus: int = 17) -> Task:
    """Sums modulo 17 of four fifths of all pairs, all in one batch."""
    pairs = np.random.default_rng(0).permutation(modulus**2)
    num = len(pairs) * 4 // 5

    def init(key):
        keys = jax.random.split(key)
        table = 0.5 * jax.random.normal(keys[0], (modulus, 24))
        return {"table": table, "dense": dense_init(keys[1], 24, 64, modulus)}

    def loss(params, index, extra):
        a, b = jnp.divmod(index, modulus)
        x = params["table"][a] + params["table"][b]
        return cross_entropy(dense(params["dense"], x), (a + b) % modulus)

    return Task(
        init=init,
        batch=lambda key, step, params, extra: jnp.asarray(pairs[:num]),
        loss=loss,
    )


def penalty(every: int = 120) -> Task:
    """A curve through noisy points and a boundary, whose weight grows tenfold."""

    def parts(params, x, y):
        ends = jnp.array([[-1.0], [1.0]])
        error = squared_error(dense(params, x, jnp.tanh), y)
        return error, squared_error(
            dense(params, ends, jnp.tanh), jnp.array([[1.0], [-1.0]])
        )

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        x = jax.random.uniform(keys[0], (32, 1), minval=-1)
        y = jnp.sin(5 * x) + 0.3 * jax.random.normal(keys[1], (32, 1))
        return {"x": x, "y": y, "weight": 0.1 * 10.0 ** (step // every)}

    def loss(params, batch, extra):
        error, outside = parts(params, batch["x"], batch["y"])
        return error + batch["weight"] * outside

    def measure(task, params, batch, extra, key):
        error, outside = parts(params, batch["x"], batch["y"])
        return error + 10 * outside

    return Task(lambda key: dense_init(key, 1, 32, 32, 1), draw, loss, measure=measure)
