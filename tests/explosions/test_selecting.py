"""`update_or_keep` gives what `jnp.where` after the update gives, and at no cost."""

import functools
import inspect
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip
from conftest import stores_no_squares
from optaxclip.explosions import skipping
from optaxclip.explosions.selecting import update_or_keep
from optimizers import assert_same_bits, bits, make_optimizer, op_by_op, optimizers_of

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def where_after(update, state, keep, kept=None):
    updates, new = update(state)
    kept = state if kept is None else kept
    return updates, jax.tree.map(lambda x, y: jnp.where(keep, x, y), kept, new)


def assert_same(found, expected):
    assert_same_bits(found, expected)
    weak = [
        [getattr(x, "weak_type", False) for x in jax.tree.leaves(tree)]
        for tree in (found, expected)
    ]
    assert weak[0] == weak[1]


def assert_as_where_after(update, state, transform: Any = jax.jit):
    def both(state, keep):
        return [f(update, state, keep) for f in (update_or_keep, where_after)]

    both = transform(both)
    for keep in (False, True):
        (found, found_state), (expected, expected_state) = both(state, jnp.array(keep))
        assert_same(found_state, expected_state)
        if not keep:
            assert_same(found, expected)


def make_params(dtype: Any = jnp.float32):
    return {
        "w": jnp.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3),
        "b": jnp.linspace(0.5, 2, 3, dtype=dtype),
    }


def loss_of(params):
    return sum(jnp.sum((x - 0.3) ** 4) for x in jax.tree.leaves(params))


def exact() -> Any:
    """Momentum by powers of two: rounds alike in any fusion, see `op_by_op`."""

    def rate_at(count: Any):
        return jnp.where(count % 2 == 0, -0.25, -0.5)

    return optax.chain(optax.trace(0.5), optax.scale_by_schedule(rate_at))


def assert_steps_as_where_after(
    tx,
    params,
    gradient_dtype: Any = None,
    keeps=(False, True, False, True),
    **extra_args,
):
    """The state of one step is that of the next, so that there is something to keep."""
    tx = optax.with_extra_args_support(tx)

    def both(params, state, keep):
        value, gradients = jax.value_and_grad(loss_of)(params)
        if gradient_dtype is not None:
            gradients = jax.tree.map(lambda x: x.astype(gradient_dtype), gradients)

        def update(state):
            loss = {"value": value, "grad": gradients, "value_fn": loss_of}
            return tx.update(gradients, state, params, **loss, **extra_args)

        return [f(update, state, keep) for f in (update_or_keep, where_after)]

    both = op_by_op(both)
    state = tx.init(params)
    was_changed = False
    for keep in keeps:
        found, expected = both(params, state, jnp.array(keep))
        assert_same(found[1], expected[1])
        if keep:
            # A first step may widen a state, as `where` after it would.
            same_types = jax.tree.map(
                lambda x, y: x if x.dtype == y.dtype else x.astype(y.dtype),
                state,
                found[1],
            )
            assert_same_bits(found[1], same_types)
        else:
            assert_same(found[0], expected[0])
            params = optax.apply_updates(params, found[0])
            was_changed |= any(
                bits(x) != bits(y)
                for x, y in zip(
                    jax.tree.leaves(state), jax.tree.leaves(found[1]), strict=True
                )
            )
        state = found[1]
    assert was_changed == bool(jax.tree.leaves(state))


# The optimizers of optax.

SLOW_OPTIMIZERS = {"lbfgs", "noisy_sgd", "rprop", "fromage", "novograd", "lars"}
SLOW_OPTIMIZERS |= {"adamaxw", "amsgrad", "optimistic_adam", "adabelief", "adan"}
SLOW_OPTIMIZERS |= {"lamb", "sm3", "yogi", "nadam", "adafactor", "adadelta", "adagrad"}
SLOW_OPTIMIZERS |= {"optimistic_adam_v2", "adamax", "radam", "lion"}


def test_no_optimizer_is_forgotten():
    home = optax.adam.__module__
    aliases = set()
    for name, function in vars(optax).items():
        origin = function.func if isinstance(function, functools.partial) else function
        if inspect.isfunction(origin) and origin.__module__ == home:
            aliases.add(name)
    assert aliases == set(optimizers_of(optax))
    assert aliases >= {"adam", "nadamw", "optimistic_adam_v2", "polyak_sgd", "lbfgs"}
    assert set(optimizers_of(optax.contrib)) >= {"dog", "prodigy", "muon", "sophia"}
    assert aliases >= SLOW_OPTIMIZERS


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=[pytest.mark.slow] if x in SLOW_OPTIMIZERS else [])
        for x in optimizers_of(optax)
    ],
)
def test_optimizers(name):
    assert_steps_as_where_after(make_optimizer(optax, name), make_params())


@pytest.mark.slow
@pytest.mark.parametrize("name", optimizers_of(optax.contrib))
def test_optimizers_of_contrib(name):
    tx = make_optimizer(optax.contrib, name)
    more = {"obj_fn": loss_of} if name == "sophia" else {}
    assert_steps_as_where_after(tx, make_params(), **more)


# bfloat16 parameters with float32 gradients widen the state in the first step.
@pytest.mark.parametrize(
    ("params_dtype", "gradient_dtype"),
    [
        pytest.param(jnp.float32, jnp.bfloat16, marks=pytest.mark.slow),
        (jnp.bfloat16, jnp.float32),
    ],
)
@pytest.mark.parametrize("name", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_gradients_of_another_dtype(name, params_dtype, gradient_dtype):
    assert_steps_as_where_after(
        make_optimizer(optax, name),
        make_params(params_dtype),
        gradient_dtype,
        keeps=(False, True, False),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [exact, pytest.param(lambda: optax.nadamw(0.1), marks=pytest.mark.slow)]
)
def test_float64(x64, make):
    assert_steps_as_where_after(make(), make_params(jnp.float64))


# Wrappers, and updates within the control flow of JAX.


def momentum_by(next_of) -> optax.GradientTransformation:
    """`next_of(gradient, momentum)` is the next momentum, and the update."""

    def update(updates, state, params=None):
        del params
        state = jax.tree.map(next_of, updates, state)
        return jax.tree.map(lambda x: -0.25 * x, state), state

    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), update
    )


def plain_momentum(g, m):
    return 0.5 * m + g


def scanned_momentum(g, m):
    return lax.scan(lambda m, _: (plain_momentum(g, m), None), m, length=2)[0]


def looped_momentum(g, m):
    return lax.while_loop(
        lambda carry: carry[0] < 2,
        lambda carry: (carry[0] + 1, plain_momentum(g, carry[1])),
        (0, m),
    )[1]


def branched_momentum(g, m):
    return lax.cond(jnp.sum(g) > 0, plain_momentum, lambda g, m: g + m, g, m)


@jax.custom_jvp
def custom_momentum(g, m):
    return plain_momentum(g, m)


@custom_momentum.defjvp
def _(primals, tangents):
    return custom_momentum(*primals), 3 * tangents[0]


def jitted(tx, num_times=1):
    update = tx.update
    for _ in range(num_times):
        update = jax.jit(lambda g, s, p=None, update=update: update(g, s, p))
    return optax.GradientTransformation(tx.init, update)


def partly_jitted(tx):
    """A `jit` of which one output is a state, an update and both."""

    def update(updates, state, params=None):
        del params
        both = jax.jit(
            lambda g, m: (plain_momentum(g, m), jax.jit(plain_momentum)(m, g), m)
        )
        out = jax.tree.map(both, updates, state)
        outer = jax.tree.structure(updates)
        new, mixed, _ = jax.tree.transpose(outer, jax.tree.structure((0, 0, 0)), out)
        return jax.tree.map(jnp.add, new, mixed), new

    return optax.GradientTransformation(tx.init, update)


WRAPPERS: dict[str, Any] = {
    "masked": lambda: optax.masked(optax.adam(0.1), {"w": True, "b": False}),
    "partition": lambda: optax.partition(
        {"a": optax.adam(0.1), "s": optax.sgd(0.1, 0.9)}, {"w": "a", "b": "s"}
    ),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.adam(0.1), 2
    ).gradient_transformation(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        optax.linear_schedule(0.1, 0, 9)
    ),
    "jit": lambda: jitted(exact()),
    "jit in jit": lambda: jitted(exact(), 3),
    "scan": lambda: momentum_by(scanned_momentum),
    "while_loop": lambda: momentum_by(looped_momentum),
    "cond": lambda: momentum_by(branched_momentum),
    "custom_jvp": lambda: momentum_by(custom_momentum),
    "checkpoint": lambda: momentum_by(jax.checkpoint(plain_momentum)),
    "clip_by_norm": lambda: optax.chain(optaxclip.clip_by_norm(1.0), optax.sgd(0.1)),
}
SLOW_WRAPPERS: dict[str, Any] = {
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "mu_dtype": lambda: optax.adam(0.1, mu_dtype=jnp.bfloat16),
    "partly jitted": lambda: partly_jitted(momentum_by(plain_momentum)),
    "apply_every": lambda: optax.chain(optax.sgd(0.1), optax.apply_every(2)),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.1, 0, 9))
    ),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "mechanize": lambda: optax.contrib.mechanize(optax.adam(0.1)),
    "reduce_on_plateau": lambda: optax.chain(
        optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1)
    ),
    "split_real_and_imaginary": lambda: optax.contrib.split_real_and_imaginary(
        optax.adam(0.1)
    ),
    "stabilize": lambda: optaxclip.stabilize(optax.adam(0.1)),
}


@pytest.mark.parametrize(
    "name",
    [*WRAPPERS, *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW_WRAPPERS)],
)
def test_wrappers(name):
    tx = (WRAPPERS | SLOW_WRAPPERS)[name]()
    assert_steps_as_where_after(tx, make_params())


# Corner cases. Integers and small numbers, so that nothing rounds.

A, B = jnp.arange(3.0), jnp.arange(3.0) + 10
BIG = jnp.arange(2000.0)
FLOAT0 = np.zeros(3, jax.dtypes.float0)


def twice(x):
    return x, x


CASES: dict[str, Any] = {
    "one value in two leaves": (lambda s: ((), twice(2 * s[0])), (A, B)),
    "one value in two leaves of a jit": (
        lambda s: ((), jax.jit(lambda x: twice(2 * x))(s[0])),
        (A, B),
    ),
    "one value in two leaves and the updates": (
        lambda s: (lambda x: (x, (x, s[2], x)))(2 * s[0]),
        (A, B, B + 1),
    ),
    "one value whose old ones are equal": (lambda s: (s, twice(2 * s[0])), (A, A)),
    "the same leaf": (lambda s: (2 * s[0], s), (A, B)),
    "swapped leaves": (lambda s: (s[0], s[::-1]), (A, B)),
    "swapped leaves in a jit": (
        lambda s: (s[0], jax.jit(lambda s: s[::-1])(s)),
        (A, B),
    ),
    "swapped by jits of jits": (
        lambda s: (
            s[0],
            jax.jit(lambda a, b: jax.jit(lambda b, a: (b * 2, b * 2 + a))(b, a))(*s),
        ),
        (A, B),
    ),
    "a leaf in two places": (lambda s: ((), (s[1], s[1])), (A, B)),
    "closed over becomes state": (lambda s: (s, B), A),
    "numpy becomes state": (lambda s: (s, np.asarray(B)), A),
    "state is the update": (lambda s: (lambda x: (x, x))(s + 1), A),
    "state is read by the next": (
        lambda s: (lambda x: (x, (x, (x + 1) * s[1])))(s[0] + 1),
        (A, B),
    ),
    "literal": (lambda s: (s, 1.0), jnp.float32(2)),
    "literal for a weak type": (lambda s: (s, 1.0), jnp.asarray(2.0)),
    "literal for bfloat16": (lambda s: (s, 1.0), jnp.bfloat16(2)),
    "literal int8": (lambda s: (s, 1), jnp.int8(2)),
    "literal bool": (lambda s: (s, True), jnp.asarray(False)),
    "literal of numpy": (lambda s: (s, np.float32(1)), jnp.float32(2)),
    "literal in a jit": (
        lambda s: (s, jax.jit(lambda x: (2 * x, 1.0))(s[0])),
        (A, jnp.float32(2)),
    ),
    "Python numbers": (lambda s: (s, s + 1), 2.0),
    "weak type": (lambda s: (s, s + 1), jnp.asarray(2)),
    "no state": (lambda s: (2 * A, s), ()),
    "no updates": (lambda s: ((), s + 1), A),
    "empty tree": (lambda s: ({}, s), {}),
    "empty array": (lambda s: (s, s + 1), jnp.zeros((0, 3))),
    "None and MaskedNode": (
        lambda s: (
            {"a": s["a"], "b": None, "c": optax.MaskedNode()},
            s | {"a": s["a"] + 1},
        ),
        {"a": A, "b": None, "c": optax.MaskedNode()},
    ),
    "integers": (lambda s: (s, (s[0] + 1, s[1] ^ True)), (jnp.arange(3), A > 1)),
    "complex": (lambda s: (s, 2j * s), A + 1j),
    "updates of every kind": (
        lambda s: (
            {
                "array": 2 * s,
                "float0": FLOAT0,
                "number": jnp.asarray(1.5),
                "numpy": np.arange(2),
                "int": jnp.arange(2),
                "key": jax.random.key(0),
            },
            s + 1,
        ),
        A,
    ),
    "float0 in the state": (lambda s: ((), (s[0], s[1] + 1)), (FLOAT0, A)),
    "key in the state": (
        lambda s: (jax.random.normal(s[0]), (jax.random.split(s[0])[0], s[1] + 1)),
        (jax.random.key(0), A),
    ),
    "old key in the state": (
        lambda s: (s[1], (jax.random.split(s[0])[1], s[1] + 1)),
        (jax.random.PRNGKey(0), A),
    ),
    "big array closed over": (lambda s: (BIG[:3] + s, s + jnp.max(BIG)), A),
    "big array closed over in a jit": (
        lambda s: jax.jit(lambda s: (BIG[:3] + s, s + jnp.max(BIG)))(s),
        A,
    ),
    "custom_vjp": (
        lambda s: (s, jax.grad(lambda s: jnp.sum(jax.nn.relu(s - 1) ** 2))(s)),
        A,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_corner_cases(name):
    assert_as_where_after(*CASES[name])


def test_python_numbers_among_the_updates():
    @jax.jit
    def run(state, keep):
        updates, state = update_or_keep(lambda s: ((1.5, 2, s), s + 1), state, keep)
        assert updates[:2] == (1.5, 2)
        return updates, state

    assert_same_bits(run(A, jnp.array(True))[1], A)
    assert_same_bits(
        run(A, jnp.array(False)), ((*map(jnp.asarray, (1.5, 2)), A), A + 1)
    )


@pytest.mark.parametrize("name", ["literal", "Python numbers", "weak type", "complex"])
def test_corner_cases_with_x64(x64, name):
    update, state = CASES[name]
    assert_as_where_after(update, jax.tree.map(jnp.asarray, state))


def test_callbacks_run_once():
    seen = []

    def update(state):
        jax.debug.callback(seen.append, state, ordered=True)
        return state, jax.pure_callback(lambda x: np.asarray(x) + 1, state, state)

    run = jax.jit(functools.partial(update_or_keep, update))
    for keep in (False, True):
        _, state = run(A, jnp.array(keep))
        assert_same_bits(state, A if keep else A + 1)
    jax.effects_barrier()
    assert_same_bits(seen, [A, A])


def test_no_tracer_leaks():
    with jax.checking_leaks():
        assert_as_where_after(*CASES["one value in two leaves and the updates"])


def test_structure_that_changes_is_refused():
    for update in (lambda s: ((), s[:1]), lambda s: ((), {"a": s[0], "b": s[1]})):
        with pytest.raises(ValueError, match=r"structure|arity|Expected"):
            jax.jit(functools.partial(update_or_keep, update))((A, B), jnp.array(True))


# Under the transformations of JAX.

EXACT = exact()


def update_from(gradients):
    return lambda state: EXACT.update(gradients, state)


def warm_state(params) -> Any:
    _, state = EXACT.update(jax.tree.map(jnp.cos, params), EXACT.init(params))
    return state


@pytest.mark.parametrize(
    "jit",
    [
        pytest.param(jax.jit, id="jit"),
        pytest.param(lambda f: f, id="eager", marks=pytest.mark.slow),
    ],
)
def test_vmap_over_keep(jit):
    params = make_params()
    gradients = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), params)
    keep = jnp.array([True, False, True])
    state = warm_state(params)

    def members(method) -> Any:
        member = jax.vmap(lambda g, k: method(update_from(g), state, k))
        return jit(member)(gradients, keep)

    updates, new = members(update_or_keep)
    expected, expected_state = members(where_after)
    assert_same(new, expected_state)
    assert_same(*(jax.tree.map(lambda x: x[1], u) for u in (updates, expected)))
    for i in (0, 2):
        assert_same_bits(jax.tree.map(lambda x, i=i: x[i], new), state)
    np.testing.assert_array_equal(new[1].count, [1, 2, 1])


@pytest.mark.slow
def test_vmap_over_states():
    params = make_params()
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    states = jax.vmap(warm_state)(params)
    update = update_from(make_params())
    run = jax.vmap(functools.partial(update_or_keep, update), in_axes=(0, None))
    assert_same_bits(jax.jit(run)(states, jnp.array(True))[1], states)
    expected = jax.vmap(update)(states)
    assert_same_bits(jax.jit(run)(states, jnp.array(False)), expected)


def test_eager_equals_jit():
    update = update_from(make_params())
    state = warm_state(make_params())
    traced = jax.jit(functools.partial(update_or_keep, update))
    for keep in map(jnp.array, (False, True)):
        eager, expected = update_or_keep(update, state, keep), traced(state, keep)
        assert_same(eager[1], expected[1])
        if keep:
            assert_same_bits(eager[1], state)
        else:
            assert_same(eager[0], expected[0])


@pytest.mark.parametrize("keep", [False, True])
def test_traced_gradients_with_a_known_state(keep):
    params = make_params()
    state = warm_state(params)
    found = jax.jit(lambda g: update_or_keep(update_from(g), state, jnp.array(keep)))
    expected = state if keep else update_from(params)(state)[1]
    assert_same_bits(found(params)[1], expected)


@pytest.mark.parametrize("loop", ["scan", "while_loop", "cond"])
def test_in_control_flow(loop):
    @jax.jit
    def run(params, state, keeps):
        def step(carry, keep):
            params, state = carry
            gradients = jax.tree.map(lambda x: x - 1, params)
            updates, state = update_or_keep(update_from(gradients), state, keep)
            updates = jax.tree.map(lambda u: jnp.where(keep, 0, u), updates)
            return optax.apply_updates(params, updates), state

        if loop == "scan":
            return lax.scan(lambda c, k: (step(c, k), None), (params, state), keeps)[0]
        if loop == "while_loop":
            return lax.while_loop(
                lambda carry: carry[0] < keeps.size,
                lambda carry: (carry[0] + 1, step(carry[1], keeps[carry[0]])),
                (0, (params, state)),
            )[1]
        carry = params, state
        for keep in keeps:
            carry = lax.cond(
                keep, lambda c: step(c, True), lambda c, k=keep: step(c, k), carry
            )
        return carry

    args = make_params(), warm_state(make_params())
    params, state = args
    for _ in range(2):
        gradients = jax.tree.map(lambda x: x - 1, params)
        updates, state = update_from(gradients)(state)
        params = optax.apply_updates(params, updates)
    # The same as without the steps that are kept.
    found = run(*args, jnp.array([False, True, True, False]))
    assert_same_bits(found, (params, state))
    assert_same_bits(run(*args, jnp.ones(4, bool)), args)


@pytest.mark.slow
def test_derivatives():
    """With respect to the learning rate of three steps, through a custom rule."""
    params = make_params()
    tx = optax.chain(momentum_by(custom_momentum), optax.scale_by_schedule(jnp.sqrt))

    def both(rate, keep):
        def run(rate, method):
            after, state = params, tx.init(params)
            for i in range(3):
                gradients = jax.tree.map(lambda x, i=i: rate * (x - i), after)
                is_kept = keep & (i == 1)
                updates, state = method(
                    lambda s, g=gradients: tx.update(g, s), state, is_kept
                )
                updates = jax.tree.map(lambda u, k=is_kept: jnp.where(k, 0, u), updates)
                after = optax.apply_updates(after, updates)
            return loss_of(after)

        return [jax.grad(run)(rate, f) for f in (update_or_keep, where_after)]

    both = op_by_op(both)
    for keep in (False, True):
        found, expected = both(jnp.float32(0.1), jnp.array(keep))
        assert float(found) == float(expected) != 0


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_shard_map(sharded, check_vma):
    devices = jax.devices("cpu")[:8]
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,), devices=devices)
    gradients = {"w": jnp.arange(32.0).reshape(16, 2) - 5, "b": jnp.ones(8)}
    params = gradients
    if not sharded:
        params = jax.tree.map(lambda x: x[: len(x) // 8], gradients)
    state = warm_state(params)
    spec = P("x") if sharded else P()
    specs = jax.tree.map(lambda x: spec if x.ndim else P(), state)

    def update(gradients, state, keep):
        def from_all(state):
            reduced = gradients if sharded else lax.psum(gradients, "x")
            return EXACT.update(reduced, state)

        return update_or_keep(from_all, state, keep)

    run = jax.jit(
        jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(P("x"), specs, P()),
            out_specs=(spec, specs),
            check_vma=check_vma,
        )
    )
    assert_same_bits(run(gradients, state, jnp.array(True))[1], state)
    summed = gradients
    if not sharded:
        summed = jax.tree.map(
            lambda x: x.reshape(8, -1, *x.shape[1:]).sum(0), gradients
        )
    expected = EXACT.update(summed, state)
    assert_same_bits(run(gradients, state, jnp.array(False)), expected)


@pytest.mark.parametrize("inner", ["plain", "jit", "jit with shardings"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays(axis_type, inner):
    axis_types, devices = (axis_type,) * 2, jax.devices("cpu")[:8]
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types, devices=devices)
    sharding = NamedSharding(mesh, P("x", "y"))
    params = {"w": jnp.arange(32.0).reshape(8, 4) - 5}
    state = warm_state(params)
    expected = EXACT.update(params, state)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding)
        everywhere = NamedSharding(mesh, P())
        shardings = jax.tree.map(lambda x: sharding if x.ndim else everywhere, state)
        placed = jax.device_put(state, shardings)
        update: Any = EXACT.update
        of_updates = sharding
        if inner == "jit":
            update = jax.jit(update)
        elif inner == "jit with shardings":
            if axis_type == AxisType.Auto:
                of_updates = NamedSharding(mesh, P("y"))
            update = jax.jit(update, out_shardings=({"w": of_updates}, None))
        run = jax.jit(lambda g, s, k: update_or_keep(lambda s: update(g, s), s, k))
        kept = run(params, placed, jnp.array(True))[1]
        found = run(params, placed, jnp.array(False))
    assert_same_bits(kept, state)
    assert_same_bits(found, expected)
    assert found[0]["w"].sharding.is_equivalent_to(of_updates, 2)
    if of_updates == sharding:
        for x in (found[1][0].trace["w"], kept[0].trace["w"]):
            assert x.sharding.is_equivalent_to(sharding, 2)


# What it costs, on XLA's CPU compiler, for the shapes of a small model.


@pytest.fixture
def optimized(quick_to_compile):
    if jax.default_backend() != "cpu":
        pytest.skip("the bounds are those of XLA's CPU compiler")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


SHAPES = {"a": (1024, 512), "b": (512, 2048), "c": (512, 512), "d": (512,)}
LIKE_PARAMS = {n: jax.ShapeDtypeStruct(x, jnp.float32) for n, x in SHAPES.items()}
SMALL = 1000
ACCESSED_BY_ADAM = 10  # in units of the gradients, each of three loops by itself


def num_bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def copied(hlo: str) -> list[int]:
    """The number of elements of each copy of a big array."""
    copies = re.findall(r" = \w+\[([\d,]*)\]\S* copy(?:-start)?\(", hlo)
    sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in copies]
    return [size for size in sizes if size > SMALL]


class Cost:
    """Of a step with donated parameters and state, in units of the gradients."""

    def __init__(self, step, state, *more):
        step = jax.jit(step, donate_argnums=(0, 1))
        compiled = step.lower(LIKE_PARAMS, state, LIKE_PARAMS, *more).compile()
        memory: Any = compiled.memory_analysis()
        analysis: Any = compiled.cost_analysis()
        self.aliased = memory.alias_size_in_bytes - num_bytes((LIKE_PARAMS, state))
        self.temporaries = memory.temp_size_in_bytes / num_bytes(LIKE_PARAMS)
        self.accessed = analysis["bytes accessed"] / num_bytes(LIKE_PARAMS)
        self.copies = copied(compiled.as_text() or "")


def cost_of_method(method, adam) -> Cost:
    def step(params, state, gradients, keep):
        updates, state = method(lambda s: adam.update(gradients, s), state, keep)
        updates = jax.tree.map(lambda u: jnp.where(keep, 0, u), updates)
        return optax.apply_updates(params, updates), state

    keep = jax.ShapeDtypeStruct((), bool)
    return Cost(step, jax.eval_shape(adam.init, LIKE_PARAMS), keep)


def cost_of_skipping(tx) -> Cost:
    def step(params, state, gradients, loss):
        updates, state = tx.update(gradients, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    loss = jax.ShapeDtypeStruct((), jnp.float32)
    return Cost(step, jax.eval_shape(tx.init, LIKE_PARAMS), loss)


@pytest.mark.parametrize(
    "adam", [optax.adam(0.1), jitted(optax.adam(0.1), 2)], ids=["adam", "jit in jit"]
)
def test_a_choice_costs_nothing(optimized, adam):
    cost = cost_of_method(update_or_keep, adam)
    assert cost.aliased == 0
    assert cost.temporaries < 1e-3
    assert not cost.copies
    assert cost.accessed == pytest.approx(ACCESSED_BY_ADAM, abs=0.01)


def test_where_after_would_copy(optimized):
    cost = cost_of_method(where_after, optax.adam(0.1))
    assert cost.copies
    assert cost.temporaries > 1
    assert cost.accessed > ACCESSED_BY_ADAM + 4


@stores_no_squares
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param({"rollback": True}, marks=pytest.mark.slow),
        pytest.param({"cool_down": 0.5}, marks=pytest.mark.slow),
        pytest.param({"norm": None, "share": None}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_skipping_stays_in_place(optimized, arguments):
    cost = cost_of_skipping(optaxclip.skip_explosions(optax.adam(0.1), **arguments))
    assert cost.aliased == 0
    assert cost.temporaries < 0.01
    # Of parameters to a snapshot, and from one to the other, in loops that seldom run.
    leaves = jax.tree.leaves(LIKE_PARAMS) if arguments.get("rollback") else []
    assert sorted(cost.copies) == sorted(2 * [x.size for x in leaves if x.size > SMALL])
    if not arguments:
        # The norm reads the gradients, and once more in a loop that seldom runs, as is
        # the one that looks at both moments.
        assert cost.accessed == pytest.approx(ACCESSED_BY_ADAM + 2 + 2, abs=0.05)


@pytest.mark.slow
def test_a_clip_inside_stores_the_gradients_once_more(optimized):
    """An accepted step is scaled before the clip, and the clip reads it twice."""
    inner = optax.chain(optaxclip.clip_by_norm(1.0), optax.adam(0.1))
    cost = cost_of_skipping(optaxclip.skip_explosions(inner))
    assert cost.aliased == 0
    assert cost.temporaries == pytest.approx(1, abs=0.01)
    assert not cost.copies


@pytest.mark.slow
@pytest.mark.parametrize("rollback", [False, True])
def test_skipping_would_copy_by_where_after(optimized, monkeypatch, rollback):
    monkeypatch.setattr(skipping, "update_or_keep", where_after)
    tx = optaxclip.skip_explosions(optax.adam(0.1), rollback=rollback)
    cost = cost_of_skipping(tx)
    assert cost.copies
    assert cost.temporaries > 1


# `skip_explosions`: nothing that is non-finite gets through.

NUM_STEPS = 20
NUM_ELEMENTS = 10
NUM_POSITIONS = NUM_STEPS * NUM_ELEMENTS
BAD = (np.nan, np.inf, -np.inf)


def skip_nonfinite(inner) -> Any:
    return optaxclip.skip_explosions(inner, norm=None, share=None, loss=None)


def as_tree(x):
    return {"w": x[..., :6].reshape(*x.shape[:-1], 2, 3), "b": x[..., 6:]}


def make_gradients():
    rng = np.random.default_rng(0)
    return rng.standard_normal((NUM_STEPS, NUM_ELEMENTS)).astype(np.float32)


def poisoned(gradients, bad):
    """One run for every step and element, with that one bad: `[run, step, element]`."""
    runs = np.repeat(gradients[None], NUM_POSITIONS, axis=0)
    positions = np.arange(NUM_POSITIONS)
    runs[positions, positions // NUM_ELEMENTS, positions % NUM_ELEMENTS] = bad
    return runs


def all_finite(tree) -> bool:
    return all(bool(np.all(np.isfinite(x))) for x in jax.tree.leaves(tree))


def run_all(tx, gradients):
    """(parameters, inner state, number of skips, updates) of many runs at once."""
    params = as_tree(jnp.ones(NUM_ELEMENTS))

    @jax.jit
    @jax.vmap
    def run(gradients):
        def step(carry, gradients):
            params, state = carry
            updates, state = tx.update(
                as_tree(gradients), state, params, value=jnp.float32(1)
            )
            params = optax.apply_updates(params, updates)
            state = state["explosions"]
            carry = params, {"explosions": state}
            told = (
                params,
                state.inner_state,
                state.explosions.counts.skipped,
                updates,
            )
            return carry, told

        return lax.scan(step, (params, tx.init(params)), gradients)[1]

    return run(jnp.asarray(gradients))


def test_a_bad_element_anywhere_undoes_its_step():
    gradients = make_gradients()
    tx = skip_nonfinite(EXACT)
    runs = np.concatenate([poisoned(gradients, bad) for bad in BAD])
    params, inner_state, num_skipped, _ = run_all(tx, runs)
    skipped_at = np.tile(np.arange(NUM_POSITIONS) // NUM_ELEMENTS, len(BAD))

    after = np.ones((len(runs), NUM_ELEMENTS), np.float32)
    trace, num_steps = np.zeros_like(after), np.zeros(len(runs), np.int32)
    for i in range(NUM_STEPS):
        is_taken = skipped_at != i
        factor = np.where(num_steps % 2 == 0, -0.25, -0.5).astype(np.float32)
        trace = np.where(is_taken[:, None], 0.5 * trace + gradients[i], trace)
        after = after + np.where(is_taken[:, None], factor[:, None] * trace, 0)
        num_steps += is_taken
        found = jax.tree.map(lambda x, i=i: np.asarray(x[:, i]), (params, inner_state))
        assert_same_bits(found[0], as_tree(after))
        assert_same_bits(found[1][0].trace, as_tree(trace))
        np.testing.assert_array_equal(found[1][1].count, num_steps)
        np.testing.assert_array_equal(num_skipped[:, i], skipped_at <= i)


@pytest.mark.slow
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_element_anywhere_with_the_default_rules(bad):
    tx = optaxclip.skip_explosions(optax.adam(0.1))
    runs = poisoned(make_gradients(), bad)
    params, inner_state, num_skipped, updates = run_all(tx, runs)
    assert all_finite((params, inner_state, updates))
    assert np.all(num_skipped[:, -1] >= 1)
    assert np.all(np.sum(np.any(updates["b"] != 0, axis=2), axis=1) > NUM_STEPS / 2)


def take_steps(tx, params, gradients, values, transform: Any = jax.jit):
    """(parameters, state of the transformation) after each step, and before it."""
    update = transform(
        lambda g, s, p, value: tx.update(g, s, p, value=value),
    )
    state = tx.init(params)
    history = [(params, state)]
    for gradient, value in zip(gradients, values, strict=True):
        updates, state = update(gradient, state, params, jnp.float32(value))
        params = optax.apply_updates(params, updates)
        history.append((params, state))
    return history


def test_a_bad_loss_alone_is_counted_and_its_step_is_taken():
    """As where float16 overflows in the loss: the gradients are good."""
    tx = skip_nonfinite(EXACT)
    params = make_params()
    gradients = [jax.tree.map(lambda x, i=i: x - i, params) for i in range(5)]
    values = [1.0, *BAD, 1.0]
    history = take_steps(tx, params, gradients, values)
    bare = optax.with_extra_args_support(EXACT)
    expected = take_steps(bare, params, gradients, values)
    for (found, state), step in zip(history, expected, strict=True):
        assert_same_bits((found, state["explosions"].inner_state), step)
    explosions = history[-1][1]["explosions"].explosions
    assert int(explosions.counts.nonfinite) == len(BAD)
    assert int(explosions.counts.skipped) == 0


def test_a_nan_made_by_the_inner_transformation_stops():
    inner = optax.stateless(lambda updates, _: jax.tree.map(jnp.sqrt, updates))
    tx = skip_nonfinite(inner)
    gradients = {"w": jnp.array([-1.0, 4.0, -0.0]), "b": jnp.array([9.0])}
    updates, state = jax.jit(tx.update)(gradients, tx.init(gradients))
    np.testing.assert_array_equal(updates["w"], [0, 2, 0])
    np.testing.assert_array_equal(updates["b"], [3])
    assert int(state["explosions"].explosions.counts.skipped) == 0


@pytest.mark.parametrize(
    ("dtype", "large"),
    [
        (jnp.float16, 6e4),
        pytest.param(jnp.bfloat16, 3e38, marks=pytest.mark.slow),
        pytest.param(jnp.float32, 3e38, marks=pytest.mark.slow),
    ],
)
def test_a_finite_update_does_not_overflow_a_parameter(dtype, large):
    tx = skip_nonfinite(optax.identity())
    params = {"w": jnp.array([large, -large, large, 1.0], dtype)}
    gradients = {"w": jnp.array([large, -large, -large, 1.0], jnp.float32)}
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    assert updates["w"].dtype == jnp.float32
    np.testing.assert_array_equal(updates["w"][:2], [0, 0])
    assert_same_bits(updates["w"][2:], gradients["w"][2:])
    assert all_finite(optax.apply_updates(params, updates))


def test_extra_arguments_reach_the_inner_transformation():
    seen = {}

    def update(updates, state, params=None, **extra_args):
        del params
        seen.update(extra_args)
        return jax.tree.map(lambda u: extra_args["factor"] * u, updates), state + 1

    inner = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros([]), update)
    tx = skip_nonfinite(inner)
    gradients = {"w": A}

    @jax.jit
    def step(gradients, state, factor):
        return tx.update(
            gradients, state, value=jnp.float32(1), factor=factor, f=loss_of, name="x"
        )

    updates, state = step(gradients, tx.init(gradients), jnp.float32(3))
    np.testing.assert_array_equal(updates["w"], 3 * A)
    assert float(state["explosions"].inner_state) == 1
    assert set(seen) == {"value", "factor", "f", "name"}
    assert seen["f"] is loss_of
    assert seen["name"] == "x"


@pytest.mark.slow
def test_lbfgs_inside():
    tx = skip_nonfinite(optax.lbfgs())
    params = make_params()
    state = tx.init(params)

    @jax.jit
    def step(params, state, factor):
        value, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(
            jax.tree.map(lambda x: factor * x, gradients),
            state,
            params,
            value=value,
            grad=gradients,
            value_fn=loss_of,
        )
        return optax.apply_updates(params, updates), state

    for factor in (1.0, 1.0, np.nan, 1.0):
        before = params, state["explosions"].inner_state
        params, state = step(params, state, jnp.float32(factor))
        if factor != factor:
            assert_same_bits((params, state["explosions"].inner_state), before)
        else:
            assert loss_of(params) < loss_of(before[0])


def test_multisteps_inside():
    inner: Any = optax.MultiSteps(EXACT, 2).gradient_transformation()
    inner = optax.with_extra_args_support(inner)
    tx = skip_nonfinite(inner)
    params = make_params()
    good = [jax.tree.map(lambda x, i=i: x - i, params) for i in range(4)]
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), params)
    # Where an accumulation begins, where it ends, and where the next one begins.
    gradients = [bad, good[0], bad, good[1], bad, *good[2:]]
    found, state = take_steps(tx, params, gradients, [1.0] * len(gradients))[-1]
    expected = take_steps(inner, params, good, [1.0] * len(good))[-1]
    assert_same_bits((found, state["explosions"].inner_state), expected)
    assert int(expected[1].gradient_step) == 2


@pytest.mark.slow
def test_skipping_in_jit_equals_eager():
    tx = skip_nonfinite(EXACT)
    params = make_params()
    gradients = [jax.tree.map(lambda x, f=f: f * x, params) for f in (1, np.nan, 2)]
    traced, eager = (
        take_steps(tx, params, gradients, [1.0] * 3, transform)[-1]
        for transform in (jax.jit, lambda f: f)
    )
    inner = [(p, s["explosions"].inner_state) for p, s in (traced, eager)]
    assert_same(*inner)
    assert int(inner[0][1][1].count) == 2


def test_a_state_that_narrows_and_is_read():
    def update(state):
        narrow = state.astype(jnp.bfloat16) * 2
        return narrow * 2 + 1, narrow

    state = jnp.asarray([1.0, 1 + 2**-20])
    for keep in (True, False):
        updates, new = jax.jit(functools.partial(update_or_keep, update))(
            state, jnp.asarray(keep)
        )
        expected = state if keep else update(state)[1]
        np.testing.assert_array_equal(new, expected)
        if not keep:
            np.testing.assert_array_equal(updates, update(state)[0])
