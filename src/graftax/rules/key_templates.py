"""Key templates that name the leaves of columns: the numbers of their paths, written with indices.

The numbers of all instances are compared as vectors. Vectors that differ by a constant share an index. A vector may be
a multiple of an index, or count through two of them (`{4*l+m}`). If a template would name other leaves too, its indices
get ranges or, at last, each instance gets a line.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations, product
from typing import Protocol

from graftax.plans.names import NUMBER
from graftax.rules.template import Template, escape_key, parse_template

Key = tuple[int, ...]
Numbers = tuple[int, ...]
Crowd = Mapping[str, Collection[str]]
"""A path without its numbers -> the leaves of that form, among which a template must name its own alone."""
_NAMES = "lmnpqrs"
_MOST = 4096  # leaves among which a template is tried; with more of one form, it is taken to name too many


class Column(Protocol):
    """One leaf over its instances: the paths of each, several if they are stacked, and the counts of the stack."""

    @property
    def paths(self) -> Mapping[Key, tuple[str, ...]]: ...
    @property
    def stack(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Line:
    """One rule's templates: of each torch column and of each Flax column; `stack`: the indices that only one side has
    (`list`: its keys are listed); `ranges`: the values of indices."""

    torch: tuple[str | list[str], ...]
    flax: tuple[str | list[str], ...]
    stack: tuple[str, ...] = ()
    ranges: Mapping[str, str] = field(default_factory=dict[str, str])


def skeleton(path: str) -> str:
    """The path without its numbers."""
    return NUMBER.sub("\0", path)


def by_form(paths: Iterable[str]) -> Crowd:
    """The leaves that templates may name, by their paths without numbers."""
    out: defaultdict[str, list[str]] = defaultdict(list)
    for path in paths:
        out[skeleton(path)].append(path)
    return out


def rule_templates(
    keys: Iterable[tuple[Key, Key]], crowd: Crowd, torch: Sequence[Column], flax: Sequence[Column]
) -> list[Line]:
    """The templates for these columns over the instances that all of them have: one line, or one for each instance.
    `keys`: which torch instance goes with which Flax instance."""
    shared = [(t, f) for t, f in keys if all(t in c.paths for c in torch) and all(f in c.paths for c in flax)]
    whole = one_line(shared, crowd, torch, flax)
    if whole is not None:
        return [whole]
    return [one_line([pair], crowd, torch, flax) or _listed(pair, torch, flax) for pair in shared]


def _listed(keys: tuple[Key, Key], torch: Sequence[Column], flax: Sequence[Column]) -> Line:
    """One instance, with its keys as they are."""
    ends: list[tuple[str | list[str], ...]] = []
    for key, columns in zip(keys, (torch, flax), strict=True):
        found = [[escape_key(path) for path in column.paths[key]] for column in columns]
        ends.append(tuple(paths if len(paths) > 1 else paths[0] for paths in found))
    stacked = any(math.prod(column.stack) > 1 for column in (*torch, *flax))
    return Line(ends[0], ends[1], ("list",) if stacked else ())


def one_line(
    shared: Sequence[tuple[Key, Key]], crowd: Crowd, torch: Sequence[Column], flax: Sequence[Column]
) -> Line | None:
    """One line for these instances; None if indices cannot name exactly their leaves."""
    stack = next((column.stack for column in (*torch, *flax) if math.prod(column.stack) > 1), ())
    rows = list(product(shared, range(math.prod(stack))))
    ends = [(n, column) for n, columns in enumerate((torch, flax)) for column in columns]
    paths = [[(found := column.paths[keys[n]])[at % len(found)] for keys, at in rows] for n, column in ends]
    if any(len(set(map(skeleton, some))) > 1 for some in paths):
        return None
    numbers = [list(zip(*([int(n) for n in NUMBER.findall(path)] for path in some), strict=True)) for some in paths]
    strides = [math.prod(stack[n + 1 :]) for n in range(len(stack))]
    own = [tuple(at // stride % count for _, at in rows) for stride, count in zip(strides, stack, strict=True)]
    for zero in (False, True):
        indices = _indices([vector for some in numbers for vector in some], own, zero)
        texts = [_text(some[0], vectors, indices) for some, vectors in zip(paths, numbers, strict=True)]
        if None not in texts:
            break
    found = [text for text in texts if text is not None]
    used = [{name for text, (n, _) in zip(found, ends, strict=False) if n == end for name in _parsed(text).names}
            for end in (0, 1)]  # fmt: skip
    free = tuple(indices)[len(indices) - len(own) :]
    if (
        len(found) < len(texts)
        or set(indices).difference(free) != used[0] & used[1]
        or not used[0] | used[1] >= set(free)
    ):
        return None  # an index that is not stacked has one name on both sides
    spans = {name: set(vector) for name, vector in indices.items()}
    for allowed in ({}, {name: span for name, span in spans.items() if max(span) - min(span) < len(span)}):
        if all(_names_only(crowd, text, some, allowed) for text, some in zip(found, paths, strict=True)):
            ranges = {name: f"{min(span)}..{max(span)}" for name, span in allowed.items()}
            return Line(tuple(found[: len(torch)]), tuple(found[len(torch) :]), free, ranges)
    return None


def _parsed(text: str) -> Template:
    return parse_template(text, "torch")  # the side makes no difference without wildcards


def _names_only(crowd: Crowd, text: str, paths: Sequence[str], allowed: Mapping[str, set[int]]) -> bool:
    """True if the template names exactly these leaves."""
    near, wanted = crowd.get(skeleton(paths[0]), ()), set(paths)
    if len(near) > _MOST:
        return len(wanted) == len(near)
    made = _parsed(text)
    hits: set[str] = set()
    for path in {*near, *wanted}:
        binding = made.match(path)
        values = binding.numbers if binding is not None else None
        if values is not None and all(values[name] in some for name, some in allowed.items() if name in values):
            hits.add(path)
    return hits == wanted


# ---------------------------------------------------------------- numbers


def _indices(vectors: Sequence[Numbers], own: Sequence[Numbers], zero: bool) -> dict[str, Numbers]:
    """Indices that express all vectors, by name; last those that only the stacked side has. An index starts at 0 with
    `zero`, else at its least value on either side."""
    classes: dict[Numbers, Numbers] = {}
    for vector in (*vectors, *own):
        moved = tuple(value - vector[0] for value in vector)
        classes[moved] = min(classes.get(moved, vector), vector)
    starts = {moved: tuple(v - min(vector) for v in vector) if zero else vector for moved, vector in classes.items()}
    free = [vector for moved, vector in starts.items() if any(moved) and moved not in own and not _terms(
        vector, {str(n): other for n, other in enumerate(starts.values()) if other is not vector})]  # fmt: skip
    return dict(zip(_NAMES, (*free, *own), strict=False))


def _text(path: str, vectors: Sequence[Numbers], indices: Mapping[str, Numbers]) -> str | None:
    """The path with indices in place of its numbers; None if a template cannot say one of them."""
    out = ""
    for piece, vector in zip(NUMBER.split(path), (*vectors, None), strict=True):
        out += escape_key(piece)
        if vector is not None:
            said = _terms(vector, indices)
            if said is None:
                return None
            out += said
    return out


def _terms(vector: Numbers, indices: Mapping[str, Numbers]) -> str | None:
    """A number as text: digits, an index with its factor and offset, or two indices of which the second counts through
    the steps of the first."""
    if len(set(vector)) == 1:
        return str(vector[0])
    for name, index in indices.items():
        found = _factor(vector, index)
        if found is not None:
            return _said(name, "", *found)
    for (name, major), (other, minor) in permutations(indices.items(), 2):
        found = _factor(tuple(a - b for a, b in zip(vector, minor, strict=True)), major)
        if found is not None and found[0] > max(minor) > min(minor) == 0 == min(major):
            return _said(name, other, *found)
    return None


def _factor(vector: Numbers, index: Numbers) -> tuple[int, int] | None:
    """(factor, offset) with which the index gives the vector."""
    at = next((n for n, value in enumerate(index) if value != index[0]), None)
    factor, odd = divmod(vector[at] - vector[0], index[at] - index[0]) if at is not None else (0, 0)
    rests = {value - factor * mine for value, mine in zip(vector, index, strict=True)}
    return (factor, rests.pop()) if factor > 0 and not odd and len(rests) == 1 else None


def _said(name: str, minor: str, factor: int, rest: int) -> str:
    text = (f"{factor}*{name}" if factor > 1 else name) + (f"+{minor}" if minor else "")
    return "{" + text + (f"+{rest}" if rest > 0 else str(rest) if rest else "") + "}"
