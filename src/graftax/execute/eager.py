"""Run a plan entry by entry on host arrays, and measure what value ops lose while the data streams by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftax.errors import Failure, PlanError, escape
from graftax.ops import Cast, Keep, apply_chain, chain_text, invert_chain
from graftax.ops.base import count_same_bits
from graftax.ops.casting import CastCount, cast_array
from graftax.plans import Entry, Plan
from graftax.tree import Checkpoint

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """How much of an inexact entry comes back bit for bit: `equal` of `total` source values."""

    targets: tuple[str, ...]
    equal: int
    total: int
    equal_in_float32: int | None = None

    @property
    def lossless(self) -> bool:
        return self.equal == self.total

    def __str__(self) -> str:
        share = 100.0 * self.equal / max(self.total, 1)
        text = f"{', '.join(escape(t) for t in self.targets)}: {share:.1f} % of its values come back"
        if self.equal_in_float32 is not None and self.equal_in_float32 > self.equal:
            share32 = 100.0 * self.equal_in_float32 / max(self.total, 1)
            text += f"; hold it in float32 and {share32:.1f} % do"
        return text


@dataclass(slots=True)
class Receipt:
    """What a run did: leaves and bytes written, exactness as measured, casts as counted, what was dropped and why, what
    no source filled and how it was, and what the writer has to say."""

    leaves: int = 0
    nbytes: int = 0
    measured: list[Measured] = field(default_factory=list[Measured])
    casts: CastCount = field(default_factory=CastCount)
    cast_leaves: int = 0
    dropped: dict[str, str] = field(default_factory=dict[str, str])
    filled: dict[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()

    @property
    def lossless(self) -> bool:
        return all(entry.lossless for entry in self.measured)

    @property
    def text(self) -> str:
        """`lossless: yes`, or how much of which entries comes back."""
        lossy = [entry for entry in self.measured if not entry.lossless]
        lines = ["lossless: yes" if not lossy else f"lossless: but for {len(lossy)} entries"]
        lines += [f"  {entry}" for entry in lossy[:8]]
        if len(lossy) > 8:
            lines.append(f"  ... and {len(lossy) - 8} more (--json has all)")
        if self.cast_leaves:
            c = self.casts
            lines.append(
                f"cast: {self.cast_leaves} leaves, {c.total} values, {c.rounded} rounded, {c.flushed} flushed to zero, "
                f"{c.overflowed} saturated"
            )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "leaves": self.leaves,
            "bytes": self.nbytes,
            "lossless": self.lossless,
            "measured": [
                {"targets": list(m.targets), "equal": m.equal, "total": m.total, "float32": m.equal_in_float32}
                for m in self.measured
            ],
            "casts": {
                "leaves": self.cast_leaves,
                "values": self.casts.total,
                "rounded": self.casts.rounded,
                "flushed": self.casts.flushed,
                "saturated": self.casts.overflowed,
            },
            "dropped": dict(self.dropped),
            "filled": dict(self.filled),
            "notes": list(self.notes),
        }


def stream(plan: Plan, source: Checkpoint, like: Checkpoint | None, receipt: Receipt) -> Iterator[tuple[str, Array]]:
    """(target, array) of every leaf, entry by entry in the plan's order; fills `receipt` on the way.

    Raises PlanError where the plan is incomplete, `source` is not what was planned for, or an op's condition fails.
    """
    plan.require_complete()
    check_source(plan, source)
    for entry in plan.entries:
        if entry.dropped is not None:
            receipt.dropped.update(dict.fromkeys(entry.sources, entry.dropped))
            continue
        if entry.unfilled:
            receipt.filled.update(
                dict.fromkeys(entry.targets, f"{chain_text(entry.ops)} ({', '.join(entry.evidence)})")
            )
        for name, array in zip(entry.targets, run_entry(entry, source, like, receipt), strict=True):
            receipt.leaves += 1
            receipt.nbytes += array.nbytes
            yield name, array


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


def run_entry(entry: Entry, source: Checkpoint, like: Checkpoint | None, receipt: Receipt) -> tuple[Array, ...]:
    """All targets of one entry, whole."""
    if entry.ops and isinstance(entry.ops[0], Keep):
        if like is None:
            entry.ops[0].apply(())
        assert like is not None
        return tuple(like.read(name) for name in entry.targets)
    given = tuple(source.read(name) for name in entry.sources)
    try:
        if entry.exact and not any(isinstance(op, Cast) for op in entry.ops):
            return apply_chain(entry.ops, given)
        return _run_measured(entry, given, receipt)
    except PlanError as error:
        raise PlanError(f"{escape(entry.text, 400)}: {error}", error.failures) from error


def _run_measured(entry: Entry, given: tuple[Array, ...], receipt: Receipt) -> tuple[Array, ...]:
    """Run the entry and its inverse; count the source values that come back, and those that would in float32."""
    arrays = given
    for op in entry.ops:
        if isinstance(op, Cast):
            done = [cast_array(array, op.target, op.overflow) for array in arrays]
            arrays = tuple(array for array, _ in done)
            receipt.cast_leaves += len(done)
            for _, count in done:
                receipt.casts += count
        else:
            arrays = op.apply(arrays)
    if entry.exact:
        return arrays
    equal = _equal(given, apply_chain(invert_chain(entry.ops), arrays))
    total = sum(array.size for array in given)
    wide = None
    if equal != total and all(array.dtype.itemsize == 2 for array in given):
        wide = _equal_in_float32(entry, given)
    receipt.measured.append(Measured(entry.targets, equal, total, wide))
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
