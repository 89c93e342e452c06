"""How to notice an explosion, and to say where and when it began."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip import limits
from optaxclip.checks import check_label
from optaxclip.clipping import counted
from optaxclip.limits import LimitLike, as_limit
from optaxclip.norms import divided, measure_leaves, saturating_cast, total_of
from optaxclip.recording import WINDOW, RecordState, empty, loss_of, pushed
from optaxclip.scopes import Stacked, find_scopes, layout_of

RULES = ("nonfinite", "norm", "share", "loss")
COUNTS = ("steps", *RULES, "exploded", "in_a_row", "nonfinite_in_a_row", "last")
"""What each element of `DetectExplosionsState.record.counts` is."""
NUM_FITTED = 8
"""To the norms of so many steps the growth is fitted."""

NORM_LIMIT = limits.log_quantile()
SHARE_LIMIT = limits.drift()
LOSS_LIMIT = limits.minimum(limits.log_quantile(2.4, min_ratio=1.7), limits.initial())

MAX_GAP = 10
"""An explosion within so many steps of the last belongs to the same one."""

# Of the moving average against which the leaf that led has grown most.
_BASELINE_WINDOW = 64


class DetectExplosionsState(NamedTuple):
    """State of `detect_explosions`, as `{label: DetectExplosionsState}`.

    Few arrays, since each of them costs a small step some microseconds; `metrics` and
    `raise_if_exploded` name what they hold. "float" is float32, float64 if a parameter
    is.
    """

    steps: jax.Array
    """int32 `[3, 6]`: three steps, which are the last, the one on which the last
    explosion began (after ten without one), and the first of the last non-finite ones
    in a row. Of each its index (-1 for none), the leaf that led (the first that was
    not finite, or else the one that had grown most against its moving average; -1 for
    none), and whether each of the four rules fired."""
    numbers: jax.Array
    """float `[3, 6]`: of the same three steps the norm, the share of the leaf that led
    and the loss (NaN where not given), and the limits of these (+inf for none)."""
    baseline: jax.Array
    """float `[num_leaves, 2]`: moving average of the logarithm of each leaf's norm, and
    the number of norms in it, up to 64."""
    rule_states: tuple[Any, Any, Any]
    """States of the limits on norm, share and loss."""
    record: RecordState
    """Of the last 256 steps, per leaf. Its `counts`, int32 `[9]`: the number of steps;
    on how many of them the four rules fired (not finite, norm, share, loss) and on how
    many any; how many in a row, up to the last step, exploded and were not finite; and
    the last that exploded, -1 for none."""


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
      loss: Limit on the loss, likewise. By default `limits.minimum` of
        `limits.log_quantile(2.4, min_ratio=1.7)` and `limits.initial()`, for a loss >
        0; for one that may be negative take `limits.window_sigma(6)`.
      specs: As in `clip_by_norm`; inside `jax.shard_map`, `value` must have been
        reduced over the devices.
      stacked: As in `clip_by_norm`.
      label: Under which name the state and the metrics appear.

    Returns:
      The transformation, with the state `{label: DetectExplosionsState}`: under 3 KiB
      and 28 bytes a leaf; and the record of 256 steps for `history`, 3 KiB and 1 KiB a
      leaf.

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
    detector = Detector(norm, share, loss, specs, stacked)
    check_label(label)

    def init(params):
        return {label: detector.init(params)}

    def update(updates, state, params=None, **extra_args):
        del params
        value = extra_args.get("value")
        state, _ = detector.update(updates, value, state[label])
        return updates, {label: state}

    return optax.GradientTransformationExtraArgs(init, update)


def count(state: DetectExplosionsState, name: str) -> jax.Array:
    """One of the `COUNTS`."""
    return state.record.counts[..., COUNTS.index(name)]


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


def read_step(state: DetectExplosionsState, which: str) -> Step:
    """The step "last", "began" or "nonfinite" of a state."""
    row = ("last", "began", "nonfinite").index(which)
    step, numbers = state.steps[row], state.numbers[row]
    norm, share, loss, norm_limit, share_limit, loss_limit = numbers
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
    )


def fitted_growth(record: RecordState) -> jax.Array:
    """Growth of the norm per step in the last eight, as far as they are finite.

    `exp` of the slope of a line fitted to the logarithms.
    """
    steps = record.counts[0] - NUM_FITTED + jnp.arange(NUM_FITTED)
    norms = jax.vmap(total_of)(record.norms[steps % len(record.norms)])
    is_known = (norms > 0) & (norms < jnp.inf)  # 0 in rows without a step yet
    logs = jnp.log(jnp.where(is_known, norms, 1))
    times = jnp.arange(norms.size, dtype=norms.dtype)
    center = jnp.sum(times, where=is_known) / jnp.maximum(jnp.sum(is_known), 1)
    distances = jnp.where(is_known, times - center, 0)
    squares = jnp.sum(jnp.square(distances))
    return jnp.exp(jnp.sum(distances * logs) / jnp.where(squares > 0, squares, 1))


class Detector:
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

    def _scopes(self, tree):
        return find_scopes(tree, "leaf", specs=self.specs, stacked=self.stacked)

    def init(self, params) -> DetectExplosionsState:
        """The state before the first step."""
        scopes = self._scopes(params)
        norms, _ = jax.eval_shape(lambda: measure_leaves(params, scopes))
        dtype = norms.dtype
        sizes = scopes.sizes().astype(dtype)
        numbers = [0] * 3 + [jnp.inf] * 3
        counts = jnp.asarray([0] * (len(COUNTS) - 1) + [-1], jnp.int32)
        layout = layout_of(params, "leaf", self.stacked)
        return DetectExplosionsState(
            steps=jnp.asarray([[-1, -1] + [0] * len(RULES)] * 3, jnp.int32),
            numbers=jnp.asarray([numbers] * 3, dtype),
            baseline=jnp.zeros((*norms.shape, 2), dtype),
            rule_states=self._rule_states(sizes),
            record=empty(norms.size, WINDOW, counts, layout),
        )

    def _rule_states(self, sizes):
        sizes = jnp.sum(sizes), sizes, jnp.ones([], sizes.dtype)
        norm, share, loss = (
            () if limit is None else limit.init(size)
            for limit, size in zip(self.limits, sizes, strict=True)
        )
        return norm, share, loss

    def update(
        self, updates, value, state
    ) -> tuple[DetectExplosionsState, tuple[jax.Array, jax.Array]]:
        """The state after a step that is taken; the norm and its limit."""
        dtype = state.baseline.dtype
        norms, norm = (
            saturating_cast(x, dtype)
            for x in measure_leaves(updates, self._scopes(updates))
        )
        is_positive = (norm > 0) & (norm < jnp.inf)
        shares = divided(norms, jnp.where(is_positive, norm, 1))
        loss = loss_of(value, dtype)
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
        flags = [~is_finite] + [
            jnp.any((x > limit) & (x < jnp.inf))
            for x, limit in zip(signals, highest, strict=True)
        ]
        fired = jnp.stack(flags)

        leaf, baseline = _leading_leaf(norms, norm, state.baseline)
        leaf_share, leaf_limit = (
            x[leaf] if x.size else jnp.zeros([], dtype) for x in (shares, highest[1])
        )
        step = jnp.concatenate(
            [jnp.stack([count(state, "steps"), leaf]), fired.astype(jnp.int32)]
        )
        numbers = [norm, leaf_share, loss, highest[0], leaf_limit, highest[2]]
        numbers = jnp.stack(numbers)

        is_exploded = jnp.any(fired)
        last = count(state, "last")
        is_first = is_exploded & ((last < 0) | (step[0] - last > MAX_GAP))
        is_nonfinite_first = ~is_finite & (count(state, "nonfinite_in_a_row") == 0)
        row = lax.broadcasted_iota(jnp.int32, (3, 1), 0)
        is_told = (row == 0) | is_first & (row == 1) | is_nonfinite_first & (row == 2)
        state = DetectExplosionsState(
            steps=jnp.where(is_told, step[None], state.steps),
            numbers=jnp.where(is_told, numbers[None], state.numbers),
            baseline=baseline,
            rule_states=(rule_states[0], rule_states[1], rule_states[2]),
            record=pushed(
                state.record,
                [loss, highest[0], *flags],
                norms,
                norm,
                _counted(state.record.counts, fired, is_exploded),
            ),
        )
        return state, (norm, highest[0])


def _leading_leaf(norms, norm, baseline):
    """(index of the leaf that led, the next baseline)."""
    mean, num = baseline[:, 0], baseline[:, 1]
    is_known = (norms > 0) & (norms < jnp.inf)
    logs = jnp.log(jnp.where(is_known, norms, 1))
    risen = jnp.where(is_known & (num > 0), logs - mean, -jnp.inf)
    risen = jnp.where(norms < jnp.inf, risen, jnp.inf)  # NaN is not
    leaf = jnp.full([], -1)
    if norms.size:
        leaf = jnp.argmax(risen)
        leaf = jnp.where(risen[leaf] > -jnp.inf, leaf, -1)
    rate = jnp.maximum(1 / (num + 1), 1 / _BASELINE_WINDOW)
    learned = [mean + rate * (logs - mean), jnp.minimum(num + 1, _BASELINE_WINDOW)]
    is_learned = is_known & (norm < jnp.inf)
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
