"""Names as evidence: words of a path, the concepts they stand for, and how alike two names are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from graftax.match import words

Tokens = Sequence[object]
UNKNOWN = 0.3
"""The weight of one or two letters that no table knows. To share it says little; to lack it counts like any word."""


@dataclass(frozen=True, slots=True)
class Lexicon:
    """The tables in the form that lookups need. `Lexicon.empty()` knows no synonyms: every word means itself, and only
    the words for kinds of layers count as saying little."""

    synonyms: dict[str, tuple[str, ...]]
    phrases: dict[tuple[str, ...], tuple[str, ...]]
    longest: int
    exclusive: tuple[frozenset[str], ...]
    implies: dict[str, tuple[str, ...]]
    known: frozenset[str]

    @classmethod
    def standard(cls) -> Lexicon:
        synonyms = {word: tuple(concept.split()) for concept, group in words.SYNONYMS.items() for word in group.split()}
        phrases = {tuple(phrase.split()): tuple(concept.split()) for phrase, concept in words.PHRASES.items()}
        return cls(
            synonyms,
            phrases,
            max(map(len, phrases)),
            tuple(frozenset(group.split()) for group in words.EXCLUSIVE),
            {concept: tuple(implied.split()) for concept, implied in words.IMPLIES.items()},
            frozenset(concept for found in (*synonyms.values(), *phrases.values()) for concept in found),
        )

    @classmethod
    def empty(cls) -> Lexicon:
        return cls({}, {}, 0, (), {}, frozenset())

    def weight(self, concept: str) -> float:
        """How much a concept says: 1 for a telling word, less for kinds of layers and wrappers."""
        if len(concept) <= 2 and not (concept in self.known or concept in LITTLE or concept in SOME):
            return UNKNOWN  # a letter or two that the table does not know: x1, m, zt
        return 0.15 if concept in LITTLE else 0.5 if concept in SOME else 1.0


def _words_of(concepts: str) -> frozenset[str]:
    """These concepts, and the written words for them."""
    wanted = frozenset(concepts.split())
    rows = (group for concept, group in words.SYNONYMS.items() if concept and wanted.issuperset(concept.split()))
    return wanted | {word for group in rows for word in group.split()}


LITTLE, SOME = (_words_of(words.SAYS[weight]) for weight in (0.15, 0.5))
"""Words for kinds of layers and for wrappers, and words for the part around a leaf."""


@cache
def _standard() -> Lexicon:
    return Lexicon.standard()


def lexicon() -> Lexicon:
    """The standard lexicon."""
    return _standard()


def concepts(tokens: Iterable[object], lex: Lexicon) -> tuple[str, ...]:
    """The concepts of a path in order, numbers left out; `pre`/`post` before a word bind to it (`post~attn`)."""
    out: list[str] = []
    run: list[str] = []
    for token in (*tokens, 0):
        if isinstance(token, str):
            run.append(token)
            continue
        out += _run(run, lex)
        run = []
    return tuple(out)


def _run(run: Sequence[str], lex: Lexicon) -> list[str]:
    out: list[str] = []
    i = 0
    bound = ""
    while i < len(run):
        sizes = range(min(lex.longest, len(run) - i), 1, -1)
        length = next((size for size in sizes if tuple(run[i : i + size]) in lex.phrases), 1)
        found = lex.phrases[tuple(run[i : i + length])] if length > 1 else lex.synonyms.get(run[i], (run[i],))
        found = tuple(concept for concept in found if concept)
        i += length
        if bound and found and found != ("norm",):
            out += [f"{bound}~{concept}" for concept in found]
            bound = ""
        elif found in (("pre",), ("post",)) and i < len(run):
            out += [bound] if bound else []
            bound = found[0]
        else:
            out += [bound, *found] if bound else found
            bound = ""
    return out


def concepts_of(tokens: Iterable[object], lex: Lexicon) -> frozenset[str]:
    """The concepts of a path, and those that they imply."""
    found = concepts(tokens, lex)
    return frozenset((*found, *(implied for concept in found for implied in lex.implies.get(concept, ()))))


@dataclass(frozen=True, slots=True)
class Name:
    """What a module's path says: its concepts, the words as they are, and the numbers that are part of the name."""

    concepts: frozenset[str]
    last: str
    raw: tuple[object, ...]


def name_of(tokens: Tokens, own: int, lex: Lexicon) -> Name:
    """The name of the path `tokens`; from the token `own` on, the path belongs to this module alone."""
    found = concepts(tokens, lex)
    have = set(concepts_of(tokens, lex))
    if all(lex.weight(concept) in (0.5, 0.15) for concept in concepts(tokens[own:], lex)):
        _resolve(have, lex)
    return Name(frozenset(have), found[-1] if found else "", tuple(tokens))


_QUALIFIED = frozenset(("q", "k", "v", "qkv", "kv", "o", "up", "gate", "down", "in", "norm", "router", "patch"))


def _resolve(have: set[str], lex: Lexicon) -> None:
    """`in`, `out` and `proj` name a projection only beside attn or mlp, and only if no other word does."""
    if lex.synonyms and {"mlp", "in"} <= have and not have & {"up", "gate", "norm", "down"}:
        have.add("up")
    if not lex.synonyms or have & _QUALIFIED or not have & {"out", "proj"}:
        return
    if "attn" in have and "mlp" not in have:
        have |= {"o", "out"}
    elif "mlp" in have and "attn" not in have:
        have |= {"down", "out"}


def contradicts(a: frozenset[str], b: frozenset[str], lex: Lexicon) -> str:
    """The concepts by which two names exclude each other, as text; empty if they do not."""
    for group in lex.exclusive:
        mine, theirs = a & group, b & group
        if mine and theirs and mine.isdisjoint(theirs):
            return f"one name says {'/'.join(sorted(mine))} and the other {'/'.join(sorted(theirs))}"
    return ""


def strip_common(names: Sequence[frozenset[str]]) -> frozenset[str]:
    """The concepts that nearly all of the names have: a root prefix, which does not tell them apart."""
    if len(names) < 4:
        return frozenset()
    counts = Counter(concept for name in names for concept in name)
    return frozenset(concept for concept, count in counts.items() if count >= 0.9 * len(names))
