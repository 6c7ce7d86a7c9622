"""Several tensors in one: the ways in which the parts of a fused tensor (query, key and value; gate and up) lie in it.

They lie one after the other along the outputs (in blocks), group by group (interleaved), or on an axis of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from graftax.layers.patterns import PATTERNS, SPLIT_OUT, Readings, Shape, as_it_is, fitted
from graftax.ops import Concat, Op, Rearrange, Split, Stack, Unstack, parse_pattern

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
    if len(sources) == 1:
        return _parted(sources[0], targets, heads, kernel)
    return _joined(sources, targets[0], heads, kernel)


def _parted(source: Shape, targets: Sequence[Shape], heads: int | None, kernel: bool) -> dict[str, FusedWay]:
    out: dict[str, FusedWay] = {}
    count = len(targets)
    for pattern in _patterns(source, targets[0], kernel):
        if out and kernel and len(source) < 3:
            break  # a matrix that becomes a kernel is a Linear's
        axis, rest = _output(pattern, 0), math.prod(source)
        rest //= source[axis]
        sizes = tuple(math.prod(target) // rest for target in targets)
        if sum(sizes) != source[axis] or max(sizes) < 2:
            continue
        pieces = [(*source[:axis], rows, *source[axis + 1 :]) for rows in sizes]
        made = _laid(pattern, pieces, targets)
        if made is not None:
            laid, shown = made
            for label, keys, groups in _forms(sizes, shown or heads):
                ops = split_groups(axis, len(source), *groups) if groups else (Split(axis, sizes),)
                _add(out, label, FusedWay((*ops, *laid), {**keys, **_said(pattern, laid, kernel)}))
    for axis, extent in enumerate(source):
        if extent == count and len(set(targets)) == 1:
            for pattern, laid in _whole((*source[:axis], *source[axis + 1 :]), targets[0], kernel):
                keys = _said(pattern, laid, kernel)
                _add(out, f"stack {axis}", FusedWay((Unstack(axis, count), *laid), keys, {"list": axis}))
                break
    return out


def _joined(sources: Sequence[Shape], target: Shape, heads: int | None, kernel: bool) -> dict[str, FusedWay]:
    out: dict[str, FusedWay] = {}
    count = len(sources)
    for axis, extent in enumerate(target):
        if extent == count and len(set(sources)) == 1:
            for pattern, laid in _whole(sources[0], (*target[:axis], *target[axis + 1 :]), kernel):
                keys = _said(pattern, laid, kernel)
                _add(out, f"stack {axis}", FusedWay((*laid, Stack(axis, count)), keys, {"list": axis}))
                break
    for pattern in _patterns(sources[0], target, kernel):
        if kernel and len(target) < 3 and any(not way.stack for way in out.values()):
            break
        axis, rest = _output(pattern, 1), math.prod(target)
        rest //= target[axis]
        sizes = tuple(math.prod(source) // rest for source in sources)
        if sum(sizes) != target[axis] or max(sizes) < 2:  # one row each is a stack
            continue
        pieces = [(*target[:axis], rows, *target[axis + 1 :]) for rows in sizes]
        made = _laid(pattern, sources, pieces)
        if made is not None:
            laid, shown = made
            for label, keys, groups in _forms(sizes, None if shown else heads):
                ops = join_groups(axis, len(target), *groups) if groups else (Concat(axis, sizes),)
                _add(out, label, FusedWay((*laid, *ops), {**keys, **_said(pattern, laid, kernel)}))
    return out


def _patterns(source: Shape, target: Shape, kernel: bool) -> Iterator[str]:
    """The layouts of a part from a tensor of as many axes as `source` to one of as many as `target`."""
    found = (*(PATTERNS["conv"] if kernel else ()), *_PIECES.get(len(source), ()))
    for pattern in found:
        sides = parse_pattern(pattern)
        if (len(sides[0]), len(sides[1])) == (len(source), len(target)):
            yield pattern


def _output(pattern: str, side: int) -> int:
    """The axis of the outputs: o, or the heads."""
    return next(axis for axis, group in enumerate(parse_pattern(pattern)[side]) if group[0] in ("o", "h"))


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


def _whole(source: Shape, target: Shape, kernel: bool) -> Iterator[tuple[str, tuple[Op, ...]]]:
    """Layouts of a part by itself."""
    for pattern in _patterns(source, target, kernel):
        if (made := _laid(pattern, [source], [target])) is not None:
            yield pattern, made[0]
    plain: Readings = as_it_is(source, target)
    yield from (("", ops) for ops in plain.values())


def _forms(
    sizes: Sequence[int], heads: int | None
) -> Iterator[tuple[str, dict[str, object], tuple[int, tuple[int, ...], int] | None]]:
    """(label, keys of a rule, groups of rows if they are interleaved)"""
    yield "block", {"fused": "block"}, None
    heads = sizes[0] if heads == 0 else heads
    if not heads or sizes[0] % heads or min(sizes) < 1:
        return
    dim = sizes[0] // heads
    groups = min(sizes) // dim
    if groups > 1 and all(rows % (dim * groups) == 0 for rows in sizes):
        parts = tuple(rows // dim // groups for rows in sizes)
        yield "interleaved", {"fused": "interleaved", "heads": heads}, (groups, parts, dim)


def _said(pattern: str, laid: Sequence[Op], kernel: bool) -> dict[str, object]:
    """What a rule states of the layout of a part."""
    if not pattern or (pattern in _PLAIN and (kernel or pattern in ("o -> o", "(h d) -> h d"))):
        return {}
    return {"ops": pattern, **dict(next((op.sizes for op in laid if isinstance(op, Rearrange)), ()))}


def _add(out: dict[str, FusedWay], label: str, way: FusedWay) -> None:
    """The way under its label; a second one of this label names its layout."""
    name = label if label not in out else f"{label}, {way.keys.get('ops', 'linear')}"
    out.setdefault(name, way)


# ---------------------------------------------------------------- groups of rows


def split_groups(axis: int, rank: int, groups: int, parts: tuple[int, ...], dim: int) -> tuple[Op, ...]:
    """One tensor whose axis holds `groups` of `parts` heads of `dim` rows -> its parts, each with its rows in order."""
    apart, together = _grouped(axis, rank)
    return (
        Rearrange(apart.replace("r", "s"), (("d", dim), ("g", groups))),
        Split(axis + 1, parts),
        Rearrange(together, (("d", dim), ("g", groups))),
    )


def join_groups(axis: int, rank: int, groups: int, parts: tuple[int, ...], dim: int) -> tuple[Op, ...]:
    """The inverse of `split_groups`."""
    apart, together = _grouped(axis, rank)
    return (
        Rearrange(apart, (("d", dim), ("g", groups))),
        Concat(axis + 1, parts),
        Rearrange(together.replace("r", "s"), (("d", dim), ("g", groups))),
    )


def _grouped(axis: int, rank: int) -> tuple[str, str]:
    """'(g r d) i -> g r d i' and its inverse, for the axis that holds the parts."""
    rest = [f"a{i}" for i in range(rank)]
    wide, flat = [*rest], [*rest]
    wide[axis], flat[axis] = "g r d", "(g r d)"
    return f"{' '.join(flat)} -> {' '.join(wide)}", f"{' '.join(wide)} -> {' '.join(flat)}"
