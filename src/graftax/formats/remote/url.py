"""URLs that name a checkpoint: their parts, and how to show them without their secrets."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from urllib.parse import quote, urljoin, urlsplit

from graftax.errors import UnsafeInputError, UsageError, escape

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

HTTP = ("http", "https")
STORES: dict[str, str] = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "adl": "adlfs",
    "hf": "huggingface_hub",
    "memory": "fsspec",
}
"""scheme of a store that fsspec reads -> the package that it needs. http and https need none."""


@dataclass(frozen=True, slots=True)
class Address:
    """The parts of a URL. `host` is lower case and includes the port; `user` is the part before '@', `query` the part
    after '?'. str() and repr() hide both, because they may be credentials."""

    scheme: str
    user: str = field(repr=False)
    host: str
    path: str
    query: str = field(repr=False)

    def __str__(self) -> str:
        user = "***@" if self.user else ""
        query = "?***" if self.query else ""
        return escape(f"{self.scheme}://{user}{self.host}{self.path}{query}")

    @property
    def url(self) -> str:
        """The whole URL, including secrets."""
        user = f"{self.user}@" if self.user else ""
        query = f"?{self.query}" if self.query else ""
        return f"{self.scheme}://{user}{self.host}{self.path}{query}"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot, as for a Path."""
        stem, dot, ending = self.name.rpartition(".")
        return f".{ending}" if dot and stem and ending else ""

    @property
    def origin(self) -> tuple[str, str]:
        return self.scheme, self.host

    def beside(self, name: str) -> Address:
        """The file of this name in the same folder. `name` came from a file, so it must be a plain relative path.

        Raises UnsafeInputError.
        """
        parts = name.split("/")
        if not name or "\\" in name or "\0" in name or "://" in name or any(p in {"", ".", ".."} for p in parts):
            raise UnsafeInputError(
                f"{self} names the file {escape(name)!r}",
                next="A shard is named by a plain relative path in its folder.",
            )
        raw = quote(name) if self.scheme in HTTP else name
        return replace(self, path=f"{self.path.rpartition('/')[0]}/{raw}")

    def moved(self, location: str) -> Address:
        """The address that a server's `Location` leads to from here. Raises UsageError if it is not a web URL."""
        try:
            joined = urljoin(replace(self, user="").url, location)
        except ValueError:
            raise UsageError(f"{shown(location)} is not a URL") from None
        return parse(joined)


def is_url(text: str) -> bool:
    """True if it begins like a URL ('s3://..')."""
    return _URL.match(text) is not None


def parse(text: str) -> Address:
    """The parts of a URL. Raises UsageError if its scheme is unknown, or it names nothing."""
    if any(ord(char) <= 32 or ord(char) == 127 for char in text):
        raise UsageError(
            f"{shown(text)} has a blank or a control character in it", next="Write it as %20 and the like."
        )
    try:
        found = urlsplit(text)
        host, port = (found.hostname or ""), found.port
    except ValueError:
        raise UsageError(f"{shown(text)} is not a URL: its host or port is malformed") from None
    scheme = found.scheme.lower()
    if scheme not in HTTP and scheme not in STORES:
        hint = "Name the path itself." if scheme == "file" else f"Known: {', '.join((*HTTP, *STORES))}."
        raise UsageError(f"{shown(text)}: unknown scheme {escape(scheme)!r}", next=hint)
    user = found.netloc.rpartition("@")[0]
    if scheme not in HTTP:  # a bucket name stays as it is, and a key may contain '?' or '#'
        rest = text.partition("://")[2]
        authority, slash, path = rest.partition("/")
        user, _, place = authority.rpartition("@")
        return Address(scheme, user, place, slash + path, "")
    if not host:
        raise UsageError(f"{shown(text)} names no host")
    place = f"[{host}]" if ":" in host else host
    return Address(scheme, user, place if port is None else f"{place}:{port}", found.path or "/", found.query)


def split_part(text: str) -> tuple[str, str]:
    """(URL, NAME) of `URL::NAME`; NAME is empty if there is none. '::' in the host ([::1]) does not count."""
    start = text.index("://") + 3
    slash = text.find("/", start)
    at = text.rfind("::")
    if slash < 0 or at < slash:
        return text, ""
    if at + 2 == len(text):
        raise UsageError(f"{shown(text)} names nothing; URL::NAME needs a name")
    return text[:at], text[at + 2 :]


def shown(text: str) -> str:
    """A URL as text, possibly malformed, without anything that could be a secret."""
    scheme, _, rest = text.partition("://")
    _, at, place = rest.rpartition("@")  # a password may contain unquoted '/', '?' and '#'
    return escape(f"{scheme}://{'***@' if at else ''}{place.partition('?')[0]}")
