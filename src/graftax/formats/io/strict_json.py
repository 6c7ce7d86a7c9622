"""JSON from an untrusted file: no duplicate keys, no NaN, no broken text, no unlimited nesting.

Returned values are never nested deeper than the limit, so callers may walk or print them recursively.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from graftax.errors import FormatError, escape
from graftax.tree.limits import limit


class _RefusedJson(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedJson(f"the key {escape(key)!r} occurs twice in one object")
            seen.add(key)
    return out


def _constant(text: str) -> NoReturn:
    raise _RefusedJson(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def parse(raw: bytes, label: str, flat: bool = False) -> Any:
    """The value of the JSON text `raw`; `label` names the file. FormatError says where the JSON is broken, or that it
    is nested beyond the limit."""
    try:
        text = raw.decode("utf-8")
        value = _DECODER.decode(text)
        if "\\u" in text:  # half a surrogate pair is not text and cannot be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as exc:
        raise FormatError(f"{label}: not UTF-8 text (byte {exc.start})") from None  # pyright: ignore
    except json.JSONDecodeError as exc:
        raise FormatError(f"{label}: broken JSON, {exc.msg} at character {exc.pos}") from None
    except RecursionError:
        raise FormatError(f"{label}: JSON nested too deeply") from None
    except ValueError as exc:  # _RefusedJson, or an integer of thousands of digits
        raise FormatError(f"{label}: {escape(exc)}") from None
    if not flat:
        _check_depth(value, text, label)
    return value


def _check_depth(value: Any, text: str, label: str) -> None:
    """FormatError if the value is nested beyond the limit."""
    deepest = limit("depth")
    if text.count("[") + text.count("{") <= deepest:
        return
    level: list[Any] = [value]
    for _ in range(deepest + 1):
        level = [
            child
            for node in level
            for child in (node.values() if type(node) is dict else node)  # pyright: ignore
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return
    raise FormatError(f"{label}: JSON nested too deeply", next=f"The limit is {deepest} levels.")


def parse_object(raw: bytes, label: str, flat: bool = False) -> dict[str, Any]:
    """As `parse`, for an object. flat: the caller checks every value in it and accepts nothing nested, so the depth is
    not measured."""
    value = parse(raw, label, flat)
    if not isinstance(value, dict):
        raise FormatError(f"{label}: expected a JSON object, found {type(value).__name__}")
    return value  # pyright: ignore[reportUnknownVariableType]
