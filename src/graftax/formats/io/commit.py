"""All or nothing: write to a staging name beside the destination, then put the result in place in one step.

The staging folder is `.<name>.graftax-<random>` in the destination's folder, and is locked (flock) while its run lives.
So a free lock identifies the remains of a killed run, and the next run to the same destination removes them. A run that
may be resumed has a folder with a fixed name instead, `.<name>.graftax-resume`, which stays until the run succeeds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from graftax.errors import StorageError, escape
from graftax.formats.base import LEFTOVER

_STAGING = ".graftax-"
_RESUME = "resume"
_NOREPLACE, _EXCHANGE = 1, 2  # flags of renameat2, linux/fs.h
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True, slots=True)
class Staging:
    """The place to write to (`payload`, with the destination's own name), and what was cleaned up before. With `keep`,
    a stopped run may have left a part of the payload there."""

    payload: Path
    notes: list[str] = field(default_factory=list[str])


@contextmanager
def staged(out: Path, *, folder: bool, clobber: bool = True, keep: bool = False) -> Iterator[Staging]:
    """A place to write `out`. The result replaces `out` if the block ends without an error, and is removed otherwise.
    With `keep` it is never removed: every run gets the same place, one run at a time, until one ends without an error.

    The block creates `payload`: a file, or a folder if `folder`. Its files are fsynced and get mode 0666 & ~umask, or
    the mode of the file that they replace. The caller must have checked `out` (`saving`). If another process creates
    `out` meanwhile, it is replaced, or kept if not `clobber`.

    Raises the system's OSError; StorageError if `out` appeared and must not be replaced, or if another run holds the
    resume folder.
    """
    notes = clear_stale(out, keep)
    place, lock = _kept_staging(out) if keep else _make_staging(out)
    try:
        files_mode, folders_mode = _natural_modes(place)
        payload = place / out.name
        yield Staging(payload, notes)
        if not os.path.lexists(payload) or os.path.isdir(payload) != folder:
            raise StorageError(f"nothing was written for {escape(out)}")
        _settle(payload, out, files_mode, folders_mode)
        if keep and folder and os.path.lexists(out):
            # The two are exchanged, and then the payload is the old `out`: no journal may describe it.
            journal_path(payload).unlink(missing_ok=True)
            _sync(place)
        _put(payload, out, folder, clobber)
        keep = False
        _sync(out.parent)
    finally:
        try:
            if not keep:
                _remove(place)
        finally:
            os.close(lock)


def _remove(place: Path) -> None:
    """Remove a folder, even if Ctrl-C arrives meanwhile."""
    try:
        shutil.rmtree(place, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(place, ignore_errors=True)
        raise


# ---------------------------------------------------------------- the staging folder


def _prefix(out: Path) -> str:
    name = out.name
    while len(os.fsencode(name)) > 200:  # a name may have at most 255 bytes
        name = name[: len(name) - 1]
    return f".{name}{_STAGING}"


def _make_staging(out: Path) -> tuple[Path, int]:
    """A new, locked staging folder, and the descriptor that holds the lock."""
    while True:
        place = out.parent / f"{_prefix(out)}{os.urandom(4).hex()}"
        try:
            os.mkdir(place, 0o700)
            lock = _lock(place)
        except KeyboardInterrupt:
            _remove(place)
            raise
        if lock is not None:
            return place, lock  # else another run has just taken it for a stale folder


def _kept_staging(out: Path) -> tuple[Path, int]:
    """The staging folder for resumable runs, created if missing, and the descriptor of its lock."""
    place = resume_place(out)
    for _ in range(10):
        with contextlib.suppress(FileExistsError):
            os.mkdir(place, 0o700)
        lock = _lock(place)
        if lock is None and os.path.isdir(place) and not os.path.islink(place):
            raise StorageError(
                f"another resumable run is writing {escape(out)} (it has locked {escape(place)})",
                next="Let it end, or stop it first.",
            )
        if lock is None:
            continue
        info = os.fstat(lock)
        if info.st_uid == os.geteuid() and not info.st_mode & 0o022 and _flocks(lock):
            return place, lock
        locks = _flocks(lock)
        os.close(lock)
        if not locks:
            raise StorageError(f"the file system of {escape(out)} has no file locks, which resuming needs")
        raise StorageError(
            f"{escape(place)} belongs to another user, or others may write to it",
            next="Remove it, or choose a name.",
        )
    raise StorageError(f"{escape(place)} cannot be made: something else is there", next="Remove what is there.")


def resume_place(out: Path) -> Path:
    """The folder in which a resumable run stages `out`."""
    return out.parent / f"{_prefix(out)}{_RESUME}"


def journal_path(payload: Path) -> Path:
    """The file beside a payload that records which parts of it are done (see `journal`). Its name always differs from
    the payload's."""
    return payload.with_name("journal" if payload.name != "journal" else "journal-of-it")


def _lock(place: Path) -> int | None:
    """A descriptor of the folder that holds its lock; None if another process holds it or the folder is gone. On a file
    system without locks the descriptor is unlocked: then no folder ever counts as stale."""
    try:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        return fd
    try:
        if os.path.samestat(os.fstat(fd), os.stat(place)):
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def clear_stale(out: Path, keep: bool = False) -> list[str]:
    """Remove what killed runs left for this destination (with `keep`, except what can be resumed), and restore what one
    had put aside. Returns notes on it."""
    notes = put_back(out)
    ours = re.compile(re.escape(_prefix(out)) + ("[0-9a-f]{8}" if keep else f"([0-9a-f]{{8}}|{_RESUME})"))
    with os.scandir(out.parent) as entries:
        stale = [e.path for e in entries if ours.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    for path in stale:
        lock = _lock(Path(path))
        if lock is not None:
            if _flocks(lock):
                shutil.rmtree(path, ignore_errors=True)
                notes.append(f"removed {escape(path)}, which a stopped run left")
            os.close(lock)
    old = _put_aside(out)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
        notes.append(f"removed {escape(old)}, which a stopped run had replaced")
    return notes


def put_back(out: Path) -> list[str]:
    """Restore what a stopped run had put aside, if nothing took its place. Returns notes on it."""
    old = _put_aside(out)
    if old is None or os.path.lexists(out):
        return []
    os.rename(old, out)
    return [f"restored {escape(out)} from {escape(old)}, which a stopped run had put aside"]


def _put_aside(out: Path) -> Path | None:
    """The folder that a run had put aside to make room for another."""
    old = out.with_name(out.name + LEFTOVER)
    return old if os.path.isdir(old) and not os.path.islink(old) else None


def _flocks(fd: int) -> bool:
    """True if this file system supports locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# ---------------------------------------------------------------- modes and disk


def _natural_modes(place: Path) -> tuple[int, int]:
    """The modes of a new file and a new folder here. They are measured, because reading the umask requires setting
    it."""
    probe = place / f"probe-{os.urandom(4).hex()}"
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    file_mode = stat.S_IMODE(os.stat(probe).st_mode)
    os.unlink(probe)
    os.mkdir(probe, 0o777)
    folder_mode = stat.S_IMODE(os.stat(probe).st_mode)
    os.rmdir(probe)
    return file_mode, folder_mode


def _settle(payload: Path, out: Path, files_mode: int, folders_mode: int) -> None:
    """Set the modes and fsync everything of `payload`."""
    if not os.path.isdir(payload):
        os.chmod(payload, _mode_of(out, files_mode))
        _sync(payload)
        return
    for here, _, names in os.walk(payload):
        old = out / Path(here).relative_to(payload)
        for name in names:
            path = Path(here, name)
            if not path.is_symlink():
                os.chmod(path, _mode_of(old / name, files_mode))
                _sync(path)
        os.chmod(here, _mode_of(old, folders_mode))
        _sync(Path(here))


def _mode_of(path: Path, otherwise: int) -> int:
    try:
        info = os.lstat(path)
    except OSError:
        return otherwise
    return otherwise if stat.S_ISLNK(info.st_mode) else stat.S_IMODE(info.st_mode)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---------------------------------------------------------------- into place


def _put(payload: Path, out: Path, folder: bool, clobber: bool) -> None:
    """Make `payload` become `out` in one step; an old folder ends up at the place of `payload`."""
    if not clobber:
        _put_new(payload, out)
    elif folder and os.path.lexists(out):
        _exchange(payload, out)
    else:
        os.replace(payload, out)


def _put_new(payload: Path, out: Path) -> None:
    try:
        _renameat2(payload, out, _NOREPLACE)
    except FileExistsError:
        raise StorageError(f"{escape(out)} was created meanwhile and must not be replaced") from None
    except OSError as exc:
        if exc.errno not in _UNSUPPORTED:
            raise
        if os.path.lexists(out):
            raise StorageError(f"{escape(out)} was created meanwhile and must not be replaced") from None
        os.rename(payload, out)


def _exchange(payload: Path, out: Path) -> None:
    try:
        _renameat2(payload, out, _EXCHANGE)
        return
    except OSError as exc:
        if exc.errno not in _UNSUPPORTED:
            raise
    old = out.with_name(out.name + LEFTOVER)
    os.rename(out, old)
    try:
        os.rename(payload, out)
    except BaseException:
        os.rename(old, out)
        raise
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    """renameat2(2), which `os` does not offer. OSError ENOSYS if the C library lacks it."""
    import ctypes

    call: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here = ctypes.c_int(-100)  # AT_FDCWD
    if call(here, os.fsencode(source), here, os.fsencode(target), ctypes.c_uint(flags)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(source), None, str(target))
