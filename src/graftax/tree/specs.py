"""The spec of a leaf: its shape and dtype. Also the dtypes that graftax knows, and the types of a side and a key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from graftax.errors import FormatError, escape

Side = Literal["torch", "flax"]
SideBy = Literal["kind", "metadata", "names", "stated"]
"""What decided a side: the kind of the file or object, a file's metadata, names alone, or the user."""
Key = str | int | tuple[Any, ...]
"""One part of a path as the live tree holds it: text, a list index, or (NNX weight norm) a tuple."""
# name: (bits, kind), names as NumPy and ml_dtypes write them; kind: f float, i int, u unsigned, b bool, c complex
DTYPES: dict[str, tuple[int, str]] = {
    "bool": (8, "b"),
    "int4": (4, "i"), "int8": (8, "i"), "int16": (16, "i"), "int32": (32, "i"), "int64": (64, "i"),
    "uint4": (4, "u"), "uint8": (8, "u"), "uint16": (16, "u"), "uint32": (32, "u"), "uint64": (64, "u"),
    "float16": (16, "f"), "bfloat16": (16, "f"), "float32": (32, "f"), "float64": (64, "f"),
    "float8_e4m3fn": (8, "f"), "float8_e5m2": (8, "f"), "float8_e4m3fnuz": (8, "f"), "float8_e5m2fnuz": (8, "f"),
    "float8_e8m0fnu": (8, "f"), "float6_e2m3fn": (6, "f"), "float6_e3m2fn": (6, "f"), "float4_e2m1fn": (4, "f"),
    "complex64": (64, "c"), "complex128": (128, "c"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The shape and dtype name of a leaf: what is known without reading its values."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise FormatError(f"unknown dtype {escape(self.dtype)!r}; known: {', '.join(DTYPES)}")

    @property
    def bits(self) -> int:
        """Bits of one element: 4 or 6 for the packed types."""
        return DTYPES[self.dtype][0]

    @property
    def kind(self) -> str:
        """f, i, u, b or c."""
        return DTYPES[self.dtype][1]

    @property
    def floating(self) -> bool:
        return self.kind == "f"

    @property
    def packed(self) -> bool:
        """True if several elements share a byte on disk. Such a tensor travels as its bytes (a flat uint8 array) and
        only under identity."""
        return self.bits < 8

    @property
    def size(self) -> int:
        out = 1
        for extent in self.shape:
            out *= extent
        return out

    @property
    def nbytes(self) -> int:
        """Bytes on disk, computed from bits: two 4-bit codes share one byte."""
        return (self.size * self.bits + 7) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"
