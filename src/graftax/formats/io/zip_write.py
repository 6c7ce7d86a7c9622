"""Write zip archives with stored members. All places are known before a byte is written: the bytes depend only on the
content, data begins at multiples of 64 bytes, and a tensor may come in parts.

Source of the layout: PKWARE APPNOTE.TXT 6.3.10, sections 4.3 to 4.5.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftax.formats.base import Log
from graftax.formats.io.direct import DirectFile
from graftax.formats.io.system import storage_error
from graftax.formats.io.zip_read import CENTRAL, END, END64, LOCAL, LOCATOR64, STORED

_FULL = 0xFFFFFFFF
_DATE = (1 << 5) | 1  # 1 January 1980, midnight: the first day that a zip can express
_ALIGN = 64


@dataclass(frozen=True, slots=True)
class MemberPlace:
    """The place of a stored member: its header begins at `start`, its data at `data`."""

    start: int
    data: int
    size: int


def places(sizes: Mapping[str, int]) -> tuple[dict[str, MemberPlace], int]:
    """The place of each member of these sizes, with its data at a multiple of 64 bytes, and the start of the table of
    contents. They are known before a byte is written, so members can be written in any order."""
    out: dict[str, MemberPlace] = {}
    at = 0
    for name, size in sizes.items():
        # header, name, zip64 field (20 bytes), and a field of padding (4 bytes at least)
        before = at + LOCAL.size + len(_encoded(name)) + 24
        data = -(-before // _ALIGN) * _ALIGN
        out[name] = MemberPlace(at, data, size)
        at = data + size
    return out, at


def member_header(name: str, place: MemberPlace, crc: int) -> bytes:
    """The bytes of a member before its data."""
    raw = _encoded(name)
    extra = place.data - place.start - LOCAL.size - len(raw)
    pad = extra - 24
    head = LOCAL.pack(b"PK\x03\x04", 45, _flags(name), STORED, 0, _DATE, crc, _FULL, _FULL, len(raw), extra)
    # torch pads with the field 0x4246 too
    return head + raw + struct.pack("<2H2Q2H", 1, 16, place.size, place.size, 0x4246, pad) + b"\0" * pad


def directory(members: Mapping[str, MemberPlace], crcs: Mapping[str, int], start: int) -> bytes:
    """The table of contents, which begins at `start`, and the end of the archive."""
    out = bytearray()
    for name, place in members.items():
        raw = _encoded(name)
        sizes = (_FULL, _FULL, len(raw), 28, 0, 0, 0, 0, _FULL)
        out += CENTRAL.pack(b"PK\x01\x02", 45, 45, _flags(name), STORED, 0, _DATE, crcs[name], *sizes)
        out += raw + struct.pack("<2H3Q", 1, 24, place.size, place.size, place.start)
    count, length = len(members), len(out)
    out += END64.pack(b"PK\x06\x06", END64.size - 12, 45, 45, 0, 0, count, count, length, start)
    out += LOCATOR64.pack(b"PK\x06\x07", 0, start + length, 1)
    few = min(count, 0xFFFF)
    out += END.pack(b"PK\x05\x06", 0, 0, few, few, min(length, _FULL), min(start, _FULL), 0)
    return bytes(out)


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _flags(name: str) -> int:
    return 0 if name.isascii() else 0x800


def write_archive(
    path: Path, sizes: Mapping[str, int], runs: Iterable[tuple[str, int, tuple[Any, ...]]], log: Log | None
) -> None:
    """Write an archive with members of these sizes, in this order. `runs`: (member, start, pieces of bytes from `start`
    on); each member comes from front to end before the next. Bytes that an earlier run wrote, according to the `log`,
    do not come.

    Raises StorageError.
    """
    members, end = places(sizes)
    crcs: dict[str, int] = {} if log is None else dict(log.notes)
    length = end + len(directory(members, dict.fromkeys(members, 0), end))
    try:
        with DirectFile(path, length) as file:
            for member, start, pieces in runs:
                place, crc, at = members[member], crcs[member] if start else 0, start
                file.skip(place.data + start)
                for piece in pieces:
                    crc = zlib.crc32(piece, crc)
                    file.append(piece)
                    at += len(piece)
                crcs[member] = crc
                if at == place.size:
                    file.write_at(place.start, member_header(member, place, crcs[member]))
                if log is not None:
                    log.written(path, file.flush, {member: crcs[member]})
            file.skip(end)
            file.append(directory(members, crcs, end))
            if log is not None:
                log.written(path, file.flush, last=True)
    except OSError as error:
        raise storage_error(error, path) from error
