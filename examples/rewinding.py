"""Checkpoints to go back to, where a rollback is not enough.

For `data_parallel.py`. A run saves its parameters, its state and its place in the data.
Where an explosion comes back after a rollback, it rewinds: to the checkpoint before the
explosion, and past the batches since.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import cli
import jax
import orbax.checkpoint as ocp
from tqdm import tqdm

import optaxclip

RECURRENCE = 300  # steps after a rollback within which another has the same cause
SEEN = "explosions/is_rolled_back", "explosions/gave_up", "explosions/began"


@dataclasses.dataclass
class Progress:
    """Where a run is. It is in each checkpoint, and the same in all processes."""

    num_batches: int = 0
    """Batches read, the number of a checkpoint. A rewind takes none of them back."""
    step: int = 0
    """Steps of the optimizer. A rewind takes some back."""
    loader: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The state of the loader of batches."""
    num_rewinds: int = 0
    num_rollbacks: int = 0
    """Rollbacks in succession."""
    last_rollback: int = 0
    """The step of the last of them."""
    began: int = 0
    """The step on which the explosion began that led to the first of them."""

    def must_rewind(self, seen: list[list[Any]]) -> bool:
        """Takes in what was seen on the last steps, the values of `SEEN` on each.

        Returns:
            Whether the run gave up, or an explosion came back after a rollback.
        """
        first = self.step - len(seen)
        gave_up = bool(seen[-1][1])
        for i, (is_rolled_back, _, began) in enumerate(seen):
            if is_rolled_back or (gave_up and i == len(seen) - 1):
                step = first + i
                if self.num_rollbacks == 0 or step - self.last_rollback > RECURRENCE:
                    self.num_rollbacks, self.began = 0, int(began)
                self.num_rollbacks += 1
                self.last_rollback = step
        return gave_up or self.num_rollbacks > 1


def open_checkpoints(
    directory: Path, save_every: int, settings: dict[str, Any]
) -> ocp.CheckpointManager:
    """Returns what saves and restores; refuses the checkpoints of other settings."""
    options = ocp.CheckpointManagerOptions(
        should_save_fn=lambda number, _: number % save_every == 0,
        # One of them is from before the first of two rollbacks.
        max_to_keep=2 + math.ceil(RECURRENCE / save_every),
    )
    names = ("carry", "progress", "settings")
    manager = ocp.CheckpointManager(
        directory.resolve(), options=options, item_names=names
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


def save(
    manager: ocp.CheckpointManager,
    carry: Any,
    progress: Progress,
    settings: dict[str, Any],
) -> None:
    """Saves all that the run needs to go on."""
    args = ocp.args.Composite(
        carry=ocp.args.StandardSave(carry),
        progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
        settings=ocp.args.JsonSave(settings),
    )
    manager.save(progress.num_batches, args=args, force=True)


def restore(
    manager: ocp.CheckpointManager, number: int, like: Any
) -> tuple[Any, Progress]:
    """Returns what `save` was given, with the shardings of `like`."""
    args = ocp.args.Composite(
        carry=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore()
    )
    found = manager.restore(number, args=args)
    return found["carry"], Progress(**found["progress"])


def rewind(
    manager: ocp.CheckpointManager, progress: Progress, like: Any, max_rewinds: int
) -> tuple[Any, Progress]:
    """Goes back to the last checkpoint from before the explosion, but not in the data.

    Parameters, moments, learned limits, the step: all is as it was then, as if the
    batches since did not exist. They are not read again: there is something in them, or
    in their order, that these parameters do not survive.
    """
    if progress.num_rewinds >= max_rewinds:
        raise optaxclip.ExplosionError(
            f"the explosion that began on step {progress.began} would be rewind "
            f"{progress.num_rewinds + 1}, and --max-rewinds is {max_rewinds}. If "
            "other batches do not help, try a smaller learning rate."
        )
    manager.wait_until_finished()
    # Earlier rewinds have left steps behind the batches, by which checkpoints count.
    began = progress.began + progress.num_batches - progress.step
    older = [number for number in manager.all_steps() if number < began]
    if not older:
        raise optaxclip.ExplosionError(
            f"no checkpoint is from before step {progress.began}, on which the "
            "explosion began: try a smaller learning rate or --save-every"
        )
    number = max(older)
    # Later ones hold what is given up, and no rewind or restart shall find them.
    for later in manager.all_steps():
        if later > number:
            manager.delete(later)
    carry, then = restore(manager, number, like)
    now = dataclasses.replace(
        progress,
        step=then.step,
        num_rewinds=progress.num_rewinds + 1,
        num_rollbacks=0,
    )
    if jax.process_index() == 0:
        tqdm.write(
            f"rewind {now.num_rewinds}: rolling back did not end the explosion that "
            f"began on step {progress.began}; back from step {progress.step} to "
            f"{now.step}, past batches {number} to {progress.num_batches - 1}"
        )
    return carry, now
