"""Names as evidence: words of a path, the concepts they stand for, and how alike two names are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

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
    little: frozenset[str]
    some: frozenset[str]
    known: frozenset[str]
    words_of_kinds: frozenset[object]

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
            words.SAYS_LITTLE,
            words.SAYS_SOME,
            frozenset(concept for found in (*synonyms.values(), *phrases.values()) for concept in found),
            _words_of(words.SAYS_LITTLE),
        )

    @classmethod
    def empty(cls) -> Lexicon:
        little = _words_of(words.SAYS_LITTLE)
        return cls({}, {}, 0, (), {}, little, _words_of(words.SAYS_SOME), frozenset(), little)

    def weight(self, concept: str) -> float:
        """How much a concept says: 1 for a telling word, less for kinds of layers and wrappers."""
        if concept in self.little:
            return 0.15
        if concept in self.some:
            return 0.5
        if len(concept) <= 2 and concept not in self.known:
            return UNKNOWN  # a letter or two that the table does not know: x1, m, zt
        return 1.0


def _words_of(concepts: Iterable[str]) -> frozenset[str]:
    """The written words for these concepts."""
    wanted = frozenset(concepts)
    rows = (group for concept, group in words.SYNONYMS.items() if concept and wanted.issuperset(concept.split()))
    return wanted | {word for group in rows for word in group.split()}


@lru_cache(maxsize=16)
def _standard(_: int = 0) -> Lexicon:
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
        found: tuple[str, ...] | None = None
        for length in range(min(lex.longest, len(run) - i), 1, -1):
            found = lex.phrases.get(tuple(run[i : i + length]))
            if found is not None:
                i += length
                break
        if found is None:
            found = lex.synonyms.get(run[i], (run[i],))
            i += 1
        found = tuple(concept for concept in found if concept)
        if bound and found and found != ("norm",):
            out += [f"{bound}~{concept}" for concept in found]
            bound = ""
            continue
        if bound:
            out.append(bound)
            bound = ""
        if found in (("pre",), ("post",)) and i < len(run):
            bound = found[0]
            continue
        out += found
    if bound:
        out.append(bound)
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
        mine = a & group
        if mine:
            theirs = b & group
            if theirs and mine.isdisjoint(theirs):
                return f"one name says {'/'.join(sorted(mine))} and the other {'/'.join(sorted(theirs))}"
    return ""


def strip_common(names: Sequence[frozenset[str]]) -> frozenset[str]:
    """The concepts that nearly all of the names have: a root prefix, which does not tell them apart."""
    if len(names) < 4:
        return frozenset()
    counts: dict[str, int] = {}
    for name in names:
        for concept in name:
            counts[concept] = counts.get(concept, 0) + 1
    return frozenset(concept for concept, count in counts.items() if count >= 0.9 * len(names))
