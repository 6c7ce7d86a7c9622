"""The evidence of names for one pair: a table of named judgements.

A judgement looks at one pair and says nothing, or what speaks against it: a `Finding` bars some of the ways to take the
pair. A pair that is barred still competes, so that it can make a choice unclear, but it is not taken that way. The
score, how alike the names are, only orders candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from graftax.layers.patterns import FLIPPED
from graftax.match.case import Case, any_head, compare, counts_calls, only_window, shared
from graftax.match.names import UNKNOWN, Name, Tokens, concepts, concepts_of, contradicts, name_of
from graftax.match.pairs import BY_NAME, EVERY, LIVE, Finding, Pair, Route, Scope
from graftax.match.scope_names import LAST, Ranks, main_column
from graftax.match.vague import layers_of_two_kinds, norms_of_two_places, plain_words, vague
from graftax.tree import split_words

_NOTHING = frozenset[str]()


def judge(
    pair: Pair,
    scope: Scope,
    ranks_t: Ranks,
    ranks_f: Ranks,
    parts: tuple[Tokens, Tokens] = ((), ()),
    means: Mapping[str, str] | None = None,
) -> None:
    """Score the names of the pair, and record what speaks against it. A tied tensor is judged by the best of its
    names. `parts`: the paths of two paired parts that hold the modules; the words of these mean the same; `means`:
    words of the torch name -> the words of the Flax name that mean the same."""
    torch, flax = scope.name(pair.torch), scope.name(pair.flax)
    own = scope.own[id(pair.torch)], scope.own[id(pair.flax)]
    rest = [m.tokens[len(part) :] for m, part in zip((pair.torch, pair.flax), parts, strict=True)]
    said = [(a, b) for a, b in (means or {}).items() if a in rest[0] and b in rest[1]]
    if said or parts != ((), ()):
        words = [{a for a, _ in said}, {b for _, b in said}]
        part = [concepts_of((*p, 0, *w), scope.lex) for p, w in zip(parts, words, strict=True)]
        alone = [concepts_of([t for t in r if t not in w], scope.lex) for r, w in zip(rest, words, strict=True)]
        told = part[0] - part[1] - alone[0], part[1] - part[0] - alone[1]
        turned = dict(said)
        torch = Name(torch.concepts - told[0], torch.last, tuple(turned.get(str(t), t) for t in rest[0]))
        flax = Name(flax.concepts - told[1], flax.last, tuple(rest[1]))
        own = own[0] - told[0], own[1] - told[1]
        _judge(Case(pair, scope, torch, flax, (ranks_t, ranks_f), own, told))
        return
    _judge(Case(pair, scope, torch, flax, (ranks_t, ranks_f), own))
    if not pair.torch.alias:
        return
    for tokens in pair.torch.alias:
        other = Pair(pair.torch, pair.flax, pair.links, pair.whole)
        name = name_of(tokens, 0, scope.lex)
        _judge(Case(other, scope, name, flax, ((), ranks_f), (name.concepts, own[1])))
        if _rank(other) > _rank(pair):
            pair.score, pair.shared, pair.equal = other.score, other.shared, other.equal
            pair.findings = other.findings


def _rank(pair: Pair) -> tuple[bool, bool, float]:
    return not pair.blocked, not pair.found("vague"), pair.score


def _judge(case: Case) -> None:
    compare(case)
    pair = case.pair
    found: list[Finding] = []
    for name, bars, judgement in JUDGEMENTS:
        text = judgement(case)
        if text is not None:
            found.append(Finding(name, bars, text))
    pair.findings = (*found, *(finding for finding in pair.findings if finding.judgement == LIVE))
    pair.shared = shared(case)


# ---------------------------------------------------------------- judgements: None, or what speaks against the pair


def _each_says_more(case: Case) -> str | None:
    if all(case.loose) and ((not case.particular and case.near < 0.9) or _one_word_apart(case.a, case.b)):
        return "each name has a word that the other lacks"
    return None


def _linear_or_convolution(case: Case) -> str | None:
    if case.raw_differ and ("conv" in case.a.concepts) != ("conv" in case.b.concepts) and only_window(case.pair):
        return "one is a Linear and the other a convolution"
    return None


def _norm_by_one_name(case: Case) -> str | None:
    said = "norm" in case.a.concepts, "norm" in case.b.concepts
    return "only one name says that it is a norm" if case.raw_differ and said[0] != said[1] else None


_DECONV = frozenset(("deconv", "transpose", "transposed", "up", "upsample", "dec", "ups", "gen", "generator"))


def _unnamed_deconvolution(case: Case) -> str | None:
    if not _only_flipped(case.pair):
        return None
    if (case.a.concepts | case.b.concepts) & _DECONV or any(link.torch.role == "bias" for link in case.pair.links):
        return None
    return "only a transposed convolution fits, and neither name says that it is one"


def _only_flipped(pair: Pair) -> bool:
    """True if a leaf fits only as a transposed convolution with a flipped kernel."""
    return any({label for _, label in link.labels} == {FLIPPED} for link in pair.links)


def _untransposed_call(case: Case) -> str | None:
    """The weight of a Linear would be a kernel as it stands, and a number of calls is what pairs them: in
    `Dense(d)(relu(Dense(h)(x)))` the last layer is called Dense_0, and it has the shape of the first one's weight."""
    if counts_calls(case.pair.torch) == counts_calls(case.pair.flax):
        return None
    linear = (link for link in case.pair.links if link.torch.role == "weight" and link.flax.kind == "kernel")
    if all({label for _, label in link.labels} != {"identity"} for link in linear):
        return None
    return "its weight would stay as torch has it, and the kernel of a Linear is transposed"


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
    """Both names end in a number. Numbers that differ may count the same thing, from 0 and from 1, or different things;
    where shapes show numbers out of order, equal ones say nothing either."""
    last, other = case.numbers
    told = last == other and case.scope.numbers
    return None if case.same_place or last is None or other is None or told else ""


def _counts(case: Case) -> str | None:
    """Both names count the same thing, and their places differ. If no sibling shows where the count starts, 0 and 1
    may be the same place."""
    return "" if case.counted_apart else None


def _other_number(case: Case) -> str | None:
    """As `counts`, for numbers that no siblings rank. Of numbers with siblings, the order of all pairs decides."""
    return "" if case.numbered_apart else None


def _last_numbers_of_one_count(case: Case) -> str | None:
    return "" if _last_numbers(case) is not None and _counts(case) is not None else None


def _no_backing(case: Case) -> str | None:
    """The names share no telling word, and not only words for the kind either."""
    alike = case.pair.whole or case.pair.equal  # a bias on one side only makes equal names no others
    if case.telling or (case.said and alike and not any(case.loose)):
        return None
    return ""


def _nothing_shared_at_root(case: Case) -> str | None:
    return "" if case.scope.root and not case.said and any(case.loose) and not any_head(case) else None


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
    for the part around the module does not count, and any word that says that it is the last means the last norm. A
    name that only counts calls (`Dense_0`) lacks every word, so it may stand for any word of the table."""
    if not case.raw_differ or any_head(case):
        return None
    if norms_of_two_places(case) or (layers_of_two_kinds(case) and not only_window(case.pair)):
        return ""
    left, right = case.more
    last = LAST if case.both_norms and case.scope.root and left & LAST and right & LAST else _NOTHING
    only = left - right - plain_words(case) - last, right - left - plain_words(case) - last
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


_IS_HEAD = frozenset(("head", "out"))


def _one_word_apart(a: Name, b: Name) -> bool:
    """True if the names differ in one word: two parts of one naming scheme (v_proj and q_proj), not one part with two
    names."""
    left, right = ([token for token in name.raw if isinstance(token, str)] for name in (a, b))
    return 1 < len(left) == len(right) and sum(x != y for x, y in zip(left, right, strict=True)) == 1


JUDGEMENTS: tuple[tuple[str, frozenset[Route], Callable[[Case], str | None]], ...] = (
    ("exclusive words", EVERY, lambda case: contradicts(case.left, case.right, case.lex) or None),
    ("other place in a count", EVERY, lambda case: case.apart or None),
    ("unnamed transposed convolution", EVERY, _unnamed_deconvolution),
    ("norm by one name", frozenset(("contest",)), _norm_by_one_name),
    ("untransposed call", EVERY, _untransposed_call),
    ("stray parameter", EVERY, _stray_parameter),
    ("each says more", BY_NAME - {"rest"}, _each_says_more),
    ("in a block", BY_NAME | frozenset[Route](("stream",)), _in_a_block),
    ("Linear or convolution", BY_NAME - {"rest"}, _linear_or_convolution),
    ("vague", frozenset(("contest", "names", "alone")), lambda case: "" if vague(case) else None),
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
