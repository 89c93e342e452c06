"""Tasks of tones, atoms, functions and rewards that were drawn blind."""

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
    normal,
    squared_error,
    supervised,
)


def tones(levels: int = 16, width: int = 12) -> Task:
    """The next value of two tones, by gated convolutions of the past (WaveNet)."""

    def layer(key):
        gates = dense_init(key, 2 * width, 2 * width, gain=1)
        return gates, dense_init(jax.random.fold_in(key, 1), width, width, gain=1)

    def init(key):
        keys = jax.random.split(key, 6)
        return {
            "embed": 0.5 * jax.random.normal(keys[0], (levels, width)),
            "layers": [layer(k) for k in keys[1:5]],
            "out": dense_init(keys[5], width, 32, levels, gain=1),
        }

    def apply(params, x):
        x = params["embed"][x]
        for i, (gates, mix) in enumerate(params["layers"]):
            past = jnp.pad(x, ((0, 0), (2**i, 0), (0, 0)))[:, : -(2**i)]
            a, b = jnp.split(dense(gates, jnp.concatenate([past, x], -1)), 2, axis=-1)
            x += dense(mix, jnp.tanh(a) * jax.nn.sigmoid(b))
        return dense(params["out"], jax.nn.relu(x))

    def draw(key, step):
        keys = jax.random.split(key)
        slow = jax.random.uniform(keys[0], (6, 1, 2), minval=0.1, maxval=0.9)
        start = 2 * math.pi * jax.random.uniform(keys[1], (6, 1, 2))
        wave = jnp.sin(slow * jnp.arange(21)[:, None] + start).mean(-1)
        wave = jnp.clip((wave + 1) / 2 * levels, 0, levels - 1).astype(int)
        return wave[:, :-1], wave[:, 1:]

    return supervised(init, apply, draw, cross_entropy)


def pointers(num: int = 6, width: int = 24) -> Task:
    """Numbers in their order, by pointing at one after the other."""

    def init(key):
        keys = jax.random.split(key, 4)
        return {
            "read": rnn_init(keys[0], "gru", 1, width, width=width),
            "write": rnn_init(keys[1], "gru", 1, width, width=width),
            "score": normal(keys[2], width, 1),
        }

    def draw(key, step):
        x = jax.random.uniform(key, (16, num), minval=-1)
        order = jnp.argsort(x, axis=1)
        before = jnp.take_along_axis(x, order, 1)[:, :-1]
        return (x, jnp.pad(before, ((0, 0), (1, 0)), constant_values=-1.5)), order

    def apply(params, inputs):
        x, before = inputs
        seen, state = unroll("gru", params["read"], x[..., None])
        asked, _ = unroll("gru", params["write"], before[..., None], state)
        keys = dense(params["read"]["out"], seen)[:, None]
        both = keys + dense(params["write"]["out"], asked)[:, :, None]
        return (jnp.tanh(both) @ params["score"])[..., 0]

    return supervised(init, apply, draw, cross_entropy)


def molecules(atoms: int = 5) -> Task:
    """Energies of atoms and the forces on them, by how near each has others."""
    same = jnp.eye(atoms)

    def pairs(place):
        return jnp.sqrt(jnp.square(place[:, None] - place).sum(-1) + same)

    def energy(place):
        morse = jnp.square(1 - jnp.exp(1.5 * (1.2 - pairs(place))))
        return ((1 - same) * morse).sum() / 2

    def learned(place, params):
        far = pairs(place)[..., None] - 0.4 * jnp.arange(1, 9)
        near = (1 - same)[..., None] * jnp.exp(-4 * jnp.square(far))
        return dense(params, near.sum(1), jax.nn.silu).sum()

    def draw(key, step, params, extra):
        place = jnp.linspace(0, 4, atoms)[:, None] * jnp.array([1, 0.5, 0])
        place += 0.2 * jax.random.normal(key, (8, atoms, 3))
        return place, jax.vmap(jax.value_and_grad(energy))(place)

    def loss(params, batch, extra):
        found = jax.vmap(jax.value_and_grad(learned), (0, None))(batch[0], params)
        value, force = jax.tree.map(squared_error, found, batch[1])
        return value / atoms + force

    return Task(lambda key: dense_init(key, 8, 32, 16, 1, gain=1), draw, loss)


def linear_latents(length: int = 16, width: int = 8) -> Task:
    """Swings of a pendulum, linear in what is learned of its state (Koopman)."""

    def swing(state, _):
        angle, speed = state
        speed += 0.2 * (-jnp.sin(angle) - 0.1 * speed)
        state = jnp.stack([angle + 0.2 * speed, speed])
        return state, state

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "in": dense_init(keys[0], 2, 24, width, gain=1),
            "out": dense_init(keys[1], width, 24, 2, gain=1),
            "next": jnp.eye(width) + 0.03 * normal(keys[2], width, width),
        }

    def draw(key, step):
        first = jax.random.uniform(key, (2, 16), minval=-2, maxval=2)
        return first.T, jax.lax.scan(swing, first, None, length)[1].swapaxes(1, 2)

    def apply(params, x):
        def follow(hidden, _):
            hidden = hidden @ params["next"]
            return hidden, hidden

        hidden = jax.lax.scan(follow, dense(params["in"], x), None, length)[1]
        return dense(params["out"], hidden)

    return supervised(init, apply, draw, squared_error)


def operator(points: int = 32, modes: int = 6, width: int = 10) -> Task:
    """What a membrane does under a load, by layers of waves (Fourier operator)."""

    def init(key):
        def layer(key):
            waves = jax.random.normal(key, (2, modes, width, width)) / width
            return {"waves": waves, "point": dense_init(key, width, width)}

        keys = jax.random.split(key, 5)
        ends = {"in": dense_init(keys[0], 1, width)}
        ends["out"] = dense_init(keys[1], width, 1, gain=1)
        return ends | {"layers": [layer(k) for k in keys[2:]]}

    def draw(key, step):
        angle = 2 * math.pi * jnp.arange(points) / points * jnp.arange(1, 5)[:, None]
        weights = jax.random.normal(key, (2, 16, 4)) / jnp.arange(1, 5)
        load = weights[0] @ jnp.sin(angle) + weights[1] @ jnp.cos(angle)
        stiff = 1 + jnp.square(jnp.arange(points // 2 + 1) / 2)
        bent = jnp.fft.irfft(jnp.fft.rfft(load * jnp.abs(load)) / stiff, points)
        return load[..., None], bent[..., None]

    def apply(params, x):
        x = dense(params["in"], x)
        for layer in params["layers"]:
            y = jnp.fft.rfft(x, axis=1)[:, :modes]
            y = jnp.einsum("nki,kio->nko", y, jax.lax.complex(*layer["waves"]))
            y = jnp.fft.irfft(y, points, axis=1)
            x = jax.nn.gelu(y + dense(layer["point"], x))
        return dense(params["out"], x)

    return supervised(init, apply, draw, squared_error)


def inverse_rewards(size: int = 5, decay: float = 0.9) -> Task:
    """What somebody wants who walks around, from the steps taken (maximum entropy)."""
    rng = np.random.default_rng(0)
    about = jnp.asarray(rng.standard_normal((size**2, 4)), jnp.float32)
    wanted = 1.5 * jnp.sin(2 * about[:, 0]) + about[:, 1] * about[:, 2]
    move = np.array([[0, 1], [0, -1], [1, 0], [-1, 0], [0, 0]])
    place = np.stack(np.divmod(np.arange(size**2), size), axis=1)[:, None] + move
    ahead = jnp.asarray(np.clip(place, 0, size - 1) @ [size, 1])

    def soft_values(reward):
        values = jnp.zeros_like(reward)
        for _ in range(19):
            ways = (reward + decay * values)[ahead]
            values = jax.nn.logsumexp(ways, axis=1)
        return (reward + decay * values)[ahead]

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        where = jax.random.randint(keys[0], (64,), 0, size**2)
        return where, jax.random.categorical(keys[1], soft_values(wanted)[where])

    def loss(params, batch, extra):
        ways = soft_values(dense(params, about)[:, 0])
        return cross_entropy(ways[batch[0]], batch[1])

    return Task(lambda key: dense_init(key, 4, 24, 24, 1, gain=1), draw, loss)


def inducing_points(num: int = 12) -> Task:
    """Two classes by a Gaussian process of a few points (variational)."""
    where, weight = np.polynomial.hermite_e.hermegauss(7)

    def init(key):
        return {
            "points": jax.random.uniform(key, (num, 2), minval=-2, maxval=2),
            "mean": jnp.zeros(num),
            "root": jnp.eye(num),
            "log scale": jnp.zeros(2),
        }

    def draw(key, step, params, extra):
        x = jax.random.uniform(key, (48, 2), minval=-2, maxval=2)
        return x, 1 - 2.0 * (jnp.sin(2.5 * x[:, 0]) + x[:, 1] > 0)

    def loss(params, batch, extra):
        def near(a, b):
            apart = (a[:, None] - b) * jnp.exp(-params["log scale"])
            return jnp.exp(-jnp.square(apart).sum(-1) / 2)

        points, x, y = params["points"], *batch
        root = jnp.linalg.cholesky(near(points, points) + 1e-3 * jnp.eye(num))
        part = jax.scipy.linalg.solve_triangular(root, near(points, x), lower=True)
        own = jnp.tril(params["root"])
        spread = 1 - jnp.square(part).sum(0) + jnp.square(own.T @ part).sum(0)
        values = params["mean"] @ part + jnp.sqrt(spread + 1e-4) * where[:, None]
        likely = weight / weight.sum() @ jax.nn.log_sigmoid(-y * values)
        told = jnp.square(own).sum() + jnp.square(params["mean"]).sum() - num
        told = told / 2 - jnp.log(jnp.abs(jnp.diag(own))).sum()
        return told / 500 - likely.mean()

    return Task(init, draw, loss)
