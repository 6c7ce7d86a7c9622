"""The evidence of names for one pair: a table of named judgements.

A judgement looks at one pair and says nothing, or what speaks against it: a `Finding` bars some of the ways to take the
pair. A pair that is barred still competes, so that it can make a choice unclear, but it is not taken that way. The
score, how alike the names are, only orders candidates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from graftax.match.names import UNKNOWN, Lexicon, Name, concepts, contradicts, name_of
from graftax.match.pairs import BY_NAME, EVERY, Finding, Pair, Route, Scope
from graftax.match.scope_names import Ranks, main_column, numbered_as
from graftax.match.sides import Module, Token
from graftax.tree import split_words

_NOTHING = frozenset[str]()


@dataclass(slots=True)
class Case:
    """One pair with its names. own, beside: what each name says about its module alone, and about its place; ranks:
    the places of the numbers of each name; same_place: the ranks that agree, as text; apart: how they disagree."""

    pair: Pair
    scope: Scope
    a: Name
    b: Name
    ranks: tuple[Ranks, Ranks]
    own: tuple[frozenset[str], frozenset[str]]
    same_place: list[str] = field(default_factory=list[str])
    apart: str = ""
    said: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    loose: tuple[bool, bool] = (False, False)
    telling: bool = False
    particular: bool = False
    near: float = 0.0

    @property
    def lex(self) -> Lexicon:
        return self.scope.lex

    @property
    def beside(self) -> tuple[frozenset[str], frozenset[str]]:
        beside = self.scope.beside
        return beside.get(id(self.pair.torch), _NOTHING), beside.get(id(self.pair.flax), _NOTHING)

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
        left, right = self.left, self.right
        if self.somewhere:
            left, right = left & (self.own[0] | right), right & (self.own[1] | left)
        return left - _explained(left, right, self.lex), right - _explained(right, left, self.lex)

    @property
    def somewhere(self) -> bool:
        """True if both names have the same telling word for a place."""
        return any(self.lex.weight(word) >= 1 for word in (self.left & self.right) - {"head"})


def judge(pair: Pair, scope: Scope, ranks_t: Ranks, ranks_f: Ranks) -> None:
    """Score the names of the pair, and record what speaks against it. A tied tensor is judged by the best of its
    names."""
    torch, flax = scope.name(pair.torch, True), scope.name(pair.flax, False)
    own = scope.own[id(pair.torch)], scope.own[id(pair.flax)]
    _judge(Case(pair, scope, torch, flax, (ranks_t, ranks_f), own))
    if not pair.torch.alias:
        return
    counted = tuple(found for found in pair.findings if found.judgement in _NUMBERS)
    for tokens in pair.torch.alias:
        other = Pair(pair.torch, pair.flax, pair.links, pair.whole)
        name = name_of(tokens, 0, scope.lex)
        _judge(Case(other, scope, name, flax, ((), ranks_f), (name.concepts, own[1])))
        if _rank(other) > _rank(pair):
            pair.score, pair.shared, pair.equal = other.score, other.shared, other.equal
            rest = tuple(found for found in other.findings if found.judgement not in _NUMBERS)
            pair.findings = (*rest, *counted)


_NUMBERS = ("last numbers", "counts", "last numbers of one count")


def _rank(pair: Pair) -> tuple[bool, bool, float]:
    return not pair.blocked, not pair.found("vague"), pair.score


def _judge(case: Case) -> None:
    _compare_ranks(case)
    _compare_words(case)
    pair = case.pair
    found: list[Finding] = []
    for name, bars, judgement in JUDGEMENTS:
        text = judgement(case)
        if text is not None:
            found.append(Finding(name, bars, text))
    pair.findings = tuple(found)
    pair.shared = _shared(case)


def _compare_ranks(case: Case) -> None:
    for what, rank, count in case.ranks[0]:
        for other, place, total in case.ranks[1]:
            if what == other and count == total:
                if rank == place:
                    case.same_place.append(f"number {rank + 1} of {count}{f' {what}s' if what else ''}")
                else:
                    case.apart = case.apart or f"they are {what or 'numbers'} {rank + 1} and {place + 1} of {count}"


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


def _shared(case: Case) -> tuple[str, ...]:
    shared = tuple(text for _, text in sorted(case.said, reverse=True)[:4])
    if "final" in shared and not all("final" in concepts(name.raw, case.lex) for name in (case.a, case.b)):
        # `name_final_norm` added the word: no name has it.
        alone = "norm (the only one outside the blocks)"
        return (*(text for text in shared if text not in ("final", "norm")), alone)
    return shared


# ---------------------------------------------------------------- judgements: None, or what speaks against the pair


def _exclusive_words(case: Case) -> str | None:
    return contradicts(case.left, case.right, case.lex) or None


def _other_place(case: Case) -> str | None:
    return case.apart or None


def _each_says_more(case: Case) -> str | None:
    if all(case.loose) and ((not case.particular and case.near < 0.9) or _one_word_apart(case.a, case.b)):
        return "each name has a word that the other lacks"
    return None


def _linear_or_convolution(case: Case) -> str | None:
    if case.raw_differ and ("conv" in case.a.concepts) != ("conv" in case.b.concepts) and _only_window(case.pair):
        return "one is a Linear and the other a convolution"
    return None


_DECONV = frozenset(("deconv", "transpose", "transposed", "up", "upsample", "dec", "ups", "gen", "generator"))


def _unnamed_deconvolution(case: Case) -> str | None:
    if not only_flipped(case.pair):
        return None
    if (case.a.concepts | case.b.concepts) & _DECONV or any(link.torch.role == "bias" for link in case.pair.links):
        return None
    return "only a transposed convolution fits, and neither name says that it is one"


def only_flipped(pair: Pair) -> bool:
    """True if a leaf fits only as a transposed convolution with a flipped kernel."""
    return any({label for _, label in link.labels} == {"conv_transpose default"} for link in pair.links)


def _stray_parameter(case: Case) -> str | None:
    """A bare parameter against the weight of a module: its name may not have a word that the module's lacks. No order
    proves that a parameter with its own name is the weight of a norm."""
    pair = case.pair
    if pair.torch.raw == pair.flax.raw:
        return None
    raw, mine, other = (pair.torch, case.a, case.b) if pair.torch.raw else (pair.flax, case.b, case.a)
    own = concepts(split_words(main_column(raw).leaf), case.lex)
    if any(case.lex.weight(c) >= 1 and c in mine.concepts and c not in other.concepts for c in own):
        return "one is a bare parameter, and its name has a word that the other lacks"
    return None


def _in_a_block(case: Case) -> str | None:
    """One module stands in a numbered block, the other outside of the blocks of its side."""
    scope = case.scope
    if not scope.root or not all(scope.blocks):
        return None
    inside = id(case.pair.torch) in scope.blocks[0], id(case.pair.flax) in scope.blocks[1]
    return "one stands in a block of layers and the other outside of them" if inside[0] != inside[1] else None


def _last_numbers(case: Case) -> str | None:
    """Both names end in a number, and the numbers differ: they may count the same thing, from 0 and from 1, or
    different things."""
    return "" if not case.same_place and _numbers_differ(case.a, case.b) else None


def _counts(case: Case) -> str | None:
    """Both names count the same thing, and their places differ. If no sibling shows where the count starts, 0 and 1
    may be the same place."""
    return "" if not case.same_place and _counts_differ(case) else None


def _other_number(case: Case) -> str | None:
    """As `counts`, for numbers that no siblings rank. Of numbers with siblings, the order of all pairs decides."""
    return "" if not case.same_place and _counts_differ(case, ranked=False) else None


def _last_numbers_of_one_count(case: Case) -> str | None:
    return "" if _last_numbers(case) is not None and _counts(case) is not None else None


def _no_backing(case: Case) -> str | None:
    """The names share no telling word, and not only words for the kind either."""
    if case.telling or (case.said and case.pair.whole and not any(case.loose)):
        return None
    return ""


def _nothing_shared_at_root(case: Case) -> str | None:
    return "" if case.scope.root and not case.said and any(case.loose) and not _any_head(case) else None


def _two_places(case: Case) -> str | None:
    """Two norms: one name says a place off the residual stream (the norm of the queries), or one says early and the
    other last. Matrices: outside of a feed-forward part, the matrix that goes down may come first."""
    if "norm" in case.a.concepts & case.b.concepts:
        only = case.own[0] - case.b.concepts, case.own[1] - case.a.concepts
        if any(words & _ELSEWHERE for words in only):
            return ""
        return "" if any(only[i] & _EARLY and only[1 - i] & _LATE for i in (0, 1)) else None
    words = (case.beside[0] | case.beside[1]) - case.scope.common
    return "" if any(case.lex.weight(word) >= 1 and word != "expert" for word in words) else None


_ELSEWHERE = frozenset(("q", "k", "qkv", "conv", "embed", "patch"))
_EARLY, _LATE = frozenset(("attn", "pre", "in", "pre~attn", "pre~self", "first")), frozenset(("out", "final"))


def _counted_twice(case: Case) -> str | None:
    """Numbers that count once on one side and twice on the other prove no order, if one name has nothing else."""
    modules = case.pair.torch, case.pair.flax
    counts = [sum(isinstance(token, int) for token in module.tokens) for module in modules]
    bare = any(all(isinstance(t, int) for t in module.tokens[module.own :]) for module in modules)
    return "" if counts[0] != counts[1] and bare else None


def _unmatched_word(case: Case) -> str | None:
    """A word of one name that the other lacks: what is left over need not belong together. Outside of blocks, a word
    for the part around the module does not count. A name that only counts calls (`Dense_0`) lacks every word, so it may
    stand for any word of the table."""
    if not case.raw_differ or _any_head(case):
        return None
    if _norms_of_two_places(case) or (_layers_of_two_kinds(case) and not _only_window(case.pair)):
        return ""
    left, right = case.more
    only = left - right - _plain_words(case), right - left - _plain_words(case)
    counted = counts_calls(case.pair.flax), counts_calls(case.pair.torch)  # each beside the words of the other
    for words, other, calls in zip(only, (right, left), counted, strict=True):
        words -= _IS_HEAD if other & _IS_HEAD else _NOTHING
        if any(_tells(word, case, calls) for word in words):
            return ""
    return None


def _tells(word: str, case: Case, calls: bool) -> bool:
    """True if a word that one name lacks may name another module. calls: the name that lacks it only counts calls."""
    weight = case.lex.weight(word)
    if calls and word in case.lex.known:
        return False
    return weight >= 1 or weight == UNKNOWN or (weight == 0.5 and not case.scope.root)


def counts_calls(module: Module) -> bool:
    """True if the last part of the module's path is an automatic name."""
    path = next(iter(main_column(module).paths.values()))[0]
    return any(_COUNTED_CALL.fullmatch(part) for part in re.split(r"[./]", path)[-2:-1])


_IS_HEAD = frozenset(("head", "out"))


def _vague(case: Case) -> str | None:
    """The names leave the pair vague: the first of `_VAGUE` that knows decides. It then proves nothing that no other
    pair fits."""
    if not case.raw_differ or _any_head(case):
        return None
    for tells in _VAGUE:
        vague = tells(case)
        if vague is not None:
            return "" if vague else None
    return None


# ---------------------------------------------------------------- vague: True, False, or None if it does not know


def _in_other_twin(case: Case) -> bool | None:
    """Both sides have several parts that hold the same names, and the names of these two parts differ."""
    if not (id(case.pair.torch) in case.scope.twins and id(case.pair.flax) in case.scope.twins):
        return None
    said = [words - case.scope.common for words in case.beside]
    only = said[0] - case.b.concepts, said[1] - case.a.concepts
    if all(any(case.lex.weight(word) >= 1 for word in words) for words in only):
        return None if any(case.lex.weight(word) >= 1 for word in said[0] & said[1]) else True
    return None


def _shares_own_word(case: Case) -> bool | None:
    """The names share a telling word of their own. `head` does not tell one head from another."""
    own = case.own[0] | case.own[1]
    if any(case.lex.weight(word) >= 1 for word in (case.left & case.right & own) - {"head"}):
        return False
    both = case.own[0] & case.own[1]
    return False if any(case.lex.weight(word) == UNKNOWN and len(word) > 1 for word in both) else None


_LISTS = frozenset(("layer", "stage", "model", "list"))
_COUNTED = frozenset(("stem", "first", "norm", "linear", "conv", "layer", "stage", "model", "list"))
_OUTSIDE = _COUNTED | {"final", "head"}
"""What a number in a list may stand for outside of the blocks; for numbers inside them see `_INSIDE`."""
_INSIDE = _COUNTED | {"shortcut"}
_PARTS = frozenset(("expert", "patch", "embed", "deconv", "pool", "proj"))


def _number_for_a_word(case: Case) -> bool | None:
    """A number in place of a name (`Conv_2`) may stand for any known word. It stands for few words only if the other
    side counts too, or for norms (a place in the block)."""
    scope, left, right = case.scope, case.left, case.right
    for side, said, plain, more in (
        (0, left - right, _LISTS, right - left),
        (1, right - left, case.lex.little, left - right),
    ):
        number = case.numbers[side]
        other = case.pair.flax if side == 0 else case.pair.torch
        if number is None or not said <= plain:
            continue
        few = case.both_norms or other.tokens[: other.own] in scope.counted[1 - side]
        words = (_OUTSIDE if scope.root else _INSIDE) | (
            _place_of(number, case.ranks[side]) if case.both_norms else _NOTHING
        )
        if more <= words or (not few and more <= words | _PARTS | _half_of(number, case.ranks[side])):
            return False
        if more and case.ranks[side]:
            return True  # one is counted among several, and the other is not
    return None


_KINDS = frozenset(("conv", "linear", "embed", "patch"))
_MATRIX = frozenset(("conv", "linear", "embed"))


def _norms_of_two_places(case: Case) -> bool | None:
    if not case.both_norms:
        return None
    more = case.more[0] - case.more[1], case.more[1] - case.more[0]
    own = more[0] & case.own[0], more[1] & case.own[1]
    kinds = _KINDS | case.lex.some
    if own[0] & kinds and own[1] & kinds:
        return True
    return True if (own[0] | own[1]) & (_KINDS - case.scope.norms) else None


def _layers_of_two_kinds(case: Case) -> bool | None:
    """One name says one kind of layer and the other another, and the shapes do not show the kind."""
    if case.both_norms:
        return None
    left, right = case.more
    if (left - right) & case.own[0] & _MATRIX and (right - left) & case.own[1] & _MATRIX and not _window(case.pair):
        return True
    table = "embed" in (left & case.own[0]) ^ (right & case.own[1])
    return True if table and case.pair.links[0].flax.kind == "kernel" and not _window(case.pair) else None


def _says_more(case: Case) -> bool | None:
    """One name says something that the other lacks. `self` tells something only beside a cross attention, and the two
    exclude each other. An embedding is one of tokens unless its name says more (a convolution makes one of patches).
    Number 1 may be the first. Outside of blocks, a word for the part around the module (attn, out) does not count."""
    left, right = case.more
    plain = _plain_words(case)
    return True if any(case.lex.weight(word) >= UNKNOWN for word in (left ^ right) - plain) else None


def _plain_words(case: Case) -> frozenset[str]:
    """The words that say no more than the other name, beside this pair's other words, numbers and shapes."""
    left, right = case.more
    plain = {"self"}
    if "embed" in left & right:
        plain.add("patch" if _window(case.pair) else "tok")
    if case.somewhere:
        plain |= {"in", "out"}
    if any(number in (0, 1) for number in case.numbers):
        plain |= {"first", "stem"}
    if case.scope.root:
        tells = {"attn", "mlp"} if case.both_norms else set[str]() if case.own[0] & case.own[1] else _ENDS
        plain |= case.lex.some - ((case.own[0] | case.own[1]) & tells)
    return frozenset(plain)


_ENDS = {"in", "out", "input", "output"}


def _in_other_part(case: Case) -> bool | None:
    """One name has a part of the model that the other side has too, and the other module does not stand in it. The only
    head need not say whose it is."""
    left, right = case.more
    towers = {"enc", "dec"} if "head" in left & right else set[str]()
    common, places = case.scope.common, case.scope.places
    only = case.beside[0] - common - case.b.concepts - towers, case.beside[1] - common - case.a.concepts - towers
    return any(case.lex.weight(word) >= 0.5 for word in (only[0] & places[1]) | (only[1] & places[0]))


_VAGUE: tuple[Callable[[Case], bool | None], ...] = (
    _in_other_twin,
    _shares_own_word,
    _number_for_a_word,
    _norms_of_two_places,
    _layers_of_two_kinds,
    _says_more,
    _in_other_part,
)

JUDGEMENTS: tuple[tuple[str, frozenset[Route], Callable[[Case], str | None]], ...] = (
    ("exclusive words", EVERY, _exclusive_words),
    ("other place in a count", EVERY, _other_place),
    ("unnamed transposed convolution", EVERY, _unnamed_deconvolution),
    ("stray parameter", EVERY, _stray_parameter),
    ("each says more", BY_NAME, _each_says_more),
    ("in a block", BY_NAME, _in_a_block),
    ("Linear or convolution", BY_NAME - {"rest"}, _linear_or_convolution),
    ("vague", frozenset(("contest", "names", "alone")), _vague),
    ("no backing", frozenset(("contest", "names")), _no_backing),
    ("last numbers", frozenset(("contest",)), _last_numbers),
    ("counts", frozenset(("alone",)), _counts),
    ("other number", frozenset(("rest",)), _other_number),
    ("last numbers of one count", frozenset(("names",)), _last_numbers_of_one_count),
    ("nothing shared", frozenset(("alone",)), _nothing_shared_at_root),
    ("two places", frozenset(("stream",)), _two_places),
    ("counted twice", frozenset(("numbers",)), _counted_twice),
    ("unmatched word", frozenset(("rest",)), _unmatched_word),
)
"""(name, the routes that it bars, the judgement). The text of a finding that is not empty is shown with a candidate."""


# ---------------------------------------------------------------- what judgements share


_ANY_HEAD = frozenset(("linear", "proj", "layer", "stage", "model", "list"))
"""Names that the last matrix of a model may have instead of `head`."""
_COUNTED_CALL = re.compile(r"[A-Z][A-Za-z0-9]*_\d+")


def _any_head(case: Case) -> bool:
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
    path = next(iter(main_column(module).paths.values()))[0]
    return not any(_COUNTED_CALL.fullmatch(part) for part in re.split(r"[./]", path))


def _counts_differ(case: Case, ranked: bool = True) -> bool:
    """True if both names count one thing and their places differ. ranked: places among siblings count, too."""
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
            if ranked and rank != place:
                return True
        elif number != other and {number, other} != {0, 1}:
            return True
    return False


def _only_window(pair: Pair) -> bool:
    """True if the weight fits only as a window of length 1."""
    return any({label for _, label in link.labels} == {"conv 1x1"} for link in pair.links)


def _window(pair: Pair) -> bool:
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


def _place_of(number: int, ranks: Ranks) -> frozenset[str]:
    """What the number says about the place in the block: the first of several comes before, the last after."""
    first, last = number == 0, number == 2
    for _, rank, count in ranks[-1:]:
        first, last = rank == 0, rank == count - 1
    return frozenset(("pre",) if first else ("post",) if last else ())


def _half_of(number: int, ranks: Ranks) -> frozenset[str]:
    """What the number says about the two matrices of the feed-forward part: the first goes up, the second down."""
    first, last = number in (0, 1), number in (1, 2)
    for _, rank, count in ranks[-1:]:
        first, last = rank == 0, rank == count - 1
    return frozenset((("up", "in", "mlp") if first else ()) + (("down", "out", "mlp") if last else ()))


def _one_word_apart(a: Name, b: Name) -> bool:
    """True if the names differ in one word: two parts of one naming scheme (v_proj and q_proj), not one part with two
    names."""
    left, right = _words(a.raw), _words(b.raw)
    return 1 < len(left) == len(right) and sum(x != y for x, y in zip(left, right, strict=True)) == 1


def _words(tokens: Sequence[Token] | Sequence[object]) -> list[str]:
    return [token for token in tokens if isinstance(token, str)]


def _numbers_differ(a: Name, b: Name) -> bool:
    """True if both names end in a number and the numbers differ: 1 and 2, or 1 and 0 if no sibling shows the start."""
    last, other = a.raw[-1:], b.raw[-1:]
    return bool(last and other) and isinstance(last[0], int) and isinstance(other[0], int) and last != other
