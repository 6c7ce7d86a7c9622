"""Several tensors in one: the ways in which the parts of a fused tensor (query, key and value; gate and up) lie in it.

They lie one after the other along the outputs (in blocks), group by group (interleaved), or on an axis of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from graftax.layers.patterns import PATTERNS, SPLIT_OUT, Shape, as_it_is, fitted, opened
from graftax.ops import Op, Rearrange, Split, Unstack, invert_chain, parse_pattern

_PIECES: Mapping[int, tuple[str, ...]] = {
    1: ("o -> o", "(h d) -> h d"),
    2: ("o i -> i o", *SPLIT_OUT, "o i -> o i", "i o -> i o", "i (h d) -> i h d"),
    3: ("o i 1 -> i o", "e o i -> e i o", "e o i -> e o i", "e i o -> e i o", "e i o -> e o i"),
}
"""Layouts of one part, the likeliest first: o, or h d, are its outputs; e counts experts."""
_PLAIN = frozenset(("o -> o", "(h d) -> h d", "o i -> i o", SPLIT_OUT[0], "o i 1 -> i o", *PATTERNS["conv"]))
"""Layouts that a rule need not state for a `weight` that becomes a `kernel`."""


@dataclass(frozen=True, slots=True)
class FusedWay:
    """ops: torch -> Flax; keys: what a rule states; stack: what it states of stacked axes, `list` for the parts."""

    ops: tuple[Op, ...]
    keys: Mapping[str, object]
    stack: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def heads(self) -> int | None:
        """How many heads of the first part alternate with those of the others."""
        found = self.keys.get("heads")
        return found if isinstance(found, int) else None


def fused_ways(
    sources: Sequence[Shape], targets: Sequence[Shape], heads: int | None, kernel: bool
) -> dict[str, FusedWay]:
    """Every way from one torch tensor to its parts, or from parts to one Flax leaf, by label. `heads`: how many heads
    the first part has; 0 if the parts may alternate row by row; None if it is not known. `kernel`: Flax has kernels."""
    joins = len(sources) > 1  # the inverse of taking the Flax leaf apart
    whole, parts = (targets[0], sources) if joins else (sources[0], targets)
    out: dict[str, FusedWay] = {}

    def add(label: str, ops: tuple[Op, ...], keys: Mapping[str, object], stack: Mapping[str, int]) -> None:
        name = label if label not in out else f"{label}, {keys.get('ops', 'linear')}"
        out.setdefault(name, FusedWay(invert_chain(ops) if joins else ops, keys, stack))

    for axis, extent in enumerate(whole):
        if extent == len(parts) and len(set(parts)) == 1:
            one = (*whole[:axis], *whole[axis + 1 :])
            ways = ((pattern, _laid(way, [one], parts[:1])) for pattern, way in _patterns(one, parts[0], kernel, joins))
            found = [(pattern, made[0]) for pattern, made in ways if made is not None]
            found += [("", ops) for ops in as_it_is(one, parts[0]).values()]
            for pattern, laid in found[:1]:
                add(f"stack {axis}", (Unstack(axis, extent), *laid), _said(pattern, laid, kernel), {"list": axis})
    stacked = len(out)
    for pattern, way in _patterns(whole, parts[0], kernel, joins):
        if len(out) > stacked and kernel and len(whole) < 3:
            break  # a matrix that becomes a kernel is a Linear's
        axis = next(n for n, group in enumerate(parse_pattern(way)[0]) if group[0] in ("o", "h"))
        rest = math.prod(whole) // whole[axis]
        sizes = tuple(math.prod(part) // rest for part in parts)
        if sum(sizes) != whole[axis] or (max(sizes) < 2 and stacked):  # one row each is a stack
            continue
        made = _laid(way, [(*whole[:axis], rows, *whole[axis + 1 :]) for rows in sizes], parts)
        if made is not None:
            laid, shown = made
            for label, keys, groups in _forms(sizes, (None if joins else shown) if shown else heads):
                cut = split_groups(axis, len(whole), *groups) if groups else (Split(axis, sizes),)
                add(label, (*cut, *laid), {**keys, **_said(pattern, laid, kernel)}, {})
    return out


def _patterns(whole: Shape, part: Shape, kernel: bool, joins: bool) -> Iterator[tuple[str, str]]:
    """(a layout of a part, the same from the fused tensor to the part) for tensors of as many axes as these."""
    rank = len(part if joins else whole)
    for pattern in (*(PATTERNS["conv"] if kernel else ()), *_PIECES.get(rank, ())):
        left, right = pattern.split(" -> ")
        way = f"{right} -> {left}" if joins else pattern
        if tuple(map(len, parse_pattern(way))) == (len(whole), len(part)):
            yield pattern, way


def _laid(pattern: str, sources: Sequence[Shape], targets: Sequence[Shape]) -> tuple[tuple[Op, ...], int | None] | None:
    """One chain that takes every part to its own shape, with the sizes that all parts share, and the heads of the first
    part; None if there is none."""
    made = [fitted(s, t, pattern).get(pattern) for s, t in zip(sources, targets, strict=True)]
    ops = [way[0] for way in made if way is not None and isinstance(way[0], Rearrange)]
    if len(ops) < len(made):
        return None
    left, _, right = pattern.partition(" -> ")
    shared = set(ops[0].sizes).intersection(*(op.sizes for op in ops))
    chain = () if left == right else (Rearrange(pattern, tuple(sorted(shared))),)
    alike = len({dict(op.sizes).get("d") for op in ops}) == 1  # heads of several widths do not alternate
    return chain, dict(ops[0].sizes).get("h") if alike else 1


def _forms(
    sizes: Sequence[int], heads: int | None
) -> Iterator[tuple[str, dict[str, object], tuple[int, tuple[int, ...], int] | None]]:
    """(label, keys of a rule, groups of rows if they are interleaved)"""
    yield "block", {"fused": "block"}, None
    heads = sizes[0] if heads == 0 else heads
    runs = interleaving(sizes, sizes[0] // heads) if heads and sizes[0] % heads == 0 else None
    if runs is not None and runs[0] > 1:
        yield "interleaved", {"fused": "interleaved", "heads": heads}, runs


def _said(pattern: str, laid: Sequence[Op], kernel: bool) -> dict[str, object]:
    """What a rule states of the layout of a part."""
    if not pattern or (pattern in _PLAIN and (kernel or pattern in ("o -> o", "(h d) -> h d"))):
        return {}
    return {"ops": pattern, **dict(next((op.sizes for op in laid if isinstance(op, Rearrange)), ()))}


# ---------------------------------------------------------------- groups of rows


def interleaving(sizes: Sequence[int], dim: int) -> tuple[int, tuple[int, ...], int] | None:
    """(groups, heads of each part in a group, dim) of parts with so many rows, in heads of `dim` rows. (h 3 d) has h
    groups of 1 + 1 + 1. With grouped heads, every group holds heads / kv_heads heads of q, one of k and one of v."""
    groups = min(sizes) // dim if dim else 0
    if not groups or any(size % (dim * groups) for size in sizes):
        return None
    return groups, tuple(size // dim // groups for size in sizes), dim


def split_groups(axis: int, rank: int, groups: int, parts: tuple[int, ...], dim: int) -> tuple[Op, ...]:
    """One tensor whose axis holds `groups` of `parts` heads of `dim` rows -> its parts, each with its rows in order."""
    apart, together = opened(axis, rank, "g r d")
    return (
        Rearrange(apart.replace("r", "s"), (("d", dim), ("g", groups))),
        Split(axis + 1, parts),
        Rearrange(together, (("d", dim), ("g", groups))),
    )
