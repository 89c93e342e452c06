"""One process of `examples/data_parallel.py`, with a batch of NaN and a sudden death.

python tests/data_parallel_process.py OUT NAN_AT DIE_AT [flags of the example]
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro


def faulty(read_rows: Callable, nan_at: int, die_at: int = -1) -> Callable:
    """On `nan_at` the last process reads a NaN, on `die_at` it is killed."""

    def read(digits, batch, step):
        images, labels = read_rows(digits, batch, step)
        images = images.astype(np.float32)
        if jax.process_index() == jax.process_count() - 1:
            if step == nan_at:
                images[-1] = np.nan
            if step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return images, labels

    return read


def arrays_of(result: dict[str, Any]) -> dict[str, np.ndarray]:
    """What a run left on this process' devices: parameters, state, losses."""
    leaves = jax.tree_util.tree_leaves_with_path(result["carry"])
    found = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    return found | {"losses": result["losses"]}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    example: Any = importlib.import_module("data_parallel")
    out, nan_at, die_at, *flags = sys.argv[1:]
    example.read_rows = faulty(example.read_rows, int(nan_at), int(die_at))
    arrays: dict[str, Any] = arrays_of(tyro.cli(example.main, args=flags))
    np.savez(out, **arrays)
