"""Numbers come out of an array as they went into it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxclip import ring
from optaxclip.explosions import state
from optaxclip.packing import Packing, View, bits_of, flags_of

EVENT = Packing(ints=("step", "leaf"), floats=("norm", "loss"))
VALUES = {"step": 2**31 - 1, "leaf": -1, "norm": 1e-38, "loss": -np.inf}
OTHERS = [0.1, 3e38]


@pytest.mark.parametrize("where", ["jit", "host"])
def test_what_is_packed_comes_back(where):
    if where == "host":
        packed = EVENT.pack_known(VALUES, OTHERS)
    else:
        packed = jax.jit(EVENT.pack)(jax.tree.map(jnp.asarray, VALUES), OTHERS)
    assert (packed.shape, packed.dtype) == ((6,), np.int32)
    for given in (packed, np.asarray(packed), jnp.stack([packed, packed])):
        found = EVENT.unpack(given)
        assert list(found) == list(VALUES)
        for name, x in found.items():
            expected = np.asarray(VALUES[name], x.dtype)
            np.testing.assert_array_equal(x, np.broadcast_to(expected, x.shape))
            assert x.dtype == (np.int32 if name in ("step", "leaf") else np.float32)
        others = np.asarray(OTHERS, np.float32)
        found = EVENT.read_others(given)
        np.testing.assert_array_equal(found, np.broadcast_to(others, found.shape))


def test_without_whole_numbers_it_is_an_array_of_floats():
    packing = Packing(floats=("a", "b"))
    packed = packing.pack({"a": jnp.asarray(True), "b": jnp.asarray(3)})
    assert packed.dtype == jnp.float32
    np.testing.assert_array_equal(packed, [1, 3])


def test_some_numbers_are_replaced_and_others_stay():
    changed = {"leaf": jnp.asarray(7), "loss": jnp.asarray(0.25)}
    packed = jnp.asarray(EVENT.pack_known(VALUES, OTHERS))
    replaced = EVENT.replace(packed, changed)
    expected = EVENT.pack_known(VALUES | {"leaf": 7, "loss": 0.25}, OTHERS)
    np.testing.assert_array_equal(replaced, expected)


def test_flags_stand_where_their_numbers_do():
    found = EVENT.flags({"norm": jnp.asarray(True), "step": jnp.asarray(False)})
    np.testing.assert_array_equal(found, [False, False, True, False])


@pytest.mark.usefixtures("x64")
def test_a_finite_number_that_is_too_large_stays_finite():
    packed = EVENT.pack(jax.tree.map(jnp.asarray, VALUES | {"norm": 1e300}))
    assert EVENT.read(packed, "norm") == jnp.finfo(jnp.float32).max
    assert EVENT.read(packed, "loss") == -jnp.inf


def test_a_view_has_the_names_and_no_others():
    view = View(EVENT, EVENT.pack_known(VALUES))
    assert view.step == VALUES["step"]
    assert dir(view) == sorted(VALUES)
    with pytest.raises(AttributeError, match="nrom"):
        _ = view.nrom


def test_flags_are_bits():
    flags = [[False] * 4, [True, False, True, False], [True] * 4]
    for expected in flags:
        bits = bits_of([jnp.asarray(x) for x in expected])
        # A further bit is none of them.
        np.testing.assert_array_equal(flags_of(np.asarray(bits) + 16, 4), expected)


def test_numbers_of_many_scopes_keep_their_dtype():
    packing = Packing(floats=("a", "b"))
    values = {"a": jnp.arange(3, dtype=jnp.float16), "b": jnp.ones(3, jnp.float16)}
    packed = packing.stack(values)
    assert (packed.shape, packed.dtype) == ((3, 2), jnp.float16)
    for name, x in values.items():
        np.testing.assert_array_equal(packing.read(packed, name), x)


def test_the_counts_of_a_detector_begin_as_those_of_a_record():
    assert state.COUNTS.names[: len(ring.COUNTS.names)] == ring.COUNTS.names


def test_what_is_packed_is_one_kernel():
    """A concatenation would be one, and keep what makes each number from fusing."""
    packing = Packing(floats=tuple("abcd"))

    def pack(x):
        return packing.pack({name: x + i for i, name in enumerate("abcd")}) * 2

    like = jax.ShapeDtypeStruct((), jnp.float32)
    hlo = jax.jit(pack).lower(like).compile().as_text() or ""
    (entry,) = (part for part in hlo.split("\n\n") if part.startswith("ENTRY"))
    assert entry.count(" fusion(") == 1
    assert " concatenate(" not in hlo
