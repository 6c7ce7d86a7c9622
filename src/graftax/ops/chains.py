"""Chains of ops: bound, inferred, applied, inverted, written and read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from graftax.errors import RulesError, escape
from graftax.ops.base import Arrays, Op, Specs
from graftax.ops.checked_ops import Copy, Crop, Pad, Repeat, RequireZero, Same, Unrepeat
from graftax.ops.index_ops import Concat, Flip, Split, Stack, Unstack
from graftax.ops.rearrange import Rearrange
from graftax.ops.rearrange_each import RearrangeEach
from graftax.ops.value_ops import (
    Cast,
    Drop,
    Fill,
    FoldWeightNorm,
    Keep,
    Offset,
    Scale,
    SpectralSigma,
    SpectralVector,
    Sum,
    UnfoldWeightNorm,
    Unsum,
)

OPS: dict[str, type[Any]] = {
    cls.name: cls
    for cls in (
        Rearrange, RearrangeEach, Split, Concat, Stack, Unstack, Flip, Repeat, Unrepeat, Pad, Crop, Same, Copy,
        RequireZero,
        Cast, Scale, Offset, Sum, Unsum, FoldWeightNorm, UnfoldWeightNorm, SpectralSigma, SpectralVector,
        Fill, Drop, Keep,
    )
}  # fmt: skip
CONDITIONS: tuple[type[Any], ...] = (Same, RequireZero, Unrepeat, Crop)
"""Ops that hold only for some values; those that decide a plan are checked while planning."""


def bind_chain(ops: Sequence[Op], specs: Specs) -> tuple[tuple[Op, ...], Specs]:
    """The ops bound to `specs`, and the specs they give. LayoutError where one does not fit."""
    out: list[Op] = []
    for op in ops:
        bound = op.bind(specs) if isinstance(op, (Rearrange, RearrangeEach, Drop)) else op
        specs = bound.infer(specs)
        out.append(bound)
    return tuple(out), specs


def infer_chain(ops: Iterable[Op], specs: Specs) -> Specs:
    for op in ops:
        specs = op.infer(specs)
    return specs


def apply_chain(ops: Iterable[Op], arrays: Arrays) -> Arrays:
    for op in ops:
        arrays = op.apply(arrays)
    return arrays


def invert_chain(ops: Sequence[Op]) -> tuple[Op, ...]:
    return tuple(op.inverse for op in reversed(ops))


def chain_text(ops: Sequence[Op]) -> str:
    return ", then ".join(op.text for op in ops) or "as it is"


def op_to_json(op: Op) -> dict[str, Any]:
    """The op as JSON data: its name and its fields."""
    fields = dataclasses.fields(cast("Any", op))
    return {"op": op.name} | {field.name: getattr(op, field.name) for field in fields}


def op_from_json(data: Mapping[str, Any]) -> Op:
    """The op that `op_to_json` wrote. RulesError where the data is not one."""
    rest = dict(data)
    name = rest.pop("op", None)
    cls = OPS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise RulesError(f"unknown op {escape(name)!r}; known: {', '.join(OPS)}")
    names = {field.name for field in dataclasses.fields(cls)}
    if not set(rest) <= names:
        raise RulesError(f"op {name} has no field {escape(', '.join(sorted(set(rest) - names)))}")
    try:
        op = cls(**{key: _tuples(value) for key, value in rest.items()})
        return cast("Op", op)
    except TypeError as error:
        raise RulesError(f"op {name}: {escape(error)}") from None


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(item) for item in cast("list[Any]", value))
    return value
