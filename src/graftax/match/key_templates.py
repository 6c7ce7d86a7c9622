"""Key templates that name the leaves of columns: the numbers of their paths, written with indices.

The numbers of all instances are compared as vectors. Vectors that differ by a constant share an index. A vector may be
a multiple of an index, or count through two of them (`{4*l+m}`). If a template would name other leaves too, its indices
get ranges or, at last, each instance gets a line.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from graftax.match.numbers import NUMBER
from graftax.match.pairs import Scope
from graftax.match.sides import Column, Key
from graftax.rules.template import Template, escape_key, parse_template

Numbers = tuple[int, ...]
_NAMES = "lmnpqrs"
_MOST = 4096  # leaves among which a template is tried; with more of one form, it is taken to name too many


@dataclass(frozen=True, slots=True)
class Line:
    """One rule's templates: of each torch column and of each Flax column; `stack`: the indices that only one side has
    (`list`: its keys are listed); `ranges`: the values of indices."""

    torch: tuple[str | list[str], ...]
    flax: tuple[str | list[str], ...]
    stack: tuple[str, ...] = ()
    ranges: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(slots=True)
class _Number:
    """One number of a column's paths: its value in each instance, and what each stacked axis adds to it."""

    values: Numbers
    steps: Numbers


@dataclass(slots=True)
class _Index:
    """An index: its values in each instance, and its name."""

    values: Numbers
    name: str = ""


def skeleton(path: str) -> str:
    """The path without its numbers."""
    return NUMBER.sub("\0", path)


def rule_templates(scope: Scope, torch: Sequence[Column], flax: Sequence[Column]) -> list[Line]:
    """The templates for these columns over the instances that all of them have: one line, or one for each instance."""
    shared = [
        (t, f) for t, f in scope.keys if all(t in c.paths for c in torch) and all(f in c.paths for c in flax)
    ]  # fmt: skip
    whole = _line(scope, shared, torch, flax)
    if whole is not None:
        return [whole]
    return [_line(scope, [keys], torch, flax) or _listed(keys, torch, flax) for keys in shared]


def _listed(keys: tuple[Key, Key], torch: Sequence[Column], flax: Sequence[Column]) -> Line:
    """One instance, with its keys as they are."""
    ends: list[tuple[str | list[str], ...]] = []
    for key, columns in zip(keys, (torch, flax), strict=True):
        found = [[escape_key(path) for path in column.paths[key]] for column in columns]
        ends.append(tuple(paths if len(paths) > 1 else paths[0] for paths in found))
    stacked = any(isinstance(paths, list) for end in ends for paths in end)
    return Line(ends[0], ends[1], ("list",) if stacked else ())


def _line(
    scope: Scope, shared: Sequence[tuple[Key, Key]], torch: Sequence[Column], flax: Sequence[Column]
) -> Line | None:
    """One line for these instances; None if indices cannot name exactly their leaves."""
    places: list[tuple[int, Column, list[tuple[str, ...]]]] = []
    for n, columns in enumerate((torch, flax)):
        places += [(n, column, [column.paths[keys[n]] for keys in shared]) for column in columns]
    numbers = [one for _, column, rows in places if (one := _numbers(column, rows)) is not None]
    if len(numbers) != len(places):
        return None
    depth = max((len(column.stack) for _, column, _ in places), default=0)
    indices = _indices([number.values for row in numbers for number in row], [n for row in numbers for n in row])
    for name, index in zip(_NAMES, indices, strict=False):
        index.name = name
    stack = tuple(_NAMES[len(indices) + n] for n in range(depth))
    texts: tuple[list[str], list[str]] = ([], [])
    for (n, _, rows), row in zip(places, numbers, strict=True):
        written = [_written(number, indices, stack) for number in row]
        if None in written:
            return None
        pieces = [escape_key(piece) for piece in NUMBER.split(rows[0][0])]
        texts[n].append(pieces[0] + "".join(f"{text}{piece}" for text, piece in zip(written, pieces[1:], strict=True)))
    if any(index.name not in _parsed(text).names for index in indices for text in (*texts[0], *texts[1])):
        return None  # an index has one name on both sides
    rows = [rows for _, _, rows in places]
    found = [*texts[0], *texts[1]]
    spans = _spans(found, rows)
    for ranges in ({}, {name: f"{min(v)}..{max(v)}" for name, v in spans.items() if _gapless(v)}):
        allowed = {name: spans[name] for name in ranges}
        if all(_names_only(scope, text, paths, allowed) for text, paths in zip(found, rows, strict=True)):
            return Line(tuple(texts[0]), tuple(texts[1]), stack, ranges)
    return None


def _spans(texts: Sequence[str], rows: Sequence[list[tuple[str, ...]]]) -> dict[str, set[int]]:
    """The values of every index."""
    out: defaultdict[str, set[int]] = defaultdict(set)
    for text, found in zip(texts, rows, strict=True):
        made = _parsed(text)
        for path in (path for paths in found for path in paths) if made.names else ():
            binding = made.match(path)
            for name, number in zip(made.names, binding.numbers if binding is not None else (), strict=False):
                out[name].add(number)
    return out


def _parsed(text: str) -> Template:
    return parse_template(text, "torch")  # the side makes no difference without wildcards


def _gapless(values: Iterable[int]) -> bool:
    return all(b - a == 1 for a, b in pairwise(sorted(set(values))))


def _names_only(scope: Scope, text: str, rows: Sequence[tuple[str, ...]], allowed: Mapping[str, set[int]]) -> bool:
    """True if the template names exactly these leaves."""
    near = scope.crowd.get(skeleton(rows[0][0]), ())
    if len(near) > _MOST:
        return sum(map(len, rows)) == len(near)
    wanted = {path for paths in rows for path in paths}
    made = _parsed(text)
    hits: set[str] = set()
    for path in {*near, *wanted}:
        binding = made.match(path)
        values = dict(zip(made.names, binding.numbers, strict=True)) if binding is not None else None
        if values is not None and all(values[name] in some for name, some in allowed.items() if name in values):
            hits.add(path)
    return hits == wanted


# ---------------------------------------------------------------- numbers


def _numbers(column: Column, rows: Sequence[tuple[str, ...]]) -> list[_Number] | None:
    """The numbers of a column's paths; None if the paths differ in more, or a stacked axis has no constant step."""
    if len({skeleton(path) for paths in rows for path in paths}) != 1:
        return None
    values = [[[int(n) for n in NUMBER.findall(path)] for path in paths] for paths in rows]
    strides = [math.prod(column.stack[n + 1 :]) for n in range(len(column.stack))]
    out: list[_Number] = []
    for place in range(len(values[0][0])):
        first = values[0][0][place]
        steps = tuple(values[0][stride][place] - first if stride < len(rows[0]) else 0 for stride in strides)
        for row in values:
            for n, found in enumerate(row):
                at = (n // stride % count for stride, count in zip(strides, column.stack, strict=True))
                if found[place] != row[0][place] + sum(a * step for a, step in zip(at, steps, strict=True)):
                    return None
        out.append(_Number(tuple(row[0][place] for row in values), steps))
    return out


def _indices(vectors: Iterable[Numbers], numbers: Sequence[_Number]) -> list[_Index]:
    """The indices that express all vectors, in the order of their first appearance."""
    classes: dict[Numbers, Numbers] = {}
    for vector in vectors:
        moved = tuple(value - vector[0] for value in vector)
        if any(moved):
            classes[moved] = min(classes.get(moved, vector), vector)
    basis = {
        moved: _Index(vector)
        for moved, vector in classes.items()
        if not any(_terms(vector, [_Index(a), _Index(b)]) for a, b in _others(classes, moved))
    }
    for moved, index in basis.items():
        low = min(index.values)
        if any(_joined(number, moved) for number in numbers) or len(basis) < len(classes):
            index.values = tuple(value - low for value in index.values)
    return list(basis.values())


def _joined(number: _Number, moved: Numbers) -> bool:
    """True if an index and a stacked axis make up one number."""
    return any(number.steps) and tuple(value - number.values[0] for value in number.values) == moved


def _others(classes: Mapping[Numbers, Numbers], moved: Numbers) -> Iterator[tuple[Numbers, Numbers]]:
    others = [_from_zero(vector) for key, vector in classes.items() if key != moved]
    yield from ((a, b) for a in others for b in others)


def _from_zero(vector: Numbers) -> Numbers:
    return tuple(value - min(vector) for value in vector)


def _terms(vector: Numbers, indices: Sequence[_Index]) -> tuple[list[tuple[int, _Index]], int] | None:
    """([(factor, index)], the rest) of a vector: a constant, one index, or two of which the second counts through the
    steps of the first."""
    if len(set(vector)) == 1:
        return [], vector[0]
    for index in indices:
        at = next((n for n, value in enumerate(index.values) if value != index.values[0]), None)
        factor, odd = divmod(vector[at] - vector[0], index.values[at] - index.values[0]) if at is not None else (0, 0)
        if factor > 0 and not odd:
            rests = {value - factor * mine for value, mine in zip(vector, index.values, strict=True)}
            if len(rests) == 1:
                return [(factor, index)], rests.pop()
    for major in indices:
        for minor in indices:
            found = _two_terms(vector, major, minor) if major is not minor else None
            if found is not None:
                return found
    return None


def _two_terms(vector: Numbers, major: _Index, minor: _Index) -> tuple[list[tuple[int, _Index]], int] | None:
    width = max(minor.values) + 1
    left = [value - mine for value, mine in zip(vector, minor.values, strict=True)]
    at = next((n for n, value in enumerate(major.values) if value != major.values[0]), None)
    if at is None or min(minor.values) or min(major.values):
        return None
    factor, odd = divmod(left[at] - left[0], major.values[at] - major.values[0])
    rests = {value - factor * mine for value, mine in zip(left, major.values, strict=True)}
    return ([(factor, major), (1, minor)], rests.pop()) if factor >= width > 1 and not odd and len(rests) == 1 else None


def _written(number: _Number, indices: Sequence[_Index], stack: Sequence[str]) -> str | None:
    """The number as text: digits, or an index with its factor and offset; None if a template cannot say it."""
    found = _terms(number.values, indices)
    if found is None:
        return None
    terms, rest = found
    parts = [(factor, index.name, max(index.values) + 1) for factor, index in terms]
    parts += [(step, name, 0) for step, name in zip(number.steps, stack, strict=False) if step]
    parts.sort(reverse=True)
    if not parts:
        return str(rest)
    if len(parts) == 1 and not terms and parts[0][0] == 1:
        rest = 0  # a stacked number is its own index, wherever it starts
    if len(parts) > 2 or parts[0][0] < 1 or (len(parts) == 2 and (parts[1][0] != 1 or parts[1][2] > parts[0][0])):
        return None
    text = "+".join(f"{factor}*{name}" if factor > 1 else name for factor, name, _ in parts)
    return "{" + text + (f"+{rest}" if rest > 0 else str(rest) if rest else "") + "}"
