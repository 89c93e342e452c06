"""Two real processes end with the bits of one, also after one of them was killed."""

import functools
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.tree_util import keystr

import optaxclip
from data_parallel_process import arrays_of, faulty, poisonable
from digits import write_idx

pytestmark = pytest.mark.usefixtures("quick_to_compile")

TESTS = Path(__file__).parents[1]
TIMEOUT = 200  # seconds
NAN_AT, DIE_AT, NUM_STEPS, SAVE_EVERY = 57, 120, 200, 50
FLAGS: dict[str, Any] = {"steps": NUM_STEPS, "save_every": SAVE_EVERY, "hidden": 12}
FLAGS |= {"batch_size": 16, "learning_rate": 0.005}
CLEAN_ROWS = importlib.import_module("data_parallel").read_rows
# From the last step on, each spoils the parameters, and a rollback mends them.
POISON_AT = [110, 130]


@pytest.fixture(scope="module")
def example() -> Any:
    module = importlib.import_module("data_parallel")
    two = jax.devices("cpu")[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: two)
        patch.setattr(jax, "device_count", lambda: len(two))
        # Each run jits the same step again, so it is traced and compiled once.
        patch.setattr(module, "build", functools.cache(poisonable(module.build)))
        patch.setattr(module, "read_rows", faulty(CLEAN_ROWS, nan_at=[NAN_AT]))
        yield module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("digits")
    write_idx(directory)
    return str(directory)


@pytest.fixture(scope="module")
def start(example) -> Any:
    """The parameters and the state before the first step."""
    knobs = {n: x for n, x in FLAGS.items() if n != "save_every"}
    config = example.Config(clip="zclip", **knobs)
    return example.build(config, seed=0, measured=False, wrap=optaxclip.stabilize)[0]


# --- One process, two devices


@pytest.fixture(scope="module")
def one_process(example, data, tmp_path_factory) -> tuple[Any, Path]:
    """An uninterrupted run, and its checkpoints."""
    directory = tmp_path_factory.mktemp("one")
    return example.main(data=data, checkpoints=directory, **FLAGS), directory


def differing(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list:
    """The names of what is not equal bit for bit; the later losses are compared."""
    assert found.keys() == expected.keys()
    losses = expected["losses"][len(expected["losses"]) - len(found["losses"]) :]
    expected = expected | {"losses": losses}
    return [n for n, x in found.items() if x.tobytes() != expected[n].tobytes()]


def leave_out(part: str, directory: Path, like: Any, start: Any) -> None:
    """Rewrites the last checkpoint: what is in `part` is as it was at the start."""
    names = ("carry", "progress", "settings")
    with ocp.CheckpointManager(directory, item_names=names) as manager:
        last = manager.latest_step()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        like = ocp.args.StandardRestore(like)
        read = ocp.args.JsonRestore()
        args = ocp.args.Composite(carry=like, progress=read, settings=read)
        found = manager.restore(last, args=args)
        carry = jax.tree_util.tree_map_with_path(
            lambda path, x, at_start: at_start if part in keystr(path) else x,
            found["carry"],
            start,
        )
        manager.delete(last)
        args = ocp.args.Composite(
            carry=ocp.args.StandardSave(carry),
            progress=ocp.args.JsonSave(found["progress"]),
            settings=ocp.args.JsonSave(found["settings"]),
        )
        manager.save(last, args=args, force=True)


PARTS = {"the recorder": ".record.rows", "a learned limit": ".limit_state"}
PARTS |= {"the limits of detection": ".rule_states"}


@pytest.mark.parametrize(
    "left_out", [None, *(pytest.param(x, marks=pytest.mark.slow) for x in PARTS)]
)
def test_one_process_goes_on(example, one_process, start, data, tmp_path, left_out):
    expected, checkpoints = one_process
    directory = tmp_path / "checkpoints"
    shutil.copytree(checkpoints, directory)
    shutil.rmtree(directory / str(NUM_STEPS))
    if left_out:
        leave_out(PARTS[left_out], directory, expected["carry"], start)
    found = example.main(data=data, checkpoints=directory, **FLAGS)
    assert len(found["losses"]) == SAVE_EVERY
    differs = differing(arrays_of(found), arrays_of(expected))
    if left_out:
        assert any(PARTS[left_out] in name for name in differs)
    else:
        assert not differs


def test_a_run_that_is_done_only_tells(example, one_process, data, capsys):
    expected, directory = one_process
    found = example.main(data=data, checkpoints=directory, **FLAGS)
    assert not len(found["losses"])
    assert not differing(arrays_of(found), arrays_of(expected))
    told = capsys.readouterr().out
    assert "1 of 200 steps exploded: 1 non-finite. 1 was skipped" in told
    assert f"accuracy {expected['accuracy']:.4f}, 2 dev" in told


def test_it_learns(one_process):
    result, _ = one_process
    assert result["accuracy"] > 0.8  # by chance: 0.1
    assert not np.isfinite(result["losses"][NAN_AT])
    assert np.isfinite(np.delete(result["losses"], NAN_AT)).all()


# --- A rewind


def continued(one_process: Any, directory: Path, *, last: int = 100) -> dict[str, Any]:
    """A copy of the checkpoints up to `last`, as a flag of a run that goes on."""
    shutil.copytree(one_process[1], directory)
    for path in directory.iterdir():
        if int(path.name) > last:
            shutil.rmtree(path)
    return {"checkpoints": directory}


def poison(example: Any, monkeypatch: Any, batches: list[int], nan_at: Any = ()) -> Any:
    faults = {"nan_at": [NAN_AT, *nan_at], "poison_at": batches}
    monkeypatch.setattr(example, "read_rows", faulty(CLEAN_ROWS, **faults))


def numbers(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir())


def test_a_run_rewinds_and_ends_well(
    example, one_process, data, tmp_path, monkeypatch, capsys
):
    poison(example, monkeypatch, [160, 180])
    flags = FLAGS | continued(one_process, tmp_path / "rewound", last=150)
    found = example.main(data=data, **flags)
    told = capsys.readouterr().out
    (line,) = [x for x in told.splitlines() if "rewind" in x]
    assert line == (
        "rewind 1: rolling back did not end the explosion that began on step 161; back "
        "from step 200 to 150, past batches 150 to 199"
    )
    assert "1 of 200 steps exploded: 1 non-finite. 1 was skipped" in told
    assert len(found["losses"]) == 50 + 50
    assert found["accuracy"] > 0.8
    assert numbers(flags["checkpoints"]) == [0, 50, 100, 150, 200, 250]


@pytest.mark.slow
def test_a_rewind_is_as_if_its_batches_did_not_exist(
    example, one_process, data, tmp_path, monkeypatch, capsys
):
    poison(example, monkeypatch, POISON_AT)
    flags = FLAGS | continued(one_process, tmp_path / "rewound") | {"data": data}
    found = example.main(**flags)
    assert "past batches 100 to 149" in capsys.readouterr().out

    # Killed after it, the run does not read them either, nor rewind again.
    for number in (200, 250):
        shutil.rmtree(flags["checkpoints"] / str(number))
    again = example.main(**flags)
    assert "rewind" not in capsys.readouterr().out
    assert len(again["losses"]) == 100
    assert not differing(arrays_of(again), arrays_of(found))

    # The loader of this run begins behind them.
    flags |= continued(one_process, tmp_path / "skipping")
    load = example.load_batches

    def load_later(*args):
        loader = load(*args)
        loader.set_state({"next_index": 150})
        monkeypatch.setattr(type(loader), "set_state", lambda *_: None)
        return loader

    monkeypatch.setattr(example, "load_batches", load_later)
    skipping = example.main(**flags)
    assert len(skipping["losses"]) == 100
    assert not differing(arrays_of(skipping), arrays_of(found))


@pytest.mark.slow
def test_rewinds_come_to_an_end(
    example, one_process, data, tmp_path, monkeypatch, capsys
):
    poison(example, monkeypatch, [10 + i for i in range(100, 500, 20)])
    flags = FLAGS | continued(one_process, tmp_path / "rewound") | {"data": data}
    with pytest.raises(optaxclip.ExplosionError, match="would be rewind 3, and --max"):
        example.main(max_rewinds=2, **flags)
    lines = [x for x in capsys.readouterr().out.splitlines() if "rewind" in x]
    first, second = (x.partition("; ")[2] for x in lines)
    assert first == "back from step 150 to 100, past batches 100 to 149"
    assert second == "back from step 150 to 100, past batches 150 to 199"
    # The same command ends in the same way, and one that allows more goes on.
    for more in (0, 1):
        with pytest.raises(optaxclip.ExplosionError, match=f"rewind {3 + more}, and"):
            example.main(max_rewinds=2 + more, **flags)


@pytest.mark.slow
def test_a_run_that_gave_up_rewinds(
    example, one_process, data, tmp_path, monkeypatch, capsys
):
    poison(example, monkeypatch, [], nan_at=range(75, 201))
    flags = FLAGS | continued(one_process, tmp_path / "rewound", last=50)
    flags |= {"data": data}
    found = example.main(**flags)
    told = capsys.readouterr().out
    assert "began on step 75; back from step 200 to 50, past batches 50 to 199" in told
    assert len(found["losses"]) == 150 + 150
    assert found["accuracy"] > 0.8
    # Those of steps 100 and 150 are gone: nothing goes back into the explosion.
    assert numbers(flags["checkpoints"]) == [0, 50, 200, 250, 300, 350]


def test_no_rewind_without_a_checkpoint_from_before(example, one_process):
    _, directory = one_process
    before = numbers(directory)
    with example.open_checkpoints(directory, SAVE_EVERY, {}) as manager:
        progress = example.Progress(num_batches=200, step=200, began=0)
        with pytest.raises(optaxclip.ExplosionError, match="is from before step 0, on"):
            example.rewind(manager, progress, None, 3)
        with pytest.raises(optaxclip.ExplosionError, match="be rewind 1, and --max-re"):
            example.rewind(manager, progress, None, 0)
    assert numbers(directory) == before


ROLLBACK, GAVE_UP = (1, 0), (0, 1)


@pytest.mark.parametrize(
    ("events", "expected", "began"),
    [
        ({}, False, 0),
        ({40: ROLLBACK}, False, 35),
        ({40: ROLLBACK, 90: ROLLBACK}, True, 35),
        ({40: ROLLBACK, 340: ROLLBACK}, True, 35),
        ({40: ROLLBACK, 341: ROLLBACK}, False, 336),
        ({40: ROLLBACK, 341: ROLLBACK, 350: ROLLBACK}, True, 336),
        ({399: GAVE_UP}, True, 394),
        (dict.fromkeys(range(380, 399), GAVE_UP), False, 0),  # and got over it
        ({390: ROLLBACK, 399: GAVE_UP}, True, 385),
    ],
)
@pytest.mark.parametrize("every", [400, 50])
def test_what_calls_for_a_rewind(example, events, expected, began, every):
    """Whether looked at once, or every 50 steps."""
    progress, decided = example.Progress(), []
    for start in range(0, 400, every):
        steps = range(start, start + every)
        progress.step += every
        seen = [[*events.get(i, (0, 0)), i - 5] for i in steps]
        decided.append(progress.must_rewind(seen))
    assert any(decided) == expected
    assert progress.began == began


# --- Two processes


class Processes:
    """Some processes of the example, each with one device, on this machine."""

    def __init__(self, directory: Path, data: str, *, num: int = 2, **faults: Any):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{sock.getsockname()[1]}"
        flags = FLAGS | {"data": data, "checkpoints": directory / "checkpoints"}
        flags |= {"coordinator": address, "num_processes": num}
        more = {
            "JAX_COMPILATION_CACHE_DIR": str(Path(data) / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PLATFORMS": "cpu",
            # With the folders that pytest adds for the tests.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            # Of steps that wait for each other on two cores, few threads are faster.
            "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
        }
        # One device each, and no proxy on the way to 127.0.0.1.
        env = {
            name: value
            for name, value in os.environ.items()
            if name != "JAX_NUM_CPU_DEVICES" and not name.lower().endswith("_proxy")
        }
        # All else as here, or the bits would differ.
        flags_of_xla = [
            flag
            for flag in env.pop("XLA_FLAGS", "").split()
            if not flag.startswith("--xla_force_host_platform_device_count")
        ]
        if flags_of_xla:
            env["XLA_FLAGS"] = " ".join(flags_of_xla)
        self.outputs = [directory / f"{i}.npz" for i in range(num)]
        self.logs = [directory / f"{i}.log" for i in range(num)]
        self.processes = []
        for i in range(num):
            command = [sys.executable, TESTS / "data_parallel_process.py"]
            faults.setdefault("nan_at", [NAN_AT])
            command += [self.outputs[i], json.dumps(faults)]
            for name, value in (flags | {"process_id": i}).items():
                command += [f"--{name.replace('_', '-')}", value]
            with self.logs[i].open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        list(map(str, command)), stdout=log, stderr=log, env=env | more
                    )
                )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends those that still run: as a scheduler does when one has died."""
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self) -> None:
        """Until all have ended, and well."""
        try:
            codes = [process.wait(TIMEOUT) for process in self.processes]
        except subprocess.TimeoutExpired:
            codes = None
        told = [log.read_text()[-3000:] for log in self.logs]
        assert codes == [0] * len(told), "\n".join(told)

    def results(self) -> list[dict[str, np.ndarray]]:
        """What stands on the device of each in the end."""
        return [dict(np.load(output)) for output in self.outputs]


def killed_and_started_again(
    directory: Path,
    data: str,
    between=None,
    *,
    die_at: int = DIE_AT,
    die_after: str | None = None,
    **faults: Any,
) -> Processes:
    """Two processes, one of which was killed on the way, after all have ended."""
    death = {"die_at": die_at, "die_after": die_after}
    with Processes(directory, data, **death, **faults) as killed:
        assert killed.processes[1].wait(TIMEOUT) == -signal.SIGKILL
    if between:
        between(directory / "checkpoints")
    with Processes(directory, data, **faults) as processes:
        processes.wait()
    return processes


@pytest.mark.slow
def test_two_of_which_one_was_killed_do_what_one_does(
    example, one_process, data, tmp_path
):
    processes = killed_and_started_again(tmp_path, data)
    expected = arrays_of(one_process[0])
    first, second = processes.results()
    # They went on from the last checkpoint that was complete when one died, a few
    # steps before: batches are read ahead.
    assert NUM_STEPS - DIE_AT <= len(first["losses"]) <= NUM_STEPS - SAVE_EVERY
    assert not differing(first, second)
    assert not differing(first, expected)
    log, other_log = (path.read_text() for path in processes.logs)
    assert "1 of 200 steps exploded: 1 non-finite. 1 was skipped" in log
    assert "exploded" not in other_log  # only one of them talks

    last = tmp_path / "checkpoints" / str(NUM_STEPS)
    for i in range(2):  # each has written a part
        assert (last / "carry" / f"ocdbt.process_{i}").exists()
    shutil.rmtree(last)
    found = example.main(data=data, checkpoints=last.parent, **FLAGS)
    assert len(found["losses"]) == SAVE_EVERY
    assert not differing(arrays_of(found), expected)


@pytest.mark.slow
def test_two_rewind_and_go_on_when_one_was_killed(
    example, one_process, data, tmp_path, monkeypatch, capsys
):
    poison(example, monkeypatch, POISON_AT)
    directory = tmp_path / "one"
    flags = FLAGS | continued(one_process, directory)
    expected = example.main(data=data, **flags)
    assert "past batches 100 to 149" in capsys.readouterr().out
    continued(one_process, tmp_path / "checkpoints")
    processes = killed_and_started_again(
        tmp_path,
        data,
        die_at=180,
        die_after=str(tmp_path / "checkpoints" / "150"),
        poison_at=POISON_AT,
    )
    for found, log in zip(processes.results(), processes.logs, strict=True):
        assert len(found["losses"]) == 100  # from the checkpoint after the rewind
        assert not differing(found, arrays_of(expected))
        assert "rewind" not in log.read_text()
    assert numbers(tmp_path / "checkpoints") == numbers(directory)


@pytest.mark.slow
def test_two_that_were_not_interrupted(one_process, data, tmp_path):
    with Processes(tmp_path, data) as processes:
        processes.wait()
    for found in processes.results():
        assert len(found["losses"]) == NUM_STEPS
        assert not differing(found, arrays_of(one_process[0]))


@pytest.mark.slow
@pytest.mark.parametrize("left_out", PARTS)
def test_two_that_have_forgotten(one_process, start, data, tmp_path, left_out):
    result, _ = one_process
    part = PARTS[left_out]
    forget = functools.partial(leave_out, part, like=result["carry"], start=start)
    processes = killed_and_started_again(tmp_path, data, between=forget)
    for found in processes.results():
        differs = differing(found, arrays_of(result))
        assert any(part in name for name in differs)


# --- Mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"steps": 0}, "^steps must be positive, got 0"),
        ({"save_every": 0}, "^save_every must be positive"),
        ({"learning_rate": float("nan")}, "^learning_rate must be positive, got nan"),
        ({"batch_size": 21}, "^batch_size must be a multiple of 2 devices, got 21"),
        ({"process_id": 1}, "^give --coordinator, --num-processes and --process-id"),
        ({"process_id": 0, "cluster": True}, "or --cluster alone"),
        ({"seed": 1}, "holds a run with seed=0, not 1: give another"),
        ({"hidden": 13}, "holds a run with hidden=12, not 13"),
    ],
    ids=str,
)
def test_mistakes_are_told(example, one_process, data, flags, message):
    _, directory = one_process
    before = sorted(directory.rglob("*"))
    with pytest.raises(ValueError, match=message):
        example.main(data=data, checkpoints=directory, **(FLAGS | flags))
    assert sorted(directory.rglob("*")) == before


def test_a_cluster_is_asked(example, monkeypatch):
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *x: given.append(x))
    example.join(None, None, None, False)
    example.join(None, None, None, True)
    example.join("host:1", 2, 1, False)
    assert given == [(), ("host:1", 2, 1)]


def test_no_cluster_is_told(example, monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"^--cluster: coordinator_address should"):
        example.join(None, None, None, True)
