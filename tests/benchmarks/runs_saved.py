"""`stabilize` saves runs that end badly without it, and leaves healthy ones alone.

    python tests/benchmarks/runs_saved.py

Every run of the zoo is trained for several seeds, without protection and under each
arm, from the same parameters on the same batches, and judged by its own measure (the
loss in float32 on clean batches, minus the return, the error of values, the distance of
samples): its median over the last tenth of the steps. With `reference` for the best end
of the same run, unprotected, at 1/4, 1/16 and 1/64 of its step size, clean where the
step size is not the cause, and `start` for the measure of the first parameters, an end
is healthy if it is at most

    reference + max(0.2 * |reference|, (start - reference) / 2)

A seed counts as exploding if it ends unhealthy without protection and, on the way, the
loss or a gradient was non-finite or the loss exceeded three times its first. A healthy
run is harmed if the mean of its measure over the seeds ends more than 10 % higher; for
measures of either sign, 10 % of what was learned.

Intervals are Wilson's for 95 %, on the number of runs: seeds of a run are alike.
"""

import datetime
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tyro

import optaxclip
import zoo
from optaxclip.explosions.rules import RULES
from optaxclip.explosions.state import COUNTS
from tasks.running import (
    CAUSES,
    HEALTHY,
    Trained,
    find_skips,
    highest,
    reference,
    train,
    unprotected,
)

# Each protects an optimizer. All are called with `value=loss`.
ARMS: dict[str, Callable[[Any], Any]] = {
    "clip": lambda optimizer: optax.chain(optax.clip_by_global_norm(1.0), optimizer),
    "apply_if_finite": lambda optimizer: optax.apply_if_finite(optimizer, 5),
    "stabilize": optaxclip.stabilize,
    "no rollback": functools.partial(optaxclip.stabilize, rollback=False),
}
MAX_HARM = 1.1
KINDS = *CAUSES, HEALTHY


class Bare(NamedTuple):
    """How a run ends without protection; `[seeds]` each."""

    end: np.ndarray
    start: np.ndarray
    limit: np.ndarray
    """The largest measure of a healthy end; +inf for healthy runs."""
    is_counted: np.ndarray
    """bool: explodes and ends unhealthy; of a healthy run, ends finite."""


class Ends(NamedTuple):
    """How a run ended under one arm."""

    is_good: np.ndarray
    """bool `[seeds]`: of an exploding run, whether it is healthy now."""
    ratios: np.ndarray
    """`[seeds]`: of a healthy run, its measure in units of that without protection."""
    ratio: float
    """The same of the means over the seeds."""
    slow: float
    """The largest share, over seeds, of steps with less than half the step size."""
    story: str
    """What happened, of the seed that ended worst."""


def explodes(found: Trained) -> np.ndarray:
    """bool `[seeds]`: by the losses that an unprotected run reduces, and its norms."""
    is_finite = np.isfinite(found.loss).all(1) & np.isfinite(found.norms).all((1, 2))
    with np.errstate(invalid="ignore"):
        rises = np.nanmax(found.loss, axis=1) > 3 * np.abs(found.loss[:, 0])
    return ~is_finite | rises


def ratio(end: Any, bare: Any, start: Any) -> np.ndarray:
    """Of two measures; of what was learned, where a measure has either sign.

    What is learned to less than 1 % of the start counts as 1 %.
    """
    end, bare, start = (np.asarray(x, float) for x in (end, bare, start))
    learned = np.maximum(start - bare, 1e-30)
    least = 0.01 * np.abs(start) + 1e-30
    signed = (bare < 0) | (start < 0)
    positive = np.maximum(end, least) / np.maximum(bare, least)
    return np.where(signed, 1 + (end - bare) / learned, positive)


def story(found: Trained, seed: int) -> str:
    """What the state of a `stabilize` says in the end; "" of any other arm."""
    counts = np.zeros(len(COUNTS.names), int)
    skips = find_skips(found.state)
    for skip in skips:
        counts += np.asarray(skip.explosions.record.counts)[seed]
    now = COUNTS.unpack(counts)
    rules = ", ".join(f"{rule} {now[rule]}" for rule in RULES if now[rule])
    return (
        f"{rules or 'nothing noticed'}; {now['skipped']} skipped, {now['rollbacks']} "
        f"rollbacks, scale {found.scale[seed, -1]:.2g}"
        if skips
        else ""
    )


def without_protection(name: str, seeds: int, cache: Path | None) -> Bare:
    """Trains a run and, where it explodes, its references; or reads what they gave."""
    file = cache and cache / f"{name}, {seeds}.npz"
    if file and file.exists():
        return Bare(**np.load(file))
    run = zoo.run_of(name)
    found = train(run, unprotected, seeds)
    limit, is_counted = np.full(seeds, np.inf), np.isfinite(found.end)
    if run.kind != HEALTHY:
        best, start = reference(run, seeds)
        limit = highest(best, start)
        is_counted = (found.end > limit) & explodes(found) & (best < start)
    bare = Bare(found.end, found.start, limit, is_counted)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **bare._asdict())
    return bare


def judge(bare: Bare, found: Trained) -> Ends:
    """Compares the ends of a protected run with those of the bare one."""
    ratios = ratio(found.end, bare.end, bare.start)
    is_healthy = np.isinf(bare.limit).all()
    ends = np.where(np.isfinite(found.end), found.end, np.inf)
    worst = int(np.argmax(ratios if is_healthy else ends))
    return Ends(
        is_good=np.asarray(found.end <= bare.limit),
        ratios=ratios,
        ratio=float(ratio(*(np.mean(x) for x in (found.end, bare.end, bare.start)))),
        slow=float(np.mean(found.scale < 0.5, axis=1).max()),
        story=story(found, worst),
    )


def interval(num: float, total: int) -> str:
    """A share and Wilson's interval for 95 %, in percent."""
    if not total:
        return "-"
    z, share = 1.96, num / total
    middle = share + z**2 / (2 * total)
    width = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    low, high = ((middle + sign * width) / (1 + z**2 / total) for sign in (-1, 1))
    return f"{100 * share:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def summarize(
    arm: str, ends: dict[str, Ends], counted: dict[str, np.ndarray]
) -> list[str]:
    """The lines of the table for one arm: each part, and in each part each kind.

    Also all that explode, whatever the cause.
    """
    lines = []
    for part in zoo.PARTS:
        names = [n for n in ends if zoo.part_of(n) == part and n in counted]
        by_kind = {k: [n for n in names if zoo.kind_of(n) == k] for k in KINDS}
        exploding = [n for n in names if zoo.kind_of(n) != HEALTHY]
        rows = by_kind | {"all that explode": exploding}
        for kind, found in ((kind, found) for kind, found in rows.items() if found):
            if kind == HEALTHY:
                harmed = [n for n in found if ends[n].ratio > MAX_HARM]
                worst = max(ends[n].ratios.max() for n in found)
                slow = max(ends[n].slow for n in found)
                lines.append(
                    f"{arm:16} {part:5} {kind:16} harmed "
                    f"{len(harmed)} of {len(found)}: "
                    f"{interval(len(harmed), len(found))} %; worst seed x{worst:.2f}; "
                    f"slow steps up to {100 * slow:.1f} %"
                )
                continue
            shares = [np.mean(ends[n].is_good[counted[n]]) for n in found]
            lines.append(
                f"{arm:16} {part:5} {kind:16} saved {sum(shares):.1f} of {len(found)}: "
                f"{interval(float(sum(shares)), len(found))} %"
            )
    return lines


def all_kinds(arm: str, ends: dict[str, Ends], counted: dict[str, np.ndarray]) -> str:
    """One sentence on all parts together."""
    exploding = [n for n in counted if zoo.kind_of(n) != HEALTHY]
    shares = [np.mean(ends[n].is_good[counted[n]]) for n in exploding]
    healthy = [n for n in counted if zoo.kind_of(n) == HEALTHY]
    harmed = [n for n in healthy if ends[n].ratio > MAX_HARM]
    return (
        f"With {arm}, {interval(float(sum(shares)), len(shares))} % of {len(shares)} "
        f"exploding runs end healthy, and {interval(len(harmed), len(healthy))} % of "
        f"{len(healthy)} healthy runs are harmed."
    )


def main(
    *,
    arms: tuple[str, ...] = tuple(ARMS),
    runs: tuple[str, ...] = (),
    seeds: int = 4,
    optimized: bool = False,
    cache: Path | None = None,
) -> None:
    """Prints how each run ends under each arm; what each arm saves, and what it harms.

    Args:
        arms: Those beside no protection.
        runs: Kinds, parts, or what is in their names; by default all runs.
        seeds: How many of each run.
        optimized: Whether XLA is to optimize, which takes longer than these runs do.
        cache: Folder to keep in, or read from, how runs end without protection: that
            depends on the tasks alone, and takes most of the time.
    """
    jax.config.update("jax_disable_most_optimizations", not optimized)
    device, today = jax.devices()[0].platform, datetime.date.today()
    print(f"JAX {jax.__version__} on {device}, {os.cpu_count()} cores, {today}.")
    ends: dict[str, dict[str, Ends]] = {arm: {} for arm in arms}
    counted: dict[str, np.ndarray] = {}
    for name in zoo.names():
        run = zoo.run_of(name)
        groups = run.kind, zoo.part_of(name)
        if runs and not any(
            x in groups if x in (*KINDS, *zoo.PARTS) else x in name for x in runs
        ):
            continue
        bare = without_protection(name, seeds, cache)
        print(f"{name} ({run.kind}): {_numbers(bare.end)}", end="")
        is_healthy = run.kind == HEALTHY
        print("" if is_healthy else f", healthy up to {_numbers(bare.limit)}")
        if bare.is_counted.any():
            counted[name] = bare.is_counted
        for arm in arms:
            found = train(run, ARMS[arm], seeds)
            ends[arm][name] = judge(bare, found)
            said = f"    {arm}: {_numbers(found.end)} {ends[arm][name].story}"
            print(said, flush=True)
    print(f"\nNot counted: {', '.join(set(ends[arms[0]]) - set(counted)) or 'none'}.")
    for arm in arms:
        print("\n".join(["", *summarize(arm, ends[arm], counted)]))
        print(all_kinds(arm, ends[arm], counted))
    for arm in arms:
        if arm.startswith("stab"):
            print("\n".join(["", *failures(ends[arm], counted)]))


def failures(ends: dict[str, Ends], counted: dict[str, np.ndarray]) -> list[str]:
    """Each run that was not saved for all seeds, or was harmed, with what happened."""
    return [
        f"{name}: {end.story}"
        for name, end in ends.items()
        if name in counted
        and (
            end.ratio > MAX_HARM
            if zoo.kind_of(name) == HEALTHY
            else not end.is_good[counted[name]].all()
        )
    ]


def _numbers(values: Sequence[float] | np.ndarray) -> str:
    return " ".join(f"{x:.3g}" for x in values)


if __name__ == "__main__":
    tyro.cli(main)
