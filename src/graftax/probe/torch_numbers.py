"""The numbers, in a record, of the values that tensors hold."""

from __future__ import annotations

from typing import Any

import torch

from graftax.probe.record import Record
from graftax.probe.torch_nests import array_of


class Numbers:
    """Tensor -> the number of its value. Every tensor is kept alive, since its id is the key."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._number: dict[int, int | None] = {}
        self._alive: list[Any] = []

    def of(self, tensor: torch.Tensor) -> int | None:
        """The number of a tensor's value, recorded if it is new."""
        key = id(tensor)
        if key not in self._number:
            self._number[key] = self.record.values.add(array_of(tensor)) if tensor.numel() > 1 else None
            self._alive.append(tensor)
        return self._number[key]

    def again(self, tensor: torch.Tensor) -> int | None:
        """The same for a tensor that an op has written: what its id held before is forgotten."""
        self._number.pop(id(tensor), None)
        return self.of(tensor)

    def same(self, view: torch.Tensor, tensor: torch.Tensor) -> int | None:
        """The number of a view of all of a tensor: the tensor's own."""
        number = self._number[id(view)] = self.of(tensor)
        if number is not None:
            self.record.values.items[number].shapes.add(tuple(view.shape))
        return number

    def keep(self, *made: torch.Tensor) -> None:
        self._alive += made
