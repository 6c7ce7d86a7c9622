"""Parts of a model as evidence: what stands in one part on one side stands in one part on the other.

A part is a path: the whole scope, or a module that holds others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from graftax.match.assign import Board
from graftax.match.evidence import judge
from graftax.match.names import concepts
from graftax.match.orders import BY_NUMBER, RULED, complete_order, connected, in_step
from graftax.match.pairs import Pair, Scope
from graftax.match.scope_names import number_ranks
from graftax.match.sides import Module, Token

Part = tuple[Token, ...]


def crossing(pairs: Sequence[Pair], taken: Sequence[Pair], scope: Scope) -> list[Pair]:
    """Open pairs that pair a module of one part with a module outside of it. A word names a part if both sides
    have it for parts with as many open modules that fit each other, and no taken pair has it on one end alone."""
    out: dict[int, Pair] = {}
    for word in sorted(_words_of_parts(pairs, scope)):
        if any((word in _place(pair.torch, scope)) != (word in _place(pair.flax, scope)) for pair in taken):
            continue
        torch: dict[int, bool] = {}
        flax: dict[int, bool] = {}
        apart: list[Pair] = []
        for pair in pairs:
            inside = word in _place(pair.torch, scope), word in _place(pair.flax, scope)
            if inside[0]:
                torch[id(pair.torch)] = torch.get(id(pair.torch), False) or inside[1]
            if inside[1]:
                flax[id(pair.flax)] = flax.get(id(pair.flax), False) or inside[0]
            if inside[0] != inside[1]:
                apart.append(pair)
        if len(torch) == len(flax) and all(torch.values()) and all(flax.values()):
            out |= {id(pair): pair for pair in apart}
    return list(out.values())


def _words_of_parts(pairs: Sequence[Pair], scope: Scope) -> frozenset[str]:
    """The words that both sides have for parts, without those that only say what kind of part it is."""
    torch, flax = (
        frozenset(word for module in ends for word in _place(module, scope))
        for ends in ([pair.torch for pair in pairs], [pair.flax for pair in pairs])
    )
    return frozenset(word for word in (torch & flax) - scope.common if scope.lex.weight(word) >= 0.5)


def _place(module: Module, scope: Scope) -> frozenset[str]:
    return scope.beside.get(id(module), frozenset())


# ---------------------------------------------------------------- names inside of two parts


def judge_inside(pairs: Sequence[Pair], taken: Sequence[Pair], scope: Scope) -> list[Pair]:
    """The open pairs that are judged otherwise by their names inside of two paired parts: everything taken from one is
    paired with something of the other, so that their own words mean the same. So do two words in which the names of a
    taken pair differ alone."""
    held = _held([pair.torch for pair in taken]), _held([pair.flax for pair in taken])
    ranks = [number_ranks(modules, scope) if scope.numbers else {} for modules in (scope.torch, scope.flax)]
    means = _meant([(pair, _inside_of(pair, held)) for pair in taken], scope)
    rivals: defaultdict[Module, list[Pair]] = defaultdict(list)
    for pair in pairs:
        rivals[pair.torch].append(pair)
        rivals[pair.flax].append(pair)
    changed: list[Pair] = []
    for pair in pairs:
        parts = _inside_of(pair, held)
        if len(held[0][parts[0]]) < 2 and any(
            _across(other, parts) for other in rivals[pair.torch] + rivals[pair.flax]
        ):
            parts = (), ()  # what fits another part too may belong there, and the only leaf paired may be the stray
        if pair.torch.alias or (parts == ((), ()) and not means):
            continue  # a tied tensor is judged by all of its names
        before = pair.findings, pair.score
        judge(pair, scope, ranks[0].get(id(pair.torch), ()), ranks[1].get(id(pair.flax), ()), parts, means)
        if (pair.findings, pair.score) != before:
            changed.append(pair)
    return changed


def _across(pair: Pair, parts: tuple[Part, Part]) -> bool:
    return _inside(pair.torch, parts[0]) != _inside(pair.flax, parts[1])


def _inside_of(pair: Pair, held: tuple[dict[Part, set[int]], dict[Part, set[int]]]) -> tuple[Part, Part]:
    """The innermost paired parts around the modules of the pair; the whole scope if there are none."""
    ends = [max((p for p in _parts(module)[1:] if p in some), key=len, default=())
            for module, some in zip((pair.torch, pair.flax), held, strict=True)]  # fmt: skip
    least = [max(len(p) for p, found in some.items() if found == some[end]) == len(end) if end else False
             for end, some in zip(ends, held, strict=True)]  # fmt: skip
    paired = all(ends) and held[0][ends[0]] == held[1][ends[1]] and least[0] == least[1]
    return (ends[0], ends[1]) if paired else ((), ())


def _meant(taken: Sequence[tuple[Pair, tuple[Part, Part]]], scope: Scope) -> dict[str, str]:
    """Words of the torch side -> the words of the Flax side that stand in their place, where the names differ in
    nothing else. One of the two has no meaning of its own."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    back: defaultdict[str, set[str]] = defaultdict(set)
    for pair, (p, q) in taken:
        ends = pair.torch.tokens[len(p) :], pair.flax.tokens[len(q) :]
        apart = [(a, b) for a, b in zip(*ends, strict=False) if a != b]
        for a, b in apart if len(apart) == 1 and len(ends[0]) == len(ends[1]) else [(a, a) for a in ends[0]]:
            if isinstance(a, str) and isinstance(b, str):
                found[a].add(b)
                back[b].add(a)
    known = scope.lex.synonyms.keys()
    return {a: b for a, some in found.items() if len(some) == 1
            for b in some if a != b and len(back[b]) == 1 and not (a in known and b in known)}  # fmt: skip


def _held(modules: Sequence[Module]) -> dict[Part, set[int]]:
    """The places of these modules, by each part that holds them."""
    out: defaultdict[Part, set[int]] = defaultdict(set)
    for n, module in enumerate(modules):
        for part in _parts(module):
            out[part].add(n)
    return out


# ---------------------------------------------------------------- what is left of two parts


def the_rest(
    scope: Scope, torch: Iterable[Module], flax: Iterable[Module], taken: Sequence[Pair], board: Board, trusted: bool
) -> list[Pair]:
    """The pairs that are the only pairing of what is left of two parts, or the one in the order of their numbers; the
    smallest parts first. `torch`, `flax`: the open modules of the scope; `trusted`: nothing in it shows numbers out of
    order. The pairs are removed from the board.

    Two parts are paired if everything taken from one is paired with something of the other, or if the same words name
    them. All open modules of both must be accounted for, and no judgement may bar a pair: a word that only one name has
    may stand for a stranger of the same shape."""
    out: list[Pair] = []
    parts = {(p, q) for pair in board.pairs() for p in _parts(pair.torch) for q in _parts(pair.flax)}
    left, right = _by_part(torch), _by_part(flax)
    gone: set[int] = set()
    for p, q in sorted(parts, key=lambda ends: -len(ends[0]) - len(ends[1])):
        if len(left[p]) != len(right[q]):
            continue
        mine, theirs = ([m for m in modules if id(m) not in gone] for modules in (left[p], right[q]))
        if not mine or not _paired(p, q, [*taken, *out], scope):
            continue
        found = _complete(mine, theirs, scope, board, trusted)
        counted = any(pair.why == BY_NUMBER for pair in found)  # what rules state limits only what a count decides
        beside = [pair for pair in (*taken, *out) if counted or pair.why != RULED]
        if not all(_sure(pair) for pair in found) or not in_step(found, beside):
            continue
        for pair in found:
            pair.why = pair.why or f"the only pairing of what is left of {_text(p)} and {_text(q)}"
            board.take(pair)
        out += found
        gone |= {id(m) for pair in found for m in (pair.torch, pair.flax)}
    return out


def _by_part(modules: Iterable[Module]) -> dict[Part, list[Module]]:
    out: defaultdict[Part, list[Module]] = defaultdict(list)
    for module in modules:
        for part in _parts(module):
            out[part].append(module)
    return out


def _complete(
    torch: Collection[Module], flax: Collection[Module], scope: Scope, board: Board, trusted: bool
) -> list[Pair]:
    """The complete pairing of these modules: the only one, or, of modules that differ only in their numbers, the one in
    their order. [] if there is none. A pair of modules with other leaves completes nothing."""
    wanted = {id(module) for module in flax}
    mine = Board(p for m in torch for k, p in board.rows.get(id(m), {}).items() if k in wanted and p.whole)
    out: list[Pair] = []
    while single := next((ends for ends in (*mine.rows.values(), *mine.cols.values()) if len(ends) == 1), None):
        # A graph with exactly one complete pairing has an end that only one edge touches.
        (pair,) = single.values()
        out.append(pair)
        mine.take(pair)
    for left, right, found in connected(mine.pairs()) if trusted else ():
        order = complete_order(left, right, scope)
        chosen = [pair for a, b in order if (pair := found.get((id(a), id(b)))) is not None]
        if not order or len(chosen) != len(order):
            return []
        for pair in chosen:
            pair.why = BY_NUMBER
        out += chosen
    return out if len(out) == len(wanted) == len(torch) else []


def _parts(module: Module) -> list[Part]:
    return [(), *(module.tokens[:cut] for cut in module.cuts[:-1])]


def _inside(module: Module, part: Part) -> bool:
    return module.tokens[: len(part)] == part and (not part or len(part) in module.cuts)


def _paired(p: Part, q: Part, taken: Iterable[Pair], scope: Scope) -> bool:
    ends = [(_inside(pair.torch, p), _inside(pair.flax, q)) for pair in taken]
    numbers = [[token for token in part if not isinstance(token, str)] for part in (p, q)]
    named = concepts(p, scope.lex) == concepts(q, scope.lex) != () and numbers[0] == numbers[1]
    return (named or any(a for a, _ in ends)) and all(a == b for a, b in ends)


def _sure(pair: Pair) -> bool:
    return pair.whole and pair.torch.raw == pair.flax.raw and pair.open_to("rest")


def _text(part: Part) -> str:
    return ".".join(map(str, part)) or "this part of the model"
