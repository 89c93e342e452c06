"""Every transformation, in every layout over eight devices, does what one device does.

Rows are the transformations (`ROWS`), columns the layouts (`LAYOUTS`) and how they are
compiled (`MODES`). All rows of a cell run in one program: what differs is named.
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip import limits
from optaxclip.explosions.state import event_of
from registry import scale_by_second_moment


class Layout(NamedTuple):
    """How the parameters and the batch of examples lie on the devices."""

    mesh: dict[str, int]
    batch: tuple[str, ...]
    specs: dict[str, P]


SHAPES = {"bias": (8,), "hidden": (8, 16), "layers": (3, 8, 8), "out": (8, 8)}
SHAPES |= {"scale": ()}
REPLICATED = dict.fromkeys(SHAPES, P())
LAST = {"bias": P("x"), "hidden": P(None, "x"), "layers": P(None, None, "x")}
FIRST = {"bias": P("x"), "hidden": P("x"), "layers": P(None, "x"), "out": P("x")}
BOTH = {"bias": P("tensor"), "hidden": P("fsdp", "tensor"), "layers": P(None, "fsdp")}
BOTH |= {"out": P(None, ("fsdp", "tensor"))}
LAYOUTS = {
    "data": Layout({"x": 8}, ("x",), REPLICATED),
    "tensor": Layout({"x": 8}, (), REPLICATED | LAST | {"out": P(None, "x")}),
    "fsdp": Layout({"x": 8}, (), REPLICATED | FIRST),
    "mixed": Layout({"data": 2, "fsdp": 2, "tensor": 2}, ("data",), REPLICATED | BOTH),
}
MODES = ("auto", "explicit", "shard_map", "shard_map, vma")


def group(name):
    return "kernels" if name in ("hidden", "layers") else "rest"


def is_stacked(name):
    return name == "layers"


def of(make, *arguments, **options) -> Callable:
    """A row: the transformation from the specs of `shard_map`, None under `jit`."""
    return lambda specs: make(*arguments, specs=specs, **options)


def clip(max_norm, **options) -> Callable:
    return of(optaxclip.clip_by_norm, max_norm, **options)


def keeps(norms, *arguments, **options) -> Callable:
    """A row: passes updates through, with their norms for a state."""

    def make(specs):
        def init(params):
            found = norms(params, *arguments, specs=specs, **options)
            return tuple(jax.tree.leaves(found))

        def update(updates, state, params=None, **extra_args):
            del state, params, extra_args
            return updates, init(updates)

        return optax.GradientTransformationExtraArgs(init, update)

    return make


def skip(*, specs, **options):
    clip = optaxclip.clip_by_norm(limits.log_quantile(), specs=specs)
    inner = optax.chain(clip, OPTIMIZER)
    return optaxclip.skip_explosions(inner, cool_down=0.5, specs=specs, **options)


# Exact like the gradients: Adam would magnify roundings that are not ours.
OPTIMIZER = optax.sgd(0.125, momentum=0.5)
SCHEDULE = optax.linear_schedule(4.0, 1.0, 10)
ROWS: dict[str, Callable] = {
    "clip_by_value": lambda specs: optaxclip.clip_by_value(1.0),
    "clip_by_value, minimum": lambda specs: optaxclip.clip_by_value(2, min_value=-0.5),
    "clip_by_value, schedule": lambda specs: optaxclip.clip_by_value(SCHEDULE),
    "clip_by_norm": clip(5.0),
    "clip_by_norm, per leaf": clip(2.0, per="leaf"),
    "clip_by_norm, per unit": clip(1.0, per="unit"),
    "clip_by_norm, per group": clip(3.0, per=group),
    "clip_by_norm, stacked": clip(2.0, per="leaf", stacked=is_stacked),
    "clip_by_norm, stacked units": clip(1.0, per="unit", stacked=is_stacked),
    "clip_by_norm, stacked group": clip(3.0, per=group, stacked=is_stacked),
    "clip_by_norm, ord=1": clip(50.0, ord=1),
    "clip_by_norm, ord=3": clip(4.0, ord=3, per="leaf"),
    "clip_by_norm, ord=inf": clip(1.0, ord=float("inf"), per=group),
    "clip_by_norm, limits.schedule": clip(SCHEDULE),
    "clip_by_norm, soft": clip(3.0, respond="soft"),
    "clip_by_norm, set": clip(3.0, respond="set", per="unit"),
    "clip_by_norm, band": clip(3.0, min_norm=limits.quantile(), per="leaf"),
    "clip_by_norm, where": clip(3.0, where=lambda name: name != "hidden"),
    "limits.with_global": clip(limits.with_global(2.0, 3.0), per=group),
    "gradient_stabilizer, limits.mean_over_rms": of(optaxclip.gradient_stabilizer),
    "aggc": of(optaxclip.aggc, 0.5, 1.5, per=group),
    "spam": lambda specs: optaxclip.spam(4.0, warmup=2),
    "stable_adam": of(optaxclip.stable_adam, scale_by_second_moment(), max_rms=1.1),
    "clip_by_historical_norm": of(optaxclip.clip_by_historical_norm, window=4),
    "limits.constant": clip(limits.constant(2.0), per="leaf"),
    "limits.minimum": clip(limits.minimum(limits.quantile(), SCHEDULE), per="leaf"),
    "limits.window_sigma": clip(limits.window_sigma(1.0, window=4)),
    "limits.quantile": clip(limits.quantile(), per=group),
    "limits.log_quantile": clip(limits.log_quantile()),
    "limits.sustained_rise": clip(limits.sustained_rise(1.5, window=4), per="leaf"),
    "limits.above_lowest": clip(limits.above_lowest()),
    "limits.maximum": clip(limits.maximum(1.0, limits.quantile()), per="leaf"),
    "limits.fraction_of_start": clip(limits.fraction_of_start(0.5)),
    "zclip, limits.zscore": of(optaxclip.zclip, 1.0, warmup=2),
    "autoclip, limits.percentile": of(optaxclip.autoclip, per="leaf", window=4),
    "adagc, limits.ema": of(optaxclip.adagc, warmup=2),
    "agc, limits.params": of(optaxclip.agc),
    "agc, unit_axis": of(optaxclip.agc, unit_axis=lambda name: -(name != "hidden")),
    "block_rms, limits.rms": of(optaxclip.block_rms, 0.5),
    "detect_explosions": of(optaxclip.detect_explosions),
    "detect_explosions, stacked": of(optaxclip.detect_explosions, stacked=is_stacked),
    "skip_explosions": of(skip),
    "skip_explosions, rollback": of(skip, rollback=True, snapshot_every=2),
    "stabilize": of(optaxclip.stabilize, OPTIMIZER),
    "record, per leaf": of(optaxclip.record, window=8),
    "record, per group": of(optaxclip.record, per=group, stacked=is_stacked),
    "record, top": of(optaxclip.record, top=2, window=8, stacked=is_stacked),
    "global_norm": keeps(optaxclip.global_norm),
    "leaf_norms": keeps(optaxclip.leaf_norms, stacked=is_stacked),
    "unit_norms": keeps(optaxclip.unit_norms, stacked=is_stacked),
    "group_norms": keeps(optaxclip.group_norms, group),
}
# Run by default: the others share their code with one of these.
# The rows of the cell that is not slow, and those whose metrics are compared in others.
FEW = (
    "agc, limits.params",
    "skip_explosions, rollback",
    "record, per group",
)
QUICK = (
    "clip_by_value, minimum",
    "clip_by_norm, per unit",
    "clip_by_norm, stacked group",
    "clip_by_norm, ord=inf",
    "agc, limits.params",
    "block_rms, limits.rms",
    "stable_adam",
    "skip_explosions, rollback",
    "record, per group",
)

SIZES = [1.0, 1.25, 0.875, 1.125, 64.0, 1.0, 1.0, 0.75, 2.0**100, 2.0**-100]
SIZES += [1.0, 64.0, 64.0, 64.0, 1.125, 0.875]
NAN_STEPS = [6, 12]
SKIPPED_STEPS = [4, 6, 8, 11, 12]


def parameters() -> dict[str, np.ndarray]:
    return {name: x[0, 0] / 4 for name, x in batches().items()}


def batches() -> dict[str, np.ndarray]:
    """`[num_steps, 8, ...]`: eight examples on each step, of few bits each.

    Their mean is then exact in any order, and only the library can make a difference.
    """
    rng = np.random.default_rng(0)
    sizes = np.asarray(SIZES, np.float32)
    examples = {}
    for name, shape in SHAPES.items():
        x = rng.integers(-64, 65, (len(SIZES), 8, *shape)).astype(np.float32) / 16
        examples[name] = x * sizes.reshape(-1, *[1] * (x.ndim - 1))
    examples["out"][NAN_STEPS, 5, 1, 7] = np.nan  # on one device only
    return examples


def gradients_of(params, batch, mesh_axes):
    """Of the mean loss of examples; `mesh_axes`: those of the batch in `shard_map`."""

    # Each leaf has its own term of the loss, so that no device needs those of others.
    def mean_loss(leaf, examples):
        return jnp.mean(jax.vmap(lambda example: jnp.sum(leaf * example))(examples))

    if not mesh_axes:
        return jax.tree.map(jax.grad(mean_loss), params, batch)
    of_any_age: Any = lax
    if hasattr(of_any_age, "pcast"):
        as_varying = functools.partial(of_any_age.pcast, to="varying")
    else:  # of an older JAX
        as_varying = of_any_age.pvary
    params = jax.tree.map(lambda x: as_varying(x, mesh_axes), params)
    return lax.pmean(jax.tree.map(jax.grad(mean_loss), params, batch), mesh_axes)


def train(names, mesh_axes, specs, params, batches):
    """The updates of all steps and the final state, for each row.

    A rollback is of parameters to which the updates are applied; the others get some
    that move in few bits.
    """
    rows = {name: ROWS[name](specs) for name in names}

    def step(carry, given):
        states, trained = carry
        batch, size, now = given
        gradients = gradients_of(params, batch, mesh_axes)
        moved = jax.tree.map(lambda x: x * (1 + now / 16), params)
        found = {
            name: tx.update(
                gradients, states[name], trained.get(name, moved), value=size
            )
            for name, tx in rows.items()
        }
        updates = {name: updates for name, (updates, _) in found.items()}
        states = {name: state for name, (_, state) in found.items()}
        trained = {
            name: optax.apply_updates(x, updates[name]) for name, x in trained.items()
        }
        return (states, trained), updates

    states = {name: tx.init(params) for name, tx in rows.items()}
    trained = {name: params for name in names if "rollback" in name}
    given = batches, jnp.asarray(SIZES), jnp.arange(len(SIZES), dtype=jnp.float32)
    (states, _), updates = lax.scan(step, (states, trained), given)
    return updates, states


def is_like_params(x) -> bool:
    return isinstance(x, dict) and x.keys() == SHAPES.keys()


def is_per_unit(x) -> bool:
    is_plain = type(x) is tuple and len(x) == len(SHAPES)
    return is_plain and all(isinstance(leaf, jax.Array) for leaf in x)


def specs_of(state, specs) -> Any:
    """Replicated; per unit as the units are, and what is like parameters as these."""

    def of_units(norms):
        for norm, (name, spec) in zip(norms, sorted(specs.items()), strict=True):
            shape = SHAPES[name]
            axes = (*spec, None, None, None)[: len(shape)]
            is_last = norm.ndim == 0 or norm.shape[-1] == shape[-1]
            # The first axis is that of the layers of a stacked leaf.
            unit = axes[-1:] if is_last else axes[:1]
            kept = {0: (), 1: unit, 2: axes[:1] + axes[-1:]}
            yield P(*kept[norm.ndim])

    def spec_of(x):
        if is_like_params(x):
            return specs
        return tuple(of_units(x)) if is_per_unit(x) else P()

    return jax.tree.map(
        spec_of, state, is_leaf=lambda x: is_like_params(x) or is_per_unit(x)
    )


@functools.cache
def on_one_device(names):
    device = jax.devices("cpu")[0]
    arguments = jax.device_put((parameters(), batches()), device)
    return jax.jit(functools.partial(train, names, (), None))(*arguments)


def mesh_of(layout, mode):
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    axes = LAYOUTS[layout].mesh
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(kind,) * len(axes),
        devices=jax.devices("cpu")[:8],
    )


def place(mesh, values, specs):
    return jax.device_put(values, shardings_of(mesh, specs))


def shardings_of(mesh, specs):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def train_on_eight(names, layout, mode):
    """Updates and states, the shardings that they should have, and the program."""
    mesh = mesh_of(layout, mode)
    _, batch_axes, specs = LAYOUTS[layout]
    batch_specs = {
        name: P(None, batch_axes or None, *spec) for name, spec in specs.items()
    }
    update_specs = {name: P(None, *spec) for name, spec in specs.items()}
    out_specs = (
        {name: update_specs for name in names},
        {name: specs_of(x, specs) for name, x in on_one_device(names)[1].items()},
    )
    program = functools.partial(train, names, (), None)
    if "shard_map" in mode:
        program = jax.shard_map(
            functools.partial(train, names, batch_axes, specs),
            mesh=mesh,
            in_specs=(specs, batch_specs),
            out_specs=out_specs,
            check_vma="vma" in mode,
        )
    given = place(mesh, parameters(), specs), place(mesh, batches(), batch_specs)
    with jax.set_mesh(mesh):
        compiled = jax.jit(program).lower(*given).compile()
        found = compiled(*given)
    return found, shardings_of(mesh, out_specs), str(compiled.as_text())


def is_detector(x) -> bool:
    return isinstance(x, optaxclip.DetectExplosionsState)


def decoded(x) -> Any:
    """With its `events`, which hold floats as the bits of integers, read."""
    return x._replace(events=event_of(np.asarray(x.events))) if is_detector(x) else x


def assert_same(found, expected):
    """Integers exactly, floats to a few roundings."""
    found, expected = (
        jax.tree.leaves_with_path(jax.tree.map(decoded, x, is_leaf=is_detector))
        for x in (found, expected)
    )
    for (path, x), (_, y) in zip(found, expected, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        name = jax.tree_util.keystr(path)
        rtol, atol = (1e-6, 0) if np.issubdtype(x.dtype, np.floating) else (0, 0)
        if "rule_states" in name or "limit_state" in name:
            atol = 0.3 * rtol  # differences of logarithms, each rounded to 1.2e-7
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=name)


def assert_placed(found, shardings, mode):
    """Sharded as it should be; devices that hold the same part hold the same bits."""
    found = jax.tree.leaves_with_path(found)
    for (path, x), sharding in zip(found, jax.tree.leaves(shardings), strict=True):
        name = jax.tree_util.keystr(path)
        # A constant limit of units has no sharding to propagate: XLA replicates it.
        is_free = mode == "auto" and ".limit[" in name and x.is_fully_replicated
        assert is_free or x.sharding.is_equivalent_to(sharding, x.ndim), name
        parts = {}
        for shard in x.addressable_shards:
            bits = np.asarray(shard.data).tobytes()
            assert parts.setdefault(str(shard.index), bits) == bits, name


def all_metrics(states, params):
    return {
        name: optaxclip.metrics(state, params)
        for name, state in states.items()
        if name in QUICK
    }


def cells() -> list[Any]:
    slow = [
        pytest.param(layout, mode, tuple(ROWS), marks=pytest.mark.slow)
        for layout in LAYOUTS
        for mode in MODES
    ]
    return [
        pytest.param("mixed", "shard_map, vma", FEW, id="mixed-shard_map-vma-few"),
        *slow,
    ]


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize(("layout", "mode", "names"), cells())
def test_eight_devices_do_what_one_does(layout, mode, names, subtests):
    expected = on_one_device(names)
    (updates, states), shardings, program = train_on_eight(names, layout, mode)
    for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert other not in program
    for name in names:
        with subtests.test(name):
            assert_placed(updates[name], shardings[0][name], mode)
            assert_placed(states[name], shardings[1][name], mode)
            assert_same(updates[name], expected[0][name])
            assert_same(states[name], expected[1][name])
            if name.startswith(("skip", "stabilize")):
                for x in updates[name].values():
                    assert not np.any(np.asarray(x)[SKIPPED_STEPS])
            if "rollback" in name:
                told = optaxclip.metrics(jax.device_get(states[name]))
                assert told["explosions/num_rollbacks"] == 1
                assert 0 < told["explosions/scale"] < 1
    with subtests.test("metrics"):
        mesh, specs = mesh_of(layout, mode), LAYOUTS[layout].specs
        with jax.set_mesh(mesh):
            params = place(mesh, parameters(), specs)
            found = jax.jit(all_metrics)(states, params)
        assert_same(found, metrics_on_one_device(names))


@functools.cache
def metrics_on_one_device(names):
    return jax.jit(all_metrics)(on_one_device(names)[1], parameters())


# All-reduces of a healthy step under "data", "tensor", "fsdp" and "mixed". One for each
# set of axes of the mesh over which leaves are sharded: none, one, one, and three. More
# are twice as many where there are two norms (`ord=3`: first of the largest element;
# `skip_explosions`: of what the rules see, and of what the clip inside it sees), and,
# where the units themselves are sharded, one more for each norm to agree on the rescue.
ALL_REDUCES = dict.fromkeys(ROWS, (0, 1, 1, 3)) | {
    "clip_by_value": (0, 0, 0, 0),
    "clip_by_value, minimum": (0, 0, 0, 0),
    "clip_by_value, schedule": (0, 0, 0, 0),
    "clip_by_norm, ord=3": (0, 2, 2, 6),
    "clip_by_norm, per unit": (0, 2, 1, 3),
    "clip_by_norm, set": (0, 2, 1, 3),
    "spam": (0, 0, 0, 0),
    "clip_by_norm, stacked units": (0, 2, 1, 3),
    "unit_norms": (0, 2, 1, 3),
    "agc, limits.params": (0, 3, 1, 4),
    "agc, unit_axis": (0, 3, 3, 4),
    "skip_explosions": (0, 2, 2, 6),
    "skip_explosions, rollback": (0, 2, 2, 6),
}
# Under jit XLA reduces a leaf that is sharded along two axes over one mesh axis after
# the other, which that of JAX 0.10 does not merge with others over the same axis.
OF_XLA = {0: 0, 3: 5, 4: 7, 6: 10}


def all_reduces(program) -> int:
    """Of a healthy step: those outside of the rescue, which is a loop's body."""
    bodies = re.findall(r"body=%?([\w.-]+)", program)
    computations = re.split(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", program, flags=re.M)
    return sum(
        len(re.findall(r" all-reduce(?:-start)?\(", text))
        for name, text in zip(computations[1::2], computations[2::2], strict=True)
        if name not in bodies
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_reduces_of_a_healthy_step(layout, mode, subtests):
    mesh, specs = mesh_of(layout, mode), LAYOUTS[layout].specs
    params = place(mesh, parameters(), specs)
    grads = place(mesh, {name: x[0, 1] for name, x in batches().items()}, specs)
    is_manual = "shard_map" in mode

    def program_of(name):
        tx = ROWS[name](specs if is_manual else None)
        state = jax.jit(ROWS[name](None).init)(parameters())
        state_specs = specs_of(state, specs)

        def update(grads, state, params):
            return tx.update(grads, state, params, value=jnp.float32(1))

        if is_manual:
            update = jax.shard_map(
                update,
                mesh=mesh,
                in_specs=(specs, state_specs, specs),
                out_specs=(specs, state_specs),
                check_vma=False,
            )
        arguments = grads, place(mesh, state, state_specs), params
        return str(jax.jit(update).lower(*arguments).compile().as_text())

    for name in ROWS:
        with subtests.test(name), jax.set_mesh(mesh):
            program = program_of(name)
            expected = ALL_REDUCES[name][list(LAYOUTS).index(layout)]
            if layout == "mixed" and not is_manual:
                assert expected <= all_reduces(program) <= OF_XLA[expected]
            else:
                assert all_reduces(program) == expected
            assert "all-gather" not in program


# Layers and experts, `[layers, experts, in, out]`, with the experts on eight devices.
EXPERTS = {"bias": (8,), "experts": (3, 8, 4, 6)}
EXPERT_SPECS = {"bias": P(), "experts": P(None, "x")}
STACKED_ROWS: dict[str, Any] = {
    "clip_by_norm, per leaf": functools.partial(
        optaxclip.clip_by_norm, 2.0, per="leaf"
    ),
    "clip_by_norm, per group": functools.partial(
        optaxclip.clip_by_norm, 9.0, per=lambda name: name[:9]
    ),
    "clip_by_norm, set": functools.partial(
        optaxclip.clip_by_norm, 2.0, respond="set", per="leaf", ord=3
    ),
    "clip_by_norm, limits.with_global": functools.partial(
        optaxclip.clip_by_norm, limits.with_global(4.0, 6.0), per="leaf"
    ),
    "clip_by_spectral_norm": functools.partial(optaxclip.clip_by_spectral_norm, 2.0),
    "clip_by_spectral_norm, smooth": functools.partial(
        optaxclip.clip_by_spectral_norm, 2.0, smooth=True
    ),
    "agc": optaxclip.agc,
    "block_rms": functools.partial(optaxclip.block_rms, 0.5),
    "detect_explosions": optaxclip.detect_explosions,
    "record, top": functools.partial(optaxclip.record, top=2, window=8),
}


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize(
    ("mode", "names"),
    [
        pytest.param("explicit", ("record, top",), id="explicit-few"),
        pytest.param("explicit", tuple(STACKED_ROWS), marks=pytest.mark.slow),
        pytest.param("auto", tuple(STACKED_ROWS), marks=pytest.mark.slow),
    ],
)
def test_experts_on_eight_devices(mode, names, subtests):
    rng = np.random.default_rng(0)
    updates = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in EXPERTS.items()
    }
    rows = {
        name: STACKED_ROWS[name](stacked=lambda leaf: 2 if leaf == "experts" else 0)
        for name in names
    }

    def init(params):
        return {name: tx.init(params) for name, tx in rows.items()}

    def step(updates, states):
        return {
            name: tx.update(updates, states[name], updates) for name, tx in rows.items()
        }

    expected = jax.jit(step)(updates, init(updates))
    mesh = mesh_of("data", mode)
    with jax.set_mesh(mesh):
        given = place(mesh, updates, EXPERT_SPECS)
        # Not in the program of the step, where old versions of JAX confuse meshes.
        states = jax.jit(init)(given)
        compiled = jax.jit(step).lower(given, states).compile()
        found = compiled(given, states)
    shardings = shardings_of(mesh, EXPERT_SPECS)
    for name in rows:
        with subtests.test(name):
            if mode == "explicit":
                assert_placed(found[name][0], shardings, mode)
            rtol = 1e-4 if "spectral" in name else 1e-6
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=rtol, atol=rtol),
                found[name],
                expected[name],
            )
    # What travels is numbers, one for each expert; no matrices.
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", str(compiled.as_text()))
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in gathered]
    assert sizes
    assert max(sizes) <= 3 * 8 * 6


def test_every_transformation_and_every_limit_has_a_row():
    words = set(re.findall(r"[\w.]+", " ".join(ROWS)))
    # Products of sharded matrices gather them: see `test_spectral.py`. The other one
    # measures nothing.
    words |= {"clip_by_spectral_norm", "scale_params"}
    returned = ("GradientTransformationExtraArgs", "Limit")
    for prefix, module in {"": optaxclip, "limits.": limits}.items():
        for name, function in inspect.getmembers(module, inspect.isfunction):
            annotation = str(inspect.signature(function).return_annotation)
            if any(x in annotation for x in returned) and name != "as_limit":
                assert prefix + name in words
    assert {"global_norm", "leaf_norms", "unit_norms", "group_norms"} <= words
    assert ROWS.keys() >= set(QUICK) >= set(FEW)
