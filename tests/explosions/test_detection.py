"""What the default rules of `detect_explosions` reach on recorded runs."""

import importlib
import math
import re
from typing import Any

import numpy as np
import pytest

from optaxclip.explosions.rules import RULES

ROUNDING = 1e-4
"""Of the logarithm of a norm or limit in float32."""


@pytest.fixture(scope="module")
def detection() -> Any:
    return importlib.import_module("detection")


@pytest.fixture(scope="module")
def traces(detection) -> list[Any]:
    return detection.load()


@pytest.fixture(scope="module")
def verdicts(detection, traces) -> list[Any]:
    return detection.watch(traces)


@pytest.fixture(scope="module")
def found(detection, traces, verdicts) -> Any:
    return detection.score(traces, [verdict.flags for verdict in verdicts])


def test_explosions_are_caught(found):
    assert found.macro >= 98.5
    for group in ("A.fast", "A.mid", "A.finite", "A.scale", "D.nonfin", "D.layer"):
        assert found.recall[group] == 100, group
    assert found.lead["A.mid"] >= 4
    # A share counts once its norm has grown twentyfold; at tenfold the lead was 35.
    assert found.lead["D.layer"] >= 9
    assert found.alive == 100


@pytest.mark.slow
def test_the_sweep_of_constants_begins_at_the_defaults(detection, traces, verdicts):
    constants = importlib.import_module("constants")
    chosen = [i for i, x in enumerate(traces) if x.group in ("A.finite", "D.layer")][:8]
    found = detection.watch([traces[i] for i in chosen], constants.variant("norm", {}))
    for i, verdict in zip(chosen, found, strict=True):
        np.testing.assert_array_equal(verdict.fired, verdicts[i].fired)
        assert verdict.fired[:, 1:].any()


def test_healthy_steps_pass(found):
    assert found.false_alarms <= 10
    assert found.early <= 10
    assert found.recovery == 100
    assert found.mean_flags <= 5


def test_exploding_tower_is_named(detection, traces, verdicts):
    layers = [
        detection.named_leaves(trace, verdict)
        for trace, verdict in zip(traces, verdicts, strict=True)
        if trace.group == "D.layer"
    ]
    assert len(layers) == 6
    assert all(names for names in layers)
    assert all(name.startswith("aux.") for names in layers for name in names)


@pytest.mark.slow
def test_explain_names_the_leaf_and_the_step(detection, traces):
    """In all runs in which one tower explodes; in one its start is no longer kept."""
    num_told = 0
    for trace in traces:
        if trace.group != "D.layer":
            continue
        story = detection.tell(trace)
        # Where the loss began it, the first sentence names no leaf.
        leaves = re.findall(r"'(\S+)' had grown most", story)
        assert all(leaf.startswith("aux.") for leaf in leaves), story
        pattern = r"'(\S+)' had grown most, by about \S+ per step since step (\d+)"
        ((leaf, start),) = re.findall(pattern, story)
        assert leaf.startswith("aux."), story
        began = re.findall(r"It began on step (\d+)", story)
        num_told += any(
            trace.labels["t_up"] - 20 <= int(told) < trace.labels["t_dom"]
            for told in (start, *began)
        )
    assert num_told == 5


def naive_scalar(signal, power, ratio, early_jump=5.0, min_level=0.0):
    """How far above its limit each value is, on a logarithmic scale.

    NaN for those that are non-finite, of which the rule need not say anything.
    """
    margins = np.where(np.isfinite(signal), -np.inf, np.nan)
    known = np.flatnonzero((signal > 0) & (signal < np.inf))
    logs = np.log(signal[known])
    least = math.log(min_level) if min_level else -math.inf
    num = np.arange(1, len(logs))
    # The last 128 before each, inf where there are none.
    past = np.concatenate([np.full(128, np.inf), logs])
    past = np.lib.stride_tricks.sliding_window_view(past, 128)[num]
    recent = past[:, -32:]
    largest = np.max(recent, axis=1, where=recent < np.inf, initial=-np.inf)
    limits = np.maximum(largest, least) + math.log(early_jump)
    is_late = num >= 64
    past = np.sort(past[is_late], axis=1)
    last = np.minimum(num[is_late], 128) - 1
    middle, high = (quantile(past, last, q) for q in (0.5, 0.95))
    spread = np.maximum(power * (high - middle), math.log(ratio))
    limit = np.minimum(largest[is_late] + math.log(5), middle + spread)
    limits[is_late] = np.maximum(limit, least + math.log(ratio))
    margins[known[1:]] = logs[1:] - limits
    return margins


def quantile(rows, last, q):
    """Of the first values of each row, which are sorted, up to the place `last`."""
    below = np.floor(q * last).astype(int)
    above = np.minimum(below + 1, last)
    x, y = (np.take_along_axis(rows, i[:, None], 1)[:, 0] for i in (below, above))
    return x + (q * last - below) * (y - x)


def naive_rise(signal):
    """Likewise, above eight times the lowest level, for eight in a row."""
    margins = np.where(np.isfinite(signal), -np.inf, np.nan)
    mean, lowest, num_above = 0.0, math.inf, 0
    known = np.flatnonzero((signal > 0) & (signal < np.inf)).tolist()
    pairs = zip(known, signal[known].tolist(), strict=True)
    for num, (step, value) in enumerate(pairs):
        limit = 8 * max(lowest, 0.01)
        num_above = num_above + 1 if value > limit else 0
        mean += (value - mean) / min(num + 1, 8)
        if num_above == 8:
            margins[step] = math.log(value / limit)
            lowest, num_above = mean, 0
        lowest = min(lowest, mean)
    return margins


def naive_floor(signal):
    """Likewise, above 1/1000 of the geometric mean of the first eight."""
    known = np.flatnonzero((signal > 0) & (signal < np.inf))
    logs = np.log(np.where(np.isfinite(signal) & (signal > 0), signal, 1))
    margins = np.full(len(signal), np.inf)
    for num, step in enumerate(known[:8], 1):
        first = logs[known[:num]].mean()
        margins[step + 1 :] = logs[step + 1 :] - first - math.log(1e-3)
    return margins


def naive_share(shares, growths):
    """The least of how far above their limits the last three values were.

    And of how far the leaf's own norm has grown beyond twentyfold, since every eighth
    of the last 64 steps. Leaves stand side by side, `[steps, leaves]`, the logarithms
    of their shares NaN where they say nothing.
    """
    margins = np.full(shares.shape, -np.inf)
    mean, change, previous, num = np.zeros((4, shares.shape[1]))
    last_three = np.full((3, shares.shape[1]), -np.inf)
    for step in range(len(shares)):
        i = np.flatnonzero(~np.isnan(shares[step]))
        share, is_first = shares[step, i], num[i] == 0
        excess = share - mean[i] - np.maximum(2.5 * change[i], math.log(5))
        # Of the first value of a leaf there is no change.
        j = i[~is_first]
        last_three[:, j] = [*last_three[1:, j], excess[~is_first]]
        margins[step, j] = np.minimum(
            last_three[:, j].min(axis=0), growths[step, j] - math.log(20)
        )
        moved = abs(share - previous[i])[~is_first]
        change[j] += np.maximum(1 / num[j], 1 / 64) * (moved - change[j])
        mean[i] += np.maximum(1 / (num[i] + 1), 1 / 64) * (share - mean[i])
        previous[i] = share
        num[i] += 1
    return margins


def naive_shares(traces):
    """The largest of the leaves of each trace; all traces run side by side."""
    longest = max(len(trace.loss) for trace in traces)
    shares, growths = [], []
    for trace in traces:
        norms, is_finite = norms_of(trace)
        is_known = (trace.leaves > 0) & ((norms > 0) & (norms < np.inf))[:, None]
        with np.errstate(divide="ignore"):
            share = np.log(trace.leaves) - np.log(norms)[:, None]
        rest = (0, longest - len(norms)), (0, 0)
        share = np.where(is_known, share, np.nan)
        shares.append(np.pad(share, rest, constant_values=np.nan))
        growths.append(np.pad(growth(trace.leaves, is_finite), rest))
    margins = naive_share(np.hstack(shares), np.hstack(growths))
    ends = np.cumsum([x.shape[1] for x in shares])
    return [
        found.max(axis=1)[: len(trace.loss)]
        for trace, found in zip(traces, np.split(margins, ends[:-1], 1), strict=True)
    ]


def growth(leaves, is_finite):
    """The mean logarithm of a leaf's growth; -inf where too little of it is known."""
    found = np.full(leaves.shape, -np.inf)
    steps = np.arange(57, len(leaves))[:, None] - np.arange(1, 64, 8)
    before = leaves[steps]  # [steps, times, leaves]
    is_known = is_finite[steps][..., None] & (before > 0)
    num = is_known.sum(axis=1)
    with np.errstate(divide="ignore"):
        logs = np.log(leaves)
    total = np.where(is_known, logs[57:, None] - logs[steps], 0).sum(axis=1)
    found[57:] = np.where(num >= 5, total / np.maximum(num, 1), -np.inf)
    return found


def norms_of(trace):
    """The norm of all leaves, inf where one is non-finite, and where none is."""
    is_finite = np.isfinite(trace.leaves).all(axis=1)
    norms = np.sqrt((trace.leaves**2).sum(axis=1))
    return np.where(is_finite, norms, np.inf), is_finite


def naive(traces):
    """Of each trace the margins above the limits of norm, share and loss: `[steps]`."""
    for trace, share in zip(traces, naive_shares(traces), strict=True):
        norms, _ = norms_of(trace)
        loss = naive_scalar(trace.loss, 2.4, 1.7, 2.5, 0.01)
        yield {
            "norm": np.minimum(naive_scalar(norms, 3, 3), naive_floor(norms)),
            "share": share,
            "loss": np.minimum(
                np.maximum(loss, naive_rise(trace.loss)), naive_floor(trace.loss)
            ),
        }


def test_rules_agree_with_their_definition(detection, traces, verdicts):
    num_fired: dict[str, int] = dict.fromkeys(RULES, 0)
    num_unclear = 0
    with np.errstate(invalid="ignore"):
        margins_of = list(naive(traces))
    for trace, verdict, expected in zip(traces, verdicts, margins_of, strict=True):
        name = trace.labels["name"]
        expected["nonfinite"] = np.where(detection.is_nonfinite(trace), 1, -1)
        for rule, margins in expected.items():
            fired = verdict.fired[:, RULES.index(rule)]
            is_clear = np.abs(margins) > ROUNDING
            np.testing.assert_array_equal(
                fired[is_clear], margins[is_clear] > 0, f"{name}: {rule}"
            )
            num_fired[rule] += fired[is_clear].sum()
            num_unclear += (np.abs(margins) <= ROUNDING).sum()
    assert all(num_fired.values()), num_fired
    assert num_unclear <= 10


def replaced(detection, trace, change):
    """A trace with other steps: `change` gets and returns `[num_steps, ...]`."""
    return detection.Trace(
        change(trace.loss), change(trace.norm), change(trace.leaves), trace.labels
    )


@pytest.mark.slow
def test_verdicts_know_nothing_of_the_future(detection, traces, verdicts):
    stops = np.random.default_rng(0).integers(1, [len(x.loss) for x in traces])

    def cut(trace, stop):
        def change(x):
            x = x.copy()
            x[stop:] = 1e3
            return x

        return replaced(detection, trace, change)

    cuts = [cut(*pair) for pair in zip(traces, stops, strict=True)]
    for verdict, expected, stop in zip(
        detection.watch(cuts), verdicts, stops, strict=True
    ):
        for x, y in zip(verdict, expected, strict=True):
            np.testing.assert_array_equal(x[:stop], y[:stop])


def test_nonfinite_steps_blind_no_rule(detection, traces, verdicts):
    """All other steps are judged as without them, whose other leaves are large."""
    rng = np.random.default_rng(0)
    places = [rng.integers(1, len(trace.loss), 5).repeat(3) for trace in traces]
    values = np.tile([np.nan, np.inf, np.nan], 5)

    def hit(trace, where):
        def change(x):
            bad = np.full((len(values), *x.shape[1:]), 1e6)
            bad[(slice(None),) + (0,) * (x.ndim - 1)] = values
            return np.insert(x, where, bad, axis=0)[: len(x)]

        return replaced(detection, trace, change)

    hits = [hit(*pair) for pair in zip(traces, places, strict=True)]
    for verdict, expected, where in zip(
        detection.watch(hits), verdicts, places, strict=True
    ):
        is_old = np.insert(np.ones(len(expected.flags), bool), where, False)
        is_old = is_old[: len(expected.flags)]
        assert verdict.fired[~is_old, RULES.index("nonfinite")].all()
        np.testing.assert_array_equal(
            verdict.fired[is_old], expected.fired[: is_old.sum()]
        )


@pytest.mark.parametrize("always", [False, True])
def test_score_of_no_judgment(detection, traces, always):
    flags = [np.full(len(trace.loss), always) for trace in traces]
    found = detection.score(traces, flags)
    assert found.macro == found.alive == 100 * always
    assert found.false_alarms == found.early == 10_000 * always
    assert found.recovery == 100 * (not always)
    assert found.mean_flags == found.max_flags == 200 * always
    assert all((lead > 0) == always for lead in found.lead.values())


@pytest.mark.slow
def test_benchmark_prints_what_it_claims(detection, found, capsys):
    detection.main(peers=("non-finite check",))
    printed = capsys.readouterr().out
    assert f"detect_explosions notices {found.macro:.1f} % of the explos" in printed
    assert '"non-finite check" notices most: 14.3 %, with 0.0.' in printed
    assert "In 6 of the 6 D.layer runs caught" in printed
