"""Entries: sources -> ops -> targets, and the two ends of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from graftax.ops import Drop, Fill, Keep, Op, Replace, chain_text
from graftax.tree import Checkpoint, Key, Side, TensorSpec


@dataclass(frozen=True, slots=True)
class End:
    """One side of a plan: its label, its names and specs, what restores its containers, and what it holds besides the
    weights (name -> what it is)."""

    label: str
    side: Side
    specs: Mapping[str, TensorSpec]
    real_keys: Mapping[str, Key] = field(default_factory=dict[str, Key])
    containers: Mapping[str, str] = field(default_factory=dict[str, str])
    left: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def of(cls, checkpoint: Checkpoint, side: Side) -> End:
        specs, keys, containers = checkpoint.specs, checkpoint.real_keys, checkpoint.containers
        return cls(checkpoint.label, side, specs, keys, containers, checkpoint.left)


@dataclass(frozen=True, slots=True)
class Entry:
    """sources -> ops -> targets, and the evidence, the strongest first."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    ops: tuple[Op, ...] = ()
    evidence: tuple[str, ...] = ()

    @property
    def dropped(self) -> str | None:
        """Why the entry drops its source; None if it does not."""
        return self.ops[-1].reason if self.ops and isinstance(self.ops[-1], Drop) else None

    @property
    def lost(self) -> bool:
        """True if the source is dropped for good: no value is stated for the way back."""
        last = self.ops[-1] if self.ops else None
        return isinstance(last, Drop) and last.fill is None and not last.keep

    @property
    def unfilled(self) -> bool:
        """True if no source fills the targets: they are filled with a constant or kept from like."""
        return bool(self.ops) and isinstance(self.ops[0], (Fill, Keep))

    @property
    def replaced(self) -> bool:
        """True if surgery gives the target another value than its source's."""
        return any(isinstance(op, Replace) for op in self.ops)

    @property
    def exact(self) -> bool:
        return all(op.exact for op in self.ops)

    @property
    def text(self) -> str:
        return f"{', '.join(self.sources) or '()'} -> {', '.join(self.targets) or '()'}: {chain_text(self.ops)}"


def with_ops(entry: Entry, *ops: Op) -> Entry:
    """The entry with `ops` after its own."""
    return replace(entry, ops=(*entry.ops, *ops))
