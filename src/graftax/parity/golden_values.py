"""Values as JSON with a table of arrays, and back, for the header of a golden file. An array that stands in several
places is stored once, and is one object again when it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftax.adapters.nests import children
from graftax.errors import FormatError, UsageError, escape, with_article
from graftax.tree import escape_part

if TYPE_CHECKING:
    import numpy as np

_DEPTH = 40


@dataclass(frozen=True, slots=True)
class TextOnly:
    """The text of an object that a golden file cannot hold, such as an argument that only torch understands."""

    text: str


@dataclass(slots=True)
class ArrayTable:
    """Arrays by their name in the file: the name of the first place in which they stand."""

    arrays: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict[int, str])

    def name_of(self, array: np.ndarray[Any, Any], place: str) -> str:
        name = self.names.get(id(array))
        if name is None:
            name = place
            while name in self.arrays:
                name += "+"
            self.names[id(array)] = name
            self.arrays[name] = array  # kept, so that no other array gets its id
        return name


def encode(value: Any, table: ArrayTable, place: str, strict: bool = False, depth: int = 0) -> Any:
    """A nest of arrays, numbers and text as JSON data. Other objects become their text; with `strict` they raise
    UsageError.

    A JSON object has one key that gives its kind: a array, t tuple, l list, d dict (pairs), f a float that JSON lacks,
    c complex, o the text of another object.
    """
    import numpy as np

    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        return _array(np.asarray(value), table, place)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"f": repr(value)}
    if isinstance(value, complex):
        return {"c": [repr(value.real), repr(value.imag)]}
    if depth > _DEPTH:
        raise UsageError(f"{escape(place)}: nested deeper than {_DEPTH} levels, more than a golden file holds")
    nodes = children(value)
    if nodes is None:
        if strict:
            kind = f"{type(value).__module__}.{type(value).__name__}"
            raise UsageError(
                f"{escape(place)} is {with_article(kind)}, which a golden file cannot hold",
                next="Arrays, numbers, text, None and nests of them can be recorded.",
            )
        return {"o": escape(repr(value), 200)}
    if isinstance(value, (list, tuple)):
        made = [encode(item, table, f"{place}/{i}", strict, depth + 1) for i, item in nodes]
        return {"l" if isinstance(value, list) else "t": made}
    pairs = [
        [key if type(key) in (str, int) else str(key),
         encode(child, table, f"{place}/{escape_part(key)}", strict, depth + 1)]
        for key, child in nodes
    ]  # fmt: skip
    return {"d": pairs}


def _array(array: np.ndarray[Any, Any], table: ArrayTable, place: str) -> Any:
    if array.dtype.kind in "OSUMm" or (array.dtype.kind == "V" and array.dtype.names):
        return {"o": escape(repr(array), 200)}
    return {"a": table.name_of(array, place)}


def decode(data: Any, arrays: Mapping[str, Any], label: str, depth: int = 0) -> Any:
    """The value that `encode` got. FormatError for JSON that `encode` does not write; `label` names the file."""
    if data is None or isinstance(data, (bool, str, int, float)):
        return data
    if not isinstance(data, dict) or len(data) != 1 or depth > _DEPTH:
        raise _malformed(label, data)
    [(kind, body)] = data.items()
    if kind == "a" and isinstance(body, str):
        if body not in arrays:
            raise FormatError(f"{label} names the array {escape(body)!r}, which the file does not hold")
        return arrays[body]
    if kind in ("t", "l") and isinstance(body, list):
        made = [decode(item, arrays, label, depth + 1) for item in body]
        return made if kind == "l" else tuple(made)
    if kind == "d" and isinstance(body, list) and all(_is_pair(pair) for pair in body):
        return {key: decode(child, arrays, label, depth + 1) for key, child in body}
    if kind == "f" and body in ("nan", "inf", "-inf"):
        return float(body)
    if kind == "c" and isinstance(body, list) and len(body) == 2:
        try:
            return complex(float(body[0]), float(body[1]))
        except (TypeError, ValueError):
            raise _malformed(label, data) from None
    if kind == "o" and isinstance(body, str):
        return TextOnly(body)
    raise _malformed(label, data)


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int)


def _malformed(label: str, data: Any) -> FormatError:
    return FormatError(f"{label}: this is not a value that graftax writes: {escape(repr(data), 80)}")
