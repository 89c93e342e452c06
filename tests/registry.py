"""Every public transformation and limit, a row or more each: what the laws run over."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optaxclip
from optaxclip import limits
from optaxclip.numerics import is_gradient


class SecondMoment(NamedTuple):
    count: Any  # hides the method of tuples, as in Optax
    nu: Any


def scale_by_second_moment() -> Any:
    """An Adam without a first moment, which Optax's is not under strict promotion."""

    def init(params):
        def zeros(x):
            return jnp.zeros(jnp.shape(x) if is_gradient(x) else [], jnp.float32)

        return SecondMoment(jnp.zeros([], jnp.int32), jax.tree.map(zeros, params))

    def update(updates, state, params=None):
        count = state.count + 1
        weight = 1 - 0.999 ** count.astype(jnp.float32)

        def learn(g, v):
            if not is_gradient(g):
                return v
            return 0.999 * v + 0.001 * jnp.square(jnp.asarray(g, jnp.float32))

        def scale(g, v):
            if not is_gradient(g):
                return g
            root = jnp.sqrt(v / weight) + 1e-8
            g = jnp.asarray(g)
            return (g.astype(jnp.float32) / root).astype(g.dtype)

        nu = jax.tree.map(learn, updates, state.nu)
        return jax.tree.map(scale, updates, nu), SecondMoment(count, nu)

    return optax.GradientTransformation(init, update)


REGISTRY: dict[str, Any] = {
    "clip_by_norm": lambda: optaxclip.clip_by_norm(1.0),
    "clip_by_norm per leaf": lambda: optaxclip.clip_by_norm(1.0, per="leaf"),
    "clip_by_norm per unit": lambda: optaxclip.clip_by_norm(1.0, per="unit"),
    "clip_by_norm per group": lambda: optaxclip.clip_by_norm(1.0, per=lambda n: n[:1]),
    "clip_by_norm stacked": lambda: optaxclip.clip_by_norm(
        1.0, per="leaf", stacked=lambda name: name == "w"
    ),
    "clip_by_norm ord=1": lambda: optaxclip.clip_by_norm(1.0, ord=1),
    "clip_by_norm ord=3": lambda: optaxclip.clip_by_norm(1.0, ord=3),
    "clip_by_norm schedule": lambda: optaxclip.clip_by_norm(
        optax.linear_schedule(2.0, 1.0, 10)
    ),
    "clip_by_norm soft": lambda: optaxclip.clip_by_norm(
        1.0, respond="soft", per="leaf", where=lambda name: name != "b"
    ),
    "clip_by_norm set": lambda: optaxclip.clip_by_norm(
        1.0, respond="set", per="unit", unit_axis=0
    ),
    "clip_by_norm band": lambda: optaxclip.clip_by_norm(
        limits.zscore(warmup=2), min_norm=0.5, per="leaf"
    ),
    "clip_by_norm minimum": lambda: optaxclip.clip_by_norm(
        limits.minimum(limits.window_sigma(1.0, window=2), limits.quantile()),
        per="leaf",
    ),
    "zclip": lambda: optaxclip.zclip(warmup=2, max_norm=1.0, per="leaf"),
    "autoclip": lambda: optaxclip.autoclip(
        50.0, window=3, per=lambda name: name[:1], label="auto"
    ),
    "adagc": lambda: optaxclip.adagc(warmup=2),
    "agc": lambda: optaxclip.agc(stacked=lambda name: name == "w"),
    "block_rms": lambda: optaxclip.block_rms(0.1),
    "clip_by_historical_norm": lambda: optaxclip.clip_by_historical_norm(window=3),
    "gradient_stabilizer": lambda: optaxclip.gradient_stabilizer(),
    "aggc": lambda: optaxclip.aggc(0.5, 2.0, per=lambda name: name[:1]),
    "spam": lambda: optaxclip.spam(warmup=2),
    "stable_adam": lambda: optaxclip.stable_adam(scale_by_second_moment()),
    "clip_by_spectral_norm": lambda: optaxclip.clip_by_spectral_norm(0.5),
    "clip_by_spectral_norm smooth": lambda: optaxclip.clip_by_spectral_norm(
        0.5, smooth=True, stacked=lambda name: name == "n/half"
    ),
    "detect_explosions": lambda: optaxclip.detect_explosions(
        stacked=lambda name: name == "w"
    ),
    "skip_explosions": lambda: optaxclip.skip_explosions(
        optaxclip.clip_by_norm(1.0, label="inside"), max_consecutive=2, label="skip"
    ),
    "stabilize": lambda: optaxclip.stabilize(
        optaxclip.clip_by_value(optax.linear_schedule(2.0, 1.0, 10)), rollback=True
    ),
    "record": lambda: optaxclip.record(window=3, stacked=lambda name: name == "w"),
    "record per group": lambda: optaxclip.record(
        "norms", window=7, per=lambda name: name[:1]
    ),
    "record top": lambda: optaxclip.record(
        "top", window=3, top=2, stacked=lambda name: name == "w"
    ),
    "clip_by_value": lambda: optaxclip.clip_by_value(0.5),
    "clip_by_value schedule": lambda: optaxclip.clip_by_value(
        optax.linear_schedule(2.0, 1.0, 10)
    ),
    # Without `factors=` it passes all updates through.
    "scale_params": lambda: optaxclip.scale_params(),
}
STATELESS = {"clip_by_value", "scale_params"}
NEEDS_PARAMS = {"agc", "stabilize"}
# What becomes of a spike: the others clip it.
SKIPS = {"skip_explosions", "stabilize"}
PASSES = {"detect_explosions", "record", "record per group", "record top"}
PASSES |= {"scale_params"}
# The label under which a clip's state stands; None where there is no label.
LABELS = {name: None if "value" in name else "clip" for name in REGISTRY}
LABELS |= {"spam": None, "stable_adam": None}  # a tuple, with the state of Adam
LABELS |= {"scale_params": None}
LABELS |= {"autoclip": "auto", "skip_explosions": "skip"}
LABELS |= {"record": "gradients", "record per group": "norms"}
LABELS |= {"record top": "top"}
LABELS |= dict.fromkeys(("detect_explosions", "stabilize"), "explosions")
# Run with -m slow: they share their code with others in the registry.
SLOW = {"clip_by_norm ord=1", "clip_by_norm ord=3", "clip_by_norm schedule"}
SLOW |= {"clip_by_norm stacked", "clip_by_norm minimum"}
SLOW |= {"detect_explosions", "skip_explosions"}  # "stabilize" holds both
SLOW |= {"clip_by_norm per group", "autoclip", "block_rms", "record per group"}
SLOW |= {"record top"}
SLOW |= {"clip_by_norm soft", "clip_by_norm set", "clip_by_norm band"}
SLOW |= {"clip_by_historical_norm", "gradient_stabilizer", "aggc"}
SLOW |= {"clip_by_norm per leaf", "clip_by_norm per unit", "zclip", "agc"}
SLOW |= {"clip_by_spectral_norm smooth", "clip_by_spectral_norm", "spam"}
# Of what learns in a law of a few programs, a recorder stands for all; "stabilize" is
# scanned, stacked and wrapped by tests of its own.
SLOW_TO_DONATE = SLOW | {"adagc", "stable_adam", "clip_by_value schedule"}
SLOW_TO_COMPOSE = SLOW_TO_SCAN = SLOW_TO_DONATE | {"stabilize"}
SLOW_WITHOUT_JIT = SLOW | {"stabilize", "clip_by_spectral_norm"}
SLOW_WITHOUT_JIT |= {"adagc", "stable_adam"}
# Relative, by which two compiled programs may differ: of matrices 1e6 times their
# limit, each of ten steps multiplies roundings of 6e-8 by up to 12 / 0.09.
ROUNDINGS = dict.fromkeys(REGISTRY, 1e-6) | {
    name: 1e-4 for name in REGISTRY if name.startswith("clip_by_spectral_norm")
}


LIMITS: dict[str, Any] = {
    "constant": lambda: limits.constant(1.0),
    "schedule": lambda: limits.schedule(optax.linear_schedule(2.0, 1.0, 10)),
    "params": lambda: limits.params(0.01),
    "rms": lambda: limits.rms(1.0),
    "minimum": lambda: limits.minimum(limits.zscore(), 1.0),
    "maximum": lambda: limits.maximum(limits.zscore(), 1.0),
    "with_global": lambda: limits.with_global(1.0, 1.0),
    "zscore": lambda: limits.zscore(2.5, warmup=2),
    "ema": lambda: limits.ema(1.05, warmup=2),
    "mean_over_rms": lambda: limits.mean_over_rms(),
    "quantile": lambda: limits.quantile(0.5),
    "percentile": lambda: limits.percentile(10.0, window=3),
    "window_sigma": lambda: limits.window_sigma(3.0, window=2),
    "log_quantile": lambda: limits.log_quantile(window=4),
    "sustained_rise": lambda: limits.sustained_rise(window=4),
    "above_lowest": lambda: limits.above_lowest(),
    "fraction_of_start": lambda: limits.fraction_of_start(),
}
"""Each public limit, with as little history as it can do with."""
