"""Golden files: a recorded run of the torch side, against which Flax is judged where torch is not installed.

A golden file is a safetensors file. Its tensors are the inputs of the Flax model, torch's outputs in float64 (rounded
to float32) and in float32, and on request the inputs and outputs of every layer. The metadata `graftax_golden` is JSON:
it maps each value to its tensor, and holds the torch modules, their settings, and the names, shapes and dtypes of the
weights, from which a plan is made. The weights themselves are not recorded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from graftax.errors import FormatError, escape, with_article
from graftax.parity.golden_values import ArrayTable, decode, encode
from graftax.parity.records import Record, Reference, Site
from graftax.tree import Checkpoint, Live, Module, Storage, TensorSpec

KEY = "graftax_golden"
SCHEMA = 1


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """A recorded torch run, to be compared with Flax.

    reference   the run; `records` is empty if the layers were not recorded
    flax_args, flax_kwargs   the arguments of the Flax model, in its own layout
    specs, buffers, aliases  torch's leaves, without values: the source of a plan
    torch_name  the torch module's class
    layout, out_layout       as declared when the run was recorded
    versions    of torch and graftax at the recording
    """

    reference: Reference
    flax_args: tuple[Any, ...]
    flax_kwargs: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    buffers: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    torch_name: str = "torch"
    layout: str | None = None
    out_layout: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    def checkpoint(self) -> Checkpoint:
        """The torch side as a source for a plan: names, shapes, dtypes and module kinds, no values."""
        return Checkpoint(
            label=f"{self.torch_name} (golden)",
            side="torch",
            specs=self.specs,
            storage=Storage(aliases=self.aliases),
            live=Live(modules=self.reference.modules, buffers=self.buffers),
        )


# ---------------------------------------------------------------- writing


def save_golden(path: str | PathLike[str], golden: Golden, layers: bool = False) -> None:
    """Write a golden file in one step. A file that is not a golden file is not replaced. layers: include the inputs and
    outputs of every layer, so that a replay can name the one that diverges.

    Raises UsageError for inputs that the file cannot hold, StorageError if writing fails.
    """
    from graftax.formats.io import system
    from graftax.formats.io.commit import staged
    from graftax.formats.io.own_file import refuse_other_file
    from graftax.formats.safetensors_header import build_header
    from graftax.tree.dtypes import spec_of, storage_bytes

    out = Path(path)
    refuse_other_file(out, KEY, "a golden file")
    table = ArrayTable()
    kept = golden if layers else replace(golden, reference=replace(golden.reference, records={}, order=(), events=()))
    text = json.dumps(_as_json(kept, table), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    specs = {name: spec_of(array) for name, array in table.arrays.items()}
    head, ranges = build_header(specs, {"format": "golden", KEY: text}, escape(out))
    try:
        with staged(out, folder=False) as place:
            fd = os.open(place.payload, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                system.write_at(fd, 0, memoryview(head))
                for name, array in table.arrays.items():
                    system.write_at(fd, ranges[name][0], memoryview(storage_bytes(array, specs[name])))  # pyright: ignore
            finally:
                os.close(fd)
    except OSError as error:
        raise system.storage_error(error, out) from error


def _as_json(golden: Golden, table: ArrayTable) -> dict[str, Any]:
    reference = golden.reference
    sites = [site for site in reference.order if site in reference.records]
    numbers = {site: i for i, site in enumerate(sites)}
    return {
        "schema": SCHEMA,
        "torch": golden.torch_name,
        "versions": dict(golden.versions),
        "layout": golden.layout,
        "out_layout": golden.out_layout,
        "args": encode(tuple(golden.flax_args), table, "inputs", strict=True),
        "kwargs": encode(dict(golden.flax_kwargs), table, "inputs", strict=True),
        "outputs": encode(reference.outputs, table, "outputs"),
        "outputs_float32": encode(reference.outputs_float32, table, "outputs_float32"),
        "specs": {name: [list(spec.shape), spec.dtype] for name, spec in golden.specs.items()},
        "buffers": sorted(golden.buffers),
        "aliases": dict(golden.aliases),
        "not_traced": dict(reference.not_traced),
        "modules": [
            [module.path, module.kind, list(module.bases), encode(dict(module.settings), table, "settings"),
             dict(module.leaves)]
            for module in reference.modules.values()
        ],
        "layers": [_record_json(site, reference.records[site], table) for site in sites],
        "events": [[what, numbers[site]] for what, site in reference.events if site in numbers],
    }  # fmt: skip


def _record_json(site: Site, record: Record, table: ArrayTable) -> list[Any]:
    place = f"layers/{site.path}/{site.call}"
    values = [("in", tuple(record.args)), ("in", dict(record.kwargs)), ("out", record.output)]
    errors = (record.in_error, record.out_error, record.free_error)
    return [
        site.path,
        site.call,
        *(encode(value, table, f"{place}/{name}") for name, value in values),
        *(encode(float(error), table, place) for error in errors),
    ]


# ---------------------------------------------------------------- reading


def load_golden(path: str | PathLike[str]) -> Golden:
    """Read what `save_golden` wrote. FormatError for a malformed file or one of another kind, StorageError,
    UnsafeInputError."""
    from graftax.formats import foreign, safetensors_file
    from graftax.formats.io import files, strict_json

    place, label = Path(path), escape(path)
    head = files.read_head(place)
    checkpoint = safetensors_file.open(place) if safetensors_file.sniff(place, head) else None
    if checkpoint is None:
        foreign.refuse_foreign(place, head, label)
    text = None if checkpoint is None else checkpoint.storage.metadata.get(KEY)
    if checkpoint is None or text is None:
        raise FormatError(f"{label} is no golden file", next="Write one: graftax verify --record.")
    data = strict_json.parse_object(text.encode("utf-8"), f"{label}: metadata {KEY}")
    if data.get("schema") != SCHEMA:
        raise FormatError(
            f"{label} is a golden file of schema {escape(data.get('schema'))}; this graftax knows {SCHEMA}"
        )
    arrays = {name: checkpoint.read(name) for name in checkpoint}
    try:
        return _golden(data, arrays, label)
    except FormatError as error:
        raise error if label in str(error) else FormatError(f"{label}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else escape(error, 200)
        raise FormatError(f"{label}: malformed golden file: {what}", next="Record it again.") from None


def _golden(data: Mapping[str, Any], arrays: Mapping[str, Any], label: str) -> Golden:
    modules: dict[str, Module] = {}
    for module, kind, bases, settings, leaves in _typed(data, "modules", list):
        decoded = _decoded(settings, arrays, label, dict)
        modules[module] = Module(_text(module), _text(kind), tuple(map(_text, bases)), decoded, _texts(leaves))
    records: dict[Site, Record] = {}
    for module, call, args, kwargs, output, *errors in _typed(data, "layers", list):
        numbers = [_number(decode(error, arrays, label)) for error in errors]
        records[Site(_text(module), _whole(call))] = Record(
            _decoded(args, arrays, label, tuple),
            _decoded(kwargs, arrays, label, dict),
            decode(output, arrays, label),
            *_exactly(numbers, 3),
        )
    specs = {
        name: TensorSpec(tuple(map(_whole, shape)), _text(dtype))
        for name, (shape, dtype) in _typed(data, "specs", dict).items()
    }
    sites = tuple(records)
    events = tuple((_choice(what, ("in", "out")), sites[_whole(i)]) for what, i in _typed(data, "events", list))
    reference = Reference(
        modules=modules,
        order=sites,
        records=records,
        outputs=decode(data["outputs"], arrays, label),
        outputs_float32=decode(data["outputs_float32"], arrays, label),
        not_traced=_texts(data["not_traced"]),
        events=events,
    )
    return Golden(
        reference=reference,
        flax_args=_decoded(data["args"], arrays, label, tuple),
        flax_kwargs=_decoded(data["kwargs"], arrays, label, dict),
        specs=specs,
        buffers=frozenset(map(_text, _typed(data, "buffers", list))),
        aliases=_texts(data["aliases"]),
        torch_name=_text(data["torch"]),
        layout=_maybe_text(data["layout"]),
        out_layout=_maybe_text(data["out_layout"]),
        versions=_texts(data["versions"]),
    )


def _typed(data: Mapping[str, Any], key: str, kind: type) -> Any:
    if not isinstance(data[key], kind):
        raise TypeError(f"{key!r} must be {with_article(kind.__name__)}")
    return data[key]


def _decoded(data: Any, arrays: Mapping[str, Any], label: str, kind: type) -> Any:
    value = decode(data, arrays, label)
    if not isinstance(value, kind):
        raise TypeError(f"expected {with_article(kind.__name__)}, found {type(value).__name__}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {escape(repr(value), 60)}")
    return value


def _choice(value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"expected one of {', '.join(known)}, found {escape(repr(value), 60)}")
    return value


def _maybe_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _texts(value: Any) -> dict[str, str]:
    return {_text(key): _text(item) for key, item in value.items()}


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"expected a whole number from 0, found {escape(repr(value), 60)}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"expected a number, found {escape(repr(value), 60)}")
    return float(value)


def _exactly(values: list[float], count: int) -> list[float]:
    if len(values) != count:
        raise ValueError(f"a layer has {len(values)} errors, not {count}")
    return values
