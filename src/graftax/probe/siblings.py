"""Tensors at one place of sibling modules: the experts of a layer, the same projection of every layer."""

from __future__ import annotations

from typing import Any

from graftax.probe.record import Record


def siblings_of(record: Record) -> list[list[int]]:
    """Lists of sources, in order, of one shape at one place of modules of one parent. Names are not read: a place is
    the position of each part of a key among the parts that occur there."""
    whole = [(n, s) for n, s in enumerate(record.sources) if s.how == "tensor" and s.rows is None]
    children: dict[str, dict[str, int]] = {}
    groups: dict[Any, list[tuple[int, int]]] = {}
    for n, source in whole:
        above, address = "", []
        for part in source.keys[0].split("."):
            row = children.setdefault(above, {})
            address.append(row.setdefault(part, len(row)))
            above = f"{above}.{part}" if above else part
        for place in range(len(address) - 1):
            key = place, (*address[:place], *address[place + 1 :]), source.array.shape
            groups.setdefault(key, []).append((address[place], n))
    return [[n for _, n in sorted(group)] for group in groups.values() if len(group) > 1]
