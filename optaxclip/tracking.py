r"""Saving and tracking: checkpoints, and what to give a tracker or a dashboard.

```python
>>> import re, tempfile, jax, jax.numpy as jnp, optax, optaxclip
>>> tx = optaxclip.stabilize(optax.adam(1e-3))
>>> params = {"w": jnp.ones(2), "b": jnp.ones(1)}
>>> opt_state = tx.init(params)
>>> update = jax.jit(tx.update)
>>> for grads in (params, jax.tree.map(lambda x: x * jnp.nan, params)):
...     _, opt_state = update(grads, opt_state, params, value=jnp.array(1.0))
>>> optaxclip.skipped_steps(opt_state)
[{'step': 1, 'rules': ['nonfinite']}]

```

## Checkpoints

The state is a tree of arrays. Restore it with `tx.init(params)` as its template, here
by Flax:

```python
>>> from flax import serialization
>>> saved = serialization.to_bytes(opt_state)
>>> restored = serialization.from_bytes(tx.init(params), saved)
>>> optaxclip.skipped_steps(restored)
[{'step': 1, 'rules': ['nonfinite']}]

```

and by orbax:

```python
>>> import orbax.checkpoint as ocp
>>> with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as saver:
...     saver.save(f"{folder}/1", opt_state)
...     saver.wait_until_finished()
...     restored = saver.restore(f"{folder}/1", tx.init(params))
>>> optaxclip.skipped_steps(restored)
[{'step': 1, 'rules': ['nonfinite']}]

```

## Trackers

`metrics` gives a flat dictionary of scalars. Fetch it from the device, every step or
every few steps:

```python
>>> step = 1
>>> found = jax.device_get(optaxclip.metrics(opt_state, params))
>>> print(found["explosions/num_skipped"], found["explosions/norm/w"])
1 nan

```

Then each tracker takes it in one line:

| tracker | line |
|---|---|
| tensorboardX | `for name, x in found.items(): writer.add_scalar(name, x, step)` |
| Weights & Biases | `wandb.log(found, step=step)` |
| MLflow | `mlflow.log_metrics(for_mlflow, step=step)`, see below |
| clu, a writer of `clu.metric_writers` | `writer.write_scalars(step, found)` |
| trackio | `trackio.log({name: float(x) for name, x in found.items()}, step=step)` |

* TensorBoard: `flush` of tensorboardX does not wait for its queue. The last ten scalars
  may be lost if the process is killed.
* MLflow: its file store makes a file of `explosions/norm`, and then cannot make the
  folder that `explosions/norm/w` needs. It also refuses the brackets in the names of
  stacked layers. Names with dots work in all its stores. Its databases return 1.8e308
  for +inf.
* trackio takes floats. It leaves out NumPy arrays, with a warning.
* Neptune, which older tutorials use, closed its hosted service in 2026.

```python
>>> for_mlflow = {re.sub(r"\W+", ".", name): x for name, x in found.items()}
>>> print(for_mlflow["explosions.num_skipped"], for_mlflow["explosions.norm.w"])
1 nan

```

With many leaves, a text in TensorBoard names the leading one, and an image shows the
whole record:

```python
>>> from tensorboardX import SummaryWriter
>>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
...     for name, x in found.items():
...         writer.add_scalar(name, x, step)
...     writer.add_text("explain", optaxclip.explain(opt_state, params), step)
...     kept = optaxclip.history(opt_state, params)
...     writer.add_figure("run", optaxclip.plot(kept), step)

```

`tests/benchmarks/tensorboard_page.py` writes such an image of 300 leaves, and
`tests/benchmarks/README.md` shows it.
"""
