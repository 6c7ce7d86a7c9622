"""The leaves of a replacement on their way to a writer: each is hashed as it passes, so that the report proves what
changed and what stayed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graftax.errors import Failure, GraftaxError, PlanError, escape
from graftax.ops import misfit_of
from graftax.surgery.changes import Change, Comparison, Report
from graftax.tree import Checkpoint, TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from graftax.execute.streamed import Stream
    from graftax.formats.base import Tile

    Array = np.ndarray[Any, Any]


_SMALL = 1 << 18
"""Bytes that are hashed before another thread would have begun."""


class Ledger:
    """The tiles of a stream (`base.Tiles`). `report.changes` gets one row for each leaf, once all of it has passed.

      stream    makes the leaves
      source    the checkpoint that is operated on
      paths     target of the plan -> path in `source`
      failures  path -> why the leaf cannot take its value, where that is known before

    The first value that does not fit raises one PlanError that lists all values that do not.
    """

    def __init__(
        self,
        stream: Stream,
        source: Checkpoint,
        paths: Mapping[str, str],
        report: Report,
        failures: Mapping[str, tuple[Failure, ...]],
    ) -> None:
        self._stream, self._source, self._paths, self._report = stream, source, paths, report
        selected = set(report.selected)
        self._due = {target: path for target, path in paths.items() if path in selected}
        """The selected leaves that are not made yet."""
        self._known = dict(failures)
        self._hashing = ThreadPoolExecutor(1)  # while the writer writes; its thread ends with it
        self._before: dict[str, Any] = {}
        self._changes: dict[str, Change] = {}

    # ------------------------------------------------------------ as tiles

    def tiles(self, target: str, contiguous: bool = False, first: int = 0) -> Iterator[Tile]:
        """As `Stream.tiles`, always contiguous. Tiles before `first`, which an earlier run wrote, are made again for
        the hash of the whole."""
        self._before[target] = self._stream.counts(target)
        comparison = self._comparison(target)
        with self._naming(target):
            for number, tile in enumerate(self._stream.tiles(target, True)):
                data = tile.data.reshape(-1)
                if data.size < _SMALL or number < first:
                    comparison.take(data)
                    if number >= first:
                        yield tile
                    continue
                taken = self._hashing.submit(comparison.take, data)
                try:
                    yield tile
                finally:
                    taken.result()  # the next tile takes the same memory
        self._passed(target, comparison)

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """(target, array) of every leaf in the order of the plan, whole."""
        self.refuse()
        for target in self._paths:
            yield target, self._array(target)
            self._stream.done(target)

    def _array(self, target: str) -> Array:
        from graftax.tree.dtypes import storage_bytes

        comparison = self._comparison(target)
        with self._naming(target):
            array = self._stream.array(target)
        comparison.take(storage_bytes(array, self._spec(target)))
        self._passed(target, comparison)
        return array

    def refuse(self) -> None:
        """PlanError if leaves are known that cannot take their values; it lists the others too."""
        if self._known:
            raise self._refusal()

    def check(self) -> None:
        """Make the selected leaves and compare them, for nobody."""
        self.refuse()
        for target in list(self._due):
            for _ in self.tiles(target):
                pass
            self._stream.done(target)

    def done(self, target: str) -> None:
        self._stream.done(target)

    def skip(self, target: str) -> None:
        self._due.pop(target, None)
        self._stream.skip(target)

    @property
    def unit(self) -> int:
        return self._stream.unit

    def counts(self, target: str) -> Any:
        """The change of a leaf that has passed, and the stream's counts; for another leaf its counts from before."""
        change = self._changes.get(target)
        if change is None:
            return {"counts": self._before.get(target)}
        return {
            "counts": self._stream.counts(target),
            "change": [change.before, change.after, change.changed, change.largest],
        }

    def restore(self, target: str, counts: Any) -> None:
        counts = counts or {"counts": None}
        self._stream.restore(target, counts["counts"])
        if "change" in counts:
            path = self._paths[target]
            self._record(target, Change(path, self._spec(target), target in self._due, *counts["change"]))

    # ------------------------------------------------------------ one leaf

    def _spec(self, target: str) -> TensorSpec:
        return self._source.specs[self._paths[target]]

    def _comparison(self, target: str) -> Comparison:
        path = self._paths[target]
        return Comparison(path, self._spec(target), self._old(path) if target in self._due else None)

    def _old(self, path: str) -> Callable[[int, int], Array]:
        """(start, count) -> bytes of a leaf of the source. They are valid until the next call."""
        import numpy as np

        from graftax.tree.dtypes import storage_bytes

        storage, spec = self._source.storage, self._source.specs[path]
        room = np.empty(0, np.uint8)

        def read(start: int, count: int) -> Array:
            nonlocal room
            assert storage.span is not None
            room = room if room.size >= count else np.empty(count, np.uint8)
            storage.span(path, start, memoryview(room[:count]))  # pyright: ignore[reportArgumentType]
            return room[:count]

        if storage.by_position(path):
            return read
        held: list[Array] = []

        def cut(start: int, count: int) -> Array:
            if not held:
                with self._stream.lock:
                    held.append(storage_bytes(self._source.read(path), spec))
            return held[0][start : start + count]

        return cut

    def _passed(self, target: str, comparison: Comparison) -> None:
        self._record(target, comparison.done())

    def _record(self, target: str, change: Change) -> None:
        self._due.pop(target, None)
        self._changes[target] = change
        self._report.changes.append(change)

    @contextmanager
    def _naming(self, target: str) -> Generator[None]:
        """Turn the error of a selected leaf into one that lists every selected leaf that cannot take its value."""
        try:
            yield
        except PlanError as error:
            if target not in self._due:
                raise
            self._learn(target, error)
            raise self._refusal() from error

    def _refusal(self) -> PlanError:
        """The error that lists every selected leaf that cannot take its value. Nothing will be written: the values of
        the leaves that are still to come are only checked."""
        for target, path in self._due.items():
            if path not in self._known:
                try:
                    for _ in self._stream.tiles(target, True):
                        pass
                except PlanError as error:
                    self._learn(target, error)
                self._stream.done(target)
        listed = [failure for path in self._source if path in self._known for failure in self._known[path]]
        return PlanError(f"nothing was replaced in {escape(self._source.label)}:", listed)

    def _learn(self, target: str, error: PlanError) -> None:
        cause = error.__cause__  # without the text of the entry
        path = self._paths[target]
        self._known[path] = misfit_of(path, cause if isinstance(cause, GraftaxError) else error).failures
