"""Tasks of learning distributions: autoencoders, diffusion, flows, adversaries."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tasks.task import (
    Task,
    dense,
    dense_init,
    draw_blobs,
    draw_digits,
    squared_error,
    supervised,
)

LATENT = 8


def standard_nll(z) -> jax.Array:
    """Minus the log-density of a standard normal distribution, over the last axis."""
    return 0.5 * (jnp.square(z) + math.log(2 * math.pi)).sum(-1)


def divergence(mean, log_std) -> jax.Array:
    """Of a normal distribution from the standard one, over the last axis."""
    each = jnp.square(mean) + jnp.exp(2 * log_std) - 2 * log_std - 1
    return 0.5 * each.sum(-1)


def autoencoder_init(key):
    keys = jax.random.split(key)
    return {
        "encoder": dense_init(keys[0], 196, 48, 2 * LATENT, gain=0.5),
        "decoder": dense_init(keys[1], LATENT, 48, 196, gain=1.0),
    }


def draw_for_autoencoder(key, step, params, extra):
    del params, extra
    keys = jax.random.split(key)
    return {
        "x": draw_digits(keys[0])[0],
        "noise": jax.random.normal(keys[1], (32, LATENT)),
        "kl_weight": jnp.minimum(step / 300, 1.0),
    }


def negative_elbo(params, batch, kl_weight=1.0) -> jax.Array:
    """Of a variational autoencoder; unbounded where its log-variances are."""
    mean, log_std = jnp.split(dense(params["encoder"], batch["x"]), 2, axis=-1)
    z = mean + jnp.exp(log_std) * batch["noise"]
    error = 0.5 * jnp.square(dense(params["decoder"], z) - batch["x"]).sum(-1)
    return (error + kl_weight * divergence(mean, log_std)).mean()


def variational_autoencoder() -> Task:
    """Maximizes the evidence lower bound of digits."""
    return Task(
        init=autoencoder_init,
        batch=draw_for_autoencoder,
        loss=lambda params, batch, extra: negative_elbo(params, batch),
    )


def annealed_autoencoder() -> Task:
    """A variational autoencoder; its KL divergence comes in over 300 steps."""
    return Task(
        init=autoencoder_init,
        batch=draw_for_autoencoder,
        loss=lambda params, batch, extra: negative_elbo(
            params, batch, batch["kl_weight"]
        ),
        measure=lambda task, params, batch, extra, key: negative_elbo(params, batch),
    )


def masked_autoencoder() -> Task:
    """Fills in the half of a digit that is hidden in patches of 2 x 2 pixels."""

    def draw(key, step, params, extra):
        del step, params, extra
        keys = jax.random.split(key)
        images, _ = draw_digits(keys[0], flat=False)
        is_shown = jax.random.bernoulli(keys[1], 0.5, (32, 7, 7))
        is_shown = is_shown.repeat(2, axis=1).repeat(2, axis=2)
        x = jnp.concatenate([images * is_shown, is_shown], axis=-1)
        return x.reshape(32, -1), images, ~is_shown

    def loss(params, batch, extra):
        del extra
        x, images, is_hidden = batch
        error = dense(params, x).reshape(images.shape) - images
        return (is_hidden * jnp.square(error)).sum() / is_hidden.sum()

    return Task(lambda key: dense_init(key, 392, 48, 48, 196), draw, loss)


def timed_init(key):
    return dense_init(key, 2 + 4, 64, 64, 2)


def timed(params, x, time) -> jax.Array:
    """A network of a point and a time in [0, 1]."""
    angle = jnp.pi * time * jnp.arange(1, 3)
    x = jnp.concatenate([x, jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return dense(params, x, jax.nn.silu)


def draw_timed(key, step, params, extra):
    del step, params, extra
    keys = jax.random.split(key, 3)
    return {
        "x": draw_blobs(keys[0], 128),
        "noise": jax.random.normal(keys[1], (128, 2)),
        "time": jax.random.uniform(keys[2], (128, 1)),
    }


def diffusion() -> Task:
    """Predicts the noise that was added to points of 8 Gaussians, at random times."""

    def loss(params, batch, extra):
        del extra
        angle = jnp.pi / 2 * batch["time"]
        noisy = jnp.cos(angle) * batch["x"] + jnp.sin(angle) * batch["noise"]
        return squared_error(timed(params, noisy, batch["time"]), batch["noise"])

    return Task(init=timed_init, batch=draw_timed, loss=loss)


def flow_matching() -> Task:
    """Predicts the velocity from noise to points of 8 Gaussians, on straight lines."""

    def loss(params, batch, extra):
        del extra
        velocity = batch["x"] - batch["noise"]
        between = batch["noise"] + batch["time"] * velocity
        return squared_error(timed(params, between, batch["time"]), velocity)

    return Task(init=timed_init, batch=draw_timed, loss=loss)


def score_matching() -> Task:
    """Learns an energy, whose slope denoises points of 8 Gaussians."""

    def loss(params, batch, extra):
        del extra
        score = -jax.grad(lambda x: dense(params, x, jax.nn.silu).sum())(
            batch["x"] + 0.3 * batch["noise"]
        )
        return squared_error(0.3 * score, -batch["noise"])

    return Task(
        init=lambda key: dense_init(key, 2, 48, 48, 1), batch=draw_timed, loss=loss
    )


def draw_moons(key, num: int = 128) -> jax.Array:
    """Points of two half-circles that interlock: `[num, 2]`."""
    keys = jax.random.split(key, 3)
    angle = jnp.pi * jax.random.uniform(keys[0], (num,))
    side = jax.random.rademacher(keys[1], (num,), jnp.float32)
    x = side * (jnp.cos(angle) - 0.5)
    y = side * (jnp.sin(angle) - 0.25)
    return jnp.stack([x, y], axis=-1) + 0.05 * jax.random.normal(keys[2], (num, 2))


def affine_couplings(params, x):
    """Latent points and the log-determinant; nothing bounds the log-scales."""
    log_det = 0.0
    for coupling in params:
        shift, log_scale = jnp.split(dense(coupling, x[:, :1], jnp.tanh), 2, axis=-1)
        x = jnp.concatenate([x[:, 1:] * jnp.exp(log_scale) + shift, x[:, :1]], axis=-1)
        log_det += log_scale[:, 0]
    return x, log_det


def real_nvp() -> Task:
    """A flow of six affine couplings, fit to two moons; its loss has either sign."""

    def loss(params, batch, extra):
        del extra
        z, log_det = affine_couplings(params, batch)
        return (standard_nll(z) - log_det).mean()

    return Task(
        init=lambda key: [
            dense_init(k, 1, 24, 24, 2, gain=1.0) for k in jax.random.split(key, 6)
        ],
        batch=lambda key, step, params, extra: draw_moons(key),
        loss=loss,
    )


def draw_bumps(key, num: int = 128) -> jax.Array:
    """Numbers in three narrow bumps."""
    keys = jax.random.split(key)
    center = 0.2 * jax.random.randint(keys[0], (num,), -1, 2)
    return center + 0.02 * jax.random.normal(keys[1], (num,))


def flow_1d() -> Task:
    """A monotone flow in one dimension; its loss starts positive, becomes negative."""

    def latent(params, x):
        bends = jnp.tanh(jnp.exp(params["slope"]) * (x - params["center"]))
        return jnp.exp(params["scale"]) * x + (jnp.exp(params["height"]) * bends).sum()

    def loss(params, batch, extra):
        del extra
        with_slope = jax.value_and_grad(latent, argnums=1)
        z, slope = jax.vmap(with_slope, in_axes=(None, 0))(params, batch)
        return (standard_nll(z[:, None]) - jnp.log(slope)).mean()

    return Task(
        init=lambda key: {
            "scale": jnp.float32(-1),
            "slope": jnp.ones(8),
            "center": 0.3 * jax.random.normal(key, (8,)),
            "height": jnp.full(8, -4.0),
        },
        batch=lambda key, step, params, extra: draw_bumps(key),
        loss=loss,
    )


def energy_distance(x, y) -> jax.Array:
    """Between two samples; zero where they are the same."""

    def apart(a, b):
        return jnp.sqrt(jnp.square(a[:, None] - b).sum(-1) + 1e-12).mean()

    return jnp.sqrt(2 * apart(x, y) - apart(x, x) - apart(y, y))


def adversaries_init(key):
    keys = jax.random.split(key)
    return {
        "generator": dense_init(keys[0], 4, 32, 32, 2),
        "critic": dense_init(keys[1], 2, 32, 32, 1),
    }


def draw_for_adversaries(key, step, params, extra, num: int = 64):
    del step, params, extra
    keys = jax.random.split(key, 4)
    return {
        "real": draw_blobs(keys[0], num),
        "noise": jax.random.normal(keys[1], (num, 4)),
        "blur": jax.random.normal(keys[2], (2, num, 2)),
        "mix": jax.random.uniform(keys[3], (num, 1)),
    }


def distance_of_fakes(task, params, batch, extra, key):
    del task, batch
    fresh = draw_for_adversaries(key, 0, params, extra, num=256)
    return energy_distance(dense(params["generator"], fresh["noise"]), fresh["real"])


def adversaries(loss: Callable, blur: float = 0.5) -> Task:
    """A generator of 8 Gaussians and a critic, which sees all points blurred.

    Args:
        loss: From `(critic, real, fake, mix)` to the losses of the generator and of
            the critic; `critic` maps points to numbers, `mix` is uniform in [0, 1].
        blur: The standard deviation of what is added.
    """

    def losses(params, batch, extra):
        del extra
        noise = blur * batch["blur"]
        real = batch["real"] + noise[0]
        fake = dense(params["generator"], batch["noise"]) + noise[1]

        def critic(x):
            return dense(params["critic"], x, jax.nn.leaky_relu)[:, 0]

        generator_loss, critic_loss = loss(critic, real, fake, batch["mix"])
        return {"generator": generator_loss, "critic": critic_loss}

    return Task(
        init=adversaries_init,
        batch=draw_for_adversaries,
        loss=losses,
        measure=distance_of_fakes,
        players=("generator", "critic"),
    )


def gan() -> Task:
    """A generator and a critic with the non-saturating loss."""

    def loss(critic, real, fake, mix):
        del mix
        fooled = jax.nn.softplus(-critic(fake)).mean()
        caught = jax.nn.softplus(critic(fake)).mean()
        return fooled, jax.nn.softplus(-critic(real)).mean() + caught

    return adversaries(loss)


def least_squares_gan() -> Task:
    """A generator and a critic that regresses: one for real, zero for fake."""

    def loss(critic, real, fake, mix):
        del mix
        for_real = jnp.square(critic(real) - 1).mean()
        for_fake = jnp.square(critic(fake)).mean()
        return jnp.square(critic(fake) - 1).mean(), for_real + for_fake

    return adversaries(loss)


def wasserstein_gan() -> Task:
    """A generator and a critic with a penalty of its slope; losses of either sign."""

    def loss(critic, real, fake, mix):
        slope = jax.grad(lambda x: critic(x).sum())(mix * real + (1 - mix) * fake)
        apart = critic(real).mean() - critic(fake).mean()
        return -critic(fake).mean(), jnp.square(slope).sum(-1).mean() - apart

    return adversaries(loss)


def decayed_gan() -> Task:
    """A Wasserstein critic, held by a decay of its outputs in place of its slope."""

    def loss(critic, real, fake, mix):
        del mix
        size = jnp.square(critic(real)).mean() + jnp.square(critic(fake)).mean()
        apart = critic(real).mean() - critic(fake).mean()
        return -critic(fake).mean(), 0.5 * size - apart

    return adversaries(loss)


def mixture_density() -> Task:
    """Five Gaussians for the several y of an x; the loss has either sign."""

    def draw(key, step):
        del step
        keys = jax.random.split(key)
        y = jax.random.uniform(keys[0], (64, 1))
        x = y + 0.3 * jnp.sin(2 * jnp.pi * y)
        return x + 0.02 * jax.random.normal(keys[1], (64, 1)), y

    def loss(outputs, y):
        logits, mean, log_std = jnp.split(outputs, 3, axis=-1)
        z = (y - mean) * jnp.exp(-log_std)
        logs = jax.nn.log_softmax(logits) - log_std - standard_nll(z[..., None])
        return -jax.nn.logsumexp(logs, axis=-1).mean()

    return supervised(
        lambda key: dense_init(key, 1, 32, 32, 15),
        lambda params, x: dense(params, x, jnp.tanh),
        draw,
        loss,
    )


def bayesian_regression() -> Task:
    """A normal posterior of a logistic regression, by four samples of its ELBO."""
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (128, 16)) * jnp.linspace(0.3, 3, 16)
    chance = jax.nn.sigmoid(x @ jax.random.normal(keys[1], (16,)))
    y = 1.0 * jax.random.bernoulli(keys[2], chance)

    def draw(key, step, params, extra):
        del step, params, extra
        return x, y, jax.random.normal(key, (4, 16))

    def loss(params, batch, extra):
        del extra
        x, y, noise = batch
        logits = (params["mean"] + jnp.exp(params["log_std"]) * noise) @ x.T
        nll = (jax.nn.softplus(logits) - y * logits).sum(-1).mean()
        return nll + divergence(params["mean"], params["log_std"])

    def init(key):
        return {"mean": 0.3 * jax.random.normal(key, (16,)), "log_std": jnp.zeros(16)}

    return Task(init, draw, loss)


def gaussian_process() -> Task:
    """Hyperparameters of a kernel, by the marginal likelihood of 32 points."""

    def draw(key, step):
        del step
        keys = jax.random.split(key)
        x = jax.random.uniform(keys[0], (32,), minval=-1)
        return x, jnp.sin(6 * x) + 0.05 * jax.random.normal(keys[1], (32,))

    def covariance(params, x):
        apart = jnp.exp(-params["length"]) * (x[:, None] - x)
        similar = jnp.exp(params["amplitude"] - 0.5 * jnp.square(apart))
        return similar + (jnp.exp(params["noise"]) + 1e-5) * jnp.eye(len(x))

    def loss(matrix, y):
        factor = jnp.linalg.cholesky(matrix.astype(jnp.float32))
        z = jax.scipy.linalg.solve_triangular(factor, y.astype(jnp.float32), lower=True)
        return (standard_nll(z) + jnp.log(jnp.diagonal(factor)).sum()) / len(y)

    def init(key):
        drawn = 0.3 * jax.random.normal(key, (3,))
        return dict(zip(("length", "amplitude", "noise"), drawn, strict=True))

    return supervised(init, covariance, draw, loss)


def distillation() -> Task:
    """A student learns the outputs of a larger, frozen teacher, by their divergence."""

    def loss(params, batch, extra):
        logs = jax.nn.log_softmax(dense(params, batch))
        wanted = jax.nn.log_softmax(dense(extra, batch))
        return (jnp.exp(wanted) * (wanted - logs)).sum(-1).mean()

    return Task(
        init=lambda key: dense_init(key, 196, 32, 10, gain=1.0),
        batch=lambda key, step, params, extra: draw_digits(key)[0],
        loss=loss,
        extra=lambda params: dense_init(jax.random.key(1), 196, 64, 10),
    )
