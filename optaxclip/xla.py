"""What is written so only for the compiler. Internal.

Each docstring names the test that is red without it, on XLA's CPU compiler, or says
that there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from optaxclip.numerics import where


def materialize(x: jax.Array) -> jax.Array:
    """The numbers or flags themselves.

    XLA computes again what is cheap in every loop that reads it, but no division: with
    one flag for all elements there was a quarter less of `stabilize` to compile. Test:
    `test_stabilize_decides_once_for_all_elements`.
    """
    if x.dtype == bool:
        return materialize(x.astype(jnp.float32)) > 0
    return x / where(jnp.isnan(x), 2, jnp.ones_like(x))


def put_scalars(array: jax.Array, values: Mapping[int, jax.Array]) -> jax.Array:
    """The array `[n]` with single numbers in their places.

    Test: `test_what_is_packed_is_one_kernel`.
    """
    # Selects fuse with what reads the array; a concatenation is a kernel of its own.
    # Their flags are known while tracing: half as many operations to compile.
    place = np.arange(len(array))
    for i, x in values.items():
        array = lax.select(place == i, lax.broadcast(x, array.shape), array)
    return array


def store(x: jax.Array) -> jax.Array:
    """The array as it is, which XLA stores before anything reads it.

    It makes a chain of additions of a sum of numbers that lie apart, and on CPU takes
    time cubic in their number to fuse it: `_MOST_FUSED` in `norms/scopes.py` has the
    figures. Test: `test_norm_of_many_leaves_is_not_one_chain_of_additions`.
    """
    return lax.optimization_barrier(x)


def read_apart(x: jax.Array, reader: Literal["norm", "clip", "slope"]) -> jax.Array:
    """The array as it is; what a reader makes of it is shared with no other one.

    XLA would else store what both can use: the squares for a norm and an optimizer, a
    bfloat16 leaf in float32 for a norm and its clip, or a difference for its norm and
    its slope. Tests, red without the first two or with two that are equal:
    `test_bfloat16_gradients_are_not_kept_in_float32`; without the third:
    `test_stabilize_stores_nothing_for_every_element`.
    """
    # XLA merges two barriers that are equal: the 0 makes them differ.
    if reader == "norm":
        return lax.optimization_barrier((x, np.float32(0)))[0]
    return lax.optimization_barrier(x)


def tie_both(x: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as they are, in a loop that makes the factor: each known with the other.

    XLA would else convert the array before the loop, in every healthy step, and store
    one array of the factor for each shape, 6 % of the gradients of a GPT-2 of 12
    layers. Tests: `test_norm_keeps_no_copy_of_the_gradients` and the one after it.
    """
    x, factor = lax.optimization_barrier((x, factor))
    return x, factor


def repeat_while(
    condition: Callable[[Any], jax.Array], function: Callable[[Any], Any], start: Any
) -> Any:
    """`start`, replaced by its function as long as the condition holds; free if not.

    A loop also where it has one turn: `vmap` would run both sides of a `cond`. Test:
    `test_norm_branches_once_for_all_leaves`.
    """
    return lax.while_loop(condition, function, start)


def run_if(
    when: jax.Array, function: Callable[[jax.Array, Any], Any], start: Any
) -> tuple[jax.Array, Any]:
    """(False, `function(True, start)` if `when`, else `start`); free if not.

    A `repeat_while` of at most one turn; a select would read and write all. `start` is
    replaced in place if what follows depends on the False, since XLA then runs that
    after the loop. What the function reads besides it has to be tied to the True. Test:
    `test_skipping_stays_in_place`, with `rollback`.
    """

    def body(carry):
        flag, value = carry
        value = function(flag, value)
        return jnp.zeros_like(flag), value

    # The flag is the condition: after one turn it is False.
    return repeat_while(lambda carry: carry[0], body, (when, start))


def after(done: jax.Array, flag: jax.Array) -> jax.Array:
    """The flag as it is, known only after the `run_if` that gave the False `done`.

    Test: as of `run_if`.
    """
    return flag | done


def tie(flag: jax.Array, tree: Any) -> Any:
    """The tree as it is, read in the loop of `run_if` whose flag this is.

    XLA is free to compute what depends on it alone before the loop, on each step. On
    CPU it leaves that in the loop also without this, and no test is red.
    """
    # Each array by itself: together all would vary over the mesh axes of any.
    return jax.tree.map(lambda x: lax.optimization_barrier((flag, x))[1], tree)


def replace_where(when, new, old):
    """(False, `new` if `when`, else `old`): two trees; costs nothing if not.

    What reads `new`, or takes its place, must depend on the False, see `run_if`.
    Derivatives are those of the select. Test: as of `run_if`.
    """

    @jax.custom_jvp
    def choose(when, new, old):
        def replace(flag, old):
            # Nothing but copies, which are not compiled.
            return jax.tree.map(like, tie(flag, new), old)

        return run_if(when, replace, old)

    @choose.defjvp
    def _(primals, tangents):
        when, *_ = primals
        done, chosen = choose(*primals)

        def select(x, y):
            if y.dtype == jax.dtypes.float0:
                return y
            return jnp.where(when, like(x, y), y)

        _, new, old = tangents
        no_tangent: Any = np.zeros(np.shape(done), jax.dtypes.float0)
        return (done, chosen), (no_tangent, jax.tree.map(select, new, old))

    return choose(when, new, old)


def like(x: jax.Array, y: jax.Array) -> jax.Array:
    """The array in the dtype and in the memory of another one.

    Test: `test_nothing_travels_in_a_healthy_step`.
    """
    return put(x.astype(y.dtype), jax.typeof(y).memory_space)


def put(x: jax.Array, memory: Any) -> jax.Array:
    """The array in a `jax.memory.Space`; as it is if it is there.

    Test: `test_nothing_travels_in_a_healthy_step`.
    """
    # JAX marks it as moved even if it stays.
    return x if jax.typeof(x).memory_space == memory else jax.device_put(x, memory)


def reshard(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The array, sharded as told, on a mesh with explicit axes; else as it is.

    There JAX refuses what it would have to move by itself. Test:
    `test_on_a_mesh_with_explicit_axes`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_explicit = AxisType.Explicit in mesh.axis_types
    return jax.sharding.reshard(x, spec) if is_explicit else x


def replicate(x: jax.Array) -> jax.Array:
    """The whole array, on each device of a mesh with explicit axes; else as it is.

    Test: `test_experts_on_eight_devices`.
    """
    return reshard(x, PartitionSpec(*[None] * x.ndim))
