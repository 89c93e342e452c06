"""Parameters scaled by factors at the step, and QK-clip made of it."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optaxclip

SHAPES = {"query": (4, 2, 3), "key": (4, 2, 3), "value": (4, 2, 3), "bias": (5,)}


def trees(dtype: Any = jnp.float32) -> tuple[dict, dict]:
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.standard_normal(s), dtype) for k, s in SHAPES.items()}
    updates = {k: jnp.asarray(x / 100, dtype) for k, x in params.items()}
    return params, updates


def run(updates, params, factors):
    tx: Any = optaxclip.scale_params()
    found, state = jax.jit(tx.update)(updates, tx.init(params), params, factors=factors)
    assert state == optax.EmptyState()
    return found


@pytest.mark.parametrize(
    "dtype",
    [
        jnp.float32,
        *(pytest.param(x, marks=pytest.mark.slow) for x in (jnp.bfloat16, jnp.float16)),
    ],
)
def test_parameters_end_at_the_factor_times_where_they_would_have(dtype):
    params, updates = trees(dtype)
    factor = jnp.array([[0.5], [1.0]])
    found = run(updates, params, {"query": factor, "bias": 2.0})
    for name in ("key", "value"):
        chex.assert_trees_all_equal(found[name], updates[name])
    chex.assert_trees_all_equal(found["query"][:, 1], updates["query"][:, 1])
    chex.assert_trees_all_equal_dtypes(found, updates)
    new: Any = optax.apply_updates(params, found)
    for name, scaled in (("query", factor), ("bias", 2.0)):
        p, u = (np.asarray(x[name], np.float64) for x in (params, updates))
        eps = float(jnp.finfo(dtype).eps)
        # Rounded twice: the update, and the sum of both.
        np.testing.assert_allclose(
            np.asarray(new[name], np.float64),
            np.asarray(scaled) * (p + u),
            atol=2 * eps * np.abs(p).max(),
        )


@pytest.mark.parametrize("factor", [1.0, jnp.nan, jnp.inf, -jnp.inf, 0.0, -2.0])
def test_what_is_no_factor_leaves_the_update_as_it_is(factor):
    params, updates = trees()
    found = run(updates, params, {name: jnp.float32(factor) for name in SHAPES})
    chex.assert_trees_all_equal(found, updates)


def attention_logits(params, x):
    query, key = (jnp.einsum("bsd,dhk->bshk", x, params[n]) for n in ("query", "key"))
    return jnp.einsum("bshk,bthk->bhst", query, key)


def test_qk_clip_brings_the_largest_logit_of_a_head_to_the_threshold():
    params, updates = trees()
    params["query"] = params["query"] * jnp.array([[1.0], [400.0]])
    updates = jax.tree.map(jnp.zeros_like, updates)
    x = jnp.float32(np.random.default_rng(1).standard_normal((8, 6, 4)))
    largest = jnp.abs(attention_logits(params, x)).max((0, 2, 3))
    assert largest[0] < 100 < largest[1]
    root = jnp.sqrt(jnp.minimum(1, 100 / largest))[:, None]
    found = run(updates, params, {"query": root, "key": root})
    new: Any = optax.apply_updates(params, found)
    after = jnp.abs(attention_logits(new, x)).max((0, 2, 3))
    np.testing.assert_allclose(after, [float(largest[0]), 100], rtol=1e-5)
    chex.assert_trees_all_equal(new["value"], params["value"])


@pytest.mark.slow
def test_it_is_last_in_a_chain_and_inside_of_wrappers():
    params, grads = trees()
    factors = {"query": jnp.array([[0.5], [1.0]])}
    mask = {name: name == "query" for name in SHAPES}
    chain = optax.chain(optax.adam(0.1), optaxclip.scale_params())
    adam: Any = optax.adam(0.1)
    plain, _ = adam.update(grads, adam.init(params), params)
    expected: Any = optax.apply_updates(params, plain)
    expected["query"] = expected["query"] * factors["query"]
    for tx in (
        chain,
        optax.chain(adam, optax.masked(optaxclip.scale_params(), mask)),
        optaxclip.skip_explosions(chain),
        optax.MultiSteps(chain, 1).gradient_transformation(),
    ):
        wrapped: Any = tx
        updates, _ = wrapped.update(
            grads, wrapped.init(params), params, value=1.0, factors=factors
        )
        new: Any = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(new, expected, rtol=1e-5, atol=1e-6)


def test_errors():
    params, updates = trees()
    tx: Any = optaxclip.scale_params()
    state = tx.init(params)

    def update(factors, params=params):
        tx.update(updates, state, params, factors=factors)

    with pytest.raises(ValueError, match=r"factors names \['querry'\]; the leaves are"):
        update({"querry": 1.0})
    with pytest.raises(ValueError, match="give params to update"):
        update({"query": 1.0}, None)
    with pytest.raises(TypeError, match="factors must be a dictionary"):
        update(0.5)
    for shape in ((2,), (1, 4, 2, 3), (4, 3, 1)):
        with pytest.raises(ValueError, match="does not broadcast to"):
            update({"query": np.ones(shape)})
    tree = {"step": jnp.int32(3)}
    with pytest.raises(ValueError, match="'step', whose updates are no numbers"):
        tx.update(tree, state, tree, factors={"step": 0.5})


def test_updates_of_some_parameters_may_be_missing():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    for missing in (None, optax.MaskedNode()):
        updates = {"a": missing, "b": jnp.ones(2)}
        tx: Any = optaxclip.scale_params()
        found, _ = tx.update(updates, tx.init(params), params, factors={"b": 0.5})
        np.testing.assert_array_equal(found["b"], [0, 0])


def test_on_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    tx: Any = optaxclip.scale_params()
    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.ones((4, 2)), NamedSharding(mesh, PartitionSpec("x")))
        for factor in (0.5, jnp.full((4, 1), 0.5)):
            found, _ = tx.update({"w": w}, (), {"w": w}, factors={"w": factor})
            np.testing.assert_array_equal(found["w"], np.zeros((4, 2)))
            assert found["w"].sharding.is_equivalent_to(w.sharding, 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_do_what_one_does_and_send_nothing(kind):
    rng = np.random.default_rng(0)
    params = {"query": jnp.float32(rng.standard_normal((8, 4, 6)))}
    updates = {"query": jnp.float32(rng.standard_normal((8, 4, 6)))}
    factors = {"query": jnp.array([[1.0], [0.5], [0.3], [jnp.nan]])}  # of each head
    expected = run(updates, params, factors)
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(kind,) * 3)
    tx: Any = optaxclip.scale_params()
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, PartitionSpec("x", "y", "z"))
        of_heads = NamedSharding(mesh, PartitionSpec("y"))
        updates, params = jax.device_put((updates, params), place)
        for sharding in (of_heads, NamedSharding(mesh, PartitionSpec())):
            given = jax.device_put(factors, sharding)
            step = jax.jit(lambda u, p, f: tx.update(u, (), p, factors=f)[0])
            found = step(updates, params, given)["query"]
            np.testing.assert_array_equal(found, expected["query"])
            assert found.sharding.is_equivalent_to(place, 3)
            hlo = step.lower(updates, params, given).compile().as_text()
            assert "all-" not in (hlo or "all-")
