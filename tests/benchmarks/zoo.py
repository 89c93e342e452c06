"""The zoo: small training runs of many kinds, healthy ones and ones that explode.

`runs_saved.py` and `detection.py` use them. Every task belongs to one part: rules
and responses are tuned on the part "tune" and reported on all. The tasks of "fresh"
were drawn after the limits of detection and the cut had been chosen, those of "unseen"
later still; what recurs (`explosions/recurring.py`) was then chosen on a few of both.
Those of "late" came after that; how a loss that rises slowly is noticed
(`explosions/rising.py`) was chosen on runs of all of these that were not saved. Those
of "newest" came later, and those of "afresh" after them; their recipes were chosen by
runs without protection alone. Then it was chosen on a few of "newest" how dead networks
are noticed, and on one of "afresh" that a share alone skips nothing. Those of "blind"
were drawn last, in the same way, and nothing was chosen on them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax.numpy as jnp
import optax

import optaxclip
from tasks import (
    afresh,
    afresh_models,
    blind,
    blind_models,
    drawn,
    drawn_models,
    drawn_sequences,
    generative,
    networks,
    newest,
    newest_models,
    regimes,
    reinforcement,
    sequences,
    statistical,
    structured,
    unseen,
    unseen_models,
)
from tasks.running import (
    DATA,
    HALF,
    HEALTHY,
    INIT,
    RAMP,
    RATE,
    Run,
    at,
)
from tasks.task import Task


def momentum(rate):
    return optax.sgd(rate, momentum=0.9)


def slow_adam(rate):
    return optax.adam(rate, b1=0.5)


def nesterov(rate):
    return optax.sgd(rate, momentum=0.9, nesterov=True)


def warmed_up(steps: int, optimizer: Callable) -> Callable:
    """With a step size that rises linearly over the first `steps`."""
    return lambda rate: optimizer(
        lambda count: rate * jnp.minimum((count + 1) / steps, 1)
    )


def rising(optimizer: Callable) -> Callable:
    """With a step size that rises linearly all the way."""
    return lambda rate: optimizer(lambda count: rate * (count + 1) / 600)


def cosine(optimizer: Callable) -> Callable:
    """With a warm-up of 50 steps and a cosine to a tenth."""
    return lambda rate: optimizer(
        lambda count: (
            rate
            * jnp.minimum((count + 1) / 50, 1)
            * (0.55 + 0.45 * jnp.cos(math.pi * count / 600))
        )
    )


def restarts(rate):
    """Adam with a linear warm-up, then a cosine that restarts every 150 steps."""

    def schedule(count: Any):
        warm_up = jnp.minimum((count + 1) / 50, 1)
        return rate * warm_up * (0.51 + 0.49 * jnp.cos(math.pi * (count % 150) / 150))

    return optax.adam(schedule)


def decayed(optimizer: Callable) -> Callable:
    """With an L2 penalty of 5e-4."""
    return lambda rate: optax.chain(optax.add_decayed_weights(5e-4), optimizer(rate))


def strong_decay(rate):
    return optax.adamw(rate, weight_decay=1.0)


def schedule_free(rate):
    return optax.contrib.schedule_free_adamw(rate, warmup_steps=50)


def warm_restarts(rate):
    """Momentum; a cosine that restarts every 150 steps, without a warm-up."""
    return momentum(
        lambda count: rate * (0.51 + 0.49 * jnp.cos(math.pi * (count % 150) / 150))
    )


def one_cycle(optimizer: Callable) -> Callable:
    """With a step size that rises for 180 steps, then falls to almost nothing."""
    return lambda rate: optimizer(
        optax.schedules.cosine_onecycle_schedule(600, rate, pct_start=0.3)
    )


def cyclic(optimizer: Callable) -> Callable:
    """With a step size that falls linearly to a tenth in each of ten cycles."""
    return lambda rate: optimizer(lambda count: rate * (1 - 0.9 * (count % 60) / 60))


def heavy(rate):
    """Nesterov's momentum of 0.99."""
    return optax.sgd(rate, momentum=0.99, nesterov=True)


def accumulated(optimizer: Callable) -> Callable:
    """With the mean gradient of each four batches."""
    return lambda rate: optax.MultiSteps(optimizer(rate), 4)


def sharpness_aware(optimizer: Callable) -> Callable:
    """At the worst point nearby, to which each second step goes (SAM)."""

    def make(rate):
        away = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
        sam = optax.contrib.sam(optimizer(rate), away, sync_period=2)

        def update(updates, state, params=None):
            return sam.update(updates, state, params)

        # Its update takes no `value`.
        return optax.GradientTransformation(sam.init, update)

    return make


def clipped(max_norm: float, optimizer: Callable) -> Callable:
    """With a clip of its own before it."""
    return lambda rate: optax.chain(optaxclip.clip_by_norm(max_norm), optimizer(rate))


def step_decay(optimizer: Callable) -> Callable:
    """With a step size that falls to a quarter at steps 300 and 450."""
    return lambda rate: optimizer(
        optax.piecewise_constant_schedule(rate, {300: 1 / 4, 450: 1 / 4})
    )


def inverse_root(optimizer: Callable) -> Callable:
    """With a warm-up of 100 steps, and then one over the root of their number."""
    return lambda rate: optimizer(
        lambda count: rate * jnp.minimum((count + 1) / 100, jnp.sqrt(100 / (count + 1)))
    )


def on_plateau(rate):
    """Adam, slower wherever the mean loss of 20 steps has not fallen for long."""
    return optax.chain(
        optax.adam(rate),
        optax.contrib.reduce_on_plateau(factor=0.5, patience=4, accumulation_size=20),
    )


def noisy(rate):
    """SGD with noise that shrinks."""
    return optax.noisy_sgd(rate, eta=0.01, gamma=0.55, key=0)


adam, adamw, sgd, lion = optax.adam, optax.adamw, optax.sgd, optax.lion
rmsprop, muon = optax.rmsprop, optax.contrib.muon
net, seq, gen, rl = networks, sequences, generative, reinforcement
stat, new, regime = statistical, structured, regimes
last, model = unseen, unseen_models
late, late_model, late_text = drawn, drawn_models, drawn_sequences
newer, newer_model = newest, newest_models
again, again_model = afresh, afresh_models
unknown, unknown_model = blind, blind_models
NAN = math.nan

Rows = dict[str, tuple[Any, ...]]
Part = Literal["tune", "test", "fresh", "unseen", "late", "newest", "afresh", "blind"]
PARTS: tuple[Part, ...] = get_args(Part)
TASKS: dict[str, tuple[str, Callable[[], Task], Rows]] = {}
"""Of each task the part it belongs to, what makes it, and its runs by their names."""


def add(name: str, part: str, make: Callable[[], Task], *rows: tuple) -> None:
    """Adds a task and its runs: name, kind, optimizer, step size, and what else."""
    TASKS[name] = part, make, {f"{name}, {row[0]}": row[1:] for row in rows}


def names() -> list[str]:
    """The names of all runs."""
    return [name for _, _, rows in TASKS.values() for name in rows]


def kind_of(run_name: str) -> str:
    """`HEALTHY`, or why the run explodes."""
    return _task_of(run_name)[2][run_name][0]


def part_of(run_name: str) -> str:
    """The part of `PARTS` to which a run's task belongs."""
    return _task_of(run_name)[0]


@functools.cache
def run_of(run_name: str) -> Run:
    """The run of a name."""
    _, make, rows = _task_of(run_name)
    kind, optimizer, rate, *rest = rows[run_name]
    return Run(kind, make(), optimizer, rate, **dict(*rest))


def _task_of(run_name: str) -> tuple[str, Callable[[], Task], Rows]:
    return next(task for task in TASKS.values() if run_name in task[2])


# What is learned from labels and targets by networks without memory.
add(
    "regression",
    "tune",
    net.regression,
    ("momentum", HEALTHY, momentum, 3e-5),
    ("too large steps", RATE, momentum, 3e-3),
    ("too large steps of Adam", RATE, adam, 100.0),
    ("rising step", RAMP, rising(momentum), 3e-3),
    ("inputs x1000", DATA, momentum, 1e-4, {"corrupt": at(300, factor=1e3)}),
)
add(
    "regression with heavy tails",
    "test",
    lambda: net.regression(degrees=1.5),
    ("Adam", HEALTHY, adam, 0.1),
    ("too large steps", RATE, rmsprop, 30.0),
)
add(
    "regression whose targets change",
    "test",
    lambda: net.regression(change=300),
    ("momentum", HEALTHY, momentum, 3e-5),
    ("Adam", HEALTHY, adam, 0.1),
)
add(
    "shallow classifier",
    "tune",
    net.classifier,
    ("Adam", HEALTHY, adam, 1e-3),
    ("SGD", HEALTHY, sgd, 0.03),
    ("too large steps", RATE, sgd, 10.0),
    ("inputs x1000", DATA, momentum, 0.02, {"corrupt": at(100, 100, factor=1e3)}),
)
add(
    "deep classifier",
    "test",
    lambda: net.classifier(depth=8),
    ("momentum", HEALTHY, momentum, 0.01),
    ("too large steps", RATE, momentum, 0.2),
    ("too large steps of Adam", RATE, adam, 0.2),
    ("rising step", RAMP, rising(momentum), 0.3),
    ("NaN batch", DATA, adam, 1e-3, {"corrupt": at(300, factor=NAN)}),
)
add(
    "classifier whose labels change",
    "tune",
    lambda: net.classifier(change=300),
    ("momentum", HEALTHY, momentum, 0.03),
    ("Adafactor", HEALTHY, optax.adafactor, 0.01),
    ("too large steps", RATE, optax.adafactor, 0.3),
)
add(
    "one digit a step",
    "test",
    lambda: net.classifier(batch_size=1),
    ("SGD", HEALTHY, sgd, 5e-3),
)
add(
    "zero head",
    "tune",
    net.zero_head,
    ("Adam with warm-up 50", HEALTHY, warmed_up(50, adam), 2e-3),
    ("Adam with warm-up 200", HEALTHY, warmed_up(200, adam), 2e-3),
    ("lion", HEALTHY, lion, 1e-3),
    ("too large steps", RATE, lion, 0.1),
)
add(
    "convolutions",
    "tune",
    net.conv_net,
    ("momentum", HEALTHY, momentum, 0.02),
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, momentum, 1.0),
)
add(
    "residual blocks",
    "test",
    net.residual,
    ("momentum", HEALTHY, momentum, 1e-3),
    ("too large steps", RATE, momentum, 0.01),
)
add(
    "ReZero",
    "tune",
    net.rezero,
    ("Adam", HEALTHY, adam, 2e-3),
    ("warm-up", HEALTHY, warmed_up(50, adam), 3e-3),
    ("too large steps", RATE, adam, 0.3),
)
add(
    "LayerScale",
    "test",
    net.layer_scale,
    ("AdamW with warm-up", HEALTHY, warmed_up(50, adamw), 2e-3),
    ("too large steps", RATE, adamw, 0.3),
)
add(
    "zero projections",
    "test",
    net.zero_projections,
    ("Adam", HEALTHY, adam, 2e-3),
    ("nesterov", HEALTHY, nesterov, 0.01),
    ("too large steps", RATE, nesterov, 1.0),
)
add(
    "LoRA",
    "test",
    net.lora,
    ("Adam with warm-up 50", HEALTHY, warmed_up(50, adam), 3e-3),
    ("Adam with warm-up 200", HEALTHY, warmed_up(200, adam), 3e-3),
    ("lion", HEALTHY, lion, 1e-3),
    ("too large steps", RATE, adamw, 0.3),
)
add(
    "ControlNet",
    "tune",
    net.control,
    ("AdamW", HEALTHY, adamw, 1e-3),
    ("warm-up", HEALTHY, warmed_up(100, adam), 3e-3),
    ("too large steps", RATE, adamw, 0.3),
)
add(
    "PINN",
    "test",
    net.poisson,
    ("Adam", HEALTHY, adam, 1e-2),
    ("NaN batch", DATA, adam, 1e-2, {"corrupt": at(300, factor=NAN)}),
    ("too large steps", RATE, sgd, 0.1),
)
add(
    "neural ODE",
    "test",
    net.neural_ode,
    ("Adam", HEALTHY, adam, 1e-2),
    ("too large steps", RATE, adam, 0.3),
)
add(
    "factorization",
    "tune",
    net.factorization,
    ("momentum", HEALTHY, momentum, 0.3),
    ("Adam", HEALTHY, adam, 0.01),
    ("too large steps", RATE, momentum, 30.0),
)
add("skip-gram", "test", net.skip_gram, ("AdaGrad", HEALTHY, optax.adagrad, 0.3))
add(
    "contrastive",
    "tune",
    net.contrastive,
    ("momentum", HEALTHY, momentum, 1e-2),
    ("AdamW", HEALTHY, adamw, 3e-3),
)
add(
    "experts",
    "test",
    net.experts,
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, momentum, 3.0),
)
add(
    "hard experts",
    "tune",
    lambda: net.experts(is_hard=True),
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, adam, 0.3),
)
add(
    "coordinates",
    "test",
    net.coordinates,
    ("Adam", HEALTHY, adam, 1e-3),
    ("too large steps", RATE, momentum, 0.3),
)
add(
    "deep linear",
    "tune",
    net.deep_linear,
    ("SGD", HEALTHY, sgd, 0.1),
    ("too large steps", RATE, sgd, 2.0),
)
add(
    "moving target",
    "tune",
    net.moving_target,
    ("Adam", HEALTHY, adam, 1e-2),
    ("slow Adam", HEALTHY, adam, 1e-3),
)
add(
    "autoencoder",
    "test",
    net.autoencoder,
    ("muon", HEALTHY, muon, 0.02),
    ("too large steps of Adam", RATE, adam, 0.1),
)
add(
    "triplets",
    "tune",
    net.triplets,
    ("NAdam", HEALTHY, optax.nadam, 3e-3),
)
add(
    "growing targets",
    "test",
    net.towers,
    ("Adam", HEALTHY, adam, 1e-2),
    ("too large steps", RATE, adam, 0.3),
)

# Sequences.
add(
    "adding, ReLU",
    "tune",
    lambda: seq.adding("relu"),
    ("Adam", HEALTHY, adam, 1e-3),
    ("inputs x1000", DATA, adam, 1e-3, {"corrupt": at(300, factor=1e3)}),
)
add(
    "adding, LSTM",
    "test",
    lambda: seq.adding("lstm"),
    ("Adam", HEALTHY, adam, 0.02),
    ("too large steps", RATE, momentum, 3.0),
    ("inputs x1000", DATA, momentum, 0.1, {"corrupt": at(100, 100, factor=1e3)}),
)
add(
    "growing sequences",
    "test",
    seq.growing_sequences,
    ("Adam", HEALTHY, adam, 0.01),
)
add(
    "temporal order",
    "tune",
    seq.temporal_order,
    ("momentum", HEALTHY, momentum, 0.01),
    ("too large steps", RATE, momentum, 3.0),
)
add(
    "rows of digits, tanh",
    "tune",
    seq.digit_rows,
    ("RMSProp", HEALTHY, rmsprop, 3e-3),
    ("too large steps", RATE, rmsprop, 0.3),
    ("10 NaN batches", DATA, adam, 3e-3, {"corrupt": at(200, length=10, factor=NAN)}),
)
add(
    "rows of digits, GRU",
    "test",
    lambda: seq.digit_rows("gru"),
    ("AdamW", HEALTHY, adamw, 3e-3),
    ("too large steps", RATE, momentum, 4.0),
    ("rising step", RAMP, rising(momentum), 4.0),
)
add(
    "rows of digits, LSTM",
    "tune",
    lambda: seq.digit_rows("lstm"),
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, adam, 1.0),
    ("NaN every 40 steps", DATA, adam, 0.01, {"corrupt": at(10, 40, factor=NAN)}),
)
add(
    "characters, LSTM",
    "test",
    seq.characters,
    ("RMSProp", HEALTHY, rmsprop, 0.01),
    ("too large steps", RATE, rmsprop, 1.0),
)
add(
    "repeating",
    "tune",
    seq.repeat,
    ("Adam", HEALTHY, adam, 0.01),
    ("too large steps", RATE, adam, 1.0),
)
add(
    "GPT",
    "tune",
    seq.gpt,
    ("AdamW", HEALTHY, adamw, 0.01),
    ("AdamW with warm-up", HEALTHY, cosine(adamw), 0.01),
    ("too large steps", RATE, cosine(adamw), 1.0),
)
add(
    "GPT, tied, zero projections",
    "test",
    lambda: seq.gpt(is_tied=True, zero_out=True),
    ("AdamW", HEALTHY, adamw, 5e-3),
    ("lion", HEALTHY, lion, 1e-3),
    ("too large steps", RATE, lion, 0.1),
)
add(
    "transformer",
    "test",
    seq.fan_in_transformer,
    ("restarts", HEALTHY, restarts, 0.01),
    ("muon", HEALTHY, muon, 0.02),
    ("too large steps", RATE, sgd, 3.0),
)
add(
    "linear attention",
    "tune",
    seq.linear_attention,
    ("Adafactor", HEALTHY, optax.adafactor, 0.03),
)
add("masked text", "test", seq.masked_text, ("AdamW", HEALTHY, cosine(adamw), 0.01))
add(
    "state space",
    "test",
    seq.state_space_text,
    ("AdamW", HEALTHY, adamw, 0.01),
    ("too large steps", RATE, adamw, 1.0),
)

# Generative models.
add(
    "VAE",
    "tune",
    gen.variational_autoencoder,
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, momentum, 0.03),
)
add(
    "annealed VAE",
    "test",
    gen.annealed_autoencoder,
    ("RMSProp", HEALTHY, rmsprop, 3e-3),
    ("too large steps", RATE, rmsprop, 0.1),
)
add("masked digits", "tune", gen.masked_autoencoder, ("AdamW", HEALTHY, adamw, 3e-3))
add(
    "diffusion",
    "test",
    gen.diffusion,
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, sgd, 1.0),
)
add(
    "flow matching",
    "tune",
    gen.flow_matching,
    ("momentum", HEALTHY, momentum, 0.03),
    ("too large steps", RATE, lion, 0.1),
)
add("score matching", "test", gen.score_matching, ("Adam", HEALTHY, adam, 3e-3))
add(
    "RealNVP",
    "test",
    gen.real_nvp,
    ("Adam", HEALTHY, adam, 5e-3),
    ("too large steps", RATE, adam, 0.1),
)
add(
    "flow in one dimension",
    "tune",
    gen.flow_1d,
    ("Adam", HEALTHY, adam, 1e-2),
    ("too large steps", RATE, adam, 10.0),
)
add("GAN", "tune", gen.gan, ("Adam", HEALTHY, slow_adam, 1e-2))
add("least-squares GAN", "test", gen.least_squares_gan, ("Adam", HEALTHY, adam, 2e-3))
add(
    "Wasserstein GAN",
    "test",
    gen.wasserstein_gan,
    ("RMSProp", HEALTHY, rmsprop, 2e-3),
)
add("decayed GAN", "tune", gen.decayed_gan, ("RMSProp", HEALTHY, rmsprop, 5e-3))
add(
    "mixture density",
    "tune",
    gen.mixture_density,
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, adam, 1.0),
)
add(
    "Bayesian regression",
    "test",
    gen.bayesian_regression,
    ("SGD", HEALTHY, sgd, 3e-3),
    ("too large steps", RATE, sgd, 1.0),
)
add("Gaussian process", "tune", gen.gaussian_process, ("Adam", HEALTHY, adam, 0.03))
add("distillation", "test", gen.distillation, ("muon", HEALTHY, muon, 1e-2))

# Reinforcement learning.
add(
    "REINFORCE",
    "tune",
    rl.reinforce,
    ("Adam", HEALTHY, adam, 1e-2),
    ("SGD", HEALTHY, sgd, 0.1),
)
add(
    "A2C",
    "test",
    rl.a2c,
    ("RMSProp", HEALTHY, rmsprop, 1e-2),
    ("SGD", HEALTHY, sgd, 0.1),
    ("too large steps", RATE, rmsprop, 1.0),
)
add(
    "PPO",
    "test",
    rl.ppo,
    ("Adam after a clip", HEALTHY, clipped(0.5, adam), 1e-2),
    ("SGD", HEALTHY, sgd, 0.1),
)
add(
    "PPO of old episodes",
    "tune",
    rl.ppo_of_old_episodes,
    ("AdamW", HEALTHY, adamw, 1e-2),
    ("momentum", HEALTHY, momentum, 1e-2),
)
add(
    "TD(0)",
    "tune",
    rl.td0,
    ("Adam", HEALTHY, adam, 0.01),
    ("SGD", HEALTHY, sgd, 0.01),
    ("too large steps", RATE, sgd, 0.3),
)
add(
    "TD(0) far ahead",
    "test",
    rl.td0_far_ahead,
    ("Adam", HEALTHY, adam, 0.01),
    ("momentum", HEALTHY, momentum, 1e-3),
    ("too large steps", RATE, momentum, 0.1),
)
add(
    "TD(0), target network",
    "tune",
    rl.td0_target_network,
    ("SGD", HEALTHY, sgd, 0.01),
    ("lion", HEALTHY, lion, 1e-3),
    ("too large steps", RATE, sgd, 1.0),
)
add(
    "DQN",
    "test",
    rl.dqn,
    ("Adam", HEALTHY, adam, 1e-2),
    ("momentum", HEALTHY, momentum, 1e-2),
    ("too large steps", RATE, momentum, 10.0),
)
add(
    "SARSA",
    "test",
    rl.sarsa,
    ("SGD", HEALTHY, sgd, 0.01),
    ("too large steps", RATE, sgd, 1.0),
)
add(
    "actor and critic",
    "tune",
    rl.actor_and_critic,
    ("Adam", HEALTHY, adam, 5e-3),
    ("SGD", HEALTHY, sgd, 5e-3),
    ("too large steps", RATE, sgd, 0.1),
)
add(
    "imitation",
    "tune",
    rl.imitation,
    ("RMSProp", HEALTHY, rmsprop, 3e-3),
    ("SGD", HEALTHY, sgd, 0.03),
)
add(
    "world model",
    "test",
    rl.world_model,
    ("momentum", HEALTHY, momentum, 0.03),
    ("too large steps", RATE, momentum, 1.0),
)
add("bandit", "test", rl.bandit, ("AdamW", HEALTHY, adamw, 0.01))
add(
    "GRPO",
    "tune",
    rl.grpo,
    ("AdamW", HEALTHY, adamw, 5e-3),
    ("lion", HEALTHY, lion, 3e-3),
)
add("preferences", "test", rl.preferences, ("Adam", HEALTHY, adam, 0.01))
add(
    "random directions",
    "tune",
    rl.random_directions,
    ("SGD", HEALTHY, sgd, 3e-3),
    ("too large steps", RATE, momentum, 0.01),
)

# Low precision.
HALF16 = {"dtype": jnp.float16}
add(
    "classifier in float16",
    "tune",
    lambda: net.classifier(depth=4),
    (
        "dynamic loss scale",
        HEALTHY,
        adam,
        2e-3,
        HALF16 | {"loss_scale": 2.0**18, "is_dynamic": True},
    ),
    ("too large loss scale", HALF, momentum, 0.01, HALF16 | {"loss_scale": 2.0**15.5}),
)
add(
    "LSTM in float16",
    "test",
    lambda: seq.digit_rows("lstm"),
    (
        "dynamic loss scale",
        HEALTHY,
        adam,
        3e-3,
        HALF16 | {"loss_scale": 2.0**19, "is_dynamic": True},
    ),
    ("too large loss scale", HALF, adam, 0.01, HALF16 | {"loss_scale": 2.0**15.5}),
)
add(
    "GPT in bfloat16",
    "test",
    seq.gpt,
    ("AdamW", HEALTHY, cosine(adamw), 3e-3, {"dtype": jnp.bfloat16}),
)

# Fresh: statistics.
add(
    "counts",
    "fresh",
    stat.counts,
    ("Adam", HEALTHY, adam, 3e-3),
    ("SGD", HEALTHY, sgd, 1e-3),
    ("too large steps", RATE, sgd, 0.3),
)
add(
    "quantiles",
    "fresh",
    stat.quantiles,
    ("RMSProp", HEALTHY, rmsprop, 3e-3),
    ("momentum", HEALTHY, momentum, 0.03),
    ("too large steps", RATE, momentum, 50.0),
)
add(
    "ranking",
    "fresh",
    stat.ranking,
    ("Adam", HEALTHY, adam, 1e-2),
    ("too large steps", RATE, sgd, 60.0),
)
add(
    "rare positives",
    "fresh",
    stat.rare_positives,
    ("momentum", HEALTHY, momentum, 0.01),
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, momentum, 3.0),
)
add(
    "focal loss",
    "fresh",
    lambda: stat.rare_positives(weight=5.0, focus=2.0),
    ("AdamW", HEALTHY, adamw, 3e-3),
)
add(
    "survival",
    "fresh",
    stat.survival,
    ("nesterov", HEALTHY, nesterov, 0.01),
    ("inputs x1000", DATA, momentum, 0.01, {"corrupt": at(100, 100, factor=1e3)}),
)
add(
    "recommender",
    "fresh",
    stat.recommender,
    ("AdaGrad", HEALTHY, optax.adagrad, 1.0),
    ("SGD", HEALTHY, sgd, 10.0),
)
add(
    "transport",
    "fresh",
    stat.transport,
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, adam, 1.0),
)
add(
    "alignment",
    "fresh",
    stat.alignment,
    ("Adam", HEALTHY, adam, 1e-2),
    ("too large steps", RATE, momentum, 1.0),
)
add(
    "schools",
    "fresh",
    stat.schools,
    ("Adam", HEALTHY, adam, 0.03),
    ("SGD", HEALTHY, sgd, 3e-3),
    ("too large steps", RATE, sgd, 0.3),
)
add(
    "filtering",
    "fresh",
    stat.filtering,
    ("Adam", HEALTHY, adam, 0.03),
    ("SGD", HEALTHY, sgd, 0.03),
    ("too large steps", RATE, sgd, 3.0),
)

# Fresh: unusual networks and losses.
add(
    "batch norm",
    "fresh",
    new.batch_norm,
    ("momentum, L2 and cosine", HEALTHY, decayed(cosine(momentum)), 0.05),
    ("warm restarts", HEALTHY, warm_restarts, 0.05),
    ("too large steps", RATE, adam, 1.0),
)
add(
    "triangles",
    "fresh",
    new.triangles,
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, momentum, 0.01),
)
add(
    "vector quantization",
    "fresh",
    new.vector_quantization,
    ("Adam", HEALTHY, adam, 2e-3),
    ("too large steps", RATE, momentum, 10.0),
)
add(
    "bootstrap",
    "fresh",
    new.bootstrap,
    ("momentum", HEALTHY, momentum, 0.05),
)
add(
    "adaptation",
    "fresh",
    new.adaptation,
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, adam, 1.0),
)
add(
    "energy model",
    "fresh",
    new.energy_model,
    ("Adam", HEALTHY, adam, 1e-3),
    ("too large steps", RATE, sgd, 0.3),
)
add(
    "scores",
    "fresh",
    new.scores,
    ("Adam with warm-up", HEALTHY, warmed_up(50, adam), 3e-3),
    ("too large steps", RATE, momentum, 0.01),
)
add(
    "equilibrium",
    "fresh",
    new.equilibrium,
    ("schedule-free", HEALTHY, schedule_free, 3e-3),
    ("too large steps", RATE, momentum, 1.0),
)
add(
    "spikes",
    "fresh",
    new.spiking,
    ("AdaMax", HEALTHY, optax.adamax, 5e-3),
    ("too large steps", RATE, adam, 3.0),
)
add(
    "rays",
    "fresh",
    new.radiance,
    ("Adam", HEALTHY, adam, 5e-3),
    ("too large steps", RATE, adam, 0.3),
)
add(
    "swing-up",
    "fresh",
    new.swing_up,
    ("Adam", HEALTHY, adam, 3e-3),
    ("momentum after a clip", HEALTHY, clipped(1.0, momentum), 0.01),
)
add(
    "soft actor and critic",
    "fresh",
    new.soft_actor_critic,
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, sgd, 0.1),
)
add("rare rewards", "fresh", new.rare_rewards, ("Adam", HEALTHY, adam, 0.03))
add(
    "stochastic depth",
    "fresh",
    new.stochastic_depth,
    ("muon", HEALTHY, muon, 0.01),
    ("momentum", HEALTHY, momentum, 0.01),
    ("too large steps", RATE, momentum, 0.03),
)

# Fresh: changes while a run goes on.
add(
    "alternating",
    "fresh",
    regime.alternating,
    ("momentum", HEALTHY, momentum, 0.02),
    ("Adam", HEALTHY, adam, 2e-3),
    ("rising step", RAMP, rising(momentum), 1.0),
)
add(
    "shards",
    "fresh",
    regime.shards,
    ("momentum", HEALTHY, momentum, 0.01),
    ("AdamW", HEALTHY, adamw, 1e-3),
)
add("pruning", "fresh", regime.pruning, ("Adam", HEALTHY, adam, 3e-3))
add("smoothing", "fresh", regime.smoothing, ("AdamW", HEALTHY, cosine(adamw), 3e-3))
add("late dropout", "fresh", regime.late_dropout, ("lion", HEALTHY, lion, 3e-4))
add("shrinking batches", "fresh", regime.shrinking_batches, ("SGD", HEALTHY, sgd, 0.03))
add(
    "hard examples",
    "fresh",
    regime.hard_examples,
    ("momentum", HEALTHY, momentum, 3e-3),
    ("too large steps", RATE, momentum, 1.0),
)
add(
    "adversarial",
    "fresh",
    regime.adversarial,
    ("SGD", HEALTHY, sgd, 0.03),
    ("20 NaN batches", DATA, adam, 1e-3, {"corrupt": at(200, length=20, factor=NAN)}),
)
add(
    "modular addition",
    "fresh",
    regime.modular_addition,
    ("AdamW, strong decay", HEALTHY, strong_decay, 1e-2),
    ("too large steps", RATE, adamw, 1.0),
)
add(
    "penalty",
    "fresh",
    regime.penalty,
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, momentum, 3e-3),
)

# Unseen: labels and targets.
add(
    "one rare digit",
    "unseen",
    last.rare_digit,
    ("NAdamW", HEALTHY, optax.nadamw, 3e-3),
    ("heavy momentum", HEALTHY, heavy, 1e-3),
    ("too large steps", RATE, heavy, 1.0),
)
add(
    "insurance claims",
    "unseen",
    last.claims,
    ("Yogi", HEALTHY, optax.yogi, 3e-3),
    ("SGD", HEALTHY, sgd, 3e-3),
    ("too large steps", RATE, sgd, 0.3),
)
add(
    "three scales",
    "unseen",
    last.three_scales,
    ("AdaBelief", HEALTHY, optax.adabelief, 3e-3),
    ("too large steps", RATE, momentum, 0.1),
)
add(
    "hard negatives",
    "unseen",
    last.hard_negatives,
    ("RAdam", HEALTHY, optax.radam, 3e-3),
    ("momentum", HEALTHY, momentum, 0.01),
)
add(
    "more classes",
    "unseen",
    last.more_classes,
    ("momentum", HEALTHY, momentum, 0.02),
    ("LAMB", HEALTHY, optax.lamb, 0.01),
)
add(
    "late label noise",
    "unseen",
    last.late_noise,
    ("sign of the gradient", HEALTHY, optax.sign_sgd, 3e-4),
    ("AdamW, strong decay", HEALTHY, strong_decay, 2e-3),
)
add(
    "unfreezing",
    "unseen",
    last.unfreezing,
    ("momentum", HEALTHY, momentum, 0.02),
    ("AdamW, one cycle", HEALTHY, one_cycle(adamw), 5e-3),
    ("too large steps", RATE, momentum, 0.5),
)
add(
    "quantized weights",
    "unseen",
    last.quantized,
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, momentum, 1.0),
)
add(
    "averaged weights",
    "unseen",
    last.averaged_weights,
    ("cyclic SGD", HEALTHY, cyclic(sgd), 3e-3),
    ("too large steps", RATE, cyclic(momentum), 0.1),
)
add(
    "other domain",
    "unseen",
    last.other_domain,
    ("momentum", HEALTHY, momentum, 0.01),
    ("too large steps", RATE, momentum, 3.0),
)

# Unseen: graphs, sets, sequences, physics, and actions.
add(
    "knowledge graph",
    "unseen",
    model.knowledge_graph,
    ("AdaGrad", HEALTHY, optax.adagrad, 0.3),
    ("Adam", HEALTHY, adam, 0.03),
    ("too large steps", RATE, adam, 3.0),
)
add(
    "hyperbolic tree",
    "unseen",
    model.tree,
    ("RAdam", HEALTHY, optax.radam, 0.03),
)
add(
    "masked pixels",
    "unseen",
    model.pixels,
    ("AdamW, one cycle", HEALTHY, one_cycle(adamw), 0.01),
    ("rising step", RAMP, rising(momentum), 0.3),
)
add(
    "neural process",
    "unseen",
    model.neural_process,
    ("Adam", HEALTHY, adam, 0.01),
    ("SAM", HEALTHY, sharpness_aware(adam), 0.01),
    ("too large steps", RATE, adam, 1.0),
)
add(
    "point cloud",
    "unseen",
    model.point_cloud,
    ("SAM", HEALTHY, sharpness_aware(adam), 5e-3),
    ("NaN batch", DATA, momentum, 0.01, {"corrupt": at(150, factor=NAN)}),
)
add(
    "three bodies",
    "unseen",
    model.three_bodies,
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, momentum, 0.3),
)
add(
    "learned solver",
    "unseen",
    model.learned_solver,
    ("Adam", HEALTHY, adam, 3e-3),
    ("AdaMax", HEALTHY, optax.adamax, 5e-3),
    ("rising step", RAMP, rising(momentum), 0.3),
)
add(
    "maze",
    "unseen",
    model.maze,
    ("Adam", HEALTHY, adam, 3e-3),
    ("SGD", HEALTHY, sgd, 0.03),
    ("rewards x1000", DATA, sgd, 0.03, {"corrupt": at(300, 100, factor=1e3)}),
)
add(
    "reaching",
    "unseen",
    model.reaching,
    ("Adam", HEALTHY, adam, 0.01),
    ("momentum", HEALTHY, momentum, 3e-3),
)
add(
    "outlier actions",
    "unseen",
    model.outlier_actions,
    ("Adam, four batches a step", HEALTHY, accumulated(adam), 0.01),
    ("SGD", HEALTHY, sgd, 0.03),
    ("too large steps", RATE, sgd, 3.0),
)
add(
    "learned step sizes",
    "unseen",
    model.learned_steps,
    ("Adam", HEALTHY, adam, 0.03),
    ("too large steps", RATE, adam, 1.0),
)
add(
    "two alphabets",
    "unseen",
    model.two_alphabets,
    ("AdamW with warm-up", HEALTHY, cosine(adamw), 0.01),
    ("AdaGrad", HEALTHY, optax.adagrad, 0.1),
    ("too large steps", RATE, rmsprop, 1.0),
)

# Late: likelihoods, streams, sequences, and mixtures.
add(
    "volatility",
    "late",
    late.volatility,
    ("Adam", HEALTHY, adam, 3e-3),
    ("SGD", HEALTHY, sgd, 0.03),
    ("returns x1000", DATA, sgd, 0.03, {"corrupt": at(300, factor=1e3)}),
    ("too large steps", RATE, sgd, 3.0),
)
add(
    "aftershocks",
    "late",
    late.aftershocks,
    ("Adam on plateau", HEALTHY, on_plateau, 0.02),
    ("SGD", HEALTHY, sgd, 1e-3),
    ("counts x1000", DATA, sgd, 3e-3, {"corrupt": at(100, 100, factor=1e3)}),
    ("too large steps", RATE, sgd, 0.3),
)
add(
    "topics",
    "late",
    late.topics,
    ("AMSGrad", HEALTHY, optax.amsgrad, 0.01),
    ("AdEMAMix", HEALTHY, optax.contrib.ademamix, 0.01),
    ("too large loss scale", HALF, adam, 0.01, HALF16 | {"loss_scale": 2.0**11.5}),
    ("too large steps", RATE, momentum, 0.1),
)
add(
    "advertisements",
    "late",
    late.advertisements,
    ("AdaGrad", HEALTHY, optax.adagrad, 0.1),
    ("SM3", HEALTHY, optax.sm3, 0.1),
    ("too large steps", RATE, sgd, 300.0),
)
add(
    "logged choices",
    "late",
    late.logged_choices,
    ("Adam", HEALTHY, adam, 3e-3),
    ("momentum", HEALTHY, momentum, 0.01),
)
add(
    "worst group",
    "late",
    late.worst_group,
    ("AdamW, decay", HEALTHY, strong_decay, 1e-3),
    ("momentum with steps", HEALTHY, step_decay(momentum), 0.02),
    ("too large steps", RATE, momentum, 3.0),
)
add(
    "translation",
    "late",
    late_text.translation,
    ("Adam, inverse root", HEALTHY, inverse_root(adam), 0.02),
)
add(
    "corpora",
    "late",
    late_text.corpora,
    ("AdamW", HEALTHY, cosine(adamw), 0.01),
    ("lion", HEALTHY, warmed_up(50, lion), 1e-3),
)
add(
    "carried state",
    "late",
    late_text.carried_state,
    ("RMSProp", HEALTHY, rmsprop, 3e-3),
    ("Adan", HEALTHY, optax.adan, 0.01),
    ("too large steps", RATE, rmsprop, 1.0),
)

# Late: sounds, physics, densities, games, and policies.
add(
    "separation",
    "late",
    late_text.separation,
    ("Adam", HEALTHY, adam, 2e-3),
    ("NovoGrad", HEALTHY, optax.novograd, 0.01),
)
add(
    "waves on a string",
    "late",
    late_text.waves,
    ("Adam", HEALTHY, adam, 0.01),
    ("nesterov", HEALTHY, nesterov, 1.0),
    ("rising step", RAMP, rising(adam), 1.0),
)
add(
    "predators",
    "late",
    late_model.predators,
    ("Adam", HEALTHY, adam, 3e-3),
    ("ADOPT", HEALTHY, optax.contrib.adopt, 3e-3),
    ("too large steps", RATE, adam, 0.3),
)
add(
    "two wells",
    "late",
    late_model.two_wells,
    ("Adam", HEALTHY, adam, 5e-3),
    ("too large steps", RATE, sgd, 0.1),
)
add(
    "ground state",
    "late",
    late_model.ground_state,
    ("Adam", HEALTHY, adam, 3e-3),
    ("SGD", HEALTHY, sgd, 0.03),
    ("too large steps", RATE, sgd, 3.0),
)
add(
    "mutual information",
    "late",
    late_model.mutual_information,
    ("Adam", HEALTHY, adam, 1e-3),
    ("RMSProp", HEALTHY, rmsprop, 1e-3),
    ("too large steps", RATE, momentum, 0.3),
)
add(
    "signed distances",
    "late",
    late_model.signed_distances,
    ("Adam", HEALTHY, step_decay(adam), 3e-3),
    ("too large steps", RATE, momentum, 0.1),
)
add(
    "stones",
    "late",
    late_model.nim,
    ("Adam", HEALTHY, adam, 0.01),
    ("noisy SGD", HEALTHY, noisy, 0.1),
)
add(
    "offline records",
    "late",
    late_model.offline,
    ("Adam", HEALTHY, adam, 3e-3, {"steps": 1200}),
    ("RMSProp", HEALTHY, rmsprop, 3e-3, {"steps": 1200}),
    ("too large steps", RATE, momentum, 0.1),
)
add(
    "missed and false",
    "late",
    late.missed_and_false,
    ("optimistic", HEALTHY, optax.optimistic_adam_v2, 3e-3),
    ("too large steps", RATE, sgd, 10.0),
)

# Newest: likelihoods, labels, sequences, and pictures.
add(
    "wind",
    "newest",
    newer.wind,
    ("Adam", HEALTHY, adam, 3e-3),
    ("SGD", HEALTHY, sgd, 0.03),
    ("too large steps", RATE, sgd, 9.0),
)
add(
    "shares",
    "newest",
    newer.shares,
    ("AdamW with warm-up", HEALTHY, cosine(adamw), 5e-3),
    ("momentum", HEALTHY, momentum, 3e-3),
    ("too large steps", RATE, momentum, 0.3),
)
add(
    "faint signal",
    "newest",
    newer.faint_signal,
    ("AdamW", HEALTHY, adamw, 1e-3),
    ("SGD", HEALTHY, sgd, 3e-3),
    ("records x1000", DATA, sgd, 3e-3, {"corrupt": at(300, 100, factor=1e3)}),
    ("too large steps", RATE, sgd, 0.3),
)
add(
    "pseudo-labels",
    "newest",
    newer.pseudo_labels,
    ("nesterov", HEALTHY, nesterov, 0.01),
    ("Adafactor", HEALTHY, optax.adafactor, 0.01),
    ("too large steps", RATE, nesterov, 0.3),
)
add(
    "sparse gates",
    "newest",
    newer.sparse_gates,
    ("momentum with warm-up", HEALTHY, cosine(momentum), 0.02),
    ("Adam", HEALTHY, adam, 3e-3),
)
add(
    "brackets",
    "newest",
    newer.brackets,
    ("RMSProp", HEALTHY, rmsprop, 3e-3),
    ("schedule-free", HEALTHY, schedule_free, 0.01),
    ("too large steps", RATE, rmsprop, 0.3),
)
add(
    "fast weights",
    "newest",
    newer.fast_weights,
    ("Adam with warm-up", HEALTHY, warmed_up(50, adam), 5e-3),
    ("momentum", HEALTHY, momentum, 0.01),
    ("rising step", RAMP, rising(momentum), 0.9),
)
add(
    "growing pattern",
    "newest",
    newer.growing_pattern,
    ("Adam", HEALTHY, adam, 2e-3),
    ("lion with warm-up", HEALTHY, warmed_up(50, lion), 5e-4),
    ("too large steps", RATE, adam, 0.2),
)

# Newest: values, games, samples, and functions.
add(
    "quantile values",
    "newest",
    newer_model.quantile_values,
    ("SGD", HEALTHY, sgd, 0.1),
    ("Adam", HEALTHY, adam, 3e-3),
    ("too large steps", RATE, adam, 0.9),
)
add(
    "stock",
    "newest",
    newer_model.stock,
    ("SGD", HEALTHY, sgd, 3e-3),
    ("momentum", HEALTHY, momentum, 1e-3),
    ("too large steps", RATE, momentum, 0.1),
)
add(
    "instruments",
    "newest",
    newer_model.instruments,
    ("Adam", HEALTHY, adam, 1e-3),
    ("SGD", HEALTHY, sgd, 0.03),
    ("too large steps", RATE, sgd, 0.3),
)
add(
    "pursuit",
    "newest",
    newer_model.pursuit,
    ("RMSProp", HEALTHY, rmsprop, 1e-3),
    ("momentum", HEALTHY, momentum, 3e-3),
)
add(
    "Boltzmann machine",
    "newest",
    newer_model.boltzmann,
    ("SGD", HEALTHY, sgd, 0.1),
    ("momentum", HEALTHY, momentum, 0.03),
    ("pictures x1000", DATA, momentum, 0.03, {"corrupt": at(300, factor=1e3)}),
)
add(
    "hypernetwork",
    "newest",
    newer_model.hypernetwork,
    ("muon", HEALTHY, muon, 0.01),
    ("momentum", HEALTHY, momentum, 0.01),
    ("rising step", RAMP, rising(momentum), 1.0),
    ("too large loss scale", HALF, momentum, 0.01, HALF16 | {"loss_scale": 2.0**13.5}),
)
add(
    "small fields",
    "newest",
    newer_model.small_fields,
    ("Adam", HEALTHY, adam, 3e-3),
    ("lion", HEALTHY, lion, 5e-4),
    ("too large steps", RATE, lion, 0.05),
)

# Afresh: pictures, graphs, tags, and counts.
add(
    "denoiser",
    "afresh",
    again.denoiser,
    ("Adam", HEALTHY, adam, 3e-3),
    ("momentum, one cycle", HEALTHY, one_cycle(momentum), 0.03),
    ("rising step", RAMP, rising(momentum), 3.0),
)
add(
    "boxes",
    "afresh",
    again.boxes,
    ("nesterov, L2 and cosine", HEALTHY, decayed(cosine(nesterov)), 0.01),
    ("AdamW", HEALTHY, adamw, 3e-3),
    ("too large steps", RATE, nesterov, 3.0),
)
add(
    "communities",
    "afresh",
    again.communities,
    ("Adam with L2", HEALTHY, decayed(adam), 5e-3),
    ("momentum", HEALTHY, momentum, 0.03),
    ("too large steps", RATE, momentum, 3.0),
)
add(
    "tagger",
    "afresh",
    again.tagger,
    ("Adam after a clip", HEALTHY, clipped(5.0, adam), 5e-3),
    ("SGD", HEALTHY, sgd, 0.03),
    ("too large steps", RATE, sgd, 3.0),
)
add(
    "sales",
    "afresh",
    again.sales,
    ("RMSProp", HEALTHY, rmsprop, 3e-3),
    ("SGD", HEALTHY, sgd, 0.03),
    ("counts x1000", DATA, momentum, 0.03, {"corrupt": at(200, 100, factor=1e3)}),
)

# Afresh: patches, scans, splines, trees, and codes.
add(
    "patches",
    "afresh",
    again_model.patches,
    ("AdamW with warm-up", HEALTHY, cosine(adamw), 5e-3),
    ("muon", HEALTHY, muon, 0.01),
    ("too large loss scale", HALF, adamw, 3e-3, HALF16 | {"loss_scale": 2.0**15}),
)
add(
    "selective copying",
    "afresh",
    again_model.selective_copying,
    ("AdamW with warm-up", HEALTHY, cosine(adamw), 0.01),
    ("RMSProp", HEALTHY, rmsprop, 3e-3),
    ("too large steps", RATE, adamw, 1.0),
)
add(
    "splines",
    "afresh",
    again_model.splines,
    ("Adam, one cycle", HEALTHY, one_cycle(adam), 0.03),
    ("momentum", HEALTHY, momentum, 3e-3),
    ("too large coefficients", INIT, momentum, 3e-3, {"gain": 30.0}),
)
add(
    "soft trees",
    "afresh",
    again_model.soft_trees,
    ("NAdam", HEALTHY, optax.nadam, 0.02),
    ("momentum", HEALTHY, momentum, 3e-3),
    ("too large steps", RATE, momentum, 1.0),
)
add(
    "discrete codes",
    "afresh",
    again_model.discrete_codes,
    ("Adam", HEALTHY, adam, 3e-3),
    ("nesterov with warm-up", HEALTHY, warmed_up(50, nesterov), 3e-3),
    ("too large steps", RATE, adam, 1.0),
)

# Blind: grades, views, memories, and pictures.
add(
    "ratings",
    "blind",
    unknown.ratings,
    ("RMSProp", HEALTHY, rmsprop, 3e-3),
    ("momentum with warm-up", HEALTHY, warmed_up(50, momentum), 0.01),
    ("too large steps", RATE, momentum, 2.0),
)
add(
    "two views",
    "blind",
    unknown.two_views,
    ("AdamW, one cycle", HEALTHY, one_cycle(adamw), 5e-3),
    ("LAMB", HEALTHY, optax.lamb, 0.01),
)
add(
    "recall",
    "blind",
    unknown.recall,
    ("Adafactor", HEALTHY, optax.adafactor, 0.03),
    ("nesterov", HEALTHY, nesterov, 1.0),
    ("too large steps", RATE, lion, 0.5),
)
add(
    "uncertain tasks",
    "blind",
    unknown.uncertain_tasks,
    ("NAdam", HEALTHY, optax.nadam, 3e-3),
    ("SGD", HEALTHY, sgd, 0.01),
    ("too large steps", RATE, sgd, 1.0),
)
add(
    "few shots",
    "blind",
    unknown.few_shots,
    ("momentum with warm-up", HEALTHY, cosine(momentum), 3e-3),
    ("muon", HEALTHY, muon, 0.01),
    ("too large steps", RATE, momentum, 0.1),
    ("too large loss scale", HALF, muon, 0.01, HALF16 | {"loss_scale": 2.0**15.9}),
)
add(
    "registration",
    "blind",
    unknown.registration,
    ("Adam with warm-up", HEALTHY, warmed_up(50, adam), 2e-3),
    ("momentum", HEALTHY, momentum, 0.01),
    ("NaN batch", DATA, adam, 2e-3, {"corrupt": at(250, factor=NAN)}),
)
add(
    "lesions",
    "blind",
    unknown.lesions,
    ("AdamW with warm-up", HEALTHY, cosine(adamw), 5e-3),
    ("nesterov with L2", HEALTHY, decayed(nesterov), 0.02),
    ("pictures x1000", DATA, nesterov, 0.02, {"corrupt": at(300, 100, factor=1e3)}),
)

# Blind: tones, orders, atoms, physics, and rewards.
add(
    "tones",
    "blind",
    unknown_model.tones,
    ("lion with warm-up", HEALTHY, warmed_up(50, lion), 1e-3),
    ("Adam, inverse root", HEALTHY, inverse_root(adam), 0.01),
    ("too large steps", RATE, rmsprop, 0.5),
)
add(
    "pointers",
    "blind",
    unknown_model.pointers,
    ("AdamW with warm-up", HEALTHY, cosine(adamw), 0.01),
    ("RMSProp", HEALTHY, rmsprop, 2e-3),
    ("too large steps", RATE, rmsprop, 1.0),
)
add(
    "molecules",
    "blind",
    unknown_model.molecules,
    ("Adam, one cycle", HEALTHY, one_cycle(adam), 0.01),
    ("momentum", HEALTHY, momentum, 3e-4),
    ("rising step", RAMP, rising(momentum), 0.3),
)
add(
    "linear latents",
    "blind",
    unknown_model.linear_latents,
    ("Adam", HEALTHY, step_decay(adam), 3e-3),
    ("SGD", HEALTHY, sgd, 3e-3),
    ("too large steps", RATE, sgd, 0.1),
)
add(
    "operator",
    "blind",
    unknown_model.operator,
    ("AdamW with warm-up", HEALTHY, cosine(adamw), 5e-3),
    ("momentum", HEALTHY, momentum, 3e-3),
    ("too large weights", INIT, momentum, 3e-3, {"gain": 2.5}),
)
add(
    "inverse rewards",
    "blind",
    unknown_model.inverse_rewards,
    ("Adam with L2", HEALTHY, decayed(adam), 5e-3),
    ("SGD", HEALTHY, sgd, 0.03),
    ("too large steps", RATE, sgd, 10.0),
)
add(
    "inducing points",
    "blind",
    unknown_model.inducing_points,
    ("RAdam", HEALTHY, optax.radam, 0.01),
    ("nesterov", HEALTHY, nesterov, 0.01),
    ("too large steps", RATE, adam, 10.0),
)
