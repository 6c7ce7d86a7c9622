"""One side of a match: leaves grouped into modules, modules into families of repeated blocks.

A *family* is a path prefix whose numbers count alike blocks (`layers.*`); the root is the family without numbers. A
*module* is a path inside a family with its leaves by role; a *column* is one leaf of a module over all instances of the
family, and is decided once. Cost: a few dictionary operations a leaf, everything else per template.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from graftax.match.numbers import CUT, NUMBER, twice_numbered
from graftax.match.places import mark_own
from graftax.match.roles import Kind, role_of
from graftax.match.words import COLLECTIONS, WRAPPERS
from graftax.tree import Side, TensorSpec, split_words, unescape_part

Key = tuple[int, ...]
Shape = tuple[int, ...]
Token = str | int | tuple[int]
"""A word, a number that is part of the name, or `(kind,)` for a number that counts blocks of one kind."""

_MARK = "\0"
_LIKENESS = 0.3  # blocks that share at least this part of their leaves (Jaccard) are one family
_LIST = 4  # at least this many numbered single modules of one shape are a family too


@dataclass(slots=True)
class Column:
    """One leaf of a module over the instances of its family. If the column is a virtual stack, `paths` holds several
    paths per instance, and `stack` counts them, outermost first."""

    role: str
    kind: Kind
    leaf: str
    paths: dict[Key, tuple[str, ...]]
    shapes: dict[Key, Shape]
    stack: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Elements of the first instance, stacked ones included."""
        first = next(iter(self.shapes))
        return math.prod(self.shapes[first]) * math.prod(self.stack)


@dataclass(slots=True, eq=False)
class Module:
    """Leaves of one module. `tokens`: the path inside the family; `outer`: the words of the family's path; `cuts`: the
    token counts at which the parts of the path end; `own`: how many tokens lead to other modules too."""

    tokens: tuple[Token, ...]
    outer: tuple[Token, ...]
    roles: dict[str, Column] = field(default_factory=dict[str, Column])
    raw: bool = False
    alias: list[tuple[Token, ...]] = field(default_factory=list[tuple[Token, ...]])
    cuts: tuple[int, ...] = ()
    own: int = 0

    @property
    def support(self) -> frozenset[Key]:
        """The instances that hold it."""
        if len(self.roles) == 1:
            return frozenset(next(iter(self.roles.values())).paths)
        return frozenset(key for column in self.roles.values() for key in column.paths)


@dataclass(slots=True, eq=False)
class Family:
    """Repeated blocks: the prefix (with a tuple for each number that counts blocks), the instances, their modules and
    sizes."""

    prefix: tuple[Token, ...]
    keys: list[Key]
    modules: list[Module]
    sizes: list[int]


@dataclass(slots=True)
class _Template:
    """Leaves whose paths differ only in their numbers."""

    tokens: tuple[str, ...]  # words and _MARK
    role: str
    kind: Kind
    leaf: str
    raw: bool
    rows: list[tuple[Key, str, Shape]]
    resolved: tuple[Token, ...] = ()
    variables: tuple[int, ...] = ()
    numbers: int = 0
    cuts: tuple[int, ...] = ()


@dataclass(slots=True)
class SideView:
    """All families of one side, the root first."""

    families: list[Family]
    count: int


def view(
    specs: Mapping[str, TensorSpec],
    side: Side,
    skip: Iterable[str] = (),
    exact: frozenset[tuple[Token, ...]] = frozenset(),
    loose: frozenset[tuple[Token, ...]] = frozenset(),
    renames: Mapping[str, str] | None = None,
) -> SideView:
    """The modules and families of one side. `skip`: settled leaves. Families in `exact` are cut to instances with
    exactly the same leaves. Families in `loose` are dissolved: their numbers become parts of names. `renames`: path ->
    the path to read instead."""
    left = set(skip)
    templates = _templates(specs, side, left, renames or {})
    out: list[_Template] = []
    _walk(templates, 0, out, exact, loose)
    return SideView(_families(out), len(specs))


def _templates(
    specs: Mapping[str, TensorSpec], side: Side, skip: set[str], renames: Mapping[str, str]
) -> list[_Template]:
    grouped: dict[str, list[tuple[Key, str, Shape]]] = {}
    cut = CUT.split
    twice = twice_numbered(specs)
    for path, spec in specs.items():
        if path in skip:
            continue
        name = renames.get(path, path)
        pieces = cut(_plain(name) if "parametrizations" in name else name)
        if len(pieces) == 1:
            skeleton, numbers = pieces[0].replace(_MARK, "_"), ()
        else:
            skeleton, numbers = _MARK.join(pieces[::2]), tuple(map(int, pieces[1::2]))
            if _MARK in path or path in twice:
                skeleton, numbers = path.replace(_MARK, "_"), ()
        rows = grouped.get(skeleton)
        if rows is None:
            rows = grouped[skeleton] = []
        rows.append((numbers, path, spec.shape))
    out: list[_Template] = []
    for skeleton, rows in grouped.items():
        parts = _parts(skeleton, side)
        role, kind, rest = role_of(parts[-1])
        split = [split_words(part) for part in (*parts[:-1], rest) if part]
        words = tuple(word for part in split for word in part)
        cuts = tuple(accumulate(map(len, split)))
        out.append(_Template(words, role, kind, parts[-1], bool(rest), rows, cuts=cuts))
    return out


def tokens_of(path: str, side: Side) -> tuple[Token, ...]:
    """The tokens of one leaf's module; every number is a part of the name."""
    name = _plain(path) if "parametrizations" in path else path
    numbers = iter(NUMBER.findall(name))
    parts = _parts(NUMBER.sub(_MARK, name), side)
    rest = role_of(parts[-1])[2]
    words = [word for part in (*parts[:-1], rest) if part for word in split_words(part)]
    return tuple(int(next(numbers)) if word == _MARK else word for word in words)


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


# ---------------------------------------------------------------- which numbers count blocks


def _walk(
    templates: list[_Template],
    at: int,
    out: list[_Template],
    exact: frozenset[tuple[Token, ...]],
    loose: frozenset[tuple[Token, ...]],
) -> None:
    """Decide every number of the templates, whose resolved tokens up to `at` are the same."""
    while True:
        ends = [t for t in templates if len(t.tokens) == at]
        out += ends
        rest = [t for t in templates if len(t.tokens) > at] if ends else templates
        if not rest:
            return
        first = rest[0].tokens[at]
        if any(t.tokens[at] != first for t in rest):
            groups: defaultdict[str, list[_Template]] = defaultdict(list)
            for template in rest:
                groups[template.tokens[at]].append(template)
            for group in groups.values():
                _walk(group, at, out, exact, loose)
            return
        templates = rest
        if first == _MARK:
            for group in _numbered(rest, at, exact, loose):
                _walk(group, at + 1, out, exact, loose)
            return
        for template in rest:
            template.resolved = (*template.resolved, first)
        at += 1


def _numbered(
    templates: list[_Template], at: int, exact: frozenset[tuple[Token, ...]], loose: frozenset[tuple[Token, ...]]
) -> list[list[_Template]]:
    """The templates cut by their number at `at`: one group per family of blocks, and one per number that is a name."""
    place = templates[0].numbers  # all have the same numbers before `at`
    prefix = (*templates[0].resolved, (0,))
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
            if prefix not in exact and len(members & other) >= _LIKENESS * len(members | other):
                clusters[i] = (members | other, have + values)
                break
        else:
            clusters.append((members, values))
    variable: list[list[int]] = []
    for members, values in clusters:
        if prefix in loose or len(values) < 2:
            continue
        tails = {templates[j].tokens[at + 1 :] for j in members}
        if (
            len(tails) >= 2
            or _several(templates, members, values[0], place)
            or (len(values) >= _LIST and _alike(templates, members, values, place))
        ):
            variable.append(values)
    return _cut(templates, place, variable, prefix in exact)


def _several(templates: list[_Template], members: frozenset[int], value: int, place: int) -> bool:
    """True if one instance holds several modules that differ only in later numbers: experts.0.w1, experts.0.w2."""
    found = {row[0][place + 1 :] for j in members for row in templates[j].rows if row[0][place] == value}
    return len(found) > 1


def _alike(templates: list[_Template], members: frozenset[int], values: list[int], place: int) -> bool:
    """True if the numbers have no gap and every instance has the same shapes: a list of one module."""
    if max(values) - min(values) + 1 != len(values):
        return False
    return all(len({row[2] for row in templates[j].rows}) == 1 for j in members)


def _cut(templates: list[_Template], place: int, variable: list[list[int]], apart: bool) -> list[list[_Template]]:
    owner: dict[int, int] = {value: i for i, values in enumerate(variable) for value in values}
    out: defaultdict[tuple[int, int], list[_Template]] = defaultdict(list)
    for template in templates:
        cut: defaultdict[tuple[int, int], list[tuple[Key, str, Shape]]] = defaultdict(list)
        if len(variable) == 1 and owner.keys() >= {row[0][place] for row in template.rows}:
            cut[(0, 0)] = template.rows
        else:
            for row in template.rows:
                value = row[0][place]
                family = owner.get(value)
                cut[(1, value) if family is None else (0, family if apart else 0)].append(row)
        for mark, rows in cut.items():
            counts = mark[0] == 0
            token: Token = (mark[1] if apart else 0,) if counts else mark[1]
            out[mark].append(
                _Template(
                    template.tokens,
                    template.role,
                    template.kind,
                    template.leaf,
                    template.raw,
                    rows,
                    (*template.resolved, token),
                    (*template.variables, place) if counts else template.variables,
                    place + 1,
                    template.cuts,
                )
            )
    return list(out.values())


# ---------------------------------------------------------------- families


def _families(templates: list[_Template]) -> list[Family]:
    """Families from templates. Two families of one prefix (cut by kind of block) stay separate because their sets of
    keys differ."""
    groups: dict[tuple[Token, ...], list[tuple[_Template, int]]] = {}
    for template in templates:
        cut = max((i + 1 for i, token in enumerate(template.resolved) if isinstance(token, tuple)), default=0)
        groups.setdefault(template.resolved[:cut], []).append((template, cut))
    totals: dict[tuple[Token, ...], defaultdict[Key, int]] = {}
    modules: dict[tuple[Token, ...], list[Module]] = {}
    for prefix, members in groups.items():
        modules[prefix] = _modules(members, prefix)
    for prefix, found in modules.items():
        cuts = [i + 1 for i, token in enumerate(prefix) if isinstance(token, tuple)]
        sums = [totals.setdefault(prefix[:cut], defaultdict(int)) for cut in cuts]
        for module in found:
            for column in module.roles.values():
                if column.role != "counter":
                    _add_sizes(column, sums)
    out = [Family((), [()], modules.pop((), []), [0])]
    for prefix, found in modules.items():
        for keys in _kinds(found):
            inside = [m for m in found if not m.support.isdisjoint(keys)]
            ordered = sorted(keys)
            out.append(Family(prefix, ordered, inside, [totals[prefix][key] for key in ordered]))
    mark_own(out)
    return out


def _add_sizes(column: Column, sums: list[defaultdict[Key, int]]) -> None:
    """Add the sizes of a column's leaves to every family around them, per instance."""
    alike = {shape: math.prod(shape) for shape in set(column.shapes.values())}
    for depth, total in enumerate(sums, 1):
        if depth == len(sums):
            for key, shape in column.shapes.items():
                total[key] += alike[shape]
        else:
            for key, shape in column.shapes.items():
                total[key[:depth]] += alike[shape]


def _kinds(modules: list[Module]) -> list[set[Key]]:
    """The instances of a prefix in groups that share modules (blocks of different groups have no module in common)."""
    groups: list[set[Key]] = []
    for module in modules:
        keys = set(module.support)
        touching = [g for g in groups if not g.isdisjoint(keys)]
        for group in touching:
            keys |= group
            groups.remove(group)
        groups.append(keys)
    return groups


def _modules(members: list[tuple[_Template, int]], prefix: tuple[Token, ...]) -> list[Module]:
    out: dict[tuple[object, ...], Module] = {}
    for template, cut in members:
        tokens = template.resolved[cut:]
        places, rows = template.variables, template.rows
        if rows and places == tuple(range(len(rows[0][0]))):
            paths = {numbers: (path,) for numbers, path, _ in rows}
            shapes = {numbers: shape for numbers, _, shape in rows}
        else:
            keys = [tuple([row[0][i] for i in places]) for row in rows]
            paths = {key: (row[1],) for key, row in zip(keys, rows, strict=True)}
            shapes = {key: row[2] for key, row in zip(keys, rows, strict=True)}
        column = Column(template.role, template.kind, template.leaf, paths, shapes)
        # Blocks of another kind with the same prefix have other modules.
        mark = (tokens, 0)
        while True:
            module = out.get(mark)
            if module is None:
                cuts = tuple(at - cut for at in template.cuts if at > cut)
                module = out[mark] = Module(tokens, prefix, raw=template.raw, cuts=cuts)
            taken = module.roles.get(template.role)
            if taken is None:
                module.roles[template.role] = column
                break
            if taken.paths.keys().isdisjoint(paths) and taken.kind == column.kind:
                taken.paths.update(paths)
                taken.shapes.update(shapes)
                break
            mark = (tokens, mark[1] + 1)
    return list(out.values())
