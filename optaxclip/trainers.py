"""In your trainer: where the clip or the guard goes, and how the loss gets there.

`stabilize` needs three things in each step: the gradients, the parameters, and the loss
as `value=`. Each recipe below shows where a library lets them in. A clip needs the
gradients alone, and stands in the same place.

```python
>>> import jax, jax.numpy as jnp, optax, optaxclip
>>> x, y = jnp.ones((4, 3)), jnp.zeros((4, 1))
>>> def skipped(opt_state):
...     return int(optaxclip.metrics(opt_state)["explosions/num_skipped"])

```

## Flax nnx

`nnx.Optimizer.update` passes the loss on:

```python
>>> from flax import nnx
>>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
>>> tx = optaxclip.stabilize(optax.adam(1e-3))
>>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
>>> @nnx.jit
... def train_step(model, optimizer, x):
...     loss_fn = lambda model: jnp.mean((model(x) - y) ** 2)
...     loss, grads = nnx.value_and_grad(loss_fn)(model)
...     optimizer.update(model, grads, value=loss)
>>> for batch in (x, x * jnp.nan):
...     train_step(model, optimizer, batch)
>>> print(skipped(optimizer.opt_state))
1

```

For LoRA, name the type of its parameters in both places. The guard then sees these
alone:

```python
>>> model = nnx.LoRALinear(3, 1, lora_rank=2, rngs=nnx.Rngs(0))
>>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
>>> @nnx.jit
... def train_step(model, optimizer, x):
...     loss_fn = lambda model: jnp.mean((model(x) - y) ** 2)
...     wrt = nnx.DiffState(0, nnx.LoRAParam)
...     loss, grads = nnx.value_and_grad(loss_fn, argnums=wrt)(model)
...     optimizer.update(model, grads, value=loss)
>>> for batch in (x, x * jnp.nan):
...     train_step(model, optimizer, batch)
>>> lora = nnx.state(model, nnx.LoRAParam)
>>> print(skipped(optimizer.opt_state), optaxclip.leaf_names(lora))
1 ['lora/lora_a', 'lora/lora_b']

```

## Flax linen

`TrainState.apply_gradients(value=loss)` raises, since it takes the loss for one of its
own fields. A subclass hands it to the optimizer:

```python
>>> from flax.training import train_state
>>> class TrainState(train_state.TrainState):
...     def apply_gradients(self, *, grads, value, **fields):
...         updates, opt_state = self.tx.update(
...             grads, self.opt_state, self.params, value=value
...         )
...         params = optax.apply_updates(self.params, updates)
...         step = self.step + 1
...         return self.replace(
...             step=step, params=params, opt_state=opt_state, **fields
...         )
>>> state = TrainState.create(
...     apply_fn=None, params={"w": jnp.ones((3, 1))},
...     tx=optaxclip.stabilize(optax.adam(1e-3)),
... )
>>> @jax.jit
... def train_step(state, x):
...     loss_fn = lambda params: jnp.mean((x @ params["w"] - y) ** 2)
...     loss, grads = jax.value_and_grad(loss_fn)(state.params)
...     return state.apply_gradients(grads=grads, value=loss)
>>> for batch in (x, x * jnp.nan):
...     state = train_step(state, batch)
>>> print(skipped(state))
1

```

Other fields, such as batch statistics, follow with `keep`:
`batch_stats=optaxclip.keep(opt_state, new, self.batch_stats)`; see
`help(optaxclip.keep)`.

## Equinox

The arrays of a model are its parameters:

```python
>>> import equinox as eqx
>>> model = eqx.nn.Linear(3, 1, key=jax.random.key(0))
>>> tx = optaxclip.stabilize(optax.adam(1e-3))
>>> opt_state = tx.init(eqx.filter(model, eqx.is_array))
>>> @eqx.filter_jit
... def train_step(model, opt_state, x):
...     loss_fn = lambda model: jnp.mean((jax.vmap(model)(x) - y) ** 2)
...     loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
...     params = eqx.filter(model, eqx.is_array)
...     updates, opt_state = tx.update(grads, opt_state, params, value=loss)
...     return eqx.apply_updates(model, updates), opt_state
>>> for batch in (x, x * jnp.nan):
...     model, opt_state = train_step(model, opt_state, batch)
>>> print(skipped(opt_state))
1

```

## NumPyro

`optax_to_numpyro` passes the loss on. Use `svi.update`: `svi.stable_update` drops the
whole state of a non-finite step, and with it the count of the guard.

```python
>>> import numpyro
>>> from numpyro.infer import SVI, Trace_ELBO, autoguide
>>> def model(x):
...     mean = numpyro.sample("mean", numpyro.distributions.Normal(0.0, 10.0))
...     numpyro.sample("x", numpyro.distributions.Normal(mean, 1.0), obs=x)
>>> tx = optaxclip.stabilize(optax.adam(1e-3))
>>> optimizer = numpyro.optim.optax_to_numpyro(tx)
>>> svi = SVI(model, autoguide.AutoDelta(model), optimizer, Trace_ELBO())
>>> state = svi.init(jax.random.key(0), x)
>>> update = jax.jit(svi.update)
>>> for batch in (x, x * jnp.nan):
...     state, loss = update(state, batch)
>>> step, (params, opt_state) = state.optim_state
>>> print(skipped(opt_state))
1

```

## Diffrax, and fits in float64

A solver needs nothing of its own: the step is that of Equinox. Gradients in float64 are
measured in float64; what is recorded and told of them is float32. A solve that fails
with `throw=False` gives a loss of inf and gradients of 0: such a step is taken, and
counted as non-finite. One with a gradient of NaN is skipped. `tests/test_scientific.py`
has a whole fit.

## Haiku, and any loop of your own

The loop calls `update` itself, as in the README:
`tx.update(grads, opt_state, params, value=loss)`.

## Runs in one scan, as in reinforcement learning

The carry of a `lax.scan` holds `opt_state`, and `jax.vmap` stacks that of several runs.
Losses of either sign are fine. Here four agents learn by PPO which of two arms pays:

```python
>>> tx = optaxclip.stabilize(optax.adam(0.05))
>>> def ppo_loss(logits, old, arms, gains):
...     ratios = jnp.exp((jax.nn.log_softmax(logits) - jax.nn.log_softmax(old))[arms])
...     return -jnp.minimum(ratios * gains, ratios.clip(0.8, 1.2) * gains).mean()
>>> def rollout(carry, key):
...     old = carry[0]
...     arms = jax.random.categorical(key, old, shape=(32,))
...     rewards = jnp.where(arms == 0, 1.0, -1.0)
...     gains = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
...     def epoch(carry, _):
...         logits, opt_state = carry
...         loss, grads = jax.value_and_grad(ppo_loss)(logits, old, arms, gains)
...         updates, opt_state = tx.update(grads, opt_state, logits, value=loss)
...         return (optax.apply_updates(logits, updates), opt_state), None
...     return jax.lax.scan(epoch, carry, None, length=4)[0], rewards.mean()
>>> def train(key):
...     carry = jnp.zeros(2), tx.init(jnp.zeros(2))
...     return jax.lax.scan(rollout, carry, jax.random.split(key, 50))
>>> keys = jax.random.split(jax.random.key(0), 4)
>>> (logits, opt_state), rewards = jax.jit(jax.vmap(train))(keys)
>>> rollbacks = optaxclip.metrics(opt_state)["explosions/num_rollbacks"]
>>> print(rewards[:, 25:].mean() > 0.9, rollbacks)
True [0 0 0 0]

```

## Where the loop is not yours

What calls `update(grads, opt_state)` gives neither parameters nor loss. Then skip
alone; a rollback would raise an error that says so:

```python
>>> tx = optaxclip.stabilize(optax.adam(1e-3), rollback=False)
>>> params = {"w": jnp.ones(2)}
>>> opt_state = tx.init(params)
>>> update = jax.jit(tx.update)
>>> for grads in (params, {"w": jnp.array([jnp.nan, 1.0])}):
...     updates, opt_state = update(grads, opt_state)
>>> print(skipped(opt_state), updates["w"])
1 [0. 0.]

```

## A loss that was scaled (float16)

Give the gradients and the loss unscaled. An overflow of the scaled gradients is then a
non-finite step, which is skipped and counted; where the scale adapts itself, that is
routine on the first steps. `metrics` then has it in `explosions/num_exploded/nonfinite`
and nothing is cut, since no parameter was changed by it.

```python
>>> @jax.jit
... def step(params, opt_state, scale):
...     scaled = lambda params: scale * jnp.sum(params["w"] ** 2)
...     loss, grads = jax.value_and_grad(scaled)(params)
...     grads = jax.tree.map(lambda g: g / scale, grads)
...     updates, opt_state = tx.update(grads, opt_state, params, value=loss / scale)
...     return optax.apply_updates(params, updates), opt_state
>>> tx = optaxclip.stabilize(optax.adam(1e-3))
>>> opt_state = tx.init(params)
>>> for scale in (jnp.float32(3e38), jnp.float32(1e3)):  # the first overflows
...     params, opt_state = step(params, opt_state, scale)
>>> print(skipped(opt_state), optaxclip.metrics(opt_state)["explosions/scale"])
1 1.0

```

## Two optimizers: a GAN, actor and critic

Each gets a guard of its own, and its own loss. To read both at once they need labels:

```python
>>> players = {
...     name: optaxclip.stabilize(optax.adam(1e-4), label=name)
...     for name in ("generator", "discriminator")
... }
>>> states = {name: tx.init(params) for name, tx in players.items()}
>>> found = optaxclip.metrics(list(states.values()))
>>> print(found["generator/num_skipped"], found["discriminator/num_skipped"])
0 0

```

## What reads the loss inside

`optax.contrib.reduce_on_plateau` and `optax.lbfgs` take `value=` as well; the guard
around them passes every extra argument on:

```python
>>> inner = optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau(patience=1))
>>> tx = optaxclip.stabilize(inner)
>>> opt_state = tx.init(params)
>>> update = jax.jit(tx.update)
>>> for _ in range(3):
...     _, opt_state = update(params, opt_state, params, value=jnp.array(1.0))
>>> print(optax.tree.get(opt_state, "best_value"))
1.0

```

## Checkpoints

The state is arrays. Restore it into `tx.init(params)` as its template:

```python
>>> from flax import serialization
>>> saved = serialization.to_bytes(opt_state)
>>> opt_state = serialization.from_bytes(tx.init(params), saved)
>>> print(optaxclip.metrics(opt_state)["explosions/num_exploded"])
0

```

With orbax: `ocp.StandardCheckpointer().restore(path, template)`.

## Dashboards

`metrics` gives a flat dictionary of scalars. On the host, `found = {name: float(x) for
name, x in optaxclip.metrics(opt_state, params).items()}`, and then:

| tracker | line |
|---|---|
| Weights & Biases | `wandb.log(found, step=step)` |
| MLflow | `mlflow.log_metrics(found, step=step)` |
| TensorBoard | `for name, x in found.items(): writer.add_scalar(name, x, step)` |

With many leaves, TensorBoard's page of texts names the leading one, and its page of
images shows the whole record:

```python
writer.add_text("explain", optaxclip.explain(opt_state, params), step)
kept = optaxclip.history(opt_state, params)
writer.add_figure("run", optaxclip.plot(kept), step)
```

## Accumulation, masks, schedules, hyperparameters

`optax.MultiSteps` stands inside the guard. `optax.microbatch`, and any mean over
micro-batches that the loop takes itself, comes before it: there one NaN costs the whole
step, which is skipped. See "In your trainer" in `help(optaxclip.explosions)`, and "The
global norm around a partition" in `help(optaxclip.clipping)`.
"""
