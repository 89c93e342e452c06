"""How gradients grow from step to step of a recurrent network, without a Jacobian.

A cell maps parameters, a state and a number to the next state. The parameters of a
network are those of its cell, and "V", which reads the last state.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import optaxclip


def unroll(cell: Any, params: Any, xs: Any, copies: Any, nudges: Any) -> jax.Array:
    """Returns the states a_1 to a_T; step t takes its copies and adds its nudge."""

    def step(state, of_step):
        x, copy, nudge = of_step
        state = cell(params | copy, state, x) + nudge
        return state, state

    start = jnp.zeros(params["V"].size)
    _, states = jax.lax.scan(step, start, (xs, copies, nudges))
    return states


def loss_fn(params: Any, cell: Any, xs: Any, copies: Any, nudges: Any) -> jax.Array:
    """Returns C, the mean squared error of sequences `[batch, length]`."""
    unroll_batch = jax.vmap(partial(unroll, cell, params), (0, None, 0))
    last_states = unroll_batch(xs, copies, nudges)[:, -1]
    return jnp.mean((last_states @ params["V"] - xs[:, 0]) ** 2)


def log_norms(vectors: jax.Array) -> jax.Array:
    """Returns the log norms of `[batch, length, n]`, their means over the batch."""
    norms = jax.vmap(jax.vmap(optaxclip.global_norm))(vectors)
    return jnp.log(norms).mean(axis=0)


def growth(logs: jax.Array) -> jax.Array:
    """Returns the growth per step in the middle half of log norms, by least squares."""
    quarter = len(logs) // 4
    times = jnp.arange(1.0 * len(logs))
    slope, _ = jnp.polyfit(times[quarter:-quarter], logs[quarter:-quarter], 1)
    return jnp.exp(slope)


def measure(cell: Any, params: Any, xs: Any, gaps: Any, powers: int = 15) -> Any:
    """Returns what a batch shows of one network, without any Jacobian.

    `predicted`, exp of the Lyapunov exponent, is the growth per step of tangents in the
    middle half; `measured` that of dC/da_t going backward. The others are norms: of
    dC/da_t, of what step t adds to dC/dW, and of da_T/da_{T-gap}, by the power method.
    """
    norm = optaxclip.global_norm
    length = xs.shape[1]
    state_size = params["V"].size
    no_nudges = jnp.zeros([*xs.shape, state_size])
    no_nudge = jnp.zeros(state_size)
    start = jax.random.normal(jax.random.key(0), [state_size])

    # With a copy of W and a nudge at each step, a gradient tells the steps apart.
    copies = {"W": jnp.broadcast_to(params["W"], (length, *params["W"].shape))}
    gradients = jax.grad(loss_fn, argnums=(3, 4))
    of_copies, of_states = gradients(params, cell, xs, copies, no_nudges)

    def nudged(place, x, nudge):
        """The states of one sequence, if the state at `place` is nudged."""
        return unroll(cell, params, x, {}, no_nudges[0].at[place].set(nudge))

    def tangents(x):
        """How the states of a sequence change with the first."""
        _, changes = jax.jvp(partial(nudged, 0, x), (no_nudge,), (start,))
        return changes

    def power(vector, gap):
        """J^T J v, where v and J v are scaled to norm 1; J is da_T/da_{T-gap}.

        Its norm goes to the spectral norm of J, that of the first sequence.
        """
        run = partial(nudged, length - 1 - gap, xs[0])
        _, changes = jax.jvp(run, (no_nudge,), (vector / norm(vector),))
        image = changes[-1]
        _, pull = jax.vjp(run, no_nudge)
        (back,) = pull(no_nudges[0].at[-1].set(image / norm(image)))
        return back

    vectors = jnp.broadcast_to(start, (len(gaps), state_size))
    power_all = jax.vmap(power)
    vectors = jax.lax.fori_loop(0, powers, lambda _, v: power_all(v, gaps), vectors)
    logs_backward = log_norms(of_states)
    return {
        "predicted": growth(log_norms(jax.vmap(tangents)(xs))),
        "measured": 1 / growth(logs_backward),
        "states": jnp.exp(logs_backward),
        "added": jax.vmap(norm)(of_copies),
        "spectral": jax.vmap(norm)(vectors),
    }
