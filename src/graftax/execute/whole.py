"""Run an entry on whole arrays: for ops that need their tensors whole."""

from __future__ import annotations

from typing import Any

import numpy as np

from graftax.errors import Failure, PlanError, escape
from graftax.execute.meter import Meter
from graftax.ops import Cast, Keep, apply_chain, invert_chain
from graftax.ops.base import count_same_bits
from graftax.ops.casting import cast_array
from graftax.plans import Entry, Plan
from graftax.tree import Checkpoint

Array = np.ndarray[Any, Any]


def check_source(plan: Plan, source: Checkpoint) -> None:
    """PlanError unless `source` has, with values, every tensor that was planned for."""
    failures: list[Failure] = []
    for entry in plan.entries:
        for name in entry.sources:
            want, have = plan.source.specs[name], source.get(name)
            if have != want:
                failures.append(Failure("not what was planned for", source.label, name, str(want), str(have or "none")))
    if failures:
        raise PlanError(f"the plan does not fit {escape(source.label)}", failures, next="Plan again for this source.")
    if any(entry.sources for entry in plan.entries) and not source.has_values:
        raise PlanError(f"{escape(source.label)} has names, shapes and dtypes, but no values to port")


def run_entry(entry: Entry, source: Checkpoint, like: Checkpoint | None) -> tuple[tuple[Array, ...], Meter | None]:
    """All targets of one entry, whole, and what was counted on the way, if there was anything to."""
    if entry.ops and isinstance(entry.ops[0], Keep):
        if like is None:
            entry.ops[0].apply(())
        assert like is not None
        return tuple(like.read(name) for name in entry.targets), None
    given = tuple(source.read(name) for name in entry.sources)
    if entry.exact and not any(isinstance(op, Cast) for op in entry.ops):
        return apply_chain(entry.ops, given), None
    return _run_measured(entry, given)


def _run_measured(entry: Entry, given: tuple[Array, ...]) -> tuple[tuple[Array, ...], Meter]:
    """Run the entry and its inverse; count the source values that come back, and those that would in float32."""
    meter = Meter(entry.exact)
    arrays = given
    for op in entry.ops:
        if isinstance(op, Cast):
            done = [cast_array(array, op.target, op.overflow) for array in arrays]
            arrays = tuple(array for array, _ in done)
            for _, count in done:
                meter.casts += count
        else:
            arrays = op.apply(arrays)
    if not entry.exact:
        meter.equal = _equal(given, apply_chain(invert_chain(entry.ops), arrays))
        meter.total = sum(array.size for array in given)
        meter.narrow = all(array.dtype.itemsize == 2 for array in given)
        if meter.narrow and meter.equal != meter.total:
            meter.equal_in_float32 = _equal_in_float32(entry, given)
    return arrays, meter


def _equal_in_float32(entry: Entry, given: tuple[Array, ...]) -> int:
    """How many 16-bit source values would come back if the entry were held in float32."""
    ops = tuple(op for op in entry.ops if not isinstance(op, Cast))
    there = apply_chain(ops, tuple(array.astype(np.float32) for array in given))
    back = apply_chain(invert_chain(ops), there)
    return _equal(given, tuple(array.astype(old.dtype) for array, old in zip(back, given, strict=True)))


def _equal(old: tuple[Array, ...], new: tuple[Array, ...]) -> int:
    """Values with the same bits."""
    return sum(count_same_bits(a, b) for a, b in zip(old, new, strict=True))
