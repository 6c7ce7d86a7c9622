"""The keys that a rule joins: the matches of its templates, grouped by the indices that both sides share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from graftax.errors import Failure, escape
from graftax.rules.model import LIST, Rule
from graftax.rules.template import KeyIndex, Template, Wilds
from graftax.tree import Side, nearest

Combo = tuple[int, ...]


@dataclass(slots=True)
class Keys:
    """One side of a group. `names`: the indices that only this side has; `values`: their values; `found`: the key of
    every template and combination."""

    names: tuple[str, ...] = ()
    values: dict[str, tuple[int, ...]] = field(default_factory=dict[str, "tuple[int, ...]"])
    found: dict[tuple[int, Combo], str] = field(default_factory=dict["tuple[int, Combo]", str])

    @property
    def all(self) -> tuple[str, ...]:
        """Every key, in the order of discovery."""
        return tuple(self.found.values())

    def counts(self) -> dict[str, int]:
        return {name: len(self.values[name]) for name in self.names}

    def ordered(self, order: Sequence[str], templates: int) -> tuple[str, ...]:
        """All keys: by the stacked names of `order`, outermost first. The tensors of a list are innermost, unless
        `order` holds the list."""
        if len(self.found) == 1:
            return tuple(self.found.values())
        names = [name for name in order if name in self.names or name == LIST]
        names += [LIST] if LIST not in names else []
        axes = [range(templates) if name == LIST else self.values[name] for name in names]
        out: list[str] = []
        for combo in product(*axes):
            at = dict(zip(names, combo, strict=True))
            out.append(self.found[(at[LIST], tuple(at[name] for name in self.names))])
        return tuple(out)

    def first(self, templates: int) -> tuple[str, ...]:
        """One key of every template."""
        if len(self.found) == 1:
            return tuple(self.found.values())
        combo = tuple(self.values[name][0] for name in self.names)
        return tuple(self.found[(t, combo)] for t in range(templates))


@dataclass(slots=True)
class KeyGroup:
    """Keys that belong together: shared indices and wildcards, and the keys of both sides. `there` stays empty if the
    rules alone describe that side and it has indices of its own."""

    numbers: Mapping[str, int]
    wilds: Wilds
    here: Keys
    there: Keys


@dataclass(frozen=True, slots=True)
class RuleEnds:
    """The two sides of a rule, the one whose keys are matched first and the other: templates, keys and labels."""

    here: tuple[Template, ...]
    there: tuple[Template, ...]
    here_index: KeyIndex
    there_index: KeyIndex | None
    here_label: str
    there_label: str


def resolve(templates: Sequence[Template], index: KeyIndex, side: Side) -> tuple[Template, ...]:
    """Flax templates with `params/` added if they match only in that collection: a rule may leave it out. A template
    that matches as it is, nowhere, or in other collections too is not changed."""
    if side != "flax" or "params" not in index.collections:
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
    broken: list[tuple[tuple[str, ...], tuple[str, ...]]] = field(
        default_factory=list["tuple[tuple[str, ...], tuple[str, ...]]"]
    )

    def fail(self, fault: Failure, here: Keys, there: Keys | None = None) -> None:
        self.failures.append(fault)
        self.broken.append((here.all, there.all if there is not None else ()))


def find_groups(rule: Rule, ends: RuleEnds) -> KeyGroups:
    """The groups of a rule, and every fault: a template without a match, a gap in the numbers, a key that the other
    side lacks."""
    here_names, there_names = _names(ends.here), _names(ends.there)
    shared = tuple(name for name in here_names if name in there_names)
    found = KeyGroups()
    matched, bare = _matched(rule, ends.here, ends.here_index, shared, here_names)
    if bare:
        found.failures += [no_match(rule, template, ends.here_index, ends.here_label) for template in bare]
        found.broken += [(keys.all, ()) for keys in matched.values()]
        return found
    if not matched:
        found.failures.append(_fault(rule, "no key is within its ranges", ends.here_label, ends.here[0].text))
        return found
    found.failures += _range_holes(rule, shared, matched, ends)
    for key, keys in matched.items():
        fault = _complete(rule, keys, ends.here, ends.here_label, ends.there_index is not None)
        if fault is None:
            found.groups.append(KeyGroup(dict(zip(shared, key[0], strict=True)), key[1], keys, Keys()))
        else:
            found.fail(fault, keys)
    _other_side(rule, ends, found, shared, there_names)
    return found


def _names(templates: Iterable[Template]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for template in templates for name in template.names))


def _matched(
    rule: Rule, templates: Sequence[Template], index: KeyIndex, shared: Sequence[str], names: Sequence[str]
) -> tuple[dict[tuple[Combo, Wilds], Keys], list[Template]]:
    """Keys by shared indices and wildcards, and the templates that match nothing."""
    own = tuple(name for name in names if name not in shared)
    ranges = {name: set(rule.ranges[name]) for name in names if name in rule.ranges}
    groups: dict[tuple[Combo, Wilds], Keys] = {}
    bare: list[Template] = []
    for t, template in enumerate(templates):
        hit = False
        for key, binding in index.find(template):
            hit = True
            numbers = dict(zip(template.names, binding.numbers, strict=True))
            if ranges and any(numbers[name] not in allowed for name, allowed in ranges.items()):
                continue
            at = (tuple(numbers[name] for name in shared), binding.wilds)
            keys = groups.get(at)
            if keys is None:
                keys = groups[at] = Keys(own)
            keys.found[(t, tuple(numbers[name] for name in own))] = key
        if not hit:
            bare.append(template)
    return groups, bare


def _complete(rule: Rule, keys: Keys, templates: Sequence[Template], label: str, known: bool) -> Failure | None:
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
            text = f"{name} = {_few(missing)} is missing among {name} = {seen[0]}..{seen[-1]}"
            return _fault(rule, text, label, example, f'Stack what is there: {name} = "a..b" in {rule.where}.')
        if not known and name not in rule.ranges and seen[0] != 0:
            hint = f'If that is all, write {name} = "{seen[0]}..{seen[-1]}" in {rule.where}.'
            return _fault(rule, f"{name} begins at {seen[0]}, not at 0", label, templates[0].text, hint)
        keys.values[name] = tuple(wanted)  # a list of numbers states their order, too
    for combo in product(*(keys.values[name] for name in keys.names)):
        for t, template in enumerate(templates):
            if (t, combo) not in keys.found:
                at = ", ".join(f"{name} = {n}" for name, n in zip(keys.names, combo, strict=True))
                what = f"no key for {at}" if at else "no such key"
                one = _example([template], keys, dict(zip(keys.names, combo, strict=True)))
                return _fault(rule, what, label, one, f"See {rule.where}.")
    return None


def _example(templates: Sequence[Template], keys: Keys, numbers: Mapping[str, int]) -> str:
    """The template's text, with the numbers that the message is about."""
    out = templates[0].text
    for name, number in numbers.items():
        out = out.replace("{" + name + "}", str(number))
    return out


def _few(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")


def _range_holes(
    rule: Rule, shared: Sequence[str], groups: Mapping[tuple[Combo, Wilds], Keys], ends: RuleEnds
) -> list[Failure]:
    """A failure for each number of a rule's range that no key has."""
    out: list[Failure] = []
    for place, name in enumerate(shared):
        if name in rule.ranges:
            seen = {key[0][place] for key in groups}
            missing = [n for n in rule.ranges[name] if n not in seen]
            if missing:
                text = f"{name} = {_few(missing)} has no key"
                out.append(_fault(rule, text, ends.here_label, ends.here[0].text, f"Check `{name}` in {rule.where}."))
    return out


# ---------------------------------------------------------------- the other side


def _other_side(rule: Rule, ends: RuleEnds, found: KeyGroups, shared: Sequence[str], names: Sequence[str]) -> None:
    """Add the keys of the other side to every group; remove groups that have none."""
    own = tuple(name for name in names if name not in shared)
    if own and ends.there_index is not None:
        _matched_there(rule, ends, found, shared, names)
        return
    groups, found.groups = found.groups, []
    for group in groups:
        group.there = Keys(own)
        for name in own:  # the stacked axis says how many, unless the rule does: apply.py fills them in
            if name in rule.ranges:
                group.there.values[name] = tuple(rule.ranges[name])
        fault = render_there(rule, ends, group) if len(group.there.values) == len(own) else None
        if fault is None:
            found.groups.append(group)
        else:
            found.fail(fault, group.here, group.there)


def render_there(rule: Rule, ends: RuleEnds, group: KeyGroup) -> Failure | None:
    """Render the keys of the other side for a group; a failure if a number is negative or a key does not exist."""
    there = group.there
    if not there.names and len(ends.there) == 1:
        key = ends.there[0].render(group.numbers, group.wilds)
        if key is not None and (ends.there_index is None or key in ends.there_index.order):
            there.found[(0, ())] = key
            return None
    for combo in product(*(there.values[name] for name in there.names)):
        numbers = {**group.numbers, **dict(zip(there.names, combo, strict=True))}
        for t, template in enumerate(ends.there):
            key = template.render(numbers, group.wilds)
            if key is None:
                at = ", ".join(f"{name} = {n}" for name, n in numbers.items())
                return _fault(rule, f"gives no key for {at}", ends.there_label, template.text, "")
            if ends.there_index is not None and key not in ends.there_index.order:
                near = nearest(key, ends.there_index.order)
                hint = f"Near: {near}. " if near else ""
                text = f"{escape(ends.there_label)} has no such key; {rule.where} sends {_first(group)} there"
                return _fault(rule, text, ends.there_label, key, f"{hint}Check {rule.where}.")
            there.found[(t, combo)] = key
    return None


def _first(group: KeyGroup) -> str:
    return escape(next(iter(group.here.found.values()), ""))


def _matched_there(rule: Rule, ends: RuleEnds, found: KeyGroups, shared: Sequence[str], names: Sequence[str]) -> None:
    """Match the keys of the other side too, because it has indices of its own."""
    assert ends.there_index is not None
    matched, bare = _matched(rule, ends.there, ends.there_index, shared, names)
    groups, found.groups = found.groups, []
    found.failures += [no_match(rule, template, ends.there_index, ends.there_label) for template in bare]
    for group in groups:
        there = matched.get((tuple(group.numbers[name] for name in shared), group.wilds))
        if bare:
            found.broken.append((group.here.all, there.all if there is not None else ()))
            continue
        if there is None:
            at = ", ".join(f"{name} = {n}" for name, n in group.numbers.items())
            text = f"no key of {escape(ends.there_label)} matches it" + (f" for {at}" if at else "")
            fault = _fault(rule, text, ends.there_label, ends.there[0].text, f"Check {rule.where}.")
        else:
            fault = _complete(rule, there, ends.there, ends.there_label, True)
        if fault is not None:
            found.fail(fault, group.here, there)
        elif there is not None:
            group.there = there
            found.groups.append(group)


# ---------------------------------------------------------------- failures


def _fault(rule: Rule, what: str, label: str, key: str, hint: str = "") -> Failure:
    return Failure(what, label, key, next=hint or f"See {rule.where}.")


_NUMBER = re.compile(r"(?<!\{)\{[a-z_]\w*\}")


def no_match(rule: Rule, template: Template, index: KeyIndex, label: str) -> Failure:
    """The failure for a template that matches nothing; it lists near keys."""
    near = nearest(template.text, index.order)
    hint = f"Near: {near}. " if near else ""
    number = _NUMBER.search(template.text)
    if number is not None:
        hint += f"{number[0]} stands for a number; use * for any text in a part. "
    return _fault(rule, f"matches no key of {escape(label)}", label, template.text, f"{hint}Check {rule.where}.")


def folded(failures: Sequence[Failure], shown: int = 3) -> list[Failure]:
    """The first failures of one rule; the last of them says how many more there are."""
    if len(failures) <= shown:
        return list(failures)
    last = failures[shown - 1]
    more = f"(and {len(failures) - shown} more of this rule)"
    return [*failures[: shown - 1], replace(last, next=f"{last.next} {more}".strip())]
