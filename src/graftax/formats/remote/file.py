"""A remote file, read by ranges. It takes the place of a Path for the readers, and keeps bytes that arrived without
being asked for.

Small tensors that lie side by side are fetched in one request and kept in memory for a while. A large tensor that is
read in pieces is kept in a temporary file, so that none of its bytes is fetched twice. A tensor that is read at once is
not kept.
"""

from __future__ import annotations

import bisect
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from graftax.errors import StorageError
from graftax.formats.io.system import Stamp, storage_error, write_at
from graftax.formats.remote.url import Address

HEAD = 1 << 18
"""Bytes of the first request: most headers fit into them."""
BLOCK = 1 << 22
"""Bytes fetched around a small read while it is unknown which bytes belong together."""
SMALL, GROUP = 1 << 20, 1 << 23
"""Tensors up to SMALL bytes that lie side by side are fetched together, up to GROUP bytes."""
HELD = 1 << 25
"""The most bytes kept in memory."""
PART, AT_ONCE = 1 << 22, 4
"""A long read is split into parts of this size; this many parts run at a time."""
SPOOLS, STEP = 12, 1 << 21
"""Temporary files, one for each large tensor that is read in pieces (by several threads: a file each, at least), and
the unit in which they are filled."""


class Transport(Protocol):
    """How ranges are fetched. `start` comes first; several threads call `fetch`; `settle` is called when a whole read
    has arrived. All raise StorageError, also if the file has changed."""

    def start(self, length: int) -> tuple[int, bytes]: ...
    def fetch(self, offset: int, buffer: memoryview) -> None: ...
    def settle(self) -> None: ...


class RemoteFile:
    """An open file at an address: its size and its first bytes are known."""

    def __init__(self, address: Address, transport: Transport) -> None:
        self.address = address
        self._transport = transport
        self.size, self._head = transport.start(HEAD)
        self._bounds: Sequence[int] = range(0, self.size + BLOCK, BLOCK)  # the last may lie beyond the end
        self._held: OrderedDict[int, bytearray] = OrderedDict()
        self._spools: OrderedDict[int, _Spool] = OrderedDict()
        self._lock = threading.RLock()

    def __str__(self) -> str:
        return str(self.address)

    @property
    def name(self) -> str:
        return self.address.name

    @property
    def suffix(self) -> str:
        return self.address.suffix

    def stamp(self) -> Stamp:
        """Takes the place of a local file's stamp, with the size only. Later answers reveal a change."""
        return Stamp(0, 0, self.size, 0)

    def lay_out(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Set where the tensors are. From now on this decides which bytes are fetched together."""
        bounds, last = [0], False  # whether the last unit holds small tensors
        for begin, end in sorted(range for range in ranges if range[0] < range[1]):
            small = end - begin <= SMALL
            if not (small and last and end - bounds[-1] <= GROUP) and begin > bounds[-1]:
                bounds.append(begin)
            last = small
        with self._lock:
            self._bounds = [*bounds, self.size]
            self._held.clear()
            self._spools.clear()

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after another, from `offset` on. Raises StorageError."""
        end = offset + sum(map(len, buffers))
        if end > self.size:
            raise StorageError(f"{self} has {self.size:,} bytes, expected {end:,}")
        with self._lock:
            for buffer in buffers:
                done = 0
                while done < len(buffer):
                    done += self._some(offset + done, offset + len(buffer), buffer[done:])
                offset += done

    def _some(self, at: int, end: int, buffer: memoryview) -> int:
        """Fill the beginning of `buffer`, which is to receive bytes `at` to `end`. Returns the number of bytes."""
        if at < len(self._head):
            return _copy(self._head, at, min(end, len(self._head)), buffer)
        unit = bisect.bisect_right(self._bounds, at) - 1
        low, high = self._bounds[unit], min(self._bounds[unit + 1], self.size)
        if unit not in self._held and unit not in self._spools:
            if at == low and high <= end:
                return self._straight(unit, end, buffer)
            if high - low > GROUP:
                self._spool(unit, high - low)
            else:
                self._hold(unit, low, high)
        stop = min(end, high)
        if unit in self._held:
            self._held.move_to_end(unit)
            return _copy(self._held[unit], at - low, stop - low, buffer)
        self._spools.move_to_end(unit)
        spool = self._spools[unit]
        for start, length in spool.lacking(at - low, stop - low):
            piece = bytearray(length)
            self._fetch(low + start, memoryview(piece))
            spool.put(start, piece)
        return spool.read(at - low, buffer[: stop - at])

    def _straight(self, unit: int, end: int, buffer: memoryview) -> int:
        """Fetch units that are wanted whole straight into `buffer`, in one read."""
        low, after = self._bounds[unit], unit + 1
        last = len(self._bounds) - 1
        while after < last and min(self._bounds[after + 1], self.size) <= end and after not in self._held:
            after += 1
        count = min(self._bounds[after], self.size) - low
        self._fetch(low, buffer[:count])
        return count

    def _hold(self, unit: int, low: int, high: int) -> None:
        data = bytearray(high - low)
        self._fetch(low, memoryview(data))
        self._held[unit] = data
        while sum(map(len, self._held.values())) > HELD:
            self._held.popitem(last=False)

    def _spool(self, unit: int, length: int) -> None:
        self._spools[unit] = _Spool(length)
        while len(self._spools) > SPOOLS:
            self._spools.popitem(last=False)

    def _fetch(self, offset: int, buffer: memoryview) -> None:
        starts = range(0, len(buffer), PART)
        if len(starts) <= 1:
            self._transport.fetch(offset, buffer)
        else:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for _ in pool.map(lambda at: self._transport.fetch(offset + at, buffer[at : at + PART]), starts):
                    pass
        self._transport.settle()


def _copy(data: bytes | bytearray, start: int, stop: int, buffer: memoryview) -> int:
    buffer[: stop - start] = memoryview(data)[start:stop]
    return stop - start


class _Spool:
    """A tensor in a temporary file, which holds only the parts that were put there."""

    def __init__(self, length: int) -> None:
        self._file = tempfile.TemporaryFile(prefix="graftax-")  # noqa: SIM115 (closed when it is released)
        self._length = length
        self._there = bytearray(-(-length // STEP))  # one per step

    def lacking(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The missing parts of start..stop: (place, length), each fetched in one request."""
        out: list[tuple[int, int]] = []
        for step in range(start // STEP, -(-stop // STEP)):
            if self._there[step]:
                continue
            place, length = step * STEP, min(STEP, self._length - step * STEP)
            if out and sum(out[-1]) == place and out[-1][1] < PART * AT_ONCE:
                out[-1] = (out[-1][0], out[-1][1] + length)
            else:
                out.append((place, length))
        return out

    def put(self, start: int, data: bytearray) -> None:
        """Raises StorageError where the disk is full."""
        try:
            write_at(self._file.fileno(), start, memoryview(data))
        except OSError as error:
            raise storage_error(error, tempfile.gettempdir()) from None
        for step in range(start // STEP, -(-(start + len(data)) // STEP)):
            self._there[step] = 1

    def read(self, start: int, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer):
            done += os.preadv(self._file.fileno(), [buffer[done:]], start + done)
        return len(buffer)
