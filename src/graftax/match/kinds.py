"""Live modules as evidence: kinds that exclude each other, and the reading that the layer table gives for two kinds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import permutations

from graftax.errors import LayoutError
from graftax.layers.base import Part
from graftax.layers.connect import connect, known_kind, own_layout, rows_for, settled
from graftax.match.choose import Choice
from graftax.match.pairs import Label, Link, Pair
from graftax.match.sides import Module
from graftax.ops import Rearrange
from graftax.tree import Checkpoint, Side
from graftax.tree import Module as Live

_LABELS: tuple[tuple[str, str], ...] = (
    ("linear, out split", "heads (h d) i -> i h d"),
    ("linear, in merged", "heads o (h d) -> h d o"),
    ("linear", "linear"),
    ("embedding", "identity"),
    ("conv_transpose default", "conv_transpose default"),
    ("conv_transpose", "conv"),
    ("conv", "conv"),
    ("identity", "identity"),
)
"""Variants of the layer table -> readings. An exact variant is looked up first, then its first words."""


@dataclass(slots=True)
class Kinds:
    """The live modules of both ends, by the leaves that they hold directly."""

    torch: Mapping[str, Live] = field(default_factory=dict[str, Live])
    flax: Mapping[str, Live] = field(default_factory=dict[str, Live])
    ends: tuple[Checkpoint, Checkpoint] | None = None

    @classmethod
    def of(cls, torch: Checkpoint, flax: Checkpoint) -> Kinds:
        return cls(owners_by_leaf(torch), owners_by_leaf(flax), (torch, flax))

    def __bool__(self) -> bool:
        return bool(self.torch or self.flax)

    def clash(self, pair: Pair) -> str:
        """Why two live kinds exclude each other; empty if they do not, or if a kind is not known."""
        left, right = self._live(pair.torch, True), self._live(pair.flax, False)
        a, b = known_kind(left, "torch"), known_kind(right, "flax")
        if a and b and not any(row.torch and (row.linen or row.nnx) for row in rows_for(a, b)):
            return f"one module is {a} and the other {b}"
        return ""

    def reading(self, pair: Pair, link: Link) -> tuple[Label, str] | None:
        """The reading that the live kinds settle, and the evidence."""
        if self.ends is None or link.torch.role != "weight" or len(link.labels) < 2:
            return None
        left, right = self._live(pair.torch, True), self._live(pair.flax, False)
        if not known_kind(left, "torch") and not known_kind(right, "flax"):
            return None
        parts = _part("torch", pair.torch, self.ends[0], left), _part("flax", pair.flax, self.ends[1], right)
        try:
            found = settled(connect(*parts, partial=True))
        except LayoutError:
            return None
        if found is None or found.by != "modules":
            return None
        for variant, reading in _LABELS:
            if found.variant == variant or found.variant.startswith(f"{variant} "):
                label = next((known for known in sorted(link.labels) if known[1] == reading), None)
                if label is not None:
                    return label, found.evidence[0]
        return None

    def own_order(self, pair: Pair, link: Link) -> Choice | None:
        """The order of a matrix's axes if a live module may use its own order: settled if only one order fits every
        instance, else all orders that fit are open."""
        ends = self._live(pair.torch, True), self._live(pair.flax, False)
        shapes = {(source, target) for _, source, target in link.chains}
        if link.torch.role not in ("weight", "value") or not any(map(own_layout, ends, ("torch", "flax"))):
            return None
        if link.torch.stack or link.flax.stack:  # the stack axis is open too
            return Choice(None, "", tuple(sorted(link.labels))) if max(len(s) for s, _ in shapes) > 1 else None
        orders = axis_orders(shapes)
        if not orders:
            return None
        made = {((), _order_label(order)): order for order in orders}
        for label, order in made.items():
            chain = (Rearrange(order_text(order)),) if order != tuple(range(len(order))) else ()
            link.chains.update({(label, source, target): chain for source, target in shapes})
        link.labels = frozenset(made)
        if len(made) == 1:
            return Choice(next(iter(made)), "only this order of axes fits")
        return Choice(None, "", tuple(made))

    def _live(self, module: Module, torch: bool) -> Live | None:
        table = self.torch if torch else self.flax
        return table.get(_first(module)) if table else None


_AXES = "abcde"


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


def _order_label(order: tuple[int, ...]) -> str:
    if order == tuple(range(len(order))):
        return "identity"
    return "linear" if len(order) == 2 else f"axes {order_text(order)}"


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
    column = module.roles.get("weight") or next(iter(module.roles.values()))
    return next(iter(column.paths.values()))[0]


def _part(side: Side, module: Module, end: Checkpoint, live: Live | None) -> Part:
    leaves = {column.leaf: next(iter(column.paths.values()))[0] for column in module.roles.values()}
    return Part("", side, leaves, end.specs, live)
