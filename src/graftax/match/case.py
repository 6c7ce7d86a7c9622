"""One pair of modules with its names: what both say, what one says alone, and where their numbers stand."""

from __future__ import annotations

from dataclasses import dataclass, field

from graftax.match.names import UNKNOWN, Lexicon, Name, concepts
from graftax.match.numbers import automatic
from graftax.match.pairs import Pair, Scope
from graftax.match.scope_names import Ranks, main_column, numbered_as
from graftax.match.sides import Module

_NOTHING = frozenset[str]()


@dataclass(slots=True)
class Case:
    """One pair with its names.

    own, beside      what each name says about its module alone, and about its place
    told             the words that name paired parts around the modules
    ranks            the places of the numbers of each name
    same_place       the ranks that agree, as text
    apart            how ranks of one count disagree
    counted_apart    both names count one thing, and their places differ
    numbered_apart   so do numbers that no sibling ranks
    """

    pair: Pair
    scope: Scope
    a: Name
    b: Name
    ranks: tuple[Ranks, Ranks]
    own: tuple[frozenset[str], frozenset[str]]
    told: tuple[frozenset[str], frozenset[str]] = (_NOTHING, _NOTHING)
    same_place: list[str] = field(default_factory=list[str])
    apart: str = ""
    said: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    loose: tuple[bool, bool] = (False, False)
    telling: bool = False
    particular: bool = False
    near: float = 0.0
    counted_apart: bool = False
    numbered_apart: bool = False
    _more: tuple[frozenset[str], frozenset[str]] | None = None

    @property
    def lex(self) -> Lexicon:
        return self.scope.lex

    @property
    def beside(self) -> tuple[frozenset[str], frozenset[str]]:
        beside = self.scope.beside
        left, right = beside.get(id(self.pair.torch), _NOTHING), beside.get(id(self.pair.flax), _NOTHING)
        return left - self.told[0], right - self.told[1]

    @property
    def left(self) -> frozenset[str]:
        return self.a.concepts - self.scope.common

    @property
    def right(self) -> frozenset[str]:
        return self.b.concepts - self.scope.common

    @property
    def both_norms(self) -> bool:
        return "norm" in self.left & self.right

    @property
    def raw_differ(self) -> bool:
        return self.a.raw != self.b.raw

    @property
    def numbers(self) -> tuple[int | None, int | None]:
        """The number at the end of each name."""
        last = [name.raw[-1] if name.raw and isinstance(name.raw[-1], int) else None for name in (self.a, self.b)]
        return last[0], last[1]  # type: ignore[return-value]

    @property
    def more(self) -> tuple[frozenset[str], frozenset[str]]:
        """The words of each name that say more than the other name. Where both stand in one part of the model, other
        words for places do not count."""
        if self._more is None:
            left, right = self.left, self.right
            if self.somewhere:
                left, right = left & (self.own[0] | right), right & (self.own[1] | left)
            self._more = left - _explained(left, right, self.lex), right - _explained(right, left, self.lex)
        return self._more

    @property
    def somewhere(self) -> bool:
        """True if both names have the same telling word for a place."""
        return any(self.lex.weight(word) >= 1 for word in (self.left & self.right) - {"head"})


def compare(case: Case) -> None:
    """Compare the numbers of the names, then weigh their words."""
    _compare_ranks(case)
    _compare_counts(case)
    _compare_words(case)


def _compare_ranks(case: Case) -> None:
    for what, rank, count in case.ranks[0]:
        for other, place, total in case.ranks[1]:
            if what == other and count == total:
                if rank == place:
                    case.same_place.append(f"number {rank + 1} of {count}{f' {what}s' if what else ''}")
                else:
                    case.apart = case.apart or f"they are {what or 'numbers'} {rank + 1} and {place + 1} of {count}"


def _compare_counts(case: Case) -> None:
    """Whether both names count one thing in different places. Of numbers that no sibling ranks, 0 and 1 may be the same
    place."""
    if case.same_place:
        return
    counted: list[dict[str, tuple[int, int | None]]] = []
    for module, known in zip((case.pair.torch, case.pair.flax), case.ranks, strict=True):
        places = {what: rank for what, rank, _ in known}
        numbers = {
            str(numbered_as(module.tokens, i, case.lex)[-1]): token
            for i, token in enumerate(module.tokens)
            if isinstance(token, int)
        }
        counted.append({what: (number, places.get(what)) for what, number in numbers.items()})
    for what in counted[0].keys() & counted[1].keys():
        (number, rank), (other, place) = counted[0][what], counted[1][what]
        if rank is not None and place is not None:
            case.counted_apart = case.counted_apart or rank != place
        elif number != other and {number, other} != {0, 1}:
            case.counted_apart = case.numbered_apart = True


def _compare_words(case: Case) -> None:
    """Weigh the words that both names have against those that one lacks."""
    pair, lex, common = case.pair, case.lex, case.scope.common
    shared = 0.6 * len(case.same_place)
    case.said = [(0.6, text) for text in case.same_place]
    alone = [0.0, 0.0]
    loose = [False, False]
    for end, name, other in ((0, case.a.concepts, case.b.concepts), (1, case.b.concepts, case.a.concepts)):
        for concept in name:
            weight = 0.02 if concept in common else lex.weight(concept)
            if concept not in other:
                alone[end] += max(weight, 1.0) if weight == UNKNOWN else weight
                loose[end] = loose[end] or (weight >= UNKNOWN and weight != 0.5)
            elif end == 0:
                shared += weight
                case.said.append((weight, concept))
                case.telling = case.telling or (weight >= 1 and (concept in case.own[0] or concept in case.own[1]))
                case.particular = case.particular or (weight >= 1 and concept not in case.scope.around)
                case.near += weight if weight == 0.5 else 0
    case.loose = loose[0], loose[1]
    counted = any(isinstance(token, int) for token in case.a.raw) and (any(case.ranks) or not case.scope.numbers)
    pair.equal = not case.raw_differ and (bool(case.same_place) or not counted)
    pair.score = shared / (shared + 0.5 * sum(alone) + 0.1) + (0.3 if pair.equal else 0.0)


def shared(case: Case) -> tuple[str, ...]:
    shared = tuple(text for _, text in sorted(case.said, reverse=True)[:4])
    if "final" in shared and not all("final" in concepts(name.raw, case.lex) for name in (case.a, case.b)):
        # `name_final_norm` added the word: no name has it.
        alone = "norm (the only one outside the blocks)"
        return (*(text for text in shared if text not in ("final", "norm")), alone)
    return shared


_ANY_HEAD = frozenset(("linear", "proj", "layer", "stage", "model", "list"))
"""Names that the last matrix of a model may have instead of `head`."""


def any_head(case: Case) -> bool:
    """True if one name says head, and the other is a name that any last matrix may have."""
    for module, plain, other in ((case.pair.flax, case.b, case.a), (case.pair.torch, case.a, case.b)):
        says_head = plain.concepts <= _ANY_HEAD and "head" in concepts(other.raw, case.lex)
        if says_head and not _chosen_number(module, plain, other):
            return True
    return False


def _chosen_number(module: Module, name: Name, other: Name) -> bool:
    """True if the name ends in a number that its author chose: if there is an fc2, fc1 is no head."""
    if not name.raw or not isinstance(name.raw[-1], int) or other.raw[-1:] == name.raw[-1:]:
        return False
    if module.tokens[module.own :] == name.raw[-1:]:
        return False
    return not any(automatic(main_column(module).path))


def counts_calls(module: Module) -> bool:
    """True if the last part of the module's path is an automatic name."""
    return any(automatic(main_column(module).path)[-2:-1])


def only_window(pair: Pair) -> bool:
    """True if the weight fits only as a window of length 1."""
    return any({label for _, label in link.labels} == {"conv 1x1"} for link in pair.links)


def is_window(pair: Pair) -> bool:
    """True if the weights of both are windows: their shapes show a convolution, whatever their names say."""
    return all(len(shape) > 2 for end in (pair.torch, pair.flax) for shape in main_column(end).shapes.values())


def _explained(said: frozenset[str], other: frozenset[str], lex: Lexicon) -> frozenset[str]:
    """The words of `said` that say no more than `other`. `out` is another word for `o` and for `down` if nothing says
    which, so the words that those imply do not count as more."""
    if "out" not in said & other:
        return _NOTHING
    return frozenset(
        word
        for concept in ("o", "down")
        if concept in said and not other & {"attn", "mlp", "o", "down", "up"}
        for word in (concept, *lex.implies.get(concept, ()))
    ) - {"out"}
