"""What flat names cannot express about a tree, as JSON and back: keys that are not text, and containers other than
dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from graftax.errors import FormatError, escape
from graftax.tree import Key, escape_part

CONTAINERS = frozenset({"list", "tuple", "FrozenDict"})


def encode_key(key: Key) -> Any:
    """A key as JSON: text and integers as they are, a tuple as a list."""
    if isinstance(key, tuple):
        return [encode_key(item) for item in key]
    if isinstance(key, str) or type(key) is int:
        return key
    raise FormatError(f"a file cannot hold the key {escape(repr(key))}: expected text, an integer or a tuple of these")


def _decode_key(value: Any, label: str, depth: int = 0) -> Key:
    if isinstance(value, list) and depth < 8:
        return tuple(_decode_key(item, label, depth + 1) for item in value)  # pyright: ignore
    if isinstance(value, str) or type(value) is int:
        return value
    raise FormatError(f"{label}: {escape(repr(value))} is not a key (text, an integer or a list of these)")


def encode_tree(real_keys: Mapping[str, Key], containers: Mapping[str, str]) -> dict[str, Any]:
    """`keys` and `containers` as JSON values, in the order of their paths."""
    return {
        "containers": {path: containers[path] for path in sorted(containers)},
        "keys": {path: encode_key(real_keys[path]) for path in sorted(real_keys)},
    }


def decode_tree(value: Any, label: str) -> tuple[dict[str, Key], dict[str, str]]:
    """(real_keys, containers) from the output of `encode_tree`. FormatError for anything else."""
    if not isinstance(value, dict):
        raise FormatError(f"{label}: expected a JSON object")
    keys: Any = value.get("keys", {})  # pyright: ignore
    containers: Any = value.get("containers", {})  # pyright: ignore
    if not isinstance(keys, dict) or not isinstance(containers, dict):
        raise FormatError(f"{label}: `keys` and `containers` must be JSON objects")
    real_keys: dict[str, Key] = {path: _decode_key(key, label) for path, key in keys.items()}  # pyright: ignore
    for path, key in real_keys.items():
        if path.rpartition("/")[2] != escape_part(key):
            raise FormatError(f"{label}: {escape(path)!r} cannot end in the key {escape(repr(key))}")
    for path, kind in containers.items():  # pyright: ignore
        if not isinstance(kind, str) or kind not in CONTAINERS:
            raise FormatError(
                f"{label}: {escape(path)!r} is {escape(kind)!r}, expected {', '.join(sorted(CONTAINERS))}"
            )
    return real_keys, containers  # pyright: ignore


def below(prefixes: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """The items of `prefixes` that are a path or a prefix of one: the part of a whole tree's items that one shard
    needs."""
    if not prefixes:
        return {}
    used: set[str] = {""}
    for path in paths:
        while path and path not in used:
            used.add(path)
            path = path.rpartition("/")[0]
    return {prefix: value for prefix, value in prefixes.items() if prefix in used}
