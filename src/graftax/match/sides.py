"""One side of a match: leaves grouped into modules, modules into families of repeated blocks.

A *family* is a path prefix whose numbers count alike blocks (`layers.*`); the root is the family without numbers. A
*module* is a path inside a family with its leaves by role; a *column* is one leaf of a module over all instances of the
family, and is decided once. Cost: a few dictionary operations a leaf, everything else per template.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from graftax.match.components import components
from graftax.match.cutting import Cuts, Key, Shape, Template, Token, Tokens, resolve, tokens_of
from graftax.match.places import mark_own
from graftax.match.roles import Kind
from graftax.tree import Side

__all__ = [
    "Column",
    "Family",
    "Key",
    "Module",
    "Shape",
    "Token",
    "Tokens",
    "columns_of",
    "module_path",
    "paths_of",
    "tokens_of",
    "view",
]


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
    def path(self) -> str:
        """The path of the first leaf."""
        return next(iter(self.paths.values()))[0]

    @property
    def size(self) -> int:
        """Elements of the first instance, stacked ones included."""
        first = next(iter(self.shapes))
        return math.prod(self.shapes[first]) * math.prod(self.stack)


@dataclass(slots=True, eq=False)
class Module:
    """Leaves of one module. `tokens`: the path inside the family; `outer`: the words of the family's path; `cuts`: the
    token counts at which the parts of the path end; `own`: how many tokens lead to other modules too."""

    tokens: Tokens
    outer: Tokens
    roles: dict[str, Column] = field(default_factory=dict[str, Column])
    raw: bool = False
    alias: list[Tokens] = field(default_factory=list[Tokens])
    cuts: tuple[int, ...] = ()
    own: int = 0

    @property
    def numbers(self) -> dict[int, int]:
        """The numbers that are parts of its name, by their places in its tokens."""
        return {at: token for at, token in enumerate(self.tokens) if isinstance(token, int)}

    @property
    def unnumbered(self) -> tuple[object, ...]:
        """The path inside the family without its numbers."""
        return tuple(0 if isinstance(token, int) else token for token in self.tokens)

    @property
    def support(self) -> frozenset[Key]:
        """The instances that hold it."""
        if len(self.roles) == 1:
            return frozenset(next(iter(self.roles.values())).paths)
        return frozenset(key for column in self.roles.values() for key in column.paths)


@dataclass(slots=True, eq=False)
class Family:
    """Repeated blocks: the prefix (with a tuple for each number that counts blocks), the instances, their modules and
    sizes. `lists`: the prefixes of the lists of parts that make up the blocks."""

    prefix: Tokens
    keys: list[Key]
    modules: list[Module]
    sizes: list[int]
    lists: list[Tokens] = field(default_factory=list[Tokens])


def columns_of(modules: Iterable[Module]) -> list[Column]:
    """The leaves of modules, without counters."""
    return [column for module in modules for column in module.roles.values() if column.role != "counter"]


def paths_of(columns: Iterable[Column]) -> tuple[str, ...]:
    return tuple(path for column in columns for paths in column.paths.values() for path in paths)


def module_path(path: str, side: Side) -> str:
    """The path of the module that holds a leaf, without its collection."""
    if side == "torch":
        return path.rpartition(".")[0]
    head, _, rest = path.partition("/")
    return (rest if head in ("params", "batch_stats") else path).rpartition("/")[0]


def view(templates: Iterable[Template], cuts: Cuts) -> list[Family]:
    """All families of one side, the root first. Two families of one prefix (cut by kind of block) stay separate because
    their sets of keys differ."""
    groups: dict[Tokens, list[tuple[Template, int]]] = {}
    for template in resolve(templates, cuts):
        cut = max((i + 1 for i, token in enumerate(template.resolved) if isinstance(token, tuple)), default=0)
        groups.setdefault(template.resolved[:cut], []).append((template, cut))
    totals: dict[Tokens, defaultdict[Key, int]] = {}
    modules = {prefix: _modules(members, prefix) for prefix, members in groups.items()}
    for prefix, found in modules.items():
        depths = [i + 1 for i, token in enumerate(prefix) if isinstance(token, tuple)]
        sums = [totals.setdefault(prefix[:depth], defaultdict(int)) for depth in depths]
        for column in columns_of(found):
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
        for key, shape in column.shapes.items():
            total[key[:depth]] += alike[shape]


def _kinds(modules: list[Module]) -> list[set[Key]]:
    """The instances of a prefix in groups that share modules (blocks of different groups have no module in common)."""
    return [{key for m in group for key in m.support} for group in components(modules, lambda m: m.support)]


def _modules(members: list[tuple[Template, int]], prefix: Tokens) -> list[Module]:
    out: dict[tuple[object, ...], Module] = {}
    for template, cut in members:
        tokens = template.resolved[cut:]
        keys = [tuple([row[0][i] for i in template.variables]) for row in template.rows]
        paths = {key: (row[1],) for key, row in zip(keys, template.rows, strict=True)}
        shapes = {key: row[2] for key, row in zip(keys, template.rows, strict=True)}
        column = Column(template.role, template.kind, template.leaf, paths, shapes)
        cuts = tuple(at - cut for at in template.cuts if at > cut)
        made = Module(tokens, prefix, raw=template.raw, cuts=cuts)
        number = 0  # blocks of another kind with the same prefix have other modules
        while template.role in (module := out.setdefault((tokens, number), made)).roles:
            number += 1
        module.roles[template.role] = column
    return list(out.values())
