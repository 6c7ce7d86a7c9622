"""Live modules as evidence: kinds that exclude each other, and the reading that the layer table gives for two kinds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import permutations

from graftax.errors import LayoutError
from graftax.layers.base import Part, Shape
from graftax.layers.connect import connect, known_kind, own_layout, rows_for
from graftax.layers.patterns import label_of
from graftax.match.pairs import Label, Link, Pair
from graftax.match.sides import Column, Key, Module
from graftax.match.traced import Traces
from graftax.ops import Op, Rearrange
from graftax.tree import Checkpoint, Side
from graftax.tree import Module as Live

Told = tuple[bool, str, dict[Label, tuple[Op, ...]]]
"""True if live kinds settle the readings of a leaf, the evidence, and the readings, the likeliest first."""


@dataclass(slots=True)
class Kinds:
    """The live modules of both ends, by the leaves that they hold directly."""

    torch: Mapping[str, Live] = field(default_factory=dict[str, Live])
    flax: Mapping[str, Live] = field(default_factory=dict[str, Live])
    ends: tuple[Checkpoint, Checkpoint] | None = None
    traces: Traces = field(default_factory=Traces)
    table: dict[object, Told | None] = field(default_factory=dict[object, "Told | None"])

    @classmethod
    def of(cls, torch: Checkpoint, flax: Checkpoint, traces: Traces) -> Kinds:
        return cls(owners_by_leaf(torch), owners_by_leaf(flax), (torch, flax), traces)

    def __bool__(self) -> bool:
        return bool(self.torch or self.flax)

    def clash(self, pair: Pair) -> str:
        """Why two live kinds exclude each other; empty if they do not, or if a kind is not known."""
        left, right = self._live(pair.torch, True), self._live(pair.flax, False)
        a, b = known_kind(left, "torch"), known_kind(right, "flax")
        if a and b and not any(row.torch and row.flax for row in rows_for(a, b)):
            return f"one module is {a} and the other {b}"
        return ""

    def tell(self, modules: tuple[Module, Module], link: Link, keys: Mapping[Key, Key]) -> None:
        """State in the link what the live modules show of its layout: the readings of the layer table for their kinds;
        every order of axes for a class that may use its own, or whose name says that it is no convolution."""
        live = self._live(modules[0], True), self._live(modules[1], False)
        other = not any(live) and _no_convolution(modules, link)
        if not (any(live) or other) or link.torch.role not in ("weight", "value"):
            return
        if other or any(map(own_layout, live, ("torch", "flax"))):
            self._tell_orders(link, keys)
        elif link.torch.role == "weight" and not link.torch.stack and not link.flax.stack:
            self._tell_table(modules, live, link, keys)

    def _tell_orders(self, link: Link, keys: Mapping[Key, Key]) -> None:
        """Every order of axes that fits every instance, open if there are several."""
        shapes = {(shape, link.flax.shapes[keys[key]]) for key, shape in link.torch.shapes.items()
                  if keys.get(key) in link.flax.shapes}  # fmt: skip
        if link.torch.stack or link.flax.stack:  # the stack axis is open too
            alike = {tuple(link.chains[(label, *pair)] for pair in shapes): label for label in sorted(link.labels)}
            link.told = tuple(alike.values()) if len(alike) > 1 and max(len(s) for s, _ in shapes) > 1 else ()
            return
        orders = axis_orders(shapes)
        used = self._as_used(orders, link, keys) if len(orders) > 1 else []
        chains = dict(map(_ordered, used or orders))
        if chains:
            why = "products with it sum over this axis on both sides" if used else "only this order of axes fits"
            link.labels, link.told, link.why = frozenset(chains), tuple(chains), why
            link.chains.update({(label, *pair): chain for label, chain in chains.items() for pair in shapes})

    def _as_used(self, orders: list[tuple[int, ...]], link: Link, keys: Mapping[Key, Key]) -> list[tuple[int, ...]]:
        """The orders that take the axis over which torch's products with the leaf sum to that of Flax's products; []
        if that is not known for every instance. A kernel of a file is (in, out), a weight of a file (out, in)."""
        found: set[tuple[int, int]] = set()
        for key, paths in link.torch.paths.items():
            other = link.flax.paths.get(keys.get(key, ()))
            if other is None:
                continue
            a, b = self._summed(0, paths[0], link.torch), self._summed(1, other[0], link.flax)
            if a is None or b is None:
                return []
            found.add((a, b))
        return [order for order in orders if len(found) == 1 and all(order[b] == a for a, b in found)]

    def _summed(self, end: int, leaf: str, column: Column) -> int | None:
        """The axis of a matrix over which products with it sum; None if nothing shows it."""
        if any(len(shape) != 2 for shape in column.shapes.values()):
            return None
        live = (self.torch, self.flax)[end].get(leaf)
        if live is not None and own_layout(live, SIDES[end]):
            return (self.traces.flax if end else self.traces.torch).summed.get(leaf)
        return 1 - end if column.leaf == ("weight", "kernel")[end] else None

    def _tell_table(
        self, modules: tuple[Module, Module], live: tuple[Live | None, Live | None], link: Link, keys: Mapping[Key, Key]
    ) -> None:
        """What the layer table gives for the kinds, if it settles the reading or leaves it open between several."""
        found: dict[tuple[Shape, Shape], Told] = {}
        for key, source in link.torch.shapes.items():
            other = keys.get(key, ())
            shapes = source, link.flax.shapes.get(other, ())
            if shapes not in found and other in link.flax.paths:
                told = self._told(modules, live, (key, other), link)
                if told is None:
                    return
                found[shapes] = told
        sure, why, ways = next(iter(found.values()), (False, "", {}))
        labels = [label for label in ways if all(label in made for _, _, made in found.values())]
        if not labels or (len(labels) == 1 and not sure):
            return
        link.told, link.why, link.labels = tuple(labels), why, link.labels | set(labels)
        for shapes, (_, _, made) in found.items():
            for label in labels:
                link.chains.setdefault((label, *shapes), made[label])

    def _told(
        self,
        modules: tuple[Module, Module],
        live: tuple[Live | None, Live | None],
        keys: tuple[Key, Key],
        link: Link,
    ) -> Told | None:
        if self.ends is None or not (known_kind(live[0], "torch") or known_kind(live[1], "flax")):
            return None
        torch, flax = (
            Part("", side, {c.leaf: c.paths[key][0] for c in module.roles.values() if key in c.paths}, end.specs, one)
            for side, module, key, end, one in zip(SIDES, modules, keys, self.ends, live, strict=True)
        )
        at = (*(one and (one.kind, one.bases, repr(one.settings)) for one in live), link.torch.leaf, link.flax.leaf,
              *(tuple(part.shapes().items()) for part in (torch, flax)))  # fmt: skip
        if at not in self.table:
            self.table[at] = _by_table(torch, flax, link.torch.leaf, link.flax.leaf)
        return self.table[at]

    def _live(self, module: Module, torch: bool) -> Live | None:
        table = self.torch if torch else self.flax
        return table.get(_first(module)) if table else None


UNKNOWN = Kinds()
"""Nothing is live."""
SIDES: tuple[Side, Side] = ("torch", "flax")
_AXES = "abcde"
OF_TWO = frozenset(("bilinear", "biaffine", "bilin"))


def _no_convolution(modules: tuple[Module, Module], link: Link) -> bool:
    """True if the names say that a weight of three axes takes two inputs."""
    shape = next(iter(link.torch.shapes.values()))
    return len(shape) == 3 and any(not OF_TWO.isdisjoint((*m.outer, *m.tokens)) for m in modules)


def axis_orders(shapes: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """Every order of axes that turns the first shape of each pair into the second. Of orders that differ only in axes
    of length 1, one is given. The usual orders come first: the first axis moved last, and all axes reversed."""
    shapes = list(shapes)
    rank = len(shapes[0][0])
    if not 2 <= rank <= len(_AXES) or any(len(shape) != rank for pair in shapes for shape in pair):
        return []
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    usual = [(*range(1, rank), 0), tuple(range(rank))[::-1]]
    for order in (*usual, *permutations(range(rank))):
        if all(target == tuple(source[axis] for axis in order) for source, target in shapes):
            moved = tuple(axis for axis in order if any(source[axis] > 1 for source, _ in shapes))
            found.setdefault(moved, order)
    return list(found.values())


def _ordered(order: tuple[int, ...]) -> tuple[Label, tuple[Op, ...]]:
    if order == tuple(range(len(order))):
        return ((), "identity"), ()
    return ((), "linear" if len(order) == 2 else order_text(order)), (Rearrange(order_text(order)),)


def order_text(order: tuple[int, ...]) -> str:
    names = _AXES[: len(order)]
    return f"{' '.join(names)} -> {' '.join(names[axis] for axis in order)}"


def owners_by_leaf(side: Checkpoint) -> dict[str, Live]:
    """leaf -> the innermost live module that holds it"""
    out: dict[str, Live] = {}
    for module in sorted(side.live.modules.values(), key=lambda m: len(m.path)):
        out |= dict.fromkeys(module.leaves.values(), module)
    return out


def _first(module: Module) -> str:
    return (module.roles.get("weight") or next(iter(module.roles.values()))).path


def _by_table(torch: Part, flax: Part, leaf: str, other: str) -> Told | None:
    """What the layer table gives for a leaf of two parts, by more than convention."""
    try:
        found = connect(torch, flax, partial=True)
    except LayoutError:
        return None
    best = [connection for connection in found if connection.by == found[0].by]
    if not best or best[0].by == "convention":
        return None
    paths = (torch.leaves[leaf],), (flax.leaves[other],)
    entries = [entry for one in best for entry in one.entries if (entry.sources, entry.targets) == paths]
    ways: dict[Label, tuple[Op, ...]] = {((), label_of(entry.ops)): entry.ops for entry in entries}
    return (best[0].by == "modules", best[0].evidence[0], ways) if ways else None
