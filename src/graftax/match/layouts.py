"""The ops that can turn a leaf of one shape into a leaf of another: every reading that the field knows, by label.

Everything here runs torch -> Flax (or within one side); a plan in the other direction is inverted as a whole. Readings
that a rule can name (`linear`, `identity`, `conv`, `conv_transpose default`) have the labels that rules use.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

from graftax.match.roles import Kind
from graftax.ops import Flip, Op, Rearrange, Stack

Shape = tuple[int, ...]
SPATIAL = {1: "k", 2: "kh kw", 3: "kd kh kw"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a reading may depend on besides shapes: the role, and the kinds of both leaves. `same`: both ends are one
    side."""

    role: str
    torch: Kind
    flax: Kind
    same: bool = False


Readings = dict[str, tuple[Op, ...]]
"""label -> ops"""


@lru_cache(maxsize=65536)
def readings(source: Shape, target: Shape, facts: Facts) -> Readings:
    """Every reading of a torch leaf of shape `source` as a Flax leaf of shape `target`; {} if none is known."""
    if math.prod(source) != math.prod(target):
        return {}
    if facts.same or facts.role in ("bias", "mean", "var", "counter"):
        fused = {} if facts.same or len(source) != 1 or len(target) != 3 or 1 in target else _fused(source, target)
        return fused or {**_as_it_is(source, target), **({} if facts.same else _map_last(source, target))}
    if facts.role in ("g", "v"):
        turned = facts.flax == "kernel" and len(source) == 2 and source == target[::-1]
        linear: Readings = {"linear": (Rearrange("o i -> i o"),)} if turned and facts.role == "v" else {}
        return {**_as_it_is(source, target), **_conv(source, target), **linear}
    out: Readings = {}
    plain = facts.torch == "raw" and facts.flax in ("raw", "free")
    if facts.flax == "norm" or facts.torch == "norm":
        return {**_as_it_is(source, target), **_map_last(source, target)}
    if facts.flax == "embedding":
        return _as_it_is(source, target)
    if min(_rank(source), _rank(target)) < 2 and _rank(source) != _rank(target):
        return {}  # a vector is no table
    if len(source) == 2 and len(target) == 2:
        if source == target:
            out["identity"] = ()
        if source == target[::-1]:
            out["linear"] = (Rearrange("o i -> i o"),)
        return out or (_as_it_is(source, target) if plain else out)
    if len(source) == 2 and len(target) == 3 and 1 not in target:
        out |= _heads(source, target, facts.flax)
    if len(source) == len(target) and 3 <= len(source) <= 5 and facts.torch != "raw":
        out |= _conv(source, target)
        if facts.flax != "kernel" and source == target:
            out["identity"] = ()
        return out
    if len(source) == 2 and 3 <= len(target) <= 5 and target[:-2] == (1,) * (len(target) - 2):
        if target[-2:] == source[::-1]:
            ones = " ".join(["1"] * (len(target) - 2))
            out["conv 1x1"] = (Rearrange(f"o i -> {ones} i o"),)
        if facts.flax != "kernel" and target[-2:] == source:
            out |= _as_it_is(source, target)
        return out
    if 3 <= len(source) <= 5 and len(target) == 2 and facts.torch != "raw":
        return _flat_conv(source, target)
    if len(source) >= 3 and len(source) == len(target) and facts.torch == "raw":
        if source == target:
            out["identity"] = ()
        swapped = (*source[:-2], source[-1], source[-2])
        if swapped == target and len(source) == 3:
            out["swap"] = (Rearrange("e a b -> e b a"),)
        last = _map_last(source, target) if len(source) == 3 else {}
        if len(source) == 4 and target == (source[0], source[2], source[3], source[1]) and _moves(source[1:]):
            last = {"channels last": (Rearrange("n c h w -> n h w c"),)}
        return {**(out or _as_it_is(source, target)), **last}
    if len(source) == 2 and len(target) == 4 and source[1] == target[0] and 1 not in target:
        return _fused(source, target)
    if len(source) == 2 and len(target) == 4 and source[1] == target[3] and 1 not in target:
        found = _fused_first(target)
        if found:
            return found
    if out:
        return out
    return _as_it_is(source, target) if facts.flax != "kernel" or len(source) == 1 else {}


_MAPS = {2: "c l -> l c", 3: "c h w -> h w c", 4: "c d h w -> d h w c"}


def _map_last(source: Shape, target: Shape) -> Readings:
    """A map (C, *spatial) that the other side stores channels last."""
    if target != (*source[1:], *source[:1]) or len(source) not in _MAPS or not _moves(source):
        return {}
    return {"channels last": (Rearrange(_MAPS[len(source)]),)}


def _moves(shape: Shape) -> bool:
    """True if the order of values changes when the first axis becomes the last."""
    return shape[0] > 1 and math.prod(shape[1:]) > 1


def _rank(shape: Shape) -> int:
    return sum(extent != 1 for extent in shape)


def _as_it_is(source: Shape, target: Shape) -> Readings:
    """Identity, or a reshape that keeps the order of values (axes of length 1, axes split or merged)."""
    if source == target:
        return {"identity": ()}
    pattern = regroup(source, target)
    return {"reshape": pattern} if pattern is not None else {}


def regroup(source: Shape, target: Shape) -> tuple[Op, ...] | None:
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
    texts = [_groups_text(shape, group) for shape, group in zip((source, target), groups, strict=True)]
    return (Rearrange(f"{texts[0]} -> {texts[1]}", tuple(sorted(names))),)


def _groups_text(shape: Shape, groups: list[list[str]]) -> str:
    rest = iter(groups)
    out: list[str] = []
    for extent in shape:
        group = ["1"] if extent == 1 else next(rest)
        out.append(group[0] if len(group) == 1 else f"({' '.join(group)})")
    return " ".join(out)


def _conv(source: Shape, target: Shape) -> Readings:
    """(O, I, *k) -> (*k, I, O); a transposed convolution (I, O, *k) -> (*k, I, O), flipped. With transpose_kernel=True
    the axes move as in a plain convolution."""
    spatial = SPATIAL.get(len(source) - 2)
    if spatial is None or len(source) != len(target):
        return {}
    out: Readings = {}
    if target == (*source[2:], source[1], source[0]):
        out["conv"] = (Rearrange(f"o i {spatial} -> {spatial} i o"),)
    if target == (*source[2:], source[0], source[1]):
        axes = tuple(range(len(source) - 2))
        out["conv_transpose default"] = (Rearrange(f"i o {spatial} -> {spatial} i o"), Flip(axes))
    return out


def _fused(source: Shape, target: Shape) -> Readings:
    """Rows that the other side stores as (parts, heads, head_dim): they lie part by part, or head by head."""
    parts, heads, dim = target[-3:]
    sizes = (("d", dim), ("h", heads), ("t", parts))
    left, right = ("", "") if len(source) == 1 else (" i", "i ")
    return {
        "fused block": (Rearrange(f"(t h d){left} -> {right}t h d", sizes),),
        "fused interleaved": (Rearrange(f"(h t d){left} -> {right}t h d", sizes),),
    }


def _fused_first(target: Shape) -> Readings:
    """Rows that the other side stores as (parts, heads, head_dim) or (heads, parts, head_dim) before the inputs."""
    for order, (t, h, d) in (("t h d", (0, 1, 2)), ("h t d", (1, 0, 2))):
        if target[t] in (2, 3):
            sizes = (("d", target[d]), ("h", target[h]), ("t", target[t]))
            return {
                "fused block": (Rearrange(f"(t h d) i -> {order} i", sizes),),
                "fused interleaved": (Rearrange(f"(h t d) i -> {order} i", sizes),),
            }
    return {}


def _flat_conv(source: Shape, target: Shape) -> Readings:
    """A convolution that the other side stores as a Linear over its flattened window."""
    spatial = SPATIAL[len(source) - 2]
    if target == (math.prod(source[1:]), source[0]):
        sizes = tuple(sorted(zip(("i", *spatial.split()), source[1:], strict=True)))
        if math.prod(source[2:]) == 1:
            ones = " ".join(["1"] * (len(source) - 2))
            return {"conv 1x1": (Rearrange(f"o i {ones} -> i o"),)}
        return {
            "window last": (Rearrange(f"o i {spatial} -> ({spatial} i) o", sizes),),
            "window first": (Rearrange(f"o i {spatial} -> (i {spatial}) o", sizes),),
        }
    return {}


_SPLIT_OUT = {"i h d": (1, 2, 0), "h i d": (0, 2, 1), "h d i": (0, 1, 2)}
_SPLIT_IN = {"h d o": (0, 1, 2), "o h d": (1, 2, 0), "h o d": (0, 2, 1)}


def _heads(source: Shape, target: Shape, kind: Kind) -> Readings:
    """A Linear (o, i) whose outputs or inputs the other side stores as (heads, head_dim), in any order of its axes."""
    o, i = source
    out: Readings = {}
    for table, whole, other, left in ((_SPLIT_OUT, o, i, "(h d) i"), (_SPLIT_IN, i, o, "o (h d)")):
        for order, (h, d, rest) in table.items():
            if target[h] * target[d] == whole and target[rest] == other:
                sizes = (("d", target[d]), ("h", target[h]))
                out[f"heads {left} -> {order}"] = (Rearrange(f"{left} -> {order}", sizes),)
                if table is _SPLIT_OUT:
                    out |= _fused_rows(target[h], target[d], order)
                if target[h] == target[d] and kind != "kernel":
                    turned = order.replace("h", "x").replace("d", "h").replace("x", "d")
                    out[f"heads {left} -> {turned}"] = (Rearrange(f"{left} -> {turned}", sizes),)
    return out


FUSED_ROWS = {"qkv": "fused rows of 3", "kv": "fused rows of 2"}
"""concept -> the reading of a fused tensor whose heads hold all parts; only these names have it"""


def _fused_rows(heads: int, dim: int, order: str) -> Readings:
    """Rows part by part that the other side stores head by head, (heads, parts x head_dim). Rows that lie head by head
    already are a plain split into heads."""
    out: Readings = {}
    for label, parts in zip(FUSED_ROWS.values(), (3, 2), strict=True):
        if dim % parts == 0:
            sizes = (("d", dim // parts), ("h", heads), ("t", parts))
            out[label] = (Rearrange(f"(t h d) i -> {order.replace('d', '(t d)')}", sizes),)
    return out


def stacked(source: Shape, target: Shape, counts: tuple[int, ...], axes: tuple[int, ...], facts: Facts) -> Readings:
    """Readings of leaves shaped `source`, stacked `counts` times (outermost first) on `axes` of the target (negative
    ones count from its end)."""
    rank = len(target)
    places = [axis if axis >= 0 else rank + axis for axis in axes]
    if any(not 0 <= p < rank for p in places) or len(set(places)) != len(places):
        return {}
    if any(target[p] != n for p, n in zip(places, counts, strict=True)):
        return {}
    inner = tuple(n for axis, n in enumerate(target) if axis not in places)
    ops: list[Op] = []
    for n, place in enumerate(places):
        later = sum(other < place for other in places[n + 1 :])
        ops.append(Stack(place - later, counts[n]))
    return {label: (*chain, *ops) for label, chain in readings(source, inner, facts).items()}


def axis_choices(depth: int, rank: int) -> list[tuple[int, ...]]:
    """Axes on which `depth` stacked numbers can lie in a leaf of `rank` axes: from the front, or from the end."""
    front = itertools.permutations(range(min(rank, 4)), depth)
    back = itertools.permutations(range(-min(rank, 4), 0), depth)
    return [*front, *back]
