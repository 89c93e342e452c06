"""Gradient clipping and explosion handling for JAX and Optax.

optaxclip keeps the training of neural networks stable. It clips gradients by value and
by norm, notices exploding gradients before they ruin a run, skips their steps, and
remembers what happened. Its norms are exact for every finite gradient, in any
precision, and cost one read of the gradients for `ord` 1 and 2. Everything is an
`optax.GradientTransformation` that runs under `jit`, `vmap`, `lax.scan` and
`shard_map`, on CPU, GPU or TPU.

## Quickstart

```python
>>> import jax, jax.numpy as jnp, optax, optaxclip
>>> tx = optaxclip.stabilize(optax.adam(1e-3))
>>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
>>> opt_state = tx.init(params)
>>> @jax.jit
... def step(params, opt_state, x):
...     loss_of = lambda p: jnp.sum((x @ p["w"] + p["b"]) ** 2)
...     loss, grads = jax.value_and_grad(loss_of)(params)
...     updates, opt_state = tx.update(grads, opt_state, params, value=loss)
...     return optax.apply_updates(params, updates), opt_state
>>> for x in [jnp.ones((4, 3)), jnp.nan * jnp.ones((4, 3))]:
...     params, opt_state = step(params, opt_state, x)
...     optaxclip.raise_if_exploded(opt_state, params)  # silent: the step was skipped
>>> metrics = optaxclip.metrics(opt_state)
>>> print(metrics["explosions/skipped_fraction"], jnp.isfinite(params["w"]).all())
0.5 True

```

`stabilize` skips steps whose loss or gradient norm is an outlier for this run; if only
the norm is one, it clips them. If the explosion persists and earlier parameters are
better, it rolls the parameters back to a snapshot and temporarily reduces the updates.
A clip is one line:
`optax.chain(optaxclip.clip_by_norm(1.0), optax.adam(1e-3))`.

## Which one do I want?

| situation | use |
|---|---|
| The run must survive, and I know no threshold. | `stabilize(optimizer)` |
| I want to know when a run became NaN, and where. | `detect_explosions()` |
| I want to skip bad steps, and nothing else. | `skip_explosions(optimizer)` |
| I know how large the gradients may be. | `clip_by_norm(1.0)`, or a schedule |
| I do not know how large they may be. | `zclip()`, `autoclip()`, `adagc()` |
| Each layer needs a limit of its own. | `clip_by_norm(1.0, per="leaf")`, `agc()` |
| Single elements are too large. | `clip_by_value(1.0)`, `spam()` |
| I want to see what happened. | `record("gradients")`, `metrics`, `explain`, `plot` |

`help(optaxclip.clipping)` has more: gradients that get too small, layers and experts
stacked in one array, Muon, spectral norms, QK-clip.

`stabilize` keeps two copies of the parameters; `rollback="host"` keeps them in the
memory of the host. `raise_if_exploded(opt_state, params)` in the loop ends a run that
cannot go on. Use `skip_explosions` instead of `optax.apply_if_finite`, which in the end
applies the NaN. Batch statistics, moving averages and other state beside the parameters
need one line after the update: `new = keep(opt_state, new, old)`.

## Common arguments

These arguments mean the same in every function that has them:

| argument | meaning |
|---|---|
| `per` | what one norm is taken over: `"tree"`, `"leaf"`, `"unit"`, or a function |
| `ord` | order of the norm: a number >= 1, or `math.inf`; 2 by default |
| `specs` | inside `jax.shard_map`, the `PartitionSpec`s of the parameters |
| `stacked` | a function: how many leading axes of a leaf run over layers; True is 1 |
| `where` | a function: True for the names of the leaves to measure and clip |
| `columns` | names of your own numbers to record, for example "batch" |
| `label` | the name of the state, `{label: state}`, and of its metrics; not empty |
| `value` | of `update`: the loss, a real number, reduced over the devices |
| `tag` | of `update`: `{name: number}` for all `columns`; more names are allowed |

`help(optaxclip.norms)` explains `per`, `ord` and `stacked`; `specs` is below. `where`
is an argument of all clips but `clip_by_value` and `scale_params`; norms, detectors and
recorders take all leaves. The default label is `"clip"`, `"explosions"` or
`"gradients"`. Two transformations in one chain need different labels.

Errors come as early as possible:

| when | what is wrong | error |
|---|---|---|
| the call of a function | an argument of the wrong type | `TypeError` |
| | an argument out of range | `ValueError` |
| `init` | a learned limit, such as `limits.zscore`, per unit | `ValueError` |
| `update` | leaves or a state that `init` did not make | `ValueError` |
| | a loss with axes | `ValueError` |
| | a complex loss, or `loss=` for `value=` | `TypeError` |
| | `columns` without a `tag` | `TypeError` |
| | a `tag` that lacks one of the `columns` | `ValueError` |

## Guides

| help on | about |
|---|---|
| `optaxclip.norms` | what a norm is taken over, names, what is exact |
| `optaxclip.limits` | fixed, scheduled and learned limits; one of your own |
| `optaxclip.clipping` | edge cases; coming from elsewhere; partitions; stacked layers |
| `optaxclip.explosions` | what counts as one, what happens then, what it cannot do |
| `optaxclip.recording` | the flight recorder |
| `optaxclip.reporting` | metrics, history, reports, pictures, the rest of the state |
| `optaxclip.trainers` | recipes for Flax, Equinox, loops that are not yours, GANs |
| `optaxclip.tracking` | checkpoints, and a line for each tracker |

## Many devices

There is one norm, one decision and one state, however the arrays are sharded. Under
`jit`, sharded arrays need no configuration. Norms are global, a step is skipped by all
devices or by none, and all devices hold the same state of limits, rules and recorders.
Norms per unit are sharded as the units are. Snapshots are sharded as the parameters.

### Inside shard_map

Inside `jax.shard_map` a transformation sees local shards. Every transformation that
measures takes `specs=`, the `PartitionSpec`s of the parameters: a tree, or a prefix of
it, with `P()` for replicated leaves. Reduce the loss over the devices before you give
it.

```python
>>> import jax, jax.numpy as jnp, numpy as np, optaxclip
>>> from jax.sharding import Mesh, PartitionSpec as P
>>> mesh = Mesh(np.array(jax.devices()), ("x",))
>>> specs = {"bias": P(), "kernel": P("x")}
>>> clip = optaxclip.clip_by_norm(1.0, specs=specs)
>>> @jax.jit
... @jax.shard_map(mesh=mesh, in_specs=(specs,), out_specs=specs)
... def clipped(grads):
...     updates, _ = clip.update(grads, clip.init(grads))
...     return updates
>>> grads = {"bias": jnp.ones(4), "kernel": jnp.ones((mesh.size, 2))}
>>> print(optaxclip.global_norm(clipped(grads)).round(6))
1.0

```

### Every layout

Each transformation and each limit gives the same updates and the same state on eight
devices as on one, over 16 steps with spikes, NaN and a rollback. Integers are equal,
and floats differ by a few roundings (1e-6). `pytest -m "" tests/laws/test_layouts.py`
compares them, and counts the all-reduces under `jit` and in `shard_map`. The table
leaves out the all-reduce of the gradients.

| layout | `jit`, both kinds of axes | `shard_map` | extra all-reduces |
|---|---|---|---|
| data-parallel | equal | equal | 0 |
| tensor-parallel | equal | equal | 1 |
| FSDP | equal | equal | 1 |
| 2 x 2 x 2, mixed | equal | equal | 3 (5 under `jit` by JAX 0.10) |

The two kinds of axes are `Auto` and `Explicit`. `shard_map` is compared with
`check_vma` and without.

* Each set of mesh axes that leaves are sharded over costs one all-reduce, for the norms
  of all these leaves together. No leaf is gathered, but by `clip_by_spectral_norm`: it
  needs the whole matrix, and its results are equal to 1e-4. Of stacked layers or
  experts on several devices one number each is gathered.
* With two norms it costs two: with `ord=3`, and with `skip_explosions` around a clip.
* Where units are sharded, each norm takes one more. `agc` has two norms.

### Hosts and checkpoints

On several hosts every process runs the same program. With replicated parameters each
process holds the whole state.

* `jax.device_get(opt_state)` then needs no communication. One process may log `metrics`
  and `explain` of what it returns.
* Call `raise_if_exploded(opt_state, params)` in all processes: it raises in all.
* A checkpoint of parameters and `opt_state` holds all that limits and recorders have
  learned. Restore it with `tx.init(params)` as its template.

`tests/examples/test_data_parallel.py` kills one of two processes and starts both again.
They end bit-identical to an uninterrupted run. `examples/data_parallel.py` does all of
this, and goes back to an earlier checkpoint where a rollback does not help.

## Versions of JAX

| before JAX | what is missing or worse |
|---|---|
| 0.7.2 | everything: optaxclip needs this version or later |
| 0.10 | `rollback="host"` is missing |
| 0.10.2, CPU | a clip stores a float32 copy of the gradients, `stabilize` two |
| 0.10.2, CPU | the norm of 10 million equal numbers is off by up to 5e-6 |
"""

from optaxclip import (
    clipping,
    explosions,
    limits,
    norms,
    recording,
    reporting,
    tracking,
    trainers,
)
from optaxclip.clipping import (
    ClipByNormState,
    ClipByValueState,
    SpamState,
    adagc,
    agc,
    aggc,
    autoclip,
    block_rms,
    clip_by_historical_norm,
    clip_by_norm,
    clip_by_spectral_norm,
    clip_by_value,
    gradient_stabilizer,
    scale_params,
    spam,
    stable_adam,
    zclip,
)
from optaxclip.explosions import (
    DetectExplosionsState,
    SkipExplosionsState,
    detect_explosions,
    skip_explosions,
    stabilize,
)
from optaxclip.norms import (
    global_norm,
    group_names,
    group_norms,
    leaf_names,
    leaf_norms,
    unit_norms,
)
from optaxclip.recording import RecordState, record
from optaxclip.reporting import (
    ExplosionError,
    History,
    explain,
    history,
    keep,
    leading_leaf,
    metrics,
    plot,
    raise_if_exploded,
    skipped_steps,
    taken,
)

# By idea, which is the order of the site.
__all__ = [  # noqa: RUF022
    "limits",
    "clipping",
    "explosions",
    "norms",
    "recording",
    "reporting",
    "trainers",
    "tracking",
    "stabilize",
    "skip_explosions",
    "detect_explosions",
    "clip_by_norm",
    "clip_by_value",
    "zclip",
    "autoclip",
    "adagc",
    "agc",
    "aggc",
    "block_rms",
    "gradient_stabilizer",
    "clip_by_historical_norm",
    "spam",
    "stable_adam",
    "clip_by_spectral_norm",
    "scale_params",
    "global_norm",
    "leaf_norms",
    "unit_norms",
    "group_norms",
    "leaf_names",
    "group_names",
    "record",
    "metrics",
    "history",
    "explain",
    "plot",
    "leading_leaf",
    "skipped_steps",
    "raise_if_exploded",
    "taken",
    "keep",
    "History",
    "ExplosionError",
    "ClipByNormState",
    "ClipByValueState",
    "SpamState",
    "DetectExplosionsState",
    "SkipExplosionsState",
    "RecordState",
]

__version__ = "0.1.0"
