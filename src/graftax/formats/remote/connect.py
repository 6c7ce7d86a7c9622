"""Connections to web servers that are kept open and reused; through a proxy if the environment names one."""

from __future__ import annotations

import base64
import http.client
import ssl
import threading
from collections.abc import Mapping
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from graftax.errors import UsageError
from graftax.formats.remote.url import Address

TIMEOUT = 30.0
"""The longest silence of a server, in seconds."""
_SAFE = "/%:@!$&'()*+,;=~-._"


class Connections:
    """Idle connections by address. Several threads share them; each connection serves one thread at a time."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None

    def take(self, address: Address) -> tuple[http.client.HTTPConnection, bool]:
        """(a connection, whether it was used before). The server may have closed a used connection meanwhile."""
        with self._lock:
            idle = self._idle.get(address.origin)
            if idle:
                return idle.pop(), True
            if address.scheme == "https" and self._context is None:
                self._context = ssl.create_default_context()
        return _connect(address, self._context), False

    def give(self, address: Address, connection: http.client.HTTPConnection) -> None:
        """Return a connection for the next request, after its answer was read to the end."""
        with self._lock:
            self._idle.setdefault(address.origin, []).append(connection)


def target_of(address: Address) -> str:
    """The target of a request to the address: its path, or the whole URL for a proxy."""
    path = quote(address.path, safe=_SAFE) + (f"?{quote(address.query, safe=_SAFE + '?')}" if address.query else "")
    plain = address.scheme == "http" and _proxy(address) is not None
    return f"http://{address.host}{path}" if plain else path


def login(user: str) -> str:
    """The value of an Authorization header for `USER:PASSWORD` from a URL."""
    return "Basic " + base64.b64encode(unquote(user).encode("utf-8")).decode("ascii")


def extra_headers(address: Address) -> Mapping[str, str]:
    """The headers that a proxy requires with every request."""
    proxy = _proxy(address)
    if address.scheme == "http" and proxy is not None and proxy.user:
        return {"Proxy-Authorization": login(proxy.user)}
    return {}


def _proxy(address: Address) -> Address | None:
    """The proxy that http_proxy, https_proxy and no_proxy select."""
    text = getproxies().get(address.scheme)
    host = urlsplit(f"//{address.host}").hostname or ""
    if not text or proxy_bypass(host):
        return None
    found = urlsplit(text if "://" in text else f"http://{text}")
    user, _, place = found.netloc.rpartition("@")
    try:
        _ = urlsplit(f"//{place}").port
    except ValueError:
        raise UsageError(f"the proxy that {address.scheme}_proxy names is malformed") from None
    return Address("http", user, place, "/", "")


def _connect(address: Address, context: ssl.SSLContext | None) -> http.client.HTTPConnection:
    proxy = _proxy(address)
    place = urlsplit(f"//{(proxy or address).host}")
    if address.scheme == "http":
        return http.client.HTTPConnection(place.hostname or "", place.port, timeout=TIMEOUT)
    made = http.client.HTTPSConnection(place.hostname or "", place.port, timeout=TIMEOUT, context=context)
    if proxy is not None:
        wanted = urlsplit(f"//{address.host}")
        headers = {"Proxy-Authorization": login(proxy.user)} if proxy.user else {}
        made.set_tunnel(wanted.hostname or "", wanted.port or 443, headers)
    return made
