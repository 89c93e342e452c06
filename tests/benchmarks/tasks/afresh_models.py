"""Tasks of patches, scans, splines, trees and codes that were drawn afresh."""

import math

import jax
import jax.numpy as jnp

from tasks.sequences import (
    block,
    block_init,
    linear,
    linear_init,
    norm,
    norm_init,
)
from tasks.task import (
    Task,
    cross_entropy,
    dense,
    dense_init,
    draw_digits,
    normal,
    squared_error,
    supervised,
)


def patches(width: int = 24, layers: int = 2) -> Task:
    """Digits by a transformer of their 16 patches (ViT)."""

    def init(key):
        keys = jax.random.split(key, layers + 3)
        return {
            "in": linear_init(keys[0], 16, width, 1 / 4),
            "place": 0.02 * jax.random.normal(keys[1], (16, width)),
            "blocks": [block_init(k, width, 0.02, 0.5) for k in keys[3:]],
            "norm": norm_init(width, 0.02),
            "head": linear_init(keys[2], width, 10, 0.02),
        }

    def draw(key, step):
        x, y = draw_digits(key, 8, flat=False)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1))).reshape(8, 4, 4, 4, 4)
        return x.swapaxes(2, 3).reshape(8, 16, 16), y

    def apply(params, x):
        x = linear(params["in"], x) + params["place"]
        for layer in params["blocks"]:
            x = block(layer, x, is_causal=False, is_linear=False)
        return linear(params["head"], norm(params["norm"], x).mean(1))

    return supervised(init, apply, draw, cross_entropy)


def selective_copying(num: int = 3) -> Task:
    """Three symbols among blanks, in order, by selective scans (Mamba)."""

    def init(key):
        keys = jax.random.split(key, 4)
        return {
            "embed": jax.random.normal(keys[0], (5 + num, 16)),
            "layers": [selection_init(k, 16) for k in keys[1:3]],
            "head": linear_init(keys[3], 16, 4, 1 / 4),
        }

    def apply(params, tokens):
        x = params["embed"][tokens]
        for layer in params["layers"]:
            x += selection(layer, norm({}, x))
        return linear(params["head"], norm({}, x[:, -num:]))

    def draw(key, step):
        return draw_scattered(key, num)

    return supervised(init, apply, draw, cross_entropy)


def draw_scattered(key, num: int, length: int = 12):
    """Blanks with `num` symbols and as many questions; the symbols in order."""
    keys = jax.random.split(key)
    place = jax.random.permutation(
        keys[0], jnp.tile(jnp.arange(length) < num, (12, 1)), 1, independent=True
    )
    symbol = jax.random.randint(keys[1], (12, length), 0, 4)
    order = jnp.argsort(~place, axis=1, stable=True)[:, :num]
    asked = jnp.broadcast_to(5 + jnp.arange(num), (12, num))
    x = jnp.concatenate([jnp.where(place, symbol, 4), asked], axis=1)
    return x, jnp.take_along_axis(symbol, order, axis=1)


def selection_init(key, width: int, states: int = 4):
    """Parameters of `selection`; at first, steps are around 0.1."""
    keys = jax.random.split(key, 5)
    return {
        "in": normal(keys[0], width, 2 * width),
        "near": 0.5 * jax.random.normal(keys[1], (3, width)),
        "choose": normal(keys[2], width, 2 * states),
        "step": {"w": normal(keys[3], width, width, 0.5), "b": jnp.full(width, -2.0)},
        "log rate": jnp.tile(jnp.log(1 + jnp.arange(states)), (width, 1)),
        "skip": jnp.ones(width),
        "out": normal(keys[4], width, width),
    }


def selection(params, x) -> jax.Array:
    """Decaying states, whose steps, inputs and outputs depend on the input."""
    x, gate = jnp.split(x @ params["in"], 2, axis=-1)
    before = jnp.pad(x, ((0, 0), (2, 0), (0, 0)))
    near = [before[:, i : i + x.shape[1]] * params["near"][i] for i in range(3)]
    x = jax.nn.silu(near[0] + near[1] + near[2])
    write, read = jnp.split(x @ params["choose"], 2, axis=-1)
    step = jax.nn.softplus(linear(params["step"], x))
    decay = jnp.exp(-step[..., None] * jnp.exp(params["log rate"]))
    added = (step * x)[..., None] * write[..., None, :]

    def follow(state, now):
        state = now[0] * state + now[1]
        return state, (state * now[2][:, None]).sum(-1)

    told = jax.tree.map(lambda x: x.swapaxes(0, 1), (decay, added, read))
    y = jax.lax.scan(follow, jnp.zeros_like(added[:, 0]), told)[1].swapaxes(0, 1)
    return (y + params["skip"] * x) * jax.nn.silu(gate) @ params["out"]


def splines(num: int = 8) -> Task:
    """A formula of four quantities, by sums of learned curves (Kolmogorov-Arnold)."""
    centers = jnp.linspace(-2, 2, num)

    def init(key):
        def layer(key, a, b):
            line = normal(jax.random.fold_in(key, 1), a, b)
            return {"curve": normal(key, a * num, b, 0.5), "line": line}

        keys = jax.random.split(key, 3)
        return [layer(keys[0], 4, 6), layer(keys[1], 6, 6), layer(keys[2], 6, 1)]

    def draw(key, step):
        x = jax.random.uniform(key, (64, 4), minval=-1, maxval=1)
        y = jnp.exp(jnp.sin(math.pi * x[:, 0]) + jnp.square(x[:, 1]))
        return x, (y + 2 * x[:, 2] * x[:, 3])[:, None]

    def apply(params, x):
        for layer in params:
            bumps = jnp.exp(-jnp.square(2 * (x[..., None] - centers)))
            curves = bumps.reshape(len(x), -1) @ layer["curve"]
            x = curves + jax.nn.silu(x) @ layer["line"]
        return x

    return supervised(init, apply, draw, squared_error)


def soft_trees(trees: int = 8, depth: int = 3) -> Task:
    """Rents of flats, by trees that ask the same soft question at each of a level."""
    num = trees * depth
    side = (jnp.arange(2**depth)[:, None] >> jnp.arange(depth)) % 2

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "pick": 0.5 * jax.random.normal(keys[0], (8, num)),
            "threshold": 0.5 * jax.random.normal(keys[1], (num,)),
            "log sharpness": jnp.zeros(num),
            "leaf": jax.random.normal(keys[2], (trees, 2**depth)) / 4,
        }

    def apply(params, x):
        asked = x @ jax.nn.softmax(params["pick"], axis=0) - params["threshold"]
        yes = jax.nn.sigmoid(3 * jnp.exp(params["log sharpness"]) * asked)
        yes = yes.reshape(-1, trees, 1, depth)
        there = jnp.where(side == 1, yes, 1 - yes).prod(-1)
        return (there * params["leaf"]).sum((1, 2))

    return supervised(init, apply, draw_rents, squared_error)


def draw_rents(key, step):
    """Of flats by their area, age, place and state; three quantities say nothing."""
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (32, 8))
    area = jnp.exp(4 + 0.4 * x[:, 0])
    price = jnp.where(x[:, 1] > 0.5, 16.0, 11.0) + 2 * jnp.sin(2 * x[:, 2])
    price = jnp.where((x[:, 3] > 0) & (x[:, 4] < 0.3), 0.7 * price, price)
    noise = jnp.exp(0.1 * jax.random.normal(keys[1], (32,)))
    return x, area * price * noise / 400


def black_and_white(key) -> jax.Array:
    """Digits in 7 x 7, of zeros and ones."""
    x = draw_digits(key)[0].reshape(-1, 7, 2, 7, 2).mean((2, 4))
    return (x.reshape(-1, 49) > 0.3).astype(jnp.float32)


def hardened(soft) -> jax.Array:
    """The most likely one of each, with the gradient of all."""
    hard = jax.nn.one_hot(jnp.argmax(soft, axis=-1), soft.shape[-1], dtype=soft.dtype)
    return soft + jax.lax.stop_gradient(hard - soft)


def discrete_codes(num: int = 8, kinds: int = 6) -> Task:
    """Small digits in black and white by eight symbols, drawn ever harder (Gumbel)."""

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        noise = jax.random.gumbel(keys[1], (32, num, kinds))
        return black_and_white(keys[0]), noise, jnp.exp(-step / 500.0)

    def loss(params, batch, extra):
        x, noise, warmth = batch
        logits = dense(params["encode"], x).reshape(noise.shape)
        code = hardened(jax.nn.softmax((logits + noise) / warmth))
        outputs = dense(params["decode"], code.reshape(len(x), -1))
        chance = jax.nn.softmax(logits)
        told = (chance * (jax.nn.log_softmax(logits) + math.log(kinds))).sum((1, 2))
        return ((jax.nn.softplus(outputs) - x * outputs).sum(-1) + told).mean()

    def init(key):
        keys = jax.random.split(key)
        return {
            "encode": dense_init(keys[0], 49, 48, num * kinds, gain=1),
            "decode": dense_init(keys[1], num * kinds, 48, 49, gain=1),
        }

    return Task(init, draw, loss)
