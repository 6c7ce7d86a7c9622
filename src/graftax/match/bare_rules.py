"""Rules that only state which leaves belong together: the layout of such a leaf is inferred or asked, as for any leaf.

A *silent* rule states no order and no layout. A *bare* rule is silent and pairs one leaf on each side, so that
inference can replace its entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from graftax.match.flatten import Suspect
from graftax.match.pairs import Label, Link, Scope
from graftax.ops import Op, Stack, Unstack, invert_chain
from graftax.plans import Candidate, Entry, Proposal, Question
from graftax.plans.names import fold_names
from graftax.rules import Rule, rule_line
from graftax.rules.chain import heads_fault
from graftax.rules.state import Named


@dataclass(frozen=True, slots=True)
class Said:
    """One pairing of a silent rule, torch -> Flax. ops: the ops that the rule guesses, or None if it guesses none."""

    torch: tuple[str, ...]
    flax: tuple[str, ...]
    ops: tuple[Op, ...] | None
    rule: Rule


def read_named(named: Iterable[Named], turned: bool) -> dict[str, Said]:
    """torch leaf -> the pairing. `turned`: the entries run Flax -> torch."""
    out: dict[str, Said] = {}
    for item in named:
        entry = item.entry
        torch, flax = (entry.targets, entry.sources) if turned else (entry.sources, entry.targets)
        ops = None if item.failure is not None else invert_chain(entry.ops) if turned else entry.ops
        out |= dict.fromkeys(torch, Said(torch, flax, ops, item.rule))
    return out


def left_open(link: Link, scope: Scope, anchors: Mapping[str, str], named: Mapping[str, Said]) -> Link | None:
    """The link with only the readings that the rules allow. None if the rules settle it, or pair its leaves in another
    way. A link that no rule is about stays as it is."""
    spoken = [path for paths in link.torch.paths.values() for path in paths if path in anchors]
    if not spoken:
        return link
    if any(path not in named or not named[path].rule.bare for path in spoken):
        return None
    to_flax = dict(scope.keys)
    labels = link.labels
    for key, paths in link.torch.paths.items():
        for said in (named[path] for path in paths if path in named):
            if said.torch != paths or said.flax != link.flax.paths.get(to_flax.get(key, ())):
                return None
            labels &= _as_said(link, said)
    return replace(link, labels=labels) if labels else None


def _as_said(link: Link, said: Said) -> frozenset[Label]:
    """The readings that use the stack axes and the heads that the rule names."""
    stacking = None if said.ops is None else _stacking(said.ops)
    out: set[Label] = set()
    for (label, _, right), chain in link.chains.items():
        if stacking is not None and _stacking(chain) != stacking:
            continue
        inner = [n for axis, n in enumerate(right) if axis not in {op.axis for op in chain if isinstance(op, Stack)}]
        if not heads_fault(said.rule, tuple(inner), chain):
            out.add(label)
    return frozenset(out)


def _stacking(ops: Iterable[Op]) -> tuple[Op, ...]:
    return tuple(op for op in ops if isinstance(op, (Stack, Unstack)))


# ---------------------------------------------------------------- back into the plan


def merged(known: Proposal, found: Proposal, named: Iterable[Named]) -> Proposal:
    """Both proposals as one. If inference settles the layout of a named leaf, or asks about it, the ops that the rule
    guessed are removed."""
    by_target = {entry.targets: i for i, entry in enumerate(found.entries)}
    asked = {name for question in found.questions for name in question.targets}
    entries = list(found.entries)
    gone: set[int] = set()
    keys: set[str] = set()
    for item in named:
        at = by_target.get(item.entry.targets)
        if at is not None:
            made = entries[at]
            entries[at] = Entry(made.sources, made.targets, made.ops, (item.rule.evidence, *made.evidence[1:]))
        elif not asked.issuperset(item.entry.targets):
            continue
        gone.add(id(item.entry))
        keys |= {item.failure.key} if item.failure is not None else set()
    kept = replace(
        known,
        entries=tuple(entry for entry in known.entries if id(entry) not in gone),
        broken=tuple(entry for entry in known.broken if id(entry) not in gone),
        failures=tuple(failure for failure in known.failures if failure.key not in keys),
    )
    return kept.joined(replace(found, entries=tuple(entries)))


# ---------------------------------------------------------------- a flatten that a rule does not mention


@dataclass(frozen=True, slots=True)
class Unsaid:
    """A leaf that a silent rule pairs, that inference has no reading of, and whose values may be a flattened map."""

    said: Said
    trap: Suspect
    matrix: bool


def unsaid_questions(unsaid: Sequence[Unsaid], turned: bool) -> list[Question]:
    """A question for each rule. Its candidates are the rule's line with the missing keys added."""
    groups: dict[int, list[Unsaid]] = {}
    for item in unsaid:
        groups.setdefault(id(item.said.rule), []).append(item)
    out: list[Question] = []
    for items in groups.values():
        torch = tuple(dict.fromkeys(name for item in items for name in item.said.torch))
        flax = tuple(dict.fromkeys(name for item in items for name in item.said.flax))
        targets, sources = (torch, flax) if turned else (flax, torch)
        trap, rule = items[0].trap, items[0].said.rule
        found: list[Candidate] = []
        for keys in trap.rule_keys(items[0].matrix):
            line = rule_line(**rule.table, **keys)
            found.append(Candidate(line, sources, "the values are a flattened map (C, H, W)"))
        plain = rule_line(**rule.table, layout="linear" if items[0].matrix else "identity")
        found.append(Candidate(plain, sources, "no map"))
        text = (
            f"{', '.join(fold_names(targets)[:4])}: {rule.where} does not say whether its {trap.width} values are a "
            f"flattened map of {trap.size}, and in which order"
        )
        out.append(Question("flatten", text, targets, sources, tuple(found)))
    return out
