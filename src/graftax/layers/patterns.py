"""The patterns of the field's layouts, by label, and how a pattern fits two shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from graftax.ops import Flip, Op, Rearrange, groups_text, infer_chain, parse_pattern
from graftax.tree import TensorSpec

Shape = tuple[int, ...]
Readings = dict[str, tuple[Op, ...]]
"""label -> ops"""

SPATIAL = {1: "k", 2: "kh kw", 3: "kd kh kw"}


def _spatial(pattern: str) -> tuple[str, ...]:
    """The pattern with 1, 2 and 3 spatial axes in the place of K."""
    return tuple(pattern.replace("K", axes) for axes in SPATIAL.values())


SPLIT_OUT = ("(h d) i -> i h d", "(h d) i -> h i d", "(h d) i -> h d i")
SPLIT_IN = ("o (h d) -> h d o", "o (h d) -> o h d", "o (h d) -> h o d")
FLIPPED = "conv_transpose default"
LAST, EACH_LAST = "channels last", "channels last in each"
PADDED = ", padded"
"""Ends the label of a reading with other rows of zeros."""
FUSED_ROWS = {"qkv": "fused rows of 3", "kv": "fused rows of 2"}
"""concept -> the reading of a fused tensor whose heads hold all parts; only these names have it"""
FUSED = ("(t h d)", "(h t d)")
"""The rows of a fused tensor: part by part, or head by head."""
PATTERNS: Mapping[str, tuple[str, ...]] = {
    "linear": ("o i -> i o",),
    "conv": _spatial("o i K -> K i o"),
    "conv_transpose": _spatial("i o K -> K o i"),
    FLIPPED: _spatial("i o K -> K i o"),
    "conv 1x1": tuple(p.replace("N", n) for p in ("o i -> N i o", "o i N -> i o") for n in ("1", "1 1", "1 1 1")),
    "window last": _spatial("o i K -> (K i) o"),
    "window first": _spatial("o i K -> (i K) o"),
    LAST: ("c l -> l c", "c h w -> h w c", "c d h w -> d h w c"),
    EACH_LAST: ("n c h w -> n h w c",),
    "swap": ("e a b -> e b a",),
    **{label: tuple(f"(t h d) i -> {order}" for order in ("i h (t d)", "h i (t d)", "h (t d) i"))
       for label in FUSED_ROWS.values()},
}  # fmt: skip
"""Layouts by label. Axes: o out, i in, h heads, d features of a head, t parts of a fused tensor, c channels. A layout
without a word here has its pattern as its label."""


LAYOUTS = ("linear", "conv", "conv_transpose", FLIPPED)
"""Labels that a rule's `layout` can name, beside `identity`."""


def layout_ops(layout: str, rank: int) -> tuple[Op, ...] | None:
    """The ops of a layout that rules name, for a torch tensor of `rank` axes of any shape; None if it has none."""
    if rank < 2 or layout == "identity":
        return ()
    patterns = PATTERNS[layout] if layout in LAYOUTS else ()
    pattern = next((p for p in patterns if len(parse_pattern(p)[0]) == rank), None)
    return None if pattern is None else _made(layout, pattern, rank, ())


def label_of(ops: tuple[Op, ...]) -> str:
    """The label of a chain: the word of a rule's `layout`, or its pattern."""
    if not ops:
        return "identity"
    pattern = next((op.pattern for op in ops if isinstance(op, Rearrange)), "")
    plain = next((label for label in LAYOUTS if label != FLIPPED and pattern in PATTERNS[label]), pattern)
    return plain if len(ops) == 1 else FLIPPED


def _made(label: str, pattern: str, rank: int, sizes: tuple[tuple[str, int], ...]) -> tuple[Op, ...]:
    flip = (Flip(tuple(range(rank - 2))),) if label == FLIPPED else ()
    return (Rearrange(pattern, sizes), *flip)


def fitted(source: Shape, target: Shape, *labels: str, **fixed: int) -> Readings:
    """The layouts under these labels (or patterns) whose patterns fit both shapes, with the sizes that the shapes show.
    `fixed`: sizes that they do not show."""
    out: Readings = {}
    for label in labels:
        for pattern in PATTERNS.get(label, (label,)):
            left, right = parse_pattern(pattern)
            if len(left) == len(source) and len(right) == len(target):
                sizes = _solved((*zip(left, source, strict=True), *zip(right, target, strict=True)), fixed)
                if sizes is not None:
                    out[label] = _made(label, pattern, len(source), sizes)
    return out


def _solved(axes: Sequence[tuple[Sequence[str], int]], fixed: Mapping[str, int]) -> tuple[tuple[str, int], ...] | None:
    """The sizes of the names that axes merge, if every axis has its extent; None if one does not fit."""
    known = {"1": 1, **fixed}
    for group, extent in sorted(axes, key=lambda axis: len(axis[0])):
        open_ = [name for name in group if name not in known]
        rest = math.prod(known.get(name, 1) for name in group)
        if len(open_) > 1 or not rest or extent % rest or (not open_ and rest != extent):
            return None
        known |= dict.fromkeys(open_, extent // rest)
    return tuple(sorted((name, known[name]) for name in {n for group, _ in axes if len(group) > 1 for n in group}))


def as_it_is(source: Shape, target: Shape) -> Readings:
    """Identity, or a reshape that keeps the order of values (axes of length 1, axes split or merged)."""
    if source == target:
        return {"identity": ()}
    pattern = regroup(source, target)
    return {"reshape": pattern} if pattern is not None else {}


def regroup(source: Shape, target: Shape) -> tuple[Rearrange] | None:
    """A row-major reshape as a Rearrange; None if an axis of one shape crosses axes of the other."""
    left, right = [n for n in source if n != 1], [n for n in target if n != 1]
    names: list[tuple[str, int]] = []
    groups: tuple[list[list[str]], list[list[str]]] = ([], [])
    i = j = 0
    while i < len(left) and j < len(right):
        a, b = [left[i]], [right[j]]
        while math.prod(a) != math.prod(b):
            if math.prod(a) < math.prod(b) and i + 1 < len(left):
                i += 1
                a.append(left[i])
            elif math.prod(a) > math.prod(b) and j + 1 < len(right):
                j += 1
                b.append(right[j])
            else:
                return None
        if len(a) > 1 and len(b) > 1:
            return None
        fresh = [f"a{len(names) + n}" for n in range(max(len(a), len(b)))]
        names += list(zip(fresh, a if len(a) > 1 else b, strict=True))
        groups[0].extend([[n] for n in fresh] if len(a) > 1 else [fresh])
        groups[1].extend([[n] for n in fresh] if len(b) > 1 else [fresh])
        i += 1
        j += 1
    if i < len(left) or j < len(right):
        return None
    ends = zip((source, target), map(iter, groups), strict=True)
    sides = [[["1"] if extent == 1 else next(rest) for extent in shape] for shape, rest in ends]
    return (Rearrange(" -> ".join(map(groups_text, sides)), tuple(sorted(names))),)


def opened(axis: int, rank: int, names: str) -> tuple[str, str]:
    """'(g r) a1 -> g r a1' and its inverse: the axis of a tensor that merges several, and these on their own."""
    rest = [f"a{i}" for i in range(rank)]
    wide, flat = [*rest], [*rest]
    wide[axis], flat[axis] = names, f"({names})"
    return f"{' '.join(flat)} -> {' '.join(wide)}", f"{' '.join(wide)} -> {' '.join(flat)}"


def shape_after(ops: Sequence[Op], *shapes: Shape) -> Shape:
    """The shape of the first tensor that `ops` make. Raises LayoutError."""
    return infer_chain(ops, tuple(TensorSpec(shape, "float32") for shape in shapes))[0].shape


def same_effect(a: tuple[Op, ...], b: tuple[Op, ...]) -> bool:
    """True if two chains of bound ops move every value to the same place."""
    if a == b:
        return True
    return all(isinstance(op, Rearrange) for op in (*a, *b)) and _movement(a) == _movement(b)


def _movement(ops: tuple[Op, ...]) -> Any:
    """The effect of a chain of one Rearrange on the axes longer than one: equal movements give equal arrays."""
    if not ops:
        return "identity"
    op = ops[0]
    if len(ops) > 1 or not isinstance(op, Rearrange):
        return ops
    sizes = dict(op.sizes)
    left, right = parse_pattern(op.pattern)
    order = [name for group in left for name in group if sizes.get(name, 1) > 1]
    moved = [name for group in right for name in group if sizes.get(name, 1) > 1]
    if order == moved:
        return "identity"
    return tuple(sizes[name] for name in order), tuple(order.index(name) for name in moved)
