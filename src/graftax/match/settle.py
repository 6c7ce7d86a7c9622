"""Settle one scope: candidates, rules, orders, kinds of blocks, fused modules, and what stays open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from graftax.match.assign import Board, assign
from graftax.match.bare_rules import left_open
from graftax.match.choose import Choice, Habits
from graftax.match.fits import candidates, fit
from graftax.match.groups import Group, find_groups
from graftax.match.leftovers import by_kind, single_out
from graftax.match.match_inputs import Ends
from graftax.match.orders import RULED, counts_calls, in_order, out_of_order
from graftax.match.pairs import EVERY, LIVE, Finding, Link, Pair, Scope
from graftax.match.partial import anchored, reopened
from graftax.match.parts import crossing, judge_inside, the_rest
from graftax.match.sides import Module


@dataclass(slots=True, eq=False)
class Settled:
    """One settled scope: the pairs taken, with a choice for each leaf, and what stays open."""

    scope: Scope
    taken: list[Pair]
    board: Board
    choices: dict[int, Choice] = field(default_factory=dict[int, Choice])
    groups: list[Group] = field(default_factory=list[Group])
    trusted: bool = True  # nothing shows numbers out of order


def crossed(scopes: Iterable[Scope], ends: Ends) -> bool:
    """True if shapes show calls that are not in the order of the other side's numbers. An author who calls layers in
    another order in one block may do so in all."""
    return any(counts_calls(scope) and out_of_order(candidates(scope, ends.kinds)) for scope in scopes)


def _settle(scope: Scope, ends: Ends) -> Settled:
    pairs = candidates(scope, ends.kinds)
    trusted = not (out_of_order(pairs) or (ends.crossed and counts_calls(scope)))
    if not trusted:
        pairs = candidates(scope, ends.kinds, numbers=False)
    if ends.fused:
        pairs = [pair for pair in pairs if not (_is_fused(pair.torch, ends) or _is_fused(pair.flax, ends))]
    for pair in pairs if ends.kinds else ():
        if clash := ends.kinds.clash(pair):
            pair.findings += (Finding(LIVE, EVERY, clash),)
    forced = _forced(scope, pairs, ends) if ends.anchors else []
    taken, board = assign(
        pairs,
        lambda open_, done: in_order(open_, pairs, done, scope, trusted),
        lambda open_, done: crossing(open_, done, scope),
        lambda open_, done: judge_inside(open_, done, scope),
        forced,
        trusted and not counts_calls(scope),
    )
    if ends.anchors:
        taken, board = reopened(taken, board, pairs, dict(scope.keys), ends.anchors, forced)
    return Settled(scope, taken, board, trusted=trusted)


def _is_fused(module: Module, ends: Ends) -> bool:
    """True if a rule about a fused tensor settles a leaf of the module."""
    return any(column.path in ends.fused for column in module.roles.values())


_KINDS = 8  # with more kinds of blocks in one family, the numbers show nothing


def settle_kinds(scope: Scope, ends: Ends) -> list[Settled]:
    """The scope, settled as a whole. If that leaves leaves over and the scope has several kinds of blocks, it is
    settled kind by kind, provided that fewer leaves are left over. So it is if numbers count calls and their order is
    doubtful: they mean the same only in blocks of one kind (`Conv_1` follows a projection, where there is one)."""
    whole = _settle(scope, ends)
    calls = counts_calls(scope)
    if scope.root or not (calls or open_leaves(whole)):
        return [whole]
    kinds = by_kind(scope)
    if len(kinds) < 2 or len(kinds) > _KINDS:
        return [whole]
    apart = [_settle(kind, ends) for kind in kinds]
    if calls and (ends.crossed or _contradict(whole, apart)):
        return apart
    return apart if sum(map(open_leaves, apart)) < open_leaves(whole) else [whole]


def _contradict(whole: Settled, apart: Iterable[Settled]) -> bool:
    """True if some leaf has another partner where blocks of one kind are settled by themselves."""
    known = dict(_partners(whole))
    return any(known.get(path, other) != other for item in apart for path, other in _partners(item))


def _partners(item: Settled) -> Iterator[tuple[str, str]]:
    """The leaves of the taken pairs, torch and Flax."""
    for link in (link for pair in item.taken for link in pair.links):
        for key, other in item.scope.keys:
            if key in link.torch.paths and other in link.flax.paths:
                yield link.torch.paths[key][0], link.flax.paths[other][0]


def open_leaves(item: Settled) -> int:
    """The number of leaves of either side without a partner, including fused ones."""
    done = {id(m) for pair in item.taken for m in (pair.torch, pair.flax)}
    left = [m for m in (*item.scope.torch, *item.scope.flax) if id(m) not in done]
    partly = [
        c for pair in item.taken if not pair.whole for c in (*pair.torch.roles.values(), *pair.flax.roles.values())
    ]
    return sum(len(c.paths) for m in left for c in m.roles.values()) + len(partly)


def settle_apart(settled: list[Settled], root: Scope, ends: Ends) -> Settled | None:
    """Match the rest of both sides once more, with numbers as parts of names: what only one instance of a family holds
    (a bias table in the first block) may stand outside of the blocks on the other side."""
    left: list[Module] = []
    right: list[Module] = []
    origin: dict[int, tuple[Settled, Module, bool]] = {}
    columns = (Counter(_column(m) for item in settled for m in item.scope.torch),
               Counter(_column(m) for item in settled for m in item.scope.flax))  # fmt: skip
    for item in settled:
        done = {id(m) for pair in item.taken for m in (pair.torch, pair.flax)}
        for modules, out, torch in ((item.scope.torch, left, True), (item.scope.flax, right, False)):
            for module in modules:
                if id(module) in done or columns[not torch][_column(module)] > 1:
                    continue  # other blocks hold it, so this one lacks its tensor, and no stray may replace it
                single = module if item.scope is root else single_out(module)
                if single is not None:
                    out.append(single)
                    origin[id(single)] = (item, module, torch)
    inside = [m for m in (*left, *right) if origin[id(m)][0].scope is not root]
    if not left or not right or not inside:
        return None
    scope = Scope(left, right, [((), ())], True, root.same, root.lex)
    scope.wrappers, scope.experts = root.wrappers, root.experts
    found = _settle(scope, ends)
    crossing = [p for p in found.taken if origin[id(p.torch)][0] is not origin[id(p.flax)][0]]
    for pair in crossing:
        for module in (pair.torch, pair.flax):
            item, old, torch = origin[id(module)]
            item.board.drop([old] if torch else [], [] if torch else [old])
    return Settled(scope, crossing, Board([])) if crossing else None


def _column(module: Module) -> tuple[object, ...]:
    return module.outer, module.tokens, tuple(module.roles)


def _forced(scope: Scope, pairs: list[Pair], ends: Ends) -> list[Pair]:
    """The pairs that the rules settle through one of their leaves, with the readings that the rules leave open."""
    anchors = ends.anchors
    flax: dict[str, Module] = {}
    wanted = set(anchors.values())
    for module in scope.flax:
        for column in module.roles.values():
            flax |= {path: module for paths in column.paths.values() for path in paths if path in wanted}
    known = {(id(pair.torch), id(pair.flax)): pair for pair in pairs}
    out: list[Pair] = []
    seen: set[int] = set()
    for module in scope.torch:
        for column in module.roles.values():
            path = anchored(column, flax, anchors)
            other = flax.get(anchors[path]) if path is not None else None
            if other is None or id(module) in seen or id(other) in seen:
                continue
            pair = known.get((id(module), id(other))) or fit(module, other, dict(scope.keys), scope.same, ends.kinds)
            pair = pair or Pair(module, other, [], False)
            left = (left_open(link, scope, anchors, ends.named) for link in pair.links)
            pair.links = [link for link in left if link is not None]
            pair.why, pair.findings = RULED, ()
            out.append(pair)
            seen |= {id(module), id(other)}
    return out


def take_groups(item: Settled, ends: Ends, habits: Habits) -> None:
    """Find fused modules among the modules without a partner, and take them off the board."""
    scope = item.scope
    done = {id(m) for pair in item.taken for m in (pair.torch, pair.flax)}
    torch = [m for m in scope.torch if id(m) not in done]
    flax = [m for m in scope.flax if id(m) not in done]
    if not torch or not flax:
        return
    found = (habits.axes.get(id(link)) for pair in item.taken for link in pair.links)
    axes = {choice.label[0] for choice in found if choice is not None and choice.label is not None}
    axis = axes.pop()[0] if len(axes) == 1 else None
    item.groups = find_groups(scope, torch, flax, ends.styles, ends.heads, axis, item.taken)
    for group in item.groups:
        item.board.drop(group.torch, group.flax)


def take_rest(item: Settled) -> list[Pair]:
    """Take the only pairing of what is left of two paired parts."""
    done = {id(m) for pair in item.taken for m in (pair.torch, pair.flax)}
    done |= {id(m) for group in item.groups for m in (*group.torch, *group.flax)}
    torch, flax = ([m for m in modules if id(m) not in done] for modules in (item.scope.torch, item.scope.flax))
    found = the_rest(item.scope, torch, flax, item.taken, item.board, item.trusted)
    item.taken += found
    return found


def open_links(item: Settled) -> list[tuple[Pair, Link, Choice]]:
    """Leaves of taken pairs with an open reading."""
    out: list[tuple[Pair, Link, Choice]] = []
    for pair in item.taken:
        for link in pair.links:
            choice = item.choices[id(link)]
            if choice.label is None:
                out.append((pair, link, choice))
    return out
