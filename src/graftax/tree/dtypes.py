"""dtype names <-> NumPy dtypes, and arrays <-> their bytes on disk. NumPy and ml_dtypes are imported on first use.

A type below 8 bits (`TensorSpec.packed`) takes one byte per element in NumPy. On disk several elements share bytes,
little endian: two 4-bit codes in one byte, four 6-bit codes in three. Inside graftax such tensors travel as their bytes
on disk, a flat uint8 array.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from graftax.errors import FormatError, escape
from graftax.tree import DTYPES, TensorSpec

if TYPE_CHECKING:
    import numpy as np

NUMPY_OWN = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
    | {"float16", "float32", "float64", "complex64", "complex128"}
)
"""The dtypes NumPy has without ml_dtypes: what npz holds."""


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a name of `tree.DTYPES`, in the machine's byte order. FormatError for any other name."""
    import numpy as np

    if name in NUMPY_OWN:
        return np.dtype(name)
    if name not in DTYPES:
        raise FormatError(f"unknown dtype {escape(name)!r}; known: {', '.join(DTYPES)}")
    import ml_dtypes

    scalar = getattr(ml_dtypes, name, None)
    if scalar is None:
        raise FormatError(f"the installed ml_dtypes {ml_dtypes.__version__} does not know {name}", next="Upgrade it.")
    return np.dtype(scalar)


def dtype_name(dtype: Any) -> str:
    """The name of a NumPy or ml_dtypes dtype, whatever its byte order. FormatError for a dtype that is not in
    `tree.DTYPES`: objects, text, dates, records, float128."""
    import numpy as np

    name = _name(dtype if isinstance(dtype, np.dtype) else np.dtype(dtype))
    if name not in DTYPES:
        raise FormatError(f"a checkpoint cannot hold dtype {escape(name)!r}", next=f"It can hold: {', '.join(DTYPES)}")
    return name


@lru_cache(maxsize=256)
def _name(dtype: np.dtype[Any]) -> str:
    """Cached: NumPy computes the name anew each time, which is slow for a tree of ten thousand leaves."""
    return dtype.name


def spec_of(array: Any) -> TensorSpec:
    """The spec of anything with `.shape` and `.dtype`."""
    return TensorSpec(tuple(int(extent) for extent in array.shape), dtype_name(array.dtype))


def pack(codes: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One code per byte -> `bits` bits per code, flat, little endian. Zero bits fill the last byte."""
    import numpy as np

    low: np.ndarray[Any, np.dtype[np.uint8]] = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
    if bits == 4:
        low = np.bitwise_and(low, np.uint8(0x0F))
        if low.size % 2:
            low = np.append(low, np.uint8(0))
        return np.bitwise_or(low[0::2], np.left_shift(low[1::2], np.uint8(4)))
    spread = np.unpackbits(low[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(spread.reshape(-1), bitorder="little")


def unpack(storage: np.ndarray[Any, Any], spec: TensorSpec) -> np.ndarray[Any, Any]:
    """The bytes of a packed tensor as an array of its shape and ml_dtypes dtype, one byte per code."""
    import numpy as np

    spread = np.unpackbits(np.asarray(storage, np.uint8), bitorder="little")[: spec.size * spec.bits]
    spread = spread.reshape(spec.size, spec.bits)
    codes = np.packbits(spread, axis=1, bitorder="little").reshape(-1)
    return codes.view(numpy_dtype(spec.dtype)).reshape(spec.shape)


def codes_of(raw: np.ndarray[Any, np.dtype[np.uint8]], spec: TensorSpec) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
    """The codes of a packed dtype that was written with one byte per element. The upper bits are zero or, for signed
    integers, copies of the sign: ml_dtypes has stored int4 both ways. None if some byte is not such a code."""
    import numpy as np

    low = np.bitwise_and(raw, np.uint8((1 << spec.bits) - 1))
    plain = raw == low
    if spec.kind == "i":
        negative = low >> np.uint8(spec.bits - 1) == 1
        plain |= negative & (raw == np.bitwise_or(low, np.uint8(256 - (1 << spec.bits))))
    return low if bool(plain.all()) else None


def storage_bytes(array: np.ndarray[Any, Any], spec: TensorSpec) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes that go to disk: the values in C order, little endian, as a flat uint8 array of `spec.nbytes`. This is
    a view if the array is already contiguous, else a copy. A packed tensor may come as its bytes or as one byte per
    code.

    Raises FormatError if the array does not match `spec`.
    """
    import numpy as np

    if spec.packed and array.dtype == np.uint8 and array.shape == (spec.nbytes,):
        return np.ascontiguousarray(array)
    name = dtype_name(array.dtype)
    if name != spec.dtype or tuple(array.shape) != spec.shape:
        found = f"{name}[{','.join(map(str, array.shape))}]"
        raise FormatError(f"the array does not match its spec: expected {spec}, found {found}")
    if spec.packed:
        return pack(array, spec.bits)
    if array.dtype.newbyteorder("<") != array.dtype:
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def from_storage(storage: Any, spec: TensorSpec) -> np.ndarray[Any, Any]:
    """The array whose bytes are `storage` (bytes, bytearray, memoryview or a uint8 array), without a copy. It is
    writable if the buffer is. A packed tensor stays as its bytes, a flat uint8 array (`unpack` gives its codes).

    Raises FormatError if the length is not `spec.nbytes`.
    """
    import numpy as np

    raw = np.frombuffer(storage, np.uint8) if memoryview(storage).nbytes else np.empty(0, np.uint8)
    if raw.size != spec.nbytes:
        raise FormatError(f"{spec} takes {spec.nbytes} bytes, found {raw.size}")
    if spec.packed:
        return raw
    dtype = numpy_dtype(spec.dtype)
    array = raw.view(dtype.newbyteorder("<")) if dtype.itemsize > 1 else raw.view(dtype)
    return array.astype(dtype, copy=False).reshape(spec.shape)


def same_bits(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Equal in shape, dtype and every bit (NaN payloads and -0.0 count)."""
    import numpy as np

    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    whole = (
        np.dtype(f"V{a.dtype.itemsize}") if a.dtype.itemsize not in (1, 2, 4, 8) else np.dtype(f"u{a.dtype.itemsize}")
    )
    if whole.kind == "V":
        return np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()
    return bool(np.array_equal(_as_bits(a, whole), _as_bits(b, whole)))


def _as_bits(array: np.ndarray[Any, Any], whole: np.dtype[Any]) -> np.ndarray[Any, Any]:
    import numpy as np

    if array.ndim == 0 or not array.flags.c_contiguous:
        array = np.array(array, order="C", copy=True).reshape(array.shape)
    return array.view(whole)
