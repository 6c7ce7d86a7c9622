"""Rules as TOML text: the line of each rule, and rules written for pasting."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, cast

from graftax.errors import RulesError, escape

ORDER = (
    "torch", "flax", "source", "target", "ops", "layout", "transpose", "flatten", "fused", "parts", "heads", "kv_heads",
    "stack", "scale", "offset", "repeat", "pad", "drop", "fill", "missing",
)  # fmt: skip
"""The keys of a rule in their written order; ranges and axis sizes follow them."""

_BARE = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_SHORT = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
_HIDDEN = {"Cc", "Cf", "Co", "Zl", "Zp"}


# ---------------------------------------------------------------- writing


def rule_line(**keys: Any) -> str:
    """One rule as an inline table, TOML-escaped, with its keys in a fixed order: a question offers it for pasting.

    No comma follows it; values of None are left out. RulesError if a value has no TOML form.
    """
    known = [name for name in ORDER if keys.get(name) is not None]
    rest = [name for name, value in keys.items() if name not in ORDER and value is not None]
    return "{ " + ", ".join(f"{_key(name)} = {_value(keys[name])}" for name in (*known, *rest)) + " }"


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _string(name)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)  # also inf and nan, as TOML writes them
    if isinstance(value, Mapping):
        table = cast("Mapping[Any, Any]", value)
        return "{" + ", ".join(f"{_key(str(k))} = {_value(v)}" for k, v in table.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_value(item) for item in cast("Sequence[Any]", value)) + "]"
    raise RulesError(f"{escape(repr(value))} cannot be written as TOML")


def _string(text: str) -> str:
    out: list[str] = []
    for char in text:
        if char in _SHORT:
            out.append(_SHORT[char])
        elif unicodedata.category(char) == "Cs":
            raise RulesError(f"{escape(text)!r} holds half a surrogate pair: TOML cannot write it")
        elif unicodedata.category(char) in _HIDDEN:
            out.append(f"\\u{ord(char):04X}" if ord(char) < 0x10000 else f"\\U{ord(char):08X}")
        else:
            out.append(char)
    return '"' + "".join(out) + '"'


# ---------------------------------------------------------------- line numbers

_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*|\n|[\[\]{}=,]|[^\s"\'#\[\]{}=,]+',
    re.DOTALL,
)


def rule_lines(text: str) -> list[int]:
    """The line of every element of the top-level array `rules`, in order, and of every `[[rules]]` header. `text` must
    be valid TOML; elements that are not found are left out."""
    out: list[int] = []
    line, depth = 1, 0
    statement: list[str] = []  # the tokens of the current statement, up to its value
    inside = False  # in the array of `rules`
    in_table = False  # after a [table] header
    for found in _TOKEN.finditer(text + "\n"):
        token = found.group()
        if token == "\n":
            if depth == 0:
                in_table = in_table or statement[:1] == ["["]
                if [_bare(t) for t in statement] == ["[", "[", "rules", "]", "]"]:
                    out.append(line)
                statement = []
            line += 1
            continue
        if token[0] == "#":
            continue
        if token in "[{":
            if depth == 0 and token == "[" and not in_table and [_bare(t) for t in statement] == ["rules", "="]:
                inside = True
            elif depth == 1 and inside:
                out.append(line)
        if depth == 0 and (not statement or "=" not in statement):
            statement.append(token)
            if token in "[]":  # a header's brackets hold no value
                continue
        if token in "[{":
            depth += 1
        elif token in "]}":
            depth -= 1
            inside = inside and depth > 0
        elif depth == 1 and inside and token not in ",=":
            out.append(line)  # an element that is no table; the schema refuses it and names its line
        line += token.count("\n")
    return out


def _bare(token: str) -> str:
    return token[1:-1] if len(token) > 1 and token[0] == token[-1] and token[0] in "\"'" else token
