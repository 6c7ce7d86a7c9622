"""A study for a terminal: the headline, and a table with the baseline on top and the largest effect below it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from graftax.parity.report.text import columns_of, plain_table, printed
from graftax.studies import study_words as words

if TYPE_CHECKING:
    from graftax.studies.study import Study

_SHOWN = 60  # rows of the table


def study_text(study: Study, width: int | None = None, color: bool = False, ascii: bool = False) -> str:
    """The study as text of at most `width` columns (None: the terminal's). color, ascii: as in `parity_text`."""
    ranked = study.ranked
    shown = words.lines(study, (study.baseline, *ranked[:_SHOWN]))
    table = plain_table()
    table.add_column(study.each, overflow="fold")
    table.add_column("value", overflow="fold")
    for head in words.heads(study):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for i, line in enumerate(shown):
        style = "bold" if i == 0 else ""
        numbers = [Text(cell, style) for cell in line.cells]
        table.add_row(Text(line.what, style), Text(line.value, style), *numbers, Text(line.note, "red"))
    parts: list[Any] = [Text(words.headline(study), "bold")]
    if text := words.warning(study):
        parts.append(Text(text, "yellow"))
    parts.append(table)
    if len(ranked) > _SHOWN:
        parts.append(Text(f"… {len(ranked) - _SHOWN} more rows (.rows; --json)", "dim"))
    return printed(parts, columns_of(width), color, ascii)
