"""The journal of a run that may be stopped and resumed: it records which tiles of which tensors are already on the
disk.

It stands in the staging folder. Its first line has the key of the output (plan, sources, format, options). One more
line follows each time data reaches the disk; the data is synced before the line is written. A line is the CRC-32 of its
JSON, a blank and the JSON; the first torn line and everything after it are ignored. Tensors are counted in the order in
which the writer requests them, which depends only on what the key covers.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from graftax.errors import escape
from graftax.formats.base import Tile, Tiles
from graftax.formats.io.commit import journal_path

SCHEMA = 1
SYNC_BYTES = 128 << 20
SYNC_SECONDS = 2.0
"""The most work that a stop may cost: after this many bytes or seconds, written data is synced and recorded."""


class Journal:
    """Tiles without those that an earlier run made, and the log of what this run makes (`base.Tiles`, `base.Log`).

    payload  what is written, in a staging folder that only this run holds
    key      what is made, and from what: with another key nothing of an earlier run is used
    """

    def __init__(self, payload: Path, key: str, under: Tiles) -> None:
        place = payload.parent
        self._under, self._place = under, place
        self.told: list[str] = []
        path = journal_path(payload)
        records, length = _records(path)
        if records and (records[0] != _head(key) or not _all_there(place, records)):
            self.told.append(
                f"started anew: the content of {escape(place)} was made from another source or plan, or in another "
                "form, or is gone"
            )
            records = []
        if not records:
            length = 0
            _remove(payload)
        self._notes: dict[str, Any] = {}
        self._finished = self._tile = 0  # finished tensors, and finished tiles of the next one
        counts: dict[str, Any] = {}
        for record in records[1:]:
            self._finished, self._tile = record["finished"], record["tile"]
            self._notes |= record["notes"]
            counts |= record["counts"]
        self._target, self._before = "", None
        if (
            self._tile and records[-1]["unit"] != under.unit
        ):  # the tiles are cut differently now: start the tensor again
            counts[records[-1]["target"]] = records[-1]["before"]
            self._tile = 0
        elif self._tile:
            self._before = records[-1]["before"]
        for target, counted in counts.items():
            under.restore(target, counted)
        if self._finished or self._tile:
            self.told.append(f"resumed after {self._finished} leaves that a stopped run had made")
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, length)
        os.lseek(self._fd, length, os.SEEK_SET)
        self._asked = 0
        self._touched: list[str] = []
        self._noted: dict[str, Any] = {}
        self._files: dict[str, list[int]] = {}
        self._bytes, self._since = 0, time.monotonic()
        if not records:
            self._append(_head(key))
            _sync_folder(place)
            _sync_folder(place.parent)

    # ------------------------------------------------------------ as tiles

    def tiles(self, target: str, contiguous: bool = False, first: int = 0) -> Iterator[Tile]:
        self._asked += 1
        if self._asked <= self._finished:
            self._under.skip(target)
            return
        if first == 0 and self._tile:
            first = self._tile
        else:
            self._before = self._under.counts(target)
        self._target, self._tile = target, first
        self._touched.append(target)
        for tile in self._under.tiles(target, contiguous, first):
            self._tile += 1  # counts once the writer calls `written`
            self._bytes += tile.data.nbytes
            yield tile

    def done(self, target: str) -> None:
        if self._asked > self._finished:
            self._finished, self._tile = self._asked, 0
            self._touched.append(target)
        self._under.done(target)

    def skip(self, target: str) -> None:
        self._under.skip(target)

    @property
    def unit(self) -> int:
        return self._under.unit

    def counts(self, target: str) -> Any:
        return self._under.counts(target)

    def restore(self, target: str, counts: Any) -> None:
        self._under.restore(target, counts)

    # ------------------------------------------------------------ as log

    @property
    def notes(self) -> Mapping[str, Any]:
        return self._notes

    def written(
        self, path: Path, flush: Callable[[], None], notes: Mapping[str, Any] | None = None, last: bool = False
    ) -> None:
        self._noted |= notes or {}
        waited = time.monotonic() - self._since
        if not self._touched or not (last or self._bytes >= SYNC_BYTES or waited >= SYNC_SECONDS):
            return
        flush()
        name = os.path.relpath(path, self._place)
        if name not in self._files:
            for folder in {path.parent, self._place}:  # the file names must reach the disk too
                _sync_folder(folder)
            info = os.stat(path)
            self._files[name] = [info.st_ino, info.st_size]
        counts = {target: self._under.counts(target) for target in dict.fromkeys(self._touched)}
        self._append(
            {
                "finished": self._finished,
                "tile": self._tile,
                "target": self._target,
                "unit": self._under.unit,
                "before": self._before,
                "counts": {target: counted for target, counted in counts.items() if counted is not None},
                "notes": self._noted,
                "file": [name, *self._files[name]],
            }
        )
        # A tensor that is not done yet will be counted further.
        self._touched = [self._target] if self._tile else []
        self._noted = {}
        self._bytes, self._since = 0, time.monotonic()

    def _append(self, record: dict[str, Any]) -> None:
        text = json.dumps(record, separators=(",", ":")).encode("ascii")
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        while line:
            line = line[os.write(self._fd, line) :]
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def _head(key: str) -> dict[str, Any]:
    return {"graftax_journal": SCHEMA, "key": key}


def _records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The complete records, and the number of bytes that they take."""
    try:
        raw = path.read_bytes()
    except OSError:
        return [], 0
    records: list[dict[str, Any]] = []
    length = 0
    for line in raw.splitlines(keepends=True):
        text = line[9:-1]
        if not line.endswith(b"\n") or line[:9] != b"%08x " % zlib.crc32(text):
            break
        records.append(json.loads(text))
        length += len(line)
    return records, length


def _all_there(place: Path, records: list[dict[str, Any]]) -> bool:
    """True if every file that the records name is unchanged."""
    for name, inode, size in {tuple(record["file"]) for record in records[1:]}:
        try:
            info = os.lstat(place / name)
        except OSError:
            return False
        if (info.st_ino, info.st_size) != (inode, size):
            return False
    return True


def _remove(payload: Path) -> None:
    if payload.is_dir() and not payload.is_symlink():
        shutil.rmtree(payload)
    else:
        payload.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
