"""Surgery as a plan: an entry for each leaf. What is not selected stays as it is; a donor's tensor is a further source;
every other value is an op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from graftax.errors import Failure, GraftaxError, PlanError
from graftax.ops import Drop, Op, Replace, misfit_of
from graftax.plans import End, Entry, Plan, Proposal
from graftax.surgery.donors import FromCheckpoint
from graftax.surgery.leaves import InParts, checked_value
from graftax.surgery.places import Place
from graftax.tree import Checkpoint, Side

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Replacement:
    """`plan`, to be run on `source`: the checkpoint, and the tensors of donors under further names. `donors`: every
    checkpoint that values come from. `failures`: why leaves cannot take their values, as far as shapes and dtypes tell;
    the plan leaves them as they are."""

    plan: Plan
    source: Checkpoint
    donors: tuple[Checkpoint, ...]
    failures: Mapping[str, tuple[Failure, ...]]


def plan_replacement(
    checkpoint: Checkpoint,
    values: Mapping[str, Any],
    home: Checkpoint | None = None,
    names: Mapping[str, str] | None = None,
) -> Replacement:
    """The plan that gives leaves of `checkpoint` other values.

    values  path -> value
    home    the tree whose modules tell the layouts of leaves; None: the checkpoint itself
    names   path -> its name in the result, where that is another one
    """
    side: Side = checkpoint.side or ("flax" if any("/" in path for path in checkpoint) else "torch")
    names = names or {}
    entries: list[Entry] = []
    failures: dict[str, tuple[Failure, ...]] = {}
    taken: dict[str, tuple[Checkpoint, str]] = {}
    donors: dict[int, Checkpoint] = {}
    for path, spec in checkpoint.items():
        target = names.get(path, path)
        if path not in values:
            entries.append(Entry((path,), (target,)))
            continue
        try:
            # checked now, so that nothing is written for a value that cannot fit
            value = checked_value(Place(path, spec, lambda: checkpoint if home is None else home), values[path])
            donors |= {id(donor): donor for donor in _donors_in(value)}
            if isinstance(value, FromCheckpoint) and value.plan is None:
                donor, key, ops = value.way(path, spec)
                name = _new_name(f"{donor.label}::{key}", path, checkpoint, taken)
                taken[name] = (donor, key)
                entries += [
                    Entry((path,), (), (Drop("replaced"),)),
                    Entry((name,), (target,), ops, (f"instead of {path}",)),
                ]
            else:
                change: Op = Replace(path, spec.shape, spec.dtype, value)
                entries.append(Entry((path,), (target,), (change,)))
        except GraftaxError as error:
            if error.exit_code != PlanError.exit_code:
                raise
            failures[path] = misfit_of(path, error).failures
            entries.append(Entry((path,), (target,)))
    source = _with_donors(checkpoint, taken, tuple(donors.values()))
    end = End.of(source, side)
    like = replace(end, specs={names.get(path, path): spec for path, spec in checkpoint.items()})
    return Replacement(Plan.build(end, like, Proposal(tuple(entries))), source, tuple(donors.values()), failures)


def _donors_in(value: Any) -> list[Checkpoint]:
    """The opened checkpoints that a value reads from."""
    if isinstance(value, FromCheckpoint):
        donor: Any = value.opened().source
        return [donor]
    if isinstance(value, InParts):
        return [donor for _, part in value.parts.items for donor in _donors_in(part)]
    if not is_dataclass(value):
        return []
    return [donor for field in fields(value) for donor in _donors_in(getattr(value, field.name))]


def _new_name(name: str, path: str, checkpoint: Checkpoint, taken: Mapping[str, Any]) -> str:
    """A name for a donor's tensor among the sources; a tensor that goes into several leaves has one for each."""
    while name in checkpoint or name in taken:
        name = f"{name} for {path}"
    return name


def _with_donors(
    checkpoint: Checkpoint, taken: Mapping[str, tuple[Checkpoint, str]], donors: tuple[Checkpoint, ...]
) -> Checkpoint:
    """The checkpoint with the tensors of donors beside its own, under the names of `taken`."""
    if not donors:
        return checkpoint
    own = checkpoint.storage

    def home(name: str) -> tuple[Any, str]:
        donor, key = taken.get(name, (checkpoint, name))
        return donor.storage, key

    def read(name: str) -> np.ndarray[Any, Any]:
        donor, key = taken.get(name, (checkpoint, name))
        return donor.read(key)

    def span(name: str, start: int, buffer: memoryview) -> None:
        storage, key = home(name)
        storage.span(key, start, buffer)

    def scatter(name: str, start: int, buffers: list[memoryview]) -> int:
        storage, key = home(name)
        if storage.scatter is not None:
            return storage.scatter(key, start, buffers)
        at = start
        for buffer in buffers:
            storage.span(key, at, buffer)
            at += len(buffer)
        return at - start

    names = [*checkpoint, *taken]
    whole = frozenset(name for name in names if not home(name)[0].by_position(home(name)[1]))
    files = dict.fromkeys(file for one in (checkpoint, *donors) for file in one.storage.files)
    storage = replace(
        own,
        reader=None if own.reader is None else read,
        span=None if len(whole) == len(names) else span,
        scatter=None if own.scatter is None else scatter,
        whole=whole,
        files=tuple(files),
    )
    specs = {**checkpoint.specs, **{name: donor[key] for name, (donor, key) in taken.items()}}
    return replace(checkpoint, specs=specs, storage=storage)
