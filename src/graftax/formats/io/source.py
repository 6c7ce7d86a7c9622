"""A file and its state when it was opened: the readers of pickles, zips and msgpack read from it by position."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from graftax.errors import FormatError, UnsafeInputError, escape
from graftax.formats.io import files, system
from graftax.tree.limits import SLACK, limit, variable


@dataclass(frozen=True, slots=True)
class StampedFile:
    """A regular file, and the stamp that reveals a change."""

    path: Path
    stamp: system.Stamp

    @property
    def size(self) -> int:
        return self.stamp.size

    def read(self, offset: int, length: int) -> bytearray:
        """`length` bytes from `offset`, in a buffer that the caller may keep and change.

        Raises FormatError if the file is too short, StorageError if it changed or cannot be read.
        """
        self._check(offset, length)
        return files.read_bytes(self.path, self.stamp, offset, length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on; raises as `read`."""
        self._check(offset, len(buffer))
        files.read_into(self.path, self.stamp, offset, buffer)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError(
                f"{escape(self.path)} is truncated: bytes {offset:,} to {offset + length:,} are missing",
                next=f"It has {self.size:,} bytes. Fetch or write it again.",
            )


def open_stamped(path: Path) -> StampedFile:
    """`path` as a StampedFile. StorageError if it is missing, unreadable or not a regular file."""
    return StampedFile(path, files.stamp(path))


def check_ratio(name: str, large: int, small: int, what: str) -> None:
    """UnsafeInputError if `large` bytes for `small` stored ones exceed the limit `name` (and SLACK); `what` begins the
    message."""
    if large > limit(name) * small + SLACK:
        ratio = -(-large // max(small, 1))
        raise UnsafeInputError(
            f"{what}: {large:,} bytes from {small:,} stored; the limit is {limit(name):,} to 1",
            next=f"If you trust this file, set {variable(name)}={ratio}.",
        )
