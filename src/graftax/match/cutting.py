"""Which numbers of paths count repeated blocks, and which are parts of names.

Leaves whose paths differ only in their numbers are one *template*. Every number of a template is decided once, from the
outside in. By default blocks that are alike are counted together; a `Cut` states another way to read one number.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from graftax.match.numbers import CUT, NUMBER, twice_numbered
from graftax.match.roles import Kind, role_of
from graftax.match.words import COLLECTIONS, WRAPPERS
from graftax.tree import Side, TensorSpec, split_words, unescape_part

Key = tuple[int, ...]
Shape = tuple[int, ...]
Token = str | int | tuple[int]
"""A word, a number that is part of the name, or `(kind,)` for a number that counts blocks of one kind."""
Tokens = tuple[Token, ...]

MARK = "\0"
_LIKENESS = 0.3  # blocks that share at least this part of their leaves (Jaccard) are one family
_LIST = 4  # at least this many numbered single modules of one shape are a family too; any, if a name follows the number

Rows = list[tuple[Key, str, Shape]]


@dataclass(frozen=True, slots=True)
class Cut:
    """Another way to read the number that follows a prefix.

    names: it is a part of the name, or only the numbers in `lengths` are. kinds: blocks with exactly the same leaves
    are counted together; with `lengths`, a block without its like is counted too. blocks: it counts, even if it has
    only one value or counts single modules. parts: so too, and it counts the same blocks as other lists of parts.
    cycle: it is (place, cycle); `lengths`: how many blocks each place has. stages: it is (stage, place in it);
    `lengths`: of the stages.
    """

    way: Literal["names", "kinds", "blocks", "parts", "cycle", "stages"]
    lengths: tuple[int, ...] = ()

    def two(self, values: Iterable[int]) -> dict[int, Key]:
        """The two numbers for which each value stands."""
        ranks = list(enumerate(sorted(values)))
        if self.way == "cycle":
            return {value: (n % len(self.lengths), n // len(self.lengths)) for n, value in ranks}
        starts = [0, *accumulate(self.lengths)]
        stage = [j for j, length in enumerate(self.lengths) for _ in range(length)]
        stage += [len(self.lengths)] * (len(ranks) - len(stage))  # values that only other leaves have
        return {value: (stage[n], n - starts[stage[n]]) for n, value in ranks}


_BLOCKS, _NAMES = Cut("blocks"), Cut("names")
Cuts = Mapping[Tokens, Cut]
"""The resolved tokens before a number -> how to read that number."""


@dataclass(slots=True)
class Template:
    """Leaves whose paths differ only in their numbers. `tokens`: words, and MARK for a number; `resolved`: the tokens
    whose numbers are decided; `variables`: the places of the numbers that count; `cuts`: the token counts at which the
    parts of the path end."""

    tokens: tuple[str, ...]
    role: str
    kind: Kind
    leaf: str
    raw: bool
    rows: Rows
    resolved: Tokens = ()
    variables: tuple[int, ...] = ()
    numbers: int = 0
    cuts: tuple[int, ...] = ()


def parse(
    specs: Mapping[str, TensorSpec], side: Side, skip: Iterable[str] = (), renames: Mapping[str, str] | None = None
) -> list[Template]:
    """The templates of one side. `skip`: settled leaves; `renames`: path -> the path to read instead."""
    left, renames = set(skip), renames or {}
    grouped: dict[str, Rows] = {}
    cut = CUT.split
    twice = twice_numbered(specs)
    for path, spec in specs.items():
        if path in left:
            continue
        name = renames.get(path, path)
        pieces = cut(_plain(name) if "parametrizations" in name else name)
        if len(pieces) == 1:
            skeleton, numbers = pieces[0].replace(MARK, "_"), ()
        else:
            skeleton, numbers = MARK.join(pieces[::2]), tuple(map(int, pieces[1::2]))
            if MARK in path or path in twice:
                skeleton, numbers = path.replace(MARK, "_"), ()
        rows = grouped.get(skeleton)
        if rows is None:
            rows = grouped[skeleton] = []
        rows.append((numbers, path, spec.shape))
    out: list[Template] = []
    for skeleton, rows in grouped.items():
        parts = _parts(skeleton, side)
        role, kind, rest = _raw_pair(skeleton, grouped) or role_of(parts[-1])
        split = [split_words(part) for part in (*parts[:-1], rest) if part]
        words = tuple(word for part in split for word in part)
        cuts = tuple(accumulate(map(len, split)))
        out.append(Template(words, role, kind, parts[-1], bool(rest), rows, cuts=cuts))
    return out


_RAW = re.compile(r"(.*[./])?([wb])(_?)((?<=_)[^./]+|[a-z]+)")


def _raw_pair(skeleton: str, others: Collection[str]) -> tuple[str, Kind, str] | None:
    """The role of one of two bare parameters: w_out and b_out are the weight and the bias of out, as wq and bq of q."""
    found = _RAW.fullmatch(skeleton)
    if found is None:
        return None
    above, letter, link, rest = found.groups(default="")
    if f"{above}{'b' if letter == 'w' else 'w'}{link}{rest}" not in others:
        return None
    return ("weight", "raw", rest) if letter == "w" else ("bias", "free", rest)


def tokens_of(path: str, side: Side) -> Tokens:
    """The tokens of one leaf's module; every number is a part of the name."""
    name = _plain(path) if "parametrizations" in path else path
    numbers = iter(NUMBER.findall(name))
    parts = _parts(NUMBER.sub(MARK, name), side)
    rest = role_of(parts[-1])[2]
    words = [word for part in (*parts[:-1], rest) if part for word in split_words(part)]
    return tuple(int(next(numbers)) if word == MARK else word for word in words)


_PARAMETRIZED = (
    (".parametrizations.weight.original0", ".weight_g"),
    (".parametrizations.weight.original1", ".weight_v"),
    (".parametrizations.weight.original", ".weight"),
)


def _plain(path: str) -> str:
    for new, old in _PARAMETRIZED:
        if path.endswith(new):
            return path[: -len(new)] + old
    return path


def _parts(skeleton: str, side: Side) -> list[str]:
    if side == "torch":
        parts = skeleton.split(".")
    else:
        parts = [unescape_part(part) for part in skeleton.split("/")]
        if parts[0] in COLLECTIONS and len(parts) > 1:
            parts = parts[1:]
        if parts[-1] in ("value", "raw_value") and len(parts) > 1:
            parts = parts[:-1]
    parts = [part for part in parts[:-1] if part not in WRAPPERS] + parts[-1:]
    if len(parts) > 1 and parts[0] == "module" and side == "torch":
        parts = parts[1:]
    return parts


# ---------------------------------------------------------------- every number is decided


def resolve(templates: Iterable[Template], cuts: Cuts) -> list[Template]:
    """The templates with every number decided: one for each family of blocks, and for each number that is a name."""
    out: list[Template] = []
    _walk([replace(template) for template in templates], 0, out, cuts)
    return out


def _walk(templates: list[Template], at: int, out: list[Template], cuts: Cuts, told: Cut | None = None) -> None:
    """Decide every number of the templates, whose resolved tokens up to `at` are the same. `told`: how to read the
    number at `at`, if it is one."""
    while True:
        ends = [t for t in templates if len(t.tokens) == at]
        out += ends
        rest = [t for t in templates if len(t.tokens) > at] if ends else templates
        if not rest:
            return
        first = rest[0].tokens[at]
        if any(t.tokens[at] != first for t in rest):
            groups: defaultdict[str, list[Template]] = defaultdict(list)
            for template in rest:
                groups[template.tokens[at]].append(template)
            for group in groups.values():
                _walk(group, at, out, cuts, told)
            return
        templates = rest
        if first == MARK:
            how = told or cuts.get(templates[0].resolved)
            inner: Cut | None = None
            if how is not None and how.way in ("cycle", "stages"):
                templates = _as_two_numbers(templates, at, how)
                how, inner = (None if len(set(how.lengths)) == 1 else _NAMES), _BLOCKS
            for group in _numbered(templates, at, how):
                _walk(group, at + 1, out, cuts, inner)
            return
        for template in rest:
            template.resolved = (*template.resolved, first)
        at += 1


def _as_two_numbers(templates: Sequence[Template], at: int, how: Cut) -> list[Template]:
    """The templates with two numbers in place of the one at `at`."""
    place = templates[0].numbers
    two = how.two({row[0][place] for template in templates for row in template.rows})
    out: list[Template] = []
    for template in templates:
        rows = [((*key[:place], *two[key[place]], *key[place + 1 :]), *rest) for key, *rest in template.rows]
        tokens = (*template.tokens[:at], MARK, *template.tokens[at:])
        parts = sorted({*(end if end <= at else end + 1 for end in template.cuts), at + 1})
        out.append(replace(template, tokens=tokens, rows=rows, cuts=tuple(parts)))
    return out


def _numbered(templates: list[Template], at: int, how: Cut | None) -> list[list[Template]]:
    """The templates cut by their number at `at`: one group per family of blocks, and one per number that is a name."""
    place = templates[0].numbers  # all have the same numbers before `at`
    way = how.way if how is not None else ""
    holds: defaultdict[int, set[int]] = defaultdict(set)
    for j, template in enumerate(templates):
        for value in {row[0][place] for row in template.rows}:
            holds[value].add(j)
    classes: defaultdict[frozenset[int], list[int]] = defaultdict(list)
    for value, members in holds.items():
        classes[frozenset(members)].append(value)
    clusters: list[tuple[frozenset[int], list[int]]] = []
    for members, values in sorted(classes.items(), key=lambda item: (-len(item[1]), min(item[1]))):
        for i, (other, have) in enumerate(clusters):
            if way != "kinds" and len(members & other) >= _LIKENESS * len(members | other):
                clusters[i] = (members | other, have + values)
                break
        else:
            clusters.append((members, values))
    alone = how is not None and way == "kinds" and bool(how.lengths)
    named = set(how.lengths or holds) if how is not None and way == "names" else set[int]()
    left = [(members, [value for value in values if value not in named]) for members, values in clusters]
    counts = [
        values
        for members, values in left
        if values and (way in ("blocks", "parts") or _repeats(templates, at, members, values, place, alone))
    ]
    return _by_number(templates, place, counts, way == "kinds")


def _repeats(
    templates: list[Template], at: int, members: frozenset[int], values: list[int], place: int, alone: bool
) -> bool:
    """True if these values count blocks. `alone`: a single block counts too, if it holds several modules."""
    if len(values) < 2 and not alone:
        return False
    tails = {templates[j].tokens[at + 1 :] for j in members}
    return (
        len(tails) >= 2
        or _several(templates, members, values[0], place)
        or ((len(values) >= _LIST or all(tails)) and _alike(templates, members, values, place))
    )


def _several(templates: list[Template], members: frozenset[int], value: int, place: int) -> bool:
    """True if one instance holds several modules that differ only in later numbers: experts.0.w1, experts.0.w2."""
    found = {row[0][place + 1 :] for j in members for row in templates[j].rows if row[0][place] == value}
    return len(found) > 1


def _alike(templates: list[Template], members: frozenset[int], values: list[int], place: int) -> bool:
    """True if the numbers have no gap and every instance has the same shapes: a list of one module."""
    if max(values) - min(values) + 1 != len(values):
        return False
    return all(len({row[2] for row in templates[j].rows}) == 1 for j in members)


def _by_number(templates: list[Template], place: int, counts: list[list[int]], apart: bool) -> list[list[Template]]:
    """The templates in groups: one for all values of `counts` (one for each of them if `apart`), and one for each value
    that is a name."""
    owner: dict[int, int] = {value: i for i, values in enumerate(counts) for value in values}
    out: defaultdict[tuple[int, int], list[Template]] = defaultdict(list)
    for template in templates:
        cut: defaultdict[tuple[int, int], Rows] = defaultdict(list)
        if len(counts) == 1 and owner.keys() >= {row[0][place] for row in template.rows}:
            cut[(0, 0)] = template.rows
        else:
            for row in template.rows:
                value = row[0][place]
                family = owner.get(value)
                cut[(1, value) if family is None else (0, family if apart else 0)].append(row)
        for mark, rows in cut.items():
            block = mark[0] == 0
            token: Token = (mark[1] if apart else 0,) if block else mark[1]
            out[mark].append(
                replace(
                    template,
                    rows=rows,
                    resolved=(*template.resolved, token),
                    variables=(*template.variables, place) if block else template.variables,
                    numbers=place + 1,
                )
            )
    return list(out.values())
