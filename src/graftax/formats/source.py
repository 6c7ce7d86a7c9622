"""Reading a file by position: no mmap (a file that shrinks while mapped kills the process), and a file that changed
since it was opened is noticed."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from graftax.errors import FormatError, StorageError, escape


@dataclass(frozen=True, slots=True)
class Source:
    """A regular file as it was when it was first looked at."""

    path: Path
    size: int
    stamp: tuple[int, int, int]  # inode, device, mtime in ns

    def read(self, offset: int, length: int) -> bytearray:
        """`length` bytes from `offset`, in a buffer that the caller may keep and change.

        Raises FormatError where the file is too short for that, StorageError where it changed or cannot be read.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError(
                f"{escape(self.path)} is truncated: bytes {offset} to {offset + length} were asked for",
                next=f"It has {self.size} bytes. Fetch or write it again.",
            )
        data = bytearray(length)
        view = memoryview(data)
        done = 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                if _stamp(os.fstat(file.fileno())) != (self.size, self.stamp):
                    raise StorageError(f"{escape(self.path)} changed since it was opened", next="Open it again.")
                file.seek(offset)
                while done < length:
                    count = file.readinto(view[done:])
                    if not count:
                        raise StorageError(f"{escape(self.path)} shrank while it was read")
                    done += count
        except OSError as error:
            raise StorageError(f"cannot read {escape(self.path)}: {error.strerror or error}") from error
        return data


def open_source(path: Path) -> Source:
    """`path` as a Source. StorageError where it is missing, unreadable or not a regular file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else str(error)
        raise StorageError(f"cannot read {escape(path)}: {text}") from error
    if not stat.S_ISREG(found.st_mode):
        raise StorageError(f"{escape(path)} is not a regular file")
    size, stamp = _stamp(found)
    return Source(Path(path), size, stamp)


def _stamp(found: os.stat_result) -> tuple[int, tuple[int, int, int]]:
    return found.st_size, (found.st_ino, found.st_dev, found.st_mtime_ns)
