"""How to respond to an explosion: skip the step, cool down, go back."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from optaxclip.checks import (
    check_label,
    check_length,
    check_number,
    check_structure,
    check_transformation,
    own_state,
    takes_value,
    value_of,
)
from optaxclip.clipping import ClipByNormState, ClipByValueState
from optaxclip.deciding import Cooling, Decision, Settings, decide, is_look_in
from optaxclip.explosions import (
    COUNTS,
    LOSS_LIMIT,
    MAX_GAP,
    NORM_LIMIT,
    SHARE_LIMIT,
    DetectExplosionsState,
    Detector,
    count,
    with_values,
)
from optaxclip.fixed_limits import ScheduleState
from optaxclip.limits import LimitLike
from optaxclip.norms import (
    accumulator,
    once,
    promoted,
    scaled,
    side_by_side,
    widened,
)
from optaxclip.recording import WINDOW, RecordState
from optaxclip.scopes import Scopes, Stacked, is_gradient
from optaxclip.selecting import update_or_keep


class Snapshots(NamedTuple):
    """Two copies of the parameters and the inner state, each a pair.

    Zeros before the first step, which copies what it is given. In the copy of the inner
    state plain tuples stand for all nodes but those like the parameters, so that
    nothing is found in it by a name: `optax.tree.get(state, "count")` is the present
    one.
    """

    older: Any
    """The copy that a rollback returns to, from a quiet step."""
    newer: Any
    """A copy that takes its place after `snapshot_every` quiet steps."""


CLOCKS = (
    optax.ScaleByScheduleState,
    ScheduleState,
    ClipByValueState,
    RecordState,
    DetectExplosionsState,
)
"""States that a rollback leaves as they are: they count the steps of the run, or tell
of them."""
CHECK_EVERY = 3
"""Steps between two looks at the moments of the inner state. Each look reads them once
more, and until the next one an element that is not finite stands still."""
BROKEN = 2
"""The count "gave_up" where it is because the parameters are NaN."""
_LEAF = jax.tree.structure(0)


class SkipExplosionsState(NamedTuple):
    """State of `skip_explosions`, as `{label: SkipExplosionsState}`."""

    explosions: DetectExplosionsState
    """What was noticed."""
    inner_state: Any
    """State of the wrapped transformation."""
    cooling: jax.Array
    """float32 `[2]`, a `deciding.Cooling`: the factor of the updates, below 1 while
    they cool down; and the least evidence against the parameters among the last
    explosions in a row, +inf for none."""
    snapshots: Snapshots | tuple[()]
    """() without rollback."""

    @property
    def scale(self) -> jax.Array:
        """Factor of the updates: float32 `[]`."""
        return self.cooling[..., 0]

    @property
    def gave_up(self) -> jax.Array:
        """Whether too many steps in a row were not finite, or parameters: bool `[]`."""
        return count(self.explosions, "gave_up") > 0


def skip_explosions(
    inner: optax.GradientTransformation,
    *,
    norm: LimitLike | None = NORM_LIMIT,
    share: LimitLike | None = SHARE_LIMIT,
    loss: LimitLike | None = LOSS_LIMIT,
    max_consecutive: int = 10,
    cool_down: ArrayLike | None = None,
    recovery: ArrayLike = 1.005,
    rollback: bool = False,
    snapshot_every: int = 50,
    rollback_after: int = 3,
    give_up_after: int = 100,
    max_gap: int = MAX_GAP,
    window: int = WINDOW,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "explosions",
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer: skips the steps that explode.

    A step is skipped if `detect_explosions` would notice an explosion: the updates are
    zeros, the inner state stays, bit for bit, and the rules learn nothing from it. A
    loss that is not finite while the gradients are is counted, and its step is taken.
    If explosions persist, that is a change of regime: from the `max_consecutive`-th in
    a row on the finite ones are taken and learned, with gradients clipped to the limit
    on the norm, until the rules find them usual. A non-finite step is never taken;
    after `give_up_after` in a row the run is given up, as `metrics` and
    `raise_if_exploded` say; with `rollback` at once where the parameters are NaN. Where
    `inner` itself makes something that is not finite, or an update would overflow the
    dtype of its parameter, those elements become 0. Where what it made stands in its
    moments, and so would stay, the inner state goes back to the snapshot's within 3
    steps, without rollback those moments to 0; that is an explosion too, and its step
    is skipped (`explosions/mended`).

    Put it around `optax.MultiSteps`, so that a bad micro-batch alone is lost. Within
    it, NaN would stay in what is accumulated, which `raise_if_exploded` tells; that
    needs `should_skip_update_fn=optax.skip_not_finite`.

    Two more responses are off unless asked for.

    To roll back: skipped steps leave the parameters as they are, so when the loss (the
    norm, if no loss is given) exceeds its limit `rollback_after` times in a row, these
    are no odd batches: the data have changed, or the parameters are bad. To tell which,
    parameters and inner state go back to those of a quiet step, `snapshot_every` to
    `2 * snapshot_every` quiet steps ago, for two batches. If the excess is gone, or at
    least half of it, that is the rollback; if not, they come back as they were, and the
    explosions are accepted. Ten non-finite steps in a row do the same. The update is
    `snapshot - params`, twice, so that rounding does not matter: it has to be applied
    as it is. So put `skip_explosions` around everything that changes updates, also
    `optax.contrib.schedule_free`; behind a learning rate of its own, as in
    `chain(skip_explosions(scale_by_adam()), scale(-1e-3))`, it undoes nothing, which
    `explosions/blocked_rollbacks` counts and `explain` tells. That takes the memory
    of two copies of both, and on healthy steps one read of one copy of the parameters.
    What the optimizer has learned goes back; what the user or the clock decides stays:
    the counts of schedules, the `hyperparams` of `optax.inject_hyperparams`, random
    keys, and records. The first snapshot is of what the first step is given, so that
    the moments of a run without `skip_explosions` may be put in before it:
    `state[label] = state[label]._replace(inner_state=saved)`.

    To cool down: a rollback within the first 64 steps reduces the updates to
    `cool_down`, a later one to 1/16 at most, since the steps were right for some time;
    one that follows another within 300 steps by 1/8, to `cool_down` or less, down to
    1/4096. Each quiet step multiplies that factor by `recovery`, up to 1. Without
    rollback, the `rollback_after`-th explosion in a row multiplies it by `cool_down`.

    Args:
      inner: The optimizer; it gets all extra arguments.
      norm: As in `detect_explosions`.
      share: As in `detect_explosions`.
      loss: As in `detect_explosions`.
      max_consecutive: From which explosion in a row on they are taken; at least 1.
      cool_down: The factor of the updates, within (0, 1]; None for off.
      recovery: Growth of that factor in a quiet step, >= 1.
      rollback: Whether to roll back; `update` then needs `params`.
      snapshot_every: Number of quiet steps between snapshots, at least 1.
      rollback_after: How many explosions in a row make a rollback, at least 1. One or
        two are often the fault of their batches.
      give_up_after: How many non-finite steps in a row end the run, at least 1. A
        dynamic loss scale needs up to 24 to fall from 2**24 to 1.
      max_gap: As in `detect_explosions`.
      window: As in `detect_explosions`.
      specs: As in `detect_explosions`.
      stacked: As in `clip_by_norm`.
      label: Under which name the state and the metrics appear.

    Returns:
      The transformation, with the state `{label: SkipExplosionsState}`.

    Raises:
      ValueError: If an argument is out of range; in `update` if `value` has axes, or
        without `params` where they are needed.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.skip_explosions(optax.adam(1e-3))
      >>> params, grads = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, jnp.nan])}
      >>> updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
      >>> print(updates["w"], optaxclip.metrics(state)["explosions/skipped"])
      [0. 0.] 1.0
    """
    detector = Detector(
        norm, share, loss, specs, stacked, max_gap=max_gap, window=window
    )
    check_number("recovery", recovery, lambda x: x >= 1, ">= 1")
    if cool_down is not None:
        check_number("cool_down", cool_down, lambda x: 0 < x <= 1, "within (0, 1]")
    if not isinstance(rollback, bool):
        raise TypeError(f"rollback must be True or False, not {rollback!r}")
    settings = Settings(
        max_consecutive=check_length("max_consecutive", max_consecutive, 1),
        rollback_after=check_length("rollback_after", rollback_after, 1),
        give_up_after=check_length("give_up_after", give_up_after, 1),
        snapshot_every=check_length("snapshot_every", snapshot_every, 1),
        cool_down=cool_down,
        recovery=recovery,
        has_snapshots=rollback,
    )
    check_label(label)
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    is_given_value = takes_value(inner.update)

    def init(params):
        inner_state = inner.init(params)
        snapshots = ()
        if rollback:
            # Two: a buffer that appears twice cannot be donated.
            present = _present(params, inner_state)
            older, newer = (jax.tree.map(jnp.zeros_like, present) for _ in range(2))
            snapshots = Snapshots(older, newer)
        return {
            label: SkipExplosionsState(
                explosions=detector.init(params),
                inner_state=inner_state,
                cooling=jnp.array([1, jnp.inf], jnp.float32),
                snapshots=snapshots,
            )
        }

    def update(updates, state, params=None, **extra_args):
        state = own_state(state, label, SkipExplosionsState)
        if rollback and params is None:
            raise ValueError(
                "a rollback is an update from the parameters: call "
                "update(updates, state, params) with params, or give rollback=False"
            )
        value = value_of(extra_args)
        explosions, seen = detector.update(updates, value, state.explosions, params)
        now = {name: count(explosions, name) for name in COUNTS}
        is_away = is_broken = jnp.zeros([], bool)
        if isinstance(state.snapshots, Snapshots):
            is_look = is_look_in(now["phase"])
            is_away, is_broken = _compared(
                is_look | seen.has_nonfinite_updates,
                params,
                state.snapshots.older[0],
                updates,
                detector.scopes_of(params),
            )
        decision = decide(settings, seen, now, Cooling(*state.cooling), is_away)
        # What comes of bad parameters would soon look usual.
        explosions = explosions._replace(
            rule_states=jax.tree.map(
                lambda new, old: jnp.where(decision.is_skipped, old, new),
                explosions.rule_states,
                state.explosions.rule_states,
            )
        )
        updates = _limited(updates, decision.is_accepted, seen.norm, seen.norm_limit)
        num_steps = count(state.explosions, "steps")
        inner_state, snapshots = state.inner_state, state.snapshots
        is_due = decision.is_copied | (num_steps % CHECK_EVERY == CHECK_EVERY - 1)
        is_spoiled = _are_spoiled(
            is_due & (num_steps > 0),
            inner_state,
            updates,
            detector.scopes_of(updates),
        )
        if isinstance(snapshots, Snapshots):
            done, inner_state, snapshots = _moved(
                decision, is_spoiled, num_steps, params, inner_state, snapshots
            )
        else:
            done, inner_state = _mended(is_spoiled, inner_state, updates)
        is_skipped = once(decision.is_skipped | is_spoiled | done)

        if not is_given_value:
            extra_args.pop("value", None)

        def update_inner(state):
            found, new = inner.update(updates, state, params, **extra_args)
            check_structure(state, new)
            return found, new

        updates, inner_state = update_or_keep(update_inner, inner_state, is_skipped)

        scale = decision.cooling.scale

        def respond(u, param=None, snapshot=None):
            if not is_gradient(u):
                return u
            # They may be Python numbers, or NumPy's float64.
            u = jnp.asarray(u)
            param = None if param is None else jnp.asarray(param)
            if cool_down is not None:
                u = scaled(u, scale.astype(u.real.dtype))
            after = u if param is None else _sum(param, u).astype(param.dtype)
            u = jnp.where(~is_skipped & jnp.isfinite(after), u, jnp.zeros_like(u))
            if snapshot is None or param is None:
                return u
            way_back = _sum(snapshot, -param).astype(u.dtype)
            return jnp.where(decision.is_at_snapshot, way_back, u)

        trees = [updates] if params is None else [updates, params]
        if isinstance(snapshots, Snapshots):
            present = _present(params, inner_state)
            snapshots = _widened(snapshots, present)
            trees.append(snapshots.older[0])
        updates = jax.tree.map(respond, *trees)
        counts = now | decision.counts
        gave_up = counts["gave_up"].astype(jnp.int32)
        counts["gave_up"] = jnp.where(is_broken, BROKEN, gave_up)
        is_new = is_spoiled & (counts["last"] < counts["steps"] - 1)
        counts["exploded"] += is_new.astype(jnp.int32)
        counts["skipped"] += (is_spoiled & ~decision.is_skipped).astype(jnp.int32)
        counts["mended"] += is_spoiled.astype(jnp.int32)
        counts["last"] = jnp.where(is_new, counts["steps"] - 1, counts["last"])
        state = SkipExplosionsState(
            explosions=with_values(explosions, counts),
            inner_state=inner_state,
            cooling=side_by_side(decision.cooling),
            snapshots=snapshots,
        )
        return updates, {label: state}

    return optax.GradientTransformationExtraArgs(init, update)


def _moved(
    decision: Decision,
    is_spoiled: jax.Array,
    num_steps: jax.Array,
    params: Any,
    inner_state: Any,
    snapshots: Snapshots,
) -> tuple[jax.Array, Any, Snapshots]:
    """(False, the inner state, the snapshots) after a decision; free if it moves none.

    Each step depends on the one before, so that XLA copies nothing. The first snapshot
    is of what the first step is given, and not of what `init` was: parameters and
    moments may have been read from a checkpoint in between.
    """
    present = _present(params, inner_state)
    older, newer = _widened(snapshots, present)
    done, older = _replaced(decision.is_replaced | (num_steps == 1), newer, older)
    is_copied = decision.is_copied & ~is_spoiled
    is_copied |= decision.is_started | (num_steps == 0)
    done, newer = _replaced(is_copied | done, present, newer)
    is_exchanged = decision.is_started | decision.is_returned | is_spoiled
    leaves, structure = jax.tree.flatten(inner_state)
    olds, is_kept = jax.tree.leaves(older[1]), _kept(inner_state)
    olds = [x if keep else y for x, y, keep in zip(leaves, olds, is_kept, strict=True)]
    done, leaves = _replaced(is_exchanged | done, olds, leaves)
    return done, jax.tree.unflatten(structure, leaves), Snapshots(older, newer)


def _compared(
    when: jax.Array, params: Any, snapshot: Any, updates: Any, scopes: Scopes
) -> tuple[jax.Array, jax.Array]:
    """Whether parameters are not those of a snapshot, and whether they hold NaN.

    The norm of a leaf's difference may be four roundings of the leaf: what an update
    leaves from eight times as far. Both False, at no cost, unless `when`.
    """

    def level_of(leaf, x, y, u):
        """`[layers]` or `[]`: 2 where there is NaN, 1 where they differ, else 0."""
        if not leaf.is_gradient:
            return jnp.zeros(leaf.part_shape, jnp.float32)
        x, y, u = map(jnp.asarray, (x, y, u))  # they may be Python numbers
        eps = max(float(jnp.finfo(z.dtype).eps) for z in (x, u) if is_gradient(z))
        axes = tuple(i for i in range(x.ndim) if i not in leaf.kept)
        x, y = (widened(z, accumulator([x, y])) for z in (x, y))
        # Sums, since for them alone XLA stores nothing for every element.
        distance, size = (jnp.sum((z * z.conj()).real, axes) for z in (x - y, y))
        is_away = ~(distance <= (4 * eps) ** 2 * size)
        has_nan = jnp.isnan(jnp.sum(x, axes))
        return jnp.where(has_nan, 2, is_away.astype(jnp.float32))

    def body(carry):
        # Tied to the loop's state, or XLA would compute all before the loop.
        flag, *trees = lax.optimization_barrier((carry[0], params, snapshot))
        leaves = map(jax.tree.leaves, (*trees, updates))
        levels = list(map(level_of, scopes.leaves, *leaves))
        level: Any = scopes.collapse(levels, "max")
        return jnp.zeros_like(flag), jnp.max(level, initial=0)

    params, _ = _present(params, ())
    params, snapshot = lax.stop_gradient((params, snapshot))
    none = jnp.zeros([], jnp.float32)
    _, level = lax.while_loop(lambda carry: carry[0], body, (when, none))
    return level > 0, level > 1


def _are_spoiled(
    when: jax.Array, inner_state: Any, updates: Any, scopes: Scopes
) -> jax.Array:
    """Whether a moment is not finite. Costs nothing unless `when`."""
    places = _moments(inner_state, updates)
    leaves = jax.tree.leaves(inner_state)
    moments = lax.stop_gradient([leaves[i] for i in places])

    def body(carry):
        # Tied to the loop's state, or XLA would compute all before the loop.
        flag, found = lax.optimization_barrier((carry[0], moments))
        levels = [jnp.zeros(leaf.part_shape, jnp.float32) for leaf in scopes.leaves]
        for x, i in zip(found, places.values(), strict=True):
            axes = tuple(set(range(x.ndim)) - set(scopes.leaves[i].kept))
            # A sum, as in `_compared`: inf - inf is NaN. 0 * x would be a product with
            # an array of zeros.
            x = widened(x, accumulator([x]))
            total = jnp.sum(x - x, axes)
            levels[i] = jnp.where(jnp.isnan(total), 1, levels[i])
        level: Any = scopes.collapse(levels, "max")
        return jnp.zeros_like(flag), jnp.max(level, initial=0)

    if not places:
        return jnp.zeros([], bool)
    none = jnp.zeros([], jnp.float32)
    return lax.while_loop(lambda carry: carry[0], body, (when, none))[1] > 0


def _mended(when: jax.Array, inner_state: Any, updates: Any) -> tuple[jax.Array, Any]:
    """(False, the inner state with 0 for moments that are not finite).

    Costs nothing unless `when`. What follows must depend on the False, see `_replaced`.
    """
    leaves, structure = jax.tree.flatten(inner_state)
    places = _moments(inner_state, updates)

    def body(carry):
        flag, moments = carry
        finite = [jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)) for x in moments]
        return jnp.zeros_like(flag), finite

    moments = [jnp.asarray(leaves[i]) for i in places]
    done, moments = lax.while_loop(lambda carry: carry[0], body, (when, moments))
    for i, x in zip(places, moments, strict=True):
        leaves[i] = x
    return done, jax.tree.unflatten(structure, leaves)


def _moments(state: Any, updates: Any) -> dict[int, int]:
    """Leaves of a state, each with the leaf of the updates whose moment it is.

    Those are floating, of the same shape, and within a tree like the updates. What we
    keep of a run is none: limits and records hold inf and NaN on purpose. Nor is a
    single number, which may be anything.
    """
    found: dict[int, int] = {}
    if np.ndim(updates) == 0 and jax.tree.structure(updates) == _LEAF:
        return found

    def collect(tree, like, place, index):
        """From leaf `place` of the state on, and from leaf `index` of the updates."""
        if tree is None or isinstance(tree, optax.MaskedNode):
            return
        (children, structure), (others, _) = map(_split, (tree, like))
        if structure == _LEAF:
            if is_gradient(tree) and np.shape(tree) == np.shape(like):
                found[place] = index
            return
        for child, other in zip(children, others, strict=True):
            collect(child, other, place, index)
            place, index = place + _num_leaves(child), index + _num_leaves(other)

    def visit(tree, place):
        children, structure = _split(tree)
        if isinstance(tree, (ClipByNormState, SkipExplosionsState, *CLOCKS)):
            return
        if _is_like(tree, updates):
            collect(tree, updates, place, 0)
        elif structure != _LEAF:
            for child in children:
                visit(child, place)
                place += _num_leaves(child)

    visit(state, 0)
    return found


def _split(tree: Any) -> tuple[list, Any]:
    """The children of a node, and its structure alone."""
    return jax.tree.flatten(tree, is_leaf=lambda x: x is not tree)


def _present(params: Any, inner_state: Any) -> tuple[Any, Any]:
    """What a snapshot is of, as arrays; zeros for a function among the leaves."""

    def as_array(x):
        numbers = int | float | complex | np.ndarray | np.generic
        if isinstance(x, numbers):
            return jnp.asarray(x, jnp.result_type(x))  # not of a weak type
        return x if hasattr(x, "dtype") else jnp.zeros([], bool)

    return jax.tree.map(as_array, (params, _unnamed(inner_state, params)))


def _unnamed(tree: Any, params: Any) -> Any:
    """The tree with plain tuples for all its nodes but those like the parameters.

    These keep theirs, so that what is said of parameters (`optax.tree_map_params`,
    shardings by name or in boxes) holds for their copies.
    """
    children, structure = _split(tree)
    if not children or structure == _LEAF or _is_like(tree, params):
        return tree
    return tuple(_unnamed(x, params) for x in children)


def _is_like(tree: Any, params: Any) -> bool:
    """Whether a tree has the structure of the parameters, with some perhaps masked."""
    if tree is None or isinstance(tree, optax.MaskedNode):
        return True
    (children, structure), (others, other) = map(_split, (tree, params))
    return structure == other and (
        structure == _LEAF or all(map(_is_like, children, others))
    )


def _kept(state: Any) -> list[bool]:
    """For each leaf of an inner state, whether a rollback leaves it as it is.

    That is what the user or the clock decides, and what tells of the run; what the
    optimizer has learned goes back.
    """
    children, structure = _split(state)
    if structure == _LEAF:
        return [_is_key(state)]
    fields = getattr(state, "_fields", ())
    if isinstance(state, CLOCKS):
        learned = set()
    elif isinstance(state, ClipByNormState):
        learned = {"limit_state"}
    elif "hyperparams" in fields:  # of optax.inject_hyperparams
        learned = {"inner_state"}
    else:
        return [flag for child in children for flag in _kept(child)]
    return [
        flag
        for name, child in zip(fields, children, strict=True)
        for flag in (_kept(child) if name in learned else [True] * _num_leaves(child))
    ]


def _sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """X + y, also of two dtypes where a user forbids implicit promotion."""
    dtype = promoted(x.dtype, y.dtype)
    return x.astype(dtype) + y.astype(dtype)


def _num_leaves(tree: Any) -> int:
    return len(jax.tree.leaves(tree))


def _is_key(x: Any) -> bool:
    """Whether an array holds keys, of the new kind or the old one."""
    dtype = jnp.result_type(x)
    return jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32


def _widened(snapshots: Snapshots, present: Any) -> Snapshots:
    """Snapshots that can hold the present parameters and inner state.

    The first gradients may be wider than the parameters that `init` was given, and
    widen the moments: then these take the snapshots with them, once. One that is wide
    enough keeps its type, so that a state whose type `lax.scan` can carry keeps that.
    """

    def widened(x, y):
        if x.dtype == y.dtype:
            return x
        return x.astype(promoted(x.dtype, y.dtype))

    older, newer = (jax.tree.map(widened, copy, present) for copy in snapshots)
    return Snapshots(older, newer)


def _limited(updates: Any, when: jax.Array, norm: jax.Array, limit: jax.Array) -> Any:
    """The updates, where `when` with a norm of at most its limit."""
    is_large = when & ~(norm <= limit)
    # Zeros if the limit is bad, or the norm not known: beyond the largest float.
    is_good = (limit > 0) & (norm < jnp.finfo(norm.dtype).max)
    dividend = jnp.where(is_large, jnp.where(is_good, limit, 0), 1)
    factor = dividend / jnp.where(is_large, norm, 1)  # computed once, see `once`

    def limited(u):
        if not is_gradient(u):
            return u
        # The barrier is that of `clip_by_norm`.
        u = lax.optimization_barrier(jnp.asarray(u))
        dtype = accumulator([u])
        return scaled(widened(u, dtype), factor.astype(dtype)).astype(u.dtype)

    return jax.tree.map(limited, updates)


def _replaced(when, new, old):
    """(False, `new` if `when`, else `old`): two trees; costs nothing if not.

    A loop of at most one turn, since a select would read and write all. What reads
    `new`, or takes its place, must depend on the False: XLA then runs it after the
    loop, and need not copy it. Derivatives are those of the select.
    """

    @jax.custom_jvp
    def choose(when, new, old):
        def body(carry):
            flag, old = carry
            old = jax.tree.map(
                lambda x, y: jnp.where(flag, x.astype(y.dtype), y), new, old
            )
            return jnp.zeros_like(flag), old

        return lax.while_loop(lambda carry: carry[0], body, (when, old))

    @choose.defjvp
    def _(primals, tangents):
        when, *_ = primals
        done, chosen = choose(*primals)

        def select(x, y):
            if y.dtype == jax.dtypes.float0:
                return y
            return jnp.where(when, x.astype(y.dtype), y)

        _, new, old = tangents
        no_tangent: Any = np.zeros(np.shape(done), jax.dtypes.float0)
        return (done, chosen), (no_tangent, jax.tree.map(select, new, old))

    return choose(when, new, old)
