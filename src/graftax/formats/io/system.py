"""What the operating system reports about a file: its stamp, and its errors in words. Also: write all of a buffer."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from graftax.errors import StorageError, escape

CHUNK = 1 << 30  # Linux moves at most 2 GiB per call
KINDS: tuple[tuple[int, str], ...] = (
    (stat.S_IFDIR, "a folder"),
    (stat.S_IFIFO, "a named pipe (FIFO)"),
    (stat.S_IFCHR, "a character device"),
    (stat.S_IFBLK, "a block device"),
    (stat.S_IFSOCK, "a socket"),
)
REASONS: dict[int, tuple[str, str]] = {
    errno.ENOENT: ("does not exist", ""),
    errno.ENOTDIR: ("does not exist: a part of its path is a file", ""),
    errno.EACCES: ("may not be opened: permission denied", ""),
    errno.EPERM: ("may not be opened: not permitted", ""),
    errno.EROFS: ("is on a read-only file system", ""),
    errno.ELOOP: ("is a loop of links", ""),
    errno.ENAMETOOLONG: ("has a name that is too long", ""),
    errno.ENOSPC: ("could not be written: the disk is full", "Free some space, then run it again."),
    errno.EDQUOT: ("could not be written: the quota is used up", "Free some space, then run it again."),
    errno.EFBIG: ("could not be written: it is larger than files may be here", "See `ulimit -f`."),
}


def storage_error(exc: OSError, path: object) -> StorageError:
    """The meaning of an OSError on `path` for a user."""
    what, then = REASONS.get(exc.errno or 0, (exc.strerror or str(exc), ""))
    return StorageError(f"{escape(path)} {what}", next=then)


@dataclass(frozen=True, slots=True)
class Stamp:
    """The values that show that a file is still the one that was opened."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def kind_of(mode: int) -> str:
    """What a path is, in words, if it is not a regular file."""
    return next((words for kind, words in KINDS if stat.S_IFMT(mode) == kind), "not a regular file")


def write_at(fd: int, offset: int, data: memoryview) -> None:
    """Write all of `data` at `offset`. Raises the system's OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done : done + CHUNK], offset + done)
