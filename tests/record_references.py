"""Records what public implementations do to 500 gradients, for `test_parity.py`.

pip install torch==2.13.0 zclip==1.0.0 autoclip==0.2.1 pytorch_optimizer==4.1.0
python tests/record_references.py

Two are not on PyPI, and have to be in `PYTHONPATH`: `src` of the GitHub repository
TianjinYellow/GradientStabilizer at d77016f, and `GRPO/verl/utils` of
ZhiyuanLi218/AGGC at 786f86f.
"""

import importlib
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FILE = Path(__file__).with_name("references.json")
NUM_STEPS = 500
SPIKES = {40: 30, 101: 10, 137: 1000, 223: 10, 224: 100, 311: 300, 402: 1000, 490: 20}
ZCLIP_CAP, AGC_RATIO = 3.0, 0.5
AGGC_BAND = 0.5, 2.0
HISTORY = 32  # of Levanter's 128 norms, most would hold a spike

Tree = dict[str, np.ndarray]
"""Leaves by name, sorted; of gradients, axis 0 runs over the steps."""


class Reference(NamedTuple):
    package: str
    per: str
    step_of: Callable[[Any], Callable[[], list]]
    """torch.nn.ParameterList -> a step: clips the gradients, returns its limits."""


def loss_of(params, x, y):
    """A convolution, tanh, the mean over space and a linear layer."""
    h = jax.lax.conv_general_dilated(
        x, params["conv"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = jnp.tanh(h).mean((1, 2))
    return jnp.mean(jnp.square(h @ params["dense"] + params["bias"] - y))


def train() -> tuple[Tree, Tree]:
    """First parameters, their bias small, and the gradients of noisy batches."""
    rng = np.random.default_rng(0)
    shapes = {"bias": (2,), "conv": (2, 2, 1, 2), "dense": (2, 2)}
    first = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    first["bias"] = np.array([3e-4, -4e-4])
    first = as_float32(first)
    params, gradient_of = first, jax.jit(jax.grad(loss_of))
    steps = []
    for step in range(NUM_STEPS):
        x = rng.normal(size=(8, 3, 3, 1)).astype(np.float32)
        # Heavy tails: the natural spikes.
        noise = rng.standard_t(2, size=(8, 2)).astype(np.float32)
        y = 3 * np.tanh(x[:, :2, 1, 0]) + noise
        g = jax.tree.map(np.asarray, gradient_of(params, x, y))
        params = {name: params[name] - 0.01 * np.tanh(g[name]) for name in shapes}
        steps.append({name: g[name] * SPIKES.get(step, 1) for name in shapes})
    return first, as_float32({k: np.stack([g[k] for g in steps]) for k in shapes})


def as_float32(tree: Tree) -> Tree:
    """As the file has them: 4 digits, the same float32 on every machine."""
    return {name: rounded(x, 4).astype(np.float32) for name, x in tree.items()}


def rounded(x: np.ndarray, digits: int) -> np.ndarray:
    return np.array([float(f"{v:.{digits}g}") for v in x.flat]).reshape(x.shape)


def norms_of(tree: Tree, per: str) -> np.ndarray:
    """Norms `[scopes, steps]`."""
    sums = []
    for x in tree.values():
        num_units = x.shape[-1] if per == "unit" and x.ndim > 2 else 1
        squares = np.square(x.astype(np.float64)).reshape(len(x), -1, num_units)
        sums.append(squares.sum(1).T)
    sums = np.concatenate(sums)
    return np.sqrt(sums.sum(0, keepdims=True) if per == "tree" else sums)


def zclip(model, *, cap=None):
    clipper = importlib.import_module("zclip").ZClip(max_grad_norm=cap)

    def step():
        norm = clipper._compute_grad_norm(model)
        limit = clipper._compute_clip_val(norm) if clipper.initialized else None
        clipper.step(model)
        return [min(np.inf if x is None else x for x in (limit, cap))]

    return step


def autoclip(model):
    """As in github.com/pseeth/autoclip, autoclip.py: a norm is in its own history."""
    torch: Any = importlib.import_module("torch")
    history = []

    def step():
        history.append(sum(p.grad.norm(2).item() ** 2 for p in model) ** 0.5)
        limit = np.percentile(history, 10)
        torch.nn.utils.clip_grad_norm_(model, limit)
        return [limit]

    return step


def autoclip_package(model, *, per="tree"):
    """As on PyPI: the history ends before the norm."""
    torch: Any = importlib.import_module("torch")
    clipper = importlib.import_module("autoclip.torch").QuantileClip(
        model, quantile=0.1, history_length=1000, global_threshold=per == "tree"
    )

    def step():
        histories = [clipper.state[p].get("history", []) for p in model]
        if per == "tree":
            histories = [clipper.state["global_history"]]
        limits = [torch.quantile(x, 0.1) if len(x) else np.inf for x in histories]
        clipper.step()
        return limits

    return step


def adagc(model):
    # Without momentum the first moment is the clipped gradient.
    optimizer = importlib.import_module("pytorch_optimizer").AdaGC(
        model, lr=1e-6, betas=(0.0, 0.999), weight_decay=0.0
    )

    def step():
        (group,) = optimizer.param_groups
        is_warmup = group.get("step", 0) + 1 < group["warmup_steps"]
        limits = [
            np.inf if is_warmup else group["lambda_rel"] * optimizer.state[p]["gamma"]
            for p in model
        ]
        given = [p.grad.clone() for p in model]
        optimizer.step()
        for i, p in enumerate(model):
            p.grad = optimizer.state[p]["exp_avg"].clone()
            if is_warmup and not p.grad.equal(given[i]):
                limits[i] = p.grad.norm()
        return limits

    return step


def agc(model):
    package = importlib.import_module("pytorch_optimizer.optimizer.agc")

    def step():
        limits = []
        for p in model:
            # Torch has the axis of the units first.
            weights, g = (x.detach().movedim(-1, 0) for x in (p, p.grad))
            limits += [*package.unit_norm(weights).clamp(1e-3).mul(AGC_RATIO).flatten()]
            p.grad = package.agc(weights, g, agc_clip_val=AGC_RATIO).movedim(0, -1)
        return limits

    return step


def gradient_stabilizer(model):
    stabilizer = importlib.import_module("gradient_stabilizer").GradientStabilizer()

    def step():
        stabilizer(model)
        return [p.grad.norm() for p in model]  # what it sets

    return step


def aggc(model):
    package = importlib.import_module("grad_clip")
    clipper = package.PerModuleGradClipper(
        options=package.PerModuleGradNormOptions(
            enable=True,
            auto_bounds=True,
            raise_small=True,
            low_mult=AGGC_BAND[0],
            high_mult=AGGC_BAND[1],
            ema_beta=0.95,
            min_norm=0.01,
        ),
        local_rank=1,
    )
    clipper.mod2params = {str(i): [p] for i, p in enumerate(model)}
    clipper.modules = set(clipper.mod2params)
    is_first = itertools.chain([np.inf] * len(model), itertools.repeat(0))

    def step():
        for i, p in enumerate(model):
            clipper.module_sums[str(i)] = p.grad.square().sum().item()
            # Ours starts there, without a limit on the first gradient; from 0, as it
            # does alone, the second would be cut to a tenth.
            clipper.module_ema.setdefault(str(i), p.grad.norm().item())
        found = {x["module"]: x["upper"] for x in clipper.on_before_optimizer_step(0)}
        return [next(is_first) or found[str(i)] for i in range(len(model))]

    return step


def historical_norm(model):
    """A port of the rule in Levanter, `optim/clip_update_norm.py`, to NumPy."""
    norms = []

    def step():
        norm = sum(p.grad.norm().item() ** 2 for p in model) ** 0.5
        known, limit = norms[-HISTORY:], np.inf
        if len(known) >= max(2, HISTORY // 2):
            limit = np.mean(known) + 3 * max(np.std(known), 1e-6)
        norms.append(norm)
        for p in model:
            p.grad = p.grad * min(1.0, limit / norm)
        return [limit]

    return step


def spam(model):
    # Without momentum the first moment is the clipped gradient.
    optimizer = importlib.import_module("pytorch_optimizer").SPAM(
        model, lr=1e-6, betas=(0.0, 0.999), update_proj_gap=1000, foreach=False
    )

    def step():
        optimizer.step()
        for p in model:
            p.grad = optimizer.state[p]["exp_avg"].reshape(p.shape).clone()
        return [np.inf for _ in model]

    return step


def stable_adam(model):
    optimizer = importlib.import_module("pytorch_optimizer").StableAdamW(
        model, lr=1.0, betas=(0.9, 0.999), weight_decay=0.0, foreach=False
    )

    def step():
        for p in model:
            p.data.zero_()
        optimizer.step()
        for p in model:
            p.grad = -p.detach().clone()
        return [np.inf for _ in model]

    return step


REFERENCES = {
    "zclip": Reference("zclip", "tree", zclip),
    "zclip_capped": Reference("zclip", "tree", partial(zclip, cap=ZCLIP_CAP)),
    "autoclip": Reference("torch", "tree", autoclip),
    "autoclip_package": Reference("autoclip.torch", "tree", autoclip_package),
    "autoclip_package_per_leaf": Reference(
        "autoclip.torch", "leaf", partial(autoclip_package, per="leaf")
    ),
    "adagc": Reference("pytorch_optimizer", "leaf", adagc),
    "agc": Reference("pytorch_optimizer", "unit", agc),
    "gradient_stabilizer": Reference(
        "gradient_stabilizer", "leaf", gradient_stabilizer
    ),
    "aggc": Reference("grad_clip", "leaf", aggc),
    "historical_norm": Reference("torch", "tree", historical_norm),
}
# Of these only what comes out is compared: they have no limit on a norm.
OPTIMIZERS = {
    "spam": Reference("pytorch_optimizer", "leaf", spam),
    "stable_adam": Reference("pytorch_optimizer", "leaf", stable_adam),
}


def record(reference: Reference, params: Tree, gradients: Tree) -> dict[str, Any]:
    """Limits, NaN for none, and the norms after the clip, both `[scopes, steps]`."""
    torch: Any = importlib.import_module("torch")
    model = torch.nn.ParameterList(map(torch.tensor, params.values()))
    step = reference.step_of(model)
    limits, clipped = [], []
    for leaves in zip(*gradients.values(), strict=True):
        for p, g in zip(model, leaves, strict=True):
            p.grad = torch.tensor(g)
        limits.append([float(x) for x in step()])
        clipped.append([p.grad.numpy().copy() for p in model])
    limits = np.array(limits).T
    if (limits == limits[:, :1]).all():
        limits = limits[:, :1]
    clipped = dict(zip(params, map(np.stack, zip(*clipped, strict=True)), strict=True))
    return {
        "limits": np.where(np.isinf(limits), np.nan, limits),
        "norms": norms_of(clipped, reference.per),
    }


def main():
    params, gradients = train()
    # Where a reference is defective nothing can agree: on zeros, and for ZClip after a
    # lasting rise, which it never learns.
    assert norms_of(gradients, "unit").min() > 1e-6
    references = {
        name: record(reference, params, gradients)
        for name, reference in (REFERENCES | OPTIMIZERS).items()
    }
    is_outlier = ~np.isnan(references["zclip"]["limits"][0])
    runs = [len([*run]) for key, run in itertools.groupby(is_outlier) if key]
    assert max(runs) < 25, runs

    flat = {name: x.ravel() for name, x in gradients.items()}
    recorded = {"params": params, "gradients": flat, **references}
    lines = [
        f'"{name}": {{\n'
        + ",\n".join(f'  "{k}": {as_json(v)}' for k, v in arrays.items())
        + "\n}"
        for name, arrays in recorded.items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def as_json(x: np.ndarray) -> str:
    numbers = rounded(x, 4 if x.dtype == np.float32 else 8).tolist()
    return json.dumps(numbers, separators=(",", ":")).replace("NaN", "null")


def load() -> tuple[Tree, Tree, dict[str, Tree]]:
    """Parameters, gradients and the references by name."""
    recorded = {
        name: {key: np.array(x, np.float64) for key, x in arrays.items()}
        for name, arrays in json.loads(FILE.read_text()).items()
    }
    params, flat = (as_float32(recorded.pop(key)) for key in ("params", "gradients"))
    shapes = {name: (NUM_STEPS, *x.shape) for name, x in params.items()}
    gradients = {name: x.reshape(shapes[name]) for name, x in flat.items()}
    return params, gradients, recorded


if __name__ == "__main__":
    main()
