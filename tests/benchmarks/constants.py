"""Why the default rules of `detect_explosions` have the numbers that they have.

    python tests/benchmarks/constants.py [--split heldout] [--zoo] [--only start]

Each number of the rules is changed alone, by about the same factor down and up, and
scored as in `detection.py`; with `--zoo` on the healthy runs of the half "tune", too.
`--only` changes the numbers of one rule.
"""

import datetime
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import optax
import tyro

import detection
import optaxclip
from optaxclip import limits
from optaxclip.explosions import leading

NORM = {"power": 3.0, "min_ratio": 3.0, "max_jump": 5.0, "window": 128}
SHARE = {"max_ratio": 5.0, "window": 64, "patience": 3}
LOSS = {"power": 2.4, "min_ratio": 1.7, "early_jump": 2.5, "min_level": 0.01}
LOWEST = {"max_ratio": 8.0, "window": 8}
START = {"fraction": 1e-3, "num_steps": 8}
GROWTH = {"min_growth": leading.MIN_GROWTH, "min_known": leading.MIN_KNOWN}
RULES: dict[str, dict[str, Any]] = {
    "norm": NORM,
    "share": SHARE,
    "loss": LOSS,
    "lowest loss": LOWEST,
    "start": START,
    "growth of a share": GROWTH,
}
"""The defaults, as the functions have them; a test compares."""

OTHERS: dict[tuple[str, str], tuple[Any, ...]] = {
    ("norm", "power"): (1.5, 2.0, 4.0, 6.0),
    ("norm", "min_ratio"): (1.5, 2.0, 4.0, 6.0),
    ("norm", "max_jump"): (2.5, 3.5, 7.0, 10.0),
    ("norm", "window"): (64, 256),
    ("share", "max_ratio"): (2.5, 3.5, 7.0, 10.0),
    ("share", "window"): (32, 128),
    ("share", "patience"): (2, 4),
    ("loss", "power"): (1.2, 1.8, 3.4, 4.8),
    ("loss", "min_ratio"): (1.2, 1.4, 2.4, 3.4),
    ("loss", "early_jump"): (2.0, 3.5, 5.0),
    ("loss", "min_level"): (0.0, 0.001, 0.1),
    ("lowest loss", "max_ratio"): (4.0, 16.0),
    ("lowest loss", "window"): (4, 16),
    ("start", "fraction"): (0.0, 1e-4, 1e-2, 0.1),
    ("start", "num_steps"): (4, 16),
    ("growth of a share", "min_growth"): (3.0, 10.0, 40.0),
    ("growth of a share", "min_known"): (3, 8),
}


def detector(
    norm: Any, share: Any, loss: Any, lowest: Any, start: Any
) -> optax.GradientTransformation:
    """`detect_explosions` with these numbers."""
    floor = limits.fraction_of_start(**start)
    return optaxclip.detect_explosions(
        norm=limits.maximum(limits.log_quantile(**norm), floor),
        share=limits.sustained_rise(**share),
        loss=limits.maximum(
            limits.minimum(limits.log_quantile(**loss), limits.above_lowest(**lowest)),
            floor,
        ),
    )


def variant(rule: str, changes: dict[str, Any]) -> Callable[[], Any]:
    """Makes a detector of which one rule has other numbers."""
    *of_limits, _ = (RULES | {rule: RULES[rule] | changes}).values()
    return functools.partial(detector, *of_limits)


def main(split: str = "open", zoo: bool = False, only: str | None = None) -> None:
    """Prints the scores of the defaults and of each change.

    Args:
        split: Which recorded runs, "open" or "heldout".
        zoo: Also what is flagged of the healthy runs of the tuned half of the zoo.
        only: The rule whose numbers are changed, one of `RULES`; by default all.
    """
    traces = detection.load(split)
    healthy = detection.healthy_runs("tune")[0] if zoo else []
    print(
        f"{len(traces)} recorded runs, split {split}; JAX {jax.__version__} on "
        f"{jax.devices()[0].platform}, {datetime.date.today()}."
    )
    columns = "macro recall", "false alarms", "early", "recovery"
    if zoo:
        columns += "zoo", "zoo, early", "three in a row"
    print(f"{'':32}", *(f"{name:>15}" for name in columns))

    def tell(title: str, make: Callable[[], Any]) -> None:
        found = detection.score(
            traces, [verdict.flags for verdict in detection.watch(traces, make)]
        )
        numbers = [found.macro, found.false_alarms, found.early, found.recovery]
        if zoo:
            verdicts = detection.watch(healthy, make)
            late, early, rows = detection.flagged([x.flags for x in verdicts])
            numbers += [late, early, float(len(rows))]
        print(f"{title:32}", *(f"{x:15.1f}" for x in numbers), flush=True)

    tell("defaults", variant("norm", {}))
    for (rule, name), values in OTHERS.items():
        for value in values if only in (None, rule) else ():
            title = f"{rule}: {name} {RULES[rule][name]:g} -> {value:g}"
            changes = {name: value}
            of_growth = RULES["growth of a share"]
            if rule == "growth of a share":
                of_growth = of_growth | changes
            constants = {name.upper(): x for name, x in of_growth.items()}
            with mock.patch.multiple(leading, **constants):
                tell(title, variant(rule, changes))


if __name__ == "__main__":
    tyro.cli(main)
