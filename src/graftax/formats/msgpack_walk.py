"""Parse Flax msgpack by position: the tree with the place of every array in the file, without reading the arrays."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

from graftax.errors import FormatError, escape
from graftax.formats.io.source import StampedFile
from graftax.tree import DTYPES, Key, TensorSpec
from graftax.tree.limits import check_limit, element_count, limit

NDARRAY, COMPLEX, SCALAR = 1, 2, 3
CHUNKED = "__msgpack_chunked_array__"
_BLOCK = 1 << 16

# first byte -> (kind, format of the length or value that follows)
_MARKS: dict[int, tuple[str, str]] = {
    0xC0: ("none", ""), 0xC2: ("false", ""), 0xC3: ("true", ""),
    0xC4: ("bin", ">B"), 0xC5: ("bin", ">H"), 0xC6: ("bin", ">I"),
    0xC7: ("ext", ">B"), 0xC8: ("ext", ">H"), 0xC9: ("ext", ">I"),
    0xCA: ("number", ">f"), 0xCB: ("number", ">d"),
    0xCC: ("number", ">B"), 0xCD: ("number", ">H"), 0xCE: ("number", ">I"), 0xCF: ("number", ">Q"),
    0xD0: ("number", ">b"), 0xD1: ("number", ">h"), 0xD2: ("number", ">i"), 0xD3: ("number", ">q"),
    0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I"),
    0xDC: ("array", ">H"), 0xDD: ("array", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip
FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


@dataclass(frozen=True, slots=True, eq=False)
class Array:
    """A leaf: its spec, and the stretches of the file that hold its elements. A Python number has `value` in place of
    stretches, and `place`, the stretch of the whole leaf."""

    spec: TensorSpec
    parts: tuple[tuple[int, int], ...]
    value: Any = None
    place: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Text:
    """A leaf that is neither an array nor a number: a description, and the stretch of the file that holds it. For text
    it keeps the first 4,096 bytes."""

    text: str
    raw: str = ""
    place: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Aside:
    """A leaf whose array is stored outside the file: what the file says of it, who wrote it, and where the array is."""

    said: str
    writer: str
    place: str


PLACEHOLDERS = {b"PLACEHOLDER://": "Orbax before 0.5", b"//GDAPlaceholder:": "flax.training.checkpoints"}
"""Texts that stand for an array and end in its name -> the program that writes them."""
_LONGEST_NAME = 4096


@dataclass(slots=True)
class _Cursor:
    """A position in the file. Small values are read through a block; the bytes of arrays are skipped."""

    source: StampedFile
    label: str
    at: int = 0
    block: bytes = b""
    start: int = 0
    taken: int = 0
    values: int = 0
    most: int = 0
    deepest: int = 0
    longest: int = 0

    def take(self, length: int) -> bytes:
        self.taken += length
        if self.taken > self.longest and self.at + length <= self.source.size:
            check_limit("header", self.taken, self.label)
        begin = self.at - self.start
        if begin < 0 or begin + length > len(self.block):
            size = max(length, min(_BLOCK, self.source.size - self.at))
            self.block, self.start, begin = bytes(self.source.read(self.at, size)), self.at, 0
        self.at += length
        return self.block[begin : begin + length]

    def skip(self, length: int) -> int:
        """Skip a stretch and return where it begins."""
        at = self.at
        if at + length > self.source.size:
            raise FormatError(f"{self.label} is truncated: {at + length - self.source.size:,} bytes are missing")
        self.at += length
        return at

    def token(self) -> tuple[str, Any]:
        """(kind, value or length) of the next token; for "ext": (type, length)."""
        first = self.take(1)[0]
        kind, form = mark(first)
        if kind == "bad":
            raise FormatError(f"{self.label}: byte 0x{first:02x} at {self.at - 1:,} begins no msgpack value")
        if form == "":
            return kind, {"true": True, "false": False}.get(kind)
        if form.isdecimal():
            number: Any = int(form) if kind != "number" or first < 0x80 else first - 256
        else:
            (number,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return (kind, (struct.unpack("b", self.take(1))[0], number)) if kind == "ext" else (kind, number)


def mark(first: int) -> tuple[str, str]:
    """The kind of value that a first byte begins, and the format of the number that follows (in the fixed forms: the
    number itself)."""
    if first in _MARKS:
        return _MARKS[first]
    if first in FIXED_EXT:
        return "ext", str(FIXED_EXT[first])
    if first < 0x80 or first >= 0xE0:
        return "number", str(first)
    if first < 0x90:
        return "map", str(first & 0x0F)
    if first < 0xA0:
        return "array", str(first & 0x0F)
    return ("str", str(first & 0x1F)) if first < 0xC0 else ("bad", "0")


def parse(source: StampedFile, label: str) -> dict[Key, Any] | list[Any]:
    """The tree in the file: dicts and lists with Array, Text and Aside at the leaves.

    Raises FormatError if the file is malformed or not a tree, UnsafeInputError beyond a limit.
    """
    walk = _Cursor(source, label, most=2 * limit("leaves"), deepest=limit("depth"), longest=limit("header"))
    root = _found(walk, "", 0)
    if walk.at != source.size:
        raise FormatError(f"{label} has {source.size - walk.at:,} bytes after its end")
    if not isinstance(root, (dict, list)):
        raise FormatError(f"{label} holds a single value, not a tree")
    return root


def itemsize(spec: TensorSpec) -> int:
    """Bytes of an element: one for the types below a byte."""
    return max(spec.bits // 8, 1)


def _value(walk: _Cursor, where: str, depth: int) -> Any:
    """The next value: dict, list, Array, Text or Aside. An empty container is a Text leaf."""
    start = walk.at
    found = _found(walk, where, depth)
    if isinstance(found, Text) or (isinstance(found, Array) and found.value is not None):
        return replace(found, place=(start, walk.at - start))
    if not found and isinstance(found, (dict, list)):
        return Text("an empty list" if isinstance(found, list) else "an empty map", place=(start, walk.at - start))
    return found


def _found(walk: _Cursor, where: str, depth: int) -> Any:
    walk.values += 1
    if depth > walk.deepest or walk.values > walk.most:
        check_limit("depth", depth, walk.label)
        check_limit("leaves", walk.values, walk.label)
    kind, value = walk.token()
    if kind == "map":
        return _map(walk, value, where, depth)
    if kind == "array":
        return [_value(walk, f"{where}/{i}", depth + 1) for i in range(value)]
    if kind == "ext":
        return _extension(walk, value[0], value[1], where)
    if kind in ("str", "bin"):
        length = value
        at = walk.skip(length)
        raw = bytes(walk.source.read(at, min(length, _LONGEST_NAME))) if kind == "str" else b""
        text = raw.decode("utf-8", "replace")
        writer = next((name for begin, name in PLACEHOLDERS.items() if raw.startswith(begin)), None)
        if writer is not None:
            return Aside(text, writer, text.partition(":")[2].removeprefix("//"))
        return Text(f"str {escape(text[:80])}", text) if kind == "str" else Text(f"{length} bytes")
    return Text("None") if kind == "none" else _number(value)


def _number(value: bool | int | float | complex) -> Array:
    """A Python number as a 0-d leaf that holds it exactly."""
    if isinstance(value, int) and not isinstance(value, bool):
        name = "int64" if value < 1 << 63 else "uint64"
    else:
        name = {bool: "bool", float: "float64", complex: "complex128"}[type(value)]
    return Array(TensorSpec((), name), (), value)


def _map(walk: _Cursor, count: int, where: str, depth: int) -> Any:
    out: dict[Key, Any] = {}
    for _ in range(count):
        kind, value = walk.token()
        if kind == "str":
            try:
                key: Key = walk.take(value).decode("utf-8")
            except UnicodeDecodeError as error:
                raise FormatError(f"{walk.label}: a key below {escape(where or '/')} is not UTF-8") from error
        elif kind == "number" and isinstance(value, int):
            key = value
        else:
            raise FormatError(
                f"{walk.label}: a key below {escape(where or '/')} is of kind {kind}; keys are text or whole numbers"
            )
        if key in out:
            raise FormatError(f"{walk.label} holds the key {escape(key)} twice below {escape(where or '/')}")
        out[key] = _value(walk, f"{where}/{key}", depth + 1)
    if CHUNKED in out:
        return _joined(out, f"{walk.label}: {escape(where)}")
    return _stored_aside(out) or out


def _stored_aside(node: dict[Key, Any]) -> Aside | None:
    """The array that a tensorstore spec stands for, as T5X writes it."""
    driver, store = node.get("driver"), node.get("kvstore")
    if not isinstance(driver, Text) or not isinstance(store, dict):
        return None
    place, base = store.get("path"), store.get("base")
    if isinstance(base, dict) and not isinstance(place, Text):
        place = base.get("path")
    said = f"a tensorstore spec of driver {escape(driver.raw, 20)}"
    return Aside(said, "T5X", place.raw if isinstance(place, Text) else "")


def _joined(chunked: dict[Key, Any], where: str) -> Array:
    """The array whose chunks a map holds."""
    shape, chunks = ({} if isinstance(part, Text) else part for part in map(chunked.get, ("shape", "chunks")))
    if set(chunked) != {CHUNKED, "shape", "chunks"} or not isinstance(shape, dict) or not isinstance(chunks, dict):
        raise FormatError(f"{where}: a chunked array lacks its shape or chunks")
    for numbered in (shape, chunks):
        if set(numbered) != {str(i) for i in range(len(numbered))}:
            raise FormatError(f"{where}: the parts of a chunked array are not numbered from 0")
    numbers = (shape[str(i)] for i in range(len(shape)))
    extents: Any = tuple(number.value if isinstance(number, Array) else None for number in numbers)
    parts = [chunks[str(i)] for i in range(len(chunks))]
    parts = [part for part in parts if isinstance(part, Array) and part.value is None]
    dtypes = {part.spec.dtype for part in parts}
    if len(parts) != len(chunks) or len(dtypes) != 1 or any(len(part.spec.shape) != 1 for part in parts):
        raise FormatError(f"{where}: the chunks of an array are not flat arrays of one dtype")
    count = element_count(extents, where)
    if count != sum(part.spec.size for part in parts):
        raise FormatError(f"{where}: the chunks of an array do not add up to its shape {extents}")
    return Array(TensorSpec(extents, dtypes.pop()), tuple(piece for part in parts for piece in part.parts))


def _extension(walk: _Cursor, code: int, length: int, where: str) -> Array:
    end = walk.at + length
    where = f"{walk.label}: {escape(where)}"
    if end > walk.source.size:
        raise FormatError(f"{walk.label} is truncated: {end - walk.source.size:,} bytes are missing")
    if code == COMPLEX:
        pair = [walk.token() for _ in range(3)]
        kinds = [kind for kind, _ in pair]
        if kinds != ["array", "number", "number"] or pair[0][1] != 2 or walk.at != end:
            raise FormatError(f"{where}: a complex number is not a pair")
        return _number(complex(pair[1][1], pair[2][1]))
    if code not in (NDARRAY, SCALAR):
        raise FormatError(f"{where}: extension type {code}, which flax does not write")
    kind, parts = walk.token()
    kind2, axes = walk.token()
    if (kind, parts, kind2) != ("array", 3, "array") or axes > 64:
        raise FormatError(f"{where}: an array lacks its shape, dtype or bytes")
    shape: Any = tuple(number if kind == "number" else None for kind, number in (walk.token() for _ in range(axes)))
    count = element_count(shape, where)
    kind, size = walk.token()
    name = walk.take(size).decode("ascii", "replace") if kind in ("str", "bin") and size < 64 else ""
    if name not in DTYPES:
        raise FormatError(f"{where}: dtype {escape(name or kind)!r}; known: {', '.join(DTYPES)}")
    spec = TensorSpec(shape, name)
    kind, size = walk.token()
    need = count * itemsize(spec)
    if kind not in ("bin", "str") or size != need or walk.at + size != end or (code == SCALAR and shape):
        raise FormatError(f"{where}: {spec} takes {need:,} bytes, found {escape(size)} of kind {kind}")
    return Array(spec, ((walk.skip(size), size),))
