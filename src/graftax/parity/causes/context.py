"""Prepare a divergence for the fits: operands, leaves, known numbers of heads and shapes of maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np

from graftax.adapters.nests import mapped
from graftax.errors import GraftaxError
from graftax.parity.causes.elementwise import Operand
from graftax.parity.causes.fused import fused_entry
from graftax.parity.causes.misplaced import is_norm
from graftax.parity.causes.numbers import Array, arrays, is_number, relative
from graftax.parity.causes.reorder import Known
from graftax.parity.causes.weights import FlaxLeaf, slices
from graftax.parity.divergence import Divergence
from graftax.plans import Entry

_OPERANDS = 28
_TABLES = ("Embedding", "Embed")
_TABLE = 1 << 24  # values of a table that may hold positions


def operands(divergence: Divergence) -> list[Operand]:
    """Reference arrays that the code before this call may have used, the nearest first: the outputs and inputs of the
    modules before it. If a container's own code is at fault, its own input counts too."""
    found: list[Operand] = []
    for row, output in divergence.before:
        table = any(name in _TABLES for name in row.kind.replace("/", " ").split())
        norm = is_norm(divergence.reference.modules, row.site_torch.path)
        for _, array in arrays(output):
            found.append(Operand(row.site_flax.path or str(row.site_flax), array, table, norm=norm))
    if divergence.where == "out":
        raw = (divergence.record.args, dict(divergence.record.kwargs))
        for _, array in arrays((divergence.want_args, dict(divergence.want_kwargs))):
            found.append(Operand(f"the input of {divergence.row.site_flax}", array))
        for _, array in arrays(raw):
            found += [Operand(f"the input of {divergence.row.site_flax}", other) for other in _layouts(array)]
    for row, _ in divergence.before[:_OPERANDS]:
        record = divergence.reference.records.get(row.site_torch)
        for _, array in arrays((record.args, dict(record.kwargs)) if record is not None else ()):
            for other in _layouts(array):
                found.append(Operand(f"the input of {row.site_flax}", other, into=(row.site_flax.path,)))
    return _distinct(found)


def _layouts(array: Array) -> Iterator[Array]:
    """The array in torch's layout; a map with its channels last."""
    if array.ndim >= 4:
        yield np.moveaxis(array, 1, -1)
    else:
        yield array


def _distinct(found: list[Operand]) -> list[Operand]:
    out: dict[tuple[Any, ...], Operand] = {}
    for operand in found:
        array = operand.array
        if not is_number(array) or array.size < 2:
            continue
        probe = array.reshape(-1)[:: max(1, array.size // 32)]
        key = (array.size, probe.astype(np.float32).tobytes())
        if key in out:
            out[key] = replace(out[key], into=(*out[key].into, *operand.into))
        elif len(out) < _OPERANDS:
            out[key] = operand
    return list(out.values())


def halves(found: list[Operand], width: int) -> list[Operand]:
    """The operands, and the parts of operands that are two or three times as wide (fused projections)."""
    out = list(found)
    for operand in found[:8]:
        wide = operand.array.shape[-1]
        for parts in (2, 3):
            if wide == parts * width:
                for index in range(parts):
                    part = operand.array[..., index * width : (index + 1) * width]
                    out.append(
                        Operand(operand.name, part, operand.table, f"[..., {index * width}:{(index + 1) * width}]")
                    )
                if parts == 2:
                    out += [
                        Operand(operand.name, operand.array[..., i::2], operand.table, f"[..., {i}::2]") for i in (0, 1)
                    ]
    return out


def known(divergence: Divergence) -> Known:
    """Numbers of heads from settings and shapes, and maps that may have been flattened."""
    heads: set[int] = set()
    for modules in (divergence.reference.modules, divergence.flax.modules):
        for module in modules.values():
            for name in ("num_heads", "n_heads", "num_attention_heads", "heads", "num_key_value_heads", "kv_heads"):
                value = module.settings.get(name)
                if type(value) is int and value > 1:
                    heads.add(value)
    for entry in divergence.pair.entries:
        rank = np.asarray(divergence.torch_weights.get(next(iter(entry.sources), ""))).ndim
        for path in entry.targets:
            shape = np.asarray(divergence.expected.get(path)).shape
            if len(shape) == rank + 1 and rank in (1, 2):  # an axis was cut into heads and values
                heads |= set(shape[:2])
    maps: set[tuple[int, ...]] = set()
    for _, output in divergence.before:
        for _, array in arrays(output):
            if array.ndim >= 4:
                maps.add((array.shape[-1], *array.shape[1:-1]))
    return Known(frozenset(heads), frozenset(maps | _halved(maps)))


def _halved(maps: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Shapes of maps after a pool that may lie between: the same channels, the sides divided by 2, 3 or 4."""
    out: set[tuple[int, ...]] = set()
    for channels, *sides in maps:
        for step in (2, 3, 4):
            out.add((channels, *(side // step for side in sides)))
            out.add((channels, *(-(-side // step) for side in sides)))
    return {sizes for sizes in out if all(sizes)}


def leaf(divergence: Divergence, path: str, entry: Entry | None, shared: Known) -> FlaxLeaf:
    """A Flax leaf with everything that `diagnose` needs."""
    have, want = np.asarray(divergence.flax_weights[path]), np.asarray(divergence.expected[path])
    torch = {} if entry is None else {name: divergence.torch_weights.get(name) for name in entry.sources}
    alike = [other for other in divergence.expected if _shape(divergence, other) == have.shape]
    alike = [other for other in alike if other in divergence.flax_weights]
    plan = divergence.plan
    fused = (
        None if entry is None or plan is None else fused_entry(entry, plan.source.specs, plan.like.specs, shared.heads)
    )
    initial = None if divergence.initial is None else divergence.initial.get(path)
    stacked = next((axis for axis, size in enumerate(have.shape) if size == divergence.pair.steps), None)
    return FlaxLeaf(
        path,
        have,
        want,
        {name: np.asarray(value) for name, value in torch.items() if value is not None},
        LeafSubset(alike, divergence.expected),
        LeafSubset(alike, divergence.flax_weights),
        None if initial is None else np.asarray(initial),
        shared,
        stacked if divergence.pair.steps > 1 else None,
        fused,
    )


def _shape(divergence: Divergence, path: str) -> tuple[int, ...]:
    """The shape of a Flax leaf; its values are made only if the plan does not know the shape."""
    specs = {} if divergence.plan is None else divergence.plan.like.specs
    return specs[path].shape if path in specs else np.shape(divergence.expected[path])


class LeafSubset(Mapping[str, Array]):
    """A subset of leaves, each made when it is requested; a leaf that cannot be made is an empty array."""

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


def tables(divergence: Divergence) -> Mapping[str, Array]:
    """Leaves that may be added to activations: they have 2 to 4 axes, are not kernels, and are not as large as a
    vocabulary."""
    found = [
        path
        for path in divergence.expected
        if path.rpartition("/")[2] != "kernel" and len(_shape(divergence, path)) in (2, 3, 4)
    ]
    return LeafSubset((path for path in found if np.prod(_shape(divergence, path)) <= _TABLE), divergence.expected)


def step_of(divergence: Divergence, whole: FlaxLeaf) -> FlaxLeaf | None:
    """The layer of a stacked leaf that this call uses."""
    if whole.stacked is None:
        return None
    return slices(whole, whole.stacked, divergence.pair.step)


def unrounded(divergence: Divergence) -> Divergence:
    """The divergence with its reference in float32. A module that computes in bfloat16 got the reference rounded to
    bfloat16; this undoes the rounding."""
    record = divergence.record
    args, kwargs = _restored((divergence.want_args, dict(divergence.want_kwargs)), (record.args, dict(record.kwargs)))
    return replace(
        divergence, want_args=args, want_kwargs=kwargs, want_out=_restored(divergence.want_out, record.output)
    )


def _restored(nest: Any, reference: Any) -> Any:
    """The nest with each half precision array replaced by the array of `reference` that rounds to it."""
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
    """`want`, or the same map with its channels last, whichever is nearer to `have`: a map with equal sides does not
    show the order of its axes. reference: torch's arrays."""
    for array in (array for _, array in arrays(reference)):
        if array.ndim >= 4 and array.size == want.size and want.ndim == array.ndim:
            last = np.moveaxis(array, 1, -1)
            if last.shape == want.shape and relative(have, last) < relative(have, want):
                return last
    return want


def module_leaves(divergence: Divergence) -> Mapping[str, Array]:
    """The right leaves of the Flax module, by their path below it: 'scale', 'query/kernel'."""
    out: dict[str, Array] = {}
    prefix = f"{divergence.pair.flax}/" if divergence.pair.flax else ""
    for entry in divergence.pair.entries:
        for path in entry.targets:
            if path not in divergence.expected:
                continue
            found = path.find(prefix) if prefix else 0
            value = np.asarray(divergence.expected[path])
            if divergence.pair.steps > 1 and divergence.pair.steps in value.shape:
                value = np.take(value, divergence.pair.step, value.shape.index(divergence.pair.steps))
            role = path[found + len(prefix) :] if found >= 0 else path.rpartition("/")[2]
            out[role.removeprefix("params/")] = value
    return out
