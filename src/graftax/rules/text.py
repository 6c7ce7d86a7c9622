"""Rules as TOML text: the line of each rule, and rules written for pasting."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, cast

from graftax.errors import RulesError, escape
from graftax.rules.schema import KEYS

_BARE = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_HIDDEN = {"Cc", "Cf", "Co", "Zl", "Zp"}


# ---------------------------------------------------------------- writing


def rule_line(**keys: Any) -> str:
    """One rule as an inline table, TOML-escaped, with its keys in a fixed order: a question offers it for pasting.

    No comma follows it; values of None are left out. RulesError if a value has no TOML form.
    """
    known = [name for name in KEYS if keys.get(name) is not None]
    rest = [name for name, value in keys.items() if name not in KEYS and value is not None]
    return "{ " + ", ".join(f"{_key(name)} = {_value(keys[name])}" for name in (*known, *rest)) + " }"


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _string(name)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, (bool, int, float)):
        return repr(value).lower()  # true and false, inf and nan, as TOML writes them
    if isinstance(value, Mapping):
        table = cast("Mapping[Any, Any]", value)
        return "{" + ", ".join(f"{_key(str(k))} = {_value(v)}" for k, v in table.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_value(item) for item in cast("Sequence[Any]", value)) + "]"
    raise RulesError(f"{escape(repr(value))} cannot be written as TOML")


def _string(text: str) -> str:
    if any(unicodedata.category(char) == "Cs" for char in text):
        raise RulesError(f"{escape(text)!r} holds half a surrogate pair: TOML cannot write it")
    return "".join(map(_visible, json.dumps(text, ensure_ascii=False)))


def _visible(char: str) -> str:
    if unicodedata.category(char) not in _HIDDEN:
        return char
    return f"\\u{ord(char):04X}" if ord(char) < 0x10000 else f"\\U{ord(char):08X}"


# ---------------------------------------------------------------- line numbers

_QUOTED = re.compile(r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*', re.DOTALL)
_STRUCTURE = re.compile(r"[\[\]{}\n]|[^\s\[\]{},=]+")


def rule_lines(text: str) -> list[int]:
    """The line of every element of the array `rules`, in order, or of every `[[rules]]` header. `text` must be valid
    TOML that holds nothing else."""
    plain = _QUOTED.sub(lambda found: "x" * (found[0][0] != "#") + "\n" * found[0].count("\n"), text)
    headers = [n for n, row in enumerate(plain.split("\n"), 1) if row.lstrip().startswith("[[")]
    if headers:
        return headers
    out: list[int] = []
    line, depth = 1, 0
    for token in _STRUCTURE.findall(plain):
        line += token == "\n"
        if token in "]}":
            depth -= 1
        elif depth == 1 and token != "\n":  # also an element that is no table: the schema refuses it
            out.append(line)
        depth += token in "[{"
    return out
