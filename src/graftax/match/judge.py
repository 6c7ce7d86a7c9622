"""Names as evidence for a pair: how alike they are, what they share, and what forbids the pair."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from graftax.match.names import UNKNOWN, Lexicon, Name, concepts, contradicts, name_of, strip_common
from graftax.match.pairs import Pair, Scope
from graftax.match.places import counted_places, own_words
from graftax.match.sides import Column, Module, Token
from graftax.tree import split_words

Ranks = tuple[tuple[str, int, int], ...]
"""The numbers of a name as (what is numbered, rank, how many)."""
_TOWERS = frozenset(("enc", "dec", "vision", "text", "audio"))
_PLAIN = frozenset(("norm", "layer", "stage", "model", "list", "weight", "scale"))


def name_final_norm(scope: Scope) -> None:
    """Name the norm outside of the blocks the final norm, if it is the only one there and its name says nothing but its
    tower."""
    for modules, torch in ((scope.torch, True), (scope.flax, False)):
        cache = scope.torch_names if torch else scope.flax_names
        bare: defaultdict[frozenset[str], list[Name]] = defaultdict(list)
        for module in modules:
            said = cache[id(module)].concepts - scope.common - _PLAIN
            if "norm" in cache[id(module)].concepts and said <= _TOWERS and not _ends_in_number(module):
                bare[said].append(cache[id(module)])
        alone = {id(names[0]) for names in bare.values() if len(names) == 1}
        for key, name in list(cache.items()):
            if id(name) in alone:
                cache[key] = Name(name.concepts | {"final"}, name.last, name.raw)


def _ends_in_number(module: Module) -> bool:
    return any(isinstance(token, int) for token in module.tokens)


def learn_common(scope: Scope) -> None:
    names_t = [scope.name(m, True).concepts for m in scope.torch]
    names_f = [scope.name(m, False).concepts for m in scope.flax]
    scope.common = strip_common(names_t) | strip_common(names_f) | scope.wrappers
    counts = [Counter(concept for name in names for concept in name) for names in (names_t, names_f)]
    scope.around = frozenset(c for c, n in counts[0].items() if n >= _AROUND and counts[1][c] >= _AROUND)


def learn_places(scope: Scope) -> None:
    """Learn what each module's name says about itself alone, and what it says about its place."""
    own_t, around_t = own_words(scope.torch, scope.torch_names, scope.lex)
    own_f, around_f = own_words(scope.flax, scope.flax_names, scope.lex)
    scope.own = {**own_t, **own_f}
    scope.twins = _twins(scope.torch, own_t) | _twins(scope.flax, own_f)
    scope.beside = {**around_t, **around_f}
    norms = [
        [cache[id(module)].concepts for module in modules if "norm" in cache[id(module)].concepts]
        for modules, cache in ((scope.torch, scope.torch_names), (scope.flax, scope.flax_names))
    ]
    scope.norms = frozenset(word for found in norms if found for word in frozenset[str].intersection(*found))
    scope.places = tuple(frozenset[str]().union(*found.values()) for found in (around_t, around_f))
    scope.counted = (
        counted_places(scope.torch, scope.lex),
        counted_places(scope.flax, scope.lex),
    )


def _twins(modules: Sequence[Module], own: dict[int, frozenset[str]]) -> frozenset[int]:
    """The modules in one of several places that hold modules of the same name: two towers, two parts."""
    heads: defaultdict[tuple[object, ...], set[tuple[Token, ...]]] = defaultdict(set)
    for module in modules:
        numbers = tuple(token for token in module.tokens[module.own :] if isinstance(token, int))
        heads[(own[id(module)], numbers)].add(module.tokens[: module.own])
    places = {head for found in heads.values() if len(found) > 1 for head in found}
    return frozenset(id(module) for module in modules if module.tokens[: module.own] in places)


_AROUND = 4  # if this many modules of each side hold a word, it names the part around them and not one module


_MAIN = ("weight", "value", "v", "bias", "mean", "var", "g")


def main_column(module: Module) -> Column:
    for role in _MAIN:
        if role in module.roles:
            return module.roles[role]
    return next(iter(module.roles.values()))


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
        counts: defaultdict[Token, int] = defaultdict(int)
        for path in paths:
            if path:  # the root itself has no words
                counts[path[0]] += 1
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
        for i, token in enumerate(module.tokens):
            if isinstance(token, int):
                mark = numbered_as(module.tokens, i, scope.lex)
                groups[mark].add(token)
                places.setdefault(id(module), []).append((mark, token))
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


def judge(pair: Pair, scope: Scope, ranks_t: Ranks, ranks_f: Ranks) -> None:
    """Score the names of the pair, and record what forbids it. A tied tensor is judged by the best of its names."""
    flax = scope.name(pair.flax, False)
    _judge(pair, scope, scope.name(pair.torch, True), flax, ranks_t, ranks_f)
    for tokens in pair.torch.alias:
        other = Pair(pair.torch, pair.flax, pair.links, pair.whole)
        _judge(other, scope, name_of(tokens, 0, scope.lex), flax, (), ranks_f, aliased=True)
        if (not other.blocked, not other.vague, other.score) > (not pair.blocked, not pair.vague, pair.score):
            pair.score, pair.shared, pair.telling = other.score, other.shared, other.telling
            pair.any_shared, pair.blocked, pair.soft = other.any_shared, other.blocked, other.soft
            pair.vague, pair.loose, pair.head, pair.equal = other.vague, other.loose, other.head, other.equal


def _judge(
    pair: Pair,
    scope: Scope,
    a: Name,
    b: Name,
    ranks_t: Ranks,
    ranks_f: Ranks,
    aliased: bool = False,
) -> None:
    lex, common = scope.lex, scope.common
    own_a = a.concepts if aliased else scope.own[id(pair.torch)]
    own_b = scope.own[id(pair.flax)]
    shared = telling = 0.0
    only_a = only_b = loose_a = loose_b = 0.0
    said: list[tuple[float, str]] = []
    own = 0  # telling words that both have and few other modules have
    near = 0.0  # words such as attn, in, out that both have
    for concept in a.concepts:
        weight = 0.02 if concept in common else lex.weight(concept)
        if concept in b.concepts:
            shared += weight
            said.append((weight, concept))
            telling += weight if weight >= 1 and (concept in own_a or concept in own_b) else 0
            own += weight >= 1 and concept not in scope.around
            near += weight if weight == 0.5 else 0
        else:
            only_a += max(weight, 1.0) if weight == UNKNOWN else weight
            loose_a += weight if weight >= UNKNOWN and weight != 0.5 else 0
    for concept in b.concepts:
        if concept not in a.concepts:
            weight = 0.02 if concept in common else lex.weight(concept)
            only_b += max(weight, 1.0) if weight == UNKNOWN else weight
            loose_b += weight if weight >= UNKNOWN and weight != 0.5 else 0
    matched = False
    blocked = contradicts(a.concepts - common, b.concepts - common, lex)
    for what, rank, count in ranks_t:
        for other, place, total in ranks_f:
            if what == other and count == total:
                if rank == place:
                    matched = True
                    shared += 0.6
                    said.append((0.6, f"number {rank + 1} of {count}{f' {what}s' if what else ''}"))
                else:
                    blocked = blocked or f"they are {what or 'numbers'} {rank + 1} and {place + 1} of {count}"
    pair.head = (
        b.concepts <= _ANY_HEAD and "head" in concepts(a.raw, lex) and not _chosen_number(pair.flax, b, a)
    ) or (a.concepts <= _ANY_HEAD and "head" in concepts(b.raw, lex) and not _chosen_number(pair.torch, a, b))
    pair.loose = loose_a > 0 or loose_b > 0
    pair.lone = not matched and _numbers_differ(a, b)
    pair.counts = not matched and _counts_differ(pair, (ranks_t, ranks_f), scope)
    if "norm" in a.concepts & b.concepts:
        pair.astray = _astray(own_a - b.concepts, own_b - a.concepts)
    else:  # outside of a feed-forward part, the matrix that goes down may come first
        beside = scope.beside.get(id(pair.torch), frozenset()) | scope.beside.get(id(pair.flax), frozenset())
        pair.astray = any(lex.weight(word) >= 1 and word != "expert" for word in beside - common)
    pair.score = shared / (shared + 0.5 * (only_a + only_b) + 0.1)
    counted = any(isinstance(token, int) for token in a.raw) and (ranks_t or ranks_f or not scope.numbers)
    pair.equal = a.raw == b.raw and (matched or not counted)
    pair.score += 0.3 if pair.equal else 0.0
    pair.telling, pair.any_shared = telling, shared
    pair.vague = a.raw != b.raw and _vague(pair, a, b, own_a, own_b, scope, (ranks_t, ranks_f))
    if not blocked and loose_a and loose_b and ((not own and near < 0.9) or _one_word_apart(a, b)):
        pair.soft = True
        blocked = "each name has a word that the other lacks"
    if not blocked and a.raw != b.raw and ("conv" in a.concepts) != ("conv" in b.concepts) and _only_window(pair):
        pair.soft = True
        blocked = "one is a Linear and the other a convolution"
    if not _deconv_named(pair, a.concepts | b.concepts):
        blocked = "only a transposed convolution fits, and neither name says that it is one"
        pair.remote = True
    if (not blocked or pair.soft) and _stray(pair, a, b, lex):
        pair.soft = False  # an order does not prove that a parameter with its own name is the weight of a norm
        blocked = "one is a bare parameter, and its name has a word that the other lacks"
    pair.blocked = blocked
    said.sort(reverse=True)
    pair.shared = tuple(text for _, text in said[:4])
    if "final" in pair.shared and not all("final" in concepts(name.raw, lex) for name in (a, b)):
        # `name_final_norm` added the word: no name has it.
        alone = "norm (the only one outside the blocks)"
        pair.shared = (*(text for text in pair.shared if text not in ("final", "norm")), alone)


_ANY_HEAD = frozenset(("linear", "proj", "layer", "stage", "model", "list"))
"""Names that the last matrix of a model may have instead of `head`."""
_COUNTED_CALL = re.compile(r"[A-Z][A-Za-z0-9]*_\d+")


def _chosen_number(module: Module, name: Name, other: Name) -> bool:
    """True if the name ends in a number that its author chose: if there is an fc2, fc1 is no head."""
    if not name.raw or not isinstance(name.raw[-1], int) or other.raw[-1:] == name.raw[-1:]:
        return False
    if module.tokens[module.own :] == name.raw[-1:]:
        return False
    path = next(iter(main_column(module).paths.values()))[0]
    return not any(_COUNTED_CALL.fullmatch(part) for part in re.split(r"[./]", path))


def _counts_differ(pair: Pair, ranks: tuple[Ranks, Ranks], scope: Scope) -> bool:
    """True if both names count the same thing and their places in the count differ. If no sibling shows where the count
    starts, 0 and 1 may be the same place."""
    counted: list[dict[str, tuple[int, int | None]]] = []
    for module, known in zip((pair.torch, pair.flax), ranks, strict=True):
        places = {what: rank for what, rank, _ in known}
        numbers = {
            str(numbered_as(module.tokens, i, scope.lex)[-1]): token
            for i, token in enumerate(module.tokens)
            if isinstance(token, int)
        }
        counted.append({what: (number, places.get(what)) for what, number in numbers.items()})
    for what in counted[0].keys() & counted[1].keys():
        (number, rank), (other, place) = counted[0][what], counted[1][what]
        if rank is not None and place is not None:
            if rank != place:
                return True
        elif number != other and {number, other} != {0, 1}:
            return True
    return False


_ELSEWHERE = frozenset(("q", "k", "qkv", "conv", "embed", "patch"))
_EARLY, _LATE = frozenset(("attn", "pre", "in", "pre~attn", "pre~self", "first")), frozenset(("out", "final"))


def _astray(only_a: frozenset[str], only_b: frozenset[str]) -> bool:
    """True if one name says a place off the residual stream (the norm of the queries), or one says early and the other
    last."""
    if only_a & _ELSEWHERE or only_b & _ELSEWHERE:
        return True
    return bool((only_a & _EARLY and only_b & _LATE) or (only_b & _EARLY and only_a & _LATE))


def _only_window(pair: Pair) -> bool:
    """True if the weight fits only as a window of length 1."""
    return any({label for _, label in link.labels} == {"conv 1x1"} for link in pair.links)


_LISTS = frozenset(("layer", "stage", "model", "list"))
_COUNTED = frozenset(("stem", "first", "norm", "linear", "conv", "layer", "stage", "model", "list"))
_OUTSIDE = _COUNTED | {"final", "head"}
"""What a number in a list may stand for outside of the blocks; for numbers inside them see `_INSIDE`."""
_INSIDE = _COUNTED | {"shortcut"}
_PARTS = frozenset(("expert", "patch", "embed", "deconv", "pool", "proj"))
_KINDS = frozenset(("conv", "linear", "embed", "patch"))
_ENDS = {"in", "out", "input", "output"}
_MATRIX = frozenset(("conv", "linear", "embed"))


def _vague(
    pair: Pair,
    a: Name,
    b: Name,
    own_a: frozenset[str],
    own_b: frozenset[str],
    scope: Scope,
    ranks: tuple[Ranks, Ranks],
) -> bool:
    """True if the names leave the pair vague. Then it proves nothing that no other pair fits.

    The names share no telling word of their own, and one of them says something that the other lacks, or one module
    stands in a part that the other side has too and the other module does not stand in it. `head` does not tell one
    head from another. A number in place of a name (`Conv_2`) may stand for any known word. An embedding is one of
    tokens unless its name says more (a convolution makes one of patches). Number 1 may be the first. Outside of blocks,
    a word for the part around the module (attn, out) does not count as more.
    """
    lex = scope.lex
    if id(pair.torch) in scope.twins and id(pair.flax) in scope.twins:
        said = [scope.beside.get(id(module), frozenset()) - scope.common for module in (pair.torch, pair.flax)]
        places = [
            {word for word in mine if lex.weight(word) >= 1} for mine in (said[0] - b.concepts, said[1] - a.concepts)
        ]
        if places[0] and places[1] and not any(lex.weight(word) >= 1 for word in said[0] & said[1]):
            return True  # both sides have several such parts, and the names of these differ
    around = scope.beside.get(id(pair.torch), frozenset()), scope.beside.get(id(pair.flax), frozenset())
    left, right = a.concepts - scope.common, b.concepts - scope.common
    if any(lex.weight(word) >= 1 for word in (left & right & (own_a | own_b)) - {"head"}):
        return False
    if any(lex.weight(word) == UNKNOWN and len(word) > 1 for word in own_a & own_b):
        return False
    numbers = [name.raw[-1] if name.raw and isinstance(name.raw[-1], int) else None for name in (a, b)]
    is_norm = "norm" in left & right
    for side, number, said, plain, more in (
        (0, numbers[0], left - right, _LISTS, right - left),
        (1, numbers[1], right - left, lex.little, left - right),
    ):
        other = pair.flax if side == 0 else pair.torch
        if number is None or not said <= plain:
            continue
        # A number stands for few words only if the other side counts too, or for norms (a place in the block).
        few = is_norm or other.tokens[: other.own] in scope.counted[1 - side]
        few_words = (_OUTSIDE if scope.root else _INSIDE) | (_place_of(number, ranks[side]) if is_norm else _NOTHING)
        if more <= few_words or (not few and more <= few_words | _PARTS | _half_of(number, ranks[side])):
            return False
        if more and ranks[side]:
            return True  # one is counted among several, and the other is not
    somewhere = any(lex.weight(word) >= 1 for word in (left & right) - {"head"})
    if somewhere:  # both stand in one part of the model, so other words for places do not matter
        left, right = left & (own_a | right), right & (own_b | left)
    left, right = left - _explained(left, right, lex), right - _explained(right, left, lex)
    # `self` tells something only beside a cross attention, and the two exclude each other.
    plain = {"self"}
    if "embed" in left & right:
        plain.add("patch" if any(len(shape) > 2 for shape in main_column(pair.torch).shapes.values()) else "tok")
    if somewhere:
        plain |= {"in", "out"}
    if any(number in (0, 1) for number in numbers):
        plain |= {"first", "stem"}
    if is_norm and (left - right) & own_a & (_KINDS | lex.some) and (right - left) & own_b & (_KINDS | lex.some):
        return True  # they are norms of two places
    if is_norm and (((left - right) & own_a) | ((right - left) & own_b)) & (_KINDS - scope.norms):
        return True
    if not is_norm and (left - right) & own_a & _MATRIX and (right - left) & own_b & _MATRIX:
        return True  # they are layers of two kinds
    if not is_norm and "embed" in (left & own_a) ^ (right & own_b) and pair.links[0].flax.kind == "kernel":
        return True  # one is a table and the other a matrix
    if scope.root:
        tells = {"attn", "mlp"} if is_norm else set[str]() if own_a & own_b else _ENDS
        plain |= lex.some - ((own_a | own_b) & tells)
    if any(lex.weight(word) >= UNKNOWN for word in (left ^ right) - plain):
        return True
    towers = {"enc", "dec"} if "head" in left & right else set[str]()  # the only head need not say whose it is
    only_a, only_b = around[0] - scope.common - b.concepts - towers, around[1] - scope.common - a.concepts - towers
    return _elsewhere(only_a, scope.places[1], lex) or _elsewhere(only_b, scope.places[0], lex)


def _explained(said: frozenset[str], other: frozenset[str], lex: Lexicon) -> frozenset[str]:
    """The words of `said` that say more than `other`. `out` is another word for `o` and for `down` if nothing says
    which, so the words that those imply do not count as more."""
    if "out" not in said & other:
        return frozenset()
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


_NOTHING = frozenset[str]()


def _elsewhere(said: frozenset[str], places: frozenset[str], lex: Lexicon) -> bool:
    """True if one name has a part of the model that the other side has too, and the other module does not stand in
    it."""
    return any(lex.weight(word) >= 0.5 for word in said & places)


def _one_word_apart(a: Name, b: Name) -> bool:
    """True if the names differ in one word: two parts of one naming scheme (v_proj and q_proj), not one part with two
    names."""
    left = [token for token in a.raw if isinstance(token, str)]
    right = [token for token in b.raw if isinstance(token, str)]
    return 1 < len(left) == len(right) and sum(x != y for x, y in zip(left, right, strict=True)) == 1


def _numbers_differ(a: Name, b: Name) -> bool:
    """True if both names end in a number and the numbers differ: 1 and 2, or 1 and 0 if no sibling shows the start."""
    last, other = a.raw[-1:], b.raw[-1:]
    return bool(last and other) and isinstance(last[0], int) and isinstance(other[0], int) and last != other


def _stray(pair: Pair, a: Name, b: Name, lex: Lexicon) -> bool:
    """True for a bare parameter against the weight of a module, if the parameter's name has a word that the module's
    lacks."""
    if pair.torch.raw == pair.flax.raw:
        return False
    raw, mine, other = (pair.torch, a, b) if pair.torch.raw else (pair.flax, b, a)
    own = concepts(split_words(main_column(raw).leaf), lex)
    return any(lex.weight(c) >= 1 and c in mine.concepts and c not in other.concepts for c in own)


_DECONV = frozenset(("deconv", "transpose", "transposed", "up", "upsample", "dec", "ups", "gen", "generator"))


def _deconv_named(pair: Pair, names: frozenset[str]) -> bool:
    for link in pair.links:
        if {label for _, label in link.labels} == {"conv_transpose default"}:
            return bool(names & _DECONV) or any(other.torch.role == "bias" for other in pair.links)
    return True
