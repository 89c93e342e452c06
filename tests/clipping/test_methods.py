"""Named methods are compositions of public parts; what is theirs alone."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip import clip_by_norm, limits

pytestmark = pytest.mark.usefixtures("strict", "quick_by_default")

SCALES = [1.0, 1.2, 0.9, 1.1, 40.0, 1.0, 0.01, 3.0]


def is_stacked(name: str) -> bool:
    return name.startswith("layers")


def tree(scale: float = 1.0) -> dict[str, Any]:
    """Two scanned layers, of different sizes, and two plain leaves."""
    rng = np.random.default_rng(0)
    sizes = np.array([1.0, 20.0])[:, None, None]
    leaves = {
        "layers/kernel": rng.normal(size=(2, 4, 3)) * sizes,
        "layers/bias": rng.normal(size=(2, 3)) * sizes[:, 0],
        "head": rng.normal(size=(3, 2)),
        "scale": rng.normal(size=()),
    }
    return {name: jnp.asarray(scale * x, jnp.float32) for name, x in leaves.items()}


def layer(values: dict[str, Any], i: int) -> dict[str, Any]:
    return {name: x[i] if is_stacked(name) else x for name, x in values.items()}


def updates_of(clip: Any, pick=lambda values: values) -> list:
    params, outputs = pick(tree(0.1)), []
    state, update = clip.init(params), jax.jit(clip.update)
    for scale in SCALES:
        updates, state = update(pick(tree(scale)), state, params)
        outputs.append(updates)
    return outputs


SHORT: dict[str, Any] = {
    "zclip": {"max_zscore": 1.5, "decay": 0.9, "warmup": 3},
    "autoclip": {"percent": 60.0, "window": 4},
    "adagc": {"multiple": 1.2, "decay": 0.9, "warmup": 3, "max_warmup_norm": 5.0},
    "agc": {"max_ratio": 0.3, "eps": 0.2},
    "block_rms": {"max_rms": 2.0},
    "clip_by_historical_norm": {"sigmas": 2.0, "window": 4},
}
COMPOSITIONS: dict[str, Any] = {
    "zclip": (limits.zscore(1.5, decay=0.9, warmup=3), "tree"),
    "autoclip": (limits.percentile(60.0, window=4), "tree"),
    "adagc": (limits.ema(1.2, decay=0.9, warmup=3, max_warmup_norm=5.0), "leaf"),
    "agc": (limits.params(0.3, eps=0.2), "unit"),
    "block_rms": (limits.rms(2.0), "leaf"),
    "clip_by_historical_norm": (limits.window_sigma(2.0, window=4), "tree"),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_method_is_the_composition_it_says(name):
    limit, per = COMPOSITIONS[name]
    method = getattr(optaxclip, name)
    found = updates_of(method(**SHORT[name]))
    chex.assert_trees_all_equal(found, updates_of(clip_by_norm(limit, per=per)))
    assert any(optaxclip.global_norm(u) > 0 for u in found)
    state = method(label="mine", stacked=is_stacked, **SHORT[name]).init(tree())
    stacked = clip_by_norm(limit, per=per, stacked=is_stacked, label="mine")
    chex.assert_trees_all_equal_shapes(state, stacked.init(tree()))


@pytest.mark.parametrize(
    "name",
    [
        "autoclip",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("zclip", "adagc", "clip_by_historical_norm")
        ),
    ],
)
def test_a_learned_method_takes_any_scope(name):
    def group(leaf: str) -> str:
        return "layers" if is_stacked(leaf) else "rest"

    limit, _ = COMPOSITIONS[name]
    found = updates_of(getattr(optaxclip, name)(per=group, **SHORT[name]))
    chex.assert_trees_all_equal(found, updates_of(clip_by_norm(limit, per=group)))


@pytest.mark.parametrize("name", ["adagc", "agc", "block_rms"])
def test_scanned_layers_count_as_leaves_of_their_own(name):
    options = SHORT[name]
    if name == "adagc":  # whose warm-up sees all layers together
        options = options | {"max_warmup_norm": float("inf")}
    method = getattr(optaxclip, name)
    stacked = updates_of(method(stacked=is_stacked, **options))
    for i in range(2):
        alone = updates_of(method(**options), lambda values, i=i: layer(values, i))
        picked = [layer(updates, i) for updates in stacked]
        chex.assert_trees_all_close(picked, alone, rtol=1e-6)


@pytest.mark.slow
def test_scanned_layers_are_what_optax_gets_wrong():
    def kernel(updates):
        return updates[0]["layers/kernel"]

    params = tree(0.1)
    their_clip: Any = optax.adaptive_grad_clip(0.3, 0.2)
    theirs, _ = their_clip.update(tree(), (), params)
    plain = kernel(updates_of(optaxclip.agc(0.3, eps=0.2, stacked=is_stacked)))
    assert not np.allclose(theirs["layers/kernel"], plain, rtol=0.01)
    # Layer by layer, the same.
    for i in range(2):
        expected, _ = their_clip.update(layer(tree(), i), (), layer(params, i))
        np.testing.assert_allclose(plain[i], expected["layers/kernel"], rtol=1e-6)


def test_agc_leaves_out_what_masked_hides():
    clip = optax.masked(optaxclip.agc(), {name: name != "head" for name in tree()})
    for updates, scale in zip(updates_of(clip), SCALES, strict=True):
        np.testing.assert_array_equal(updates["head"], tree(scale)["head"])
        size = scale * jnp.abs(tree()["scale"])
        limit = 0.01 * jnp.abs(tree(0.1)["scale"])
        np.testing.assert_allclose(
            jnp.abs(updates["scale"]), jnp.minimum(size, limit), rtol=1e-6
        )


def test_the_cap_of_zclip_holds_in_warmup_too():
    norm = float(optaxclip.global_norm(tree()))
    half = norm / 2
    for cap in (half, optax.constant_schedule(half), limits.constant(half)):
        clip = optaxclip.zclip(max_norm=cap)
        for updates, scale in zip(updates_of(clip), SCALES, strict=True):
            expected = min(half, norm * scale)
            np.testing.assert_allclose(
                optaxclip.global_norm(updates), expected, rtol=1e-5
            )


def test_parameters_are_measured_only_for_limits_that_need_them():
    params = {"w": jnp.ones(3)}

    def num_reads(clip):
        state = clip.init(params)
        jaxpr = jax.make_jaxpr(lambda g, p: clip.update(g, state, p)[0])(params, params)
        _, w = jaxpr.jaxpr.invars
        return sum(w in eqn.invars for eqn in jaxpr.jaxpr.eqns)

    assert num_reads(clip_by_norm(limits.minimum(limits.params(), 1.0))) > 0
    assert num_reads(clip_by_norm(limits.minimum(limits.rms(), 1.0))) == 0


class TestGradientStabilizer:
    def test_is_the_composition_it_says(self):
        limit = limits.mean_over_rms(0.5, squares_decay=0.9)
        found = updates_of(optaxclip.gradient_stabilizer(0.5, squares_decay=0.9))
        expected = updates_of(clip_by_norm(limit, respond="set", per="leaf"))
        chex.assert_trees_all_equal(found, expected)

    @pytest.mark.slow
    def test_neither_the_unit_nor_the_size_of_a_spike_matters(self):
        clip: Any = optaxclip.gradient_stabilizer()
        update = jax.jit(clip.update)

        def norms(unit, spike):
            state, found = clip.init([jnp.ones(1)]), []
            for step in range(3000):
                size = unit * (spike if step == 2999 else 1.0)
                updates, state = update([jnp.array([size], jnp.float32)], state)
                found.append(float(updates[0][0]))
            return np.array(found)

        ordinary = norms(1.0, 1e20)
        np.testing.assert_allclose(ordinary[:-1], 1, rtol=1e-4)
        # As its docstring says, but for the bias correction.
        largest = (1 - 0.6) / np.sqrt(1 - 0.999) * np.sqrt(1 - 0.999**3000)
        np.testing.assert_allclose(ordinary[-1], largest, rtol=1e-4)
        np.testing.assert_allclose(norms(1e-25, 1e20), ordinary, rtol=1e-4)


class TestAggc:
    def test_band_around_the_mean_of_what_came_out(self):
        clip: Any = optaxclip.aggc(0.5, 2.0, decay=0.5, min_norm=0.01)
        state, found = clip.init([jnp.ones(1)]), []
        for norm in [1.0, 100.0, 0.1, jnp.nan, 0.0, 1.0]:
            updates, state = clip.update([jnp.array([norm])], state)
            found.append(float(updates[0][0]))
        # Means: 1, 1.5, 1.125, and no change by NaN and zero.
        np.testing.assert_allclose(found, [1, 2, 0.75, np.nan, 0, 1], rtol=1e-6)

    def test_small_norms_are_raised_to_min_norm(self):
        clip: Any = optaxclip.aggc(0.5, 2.0, min_norm=0.01)
        updates, _ = clip.update([jnp.array([1e-8])], clip.init([jnp.ones(1)]))
        np.testing.assert_allclose(updates[0], [0.01], rtol=1e-6)

    @pytest.mark.parametrize(
        ("low", "high", "match"),
        [(0.95, 0.6, "high must be > 1, not 0.6"), (1.0, 2.0, r"low must be within")],
    )
    def test_an_empty_band_is_refused(self, low, high, match):
        with pytest.raises(ValueError, match=match):
            optaxclip.aggc(low, high)


class TestSpam:
    def test_equals_the_definition(self):
        rng = np.random.default_rng(0)
        grads = rng.standard_t(1.5, size=(200, 5)).astype(np.float32)
        clip: Any = optaxclip.spam(20.0, decay=0.9, warmup=5)
        state, update = clip.init([jnp.zeros(5)]), jax.jit(clip.update)
        v, num_clipped = np.zeros(5), 0
        for step, g in enumerate(grads, start=1):
            (found,), state = update([jnp.asarray(g)], state)
            bound = np.sqrt(20 * v) if step >= 5 else np.full(5, np.inf)
            expected = np.clip(g.astype(np.float64), -bound, bound)
            num_clipped += np.sum(expected != g)
            v = 0.9 * v + 0.1 * expected**2
            np.testing.assert_allclose(found, expected, rtol=2e-6)
        assert 10 < num_clipped < 300

    def test_an_element_without_a_gradient_so_far_is_not_dead(self):
        clip: Any = optaxclip.spam(warmup=2)
        state = clip.init(jnp.zeros(2))
        for _ in range(30):
            _, state = clip.update(jnp.array([1.0, 0.0]), state)
        found, _ = clip.update(jnp.array([1.0, 1.0]), state)
        np.testing.assert_array_equal(found, [1, 1])

    def test_what_is_non_finite_or_huge(self):
        clip: Any = optaxclip.spam(4.0, decay=0.5, warmup=2)
        state, found = clip.init(jnp.zeros(3)), None
        for g in ([1e30, 1e-30, 1.0], [jnp.inf, jnp.nan, -jnp.inf]):
            found, state = clip.update(jnp.array(g), state)
        # v is half of the square: the bound is sqrt(2) of the first gradient.
        np.testing.assert_allclose(found, [2**0.5 * 1e30, np.nan, -(2**0.5)], 1e-6)
        found, state = clip.update(jnp.array([9e30, 9e-30, 9.0]), state)
        expected = 2**0.5 * np.array([1e30, 1e-30, 1])
        np.testing.assert_allclose(found, expected, rtol=1e-6)

    def test_where_and_other_leaves(self):
        clip: Any = optaxclip.spam(4.0, warmup=2, where=lambda name: name == "a")
        tree = {"a": jnp.ones(2), "b": jnp.ones((3, 3)), "n": jnp.arange(2)}
        state, found = clip.init(tree), tree
        assert state.rms["b"].shape == () == state.rms["n"].shape
        for _ in range(2):
            found, state = clip.update(tree, state)
        np.testing.assert_array_equal(found["b"], tree["b"])

    def test_other_leaves_than_init_was_given(self):
        clip, two = optaxclip.spam(), {"a": jnp.ones(3), "b": jnp.ones(2)}
        for made_for in ({"a": jnp.ones(3)}, two | {"c": jnp.ones(2)}):
            with pytest.raises(ValueError, match="do not have the leaves that init"):
                clip.update(two, clip.init(made_for))
        with pytest.raises(ValueError, match="state must be the SpamState"):
            clip.update(two, optax.EmptyState())

    def test_updates_wider_than_the_parameters(self, x64):
        clip = optaxclip.spam()
        grads = {"w": jnp.array([1 / 3, 1e-50, 1e200])}
        state = clip.init({"w": jnp.ones(3, jnp.float32)})
        found, new = clip.update(grads, state)
        np.testing.assert_array_equal(jax.tree.leaves(found)[0], grads["w"])
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)

    def test_complex_leaves_are_refused(self):
        with pytest.raises(ValueError, match="spam cannot clip complex values: 'w'"):
            optaxclip.spam().init({"w": jnp.ones(2, jnp.complex64)})


SHAPES = {"b": (4,), "w": (3, 2)}


class TestStableAdam:
    def gradients(self, sizes):
        """Signs at random, so that Adam's second moments are those of the sizes."""
        rng = np.random.default_rng(0)
        return [
            {
                name: size * rng.choice([-1.0, 1.0], size=shape)
                for name, shape in SHAPES.items()
            }
            for size in sizes
        ]

    def trained(self, tx, sizes) -> Any:
        params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
        wrapped: Any = optax.with_extra_args_support(tx)
        state, found = wrapped.init(params), []
        update = jax.jit(wrapped.update)
        for grads in self.gradients(sizes):
            grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = update(grads, state, params)
            found.append(updates)
        return found, state

    def test_divides_the_update_by_the_rms_of_the_ratio(self):
        sizes = [1.0] * 20 + [100.0]
        bare, adam = self.trained(optax.scale_by_adam(), sizes)
        found, state = self.trained(optaxclip.stable_adam(optax.scale_by_adam()), sizes)
        chex.assert_trees_all_close(found[:-1], bare[:-1], rtol=2e-5)
        for index, name in enumerate(SHAPES):
            g = self.gradients(sizes)[-1][name]
            v = np.asarray(adam.nu[name], float) / (1 - 0.999**21)
            rms = np.sqrt(np.mean(g**2 / v))
            assert rms > 4
            expected = bare[-1][name] / rms
            np.testing.assert_allclose(found[-1][name], expected, rtol=2e-5)
            np.testing.assert_allclose(state[0]["clip"].norm[index], rms, rtol=1e-5)

    @pytest.mark.parametrize("kind", ["adamw", "chain", "partition"])
    def test_around_what_has_an_adam_inside(self, kind):
        parts: Any = {"adam": optax.adam(1e-3), "sgd": optax.sgd(1e-3)}
        inner: Any = {
            "adamw": optax.adamw(1e-3),
            "chain": optax.chain(optax.identity(), optax.adam(1e-3)),
            "partition": optax.partition(parts, {"w": "adam", "b": "sgd"}),
        }[kind]
        sizes = [1.0] * 5 + [1e4]
        found, state = self.trained(optaxclip.stable_adam(inner, max_rms=1.5), sizes)
        # What Adam does not see is left as it is.
        num_clipped = [int(kind != "partition"), 1]
        np.testing.assert_array_equal(state[0]["clip"].num_clipped, num_clipped)
        bare, _ = self.trained(inner, sizes)
        is_same = [bool((found[-1][n] == bare[-1][n]).all()) for n in SHAPES]
        assert is_same == [not x for x in num_clipped]

    def test_labels_of_whole_subtrees(self):
        params = {
            "body": {"a": jnp.ones(3), "b": jnp.ones(2)},
            "head": {"k": jnp.ones(1)},
        }
        parts: Any = {"adam": optax.adam(1e-3), "sgd": optax.sgd(1.0)}
        for inner in (
            optax.masked(optax.adam(1e-3), {"body": True, "head": False}),
            optax.partition(parts, {"body": "adam", "head": "sgd"}),
        ):
            tx: Any = optaxclip.stable_adam(inner)
            with jax.numpy_dtype_promotion("standard"):
                _, state = jax.jit(tx.update)(params, tx.init(params), params)
            np.testing.assert_allclose(state[0]["clip"].norm, [1, 1, 0], rtol=1e-5)

    def test_an_adam_that_has_not_begun_lags_behind_nothing(self):
        tx: Any = optaxclip.stable_adam(
            optax.MultiSteps(optax.adam(1e-3), 3).gradient_transformation()
        )
        params = {"w": jnp.ones(3)}
        with jax.numpy_dtype_promotion("standard"):
            _, state = jax.jit(tx.update)(params, tx.init(params), params)
        np.testing.assert_array_equal(state[0]["clip"].norm, [0])
        np.testing.assert_array_equal(state[0]["clip"].num_nonfinite, [0])

    @pytest.mark.slow
    def test_parameters_wider_than_the_gradients(self, x64):
        params = {"w": jnp.ones((2, 2))}
        grads = {"w": jnp.full((2, 2), 0.3, jnp.float32)}
        with jax.numpy_dtype_promotion("standard"):
            found, expected = (
                tx.update(grads, tx.init(params), params)[0]
                for tx in (optaxclip.stable_adam(optax.adam(1e-3)), optax.adam(1e-3))
            )
        chex.assert_trees_all_equal(found, expected)

    @pytest.mark.parametrize(
        "inner", [optax.amsgrad, optax.nadam, optax.radam, optax.lamb, optax.yogi]
    )
    def test_around_other_optimizers_like_adam(self, inner):
        _, state = self.trained(optaxclip.stable_adam(inner(1e-3)), [1.0] * 10)
        # Yogi's second moments of equal gradients grow a little faster.
        rtol = 0.01 if inner is optax.yogi else 1e-4
        np.testing.assert_allclose(state[0]["clip"].norm, [1, 1], rtol=rtol)

    @pytest.mark.parametrize(
        ("inner", "num"),
        [
            (optax.sgd(0.1), 0),
            (optax.chain(optax.adam(0.1), optax.adam(0.1)), 2),
            # No count, though a tuple has a method of that name; a nu of each leaf; and
            # a variance in its place.
            (optax.scale_by_rms(), 0),
            (optax.scale_by_stddev(), 0),
            (optax.scale_by_sm3(), 0),
            (optax.scale_by_novograd(), 0),
            (optax.scale_by_belief(), 0),
        ],
    )
    def test_without_one_adam_inside(self, inner, num):
        with pytest.raises(ValueError, match=f"inner must have one .* found {num}"):
            optaxclip.stable_adam(inner).init({"w": jnp.ones(2)})
