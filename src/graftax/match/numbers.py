"""Decide which digits of a path are a number, and which are part of a word."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

NUMBER = re.compile(r"(?<!\d)\d{1,18}(?![A-Za-z\d])", re.ASCII)
"""A number of a path. Digits before a letter are part of a word, and so is a run that is too long for a count."""
CALL = re.compile(r"[A-Z][A-Za-z0-9]*_\d+")
"""An automatic name, such as `Dense_0`: its number counts calls."""
CUT = re.compile(rf"({NUMBER.pattern})", re.ASCII)


def automatic(path: str) -> list[bool]:
    """For each part of a path: whether it is an automatic name."""
    return [bool(CALL.fullmatch(part)) for part in re.split(r"[./]", path)]


_PADDED = re.compile(r"(?<!\d)0\d", re.ASCII)


def twice_numbered(paths: Iterable[str]) -> set[str]:
    """Paths with a zero before a number (`l.01`), if the same path without the zero (`l.1`) exists: then the digits are
    a word, because two modules cannot have one number."""
    paths = list(paths)
    if not _PADDED.search("\n".join(paths)):
        return set()
    seen: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
    padded: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for path in paths:
        for found in NUMBER.finditer(path):
            mark = (path[: found.start()], int(found[0]))
            seen[mark].add(found[0])
            if _PADDED.match(found[0]):
                padded[mark].append(path)
    return {path for mark, some in padded.items() if len(seen[mark]) > 1 for path in some}
