"""Parts of a model as evidence: what stands in one part on one side stands in one part on the other.

A part is a path: the whole scope, or a module that holds others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from graftax.match.assign import Board
from graftax.match.names import concepts
from graftax.match.orders import BY_NUMBER, RULED, complete_order, connected, in_step
from graftax.match.pairs import Pair, Scope
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
    rows = {id(m): {k: p for k, p in board.rows.get(id(m), {}).items() if k in wanted and p.whole} for m in torch}
    columns: defaultdict[int, dict[int, Pair]] = defaultdict(dict)
    for key, row in rows.items():
        for other, pair in row.items():
            columns[other][key] = pair
    out: list[Pair] = []
    while single := next((ends for ends in (*rows.values(), *columns.values()) if len(ends) == 1), None):
        # A graph with exactly one complete pairing has an end that only one edge touches.
        (pair,) = single.values()
        out.append(pair)
        for other in rows.pop(id(pair.torch)):
            columns[other].pop(id(pair.torch), None)
        for key in columns.pop(id(pair.flax), {}):
            rows[key].pop(id(pair.flax), None)
    for left, right, found in connected([pair for row in rows.values() for pair in row.values()]) if trusted else ():
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
