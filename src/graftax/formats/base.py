"""What every format module provides, and what a writer is handed.

A format module has three functions and nothing else that others call; one that is only read has the first two:

    sniff(path, head) -> bool     is this file (its first 512 bytes) or folder (head == b"") mine? Never raises.
    open(path) -> Checkpoint      names, shapes and dtypes now, values on `read`;
                                  FormatError, UnsafeInputError, StorageError
    write(path, output) -> None   everything of `output` at `path`, a staging name; `formats.save` commits it afterwards
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from graftax.tree import Key, Side, TensorSpec

if TYPE_CHECKING:
    import numpy as np


LEFTOVER = ".graftax-old"
"""Ending of the name that an old folder has while a new one takes its place (where the two cannot be exchanged)."""


@dataclass(frozen=True, slots=True)
class Format:
    """A row of FORMATS.

    module    imported when it is used
    endings   of file names
    folder    it is a folder, not a file
    sides     what it may hold
    holds     the dtypes it stores bit for bit
    resumes   its writer goes on where a stopped run was
    writes    it can be written; a format that is only read needs no `write`
    weights   it holds values, not only shapes and dtypes
    """

    name: str
    module: str
    endings: tuple[str, ...]
    folder: bool
    sides: tuple[Side, ...]
    holds: frozenset[str]
    resumes: bool = False
    writes: bool = True
    weights: bool = True

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """A part of a tensor's bytes: `data` is (rows, run) of uint8, row i at byte `start` + i x `step`. Good until the
    next tile is asked for: its memory is used again."""

    start: int
    data: np.ndarray[Any, Any]
    step: int


class Tiles(Protocol):
    """Tensors on demand: what a writer asks in its own order, each path once.

    The rest is for runs that are resumed: `unit` says how tensors are cut into tiles, `counts` what was measured of a
    tensor (and those that are made with it) so far, as JSON, which `restore` takes back in a later run.
    """

    def tiles(self, target: str, contiguous: bool = False, first: int = 0) -> Iterator[Tile]:
        """Tiles that cover the tensor's bytes once, from number `first` on; `contiguous`: in order, each of one row."""
        ...

    def done(self, target: str) -> None: ...
    def skip(self, target: str) -> None:
        """Of this tensor no tile is asked for: it was made by an earlier run."""
        ...

    @property
    def unit(self) -> int: ...
    def counts(self, target: str) -> Any: ...
    def restore(self, target: str, counts: Any) -> None: ...


class Log(Protocol):
    """The journal of a run that may be resumed, as a writer sees it."""

    @property
    def notes(self) -> Mapping[str, Any]:
        """What the writer had noted when the earlier run was stopped."""
        ...

    def written(
        self, path: Path, flush: Callable[[], None], notes: Mapping[str, Any] | None = None, last: bool = False
    ) -> None:
        """All tiles handed out so far were written to `path`, and `flush` brings them to the disk. `last`: no more come
        for this file."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """What to write: `specs` in the order of the file, `tensors` once each in any order (C-contiguous or not: the
    writer makes them so), and what a tree needs to come back as it was. Paths are flat; `container` is the name of
    the nested dict that a .pt file holds them in (`out.pt::model`). A writer that can takes the tensors from `tiles`
    instead, where that is given, in the order of its file. `metadata` go into safetensors in place of graftax's own:
    surgery leaves a file's as they are. With a `log` its files may be there in part already: it tells the log of what
    it wrote. `leaves`, where it is given, is every leaf in the order of a msgpack file; one with bytes goes there as it
    is (a Python number, None, an empty map) in place of a tensor."""

    specs: Mapping[str, TensorSpec]
    tensors: Iterable[tuple[str, np.ndarray[Any, Any]]]
    side: Side
    real_keys: Mapping[str, Key] = field(default_factory=dict[str, Key])
    containers: Mapping[str, str] = field(default_factory=dict[str, str])
    shard_size: int | None = None
    container: str | None = None
    tiles: Tiles | None = None
    log: Log | None = None
    metadata: Mapping[str, str] | None = None
    leaves: Mapping[str, bytes | None] | None = None
