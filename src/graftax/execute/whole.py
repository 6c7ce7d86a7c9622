"""Run an entry on whole arrays, for ops that need whole tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from graftax.errors import Failure, PlanError, escape
from graftax.execute.meter import Meter, meter_for
from graftax.ops import Cast, Keep, Replace, apply_chain, invert_chain
from graftax.ops.base import count_same_bits
from graftax.ops.casting import cast_array
from graftax.plans import Entry, Plan
from graftax.tree import Checkpoint

Array = np.ndarray[Any, Any]


def check_source(plan: Plan, source: Checkpoint) -> None:
    """PlanError unless `source` matches the planned source: the same side (if it declares one), every planned tensor
    with values, and no unexpected key."""
    if source.side not in (None, plan.source.side):
        raise PlanError(
            f"the plan expects a {plan.source.side} tree, but {escape(source.label)} is a {source.side} tree",
            next="Plan again for this source: the layouts differ.",
        )
    failures: list[Failure] = []
    for entry in plan.entries:
        for name in entry.sources:
            want, have = plan.source.specs[name], source.get(name)
            if have != want:
                what = "shape or dtype mismatch with the plan" if have else "missing key"
                failures.append(Failure(what, source.label, name, str(want), str(have or "none")))
    additional = _additional(plan, source)
    for name in additional:
        failures.append(Failure("unexpected key", source.label, name, "none", str(source[name])))
    if failures:
        way_out = ", or pass a source without the unexpected keys." if additional else "."
        raise PlanError(
            f"the plan does not fit {escape(source.label)}", failures, next=f"Plan again for this source{way_out}"
        )
    if any(entry.sources for entry in plan.entries) and not source.has_values:
        raise PlanError(f"{escape(source.label)} has names, shapes and dtypes, but no values to port")


def _additional(plan: Plan, source: Checkpoint) -> list[str]:
    """The unexpected keys of `source`: the plan would skip them silently.

    Two kinds do not count: a second name of a tensor that the plan knows, and a tensor that `Plan.inverse` left out and
    named in an assumption (the inverse of an inverse runs on the first source again).
    """
    known = plan.source.specs
    unknown = [name for name in source if name not in known]
    if not unknown:
        return []
    stored = {source.storage.aliases.get(name, name) for name in known}
    left_out = {name for assumption in plan.assumptions for name in assumption.targets if name not in plan.like.specs}
    return [name for name in unknown if source.storage.aliases.get(name, name) not in stored and name not in left_out]


def run_entry(entry: Entry, source: Checkpoint, like: Checkpoint | None) -> tuple[tuple[Array, ...], Meter | None]:
    """All targets of one entry, whole, and the meter that counted on the way; None if there was nothing to count."""
    if entry.ops and isinstance(entry.ops[0], Keep):
        if like is None:
            entry.ops[0].apply(())
        assert like is not None
        return tuple(like.read(name) for name in entry.targets), None
    if not reads_sources(entry):
        return apply_chain(entry.ops, (None,)), None
    given = tuple(source.read(name) for name in entry.sources)
    meter = meter_for(entry)
    if meter is None:
        return apply_chain(entry.ops, given), None
    return _run_measured(entry, given, meter), meter


def reads_sources(entry: Entry) -> bool:
    """False if an entry gives its leaf a value that does not depend on the old one."""
    return not (entry.ops and isinstance(entry.ops[0], Replace) and not entry.ops[0].reads)


def _run_measured(entry: Entry, given: tuple[Array, ...], meter: Meter) -> tuple[Array, ...]:
    """Run the entry and its inverse. Count the source values that the round trip restores, and those that it would
    restore in float32."""
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
    """The number of 16-bit source values that a round trip would restore if the entry were held in float32."""
    ops = tuple(op for op in entry.ops if not isinstance(op, Cast))
    there = apply_chain(ops, tuple(array.astype(np.float32) for array in given))
    back = apply_chain(invert_chain(ops), there)
    return _equal(given, tuple(array.astype(old.dtype) for array, old in zip(back, given, strict=True)))


def _equal(old: tuple[Array, ...], new: tuple[Array, ...]) -> int:
    """The number of values with the same bits."""
    return sum(count_same_bits(a, b) for a, b in zip(old, new, strict=True))
