"""Fill a tile from its pieces: read what the pieces need of each source, in as few and as long reads as memory allows,
and copy it into place.

A source is an array in memory, or a stored tensor that is read by position. A scratch buffer bounds how much is read at
a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from graftax.execute import strided
from graftax.execute.meter import evaluate as plain
from graftax.execute.pushdown import Apply, SourceView, TilePiece, Value
from graftax.tree import Checkpoint, TensorSpec
from graftax.tree.dtypes import numpy_dtype

Array = np.ndarray[Any, Any]

DENSE = 3
"""A span is read whole if at least 1/DENSE of its elements is needed, or if it is short."""
SHORT = 128 << 10
"""Reading and skipping this many bytes costs less than a second read."""
_SKIPPED = 16 << 10
"""Gaps up to this many bytes between parts of rows are always read: from the page cache this costs as much as one more
call."""
_NEAR = 1 << 20
"""This many bytes stay in a core's cache between reading and writing."""
_MOST_BUFFERS = 1024
"""Linux fills so many in one call."""


class Values(Protocol):
    """A source tensor: its spec, and its elements start..stop in C order as a flat array."""

    @property
    def spec(self) -> TensorSpec: ...
    def span(self, start: int, stop: int, scratch: Array | None) -> Array: ...
    @property
    def in_memory(self) -> bool: ...


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """An array in memory."""

    spec: TensorSpec
    flat: Array
    in_memory = True

    def span(self, start: int, stop: int, scratch: Array | None) -> Array:
        return self.flat[start:stop]


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor in a file. `read(start, buffer)` fills the buffer from byte `start` of the values (C order, little
    endian). `scatter(start, buffers)`, if present, fills several buffers one after another."""

    spec: TensorSpec
    read: Callable[[int, memoryview], None]
    scatter: Callable[[int, list[memoryview]], None] | None = None
    in_memory = False

    def span(self, start: int, stop: int, scratch: Array | None) -> Array:
        dtype = numpy_dtype(self.spec.dtype)
        nbytes = (stop - start) * dtype.itemsize
        raw = np.empty(nbytes, np.uint8) if scratch is None else scratch[:nbytes]
        self.read(start * dtype.itemsize, memoryview(raw))  # pyright: ignore[reportArgumentType]
        return raw.view(dtype)


def held(array: Array, spec: TensorSpec) -> Held:
    return Held(spec, np.ascontiguousarray(array).reshape(-1))


def open_values(source: Checkpoint, name: str, count: Callable[[int], None], whole: Callable[[str], Array]) -> Values:
    """A tensor of a checkpoint, read by position if possible, else read now by `whole`. `count` receives the number of
    bytes read, except for a live tree."""
    spec, storage = source.specs[name], source.storage
    span, scatter = storage.span, storage.scatter
    if span is None or not storage.by_position(name):
        array = whole(name)
        if storage.format != "live":
            count(spec.nbytes)
        return held(array, spec)

    def read(start: int, buffer: memoryview) -> None:
        span(name, start, buffer)
        count(len(buffer))

    def read_apart(start: int, buffers: list[memoryview]) -> None:
        assert scatter is not None
        count(scatter(name, start, buffers))

    return Stored(spec, read, None if scatter is None else read_apart)


Evaluate = Callable[[Value, tuple[int, ...], Callable[[SourceView], Array]], Array]
"""(value, extents, leaf -> its strided view) -> the array of a piece."""


def fill_tile(
    out: Array, pieces: Sequence[TilePiece], sources: Sequence[Values], scratch: Array, evaluate: Evaluate = plain
) -> None:
    """Write all pieces into `out`, a flat tile. `scratch` is the memory for reading, as bytes. A piece that needs more
    is done in parts."""
    for piece in pieces:
        _fill_piece(out, piece, sources, scratch, evaluate)


def _fill_piece(out: Array, piece: TilePiece, sources: Sequence[Values], scratch: Array, evaluate: Evaluate) -> None:
    leaves = [leaf for leaf in piece.leaves() if not sources[leaf.source].in_memory]
    if leaves:
        if evaluate is plain and _straight(piece):
            values = sources[leaves[0].source]
            assert isinstance(values, Stored)
            raw = out[piece.offset : piece.offset + piece.count].view(np.uint8)
            values.read(leaves[0].offset * out.itemsize, memoryview(raw))  # pyright: ignore[reportArgumentType]
            return
        if piece.count * out.itemsize > strided.SMALL and fill_by_rows([(out, piece)], sources, scratch, evaluate):
            return
    room = scratch.nbytes // max(len(leaves), 1) // 16 * 16
    if not isinstance(piece.value, SourceView):
        room = min(room, 4 * _NEAR)  # value ops make arrays several times this size
    for leaf in leaves:
        width = sources[leaf.source].spec.bits // 8
        low, high = _reach(leaf, piece.extents)
        span = (high - low + 1) * width
        if span > width and (span > room or (span > SHORT and span > DENSE * piece.count * width)):
            loop = max(range(len(piece.extents)), key=lambda j: abs(leaf.strides[j]) * (piece.extents[j] > 1))
            _parts(out, piece, loop, leaf, room // width, sources, scratch, evaluate)
            return
    target = _window(out, piece.offset, piece.extents, piece.strides)
    taken = 0

    def view(leaf: SourceView) -> Array:
        nonlocal taken
        values = sources[leaf.source]
        if values.in_memory:
            return _window(values.span(0, values.spec.size, None), leaf.offset, piece.extents, leaf.strides)
        low, high = _reach(leaf, piece.extents)
        rest = scratch[taken:]
        nbytes = (high - low + 1) * (values.spec.bits // 8)
        flat = values.span(low, high + 1, rest if nbytes <= rest.nbytes else None)  # None: one element of very many
        taken += -(-nbytes // 16) * 16
        return _window(flat, leaf.offset - low, piece.extents, leaf.strides)

    _put(target, evaluate(piece.value, piece.extents, view))


def _put(target: Array, value: Array) -> None:
    if value.dtype == target.dtype:
        strided.copy(target, value)
    else:
        target[...] = value


class _Rows(NamedTuple):
    """Rows of a stored source, or the same part of each row: `count` runs of `run` elements. The first run begins at
    `start`; each next run is `step` further. `outer` is the loop of the piece that goes from row to row."""

    source: int
    start: int
    run: int
    count: int
    step: int
    outer: int


def _rows(piece: TilePiece, sources: Sequence[Values]) -> _Rows | None:
    """The rows that a piece takes; None if the piece does not take rows of one file that are read a few at a time."""
    leaves = list(piece.leaves())
    if len(leaves) != 1 or len(piece.extents) < 2:
        return None
    (leaf,) = leaves
    values = sources[leaf.source]
    if not isinstance(values, Stored) or values.scatter is None:
        return None
    *inner, outer = sorted(range(len(piece.extents)), key=lambda j: leaf.strides[j])
    run = 1
    for loop in inner:
        if leaf.strides[loop] != run:
            return None
        run *= piece.extents[loop]
    if leaf.strides[outer] < run:
        return None
    return _Rows(leaf.source, leaf.offset, run, piece.extents[outer], leaf.strides[outer], outer)


def fill_by_rows(
    wanted: Iterable[tuple[Array, TilePiece]], sources: Sequence[Values], scratch: Array, how: Evaluate
) -> bool:
    """Fill tiles from pieces that take rows, or parts of rows, and read each row once for all of them. Returns False,
    without writing anything, if the pieces are of another kind.

    The rows lie a few bytes apart in the scratch, so that a column of them does not fall into one cache set. They are
    written while they are still in the cache, and nothing is copied in between. The gaps between parts of rows are read
    into one short buffer, which stays in the cache.
    """
    groups: dict[tuple[int, ...], list[tuple[Array, TilePiece, _Rows]]] = {}
    for out, piece in wanted:
        rows = _rows(piece, sources)
        if rows is None:
            return False
        groups.setdefault((rows.source, rows.step, rows.count, rows.start // rows.step), []).append((out, piece, rows))
    readers: list[_RowReader] = []
    for group in groups.values():
        reader = _RowReader.plan(group, sources, scratch)
        if reader is None:
            return False
        readers.append(reader)
    for reader in readers:
        reader.run(scratch, how)
    return True


def _covered(spans: Iterable[tuple[int, int]]) -> int:
    """The length that the spans cover together."""
    count, until = 0, 0
    for start, stop in sorted(spans):
        count += max(0, stop - max(start, until))
        until = max(until, stop)
    return count


@dataclass(frozen=True, slots=True, eq=False)
class _RowReader:
    """Pieces that take parts of the same rows, and how to read the rows: `nbytes` of each row from byte `first` on; the
    next row begins `gap` bytes later. In the scratch the rows lie `pitch` bytes apart, `at_once` at a time."""

    group: Sequence[tuple[Array, TilePiece, _Rows]]
    values: Stored
    first: int
    nbytes: int
    gap: int
    pitch: int
    at_once: int

    @staticmethod
    def plan(
        group: Sequence[tuple[Array, TilePiece, _Rows]], sources: Sequence[Values], scratch: Array
    ) -> _RowReader | None:
        """None if reading row by row is not the best way."""
        rows = [one for _, _, one in group]
        values = sources[rows[0].source]
        assert isinstance(values, Stored)
        width = values.spec.bits // 8
        first, end = min(one.start for one in rows), max(one.start + one.run for one in rows)
        nbytes, needed = (end - first) * width, _covered((one.start, one.start + one.run) for one in rows) * width
        gap = rows[0].step * width - nbytes
        if gap < 0 or nbytes + gap - needed > min(max((DENSE - 1) * needed, _SKIPPED), SHORT):
            return None
        pitch = -(-nbytes // strided.PAD_BYTES) * strided.PAD_BYTES + strided.PAD_BYTES
        # Value ops make arrays several times the size of their input.
        copied = all(isinstance(piece.value, SourceView) for _, piece, _ in group)
        near = max(_NEAR // pitch, strided.rows_of(width) if copied else 1)
        wanted = min(near, _MOST_BUFFERS // (2 if gap else 1), rows[0].count)
        at_once = min(wanted, (scratch.nbytes - gap) // pitch)
        if 4 * at_once < wanted:  # long rows, little memory: a part of each row is better
            return None
        return _RowReader(group, values, first * width, nbytes, gap, pitch, at_once)

    def run(self, scratch: Array, how: Evaluate) -> None:
        raw = memoryview(scratch)  # pyright: ignore[reportArgumentType]
        buffers = [raw[i * self.pitch : i * self.pitch + self.nbytes] for i in range(self.at_once)]
        if self.gap:
            between = raw[self.at_once * self.pitch : self.at_once * self.pitch + self.gap]
            buffers = [buffer for row in buffers for buffer in (row, between)]
        _, _, rows = self.group[0]
        assert self.values.scatter is not None
        for start in range(0, rows.count, self.at_once):
            n = min(self.at_once, rows.count - start)
            self.values.scatter(self.first + start * (self.nbytes + self.gap), buffers[: 2 * n - 1 if self.gap else n])
            for out, piece, own in self.group:
                self._write(out, piece, own, start, n, raw, how)

    def _write(
        self, out: Array, piece: TilePiece, rows: _Rows, start: int, n: int, raw: memoryview, how: Evaluate
    ) -> None:
        """Write rows start..start + n of a piece from the scratch."""
        dtype = numpy_dtype(self.values.spec.dtype)
        outer, leaf = rows.outer, next(piece.leaves())
        extents = (*piece.extents[:outer], n, *piece.extents[outer + 1 :])
        steps = [self.pitch if j == outer else s * dtype.itemsize for j, s in enumerate(leaf.strides)]
        read: Array = np.ndarray(extents, dtype, raw, rows.start * dtype.itemsize - self.first, steps)
        target = _window(out, piece.offset + start * piece.strides[outer], extents, piece.strides)
        value = how(piece.value, extents, lambda _: read)
        if piece.strides[outer] == 1 and value.dtype == target.dtype:
            strided.bits(target)[...] = strided.bits(value)
        else:
            _put(target, value)


def _parts(
    out: Array,
    piece: TilePiece,
    loop: int,
    leaf: SourceView,
    room: int,
    sources: Any,
    scratch: Array,
    evaluate: Evaluate,
) -> None:
    """Fill the piece in parts along one loop. Each part has as many iterations as a dense span in the scratch
    allows."""
    count = piece.extents[loop]
    alone = replace(piece, extents=(*piece.extents[:loop], 1, *piece.extents[loop + 1 :]))
    low, high = _reach(leaf, alone.extents)
    inner, step = high - low + 1, abs(leaf.strides[loop])
    dense = inner * DENSE >= step and inner <= DENSE * alone.count
    at_once = max(1, min(count // 2, (room - inner) // max(step, 1) + 1)) if dense else 1
    for start in range(0, count, at_once):
        part = _iterations(piece, loop, start, min(at_once, count - start))
        _fill_piece(out, part, sources, scratch, evaluate)


class Simple(NamedTuple):
    """A piece that copies a small part of one file, or one run of it. All lengths are in bytes, and the plan is reused
    for all tensors of one shape. `inner`: where the values lie in the bytes read, and their strides; None: the bytes
    are read straight to their place."""

    source: int
    start: int
    nbytes: int
    dtype: np.dtype[Any]
    extents: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    inner: tuple[int, tuple[int, ...]] | None

    def fill(self, out: memoryview, read: Callable[[int, memoryview], None], scratch: memoryview) -> None:
        """Fill the bytes of a tile; `read` reads from the piece's source."""
        if self.inner is None:
            read(self.start, out[self.offset : self.offset + self.nbytes])
            return
        read(self.start, scratch[: self.nbytes])
        offset, strides = self.inner
        target: Array = np.ndarray(self.extents, self.dtype, out, self.offset, self.strides)
        target[...] = np.ndarray(self.extents, self.dtype, scratch, offset, strides)


def simple(piece: TilePiece, width: int) -> Simple | None:
    """The piece as a Simple, for elements of `width` bytes from a file; None if the piece is not simple."""
    leaf, dtype = piece.value, strided.BITS.get(width)
    if not isinstance(leaf, SourceView) or dtype is None:
        return None
    offset = piece.offset * width
    if _straight(piece):
        return Simple(leaf.source, leaf.offset * width, piece.count * width, dtype, (), offset, (), None)
    low, high = _reach(leaf, piece.extents)
    nbytes = (high - low + 1) * width
    if nbytes > strided.SMALL or (nbytes > SHORT and nbytes > DENSE * piece.count * width):
        return None
    inner = (leaf.offset - low) * width, tuple(s * width for s in leaf.strides)
    strides = tuple(s * width for s in piece.strides)
    return Simple(leaf.source, low * width, nbytes, dtype, piece.extents, offset, strides, inner)


def cut_piece(piece: TilePiece, most: int) -> Iterator[TilePiece]:
    """The piece in parts of about `most` elements, cut along one loop so that each part takes one stretch of its
    source."""
    if piece.count <= most:
        yield piece
        return
    leaf = next(piece.leaves(), None)
    strides = piece.strides if leaf is None else leaf.strides
    loop = max(range(len(piece.extents)), key=lambda j: abs(strides[j]) * (piece.extents[j] > 1))
    count = piece.extents[loop]
    step = max(1, most * count // piece.count)
    for start in range(0, count, step):
        yield _iterations(piece, loop, start, min(step, count - start))


def _iterations(piece: TilePiece, loop: int, start: int, count: int) -> TilePiece:
    """`count` iterations of one loop, from `start` on."""
    return TilePiece(
        (*piece.extents[:loop], count, *piece.extents[loop + 1 :]),
        piece.offset + start * piece.strides[loop],
        piece.strides,
        _moved(piece.value, loop, start),
    )


def _moved(value: Value, loop: int, by: int) -> Value:
    if isinstance(value, SourceView):
        return replace(value, offset=value.offset + by * value.strides[loop])
    if isinstance(value, Apply):
        return replace(value, args=tuple(_moved(arg, loop, by) for arg in value.args))
    return value


def _straight(piece: TilePiece) -> bool:
    """True if the piece copies one run of the source to one run of the tile."""
    if not isinstance(piece.value, SourceView):
        return False
    return not piece.extents or (len(piece.extents) == 1 and piece.strides == piece.value.strides == (1,))


def _reach(leaf: SourceView, extents: tuple[int, ...]) -> tuple[int, int]:
    """The first and the last element that a source view touches."""
    ends = [s * (n - 1) for s, n in zip(leaf.strides, extents, strict=True)]
    return leaf.offset + sum(e for e in ends if e < 0), leaf.offset + sum(e for e in ends if e > 0)


def _window(flat: Array, offset: int, extents: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """A strided view; NumPy checks that it stays inside `flat`."""
    width = flat.itemsize
    raw = flat.view(np.uint8).data  # the buffer protocol does not know bfloat16
    return np.ndarray(extents, flat.dtype, raw, offset * width, [s * width for s in strides])
