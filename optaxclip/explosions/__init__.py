"""How to notice an explosion, and how to survive it: skip, cool down, roll back.

| | on an explosion |
|---|---|
| `detect_explosions()` | remembers what happened, and changes nothing |
| `skip_explosions(optimizer)` | also skips the step |
| `rollback=True` | also returns to a snapshot, if that is better |
| `cool_down=0.1` | also makes the next updates smaller |
| `stabilize(optimizer)` | does all of these, without a number to choose |
| `raise_if_exploded(state)` | raises `ExplosionError` if the run cannot go on |

```python
>>> import jax, jax.numpy as jnp, optax, optaxclip
>>> tx = optaxclip.stabilize(optax.adam(1e-3))
>>> params = {"w": jnp.ones(2)}
>>> opt_state = tx.init(params)
>>> update = jax.jit(tx.update)
>>> for g in [1.0, jnp.nan]:
...     grads, loss = {"w": jnp.full(2, g)}, jnp.array(1.0)
...     updates, opt_state = update(grads, opt_state, params, value=loss)
...     params = optax.apply_updates(params, updates)
...     optaxclip.raise_if_exploded(opt_state, params)  # not if it was survived
>>> print(params["w"], optaxclip.metrics(opt_state)["explosions/num_skipped"])
[0.999 0.999] 1

```

## What counts as an explosion

A step explodes if any leaf or the loss is non-finite, or if one of three signals
exceeds its limit. The check for non-finite values is always on. `None` turns a rule
off.

| rule | signal | default limit |
|---|---|---|
| `norm` | the norm of all gradients | `limits.log_quantile()`, with a floor |
| `share` | the share of each leaf in that norm | `limits.sustained_rise()` |
| `loss` | the loss, given as `value=` to `update` | the smaller of two, with a floor |

* Behind the optimizer, `detect_explosions` sees the norm of the updates instead.
* A share counts only in a leaf whose own norm is twenty times its mean over the last 64
  steps (the geometric one). That finds a layer that explodes under larger ones.
* The loss may have either sign. Its limit is the smaller of `limits.above_lowest()` and
  `limits.log_quantile(2.4, min_ratio=1.7, early_jump=2.5, min_level=0.01)`.
* No norm or loss below 1/1000 of where it began is above its limit, by
  `limits.fraction_of_start()`. Once a loss has been negative, there is no such floor.

Any limit can detect as it can clip: a number, a schedule, a learned one, or your own.
Only `limits.params` cannot, since a rule compares a signal with its past.

```python
>>> tx = optax.chain(
...     optaxclip.detect_explosions(norm=100.0, share=None),  # passes updates through
...     optaxclip.skip_explosions(optax.adam(1e-3), label="skip"),
... )

```

`detect_explosions` remembers which rule fired, the leading leaf, the step on which the
explosion began, how many steps exploded, and how fast the norm grew. The leading leaf
is the first non-finite one, or else the one that has grown most. Exploded steps at most
ten steps apart count as one explosion (`max_gap`).

## What happens on one, step by step

1. `skip_explosions` skips the step. The updates are zeros, the state of the optimizer
   stays, bit for bit, and the rules learn nothing from the step. A non-finite loss with
   finite gradients is counted, but its step is taken.
2. An outlier is taken if two others came in the 128 steps before, and in the first 64
   steps if one did; the rules learn it. A norm above its limit is clipped to it. An
   outlier is an explosion where the step before it did not explode, with finite
   gradients of a norm of at most ten times its limit, and any loss. Batches of a rare
   kind explode so, and would never be learned otherwise. The next explosion in the same
   row is skipped, and so is every one while updates are cooled down, or without a rule
   on the norm.
3. If explosions persist, they are a change of regime. After nine in a row the finite
   ones are taken and learned (`max_consecutive=10`), clipped likewise, until the rules
   find them healthy. A loss above its limit needs nine such losses in a row, and with a
   rollback may be at most twice the lowest of them, early in a run more.
4. A step with non-finite gradients is never taken. After 100 in a row the run is given
   up (`give_up_after`); `metrics` and `raise_if_exploded` say so, until a finite step.
5. Where the optimizer itself makes a non-finite update, or an update would overflow the
   dtype of its parameter, those elements become 0. That alone is not counted, since to
   read every update once more can cost more than the step. To see it, put
   `detect_explosions(label="updates")` behind the optimizer, inside.
6. Where the optimizer makes its own moments non-finite out of finite gradients, they
   are reset to 0 within 3 steps, and other numbers of its state to what `init` gave;
   one that is +inf there, such as a best loss, may be so again. That step is skipped,
   and counted as an explosion (`explosions/num_mended`). Hyperparameters stay, and so
   does an array larger than every leaf, such as the memory of L-BFGS, of which
   `raise_if_exploded` tells.

With `rollback=True` also:

1. A snapshot of the parameters is taken after every 50 healthy steps
   (`snapshot_every`). Two are kept.
2. The loss exceeds its limit three times in a row (`rollback_after`), or the norm if
   there is no loss or no rule on it; each of the last two outliers, if it came before
   this row and within 128 steps, requires one time more. Or ten steps in a row have
   non-finite gradients. The batches cannot be at fault each time, so the data have
   changed, or the parameters are bad. Or else, with `cool_down` and when a snapshot is
   due, the loss has slowly risen by half or more since the older one, to at least half
   of the first loss, and the gradients of at least 10 of the last 16 steps agree that
   it falls on the way back. Where the targets move, as those of values that are learned
   from their own predictions, it falls on the way on.
3. To find out, the parameters go back to the older snapshot, from 50 to 100 healthy
   steps ago, or from the last return or the start of the run, and up to two batches are
   tried there.
4. If at least half of the excess, or of the rise, is gone in both, the run goes on from
   the snapshot. That is a rollback. If not, the parameters come back as they were, and
   the explosions are accepted: the first of them whatever its loss, later ones up to
   twice the loss of before, ten times until a healthy step or two. A larger one, third
   or later in its row, starts another trial. The state of the optimizer stays in either
   case: the steps that exploded were skipped, so it knows nothing of them.
5. With `cool_down` a rollback also sets a factor for the updates, unless the loss is
   above its limit at the snapshot too: then the data have changed. Before step 64 it is
   `cool_down`, later the larger of `cool_down` and 1/16 (`cool_down` where the factor
   is no more than 1/16 already). A cut that follows another within 300 steps divides
   the factor by 8, to `cool_down` or less, down to 1/4096. Each healthy step multiplies
   it by `recovery`, up to 1.
6. If the parameters are NaN, the run is given up at once.

`rollback="host"` does the same with the snapshots in the memory of the host, so that
the device has none. One travels there every 50 healthy steps and where a trial starts,
and back in the steps of a trial, of non-finite gradients, and in up to 16 before a
snapshot is due if the loss has risen. It needs JAX 0.10, and has been run on CPUs only.
A state that is read from a checkpoint has to be put there too, or `update` raises an
error that says how.

Without `rollback`, the third explosion in a row multiplies the updates by `cool_down`.

`stabilize(optimizer)` is
`skip_explosions(optimizer, rollback=True, cool_down=1/64, recovery=1.002)`.

## What to do when it fires

`explain(opt_state, params)` says in words what happened; see
`help(optaxclip.reporting)`.

| what you see | what to do |
|---|---|
| one explosion, and 64 healthy steps since | nothing: a bad batch, or a false alarm |
| the same leaf explodes again and again | a smaller learning rate, or a clip |
| non-finite, though nothing grew before | look at the data and the precision |
| the run was given up | an earlier checkpoint, a smaller learning rate |
| rollback after rollback | an earlier checkpoint, as `examples/data_parallel.py` does |
| the parameters hold NaN | an earlier checkpoint |
| the optimizer's state holds NaN or inf | larger constants in its denominators |
| `explosions/num_blocked_rollbacks` above 0 | put `stabilize` around everything else |
| `optax.MultiSteps` has accumulated NaN | put `stabilize` around it, or see below |

`raise_if_exploded` is for the training loop, outside of `jit`. It raises only where the
run cannot go on: on a non-finite step that nothing skipped, on a run that was given up,
and on NaN in parameters, optimizer state or accumulated gradients. It does not raise on
a finite explosion that `detect_explosions` noticed; read `explosions/is_exploded` for
that. It waits for the step, so call it every few steps.

## In your trainer

| what | how |
|---|---|
| order | `stabilize` around everything that makes the update, or averages gradients |
| the loss | `tx.update(grads, opt_state, params, value=loss)` |
| accumulation | `stabilize(optax.MultiSteps(optimizer, 4))` |
| masks | around `optax.masked` it watches all leaves, inside the chosen ones |
| schedules | inside: they count the steps that were taken |
| hyperparameters by hand | `optax.inject_hyperparams` inside: a rollback leaves them |

**Order.** A rollback is an update, so nothing may change it afterward. `metrics` counts
those that something changed as `explosions/num_blocked_rollbacks`. What averages
gradients in front, as `optax.trace`, `ema` and `apply_every` do, holds the NaN of one
bad batch for good: every later step is skipped, and `raise_if_exploded` is silent until
the 100th.

```python
>>> def train(tx, sizes, state=None):  # gradients and losses of these sizes
...     params, update = {"w": jnp.zeros(2)}, jax.jit(tx.update)
...     state = tx.init(params) if state is None else state
...     for size in sizes:
...         grads = {"w": jnp.full(2, size)}
...         updates, state = update(grads, state, params, value=jnp.array(abs(size)))
...         params = optax.apply_updates(params, updates)
...     return params, state
>>> def count(state, name):
...     return int(optaxclip.metrics(state)["explosions/" + name])
>>> returns = [1.0] * 4 + [1e3] * 3 + [1.0] * 3  # three explosions, two trials
>>> _, state = train(optaxclip.stabilize(optax.adam(1e-3)), returns)
>>> assert count(state, "num_rollbacks") == 1
>>> behind = optax.chain(optaxclip.stabilize(optax.scale_by_adam()), optax.scale(-1e-3))
>>> _, state = train(behind, returns)
>>> assert count(state, "num_blocked_rollbacks") == 1
>>> in_front = optax.chain(optax.trace(0.9), optaxclip.stabilize(optax.sgd(0.1)))
>>> params, state = train(in_front, [jnp.nan, 1.0, 1.0])
>>> assert count(state, "num_skipped") == 3
>>> optaxclip.raise_if_exploded(state, params)  # silent

```

**The loss.** Where a framework calls `update(grads, state)` itself, use
`stabilize(optimizer, rollback=False)`: it needs neither the loss nor the parameters.

**Accumulation, masks, schedules.** Around `optax.MultiSteps` one bad micro-batch alone
is lost. Inside, NaN would stay in the accumulated gradients, which `raise_if_exploded`
reports, unless `optax.skip_not_finite` keeps it out.

```python
>>> around = optaxclip.stabilize(optax.MultiSteps(optax.sgd(0.1), 4))
>>> inside = optax.MultiSteps(
...     optaxclip.stabilize(optax.sgd(0.1)), 4,
...     should_skip_update_fn=optax.skip_not_finite,
... )
>>> for tx in (around, inside):
...     print(train(tx, [1.0, jnp.nan, 1.0, 1.0, 1.0])[0]["w"])
[-0.1 -0.1]
[-0.1 -0.1]
>>> optimizer, bad = optax.sgd(lambda count: 0.1 / (1 + count)), [1.0, jnp.nan, 1.0]
>>> _, state = train(optaxclip.stabilize(optax.masked(optimizer, {"w": False})), bad)
>>> assert count(state, "num_skipped") == 1
>>> assert optax.tree.get(state, "count") == 2
>>> _, state = train(optax.masked(optaxclip.stabilize(optimizer), {"w": False}), bad)
>>> assert count(state, "num_skipped") == 0

```

**Hyperparameters by hand.** Number or array, a rollback leaves what was set.

```python
>>> by_hand = optaxclip.stabilize(optax.inject_hyperparams(optax.sgd)(0.1))
>>> _, state = train(by_hand, [1.0] * 4)
>>> state["explosions"].inner_state.hyperparams["learning_rate"] = 0.01
>>> _, state = train(by_hand, returns[4:], state)
>>> assert count(state, "num_rollbacks") == 1
>>> print(state["explosions"].inner_state.hyperparams["learning_rate"])
0.01

```

**A run saved without it.** Put the state of its optimizer into `inner_state`. The first
snapshot is of what the first step is given.

```python
>>> saved = optax.adam(1e-3).init({"w": jnp.zeros(2)})
>>> tx = optaxclip.stabilize(optax.adam(1e-3))
>>> state = tx.init({"w": jnp.zeros(2)})
>>> state["explosions"] = state["explosions"]._replace(inner_state=saved)

```

## What it cannot do

* It does not help where nothing explodes and training is merely bad, as after a poor
  initialization. There `max_norm=` adds a fixed clip.
* It notices a loss that rises slowly only when a snapshot is due, if that was positive
  at the older one and is at half of the first loss, or at eight times its lowest level,
  if it was never negative. And it does not notice a network that dies, whose loss goes
  back to where it began.
* It needs the loss. Without it, a rollback is judged by the norm alone.
* A rollback keeps two copies of the parameters, on the device or on its host.
* It raises false alarms: 8 in 10,000 healthy steps (1 to 21) of 72 recorded runs that
  it was not tuned on. It notices 93.1 % of the explosions there (86.9 to 99.1). Run
  `python tests/benchmarks/detection.py --split heldout` (x86-64, JAX 0.10.2,
  2026-11-28).
* Of 15 benchmark runs that explode, of tasks that nothing was chosen on, it does not
  save 26 %. It harms none of their 30 healthy runs; one of their 120 seeds ends 42 %
  worse, after a rollback. `tests/benchmarks/README.md` names them.
* It mistakes rare but important batches for explosions: where few batches hold a
  positive of large weight, or a reward, the first are skipped; and all of them, if they
  come less often than every 64 steps, or have a norm of more than ten times its limit.
  Look at `skipped_steps`, and turn the rules off there with `norm=None, loss=None`.
"""

from optaxclip.explosions.detecting import detect_explosions as detect_explosions
from optaxclip.explosions.skipping import skip_explosions as skip_explosions
from optaxclip.explosions.stabilizing import stabilize as stabilize
from optaxclip.explosions.state import DetectExplosionsState as DetectExplosionsState
from optaxclip.explosions.state import SkipExplosionsState as SkipExplosionsState
