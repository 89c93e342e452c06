"""Tasks of physics, densities, games, and policies, drawn after all others."""

import math

import jax
import jax.numpy as jnp

from tasks.generative import affine_couplings
from tasks.networks import runge_kutta
from tasks.reinforcement import cost, drive, pushed
from tasks.task import (
    Task,
    dense,
    dense_init,
    with_nothing_left_out,
)


def predators() -> Task:
    """Prey and predators; how they meet is learned over longer and longer times."""

    def slope(meet):
        def move(x):
            eaten, fed = jnp.split(meet(x), 2, axis=-1)
            return jnp.concatenate([1.0 - eaten, fed - 1.0], axis=-1)

        return move

    def draw(key, step, params, extra):
        x = 0.6 * jax.random.normal(key, (16, 2))
        true = runge_kutta(slope(lambda x: jnp.exp(x[..., ::-1])), x, 30, 0.1)
        return x, true, jnp.arange(30) < 8 + jnp.minimum(step // 20, 22)

    def loss(params, batch, extra, is_all=False):
        x, true, is_used = batch

        def meet(x):
            return jnp.exp(dense(params, x, jnp.tanh))

        errors = jnp.square(runge_kutta(slope(meet), x, 30, 0.1) - true)
        return errors.mean(where=True if is_all else is_used[:, None, None])

    return Task(
        lambda key: dense_init(key, 2, 24, 2, gain=0.5),
        draw,
        loss,
        measure=with_nothing_left_out(loss),
    )


def two_wells() -> Task:
    """A flow samples from an energy with two wells, that is cooled for 300 steps."""

    def energy(x):
        depth = 2 * jnp.square(jnp.square(x[:, 0]) - 2) + x[:, 0]
        return depth + 4 * jnp.square(x[:, 1] - jnp.sin(x[:, 0]))

    def loss(params, batch, extra):
        noise, coldness = batch
        x, log_det = affine_couplings(params, noise)
        return (coldness * energy(x) - log_det).mean()

    def draw(key, step, params, extra):
        noise = jax.random.normal(key, (64, 2))
        return noise, 0.05 + 0.95 * jnp.minimum(step / 300, 1)

    def measure(task, params, batch, extra, key):
        return loss(params, (jax.random.normal(key, (512, 2)), 1.0), extra)

    return Task(
        lambda key: [
            dense_init(k, 1, 24, 2, gain=0.5) for k in jax.random.split(key, 6)
        ],
        draw,
        loss,
        measure=measure,
    )


def ground_state(size: int = 3) -> Task:
    """The lowest energy of three oscillators that repel; walkers follow the state."""

    def log_size(params, x):
        return dense(params, x, jnp.tanh)[0] - 0.05 * jnp.square(x).sum()

    def walk(params, x, key):
        keys = jax.random.split(key)
        after = x + 0.7 * jax.random.normal(keys[0], x.shape)
        logs = jax.vmap(log_size, (None, 0))
        gain = 2 * (logs(params, after) - logs(params, x))
        is_taken = jnp.log(jax.random.uniform(keys[1], (len(x),))) < gain
        return jnp.where(is_taken[:, None], after, x)

    def energies(params, x):
        def each(x):
            slope = jax.grad(log_size, 1)(params, x)
            bend = jnp.trace(jax.hessian(log_size, 1)(params, x))
            apart = x - jnp.roll(x, 1)
            height = 0.5 * jnp.square(x).sum() + jnp.exp(-jnp.square(apart)).sum()
            return height - 0.5 * (bend + jnp.square(slope).sum())

        return jax.vmap(each)(x)

    def loss(params, x, extra):
        """The mean energy; its slope by how likely each walker's place is."""
        energy = jax.lax.stop_gradient(energies(params, x))
        logs = 2 * jax.vmap(log_size, (None, 0))(params, x)
        away = (energy - energy.mean()) * (logs - jax.lax.stop_gradient(logs))
        return energy.mean() + away.mean()

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 5)
        return jax.lax.scan(lambda x, key: (walk(params, x, key), ()), extra, keys)[0]

    return Task(
        lambda key: dense_init(key, size, 24, 1, gain=1),
        draw,
        loss,
        lambda params: 2 * jax.random.normal(jax.random.key(1), (64, size)),
        lambda extra, params, batch: batch,
        lambda task, params, batch, extra, key: energies(params, batch).mean(),
    )


def mutual_information(size: int = 4, share: float = 0.9) -> Task:
    """How much two vectors tell of each other, by a bound of exponentials."""

    def draw_pair(key, num):
        x, noise = jax.random.normal(key, (2, num, size))
        return x, share * x + math.sqrt(1 - share**2) * noise

    def score(params, x, y):
        return dense(params, jnp.concatenate([x, y], axis=-1))[:, 0]

    def loss(params, batch, extra):
        x, y = batch
        apart = score(params, x, jnp.roll(y, 1, axis=0))
        mean = jax.nn.logsumexp(apart) - math.log(len(x))
        return mean - score(params, x, y).mean()

    def measure(task, params, batch, extra, key):
        """How far the scores are from the logarithms of the true ratios."""
        x, y = draw_pair(key, 512)
        rest = jnp.square(y - share * x) / (1 - share**2)
        return jnp.var(score(params, x, y) - 0.5 * (jnp.square(y) - rest).sum(-1))

    return Task(
        lambda key: dense_init(key, 2 * size, 48, 48, 1),
        lambda key, step, params, extra: draw_pair(key, 64),
        loss,
        measure=measure,
    )


def signed_distances() -> Task:
    """How far points are from two circles, from points on them and slopes of one."""
    centers, sizes = jnp.array([[-0.4, 0.0], [0.5, 0.2]]), jnp.array([0.5, 0.25])

    def true(x):
        return (jnp.linalg.norm(x[..., None, :] - centers, axis=-1) - sizes).min(-1)

    def field(params, x):
        return dense(params, x, lambda x: jax.nn.softplus(10 * x) / 10)[..., 0]

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        circle = jax.random.randint(keys[0], (48,), 0, 2)
        angle = 2 * jnp.pi * jax.random.uniform(keys[1], (48,))
        away = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        on = centers[circle] + sizes[circle, None] * away
        return on, away, jax.random.uniform(keys[2], (48, 2), minval=-1.0)

    def loss(params, batch, extra):
        on, away, x = batch
        slopes = jax.vmap(jax.grad(field, 1), (None, 0))
        steep = jnp.sqrt(jnp.square(slopes(params, x)).sum(-1) + 1e-8)
        turned = 1 - (slopes(params, on) * away).sum(-1)
        far = jnp.exp(-20 * jnp.abs(field(params, x)))
        each = jnp.abs(field(params, on)) * 10 + jnp.square(steep - 1) + turned
        return (each + 0.2 * far).mean()

    def measure(task, params, batch, extra, key):
        x = jax.random.uniform(key, (512, 2), minval=-1.0)
        return jnp.abs(field(params, x) - true(x)).mean()

    return Task(lambda key: dense_init(key, 2, 48, 48, 1), draw, loss, measure=measure)


def nim(most: int = 21) -> Task:
    """Who takes the last of some stones wins; a policy plays against itself."""

    def act(params, left):
        outputs = dense(params, jax.nn.one_hot(left, most + 1))
        is_legal = jnp.arange(3) < left[..., None]
        return jnp.where(is_legal, outputs[..., :3], -1e4), outputs[..., 3]

    def draw(key, step, params, extra):
        keys = jax.random.split(key, most + 1)
        first = jax.random.randint(keys[0], (16,), 1, most + 1)

        def move(left, key):
            action = jax.random.categorical(key, act(params, left)[0])
            return jnp.maximum(left - 1 - action, 0), (left, action)

        _, (left, action) = jax.lax.scan(move, first, keys[1:])
        turns = (left > 0).sum(0) - 1 - jnp.arange(most)[:, None]
        return left, action, jnp.where(turns % 2 == 0, 1.0, -1.0)

    def loss(params, batch, extra):
        left, action, won = batch
        logits, value = act(params, left)
        logs = jax.nn.log_softmax(logits)
        surprise = won - jnp.tanh(value)
        chosen = jnp.take_along_axis(logs, action[..., None], -1)[..., 0]
        spread = -(jnp.exp(logs) * logs).sum(-1)
        each = 0.5 * jnp.square(surprise) - 0.02 * spread
        each -= chosen * jax.lax.stop_gradient(surprise)
        return each.mean(where=left > 0)

    def measure(task, params, batch, extra, key):
        """How often it does not win where it could."""
        left = jnp.arange(1, most + 1)
        chances = jax.nn.softmax(act(params, left)[0])
        best = jnp.take_along_axis(chances, (left % 4 - 1)[:, None], -1)[:, 0]
        return 1 - best.mean(where=left % 4 > 0)

    return Task(
        lambda key: dense_init(key, most + 1, 32, 4, gain=1),
        draw,
        loss,
        measure=measure,
    )


def offline(high: float = 0.8) -> Task:
    """A policy from records of a poor one, weighted by exponentials of advantages."""

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "policy": dense_init(keys[0], 2, 24, 1, gain=0.5),
            "value": dense_init(keys[1], 2, 32, 1),
            "critic": dense_init(keys[2], 3, 32, 1),
        }

    def critic(params, state, push):
        together = jnp.concatenate([state, push], axis=-1)
        return dense(params["critic"], together)[..., 0]

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        state = 1.5 * jax.random.normal(keys[0], (64, 2))
        noise = jax.random.normal(keys[1], (64, 1))
        return state, jnp.clip(-0.5 * state[:, :1] + noise, -2, 2)

    def loss(params, batch, extra):
        state, push = batch
        after = pushed(state, push)
        value = dense(params["value"], state)[..., 0]
        ahead = dense(params["value"], after)[..., 0]
        target = 0.9 * jax.lax.stop_gradient(ahead) - cost(state, push)
        gain = critic(extra, state, push) - value
        weight = jnp.where(gain > 0, high, 1 - high)
        trust = jax.lax.stop_gradient(jnp.minimum(jnp.exp(2 * gain), 100.0))
        error = jnp.square(dense(params["policy"], state, jnp.tanh) - push)[..., 0]
        values = jnp.square(critic(params, state, push) - target)
        return (values + weight * jnp.square(gain) + trust * error).mean()

    def follow(extra, params, batch):
        return jax.tree.map(lambda old, new: 0.95 * old + 0.05 * new, extra, params)

    def measure(task, params, batch, extra, key):
        def act(state):
            return dense(params["policy"], state, jnp.tanh)

        return cost(*drive(key, act)).mean()

    return Task(init, draw, loss, lambda params: params, follow, measure)
