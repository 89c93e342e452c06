"""The limits against naive references, and what hostile norms do to them."""

import functools
import math
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import optaxclip
from optaxclip import limits
from registry import LIMITS

pytestmark = pytest.mark.usefixtures("strict", "quick_by_default")
BFLOAT16 = np.asarray(jnp.bfloat16(0.5))[()]


def case(row, **kwargs) -> Any:
    return row.make(**kwargs), functools.partial(row.reference, **kwargs)


WITH_REFERENCE = {name: row for name, row in LIMITS.items() if row.reference}
CASES = {name: case(row) for name, row in WITH_REFERENCE.items()}
CASES |= {
    f"short {name}": case(row, **row.short)
    for name, row in WITH_REFERENCE.items()
    if row.short
}
EACH_KIND = ["minimum", *(name for name in CASES if "short" in name)]
# As "minimum" and "short fraction_of_start" are.
LIKE_ANOTHER = {"maximum", "fraction_of_start"}
# Of what is compiled for each limit, these stand for all: averages, a window that is
# sorted, a walk, and one that is made of others.
QUICK = {"ema", "minimum", "short percentile", "short quantile"}
quick_limits = pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow)
        for x in ("ema", *EACH_KIND)
    ],
)
every_limit = pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=[pytest.mark.slow] if x in LIKE_ANOTHER else [])
        for x in CASES
    ],
)
# The same code with other numbers is slow.
each_kind_of_limit = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in EACH_KIND else pytest.mark.slow)
        for name in CASES
    ],
)


def expected(name, norms) -> Any:
    """The naive limits `[steps, ...]`, NaN where a norm is non-finite or zero."""
    norms = np.asarray(norms, np.float64)
    is_good = (norms > 0) & (norms < np.inf)
    totals = np.linalg.norm(np.where(is_good, norms, 0).reshape(len(norms), -1), axis=1)
    found = np.full(norms.shape, np.nan)
    for scope in np.ndindex(norms.shape[1:]):
        column = (slice(None), *scope)
        good = is_good[column]
        found[(good, *scope)] = CASES[name][1](norms[column][good], totals[good])
    return found


def noisy(*shape, seed=0) -> Any:
    rng = np.random.default_rng(seed)
    return np.exp(0.3 * rng.standard_normal(shape)).astype(np.float32)


@functools.cache
def update_of(name) -> Any:
    return jax.jit(CASES[name][0].update)


def run(name, norms, state=None) -> tuple[Any, Any]:
    """(limits of each step, last state)."""
    if state is None:
        state = CASES[name][0].init(jnp.ones_like(norms[0]))
    found = []
    for row in norms:
        value, state = update_of(name)(jnp.asarray(row), state, None)
        found.append(np.asarray(value))
    return np.stack(found), state


def hostile(num_steps) -> Any:
    """Three scopes with spikes, a rise, a fall, and values that say nothing."""
    norms = noisy(num_steps, 3)
    norms[41::41, 0] *= 1000
    norms[[8, 26], 0] *= 9  # right after the baseline of 7 and that of 25
    norms[::67, 1] *= 3
    norms[250:, 1] *= 10
    norms[400:, 2] /= 10
    for step, value in [(3, np.nan), (40, np.inf), (5, 0), (77, -np.inf)]:
        norms[step, step % 3] = value
    return norms


def assert_equals_the_reference(name, norms, found, rtol):
    want = expected(name, norms)
    says = ~np.isnan(want)
    want = np.where(want > np.finfo(found.dtype).max, np.inf, want)
    np.testing.assert_allclose(found[says], want[says], rtol=rtol)


def assert_same_type(name, state, shape):
    like = CASES[name][0].init(jnp.ones(shape))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, like)


@each_kind_of_limit
def test_equals_the_naive_reference(name):
    norms = hostile(600)
    found, state = run(name, norms)
    # The quantile's walk adds up one rounding a step.
    rtol = 1e-4 if "quantile" in name else 1e-5
    assert_equals_the_reference(name, norms, found, rtol)
    assert_same_type(name, state, 3)


@each_kind_of_limit
def test_a_constant_sequence_and_then_a_small_rise(name):
    norms = np.full((200, 3), [1.0, 9.0, 0.03], np.float32)
    norms[150:] *= 1.005
    assert_equals_the_reference(name, norms, run(name, norms)[0], rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in CASES],
)
@pytest.mark.usefixtures("x64")
def test_float64_and_a_single_scope(name):
    norms = np.float64(hostile(500)[:, 0]) * (1 if "quantile" in name else 1e100)
    found, state = run(name, norms)
    assert_equals_the_reference(name, norms, found, 1e-11)
    assert found.dtype == np.float64
    assert_same_type(name, state, ())


@each_kind_of_limit
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_scopes_of_any_shape(name, shape):
    limit, norms = CASES[name][0], jnp.ones(shape)
    state = limit.init(norms)
    found, new_state = jax.eval_shape(limit.update, norms, state, None)
    chex.assert_trees_all_equal_shapes_and_dtypes((norms, state), (found, new_state))


@each_kind_of_limit
def test_norms_that_say_nothing_leave_no_trace(name):
    norms = noisy(60, 3)
    clean, clean_state = run(name, norms)
    is_bad = np.isin(np.arange(64), [3, 17, 40, 50])
    bad = np.asarray([[np.nan], [0], [np.inf], [-np.inf]], np.float32)
    for scopes in (slice(None), slice(1, 2)):
        broken = noisy(64, 3, seed=1)
        broken[~is_bad] = norms
        broken[is_bad, scopes] = bad
        found, state = run(name, broken)
        np.testing.assert_array_equal(found[~is_bad][:, scopes], clean[:, scopes])
        states = jax.tree.map(lambda x, s=scopes: x[s], (state, clean_state))
        chex.assert_trees_all_equal(*states)


@quick_limits
def test_zero_gradients_do_not_lock_the_clip(name):
    clip: Any = optaxclip.clip_by_norm(CASES[name][0])
    update = jax.jit(clip.update)
    updates = zeros = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    state = fresh = clip.init(zeros)
    for _ in range(110):
        updates, state = update(zeros, state)
        chex.assert_trees_all_equal(updates, zeros)
    for size in noisy(60):
        grads = {"w": size * jnp.asarray([0.6, 0.0]), "b": size * jnp.asarray(0.8)}
        updates, state = update(grads, state)
        without_zeros, fresh = update(grads, fresh)
        chex.assert_trees_all_equal(updates, without_zeros)
    assert optaxclip.global_norm(updates) > 0.5


@pytest.mark.parametrize("name", ["zscore", "percentile", "ema", "window_sigma"])
def test_the_unit_of_the_norms_does_not_matter(name):
    norms = hostile(500)[:, :1] * np.asarray([1, 2.0**60, 2.0**-60], np.float32)
    found, _ = run(name, norms)
    np.testing.assert_array_equal(found[:, 1], found[:, 0] * np.float32(2.0**60))
    np.testing.assert_array_equal(found[:, 2], found[:, 0] * np.float32(2.0**-60))


@each_kind_of_limit
def test_norms_near_the_largest_float(name):
    norms = noisy(300, 3) * np.float32(1e38)
    found, _ = run(name, norms)
    assert_equals_the_reference(name, norms, found, 1e-4)


@pytest.mark.slow
@every_limit
def test_norms_near_the_smallest_float(name):
    flat = np.full((100, 3), 2e-38)
    flat[80:] *= 1.1
    for norms in (1e-37 * noisy(100, 3), flat):
        found, state = run(name, np.float32(norms))
        if "start" in name:
            continue  # it learns from the first norms alone
        assert (found > 0).all()
        last, _ = run(name, noisy(1000, 3), state)
        # With its defaults, ema grows by 1.001 a step.
        assert (last[-1] > (2 * found[-1] if name == "ema" else 0.3)).all()


# One run of 100,000 steps for all that follows. Scopes: 0 as it is; 1 rises by 10x and
# 2 falls by 10x at CHANGE; 3 and 4 had that size from the first step.

CHANGE = 90_000


@functools.cache
def long_run(name) -> tuple[Any, Any, Any]:
    norms = np.repeat(noisy(100_000, 1), 5, axis=1)
    norms[CHANGE:, 1] *= 10
    norms[CHANGE:, 2] /= 10
    norms[:, 3] *= 10
    norms[:, 4] /= 10
    limit = CASES[name][0]

    def step(state, norms):
        value, state = limit.update(norms, state, None)
        return state, value

    state = limit.init(jnp.ones(5))
    state, found = jax.jit(lambda *args: lax.scan(step, *args))(state, norms)
    return norms, np.asarray(found), state


@pytest.mark.slow
@every_limit
def test_100_000_steps(name):
    norms, found, state = long_run(name)
    # A window has forgotten all but its end.
    windows = "percentile", "window_sigma", "log_quantile"
    start = -1500 if name.endswith(windows) else 0
    rtol = 1e-2 if name in ("quantile", "short quantile") else 1e-5
    want = expected(name, norms[start:, 1])
    np.testing.assert_allclose(found[-1, 1], want[-1], rtol=rtol)
    assert_same_type(name, state, 5)
    counts = [x for x in jax.tree.leaves(state) if x.dtype == jnp.int32]
    assert all(np.all((x >= 0) & (x <= 1024)) for x in counts)
    if name == "log_quantile":
        assert np.all(np.mean(norms > found, 0) < 1e-3)
    if name in ("quantile", "short quantile"):
        target = 0.883 if "short" in name else 0.5
        np.testing.assert_allclose(np.mean(norms <= found, 0), target, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("zscore", 75, 300),
        ("short log_quantile", 11, 11),
        ("ema", 2300, 170),
        ("quantile", 24, 24),
        *(
            # The same code with other numbers, or other windows.
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (
                ("short percentile", 9, 9),
                ("short window_sigma", 15, 15),
                ("short zscore", 21, 45),
                ("minimum", 75, 300),
                ("percentile", 1024, 1024),
                ("window_sigma", 128, 128),
                ("log_quantile", 128, 128),
                ("short ema", 12, 17),
                ("short quantile", 6, 42),
            )
        ),
    ],
)
def test_a_change_of_regime_is_followed(name, up, down):
    """Within so many steps, and from then on, to a factor of 2."""
    _, found, _ = long_run(name)
    for changed, from_the_start, num_steps in [(1, 3, up), (2, 4, down)]:
        ratio = found[CHANGE:, changed] / found[CHANGE:, from_the_start]
        is_far = (ratio > 2) | (ratio < 0.5)
        assert is_far[0]
        assert not is_far[num_steps:].any()


def after_a_spike(name) -> tuple[Any, Any]:
    """Norms and limits of three scopes: no spike at step 300, 1000x, 1e30x."""
    norms = np.repeat(noisy(600, 1), 3, axis=1)
    norms[300] *= np.asarray([1, 1e3, 1e30], np.float32)
    return norms, run(name, norms)[0]


def test_a_spike_moves_zscore_by_one_outlier_at_its_limit():
    _, state = run("zscore", np.repeat(noisy(300, 1), 3, axis=1))
    for z in (2.51, 3.0, 1e3, 1e30):
        _, after = run("zscore", [state.mean + z * state.std], state)
        assert np.all(after.mean >= state.mean)
        assert np.all(after.mean - state.mean <= 1.0001 * 0.03 * 2.5 * state.std)
        growth = math.sqrt(0.97 + 0.03 * (0.97 * 2.5) ** 2)
        assert np.all(after.std <= 1.0001 * growth * state.std)
        if z == 2.51:
            assert np.all(after.std >= 0.99 * growth * state.std)


@pytest.mark.parametrize("name", ["percentile", "short percentile"])
def test_a_spike_moves_percentile_to_the_next_norm(name):
    norms, found = after_a_spike(name)
    window = 9 if "short" in name else 1024
    ordered = np.sort(norms[:300][-window:, 0])
    after = found[300, 1:]
    next_norm = ordered[np.searchsorted(ordered, found[299, 0], "right")]
    assert np.all((found[299, 0] <= after) & (after <= next_norm))


def test_a_spike_raises_window_sigma_for_a_window():
    norms, found = after_a_spike("window_sigma")
    for scope in (1, 2):
        documented = norms[300, scope] * (1 / 128 + 3 / math.sqrt(128))
        np.testing.assert_allclose(found[301, scope], documented, rtol=0.02)
        assert found[300 + 128, scope] > 100
        np.testing.assert_array_equal(found[300 + 129 :, scope], found[300 + 129 :, 0])


@pytest.mark.parametrize(
    ("name", "factor"),
    [("ema", 1 + 0.02 * 0.05), ("short ema", 1.2), ("quantile", math.exp(0.1))],
)
def test_a_spike_raises_a_limit_by_its_factor(name, factor):
    _, found = after_a_spike(name)
    np.testing.assert_allclose(found[301, 1:], factor * found[300, 1:], rtol=1e-5)


@quick_limits
def test_gradients_through_30_steps_are_finite(name):
    clip: Any = optaxclip.clip_by_norm(CASES[name][0])

    def loss(x, sizes):
        def step(carry, size):
            x, state = carry
            updates, state = clip.update({"x": size * x}, state)
            return (x - 0.1 * updates["x"], state), None

        (x, _), _ = lax.scan(step, (x, clip.init({"x": x})), sizes)
        return jnp.sum(x**2)

    grad, x = jax.jit(jax.grad(loss)), jnp.asarray([3.0, 4.0])
    for sizes in (noisy(30), np.ones(30, np.float32), np.zeros(30, np.float32)):
        found = grad(x, sizes)
        assert np.isfinite(found).all()
        assert np.any(found != 0)


@quick_limits
def test_an_ensemble_equals_its_runs(name):
    limit, norms = CASES[name][0], noisy(60, 4, 3)
    update = jax.jit(jax.vmap(limit.update, in_axes=(0, 0, None)))
    state = jax.vmap(limit.init)(jnp.ones((4, 3)))
    found = []
    for row in norms:
        value, state = update(row, state, None)
        found.append(value)
    for member in range(4):
        alone, _ = run(name, norms[:, member])
        np.testing.assert_allclose(np.stack(found)[:, member], alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "traced", "lengths"),
    [
        ("constant", {"max_norm": 2.0}, {}),
        ("params", {"max_ratio": 0.5, "eps": 0.25}, {}),
        ("rms", {"max_rms": 0.5}, {}),
        ("zscore", {"max_zscore": 1.5, "decay": 0.75}, {"warmup": 3}),
        ("percentile", {"percent": 37.5}, {"window": 4}),
        ("ema", {"multiple": 1.5, "decay": 0.75}, {"warmup": 3}),
        ("window_sigma", {"sigmas": 1.5}, {"window": 4}),
        ("quantile", {"target": 0.25, "initial_norm": 0.5, "rate": 0.5}, {}),
    ],
)
def test_traced_arguments(name, traced, lengths):
    def last(traced):
        limit = getattr(limits, name)(**traced, **lengths)

        def step(state, norms):
            value, state = limit.update(norms, state, norms)
            return state, value

        return lax.scan(step, limit.init(jnp.ones(3)), noisy(12, 3))

    found = jax.jit(last)(jax.tree.map(jnp.float16, traced))
    chex.assert_trees_all_close(found, jax.jit(lambda: last(traced))(), rtol=1e-6)
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(found))


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("zscore", {"decay": 0.9}, {"decay": math.nan}),
        ("zscore", {"decay": 0.9}, {"decay": 1.0}),
        ("percentile", {"percent": 50.0}, {"percent": math.nan}),
        ("ema", {"multiple": 2.0, "decay": 0.9}, {"multiple": 2.0, "decay": math.nan}),
        ("ema", {"multiple": 2.0, "decay": 0.9}, {"multiple": 1.0, "decay": 1.0}),
        ("quantile", {"rate": 0.5}, {"rate": math.nan}),
    ],
)
def test_a_bad_traced_argument_leaves_no_trace(name, good, bad):
    @jax.jit
    def update(norm, state, arguments):
        return getattr(limits, name)(**arguments).update(norm, state, None)

    as_arrays = functools.partial(jax.tree.map, jnp.float32)
    found: Any = None
    state = getattr(limits, name)(**good).init(jnp.ones(()))
    for norm in noisy(120):
        _, state = update(norm, state, as_arrays(good))
    for _ in range(3):
        _, state = update(jnp.float32(1), state, as_arrays(bad))
    for norm in noisy(50):
        found, state = update(norm, state, as_arrays(good))
    assert 0.3 < found < 6


@pytest.mark.parametrize("name", ["zscore", "ema", "percentile", "window_sigma"])
def test_a_length_may_be_of_any_integer_type(name, x64):
    argument = "warmup" if name in ("zscore", "ema") else "window"
    needed = {"multiple": 2.0} if name == "ema" else {}
    expected: Any = None
    found: Any = None
    for length in (3, np.uint8(3), np.int64(3)):
        limit = getattr(limits, name)(**needed, **{argument: length})
        state, update = limit.init(jnp.ones((), jnp.float32)), jax.jit(limit.update)
        for norm in noisy(9):
            found, state = update(norm, state, None)
        chex.assert_trees_all_equal_dtypes(state, limit.init(jnp.ones((), jnp.float32)))
        expected = found if expected is None else expected
        assert found == expected


def test_zscore_finds_a_new_level_through_heavy_tails():
    """Where one norm in three hides among the old ones."""
    norms = np.exp(noisy(3000, 2, seed=1)).astype(np.float32)
    norms[600:] *= np.where(np.arange(2400) % 3, 10, 1)[:, None]
    limit = limits.zscore()
    found, _ = lax.scan(
        lambda state, row: limit.update(row, state, None)[::-1],
        limit.init(jnp.ones(2)),
        norms,
    )[::-1]
    assert np.all(found[590:600] < 10)
    assert np.all(found[800:] > np.median(norms[800:]))


def test_percentile_moves_by_one_place_when_its_window_is_full():
    norms = noisy(1300)
    norms[1200] = 1e30
    found, _ = run("percentile", norms[:, None])
    before, after = (np.sort(norms[i - 1023 : i + 1]) for i in (1199, 1200))
    place = 0.1 * 1023
    for limit, ordered in ((found[1199, 0], before), (found[1200, 0], after)):
        assert ordered[int(place)] <= limit <= ordered[int(place) + 1]
    assert found[1200, 0] <= before[int(place) + 2]


OUT_OF_RANGE = {
    "constant": {"max_norm": [-1]},
    "params": {"max_ratio": [-0.5], "eps": [-0.5]},
    "rms": {"max_rms": [-0.5]},
    "zscore": {"max_zscore": [0, -2.5], "decay": [0, 1, 1.5]},
    "percentile": {"percent": [-1, 100.5]},
    "ema": {"multiple": [1, 0.5], "decay": [0, 1, 1.5], "max_warmup_norm": [0, -1.0]},
    "window_sigma": {"sigmas": [-0.5]},
    "quantile": {"target": [0, 1], "initial_norm": [0, math.inf], "rate": [0, -1]},
}


def assert_refuses(error, name, argument, value):
    needed = {"multiple": 2.0} if name == "ema" else {}
    message = f"{argument} must be .*{re.escape(repr(value))}"
    with pytest.raises(error, match=message):
        getattr(limits, name)(**needed | {argument: value})


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name in OUT_OF_RANGE for argument in OUT_OF_RANGE[name]],
)
def test_bad_arguments(name, argument):
    values = OUT_OF_RANGE[name][argument]
    for value in [*values, np.float32(values[0]), math.nan, np.ones(2), jnp.ones(2)]:
        assert_refuses(ValueError, name, argument, value)
    for value in ["1", None, 1j, [1.0]]:
        assert_refuses(TypeError, name, argument, value)


@pytest.mark.parametrize(
    ("name", "argument", "least"),
    [
        ("zscore", "warmup", 2),
        ("percentile", "window", 1),
        ("ema", "warmup", 2),
        ("window_sigma", "window", 2),
    ],
)
def test_bad_lengths(name, argument, least):
    for value in [least - 1, np.int32(-1)]:
        assert_refuses(ValueError, name, argument, value)
    for value in [2.0, True, "3", None]:
        assert_refuses(TypeError, name, argument, value)


@every_limit
def test_what_learns_refuses_units(name):
    clip = optaxclip.clip_by_norm(CASES[name][0], per="unit")
    with pytest.raises(ValueError, match=r"limits\.\w+ learns.*per unit.*per tree"):
        clip.init({"w": jnp.ones((2, 3))})


def test_params_is_a_fraction_of_the_norm_of_the_parameters():
    limit = limits.params(0.25, eps=2.0)
    norms, param_norms = jnp.ones(4), jnp.asarray([8.0, 1.0, jnp.inf, jnp.nan])
    found, _ = limit.update(norms, limit.init(norms), param_norms)
    np.testing.assert_array_equal(found, [2, 0.5, jnp.inf, jnp.nan])
    units = (norms, norms[0])
    found, _ = limit.update(units, limit.init(units), (param_norms, param_norms[0]))
    chex.assert_trees_all_equal(found[1], jnp.asarray(2.0))

    for both in (limit, limits.minimum(9.0, limit), limits.minimum(limit, 9.0)):
        clip: Any = optaxclip.clip_by_norm(both)
        params, grads = {"w": jnp.asarray([16.0])}, {"w": jnp.asarray([-30.0])}
        updates, _ = clip.update(grads, clip.init(params), params)
        np.testing.assert_allclose(updates["w"], [-4], rtol=1e-6)
        with pytest.raises(ValueError, match=r"call update.* with params"):
            clip.update(grads, clip.init(params))
        with pytest.raises(ValueError, match="do not have the leaves of the updates"):
            clip.update(grads, clip.init(params), params | {"frozen": params["w"]})


def test_rms_is_the_norm_of_elements_of_that_size():
    clip: Any = optaxclip.clip_by_norm(limits.rms(0.5), per="leaf")
    grads = {"a": jnp.full((3, 5), -2.0), "b": jnp.asarray(2.0), "c": jnp.ones((0,))}
    updates, state = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(updates["a"], np.full((3, 5), -0.5), rtol=1e-6)
    np.testing.assert_allclose(state["clip"].limit, [7.5**0.5 / 2**0.5, 0.5, 0])


def test_minimum_is_elementwise_also_per_unit():
    limit = limits.minimum(limits.rms(2.0), lambda count: 5 - count)
    sizes = (jnp.asarray([1.0, 9.0]), jnp.asarray(4.0))
    found, state = limit.update(sizes, limit.init(sizes), None)
    chex.assert_trees_all_equal(found, (jnp.asarray([2.0, 5.0]), jnp.asarray(4.0)))
    found, _ = limit.update(sizes, state, None)
    chex.assert_trees_all_equal(found, (jnp.asarray([2.0, 4.0]), jnp.asarray(4.0)))


@pytest.mark.parametrize("limit", [BFLOAT16, lambda count: BFLOAT16])
def test_a_number_may_be_of_a_dtype_that_numpy_itself_lacks(limit):
    for clip in (optaxclip.clip_by_norm(limit), optaxclip.clip_by_value(limit)):
        clipped, _ = clip.update(jnp.array([-4.0]), clip.init(jnp.ones(1)))
        assert clipped == -0.5


def test_the_count_of_a_schedule_saturates():
    limit = limits.schedule(lambda count: jnp.where(count > 0, 1.0, 0.0))
    most = jnp.asarray(jnp.iinfo(jnp.int32).max)
    state = limit.init(jnp.ones(()))._replace(num_steps=most)
    for _ in range(2):
        found, state = limit.update(jnp.ones(()), state, None)
        assert state.num_steps == most
        assert found == 1


def test_window_sigma_takes_a_signal_of_any_sign():
    losses = noisy(200) - 3
    found, _ = run("short window_sigma", losses)
    for step in range(15, 200):
        recent = np.float64(losses[step - 15 : step])
        std = max(np.std(recent), 0.01 * abs(np.mean(recent)))
        np.testing.assert_allclose(found[step], np.mean(recent) + 2 * std, rtol=1e-4)


def test_log_quantile_is_linear_where_a_loss_is_not_positive():
    rng = np.random.default_rng(0)
    losses = rng.normal(-1, 2, 300).astype(np.float32)
    losses[:40] = np.abs(losses[:40]) + 0.1
    found, _ = run("log_quantile", losses)
    for step in range(1, 300):
        past = losses[max(0, step - 128) : step].astype(np.float64)
        low, middle, high = np.percentile(past, [5, 50, 95])
        if past.min() > 0:
            expected = 5 * past[-32:].max()
        else:
            spread = max(high - middle, middle - low)
            expected = middle + max(2 * 3 * spread, (3 - 1) * abs(middle))
        np.testing.assert_allclose(found[step], expected, rtol=1e-4, err_msg=str(step))


def test_log_quantile_needs_an_eighth_of_the_window_for_a_loss_of_either_sign():
    losses = np.asarray([1.0, -1.0] * 20, np.float32)
    found, _ = run("log_quantile", losses)
    assert np.isinf(found[2:16]).all()
    assert np.isfinite(found[16:]).all()


def test_sustained_rise_needs_patience():
    flat, high = np.ones(100, np.float32), np.asarray([8, 8, 1, 8, 8, 8])
    norms = np.concatenate([flat, high]).astype(np.float32)
    is_above = norms > run("sustained_rise", norms)[0]
    assert np.flatnonzero(is_above).tolist() == [105]


def test_above_lowest_notices_a_slow_rise_once():
    norms = 1.02 ** np.concatenate([-np.arange(100), np.arange(-100, 60)])
    norms = norms.astype(np.float32)
    is_above = norms > run("above_lowest", norms)[0]
    # The average turns at 1.02**-94.4, and 1.02**11 is eight times that, at step 211.
    # Seven more are needed.
    assert np.flatnonzero(is_above).tolist() == [218]


def test_above_lowest_says_nothing_of_a_penalty_that_starts_at_zero():
    losses = np.float32(1e-6 * 1.1 ** np.arange(116))  # up to 0.06
    assert np.isinf(run("above_lowest", losses)[0]).all()
    found = run("above_lowest", 10 * losses)[0]  # up to 0.6, the lowest under 0.01
    assert found[np.isfinite(found)] == pytest.approx(0.08)


def test_above_lowest_says_nothing_of_losses_that_were_negative():
    losses = np.asarray([1.0, -0.1] + [1.0] * 10 + [100.0] * 20, np.float32)
    assert np.isinf(run("above_lowest", losses)[0]).all()


def test_a_spike_among_the_first_hardly_moves_their_fraction():
    norms = np.ones(9, np.float32)
    norms[3] = 1e8
    found = run("fraction_of_start", norms)[0]
    np.testing.assert_allclose(found[8], 1e-3 * 10, rtol=1e-5)


def test_a_fraction_of_losses_that_were_negative_is_no_floor():
    losses = np.asarray([1.0, 1.0, -0.1] + [1.0] * 20, np.float32)
    found = run("fraction_of_start", losses)[0]
    np.testing.assert_allclose(found[:3], [0, 1e-3, 1e-3], rtol=1e-6)
    assert np.all(found[3:] == -np.inf)
