"""Axis names: the names of a tensor's own axes and the `ops` key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graftax.errors import RulesError, escape
from graftax.layers.patterns import SPATIAL
from graftax.ops import axis_groups, groups_text, parse_pattern
from graftax.tree import Side

Groups = tuple[tuple[str, ...], ...]


def own_names(rank: int, side: Side) -> tuple[str, ...]:
    """The names of a tensor's axes if `ops` names only the target's axes: o out, i in, k kernel."""
    if rank - 2 > max(SPATIAL):
        return tuple(f"a{axis}" for axis in range(rank))
    names = ("o", "i", *SPATIAL.get(rank - 2, "").split())[:rank]
    return names if side == "torch" else (*names[2:], *names[1::-1])


OWN = frozenset(name for rank in range(6) for name in own_names(rank, "torch"))
"""All of these names."""


@dataclass(frozen=True, slots=True)
class OpsText:
    """The `ops` key without its stacked axes.

    left       None if only the target's axes are written
    positions  the axis of every stacked name in its tensor
    placed     stacked name -> True if it is on the left
    """

    left: Groups | None
    right: Groups
    positions: Mapping[str, int] = field(default_factory=dict[str, int])
    placed: Mapping[str, bool] = field(default_factory=dict[str, bool])

    @property
    def right_names(self) -> tuple[str, ...]:
        return tuple(name for group in self.right for name in group if name != "1")

    @property
    def axes(self) -> frozenset[str]:
        return frozenset(self.right_names)

    def pattern(self, rank: int | None, side: Side) -> str:
        """The pattern for a left tensor of `rank` axes (None: not known; then as many as the right has names).

        Raises RulesError if the short form does not name that tensor's own axes.
        """
        if self.left is not None:
            return f"{groups_text(self.left)} -> {groups_text(self.right)}"
        names = self.right_names
        own = own_names(len(names) if rank is None else rank, side)
        if set(own) != set(names):
            raise RulesError(
                f"`ops` names {' '.join(names) or 'no axis'} besides the stacked ones; "
                f"the tensor's own axes are {' '.join(own) or 'none'}"
            )
        return f"{' '.join(own)} -> {groups_text(self.right)}"


def parse_ops(text: str, stackable: frozenset[str]) -> OpsText:
    """The `ops` key: 'e l i o', 'o i -> e l i o' or '(h d) i -> i h d'.

    `stackable`: names that may be stacked axes. A name on both sides, or an own axis in the short form, is an axis of
    the tensor and not stacked. RulesError if the text is not a pattern.
    """
    before, arrow, after = text.partition("->")
    if not arrow:
        names = text.split()
        right = axis_groups(text, text)
        if any(len(group) != 1 for group in right):
            raise RulesError(f"{escape(text)!r}: groups need both sides, such as '(h d) i -> i h d'")
        if len(set(names)) != len(names):
            raise RulesError(f"{escape(text)!r} names an axis twice")
        right, positions = _taken(right, stackable - OWN, text)
        return OpsText(None, right, positions, dict.fromkeys(positions, False))
    left, right = axis_groups(before, text), axis_groups(after, text)
    here, there = ({name for group in side for name in group} for side in (left, right))
    left, on_left = _taken(left, stackable - there, text)
    right, on_right = _taken(right, stackable - here, text)
    parse_pattern(f"{groups_text(left)} -> {groups_text(right)}")
    placed = dict.fromkeys(on_left, True) | dict.fromkeys(on_right, False)
    return OpsText(left, right, {**on_left, **on_right}, placed)


def _taken(groups: Groups, names: frozenset[str], text: str) -> tuple[Groups, dict[str, int]]:
    positions: dict[str, int] = {}
    rest: list[tuple[str, ...]] = []
    for axis, group in enumerate(groups):
        stacked = [name for name in group if name in names]
        if stacked and len(group) > 1:
            raise RulesError(f"{escape(text)!r}: the stacked axis {stacked[0]} must be alone, outside of brackets")
        if stacked:
            if stacked[0] in positions:
                raise RulesError(f"{escape(text)!r} names an axis twice")
            positions[stacked[0]] = axis
        else:
            rest.append(group)
    return tuple(rest), positions
