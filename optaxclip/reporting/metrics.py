"""Reads scalars for dashboards out of optimizer states; `scalars` makes each."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from optaxclip.checks import check_length
from optaxclip.numerics import is_gradient
from optaxclip.reporting.scalars import scalars_of
from optaxclip.reporting.states import (
    find_states,
    params_of,
)
from optaxclip.reporting.zeros import ZEROS, check_zeros, zero_scalars

NUM_SPLIT = 8
"""So many numbers at a time are taken out of an array: XLA compiles a kernel for each,
and a thousand of them for a minute."""


def metrics(
    opt_state: Any,
    params: Any = None,
    *,
    # A choice: 723 leaves then have 62 names on a dashboard.
    top: int | None = 10,
    window: int | None = None,
    zeros: Any = None,
) -> dict[str, jax.Array]:
    """Reads scalars out of every optaxclip state in an optimizer state.

    Each `clip_by_norm` gives, under its label:

    | name | value |
    |---|---|
    | `clip/norm` | the norm before the clip, in the last step; +inf if non-finite |
    | `clip/norm_after` | the norm after it; +inf where the update was non-finite |
    | `clip/limit` | the limit; +inf for none, as in a warm-up |
    | `clip/clipped_fraction` | the share of all steps so far that were clipped |
    | `clip/num_nonfinite` | the number of steps so far with inf or NaN |
    | `clip/top/<rank>/index`, `norm` | of more than `top` scopes, as a `record` below |

    With more than one scope a clip gives the largest of them, and, of up to `top`, each
    scope its own under its name: `clip/norm/rnn/hh/kernel`; per unit, a leaf's largest.
    Groups have the names that `per=` gave them. Ranks are given only where no recorder
    or detector gives its own, so that names are few.

    Each `detect_explosions` and `skip_explosions` gives, under its label:

    | name | value |
    |---|---|
    | `explosions/is_exploded` | 1 if the last step exploded, else 0 |
    | `explosions/num_exploded` | the number of steps so far that did |
    | `explosions/num_exploded/<rule>` | the same for nonfinite, norm, share and loss |
    | `explosions/exploded_fraction` | exploded steps / all steps so far |
    | `explosions/num_in_a_row` | how many steps in a row were bad, up to the last |
    | `explosions/began` | the step on which the last explosion began; -1 for none |
    | `explosions/leading_leaf` | the leaf that led then: its index, -1 for none |
    | `explosions/growth` | factor by which the norm grew per step, in the last 8 |
    | `explosions/norm_limit`, `loss_limit` | the limits in the last step |
    | `explosions/skipped_fraction` | skip only: skipped steps / all steps so far |
    | `explosions/is_skipped` | skip only: 1 if the last step was skipped, else 0 |
    | `explosions/is_rolled_back` | skip only: 1 if it confirmed a rollback, else 0 |
    | `explosions/num_skipped` | skip only: the number of skipped steps |
    | `explosions/gave_up` | skip only: 1 if it gave up, see `skip_explosions` |
    | `explosions/scale` | skip only: the factor of the updates, below 1 to cool down |
    | `explosions/num_rollbacks` | skip only: rollbacks that nothing undid |
    | `explosions/num_mended` | skip only: how often non-finite moments were reset |
    | `explosions/num_blocked_rollbacks` | skip only: rollbacks that something undid |

    A step that exploded is bad unless the loss alone was non-finite, or the share of a
    leaf alone above its limit: such a step is taken.

    Each `record` gives, under its label, and `detect_explosions` and `skip_explosions`
    besides the above:

    | name | value |
    |---|---|
    | `gradients/norm` | the norm of all updates, in the last step |
    | `gradients/norm/<scope>` | the norm of that scope; of up to `top` scopes |
    | `gradients/squared_share/<scope>` | its share of the sum of the squares |
    | `gradients/is_vanished/<scope>` | 1 if at most 1e-6 of all in the whole window |
    | `gradients/ratio`, `gradients/ratio/<leaf>` | the norm / that of the parameters |
    | `gradients/loss` | the loss; +inf if it was not given |
    | `gradients/largest_norm` | the largest finite norm of all updates so far |
    | `gradients/num_nonfinite` | the number of steps so far that were non-finite |
    | `gradients/nonfinite_fraction` | these steps / all steps so far |
    | `gradients/top/<rank>/index` | of more scopes: which one has the rank, from 1 |
    | `gradients/top/<rank>/norm` | its norm; non-finite ones come first |

    and of the last `window` steps:

    | name | value |
    |---|---|
    | `gradients/window/norm_p50`, `_p90`, `_p99` | percentiles of the finite norms |
    | `gradients/window/nonfinite_fraction` | the share of steps that were non-finite |
    | `explosions/window/exploded_fraction` | the share of steps that exploded |
    | `explosions/window/skipped_fraction` | skip only: the share of skipped steps |
    | `gradients/window/spike_score` | OLMo-core's SpikeScore, if 129 steps are kept |

    A spike is a loss or a norm above the mean of the 128 before it by more than 6
    standard deviations, and SpikeScore the share of the steps that are one. 128 steps
    of the record are needed for the first: by default it is over the last 128, and of
    `record(window=10128)` over 10,000, as in OLMo-core.

    `gradients/squared_share` is the largest of them, `gradients/num_vanished` their
    number. Of a rank the squared share is (`gradients/top/<rank>/norm` /
    `gradients/norm`)**2. Ratios are known per leaf, where `params` holds the
    parameters; +inf for one that is zero.

    Outside `jit` it compiles one program for each structure of states and parameters.

    Args:
      opt_state: Any tree: the state of a chain, of `optax.masked`, `partition`,
        `MultiSteps` or `inject_hyperparams`; a Flax `TrainState` or `nnx.Optimizer`.
        May hold several runs, as `jax.vmap` stacks them.
      params: The parameters, a `TrainState`, or any tree of their structure: names the
        leaves; without it they are numbered. Ratios read them once, and of several runs
        need those of each, stacked alike.
      top: With more scopes than `top`, metrics are named by rank, so that their names
        are few and stay the same: `leaf_names(params)[index]` is the leaf. None for a
        name for each scope. `record(top=k)` always gives ranks, at most k.
      window: The last steps that are summed up; None for all that are kept.
      zeros: A tree of arrays, such as the gradients of this step: also gives the share
        of exact zeros in it, `zeros/fraction`, and in its leaves, as above.

    Returns:
      `{name: scalar}`, inside or outside `jit`; of several runs `{name: [runs]}`; empty
      if there is nothing to report.

    Raises:
      ValueError: If two transformations have the same label, if `params` does not fit
        the state, if `top` or `window` is out of range, or if a checkpoint without a
        template has made a state a dictionary.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> tx = optax.chain(optaxclip.clip_by_norm(1.0), optax.adam(1e-3))
      >>> _, opt_state = tx.update(params, tx.init(params), params)
      >>> found = optaxclip.metrics(opt_state)
      >>> print(found["clip/norm"], found["clip/clipped_fraction"])
      5.0 1.0
    """
    # What is not read is not passed: arguments of a program cost microseconds each.
    states = {label: x.read_by_metrics for label, x in find_states(opt_state).items()}
    top = sys.maxsize if top is None else check_length("top", top, 0)
    if window is not None:
        window = check_length("window", window, 1)
    check_zeros(zeros)
    if zeros is not None and ZEROS in states:
        raise ValueError(f"a state has the label {ZEROS!r}, that of zeros=")
    # What is no array, such as a function, no program takes.
    zeros = jax.tree.map(lambda x: x if is_gradient(x) else 0, zeros)
    leaves, structure = jax.tree.flatten(params_of(params))
    structure = None if params is None else structure
    if not all(isinstance(x, jax.Array | np.ndarray) for x in leaves):
        leaves = []
    # Inside `jit` the caller compiles; a program within it would be one more.
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((states, leaves, zeros))):
        found = _all_scalars(states, leaves, zeros, structure, top, window)
        return {
            name: value
            for names, values in found
            for name, value in zip(names, jnp.unstack(values, axis=-1), strict=True)
        }
    # Outside, one program makes few arrays: hundreds of scalars would each cost a call.
    packed = _pack(states, leaves, zeros, structure=structure, top=top, window=window)
    values = [
        [x for i in range(block.shape[-2]) for x in _split(block, i)]
        for block in packed.blocks
    ]
    return {name: values[block][place] for name, block, place in packed.places}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks"],
    meta_fields=["places"],
)
@dataclasses.dataclass(frozen=True)
class _Packed:
    blocks: list[jax.Array]
    """`[..., num_rows, NUM_SPLIT]`, one for each dtype."""
    places: tuple[tuple[str, int, int], ...]
    """(name, block, place in the block) of each number."""


def _all_scalars(states, leaves, zeros, structure, top, window):
    """What `scalars_of` and `zero_scalars` give."""
    found = scalars_of(states, leaves, structure, top, window)
    return found if zeros is None else [*found, *zero_scalars(zeros, top)]


@functools.partial(jax.jit, static_argnames=("structure", "top", "window"))
def _pack(states, leaves, zeros, *, structure, top, window):
    """All scalars in few arrays, compiled once for each structure."""
    found: dict[Any, list[jax.Array]] = {}
    places = []
    for names, values in _all_scalars(states, leaves, zeros, structure, top, window):
        parts = found.setdefault((values.dtype, values.shape[:-1]), [])
        block = list(found).index((values.dtype, values.shape[:-1]))
        place = sum(x.shape[-1] for x in parts)
        places += [(name, block, place + i) for i, name in enumerate(names)]
        parts.append(values)
    blocks = []
    for (_, runs), parts in found.items():
        block = jnp.concatenate(parts, axis=-1)
        padding = [(0, 0)] * len(runs) + [(0, -block.shape[-1] % NUM_SPLIT)]
        blocks.append(jnp.pad(block, padding).reshape(*runs, -1, NUM_SPLIT))
    return _Packed(blocks, tuple(places))


@jax.jit
def _split(block: jax.Array, row: jax.Array) -> list[jax.Array]:
    """The numbers of one row, `[...]` each."""
    values = lax.dynamic_index_in_dim(block, row, axis=-2, keepdims=False)
    return list(jnp.unstack(values, axis=-1))
