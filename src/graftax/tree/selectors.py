"""Selectors: globs over whole paths, and the paths nearest to a misspelled one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from graftax.errors import PlanError, escape
from graftax.tree.specs import Side


def nearest(path: str, paths: Iterable[str], count: int = 3) -> str:
    """The paths most like `path`, as text for a message."""
    pool = list(paths)
    found = difflib.get_close_matches(path, pool[:5000], n=count, cutoff=0.5)
    tail = re.split(r"[./]", path)[-1]
    found += [p for p in pool if p not in found and tail and re.split(r"[./]", p)[-1] == tail][: count - len(found)]
    return ", ".join(escape(p) for p in found)


@lru_cache(maxsize=4096)
def glob_pattern(pattern: str, separator: str) -> re.Pattern[str]:
    """A glob over whole paths as a regular expression. '*', '?' and '[..]' stay inside a part; '**' spans any number of
    parts, also none."""
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
