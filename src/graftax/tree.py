"""Flat trees of named arrays: paths, specs, checkpoints and selectors. Pure Python: no framework, no NumPy.

A *path* is one string. Flax paths join their parts with '/', a '/' inside a part is `~1` and a '~' is `~0` (as in JSON
pointers). Torch keys are dotted and are taken as torch writes them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from graftax.errors import FormatError, MissingKeyError, PlanError, escape

if TYPE_CHECKING:
    import numpy as np

Side = Literal["torch", "flax"]
SideBy = Literal["kind", "metadata", "names", "stated"]
"""What told a side: the kind of the file or object, a file's metadata, names alone, or the user."""
Key = str | int | tuple[Any, ...]
"""One part of a path as the live tree holds it: text, a list index, or (NNX weight norm) a tuple."""

# name: (bits, kind), names as NumPy and ml_dtypes write them; kind: f float, i int, u unsigned, b bool, c complex
DTYPES: dict[str, tuple[int, str]] = {
    "bool": (8, "b"),
    "int4": (4, "i"), "int8": (8, "i"), "int16": (16, "i"), "int32": (32, "i"), "int64": (64, "i"),
    "uint4": (4, "u"), "uint8": (8, "u"), "uint16": (16, "u"), "uint32": (32, "u"), "uint64": (64, "u"),
    "float16": (16, "f"), "bfloat16": (16, "f"), "float32": (32, "f"), "float64": (64, "f"),
    "float8_e4m3fn": (8, "f"), "float8_e5m2": (8, "f"), "float8_e4m3fnuz": (8, "f"), "float8_e5m2fnuz": (8, "f"),
    "float8_e8m0fnu": (8, "f"), "float6_e2m3fn": (6, "f"), "float6_e3m2fn": (6, "f"), "float4_e2m1fn": (4, "f"),
    "complex64": (64, "c"), "complex128": (128, "c"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a leaf without reading it: its shape and its dtype's name."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise FormatError(f"unknown dtype {escape(self.dtype)!r}; known: {', '.join(DTYPES)}")

    @property
    def bits(self) -> int:
        """Bits of one element; 4 and 6 for the packed types."""
        return DTYPES[self.dtype][0]

    @property
    def kind(self) -> str:
        """f, i, u, b or c."""
        return DTYPES[self.dtype][1]

    @property
    def floating(self) -> bool:
        return self.kind == "f"

    @property
    def packed(self) -> bool:
        """Stored several to a byte: such a tensor travels as its bytes (a flat uint8 array) and only under identity."""
        return self.bits < 8

    @property
    def size(self) -> int:
        out = 1
        for extent in self.shape:
            out *= extent
        return out

    @property
    def nbytes(self) -> int:
        """Bytes on disk, counted in bits: two 4-bit codes share one."""
        return (self.size * self.bits + 7) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


# ---------------------------------------------------------------- paths


@lru_cache(maxsize=65536)
def escape_part(part: Key) -> str:
    """A part as text inside a Flax path: '~' is `~0`, '/' is `~1`; a tuple's items are joined by '/' first."""
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
    """The words of a name without its numbers, cut at signs and capitals, and cut at signs alone: `RoPE_0` is ro, pe
    and rope. A name says only what one of its whole words says: `post_norm` does not hold `pos`."""
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
    """Nested dicts from Flax paths. `keys` maps a path prefix to its last key, where that is not text:
    `{"blocks/0": 0}`."""
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


# ---------------------------------------------------------------- checkpoints


@dataclass(frozen=True, slots=True)
class Module:
    """A live module: evidence of the highest rank.

    kind      its class name
    bases     the qualified names along the method resolution order
    leaves    role ('weight', 'kernel', 'query/kernel') -> the full path of the leaf
    calls     what its call runs: functions set on this one module, then those of `bases` that define the call, the one
              that runs first
    own_math  that one overrides another and does not hand its weights on to the base's call or function
    """

    path: str
    kind: str
    bases: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    leaves: Mapping[str, str] = field(default_factory=dict[str, str])
    calls: tuple[str, ...] = ()
    own_math: bool = False


Axes = tuple[tuple[str, int | None], ...]
"""The axes of a map, outermost first: c is its channels, d h w are spatial; the length where it is known."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a traced call of a live model shows.

    order    module path -> its place in the order of first calls
    columns  matrix -> the axes of the flattened map that it takes; one axis (c, or x for what a matrix made) for no map
    rows     matrix -> the axes of the map that its outputs are unflattened to; vector -> those that it is applied to
    """

    order: Mapping[str, int] = field(default_factory=dict[str, int])
    columns: Mapping[str, Axes] = field(default_factory=dict[str, Axes])
    rows: Mapping[str, Axes] = field(default_factory=dict[str, Axes])


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint(Mapping[str, TensorSpec]):
    """A file, folder or live tree of named arrays: a mapping from path to spec, and `read(path)` for the values.

    side      "torch" or "flax"; None where nothing tells
    side_by   what told it (`sides`): where that was names alone it is an assumption
    reader    path -> array (NumPy; ml_dtypes for bf16 and f8; packed types as their bytes), or None: no values
    span      (path, start, buffer): fills the buffer from byte `start` of a tensor's values (C order, little end
              first), where they can be read by position
    whole     paths that `span` cannot read: packed, compressed or lying otherwise in their file
    scatter   (path, start, buffers): as span, several buffers in a row, where that is one call; gives their bytes
    modules   module path -> Module, where the source is live
    aliases   path -> the path it shares storage with, where the source is live
    config    config.json beside the checkpoint
    folder    the model folder that was opened, where other files of the model stand beside its weights
    real_keys path prefix -> its last key, where that is not text (`blocks/0` -> 0)
    containers path prefix -> "list", "tuple" or "FrozenDict", where a container is not a plain dict
    trace     () -> Trace, where the source is live and can be called without data; nothing is computed
    buffers   paths that are buffers and not parameters, where the source is live
    rebuild   {path: array} -> an object of the same kind, where the source is live; sharding= and (NNX) rngs= say more
    stored    path -> the name in the file, where the paths are not those of the file
    left      name -> what it is, of what stands beside the weights and was left out
    chosen    whether training state was looked for: what is in the tree counts as weights
    placed    () -> path -> what the tree says of where a leaf lies (adapters.notes.Note), where it is a Flax tree
    """

    label: str
    side: Side | None
    specs: Mapping[str, TensorSpec]
    reader: Callable[[str], np.ndarray[Any, Any]] | None = None
    format: str = "live"
    files: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    modules: Mapping[str, Module] = field(default_factory=dict[str, Module])
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    buffers: frozenset[str] = frozenset()
    config: Mapping[str, Any] | None = None
    real_keys: Mapping[str, Key] = field(default_factory=dict[str, Key])
    containers: Mapping[str, str] = field(default_factory=dict[str, str])
    native: Any = None
    trace: Callable[[], Trace] | None = None
    rebuild: Callable[..., Any] | None = None
    span: Callable[[str, int, memoryview], None] | None = None
    whole: frozenset[str] = frozenset()
    scatter: Callable[[str, int, list[memoryview]], int] | None = None
    placed: Callable[[], Mapping[str, Any]] | None = None
    folder: Path | None = None
    side_by: SideBy = "kind"
    stored: Mapping[str, str] = field(default_factory=dict[str, str])
    left: Mapping[str, str] = field(default_factory=dict[str, str])
    chosen: bool = False

    def __getitem__(self, path: str) -> TensorSpec:
        if path in self.specs:
            return self.specs[path]
        raise self._missing(path)

    def __contains__(self, path: object) -> bool:
        return path in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def read(self, path: str) -> np.ndarray[Any, Any]:
        """The values of one leaf."""
        if path not in self.specs:
            raise self._missing(path)
        if self.reader is None:
            raise PlanError(f"{escape(self.label)} has names, shapes and dtypes, but no values")
        return self.reader(path)

    def get(self, path: str, default: Any = None) -> Any:
        """The spec of one leaf, or `default`: nobody asks what is near."""
        return self.specs.get(path, default)

    def _missing(self, path: object) -> MissingKeyError:
        near = nearest(str(path), self.specs)
        return MissingKeyError(f"{escape(self.label)} has no {escape(path)!r}", next=f"Near: {near}" if near else "")

    @property
    def has_values(self) -> bool:
        return self.reader is not None

    def by_position(self, path: str) -> bool:
        """Can `span` read this leaf?"""
        return self.span is not None and path not in self.whole

    def __repr__(self) -> str:
        return f"Checkpoint({self.label!r}, side={self.side}, {len(self.specs)} leaves)"


# ---------------------------------------------------------------- selectors


def nearest(path: str, paths: Iterable[str], count: int = 3) -> str:
    """The paths most like `path`, as text for a message."""
    pool = list(paths)
    found = difflib.get_close_matches(path, pool[:5000], n=count, cutoff=0.5)
    tail = re.split(r"[./]", path)[-1]
    found += [p for p in pool if p not in found and tail and re.split(r"[./]", p)[-1] == tail][: count - len(found)]
    return ", ".join(escape(p) for p in found)


@lru_cache(maxsize=4096)
def glob_pattern(pattern: str, separator: str) -> re.Pattern[str]:
    """A glob over whole paths as a regular expression: '*', '?', '[..]' stay in a part, '**' spans parts, also none."""
    sep = re.escape(separator)
    inner = f"[^{sep}]"
    out: list[str] = []
    parts = pattern.split(separator)
    for i, part in enumerate(parts):
        last = i + 1 == len(parts)
        if part == "**":
            # A closing '**' is any tail with the separator before it; elsewhere it swallows the separator behind it.
            tail = ".*" if i == 0 else f"(?:{sep}.+)?"
            out.append(tail if last else f"(?:{inner}+{sep})*")
            continue
        out.append(_glob_part(part, inner))
        if not last and not (i + 2 == len(parts) and parts[-1] == "**"):
            out.append(sep)
    return re.compile("".join(out), re.DOTALL)


def _glob_part(part: str, inner: str) -> str:
    out = ""
    i = 0
    while i < len(part):
        char = part[i]
        i += 1
        if char == "*":
            out += f"{inner}*"
        elif char == "?":
            out += inner
        elif char == "[" and (end := part.find("]", i + 1)) > 0:
            body = part[i:end]
            negated = body.startswith("!")
            body = re.escape(body[1:] if negated else body).replace(r"\-", "-")
            out += f"[{'^' if negated else ''}{body}]"
            i = end + 1
        else:
            out += re.escape(char)
    return out


def is_glob(pattern: str) -> bool:
    return any(char in pattern for char in "*?[")


def match_paths(paths: Sequence[str], pattern: str, side: Side) -> list[str]:
    """The paths a selector picks, in the tree's order. An exact path wins over a glob; the collection may be omitted
    when only `params` matches. Nothing found is an empty list: the caller says what is near.

    Raises PlanError where the collection was omitted and others than `params` match too.
    """
    found = _match_whole(paths, pattern, side)
    if found or side == "torch":
        return found
    collections = dict.fromkeys(path.partition("/")[0] for path in paths)
    if "params" not in collections:
        return []
    hits = {name: hit for name in collections if (hit := _match_whole(paths, f"{name}/{pattern}", side))}
    if len(hits) > 1:
        raise PlanError(
            f"{escape(pattern)!r} matches in {len(hits)} collections",
            next="Write one of: " + ", ".join(f"{escape(name)}/{escape(pattern)}" for name in hits),
        )
    return hits.get("params", [])


def _match_whole(paths: Sequence[str], pattern: str, side: Side) -> list[str]:
    if pattern in paths:
        return [pattern]
    if not is_glob(pattern):
        return []
    regex = glob_pattern(pattern, "/" if side == "flax" else ".")
    return [path for path in paths if regex.fullmatch(path)]


def subtree(paths: Iterable[str], prefix: str, side: Side) -> list[str]:
    """The paths below `prefix`."""
    start = prefix.rstrip("/.") + ("/" if side == "flax" else ".")
    return [path for path in paths if path.startswith(start)]
