"""Run a plan into a file or folder, atomically and in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

from graftax.errors import worded
from graftax.execute.fingerprint import fingerprint
from graftax.execute.receipt import Receipt
from graftax.execute.streamed import Stream
from graftax.formats import Output, save
from graftax.formats.base import Tiles
from graftax.formats.io.sizes import parse_size, size_text
from graftax.plans import Plan, WriteOptions
from graftax.tree import Checkpoint

if TYPE_CHECKING:
    from graftax.formats.sidecars import Sidecars


class Watch(Tiles, Protocol):
    """What stands between a stream and the writer and sees every leaf that passes."""

    def arrays(self) -> Iterator[tuple[str, Any]]: ...


@dataclass(frozen=True, slots=True)
class Kept:
    """What surgery keeps of a file: its metadata (None: graftax's own), and every leaf of a msgpack file with the bytes
    of those that are no tensors (`base.Output`). `watch` gives what sees every leaf pass."""

    watch: Callable[[Stream], Watch]
    metadata: Mapping[str, str] | None = None
    leaves: Mapping[str, bytes | None] | None = None


def write(
    made: Plan,
    source: Checkpoint,
    like: Checkpoint | None,
    out: str | PathLike[str],
    options: WriteOptions,
    sidecars: Sidecars | None = None,
    advance: Callable[[int], None] = lambda count: None,
    *,
    kept: Kept | None = None,
) -> Receipt:
    """Run a plan into `out`. `advance` is told of the bytes as they are made.

    Raises PlanError if the plan is incomplete or does not fit, StorageError, and UsageError to resume from what is not
    in files.
    """
    made.require_complete()
    receipt = Receipt()
    budget = parse_size(options.max_memory)
    stream = Stream(made, source, like, receipt, budget, advance)
    tiles = stream if kept is None else kept.watch(stream)
    output = Output(
        made.like.specs,
        tiles.arrays(),
        made.like.side,
        made.like.real_keys,
        made.like.containers,
        None if options.shard_size is None else parse_size(options.shard_size),
        tiles=tiles,
        metadata=None if kept is None else kept.metadata,
        leaves=None if kept is None else kept.leaves,
        proof=None if made.proof is None else made.proof.as_json(),
    )
    saved = save(
        str(out),
        output,
        format=options.format,
        clobber=options.clobber,
        inputs=(source,) if like is None else (source, like),
        origin=fingerprint(made, source, like) if options.resume else None,
        sidecars=sidecars,
    )
    receipt.notes = saved.notes
    nbytes = max((spec.nbytes for spec in made.like.specs.values()), default=0)
    if saved.format == "orbax" and nbytes > budget:
        allowed = f"{size_text(budget)} of {worded('--max-memory', 'max_memory')}"
        held = f"orbax is handed each tensor whole, the largest of {size_text(nbytes)}, beyond the {allowed}"
        receipt.notes = (*receipt.notes, held)
    stream.close()
    return receipt
