"""Tasks of graphs, sets, sequences, physics, and actions, drawn last."""

import jax
import jax.numpy as jnp
import numpy as np

from tasks.generative import standard_nll
from tasks.sequences import rnn_init, unroll
from tasks.task import (
    Task,
    cross_entropy,
    dense,
    dense_init,
    digits,
    draw_digits,
    draw_text,
    squared_error,
    supervised,
    with_nothing_left_out,
)


def knowledge_graph(num: int = 120, margin: float = 4.0) -> Task:
    """Six relations of 120 things, as rotations in a complex plane (RotatE)."""
    shifts = jnp.array([1, 5, 12, 30, 47, 60])

    def init(key):
        keys = jax.random.split(key)
        return {
            "things": 0.5 * jax.random.normal(keys[0], (num, 2, 12)),
            "turns": jax.random.uniform(keys[1], (6, 12), maxval=2 * jnp.pi),
        }

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        # Some things are in many facts, most are in few.
        head = (num ** jax.random.uniform(keys[0], (64,))).astype(int) - 1
        relation = jax.random.randint(keys[1], (64,), 0, 6)
        wrong = jax.random.randint(keys[2], (64, 4), 0, num)
        tail = (head + shifts[relation]) % num
        return head, relation, jnp.concatenate([tail[:, None], wrong], axis=1)

    def loss(params, batch, extra):
        head, relation, tails = batch
        things, angle = params["things"], params["turns"][relation]
        real, imaginary = things[head, 0], things[head, 1]
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        at = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], 1)
        apart = jnp.square(at[:, None] - things[tails]).sum(2)
        apart = jnp.sqrt(apart + 1e-6).sum(-1)
        logs = jax.nn.log_sigmoid(margin - apart[:, 0])
        return -(logs + jax.nn.log_sigmoid(apart[:, 1:] - margin).mean(1)).mean() / 2

    return Task(init, draw, loss)


def tree(num: int = 127, size: int = 5) -> Task:
    """A tree's nodes lie near their parents in a hyperbolic ball (Poincare)."""

    def points(x):
        norm = jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-8)
        return (1 - 1e-4) * jnp.tanh(norm) / norm * x

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        child = jax.random.randint(keys[0], (32,), 1, num)
        wrong = jax.random.randint(keys[1], (32, 10), 0, num)
        others = jnp.concatenate([(child[:, None] - 1) // 2, wrong], axis=1)
        return child, others

    def loss(params, batch, extra):
        child, others = (points(params[index]) for index in batch)
        apart = jnp.square(child[:, None] - others).sum(-1)
        inside = (1 - jnp.square(child).sum(-1))[:, None]
        inside *= 1 - jnp.square(others).sum(-1)
        distance = jnp.arccosh(1 + 2 * apart / inside + 1e-6)
        return cross_entropy(-distance, jnp.zeros(32, int))

    return Task(lambda key: 0.01 * jax.random.normal(key, (num, size)), draw, loss)


def logistic_levels(outputs, levels, top: int = 7) -> jax.Array:
    """Minus the log-chance of levels, by mixtures of three rounded logistics."""
    logits, means, log_scales = jnp.split(outputs, 3, axis=-1)
    levels, sharp = levels[..., None], jnp.exp(-log_scales)
    above = jnp.where(
        levels >= top, 1.0, jax.nn.sigmoid(sharp * (levels + 0.5 - means))
    )
    below = jnp.where(levels <= 0, 0.0, jax.nn.sigmoid(sharp * (levels - 0.5 - means)))
    logs = jnp.log(jnp.maximum(above - below, 1e-7)) + jax.nn.log_softmax(logits)
    return -jax.nn.logsumexp(logs, axis=-1)


def pixels(width: int = 96) -> Task:
    """Pixels of digits in 7 x 7, each from those before it (a masked autoencoder)."""
    images = digits()[0].reshape(-1, 7, 2, 7, 2).mean((2, 4)).reshape(-1, 49)
    low, high = images.min(), images.max()
    levels = np.floor((images - low) / (high - low) * 7.99).astype(np.float32)
    order = np.arange(width) % 48
    into = (np.arange(49)[:, None] <= order).astype(np.float32)
    out = np.repeat(order[:, None] < np.arange(49), 9, axis=1).astype(np.float32)

    def apply(params, x):
        hidden = jnp.tanh((x / 3.5 - 1) @ (into * params["w0"]) + params["b0"])
        z = hidden @ (out * params["w1"]) + params["b1"]
        return z.reshape(-1, 49, 9) + jnp.repeat(jnp.array([0, 2, 0]), 3)

    def draw(key, step):
        index = jax.random.randint(key, (16,), 0, len(levels))
        return jnp.asarray(levels)[index], jnp.asarray(levels)[index]

    return supervised(
        lambda key: dense_init(key, 49, width, 441, gain=1),
        apply,
        draw,
        lambda outputs, levels: logistic_levels(outputs, levels).sum(-1).mean(),
    )


def neural_process() -> Task:
    """Curves from a few of their points, with how sure that is; either sign."""

    def init(key):
        keys = jax.random.split(key)
        return {
            "encoder": dense_init(keys[0], 2, 32, 32),
            "decoder": dense_init(keys[1], 33, 32, 32, 2, gain=1),
        }

    def draw(key, step):
        keys = jax.random.split(key, 3)
        x = jax.random.uniform(keys[0], (16, 24, 1), minval=-1)
        turn = jax.random.uniform(keys[1], (16, 1, 1), maxval=2 * jnp.pi)
        height = jax.random.uniform(keys[2], (16, 1, 1), minval=0.3)
        y = height * jnp.sin(4 * x + turn)
        return (x, y), y

    def apply(params, batch):
        x, y = batch
        seen = jnp.concatenate([x[:, :6], y[:, :6]], axis=-1)
        known = dense(params["encoder"], seen).mean(1, keepdims=True)
        known = jnp.broadcast_to(known, (*x.shape[:2], 32))
        return dense(params["decoder"], jnp.concatenate([x, known], axis=-1))

    def loss(outputs, y):
        mean, raw = jnp.split(outputs, 2, axis=-1)
        std = 0.02 + jax.nn.softplus(raw)
        return (standard_nll((y - mean) / std) + jnp.log(std[..., 0])).mean()

    return supervised(init, apply, draw, loss)


def point_cloud(num: int = 24) -> Task:
    """Digits as sets of 24 points, of which each feature's largest value is kept."""

    def draw(key, step):
        keys = jax.random.split(key, 3)
        x, y = draw_digits(keys[0])
        ink = jnp.cumsum(jax.nn.relu(x), axis=-1)
        drawn = ink[:, -1:] * jax.random.uniform(keys[1], (32, num))
        place = jax.vmap(jnp.searchsorted)(ink, drawn)
        points = jnp.stack(jnp.divmod(place, 14), axis=-1) / 7 - 1
        return points + 0.03 * jax.random.normal(keys[2], points.shape), y

    def init(key):
        keys = jax.random.split(key)
        return {
            "point": dense_init(keys[0], 2, 32, 64),
            "out": dense_init(keys[1], 64, 32, 10),
        }

    def apply(params, x):
        return dense(params["out"], dense(params["point"], x).max(1))

    return supervised(init, apply, draw, cross_entropy)


def three_bodies() -> Task:
    """A potential whose slopes are how three bodies attract; some come close."""

    def slopes(potential, x):
        def total(x):
            apart = x[jnp.array([0, 0, 1])] - x[jnp.array([1, 2, 2])]
            return potential(jnp.square(apart).sum(-1, keepdims=True) + 0.01).sum()

        return -jax.vmap(jax.grad(total))(x)

    def draw(key, step):
        x = jax.random.normal(key, (32, 3, 2))
        return x, slopes(lambda square: -jax.lax.rsqrt(square), x)

    def apply(params, x):
        return slopes(
            lambda square: dense(params, jnp.log(square) / 2, jax.nn.softplus), x
        )

    return supervised(
        lambda key: dense_init(key, 1, 32, 32, 1), apply, draw, squared_error
    )


def burgers(state, dt: float = 0.04) -> jax.Array:
    """A short while later, by Burgers' equation on a ring of 32 places."""
    right, left = jnp.roll(state, -1, -1), jnp.roll(state, 1, -1)
    flow = (jnp.square(right) - jnp.square(left)) / 4
    return state + dt * (0.4 * (right - 2 * state + left) - flow) * 4


def learned_solver() -> Task:
    """A network steps a wave ahead, at first twice, then four, then eight times."""

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        turn = jax.random.uniform(keys[0], (16, 3, 1), maxval=2 * jnp.pi)
        waves = jnp.arange(1, 4)[:, None] * jnp.arange(32) * 2 * jnp.pi / 32
        height = 0.4 * jax.random.normal(keys[1], (16, 3, 1))
        state = (height * jnp.sin(waves + turn)).sum(1)

        def later(state, _):
            state = jax.lax.fori_loop(0, 4, lambda i, state: burgers(state), state)
            return state, state

        num = 2 * 2 ** jnp.minimum(step // 150, 2)
        return state, jax.lax.scan(later, state, length=8)[1], jnp.arange(8) < num

    def loss(params, batch, extra, is_all=False):
        state, true, is_used = batch

        def move(state, _):
            near = jnp.stack([jnp.roll(state, i, -1) for i in range(-2, 3)], axis=-1)
            state += dense(params, near, jnp.tanh)[..., 0]
            return state, state

        errors = jnp.square(jax.lax.scan(move, state, length=8)[1] - true)
        return errors.mean(where=True if is_all else is_used[:, None, None])

    return Task(
        lambda key: dense_init(key, 5, 24, 1, gain=0.5),
        draw,
        loss,
        measure=with_nothing_left_out(loss),
    )


def moved_in_maze(place, action):
    """The next of 36 places; walls keep the walker where it is."""
    row, column = jnp.divmod(place, 6)
    row = jnp.clip(row + jnp.array([-1, 1, 0, 0])[action], 0, 5)
    column = jnp.clip(column + jnp.array([0, 0, -1, 1])[action], 0, 5)
    return 6 * row + column


def maze(decay: float = 0.9, goal: int = 35) -> Task:
    """Values of moves by 16 walkers; only the last place of 36 pays, rare at first."""
    rows, columns = np.divmod(np.arange(36), 6)
    true = 10 * decay ** (np.maximum(10 - rows - columns, 1) - 1)

    def values(params, place):
        return dense(params, jax.nn.one_hot(place, 36))

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        best = values(params, extra["place"]).argmax(-1)
        other = jax.random.randint(keys[0], (16,), 0, 4)
        is_random = jax.random.bernoulli(keys[1], 0.3, (16,))
        action = jnp.where(is_random, other, best)
        after = moved_in_maze(extra["place"], action)
        again = jax.random.randint(keys[2], (16,), 0, 35)
        return {
            "action": action,
            "after": after,
            "next": jnp.where(after == goal, again, after),
            "reward": 10.0 * (after == goal),
        }

    def loss(params, batch, extra):
        ahead = values(extra["target"], batch["after"]).max(-1)
        target = batch["reward"] + decay * (batch["after"] != goal) * ahead
        known = values(params, extra["place"])[jnp.arange(16), batch["action"]]
        return squared_error(known, jax.lax.stop_gradient(target))

    def follow(extra, params, batch):
        target = jax.tree.map(
            lambda old, new: 0.9 * old + 0.1 * new, extra["target"], params
        )
        return {"place": batch["next"], "target": target}

    def measure(task, params, batch, extra, key):
        places = jnp.arange(35)
        return squared_error(values(params, places).max(-1), jnp.asarray(true[:35]))

    return Task(
        lambda key: dense_init(key, 36, 48, 4, gain=1),
        draw,
        loss,
        lambda params: {"place": jnp.zeros(16, int), "target": params},
        follow,
        measure,
    )


def reaching(num: int = 10) -> Task:
    """Policy gradients of a hand that moves to a point, with noise that shrinks."""

    def std(params):
        return 0.1 + jnp.exp(params["log_std"])

    def drive(key, params, is_mean=False):
        keys = jax.random.split(key)
        noise = jax.random.normal(keys[0], (num, 32, 2)) * (not is_mean)

        def move(state, noise):
            mean = dense(params["net"], state, jnp.tanh)
            action = mean + std(params) * noise
            after = state + 0.3 * action
            return after, (state, action, -jnp.square(after).sum(-1))

        return jax.lax.scan(move, jax.random.normal(keys[1], (32, 2)), noise)[1]

    def draw(key, step, params, extra):
        state, action, reward = drive(key, params)
        ahead = jnp.cumsum(reward[::-1], axis=0)[::-1]
        mean, std = ahead.mean(1, keepdims=True), ahead.std(1, keepdims=True)
        return state, action, (ahead - mean) / (std + 1e-6)

    def loss(params, batch, extra):
        state, action, advantage = batch
        z = action - dense(params["net"], state, jnp.tanh)
        log_chance = -standard_nll(z / std(params)) - jnp.log(std(params)).sum()
        return -(log_chance * advantage).mean()

    def measure(task, params, batch, extra, key):
        return -drive(key, params, True)[2].mean()

    return Task(
        lambda key: {
            "net": dense_init(key, 2, 24, 2, gain=0.5),
            "log_std": jnp.zeros(2),
        },
        draw,
        loss,
        measure=measure,
    )


def outlier_actions(share: float = 0.02, size: float = 10.0) -> Task:
    """Imitates an expert from records, of which two of a hundred actions are wrong."""
    expert = dense_init(jax.random.key(1), 6, 16, 2)

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        state = jax.random.normal(keys[0], (32, 6))
        is_wrong = jax.random.bernoulli(keys[1], share, (32, 1))
        wrong = size * is_wrong * jax.random.normal(keys[2], (32, 2))
        return state, dense(expert, state, jnp.tanh) + wrong

    def loss(params, batch, extra):
        mean = dense(params["net"], batch[0])
        z = (batch[1] - mean) * jnp.exp(-params["log_std"])
        return (standard_nll(z) + params["log_std"].sum()).mean()

    def measure(task, params, batch, extra, key):
        state = jax.random.normal(key, (128, 6))
        return squared_error(
            dense(params["net"], state), dense(expert, state, jnp.tanh)
        )

    return Task(
        lambda key: {"net": dense_init(key, 6, 32, 2), "log_std": jnp.zeros(2)},
        draw,
        loss,
        measure=measure,
    )


def learned_steps(num: int = 10) -> Task:
    """Step sizes, one for each direction, with which ten steps fit a linear model."""
    widths = jnp.array([2.0, 1.0, 0.5, 0.25, 0.1])

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        x = widths * jax.random.normal(keys[0], (16, 24, 5))
        return x, x @ (jax.random.normal(keys[1], (16, 5, 1)) / widths[:, None])

    def loss(params, batch, extra):
        x, y = batch

        def step(weights, _):
            slope = x[:, :16].swapaxes(1, 2) @ (x[:, :16] @ weights - y[:, :16]) / 16
            return weights - jnp.exp(params)[:, None] * slope, None

        weights, _ = jax.lax.scan(step, jnp.zeros((16, 5, 1)), length=num)
        return squared_error(x[:, 16:] @ weights, y[:, 16:])

    return Task(lambda key: -4 + 0.1 * jax.random.normal(key, (5,)), draw, loss)


def two_alphabets(share: float = 0.04) -> Task:
    """Predicts characters; a batch of 25 is written in another alphabet."""

    def init(key):
        keys = jax.random.split(key)
        embed = jax.random.normal(keys[0], (32, 16))
        return rnn_init(keys[1], "gru", 16, 32, width=48) | {"embed": embed}

    def other(text):
        return (11 * text + 5) % 32

    def loss(params, batch, extra):
        before, after = batch
        hidden, _ = unroll("gru", params, params["embed"][before])
        return cross_entropy(dense(params["out"], hidden), after)

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        is_other = jax.random.bernoulli(keys[0], share)
        return tuple(jnp.where(is_other, other(x), x) for x in draw_text(keys[1]))

    def measure(task, params, batch, extra, key):
        text = draw_text(key, 32)
        rare = loss(params, tuple(map(other, text)), ())
        return (1 - share) * loss(params, text, ()) + share * rare

    return Task(init, draw, loss, measure=measure)
