"""How large may an update be: limits on norms, fixed or learned from the run.

A limit is the largest norm that a scope may have in one step. Wherever the package
takes a limit, it takes a number, an Optax schedule, or an object of this module.

```python
>>> import jax, jax.numpy as jnp, optax, optaxclip
>>> fixed = optaxclip.clip_by_norm(1.0)
>>> scheduled = optaxclip.clip_by_norm(optax.linear_schedule(10.0, 1.0, 1000))
>>> learned = optaxclip.clip_by_norm(optaxclip.limits.zscore(2.5))

```

A fixed threshold has to be guessed, and the right one changes during training. A
learned limit takes its threshold from the run. It works under `jit`, per tree, leaf or
group, but not per unit. Its state is a few arrays, so a checkpoint holds all of it.

## Limits to clip with

| limit | largest norm | learns | named clip |
|---|---|---|---|
| `constant(1.0)` | that number | no | `clip_by_norm(1.0)` |
| `schedule(f)` | `f(number of steps so far)` | no | `clip_by_norm(f)` |
| `params(0.01)` | 0.01 of the norm of the parameters | no | `agc()`, per unit |
| `rms(1)` | a root mean square of 1 | no | `block_rms()`, per leaf |
| `zscore(2.5)` | 2.5 standard deviations above the mean | yes | `zclip()` |
| `percentile(10)` | 10th percentile of the last 1024 norms | yes | `autoclip()` |
| `ema(1.05)` | 1.05 times the mean of the clipped norms | yes | `adagc()`, per leaf |
| `window_sigma(3)` | 3 deviations above the mean | yes | `clip_by_historical_norm()` |
| `quantile(0.5)` | follows the median with one number | yes | |
| `mean_over_rms()` | mean / RMS of the norms | yes | `gradient_stabilizer()` |
| `minimum(a, b)` | the smaller of two limits | if a or b does | |
| `maximum(a, b)` | the larger of two limits | if a or b does | |
| `with_global(a, b)` | a for each scope, b for all together | if a or b does | |

The means of `zscore` and `ema` are moving averages. `window_sigma` takes the last 128
norms.

* With `zscore`, the larger an outlier, the stricter its limit, which is nearer to the
  mean.
* `percentile(10)` clips about 90 % of all steps, by design.
* `mean_over_rms` is a norm to aim at, for `clip_by_norm(..., respond="set")`.
* `with_global` clips each scope. If their global norm is then still above the second
  limit, it scales all of them down together. It reads the updates once.
* `adagc` has a global limit of 1.0 for its first 99 steps.

```python
>>> tx = optax.chain(optaxclip.zclip(), optax.adam(1e-3))
>>> tx = optax.chain(
...     optaxclip.clip_by_norm(optaxclip.limits.zscore(3.0), per="leaf"),
...     optax.adam(1e-3),
... )
>>> capped = optaxclip.limits.minimum(optaxclip.limits.zscore(), 1.0)

```

`examples/studies/compare_limits.py` compares seven clips at a learning rate at which
training without one diverges.

## Limits to detect explosions with

`detect_explosions`, `skip_explosions` and `stabilize` take the same limits, for the
norm, the share of a leaf in it, and the loss. Only `params` cannot detect, because a
rule compares a signal with its own past.

| limit | signal exceeds it when it is | meant for |
|---|---|---|
| `100.0` | above that number | any signal |
| `log_quantile()` | far above the median, in units of the spread | norm, loss |
| `sustained_rise()` | 3 steps in a row above 5 times its slow moving average | share |
| `above_lowest()` | 8 steps in a row above 8 times its lowest average | loss |
| `fraction_of_start()` | above 1/1000 of its first values | a floor, in `maximum` |
| `window_sigma(6)` | 6 standard deviations above the mean | norm, loss |

The spread of `log_quantile` is the distance of the 95th percentile of the last 128
values from their median, on a logarithmic scale. A loss may have either sign: if one of
the values is negative, the scale is linear. The default rules use `log_quantile`,
`sustained_rise`, `above_lowest` and `fraction_of_start`; `help(optaxclip.explosions)`
says for which signal.

## Sources

* `params`: AGC, [2102.06171](https://arxiv.org/abs/2102.06171); per leaf as in LARS.
* `rms`: Adafactor, [1804.04235](https://arxiv.org/abs/1804.04235).
* `zscore`: ZClip, [2504.02507](https://arxiv.org/abs/2504.02507).
* `percentile`: AutoClip, [2007.14469](https://arxiv.org/abs/2007.14469).
* `ema`: AdaGC, [2502.11034](https://arxiv.org/abs/2502.11034). axlearn skips at 20
  times the mean.
* `mean_over_rms`: GradientStabilizer, [2502.17055](https://arxiv.org/abs/2502.17055).
* `window_sigma`: Levanter, which clips at 3; OLMo-core, which skips at 6.
* `quantile`: Andrew et al., [1905.03871](https://arxiv.org/abs/1905.03871), for clients
  in federated learning; TensorFlow Federated and Opacus.
* `log_quantile`, `sustained_rise`, `above_lowest`, `fraction_of_start`: this project,
  for detecting explosions.

The docstring of each named method says where it differs from the published code. Nearly
all of that code breaks at the first NaN.

## What every learned limit has in common

* It works per tree, leaf or group. Per unit, `init` raises `ValueError`.
* Norms that are inf, NaN or zero never update its state.
* It follows a lasting change within a number of steps that its docstring gives. AdaGC
  as published is slow: it takes 2300 steps to follow a rise by a factor of 10.
* While it knows too few norms it is +inf. The exceptions are `quantile`, which starts
  at `initial_norm`, and `ema`, which limits all scopes together to `max_warmup_norm`.
* A length (`warmup`, `window`, `patience`) is an `int` below 2**30.

## A limit to change by hand

`optax.inject_hyperparams` puts the limit into the state. Name in `static_args` each
argument that is not a number, because Optax takes a function for a schedule. Also name
`ord`, `unit_axis`, and the lengths `warmup` and `window` of learned limits.

```python
>>> static = "per", "ord", "where", "unit_axis", "specs", "stacked", "label"
>>> make = optax.inject_hyperparams(optaxclip.clip_by_norm, static_args=static)
>>> tx = make(max_norm=1.0)
>>> grads = {"w": jnp.array([3.0, 4.0])}
>>> state = tx.init(grads)
>>> state.hyperparams["max_norm"] = jnp.array(0.5)
>>> updates, state = tx.update(grads, state)
>>> print(optaxclip.global_norm(updates).round(3))
0.5

```

A limit set by hand cannot raise an error during training. If it is negative or NaN,
the updates become zeros.

## Write your own limit

A limit is two functions. `init` sees the number of elements of each scope. `update`
sees the norms of all scopes before the clip, and returns the largest that each may
have. This one allows `multiple` times the median of the last three norms. It works per
tree, leaf or group, under `jit` and `vmap`.

```python
>>> from typing import NamedTuple
>>> class State(NamedTuple):
...     recent: jax.Array  # the last three norms [..., 3]; +inf where there is none
>>> def median_of_three(multiple):
...     def init(sizes):
...         return State(jnp.full((*sizes.shape, 3), jnp.inf, sizes.dtype))
...     def update(norms, state, param_norms):
...         # The median of three is +inf until two are known: no limit before.
...         limits = multiple * jnp.median(state.recent, axis=-1)
...         recent = jnp.concatenate(
...             [state.recent[..., 1:], norms[..., None]], axis=-1
...         )
...         # Norms that are non-finite or zero never update a limit's state.
...         is_known = (jnp.isfinite(norms) & (norms > 0))[..., None]
...         return limits, State(jnp.where(is_known, recent, state.recent))
...     return optaxclip.limits.Limit(init, update)
>>> tx = optaxclip.clip_by_norm(median_of_three(2.0), per="leaf")
>>> state = tx.init({"a": jnp.ones(1), "b": jnp.ones(1)})
>>> for a, b in [(3.0, 4.0), (2.0, jnp.inf), (4.0, 4.0), (100.0, 100.0)]:
...     grads = {"a": jnp.array([a]), "b": jnp.array([b])}
...     updates, state = tx.update(grads, state)
>>> print(state["clip"].norm, state["clip"].limit)
[100. 100.] [6. 8.]

```

A limit with a lower bound as well returns a `Band`, and sets `is_band=True`. A limit
that compares with the parameters sets `needs_params=True`, and then gets their norms as
`param_norms`. A limit that is given to a rule on the loss sees the loss instead of the
norm, and a loss may be negative.

`as_limit` turns a number, a schedule or a `Limit` into a `Limit`; `LimitLike` is the
type of its argument.

To add one to this package, follow "Add a limit" in `.github/CONTRIBUTING.md`.
"""

from optaxclip.limits.averages import (
    EmaState,
    QuantileState,
    ZScoreState,
    ema,
    quantile,
    zscore,
)
from optaxclip.limits.fixed import (
    RmsState,
    maximum,
    minimum,
    params,
    rms,
    with_global,
)
from optaxclip.limits.limit import (
    Band,
    Limit,
    LimitLike,
    ScheduleState,
    as_limit,
    constant,
    schedule,
)
from optaxclip.limits.persistent import (
    LowestState,
    StartState,
    SustainedRiseState,
    above_lowest,
    fraction_of_start,
    sustained_rise,
)
from optaxclip.limits.targets import (
    EmaBandState,
    MeanOverRmsState,
    mean_over_rms,
)
from optaxclip.limits.windowed import (
    PercentileState,
    WindowSigmaState,
    log_quantile,
    percentile,
    window_sigma,
)

# In the order of the tables above, which is that of the site.
__all__ = [  # noqa: RUF022
    "constant",
    "schedule",
    "params",
    "rms",
    "zscore",
    "percentile",
    "ema",
    "window_sigma",
    "quantile",
    "mean_over_rms",
    "minimum",
    "maximum",
    "with_global",
    "log_quantile",
    "sustained_rise",
    "above_lowest",
    "fraction_of_start",
    "Limit",
    "LimitLike",
    "Band",
    "as_limit",
    "EmaBandState",
    "EmaState",
    "LowestState",
    "MeanOverRmsState",
    "PercentileState",
    "QuantileState",
    "RmsState",
    "ScheduleState",
    "StartState",
    "SustainedRiseState",
    "WindowSigmaState",
    "ZScoreState",
]
