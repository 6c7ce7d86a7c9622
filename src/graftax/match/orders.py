"""Order as evidence: numbered siblings, and norms along the residual stream. Only complete orders that agree count."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

from graftax.match.components import components
from graftax.match.names import Lexicon
from graftax.match.numbers import CALL, automatic
from graftax.match.pairs import Pair, Route, Scope
from graftax.match.scope_names import numbered_as
from graftax.match.sides import Module


def connected(pairs: list[Pair]) -> list[tuple[list[Module], list[Module], dict[tuple[int, int], Pair]]]:
    """Open pairs in connected groups: (torch modules, Flax modules, pairs by both ids)."""
    groups = components(pairs, lambda pair: (id(pair.torch), id(pair.flax)))
    return [
        (
            list({id(pair.torch): pair.torch for pair in group}.values()),
            list({id(pair.flax): pair.flax for pair in group}.values()),
            {(id(pair.torch), id(pair.flax)): pair for pair in group},
        )
        for group in groups
    ]


def in_order(open_: list[Pair], every: list[Pair], taken: list[Pair], scope: Scope, trusted: bool) -> list[Pair]:
    """Open pairs that a complete order on both sides settles. `every`: all pairs that fit; `taken`: pairs already
    taken, which must not contradict the order; `trusted`: nothing in this scope shows numbers out of order."""
    waiting = {id(pair) for pair in open_}
    known = {id(pair.torch): pair.flax for pair in taken}
    fitted = {id(module) for pair in every for module in (pair.torch, pair.flax)}
    short = {m.unnumbered for m in (*scope.torch, *scope.flax) if id(m) not in fitted}
    for pairs in (open_, every):
        out: list[Pair] = []
        for torch, flax, found in connected([pair for pair in pairs if pair.whole]):
            if len(torch) != len(flax) or len(torch) < 2:
                continue
            counts = not {torch[0].unnumbered, flax[0].unnumbered} & short
            for left, right, why in _orders(torch, flax, scope, trusted):
                if why == BY_NUMBER and not counts and _numbers_of(left) != _numbers_of(right):
                    continue  # one of the count has no partner, so the others need not be counted alike
                chosen = [found.get((id(a), id(b))) for a, b in zip(left, right, strict=True)]
                agreed = [
                    pair for pair in chosen if pair is not None and known.get(id(pair.torch), pair.flax) is pair.flax
                ]
                fresh = [pair for pair in agreed if id(pair) in waiting]
                route: Route = "stream" if why == ALONG_BLOCK else "numbers"
                if len(agreed) != len(left) or not fresh or not all(pair.open_to(route) for pair in fresh):
                    continue
                for pair in fresh:
                    pair.why = why
                out += fresh
                break
        if out:
            return out
    return []


def _orders(
    torch: list[Module], flax: list[Module], scope: Scope, trusted: bool
) -> list[tuple[list[Module], list[Module], str]]:
    out: list[tuple[list[Module], list[Module], str]] = []
    numbers = [_numbered(modules, scope.lex) if trusted else None for modules in (torch, flax)]
    if numbers[0] and numbers[1] and _one_thing(numbers[0][0], numbers[1][0], scope):
        out.append((numbers[0], numbers[1], BY_NUMBER))
    streams = [_stream(modules, scope) for modules in (torch, flax)]
    left, right = (stream or counted for stream, counted in zip(streams, numbers, strict=True))
    if left and right and any(streams):
        out.append((left, right, ALONG_BLOCK))
    return out


def complete_order(torch: list[Module], flax: list[Module], scope: Scope) -> list[tuple[Module, Module]]:
    """Modules that are all that is left of two parts, in the order of their numbers; of two modules, one side may say
    with words which comes first. [] if the names show no order."""
    ends: list[list[Module]] = []
    for modules in (torch, flax):
        found = _numbered(modules, scope.lex) or _first_and_last(modules, scope)
        if found is None:
            return []
        ends.append(found)
    return list(zip(*ends, strict=True)) if len(torch) == len(flax) else []


_FIRST, _LAST = frozenset(("in", "first", "hidden", "pre")), frozenset(("out", "final", "head", "post"))


def _first_and_last(modules: list[Module], scope: Scope) -> list[Module] | None:
    """Two modules, if the words of only one say that it comes first, and only those of the other that it comes last."""
    if len(modules) != 2:
        return None
    names = [scope.own[id(module)] | {scope.name(module).last} for module in modules]
    if any(said & {"up", "down"} for said in names):
        return None  # outside of a feed-forward part, the matrix that goes down may come first
    for first, last in ((0, 1), (1, 0)):
        if names[first] & _FIRST and names[last] & _LAST and not (names[first] & _LAST or names[last] & _FIRST):
            return [modules[first], modules[last]]
    return None


def in_step(pairs: Iterable[Pair], beside: Iterable[Pair] = ()) -> bool:
    """True if the numbers of pairs whose names differ in nothing else run in one order on both sides. `beside`: more
    pairs, which matter only to pairs of their names."""
    groups: defaultdict[tuple[object, object], list[tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(list)
    for known, found in ((False, pairs), (True, beside)):
        for pair in found:
            mark = pair.torch.unnumbered, pair.flax.unnumbered
            if not known or mark in groups:
                groups[mark].append((tuple(pair.torch.numbers.values()), tuple(pair.flax.numbers.values())))
    return all(a[1] <= b[1] for found in groups.values() for a, b in pairwise(sorted(found)))


def _numbered(modules: list[Module], lex: Lexicon) -> list[Module] | None:
    """The modules in the order of their numbers, if they differ in nothing else."""
    if len({_meant(module, lex) for module in modules}) != 1:
        return None
    numbers = _numbers_of(modules)
    if len(set(numbers)) != len(numbers):
        return None
    return [module for _, module in sorted(zip(numbers, modules, strict=True), key=lambda item: item[0])]


def _numbers_of(modules: list[Module]) -> list[tuple[int, ...]]:
    return [tuple(module.numbers.values()) for module in modules]


def _meant(module: Module, lex: Lexicon) -> tuple[object, ...]:
    """The path without its numbers, with the word before the last number replaced by its meaning."""
    at = max(module.numbers, default=None)
    if at is None:
        return module.tokens
    head = (0 if isinstance(token, int) else token for token in numbered_as(module.tokens, at, lex))
    return (*head, *module.unnumbered[at:])


def _one_thing(torch: Module, flax: Module, scope: Scope) -> bool:
    """True if the names share a word, or neither says anything but the kind of layer."""
    a, b = scope.name(torch).concepts - scope.common, scope.name(flax).concepts - scope.common
    if a & b:
        return True
    return all(scope.lex.weight(concept) < 0.5 for concept in a | b)


_STAGES: tuple[tuple[str, float], ...] = (
    ("pre~cross", 1.8), ("post~cross", 2.4), ("cross", 2.1),
    ("pre~attn", 0.9), ("pre~self", 0.9), ("post~attn", 1.5), ("post~self", 1.5),
    ("pre~mlp", 2.6), ("post~mlp", 3.4), ("attn", 1.2), ("mlp", 3.0),
    ("in", 0.5), ("pre", 0.6), ("final", 4.0), ("post", 3.6), ("out", 3.8),
)  # fmt: skip
"""A norm's place along a block, by the first of these concepts in its name."""
_PAIR = (("up", 0.0), ("down", 1.0))


def _stream(modules: list[Module], scope: Scope) -> list[Module] | None:
    """Norms along the residual stream, or the two Linears of a feed-forward part, in order, if every name says its
    place."""
    names = [scope.name(module).concepts for module in modules]
    if not scope.lex.synonyms:
        return None
    if all("norm" in name for name in names):
        table = _STAGES
    elif len(modules) == 2:
        table = _PAIR
    else:
        return None
    places: list[float] = []
    for name in names:
        place = next((at for concept, at in table if concept in name), None)
        if place is None and not (len(modules) == 2 and table is _STAGES):
            return None
        places.append(-1.0 if place is None else place)
    if -1.0 in places:
        return None if scope.root else _beside_ordinal(modules, places, names)
    if len(set(places)) != len(places):
        return None
    return [module for _, module in sorted(zip(places, modules, strict=True), key=lambda item: item[0])]


_BARE_NORM = frozenset(("norm", "layer"))


def _beside_ordinal(modules: list[Module], places: list[float], names: list[frozenset[str]]) -> list[Module] | None:
    """The order of two norms if one says that it comes first or last, and the other has only a number, or nothing: it
    is the other end."""
    said = next((i for i, place in enumerate(places) if place >= 0), None)
    if said is None:
        return None
    other = modules[1 - said]
    number = other.tokens[-1] if other.tokens else None
    if not isinstance(number, int) and not names[1 - said] <= _BARE_NORM:
        return None
    if places[said] <= 1.2 and number != 0:
        return [modules[said], other]
    if places[said] >= 2.6 and number != 2:
        return [other, modules[said]]
    return None


def out_of_order(pairs: list[Pair]) -> bool:
    """True if pairs that only shapes force run against the order of their numbers: then the numbers do not count the
    same thing on both sides."""
    rows: defaultdict[int, int] = defaultdict(int)
    cols: defaultdict[int, int] = defaultdict(int)
    pairs = [pair for pair in pairs if not pair.found("unnamed transposed convolution")]
    for pair in pairs:
        rows[id(pair.torch)] += 1
        cols[id(pair.flax)] += 1
    return not in_step(pair for pair in pairs if rows[id(pair.torch)] == 1 and cols[id(pair.flax)] == 1)


BY_NUMBER = "the numbers are in the same order"
ALONG_BLOCK = "they have the same order along the block"
RULED = "the rules settle another leaf of this module"
"""Evidence of pairs: by the order of their numbers, by their order along a block, and by rules."""


def call_order(pair: Pair, scope: Scope) -> bool:
    """True if the pair relies on a number that counts calls: only one side has automatic names (`Dense_0`), another
    module in the same count has the same shapes, and words did not decide."""
    by_number = pair.why.startswith((BY_NUMBER, ALONG_BLOCK)) or (pair.why != RULED and " of " in pair.why)
    counted = _counted(pair.torch), _counted(pair.flax)
    if not by_number or counted[0] == counted[1]:
        return False
    mine, others = (pair.flax, scope.flax) if counted[1] else (pair.torch, scope.torch)
    like, shapes = mine.unnumbered, _shapes(mine)
    return any(m is not mine and m.unnumbered == like and _shapes(m) == shapes for m in others)


def counted_blocks(scope: Scope) -> bool:
    """True if a number identifies the blocks of the scope and counts calls on only one side (`Block_0`, layers.0)."""
    if scope.root or len(scope.keys) < 2 or not scope.torch or not scope.flax:
        return False
    return _numbered_by_calls(scope.torch[0]) != _numbered_by_calls(scope.flax[0])


def _numbered_by_calls(module: Module) -> bool:
    """True if automatic names tell the instances of a block apart."""
    paths = [found[0] for found in next(iter(module.roles.values())).paths.values()][:2]
    parts = [re.split(r"[./]", path) for path in paths]
    return len(paths) > 1 and any(a != b and bool(CALL.fullmatch(a)) for a, b in zip(*parts, strict=False))


def counted_part(path: str) -> str:
    """The path up to the last automatic name."""
    parts = path.split("/")
    last = max((n for n, part in enumerate(parts) if CALL.fullmatch(part)), default=len(parts) - 2)
    return "/".join(parts[: last + 1])


def calls_on_one_side(scope: Scope) -> bool:
    """True if automatic names number the modules of only one side."""
    return any(map(_counted, scope.torch)) != any(map(_counted, scope.flax))


def _counted(module: Module) -> bool:
    return any(automatic(path_of(module))[-3:-1])


def path_of(module: Module) -> str:
    """The path of a module's first leaf."""
    return next(iter(module.roles.values())).path


def _shapes(module: Module) -> set[tuple[str, tuple[int, ...]]]:
    """Every role with its shapes; transposed shapes are equal."""
    return {(role, tuple(sorted(shape))) for role, c in module.roles.items() for shape in c.shapes.values()}
