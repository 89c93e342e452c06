"""What clipping adds to a compiled Adam step on CPU: nothing that has to be timed.

XLA compiles for the shapes of a small GPT-2 alone; no array of that size is made.
"""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import optaxclip
from conftest import stores_no_squares
from optaxclip import limits

pytestmark = [
    pytest.mark.skipif(
        jax.default_backend() != "cpu",
        reason="the bounds are those of XLA's CPU compiler",
    ),
    # What is counted is what XLA makes, before LLVM compiles it.
    pytest.mark.usefixtures("quick_by_default"),
]

CLIPS = {
    "none": optax.identity(),
    "norm": optaxclip.clip_by_norm(1.0),
    "soft": optaxclip.clip_by_norm(1.0, respond="soft"),
    "set": optaxclip.clip_by_norm(1.0, respond="set"),
    "band": optaxclip.clip_by_norm(1.0, min_norm=0.5),
    "leaf": optaxclip.clip_by_norm(1.0, per="leaf"),
    "global": optaxclip.clip_by_norm(limits.with_global(1.0, 5.0), per="leaf"),
    "value": optaxclip.clip_by_value(1.0),
    "zclip": optaxclip.zclip(),
    "autoclip": optaxclip.autoclip(),
    "adagc": optaxclip.adagc(),
    "gradient_stabilizer": optaxclip.gradient_stabilizer(),
    "aggc": optaxclip.aggc(0.5, 2.0),
    "clip_by_historical_norm": optaxclip.clip_by_historical_norm(),
    "spam": optaxclip.spam(),
    "spectral": optaxclip.clip_by_spectral_norm(1.0),
    # Around and behind Adam, not in front of it.
    "stable_adam": optax.identity(),
    "scale_params": optax.identity(),
    "record": optax.chain(optaxclip.record(), optaxclip.clip_by_norm(1.0)),
}


class Cost(NamedTuple):
    hlo: str
    temporaries: float
    """In units of the gradients, as are the next two."""
    accessed: float
    aliased: float


def make_shapes(
    num_layers: int = 2, width: int = 512, vocabulary: int = 8192
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"wte": (vocabulary, width)}
    for i in range(num_layers):
        shapes[f"h{i}/ln"] = (width,)
        shapes[f"h{i}/attention"] = (width, 3 * width)
        shapes[f"h{i}/projection"] = (width, width)
        shapes[f"h{i}/mlp_in"] = (width, 4 * width)
        shapes[f"h{i}/mlp_out"] = (4 * width, width)
    return shapes


@functools.cache
def cost(clip_name: str, gradient_dtype: Any = jnp.float32, **sizes: int) -> Cost:
    clip, adam = CLIPS[clip_name], optax.adam(1e-3)
    if clip_name == "stable_adam":
        adam = optaxclip.stable_adam(adam)
    if clip_name == "scale_params":
        adam = optax.chain(adam, optaxclip.scale_params())
    adam = optax.with_extra_args_support(adam)
    shapes = make_shapes(**sizes)

    def like(dtype):
        return {n: jax.ShapeDtypeStruct(shape, dtype) for n, shape in shapes.items()}

    def step(params, adam_state, gradients, clip_state, factors):
        updates, clip_state = clip.update(gradients, clip_state, params)
        updates, adam_state = adam.update(updates, adam_state, params, factors=factors)
        return optax.apply_updates(params, updates), adam_state, clip_state

    params, gradients = like(jnp.float32), like(gradient_dtype)
    states = [jax.eval_shape(init, params) for init in (adam.init, clip.init)]
    step = jax.jit(step, donate_argnums=(0, 1))
    factors = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in shapes}
    compiled = step.lower(params, states[0], gradients, states[1], factors).compile()
    memory, analysis = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None
    assert analysis is not None
    num_bytes = sum(x.size * x.dtype.itemsize for x in gradients.values())
    return Cost(
        compiled.as_text() or "",
        memory.temp_size_in_bytes / num_bytes,
        analysis["bytes accessed"] / num_bytes,
        memory.alias_size_in_bytes / num_bytes,
    )


def num_elements(shape: str) -> int:
    """Of a shape as HLO writes it, `f32[512,1536]`; the sum of a tuple's."""
    return sum(
        math.prod(int(n) for n in dims.split(",") if n)
        for dims in re.findall(r"\w+\[([\d,]*)\]", shape)
    )


def num_in_loops(op: str, hlo: str) -> int:
    """How often an operation stands in a fused loop over the elements of an array."""
    count = 0
    for computation in hlo.split("\n\n"):
        root = re.search(r"ROOT %\S+ = (.*?) [\w-]+\(", computation)
        if "fused" in computation[:20] and root and num_elements(root[1]) > 1:
            count += len(re.findall(rf" {op}\(", computation))
    return count


@stores_no_squares
def test_norm_keeps_no_copy_of_the_gradients():
    # What is left, below 0.1 %, holds partial sums of the vectors (`reduce-window`).
    # If the leaves shared one scale in the rescue, XLA would store it once for every
    # shape, as an array of that shape: 6 % for a GPT-2 of 12 layers.
    # optax.clip_by_global_norm needs 100 %.
    assert cost("norm").temporaries - cost("none").temporaries < 0.01


@stores_no_squares
def test_norm_reads_the_gradients_once():
    # XLA counts the body of a loop once, whether or not it runs: the second reading
    # here is the rescue, which healthy steps skip. There is no third one, and nothing
    # is written: Adam scales the gradients as it reads them.
    added = cost("norm").accessed - cost("none").accessed
    assert 1.99 < added < 2.01


@stores_no_squares
@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("soft", "norm"),
        *(pytest.param(x, "norm", marks=pytest.mark.slow) for x in ("set", "band")),
        pytest.param("global", "leaf", marks=pytest.mark.slow),
        pytest.param("gradient_stabilizer", "leaf", marks=pytest.mark.slow),
        pytest.param("aggc", "leaf", marks=pytest.mark.slow),
        pytest.param("clip_by_historical_norm", "norm", marks=pytest.mark.slow),
    ],
)
def test_a_response_or_a_method_costs_what_a_cap_does(name, like):
    found, cap = cost(name), cost(like)
    assert abs(found.accessed - cap.accessed) < 1e-3
    assert abs(found.temporaries - cap.temporaries) < 1e-3
    # Limits per leaf, and those that learn, are themselves made in such loops.
    if name in ("soft", "set", "band"):
        for op in ("divide", "select", "compare"):
            assert num_in_loops(op, found.hlo) == num_in_loops(op, cap.hlo)


@pytest.mark.slow
def test_spam_costs_its_state_and_stores_nothing():
    # Its state is as large as the gradients, and is read and written; what else there
    # is, the loops of Adam read again.
    spam, none = cost("spam"), cost("none")
    assert spam.accessed - none.accessed < 5.01
    assert spam.temporaries - none.temporaries < 0.001


@stores_no_squares
@pytest.mark.slow
def test_stable_adam_stores_the_updates_that_it_scales():
    # The norm is known only once Adam has its second moments: the updates wait for it.
    stable, none = cost("stable_adam"), cost("none")
    assert stable.accessed - none.accessed < 5.01
    assert stable.temporaries - none.temporaries < 1.01
    assert stable.aliased == pytest.approx(none.aliased, abs=1e-3)


def test_scaled_parameters_cost_nothing():
    # Besides the factors, which are numbers, nothing is read: where Adam's update is
    # made, the parameter is at hand.
    scaled, none = cost("scale_params"), cost("none")
    assert scaled.accessed - none.accessed < 0.001
    assert scaled.temporaries - none.temporaries < 0.001


@pytest.mark.slow
def test_the_spectral_clip_stores_a_few_matrices():
    # Those of its iteration, one leaf after the other: not all at once. How often they
    # are read depends on the matrix; `tests/benchmarks/spectral.py` times that.
    spectral, none = cost("spectral"), cost("none")
    assert spectral.temporaries - none.temporaries < 4


def test_norm_of_many_leaves_is_not_one_chain_of_additions():
    # XLA takes time cubic in the length of such a chain to fuse it.
    leaves = [jax.ShapeDtypeStruct((8, 8), jnp.float32)] * 150
    hlo = jax.jit(optaxclip.global_norm).lower(leaves).compile().as_text() or ""
    num_added = [part.count(" add(") for part in hlo.split("\n\n")]
    assert len(num_added) > 10
    assert max(num_added) < 50


def test_norm_copies_no_gradient():
    copied = re.findall(r" = (\S+) copy(?:-start)?\(", cost("norm").hlo)
    assert all(num_elements(shape) <= 1 for shape in copied)


def test_norm_branches_once_for_all_leaves():
    hlo = cost("norm").hlo
    assert len(re.findall(r" while\(", hlo)) == 1
    assert len(re.findall(r" conditional\(", hlo)) == 0


@pytest.mark.parametrize("op", ["divide", "select", "compare"])
def test_norm_leaves_only_products_to_the_loops_over_elements(op: str):
    clipped, bare = (num_in_loops(op, cost(name).hlo) for name in ("norm", "none"))
    assert clipped == bare
    assert num_in_loops("divide", cost("none").hlo) > 0  # so that the count counts


@stores_no_squares
def test_bfloat16_gradients_are_not_kept_in_float32():
    # At most the clipped gradients, in bfloat16: both of Adam's moments read them.
    # Were their float32 values kept too, it would be 2 and more.
    norm, none = (cost(name, jnp.bfloat16) for name in ("norm", "none"))
    assert norm.temporaries - none.temporaries < 1.01
    # Two readings, as above; the clipped ones are written once and read twice, where
    # the bare step reads the gradients twice: another reading and a writing.
    assert norm.accessed - none.accessed < 4.1


@stores_no_squares
def test_a_recorder_reads_nothing_that_the_clip_does_not_read():
    # It shares the first reading with the clip; it has a rescue of its own, which
    # healthy steps skip. Its window, which this step does not donate, is read and
    # written as a whole, and one row of it.
    clip, both = cost("norm"), cost("record")
    shapes = make_shapes()
    num_elements = sum(math.prod(shape) for shape in shapes.values())
    window = 256 * (6 + len(shapes)) / num_elements
    assert both.accessed - clip.accessed < 1 + 3 * window < 1.002
    assert both.temporaries - clip.temporaries < 0.001
    assert len(re.findall(r" while\(", both.hlo)) == 2


def test_a_recorder_of_the_largest_norms_does_not_sort_them_all():
    params = {"experts": jax.ShapeDtypeStruct((48, 384, 8, 8), jnp.float32)}
    tx = optaxclip.record(top=10, stacked=lambda name: 2)
    state = jax.eval_shape(tx.init, params)
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) < 28e3
    hlo = jax.jit(tx.update).lower(params, state).compile().as_text() or ""
    assert " sort(" not in hlo


@pytest.mark.slow
def test_learned_limits_read_what_a_fixed_one_reads():
    # At 53 million parameters the windows of AutoClip are 0.01 % of the gradients. One
    # test for all, since each process that runs a part would compile the fixed one.
    sizes = {"num_layers": 12, "vocabulary": 28672}
    fixed = cost("norm", **sizes)
    for clip_name in ("zclip", "autoclip", "adagc"):
        learned = cost(clip_name, **sizes)
        assert learned.accessed == pytest.approx(fixed.accessed, abs=1e-3), clip_name
        assert learned.temporaries < 1e-3, clip_name
        assert learned.aliased == pytest.approx(fixed.aliased), clip_name


def test_value_costs_no_memory_and_no_reading():
    value, none = cost("value"), cost("none")
    assert value.temporaries == none.temporaries
    assert value.accessed == pytest.approx(none.accessed, abs=1e-3)
    assert " while(" not in value.hlo


@pytest.mark.parametrize("clip_name", ["norm", "value"])
def test_parameters_and_adam_state_stay_in_place(clip_name: str):
    aliased = cost(clip_name).aliased
    assert aliased == pytest.approx(cost("none").aliased)
    assert aliased == pytest.approx(3, abs=1e-3)


def test_the_state_is_a_few_scalars():
    params = {n: jnp.zeros([2]) for n in make_shapes()}
    state = CLIPS["norm"].init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) <= 8
    assert not jax.tree.leaves(CLIPS["value"].init(params))


def compile_stabilize(shapes, *, rollback: bool) -> Any:
    """A step of Adam under `stabilize`, which reuses what it is given."""
    tx = optaxclip.stabilize(optax.adam(1e-3), rollback=rollback)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params, value=jnp.float32(1))
        return optax.apply_updates(params, updates), state

    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()
    }
    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


@stores_no_squares
def test_stabilize_stores_nothing_for_every_element():
    """Nor in the loops that seldom run.

    XLA stores an array of a number that is multiplied with each element of two leaves.
    """
    shapes = make_shapes(2)
    compiled = compile_stabilize(shapes, rollback=True)
    size = sum(math.prod(shape) for shape in shapes.values())
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * 4 * size


def test_stabilize_decides_once_for_all_elements():
    """Each leaf tests a flag in each of its three loops, and that it is finite.

    Those of its two moments also test whether they are to be mended.
    """

    def hlo_of(num_layers):
        shapes = make_shapes(num_layers, width=64, vocabulary=128)
        return compile_stabilize(shapes, rollback=False).as_text() or ""

    one, two = hlo_of(1), hlo_of(2)
    for op, num_in_leaf in [("compare", 5), ("and", 0), ("select", 8)]:
        assert num_in_loops(op, two) - num_in_loops(op, one) == 5 * num_in_leaf
