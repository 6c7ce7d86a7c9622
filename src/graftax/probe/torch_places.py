"""Which entries of a parameter its views hold, so that some of its rows (W[a:b], W.chunk(3)[i]) are a source too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graftax.probe.record import Record
from graftax.probe.torch_nests import tensors

_COPIES = frozenset(("clone", "contiguous", "alias", "detach", "_to_copy", "lift_fresh", "to"))
"""Views and copies that keep the order of the entries."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which entries of a source a tensor holds: their flat numbers, in the tensor's layout."""

    source: int
    index: torch.Tensor

    def along(self, axis: int) -> Place:
        """The entries along one axis of a weight: one for each column of its products."""
        first = self.index[tuple(slice(None) if a == axis else 0 for a in range(self.index.ndim))]
        return Place(self.source, first)


class Places:
    """The places of tensors. whole: id of a tensor that is a source, or a view of all of it -> the source."""

    def __init__(self, record: Record, whole: dict[int, int]) -> None:
        self.record = record
        self.whole = whole
        self._places: dict[int, Place] = {}

    def of(self, tensor: torch.Tensor) -> Place | None:
        """Where the entries of a parameter, or of a view of one, lie in its source."""
        key = id(tensor)
        if key not in self._places and key in self.whole:
            whole = self.record.sources[self.whole[key]]
            if whole.rows is None and whole.array.shape == tuple(tensor.shape):
                index = torch.arange(tensor.numel()).reshape(tensor.shape)
                self._places[key] = Place(self.whole[key], index)
        return self._places.get(key)

    def moved(
        self, name: str, func: Any, args: Any, kwargs: Any, given: torch.Tensor, made: Sequence[torch.Tensor]
    ) -> None:
        """Note where the entries of a view, or a copy, lie."""
        place = self.of(given)
        if place is None:
            return
        index = [place.index.contiguous()] if name in _COPIES else viewed(func, place.index, args, kwargs)
        for t, one in zip(made, index, strict=False):
            if one.shape == t.shape:
                self._places[id(t)] = Place(place.source, one)

    def part(self, made: torch.Tensor) -> None:
        """Some rows of a parameter: W[a:b], W.chunk(3)[i], W[:, a:b], W[i]."""
        place = self._places.get(id(made))
        source = None if place is None else self.located(place)
        if source is not None:
            self.whole[id(made)] = source

    def located(self, place: Place) -> int | None:
        """The source that holds these entries: all, or some rows along one axis. None if it is neither."""
        shape = self.record.sources[place.source].array.shape
        index = place.index
        spans: list[tuple[int, ...]] = [(int(at),) for at in np.unravel_index(int(index.reshape(-1)[0]), shape)]
        count = 1
        for axis, size in enumerate(index.shape):
            line = index[tuple(slice(None) if a == axis else 0 for a in range(index.ndim))].numpy()
            at = np.unravel_index(line, shape)
            moved = [a for a, row in enumerate(at) if (row != row[0]).any()]
            if not moved:  # repeated
                continue
            if len(moved) > 1:
                return place.source if index.numel() == int(np.prod(shape)) else None
            spans[moved[0]] = tuple(int(row) for row in at[moved[0]])
            count *= size
        if count != int(np.prod([len(span) for span in spans])):
            return None
        return self._piece(place.source, spans)

    def columns(self, place: Place, kept: Any) -> int | None:
        """The source of what makes the columns of a product that are kept."""
        shape = self.record.sources[place.source].array.shape
        flat = place.index.reshape(-1).numpy()
        full, part = np.unravel_index(flat, shape), np.unravel_index(flat[kept], shape)
        spans = [
            tuple(range(size)) if (one == one[0]).all() else tuple(int(row) for row in np.unique(some))
            for size, one, some in zip(shape, full, part, strict=True)
        ]
        moved = [len(span) for span, one in zip(spans, full, strict=True) if not (one == one[0]).all()]
        return self._piece(place.source, spans) if int(np.prod(moved)) == int(kept.sum()) else None

    def _piece(self, source: int, spans: Sequence[tuple[int, ...]]) -> int | None:
        """The source of these rows along each axis."""
        shape = self.record.sources[source].array.shape
        short = [axis for axis, span in enumerate(spans) if len(span) < shape[axis]]
        if not short:
            return source
        rows = spans[short[0]]
        if len(short) > 1 or list(rows) != sorted(rows):
            return None
        return self.record.piece(source, rows, short[0], len(rows) == 1 and len(shape) > 1)


def viewed(func: Any, tensor: torch.Tensor, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The same view of another tensor; [] where its memory does not allow that."""
    try:
        return list(tensors(func(tensor, *args[1:], **kwargs)))
    except RuntimeError:
        try:
            return list(tensors(func(tensor.contiguous(), *args[1:], **kwargs)))
        except RuntimeError:
            return []
