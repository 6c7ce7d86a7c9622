"""Run an entry on whole arrays: for ops that need their tensors whole."""

from __future__ import annotations

from typing import Any

import numpy as np

from graftax.errors import Failure, PlanError, escape
from graftax.execute.meter import Meter, meter_for
from graftax.ops import Cast, Keep, apply_chain, invert_chain
from graftax.ops.base import count_same_bits
from graftax.ops.casting import cast_array
from graftax.plans import Entry, Plan
from graftax.tree import Checkpoint

Array = np.ndarray[Any, Any]


def check_source(plan: Plan, source: Checkpoint) -> None:
    """PlanError unless `source` is of the side that was planned for, where it declares one, and has, with values, every
    tensor that was planned for, and no other."""
    if source.side not in (None, plan.source.side):
        raise PlanError(
            f"the plan was made for a {plan.source.side} tree, and {escape(source.label)} is a {source.side} one",
            next="Plan again for this source: the layouts differ.",
        )
    failures: list[Failure] = []
    for entry in plan.entries:
        for name in entry.sources:
            want, have = plan.source.specs[name], source.get(name)
            if have != want:
                failures.append(Failure("not what was planned for", source.label, name, str(want), str(have or "none")))
    additional = _additional(plan, source)
    for name in additional:
        failures.append(Failure("the plan was not made for it", source.label, name, "none", str(source[name])))
    if failures:
        way_out = ", or give a source without what the plan was not made for." if additional else "."
        raise PlanError(
            f"the plan does not fit {escape(source.label)}", failures, next=f"Plan again for this source{way_out}"
        )
    if any(entry.sources for entry in plan.entries) and not source.has_values:
        raise PlanError(f"{escape(source.label)} has names, shapes and dtypes, but no values to port")


def _additional(plan: Plan, source: Checkpoint) -> list[str]:
    """The tensors of `source` that the plan does not know: it would skip them without a word.

    Not among them: another name of a tensor that it knows, and what `Plan.inverse` left out and named in an assumption
    (the inverse of an inverse runs on the first source again).
    """
    known = plan.source.specs
    unknown = [name for name in source if name not in known]
    if not unknown:
        return []
    stored = {source.storage.aliases.get(name, name) for name in known}
    left_out = {name for assumption in plan.assumptions for name in assumption.targets if name not in plan.like.specs}
    return [name for name in unknown if source.storage.aliases.get(name, name) not in stored and name not in left_out]


def run_entry(entry: Entry, source: Checkpoint, like: Checkpoint | None) -> tuple[tuple[Array, ...], Meter | None]:
    """All targets of one entry, whole, and what was counted on the way, if there was anything to."""
    if entry.ops and isinstance(entry.ops[0], Keep):
        if like is None:
            entry.ops[0].apply(())
        assert like is not None
        return tuple(like.read(name) for name in entry.targets), None
    given = tuple(source.read(name) for name in entry.sources)
    meter = meter_for(entry)
    if meter is None:
        return apply_chain(entry.ops, given), None
    return _run_measured(entry, given, meter), meter


def _run_measured(entry: Entry, given: tuple[Array, ...], meter: Meter) -> tuple[Array, ...]:
    """Run the entry and its inverse; count the source values that come back, and those that would in float32."""
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
    return arrays


def _equal_in_float32(entry: Entry, given: tuple[Array, ...]) -> int:
    """How many 16-bit source values would come back if the entry were held in float32."""
    ops = tuple(op for op in entry.ops if not isinstance(op, Cast))
    there = apply_chain(ops, tuple(array.astype(np.float32) for array in given))
    back = apply_chain(invert_chain(ops), there)
    return _equal(given, tuple(array.astype(old.dtype) for array, old in zip(back, given, strict=True)))


def _equal(old: tuple[Array, ...], new: tuple[Array, ...]) -> int:
    """Values with the same bits."""
    return sum(count_same_bits(a, b) for a, b in zip(old, new, strict=True))
