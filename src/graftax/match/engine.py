"""Match two sides: families, then stacks, then the modules of each scope, then the readings of their leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from graftax.match.choose import Choice, Habits, choose, stack_axes
from graftax.match.decide import Board, decide
from graftax.match.families import FamilyPair, pair_families
from graftax.match.names import Lexicon
from graftax.match.orders import auto_numbered, in_order, out_of_order
from graftax.match.pairs import Link, Pair, Scope, candidates, wrapper_words
from graftax.match.sides import Family, Key, Module, SideView, Token, view
from graftax.match.stacks import outer_prefix, stackable, virtual
from graftax.tree import Side, TensorSpec


@dataclass(slots=True, eq=False)
class Settled:
    """One scope after deciding: pairs taken with a choice for each leaf, and what stays open."""

    scope: Scope
    taken: list[Pair]
    board: Board
    choices: dict[int, Choice] = field(default_factory=dict[int, Choice])


@dataclass(slots=True, eq=False)
class Result:
    """All scopes, the modules that found no scope, and the known buffers of the torch side."""

    settled: list[Settled]
    torch_left: list[Module]
    flax_left: list[Module]
    buffers: dict[str, str]
    call_order: list[Pair] = field(default_factory=list[Pair])


@dataclass(frozen=True, slots=True)
class Ends:
    """Both sides' specs, their names' syntax, and the leaves that rules have settled."""

    torch: Mapping[str, TensorSpec]
    flax: Mapping[str, TensorSpec]
    torch_side: Side
    flax_side: Side
    torch_skip: frozenset[str] = frozenset()
    flax_skip: frozenset[str] = frozenset()


def match(ends: Ends, lex: Lexicon, aliases: Mapping[str, tuple[str, ...]]) -> Result:
    """Everything that names and shapes decide."""
    torch = view(ends.torch, ends.torch_side, ends.torch_skip)
    flax = view(ends.flax, ends.flax_side, ends.flax_skip)
    pairs, left_t, left_f = _families(torch, flax, lex)
    if left_t and left_f:
        exact_t, exact_f = _prefixes(left_t), _prefixes(left_f)
        torch = view(ends.torch, ends.torch_side, ends.torch_skip, exact=exact_t)
        flax = view(ends.flax, ends.flax_side, ends.flax_skip, exact=exact_f)
        again = _families(torch, flax, lex)
        if len(again[1]) + len(again[2]) > len(left_t) + len(left_f):
            torch = view(ends.torch, ends.torch_side, ends.torch_skip)
            flax = view(ends.flax, ends.flax_side, ends.flax_skip)
        else:
            pairs, left_t, left_f = again
    same = ends.torch_side == ends.flax_side
    all_t = [m for family in torch.families for m in family.modules]
    all_f = [m for family in flax.families for m in family.modules]
    wrappers = wrapper_words(all_t, all_f, lex) | wrapper_words(all_f, all_t, lex)
    root = Scope(torch.families[0].modules, flax.families[0].modules, [((), ())], True, same, lex)
    scopes = {((), ()): root}
    by_t: dict[tuple[Token, ...], Scope] = {(): root}
    by_f: dict[tuple[Token, ...], Scope] = {(): root}
    for pair in pairs:
        scope = Scope(pair.torch.modules, pair.flax.modules, pair.keys, False, same, lex, pair.why)
        scopes[(pair.torch.prefix, pair.flax.prefix)] = scope
        by_t.setdefault(pair.torch.prefix, scope)
        by_f.setdefault(pair.flax.prefix, scope)
    lost_t = _stack_into(left_t, by_t, torch_side=True)
    lost_f = _stack_into(left_f, by_f, torch_side=False)
    result = Result([], lost_t, lost_f, torch.buffers)
    habits = Habits()
    for scope in scopes.values():
        scope.wrappers = wrappers
        result.settled.append(_settle(scope))
    for item in result.settled:
        habits.learn(item.scope, item.taken)
        stack_axes(item.scope, item.taken, habits)
    for item in result.settled:
        for pair in item.taken:
            for link in pair.links:
                item.choices[id(link)] = choose(link, pair, item.scope, habits)
            if auto_numbered(pair, lex):
                result.call_order.append(pair)
    return result


def _families(
    torch: SideView, flax: SideView, lex: Lexicon
) -> tuple[list[FamilyPair], list[Family], list[Family]]:
    return pair_families(torch.families[1:], flax.families[1:], lex, {})


def _prefixes(families: Iterable[Family]) -> frozenset[tuple[Token, ...]]:
    return frozenset(family.prefix for family in families)


def _stack_into(left: list[Family], scopes: dict[tuple[Token, ...], Scope], torch_side: bool) -> list[Module]:
    """Put each unpaired family into the scope around it as stacked modules, the innermost first; the modules of
    families that cannot be stacked are returned."""
    lost: list[Module] = []
    pending = {family.prefix: family for family in left}
    for family in sorted(left, key=lambda f: -len(f.prefix)):
        outer = outer_prefix(family.prefix)
        made = virtual(family)
        if made is None:
            lost += family.modules
            continue
        around = pending.get(outer)
        scope = scopes.get(outer)
        if around is not None:
            around.modules = [*around.modules, *made]
        elif scope is not None and stackable(made, scope.flax if torch_side else scope.torch):
            if torch_side:
                scope.torch = [*scope.torch, *made]
            else:
                scope.flax = [*scope.flax, *made]
        elif scope is None and outer:
            # A family that holds only this one: it goes on outwards.
            keys: list[Key] = sorted({key for module in made for key in module.support})
            fresh = Family(outer, keys, made, [0] * len(keys))
            pending[outer] = fresh
            lost += _stack_into([fresh], scopes, torch_side)
        else:
            lost += family.modules
    return lost


def _settle(scope: Scope) -> Settled:
    pairs = candidates(scope)
    trusted = not out_of_order(pairs)
    taken, board = decide(pairs, scope.root, lambda open_: in_order(open_, scope, trusted))
    return Settled(scope, taken, board)


def open_links(item: Settled) -> list[tuple[Pair, Link, Choice]]:
    """Leaves of taken pairs whose reading nothing decides."""
    out: list[tuple[Pair, Link, Choice]] = []
    for pair in item.taken:
        for link in pair.links:
            choice = item.choices[id(link)]
            if choice.label is None:
                out.append((pair, link, choice))
    return out
