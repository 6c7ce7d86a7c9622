"""What the names of a whole scope show: the words that all share, those for places, and what the numbers count."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from graftax.match.names import UNKNOWN, Lexicon, Name, concepts, strip_common
from graftax.match.pairs import Scope
from graftax.match.places import counted_places, own_words
from graftax.match.sides import Column, Module, Token

Ranks = tuple[tuple[str, int, int], ...]
"""The numbers of a name as (what is numbered, rank, how many)."""
_TOWERS = frozenset(("enc", "dec", "vision", "text", "audio"))
_PLACES = frozenset(("out", "final", "post"))
LAST = _PLACES | {"head", "pool"}
"""What the names of a norm may say if it is the last before the end, or before the head."""
_PLAIN = frozenset(("norm", "layer", "stage", "model", "list", "weight", "scale"))


def name_final_norm(scope: Scope) -> None:
    """Name the norm outside of the blocks the final norm, if its name says nothing but its tower and that it comes out
    or last, and no other norm there may be the last of that tower."""
    for modules in (scope.torch, scope.flax):
        last: defaultdict[frozenset[str], list[Module]] = defaultdict(list)
        for module in modules:
            said = scope.name(module).concepts - scope.common - _PLAIN
            ends = said <= _TOWERS or said & _PLACES
            if "norm" in scope.name(module).concepts and ends and not _counted(module, scope.lex):
                last[said & _TOWERS].append(module)
        for module in (found[0] for found in last.values() if len(found) == 1):
            name = scope.name(module)
            if name.concepts - scope.common - _PLAIN <= _TOWERS | _PLACES:
                scope.names[id(module)] = Name(name.concepts - {"post"} | {"final"}, name.last, name.raw)


def _counted(module: Module, lex: Lexicon) -> bool:
    """True if a number of the path counts something. That of a tower or of the whole model (`Encoder_0`) does not."""
    before = zip(("", *module.tokens), module.tokens, strict=False)
    whole = _TOWERS | {"model"}
    return any(isinstance(n, int) and whole.isdisjoint(lex.synonyms.get(str(word), ())) for word, n in before)


def learn_common(scope: Scope) -> None:
    ends = [[scope.name(module).concepts for module in modules] for modules in (scope.torch, scope.flax)]
    scope.common = scope.wrappers.union(*map(strip_common, ends))
    counts = [Counter(concept for name in names for concept in name) for names in ends]
    scope.around = frozenset(c for c, n in counts[0].items() if n >= _AROUND and counts[1][c] >= _AROUND)


def learn_places(scope: Scope) -> None:
    """Learn what each module's name says about itself alone, and what it says about its place."""
    ends = scope.torch, scope.flax
    own, around = zip(*(own_words(modules, scope.names, scope.lex) for modules in ends), strict=True)
    scope.own, scope.beside = {**own[0], **own[1]}, {**around[0], **around[1]}
    named = [[scope.name(module).concepts for module in modules] for modules in ends]
    norms = [[words for words in found if "norm" in words] for found in named]
    scope.norms = frozenset(word for found in norms if found for word in frozenset[str].intersection(*found))
    scope.places = tuple(frozenset[str]().union(*found.values()) for found in around)
    scope.blocks = tuple(_in_blocks(modules, scope.lex) for modules in ends)
    scope.counted = tuple(counted_places(modules, scope.lex) for modules in ends)


def _in_blocks(modules: Sequence[Module], lex: Lexicon) -> frozenset[int]:
    """The modules below a part of their path that is a number or ends in one, and whose word means a layer."""
    out: set[int] = set()
    for module in modules:
        tokens = module.tokens[: module.cuts[-2]] if len(module.cuts) > 1 else ()
        places = (i for i, token in enumerate(tokens) if isinstance(token, int) and i)
        if any("layer" in lex.synonyms.get(str(tokens[i - 1]), ()) for i in places):
            out.add(id(module))
    return frozenset(out)


_AROUND = 4  # if this many modules of each side hold a word, it names the part around them and not one module


_MAIN = ("weight", "value", "v", "bias", "mean", "var", "g")


def main_column(module: Module) -> Column:
    return next((module.roles[role] for role in _MAIN if role in module.roles), next(iter(module.roles.values())))


def wrapper_words(modules: Sequence[Module], others: Sequence[Module], lex: Lexicon) -> frozenset[str]:
    """The first words that half of a side's modules have and the other side does not know: the model is inside a
    wrapper."""
    known = {concept for module in others for concept in concepts((*module.outer, *module.tokens), lex)}
    paths: list[tuple[Token, ...]] = [(*module.outer, *module.tokens) for module in modules]
    out: set[str] = set()
    if len(modules) == len(others) == 1 and paths[0][1:] == (*others[0].outer, *others[0].tokens):
        # One module and the same inside something whose name is no word for a part.
        return frozenset(concept for concept in concepts(paths[0][:1], lex) if lex.weight(concept) == UNKNOWN)
    for _ in range(3):
        counts = Counter(path[0] for path in paths if path)  # the root itself has no words
        first = max(counts, key=lambda token: counts[token], default=None)
        if not isinstance(first, str) or counts[first] < 2 or 2 * counts[first] < len(modules):
            break
        if any(4 * count > counts[first] for token, count in counts.items() if token != first):
            break  # it is one of several parts, not a wrapper of all
        out.update(concept for concept in concepts((first,), lex) if concept not in known)
        paths = [path[1:] if path[0] == first else path for path in paths if len(path) > 1]
    return frozenset(out)


def number_ranks(modules: Sequence[Module], scope: Scope) -> dict[int, Ranks]:
    """For each module, the numbers of its name as (what is numbered, rank, how many). Siblings at one place of the tree
    are numbered together, so that 1, 2 means the same as 0, 1 and as 0, 3."""
    groups: defaultdict[tuple[object, ...], set[int]] = defaultdict(set)
    places: dict[int, list[tuple[tuple[object, ...], int]]] = {}
    for module in modules:
        for at, number in module.numbers.items():
            mark = numbered_as(module.tokens, at, scope.lex)
            groups[mark].add(number)
            places.setdefault(id(module), []).append((mark, number))
    orders = {mark: sorted(values) for mark, values in groups.items() if len(values) > 1}
    out: dict[int, Ranks] = {}
    for key, found in places.items():
        ranks = [(str(mark[-1]), orders[mark].index(n), len(orders[mark])) for mark, n in found if mark in orders]
        if ranks:
            out[key] = tuple(ranks)
    return out


def numbered_as(tokens: Sequence[Token], at: int, lex: Lexicon) -> tuple[object, ...]:
    """What the number at `at` counts: the path before its word, and the meaning of the word (ln_1 is like norm_2)."""
    start = at
    while start and isinstance(tokens[start - 1], str):
        start -= 1
    words = tokens[start:at]
    meant = concepts(words, lex)
    # In a run of words the number belongs to the last one: attention, norm 1 -> the norms of attention.
    return (*tokens[:start], " ".join(meant[:-1]), meant[-1] if meant else "")
