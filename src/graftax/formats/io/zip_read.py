"""Zip archives as torch and NumPy write them: a strict table of contents; members are read by position and checked by
their CRC. `zip_write` writes such archives.

The reader is strict because a zip can be read in two ways (by its local headers or its central directory), can hide
data in gaps and overlaps, and can unpack to 1000 times its size. It accepts only archives that have a single reading.

Source of the layout: PKWARE APPNOTE.TXT 6.3.10, sections 4.3 to 4.5.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from graftax.errors import FormatError, UnsafeInputError, escape
from graftax.formats.io.source import StampedFile, check_ratio
from graftax.tree.limits import check_limit

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR64 = struct.Struct("<4sIQI")
STORED, DEFLATED = 0, 8
_CHUNK = 1 << 22
_FULL = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Member:
    """A file in the archive: where its local header starts, and where its data must end at the latest."""

    name: str
    method: int
    crc: int
    stored: int  # bytes in the archive
    size: int  # bytes of the file
    start: int
    bound: int


def zip_members(source: StampedFile) -> dict[str, Member]:
    """Name -> member, in the order of the archive's table.

    Raises FormatError for anything other than one clean archive from the first byte to the last, UnsafeInputError for
    encrypted members and for a compression ratio beyond the limit.
    """
    table, start = _central_directory(source)
    members = list(_entries(source, table, start))
    by_name = {member.name: member for member in members}
    if len(by_name) != len(members):
        raise _broken(source, "two members have one name")
    order = sorted(members, key=lambda member: member.start)
    if order and order[0].start != 0:
        raise _broken(source, "there are bytes before the first member")
    out: dict[str, Member] = {}
    bounds = {a.name: b.start for a, b in pairwise(order)}
    for member in members:
        bound = bounds.get(member.name, start)
        if member.start + LOCAL.size + member.stored > bound:
            raise _broken(source, f"member {escape(member.name)} overlaps the next one or the table of contents")
        out[member.name] = Member(
            member.name, member.method, member.crc, member.stored, member.size, member.start, bound
        )
    total = sum(member.size for member in members)
    check_ratio("ratio", total, source.size, f"{escape(source.path)} unpacks to too many bytes")
    return out


def data_offset(source: StampedFile, member: Member) -> int:
    """Where the data of a member starts. FormatError if its local header disagrees with the table."""
    return _opened(source, member, 0)[0]


def _opened(source: StampedFile, member: Member, length: int) -> tuple[int, bytearray]:
    """Where the data of a member starts, and its first bytes: at most `length` of them."""
    encoded = member.name.encode("utf-8", "surrogateescape")
    other = member.name.encode("cp437", "replace")
    guess = LOCAL.size + len(encoded) + (128 + length if length else 0)
    raw = source.read(member.start, min(member.bound - member.start, guess))
    sig, _, _, method, _, _, _, _, _, name_length, extra_length = LOCAL.unpack_from(raw)
    name = bytes(raw[LOCAL.size : LOCAL.size + name_length])
    if sig != b"PK\x03\x04" or method != member.method or name not in (encoded, other):
        raise _broken(source, f"the header of member {escape(member.name)} disagrees with the table of contents")
    start = member.start + LOCAL.size + name_length + extra_length
    if start + member.stored > member.bound:
        raise _broken(source, f"member {escape(member.name)} overlaps the next one or the table of contents")
    return start, raw[start - member.start : start - member.start + min(length, member.stored)]


def read_member(source: StampedFile, member: Member, check: bool = True) -> bytearray:
    """All bytes of a member. FormatError if their number is wrong or (with `check`) their CRC differs."""
    data = source.read(data_offset(source, member), member.stored)
    if member.method == DEFLATED:
        data = _inflate(source, member, data, member.size + 1)
    if len(data) != member.size or (check and zlib.crc32(data) != member.crc):
        raise _broken(source, f"member {escape(member.name)} is damaged (size or CRC)")
    return data


def read_start(source: StampedFile, member: Member, length: int) -> bytearray:
    """The first bytes of a member, at most `length`, unchecked."""
    offset, data = _opened(source, member, length)
    if len(data) < min(length, member.stored):
        data = source.read(offset, min(length, member.stored))
    return data if member.method == STORED else _inflate(source, member, data, length, partial=True)


def check_crc(source: StampedFile, member: Member) -> None:
    """FormatError if the bytes of a stored member do not have its CRC."""
    offset, crc = data_offset(source, member), 0
    room = memoryview(bytearray(min(_CHUNK, member.size)))
    for done in range(0, member.size, _CHUNK):
        part = room[: min(_CHUNK, member.size - done)]
        source.read_into(offset + done, part)
        crc = zlib.crc32(part, crc)
    if crc != member.crc:
        raise _broken(source, f"member {escape(member.name)} is damaged (CRC)")


@dataclass(frozen=True, slots=True)
class Positions:
    """Stored members read by position. Each is checked by its CRC before its first byte is returned."""

    source: StampedFile
    checked: bool = True
    starts: dict[str, int] = field(default_factory=dict[str, int])

    def read_into(self, member: Member, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of a stored member. FormatError if the member is damaged or too short."""
        if start < 0 or start + len(buffer) > member.size:
            raise _broken(self.source, f"member {escape(member.name)} is too short")
        begin = self.starts.get(member.name)
        if begin is None:
            if self.checked:
                check_crc(self.source, member)
            begin = self.starts[member.name] = data_offset(self.source, member)
        self.source.read_into(begin + start, buffer)


def first_member_name(head: bytes) -> str | None:
    """The name of the member in a zip's first bytes, as much of it as they hold; None if they are not of a zip."""
    if len(head) < LOCAL.size or head[:4] != b"PK\x03\x04":
        return None
    length = LOCAL.unpack_from(head)[9]
    return head[LOCAL.size : LOCAL.size + length].decode("utf-8", "replace")


def _broken(source: StampedFile, what: str) -> FormatError:
    return FormatError(f"{escape(source.path)} is not a sound zip archive: {what}")


def _inflate(source: StampedFile, member: Member, data: bytearray, length: int, partial: bool = False) -> bytearray:
    engine = zlib.decompressobj(-15)
    try:
        out = bytearray(engine.decompress(data, length))
    except zlib.error as error:
        raise _broken(source, f"member {escape(member.name)} does not unpack ({error})") from error
    if not partial and (not engine.eof or engine.unused_data):
        raise _broken(source, f"member {escape(member.name)} does not unpack to the size it promises")
    return out


def _central_directory(source: StampedFile) -> tuple[bytearray, int]:
    """The table of contents and where it starts."""
    if source.size < END.size:
        raise _broken(source, "it is too short")
    end_at = source.size - END.size
    sig, disk, disk2, here, count, size, start, comment = END.unpack(source.read(end_at, END.size))
    if sig != b"PK\x05\x06":
        raise _broken(source, "it does not end where a zip ends (truncated, or bytes follow it)")
    if disk or disk2 or comment or here != count:
        raise _broken(source, "it is one part of several, or carries a comment")
    table_end = end_at
    if end_at >= LOCATOR64.size:
        sig, _, at, _ = LOCATOR64.unpack(source.read(end_at - LOCATOR64.size, LOCATOR64.size))
        if sig == b"PK\x06\x07":
            if at + END64.size != end_at - LOCATOR64.size:
                raise _broken(source, "its zip64 end is not where it says")
            sig, _, _, _, _, _, _, count, size, start = END64.unpack(source.read(at, END64.size))
            if sig != b"PK\x06\x06":
                raise _broken(source, "its zip64 end is missing")
            table_end = at
    if start + size != table_end:
        raise _broken(source, "its table of contents is not where it says")
    check_limit("header", size, escape(source.path))
    check_limit("leaves", max(count, size // CENTRAL.size), escape(source.path))
    return source.read(start, size), start


def _entries(source: StampedFile, table: bytearray, start: int) -> Iterator[Member]:
    at = 0
    while at < len(table):
        if at + CENTRAL.size > len(table) or table[at : at + 4] != b"PK\x01\x02":
            raise _broken(source, "its table of contents is damaged")
        fields = CENTRAL.unpack_from(table, at)
        _, _, _, flags, method, _, _, crc, stored, size, name_length, extra_length, comment, disk, _, _, offset = fields
        at += CENTRAL.size
        raw = bytes(table[at : at + name_length])
        extra = bytes(table[at + name_length : at + name_length + extra_length])
        at += name_length + extra_length + comment
        if at > len(table) or disk not in (0, 0xFFFF):
            raise _broken(source, "its table of contents is damaged")
        name = raw.decode("utf-8", "surrogateescape") if flags & 0x800 or raw.isascii() else raw.decode("cp437")
        if flags & 0x41:
            raise UnsafeInputError(f"{escape(source.path)}: member {escape(name)} is encrypted")
        if method not in (STORED, DEFLATED):
            raise _broken(source, f"member {escape(name)} is compressed by method {method}; only deflate is supported")
        size, stored, offset = _wide(extra, size, stored, offset)
        if (method == STORED and size != stored) or offset + LOCAL.size + stored > start:
            raise _broken(source, f"member {escape(name)} has impossible sizes")
        yield Member(name, method, crc, stored, size, offset, start)


def _wide(extra: bytes, size: int, stored: int, offset: int) -> tuple[int, int, int]:
    """The three numbers; a number whose 32-bit field is full comes from the zip64 extra field."""
    wide: list[int] = []
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            body = extra[at + 4 : at + 4 + length]
            wide = [value for (value,) in struct.iter_unpack("<Q", body[: len(body) // 8 * 8])]
        at += 4 + length
    numbers = [size, stored, offset]
    for i, number in enumerate(numbers):
        if number == _FULL and wide:
            numbers[i] = wide.pop(0)
    return numbers[0], numbers[1], numbers[2]
