"""The keys of a rule, and what each of them may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from graftax.rules.model import AxisName


def _names(value: Any) -> tuple[str, ...]:
    items = tuple(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else (value,)
    if not items or not all(isinstance(item, str) and item for item in items):
        raise ValueError("a key template or a list of them")
    return cast("tuple[str, ...]", items)


def _axes(value: Any) -> dict[str, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"": value}
    if isinstance(value, Mapping):
        table = cast("Mapping[Any, Any]", value)
        if table and all(isinstance(v, int) and not isinstance(v, bool) for v in table.values()):
            return {str(k): int(v) for k, v in table.items()}
    raise ValueError("the axis of each index, such as {l = 0}, or one axis")


def _axis_name(name: Any) -> AxisName:
    text = str(name)
    return int(text) if text.lstrip("-").isdigit() else text


def _amounts(value: Any, one: Callable[[Any], Any], hint: str) -> dict[AxisName, Any]:
    if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
        return {_axis_name(value): None}
    if isinstance(value, Mapping) and value:
        try:
            return {_axis_name(k): one(v) for k, v in cast("Mapping[Any, Any]", value).items()}
        except ValueError:
            pass
    raise ValueError(hint)


_PAD = "an axis, or its new rows: {o = 47} after, {o = [1, 46]} before and after"


def _rows(rows: Any) -> tuple[int, int]:
    pair = tuple(cast("list[Any]", rows)) if isinstance(rows, (list, tuple)) else (0, rows)
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in pair):
        raise ValueError
    return cast("tuple[int, int]", pair)


def _flatten(value: Any) -> tuple[tuple[str, int | None], ...]:
    """(axis, size) in order; the axis of other values that are joined with the map is '+'."""
    hint = (
        "the order torch flattened, such as 'C H W', 'C=16 H=7 W=7', '16 7 7' or {C = 16, H = 7, W = 7}; "
        "'C=16 H=7 W=7 +4' if 4 other values stand behind the map, '+4 C=16 H=7 W=7' if they stand before it"
    )
    if isinstance(value, Mapping):
        value = " ".join(f"{name}={size}" for name, size in cast("Mapping[Any, Any]", value).items())
    words = value.replace(",", " ").split() if isinstance(value, str) else []
    if words and all(map(str.isdecimal, words)):
        axes = {1: "C", 2: "CL", 3: "CHW", 4: "CDHW"}.get(len(words), "")
        words = [f"{axis}={word}" for axis, word in zip(axes, words, strict=False)]
    pairs = [("+", "=", word[1:]) if word.startswith("+") else word.partition("=") for word in words]
    sized = all(not eq or (size.isdecimal() and int(size) > 0) for _, eq, size in pairs)
    named = all(name == "+" or name.isidentifier() for name, _, _ in pairs)
    at = [n for n, (name, _, _) in enumerate(pairs) if name == "+"]
    if not sized or not named or len(at) > 1 or not {*at} <= {0, len(pairs) - 1}:
        raise ValueError(hint)
    names = [name.upper() for name, _, _ in pairs]
    if len(set(names)) != len(names) or "C" not in names:
        raise ValueError(f"{hint}: each axis once, and C, the channels, among them")
    return tuple((name, int(size) if eq else None) for name, (_, eq, size) in zip(names, pairs, strict=True))


def _parts(value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    hint = "the order of the parts on both sides, such as 'q k v -> k q v'"
    before, arrow, after = value.partition("->") if isinstance(value, str) else ("", "", "")
    left, right = tuple(before.split()), tuple(after.split())
    if not arrow or len(left) < 2 or len(set(left)) < len(left) or not all(name.isidentifier() for name in left):
        raise ValueError(hint)
    if sorted(left) != sorted(right):
        raise ValueError(f"{hint}: each part once on each side")
    return left, right


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("a number")
    return float(value)


def _must(fits: Callable[[Any], bool], hint: str) -> Callable[[Any], Any]:
    """The check that a value fits."""

    def check(value: Any) -> Any:
        if not fits(value):
            raise ValueError(hint)
        return value

    return check


def _one_of(*words: str) -> Callable[[Any], Any]:
    return _must(lambda value: value in words, ", ".join(map(repr, words[:-1])) + f" or {words[-1]!r}")


_count = _must(lambda n: isinstance(n, int) and not isinstance(n, bool) and n >= 1, "a whole number of at least 1")
_flag = _must(lambda value: isinstance(value, bool), "a boolean: true or false")
_text = _must(lambda value: isinstance(value, str) and value != "", "a string of at least one character")


KEYS: Mapping[str, Callable[[Any], Any]] = {
    "torch": _names,
    "flax": _names,
    "source": _names,
    "target": _names,
    "ops": _text,
    "layout": _text,
    "transpose": _flag,
    "flatten": _flatten,
    "fused": _one_of("block", "interleaved", "tied", "sum"),
    "parts": _parts,
    "heads": _count,
    "kv_heads": _count,
    "stack": _axes,
    "scale": _number,
    "offset": _number,
    "repeat": partial(_amounts, one=_count, hint="an axis, or how often each: {h = 4}"),
    "pad": partial(_amounts, one=_rows, hint=_PAD),
    "drop": _text,
    "fill": _number,
    "missing": _one_of("error", "zeros", "keep"),
}
"""The keys of a rule in their written order, each with the function that checks it: it gives the value, or raises
ValueError with what it should be. Index ranges and axis sizes are further keys, which are checked against the
templates."""
