"""A clip takes at most 5 % of the time of the LSTM example's training step.

    python tests/benchmarks/lstm_step.py --presets pytorch tensorflow

It trains `examples/lstm_mnist.py` with and without its clip, and beside it, where it is
installed, the same model in PyTorch.
"""

import datetime
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

Preset = Literal["default", "tensorflow", "keras", "pytorch"]

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
lstm_mnist: Any = importlib.import_module("lstm_mnist")

IMAGES = np.random.default_rng(0).integers(0, 256, (4000, 28, 28)).astype(np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, 4000).astype(np.int32)


def jax_trainers(configs: dict[str, Any], num_steps: int) -> dict[str, Callable]:
    """Functions that train for `num_steps`, compiled, without measuring norms.

    They hand one set of parameters and optimizer states from one to the next: with
    buffers of their own, equal steps may differ in speed.
    """
    batches = np.random.default_rng(2).integers(
        0, len(IMAGES), (num_steps, configs["nothing"].batch_size), np.int32
    )
    data = jax.device_put((batches, IMAGES, LABELS))
    shared: Any = None

    def trainer(config: Any) -> Callable[[], None]:
        nonlocal shared
        carry, _, train, _ = lstm_mnist.build(config, measured=False)
        compiled = jax.jit(train, donate_argnums=0).lower(carry, *data).compile()
        params, (clip_state, optimizer_state) = carry
        shared = shared or (params, optimizer_state)

        def run():
            nonlocal shared, clip_state
            state = clip_state, shared[1]
            carry, measures = compiled((shared[0], state), *data)
            jax.block_until_ready((carry, measures))
            params, (clip_state, optimizer_state) = carry
            shared = params, optimizer_state

        return run

    return {name: trainer(config) for name, config in configs.items()}


def torch_trainer(config: Any, num_steps: int) -> Callable[[], None]:
    """The same in PyTorch: model, batches, clip and optimizer."""
    torch: Any = importlib.import_module("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(2)
    rnn = torch.nn.LSTM(28, config.hidden, config.layers, batch_first=True).to(device)
    head = torch.nn.Linear(config.hidden, 10).to(device)
    params = [*rnn.parameters(), *head.parameters()]
    if config.optimizer == "adam":
        optimizer = torch.optim.Adam(params, lr=config.learning_rate)
    else:
        optimizer = torch.optim.SGD(params, lr=config.learning_rate, momentum=0.9)
    images = torch.from_numpy(IMAGES).to(device)
    labels = torch.from_numpy(LABELS).long().to(device)
    batches = torch.randint(len(IMAGES), (num_steps, config.batch_size), device=device)

    def run():
        for batch in batches:
            rows = images[batch] / 255.0
            if config.standardise:
                rows = (rows - 0.1307) / 0.3081
            logits = head(rnn(rows)[0][:, -1])
            loss = torch.nn.functional.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            if config.clip == "value":
                torch.nn.utils.clip_grad_value_(params, config.max)
            elif config.clip == "norm" and config.per == "tree":
                torch.nn.utils.clip_grad_norm_(params, config.max)
            elif config.clip == "norm":
                for param in params:
                    torch.nn.utils.clip_grad_norm_([param], config.max)
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def measure(arms: dict[str, Callable[[], None]], repetitions: int) -> dict[str, Any]:
    """Seconds of each arm in each round; the rounds go forward and backward in turn."""
    times = {name: [] for name in arms}
    for i in range(repetitions + 1):
        for name in list(arms) if i % 2 == 0 else list(arms)[::-1]:
            start = time.perf_counter()
            arms[name]()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(values[1:]) for name, values in times.items()}


def main(
    *,
    presets: tuple[Preset, ...] = ("default", "tensorflow", "keras", "pytorch"),
    repetitions: int = 15,
    steps: int = 10,
    torch: bool = True,
) -> None:
    """Prints what the clips add to the step, and how fast it is beside PyTorch's.

    Args:
        presets: Those of the example, each with both of its clips.
        repetitions: Rounds that time every arm once.
        steps: Training steps in each time.
        torch: Also compare with PyTorch, if it is installed.
    """
    torch = torch and importlib.util.find_spec("torch") is not None
    device = jax.devices()[0]
    print(
        f"JAX {jax.__version__} on {device.platform} ({device.device_kind}), "
        f"{datetime.date.today()}; a ratio is the median over {repetitions} rounds of "
        f"{steps} steps."
    )
    for preset in presets:
        configs = {
            clip: lstm_mnist.resolve(preset, len(IMAGES), clip=clip)
            for clip in ("nothing", "value", "norm")
        }
        arms = jax_trainers(configs | {"nothing again": configs["nothing"]}, steps)
        if torch:
            arms |= {f"torch {c}": torch_trainer(configs[c], steps) for c in configs}
        times = measure(arms, repetitions)

        def ratio(name: str, base: str, times: dict[str, Any] = times) -> float:
            return statistics.median(times[name] / times[base])

        def rate(name: str, times: dict[str, Any] = times) -> float:
            return steps / statistics.median(times[name])

        print(
            f"Preset {preset} trains {rate('nothing'):.4g} steps/s without a clip, "
            f"which takes x{ratio('nothing again', 'nothing'):.3f} the time of "
            "itself (A/A)."
        )
        for clip, framework in itertools.product(("value", "norm"), ("", "torch ")):
            if framework and not torch:
                continue
            arm, base = framework + clip, framework + "nothing"
            sentence = (
                f"With clip_by_{clip} a step takes x{ratio(arm, base):.3f} the time of "
                f"that without, {rate(arm):.4g} steps/s."
            )
            if framework:
                sentence = (
                    f"PyTorch's clip_grad_{clip}_ takes x{ratio(arm, base):.3f}, "
                    f"{rate(arm):.4g} steps/s; the example trains "
                    f"x{ratio(arm, clip):.2f} as fast."
                )
            print("  " + sentence)


if __name__ == "__main__":
    tyro.cli(main)
