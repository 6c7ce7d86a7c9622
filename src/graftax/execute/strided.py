"""Strided copies at the speed of memory: transposes go through a small scratch that stays in the cache.

NumPy copies `dst[...] = src` element by element, in the order of one side. If the other side jumps from page to page,
every element costs a cache line and a TLB entry. This module reads a block along the source's rows into a scratch, then
writes it along the destination's rows, so each line is touched once. The scratch rows are 64 bytes longer than the
block, so that a column of the scratch does not fall into one cache set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_ROWS, _RUN = {1: 512, 2: 512, 4: 256, 8: 256}, {1: 1024, 2: 512, 4: 512, 8: 256}
"""Block of the scratch by element width: rows along the destination's axis, elements of a run along the source's. Half
a megabyte: what a core's own cache holds; fewer rows would end NumPy's inner loop before it pays."""
PAD_BYTES = 64
BITS = {width: np.dtype(f"u{width}") for width in (1, 2, 4, 8)}
SMALL = 1 << 19
"""Up to this many bytes NumPy's own loop is as fast, because everything stays in a core's cache."""


def copy(dst: Array, src: Array) -> None:
    """dst[...] = src, bit for bit, for arrays of one shape and element width that do not overlap."""
    dst, src = bits(dst), bits(src)
    if dst.nbytes <= SMALL:
        dst[...] = src
        return
    dst, src = _ordered(dst, src)
    rank = dst.ndim
    if rank < 2:
        dst[...] = src
        return
    inner = min(range(rank), key=lambda a: (abs(src.strides[a]), -a))  # the source runs along this axis
    if inner == rank - 1:
        dst[...] = src
        return
    _blocked(dst, src, inner)


def bits(array: Array) -> Array:
    """The array as unsigned integers of its width. NumPy copies ml_dtypes and complex arrays as slowly as objects."""
    plain = BITS.get(array.dtype.itemsize)
    return array if plain is None else array.view(plain)


def _ordered(dst: Array, src: Array) -> tuple[Array, Array]:
    """Both arrays with the destination's outermost axes first, without axes of length one, and with axes that continue
    each other joined."""
    order = sorted((a for a in range(dst.ndim) if dst.shape[a] > 1), key=lambda a: -abs(dst.strides[a]))
    loops: list[tuple[int, int, int]] = []
    for axis in order:
        n, d, s = dst.shape[axis], dst.strides[axis], src.strides[axis]
        if loops and loops[-1][1] == d * n and loops[-1][2] == s * n:
            loops[-1] = (loops[-1][0] * n, d, s)
        else:
            loops.append((n, d, s))
    shape = tuple(n for n, _, _ in loops)
    dst = np.lib.stride_tricks.as_strided(dst, shape, tuple(d for _, d, _ in loops))
    src = np.lib.stride_tricks.as_strided(src, shape, tuple(s for _, _, s in loops), writeable=False)
    return dst, src


def rows_of(width: int) -> int:
    """The number of rows of a block whose elements have this many bytes."""
    return _ROWS.get(width, 64)


def _blocked(dst: Array, src: Array, inner: int) -> None:
    """Copy block by block. The destination's run is the last axis and those before it; the source's run is `inner` and
    the axes that continue it in the source."""
    width, rank = dst.itemsize, dst.ndim
    block = [1] * rank
    free = set(range(rank - 1))
    run = _claim(block, free, dst.shape, src.strides, inner, _RUN.get(width, 256))
    rows = _claim(block, free, dst.shape, dst.strides, rank - 1, rows_of(width))
    order = [*reversed(rows), *reversed(run)]  # the axes of the scratch: the source's run is innermost
    kept = sorted(order)
    turned = [kept.index(a) for a in order]
    heads = len(rows)
    length = math.prod(block[a] for a in run)
    store = np.empty((math.prod(block[a] for a in rows), length + PAD_BYTES // width), dst.dtype)
    for place in _blocks(dst.shape, block, kept):
        d, s = dst[place].transpose(turned), src[place].transpose(turned)
        lead, tail = math.prod(d.shape[:heads]), math.prod(d.shape[heads:])
        scratch = store[:lead, :tail].reshape(d.shape)  # a view: axes are only split
        scratch[...] = s
        d[...] = scratch


def _claim(
    block: list[int], free: set[int], shape: tuple[int, ...], strides: tuple[int, ...], axis: int, most: int
) -> list[int]:
    """Widen the block along `axis` and the free axes that continue it, up to `most` elements. Returns these axes,
    innermost first."""
    claimed: list[int] = []
    place: int | None = axis
    while place is not None and most > 1:
        block[place] = min(shape[place], most)
        claimed.append(place)
        free.discard(place)
        if block[place] < shape[place]:
            break
        most //= block[place]
        reach = abs(strides[place]) * shape[place]
        place = next((a for a in free if abs(strides[a]) == reach), None)
    return claimed


def _blocks(shape: tuple[int, ...], block: list[int], kept: list[int]) -> Iterator[tuple[Any, ...]]:
    """The position of each block: slices on the axes that the scratch has, numbers on the others."""
    steps: list[Iterable[Any]] = [
        [slice(i, min(i + b, n)) for i in range(0, n, b)] if axis in kept else range(n)
        for axis, (n, b) in enumerate(zip(shape, block, strict=True))
    ]
    yield from product(*steps)
