"""Repeated blocks of both sides: they are paired, stacked into the scope around them, or asked about."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import islice, permutations

from graftax.match.families import FamilyPair, pair_families
from graftax.match.fits import candidates
from graftax.match.leftovers import cut_to
from graftax.match.match_inputs import Ends
from graftax.match.names import Lexicon, concepts
from graftax.match.pairs import Pair, Scope
from graftax.match.sides import Family, Key, Module, Tokens, columns_of, paths_of, tokens_of
from graftax.match.stacks import outer_prefix, stackable, virtual

Option = list[tuple[Scope, Pair]]
_MOST = 24  # ways to pair blocks that one question offers


@dataclass(slots=True, eq=False)
class Doubt:
    """Blocks that fit several blocks of the other side. `why`: what is not known; `options`: what each way says, with
    a scope and its surest pair for each of its blocks."""

    torch: list[Family]
    flax: list[Family]
    why: str
    options: list[tuple[str, Option]]


@dataclass(slots=True, eq=False)
class View:
    """The families of both sides, what is matched together (the root first), the families of each side without a
    partner, those of which only a part fits where they are stacked, and the blocks that fit several places."""

    torch: list[Family]
    flax: list[Family]
    scopes: list[Scope] = field(default_factory=list[Scope])
    lost: tuple[list[Family], list[Family]] = field(default_factory=lambda: ([], []))
    partly: tuple[list[Family], list[Family]] = field(default_factory=lambda: ([], []))
    doubts: list[Doubt] = field(default_factory=list[Doubt])


def all_families(
    torch: Sequence[Family], flax: Sequence[Family], lex: Lexicon, anchors: Mapping[str, str]
) -> tuple[list[FamilyPair], list[Family], list[Family]]:
    left, right = _owners(torch[1:], anchors.keys()), _owners(flax[1:], set(anchors.values()))
    known = {(id(left[path]), id(right[other])) for path, other in anchors.items() if path in left and other in right}
    return pair_families(list(torch[1:]), list(flax[1:]), lex, known, (torch[0], flax[0]))


def _owners(families: Iterable[Family], wanted: Set[str]) -> dict[str, Family]:
    if not wanted:
        return {}
    return {path: f for f in families for path in paths_of(columns_of(f.modules)) if path in wanted}


def name_ties(torch: Iterable[Family], ends: Ends) -> None:
    """Add the other names of a tied tensor to its module."""
    if not ends.aliases:
        return
    for family in torch:
        for module in family.modules:
            for column in module.roles.values():
                for paths in column.paths.values():
                    for name in ends.aliases.get(paths[0], ())[1:]:
                        module.alias.append(tokens_of(name, ends.torch_side))


# ---------------------------------------------------------------- blocks that fit several places


def find_doubts(torch: list[Family], flax: list[Family], same: bool, lex: Lexicon) -> list[Doubt]:
    """Families without a partner although the other side has blocks of the same number and sizes: the names do not tell
    which."""
    groups: defaultdict[tuple[int, ...], tuple[list[Family], list[Family]]] = defaultdict(lambda: ([], []))
    for families, at in ((torch, 0), (flax, 1)):
        for family in families:
            groups[tuple(family.sizes)][at].append(family)
    out: list[Doubt] = []
    for left, right in groups.values():
        if not left or not right:
            continue
        pairs: dict[tuple[int, int], tuple[Scope, Pair]] = {}
        for family in left:
            for other in right:
                keys = list(zip(family.keys, other.keys, strict=True))
                scope = Scope(family.modules, other.modules, keys, False, same, lex)
                found = surest(scope)
                if found is not None:
                    pairs[(id(family), id(other))] = scope, found
        options = list(islice(_pairings(left, right, pairs), _MOST))
        if pairs:
            why = "several places hold blocks of the same sizes, and their names do not tell which is which"
            out.append(Doubt(left, right, why, options))
    return out


def surest(scope: Scope) -> Pair | None:
    """The likeliest pair of the scope, one with a single reading if there is one."""
    pairs = candidates(scope)
    return max(pairs, key=lambda p: (not p.blocked, all(len(x.labels) == 1 for x in p.links), p.total), default=None)


def _pairings(
    left: list[Family], right: list[Family], pairs: Mapping[tuple[int, int], tuple[Scope, Pair]]
) -> Iterable[tuple[str, Option]]:
    """Every way to pair the fewer families with the others."""
    few, many = (left, right) if len(left) < len(right) else (right, left)
    for picked in permutations(many, len(few)):
        ends = [(a, b) if few is left else (b, a) for a, b in zip(few, picked, strict=True)]
        chosen = [pairs[mark] for a, b in ends if (mark := (id(a), id(b))) in pairs]
        if len(chosen) == len(ends):
            said = ", ".join(f"{prefix_text(a.prefix)} with {prefix_text(b.prefix)}" for a, b in ends)
            yield f"it pairs blocks of the same sizes: {said}", chosen


def prefix_text(prefix: Tokens) -> str:
    return ".".join("*" if isinstance(token, tuple) else str(token) for token in prefix)


# ---------------------------------------------------------------- stacks


@dataclass(slots=True, eq=False)
class _Pending:
    """A family without a partner, with the modules of the families inside it that it holds stacked. `fresh`: it holds
    nothing else."""

    family: Family
    members: list[Family]
    fresh: bool = False

    @property
    def depth(self) -> int:
        return sum(isinstance(token, tuple) for token in self.family.prefix)


@dataclass(slots=True, eq=False)
class Stacks:
    """The scopes of paired families, and into which of them the other families are stacked."""

    root: Scope
    scopes: list[Scope] = field(default_factory=list[Scope])
    around: tuple[dict[Tokens, Scope], dict[Tokens, Scope]] = field(default_factory=lambda: ({}, {}))
    partly: tuple[list[Family], list[Family]] = field(default_factory=lambda: ([], []))

    def __post_init__(self) -> None:
        self._open(self.root, (), ())

    def _open(self, scope: Scope, torch: Tokens, flax: Tokens) -> None:
        self.scopes.append(scope)
        self.around[0].setdefault(torch, scope)
        self.around[1].setdefault(flax, scope)

    def add(self, pair: FamilyPair) -> None:
        """A scope for two paired families."""
        scope = self._scope(pair)
        self._open(scope, pair.torch.prefix, pair.flax.prefix)
        for around, family in zip(self.around, (pair.torch, pair.flax), strict=True):
            around.update(dict.fromkeys(family.lists, scope))

    def _scope(self, pair: FamilyPair) -> Scope:
        return Scope(pair.torch.modules, pair.flax.modules, pair.keys, False, self.root.same, self.root.lex)

    def fill(self, torch: list[Family], flax: list[Family]) -> tuple[list[Family], list[Family]]:
        """Put each unpaired family into the scope around it as stacked modules, the innermost first. Returns the
        families of each side that cannot be stacked."""
        others = list(flax)
        lost_t = self._fill(torch, others, 0)
        lost_f = self._fill(others, lost_t, 1)
        return lost_t, lost_f

    def _fill(self, left: list[Family], others: list[Family], side: int) -> list[Family]:
        """`others`: the families of the other side without a partner; those that get one are removed."""
        work = [_Pending(replace(family), [family]) for family in left]
        pending = {item.family.prefix: item for item in work}
        lost: list[Family] = []
        whole: list[tuple[_Pending, list[Module]]] = []
        while work:
            item = max(work, key=lambda item: item.depth)
            work.remove(item)
            if item.fresh and self._paired(item.family, others, side):
                continue
            outer = outer_prefix(item.family.prefix)
            made = virtual(item.family)
            scope = self.around[side].get(outer)
            if made is None:
                lost += item.members
            elif outer in pending:
                home = pending[outer]
                home.family.modules = [*home.family.modules, *made]
                home.members += item.members
            elif scope is None:
                keys = sorted({key for module in made for key in module.support})
                home = pending[outer] = _Pending(Family(outer, keys, made, [0] * len(keys)), item.members, True)
                work.append(home)
            elif scope is self.root:
                whole.append((item, made))
            else:
                lost += self._into(scope, item, made, side)
        placed = self._with_own_scope(whole, side)
        for item, made in whole:
            lost += [] if item in placed else self._into(self.root, item, made, side)
        return lost

    def _into(self, scope: Scope, item: _Pending, made: list[Module], side: int) -> list[Family]:
        """Add stacked modules to a scope that holds leaves of most of their sizes; else the families are lost."""
        share = stackable(made, scope.torch if side else scope.flax)
        if share <= 0.5:
            return item.members
        self.partly[side].extend(item.members if share < 1 else ())
        mine, theirs = (scope.flax, scope.torch) if side else (scope.torch, scope.flax)
        scope.torch, scope.flax = (theirs, [*mine, *made]) if side else ([*mine, *made], theirs)
        return []

    def _with_own_scope(self, whole: list[tuple[_Pending, list[Module]]], side: int) -> list[_Pending]:
        """A scope of its own for each stack of blocks that is all of one part of the other side's tree: it has as many
        elements, and each of its leaves has the axis. Returns the blocks for which that is true."""
        wanted: defaultdict[tuple[int, int], list[Family]] = defaultdict(list)
        home = {id(made): item for item, made in whole}
        for item, made in whole:
            columns = columns_of(made)
            counts = {column.stack[0] for column in columns}
            if len(counts) == 1:
                mark = counts.pop(), sum(column.size for column in columns)
                wanted[mark].append(Family(item.family.prefix, [()], made, [mark[1]]))
        parts = _parts(self.root.torch if side else self.root.flax) if wanted else []
        out: list[_Pending] = []
        for (count, size), mine in wanted.items():
            theirs = [part for part in parts if part.sizes == [size] and _has_axis(part, count)]
            for stack, part in self._same_parts(mine, theirs, side):
                every = self.root.torch if side else self.root.flax
                taken = {id(module) for module in part.modules}
                left = [module for module in every if id(module) not in taken]
                if len(left) + len(taken) < len(every):
                    continue  # another stack holds some of it
                self.root.torch, self.root.flax = (left, self.root.flax) if side else (self.root.torch, left)
                torch, flax = (_inside(f) for f in ((part, stack) if side else (stack, part)))
                self.scopes.append(self._scope(FamilyPair(torch, flax)))
                out.append(home[id(stack.modules)])
                if _leaf_sizes(part) != _leaf_sizes(stack):
                    self.partly[side].extend(out[-1].members)
        return out

    def _same_parts(self, stacks: list[Family], parts: list[Family], side: int) -> Iterator[tuple[Family, Family]]:
        """Stacks and parts of one size that belong together: by their words and, if several differ only in a number, in
        the order of the numbers."""
        mine, theirs = _by_words(stacks), _by_words(parts)
        firsts = [found[0] for found in mine], [found[0] for found in theirs]
        ends = firsts[::-1] if side else firsts
        for pair in pair_families(ends[0], ends[1], self.root.lex)[0]:
            stack, part = (pair.flax, pair.torch) if side else (pair.torch, pair.flax)
            left = next(found for found in mine if found[0] is stack)
            right = next(found for found in theirs if found[0] is part)
            if len(left) == len(right):
                yield from zip(left, right, strict=True)

    def nest(self, torch: list[Family], flax: list[Family]) -> tuple[list[Family], list[Family]]:
        """Pair blocks with blocks of the same name of which the other side has more, number by number. Returns the
        families that are still without a partner."""
        lex = self.root.lex
        fits = [(a, b, keys) for a in torch for b in flax if (keys := _nested(a, b, lex))]
        uses = Counter(id(family) for a, b, _ in fits for family in (a, b))
        for a, b, keys in fits:
            if uses[id(a)] == uses[id(b)] == 1:
                left, right = (cut_to(family.modules, {key for key, _ in keys}) for family in (a, b))
                self.scopes.append(
                    Scope(left, right, keys, False, self.root.same, lex, "the lists have the same numbers")
                )
                torch, flax = [f for f in torch if f is not a], [f for f in flax if f is not b]
        return torch, flax

    def _paired(self, family: Family, others: list[Family], side: int) -> bool:
        """A new scope for blocks that hold nothing but stacks and the family of the other side that holds the same, if
        one does, or if names tell which."""
        fits = [other for other in others if len(other.keys) == len(family.keys) and _holds(other, family.modules)]
        if len(fits) > 1:
            ends = (fits, [family]) if side else ([family], fits)
            fits = [pair.torch if side else pair.flax for pair in pair_families(*ends, self.root.lex)[0]]
        if len(fits) != 1:
            return False
        others.remove(fits[0])
        both = (fits[0], family) if side else (family, fits[0])
        self.add(FamilyPair(*both))
        return True


def _holds(family: Family, made: list[Module]) -> bool:
    return stackable(made, family.modules) > 0.5


def _nested(torch: Family, flax: Family, lex: Lexicon) -> list[tuple[Key, Key]]:
    """The instances with the same numbers, if one family has all that the other has, of the same sizes, and more after
    them; [] if not."""
    few, many = (torch, flax) if len(torch.keys) < len(flax.keys) else (flax, torch)
    count, first = len(few.keys), many.keys[0][-1]
    same = few.keys == many.keys[:count] and few.sizes == many.sizes[:count] and count < len(many.keys)
    counted = [key[-1] for key in many.keys] == list(range(first, first + len(many.keys)))
    named = set(concepts(few.prefix, lex)) == set(concepts(many.prefix, lex))
    return [(key, key) for key in few.keys] if same and counted and named else []


def _parts(modules: Iterable[Module]) -> list[Family]:
    """The parts of a tree that hold several modules, each once, with the elements that it holds."""
    inside: defaultdict[Tokens, list[Module]] = defaultdict(list)
    for module in modules:
        for cut in module.cuts[:-1]:
            inside[module.tokens[:cut]].append(module)
    found = {tuple(map(id, some)): Family(prefix, [()], some, []) for prefix, some in inside.items() if len(some) > 1}
    for part in found.values():
        part.sizes = [sum(column.size for column in columns_of(part.modules))]
    return list(found.values())


def _leaf_sizes(part: Family) -> Counter[int]:
    return Counter(column.size for column in columns_of(part.modules))


def _by_words(families: Iterable[Family]) -> list[list[Family]]:
    """The families in groups whose prefixes differ only in numbers, in the order of the numbers."""
    out: defaultdict[Tokens, list[Family]] = defaultdict(list)
    for family in families:
        out[tuple(token for token in family.prefix if isinstance(token, str))].append(family)
    return [sorted(some, key=lambda f: [t for t in f.prefix if isinstance(t, int)]) for some in out.values()]


def _inside(part: Family) -> Family:
    """The part with the paths of its modules from there on."""
    depth = len(part.prefix) - isinstance(part.prefix[-1], tuple)
    return replace(part, modules=[_below(module, depth) for module in part.modules])


def _below(module: Module, depth: int) -> Module:
    """The module with a path that begins `depth` tokens further in."""
    cuts = tuple(cut - depth for cut in module.cuts if cut > depth)
    outer, own = (*module.outer, *module.tokens[:depth]), max(module.own - depth, 0)
    return replace(module, tokens=module.tokens[depth:], outer=outer, cuts=cuts, own=own)


def _has_axis(part: Family, extent: int) -> bool:
    """True if every leaf has an axis of this extent."""
    columns = [column for module in part.modules for column in module.roles.values()]
    return all(extent in shape for column in columns for shape in column.shapes.values())
