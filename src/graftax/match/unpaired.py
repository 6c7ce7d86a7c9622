"""Questions about unpaired leaves for which the other side has an unpaired leaf of the same shape.

The policies for missing and unused leaves do not close them. Columns share a question if it can offer complete pairings
of them.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from graftax.errors import GraftaxError
from graftax.layers import leaf_connections
from graftax.match.buffers import buffer_name
from graftax.match.names import concepts, lexicon
from graftax.match.sides import tokens_of
from graftax.match.unmerged import normed_parts
from graftax.plans import Candidate, Proposal, Question
from graftax.plans.names import fold_names
from graftax.rules import escape_key, rule_line
from graftax.tree import Checkpoint, Side, TensorSpec

_NUMBER = re.compile(r"\d+")
_MOST = 6  # most candidates of one column
_PAIRINGS = 24  # most pairings of several columns that one question offers

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Column:
    """Leaves of one shape whose paths differ in one number: the place of that number among those of the path, and its
    values."""

    names: tuple[str, ...]
    spec: TensorSpec
    place: int = 0
    values: Sequence[int] = ()

    @property
    def first(self) -> str:
        return self.names[0]

    def template(self, index: str) -> str:
        """The path with `index` in place of the number."""
        pieces = [escape_key(piece) for piece in _NUMBER.split(self.names[0])]
        numbers = _NUMBER.findall(self.names[0])
        out = pieces[0]
        for place, piece in enumerate(pieces[1:]):
            out += ("{" + index + "}" if place == self.place and self.values else numbers[place]) + piece
        return out


@dataclass(frozen=True, slots=True)
class _Edge:
    """One way to fill a column: the sources, and the rule line that states it."""

    source: _Column
    line: str
    likeness: float
    near: bool


def unpaired(proposal: Proposal, source: Checkpoint, like: Checkpoint, source_side: Side, like_side: Side) -> Proposal:
    """The proposal with a question, with candidates, for every leaf of like that no source fills, if no leaf of its
    module is filled and an unused source tensor has its shape (transposed, or with a stack axis). Such leaves are
    neither missing nor unused: they wait for an answer."""
    spoken = (*proposal.entries, *proposal.broken)
    used, filled = {n for e in spoken for n in e.sources}, {n for e in spoken for n in e.targets}
    if filled.issuperset(like):
        return proposal
    asked = {n for q in proposal.questions if q.candidates for n in q.targets}
    offered = {n for q in proposal.questions if q.candidates for n in q.sources}
    homes = {_module(n, like_side) for n in filled}
    starts = {_module(n, source_side) for n in used}
    targets = [n for n in like if n not in filled and n not in asked and _module(n, like_side) not in homes]
    free = [n for n in source if n not in used and _module(n, source_side) not in starts]
    free = [n for n in free if not buffer_name(n, source[n])]
    ours, theirs = normed_parts(source), normed_parts(like)
    if not (ours and theirs):  # a part of a weight is no weight
        free, targets = [n for n in free if n not in ours], [n for n in targets if n not in theirs]
    sources = [c for c in _columns(free, source) if not offered.issuperset(c.names)] if targets else []
    wanted = [c for c in _columns(targets, like) if _varied(c.spec.shape)] if sources else []
    sides: tuple[Side, Side] = (source_side, like_side)
    found: list[tuple[_Column, list[_Edge]]] = []
    for column in wanted:
        edges = _edges(column, sources, sides)
        alone = [_Column((name,), column.spec) for name in column.names] if not edges else []
        found += [(column, edges)] if edges else [(one, _edges(one, sources, sides)) for one in alone]
    found = [(column, edges) for column, edges in found if edges]
    questions = _questions([column for column, _ in found], dict(enumerate(edges for _, edges in found)))
    covered = {n for q in questions for n in q.targets}
    kept = [q for q in proposal.questions if q.candidates or not q.targets or not covered.issuperset(q.targets)]
    return Proposal(
        proposal.entries,
        (*kept, *questions),
        proposal.assumptions,
        proposal.failures,
        proposal.reads,
        proposal.broken,
    )


def _module(path: str, side: Side) -> str:
    """The path of the module that holds a leaf, without its collection."""
    if side == "torch":
        return path.rpartition(".")[0]
    head, _, rest = path.partition("/")
    plain = rest if head in ("params", "batch_stats") else path
    return plain.rpartition("/")[0]


def _varied(shape: Shape) -> bool:
    """True if the shape has more than one value; the shape of a scalar is no evidence."""
    return any(extent > 1 for extent in shape)


# ---------------------------------------------------------------- columns


def _columns(names: Iterable[str], end: Checkpoint) -> list[_Column]:
    """Names of one shape that differ only in numbers, as columns: one for each set of values of the varying numbers
    after the first."""
    groups: dict[tuple[str, Shape], list[str]] = {}
    for name in names:
        groups.setdefault((_NUMBER.sub("\0", name), end[name].shape), []).append(name)
    out: list[_Column] = []
    for members in groups.values():
        rows = [_NUMBER.findall(name) for name in members]
        varying = [place for place in range(len(rows[0])) if len({row[place] for row in rows}) > 1]
        if not varying:
            out += [_Column((name,), end[name]) for name in members]
            continue
        inner: defaultdict[tuple[str, ...], list[tuple[int, str]]] = defaultdict(list)
        for row, name in zip(rows, members, strict=True):
            rest = tuple(row[place] for place in varying[1:])
            inner[rest].append((int(row[varying[0]]), name))
        for found in inner.values():
            found.sort()
            columns = tuple(name for _, name in found)
            values = tuple(value for value, _ in found) if len(found) > 1 else ()
            out.append(_Column(columns, end[columns[0]], varying[0], values))
    return out


# ---------------------------------------------------------------- what may fill a column


def _edges(target: _Column, sources: Sequence[_Column], sides: tuple[Side, Side]) -> list[_Edge]:
    """Every way to fill the column; the way with the likeliest names comes first."""
    out: list[_Edge] = []
    for column in sources:
        for line in _lines(column, target, sides):
            likeness, near = _likeness(column, target, sides)
            out.append(_Edge(column, line, likeness, near))
    return sorted(out, key=lambda edge: -edge.likeness)


def _lines(source: _Column, target: _Column, sides: tuple[Side, Side]) -> list[str]:
    """Rule lines that fit the two columns: instance by instance, or stacked into one leaf."""
    words = sides if sides[0] != sides[1] else ("source", "target")
    out: list[str] = []
    if joins(source.first, source.spec, target.first, target.spec, words):
        offsets = [a - b for a, b in zip(source.values, target.values, strict=False)]
        if len(source.names) == len(target.names) and len(set(offsets)) <= 1:
            by = sum(offsets[:1])
            ends = source.template(_plus("i", by)), target.template(_plus("i", -by))
            out.append(rule_line(**dict(zip(words, ends, strict=True))))
        elif len(target.names) == 1:
            out += [
                rule_line(**dict(zip(words, (escape_key(name), escape_key(target.first)), strict=True)))
                for name in source.names[:_MOST]
            ]
        return out
    shape: Shape = target.spec.shape
    for axis, extent in enumerate(shape):
        if len(target.names) > 1 or not source.values or extent < 2 or len(source.names) % extent:
            continue
        one = TensorSpec(shape[:axis] + shape[axis + 1 :], target.spec.dtype)
        step, start = len(source.names) // extent, min(source.values)
        if list(source.values) != list(range(start, start + len(source.values))):
            continue
        filled = target.first
        if joins(source.first, source.spec, filled, one, words):
            for first in range(step):
                index = _plus("i" if step == 1 else f"{step}*i", start + first)
                ends = source.template(index), escape_key(filled)
                out.append(rule_line(**dict(zip(words, ends, strict=True)), stack={"i": axis}))
    return out


def _plus(index: str, by: int) -> str:
    return f"{index}+{by}" if by > 0 else index


def joins(source: str, mine: TensorSpec, target: str, theirs: TensorSpec, words: tuple[str, str]) -> bool:
    """True if the layer table can convert one leaf into the other."""
    if words == ("source", "target"):
        return mine.shape == theirs.shape
    if math.prod(mine.shape) != math.prod(theirs.shape):
        return False
    ends = {words[0]: (source, mine), words[1]: (target, theirs)}
    (torch, torch_spec), (flax, flax_spec) = ends["torch"], ends["flax"]
    try:
        return bool(leaf_connections(torch.rpartition(".")[2], torch_spec, flax.rpartition("/")[2], flax_spec))
    except GraftaxError:
        return False


def _likeness(source: _Column, target: _Column, sides: tuple[Side, Side]) -> tuple[float, bool]:
    """How alike the names are, and whether the parts around the modules have the same names and numbers."""
    lex = lexicon()
    ends = list(zip((source, target), sides, strict=True))
    a, b = (set(concepts(tokens_of(column.first, side), lex)) for column, side in ends)
    above = [concepts(tokens_of(_module(column.first, side), side), lex) for column, side in ends]
    numbers = [[n for i, n in enumerate(_NUMBER.findall(c.first)) if not c.values or i != c.place] for c, _ in ends]
    alike = numbers[0] == numbers[1]
    return len(a & b) / max(len(a | b), 1) + 0.1 * alike, alike and bool(above[0]) and set(above[0]) == set(above[1])


# ---------------------------------------------------------------- questions


def _questions(columns: Sequence[_Column], edges: dict[int, list[_Edge]]) -> list[Question]:
    out: list[Question] = []
    for group in _groups(edges):
        pairings = _pairings(group, edges)
        if len(group) > 1 and 0 < len(pairings) <= _PAIRINGS:
            out.append(_question([columns[i] for i in group], pairings))
            continue
        out += [_question([columns[i]], [(edge,) for edge in edges[i][:_MOST]], edges[i]) for i in group]
    return out


def _groups(edges: dict[int, list[_Edge]]) -> list[list[int]]:
    """Columns that compete for the same sources."""
    owner: dict[str, int] = {}
    group: dict[int, list[int]] = {}
    for i, found in edges.items():
        mine = [i]
        for edge in _nearest(found):
            other = owner.get(edge.source.first)
            if other is not None and group[other] is not mine:
                mine = group[other] + [j for j in mine if j not in group[other]]
        for j in mine:
            group[j] = mine
        owner |= {edge.source.first: i for j in mine for edge in _nearest(edges[j])}
    return list({id(found): found for found in group.values()}.values())


def _nearest(found: Sequence[_Edge]) -> Sequence[_Edge]:
    """The ways from places with the same names, if there are any; else all."""
    return [edge for edge in found if edge.near] or found


def _pairings(group: Sequence[int], edges: dict[int, list[_Edge]]) -> list[tuple[_Edge, ...]]:
    """Pairings of all columns that use each source once; at most one more than is offered."""
    out: list[tuple[_Edge, ...]] = []
    steps = [4000]

    def go(at: int, chosen: tuple[_Edge, ...]) -> None:
        steps[0] -= 1
        if at == len(group):
            out.append(chosen)
            return
        for edge in _nearest(edges[group[at]]):
            if len(out) > _PAIRINGS or steps[0] < 0:
                return
            if not any(other.source is edge.source for other in chosen):
                go(at + 1, (*chosen, edge))

    go(0, ())
    out.sort(key=lambda pairing: -sum(edge.likeness for edge in pairing))
    return out if steps[0] >= 0 else []


def _question(
    columns: Sequence[_Column], pairings: Sequence[tuple[_Edge, ...]], edges: Iterable[_Edge] = ()
) -> Question:
    targets = tuple(name for column in columns for name in column.names)
    sources = dict.fromkeys(name for edge in (*edges, *(e for p in pairings for e in p)) for name in edge.source.names)
    candidates = [
        Candidate(
            ", ".join(edge.line for edge in pairing),
            tuple(name for edge in pairing for name in edge.source.names),
            "the shape matches" if len(pairing) == 1 else "the shapes match",
        )
        for pairing in islice(pairings, _PAIRINGS)
    ]
    text = (
        f"no source tensor was matched to {', '.join(fold_names(targets)[:4])} by name; these have its shape: choose "
        "one, or mark it missing"
        if len(columns) == 1
        else f"no source tensors were matched to {', '.join(fold_names(targets)[:4])} by name; these have their "
        "shapes: choose a pairing, or mark them missing"
    )
    return Question("match", text, targets, tuple(sources), tuple(candidates))
