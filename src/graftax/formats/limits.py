"""How much a file may ask for before it is refused as unsafe, each with an environment variable that raises it."""

from __future__ import annotations

import os

from graftax.errors import UnsafeInputError, UsageError

LIMITS: dict[str, tuple[int, str]] = {
    "header": (100_000_000, "bytes of a header or index"),
    "leaves": (1_000_000, "tensors in a checkpoint"),
    "depth": (64, "levels of nesting"),
    "compression": (100, "bytes unpacked per byte stored"),
    "dense": (1000, "bytes in memory per byte stored"),
}
"""name -> (the limit, what it counts). `GRAFTAX_LIMIT_<NAME>` overrides it."""


def variable(name: str) -> str:
    """The environment variable of a limit."""
    return f"GRAFTAX_LIMIT_{name.upper()}"


def limit(name: str) -> int:
    """The limit now. UsageError where its variable is not a whole number above zero."""
    text = os.environ.get(variable(name))
    if text is None:
        return LIMITS[name][0]
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{variable(name)} must be a whole number above zero, found {text!r}")
    return int(text)


def check_limit(name: str, found: int, label: str) -> None:
    """UnsafeInputError where `found` passes the limit."""
    if found > (allowed := limit(name)):
        raise UnsafeInputError(
            f"{label}: {found:,} {LIMITS[name][1]}; the limit is {allowed:,}",
            next=f"If you trust this file, set {variable(name)}={found}.",
        )
