"""Ports within one side: the settings and classes of live modules decide how a leaf of one lies in the other.

Matching copies a leaf as it is if its shape fits. Two live modules may still store it in different ways: by a setting
that the layer table knows (ConvTranspose's transpose_kernel), or because a class of the user's own holds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from graftax.errors import worded
from graftax.layers.base import Shape
from graftax.layers.connect import known_kind, own_layout
from graftax.layers.roles import conversion, role_of
from graftax.match.kinds import axis_orders, order_text, owners_by_leaf
from graftax.ops import Op, Rearrange, Stack, Unstack, chain_text
from graftax.plans import Candidate, Entry, Question
from graftax.plans.names import fold_names
from graftax.plans.text import columns
from graftax.rules.of_plan import RuleWriter
from graftax.tree import Checkpoint, Module, Side

_MOST = 6
"""Most layouts that a question offers."""
_APART = frozenset(("order", "input_shape", "output_shape", "inner_shapes"))
"""What a trace adds to the settings of a module."""
_NO_LAYOUT = frozenset(("dtype", "precision", "bias", "dropout", "deterministic", "causal", "inplace", "name"))
"""Words of settings of a user's own class that say nothing about the axes of its weights."""


def table_kind(module: Module | None, side: Side) -> str:
    """The kind in the layer table whose layout a live module surely has; "" if there is none."""
    return "" if own_layout(module, side) else known_kind(module, side)


def one_class(one: Module, other: Module) -> bool:
    """True if both modules run one class, or a class that is defined twice in the same way."""
    if one.code or other.code:
        return one.kind == other.kind and one.code == other.code and one.calls == other.calls
    return one.bases[:1] == other.bases[:1] and one.calls == other.calls


def alike_settings(one: Module, other: Module) -> bool:
    """True if no setting tells the layouts of two modules of one class of the user's apart."""
    return _telling(one) == _telling(other)


def _telling(module: Module) -> dict[str, object]:
    """The settings that may say how the weights lie: flags and words. Numbers show in the shapes."""
    return {
        name: value
        for name, value in module.settings.items()
        if isinstance(value, (bool, str)) and name not in _APART and _NO_LAYOUT.isdisjoint(name.split("_"))
    }


@dataclass(frozen=True, slots=True)
class _Doubt:
    """Why nothing decides how a leaf lies, and the ops that it may have."""

    why: str
    ways: tuple[tuple[Op, ...], ...]


def by_live_modules(
    entries: Iterable[Entry], source: Checkpoint, like: Checkpoint, side: Side, settled: Iterable[Entry] = ()
) -> tuple[list[Entry], list[Question]]:
    """The entries, with the ops that the live modules of both ends show, and questions about the leaves for which they
    show none. Modules of one name whose leaves only fit with other axes get entries too, if neither these entries nor
    the `settled` ones hold them. Nothing changes if one of the ends is not live."""
    entries = list(entries)
    if not source.live.modules or not like.live.modules:
        return entries, []
    judge = _Judge(source, like, side, owners_by_leaf(source), owners_by_leaf(like))
    out: list[Entry] = []
    open_: dict[_Doubt, list[Entry]] = {}
    for entry in (*entries, *judge.turned([*entries, *settled])):
        found = judge.ops(entry)
        if isinstance(found, _Doubt):
            open_.setdefault(found, []).append(entry)
        elif found == entry.ops:
            out.append(entry)
        else:
            evidence = (*entry.evidence, "both live modules give this layout")
            out.append(replace(entry, ops=found, evidence=evidence))
    writer = RuleWriter(source, like, (side, side))
    asked = [_question(group, doubt, writer) for doubt, some in open_.items() for _, group in columns(some)]
    return out, asked


@dataclass(slots=True)
class _Judge:
    source: Checkpoint
    like: Checkpoint
    side: Side
    owners: Mapping[str, Module]
    their_owners: Mapping[str, Module]

    def turned(self, known: Iterable[Entry]) -> list[Entry]:
        """Entries for the leaves of modules of one name that no entry holds, if the only thing that keeps them from
        one another is the order of axes."""
        taken = {name for entry in known for name in entry.sources}
        filled = {name for entry in known for name in entry.targets}
        by_name = {_bare(name): name for name in self.source if name not in taken}
        pairs = [(by_name[_bare(t)], t) for t in self.like if t not in filled and _bare(t) in by_name]
        modules: dict[str, list[tuple[str, str]]] = {}
        for name, target in pairs:
            one, other = self.owners.get(name), self.their_owners.get(target)
            if one is not None and other is not None:
                modules.setdefault(one.path, []).append((name, target))
        out: list[Entry] = []
        for leaves in modules.values():
            made = [Entry((name,), (target,), (), ("both modules have this name",)) for name, target in leaves]
            ways = [self.ops(entry) for entry in made]
            alike = (self.source.specs[name].shape == self.like.specs[target].shape for name, target in leaves)
            if any(ways) and not any(
                isinstance(way, _Doubt) or not (way or same) for way, same in zip(ways, alike, strict=True)
            ):
                out += made
        return out

    def ops(self, entry: Entry) -> tuple[Op, ...] | _Doubt:
        """The ops of the entry by the live modules that hold its leaves; a doubt if nothing decides."""
        pairs = [(name, target) for name in entry.sources for target in entry.targets]
        if not pairs or (len(entry.sources) > 1 and len(entry.targets) > 1):
            return entry.ops
        found = dict.fromkeys(self._pair(entry, *pair) for pair in pairs)
        if len(found) == 1:
            return next(iter(found))
        doubt = next((each for each in found if isinstance(each, _Doubt)), None)
        return doubt or _Doubt("the settings of its live modules differ from instance to instance", ())

    def _pair(self, entry: Entry, name: str, target: str) -> tuple[Op, ...] | _Doubt:
        one, other = self.owners.get(name), self.their_owners.get(target)
        wide = [size for size in self.source.specs[name].shape if size > 1]
        if one is None or other is None or len(wide) < 2:
            return entry.ops
        same = one_class(one, other)
        if same and one.settings == other.settings:
            return entry.ops
        kinds = table_kind(one, self.side), table_kind(other, self.side)
        if all(kinds):
            found = self._by_roles(entry, name, target)
            if found is not None or kinds[0] == kinds[1]:
                return entry.ops if found is None else found
        elif same and alike_settings(one, other):
            return entry.ops
        ours, theirs = self.source.specs[name].shape, self.like.specs[target].shape
        if entry.ops:
            ours = theirs = theirs if _unstacks(entry) else ours  # of a single leaf
        ways = tuple(_placed(entry, way) for way in _orders(ours, theirs))
        if len(ways) > 1:
            kinds = f"both live modules are {one.kind}, with settings that differ"
            apart = f"one live module is {one.kind} and the other {other.kind}"
            return _Doubt(kinds if same else apart, ways[:_MOST])
        return ways[0] if ways else entry.ops

    def _by_roles(self, entry: Entry, name: str, target: str) -> tuple[Op, ...] | None:
        """The ops of the entry by the axes of both leaves; its own if these lie alike, None if nothing shows them."""
        one, other = role_of(self.source, name), role_of(self.like, target)
        way = None if one is None or other is None else conversion(one, other)
        if not way:
            return None if way is None else entry.ops
        return _placed(entry, way) if any(isinstance(op, (Stack, Unstack)) for op in entry.ops) else way


def _bare(name: str) -> str:
    """The path without the collection, which only Linen's have."""
    return name.removeprefix("params/")


def _unstacks(entry: Entry) -> bool:
    return any(isinstance(op, Unstack) for op in entry.ops)


def _placed(entry: Entry, way: tuple[Op, ...]) -> tuple[Op, ...]:
    """The ops of an entry with those of each single leaf: before they are stacked, or after they are unstacked."""
    return (*entry.ops, *way) if _unstacks(entry) else (*way, *entry.ops)


def _orders(source: Shape, target: Shape) -> list[tuple[Op, ...]]:
    """The orders of axes that turn one shape into the other; first, the axes as they are."""
    orders = axis_orders([(source, target)])
    orders.sort(key=lambda order: order != tuple(range(len(order))))
    return [() if order == tuple(range(len(order))) else (Rearrange(order_text(order)),) for order in orders]


def _question(group: Sequence[Entry], doubt: _Doubt, writer: RuleWriter) -> Question:
    sources = tuple(name for entry in group for name in entry.sources)
    targets = tuple(name for entry in group for name in entry.targets)
    found: list[Candidate] = []
    for ops in doubt.ways:
        lines = writer.lines([replace(entry, ops=ops) for entry in group])
        if lines:
            said = "as it is" if ops == doubt.ways[0] else f"its axes in another order: {chain_text(ops)}"
            found.append(Candidate(", ".join(lines), sources, said))
    names = ", ".join(fold_names(targets)[:4])
    decides = f"running both models ({worded('--inputs', 'inputs=')}) decides it"
    text = f"{names}: {doubt.why}, so they may store its axes in different orders; {decides}"
    return Question("layout", text, targets, sources, tuple(found))
