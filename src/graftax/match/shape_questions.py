"""Questions about leaves without a partner, for which the other side has a leaf without a partner that fits by shape.

The policies for missing and unused leaves do not close them.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from graftax.match.buffers import buffer_name
from graftax.match.choose import Habits
from graftax.match.fits import fit
from graftax.match.layout_questions import Ways
from graftax.match.names import concepts, lexicon
from graftax.match.pair_questions import leaf_options, pair_question
from graftax.match.pairings import Option, arranged
from graftax.match.pairs import Pair, Scope
from graftax.match.roles import role_of
from graftax.match.sides import Column, Key, Module, module_path, tokens_of
from graftax.match.stack_axes import stack_axes
from graftax.match.unmerged import normed_parts
from graftax.plans import Proposal
from graftax.rules.key_templates import Crowd, by_form
from graftax.tree import Checkpoint, Side, split_path

_NUMBER = re.compile(r"\d+")
_MOST = 24  # most source columns, by likeness, that are tried for one column of like

Item = tuple[Scope, Pair]


@dataclass(frozen=True, slots=True)
class _Leaves:
    """Leaves of one shape whose paths differ in at most one number, in its order."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    words: frozenset[str]
    above: frozenset[str]
    numbers: tuple[str, ...]


def shape_questions(
    proposal: Proposal,
    source: Checkpoint,
    like: Checkpoint,
    sides: tuple[Side, Side],
    namesakes: Collection[tuple[str, str]],
) -> Proposal:
    """The proposal with a question, with candidates, for every leaf of like that no source fills, if an unused source
    tensor fits it by shape (in some layout, or stacked), and no leaf of its module is filled, or the filled ones
    come from the module of that tensor, or both have one name (`namesakes`). Such leaves are neither missing nor
    unused: they wait for an answer."""
    spoken = (*proposal.entries, *proposal.broken)
    used, filled = {n for e in spoken for n in e.sources}, {n for e in spoken for n in e.targets}
    if filled.issuperset(like):
        return proposal
    asked = {n for q in proposal.questions if q.candidates for n in q.targets}
    offered = {n for q in proposal.questions if q.candidates for n in q.sources}
    homes = {module_path(n, sides[1]) for n in filled}
    starts = {module_path(n, sides[0]) for n in used}
    targets = [n for n in like if n not in filled and n not in asked and module_path(n, sides[1]) not in homes]
    free = [n for n in source if n not in used and module_path(n, sides[0]) not in starts]
    free = [n for n in free if not buffer_name(n, source[n])]
    ours, theirs = normed_parts(source), normed_parts(like)
    if not (ours and theirs):  # a part of a weight is no weight
        free, targets = [n for n in free if n not in ours], [n for n in targets if n not in theirs]
    sources = [c for c in _columns(free, source, sides[0]) if not offered.issuperset(c.names)] if targets else []
    torch = source if sides[0] == "torch" else like
    traps = any(len(spec.shape) > 2 for spec in torch.values())  # a convolution: a Linear may take a flattened map
    maker = _Maker(sides, traps, {**by_form(free), **by_form(targets)})
    options: list[Option[Item]] = []
    for column in _columns(targets, like, sides[1]) if sources else ():
        if any(extent > 1 for extent in column.shape):  # the shape of a scalar is no evidence
            alone = [replace(column, names=(name,)) for name in column.names]
            options += maker.options(column, sources) or [o for one in alone for o in maker.options(one, sources)]
    spare = [n for n in source if n not in used and n not in offered and not buffer_name(n, source[n])]
    beside = defaultdict[str, set[str]](set)
    for entry in proposal.entries if spare else ():
        if len(entry.sources) == len(entry.targets) == 1:
            beside[module_path(entry.targets[0], sides[1])].add(module_path(entry.sources[0], sides[0]))
    rest = [n for n in like if n not in filled and n not in asked and module_path(n, sides[1]) in beside]
    for column in _columns(rest, like, sides[1]):
        homes_of = [beside[module_path(name, sides[1])] for name in column.names]
        alike = [n for n in spare if role(n, sides[0]) == role(column.names[0], sides[1])]
        options += maker.options(column, [
            c for c in _columns(alike, source, sides[0]) if len(c.names) == len(column.names)
            and all(module_path(n, sides[0]) in h for n, h in zip(c.names, homes_of, strict=True))])  # fmt: skip
    for a, b in namesakes:
        if b not in targets and b not in asked and a not in offered:
            (one,), (other,) = _columns([a], source, sides[0]), _columns([b], like, sides[1])
            options += maker.options(other, [one])
    found = [pair_question(asked, maker.ways, maker.turned) for asked in arranged(options)]
    covered = {n for q in found for n in q.targets}
    kept = [q for q in proposal.questions if q.candidates or not q.targets or not covered.issuperset(q.targets)]
    return replace(proposal, questions=(*kept, *found))


def role(path: str, side: Side) -> str:
    """The role of a leaf: weight, bias, mean, ..."""
    return role_of(split_path(path, side)[-1])[0]


def _columns(names: Iterable[str], end: Checkpoint, side: Side) -> list[_Leaves]:
    """Names of one shape that differ only in numbers, as columns: one for each set of values of the varying numbers
    after the first."""
    lex = lexicon()
    groups: dict[object, list[str]] = {}
    for name in names:
        groups.setdefault((_NUMBER.sub("\0", name), end[name].shape), []).append(name)
    out: list[_Leaves] = []
    for members in groups.values():
        rows = [_NUMBER.findall(name) for name in members]
        varying = [place for place in range(len(rows[0])) if len({row[place] for row in rows}) > 1]
        inner: defaultdict[tuple[str, ...], list[tuple[int, str]]] = defaultdict(list)
        for row, name in zip(rows, members, strict=True):
            rest = tuple(row[place] for place in varying[1:])
            inner[rest].append((int(row[varying[0]]) if varying else 0, name))
        for found in inner.values():
            ordered = tuple(name for _, name in sorted(found))
            words = frozenset(concepts(tokens_of(ordered[0], side), lex))
            above = frozenset(concepts(tokens_of(module_path(ordered[0], side), side), lex))
            still = [n for place, n in enumerate(_NUMBER.findall(ordered[0])) if place not in varying[:1]]
            numbers = tuple(_NUMBER.findall(ordered[0]) if len(ordered) == 1 else still)
            out.append(_Leaves(ordered, end[ordered[0]].shape, words, above, numbers))
    return out


class _Maker:
    """Makes the options of columns: every cut of two columns that has a reading."""

    __slots__ = ("columns", "crowd", "sides", "traps", "turned")

    def __init__(self, sides: tuple[Side, Side], traps: bool, crowd: Crowd) -> None:
        self.turned = sides == ("flax", "torch")
        self.sides = ("torch", "flax") if sides[0] != sides[1] else ("source", "target")
        self.traps, self.crowd = traps and sides[0] != sides[1], crowd
        self.columns: dict[object, Module] = {}

    def options(self, target: _Leaves, sources: Sequence[_Leaves]) -> list[Option[Item]]:
        """Every way to fill the column."""
        size = math.prod(target.shape)
        near = sorted(sources, key=lambda column: -_likeness(column, target)[0])
        out: list[Option[Item]] = []
        for column in [c for c in near if math.prod(c.shape) * len(c.names) >= size][:_MOST]:
            likeness, alike = _likeness(column, target)
            for names, stack, wanted, into in _cuts(column, target):
                item = self._item(names, stack, column.shape, wanted, into, target.shape)
                if item is not None:
                    ends = (frozenset(n for row in names for n in row), frozenset(n for row in wanted for n in row))
                    out.append(Option(ends, item, likeness, not alike))
        return out if any(not o.barred for o in out) else [replace(o, barred=False) for o in out]

    def _item(self, names: Rows, stack: Stack, shape: Shape, wanted: Rows, into: Stack, other: Shape) -> Item | None:
        ends = self._column(names, stack, shape, 0), self._column(wanted, into, other, 1)
        torch, flax = ends[::-1] if self.turned else ends
        same = self.sides == ("source", "target")
        keys: list[tuple[Key, Key]] = [((i,), (i,)) for i in range(len(names))]
        pair = fit(torch, flax, dict(keys), same)
        if pair is None:
            return None
        return Scope([torch], [flax], keys, False, same, lexicon(), crowd=self.crowd), pair

    def _column(self, rows: Rows, stack: Stack, shape: Shape, end: int) -> Module:
        """The module of one leaf. Equal leaves are one module."""
        mark = (rows, stack, end)
        if mark not in self.columns:
            torch = self.sides == ("source", "target") or (end == 0) != self.turned
            side: Side = "torch" if torch else "flax"
            last = split_path(rows[0][0], side)[-1]
            name, kind, rest = role_of(last)
            paths, shapes = {(i,): row for i, row in enumerate(rows)}, {(i,): shape for i in range(len(rows))}
            tokens = tokens_of(rows[0][0], side)
            self.columns[mark] = Module(tokens, (), {name: Column(name, kind, last, paths, shapes, stack)}, bool(rest))
        return self.columns[mark]

    def ways(self, scope: Scope, pair: Pair) -> Ways:
        """The ways in which the leaf may be read. A Linear is left to inference if it may take a flattened map."""
        habits = Habits()
        stack_axes(scope, [pair], habits)
        return leaf_options(pair, scope, habits, self.sides, silent=self.traps)


Rows = tuple[tuple[str, ...], ...]
Stack = tuple[int, ...]
Shape = tuple[int, ...]


def _cuts(source: _Leaves, target: _Leaves) -> Iterator[tuple[Rows, Stack, Rows, Stack]]:
    """How the leaves of two columns may go together: one to one, one of several, or stacked on either side."""
    n, m = len(source.names), len(target.names)
    each, wanted = tuple((name,) for name in source.names), tuple((name,) for name in target.names)
    one, other = math.prod(source.shape), math.prod(target.shape)
    if one == other and n == m:
        yield each, (), wanted, ()
    elif one == other and m == 1:
        for row in each:
            yield (row,), (), wanted, ()
    elif m == 1 and 0 < one < other and other % one == 0:
        for names in _runs(source.names, other // one):
            yield (names,), (len(names),), wanted, ()
    elif n == 1 and 0 < other < one and one % other == 0:
        for names in _runs(target.names, one // other):
            yield each, (), (names,), (len(names),)


def _runs(names: tuple[str, ...], count: int) -> Iterable[tuple[str, ...]]:
    """The parts of a column that one stack may hold: neighbours, or every second, third, ..."""
    n = len(names)
    even = n % count == 0
    runs = [names[first : first + count] for first in (range(0, n, count) if even else (0, n - count))]
    turns = [names[first :: n // count] for first in range(n // count)] if even else []
    return dict.fromkeys((*runs, *turns)) if count <= n else ()


def _likeness(source: _Leaves, target: _Leaves) -> tuple[float, bool]:
    """How alike the names are, and whether the parts around the modules have the same names and numbers."""
    a, b = source.words, target.words
    alike = source.numbers == target.numbers
    return len(a & b) / max(len(a | b), 1) + 0.1 * alike, alike and bool(source.above) and source.above == target.above
