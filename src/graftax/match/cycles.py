"""Layers that one side numbers through and the other keeps in stacks under a number: as a cycle of kinds, or in stages.

With 4 layers in `layers/layers_{0..1}`, place 0 of a cycle holds layers 0 and 2, stage 0 holds layers 0 and 1. If all
layers are alike, only the place of the stack in the path tells: a module that holds nothing but these blocks is itself
repeated, so its parts are the places of a cycle. A module inside each of them is repeated in each: they are stages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from graftax.match.blocks import Doubt, Option, View, prefix_text, surest
from graftax.match.cutting import Cut, Cuts, Tokens
from graftax.match.match_inputs import Ends
from graftax.match.pairs import Scope
from graftax.match.sides import Family, Module

Both = tuple[Cuts, Cuts]


@dataclass(frozen=True, slots=True)
class Rivals:
    """Equally good views. If they read the number after `prefix` of one side (`n`) in cycles and in stages, `told` is
    the way that the paths of the other side show, or ''."""

    views: Sequence[tuple[Both, View]]
    n: int = 0
    prefix: Tokens = ()
    told: str = ""

    @classmethod
    def of(cls, before: Both, tied: Sequence[tuple[Both, View]], ends: Ends) -> Rivals:
        changes = [(n, prefix) for n in (0, 1) for prefix, cut in tied[0][0][n].items() if before[n].get(prefix) != cut]
        n, prefix = changes[0]
        ways = [
            (way, view)
            for way, view in tied
            if way[n].get(prefix, Cut("names")).lengths and way[1 - n] == before[1 - n]
        ]
        found = cls([(w, v) for w, v in ways if w[n][prefix].way in ("cycle", "stages")], n, prefix)
        if len(changes) > 1 or len(found.views) < 2:
            return cls(tied[:1])
        scope = found.scope(found.views[0][1])
        return cls(found.views, n, prefix, _shown(scope, n, ends) if scope is not None else "")

    @property
    def open(self) -> bool:
        """True if nothing tells which view is right."""
        return len(self.views) > 1 and not self.told

    @property
    def likeliest(self) -> tuple[Both, View]:
        return next((item for item in self.views if self.told and self._cut(item[0]).way == self.told), self.views[0])

    def _cut(self, way: Both) -> Cut:
        return way[self.n][self.prefix]

    def scope(self, view: View) -> Scope | None:
        """The scope that holds the blocks."""
        inside = *self.prefix, (0,)
        return next((s for s in view.scopes[1:] if any(_within(m, inside) for m in (s.torch, s.flax)[self.n])), None)

    def set_aside(self, view: View) -> View:
        """The view without the scope of the blocks, which are asked about."""
        scope = self.scope(view)
        if scope is None:
            return view
        options = [(_said(self._cut(way)), option) for way, option in self._options()]
        why = f"{prefix_text((*self.prefix, (0,)))} may count through a cycle of layers or through stages of them"
        blocks = [Family((), [], modules, []) for modules in (scope.torch, scope.flax)]
        rest = [other for other in view.scopes if other is not scope]
        return replace(view, scopes=rest, doubts=[*view.doubts, Doubt(blocks[:1], blocks[1:], why, options)])

    def _options(self) -> Iterator[tuple[Both, Option]]:
        for way, view in self.views:
            scope = self.scope(view)
            pair = surest(scope) if scope is not None else None
            if scope is not None and pair is not None:
                yield way, [(scope, pair)]


def _within(module: Module, inside: Tokens) -> bool:
    return module.outer[: len(inside)] == inside


def _said(cut: Cut) -> str:
    return f"there are {len(cut.lengths)} stages" if cut.way == "stages" else f"each cycle has {cut.lengths[0]} layers"


def _shown(scope: Scope, n: int, ends: Ends) -> str:
    """What the paths of the stacked side show: `cycle`, `stages`, or ''."""
    modules, every, side = (scope.torch, ends.torch, ends.torch_side) if n else (scope.flax, ends.flax, ends.flax_side)
    columns = [column for module in modules for column in module.roles.values()]
    paths = [[re.split(r"[./]", p[0]) for p in column.paths.values()] for column in columns]
    rows = next((found for found in paths if len(found) > 1), [])
    at = next((i for i, parts in enumerate(zip(*rows, strict=False)) if len(set(parts)) > 1), None)
    if at is None:
        return ""
    start = 1 if side == "flax" else 0
    around = rows[0][:at]
    held = {path for column in columns for found in column.paths.values() for path in found}
    near = [path for path in every if re.split(r"[./]", path)[:at] == around]
    outside = at > start and held.issuperset(near)
    inside = len({parts[0][at + 1] for parts in paths if len(parts[0]) > at + 1}) == 1 and all(
        len(parts[0]) > at + 2 for parts in paths
    )
    return "" if outside == inside else "cycle" if outside else "stages"
