"""Write a large file front to back, bypassing the page cache: copying into the cache, its page faults and its
write-back cost more than the write itself. A thread writes while the caller makes the next bytes.

If a file system refuses O_DIRECT, the same calls go through the page cache.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from graftax.formats.io import system

BLOCK = 4096
"""The alignment that O_DIRECT requires of offsets, lengths and addresses, on every disk in use."""
BUFFERS = 3
BUFFER_BYTES = 8 << 20
_NO_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY}


class DirectFile:
    """A file of a known size, written by `append` (front to back) and `write_at` (anywhere). If the file existed
    before, bytes that are not written stay. Leaving the `with` block writes the rest; the caller syncs. Raises the
    system's OSError at the first call that sees it."""

    def __init__(self, path: Path, size: int, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._size = size
        self._plain = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        self._direct = -1
        try:
            if os.fstat(self._plain).st_size != size:  # else another process may be writing to it
                _reserve(self._plain, size)
            self._direct = _open_direct(path)
        except BaseException:
            self._close()
            raise
        length = max(BLOCK, min(buffer_bytes, -(-size // BLOCK) * BLOCK) // BLOCK * BLOCK)
        self._free: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._full: queue.SimpleQueue[tuple[mmap.mmap, int, int] | None] = queue.SimpleQueue()
        self._failed: list[BaseException] = []
        self._length = length
        self._buffer: mmap.mmap | None = None
        self._used = 0  # filled bytes of the buffer
        self._start = 0  # the buffer's place in the file
        self._writer = threading.Thread(target=self._write, name="graftax-writer", daemon=True)
        self._writer.start()

    @property
    def place(self) -> int:
        """The place of the next `append`."""
        return self._start + self._used

    def append(self, data: Any) -> None:
        """Write bytes (or a flat uint8 array) at the current place."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        while len(view):
            if self._buffer is None:
                self._buffer = self._take()
            # A buffer ends at a block border of the file. A buffer that begins inside a block goes through the page
            # cache and ends with that block.
            inside = self._start % BLOCK
            room = (BLOCK - inside if inside else self._length) - self._used
            part = view[:room]
            self._buffer[self._used : self._used + len(part)] = part
            self._used += len(part)
            view = view[len(part) :]
            if len(part) == room:
                self._hand_over()

    def skip(self, place: int) -> None:
        """The next `append` goes to `place`. The bytes in between are written by `write_at`, or stay zero."""
        if self.place != place:
            self._hand_over()
            self._start = place

    def write_at(self, offset: int, data: Any) -> None:
        """Write bytes anywhere that `append` does not write."""
        system.write_at(self._plain, offset, memoryview(data).cast("B"))

    def flush(self) -> None:
        """When this returns, everything written so far is on the disk."""
        self._hand_over()
        idle = [self._take() for _ in range(BUFFERS)]  # all buffers are free once everything is written
        for buffer in idle:
            self._free.put(buffer)
        if self._failed:
            raise self._failed[0]
        os.fdatasync(self._plain)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._hand_over()
            self._full.put(None)
            self._writer.join()
            if error is None and self._failed:
                raise self._failed[0]
            if error is None:
                os.ftruncate(self._plain, self._size)
        finally:
            self._close()

    def _take(self) -> mmap.mmap:
        buffer = self._free.get()
        if self._failed:
            raise self._failed[0]
        return buffer

    def _hand_over(self) -> None:
        if self._buffer is not None and self._used:
            self._full.put((self._buffer, self._start, self._used))
            self._buffer = None
        self._start += self._used
        self._used = 0

    def _write(self) -> None:
        while (job := self._full.get()) is not None:
            buffer, start, length = job
            if not self._failed:
                try:
                    self._write_one(memoryview(buffer)[:length], start)
                except BaseException as exc:  # raised for the caller that waits for a buffer
                    self._failed.append(exc)
            self._free.put(buffer)

    def _write_one(self, data: memoryview, start: int) -> None:
        """Whole blocks are written directly. The rest, and a buffer that does not begin at a block, go through the page
        cache."""
        whole = len(data) // BLOCK * BLOCK if self._direct >= 0 and start % BLOCK == 0 else 0
        if whole:
            try:
                system.write_at(self._direct, start, data[:whole])
            except OSError as exc:
                if exc.errno not in _NO_DIRECT:
                    raise
                os.close(self._direct)
                self._direct, whole = -1, 0
        system.write_at(self._plain, start + whole, data[whole:])

    def _close(self) -> None:
        for fd in (self._direct, self._plain):
            if fd >= 0:
                os.close(fd)
        self._direct = self._plain = -1


def _open_direct(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0)) if hasattr(os, "O_DIRECT") else -1
    except OSError as exc:
        if exc.errno not in _NO_DIRECT:
            raise
        return -1


def _reserve(fd: int, size: int) -> None:
    """Reserve disk space for the whole file: a full disk shows at once, and blocks are not allocated one by one."""
    try:
        if size:
            os.posix_fallocate(fd, 0, size)
    except OSError as exc:
        if exc.errno not in _NO_DIRECT:
            raise
        os.ftruncate(fd, size)
