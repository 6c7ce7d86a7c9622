"""A comparison for a terminal: what changed, how far the outputs move, then the modules, the leaves and the notes. Its
words are those of the page too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text

from graftax.errors import escape
from graftax.parity.report import words
from graftax.parity.report.text import columns_of, listed, plain_table, printed, sections

if TYPE_CHECKING:
    from graftax.studies.comparison import Comparison, LeafRow, LogitsShift, ModuleRow, OutputShift, Shift

SHOWN = 40
"""Up to this many module calls all have a line; of more, those whose own output moves, the most first."""
LEAVES = 12
TITLE = "modules: relative L2 of b's output against a's"


def comparison_text(found: Comparison, width: int | None = None, color: bool = False, ascii: bool = False) -> str:
    """The comparison as text of at most `width` columns (None: the terminal's).

    color   with ANSI colours
    ascii   for an output that can only hold ASCII
    """
    columns = columns_of(width)
    parts: list[Any] = [
        Text(f"{headline(found)}.", "bold"),
        Text(summary(found)),
        *sections((
            ("outputs", _outputs(found)),
            (TITLE, _modules(found, columns)),
            ("leaves that differ", _leaves(found)),
            ("not traced", listed(words.by_reason(found.not_traced))),
            ("notes", listed([escape(note, 600) for note in found.notes])),
        )),
    ]  # fmt: skip
    tail = words.seconds_text(found.seconds)
    return printed([*parts, "", Text(tail, "dim")] if tail else parts, columns, color, ascii)


# ---------------------------------------------------------------- words


def headline(found: Comparison) -> str:
    """'Digits with two sets of weights: 1 of 8 leaves differs'."""
    count = len(found.leaves)
    differ = f"{count} of {found.total} leaves differ{'s' * (count == 1)}" if count else "all leaves are equal"
    return f"{escape(found.model)} with two sets of weights: {differ}"


def summary(found: Comparison) -> str:
    """How far the edit travels: the outputs, the logits, the module calls."""
    parts = [_outputs_text(found.outputs)] if found.outputs else []
    if found.logits is not None:
        parts.append(logits_text(found.logits))
    compared = sum(row.itself is not None for row in found.rows)
    moved = sum(row.own_error > 0 for row in found.rows)
    reached = sum(row.free is not None and row.free.error > 0 for row in found.rows)
    parts.append(
        f"given the same input, {moved} of {words.count(compared, 'module call')} "
        f"give{'s' * (moved == 1)} another output; in a free run, {reached}"
        if moved or reached
        else f"no difference in {words.count(compared, 'module call')}"
    )
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _outputs_text(outputs: Sequence[OutputShift]) -> str:
    worst = max(outputs, key=lambda row: row.shift.error)
    if worst.shift.error == 0:
        return "the output is the same" if len(outputs) == 1 else "the outputs are the same"
    which = "the output moves" if len(outputs) == 1 else f"the outputs move, {words.output_name(worst.path)} the most,"
    return f"{which} by {words.small(worst.shift.error)} (cosine {cosine_text(worst.shift)})"


def logits_text(row: LogitsShift) -> str:
    """'3 of 64 top-1 flips, KL 0.0031 (at most 0.02)'."""
    flips = words.count(row.flips, "top-1 flip")
    return f"{flips} at {words.count(row.positions, 'position')}, KL {_nats(row.kl)} (at most {_nats(row.kl_most)})"


def _nats(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else words.small(value)


def cosine_text(shift: Shift | None) -> str:
    """'0.9987', '1-3e-08' close to 1, '1'; '–' where nothing was compared."""
    if shift is None:
        return "–"
    off = 1.0 - shift.cosine
    if math.isnan(off):
        return "NaN"
    return "0" if shift.cosine == 0 else "1" if off < 1e-11 else f"1-{off:.0e}" if off < 5e-5 else f"{shift.cosine:.4f}"


def error_text(shift: Shift | None) -> str:
    return words.small(None if shift is None else shift.error)


def dtypes_text(row: LeafRow) -> str:
    """'float32', or 'float32 → bfloat16'."""
    return row.dtypes[0] if row.dtypes[0] == row.dtypes[1] else " → ".join(row.dtypes)


# ---------------------------------------------------------------- which calls to show


@dataclass(frozen=True, slots=True)
class CallLine:
    """A line of the table: one call, or a gap of calls that are not shown."""

    rows: tuple[ModuleRow, ...]
    gap: bool = False


def call_lines(rows: Sequence[ModuleRow], shown: int = SHOWN) -> list[CallLine]:
    """All calls, if there are few. Of many: those whose own output moves, the most first, and gaps between them."""
    if len(rows) <= shown:
        return [CallLine((row,)) for row in rows]
    moved = [i for i, row in enumerate(rows) if row.own_error > 0]
    chosen = set(sorted(moved, key=lambda i: -rows[i].own_error)[: shown // 2]) | {0}
    lines: list[CallLine] = []
    gap: list[ModuleRow] = []
    for i, row in enumerate(rows):
        if i not in chosen:
            gap.append(row)
            continue
        lines += [CallLine(tuple(gap), True)] * bool(gap) + [CallLine((row,))]
        gap = []
    return lines + [CallLine(tuple(gap), True)] * bool(gap)


def most(rows: Sequence[ModuleRow], name: Literal["itself", "free"]) -> float | None:
    """The largest error of these calls; None if none was compared."""
    return max((shift.error for row in rows if (shift := getattr(row, name)) is not None), default=None)


def edited_mark(row: ModuleRow) -> str:
    """'●' at a module whose own leaves differ."""
    return "●" if row.edited else ""


# ---------------------------------------------------------------- tables


def _outputs(found: Comparison) -> Table | None:
    if not found.outputs:
        return None
    table = plain_table()
    for name in ("", "shape"):
        table.add_column(name, no_wrap=True)
    for name in ("moves by", "cosine", "max |b-a|"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in found.outputs:
        text = escape(row.text, 400)
        if found.logits is not None and found.logits.path == row.path:
            text = logits_text(found.logits)
        table.add_row(
            words.output_name(row.path), words.shape_text(row.shape), error_text(row.shift),
            cosine_text(row.shift), words.small(row.max_abs), Text(text, "dim"),
        )  # fmt: skip
    if found.logits is not None and found.logits.path not in {row.path for row in found.outputs}:
        row = found.logits
        table.add_row(escape(row.path), words.shape_text(row.shape), "", "", "", Text(logits_text(row), "dim"))
    return table


def _modules(found: Comparison, width: int) -> Table | None:
    if not found.rows:
        return None
    lines = call_lines(found.rows)
    table = plain_table()
    table.add_column("", no_wrap=True)
    table.add_column("module", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in ("itself", "cosine", "free run", "cosine"):
        table.add_column(name, justify="right", no_wrap=True)
    room = width - 60
    for line in lines:
        if line.gap:
            what = Text(f"… {words.count(len(line.rows), 'call')}, at most", "dim")
            itself, free = (Text(words.small(most(line.rows, name)), "dim") for name in ("itself", "free"))
            table.add_row("", what, "", itself, "", free)
            continue
        row = line.rows[0]
        own = row.own_error > 0
        style = "bold" if row.edited else ""
        table.add_row(
            Text(edited_mark(row), "bold yellow"),
            Text(words.shortened(escape(row.name, 400), room, "/"), style),
            Text(escape(row.text or row.kind, 60), "dim"),
            Text(error_text(row.itself), "bold" if own else "dim"),
            Text(cosine_text(row.itself), "" if own else "dim"),
            error_text(row.free),
            cosine_text(row.free),
        )
    return table


def _leaves(found: Comparison) -> Table | None:
    if not found.leaves:
        return None
    table = plain_table()
    for name in ("", "shape", "", "values"):
        table.add_column(name, no_wrap=name != "")
    for name in ("moves by", "cosine"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.leaves[:LEAVES]:
        table.add_row(
            escape(row.path, 400), words.shape_text(row.shape), Text(dtypes_text(row), "dim"),
            f"{row.differing:,} of {row.total:,}", error_text(row.shift), cosine_text(row.shift),
        )  # fmt: skip
    if len(found.leaves) > LEAVES:
        table.add_row(Text(f"… {len(found.leaves) - LEAVES} more", "dim"))
    return table
