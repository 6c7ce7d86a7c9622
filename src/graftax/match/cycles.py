"""Layers that one side numbers through and the other keeps in stacks under a number: as a cycle of kinds, or in stages.

With 4 layers in `layers/layers_{0..1}`, place 0 of a cycle holds layers 0 and 2, stage 0 holds layers 0 and 1. If all
layers are alike, only the place of the stack in the path tells: a module that holds nothing but these blocks is itself
repeated, so its parts are the places of a cycle. A module inside each of them is repeated in each: they are stages.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from graftax.match.blocks import Doubt, Option, View, prefix_text, surest
from graftax.match.cutting import Cut, Cuts, Tokens
from graftax.match.match_inputs import Ends
from graftax.match.names import Lexicon, concepts
from graftax.match.pairs import Scope
from graftax.match.sides import Family, Module, columns_of, paths_of
from graftax.rules.key_templates import skeleton
from graftax.tree import split_words

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
    def of(cls, before: tuple[Both, View], tied: Sequence[tuple[Both, View]], ends: Ends) -> Rivals:
        """The rivals among the tied views; the view `before` if nothing could tell them apart or ask about them."""
        cuts = tied[0][0]
        changes = [
            (n, at) for n in (0, 1) for at, cut in cuts[n].items() if cut.lengths and before[0][n].get(at) != cut
        ]
        for n, prefix in changes[:1]:
            ways = [(way, view) for way, view in tied if way[n].get(prefix, _NONE).way in ("cycle", "stages")]
            found = cls(ways, n, prefix)
            if len({found.cut(way).way for way, _ in ways}) > 1:
                scopes = found.scopes(ways[0][1])
                return replace(found, told=_shown(scopes, n, ends)) if scopes else cls([before])
        return cls(tied[:1])

    @property
    def open(self) -> bool:
        """True if nothing tells which view is right."""
        return len(self.views) > 1 and not self.told

    @property
    def likeliest(self) -> tuple[Both, View]:
        return next((item for item in self.views if self.told and self.cut(item[0]).way == self.told), self.views[0])

    def cut(self, way: Both) -> Cut:
        return way[self.n][self.prefix]

    def scopes(self, view: View) -> list[Scope]:
        """The scopes that hold the blocks: one, or one for each place or stage."""
        return [s for s in view.scopes[1:] if any(self._holds(m) for m in (s.torch, s.flax)[self.n])]

    def _holds(self, module: Module) -> bool:
        at = len(self.prefix)
        return module.outer[:at] == self.prefix and len(module.outer) > at and not isinstance(module.outer[at], str)

    def explained(self, view: View) -> View:
        """The view, with what told that it is right."""
        for scope in self.scopes(view) if self.told else ():
            scope.why = f"the path of the stack shows that {_said(self.cut(self.likeliest[0]))}"
        return view

    def set_aside(self, view: View) -> View:
        """The view without the scopes of the blocks, which are asked about."""
        scopes = self.scopes(view)
        options = [(_said(self.cut(way)), option) for way, option in self._options()]
        why = f"{prefix_text((*self.prefix, (0,)))} may count through a cycle of layers or through stages of them"
        blocks = [[Family((), [], (scope.torch, scope.flax)[n], []) for scope in scopes] for n in (0, 1)]
        rest = [other for other in view.scopes if not any(other is scope for scope in scopes)]
        return replace(view, scopes=rest, doubts=[*view.doubts, Doubt(blocks[0], blocks[1], why, options)])

    def _options(self) -> Iterator[tuple[Both, Option]]:
        for way, view in self.views:
            found = [(scope, pair) for scope in self.scopes(view) if (pair := surest(scope)) is not None]
            if found:
                yield way, found


_NONE = Cut("names")


def _said(cut: Cut) -> str:
    count = len(cut.lengths)
    return f"there are {count} stages" if cut.way == "stages" else f"each cycle has {count} layers"


def _shown(scopes: Sequence[Scope], n: int, ends: Ends) -> str:
    """What the paths of the stacked side show: `cycle`, `stages`, or ''."""
    lex = scopes[0].lex
    every, side = (ends.torch, ends.torch_side) if n else (ends.flax, ends.flax_side)
    modules = [module for scope in scopes for module in (scope.torch if n else scope.flax)]
    held = set(paths_of(columns_of(modules)))
    alike: defaultdict[str, list[list[str]]] = defaultdict(list)
    for path in held:
        alike[skeleton(path)].append(_split(path))
    rows = max(alike.values(), key=len)
    at = next((i for i, parts in enumerate(zip(*rows, strict=False)) if len(set(parts)) > 1), None)
    if at is None:
        return ""
    around = rows[0][:at]
    outside = at > (side == "flax") and held.issuperset(path for path in every if _split(path)[:at] == around)
    below = [parts[at + 1 :] for found in alike.values() for parts in found]
    inside = len({parts[0] for parts in below if parts}) == 1 and all(len(parts) > 1 for parts in below)
    if outside and inside:  # a part that holds nothing else may be the model around the blocks
        outside, inside = _lists_blocks(around[-1], lex), _lists_blocks(below[0][0], lex)
        inside = inside or "stage" in concepts(split_words(rows[0][at]), lex)
    return "" if outside == inside else "cycle" if outside else "stages"


def _lists_blocks(part: str, lex: Lexicon) -> bool:
    return bool(_BLOCKS.intersection(concepts(split_words(part), lex)))


_BLOCKS = frozenset(("layer", "stage", "list"))


def _split(path: str) -> list[str]:
    return re.split(r"[./]", path)
