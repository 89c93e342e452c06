"""One process of `examples/data_parallel.py`, with bad batches and a sudden death.

python tests/data_parallel_process.py OUT FAULTS [flags of the example]

with `examples` in PYTHONPATH.
"""

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

POISON = 100  # in a label


def faulty(
    read_rows: Callable,
    *,
    nan_at: list[int],
    poison_at: list[int] | None = None,
    die_at: int = -1,
    die_after: str | None = None,
) -> Callable:
    """The last process reads NaN or poison in these batches, and is killed in one.

    Not before `die_after` exists, a checkpoint: it is written beside the steps.
    """

    def read(digits, batch, index):
        images, labels = read_rows(digits, batch, index)
        images, labels = images.astype(np.float32), labels.copy()
        if jax.process_index() == jax.process_count() - 1:
            if index in nan_at:
                images[-1] = np.nan
            if index in (poison_at or []):
                labels[-1] += POISON
            if index == die_at:
                while die_after and not Path(die_after).exists():
                    time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGKILL)
        return images, labels

    return read


def poisonable(build: Callable) -> Callable:
    """Poison in a batch spoils the parameters after its step, and no rule sees why."""

    def build_poisonable(*args, **options):
        carry, step, *others = build(*args, **options)

        def poisonable_step(carry, images, labels):
            (params, opt_state), measures = step(carry, images, labels % POISON)
            factor = jnp.where(jnp.max(labels) >= POISON, -3.0, 1.0)
            return (jax.tree.map(lambda x: x * factor, params), opt_state), measures

        return carry, poisonable_step, *others

    return build_poisonable


def arrays_of(result: dict[str, Any]) -> dict[str, np.ndarray]:
    """What a run left on this process' devices: parameters, state, losses."""
    leaves = jax.tree_util.tree_leaves_with_path(result["carry"])
    found = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    return found | {"losses": result["losses"]}


if __name__ == "__main__":
    example: Any = importlib.import_module("data_parallel")
    out, faults, *flags = sys.argv[1:]
    example.read_rows = faulty(example.read_rows, **json.loads(faults))
    example.build = poisonable(example.build)
    arrays: dict[str, Any] = arrays_of(tyro.cli(example.main, args=flags))
    np.savez(out, **arrays)
