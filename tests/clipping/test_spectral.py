"""Clips of singular values against their definition by a decomposition, in NumPy."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip import limits
from optaxclip.clipping import singular


def wide(x) -> np.ndarray:
    return np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def singular_values(x) -> np.ndarray:
    return np.linalg.svd(wide(x), compute_uv=False)


def reference(x, limit: float, *, smooth: bool = False) -> np.ndarray:
    u, s, v = np.linalg.svd(wide(x), full_matrices=False)
    found = s / np.hypot(1, s / limit) if smooth else np.minimum(s, limit)
    return (u * found) @ v


def spectra(x, limit: float) -> np.ndarray:
    """As SPECTRA defines it: `(I + x x^T / limit^2)^(-1/2) x`."""
    values, vectors = np.linalg.eigh(np.eye(len(x)) + x @ x.T / limit**2)
    return (vectors / np.sqrt(values)) @ vectors.T @ x


def matrix(s, *, shape=(96, 64), seed=0) -> np.ndarray:
    """A matrix with given singular values."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, len(s))))[0] for n in shape)
    return (u * np.asarray(s)) @ v.T


def make(*arguments, **options) -> Any:
    return optaxclip.clip_by_spectral_norm(*arguments, **options)


@functools.partial(jax.jit, static_argnames=("smooth", "stacked"))
def compiled(x, limit, smooth, stacked):
    clip = make(limit, smooth=smooth, stacked=stacked)
    return clip.update({"w": x}, clip.init({"w": x}))


def clipped(x, limit, *, smooth=False, stacked=None) -> Any:
    """Compiled once for all limits of a shape."""
    updates, state = compiled(x, jnp.float32(limit), smooth, stacked)
    return updates["w"], state["clip"]


MATRICES = {
    f"condition {condition:g}": matrix(np.geomspace(1, 1 / condition, 64))
    for condition in (1, 10, 1e2, 1e4)
}
MATRICES |= {
    "one large": matrix([1, *np.geomspace(1e-2, 1e-4, 63)]),
    "rank 1": np.outer(matrix([1.0])[:, 0], np.ones(64)),
    "rank 2, equal": matrix([1.0, 1.0]),
    "ones": np.ones((96, 64)),
    "wide": matrix(np.geomspace(1, 1e-4, 32), shape=(32, 80)),
    "random": np.random.default_rng(0).standard_normal((96, 64)),
    "diagonal": np.eye(96, 64) * np.geomspace(1, 1e-4, 64),
    "1 x 1": np.array([[-3.0]]),
    "row": np.arange(1.0, 8)[None],
    "column": np.arange(1.0, 8)[:, None],
}


# The others are slow: the same code on other numbers, compiled for each shape.
QUICK = {"condition 10000", "1 x 1"}


def cases(names) -> list[Any]:
    return [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in names
    ]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(
            pytest.param(*case.values, jnp.float32, marks=case.marks)
            for case in cases(MATRICES)
        ),
        *(
            pytest.param(
                name, jnp.bfloat16, marks=[] if name == "1 x 1" else pytest.mark.slow
            )
            for name in MATRICES
        ),
        pytest.param("condition 10000", jnp.float16, marks=pytest.mark.slow),
    ],
)
def test_singular_values_are_at_most_the_limit(name, dtype):
    x = jnp.asarray(MATRICES[name] / np.linalg.norm(MATRICES[name], 2), dtype)
    for ratio in (1.02, 3, 100, 1e4):
        # In float16, at a size where nothing underflows.
        limit = 1 / ratio if dtype != jnp.float16 else 1.0
        given = x if dtype != jnp.float16 else x * jnp.asarray(min(ratio, 1e3), dtype)
        found, state = clipped(given, jnp.float32(limit))
        assert found.dtype == dtype
        # Rounding each element to bfloat16 moves a singular value by up to 2^-9 or so.
        room = {jnp.float32: 1e-6, jnp.float16: 1e-3, jnp.bfloat16: 3e-3}[dtype]
        assert singular_values(found)[0] <= limit * (1 + room)
        error = np.linalg.norm(wide(found) - reference(given, limit), 2)
        assert error <= (3e-3 + room) * limit
        norm = singular_values(given)[0]
        np.testing.assert_allclose(state.norm, norm, rtol=5e-3)
        assert state.norm <= norm * (1 + 1e-6)
        assert state.num_clipped == 1


BULK = np.linspace(0.8, 0.1, 128)  # of the limit, and in the names what exceeds it
FEW = {
    "one": [3],
    "one hardly": [1.02],
    "one at 1000": [1000],
    "five": [8, 5, 3, 2, 1.3],
    "five at 1000": [1000, 300, 30, 5, 1.3],
    "close together": [3.004, 3.003, 3.002, 3.001, 3],
}
MANY = {
    "half": np.linspace(3, 1, 64),
    "a condition of 10000": np.geomspace(100, 0.01, 128),
    "one at 5000": [5000],
    "many that hardly exceed": np.linspace(1.3, 1, 64),
}


@pytest.fixture
def few_by_few(monkeypatch):
    """Small matrices, too, are clipped by their leading singular values."""
    monkeypatch.setattr(singular, "LEAST_SIDE", 8)


def beyond(values) -> np.ndarray:
    return matrix([*values, *BULK[len(values) :]], shape=(160, 128))


def in_units(x) -> tuple[jax.Array, jax.Array]:
    """A matrix of Frobenius norm 1, and the limit that was 1 before."""
    size = np.linalg.norm(x)
    return jnp.float32(x / size), jnp.float32(1 / size)


cap_leading, cap_all = jax.jit(singular.cap_leading), jax.jit(singular.cap_all)


@pytest.mark.parametrize("name", FEW)
def test_few_singular_values_are_clipped_alone(name):
    x, limit = in_units(beyond(FEW[name]))
    is_done, found = cap_leading(x, limit)
    assert is_done
    assert singular_values(found)[0] <= 1 + 1e-6
    expected = reference(x, float(limit)) / float(limit)
    assert np.linalg.norm(wide(found) - expected, 2) <= 3e-3


@pytest.mark.slow
@pytest.mark.parametrize("edge", [1.002, 1.004, 1.006, 1.01, 1.02])
def test_what_hardly_exceeds_the_limit_may_stay(edge):
    """That a norm is at most 1.001 times the limit is known to 0.5 %."""
    values = [3.0, *np.linspace(edge, 0.1, 127)]
    x, limit = in_units(matrix(values, shape=(160, 128)))
    found = jax.jit(singular.cap_first)(x, limit)
    assert singular_values(found)[0] <= 1.006
    expected = reference(x, float(limit)) / float(limit)
    assert np.linalg.norm(wide(found) - expected, 2) <= 6e-3


@pytest.mark.slow
def test_of_equal_ones_each_round_finds_one():
    x, limit = in_units(matrix([3.0] * 3 + [0.5] * 125, shape=(160, 128)))
    is_done, found = cap_leading(x, limit)
    assert is_done
    assert singular_values(found)[0] <= 1 + 1e-6
    expected = reference(x, float(limit)) / float(limit)
    assert np.linalg.norm(wide(found) - expected, 2) <= 3e-3


@pytest.mark.parametrize("name", MANY)
def test_where_many_exceed_the_limit_few_does_not_do(name):
    assert not cap_leading(*in_units(beyond(MANY[name])))[0]


@pytest.mark.usefixtures("few_by_few")
@pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)]
)
def test_layers_of_which_few_and_of_which_many_exceed_the_limit(dtype):
    values = [FEW["five"], MANY["half"], [0.9], FEW["one at 1000"]]
    layers = jnp.asarray(np.stack([beyond(x) for x in values]), dtype)
    clip = make(1.0, stacked=lambda name: True)
    found, state = jax.jit(clip.update)(layers, clip.init(layers))
    room = 1e-6 if dtype == jnp.float32 else 3e-3
    for x, y in zip(layers, found, strict=True):
        assert singular_values(y)[0] <= 1 + room
        assert np.linalg.norm(wide(y) - reference(x, 1.0), 2) <= 3e-3 + room
    assert state["clip"].num_clipped.tolist() == [1, 1, 0, 1]
    chex.assert_trees_all_equal(found[2], layers[2])


@pytest.mark.slow
@pytest.mark.usefixtures("few_by_few")
def test_the_derivative_where_few_exceed_the_limit_is_that_of_all():
    x, limit = in_units(beyond(FEW["five"]))
    tangents = jnp.float32(np.random.default_rng(1).standard_normal(x.shape)), limit
    _, slope = jax.jvp(singular.cap_singular_values, (x, limit), tangents)
    _, expected = jax.jvp(lambda *x: cap_all(*x)[0], (x, limit), tangents)
    scale = float(jnp.linalg.norm(expected))
    np.testing.assert_allclose(slope / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("name", cases(MATRICES))
def test_the_smooth_form_is_that_of_spectra(name):
    x = MATRICES[name] / np.linalg.norm(MATRICES[name], 2)
    for ratio in (0.1, 1, 30, 1e3):
        expected = reference(x, 1 / ratio, smooth=True)
        np.testing.assert_allclose(spectra(x, 1 / ratio), expected, atol=1e-7 / ratio)
        found, state = clipped(jnp.float32(x), jnp.float32(1 / ratio), smooth=True)
        assert singular_values(found)[0] <= 1 / ratio
        assert np.linalg.norm(wide(found) - expected, 2) <= 3e-3 / ratio
        assert state.num_clipped == (ratio > 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size",
    [1e-30, *(pytest.param(x, marks=pytest.mark.slow) for x in (1e-10, 1e10)), 1e30],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matrices_of_any_size(size, dtype):
    x = jnp.asarray(matrix(np.geomspace(3, 0.01, 16), shape=(24, 16)) * size, dtype)
    found, state = clipped(x, size)
    room = 1e-6 if dtype == jnp.float32 else 3e-3
    assert singular_values(found)[0] <= size * (1 + room)
    error = np.linalg.norm(wide(found) - reference(x, size), 2)
    assert error <= (3e-3 + room) * size
    np.testing.assert_allclose(state.norm, singular_values(x)[0], rtol=5e-3)


@pytest.mark.slow
def test_far_beyond_the_limit_it_is_still_a_limit():
    # Of the largest floats: the norm reads as the largest.
    huge = jnp.full((4, 3), 3e38)
    found, state = clipped(huge, 1.0)
    np.testing.assert_allclose(found, np.full((4, 3), 12**-0.5), rtol=2e-3)
    assert state.norm == jnp.finfo(jnp.float32).max
    # What is below 1e-6 of the norm shrinks with it.
    found, _ = clipped(jnp.diag(jnp.array([1e30, 1e15, 0.0])), 1.0)
    np.testing.assert_allclose(jnp.diag(found), [1, 0, 0], atol=2e-3)


def test_what_fits_and_what_was_clipped_stays_as_it_is():
    x = jnp.float32(MATRICES["random"])
    norm = singular_values(x)[0]
    for limit in (norm * (1 + 1e-6), norm * 2, np.inf):
        found, state = clipped(x, float(limit))
        chex.assert_trees_all_equal(found, x)
        assert state.num_clipped == 0
    once, _ = clipped(x, float(norm) / 3)
    twice, state = clipped(once, float(norm) / 3)
    chex.assert_trees_all_equal(twice, once)
    assert state.num_clipped == 0


@pytest.mark.parametrize("smooth", [False, True])
def test_edge_cases(smooth):
    x = jnp.ones((3, 2))
    zeros = jnp.zeros((3, 2))
    for limit in (0.0, -1.0, jnp.nan):
        chex.assert_trees_all_equal(clipped(x, limit, smooth=smooth)[0], zeros)
    chex.assert_trees_all_equal(clipped(zeros, 1.0, smooth=smooth)[0], zeros)
    chex.assert_trees_all_equal(clipped(x, jnp.inf, smooth=smooth)[0], x)
    # So small beside the limit that no digit changes.
    chex.assert_trees_all_equal(clipped(x * 1e-5, 1.0, smooth=smooth)[0], x * 1e-5)


@pytest.mark.parametrize(
    "bad", [jnp.nan, pytest.param(jnp.inf, marks=pytest.mark.slow)]
)
def test_what_is_not_finite_stays_in_its_matrix(bad):
    tree = {"bad": jnp.ones((3, 2)).at[1, 0].set(bad), "good": jnp.ones((3, 2))}
    tree |= {"vector": jnp.array([bad, 1.0])}
    clip = make(1.0)
    found, state = jax.jit(clip.update)(tree, clip.init(tree))
    expected = jnp.zeros((3, 2)).at[1, 0].set(jnp.nan)
    chex.assert_trees_all_equal(found["bad"], expected)
    np.testing.assert_allclose(found["good"], np.full((3, 2), 6**-0.5), rtol=2e-3)
    chex.assert_trees_all_equal(found["vector"], tree["vector"])
    assert state["clip"].num_nonfinite.tolist() == [1, 0, 0]
    assert state["clip"].num_clipped.tolist() == [0, 1, 0]
    layers = jnp.stack([tree["bad"], tree["good"]])
    found, state = clipped(layers, 1.0, stacked=lambda name: True)
    chex.assert_trees_all_equal(found[0], expected)
    assert jnp.isfinite(found[1]).all()
    assert state.num_nonfinite.tolist() == [1, 0]


@pytest.mark.slow
def test_layers_are_matrices_and_other_leaves_are_none():
    rng = np.random.default_rng(0)
    tree = {
        "layers": jnp.float32(rng.standard_normal((3, 5, 7)) * [[[0.1]], [[1]], [[9]]]),
        "kernel": jnp.float32(rng.standard_normal((3, 3, 4, 8))),
        "unnamed": jnp.float32(rng.standard_normal((2, 3, 3))),
        "bias": 9 * jnp.ones(4),
    }
    clip = make(2.0, stacked=lambda name: name == "layers")
    found, state = clip.update(tree, clip.init(tree))
    for x, y in zip(found["layers"], tree["layers"], strict=True):
        expected = reference(y, 2.0)
        assert np.linalg.norm(wide(x) - expected, 2) <= 6e-3
    chex.assert_trees_all_equal(found["layers"][0], tree["layers"][0])
    for name in ("kernel", "unnamed", "bias"):
        assert found[name] is tree[name]
    expected = [0, 0, *(singular_values(x)[0] for x in tree["layers"]), 0]
    np.testing.assert_allclose(state["clip"].norm, expected, rtol=1e-5)
    told = optaxclip.metrics(state, tree)
    assert told["clip/norm/layers[2]"] == state["clip"].norm[4]
    assert told["clip/clipped_fraction/layers[1]"] == 1
    assert told["clip/norm"] == state["clip"].norm[4]


@pytest.mark.slow
def test_a_limit_learns_from_each_matrix():
    clip = make(limits.quantile(0.5, initial_norm=10.0))
    tree = {"a": jnp.eye(4), "b": jnp.ones((4, 4)) * 100}
    state = clip.init(tree)
    step = jax.jit(clip.update)
    for _ in range(2):
        _, state = step(tree, state)
    assert state["clip"].num_clipped.tolist() == [0, 2]
    assert state["clip"].limit[0] < 10 < state["clip"].limit[1]


@pytest.mark.slow
def test_a_limit_in_proportion_to_the_parameters():
    clip = make(limits.params(0.1))
    params = {"w": jnp.diag(jnp.array([5.0, 1.0]))}
    updates, state = clip.update({"w": jnp.eye(2)}, clip.init(params), params)
    # The norm is reduced by 16 roundings, so that it is never too large.
    np.testing.assert_allclose(state["clip"].limit, [0.5], rtol=20 * 2.0**-23)
    np.testing.assert_allclose(updates["w"], 0.5 * np.eye(2), atol=2e-3)
    with pytest.raises(ValueError, match="params"):
        clip.update({"w": jnp.eye(2)}, clip.init(params))
    with pytest.raises(ValueError, match="do not have the leaves"):
        clip.update({"w": jnp.eye(2)}, clip.init(params), {**params, "b": jnp.eye(2)})


@pytest.mark.slow
def test_complex_and_double_matrices(x64):
    del x64
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 12, 8))
    for dtype in (jnp.complex64, jnp.complex128, jnp.float64):
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        y = jnp.asarray(x[0] + 1j * x[1] if is_complex else x[0], dtype)
        for smooth in (False, True):
            found, state = clipped(y, 1.0, smooth=smooth)
            assert found.dtype == dtype
            error = wide(found) - reference(y, 1.0, smooth=smooth)
            assert np.linalg.norm(error, 2) <= 3e-3
        np.testing.assert_allclose(state.norm, singular_values(y)[0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("least_side", [8, 1024])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "spec",
    [P("x"), *(pytest.param(x, marks=pytest.mark.slow) for x in (P(None, "x"), P()))],
)
def test_sharded_matrices_are_whole(kind, spec, least_side, monkeypatch):
    monkeypatch.setattr(singular, "LEAST_SIDE", least_side)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    clip = make(1.0)
    x = jnp.float32(np.random.default_rng(0).standard_normal((16, 24)))
    expected, expected_state = clip.update({"w": x}, clip.init({"w": x}))
    sharding = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        sharded = {"w": jax.device_put(x, sharding)}
        found, state = jax.jit(clip.update, out_shardings=({"w": sharding}, None))(
            sharded, clip.init(sharded)
        )
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-4, atol=1e-6)
    # Sums in another order: the process that finds the norm has not converged.
    np.testing.assert_allclose(
        state["clip"].norm, expected_state["clip"].norm, rtol=1e-4
    )
    assert found["w"].sharding.is_equivalent_to(sharding, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize(
    "check_vma", [pytest.param(False, marks=pytest.mark.slow), True]
)
@pytest.mark.parametrize(
    ("smooth", "least_side"),
    [(False, 1024), (True, 1024), (False, 8)],
    ids=["cap", "smooth", "few"],
)
def test_matrices_are_whole_inside_shard_map(
    smooth, least_side, check_vma, monkeypatch
):
    monkeypatch.setattr(singular, "LEAST_SIDE", least_side)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    shapes = {"both": (16, 24), "last": (8, 32), "layers": (3, 8, 16)}
    shapes |= {"same": (8, 8), "vector": (8,)}
    specs = {"both": P("b", "a"), "last": P(None, ("b", "a"))}
    specs |= {"layers": P(None, ("a", "b")), "same": P(), "vector": P("a")}
    rng = np.random.default_rng(0)
    updates = {
        name: jnp.float32(rng.standard_normal(shape)) for name, shape in shapes.items()
    }
    updates["layers"] = updates["layers"].at[1, 7, 3].set(np.nan)
    # Of some matrices the largest singular value is within the limit.
    updates["layers"] = updates["layers"].at[2].multiply(1e-3)
    options: Any = {"stacked": lambda name: name == "layers", "smooth": smooth}

    def run(updates, specs=None):
        clip = make(limits.quantile(initial_norm=1.0), specs=specs, **options)
        return clip.update(updates, clip.init(updates))

    expected, expected_state = jax.jit(run)(updates)
    sharded = jax.jit(
        jax.shard_map(
            functools.partial(run, specs=specs),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=(specs, P()),
            check_vma=check_vma,
        )
    )
    found, state = sharded(updates)
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-6, err_msg=name)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-4)


def test_each_polynomial_maps_into_the_interval_of_the_next():
    table = singular.POLYNOMIALS
    floors = [*table[1:, 0], 1 - 8e-4]
    for (floor, a, b, c), following in zip(table, floors, strict=True):
        x = np.linspace(floor, 1 + 5e-4, 100_001)
        y = x * (a + x**2 * (b + x**2 * c))
        assert y.max() <= 1 + 2e-5
        assert y.min() >= following - 1e-4
        below = np.linspace(0, floor, 1001)
        assert np.all(np.diff(below * (a + below**2 * (b + below**2 * c))) > 0)


def test_the_inverse_root():
    x = np.linspace(0.5, 1, 10_001)
    found = np.polynomial.Polynomial(singular.INVERSE_ROOT)(x) * np.sqrt(x)
    assert np.abs(found - 0.999).max() <= 5e-4


@pytest.mark.slow
def test_the_updates_of_muon_have_singular_values_around_one():
    params = {"w": jnp.float32(np.random.default_rng(0).standard_normal((12, 8)))}
    tx: Any = optax.chain(optax.contrib.muon(1.0), make(0.5, label="update"))
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    values = singular_values(updates["w"])
    np.testing.assert_allclose(values, np.full(8, 0.5), atol=2e-3)


def test_errors():
    with pytest.raises(ValueError, match="max_norm must be >= 0, not -1"):
        make(-1)
    with pytest.raises(TypeError, match="label must be a name"):
        make(1.0, label="")
    with pytest.raises(TypeError, match="smooth must be True or False, not 3"):
        make(1.0, smooth=3)
    clip = make(1.0)
    state = clip.init({"w": jnp.eye(2)})
    with pytest.raises(ValueError, match="do not have the leaves"):
        clip.update({"w": jnp.eye(2), "b": jnp.ones(2)}, state)
    with pytest.raises(ValueError, match="state must be what init gave"):
        clip.update({"w": jnp.eye(2)}, optax.EmptyState())
    with pytest.raises(ValueError, match="stacked= gives 'array' 1 leading axes"):
        make(1.0, stacked=lambda _: True).init(jnp.ones(()))
