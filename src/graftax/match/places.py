"""Words that belong to one module, and words that it shares with the modules around it.

In `user.fc` beside `user.norm`, `user` says where both stand and `fc` says which module it is. If two names share only
`user`, that is no evidence for any pair of modules inside.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from graftax.match.names import LITTLE, Lexicon, Name, concepts

if TYPE_CHECKING:
    from graftax.match.sides import Family, Module, Token


def mark_own(families: Iterable[Family]) -> None:
    """Set where each module's own part of its path begins: from there on, no other module of its side lies below."""
    modules = [module for family in families for module in family.modules]
    beneath: defaultdict[tuple[Token, ...], set[tuple[Token, ...]]] = defaultdict(set)
    for module in modules:
        path, start = (*module.outer, *module.tokens), len(module.outer)
        for at in (*range(1, start + 1), *(start + cut for cut in module.cuts)):
            beneath[path[:at]].add(path)
    for module in modules:
        path, start = (*module.outer, *module.tokens), len(module.outer)
        module.own = 0
        for cut in module.cuts[:-1]:
            if len(beneath[path[: start + cut]]) == 1:
                break
            module.own = cut


def own_words(
    modules: Sequence[Module], names: Mapping[int, Name], lex: Lexicon
) -> tuple[dict[int, frozenset[str]], dict[int, frozenset[str]]]:
    """(the concepts that the path of each module, by id, says about it alone; those that it shares with the modules
    around it, without the names of repeated blocks)"""
    own: dict[int, frozenset[str]] = {}
    around: dict[int, frozenset[str]] = {}
    places: dict[tuple[Token, ...], tuple[frozenset[str], frozenset[str]]] = {}
    for module in modules:
        head = module.tokens[: module.own]
        found = places.get(head)
        if found is None:
            cuts = [cut for cut in module.cuts if cut <= module.own]
            parts = [module.tokens[a:b] for a, b in pairwise((0, *cuts))]
            found = places[head] = (_said(parts, lex, frozenset()), _said(parts, lex, _BLOCKS))
        said = names[id(module)].concepts
        own[id(module)] = (said - found[0]) | (said & set(concepts(module.tokens[module.own :], lex)))
        around[id(module)] = found[1]
    return own, around


def counted_places(modules: Iterable[Module], lex: Lexicon) -> frozenset[tuple[Token, ...]]:
    """Paths below which numbers tell modules apart."""
    found: defaultdict[tuple[Token, ...], int] = defaultdict(int)
    for module in modules:
        path = module.tokens[module.own :]
        if path and isinstance(path[-1], int) and LITTLE.issuperset(concepts(path, lex)):
            at = module.own
            while at and module.tokens[at - 1] in LITTLE:
                at -= 1  # `lin.0` and `lin.1` count as `lin_0` and `lin_1` would
            found[module.tokens[:at]] += 1
    return frozenset(head for head, count in found.items() if count)


_BLOCKS = frozenset(("layer", "stage", "list"))


def _said(parts: Iterable[tuple[Token, ...]], lex: Lexicon, without: frozenset[str]) -> frozenset[str]:
    """The concepts of these parts of a path, and the concepts that they imply. Parts that hold a word of `without` are
    left out."""
    out: set[str] = set()
    for part in parts:
        words = concepts(part, lex)
        if without.isdisjoint(words):
            out.update(words, *(lex.implies.get(word, ()) for word in words))
    return frozenset(out)
