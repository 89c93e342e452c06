"""How to notice an explosion, and how to survive it: skip, cool down, roll back.

| | on an explosion |
|---|---|
| `detect_explosions()` | records what happened, and changes nothing |
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
...     optaxclip.raise_if_exploded(opt_state, params)  # silent: the step was skipped
>>> print(params["w"], optaxclip.metrics(opt_state)["explosions/num_skipped"])
[0.999 0.999] 1

```

## What counts as an explosion

A step explodes if any leaf or the loss is non-finite, or if one of three signals
exceeds its limit. The check for non-finite values is always on. Each rule can be turned
off by `None`, as in `share=None`.

| rule | signal | default limit |
|---|---|---|
| `norm` | the norm of all gradients | `limits.log_quantile()`, with a floor |
| `share` | the share of each leaf in that norm | `limits.sustained_rise()` |
| `loss` | the loss, given as `value=` to `update` | the smaller of two, with a floor |

* Behind the optimizer, `detect_explosions` sees the norm of the updates instead.
* A share counts only in a leaf whose own norm is twenty times its geometric mean over
  the last 64 steps. That finds a layer that explodes under larger ones.
* The loss may have either sign. Its limit is the smaller of `limits.above_lowest()` and
  `limits.log_quantile(2.4, min_ratio=1.7, early_jump=2.5, min_level=0.01)`.
* The floor is `limits.fraction_of_start()`: a norm or a loss below 1/1000 of its first
  values never exceeds its limit. A loss that has been negative has no floor.

Every limit that can clip can also detect: a number, a schedule, a learned limit, or
your own. The exception is `limits.params`, because a rule compares a signal with its
past.

```python
>>> both = optax.chain(
...     optaxclip.detect_explosions(norm=100.0, share=None),  # passes updates through
...     optaxclip.skip_explosions(optax.adam(1e-3), label="skip"),
... )

```

`detect_explosions` remembers which rule fired, the leading leaf, the step on which the
explosion began, how many steps exploded, and how fast the norm grew. The leading leaf
is the first non-finite one, or else the one that has grown most. Exploded steps at most
ten steps apart (`max_gap`) count as one explosion.

## What happens on one, step by step

1. `skip_explosions` skips the step. The updates are zeros, the state of the optimizer
   stays bit-identical, and the rules learn nothing from the step. Two kinds of steps
   are counted, but taken: those on which the loss alone is non-finite, and those on
   which the share of a leaf alone exceeds its limit. A layer that wakes up late raises
   its share just as one that explodes, and learns nothing from steps that are skipped.
2. An outlier is an explosion after a step that did not explode, with finite gradients
   and a norm of at most ten times its limit. If its loss is within its limit, the step
   is taken. Batches of a rare kind may have any loss. So that the run learns from them,
   the third outlier within 128 steps is taken as well; in the first 64 steps, the
   second, and none while updates are cooled down. A norm above its limit is clipped to
   it. An explosion right after an outlier is skipped, and so is an outlier if there is
   no rule on the norm.
3. If explosions persist, they are a change of regime. After nine in a row the finite
   ones are taken and learned (`max_consecutive=10`), clipped to their limit, until the
   rules find them healthy. A loss above its limit needs nine such losses in a row. With
   a rollback it may be at most twice the lowest of them, or ten times if at most one
   step was taken since the older snapshot.
4. A step with non-finite gradients is never taken. After 100 in a row the run is given
   up (`give_up_after`); `metrics` and `raise_if_exploded` say so, until a finite step.
5. Where the optimizer itself makes a non-finite update, or an update would overflow the
   dtype of its parameter, those elements become 0. That alone is not counted, because
   reading every update once more can cost more than the step. To see it, put
   `detect_explosions(label="updates")` behind the optimizer, inside.
6. Where the optimizer makes its own moments non-finite out of finite gradients, they
   are reset to 0 within 3 steps, and other numbers of its state to what `init` gave. A
   number that is +inf there, such as a best loss, may become +inf again. That step is
   skipped, and counted as an explosion (`explosions/num_mended`). Hyperparameters stay,
   and so does an array larger than every leaf, such as the memory of L-BFGS. If that is
   non-finite, `raise_if_exploded` raises.

With `rollback=True` also:

1. A snapshot of the parameters is taken after every 50 healthy steps
   (`snapshot_every`). Two are kept.
2. The older snapshot is tried in one of four cases:
    * The loss exceeds its limit three times in a row (`rollback_after`); without a
      loss, or without a rule on it, the norm does. Each of the last two outliers within
      128 steps and before this row raises the count by one. In the first 64 steps a
      limit may be low by chance: three more are needed, unless all are above four times
      their limit.
    * Ten steps in a row have non-finite gradients.
    * With `cool_down`, when a snapshot is due: the loss has slowly risen by a fifth or
      more since the older one, by more than its noise, to at least half of the first
      loss, and the gradients of at least 10 of the last 16 steps agree that it falls on
      the way back. If targets move, as in TD learning, the loss falls in the direction
      the parameters are moving. Noise is the mean distance of successive losses.
    * Likewise, if the network has died, as where all ReLUs of a layer are below 0: in
      the last 16 steps fewer than a third of the leaves that had gradients since the
      snapshot still have any that are not 0.
3. The batches cannot be at fault each time, so the data have changed, or the parameters
   are bad. To find out, the parameters go back to the older snapshot, and up to two
   batches are tried there. That snapshot is 50 to 100 healthy steps old, or from the
   last return or the start of the run.
4. If at least half of the excess, or of the rise, is gone in both, the run goes on from
   the snapshot. That is a rollback. After a death the leaves have to live there, at a
   loss of at most twice the present level. Otherwise the parameters come back as they
   were, and the explosions are accepted. The first may have any loss. The next ones may
   have up to ten times the loss of before the trial, and twice once a step was healthy.
   A larger one, third or later in its row, starts another trial. The state of the
   optimizer stays in either case: the exploded steps were skipped, so it has not seen
   them.
5. With `cool_down` a rollback also sets a factor for the updates. It sets none if the
   loss is above its limit at the snapshot too and nothing had died: then the data have
   changed. Before step 64 the factor is `cool_down`, and later too if no known level of
   the loss was below the first one and the last are a fifth above it. Else it is the
   larger of `cool_down` and 1/16, or `cool_down` if it is at most 1/16 already. Each
   cut within 300 steps of another divides it by 8, to `cool_down` or less, but not
   below 1/4096. Each healthy step multiplies it by `recovery`, up to 1.
6. If the parameters are NaN, the run is given up at once.

`rollback="host"` does the same with the snapshots in the memory of the host, so that
the device keeps none. A snapshot travels to the host every 50 healthy steps and where a
trial starts. One travels back in each step of a trial, in steps with non-finite
gradients, and, if the loss has risen, in up to 16 steps before a snapshot is due. It
needs JAX 0.10, and has been run on CPUs only. A state that is read from a checkpoint
has to be put on the host too, or `update` raises an error that says how.

With `cool_down` but without `rollback`, the third explosion in a row multiplies the
updates that follow by `cool_down`.

`stabilize(optimizer)` is
`skip_explosions(optimizer, rollback=True, cool_down=1/64, recovery=1.002)`.

## What to do when it fires

`explain(opt_state, params)` says in words what happened; see
`help(optaxclip.reporting)`.

| what you see | what to do |
|---|---|
| one explosion, then 64 healthy steps | nothing: a bad batch, or a false alarm |
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
a finite explosion that `detect_explosions` noticed: for that, read the metric
`explosions/is_exploded`. It waits for the step to end, so call it every few steps.

## In your trainer

| what | how |
|---|---|
| order | `stabilize` around all that makes updates or averages gradients |
| the loss | `tx.update(grads, opt_state, params, value=loss)` |
| accumulation | `stabilize(optax.MultiSteps(optimizer, 4))` |
| masks | around `optax.masked` it watches all leaves, inside the chosen ones |
| schedules | inside: they count only the steps that were taken |
| hyperparameters by hand | `optax.inject_hyperparams` inside: a rollback leaves them |

**Order.** A rollback is an update, so nothing may change it afterward. `metrics` counts
rollbacks that something changed as `explosions/num_blocked_rollbacks`. Put nothing that
averages gradients in front, such as `optax.trace`, `ema` or `apply_every`: it would
hold the NaN of one bad batch for good. Every later step would be skipped, and
`raise_if_exploded` would be silent until the 100th.

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
>>> _, state = train(tx, returns)  # the `tx` at the top
>>> assert count(state, "num_rollbacks") == 1
>>> behind = optax.chain(optaxclip.stabilize(optax.scale_by_adam()), optax.scale(-1e-3))
>>> _, state = train(behind, returns)
>>> assert count(state, "num_blocked_rollbacks") == 1
>>> in_front = optax.chain(optax.trace(0.9), optaxclip.stabilize(optax.sgd(0.1)))
>>> params, state = train(in_front, [jnp.nan, 1.0, 1.0])
>>> assert len(optaxclip.skipped_steps(state)) == 3
>>> optaxclip.raise_if_exploded(state, params)  # silent

```

**The loss.** Where a framework calls `update(grads, state)` itself, use
`stabilize(optimizer, rollback=False)`: it needs neither the loss nor the parameters.

**Accumulation, masks, schedules.** With `stabilize` around `optax.MultiSteps`, only the
bad micro-batch is lost. Inside it, NaN would stay in the accumulated gradients, which
`raise_if_exploded` reports, unless `optax.skip_not_finite` keeps it out.

```python
>>> around = optaxclip.stabilize(optax.MultiSteps(optax.sgd(0.1), 4))
>>> inside = optax.MultiSteps(
...     optaxclip.stabilize(optax.sgd(0.1)), 4,
...     should_skip_update_fn=optax.skip_not_finite,
... )
>>> for accumulate in (around, inside):
...     print(train(accumulate, [1.0, jnp.nan, 1.0, 1.0, 1.0])[0]["w"])
[-0.1 -0.1]
[-0.1 -0.1]
>>> optimizer, bad = optax.sgd(lambda count: 0.1 / (1 + count)), [1.0, jnp.nan, 1.0]
>>> _, state = train(optaxclip.stabilize(optax.masked(optimizer, {"w": False})), bad)
>>> assert len(optaxclip.skipped_steps(state)) == 1
>>> assert optax.tree.get(state, "count") == 2
>>> _, state = train(optax.masked(optaxclip.stabilize(optimizer), {"w": False}), bad)
>>> assert not optaxclip.skipped_steps(state)

```

**Hyperparameters by hand.** A rollback leaves what was set, a number or an array.

```python
>>> by_hand = optaxclip.stabilize(optax.inject_hyperparams(optax.sgd)(0.1))
>>> _, state = train(by_hand, [1.0] * 4)
>>> state["explosions"].inner_state.hyperparams["learning_rate"] = 0.01
>>> _, state = train(by_hand, returns[4:], state)
>>> assert count(state, "num_rollbacks") == 1
>>> print(state["explosions"].inner_state.hyperparams["learning_rate"])
0.01

```

**A run saved without `stabilize`.** Put the state of its optimizer into `inner_state`.
The first snapshot is of the parameters that the first step is given.

```python
>>> saved = optax.adam(1e-3).init({"w": jnp.zeros(2)})
>>> tx = optaxclip.stabilize(optax.adam(1e-3))
>>> state = tx.init({"w": jnp.zeros(2)})
>>> state["explosions"] = state["explosions"]._replace(inner_state=saved)

```

## What it cannot do

* It does not help where nothing explodes and training is merely bad, as after a poor
  initialization. There `max_norm=` adds a fixed clip.
* A loss that rises slowly is noticed only when a snapshot is due, if the loss was
  positive at the older one and is at least half of the first loss. A loss that was
  never negative is also noticed at eight times its lowest level.
* A network that dies is noticed only when a snapshot is due, by gradients of exactly 0,
  and mended only if it still lived at the older one.
* It needs the loss. Without it, a rollback is judged by the norm alone.
* A rollback keeps two copies of the parameters, on the device or on its host.
* It raises false alarms: 8 in 10,000 healthy steps (1 to 21) of 72 recorded runs that
  it was not tuned on. It notices 93.1 % of the explosions there (86.9 to 99.1). Run
  `python tests/benchmarks/detection.py --split heldout` (x86-64, JAX 0.10.2,
  2026-11-28).
* On 14 tasks on which no number was chosen, it failed to save 7 % of 14 exploding runs
  (1 to 31), and harmed none of 28 healthy ones (0 to 12 %). On all 193 tasks it fails
  to save 8 % of 161 runs, and harms 4 of 299, in one or two seeds of four each.
  `tests/benchmarks/README.md` names them.
* It may take back a run that has nothing more to learn and whose loss is noise:
  `python tests/benchmarks/plateau.py` counts how often.
* It mistakes rare but important batches for explosions. If few batches hold a positive
  of large weight, or a reward, the first of them are skipped, unless only their norm is
  above its limit. All of them are skipped if they come less often than every 64 steps,
  or have a norm of more than ten times its limit. Look at `skipped_steps`, and turn the
  rules off there with `norm=None, loss=None`.
"""

from optaxclip.explosions.detecting import detect_explosions as detect_explosions
from optaxclip.explosions.skipping import skip_explosions as skip_explosions
from optaxclip.explosions.stabilizing import stabilize as stabilize
from optaxclip.explosions.state import DetectExplosionsState as DetectExplosionsState
from optaxclip.explosions.state import SkipExplosionsState as SkipExplosionsState
