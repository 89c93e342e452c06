"""How to respond to an explosion: notice it, skip the step, cool down, go back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from optaxclip import limits
from optaxclip.checks import check_label, check_length, check_number
from optaxclip.clipping import counted
from optaxclip.limits import LimitLike, as_limit
from optaxclip.norms import divided, measure_leaves, saturating_cast, scaled
from optaxclip.scopes import Layout, Stacked, find_scopes, is_gradient, layout_of
from optaxclip.selecting import update_or_keep

RULES = ("nonfinite", "norm", "share", "loss")
COUNTS = ("steps", *RULES, "exploded", "in_a_row", "nonfinite_in_a_row", "last")
"""What each element of `DetectExplosionsState.counts` is."""
NUM_RECENT = 8
"""To so many norms the growth is fitted."""
NUM_UNTIL_GIVEN_UP = 100
"""After so many non-finite steps in a row the run is given up."""

NORM_LIMIT = limits.log_quantile()
SHARE_LIMIT = limits.drift()
LOSS_LIMIT = limits.log_quantile(2.4, min_ratio=1.7)

# An explosion within so many steps of the last belongs to the same one.
_MAX_GAP = 10
# Of the moving average against which the leaf that led has grown most.
_BASELINE_WINDOW = 64
_LEAST_SCALE = 1 / 64
_NUM_UNTIL_ROLLBACK = 3


class DetectExplosionsState(NamedTuple):
    """State of `detect_explosions`, as `{label: DetectExplosionsState}`.

    Few arrays, since each of them costs a small step some microseconds; `metrics` and
    `raise_if_exploded` name what they hold. "float" is float32, float64 if a parameter
    is.
    """

    counts: jax.Array
    """int32 `[9]`: the number of steps; on how many of them the four rules fired (not
    finite, norm, share, loss) and on how many any; how many in a row, up to the last
    step, exploded and were not finite; and the last that exploded, -1 for none."""
    steps: jax.Array
    """int32 `[3, 6]`: three steps, which are the last, the one on which the last
    explosion began (after ten without one), and the first of the last non-finite ones
    in a row. Of each its index (-1 for none), the leaf that led (the first that was
    not finite, or else the one that had grown most against its moving average; -1 for
    none), and whether each of the four rules fired."""
    numbers: jax.Array
    """float `[3, 14]`: of the same three steps the norm, the share of the leaf that led
    and the loss (NaN where not given), the limits of these (+inf for none), and the
    last eight finite norms (0 where there is none yet)."""
    baseline: jax.Array
    """float `[num_leaves, 2]`: moving average of the logarithm of each leaf's norm, and
    the number of norms in it, up to 64."""
    rule_states: tuple[Any, Any, Any]
    """States of the limits on norm, share and loss."""
    layout: Layout
    """No arrays: how `params` names the leaves."""


class Snapshots(NamedTuple):
    """Two copies of the parameters and the inner state, each a pair."""

    older: Any
    """The copy that a rollback returns to, from a quiet step."""
    newer: Any
    """A copy that takes its place after `snapshot_every` quiet steps."""
    num_quiet: jax.Array
    """int32 `[]`: number of quiet steps since the newer."""


class SkipExplosionsState(NamedTuple):
    """State of `skip_explosions`, as `{label: SkipExplosionsState}`."""

    explosions: DetectExplosionsState
    """What was noticed."""
    inner_state: Any
    """State of the wrapped transformation."""
    num_responses: jax.Array
    """int32 `[2]`: number of steps skipped, number of rollbacks."""
    scale: jax.Array
    """float32 `[]`: factor of the updates; below 1 while they cool down."""
    snapshots: Snapshots | tuple[()]
    """() without rollback."""

    @property
    def gave_up(self) -> jax.Array:
        """Whether the last 100 steps in a row were not finite: bool `[]`."""
        return count(self.explosions, "nonfinite_in_a_row") >= NUM_UNTIL_GIVEN_UP


def detect_explosions(
    *,
    norm: LimitLike | None = NORM_LIMIT,
    share: LimitLike | None = SHARE_LIMIT,
    loss: LimitLike | None = LOSS_LIMIT,
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "explosions",
) -> optax.GradientTransformationExtraArgs:
    """Notices exploding updates, and remembers when and where it began.

    A step explodes if it is not finite, in any leaf or in the loss, or if one of three
    signals exceeds its limit: the norm of all updates, the share of a leaf in it, and
    the loss, where the training loop gives it: `update(grads, state, params,
    value=loss)`. Updates pass through; `metrics` reads the verdict, and
    `raise_if_exploded` tells it.

    Placed after the optimizer, it watches the norm of the updates instead of the
    gradients. Labels in different places of a chain have to differ.

    Args:
      norm: Limit on the norm: a number, a schedule or a `Limit`; None for no such rule.
        By default `limits.log_quantile()`.
      share: Limit on the share of each leaf, within [0, 1], likewise. By default
        `limits.drift()`.
      loss: Limit on the loss, likewise. By default `limits.log_quantile(2.4,
        min_ratio=1.7)`, for a loss > 0; for one that may be negative take
        `limits.window_sigma(6)`.
      specs: As in `clip_by_norm`; inside `jax.shard_map`, `value` must have been
        reduced over the devices.
      stacked: As in `clip_by_norm`.
      label: Under which name the state and the metrics appear.

    Returns:
      The transformation, with the state `{label: DetectExplosionsState}`: under 3 KiB
      and 28 bytes a leaf.

    Raises:
      ValueError: If an argument is out of range, or in `update` if `value` has axes.
      TypeError: If an argument is of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> detect = optaxclip.detect_explosions()
      >>> state = detect.init({"w": jnp.ones(2)})
      >>> for size in [1.0, 1.1, 0.9, 50.0]:
      ...     grads = {"w": jnp.array([size, size])}
      ...     _, state = detect.update(grads, state, value=jnp.array(0.5))
      >>> print(optaxclip.metrics(state)["explosions/count/norm"])
      1
    """
    detector = _Detector(norm, share, loss, specs, stacked)
    check_label(label)

    def init(params):
        return {label: detector.init(params)}

    def update(updates, state, params=None, **extra_args):
        del params
        value = extra_args.get("value")
        return updates, {label: detector.update(updates, value, state[label])}

    return optax.GradientTransformationExtraArgs(init, update)


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
    specs: Any = None,
    stacked: Stacked | None = None,
    label: str = "explosions",
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer: skips the steps that explode.

    A step is skipped if `detect_explosions` would notice an explosion: the updates are
    zeros, the inner state stays, bit for bit, and the rules learn nothing from it. If
    explosions persist, the `max_consecutive`-th in a row, if it is finite, is a change
    of regime: its step is taken and the rules start afresh. A non-finite step is never
    taken; after 100 in a row the run is given up, which `metrics` and
    `raise_if_exploded` say. Where `inner` itself makes something that is not finite, or
    an update would overflow the dtype of its parameter, those elements become 0.

    Two more responses are off unless asked for. To cool down: a factor of the inner
    updates, times `cool_down` at an explosion within ten steps of another and times its
    square at a third in a row, down to 1/64; every quiet step multiplies it by
    `recovery`, up to 1. To roll back: the third explosion in a row takes parameters and
    inner state back to those of a quiet step, `snapshot_every` to `2 * snapshot_every`
    quiet steps ago. The update is then `snapshot - params`, which `optax.apply_updates`
    turns into the snapshot to one rounding of the larger of the two. If explosions go
    on all the same and are accepted, the factor is raised again. A rollback takes the
    memory of two copies of both, and on healthy steps one read of one copy of the
    parameters.

    Args:
      inner: The optimizer; it gets all extra arguments.
      norm: As in `detect_explosions`.
      share: As in `detect_explosions`.
      loss: As in `detect_explosions`.
      max_consecutive: At most one fewer finite explosions in a row are skipped; at
        least 1.
      cool_down: What the updates are multiplied by, within (0, 1]; None for off.
      recovery: Growth of that factor in a quiet step, >= 1.
      rollback: Whether to roll back; `update` then needs `params`.
      snapshot_every: Number of quiet steps between snapshots, at least 1.
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
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.skip_explosions(optax.adam(1e-3))
      >>> params = {"w": jnp.ones(2)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([1.0, jnp.nan])}, state, params)
      >>> print(updates["w"], optaxclip.metrics(state)["explosions/skipped"])
      [0. 0.] 1.0
    """
    detector = _Detector(norm, share, loss, specs, stacked)
    max_consecutive = check_length("max_consecutive", max_consecutive, 1)
    snapshot_every = check_length("snapshot_every", snapshot_every, 1)
    check_number("recovery", recovery, lambda x: x >= 1, ">= 1")
    if cool_down is not None:
        check_number("cool_down", cool_down, lambda x: 0 < x <= 1, "within (0, 1]")
    if not isinstance(rollback, bool):
        raise TypeError(f"rollback must be True or False, not {rollback!r}")
    check_label(label)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        inner_state = inner.init(params)
        snapshots = ()
        if rollback:
            # Two copies: a buffer that appears twice cannot be donated.
            older, newer = (
                jax.tree.map(jnp.copy, (params, inner_state)) for _ in range(2)
            )
            snapshots = Snapshots(older, newer, jnp.zeros([], jnp.int32))
        return {
            label: SkipExplosionsState(
                explosions=detector.init(params),
                inner_state=inner_state,
                num_responses=jnp.zeros([2], jnp.int32),
                scale=jnp.ones([], jnp.float32),
                snapshots=snapshots,
            )
        }

    def update(updates, state, params=None, **extra_args):
        state = state[label]
        if rollback and params is None:
            raise ValueError(
                "a rollback is an update from the parameters: call "
                "update(updates, state, params) with params"
            )
        explosions = detector.update(updates, extra_args.get("value"), state.explosions)
        num_in_a_row = count(explosions, "in_a_row")
        is_exploded = num_in_a_row > 0
        is_finite = count(explosions, "nonfinite_in_a_row") == 0
        is_accepted = is_finite & (num_in_a_row >= max_consecutive)
        is_skipped = is_exploded & ~is_accepted
        explosions = detector.judged(
            updates, explosions, state.explosions, is_skipped, is_accepted
        )

        scale = state.scale
        if cool_down is not None:
            # Not for a single explosion, but for one soon after another, and twice for
            # a third in a row. A change of regime that outlasts a rollback was not the
            # fault of the steps: warm up again.
            last = count(state.explosions, "last")
            is_soon = (last >= 0) & (
                count(state.explosions, "steps") - last <= _MAX_GAP
            )
            power = jnp.select(
                [num_in_a_row == n for n in (1, 2, 3)],
                [jnp.where(is_soon, 1.0, 0.0), 1.0, 2.0],
            )
            power = jnp.where(is_skipped, power, 0)
            power = jnp.where(is_accepted & rollback, -3.0, power)
            change = jnp.where(is_exploded, jnp.power(cool_down, power), recovery)
            scale = jnp.clip(scale * change, _LEAST_SCALE, 1).astype(jnp.float32)

        inner_state, snapshots = state.inner_state, state.snapshots
        is_rolled_back = is_skipped & (num_in_a_row == _NUM_UNTIL_ROLLBACK)
        if isinstance(snapshots, Snapshots):
            older, newer, num_quiet = snapshots
            is_due = ~is_exploded & (num_quiet >= snapshot_every - 1)
            done, (inner_state, newer) = _replaced(
                is_rolled_back, (older[1], older), (inner_state, newer)
            )
            done, older = _replaced(is_due | done, newer, older)
            done, newer = _replaced(is_due | done, (params, inner_state), newer)
            is_skipped |= done
            num_quiet = num_quiet + (~is_exploded).astype(jnp.int32)
            num_quiet = jnp.where(is_due | is_rolled_back, 0, num_quiet)
            snapshots = Snapshots(older, newer, num_quiet)
        else:
            is_rolled_back = jnp.zeros_like(is_rolled_back)

        # Without the barrier XLA computes them again in the loop over each leaf.
        is_skipped, is_rolled_back, scale = lax.optimization_barrier(
            (is_skipped, is_rolled_back, scale)
        )
        updates, inner_state = update_or_keep(
            lambda state: inner.update(updates, state, params, **extra_args),
            inner_state,
            is_skipped,
        )

        def respond(u, param=None, snapshot=None):
            if not is_gradient(u):
                return u
            if cool_down is not None:
                u = scaled(u, scale.astype(u.real.dtype))
            after = u if param is None else (param + u).astype(param.dtype)
            u = jnp.where(~is_skipped & jnp.isfinite(after), u, jnp.zeros_like(u))
            if snapshot is None:
                return u
            return jnp.where(is_rolled_back, (snapshot - param).astype(u.dtype), u)

        trees = [updates] if params is None else [updates, params]
        if isinstance(snapshots, Snapshots):
            trees.append(snapshots.older[0])
        updates = jax.tree.map(respond, *trees)
        state = SkipExplosionsState(
            explosions=explosions,
            inner_state=inner_state,
            num_responses=counted(
                state.num_responses, jnp.stack([is_skipped, is_rolled_back])
            ),
            scale=scale,
            snapshots=snapshots,
        )
        return updates, {label: state}

    return optax.GradientTransformationExtraArgs(init, update)


def count(state: DetectExplosionsState, name: str) -> jax.Array:
    """One of the `COUNTS`."""
    return state.counts[..., COUNTS.index(name)]


class Step(NamedTuple):
    """What is known of one step; see `DetectExplosionsState`."""

    step: jax.Array
    leaf: jax.Array
    fired: jax.Array
    norm: jax.Array
    share: jax.Array
    loss: jax.Array
    norm_limit: jax.Array
    share_limit: jax.Array
    loss_limit: jax.Array
    recent: jax.Array
    growth: jax.Array


def read_step(state: DetectExplosionsState, which: str) -> Step:
    """The step "last", "began" or "nonfinite" of a state."""
    row = ("last", "began", "nonfinite").index(which)
    step, numbers = state.steps[row], state.numbers[row]
    norm, share, loss, norm_limit, share_limit, loss_limit = numbers[:6]
    recent = numbers[6:]
    return Step(
        step=step[0],
        leaf=step[1],
        fired=step[2:] > 0,
        norm=norm,
        share=share,
        loss=loss,
        norm_limit=norm_limit,
        share_limit=share_limit,
        loss_limit=loss_limit,
        recent=recent,
        growth=_fitted_growth(recent),
    )


def _fitted_growth(norms):
    """Growth per step: `exp` of the slope of a line fitted to the known logarithms."""
    is_known = norms > 0
    logs = jnp.log(jnp.where(is_known, norms, 1))
    times = jnp.arange(norms.size, dtype=norms.dtype)
    center = jnp.sum(times, where=is_known) / jnp.maximum(jnp.sum(is_known), 1)
    distances = jnp.where(is_known, times - center, 0)
    squares = jnp.sum(jnp.square(distances))
    return jnp.exp(jnp.sum(distances * logs) / jnp.where(squares > 0, squares, 1))


class _Detector:
    """The rules of one transformation, and how their state goes on."""

    def __init__(self, norm, share, loss, specs, stacked):
        self.specs, self.stacked = specs, stacked
        self.limits = [
            None if limit is None else as_limit(limit) for limit in (norm, share, loss)
        ]
        if any(limit is not None and limit.needs_params for limit in self.limits):
            raise ValueError(
                "a rule compares a signal with its past, not with parameters: "
                "limits.params is no limit for it"
            )

    def scopes_of(self, tree):
        return find_scopes(tree, "leaf", specs=self.specs, stacked=self.stacked)

    def init(self, params) -> DetectExplosionsState:
        scopes = self.scopes_of(params)
        norms, _ = jax.eval_shape(lambda: measure_leaves(params, scopes))
        dtype = norms.dtype
        sizes = scopes.sizes().astype(dtype)
        numbers = [0] * 3 + [jnp.inf] * 3 + [0] * NUM_RECENT
        return DetectExplosionsState(
            counts=jnp.asarray([0] * (len(COUNTS) - 1) + [-1], jnp.int32),
            steps=jnp.asarray([[-1, -1] + [0] * len(RULES)] * 3, jnp.int32),
            numbers=jnp.asarray([numbers] * 3, dtype),
            baseline=jnp.zeros((*norms.shape, 2), dtype),
            rule_states=self.rule_states(sizes),
            layout=layout_of(params, "leaf", self.stacked),
        )

    def rule_states(self, sizes):
        sizes = jnp.sum(sizes), sizes, jnp.ones([], sizes.dtype)
        norm, share, loss = (
            () if limit is None else limit.init(size)
            for limit, size in zip(self.limits, sizes, strict=True)
        )
        return norm, share, loss

    def judged(
        self, updates, state, old, is_skipped, is_accepted
    ) -> DetectExplosionsState:
        """The state once it is known what becomes of the step.

        The rules learn nothing from a skipped step: what comes of bad parameters would
        soon look usual. After an accepted explosion they start afresh.
        """
        is_reset = np.array([name == "in_a_row" for name in COUNTS])

        def keep(new, old, fresh):
            return jnp.where(is_accepted, fresh, jnp.where(is_skipped, old, new))

        sizes = self.scopes_of(updates).sizes().astype(state.baseline.dtype)
        fresh = self.rule_states(sizes)
        return state._replace(
            counts=jnp.where(is_accepted & is_reset, 0, state.counts),
            rule_states=jax.tree.map(keep, state.rule_states, old.rule_states, fresh),
        )

    def update(self, updates, value, state) -> DetectExplosionsState:
        dtype = state.baseline.dtype
        norms, norm = (
            saturating_cast(x, dtype)
            for x in measure_leaves(updates, self.scopes_of(updates))
        )
        is_positive = (norm > 0) & (norm < jnp.inf)
        shares = divided(norms, jnp.where(is_positive, norm, 1))
        loss = _loss(value, dtype)
        is_finite = norm < jnp.inf
        # Nothing of a step enters a rule when any of its leaves is not finite.
        signals = norm, jnp.where(is_finite, shares, 0), loss
        if value is not None:
            is_finite &= jnp.isfinite(loss)

        highest, rule_states = [], []
        for limit, signal, rule_state in zip(
            self.limits, signals, state.rule_states, strict=True
        ):
            bound = jnp.full_like(signal, jnp.inf)
            if limit is not None and not (value is None and signal is loss):
                found, rule_state = limit.update(signal, rule_state, None)
                bound = jnp.broadcast_to(found, signal.shape).astype(dtype)
            highest.append(bound)
            rule_states.append(rule_state)
        fired = jnp.stack(
            [~is_finite]
            + [
                jnp.any((x > limit) & (x < jnp.inf))
                for x, limit in zip(signals, highest, strict=True)
            ]
        )

        leaf, baseline = _leading_leaf(norms, state.baseline)
        leaf_share, leaf_limit = (
            x[leaf] if x.size else jnp.zeros([], dtype) for x in (shares, highest[1])
        )
        recent = state.numbers[0, -NUM_RECENT:]
        recent = jnp.where(is_positive, jnp.append(recent[1:], norm), recent)
        step = jnp.concatenate(
            [jnp.stack([count(state, "steps"), leaf]), fired.astype(jnp.int32)]
        )
        numbers = [norm, leaf_share, loss, highest[0], leaf_limit, highest[2]]
        numbers = jnp.concatenate([jnp.stack(numbers), recent])

        is_exploded = jnp.any(fired)
        last = count(state, "last")
        is_first = is_exploded & ((last < 0) | (step[0] - last > _MAX_GAP))
        is_nonfinite_first = ~is_finite & (count(state, "nonfinite_in_a_row") == 0)
        is_told = jnp.stack([jnp.ones([], bool), is_first, is_nonfinite_first])[:, None]
        return DetectExplosionsState(
            counts=_counted(state.counts, fired, is_exploded),
            steps=jnp.where(is_told, step[None], state.steps),
            numbers=jnp.where(is_told, numbers[None], state.numbers),
            baseline=baseline,
            rule_states=(rule_states[0], rule_states[1], rule_states[2]),
            layout=state.layout,
        )


def _loss(value, dtype):
    if value is None:
        return jnp.full([], jnp.nan, dtype)
    value = jnp.asarray(value)
    if value.ndim:
        raise ValueError(
            f"value= must be a single number, the loss, not of shape {value.shape}"
        )
    wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    return saturating_cast(wide, dtype)


def _leading_leaf(norms, baseline):
    """(index of the leaf that led, the next baseline)."""
    mean, num = baseline[:, 0], baseline[:, 1]
    is_known = (norms > 0) & (norms < jnp.inf)
    logs = jnp.log(jnp.where(is_known, norms, 1))
    risen = jnp.where(is_known & (num > 0), logs - mean, -jnp.inf)
    risen = jnp.where(norms < jnp.inf, risen, jnp.inf)  # NaN is not
    leaf = jnp.argmax(risen) if norms.size else jnp.full([], -1)
    rate = jnp.maximum(1 / (num + 1), 1 / _BASELINE_WINDOW)
    learned = [mean + rate * (logs - mean), jnp.minimum(num + 1, _BASELINE_WINDOW)]
    is_learned = is_known & jnp.all(norms < jnp.inf)
    learned = jnp.where(is_learned[:, None], jnp.stack(learned, axis=1), baseline)
    return leaf.astype(jnp.int32), learned


def _counted(counts, fired, is_exploded):
    """The next `COUNTS`."""
    in_a_row = jnp.stack([is_exploded, fired[0]])
    is_counted = jnp.concatenate(
        [jnp.ones([1], bool), fired, is_exploded[None], in_a_row]
    )
    is_reset = np.array([name.endswith("in_a_row") for name in COUNTS[:-1]])
    grown = counted(counts[:-1], is_counted)
    grown = jnp.where(is_reset & ~is_counted, 0, grown)
    last = jnp.where(is_exploded, counts[0], counts[-1])
    return jnp.append(grown, last)


def _replaced(when, new, old):
    """(False, `new` if `when`, else `old`): two trees; costs nothing if not.

    A loop of at most one turn, since a select would read and write all. What reads
    `new`, or takes its place, must depend on the False: XLA then runs it after the
    loop, and need not copy it.
    """

    def body(carry):
        flag, old = carry
        old = jax.tree.map(lambda x, y: jnp.where(flag, x, y), new, old)
        return jnp.zeros_like(flag), old

    return lax.while_loop(lambda carry: carry[0], body, (when, old))
