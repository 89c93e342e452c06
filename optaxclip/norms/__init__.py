"""How large is an update: norms per tree, leaf, unit or group, exact for any input.

```python
>>> import jax.numpy as jnp, optaxclip
>>> grads = {"b": jnp.array([3e30]), "w": jnp.array([[4e30, 0.0]])}
>>> print(optaxclip.global_norm(grads), optaxclip.leaf_norms(grads))
5e+30 [3.e+30 4.e+30]
>>> print(optaxclip.leaf_names(grads))
['b', 'w']

```

## Scopes: what one norm is taken over

A scope is the set of elements that share one norm. The functions here measure each
scope, and every transformation that measures takes the scope as `per=`.

| `per=` | scope | function | shape of the norms |
|---|---|---|---|
| `"tree"` | all leaves together | `global_norm` | `[]` |
| `"leaf"` | each array | `leaf_norms` | `[num_leaves]` |
| `"unit"` | each output unit | `unit_norms` | one array per leaf |
| a function | each group of leaves | `group_norms` | `[num_groups]` |

An output unit is one index of the last axis of a leaf, over all other axes. In layers
of Equinox, whose weights are `[out, in]`, it is one index of the first axis, except in
embeddings. A vector, a scalar or a bias of Equinox is a single unit. `unit_axis=` gives
another axis, for all leaves or by the name of a leaf:

```python
>>> tree = {"w": jnp.array([[3.0, 0.0], [4.0, 0.0]])}
>>> print(optaxclip.unit_norms(tree)["w"])
[5. 0.]
>>> print(optaxclip.unit_norms(tree, unit_axis=lambda name: 0)["w"])
[3. 4.]

```

A function as `per=` maps the name of a leaf to the name of its group:

```python
>>> params = {"rnn": {"hh": jnp.ones((2, 2)), "ih": jnp.ones(5)}, "head": jnp.ones(4)}
>>> layer = lambda name: name.split("/")[0]
>>> print(optaxclip.group_norms(params, layer))
[2. 3.]
>>> print(optaxclip.group_names(params, layer))
['head', 'rnn']
>>> clip = optaxclip.clip_by_norm(1.0, per=layer)
>>> updates, state = clip.update(params, clip.init(params))
>>> print(optaxclip.group_norms(updates, layer).round(3), state["clip"].norm)
[1. 1.] [2. 3.]

```

`ord=` is the order of the norm: any number >= 1, or `math.inf`. It is 2 by default.

```python
>>> import math
>>> tree = {"w": jnp.array([3.0, -4.0])}
>>> print([float(optaxclip.global_norm(tree, ord=p)) for p in (1, 2, math.inf)])
[7.0, 5.0, 4.0]

```

A transformation sees only the updates that reach it. Inside `optax.masked` or
`optax.partition` these are the leaves that the wrapper lets through, and "all leaves"
means those; `help(optaxclip.clipping)` shows how to take the norm of the whole tree.

## Names

A leaf is named by its path: `"rnn/hh/kernel"`. The trailing `/value` of Flax nnx
variables is left out, and a tree that is a single array is called `"array"`.
`leaf_names` gives the names in the order of `jax.tree.leaves`. `group_names` gives the
names of the groups, sorted, which is the order of every array `[num_groups]`.

`stacked=` is a function of a leaf's name. It returns how many leading axes of the leaf
run over layers, as `lax.scan` stacks them, or over layers and experts; True is 1. Each
layer or expert then is a leaf of its own, called `"layers/kernel[0]"` or
`"experts/kernel[0, 5]"`, and `unit_axis=` counts only the axes behind the stacked ones.
Under `jit`, experts may lie on different devices. Inside `shard_map` they may do so
only with `per="unit"`.

A state holds no names of leaves. Functions that read a state take `params`, or any tree
of its structure, to name the leaves; without it they number them.

## What is exact

* A norm is exact to rounding for every finite input in float16, bfloat16, float32,
  float64 and complex. Nothing overflows, underflows or is added up in a narrow dtype,
  however many elements or leaves there are. Complex elements count by their modulus.
* The result is float32, or float64 if a leaf is float64 or complex128.
* A norm beyond the largest float reads as the largest float.
* Subnormal elements may count as zero. `record` and `detect_explosions` scale all
  leaves alike: there, elements under 1e-19 may count as zero, unless the norm of all
  updates is under 2e-10.
* Leaves that are not gradients have norm 0: integers, bools, keys, `None`,
  `optax.MaskedNode`, float0, and arrays without elements.

A norm of inf or NaN means that the input holds inf or NaN.

## What it costs

With `ord` 1 or 2 a healthy step reads the gradients once. If a sum of squares overflows
or underflows, the gradients are scaled, read a second time and summed again: this is
the rescue, in `optaxclip/norms/reduction.py`. A scope whose gradient is exactly zero,
such as a frozen parameter or a dead unit, costs that second read on every step with
`per="leaf"` or `per="unit"`: a true zero must be distinguished from an underflow.
"""

from optaxclip.norms.measuring import global_norm as global_norm
from optaxclip.norms.measuring import group_norms as group_norms
from optaxclip.norms.measuring import leaf_norms as leaf_norms
from optaxclip.norms.measuring import unit_norms as unit_norms
from optaxclip.norms.names import group_names as group_names
from optaxclip.norms.names import leaf_names as leaf_names
