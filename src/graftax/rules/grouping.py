"""The keys that a rule joins: the matches of its templates, grouped by the indices that both sides share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from graftax.errors import Failure, escape, some
from graftax.rules.model import LIST, Rule
from graftax.rules.state import RuleEnd
from graftax.rules.template import KeyIndex, Template, Wilds, index_names
from graftax.tree import nearest

Combo = tuple[int, ...]
Broken = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(slots=True)
class Keys:
    """One side of a group. `templates`: how many; `names`: the indices that only this side has; `values`: their values;
    `found`: the key of every template and combination."""

    templates: int
    names: tuple[str, ...] = ()
    values: dict[str, tuple[int, ...]] = field(default_factory=dict[str, "tuple[int, ...]"])
    found: dict[tuple[int, Combo], str] = field(default_factory=dict["tuple[int, Combo]", str])

    @property
    def all(self) -> tuple[str, ...]:
        """Every key, in the order of discovery."""
        return tuple(self.found.values())

    def counts(self) -> dict[str, int]:
        return {name: len(self.values[name]) for name in self.names}

    def ordered(self, order: Sequence[str]) -> tuple[str, ...]:
        """All keys: by the stacked names of `order`, outermost first. The tensors of a list are innermost, unless
        `order` holds the list."""
        if len(self.found) == 1:
            return tuple(self.found.values())
        names = [name for name in order if name in self.names or name == LIST]
        names += [LIST] if LIST not in names else []
        axes = [range(self.templates) if name == LIST else self.values[name] for name in names]
        out: list[str] = []
        for combo in product(*axes):
            at = dict(zip(names, combo, strict=True))
            out.append(self.found[(at[LIST], tuple(at[name] for name in self.names))])
        return tuple(out)

    def first(self) -> tuple[str, ...]:
        """One key of every template."""
        if len(self.found) == 1:
            return tuple(self.found.values())
        combo = tuple(self.values[name][0] for name in self.names)
        return tuple(self.found[(t, combo)] for t in range(self.templates))


@dataclass(slots=True)
class KeyGroup:
    """Keys that belong together: shared indices and wildcards, and the keys of both sides. `there` stays empty if the
    rules alone describe that side and it has indices of its own."""

    numbers: Mapping[str, int]
    wilds: Wilds
    here: Keys
    there: Keys


@dataclass(frozen=True, slots=True)
class Joined:
    """The templates of a rule on the end whose keys are matched first, and on the other."""

    here: tuple[Template, ...]
    there: tuple[Template, ...]
    source: RuleEnd
    like: RuleEnd


def resolve(templates: Sequence[Template], end: RuleEnd) -> tuple[Template, ...]:
    """Flax templates with `params/` added if they match only in that collection: a rule may leave it out. A template
    that matches as it is, nowhere, or in other collections too is not changed."""
    index = end.index
    if index is None or end.side != "flax" or "params" not in index.collections:
        return tuple(templates)
    return tuple(template if _hits(template, index) else _in_params(template, index) for template in templates)


def _hits(template: Template, index: KeyIndex) -> bool:
    return next(index.find(template), None) is not None


def _in_params(template: Template, index: KeyIndex) -> Template:
    found = [name for name in index.collections if _hits(template.with_prefix(f"{name}/"), index)]
    return template.with_prefix("params/") if found == ["params"] else template


@dataclass(slots=True)
class KeyGroups:
    """Groups in the order of the keys; failures, and the keys of either side that they concern."""

    groups: list[KeyGroup] = field(default_factory=list[KeyGroup])
    failures: list[Failure] = field(default_factory=list[Failure])
    broken: list[Broken] = field(default_factory=list[Broken])


def find_groups(rule: Rule, ends: Joined) -> KeyGroups:
    """The groups of a rule, and every fault: a template without a match, a gap in the numbers, a key that the other
    side lacks."""
    here_names, there_names = index_names(ends.here), index_names(ends.there)
    shared = tuple(name for name in here_names if name in there_names)
    own = tuple(name for name in there_names if name not in shared)
    found = KeyGroups()
    known = ends.like.index is not None
    matched = _matched(rule, ends.here, ends.source, shared, found)
    theirs = _matched(rule, ends.there, ends.like, shared, found) if own and known else None
    if found.failures:
        found.broken += [(keys.all, ()) for keys in matched.values()]
        return found
    if not matched:
        found.failures.append(_fault(rule, "no key is within its ranges", ends.source, ends.here[0].text))
        return found
    found.failures += _range_holes(rule, shared, matched, ends)
    for key, here in matched.items():
        group = KeyGroup(dict(zip(shared, key[0], strict=True)), key[1], here, Keys(len(ends.there), own))
        fault = _complete(rule, here, ends.here, ends.source, known)
        if fault is None and theirs is not None:
            fault = _their_keys(rule, ends, group, theirs.get(key))
        elif fault is None:
            # The stacked axis says how many keys there are, unless the rule does: the builder renders those.
            group.there.values |= {name: tuple(rule.ranges[name]) for name in own if name in rule.ranges}
            fault = render_there(rule, ends, group) if len(group.there.values) == len(own) else None
        if fault is None:
            found.groups.append(group)
        else:
            found.failures.append(fault)
            found.broken.append((here.all, group.there.all))
    return found


def _their_keys(rule: Rule, ends: Joined, group: KeyGroup, there: Keys | None) -> Failure | None:
    """Give the group the keys that the templates of the other side match; a failure if one is missing."""
    if there is None:
        at = ", ".join(f"{name} = {n}" for name, n in group.numbers.items())
        text = f"no key of {escape(ends.like.label)} matches it" + (f" for {at}" if at else "")
        return _fault(rule, text, ends.like, ends.there[0].text, f"Check {rule.where}.")
    group.there = there
    return _complete(rule, there, ends.there, ends.like, True)


def _matched(
    rule: Rule, templates: Sequence[Template], end: RuleEnd, shared: Sequence[str], found: KeyGroups
) -> dict[tuple[Combo, Wilds], Keys]:
    """Keys by shared indices and wildcards. A template that matches nothing is a failure."""
    assert end.index is not None
    own = tuple(name for name in index_names(templates) if name not in shared)
    groups: dict[tuple[Combo, Wilds], Keys] = {}
    for t, template in enumerate(templates):
        if not _hits(template, end.index):
            found.failures.append(no_match(rule, template, end))
        for key, binding in end.index.find(template, rule.ranges):
            at = (tuple(binding.numbers[name] for name in shared), binding.wilds)
            keys = groups.setdefault(at, Keys(len(templates), own))
            keys.found[(t, tuple(binding.numbers[name] for name in own))] = key
    return groups


def _complete(rule: Rule, keys: Keys, templates: Sequence[Template], end: RuleEnd, known: bool) -> Failure | None:
    """The failure if a template lacks a key for some combination of the side's own indices. `known`: the shapes of the
    other side will show whether the first or last key is missing."""
    if not keys.names and len(templates) == 1:
        return None
    for place, name in enumerate(keys.names):
        seen = sorted({combo[place] for _, combo in keys.found})
        wanted = rule.ranges.get(name) or range(seen[0], seen[-1] + 1)
        missing = [n for n in wanted if n not in set(seen)]
        if missing:
            example = _example(templates, keys, {name: missing[0]})
            text = f"{name} = {some(missing, 5)} is missing among {name} = {seen[0]}..{seen[-1]}"
            return _fault(rule, text, end, example, f'Stack what is there: {name} = "a..b" in {rule.where}.')
        if not known and name not in rule.ranges and seen[0] != 0:
            hint = f'If that is all, write {name} = "{seen[0]}..{seen[-1]}" in {rule.where}.'
            return _fault(rule, f"{name} begins at {seen[0]}, not at 0", end, templates[0].text, hint)
        keys.values[name] = tuple(wanted)  # a list of numbers states their order, too
    for combo in product(*(keys.values[name] for name in keys.names)):
        for t, template in enumerate(templates):
            if (t, combo) not in keys.found:
                at = ", ".join(f"{name} = {n}" for name, n in zip(keys.names, combo, strict=True))
                what = f"no key for {at}" if at else "no such key"
                one = _example([template], keys, dict(zip(keys.names, combo, strict=True)))
                return _fault(rule, what, end, one, f"See {rule.where}.")
    return None


def _example(templates: Sequence[Template], keys: Keys, numbers: Mapping[str, int]) -> str:
    """The template's text, with the numbers that the message is about."""
    out = templates[0].text
    for name, number in numbers.items():
        out = out.replace("{" + name + "}", str(number))
    return out


def _range_holes(
    rule: Rule, shared: Sequence[str], groups: Mapping[tuple[Combo, Wilds], Keys], ends: Joined
) -> list[Failure]:
    """A failure for each number of a rule's range that no key has."""
    out: list[Failure] = []
    for place, name in enumerate(shared):
        if name in rule.ranges:
            seen = {key[0][place] for key in groups}
            missing = [n for n in rule.ranges[name] if n not in seen]
            if missing:
                text = f"{name} = {some(missing, 5)} has no key"
                out.append(_fault(rule, text, ends.source, ends.here[0].text, f"Check `{name}` in {rule.where}."))
    return out


def render_there(rule: Rule, ends: Joined, group: KeyGroup) -> Failure | None:
    """Render the keys of the other side for a group; a failure if a number is negative or a key does not exist."""
    there, index = group.there, ends.like.index
    for combo in product(*(there.values[name] for name in there.names)):
        numbers = {**group.numbers, **dict(zip(there.names, combo, strict=True))}
        for t, template in enumerate(ends.there):
            key = template.render(numbers, group.wilds)
            if key is None:
                at = ", ".join(f"{name} = {n}" for name, n in numbers.items())
                return _fault(rule, f"gives no key for {at}", ends.like, template.text, "")
            if index is not None and key not in index.order:
                near = nearest(key, index.order)
                hint = f"Near: {near}. " if near else ""
                sent = escape(group.here.all[0])
                text = f"{escape(ends.like.label)} has no such key; {rule.where} sends {sent} there"
                return _fault(rule, text, ends.like, key, f"{hint}Check {rule.where}.")
            there.found[(t, combo)] = key
    return None


# ---------------------------------------------------------------- failures


def _fault(rule: Rule, what: str, end: RuleEnd, key: str, hint: str = "") -> Failure:
    return Failure(what, end.label, key, next=hint or f"See {rule.where}.")


_NUMBER = re.compile(r"(?<!\{)\{[a-z_]\w*\}")


def no_match(rule: Rule, template: Template, end: RuleEnd) -> Failure:
    """The failure for a template that matches nothing; it lists near keys."""
    near = nearest(template.text, end.index.order if end.index is not None else ())
    hint = f"Near: {near}. " if near else ""
    number = _NUMBER.search(template.text)
    if number is not None:
        hint += f"{number[0]} stands for a number; use * for any text in a part. "
    return _fault(rule, f"matches no key of {escape(end.label)}", end, template.text, f"{hint}Check {rule.where}.")


def folded(failures: Sequence[Failure], shown: int = 3) -> list[Failure]:
    """The first failures of one rule; the last of them says how many more there are."""
    if len(failures) <= shown:
        return list(failures)
    last = failures[shown - 1]
    more = f"(and {len(failures) - shown} more of this rule)"
    return [*failures[: shown - 1], replace(last, next=f"{last.next} {more}".strip())]
