"""A study as one self-contained HTML page, in the style of the parity report."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from graftax.parity.report.html import page, save_page
from graftax.studies import study_words as words

if TYPE_CHECKING:
    from graftax.studies.study import Study

MARK = "graftax ablation study"
"""A mark near the start of every page: only a file that contains it is replaced."""


def study_html(study: Study) -> str:
    """The page as text. Every name from a model or a file is escaped by the template."""
    context = {
        "study": study,
        "mark": MARK,
        "seconds": "",
        "headline": words.headline(study),
        "warning": words.warning(study),
        "heads": words.heads(study),
        "lines": words.lines(study, (study.baseline, *study.ranked)),
        "places": len({(row.path, row.head) for row in study.rows[1:]}),
        "values": len({row.value for row in study.rows[1:]}),
    }
    return page("study.html", context, "graftax.studies")


def save_study_html(study: Study, path: str | PathLike[str]) -> None:
    """Write the page in one step. StorageError if writing fails, or if the path holds another file."""
    save_page(study_html(study), path, MARK, "an ablation study")
