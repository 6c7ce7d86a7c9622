"""Groups: several modules of one side are one module of the other (q, k, v in one Linear; gate and up)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from graftax.layers.fused import FusedWay, fused_ways
from graftax.match.assign import siblings
from graftax.match.orders import path_of
from graftax.match.pairs import Pair, Scope
from graftax.match.part_order import said_order
from graftax.match.sides import Column, Key, Module, Shape
from graftax.ops import Concat, Op, Rearrange, Split, Stack, Unstack
from graftax.tree import split_words

PARTS: tuple[tuple[str, ...], ...] = (("q", "k", "v"), ("k", "v"), ("gate", "up"))
"""Parts, in the order of their letters in the fused module's name."""
_FUSED = {("q", "k", "v"): ("qkv",), ("k", "v"): ("kv",), ("gate", "up"): ("gate", "up")}
_BARE = (("in", "proj", "weight"), ("in", "proj", "bias"))

LAYERS = "layers"
"""Stands in the keys of a variant for the index that counts layers."""


@dataclass(slots=True, eq=False)
class GroupLink:
    """One role of a group: the columns, and the ops by variant (`block`, `interleaved`, `stack 0`) for every shape,
    and what a rule states of each variant."""

    torch: tuple[Column, ...]
    flax: tuple[Column, ...]
    variants: dict[str, dict[Key, tuple[Op, ...]]]
    ways: dict[str, FusedWay] = field(default_factory=dict[str, FusedWay])
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
    scope: Scope,
    torch: Sequence[Module],
    flax: Sequence[Module],
    styles: Mapping[str, Style],
    heads: int | None,
    axis: int | None,
    taken: Sequence[Pair] = (),
) -> list[Group]:
    """Groups among modules without a partner; of several that fit, those beside which `taken` modules are paired.
    `styles`: for torch modules, the layout of the parts that a rule states for another leaf; `heads`: the head
    count, if config.json states it; `axis`: the axis on which this scope is stacked, if it is known."""
    out: list[Group] = []
    if scope.same:
        return out
    known = frozenset[object]().union(*(siblings(pair.torch, pair.flax) for pair in taken))
    for parts in PARTS:
        for fused_torch in (True, False):
            many, one = (flax, torch) if fused_torch else (torch, flax)
            done = {id(m) for group in out for m in (*group.torch, *group.flax)}
            sets = _part_sets([m for m in many if id(m) not in done], parts, scope)
            ones = [m for m in one if id(m) not in done and _is_fused(m, parts, scope)]
            fits: list[Group] = []
            for module in ones:
                order = _order(module, parts)
                for found in sets:
                    members = _as_ruled(tuple(found[i] for i in order), module, styles, fused_torch)
                    left, right = ((module,), members) if fused_torch else (members, (module,))
                    alternate = 0 if parts == ("gate", "up") else heads
                    group = _group(scope, left, right, styles, alternate, axis)
                    if group is not None:
                        fits.append(group)
            alone = _apart(fits)
            out += alone or _apart([g for g in fits if siblings(g.torch[0], g.flax[0]) & known])
    return out


def _apart(fits: Sequence[Group]) -> list[Group]:
    """The groups that share no module with another."""
    counts = Counter(id(module) for group in fits for module in (*group.torch, *group.flax))
    return [g for g in fits if all(counts[id(m)] == 1 for m in (*g.torch, *g.flax))]


def _part_sets(modules: Iterable[Module], parts: tuple[str, ...], scope: Scope) -> list[tuple[Module, ...]]:
    """Sets of modules whose paths differ only in the word for the part, in the order of the parts."""
    found: defaultdict[tuple[object, ...], dict[str, Module]] = defaultdict(dict)
    for module in modules:
        for i, token in enumerate(module.tokens):
            concept = scope.lex.synonyms.get(token, ()) if isinstance(token, str) else ()
            part = next((p for p in parts if p in concept), None)
            if part is not None:
                found[(*module.tokens[:i], "*", *module.tokens[i + 1 :])][part] = module
        if module.tokens and isinstance(module.tokens[-1], int):  # wi_0 and wi_1
            said = scope.name(module).concepts.intersection(parts)
            found[(*module.tokens[:-1], "*")] |= dict.fromkeys(said, module) if len(said) == 1 else {}
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
        (styles[o] for m in ((module,) if fused_torch else members) if (o := owner(path_of(m))) in styles), None
    )
    if style is None:
        return members
    by_owner = {owner(path_of(member)): member for member in members}
    if by_owner.keys() != set(style.parts):
        return members
    return tuple(by_owner[name] for name in style.parts)


def _is_fused(module: Module, parts: tuple[str, ...], scope: Scope) -> bool:
    concepts = scope.name(module).concepts
    if any(word in concepts for word in _FUSED[parts]):
        return True
    return parts == ("q", "k", "v") and {"in", "proj"} <= concepts and bool(module.raw or "attn" in concepts)


def _group(
    scope: Scope,
    torch: tuple[Module, ...],
    flax: tuple[Module, ...],
    styles: Mapping[str, Style],
    heads: int | None,
    axis: int | None,
) -> Group | None:
    group = Group(torch, flax)
    to_flax = dict(scope.keys)
    style = styles.get(owner(path_of(torch[0])))
    heads = (style.heads if style is not None else None) or heads
    for role in [role for role in ("weight", "value", "bias") if role in torch[0].roles]:
        left = [m.roles.get(role) for m in torch]
        right = [m.roles.get(role) or (m.roles.get("weight" if role == "value" else "value")) for m in flax]
        if None in left or None in right:
            return None
        link = _link(tuple(c for c in left if c), tuple(c for c in right if c), to_flax, heads, axis)
        if link is None:
            return None
        if heads != 0:  # a split weight shows the heads of the queries
            heads = next((way.heads for way in link.ways.values() if way.heads), heads)
        _know(link, torch[0], flax[0], style)
        group.links.append(link)
    return group if group.links else None


_EINSUM = "einsum"


def _know(link: GroupLink, module: Module, other: Module, style: Style | None) -> None:
    if len(link.variants) == 1:
        (link.known,) = link.variants
        if link.known.startswith(("block", "interleaved")):
            link.known = ""
    stacks = all(label.startswith("stack ") and "layers" not in label for label in link.variants)
    if stacks and "stack 0" in link.variants and _EINSUM in (*module.tokens, *other.tokens):
        link.known = "stack 0"  # an einsum over several parts has the parts first: `...,scd->s...d`
    if split_words(link.torch[0].leaf)[-3:] in _BARE and "block" in link.variants:
        link.known = "block"
    if style is not None:
        said = [label for label in link.variants if label.startswith(style.form)]
        link.known = said[0] if len(said) == 1 else ""


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
    torch: tuple[Column, ...], flax: tuple[Column, ...], to_flax: dict[Key, Key], heads: int | None, axis: int | None
) -> GroupLink | None:
    stacks = {c.stack for c in torch}, {c.stack for c in flax}
    if any(len(found) > 1 or len(next(iter(found))) > 1 for found in stacks) or all(
        () not in found for found in stacks
    ):
        return None
    layers = next(iter(next(iter(stacks[0]))), 0), next(iter(next(iter(stacks[1]))), 0)
    link = GroupLink(torch, flax, {})
    for count, key in enumerate(torch[0].shapes):
        other = to_flax.get(key)
        if other is None or any(key not in c.shapes for c in torch) or any(other not in c.shapes for c in flax):
            return None
        shapes = tuple(c.shapes[key] for c in torch), tuple(c.shapes[other] for c in flax)
        found = _stacked(shapes, layers, heads, flax[0].kind == "kernel", axis)
        link.variants = {label: link.variants.get(label, {}) for label in found if not count or label in link.variants}
        for label, chains in link.variants.items():
            chains[key], link.ways[label] = found[label].ops, found[label]
        if not link.variants:
            return None
    return link if link.variants else None


def _stacked(
    shapes: tuple[tuple[Shape, ...], tuple[Shape, ...]],
    layers: tuple[int, int],
    heads: int | None,
    kernel: bool,
    axis: int | None,
) -> dict[str, FusedWay]:
    """The ways between tensors of which one side may hold several layers: `layers`, the number of single leaves on each
    side for one leaf of the other; `axis`: the axis that counts them, if it is known."""
    if not any(layers):
        return fused_ways(*shapes, heads, kernel)
    out: dict[str, FusedWay] = {}
    count, wide = max(layers), shapes[1 if layers[0] else 0]
    places: set[int | None] = set()
    rank = min(map(len, wide))
    known = None if axis is None else axis % rank
    for at in sorted(range(rank), key=lambda at: at != known):
        if any(shape[at] != count for shape in wide) or (known in places and at != known):
            continue
        inner = tuple((*shape[:at], *shape[at + 1 :]) for shape in wide)
        ends = (shapes[0], inner) if layers[0] else (inner, shapes[1])
        for label, way in fused_ways(*ends, heads, kernel).items():
            if way.stack and bool(layers[0]) == (len(shapes[0]) == 1):
                continue  # one side counts layers, the other parts: no rule says this
            stack = {LAYERS: at, **{name: n + (n >= at) for name, n in way.stack.items()}}
            ops = (*way.ops, Stack(at, count)) if layers[0] else (Unstack(at, count), *way.ops)
            name = label if label not in out else f"{label}, layers on axis {at}"
            out[name] = FusedWay(ops, way.keys, stack)
            places.add(at)
    return out
