"""Repeated blocks of both sides: they are paired, stacked into the scope around them, dissolved, or asked about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from graftax.match.families import FamilyPair, pair_families
from graftax.match.fits import candidates
from graftax.match.match_inputs import Ends
from graftax.match.names import Lexicon
from graftax.match.pairs import Pair, Scope
from graftax.match.sides import Family, Key, Module, SideView, Token, tokens_of, view
from graftax.match.stacks import outer_prefix, stackable, virtual


@dataclass(slots=True, eq=False)
class Doubt:
    """Blocks that fit several blocks of the other side: for each combination one scope and its likeliest pair."""

    torch: list[Family]
    flax: list[Family]
    options: list[tuple[Scope, Pair]]


def all_families(
    torch: SideView, flax: SideView, lex: Lexicon, anchors: Mapping[str, str]
) -> tuple[list[FamilyPair], list[Family], list[Family]]:
    known: dict[int, set[int]] = {}
    if anchors:
        left, right = _owners(torch.families[1:], set(anchors)), _owners(flax.families[1:], set(anchors.values()))
        for path, other in anchors.items():
            if path in left and other in right:
                known.setdefault(id(left[path]), set()).add(id(right[other]))
    roots = torch.families[0], flax.families[0]
    return pair_families(torch.families[1:], flax.families[1:], lex, known, roots)


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


def name_ties(torch: SideView, ends: Ends) -> None:
    """Add the other names of a tied tensor to its module."""
    if not ends.aliases:
        return
    for family in torch.families:
        for module in family.modules:
            for column in module.roles.values():
                for paths in column.paths.values():
                    for name in ends.aliases.get(paths[0], ())[1:]:
                        module.alias.append(tokens_of(name, ends.torch_side))


def prefixes(families: Iterable[Family]) -> frozenset[tuple[Token, ...]]:
    return frozenset(family.prefix for family in families)


def find_doubts(torch: list[Family], flax: list[Family], same: bool, lex: Lexicon) -> list[Doubt]:
    """Families without a partner although the other side has blocks of the same number and sizes: the names do not tell
    which."""
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


def loosened(
    torch: SideView,
    flax: SideView,
    pairs: list[FamilyPair],
    left_t: list[Family],
    left_f: list[Family],
    ends: Ends,
    lex: Lexicon,
) -> tuple[SideView, SideView, list[FamilyPair], list[Family], list[Family]]:
    """Dissolve the families that have no partner and that nothing stacks. Their modules then compete one by one, so
    that no other module takes a place only because the right module did not compete for it."""
    loose_t = _lost(left_t, left_f, pairs, torch, flax, True)
    loose_f = _lost(left_f, left_t, pairs, torch, flax, False)
    if not loose_t and not loose_f:
        return torch, flax, pairs, left_t, left_f
    # Two kinds of blocks may have a stack each: dense layers in one, layers with experts in the other.
    exact_t = (
        view(ends.torch, ends.torch_side, ends.torch_skip, renames=ends.renames, exact=loose_t) if loose_t else torch
    )
    exact_f = (
        view(ends.flax, ends.flax_side, ends.flax_skip, renames=ends.calls.renames, exact=loose_f) if loose_f else flax
    )
    apart = all_families(exact_t, exact_f, lex, ends.anchors)
    paired, apart_t, apart_f = apart
    still = _lost(apart_t, apart_f, paired, exact_t, exact_f, True) | _lost(
        apart_f, apart_t, paired, exact_t, exact_f, False
    )
    if not still:
        return exact_t, exact_f, *apart
    torch = view(ends.torch, ends.torch_side, ends.torch_skip, renames=ends.renames, loose=loose_t)
    flax = view(ends.flax, ends.flax_side, ends.flax_skip, renames=ends.calls.renames, loose=loose_f)
    return torch, flax, *all_families(torch, flax, lex, ends.anchors)


def _lost(
    left: list[Family], others: list[Family], pairs: list[FamilyPair], torch: SideView, flax: SideView, torch_side: bool
) -> frozenset[tuple[Token, ...]]:
    """The prefixes of small families that no scope of the other side holds stacked."""
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
        if not stands and made is not None and outer and outer not in partners:
            keys = sorted({key for module in made for key in module.support})
            stands = _outer_partner(keys, made, others) is not None
        if not stands and len(family.keys) <= _FEW and not _keeps(family, others):
            out.add(family.prefix)
    return frozenset(out)


def stack_into(
    left: list[Family],
    scopes: dict[tuple[Token, ...], Scope],
    torch_side: bool,
    others: list[Family],
    new: list[Scope],
) -> list[Module]:
    """Put each unpaired family into the scope around it as stacked modules, the innermost first. Return the modules of
    families that cannot be stacked. If the blocks around a family hold nothing else, they may be one of the unpaired
    families of the other side (`others`); then they form a new scope."""
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
            # The family around it holds only this one, so it is stacked further out.
            keys: list[Key] = sorted({key for module in made for key in module.support})
            fresh = Family(outer, keys, made, [0] * len(keys))
            pending[outer] = fresh
            partner = _outer_partner(fresh.keys, made, others)
            if partner is None:
                lost += stack_into([fresh], scopes, torch_side, others, new)
                continue
            others.remove(partner)
            both = (fresh, partner) if torch_side else (partner, fresh)
            root = scopes[()]
            pairs = list(zip(both[0].keys, both[1].keys, strict=True))
            new.append(Scope(both[0].modules, both[1].modules, pairs, False, root.same, root.lex))
        else:
            lost += family.modules
    return lost


def _keeps(family: Family, others: list[Family]) -> bool:
    """True if blocks of this family hold the instances of a family of the other side stacked."""
    for other in others:
        outer = outer_prefix(other.prefix)
        made = virtual(other) if outer else None
        if made is not None:
            keys = sorted({key for module in made for key in module.support})
            if _outer_partner(keys, made, [family]) is not None:
                return True
    return False


def _outer_partner(keys: list[Key], made: list[Module], others: list[Family]) -> Family | None:
    """The only unpaired family of the other side that has as many blocks and holds `made` stacked in them."""
    fits = [family for family in others if len(family.keys) == len(keys) and stackable(made, family.modules)]
    return fits[0] if len(fits) == 1 else None
