"""A finished plan as rules without sizes, which port a larger model of the same code from files.

Every line is tried before it is written: it must make the very entries that it stands for. What no rule can say is a
comment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from graftax.errors import GraftaxError, escape
from graftax.ops import (
    Cast,
    Concat,
    Op,
    Rearrange,
    Reorder,
    Split,
    Stack,
    apply_chain,
    bind_chain,
    parse_pattern,
)
from graftax.plans import Entry, Plan
from graftax.plans.names import fold_names
from graftax.plans.text import columns
from graftax.rules.apply import apply_rules
from graftax.rules.key_templates import Line, one_line
from graftax.rules.load import load_rules
from graftax.rules.template import escape_key
from graftax.rules.text import rule_line
from graftax.tree import Checkpoint, Side, TensorSpec

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
        words = ("source", "target") if self.sides[0] == self.sides[1] else self.sides
        ends: Keys = dict(zip(words, map(_one_or_list, (names.torch, names.flax)), strict=True))
        ops = tuple(op for op in group[0].ops if not isinstance(op, Cast))
        for keys in _forms(ops, "".join(names.stack)):
            line = rule_line(**ends, **names.ranges, **keys)
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


def _one_or_list(names: Sequence[object]) -> object:
    return list(names) if len(names) > 1 else names[0] if names else ""


def _plain(op: Op) -> object:
    """An op without the names of its axes."""
    if not isinstance(op, Rearrange):
        return op
    names: dict[str, str] = {}
    pattern = re.sub(r"[^\W\d]\w*", lambda name: names.setdefault(name[0], f"a{len(names)}"), op.pattern)
    return pattern, tuple(sorted((names.get(name, name), size) for name, size in op.sizes))


def _forms(ops: Sequence[Op], index: str) -> Iterator[Keys]:
    """What a rule may say of these ops, the shortest first. What does not make them is not written."""
    last = ops[-1] if ops else None
    stack: Keys = {"stack": {index: last.axis}} if isinstance(last, Stack) and index else {}
    layouts = [keys for op in ops if isinstance(op, Rearrange) for keys in _rearranged(op)] or [{"layout": "identity"}]
    ways: list[Keys] = [{}]
    move = next((op for op in ops if isinstance(op, Reorder)), None)
    cut = next((op for op in ops if isinstance(op, Split)), None)
    if move is not None and cut is not None:
        ways = _parts(cut.sizes, move.order)
        layouts = [{"layout": "linear"}, {"layout": "conv"}, *layouts]
    elif any(isinstance(op, (Split, Concat)) for op in ops):
        ways = [{"fused": "block"}]
        layouts = [{}, *layouts]
    for way, layout in product(ways, layouts):
        yield {**way, **layout, **stack}


def _parts(sizes: Sequence[int], order: Sequence[int]) -> list[Keys]:
    """Parts of a fused tensor in another order; a rule is written torch to Flax, a plan runs either way."""
    names = [f"part{i}" for i in range(len(order))]
    one, other = " ".join(names), " ".join(names[i] for i in order)
    unit = math.gcd(*sizes)
    shares = {name: size // unit for name, size in zip(names, sizes, strict=True)} if len(set(sizes)) > 1 else {}
    return [{"parts": said, **shares} for said in (f"{one} -> {other}", f"{other} -> {one}")]


def _rearranged(op: Rearrange) -> Iterator[Keys]:
    yield {"ops": op.pattern}
    grouped = {name for side in parse_pattern(op.pattern) for group in side if len(group) > 1 for name in group}
    yield {"ops": op.pattern, **{name: size for name, size in op.sizes if name in grouped}}


@dataclass(frozen=True, slots=True)
class _Names:
    """The names at one place of the entries of a group, as a column."""

    paths: Mapping[tuple[int, ...], tuple[str, ...]]
    stack: tuple[int, ...] = ()


def _templates(group: Sequence[Entry]) -> Line | None:
    """The templates of the sources and of the targets; None if no line names all of them."""
    first = group[0]
    if len(group) == 1:
        varies = len(first.sources) > 1 and len(fold_names(first.sources)) == 1
        if varies and any(isinstance(op, Stack) for op in first.ops):
            stacked = [_Names({(): first.sources}, (len(first.sources),))]
            found = one_line([((), ())], {}, stacked, [_Names({(): (name,)}) for name in first.targets])
            if found is not None:
                return found
        return Line(tuple(map(escape_key, first.sources)), tuple(map(escape_key, first.targets)))
    ends = [[entry.sources for entry in group], [entry.targets for entry in group]]
    if any(len({len(names) for names in side}) > 1 for side in ends):
        return None
    columns = [[_Names({(n,): (name,) for n, name in enumerate(names)}) for names in zip(*side, strict=True)]
               for side in ends]  # fmt: skip
    return one_line([((n,), (n,)) for n in range(len(group))], {}, *columns)
