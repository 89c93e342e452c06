"""A change that only moves code leaves every lowered program as it was.

    python tests/benchmarks/same_programs.py ../another-checkout

It lowers the update of every row of the registry in both checkouts, and compares the
texts, without locations and without the names of functions and results.
"""

import difflib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro

HERE = Path(__file__).parents[2]


def programs() -> dict[str, str]:
    """The lowered update of each row, with functions numbered as they appear."""
    from registry import REGISTRY

    params = {"a": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}, "w": jnp.ones(3)}
    found = {}
    for name, row in REGISTRY.items():
        tx = optax.with_extra_args_support(row.make())

        def update(grads, state, params, loss, tx=tx):
            return tx.update(grads, state, params, value=loss)

        state = tx.init(params)
        text = jax.jit(update).lower(params, state, params, jnp.ones([])).as_text()
        text = re.sub(r"jax.result_info = \"[^\"]*\"", "", text)
        numbers: dict[str, str] = {}
        found[name] = re.sub(
            r"@\w+",
            lambda match, n=numbers: n.setdefault(match[0], f"@f{len(n)}"),
            text,
        )
    return found


def of_checkout(path: Path) -> dict[str, str]:
    """The programs of another process, whose `optaxclip` is that of a checkout."""
    paths = os.pathsep.join([str(path), str(HERE / "tests")])
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, __file__, "--print-programs"]
    output = subprocess.check_output(command, env=environment)
    return json.loads(output)


def main(other: tyro.conf.Positional[Path]) -> None:
    """Prints which rows differ, and the first lines that do; exits with their number.

    Args:
        other: The root of another checkout.
    """
    before, after = of_checkout(other.resolve()), of_checkout(HERE)
    changed = [name for name in after if before.get(name) != after[name]]
    for name in changed:
        old, new = (text.get(name, "").splitlines() for text in (before, after))
        lines = difflib.unified_diff(old, new, n=0)
        print(f"{name}:", *itertools.islice(lines, 6), sep="\n  ")
    print(f"{len(after) - len(changed)} of {len(after)} lowered programs are the same.")
    sys.exit(len(changed))


if __name__ == "__main__":
    if "--print-programs" in sys.argv:
        json.dump(programs(), sys.stdout)
    else:
        tyro.cli(main)
