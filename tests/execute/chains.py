"""Random chains of ops, and the whole-array result of a slice: what pushdown is compared with."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np

from graftax.errors import LayoutError
from graftax.execute.pushdown import Const, SourceView, TilePiece, Value
from graftax.ops import Op
from graftax.ops.chains import bind_chain
from graftax.ops.checked_ops import Crop, Pad, Repeat
from graftax.ops.index_ops import Concat, Flip, Reorder, Split, Stack, Unstack
from graftax.ops.rearrange import Rearrange
from graftax.ops.value_ops import Cast, Scale, Sum
from graftax.tree import TensorSpec

_KINDS = ["rearrange"] * 5
_KINDS += ["split", "concat", "stack", "unstack", "reorder", "flip", "repeat", "pad", "crop", "scale", "cast", "sum"]


def sources(rng: random.Random) -> tuple[np.ndarray[Any, Any], ...]:
    """One to four arrays of one shape, every value another."""
    shape = tuple(rng.choice([1, 2, 3, 4, 6, 8, 12]) for _ in range(rng.randrange(1, 4)))
    size = math.prod(shape)
    return tuple(
        np.arange(i * size, (i + 1) * size, dtype=np.float32).reshape(shape) for i in range(rng.choice([1, 1, 2, 4]))
    )


def chain(rng: random.Random, specs: tuple[TensorSpec, ...]) -> tuple[tuple[Op, ...], tuple[TensorSpec, ...]]:
    ops: list[Op] = []
    for _ in range(rng.randrange(6)):
        op = _random_op(rng, specs)
        if op is None:
            continue
        try:
            after = op.infer(specs)
        except LayoutError:
            continue
        if len(after) <= 32 and all(spec.size <= 5000 for spec in after):
            ops.append(op)
            specs = after
    return tuple(ops), specs


def bound(
    ops: tuple[Op, ...], given: tuple[np.ndarray[Any, Any], ...]
) -> tuple[tuple[Op, ...], tuple[TensorSpec, ...]]:
    return bind_chain(ops, tuple(TensorSpec(a.shape, "float32") for a in given))


def box(rng: random.Random, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    if rng.random() < 0.2:
        return [(0, n) for n in shape]
    starts = [rng.randrange(n) for n in shape]
    return [(start, rng.randrange(start + 1, n + 1)) for start, n in zip(starts, shape, strict=True)]


def _random_op(rng: random.Random, specs: tuple[TensorSpec, ...]) -> Op | None:
    kind, spec = rng.choice(_KINDS), specs[0]
    rank = len(spec.shape)
    if any(other != spec for other in specs):
        return Scale(2.0) if kind == "scale" else None
    if kind == "rearrange":
        return _rearrange(rng, spec.shape)
    if not rank:
        return None
    axis = rng.randrange(rank)
    extent = spec.shape[axis]
    pairs = len(specs) % 2 == 0
    if kind == "split" and extent > 1:
        first = rng.randrange(1, extent)
        return Split(axis, (first, extent - first))
    if kind == "concat" and pairs:
        return Concat(axis, (extent, extent))
    if kind == "reorder" and pairs:
        return Reorder((1, 0))
    if kind == "stack" and pairs and rank < 5:
        return Stack(rng.randrange(rank + 1), 2)
    if kind == "unstack" and extent <= 4:
        return Unstack(axis, extent)
    if kind == "flip":
        return Flip(tuple(rng.sample(range(rank), rng.randrange(1, rank + 1))))
    if kind == "repeat" and spec.size < 500:
        return Repeat(axis, rng.choice([2, 3]))
    if kind == "pad":
        return Pad(axis, rng.randrange(3), rng.randrange(3), 0.5)
    if kind == "crop" and extent > 2:
        return Crop(axis, 0, 1, 0.0)
    if kind == "scale":
        return Scale(2.0)
    if kind == "cast" and spec.dtype == "float32":
        return Cast("float32", "float64")
    if kind == "sum" and pairs:
        return Sum(tuple((i, i + 1) for i in range(0, len(specs), 2)))
    return None


def _rearrange(rng: random.Random, shape: tuple[int, ...]) -> Rearrange | None:
    names: list[str] = []
    left: list[str] = []
    sizes: list[tuple[str, int]] = []
    for extent in shape:
        divisors = [d for d in range(2, extent) if extent % d == 0]
        own = [f"a{len(names)}"]
        if divisors and rng.random() < 0.5:
            own.append(f"a{len(names) + 1}")
            sizes.append((own[0], rng.choice(divisors)))
        left.append(own[0] if len(own) == 1 else f"({' '.join(own)})")
        names += own
    if rng.random() < 0.7:
        rng.shuffle(names)
    right: list[str] = []
    while names:
        count = rng.choice([1, 1, 2])
        group, names = names[:count], names[count:]
        right.append(group[0] if len(group) == 1 else f"({' '.join(group)})")
    return Rearrange(f"{' '.join(left)} -> {' '.join(right)}", tuple(sizes)) if len(right) <= 5 else None


def made(pieces: list[TilePiece], given: tuple[np.ndarray[Any, Any], ...], shape: tuple[int, ...], dtype: Any) -> Any:
    """The tile that the pieces make, element by element; every element must be written once, and no source overrun."""
    out, seen = np.empty(math.prod(shape), dtype), np.zeros(math.prod(shape), np.int64)
    for piece in pieces:
        _strided(out, piece.offset, piece.extents, piece.strides)[...] = _value(piece.value, given, piece.extents)
        times = _strided(seen, piece.offset, piece.extents, piece.strides)
        times += 1
    assert (seen == 1).all()
    return out.reshape(shape)


def _strided(flat: Any, offset: int, extents: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    low = offset + sum(min(0, s * (n - 1)) for s, n in zip(strides, extents, strict=True))
    high = offset + sum(max(0, s * (n - 1)) for s, n in zip(strides, extents, strict=True))
    assert low >= 0
    assert high < flat.size
    width = flat.itemsize
    return np.ndarray(extents, flat.dtype, flat.data, offset * width, [s * width for s in strides])


def _value(value: Value, given: tuple[np.ndarray[Any, Any], ...], extents: tuple[int, ...]) -> Any:
    if isinstance(value, SourceView):
        return _strided(given[value.source].reshape(-1), value.offset, extents, value.strides)
    if isinstance(value, Const):
        return np.full(extents, value.value, value.dtype)
    return value.op.apply(tuple(_value(arg, given, extents) for arg in value.args))[0]
