"""How to clip: bring the norm of updates to a limit, or cut single elements.

```python
>>> import jax, jax.numpy as jnp, optax, optaxclip
>>> tx = optax.chain(optaxclip.clip_by_norm(1.0), optax.adam(1e-3))
>>> clip = optaxclip.clip_by_value(1.0, min_value=-0.5)
>>> updates, _ = clip.update(jnp.array([-2.0, 0.25, 3.0]), clip.init(None))
>>> print(updates)
[-0.5   0.25  1.  ]

```

| I want to | use |
|---|---|
| clip all gradients together by their norm | `clip_by_norm(1.0)` |
| clip each array | `clip_by_norm(1.0, per="leaf")` |
| clip each output unit | `clip_by_norm(1.0, per="unit")` |
| clip each group of layers | `clip_by_norm(1.0, per=lambda name: ...)` |
| clip by another norm | `clip_by_norm(1.0, ord=1)`, `ord=math.inf` |
| clip each element | `clip_by_value(1.0)` |
| clip the singular values of matrices | `clip_by_spectral_norm(1.0)` |
| clip attention logits (QK-clip) | `scale_params()`, see below |
| change the limit while training | `clip_by_norm(schedule)` |
| clip without choosing a threshold | `zclip()`, `autoclip()`, `adagc()` |
| clip in proportion to the weights | `agc()` |
| clip in proportion to the size of an array | `block_rms()` |
| combine a learned limit with a scope | `clip_by_norm(limits.zscore(), per="leaf")` |
| clip smoothly | `clip_by_norm(1.0, respond="soft")` |
| set the norm, also where it is small | `clip_by_norm(1.0, respond="set")` |
| keep the norm in a band | `clip_by_norm(2.0, min_norm=0.5)`, `aggc(0.5, 2.0)` |
| give each gradient a steady norm | `gradient_stabilizer()` |
| clip each leaf, and all together | `limits.with_global(1.0, 5.0)`, `per="leaf"` |
| clip each layer or expert of a stacked array | `stacked=...`, see below |
| leave some leaves out, as before Muon | `clip_by_norm(1.0, where=...)`, see below |
| clip elements by their own past | `spam()` |
| shrink updates while Adam's second moments lag | `stable_adam(optax.adamw(1e-3))` |
| clip updates, behind the optimizer | `clip_by_historical_norm()`, `block_rms()` |

The bounds of `clip_by_value` may be schedules as well.

## What becomes of a norm

Limit and response are independent: any limit goes with any response, with one
exception. The second limit of `with_global` does not hold with "set" or `min_norm`.

| `respond` | norm n with the limit c becomes | at n = c | for |
|---|---|---|---|
| `"cap"` | min(n, c) | c | rare outliers; a healthy update is not touched |
| `"cap"`, `min_norm=b` | max(b, min(n, c)) | c | norms that also get too small |
| `"soft"` | n c / (n + c) | c / 2 | a smooth clip; every update is scaled |
| `"set"` | c | c | normalized updates; every update is scaled |

```python
>>> grads = {"small": jnp.array([0.3, 0.4]), "large": jnp.array([30.0, 40.0])}
>>> for options in [{}, {"min_norm": 0.8}, {"respond": "soft"}, {"respond": "set"}]:
...     clip = optaxclip.clip_by_norm(1.0, per="leaf", **options)
...     updates, _ = clip.update(grads, clip.init(grads))
...     norms = optaxclip.leaf_norms(updates)
...     print(options, [round(float(x), 2) for x in norms])
{} [1.0, 0.5]
{'min_norm': 0.8} [1.0, 0.8]
{'respond': 'soft'} [0.98, 0.33]
{'respond': 'set'} [1.0, 1.0]

```

An update that is zero stays zero. A limit of +inf, as in a warm-up, leaves the update
as it is, and so does a lower bound of +inf. All responses cost the same: one read of
the updates, and one multiplication that XLA fuses into the optimizer. "set" and
`min_norm` enlarge updates, and in float16 an element may overflow.

## Before Muon

Muon orthogonalizes the update of each matrix, so its gradient may have any scale. In a
global norm that scale harms the other leaves. A matrix with a gradient of 1e10 makes
the gradient of an embedding 1e10 times smaller, far below the `eps` of its Adam, and
the embedding no longer learns. Clip the other leaves alone:

```python
>>> is_matrix = lambda name: name.endswith("kernel")
>>> tx = optax.chain(
...     optaxclip.clip_by_norm(1.0, where=lambda name: not is_matrix(name)),
...     optax.contrib.muon(1e-2),
... )
>>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
>>> grads = {"kernel": jnp.full((2, 2), 1e10), "bias": jnp.array([0.6, 0.8])}
>>> updates, state = tx.update(grads, tx.init(params), params)
>>> print(state[0]["clip"].norm.round(3))
1.0

```

## Edge cases: non-finite, zero, or too large

For each scope by itself, the first row that fits decides the result of `clip_by_norm`:

| update | result |
|---|---|
| NaN or inf in it | they become NaN, and the finite elements 0 |
| limit negative or NaN | `ValueError` for a Python number, zeros if traced |
| norm 0, norm <= limit, or limit +inf | unchanged, bit for bit |
| limit 0 | zeros |
| any other, however large or small | scaled to the limit |

How exact is the result?

| what | float32 | bfloat16 | float16 |
|---|---|---|---|
| true norm after the clip, at most limit times | 1 + 1e-6 | 1 + 2^-8 | 1 + 2^-11 |

| elements of a clipped update (float32, CPU) | a few | 17 | 1000 |
|---|---|---|---|
| rounded to within, in units in the last place | 2 | 3 | 4 |

The errors in the second table come from the rounding of the sum of squares.

* NaN and inf do no damage outside of their scope, and stay visible.
* "Unchanged" has one exception: subnormal elements may become 0.
* A norm that exceeds its limit by at most four roundings (4 x 1.2e-7 in float32) is
  left alone. So a second clip changes nothing.
* A norm beyond the largest float reads as the largest float.
* `clip_by_value` turns +inf and -inf into the bounds. NaN stays NaN.
* Leaves that are not gradients pass through untouched: integers, bools, keys, `None`,
  `optax.MaskedNode`, float0, arrays without elements, and leaves that are not arrays.
* The clip can be differentiated. At a zero gradient its Jacobian is the identity.

```python
>>> clip = optaxclip.clip_by_norm(1.0, per="leaf")
>>> grads = {"a": jnp.array([jnp.inf, 2.0]), "b": jnp.array([3.0, 4.0])}
>>> updates, state = clip.update(grads, clip.init(grads))
>>> print(updates["a"], updates["b"].round(3), state["clip"].num_nonfinite)
[nan  0.] [0.6 0.8] [1 0]

```

## Coming from elsewhere

From PyTorch, with `u` for `torch.nn.utils`:

| there | here |
|---|---|
| `u.clip_grad_norm_(params, 1.0)` | `clip_by_norm(1.0)` |
| `u.clip_grad_norm_(params, 1.0, norm_type=p)` | `clip_by_norm(1.0, ord=p)` |
| `u.clip_grad_value_(params, 1.0)` | `clip_by_value(1.0)` |
| PyPI `zclip`: `ZClip(max_grad_norm=None)` | `zclip()` |
| `ZClip()`, whose default cap is 1.0 | `zclip(max_norm=1.0)` |
| PyPI `autoclip`: `QuantileClip(quantile=0.1, ...)` | `autoclip(10)` |
| `pytorch_optimizer`: `AdaGC` | `optax.chain(adagc(), optax.adamw(...))` |

The row of `autoclip` assumes `QuantileClip(quantile=0.1, global_threshold=True)`.

From TensorFlow and Keras:

| there | here |
|---|---|
| `tf.clip_by_global_norm(grads, 1.0)` | `clip_by_norm(1.0)` |
| `tf.clip_by_norm(grad, 1.0)` for each | `clip_by_norm(1.0, per="leaf")` |
| `tf.clip_by_value(grad, -1.0, 1.0)` for each | `clip_by_value(1.0)` |
| Keras `global_clipnorm=1.0` | `clip_by_norm(1.0)` |
| Keras `clipnorm=1.0` | `clip_by_norm(1.0, per="leaf")` |
| Keras `clipvalue=1.0` | `clip_by_value(1.0)` |

From Optax and its users:

| there | here |
|---|---|
| `optax.clip_by_global_norm(1.0)` | `clip_by_norm(1.0)` |
| `optax.clip(1.0)` | `clip_by_value(1.0)` |
| `optax.adaptive_grad_clip(0.01)` | `agc(0.01)` |
| `optax.clip_by_block_rms(1.0)` | `block_rms(1.0)` |
| `optax.global_norm(grads)`, `optax.tree.norm(grads)` | `global_norm(grads)` |
| Levanter `clip_update_by_historical_norm` | `clip_by_historical_norm()` |

Rules that skip steps:

* `optax.apply_if_finite(optimizer, 5)`:
  `skip_explosions(optimizer, norm=None, share=None, loss=None)`. Optax applies the
  non-finite step in the end; this does not.
* OLMo, Levanter and MaxText skip steps above 6 standard deviations:
  `skip_explosions(optimizer)`. For exactly that rule, add
  `norm=limits.window_sigma(6), loss=limits.window_sigma(6)`.
* axlearn `skip_and_clip_by_global_norm`:
  `skip_explosions(optax.chain(clip_by_norm(1.0), optimizer))`.

## The global norm around a partition

Inside `optax.partition` and `optax.masked` a transformation sees only the leaves that
they let through, and its norm is over these alone. Before the partition it sees all:

```python
>>> tx = optax.chain(
...     optaxclip.clip_by_norm(1.0),
...     optax.partition(
...         {"fast": optax.sgd(1.0), "slow": optax.sgd(0.5)}, {"a": "fast", "b": "slow"}
...     ),
... )
>>> grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
>>> updates, state = tx.update(grads, tx.init(grads))
>>> print(updates["a"].round(3), updates["b"].round(3))
[-0.6] [-0.4]

```

## Singular values, and SPECTRA

How far the update of a matrix can move activations is its largest singular value. Its
Frobenius norm says little about that. `clip_by_spectral_norm` caps each singular value
at the limit, and keeps all that are below it. After the optimizer, it bounds the
update:

```python
>>> tx = optax.chain(optax.adam(1.0), optaxclip.clip_by_spectral_norm(1.0))
>>> params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
>>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
>>> print(jnp.linalg.norm(updates["kernel"], 2).round(2), updates["bias"].round(2))
1.0 [-1. -1. -1. -1.]

```

SPECTRA ([2603.14315](https://arxiv.org/abs/2603.14315)) is the same with `smooth=True`
and a limit of 10, before the learning rate. By default SPECTRA clips vectors as well;
here add `clip_by_norm(10.0, per="leaf", where=...)` for them.

## QK-clip

`scale_params` multiplies parameters by factors that the training step computes. In
QK-clip ([2507.20534](https://arxiv.org/abs/2507.20534)) the factors bring the largest
attention logit of each head down to 100. The factor of a head is
`min(1, 100 / max_logit)`; its queries and its keys are each multiplied by the root. The
forward pass returns the largest logits `[heads]`, over the batch and all devices. Put
`scale_params` last in the chain.

```python
>>> def factors_of(max_logits):
...     root = jnp.sqrt(jnp.minimum(1, 100 / max_logits))[:, None]
...     return {"attention/query": root, "attention/key": root}
>>> tx = optax.chain(optax.sgd(0.1), optaxclip.scale_params())
>>> kernels = {name: jnp.ones((4, 2, 3)) for name in ("query", "key", "value")}
>>> params = {"attention": kernels}  # [width, heads, size of a head]
>>> grads = optax.tree.zeros_like(params)
>>> factors = factors_of(jnp.array([50.0, 400.0]))
>>> updates, _ = tx.update(grads, tx.init(params), params, factors=factors)
>>> params = optax.apply_updates(params, updates)
>>> print(*(x[0, :, 0] for x in params["attention"].values()))
[1.  0.5] [1.  0.5] [1. 1.]

```

With multi-head latent attention the roots scale the parts without rotary positions. The
rotary part of the queries is scaled by the whole factor, and the rotary part of the
keys is not scaled, because the heads share it.

## Stacked layers

A model whose layers run in `lax.scan` holds each parameter of all layers in one array,
stacked along axis 0. `stacked=` names these leaves, and each layer is clipped by
itself. Each expert of an array `[layers, experts, in, out]` needs its own limit: there
the function returns 2, the number of stacked axes.

```python
>>> is_stacked = lambda name: name.startswith("layers/")
>>> clip = optaxclip.clip_by_norm(1.0, per="leaf", stacked=is_stacked)
>>> grads = {"layers": {"kernel": jnp.array([[3.0, 4.0], [0.3, 0.4]])}}
>>> updates, state = clip.update(grads, clip.init(grads))
>>> norms = optaxclip.leaf_norms(updates, stacked=is_stacked)
>>> print(state["clip"].norm, norms.round(3))
[5.  0.5] [1.  0.5]

```
"""

from optaxclip.clipping.by_norm import ClipByNormState as ClipByNormState
from optaxclip.clipping.by_norm import clip_by_norm as clip_by_norm
from optaxclip.clipping.by_value import ClipByValueState as ClipByValueState
from optaxclip.clipping.by_value import clip_by_value as clip_by_value
from optaxclip.clipping.elementwise import SpamState as SpamState
from optaxclip.clipping.elementwise import spam as spam
from optaxclip.clipping.methods import adagc as adagc
from optaxclip.clipping.methods import agc as agc
from optaxclip.clipping.methods import autoclip as autoclip
from optaxclip.clipping.methods import zclip as zclip
from optaxclip.clipping.normalizing import aggc as aggc
from optaxclip.clipping.normalizing import gradient_stabilizer as gradient_stabilizer
from optaxclip.clipping.scaling import scale_params as scale_params
from optaxclip.clipping.second_moments import stable_adam as stable_adam
from optaxclip.clipping.spectral import clip_by_spectral_norm as clip_by_spectral_norm
from optaxclip.clipping.updates import block_rms as block_rms
from optaxclip.clipping.updates import (
    clip_by_historical_norm as clip_by_historical_norm,
)
