"""A parity report for a terminal: the verdict, the first layer that diverges, the cause and the fix, then the table."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from graftax.errors import escape
from graftax.parity.report import words

if TYPE_CHECKING:
    from graftax.parity.report.model import ParityReport

_PLAIN = str.maketrans(
    {
        "↔": "<->",
        "–": "-",
        "∞": "inf",
        "…": "...",
        "●": "*",
        "✓": "v",
        "✗": "x",
        "·": ".",
        "→": "->",
        "×": "x",
        "▶": ">",
    }
)
_WIDTHS = (64, 160)
_SHOWN = 6  # rows of weights, settings and reasons
_STYLE = {"error": "bold red", "warning": "yellow", "note": "dim"}


def parity_text(report: ParityReport, width: int | None = None, color: bool = False, ascii: bool = False) -> str:
    """The report as text of at most `width` columns (None: the terminal's): the verdict first, the first layer that
    diverges, cause and fix; then outputs, layers (folded), weights, settings and what was not traced.

    color   with ANSI colours
    ascii   for an output that can only hold ASCII
    """
    columns = columns_of(width)
    return printed(_parts(report, columns), columns, color, ascii)


def columns_of(width: int | None = None) -> int:
    """The columns of a report: `width`, or the terminal's, within what a table needs."""
    return max(_WIDTHS[0], min(_WIDTHS[1], width or shutil.get_terminal_size((110, 40)).columns))


def printed(parts: list[Any], columns: int, color: bool = False, ascii: bool = False) -> str:
    """What rich prints of the parts of a report, as text without trailing blanks."""
    console = Console(
        file=io.StringIO(),
        width=columns,
        force_terminal=color,
        color_system="standard" if color else None,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    console.print(Group(*parts), soft_wrap=False)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    text = "\n".join(line.rstrip() for line in text.rstrip().splitlines())
    return text.translate(_PLAIN) if ascii else text


def sections(titled: Iterable[tuple[str, Any]]) -> list[Any]:
    """The parts of titled tables; those without a body are left out."""
    parts: list[Any] = []
    for title, body in titled:
        if body is not None:
            parts += ["", Text(title, "bold"), Padding(body, (0, 0, 0, 2), expand=False)]
    return parts


def _parts(report: ParityReport, width: int) -> list[Any]:
    parts: list[Any] = [
        Text(words.headline(report), "bold green" if report.ok else "bold red"),
        Text(words.summary(report)),
    ]
    if report.first is not None:
        parts += ["", _finding(report)]
    elif not report.ok:
        said = words.suspect_text(report)
        parts += ["", *([Text(f"Suspect: {said}.")] if said else []), Text(words.no_layer_text(report))]
        parts += [_causes(report)] if report.causes else []
    parts += sections((
        ("outputs", _outputs(report)),
        (f"{_which_layers(report)}: error as a multiple of float32's own", _layers(report, width)),
        (f"weights that differ from those the plan makes from {report.whose}", _weights(report)),
        ("settings that differ", _settings(report)),
        ("not traced", listed(words.by_reason(report.not_traced))),
        ("notes", listed([escape(note, 600) for note in report.notes])),
    ))  # fmt: skip
    tail = _tail(report)
    return [*parts, "", Text(tail, "dim")] if tail else parts


def _pairs() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _finding(report: ParityReport) -> Table:
    """The first divergence: both paths, where, the causes and their fixes."""
    row = report.first
    assert row is not None
    grid = _pairs()
    torch, flax = words.site_name(row.site_torch), words.site_name(row.site_flax)
    grid.add_row("layer", Text(f"{torch}  ↔  {flax}", "bold"))
    grid.add_row("", Text(words.kind_and_count(report), "dim"))
    grid.add_row("where", Text(words.where_text(report)))
    if said := words.suspect_text(report):
        grid.add_row("", Text(said, "dim"))
    if not report.causes:
        grid.add_row("cause", Text(words.unknown_text(report)))
    return _causes(report, grid, row.site_flax.path)


def _causes(report: ParityReport, grid: Table | None = None, here: str = "") -> Table:
    """The causes and their fixes, added to the rows of `grid`. here: the layer whose path is not repeated."""
    if grid is None:
        grid = _pairs()
    for i, cause in enumerate(report.causes[:_SHOWN]):
        about = "" if cause.layer in ("", here) else f" (in {escape(cause.layer, 400)})"
        text = Text(f"{escape(cause.name)}{about}", "bold")
        grid.add_row("cause" if i == 0 else "or", text.append(f": {words.cause_detail(cause)}", "not bold"))
        if cause.fix:
            after = f"   error {words.small(cause.error_before)} → {words.small(cause.error_after)}"
            after = after if cause.error_before else ""
            grid.add_row("fix", Text(escape(cause.fix, 600), "green").append(after, "dim not green"))
    return grid


def _outputs(report: ParityReport) -> Table | None:
    if not report.outputs:
        return None
    table = plain_table()
    for name, justify in (("", "left"), ("", "left"), ("shape", "left"), ("error", "right"), ("× float32", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # pyright: ignore[reportArgumentType]
    table.add_column("", overflow="fold")
    for row in report.outputs:
        table.add_row(
            _mark(row.ok), words.output_name(row.path), words.shape_text(row.shape), words.small(row.error),
            _ratio(row.ratio, not row.ok), Text(words.metric_text(row), "dim" if row.ok else ""),
        )  # fmt: skip
    return table


def _which_layers(report: ParityReport) -> str:
    lines = words.layer_lines(report)
    if not report.layers or any(line.hidden or line.first for line in lines) or len(lines) == len(report.layers):
        return "layers"
    return f"the worst {len(lines)} of {len(report.layers)} layer calls"


def _layers(report: ParityReport, width: int) -> Table | None:
    """Per layer: a mark, both paths, the error of its input, the error it adds, and the error of an ordinary run if it
    fits."""
    if not report.layers:
        return None
    lines = words.layer_lines(report)
    longest = sum(
        max((len(getattr(line, side)) for line in lines if line.rows), default=0) for side in ("torch", "flax")
    )
    ratios = {"before it": "in_ratio", "itself": "out_ratio", "free run": "free_ratio"}
    left = width - 7 - sum(len(name) + 2 for name in ratios)
    if longest + 8 > left:
        left += len("free run") + 2
        del ratios["free run"]
    room = left // 2 - 2
    table = plain_table()
    table.add_column("", no_wrap=True)
    table.add_column(report.side, no_wrap=True)
    table.add_column("Flax", no_wrap=True)
    for name in ratios:
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        if line.hidden:
            table.add_row("", Text(line.gap, "red" if line.bad else "dim"), "")
            continue
        rows = list(line.rows)
        bad = rows[0].status == "diverges"
        many = f" ({len(rows)})" if len(rows) > 1 else ""
        torch, flax = words.shortened(line.torch, room, report.dot), words.shortened(line.flax, room - len(many), "/")
        style = "bold" if line.first else ""
        mark = Text("▶", "bold red") if line.first else _mark(not bad, rows[0].status == "not compared")
        table.add_row(
            mark, Text(torch, style), Text(flax + many, style),
            *(_cell(rows, name, report.threshold) for name in ratios.values()),
        )  # fmt: skip
    return table


def _cell(rows: Any, name: str, threshold: float) -> Text:
    """The largest ratio of these rows, red above the threshold; the free run's is never red."""
    most = _most(getattr(row, name) for row in rows)
    if name == "free_ratio":
        return Text(words.times(most), "dim")
    return _ratio(most, most is not None and not most <= threshold)


def _most(values: Any) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _weights(report: ParityReport) -> Table | None:
    if not report.weights:
        return None
    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="fold")
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for row in report.weights[:_SHOWN]:
        ulp = words.ulp_text(row.largest_ulp)
        many = f"{row.differing:,} of {row.total:,} values" + (f", by at most {ulp}" if ulp else "")
        grid.add_row(escape(row.path, 400), many, Text(escape(row.text, 400), "dim"))
    if len(report.weights) > _SHOWN:
        grid.add_row(Text(f"… {len(report.weights) - _SHOWN} more leaves", "dim"), "", "")
    return grid


def _settings(report: ParityReport) -> Table | None:
    folded = words.folded_settings(report.settings)
    if not folded:
        return None
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    for row, group in folded[:_SHOWN]:
        names = words.fold_names([one.flax for one in group])
        more = f" ({len(group)})" if len(group) > 1 else ""
        text = Text(f"{escape(row.setting)} is {escape(row.have)}, should be {escape(row.want)}")
        grid.add_row(
            Text(row.severity, _STYLE[row.severity]),
            ", ".join(names[:2]) + more,
            text.append(f"   {escape(row.text, 400)}" if row.text else "", "dim"),
        )
    if len(folded) > _SHOWN:
        grid.add_row("", Text(f"… {len(folded) - _SHOWN} more", "dim"), "")
    return grid


def listed(lines: list[str]) -> Text | None:
    """Lines, of which the first few are shown."""
    if not lines:
        return None
    more = [f"… {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return Text("\n".join([*lines[:_SHOWN], *more]), "dim")


def _tail(report: ParityReport) -> str:
    """Counts and time."""
    pairs, seen, of = report.paired
    parts: list[str] = []
    if pairs:
        parts.append(f"{words.count(pairs, 'module pair')} ({seen} of {of} modules with parameters)")
    parts += [text] if (text := words.seconds_text(report.seconds)) else []
    return "; ".join(parts)


def plain_table() -> Table:
    """A table without borders."""
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")


def _mark(ok: bool, unknown: bool = False) -> Text:
    return Text("·", "dim") if unknown else Text("✓", "green") if ok else Text("✗", "bold red")


def _ratio(ratio: float | None, bad: bool) -> Text:
    return Text(words.times(ratio), "bold red" if bad else "")
