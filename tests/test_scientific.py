"""Inside NumPyro's own loop, and around Diffrax's solvers.

`help(optaxclip.trainers)` has the short recipe for NumPyro, which runs as a doctest.
"""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO, autoguide

import optaxclip

pytestmark = pytest.mark.slow


def test_svi_run_of_numpyro_ends_where_the_bare_optimizer_does():
    data = jnp.asarray(np.random.default_rng(0).normal(3.0, 1.0, 50), jnp.float32)

    def model(data):
        mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
        numpyro.sample("data", dist.Normal(mean, 1.0), obs=data)

    def run(optimizer):
        guide = autoguide.AutoNormal(model)
        optimizer = numpyro.optim.optax_to_numpyro(optimizer)
        svi = SVI(model, guide, optimizer, Trace_ELBO())
        return svi.run(jax.random.key(0), 500, data, progress_bar=False)

    found = run(optaxclip.stabilize(optax.adam(0.05)))
    expected = run(optax.adam(0.05))
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)
    _, (params, opt_state) = found.state.optim_state
    assert abs(params["mean_auto_loc"] - data.mean()) < 0.05
    metrics = optaxclip.metrics(opt_state)
    assert metrics["explosions/num_exploded"] == 0
    np.testing.assert_allclose(metrics["explosions/loss"], found.losses[-1], rtol=1e-6)


def test_a_fit_of_an_ode_in_float64(x64):
    """A solve that fails has a loss of inf and gradients of 0: taken, and counted."""
    times = jnp.linspace(0.0, 2.0, 20)
    data = jnp.exp(-1.5 * times)

    def solve(rate, max_steps):
        decay = diffrax.ODETerm(lambda t, y, rate: -rate * y)
        solution = diffrax.diffeqsolve(
            decay,
            diffrax.Tsit5(),
            t0=0.0,
            t1=2.0,
            dt0=0.1,
            y0=jnp.array(1.0),
            args=rate,
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-8),
            max_steps=max_steps,
            throw=False,
        )
        return jnp.asarray(solution.ys)

    tx = optaxclip.stabilize(optax.adam(0.05))

    @functools.partial(jax.jit, static_argnames="max_steps")
    def step(rate, opt_state, max_steps):
        def loss_fn(rate):
            return jnp.mean((solve(rate, max_steps) - data) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(rate)
        updates, opt_state = tx.update(grads, opt_state, rate, value=loss)
        return optax.apply_updates(rate, updates), opt_state

    def fit(is_failed):
        rate = jnp.array(0.5)
        opt_state = tx.init(rate)
        for fails in is_failed:
            rate, opt_state = step(rate, opt_state, max_steps=2 if fails else 256)
        return rate, optaxclip.metrics(opt_state)

    rate, metrics = fit([False] * 300)
    assert rate.dtype == jnp.float64
    assert metrics["explosions/norm"].dtype == jnp.float32  # what is kept to be read
    assert metrics["explosions/num_exploded"] == 0
    np.testing.assert_allclose(rate, 1.5, rtol=1e-4)
    again, metrics = fit([False] * 200 + [True] + [False] * 100)
    assert metrics["explosions/num_skipped"] == 0
    assert metrics["explosions/num_exploded/nonfinite"] == 1
    np.testing.assert_allclose(again, rate, rtol=1e-5)
