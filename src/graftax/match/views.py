"""Both sides under one way to read their numbers: a candidate view, scored by what it leaves without a partner.

By default, blocks that are alike count together. If that leaves blocks without a partner, other cuts of their numbers
are tried: by kind of block, in cycles, in stages, as a stack of one. Views are built from families, their counts and
sizes alone. The view that leaves least wins; the modules are matched once, in it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

from graftax.match.blocks import Stacks, View, all_families, find_doubts
from graftax.match.cutting import Cut, Cuts, Tokens, parse
from graftax.match.cycles import Both, Rivals
from graftax.match.match_inputs import Ends
from graftax.match.names import Lexicon, concepts
from graftax.match.pairs import Scope
from graftax.match.part_lists import merged, part_lists
from graftax.match.sides import Family, Key, Module, columns_of, view

_FEW = 64  # instances of a family whose numbers may become parts of names
_ROUNDS = 3  # at most so many families are read anew, one after the other

_Counts = Counter[tuple[int, ...]]
Score = tuple[int, int, int]
"""(rules that the view contradicts, leaves without a partner of their size, leaves without one of their extents)"""


class Views:
    """Views of both ends, by the cuts of their numbers."""

    def __init__(self, ends: Ends, lex: Lexicon) -> None:
        self.ends, self.lex = ends, lex
        self._templates = (parse(ends.torch, ends.torch_side, ends.torch_skip, ends.renames),
                           parse(ends.flax, ends.flax_side, ends.flax_skip, ends.calls.renames))  # fmt: skip
        self._known: dict[tuple[int, frozenset[tuple[Tokens, Cut]]], list[Family]] = {}

    def best(self) -> View:
        """The view that leaves least without a partner. Families that none gives a partner are dissolved: their modules
        then compete one by one, so that no other module takes a place only because the right one did not compete."""
        cuts: Both = ({}, {})
        now = self.at(cuts)
        rivals: list[Rivals] = []
        for _ in range(_ROUNDS):
            inner = _apart(now, cuts, inside=True)
            better = self._better(now, cuts, [*inner, *self._options(now, cuts)])
            better = better or self._better(now, cuts, _apart(now, cuts))
            if better is None:
                break
            cuts, now = better.likeliest
            rivals.append(better)
        counted = self._lists(now, cuts)
        if counted is not None and score(self.ends, found := self.at(counted)) <= score(self.ends, now):
            cuts, now = counted, found
        small = _dissolved(now)
        if any(small) and not now.doubts:
            now = self.at(({**cuts[0], **small[0]}, {**cuts[1], **small[1]}))
        for found in rivals:
            now = found.set_aside(now) if found.open else found.explained(now)
        return now

    def _better(self, now: View, cuts: Both, ways: Iterable[Both]) -> Rivals | None:
        """The views of these ways that leave least without a partner, if it is less than now."""
        options = [(way, self.at(way)) for way in ways]
        rated = [score(self.ends, found) for _, found in options]
        least = min(rated, default=None)
        if least is None or least >= score(self.ends, now):
            return None
        tied = [option for option, rating in zip(options, rated, strict=True) if rating == least]
        return Rivals.of((cuts, now), tied, self.ends)

    def at(self, cuts: Both) -> View:
        """The view with these cuts."""
        torch, flax = (self._families(n, cut) for n, cut in enumerate(cuts))
        same = self.ends.torch_side == self.ends.flax_side
        stacked = [{id(f) for f in found if _is_cut(f, cut)} for found, cut in zip((torch, flax), cuts, strict=True)]
        pairs, left_t, left_f = all_families(
            [f for f in torch if id(f) not in stacked[0]], [f for f in flax if id(f) not in stacked[1]],
            self.lex, self.ends.anchors)  # fmt: skip
        doubts = find_doubts(left_t, left_f, same, self.lex)
        left_t += [f for f in torch if id(f) in stacked[0]]
        left_f += [f for f in flax if id(f) in stacked[1]]
        unsure = {id(family) for doubt in doubts for family in (*doubt.torch, *doubt.flax)}
        root = Scope(torch[0].modules, flax[0].modules, [((), ())], True, same, self.lex)
        stacks = Stacks(root)
        for pair in pairs:
            stacks.add(pair)
        lost = stacks.fill([f for f in left_t if id(f) not in unsure], [f for f in left_f if id(f) not in unsure])
        return View(torch, flax, stacks.scopes, stacks.nest(*lost), stacks.partly, doubts)

    def _families(self, n: int, cuts: Cuts) -> list[Family]:
        mark = n, frozenset(cuts.items())
        if mark not in self._known:
            self._known[mark] = merged(view(self._templates[n], cuts), cuts)
        return self._known[mark]

    # ------------------------------------------------------------ other ways to read the numbers

    def _options(self, now: View, cuts: Both) -> Iterator[Both]:
        """Other cuts of the numbers of families that have no partner."""
        loose = [[*lost, *partly] for lost, partly in zip(now.lost, now.partly, strict=True)]
        outer = [_outermost(found) for found in loose]
        for n in (0, 1):
            counts = {len(some) for some in _places(outer[1 - n], (now.flax, now.torch)[n][0]).values()}
            sides = ((now.torch, now.flax)[n], outer[n]), ((now.flax, now.torch)[n], outer[1 - n])
            mine, theirs = ({f.prefix[:-1]: _numbered(side, f.prefix[:-1]) for f in found} for side, found in sides)
            for prefix, found in mine.items():
                for cut in _two_numbers(found, counts):
                    yield _with(cuts, n, {prefix: cut})
                for other, wholes in theirs.items() if len(next(iter(found), ())) == 1 else ():
                    for cut in _unequal(list(found.values()), list(wholes.values())):
                        # the stacks differ, so each has a name
                        yield _with(_with(cuts, n, {prefix: cut}), 1 - n, {other: Cut("names")})
            for prefix, cut in _of_one(now, n):
                yield _with(cuts, n, {prefix: cut})
            for found in part_lists(now, n):
                yield _with(cuts, n, found)
        mixed = [[family.prefix[:-1] for family in found if _mixed(family)] for found in loose]
        for lengths in ((), (1,)):
            kinds = [dict.fromkeys(found, Cut("kinds", lengths)) for found in mixed]
            if all(kinds):
                yield _with(_with(cuts, 0, kinds[0]), 1, kinds[1])
            for n in (0, 1):
                if kinds[n]:
                    yield _with(cuts, n, kinds[n])

    def _lists(self, now: View, cuts: Both) -> Both | None:
        """The cuts with numbers that are parts of names as blocks, where one side has more of the same list."""
        lists = [_lists(now.lost[n], side[0], self.lex) for n, side in enumerate((now.torch, now.flax))]
        for words in lists[0].keys() & lists[1].keys():
            ends = lists[0][words], lists[1][words]
            if len(ends[0][1]) != len(ends[1][1]) and not ends[0][1].isdisjoint(ends[1][1]):
                for n, (prefix, _) in enumerate(ends):
                    cuts = _with(cuts, n, {prefix: Cut("blocks")})
        return cuts if cuts[0] and cuts[1] else None


def _lists(lost: Iterable[Family], root: Family, lex: Lexicon) -> dict[frozenset[str], tuple[Tokens, set[int]]]:
    """The numbers of every list of layers without a partner, by the words before them, if no other list has these."""
    found = _places(lost, root, 1)
    named: defaultdict[frozenset[str], list[Tokens]] = defaultdict(list)
    for prefix in found:
        named[frozenset(concepts(prefix, lex))].append(prefix)
    return {words: (some[0], found[some[0]]) for words, some in named.items() if len(some) == 1}


def _apart(now: View, cuts: Both, inside: bool = False) -> Iterator[Both]:
    """Cuts that dissolve the lost blocks of one side, or of both. They are the last to be tried: as single modules,
    blocks fit anywhere. `inside`: only those inside of other blocks, whose modules stay in these."""
    small = _dissolved(now)
    if inside:
        nested = [{at: cut for at, cut in made.items() if any(isinstance(t, tuple) for t in at)} for made in small]
        small = nested[0], nested[1]
    for n in (0, 1):
        if small[n]:
            yield _with(cuts, n, small[n])
    if all(small):
        yield {**cuts[0], **small[0]}, {**cuts[1], **small[1]}


def _dissolved(now: View) -> Both:
    """Cuts that make the numbers of lost families parts of names, and leave those of other blocks of the prefix."""
    out: Both = ({}, {})
    for made, lost, every in zip(out, now.lost, (now.torch, now.flax), strict=True):
        small = [family for family in lost if len(family.keys) <= _FEW]
        for prefix in {family.prefix for family in small}:
            values = {key[-1] for family in small if family.prefix == prefix for key in family.keys}
            kept = any(f.prefix == prefix and not any(f is other for other in small) for f in every)
            made[prefix[:-1]] = Cut("names", tuple(sorted(values)) if kept else ())
    return out


def _is_cut(family: Family, cuts: Cuts) -> bool:
    """True if the number of these blocks is the second of two that one number stands for: only a stack holds them."""
    how = cuts.get(family.prefix[:-2]) if len(family.prefix) > 1 else None  # the root has no number
    return how is not None and how.way in ("cycle", "stages")


def _with(cuts: Both, n: int, more: Cuts) -> Both:
    return (cuts[0], {**cuts[1], **more}) if n else ({**cuts[0], **more}, cuts[1])


def _outermost(families: Iterable[Family]) -> list[Family]:
    """The families that lie in no other of them."""
    prefixes = {family.prefix for family in families}
    return [f for f in families if not any(f.prefix[:n] in prefixes for n in range(1, len(f.prefix)))]


def _mixed(family: Family) -> bool:
    """True if its blocks differ."""
    return len(set(family.sizes)) > 1 or any(len(module.support) < len(family.keys) for module in family.modules)


def _numbered(families: Iterable[Family], prefix: Tokens) -> dict[Key, int]:
    """The size of every block that a number after the prefix names, also where the number is a part of a name."""
    depth, out = sum(isinstance(token, tuple) for token in prefix), Counter[Key]()
    for module in (module for family in families for module in family.modules):
        path = (*module.outer, *module.tokens)
        number = path[len(prefix)] if len(path) > len(prefix) and path[: len(prefix)] == prefix else ""
        if isinstance(number, str):
            continue
        for column in columns_of([module]):
            for key, shape in column.shapes.items():
                last = key[depth] if isinstance(number, tuple) else number
                out[(*key[:depth], last)] += math.prod(shape)
    return dict(sorted(out.items()))


def _places(lost: Iterable[Family], root: Family, depth: int | None = None) -> dict[Tokens, set[int]]:
    """The numbers that a side has in one place: those of its families without a partner, and those that are parts of
    names, the first `depth` of each name."""
    found: defaultdict[Tokens, set[int]] = defaultdict(set)
    for family in lost:
        found[family.prefix[:-1]].update(key[-1] for key in family.keys)
    for module in root.modules:
        for at, number in [*module.numbers.items()][:depth]:
            found[module.tokens[:at]].add(number)
    return found


def _two_numbers(keys: Collection[Key], counts: Iterable[int]) -> Iterator[Cut]:
    """Ways to read the last number of these blocks as two: cycles of as many places, or as many stages, as the other
    side has numbers somewhere."""
    values = len({key[-1] for key in keys})
    if values * len({key[:-1] for key in keys}) != len(keys):
        return
    for count in sorted(counts):
        if 1 < count <= values and values % count == 0:
            yield Cut("cycle", (values // count,) * count)
            if count < values:
                yield Cut("stages", (values // count,) * count)


def _unequal(sizes: Sequence[int], wholes: Sequence[int]) -> Iterator[Cut]:
    """Places of a cycle that is cut short, and stages of unequal length, that have the sizes of the other side's
    blocks."""
    places = [sizes[place :: len(wholes)] for place in range(len(wholes))]
    if len(sizes) % len(wholes) and [sum(place) for place in places] == list(wholes):
        yield Cut("cycle", tuple(map(len, places)))
    sums = list(accumulate(sizes))
    ends = [sums.index(whole) + 1 for whole in accumulate(wholes) if whole in sums]
    lengths = tuple(b - a for a, b in pairwise((0, *ends)))
    if ends[-1:] == [len(sizes)] and len(ends) == len(wholes) and len(set(lengths)) > 1:
        yield Cut("stages", lengths)


def _of_one(now: View, n: int) -> Iterator[tuple[Tokens, Cut]]:
    """Cuts that read stacks of one: of numbered blocks that have no like, and of paired blocks. The leaves of the other
    side have an axis of length 1 there."""
    for scope in now.scopes:
        mine, theirs = (scope.flax, scope.torch) if n else (scope.torch, scope.flax)
        if _with_one(mine) or not _with_one(theirs):
            continue
        if not scope.root:
            outer = mine[0].outer
            values = {keys[n][-1:] for keys in scope.keys}
            if outer and isinstance(outer[-1], tuple) and len(values) == len(scope.keys):
                yield outer[:-1], Cut("cycle", (1,) * len(values))
            continue
        places: defaultdict[Tokens, Counter[int]] = defaultdict(Counter)
        for module in mine:
            for at, number in module.numbers.items():
                places[module.tokens[:at]][number] += 1
        yield from ((place, Cut("blocks")) for place, found in places.items() if len(found) == 1 < max(found.values()))


def _with_one(modules: Iterable[Module]) -> bool:
    """True if several leaves have an axis of length 1."""
    shapes = [next(iter(column.shapes.values())) for column in columns_of(modules)]
    return sum(1 in shape for shape in shapes if len(shape) > 1) > 1


def score(ends: Ends, found: View) -> Score:
    """What a view leaves without a partner; the least is best."""
    open_ = apart = 0
    for scope in found.scopes:
        sizes: tuple[_Counts, _Counts] = (Counter(), Counter())
        extents: tuple[_Counts, _Counts] = (Counter(), Counter())
        for n, modules in enumerate((scope.torch, scope.flax)):
            for column in columns_of(modules):
                for one, count in Counter(column.shapes.values()).items():
                    shape = (*column.stack, *one)
                    sizes[n][(math.prod(shape),)] += count
                    extents[n][tuple(sorted(shape))] += count
        open_ += _differ(*sizes)
        apart += _differ(*extents)
    for families in found.lost:
        leaves = sum(len(column.paths) for family in families for column in columns_of(family.modules))
        open_, apart = open_ + leaves, apart + leaves
    return _against(ends.anchors, found) if ends.anchors else 0, open_, apart


def _differ(one: _Counts, other: _Counts) -> int:
    return sum((one - other).values()) + sum((other - one).values())


def _against(anchors: Mapping[str, str], found: View) -> int:
    """How many pairs of leaves that rules state lie in different blocks. A leaf that is in no scope contradicts
    nothing: it only has no partner yet."""
    wanted = set(anchors.values())
    at: dict[str, tuple[int, object]] = {}
    for n, scope in enumerate(found.scopes):
        to_flax = dict(scope.keys)
        for modules, names, keys in ((scope.torch, anchors.keys(), to_flax), (scope.flax, wanted, None)):
            for column in columns_of(modules):
                for key, paths in column.paths.items():
                    at.update((path, (n, keys.get(key) if keys else key)) for path in paths if path in names)
    return sum(path in at and other in at and at[path] != at[other] for path, other in anchors.items())
