"""Metrics at scale: few names that stay the same, and what the last steps add up to."""

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optaxclip
from optaxclip.reporting import zeros

pytestmark = pytest.mark.usefixtures("quick_to_compile")

NAMES = [f"layer_{i:03}" for i in range(723)]
MANY = {name: jnp.ones(2) for name in NAMES}


def both() -> Any:
    clip = optaxclip.clip_by_norm(1.0, per="leaf")
    return optax.chain(clip, optaxclip.stabilize(optax.sgd(0.1), rollback=False))


def grads_with(norms: dict[str, float]) -> Any:
    return {n: jnp.array([norms.get(n, 0.001), 0.0], jnp.float32) for n in NAMES}


# --- Few names


def test_723_leaves_have_at_most_64_names_which_stay_the_same():
    def names_of(opt_state, params=None):
        return list(jax.eval_shape(optaxclip.metrics, opt_state, params))

    first = jax.eval_shape(both().init, MANY)
    found = names_of(first, MANY)
    assert len(found) == 62
    assert len(found) == len(set(found))
    assert set(names_of(first)) == {x for x in found if "ratio" not in x}
    every = jax.eval_shape(functools.partial(optaxclip.metrics, top=None), first, MANY)
    for name in NAMES:
        assert f"explosions/norm/{name}" in every
        assert f"clip/norm/{name}" in every
    none = jax.eval_shape(functools.partial(optaxclip.metrics, top=0), first, MANY)
    assert not [name for name in none if "/top/" in name or "layer" in name]


def test_one_recorder_more_and_the_zeros_add_as_many_as_the_guide_says():
    few = {name: jnp.ones(2) for name in NAMES[:11]}
    state = optaxclip.record().init(few)
    found = jax.eval_shape(optaxclip.metrics, state, few)
    with_zeros = jax.eval_shape(lambda x: optaxclip.metrics(state, x, zeros=x), few)
    assert len(found) == 33
    assert len(with_zeros) == 33 + 21


@pytest.mark.slow
def test_the_largest_are_ranked_by_their_share_and_named_by_index():
    tx = optaxclip.record()
    norms = {NAMES[7]: 5.0, NAMES[700]: 9.0, NAMES[0]: 3.0}
    _, state = jax.jit(tx.update)(grads_with(norms), tx.init(MANY))
    for read in (optaxclip.metrics, jax.jit(optaxclip.metrics, static_argnames="top")):
        found = read(state, MANY, top=3)
        index = [int(found[f"gradients/top/{i}/index"]) for i in (1, 2, 3)]
        assert [NAMES[i] for i in index] == [NAMES[700], NAMES[7], NAMES[0]]
        sizes = [found[f"gradients/top/{i}/norm"] for i in (1, 2, 3)]
        np.testing.assert_allclose(sizes, [9, 5, 3], rtol=1e-6)
        share = (sizes[0] / found["gradients/norm"]) ** 2
        np.testing.assert_allclose(share, found["gradients/squared_share"], rtol=1e-6)
        assert not [name for name in found if "top/4" in name or "layer" in name]


def test_a_clip_alone_ranks_its_largest_scopes():
    few = {name: MANY[name] for name in NAMES[:20]}
    norms = {NAMES[7]: 5.0, NAMES[12]: math.nan, NAMES[0]: 3.0}
    grads = {name: x for name, x in grads_with(norms).items() if name in few}
    clip = optaxclip.clip_by_norm(1.0, per="leaf")
    _, state = jax.jit(clip.update)(grads, clip.init(few))
    found = optaxclip.metrics(state, few, top=3)
    ranks = range(1, 4)
    assert [found[f"clip/top/{k}/index"] for k in ranks] == [12, 7, 0]
    sizes = [found[f"clip/top/{k}/norm"] for k in ranks]
    np.testing.assert_allclose(sizes, [np.inf, 5, 3], rtol=1e-6)
    assert len(found) == 5 + 2 * 3
    beside = optaxclip.metrics((state, optaxclip.record().init(few)), few, top=3)
    assert not [name for name in beside if name.startswith("clip/top")]


@pytest.mark.slow
def test_what_is_nonfinite_comes_first():
    tx = optaxclip.record()
    norms = {NAMES[7]: math.inf, NAMES[700]: math.nan, NAMES[0]: 3e38}
    _, state = jax.jit(tx.update)(grads_with(norms), tx.init(MANY))
    found = optaxclip.metrics(state, MANY, top=3)
    values = [
        (int(found[f"gradients/top/{i}/index"]), found[f"gradients/top/{i}/norm"])
        for i in (1, 2, 3)
    ]
    expected = np.array([(7, math.inf), (700, math.nan), (0, 3e38)])
    np.testing.assert_allclose(np.array(values), expected, rtol=1e-6)


@pytest.mark.slow
def test_up_to_top_scopes_have_names_of_their_own():
    params = {name: jnp.ones(2) for name in "abc"}
    for tx in (optaxclip.record(), optaxclip.clip_by_norm(1.0, per="leaf")):
        state: Any = tx.init(params)
        (label,) = state
        assert f"{label}/norm/b" in optaxclip.metrics(state, params, top=3)
        assert f"{label}/norm/b" not in optaxclip.metrics(state, params, top=2)
        assert f"{label}/norm" in optaxclip.metrics(state, params, top=2)


@pytest.mark.slow
def test_runs_side_by_side_are_ranked_each():
    tx = optaxclip.record()
    sizes = jnp.array([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]])
    params = {name: jnp.ones(2) for name in "abc"}

    def state_of(sizes):
        grads = {n: jnp.zeros(2).at[0].set(sizes[i]) for i, n in enumerate("abc")}
        return tx.update(grads, tx.init(params))[1]

    found = optaxclip.metrics(jax.vmap(state_of)(sizes), top=2)
    assert found["gradients/top/1/index"].tolist() == [1, 2]
    assert found["gradients/top/2/index"].tolist() == [2, 0]
    np.testing.assert_allclose(found["gradients/top/1/norm"], [3, 6], rtol=1e-6)
    np.testing.assert_allclose(
        found["gradients/window/norm_p50"],
        jnp.sqrt(jnp.sum(sizes**2, axis=1)),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"top": -1}, ValueError, "top must be >= 0"),
        ({"top": 1.5}, TypeError, "top must be a whole number"),
        ({"window": 0}, ValueError, "window must be >= 1"),
        ({"window": "all"}, TypeError, "window must be a whole number"),
    ],
)
def test_bad_arguments(arguments, error, message):
    state = optaxclip.record().init({"w": jnp.ones(1)})
    with pytest.raises(error, match=message):
        optaxclip.metrics(state, **arguments)


# --- The last steps


recorder = functools.cache(optaxclip.record)
"""The same for the same arguments, so that `run` is compiled once for it."""


@functools.partial(jax.jit, static_argnums=0)
def run(tx, sizes, losses) -> Any:
    params = {"w": jnp.ones(1)}

    def step(state, x):
        size, loss = x
        _, state = tx.update({"w": size[None]}, state, params, value=loss)
        return state, ()

    return lax.scan(step, tx.init(params), (sizes, losses))[0]


def trace(num_steps, seed=0, nonfinite=()) -> tuple[np.ndarray, np.ndarray]:
    """Norms and losses with spikes; the norms of some steps are not finite."""
    rng = np.random.default_rng(seed)
    norms = np.exp(0.05 * rng.standard_normal(num_steps))
    losses = 2 + 0.01 * rng.standard_normal(num_steps)
    norms[rng.random(num_steps) < 0.03] *= 3
    losses[rng.random(num_steps) < 0.02] += 0.3
    norms[list(nonfinite)] = [math.inf, math.nan] * (len(nonfinite) // 2)
    return norms.astype(np.float32), losses.astype(np.float32)


@pytest.mark.parametrize(
    "window",
    [None, 50, *(pytest.param(x, marks=pytest.mark.slow) for x in (1, 256, 1000))],
)
@pytest.mark.parametrize("num_steps", [1, 40, 400])
def test_percentiles_and_shares_are_those_of_the_last_steps(num_steps, window):
    nonfinite = [3, 30, 380, 390] if num_steps == 400 else []
    norms, losses = trace(num_steps, nonfinite=nonfinite)
    state = run(recorder(), norms, losses)
    found = optaxclip.metrics(state, window=window)
    last = norms[-min(window or 256, 256) :]
    finite = last[np.isfinite(last)]
    for p in (50, 90, 99):
        expected = np.percentile(finite, p, method="inverted_cdf")
        np.testing.assert_allclose(
            found[f"gradients/window/norm_p{p}"], expected, rtol=1e-6
        )
    shares = {
        "window/nonfinite_fraction": np.mean(~np.isfinite(last)),
        "nonfinite_fraction": np.mean(~np.isfinite(norms)),
    }
    for name, expected in shares.items():
        np.testing.assert_allclose(found[f"gradients/{name}"], expected, rtol=1e-6)


def test_before_the_first_step_and_without_a_finite_norm_they_are_zero():
    tx = optaxclip.record()
    state = tx.init({"w": jnp.ones(1)})
    for _ in range(2):
        found = optaxclip.metrics(state)
        for name in ("norm_p50", "norm_p90", "norm_p99", "spike_score"):
            assert found[f"gradients/window/{name}"] == 0
        _, state = tx.update({"w": jnp.array([jnp.nan])}, state)


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [70, 71, 72, 390])
def test_exploded_and_skipped_steps_of_the_window_and_of_the_run(num_steps):
    """Also where the last step itself was skipped."""
    norms, losses = np.ones(num_steps, np.float32), np.ones(num_steps, np.float32)
    bad = [i for i in (66, 69, 71, 200, 340, 341, 389) if i < num_steps]
    norms[bad] = 100
    losses[[i for i in (68, 380) if i < num_steps]] = np.inf  # exploded, but taken
    tx = optaxclip.stabilize(optax.sgd(0.0), rollback=False)
    state = run(tx, norms, losses)
    skipped = [x["step"] for x in optaxclip.skipped_steps(state)]
    assert skipped == bad
    exploded = sorted({*bad, *np.flatnonzero(np.isinf(losses)).tolist()})
    for window in (1, 2, 60, 256):
        found = optaxclip.metrics(state, window=window)
        length = min(window, num_steps)
        for kind, steps in {"exploded": exploded, "skipped": skipped}.items():
            num = sum(step >= num_steps - length for step in steps)
            name = f"explosions/window/{kind}_fraction"
            np.testing.assert_allclose(found[name], num / length, rtol=1e-6)
            name = f"explosions/{kind}_fraction"
            np.testing.assert_allclose(found[name], len(steps) / num_steps, rtol=1e-6)


class StabilityMonitor:
    """SpikeScore as OLMo-core's `StabilityMonitorCallback` counts it, in float64."""

    def __init__(self, rolling_window: int):
        self.rolling_window = rolling_window
        self.histories: dict[str, list[float]] = {"loss": [], "norm": []}
        self.spikes: list[bool] = []
        self.running = self.total = 0.0

    def step(self, loss: float, norm: float) -> None:
        found = []
        for name, value in (("loss", loss), ("norm", norm)):
            history = self.histories[name]
            found.append(self.is_spike(value, history))
            history.append(value)
            del history[:-128]
        self.spikes.append(any(found))
        if len(self.spikes) >= self.rolling_window:
            recent = self.spikes[-self.rolling_window :]
            self.running = sum(recent) / self.rolling_window
        self.total = sum(self.spikes) / len(self.spikes)

    @staticmethod
    def is_spike(value: float, history: list[float]) -> bool:
        if len(history) < 128:
            return False
        mean = sum(history) / len(history)
        std = math.sqrt(sum((x - mean) ** 2 for x in history) / len(history))
        return not std < 1e-10 and value > mean + 6 * std


@pytest.mark.parametrize("kind", ["healthy", "nonfinite", "huge", "constant"])
@pytest.mark.parametrize(
    "num_steps",
    [*(pytest.param(x, marks=pytest.mark.slow) for x in (100, 200)), 300, 900],
)
def test_spike_score_is_that_of_olmo_core(num_steps, kind):
    norms, losses = trace(num_steps, seed=1)
    if kind == "nonfinite":
        norms[40::173] = math.nan
        losses[171::311] = math.inf
    elif kind == "huge":
        norms = np.minimum(norms.astype(float) * 1e38, 3e38).astype(np.float32)
    elif kind == "constant":
        norms[:], losses[:] = 1, 2
        norms[-1] = 5
    window = 256
    theirs = StabilityMonitor(rolling_window=window - 128)
    for loss, norm in zip(losses.tolist(), norms.tolist(), strict=True):
        theirs.step(loss, norm)
    found = optaxclip.metrics(run(recorder(window=window), norms, losses))
    full = num_steps >= theirs.rolling_window
    expected = theirs.running if full else theirs.total
    np.testing.assert_allclose(
        found["gradients/window/spike_score"], expected, rtol=1e-6
    )
    if kind == "healthy" and num_steps > 256:
        assert theirs.running > 0


@pytest.mark.slow
def test_spike_score_over_other_lengths():
    norms, losses = trace(900, seed=2)
    for window, length in [(256, 60), (600, None), (600, 100)]:
        theirs = StabilityMonitor(min(length or window, window - 128))
        for loss, norm in zip(losses.tolist(), norms.tolist(), strict=True):
            theirs.step(loss, norm)
        state = run(recorder(window=window), norms, losses)
        found = optaxclip.metrics(state, window=length)["gradients/window/spike_score"]
        np.testing.assert_allclose(found, theirs.running, rtol=1e-6)
    short = run(recorder(window=128), norms, losses)
    assert "gradients/window/spike_score" not in optaxclip.metrics(short)


def test_without_a_loss_only_norms_are_spikes():
    tx, norms = optaxclip.record(), np.ones(200, np.float32)
    norms[:-1] += np.random.default_rng(0).normal(0, 0.01, 199).astype(np.float32)
    norms[-1] = 2
    state, update = tx.init({"w": jnp.ones(1)}), jax.jit(tx.update)
    for norm in norms:
        _, state = update({"w": np.array([norm])}, state)
    found = optaxclip.metrics(state)["gradients/window/spike_score"]
    np.testing.assert_allclose(found, 1 / 128, rtol=1e-6)


def test_a_step_without_a_loss_is_no_spike():
    tx = optaxclip.record()
    norms, losses = trace(200)
    state = run(tx, np.ones_like(norms), 2 + 0 * losses + np.arange(200) % 3)
    before = optaxclip.metrics(state)["gradients/window/spike_score"]
    _, state = tx.update({"w": jnp.ones(1)}, state)
    assert optaxclip.metrics(state)["gradients/window/spike_score"] == before == 0


def test_nothing_of_a_healthy_run_is_nan():
    norms, losses = trace(300)
    with jax.debug_nans(True):
        optaxclip.metrics(run(recorder(), norms, losses))


# --- Exact zeros


def test_zeros_are_counted_on_request():
    tx, params = optaxclip.record(), {"a": jnp.ones(4), "b": jnp.ones(2), "n": 3}
    state = tx.init(params)
    tree = {"a": jnp.array([0.0, 1.0, -0.0, 2.0]), "b": jnp.zeros(2), "n": 3}
    assert not [name for name in optaxclip.metrics(state) if "zeros" in name]
    for read in (optaxclip.metrics, jax.jit(optaxclip.metrics)):
        found = read(state, zeros=tree)
        values = {name: float(x) for name, x in found.items() if "zeros" in name}
        assert values == {
            "zeros/fraction": pytest.approx(4 / 6),
            "zeros/fraction/a": 0.5,
            "zeros/fraction/b": 1,
            "zeros/fraction/n": 0,
        }
    found = optaxclip.metrics(state, zeros=tree, top=1)
    assert found["zeros/top/1/index"] == 1
    assert found["zeros/top/1/fraction"] == 1
    clash = optaxclip.record("zeros").init(params)
    with pytest.raises(ValueError, match="a state has the label 'zeros'"):
        optaxclip.metrics(clash, zeros=tree)


@pytest.mark.parametrize("most", [1, 5, 20, 60, 10**9])
def test_more_zeros_than_an_integer_holds_are_counted(most, monkeypatch):
    monkeypatch.setattr(zeros, "MOST_COUNTED", most)
    x = np.random.default_rng(0).integers(0, 2, (3, 5, 4)).astype(np.float32)
    tree = {"all": jnp.zeros((3, 5, 4)), "some": jnp.asarray(x), "number": 0.0}
    # A new function: what is compiled for another limit would be found again.
    found = jax.jit(lambda tree: optaxclip.metrics({}, zeros=tree))(tree)
    assert found["zeros/fraction/all"] == 1
    share = np.mean(x == 0)
    np.testing.assert_allclose(found["zeros/fraction/some"], share, rtol=1e-6)
    whole = (61 + 60 * share) / 121
    np.testing.assert_allclose(found["zeros/fraction"], whole, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 2**30), (48, 384, 8192, 8192), (2**31 - 1, 7)])
def test_no_integer_counts_more_than_it_holds(shape):
    tree = {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    program = jax.make_jaxpr(lambda tree: optaxclip.metrics({}, zeros=tree))(tree)
    sizes = [
        (equation.invars[0].aval.size, equation.outvars[0].aval.size)
        for equation in program.eqns
        if equation.primitive.name == "reduce_sum"
        and equation.outvars[0].aval.dtype == jnp.int32
    ]
    assert len(sizes) == 1
    assert all(before <= after * (2**31 - 1) for before, after in sizes)


@pytest.mark.slow
def test_inside_jit_it_says_the_same():
    norms, losses = trace(300)
    tx = optaxclip.stabilize(optax.sgd(0.1), rollback=False)
    state = run(tx, norms, losses)
    inside = jax.jit(optaxclip.metrics)(state)
    chex.assert_trees_all_close(inside, optaxclip.metrics(state), rtol=1e-6)


def test_zeros_of_a_tree_that_holds_a_function():
    tree = {"a": jnp.tanh, "b": jnp.array([0.0, 1.0])}
    found = optaxclip.metrics({}, zeros=tree)
    assert found["zeros/fraction"] == 0.5
