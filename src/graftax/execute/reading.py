"""The reader of one thread: its buffer and its open sources."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from graftax.execute.fill_tile import Values, open_values
from graftax.execute.memory import allocate
from graftax.plans import Entry
from graftax.tree import Checkpoint

Array = np.ndarray[Any, Any]
Lock = AbstractContextManager[Any]


class Reader:
    """A buffer to read into, and the sources of the current entry. The sources stay open until another entry is asked
    for, so a file that cannot be read by position is read once for all tiles and targets.

      source  the checkpoint
      nbytes  size of the scratch; the system provides only the part that is used
      lock    held while the checkpoint reads a whole tensor, which not every reader can do for two threads at once
    """

    __slots__ = ("_entry", "_lock", "_source", "_values", "nbytes", "scratch")

    def __init__(self, source: Checkpoint, nbytes: int, lock: Lock) -> None:
        self._source, self._lock = source, lock
        self.scratch = allocate(nbytes)
        self.nbytes = 0
        """Bytes of the source's values that were read since the last call of `noted`."""
        self._entry: Entry | None = None
        self._values: list[Values] = []

    def opened(self, entry: Entry) -> list[Values]:
        """The entry's sources."""
        if self._entry is not entry:
            self.let_go()  # release the old values before reading more
            self._values = [open_values(self._source, name, self._count, self._whole) for name in entry.sources]
            self._entry = entry
        return self._values

    def let_go(self) -> None:
        self._entry, self._values = None, []

    def noted(self) -> int:
        """Return `nbytes` and reset it to 0."""
        nbytes, self.nbytes = self.nbytes, 0
        return nbytes

    def _count(self, nbytes: int) -> None:
        self.nbytes += nbytes

    def _whole(self, name: str) -> Array:
        with self._lock:
            return self._source.read(name)
