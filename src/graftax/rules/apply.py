"""Rules against two checkpoints: entries for what they settle, failures for what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from graftax.errors import Failure, GraftaxError, LayoutError, RulesError, escape
from graftax.ops import Drop, Fill, Op, Specs, bind_chain, infer_chain, invert_chain
from graftax.plans import Assumption, Entry, Proposal
from graftax.rules.chain import Case, Chain, build_chain, positions
from graftax.rules.flatten import NO_TAIL, Tail, conv_tail
from graftax.rules.grouping import Ends, Group, find_groups, folded, no_match, render_there, resolve
from graftax.rules.layout import role_of
from graftax.rules.model import LIST, Rule
from graftax.rules.template import SEPARATOR, KeyIndex, Template, parse_template
from graftax.tree import Checkpoint, Module, Side, TensorSpec

_NO_MODULES: tuple[Module | None, ...] = (None, None)
CHECK = "compare the outputs of both models on the same input"


@dataclass(frozen=True, slots=True)
class RuleOutcome:
    """What the rules settle: entries from source to like, failures and the keys that they concern (`proposal.broken`);
    missing: policy of every leaf of like that a rule names; targets: what comes out, where there is no like."""

    proposal: Proposal
    missing: Mapping[str, str] = field(default_factory=dict[str, str])
    targets: Mapping[str, TensorSpec] = field(default_factory=dict[str, TensorSpec])


@dataclass(slots=True)
class _Ends:
    """Both ends of the port, and what the rules have made of them so far."""

    source: Checkpoint
    like: Checkpoint | None
    sides: tuple[Side, Side]
    source_index: KeyIndex
    like_index: KeyIndex | None
    holders: tuple[Mapping[str, Module], Mapping[str, Module]]
    tails: dict[bool, Tail] = field(default_factory=dict[bool, Tail])
    entries: list[Entry] = field(default_factory=list[Entry])
    broken: list[Entry] = field(default_factory=list[Entry])
    failures: list[Failure] = field(default_factory=list[Failure])
    assumptions: list[Assumption] = field(default_factory=list[Assumption])
    missing: dict[str, str] = field(default_factory=dict[str, str])
    targets: dict[str, TensorSpec] = field(default_factory=dict[str, TensorSpec])
    claimed: tuple[dict[str, Rule], dict[str, Rule]] = field(default_factory=lambda: ({}, {}))

    @property
    def like_label(self) -> str:
        return self.like.label if self.like is not None else "the rules"

    def claim(self, rule: Rule, sources: Iterable[str], targets: Iterable[str]) -> list[Failure]:
        """Note who speaks for these keys; a failure for each that another rule, or this one, has already."""
        out: list[Failure] = []
        for keys, claimed, label in (
            (sources, self.claimed[0], self.source.label),
            (targets, self.claimed[1], self.like_label),
        ):
            for key in keys:
                other = claimed.get(key)
                claimed[key] = rule if other is None else other
                if other is not None:
                    text, hint = f"is named by {other.where} and by {rule.where}", "narrow one of the two"
                    if other is rule:
                        text, hint = f"is named twice by {rule.where}", "name it once"
                    out.append(Failure(text, label, key, next=f"A key stands in one entry: {hint}."))
        return out


def apply_rules(
    rules: Iterable[Rule], source: Checkpoint, like: Checkpoint | None, source_side: Side, like_side: Side
) -> RuleOutcome:
    """What `rules` say about `source` -> `like`. Nothing is raised: what does not fit is a failure of the proposal."""
    ends = _Ends(
        source,
        like,
        (source_side, like_side),
        KeyIndex(source),
        KeyIndex(like) if like is not None else None,
        (_holders(source), _holders(like)),
    )
    for rule in rules:
        before = len(ends.failures)
        try:
            if rule.one_sided:
                _one_sided(rule, ends)
            else:
                _pair(rule, ends)
        except RulesError as error:  # a template that is none on this side
            ends.failures.append(Failure(str(error), key=rule.where))
        ends.failures[before:] = folded(ends.failures[before:])
    proposal = Proposal(tuple(ends.entries), (), tuple(ends.assumptions), tuple(ends.failures), (), tuple(ends.broken))
    return RuleOutcome(proposal, ends.missing, ends.targets)


def _holders(end: Checkpoint | None) -> dict[str, Module]:
    """Leaf -> the live module that holds it."""
    modules = end.modules.values() if end is not None else ()
    return {path: module for module in modules for path in module.leaves.values()}


# ---------------------------------------------------------------- rules of one side


def _one_sided(rule: Rule, ends: _Ends) -> None:
    """drop, fill and missing: they act where their key is on the end that they are about."""
    on_source = _on_source(rule, ends)
    if on_source is None:
        word = rule.words[0] if rule.left else rule.words[1]
        ends.failures.append(Failure(f"is about {word} keys, and neither end is {word}", key=rule.where))
        return
    if on_source and not (rule.drop or rule.fill is not None):
        return
    if not on_source and rule.fill is None and not rule.missing:
        return
    side = ends.sides[0 if on_source else 1]
    index = ends.source_index if on_source else ends.like_index
    label = ends.source.label if on_source else ends.like_label
    if index is None:
        text = "has no shape without a `like`"
        ends.failures.append(Failure(text, key=(rule.left or rule.right)[0], next=f"Leave {rule.where} out."))
        return
    templates = resolve([parse_template(text, side) for text in rule.left or rule.right], index, side)
    for template in templates:
        keys = list(_within(rule, template, index))
        if not keys and not (rule.drop and not on_source):
            ends.failures.append(no_match(rule, template, index, label))
        for key in keys:
            _settle(rule, ends, key, on_source)


def _on_source(rule: Rule, ends: _Ends) -> bool | None:
    """The rule is about keys of the source; None where it is about neither end."""
    if rule.directional:
        return bool(rule.left)
    side: Side = "torch" if rule.left else "flax"
    here = [end == side for end in ends.sides]
    if all(here):
        return bool(rule.drop)
    return here[0] if any(here) else None


def _within(rule: Rule, template: Template, index: KeyIndex) -> Iterable[str]:
    for key, binding in index.find(template):
        numbers = dict(zip(template.names, binding.numbers, strict=True))
        if all(numbers[name] in allowed for name, allowed in rule.ranges.items() if name in numbers):
            yield key


def _settle(rule: Rule, ends: _Ends, key: str, on_source: bool) -> None:
    clash = ends.claim(rule, [key] if on_source else [], [] if on_source else [key])
    if clash:
        ends.failures += clash
        return
    fill = rule.fill or 0.0
    if on_source:
        reason = rule.drop or f"filled with {fill:g} on the way back"
        ends.entries.append(Entry((key,), (), (Drop(reason, fill=fill),), (rule.evidence,)))
    elif rule.missing:
        ends.missing[key] = rule.missing
    elif ends.like is not None:
        spec = ends.like[key]
        op = Fill(fill, spec.shape, spec.dtype, rule.drop or rule.evidence)
        ends.entries.append(Entry((), (key,), (op,), (rule.evidence,)))


# ---------------------------------------------------------------- rules of both sides


def _pair(rule: Rule, ends: _Ends) -> None:
    forward = _left_is_source(rule, ends)
    if forward is None:
        text, other = f"names torch and flax keys, and both ends are {ends.sides[0]}", "`source` and `target`"
        if rule.directional:
            text, other = (
                "names source and target, and this port is Flax to torch",
                "`torch` and `flax`: both ways work",
            )
        ends.failures.append(Failure(text, key=rule.where, next=f"Write {other}."))
        return
    left_side, right_side = ends.sides if forward else ends.sides[::-1]
    left, right = rule.templates(left_side, right_side)
    here, there = (left, right) if forward else (right, left)
    here = resolve(here, ends.source_index, ends.sides[0])
    if ends.like_index is not None:
        there = resolve(there, ends.like_index, ends.sides[1])
    joined = Ends(here, there, ends.source_index, ends.like_index, ends.source.label, ends.like_label)
    found = find_groups(rule, joined)
    ends.failures += found.failures
    for sources, targets in found.broken:
        ends.claim(rule, sources, targets)
        ends.broken.append(Entry(sources, targets, (), (rule.evidence,)))
    build = _Builder(rule, ends, joined, forward)
    for group in found.groups:
        build.add(group)
    for text, targets in build.assumed.items():
        ends.assumptions.append(Assumption(text, CHECK, tuple(targets)))


def _left_is_source(rule: Rule, ends: _Ends) -> bool | None:
    """The left side of the rule is the source of this port; None where the rule names another kind of port."""
    if ends.sides == ("torch", "flax") or (rule.directional and ends.sides[0] == ends.sides[1]):
        return True
    return False if not rule.directional and ends.sides == ("flax", "torch") else None


Pair = tuple[tuple[str, ...], ...]
"""Something for each template of the left and of the right side."""


@dataclass(frozen=True, slots=True)
class _Made:
    """What groups of equal shapes share: ops from source to like, the specs that come out, the order of the stacked
    keys."""

    ops: tuple[Op, ...]
    given: Specs
    order: tuple[str, ...]
    evidence: tuple[str, ...]
    assumes: tuple[str, ...]


class _Builder:
    """The entries of one rule. Groups of equal shapes share their ops."""

    __slots__ = ("assumed", "ends", "fixed", "forward", "joined", "listed", "made", "roles", "rule", "sides", "stacked")

    def __init__(self, rule: Rule, ends: _Ends, joined: Ends, forward: bool) -> None:
        self.rule, self.ends, self.joined, self.forward = rule, ends, joined, forward
        self.sides: tuple[Side, Side] = ends.sides if forward else (ends.sides[1], ends.sides[0])
        self.listed = LIST in rule.stack or (rule.ops is not None and LIST in rule.ops.placed)
        self.stacked = tuple(name for name in (*rule.left_indices, *rule.right_indices)
                             if (name in rule.left_indices) != (name in rule.right_indices))  # fmt: skip
        ends_of = (joined.here, joined.there) if forward else (joined.there, joined.here)
        self.roles = tuple(
            tuple(_fixed_role(template, side) for template in templates)
            for templates, side in zip(ends_of, self.sides, strict=True)
        )
        self.fixed = all(role for known in self.roles for role in known)
        self.made: dict[object, _Made | LayoutError] = {}
        self.assumed: dict[str, list[str]] = {}

    def add(self, group: Group) -> None:
        """The group's entry, or the failure that says why there is none."""
        rule, ends = self.rule, self.ends
        fault = self._count_there(group)
        if fault is not None:
            ends.failures.append(fault)
            ends.broken.append(Entry(group.here.all, group.there.all, (), (rule.evidence,)))
            return
        try:
            made = self._made(group)
        except GraftaxError as error:
            self._refuse(error, group.here.all, group.there.all)
            return
        sources = group.here.ordered(made.order, len(self.joined.here))
        targets = group.there.ordered(made.order, len(self.joined.there))
        clash = ends.claim(rule, sources, targets)
        if clash:
            ends.failures += clash
            return
        ends.entries.append(Entry(sources, targets, made.ops, made.evidence))
        if ends.like is None:
            ends.targets.update(zip(targets, made.given, strict=True))
        for text in made.assumes:
            names = sources if self.forward else targets
            self.assumed.setdefault(f"{_some(names)} is {text}", []).extend(targets)

    def _made(self, group: Group) -> _Made:
        """The ops of a group; groups of equal specs, roles and modules share them. LayoutError."""
        left, right = (group.here, group.there) if self.forward else (group.there, group.here)
        source, like = self.ends.source.specs, self.ends.like
        keys = left.first(len(self.rule.left)), right.first(len(self.rule.right))
        roles = self.roles
        if not self.fixed:
            roles = tuple(
                tuple(fixed or role_of(key, side) for fixed, key in zip(known, names, strict=True))
                for known, names, side in zip(self.roles, keys, self.sides, strict=True)
            )
        modules = self._modules(keys, roles)
        at: object
        if len(group.here.found) == len(group.there.found) == 1:
            shape = None if like is None else like.specs[keys[1 if self.forward else 0][0]].shape
            at = (source[keys[0 if self.forward else 1][0]], shape, roles, modules and tuple(map(id, modules)))
        else:
            wanted = () if like is None else ((at, like.specs[key].shape) for at, key in group.there.found.items())
            given = tuple((at, source[key]) for at, key in group.here.found.items())
            at = (given, tuple(wanted), len(group.there.found), roles, tuple(map(id, modules)))
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

    def _count_there(self, group: Group) -> Failure | None:
        """Where the other side has to be made up, the stacked axis says how many keys it gets."""
        there = group.there
        if len(there.values) == len(there.names):
            return None
        shape = self.ends.source[group.here.first(len(self.joined.here))[0]].shape
        names = self.stacked + ((LIST,) if self.listed else ())
        axes = positions(self.rule, names, len(shape))
        for name in there.names:
            there.values.setdefault(name, tuple(range(shape[axes[name]])))
        return render_there(self.rule, self.joined, group)

    def _build(self, group: Group, keys: Pair, roles: Pair, modules: tuple[Module | None, ...]) -> _Made:
        left, right = (group.here, group.there) if self.forward else (group.there, group.here)
        counts = {**left.counts(), **right.counts()}
        if self.listed:
            counts[LIST] = max(len(self.rule.left), len(self.rule.right))
        ends = (self.ends.source, self.ends.like) if self.forward else (self.ends.like, self.ends.source)
        shapes = [
            None if end is None else tuple(end[key].shape for key in names)
            for end, names in zip(ends, keys, strict=True)
        ]
        case = Case(
            shapes[0], shapes[1], counts, roles[0], roles[1], self.sides, (modules[0], modules[1]), self._tail()
        )
        chain = build_chain(self.rule, case)
        sources = group.here.ordered(chain.order, len(self.joined.here))
        targets = group.there.ordered(chain.order, len(self.joined.there))
        ops, given = self._bound(chain, sources, targets)
        return _Made(ops, given, chain.order, (self.rule.evidence, *chain.evidence), chain.assumes)

    def _modules(self, keys: Pair, roles: Pair) -> tuple[Module | None, ...]:
        """The live modules of the first keys, where those hold them under the same role."""
        if not any(self.ends.holders):
            return _NO_MODULES
        holders = self.ends.holders if self.forward else self.ends.holders[::-1]
        out: list[Module | None] = []
        for names, parts, held in zip(keys, roles, holders, strict=True):
            module = held.get(names[0])
            out.append(module if module and module.leaves.get(parts[0]) == names[0] else None)
        return tuple(out)

    def _tail(self) -> Tail:
        if not self.rule.flatten:
            return NO_TAIL
        if self.forward not in self.ends.tails:
            left = self.ends.source if self.forward else self.ends.like
            end, side = (self.ends.source, self.ends.sides[0]) if left is None else (left, self.sides[0])
            self.ends.tails[self.forward] = conv_tail(end.specs, side)
        return self.ends.tails[self.forward]

    def _bound(self, chain: Chain, sources: Sequence[str], targets: Sequence[str]) -> tuple[tuple[Op, ...], Specs]:
        """The ops from source to like, bound, and the specs they give. LayoutError where the shapes do not come out."""
        given = tuple(self.ends.source[name] for name in sources)
        like = self.ends.like
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
        self.ends.broken.append(Entry(tuple(sources), tuple(targets), (), (self.rule.evidence,)))
        key = f"{_some(sources)} -> {_some(targets) or ', '.join(self.rule.right if self.forward else self.rule.left)}"
        text, hint = str(error).partition("\n")[0], f"Check {_culprit(self.rule)}{self.rule.where}."
        if error.failures:  # the layer table refuses, with a reason and often a rewrite
            text, hint = error.failures[0].what, f"{error.failures[0].next} {hint}".strip()
        self.ends.failures.append(Failure(text, self.ends.source.label, key, next=hint))


def _fixed_role(template: Template, side: Side) -> str:
    """The role that every key of the template has; '' where its last part varies."""
    last = template.pieces[-1]
    return role_of(last, side) if isinstance(last, str) and SEPARATOR[side] in last else ""


def _compare(found: Specs, wanted: Specs, names: Sequence[str]) -> None:
    if len(found) != len(wanted):
        raise LayoutError(f"the rule gives {len(found)} tensors for {len(wanted)} keys")
    for have, want, name in zip(found, wanted, names, strict=True):
        if have.shape != want.shape:
            raise LayoutError(f"{escape(name)} comes out as {have.shape}, not {want.shape}")


def _some(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _culprit(rule: Rule) -> str:
    """The key of the rule that most likely has to change."""
    said = (
        ("heads", rule.heads is not None and rule.fused != ""), ("flatten", rule.flatten), ("ops", rule.ops),
        ("stack", rule.stack), ("fused", rule.fused), ("layout", rule.layout), ("heads", rule.heads is not None),
        ("repeat", rule.repeat), ("pad", rule.pad),
    )  # fmt: skip
    return next((f"`{name}` in " for name, given in said if given), "")
