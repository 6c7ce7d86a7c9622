"""What every format module provides, and what a writer receives.

A format module has three functions and nothing else that others call; one that is only read has the first two:

    sniff(path, head) -> bool     True if this file (its first 512 bytes) or folder (head == b"") has this format.
                                  Never raises.
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
"""Ending of an old folder's name while a new folder takes its place (if the two cannot be exchanged)."""


@dataclass(frozen=True, slots=True)
class Format:
    """A row of FORMATS. `holds` names the dtypes that the format stores bit for bit; `module` is imported on first use;
    if `resumes`, its writer can continue a stopped run."""

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
    """A part of a tensor's bytes. `data` is (rows, run) of uint8; row i is at byte `start` + i x `step`. The tile is
    valid until the next tile is requested, because its memory is reused."""

    start: int
    data: np.ndarray[Any, Any]
    step: int


class Tiles(Protocol):
    """Tensors on demand. A writer requests them in its own order, each path once.

    The other members serve resumed runs. `unit` identifies how tensors are cut into tiles. `counts` gives the counts so
    far of a tensor (and of those made with it) as JSON; `restore` takes them back in a later run.
    """

    def tiles(self, target: str, contiguous: bool = False, first: int = 0) -> Iterator[Tile]:
        """Tiles that cover the tensor's bytes once, starting with tile number `first`; `contiguous`: in order, each of
        one row."""
        ...

    def done(self, target: str) -> None: ...
    def skip(self, target: str) -> None:
        """No tile of this tensor will be requested: an earlier run made it."""
        ...

    @property
    def unit(self) -> int: ...
    def counts(self, target: str) -> Any: ...
    def restore(self, target: str, counts: Any) -> None: ...


class Log(Protocol):
    """The journal of a run that may be resumed, as a writer sees it."""

    @property
    def notes(self) -> Mapping[str, Any]:
        """The writer's notes from the earlier, stopped run."""
        ...

    def written(
        self, path: Path, flush: Callable[[], None], notes: Mapping[str, Any] | None = None, last: bool = False
    ) -> None:
        """All tiles handed out so far were written to `path`; `flush` brings them to the disk. `last`: this file is
        complete."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """What to write: `specs` in the order of the file; `tensors`, each once and in any order (the writer makes them
    C-contiguous); and what is needed to restore the tree as it was. Paths are flat; `container` names the nested dict
    that holds them in a .pt file (`out.pt::model`). If `tiles` is given, a writer that supports it takes the tensors
    from there, in the order of its file. `metadata` replaces graftax's own metadata in safetensors: surgery leaves a
    file's metadata unchanged. With a `log`, parts of the files may exist already, and the writer reports to the log
    what it wrote. `leaves`, if given, lists every leaf in the order of a msgpack file; a leaf with bytes is written as
    these bytes (a Python number, None, an empty map) in place of a tensor. `proof`: what was proved about the tensors,
    as JSON data; it goes into graftax's own metadata where a format has them."""

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
    proof: Mapping[str, Any] | None = None
