"""Make a target directly as the shards of a jax.Array: each process reads what its own devices need, each byte once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from graftax.execute.fill_tile import DENSE, SHORT, Evaluate, Held, Stored, Values, fill_by_rows, fill_tile
from graftax.execute.memory import allocate_all
from graftax.execute.pushdown import Apply, Box, SourceView, TilePiece, Value, push
from graftax.execute.tiling import Edges, box_steps, grid
from graftax.ops import Op
from graftax.tree import TensorSpec
from graftax.tree.dtypes import numpy_dtype

Array = np.ndarray[Any, Any]


def sharding_boxes(shape: tuple[int, ...], sharding: Any) -> dict[Edges, list[Any]]:
    """The boxes of an array that the devices of this process hold: box -> its devices (several if it is replicated).

    Raises jax's ValueError if the shape cannot be divided this way.
    """
    out: dict[Edges, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        edges = tuple(
            (part.start or 0, extent if part.stop is None else part.stop)
            for part, extent in zip(index, shape, strict=True)
        )
        out.setdefault(edges, []).append(device)
    return out


def local_bytes(spec: TensorSpec, sharding: Any) -> int:
    """The bytes of a tensor that the devices of this process hold, each part counted once."""
    return sum(map(_count, sharding_boxes(spec.shape, sharding))) * spec.bits // 8


def assemble(shape: tuple[int, ...], sharding: Any, parts: dict[Edges, Array], dtype: Any) -> Any:
    """The jax.Array whose local shards are `parts`. The array may take over their memory, so nothing may write to it
    again."""
    import jax

    kind = sharding.memory_kind
    homes = {
        edges: [jax.sharding.SingleDeviceSharding(device, memory_kind=kind) for device in devices]
        for edges, devices in sharding_boxes(shape, sharding).items()
    }
    given = [parts[edges] for edges, devices in homes.items() for _ in devices]
    shards = jax.device_put(given, [home for devices in homes.values() for home in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=dtype)


def fill_boxes(
    ops: tuple[Op, ...],
    specs: tuple[TensorSpec, ...],
    index: int,
    spec: TensorSpec,
    made: Mapping[Edges, Sequence[TilePiece]],
    sources: Sequence[Values],
    scratch: Array,
    evaluate: Evaluate,
) -> tuple[dict[Edges, Array], int]:
    """Every box of a target, filled from its pieces, in aligned memory that jax can take over; and the number of source
    bytes that the boxes need. NotLocal if a part of a box splits into too many pieces."""
    needed = needed_bytes([piece for pieces in made.values() for piece in pieces], sources)
    dtype = numpy_dtype(spec.dtype)
    rooms = allocate_all([_count(box) * dtype.itemsize for box in made])
    out = {box: room.view(dtype) for box, room in zip(made, rooms, strict=True)}
    if _apart(made.values(), sources):
        for box, flat in out.items():
            fill_tile(flat, made[box], sources, scratch, evaluate)
    elif not fill_by_rows(
        [(out[box], piece) for box, pieces in made.items() for piece in pieces], sources, scratch, evaluate
    ):
        _by_windows(ops, specs, index, spec, out, sources, scratch, evaluate)
    return {box: flat.reshape([stop - start for start, stop in box]) for box, flat in out.items()}, needed


def needed_bytes(pieces: Sequence[TilePiece], sources: Sequence[Values]) -> int:
    """The source bytes that the pieces need. A part that one piece repeats, or that several pieces take, counts once.
    Parts that overlap without being equal count for each piece."""
    taken = {
        (leaf.source, leaf.offset, tuple(sorted((s, n) for n, s in zip(piece.extents, leaf.strides, strict=True) if s)))
        for piece in pieces
        for leaf in piece.leaves()
    }
    count = [0] * len(sources)
    for source, _, loops in taken:
        count[source] += math.prod(n for _, n in loops)
    return sum(min(n, values.spec.size) * values.spec.bits // 8 for n, values in zip(count, sources, strict=True))


def short_runs(pieces: Sequence[TilePiece], sources: Sequence[Values]) -> str:
    """A sentence with the shortest run of stored values that the pieces take: it explains why more was read than
    needed."""
    runs = [
        run_of(piece, leaf) * sources[leaf.source].spec.bits // 8
        for piece in pieces
        for leaf in piece.leaves()
        if not sources[leaf.source].in_memory
    ]
    return f"its shards need runs of {min(runs, default=0):,} bytes, and reading the gaps costs less than skipping them"


def _apart(boxes: Iterable[Sequence[TilePiece]], sources: Sequence[Values]) -> bool:
    """True if the boxes take their values from stretches of the stored sources that do not overlap."""
    taken = sorted(
        (source, low, high) for pieces in boxes for source, (low, high, _, _) in _spans(pieces, sources).items()
    )
    return all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(taken))


def run_of(piece: TilePiece, leaf: SourceView) -> int:
    """The number of source elements in one run without a gap."""
    run = 1
    for stride, extent in sorted(zip(map(abs, leaf.strides), piece.extents, strict=True)):
        if stride == 0:
            continue
        if stride != run:
            break
        run *= extent
    return run


# ---------------------------------------------------------------- short runs that several boxes need


def _by_windows(
    ops: tuple[Op, ...],
    specs: tuple[TensorSpec, ...],
    index: int,
    spec: TensorSpec,
    out: dict[Edges, Array],
    sources: Sequence[Values],
    scratch: Array,
    evaluate: Evaluate,
) -> None:
    """Fill the boxes by tiles with long runs in the source. The span of each tile is read once and divided among the
    boxes that need a part of it."""
    union = [(min(box[a][0] for box in out), max(box[a][1] for box in out)) for a in range(len(spec.shape))]
    whole = TensorSpec(tuple(stop - start for start, stop in union), spec.dtype)
    origin = [start for start, _ in union]
    most = room = scratch.nbytes - SHORT  # the rest is for sources that are read in parts
    while True:
        steps = box_steps(ops, specs, index, whole, most, contiguous=False, origin=origin, rows=False)
        first = push(ops, specs, index, [(start, start + step) for start, step in zip(origin, steps, strict=True)])
        spans = _spans(first, sources)
        if sum(high - low for low, high, _, _ in spans.values()) <= room or max(steps, default=1) == 1:
            break
        most = math.prod(steps) * spec.bits // 16  # half of what did not fit
    for tile in grid(union, steps):
        parts = [(box, common) for box in out if (common := _common(tile, box)) is not None]
        if not parts:
            continue
        hull = [
            (min(common[a][0] for _, common in parts), max(common[a][1] for _, common in parts))
            for a in range(len(tile))
        ]
        opened, firsts, taken = _opened(push(ops, specs, index, hull), sources, scratch)
        for box, common in parts:
            pieces = push(ops, specs, index, common, within=box)
            fill_tile(out[box], [_rebased(piece, firsts) for piece in pieces], opened, scratch[taken:], evaluate)


def _opened(
    pieces: Sequence[TilePiece], sources: Sequence[Values], scratch: Array
) -> tuple[list[Values], list[int], int]:
    """(the sources, the first element of each, the scratch bytes used). The span of a stored source is read into memory
    if it fits and one read is cheaper."""
    opened, firsts, taken = list(sources), [0] * len(sources), 0
    for place, (low, high, needed, runs) in _spans(pieces, sources).items():
        values = sources[place]
        apart = (high - low - needed) // max(runs - 1, 1)  # bytes between two runs
        cheaper = high - low <= SHORT or high - low <= DENSE * needed or apart <= SHORT
        if cheaper and taken + high - low <= scratch.nbytes - SHORT:
            width = values.spec.bits // 8
            flat = values.span(low // width, high // width, scratch[taken:])
            opened[place] = Held(TensorSpec(flat.shape, values.spec.dtype), flat)
            firsts[place] = low // width
            taken += -(-(high - low) // 16) * 16
    return opened, firsts, taken


def _rebased(piece: TilePiece, firsts: Sequence[int]) -> TilePiece:
    """The piece for sources whose first elements are left out."""

    def moved(value: Value) -> Value:
        if isinstance(value, SourceView):
            return replace(value, offset=value.offset - firsts[value.source])
        return replace(value, args=tuple(map(moved, value.args))) if isinstance(value, Apply) else value

    return replace(piece, value=moved(piece.value))


def _spans(pieces: Sequence[TilePiece], sources: Sequence[Values]) -> dict[int, tuple[int, int, int, int]]:
    """stored source -> (first byte, last byte + 1, bytes needed, number of runs) of what the pieces take."""
    out: dict[int, tuple[int, int, int, int]] = {}
    for piece in pieces:
        for leaf in piece.leaves():
            values = sources[leaf.source]
            if not isinstance(values, Stored):
                continue
            width = values.spec.bits // 8
            ends = [s * (n - 1) for s, n in zip(leaf.strides, piece.extents, strict=True)]
            low = (leaf.offset + sum(e for e in ends if e < 0)) * width
            high = (leaf.offset + sum(e for e in ends if e > 0) + 1) * width
            count = math.prod(n for n, s in zip(piece.extents, leaf.strides, strict=True) if s)
            was = out.get(leaf.source, (low, high, 0, 0))
            runs = was[3] + count // run_of(piece, leaf)
            out[leaf.source] = min(was[0], low), max(was[1], high), was[2] + count * width, runs
    return out


def _common(a: Box, b: Box) -> Edges | None:
    both = tuple((max(x, u), min(y, v)) for (x, y), (u, v) in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def _count(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)
