"""Chains of ops: bound, inferred, applied, inverted, written and read."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, cast

from graftax.errors import RulesError, escape
from graftax.ops.base import Arrays, Op, Specs
from graftax.ops.checked_ops import Copy, Crop, Pad, Repeat, RequireZero, Same, Unrepeat
from graftax.ops.edge_ops import Drop, Fill, Keep
from graftax.ops.index_ops import Concat, Flip, Reorder, Split, Stack, Unstack
from graftax.ops.norm_ops import FoldWeightNorm, SpectralSigma, SpectralVector, UnfoldWeightNorm
from graftax.ops.rearrange import Rearrange
from graftax.ops.rearrange_each import RearrangeEach
from graftax.ops.replace_op import Replace
from graftax.ops.value_ops import Cast, Offset, Scale, Sum, Unsum

OPS: dict[str, type[Any]] = {
    cls.name: cls
    for cls in (
        Rearrange, RearrangeEach, Split, Concat, Stack, Unstack, Reorder, Flip, Repeat, Unrepeat, Pad, Crop, Same, Copy,
        RequireZero,
        Cast, Scale, Offset, Sum, Unsum, FoldWeightNorm, UnfoldWeightNorm, SpectralSigma, SpectralVector,
        Fill, Drop, Keep, Replace,
    )
}  # fmt: skip
CONDITIONS: tuple[type[Any], ...] = (Same, RequireZero, Unrepeat, Crop)
"""Ops that are valid only for some values. Those that decide a plan are checked while planning."""


def bind_chain(ops: Sequence[Op], specs: Specs) -> tuple[tuple[Op, ...], Specs]:
    """The ops bound to `specs`, and the specs that they give. LayoutError if one does not fit."""
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
    """The op as JSON data: its name and its fields. PlanError if it holds a Python function."""
    if isinstance(op, Replace):
        return op.as_json()
    fields = dataclasses.fields(cast("Any", op))
    return {"op": op.name} | {field.name: _as_json(getattr(op, field.name)) for field in fields}


def op_from_json(data: Mapping[str, Any]) -> Op:
    """The op that `op_to_json` wrote. RulesError if the data is not one."""
    rest = dict(data)
    name = rest.pop("op", None)
    cls = OPS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise RulesError(f"unknown op {escape(name)!r}; known: {', '.join(OPS)}")
    if cls is Replace:
        raise RulesError(
            "a plan that replaces leaves is not read from a file",
            next="Replace again: graftax replace, or gx.replace.",
        )
    names = {field.name for field in dataclasses.fields(cls)}
    if not set(rest) <= names:
        raise RulesError(f"op {name} has no field {escape(', '.join(sorted(set(rest) - names)))}")
    hints = _field_types(cls)
    values = {key: _of_json(value, hints[key]) for key, value in rest.items()}
    for key, value in values.items():
        if not _is(value, hints[key]):
            raise RulesError(f"op {name}: {key} is {escape(repr(value), 80)}")
    try:
        return cast("Op", cls(**values))
    except TypeError as error:
        raise RulesError(f"op {name}: {escape(error)}") from None


@cache
def _field_types(cls: type[Any]) -> Mapping[str, Any]:
    return typing.get_type_hints(cls)


def _is(value: Any, kind: Any) -> bool:
    """True if the value has the annotated type: int, float, str, bool, tuples of these, or None if allowed."""
    if isinstance(kind, types.UnionType):
        return any(_is(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        items, kinds = cast("tuple[Any, ...]", value), typing.get_args(kind)
        if kinds[-1] is ...:
            return all(_is(item, kinds[0]) for item in items)
        return len(items) == len(kinds) and all(_is(i, k) for i, k in zip(items, kinds, strict=True))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if kind is type(None) else isinstance(value, kind)


_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""JSON has no numbers for these; a plan has them as text."""


def _as_json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _of_json(value: Any, kind: Any) -> Any:
    """A field as its op has it: lists are tuples, and text is a number that is not finite where a number is due."""
    if isinstance(value, str) and (kind is float or float in typing.get_args(kind)):
        return _NOT_FINITE.get(value, value)
    return tuple(_of_json(item, None) for item in cast("list[Any]", value)) if isinstance(value, list) else value
