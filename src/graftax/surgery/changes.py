"""What a replacement did to each leaf: hashes before and after, how many values changed, and by how much."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftax.tree import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_PIECE = 1 << 18  # bytes of the old leaf that are compared at a time


@dataclass(frozen=True, slots=True)
class Change:
    """One leaf before and after: sha256 of its bytes as files hold them (C order, little end first), how many values
    have other bits, and the largest difference (None where one is not finite, for packed, complex and unchanged
    leaves)."""

    path: str
    spec: TensorSpec
    selected: bool
    before: str
    after: str
    changed: int | None = 0
    largest: float | None = None

    @property
    def untouched(self) -> bool:
        return self.before == self.after

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "shape": list(self.spec.shape),
            "dtype": self.spec.dtype,
            "selected": self.selected,
            "before": self.before,
            "after": self.after,
            "changed": self.changed,
            "values": self.spec.size,
            "largest": self.largest,
        }


@dataclass(slots=True)
class Report:
    """The report of a replacement. `changes` grows as the tensors are made; `untied`: (name, other name) of tensors
    that no longer share memory."""

    leaves: int
    selected: tuple[str, ...]
    edits: tuple[tuple[str, str], ...]
    untied: tuple[tuple[str, str], ...] = ()
    changes: list[Change] = field(default_factory=list[Change])

    @property
    def untouched(self) -> int:
        """How many leaves kept their hash."""
        return sum(change.untouched for change in self.changes)

    def as_json(self) -> dict[str, Any]:
        """`changes`: the selected leaves; `untouched`: path -> hash of the others."""
        return {
            "leaves": self.leaves,
            "selected": list(self.selected),
            "edits": [{"selector": selector, "value": value} for selector, value in self.edits],
            "untied": [list(pair) for pair in self.untied],
            "changes": [change.as_json() for change in self.changes if change.selected],
            "untouched": {change.path: change.after for change in self.changes if not change.selected},
        }


class Comparison:
    """Takes the new bytes of one leaf, in order and in parts of whole values, and compares them with the old ones.

    old  (start, count) -> these bytes of the old leaf; None for a leaf that stays as it is
    """

    __slots__ = ("_after", "_at", "_before", "_changed", "_largest", "_old", "_path", "_spec")

    def __init__(self, path: str, spec: TensorSpec, old: Callable[[int, int], Array] | None) -> None:
        self._path, self._spec, self._old = path, spec, old
        self._before, self._after = hashlib.sha256(), hashlib.sha256()
        self._at = self._changed = 0
        self._largest = 0.0

    def take(self, new: Array) -> None:
        """The next bytes, as a flat uint8 array."""
        self._after.update(new.data)
        if self._old is None:
            return
        for start in range(0, new.size, _PIECE):
            piece = new[start : start + _PIECE]
            old = self._old(self._at + start, piece.size)
            self._before.update(old.data)
            if not self._spec.packed:
                self._compare(old, piece)
        self._at += new.size

    def _compare(self, old: Array, new: Array) -> None:
        from graftax.tree.dtypes import numpy_dtype

        dtype = numpy_dtype(self._spec.dtype)
        changed, largest = difference(old.view(dtype), new.view(dtype), self._spec.kind)
        self._changed += changed
        self._largest = max(self._largest, largest or 0.0)

    def done(self) -> Change:
        """The change of the whole leaf."""
        after = self._after.hexdigest()
        before = after if self._old is None else self._before.hexdigest()
        found = Change(self._path, self._spec, self._old is not None, before, after)
        if before == after:
            return found
        measured = not self._spec.packed and self._spec.kind in "fiub" and math.isfinite(self._largest)
        return Change(
            self._path,
            self._spec,
            True,
            before,
            after,
            None if self._spec.packed else self._changed,
            self._largest if measured else None,
        )


def difference(old: Array, new: Array, kind: str) -> tuple[int, float | None]:
    """(values with other bits, the largest difference between old and new: inf if one of these is NaN or infinite) of
    two flat arrays of one dtype."""
    import numpy as np

    width = old.dtype.itemsize
    word = np.dtype(f"u{min(width, 8)}")
    off = np.not_equal(np.ascontiguousarray(old).view(word), np.ascontiguousarray(new).view(word))
    changed = int(np.count_nonzero(off if width <= 8 else off.reshape(-1, width // 8).any(axis=1)))
    if kind not in "fiub":
        return changed, None
    if not changed:
        return 0, 0.0
    with np.errstate(all="ignore"):
        wide = old.astype(np.float64)
        largest = float(np.abs(np.subtract(wide, new.astype(np.float64), out=wide), out=wide).max())
        if math.isfinite(largest):
            return changed, largest
        moved = off if width <= 8 else off.reshape(-1, width // 8).any(axis=1)
        apart = np.abs(old[moved].astype(np.float64) - new[moved].astype(np.float64))
        return changed, float(apart.max()) if np.isfinite(apart).all() else math.inf
