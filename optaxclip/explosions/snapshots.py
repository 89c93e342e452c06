"""Takes snapshots of the parameters, and moves between them. Internal."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.explosions.deciding import Decision
from optaxclip.explosions.rising import Rise, is_of_use
from optaxclip.explosions.settings import Settings
from optaxclip.explosions.state import Snapshots, Verdict
from optaxclip.explosions.trials import TRAINING, Comparison, is_trial_in
from optaxclip.norms.scopes import Scopes
from optaxclip.numerics import (
    accumulator,
    add,
    is_gradient,
    promote,
    saturating_cast,
    widen,
)
from optaxclip.xla import after, put, read_apart, replace_where, run_if, tie


def compare_with_snapshot(
    settings: Settings,
    seen: Verdict,
    now: dict[str, jax.Array],
    rise: Rise,
    snapshots: Snapshots | tuple[()],
    params: Any,
    updates: Any,
    scopes: Scopes,
) -> Comparison:
    """Compares the parameters with the snapshot."""
    if not isinstance(snapshots, Snapshots):
        no = jnp.zeros([], bool)
        return Comparison(no, no, jnp.zeros([], jnp.float32))
    is_asked = _is_asked(settings, seen, now, rise)
    is_due = is_trial_in(now["phase"]) | seen.has_nonfinite_updates | is_asked
    is_away, is_broken, slope = compare(
        is_due, params, snapshots.older, updates, scopes
    )
    norm = lax.stop_gradient(saturating_cast(seen.norm, jnp.float32))
    pull = slope / jnp.where(norm > 0, norm, 1)
    # None of what overflows.
    is_known = is_asked & (jnp.abs(pull) < jnp.inf)
    # Where nothing is non-finite, they may hold inf for good, as a mask does.
    return Comparison(is_away, is_broken & ~is_asked, jnp.where(is_known, pull, 0))


def _is_asked(
    settings: Settings, seen: Verdict, now: dict[str, jax.Array], rise: Rise
) -> jax.Array:
    """Whether the step is one of those that may tell why the loss has risen."""
    is_asked = (now["phase"] == TRAINING) & ~seen.is_bad
    is_asked &= is_of_use(rise, now, settings.snapshot_every)
    # Without smaller steps the loss would rise again, and be taken back, for ever.
    return is_asked & (settings.cool_down is not None)


def move_snapshots(
    decision: Decision,
    num_steps: jax.Array,
    params: Any,
    snapshots: Snapshots | tuple[()],
) -> tuple[jax.Array, Snapshots | tuple[()]]:
    """(`decision.is_skipped` after the copies, the snapshots); free if it moves none.

    The flag is the same one, but what reads it waits for the copies: they are made
    before the parameters are overwritten. Each copy depends on the one before, so that
    XLA makes no other. The first snapshot is of what the first step is given, and not
    of what `init` was: parameters may have been read from a checkpoint in between.

    A rollback leaves the inner state as it is. The steps that exploded were skipped, so
    they are not in its moments; and what the user or the clock decides stays, such as
    hyperparameters and the counts of schedules.
    """
    if not isinstance(snapshots, Snapshots):
        return decision.is_skipped, snapshots
    present = snapshot_of(params)
    older, newer = widen_snapshots(snapshots, present)
    done, older = replace_where(decision.is_replaced | (num_steps == 1), newer, older)
    is_copied = decision.is_copied | decision.is_started | (num_steps == 0)
    done, newer = replace_where(is_copied | done, present, newer)
    return after(done, decision.is_skipped), Snapshots(older, newer)


def compare(
    when: jax.Array, params: Any, snapshot: Any, updates: Any, scopes: Scopes
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compares parameters with a snapshot; False, False and 0, for free, unless `when`.

    Returns:
      Whether they are not those of the snapshot, whether they hold NaN, and the slope
      of the loss on the way from the snapshot on, by the gradients at the parameters.
    """

    def measure(leaf, x, y, u):
        """2 where there is NaN, 1 where they differ, else 0; squared distance; product.

        `[layers]` or `[]` each.
        """
        if not leaf.is_gradient:
            return (jnp.zeros(leaf.part_shape, jnp.float32),) * 3
        x, y, u = map(jnp.asarray, (x, y, u))  # they may be Python numbers
        eps = max(float(jnp.finfo(z.dtype).eps) for z in (x, u) if is_gradient(z))
        axes = tuple(i for i in range(x.ndim) if i not in leaf.kept)
        # The product reads them anew: XLA would store an x - y that two sums read.
        anew = [read_apart(z, "slope") for z in (x, y, u)]
        wide = accumulator([x, y, u])
        x, y = (widen(z, wide) for z in (x, y))
        # Sums, because for them alone XLA stores nothing for every element; nor does it
        # where a number would be multiplied with each, so `eps` stands outside.
        distance, size = (jnp.sum((z * z.conj()).real, axes) for z in (x - y, y))
        x, y, u = (widen(z, wide) for z in anew)
        product = jnp.sum(((x - y) * u.conj()).real, axes)
        # Four roundings of the leaf, in its norm: an update that leads back from eight
        # times as far leaves half an `eps` of that. Not, so that NaN is away.
        is_away = ~(distance <= (4 * eps) ** 2 * size)
        level = jnp.where(jnp.isnan(distance), 2, is_away.astype(jnp.float32))
        return level, distance.astype(jnp.float32), product.astype(jnp.float32)

    def measure_all(flag, _):
        present, earlier, grads = tie(flag, (params, snapshot, updates))
        leaves = map(jax.tree.leaves, (present, on_device(earlier), grads))
        parts = list(map(measure, scopes.leaves, *leaves))
        over_devices: Any = (
            scopes.collapse([part[i] for part in parts], reduce)
            for i, reduce in enumerate(("max", "sum", "sum"))
        )
        level, distance, product = over_devices
        distance, product = jnp.sum(distance), jnp.sum(product)
        slope = product / jnp.sqrt(jnp.where(distance > 0, distance, 1))
        return jnp.stack([jnp.max(level, initial=0), slope])

    params, updates = map(snapshot_of, (params, updates))
    params, snapshot, updates = lax.stop_gradient((params, snapshot, updates))
    _, found = run_if(when, measure_all, jnp.zeros([2], jnp.float32))
    level, slope = found
    return level > 0, level > 1, slope


def go_back(when: jax.Array, updates: Any, params: Any, snapshot: Any) -> Any:
    """The way to a snapshot in the host's memory as updates `when` it is due.

    Else the updates as they are, and nothing travels.
    """
    leaves, structure = jax.tree.flatten(updates)
    places = [i for i, u in enumerate(leaves) if is_gradient(u)]
    there = [jax.tree.leaves(tree) for tree in (snapshot_of(params), snapshot)]
    there = [[tree[i] for i in places] for tree in there]

    def replace(flag, updates):
        present, earlier = tie(flag, there)
        return list(map(way_back, updates, present, on_device(earlier)))

    _, found = run_if(when, replace, [leaves[i] for i in places])
    for i, u in zip(places, found, strict=True):
        leaves[i] = u
    return jax.tree.unflatten(structure, leaves)


def way_back(update: jax.Array, param: jax.Array, snapshot: jax.Array) -> jax.Array:
    """The update that leads from a parameter to its snapshot."""
    # An update, so that whoever applies updates rolls back without knowing it.
    return add(snapshot, -param).astype(update.dtype)


def empty_snapshots(params: Any, *, on_host: bool) -> Snapshots:
    """Two of zeros; each has buffers of its own, or they could not be donated."""
    if on_host:
        check_host_memory()
    space = jax.memory.Space.Host if on_host else jax.memory.Space.Device

    def empty(x):
        # Array by array: the device may have no room for all at once.
        return put(jnp.zeros_like(x), space)

    present = snapshot_of(params)
    older, newer = (jax.tree.map(empty, present) for _ in range(2))
    return Snapshots(older, newer)


def check_host_memory() -> None:
    """Raises the error of a platform that has no memory of the host."""
    with jax.ensure_compile_time_eval():
        kind = put(jnp.zeros([]), jax.memory.Space.Host).sharding.memory_kind
    if kind != "pinned_host":
        raise ValueError(
            'rollback="host" keeps snapshots in the memory of the host, which '
            f"{jax.default_backend()} with JAX {jax.__version__} does not give: use "
            "JAX 0.10 or later, or rollback=True"
        )


def check_can_roll_back(snapshots: Any, params: Any, *, on_host: bool) -> None:
    """Raises the error of a state in the memory of the device, or of no parameters."""
    # Not put there instead: JAX 0.10 aborts if what it moves is donated.
    if on_host and jax.tree.leaves(snapshots) and not is_on_host(snapshots):
        raise ValueError(
            'with rollback="host" the snapshots must be in the memory of the host, as '
            "init makes them: state = jax.device_put(state, jax.tree.map(lambda x: "
            "x.sharding, tx.init(params)))"
        )
    if params is None:
        raise ValueError(
            "a rollback is an update from the parameters: call "
            "update(updates, state, params) with params, or give rollback=False"
        )


def is_on_host(tree: Any) -> bool:
    """Whether the arrays are in the memory of the host."""
    spaces = {jax.typeof(x).memory_space for x in jax.tree.leaves(tree)}
    return spaces == {jax.memory.Space.Host}


def on_device(tree: Any) -> Any:
    """The arrays in the memory of the device."""
    return jax.tree.map(lambda x: put(x, jax.memory.Space.Device), tree)


def snapshot_of(params: Any) -> Any:
    """What a snapshot is of, as arrays; zeros for a function among the leaves."""

    def as_array(x):
        numbers = int | float | complex | np.ndarray | np.generic
        if isinstance(x, numbers):
            return jnp.asarray(x, jnp.result_type(x))  # not of a weak type
        return x if hasattr(x, "dtype") else jnp.zeros([], bool)

    return jax.tree.map(as_array, params)


def widen_snapshots(snapshots: Snapshots, present: Any) -> Snapshots:
    """Snapshots that can hold the present parameters.

    Parameters may widen after `init`: then they take the snapshots with them, once. One
    that is wide enough keeps its type, so that a state whose type `lax.scan` can carry
    keeps that.
    """

    def widen(x, y):
        if x.dtype == y.dtype:
            return x
        wide = put(x, jax.memory.Space.Device).astype(promote(x.dtype, y.dtype))
        return put(wide, jax.typeof(x).memory_space)

    older, newer = (jax.tree.map(widen, copy, present) for copy in snapshots)
    return Snapshots(older, newer)
