"""Tasks of sequences: recurrent networks, transformers, and state-space models."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tasks.task import (
    Task,
    cross_entropy,
    dense,
    dense_init,
    draw_digits,
    draw_text,
    normal,
    squared_error,
    supervised,
)


def simple_cell(act: Callable, params, state, x):
    h, c = state
    return act(x + h @ params["hidden"]), c


def lstm_cell(params, state, x):
    h, c = state
    i, f, o, g = jnp.split(x + h @ params["hidden"], 4, axis=-1)
    c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru_cell(params, state, x):
    h, c = state
    x_reset, x_update, x_new = jnp.split(x, 3, axis=-1)
    h_reset, h_update, h_new = jnp.split(h @ params["hidden"], 3, axis=-1)
    update = jax.nn.sigmoid(x_update + h_update)
    new = jnp.tanh(x_new + jax.nn.sigmoid(x_reset + h_reset) * h_new)
    return (1 - update) * h + update * new, c


CELLS = {
    "tanh": functools.partial(simple_cell, jnp.tanh),
    "relu": functools.partial(simple_cell, jax.nn.relu),
    "lstm": lstm_cell,
    "gru": gru_cell,
}
NUM_GATES = {"tanh": 1, "relu": 1, "lstm": 4, "gru": 3}


def rnn_init(key, cell: str, num_in: int, num_out: int, width: int = 32, gain=1.0):
    """Parameters of `rnn`; square recurrent matrices are orthogonal times `gain`."""
    keys = jax.random.split(key, 3)
    num = NUM_GATES[cell]
    hidden = jax.nn.initializers.orthogonal(gain)
    blocks = [hidden(key, (width, width)) for key in jax.random.split(keys[1], num)]
    return {
        "in": normal(keys[0], num_in, num * width),
        "hidden": jnp.concatenate(blocks, axis=1),
        "bias": jnp.zeros(num * width),
        "out": dense_init(keys[2], width, num_out, gain=1),
    }


def unroll(cell: str, params, x, state=None):
    """All hidden states `[num, time, width]` of inputs `[num, time, num_in]`."""
    if state is None:
        zeros = jnp.zeros((len(x), len(params["hidden"])), x.dtype)
        state = zeros, zeros

    def step(state, x):
        state = CELLS[cell](params, state, x)
        return state, state[0]

    x = (x @ params["in"] + params["bias"]).swapaxes(0, 1)
    state, hidden = jax.lax.scan(step, state, x)
    return hidden.swapaxes(0, 1), state


def rnn(cell: str, num_in: int, num_out: int, draw, loss, gain: float = 1.0) -> Task:
    """What comes at the end of a sequence is predicted from the last hidden state."""

    def apply(params, x):
        hidden, _ = unroll(cell, params, x)
        return dense(params["out"], hidden[:, -1])

    init = functools.partial(
        rnn_init, cell=cell, num_in=num_in, num_out=num_out, gain=gain
    )
    return supervised(init, apply, draw, loss)


def adding(cell: str = "relu", gain: float = 1.0, stages: tuple[int, ...] = (20,)):
    """The sum of two marked numbers of a sequence; it grows after each 150 steps."""

    def draw(key, step):
        keys = jax.random.split(key, 3)
        total = max(stages)
        length = jnp.array(stages)[jnp.minimum(step // 150, len(stages) - 1)]
        half = length // 2
        first = jax.random.randint(keys[0], (32,), 0, half)
        marks = jnp.stack([first, jax.random.randint(keys[1], (32,), half, length)])
        marks = jax.nn.one_hot(total - length + marks, total).sum(0)
        values = jax.random.uniform(keys[2], (32, total))
        values *= jnp.arange(total) >= total - length
        x = jnp.stack([values, marks], axis=-1)
        return x, (values * marks).sum(-1, keepdims=True)

    return rnn(cell, 2, 1, draw, squared_error, gain)


def growing_sequences(cell: str = "gru") -> Task:
    """The sum of two marked numbers; sequences grow at steps 150, 300, and 450."""
    return adding(cell, stages=(4, 8, 12, 16))


def temporal_order(cell: str = "tanh", length: int = 12, gain: float = 1.0) -> Task:
    """Which of 2 symbols came early, and which later, among 4 distracting ones."""

    def draw(key, step):
        keys = jax.random.split(key, 4)
        kinds = jax.random.randint(keys[0], (32, 2), 0, 2)
        tokens = jax.random.randint(keys[1], (32, length), 2, 6)
        for i in range(2):
            first = i * length // 2
            place = jax.random.randint(keys[2 + i], (32,), first, first + length // 4)
            tokens = tokens.at[jnp.arange(32), place].set(kinds[:, i])
        return jax.nn.one_hot(tokens, 6), 2 * kinds[:, 0] + kinds[:, 1]

    return rnn(cell, 6, 4, draw, cross_entropy, gain)


def digit_rows(cell: str = "tanh", gain: float = 1.0) -> Task:
    """Digits are read row by row."""

    def draw(key, step):
        return draw_digits(key, flat=False)

    return rnn(cell, 14, 10, draw, cross_entropy, gain)


def characters(cell: str = "lstm") -> Task:
    """A recurrent network predicts characters."""

    def init(key):
        keys = jax.random.split(key)
        embed = jax.random.normal(keys[0], (32, 16))
        return rnn_init(keys[1], cell, 16, 32) | {"embed": embed}

    def apply(params, tokens):
        return dense(params["out"], unroll(cell, params, params["embed"][tokens])[0])

    return supervised(init, apply, draw_characters, cross_entropy)


def repeat(cell: str = "gru", length: int = 5) -> Task:
    """An encoder reads symbols; a decoder, which is told the last one, repeats them."""

    def init(key):
        keys = jax.random.split(key)
        return {
            "encoder": rnn_init(keys[0], cell, 8, 8),
            "decoder": rnn_init(keys[1], cell, 8, 8),
        }

    def apply(params, x):
        _, state = unroll(cell, params["encoder"], x)
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
        hidden, _ = unroll(cell, params["decoder"], before, state)
        return dense(params["decoder"]["out"], hidden)

    def draw(key, step):
        tokens = jax.random.randint(key, (32, length), 0, 8)
        return jax.nn.one_hot(tokens, 8), tokens

    return supervised(init, apply, draw, cross_entropy)


def linear_init(key, num_in: int, num_out: int, std: float | None, gain: float = 1.0):
    """With a bias where `std` is that of the kernel; else a kernel at fan-in scale."""
    if std is None:
        return {"w": normal(key, num_in, num_out, gain)}
    kernel = gain * std * jax.random.normal(key, (num_in, num_out))
    return {"w": kernel, "b": jnp.zeros(num_out)}


def linear(params, x) -> jax.Array:
    return x @ params["w"] + params.get("b", 0)


def norm_init(width: int, std: float | None):
    if std is None:
        return {}
    return {"gain": jnp.ones(width), "bias": jnp.zeros(width)}


def norm(params, x) -> jax.Array:
    """Normalizes each vector; gains and biases are optional."""
    x = x - x.mean(-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    return x * params.get("gain", 1) + params.get("bias", 0)


def block_init(key, width: int, std: float | None, out_gain: float):
    """Parameters of `block`."""
    keys = jax.random.split(key, 4)
    return {
        "norm0": norm_init(width, std),
        "attend": linear_init(keys[0], width, 3 * width, std),
        "mix": linear_init(keys[1], width, width, std, out_gain),
        "norm1": norm_init(width, std),
        "up": linear_init(keys[2], width, 2 * width, std),
        "down": linear_init(keys[3], 2 * width, width, std, out_gain),
    }


def block(params, x, *, is_causal: bool, is_linear: bool) -> jax.Array:
    x += linear(params["mix"], attention(params, x, is_causal, is_linear))
    hidden = jax.nn.gelu(linear(params["up"], norm(params["norm1"], x)))
    return x + linear(params["down"], hidden)


def attention(params, x, is_causal: bool, is_linear: bool, heads: int = 2):
    """With softmax, or with products of positive features (linear attention)."""
    num, length, width = x.shape
    x = linear(params["attend"], norm(params["norm0"], x))
    q, k, v = x.reshape(num, length, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    mask = jnp.tri(length, dtype=bool) if is_causal else True
    if is_linear:
        q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
        weights = jnp.where(mask, q @ k.swapaxes(-1, -2), 0)
        weights /= weights.sum(-1, keepdims=True) + 1e-6
    else:
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(width // heads)
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e4), axis=-1)
    return (weights @ v).swapaxes(1, 2).reshape(num, length, width)


def transformer_init(
    key,
    *,
    std: float | None = None,
    is_tied: bool = False,
    zero_out: bool = False,
    vocabulary: int = 32,
    length: int = 16,
    layers: int = 2,
    width: int = 32,
):
    """Parameters of `transformer`: as GPT-2's where `std` is given."""
    keys = jax.random.split(key, layers + 3)
    out_gain = 0.0 if zero_out else 1 / math.sqrt(2 * layers)
    embed_std = std or 1.0
    params = {
        "embed": embed_std * jax.random.normal(keys[0], (vocabulary, width)),
        "place": embed_std * jax.random.normal(keys[1], (length, width)),
        "blocks": [block_init(key, width, std, out_gain) for key in keys[3:]],
        "norm": norm_init(width, std),
    }
    if not is_tied:
        params["head"] = linear_init(keys[2], width, vocabulary, std)
    return params


def transformer(params, tokens, *, is_causal: bool = True, is_linear: bool = False):
    """Logits `[num, length, vocabulary]`."""
    x = params["embed"][tokens] + params["place"]
    for block_params in params["blocks"]:
        x = block(block_params, x, is_causal=is_causal, is_linear=is_linear)
    x = norm(params["norm"], x)
    return linear(params["head"], x) if "head" in params else x @ params["embed"].T


def draw_characters(key, step):
    return draw_text(key, 8, 16)


def gpt(std: float | None = 0.02, *, is_linear: bool = False, **options) -> Task:
    """A transformer predicts characters; `options` are those of `transformer_init`."""
    return supervised(
        functools.partial(transformer_init, std=std, **options),
        functools.partial(transformer, is_linear=is_linear),
        draw_characters,
        cross_entropy,
    )


def fan_in_transformer(**options) -> Task:
    """A transformer at fan-in scale, without gains and biases, predicts characters."""
    return gpt(None, **options)


def linear_attention(std: float | None = 0.02) -> Task:
    """A transformer whose attention is linear predicts characters."""
    return gpt(std, is_linear=True)


def masked_text(std: float | None = 0.02, share: float = 0.2) -> Task:
    """A transformer fills in characters that are masked, as BERT does."""

    def draw(key, step):
        keys = jax.random.split(key)
        text, _ = draw_text(keys[0], 8, 16)
        is_masked = jax.random.bernoulli(keys[1], share, text.shape)
        return jnp.where(is_masked, 32, text), jnp.where(is_masked, text, -1)

    def loss(outputs, targets):
        logs = jax.nn.log_softmax(outputs)
        picked = jnp.take_along_axis(logs, jnp.maximum(targets, 0)[..., None], -1)
        is_masked = targets >= 0
        return -jnp.where(is_masked, picked[..., 0], 0).sum() / is_masked.sum()

    return supervised(
        functools.partial(transformer_init, std=std, vocabulary=33),
        functools.partial(transformer, is_causal=False),
        draw,
        loss,
    )


def state_space_init(key, layers: int = 2, width: int = 32, num: int = 64):
    """Parameters of `state_space`; states decay at rates of 0.001 to 1 a step."""
    keys = jax.random.split(key, layers + 2)
    params = {
        "embed": jax.random.normal(keys[0], (32, width)),
        "head": linear_init(keys[1], width, 32, None),
    }
    for i in range(layers):
        layer_keys = jax.random.split(keys[i + 2], 3)
        params[f"layer{i}"] = {
            "rate": jax.random.uniform(layer_keys[0], (num,), minval=-7.0, maxval=0.0),
            "in": normal(layer_keys[1], width, num),
            "out": normal(layer_keys[2], num, width),
            "skip": jnp.ones(width),
        }
    return params


def state_space(params, tokens) -> jax.Array:
    """Layers of decaying sums of all inputs so far, and a GELU after each."""

    def after(first, second):
        return first[0] * second[0], first[1] * second[0] + second[1]

    x = params["embed"][tokens]
    for i in range(len(params) - 2):
        layer = params[f"layer{i}"]
        inputs = norm({}, x)
        decay = jnp.exp(-jnp.exp(layer["rate"]))
        states = jnp.sqrt(1 - decay**2) * (inputs @ layer["in"])
        decay = jnp.broadcast_to(decay, states.shape)
        _, states = jax.lax.associative_scan(after, (decay, states), axis=1)
        x += jax.nn.gelu(states @ layer["out"] + layer["skip"] * inputs)
    return linear(params["head"], norm({}, x))


def state_space_text() -> Task:
    """A diagonal state-space model predicts characters."""
    return supervised(state_space_init, state_space, draw_characters, cross_entropy)
