"""A step and its compilation grow with a model as those of bare Optax do.

    python tests/benchmarks/scaling.py --sweep leaves
    python tests/benchmarks/scaling.py --sweep parameters
    python tests/benchmarks/scaling.py --sweep paper

The first two time them; the third counts what a model of 70 billion parameters on 512
devices would pay.
"""

import datetime
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optaxclip
from overhead import Slot, alternating, ratio, swapped

# Each clip alone, and what wraps Adam, made for a `stacked=`. Those of the same run
# that they are compared with are the first of both.
CLIPS: dict[str, Callable[[Any], Any]] = {
    "optax.clip_by_global_norm": lambda _: optax.clip_by_global_norm(1.0),
    "clip_by_norm": lambda stacked: optaxclip.clip_by_norm(1.0, stacked=stacked),
    "record, clip_by_norm": lambda stacked: optax.chain(
        optaxclip.record(stacked=stacked), optaxclip.clip_by_norm(1.0, stacked=stacked)
    ),
}
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "optax.adam": lambda _: optax.adam(1e-3),
    "apply_if_finite(clip, adam)": lambda _: optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), 5
    ),
    "stabilize, no rollback": lambda stacked: optaxclip.stabilize(
        optax.adam(1e-3), rollback=False, stacked=stacked
    ),
    "stabilize": lambda stacked: optaxclip.stabilize(optax.adam(1e-3), stacked=stacked),
}
ARMS = CLIPS | WRAPPERS
PEERS = ("optax.clip_by_global_norm", "optax.adam")

SIZES = {
    "leaves": (10, 30, 100, 300, 1000, 3000, 10_000),
    "parameters": (10**4, 10**5, 10**6, 10**7, 10**8, 2 * 10**8),
}


def make_arm(name: str, stacked: Any = None) -> tuple[Callable, Callable]:
    """Gives `params -> rest` and `(carry, rest, gradients) -> (carry, rest)`.

    The carry is what a step writes to: the updates of a clip, and of the others
    `(params, adam_state)`, for which the rest of their state has a `Slot`.
    """
    tx = optax.with_extra_args_support(ARMS[name](stacked))

    def init(params):
        state = tx.init(params)
        is_clip = name in CLIPS
        return state if is_clip else swapped(state, optax.ScaleByAdamState, Slot())[0]

    def clip(updates, state, gradients):
        del updates
        return tx.update(gradients, state)

    def step(carry, rest, gradients):
        params, adam_state = carry
        state, _ = swapped(rest, Slot, adam_state)
        updates, state = tx.update(gradients, state, params, value=jnp.float32(1))
        rest, adam_state = swapped(state, optax.ScaleByAdamState, Slot())
        return (optax.apply_updates(params, updates), adam_state), rest

    return init, clip if name in CLIPS else step


def measure(
    num_leaves: int, num_parameters: int, names: list[str], repetitions: int
) -> dict[str, tuple[float, float, list[float]]]:
    """Seconds to trace and lower each arm, to compile it, and of each timed step.

    All arms hand one set of parameters, gradients and Adam states to one another.
    "Again" is a peer against itself.
    """
    shape = (num_parameters // num_leaves,)
    params = {f"leaf_{i:05}": jnp.zeros(shape) for i in range(num_leaves)}
    normal = jax.jit(jax.random.normal, static_argnums=1)
    keys = jax.random.split(jax.random.key(0), num_leaves)
    gradients = {x: normal(key, shape) for x, key in zip(params, keys, strict=True)}
    state: Any = optax.adam(1e-3).init(params)
    # Of Adam and of a clip, whose gradients are not donated: where record and clip read
    # donated arguments XLA copies them, but not gradients that the step computes.
    carries = {False: (params, state[0]), True: jax.tree.map(jnp.copy, params)}

    compiled, rests, seconds = {}, {}, {}
    for name in names:
        init, step = make_arm(name)
        rests[name] = init(params)
        arrays = carries[name in CLIPS], rests[name], gradients
        jax.clear_caches()
        start = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=(0, 1), keep_unused=True)
        lowered = jitted.lower(*arrays)
        middle = time.perf_counter()
        compiled[name] = lowered.compile()
        seconds[name] = middle - start, time.perf_counter() - middle
        del arrays, lowered, jitted
    del params, state

    def run(name: str, calls: int = 1) -> float:
        name = name.removesuffix(" again")
        is_clip = name in CLIPS
        start = time.perf_counter()
        for _ in range(calls):
            arrays = carries[is_clip], rests[name]
            carries[is_clip], rests[name] = compiled[name](*arrays, gradients)
            jax.block_until_ready((carries[is_clip], rests[name]))
        return (time.perf_counter() - start) / calls

    names = [*names, *(f"{name} again" for name in names if name in PEERS)]
    fastest = min((run(name), run(name))[1] for name in names)  # each warms up
    calls = max(1, int(0.02 / fastest))  # a small step alone is too short to be timed
    times: dict[str, list[float]] = {name: [] for name in names}
    for order in alternating(names, repetitions):
        for name in order:
            times[name].append(run(name, calls))
    unknown = math.nan, math.nan
    return {name: (*seconds.get(name, unknown), times[name]) for name in names}


def exponent(sizes: Any, times: Any) -> float:
    """The slope of a line fitted to the logarithms; NaN for a single point."""
    if len(sizes) < 2:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def sweep_over(
    kind: Literal["leaves", "parameters"],
    sizes: tuple[int, ...],
    names: list[str],
    repetitions: int,
    max_compile_seconds: float,
) -> None:
    """Prints a row for each size and arm, and the exponents of each arm."""
    print("| size | arm | trace, s | compile, s | / peer | step, ms | / peer |")
    print("|---|---|---|---|---|---|---|", flush=True)
    done: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for size in sizes:
        kept = []
        for name in names:
            last = np.array(done[name][-2:])
            wait = 0.0
            if len(last) == 2:
                slope = exponent(last[:, 0], last[:, 2])
                wait = last[1, 2] * (size / last[1, 0]) ** slope
            if wait <= max_compile_seconds:
                kept.append(name)
            else:
                print(f"| {size} | {name} | | about {wait:.0f}: left out | | | |")
        if not kept:
            break
        counts = (size, 2**20) if kind == "leaves" else (50, size)
        found = measure(*counts, kept, repetitions)
        times = {name: steps for name, (_, _, steps) in found.items()}
        for name, (trace, compilation, steps) in found.items():
            peer = PEERS[name.removesuffix(" again") not in CLIPS]
            beside = beside_compiled = math.nan
            if peer in found:
                beside_compiled = compilation / found[peer][1]
                beside = ratio(times, name, peer)
            step = statistics.median(steps)
            if name in done:
                done[name].append((size, trace, compilation, step))
            row = f"| {size} | {name} | {trace:.2f} | {compilation:.2f} | "
            row += f"{beside_compiled:.2f} | {1e3 * step:.3g} | {beside:.2f} |"
            print(row.replace("nan", ""), flush=True)
    print(
        f"\nExponents in the number of {kind}: over all sizes, over the last three.\n"
    )
    print("| arm | up to | trace | compile | step |\n|---|---|---|---|---|")
    for name, rows in done.items():
        measured = np.array(rows)
        cells = [
            ", ".join(
                f"{exponent(x[:, 0], x[:, i]):.2f}" for x in (measured, measured[-3:])
            )
            for i in (1, 2, 3)
        ]
        print(f"| {name} | {measured[-1, 0]:.0f} | {' | '.join(cells)} |")


def llama(
    num_layers: int, width: int, mlp: int, vocabulary: int, is_stacked: bool
) -> dict[str, tuple[int, ...]]:
    """The shapes of a Llama with an eighth as many heads for keys and values."""
    layer: dict[str, tuple[int, ...]]
    layer = {name: (width, width) for name in ("query", "output")}
    layer |= {name: (width, width // 8) for name in ("key", "value")}
    layer |= {"gate": (width, mlp), "up": (width, mlp), "down": (mlp, width)}
    layer |= {name: (width,) for name in ("attention_norm", "mlp_norm")}
    shapes: dict[str, tuple[int, ...]] = {"norm": (width,)}
    shapes |= {"embedding": (vocabulary, width), "head": (width, vocabulary)}
    for name, shape in layer.items():
        if is_stacked:
            shapes[f"layers/{name}"] = (num_layers, *shape)
        else:
            shapes |= {f"layer_{i}/{name}": shape for i in range(num_layers)}
    return shapes


def is_of_layers(name: str) -> bool:
    """Whether the axis 0 of a leaf runs over layers."""
    return name.startswith("layers/")


def compile_and_count(
    name: str, num_layers: int, is_stacked: bool
) -> tuple[float, int]:
    """The `count_traffic` of a small Llama of which 8 CPU devices have a share each."""
    shapes = llama(num_layers, 64, 224, 1024, is_stacked)
    mesh = jax.make_mesh(
        (8,), ("devices",), (AxisType.Auto,), devices=jax.devices("cpu")
    )

    def sharded(shape, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    params = {
        leaf: sharded(shape, *[None] * is_of_layers(leaf), "devices")
        for leaf, shape in shapes.items()
    }
    init, step = make_arm(name, is_of_layers if is_stacked else None)
    adam_state: Any = jax.ShapeDtypeStruct([], jnp.int32), params, params
    carry = params, optax.ScaleByAdamState(*adam_state)
    # The snapshots are sharded as what they are copies of.
    like = {shapes[leaf]: x for leaf, x in params.items()}
    rest = jax.tree.map(lambda x: like.get(x.shape, x), jax.eval_shape(init, params))
    arrays = params if name in CLIPS else carry, rest, params
    jitted = jax.jit(step, donate_argnums=(0, 1), keep_unused=True)
    text = jitted.lower(*arrays).compile().as_text() or ""
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(params)]
    num_arrays = len(jax.tree.leaves(arrays))
    return count_traffic(text, dict(enumerate(sizes, num_arrays - len(sizes))))


def count_traffic(text: str, gradients: dict[int, int]) -> tuple[float, int]:
    """How often a program reads its gradients, and how many bytes it all-reduces.

    Both outside of loops, which have no turn on a healthy step.

    Args:
        text: The program.
        gradients: The number of elements of each parameter that is a gradient.
    """
    entry = text[text.index("\nENTRY") :]
    reduced = 0
    for shapes in re.findall(r" = (.*) all-reduce(?:-start)?\(", entry):
        for bits, dims in re.findall(r"[a-z](\d*)\[([\d,]*)\]", shapes):
            size = math.prod(int(n) for n in dims.split(",") if n)
            reduced += size * (int(bits) // 8 if bits else 1)
    reads = 0
    sizes: dict[str, int] = {}
    for name, operation, operands in re.findall(
        r"^ +(?:ROOT )?%?([\w.-]+) = .*? ([a-z][\w-]*)\((.*?)\)", entry, re.MULTILINE
    ):
        if operation == "parameter":
            sizes[name] = gradients.get(int(operands), 0)
        elif operation != "tuple":  # of what a loop may read
            read = sum(sizes.get(x, 0) for x in re.findall(r"%([\w.-]+)", operands))
            assert not (read and operation in ("copy", "bitcast", "while"))
            reads += read
    return reads / sum(gradients.values()), reduced


def count_on_paper(num_layers: int = 80, num_devices: int = 512) -> None:
    """Prints what each arm reads, sends and keeps of a model with 70B parameters."""
    print("Bytes of one device and step. State: a copy on each, and its share of the")
    print(
        "rest. A step whose sum of squares is not safe reads and reduces once more.\n"
    )
    print("| leaves | arm | reads of gradients | all-reduce | state | sharded state |")
    print("|---|---|---|---|---|---|")
    size = share = 0
    for is_stacked in (False, True):
        shapes = llama(num_layers, 8192, 28672, 128256, is_stacked)
        params = {x: jax.ShapeDtypeStruct(y, jnp.float32) for x, y in shapes.items()}
        size = 4 * sum(math.prod(shape) for shape in shapes.values())
        share = size / num_devices / 1e6
        for name in ARMS:
            if name.startswith("apply_if_finite"):
                continue  # it reads inside of a branch
            tx = ARMS[name](is_of_layers if is_stacked else None)
            kept = {True: 0, False: 0}
            for x in jax.tree.leaves(jax.eval_shape(tx.init, params)):
                kept[x.shape in shapes.values()] += x.size * x.dtype.itemsize
            # More layers are reduced in proportion.
            (_, few), (reads, more) = (
                compile_and_count(name, n, is_stacked) for n in (2, 4)
            )
            reduced = more + (more - few) * (num_layers - 4) / 2
            print(
                f"| {len(shapes)} | {name} | {reads:.2f} x {share:.0f} MB | "
                f"{reduced:.0f} B | {kept[False] / 1e3:.3g} kB | "
                f"{kept[True] / num_devices / 1e6:.0f} MB |",
                flush=True,
            )
    memory, network = 3e12, 5e10
    print(
        f"\nThe gradients of {size / 4e9:.4g} billion float32 parameters are "
        f"{size / 1e9:.3g} GB; their reduce-scatter over {num_devices} devices sends "
        f"all but a share of {share:.0f} MB from each. If a device sends "
        f"{network / 1e9:.0f} GB/s and reads {memory / 1e12:.0f} TB/s (assumed, not "
        f"measured), that takes {size * (1 - 1 / num_devices) / network:.3g} s, and "
        f"one read of its share {1e9 * share / memory:.2g} ms."
    )


def main(
    *,
    sweep: Literal["leaves", "parameters", "paper"] = "leaves",
    sizes: tuple[int, ...] = (),
    arms: tuple[str, ...] = (),
    repetitions: int = 10,
    max_compile_seconds: float = 120,
) -> None:
    """Prints what a step and its compilation cost as a model grows.

    Args:
        sweep: Over 2**20 parameters in more and more leaves, or more and more
            parameters in 50 leaves; or count on paper.
        sizes: Those of the sweep; by default 10 to 10,000 leaves, or 1e4 to 2e8
            parameters, for which it takes 12 GB of memory.
        arms: Parts of the names of what is timed beside the two peers; by default all.
        repetitions: Rounds that time every arm once.
        max_compile_seconds: An arm is left out where its compilation would take longer
            if it went on to grow as it did between the last two sizes.
    """
    if sweep == "paper":
        jax.config.update("jax_num_cpu_devices", 8)
    device = jax.devices()[0]
    print(
        f"JAX {jax.__version__} and Optax {optax.__version__} on {device.platform} "
        f"({device.device_kind}), {os.cpu_count()} cores, {datetime.date.today()}.\n"
    )
    if sweep == "paper":
        return count_on_paper()
    names = [x for x in ARMS if x in PEERS or any(arm in x for arm in arms or [""])]
    measure(2, 2, names, 1)  # not to time what JAX does but once
    sweep_over(sweep, sizes or SIZES[sweep], names, repetitions, max_compile_seconds)


if __name__ == "__main__":
    tyro.cli(main)
