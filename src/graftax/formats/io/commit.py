"""All or nothing: write to a staging name beside the destination, then put it in place in one step.

The staging folder is `.<name>.graftax-<random>` in the destination's folder, locked (flock) while its run lives. What a
killed run left is therefore known by its free lock, and the next run to the same destination removes it. A run that
may be resumed after a stop has one of a fixed name instead, `.<name>.graftax-resume`, which stays until it succeeds.
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
    """Where to write (`payload`, of the destination's own name), and what was tidied up on the way in. With `keep` a
    run that was stopped may have left it there in part."""

    payload: Path
    notes: list[str] = field(default_factory=list[str])


@contextmanager
def staged(out: Path, *, folder: bool, clobber: bool = True, keep: bool = False) -> Iterator[Staging]:
    """A place to write `out`; it replaces `out` when the block ends well, and vanishes when it does not, unless `keep`:
    then it is the same place for every run, one at a time, until one ends well.

    The block creates `payload`: a file, or a folder if `folder`. Its files are fsynced and get mode 0666 & ~umask, or
    that of the file they replace. `out` must have been checked (`saving`); what another process puts there meanwhile
    is replaced, or kept if not `clobber`.

    Raises OSError as the system gives it; StorageError where `out` came to be and must not be replaced, or where
    another run has the place to keep.
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
            # They are exchanged, and then the payload is what was at `out` before: no journal may speak of it.
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
    """Removes a folder, also where Ctrl-C comes meanwhile."""
    try:
        shutil.rmtree(place, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(place, ignore_errors=True)
        raise


# ---------------------------------------------------------------- the staging folder


def _prefix(out: Path) -> str:
    name = out.name
    while len(os.fsencode(name)) > 200:  # a name may take 255 bytes
        name = name[: len(name) - 1]
    return f".{name}{_STAGING}"


def _make_staging(out: Path) -> tuple[Path, int]:
    """A new, locked staging folder and the descriptor that holds the lock."""
    while True:
        place = out.parent / f"{_prefix(out)}{os.urandom(4).hex()}"
        try:
            os.mkdir(place, 0o700)
            lock = _lock(place)
        except KeyboardInterrupt:
            _remove(place)
            raise
        if lock is not None:
            return place, lock  # else another run took it for a stale one just now


def _kept_staging(out: Path) -> tuple[Path, int]:
    """The staging folder for runs that may be resumed, made where there is none, and the descriptor of its lock."""
    place = resume_place(out)
    for _ in range(10):
        with contextlib.suppress(FileExistsError):
            os.mkdir(place, 0o700)
        lock = _lock(place)
        if lock is None and os.path.isdir(place) and not os.path.islink(place):
            raise StorageError(
                f"another run writes {escape(out)}, to be resumed after a stop (it has {escape(place)} locked)",
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
            raise StorageError(f"the file system of {escape(out)} has no locks, which resuming needs")
        raise StorageError(
            f"{escape(place)} was made by another user, or may be written by others",
            next="Remove it, or choose a name.",
        )
    raise StorageError(f"{escape(place)} cannot be made: something else is there", next="Remove what is there.")


def resume_place(out: Path) -> Path:
    """Where a run that may be resumed stages `out`."""
    return out.parent / f"{_prefix(out)}{_RESUME}"


def journal_path(payload: Path) -> Path:
    """The file beside a payload that says what of it is done (see `journal`); never of the payload's own name."""
    return payload.with_name("journal" if payload.name != "journal" else "journal-of-it")


def _lock(place: Path) -> int | None:
    """A descriptor of the folder that holds its lock; None where another holds it, or the folder has gone.
    On a file system without locks it is returned unlocked: then nothing is ever stale."""
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
    """Removes what killed runs left for this destination (with `keep` not what can be resumed), puts back what one had
    put aside; says so."""
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
    """Puts back what a stopped run had put aside, where nothing took its place; says so."""
    old = _put_aside(out)
    if old is None or os.path.lexists(out):
        return []
    os.rename(old, out)
    return [f"restored {escape(out)} from {escape(old)}, which a stopped run had put aside"]


def _put_aside(out: Path) -> Path | None:
    """The folder that a run had put aside, to put another in its place."""
    old = out.with_name(out.name + LEFTOVER)
    return old if os.path.isdir(old) and not os.path.islink(old) else None


def _flocks(fd: int) -> bool:
    """Does this file system lock at all?"""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# ---------------------------------------------------------------- modes and disk


def _natural_modes(place: Path) -> tuple[int, int]:
    """Modes of a new file and a new folder here. Asked of the system: reading the umask means setting it."""
    probe = place / f"probe-{os.urandom(4).hex()}"
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    file_mode = stat.S_IMODE(os.stat(probe).st_mode)
    os.unlink(probe)
    os.mkdir(probe, 0o777)
    folder_mode = stat.S_IMODE(os.stat(probe).st_mode)
    os.rmdir(probe)
    return file_mode, folder_mode


def _settle(payload: Path, out: Path, files_mode: int, folders_mode: int) -> None:
    """Modes and fsync for everything of `payload`."""
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
    """`payload` becomes `out` in one step; an old folder ends up where `payload` was."""
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
        raise StorageError(f"{escape(out)} came to be meanwhile, and is not to be replaced") from None
    except OSError as exc:
        if exc.errno not in _UNSUPPORTED:
            raise
        if os.path.lexists(out):
            raise StorageError(f"{escape(out)} came to be meanwhile, and is not to be replaced") from None
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
    """renameat2(2), which os does not have. OSError ENOSYS where the C library has none."""
    import ctypes

    call: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here = ctypes.c_int(-100)  # AT_FDCWD
    if call(here, os.fsencode(source), here, os.fsencode(target), ctypes.c_uint(flags)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(source), None, str(target))
