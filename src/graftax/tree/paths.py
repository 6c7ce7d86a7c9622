"""Paths: one string for each leaf, its parts, and its words.

A Flax path joins its parts with '/'. Inside a part a '/' is `~1` and a '~' is `~0`, as in JSON pointers. Torch keys are
dotted and stay as torch writes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, cast

from graftax.errors import FormatError, escape
from graftax.tree.specs import Key, Side


@lru_cache(maxsize=65536)
def escape_part(part: Key) -> str:
    """A part as text inside a Flax path: '~' becomes `~0`, '/' becomes `~1`. The items of a tuple are first joined by
    '/'."""
    text = "/".join(map(str, part)) if isinstance(part, tuple) else str(part)
    return text.replace("~", "~0").replace("/", "~1")


def unescape_part(text: str) -> str:
    return text.replace("~1", "/").replace("~0", "~") if "~" in text else text


_WORDS = re.compile(r"\0|[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z0-9]+|[^\W_\0A-Za-z0-9]+")
_DIGITS = re.compile(r"[0-9]+")
_LETTERS = re.compile(r"[^\W_]+")


@lru_cache(maxsize=65536)
def split_words(part: str) -> tuple[str, ...]:
    """`DenseReluDense` -> dense, relu, dense; `conv_0` -> conv, 0. A NUL, which stands for a number, is a word."""
    found = _WORDS.findall(part)
    return tuple(word if word == "\0" else word.lower() for word in found) or (part.lower() or "_",)


@lru_cache(maxsize=65536)
def whole_words(name: str) -> frozenset[str]:
    """The words of a name without its numbers, split in two ways: at signs and capitals, and at signs alone. `RoPE_0`
    gives ro, pe and rope. Only whole words count: `post_norm` does not contain `pos`."""
    plain = _DIGITS.sub(" ", name)
    return frozenset(split_words(plain)) | frozenset(_LETTERS.findall(plain.lower()))


def join_path(parts: Iterable[Key]) -> str:
    """A Flax path from the keys of a nested tree."""
    return "/".join(escape_part(part) for part in parts)


def split_path(path: str, side: Side) -> tuple[str, ...]:
    """The parts of a path: at '/' and unescaped on the Flax side, at '.' on the torch side."""
    if side == "torch":
        return tuple(path.split("."))
    return tuple(map(unescape_part, path.split("/")))


def flatten(tree: Any, prefix: tuple[Key, ...] = ()) -> Iterator[tuple[tuple[Key, ...], Any]]:
    """(keys, leaf) of nested mappings, lists and tuples, in the tree's own order. Depth is limited to 64."""
    if len(prefix) > 64:
        raise FormatError(f"nested deeper than 64 levels at {escape(join_path(prefix))}")
    if isinstance(tree, Mapping):
        for key, value in tree.items():  # pyright: ignore[reportUnknownVariableType]
            yield from flatten(value, (*prefix, key))  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(tree, (list, tuple)) and not hasattr(tree, "shape"):  # pyright: ignore[reportUnknownArgumentType]
        for index, value in enumerate(tree):  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]
            yield from flatten(value, (*prefix, index))
    else:
        yield prefix, tree


def nest(flat: Mapping[str, Any], keys: Mapping[str, Key] | None = None) -> dict[Key, Any]:
    """Nested dicts from Flax paths. `keys` maps a path prefix to its last key if that key is not text: `{"blocks/0":
    0}`."""
    out: dict[Key, Any] = {}
    known = keys or {}
    for path, leaf in flat.items():
        node: dict[Key, Any] = out
        prefix = ""
        pieces = path.split("/")
        for i, piece in enumerate(pieces):
            prefix = piece if i == 0 else f"{prefix}/{piece}"
            key = known.get(prefix, unescape_part(piece))
            if i + 1 == len(pieces):
                if key in node:
                    raise FormatError(f"{escape(path)} is both a leaf and a subtree")
                node[key] = leaf
            else:
                child = node.setdefault(key, {})
                if type(child) is not dict:
                    raise FormatError(f"{escape(prefix)} is both a leaf and a subtree")
                node = cast("dict[Key, Any]", child)
    return out


_NUMBER = re.compile(r"([0-9]{1,18})")


def natural_key(path: str) -> tuple[int | str, ...]:
    """Sort key in which layers.2 comes before layers.10."""
    parts: list[int | str] = list(_NUMBER.split(path))  # text and numbers in turn
    parts[1::2] = map(int, parts[1::2])
    return tuple(parts)
