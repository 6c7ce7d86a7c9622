"""Key templates: `layers.{4*c+1}.mlp.fc1.weight` matches whole keys and writes them.

    {i}          one whole number, written without leading zeros
    {a*i+b}      a number that is a*i+b for some i >= 0 (also i+b, i-b, a*i, a*i-b)
    {a*i+j+b}    a number that is a*i+j+b for some i >= 0 and 0 <= j < a: items numbered through groups of a
    *            any text inside one part; ** any number of whole parts, also none
    {{ }} {*}    a literal brace, a literal star

The k-th wildcard of one side corresponds to the k-th of the other. No regular expression comes from the user: literals
are escaped, a part holds at most one wildcard, and two numbers never touch, so that matching cannot hang.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise, takewhile

from graftax.errors import RulesError, escape
from graftax.tree import Side, escape_part, unescape_part

_ARITHMETIC = re.compile(
    r"\s*(?:(?P<a>\d{1,6})\s*\*\s*)?(?P<name>[A-Za-z_]\w{0,31})(?:\s*\*\s*(?P<a2>\d{1,6}))?"
    r"(?:\s*\+\s*(?P<minor>[A-Za-z_]\w{0,31}))?(?:\s*(?P<sign>[+-])\s*(?P<b>\d{1,6}))?\s*",
    re.ASCII,
)
_TOKEN = re.compile(r"\{\{|\}\}|\{\*\}|\{[^{}]*\}|\{|\}|\*+", re.ASCII)
_NUMBER = r"(0|[1-9][0-9]{0,8})"
_DIGITS = re.compile(r"[0-9]+")
SEPARATOR: Mapping[str, str] = {"torch": ".", "flax": "/"}
_EVERY: Mapping[str, Sequence[int]] = {}


@dataclass(frozen=True, slots=True)
class Index:
    """The number `factor * name + offset`, or `factor * name + minor + offset` with 0 <= minor < factor."""

    name: str
    factor: int = 1
    offset: int = 0
    minor: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.minor) if self.minor else (self.name,)


@dataclass(frozen=True, slots=True)
class Wild:
    """Any text inside a part; `deep`: any number of whole parts."""

    deep: bool = False


TemplatePiece = str | Index | Wild
Wilds = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Binding:
    """The values that one key gives: a number for each index (in the template's order), raw parts for each wildcard."""

    numbers: Mapping[str, int]
    wilds: Wilds


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled template. `names`: its indices in order of first appearance; `wilds`: its wildcards, True if deep;
    `shape`: its text with every run of digits and indices replaced by one 0; `start`: its text before the first index
    or wildcard; `loose` matches whatever differs from its keys in numbers only."""

    text: str
    side: Side
    pieces: tuple[TemplatePiece, ...]
    names: tuple[str, ...]
    wilds: tuple[bool, ...]
    shape: str
    start: str
    regex: re.Pattern[str]
    loose: re.Pattern[str]

    def match(self, key: str) -> Binding | None:
        """The binding with which this template renders `key`, or None."""
        found = self.regex.fullmatch(key)
        if found is None:
            return None
        numbers: dict[str, int] = {}
        wilds: list[tuple[str, ...]] = []
        groups = iter(found.groups())
        for piece in self.pieces:
            if isinstance(piece, Index):
                number, rest = divmod(int(next(groups)) - piece.offset, piece.factor)
                if number < 0 or numbers.setdefault(piece.name, number) != number:
                    return None
                if numbers.setdefault(piece.minor, rest) != rest if piece.minor else rest:
                    return None
            elif isinstance(piece, Wild):
                wilds.append(self._raw(next(groups), piece.deep))
        return Binding(numbers, tuple(wilds))

    def _raw(self, text: str | None, deep: bool) -> tuple[str, ...]:
        if not text:
            return () if deep else ("",)
        parts = text.split(SEPARATOR[self.side]) if deep else [text]
        return tuple(unescape_part(part) if self.side == "flax" and "~" in part else part for part in parts)

    def render(self, numbers: Mapping[str, int], wilds: Wilds) -> str | None:
        """The key of a binding; None if a number would be negative, or a minor index would exceed its group."""
        out: list[str] = []
        texts = iter(wilds)
        separator = SEPARATOR[self.side]
        swallow = False
        for piece in self.pieces:
            if isinstance(piece, Index):
                minor = numbers[piece.minor] if piece.minor else 0
                number = piece.factor * numbers[piece.name] + minor + piece.offset
                if number < 0 or minor >= piece.factor:
                    return None
                out.append(str(number))
            elif isinstance(piece, Wild):
                parts = next(texts)
                if parts:
                    out.append(separator.join(escape_part(p) if self.side == "flax" else p for p in parts))
                elif out and out[-1].endswith(separator):  # `**` is empty, so one separator goes with it
                    out[-1] = out[-1][: -len(separator)]
                else:
                    swallow = True
            else:
                out.append(piece[len(separator) :] if swallow and piece.startswith(separator) else piece)
                swallow = False
        return "".join(out)

    def with_prefix(self, prefix: str) -> Template:
        """The template with a literal prefix (a collection that the rule leaves out)."""
        return _compiled(prefix + self.text, self.side, _joined((prefix, *self.pieces)))


def index_names(templates: Iterable[Template]) -> tuple[str, ...]:
    """The indices of templates, in order of first appearance."""
    return tuple(dict.fromkeys(name for template in templates for name in template.names))


def escape_key(key: str) -> str:
    """A key as a literal template."""
    return key.replace("{", "{{").replace("}", "}}").replace("*", "{*}")


@lru_cache(maxsize=8192)
def parse_template(text: str, side: Side) -> Template:
    """The template written as `text`. RulesError if it is not one."""
    if not text:
        raise RulesError("an empty template")
    pieces: list[TemplatePiece] = []
    start = 0
    for token in _TOKEN.finditer(text):
        pieces.append(text[start : token.start()])
        pieces.append(_token(token.group(), text))
        start = token.end()
    pieces.append(text[start:])
    return _compiled(text, side, _joined(pieces))


def _token(token: str, text: str) -> TemplatePiece:
    if token in ("{{", "}}"):
        return token[0]
    if token == "{*}":
        return "*"
    if token[0] == "*":
        if len(token) > 2:
            raise RulesError(f"{escape(text)!r}: {token} is neither * nor **")
        return Wild(deep=len(token) == 2)
    found = _ARITHMETIC.fullmatch(token[1:-1]) if len(token) > 2 else None
    if found is None:
        hint = "" if len(token) > 1 else " (a literal brace is written twice: {{)"
        raise RulesError(f"{escape(text)!r}: {escape(token)} is not an index such as {{i}} or {{4*i+1}}{hint}")
    if found["a"] and found["a2"]:
        raise RulesError(f"{escape(text)!r}: {escape(token)} has two factors")
    factor = int(found["a"] or found["a2"] or 1)
    if factor == 0:
        raise RulesError(f"{escape(text)!r}: {escape(token)} has factor 0")
    minor = found["minor"] or ""
    if minor and (factor < 2 or minor == found["name"]):
        raise RulesError(f"{escape(text)!r}: {escape(token)} does not tell its two indices apart; write {{4*i+j}}")
    return Index(found["name"], factor, int(found["b"] or 0) * (-1 if found["sign"] == "-" else 1), minor)


def _joined(pieces: Iterable[TemplatePiece]) -> tuple[TemplatePiece, ...]:
    """The pieces with neighbouring literals joined and empty ones removed."""
    out: list[TemplatePiece] = []
    for piece in pieces:
        if isinstance(piece, str) and out and isinstance(out[-1], str):
            out[-1] += piece
        elif piece != "":
            out.append(piece)
    return tuple(out)


def _compiled(text: str, side: Side, pieces: tuple[TemplatePiece, ...]) -> Template:
    separator = SEPARATOR[side]
    sep = re.escape(separator)
    parts: list[list[TemplatePiece]] = [[]]
    for piece in pieces:
        first, *rest = piece.split(separator) if isinstance(piece, str) else [piece]
        parts[-1] += [first] if first else []
        parts += [[text] if text else [] for text in rest]
    for part in parts:
        marks = [n for n, piece in enumerate(part) if not isinstance(piece, str)]
        wild = next((piece for piece in part if isinstance(piece, Wild)), None)
        if wild is not None and len(marks) > 1:
            raise RulesError(f"{escape(text)!r}: a part holds one wildcard, and no index beside it")
        if wild is not None and wild.deep and len(part) > 1:
            raise RulesError(f"{escape(text)!r}: ** stands for whole parts; write {separator}**{separator}")
        for one, other in pairwise(marks):
            between, index = "".join(map(str, part[one + 1 : other])), part[other]
            if isinstance(index, Index) and (not between or between.isdigit()):
                raise RulesError(f"{escape(text)!r}: where {{{index.name}}} begins is ambiguous; put text between")
    if sum(isinstance(piece, Wild) and piece.deep for piece in pieces) > 1:
        raise RulesError(f"{escape(text)!r}: a template may hold ** only once")
    names = tuple(dict.fromkeys(name for piece in pieces if isinstance(piece, Index) for name in piece.names))
    wilds = tuple(piece.deep for piece in pieces if isinstance(piece, Wild))
    shape = _DIGITS.sub("0", "".join("0" if isinstance(p, Index) else p if isinstance(p, str) else "" for p in pieces))
    start = pieces[0] if isinstance(pieces[0], str) else ""
    loose = re.sub("[0-9]+", "[0-9]*", _pattern(["0" if isinstance(p, Index) else p for p in pieces], sep))
    patterns = re.compile(_pattern(pieces, sep), re.DOTALL), re.compile(loose, re.DOTALL)
    return Template(text, side, pieces, names, wilds, shape, start, *patterns)


def _pattern(pieces: Sequence[TemplatePiece], sep: str) -> str:
    out: list[str] = []
    deep_at: int | None = None
    for piece in pieces:
        if isinstance(piece, str):
            out.append(re.escape(piece))
        elif isinstance(piece, Index):
            out.append(_NUMBER)
        elif piece.deep:
            deep_at = len(out)
        else:
            out.append(f"([^{sep}]*)")
    if deep_at is None:
        return "".join(out)
    before, after = "".join(out[:deep_at]), "".join(out[deep_at:])
    if after:
        return f"{before}(?:(.+){sep})?{after[len(sep) :]}"
    return f"{before[: -len(sep)]}(?:{sep}(.+))?" if before else "(.*)"


class KeyIndex:
    """The keys of one end, indexed for many templates. A bucket holds keys that differ only in their numbers, sorted. A
    template looks only at its own bucket; a template with wildcards first looks at one key per bucket."""

    __slots__ = ("buckets", "collections", "order")

    def __init__(self, keys: Iterable[str]) -> None:
        self.order: dict[str, int] = {key: place for place, key in enumerate(keys)}
        self.buckets: dict[str, list[str]] = {}
        for key in sorted(self.order):
            self.buckets.setdefault(_DIGITS.sub("0", key), []).append(key)
        self.collections = tuple(dict.fromkeys(shape.partition("/")[0] for shape in self.buckets if "/" in shape))

    def find(self, template: Template, ranges: Mapping[str, Sequence[int]] = _EVERY) -> Iterator[tuple[str, Binding]]:
        """(key, binding) of every key the template matches with numbers in their ranges, in the order of the keys."""
        if template.wilds:
            buckets = [keys for keys in self.buckets.values() if template.loose.fullmatch(keys[0])]
        else:
            keys = self.buckets.get(template.shape, [])
            first = bisect_left(keys, template.start)
            buckets = [list(takewhile(lambda key: key.startswith(template.start), islice(keys, first, None)))]
        for key in sorted((key for keys in buckets for key in keys), key=self.order.__getitem__):
            binding = template.match(key)
            if binding is not None and all(n in ranges[name] for name, n in binding.numbers.items() if name in ranges):
                yield key, binding
