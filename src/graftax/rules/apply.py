"""Rules against two checkpoints: entries for what they settle, failures for what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from graftax.errors import Failure, GraftaxError, LayoutError, RulesError, escape
from graftax.ops import Drop, Fill, Op, Specs, bind_chain, infer_chain, invert_chain
from graftax.plans import Assumption, Entry, Proposal
from graftax.rules.chain import Case, Chain, build_chain, positions
from graftax.rules.flatten import NO_TAIL, Tail, conv_tail
from graftax.rules.grouping import Ends, Group, find_groups, folded, render_there, resolve
from graftax.rules.layout import role_of
from graftax.rules.model import LIST, Rule
from graftax.rules.template import KeyIndex, Template, parse_template
from graftax.tree import Checkpoint, Module, Side, TensorSpec, nearest

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
                other = claimed.setdefault(key, rule)
                if other is not rule:
                    text = f"is named by {other.where} and by {rule.where}"
                    out.append(Failure(text, label, key, next="A key stands in one rule: narrow one of the two."))
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
            ends.failures.append(_no_match(rule, template, index, label))
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


def _no_match(rule: Rule, template: Template, index: KeyIndex, label: str) -> Failure:
    near = nearest(template.text, index.keys)
    hint = f"Near: {near}. " if near else ""
    return Failure(f"matches no key of {escape(label)}", label, template.text, next=f"{hint}Check {rule.where}.")


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
        text = f"names torch and flax keys, and both ends are {ends.sides[0]}"
        ends.failures.append(Failure(text, key=rule.where, next="Write `source` and `target` there."))
        return
    left_side, right_side = ends.sides if forward else ends.sides[::-1]
    left, right = rule.templates(left_side, right_side)
    here, there = (left, right) if forward else (right, left)
    here = resolve(here, ends.source_index, ends.sides[0])
    if ends.like_index is not None:
        there = resolve(there, ends.like_index, ends.sides[1])
    joined = Ends(here, there, ends.source_index, ends.like_index, ends.source.label, ends.like_label)
    groups, failures = find_groups(rule, joined)
    ends.failures += failures
    build = _Builder(rule, ends, joined, forward)
    for group in groups:
        build.add(group)
    for text, targets in build.assumed.items():
        ends.assumptions.append(Assumption(text, CHECK, tuple(targets)))


def _left_is_source(rule: Rule, ends: _Ends) -> bool | None:
    """The left side of the rule is the source of this port; None where the rule names another kind of port."""
    if rule.directional:
        return True
    if ends.sides == ("torch", "flax"):
        return True
    return False if ends.sides == ("flax", "torch") else None


class _Builder:
    """The entries of one rule. Groups of equal shapes share their ops."""

    __slots__ = ("assumed", "chains", "ends", "forward", "joined", "listed", "rule", "sides", "stacked")

    def __init__(self, rule: Rule, ends: _Ends, joined: Ends, forward: bool) -> None:
        self.rule, self.ends, self.joined, self.forward = rule, ends, joined, forward
        self.sides: tuple[Side, Side] = ends.sides if forward else (ends.sides[1], ends.sides[0])
        self.listed = LIST in rule.stack or (rule.ops is not None and LIST in rule.ops.placed)
        self.stacked = tuple(name for name in (*rule.left_indices, *rule.right_indices)
                             if (name in rule.left_indices) != (name in rule.right_indices))  # fmt: skip
        self.chains: dict[object, Chain | LayoutError] = {}
        self.assumed: dict[str, list[str]] = {}

    def add(self, group: Group) -> None:
        """The group's entry, or the failure that says why there is none."""
        rule, ends = self.rule, self.ends
        try:
            fault = self._count_there(group)
            if fault is not None:
                ends.failures.append(fault)
                return
            chain = self._chain(group)
            sources = group.here.ordered(chain.order, len(self.joined.here))
            targets = group.there.ordered(chain.order, len(self.joined.there))
            ops, given = self._bound(chain, sources, targets)
        except GraftaxError as error:
            sources = group.here.ordered((), len(self.joined.here))
            targets = group.there.ordered((), len(self.joined.there)) if group.there.found else ()
            self._refuse(str(error).partition("\n")[0], sources, targets)
            return
        clash = ends.claim(rule, sources, targets)
        entry = Entry(sources, targets, ops, (rule.evidence, *chain.evidence))
        if clash:
            ends.failures += clash
            return
        ends.entries.append(entry)
        if ends.like is None:
            ends.targets.update(zip(targets, given, strict=True))
        for text in chain.assumes:
            self.assumed.setdefault(f"{_some(entry.sources if self.forward else targets)} is {text}", []).extend(
                targets
            )

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

    def _chain(self, group: Group) -> Chain:
        left, right = (group.here, group.there) if self.forward else (group.there, group.here)
        counts = {**left.counts(), **right.counts()}
        if self.listed:
            counts[LIST] = max(len(self.rule.left), len(self.rule.right))
        keys = left.first(len(self.rule.left)), right.first(len(self.rule.right))
        ends = (self.ends.source, self.ends.like) if self.forward else (self.ends.like, self.ends.source)
        shapes = tuple(
            None if end is None else tuple(end[key].shape for key in names)
            for end, names in zip(ends, keys, strict=True)
        )
        roles = tuple(tuple(role_of(key, side) for key in names) for names, side in zip(keys, self.sides, strict=True))
        modules = self._modules(keys)
        at = (shapes, tuple(counts.items()), roles, tuple(map(id, modules)))
        case = Case(shapes[0], shapes[1], counts, roles[0], roles[1], self.sides, modules, self._tail())
        known = self.chains.get(at)
        if known is None:
            try:
                known = build_chain(self.rule, case)
            except LayoutError as error:
                known = error
            self.chains[at] = known
        if isinstance(known, LayoutError):
            raise known
        return known

    def _modules(self, keys: tuple[tuple[str, ...], tuple[str, ...]]) -> tuple[Module | None, Module | None]:
        """The live modules of the first keys, where those hold them under the same role."""
        holders = self.ends.holders if self.forward else self.ends.holders[::-1]
        out: list[Module | None] = []
        for names, side, held in zip(keys, self.sides, holders, strict=True):
            module = held.get(names[0])
            out.append(module if module and module.leaves.get(role_of(names[0], side)) == names[0] else None)
        return out[0], out[1]

    def _tail(self) -> Tail:
        if not self.rule.flatten:
            return NO_TAIL
        if self.forward not in self.ends.tails:
            ends = (self.ends.source, self.ends.like) if self.forward else (self.ends.like, self.ends.source)
            end, side = (ends[0], self.sides[0]) if ends[0] is not None else (ends[1], self.sides[1])
            self.ends.tails[self.forward] = conv_tail(end.specs if end is not None else {}, side)
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

    def _refuse(self, text: str, sources: Sequence[str], targets: Sequence[str]) -> None:
        self.ends.claim(self.rule, sources, targets)
        self.ends.broken.append(Entry(tuple(sources), tuple(targets), (), (self.rule.evidence,)))
        key = f"{_some(sources)} -> {_some(targets) or ', '.join(self.rule.right if self.forward else self.rule.left)}"
        self.ends.failures.append(
            Failure(text, self.ends.source.label, key, next=f"Check {_culprit(self.rule)}{self.rule.where}.")
        )


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
