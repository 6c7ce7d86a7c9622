"""Sizes as text: 5GB, 512MiB, 65536."""

from __future__ import annotations

import re

from graftax.errors import UsageError, escape

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: int | str) -> int:
    """Bytes of `5GB` (powers of ten), `512MiB` (powers of two) or a plain number. UsageError for anything else."""
    if isinstance(text, bool) or not isinstance(text, (int, str)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"{escape(repr(text))} is not a size", next="Give 5GB, 512MiB or a whole number of bytes.")
    if isinstance(text, int):
        size = text
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
        if not found or found[2] == "i":
            raise UsageError(f"{escape(text)!r} is not a size", next="Write 5GB, 512MiB or a number of bytes.")
        size = int(float(found[1]) * _UNITS[found[2]])
    if size <= 0:
        raise UsageError(f"a size must be positive, got {escape(text)}")
    return size


def size_text(count: int) -> str:
    """A number of bytes for a person: 1.4 GB."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
