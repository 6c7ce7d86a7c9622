"""http and https: ranges of one file. What a server answers is not believed until its status, its Content-Range and its
length say that it is the range that was asked for, of the file that was opened.

Source: RFC 9110, sections 8.8 (validators), 14 (ranges), 15.4 (redirects).
"""

from __future__ import annotations

import http.client
import re
import ssl
import time
from collections.abc import Iterator, Mapping

from graftax.errors import StorageError, UsageError, escape
from graftax.formats.remote.connect import Connections, extra_headers, login, target_of
from graftax.formats.remote.retry import Again, NotFoundError, retried
from graftax.formats.remote.url import HTTP, Address

LONGEST = 300.0
"""Seconds that one answer may take."""
_AT_MOST = 1 << 20  # bytes taken at a time
REDIRECTS = 10
_MOVED = {301, 302, 303, 307, 308}
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_EXPIRED = {400, 401, 403, 404, 410}
"""What a store may say of a signed address that a redirect led to, once its time is over."""
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_VALIDATORS = ("ETag", "Last-Modified")
_BROKEN = (OSError, http.client.HTTPException)
_DOWNLOAD = "Download the file and name that."

WHY: Mapping[int, tuple[str, str]] = {
    401: ("may not be read: it asks for a login", f"Give it as https://USER:PASSWORD@HOST/... {_DOWNLOAD}"),
    403: ("may not be read: forbidden", _DOWNLOAD),
    404: ("does not exist", ""),
    410: ("does not exist any more", ""),
}
"""status -> what it means, and what to do"""


class HttpFile:
    """A file at an address. Its size and what tells a change are those of the first answer."""

    def __init__(self, address: Address, connections: Connections) -> None:
        self._asked = self._now = address
        self._connections = connections
        self._seen: dict[str, str] | None = None

    def start(self, length: int) -> tuple[int, bytes]:
        """(size of the file, its first `length` bytes or fewer). Raises NotFoundError, StorageError."""
        return retried(str(self._asked), lambda: self._begin(length))

    def fetch(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on. Raises StorageError: unreadable, or not the file that was opened."""
        done = 0

        def rest() -> None:
            nonlocal done
            for count in self._range(offset + done, buffer[done:]):
                done += count
            if done < len(buffer):
                raise Again(f"the answer ended after {done:,} of {len(buffer):,} bytes")

        retried(str(self._asked), rest)

    def settle(self) -> None:
        """Every answer was checked as it came."""

    def _begin(self, length: int) -> tuple[int, bytes]:
        buffer = bytearray(length)
        done = sum(self._range(0, memoryview(buffer)))
        assert self._seen is not None
        size = int(self._seen["size"])
        if done != min(size, length):
            raise Again(f"the answer ended after {done:,} of {min(size, length):,} bytes")
        return size, bytes(buffer[:done])

    # ------------------------------------------------------------ one request

    def _range(self, first: int, buffer: memoryview) -> Iterator[int]:
        """Asks for a range once, and gives the counts of bytes as they come into `buffer`: fewer than asked for where
        the answer breaks off, which raises Again if the connection says so."""
        where, connection, answer = self._ask(first, first + len(buffer) - 1)
        left = self._length(answer, first, len(buffer))
        end = time.monotonic() + LONGEST
        try:
            place = 0
            while left and (came := answer.read1(min(left, _AT_MOST))):
                buffer[place : place + len(came)] = came
                place, left = place + len(came), left - len(came)
                yield len(came)
                if left and time.monotonic() > end:
                    raise Again(f"the answer took more than {LONGEST:g} s")
            sound = not left and not answer.read(1)
        except _BROKEN as error:
            connection.close()
            raise Again(f"the connection broke: {_why(error)}") from error
        except BaseException:
            connection.close()
            raise
        if sound:
            self._connections.give(where, connection)
        else:
            connection.close()

    def _ask(self, first: int, last: int) -> tuple[Address, http.client.HTTPConnection, http.client.HTTPResponse]:
        """The answer to a request for a range, redirects followed: (where it came from, its connection, the answer)."""
        where, remembered = self._now, self._now != self._asked
        for _ in range(REDIRECTS + 1):
            connection, answer = self._send(where, first, last)
            if answer.status in _MOVED:
                connection.close()
                where = self._moved(where, answer.getheader("Location"))
            elif answer.status in _EXPIRED and remembered:
                connection.close()
                where, remembered = self._asked, False
            else:
                self._now = where
                if answer.status != 206:
                    connection.close()
                return where, connection, answer
        raise StorageError(f"{self._asked} is redirected more than {REDIRECTS} times")

    def _moved(self, where: Address, location: str | None) -> Address:
        try:
            there = where.moved(location or "")
        except UsageError as error:
            raise StorageError(f"{self._asked} is redirected to what is no address: {error}") from None
        if there.scheme not in HTTP or (where.scheme == "https" and there.scheme == "http"):
            raise StorageError(
                f"{self._asked} is redirected to {there}, which is not protected as it is", next=_DOWNLOAD
            )
        return there

    def _send(
        self, where: Address, first: int, last: int
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        headers = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity", "User-Agent": "graftax"}
        if self._asked.user and where.origin == self._asked.origin:  # nobody else is told
            headers["Authorization"] = login(self._asked.user)
        used = True
        while True:
            connection, used = self._connections.take(where)
            try:
                connection.request("GET", target_of(where), headers=headers | dict(extra_headers(where)))
                return connection, connection.getresponse()
            except ssl.SSLCertVerificationError as error:
                connection.close()
                raise StorageError(f"{self._asked} is not trusted: {escape(error.verify_message)}") from None
            except _BROKEN as error:
                connection.close()
                if not used:  # one that lay idle may have been closed by the server, which is no failure
                    raise Again(f"no connection: {_why(error)}") from error

    # ------------------------------------------------------------ what an answer must say

    def _length(self, answer: http.client.HTTPResponse, first: int, wanted: int) -> int:
        """How many bytes the answer carries; 0 of an empty file. Raises Again, NotFoundError, StorageError."""
        label, status = str(self._asked), answer.status
        if status in _PASSING:
            raise Again(f"the server answers {status}", _pause(answer.getheader("Retry-After")))
        if status == 416 and self._seen is None and answer.getheader("Content-Range") == "bytes */0":
            self._same(answer, 0)
            return 0
        if status == 416 and self._seen is not None:
            raise _changed(label)
        if status == 200:
            raise StorageError(f"{label}: the server knows no ranges, it sends the file whole", next=_DOWNLOAD)
        if status != 206:
            what, then = WHY.get(status, (f"cannot be read: the server answers {status}", _DOWNLOAD))
            raise (NotFoundError if status in (403, 404, 410) else StorageError)(
                f"{label} {what} ({status})", next=then
            )
        given = answer.getheader("Content-Range") or ""
        found = _RANGE.fullmatch(given.strip())
        if found is None or answer.getheader("Content-Encoding", "identity").lower() != "identity":
            raise StorageError(
                f"{label}: the server does not say which bytes it sends, or packs them "
                f"(Content-Range {escape(repr(given))})",
                next=_DOWNLOAD,
            )
        begin, end, size = map(int, found.groups())
        self._same(answer, size)
        count, length = end - begin + 1, answer.getheader("Content-Length")
        if begin != first or not 0 < count <= wanted or end >= size or (length is not None and length != str(count)):
            raise StorageError(
                f"{label}: the server sends other bytes than were asked for (expected {first}-{first + wanted - 1}, "
                f"found {begin}-{end} of {size}, {escape(length)} bytes)",
                next=_DOWNLOAD,
            )
        return count

    def _same(self, answer: http.client.HTTPResponse, size: int) -> None:
        """StorageError where this is not the file of the first answer."""
        told = {name: value for name in _VALIDATORS if (value := answer.getheader(name))} | {"size": str(size)}
        if self._seen is None:
            self._seen = told
        elif any(told.get(name) != value for name, value in self._seen.items()):
            answer.close()
            raise _changed(str(self._asked))


def _changed(label: str) -> StorageError:
    return StorageError(f"{label} changed while it was read", next="Read it again once its writer is done.")


def _pause(text: str | None) -> float | None:
    """Seconds that Retry-After asks for; its form with a date is not looked at."""
    return float(text) if text and text.isascii() and text.isdigit() and len(text) < 6 else None


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "the server stays silent"
    text = getattr(error, "strerror", None) or str(error)
    return escape(f"{type(error).__name__}: {text}" if text else type(error).__name__)
