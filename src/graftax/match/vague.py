"""Names that leave a pair vague: then it proves nothing that no other pair fits.

The steps are asked one after the other: a pair is vague (True), it is not (False), or a step does not know (None).
"""

from __future__ import annotations

from collections.abc import Callable

from graftax.match.case import Case, any_head, is_window
from graftax.match.names import LITTLE, SOME, UNKNOWN
from graftax.match.scope_names import Ranks


def vague(case: Case) -> bool:
    """True if the names leave the pair vague: the first step that knows decides."""
    if not case.raw_differ or any_head(case):
        return False
    return next((found for step in _STEPS if (found := step(case)) is not None), False)


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
        (1, right - left, LITTLE, left - right),
    ):
        number = case.numbers[side]
        other = case.pair.flax if side == 0 else case.pair.torch
        if number is None or not said <= plain:
            continue
        words = _OUTSIDE if scope.root else _INSIDE
        if case.both_norms or other.tokens[: other.own] not in scope.counted[1 - side]:
            words = words | _places_of(number, case.ranks[side], case.both_norms)
        if more <= words:
            return False
        if more and case.ranks[side]:
            return True  # one is counted among several, and the other is not
    return None


_KINDS = frozenset(("conv", "linear", "embed", "patch"))
_MATRIX = frozenset(("conv", "linear", "embed"))


def norms_of_two_places(case: Case) -> bool | None:
    if not case.both_norms:
        return None
    more = case.more[0] - case.more[1], case.more[1] - case.more[0]
    own = more[0] & case.own[0], more[1] & case.own[1]
    kinds = _KINDS | SOME
    if own[0] & kinds and own[1] & kinds:
        return True
    return True if (own[0] | own[1]) & (_KINDS - case.scope.norms) else None


def layers_of_two_kinds(case: Case) -> bool | None:
    """One name says one kind of layer and the other another, and the shapes do not show the kind."""
    if case.both_norms:
        return None
    left, right = case.more
    if (left - right) & case.own[0] & _MATRIX and (right - left) & case.own[1] & _MATRIX and not is_window(case.pair):
        return True
    table = "embed" in (left & case.own[0]) ^ (right & case.own[1])
    return True if table and case.pair.links[0].flax.kind == "kernel" and not is_window(case.pair) else None


def _says_more(case: Case) -> bool | None:
    """One name says something that the other lacks. `self` tells something only beside a cross attention, and the two
    exclude each other. An embedding is one of tokens unless its name says more (a convolution makes one of patches).
    Number 1 may be the first. Outside of blocks, a word for the part around the module (attn, out) does not count."""
    left, right = case.more
    plain = plain_words(case)
    return True if any(case.lex.weight(word) >= UNKNOWN for word in (left ^ right) - plain) else None


def plain_words(case: Case) -> frozenset[str]:
    """The words that say no more than the other name, beside this pair's other words, numbers and shapes."""
    left, right = case.more
    plain = {"self"}
    if "embed" in left & right:
        plain.add("patch" if is_window(case.pair) else "tok")
    if case.somewhere:
        plain |= {"in", "out"}
    if any(number in (0, 1) for number in case.numbers):
        plain |= {"first", "stem"}
    if case.scope.root:
        tells = {"attn", "mlp"} if case.both_norms else set[str]() if case.own[0] & case.own[1] else _ENDS
        plain |= SOME - ((case.own[0] | case.own[1]) & tells)
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


def _places_of(number: int, ranks: Ranks, norm: bool) -> frozenset[str]:
    """What the number says about the place in the block, as its siblings show, if there are any: the first of several
    norms comes before, the last after. Of the two matrices of a feed-forward part, the first goes up, the second down;
    and a matrix may be any part."""
    first, last = (number == 0, number == 2) if norm else (number in (0, 1), number in (1, 2))
    for _, rank, count in ranks[-1:]:
        first, last = rank == 0, rank == count - 1
    if norm:
        return frozenset(("pre",) if first else ("post",) if last else ())
    return _PARTS.union(("up", "in", "mlp") if first else (), ("down", "out", "mlp") if last else ())


_STEPS: tuple[Callable[[Case], bool | None], ...] = (
    _shares_own_word,
    _number_for_a_word,
    norms_of_two_places,
    layers_of_two_kinds,
    _says_more,
    _in_other_part,
)
