"""Surgery from file to file: the selected leaves change, every other leaf is copied bit for bit, and a hash of each
proves it. It is a plan, which the executors run as they run the plan of a port."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Unpack

from graftax.errors import Failure, PlanError, UsageError, escape, option, worded
from graftax.plans.options import WriteKeywords, WriteOptions, options_of, takes
from graftax.surgery.changes import Change, Report
from graftax.surgery.given import prepared, value_text
from graftax.surgery.ledger import Ledger
from graftax.surgery.live import live_tree
from graftax.surgery.planning import Replacement, plan_replacement
from graftax.surgery.roles import open_like
from graftax.surgery.selecting import Edit, SelectableTree, choose, edits_of, selector_text
from graftax.tree import Checkpoint, TensorSpec
from graftax.tree.sides import Signs, separator_of
from graftax.tree.training_tree import own_parts

if TYPE_CHECKING:
    import numpy as np

    from graftax.execute.streamed import Stream

    Array = np.ndarray[Any, Any]

__all__ = ["Change", "Report", "checkpoint_tree", "replace_checkpoint", "write_replacement"]


def checkpoint_tree(checkpoint: Checkpoint) -> SelectableTree:
    """An opened checkpoint as selectors see it: a predicate gets the spec of a leaf, not its values."""
    return SelectableTree(
        checkpoint.label,
        checkpoint.side or separator_of(checkpoint),
        checkpoint.specs,
        checkpoint.specs.__getitem__,
        lambda path: checkpoint.specs[path].shape,
        other_names=lambda: checkpoint.storage.aliases,
        optimizer={} if checkpoint.chosen or checkpoint.side == "torch" else own_parts(checkpoint.specs),
    )


def selectable(tree: Any) -> SelectableTree:
    """Whatever `select` takes, as selectors see it."""
    from graftax.adapters import kind_of
    from graftax.execute.opening import open_tree

    if isinstance(tree, (str, PathLike, Checkpoint)) or kind_of(tree) == "linen model":
        return checkpoint_tree(open_tree(tree))
    return live_tree(tree, modules=True).selectable()


def replace_checkpoint(
    checkpoint: Checkpoint, edits: Mapping[Any, Any], expect: int | None = None, *, exclude: Any = None
) -> tuple[Mapping[str, TensorSpec], Iterator[tuple[str, Array]], Report]:
    """(specs, tensors, report) of a checkpoint in which the selected leaves have other values.

    edits    {selector: value}, as in `replace`
    exclude  a selector of leaves that are not selected

    The selection is checked at once: PlanError if it fails. Values are made as the tensors are taken. Values that do
    not fit raise one PlanError that lists them all, at the latest after the last tensor.
    """
    from graftax.execute.receipt import Receipt
    from graftax.execute.streamed import Stream

    values, report = _chosen(checkpoint, edits_of(edits, None), expect, exclude)
    made = plan_replacement(checkpoint, values)
    ledger = _watch(checkpoint, made, report)(Stream(made.plan, made.source, None, Receipt(), None))
    return checkpoint.specs, ledger.arrays(), report


def _chosen(
    checkpoint: Checkpoint, edits: tuple[Edit, ...], expect: int | None, exclude: Any
) -> tuple[dict[str, Any], Report]:
    """path -> value of the selected leaves, and the report to be filled. PlanError if the selection fails."""
    edits = prepared(edits)
    values, failures = choose(checkpoint_tree(checkpoint), edits, expect, exclude)
    if not checkpoint.has_values:
        failures.insert(0, Failure("has names, shapes and dtypes, but no values", key=checkpoint.label))
    if failures:
        raise PlanError(f"nothing was replaced in {escape(checkpoint.label)}:", failures)
    untied = tuple((name, to) for name, to in checkpoint.storage.aliases.items() if (name in values) != (to in values))
    texts = tuple((selector_text(edit.selector), value_text(edit.value)) for edit in edits)
    return values, Report(len(checkpoint), tuple(values), texts, untied)


def _watch(checkpoint: Checkpoint, made: Replacement, report: Report) -> Callable[[Stream], Ledger]:
    paths = dict(zip(made.plan.like.specs, checkpoint, strict=True))
    return lambda stream: Ledger(stream, checkpoint, paths, report, made.failures)


# ---------------------------------------------------------------- to a file


_LEAVES = frozenset({"npz", "msgpack", "orbax"})
"""Formats whose metadata names the leaves that are not weights."""


@takes(WriteOptions)
def write_replacement(
    checkpoint: Checkpoint,
    selector: Any,
    value: Any,
    out: str | PathLike[str] | None,
    *,
    expect: int | None = None,
    exclude: Any = None,
    like: Any = None,
    advance: Callable[[int], None] = lambda count: None,
    **options: Unpack[WriteKeywords],
) -> dict[str, Any]:
    """Write `checkpoint` to `out` with the selected leaves replaced, atomically; out=None computes and writes nothing.

    selector, value, expect, exclude  as in `replace`
    like                              a tree with the same leaves whose modules tell what each is
    advance                           is told of the bytes as they are made

    Gives the report as JSON data. Raises PlanError for a selection that fails and for values that do not fit (all of
    them), StorageError, and UsageError to resume with values that are no data. The options:
    """
    writing = options_of(write_replacement, WriteOptions, (), options)
    values, report = _chosen(checkpoint, edits_of(selector, value), expect, exclude)
    side = checkpoint.side or ("flax" if any("/" in path for path in checkpoint) else "torch")
    form = "" if out is None else _format(checkpoint, side, out, writing.format)
    stored = checkpoint.storage.stored
    names = {path: stored[path] for path in checkpoint} if stored and form in ("safetensors", "hf_folder") else {}
    made = plan_replacement(checkpoint, values, None if like is None else open_like(like), names)
    watch = _watch(checkpoint, made, report)
    if out is None:
        _check(made, watch, writing)
        return report.as_json()
    notes = _write(checkpoint, made, out, form, writing, watch, report, advance)
    order = {path: i for i, path in enumerate(checkpoint)}
    report.changes.sort(key=lambda change: order[change.path])
    return report.as_json() | {"notes": notes}


def _check(made: Replacement, watch: Callable[[Stream], Ledger], options: WriteOptions) -> None:
    """Make the selected leaves and write nothing."""
    from graftax.execute.receipt import Receipt
    from graftax.execute.streamed import Stream
    from graftax.formats.io.sizes import parse_size

    watch(Stream(made.plan, made.source, None, Receipt(), parse_size(options.max_memory))).check()


def _write(
    checkpoint: Checkpoint,
    made: Replacement,
    out: str | PathLike[str],
    form: str,
    options: WriteOptions,
    watch: Callable[[Stream], Ledger],
    report: Report,
    advance: Callable[[int], None],
) -> list[str]:
    """Run the plan into `out`; gives the notes for the user."""
    from graftax.execute.distributed import peers
    from graftax.execute.writing import Kept, write
    from graftax.formats.safetensors_file import without_proof
    from graftax.formats.sidecars import beside

    if peers() is not None:
        raise UsageError("surgery on a file is for one process", next="Do it before jax.distributed.initialize().")
    if options.resume:
        _require_data(made)
    storage = checkpoint.storage
    metadata = None
    if checkpoint.side_by != "kind":  # graftax's own metadata would declare a side
        metadata = without_proof(storage.metadata) if storage.format in ("safetensors", "hf_folder") else {}
    verbatim = _verbatim(checkpoint, set(report.selected)) if form == "msgpack" else {}

    def watched(stream: Stream) -> Ledger:
        ledger = watch(stream)
        ledger.refuse()
        return ledger

    kept = Kept(watched, metadata, verbatim or None)
    receipt = write(made.plan, made.source, None, out, options, beside(checkpoint), advance, kept=kept)
    gone = [name for name in storage.metadata if name not in checkpoint and name not in verbatim]
    left = gone if storage.format in _LEAVES else []
    return [*receipt.notes, *([f"not copied (not weights): {', '.join(map(escape, left[:8]))}"] if left else [])]


def _require_data(made: Replacement) -> None:
    """UsageError if a stopped run could not be resumed, because a change of the values would not be noticed."""
    how = worded("--resume", "resume=True")
    try:
        made.plan.as_json()
    except PlanError as error:
        raise UsageError(str(error), next=f"Replace it without {how}.") from error
    for donor in made.donors:
        if not donor.storage.files:
            raise UsageError(
                f"{escape(donor.label)} is not stored in files, so a change of it would not be noticed",
                next=f"Replace it without {how}, or save it first.",
            )


_UNDECLARED = ("safetensors", "hf_folder", "npz")
"""Formats that hold a tree without saying its side."""


def _format(checkpoint: Checkpoint, side: Any, out: str | PathLike[str], format: str | None) -> str:
    """The name of the format of `out`. PlanError if it would declare a side that the checkpoint does not declare."""
    from graftax.formats.saving import choose_format, split_target

    name = choose_format(split_target(fspath(out))[0], side, format).name
    if checkpoint.side is None and name not in _UNDECLARED:
        raise PlanError(
            f"{escape(checkpoint.label)} may be torch or Flax ({Signs.of(checkpoint.specs).text}); {name} would say "
            f"{side}",
            next=f"Write {' or '.join(_UNDECLARED)}, or port it first, with {option('source_side')}.",
        )
    return name


def _verbatim(checkpoint: Checkpoint, selected: set[str]) -> dict[str, bytes | None]:
    """Every leaf of a msgpack file in its order, with the bytes of those that are not arrays: they stay unchanged."""
    if checkpoint.storage.format != "msgpack" or checkpoint.storage.native is None:
        return {}
    every: dict[str, bytes | None] = checkpoint.storage.native()
    return {
        path: None if path in selected else raw
        for path, raw in every.items()
        if raw is not None or path in checkpoint.specs
    }
