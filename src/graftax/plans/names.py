"""Fold names that differ only in their numbers into one name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from graftax.errors import escape

NUMBER = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,17})(?![0-9])")  # not 01, which is shown as it is


def numbers_as_ranges(rows: Sequence[Sequence[int]], template: str) -> str:
    """`layers.{}.w` and the numbers of every instance -> `layers.{0..35}.w`; a number that never varies is kept."""
    out = template
    for place in range(len(rows[0]) if rows else 0):
        out = out.replace("\0", _range(sorted({row[place] for row in rows})), 1)
    return out


def _range(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    if list(values) == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return "{" + ",".join(map(str, values[:8])) + (",..}" if len(values) > 8 else "}")


def fold_names(names: Iterable[str]) -> list[str]:
    """Names folded over their numbers: one name with ranges for all that differ only there, in order of first
    appearance."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        groups.setdefault(NUMBER.sub("\0", name), []).append(tuple(int(n) for n in NUMBER.findall(name)))
    return [escape(numbers_as_ranges(rows, template), 240) for template, rows in groups.items()]
