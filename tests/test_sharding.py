"""Eight devices give what one gives, with the contract's number of all-reduces."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip.explosions import COUNTS

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
    assert_same((updates, new_state), clip.update(tree(), clip.init(tree())))
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
        ("unit", True),
        ("group", False),
        *(
            pytest.param(per, check_vma, marks=pytest.mark.slow)
            for per, check_vma in (
                ("tree", True),
                ("unit", False),
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


def all_methods(specs=None) -> dict[str, Any]:
    return {
        "zclip": optaxclip.zclip(1.0, warmup=2, specs=specs),
        "autoclip": optaxclip.autoclip(per="leaf", window=4, specs=specs),
        "adagc": optaxclip.adagc(warmup=2, specs=specs),
        "agc": optaxclip.agc(specs=specs),
        "block_rms": optaxclip.block_rms(0.5, specs=specs),
    }


def after_a_spike(methods, gradients, params):
    """The updates of every method in the last of four steps."""

    def step(run, size):
        spiked = jax.tree.map(lambda x: size * x, gradients)
        for name, clip in methods.items():
            run[name] = clip.update(spiked, run[name][1], params)
        return run, None

    start = {name: (gradients, clip.init(params)) for name, clip in methods.items()}
    run, _ = jax.lax.scan(step, start, jnp.array([1.0, 1.2, 0.8, 30.0]))
    return {name: updates for name, (updates, _) in run.items()}


@functools.cache
def after_a_spike_on_one_device():
    run = jax.jit(functools.partial(after_a_spike, all_methods()))
    return run(tree(), tree(0.1))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("auto", marks=pytest.mark.slow),
        pytest.param("explicit", marks=pytest.mark.slow),
        "shard_map",
    ],
)
def test_methods_do_the_same_on_eight_devices(layout):
    mesh = mesh_of(AxisType.Explicit if layout == "explicit" else AxisType.Auto)
    run = functools.partial(after_a_spike, all_methods())
    if layout == "shard_map":
        run = jax.shard_map(
            functools.partial(after_a_spike, all_methods(SPECS)),
            mesh=mesh,
            in_specs=(SPECS, SPECS),
            out_specs=dict.fromkeys(all_methods(), SPECS),
            check_vma=False,
        )
    with jax.set_mesh(mesh):
        found = jax.jit(run)(place(mesh, tree()), place(mesh, tree(0.1)))
    expected = after_a_spike_on_one_device()
    assert_same(found, expected)
    for updates in expected.values():
        assert optaxclip.global_norm(updates) < 10 * optaxclip.global_norm(tree())


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


NAN, HUGE = "NaN", 50.0
SIZES = [1.0, 1.2, 0.9, 1.1, HUGE, 1.0, NAN, 1.0, *[HUGE, NAN, HUGE], 1.1, 0.9, 1.0]


def through_explosions(specs, gradients, params) -> Any:
    """Parameters, counts, leaf, responses and factor after `SIZES`; NaN in one shard.

    Three explosions in a row are rolled back.
    """
    clip = optaxclip.clip_by_norm(optaxclip.limits.log_quantile(), specs=specs)
    tx: Any = optax.chain(
        optaxclip.detect_explosions(specs=specs, label="before"),
        optaxclip.skip_explosions(
            optax.chain(clip, optax.adam(0.1)),
            cool_down=0.5,
            rollback=True,
            snapshot_every=2,
            specs=specs,
        ),
    )

    largest = jnp.max(gradients["d"])
    if specs is not None:
        largest = lax.pmax(largest, ("x", "y"))

    def step(carry, given):
        params, state = carry
        size, is_nan = given
        grads = jax.tree.map(lambda x: size * x, gradients)
        is_bad = is_nan & (gradients["d"] == largest)
        grads["d"] = jnp.where(is_bad, jnp.nan, grads["d"])
        updates, state = tx.update(grads, state, params, value=size)
        return (optax.apply_updates(params, updates), state), None

    given = (
        jnp.asarray([1.0 if size is NAN else size for size in SIZES]),
        jnp.asarray([size is NAN for size in SIZES]),
    )
    (params, (before, wrapper)), _ = lax.scan(step, (params, tx.init(params)), given)
    state = wrapper["explosions"]
    steps = before["before"].told[:, :3], state.explosions.told[:, :3]
    counts = before["before"].record.counts, state.explosions.record.counts
    return params, (steps, counts, state.scale)


@functools.cache
def through_explosions_on_one_device():
    return jax.jit(functools.partial(through_explosions, None))(tree(), tree(0.1))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("auto", marks=pytest.mark.slow),
        pytest.param("explicit", marks=pytest.mark.slow),
        "shard_map",
        pytest.param("shard_map, vma", marks=pytest.mark.slow),
    ],
)
def test_a_skip_is_taken_by_all_devices(layout):
    mesh = mesh_of(AxisType.Explicit if layout == "explicit" else AxisType.Auto)
    run = functools.partial(through_explosions, None)
    if "shard_map" in layout:
        run = jax.shard_map(
            functools.partial(through_explosions, SPECS),
            mesh=mesh,
            in_specs=(SPECS, SPECS),
            out_specs=(SPECS, P()),
            check_vma="vma" in layout,
        )
    with jax.set_mesh(mesh):
        arguments = place(mesh, tree()), place(mesh, tree(0.1))
        compiled: Any = jax.jit(run).lower(*arguments).compile()
        found = compiled(*arguments)
    assert "all-gather" not in compiled.as_text()
    expected = through_explosions_on_one_device()
    assert_same(found, expected)
    params, (_, (_, counts), scale) = expected
    found = (int(counts[COUNTS.index(name)]) for name in ("skipped", "rollbacks"))
    assert list(found) == [5, 1]
    assert 0 < scale < 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
