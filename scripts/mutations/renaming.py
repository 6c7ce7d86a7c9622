"""Renamings of one side: the same tensors under other names. None where two names would meet, or nothing changes."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from mutations.cases import Arrays
from mutations.words import OTHERS, WORDS

COLLECTIONS = ("params", "batch_stats")


def renamed(arrays: Arrays, rename: Callable[[list[str]], list[str]], separator: str) -> Arrays | None:
    """The same tensors under the names that `rename` makes of their parts."""
    out: Arrays = {}
    for name, array in arrays.items():
        new = separator.join(rename(parts_of(name, separator)))
        if new in out:
            return None
        out[new] = array
    return None if out.keys() == arrays.keys() else out


def parts_of(name: str, separator: str) -> list[str]:
    """The parts of a name; what torch.nn.utils.parametrize puts behind a module is one part with the leaf."""
    module, mark, leaf = name.partition(".parametrizations.")
    return [*module.split(separator), mark[1:] + leaf] if mark else name.split(separator)


def stems(arrays: Arrays, separator: str) -> list[str]:
    """Every path part but the last, numbers left out."""
    found: dict[str, None] = {}
    for name in arrays:
        for part in parts_of(name, separator)[:-1]:
            if not part.isdigit():
                found[part] = None
    return list(found)


def synonyms(arrays: Arrays, separator: str, p: float, rng: random.Random, others: bool = False) -> Arrays | None:
    """Each part that the table knows gets another word with probability p, one word for the whole side. `others`: a
    word of another author's vocabulary. The side as it is where no word moves."""
    table: dict[str, str] = {}
    new: dict[str, str] = {}  # a stem gets one word, whatever number it bears
    for part in stems(arrays, separator):
        match = re.fullmatch(r"(.*?)(_?\d+)?", part)
        assert match
        for candidate, tail in ((part, ""), (match[1], match[2] or "")):
            rows = [i for i, row in enumerate(WORDS) if candidate in row]
            if rows and candidate not in new:
                row = rng.choice(rows)
                words: Sequence[str] = OTHERS[row] if others else WORDS[row]
                new[candidate] = rng.choice(words) if rng.random() < p else candidate
            if rows:
                if new[candidate] != candidate:
                    table[part] = new[candidate] + tail
                break
    if len(set(table.values())) != len(table):
        return None
    if not table:
        return arrays
    return renamed(arrays, lambda parts: [table.get(part, part) for part in parts[:-1]] + parts[-1:], separator)


def anonymous(arrays: Arrays, separator: str, p: float, rng: random.Random) -> Arrays | None:
    """Some parts lose their meaning; the two sides do not use the same letters."""
    letters = [f"{a}{b}" for a in ("xyz" if separator == "." else "mnp") for b in "jrtuwcsd"]
    rng.shuffle(letters)
    table: dict[str, str] = {}
    for part in stems(arrays, separator):
        stem = part.rstrip("0123456789_")
        if stem not in table and stem not in (*COLLECTIONS, "batch"):
            table[stem] = letters.pop() if rng.random() < p and letters else stem

    def hide(part: str) -> str:
        stem = part.rstrip("0123456789_")
        return table.get(stem, stem) + part[len(stem) :]

    return renamed(arrays, lambda parts: [hide(part) for part in parts[:-1]] + parts[-1:], separator)


def offset(arrays: Arrays, separator: str, rng: random.Random) -> Arrays | None:
    """Every number that is a part of its own counts from another start."""
    by = rng.randint(1, 3)
    return renamed(arrays, lambda parts: [str(int(p) + by) if p.isdigit() else p for p in parts], separator)


def merged(arrays: Arrays, separator: str, rng: random.Random) -> Arrays | None:
    """Nested numbers counted through: stages.1.layers.0 -> stages.4."""
    dot = re.escape(separator)
    pattern = re.compile(rf"(?<=[a-z]{dot})(\d+){dot}(?:[A-Za-z_]+{dot})?(\d+){dot}")
    found = {name: match for name in arrays if (match := pattern.search(name))}
    seen = sorted({(name[: m.start()], int(m[1]), int(m[2])) for name, m in found.items()})
    if len({(major, minor) for _, major, minor in seen}) < 3:
        return None
    rank: dict[tuple[str, int, int], int] = {}
    for head, major, minor in seen:
        rank[(head, major, minor)] = sum(other[0] == head for other in rank)
    out: Arrays = {}
    for name, array in arrays.items():
        match = found.get(name)
        if match:
            number = rank[(name[: match.start()], int(match[1]), int(match[2]))]
            name = f"{name[: match.start()]}{number}{separator}{name[match.end() :]}"
        if name in out:
            return None
        out[name] = array
    return out


# ---------------------------------------------------------------- nesting


def nested(arrays: Arrays, separator: str, rng: random.Random) -> Arrays | None:
    """A level put around everything (behind the collection)."""
    word = rng.choice(("model", "net", "backbone", "trunk", "wrapped", "m"))

    def around(parts: list[str]) -> list[str]:
        keep = 1 if separator == "/" and parts[0] in COLLECTIONS else 0
        return [*parts[:keep], word, *parts[keep:]]

    return renamed(arrays, around, separator)


def _split(name: str, separator: str) -> tuple[list[str], list[str]]:
    """(the collection, or nothing; the parts behind it)."""
    parts = name.split(separator)
    keep = 1 if separator == "/" and parts[0] in COLLECTIONS else 0
    return parts[:keep], parts[keep:]


def _levels(arrays: Arrays, separator: str) -> list[tuple[str, ...]]:
    """Paths, numbers masked and collections aside, that end in a word and hold several modules."""
    below: defaultdict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    for name in arrays:
        _, parts = _split(name, separator)
        for cut in range(1, len(parts) - 1):
            if not parts[cut - 1].isdigit():
                below[_masked(parts[:cut])].add(_masked(parts[cut:-1]))
    return [path for path, inner in below.items() if len(inner) > 1 and not all(rest[:1] == ("#",) for rest in inner)]


def _masked(parts: Sequence[str]) -> tuple[str, ...]:
    return tuple("#" if part.isdigit() else part for part in parts)


def _at_level(
    arrays: Arrays, separator: str, level: tuple[str, ...], change: Callable[[list[str], int], list[str]]
) -> Arrays | None:
    """The side with `change` (parts, length of the level) made of every name below the level."""
    out: Arrays = {}
    n = len(level)
    for name, array in arrays.items():
        head, parts = _split(name, separator)
        if _masked(parts[:n]) == level and len(parts) > n + 1 and not parts[n].isdigit():
            parts = change(parts, n)
        new = separator.join([*head, *parts])
        if new in out:
            return None
        out[new] = array
    return None if out.keys() == arrays.keys() else out


def nested_inside(arrays: Arrays, separator: str, rng: random.Random) -> Arrays | None:
    """A level put around what some part of the model holds."""
    levels = _levels(arrays, separator)
    if not levels:
        return None
    word = rng.choice(("inner", "core", "impl", "sub"))
    return _at_level(arrays, separator, rng.choice(levels), lambda parts, n: [*parts[:n], word, *parts[n:]])


def flattened(arrays: Arrays, separator: str, rng: random.Random) -> Arrays | None:
    """One level taken out: what it held stands where it stood."""
    levels = _levels(arrays, separator)
    if not levels:
        return None
    return _at_level(arrays, separator, rng.choice(levels), lambda parts, n: [*parts[: n - 1], *parts[n:]])


# ---------------------------------------------------------------- styles


def styled(arrays: Arrays, separator: str, rng: random.Random) -> Arrays | None:
    """Another way of writing: numbers fused to words, or CamelCase words."""
    camel = rng.random() < 0.5

    def write(parts: list[str]) -> list[str]:
        out: list[str] = []
        for i, part in enumerate(parts[:-1]):
            if part in COLLECTIONS:
                out.append(part)
            elif part.isdigit() and i and out and out[-1] not in COLLECTIONS and not camel:
                out[-1] += f"_{part}"
            else:
                out.append("".join(w[:1].upper() + w[1:] for w in part.split("_")) if camel else part)
        return [*out, parts[-1]]

    return renamed(arrays, write, separator)


def mixed_styles(arrays: Arrays, separator: str, rng: random.Random) -> Arrays | None:
    """Each numbered word in a style of its own: conv1, conv_1, Conv_1, c1."""
    styles: dict[str, int] = {}
    initials: dict[str, str] = {}
    words = {m[1].rstrip("_") for part in stems(arrays, separator) if (m := re.fullmatch(r"([A-Za-z_]+)\d+", part))}

    def write(part: str) -> str:
        match = re.fullmatch(r"([A-Za-z_]+?)_?(\d+)", part)
        if not match:
            return part
        word, number = match[1], match[2]
        style = styles.setdefault(word, rng.randrange(4))
        if style == 3:
            short = initials.setdefault(word, word[:1].lower())
            return f"{short}{number}" if sum(w[:1].lower() == short for w in words) == 1 else f"{word}{number}"
        camel = "".join(w[:1].upper() + w[1:] for w in word.split("_"))
        return (f"{word}{number}", f"{word}_{number}", f"{camel}_{number}")[style]

    return renamed(arrays, lambda parts: [write(part) for part in parts[:-1]] + parts[-1:], separator)
