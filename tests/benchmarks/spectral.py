"""What `clip_by_spectral_norm` costs, in units of Muon's own Newton-Schulz iteration.

    python tests/benchmarks/spectral.py --width 1024

A matrix that fits costs the measure of its norm alone. The same command runs on CPU,
GPU and TPU.
"""

import datetime
import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip

# The norms of matrices in units of their limit.
RATIOS = {"that fits": 0.5, "at 3 times the limit": 3, "at 1000 times": 1000}


def main(*, width: int = 1024, depth: int = 1, repetitions: int = 10) -> None:
    """Prints the time of each, in alternation, as a ratio to that of Muon.

    Args:
        width: Rows and columns of a matrix, of random float32 numbers.
        depth: How many columns, in units of the rows.
        repetitions: How often each is timed.
    """
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
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        jax.block_until_ready(step(x))
    for i in range(repetitions):
        for name in list(steps)[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(steps[name](x))
            times[name].append(time.perf_counter() - start)
    device = jax.devices()[0]
    print(
        f"{width} x {depth * width}, float32; JAX {jax.__version__} on "
        f"{device.platform} ({device.device_kind}), {os.cpu_count()} cores, "
        f"{datetime.date.today()}. Muon's five steps take "
        f"{1e3 * statistics.median(times['Muon']):.4g} ms."
    )
    for name in list(steps)[1:]:
        ratio = statistics.median(np.divide(times[name], times["Muon"]))
        print(f"{name} takes x{ratio:.2f} the time of Muon's iteration.")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
