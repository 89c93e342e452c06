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
        (leaf,) = re.findall(r"Leaf '(\S+)' had grown most\.", story)
        assert leaf.startswith("aux."), story
        pattern = r"that of '(\S+)' had grown most, by \S+ per step since step (\d+)"
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
    for num in range(1, len(logs)):
        largest = logs[max(0, num - 32) : num].max()
        limit = max(largest, least) + math.log(early_jump)
        if num >= 64:
            limit = largest + math.log(5)
            past = np.sort(logs[max(0, num - 128) : num])
            places = np.array([0.5, 0.95]) * (len(past) - 1)
            middle, high = np.interp(places, np.arange(len(past)), past)
            spread = max(power * (high - middle), math.log(ratio))
            limit = max(min(limit, middle + spread), least + math.log(ratio))
        margins[known[num]] = logs[num] - limit
    return margins


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
    for step in range(known[0] + 1, len(signal)):
        first = known[known < step][:8]
        margins[step] = logs[step] - logs[first].mean() - math.log(1e-3)
    return margins


def naive_share(norms, leaf, is_finite):
    """The least of how far above their limits the last three values were.

    And of how far the leaf's own norm has grown beyond twentyfold, since every eighth
    of the last 64 steps.
    """
    margins = np.full(len(leaf), -np.inf)
    mean = change = previous = 0.0
    num, last_three = 0, [-math.inf] * 3
    pairs = zip(norms.tolist(), leaf.tolist(), strict=True)
    for step, (norm, value) in enumerate(pairs):
        if not (0 < norm < math.inf and value > 0):
            continue
        share = math.log(value) - math.log(norm)
        if num:
            excess = share - mean - max(2.5 * change, math.log(5))
            last_three = [*last_three[1:], excess]
            margins[step] = min(
                *last_three, growth(leaf, step, is_finite) - math.log(20)
            )
            change += max(1 / num, 1 / 64) * (abs(share - previous) - change)
        mean += max(1 / (num + 1), 1 / 64) * (share - mean)
        previous, num = share, num + 1
    return margins


def growth(leaf, step, is_finite):
    """The mean logarithm of a leaf's growth; -inf where too little of it is known."""
    if step < 57:
        return -math.inf
    steps = step - np.arange(1, 64, 8)
    before = leaf[steps[is_finite[steps] & (leaf[steps] > 0)]]
    if len(before) < 5:
        return -math.inf
    return float(np.mean(np.log(leaf[step] / before)))


def naive(trace):
    """Margins above the limits of norm, share and loss, each `[num_steps]`."""
    is_finite = np.isfinite(trace.leaves).all(axis=1)
    norms = np.where(is_finite, np.sqrt((trace.leaves**2).sum(axis=1)), np.inf)
    shares = [naive_share(norms, leaf, is_finite) for leaf in trace.leaves.T]
    return {
        "norm": np.minimum(naive_scalar(norms, 3, 3), naive_floor(norms)),
        "share": np.max(shares, axis=0),
        "loss": np.minimum(
            np.maximum(
                naive_scalar(trace.loss, 2.4, 1.7, 2.5, 0.01), naive_rise(trace.loss)
            ),
            naive_floor(trace.loss),
        ),
    }


def test_rules_agree_with_their_definition(detection, traces, verdicts):
    num_fired: dict[str, int] = dict.fromkeys(RULES, 0)
    num_unclear = 0
    for trace, verdict in zip(traces, verdicts, strict=True):
        name = trace.labels["name"]
        with np.errstate(invalid="ignore"):
            expected = naive(trace)
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
def test_score_of_no_judgement(detection, traces, always):
    flags = [np.full(len(trace.loss), always) for trace in traces]
    found = detection.score(traces, flags)
    assert found.macro == found.alive == 100 * always
    assert found.false_alarms == found.early == 10_000 * always
    assert found.recovery == 100 * (not always)
    assert found.mean_flags == found.max_flags == 200 * always
    assert all((lead > 0) == always for lead in found.lead.values())


def test_benchmark_prints_what_it_claims(detection, found, capsys):
    detection.main(peers=("non-finite check",))
    printed = capsys.readouterr().out
    assert f"detect_explosions notices {found.macro:.1f} % of the explos" in printed
    assert '"non-finite check" notices most: 14.3 %, with 0.0.' in printed
    assert "In 6 of the 6 D.layer runs caught" in printed
