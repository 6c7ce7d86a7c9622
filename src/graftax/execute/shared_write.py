"""Write one checkpoint with all processes of a `jax.distributed` job, on a file system that they share.

Process 0 checks the destination, makes the staging folder, and puts the result in place, as a single process would. In
between, every process writes its part. For safetensors the parts are tiles, each at its place in the one file. For a
sharded folder they are whole shards. Orbax uses its own multi-host commit of arrays that are spread over all devices.
Process 0 alone writes all other formats, from front to back.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from graftax.adapters.shardings import jax_narrows
from graftax.errors import StorageError, UsageError, escape
from graftax.execute import partition
from graftax.execute.distributed import Peers
from graftax.execute.receipt import Receipt
from graftax.execute.same_work import same_work
from graftax.execute.streamed import Stream
from graftax.formats import Output, hf_folder, orbax_write, safetensors_file, saving
from graftax.formats.base import Format, Tile
from graftax.formats.io.sizes import parse_size
from graftax.formats.sidecars import for_port
from graftax.plans import Entry, Plan, WriteOptions
from graftax.tree import Checkpoint, TensorSpec
from graftax.tree.dtypes import numpy_dtype

_MARK = "job"
"""The name of a file in the staging folder. It holds a number that every process must find there."""
_SEEN = 10.0  # seconds until a network file system shows a file that another host made
_LEAST = 32 << 20  # bytes of a stream's budget: smaller tiles would cost more than an even division gains


def write_shared(
    joined: Peers,
    made: Plan,
    source: Checkpoint,
    like: Checkpoint | None,
    out: str,
    wanted: WriteOptions,
    advance: Callable[[int], None],
) -> Receipt:
    """As `api.write_plan`, called by every process with the same arguments. Each returns the receipt of the whole.

    All processes raise the same error: the error of any of them, PlanError if they were given different work, or
    StorageError if they do not see the same files.
    """
    with joined.joint_stage("reading the source"):
        made.require_complete()
        if wanted.resume:
            raise UsageError("several processes cannot resume a stopped run", next="Leave out resume=.")
        total = sum(spec.nbytes for spec in made.like.specs.values())
        budget = min(parse_size(wanted.max_memory), max(_LEAST, total // (2 * joined.count)))
        shard_bytes = None if wanted.shard_size is None else parse_size(wanted.shard_size)
        same = same_work(made, source, like) | {
            "out": os.path.abspath(out),
            "options": repr(wanted),
        }
    joined.agree("planning", same=same)
    receipt = Receipt()
    stream = Stream(made, source, like, receipt, budget, advance)
    output = Output(made.like.specs, (), made.like.side, made.like.real_keys, made.like.containers, shard_bytes)
    path, row, output = saving.prepare(out, output, wanted.format)
    work = _Work.of(joined, made, stream, path, output)
    writer = _WRITERS.get(row.name) or _alone(row)

    def part(payload: Path) -> None:
        with joined.joint_stage("writing"):
            saving.guarded(lambda: writer.write(payload, output, work), path)

    def lead(payload: Path) -> None:
        mark = os.urandom(8).hex()
        (payload.parent / _MARK).write_text(mark, encoding="ascii")
        writer.begin(payload, output, work)
        joined.agree("staging", give=[str(payload), mark])
        joined.agree("finding the staging folder")
        part(payload)

    if joined.index == 0:
        inputs = (source,) if like is None else (source, like)
        with joined.joint_stage("putting it in place"):
            receipt.notes = saving.save(
                out,
                output,
                format=wanted.format,
                clobber=wanted.clobber,
                inputs=inputs,
                write=lead,
                sidecars=for_port(source, like, made.like.specs),
            ).notes
    else:
        payload, mark = joined.agree("staging")[0]
        with joined.joint_stage("finding the staging folder"):
            _find(Path(payload).parent / _MARK, mark)
        part(Path(payload))
        joined.agree("putting it in place")
    work.settle(receipt)
    return receipt


# ---------------------------------------------------------------- this process's part


@dataclass(slots=True, eq=False)
class _Work:
    """The work of this process: the tiles that a writer asks for, and the log that the writer reports to (`base.Tiles`,
    `base.Log`). `parts`: target -> the tiles that this process makes. Every tile checks whether another process has
    failed."""

    joined: Peers
    plan: Plan
    stream: Stream
    out: Path
    names: Mapping[str, str]
    parts: Mapping[str, partition.Part]
    home: Mapping[str, tuple[int, Entry]]
    counted: dict[int, Any]
    notes: Mapping[str, Any]

    @classmethod
    def of(cls, joined: Peers, plan: Plan, stream: Stream, out: Path, output: Output) -> _Work:
        """`output` has the targets of the plan in their order; it may hold them below a name."""
        names = dict(zip(output.specs, plan.like.specs, strict=True))
        home = {name: (i, entry) for i, entry in enumerate(plan.entries) for name in entry.targets}
        return cls(joined, plan, stream, out, names, {}, home, {}, {})

    def everything(self) -> dict[str, partition.Part]:
        return dict.fromkeys(self.plan.like.specs, _ALL)

    def arrays(self) -> Iterator[tuple[str, Any]]:
        """Every target, whole."""
        for name, target in self.names.items():
            self.joined.look()
            yield name, self.stream.array(target)
            self.stream.done(target)

    # ------------------------------------------------------------ as tiles

    def tiles(self, target: str, contiguous: bool = False, first: int = 0) -> Iterator[Tile]:
        name = self.names[target]
        start, stop = self.parts.get(name, (0, 0))
        start = max(start, first)
        if start < stop:
            for tile in islice(self.stream.tiles(name, contiguous, start), stop - start):
                self.joined.look()
                yield tile

    def done(self, target: str) -> None:
        self.stream.done(self.names[target])

    def skip(self, target: str) -> None:
        self.stream.skip(self.names[target])

    @property
    def unit(self) -> int:
        return self.stream.unit

    def counts(self, target: str) -> Any:
        return self.stream.counts(self.names[target])

    def restore(self, target: str, counts: Any) -> None:
        self.stream.restore(self.names[target], counts)

    # ------------------------------------------------------------ as log

    def written(
        self, path: Path, flush: Callable[[], None], notes: Mapping[str, Any] | None = None, last: bool = False
    ) -> None:
        if last:  # the others rely on the data as soon as this process reports it
            flush()

    # ------------------------------------------------------------ measured counts

    def count_parts(self) -> None:
        """Record the counts of the entries that this process made tiles of. An entry that several processes make whole
        is counted once."""
        for number, entry in enumerate(self.plan.entries):
            if not any(target in self.parts for target in entry.targets):
                continue
            counts = self.stream.counts(entry.targets[0])
            if counts is not None and (entry.targets[0] in self.parts or not self._whole(entry)):
                self.counted[number] = counts

    def count_more(self, target: str, before: Any) -> None:
        """Record what was counted for a target's entry since `before`."""
        number, entry = self.home[target]
        counts = self.stream.counts(entry.targets[0])
        if counts is None or (self.joined.index and self._whole(entry)):
            return  # every process made it whole and has the same counts
        more = partition.subtract_counts(counts, before)
        self.counted[number] = partition.sum_counts([self.counted[number], more]) if number in self.counted else more

    def _whole(self, entry: Entry) -> bool:
        return any(self.stream.whole(target) for target in entry.targets)

    def settle(self, receipt: Receipt) -> None:
        """Complete the receipt with what all processes made."""
        found: dict[int, list[Any]] = {}
        for given in self.joined.agree("counting", give=list(self.counted.items())):
            for number, counts in given or []:
                found.setdefault(number, []).append(counts)
        for number, entry in enumerate(self.plan.entries):
            if entry.targets:
                self.stream.restore(entry.targets[0], partition.sum_counts(found[number]) if number in found else None)
        self.stream.close()
        receipt.leaves = len(self.plan.like.specs)
        receipt.nbytes = sum(spec.nbytes for spec in self.plan.like.specs.values())


_ALL = (0, 1 << 62)


# ---------------------------------------------------------------- one writer for each format


@dataclass(frozen=True, slots=True)
class _Writer:
    """`begin` runs in process 0 and makes what the others write into; `write` writes the part of this process."""

    begin: Callable[[Path, Output, _Work], None]
    write: Callable[[Path, Output, _Work], None]


def _begin_file(payload: Path, output: Output, work: _Work) -> None:
    """Write the header and reserve space for everything. No other process may reserve it, because some file systems
    reserve space by writing."""
    work.parts = {}
    safetensors_file.write(payload, replace(output, tiles=work, log=work))


def _one_file(payload: Path, output: Output, work: _Work) -> None:
    sizes = {target: work.stream.tile_sizes(target) for target in work.plan.like.specs}
    specs = work.plan.like.specs
    groups: list[dict[str, list[int]]] = []
    seen: set[str] = set()
    for target in sorted(specs, key=lambda target: -specs[target].bits):  # their order in the file
        if target not in seen:
            others = work.home[target][1].targets
            group = (target,) if all(sizes[other] is not None for other in others) else others
            groups.append({other: sizes[other] or [specs[other].nbytes] for other in group})
            seen.update(group)
    work.parts = partition.divide_tiles(groups, work.joined.count)[work.joined.index]
    safetensors_file.write(payload, replace(output, tiles=work, log=work))
    work.count_parts()


def _begin_folder(payload: Path, output: Output, work: _Work) -> None:
    payload.mkdir()


def _shards(payload: Path, output: Output, work: _Work) -> None:
    """One process writes each shard. The index comes last, when all shards exist."""
    shards, joined = hf_folder.shards(payload, output), work.joined
    sizes = [sum(spec.nbytes for spec in specs.values()) for specs in shards.values()]
    owners = zip(shards.items(), partition.divide_whole(sizes, joined.count), strict=True)
    own = {path: specs for (path, specs), owner in owners if owner == joined.index}
    work.parts = {work.names[name]: _ALL for specs in own.values() for name in specs}
    safetensors_file.write_files(own, replace(output, tiles=work, log=work))
    work.count_parts()
    joined.agree("writing the shards")
    if joined.index == 0:
        hf_folder.write_index(payload, shards, output)


def _orbax(payload: Path, output: Output, work: _Work) -> None:
    """Spread arrays over all devices, so that each process reads, makes and writes only its part of each."""
    import jax

    orbax_write.check(output)
    joined, devices = work.joined, jax.devices()
    arrays: dict[str, Any] = {}
    digests: dict[str, dict[str, str]] = {}
    for name, spec in output.specs.items():
        joined.look()
        target = work.names[name]
        before = work.stream.counts(target)
        if spec.packed or jax_narrows(spec):
            arrays[name], digests[name] = _by_one(target, spec, work)
        else:
            order = partition.best_order(work.home[target][1], target, spec.shape, work.plan.source.specs)
            arrays[name] = work.stream.sharded(target, partition.spread_sharding(spec.shape, devices, order))
            digests[name] = orbax_write.piece_digests(arrays[name], spec)
        work.stream.done(target)
        if digests[name]:  # else another process holds the same values and counts them
            work.count_more(target, before)
    (payload.parent / f"digests-{joined.index}").write_text(json.dumps(digests), encoding="utf-8")
    joined.agree("making the arrays")

    def part(action: Callable[[], None]) -> None:
        # Run this to the end: tensorstore never finishes writing into a folder that another process has removed.
        joined.finish("writing the arrays", lambda: saving.guarded(action, work.out))

    join = orbax_write.save_shared(payload, output, arrays, joined.count, part)
    if joined.index == 0:  # the others wait, as during all of `write`
        join()
        for index in range(1, joined.count):
            found = json.loads((payload.parent / f"digests-{index}").read_text(encoding="utf-8"))
            for name, pieces in found.items():
                digests[name] |= pieces
        orbax_write.finish(payload, output, digests, as_host=True)


def _by_one(target: str, spec: TensorSpec, work: _Work) -> tuple[Any, dict[str, str]]:
    """A leaf that jax would narrow. Process 0 writes it as a NumPy array; the others give only its shape."""
    if work.joined.index == 0:
        return orbax_write.host_leaf(work.stream.array(target), spec)
    return np.broadcast_to(np.zeros((), numpy_dtype(spec.dtype)), spec.shape), {}


def _nothing(payload: Path, output: Output, work: _Work) -> None:
    pass


def _alone(row: Format) -> _Writer:
    """The writer of a format that is written front to back: process 0 writes while the others wait."""

    def write(payload: Path, output: Output, work: _Work) -> None:
        if work.joined.index == 0:
            work.parts = work.everything()
            row.load().write(payload, replace(output, tensors=work.arrays(), tiles=work))
            work.count_parts()

    return _Writer(_nothing, write)


_WRITERS = {
    "safetensors": _Writer(_begin_file, _one_file),
    "hf_folder": _Writer(_begin_folder, _shards),
    "orbax": _Writer(_nothing, _orbax),
}


def _find(path: Path, mark: str) -> None:
    """Wait until this process sees a file that process 0 made."""
    until = time.monotonic() + _SEEN
    while True:
        try:
            if path.read_text(encoding="ascii") == mark:
                return
        except OSError:
            pass
        if time.monotonic() > until:
            raise StorageError(
                f"process 0 made {escape(path.parent)}, but this process cannot see it: the hosts share no file system",
                next="Write to a folder that is the same on all hosts (NFS, Lustre, a mounted bucket).",
            )
        time.sleep(0.05)
