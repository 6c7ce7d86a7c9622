"""What one run of the torch model made: every value, and which parameter met which value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftax.probe.values import Values

Array = Any


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A tensor that a leaf may hold: a tensor of the state_dict, some of its rows, or the sum of two of them.

    keys   names in the state_dict: one, or the terms of a sum, or (g, v) of a weight norm, or (w, u, v) of a spectral
           norm
    rows   the rows along `axis` that are taken, in order; None for all. `element`: the one row, without that axis
    how    "tensor", "sum", "weight_norm <axis>" or "spectral_norm"
    array  its values in the run, float64
    names  other names of the same tensor (ties)
    """

    keys: tuple[str, ...]
    array: Array
    rows: tuple[int, ...] | None = None
    how: str = "tensor"
    names: tuple[str, ...] = ()
    axis: int = 0
    element: bool = False


@dataclass(slots=True)
class Record:
    """What a run made.

    values, sources; used: the sources in order of first use; outputs: the floating ones, by their path in the nest
    twins    value -> sources that were used with it, in order
    made_of  value -> the two sources that it was made of, alone
    fed      sources that something was computed of before they met data: latents, queries (the keys, in order)
    joins    value -> the values that were joined in it along the last axis, and their lengths
    cuts     (source, value that joins others) -> the pieces of the source that each of them is multiplied by
    """

    values: Values
    sources: list[Source] = field(default_factory=list[Source])
    twins: dict[int, list[int]] = field(default_factory=dict[int, "list[int]"])
    outputs: dict[str, Array] = field(default_factory=dict[str, Array])
    used: list[int] = field(default_factory=list[int])
    made_of: dict[int, tuple[int, ...]] = field(default_factory=dict[int, "tuple[int, ...]"])
    joins: dict[int, tuple[tuple[int | None, int], ...]] = field(
        default_factory=dict[int, "tuple[tuple[int | None, int], ...]"]
    )
    fed: dict[int, None] = field(default_factory=dict[int, None])
    cuts: dict[tuple[int, int | None], list[int]] = field(default_factory=dict[tuple[int, "int | None"], "list[int]"])
    _pieces: dict[tuple[Any, ...], int] = field(default_factory=dict[tuple[Any, ...], int])

    def meets(self, value: int | None, source: int) -> None:
        """Note that the model used the source with this value."""
        if source not in self.used:
            self.used.append(source)
        if value is not None:
            row = self.twins.setdefault(value, [])
            if source not in row:
                row.append(source)

    def piece(self, of: int, rows: tuple[int, ...], axis: int = 0, element: bool = False) -> int:
        """The source of some rows of another that is whole; of the one row without its axis, if `element`."""
        key = (of, rows, axis, element)
        if key not in self._pieces:
            whole = self.sources[of]
            array = np.take(whole.array, rows[0] if element else np.array(rows), axis)
            part = Source(whole.keys, array, rows, whole.how, whole.names, axis, element)
            self._pieces[key] = len(self.sources)
            self.sources.append(part)
        return self._pieces[key]

    def derived(self, how: str, terms: Sequence[int], array: Array) -> int:
        """The source that the model computes from others alone: their sum, a weight norm (g, v), a weight over its
        spectral norm (w, u, v)."""
        key = (how, *terms)
        if key not in self._pieces:
            self._pieces[key] = len(self.sources)
            self.sources.append(Source(tuple(k for term in terms for k in self.sources[term].keys), array, None, how))
        return self._pieces[key]

    def alone(self, value: int | None, sources: tuple[int, ...]) -> None:
        """Note that the model made the value from these sources alone."""
        if value is not None:
            self.made_of.setdefault(value, sources)

    def joined(self, value: int | None, parts: Sequence[tuple[int | None, int]]) -> None:
        """Note that the model joined values along their last axis: each value, and its length there."""
        if value is not None:
            self.joins.setdefault(value, tuple(parts))
