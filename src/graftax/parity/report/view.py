"""The numbers behind the page's drawings: the chart of errors and the two module trees. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from graftax.parity.report import words

if TYPE_CHECKING:
    from graftax.parity.report.model import LayerRow, ParityReport

UNIT = 2.0**-24  # the smallest error that float32 is held to
WIDTH, HEIGHT = 1120, 340
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 36, 52
FEW = 16  # up to this many calls get a label each under the chart
GAUGE = 132  # width of the small scale in a row of the tree
_GAUGE_SPAN = (-0.7, 6.0)  # its ends, as powers of ten of a ratio


# ---------------------------------------------------------------- the chart


@dataclass(frozen=True, slots=True)
class Point:
    """A mark of the chart: x, y, `shape` 'out' (the module itself) or 'in' (the code before it), bad or not, the number
    of its row."""

    x: float
    y: float
    shape: str
    bad: bool
    row: int
    title: str
    beyond: bool = False


@dataclass(frozen=True, slots=True)
class Zone:
    """A block of layers on the x axis: it begins at x and is `width` wide; `label` is empty if it does not fit."""

    x: float
    width: float
    label: str
    shaded: bool


@dataclass(frozen=True, slots=True)
class Chart:
    """The chart in the coordinates of its view box. `band` is an SVG point list, `free` SVG path data."""

    ticks: tuple[tuple[float, int], ...]
    band: str
    free: str
    points: tuple[Point, ...]
    zones: tuple[Zone, ...]
    first_x: float | None
    anchor: str
    width: int = WIDTH
    height: int = HEIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM
    left: float = LEFT
    right: float = WIDTH - RIGHT


@dataclass(frozen=True, slots=True)
class Scale:
    """Where things stand in a chart of `count` calls and of errors between 10^low and 10^high."""

    count: int
    low: int
    high: int

    @property
    def step(self) -> float:
        return (WIDTH - LEFT - RIGHT) / self.count

    def x(self, i: float) -> float:
        return round(LEFT + self.step * (i + 0.5), 2)

    def y(self, error: float) -> float:
        """An error of 0 stands at the bottom, one that is not finite above the chart."""
        if math.isnan(error) or math.isinf(error):
            return float(TOP - 4)
        power = math.log10(error) if error > 0 else self.low
        bottom = HEIGHT - BOTTOM
        share = (min(max(power, self.low), self.high) - self.low) / (self.high - self.low)
        return round(bottom - (bottom - TOP) * share, 2)

    def ticks(self) -> tuple[tuple[float, int], ...]:
        return tuple((self.y(10.0**power), power) for power in range(self.low, self.high + 1))

    def line(self, errors: Iterable[tuple[int, float | None]]) -> str:
        """SVG path data through the errors at these calls, with a gap where an error is None."""
        path, pen = "", False
        for i, error in errors:
            path += "" if error is None else f"{'L' if pen else 'M'}{self.x(i)},{self.y(error)} "
            pen = error is not None
        return path.strip()


def decades(values: Iterable[float]) -> tuple[int, int]:
    """The powers of ten that hold these numbers; at least three apart."""
    found = list(values)
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    return low, max(high, low + 3)


def chart(report: ParityReport) -> Chart | None:
    """The error (relative L2) of every layer call on a log scale; None if no layer was compared."""
    numbered = [(i, row) for i, row in enumerate(report.layers) if row.site_torch.path]  # the model itself is no layer
    rows = [row for _, row in numbered]
    if not any(row.status != "not compared" for row in rows):
        return None
    scale = Scale(len(rows), *_decades(report))
    points: list[Point] = []
    for i, (number, row) in enumerate(numbered):
        for shape, error, ratio in (("in", row.in_error, row.in_ratio), ("out", row.out_error, row.out_ratio)):
            if error is None or ratio is None:
                continue
            what = "itself" if shape == "out" else "the code before it"
            title = f"{row.site_torch} ↔ {row.site_flax}, {what}: {words.small(error)}, {words.times(ratio)}x float32"
            bad = not ratio <= report.threshold
            points.append(Point(scale.x(i), scale.y(error), shape, bad, number, title, not math.isfinite(error)))
    points.sort(key=lambda point: point.bad)  # marks that alarm are drawn last
    floors = [max(row.out_floor, UNIT) for row in rows]
    edge = [(LEFT, floors[0]), *((scale.x(i), floor) for i, floor in enumerate(floors)), (WIDTH - RIGHT, floors[-1])]
    below = [f"{x},{scale.y(floor)}" for x, floor in edge]
    above = [f"{x},{scale.y(floor * report.threshold)}" for x, floor in reversed(edge)]
    first = next((i for i, row in enumerate(rows) if row is report.first), None)
    first_x = None if first is None else scale.x(first)
    anchor = "middle"
    if first_x is not None and not LEFT + 70 < first_x < WIDTH - 70:
        anchor = "start" if first_x < WIDTH / 2 else "end"
    few = len(rows) <= FEW
    keys = [
        (row.site_torch, row.site_torch.path) if few else (block_of(row, report.dot), block_of(row, report.dot))
        for row in rows
    ]
    return Chart(
        ticks=scale.ticks(),
        band=" ".join(below + above),
        free=scale.line((i, row.free_error) for i, row in enumerate(rows) if row.pair.leaf),  # containers begin earlier
        points=tuple(points),
        zones=tuple(zones(keys, scale.step, report.dot)),
        first_x=first_x,
        anchor=anchor,
    )


def _decades(report: ParityReport) -> tuple[int, int]:
    """The powers of ten that hold every floor and every finite error."""
    values = [UNIT]
    for row in report.layers:
        values += [max(row.out_floor, UNIT), max(row.out_floor, UNIT) * report.threshold]
        errors = (row.in_error, row.out_error, row.free_error)
        values += [error for error in errors if error is not None and math.isfinite(error) and error > 1e-12]
    return decades(values)


def zones(keys: Sequence[tuple[Any, str]], step: float, separator: str) -> Iterator[Zone]:
    """The blocks of calls, from the (block, its name) of every call. A block that is too narrow for its label gets
    none; a number may stand at every few blocks."""
    start, taken, last = 0, -1e9, ""
    few = len(keys) <= FEW
    for number, ((_, name), group) in enumerate(groupby(keys)):
        size = len(list(group))
        x, width = LEFT + step * start, step * size
        end = name.rpartition(separator)[2]
        fits_whole = 6.6 * len(name) + 10 <= width
        label = end if few or (end.isdigit() and not fits_whole) else name
        label = words.escape(label if len(label) <= 24 else f"{label[:22]}…")
        room = 6.6 * len(label) + 10
        centre = x + width / 2
        fits = label != last and centre - room / 2 > taken and (room <= width or label.isdigit())
        if fits:
            taken, last = centre + room / 2, label
        yield Zone(round(x, 2), round(width, 2), label if fits else "", number % 2 == 1)
        start += size


# ---------------------------------------------------------------- the trees


@dataclass(frozen=True, slots=True)
class TreeLine:
    """A line of the two trees: a name with its depth on each side ('' if a side has none here), and the call that is
    compared there, if any. `number` is the call's place in the report's layers."""

    torch: str
    torch_depth: int
    flax: str
    flax_depth: int
    row: LayerRow | None = None
    number: int = -1
    bad_in: bool = False
    bad_out: bool = False
    at_in: float | None = None
    at_out: float | None = None

    @property
    def status(self) -> str:
        return "" if self.row is None else "none" if self.row.status == "not compared" else self.row.status


@dataclass(frozen=True, slots=True)
class Block:
    """Lines that belong together: their name on both sides, the number of calls, the worst ratio, and whether the block
    is open."""

    torch: str
    flax: str
    nodes: tuple[TreeLine, ...]
    calls: int
    bad: int
    worst: float | None
    open: bool
    strip: tuple[tuple[float, float, bool], ...] = field(default=())


def block_of(row: LayerRow, dot: str = ".") -> str:
    """The block of layers that contains a call: the call's containers up to the first number ('encoder.layer.3'), else
    the first container; '' if there is none."""
    parts = row.site_torch.path.split(dot)
    parts = parts[:-1] if row.pair.leaf else parts
    for i, part in enumerate(parts):
        if part.isdigit():
            return dot.join(parts[: i + 1])
    return parts[0] if parts else ""


def gauge_x(ratio: float | None) -> float | None:
    """A ratio's place on the small scale of a row, which is logarithmic."""
    if ratio is None:
        return None
    low, high = _GAUGE_SPAN
    power = high if not math.isfinite(ratio) else math.log10(ratio) if ratio > 0 else low
    return round(6 + (GAUGE - 12) * (min(max(power, low), high) - low) / (high - low), 1)


def blocks(report: ParityReport) -> list[Block]:
    """Every call that has a row, under its containers on both sides, in torch's call order."""
    indexed = list(enumerate(report.layers))
    found: list[Block] = []
    few = len(indexed) <= 24
    for _, group in groupby(indexed, key=lambda item: block_of(item[1], report.dot)):
        items = list(group)
        rows = [row for _, row in items]
        bad = sum(row.status == "diverges" for row in rows)
        here = any(row is report.first for row in rows)
        block = Block(
            _common([row.site_torch.path for row in rows], report.dot),
            _common([row.site_flax.path for row in rows], "/"),
            tuple(_nodes(items, report.threshold, report.dot)),
            len(rows),
            bad,
            words.worst_ratio(rows),
            here or few,
            tuple(_strip(rows)),
        )
        found.append(block)
    return found


def _strip(rows: Sequence[LayerRow]) -> Iterator[tuple[float, float, bool]]:
    """(x, height, bad) of a bar for each row, in a field of 90 x 16."""
    step = 90 / len(rows)
    for i, row in enumerate(rows):
        x = gauge_x(words.worst_ratio([row]))
        yield round(i * step, 2), 1.0 if x is None else round(16 * (x / GAUGE) ** 0.6, 1), row.status == "diverges"


def _common(paths: Sequence[str], separator: str) -> str:
    """The common beginning of all paths, in whole parts."""
    return words.escape(separator.join(_root([path.split(separator) for path in paths])), 400)


def _nodes(items: Sequence[tuple[int, LayerRow]], threshold: float, dot: str) -> Iterator[TreeLine]:
    """The lines of a block: first the containers that are entered, then the call. A container with a row of its own
    shows it where it is entered."""
    containers = {row.site_torch.path: (i, row) for i, row in items if not row.pair.leaf and row.site_torch.call == 0}
    leaves = [(i, row) for i, row in items if row.pair.leaf or row.site_torch.call]
    torch_root = _root([row.site_torch.path.split(dot)[:-1] for _, row in leaves])
    flax_root = _root([row.site_flax.path.split("/")[:-1] for _, row in leaves])
    torch_at, flax_at = torch_root, flax_root  # the block's own name stands above its lines
    base, flax_base = len(torch_root), len(flax_root)
    parents = [row.site_torch.path.split(dot)[:-1] for _, row in leaves]
    entered = {dot.join(parts[:k]) for parts in parents for k in range(base + 1, len(parts) + 1)}
    for path in [path for path in containers if path not in entered]:
        i, row = containers.pop(path)
        yield _node(words.site_name(row.site_torch), 0, words.site_name(row.site_flax), 0, row, i, threshold)
    for i, row in leaves:
        torch, flax = row.site_torch.path.split(dot), row.site_flax.path.split("/")
        torch_from, flax_from = _shared(torch_at, torch[:-1]), _shared(flax_at, flax[:-1])
        missing = (len(torch) - 1 - torch_from) - (len(flax) - 1 - flax_from)
        depths = range(min(torch_from, torch_from + missing), len(torch) - 1)
        for depth in depths:  # the deepest containers stand beside each other
            left = torch[depth] if depth >= torch_from else ""
            place = depth - (len(torch) - len(flax))
            right = flax[place] if flax_from <= place < len(flax) - 1 else ""
            if not left and not right:
                continue
            number, own = containers.pop(dot.join(torch[: depth + 1]), (-1, None)) if left else (-1, None)
            if own is not None and not right:
                right = own.site_flax.path
            yield _node(left, depth - base, right, place - flax_base, own, number, threshold)
        torch_at, flax_at = torch[:-1], flax[:-1]
        names = _last(torch, row.site_torch.call), _last(flax, row.site_flax.call)
        yield _node(names[0], len(torch) - 1 - base, names[1], len(flax) - 1 - flax_base, row, i, threshold)


def _node(
    torch: str, torch_depth: int, flax: str, flax_depth: int, row: LayerRow | None, number: int, threshold: float
) -> TreeLine:
    names = words.escape(torch, 300), max(torch_depth, 0), words.escape(flax, 300), max(flax_depth, 0)
    if row is None:
        return TreeLine(*names)
    bad = [ratio is not None and not ratio <= threshold for ratio in (row.in_ratio, row.out_ratio)]
    return TreeLine(*names, row, number, bad[0], bad[1], gauge_x(row.in_ratio), gauge_x(row.out_ratio))


def _root(parents: Sequence[list[str]]) -> list[str]:
    """The common beginning of all of these."""
    out = parents[0] if parents else []
    for parts in parents:
        out = out[: _shared(out, parts)]
    return out


def _shared(old: Sequence[str], new: Sequence[str]) -> int:
    """How many leading parts two lists share."""
    length = 0
    for one, other in zip(old, new, strict=False):
        if one != other:
            break
        length += 1
    return length


def _last(parts: Sequence[str], call: int) -> str:
    name = parts[-1] or "(the model)"
    return f"{name} (call {call + 1})" if call else name
