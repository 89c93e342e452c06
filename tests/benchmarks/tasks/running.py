"""Trains a run of the zoo, for several seeds at once, and judges how it ended."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from tasks.task import Task

RATE, RAMP, INIT, DATA, HALF = (
    "step size",
    "rising step size",
    "initialization",
    "corrupt batches",
    "low precision",
)
HEALTHY = "healthy"
CAUSES = RATE, RAMP, INIT, DATA, HALF


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        kind: `HEALTHY`, or why it explodes: one of `CAUSES`.
        task: What is learned.
        optimizer: From the step size to the optimizer.
        rate: The step size.
        gain: Multiplies the first parameters.
        corrupt: From `(key, step, batch)` to the batch that is used.
        dtype: In which the loss is computed; parameters are float32.
        loss_scale: Multiplies the loss, and divides its gradients.
        is_dynamic: Whether the loss scale is halved, and the step left out by the loop
            itself, where a gradient is non-finite.
        steps: How many.
    """

    kind: str
    task: Task
    optimizer: Callable[[Any], Any]
    rate: float
    gain: float = 1.0
    corrupt: Callable[..., Any] | None = None
    dtype: Any = jnp.float32
    loss_scale: float = 1.0
    is_dynamic: bool = False
    steps: int = 600


class Trained(NamedTuple):
    """What is known of a run; a row for each seed."""

    end: Any
    """Median of the measure over the last tenth of the steps; +inf if it or a
    parameter is non-finite."""
    start: Any
    """The measure at the first parameters."""
    loss: Any
    """`[seeds, steps]`: as the optimizer sees it."""
    norms: Any
    """`[seeds, steps, num_leaves]`: of the gradients, likewise."""
    state: Any
    """The optimizer's state at the end."""
    scale: Any
    """`[seeds, steps]`: what a `stabilize` multiplied the updates by."""


def clean(run: Run) -> Run:
    """The same run without the cause of its explosion, if that is not the rate."""
    return dataclasses.replace(
        run, gain=1.0, corrupt=None, dtype=jnp.float32, loss_scale=1.0, is_dynamic=False
    )


def train(run: Run, protect: Callable, seeds: int = 4, rate: Any = None) -> Trained:
    """Trains under `protect(optimizer)`, which is called with `value=loss`."""
    keys = jax.random.split(jax.random.key(7), seeds)
    rate = run.rate if rate is None else rate
    function = compiled(dataclasses.replace(run, kind="", rate=0.0), protect)
    return jax.device_get(function(keys, jnp.float32(rate)))


@functools.lru_cache(maxsize=4)
def compiled(run: Run, protect: Callable) -> Callable:
    """The training of all seeds, as a function of their keys and the step size."""
    return jax.jit(jax.vmap(functools.partial(_train, run, protect), (0, None)))


def unprotected(optimizer: Any) -> Any:
    return optimizer


def _train(run: Run, protect: Callable, key: jax.Array, rate: jax.Array) -> Trained:
    init_key, key = jax.random.split(key)
    params = jax.tree.map(lambda x: run.gain * x, run.task.init(init_key))
    extra = run.task.extra(params)
    players = run.task.players or ("all",)
    tx = optax.with_extra_args_support(protect(run.optimizer(rate)))

    def part(tree, player):
        return tree[player] if run.task.players else tree

    def measure(params, extra, key, step):
        keys = jax.random.split(jax.random.fold_in(key, step))
        batch = run.task.batch(keys[0], step, params, extra)
        return run.task.measure(run.task, params, batch, extra, keys[1])

    def minimized(params, batch, extra, scale):
        cast = functools.partial(_cast, dtype=run.dtype)
        loss = run.task.loss(cast(params), cast(batch), cast(extra))
        return jax.tree.map(lambda x: x.astype(jnp.float32) * scale, loss)

    def gradients(params, batch, extra, scale):
        if not run.task.players:
            return jax.value_and_grad(minimized)(params, batch, extra, scale)
        value, grads = {}, {}
        for player in players:
            value[player], grads[player] = jax.value_and_grad(
                lambda own, player=player: minimized(
                    params | {player: own}, batch, extra, scale
                )[player]
            )(params[player])
        return value, grads

    def step_once(carry, step):
        params, extra, states, scale = carry
        keys = jax.random.split(jax.random.fold_in(key, step))
        batch = run.task.batch(keys[0], step, params, extra)
        if run.corrupt is not None:
            batch = run.corrupt(keys[1], step, batch)
        value, grads = gradients(params, batch, extra, scale)
        value, grads = jax.tree.map(lambda x: x / scale, (value, grads))
        norms = optaxclip.leaf_norms(grads)
        after, new_states = {}, {}
        for player in players:
            own = part(params, player)
            updates, new_states[player] = tx.update(
                part(grads, player), states[player], own, value=part(value, player)
            )
            after[player] = optax.apply_updates(own, updates)
        after = after if run.task.players else after["all"]
        if run.is_dynamic:
            is_finite = jnp.isfinite(norms).all()
            after = _select(is_finite, after, params)
            if not find_skips(states):  # else it is to see the step
                new_states = _select(is_finite, new_states, states)
            scale = jnp.where(is_finite, scale, scale / 2)
        extra = run.task.follow(extra, after, batch)
        judged = jax.lax.cond(
            step >= run.steps - run.steps // 10,
            lambda: jnp.asarray(measure(after, extra, key, step), jnp.float32),
            lambda: jnp.float32(jnp.nan),
        )
        factor = scale_of(new_states)
        value = sum(jax.tree.leaves(value))
        return (after, extra, new_states, scale), (value, norms, judged, factor)

    states = {player: tx.init(part(params, player)) for player in players}
    carry = params, extra, states, jnp.float32(run.loss_scale)
    carry, (losses, norms, judged, factor) = jax.lax.scan(
        step_once, carry, jnp.arange(run.steps)
    )
    is_finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(carry[0])])
    last = judged[run.steps - run.steps // 10 :]
    is_good = jnp.isfinite(last) & is_finite.all()
    return Trained(
        end=jnp.median(jnp.where(is_good, last, jnp.inf)),
        start=measure(params, extra, key, 0),
        loss=losses,
        norms=norms,
        state=carry[2],
        scale=factor,
    )


def _cast(tree: Any, dtype: Any) -> Any:
    if dtype == jnp.float32:
        return tree
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def _select(flag: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(flag, x, y), new, old)


def find_skips(states: Any) -> list[optaxclip.SkipExplosionsState]:
    """The states of `stabilize` or `skip_explosions` in those of optimizers."""

    def is_skip(x):
        return isinstance(x, optaxclip.SkipExplosionsState)

    return [x for x in jax.tree.leaves(states, is_leaf=is_skip) if is_skip(x)]


def scale_of(states: Any) -> jax.Array:
    """The smallest factor of the updates among the players' states."""
    scales = [x.scale for x in find_skips(states)]
    return functools.reduce(jnp.minimum, scales, jnp.float32(1))


def at(first: int, every: int = 10**6, *, length: int = 1, factor: float = 1.0):
    """Corrupts `length` batches from `first` on, and again after `every` steps.

    Multiplies all floating arrays of the batch by `factor`; NaN makes them NaN.
    """

    def corrupt(key, step, batch):
        del key
        now = (step >= first) & ((step - first) % every < length)

        def multiplied(x):
            is_float = jnp.issubdtype(x.dtype, jnp.floating)
            return jnp.where(now, factor * x, x) if is_float else x

        return jax.tree.map(multiplied, batch)

    return corrupt


def shuffled_at(first: int, every: int, *, length: int = 1):
    """Permutes the targets of an `(x, y)` batch, likewise."""

    def corrupt(key, step, batch):
        now = (step >= first) & ((step - first) % every < length)
        x, y = batch
        return x, jnp.where(now, jax.random.permutation(key, y), y)

    return corrupt


def reference(run: Run, seeds: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """The best ends at smaller step sizes and, clean, at those and its own; the starts.

    Both `[seeds]`; the starts are those of the clean run.
    """
    cleaned = clean(run)
    parts = (4, 16, 64) if run.kind in (RATE, RAMP) else (1, 4, 16, 64)
    found = [train(cleaned, unprotected, seeds, rate=run.rate / part) for part in parts]
    return np.min([x.end for x in found], axis=0), found[0].start


def highest(best: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The largest measure of a healthy end: half of what can be learned is learned."""
    return best + np.maximum(0.2 * np.abs(best), (start - best) / 2)
