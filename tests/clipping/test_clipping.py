"""The contract of the clips: every row of its tables, and the edges by name."""

import math
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
import reference

pytestmark = pytest.mark.usefixtures("strict", "quick_by_default")

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64]
PERS = ["tree", "leaf", "unit", "group"]
# How far the true norm may exceed the limit: the rounding of the result's dtype.
EXCESS = {
    jnp.float16: 2.0**-11,
    jnp.bfloat16: 2.0**-8,
    jnp.float32: 1e-6,
    jnp.complex64: 1e-6,
}


def clip_by_norm(limit, per: Any = "tree", **kwargs) -> Any:
    if per == "group":  # of even and odd leaves, as in the reference
        return optaxclip.clip_by_norm(
            limit, per=lambda name: str(int(name) % 2), **kwargs
        )
    return optaxclip.clip_by_norm(limit, per=per, **kwargs)


def clip_by_value(max_value, **kwargs) -> Any:
    return optaxclip.clip_by_value(max_value, **kwargs)


def run(clip, updates, jit=False) -> tuple[Any, Any]:
    update = jax.jit(clip.update) if jit else clip.update
    updates, state = update(updates, clip.init(updates))
    return updates, state["clip"]


def update_with_limit(per, jit):
    """(leaves, limit) -> (updates, state); under jit the limit is traced."""

    def update(leaves, limit):
        return run(clip_by_norm(limit, per), leaves)

    return jax.jit(update) if jit else update


def random_leaves(dtype, scale, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(4, 3), (3,), (), (2, 2, 3)]
    values = [rng.standard_normal(shape) * scale for shape in shapes]
    if dtype == jnp.complex64:
        values = [x * np.exp(1j * rng.uniform(0, 7, x.shape)) for x in values]
    return [jnp.asarray(x, dtype) for x in values]


def scope_norms(leaves, per, ord=2):
    return [
        float(reference.norm([np.asarray(leaves[i])[index] for i, index in scope], ord))
        for scope in reference.scopes(leaves, per)
    ]


def slow_unless(is_quick: bool, *values) -> Any:
    return pytest.param(*values, marks=[] if is_quick else pytest.mark.slow)


@pytest.mark.parametrize(
    ("dtype", "per", "jit"),
    [
        slow_unless(jit and (dtype == jnp.float32 or per == "tree"), dtype, per, jit)
        for dtype in DTYPES
        for per in PERS
        for jit in (False, True)
    ],
)
def test_every_row_of_the_table(dtype, per, jit):
    leaves = random_leaves(dtype, 2.0)
    structure = jax.tree.structure(leaves)
    update = update_with_limit(per, jit)

    def check(limit, leaves):
        updates, state = update(leaves, limit)
        assert jax.tree.structure(updates) == structure
        for found, expected, given in zip(
            updates, reference.clip(leaves, limit, per), leaves, strict=True
        ):
            assert found.dtype == given.dtype
            np.testing.assert_allclose(
                reference.wide(found).astype(complex),
                expected.astype(complex),
                rtol=2 * EXCESS[dtype],
                atol=1e-7 if dtype == jnp.float16 else 0,
            )
        return updates, state

    for limit in (1.0, 0.01):  # norm > limit
        updates, state = check(limit, leaves)
        for size in scope_norms(updates, per):
            assert size <= limit * (1 + EXCESS[dtype])
    clipped = jax.tree.leaves(state.num_clipped)
    assert all(np.all(x == 1) for x in clipped)

    for limit in (1e4, math.inf):  # norm <= limit: bit-identical
        updates, state = check(limit, leaves)
        chex.assert_trees_all_equal(updates, leaves)
        assert all(np.all(x == 0) for x in jax.tree.leaves(state.num_clipped))

    zeros = jax.tree.map(jnp.zeros_like, leaves)
    for limit in (0.0, 1.0, math.inf):  # norm 0
        updates, _ = check(limit, zeros)
        chex.assert_trees_all_equal(updates, zeros)
    updates, _ = check(0.0, leaves)  # limit 0
    chex.assert_trees_all_equal(updates, zeros)

    for bad in (math.nan, math.inf, -math.inf):  # contained, visible, counted
        broken = [leaves[0].at[1, 2].set(bad), *leaves[1:]]
        _, state = check(1.0, broken)
        counts = np.concatenate(
            [np.ravel(x) for x in jax.tree.leaves(state.num_nonfinite)]
        )
        assert counts.sum() == 1


@pytest.mark.parametrize("per", PERS)
def test_a_traced_limit_that_is_bad_gives_zeros(per):
    update = update_with_limit(per, jit=True)
    leaves = random_leaves(jnp.bfloat16, 2.0)
    broken = [leaves[0].at[0, 0].set(jnp.nan), *leaves[1:]]
    for limit in (-1.0, -math.inf, math.nan):
        found, _ = update(leaves, limit)
        chex.assert_trees_all_equal(found, jax.tree.map(jnp.zeros_like, leaves))
        found, _ = update(broken, limit)
        assert np.isnan(found[0][0, 0])  # the culprit stays visible
        assert np.nansum(np.abs(np.asarray(found[0], np.float32))) == 0


@pytest.mark.parametrize(
    ("dtype", "per"),
    [
        slow_unless(dtype == jnp.float32 or per == "tree", dtype, per)
        for dtype in (jnp.bfloat16, jnp.float32, jnp.complex64)
        for per in PERS
    ],
)
def test_magnitudes_that_overflow_or_underflow_when_squared(dtype, per):
    update = update_with_limit(per, jit=True)
    for value, limit in [
        (1e20, 1.0),
        (1e30, 1.0),
        (3e38, 1.0),
        (3e38, 1e-30),
        (3e38, 1e-36),
        (3e38, 1e38),
        (1e30, 1e31),
        (3e-25, 1e-26),
        (1e-30, 1e-36),
        (1e-37, 1.0),
    ]:
        leaves = [jnp.full((2, 2), value, dtype), jnp.full(3, -value, dtype)]
        updates, _ = update(leaves, limit)
        before, after = scope_norms(leaves, per), scope_norms(updates, per)
        for old, new in zip(before, after, strict=True):
            expected = min(old, float(np.float32(limit)))
            np.testing.assert_allclose(new, expected, rtol=EXCESS[dtype])
            if old <= limit:
                assert new == old


@pytest.mark.parametrize("limit", [1e100, 1e-200, 1.0])
@pytest.mark.usefixtures("x64")
def test_float64(limit):
    leaves = [jnp.asarray([3e200, 1.0]), jnp.asarray([4e200], jnp.float64)]
    updates, state = run(clip_by_norm(limit), leaves)
    np.testing.assert_allclose(scope_norms(updates, "tree"), limit, rtol=1e-14)
    assert state.norm.dtype == jnp.float64
    mixed = [jnp.asarray([3e38], jnp.float32), jnp.asarray([4e300], jnp.float64)]
    updates, _ = run(clip_by_norm(1.0), mixed)
    assert [x.dtype for x in updates] == [jnp.float32, jnp.float64]


@pytest.mark.usefixtures("x64")
def test_float64_gradients_of_float32_parameters_keep_the_state_float32():
    clip = clip_by_norm(1.0)
    state = clip.init([jnp.ones(2, jnp.float32)])
    grads = [jnp.asarray([3e200, 4e200], jnp.float64)]
    updates, new_state = clip.update(grads, state)
    np.testing.assert_allclose(updates[0], [0.6, 0.8], rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    assert new_state["clip"].norm == jnp.finfo(jnp.float32).max


@pytest.mark.parametrize(
    ("ord", "per"),
    [
        slow_unless(per == "tree" or ord == 1, ord, per)
        for ord in (1, 1.5, 3, math.inf)
        for per in PERS
    ],
)
def test_other_orders(ord, per):
    leaves = random_leaves(jnp.float32, 2.0)
    updates, _ = run(clip_by_norm(0.5, per, ord=ord), leaves, jit=True)
    for found, expected in zip(
        updates, reference.clip(leaves, 0.5, per, ord), strict=True
    ):
        np.testing.assert_allclose(found, expected.astype(float), rtol=2e-6)
    for size in scope_norms(updates, per, ord):
        assert size <= 0.5 * (1 + 1e-6)


@pytest.mark.slow
def test_a_thousand_bfloat16_leaves():
    # optax.clip_by_global_norm lets these out with norm 1.98.
    leaves = [jnp.ones(64, jnp.bfloat16) for _ in range(1000)]
    updates, state = run(clip_by_norm(1.0), leaves)
    np.testing.assert_allclose(scope_norms(updates, "tree"), 1.0, rtol=2.0**-8)
    np.testing.assert_allclose(state.norm, math.sqrt(64_000), rtol=1e-6)


def test_python_numbers_are_clipped_and_functions_pass():
    grads = {"w": 3.0, "b": np.float64(4.0), "f": math.sqrt}
    for clip, expected in (
        (clip_by_norm(2.5), (1.5, 2.0)),
        (clip_by_norm(3.5, "leaf"), (3.0, 3.5)),
        (clip_by_value(3.5), (3.0, 3.5)),
    ):
        updates, _ = clip.update(grads, clip.init(grads))
        np.testing.assert_allclose((updates["w"], updates["b"]), expected, rtol=1e-6)
        assert updates["f"] is math.sqrt


def test_float16_below_its_limit_is_untouched():
    leaves = [jnp.asarray([300, 400], jnp.float16)]
    updates, state = run(clip_by_norm(1000.0), leaves)
    chex.assert_trees_all_equal(updates, leaves)
    assert state.norm == 500


def test_a_norm_that_equals_the_limit_is_left_alone():
    leaves = [jnp.asarray([3.0, 4.0]), jnp.asarray([12.0])]
    for jit in (False, True):
        updates, state = run(clip_by_norm(13.0), leaves, jit)
        chex.assert_trees_all_equal(updates, leaves)
        assert state.num_clipped == 0


def test_a_second_clip_changes_nothing():
    for seed in range(20):
        leaves = random_leaves(jnp.float32, 10.0, seed)
        once, _ = run(clip_by_norm(1.0), leaves)
        twice, state = run(clip_by_norm(1.0), once)
        chex.assert_trees_all_equal(once, twice)
        assert state.num_clipped == 0


@pytest.mark.parametrize("limit", [1.0, 0.375])
def test_a_clip_is_within_two_units_in_the_last_place(limit):
    update = update_with_limit("tree", jit=True)
    worst = 0.0
    for seed in range(40):
        leaves = random_leaves(jnp.float32, 10.0, seed)
        found, _ = update(leaves, limit)
        for x, exact in zip(found, reference.clip(leaves, limit), strict=True):
            unit = np.spacing(abs(exact).astype(np.float32))
            worst = max(worst, np.max(abs(reference.wide(x) - exact) / unit))
        assert scope_norms(found, "tree")[0] <= limit * (1 + 1e-6)
    assert worst <= 2


@pytest.mark.parametrize(("size", "bound"), [(17, 3), (1000, 4), (100_000, 4)])
def test_the_rounding_of_a_clip_by_the_number_of_elements(size, bound):
    update = jax.jit(lambda x: run(clip_by_norm(1.0), [x])[0][0])
    for seed in range(20):
        values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
        exact = values / np.linalg.norm(values.astype(np.float64))
        unit = np.spacing(abs(exact).astype(np.float32))
        assert (
            np.max(abs(np.asarray(update(values), np.float64) - exact) / unit) <= bound
        )


def test_negative_zero_and_tiny_elements_beside_large_ones():
    leaves = [jnp.asarray([3e30, -0.0, 1e-12])]
    updates, _ = run(clip_by_norm(3e29), leaves)
    np.testing.assert_allclose(updates[0], [3e29, 0, 1e-13], rtol=1e-6)
    assert np.signbit(updates[0][1])
    z = [jnp.asarray([complex(-0.0, 1.0), complex(2.0, -0.0)], jnp.complex64)]
    updates, _ = run(clip_by_norm(10.0), z)
    assert np.asarray(updates[0]).tobytes() == np.asarray(z[0]).tobytes()


def test_nan_in_one_leaf_harms_no_other_scope():
    leaves = [jnp.asarray([jnp.nan, 1.0]), jnp.asarray([0.3, 0.4])]
    updates, _ = run(clip_by_norm(1.0, "leaf"), leaves)
    np.testing.assert_array_equal(updates[0], [jnp.nan, 0])
    chex.assert_trees_all_equal(updates[1], leaves[1])


@pytest.mark.parametrize("per", PERS)
def test_jacobian(per):
    """The identity at zero and below the limit; exact at any magnitude."""

    def clip(x):
        return run(clip_by_norm(1.0, per), [x])[0][0]

    backward, forward = jax.jit(jax.jacrev(clip)), jax.jit(jax.jacfwd(clip))
    for x in ([0.0, 0.0], [0.3, 0.4], [3e-25, 4e-25]):
        np.testing.assert_array_equal(backward(jnp.asarray(x)), np.eye(2))
        np.testing.assert_array_equal(forward(jnp.asarray(x)), np.eye(2))
    for size in (10.0, 1e18, 1e25):
        direction = np.asarray([0.6, 0.8])
        expected = (np.eye(2) - np.outer(direction, direction)) / size
        x = jnp.asarray(direction * size, jnp.float32)
        np.testing.assert_allclose(backward(x), expected, rtol=1e-5)
        np.testing.assert_allclose(forward(x), expected, rtol=1e-5)


def test_derivative_by_the_limit():
    x = [jnp.asarray([3.0, 4.0])]

    def clip(limit):
        return run(clip_by_norm(limit), x)[0][0]

    backward, forward = jax.jit(jax.jacrev(clip)), jax.jit(jax.jacfwd(clip))
    np.testing.assert_allclose(backward(1.0), [0.6, 0.8], rtol=1e-5)
    np.testing.assert_allclose(forward(0.0), [0.6, 0.8], rtol=1e-5)
    np.testing.assert_array_equal(backward(9.0), [0, 0])


def test_state_counts_and_remembers():
    clip = clip_by_norm(optax.linear_schedule(4.0, 1.0, 3), "leaf", label="here")
    leaves = [jnp.asarray([3.0]), jnp.asarray([jnp.inf])]
    state = clip.init(leaves)
    for step, limit in enumerate([4.0, 3.0, 2.0, 1.0, 1.0]):
        _, state = clip.update(leaves, state)
        found = state["here"]
        assert found.num_steps == step + 1
        np.testing.assert_array_equal(found.norm, [3, jnp.inf])
        np.testing.assert_allclose(found.limit, [limit, limit])
        np.testing.assert_array_equal(found.num_clipped, [max(0, step - 1), 0])
        np.testing.assert_array_equal(found.num_nonfinite, [0, step + 1])


def test_counters_saturate():
    clip = clip_by_norm(1.0)
    x = [jnp.asarray([3.0])]
    state = clip.init(x)
    most = jnp.asarray(jnp.iinfo(jnp.int32).max)
    state = {"clip": state["clip"]._replace(num_steps=most, num_clipped=most)}
    _, state = clip.update(x, state)
    assert state["clip"].num_steps == state["clip"].num_clipped == most


def test_stacked_layers_are_clipped_each_for_itself():
    x = {"layers": jnp.asarray([[[3.0], [4.0]], [[0.3], [0.4]]]), "b": jnp.ones(())}
    clip = clip_by_norm(1.0, "leaf", stacked=lambda name: name == "layers")
    updates, state = run(clip, x, jit=True)
    np.testing.assert_allclose(updates["layers"][0, :, 0], [0.6, 0.8], rtol=1e-6)
    chex.assert_trees_all_equal(updates["layers"][1], x["layers"][1])
    assert state.norm.shape == (3,)
    clip = clip_by_norm(1.0, "unit", stacked=lambda name: name == "layers")
    _, state = run(clip, x, jit=True)
    assert [norm.shape for norm in state.norm] == [(), (2, 1)]


def test_leaves_that_are_no_gradients_pass_untouched():
    key = jax.random.key(0)
    tree = {
        "int": jnp.arange(3),
        "bool": jnp.asarray([True]),
        "float0": np.zeros(2, jax.dtypes.float0),
        "key": key,
        "empty": jnp.zeros((0, 2)),
        "none": None,
        "masked": optax.MaskedNode(),
        "grad": jnp.asarray([3.0, 4.0]),
    }
    for clip in (*(clip_by_norm(1.0, p) for p in PERS[:3]), clip_by_value(1)):
        updates, _ = clip.update(tree, clip.init(tree))
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        for name in ("int", "bool", "float0", "key", "none"):
            assert updates[name] is tree[name]
        assert updates["empty"].shape == (0, 2)
        assert np.abs(updates["grad"]).max() <= 1


@pytest.mark.parametrize("per", PERS)
def test_a_tree_without_leaves(per):
    for tree in ([], [optax.MaskedNode(), None]):
        updates, _ = run(clip_by_norm(1.0, per), tree)
        assert updates == tree


def test_numpy_and_python_leaves():
    tree = [np.asarray([3.0, 4.0], np.float32), 12.0]
    updates, state = run(clip_by_norm(1.3), tree)
    assert state.norm == 13
    np.testing.assert_allclose(updates[1], 1.2, rtol=1e-6)


def test_a_limit_may_read_the_norms_of_the_parameters():
    def update(norms, state, param_norms):
        if param_norms is None:
            raise ValueError("needs params")
        return jax.tree.map(lambda norm: 0.1 * norm, param_norms), state

    limit = optaxclip.limits.Limit(lambda sizes: (), update, needs_params=True)
    params, grads = [jnp.asarray([30.0, 40.0])], [jnp.asarray([6.0, 8.0])]
    for per in PERS:
        clip = clip_by_norm(limit, per)
        updates, _ = clip.update(grads, clip.init(params), params)
        np.testing.assert_allclose(updates[0], [3, 4], rtol=1e-6)
        with pytest.raises(ValueError, match="needs params"):
            clip.update(grads, clip.init(params))


def test_a_limit_sees_the_number_of_elements():
    seen = []
    limit = optaxclip.limits.Limit(
        lambda sizes: seen.append(sizes) or (), lambda n, state, _: (n, state)
    )
    tree = [jnp.ones((2, 3)), jnp.ones(4), jnp.arange(9)]
    for per in PERS:
        clip_by_norm(limit, per).init(tree)
    chex.assert_trees_all_close(
        seen,
        [
            jnp.asarray(10.0),
            jnp.asarray([6.0, 4.0, 0.0]),
            (jnp.full(3, 2.0), jnp.asarray(4.0), jnp.asarray(0.0)),
            jnp.asarray([6.0, 4.0]),
        ],
    )


@pytest.mark.parametrize("limit", [-1, -0.5, math.nan, np.float32(-2)])
def test_limit_out_of_range(limit):
    with pytest.raises(ValueError, match=f"max_norm must be >= 0.*{limit}"):
        optaxclip.clip_by_norm(limit)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"max_norm": "1"}, TypeError, "'1'"),
        ({"max_norm": None}, TypeError, "None"),
        ({"max_norm": np.ones(2)}, ValueError, "single number"),
        ({"max_norm": 1.0, "per": "layer"}, ValueError, "'layer'"),
        ({"max_norm": 1.0, "per": 3}, ValueError, "3"),
        ({"max_norm": 1.0, "ord": 0.5}, ValueError, "0.5"),
        ({"max_norm": 1.0, "label": ""}, TypeError, "label"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        optaxclip.clip_by_norm(**kwargs)


@pytest.mark.parametrize("dtype", [*DTYPES[:3], jnp.float64])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.usefixtures("x64")
def test_clip_by_value(dtype, jit):
    x = jnp.asarray([-5, -0.5, 0, 0.25, 5, math.inf, -math.inf, math.nan], dtype)
    for clip, low, high in [
        (clip_by_value(1.0), -1, 1),
        (clip_by_value(1.0, min_value=-0.25), -0.25, 1),
        (clip_by_value(3.0, min_value=2.0), 2, 3),
        (clip_by_value(np.float32(1)), -1, 1),
        (clip_by_value(math.inf), -math.inf, math.inf),
        (clip_by_value(0), 0, 0),
    ]:
        update = jax.jit(clip.update) if jit else clip.update
        found, _ = update([x], clip.init([x]))
        assert found[0].dtype == dtype
        np.testing.assert_array_equal(
            np.asarray(found[0], np.float64),
            np.clip(np.asarray(x, np.float64), low, high),
        )


def test_clip_by_value_bound_beyond_the_dtype():
    x = [jnp.asarray([jnp.inf, -jnp.inf, 7], jnp.float16)]
    clip = clip_by_value(1e6)
    np.testing.assert_array_equal(
        clip.update(x, clip.init(x))[0][0], [65504, -65504, 7]
    )


def test_clip_by_value_with_schedules():
    low = jnp.asarray([-0.5, -1, -1.5])
    clip = clip_by_value(
        optax.linear_schedule(3.0, 1.0, 2), min_value=lambda count: low[count]
    )
    x = jnp.asarray([9.0, -9.0])
    state = clip.init(x)
    for expected in ([3, -0.5], [2, -1], [1, -1.5]):
        found, state = jax.jit(clip.update)(x, state)
        np.testing.assert_allclose(found, expected)
    symmetric = clip_by_value(optax.linear_schedule(3.0, 1.0, 2))
    found, _ = symmetric.update(x, symmetric.init(x))
    np.testing.assert_allclose(found, [3, -3])


def test_clip_by_value_with_traced_bounds():
    def update(x, high, low):
        clip = clip_by_value(high, min_value=low)
        return clip.update(x, clip.init(x))[0]

    x = jnp.asarray([-9.0, 9.0], jnp.bfloat16)
    np.testing.assert_array_equal(jax.jit(update)(x, 2.0, -1.0), [-1, 2])
    np.testing.assert_array_equal(jax.jit(update)(x, 1.0, 2.0), [1, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((math.nan, None), ValueError, "NaN"),
        ((1.0, math.nan), ValueError, "NaN"),
        ((-1.0, None), ValueError, "1.0 > -1.0"),
        ((1.0, 2.0), ValueError, "2.0 > 1.0"),
        (("1", None), TypeError, "max_value"),
        ((1.0, "0"), TypeError, "min_value"),
        ((np.ones(2), None), ValueError, "max_value"),
    ],
)
def test_clip_by_value_bad_arguments(arguments, error, message):
    high, low = arguments
    with pytest.raises(error, match=message):
        clip_by_value(high, min_value=low)


def test_clip_by_value_refuses_complex_leaves():
    clip = clip_by_value(1.0)
    tree = {"z": jnp.asarray([1j])}
    with pytest.raises(ValueError, match="'z'"):
        clip.init(tree)
    with pytest.raises(ValueError, match="'z'"):
        clip.update(tree, optax.EmptyState())


def test_truly_global_norm_around_a_partition():
    tree = {"a": jnp.asarray([3.0]), "b": jnp.asarray([4.0])}
    labels = {"a": "x", "b": "y"}

    def partition(make):
        return optax.partition({"x": make("x"), "y": make("y")}, labels)

    inside: Any = partition(lambda label: optaxclip.clip_by_norm(1.0, label=label))
    updates, _ = inside.update(tree, inside.init(tree))
    chex.assert_trees_all_close(updates, jax.tree.map(jnp.ones_like, tree))
    around: Any = optax.chain(
        optaxclip.clip_by_norm(1.0), partition(lambda label: optax.identity())
    )
    updates, _ = around.update(tree, around.init(tree))
    expected = {"a": jnp.asarray([0.6]), "b": jnp.asarray([0.8])}
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_limits_as_functions_of_norms_of_any_shape():
    for norms in (jnp.ones(()), jnp.ones(3), (jnp.ones(2), jnp.ones(()))):
        for limit in (
            optaxclip.limits.constant(2.0),
            optaxclip.limits.schedule(lambda count: 2.0),
        ):
            state = limit.init(norms)
            limits, new_state = jax.jit(limit.update)(norms, state, None)
            chex.assert_trees_all_equal(limits, jax.tree.map(lambda n: 2 * n, norms))
            chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)


def test_schedule_must_be_callable():
    with pytest.raises(TypeError, match=r"1\.0"):
        optaxclip.limits.schedule(cast(Any, 1.0))
