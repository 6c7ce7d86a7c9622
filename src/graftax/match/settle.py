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
from graftax.match.orders import RULED, calls_on_one_side, in_order, out_of_order
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

    def rest(self) -> tuple[list[Module], list[Module]]:
        """The modules of both sides without a partner."""
        done = {id(m) for pair in self.taken for m in (pair.torch, pair.flax)}
        done |= {id(m) for group in self.groups for m in (*group.torch, *group.flax)}
        torch, flax = ([m for m in end if id(m) not in done] for end in (self.scope.torch, self.scope.flax))
        return torch, flax


def crossed(scopes: Iterable[Scope], ends: Ends) -> bool:
    """True if shapes show calls that are not in the order of the other side's numbers. An author who calls layers in
    another order in one block may do so in all."""
    return any(calls_on_one_side(scope) and out_of_order(candidates(scope, ends.kinds)) for scope in scopes)


def _settle(scope: Scope, ends: Ends) -> Settled:
    pairs = candidates(scope, ends.kinds)
    calls = calls_on_one_side(scope)
    trusted = not (out_of_order(pairs) or (ends.crossed and calls))
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
        trusted and not calls,
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
    calls = calls_on_one_side(scope)
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
    torch, flax = item.rest()
    partly = sum(len(pair.torch.roles) + len(pair.flax.roles) for pair in item.taken if not pair.whole)
    return partly + sum(len(c.paths) for m in (*torch, *flax) for c in m.roles.values())


def settle_apart(settled: list[Settled], root: Scope, ends: Ends) -> Settled | None:
    """Match the rest of both sides once more, with numbers as parts of names: what only one instance of a family holds
    (a bias table in the first block) may stand outside of the blocks on the other side."""
    sides: tuple[list[Module], list[Module]] = ([], [])
    homes: dict[int, tuple[Settled, Module]] = {}
    columns = (Counter(_column(m) for item in settled for m in item.scope.torch),
               Counter(_column(m) for item in settled for m in item.scope.flax))  # fmt: skip
    for item in settled:
        for modules, out, counts in zip(item.rest(), sides, columns, strict=True):
            for module in modules:
                single = module if item.scope is root else single_out(module)
                # if other blocks hold it, this one lacks its tensor, and no stray may replace it
                if counts[_column(module)] == 1 and single is not None:
                    out.append(single)
                    homes[id(single)] = item, module
    if not all(sides) or all(item.scope is root for item, _ in homes.values()):
        return None
    scope = Scope(*sides, [((), ())], True, root.same, root.lex)
    scope.wrappers, scope.experts = root.wrappers, root.experts
    found = _settle(scope, ends)
    crossing = [pair for pair in found.taken if homes[id(pair.torch)][0] is not homes[id(pair.flax)][0]]
    for pair in crossing:
        (left, torch), (right, flax) = homes[id(pair.torch)], homes[id(pair.flax)]
        left.board.drop([torch], [])
        right.board.drop([], [flax])
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
    torch, flax = item.rest()
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
    found = the_rest(item.scope, *item.rest(), item.taken, item.board, item.trusted)
    item.taken += found
    return found


def open_links(item: Settled) -> list[tuple[Pair, Link, Choice]]:
    """Leaves of taken pairs with an open reading."""
    found = ((pair, link, item.choices[id(link)]) for pair in item.taken for link in pair.links)
    return [(pair, link, choice) for pair, link, choice in found if choice.label is None]
