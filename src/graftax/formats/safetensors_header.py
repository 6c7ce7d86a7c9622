"""The header of a safetensors file: 8 bytes of length, then JSON {name: {dtype, shape, data_offsets}}. No NumPy here.

Stricter than the official reader (0.8), which accepts duplicate names and keeps the last one. Format: the README of the
safetensors repository; 4- and 6-bit types count in bits and must fill whole bytes.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from typing import Any

from graftax.errors import Failure, FormatError, UnsafeInputError, escape
from graftax.formats.io import strict_json
from graftax.tree import TensorSpec
from graftax.tree.gc_paused import gc_paused
from graftax.tree.limits import check_limit, limit, variable

NAMES: dict[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn", "F4": "float4_e2m1fn",
}  # fmt: skip
"""dtype in the file -> dtype name"""
CODES = {name: code for code, name in NAMES.items()}
PREFIX = 8
_MAX_RANK = 64  # the most axes that a NumPy array can have
_MAX_BYTES = 1 << 62
_BIG_HEADER = 4 << 20  # from this size on, a header is scanned before it is parsed
_SLACK = 10_000  # JSON signs that the header may have beyond those of the tensors
_FIELDS = {"dtype", "shape", "data_offsets"}

Range = tuple[int, int]
"""begin and end of a tensor's bytes, counted from the start of the file"""


def header_length(prefix: bytes, file_size: int, label: str) -> int:
    """The bytes of JSON that follow the first 8 bytes. Raises FormatError, UnsafeInputError (over the limit)."""
    if len(prefix) < PREFIX:
        raise FormatError(f"{label} is truncated: {file_size} bytes, a safetensors file has at least 10")
    (length,) = struct.unpack("<Q", prefix[:PREFIX])
    check_limit("header", length, f"{label}: header of a safetensors file")
    if length + PREFIX > file_size:
        raise FormatError(f"{label} is truncated: its header takes {length:,} bytes, the file has {file_size:,}")
    if length < 2:
        raise FormatError(f"{label}: the header of a safetensors file cannot be {length} bytes long")
    return length


def parse_header(
    raw: bytes, file_size: int, label: str
) -> tuple[dict[str, TensorSpec], dict[str, Range], dict[str, str]]:
    """(specs, byte ranges, metadata) of the header text `raw`, in the header's order.

    Every byte after the header must belong to exactly one tensor. Raises FormatError listing every bad entry, and
    UnsafeInputError beyond a limit. The numbers in the header never cause an allocation.
    """
    if raw[:1] != b"{":
        raise FormatError(f"{label}: the header must begin with '{{', found {raw[:1]!r}")
    _look_through(raw, label)
    with gc_paused():  # a hundred thousand small objects: this saves half of the time
        return _parse(strict_json.parse_object(raw, f"{label}: header", flat=True), PREFIX + len(raw), file_size, label)


def _parse(
    entries: dict[str, Any], start: int, file_size: int, label: str
) -> tuple[dict[str, TensorSpec], dict[str, Range], dict[str, str]]:
    metadata = _metadata(entries.pop("__metadata__", None), label)
    check_limit("leaves", len(entries), label)
    specs: dict[str, TensorSpec] = {}
    ranges: dict[str, Range] = {}
    known: dict[tuple[Any, ...], TensorSpec] = {}  # a hundred thousand tensors have a few dozen shapes
    failures: list[Failure] = []
    for name, entry in entries.items():
        fault = _entry_fault(entry)
        if fault is None:
            begin, end = entry["data_offsets"]
            key = (entry["dtype"], *entry["shape"])
            spec = known.get(key)
            if spec is None:
                spec = known[key] = TensorSpec(key[1:], NAMES[key[0]])
            specs[name] = spec
            ranges[name] = (start + begin, start + end)
        else:
            failures.append(Failure(fault, file=label, key=name))
    if not failures:
        failures = _layout_faults(ranges, start, file_size, label)
    if failures:
        raise FormatError(f"{label}: the header has {len(failures)} faults:", failures)
    return specs, ranges, metadata


def _look_through(raw: bytes, label: str) -> None:
    """Scan a large header before parsing it: too many tensors, or more brackets and commas than a header needs, would
    take far more memory than the header itself."""
    if len(raw) < _BIG_HEADER:
        return
    tensors = raw.count(b'"data_offsets"')
    check_limit("leaves", tensors, label)
    plain = raw.count(b"[") <= 2 * tensors + _SLACK and raw.count(b"{") <= tensors + _SLACK
    if plain and raw.count(b",") <= 16 * tensors + _SLACK:
        return
    # The quick count failed. Text (a training log in the metadata) may hold any of these signs, so remove it first.
    bare = re.sub(rb'"(?:[^"\\]|\\.)*"', b"0", raw, flags=re.DOTALL)
    objects, lists, commas = bare.count(b"{"), bare.count(b"["), bare.count(b",")
    check_limit("leaves", objects, label)
    if lists > 2 * objects or commas > (_MAX_RANK + 4) * objects + limit("leaves"):
        raise UnsafeInputError(
            f"{label}: a header of {len(raw):,} bytes with {lists:,} lists, {commas:,} commas, {objects:,} tensors",
            next=f"No checkpoint looks like that. {variable('leaves')} raises the limit.",
        )


def _metadata(value: Any, label: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):  # pyright: ignore
        raise FormatError(f"{label}: __metadata__ must map text to text")
    return value  # pyright: ignore[reportUnknownVariableType]


def _entry_fault(entry: Any) -> str | None:
    """The fault of one tensor's entry; None if it has none."""
    if type(entry) is not dict or entry.keys() != _FIELDS:  # pyright: ignore[reportUnknownMemberType]
        return "its entry must have dtype, shape and data_offsets, and nothing else"
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]  # pyright: ignore
    if type(code) is not str or code not in NAMES:
        return f"unknown dtype {escape(code)!r}; known: {', '.join(NAMES)}"
    if type(shape) is not list or not _whole(shape):  # pyright: ignore
        return f"the shape must be a list of whole numbers from 0, found {escape(shape)}"
    if len(shape) > _MAX_RANK:  # pyright: ignore
        return f"{len(shape)} axes; an array has at most {_MAX_RANK}"  # pyright: ignore
    if type(offsets) is not list or len(offsets) != 2 or not _whole(offsets):  # pyright: ignore
        return f"data_offsets must be two whole numbers, found {escape(offsets)}"
    begin, end = offsets  # pyright: ignore
    bits = _BITS[code]
    extent = bits
    for n in shape:  # pyright: ignore
        extent *= n or 1  # an empty shape with huge axes is refused too
        if extent > 8 * _MAX_BYTES:
            return f"shape {escape(shape)} is larger than any file"
    total = 0 if 0 in shape else extent  # pyright: ignore
    if total % 8:
        return f"{escape(shape)} of {code} does not fill whole bytes"
    if 8 * (end - begin) != total:
        return f"data_offsets {escape(offsets)} do not hold {escape(shape)} of {code}, which takes {total // 8:,} bytes"
    return None


def _whole(values: list[Any]) -> bool:
    """True if all are integers (not booleans) from 0."""
    for value in values:  # noqa: SIM110 (a generator takes twice the time, a hundred thousand times)
        if type(value) is not int or value < 0:
            return False
    return True


_BITS = {code: TensorSpec((), name).bits for code, name in NAMES.items()}


def _layout_faults(ranges: Mapping[str, Range], start: int, file_size: int, label: str) -> list[Failure]:
    """Overlaps, holes, and missing or surplus bytes at the end."""
    out: list[Failure] = []
    at = start
    for name, (begin, end) in sorted(ranges.items(), key=lambda item: item[1]):
        if begin != at:
            what = "overlaps the tensor before it" if begin < at else f"leaves a hole of {begin - at:,} bytes before it"
            out.append(Failure(f"its data {what}", file=label, key=name))
        at = max(at, end)
    if at > file_size:
        out.append(Failure(f"the file is truncated: {file_size:,} bytes, its tensors end at {at:,}", file=label))
    elif at < file_size:
        out.append(Failure(f"{file_size - at:,} bytes follow the last tensor", file=label))
    return out


# ---------------------------------------------------------------- writing


def build_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], label: str
) -> tuple[bytes, dict[str, Range]]:
    """(the first bytes of the file, byte ranges) for `specs`. Names keep their order. The data of wide types comes
    first, so that every tensor is aligned to its own width (torch's reader requires this); the header is padded to a
    multiple of 8.

    Raises FormatError for what the format cannot hold.
    """
    failures = [
        Failure(fault, file=label, key=name) for name, spec in specs.items() if (fault := storage_fault(name, spec))
    ]
    if failures:
        raise FormatError(f"{label}: {len(failures)} tensors do not fit into safetensors:", failures)
    offsets: dict[str, Range] = {}
    at = 0
    for name in sorted(specs, key=lambda name: -specs[name].bits):
        offsets[name] = (at, at + specs[name].nbytes)
        at = offsets[name][1]
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, spec in specs.items():
        entries[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": list(offsets[name])}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    check_limit("header", len(text), f"{label}: header of a safetensors file")
    start = PREFIX + len(text)
    return struct.pack("<Q", len(text)) + text, {n: (start + offsets[n][0], start + offsets[n][1]) for n in specs}


def storage_fault(name: str, spec: TensorSpec) -> str | None:
    """The reason why safetensors cannot hold this tensor; None if it can."""
    if spec.dtype not in CODES:
        return f"safetensors has no {spec.dtype}"
    if spec.size * spec.bits % 8:
        return f"{spec} does not fill whole bytes, as safetensors requires"
    if name == "__metadata__":
        return "safetensors keeps this name for itself"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "the name is not text that UTF-8 can hold"
    return None
