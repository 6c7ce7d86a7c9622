"""What a study says, for the terminal and for the page: the headline, the columns and the cells of its table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftax.errors import counted, escape

if TYPE_CHECKING:
    from graftax.studies.study import Study, StudyRow

_HEADS = {"relative_l2": "relative L2", "cosine": "cosine"}


@dataclass(frozen=True, slots=True)
class Line:
    """One row as text. share: its effect as a part of the largest finite one, from 0 to 1."""

    what: str
    value: str
    cells: tuple[str, ...]
    note: str
    share: float


def headline(study: Study) -> str:
    """'Classifier: 12 runs, one leaf at a time'; for heads also the leaves whose parts they are."""
    text = f"{escape(study.name)}: {counted(len(study.rows) - 1, 'run')}, one {study.each} at a time"
    if study.each != "head":
        return text
    paths = (leaf.rpartition("[")[0] for row in study.rows for leaf in row.leaves)
    leaves = dict.fromkeys("/".join(path.split("/")[-2:]) for path in paths)
    named = ", ".join(map(escape, list(leaves)[:3])) + ", ..." * (len(leaves) > 3)
    return f"{text} (its part of {named})"


def warning(study: Study) -> str:
    """What a baseline that differs between two runs means; '' if it does not."""
    if study.deterministic:
        return ""
    return "Two runs of the unchanged weights differ, as the baseline's row shows: smaller effects mean nothing."


def heads(study: Study) -> tuple[str, ...]:
    """The names of the columns with numbers."""
    first = study.baseline
    named = [_HEADS.get(name, escape(name)) if not first.change else escape(name) for name in first.numbers]
    return tuple(head for name in named for head in ((name, "change") if first.change else (name,)))


def lines(study: Study, rows: Sequence[StudyRow]) -> list[Line]:
    """Rows of the study as text."""
    largest = max((row.size for row in study.rows if math.isfinite(row.size)), default=0.0)
    return [_line(row, largest) for row in rows]


def _line(row: StudyRow, largest: float) -> Line:
    cells: list[str] = []
    for name, number in row.numbers.items():
        cells.append(number_text(number))
        if row.change:
            cells.append(_signed(row.change[name]))
    note = f"{counted(row.not_finite, 'value')} NaN or infinite" if row.not_finite else ""
    share = 1.0 if not math.isfinite(row.size) else row.size / largest if largest else 0.0
    return Line(escape(row.label) or "baseline", escape(row.value), tuple(cells), note, share)


def number_text(number: float) -> str:
    """Four digits: '0.9121', '1.3e-05', 'NaN', '∞'."""
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "∞" if number > 0 else "-∞"
    return f"{number:.4g}"


def _signed(number: float) -> str:
    text = number_text(number)
    return f"+{text}" if number > 0 else text
