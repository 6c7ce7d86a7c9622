"""The answers that a question offers: which open things belong together.

Things are open modules, blocks or columns of leaves; an option pairs one of each side. Options that share a thing are
one question. It offers every complete pairing, if there are few; else the options of the thing that has the fewest, so
that each answer narrows the next question. Only the pairings that agree best with the tree are offered: modules of one
parent go to one parent, and one word stands for one word, as far as the pairs already taken and the pairing itself
allow. This module decides nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from graftax.match.components import components

MOST = 10
"""The most answers that one question offers."""
_TRIED = 100_000  # options that one search tries
_ROWS = 64  # with more open things on both sides, no complete pairing is looked for

T = TypeVar("T")
Aspect = tuple[object, object]
Marks = frozenset[object]


@dataclass(frozen=True, slots=True, eq=False)
class Option(Generic[T]):
    """One way to pair open things. ends: the marks of what it uses on the source's side and on like's; item: what the
    caller pairs; score: how likely it is; barred: names speak against it, so it is used only if a thing has no other;
    aspects: what should be paired along with it."""

    ends: tuple[Marks, Marks]
    item: T
    score: float = 0.0
    barred: bool = False
    aspects: tuple[Aspect, ...] = ()


@dataclass(slots=True, eq=False)
class Asked(Generic[T]):
    """One question: all options that it is about, and its answers, the likeliest first. complete: the first answers
    pair everything that can be paired; parts: the likeliest pairing of each group of things that share no option."""

    options: list[Option[T]]
    answers: list[tuple[Option[T], ...]]
    complete: bool = True
    parts: list[tuple[Option[T], ...]] = field(default_factory=list["tuple[Option[T], ...]"])


def arranged(options: Iterable[Option[T]], taken: Iterable[Aspect] = ()) -> list[Asked[T]]:
    """The options in as few questions as possible. `taken`: the aspects of the pairs already taken. Things that share
    no option share a question if that has few answers: the answers for all of them come first, then the likeliest for
    some alone."""
    agreed = _Agreement()
    for aspect in taken:
        agreed.add([aspect])
    parts = sorted(components(list(options), lambda option: option.ends[0] | option.ends[1]), key=len)
    joined: list[Asked[T]] = []
    wide: list[Asked[T]] = []
    for certain in (True, False):  # what has one pairing limits the rest
        left: list[list[Option[T]]] = []
        for part in parts:
            found = _complete(part, agreed)
            if not found:
                wide.append(Asked(part, _narrowing(part), False))
            elif len(found) == 1 or not certain:
                _join(Asked(part, found, parts=[found[0]]), joined, agreed)
                agreed.add([aspect for option in found[0] for aspect in option.aspects] if len(found) == 1 else [])
            else:
                left.append(part)
        parts = left
    for asked in joined:
        some = sorted(asked.parts, key=lambda part: -sum(option.score for option in part) / len(part))
        asked.answers = [*asked.answers, *(some if len(some) > 1 else [])][:MOST]
    return [*joined, *wide]


def _join(new: Asked[T], joined: list[Asked[T]], agreed: _Agreement) -> None:
    """Add the question to one with which it has few answers; else it stays apart."""
    for old in joined:
        both: list[tuple[Option[T], ...]] | None
        if len(old.answers) == 1 or len(new.answers) == 1:
            both = [(*a, *b) for a in old.answers for b in new.answers]
        else:
            both = _complete([*old.options, *new.options], agreed)
        if both:
            old.options, old.answers = [*old.options, *new.options], both
            old.parts += new.parts
            return
    joined.append(new)


def _rows(options: Iterable[Option[T]], side: int) -> list[list[Option[T]]]:
    """The options of each thing of one side, the likeliest first."""
    rows: defaultdict[Marks, list[Option[T]]] = defaultdict(list)
    for option in options:
        rows[option.ends[side]].append(option)
    return [sorted(row, key=lambda option: (option.barred, -option.score)) for row in rows.values()]


def _narrowing(options: Sequence[Option[T]]) -> list[tuple[Option[T], ...]]:
    """The options of the thing of like's side that has the fewest, then the likeliest others."""
    rows = sorted(_rows(options, 1), key=lambda row: (len(row), row[0].barred, -row[0].score))
    rest = sorted((row for row in rows[1:]), key=lambda row: (row[0].barred, -row[0].score))
    return [(option,) for option in [*rows[0], *(row[0] for row in rest)][:MOST]]


# ---------------------------------------------------------------- complete pairings


def _complete(options: Sequence[Option[T]], agreed: _Agreement) -> list[tuple[Option[T], ...]] | None:
    """Every complete pairing that agrees best with the tree, the likeliest first. None if there is none, or if there
    are too many to offer."""
    rows = _usable(options)
    if rows is None:
        return None
    steps = [_TRIED]
    for clashes in range(2 * len(rows) + 1):
        found = _search(rows, clashes, agreed, steps)
        if steps[0] < 0 or len(found) > MOST:
            return None
        if found:
            return sorted(found, key=lambda pairing: -sum(option.score for option in pairing))
    return None


def _usable(options: Sequence[Option[T]]) -> list[list[Option[T]]] | None:
    """For each thing of the smaller side: its options. Barred ones are used only if some thing has no other. None if
    not every thing can have its own partner."""
    sides = _rows(options, 0), _rows(options, 1)
    side = int(len(sides[1]) <= len(sides[0]))
    if len(sides[side]) > _ROWS:
        return None
    for kept in ([[option for option in row if not option.barred] for row in sides[side]], sides[side]):
        if all(kept) and _matching(kept, 1 - side):
            return kept
    return None


def _matching(rows: Sequence[Sequence[Option[T]]], other: int) -> bool:
    """True if every row can have its own partner (found by augmenting paths)."""
    owner: dict[Marks, int] = {}

    def place(i: int, seen: set[Marks]) -> bool:
        for option in rows[i]:
            mark = option.ends[other]
            if mark not in seen:
                seen.add(mark)
                if mark not in owner or place(owner[mark], seen):
                    owner[mark] = i
                    return True
        return False

    return all(place(i, set()) for i in range(len(rows)))


def _search(
    rows: Sequence[Sequence[Option[T]]], clashes: int, agreed: _Agreement, steps: list[int], used: Marks = frozenset()
) -> list[tuple[Option[T], ...]]:
    """Complete pairings with exactly `clashes` clashes: some of them if there are more than MOST, or if `steps`, how
    many options may still be tried, falls below 0."""
    if not rows:
        return [] if clashes else [()]
    out: list[tuple[Option[T], ...]] = []
    for option in rows[0]:
        steps[0] -= 1
        marks = option.ends[0] | option.ends[1]
        if steps[0] < 0 or len(out) > MOST:
            break
        if not used.isdisjoint(marks) or (cost := agreed.clashes(option.aspects)) > clashes:
            continue
        agreed.add(option.aspects)
        out += [(option, *rest) for rest in _search(rows[1:], clashes - cost, agreed, steps, used | marks)]
        agreed.add(option.aspects, -1)
    return out


@dataclass(slots=True)
class _Agreement:
    """Which parents and which words of the two sides are paired, and how often: (side, one) -> its partners."""

    partners: defaultdict[tuple[int, object], Counter[object]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, aspects: Collection[Aspect], count: int = 1) -> None:
        for a, b in aspects:
            self.partners[0, a][b] += count
            self.partners[1, b][a] += count

    def clashes(self, aspects: Collection[Aspect]) -> int:
        """How many of the aspects are already paired with others."""
        ends = [(self.partners[end], other) for a, b in aspects for end, other in (((0, a), b), ((1, b), a))]
        return sum(not known[other] and known.total() > 0 for known, other in ends)
