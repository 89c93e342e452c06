"""Tasks of labels and targets, drawn last: rare, huge, late, and wrong ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tasks.statistical import with_many
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


def rare_digit(share: float = 0.03) -> Task:
    """Which digits are an eight, as three of a hundred are."""
    images, labels = digits()
    order = jnp.asarray(np.argsort(labels == 8, kind="stable"))
    num = int((labels != 8).sum())

    def draw(key, step):
        keys = jax.random.split(key, 3)
        y = jax.random.bernoulli(keys[0], share, (32, 1))
        other = jax.random.randint(keys[1], (32,), 0, num)
        eight = jax.random.randint(keys[2], (32,), num, len(labels))
        index = order[jnp.where(y[:, 0], eight, other)]
        return jnp.asarray(images.reshape(-1, 196))[index], y

    def loss(outputs, is_eight):
        return -jax.nn.log_sigmoid(jnp.where(is_eight, outputs, -outputs)).mean()

    def init(key):
        # At first, an eight is as rare as it is.
        params = dense_init(key, 196, 32, 1, gain=0.5)
        return params | {"b1": jnp.log(share) * jnp.ones(1)}

    return with_many(supervised(init, dense, draw, loss), draw, 64)


def claims() -> Task:
    """Costs of insured cars, most of them zero and a few huge (Tweedie's deviance)."""
    effects = 0.6 * jax.random.normal(jax.random.key(1), (2, 8))

    def draw(key, step):
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (64, 8))
        number = jax.random.poisson(keys[1], 0.3 * jnp.exp(0.5 * x @ effects[0]))
        sizes = jax.random.gamma(keys[2], 0.5 * jnp.maximum(number, 1))
        cost = 3 * jnp.exp(x @ effects[1]) * sizes
        return x, jnp.where(number > 0, cost, 0.0)[:, None]

    def loss(outputs, cost):
        return 2 * (jnp.exp(outputs / 2) + cost * jnp.exp(-outputs / 2)).mean()

    task = supervised(lambda key: dense_init(key, 8, 24, 1, gain=1), dense, draw, loss)
    return with_many(task, draw, 16)


def three_scales() -> Task:
    """Three targets of scales from 0.1 to 10, each weighted by a learned variance."""
    scales = jnp.array([0.1, 1.0, 10.0])
    teacher = 2 * normal(jax.random.key(1), 6, 3)

    def init(key):
        return {"net": dense_init(key, 6, 48, 3), "log_var": jnp.zeros(3)}

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (32, 6))
        y = jnp.sin(x @ teacher) + 0.1 * jax.random.normal(keys[1], (32, 3))
        return x, scales * y

    def loss(params, batch, extra):
        errors = jnp.square(dense(params["net"], batch[0]) - batch[1]).mean(0)
        return (errors * jnp.exp(-params["log_var"]) + params["log_var"]).sum()

    def measure(task, params, batch, extra, key):
        return squared_error(dense(params["net"], batch[0]) / scales, batch[1] / scales)

    return Task(init, draw, loss, measure=measure)


def hard_negatives(start: int = 200) -> Task:
    """Pairs of digits, near or apart; from step 200 on against the nearest others."""

    def parts(params, batch):
        z, labels = dense(params, batch[0]), batch[1]
        apart = jnp.square(z[:, None] - z).sum(-1)
        is_same = labels[:, None] == labels
        push = jnp.square(jax.nn.relu(1 - jnp.sqrt(apart + 1e-6)))
        push = jnp.where(is_same, 0.0, push)
        pull = (apart * is_same).sum() / is_same.sum()
        return pull, push.sum() / (~is_same).sum(), push.max(1).mean()

    def loss(params, batch, extra):
        pull, usual, hard = parts(params, batch)
        return pull + jnp.where(batch[2] < start, usual, hard)

    def measure(task, params, batch, extra, key):
        pull, push, _ = parts(params, batch)
        return pull + push

    return Task(
        lambda key: dense_init(key, 196, 48, 8, gain=0.5),
        lambda key, step, params, extra: (*draw_digits(key, 48), jnp.asarray(step)),
        loss,
        measure=measure,
    )


def on_all_digits(task: Task, apply=dense) -> Task:
    """Judged by 128 digits as they are."""

    def measure(task, params, batch, extra, key):
        x, y = draw_digits(key, 128)
        return cross_entropy(apply(params, x), y)

    return dataclasses.replace(task, measure=measure)


def more_classes(every: int = 100) -> Task:
    """Digits, zeros and ones at first; after each 100 steps there are two more."""
    images, labels = digits()
    order = np.argsort(labels, kind="stable")
    counts = np.cumsum(np.bincount(labels))[1::2]

    def draw(key, step):
        most = jnp.asarray(counts)[jnp.minimum(step // every, 4)]
        index = jnp.asarray(order)[jax.random.randint(key, (32,), 0, most)]
        return jnp.asarray(images.reshape(-1, 196))[index], jnp.asarray(labels)[index]

    return on_all_digits(
        supervised(lambda key: dense_init(key, 196, 48, 10), dense, draw, cross_entropy)
    )


def late_noise(start: int = 300, share: float = 0.4) -> Task:
    """Digits; from step 300 on, four of ten labels are random."""

    def draw(key, step):
        keys = jax.random.split(key, 3)
        x, y = draw_digits(keys[0])
        chance = jnp.where(step < start, 0.0, share)
        is_wrong = jax.random.bernoulli(keys[1], chance, (32,))
        return x, jnp.where(is_wrong, jax.random.randint(keys[2], (32,), 0, 10), y)

    return on_all_digits(
        supervised(lambda key: dense_init(key, 196, 48, 10), dense, draw, cross_entropy)
    )


def unfreezing(start: int = 300) -> Task:
    """A network that knows low digits learns all; its body is frozen for 300 steps."""

    def init(key):
        keys = jax.random.split(key, 3)

        def step(params, key):
            x, y = draw_digits(key)
            grads = jax.grad(lambda params: cross_entropy(dense(params, x), y % 5))(
                params
            )
            return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), None

        params = dense_init(keys[0], 196, 48, 32, 5)
        params, _ = jax.lax.scan(step, params, jax.random.split(keys[1], 200))
        return params | {"w2": normal(keys[2], 32, 10, 0.2), "b2": jnp.zeros(10)}

    def loss(params, batch, extra):
        x, y, step = batch
        body = {name: params[name] for name in ("w0", "b0", "w1", "b1")}
        frozen = jax.tree.map(
            lambda x: jnp.where(step < start, jax.lax.stop_gradient(x), x), body
        )
        return cross_entropy(dense(params | frozen, x), y)

    return Task(
        init,
        lambda key, step, params, extra: (*draw_digits(key), jnp.asarray(step)),
        loss,
    )


def quantized(start: int = 200, most: int = 3) -> Task:
    """Digits, by weights that are rounded to seven levels from step 200 on."""

    def rounded(x):
        scale = jnp.abs(x).max() / most
        return x + jax.lax.stop_gradient(jnp.round(x / scale) * scale - x)

    def loss(params, batch, extra):
        x, y, step = batch
        params = jax.tree.map(
            lambda x: jnp.where((step >= start) & (x.ndim > 1), rounded(x), x), params
        )
        return cross_entropy(dense(params, x), y)

    return Task(
        lambda key: dense_init(key, 196, 48, 48, 10),
        lambda key, step, params, extra: (*draw_digits(key), jnp.asarray(step)),
        loss,
    )


def averaged_weights(decay: float = 0.98) -> Task:
    """Friedman's function of ten variables, judged at running means of the weights."""

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        x = jax.random.uniform(keys[0], (32, 10))
        y = 10 * jnp.sin(jnp.pi * x[:, 0] * x[:, 1]) + 20 * jnp.square(x[:, 2] - 0.5)
        y += 10 * x[:, 3] + 5 * x[:, 4] + jax.random.normal(keys[1], (32,))
        return x, y[:, None]

    return Task(
        init=lambda key: dense_init(key, 10, 48, 48, 1),
        batch=draw,
        loss=lambda params, batch, extra: squared_error(
            dense(params, batch[0]), batch[1]
        ),
        extra=lambda params: params,
        follow=lambda extra, params, batch: jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new, extra, params
        ),
        measure=lambda task, params, batch, extra, key: task.loss(extra, batch, ()),
    )


def other_domain() -> Task:
    """Labels of digits, by features that do not tell paler digits from the others."""

    def paler(key, x):
        return 0.5 * x + 0.2 + 0.3 * jax.random.normal(key, x.shape)

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "body": dense_init(keys[0], 196, 48, 24),
            "labels": dense_init(keys[1], 24, 10, gain=1),
            "domain": dense_init(keys[2], 24, 24, 1, gain=1),
        }

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        (x, y), (other, _) = draw_digits(keys[0]), draw_digits(keys[1])
        weight = 0.6 * jax.nn.sigmoid(step / 60) - 0.3
        return jnp.concatenate([x, paler(keys[2], other)]), y, weight

    def loss(params, batch, extra):
        x, y, weight = batch
        z = jax.nn.relu(dense(params["body"], x))
        # The slope of what the domain is told from has its sign reversed.
        reversed = jax.lax.stop_gradient((1 + weight) * z) - weight * z
        sign = jnp.where(jnp.arange(64) < 32, 1.0, -1.0)[:, None]
        logs = jax.nn.log_sigmoid(sign * dense(params["domain"], reversed))
        return cross_entropy(dense(params["labels"], z[:32]), y) - logs.mean()

    def measure(task, params, batch, extra, key):
        keys = jax.random.split(key)
        x, y = draw_digits(keys[0], 128)
        z = jax.nn.relu(dense(params["body"], paler(keys[1], x)))
        return cross_entropy(dense(params["labels"], z), y)

    return Task(init, draw, loss, measure=measure)
