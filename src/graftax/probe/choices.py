"""What a leaf may hold: tensors of torch, each in a reading, alone or joined."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftax.ops import Op, apply_chain
from graftax.probe.record import Record

Array = Any


@dataclass(frozen=True, slots=True)
class Choice:
    """What an unknown holds: sources, the ops of each, and how they are joined: None for one source, ("stack", axis) or
    ("concat", axis). Without sources, `ops` makes a constant."""

    sources: tuple[int, ...]
    ops: tuple[tuple[Op, ...], ...]
    join: tuple[str, int] | None = None

    def array(self, record: Record) -> Array:
        if not self.sources:
            return apply_chain(self.ops[0], ())[0]
        parts = [
            apply_chain(ops, (record.sources[source].array,))[0]
            for source, ops in zip(self.sources, self.ops, strict=True)
        ]
        if self.join is None:
            return parts[0]
        return np.stack(parts, self.join[1]) if self.join[0] == "stack" else np.concatenate(parts, self.join[1])


Option = tuple[dict[int, Choice], int, Array]
"""A choice for each unknown that an event decides, the value in torch's record that it makes, and that value as Flax
makes it (None: it is made again)."""


def regions(choice: Choice, record: Record, shape: Sequence[int]) -> Iterator[tuple[slice | int, ...]]:
    """The part of the joined array that each source fills."""
    assert choice.join is not None
    how, axis = choice.join
    before = (slice(None),) * axis
    start = 0
    around = math.prod(shape) // shape[axis]
    for n, source in enumerate(choice.sources):
        if how == "stack":
            yield (*before, n)
        else:
            size = record.sources[source].array.size // around
            yield (*before, slice(start, start + size))
            start += size
