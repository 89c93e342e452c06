"""Tasks of values, games, samples and functions that chose nothing."""

import math

import jax
import jax.numpy as jnp

from tasks.task import (
    Task,
    dense,
    dense_init,
    draw_digits,
    squared_error,
    supervised,
)


def slow_copy(extra, params, batch):
    del batch
    return jax.tree.map(lambda old, new: 0.95 * old + 0.05 * new, extra, params)


def quantile_values(num: int = 9, decay: float = 0.9) -> Task:
    """Quantiles of what a walk around a circle will pay, by its own next ones."""
    levels = (jnp.arange(num) + 0.5) / num
    ahead = decay * jnp.exp(-0.045 + 0.4j)

    def values(params, x):
        return dense(params, jnp.stack([jnp.sin(x), jnp.cos(x)], axis=-1))

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        x = 2 * math.pi * jax.random.uniform(keys[0], (48,))
        after = x + 0.4 + 0.3 * jax.random.normal(keys[1], (48,))
        return x, after, jnp.cos(x) + jax.random.t(keys[2], 3.0, (48,)) / 2

    def loss(params, batch, extra):
        x, after, pay = batch
        target = pay[:, None] + decay * jax.lax.stop_gradient(values(params, after))
        error = target[:, None] - values(params, x)[..., None]
        size = jnp.abs(error)
        huber = jnp.where(size < 1, jnp.square(error) / 2, size - 0.5)
        return (jnp.abs(levels[:, None] - (error < 0)) * huber).mean()

    def measure(task, params, batch, extra, key):
        x = jnp.linspace(0, 2 * math.pi, 64)
        true = jnp.real(jnp.exp(1j * x) / (1 - ahead))
        return squared_error(values(params, x).mean(-1), true)

    return Task(lambda key: dense_init(key, 2, 32, num), draw, loss, measure=measure)


def stock() -> Task:
    """How much to order for a stock, by the gloomier of two critics (TD3)."""

    def order(actor, state):
        return jax.nn.softplus(dense(actor, state, jnp.tanh))

    def worth(critics, state, much):
        x = jnp.concatenate([state, much], axis=-1)
        return jnp.stack([dense(critic, x)[..., 0] for critic in critics])

    def move(key, state, much):
        wanted = jnp.exp(0.3 * jax.random.normal(key, much.shape) + 0.5 * state[:, 1:])
        left = jnp.clip(state[:, :1] + much - wanted, -4, 4)
        turned = 0.8 * state[:, 1:] + 0.6 * jax.random.normal(key, much.shape)
        price = jnp.where(left > 0, left, -4 * left) + 0.2 * much
        return jnp.concatenate([left, turned], axis=-1), price[:, 0]

    def init(key):
        keys = jax.random.split(key, 3)
        critics = [dense_init(k, 3, 32, 1) for k in keys[1:]]
        return {"actor": dense_init(keys[0], 2, 24, 1, gain=0.5), "critics": critics}

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 4)
        state = 1.5 * jax.random.normal(keys[0], (64, 2))
        noise = jax.random.normal(keys[1], (2, 64, 1))
        much = jax.nn.relu(order(params["actor"], state) + 0.5 * noise[0])
        return state, much, *move(keys[2], state, much), 0.2 * noise[1]

    def loss(params, batch, extra):
        state, much, after, price, noise = batch
        next_much = jax.nn.relu(order(extra["actor"], after) + noise)
        target = price + 0.9 * worth(extra["critics"], after, next_much).max(0)
        own = worth(params["critics"], state, order(params["actor"], state))
        errors = jnp.square(worth(params["critics"], state, much) - target)
        return {"actor": own[0].mean(), "critics": errors.mean()}

    def measure(task, params, batch, extra, key):
        def day(state, key):
            return move(key, state, order(params["actor"], state))

        first = jnp.zeros((32, 2))
        return jax.lax.scan(day, first, jax.random.split(key, 20))[1].mean()

    players = "actor", "critics"
    return Task(init, draw, loss, lambda params: params, slow_copy, measure, players)


def instruments() -> Task:
    """What x does to y, though both have a hidden cause: a critic looks for errors."""

    def draw(key, step, params, extra):
        z, hidden, noise = jax.random.normal(key, (3, 64, 1))
        x = z + 0.5 * hidden
        return z, x, jnp.abs(x) + hidden + 0.1 * noise

    def loss(params, batch, extra):
        z, x, y = batch
        doubt = dense(params["critic"], z)
        error = (doubt * (y - dense(params["answer"], x))).mean()
        return {
            "answer": error,
            "critic": 0.5 * jnp.square(doubt).mean() - error,
        }

    def measure(task, params, batch, extra, key):
        x = jnp.linspace(-2, 2, 64)[:, None]
        return squared_error(dense(params["answer"], x), jnp.abs(x))

    def init(key):
        keys = jax.random.split(key)
        return {
            "answer": dense_init(keys[0], 1, 32, 1),
            "critic": dense_init(keys[1], 1, 32, 1),
        }

    players = "answer", "critic"
    return Task(init, draw, loss, measure=measure, players=players)


def pursuit(length: int = 12) -> Task:
    """One runs after another, who is faster but turns slowly; each learns by both."""

    def chase(pursuer, runner, start):
        def move(state, _):
            gap, speed = state[:, :2], state[:, 2:]
            speed = 0.7 * speed + 0.3 * jnp.tanh(dense(runner, state, jnp.tanh))
            step = 0.8 * jnp.tanh(dense(pursuer, state, jnp.tanh))
            gap = gap + 0.3 * (1.5 * speed - step)
            return jnp.concatenate([gap, speed], axis=-1), jnp.square(gap).sum(-1)

        return jax.lax.scan(move, start, length=length)[1].mean()

    def loss(params, batch, extra):
        far = chase(params["pursuer"], params["runner"], batch)
        return {"pursuer": far, "runner": -far}

    def measure(task, params, batch, extra, key):
        """How far one stays who runs as the first one did."""
        return chase(params["pursuer"], extra["runner"], batch)

    def init(key):
        keys = jax.random.split(key)
        players = "pursuer", "runner"
        return {
            name: dense_init(k, 4, 16, 2) for name, k in zip(players, keys, strict=True)
        }

    return Task(
        init,
        lambda key, step, params, extra: jax.random.normal(key, (48, 4)),
        loss,
        lambda params: params,
        measure=measure,
        players=("pursuer", "runner"),
    )


def boltzmann(num: int = 32) -> Task:
    """Digits in black and white, less likely wherever a short chain went (RBM)."""

    def seen(key):
        x = draw_digits(key)[0].reshape(-1, 7, 2, 7, 2).mean((2, 4))
        return (x.reshape(-1, 49) > 0.3).astype(jnp.float32)

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        x = seen(keys[0])
        chance = jax.nn.sigmoid(x @ params["w"] + params["hidden"])
        hidden = jax.random.bernoulli(keys[1], chance).astype(jnp.float32)
        chance = jax.nn.sigmoid(hidden @ params["w"].T + params["seen"])
        return x, jax.random.bernoulli(keys[2], chance).astype(jnp.float32)

    def energy(params, x):
        inner = jax.nn.softplus(x @ params["w"] + params["hidden"]).sum(-1)
        return -(x @ params["seen"] + inner).mean()

    def measure(task, params, batch, extra, key):
        """How unlikely digits are after one step of the chain."""
        x = seen(key)
        hidden = jax.nn.sigmoid(x @ params["w"] + params["hidden"])
        outputs = hidden @ params["w"].T + params["seen"]
        return (jax.nn.softplus(outputs) - x * outputs).sum(-1).mean()

    def init(key):
        w = 0.01 * jax.random.normal(key, (49, num))
        return {"w": w, "seen": jnp.zeros(49), "hidden": jnp.zeros(num)}

    def loss(params, batch, extra):
        return energy(params, batch[0]) - energy(params, batch[1])

    return Task(init, draw, loss, measure=measure)


def hypernetwork(num: int = 8) -> Task:
    """A network makes the weights of another one, from the height and pace of waves."""

    def draw(key, step):
        keys = jax.random.split(key, 3)
        x = jax.random.uniform(keys[0], (16, 12, 1), minval=-2, maxval=2)
        wave = jax.random.uniform(keys[1], (16, 1, 3), minval=0.5, maxval=1.5)
        y = wave[..., :1] * jnp.sin(2 * wave[..., 1:2] * x + 3 * wave[..., 2:])
        return (wave[:, 0], x), y

    def apply(params, inputs):
        wave, x = inputs
        made = dense(params, wave)
        first, bias, last = jnp.split(made[:, None, :-1], 3, axis=-1)
        hidden = jnp.tanh(x * first + bias)
        return (hidden * last).sum(-1, keepdims=True) + made[:, None, -1:]

    def init(key):
        return dense_init(key, 3, 48, 3 * num + 1, gain=1)

    return supervised(init, apply, draw, squared_error)


def small_fields(scale: float = 1e-3) -> Task:
    """How a rod's few thousandths of heat will spread (an operator network)."""
    sensors = (jnp.arange(16) + 0.5) / 16
    waves = math.pi * jnp.arange(1, 5)

    def draw(key, step):
        keys = jax.random.split(key, 2)
        sizes = jax.random.normal(keys[0], (24, 4)) / jnp.arange(1, 5)
        place = jax.random.uniform(keys[1], (20, 2))
        modes = jnp.sin(place[:, :1] * waves)
        modes *= jnp.exp(-0.05 * place[:, 1:] * jnp.square(waves))
        return (sizes @ jnp.sin(sensors * waves[:, None]), place), sizes @ modes.T

    def apply(params, x):
        branch, trunk = dense(params["branch"], x[0]), dense(params["trunk"], x[1])
        return scale * branch @ trunk.T / 4

    def init(key):
        keys = jax.random.split(key)
        return {
            "branch": dense_init(keys[0], 16, 32, 16),
            "trunk": dense_init(keys[1], 2, 32, 16),
        }

    return supervised(
        init, apply, draw, lambda outputs, y: squared_error(outputs, scale * y)
    )
