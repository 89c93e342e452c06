"""Every public transformation and limit, a row or more each: what the laws run over."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
import reference
from optaxclip import limits
from optaxclip.numerics import is_gradient


class SecondMoment(NamedTuple):
    count: Any  # hides the method of tuples, as in Optax
    nu: Any


def scale_by_second_moment() -> Any:
    """An Adam without a first moment, which Optax's is not under strict promotion."""

    def init(params):
        def zeros(x):
            if not is_gradient(x):
                return jnp.zeros([], jnp.float32)
            return jnp.zeros_like(x, jnp.float32)  # sharded as the parameters are

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


class Row(NamedTuple):
    """A transformation, and what the laws have to know of it."""

    make: Callable[[], Any]
    reference: Callable[[list], list] | None = None
    """Of all leaves of a step, where one step is all that it depends on."""
    label: str | None = "clip"
    """That under which its state stands; None where there is no label."""
    response: Literal["clips", "skips", "passes"] = "clips"
    """What becomes of a spike."""
    needs_params: bool = False
    is_stateless: bool = False
    slow: bool = False
    """Runs with -m slow: it shares its code with others in the registry."""


REGISTRY: dict[str, Row] = {
    "clip_by_norm": Row(
        lambda: optaxclip.clip_by_norm(1.0), partial(reference.clip, limit=1.0)
    ),
    "clip_by_norm per leaf": Row(
        lambda: optaxclip.clip_by_norm(1.0, per="leaf"),
        partial(reference.clip, limit=1.0, per="leaf"),
        slow=True,
    ),
    "clip_by_norm per unit": Row(
        lambda: optaxclip.clip_by_norm(1.0, per="unit"),
        partial(reference.clip, limit=1.0, per="unit"),
        slow=True,
    ),
    "clip_by_norm per group": Row(
        lambda: optaxclip.clip_by_norm(1.0, per=lambda n: n[:1]), slow=True
    ),
    "clip_by_norm stacked": Row(
        lambda: optaxclip.clip_by_norm(
            1.0, per="leaf", stacked=lambda name: name == "w"
        ),
        slow=True,
    ),
    "clip_by_norm ord=1": Row(
        lambda: optaxclip.clip_by_norm(1.0, ord=1),
        partial(reference.clip, limit=1.0, ord=1),
        slow=True,
    ),
    "clip_by_norm ord=3": Row(
        lambda: optaxclip.clip_by_norm(1.0, ord=3),
        partial(reference.clip, limit=1.0, ord=3),
        slow=True,
    ),
    "clip_by_norm schedule": Row(
        lambda: optaxclip.clip_by_norm(optax.linear_schedule(2.0, 1.0, 10)), slow=True
    ),
    "clip_by_norm soft": Row(
        lambda: optaxclip.clip_by_norm(
            1.0, respond="soft", per="leaf", where=lambda name: name != "b"
        ),
        slow=True,
    ),
    "clip_by_norm set": Row(
        lambda: optaxclip.clip_by_norm(1.0, respond="set", per="unit", unit_axis=0),
        slow=True,
    ),
    "clip_by_norm band": Row(
        lambda: optaxclip.clip_by_norm(
            limits.zscore(warmup=2), min_norm=0.5, per="leaf"
        ),
        slow=True,
    ),
    "clip_by_norm with_global": Row(
        lambda: optaxclip.clip_by_norm(
            limits.with_global(limits.quantile(), 1.0), per="leaf"
        ),
        slow=True,
    ),
    "clip_by_norm minimum": Row(
        lambda: optaxclip.clip_by_norm(
            limits.minimum(limits.window_sigma(1.0, window=2), limits.quantile()),
            per="leaf",
        ),
        slow=True,
    ),
    "zclip": Row(
        lambda: optaxclip.zclip(warmup=2, max_norm=1.0, per="leaf"), slow=True
    ),
    "autoclip": Row(
        lambda: optaxclip.autoclip(
            50.0, window=3, per=lambda name: name[:1], label="auto"
        ),
        label="auto",
        slow=True,
    ),
    "adagc": Row(lambda: optaxclip.adagc(warmup=2)),
    "agc": Row(
        lambda: optaxclip.agc(stacked=lambda name: name == "w"),
        needs_params=True,
        slow=True,
    ),
    "block_rms": Row(lambda: optaxclip.block_rms(0.1), slow=True),
    "clip_by_historical_norm": Row(
        lambda: optaxclip.clip_by_historical_norm(window=3), slow=True
    ),
    "gradient_stabilizer": Row(lambda: optaxclip.gradient_stabilizer(), slow=True),
    "aggc": Row(lambda: optaxclip.aggc(0.5, 2.0, per=lambda name: name[:1]), slow=True),
    # The states of these two are tuples, with the state of Adam.
    "spam": Row(lambda: optaxclip.spam(warmup=2), label=None, slow=True),
    "stable_adam": Row(
        lambda: optaxclip.stable_adam(scale_by_second_moment()), label=None
    ),
    "clip_by_spectral_norm": Row(
        lambda: optaxclip.clip_by_spectral_norm(0.5), slow=True
    ),
    "clip_by_spectral_norm smooth": Row(
        lambda: optaxclip.clip_by_spectral_norm(
            0.5, smooth=True, stacked=lambda name: name == "n/half"
        ),
        slow=True,
    ),
    # "stabilize" holds the next two.
    "detect_explosions": Row(
        lambda: optaxclip.detect_explosions(stacked=lambda name: name == "w"),
        label="explosions",
        response="passes",
        slow=True,
    ),
    "skip_explosions": Row(
        lambda: optaxclip.skip_explosions(
            optaxclip.clip_by_norm(1.0, label="inside"), max_consecutive=2, label="skip"
        ),
        label="skip",
        response="skips",
        slow=True,
    ),
    "stabilize": Row(
        lambda: optaxclip.stabilize(
            optaxclip.clip_by_value(optax.linear_schedule(2.0, 1.0, 10)), rollback=True
        ),
        label="explosions",
        response="skips",
        needs_params=True,
    ),
    "record": Row(
        lambda: optaxclip.record(window=3, stacked=lambda name: name == "w"),
        label="gradients",
        response="passes",
    ),
    "record per group": Row(
        lambda: optaxclip.record("norms", window=7, per=lambda name: name[:1]),
        label="norms",
        response="passes",
        slow=True,
    ),
    "record top": Row(
        lambda: optaxclip.record(
            "top", window=3, top=2, stacked=lambda name: name == "w"
        ),
        label="top",
        response="passes",
        slow=True,
    ),
    "clip_by_value": Row(
        lambda: optaxclip.clip_by_value(0.5),
        partial(reference.clip_by_value, limit=0.5),
        label=None,
        is_stateless=True,
    ),
    "clip_by_value schedule": Row(
        lambda: optaxclip.clip_by_value(optax.linear_schedule(2.0, 1.0, 10)),
        label=None,
    ),
    # Without `factors=` it passes all updates through.
    "scale_params": Row(
        lambda: optaxclip.scale_params(),
        list,
        label=None,
        response="passes",
        is_stateless=True,
    ),
}


class LimitRow(NamedTuple):
    """A limit, with the naive reference beside which it is tested."""

    make: Callable[..., limits.Limit]
    reference: Callable[..., Any] | None
    """The limit of each step, of its norms and of the arguments of `make`."""
    why_none: str = ""
    """Why there is no reference."""
    least: Mapping[str, Any] = MappingProxyType({})
    """Arguments with as little history as it can do with."""
    short: Mapping[str, Any] = MappingProxyType({})
    """Arguments other than the defaults, for tests beside the reference."""


LIMITS: dict[str, LimitRow] = {
    "constant": LimitRow(partial(limits.constant, 1.0), None, "it is its argument"),
    "schedule": LimitRow(
        partial(limits.schedule, optax.linear_schedule(2.0, 1.0, 10)),
        None,
        "it is its argument, of the number of steps and no norm",
    ),
    "params": LimitRow(limits.params, None, "it is of the parameters, not of norms"),
    "rms": LimitRow(limits.rms, None, "it is of the number of elements, not of norms"),
    "with_global": LimitRow(
        partial(limits.with_global, 1.0, 1.0), None, "it is of all scopes together"
    ),
    "minimum": LimitRow(
        lambda: limits.minimum(limits.zscore(), 3.0),
        lambda *args: np.minimum(reference.zscore(*args), 3.0),
    ),
    "maximum": LimitRow(
        lambda: limits.maximum(limits.zscore(), 3.0),
        lambda *args: np.maximum(reference.zscore(*args), 3.0),
    ),
    "zscore": LimitRow(
        limits.zscore,
        reference.zscore,
        least={"warmup": 2},
        short={"max_zscore": 4.0, "decay": 0.8, "warmup": 7},
    ),
    "ema": LimitRow(
        partial(limits.ema, multiple=1.05),
        partial(reference.ema, multiple=1.05),
        least={"warmup": 2},
        short={"multiple": 2.0, "decay": 0.8, "warmup": 12, "max_warmup_norm": 1.0},
    ),
    "mean_over_rms": LimitRow(
        limits.mean_over_rms,
        reference.mean_over_rms,
        short={"decay": 0.9, "squares_decay": 0.7},
    ),
    "quantile": LimitRow(
        limits.quantile,
        reference.quantile,
        short={"target": 0.883, "initial_norm": 9.0, "rate": 0.5},
    ),
    "percentile": LimitRow(
        limits.percentile,
        reference.percentile,
        least={"window": 3},
        short={"percent": 62.5, "window": 9},
    ),
    "window_sigma": LimitRow(
        limits.window_sigma,
        reference.window_sigma,
        least={"window": 2},
        short={"sigmas": 2.0, "window": 15},
    ),
    "log_quantile": LimitRow(
        limits.log_quantile,
        reference.log_quantile,
        least={"window": 4},
        short={"power": 1.5, "min_ratio": 1.2, "max_jump": 2.0, "window": 11},
    ),
    "sustained_rise": LimitRow(
        limits.sustained_rise,
        reference.sustained_rise,
        least={"window": 4},
        short={"max_ratio": 1.3, "window": 5, "patience": 2},
    ),
    "above_lowest": LimitRow(
        limits.above_lowest,
        reference.above_lowest,
        short={"max_ratio": 1.2, "window": 3},
    ),
    "fraction_of_start": LimitRow(
        limits.fraction_of_start,
        reference.fraction_of_start,
        short={"fraction": 0.5, "num_steps": 3},
    ),
}
