"""Match two sides: families, then stacks, then the modules of each scope, then the readings of their leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from graftax.match.choose import Choice, Habits, choose, stack_axes, trapped
from graftax.match.decide import Board, decide
from graftax.match.families import FamilyPair, pair_families
from graftax.match.flatten import suspects
from graftax.match.groups import Group, find_groups
from graftax.match.idioms import has_experts
from graftax.match.kinds import Kinds
from graftax.match.leftovers import by_kind, single_out
from graftax.match.names import Lexicon
from graftax.match.orders import call_order, in_order, out_of_order
from graftax.match.pairs import Link, Pair, Scope, candidates, fit, wrapper_words
from graftax.match.sides import Family, Key, Module, SideView, Token, tokens_of, view
from graftax.match.stacks import outer_prefix, stackable, virtual
from graftax.tree import Side, TensorSpec


@dataclass(slots=True, eq=False)
class Settled:
    """One scope after deciding: pairs taken with a choice for each leaf, and what stays open."""

    scope: Scope
    taken: list[Pair]
    board: Board
    choices: dict[int, Choice] = field(default_factory=dict[int, Choice])
    groups: list[Group] = field(default_factory=list[Group])


@dataclass(slots=True, eq=False)
class Result:
    """All scopes, the modules that found no scope, and the known buffers of the torch side."""

    settled: list[Settled]
    torch_left: list[Module]
    flax_left: list[Module]
    buffers: dict[str, str]
    call_order: list[Pair] = field(default_factory=list[Pair])
    doubts: list[Doubt] = field(default_factory=list["Doubt"])


@dataclass(slots=True, eq=False)
class Doubt:
    """Blocks that could be any of several: one scope and its likeliest pair for each combination."""

    torch: list[Family]
    flax: list[Family]
    options: list[tuple[Scope, Pair]]


@dataclass(frozen=True, slots=True)
class Ends:
    """Both sides' specs, their names' syntax, and the leaves that rules have settled in groups.

    anchors: torch leaf -> Flax leaf, one to one, from rules; styles: torch module -> block or interleaved, from rules;
    heads: from config.json; aliases: first name -> all names of a tied tensor.
    """

    torch: Mapping[str, TensorSpec]
    flax: Mapping[str, TensorSpec]
    torch_side: Side
    flax_side: Side
    torch_skip: frozenset[str] = frozenset()
    flax_skip: frozenset[str] = frozenset()
    anchors: Mapping[str, str] = field(default_factory=dict[str, str])
    styles: Mapping[str, str] = field(default_factory=dict[str, str])
    heads: int | None = None
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])
    kinds: Kinds = field(default_factory=Kinds)


def match(ends: Ends, lex: Lexicon) -> Result:
    """Everything that names and shapes decide."""
    torch = view(ends.torch, ends.torch_side, ends.torch_skip)
    flax = view(ends.flax, ends.flax_side, ends.flax_skip)
    pairs, left_t, left_f = _families(torch, flax, lex, ends.anchors)
    if left_t and left_f:
        exact_t, exact_f = _prefixes(left_t), _prefixes(left_f)
        torch = view(ends.torch, ends.torch_side, ends.torch_skip, exact=exact_t)
        flax = view(ends.flax, ends.flax_side, ends.flax_skip, exact=exact_f)
        again = _families(torch, flax, lex, ends.anchors)
        if len(again[1]) + len(again[2]) > len(left_t) + len(left_f):
            torch = view(ends.torch, ends.torch_side, ends.torch_skip)
            flax = view(ends.flax, ends.flax_side, ends.flax_skip)
        else:
            pairs, left_t, left_f = again
    same = ends.torch_side == ends.flax_side
    doubts = _doubts(left_t, left_f, same, lex)
    unsure = {id(family) for doubt in doubts for family in (*doubt.torch, *doubt.flax)}
    left_t = [family for family in left_t if id(family) not in unsure]
    left_f = [family for family in left_f if id(family) not in unsure]
    if not doubts:
        torch, flax, pairs, left_t, left_f = _loosened(torch, flax, pairs, left_t, left_f, ends, lex)
    _name_ties(torch, ends)
    all_t = [m for family in torch.families for m in family.modules]
    all_f = [m for family in flax.families for m in family.modules]
    wrappers = wrapper_words(all_t, all_f, lex) | wrapper_words(all_f, all_t, lex)
    experts = (has_experts(all_t, lex), has_experts(all_f, lex))
    root = Scope(torch.families[0].modules, flax.families[0].modules, [((), ())], True, same, lex)
    scopes = [root]
    by_t: dict[tuple[Token, ...], Scope] = {(): root}
    by_f: dict[tuple[Token, ...], Scope] = {(): root}
    for pair in pairs:
        scope = Scope(pair.torch.modules, pair.flax.modules, pair.keys, False, same, lex, pair.why)
        scopes.append(scope)
        by_t.setdefault(pair.torch.prefix, scope)
        by_f.setdefault(pair.flax.prefix, scope)
    lost_t = _stack_into(left_t, by_t, torch_side=True)
    lost_f = _stack_into(left_f, by_f, torch_side=False)
    result = Result([], lost_t, lost_f, torch.buffers, doubts=doubts)
    habits = Habits()
    for scope in scopes:
        scope.wrappers, scope.experts = wrappers, experts
        result.settled += _settle_kinds(scope, ends)
    apart = _settle_apart(result.settled, root, ends)
    if apart is not None:
        result.settled.append(apart)
    for item in result.settled:
        habits.learn(item.scope, item.taken)
        stack_axes(item.scope, item.taken, habits)
        _group(item, ends)
    inner = [m for family in torch.families[1:] for m in family.modules]
    traps = {} if same else suspects(torch.families[0].modules, inner, lex)
    for item in result.settled:
        for pair in item.taken:
            for link in pair.links:
                known = ends.kinds.reading(pair, link) if ends.kinds else None
                choice = Choice(*known) if known is not None else choose(link, pair, item.scope, habits)
                said = ends.anchors.keys() >= {path for paths in link.torch.paths.values() for path in paths}
                trap = None if said else traps.get(id(pair.torch))
                item.choices[id(link)] = trapped(link, choice, trap) if trap is not None else choice
            if call_order(pair):
                result.call_order.append(pair)
    return result


def _doubts(torch: list[Family], flax: list[Family], same: bool, lex: Lexicon) -> list[Doubt]:
    """Families without a partner although blocks of the same number and sizes are there: which is meant?"""
    groups: dict[tuple[int, ...], tuple[list[Family], list[Family]]] = {}
    for families, at in ((torch, 0), (flax, 1)):
        for family in families:
            groups.setdefault(tuple(family.sizes), ([], []))[at].append(family)
    out: list[Doubt] = []
    for left, right in groups.values():
        if not left or not right:
            continue
        options: list[tuple[Scope, Pair]] = []
        for other in right:
            for family in left:
                keys = list(zip(family.keys, other.keys, strict=True))
                scope = Scope(family.modules, other.modules, keys, False, same, lex)
                found = max(candidates(scope), key=lambda p: (not p.blocked, p.total), default=None)
                if found is not None:
                    options.append((scope, found))
        if options:
            out.append(Doubt(left, right, options))
    return out


_FEW = 64  # instances of a family whose numbers may become parts of names


def _loosened(
    torch: SideView,
    flax: SideView,
    pairs: list[FamilyPair],
    left_t: list[Family],
    left_f: list[Family],
    ends: Ends,
    lex: Lexicon,
) -> tuple[SideView, SideView, list[FamilyPair], list[Family], list[Family]]:
    """Families that found no partner and are stacked nowhere are dissolved: their modules compete one by one, so that
    no other module takes a place only because its true owner was not there to compete."""
    loose_t = _lost(left_t, pairs, torch, flax, True)
    loose_f = _lost(left_f, pairs, torch, flax, False)
    if not loose_t and not loose_f:
        return torch, flax, pairs, left_t, left_f
    # Blocks of two kinds may be stacked apart: dense layers here, layers with experts there.
    exact_t = view(ends.torch, ends.torch_side, ends.torch_skip, exact=loose_t) if loose_t else torch
    exact_f = view(ends.flax, ends.flax_side, ends.flax_skip, exact=loose_f) if loose_f else flax
    apart = _families(exact_t, exact_f, lex, ends.anchors)
    if not _lost(apart[1], apart[0], exact_t, exact_f, True) and not _lost(apart[2], apart[0], exact_t, exact_f, False):
        return exact_t, exact_f, *apart
    torch = view(ends.torch, ends.torch_side, ends.torch_skip, loose=loose_t)
    flax = view(ends.flax, ends.flax_side, ends.flax_skip, loose=loose_f)
    return torch, flax, *_families(torch, flax, lex, ends.anchors)


def _lost(
    left: list[Family], pairs: list[FamilyPair], torch: SideView, flax: SideView, torch_side: bool
) -> frozenset[tuple[Token, ...]]:
    """The prefixes of small families that no scope of the other side keeps stacked."""
    partners: dict[tuple[Token, ...], list[Module]] = {(): (flax if torch_side else torch).families[0].modules}
    for pair in pairs:
        mine, other = (pair.torch, pair.flax) if torch_side else (pair.flax, pair.torch)
        partners.setdefault(mine.prefix, other.modules)
    pending = {family.prefix for family in left}
    out: set[tuple[Token, ...]] = set()
    for family in left:
        outer = outer_prefix(family.prefix)
        made = virtual(family)
        stands = made is not None and (outer in pending or stackable(made, partners.get(outer, [])))
        if not stands and len(family.keys) <= _FEW:
            out.add(family.prefix)
    return frozenset(out)


def _families(
    torch: SideView, flax: SideView, lex: Lexicon, anchors: Mapping[str, str]
) -> tuple[list[FamilyPair], list[Family], list[Family]]:
    known: dict[int, set[int]] = {}
    if anchors:
        left, right = _owners(torch.families[1:], set(anchors)), _owners(flax.families[1:], set(anchors.values()))
        for path, other in anchors.items():
            if path in left and other in right:
                known.setdefault(id(left[path]), set()).add(id(right[other]))
    return pair_families(torch.families[1:], flax.families[1:], lex, known)


def _owners(families: Iterable[Family], wanted: set[str]) -> dict[str, Family]:
    return {
        path: family
        for family in families
        for module in family.modules
        for column in module.roles.values()
        for paths in column.paths.values()
        for path in paths
        if path in wanted
    }


def _name_ties(torch: SideView, ends: Ends) -> None:
    """Give the module of a tied tensor its other names."""
    if not ends.aliases:
        return
    for family in torch.families:
        for module in family.modules:
            for column in module.roles.values():
                for paths in column.paths.values():
                    for name in ends.aliases.get(paths[0], ())[1:]:
                        module.alias.append(tokens_of(name, ends.torch_side))


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


def _settle(scope: Scope, ends: Ends) -> Settled:
    pairs = candidates(scope)
    trusted = not out_of_order(pairs)
    if not trusted:
        pairs = candidates(scope, numbers=False)
    for pair in pairs if ends.kinds else ():
        pair.blocked = pair.blocked or ends.kinds.clash(pair)
    forced = _forced(scope, pairs, ends.anchors) if ends.anchors else []
    taken, board = decide(pairs, scope.root, lambda open_, done: in_order(open_, pairs, done, scope, trusted), forced)
    return Settled(scope, taken, board)


def _settle_kinds(scope: Scope, ends: Ends) -> list[Settled]:
    """The scope settled as a whole; where that leaves something over and its blocks are of several kinds, kind by kind,
    if that leaves less."""
    whole = _settle(scope, ends)
    if scope.root or not _open(whole):
        return [whole]
    kinds = by_kind(scope)
    if len(kinds) < 2 or len(kinds) > _KINDS:
        return [whole]
    apart = [_settle(kind, ends) for kind in kinds]
    return apart if sum(map(_open, apart)) < _open(whole) else [whole]


_KINDS = 8  # kinds of blocks in one family beyond which the numbers say nothing


def _open(item: Settled) -> int:
    """Leaves of either side that found no partner, fused ones among them."""
    done = {id(m) for pair in item.taken for m in (pair.torch, pair.flax)}
    left = [m for m in (*item.scope.torch, *item.scope.flax) if id(m) not in done]
    partly = [
        c for pair in item.taken if not pair.whole for c in (*pair.torch.roles.values(), *pair.flax.roles.values())
    ]
    return sum(len(c.paths) for m in left for c in m.roles.values()) + len(partly)


def _settle_apart(settled: list[Settled], root: Scope, ends: Ends) -> Settled | None:
    """What only one instance of a family holds (a bias table in the first block) may stand outside of the blocks on the
    other side: what is left of both is matched once more, numbers as parts of the names."""
    left: list[Module] = []
    right: list[Module] = []
    origin: dict[int, tuple[Settled, Module, bool]] = {}
    for item in settled:
        done = {id(m) for pair in item.taken for m in (pair.torch, pair.flax)}
        for modules, out, torch in ((item.scope.torch, left, True), (item.scope.flax, right, False)):
            for module in modules:
                if id(module) in done:
                    continue
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


def _forced(scope: Scope, pairs: list[Pair], anchors: Mapping[str, str]) -> list[Pair]:
    """The pairs that the rules settle by one of their leaves."""
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
            path = next((p for paths in column.paths.values() for p in paths if p in anchors), None)
            other = flax.get(anchors[path]) if path is not None else None
            if other is None or id(module) in seen or id(other) in seen:
                continue
            pair = known.get((id(module), id(other))) or fit(module, other, dict(scope.keys), scope.same)
            pair = pair or Pair(module, other, [], False)
            pair.links = [link for link in pair.links if not _settled(link, anchors)]
            pair.why, pair.blocked = "beside a leaf that the rules settle", ""
            out.append(pair)
            seen |= {id(module), id(other)}
    return out


def _settled(link: Link, anchors: Mapping[str, str]) -> bool:
    return any(path in anchors for paths in link.torch.paths.values() for path in paths)


def _group(item: Settled, ends: Ends) -> None:
    """Find fused modules among what has no partner, and take them off the board."""
    scope = item.scope
    done = {id(m) for pair in item.taken for m in (pair.torch, pair.flax)}
    torch = [m for m in scope.torch if id(m) not in done]
    flax = [m for m in scope.flax if id(m) not in done]
    if not torch or not flax:
        return
    item.groups = find_groups(scope, torch, flax, ends.styles, ends.heads)
    for group in item.groups:
        item.board.drop(group.torch, group.flax)


def open_links(item: Settled) -> list[tuple[Pair, Link, Choice]]:
    """Leaves of taken pairs whose reading nothing decides."""
    out: list[tuple[Pair, Link, Choice]] = []
    for pair in item.taken:
        for link in pair.links:
            choice = item.choices[id(link)]
            if choice.label is None:
                out.append((pair, link, choice))
    return out
