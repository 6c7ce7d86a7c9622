"""Apply rules to two checkpoints: entries for what the rules settle, failures for what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from graftax.errors import Failure, RulesError
from graftax.ops import Drop, Fill
from graftax.plans import PARITY, Assumption, Entry, Proposal
from graftax.rules.build import Builder
from graftax.rules.grouping import Joined, find_groups, folded, no_match, resolve
from graftax.rules.model import Rule
from graftax.rules.state import Named, RuleEnd, RuleState, Unlaid
from graftax.rules.template import parse_template
from graftax.tree import Checkpoint, Side, TensorSpec


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
    ends = RuleState(RuleEnd.of(source_side, source), RuleEnd.of(like_side, like))
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


# ---------------------------------------------------------------- rules of one side


def _one_sided(rule: Rule, ends: RuleState) -> None:
    """Apply drop, fill and missing to the end that has the keys of the rule."""
    on_source = _on_source(rule, ends)
    if on_source is None:
        word = rule.words[0] if rule.left else rule.words[1]
        ends.failures.append(Failure(f"names {word} keys, but neither end is {word}", key=rule.where))
        return
    if rule.fill is None and not (rule.drop if on_source else rule.missing):
        return
    end = ends.source if on_source else ends.like
    if end.index is None:
        text = "has no shape without a `like`"
        ends.failures.append(Failure(text, key=(rule.left or rule.right)[0], next=f"Leave {rule.where} out."))
        return
    for template in resolve([parse_template(text, end.side) for text in rule.left or rule.right], end):
        keys = [key for key, _ in end.index.find(template, rule.ranges)]
        if not keys and not (rule.drop and not on_source):
            ends.failures.append(no_match(rule, template, end))
        for key in keys:
            _settle(rule, ends, key, on_source)


def _on_source(rule: Rule, ends: RuleState) -> bool | None:
    """True if the rule names keys of the source, False for keys of like, None if for neither end."""
    if rule.directional:
        return bool(rule.left)
    side: Side = "torch" if rule.left else "flax"
    here = [end.side == side for end in (ends.source, ends.like)]
    if all(here):
        return bool(rule.drop)
    return here[0] if any(here) else None


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
    elif ends.like.tree is not None:
        spec = ends.like.tree[key]
        op = Fill(rule.fill or 0.0, spec.shape, spec.dtype, rule.drop or rule.evidence)
        ends.entries.append(Entry((), (key,), (op,), (rule.evidence,)))


# ---------------------------------------------------------------- rules of both sides


def _pair(rule: Rule, ends: RuleState) -> None:
    forward = _left_is_source(rule, ends)
    if forward is None:
        text, other = f"names torch and flax keys, but both ends are {ends.source.side}", "`source` and `target`"
        if rule.directional:
            text, other = (
                "names source and target, but this port is Flax to torch",
                "`torch` and `flax`: both ways work",
            )
        ends.failures.append(Failure(text, key=rule.where, next=f"Write {other}."))
        return
    sides = (ends.source.side, ends.like.side)
    templates = rule.templates(*(sides if forward else sides[::-1]))
    here, there = templates if forward else templates[::-1]
    joined = Joined(resolve(here, ends.source), resolve(there, ends.like), ends.source, ends.like)
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
    source, like = ends.source.side, ends.like.side
    if (source, like) == ("torch", "flax") or (rule.directional and source == like):
        return True
    return False if not rule.directional and source != like else None
