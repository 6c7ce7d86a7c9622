"""Selectors: globs over whole paths, and the paths nearest to a misspelled one.

In a glob '*', '?' and '[..]' stay inside a part, '**' spans any number of parts, also none, and `{a,b}` is either.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from graftax.errors import PlanError, UsageError, escape
from graftax.tree.specs import Side


def nearest(path: str, paths: Iterable[str], count: int = 3) -> str:
    """The paths most like `path`, as text for a message."""
    pool = list(paths)
    found = difflib.get_close_matches(path, pool[:5000], n=count, cutoff=0.5)
    tail = re.split(r"[./]", path)[-1]
    found += [p for p in pool if p not in found and tail and re.split(r"[./]", p)[-1] == tail][: count - len(found)]
    return ", ".join(escape(p) for p in found)


_ALTERNATIVES = 1000
"""The patterns without braces that one pattern may stand for, and the braces in one pattern."""


@lru_cache(maxsize=4096)
def glob_pattern(pattern: str, separator: str) -> re.Pattern[str]:
    """A glob over whole paths as a regular expression. UsageError for a brace that is not closed."""
    return re.compile("|".join(_without_braces(each, separator) for each in expand_braces(pattern)), re.DOTALL)


def expand_braces(pattern: str) -> list[str]:
    """The patterns without braces that `pattern` stands for: `{a,b}/c` is a/c and b/c. Braces nest, and may hold '/',
    '*' or nothing. A group without a comma is literal, and so is a brace in a character class (`[{]`).

    Raises UsageError for a brace that is not closed, and for too many patterns.
    """
    start = _find_open_brace(pattern)
    if start < 0:
        return [pattern]
    if pattern.count("{") > _ALTERNATIVES // 10:
        raise _too_many(pattern)
    pieces, stop = _group(pattern, start)
    inside = [each for piece in pieces for each in expand_braces(piece)]
    if len(pieces) == 1:
        inside = [f"[{{]{each}}}" for each in inside]
    tails = expand_braces(pattern[stop:])
    if len(inside) * len(tails) > _ALTERNATIVES:
        raise _too_many(pattern)
    return [f"{pattern[:start]}{each}{tail}" for each in inside for tail in tails]


def _too_many(pattern: str) -> UsageError:
    return UsageError(f"{escape(pattern)!r} stands for too many patterns", next="Use '*', or a list of selectors.")


def _find_open_brace(pattern: str) -> int:
    """The first '{' that stands in no character class, or -1."""
    i = 0
    while i < len(pattern):
        if pattern[i] == "{":
            return i
        i = _behind(pattern, i)
    return -1


def _behind(pattern: str, i: int) -> int:
    """The position behind the character, or the character class, at `i`."""
    end = pattern.find("]", i + 2) if pattern[i] == "[" else -1
    return (end if end > 0 else i) + 1


def _group(pattern: str, start: int) -> tuple[list[str], int]:
    """(the alternatives of the group that opens at `start`, the position behind it)."""
    pieces: list[str] = []
    depth, begin, i = 0, start + 1, start
    while i < len(pattern):
        char = pattern[i]
        depth += (char == "{") - (char == "}")
        if depth == 0 or (char == "," and depth == 1):
            pieces.append(pattern[begin:i])
            begin = i + 1
        if depth == 0:
            return pieces, i + 1
        i = _behind(pattern, i)
    raise UsageError(
        f"{escape(pattern)!r} has a brace that is not closed",
        next="Write {a,b}; a brace that belongs to a name is [{].",
    )


def _without_braces(pattern: str, separator: str) -> str:
    sep = re.escape(separator)
    inner = f"[^{sep}]"
    out: list[str] = []
    parts = pattern.split(separator)
    for i, part in enumerate(parts):
        last = i + 1 == len(parts)
        if part == "**":
            # A closing '**' also matches the separator before it; elsewhere '**' also matches the separator after it.
            tail = ".*" if i == 0 else f"(?:{sep}.+)?"
            out.append(tail if last else f"(?:{inner}+{sep})*")
            continue
        out.append(_glob_part(part, inner))
        if not last and not (i + 2 == len(parts) and parts[-1] == "**"):
            out.append(sep)
    return "".join(out)


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
            out += _character_class(part[i:end], inner)
            i = end + 1
        else:
            out += re.escape(char)
    return out


def _character_class(body: str, inner: str) -> str:
    """One character of a part. A range that runs backwards is empty, as in fnmatch."""
    negated = body.startswith("!")
    body = body[negated:]
    out = ""
    i = 0
    while i < len(body):
        first, last = body[i], body[i]
        if body[i + 1 : i + 2] == "-" and i + 2 < len(body):
            last = body[i + 2]
            i += 2
        i += 1
        out += f"{re.escape(first)}-{re.escape(last)}" if first <= last else ""
    if not out:
        return inner if negated else "(?!)"
    return f"(?={inner})[{'^' if negated else ''}{out}]"


def is_glob(pattern: str) -> bool:
    return any(char in pattern for char in "*?[{")


def match_paths(paths: Sequence[str], pattern: str, side: Side) -> list[str]:
    """The paths that a selector picks, in the tree's order. An exact path wins over a glob. The collection may be
    omitted if only `params` matches. No match gives an empty list: the caller names the nearest paths.

    Raises PlanError if the collection was omitted and collections other than `params` match too.
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
