"""The figures as a picture: a bar a contender (its median), a dot a run, and beside them the peak of memory."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from benchmarks.measuring import Group, Row
from benchmarks.showing import bytes_text, ordered, ratio_text, seconds_text, state

WIDTH = 1000
NAME = 196  # where names end
BARS, BARS_END = 208, 560  # of seconds; figures stand behind the bar
MEMORY, MEMORY_END = 770, 900
LINE, HEAD, GAP, MARGIN = 26, 52, 22, 24

STYLE = """
svg { background: #ffffff; font: 13px system-ui, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif; }
text { fill: #1b1f24; }
.title { font-size: 15px; font-weight: 650; }
.soft { fill: #5b6470; font-size: 12px; }
.name { text-anchor: end; }
.ours { font-weight: 650; }
.bar { fill: #c9d3df; } .bar.mine { fill: #2f6fb3; } .bar.base { fill: #8b97a5; }
.memory { fill: #dfe5ec; } .memory.mine { fill: #8fb4dc; }
.run { fill: #1b1f24; fill-opacity: 0.55; }
.line { stroke: #8b97a5; stroke-dasharray: 3 3; }
.bad { fill: #b8232f; }
"""


def svg(groups: Sequence[Group]) -> str:
    """One picture of all groups, below each other."""
    out: list[str] = []
    y = MARGIN
    for group in groups:
        lines, y = _group(group, y)
        out += [*lines]
        y += GAP
    size = f'width="{WIDTH}" height="{y:g}" viewBox="0 0 {WIDTH} {y:g}"'
    body = "\n".join(out)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}</style>\n{body}\n</svg>\n'


def _group(group: Group, top: float) -> tuple[list[str], float]:
    """The drawing of a group, and where it ends."""
    rows = ordered(group)
    longest = max((sample.seconds for row in rows for sample in row.samples), default=1.0)
    most = max((row.maximum("anonymous") or 0 for row in rows), default=0)
    scale = (BARS_END - BARS) / longest
    out = [
        _text(MARGIN, top + 14, group.title, "title"),
        _text(BARS, top + 36, "seconds (median; a dot a run)", "soft"),
    ]
    if most:
        out.append(_text(MEMORY, top + 36, "peak of memory that no file backs", "soft"))
    end = top + HEAD + LINE * len(rows)
    base = next((row.median() for row in rows if row.name == group.baseline), None)
    if base is not None:
        x, low = BARS + base * scale, top + HEAD + LINE * sum(bool(row.samples) for row in rows)
        out.append(f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{top + HEAD - 4:g}" y2="{low:g}"/>')
    for number, row in enumerate(rows):
        out += _row(row, group, top + HEAD + LINE * number, scale, most)
    return out, end


def _row(row: Row, group: Group, y: float, scale: float, most: float) -> list[str]:
    base = row.name == group.baseline
    kind = " base" if base else " mine" if row.required else ""
    middle = y + LINE / 2 + 4
    out = [_text(NAME, middle, row.name, "name ours" if row.required and not base else "name")]
    median = row.median()
    if median is None:
        return [*out, _text(BARS, middle, state(row)[:110], "bad" if row.wrong else "soft")]
    out.append(_bar(BARS, y, median * scale, f"bar{kind}"))
    for sample in row.samples:
        out.append(f'<circle class="run" cx="{BARS + sample.seconds * scale:.1f}" cy="{y + LINE / 2:.1f}" r="2"/>')
    reach = max(sample.seconds for sample in row.samples)
    figures = f"{seconds_text(median)}  {ratio_text(group.ratio(row))}"
    out.append(_text(BARS + reach * scale + 8, middle, figures, "ours" if row.required and not base else ""))
    anonymous = row.maximum("anonymous")
    if anonymous and most:
        width = anonymous / most * (MEMORY_END - MEMORY)
        out.append(_bar(MEMORY, y, width, f"memory{' mine' if kind == ' mine' else ''}"))
        out.append(_text(MEMORY + width + 8, middle, bytes_text(anonymous), "soft"))
    return out


def _bar(x: float, y: float, width: float, kind: str) -> str:
    shown = max(width, 1)
    return f'<rect class="{kind}" x="{x:g}" y="{y + 4:g}" width="{shown:.1f}" height="{LINE - 8}" rx="2"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
