"""Host memory that jax can use without a copy: aligned, private, and in huge pages if it is large."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

ALIGNMENT = 64
"""The alignment that XLA's CPU client requires to use a buffer without a copy."""
_HUGE = 2 << 20
_GROUP = 4 << 20
"""Arrays that are too small for huge pages of their own share about so much: what one that is left keeps alive."""


class _Memory:
    """The owner of exactly the bytes of one array. It tells the adapters that nothing else uses this memory."""

    __slots__ = ("__array_interface__", "_keep", "nbytes")

    def __init__(self, raw: Bytes) -> None:
        self._keep = raw
        self.nbytes = raw.nbytes
        self.__array_interface__ = raw.__array_interface__


def allocate(nbytes: int) -> Bytes:
    """Flat, writable, uninitialised bytes at a multiple of 64. From 2 MiB on they are a separate block in huge pages:
    the first touch of 4 KiB pages costs five times as much as the copy into them."""
    return np.asarray(_Memory(_aligned(nbytes)))


def allocate_all(sizes: Sequence[int]) -> list[Bytes]:
    """As `allocate`, for each of `sizes`. Small neighbours share a block of a few MiB, which is freed with the last of
    them."""
    out: list[Bytes] = []
    group: list[int] = []
    filled = 0

    def share() -> None:
        nonlocal filled
        raw = _aligned(filled)
        at = 0
        for nbytes in group:
            out.append(np.asarray(_Memory(raw[at : at + nbytes])))
            at += _rounded(nbytes, ALIGNMENT)
        group.clear()
        filled = 0

    for nbytes in sizes:
        if nbytes >= _HUGE:
            share()
            out.append(allocate(nbytes))
            continue
        if filled >= _GROUP:
            share()
        group.append(nbytes)
        filled += _rounded(nbytes, ALIGNMENT)
    share()
    return out


def _aligned(nbytes: int) -> Bytes:
    if nbytes < _HUGE:
        raw = np.empty(nbytes + ALIGNMENT, np.uint8)
        start = -_address(raw) % ALIGNMENT
        return raw[start : start + nbytes]
    # mmap's own default is MAP_SHARED, which never gets huge pages.
    pages = mmap.mmap(-1, _rounded(nbytes, mmap.PAGESIZE) + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = np.frombuffer(pages, np.uint8)
    start = -_address(raw) % _HUGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE, start, nbytes // _HUGE * _HUGE)  # no page that would be used only in part
    return raw[start : start + nbytes]


def _address(raw: Bytes) -> int:
    return raw.__array_interface__["data"][0]


def _rounded(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit
