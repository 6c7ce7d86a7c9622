"""Object stores through fsspec: s3, gs, az and the like; each needs its own package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftax.errors import StorageError, UsageError, escape
from graftax.formats.remote.retry import Again, NotFoundError, retried
from graftax.formats.remote.url import STORES, Address

_VALIDATORS = (
    *("ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "created", "generation"),
    *("md5Hash", "crc32c", "VersionId", "version_id", "blob_id", "last_commit"),
)
"""Entries of a store's file information that change when the file changes."""
_FINAL = (ValueError, TypeError, NotImplementedError, ImportError, AttributeError)


class StoreFile:
    """A file in a store. Its size and the values that reveal a change are looked up at opening and after every read."""

    def __init__(self, address: Address, store: Any) -> None:
        self._address = address
        self._store, self._path = store, store._strip_protocol(address.url)
        self._seen: Mapping[str, str] | None = None

    def start(self, length: int) -> tuple[int, bytes]:
        """(size of the file, its first `length` bytes or fewer). Raises NotFoundError, StorageError."""
        label = str(self._address)
        self._seen = retried(label, self._told)
        size = int(self._seen["size"])
        head = bytearray(min(length, size))
        self.fetch(0, memoryview(head))
        self.settle()
        return size, bytes(head)

    def fetch(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on. Raises StorageError."""
        if len(buffer):
            retried(str(self._address), lambda: self._fill(offset, buffer))

    def settle(self) -> None:
        """StorageError if the file is not the one that was opened."""
        if retried(str(self._address), self._told) != self._seen:
            raise StorageError(
                f"{self._address} changed while it was read", next="Read it again once its writer is done."
            )

    def _fill(self, offset: int, buffer: memoryview) -> None:
        data = self._called(self._store.cat_file, start=offset, end=offset + len(buffer))
        if len(data) != len(buffer):
            raise Again(f"only {len(data):,} of {len(buffer):,} bytes arrived")
        buffer[:] = data

    def _told(self) -> dict[str, str]:
        info = self._called(self._store.info)
        if info.get("type") == "directory":
            raise NotFoundError(f"{self._address} is a folder", next="Its URL ends in '/', or names a file in it.")
        if not isinstance(info.get("size"), int):
            raise StorageError(
                f"{self._address}: the store does not report its size", next="Download it and name that."
            )
        return {"size": str(info["size"])} | {name: str(info[name]) for name in _VALIDATORS if info.get(name)}

    def _called(self, function: Any, **options: Any) -> Any:
        """The result of a call of the store. Its messages are not passed on, because they may hold addresses with
        secrets."""
        try:
            return function(self._path, **options)
        except FileNotFoundError:
            raise NotFoundError(f"{self._address} does not exist") from None
        except IsADirectoryError:
            raise NotFoundError(
                f"{self._address} is a folder", next="Its URL ends in '/', or names a file in it."
            ) from None
        except PermissionError:
            raise NotFoundError(f"{self._address} cannot be read: permission denied") from None
        except Exception as error:
            name = escape(type(error).__name__)
            if isinstance(error, _FINAL) or "Credential" in name:
                raise StorageError(f"{self._address} cannot be read: {name} of its store") from None
            raise Again(f"{name} of its store") from None


def filesystem(address: Address) -> Any:
    """fsspec's file system for the address. UsageError if a package is not installed."""
    package = STORES[address.scheme]
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise _absent(address, "fsspec") from None
    try:
        # A cached listing would hide that a file has changed.
        return url_to_fs(address.url, use_listings_cache=False, skip_instance_cache=True)[0]
    except ImportError:
        raise _absent(address, package) from None
    except Exception as error:
        raise StorageError(f"{address} cannot be opened: {escape(type(error).__name__)} of its store") from None


def _absent(address: Address, package: str) -> UsageError:
    more = "" if package == "fsspec" else f" {package}"
    return UsageError(
        f"{address}: reading {address.scheme}:// needs {package}, which is not installed",
        next=f"pip install 'graftax[remote]'{more}",
    )
