"""What the readers make of any state that somebody gives them, and of mistakes."""

import functools
import inspect
import pathlib
import pydoc
import re
import tomllib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import optaxclip

pytestmark = pytest.mark.usefixtures("quick_to_compile")

READERS = {
    "metrics": optaxclip.metrics,
    "history": functools.partial(optaxclip.history, label="record"),
    "explain": optaxclip.explain,
    "raise_if_exploded": optaxclip.raise_if_exploded,
}
TX = optax.chain(
    optaxclip.record("record", window=4, stacked=lambda name: name == "w"),
    optaxclip.clip_by_norm(1.0, label="tree"),
    optaxclip.clip_by_norm(1.0, per="unit", label="unit"),
    optaxclip.skip_explosions(optax.adam(0.1)),
)


def params_of(member: int = 0) -> Any:
    return {"w": jnp.ones((2, 3)) + member, "b": jnp.full(2, 0.5)}


@functools.cache
def one_run(member: int = 0) -> Any:
    """The state of a run after three healthy steps, filled in without any."""
    rng = np.random.default_rng(member)

    def fill(path, x):
        x, noise = np.array(x), rng.uniform(1, 2, x.shape)
        match path[-1].name if hasattr(path[-1], "name") else "":
            case "rows":
                x[:3, 6:] = noise[:3, 6:]
            case "counts":
                x[0] = 3
            case "num_steps":
                x += 3
            case "told":
                pass
            case _ if x.dtype == np.float32:
                x += noise.astype(np.float32)
        return jnp.asarray(x)

    return jax.tree.map_with_path(fill, TX.init(params_of()))


def test_metrics_outside_jit_compiles_once_for_a_structure():
    params = {str(i): jnp.ones(i) for i in range(11, 18)}
    tx = optax.chain(optaxclip.record("a"), optaxclip.clip_by_norm(1.0, per="leaf"))
    first, second = tx.init(params), tx.init(params)
    compiled: list[str] = []

    def listen(event, duration_secs, **kwargs):
        del duration_secs, kwargs
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    optaxclip.metrics(first, params)
    num_first = len(compiled)
    assert 1 <= num_first <= 3, "one program, and one to split each of two dtypes"
    optaxclip.metrics(second, params)
    optaxclip.metrics(first, params)
    assert len(compiled) == num_first


@pytest.mark.slow
def test_metrics_of_numpy_arrays_are_plain_arrays():
    state, params = one_run(), params_of()
    expected = optaxclip.metrics(state, params)
    assert all(isinstance(x, jax.Array) and x.shape == () for x in expected.values())
    found = optaxclip.metrics(jax.device_get(state), jax.device_get(params))
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


def stacked_runs() -> Any:
    """(parameters, state) of each of three runs, and those of the three stacked."""
    members = [params_of(i) for i in range(3)]
    runs = [one_run(i) for i in range(3)]
    params, states = (
        jax.tree.map(lambda *x: jnp.array(np.stack(x)), *trees)
        for trees in (members, runs)
    )
    return members, runs, params, states


@pytest.mark.slow
def test_metrics_of_runs_stacked_by_vmap_are_those_of_each():
    members, runs, params, states = stacked_runs()
    found = optaxclip.metrics(states, params)
    for i, member in enumerate(members):
        expected = optaxclip.metrics(runs[i], member)
        one = {name: x[i] for name, x in found.items()}
        chex.assert_trees_all_close(one, expected, rtol=1e-6)


@pytest.mark.slow
def test_parameters_of_one_run_give_the_names_of_several_and_no_ratios():
    members, _, params, states = stacked_runs()
    found = optaxclip.metrics(states, params)
    several = jax.tree.map(lambda x: jnp.array(np.stack([x, x])), states)
    named = optaxclip.metrics(several, members[0])
    assert set(named) == {name for name in found if "ratio" not in name}
    assert {x.shape for x in named.values()} == {(2, 3)}


@pytest.mark.parametrize("name", ["history", "explain", "raise_if_exploded"])
def test_what_reads_one_run_refuses_several(name):
    states = jax.tree.map(lambda x: jnp.array(np.stack([x, x])), one_run())
    with pytest.raises(ValueError, match=r"holds runs \[2\], and this reads one run"):
        READERS[name](states, params_of())
    READERS[name](jax.tree.map(lambda x: np.asarray(x)[0], states), params_of())


@pytest.mark.parametrize("name", READERS)
def test_every_reader_under_strict_promotion(strict, name):
    state = one_run()
    READERS[name](state, params_of())
    READERS[name](jax.device_get(state), params_of())


# --- Mistakes of use: an error in words about the argument.

package: Any = optaxclip  # without its types: they forbid these mistakes
SGD = optax.sgd(0.1)
PLOTTED = "plot draws a History: plot(optaxclip.history(opt_state, params))"
MISTAKES: dict[str, Any] = {
    "an optimizer that was not called": (
        lambda: package.stabilize(optax.adam),
        "must be an optax.GradientTransformation, not <function adam",
    ),
    "how to call it": (
        lambda: package.skip_explosions(optax.adam),
        "call it: adam(...)",
    ),
    "a learning rate for an optimizer": (
        lambda: package.stabilize(1e-3, max_norm=1.0),
        "inner must be an optax.GradientTransformation, not 0.001",
    ),
    "a class for an optimizer": (
        lambda: package.stabilize(optax.MultiSteps),
        "must be an optax.GradientTransformation, not <class",
    ),
    "True for a limit": (
        lambda: package.clip_by_norm(True),
        "max_norm must be a number, not True",
    ),
    "an array of bools for a limit": (
        lambda: package.clip_by_norm(np.array(True)),
        "max_norm must be a number, not array(True)",
    ),
    "a text for a limit": (
        lambda: package.clip_by_norm("1.0"),
        "max_norm must be a number, not '1.0'",
    ),
    "an array of text for a limit": (
        lambda: package.clip_by_norm(np.array("1.0")),
        "max_norm must be a number, not array('1.0'",
    ),
    "True for a bound": (
        lambda: package.clip_by_value(True),
        "max_value must be a number, not True",
    ),
    "a complex limit": (
        lambda: package.clip_by_norm(jnp.array(1j)),
        "max_norm must be a number, not Array(0.+1.j",
    ),
    "True for the order of a norm": (
        lambda: package.clip_by_norm(1.0, ord=True),
        "ord must be a Python number, not True",
    ),
    "a limit that was not called": (
        lambda: one_step(package.clip_by_norm(package.limits.sustained_rise)),
        "a schedule gave a Limit, and not a number: call it first",
    ),
    "two limits, the first of them bad": (
        lambda: package.limits.with_global(-1.0, 5.0),
        "limit must be >= 0, not -1.0",
    ),
    "two limits, the second of them bad": (
        lambda: package.limits.minimum(1.0, -5.0),
        "second must be >= 0, not -5.0",
    ),
    "a cap on a learned limit": (
        lambda: package.zclip(max_norm=-1.0),
        "max_norm must be >= 0, not -1.0",
    ),
    "a lower bound that is a schedule of a limit": (
        lambda: one_step(
            package.clip_by_norm(1.0, min_norm=lambda count: package.limits.zscore())
        ),
        "a schedule gave a Limit, and not a number: call it first",
    ),
    "a schedule that gives a flag": (
        lambda: one_step(package.clip_by_norm(lambda count: True)),
        "a schedule must give a number, not True",
    ),
    "a schedule that gives a text": (
        lambda: one_step(package.zclip(max_norm=lambda count: "1.0")),
        "a schedule must give a number, not '1.0'",
    ),
    "a schedule of values that gives a flag": (
        lambda: one_step(package.clip_by_value(lambda count: count > 1)),
        "a schedule must give a number, not ",
    ),
    "a schedule of least values that gives nothing": (
        lambda: one_step(package.clip_by_value(1.0, min_value=lambda count: None)),
        "a schedule must give a number, not None",
    ),
    "a list for a response": (
        lambda: package.clip_by_norm(1.0, respond=["cap"]),
        "respond must be one of ('cap', 'soft', 'set'), not ['cap']",
    ),
    "a function of names that gives no axis": (
        lambda: package.unit_norms({"w": jnp.ones((2, 2))}, unit_axis=lambda name: 1.0),
        "unit_axis= must give 'w' a whole number, not 1.0",
    ),
    "True for the tree whose zeros are counted": (
        lambda: package.metrics({}, zeros=True),
        "zeros must be a tree of arrays, such as the gradients, not True",
    ),
    "a transformation for a limit": (
        lambda: package.clip_by_norm(package.clip_by_norm(1.0)),
        "max_norm must be a number, not GradientTransformationExtraArgs",
    ),
    "a state without its label": (
        lambda: package.metrics(package.clip_by_norm(1.0).init(SMALL)["clip"]),
        "a ClipByNormState has lost its label: give the whole state of the optimizer",
    ),
    "states in a list": (
        lambda: package.history([package.record().init(SMALL)["gradients"]]),
        "a RecordState has lost its label",
    ),
    "no history": (lambda: package.plot(None), PLOTTED),
    "a state for a history": (
        lambda: package.plot(package.record().init(SMALL)),
        PLOTTED,
    ),
    "a state for the history after": (
        lambda: package.plot(a_history(), after=({},)),
        PLOTTED,
    ),
    "parameters for a path": (
        lambda: package.plot(a_history(), SMALL),
        "path must be the name of a file, not {'w'",
    ),
    "the state of another optimizer, in explain": (
        lambda: package.explain(SGD.init(SMALL)),
        "found no state of record, detect_explosions or skip_explosions",
    ),
    "the state of another optimizer, in history": (
        lambda: package.history(SGD.init(SMALL)),
        "found no state of record, detect_explosions or skip_explosions",
    ),
    "the state of another optimizer, in raise_if_exploded": (
        lambda: package.raise_if_exploded(SGD.init(SMALL)),
        "found no state of detect_explosions, skip_explosions or stabilize",
    ),
    "the state of another optimizer, in an update": (
        lambda: one_step(package.clip_by_norm(1.0), SGD.init(SMALL)),
        "state must be what init gave, {'clip': ClipByNormState}, not tuple",
    ),
    "the state of another optimizer, in an update of values": (
        lambda: one_step(package.clip_by_value(lambda count: 1.0), SGD.init(SMALL)),
        "state must be what init gave, a ClipByValueState, not tuple",
    ),
    "parameters and state in the wrong order": (
        lambda: one_step(package.record(), SMALL),
        "state must be what init gave, {'gradients': RecordState}, not ['w']",
    ),
    "a label of another": (
        lambda: one_step(
            package.detect_explosions(label="a"), package.record("b").init(SMALL)
        ),
        "state must be what init gave, {'a': DetectExplosionsState}, not ['b']",
    ),
    "no parameters for a rollback": (
        lambda: package.stabilize(SGD).update(
            SMALL, package.stabilize(SGD).init(SMALL)
        ),
        "with params, or give rollback=False",
    ),
    "loss= for value=": (
        lambda: one_step(package.record(), loss=1.0),
        "give the loss as value=",
    ),
    "loss= for value= of a detector": (
        lambda: one_step(package.stabilize(SGD), loss=1.0),
        "give the loss as value=",
    ),
    "a complex loss": (
        lambda: one_step(package.record(), value=1.0 + 0j),
        "give value=loss.real",
    ),
    "a state that changes its structure": (
        lambda: one_step(package.skip_explosions(optax.chain(GROWING, SGD))),
        "changes the structure of its state, as optax.monitor does",
    ),
}
SMALL = {"w": jnp.ones(2)}
# As `optax.monitor`, which Optax 0.2.6 does not have.
GROWING = optax.GradientTransformation(
    lambda params: {}, lambda updates, state, params=None: (updates, {"norm": 1.0})
)


def one_step(tx: Any, state: Any = None, **extra_args: Any) -> Any:
    """The shapes of a step: nothing is compiled."""
    state = tx.init(SMALL) if state is None else state
    return jax.eval_shape(lambda: tx.update(SMALL, state, SMALL, **extra_args))


def a_history() -> Any:
    zeros = np.zeros(1)
    return package.History(
        *[zeros] * 5, np.zeros((1, 4), bool), zeros, zeros[None], ["w"]
    )


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_words(mistake):
    make, message = MISTAKES[mistake]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make()


# What else they need, by its name.
GIVEN: dict[str, Any] = {"inner": SGD, "max_norm": 1.0, "low": 0.5, "high": 2.0}
GIVEN |= {"tree": SMALL, "group": lambda name: name}
BY_NAME: list[Any] = [
    (function, argument)
    for function in vars(optaxclip).values()
    if inspect.isfunction(function)
    for argument in ("where", "stacked", "unit_axis", "group")
    if argument in inspect.signature(function).parameters
]


@pytest.mark.parametrize("value", ["w", True, jnp.array(0)], ids=repr)
@pytest.mark.parametrize(
    ("function", "argument"), BY_NAME, ids=lambda x: getattr(x, "__name__", x)
)
def test_no_function_of_names_is_told_where_it_is_given(function, argument, value):
    given: Any = {
        name: GIVEN[name]
        for name, x in inspect.signature(function).parameters.items()
        if x.default is x.empty
    } | {argument: value}
    if argument == "unit_axis" and function is package.clip_by_norm:
        given["per"] = "unit"
    with pytest.raises(TypeError, match=f"{argument} must be .*function of a leaf's"):
        function(**given)


@pytest.mark.parametrize("argument", ["unit_axis", "where", "stacked"])
def test_inject_hyperparams_is_told_what_has_to_be_static(argument):
    static = {"ord", "per", "unit_axis", "where", "stacked"} - {argument}
    make = optax.inject_hyperparams(package.clip_by_norm, static_args=tuple(static))
    # Optax takes a function for a schedule, and calls it with the count.
    value = 0 if argument == "unit_axis" else lambda name: name == 0
    with pytest.raises(TypeError, match=rf"{argument} must be .*static_args="):
        make(1.0, per="unit", **{argument: value}).init(SMALL)
    make = optax.inject_hyperparams(
        package.clip_by_norm, static_args=(*static, argument)
    )
    one_step(make(1.0, per="unit", **{argument: value}))


def test_an_optimizer_that_takes_no_loss_is_given_none():
    """`optax.contrib.sam` would raise, and the loss is for the rules."""
    inner = optax.contrib.sam(SGD, SGD, sync_period=2)
    one_step(package.stabilize(inner), value=1.0)
    one_step(package.stabilize(inner, max_norm=1.0), value=1.0)
    one_step(package.stabilize(inner, max_norm=1.0, columns=["a"]), tag={"a": 1.0})


# --- Leaves that are not those of `init`, or no arrays.

PER_LEAF: dict[str, Any] = {
    "record": optaxclip.record(),
    "record per group": optaxclip.record(per=lambda name: name),
    "detect_explosions": optaxclip.detect_explosions(),
    "stabilize": optaxclip.stabilize(SGD),
    "clip per leaf": optaxclip.clip_by_norm(1.0, per="leaf"),
    "clip per unit": optaxclip.clip_by_norm(1.0, per="unit"),
    "adagc": optaxclip.adagc(),
}


@pytest.mark.parametrize("name", PER_LEAF)
def test_updates_with_other_leaves_than_init_was_given_are_refused(name):
    tx = PER_LEAF[name]
    params = {x: jnp.ones((2, 3)) for x in "abcd"}
    state, grads = tx.init(params), params | {"b": None, "d": None}
    message = r"leaves that init was given: .*updates: a, c; params: a, b, c, d\. Give"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: tx.update(grads, state, params))
    jax.eval_shape(lambda: tx.update(params, state, params))
    with pytest.raises(ValueError, match="updates: array; params: a, b"):
        jax.eval_shape(lambda: tx.update(jnp.ones(3), state, params))


def test_lookahead_inside_is_refused_and_outside_it_works():
    params = optax.LookaheadParams.init_synced(SMALL)
    tx = optaxclip.stabilize(optax.lookahead(SGD, 5, 0.5))
    with pytest.raises(ValueError, match=r"updates: w; params: fast/w, slow/w\. Give"):
        jax.eval_shape(lambda: tx.update(SMALL, tx.init(params), params))
    tx = optax.lookahead(optaxclip.stabilize(SGD), 5, 0.5)
    jax.eval_shape(lambda: tx.update(SMALL, tx.init(params), params))


def test_buffers_of_integers_without_gradients_are_refused():
    """As `eqx.filter(model, eqx.is_array)` and `eqx.filter_grad` give them."""
    params, grads = SMALL | {"steps": jnp.arange(2)}, SMALL | {"steps": None}
    tx: Any = optaxclip.stabilize(SGD)
    with pytest.raises(ValueError, match="Give init only what has a gradient"):
        jax.eval_shape(lambda: tx.update(grads, tx.init(params), params))
    # One norm of all leaves does not ask which they are.
    tx = optaxclip.clip_by_norm(1.0)
    jax.eval_shape(lambda: tx.update(grads, tx.init(params), params))


@pytest.mark.parametrize("name", [*PER_LEAF, "clip", "clip_by_value"])
def test_python_and_numpy_numbers_are_leaves(name):
    others = {"clip": optaxclip.clip_by_norm(1.0)}
    tx = (PER_LEAF | others).get(name, optaxclip.clip_by_value(1.0))
    tree = {"a": 0.5, "b": np.float64(0.5), "c": np.full(3, 0.5)}
    state = tx.init(tree)
    found, new = jax.eval_shape(lambda: tx.update(tree, state, tree, value=0.5))
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert jax.tree.structure(new) == jax.tree.structure(state)


@pytest.mark.slow
def test_python_numbers_train_as_with_sgd():
    tx = optaxclip.skip_explosions(SGD, norm=None, share=None, loss=None)
    params: Any = {"w": 0.5, "b": np.float64(2.0)}
    updates, state = tx.update(params, tx.init(params), params)
    expected, _ = SGD.update(params, SGD.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    optaxclip.raise_if_exploded(state, params)
    assert optaxclip.history(state, params).norms.shape == (1, 2)


def test_a_learning_rate_set_to_a_python_number_is_read():
    tx = optaxclip.skip_explosions(optax.inject_hyperparams(optax.sgd)(0.5))
    state: Any = tx.init(SMALL)
    state["explosions"].inner_state.hyperparams["learning_rate"] = 0.1
    optaxclip.raise_if_exploded(state, SMALL)
    state["explosions"].inner_state.hyperparams["learning_rate"] = float("nan")
    with pytest.raises(optaxclip.ExplosionError, match="learning_rate"):
        optaxclip.raise_if_exploded(state, SMALL)


def test_a_function_among_the_leaves_passes():
    """As Equinox has among the leaves of a model that is not filtered."""
    tree: Any = SMALL | {"activation": jnp.tanh}
    transformations: list[Any] = [optaxclip.clip_by_norm(0.1), optaxclip.record()]
    grads = SMALL | {"activation": None}
    for tx in transformations:
        jax.eval_shape(lambda tx=tx: tx.update(tree, tx.init(tree))[1])
        jax.eval_shape(lambda tx=tx: tx.update(grads, tx.init(grads), tree))
    clip: Any = optaxclip.clip_by_value(0.1)
    updates, _ = clip.update(tree, clip.init(tree))
    assert updates["activation"] is jnp.tanh


# --- What is told, and of what.


@functools.cache
def scan_of(name: str) -> Any:
    def step(state, x):
        size, loss = x
        grads = {"a": size[:1], "b": size[1:]}
        return PER_LEAF[name].update(grads, state, value=loss)[1], ()

    state = PER_LEAF[name].init({"a": jnp.ones(1), "b": jnp.ones(1)})
    return jax.jit(lambda sizes: jax.lax.scan(step, state, sizes)[0])


def told_of(name: str, sizes: Any, losses: Any = None) -> str:
    """What `explain` says after gradients of these norms."""
    losses = np.ones(len(sizes)) if losses is None else losses
    state = scan_of(name)(jax.tree.map(jnp.float32, (sizes, losses)))
    return optaxclip.explain(state, {"a": jnp.ones(1), "b": jnp.ones(1)})


def noise() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.exp(0.4 * rng.standard_normal((120, 2)))


@pytest.mark.parametrize("name", ["record", "detect_explosions"])
def test_noise_before_a_batch_of_nan_is_not_told_as_growth(name):
    norms = noise()
    norms[49] = 1.3 * norms[:49].max(axis=0)  # the largest so far, and healthy
    norms[50] = np.nan
    text = told_of(name, norms)
    assert "grown" not in text, text
    norms[46:50] *= 5.0 ** np.arange(1, 5)[:, None]
    text = told_of(name, norms)
    assert "The norm had grown by" in text, text


def test_an_explosion_of_the_loss_alone_tells_of_no_growth():
    losses = np.ones(120)
    losses[50] = 100
    text = told_of("detect_explosions", noise(), losses)
    assert "step 50: the loss was 100, above its limit" in text
    assert "grown" not in text, text


def test_every_explosion_that_is_kept_is_told_in_a_line():
    norms, losses = noise(), np.ones(120)
    norms[40, 0] = 50
    norms[70:73, 1] = np.nan
    losses[100] = 200
    text = told_of("detect_explosions", norms, losses)
    first, *lines = text.split("\n")
    assert "The last explosion began on step 100" in first
    limit = r"above its limit [\d.]+"
    expected = [
        rf"- step 40: the norm was 50, {limit}; leaf 'a' had grown most\.",
        r"- steps 70 to 72: leaf 'b' was non-finite\.",
        rf"- step 100: the loss was 200, {limit}\.",
    ]
    assert len(lines) == len(expected), text
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    lines = told_of("record", norms).split("\n")
    assert len(lines) == 1, "one explosion, which the first line tells"


def test_a_checkpoint_read_without_a_template_is_told(tmp_path):
    state = one_run()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state")
    as_bytes = serialization.msgpack_restore(serialization.to_bytes(state))
    for read in READERS.values():
        for found in (restored, as_bytes, restored[-1]):
            with pytest.raises(ValueError, match="was a state of optaxclip and is a"):
                read(found)


@pytest.mark.slow
def test_a_train_state_stands_for_its_parameters():
    params = params_of()
    state = TrainState.create(apply_fn=lambda: None, params=params, tx=TX)
    state = state.replace(opt_state=one_run())
    expected = optaxclip.metrics(state.opt_state, params)
    chex.assert_trees_all_equal(optaxclip.metrics(state, state), expected)
    assert READERS["history"](state, state).names == ["b", "w[0]", "w[1]"]
    assert optaxclip.explain(state, state) == optaxclip.explain(state, params)
    optaxclip.raise_if_exploded(state, state)


def test_help_names_what_an_argument_may_be():
    for function in (optaxclip.stabilize, optaxclip.clip_by_norm, optaxclip.agc):
        for parameter in inspect.signature(function).parameters.values():
            assert len(str(parameter.annotation)) < 40, parameter
    text = pydoc.render_doc(optaxclip.stabilize)
    assert "norm: 'limits.LimitLike | None' = <Limit maximum>," in text


PROJECT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def hatch():
    return tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["hatch"]


def test_the_source_distribution_holds_the_readme_of_the_project_alone(hatch):
    """A pattern without a slash matches in every directory."""
    included = hatch["build"]["targets"]["sdist"]["include"]
    assert "/README.md" in included
    assert all(pattern.startswith("/") for pattern in included)


def test_the_readme_on_a_page_of_an_index_links_to_no_file(hatch):
    readme = (PROJECT / "README.md").read_text()
    page = readme
    for change in hatch["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        page = re.sub(change["pattern"], change["replacement"], page)
    targets = re.findall(r"\]\(([^)]*)\)", page)
    assert targets
    assert all(target.startswith("https://") for target in targets), targets
    assert "![" not in page
    assert "details" in page  # the text of a link that is left
