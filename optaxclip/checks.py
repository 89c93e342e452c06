"""The errors of arguments, at the earliest moment."""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def known_value(name: str, value: Any) -> float | None:
    """The value of a number; None for a JAX array, which may be traced.

    Raises the error of an argument that is not a single real number.
    """
    if not isinstance(value, numbers.Real | np.ndarray | jax.Array):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if isinstance(value, np.ndarray | jax.Array) and value.ndim:
        raise ValueError(f"{name} must be a single number, not {value!r}")
    return None if isinstance(value, jax.Array) else float(value)


def check_number(
    name: str, value: Any, fits: Callable[[float], bool], what: str
) -> None:
    """Raises the error of a number that is known and does not fit."""
    known = known_value(name, value)
    if known is not None and not fits(known):
        raise ValueError(f"{name} must be {what}, not {value!r}")


def check_length(name: str, value: Any, least: int) -> int:
    """A whole number; raises the error of what is none, or too small or large."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{name} must be a whole number, not {value!r}; optax.inject_hyperparams "
            "takes it in static_args="
        )
    if not least <= int(value) < 2**30:
        raise ValueError(f"{name} must be >= {least} and < 2**30, not {value!r}")
    return int(value)


def check_label(label: Any) -> None:
    """Raises the error of a label that is no name."""
    if not isinstance(label, str) or not label:
        raise TypeError(f"label must be a name, not {label!r}")
