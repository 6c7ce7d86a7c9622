"""How and where the values of a checkpoint are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftax.tree.renaming import Renaming

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """How the values of a checkpoint are read, and where they are. An empty one has no values.

    reader    path -> array (NumPy; ml_dtypes for bf16 and f8; packed types as their bytes), or None: no values
    span      (path, start, buffer): fills the buffer from byte `start` of a tensor's values (C order, little end
              first), where they can be read by position
    scatter   (path, start, buffers): as span, several buffers in a row, where that is one call; gives their bytes
    whole     paths that `span` cannot read: packed, compressed or lying otherwise in their file
    aliases   path -> the path it shares memory, or its bytes in the file, with
    format    the name of the format; "live" for values in memory
    files     the files that hold the values
    metadata  what the file says of itself, and what stands in it beside tensors
    folder    the model folder that was opened, where other files of the model stand beside its weights
    stored    path -> the name in the file, where the paths are not those of the file
    native    what the format's own module keeps of the file, for what no other format has
    """

    reader: Callable[[str], np.ndarray[Any, Any]] | None = None
    span: Callable[[str, int, memoryview], None] | None = None
    scatter: Callable[[str, int, list[memoryview]], int] | None = None
    whole: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    format: str = "live"
    files: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    folder: Path | None = None
    stored: Mapping[str, str] = field(default_factory=dict[str, str])
    native: Any = None

    def by_position(self, path: str) -> bool:
        """Can `span` read this leaf?"""
        return self.span is not None and path not in self.whole

    def in_parts(self, paths: Iterable[str]) -> bool:
        """Can a part of each of these leaves be had without reading the whole leaf?"""
        return self.format == "live" or all(map(self.by_position, paths))

    def renamed(self, names: Renaming) -> Storage:
        """The storage of the leaves that `names` keeps, under their new paths."""
        reader, span, scatter = self.reader, self.span, self.scatter

        def read(path: str) -> np.ndarray[Any, Any]:
            assert reader is not None
            return reader(names.old(path))

        def fill(path: str, start: int, buffer: memoryview) -> None:
            assert span is not None
            span(names.old(path), start, buffer)

        def fill_all(path: str, start: int, buffers: list[memoryview]) -> int:
            assert scatter is not None
            return scatter(names.old(path), start, buffers)

        return replace(
            self,
            reader=reader and read,
            span=span and fill,
            scatter=scatter and fill_all,
            whole=names.paths(self.whole),
            aliases={
                path: new for path, to in names.leaves(self.aliases).items() if (new := names.new(to)) is not None
            },
            stored=names.leaves(self.stored),
        )

    def below(self, prefix: str) -> Storage:
        """The storage of the leaves below `prefix`. A part is no model folder and no whole file: both are dropped."""
        return replace(self.renamed(Renaming.below(prefix)), folder=None, native=None)
