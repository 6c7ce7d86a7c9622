"""Groups: several modules of one side are one module of the other (q, k, v in one Linear; gate and up)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from graftax.layers.readings import LeafKinds, named
from graftax.match.pairs import Scope
from graftax.match.part_order import said_order
from graftax.match.sides import Column, Key, Module, Shape
from graftax.ops import Concat, Op, Rearrange, Split, Stack
from graftax.rules.fuse import join_groups, split_groups
from graftax.tree import split_words

PARTS: tuple[tuple[str, ...], ...] = (("q", "k", "v"), ("k", "v"), ("gate", "up"))
"""Parts, in the order of their letters in the fused module's name."""
_FUSED = {("q", "k", "v"): ("qkv",), ("k", "v"): ("kv",), ("gate", "up"): ("gate",)}
_BARE = (("in", "proj", "weight"), ("in", "proj", "bias"))

Variants = dict[str, tuple[Op, ...]]


@dataclass(slots=True, eq=False)
class GroupLink:
    """One role of a group: the columns, and the ops by variant (`block`, `interleaved`, `stack 0`) for every shape."""

    torch: tuple[Column, ...]
    flax: tuple[Column, ...]
    variants: dict[str, dict[Key, tuple[Op, ...]]]
    known: str = ""


@dataclass(frozen=True, slots=True)
class Style:
    """How a rule lays out the parts of a fused tensor: `block` or `interleaved`, the heads of the first part if they
    are interleaved, and the modules of the parts in their order."""

    form: str
    heads: int | None
    parts: tuple[str, ...]


@dataclass(slots=True, eq=False)
class Group:
    """A fused module and its parts."""

    torch: tuple[Module, ...]
    flax: tuple[Module, ...]
    links: list[GroupLink] = field(default_factory=list[GroupLink])


def find_groups(
    scope: Scope, torch: Sequence[Module], flax: Sequence[Module], styles: Mapping[str, Style], heads: int | None
) -> list[Group]:
    """Groups among modules without a partner. `styles`: for torch modules, the layout of the parts that a rule states
    for another leaf; `heads`: the head count, if config.json states it."""
    out: list[Group] = []
    if scope.same:
        return out
    for parts in PARTS:
        for fused_torch in (True, False):
            many, one = (flax, torch) if fused_torch else (torch, flax)
            done = {id(m) for group in out for m in (*group.torch, *group.flax)}
            sets = _part_sets([m for m in many if id(m) not in done], parts, scope, not fused_torch)
            ones = [m for m in one if id(m) not in done and _is_fused(m, parts, scope, fused_torch)]
            fits: list[Group] = []
            for module in ones:
                order = _order(module, parts)
                for found in sets:
                    members = _as_ruled(tuple(found[i] for i in order), module, styles, fused_torch)
                    left, right = ((module,), members) if fused_torch else (members, (module,))
                    group = _group(scope, left, right, styles, heads)
                    if group is not None:
                        fits.append(group)
            counts: defaultdict[int, int] = defaultdict(int)
            for group in fits:
                for module in (*group.torch, *group.flax):
                    counts[id(module)] += 1
            out += [g for g in fits if all(counts[id(m)] == 1 for m in (*g.torch, *g.flax))]
    return out


def _part_sets(
    modules: Iterable[Module], parts: tuple[str, ...], scope: Scope, torch: bool
) -> list[tuple[Module, ...]]:
    """Sets of modules whose paths differ only in the word for the part, in the order of the parts."""
    found: defaultdict[tuple[object, ...], dict[str, Module]] = defaultdict(dict)
    for module in modules:
        for i, token in enumerate(module.tokens):
            concept = scope.lex.synonyms.get(token, ()) if isinstance(token, str) else ()
            part = next((p for p in parts if p in concept), None)
            if part is not None:
                found[(*module.tokens[:i], "*", *module.tokens[i + 1 :])][part] = module
    return [tuple(members[p] for p in parts) for members in found.values() if set(members) == set(parts)]


def _order(module: Module, parts: tuple[str, ...]) -> list[int]:
    """The order of the parts in the fused module's name, if it lists all of them: `up_gate` holds up first."""
    found = said_order(module)
    return [parts.index(p) for p in found] if set(found) == set(parts) else list(range(len(parts)))


def _as_ruled(
    members: tuple[Module, ...], module: Module, styles: Mapping[str, Style], fused_torch: bool
) -> tuple[Module, ...]:
    """The parts in the order that a rule states for another leaf of the module."""
    style = next(
        (styles[o] for m in ((module,) if fused_torch else members) if (o := owner(_first(m))) in styles), None
    )
    if style is None:
        return members
    by_owner = {owner(_first(member)): member for member in members}
    if by_owner.keys() != set(style.parts):
        return members
    return tuple(by_owner[name] for name in style.parts)


def _first(module: Module) -> str:
    column = next(iter(module.roles.values()))
    return next(iter(column.paths.values()))[0]


def _is_fused(module: Module, parts: tuple[str, ...], scope: Scope, torch: bool) -> bool:
    concepts = scope.name(module, torch).concepts
    if any(word in concepts for word in _FUSED[parts]):
        return True
    return parts == ("q", "k", "v") and {"in", "proj"} <= concepts and bool(module.raw or "attn" in concepts)


def _group(
    scope: Scope, torch: tuple[Module, ...], flax: tuple[Module, ...], styles: Mapping[str, Style], heads: int | None
) -> Group | None:
    group = Group(torch, flax)
    to_flax = dict(scope.keys)
    style = styles.get(owner(_first(torch[0])))
    heads = (style.heads if style is not None else None) or _shown_heads(torch, flax) or heads
    roles = [role for role in torch[0].roles if role in ("weight", "bias", "value")]
    for role in roles:
        left = [m.roles.get(role) for m in torch]
        right = [m.roles.get(role) or (m.roles.get("weight" if role == "value" else "value")) for m in flax]
        if any(c is None or c.stack for c in (*left, *right)):
            return None
        link = _link(role, tuple(c for c in left if c), tuple(c for c in right if c), to_flax, heads)
        if link is None:
            return None
        _know(link, torch[0], flax[0], style)
        group.links.append(link)
    return group if group.links else None


def _shown_heads(torch: tuple[Module, ...], flax: tuple[Module, ...]) -> int | None:
    """The heads of the first part (the queries, if keys have fewer), if a part that is split into heads shows them. The
    axes are those that `_part_ops` takes."""
    if len(torch) != 1 or "weight" not in torch[0].roles or "weight" not in flax[0].roles:
        return None
    source = next(iter(torch[0].roles["weight"].shapes.values()))
    shape = next(iter(flax[0].roles["weight"].shapes.values()))
    split = len(source) == 2 and len(shape) == 3
    places = [h for i, h in ((0, 1), (2, 0), (1, 0)) if split and shape[i] == source[-1]]
    return shape[places[0]] if places else None


_EINSUM = "einsum"


def _know(link: GroupLink, module: Module, other: Module, style: Style | None) -> None:
    if len(link.variants) == 1:
        (link.known,) = link.variants
        if link.known in ("block", "interleaved"):
            link.known = ""
    stacks = all(label.startswith("stack ") for label in link.variants)
    if stacks and "stack 0" in link.variants and _EINSUM in (*module.tokens, *other.tokens):
        link.known = "stack 0"  # an einsum over several parts has the parts first: `...,scd->s...d`
    if split_words(link.torch[0].leaf)[-3:] in _BARE and "block" in link.variants:
        link.known = "block"
    if style is not None:
        link.known = style.form if style.form in link.variants else ""


_LEAVES = ("weight", "kernel", "bias")


def owner(path: str) -> str:
    """The path that a leaf belongs to, also for bare parameters such as in_proj_weight."""
    for leaf in _LEAVES:
        path = path.removesuffix(leaf)
    return path.rstrip("._/")


def heads_of(ops: Sequence[Op]) -> int | None:
    """The heads of the first part, read from ops that interleave: (h t d), or groups of heads (g s d)."""
    for op in ops:
        sizes = dict(op.sizes) if isinstance(op, Rearrange) else {}
        if {"h", "t"} <= sizes.keys():
            return sizes["h"]
        if "g" in sizes:
            parts = next(step.sizes for step in ops if isinstance(step, (Split, Concat)))
            return sizes["g"] * parts[0]
    return None


def _link(
    role: str, torch: tuple[Column, ...], flax: tuple[Column, ...], to_flax: dict[Key, Key], heads: int | None
) -> GroupLink | None:
    variants: dict[str, dict[Key, tuple[Op, ...]]] | None = None
    cache: dict[tuple[object, ...], Variants] = {}
    count = 0
    for key in torch[0].shapes:
        other = to_flax.get(key)
        if other is None or any(key not in c.shapes for c in torch) or any(other not in c.shapes for c in flax):
            return None
        left, right = tuple(c.shapes[key] for c in torch), tuple(c.shapes[other] for c in flax)
        found = cache.get((left, right))
        if found is None:
            facts = LeafKinds("bias" if role == "bias" else "weight", torch[0].kind, flax[0].kind)
            found = _split(left[0], right, facts, heads) if len(left) == 1 else _join(left, right[0], facts, heads)
            cache[(left, right)] = found
        count += 1
        if variants is None:
            variants = {label: {} for label in found}
        variants = {label: chains for label, chains in variants.items() if label in found}
        for label, chains in variants.items():
            chains[key] = found[label]
        if not variants:
            return None
    return GroupLink(torch, flax, variants or {}) if count else None


def _part_ops(source: Sequence[Shape], target: Sequence[Shape], facts: LeafKinds) -> tuple[Op, ...] | None:
    """One chain that takes every part to its own shape."""
    common: set[str] | None = None
    table = [named(s, t, facts) for s, t in zip(source, target, strict=True)]
    for found in table:
        names = {n for n in found if n in ("linear", "reshape") or n.startswith("(h d) i") or not n or n == "identity"}
        common = names if common is None else common & names
    for label in ("linear", "(h d) i -> i h d", "(h d) i -> h d i", "(h d) i -> h i d", "identity"):
        if label in (common or ()):
            return _common_chain([found[label] for found in table])
    if "reshape" in (common or ()):
        return _common_chain([found["reshape"] for found in table])
    return None


def _common_chain(chains: list[tuple[Op, ...]]) -> tuple[Op, ...] | None:
    """One chain that does to each part what its own chain does. It keeps the sizes that all parts share."""
    if any(chain != chains[0] for chain in chains):
        first = chains[0][0]
        if any(len(chain) != 1 or not isinstance(chain[0], Rearrange) for chain in chains):
            return None
        ops = [chain[0] for chain in chains if isinstance(chain[0], Rearrange)]
        assert isinstance(first, Rearrange)
        if len({op.pattern for op in ops}) != 1:
            return None
        shared = set(ops[0].sizes)
        for op in ops[1:]:
            shared &= set(op.sizes)
        return (Rearrange(first.pattern, tuple(sorted(shared))),)
    return chains[0]


def _split(source: Shape, targets: Sequence[Shape], facts: LeafKinds, heads: int | None) -> Variants:
    """One torch tensor -> its parts: blocks along the outputs, or interleaved by heads."""
    out: Variants = {}
    sizes = [math.prod(t) for t in targets]
    for axis in range(min(len(source), 2)):
        rest = math.prod(source) // source[axis]
        if any(n % rest for n in sizes) or sum(sizes) != math.prod(source):
            continue
        rows = tuple(n // rest for n in sizes)
        pieces = [(*source[:axis], n, *source[axis + 1 :]) for n in rows]
        inner = _part_ops(pieces, targets, facts)
        if inner is None:
            continue
        if axis == 1 and inner != ():
            continue
        out["block"] = (Split(axis, rows), *inner)
        if heads and rows[0] % heads == 0:
            dim = rows[0] // heads
            if len(set(rows)) == 1:
                out["interleaved"] = (_weave(len(source), axis, heads, len(targets), dim), Split(axis, rows), *inner)
            elif rows[1] == rows[-1] and rows[1] % dim == 0 and heads % (rows[1] // dim) == 0:
                parts = (heads * dim // rows[1], *(1,) * (len(rows) - 1))
                out["interleaved"] = (*split_groups(axis, len(source), rows[1] // dim, parts, dim), *inner)
        return out
    return out


def _weave(rank: int, axis: int, heads: int, parts: int, dim: int) -> Rearrange:
    """Rows interleaved by heads -> rows in blocks."""
    names = [f"a{n}" for n in range(rank)]
    left, right = list(names), list(names)
    left[axis], right[axis] = "(h t d)", "(t h d)"
    return Rearrange(f"{' '.join(left)} -> {' '.join(right)}", (("d", dim), ("h", heads), ("t", parts)))


def _join(sources: Sequence[Shape], target: Shape, facts: LeafKinds, heads: int | None) -> Variants:
    """Parts -> one Flax leaf: stacked on an axis of their own, or side by side along the outputs."""
    out: Variants = {}
    count = len(sources)
    if len(set(sources)) == 1:
        for axis, extent in enumerate(target):
            if extent == count:
                inner_shape = target[:axis] + target[axis + 1 :]
                inner = _part_ops(sources, [inner_shape] * count, facts)
                if inner is not None:
                    out[f"stack {axis}"] = (*inner, Stack(axis, count))
    if len(target) == len(sources[0]) and len(target) <= 2:
        rows = tuple(s[0] for s in sources)
        rest = sources[0][1:]
        if target == (*rest, sum(rows)):
            order: tuple[Op, ...] = (Rearrange("o i -> i o"),) if rest else ()
            axis = len(rest)
            out["block"] = (*order, Concat(axis, rows))
            if heads and rows[0] % heads == 0:
                dim = rows[0] // heads
                if len(set(rows)) == 1:
                    weave = _weave(len(target), axis, heads, count, dim)
                    out["interleaved"] = (*order, Concat(axis, rows), weave.inverse)
                elif rows[1] == rows[-1] and rows[1] % dim == 0 and heads % (rows[1] // dim) == 0:
                    parts = (heads * dim // rows[1], *(1,) * (count - 1))
                    out["interleaved"] = (*order, *join_groups(axis, len(target), rows[1] // dim, parts, dim))
    return out
