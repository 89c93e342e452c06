"""What `explain` says of the growth before an explosion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip
from optaxclip.explosions.leading import STEPS_BEFORE, fit_growth, leading_leaf
from optaxclip.reporting.growth import growth_of
from optaxclip.reporting.history import History

NUM_STEPS, BEGAN = 150, 140


@pytest.fixture
def kept() -> History:
    """A leaf that rose long ago and stays there, and one that rises now."""
    early = np.where(np.arange(NUM_STEPS) < 60, 1, 50)
    late = np.ones(NUM_STEPS)
    late[BEGAN:] = 1.4 ** np.arange(1, NUM_STEPS - BEGAN + 1)
    norms = np.stack([early, late], axis=1).astype(np.float32)
    fired = np.zeros((NUM_STEPS, 4), bool)
    fired[BEGAN:, 1] = True
    norms[-1], fired[-1, 0] = np.nan, True
    unknown = np.full(NUM_STEPS, np.inf, np.float32)
    return History(
        step=np.arange(NUM_STEPS),
        loss=np.full(NUM_STEPS, np.nan, np.float32),
        loss_limit=unknown,
        norm=np.linalg.norm(norms, axis=1),
        limit=unknown,
        fired=fired,
        leaf=np.full(NUM_STEPS, -1),
        norms=norms,
        names=["early", "late"],
    )


def test_the_leaf_that_had_grown_most_is_that_of_the_device(kept):
    last = NUM_STEPS - 2  # of the last step no growth can be told
    before = kept.norms[last - STEPS_BEFORE]
    assert leading_leaf(kept.norms[last], before) == 1
    assert "that of 'late' had grown most" in growth_of(kept, BEGAN)[-1]


def test_the_growth_is_that_of_a_line_fitted_to_the_logarithms(kept):
    noise = np.exp(0.5 * np.random.default_rng(0).normal(size=NUM_STEPS))
    norms = kept.norms[:, 1] * np.where(np.arange(NUM_STEPS) < BEGAN, 1, noise)
    kept = kept._replace(norms=norms[:, None], norm=norms, names=["late"])
    rise = slice(BEGAN - 1, NUM_STEPS - 1)
    logs = np.log(norms[rise])
    slope = np.polyfit(np.arange(logs.size), logs, 1)[0]
    by_ends = np.exp((logs[-1] - logs[0]) / (logs.size - 1))
    assert abs(np.exp(slope) - by_ends) > 0.01
    (told,) = growth_of(kept, BEGAN)
    assert f"by about {np.exp(slope):.3g}x per step since step {BEGAN - 1}" in told
    fitted = fit_growth(np.float32(norms[rise]))
    np.testing.assert_allclose(fitted, np.exp(slope), rtol=1e-5)


def test_what_has_jumped_and_falls_had_not_grown(kept):
    norm = np.ones(NUM_STEPS, np.float32)
    norm[BEGAN:-1] = 100.0 * 0.5 ** np.arange(NUM_STEPS - 1 - BEGAN)
    norm[BEGAN:-1] += 1.01
    norm[-1] = np.nan
    kept = kept._replace(norms=norm[:, None], norm=norm, names=["late"])
    assert growth_of(kept, BEGAN) == []


def test_where_no_step_is_finite_no_leaf_is_named(kept):
    norms, norm = (np.full_like(x, np.nan) for x in (kept.norms, kept.norm))
    assert growth_of(kept._replace(norms=norms, norm=norm), BEGAN) == []


def test_of_a_share_that_is_too_large_the_leaf_is_named():
    params = {"calm": jnp.ones(1), "growing": jnp.ones(1)}
    detection = optaxclip.detect_explosions()

    def step(state, count):
        size = 1e-6 * 1.2 ** jnp.maximum(count - 70.0, 0)
        grads = {"calm": jnp.ones(1), "growing": size * jnp.ones(1)}
        return detection.update(grads, state, params)[1], None

    state, _ = jax.lax.scan(step, detection.init(params), jnp.arange(110.0))
    story = optaxclip.explain(state, params)
    assert "began on step 91: the share of leaf 'growing' in the norm was 4.6" in story
