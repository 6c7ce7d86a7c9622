"""http and https: ranges of one file. A server's answer is accepted only if its status, its Content-Range and its
length confirm that it is the requested range of the opened file.

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
"""The most seconds that one answer may take."""
_AT_MOST = 1 << 20  # bytes read at a time
REDIRECTS = 10
_MOVED = {301, 302, 303, 307, 308}
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_EXPIRED = {400, 401, 403, 404, 410}
"""Answers of a store for a signed redirect address that has expired."""
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_VALIDATORS = ("ETag", "Last-Modified")
_BROKEN = (OSError, http.client.HTTPException)
_DOWNLOAD = "Download the file and name that."

WHY: Mapping[int, tuple[str, str]] = {
    401: ("cannot be read: it needs a login", f"Give it as https://USER:PASSWORD@HOST/... {_DOWNLOAD}"),
    403: ("cannot be read: access is forbidden", _DOWNLOAD),
    404: ("does not exist", ""),
    410: ("no longer exists", ""),
}
"""status -> what it means, and what to do"""


class HttpFile:
    """A file at an address. The first answer determines its size and the validators that reveal a change."""

    def __init__(self, address: Address, connections: Connections) -> None:
        self._asked = self._now = address
        self._connections = connections
        self._seen: dict[str, str] | None = None

    def start(self, length: int) -> tuple[int, bytes]:
        """(size of the file, its first `length` bytes or fewer). Raises NotFoundError, StorageError."""
        return retried(str(self._asked), lambda: self._begin(length))

    def fetch(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on. Raises StorageError if it is unreadable or not the file that was opened."""
        done = 0

        def rest() -> None:
            nonlocal done
            for count in self._range(offset + done, buffer[done:]):
                done += count
            if done < len(buffer):
                raise Again(f"the answer ended after {done:,} of {len(buffer):,} bytes")

        retried(str(self._asked), rest)

    def settle(self) -> None:
        """Nothing to do: every answer was checked as it arrived."""

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
        """Request a range once, and yield the counts of bytes as they arrive in `buffer`. There are fewer than
        requested if the answer breaks off; then it raises Again if the connection reports an error."""
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
        """The answer to a request for a range, after redirects: (where it came from, its connection, the answer)."""
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
            raise StorageError(f"{self._asked} is redirected to a malformed address: {error}") from None
        if there.scheme not in HTTP or (where.scheme == "https" and there.scheme == "http"):
            raise StorageError(
                f"{self._asked} is redirected to {there}, which is less protected than the original address",
                next=_DOWNLOAD,
            )
        return there

    def _send(
        self, where: Address, first: int, last: int
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        headers = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity", "User-Agent": "graftax"}
        if self._asked.user and where.origin == self._asked.origin:  # send the login to nobody else
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
                if not used:  # the server may have closed an idle connection; this is not a failure
                    raise Again(f"no connection: {_why(error)}") from error

    # ------------------------------------------------------------ checks of an answer

    def _length(self, answer: http.client.HTTPResponse, first: int, wanted: int) -> int:
        """The number of bytes that the answer carries; 0 for an empty file. Raises Again, NotFoundError,
        StorageError."""
        label, status = str(self._asked), answer.status
        if status in _PASSING:
            raise Again(f"the server answers {status}", _pause(answer.getheader("Retry-After")))
        if status == 416 and self._seen is None and answer.getheader("Content-Range") == "bytes */0":
            self._same(answer, 0)
            return 0
        if status == 416 and self._seen is not None:
            raise _changed(label)
        if status == 200:
            raise StorageError(f"{label}: the server does not support ranges: it sends the whole file", next=_DOWNLOAD)
        if status != 206:
            what, then = WHY.get(status, (f"cannot be read: the server answers {status}", _DOWNLOAD))
            raise (NotFoundError if status in (403, 404, 410) else StorageError)(
                f"{label} {what} ({status})", next=then
            )
        given = answer.getheader("Content-Range") or ""
        found = _RANGE.fullmatch(given.strip())
        if found is None or answer.getheader("Content-Encoding", "identity").lower() != "identity":
            raise StorageError(
                f"{label}: the server does not say which bytes it sends, or compresses them "
                f"(Content-Range {escape(repr(given))})",
                next=_DOWNLOAD,
            )
        begin, end, size = map(int, found.groups())
        self._same(answer, size)
        count, length = end - begin + 1, answer.getheader("Content-Length")
        if begin != first or not 0 < count <= wanted or end >= size or (length is not None and length != str(count)):
            raise StorageError(
                f"{label}: the server sent other bytes than requested (expected {first}-{first + wanted - 1}, "
                f"found {begin}-{end} of {size}, {escape(length)} bytes)",
                next=_DOWNLOAD,
            )
        return count

    def _same(self, answer: http.client.HTTPResponse, size: int) -> None:
        """StorageError if this is not the file of the first answer."""
        told = {name: value for name in _VALIDATORS if (value := answer.getheader(name))} | {"size": str(size)}
        if self._seen is None:
            self._seen = told
        elif any(told.get(name) != value for name, value in self._seen.items()):
            answer.close()
            raise _changed(str(self._asked))


def _changed(label: str) -> StorageError:
    return StorageError(f"{label} changed while it was read", next="Read it again once its writer is done.")


def _pause(text: str | None) -> float | None:
    """The seconds that Retry-After asks for; its form with a date is ignored."""
    return float(text) if text and text.isascii() and text.isdigit() and len(text) < 6 else None


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "the server does not answer"
    text = getattr(error, "strerror", None) or str(error)
    return escape(f"{type(error).__name__}: {text}" if text else type(error).__name__)
