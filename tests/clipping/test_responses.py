"""What each response makes of a norm, against float64 NumPy; bands; `where`."""

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from conftest import configured
from optaxclip import limits

pytestmark = pytest.mark.usefixtures("quick_by_default")

RESPONSES = ("cap", "soft", "set", "band")


def make(respond, limit, **options):
    """A clip with a response, or with a band from half of the limit."""
    if respond == "band":
        return optaxclip.clip_by_norm(limit, min_norm=limit / 2, **options)
    return optaxclip.clip_by_norm(limit, respond=respond, **options)


def target_of(respond, norm, limit):
    """The naive definition."""
    if norm == 0:
        return 0.0
    if respond == "soft":
        return norm * limit / (norm + limit)
    if respond == "band":
        return min(max(norm, limit / 2), limit)
    return limit if respond == "set" else min(norm, limit)


def clipped(clip, updates) -> Any:
    return clip.update(updates, clip.init(updates), updates)


NORMS = [0.0, 2e-38, 1e-30, 1e-3, 0.999, 1.0, 7.0, 1e19, 3e38]
LIMITS = [1e-37, 1e-12, 0.5, 1.0, 1e30, 3e38]


@pytest.mark.parametrize(
    ("respond", "limit"),
    [
        # The others are slow: the same code on other numbers.
        pytest.param(
            respond,
            limit,
            marks=[] if respond == "set" or limit == 0.5 else pytest.mark.slow,
        )
        for respond in RESPONSES
        for limit in LIMITS
    ],
)
def test_target_of_every_finite_norm(respond, limit):
    clip = make(respond, limit, per="leaf")
    # Of the later leaves every sum of squares is that of two elements.
    updates = [jnp.array([x]) for x in NORMS]
    updates += [jnp.array([0.6 * x, -0.8 * x]) for x in NORMS]
    found, state = clipped(clip, updates)
    for before, after in zip(updates, found, strict=True):
        x = np.asarray(before, np.float64)
        norm = np.sqrt(np.sum(x**2))
        target = target_of(respond, norm, limit)
        expected = x * (target / norm) if norm else x
        # Elements that end below the smallest normal float may become 0.
        np.testing.assert_allclose(after, expected, rtol=2e-6, atol=1.2e-38)
    after = optaxclip.metrics({"clip": state["clip"]})["clip/norm_after"]
    largest = max(target_of(respond, x, limit) for x in NORMS)
    np.testing.assert_allclose(after, largest, rtol=2e-6)


@pytest.mark.parametrize(
    "dtype",
    [
        jnp.float16,
        jnp.float32,
        *(pytest.param(x, marks=pytest.mark.slow) for x in (jnp.bfloat16, jnp.float64)),
    ],
)
@pytest.mark.parametrize("respond", RESPONSES)
def test_target_in_every_dtype(respond, dtype):
    with configured("jax_enable_x64", dtype == jnp.float64):
        rng = np.random.default_rng(0)
        updates = {"w": jnp.asarray(rng.normal(size=(4, 3)), dtype)}
        for limit in (0.5, 20.0):
            clip = make(respond, limit)
            after = clipped(clip, updates)[0]["w"]
            x = np.asarray(updates["w"], np.float64)
            norm = np.linalg.norm(x)
            expected = x * (target_of(respond, norm, limit) / norm)
            assert after.dtype == dtype
            rtol = 2 * float(jnp.finfo(dtype).eps) + 1e-15
            np.testing.assert_allclose(np.asarray(after, float), expected, rtol=rtol)


def test_a_norm_beyond_the_largest_float():
    updates = {"w": jnp.full(16, 3e38)}
    norm = 4 * np.float64(np.float32(3e38))
    for respond in RESPONSES:
        clip = make(respond, 1e38)
        after = np.asarray(clipped(clip, updates)[0]["w"], np.float64)
        expected = target_of(respond, norm, 1e38)
        np.testing.assert_allclose(np.sqrt(np.sum(after**2)), expected, rtol=1e-6)


def test_without_a_limit_a_norm_beyond_the_largest_float_stays():
    updates = {"w": jnp.full(4, 3e38)}
    for respond in RESPONSES:
        clip = make(respond, math.inf)
        np.testing.assert_array_equal(clipped(clip, updates)[0]["w"], updates["w"])


def test_a_band_is_for_clip_by_norm_alone():
    def update(norms, state, param_norms=None):
        return limits.Band(norms * 0 + 2, norms * 0 + 1), state

    band = limits.Limit(lambda sizes: (), update, is_band=True)
    after, _ = clipped(optaxclip.clip_by_norm(band), {"w": jnp.array([9.0])})
    np.testing.assert_allclose(after["w"], [2], rtol=1e-6)
    for make in (
        lambda: limits.minimum(band, 1.0),
        lambda: limits.with_global(band, 1.0),
        lambda: optaxclip.detect_explosions(norm=band),
        lambda: optaxclip.clip_by_spectral_norm(band),
        lambda: optaxclip.clip_by_norm(band, min_norm=0.5),
    ):
        with pytest.raises(ValueError, match="has a lower bound, which clip_by_norm"):
            make()


@pytest.mark.parametrize("per", ["tree", "leaf", "unit", lambda name: name[0]])
@pytest.mark.parametrize("respond", ["soft", "set"])
def test_damage_stays_within_its_scope(per, respond):
    clip = optaxclip.clip_by_norm(1.0, respond=respond, per=per)
    updates = {"a": jnp.array([jnp.inf, 2.0]), "b": jnp.array([3.0, 4.0])}
    after, state = clipped(clip, updates)
    np.testing.assert_array_equal(after["a"], [np.nan, 0])
    if per == "tree":
        np.testing.assert_array_equal(after["b"], [0, 0])
    else:
        assert np.isfinite(after["b"]).all()
        assert (after["b"] != 0).all()
    assert sum(map(np.sum, jax.tree.leaves(state["clip"].num_nonfinite))) == 1


@pytest.mark.parametrize("respond", ["soft", "set"])
@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_limits_that_are_bad_or_none(respond, limit):
    updates = {"w": jnp.array([3.0, 4.0])}
    clip = optaxclip.clip_by_norm(jnp.asarray(limit), respond=respond)
    after, state = clipped(clip, updates)
    expected = updates["w"] if limit == math.inf else [0, 0]
    np.testing.assert_array_equal(after["w"], expected)
    found = optaxclip.metrics({"clip": state["clip"]})["clip/norm_after"]
    np.testing.assert_allclose(found, 5.0 if limit == math.inf else 0.0, rtol=1e-6)


@pytest.mark.parametrize("respond", RESPONSES)
def test_derivative(respond):
    x = np.array([0.3, -1.2, 2.0])

    def clip(x, limit):
        clip = make(respond, limit)
        return clip.update(x, clip.init(x))[0]

    for limit in (0.7, 9.0):
        with configured("jax_enable_x64", True):
            jacobian = jax.jit(jax.jacobian(clip, argnums=(0, 1)))
            found = jacobian(jnp.asarray(x), limit)
        step = 1e-6
        for i in range(3):
            moved = x + step * np.eye(3)[i], x - step * np.eye(3)[i]
            up, down = (
                y * (target_of(respond, np.linalg.norm(y), limit) / np.linalg.norm(y))
                for y in moved
            )
            np.testing.assert_allclose(
                found[0][:, i], (up - down) / (2 * step), atol=1e-8
            )
        norm = np.linalg.norm(x)
        up, down = (target_of(respond, norm, limit + s) for s in (step, -step))
        slope = (up - down) / (2 * step)
        np.testing.assert_allclose(found[1], x / norm * slope, atol=1e-8)


# Norms and limits, and pairs whose ratio is a float.
EXTREMES = [(1e-19, 1e-19), (1e-25, 1e-25), (1e-22, 1e-25), (1e-25, 1e-22)]
EXTREMES += [(1e-30, 1e-10), (3e38, 3e38), (3e38, 1e38), (1e38, 3e38), (3e38, 1.0)]


@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("respond", RESPONSES)
def test_derivative_at_the_ends_of_the_range(respond, jacobian):
    def clip(x, limit):
        clip = make(respond, limit)
        return clip.update(x, clip.init(x))[0]

    derivative = jax.jit(jacobian(clip, argnums=(0, 1)))
    # Its own norm is exactly the first number.
    direction = np.array([1.0, 0.0])
    for norm, limit in np.array(EXTREMES, np.float32):
        found = derivative(direction.astype(np.float32) * norm, limit)
        # One step in each, and in units of the limit no number is extreme.
        ratio, step = float(norm) / float(limit), 1e-4
        at = functools.partial(target_of, respond)
        if abs(ratio - 1) < step and respond != "soft":
            continue  # a kink
        by_norm = (at(ratio * (1 + step), 1) - at(ratio * (1 - step), 1)) / (
            2 * ratio * step
        )
        by_limit = (at(ratio, 1 + step) - at(ratio, 1 - step)) / (2 * step)
        expected = np.diag([by_norm, at(ratio, 1) / ratio]), by_limit * direction
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("respond", RESPONSES)
def test_derivative_at_zero_is_the_identity(respond):
    clip = make(respond, 1.0)
    x = jnp.zeros(2)
    jacobian = jax.jit(jax.jacobian(lambda x: clip.update(x, clip.init(x))[0]))
    np.testing.assert_array_equal(jacobian(x), np.eye(2))


def test_band():
    clip = optaxclip.clip_by_norm(2.0, min_norm=0.5, per="leaf")
    updates = {"a": 0.1, "b": 0.5, "c": 1.0, "d": 2.0, "e": 3.0, "f": 0.0, "g": 1e-37}
    updates = {name: jnp.array([x]) for name, x in updates.items()}
    after, state = jax.jit(clip.update)(updates, clip.init(updates))
    found = np.concatenate(list(after.values()))
    np.testing.assert_allclose(found, [0.5, 0.5, 1, 2, 2, 0, 0.5], rtol=1e-6)
    for name in "bcd":  # to the bit
        np.testing.assert_array_equal(after[name], updates[name])
    np.testing.assert_array_equal(state["clip"].num_clipped, [0, 0, 0, 0, 1, 0, 0])
    norms = optaxclip.metrics({"clip": state["clip"]}, updates)
    assert norms["clip/norm_after/a"] == 0.5
    assert norms["clip/norm_after/c"] == 1


@pytest.mark.parametrize("least", [-1.0, math.nan, math.inf])
def test_a_lower_bound_that_is_bad_or_not_yet_known_is_none(least):
    clip = optaxclip.clip_by_norm(2.0, min_norm=jnp.asarray(least))
    updates = {"w": jnp.array([0.1])}
    np.testing.assert_array_equal(clipped(clip, updates)[0]["w"], updates["w"])


def test_of_two_bounds_that_cross_the_upper_wins():
    clip = optaxclip.clip_by_norm(1.0, min_norm=2.0, per="leaf")
    after, _ = clipped(clip, [jnp.array([0.1]), jnp.array([1.5]), jnp.array([9.0])])
    np.testing.assert_allclose(np.concatenate(after), [1, 1, 1], rtol=1e-6)


def test_both_bounds_of_a_band_learn_from_the_norms_that_come_in():
    learned = limits.ema(2.0, decay=0.5, warmup=2)
    clip = optaxclip.clip_by_norm(
        learned, min_norm=limits.ema(1.5, decay=0.5, warmup=2)
    )
    state, found = clip.init([jnp.ones(1)]), []
    for norm in [1.0, 0.1, 8.0]:
        after, state = clip.update([jnp.array([norm])], state)
        found.append(float(jax.tree.leaves(after)[0][0]))
    # In the second step the mean is 1, so the band is [1.5, 2]. Then it is that of 1
    # and 0.1, which is 0.55.
    np.testing.assert_allclose(found, [1, 1.5, 1.1], rtol=1e-6)


class TestWithGlobal:
    @pytest.mark.parametrize("per", ["leaf", lambda name: name])
    @pytest.mark.parametrize("bounds", [(1.0, 1.2), (1.0, 9.0), (9.0, 0.5), (0.1, 9)])
    def test_is_one_clip_after_the_other(self, per, bounds):
        rng = np.random.default_rng(0)
        updates = [
            jnp.asarray(x * rng.normal(size=(3, 2)), jnp.float32)
            for x in (3.0, 0.2, 1.0, 0.0)
        ]
        each, together = bounds
        both = optax.chain(
            optaxclip.clip_by_norm(each, per=per),
            optaxclip.clip_by_norm(together, label="global"),
        )
        expected, _ = clipped(both, updates)
        clip = optaxclip.clip_by_norm(limits.with_global(each, together), per=per)
        found, _ = clipped(clip, updates)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=3e-7)
        again, _ = clipped(clip, found)
        for x, y in zip(again, found, strict=True):
            np.testing.assert_array_equal(x, y)

    def test_a_scope_that_is_non_finite_is_contained_and_does_not_count(self):
        clip = optaxclip.clip_by_norm(limits.with_global(1.0, 1.0), per="leaf")
        updates = [jnp.array([jnp.nan, 1.0]), jnp.array([0.6]), jnp.array([0.8])]
        found, _ = clipped(clip, updates)
        np.testing.assert_array_equal(found[0], [np.nan, 0])
        for x, expected in zip(found[1:], (0.6, 0.8), strict=True):
            np.testing.assert_array_equal(x, np.float32(expected))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_what_is_non_finite_takes_nothing_from_the_others(self, bad):
        clip = optaxclip.clip_by_norm(limits.with_global(4.0, 2.5), per="leaf")
        found, _ = clipped(clip, [jnp.array([2.4]), jnp.array([bad, 1.0])])
        np.testing.assert_array_equal(found[0], np.float32(2.4))

    @pytest.mark.parametrize("bad", [-1.0, math.nan])
    def test_a_traced_bound_that_is_bad_gives_zeros(self, bad):
        updates = [jnp.array([0.1]), jnp.array([0.2])]
        for each, together in [(bad, 1.0), (1.0, bad)]:
            limit = limits.with_global(jnp.asarray(each), jnp.asarray(together))
            found, _ = clipped(optaxclip.clip_by_norm(limit, per="leaf"), updates)
            np.testing.assert_array_equal(np.concatenate(found), [0, 0])

    @pytest.mark.parametrize("bound", [1e-3, 1e10, 1e30])
    @pytest.mark.parametrize("large", [[1e38], [3e38, 3e38]])
    def test_a_small_scope_beside_a_huge_one_is_scaled_too(self, large, bound):
        norms = [*large, 1.0, 1e-3]
        clip = optaxclip.clip_by_norm(limits.with_global(math.inf, bound), per="leaf")
        found, _ = clipped(clip, [jnp.array([x]) for x in norms])
        norms = np.asarray(norms, np.float32).astype(float)
        expected = norms * (bound / np.linalg.norm(norms))
        # What ends below the smallest normal float may become 0.
        found = np.concatenate(found)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1.2e-38)

    def test_derivative_where_nothing_is_bound(self):
        clip = optaxclip.clip_by_norm(limits.with_global(1.0, math.inf), per="leaf")

        def after(x):
            leaves = [x[:1], x[1:]]
            updates: Any = clip.update(leaves, clip.init(leaves))[0]
            return jnp.concatenate(updates)

        for jacobian in (jax.jacfwd, jax.jacrev):
            found = jax.jit(jacobian(after))(jnp.array([3.0, 0.5]))
            np.testing.assert_allclose(found, [[0, 0], [0, 1]], atol=1e-7)

    def test_not_per_unit(self):
        clip = optaxclip.clip_by_norm(limits.with_global(1.0, 1.0), per="unit")
        with pytest.raises(ValueError, match="per leaf or group, not per unit"):
            clip.init({"w": jnp.ones((2, 2))})

    def test_both_learn(self):
        learned = limits.with_global(
            limits.ema(2.0, decay=0.5, warmup=2), limits.ema(1.5, decay=0.5, warmup=2)
        )
        clip = optaxclip.clip_by_norm(learned, per="leaf")
        state, ones = clip.init([jnp.ones(1)] * 2), jnp.ones(1)
        _, state = clip.update([3 * ones, 4 * ones], state)
        found: Any = clip.update([30 * ones, 4 * ones], state)[0]
        # Each to [6, 4], of norm 7.21 and so below 1.5 * 5.
        np.testing.assert_allclose(np.concatenate(found), [6, 4], rtol=1e-6)
        found = clip.update([30 * ones, 40 * ones], state)[0]
        # Each to [6, 8], and then together to 7.5.
        np.testing.assert_allclose(np.concatenate(found), [4.5, 6], rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"respond must be one of .* not 'clip'"):
        optaxclip.clip_by_norm(1.0, respond="clip")  # pyright: ignore
    with pytest.raises(
        ValueError, match="a lower bound needs respond=\"cap\", not 'set'"
    ):
        optaxclip.clip_by_norm(1.0, respond="set", min_norm=0.5)
    with pytest.raises(ValueError, match=r"min_norm must be >= 0, not -0\.5"):
        optaxclip.clip_by_norm(1.0, min_norm=-0.5)
    for make in (
        lambda where: optaxclip.agc(where=where),
        lambda where: optaxclip.spam(where=where),
        lambda where: optaxclip.clip_by_spectral_norm(1.0, where=where),
        lambda where: optaxclip.stable_adam(optax.adam(1.0), where=where),
    ):
        with pytest.raises(TypeError, match="where must be a function"):
            make("body")
    with pytest.raises(ValueError, match="unit_axis= needs per=\"unit\", not 'leaf'"):
        optaxclip.clip_by_norm(1.0, per="leaf", unit_axis=0)


def test_where_measures_and_clips_the_chosen_leaves_alone():
    updates = {"body": jnp.array([3.0, 4.0]), "head": jnp.array([1e30, jnp.nan])}
    for per in ("tree", "leaf", "unit", lambda name: "all"):
        clip = optaxclip.clip_by_norm(1.0, per=per, where=lambda name: name == "body")
        after, state = clipped(clip, updates)
        np.testing.assert_allclose(after["body"], [0.6, 0.8], rtol=1e-6)
        np.testing.assert_array_equal(after["head"], updates["head"])
        norms = jax.tree.leaves(state["clip"].norm)
        np.testing.assert_allclose(np.hstack(norms).sum(), 5, rtol=1e-6)


def test_where_also_measures_the_parameters_of_the_chosen_leaves_alone():
    limit = limits.params(0.1)
    clip = optaxclip.clip_by_norm(limit, where=lambda name: name == "a")
    updates = {"a": jnp.array([1.0]), "b": jnp.array([1.0])}
    params = {"a": jnp.array([2.0]), "b": jnp.array([1e9])}
    after, _ = clip.update(updates, clip.init(params), params)
    np.testing.assert_allclose(jax.tree.leaves(after)[0], [0.2], rtol=1e-6)


@pytest.mark.slow
def test_layers_and_experts_come_apart():
    rng = np.random.default_rng(0)
    stacked = jnp.asarray(rng.normal(size=(3, 5, 2, 2)), jnp.float32)
    alone = [stacked[i, j] for i in range(3) for j in range(5)]
    for per in ("leaf", "unit"):
        clip = optaxclip.clip_by_norm(1.0, per=per, stacked=lambda name: 2)
        after, state = clipped(clip, {"moe": stacked})
        plain = optaxclip.clip_by_norm(1.0, per=per)
        expected, unstacked = clipped(plain, alone)
        np.testing.assert_array_equal(after["moe"].reshape(15, 2, 2), expected)
        np.testing.assert_array_equal(
            np.ravel(state["clip"].norm), np.ravel(unstacked["clip"].norm)
        )
        names = optaxclip.metrics({"clip": state["clip"]}, {"moe": stacked}, top=None)
        assert "clip/norm/moe[2, 4]" in names
        assert len(names) == 5 * (1 + 15)


@pytest.mark.slow
def test_norms_of_many_experts_are_those_of_the_unstacked_tree():
    """`[48, 384, 8, 8]`: 18,432 matrices."""
    shape = 48, 384, 8, 8
    x = jax.random.normal(jax.random.key(0), shape) * 10.0 ** jnp.arange(48).reshape(
        48, 1, 1, 1
    )
    norms = optaxclip.leaf_norms({"w": x / 1e20}, stacked=lambda name: 2)
    layers = [x[i] / 1e20 for i in range(48)]
    expected = optaxclip.leaf_norms(layers, stacked=lambda name: 1)
    np.testing.assert_array_equal(norms, expected)
    layer = optaxclip.leaf_norms([x[7, i] / 1e20 for i in range(384)])
    # Squares are added in another order: two roundings.
    np.testing.assert_allclose(norms[7 * 384 : 8 * 384], layer, rtol=2 * 2.0**-23)
    matrices = np.asarray(x / 1e20, float).reshape(-1, 64)
    np.testing.assert_allclose(norms, np.linalg.norm(matrices, axis=1), rtol=1e-6)


@pytest.mark.slow
def test_metrics_and_memory_of_many_experts_under_stabilize():
    params = {"experts": jnp.zeros((48, 384, 1, 1)), "router": jnp.zeros(2)}
    tx = optaxclip.stabilize(
        optax.sgd(0.1), stacked=lambda name: 2 * (name == "experts")
    )
    state = jax.eval_shape(tx.init, params)
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)]
    assert max(sizes) == 4 * 256 * (48 * 384 + 1 + 6)  # the record, 19 MB
    assert sum(sizes) < 1.05 * max(sizes)
    found = jax.eval_shape(lambda state: optaxclip.metrics(state, params), state)
    assert len(found) < 100


@pytest.mark.parametrize(
    ("stacked", "error", "match"),
    [
        (
            lambda name: 3,
            ValueError,
            "stacked= gives 'w' 3 leading axes, but its shape",
        ),
        (lambda name: -1, TypeError, "stacked= must give 'w' True, False or a number"),
        (lambda name: "w", TypeError, "stacked= must give 'w' True, False or a number"),
    ],
)
def test_errors_of_stacked(stacked, error, match):
    with pytest.raises(error, match=match):
        optaxclip.leaf_norms({"w": jnp.ones((2, 2))}, stacked=stacked)


class TestUnitAxis:
    def test_agc_on_equinox_is_agc_on_the_transposed_flax_tree(self):
        key = jax.random.key(0)
        layer = eqx.nn.MLP(3, 4, 5, depth=2, key=key)
        params = eqx.filter(layer, eqx.is_array)
        grads = jax.tree.map(lambda x: jnp.cumsum(x, 0) * 10, params)
        flax = [x.T for x in jax.tree.leaves(params)]
        after, _ = _agc(params, grads)
        expected, _ = _agc(flax, [x.T for x in jax.tree.leaves(grads)])
        for found, other in zip(jax.tree.leaves(after), expected, strict=True):
            np.testing.assert_array_equal(found, other.T)

    @pytest.mark.parametrize(
        ("layer", "axes"),
        [
            (eqx.nn.Conv2d(3, 4, 2, key=jax.random.key(0)), (2, 3, 1, 0)),
            (eqx.nn.ConvTranspose1d(3, 4, 2, key=jax.random.key(0)), (2, 1, 0)),
            (eqx.nn.Embedding(5, 3, key=jax.random.key(0)), (0, 1)),
        ],
        ids=["Conv2d", "ConvTranspose1d", "Embedding"],
    )
    def test_agc_on_an_equinox_layer_is_agc_on_that_of_flax(self, layer, axes):
        params = eqx.filter(layer, eqx.is_array)
        grads = jax.tree.map(lambda x: 10 * x.at[0].set(30.0), params)

        def as_flax(layer):
            kernel = {"kernel": layer.weight.transpose(axes)}
            has_bias = hasattr(layer, "bias")
            return kernel | ({"bias": layer.bias.reshape(-1)} if has_bias else {})

        after, _ = _agc(params, grads)
        expected, _ = _agc(as_flax(params), as_flax(grads))
        found = as_flax(after)
        for name, x in expected.items():
            np.testing.assert_allclose(found[name], x, rtol=1e-6, err_msg=name)

    def test_an_array_of_a_module_of_ones_own_keeps_the_last_axis(self):
        class Own(eqx.Module):
            weight: jax.Array
            inner: eqx.nn.Linear

        model = Own(jnp.ones((2, 3)), eqx.nn.Linear(4, 5, key=jax.random.key(0)))
        norms = jax.tree.leaves(optaxclip.unit_norms(model))
        assert [x.shape for x in norms] == [(3,), (5,), ()]

    def test_a_choice_by_name(self):
        tree = {"a": jnp.ones((2, 3, 4)), "b": jnp.ones((2, 3))}
        axis = {"a": 1, "b": -2}
        norms = optaxclip.unit_norms(tree, unit_axis=axis.__getitem__)
        np.testing.assert_allclose(norms["a"], np.sqrt([8, 8, 8]), rtol=1e-6)
        np.testing.assert_allclose(norms["b"], np.sqrt([3, 3]), rtol=1e-6)

    def test_behind_stacked_axes(self):
        x = jnp.arange(24.0).reshape(2, 3, 4)
        norms = optaxclip.unit_norms({"w": x}, unit_axis=0, stacked=lambda name: True)
        np.testing.assert_allclose(norms["w"], np.linalg.norm(x, axis=2), rtol=1e-6)

    def test_a_layer_that_inherits_one_of_equinox_is_like_it(self):
        class Mine(eqx.nn.Linear):
            pass

        kind: Any = Mine
        norms = optaxclip.unit_norms(kind(3, 2, key=jax.random.key(0)))
        assert norms.weight.shape == (2,)

    def test_leaves_that_are_not_clipped_need_no_such_axis(self):
        clip = optaxclip.clip_by_norm(
            1.0, per="unit", unit_axis=2, where=lambda name: name == "c"
        )
        clip.init({"c": jnp.ones((2, 2, 2)), "d": jnp.ones((2, 2))})

    def test_an_axis_that_is_not_there(self):
        with pytest.raises(ValueError, match=r"unit_axis= gives 'w' axis 2, but"):
            optaxclip.unit_norms({"w": jnp.ones((2, 3))}, unit_axis=2)


def _agc(params, grads) -> Any:
    agc = optaxclip.agc(0.1)
    return jax.jit(agc.update)(grads, agc.init(params), params)


class TestMuon:
    """Muon scales a matrix's update by itself: a clip before it changes the others."""

    @staticmethod
    def errors(clip, size):
        """Of a matrix, whose gradient is so much larger, and of a vector."""

        def loss(params):
            matrix, vector = (jnp.sum((params[x] - 1) ** 2) for x in ("w", "b"))
            return size * matrix + vector

        tx = optax.chain(clip, optax.contrib.muon(0.05))
        params = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(4)}

        @jax.jit
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jax.lax.scan(step, (params, tx.init(params)), length=100)[0][0]
        return [float(jnp.max(jnp.abs(params[x] - 1))) for x in ("w", "b")]

    def test_a_norm_of_1e8_trains(self):
        matrix, vector = self.errors(optaxclip.clip_by_norm(1.0), 1e8)
        assert matrix < 0.3
        assert vector < 0.3

    def test_with_one_of_1e10_the_vector_stands_still(self):
        assert self.errors(optaxclip.clip_by_norm(1.0), 1e10)[1] > 0.8

    def test_with_the_matrix_left_out_both_train(self):
        clip = optaxclip.clip_by_norm(1.0, where=lambda name: name != "w")
        matrix, vector = self.errors(clip, 1e10)
        assert matrix < 0.3
        assert vector < 0.3
