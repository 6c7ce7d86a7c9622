"""A request that fails for a reason that may pass is made again, a few times, with pauses that grow."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from graftax.errors import StorageError

Value = TypeVar("Value")

TRIES = 5
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds; the pause doubles each time, and varies so that many readers do not come back at once."""


class Again(Exception):
    """A request failed, and may work when it is made again. `pause`: seconds that the server asks to wait."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class NotFoundError(StorageError):
    """Nothing is at the address, or nothing that we may see."""


def retried(label: str, action: Callable[[], Value]) -> Value:
    """What `action` gives; it is called again while it raises Again, TRIES times in all.

    Raises StorageError where it fails for good, and whatever else `action` raises.
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
