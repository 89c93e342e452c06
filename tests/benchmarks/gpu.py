"""What norms, clips and `stabilize` cost on an accelerator.

    python tests/benchmarks/gpu.py

Needs JAX, Optax and this package. `--tests` also runs the tests of clipping, norms,
explosions and recording there, which need pytest. It was written for one GPU, and not
run on one yet. `--small` is for a machine without: it shows that the script runs, and
its times mean nothing.
"""

import argparse
import datetime
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from overhead import (
    compile_step,
    make_arrays,
    make_shapes,
    protect,
    ratio,
    size_of,
    time_steps,
)

ARMS = (
    "Adam",
    "Adam again",
    "optax.clip_by_global_norm",
    "optaxclip.clip_by_norm",
    "optaxclip.stabilize, no rollback",
    "optaxclip.stabilize",
    "optaxclip.stabilize, snapshots on the host",
)
TESTS = (
    "clipping/test_clipping.py",
    "norms/test_norms.py",
    "explosions/test_explosions.py",
    "test_recording.py",
)


def median_time(function: Callable[..., Any], *args: Any, repetitions: int = 20):
    """Seconds of one call of a compiled function."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def bandwidth(num_bytes: int) -> float:
    """Bytes per second that a copy reads; it writes as many."""
    x = jnp.ones(num_bytes // 4, jnp.float32)
    return x.nbytes / median_time(jax.jit(lambda x: x + 1), x)


def measure_norms(scale: float) -> None:
    """Prints the time of two large norms, beside that of reading their arrays once."""
    read = 2 * bandwidth(int(4e9 * scale))  # what a copy writes, a norm may read
    # Vectors of 1000, and matrices; every other array in bfloat16.
    sizes = [1000 if i % 5 == 0 else int(562_000 * scale) for i in range(500)]
    dtypes = [jnp.bfloat16 if i % 2 else jnp.float32 for i in range(500)]
    many = [jnp.ones(n, dtype) for n, dtype in zip(sizes, dtypes, strict=True)]
    one = [jnp.ones(int(1.5e9 * scale), jnp.bfloat16)]
    for name, tree in [("500 mixed arrays", many), ("one bfloat16 array", one)]:
        num_bytes = sum(x.nbytes for x in tree)
        least = num_bytes / read
        for norm in (optaxclip.global_norm, optax.global_norm):
            spent = median_time(jax.jit(norm), tree)
            print(
                f"{norm.__module__.split('.')[0]}: the norm of {name}, "
                f"{num_bytes / 1e9:.3g} GB, takes {1e3 * spent:.3g} ms, "
                f"{spent / least:.2f} times that of reading them."
            )


def measure_adam(tree: Any, rounds: int) -> None:
    """Prints the time of an Adam step under each arm."""
    arrays = make_arrays(make_shapes(tree))
    steps, rests, sizes = {}, {}, {}
    for name in ARMS:
        start = time.perf_counter()
        steps[name], rests[name] = compile_step(name, arrays)
        sizes[name] = size_of(steps[name], arrays, rests[name])
        spent = time.perf_counter() - start
        print(f"    {tree}, {name}: compiled in {spent:.1f} s", flush=True)
    report(tree, time_steps(steps, rests, arrays, rounds), sizes)


def report(what: str, times: dict[str, list[float]], sizes: dict[str, Any]) -> None:
    """Prints the times of the arms in units of Adam's; each loop is a host wait."""
    print(f"{what}: Adam takes {1e3 * np.median(times['Adam']):.4g} ms.")
    for name in ARMS[1:]:
        found = sizes[name]
        print(
            f"    {name}: x{ratio(times, name, 'Adam'):.3f}; {found.kernels} kernels, "
            f"{found.loops} loops, {found.arrays} arrays"
        )


def make_transformer(layers: int, width: int, batch: int, length: int):
    """Parameters of a decoder, and the loss of a step in bfloat16."""
    keys = iter(jax.random.split(jax.random.key(0), 4 * layers + 1))
    heads = width // 64

    def matrix(rows, columns):
        return jax.random.normal(next(keys), (rows, columns)) / np.sqrt(rows)

    params: dict[str, Any] = {"embedding": matrix(256, width)}
    for i in range(layers):
        params[f"layer_{i}"] = {
            "qkv": matrix(width, 3 * width),
            "out": matrix(width, width),
            "up": matrix(width, 4 * width),
            "down": matrix(4 * width, width),
        }
    tokens = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, 256)

    def normalized(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

    def loss_of(params):
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        x = params["embedding"][tokens[:, :-1]]
        for i in range(layers):
            layer = params[f"layer_{i}"]
            qkv = (normalized(x) @ layer["qkv"]).reshape(batch, length, 3, heads, 64)
            mixed = jax.nn.dot_product_attention(
                *jnp.moveaxis(qkv, 2, 0), is_causal=True
            )
            x = x + mixed.reshape(x.shape) @ layer["out"]
            x = x + jax.nn.gelu(normalized(x) @ layer["up"]) @ layer["down"]
        logits = (normalized(x) @ params["embedding"].T).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(losses)

    return params, loss_of


def measure_transformer(*, is_small: bool, rounds: int) -> None:
    """Prints the time of a training step of a transformer under each arm."""
    sizes = (2, 64, 2, 32) if is_small else (12, 2048, 16, 1024)
    initial, loss_of = make_transformer(*sizes)
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    found = {}
    for name in ARMS:  # one after the other: all states together need too much memory
        tx = optax.with_extra_args_support(protect(name, optax.adam(1e-4)))

        def step(params, state, tx=tx):
            loss, grads = jax.value_and_grad(loss_of)(params)
            updates, state = tx.update(grads, state, params, value=loss)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(jnp.copy, initial)
        state = tx.init(params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
        found[name] = size_of(compiled, (params, state, ()), ())
        for i in range(rounds + 2):
            start = time.perf_counter()
            params, state = compiled(params, state)
            jax.block_until_ready((params, state))
            if i > 1:
                times[name].append(time.perf_counter() - start)
        del params, state
    report("transformer", times, found)


def run_tests() -> None:
    """Runs the tests of what this measures on the device that JAX finds."""
    if not importlib.util.find_spec("pytest"):
        print("No tests: pytest is not installed.")
        return
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "not slow"]
    done = subprocess.run(
        [*command, *(str(tests / name) for name in TESTS)],
        capture_output=True,
        text=True,
        check=False,
    )
    print("Tests:", *done.stdout.splitlines()[-10:], sep="\n    ")


def main() -> None:
    """Prints all measurements, the shortest first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--tests", action="store_true", help="also run the tests")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"JAX {jax.__version__} on {device.platform} ({device.device_kind}), "
        f"{datetime.date.today()}{', small sizes' if options.small else ''}.",
        flush=True,
    )
    measure_norms(0.002 if options.small else 1.0)
    rounds = 2 if options.small else 20
    measure_transformer(is_small=options.small, rounds=rounds)
    for tree in ("lstm",) if options.small else ("lstm", "gpt2", "many"):
        measure_adam(tree, rounds)
    if options.tests:
        run_tests()


if __name__ == "__main__":
    main()
