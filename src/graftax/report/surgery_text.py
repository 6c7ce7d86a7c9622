"""The report of a replacement as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftax.errors import escape
from graftax.report.inspecting import aligned

_SHOWN = 60


def replacement_text(report: Mapping[str, Any], out: str, dry_run: bool) -> str:
    """One row per replaced leaf (values changed, the largest change, hashes before and after), then the counts."""
    rows: list[tuple[str, ...]] = []
    for change in report["changes"][:_SHOWN]:
        shape = "x".join(map(str, change["shape"])) or "scalar"
        changed = "?" if change["changed"] is None else change["changed"]
        largest = "" if change["largest"] is None else f"by at most {change['largest']:.3g}"
        hashes = f"sha256 {change['before'][:8]} -> {change['after'][:8]}"
        count = f"{changed} of {change['values']} values changed"
        rows.append((escape(change["path"]), f"{change['dtype']} {shape}", count, largest, hashes))
    lines = aligned(rows)
    if len(report["changes"]) > _SHOWN:
        lines.append(f"  ... and {len(report['changes']) - _SHOWN} more (--json has all)")
    lines += [f"  {escape(name)} no longer shares its memory with {escape(to)}" for name, to in report["untied"]]
    values = ", ".join(f"{escape(edit['selector'])} := {escape(edit['value'])}" for edit in report["edits"])
    count = len(report["selected"])
    if dry_run:
        return "\n".join([*lines, f"{values}: {count} of {report['leaves']} leaves would change; nothing written"])
    same = len(report["untouched"])
    counts = f"{count} of {report['leaves']} leaves replaced, {same} untouched bit for bit"
    notes = [f"note: {escape(note, 400)}" for note in report.get("notes", ())]
    return "\n".join([*lines, f"{values}: {counts}; wrote {escape(out)}", *notes])
