"""dtype names, arrays and their bytes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from graftax.errors import FormatError
from graftax.tree import DTYPES, TensorSpec
from graftax.tree.dtypes import NUMPY_OWN, dtype_name, from_storage, numpy_dtype, pack, spec_of, storage_bytes, unpack


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 1), (), (0, 4), (7,), (2, 2, 2, 2)])
def test_bytes_to_array_and_back(name: str, shape: tuple[int, ...]):
    spec = TensorSpec(shape, name)
    assert dtype_name(numpy_dtype(name)) == name
    raw = np.random.default_rng(0).integers(0, 256, spec.nbytes, dtype=np.uint8)
    if name == "bool":
        raw &= 1
    if spec.packed and spec.size * spec.bits % 8:  # what fills the last byte is zero
        raw[-1] &= (1 << spec.size * spec.bits % 8) - 1
    array = from_storage(raw.tobytes(), spec)
    assert storage_bytes(array, spec).tobytes() == raw.tobytes()
    if spec.packed:
        assert array.dtype == np.uint8
        array = unpack(array, spec)
        assert storage_bytes(array, spec).tobytes() == raw.tobytes()
    assert spec_of(array) == spec


def test_four_bit_codes_lie_low_half_first():
    codes = np.array([-8, -1, 0, 7], ml_dtypes.int4)
    assert pack(codes, 4).tolist() == [0xF8, 0x70]
    assert unpack(pack(codes, 4), TensorSpec((4,), "int4")).astype(int).tolist() == [-8, -1, 0, 7]
    assert pack(codes[:3], 4).tolist() == [0xF8, 0x00]


def test_six_bit_codes_lie_four_in_three_bytes():
    codes = np.array([1, 2, 3, 63], np.uint8).view(ml_dtypes.float6_e2m3fn)
    assert int.from_bytes(pack(codes, 6).tobytes(), "little") == 1 | 2 << 6 | 3 << 12 | 63 << 18
    np.testing.assert_array_equal(unpack(pack(codes, 6), TensorSpec((4,), "float6_e2m3fn")), codes)


def test_other_byte_orders_are_turned():
    big = np.arange(6, dtype=">f4").reshape(2, 3).T
    assert spec_of(big) == TensorSpec((3, 2), "float32")
    assert storage_bytes(big, spec_of(big)).tobytes() == np.array([0, 3, 1, 4, 2, 5], "<f4").tobytes()


def test_contiguous_bytes_are_a_view_and_buffers_stay_writable():
    array = np.arange(6.0).reshape(2, 3)
    assert np.shares_memory(storage_bytes(array, spec_of(array)), array)
    buffer = bytearray(8)
    from_storage(buffer, TensorSpec((2,), "float32"))[:] = 1
    assert buffer != bytes(8)


@pytest.mark.parametrize("dtype", ["O", "U3", "S3", "M8[s]", "V4", [("a", "f4")], np.longdouble, ml_dtypes.int2])
def test_dtypes_that_no_checkpoint_holds(dtype: object):
    with pytest.raises(FormatError, match="cannot hold dtype"):
        dtype_name(np.dtype(dtype))  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(FormatError, match="unknown dtype"):
        numpy_dtype("float7\x1b")


def test_an_array_that_is_not_what_its_spec_says():
    for array in (np.ones(3, np.float32), np.ones(2, np.float64), np.ones((2, 1), np.float32)):
        with pytest.raises(FormatError, match="expected float32"):
            storage_bytes(array, TensorSpec((2,), "float32"))
    with pytest.raises(FormatError, match="takes 8 bytes, found 7"):
        from_storage(bytes(7), TensorSpec((2,), "float32"))


def test_numpys_own_dtypes():
    assert {name for name in DTYPES if numpy_dtype(name).isbuiltin == 1} == NUMPY_OWN
