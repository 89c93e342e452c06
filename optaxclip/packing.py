"""Named numbers in one array: the only place that knows how. Internal.

Each array of a state costs a small step some microseconds. With the numbers of
`stabilize` in arrays of their own a step of the LSTM tree takes about a third longer:
the arm "plain fields" of `tests/benchmarks/overhead.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.numerics import saturating_cast
from optaxclip.xla import put_scalars


class Packing:
    """Which number stands where in the last axis of an array.

    Of int32 if there are whole numbers, among which a float32 stands as its bits, so
    that it comes back as it was; else of float32, or from `stack` of any dtype.

    Args:
      ints: The names of the whole numbers, which stand first.
      floats: Those of the others.
    """

    def __init__(self, *, ints: Sequence[str] = (), floats: Sequence[str] = ()):
        self.names = (*ints, *floats)
        self._ints = frozenset(ints)
        self._kept = jnp.int32 if ints else jnp.float32

    def pack(
        self, values: Mapping[str, jax.Array], others: Sequence[jax.Array] = ()
    ) -> jax.Array:
        """One array `[num_names + num_others]` of numbers `[]`.

        `others` are of float32 and without names, and stand last.
        """
        numbers = [
            self._to_kept(values[name], self._dtype(name)) for name in self.names
        ]
        others = [self._to_kept(x, jnp.float32) for x in others]
        numbers += others
        empty = jnp.zeros(len(numbers), self._kept)
        return put_scalars(empty, dict(enumerate(numbers)))

    def replace(self, packed: jax.Array, values: Mapping[str, jax.Array]) -> jax.Array:
        """The array `[num_names + num_others]` with some of its numbers replaced."""
        numbers = {
            self.names.index(name): self._to_kept(x, self._dtype(name))
            for name, x in values.items()
        }
        return put_scalars(packed, numbers)

    def flags(self, values: Mapping[str, jax.Array]) -> jax.Array:
        """A flag for each number, bool `[num_names]`: as given, or else False."""
        flags = {self.names.index(name): x for name, x in values.items()}
        return put_scalars(jnp.zeros(len(self.names), bool), flags)

    def pack_known(
        self, values: Mapping[str, float], others: Sequence[float] = ()
    ) -> np.ndarray:
        """As `pack`, of numbers that are known, without a program of its own."""
        ints = [values[name] for name in self.names if name in self._ints]
        floats = [values[name] for name in self.names if name not in self._ints]
        bits = np.asarray([*floats, *others], np.float32).view(self._kept)
        return np.concatenate([np.asarray(ints, self._kept), bits])

    def stack(self, values: Mapping[str, jax.Array]) -> jax.Array:
        """As `pack`, of floats `[...]` of any one dtype: `[..., num_names]`.

        With selects the numbers of a limit, which are long to compute, would take five
        more kernels of a detector.
        """
        return jnp.stack([values[name] for name in self.names], axis=-1)

    def read(self, packed: Any, name: str) -> jax.Array:
        """One number of each array in `[..., num_names + num_others]`: `[...]`."""
        number = packed[..., self.names.index(name)]
        return self._from_kept(number, self._dtype(name))

    def read_others(self, packed: Any) -> jax.Array:
        """`[..., num_others]`."""
        return self._from_kept(packed[..., len(self.names) :], jnp.float32)

    def unpack(self, packed: Any) -> dict[str, jax.Array]:
        """`{name: [...]}`."""
        return {name: self.read(packed, name) for name in self.names}

    def _dtype(self, name: str) -> Any:
        return jnp.int32 if name in self._ints else jnp.float32

    def _to_kept(self, x: jax.Array, dtype: Any) -> jax.Array:
        x = jnp.asarray(x)
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        x = saturating_cast(x, dtype) if is_float else x.astype(dtype)
        return x if dtype == self._kept else lax.bitcast_convert_type(x, self._kept)

    def _from_kept(self, x: Any, dtype: Any) -> Any:
        if dtype == self._kept:
            return x
        # On the host without a program of its own.
        if isinstance(x, np.ndarray | np.generic):
            return np.ascontiguousarray(x).view(dtype).reshape(x.shape)
        return lax.bitcast_convert_type(x, dtype)


class View:
    """The numbers of a packed array by their names, each read when it is asked for."""

    def __init__(self, packing: Packing, packed: Any):
        self._packing = packing
        self._packed = packed

    def __getattr__(self, name: str) -> jax.Array:
        if name.startswith("_") or name not in self._packing.names:
            raise AttributeError(name)
        return self._packing.read(self._packed, name)

    def __dir__(self) -> Sequence[str]:
        return self._packing.names


def bits_of(flags: Sequence[jax.Array]) -> jax.Array:
    """Bool `[]` each, as the bits of one whole number."""
    return jnp.asarray(sum(jnp.where(x, 2**i, 0) for i, x in enumerate(flags)))


def flags_of(bits: Any, num: int) -> Any:
    """Bool `[..., num]`: the lowest bits of whole numbers."""
    # Of equal rank, since a user may forbid to broadcast to a higher one.
    places = np.arange(num, dtype=np.int32).reshape([1] * np.ndim(bits) + [num])
    return (bits[..., None] >> places) % 2 == 1
