"""Limits on what a file may ask for before it is refused as unsafe. An environment variable raises each limit."""

from __future__ import annotations

import os
from collections.abc import Iterable

from graftax.errors import FormatError, UnsafeInputError, UsageError, escape

LIMITS: dict[str, tuple[int, str]] = {
    "header": (100_000_000, "bytes of a header, index or pickle"),
    "leaves": (1_000_000, "tensors in a checkpoint"),
    "depth": (64, "levels of nesting"),
    "ratio": (100, "bytes unpacked per byte stored"),
    "dense": (1000, "bytes of a tensor per byte stored for it"),
}
"""name -> (the limit, what it counts). `GRAFTAX_LIMIT_<NAME>` overrides it."""

SLACK = 16 << 20
"""No ratio forbids up to this many bytes: a small file of zeros packs well."""


def variable(name: str) -> str:
    """The name of the environment variable of a limit."""
    return f"GRAFTAX_LIMIT_{name.upper()}"


def limit(name: str) -> int:
    """The current value of a limit. UsageError if its variable is not a whole number above zero."""
    text = os.environ.get(variable(name))
    if text is None:
        return LIMITS[name][0]
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{variable(name)} must be a whole number above zero, found {text!r}")
    return int(text)


def beyond(name: str, what: str) -> UnsafeInputError:
    """The error for `what`, which exceeds the limit of that name."""
    return UnsafeInputError(
        f"{what}; the limit is {limit(name):,} {LIMITS[name][1]}",
        next=f"If you trust this file, set {variable(name)} to a larger number.",
    )


def check_limit(name: str, found: int, label: str) -> None:
    """UnsafeInputError if `found` exceeds the limit."""
    if found > limit(name):
        raise beyond(name, f"{label}: {found:,}")


def element_count(shape: Iterable[object], label: str) -> int:
    """The number of elements of a shape that a file gives. FormatError if an extent is not a whole number from 0, if
    the product of the nonzero extents exceeds 2**59 (NumPy wants even the bytes of empty arrays below 2**63), or if
    there are more than 64 axes."""
    count = 1
    empty = False
    for axes, extent in enumerate(shape, 1):
        if type(extent) is not int or extent < 0:
            raise FormatError(f"{label}: an axis cannot have {escape(repr(extent))} elements")
        empty = empty or extent == 0
        count *= extent or 1
        if count > 1 << 59 or axes > 64:
            raise FormatError(f"{label}: its shape is larger than any array")
    return 0 if empty else count
