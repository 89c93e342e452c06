"""Eight devices give what one gives, with the contract's number of all-reduces."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip

pytestmark = pytest.mark.usefixtures("quick_by_default")

PERS = {
    "tree": "tree",
    "leaf": "leaf",
    "unit": "unit",
    "group": lambda name: "ab" if name in "ab" else "rest",
}
SPECS = {
    "a": P("x", "y"),
    "b": P(),
    "c": P(None, "x"),
    "d": P(None, ("x", "y")),
    "e": P("y"),
}


def tree(scale=1.0, dtype=jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"a": (8, 4), "b": (6,), "c": (3, 4, 2), "d": (2, 8), "e": (4, 3)}
    return {
        name: jnp.asarray(rng.standard_normal(shape) * scale, dtype)
        for name, shape in shapes.items()
    }


def mesh_of(axis_type):
    axis_types, devices = (axis_type,) * 2, jax.devices("cpu")[:8]
    return jax.make_mesh((4, 2), ("x", "y"), axis_types, devices=devices)


def place(mesh, values, specs=SPECS) -> dict[str, Any]:
    return {
        k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in values.items()
    }


def state_specs(per, state) -> Any:
    """Replicated; per unit sharded as the last axis of each leaf is."""
    specs = jax.tree.map(lambda _: P(), state)
    if per != "unit":
        return specs
    units = P("y"), P(), P(), P(("x", "y")), P()
    return {
        "clip": specs["clip"]._replace(
            norm=units, limit=units, num_clipped=units, num_nonfinite=units
        )
    }


def assert_same(found, expected):
    chex.assert_trees_all_close(
        jax.device_get(found), jax.device_get(expected), rtol=1e-6, atol=1e-6
    )


def all_reduces(compiled) -> int:
    """Of a healthy step: those outside of the rescue, which is a loop's body."""
    text = compiled.as_text()
    assert "all-gather" not in text
    entry = text[text.index("ENTRY") :]
    return len(re.findall(r" all-reduce(?:-start)?\(", entry))


@pytest.mark.parametrize(
    ("per", "axis_type"),
    [
        ("tree", AxisType.Auto),
        ("leaf", AxisType.Explicit),
        *(
            pytest.param(per, axis_type, marks=pytest.mark.slow)
            for per, axis_type in (
                ("unit", AxisType.Auto),
                ("leaf", AxisType.Auto),
                ("group", AxisType.Auto),
                ("tree", AxisType.Explicit),
                ("unit", AxisType.Explicit),
                ("group", AxisType.Explicit),
            )
        ),
    ],
)
def test_jit_with_sharded_arrays(per, axis_type):
    clip = optaxclip.clip_by_norm(1.0, per=PERS[per])
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        values = place(mesh, tree())
        state = jax.jit(clip.init)(values)
        compiled = jax.jit(clip.update).lower(values, state).compile()
        updates, new_state = compiled(values, state)
    assert_same((updates, new_state), jax.jit(clip.update)(tree(), clip.init(tree())))
    for name, update in updates.items():
        assert update.sharding.is_equivalent_to(values[name].sharding, update.ndim)
    # XLA reduces a leaf that is sharded along two axes over one mesh axis at a time,
    # and merges: over x, over y, and over both for "d".
    assert all_reduces(compiled) <= 3


@pytest.mark.parametrize("per", ["tree", "leaf"])
def test_one_all_reduce_per_set_of_mesh_axes_under_jit(per):
    specs = {"a": P("x"), "b": P(), "c": P(None, "x"), "d": P(None, "x"), "e": P("y")}
    clip = optaxclip.clip_by_norm(1.0, per=per)
    mesh = mesh_of(AxisType.Auto)
    values = place(mesh, tree(), specs)
    compiled = jax.jit(clip.update).lower(values, clip.init(values)).compile()
    assert all_reduces(compiled) == 2


@pytest.mark.parametrize(
    ("per", "check_vma"),
    [
        ("tree", False),
        ("group", False),
        *(
            pytest.param(per, check_vma, marks=pytest.mark.slow)
            for per, check_vma in (
                ("tree", True),
                ("unit", False),
                ("unit", True),
                ("group", True),
                ("leaf", False),
                ("leaf", True),
            )
        ),
    ],
)
def test_shard_map(per, check_vma):
    """Sharded and replicated leaves mixed: healthy, huge, tiny and not finite."""
    clip = optaxclip.clip_by_norm(1.0, per=PERS[per], specs=SPECS)
    plain = optaxclip.clip_by_norm(1.0, per=PERS[per])
    mesh = mesh_of(AxisType.Auto)
    state = plain.init(tree())
    in_state = state_specs(per, state)
    update = jax.jit(
        jax.shard_map(
            clip.update,
            mesh=mesh,
            in_specs=(SPECS, in_state),
            out_specs=(SPECS, in_state),
            check_vma=check_vma,
        )
    )
    expected = jax.jit(plain.update)
    compiled = update.lower(place(mesh, tree()), state).compile()
    # {x, y} for "a" and "d", x for "c", y for "e"; per unit x for "a", "c" and y for
    # "e", and one more to agree on the rescue.
    assert all_reduces(compiled) <= 3
    nan = tree() | {"d": tree()["d"].at[1, 7].set(jnp.nan)}
    for values in (tree(), tree(1e30), tree(1e-30), tree(1e-3), nan):
        assert_same(update(place(mesh, values), state), expected(values, state))


@pytest.mark.slow
@pytest.mark.parametrize("ord", [1, 3, float("inf")])
def test_other_orders_in_shard_map(ord):
    def norms(values):
        return (
            optaxclip.global_norm(values, ord=ord, specs=SPECS),
            optaxclip.leaf_norms(values, ord=ord, specs=SPECS),
        )

    mesh = mesh_of(AxisType.Auto)
    found = jax.jit(jax.shard_map(norms, mesh=mesh, in_specs=(SPECS,), out_specs=P()))(
        place(mesh, tree())
    )
    expected = (
        optaxclip.global_norm(tree(), ord=ord),
        optaxclip.leaf_norms(tree(), ord=ord),
    )
    assert_same(found, expected)


def test_the_same_norm_on_local_shards_without_specs_would_be_wrong():
    mesh = mesh_of(AxisType.Auto)
    local = jax.shard_map(
        lambda x: optaxclip.global_norm(x)[None],
        mesh=mesh,
        in_specs=(P(("x", "y")),),
        out_specs=P(("x", "y")),
    )(jnp.ones(16))
    np.testing.assert_allclose(local, np.full(8, np.sqrt(2)), rtol=1e-6)


def test_a_recorder_of_local_shards_without_specs_sees_each_device_alone():
    tx: Any = optaxclip.record("here", window=2)

    def last_norms(x):
        _, state = tx.update({"a": x, "b": 2 * x}, tx.init({"a": x, "b": x}), None)
        return state["here"].rows[:1, -2:]

    mesh, spec = mesh_of(AxisType.Auto), P(("x", "y"))
    found = jax.jit(
        jax.shard_map(last_norms, mesh=mesh, in_specs=(spec,), out_specs=spec)
    )(jnp.arange(8.0))
    expected = np.arange(8)[:, None] * [1, 2]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_gradient_through_a_norm_in_shard_map():
    mesh = mesh_of(AxisType.Auto)
    norm = jax.shard_map(
        lambda values: optaxclip.global_norm(values, specs=SPECS),
        mesh=mesh,
        in_specs=(SPECS,),
        out_specs=P(),
    )
    found = jax.jit(jax.grad(norm))(place(mesh, tree()))
    assert_same(found, jax.grad(optaxclip.global_norm)(tree()))


def test_a_training_run_inside_shard_map():
    mesh = mesh_of(AxisType.Auto)
    clip: Any = optaxclip.clip_by_norm(1.0, specs=SPECS)

    def run(values):
        def body(state, _):
            _, state = clip.update(values, state)
            return state, None

        return jax.lax.scan(body, clip.init(values), length=3)[0]["clip"].num_clipped

    found = jax.shard_map(run, mesh=mesh, in_specs=(SPECS,), out_specs=P())
    assert jax.jit(found)(place(mesh, tree())) == 3


@pytest.mark.slow
def test_specs_may_be_a_prefix_and_cover_masked_subtrees():
    mesh = mesh_of(AxisType.Auto)
    values = {"deep": {"u": jnp.ones(8), "v": jnp.ones((8, 2))}, "rest": jnp.ones(8)}
    specs = {"deep": P("x"), "rest": P()}
    full = {"deep": {"u": P("x"), "v": P("x")}, "rest": P()}
    masked = {"deep": optax.MaskedNode(), "rest": jnp.ones(8)}

    def norm(specs, values):
        return jax.shard_map(
            lambda values: optaxclip.global_norm(values, specs=specs),
            mesh=mesh,
            in_specs=({"deep": P("x"), "rest": P()},),
            out_specs=P(),
        )(values)

    for some in (specs, full):
        np.testing.assert_allclose(norm(some, values), np.sqrt(32), rtol=1e-6)
        np.testing.assert_allclose(norm(some, masked), np.sqrt(8), rtol=1e-6)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"a": P("x"), "b": None}, "'b'.*None"),
        ({"a": P("x")}, "'b'"),
        ({"a": P("z"), "b": P()}, "'z'"),
    ],
)
def test_bad_specs(specs, message):
    mesh = mesh_of(AxisType.Auto)
    values = {"a": jnp.ones(8), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=message):
        jax.shard_map(
            lambda values: optaxclip.global_norm(values, specs=specs),
            mesh=mesh,
            in_specs=({"a": P("x"), "b": P()},),
            out_specs=P(),
        )(values)


def test_layers_that_are_sharded_over_devices():
    mesh = mesh_of(AxisType.Auto)
    with pytest.raises(ValueError, match="'a' is sharded over its layers"):
        jax.shard_map(
            lambda values: optaxclip.leaf_norms(
                values, specs=P("x"), stacked=lambda name: True
            ),
            mesh=mesh,
            in_specs=(P("x"),),
            out_specs=P(),
        )({"a": jnp.ones((8, 2))})


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.slow
def test_a_sharded_run_goes_on_from_its_checkpoint(axis_type, tmp_path):
    mesh = mesh_of(axis_type)
    tx: Any = optaxclip.stabilize(optax.chain(optaxclip.zclip(), optax.adam(0.1)))

    def step(run, size):
        params, state = run
        gradients = jax.tree.map(lambda x: size * x, params)
        updates, state = tx.update(gradients, state, params, value=size)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh), ocp.StandardCheckpointer() as checkpointer:
        params = place(mesh, tree())
        shardings = {x.shape: x.sharding for x in params.values()}
        everywhere = NamedSharding(mesh, P())
        start = params, tx.init(params)
        start = jax.tree.map(
            lambda x: jax.device_put(x, shardings.get(x.shape, everywhere)), start
        )
        placed = jax.tree.map(lambda x: x.sharding, start)
        step = jax.jit(step, out_shardings=placed)
        saved = functools.reduce(step, jnp.array([1.0, 1.2, 50.0]), start)
        expected = functools.reduce(step, jnp.array([50.0, 0.9, 50.0]), saved)
        checkpointer.save(tmp_path / "saved", saved)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, start)
        restored = checkpointer.restore(tmp_path / "saved", like)
        assert jax.tree.map(lambda x: x.sharding, restored) == placed
        found = functools.reduce(step, jnp.array([50.0, 0.9, 50.0]), restored)
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(expected))
