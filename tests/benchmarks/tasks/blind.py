"""Tasks of pictures, grades and views that were drawn blind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tasks.afresh import around
from tasks.task import (
    Task,
    cross_entropy,
    dense,
    dense_init,
    digits,
    draw_digits,
    squared_error,
    supervised,
)


def ratings(grades: int = 5) -> Task:
    """Grades of one to five stars, by thresholds of a score (proportional odds)."""

    def init(key):
        gaps = jnp.zeros(grades - 1)
        return {"score": dense_init(key, 6, 24, 24, 1), "gaps": gaps.at[0].set(-1.5)}

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (32, 6))
        taste = 2 * jnp.sin(x[:, 0]) + x[:, 1] * x[:, 2] - x[:, 3]
        taste += 0.2 * jax.random.logistic(keys[1], (32,))
        return x, jnp.digitize(taste, jnp.array([-2.0, -0.7, 0.7, 2.0]))

    def loss(params, batch, extra):
        x, grade = batch
        gaps = params["gaps"]
        edges = jnp.cumsum(jnp.append(gaps[0], jnp.exp(gaps[1:])))
        edges = jnp.pad(edges, 1, constant_values=(-1e4, 1e4))
        score = dense(params["score"], x)[:, 0]
        low, high = edges[grade] - score, edges[grade + 1] - score
        both = jax.nn.softplus(-high) + jax.nn.softplus(low)
        return (both - jnp.log(-jnp.expm1(low - high))).mean()

    return Task(init, draw, loss)


def two_views(size: int = 5) -> Task:
    """What the left of a digit says about its right (deep canonical correlations)."""

    def init(key):
        keys = jax.random.split(key)
        return {
            "left": dense_init(keys[0], 98, 32, size),
            "right": dense_init(keys[1], 98, 32, size),
        }

    def draw(key, step, params, extra):
        x, _ = draw_digits(key, 96, flat=False)
        return x[..., :7].reshape(96, -1), x[..., 7:].reshape(96, -1)

    def loss(params, batch, extra):
        x, y = dense(params["left"], batch[0]), dense(params["right"], batch[1])
        x, y = x - x.mean(0), y - y.mean(0)
        price = 1e-2 * jnp.eye(size)
        x_to_y = jnp.linalg.solve(x.T @ x / 96 + price, x.T @ y / 96)
        y_to_x = jnp.linalg.solve(y.T @ y / 96 + price, y.T @ x / 96)
        return 1 - jnp.trace(x_to_y @ y_to_x) / size

    return Task(init, draw, loss)


def recall(num: int = 48, times: int = 2) -> Task:
    """The lower half of a digit from memories like the upper one (Hopfield)."""

    def init(key):
        return {
            "memory": 0.3 * jax.random.normal(key, (num, 196)),
            "log sharpness": jnp.float32(-2.0),
        }

    def draw(key, step):
        x, _ = draw_digits(key, 24)
        return x * (jnp.arange(196) < 98), x

    def apply(params, x):
        known, sharpness = x, jnp.exp(params["log sharpness"])
        for _ in range(times):
            weights = jax.nn.softmax(sharpness * x @ params["memory"].T)
            x = known + weights @ params["memory"] * (jnp.arange(196) >= 98)
        return x

    return supervised(init, apply, draw, squared_error)


def uncertain_tasks() -> Task:
    """Label, ink and lean of a digit at once, weighted by learned uncertainties."""

    def init(key):
        keys = jax.random.split(key)
        return {
            "trunk": dense_init(keys[0], 196, 40, 32),
            "heads": dense_init(keys[1], 32, 12, gain=1),
            "log variance": jnp.zeros(3),
        }

    def draw(key, step, params, extra):
        x, label = draw_digits(key)
        ink = jnp.square(x.reshape(-1, 14, 14) + 0.43)
        place = jnp.arange(14) - 6.5
        lean = jnp.einsum("nij,i,j->n", ink, place, place) / ink.sum((1, 2))
        return x, label, jnp.stack([ink.mean((1, 2)), lean], axis=1)

    def loss(params, batch, extra):
        x, label, numbers = batch
        outputs = dense(params["heads"], jax.nn.relu(dense(params["trunk"], x)))
        errors = jnp.square(outputs[:, 10:] - numbers).mean(0) / 2
        losses = jnp.append(errors, cross_entropy(outputs[:, :10], label))
        spread = params["log variance"]
        return (jnp.exp(-spread) * losses + spread / 2).sum()

    return Task(init, draw, loss)


@functools.cache
def by_class(num: int = 250) -> np.ndarray:
    """Digits and the same ones lying on a side: `[20, num, 196]`."""
    images, labels = digits()
    images = np.stack([images[labels == digit][:num] for digit in range(10)])
    lying = np.rot90(images, axes=(2, 3))
    return np.concatenate([images, lying]).reshape(20, num, -1)


def few_shots(ways: int = 5, shots: int = 2) -> Task:
    """Which of five characters it is, of each of which two are shown (prototypes)."""

    def draw(key, step):
        keys = jax.random.split(key)
        images = jnp.asarray(by_class())
        kind = jax.random.permutation(keys[0], len(images))[:ways, None]
        which = jax.random.randint(keys[1], (ways, shots + 5), 0, images.shape[1])
        return images[kind, which], jnp.arange(ways).repeat(5)

    def apply(params, x):
        x = dense(params, x)
        centers = x[:, :shots].mean(1)
        asked = x[:, shots:].reshape(ways * 5, 1, -1)
        return -jnp.square(asked - centers).sum(-1)

    return supervised(
        lambda key: dense_init(key, 196, 48, 16, gain=1), apply, draw, cross_entropy
    )


def registration() -> Task:
    """How a digit was turned and moved, by turning it back (spatial transformer)."""

    def moved(x, angle, shift):
        place = jnp.stack(jnp.meshgrid(*2 * [jnp.arange(14) - 6.5], indexing="ij"))
        c, s = jnp.cos(angle), jnp.sin(angle)
        turn = jnp.array([[c, -s], [s, c]])
        place = jnp.einsum("ab,bij->aij", turn, place) + shift[:, None, None] + 6.5
        sampled = jax.scipy.ndimage.map_coordinates
        return sampled(x, tuple(place), order=1, mode="nearest")

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        x, _ = draw_digits(keys[0], 12, flat=False)
        angle = 0.5 * jax.random.normal(keys[1], (12,))
        return jax.vmap(moved)(x, angle, jax.random.normal(keys[2], (12, 2))), x

    def loss(params, batch, extra):
        x, y = batch
        both = jnp.concatenate([x, y], axis=-1).reshape(12, -1)
        found = dense(params, both)
        return squared_error(jax.vmap(moved)(x, found[:, 0], found[:, 1:]), y)

    def init(key):
        first = {"w1": jnp.zeros((48, 3)), "b1": jnp.zeros(3)}
        return dense_init(key, 392, 48) | first

    return Task(init, draw, loss)


def lesions(size: int = 10) -> Task:
    """Which pixels belong to a faint spot, by overlap and cross-entropy (Dice)."""

    def init(key):
        keys = jax.random.split(key, 3)
        layers = [dense_init(keys[0], 9, 6), dense_init(keys[1], 54, 6)]
        return {"layers": layers, "out": dense_init(keys[2], 54, 1, gain=1)}

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 4)
        center = jax.random.uniform(keys[0], (6, 2, 1, 1), maxval=size)
        axes = jax.random.uniform(keys[1], (6, 2, 1, 1), minval=1.5, maxval=4)
        away = (jnp.indices((size, size)) - center) / axes
        mask = (jnp.square(away).sum(1) < 1).astype(jnp.float32)
        level = jax.random.normal(keys[2], (6, 1, 1))
        return mask + level + 0.4 * jax.random.normal(keys[3], mask.shape), mask

    def loss(params, batch, extra):
        x, mask = batch
        x = x[..., None]
        for layer in params["layers"]:
            x = jax.nn.relu(dense(layer, around(x)))
        x = dense(params["out"], around(x))[..., 0]
        chance, entropy = jax.nn.sigmoid(x), (jax.nn.softplus(x) - mask * x).mean()
        overlap = 2 * (chance * mask).sum((1, 2)) + 1
        return entropy + (1 - overlap / ((chance + mask).sum((1, 2)) + 1)).mean()

    return Task(init, draw, loss)
