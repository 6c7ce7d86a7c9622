"""What a suspect holds, as the fits want it: sources, leaves, what is known about heads and maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np

from graftax.errors import GraftaxError
from graftax.parity.causes.elementwise import Source
from graftax.parity.causes.fused import fused_entry
from graftax.parity.causes.misplaced import is_norm
from graftax.parity.causes.numbers import Array, arrays, is_number, relative
from graftax.parity.causes.reorder import Known
from graftax.parity.causes.weights import Leaf, slices
from graftax.parity.divergence import Suspect
from graftax.parity.values import mapped
from graftax.plans import Entry

_SOURCES = 28
_TABLES = ("Embedding", "Embed")
_TABLE = 1 << 24  # values of a table that may hold positions


def sources(suspect: Suspect) -> list[Source]:
    """Reference arrays that code before this call may have used, the nearest first: outputs of the modules before, and
    what went into them. Inside a container that is to blame, its own input counts too."""
    found: list[Source] = []
    for row, output in suspect.before:
        table = any(name in _TABLES for name in row.kind.replace("/", " ").split())
        norm = is_norm(suspect.reference.modules, row.site_torch.path)
        for _, array in arrays(output):
            found.append(Source(row.site_flax.path or str(row.site_flax), array, table, norm=norm))
    if suspect.where == "out":
        raw = (suspect.record.args, dict(suspect.record.kwargs))
        for _, array in arrays((suspect.want_args, dict(suspect.want_kwargs))):
            found.append(Source(f"the input of {suspect.row.site_flax}", array))
        for _, array in arrays(raw):
            found += [Source(f"the input of {suspect.row.site_flax}", other) for other in _layouts(array)]
    for row, _ in suspect.before[:_SOURCES]:
        record = suspect.reference.records.get(row.site_torch)
        for _, array in arrays((record.args, dict(record.kwargs)) if record is not None else ()):
            for other in _layouts(array):
                found.append(Source(f"the input of {row.site_flax}", other, into=(row.site_flax.path,)))
    return _distinct(found)


def _layouts(array: Array) -> Iterator[Array]:
    """As torch has it; a map with the channels last."""
    if array.ndim >= 4:
        yield np.moveaxis(array, 1, -1)
    else:
        yield array


def _distinct(found: list[Source]) -> list[Source]:
    out: dict[tuple[Any, ...], Source] = {}
    for source in found:
        array = source.array
        if not is_number(array) or array.size < 2:
            continue
        probe = array.reshape(-1)[:: max(1, array.size // 32)]
        key = (array.size, probe.astype(np.float32).tobytes())
        if key in out:
            out[key] = replace(out[key], into=(*out[key].into, *source.into))
        elif len(out) < _SOURCES:
            out[key] = source
    return list(out.values())


def halves(found: list[Source], width: int) -> list[Source]:
    """The sources, and the parts of those that are two or three times as wide: a fused projection."""
    out = list(found)
    for source in found[:8]:
        wide = source.array.shape[-1]
        for parts in (2, 3):
            if wide == parts * width:
                for index in range(parts):
                    part = source.array[..., index * width : (index + 1) * width]
                    out.append(Source(source.name, part, source.table, f"[..., {index * width}:{(index + 1) * width}]"))
                if parts == 2:
                    out += [
                        Source(source.name, source.array[..., i::2], source.table, f"[..., {i}::2]") for i in (0, 1)
                    ]
    return out


def known(suspect: Suspect) -> Known:
    """Numbers of heads from settings and shapes, and maps that may have been flattened."""
    heads: set[int] = set()
    for modules in (suspect.reference.modules, suspect.flax.modules):
        for module in modules.values():
            for name in ("num_heads", "n_heads", "num_attention_heads", "heads", "num_key_value_heads", "kv_heads"):
                value = module.settings.get(name)
                if type(value) is int and value > 1:
                    heads.add(value)
    for entry in suspect.pair.entries:
        rank = np.asarray(suspect.torch_weights.get(next(iter(entry.sources), ""))).ndim
        for path in entry.targets:
            shape = np.asarray(suspect.expected.get(path)).shape
            if len(shape) == rank + 1 and rank in (1, 2):  # an axis was cut into heads and values
                heads |= set(shape[:2])
    maps: set[tuple[int, ...]] = set()
    for _, output in suspect.before:
        for _, array in arrays(output):
            if array.ndim >= 4:
                maps.add((array.shape[-1], *array.shape[1:-1]))
    return Known(frozenset(heads), frozenset(maps | _halved(maps)))


def _halved(maps: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """A pool may have stood between: the channels are the same, the sides a half or a third."""
    out: set[tuple[int, ...]] = set()
    for channels, *sides in maps:
        for step in (2, 3, 4):
            out.add((channels, *(side // step for side in sides)))
            out.add((channels, *(-(-side // step) for side in sides)))
    return {sizes for sizes in out if all(sizes)}


def leaf(suspect: Suspect, path: str, entry: Entry | None, shared: Known) -> Leaf:
    """A Flax leaf with everything that its diagnosis needs."""
    have, want = np.asarray(suspect.flax_weights[path]), np.asarray(suspect.expected[path])
    torch = {} if entry is None else {name: suspect.torch_weights.get(name) for name in entry.sources}
    alike = [other for other in suspect.expected if _shape(suspect, other) == have.shape]
    alike = [other for other in alike if other in suspect.flax_weights]
    plan = suspect.plan
    fused = (
        None if entry is None or plan is None else fused_entry(entry, plan.source.specs, plan.like.specs, shared.heads)
    )
    initial = None if suspect.initial is None else suspect.initial.get(path)
    stacked = next((axis for axis, size in enumerate(have.shape) if size == suspect.pair.steps), None)
    return Leaf(
        path,
        have,
        want,
        {name: np.asarray(value) for name, value in torch.items() if value is not None},
        Some(alike, suspect.expected),
        Some(alike, suspect.flax_weights),
        None if initial is None else np.asarray(initial),
        shared,
        stacked if suspect.pair.steps > 1 else None,
        fused,
    )


def _shape(suspect: Suspect, path: str) -> tuple[int, ...]:
    """Of a Flax leaf, without making its values where the plan knows it."""
    specs = {} if suspect.plan is None else suspect.plan.like.specs
    return specs[path].shape if path in specs else np.shape(suspect.expected[path])


class Some(Mapping[str, Array]):
    """Some leaves of many, each made when it is asked for; one that cannot be made is empty."""

    def __init__(self, paths: Iterable[str], leaves: Mapping[str, Any]) -> None:
        self.paths, self.leaves = tuple(paths), leaves

    def __getitem__(self, path: str) -> Array:
        if path not in self.paths:
            raise KeyError(path)
        try:
            return np.asarray(self.leaves[path])
        except GraftaxError:
            return np.empty(0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def tables(suspect: Suspect) -> Mapping[str, Array]:
    """Leaves that may be added to activations: two axes and more, no kernel, not the size of a vocabulary's."""
    found = [
        path
        for path in suspect.expected
        if path.rpartition("/")[2] != "kernel" and len(_shape(suspect, path)) in (2, 3, 4)
    ]
    return Some((path for path in found if np.prod(_shape(suspect, path)) <= _TABLE), suspect.expected)


def step_of(suspect: Suspect, whole: Leaf) -> Leaf | None:
    """The layer of a stacked leaf that this call uses."""
    if whole.stacked is None:
        return None
    return slices(whole, whole.stacked, suspect.pair.step)


def unrounded(suspect: Suspect) -> Suspect:
    """The reference as it was before it was handed to Flax: a module that computes in bfloat16 was given it, and is
    compared with it, in bfloat16."""
    record = suspect.record
    args, kwargs = _restored((suspect.want_args, dict(suspect.want_kwargs)), (record.args, dict(record.kwargs)))
    return replace(suspect, want_args=args, want_kwargs=kwargs, want_out=_restored(suspect.want_out, record.output))


def _restored(nest: Any, reference: Any) -> Any:
    """The nest with the float32 values of those arrays of `reference` that round to its arrays."""
    wide = [array for _, array in arrays(reference) if is_number(array)]

    def restore(array: Array) -> Array:
        if not is_number(array) or array.dtype.itemsize > 2:
            return array
        for other in wide:
            for axes in permutations(range(other.ndim)) if other.ndim < 6 and other.size == array.size else ():
                turned = other.transpose(axes)
                if turned.shape == array.shape or axes == tuple(range(other.ndim)):
                    turned = turned.reshape(array.shape)
                    if np.array_equal(turned.astype(array.dtype), array):
                        return turned
        return array

    return mapped(nest, lambda value: isinstance(value, np.ndarray), restore)


def nearer(want: Array, have: Array, reference: Any) -> Array:
    """`want`, or where a map of equal sides leaves the order of its axes open, the same with the channels last: of the
    two what `have` is nearer to. reference: what torch has there."""
    for array in (array for _, array in arrays(reference)):
        if array.ndim >= 4 and array.size == want.size and want.ndim == array.ndim:
            last = np.moveaxis(array, 1, -1)
            if last.shape == want.shape and relative(have, last) < relative(have, want):
                return last
    return want


def module_leaves(suspect: Suspect) -> Mapping[str, Array]:
    """The Flax module's leaves as they should be, by what is below the module: 'scale', 'query/kernel'."""
    out: dict[str, Array] = {}
    prefix = f"{suspect.pair.flax}/" if suspect.pair.flax else ""
    for entry in suspect.pair.entries:
        for path in entry.targets:
            if path not in suspect.expected:
                continue
            found = path.find(prefix) if prefix else 0
            value = np.asarray(suspect.expected[path])
            if suspect.pair.steps > 1 and suspect.pair.steps in value.shape:
                value = np.take(value, suspect.pair.step, value.shape.index(suspect.pair.steps))
            role = path[found + len(prefix) :] if found >= 0 else path.rpartition("/")[2]
            out[role.removeprefix("params/")] = value
    return out
