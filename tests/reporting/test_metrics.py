"""`metrics` says what happened: its names and numbers, wherever the state is."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorboardX
from flax import nnx
from flax.training.train_state import TrainState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import optaxclip

pytestmark = pytest.mark.usefixtures("quick_by_default")

COLUMNS = ("norm", "norm_after", "limit", "clipped_fraction", "num_nonfinite")
STEPS = 4
NAMES = ["dense/bias", "dense/kernel", "layers/w", "scale"]


def params() -> Any:
    return {
        "dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
        "layers": {"w": jnp.ones((2, 3, 2))},
        "scale": jnp.ones([]),
    }


def grads_of(step: int) -> Any:
    """Some of the norms are above 1 and some below, in each step others."""
    rng = np.random.default_rng(step)
    return jax.tree.map(
        lambda x: jnp.asarray(
            rng.normal(size=x.shape) * 10 ** rng.uniform(-1.5, 1), jnp.float32
        ),
        params(),
    )


def is_stacked(name: str) -> bool:
    return name == "layers/w"


def leaves_by_name(tree) -> dict[str, np.ndarray]:
    leaves = [tree["dense"]["bias"], tree["dense"]["kernel"]]
    leaves += [tree["layers"]["w"], tree["scale"]]
    return {n: np.asarray(x, np.float64) for n, x in zip(NAMES, leaves, strict=True)}


def layers_by_name(tree) -> dict[str, np.ndarray]:
    leaves = leaves_by_name(tree)
    layers = leaves.pop("layers/w")
    return leaves | {"layers/w[0]": layers[0], "layers/w[1]": layers[1]}


def whole(x) -> list:
    return [x]


def units(x) -> list:
    return [x] if x.ndim < 2 else [x[..., i] for i in range(x.shape[-1])]


def grouped(tree) -> dict[str, list]:
    leaves = leaves_by_name(tree)
    dense = [leaves["dense/bias"].ravel(), leaves["dense/kernel"].ravel()]
    rest = [leaves["layers/w"].ravel(), leaves["scale"].ravel()]
    return {"dense": [np.concatenate(dense)], "other": [np.concatenate(rest)]}


# For each kind of scope: the options, and the parts behind each name that is reported.
SCOPES: dict[str, Any] = {
    "leaf": (
        {"per": "leaf"},
        lambda tree: {n: whole(x) for n, x in leaves_by_name(tree).items()},
    ),
    "stacked leaf": (
        {"per": "leaf", "stacked": is_stacked},
        lambda tree: {n: whole(x) for n, x in layers_by_name(tree).items()},
    ),
    "unit": (
        {"per": "unit"},
        lambda tree: {n: units(x) for n, x in leaves_by_name(tree).items()},
    ),
    "stacked unit": (
        {"per": "unit", "stacked": is_stacked},
        lambda tree: {n: units(x) for n, x in layers_by_name(tree).items()},
    ),
    "group": (
        {"per": lambda name: "dense" if name.startswith("dense") else "other"},
        grouped,
    ),
}


def naive_metrics(parts_by_name, gradients, max_norm: float) -> dict[str, float]:
    """The expected metrics, in float64 and one by one, without the largest."""
    found = {}
    steps = [parts_by_name(tree) for tree in gradients]
    for name in steps[0]:
        norms = np.array(
            [[np.sqrt(np.sum(part**2)) for part in parts[name]] for parts in steps]
        )
        found[f"norm/{name}"] = norms[-1].max()
        found[f"norm_after/{name}"] = np.minimum(norms[-1], max_norm).max()
        found[f"limit/{name}"] = max_norm
        found[f"clipped_fraction/{name}"] = (norms > max_norm).mean(axis=0).max()
        found[f"num_nonfinite/{name}"] = 0
    return found


@functools.cache
def trained(scope: str):
    """The state and the updates after some steps of one clip."""
    tx = optaxclip.clip_by_norm(1.0, **SCOPES[scope][0])
    state, updates, update = tx.init(params()), None, jax.jit(tx.update)
    for step in range(STEPS):
        updates, state = update(grads_of(step), state)
    return state, updates


def assert_metrics_close(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
        assert isinstance(found[name], jax.Array)
        assert found[name].shape == (), name


def test_the_metrics_of_a_tree():
    norms = np.array(
        [
            np.sqrt(sum(np.sum(x**2) for x in leaves_by_name(grads_of(i)).values()))
            for i in range(STEPS)
        ]
    )
    max_norm = float(norms[-1]) / 1.5  # clips the last step, and only some others
    fraction = np.mean(norms > max_norm)
    assert 0 < fraction < 1
    tx = optaxclip.clip_by_norm(max_norm)
    state, updates = tx.init(params()), None
    for step in range(STEPS):
        updates, state = tx.update(grads_of(step), state)
    after = np.sqrt(sum(np.sum(x**2) for x in leaves_by_name(updates).values()))
    expected = {
        "clip/norm": norms[-1],
        "clip/norm_after": after,
        "clip/limit": max_norm,
        "clip/clipped_fraction": fraction,
        "clip/num_nonfinite": 0,
    }
    for names in (None, params()):
        assert_metrics_close(optaxclip.metrics(state, names), expected)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_metrics_of_many_scopes(scope):
    state, updates = trained(scope)
    _, parts_by_name = SCOPES[scope]
    gradients = [grads_of(step) for step in range(STEPS)]
    each = naive_metrics(parts_by_name, gradients, 1.0)
    largest = {
        column: max(v for n, v in each.items() if n.startswith(f"{column}/"))
        for column in COLUMNS
    }
    assert any(0 < v < 1 for n, v in each.items() if n.startswith("clipped_fraction"))
    expected = {f"clip/{n}": value for n, value in (each | largest).items()}
    assert_metrics_close(optaxclip.metrics(state, params()), expected)
    for name, parts in parts_by_name(updates).items():
        after = max(np.sqrt(np.sum(part**2)) for part in parts)
        np.testing.assert_allclose(expected[f"clip/norm_after/{name}"], after, 1e-6)


def test_a_leaf_of_units_with_different_limits():
    limit = optaxclip.limits.Limit(
        init=lambda sizes: optax.EmptyState(),
        update=lambda norms, state, _: (jax.tree.map(lambda n: 1 / n, norms), state),
    )
    tx = optaxclip.clip_by_norm(limit, per="unit")
    grads = {"w": jnp.array([[0.5, 4.0]]), "b": jnp.array(2.0)}
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(
        np.concatenate(list(map(np.ravel, jax.tree.leaves(updates)))),
        [0.5, 0.5, 0.25],
        rtol=1e-6,
    )
    found = optaxclip.metrics(state, grads)
    expected = {
        "norm/w": 4.0,
        "limit/w": 2.0,
        "norm_after/w": 0.5,
        "norm_after/b": 0.5,
        "norm_after": 0.5,
        "clipped_fraction/w": 1.0,
    }
    found = {name: found[f"clip/{name}"] for name in expected}
    assert_metrics_close(found, expected)


@pytest.mark.parametrize("scope", SCOPES)
def test_without_params_scopes_are_numbered(scope):
    state, _ = trained(scope)
    named = optaxclip.metrics(state, params())
    numbered = optaxclip.metrics(state)
    order = {
        "leaf": NAMES,
        "unit": NAMES,
        "group": ["dense", "other"],
    }.get(
        scope,
        ["dense/bias", "dense/kernel", "layers/w[0]", "layers/w[1]", "scale"],
    )
    expected = {f"clip/{c}": named[f"clip/{c}"] for c in COLUMNS}
    for number, name in enumerate(order):
        for column in COLUMNS:
            expected[f"clip/{column}/{number}"] = named[f"clip/{column}/{name}"]
    chex.assert_trees_all_equal(numbered, expected)


@pytest.mark.parametrize("scope", SCOPES)
def test_inside_jit_it_says_the_same(scope):
    state, _ = trained(scope)
    inside = jax.jit(lambda state: optaxclip.metrics(state, params()))(state)
    chex.assert_trees_all_close(inside, optaxclip.metrics(state, params()), rtol=1e-7)


@pytest.mark.parametrize("scope", SCOPES)
def test_shapes_can_stand_for_the_params(scope):
    state, _ = trained(scope)
    shapes = jax.eval_shape(params)
    expected = optaxclip.metrics(state, params())
    chex.assert_trees_all_equal(optaxclip.metrics(state, shapes), expected)


def test_before_the_first_step_nothing_has_happened():
    state = optaxclip.clip_by_norm(1.0, per="leaf").init(params())
    found = optaxclip.metrics(state, params())
    values = {"norm": 0, "norm_after": 0, "limit": np.inf, "clipped_fraction": 0}
    expected = {
        f"clip/{column}{suffix}": values.get(column, 0)
        for column in COLUMNS
        for suffix in ["", *(f"/{name}" for name in NAMES)]
    }
    assert_metrics_close(found, expected)


@pytest.mark.parametrize("limit", [0.0, jnp.float32(-1.0), jnp.float32(jnp.nan)])
def test_a_limit_that_leaves_nothing_shows_as_zero_after(limit):
    tx = optaxclip.clip_by_norm(limit)
    updates, state = tx.update(grads_of(0), tx.init(params()))
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, updates))
    found = optaxclip.metrics(state)
    assert float(found["clip/norm_after"]) == 0
    assert float(found["clip/clipped_fraction"]) == 1


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("per", ["tree", "leaf", "unit"])
def test_an_update_that_is_not_finite_shows(bad, per):
    tx = optaxclip.clip_by_norm(1.0, per=per)
    grads = grads_of(0)
    grads["dense"]["kernel"] = grads["dense"]["kernel"].at[1, 2].set(bad)
    _, state = tx.update(grads_of(1), tx.init(params()))
    _, state = tx.update(grads, state)
    found = optaxclip.metrics(state, params())
    assert not np.isfinite(found["clip/norm"])
    assert not np.isfinite(found["clip/norm_after"])
    assert int(found["clip/num_nonfinite"]) == 1
    if per != "tree":
        assert not np.isfinite(found["clip/norm/dense/kernel"])
        assert int(found["clip/num_nonfinite/dense/kernel"]) == 1
        assert np.isfinite(found["clip/norm/dense/bias"])
        assert int(found["clip/num_nonfinite/dense/bias"]) == 0
    _, state = tx.update(grads_of(2), state)
    found = optaxclip.metrics(state, params())
    assert np.isfinite(found["clip/norm"])
    assert int(found["clip/num_nonfinite"]) == 1


# --- Wherever the state is


def expected_of(tree, label: str = "clip") -> dict[str, float]:
    """The metrics of one step with limit 1 per leaf, of a tree of one level."""
    norms = {n: np.sqrt(np.sum(np.float64(x) ** 2)) for n, x in tree.items()}
    found = {}
    for name, norm in norms.items():
        values = (norm, min(norm, 1.0), 1.0, float(norm > 1.0), 0)
        for column, value in zip(COLUMNS, values, strict=True):
            found[f"{label}/{column}/{name}"] = value
    for column in COLUMNS:
        prefix = f"{label}/{column}/"
        found[prefix[:-1]] = max(v for n, v in found.items() if n.startswith(prefix))
    return found


def flat_params() -> dict[str, jax.Array]:
    return {"a": jnp.ones(3), "b": jnp.ones((2, 3)), "c": jnp.ones(2)}


FLAT_GRADS = {
    "a": jnp.array([3.0, 4.0, 0.0]),
    "b": jnp.full((2, 3), 0.25),
    "c": jnp.array([0.0, 2.0]),
}


def per_leaf(label: str = "clip"):
    return optaxclip.clip_by_norm(1.0, per="leaf", label=label)


def step_once(tx):
    _, state = tx.update(FLAT_GRADS, tx.init(flat_params()), flat_params())
    return state


@pytest.mark.parametrize(
    "tx",
    [
        per_leaf(),
        optax.chain(optax.identity(), per_leaf(), optax.adam(0.1)),
        optax.chain(optax.chain(per_leaf()), optax.sgd(0.1)),
        optax.named_chain(("first", per_leaf()), ("second", optax.adam(0.1))),
        optax.apply_if_finite(optax.chain(per_leaf(), optax.adam(0.1)), 3),
        optax.MultiSteps(per_leaf(), 1),
        optax.inject_hyperparams(
            optaxclip.clip_by_norm,
            static_args=("ord", "per", "label", "specs", "stacked"),
        )(max_norm=1.0, per="leaf"),
    ],
    ids=[
        "alone",
        "chain",
        "chain in chain",
        "named_chain",
        "apply_if_finite",
        "MultiSteps",
        "inject_hyperparams",
    ],
)
def test_finds_the_state_inside(tx):
    found = optaxclip.metrics(step_once(tx), flat_params())
    assert_metrics_close(found, expected_of(FLAT_GRADS))


def test_multi_steps_counts_its_own_steps():
    tx = optax.MultiSteps(per_leaf(), 2)
    state, update = tx.init(flat_params()), jax.jit(tx.update)
    for _ in range(4):
        _, state = update(FLAT_GRADS, state, flat_params())
    found = optaxclip.metrics(state, flat_params())
    assert_metrics_close(found, expected_of(FLAT_GRADS))


@pytest.mark.parametrize("per", ["leaf", "unit"])
@pytest.mark.parametrize("hidden", ["a", "b", "c"])
def test_masked_leaves_are_left_out_and_the_others_keep_their_names(hidden, per):
    mask = {name: name != hidden for name in "abc"}
    tx = optax.masked(optaxclip.clip_by_norm(1.0, per=per), mask)
    found = optaxclip.metrics(step_once(tx), flat_params())
    shown = {name: x for name, x in FLAT_GRADS.items() if name != hidden}
    assert {name.rsplit("/", 1)[-1] for name in found} == set(shown) | set(COLUMNS)
    if per == "leaf":
        assert_metrics_close(found, expected_of(shown))


def test_partition_names_the_leaves_of_each_part():
    tx = optax.partition(
        {"x": optax.chain(per_leaf("x"), optax.adam(0.1)), "y": per_leaf("y")},
        {"a": "y", "b": "x", "c": "y"},
    )
    found = optaxclip.metrics(step_once(tx), flat_params())
    x = {"b": FLAT_GRADS["b"]}
    y = {"a": FLAT_GRADS["a"], "c": FLAT_GRADS["c"]}
    assert_metrics_close(found, expected_of(x, "x") | expected_of(y, "y"))


def test_stacked_leaves_keep_their_names_behind_a_mask():
    tx = optax.masked(
        optaxclip.clip_by_norm(1.0, per="leaf", stacked=lambda name: name == "b"),
        {"a": False, "b": True, "c": True},
    )
    found = optaxclip.metrics(step_once(tx), flat_params())
    b, c = FLAT_GRADS["b"], FLAT_GRADS["c"]
    assert_metrics_close(found, expected_of({"b[0]": b[0], "b[1]": b[1], "c": c}))


@pytest.mark.parametrize("per", ["leaf", "unit"])
def test_a_mask_may_be_a_prefix_of_the_params(per):
    """`optax.masked` hides a whole subtree behind one `MaskedNode`."""
    tx = optax.masked(
        optaxclip.clip_by_norm(1.0, per=per),
        {"dense": False, "layers": True, "scale": True},
    )
    _, state = tx.update(grads_of(0), tx.init(params()))
    found = optaxclip.metrics(state, params())
    shown = {n: x for n, x in leaves_by_name(grads_of(0)).items() if "dense" not in n}
    assert {f"clip/norm/{name}" for name in shown} < set(found)
    if per == "leaf":
        assert_metrics_close(found, expected_of(shown))


def test_partition_labels_may_be_a_prefix_of_the_params():
    tx = optax.partition(
        {"x": per_leaf("x"), "y": per_leaf("y")},
        {"dense": "x", "layers": "y", "scale": "y"},
    )
    _, state = tx.update(grads_of(0), tx.init(params()))
    found = optaxclip.metrics(state, params())
    leaves = leaves_by_name(grads_of(0))
    x = {name: leaves[name] for name in NAMES[:2]}
    y = {name: leaves[name] for name in NAMES[2:]}
    assert_metrics_close(found, expected_of(x, "x") | expected_of(y, "y"))


def test_reads_an_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(per_leaf(), optax.adam(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss_fn(model):
        return jnp.sum(model(jnp.array([[1.0, 2.0, 3.0]])) * jnp.array([0.25, 0.0]))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_fn)(model))
        return optaxclip.metrics(optimizer, nnx.state(model, nnx.Param))

    inside = step(model, optimizer)
    kernel = 0.25 * np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    expected = expected_of({"kernel": kernel, "bias": np.array([0.25, 0.0])})
    expected["clip/norm_after/kernel"] = min(np.sqrt(14) / 4, 1)
    names = nnx.state(model, nnx.Param)
    assert_metrics_close(inside, expected)
    assert_metrics_close(optaxclip.metrics(optimizer, names), expected)
    assert_metrics_close(optaxclip.metrics(optimizer.opt_state, names), expected)


def test_reads_a_train_state():
    state = TrainState.create(
        apply_fn=lambda: None,
        params=flat_params(),
        tx=optax.chain(per_leaf(), optax.adam(0.1)),
    )
    state = state.apply_gradients(grads=FLAT_GRADS)
    found = optaxclip.metrics(state, state.params)
    assert_metrics_close(found, expected_of(FLAT_GRADS))


def test_other_states_have_no_metrics():
    tx = optax.chain(optaxclip.clip_by_value(optax.constant_schedule(1.0)))
    assert optaxclip.metrics(optax.adam(0.1).init(flat_params())) == {}
    assert optaxclip.metrics(tx.init(flat_params())) == {}


def test_two_labels_side_by_side():
    tx = optax.chain(per_leaf("first"), per_leaf("second"))
    found = optaxclip.metrics(step_once(tx), flat_params())
    assert {name.split("/")[0] for name in found} == {"first", "second"}
    first = expected_of(FLAT_GRADS, "first")
    assert_metrics_close({n: x for n, x in found.items() if n in first}, first)
    assert float(found["second/clipped_fraction"]) == 0, "the first has clipped already"


@pytest.mark.slow
def test_two_stabilized_optimizers_side_by_side():
    """Those of a generator and its discriminator."""
    params, sizes = {"w": jnp.ones(2)}, {"generator": 1.0, "discriminator": jnp.nan}
    states = {}
    for label, size in sizes.items():
        tx = optaxclip.stabilize(optax.sgd(0.1), label=label)
        grads = {"w": jnp.full(2, size)}
        _, states[label] = jax.jit(tx.update)(grads, tx.init(params), params)
    found = optaxclip.metrics(states, params)
    assert {name.split("/")[0] for name in found} == set(sizes)
    assert found["generator/num_skipped"] == 0
    assert found["discriminator/num_skipped"] == 1


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(per_leaf(), per_leaf()),
        optax.partition(
            {"x": optaxclip.clip_by_norm(1.0), "y": optaxclip.clip_by_norm(2.0)},
            {"a": "x", "b": "x", "c": "y"},
        ),
    ],
    ids=["chain", "partition"],
)
def test_equal_labels_are_an_error(tx):
    with pytest.raises(ValueError, match=r"label 'clip'.*label="):
        optaxclip.metrics(tx.init(flat_params()))


@pytest.mark.parametrize(
    "tx", [per_leaf(), optax.masked(per_leaf(), {"a": True, "b": True, "c": False})]
)
def test_params_that_do_not_fit_are_an_error(tx):
    state = tx.init(flat_params())
    for other in ({"a": jnp.ones(3)}, flat_params() | {"d": jnp.ones(1)}):
        with pytest.raises(ValueError, match=f"{len(other)} leaves.*'clip'"):
            optaxclip.metrics(state, other)


@pytest.mark.parametrize("scope", ["leaf", "stacked unit"])
def test_tensorboard_takes_the_metrics_as_they_are(scope, tmp_path):
    state, _ = trained(scope)
    found = optaxclip.metrics(state, params())
    with tensorboardX.SummaryWriter(str(tmp_path)) as writer:
        for name, value in found.items():
            writer.add_scalar(name, value, STEPS)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert len(events.Tags()["scalars"]) == len(found)
    for name in ("clip/norm", "clip/clipped_fraction", "clip/norm_after/dense/kernel"):
        (event,) = events.Scalars(name)
        assert event.step == STEPS
        np.testing.assert_allclose(event.value, found[name], rtol=1e-6)


def test_layers_are_named_beside_a_leaf_that_is_none():
    params = {"a": None, "w": jnp.ones((2, 3)), "x": {"none": None, "b": jnp.ones(3)}}
    tx = optaxclip.clip_by_norm(1.0, per="leaf", stacked=lambda name: name == "w")
    names = {f"clip/norm/{name}" for name in ("w[0]", "w[1]", "x/b")}
    assert names <= set(optaxclip.metrics(tx.init(params), params))
