"""Tasks of unusual networks and losses: loops, codes, spikes, rays, physics, games."""

import math

import jax
import jax.numpy as jnp

from tasks.generative import energy_distance
from tasks.networks import apply_residual, residual
from tasks.reinforcement import cost, drive, pushed
from tasks.task import (
    Task,
    cross_entropy,
    dense,
    dense_init,
    draw_blobs,
    draw_digits,
    normal,
    squared_error,
    supervised,
    with_nothing_left_out,
)


def draw(key, step):
    return draw_digits(key)


def batch_norm(depth: int = 3) -> Task:
    """A classifier of digits, normalized by the statistics of its batch."""

    def init(key):
        kernels = dense_init(key, 196, *[32] * depth, 10)
        return kernels | {f"gain{i}": jnp.ones(32) for i in range(depth)}

    def apply(params, x):
        for i in range(depth):
            x = x @ params[f"w{i}"]
            x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
            x = jax.nn.relu(params[f"gain{i}"] * x + params[f"b{i}"])
        return x @ params[f"w{depth}"] + params[f"b{depth}"]

    return supervised(init, apply, draw, cross_entropy)


def triangles() -> Task:
    """Counts the triangles of graphs of 12 nodes, adding over neighbors twice."""

    def draw(key, step):
        keys = jax.random.split(key)
        density = jax.random.uniform(keys[0], (32, 1, 1), minval=0.1, maxval=0.7)
        edges = jnp.triu(jax.random.uniform(keys[1], (32, 12, 12)) < density, 1)
        edges = (edges + edges.swapaxes(1, 2)).astype(jnp.float32)
        number = jnp.trace(edges @ edges @ edges, axis1=1, axis2=2) / 6
        return edges, number[:, None] / 10

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "first": dense_init(keys[0], 2, 24, 24),
            "second": dense_init(keys[1], 24, 24, 24),
            "out": dense_init(keys[2], 24, 24, 1),
        }

    def apply(params, edges):
        degree = edges.sum(-1, keepdims=True)
        x = jnp.concatenate([jnp.ones_like(degree), degree / 6], axis=-1)
        for layer in ("first", "second"):
            x = jax.nn.relu(dense(params[layer], x + edges @ x / 6))
        return dense(params["out"], x.sum(1) / 6)

    return supervised(init, apply, draw, squared_error)


def vector_quantization() -> Task:
    """An autoencoder of digits with four codes of 32; straight-through gradients."""

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "encoder": dense_init(keys[0], 196, 48, 32),
            "codes": 0.3 * jax.random.normal(keys[1], (32, 8)),
            "decoder": dense_init(keys[2], 32, 48, 196, gain=1),
        }

    def parts(params, x):
        z = dense(params["encoder"], x).reshape(-1, 4, 8)
        apart = jnp.square(z[:, :, None] - params["codes"]).sum(-1)
        code = params["codes"][apart.argmin(-1)]
        through = z + jax.lax.stop_gradient(code - z)
        error = squared_error(dense(params["decoder"], through.reshape(-1, 32)), x)
        return error, code, z

    def loss(params, batch, extra):
        error, code, z = parts(params, batch)
        held = jax.lax.stop_gradient
        kept = squared_error(code, held(z)) + 0.25 * squared_error(held(code), z)
        return error + kept

    return Task(
        init=init,
        batch=lambda key, step, params, extra: draw_digits(key)[0],
        loss=loss,
        measure=lambda task, params, batch, extra, key: parts(params, batch)[0],
    )


def bootstrap() -> Task:
    """Two views of a digit agree, one of them by a slow copy (BYOL).

    Judged by the share of labels that a linear fit gets wrong, from to what is learned.
    """

    def init(key):
        keys = jax.random.split(key)
        return {
            "encoder": dense_init(keys[0], 196, 32, 12),
            "predictor": dense_init(keys[1], 12, 24, 12),
        }

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        x = draw_digits(keys[0], 64)[0]
        is_seen = jax.random.bernoulli(keys[1], 0.6, (2, *x.shape))
        return is_seen * x + 0.3 * jax.random.normal(keys[2], is_seen.shape)

    def loss(params, views, extra):
        online = dense(params["predictor"], dense(params["encoder"], views))
        target = dense(extra["encoder"], views[::-1])
        unit = [
            x / jnp.linalg.norm(x + 1e-6, axis=-1, keepdims=True)
            for x in (online, target)
        ]
        return 2 - 2 * (unit[0] * jax.lax.stop_gradient(unit[1])).sum(-1).mean()

    def measure(task, params, batch, extra, key):
        x, labels = draw_digits(key, 512)
        x = dense(params["encoder"], x)
        x = jnp.concatenate(
            [(x - x.mean(0)) / (x.std(0) + 1e-6), jnp.ones((512, 1))], 1
        )
        y = jax.nn.one_hot(labels[:256], 10)
        gram = x[:256].T @ x[:256] + 5 * jnp.eye(13)
        fit = jnp.linalg.solve(gram, x[:256].T @ y)
        return ((x[256:] @ fit).argmax(-1) != labels[256:]).mean()

    return Task(
        init,
        draw,
        loss,
        extra=lambda params: params,
        follow=lambda extra, params, batch: jax.tree.map(
            lambda old, new: 0.98 * old + 0.02 * new, extra, params
        ),
        measure=measure,
    )


def adaptation() -> Task:
    """A start from which one step fits a sine of any phase and height (MAML)."""

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        height = jax.random.uniform(keys[0], (8, 1, 1), minval=0.5, maxval=3.0)
        phase = jax.random.uniform(keys[1], (8, 1, 1), maxval=jnp.pi)
        x = jax.random.uniform(keys[2], (8, 20, 1), minval=-4.0, maxval=4.0)
        return x, height * jnp.sin(x - phase)

    def error(params, x, y):
        return squared_error(dense(params, x, jnp.tanh), y)

    def adapted(params, x, y):
        slope = jax.grad(error)(params, x[:10], y[:10])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, slope)
        return error(params, x[10:], y[10:])

    return Task(
        init=lambda key: dense_init(key, 1, 32, 32, 1, gain=1.0),
        batch=draw,
        loss=lambda params, batch, extra: jax.vmap(adapted, (None, 0, 0))(
            params, *batch
        ).mean(),
    )


def langevin(energy, params, key, num: int = 64, steps: int = 20) -> jax.Array:
    """Samples of an energy of points, from a wide normal distribution."""
    keys = jax.random.split(key, steps + 1)
    x = 2 * jax.random.normal(keys[0], (num, 2))

    def step(x, key):
        slope = jax.grad(lambda x: energy(params, x).sum())(x)
        return x - 0.1 * slope + 0.15 * jax.random.normal(key, x.shape), None

    return jax.lax.scan(step, x, keys[1:])[0]


def energy_model() -> Task:
    """An energy of points of 8 Gaussians, low there and high where it samples."""

    def energy(params, x):
        return dense(params, x, jax.nn.silu)[:, 0] + 0.05 * jnp.square(x).sum(-1)

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        return draw_blobs(keys[0]), langevin(energy, params, keys[1])

    def loss(params, batch, extra):
        real, fake = (energy(params, x) for x in batch)
        held = 0.02 * (jnp.square(real) + jnp.square(fake)).mean()
        return real.mean() - fake.mean() + held

    def measure(task, params, batch, extra, key):
        keys = jax.random.split(key)
        fake = langevin(energy, params, keys[0], 256)
        return energy_distance(fake, draw_blobs(keys[1], 256))

    return Task(lambda key: dense_init(key, 2, 48, 48, 1), draw, loss, measure=measure)


def scores() -> Task:
    """Scores of points under noise of 0.05 to 2, each weighted alike: heavy tails."""

    def error(params, batch):
        noise, size = batch["noise"], batch["size"]
        x = batch["x"] + size * noise
        x = jnp.concatenate([x / jnp.sqrt(1 + size**2), jnp.log(size)], axis=-1)
        return jnp.square(dense(params, x, jax.nn.silu) / size + noise / size)

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        log_size = jax.random.uniform(keys[2], (64, 1), minval=-3.0, maxval=0.7)
        return {
            "x": draw_blobs(keys[0]),
            "noise": jax.random.normal(keys[1], (64, 2)),
            "size": jnp.exp(log_size),
        }

    return Task(
        init=lambda key: dense_init(key, 3, 48, 48, 2),
        batch=draw,
        loss=lambda params, batch, extra: error(params, batch).mean(),
        measure=lambda task, params, batch, extra, key: (
            error(params, batch) * jnp.square(batch["size"])
        ).mean(),
    )


def equilibrium() -> Task:
    """Digits by the fixed point of one layer, iterated 20 times."""

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "in": normal(keys[0], 196, 32),
            "hidden": normal(keys[1], 32, 32, 0.7),
            "out": dense_init(keys[2], 32, 10, gain=1),
        }

    def apply(params, x):
        x = x @ params["in"]

        def step(z, _):
            return jnp.tanh(x + z @ params["hidden"]), None

        z, _ = jax.lax.scan(step, jnp.zeros_like(x), length=20)
        return dense(params["out"], z)

    return supervised(init, apply, draw, cross_entropy)


@jax.custom_jvp
def spike(x):
    return (x > 0).astype(x.dtype)


@spike.defjvp
def surrogate(primals, tangents):
    (x,), (tangent,) = primals, tangents
    return spike(x), tangent / jnp.square(1 + 10 * jnp.abs(x))


def spiking() -> Task:
    """Leaky neurons read digits row by row and fire; slopes are a surrogate's."""

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "in": normal(keys[0], 14, 48, 2.0),
            "hidden": normal(keys[1], 48, 48, 0.5),
            "out": dense_init(keys[2], 48, 10, gain=1),
        }

    def apply(params, x):
        def step(carry, x):
            charge, fired = carry
            charge = 0.8 * charge * (1 - fired) + x + fired @ params["hidden"]
            fired = spike(charge - 1)
            return (charge, fired), fired

        x = (x.reshape(-1, 14, 14) @ params["in"]).swapaxes(0, 1)
        zeros = jnp.zeros_like(x[0])
        return dense(params["out"], jax.lax.scan(step, (zeros, zeros), x)[1].sum(0))

    return supervised(init, apply, draw, cross_entropy)


def render(field, origin, direction) -> jax.Array:
    """The brightness that rays `[num, 2]` see in a field of (density, brightness)."""
    depth = jnp.linspace(0, 2, 24)
    points = origin[:, None] + depth[:, None] * direction[:, None]
    density, bright = field(points)
    seen = 1 - jnp.exp(-density * 2 / 24)
    clear = jnp.cumprod(jnp.concatenate([jnp.ones_like(seen[:, :1]), 1 - seen], 1), 1)
    return (clear[:, :-1] * seen * bright).sum(-1)


def radiance() -> Task:
    """Density and brightness in a plane, learned from rays through it (NeRF)."""
    waves = 2 * jax.random.normal(jax.random.key(1), (2, 16))
    centers = jnp.array([[0.4, 0.2], [-0.3, 0.3], [0.0, -0.4]])

    def scene(x):
        apart = jnp.linalg.norm(x[..., None, :] - centers, axis=-1)
        inside = jax.nn.sigmoid(40 * (0.2 - apart))
        return 20 * inside.sum(-1), inside @ jnp.array([1.0, 0.5, 0.2])

    def field(params):
        def of(x):
            x = jnp.concatenate([jnp.sin(x @ waves), jnp.cos(x @ waves)], axis=-1)
            x = dense(params, x)
            return jax.nn.softplus(x[..., 0] - 1), jax.nn.sigmoid(x[..., 1])

        return of

    def draw(key, step):
        angle, aim = jax.random.uniform(key, (2, 32)) * jnp.array([[2 * jnp.pi], [0.8]])
        origin = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        aim = angle + math.pi + aim - 0.4
        direction = jnp.stack([jnp.cos(aim), jnp.sin(aim)], axis=-1)
        return (origin, direction), render(scene, origin, direction)

    def apply(params, rays):
        return render(field(params), *rays)

    return supervised(
        lambda key: dense_init(key, 32, 32, 2), apply, draw, squared_error
    )


def swing_up(length: int = 50) -> Task:
    """A policy swings a pendulum up, learned through its simulation."""

    def loss(params, state, extra):
        def step(state, _):
            angle, spin = state
            seen = jnp.stack([jnp.sin(angle), jnp.cos(angle), spin / 4], axis=-1)
            push = 4 * jnp.tanh(dense(params, seen, jnp.tanh)[:, 0])
            spin += 0.06 * (9.8 * jnp.sin(angle) + 2 * push)
            angle += 0.06 * spin
            price = 1 - jnp.cos(angle) + 0.02 * jnp.square(spin)
            return (angle, spin), price + 0.005 * jnp.square(push)

        return jax.lax.scan(step, (state[0], state[1]), length=length)[1].mean()

    def draw(key, step, params, extra):
        first = jnp.array([[jnp.pi], [0.0]])
        return first + 0.3 * jax.random.normal(key, (2, 16))

    return Task(lambda key: dense_init(key, 3, 24, 24, 1, gain=1.0), draw, loss)


def soft_actor_critic() -> Task:
    """A random policy of a pushed mass, whose entropy is held by a temperature."""

    def init(key):
        keys = jax.random.split(key)
        return {
            "actor": dense_init(keys[0], 2, 24, 2, gain=0.5),
            "critic": dense_init(keys[1], 3, 48, 1),
            "temperature": jnp.zeros(()),
        }

    def act(actor, state, noise):
        mean, log_std = jnp.split(dense(actor, state), 2, axis=-1)
        log_chance = -log_std - 0.5 * jnp.square(noise) - 0.5 * math.log(2 * math.pi)
        return mean + jnp.exp(log_std) * noise, log_chance[..., 0]

    def value(critic, state, push):
        return dense(critic, jnp.concatenate([state, push], axis=-1))[..., 0]

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        state = jax.random.normal(keys[0], (64, 2))
        noise = jax.random.normal(keys[1], (3, 64, 1))
        return state, act(params["actor"], state, 2 * noise[0])[0], noise

    def losses(params, batch, extra):
        (state, push, noise), heat = batch, jnp.exp(params["temperature"])
        after = pushed(state, push)
        next_push, log_next = act(extra["actor"], after, noise[1])
        ahead = value(extra["critic"], after, next_push) + heat * log_next
        target = jax.lax.stop_gradient(cost(state, push) + 0.9 * ahead)
        own, log_own = act(params["actor"], state, noise[2])
        missing = jax.lax.stop_gradient(log_own - 1.0).mean()
        return {
            "actor": (heat * log_own + value(params["critic"], state, own)).mean(),
            "critic": squared_error(value(params["critic"], state, push), target),
            "temperature": -params["temperature"] * missing,
        }

    def follow(extra, params, batch):
        return jax.tree.map(lambda old, new: 0.95 * old + 0.05 * new, extra, params)

    def measure(task, params, batch, extra, key):
        def mean(state):
            return dense(params["actor"], state)[..., :1]

        return cost(*drive(key, mean)).mean()

    return Task(
        init,
        draw,
        losses,
        lambda params: params,
        follow,
        measure,
        tuple(init(jax.random.key(0))),
    )


def rare_rewards(num: int = 10) -> Task:
    """Policy gradients of a choice; the best one pays 100, once in 25 times."""
    usual = jnp.linspace(0, 1, num - 1)

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        arm = jax.random.categorical(keys[0], params, shape=(32,))
        paid = jnp.append(usual, 0.0)[arm] + 0.1 * jax.random.normal(keys[1], (32,))
        is_lucky = jax.random.bernoulli(keys[2], 0.04, (32,)) & (arm == num - 1)
        return {"arm": arm, "reward": paid + 100 * is_lucky}

    def loss(params, batch, extra):
        logs = jax.nn.log_softmax(params)
        gain = (batch["reward"] - batch["reward"].mean()) * logs[batch["arm"]]
        return -gain.mean() + 0.05 * (jnp.exp(logs) * logs).sum()

    return Task(
        init=lambda key: 0.1 * jax.random.normal(key, (num,)),
        batch=draw,
        loss=loss,
        measure=lambda task, params, *_: (
            -(jax.nn.softmax(params) * jnp.append(usual, 4.0)).sum()
        ),
    )


def stochastic_depth(depth: int = 6) -> Task:
    """Residual blocks on digits, of which a half is left out for each batch."""
    base = residual(gain=0.7, depth=depth)

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        return draw_digits(keys[0]), jax.random.bernoulli(keys[1], 0.5, (depth,))

    def loss(params, batch, extra, is_all=False):
        (x, y), is_kept = batch
        blocks = {
            f"block{i}": params[f"block{i}"]
            | {"gate": 0.5 if is_all else 1.0 * is_kept[i]}
            for i in range(depth)
        }
        return cross_entropy(apply_residual(params | blocks, x), y)

    return Task(
        base.init,
        draw,
        loss,
        measure=with_nothing_left_out(loss),
    )
