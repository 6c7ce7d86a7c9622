"""Surgery from file to file: replace the selected leaves and copy every other leaf bit for bit, with a hash to prove
it.

Tensors are read, replaced and written one at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from graftax.errors import Failure, GraftaxError, PlanError, escape, option
from graftax.surgery.donors import FromCheckpoint
from graftax.surgery.leaves import failures_of, new_leaf, prepared
from graftax.surgery.live import live_tree
from graftax.surgery.selecting import Edit, SelectableTree, choose, edits_of, selector_text
from graftax.tree import Checkpoint, TensorSpec
from graftax.tree.sides import Signs, separator_of
from graftax.tree.training_tree import own_parts

if TYPE_CHECKING:
    import numpy as np

    from graftax.formats.base import Output

    Array = np.ndarray[Any, Any]

_PIECE = 1 << 20  # values compared at a time


@dataclass(frozen=True, slots=True)
class Change:
    """One leaf before and after: sha256 of its bytes as files hold them (C order, little end first), how many values
    have other bits, and the largest difference of finite values (None for packed, complex and unchanged leaves)."""

    path: str
    spec: TensorSpec
    selected: bool
    before: str
    after: str
    changed: int | None = 0
    largest: float | None = None

    @property
    def untouched(self) -> bool:
        return self.before == self.after

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "shape": list(self.spec.shape),
            "dtype": self.spec.dtype,
            "selected": self.selected,
            "before": self.before,
            "after": self.after,
            "changed": self.changed,
            "values": self.spec.size,
            "largest": self.largest,
        }


@dataclass(slots=True)
class Report:
    """The report of a replacement. `changes` grows as the tensors are taken; `untied`: (name, other name) of tensors
    that no longer share memory."""

    leaves: int
    selected: tuple[str, ...]
    edits: tuple[tuple[str, str], ...]
    untied: tuple[tuple[str, str], ...] = ()
    changes: list[Change] = field(default_factory=list[Change])

    @property
    def untouched(self) -> int:
        """How many leaves kept their hash."""
        return sum(change.untouched for change in self.changes)

    def as_json(self) -> dict[str, Any]:
        """`changes`: the selected leaves; `untouched`: path -> hash of the others."""
        return {
            "leaves": self.leaves,
            "selected": list(self.selected),
            "edits": [{"selector": selector, "value": value} for selector, value in self.edits],
            "untied": [list(pair) for pair in self.untied],
            "changes": [change.as_json() for change in self.changes if change.selected],
            "untouched": {change.path: change.after for change in self.changes if not change.selected},
        }


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
    checkpoint: Checkpoint,
    edits: Mapping[Any, Any],
    expect: int | None = None,
    *,
    exclude: Any = None,
    selected_only: bool = False,
) -> tuple[Mapping[str, TensorSpec], Iterator[tuple[str, Array]], Report]:
    """(specs, tensors, report) of a checkpoint in which the selected leaves have other values.

    edits          {selector: value}, as in `replace`
    exclude        a selector of leaves that are not selected
    selected_only  give the selected leaves only, as a dry run does

    The selection is checked at once: PlanError if it fails. Values are made as the tensors are taken. Values that do
    not fit raise one PlanError that lists them all, at the latest after the last tensor. A writer must therefore commit
    only afterwards.
    """
    chosen_edits = prepared(edits_of(edits, None))
    values, failures = choose(checkpoint_tree(checkpoint), chosen_edits, expect, exclude)
    if not checkpoint.has_values:
        failures.insert(0, Failure("has names, shapes and dtypes, but no values", key=checkpoint.label))
    if failures:
        raise PlanError(f"nothing was replaced in {escape(checkpoint.label)}:", failures)
    untied = tuple((name, to) for name, to in checkpoint.storage.aliases.items() if (name in values) != (to in values))
    report = Report(
        len(checkpoint),
        tuple(values),
        tuple((selector_text(edit.selector), _value_text(edit)) for edit in chosen_edits),
        untied,
    )
    return checkpoint.specs, _tensors(checkpoint, values, report, selected_only), report


def _value_text(edit: Edit) -> str:
    text = getattr(edit.value, "text", None)
    return text if isinstance(text, str) else escape(type(edit.value).__name__)


def _tensors(
    checkpoint: Checkpoint, values: Mapping[str, Any], report: Report, selected_only: bool
) -> Iterator[tuple[str, Array]]:
    failures: list[Failure] = []
    for path, spec in checkpoint.items():
        chosen = path in values
        if not chosen and (selected_only or failures):  # nothing will be written: only check the other values
            continue
        old = checkpoint.read(path)
        if not chosen:
            digest = sha256(old, spec)
            report.changes.append(Change(path, spec, False, digest, digest))
            yield path, old
            continue
        try:
            new = new_leaf(path, spec, values[path], old.copy, lambda: old, lambda: checkpoint)  # noqa: B023
            new = _as_numpy(new)
        except GraftaxError as error:
            if error.exit_code != PlanError.exit_code:
                raise
            failures += failures_of(path, error)
            continue
        report.changes.append(_change(path, spec, old, new))
        if not failures:
            yield path, new
    if failures:
        raise PlanError(f"nothing was replaced in {escape(checkpoint.label)}:", failures)


def _as_numpy(array: Any) -> Array:
    import numpy as np

    return np.asarray(array)


def sha256(array: Array, spec: TensorSpec) -> str:
    """The hash of a tensor's bytes as files hold them."""
    from graftax.tree.dtypes import storage_bytes

    return hashlib.sha256(storage_bytes(array, spec).data).hexdigest()


def _change(path: str, spec: TensorSpec, old: Array, new: Array) -> Change:
    before, after = sha256(old, spec), sha256(new, spec)
    if before == after:
        return Change(path, spec, True, before, after)
    if spec.packed:
        return Change(path, spec, True, before, after, None)
    return Change(path, spec, True, before, after, *_difference(old, new, spec.kind))


def _difference(old: Array, new: Array, kind: str) -> tuple[int, float | None]:
    """(values with other bits, the largest difference between finite ones)."""
    import numpy as np

    size = old.dtype.itemsize
    first, second = np.ascontiguousarray(old).reshape(-1), np.ascontiguousarray(new).reshape(-1)
    changed, largest = 0, 0.0
    for start in range(0, first.size, _PIECE):
        a, b = first[start : start + _PIECE], second[start : start + _PIECE]
        changed += int((a.view(np.uint8).reshape(-1, size) != b.view(np.uint8).reshape(-1, size)).any(axis=1).sum())
        if kind in "fiub":
            wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
            both = np.isfinite(wide_a) & np.isfinite(wide_b)
            with np.errstate(over="ignore"):
                largest = max(largest, float(np.abs(wide_a[both] - wide_b[both]).max(initial=0.0)))
    return changed, largest if kind in "fiub" else None


# ---------------------------------------------------------------- for the command line


_LEAVES = frozenset({"npz", "msgpack", "orbax"})
"""Formats whose metadata names the leaves that are not weights."""


def write_replacement(
    checkpoint: Checkpoint,
    selector: Any,
    value: Any,
    out: str | PathLike[str] | None,
    *,
    expect: int | None = None,
    format: str | None = None,
    clobber: bool = True,
) -> dict[str, Any]:
    """Write `checkpoint` to `out` with the selected leaves replaced, atomically; out=None computes and writes nothing.

    Gives the report as JSON data. Raises what `replace_checkpoint` and `formats.save` raise.
    """
    inputs = [checkpoint]
    if isinstance(value, FromCheckpoint):
        value = value.opened()
        inputs.append(value.source)
    specs, tensors, report = replace_checkpoint(checkpoint, {selector: value}, expect, selected_only=out is None)
    if out is None:
        for _ in tensors:
            pass
        return report.as_json()
    from graftax.formats.saving import save
    from graftax.formats.sidecars import beside

    output = _output(checkpoint, specs, tensors, out, format)
    is_msgpack = format == "msgpack" if format else fspath(out).endswith(".msgpack")
    verbatim = _verbatim(checkpoint, set(report.selected)) if is_msgpack else {}
    if verbatim:
        output = replace(output, leaves=verbatim)
    saved = save(fspath(out), output, format=format, clobber=clobber, inputs=inputs, sidecars=beside(checkpoint))
    gone = [name for name in checkpoint.storage.metadata if name not in specs and name not in verbatim]
    left = gone if checkpoint.storage.format in _LEAVES else []
    notes = [*saved.notes, *([f"not copied (not weights): {', '.join(map(escape, left[:8]))}"] if left else [])]
    return report.as_json() | {"notes": notes}


_UNDECLARED = ("safetensors", "hf_folder", "npz")
"""Formats that hold a tree without saying its side."""


def _output(
    checkpoint: Checkpoint,
    specs: Mapping[str, TensorSpec],
    tensors: Iterator[tuple[str, Array]],
    out: str | PathLike[str],
    format: str | None,
) -> Output:
    """The output to write. A safetensors file keeps its own names and metadata. The output declares a side only if the
    checkpoint does: PlanError if the format of `out` would declare one."""
    from graftax.formats.base import Output
    from graftax.formats.safetensors_file import without_proof
    from graftax.formats.saving import choose_format, split_target

    side = checkpoint.side or ("flax" if any("/" in path for path in specs) else "torch")
    row = choose_format(split_target(fspath(out))[0], side, format)
    if checkpoint.side is None and row.name not in _UNDECLARED:
        raise PlanError(
            f"{escape(checkpoint.label)} may be torch or Flax ({Signs.of(specs).text}); {row.name} would say {side}",
            next=f"Write {' or '.join(_UNDECLARED)}, or port it first, with {option('source_side')}.",
        )
    metadata = None
    if checkpoint.side_by != "kind":
        storage = checkpoint.storage
        metadata = without_proof(storage.metadata) if storage.format in ("safetensors", "hf_folder") else {}
        if storage.stored and row.name in ("safetensors", "hf_folder"):
            name_of = storage.stored
            specs = {name_of[path]: spec for path, spec in specs.items()}
            tensors = ((name_of[path], array) for path, array in tensors)
    return Output(specs, tensors, side, checkpoint.real_keys, checkpoint.containers, metadata=metadata)


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
