"""The state of one port by rules: both ends, and the results so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from graftax.errors import Failure
from graftax.plans import Assumption, Entry
from graftax.rules.flatten import Tail
from graftax.rules.model import Rule
from graftax.rules.template import KeyIndex
from graftax.tree import Checkpoint, Module, Side, TensorSpec


@dataclass(frozen=True, slots=True)
class Named:
    """What a silent rule pairs: its entry from source to like. If it does not fit without a layout, the entry has no
    ops and the failure says why. The layout of the leaf is still to be inferred or asked."""

    rule: Rule
    entry: Entry
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Unlaid:
    """What a silent rule pairs that needs a layout and states none: its entries in the first layout that fits (without
    ops if none does), and the failures that say so. Running both models may show the layout."""

    rule: Rule
    entries: tuple[Entry, ...]
    failures: tuple[Failure, ...]


@dataclass(frozen=True, slots=True)
class RuleEnd:
    """One end of a port. tree, index: None if the rules alone describe it; holders: leaf -> the live module that holds
    it; claimed: key -> the rule that names it."""

    side: Side
    tree: Checkpoint | None
    label: str
    index: KeyIndex | None
    holders: Mapping[str, Module]
    claimed: dict[str, Rule] = field(default_factory=dict[str, Rule])

    @classmethod
    def of(cls, side: Side, tree: Checkpoint | None) -> RuleEnd:
        if tree is None:
            return cls(side, None, "the rules", None, {})
        holders = {path: module for module in tree.live.modules.values() for path in module.leaves.values()}
        return cls(side, tree, tree.label, KeyIndex(tree), holders)


@dataclass(slots=True)
class RuleState:
    """Both ends of the port, and what the rules have settled so far. order: id of a rule -> its place among the
    rules."""

    source: RuleEnd
    like: RuleEnd
    tails: dict[bool, Tail] = field(default_factory=dict[bool, Tail])
    entries: list[Entry] = field(default_factory=list[Entry])
    broken: list[Entry] = field(default_factory=list[Entry])
    failures: list[Failure] = field(default_factory=list[Failure])
    assumptions: list[Assumption] = field(default_factory=list[Assumption])
    named: list[Named] = field(default_factory=list[Named])
    guessed: list[Entry] = field(default_factory=list[Entry])
    missing: dict[str, str] = field(default_factory=dict[str, str])
    targets: dict[str, TensorSpec] = field(default_factory=dict[str, TensorSpec])
    order: dict[int, int] = field(default_factory=dict[int, int])

    def overruled(self, rule: Rule, sources: Iterable[str], targets: Iterable[str]) -> bool:
        """True if the rule is silent and a rule with a layout names the same keys: that rule answers what the silent
        one leaves open."""
        if not rule.silent:
            return False
        found = [*map(self.source.claimed.get, sources), *map(self.like.claimed.get, targets)]
        first = found[0] if found else None
        return first is not None and not first.silent and all(other is first for other in found)

    def claim(self, rule: Rule, sources: Iterable[str], targets: Iterable[str]) -> list[Failure]:
        """Record the rule that names these keys; a failure for each key that another rule, or this one, has named
        already."""
        out: list[Failure] = []
        for keys, end in ((sources, self.source), (targets, self.like)):
            for key in keys:
                other = end.claimed.get(key)
                end.claimed[key] = rule if other is None else other
                if other is not None:
                    one, two = sorted((other, rule), key=lambda r: self.order.get(id(r), 0))
                    text, hint = f"is named by {one.where} and by {two.where}", "narrow one of the two"
                    if other is rule:
                        text, hint = f"is named twice by {rule.where}", "name it once"
                    out.append(Failure(text, end.label, key, next=f"A key may be in only one entry: {hint}."))
        return out
