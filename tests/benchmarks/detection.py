"""The default rules of `detect_explosions` notice explosions that published ones miss.

They also raise the fewest false alarms, but for a check for NaN and inf alone.

    python tests/benchmarks/detection.py [--split heldout] [--zoo]

Every rule sees the loss and the norms of 72 recorded runs, step by step. Runs, labels
and what counts as caught: `tests/data/traces/README.md`. Rules are tuned on the split
"open" and reported on "heldout" too, and with `--zoo` on the healthy runs of the zoo.
Intervals of 95 % are of 200 draws of as many runs of each group.
"""

import dataclasses
import datetime
import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import optaxclip
from optaxclip.explosions.leading import fitted_growth
from optaxclip.explosions.rules import RULES
from optaxclip.packing import flags_of
from optaxclip.ring import rows_of

DATA = Path(__file__).parents[1] / "data" / "traces"

GROUPS = ("A.fast", "A.mid", "A.finite", "A.scale", "B", "D.nonfin", "D.layer")
TOO_LATE = {"A.fast": "t_nf", "A.mid": "t_nf", "A.finite": "t_div", "D.layer": "t_dom"}
"""Where a run explodes once: the label of the step at which it is too late."""

NUM_EARLY = 50
"""So many first steps have a column of their own."""
NUM_LATE = 2
"""A spike is caught up to so many steps late."""
NUM_UNSETTLED = 20
"""Steps after a spike that are neither healthy nor one."""
NUM_CHANGING = 200
"""Steps within which a rule may flag a legitimate change."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a detector sees of one run, and what is known of it.

    Attributes:
        loss: float64 `[num_steps]`.
        norm: Global norm of the gradients, float64 `[num_steps]`.
        leaves: Norms of their leaves, float64 `[num_steps, num_leaves]`.
        labels: See the README of the traces.
    """

    loss: np.ndarray
    norm: np.ndarray
    leaves: np.ndarray
    labels: dict[str, Any]

    @property
    def group(self) -> str:
        family, kind = self.labels["fam"], self.labels["kind"]
        if family == "A":
            names = {"adam_scale": "A.scale", "finite": "A.finite"}
            return names.get(kind, "A.fast" if self.labels["t_nf"] < 64 else "A.mid")
        if family == "D":
            return "D.layer" if kind == "layer" else "D.nonfin"
        return family

    @property
    def window(self) -> slice:
        """The steps on which a flag has caught the explosion of the run."""
        up, no_return = self.labels["t_up"], self.labels["t_pnr"]
        too_late = self.labels[TOO_LATE[self.group]]
        if self.group == "D.layer":
            return slice(max(0, up - 20), too_late)
        if self.group == "A.finite":
            return slice(max(0, no_return - 50), too_late + NUM_LATE + 1)
        return slice(max(0, min(no_return, up) - 50, too_late - 300), too_late)

    @property
    def is_healthy(self) -> np.ndarray:
        """On which steps a flag is a false alarm."""
        healthy = np.full(len(self.loss), self.group in ("B", "C", "D.nonfin"))
        healthy[0] = False
        for event in self.labels["events"]:
            healthy[event["t"] : event["t"] + NUM_UNSETTLED + 1] = False
        for change in self.labels["changes"]:
            healthy[change : change + NUM_CHANGING] = False
        if self.labels["t_nf"] >= 0 and '"guard": 1' not in self.labels["settings"]:
            healthy[self.labels["t_nf"] :] = False
        return healthy


def load(split: str = "open") -> list[Trace]:
    """The recorded runs of a split, "open" or "heldout"."""
    with np.load(DATA / f"{split}.npz") as file:
        loss, norm, leaves = (
            file[name].astype(np.float64) for name in ("loss", "gnorm", "leaf")
        )
        runs = json.loads(file["meta"].tobytes())
    traces = []
    for labels in runs:
        num_steps, num_leaves = labels["T"], len(labels["leaves"])
        head, leaves = np.split(leaves, [num_steps * num_leaves])
        traces.append(
            Trace(
                loss[:num_steps],
                norm[:num_steps],
                head.reshape(num_leaves, num_steps).T,
                labels,
            )
        )
        loss, norm = loss[num_steps:], norm[num_steps:]
    return traces


def first_flag(trace: Trace, flags: np.ndarray) -> int | None:
    """The first step in the window with a flag."""
    steps = np.flatnonzero(flags[trace.window])
    return int(trace.window.start + steps[0]) if len(steps) else None


class Score(NamedTuple):
    """How well the flags of a detector fit the labels."""

    recall: dict[str, float]
    """Percent caught of the explosions of each of the `GROUPS`."""
    macro: float
    """The mean of these."""
    lead: dict[str, float]
    """Median number of steps from the first flag until it is too late; 0 if missed."""
    false_alarms: float
    """Flags in 10,000 healthy steps."""
    early: float
    """The same for steps 1 to 49, which do not count above."""
    recovery: float
    """Percent of the legitimate changes after which at most 4 of the steps 200 to 399
    are flagged."""
    mean_flags: float
    """On the first 200 steps of such a change."""
    max_flags: int
    alive: float
    """Percent caught of the spikes after a non-finite step."""


def score(traces: Sequence[Trace], flags: Iterable[np.ndarray]) -> Score:
    """Judges bool `[num_steps]` for each trace."""
    caught: dict[str, list[bool]] = {group: [] for group in GROUPS}
    leads: dict[str, list[int]] = {group: [] for group in TOO_LATE}
    early, later, alive, recovered, num_flags = [], [], [], [], []
    for trace, flag in zip(traces, flags, strict=True):
        group = trace.group
        if group in TOO_LATE:
            first = first_flag(trace, flag)
            caught[group].append(first is not None)
            too_late = trace.labels[TOO_LATE[group]]
            leads[group].append(0 if first is None else too_late - first)
        for event in trace.labels["events"]:
            is_caught = any(flag[event["t"] : event["t"] + NUM_LATE + 1])
            is_after_nonfinite = group == "D.nonfin" and event["kind"] != "nonfinite"
            (alive if is_after_nonfinite else caught[group]).append(is_caught)
        for change in trace.labels["changes"]:
            during, after = np.split(flag[change : change + 400], [NUM_CHANGING])
            num_flags.append(int(during.sum()))
            recovered.append(after.sum() <= 4)
        healthy = trace.is_healthy
        early.append(flag[:NUM_EARLY][healthy[:NUM_EARLY]])
        later.append(flag[NUM_EARLY:][healthy[NUM_EARLY:]])
    recall = {group: 100 * float(np.mean(x)) for group, x in caught.items()}
    return Score(
        recall=recall,
        macro=float(np.mean(list(recall.values()))),
        lead={group: float(np.median(x)) for group, x in leads.items()},
        false_alarms=1e4 * float(np.mean(np.concatenate(later))),
        early=1e4 * float(np.mean(np.concatenate(early))),
        recovery=100 * _mean(recovered),
        mean_flags=_mean(num_flags),
        max_flags=max(num_flags, default=0),
        alive=100 * _mean(alive),
    )


def _mean(values: Sequence[float]) -> float:
    """NaN where there is none, as of the changes in some draws of runs."""
    return float(np.mean(values)) if values else math.nan


def intervals(
    traces: Sequence[Trace], flags: Sequence[np.ndarray], num: int = 200
) -> dict[str, tuple[float, float]]:
    """95 % of mean recall, false alarms and early ones, over draws of runs."""
    rng = np.random.default_rng(0)
    groups: dict[str, list[int]] = {}
    for i, trace in enumerate(traces):
        groups.setdefault(trace.group, []).append(i)
    found = []
    for _ in range(num):
        drawn = np.concatenate([rng.choice(x, len(x)) for x in groups.values()])
        scored = score([traces[i] for i in drawn], [flags[i] for i in drawn])
        found.append((scored.macro, scored.false_alarms, scored.early))
    low, high = np.percentile(found, [2.5, 97.5], axis=0)
    names = "recall", "false alarms", "early"
    return {name: (low[i], high[i]) for i, name in enumerate(names)}


def num_rows_of_three(flags: np.ndarray) -> int:
    """How often three or more steps in a row are flagged."""
    third = flags[2:] & flags[1:-1] & flags[:-2]
    return int(third[0] + np.sum(third[1:] & ~third[:-1]))


def healthy_runs(part: str) -> tuple[list[Trace], list[str]]:
    """The healthy runs of a part of the zoo without protection, and their names."""
    import zoo
    from tasks.running import HEALTHY, train, unprotected

    traces, names = [], []
    for name in zoo.names():
        if zoo.kind_of(name) == HEALTHY and zoo.part_of(name) == part:
            found = train(zoo.run_of(name), unprotected)
            for loss, leaves in zip(found.loss, found.norms, strict=True):
                traces.append(Trace(loss, np.zeros(len(loss)), leaves, {}))
                names.append(name)
    return traces, names


def flagged(flags: Sequence[np.ndarray]) -> tuple[float, float, list[int]]:
    """Flags in 10,000 steps, late and early, and which runs meet three in a row."""
    early, late = (
        1e4 * float(np.mean([flag[part] for flag in flags]))
        for part in (slice(1, NUM_EARLY), slice(NUM_EARLY, None))
    )
    return late, early, [i for i, flag in enumerate(flags) if num_rows_of_three(flag)]


def describe_zoo() -> str:
    """Says what the rules flag of healthy runs that they were not made on."""
    import zoo

    lines = []
    for part in zoo.PARTS:
        traces, names = healthy_runs(part)
        late, early, rows = flagged([verdict.flags for verdict in watch(traces)])
        lines.append(
            f"Zoo, {part}: {late:.1f} flags in 10,000 steps of {len(traces)} healthy "
            f"runs, early {early:.1f}; {len(rows)} meet three in a row: "
            f"{', '.join(dict.fromkeys(names[i] for i in rows)) or 'none'}."
        )
    return "\n".join(lines)


class Verdict(NamedTuple):
    """What `detect_explosions` says of each step of a trace."""

    fired: Any
    """bool `[num_steps, 4]`: which of the `RULES`."""
    leaf: Any
    """int32 `[num_steps]`: the leaf that led."""
    growth: Any
    """float32 `[num_steps]`: of the norm in a step, fitted to the last eight."""

    @property
    def flags(self) -> np.ndarray:
        return self.fired.any(axis=1)


@functools.cache
def watcher(num_leaves: int, make: Callable[[], Any]) -> Callable[..., Any]:
    detect = make()

    def watch_step(state, signals):
        loss, norms = signals
        # The norm of a scalar is its absolute value.
        _, state = detect.update(list(norms), state, value=loss)
        record = state["explosions"].record
        last, _ = rows_of(record, record.num_steps - 1)
        leaf = last["leaf"].astype(jnp.int32)
        fired = flags_of(last["fired"].astype(jnp.int32), len(RULES))
        return state, Verdict(fired, leaf, fitted_growth(record))

    def watch_run(loss, norms):
        state = detect.init([jnp.zeros([])] * num_leaves)
        return jax.lax.scan(watch_step, state, (loss, norms))[1]

    return jax.jit(jax.vmap(watch_run))


def watch(
    traces: Sequence[Trace], make: Callable[[], Any] = optaxclip.detect_explosions
) -> list[Verdict]:
    """Feeds all traces through the detector that `make` gives, side by side.

    Zeros make them equally long and wide; no rule counts a zero as a value.
    """
    num_steps = max(len(trace.loss) for trace in traces)
    num_leaves = max(trace.leaves.shape[1] for trace in traces)
    loss = np.zeros((len(traces), num_steps), np.float32)
    norms = np.zeros((len(traces), num_steps, num_leaves), np.float32)
    for i, trace in enumerate(traces):
        loss[i, : len(trace.loss)] = trace.loss
        norms[i, : len(trace.loss), : trace.leaves.shape[1]] = trace.leaves
    found = jax.device_get(watcher(num_leaves, make)(loss, norms))
    return [
        Verdict(*(x[i, : len(trace.loss)] for x in found))
        for i, trace in enumerate(traces)
    ]


def tell(trace: Trace) -> str:
    """What `explain` says at the end of a run."""
    detect: Any = optaxclip.detect_explosions()
    names = trace.labels["leaves"]

    def step(state, signals):
        loss, norms = signals
        grads = dict(zip(names, norms, strict=True))
        return detect.update(grads, state, value=loss)[1], ()

    params = dict.fromkeys(names, jnp.zeros([]))
    signals = np.float32(trace.loss), np.float32(trace.leaves)
    scan = jax.jit(lambda state: jax.lax.scan(step, state, signals)[0])
    return optaxclip.explain(scan(detect.init(params)), params)


def is_nonfinite(trace: Trace) -> np.ndarray:
    return ~(np.isfinite(trace.loss) & np.isfinite(trace.leaves).all(axis=1))


def past(values: np.ndarray, window: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """The values before each step, `[num_steps, window]`, and which of them exist."""
    padded = np.concatenate([np.zeros(window), values])
    rows = np.lib.stride_tricks.sliding_window_view(padded, window)[:-1]
    return rows, np.arange(window) >= window - np.arange(len(values))[:, None]


def sigma(
    *signals: str,
    multiple: float = 6.0,
    ddof: int = 1,
    least_std: float = 0.0,
    warmup: int = 64,
    ignores_nonfinite: bool = False,
) -> Callable[[Trace], np.ndarray]:
    """Mean and standard deviation of the last 128 steps, if `warmup` are there."""

    def flags(trace):
        found = is_nonfinite(trace) & ignores_nonfinite
        for signal in signals:
            values = getattr(trace, signal)
            rows, where = past(values)
            where = where & (np.isfinite(rows) | (not ignores_nonfinite))
            enough = where.sum(axis=1) >= warmup
            values, rows, where = values[enough], rows[enough], where[enough]
            mean = np.mean(rows, axis=1, where=where)
            std = np.std(rows, axis=1, where=where, ddof=ddof)
            found[enough] |= ~(values - mean <= multiple * np.maximum(std, least_std))
        return found

    return flags


def zclip(trace: Trace) -> np.ndarray:
    """z > 2.5 after 25 steps; an outlier enters the averages as it is clipped."""
    flags = np.zeros(len(trace.norm), bool)
    mean, variance = np.mean(trace.norm[:25]), np.var(trace.norm[:25])
    for step, norm in enumerate(trace.norm[25:], 25):
        std = np.sqrt(variance)
        z = (norm - mean) / (std + 1e-6)
        if z > 2.5:
            flags[step] = True
            norm = mean + 2.5**2 / z * std
        mean = 0.97 * mean + 0.03 * norm
        variance = 0.97 * variance + 0.03 * (norm - mean) ** 2
    return flags


def axlearn(trace: Trace) -> np.ndarray:
    """20 times the moving average of the norms that passed, from 1 on."""
    flags = is_nonfinite(trace)
    mean, num = 1.0, 0
    for step, norm in enumerate(trace.norm):
        if flags[step] or not norm < 20 * mean:
            flags[step] = True
            continue
        decay = 0.99 * (1 - 0.99**num) / (1 - 0.99 ** (num + 1))
        mean, num = decay * mean + (1 - decay) * norm, num + 1
    return flags


def running_median(trace: Trace) -> np.ndarray:
    """10 times the median of the last 128 norms, if 10 are there."""
    flags = np.zeros(len(trace.norm), bool)
    for step in range(10, len(flags)):
        median = np.median(trace.norm[max(0, step - 128) : step])
        flags[step] = not trace.norm[step] <= 10 * median
    return flags


OURS = "detect_explosions"
PEERS: dict[str, Callable[[Trace], np.ndarray]] = {
    "non-finite check": is_nonfinite,
    "OLMo, norm": sigma("norm"),
    "OLMo, loss": sigma("loss"),
    "OLMo": sigma("loss", "norm"),
    "Levanter": sigma("loss", "norm", ddof=0, least_std=1e-6),
    "OLMo, tuned": sigma(
        "loss", "norm", multiple=8.0, warmup=2, ignores_nonfinite=True
    ),
    "ZClip's z > 2.5": zclip,
    "axlearn, 20x mean": axlearn,
    "10x running median": running_median,
    "norm > 100": lambda trace: ~(trace.norm <= 100),
}


def layer_of(leaf: str) -> str:
    """The block of a leaf; the leaves of a recurrent cell are one, its output too."""
    if leaf in ("Wx", "Wh", "b", "bh"):
        return "cell"
    if leaf in ("Wo", "bo"):
        return "output"
    return leaf.split(".")[0]


def named_leaves(trace: Trace, verdict: Verdict) -> list[str]:
    """The leaves that led on the steps of the window that were flagged."""
    leaves = verdict.leaf[trace.window][verdict.flags[trace.window]]
    return [trace.labels["leaves"][leaf] for leaf in leaves]


def describe_names(traces: Sequence[Trace], verdicts: Sequence[Verdict]) -> str:
    """Says how often the leaf that led is the one to look at."""
    named = [
        (trace, names)
        for trace, verdict in zip(traces, verdicts, strict=True)
        if trace.group in TOO_LATE and (names := named_leaves(trace, verdict))
    ]
    towers = [
        [name.startswith("aux.") for name in names]
        for trace, names in named
        if trace.group == "D.layer"
    ]
    runs = [
        (names[0], trace.labels["leaves"][trace.labels["lead_leaf"]])
        for trace, names in named
        if trace.group != "D.layer"
    ]
    same = sum(name == lead for name, lead in runs)
    same_layer = sum(layer_of(name) == layer_of(lead) for name, lead in runs)
    return (
        f"In {sum(all(x) for x in towers)} of the {len(towers)} D.layer runs caught, "
        "every flag in the window names a leaf of the exploding tower "
        f"({sum(x[0] for x in towers)}: the first flag); in {len(runs)} A runs caught "
        f"the first flag names {same} times the leaf that led, {same_layer} times one "
        "of its layer."
    )


def describe_growth(
    traces: Sequence[Trace], verdicts: Sequence[Verdict], least: float
) -> str:
    """Says what the fitted growth is, and what a rule on it would add."""
    pairs = list(zip(traces, verdicts, strict=True))
    healthy = np.concatenate(
        [
            verdict.growth[NUM_EARLY:][trace.is_healthy[NUM_EARLY:]]
            for trace, verdict in pairs
        ]
    )
    firsts = [
        verdict.growth[first]
        for trace, verdict in pairs
        if trace.group == "A.mid"
        and (first := first_flag(trace, verdict.flags)) is not None
    ]
    high, higher = np.percentile(healthy, [99, 99.9])
    low, middle, most = np.percentile(firsts, [25, 50, 75])
    without = score(traces, [verdict.flags for verdict in verdicts])
    added = score(traces, [v.flags | (v.growth > least) for v in verdicts])
    leads = ", ".join(
        f"{group} {without.lead[group]:.3g} -> {added.lead[group]:.3g}"
        for group in TOO_LATE
    )
    return (
        "The growth of the norm in a step, fitted to the last eight, is below "
        f"{high:.3f} on 99 % and {higher:.3f} on 99.9 % of the healthy steps; at the "
        f"first flag of the A.mid runs {middle:.3f} (quartiles {low:.3f} and "
        f"{most:.3f}).\n"
        f"A rule growth > {least:g} beside the defaults: lead {leads}; false alarms "
        f"{without.false_alarms:.1f} -> {added.false_alarms:.1f}, early "
        f"{without.early:.0f} -> {added.early:.0f}, recall {without.macro:.1f} -> "
        f"{added.macro:.1f} %."
    )


def cells(found: Score) -> dict[str, str]:
    """The texts of a row, by the two lines of the header."""
    recalls = {group: f"{found.recall[group]:.0f}" for group in GROUPS}
    leads = {group: f"{found.lead[group]:.3g}" for group in TOO_LATE}
    return {
        **{f"recall\n{group}": text for group, text in recalls.items()},
        "recall\nmean": f"{found.macro:.1f}",
        **{f"lead\n{group}": text for group, text in leads.items()},
        "false\nalarms": f"{found.false_alarms:.1f}",
        "\nearly": f"{found.early:.0f}",
        "changes\nrecovered": f"{found.recovery:.0f}",
        "flags\nmean": f"{found.mean_flags:.1f}",
        "flags\nmost": f"{found.max_flags}",
        "\nalive": f"{found.alive:.0f}",
    }


def compare(scores: dict[str, Score]) -> str:
    """Says what the peers notice: the best of all, and the best of the quiet ones."""
    scores = dict(scores)
    ours = scores.pop(OURS)
    quiet = {k: x for k, x in scores.items() if x.false_alarms <= ours.false_alarms}
    twice = {k: x for k, x in scores.items() if x.false_alarms <= 2 * ours.false_alarms}
    sentences = [
        f"{OURS} notices {ours.macro:.1f} % of the explosions, with "
        f"{ours.false_alarms:.1f} false alarms in 10,000 healthy steps."
    ]
    for which, peers in {
        "Of the peers": scores,
        "Of those with at most twice as many false alarms": twice,
        "Of those with no more": quiet,
    }.items():
        name = max(peers, key=lambda name: peers[name].macro, default="")
        text = f"{which}, none notices any."
        if name:
            text = (
                f'{which}, "{name}" notices most: {peers[name].macro:.1f} %, with '
                f"{peers[name].false_alarms:.1f}."
            )
        sentences.append(text)
    return "\n".join(sentences)


def main(
    *,
    peers: tuple[str, ...] = tuple(PEERS),
    growth: float = 1.5,
    explain: bool = False,
    split: str = "open",
    zoo: bool = False,
) -> None:
    """Prints the score of each detector, and what else ours says.

    Args:
        split: Which recorded runs, "open" or "heldout".
        zoo: Also what ours flags of the healthy runs of the zoo, which takes a while.
        peers: Which to compare with.
        growth: Of the norm in a step, for the rule that ours does not have.
        explain: Also what `optaxclip.explain` says of the D.layer runs.
    """
    traces = load(split)
    verdicts = watch(traces)
    flags = {OURS: [verdict.flags for verdict in verdicts]}
    with np.errstate(all="ignore"):
        flags |= {name: [PEERS[name](trace) for trace in traces] for name in peers}
    scores = {name: score(traces, found) for name, found in flags.items()}

    num_healthy = sum(trace.is_healthy[NUM_EARLY:].sum() for trace in traces)
    device, today = jax.devices()[0].platform, datetime.date.today()
    print(
        f"{len(traces)} runs, {sum(len(trace.loss) for trace in traces)} steps, "
        f"{num_healthy} healthy; JAX {jax.__version__} on {device}, {today}."
    )
    print(
        "Recall in percent; lead in steps until it is too late; false alarms in 10,000 "
        "healthy steps,\nand those before step 50; percent of the changes recovered "
        "from, and flags of each; percent\nof the spikes caught after a NaN."
    )
    headers = [header.split("\n") for header in cells(scores[OURS])]
    widths = [max(map(len, header)) for header in headers]
    for title, texts in [
        *(("", line) for line in zip(*headers, strict=True)),
        *((name, cells(found).values()) for name, found in scores.items()),
    ]:
        pairs = zip(texts, widths, strict=True)
        print(f"{title:18}", *(f"{text:>{width}}" for text, width in pairs))
    print()
    print(compare(scores))
    ranges = [
        f"{name} {low:.1f} to {high:.1f}"
        for name, (low, high) in intervals(traces, flags[OURS]).items()
    ]
    print(f"Intervals of 95 % of {OURS}: {', '.join(ranges)}.")
    fired = {
        rule: int(
            sum(
                verdict.fired[NUM_EARLY:, i][trace.is_healthy[NUM_EARLY:]].sum()
                for trace, verdict in zip(traces, verdicts, strict=True)
            )
        )
        for i, rule in enumerate(RULES)
    }
    print(
        f"It catches {scores[OURS].recall['A.fast']:.0f} % of the runs that explode "
        "within 64 steps before their first non-finite value. Its false alarms are of "
        f"the rules {', '.join(f'{rule} {num}' for rule, num in fired.items())}."
    )
    print(describe_names(traces, verdicts))
    print(describe_growth(traces, verdicts, growth))
    for trace in traces:
        if explain and trace.group == "D.layer":
            print(f"\n{trace.labels['name']}: {tell(trace)}")
    if zoo:
        print(describe_zoo())


if __name__ == "__main__":
    tyro.cli(main)
