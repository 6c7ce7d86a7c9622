"""Host memory that jax can take over as it is: aligned, private, in huge pages where it is large."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np

ALIGNMENT = 64
"""What XLA's CPU client asks of a buffer that it is to use without a copy."""
_HUGE = 2 << 20


class _Memory:
    """The owner of just the bytes of an array: by it the adapters know that the array has its memory to itself."""

    __slots__ = ("__array_interface__", "_keep", "nbytes")

    def __init__(self, raw: np.ndarray[Any, Any]) -> None:
        self._keep = raw
        self.nbytes = raw.nbytes
        self.__array_interface__ = raw.__array_interface__


def allocate(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Flat, writable bytes at a multiple of 64, not initialised. 2 MiB and more get memory of their own in huge pages:
    a first touch of 4 KiB pages costs five times what the copy into them does."""
    if nbytes < _HUGE:
        raw = np.empty(nbytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return np.asarray(_Memory(raw[start : start + nbytes]))
    # mmap's own default is MAP_SHARED, which never gets huge pages.
    size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE + _HUGE
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(pages, np.uint8)
    start = -raw.ctypes.data % _HUGE
    return np.asarray(_Memory(raw[start : start + nbytes]))
