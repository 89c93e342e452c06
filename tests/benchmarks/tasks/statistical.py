"""Tasks of statistics: counts, ranks, rare events, latent variables, transport."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tasks.generative import energy_distance
from tasks.sequences import rnn_init, unroll
from tasks.task import Task, dense, dense_init, draw_blobs, normal, supervised


def counts() -> Task:
    """Counts with a log link, of means from 0.1 to hundreds; the loss is negative."""
    effects = normal(jax.random.key(1), 10, 1, 1.3)[:, 0]

    def draw(key, step):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (64, 10))
        y = jax.random.poisson(keys[1], jnp.exp(1.5 + x @ effects))
        return x, y[:, None].astype(jnp.float32)

    def loss(outputs, targets):
        return (jnp.exp(outputs) - targets * outputs).mean()

    return supervised(lambda key: dense_init(key, 10, 24, 1, gain=1), dense, draw, loss)


def quantiles() -> Task:
    """Three quantiles of targets whose noise is heavy-tailed and grows with x."""
    levels = jnp.array([0.1, 0.5, 0.9])

    def draw(key, step):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (32, 4))
        noise = jax.random.t(keys[1], 1.5, (32,)) * jnp.exp(x[:, 1])
        return x, (3 * jnp.sin(2 * x[:, 0]) + noise)[:, None]

    def loss(outputs, targets):
        error = targets - outputs
        return jnp.maximum(levels * error, (levels - 1) * error).mean()

    return supervised(lambda key: dense_init(key, 4, 32, 3), dense, draw, loss)


def ranking() -> Task:
    """Ranks 8 documents of each query with a hinge; most gradients become zero."""
    teacher = normal(jax.random.key(1), 10, 1)[:, 0]

    def draw(key, step):
        x = jax.random.normal(key, (8, 8, 10))
        return x, jnp.tanh(x @ teacher)

    def loss(outputs, relevance):
        gap = outputs - outputs.swapaxes(1, 2)
        is_better = relevance[:, :, None] > relevance[:, None] + 0.5
        return (is_better * jax.nn.relu(1 - gap)).sum() / is_better.sum()

    return supervised(lambda key: dense_init(key, 10, 24, 1), dense, draw, loss)


def rare_positives(weight: float = 30.0, focus: float = 0.0) -> Task:
    """One of 100 is positive, and weighs more; most batches of 32 have none.

    Args:
        weight: Of a positive.
        focus: The power of the focal loss.
    """
    shift = 2.5 * normal(jax.random.key(1), 1, 10)[0] / math.sqrt(3)

    def draw(key, step):
        keys = jax.random.split(key)
        y = jax.random.bernoulli(keys[0], 0.01, (32, 1))
        return jax.random.normal(keys[1], (32, 10)) + y * shift, y

    def loss(outputs, is_positive):
        logs = jax.nn.log_sigmoid(jnp.where(is_positive, outputs, -outputs))
        each = jnp.where(is_positive, weight, 1.0)
        each *= (-jnp.expm1(logs)) ** focus if focus else 1.0
        return -(each * logs).mean()

    task = supervised(lambda key: dense_init(key, 10, 24, 1), dense, draw, loss)
    return with_many(task, draw, 64)


def with_many(task: Task, draw, num: int) -> Task:
    """Judged by the mean loss of `num` batches."""

    def measure(task, params, batch, extra, key):
        keys = jax.random.split(key, num)
        batches = jax.vmap(lambda key: draw(key, 0))(keys)
        return jax.vmap(task.loss, (None, 0, None))(params, batches, extra).mean()

    return Task(task.init, task.batch, task.loss, measure=measure)


def survival() -> Task:
    """Cox's partial likelihood of times until an event, of which half are censored."""
    effects = normal(jax.random.key(1), 12, 1, 2.0)[:, 0]

    def draw(key, step):
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (64, 12))
        time = jax.random.exponential(keys[1], (64,)) * jnp.exp(-x @ effects)
        end = jax.random.exponential(keys[2], (64,))
        return x, {"time": jnp.minimum(time, end), "is_event": time < end}

    def loss(outputs, seen):
        order = jnp.argsort(-seen["time"])
        risk = outputs[order, 0]
        logs = risk - jax.lax.cumlogsumexp(risk)
        return -(logs * seen["is_event"][order]).sum() / seen["is_event"].sum()

    return supervised(lambda key: dense_init(key, 12, 24, 1), dense, draw, loss)


def recommender() -> Task:
    """Hashed embeddings of users and of items, a few of which are in most batches."""
    rng = np.random.default_rng(0)
    tastes, traits = rng.normal(size=(2, 400, 4)).astype(np.float32)

    def init(key):
        tables = 0.1 * jax.random.normal(key, (2, 256, 8))
        return {"users": tables[0], "items": tables[1], "bias": jnp.zeros(256)}

    def draw(key, step):
        keys = jax.random.split(key)
        user, item = (400 ** jax.random.uniform(keys[0], (2, 128))).astype(int) - 1
        taste = (jnp.asarray(tastes)[user] * jnp.asarray(traits)[item]).sum(-1)
        is_liked = jax.random.bernoulli(keys[1], jax.nn.sigmoid(2 * taste - 1))
        return {"user": user * 37 % 256, "item": item * 101 % 256}, is_liked

    def apply(params, x):
        product = (params["users"][x["user"]] * params["items"][x["item"]]).sum(-1)
        return product + params["bias"][x["item"]]

    def loss(outputs, is_liked):
        return -jax.nn.log_sigmoid(jnp.where(is_liked, outputs, -outputs)).mean()

    return supervised(init, apply, draw, loss)


def transport_cost(x, y, blur: float = 0.2, num: int = 20) -> jax.Array:
    """Of two samples, by Sinkhorn's iteration on the logarithms."""
    cost = jnp.square(x[:, None] - y).sum(-1)

    def step(dual, _):
        other = -blur * jax.nn.logsumexp((dual - cost) / blur, axis=1)
        other += blur * math.log(len(x))
        new = -blur * jax.nn.logsumexp((other[:, None] - cost) / blur, axis=0)
        return new + blur * math.log(len(x)), other

    dual, others = jax.lax.scan(step, jnp.zeros(len(y)), length=num)
    return dual.mean() + others[-1].mean()


def transport() -> Task:
    """A generator of 8 Gaussians descends the cost of optimal transport."""

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        return draw_blobs(keys[0]), jax.random.normal(keys[1], (64, 4))

    def measure(task, params, batch, extra, key):
        keys = jax.random.split(key)
        fake = dense(params, jax.random.normal(keys[0], (256, 4)))
        return energy_distance(fake, draw_blobs(keys[1], 256))

    return Task(
        init=lambda key: dense_init(key, 4, 32, 32, 2),
        batch=draw,
        loss=lambda params, batch, extra: transport_cost(
            dense(params, batch[1]), batch[0]
        ),
        measure=measure,
    )


def alignment() -> Task:
    """Four symbols in twelve noisy frames, without being told where (CTC)."""
    patterns = jax.random.normal(jax.random.key(1), (7, 8))

    def draw(key, step):
        keys = jax.random.split(key, 3)
        labels = jax.random.randint(keys[0], (16, 4), 1, 7)
        # Of the three frames of a symbol one is silence.
        frames = (labels[..., None] * jnp.array([1, 1, 0])).reshape(16, 12)
        shift = jax.random.randint(keys[1], (16, 1), 0, 3)
        frames = jnp.take_along_axis(frames, (jnp.arange(12) + shift) % 12, axis=1)
        noise = 0.3 * jax.random.normal(keys[2], (16, 12, 8))
        return patterns[frames] + noise, labels

    def apply(params, x):
        return dense(params["out"], unroll("gru", params, x)[0])

    def loss(outputs, labels):
        zeros = jnp.zeros(outputs.shape[:2]), jnp.zeros(labels.shape)
        return optax.ctc_loss(outputs, zeros[0], labels, zeros[1]).mean()

    return supervised(lambda key: rnn_init(key, "gru", 8, 7), apply, draw, loss)


def schools() -> Task:
    """A normal posterior of eight effects and of their scale: Neal's funnel."""
    effects = jnp.array([28.0, 8, -3, 7, -1, 1, 18, 12]) / 10
    errors = jnp.array([15.0, 10, 16, 11, 9, 11, 10, 18]) / 10

    def loss(params, noise, extra):
        del extra
        z = params["mean"] + jnp.exp(params["log_std"]) * noise
        mean, log_scale, each = z[:, :1], z[:, 1:2], z[:, 2:]
        prior = 0.5 * jnp.square((each - mean) / jnp.exp(log_scale)) + log_scale
        seen = 0.5 * jnp.square((each - effects) / errors)
        top = 0.5 * (jnp.square(mean) + jnp.square(log_scale)).sum(-1)
        return ((prior + seen).sum(-1) + top).mean() - params["log_std"].sum()

    return Task(
        init=lambda key: {"mean": jnp.zeros(10), "log_std": jnp.full(10, -1.0)},
        batch=lambda key, step, params, extra: jax.random.normal(key, (4, 10)),
        loss=loss,
        measure=lambda task, params, batch, extra, key: task.loss(
            params, jax.random.normal(key, (1024, 10)), extra
        ),
    )


def filtering() -> Task:
    """A Kalman filter's coefficients, by the likelihood of one series: no noise."""
    rng = np.random.default_rng(0)
    state, series = 0.0, []
    for _ in range(60):
        state = 0.9 * state + 0.1 * rng.normal()
        series.append(state + 0.05 * rng.normal())

    def loss(params, batch, extra):
        del extra
        decay, (moves, errors) = params["decay"], jnp.exp(2 * params["log_std"])

        def step(carry, seen):
            mean, variance = decay * carry[0], decay**2 * carry[1] + moves
            total = variance + errors
            gain, error = variance / total, seen - mean
            carry = mean + gain * error, (1 - gain) * variance
            return carry, 0.5 * (jnp.square(error) / total + jnp.log(total))

        return jax.lax.scan(step, (0.0, 1.0), batch)[1].mean()

    return Task(
        init=lambda key: {
            "decay": 0.2 + 0.1 * jax.random.normal(key),
            "log_std": jnp.zeros(2),
        },
        batch=lambda key, step, params, extra: jnp.array(series, jnp.float32),
        loss=loss,
    )
