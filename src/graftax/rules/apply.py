"""Apply rules to two checkpoints: entries for what the rules settle, failures for what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from graftax.errors import Failure, RulesError
from graftax.ops import Drop, Fill
from graftax.plans import PARITY, Assumption, Entry, Proposal
from graftax.rules.build import Builder
from graftax.rules.grouping import RuleEnds, find_groups, folded, no_match, resolve
from graftax.rules.model import Rule
from graftax.rules.state import Named, RuleState, Unlaid
from graftax.rules.template import KeyIndex, Template, parse_template
from graftax.tree import Checkpoint, Module, Side, TensorSpec


@dataclass(frozen=True, slots=True)
class RuleOutcome:
    """What the rules settle. proposal: entries from source to like, failures, and the keys that these concern
    (`broken`); missing: the policy of every leaf of like that a rule names; targets: what comes out if there is no
    like; named: what silent rules pair; unlaid: what they pair without the layout that it needs."""

    proposal: Proposal
    missing: Mapping[str, str] = field(default_factory=dict[str, str])
    targets: Mapping[str, TensorSpec] = field(default_factory=dict[str, TensorSpec])
    named: tuple[Named, ...] = ()
    unlaid: tuple[Unlaid, ...] = ()


def apply_rules(
    rules: Iterable[Rule], source: Checkpoint, like: Checkpoint | None, source_side: Side, like_side: Side
) -> RuleOutcome:
    """What `rules` settle for `source` -> `like`. Nothing is raised: what does not fit is a failure of the proposal."""
    rules = list(rules)
    if not rules:
        return RuleOutcome(Proposal())  # no keys are indexed
    ends = RuleState(
        source,
        like,
        (source_side, like_side),
        KeyIndex(source),
        KeyIndex(like) if like is not None else None,
        (_holders(source), _holders(like)),
    )
    ends.order |= {id(rule): place for place, rule in enumerate(rules)}
    unlaid: list[Unlaid] = []
    for rule in sorted(rules, key=lambda rule: rule.silent):  # a rule with a layout settles keys before a silent rule
        before = len(ends.failures)
        try:
            if rule.one_sided:
                _one_sided(rule, ends)
            else:
                _pair(rule, ends)
        except RulesError as error:  # its text is no template on this side
            ends.failures.append(Failure(str(error), key=rule.where))
        ends.failures[before:] = folded(ends.failures[before:])
        if ends.guessed:
            unlaid.append(Unlaid(rule, tuple(ends.guessed), tuple(ends.failures[before:])))
            ends.guessed.clear()
    if like_side == "flax":
        ends.failures += _nested(ends.targets)
    proposal = Proposal(tuple(ends.entries), (), tuple(ends.assumptions), tuple(ends.failures), (), tuple(ends.broken))
    return RuleOutcome(proposal, ends.missing, ends.targets, tuple(ends.named), tuple(unlaid))


def _nested(targets: Mapping[str, TensorSpec]) -> list[Failure]:
    """A failure for every leaf that would also be a folder of leaves, if the rules alone make the tree."""
    folders = {path[:place] for path in targets for place, char in enumerate(path) if char == "/"}
    return [
        Failure("would be a leaf and a subtree", "the rules", path, next="Give it another name.")
        for path in targets
        if path in folders
    ]


def _holders(end: Checkpoint | None) -> dict[str, Module]:
    """Leaf -> the live module that holds it."""
    modules = end.live.modules.values() if end is not None else ()
    return {path: module for module in modules for path in module.leaves.values()}


# ---------------------------------------------------------------- rules of one side


def _one_sided(rule: Rule, ends: RuleState) -> None:
    """Apply drop, fill and missing to the end that has the keys of the rule."""
    on_source = _on_source(rule, ends)
    if on_source is None:
        word = rule.words[0] if rule.left else rule.words[1]
        ends.failures.append(Failure(f"names {word} keys, but neither end is {word}", key=rule.where))
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


def _on_source(rule: Rule, ends: RuleState) -> bool | None:
    """True if the rule names keys of the source, False for keys of like, None if for neither end."""
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


def _settle(rule: Rule, ends: RuleState, key: str, on_source: bool) -> None:
    if rule.missing:  # a policy for unfilled leaves, which claims no key
        ends.missing.setdefault(key, rule.missing)
        return
    clash = ends.claim(rule, [key] if on_source else [], [] if on_source else [key])
    if clash:
        ends.failures += clash
        return
    if on_source:
        reason = rule.drop or f"filled with {rule.fill or 0:g} on the way back"
        ends.entries.append(Entry((key,), (), (Drop(reason, fill=rule.fill),), (rule.evidence,)))
    elif ends.like is not None:
        spec = ends.like[key]
        op = Fill(rule.fill or 0.0, spec.shape, spec.dtype, rule.drop or rule.evidence)
        ends.entries.append(Entry((), (key,), (op,), (rule.evidence,)))


# ---------------------------------------------------------------- rules of both sides


def _pair(rule: Rule, ends: RuleState) -> None:
    forward = _left_is_source(rule, ends)
    if forward is None:
        text, other = f"names torch and flax keys, but both ends are {ends.sides[0]}", "`source` and `target`"
        if rule.directional:
            text, other = (
                "names source and target, but this port is Flax to torch",
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
    joined = RuleEnds(here, there, ends.source_index, ends.like_index, ends.source.label, ends.like_label)
    found = find_groups(rule, joined)
    ends.failures += found.failures
    for sources, targets in found.broken:
        ends.claim(rule, sources, targets)
        ends.broken.append(Entry(sources, targets, (), (rule.evidence,)))
    build = Builder(rule, ends, joined, forward)
    for group in found.groups:
        build.add(group)
    for text, targets in build.assumed.items():
        ends.assumptions.append(Assumption(text, PARITY, tuple(targets)))


def _left_is_source(rule: Rule, ends: RuleState) -> bool | None:
    """True if the left side of the rule is the source of this port; None if the rule names another kind of port."""
    if ends.sides == ("torch", "flax") or (rule.directional and ends.sides[0] == ends.sides[1]):
        return True
    return False if not rule.directional and ends.sides == ("flax", "torch") else None
