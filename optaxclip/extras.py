"""What a training loop gives to `update` beside the gradients. Internal."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip.checks import is_real
from optaxclip.numerics import promote, saturating_cast

NO_LOSS = -(2.0**96)
"""Stands for a loss that was not given. Not NaN, which `jax_debug_nans` refuses; and a
sum of 2**30 of them is still finite."""
NAN, MINUS_INF = -(2.0**95), -(2.0**94)
"""Stand for these in a record, as `NO_LOSS` does, so that the sum of a state is not NaN
as long as it has no such large numbers of its own."""
RESERVED = ("step", "loss", "loss_limit", "norm", "limit", "rules", "nonfinite")
RESERVED += ("norm_exploded", "share_exploded", "loss_exploded")
"""What else of a step is read by name."""
NUM_BITS = 24
"""Bits of the lower part of a whole number: float32 holds so many exactly."""


# As a layout: static, so that the names are structure and never arrays.
@jax.tree_util.register_static
class Columns(NamedTuple):
    """The names of the numbers, in the order in which they are kept."""

    names: Any
    """Strings, in a tuple."""


def loss_of(value: Any, dtype: Any) -> jax.Array:
    """The loss that a training loop gives, or `NO_LOSS`; the error of one with axes."""
    if value is None:
        return jnp.full([], NO_LOSS, dtype)
    value = jnp.asarray(value)
    if not is_real(value.dtype):
        raise TypeError(
            f"value= must be a real number, the loss, not of {value.dtype}: of a "
            "complex one give value=loss.real"
        )
    if value.ndim:
        raise ValueError(
            f"value= must be a single number, the loss, not of shape {value.shape}"
        )
    wide = value.astype(promote(value.dtype, jnp.float32))
    return saturating_cast(wide, dtype)


def marked(row: jax.Array) -> jax.Array:
    """Numbers with marks for NaN and -inf; +inf may stay."""
    row = jnp.where(jnp.isnan(row), NAN, row)
    return jnp.where(row == -jnp.inf, MINUS_INF, row)


def unmarked(rows: Any) -> Any:
    """What `marked` made them of: NumPy of NumPy, else JAX."""
    where = np.where if isinstance(rows, np.ndarray) else jnp.where
    rows = where(rows == NAN, np.float32(np.nan), rows)
    return where(rows == MINUS_INF, np.float32(-np.inf), rows)


def num_parts(columns: Columns | tuple[()]) -> int:
    """How many numbers are kept of a step for them: two for each."""
    return 2 * len(columns.names) if isinstance(columns, Columns) else 0


def check_columns(columns: Any) -> Columns | tuple[()]:
    """The columns, () for none; the errors of names that cannot be."""
    if isinstance(columns, str) or not isinstance(columns, Iterable):
        raise TypeError(f"columns must be a sequence of names, not {columns!r}")
    names = tuple(columns)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"columns must be names, not {name!r}")
        if name in RESERVED or "/" in name:
            raise ValueError(
                f"columns must be other names than {', '.join(RESERVED)}, and without "
                f"a slash, not {name!r}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"columns must be different names, not {names!r}")
    return Columns(names) if names else ()


def parts_of_tag(
    columns: Columns | tuple[()], extra_args: Mapping[str, Any]
) -> list[jax.Array]:
    """What is kept of `tag=`, float32 each: two for each of the columns.

    Other names may stand in it, for the columns of another recorder.
    """
    if not isinstance(columns, Columns):
        return []
    tag = extra_args.get("tag")
    example = ", ".join(f"{name!r}: ..." for name in columns.names)
    if not isinstance(tag, Mapping):
        given = "none was given" if tag is None else f"not {tag!r}"
        raise TypeError(f"update needs tag={{{example}}}, for columns=; {given}")
    if missing := [name for name in columns.names if name not in tag]:
        raise ValueError(
            f"tag= lacks {missing} of the columns: it has {sorted(map(str, tag))}, and "
            f"needs {{{example}}}"
        )
    return [part for name in columns.names for part in _parts(name, tag[name])]


def _parts(name: str, value: Any) -> tuple[jax.Array, jax.Array]:
    """Two float32 whose sum is the number.

    A float32 alone holds whole numbers up to 2**24, and batches are more. Two of them
    hold every one of 32 bits, and of 64 bits up to 2**48. Not its bits: those of some
    are NaN, which `jax_debug_nans` refuses and a copy may change.
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        # Before JAX, which without x64 would cut it to 32 bits.
        upper, lower = divmod(int(value), 2**NUM_BITS)
        return jnp.float32(upper * 2.0**NUM_BITS), jnp.float32(lower)
    value = jnp.asarray(value)
    if not is_real(value.dtype):
        raise TypeError(f"tag= must hold real numbers; {name!r} is of {value.dtype}")
    if value.ndim:
        raise ValueError(
            f"tag= must hold single numbers; {name!r} is of shape {value.shape}"
        )
    if jnp.issubdtype(value.dtype, jnp.integer):
        if value.dtype.itemsize < 4:
            value = value.astype(jnp.int32)
        upper = (value >> NUM_BITS).astype(jnp.float32) * 2.0**NUM_BITS
        return upper, (value & (2**NUM_BITS - 1)).astype(jnp.float32)
    wide = value.astype(promote(value.dtype, jnp.float32))
    upper = saturating_cast(wide, jnp.float32)
    return upper, jnp.zeros_like(upper)


def named_tags(
    columns: Columns | tuple[()], parts: np.ndarray
) -> dict[str, np.ndarray]:
    """`{name: float64 [...]}` of `[..., 2 * num_columns]`, on the host."""
    if not isinstance(columns, Columns):
        return {}
    parts = np.asarray(parts, np.float64)
    return {
        name: parts[..., 2 * i] + parts[..., 2 * i + 1]
        for i, name in enumerate(columns.names)
    }


def plain_number(value: Any) -> int | float:
    """A number in as few digits as it was given: 7 and not 7.0, 0.1 and not 0.100...1.

    What is not whole was kept as a float32.
    """
    value = float(value)
    return int(value) if value.is_integer() else float(str(np.float32(value)))
