"""Retry a request that failed for a temporary reason, a few times, with growing pauses."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from graftax.errors import StorageError

Value = TypeVar("Value")

TRIES = 5
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds. The pause doubles each time, and varies randomly so that many readers do not return at once."""


class Again(Exception):
    """A request failed, but a retry may work. `pause`: seconds that the server asks to wait."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class NotFoundError(StorageError):
    """Nothing is at the address, or nothing that we may read."""


def retried(label: str, action: Callable[[], Value]) -> Value:
    """The result of `action`; it is called again while it raises Again, at most TRIES times in total.

    Raises StorageError if it fails for good, and whatever else `action` raises.
    """
    for failed in range(1, TRIES + 1):
        try:
            return action()
        except Again as again:
            if failed == TRIES:
                raise StorageError(
                    f"{label} could not be read: {again} (tried {TRIES} times)",
                    next="Try again later, or download the file and name that.",
                ) from again
            grown = FIRST_PAUSE * 2 ** (failed - 1) * random.uniform(0.5, 1.0)
            time.sleep(min(max(grown, again.pause or 0.0), LONGEST_PAUSE))
    raise AssertionError("unreachable")
