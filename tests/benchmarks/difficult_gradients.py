"""Claim: optaxclip clips gradients to their limit on which its peers go wrong.

Prints one row a case: the norm after a clip of the whole tree, by optax, by PyTorch (if
installed) and by optaxclip, beside the right one.
"""

import datetime
import importlib.util
import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip

CASES = {
    "float32 values of 1e20, limit 1": ([np.full(3, 1e20)], "float32", 1.0),
    "float32 values of 3e-25, limit 1e-26": ([np.full(2, 3e-25)], "float32", 1e-26),
    "float16 [300, 400], limit 1000": ([np.array([300, 400])], "float16", 1000.0),
    "1000 bfloat16 leaves of 64 ones, limit 1": ([np.ones(64)] * 1000, "bfloat16", 1.0),
    "NaN in one of two leaves, limit 1": (
        [np.array([np.nan, 1]), np.array([3, 4])],
        "float32",
        1.0,
    ),
}


def norm(leaves) -> float:
    """In float64; of what is finite."""
    flat = np.concatenate([np.asarray(x, np.float64) for x in leaves])
    return float(np.sqrt(np.sum(flat[np.isfinite(flat)] ** 2)))


def describe(leaves) -> str:
    nans = sum(int(np.isnan(np.asarray(x, np.float64)).sum()) for x in leaves)
    return f"{norm(leaves):.3g}" + (f", {nans} NaN" if nans else "")


def with_optax(clip, leaves) -> str:
    return describe(clip.update(leaves, clip.init(leaves))[0])


def with_torch(values, dtype, limit) -> str:
    if not importlib.util.find_spec("torch"):
        return "not installed"
    torch: Any = importlib.import_module("torch")
    parameters = [torch.zeros(x.shape, dtype=getattr(torch, dtype)) for x in values]
    for parameter, x in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor(x).to(parameter.dtype)
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    return describe([p.grad.double().numpy() for p in parameters if p.grad is not None])


def main() -> None:
    """Prints the table, with the machine and the date."""
    today = datetime.date.today()
    print(f"{platform.machine()}, JAX {jax.__version__}, {today}")
    for case, (values, dtype, limit) in CASES.items():
        leaves = [jnp.asarray(x, dtype) for x in values]
        is_finite = all(np.isfinite(x).all() for x in values)
        right = f"{min(norm(leaves), limit):.3g}" if is_finite else "0, 1 NaN"
        print(
            f"{case}: right {right}; "
            f"optax {with_optax(optax.clip_by_global_norm(limit), leaves)}; "
            f"torch {with_torch(values, dtype, limit)}; "
            f"optaxclip {with_optax(optaxclip.clip_by_norm(limit), leaves)}"
        )


if __name__ == "__main__":
    main()
