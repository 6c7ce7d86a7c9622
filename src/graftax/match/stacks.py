"""Families without a partner: the other side may store their blocks stacked in one leaf (scanned layers, experts)."""

from __future__ import annotations

import math
from collections import defaultdict

from graftax.match.part_order import said_parts
from graftax.match.sides import Column, Family, Key, Module, Token


def outer_prefix(prefix: tuple[Token, ...]) -> tuple[Token, ...]:
    """The prefix of the family around this one: up to the last number but one that counts blocks."""
    places = [i for i, token in enumerate(prefix) if isinstance(token, tuple)]
    return prefix[: places[-2] + 1] if len(places) > 1 else ()


def virtual(family: Family) -> list[Module] | None:
    """The family's modules as stacked modules of the scope around it; None if the instances differ."""
    outer = outer_prefix(family.prefix)
    inside = family.prefix[len(outer) : -1]
    out: list[Module] = []
    for module in family.modules:
        cuts = tuple(at + len(inside) for at in (0, *module.cuts) if at + len(inside))
        made = Module((*inside, *module.tokens), outer, raw=module.raw, cuts=cuts, own=len(inside) + module.own)
        for role, column in module.roles.items():
            stacked = _stack(column)
            if stacked is None:
                return None
            made.roles[role] = stacked
        out.append(made)
    return out


def _stack(column: Column) -> Column | None:
    groups: defaultdict[Key, list[Key]] = defaultdict(list)
    for key in column.paths:
        groups[key[:-1]].append(key)
    counts = {len(keys) for keys in groups.values()}
    if len(counts) != 1:
        return None
    paths: dict[Key, tuple[str, ...]] = {}
    shapes: dict[Key, tuple[int, ...]] = {}
    for outer, keys in groups.items():
        if len({column.shapes[key] for key in keys}) != 1:
            return None
        ordered = sorted(keys)
        paths[outer] = tuple(path for key in ordered for path in column.paths[key])
        shapes[outer] = column.shapes[ordered[0]]
    return Column(column.role, column.kind, column.leaf, paths, shapes, (counts.pop(), *column.stack))


def stackable(modules: list[Module], others: list[Module]) -> float:
    """The share of the virtual modules for whose leaves the other side has leaves of their sizes; of the sizes of their
    parts, or of the whole of which they are a part, where their names say so."""
    sizes = {math.prod(s) for m in others for c in m.roles.values() for s in set(c.shapes.values())}
    found = [all(_has(c.size, m, sizes) for c in m.roles.values() if c.role != "counter") for m in modules]
    return sum(found) / max(len(found), 1)


def _has(size: int, module: Module, sizes: set[int]) -> bool:
    if size in sizes:
        return True
    parts = said_parts(module)
    if len(parts) > 1:  # the first part may be wider: queries
        rest = len(parts) - 1
        return any(size > one and (size - one) % rest == 0 and (size - one) // rest in sizes for one in sizes)
    return bool(parts) and any(size * count in sizes for count in (2, 3))
