"""In your trainer: where the clip or the guard goes, and how the loss gets there.

`stabilize` needs three things in each step: the gradients, the parameters, and the loss
as `value=`. Each recipe below shows how a library passes them on. In these recipes `tx`
is called the guard. A clip needs the gradients alone, and stands in the same place.

```python
>>> import functools, jax, jax.numpy as jnp, optax, optaxclip
>>> x, y = jnp.ones((4, 3)), jnp.zeros((4, 1))
>>> tx = optaxclip.stabilize(optax.adam(1e-3))
>>> def skipped(opt_state):
...     return [step["step"] for step in optaxclip.skipped_steps(opt_state)]

```

## Flax nnx

`nnx.Optimizer.update` passes the loss on. Name the type of the parameters in two
places. Here it is `nnx.LoRAParam`, and the guard sees these parameters alone:

```python
>>> from flax import nnx
>>> wrt = nnx.LoRAParam  # of a whole model: nnx.Param
>>> model = nnx.LoRALinear(3, 1, lora_rank=2, rngs=nnx.Rngs(0))
>>> optimizer = nnx.Optimizer(model, tx, wrt=wrt)
>>> @nnx.jit
... def train_step(model, optimizer, x):
...     loss_fn = lambda model: jnp.mean((model(x) - y) ** 2)
...     grad_fn = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, wrt))
...     loss, grads = grad_fn(model)
...     optimizer.update(model, grads, value=loss)
>>> for batch in (x, x * jnp.nan):
...     train_step(model, optimizer, batch)
>>> print(skipped(optimizer.opt_state), optaxclip.leaf_names(nnx.state(model, wrt)))
[1] ['lora/lora_a', 'lora/lora_b']

```

## Flax linen

A `TrainState` takes `value=` for one of its own fields, with any optimizer:

```python
>>> from flax.training import train_state
>>> params = {"w": jnp.ones((3, 1))}
>>> plain = train_state.TrainState.create(
...     apply_fn=None, params=params, tx=optax.adam(1e-3)
... )
>>> plain.apply_gradients(grads=params, value=1.0)
Traceback (most recent call last):
    ...
TypeError: TrainState.__init__() got an unexpected keyword argument 'value'

```

A subclass passes it to the optimizer, with the `tag=` for `columns=`, if there are any:

```python
>>> class TrainState(train_state.TrainState):
...     def apply_gradients(self, *, grads, value, tag=None, **fields):
...         updates, opt_state = self.tx.update(
...             grads, self.opt_state, self.params, value=value, tag=tag
...         )
...         params = optax.apply_updates(self.params, updates)
...         step = self.step + 1
...         return self.replace(
...             step=step, params=params, opt_state=opt_state, **fields
...         )
>>> tagged = optaxclip.stabilize(optax.adam(1e-3), columns=["batch"])
>>> state = TrainState.create(apply_fn=None, params=params, tx=tagged)
>>> @jax.jit
... def train_step(state, x, batch):
...     loss_fn = lambda params: jnp.mean((x @ params["w"] - y) ** 2)
...     loss, grads = jax.value_and_grad(loss_fn)(state.params)
...     return state.apply_gradients(grads=grads, value=loss, tag={"batch": batch})
>>> for batch, data in [(38211, x), (38212, x * jnp.nan)]:
...     state = train_step(state, data, batch)
>>> print(optaxclip.skipped_steps(state))
[{'step': 1, 'batch': 38212, 'rules': ['nonfinite']}]

```

Other fields, such as batch statistics, follow with `keep`:
`batch_stats=optaxclip.keep(opt_state, new, self.batch_stats)`; see
`help(optaxclip.keep)`.

## Equinox

The arrays of a model are its parameters:

```python
>>> import equinox as eqx
>>> model = eqx.nn.Linear(3, 1, key=jax.random.key(0))
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
[1]

```

## NumPyro

`optax_to_numpyro` passes the loss on. Use `svi.update`: `svi.stable_update` drops the
whole state of a non-finite step, and with it the count of the guard.

```python
>>> import numpyro
>>> from numpyro.distributions import Delta, Normal
>>> from numpyro.infer import SVI, Trace_ELBO
>>> def model(x):
...     mean = numpyro.sample("mean", Normal(0.0, 10.0))
...     numpyro.sample("x", Normal(mean, 1.0), obs=x)
>>> def guide(x):
...     numpyro.sample("mean", Delta(numpyro.param("at", 0.0)))
>>> optimizer = numpyro.optim.optax_to_numpyro(tx)
>>> svi = SVI(model, guide, optimizer, Trace_ELBO())
>>> state = svi.init(jax.random.key(0), x)
>>> update = jax.jit(svi.update)
>>> for batch in (x, x * jnp.nan):
...     state, loss = update(state, batch)
>>> step, (_, opt_state) = state.optim_state
>>> print(skipped(opt_state))
[1]

```

## Diffrax, and fits in float64

A solver needs no recipe of its own: use the step of Equinox. Gradients in float64 are
measured in float64, and recorded in float32. A solve that fails with `throw=False`
gives a loss of inf and gradients of 0: such a step is taken, and counted as non-finite.
A step with a gradient of NaN is skipped. `tests/test_scientific.py` has a whole fit.

## Haiku, and any loop of your own

The loop calls `update` itself, as in the README:
`tx.update(grads, opt_state, params, value=loss)`.

## Runs in one scan, as in reinforcement learning

The carry of a `lax.scan` holds `opt_state`, and `jax.vmap(train)` stacks the states of
several runs. Losses of either sign are fine. Here an agent learns by PPO which of two
arms pays:

```python
>>> ppo = optaxclip.stabilize(optax.adam(0.05))
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
...         updates, opt_state = ppo.update(grads, opt_state, logits, value=loss)
...         return (optax.apply_updates(logits, updates), opt_state), None
...     return jax.lax.scan(epoch, carry, None, length=4)[0], rewards.mean()
>>> @jax.jit
... def train(key):
...     carry = jnp.zeros(2), ppo.init(jnp.zeros(2))
...     return jax.lax.scan(rollout, carry, jax.random.split(key, 50))
>>> (logits, opt_state), rewards = train(jax.random.key(0))
>>> print(rewards[25:].mean() > 0.9, skipped(opt_state))
True []

```

## Where the loop is not yours

A loop that calls `update(grads, opt_state)` gives neither parameters nor loss. Then
skip only; a rollback would raise an error that says so:

```python
>>> skip = optaxclip.stabilize(optax.adam(1e-3), rollback=False)
>>> params = {"w": jnp.ones(2)}
>>> opt_state = skip.init(params)
>>> update = jax.jit(skip.update)
>>> for grads in (params, {"w": jnp.array([jnp.nan, 1.0])}):
...     updates, opt_state = update(grads, opt_state)
>>> print(skipped(opt_state), updates["w"])
[1] [0. 0.]

```

## A loss that was scaled (float16)

Give the gradients and the loss unscaled, as Flax's `DynamicScale` returns them. An
overflow of the scaled gradients is then a non-finite step, which is skipped, and
counted in `explosions/num_exploded/nonfinite`. While a dynamic scale adapts itself, in
the first steps, that is routine. Updates are not reduced, because no parameter was
changed.

```python
>>> from flax.training.dynamic_scale import DynamicScale
>>> @jax.jit
... def train_step(params, opt_state, scale):
...     loss_fn = lambda params: jnp.mean(params["w"].astype(jnp.float16) ** 2)
...     scale, is_finite, loss, grads = scale.value_and_grad(loss_fn)(params)
...     updates, opt_state = tx.update(grads, opt_state, params, value=loss)
...     return optax.apply_updates(params, updates), opt_state, scale
>>> opt_state, scale = tx.init(params), DynamicScale(scale=jnp.float32(2**18))
>>> for _ in range(4):
...     params, opt_state, scale = train_step(params, opt_state, scale)
>>> print(skipped(opt_state), scale.scale / 2**16)
[0, 1, 2] 0.5

```

## Two optimizers: a GAN, actor and critic

Each gets its own guard and its own loss. To read both at once, give them labels:

```python
>>> players = {
...     name: optaxclip.stabilize(optax.adam(1e-4), label=name)
...     for name in ("generator", "critic")
... }
>>> def losses(params, real, noise):
...     score = lambda x: jnp.mean(x @ params["critic"])
...     fake = score(noise * params["generator"])
...     return {"generator": -fake, "critic": fake - score(real)}
>>> @functools.partial(jax.jit, static_argnums=0)
... def train_step(name, params, states, real, noise):
...     loss_fn = lambda own: losses(params | {name: own}, real, noise)[name]
...     loss, grads = jax.value_and_grad(loss_fn)(params[name])
...     tx, state = players[name], states[name]
...     updates, state = tx.update(grads, state, params[name], value=loss)
...     new = optax.apply_updates(params[name], updates)
...     return params | {name: new}, states | {name: state}
>>> params = {name: jnp.ones(3) for name in players}
>>> states = {name: tx.init(params[name]) for name, tx in players.items()}
>>> params, states = train_step("critic", params, states, x * jnp.nan, x)
>>> for name in players:
...     print(name, optaxclip.taken(states, label=name))
generator True
critic False

```

## Optimizers that read the loss

The guard passes every extra argument on. `optax.contrib.reduce_on_plateau` takes
`value=` as well, and L-BFGS needs three:

```python
>>> tx = optaxclip.stabilize(optax.lbfgs())
>>> loss_fn = lambda params: jnp.sum(params**2)
>>> @jax.jit
... def train_step(params, opt_state):
...     loss, grads = jax.value_and_grad(loss_fn)(params)
...     updates, opt_state = tx.update(
...         grads, opt_state, params, value=loss, grad=grads, value_fn=loss_fn
...     )
...     return optax.apply_updates(params, updates), opt_state
>>> params = jnp.array([0.6, 0.8])
>>> params, opt_state = train_step(params, tx.init(params))
>>> print(loss_fn(params) < 1e-6)
True

```

## Accumulation, masks, schedules, hyperparameters

`optax.MultiSteps` stands inside the guard: `stabilize(optax.MultiSteps(optimizer, 4))`.
If it stands around the guard, call the `update` of `MultiSteps` itself. After
`.gradient_transformation()`, `optax.chain` and others would drop `value=` and `tag=`.
`optax.microbatch`, and any mean over micro-batches that the loop computes itself, comes
before the guard: there one NaN costs the whole step, which is skipped. See "In
your trainer" in `help(optaxclip.explosions)`, and "The global norm around a partition"
in `help(optaxclip.clipping)`.

`help(optaxclip.tracking)` is about checkpoints and dashboards.
"""
