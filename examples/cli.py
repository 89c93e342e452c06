"""The command line of every example: errors are reported in one line."""

import math
from collections.abc import Callable
from typing import Any

import tyro


class InputError(ValueError):
    """The caller asked for something impossible; the message says what and why."""


def check_positive(knobs: dict[str, Any], *, finite: bool = False) -> None:
    """Raises an `InputError` that names the first knob that is not positive."""
    for name, value in knobs.items():
        if not value > 0 or (finite and value == math.inf):
            what = "positive and finite" if finite else "positive"
            raise InputError(f"{name} must be {what}, got {value}")


def run(main: Callable[..., Any]) -> None:
    """Calls `main` with the flags of the command line; ends with an error's message."""
    try:
        tyro.cli(main)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
