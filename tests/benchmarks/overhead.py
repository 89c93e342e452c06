"""Clipping by norm adds less to an Adam step than `optax.clip_by_global_norm` does.

A learned limit adds nothing to that, and a recorder nothing to a large step.
`stabilize` without rollback adds less than a clip within `optax.apply_if_finite` does.

    python tests/benchmarks/overhead.py --tree gpt2 --torch

The same command runs on CPU, GPU and TPU.
"""

import datetime
import importlib.util
import os
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip

TreeName = Literal["gpt2", "many", "lstm"]

# What stands before Adam. "Adam again" is the step against itself: how far its ratio is
# from 1 is the noise.
CLIPS: dict[str, optax.GradientTransformation] = {
    "Adam": optax.identity(),
    "Adam again": optax.identity(),
    "optax.clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "optaxclip.clip_by_norm": optaxclip.clip_by_norm(1.0),
    "optaxclip.clip_by_norm, per leaf": optaxclip.clip_by_norm(1.0, per="leaf"),
    "optaxclip.clip_by_value": optaxclip.clip_by_value(1.0),
    "optaxclip.zclip": optaxclip.zclip(),
    "optaxclip.autoclip": optaxclip.autoclip(),
    "optaxclip.adagc": optaxclip.adagc(),
    "optaxclip.record and clip_by_norm": optax.chain(
        optaxclip.record(), optaxclip.clip_by_norm(1.0)
    ),
}


def plain_fields(optimizer: optax.GradientTransformation) -> Any:
    """`stabilize` with each number that its state packs in an array of its own."""
    guarded = optaxclip.stabilize(optimizer)

    def with_fields(state, change):
        state = state["explosions"]
        record = state.explosions.record
        record = record._replace(counts=change(record.counts))
        explosions = state.explosions._replace(
            events=change(state.explosions.events), record=record
        )
        carried = change(state.carried)
        return {"explosions": state._replace(explosions=explosions, carried=carried)}

    def split(packed):
        return tuple(packed[..., i] for i in range(packed.shape[-1]))

    def joined(fields):
        return jnp.stack(fields, axis=-1)

    def update(updates, state, params=None, **extra_args):
        state = with_fields(state, joined)
        updates, state = guarded.update(updates, state, params, **extra_args)
        return updates, with_fields(state, split)

    return optax.GradientTransformationExtraArgs(
        lambda params: with_fields(guarded.init(params), split), update
    )


# What wraps Adam.
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "optax.apply_if_finite and clip": lambda adam: optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(1.0), adam), 5
    ),
    "optaxclip.skip_explosions": optaxclip.skip_explosions,
    "optaxclip.stabilize, no rollback": lambda adam: optaxclip.stabilize(
        adam, rollback=False
    ),
    "optaxclip.stabilize": optaxclip.stabilize,
    "optaxclip.stabilize, snapshots on the host": lambda adam: optaxclip.stabilize(
        adam, rollback="host"
    ),
    "optaxclip.stabilize, plain fields": plain_fields,
}

# Each learned limit beside the fixed one over the same scopes, and the recorder with a
# clip beside the clip.
BESIDE = {
    "optaxclip.record and clip_by_norm": "optaxclip.clip_by_norm",
    "optaxclip.zclip": "optaxclip.clip_by_norm",
    "optaxclip.autoclip": "optaxclip.clip_by_norm",
    "optaxclip.adagc": "optaxclip.clip_by_norm, per leaf",
}


def make_shapes(tree: TreeName) -> dict[str, tuple[int, ...]]:
    """The shapes of a small GPT-2, of a thousand equal leaves, or of an LSTM."""
    if tree == "many":
        return {f"leaf_{i:03}": (64, 64) for i in range(1000)}
    if tree == "lstm":
        recurrent = {"ih": (28, 512), "hh": (128, 512), "bias": (512,)}
        return recurrent | {"head_kernel": (128, 10), "head_bias": (10,)}
    width = 512
    shapes: dict[str, tuple[int, ...]] = {"wte": (28672, width), "wpe": (1024, width)}
    for layer in range(12):
        for name in ("ln_1", "ln_2"):
            shapes[f"h{layer}/{name}"] = (width,)
        shapes[f"h{layer}/attention"] = (width, 3 * width)
        shapes[f"h{layer}/projection"] = (width, width)
        shapes[f"h{layer}/mlp_in"] = (width, 4 * width)
        shapes[f"h{layer}/mlp_out"] = (4 * width, width)
    return shapes


class Slot(NamedTuple):
    """Where the state of Adam belongs."""


def swapped(state: Any, kind: type, new: Any) -> tuple[Any, Any]:
    """The tree with `new` in the place of the first node of a kind, and that node."""
    found: list[Any] = []

    def swap(node):
        if not isinstance(node, kind) or found:
            return node
        found.append(node)
        return new

    state = jax.tree.map(swap, state, is_leaf=lambda node: isinstance(node, kind))
    return state, found[0]


def protect(name: str, adam: optax.GradientTransformation) -> Any:
    """The optimizer of an arm."""
    wrap = WRAPPERS.get(name)
    return wrap(adam) if wrap else optax.chain(CLIPS[name], adam)


def make_arrays(shapes: dict[str, tuple[int, ...]]) -> tuple:
    """Parameters, the state of Adam, and gradients."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    gradients = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    state: Any = optax.adam(1e-3).init(params)
    return params, state[0], gradients


def compile_step(name: str, arrays: tuple) -> tuple[Any, Any]:
    """Compiles an arm for `(params, adam_state, gradients)`.

    Returns the function `(params, adam_state, gradients, rest) -> (params, adam_state,
    rest)`, which reuses the buffers of all but the gradients, and the rest of the
    state, in which a `Slot` stands for that of Adam.
    """
    tx = optax.with_extra_args_support(protect(name, optax.adam(1e-3)))

    def step(params, adam_state, gradients, rest):
        state, _ = swapped(rest, Slot, adam_state)
        updates, state = tx.update(gradients, state, params, value=jnp.float32(1))
        rest, adam_state = swapped(state, optax.ScaleByAdamState, Slot())
        return optax.apply_updates(params, updates), adam_state, rest

    rest, _ = swapped(tx.init(arrays[0]), optax.ScaleByAdamState, Slot())
    lowered = jax.jit(step, donate_argnums=(0, 1, 3)).lower(*arrays, rest)
    return lowered.compile(), rest


class Size(NamedTuple):
    """What a compiled step is made of."""

    arrays: int
    """That go in and come out, but for the gradients."""
    kernels: int
    """Fusions, wherever they stand."""
    loops: int
    """Whether to enter one is decided on the device."""
    temporaries: int
    """Bytes."""
    state: int
    """Bytes on the device beyond the state of Adam."""


def size_of(step: Any, arrays: tuple, rest: Any) -> Size:
    """The size of a compiled step of `(params, adam_state, gradients)` and the rest."""
    hlo = step.as_text() or ""
    params, adam_state, _ = arrays
    return Size(
        arrays=len(jax.tree.leaves((params, adam_state, rest))),
        kernels=len(re.findall(r" fusion\(", hlo)),
        loops=len(re.findall(r" while\(", hlo)),
        temporaries=step.memory_analysis().temp_size_in_bytes,
        state=sum(
            x.nbytes
            for x in jax.tree.leaves(rest)
            if x.sharding.memory_kind == jax.devices()[0].default_memory().kind
        ),
    )


def alternating(names: list[str], num_rounds: int):
    """Each round visits all names, once forward and once backward in turn."""
    for i in range(num_rounds):
        yield names if i % 2 == 0 else names[::-1]


def time_steps(
    steps: dict[str, Any], rests: dict[str, Any], arrays: tuple, num_rounds: int
) -> dict[str, list[float]]:
    """Seconds of a step of each arm, in each round after the first.

    All share the arrays, which each step donates to the next, as it does the rests.
    """
    params, adam_state, gradients = arrays
    size = sum(x.size for x in params.values())
    calls = max(1, 2_000_000 // size)  # a small step alone is too short to be timed
    times: dict[str, list[float]] = {name: [] for name in steps}
    for order in alternating(list(steps), num_rounds + 1):
        for name in order:
            start = time.perf_counter()
            for _ in range(calls):
                params, adam_state, rests[name] = steps[name](
                    params, adam_state, gradients, rests[name]
                )
            jax.block_until_ready((params, adam_state, rests[name]))
            times[name].append((time.perf_counter() - start) / calls)
    return {name: values[1:] for name, values in times.items()}  # without warm-up


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """The median over the rounds of the time of `name` in units of `base`'s."""
    return statistics.median(np.divide(times[name], times[base]))


def measure_torch(shapes: list, repetitions: int, calls: int) -> dict[str, list[float]]:
    """Times PyTorch's Adam on the same shapes, with and without its clip."""
    torch = importlib.import_module("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    params = [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, device=device)
    adam = torch.optim.Adam(params, lr=1e-3)
    names = ["Adam", "Adam again", "clip"]
    times: dict[str, list[float]] = {name: [] for name in names}
    for order in alternating(names, repetitions + 1):
        for name in order:
            start = time.perf_counter()
            for _ in range(calls):
                if name == "clip":
                    torch.nn.utils.clip_grad_norm_(params, 1.0)
                adam.step()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / calls)
    return {name: values[1:] for name, values in times.items()}


def main(
    *,
    tree: TreeName = "gpt2",
    repetitions: int = 30,
    compilations: int = 3,
    torch: bool = False,
    arms: tuple[str, ...] = (),
) -> None:
    """Prints what each clip adds to a jitted Adam step.

    Time, compilation, arrays, kernels, loops, temporaries and state.

    All clips share one set of parameters, gradients and Adam states, which each step
    donates to the next: with buffers of their own, equal steps differ by up to 20 %.

    Args:
        tree: The parameters: 74 leaves of a small GPT-2 (53 million), 1000 leaves of
            64 x 64, or the 5 leaves of an LSTM.
        repetitions: Rounds that time every clip once.
        compilations: Rounds that compile every clip once.
        torch: Also compare PyTorch's clip with its bare Adam, if it is installed.
        arms: Parts of the names of what is timed beside Adam; by default all.
    """
    shapes = make_shapes(tree)
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    arrays = make_arrays(shapes)

    names = [*CLIPS, *WRAPPERS]
    if tree == "many":  # XLA takes minutes for a thousand different norms
        names.remove("optaxclip.clip_by_norm, per leaf")
        names.remove("optaxclip.adagc")
    others = [name for name in names[2:] if any(arm in name for arm in arms or [""])]
    names = [*names[:2], *others]
    compile_times: dict[str, list[float]] = {name: [] for name in names}
    steps, rests, sizes = {}, {}, {}
    for order in alternating(names, compilations):
        for name in order:
            jax.clear_caches()
            start = time.perf_counter()
            steps[name], rests[name] = compile_step(name, arrays)
            compile_times[name].append(time.perf_counter() - start)
            sizes[name] = size_of(steps[name], arrays, rests[name])

    times = time_steps(steps, rests, arrays, repetitions)

    device = jax.devices()[0]
    print(
        f"{tree}: {len(shapes)} leaves, {size / 1e6:.3g} million float32 parameters; "
        f"JAX {jax.__version__} on {device.platform} ({device.device_kind}), "
        f"{os.cpu_count()} cores, {datetime.date.today()}."
    )
    noise = ratio(times, "Adam again", "Adam")
    compile_noise = ratio(compile_times, "Adam again", "Adam")
    print(
        f"A bare Adam step takes {1e3 * statistics.median(times['Adam']):.4g} ms, "
        f"against itself x{noise:.3f}; it compiles in "
        f"{statistics.median(compile_times['Adam']):.3g} s, against itself "
        f"x{compile_noise:.2f}."
    )
    parameters = 4 * size
    for name in names:
        found = sizes[name]
        print(
            f"{name}: {found.arrays} arrays, {found.kernels} kernels, {found.loops} "
            f"loops, {found.temporaries} bytes of temporaries, and a state of "
            f"{found.state / parameters:.3f} times the parameters beyond Adam's."
        )
    for name in others:
        memory = sizes[name].temporaries - sizes["Adam"].temporaries
        print(
            f"With {name} the step takes {1e3 * statistics.median(times[name]):.4g} ms"
            f", x{ratio(times, name, 'Adam'):.3f} (A/A x{noise:.3f}); it compiles in "
            f"{statistics.median(compile_times[name]):.3g} s, "
            f"x{ratio(compile_times, name, 'Adam'):.2f} (A/A x{compile_noise:.2f}), "
            f"and needs {memory / parameters:+.1%} of the gradients' memory for "
            "temporaries."
        )
    ours, theirs = "optaxclip.clip_by_norm", "optax.clip_by_global_norm"
    if ours in names and theirs in names:
        print(
            f"The step with {ours} takes x{ratio(times, ours, theirs):.3f} the time "
            f"of that with {theirs} (A/A x{noise:.3f}), and compiles in "
            f"x{ratio(compile_times, ours, theirs):.2f} (A/A x{compile_noise:.2f})."
        )
    for name, fixed in BESIDE.items():
        if name in names and fixed in names:
            print(
                f"The step with {name} takes x{ratio(times, name, fixed):.3f} the time "
                f"of that with {fixed} (A/A x{noise:.3f})."
            )
    if torch and importlib.util.find_spec("torch"):
        calls = max(1, 2_000_000 // size)
        times = measure_torch(list(shapes.values()), repetitions, calls)
        print(
            "With clip_grad_norm_, PyTorch's Adam step takes "
            f"{1e3 * statistics.median(times['clip']):.4g} ms, "
            f"x{ratio(times, 'clip', 'Adam'):.3f} of the bare "
            f"{1e3 * statistics.median(times['Adam']):.4g} ms "
            f"(A/A x{ratio(times, 'Adam again', 'Adam'):.3f})."
        )


if __name__ == "__main__":
    import tyro  # which a bare machine lacks, on which `gpu.py` takes the rest

    tyro.cli(main)
