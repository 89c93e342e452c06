"""The methods give the limits and norms of their public implementations.

`pytest -n 0 -rP tests/clipping/test_parity.py | grep differ` prints by how much they
differ.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
import record_references
from conftest import configured
from optaxclip import limits
from record_references import (
    AGC_RATIO,
    AGGC_BAND,
    HISTORY,
    NUM_STEPS,
    OPTIMIZERS,
    REFERENCES,
    SPIKES,
    ZCLIP_CAP,
    norms_of,
)

pytestmark = pytest.mark.usefixtures("strict", "quick_by_default")

RTOL = 1e-5
PARAMS, GRADIENTS, RECORDED = record_references.load()


def lagging(limit: limits.Limit) -> limits.Limit:
    """The limit of the step before, in which the norm itself had no part."""

    def init(sizes):
        return limit.init(sizes), jnp.full_like(sizes, jnp.inf)

    def update(norms, state, param_norms=None):
        learned, limit_state = limit.update(norms, state[0], param_norms)
        return state[1], (limit_state, learned)

    return limits.Limit(init, update)


METHODS = {
    "zclip": optaxclip.zclip(),
    "zclip_capped": optaxclip.zclip(max_norm=ZCLIP_CAP),
    "autoclip": optaxclip.autoclip(),
    "autoclip_package": optaxclip.clip_by_norm(lagging(limits.percentile(10.0))),
    "autoclip_package_per_leaf": optaxclip.clip_by_norm(
        lagging(limits.percentile(10.0)), per="leaf"
    ),
    "adagc": optaxclip.adagc(),
    "agc": optaxclip.agc(AGC_RATIO),
    "gradient_stabilizer": optaxclip.gradient_stabilizer(),
    "aggc": optaxclip.aggc(*AGGC_BAND),
    "historical_norm": optaxclip.clip_by_historical_norm(window=HISTORY),
}


def run(tx: Any, dtype: Any = np.float32) -> tuple[dict[str, np.ndarray], Any]:
    """The updates that come out and the states, both with the steps as axis 0."""
    params, gradients = (
        {name: x.astype(dtype) for name, x in tree.items()}
        for tree in (PARAMS, GRADIENTS)
    )

    def step(state, gradients):
        updates, state = tx.update(gradients, state, params)
        return state, (updates, state)

    updates, states = jax.lax.scan(step, tx.init(params), gradients)[1]
    return jax.tree.map(np.asarray, updates), states


def is_clipped(norms: np.ndarray, per: str) -> np.ndarray:
    return norms < norms_of(GRADIENTS, per) * (1 - RTOL)


def assert_equal(name, found, expected) -> None:
    """Norms of updates, and how far they are apart."""
    apart = np.max(np.abs(found / expected - 1))
    print(f"{name}: norms differ by {apart:.1e} of themselves at most")
    np.testing.assert_allclose(found, expected, RTOL)


@pytest.mark.parametrize("name", REFERENCES)
def test_recorded_reference(name):
    per, expected = REFERENCES[name].per, RECORDED[name]
    updates, states = run(METHODS[name])
    norms = norms_of(updates, per)
    assert_equal(name, norms, expected["norms"])
    np.testing.assert_array_equal(
        is_clipped(norms, per), is_clipped(expected["norms"], per)
    )
    found = jax.tree.leaves(states["clip"].limit)
    found = np.concatenate([np.reshape(x, (NUM_STEPS, -1)).T for x in found])
    # Where the reference has none, that both clip the same says what can be said.
    known = np.broadcast_to(expected["limits"], found.shape)
    is_known = ~np.isnan(known)
    np.testing.assert_allclose(found[is_known], known[is_known], RTOL)


@pytest.mark.parametrize("name", REFERENCES)
def test_recorded_reference_clips_the_spikes_and_not_everything(name):
    clipped = is_clipped(RECORDED[name]["norms"], REFERENCES[name].per)
    assert clipped[:, list(SPIKES)].any(axis=0).all()
    assert not clipped.all(axis=0).all()
    assert np.isfinite(RECORDED[name]["limits"]).any(axis=1).all()


@pytest.mark.parametrize(
    ("name", "ours", "unclipped"),
    [
        ("spam", optaxclip.spam(), optax.identity()),
        (
            "stable_adam",
            optaxclip.stable_adam(optax.scale_by_adam()),
            optax.scale_by_adam(),
        ),
    ],
)
def test_recorded_updates(name, ours, unclipped):
    # Optax's Adam needs promotion, and in float32 its bias correction loses 1e-5.
    with jax.numpy_dtype_promotion("standard"), configured("jax_enable_x64", True):
        norms, bare = (
            norms_of(run(tx, np.float64)[0], "leaf") for tx in (ours, unclipped)
        )
    assert_equal(name, norms, RECORDED[name]["norms"])
    is_smaller = norms < 0.9 * bare
    assert is_smaller[:, list(SPIKES)[2:]].any(axis=0).sum() >= 4
    assert is_smaller.mean() < 0.5


@pytest.mark.parametrize("name", [*REFERENCES, *OPTIMIZERS])
def test_reference_gives_what_was_recorded(name):
    reference = (REFERENCES | OPTIMIZERS)[name]
    pytest.importorskip(reference.package)
    found = record_references.record(reference, PARAMS, GRADIENTS)
    for key, values in found.items():
        np.testing.assert_allclose(values, RECORDED[name][key], rtol=1e-6)


@pytest.mark.parametrize(
    ("label", "ours", "theirs", "per"),
    [
        ("agc", optaxclip.agc(), optax.adaptive_grad_clip(0.01), "unit"),
        (
            "agc_of_some_units",
            optaxclip.agc(AGC_RATIO),
            optax.adaptive_grad_clip(AGC_RATIO),
            "unit",
        ),
        ("block_rms", optaxclip.block_rms(), optax.clip_by_block_rms(1.0), "leaf"),
    ],
    ids=["agc", "agc_of_some_units", "block_rms"],
)
def test_optax(label, ours, theirs, per):
    updates, _ = run(ours)
    expected, _ = run(theirs)
    assert is_clipped(norms_of(expected, per), per)[:, list(SPIKES)].all()
    assert_equal(label, norms_of(updates, per), norms_of(expected, per))
    for name in PARAMS:
        np.testing.assert_allclose(updates[name], expected[name], RTOL)
