"""Rows of a file that several pieces take parts of: read once, and what is written is what was asked for."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from graftax.execute import fill_tile
from graftax.execute.fill_tile import Stored, fill_by_rows
from graftax.execute.meter import evaluate
from graftax.execute.pushdown import Apply, SourceView, TilePiece
from graftax.ops import Cast, Sum
from graftax.tree import TensorSpec

Array = np.ndarray[Any, Any]


def stored(array: Array, read: list[tuple[int, int]]) -> Stored:
    raw = array.reshape(-1).view(np.uint8)

    def scatter(start: int, buffers: list[memoryview]) -> None:
        assert len(buffers) <= 1024
        for buffer in buffers:
            buffer[:] = raw[start : start + len(buffer)].data
            read.append((start, start + len(buffer)))
            start += len(buffer)

    def never(start: int, buffer: memoryview) -> None:
        raise AssertionError("read by itself")

    return Stored(TensorSpec(array.shape, array.dtype.name), never, scatter)


def transposed(shape: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int], at: int = 0) -> TilePiece:
    """source[rows, columns].T as a tile from element `at` on."""
    n, m = rows[1] - rows[0], columns[1] - columns[0]
    return TilePiece((m, n), at, (n, 1), SourceView(0, rows[0] * shape[1] + columns[0], (1, shape[1])))


@pytest.mark.parametrize("seed", range(4))
def test_random_parts_of_rows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    several = gaps = 0
    for _ in range(200):
        monkeypatch.setattr(fill_tile, "_NEAR", rng.choice([1 << 8, 1 << 12, 1 << 20]))
        shape = rng.randrange(2, 40), rng.randrange(4, 60)
        dtype = rng.choice([np.uint8, np.uint16, np.float32, np.float64])
        array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
        rows = sorted(rng.sample(range(shape[0] + 1), 2))
        wanted: list[tuple[Array, TilePiece]] = []
        parts: list[tuple[int, int]] = []
        for _ in range(rng.randrange(1, 5)):
            low, high = sorted(rng.sample(range(shape[1] + 1), 2))
            parts.append((low, high))
            out = np.full((high - low) * (rows[1] - rows[0]) + 3, 77, dtype)
            wanted.append((out, transposed(shape, (rows[0], rows[1]), (low, high), at=3)))
        read: list[tuple[int, int]] = []
        assert fill_by_rows(wanted, [stored(array, read)], np.empty(1 << 16, np.uint8), evaluate)
        for (out, _), (low, high) in zip(wanted, parts, strict=True):
            assert np.array_equal(out[3:].reshape(high - low, -1), array[rows[0] : rows[1], low:high].T)
            assert (out[:3] == 77).all()
        read.sort()
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(read)), "read twice"
        several += len(parts) > 1
        gaps += max(high for _, high in parts) - min(low for low, _ in parts) < shape[1]
    assert several > 50
    assert gaps > 50


def test_columns_far_apart_are_not_rows() -> None:
    array = np.zeros((4, 1 << 18), np.uint8)
    read: list[tuple[int, int]] = []
    out = np.full(8, 77, np.uint8)
    wanted = [(out, transposed(array.shape, (0, 4), (5, 7)))]
    assert not fill_by_rows(wanted, [stored(array, read)], np.empty(1 << 21, np.uint8), evaluate)
    assert not read
    assert (out == 77).all()


def test_value_ops_are_given_about_a_megabyte_at_a_time() -> None:
    array = np.random.default_rng(0).random((256, 1 << 15), np.float32)  # rows of 128 KiB
    seen: list[int] = []

    def how(value: Any, extents: tuple[int, ...], view: Any) -> Array:
        made = evaluate(value, extents, view)
        seen.append(made.size * 4)
        return made

    plain = transposed(array.shape, (0, 256), (0, 1 << 15))
    cast = TilePiece(plain.extents, plain.offset, plain.strides, Apply(Cast("float32", "float16"), (plain.value,)))
    out = np.empty(array.size, np.float16)
    assert fill_by_rows([(out, cast)], [stored(array, [])], np.empty(64 << 20, np.uint8), how)
    assert np.array_equal(out.reshape(1 << 15, 256), array.T.astype(np.float16))
    assert max(seen) <= 1 << 20


def test_more_sources_than_the_scratch_has_room_for() -> None:
    """Each of eight sources gets a part of the scratch that holds no element: read element by element, not for ever."""
    given = [np.arange(6, dtype=np.float32).reshape(2, 3) * (i + 1) for i in range(8)]
    whole = [Stored(TensorSpec((2, 3), "float32"), _reader(a)) for a in given]
    value = Apply(Sum((tuple(range(8)),)), tuple(SourceView(i, 0, (1, 3)) for i in range(8)))
    out = np.zeros(6, np.float32)
    fill_tile.fill_tile(out, [TilePiece((3, 2), 0, (2, 1), value)], whole, np.empty(64, np.uint8))
    assert np.array_equal(out.reshape(3, 2), sum(given).T)


def _reader(array: Array) -> Any:
    raw = array.reshape(-1).view(np.uint8)

    def read(start: int, buffer: memoryview) -> None:
        buffer[:] = raw[start : start + len(buffer)].data

    return read
