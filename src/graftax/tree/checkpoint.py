"""A checkpoint: a file, folder or live tree of named arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftax.errors import MissingKeyError, PlanError, escape
from graftax.tree.live import Live
from graftax.tree.selectors import nearest
from graftax.tree.specs import Key, Side, SideBy, TensorSpec
from graftax.tree.storage import Storage

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint(Mapping[str, TensorSpec]):
    """A file, folder or live tree of named arrays: a mapping from path to spec, and `read(path)` for the values.

    label       what it is called in messages: the path as it was given
    side        "torch" or "flax"; None where nothing tells
    specs       path -> shape and dtype of the leaf
    storage     how and where its values are kept
    live        what a live tree shows of its modules
    side_by     what told the side (`sides`): where that was names alone it is an assumption
    config      the settings of the model: config.json beside the checkpoint, or those that a live module carries
    real_keys   path prefix -> its last key, where that is not text (`blocks/0` -> 0)
    containers  path prefix -> "list", "tuple" or "FrozenDict", where a container is not a plain dict
    left        name -> what it is, of what stands beside the weights and was left out
    chosen      whether training state was looked for: what is in the tree counts as weights
    """

    label: str
    side: Side | None
    specs: Mapping[str, TensorSpec]
    storage: Storage = field(default_factory=Storage)
    live: Live = field(default_factory=Live)
    side_by: SideBy = "kind"
    config: Mapping[str, Any] | None = None
    real_keys: Mapping[str, Key] = field(default_factory=dict[str, Key])
    containers: Mapping[str, str] = field(default_factory=dict[str, str])
    left: Mapping[str, str] = field(default_factory=dict[str, str])
    chosen: bool = False

    def __getitem__(self, path: str) -> TensorSpec:
        if path in self.specs:
            return self.specs[path]
        raise self._missing(path)

    def __contains__(self, path: object) -> bool:
        return path in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def read(self, path: str) -> np.ndarray[Any, Any]:
        """The values of one leaf."""
        if path not in self.specs:
            raise self._missing(path)
        if self.storage.reader is None:
            raise PlanError(f"{escape(self.label)} has names, shapes and dtypes, but no values")
        return self.storage.reader(path)

    def get(self, path: str, default: Any = None) -> Any:
        """The spec of one leaf, or `default`: nobody asks what is near."""
        return self.specs.get(path, default)

    def _missing(self, path: object) -> MissingKeyError:
        near = nearest(str(path), self.specs)
        return MissingKeyError(f"{escape(self.label)} has no {escape(path)!r}", next=f"Near: {near}" if near else "")

    @property
    def has_values(self) -> bool:
        return self.storage.reader is not None

    def __repr__(self) -> str:
        return f"Checkpoint({self.label!r}, side={self.side}, {len(self.specs)} leaves)"
