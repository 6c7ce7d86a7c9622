"""Pair families of the two sides: find which are the same blocks, and which instance goes with which."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from graftax.match.names import Lexicon, concepts, contradicts
from graftax.match.sides import Family, Key

MARGIN = 0.2
_TOWERS = frozenset(("enc", "dec"))


@dataclass(slots=True, eq=False)
class FamilyPair:
    """Two families that may be the same blocks. `blocked`: names or sizes exclude it; `ruled`: rules state it."""

    torch: Family
    flax: Family
    score: float = 0.0
    blocked: bool = False
    ruled: bool = False

    @property
    def keys(self) -> list[tuple[Key, Key]]:
        """The instances in their order."""
        return list(zip(self.torch.keys, self.flax.keys, strict=True))


def pair_families(
    torch: list[Family],
    flax: list[Family],
    lex: Lexicon,
    anchors: Collection[tuple[int, int]] = (),
    roots: tuple[Family, Family] | None = None,
) -> tuple[list[FamilyPair], list[Family], list[Family]]:
    """(pairs, torch families left, Flax families left). The counts must agree. The sizes of the instances in order and
    the words of the paths and of their contents decide, by mutual best with a margin. `anchors`: ids of families that
    rules pair."""
    words = {id(f): frozenset(concepts(f.prefix, lex)) for f in (*torch, *flax)}
    outside = [[frozenset(concepts(m.tokens, lex)) for m in root.modules] for root in roots or ()] or [[], []]
    special = {**_special(torch, words, outside[0]), **_special(flax, words, outside[1])}
    said = frozenset[str]().union(*words.values(), *outside[0], *outside[1])
    if len(said & _TOWERS) == 1:  # an encoder is a tower only beside a decoder
        special = {family: found - _TOWERS for family, found in special.items()}
    inner = {id(f): _inner(f, lex) for f in (*torch, *flax)}
    rated: list[FamilyPair] = []
    by_count: dict[int, list[Family]] = {}
    for family in flax:
        by_count.setdefault(len(family.keys), []).append(family)
    for family in torch:
        for other in by_count.get(len(family.keys), []):
            item = _rate(family, other, words, inner, lex, anchors)
            if not item.ruled and not item.blocked:
                item.blocked = _apart(item, words, special, lex) or _better_named(
                    item, torch, flax, words, special, lex
                )
            rated.append(item)
    out: list[FamilyPair] = []
    used: set[int] = set()
    while best := _mutual(rated):
        out += best
        used |= {id(family) for pair in best for family in (pair.torch, pair.flax)}
        rated = [r for r in rated if id(r.torch) not in used and id(r.flax) not in used]
    return out, [f for f in torch if id(f) not in used], [f for f in flax if id(f) not in used]


def _special(
    families: list[Family], words: dict[int, frozenset[str]], outside: list[frozenset[str]]
) -> dict[int, frozenset[str]]:
    """The words of each family's path that tell it apart. Left out are the words of a wrapper: those that all families
    of its side have, if what lies outside of the families has them nowhere or nearly everywhere."""
    every = frozenset[str].intersection(*(words[id(f)] for f in families)) if families else frozenset[str]()
    counts = {word: sum(word in said for said in outside) for word in every}
    every = frozenset(word for word, count in counts.items() if not count or 4 * count >= 3 * len(outside))
    return {id(f): words[id(f)] - every for f in families}


def _apart(
    item: FamilyPair, words: dict[int, frozenset[str]], special: dict[int, frozenset[str]], lex: Lexicon
) -> bool:
    """True if each path names a part that the other does not and they share no telling word: they are two towers, not
    one."""
    a, b = words[id(item.torch)], words[id(item.flax)]
    if any(lex.weight(word) >= 1 for word in a & b):
        return False
    only_a, only_b = special[id(item.torch)] - b, special[id(item.flax)] - a
    return (_more(only_a, lex) and _more(only_b, lex, 0.5)) or (_more(only_a, lex, 0.5) and _more(only_b, lex))


def _more(words: frozenset[str], lex: Lexicon, least: float = 1.0) -> bool:
    return any(lex.weight(word) >= least for word in words)


def _better_named(
    item: FamilyPair,
    torch: list[Family],
    flax: list[Family],
    words: dict[int, frozenset[str]],
    special: dict[int, frozenset[str]],
    lex: Lexicon,
) -> bool:
    """True if one path says more than the other, and its side has a family with another number of blocks that shares
    the other path's words and says no more: that family has the better name."""
    for family, other, side in ((item.torch, item.flax, torch), (item.flax, item.torch, flax)):
        wanted = words[id(other)]
        if not _more(special[id(family)] - wanted, lex):
            continue
        for rival in side:
            others = len(rival.keys) != len(family.keys) and len(rival.keys[0]) == len(family.keys[0])
            if others and words[id(rival)] & wanted and not _more(special[id(rival)] - wanted, lex):
                return True
    return False


def _inner(family: Family, lex: Lexicon) -> frozenset[str]:
    out: set[str] = set()
    for module in family.modules:
        out.update(concepts(module.tokens, lex))
    return frozenset(out)


def _rate(
    torch: Family,
    flax: Family,
    words: dict[int, frozenset[str]],
    inner: dict[int, frozenset[str]],
    lex: Lexicon,
    anchors: Collection[tuple[int, int]],
) -> FamilyPair:
    a, b = words[id(torch)], words[id(flax)]
    same_sizes = torch.sizes == flax.sizes
    names = _overlap(a, b, lex)
    inside = _overlap(inner[id(torch)], inner[id(flax)], lex)
    score = 1.0 * same_sizes + 1.0 * names + 0.5 * inside
    score += 0.3 if torch.prefix == flax.prefix else 0.0
    if (id(torch), id(flax)) in anchors:
        return FamilyPair(torch, flax, score + 9, ruled=True)
    return FamilyPair(torch, flax, score, bool(contradicts(a, b, lex)) or not (same_sizes or inside > 0.2))


def _overlap(a: frozenset[str], b: frozenset[str], lex: Lexicon) -> float:
    union = sum(max(lex.weight(c), 0.3) for c in a | b)
    return sum(max(lex.weight(c), 0.3) for c in a & b) / union if union else 0.0


def _mutual(rated: list[FamilyPair]) -> list[FamilyPair]:
    rows: dict[int, list[FamilyPair]] = {}
    cols: dict[int, list[FamilyPair]] = {}
    for item in rated:
        rows.setdefault(id(item.torch), []).append(item)
        cols.setdefault(id(item.flax), []).append(item)
    out: list[FamilyPair] = []
    for item in rated:
        rivals = [r for r in rows[id(item.torch)] + cols[id(item.flax)] if r is not item]
        if not item.blocked and all(r.score <= item.score - MARGIN for r in rivals):
            out.append(item)
    return out
