"""A parity report as one self-contained HTML page: no external script, font or image; light and dark."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftax.errors import StorageError, escape
from graftax.formats.io.own_file import refuse_other_file
from graftax.parity.report import view, words

if TYPE_CHECKING:
    from graftax.parity.report.model import LayerRow, ParityReport

MARK = "graftax parity report"
"""A mark near the start of every page: only a file that contains it is replaced."""


def parity_html(report: ParityReport) -> str:
    """The page as text. Every name from a model or a file is escaped by the template."""
    return page("parity.html", _context(report))


def page(template: str, context: Mapping[str, Any], *folders: str) -> str:
    """A page from a template of this package, or of the packages `folders`, whose templates may use those of this
    one."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, "templates") for name in ("graftax.parity.report", *folders)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(times=words.times, small=words.small, safe_name=lambda text: escape(text, 600))
    return environment.get_template(template).render(context)


def save_parity_html(report: ParityReport, path: str | os.PathLike[str]) -> None:
    """Write the page in one step. StorageError if writing fails, or if the path holds another file."""
    save_page(parity_html(report), path, MARK, "a parity report")


def save_page(text: str, path: str | os.PathLike[str], mark: str, what: str) -> None:
    """Write a page in one step. StorageError if writing fails, or if the path holds a file without the mark, which is
    not `what`."""
    out = Path(path)
    refuse_other_file(out, mark, what)
    staged = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, out)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise StorageError(f"cannot write {escape(path)}: {error.strerror or error}") from error


def _context(report: ParityReport) -> Mapping[str, Any]:
    first = report.first
    compared = [row for row in report.layers if row.status != "not compared"]
    return {
        "report": report,
        "mark": MARK,
        "words": words,
        "headline": words.headline(report),
        "summary": words.summary(report),
        "first": first,
        "number": next((i for i, row in enumerate(report.layers) if row is first), -1),
        "before": _neighbours(report),
        "chart": view.chart(report),
        "blocks": view.blocks(report),
        "gauge": view.GAUGE,
        "limit": view.gauge_x(report.threshold),
        "one": view.gauge_x(1.0),
        "compared": len(compared),
        "bad": sum(row.status == "diverges" for row in compared),
        "worst": words.worst_ratio(compared),
        "settings": words.folded_settings(report.settings),
        "reasons": words.by_reason(report.not_traced, shown=12),
        "notes": report.notes,
        "seconds": words.seconds_text(report.seconds),
        "faults": sum(row.severity == "error" for row in report.settings),
    }


def _neighbours(report: ParityReport) -> LayerRow | None:
    """The compared call right before the first that diverges."""
    earlier: LayerRow | None = None
    for row in report.layers:
        if row is report.first:
            return earlier
        if row.pair.leaf and row.status != "not compared":
            earlier = row
    return None
