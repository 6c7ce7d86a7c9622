"""A checkpoint: a file, folder or live tree of named arrays, and what a live tree shows of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftax.errors import MissingKeyError, PlanError, escape
from graftax.tree.selectors import nearest
from graftax.tree.specs import Key, Side, SideBy, TensorSpec

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Module:
    """A live module: evidence of the highest rank.

    kind      its class name
    bases     the qualified names along the method resolution order
    leaves    role ('weight', 'kernel', 'query/kernel') -> the full path of the leaf
    calls     what its call runs: functions set on this one module, then those of `bases` that define the call, the one
              that runs first
    own_math  that one overrides another and does not hand its weights on to the base's call or function
    """

    path: str
    kind: str
    bases: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    leaves: Mapping[str, str] = field(default_factory=dict[str, str])
    calls: tuple[str, ...] = ()
    own_math: bool = False


Axes = tuple[tuple[str, int | None], ...]
"""The axes of a map, outermost first: c is its channels, d h w are spatial; the length where it is known."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a traced call of a live model shows.

    order    module path -> its place in the order of first calls
    columns  matrix -> the axes of the flattened map that it takes; one axis (c, or x for what a matrix made) for no map
    rows     matrix -> the axes of the map that its outputs are unflattened to; vector -> those that it is applied to
    """

    order: Mapping[str, int] = field(default_factory=dict[str, int])
    columns: Mapping[str, Axes] = field(default_factory=dict[str, Axes])
    rows: Mapping[str, Axes] = field(default_factory=dict[str, Axes])


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint(Mapping[str, TensorSpec]):
    """A file, folder or live tree of named arrays: a mapping from path to spec, and `read(path)` for the values.

    side      "torch" or "flax"; None where nothing tells
    side_by   what told it (`sides`): where that was names alone it is an assumption
    reader    path -> array (NumPy; ml_dtypes for bf16 and f8; packed types as their bytes), or None: no values
    span      (path, start, buffer): fills the buffer from byte `start` of a tensor's values (C order, little end
              first), where they can be read by position
    whole     paths that `span` cannot read: packed, compressed or lying otherwise in their file
    scatter   (path, start, buffers): as span, several buffers in a row, where that is one call; gives their bytes
    modules   module path -> Module, where the source is live
    aliases   path -> the path it shares storage with, where the source is live
    config    config.json beside the checkpoint
    folder    the model folder that was opened, where other files of the model stand beside its weights
    real_keys path prefix -> its last key, where that is not text (`blocks/0` -> 0)
    containers path prefix -> "list", "tuple" or "FrozenDict", where a container is not a plain dict
    trace     () -> Trace, where the source is live and can be called without data; nothing is computed
    buffers   paths that are buffers and not parameters, where the source is live
    rebuild   {path: array} -> an object of the same kind, where the source is live; sharding= and (NNX) rngs= say more
    stored    path -> the name in the file, where the paths are not those of the file
    left      name -> what it is, of what stands beside the weights and was left out
    chosen    whether training state was looked for: what is in the tree counts as weights
    placed    () -> path -> what the tree says of where a leaf lies (adapters.notes.Note), where it is a Flax tree
    """

    label: str
    side: Side | None
    specs: Mapping[str, TensorSpec]
    reader: Callable[[str], np.ndarray[Any, Any]] | None = None
    format: str = "live"
    files: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    modules: Mapping[str, Module] = field(default_factory=dict[str, Module])
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    buffers: frozenset[str] = frozenset()
    config: Mapping[str, Any] | None = None
    real_keys: Mapping[str, Key] = field(default_factory=dict[str, Key])
    containers: Mapping[str, str] = field(default_factory=dict[str, str])
    native: Any = None
    trace: Callable[[], Trace] | None = None
    rebuild: Callable[..., Any] | None = None
    span: Callable[[str, int, memoryview], None] | None = None
    whole: frozenset[str] = frozenset()
    scatter: Callable[[str, int, list[memoryview]], int] | None = None
    placed: Callable[[], Mapping[str, Any]] | None = None
    folder: Path | None = None
    side_by: SideBy = "kind"
    stored: Mapping[str, str] = field(default_factory=dict[str, str])
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
        if self.reader is None:
            raise PlanError(f"{escape(self.label)} has names, shapes and dtypes, but no values")
        return self.reader(path)

    def get(self, path: str, default: Any = None) -> Any:
        """The spec of one leaf, or `default`: nobody asks what is near."""
        return self.specs.get(path, default)

    def _missing(self, path: object) -> MissingKeyError:
        near = nearest(str(path), self.specs)
        return MissingKeyError(f"{escape(self.label)} has no {escape(path)!r}", next=f"Near: {near}" if near else "")

    @property
    def has_values(self) -> bool:
        return self.reader is not None

    def by_position(self, path: str) -> bool:
        """Can `span` read this leaf?"""
        return self.span is not None and path not in self.whole

    def __repr__(self) -> str:
        return f"Checkpoint({self.label!r}, side={self.side}, {len(self.specs)} leaves)"
