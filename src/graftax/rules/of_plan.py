"""A finished plan as rules without sizes, which port a larger model of the same code from files.

Every line is tried before it is written: it must make the very entries that it stands for. What no rule can say is a
comment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from graftax.errors import GraftaxError, escape
from graftax.ops import (
    Cast,
    Concat,
    Op,
    Rearrange,
    RearrangeEach,
    Reorder,
    Split,
    Stack,
    Unstack,
    apply_chain,
    bind_chain,
    parse_pattern,
)
from graftax.plans import Entry, Plan
from graftax.plans.names import NUMBER, fold_names
from graftax.plans.text import columns
from graftax.rules.apply import apply_rules
from graftax.rules.load import load_rules
from graftax.rules.template import escape_key
from graftax.rules.text import rule_line
from graftax.tree import Checkpoint, Side, TensorSpec

_INDICES = "lmnpqrs"
_TRIED = 1 << 22
"""Elements up to which two chains of ops are compared by what they do."""
Keys = dict[str, object]


def rule_lines_of(plan: Plan) -> list[str]:
    """A line for each column of the plan: a rule that makes it, with its evidence, or a comment."""
    writer = RuleWriter.of(plan)
    out: list[str] = []
    for _, group in columns(entry for entry in plan.entries if entry.targets and entry.sources and not entry.unfilled):
        lines = writer.lines(group)
        why = escape("; ".join(group[0].evidence), 160)
        if lines is None:
            out.append(f"  # no rule says this: {escape(group[0].text, 300)}   # {why}")
        else:
            out += [f"  {line},   # {why}" for line in lines]
    return out


@dataclass(frozen=True, slots=True)
class RuleWriter:
    """Writes entries from `source` to `like` as rules."""

    source: Checkpoint
    like: Checkpoint
    sides: tuple[Side, Side]

    @classmethod
    def of(cls, plan: Plan) -> RuleWriter:
        sides = plan.source.side, plan.like.side
        made_from = plan.made_from
        if made_from is not None and made_from.like is not None:
            return cls(made_from.source, made_from.like, sides)
        source, like = (
            Checkpoint(label=end.label, side=end.side, specs=dict(end.specs)) for end in (plan.source, plan.like)
        )
        return cls(source, like, sides)

    def lines(self, group: Sequence[Entry]) -> list[str] | None:
        """One line for the group, or one for each of its entries; None if no rule makes them."""
        together = self._line(group)
        if together is not None:
            return [together]
        each = [self._line([entry]) for entry in group] if len(group) > 1 else [None]
        found = [line for line in each if line is not None]
        return found if len(found) == len(each) else None

    def _line(self, group: Sequence[Entry]) -> str | None:
        names = _templates(group)
        if names is None:
            return None
        sources, targets, index = names
        words = ("source", "target") if self.sides[0] == self.sides[1] else self.sides
        ends: Keys = dict(zip(words, map(_one_or_list, (sources, targets)), strict=True))
        ops = tuple(op for op in group[0].ops if not isinstance(op, Cast))
        for keys in _forms(ops, index):
            line = rule_line(**ends, **keys)
            if self._makes(line, group):
                return line
        return None

    def _makes(self, line: str, group: Sequence[Entry]) -> bool:
        try:
            ruled = apply_rules(load_rules(line), self.source, self.like, *self.sides)
        except GraftaxError:
            return False
        made = {entry.targets: entry for entry in ruled.proposal.entries}
        if ruled.proposal.failures or ruled.named or len(made) != len(group):
            return False
        return all(entry.targets in made and self._alike(made[entry.targets], entry) for entry in group)

    def _alike(self, made: Entry, entry: Entry) -> bool:
        if made.sources != entry.sources:
            return False
        try:
            specs = tuple(self.source.specs[name] for name in entry.sources)
            one, other = (
                bind_chain(tuple(op for op in e.ops if not isinstance(op, Cast)), specs)[0] for e in (made, entry)
            )
        except (GraftaxError, KeyError):
            return False
        return one == other or self._same_elements(one, other, specs)

    @staticmethod
    def _same_elements(one: Sequence[Op], other: Sequence[Op], specs: Sequence[TensorSpec]) -> bool:
        """Do both put every element of the sources in the same place?"""
        import numpy as np

        if sum(spec.size for spec in specs) > _TRIED:
            return [_plain(op) for op in one] == [_plain(op) for op in other]
        ends = np.cumsum([0, *(spec.size for spec in specs)])
        arrays = tuple(
            np.arange(a, b, dtype=np.float64).reshape(spec.shape)
            for a, b, spec in zip(ends[:-1], ends[1:], specs, strict=True)
        )
        try:
            made = [apply_chain(tuple(ops), arrays) for ops in (one, other)]
        except GraftaxError:
            return False
        return len(made[0]) == len(made[1]) and all(map(np.array_equal, *made))


def _one_or_list(names: Sequence[str]) -> object:
    return list(names) if len(names) > 1 else "".join(names)


def _plain(op: Op) -> object:
    """An op without the names of its axes."""
    if not isinstance(op, Rearrange):
        return op
    names: dict[str, str] = {}
    sides = [
        [[names.setdefault(name, f"a{len(names)}") for name in group] for group in side]
        for side in parse_pattern(op.pattern)
    ]
    return str(sides), tuple(sorted((names.get(name, name), size) for name, size in op.sizes))


def _forms(ops: Sequence[Op], index: str) -> Iterator[Keys]:
    """What a rule may say of these ops, the shortest first."""
    last = ops[-1] if ops else None
    if isinstance(last, Stack) and index:
        for keys in _forms(ops[:-1], ""):
            yield keys | {"stack": {index: last.axis}}
        return
    if not ops:
        yield {"layout": "identity"}
        return
    if len(ops) == 1 and isinstance(ops[0], Rearrange):
        yield from _rearranged(ops[0])
        return
    at = next((i for i, op in enumerate(ops) if isinstance(op, Reorder)), 0)
    if at and isinstance(cut := ops[at - 1], Split) and isinstance(ops[at + 1], Concat):
        yield from _with_parts(cut, ops[at], (*ops[: at - 1], *ops[at + 2 :]))
        return
    how: Keys = {}
    rest = list(ops)
    if isinstance(rest[0], Split) or (rest and isinstance(rest[-1], Concat)):
        how = {"fused": "block"}
        rest = [op for op in rest if not isinstance(op, (Split, Concat))]
    elif len(rest) > 1 and isinstance(rest[1], Unstack) and isinstance(rest[0], Rearrange):
        sizes = dict(rest[0].sizes)
        how = {"fused": "interleaved", "heads": sizes.get("h", 0)}
        rest = rest[2:]
    if how and not rest:
        yield how
    elif how and len(rest) == 1 and isinstance(rest[0], Rearrange):
        yield how
        for keys in _rearranged(rest[0]):
            yield how | keys
    elif how and len(rest) == 1 and isinstance(rest[0], RearrangeEach):
        yield how


def _with_parts(cut: Split, move: Op, rest: Sequence[Op]) -> Iterator[Keys]:
    """Parts of a fused tensor in another order, and the layout beside."""
    assert isinstance(move, Reorder)
    names = [f"part{i}" for i in range(len(move.order))]
    one, other = " ".join(names), " ".join(names[i] for i in move.order)
    unit = math.gcd(*cut.sizes)
    shares = (
        {name: size // unit for name, size in zip(names, cut.sizes, strict=True)} if len(set(cut.sizes)) > 1 else {}
    )
    for said in (f"{one} -> {other}", f"{other} -> {one}"):  # a rule is written torch to Flax, a plan runs either way
        for keys in ({"layout": "linear"}, {"layout": "conv"}, *_forms(rest, "")):
            yield {"parts": said, **shares, **keys}


def _rearranged(op: Rearrange) -> Iterator[Keys]:
    yield {"ops": op.pattern}
    grouped = {name for side in parse_pattern(op.pattern) for group in side if len(group) > 1 for name in group}
    yield {"ops": op.pattern, **{name: size for name, size in op.sizes if name in grouped}}


def _templates(group: Sequence[Entry]) -> tuple[tuple[str, ...], tuple[str, ...], str] | None:
    """(templates of the sources, of the targets, the index that only the sources have: they are stacked)."""
    first = group[0]
    if len(group) == 1:
        every = list(first.sources)
        varies = len(every) > 1 and len(fold_names(every)) == 1
        if varies and any(isinstance(op, Stack) for op in first.ops):
            rows = [[int(n) for n in NUMBER.findall(name)] for name in every]
            places = [p for p, _ in enumerate(rows[0]) if len({row[p] for row in rows}) > 1]
            if len(places) == 1:
                return (
                    (_filled(every[0], {places[0]: _INDICES[0]}),),
                    tuple(map(escape_key, first.targets)),
                    _INDICES[0],
                )
        return tuple(map(escape_key, first.sources)), tuple(map(escape_key, first.targets)), ""
    sides = [[entry.sources for entry in group], [entry.targets for entry in group]]
    if any(len({len(names) for names in side}) > 1 for side in sides):
        return None
    series = _series(sides)
    if series is None:
        return None
    out: list[tuple[str, ...]] = []
    for side in sides:
        made: list[str] = []
        for place in range(len(side[0])):
            rows = [[int(n) for n in NUMBER.findall(names[place])] for names in side]
            marks: dict[int, str] = {}
            for p in range(len(rows[0])):
                values = tuple(row[p] for row in rows)
                if len(set(values)) > 1:
                    marks[p] = series[values]
            made.append(_filled(side[0][place], marks))
        out.append(tuple(made))
    return out[0], out[1], ""


def _series(sides: Sequence[Sequence[Sequence[str]]]) -> Mapping[tuple[int, ...], str] | None:
    """Each series of numbers that the names run through -> what a template says: l, or l+1."""
    found: dict[tuple[int, ...], str] = {}
    bases: list[tuple[tuple[int, ...], str]] = []
    every: list[tuple[int, ...]] = []
    for side in sides:
        for place in range(len(side[0])):
            rows = [[int(n) for n in NUMBER.findall(names[place])] for names in side]
            if len({len(row) for row in rows}) > 1:
                return None
            every += [tuple(row[p] for row in rows) for p in range(len(rows[0]))]
    for values in sorted({values for values in every if len(set(values)) > 1}, key=sum):
        for base, letter in bases:
            offsets = {a - b for a, b in zip(values, base, strict=True)}
            if len(offsets) == 1:
                found[values] = f"{letter}+{offsets.pop()}"
                break
        else:
            if len(bases) == len(_INDICES):
                return None
            bases.append((values, _INDICES[len(bases)]))
            found[values] = bases[-1][1]
    return found


def _filled(name: str, marks: Mapping[int, str]) -> str:
    out: list[str] = []
    end = 0
    for n, match in enumerate(NUMBER.finditer(name)):
        if n in marks:
            out.append(escape_key(name[end : match.start()]) + "{" + marks[n] + "}")
            end = match.end()
    return "".join(out) + escape_key(name[end:])
