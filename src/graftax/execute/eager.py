"""Make many whole targets in memory at once: this is what loading does.

Several threads make large targets in parts, because reading and copying release Python's lock. Small targets share
memory. The result, and the error that is raised, do not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from graftax.errors import PlanError
from graftax.execute.fill_tile import Simple, cut_piece, fill_tile, simple
from graftax.execute.memory import allocate_all
from graftax.execute.meter import meter_for
from graftax.execute.pushdown import TilePiece
from graftax.execute.streamed import SCRATCH, Stream, named
from graftax.formats.io.files import kept_open
from graftax.plans import Entry
from graftax.tree import Checkpoint
from graftax.tree.dtypes import numpy_dtype
from graftax.tree.gc_paused import gc_paused

Array = np.ndarray[Any, Any]
Job = TypeVar("Job")
Span = Callable[[str, int, memoryview], None]

_JOB = 8 << 20
"""Bytes of targets that a thread makes before it takes the next job."""
_LARGE, _ALONE = 1 << 20, 32 << 20
"""Bytes of a large target, and bytes of large targets in all under which one thread is as fast."""
_MOST_WORKERS = 8
"""Beyond these the memory is what they wait for."""
_VALUES = 1 << 20
"""Elements that value ops work on at a time: they make arrays of several times their size."""


class _Task(NamedTuple):
    """Some pieces of one target. `pieces` is None if the stream makes the target from whole tensors."""

    entry: Entry | None
    name: str
    out: Array | None = None
    pieces: Sequence[TilePiece] | None = None


def load(run: Stream, source: Checkpoint, names: Iterable[str], workers: int | None = None) -> dict[str, Array]:
    """target -> its array, in the order of `names`. Each array lies in aligned memory that may be given away.
    Exception: an array kept from like, or taken unchanged from its source, may be read-only and must not be given away.
    A packed target comes as its bytes.

    workers: the number of threads; None: one per processor, at most 8. Raises what `Stream.array` raises for the first
    target that fails.
    """
    with gc_paused(), kept_open():
        return _load(run, source, names, workers)


def _load(run: Stream, source: Checkpoint, names: Iterable[str], workers: int | None) -> dict[str, Array]:
    out: dict[str, Array] = {}
    found = {name: run.local(name) for name in names}
    sizes = {name: local.spec.nbytes for name, local in found.items() if local is not None}
    rooms = dict(zip(sizes, allocate_all(list(sizes.values())), strict=True))
    tasks: dict[Any, list[_Task]] = {}  # by entry, so that its sources are opened once
    for name, local in found.items():
        if local is None:
            out[name] = np.empty(0)  # keeps the order
            tasks[name] = [_Task(None, name)]
            continue
        flat = rooms[name].view(numpy_dtype(local.spec.dtype))
        out[name] = flat.reshape(local.spec.shape)
        tasks.setdefault(id(local.entry), []).append(_Task(local.entry, name, flat, local.pieces))
    jobs = list(_jobs(tasks.values(), source))
    if workers is None:
        workers = workers_for(sizes.values())
    shared = _Shared(run, source, out)
    in_order(jobs, lambda: _Worker(shared), workers)
    return out


def _jobs(groups: Iterable[Sequence[_Task]], source: Checkpoint) -> Iterable[list[_Task]]:
    """The tasks in portions of about _JOB bytes. Tasks of one entry stay together if its sources are read whole."""
    storage = source.storage
    everything = storage.span is not None and not storage.whole
    job: list[_Task] = []
    nbytes = 0
    for group in groups:
        entry = group[0].entry
        by_position = everything or (entry is not None and all(map(storage.by_position, entry.sources)))
        for task in group:
            if task.out is None or task.pieces is None or task.out.nbytes <= _JOB or not by_position:
                job.append(task)
                nbytes += _JOB if task.out is None else task.out.nbytes
                if nbytes >= _JOB and by_position:
                    yield job
                    job, nbytes = [], 0
                continue
            width = task.out.itemsize
            for piece in task.pieces:
                for part in cut_piece(piece, 2 * _JOB // width):
                    if job and job[-1].out is task.out:
                        job[-1] = _Task(task.entry, task.name, task.out, (*(job[-1].pieces or ()), part))
                    else:
                        job.append(_Task(task.entry, task.name, task.out, (part,)))
                    nbytes += part.count * width
                    if nbytes >= _JOB:
                        yield job
                        job, nbytes = [], 0
        if nbytes >= _JOB:
            yield job
            job, nbytes = [], 0
    if job:
        yield job


@dataclass(frozen=True, slots=True, eq=False)
class _Shared:
    """What all workers share."""

    run: Stream
    source: Checkpoint
    out: dict[str, Array]


class _Worker:
    """One thread: its reader, and its record of the pieces that it has met."""

    __slots__ = ("_known", "_reader", "_room", "_shared")

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared
        self._reader = shared.run.reader(SCRATCH)
        self._room = self._reader.scratch.data
        self._known: dict[int, Simple | None] = {}

    def __call__(self, job: list[_Task]) -> None:
        shared = self._shared
        try:
            for task in job:
                if task.entry is None:
                    with shared.run.lock:
                        shared.out[task.name] = shared.run.array(task.name)
                        shared.run.done(task.name)
                else:
                    self._make(task.entry, task)
        finally:
            shared.run.note(self._reader)
            self._reader.let_go()

    def _make(self, entry: Entry, task: _Task) -> None:
        assert task.out is not None
        assert task.pieces is not None
        run, storage = self._shared.run, self._shared.source.storage
        span = storage.span
        meter = meter_for(entry)
        if meter is None and span is not None and not (storage.whole and storage.whole.intersection(entry.sources)):
            rest = [piece for piece in task.pieces if not self._simply(entry, task.out, piece, span)]
        else:
            rest = task.pieces
        if not rest:
            return
        sources, scratch = self._reader.opened(entry), self._reader.scratch
        try:
            if meter is None:
                fill_tile(task.out, rest, sources, scratch)
                return
            for piece in rest:
                fill_tile(task.out, list(cut_piece(piece, _VALUES)), sources, scratch, meter)
        except PlanError as error:
            raise named(entry, error) from error
        run.counted(entry, meter)

    def _simply(self, entry: Entry, out: Array, piece: TilePiece, span: Span) -> bool:
        """Fill a piece the simple way. False if the piece is not simple."""
        known = self._known
        found = known[id(piece)] if id(piece) in known else known.setdefault(id(piece), simple(piece, out.itemsize))
        if found is None:
            return False
        name = entry.sources[found.source]
        found.fill(out.view(np.uint8).data, lambda start, buffer: span(name, start, buffer), self._room)
        self._reader.nbytes += found.nbytes
        return True


# ---------------------------------------------------------------- threads


def workers_for(sizes: Iterable[int]) -> int:
    """The number of threads for targets of these sizes. One thread makes small targets, because most of that work holds
    Python's lock."""
    large = sum(nbytes for nbytes in sizes if nbytes >= _LARGE)
    return min(_processors(), _MOST_WORKERS) if large >= _ALONE else 1


def in_order(jobs: Sequence[Job], worker: Callable[[], Callable[[Job], None]], workers: int) -> None:
    """Do the jobs, started in their order, with `workers` threads including this one. Each thread makes one `worker()`.

    Raises the error of the first job that fails. All jobs before it were started and are finished; no job is started
    after it.
    """
    turn = threading.Lock()
    waiting = iter(enumerate(jobs))
    failed: dict[int, BaseException] = {}

    def take() -> tuple[int, Job] | None:
        with turn:
            return None if failed else next(waiting, None)

    def work() -> None:
        place = -1
        try:
            do = worker()
            while (given := take()) is not None:
                place, job = given
                do(job)
        except BaseException as error:  # raised below, in the calling thread
            failed[place] = error

    others = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(jobs)) - 1)]
    begun: list[threading.Thread] = []
    try:
        with contextlib.suppress(RuntimeError):  # the system gives no more threads
            for thread in others:
                begun.append(thread)
                thread.start()
        work()
    finally:
        _join(begun, failed)
    if failed:
        raise failed[min(failed)]


def _join(threads: Sequence[threading.Thread], failed: dict[int, BaseException]) -> None:
    threads = [thread for thread in threads if thread.ident is not None]  # the threads that could start
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # interrupted: the threads finish their current job
        failed.setdefault(-1, error)
        for thread in threads:
            thread.join()


def _processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
