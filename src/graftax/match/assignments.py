"""Complete pairings of all open modules: a question offers them, so that one answer settles everything.

Only the pairings that agree best with the tree are offered: modules of one parent go to one parent, and one word stands
for one word, as far as the pairs already taken and the pairing itself allow. This module decides nothing. It only
selects what a question offers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from graftax.match.pairs import Pair, Scope
from graftax.match.scope_names import main_column
from graftax.match.settle import Settled
from graftax.match.sides import Module

MOST = 48
"""The most pairings that one question offers. Where there are more, each module gets a question of its own."""
_NODES = 40_000  # steps of one search

Found = tuple[Pair, ...]


@dataclass(slots=True, eq=False)
class Cluster:
    """Modules of both sides that may pair with each other, and all open pairs of them."""

    item: Settled
    torch: list[Module]
    flax: list[Module]
    pairs: list[Pair]

    @property
    def scope(self) -> Scope:
        return self.item.scope


@dataclass(slots=True)
class Asked:
    """Clusters that share one question, and the pairings it offers (empty: each module gets its own question)."""

    clusters: list[Cluster]
    pairings: list[Found]


def arranged(clusters: Sequence[Cluster]) -> list[Asked]:
    """The clusters in as few questions as possible; no question offers more than `MOST` pairings."""
    taken = _Agreement()
    for item in dict.fromkeys(cluster.item for cluster in clusters):
        for pair in item.taken:
            taken.add(pair)
    together: list[Cluster] = []
    out: list[Asked] = []
    rest = sorted(clusters, key=lambda c: (len(c.pairs), len(c.torch)))
    found: list[Found] = []
    for cluster in rest:
        tried = _pairings([*together, cluster], taken)
        if tried:
            together, found = [*together, cluster], tried
            continue
        alone = _pairings([cluster], taken)
        out.append(Asked([cluster], alone or []))
    return [Asked(together, found), *out] if together else out


def _pairings(clusters: Sequence[Cluster], taken: _Agreement) -> list[Found] | None:
    """Every complete pairing that agrees best with the tree. None if there is no pairing, or too many."""
    rows: list[list[Pair]] = []
    for cluster in clusters:
        found = _rows(cluster)
        if found is None:
            return None
        rows += found
    steps = [_NODES]
    for clashes in range(2 * len(rows) + 1):
        found = _search(rows, clashes, taken, steps)
        if found is None or len(found) > MOST:
            return None
        if found:
            return sorted(found, key=lambda pairing: -sum(pair.total for pair in pairing))
    return None


def _rows(cluster: Cluster) -> list[list[Pair]] | None:
    """For each module of the smaller side: its pairs, the likeliest first. Pairs that the names forbid are used only if
    a module has no others. None if some module has no pair."""
    few, torch = (cluster.torch, True) if len(cluster.torch) < len(cluster.flax) else (cluster.flax, False)
    said = any(pair.bonus > 1 for pair in cluster.pairs)  # a rule for another instance says so: do not trust the names
    for allowed in (lambda pair: said or not pair.forbidden, lambda _: True):
        rows: dict[int, list[Pair]] = {id(module): [] for module in few}
        for pair in cluster.pairs:
            if allowed(pair):
                rows[id(pair.torch if torch else pair.flax)].append(pair)
        for row in rows.values():
            row.sort(key=lambda pair: (pair.forbidden, -pair.total))
        ways = list(rows.values())
        if all(ways) and _matching(ways, torch):
            return ways
    return None


def _matching(rows: list[list[Pair]], torch: bool) -> bool:
    """True if every row can have its own partner (found by augmenting paths)."""
    owner: dict[int, int] = {}

    def place(i: int, seen: set[int]) -> bool:
        for pair in rows[i]:
            other = id(pair.flax if torch else pair.torch)
            if other not in seen:
                seen.add(other)
                if other not in owner or place(owner[other], seen):
                    owner[other] = i
                    return True
        return False

    return len(rows) <= 64 and all(place(i, set()) for i in range(len(rows)))


def _search(rows: list[list[Pair]], clashes: int, agreed: _Agreement, steps: list[int]) -> list[Found] | None:
    """Complete pairings with exactly `clashes` clashes, at most MOST + 1 of them. None if the search takes too long."""
    out: list[Found] = []
    chosen: list[Pair] = []
    used: set[int] = set()

    def go(i: int, left: int) -> bool:
        steps[0] -= 1
        if steps[0] < 0:
            return False
        if i == len(rows):
            if not left:
                out.append(tuple(chosen))
            return len(out) <= MOST
        for pair in rows[i]:
            if id(pair.torch) in used or id(pair.flax) in used:
                continue
            cost = agreed.clashes(pair)
            if cost > left:
                continue
            used.update((id(pair.torch), id(pair.flax)))
            chosen.append(pair)
            agreed.add(pair)
            fine = go(i + 1, left - cost)
            agreed.remove(pair)
            chosen.pop()
            used.difference_update((id(pair.torch), id(pair.flax)))
            if not fine:
                return False
        return True

    if not go(0, clashes) and steps[0] < 0:
        return None
    return out


@dataclass(slots=True)
class _Agreement:
    """Which parents and which words of the two sides are paired, and how often."""

    left: defaultdict[object, defaultdict[object, int]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(int))
    )
    right: defaultdict[object, defaultdict[object, int]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(int))
    )

    def add(self, pair: Pair) -> None:
        for a, b in _aspects(pair):
            self.left[a][b] += 1
            self.right[b][a] += 1

    def remove(self, pair: Pair) -> None:
        for a, b in _aspects(pair):
            for table, one, other in ((self.left, a, b), (self.right, b, a)):
                table[one][other] -= 1
                if not table[one][other]:
                    del table[one][other]

    def clashes(self, pair: Pair) -> int:
        """How many parents and words of the pair are already paired with others."""
        return sum(
            bool(table.get(one)) and other not in table[one]
            for a, b in _aspects(pair)
            for table, one, other in ((self.left, a, b), (self.right, b, a))
        )


def _aspects(pair: Pair) -> Iterable[tuple[object, object]]:
    """What should be paired along with the modules: their parents, and their last words without numbers."""
    (*above, last), (*other_above, other) = _parts(pair.torch), _parts(pair.flax)
    if above and other_above:
        yield ("parent", *above), ("parent", *other_above)
        yield ("parents", *map(_stem, above)), ("parents", *map(_stem, other_above))
    if _stem(last) and _stem(other):
        yield _stem(last), _stem(other)


_COUNTED = re.compile(r"_?\d+$")


def _stem(part: str) -> str:
    """The part without its number."""
    return _COUNTED.sub("", part)


def _parts(module: Module) -> list[str]:
    """The parts of the path of a module's first instance."""
    column = main_column(module)
    path = next(iter(column.paths.values()))[0]
    parts = path.split("/" if "/" in path else ".")
    return parts if module.raw or len(parts) == 1 else parts[:-1]
