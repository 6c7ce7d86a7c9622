"""Entries of one rule: every group of keys with its ops, bound to its shapes and turned into the direction of the
port."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graftax.errors import Failure, GraftaxError, LayoutError, escape, some
from graftax.ops import Op, Specs, bind_chain, infer_chain, invert_chain
from graftax.plans import Entry
from graftax.rules.chain import Case, build_chain, positions
from graftax.rules.flatten import NO_TAIL, Tail, conv_tail
from graftax.rules.grouping import Joined, KeyGroup, render_there
from graftax.rules.layout import Laid, role_of
from graftax.rules.model import LIST, Rule
from graftax.rules.state import Named, RuleState
from graftax.tree import Module, Side, TensorSpec

Pair = tuple[tuple[str, ...], ...]
"""One item for each template of the left and of the right side."""


class Builder:
    """The entries of one rule. Groups of equal shapes share their ops."""

    def __init__(self, rule: Rule, ends: RuleState, joined: Joined, forward: bool) -> None:
        self.rule, self.ends, self.joined, self.forward = rule, ends, joined, forward
        assert ends.source.tree is not None
        self.source = ends.source.tree
        self.left, self.right = (ends.source, ends.like) if forward else (ends.like, ends.source)
        self.sides: tuple[Side, Side] = (self.left.side, self.right.side)
        self.listed = LIST in rule.stack or (rule.ops is not None and LIST in rule.ops.placed)
        self.stacked = tuple(name for name in (*rule.left_indices, *rule.right_indices)
                             if (name in rule.left_indices) != (name in rule.right_indices))  # fmt: skip
        self.made: dict[object, Laid | LayoutError] = {}
        self.assumed: dict[str, list[str]] = {}

    def add(self, group: KeyGroup) -> None:
        """Add the entry of the group, or the failure that says why there is none."""
        rule, ends = self.rule, self.ends
        fault = self._count_there(group)
        if fault is not None:
            ends.failures.append(fault)
            ends.broken.append(Entry(group.here.all, group.there.all, (), (rule.evidence,)))
            return
        if ends.overruled(rule, group.here.all, group.there.all):
            return
        try:
            made = self._made(group)
        except GraftaxError as error:
            self._refuse(error, group.here.all, group.there.all)
            if self.rule.silent and not (self.rule.bare and not self.rule.stack):
                self.ends.guessed.append(self._guessed(group))
            return
        sources = group.here.ordered(made.order)
        targets = group.there.ordered(made.order)
        clash = ends.claim(rule, sources, targets)
        if clash:
            ends.failures += clash
            return
        ends.entries.append(Entry(sources, targets, made.ops, made.evidence))
        if rule.silent:
            ends.named.append(Named(rule, ends.entries[-1]))
        if ends.like.tree is None:
            ends.targets.update(zip(targets, made.given, strict=True))
        for text in made.assumes:
            names = sources if self.forward else targets
            self.assumed.setdefault(f"{some(names)} is {text}", []).extend(targets)

    def _guessed(self, group: KeyGroup) -> Entry:
        """The entry of a group in the first layout that fits; without ops if none does."""
        for layout in ("linear", "conv", "identity"):
            builder = Builder(replace(self.rule, layout=layout), self.ends, self.joined, self.forward)
            try:
                made = builder._made(group)
            except GraftaxError:
                continue
            order = made.order
            sources = group.here.ordered(order)
            return Entry(sources, group.there.ordered(order), made.ops, (self.rule.evidence,))
        return Entry(tuple(group.here.all), tuple(group.there.all), (), (self.rule.evidence,))

    def _made(self, group: KeyGroup) -> Laid:
        """The ops of a group; groups of equal specs, roles and modules share them. Raises LayoutError."""
        left, right = (group.here, group.there) if self.forward else (group.there, group.here)
        source, like = self.source.specs, self.ends.like.tree
        keys = left.first(), right.first()
        roles = tuple(tuple(role_of(key, side) for key in names) for names, side in zip(keys, self.sides, strict=True))
        modules = self._modules(keys, roles)
        wanted = () if like is None else tuple((at, like.specs[key].shape) for at, key in group.there.found.items())
        given = tuple((at, source[key]) for at, key in group.here.found.items())
        at = (given, wanted, len(group.there.found), roles, tuple(map(id, modules)))
        known = self.made.get(at)
        if known is None:
            try:
                known = self._build(group, keys, roles, modules)
            except LayoutError as error:
                known = error
            self.made[at] = known
        if isinstance(known, LayoutError):
            raise known
        return known

    def _count_there(self, group: KeyGroup) -> Failure | None:
        """If the rules alone describe the other side, take the number of its keys from the stacked axis."""
        there = group.there
        if len(there.values) == len(there.names):
            return None
        shape = self.source[group.here.first()[0]].shape
        names = self.stacked + ((LIST,) if self.listed else ())
        axes = positions(self.rule, names, len(shape))
        for name in there.names:
            there.values.setdefault(name, tuple(range(shape[axes[name]])))
        return render_there(self.rule, self.joined, group)

    def _build(self, group: KeyGroup, keys: Pair, roles: Pair, modules: tuple[Module | None, ...]) -> Laid:
        left, right = (group.here, group.there) if self.forward else (group.there, group.here)
        counts = {**left.counts(), **right.counts()}
        if self.listed:
            counts[LIST] = max(len(self.rule.left), len(self.rule.right))
        shapes = [
            None if end.tree is None else tuple(end.tree[key].shape for key in names)
            for end, names in zip((self.left, self.right), keys, strict=True)
        ]
        values = {**left.values, **right.values}
        spans = {name: f"{found[0]}..{found[-1]}" for name, found in values.items() if found}
        case = Case(
            shapes[0], shapes[1], counts, roles[0], roles[1], self.sides, (modules[0], modules[1]), self._tail(), spans
        )
        chain = build_chain(self.rule, case)
        sources = group.here.ordered(chain.order)
        targets = group.there.ordered(chain.order)
        ops, given = self._bound(chain, sources, targets)
        return replace(chain, ops=ops, given=given, evidence=(self.rule.evidence, *chain.evidence))

    def _modules(self, keys: Pair, roles: Pair) -> tuple[Module | None, ...]:
        """The live modules of the first keys, if they hold these keys under the same role."""
        out: list[Module | None] = []
        for names, parts, end in zip(keys, roles, (self.left, self.right), strict=True):
            module = end.holders.get(names[0])
            out.append(module if module and module.leaves.get(parts[0]) == names[0] else None)
        return tuple(out)

    def _tail(self) -> Tail:
        if not self.rule.flatten:
            return NO_TAIL
        if self.forward not in self.ends.tails:
            end = self.ends.source if self.left.tree is None else self.left
            self.ends.tails[self.forward] = conv_tail((end.tree or self.source).specs, end.side)
        return self.ends.tails[self.forward]

    def _bound(self, chain: Laid, sources: Sequence[str], targets: Sequence[str]) -> tuple[tuple[Op, ...], Specs]:
        """The bound ops from source to like, and the specs that they give. LayoutError if the shapes do not fit."""
        given = tuple(self.source[name] for name in sources)
        like = self.ends.like.tree
        dtype = given[0].dtype
        wanted = None if like is None else tuple(TensorSpec(like[name].shape, dtype) for name in targets)
        if self.forward:
            ops, found = bind_chain(chain.ops, given)
        else:
            left = wanted or infer_chain(invert_chain(chain.ops), given)
            ops, back = bind_chain(chain.ops, left)
            _compare(back, given, sources)
            ops, found = bind_chain(invert_chain(ops), given)
        if wanted is not None:
            _compare(found, wanted, targets)
        return ops, found

    def _refuse(self, error: GraftaxError, sources: Sequence[str], targets: Sequence[str]) -> None:
        self.ends.claim(self.rule, sources, targets)
        broken = Entry(tuple(sources), tuple(targets), (), (self.rule.evidence,))
        self.ends.broken.append(broken)
        key = f"{some(sources)} -> {some(targets) or ', '.join(self.rule.right if self.forward else self.rule.left)}"
        text, hint = str(error).partition("\n")[0], f"Check {_culprit(self.rule)}{self.rule.where}."
        if error.failures:  # the layer table refuses, with a reason and often a rewrite
            text, hint = error.failures[0].what, f"{error.failures[0].next} {hint}".strip()
        self.ends.failures.append(Failure(text, self.ends.source.label, key, next=hint))
        if self.rule.bare and not self.rule.stack:
            self.ends.named.append(Named(self.rule, broken, self.ends.failures[-1]))


def _compare(found: Specs, wanted: Specs, names: Sequence[str]) -> None:
    if len(found) != len(wanted):
        raise LayoutError(f"the rule gives {len(found)} tensors for {len(wanted)} keys")
    for have, want, name in zip(found, wanted, names, strict=True):
        if have.shape != want.shape:
            raise LayoutError(f"{escape(name)} comes out as {have.shape}, not {want.shape}")


def _culprit(rule: Rule) -> str:
    """The key of the rule that most likely must change."""
    said = (
        ("heads", rule.heads is not None and rule.fused != ""), ("flatten", rule.flatten), ("ops", rule.ops),
        ("stack", rule.stack), ("fused", rule.fused), ("layout", rule.layout), ("heads", rule.heads is not None),
        ("repeat", rule.repeat), ("pad", rule.pad),
    )  # fmt: skip
    return next((f"`{name}` in " for name, given in said if given), "")
