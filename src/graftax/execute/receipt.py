"""The receipt of a run: what it did, and how much of what it changed a round trip restores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from graftax.errors import escape, worded
from graftax.ops.casting import CastCount


@dataclass(frozen=True, slots=True)
class Measured:
    """How much of an inexact entry a round trip restores bit for bit: `equal` of `total` source values. `change`: the
    largest relative change by its cast, None without a cast. `cast_alone`: the cast is the only inexact op."""

    targets: tuple[str, ...]
    equal: int
    total: int
    equal_in_float32: int | None = None
    change: float | None = None
    cast_alone: bool = False

    @property
    def lossless(self) -> bool:
        return self.equal == self.total

    def __str__(self) -> str:
        text = ", ".join(escape(target) for target in self.targets)
        if self.change is not None:
            text += f": the cast changes values by up to {_percent(self.change)} of themselves"
            if self.cast_alone:
                return text
        share = 100.0 * self.equal / max(self.total, 1)
        text += f"{':' if self.change is None else ';'} {share:.1f} % of its values come back"
        if self.equal_in_float32 is not None and self.equal_in_float32 > self.equal:
            share32 = 100.0 * self.equal_in_float32 / max(self.total, 1)
            text += f"; hold it in float32 and {share32:.1f} % do"
        return text


@dataclass(slots=True)
class Receipt:
    """What a run did: leaves and bytes written, measured exactness, counted casts, dropped tensors with the reason,
    missing leaves with how they were filled, and the writer's notes.

    For a source read by position it also holds the number of bytes that this process read. For a load into shards it
    also holds the number of bytes that the shards needed, and leaf -> reason for each leaf that read more than twice
    what it needed.
    """

    leaves: int = 0
    nbytes: int = 0
    measured: list[Measured] = field(default_factory=list[Measured])
    casts: CastCount = field(default_factory=CastCount)
    cast_leaves: int = 0
    dropped: dict[str, str] = field(default_factory=dict[str, str])
    filled: dict[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()
    bytes_read: int = 0
    bytes_needed: int = 0
    over_read: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def lossless(self) -> bool:
        return all(entry.lossless for entry in self.measured)

    @property
    def text(self) -> str:
        """`lossless: yes`, or which entries are not lossless and how much of them a round trip restores."""
        lossy = [entry for entry in self.measured if not entry.lossless]
        lines = ["lossless: yes" if not lossy else f"lossless: but for {len(lossy)} entries"]
        lines += [f"  {entry}" for entry in lossy[:8]]
        if len(lossy) > 8:
            lines.append(f"  ... and {len(lossy) - 8} more ({worded('--json', '.measured')} has all)")
        if self.cast_leaves:
            c = self.casts
            lines.append(
                f"cast: {self.cast_leaves} leaves, {c.total} values, {c.rounded} rounded, {c.flushed} flushed to zero, "
                f"{c.overflowed} saturated, by up to {_percent(c.change)} of themselves"
            )
        if self.bytes_needed:
            lines.append(f"read: {self.bytes_read:,} bytes of {self.bytes_needed:,} that the shards here are made of")
            lines += [f"  {escape(name)}: {why}" for name, why in list(self.over_read.items())[:8]]
            if len(self.over_read) > 8:
                lines.append(f"  ... and {len(self.over_read) - 8} more (.over_read has all)")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "leaves": self.leaves,
            "bytes": self.nbytes,
            "lossless": self.lossless,
            "measured": [
                {
                    "targets": list(m.targets),
                    "equal": m.equal,
                    "total": m.total,
                    "float32": m.equal_in_float32,
                    "change": m.change,
                }
                for m in self.measured
            ],
            "casts": {
                "leaves": self.cast_leaves,
                "values": self.casts.total,
                "rounded": self.casts.rounded,
                "flushed": self.casts.flushed,
                "saturated": self.casts.overflowed,
                "change": self.casts.change,
            },
            "dropped": dict(self.dropped),
            "filled": dict(self.filled),
            "notes": list(self.notes),
            "bytes_read": self.bytes_read,
            "bytes_needed": self.bytes_needed,
            "over_read": dict(self.over_read),
        }


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
