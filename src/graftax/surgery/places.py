"""Where surgery puts a new value: a leaf, or a part of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from graftax.tree import Checkpoint, LeafIndex, TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """The leaf at `path`, or the part of it at `index`.

    leaf  the spec of the whole leaf
    home  gives the tree as a Checkpoint, whose modules tell the layout for a donor
    """

    path: str
    leaf: TensorSpec
    home: Callable[[], Checkpoint]
    index: LeafIndex | None = None

    @property
    def name(self) -> str:
        """The path, and the index behind it."""
        return self.path if self.index is None else f"{self.path}{self.index.text}"

    @property
    def spec(self) -> TensorSpec:
        """The spec of what is replaced. PlanError if the leaf has no such part."""
        return self.leaf if self.index is None else TensorSpec(self.index.part_shape(self.leaf.shape), self.leaf.dtype)

    def at(self, index: LeafIndex | None) -> Place:
        """Another part of the same leaf; None: all of it."""
        return replace(self, index=index)
