"""Read regular files by position, never mapped: a file that shrinks meanwhile gives an error, not a SIGBUS."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from graftax.errors import StorageError, UnsafeInputError, escape
from graftax.formats.io.system import CHUNK, Stamp, kind_of, storage_error
from graftax.formats.remote.file import RemoteFile
from graftax.tree.limits import check_limit

_BUFFERS = 1024  # and into this many buffers
_MOST_KEPT = 64  # files kept open at once; a process may have 256 to 1024


def _stamp(info: os.stat_result) -> Stamp:
    return Stamp(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


def _is(info: os.stat_result, expected: Stamp) -> bool:
    return (
        info.st_mtime_ns == expected.mtime_ns
        and info.st_size == expected.size
        and info.st_ino == expected.inode
        and info.st_dev == expected.device
    )


def stamp(path: Path | RemoteFile) -> Stamp:
    """The stamp of a regular file. StorageError if it is missing, or is a pipe, device, socket or folder."""
    if isinstance(path, RemoteFile):
        return path.stamp()
    try:
        info = os.stat(path)
    except OSError as exc:
        raise storage_error(exc, path) from None
    except ValueError:  # a NUL in the name
        raise StorageError(f"{escape(path)} cannot be the name of a file") from None
    if not stat.S_ISREG(info.st_mode):
        raise StorageError(f"{escape(path)} is {kind_of(info.st_mode)}, expected a file")
    return _stamp(info)


def changed(path: Path) -> StorageError:
    """The error for a file that changed after it was opened."""
    return StorageError(f"{escape(path)} changed while it was read", next="Read it again once its writer is done.")


def read_into(path: Path | RemoteFile, expected: Stamp, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from `offset` on. StorageError if the file no longer matches its stamp."""
    read_apart(path, expected, offset, [buffer])


def read_apart(path: Path | RemoteFile, expected: Stamp, offset: int, buffers: Sequence[memoryview]) -> int:
    """Fill several buffers, one after another, from `offset` on; as `read_into`. Returns the number of bytes."""
    if isinstance(path, RemoteFile):
        path.read_into(offset, buffers)
        return sum(map(len, buffers))
    try:
        begun = offset
        handle = _kept.get((path, expected)) or _open(path, expected)
        try:
            for start in range(0, len(buffers), _BUFFERS):
                some = buffers[start : start + _BUFFERS]
                wanted = sum(map(len, some))
                if wanted > CHUNK or os.preadv(handle.fd, some, offset) != wanted:
                    _read_each(path, handle.fd, offset, some)  # reads may return any length
                offset += wanted
            if not _is(os.fstat(handle.fd), expected):
                raise changed(path)
            return offset - begun
        finally:
            del handle  # an error's traceback would keep it open
    except OSError as exc:
        raise storage_error(exc, path) from None


class _Handle:
    """An open file, closed when nobody reads from it any more."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


def _open(path: Path, expected: Stamp) -> _Handle:
    # Non-blocking: a pipe put in place of the file must not block us.
    handle = _Handle(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    if not _is(os.fstat(handle.fd), expected):
        raise changed(path)
    with _keeping:
        if _keepers and len(_kept) < _MOST_KEPT:
            _kept[path, expected] = handle
    return handle


def _read_each(path: Path, fd: int, offset: int, buffers: Sequence[memoryview]) -> None:
    for buffer in buffers:
        done = 0
        while done < len(buffer):
            count = os.preadv(fd, [buffer[done : done + CHUNK]], offset + done)
            if count == 0:
                raise changed(path)
            done += count
        offset += done


_kept: dict[tuple[Path, Stamp], _Handle] = {}
_keepers = 0
_keeping = threading.Lock()


@contextmanager
def kept_open() -> Iterator[None]:
    """In this block, files that are read stay open, in all threads: opening costs more than reading a small tensor.

    As always, a read returns the content from when the file was opened, or raises an error.
    """
    global _keepers
    with _keeping:
        _keepers += 1
    try:
        yield
    finally:
        with _keeping:
            _keepers -= 1
            if not _keepers:
                _kept.clear()


def read_bytes(path: Path | RemoteFile, expected: Stamp, offset: int, length: int) -> bytearray:
    """`length` bytes from `offset` on; as `read_into`."""
    out = bytearray(length)
    read_into(path, expected, offset, memoryview(out))
    return out


def read_head(path: Path | RemoteFile, length: int = 512) -> bytes:
    """The first bytes of a regular file, fewer if it is shorter."""
    found = stamp(path)
    return bytes(read_bytes(path, found, 0, min(length, found.size)))


def read_whole(path: Path | RemoteFile, limit: str = "header") -> bytes:
    """All of a small file. UnsafeInputError if it exceeds the limit of that name."""
    found = stamp(path)
    check_limit(limit, found.size, escape(path))
    return bytes(read_bytes(path, found, 0, found.size))


# ---------------------------------------------------------------- staying inside a folder


def inside(folder: Path, name: str, label: str) -> Path:
    """`folder`/`name` for a `name` that a file gave. After following links it must stay in the folder; only the links
    of the hub cache into its own `blobs` may leave it.

    Raises UnsafeInputError.
    """
    parts = name.split("/")
    if not name or "\\" in name or "\0" in name or name.startswith("/") or any(p in {"", ".", ".."} for p in parts):
        raise UnsafeInputError(
            f"{label} names the file {escape(name)!r}", next="A shard is named by a plain relative path in its folder."
        )
    path = folder / name
    root = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(path))
    if real.is_relative_to(root) or any(real.is_relative_to(blobs) for blobs in _blobs(root)):
        return path
    raise UnsafeInputError(
        f"{label} names {escape(name)!r}, a link out of its folder",
        next=f"It leads to {escape(real)}. If that is meant, name that file itself.",
    )


def _blobs(root: Path) -> list[Path]:
    """The real folder of the files of a snapshot in the hub cache: <repo>/snapshots/<revision>/.. -> <repo>/blobs."""
    return [p.parent / "blobs" for p in root.parents if p.name == "snapshots" and (p.parent / "blobs").is_dir()]
