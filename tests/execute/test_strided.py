"""Strided copies move every bit to its place, whatever the strides."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graftax.execute import strided

DTYPES = [np.uint8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex128]


@settings(deadline=None)
@given(st.data())
def test_like_numpy(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 5, 17, 40]), min_size=1, max_size=5)))
    array = np.arange(np.prod(shape)).reshape(shape).astype(data.draw(st.sampled_from(DTYPES)))
    view = array.transpose(data.draw(st.permutations(range(len(shape)))))
    view = view[tuple(slice(None, None, data.draw(st.sampled_from([1, -1]))) for _ in shape)]
    out = np.zeros(view.shape, view.dtype)
    strided.copy(out, view)
    assert out.tobytes() == np.ascontiguousarray(view).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((700, 900), (1, 0)),
        ((129, 1025), (1, 0)),
        ((260, 70, 3, 3), (2, 3, 1, 0)),
        ((3, 3, 260, 70), (3, 2, 0, 1)),
        ((16, 64, 100), (2, 0, 1)),
        ((300, 7, 90), (2, 1, 0)),
    ],
)
def test_blocks_that_do_not_divide(dtype: Any, shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    want = array.transpose(order)
    out = np.zeros(want.shape, dtype)
    strided.copy(out, want)
    assert out.tobytes() == np.ascontiguousarray(want).tobytes()


def test_into_a_part_of_a_larger_array() -> None:
    array = np.arange(300 * 400, dtype=np.float32).reshape(300, 400)
    out = np.full((420, 310), -1, np.float32)
    strided.copy(out[5:405, 3:303], array.T)
    assert np.array_equal(out[5:405, 3:303], array.T)
    assert (out[:5] == -1).all()
    assert (out[405:] == -1).all()
    assert (out[:, :3] == -1).all()
    assert (out[:, 303:] == -1).all()


@settings(deadline=None)
@given(st.data())
def test_parts_of_rows_are_read_in_one_go(data: st.DataObject) -> None:
    """A window of a transposed matrix in a file: the parts of its rows that are wanted, what lies between skipped."""
    from graftax.execute import fill_tile
    from graftax.execute.pushdown import push
    from graftax.ops import Rearrange
    from graftax.tree import TensorSpec

    rows, columns = data.draw(st.integers(2, 300)), data.draw(st.integers(2, 300))
    dtype = data.draw(st.sampled_from(["uint8", "uint16", "uint32", "uint64"]))
    source = np.arange(rows * columns).reshape(rows, columns).astype(dtype)
    raw, calls = source.tobytes(), []

    def read(start: int, buffer: memoryview) -> None:
        buffer[:] = raw[start : start + len(buffer)]

    def scatter(start: int, buffers: list[memoryview]) -> None:
        calls.append(len(buffers))
        for buffer in buffers:
            read(start, buffer)
            start += len(buffer)

    edges = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in (columns, rows)]
    (left, right), (top, bottom) = edges
    assume(left < right and top < bottom)
    spec = TensorSpec((rows, columns), dtype)
    pieces = push((Rearrange("a b -> b a"),), (spec,), 0, [(left, right), (top, bottom)])
    out = np.zeros((right - left) * (bottom - top), dtype)
    small, strided.SMALL = strided.SMALL, 0  # small pieces are done otherwise
    try:
        scratch = np.full(data.draw(st.integers(1 << 12, 1 << 20)), 255, np.uint8)
        fill_tile.fill_tile(out, pieces, [fill_tile.Stored(spec, read, scatter)], scratch)
    finally:
        strided.SMALL = small
    assert (out.reshape(right - left, bottom - top) == source.T[left:right, top:bottom]).all()
    wide = right - left
    if bottom - top > 1 and wide < columns <= 3 * wide and scratch.nbytes == 1 << 20:
        assert calls, "rows with gaps"
