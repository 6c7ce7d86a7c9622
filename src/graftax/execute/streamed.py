"""Run a plan tile by tile: each target is made in pieces that fit a memory budget, from only the bytes that each piece
needs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftax.errors import PlanError, escape, option, worded
from graftax.execute import tiling
from graftax.execute.conditions import check_conditions
from graftax.execute.fill_tile import fill_tile
from graftax.execute.loop_nests import NotLocal
from graftax.execute.memory import allocate
from graftax.execute.meter import Meter, evaluate, meter_for
from graftax.execute.pushdown import Box, TilePiece, push
from graftax.execute.reading import Reader
from graftax.execute.receipt import Measured, Receipt
from graftax.execute.sharded import assemble, fill_boxes, sharding_boxes, short_runs
from graftax.execute.tiling import Edges
from graftax.execute.whole import check_source, reads_sources, run_entry
from graftax.formats.base import Tile
from graftax.formats.io.sizes import size_text
from graftax.ops import CONDITIONS, Cast, Keep, Replace, chain_text
from graftax.ops.index_ops import Concat, Reorder, Split, Stack, Unstack
from graftax.ops.rearrange import Rearrange
from graftax.ops.rearrange_each import RearrangeEach
from graftax.ops.replace_op import RunMaker
from graftax.plans import Entry, Plan
from graftax.tree import Checkpoint, TensorSpec
from graftax.tree.dtypes import numpy_dtype, storage_bytes, unpack

Array = np.ndarray[Any, Any]

_TILE_SHARE, _SCRATCH_SHARE = 4, 4
"""A tile and the reading scratch may each take this part of the budget; the writer's buffers take the rest."""
_LEAST = 1 << 20
SCRATCH = 32 << 20
"""For reading, where there is no budget."""
_MOST_KEPT = 1 << 14
"""Pieces that are kept for targets of the same shape."""
OVER = 2
"""Times as many bytes read as needed, beyond which the receipt says why."""


_BY_SHAPE = (Rearrange, RearrangeEach, Split, Concat, Stack, Unstack, Reorder, Cast)
"""Ops whose only numbers are those of shapes: equal ops make equal pieces, to the bit."""


@dataclass(frozen=True, slots=True)
class Local:
    """A target that can be made in parts: its entry, its spec, and the pieces of the whole target."""

    entry: Entry
    spec: TensorSpec
    pieces: list[TilePiece]


class Stream:
    """The targets of a plan, each as tiles on demand, in any order. `receipt` fills up as they are made.

      budget   bytes of memory to work in; None: one tensor at a time
      advance  is called with the bytes of targets as they are handed out

    Raises PlanError if the plan is incomplete, `source` does not match the planned source, the condition of an op
    fails, or an entry needs more memory than the budget.
    """

    def __init__(
        self,
        plan: Plan,
        source: Checkpoint,
        like: Checkpoint | None,
        receipt: Receipt,
        budget: int | None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        plan.require_complete()
        check_source(plan, source)
        self._plan, self._source, self._like, self._receipt = plan, source, like, receipt
        self._budget, self._advance = budget, advance
        self._tile = max(_LEAST, budget // _TILE_SHARE) if budget is not None else 1 << 62
        self._room = allocate(_LEAST)
        self.lock = threading.RLock()
        """Guards the counts, the whole reads and the whole targets."""
        self._reader = self.reader(max(_LEAST, budget // _SCRATCH_SHARE) if budget is not None else SCRATCH)
        self._home = {name: (entry, i) for entry in plan.entries for i, name in enumerate(entry.targets)}
        self._whole: dict[int, dict[str, Array]] = {}
        self._meters: dict[int, Meter] = {}
        self._conditions: dict[int, bool] = {}  # entry -> its conditions were checked and hold
        self._skipped: set[str] = set()
        self._pushed: dict[Any, list[TilePiece]] = {}
        self._kept = 0  # pieces in all of these
        for entry in plan.entries:
            if entry.dropped is not None:
                receipt.dropped.update(dict.fromkeys(entry.sources, entry.dropped))
            elif entry.unfilled:
                why = f"{chain_text(entry.ops)} ({'; '.join(entry.evidence)})"
                receipt.filled.update(dict.fromkeys(entry.targets, why))

    def tiles(self, target: str, contiguous: bool = False, first: int = 0) -> Iterator[Tile]:
        """The bytes of one target in tiles that cover it once, starting with tile number `first`; `contiguous`: in
        order, without gaps."""
        entry, index = self._home[target]
        spec = self._plan.like.specs[target]
        self._count(spec)
        try:
            if contiguous and (make := self._in_order(entry, spec)) is not None:
                yield from self._runs(entry, spec, make, first)
                return
            boxes = self._boxes(entry, index, spec, contiguous)
            if boxes is None:
                if first == 0:
                    yield Tile(0, storage_bytes(self._made(entry, True)[target], spec).reshape(1, -1), 0)
                self._advance(spec.nbytes)
                return
            for number, box in enumerate(boxes):
                count = math.prod(stop - start for start, stop in box)
                if number >= first:
                    pieces = self._pieces(entry, index, spec, box)
                    yield _tile(self._filled(entry, pieces, count, spec, self._buffer), box, spec)
                self._advance(count * spec.bits // 8)
        except PlanError as error:
            raise named(entry, error) from error

    def _in_order(self, entry: Entry, spec: TensorSpec) -> RunMaker | None:
        """What makes the leaf of surgery from front to end (`ops.LeafValue.in_order`), if anything does."""
        op = entry.ops[0] if len(entry.ops) == 1 else None
        return op.in_order() if isinstance(op, Replace) and not spec.packed else None

    def _runs(self, entry: Entry, spec: TensorSpec, make: RunMaker, first: int) -> Iterator[Tile]:
        """The tiles of a leaf that is made from front to end. Those before `first` are made and left out."""
        width = spec.bits // 8
        count = max(1, min(self._tile, self._reader.scratch.nbytes) // width)
        source = self._reader.opened(entry)[0] if reads_sources(entry) else None
        for number, start in enumerate(range(0, spec.size, count)):
            stop = min(start + count, spec.size)
            old = None if source is None else source.span(start, stop, self._reader.scratch)
            new = make(TensorSpec((stop - start,), spec.dtype), old)
            self.note(self._reader)
            if number >= first:
                yield Tile(start * width, storage_bytes(new, TensorSpec((stop - start,), spec.dtype)).reshape(1, -1), 0)
            self._advance((stop - start) * width)

    def tile_sizes(self, target: str) -> list[int] | None:
        """The bytes of each tile that `tiles` gives; None if the target cannot be cut, or if every part would read all
        of its sources."""
        entry, index = self._home[target]
        spec = self._plan.like.specs[target]
        boxes = self._boxes(entry, index, spec, False)
        if boxes is None or not self._source.storage.in_parts(entry.sources):
            return None
        return [math.prod(stop - start for start, stop in box) * spec.bits // 8 for box in boxes]

    def whole(self, target: str) -> bool:
        """True if the target is made whole, together with all targets of its entry."""
        entry, index = self._home[target]
        return self._boxes(entry, index, self._plan.like.specs[target], False) is None

    def skip(self, target: str) -> None:
        """Nobody asks for this target: an earlier run made it."""
        spec = self._plan.like.specs[target]
        self._skipped.add(target)
        self._count(spec)
        self._advance(spec.nbytes)

    @property
    def unit(self) -> int:
        """A value that identifies how targets are cut into tiles."""
        return self._tile

    def counts(self, target: str) -> Any:
        """The counts so far of the entry that makes this target, as JSON; None if nothing is counted."""
        meter = self._meters.get(id(self._home[target][0]))
        return None if meter is None else meter.as_json()

    def restore(self, target: str, counts: Any) -> None:
        """Take over what `counts` gave in an earlier run."""
        entry = self._home[target][0]
        self._meters.pop(id(entry), None)
        if counts is not None:
            self._meters[id(entry)] = Meter.from_json(entry.exact, counts)

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """(target, array) of every leaf in like's order, each in its own aligned memory that may be given away."""
        for name in self._plan.like.specs:
            yield name, self.array(name)
            self._advance(self._plan.like.specs[name].nbytes)
            self.done(name)

    def array(self, target: str) -> Array:
        """One whole target in its own aligned memory; a packed target as its bytes."""
        entry, index = self._home[target]
        spec = self._plan.like.specs[target]
        self._count(spec)
        try:
            if self._whole_only(entry, spec):
                return self._made(entry)[target]
            try:
                pieces = push(entry.ops, self._specs(entry), index, [(0, n) for n in spec.shape])
            except NotLocal:
                return self._made(entry)[target]
            return self._filled(entry, pieces, spec.size, spec, allocate).reshape(spec.shape)
        except PlanError as error:
            raise named(entry, error) from error

    def local(self, target: str) -> Local | None:
        """How to make a target whose parts can be made independently (`eager.load` makes them); None if not: then call
        `array`."""
        entry, index = self._home[target]
        spec = self._plan.like.specs[target]
        if self._whole_only(entry, spec):
            return None
        try:
            pieces = self._pieces(entry, index, spec, tuple((0, n) for n in spec.shape))
        except NotLocal:
            return None
        self._count(spec)
        return Local(entry, spec, pieces)

    def counted(self, entry: Entry, meter: Meter | None) -> None:
        if meter is not None:
            with self.lock:
                self._meters.setdefault(id(entry), Meter(entry.exact)).add(meter)

    def note(self, reader: Reader) -> int:
        """Add the bytes read so far to the receipt, and return them."""
        read = reader.noted()
        with self.lock:
            self._receipt.bytes_read += read
        return read

    def apart(self, entry: Entry) -> bool:
        """True if no target of such an entry needs a whole tensor in memory: then several threads may make them at
        once."""
        in_parts = self._source.storage.in_parts(entry.sources)
        return in_parts and not any(self._whole_only(entry, self._plan.like.specs[name]) for name in entry.targets)

    def reader(self, nbytes: int) -> Reader:
        """A reader for one more thread."""
        return Reader(self._source, nbytes, self.lock)

    def sharded(self, target: str, sharding: Any, reader: Reader | None = None) -> Any:
        """One target as a jax.Array laid out by `sharding`. It reads only what the devices of this process hold. The
        dtype must be one that jax holds; for dtypes that jax would narrow see `adapters.to_jax`.

        Several threads may call this, each with its own reader, for targets of different entries.
        """
        entry, _ = self._home[target]
        spec = self._plan.like.specs[target]
        reader = reader or self._reader
        boxes = list(sharding_boxes(spec.shape, sharding))
        try:
            parts = None if self._whole_only(entry, spec) else self._parts(target, boxes, reader)
            if parts is None:
                reader.let_go()  # release what it holds before making whole tensors
                parts = self._cut(entry, target, boxes)
        except PlanError as error:
            raise named(entry, error) from error
        with self.lock:
            self._count(spec)
        return assemble(spec.shape, sharding, parts, numpy_dtype(spec.dtype))

    def _parts(self, target: str, boxes: Sequence[Edges], reader: Reader) -> dict[Edges, Array] | None:
        """The boxes of a target; None if they cannot be made independently."""
        entry, index = self._home[target]
        spec, specs, meter = self._plan.like.specs[target], self._specs(entry), meter_for(entry)
        how = meter or evaluate
        try:
            pieces = {box: self._pieces(entry, index, spec, box) for box in boxes}  # before anything is read
            sources = reader.opened(entry)
            parts, needed = fill_boxes(entry.ops, specs, index, spec, pieces, sources, reader.scratch, how)
        except NotLocal:
            return None
        finally:
            read = self.note(reader)
        why = ""
        if read > OVER * needed:
            by_position = all(map(self._source.storage.by_position, entry.sources))
            found = [piece for some in pieces.values() for piece in some]
            why = short_runs(found, sources) if by_position else "its file cannot be read by position"
        self.counted(entry, meter)
        with self.lock:
            self._needed(target, needed, read, why)
        return parts

    def _cut(self, entry: Entry, target: str, boxes: Sequence[Edges]) -> dict[Edges, Array]:
        """The boxes of a target that is made whole."""
        spec = self._plan.like.specs[target]
        with self.lock:
            before = self._receipt.bytes_read
            whole = self._made(entry)[target]
            if spec.packed and whole.shape != spec.shape:
                whole = unpack(whole, spec)
            parts = {box: _aligned(whole[tuple(slice(*edge) for edge in box)]) for box in boxes}
            share = sum(part.size for part in parts.values()) / max(whole.size, 1)
            used = sum(given.nbytes for given in self._specs(entry)) / max(len(entry.targets), 1)
            read = self._receipt.bytes_read - before
            self._needed(target, int(share * used), read, f"{chain_text(entry.ops)} needs whole tensors")
        return parts

    def _needed(self, target: str, needed: int, read: int, why: str) -> None:
        """Count the bytes that the shards of a target need. If much more was read, record why."""
        if self._source.storage.format == "live":
            return
        self._receipt.bytes_needed += needed
        if read > OVER * needed:
            self._receipt.over_read[target] = f"{size_text(read)} read for {size_text(needed)}: {why}"

    def _specs(self, entry: Entry) -> tuple[TensorSpec, ...]:
        return tuple(self._plan.source.specs[name] for name in entry.sources)

    def _count(self, spec: TensorSpec) -> None:
        self._receipt.leaves += 1
        self._receipt.nbytes += spec.nbytes

    def _whole_only(self, entry: Entry, spec: TensorSpec) -> bool:
        """True if the entry must run on whole tensors: kept leaves come from like, packed tensors move as their bytes,
        and checked ops must see all values, including rows that no target has (but see `_looked_at`)."""
        kept = bool(entry.ops) and isinstance(entry.ops[0], Keep)
        packed = spec.packed or any(given.packed for given in self._specs(entry))
        return kept or packed or _checked(entry)

    def _filled(
        self, entry: Entry, pieces: list[TilePiece], count: int, spec: TensorSpec, room: Callable[[int], Array]
    ) -> Array:
        dtype = numpy_dtype(spec.dtype)
        out = room(count * dtype.itemsize).view(dtype)
        meter = meter_for(entry)
        fill_tile(out, pieces, self._reader.opened(entry), self._reader.scratch, meter or evaluate)
        self.counted(entry, meter)
        self.note(self._reader)
        return out

    def _boxes(self, entry: Entry, index: int, spec: TensorSpec, contiguous: bool) -> Iterator[Edges] | None:
        """The boxes of a target that fit a tile; None if the target cannot be cut."""
        checked = _checked(entry)
        if not spec.size and not checked:
            return iter(())
        if self._whole_only(entry, spec) and not (checked and self._looked_at(entry)):
            return None
        ops, specs = entry.ops, self._specs(entry)
        try:
            steps = tiling.box_steps(ops, specs, index, spec, self._tile, contiguous)
            # The first box shows whether the target is local.
            self._pieces(entry, index, spec, tuple((0, step) for step in steps))
        except NotLocal:
            return None
        return tiling.grid([(0, n) for n in spec.shape], steps)

    def _pieces(self, entry: Entry, index: int, spec: TensorSpec, box: Edges) -> list[TilePiece]:
        """The pieces of a box of a target. They are kept for equal boxes: many layers need the same pieces."""
        specs = self._specs(entry)
        key = (entry.ops, specs, index, box)
        pieces = self._pushed.get(key)
        if pieces is None:
            pieces = push(entry.ops, specs, index, box)
            if all(type(op) in _BY_SHAPE for op in entry.ops):
                with self.lock:
                    if self._kept + len(pieces) <= _MOST_KEPT:
                        self._kept += len(pieces)
                        self._pushed[key] = pieces
        return pieces

    def _looked_at(self, entry: Entry) -> bool:
        """True if the conditions of the ops were checked tile by tile and hold. False if that saves nothing, or if the
        tensors must be whole anyway. PlanError if a condition does not hold."""
        key = id(entry)
        if key not in self._conditions:
            large = self._budget is not None and self._needed_whole(entry) > self._tile
            if not large or any(spec.packed for spec in self._specs(entry)):
                self._conditions[key] = False
            else:
                try:
                    reader = self._reader
                    check_conditions(entry.ops, self._specs(entry), reader.opened(entry), reader.scratch, self._tile)
                    self._conditions[key] = True
                except NotLocal:
                    self._conditions[key] = False
        return self._conditions[key]

    def _needed_whole(self, entry: Entry) -> int:
        """The bytes of all tensors of an entry."""
        made = sum(self._plan.like.specs[target].nbytes for target in entry.targets)
        return made + self._read_whole(entry)

    def _read_whole(self, entry: Entry) -> int:
        """The bytes of the sources that are read to run an entry whole."""
        return sum(spec.nbytes for spec in self._specs(entry)) if reads_sources(entry) else 0

    def _made(self, entry: Entry, bounded: bool = False) -> dict[str, Array]:
        """All targets of an entry that cannot be cut, kept until the last of them was asked for. `bounded`: PlanError
        if they need more than the budget."""
        key = id(entry)
        if key not in self._whole:
            needed = self._needed_whole(entry)
            if bounded and self._budget is not None and needed > max(self._budget, _LEAST):
                raise PlanError(
                    f"{chain_text(entry.ops)} needs whole tensors in memory: {size_text(needed)}, more than the "
                    f"{size_text(self._budget)} of {worded('--max-memory', 'max_memory')}",
                    next=f"Give {option('max_memory', f'{-(-needed // 2**20)}MiB')} or more.",
                )
            made, meter = run_entry(entry, self._source, self._like)
            if self._source.storage.format != "live":
                self._receipt.bytes_read += self._read_whole(entry)
            named_made = zip(entry.targets, made, strict=True)
            self._whole[key] = {name: array for name, array in named_made if name not in self._skipped}
            if meter is not None:
                self._meters[key] = meter
        return self._whole[key]

    def _buffer(self, nbytes: int) -> Array:
        """Memory for one tile; the next tile reuses it."""
        if self._room.nbytes < nbytes:
            self._room = allocate(nbytes)
        return self._room[:nbytes]

    def done(self, target: str) -> None:
        """Nobody asks for this target again: release what is held for it."""
        entry, _ = self._home[target]
        with self.lock:
            held_arrays = self._whole.get(id(entry))
            if held_arrays is not None:
                held_arrays.pop(target, None)
                if not held_arrays:
                    del self._whole[id(entry)]

    def close(self) -> None:
        """Write the measured counts into the receipt."""
        for entry in self._plan.entries:
            meter = self._meters.get(id(entry))
            if meter is None:
                continue
            casts = any(isinstance(op, Cast) for op in entry.ops)
            if casts:
                self._receipt.cast_leaves += len(entry.targets)
                self._receipt.casts += meter.casts
            if not entry.exact:
                wide = meter.equal_in_float32 if meter.narrow and meter.equal != meter.total else None
                alone = casts and all(op.exact or isinstance(op, Cast) for op in entry.ops)
                change = meter.casts.change if casts else None
                self._receipt.measured.append(Measured(entry.targets, meter.equal, meter.total, wide, change, alone))


def _aligned(array: Array) -> Array:
    """A copy in C order, in memory that jax can take over."""
    out = allocate(array.size * array.dtype.itemsize).view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def _checked(entry: Entry) -> bool:
    return any(isinstance(op, CONDITIONS) for op in entry.ops)


def named(entry: Entry, error: PlanError) -> PlanError:
    """The error, with the name of its entry."""
    return PlanError(f"{escape(entry.text, 400)}: {error}", error.failures)


def _tile(out: Array, box: Box, spec: TensorSpec) -> Tile:
    """A box of a target as runs of its bytes."""
    width = out.itemsize
    steps = [width] * len(spec.shape)
    for axis in range(len(steps) - 2, -1, -1):
        steps[axis] = steps[axis + 1] * spec.shape[axis + 1]
    begin = sum(start * step for (start, _), step in zip(box, steps, strict=True))
    # The axes from `cut` on form one run; before it only one axis may have more than one index.
    cut = len(steps)
    run = width
    while cut and (cut == len(steps) or box[cut] == (0, spec.shape[cut])):
        cut -= 1
        run *= box[cut][1] - box[cut][0]
    raw = out.view(np.uint8)
    rows = raw.nbytes // max(run, 1)
    if rows <= 1:
        return Tile(begin, raw.reshape(1, -1), 0)
    lead = [(n, step) for (start, stop), step in zip(box[:cut], steps[:cut], strict=True) if (n := stop - start) > 1]
    assert len(lead) == 1, "a tile has runs along one axis"
    return Tile(begin, raw.reshape(rows, run), lead[0][1])
