"""npz archives: a zip of .npy files with one array each. A single .npy file can be read, but not written. Names, shapes
and dtypes are read without NumPy.

npz holds only NumPy's own dtypes. NumPy writes bfloat16, float8 and int4 arrays as bytes without a type, so these are
refused for reading and writing. Object arrays are pickles, which run code, and are refused.

Source of the layout: NumPy's NEP 1 (.npy, versions 1.0 to 3.0).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftax.errors import Failure, FormatError, UnsafeInputError, escape
from graftax.formats.base import Output
from graftax.formats.io import zip_read
from graftax.formats.io.source import StampedFile, open_stamped
from graftax.formats.io.zip_write import write_archive
from graftax.formats.writing import byte_runs, refuse
from graftax.tree import Checkpoint, Storage, TensorSpec
from graftax.tree.limits import element_count
from graftax.tree.sides import side_of_names

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"\x93NUMPY"
_HEADER = 1 << 14  # longest .npy header in bytes; NumPy itself reads 10,000 bytes of its text
_FIRST = 256  # nearly every header fits into this many bytes
_USUAL = re.compile(r"\{'descr': '([^'\\]{2,4})', 'fortran_order': (True|False), 'shape': \(([0-9, ]{0,200})\), \}")
_CODES = {
    "bool": "|b1", "int8": "|i1", "int16": "<i2", "int32": "<i4", "int64": "<i8",
    "uint8": "|u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8",
    "float16": "<f2", "float32": "<f4", "float64": "<f8", "complex64": "<c8", "complex128": "<c16",
}  # fmt: skip
"""Our dtype name -> NumPy's `descr`. Only these, and their big-endian forms, are read."""
_TEXT = ("U", "S", "a")
"""First letters of the `descr` of text, which is not a weight but may stand beside weights."""
_NAMES = {code[1:]: name for name, code in _CODES.items()}


@dataclass(frozen=True, slots=True)
class _NpyLayout:
    """The layout of an array in its .npy file: where its data starts, its spec, and the order of axes and of bytes."""

    start: int
    spec: TensorSpec
    fortran: bool
    swapped: bool


@dataclass(frozen=True, slots=True)
class _StoredArray:
    """One array of an archive: its member, and its layout there."""

    member: zip_read.Member
    layout: _NpyLayout

    @property
    def spec(self) -> TensorSpec:
        return self.layout.spec


class _Bad(Exception):
    """A header that cannot be understood; `open` collects these."""


class _Left(Exception):
    """An array that is not a weight and is left out; the message says what it is."""


def sniff(path: Path, head: bytes) -> bool:
    """True for a .npy file, and for a zip whose first member is a .npy file. A zip that is empty, or that begins with
    another member, needs npz's ending."""
    if head[:6] == MAGIC:
        return True
    name = zip_read.first_member_name(head)
    if name is not None and name.endswith(".npy"):
        return True
    return head[:2] == b"PK" and path.suffix.lower() == ".npz"


def open(path: Path) -> Checkpoint:
    """The arrays of numbers in the archive, named without `.npy`, in the archive's order. Text is left out and listed
    in the metadata. A single .npy file gives one leaf called `array`, without a side.

    Raises FormatError if the file is malformed or holds something other than arrays of numbers, UnsafeInputError for
    object arrays and beyond a limit.
    """
    source = open_stamped(path)
    label = escape(path)
    if bytes(source.read(0, min(source.size, 6))) == MAGIC:
        return _open_lone(path, source, label)
    entries: dict[str, _StoredArray] = {}
    wrong: list[Failure] = []
    code: list[Failure] = []
    left: dict[str, str] = {}
    for name, member in zip_read.zip_members(source).items():
        if not name.endswith(".npy"):
            wrong.append(Failure("it is not a .npy file", label, name))
            continue
        try:
            entries[name.removesuffix(".npy")] = _entry(source, member)
        except _Left as what:
            left[name.removesuffix(".npy")] = str(what)
        except UnsafeInputError:
            code.append(Failure("this is an object array: reading it would run code", label, name.removesuffix(".npy")))
        except (_Bad, FormatError) as error:
            wrong.append(Failure(str(error), label, name.removesuffix(".npy")))
    if code:
        raise UnsafeInputError(
            f"{label} holds {len(code)} arrays of Python objects", code, next="Save them as arrays of numbers."
        )
    if wrong:
        raise FormatError(f"{label}: {len(wrong)} of its members cannot be read", wrong)

    positions = zip_read.Positions(source)

    def reader(name: str) -> np.ndarray[Any, Any]:
        return _read(source, entries[name])

    whole = frozenset(
        name for name, entry in entries.items() if not _as_it_is(entry.layout) or entry.member.method != zip_read.STORED
    )

    def span(name: str, start: int, buffer: memoryview) -> None:
        if name in whole:
            raise LookupError(f"{name} does not lie in order")
        positions.read_into(entries[name].member, entries[name].layout.start + start, buffer)

    return Checkpoint(
        label=str(path),
        side=side_of_names(entries),
        side_by="names",
        specs={name: entry.spec for name, entry in entries.items()},
        storage=Storage(reader=reader, format="npz", files=(path,), span=span, whole=whole, metadata=left),
    )


LONE = "array"
"""The name of the one leaf of a .npy file."""


def _open_lone(path: Path, source: StampedFile, label: str) -> Checkpoint:
    try:
        layout = _layout(lambda count: bytes(source.read(0, min(source.size, count))), source.size)
    except UnsafeInputError:
        raise UnsafeInputError(
            f"{label} is one array of Python objects: reading it would run code", next="Save it as numbers."
        ) from None
    except (_Bad, _Left, FormatError) as error:
        raise FormatError(f"{label} is one NumPy array (.npy) that cannot be read: {error}") from None

    def span(name: str, start: int, buffer: memoryview) -> None:
        if not _as_it_is(layout):
            raise LookupError(f"{name} does not lie in order")
        source.read_into(layout.start + start, buffer)

    return Checkpoint(
        label=str(path),
        side=None,
        specs={LONE: layout.spec},
        storage=Storage(
            reader=lambda name: _array(source.read(layout.start, source.size - layout.start), layout),
            format="npy",
            files=(path,),
            span=span,
            whole=frozenset() if _as_it_is(layout) else frozenset({LONE}),
        ),
    )


def _entry(source: StampedFile, member: zip_read.Member) -> _StoredArray:
    return _StoredArray(member, _layout(lambda count: bytes(zip_read.read_start(source, member, count)), member.size))


def _layout(read_start: Callable[[int], bytes], size: int) -> _NpyLayout:
    """The layout in the header of a .npy file of `size` bytes; `read_start(n)` gives its first n bytes."""
    head = read_start(_FIRST)
    if head[:6] != MAGIC or len(head) < 12:
        raise _Bad("it does not begin like a .npy file")
    version = (head[6], head[7])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise _Bad(f".npy version {version[0]}.{version[1]} is not known")
    form, at = ("<H", 10) if version == (1, 0) else ("<I", 12)
    (length,) = struct.unpack_from(form, head, 8)
    if at + length > len(head):
        head = read_start(_HEADER)
    if at + length > len(head):
        raise _Bad("its header is truncated or too long")
    try:
        text = head[at : at + length].decode("utf-8" if version == (3, 0) else "latin1").strip()
    except UnicodeDecodeError:
        raise _Bad("its header is not UTF-8") from None
    descr, fortran, shape = _fields(text)
    name = _dtype(descr)
    count = element_count(shape, "its header")
    spec = TensorSpec(shape, name)
    if at + length + count * spec.bits // 8 != size:
        need, found_bytes = count * spec.bits // 8, size - at - length
        raise _Bad(f"{spec} takes {need:,} bytes, found {found_bytes:,}")
    return _NpyLayout(at + length, spec, fortran, descr[0] == ">")


def _as_it_is(layout: _NpyLayout) -> bool:
    """True if the bytes in the file are the values in C order, little endian."""
    rows = not layout.fortran or len(layout.spec.shape) < 2
    return rows and not (layout.swapped and layout.spec.bits > 8)


def _fields(text: str) -> tuple[Any, bool, tuple[Any, ...]]:
    """descr, fortran_order and shape from a header's dict; `element_count` checks the shape."""
    if (usual := _USUAL.fullmatch(text)) is not None:
        extents = usual[3].removesuffix(",").split(",") if usual[3] else []
        # "(3)" is a number, not a tuple; "(03,)" is not a number: the careful parser below refuses both
        if (len(extents) != 1 or usual[3].endswith(",")) and all(n.strip().isdecimal() for n in extents):
            numbers = [n.strip() for n in extents]
            if all(n == "0" or n[0] != "0" for n in numbers):
                return usual[1], usual[2] == "True", tuple(map(int, numbers))
    import ast

    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise _Bad("its header is not a dict of plain values") from None
    if not isinstance(found, dict) or set(found) != {"descr", "fortran_order", "shape"}:
        raise _Bad("its header must have the keys descr, fortran_order and shape")
    if type(found["fortran_order"]) is not bool or not isinstance(found["shape"], tuple):
        raise _Bad("its header is malformed")
    return found["descr"], found["fortran_order"], found["shape"]


def _dtype(descr: Any) -> str:
    """Our name for a `descr`."""
    if not isinstance(descr, str):
        raise _Bad("it is a record of several fields; only arrays of numbers are read")
    if descr.lstrip("<>|=")[:1] == "O":
        raise UnsafeInputError("object array")
    if descr.lstrip("<>|=")[:1] in _TEXT:
        raise _Left(f"text ({escape(descr, 20)}), not read")
    if descr.lstrip("<>|=")[:1] == "V":
        raise _Bad(
            f"bytes without a type ({escape(descr)}): NumPy writes bfloat16 (V2), float8 and int4 (V1) this way, and "
            "nothing shows which it was; write it again as .safetensors"
        )
    name = _NAMES.get(descr[1:])
    if name is None or descr[0] not in "<>|=" or (descr[0] == "|") != (_CODES[name][0] == "|"):
        raise _Bad(f"dtype {escape(descr)!r} is not a number type that a checkpoint can hold")
    return name


def _read(source: StampedFile, entry: _StoredArray) -> np.ndarray[Any, Any]:
    data = zip_read.read_member(source, entry.member)
    return _array(memoryview(data)[entry.layout.start :], entry.layout)


def _array(buffer: bytearray | memoryview, layout: _NpyLayout) -> np.ndarray[Any, Any]:
    """The values of an array, from its bytes in the file."""
    import numpy as np

    from graftax.tree.dtypes import numpy_dtype

    data = np.frombuffer(buffer, np.uint8)
    dtype = numpy_dtype(layout.spec.dtype)
    aligned = data.ctypes.data % max(dtype.alignment, 1) == 0
    array = data.view(dtype) if aligned else data.copy().view(dtype)
    if layout.swapped == (np.little_endian is True):
        array = array.byteswap()
    if layout.fortran:
        return np.ascontiguousarray(array.reshape(layout.spec.shape[::-1]).T).reshape(layout.spec.shape)
    return array.reshape(layout.spec.shape)


# ---------------------------------------------------------------- writing


def write(path: Path, output: Output) -> None:
    """An archive that numpy.load reads: members are stored, not compressed, in the order of `output.specs`, without
    time stamps. The data of each array begins at a multiple of 64 bytes. At most one tensor is in memory at a time.

    Raises PlanError for dtypes that are not NumPy's own.
    """
    lacking = {
        name: "npz holds NumPy's own dtypes; this one would come back as bytes without a type"
        for name, spec in output.specs.items()
        if spec.dtype not in _CODES
    }
    refuse(output, "npz", lacking)
    long = [name for name in output.specs if len(name.encode("utf-8", "surrogateescape")) > 0xFFFB]
    refuse(output, "npz", dict.fromkeys(long, "a name of more than 65,531 bytes"))
    heads = {name: _npy_head(spec) for name, spec in output.specs.items()}
    sizes = {f"{name}.npy": len(head) + output.specs[name].nbytes for name, head in heads.items()}
    write_archive(path, sizes, _runs(output, heads), output.log)


def _runs(output: Output, heads: Mapping[str, bytes]) -> Iterator[tuple[str, int, tuple[Any, ...]]]:
    """The members in parts; the first part has the header."""
    for name, _, start, data in byte_runs(output):
        member, head = f"{name}.npy", heads[name]
        yield (member, len(head) + start, (data,)) if start else (member, 0, (head, data))


def _npy_head(spec: TensorSpec) -> bytes:
    """A version 1.0 header, as NumPy writes it: padded with spaces to a multiple of 64 bytes."""
    shape = f"({', '.join(map(str, spec.shape))}{',' if len(spec.shape) == 1 else ''})"
    text = f"{{'descr': '{_CODES[spec.dtype]}', 'fortran_order': False, 'shape': {shape}, }}"
    length = -(-(10 + len(text) + 1) // 64) * 64 - 10
    return MAGIC + b"\x01\x00" + struct.pack("<H", length) + text.ljust(length - 1).encode("ascii") + b"\n"
