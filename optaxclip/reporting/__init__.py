"""What happened in a run: metrics for dashboards, history, reports in words, pictures.

| function | gives | call it |
|---|---|---|
| `metrics` | a flat dictionary of scalars | every step, in `jit` or not |
| `history` | the recorded steps as NumPy arrays | at the end, or after a crash |
| `explain` | a report in words | at the end, or after a crash |
| `plot` | a picture | at the end, after a crash, or as it goes |
| `raise_if_exploded` | an `ExplosionError` | every few steps, outside `jit` |
| `leading_leaf` | the name of the leading leaf of the last explosion | outside `jit` |
| `skipped_steps` | which steps were skipped, for the data loader | outside `jit` |
| `taken` | whether the last step was applied | every step, in `jit` or not |
| `keep` | new state if the step was applied, else old | every step, in `jit` or not |

Each function finds the states of this package in any optimizer state. `params` gives
the leaves their names; without it they are numbered.

```python
>>> import json, jax, jax.numpy as jnp, optax, optaxclip
>>> tx = optax.chain(optaxclip.record("gradients"), optaxclip.clip_by_norm(1.0))
>>> params = {"w": jnp.ones(2), "b": jnp.ones(1)}
>>> opt_state, update = tx.init(params), jax.jit(tx.update)
>>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
>>> _, opt_state = update(grads, opt_state, params, value=jnp.array(0.5))
>>> metrics = optaxclip.metrics(opt_state, params)
>>> names = ["clip/norm", "clip/norm_after", "clip/clipped_fraction"]
>>> for name in [*names, "gradients/norm/b"]:
...     print(name, metrics[name])
clip/norm 5.0
clip/norm_after 1.0
clip/clipped_fraction 1.0
gradients/norm/b 4.0

```

## Which steps were skipped

`skipped_steps(opt_state)` lists the last 64, also after a restart from a checkpoint.
With `columns=` in `stabilize` or `skip_explosions`, it also lists each step's `tag=`:

```python
>>> tx = optaxclip.stabilize(optax.sgd(0.1), columns=["batch"])
>>> state, update = tx.init(jnp.ones(2)), jax.jit(tx.update)
>>> for batch, g in [(38211, 1.0), (38212, jnp.nan), (38213, 1.0)]:
...     grads, tag = jnp.full(2, g), {"batch": batch}
...     updates, state = update(grads, state, jnp.ones(2), tag=tag)
>>> json.dumps(optaxclip.skipped_steps(state))
'[{"step": 1, "batch": 38212, "rules": ["nonfinite"]}]'

```

The list also holds the two steps that a rollback skips to try the snapshot. A batch is
suspect only if its `rules` list is non-empty.

## The rest of the training state

`stabilize` skips the step of the optimizer. Batch statistics or a moving average of the
parameters would still learn from the bad batch. `keep` prevents that, in one line each:

```python
>>> tx = optaxclip.stabilize(optax.sgd(0.1), rollback=False)
>>> update = jax.jit(tx.update)
>>> def train(batches):
...     params, average = jnp.ones(2), jnp.ones(2)
...     state = tx.init(params)
...     for grads in batches:
...         updates, state = update(grads, state, params)
...         params = optax.apply_updates(params, updates)
...         new = 0.9 * average + 0.1 * params + 0 * grads  # NaN of a bad batch
...         average = optaxclip.keep(state, new, average)
...     return average
>>> good, bad = jnp.ones(2), jnp.nan * jnp.ones(2)
>>> print(train([good, bad, good]) == train([good, good]))
[ True  True]

```

A rollback does not take these states back to the snapshot. They stay as they were after
the last step that was applied. That step was healthy, so nothing in them is bad, but
they are up to 100 healthy steps newer than the snapshot. The data loader is not taken
back either.

## Metrics

`metrics(opt_state, params)` reads the last step, and the counts of all steps:

| for each | it gives |
|---|---|
| clip | the norm before and after, the limit, the share of steps that were clipped |
| recorder | of each leaf: norm, squared share, ratio to parameters, has it vanished |
| detector | whether the step exploded, how often each rule has fired, what was done |

`help(optaxclip.metrics)` lists all names. `help(optaxclip.tracking)` shows how each
tracker takes them.

A loss that was not given reads as +inf in `metrics`, and as NaN in `history`.

A dashboard needs few names that stay the same. With up to ten scopes, each has its own
name: `gradients/norm/rnn/kernel`. With more, only the ten largest have names, by rank:
`gradients/top/1/index` and `gradients/top/1/norm`. The index is a value, and
`leaf_names(params)[index]` is the name of the leaf; a metric named after that leaf
would come and go, and cannot be made in `jit`. A clip has such names only where no
recorder or detector has them. A model of 723 leaves, with `stabilize` and a clip per
leaf, has 62 names; one more recorder adds 33, and `zeros=` adds 21. `top=` sets another
number, and `top=None` names every scope. A `record(top=k)` keeps only the k largest.

Over the last `window` steps (default: all kept), metrics give percentiles of the norm,
the shares of exploded and of skipped steps, and OLMo-core's SpikeScore:

```python
>>> recorders = optaxclip.record("before"), optaxclip.record("after")
>>> tx = optax.chain(recorders[0], optaxclip.clip_by_norm(5.0), recorders[1])
>>> state, update = tx.init(params), jax.jit(tx.update)
>>> for norm in [7.0, 1.0, 9.0, 2.0]:
...     grads = {"w": jnp.array([norm, 0.0]), "b": jnp.zeros(1)}
...     _, state = update(grads, state, params)
>>> metrics = optaxclip.metrics(state, params, window=3)
>>> print(metrics["before/window/norm_p50"], metrics["before/window/norm_p90"])
2.0 9.0

```

A clip keeps no window. For the share of the last steps that it clipped, compare the
histories of two recorders, before and after it. 1e-6 is more than a rounding:

```python
>>> before, after = (
...     optaxclip.history(state, label=label).norm[-3:] for label in ("before", "after")
... )
>>> print((after < before * (1 - 1e-6)).mean().round(3))
0.333

```

## History

`history(opt_state, params)` gives a `History`: NumPy arrays in time order. With several
recorders, `label=` chooses one.

```python
>>> kept = optaxclip.history(opt_state, params, label="gradients")
>>> print(kept.step, kept.loss, kept.norm, kept.names)
[0] [0.5] [5.] ['b', 'w']
>>> print(list(kept.columns())[:5])
['step', 'loss', 'loss_limit', 'norm', 'limit']

```

`pandas.DataFrame(kept.columns())` makes a table of the history. With `record(top=k)`,
the columns of `kept.norms` are ranks, and `kept.ranked` names the scope of each rank.

## Pictures

`plot(history(opt_state, params), "run.png")` draws the loss, the norm with its limit,
the steps that exploded, and every leaf, with the leading leaf highlighted. With more
than seven leaves it adds a map of all. To mark what was clipped, give the history of a
recorder behind the clip as `after=`. `plot` needs matplotlib:
`pip install "optaxclip[report]"`.

To watch a run, draw into the existing figure again, with `figure=`. In a notebook,
where `%matplotlib inline` is needed to show figures at all:

```python
%matplotlib inline
from IPython.display import display

figure = None
for step, batch in enumerate(batches):
    params, opt_state = train_step(params, opt_state, batch)
    if step % 100 == 0:
        kept = optaxclip.history(opt_state, params)
        figure = optaxclip.plot(kept, figure=figure)
        display(figure, display_id="run", update=step > 0)
```

In a window, begin with a figure of pyplot, `figure = plt.figure(figsize=(11, 8))`;
`plt.pause(0.1)` shows what was drawn. Without a screen, let `plot(kept, "run.png")`
overwrite one file, as `examples/scan_training.py --watch 50` does.

## Reports in words

`explain(opt_state, params)` writes a line for each recorder. If the record holds
several explosions, each has a line. This is the report on a run in which one part of
the network explodes while another dominates the norm:

    explosions: 90 of 695 steps exploded: 20 non-finite, 9 by the norm, 90 by the share
    of a leaf, 24 by the loss. Step 675 was non-finite: the loss was inf, with finite
    gradients. It began on step 605: the share of leaf 'aux.l00.W' in the norm was
    6.14e-05, above its limit 6.48e-06. Leaf 'aux.l00.W' had grown most. The norm had
    grown by about 1.93x per step since step 618, from 962 to 1.29e+19. In the end that
    of 'aux.l00.W' had grown most, by about 1.96x per step since step 600, from 0.00068
    to 1.29e+19.

`python tests/benchmarks/detection.py --explain` prints it. The growth is fitted to the
logarithms of all norms since that step; the metric `explosions/growth` is fitted to the
last eight. There are six recorded runs of this kind. `explain` names a leaf of the
exploding part in all six, and the starting step in five. In the sixth the explosion
began before the steps that are kept.

## Several runs at once

Under `jax.vmap` over runs, `metrics` gives arrays `[runs]`. The other functions read
one run: `jax.tree.map(lambda x: x[0], opt_state)`.
"""

from optaxclip.reporting.explaining import explain as explain
from optaxclip.reporting.guarding import ExplosionError as ExplosionError
from optaxclip.reporting.guarding import raise_if_exploded as raise_if_exploded
from optaxclip.reporting.history import History as History
from optaxclip.reporting.history import history as history
from optaxclip.reporting.keeping import keep as keep
from optaxclip.reporting.keeping import taken as taken
from optaxclip.reporting.lookups import leading_leaf as leading_leaf
from optaxclip.reporting.lookups import skipped_steps as skipped_steps
from optaxclip.reporting.metrics import metrics as metrics
from optaxclip.reporting.plotting import plot as plot
