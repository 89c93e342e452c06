"""`stabilize` saves runs that end badly without it, and leaves healthy ones alone.

    python tests/benchmarks/runs_saved.py --plot runs_saved.png

Every run is trained without protection and under each arm, from the same parameters on
the same batches. What is judged is the loss in float32 on each batch as it was before
any corruption: its median over the last tenth of the steps. The end is healthy if all
parameters are finite and that loss is at most

    max(1.2 * reference, (reference + trivial) / 2)

Here `trivial` is the loss of the best constant output, and `reference` the best end of
the same run, unprotected, at 1/4, 1/16 and 1/64 of its step size. Where the step size
is not the cause, the reference is also sought in the clean run (normal initialisation,
nothing corrupt, all in float32) at those step sizes and at its own.

A run counts only if that limit is below `trivial`, as healthy only if it ends healthy
without protection, as exploding only if it ends unhealthy and, on the way there, the
loss or a gradient was not finite or the loss exceeded three times its first. Runs that
end unhealthy without that are counted apart: they learn badly, but do not explode. A
healthy run is harmed if its loss at the end grows by more than 10 %.
"""

import dataclasses
import datetime
import functools
import importlib
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

import optaxclip

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
curves: Any = importlib.import_module("curves")
mnist: Any = importlib.import_module("mnist")

# Each protects an optimizer. All are called with `value=loss`.
ARMS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda optimizer: optimizer,
    "clip": lambda optimizer: optax.chain(optax.clip_by_global_norm(1.0), optimizer),
    "apply_if_finite": lambda optimizer: optax.apply_if_finite(optimizer, 5),
    "stabilize": optaxclip.stabilize,
    "no rollback": functools.partial(optaxclip.stabilize, rollback=False),
}
RATE, INIT, DATA, HALF = "step size", "initialisation", "corrupt", "low precision"
HEALTHY, STALLED = "healthy", "no explosion"
CAUSES = RATE, INIT, DATA, HALF
KINDS = *CAUSES, HEALTHY


def cross_entropy(outputs, labels):
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, labels)
    return losses.mean()


def naive_softmax(x):
    """In float16 it overflows from 11.1 on."""
    return jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)


def naive_cross_entropy(outputs, labels):
    is_label = jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)
    return -jnp.log((naive_softmax(outputs) * is_label).sum(-1)).mean()


def naive_log_cosh(outputs, targets):
    """In float16 it overflows from errors of 11.8 on."""
    return jnp.log(jnp.cosh(outputs - targets)).mean()


def squared_error(outputs, targets):
    return jnp.square(outputs - targets).mean()


@dataclasses.dataclass(frozen=True)
class Task:
    """What to learn.

    Attributes:
        batch: From `(key, step, *arrays)` to inputs and targets.
        loss: From outputs and targets to their loss.
        arrays: Loads the data, if there are any.
    """

    batch: Callable[..., tuple[Any, Any]]
    loss: Callable[[Any, Any], jax.Array] = cross_entropy
    arrays: Callable[[], tuple] = tuple


def regression(*, size: float = 100.0, degrees: int = 0, change: int | None = None):
    """Linear targets of 20 inputs, in the hundreds as in scikit-learn's.

    Args:
        size: The largest coefficient.
        degrees: Of freedom, if any, of t-distributed noise.
        change: The step from which on other coefficients hold.
    """

    def batch(key, step):
        old, new = size * jax.random.uniform(jax.random.key(9), (2, 20, 1))
        key, noise_key = jax.random.split(key)
        x = jax.random.normal(key, (32, 20))
        y = x @ (old if change is None else jnp.where(step < change, old, new))
        if degrees:
            y += size * jax.random.t(noise_key, degrees, y.shape)
        return x, y

    return Task(batch, squared_error)


def adding(key, step):
    """The sum of the two marked of 20 numbers."""
    del step
    keys = jax.random.split(key, 3)
    numbers = jax.random.uniform(keys[0], (16, 20))
    first = jax.random.randint(keys[1], (16, 1), 0, 10)
    second = jax.random.randint(keys[2], (16, 1), 10, 20)
    marks = (jnp.arange(20) == first) | (jnp.arange(20) == second)
    return jnp.stack([numbers, marks], -1), (numbers * marks).sum(1, keepdims=True)


def temporal_order(key, step):
    """Which of two symbols came first, and which then, among others; 4 classes."""
    del step
    keys = jax.random.split(key, 4)
    rows, symbols = jnp.arange(16), jax.random.randint(keys[0], (16, 20), 2, 6)
    first = jax.random.randint(keys[1], (16,), 2, 6)
    second = jax.random.randint(keys[2], (16,), 10, 14)
    labels = jax.random.randint(keys[3], (16,), 0, 4)
    symbols = symbols.at[rows, first].set(labels // 2)
    return jax.nn.one_hot(symbols.at[rows, second].set(labels % 2), 6), labels


@functools.cache
def pooled_digits() -> tuple[np.ndarray, np.ndarray]:
    """MNIST in 14 x 14, standardised."""
    data = mnist.load()
    images = data.train_images.reshape(-1, 14, 2, 14, 2).mean((2, 4)) / 255
    return ((images - 0.1307) / 0.3081).astype(np.float32), data.train_labels


def digits(*, rows: bool = False, change: int | None = None, batch_size: int = 32):
    """MNIST as vectors or as sequences of rows; `change` permutes the labels."""

    def batch(key, step, images, labels):
        index = jax.random.randint(key, (batch_size,), 0, len(images))
        x, y = images[index], labels[index]
        if change is not None:
            y = jnp.where(step < change, y, (y + 1) % 10)
        return x if rows else x.reshape(batch_size, -1), y

    return Task(batch, arrays=pooled_digits)


@functools.cache
def manual() -> tuple[np.ndarray]:
    """Python's manual; all but the 31 most frequent characters are one."""
    text = np.array(list("\n".join(dict.fromkeys(topics.values()))))
    _, index, counts = np.unique(text, return_inverse=True, return_counts=True)
    ranks = np.argsort(np.argsort(-counts))
    return (np.minimum(ranks, 31)[index].astype(np.int32),)


def characters(key, step, text):
    """Each of 24 characters from those before it; 32 classes."""
    del step
    start = jax.random.randint(key, (8, 1), 0, len(text) - 25)
    text = text[start + jnp.arange(25)]
    return text[:, :-1], text[:, 1:]


@dataclasses.dataclass(frozen=True)
class Model:
    """What learns, in the type of its parameters.

    Attributes:
        init: From a key and the gain of the initialisation (normally 1) to parameters.
        apply: From parameters and inputs to outputs.
    """

    init: Callable[[jax.Array, float], dict[str, jax.Array]]
    apply: Callable[[Any, Any], jax.Array]


def normal(key, num_in: int, num_out: int, gain: float = 1.0):
    return gain / math.sqrt(num_in) * jax.random.normal(key, (num_in, num_out))


def mlp(*widths: int):
    """ReLU between the layers."""
    shapes = list(itertools.pairwise(widths))

    def init(key, gain):
        keys = jax.random.split(key, len(shapes))
        params = {
            f"{i:02}/kernel": normal(keys[i], *shape, math.sqrt(2) * gain)
            for i, shape in enumerate(shapes)
        }
        return params | {
            f"{i:02}/bias": jnp.zeros(n) for i, (_, n) in enumerate(shapes)
        }

    def apply(params, x):
        for i in range(len(shapes)):
            x = jax.nn.relu(x) if i else x
            x = x @ params[f"{i:02}/kernel"] + params[f"{i:02}/bias"]
        return x

    return Model(init, apply)


def relu_cell(state, x):
    return jax.nn.relu(x), state


def tanh_cell(state, x):
    return jnp.tanh(x), state


def lstm_cell(state, x):
    forget, input, output, new = jnp.split(x, 4, axis=-1)
    new = jax.nn.sigmoid(input) * jnp.tanh(new)
    state = jax.nn.sigmoid(forget + 1) * state + new
    return jax.nn.sigmoid(output) * jnp.tanh(state), state


def rnn(cell: Callable, num_in: int, num_out: int, hidden: int = 32):
    """Starts from orthogonal matrices; with ReLU from the identity, small inputs."""
    gates = 4 if cell is lstm_cell else 1

    def init(key, gain):
        keys = jax.random.split(key, 3)
        scale, matrices = 1.0, jax.random.orthogonal(keys[1], hidden, (gates,))
        if cell is relu_cell:
            scale, matrices = 0.1, jnp.eye(hidden)[None]
        return {
            "input": normal(keys[0], num_in, gates * hidden, scale),
            "recurrent": gain * jnp.concatenate(matrices, axis=1),
            "bias": jnp.zeros(gates * hidden),
            "output": normal(keys[2], hidden, num_out),
            "output_bias": jnp.zeros(num_out),
        }

    def apply(params, x):
        def step(carry, x):
            h, state = carry
            return cell(state, x + h @ params["recurrent"]), None

        x = x.swapaxes(0, 1) @ params["input"] + params["bias"]
        zeros = jnp.zeros_like(x[0, :, :hidden])
        (h, _), _ = jax.lax.scan(step, (zeros, zeros), x)
        return h @ params["output"] + params["output_bias"]

    return Model(init, apply)


def transformer(*, softmax: Callable = jax.nn.softmax, width: int = 32):
    """Two causal blocks, one head, no parameters in the norms; for `characters`."""
    shapes = {"embed": (32, width), "position": (24, width), "head": (width, 32)}
    for i in range(2):
        shapes[f"{i}/attention"] = (width, 3 * width)
        shapes[f"{i}/projection"] = (width, width)
        shapes[f"{i}/mlp_in"] = (width, 4 * width)
        shapes[f"{i}/mlp_out"] = (4 * width, width)

    def init(key, gain):
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        return {name: normal(keys[name], *shapes[name], gain) for name in shapes}

    def apply(params, text):
        x = params["embed"][text] + params["position"]
        for i in range(2):
            h = jax.nn.standardize(x) @ params[f"{i}/attention"]
            q, k, v = jnp.split(h, 3, axis=-1)
            scores = q @ k.swapaxes(1, 2) / math.sqrt(width)
            past = jnp.tril(jnp.ones(scores.shape[1:], bool))
            weights = softmax(jnp.where(past, scores, jnp.finfo(x.dtype).min))
            x += weights @ v @ params[f"{i}/projection"]
            h = jax.nn.relu(jax.nn.standardize(x) @ params[f"{i}/mlp_in"])
            x += h @ params[f"{i}/mlp_out"]
        return jax.nn.standardize(x) @ params["head"]

    return Model(init, apply)


def at(first: int, every: int = 10**6, *, length: int = 1, x=1.0, y=1.0, shuffle=False):
    """Corrupts `length` batches from `first` on, and again after `every` steps.

    Args:
        first: The step of the first such batch.
        every: Steps from there to the next.
        length: How many batches in a row.
        x: Multiplies the inputs.
        y: Multiplies the targets.
        shuffle: Permutes the targets.
    """

    def corrupt(key, step, inputs, targets):
        now = (step >= first) & ((step - first) % every < length)
        shuffled = jax.random.permutation(key, targets) if shuffle else targets
        return (
            jnp.where(now, x * inputs, inputs),
            jnp.where(now, (y * shuffled).astype(targets.dtype), targets),
        )

    return corrupt


def momentum(rate):
    return optax.sgd(rate, momentum=0.9)


def rising(rate):
    """Momentum, whose step size rises linearly all the way."""
    return momentum(lambda count: rate * (count + 1) / 600)


def restarts(rate):
    """Adam with a linear warm-up, then a cosine that restarts every 150 steps."""

    def schedule(count):
        cosine = 0.51 + 0.49 * jnp.cos(jnp.pi * (count % 150) / 150)
        return rate * jnp.where(count < 50, (count + 1) / 50, cosine)

    return optax.adam(schedule)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        kind: One of `KINDS`: why it explodes, if it does.
        optimizer: From the step size to the optimizer.
        rate: The step size.
        gain: Of the initialisation.
        corrupt: From `(key, step, inputs, targets)` to inputs and targets.
        dtype: In which the model computes; parameters are float32.
        loss: What is minimised in place of the task's loss, in the model's dtype.
        loss_scale: Multiplies the loss, and divides its gradient.
        unit: Multiplies the loss, and so its gradient.
    """

    kind: str
    task: Task
    model: Model
    optimizer: Callable[[Any], optax.GradientTransformation]
    rate: float
    gain: float = 1.0
    corrupt: Callable[..., tuple[Any, Any]] | None = None
    dtype: Any = jnp.float32
    loss: Callable[[Any, Any], jax.Array] | None = None
    loss_scale: float = 1.0
    unit: float = 1.0
    steps: int = 600


def clean(run: Run) -> Run:
    """The same run without the cause of its explosion, if that is not the rate."""
    parts: Any = {"dtype": jnp.float32, "loss": None, "loss_scale": 1.0}
    return dataclasses.replace(run, gain=1.0, corrupt=None, **parts)


def zoo() -> dict[str, Run]:
    """All runs by their name."""
    line = regression(), mlp(20, 25, 1)
    shallow = digits(), mlp(196, 64, 10)
    deep = digits(), mlp(196, *[48] * 10, 10)
    rows = digits(rows=True)
    tanh, lstm = (rows, rnn(tanh_cell, 14, 10)), (rows, rnn(lstm_cell, 14, 10))
    sums = Task(adding, squared_error)
    relu, memory = (sums, rnn(relu_cell, 2, 1)), (sums, rnn(lstm_cell, 2, 1))
    relu_rows = rows, rnn(relu_cell, 14, 10)
    order = Task(temporal_order), rnn(tanh_cell, 6, 4)
    text = Task(characters, arrays=manual)
    attention = text, transformer()
    new_labels = digits(change=300), shallow[1]
    single = digits(batch_size=1), shallow[1]
    new_line = regression(change=300), line[1]
    naive = text, transformer(softmax=naive_softmax)
    noisy = regression(size=1.0, degrees=3), line[1]
    tails = regression(size=40.0, degrees=2), line[1]
    sgd, mom, adam, adamw = optax.sgd, momentum, optax.adam, optax.adamw
    slow = functools.partial(sgd, momentum=0.8)
    f16 = functools.partial(Run, HALF, dtype=jnp.float16)
    once, often, nan = at(300, x=1e3), at(100, 100, x=1e3), at(300, x=math.nan)
    nans, ten_nans = at(10, 40, x=math.nan), at(200, length=10, x=math.nan)
    shuffled = at(100, 100, length=40, shuffle=True)
    softmax_loss = naive_cross_entropy
    return {
        "regression, scikit-learn's rate": Run(RATE, *line, slow, 0.07),
        "regression, rising rate": Run(RATE, *line, rising, 0.01),
        "regression, Adam": Run(RATE, *line, adam, 100.0),
        "shallow MLP, SGD": Run(RATE, *shallow, sgd, 10.0),
        "deep MLP, momentum": Run(RATE, *deep, mom, 0.1),
        "deep MLP, Adam": Run(RATE, *deep, adam, 0.2),
        "deep MLP, rising rate": Run(RATE, *deep, rising, 0.2),
        "ReLU RNN, SGD": Run(RATE, *relu_rows, sgd, 0.3),
        "ReLU RNN, Adam": Run(RATE, *relu, adam, 0.1),
        "tanh RNN, SGD": Run(RATE, *tanh, sgd, 3.0),
        "tanh RNN, AdamW": Run(RATE, *order, adamw, 0.1),
        "LSTM, Adam": Run(RATE, *lstm, adam, 1.0),
        "LSTM, momentum": Run(RATE, *memory, mom, 3.0),
        "transformer, SGD": Run(RATE, *attention, sgd, 3.0),
        "transformer, AdamW": Run(RATE, *attention, adamw, 0.5),
        "gain 30, regression": Run(INIT, *line, slow, 1e-3, gain=30.0),
        "gain 2, deep MLP": Run(INIT, *deep, sgd, 0.02, gain=2.0),
        "gain 2, deep MLP, Adam": Run(INIT, *deep, adam, 5e-3, gain=2.0),
        "radius 1.4, ReLU RNN": Run(INIT, *relu_rows, sgd, 0.03, gain=1.4),
        "radius 2, tanh RNN": Run(INIT, *tanh, mom, 0.1, gain=2.0),
        "radius 2, tanh RNN, Adam": Run(INIT, *order, adam, 3e-3, gain=2.0),
        "gain 4, transformer": Run(INIT, *attention, mom, 0.5, gain=4.0),
        "inputs x1000, regression": Run(DATA, *line, slow, 1e-4, corrupt=once),
        "inputs x1000, MLP": Run(DATA, *shallow, mom, 0.03, corrupt=often),
        "inputs x1000, ReLU RNN": Run(DATA, *relu, adam, 1e-3, corrupt=once),
        "inputs x1000, LSTM": Run(DATA, *memory, mom, 0.1, corrupt=often),
        "targets x1000": Run(DATA, *line, slow, 1e-3, corrupt=at(200, 100, y=1e3)),
        "targets x10000": Run(DATA, *memory, adam, 0.01, corrupt=at(200, 100, y=1e4)),
        "shuffled labels": Run(DATA, *deep, mom, 0.05, corrupt=shuffled),
        "NaN batch, deep MLP": Run(DATA, *deep, adam, 1e-3, corrupt=nan),
        "10 NaN batches, RNN": Run(DATA, *tanh, adam, 3e-3, corrupt=ten_nans),
        "NaN every 40 steps, LSTM": Run(DATA, *lstm, adam, 0.01, corrupt=nans),
        "f16, naive softmax": f16(*shallow, mom, 0.01, loss=softmax_loss),
        "f16, naive attention": f16(*naive, adam, 0.01),
        "f16, naive log cosh": f16(*noisy, slow, 0.01, loss=naive_log_cosh),
        "f16, loss scale, MLP": f16(*deep, mom, 0.01, loss_scale=2.0**16),
        "f16, loss scale, ReLU RNN": f16(*relu, adam, 1e-3, loss_scale=2.0**13),
        "f16, loss scale, LSTM": f16(*lstm, adam, 0.01, loss_scale=2.0**18),
        "bf16, naive softmax": Run(
            HALF, *shallow, mom, 0.1, dtype=jnp.bfloat16, loss=softmax_loss
        ),
        "MLP": Run(HEALTHY, *shallow, mom, 0.01),
        "LSTM": Run(HEALTHY, *lstm, adam, 2e-3),
        "ReLU RNN": Run(HEALTHY, *relu, adam, 1e-3),
        "new labels": Run(HEALTHY, *new_labels, mom, 0.03),
        "new coefficients": Run(HEALTHY, *new_line, slow, 2e-4),
        "heavy tails, rising norms": Run(HEALTHY, *tails, slow, 1e-5),
        "one image a step": Run(HEALTHY, *single, sgd, 0.01, steps=800),
        "warm-up and restarts": Run(HEALTHY, *attention, restarts, 0.01),
        "temporal order": Run(HEALTHY, *order, adam, 1e-3, steps=800),
        "units of 1e-6": Run(HEALTHY, *shallow, mom, 1e4, unit=1e-6),
        "units of 1e6": Run(HEALTHY, *lstm, adam, 2e-3, unit=1e6),
    }


@functools.cache
def draw_batches(task: Task, steps: int, seed: int) -> tuple[Any, Any]:
    """Returns the inputs and targets of all steps, stacked."""
    arrays = jax.device_put(task.arrays())
    keys = jax.random.split(jax.random.key(seed), steps)
    return jax.jit(jax.vmap(lambda key, step: task.batch(key, step, *arrays)))(
        keys, jnp.arange(steps)
    )


def train(run: Run, protect: Callable, *, measured: bool = False) -> Callable:
    """Returns a function `(seed, rate) -> (losses, is_finite, measures)`.

    The losses are those to be judged, `[steps]`; `is_finite` says whether all
    parameters are finite at the end. If `measured`, `measures` are the losses as the
    optimizer sees them, `[steps]`, and the norms of the gradient's leaves, `[steps,
    num_leaves]`.
    """
    is_clean = run == clean(run)

    def judged(params, inputs, targets):
        return run.task.loss(run.model.apply(params, inputs), targets)

    def cast(x):
        return x.astype(run.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def minimised(params, inputs, targets):
        params, inputs = jax.tree.map(cast, (params, inputs))
        outputs = run.model.apply(params, inputs)
        if run.loss is None:
            loss = run.task.loss(outputs.astype(jnp.float32), targets)
        else:
            loss = run.loss(outputs, cast(targets)).astype(jnp.float32)
        return run.unit * run.loss_scale * loss

    @jax.jit
    def scan(params, rate, batches, used):
        tx = optax.with_extra_args_support(protect(run.optimizer(rate)))

        def step(carry, batches):
            params, state = carry
            batch, used = batches
            value, grads = jax.value_and_grad(minimised)(params, *used)
            value, grads = jax.tree.map(lambda x: x / run.loss_scale, (value, grads))
            loss = value / run.unit if is_clean else judged(params, *batch)
            updates, state = tx.update(grads, state, params, value=value)
            params = optax.apply_updates(params, updates)
            measures = (value, optaxclip.leaf_norms(grads)) if measured else ()
            return (params, state), (loss, measures)

        carry = params, tx.init(params)
        carry, (losses, measures) = jax.lax.scan(step, carry, (batches, used))
        is_finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(carry[0])]
        return losses, jnp.stack(is_finite).all(), measures

    def trained(seed: int, rate: float) -> Any:
        params = run.model.init(jax.random.key(seed), run.gain)
        batches = used = draw_batches(run.task, run.steps, seed)
        if run.corrupt is not None:
            keys = jax.random.split(jax.random.key(seed + 1), run.steps)
            used = jax.vmap(run.corrupt)(keys, jnp.arange(run.steps), *batches)
        return jax.device_get(scan(params, rate, batches, used))

    return trained


def end(losses: np.ndarray, is_finite: bool = True) -> float:
    """The median loss of the last tenth; +inf if a parameter is not finite."""
    last = losses[-(len(losses) // 10) :].astype(float)
    is_good = np.isfinite(last) & is_finite
    return float(np.median(np.where(is_good, last, math.inf)))


def reference(run: Run, seed: int) -> float:
    """The best end of the run at smaller step sizes, and of the clean run."""
    trained = train(run, ARMS["nothing"])
    ends = [end(*trained(seed, run.rate / part)[:2]) for part in (4, 16, 64)]
    if run != clean(run):
        trained = train(clean(run), ARMS["nothing"])
        ends += [end(*trained(seed, run.rate / part)[:2]) for part in (1, 4, 16, 64)]
    return min(ends)


def trivial(run: Run, seed: int) -> float:
    """The end of the best constant output."""
    _, targets = draw_batches(run.task, run.steps, seed)
    last = targets[-(run.steps // 10) :]
    if run.task.loss is squared_error:
        return end(np.square(targets - last.mean()).mean(axis=(1, 2)))
    shares = np.bincount(last.ravel()) / last.size
    losses = -np.log(shares)[targets].reshape(run.steps, -1)
    return end(losses.mean(axis=1))


def limit(run: Run, seed: int) -> float:
    """The largest loss at a healthy end."""
    lowest, constant = reference(run, seed), trivial(run, seed)
    return max(1.2 * lowest, (lowest + constant) / 2)


def explodes(losses: np.ndarray, norms: np.ndarray) -> bool:
    """Whether a run does, from the losses `[steps]` that it minimises and its norms."""
    is_finite = np.isfinite(losses).all() and np.isfinite(norms).all()
    return not is_finite or losses.max() > 3 * losses[0]


def draw(path: Path, panels: dict[str, dict[str, np.ndarray]]) -> None:
    """Draws one panel a run: the loss under each arm."""
    figure = Figure(figsize=(4 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, runs) in zip(axes, panels.items(), strict=True):
        for i, (arm, losses) in enumerate(runs.items()):
            color = curves.COLORS[i % len(curves.COLORS)]
            axis.plot(losses, color=color, linewidth=1, alpha=0.8, label=arm)
        start = next(iter(runs.values()))[0]
        axis.set(yscale="log", ylim=(start / 1e4, start * 1e4), xlabel="step")
        axis.set_title(title, loc="left", fontsize="medium")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss of the clean batch")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=100)


def main(
    *,
    arms: tuple[str, ...] = tuple(ARMS),
    runs: tuple[str, ...] = (),
    seed: int = 0,
    plot: Path | None = None,
) -> None:
    """Prints how each run ends under each arm; what each arm saves, and what it harms.

    Args:
        arms: Those beside "nothing", which always runs.
        runs: Kinds of runs, or parts of their names; by default all.
        seed: Of parameters and batches.
        plot: Where to draw one run of each kind.
    """
    device, today = jax.devices()[0].platform, datetime.date.today()
    print(f"JAX {jax.__version__} on {device}, {today}, seed {seed}.")
    protections = {arm: ARMS[arm] for arm in dict.fromkeys(("nothing", *arms))}
    row = "{:31} | {:14} | {:>5} | {:>8}" + " | {:>15}" * len(protections)
    print("Losses at the end, + if healthy; the first step with inf or NaN; the limit")
    print(row.format("run", "kind", "step", "limit", *protections))
    kinds = (*KINDS, STALLED)
    ends: dict[str, dict[str, list]] = {arm: {k: [] for k in kinds} for arm in ARMS}
    seconds, panels, unfit = dict.fromkeys(protections, 0.0), {}, []
    for name, run in zoo().items():
        if runs and not any(part == run.kind or part in name for part in runs):
            continue
        highest, losses, found = limit(run, seed), {}, {}
        kind = run.kind
        for arm, protect in protections.items():
            start = time.perf_counter()
            trained = train(run, protect, measured=arm == "nothing")(seed, run.rate)
            losses[arm], is_finite, measures = trained
            found[arm] = end(losses[arm], is_finite)
            seconds[arm] += time.perf_counter() - start
            if arm == "nothing" and kind != HEALTHY and not explodes(*measures):
                kind = STALLED
        bad = np.flatnonzero(~np.isfinite(losses["nothing"]))
        cells = [f"{x:.3g} {'+' if x <= highest else '-'}" for x in found.values()]
        first = bad[0] if len(bad) else "never"
        print(row.format(name, kind, first, f"{highest:.3g}", *cells), flush=True)
        is_learnable = highest < trivial(run, seed)
        is_fit = (found["nothing"] <= highest) == (kind == HEALTHY)
        if not (is_learnable and is_fit):
            unfit.append(name)
            continue
        panels.setdefault(kind, (f"{kind}: {name}", losses))
        for arm, loss in found.items():
            ends[arm][kind].append((loss <= highest, loss / found["nothing"]))
    if plot is not None:
        draw(plot, dict(panels.values()))
    print(f"\nNot counted, for their end unprotected: {', '.join(unfit) or 'none'}.")

    row = "{:16}" + " | {:>14}" * len(kinds) + " | {:>14} | {:>7}"
    print(
        "Runs that end healthy; of the healthy ones how many are harmed (worst ratio)"
    )
    print(row.format("arm", *kinds, "harmed", "seconds"))
    sentences = []
    for arm in protections:
        cells = [f"{sum(x for x, _ in v)} of {len(v)}" for v in ends[arm].values()]
        ratios = [ratio for _, ratio in ends[arm][HEALTHY]]
        harmed = sum(ratio > 1.1 for ratio in ratios)
        cells.append(f"{harmed} (x{max(ratios, default=math.nan):.3g})")
        print(row.format(arm, *cells, f"{seconds[arm]:.0f}"))
        exploding = [x for kind in CAUSES for x, _ in ends[arm][kind]]
        stalled = [x for x, _ in ends[arm][STALLED]]
        sentences.append(
            f"With {arm}, {sum(exploding)} of {len(exploding)} exploding runs end "
            f"healthy, of those that end badly without an explosion {sum(stalled)} of "
            f"{len(stalled)}, and {harmed} of {len(ratios)} healthy runs are harmed."
        )
    print("\n".join(sentences[1:]))


if __name__ == "__main__":
    tyro.cli(main)
