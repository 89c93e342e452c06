"""What `clip_by_spectral_norm` costs, in units of Muon's own Newton-Schulz iteration.

    python tests/benchmarks/spectral.py --width 512
    python tests/benchmarks/spectral.py --width 1024 --depth 4 --few

A matrix that fits costs the measure of its norm alone, and one of which few singular
values exceed the limit little more; `--few` times that beside the products of whole
matrices that clip all. The same commands run on CPU, GPU and TPU.
"""

import datetime
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from optaxclip.clipping import singular

# The norms of matrices in units of their limit.
RATIOS = {"that fits": 0.5, "at 3 times the limit": 3, "at 1000 times": 1000}


def main(
    *, width: int = 1024, depth: int = 1, repetitions: int = 10, few: bool = False
) -> None:
    """Prints the time of each, in alternation, as a ratio to that of Muon.

    Args:
        width: Rows and columns of a matrix, of random float32 numbers.
        depth: How many columns, in units of the rows.
        repetitions: How often each is timed.
        few: Times both ways of the cap instead, on matrices that differ in how many
            singular values exceed the limit.
    """
    device = jax.devices()[0]
    print(
        f"{width} x {depth * width}, float32; JAX {jax.__version__} on "
        f"{device.platform} ({device.device_kind}), {len(os.sched_getaffinity(0))} "
        f"cores, {datetime.date.today()}."
    )
    if few:
        compare_few(width, depth, repetitions)
    else:
        compare_muon(width, depth, repetitions)


def compare_muon(width: int, depth: int, repetitions: int) -> None:
    """Times the clip of random matrices beside Muon's iteration."""
    x = jax.random.normal(jax.random.key(0), (width, depth * width))
    norm = float(jnp.linalg.norm(x, 2))
    scale: Any = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)
    state = scale.init(x)

    def muon(x):
        return scale.update(x, state)[0]

    steps: dict[str, Any] = {"Muon": jax.jit(muon)}
    steps["Muon again"] = jax.jit(lambda x: muon(x))
    for smooth in (False, True):
        for name, ratio in RATIOS.items():
            clip = optaxclip.clip_by_spectral_norm(norm / ratio, smooth=smooth)
            step = jax.jit(lambda x, clip=clip: clip.update(x, clip.init(x)))
            form = "the smooth form of" if smooth else "the cap of"
            steps[f"{form} one {name}"] = step
    times = alternate(steps, (x,), repetitions)
    print(f"Muon's five steps take {1e3 * statistics.median(times['Muon']):.4g} ms.")
    for name in list(steps)[1:]:
        ratio = statistics.median(np.divide(times[name], times["Muon"]))
        print(f"{name} takes x{ratio:.2f} the time of Muon's iteration.")


def compare_few(width: int, depth: int, repetitions: int) -> None:
    """Times the cap as it is beside the one that never looks for few."""
    capped = {"few first": singular.cap_first, "all": singular.cap_all}
    steps = {name: jax.jit(function) for name, function in capped.items()}
    random = np.random.default_rng(0).standard_normal((depth * width, width))
    left, values, right = np.linalg.svd(random, full_matrices=False)
    bulk = 0.9 * values / values[0]
    spectra = {
        "one at 3 times the limit": [3.0, *bulk[1:]],
        "five at up to 8 times": [8.0, 5.0, 3.0, 2.0, 1.3, *bulk[5:]],
        "five within 0.4 % of 3 times": [*np.linspace(3, 3.012, 5), *bulk[5:]],
        "five of a random matrix": values / values[5],
        "most of a random matrix, up to 3 times": 3 * values / values[0],
    }
    for name, spectrum in spectra.items():
        x = (left * spectrum) @ right
        size = np.linalg.norm(x)
        arguments = jnp.float32(x / size), jnp.float32(1 / size)
        is_done, _ = jax.jit(singular.cap_leading)(*arguments)
        times = alternate(steps, arguments, repetitions)
        ratio = statistics.median(np.divide(times["all"], times["few first"]))
        first, all_ = (1e3 * statistics.median(times[key]) for key in steps)
        print(
            f"{name}: {first:.4g} ms, all {all_:.4g} ms, x{ratio:.2f}; few "
            f"{'are enough' if is_done else 'are not enough'}."
        )


def alternate(
    steps: dict[str, Callable], arguments: tuple, repetitions: int
) -> dict[str, list[float]]:
    """The seconds of each, one after the other, in turns from either end."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        jax.block_until_ready(step(*arguments))
    for i in range(repetitions):
        for name in list(steps)[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(steps[name](*arguments))
            times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
