"""A comparison as one self-contained HTML page, in the form of parity's."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from graftax.parity.report import words
from graftax.parity.report.html import page, save_page
from graftax.parity.report.view import FEW, Chart, Point, Scale, decades, zones
from graftax.studies import comparison_text

if TYPE_CHECKING:
    from graftax.studies.comparison import Comparison, ModuleRow

MARK = "graftax comparison"
"""A mark near the start of every page: only a file that contains it is replaced."""


def comparison_html(found: Comparison) -> str:
    """The page as text."""
    return page("comparison.html", _context(found), "graftax.studies")


def save_comparison_html(found: Comparison, path: str | os.PathLike[str]) -> None:
    """Write the page in one step. StorageError if writing fails, or if the path holds another file."""
    save_page(comparison_html(found), path, MARK, "a comparison")


@dataclass(frozen=True, slots=True)
class Block:
    """Calls that belong together: those below one numbered module ('layers/3'), or below one part of the model.
    rows: the number of every call, and the call; itself, free: the largest errors."""

    name: str
    rows: tuple[tuple[int, ModuleRow], ...]
    itself: float | None
    free: float | None
    open: bool


def _context(found: Comparison) -> Mapping[str, Any]:
    return {
        "found": found,
        "mark": MARK,
        "words": words,
        "text": comparison_text,
        "headline": comparison_text.headline(found),
        "summary": comparison_text.summary(found),
        "chart": _chart(found),
        "blocks": list(_blocks(found.rows)),
        "moved": sum(row.own_error > 0 for row in found.rows),
        "worst": max(found.outputs, key=lambda row: row.shift.error, default=None),
        "reasons": words.by_reason(found.not_traced, shown=12),
        "notes": found.notes,
        "seconds": words.seconds_text(found.seconds),
    }


def _chart(found: Comparison) -> Chart | None:
    """Both errors of every call on a log scale, in the order of calls; the model itself is no layer. None if nothing
    moves."""
    numbered = [(i, row) for i, row in enumerate(found.rows) if row.path]
    rows = [row for _, row in numbered]
    errors = [shift.error for row in rows for shift in (row.itself, row.free) if shift is not None]
    finite = [error for error in errors if 0 < error < math.inf]
    if not any(errors):
        return None
    scale = Scale(len(rows), *decades(finite or [1.0]))
    points = [
        Point(
            scale.x(i), scale.y(row.own_error), "out", bool(row.edited), number,
            f"{row.name}, itself: {words.small(row.own_error)}", not math.isfinite(row.own_error),
        )
        for i, (number, row) in enumerate(numbered)
        if row.own_error > 0
    ]  # fmt: skip
    points.sort(key=lambda point: point.bad)
    inner = _innermost(rows)
    free = scale.line((i, None if row.free is None else row.free.error) for i, row in enumerate(rows) if i in inner)
    few = len(rows) <= FEW
    keys = [((row.path, row.call), row.path) if few else (_block_of(row), _block_of(row)) for row in rows]
    return Chart(scale.ticks(), "", free, tuple(points), tuple(zones(keys, scale.step, "/")), None, "middle")


def _innermost(rows: Sequence[ModuleRow]) -> set[int]:
    """The calls without calls inside: a container's call begins before theirs."""
    depths = [row.depth for row in rows]
    return {i for i, depth in enumerate(depths) if i + 1 == len(depths) or depths[i + 1] <= depth}


def _blocks(rows: Sequence[ModuleRow]) -> Iterator[Block]:
    few = len(rows) <= comparison_text.SHOWN
    for name, group in groupby(enumerate(rows), key=lambda item: _block_of(item[1])):
        items = tuple(group)
        inside = [row for _, row in items]
        itself, free = (comparison_text.most(inside, name) for name in ("itself", "free"))
        yield Block(name, items, itself, free, few or any(row.own_error > 0 for row in inside))


def _block_of(row: ModuleRow) -> str:
    """The path of a call up to its first part that ends in a number, else its first part."""
    parts = row.path.split("/")
    for i, part in enumerate(parts):
        if part[-1:].isdigit():
            return "/".join(parts[: i + 1])
    return parts[0]
