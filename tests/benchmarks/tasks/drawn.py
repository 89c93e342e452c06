"""Tasks of likelihoods, sparse data, and weighted ones, drawn after all others."""

import jax
import jax.numpy as jnp
import numpy as np

from tasks.generative import divergence, standard_nll
from tasks.sequences import (
    rnn_init,
    unroll,
)
from tasks.task import (
    Task,
    dense,
    dense_init,
    draw_digits,
    normal,
    supervised,
)


def volatility(num: int = 32) -> Task:
    """How wild the next return is, along a market with calm and with wild times."""
    rng = np.random.default_rng(0)
    level, series = 0.0, []
    for time in range(4200):
        level = 0.97 * level + 0.15 * rng.normal()
        wild = 1.2 if 2200 < time < 2600 else 0.0
        series.append(np.exp(level + wild) * rng.standard_t(4))
    returns = jnp.array(series, jnp.float32)

    def windows(key, low, high):
        start = jax.random.randint(key, (16, 1), low, high)
        seen = returns[start + jnp.arange(num + 1)]
        features = jnp.stack([seen[:, :-1], jnp.log(jnp.abs(seen[:, :-1]) + 0.1)], -1)
        return features, 0.01 * seen[:, 1:]

    def loss(params, batch, extra):
        log_std = dense(params["out"], unroll("gru", params, batch[0])[0])
        z = batch[1][..., None] / jnp.exp(log_std)
        return standard_nll(z).mean() + log_std.mean()

    def measure(task, params, batch, extra, key):
        keys = jax.random.split(key, 16)
        batches = jax.vmap(lambda key: windows(key, 0, 4200 - num - 1))(keys)
        return jax.vmap(loss, (None, 0, None))(params, batches, extra).mean()

    return Task(
        lambda key: rnn_init(key, "gru", 2, 1, width=16),
        lambda key, step, params, extra: windows(key, 5 * step, 5 * step + 400),
        loss,
        measure=measure,
    )


def aftershocks(num: int = 80) -> Task:
    """Events of three kinds that set off others; a sum of logs, large after bursts."""
    rng = np.random.default_rng(0)
    base = np.array([0.02, 0.05, 0.01])
    sets_off = np.array([[0.12, 0.0, 0.1], [0.05, 0.1, 0.0], [0.1, 0.05, 0.1]])
    excited, seen = np.zeros(3), []
    for _ in range(6000):
        seen.append(rng.poisson(base + sets_off @ excited))
        excited = 0.8 * (excited + seen[-1])
    events = jnp.array(np.array(seen), jnp.float32)

    def init(key):
        rates = -3 + 0.1 * jax.random.normal(key, (3,))
        return {"base": rates, "sets off": jnp.full((3, 3), -4.0), "lasts": 0.0}

    def draw(key, step, params, extra):
        start = jax.random.randint(key, (16, 1), 0, 6000 - num)
        return events[start + jnp.arange(num)]

    def loss(params, batch, extra):
        decay = jax.nn.sigmoid(params["lasts"])

        def move(excited, seen):
            rate = jnp.exp(params["base"]) + excited @ jnp.exp(params["sets off"]).T
            return decay * (excited + seen), rate - seen * jnp.log(rate)

        start = jnp.zeros((len(batch), 3), batch.dtype)
        return jax.lax.scan(move, start, batch.swapaxes(0, 1))[1].sum((0, 2)).mean()

    def measure(task, params, batch, extra, key):
        return loss(params, events[:5920].reshape(-1, num, 3), extra)

    return Task(init, draw, loss, measure=measure)


def topics(num: int = 8, words: int = 120) -> Task:
    """Documents of 5 to 1,000 words as mixtures of topics; each word adds to the loss.

    The weight of the divergence rises again after each 150 steps.
    """
    rng = np.random.default_rng(0)
    chances = np.exp(2 * rng.normal(size=(num, words)))
    chances /= chances.sum(1, keepdims=True)
    length = np.clip(rng.lognormal(3.5, 1, 2000).astype(int), 5, 1000)
    mixture = rng.dirichlet(np.full(num, 0.2), 2000) @ chances
    documents = jnp.array(rng.multinomial(length, mixture), jnp.float32)

    def init(key):
        keys = jax.random.split(key)
        return {
            "encoder": dense_init(keys[0], words, 32, 2 * num, gain=0.5),
            "topics": normal(keys[1], num, words),
        }

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        return {
            "counts": documents[jax.random.randint(keys[0], (24,), 0, 2000)],
            "noise": jax.random.normal(keys[1], (24, num)),
            "weight": jnp.minimum(step % 150 / 75, 1.0),
        }

    def loss(params, batch, extra):
        counts = batch["counts"]
        outputs = dense(params["encoder"], jnp.log1p(jnp.abs(counts)))
        mean, log_std = jnp.split(outputs, 2, axis=-1)
        mixture = jax.nn.softmax(mean + jnp.exp(log_std) * batch["noise"])
        logs = jax.nn.log_softmax(mixture @ params["topics"])
        error = -(counts * logs).sum(-1)
        return (error + batch["weight"] * divergence(mean, log_std)).mean()

    def measure(task, params, batch, extra, key):
        batch = draw(key, 100, params, extra)
        return loss(params, batch, extra) / batch["counts"].sum(-1).mean()

    return Task(init, draw, loss, measure=measure)


def advertisements(num: int = 400) -> Task:
    """Which advertisements are clicked; new ones come all the time (factors)."""
    tastes = jax.random.normal(jax.random.key(1), (3, num, 4)) / 2

    def draw(key, step):
        keys = jax.random.split(key)
        rank = (num ** jax.random.uniform(keys[0], (96, 3))).astype(int) - 1
        fields = (rank + jnp.array([0, 1, 0]) * (step // 4)) % num
        each = tastes[jnp.arange(3), fields]
        chance = jax.nn.sigmoid(pairs(each) - 2)
        return fields, jax.random.bernoulli(keys[1], chance)

    def pairs(each):
        return (jnp.square(each.sum(1)) - jnp.square(each).sum(1)).sum(-1) / 2

    def init(key):
        factors = 0.1 * jax.random.normal(key, (3, num, 6))
        return {"factors": factors, "each": jnp.zeros((3, num)), "bias": jnp.zeros(1)}

    def apply(params, fields):
        index = jnp.arange(3), fields
        total = params["each"][index].sum(1) + params["bias"]
        return total + pairs(params["factors"][index])

    def loss(outputs, is_clicked):
        return -jax.nn.log_sigmoid(jnp.where(is_clicked, outputs, -outputs)).mean()

    return supervised(init, apply, draw, loss)


def logged_choices(num: int = 6) -> Task:
    """A policy from another one's log: rewards over the chances of what that chose."""
    good = normal(jax.random.key(1), 8, num, 2.0)
    usual = normal(jax.random.key(2), 8, num, 1.5)

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (32, 8))
        chances = 0.95 * jax.nn.softmax(x @ usual) + 0.05 / num
        action = jax.random.categorical(keys[1], jnp.log(chances))[:, None]
        paid = jax.nn.sigmoid(jnp.take_along_axis(x @ good, action, 1) - 1)
        return {
            "x": x,
            "action": action,
            "chance": jnp.take_along_axis(chances, action, 1),
            "reward": jax.random.bernoulli(keys[2], paid).astype(jnp.float32),
        }

    def loss(params, batch, extra):
        now = jax.nn.softmax(dense(params, batch["x"]))
        now = jnp.take_along_axis(now, batch["action"], 1)
        return -(batch["reward"] * now / batch["chance"]).mean()

    def measure(task, params, batch, extra, key):
        x = jax.random.normal(key, (256, 8))
        paid = jax.nn.softmax(dense(params, x)) * jax.nn.sigmoid(x @ good - 1)
        return -paid.sum(-1).mean()

    return Task(
        lambda key: dense_init(key, 8, 24, num, gain=0.7), draw, loss, measure=measure
    )


def worst_group(rate: float = 0.02) -> Task:
    """Low and high digits, mostly told by a tint; the worst group weighs most."""

    def draw_groups(key, share, num):
        keys = jax.random.split(key)
        x, y = draw_digits(keys[0], num)
        is_high = y >= 5
        is_tinted = is_high ^ jax.random.bernoulli(keys[1], share, (num,))
        return x + 0.5 * is_tinted[:, None], is_high, 2 * is_high + is_tinted

    def errors(params, batch):
        x, is_high, group = batch
        outputs = dense(params, x)[:, 0]
        each = -jax.nn.log_sigmoid(jnp.where(is_high, outputs, -outputs))
        member = jax.nn.one_hot(group, 4, dtype=each.dtype)
        return each @ member / jnp.maximum(member.sum(0), 1)

    def loss(params, batch, extra):
        return (jax.nn.softmax(extra) * errors(params, batch)).sum()

    def measure(task, params, batch, extra, key):
        return errors(params, draw_groups(key, 0.5, 256)).max()

    return Task(
        lambda key: dense_init(key, 196, 48, 1, gain=1),
        lambda key, step, params, extra: draw_groups(key, 0.06, 48),
        loss,
        lambda params: jnp.zeros(4),
        lambda extra, params, batch: extra + rate * errors(params, batch),
        measure,
    )


def missed_and_false(most: float = 0.1) -> Task:
    """Few positives missed, with few false ones: a multiplier holds the constraint."""

    def draw(key, num):
        keys = jax.random.split(key)
        y = jax.random.bernoulli(keys[0], 0.3, (num,))
        x = jax.random.normal(keys[1], (num, 6))
        return x.at[:, 0].set(jnp.where(y, 2.0 + x[:, 0], x[:, 0] * (1 + x[:, 1]))), y

    def errors(params, batch):
        x, y = batch
        outputs = dense(params["net"], x)[:, 0]
        missed = (jax.nn.softplus(-outputs) * y).sum() / jnp.maximum(y.sum(), 1)
        false = (jax.nn.softplus(outputs) * ~y).sum() / jnp.maximum((~y).sum(), 1)
        return missed, false - most

    def loss(params, batch, extra):
        missed, excess = errors(params, batch)
        price = jnp.exp(params["price"])[0]
        return {"net": missed + price * excess, "price": -price * excess}

    def measure(task, params, batch, extra, key):
        missed, excess = errors(params, draw(key, 512))
        return missed + 5 * jax.nn.relu(excess)

    return Task(
        lambda key: {"net": dense_init(key, 6, 32, 1, gain=1), "price": jnp.zeros(1)},
        lambda key, step, params, extra: draw(key, 48),
        loss,
        measure=measure,
        players=("net", "price"),
    )
