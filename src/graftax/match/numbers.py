"""Which digits of a path are a number, and which are a word."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

NUMBER = re.compile(r"(?<!\d)\d{1,18}(?![A-Za-z\d])", re.ASCII)
"""A number of a path. Digits before a letter are a part of a word, and a run too long to count anything is one."""
CUT = re.compile(rf"({NUMBER.pattern})", re.ASCII)

_PADDED = re.compile(r"(?<!\d)0\d", re.ASCII)


def twice_numbered(paths: Iterable[str]) -> set[str]:
    """Paths with a zero before a number (`l.01`) where the number stands beside it without (`l.1`), too: there it is a
    word, for two modules cannot bear one number."""
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
