"""What an edit does to what a model gives: numbers of the outputs, against those of the unchanged weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftax.adapters import nests
from graftax.adapters.containers import is_tensor
from graftax.errors import PlanError, UsageError, escape, with_article
from graftax.parity.metrics import cosine, relative_l2

DISTANCES = ("relative_l2", "cosine")
"""The numbers of outputs without a metric: the worst over all their arrays."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Effect:
    """What one run gave.

    numbers     name -> number: DISTANCES, or those of the metric or of the user's function
    change      name -> number minus the baseline's; empty for DISTANCES, which are changes themselves
    not_finite  how many values of the outputs, or of these numbers, are NaN or infinite
    """

    numbers: Mapping[str, float]
    change: Mapping[str, float]
    not_finite: int = 0

    @property
    def same(self) -> bool:
        """True if the run gave the same as the baseline, bit for bit."""
        return not any(self.change.values()) if self.change else self.numbers["relative_l2"] == 0

    @property
    def size(self) -> float:
        """How large it is: relative L2, or the first number's change. NaN counts as infinite."""
        first = next(iter(self.change.values()), None)
        size = self.numbers["relative_l2"] if first is None else abs(first)
        return math.inf if math.isnan(size) else size


class Baseline:
    """What the unchanged weights gave; `effect` compares with it.

    given   the outputs of the model or of the user's function: arrays in any nest, a number, or {name: number}
    name    what a lone number is called
    metric  outputs -> a number, or {name: number}

    Raises UsageError if there is nothing to compare.
    """

    def __init__(self, given: Any, name: str, metric: Callable[[Any], Any] | None = None) -> None:
        self.name, self.metric = name, metric
        self.arrays: Mapping[str, Array] = {}
        self.numbers = self._numbers(given)
        if self.numbers is not None:
            return
        self.arrays = _arrays(given) if metric is None else {}
        if not self.arrays:
            who, what = (self.name, given) if metric is None else ("the metric", metric(given))
            raise UsageError(
                f"{escape(who)} gives {_kind(what)}, and there is nothing to compare in it",
                next="Give a number or {name: number}" + (", or arrays." if metric is None else "."),
            )

    def effect(self, given: Any) -> Effect:
        """The numbers of a run. PlanError if it did not give what the baseline gave."""
        if self.numbers is None:
            return self._distances(_arrays(given))
        found = self._numbers(given)
        if found is None or set(found) != set(self.numbers):
            raise self._other(_kind(given) if found is None else ", ".join(map(escape, found)))
        change = {name: _minus(found[name], own) for name, own in self.numbers.items()}
        bad = sum(not math.isfinite(number) for number in found.values())
        outputs = _arrays(given) if self.metric is not None else {}
        return Effect({name: found[name] for name in self.numbers}, change, _not_finite(outputs) or bad)

    def _distances(self, arrays: Mapping[str, Array]) -> Effect:
        if set(arrays) != set(self.arrays):
            raise self._other(", ".join(map(escape, arrays)))
        with np.errstate(all="ignore"):
            pairs = [(arrays[path], own) for path, own in self.arrays.items()]
            worst = max(relative_l2(new, own) for new, own in pairs)
            angles = [cosine(new, own) for new, own in pairs]
        least = math.nan if any(map(math.isnan, angles)) else min(angles)
        return Effect(dict(zip(DISTANCES, (worst, least), strict=True)), {}, _not_finite(arrays))

    def _numbers(self, given: Any) -> dict[str, float] | None:
        """The numbers that a function gave; None if it gave something else."""
        given = given if self.metric is None else self.metric(given)
        if (number := _number(given)) is not None:
            return {self.name: number}
        if not isinstance(given, Mapping) or not given:
            return None
        found = {str(name): _number(value) for name, value in given.items()}
        return None if None in found.values() else found  # pyright: ignore[reportReturnType]

    def _other(self, found: str) -> PlanError:
        own = self.numbers if self.numbers is not None else self.arrays
        return PlanError(
            f"{escape(self.name)} gave {', '.join(map(escape, own)) or 'one array'} for the unchanged weights, "
            f"and {found} for changed ones"
        )


def _minus(number: float, own: float) -> float:
    same = number == own or (math.isnan(number) and math.isnan(own))
    return 0.0 if same else number - own


def _number(value: Any) -> float | None:
    """A real number of any library; None for anything else."""
    if isinstance(value, (bool, int, float)):
        return float(value)
    if tuple(getattr(value, "shape", (0,))) != () or not hasattr(value, "dtype"):
        return None
    array = _host(value)
    return float(array) if array.dtype.kind not in "cOSU" else None


def _arrays(given: Any) -> dict[str, Array]:
    """path -> array of every array in a nest."""
    return {path: _host(array) for path, array in nests.leaves(given, nests.is_array)}


def _host(array: Any) -> Array:
    if is_tensor(array):
        from graftax.adapters.torch_arrays import to_numpy

        return to_numpy(array, "an output")
    return np.asarray(array)


def _not_finite(arrays: Mapping[str, Array]) -> int:
    floats = (array for array in arrays.values() if array.dtype.kind in "fcV")
    return sum(int(np.count_nonzero(~np.isfinite(array))) for array in floats)


def _kind(value: Any) -> str:
    return with_article(escape(type(value).__name__))
