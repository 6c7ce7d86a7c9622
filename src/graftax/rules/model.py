"""The model of one validated rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftax.errors import escape
from graftax.rules.axes import OpsText
from graftax.rules.template import Template, parse_template
from graftax.tree import Side

LIST = "list"
"""The name of the axis along which the tensors of a list are stacked, in `stack` and in `ops`."""
KNOWN_BLOCKS = ("in_proj_weight", "in_proj_bias")
"""Leaves of torch.nn.MultiheadAttention: always q, k, v in blocks."""

AxisName = str | int


@dataclass(frozen=True, slots=True)
class Rule:
    """A two-way template. `left`: torch templates (of the source, if `directional`); `right`: Flax templates (of the
    target); both with the indices of their templates. Every key of the rules file is a field. ranges: index -> the
    numbers it may have, in the order of the rule; parts: the parts of a fused tensor in the order of each side;
    sizes: axis -> its length, or part -> its share of the rows; table: the rule as it was written. `transpose` is
    stored as a layout."""

    label: str
    line: str
    left: tuple[str, ...] = ()
    right: tuple[str, ...] = ()
    left_indices: tuple[str, ...] = ()
    right_indices: tuple[str, ...] = ()
    directional: bool = False
    ops: OpsText | None = None
    layout: str = ""
    flatten: tuple[tuple[str, int | None], ...] = ()
    fused: str = ""
    parts: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    heads: int | None = None
    kv_heads: int | None = None
    stack: Mapping[str, int] = field(default_factory=dict[str, int])
    ranges: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    scale: float | None = None
    offset: float | None = None
    repeat: Mapping[AxisName, int | None] = field(default_factory=dict[AxisName, "int | None"])
    pad: Mapping[AxisName, tuple[int, int] | None] = field(default_factory=dict[AxisName, "tuple[int, int] | None"])
    drop: str = ""
    fill: float | None = None
    missing: str = ""
    table: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def where(self) -> str:
        """For a message: `R.toml, line 12`."""
        return f"{escape(self.label)}, {self.line}" if self.line else escape(self.label)

    @property
    def evidence(self) -> str:
        return f"{self.label} {self.line}".strip()

    @property
    def words(self) -> tuple[str, str]:
        return ("source", "target") if self.directional else ("torch", "flax")

    @property
    def silent(self) -> bool:
        """True if the rule states which leaves belong together, but nothing about their order or layout."""
        return not (self.one_sided or self.ops or self.layout or self.flatten)

    @property
    def bare(self) -> bool:
        """True if the rule is silent and pairs one leaf on each side, and states nothing else except heads and stacked
        axes."""
        values = self.fused, self.parts[0], self.repeat, self.pad, self.scale is not None, self.offset is not None
        return self.silent and not any(values) and len(self.left) == len(self.right) == 1

    @property
    def one_sided(self) -> bool:
        return not self.left or not self.right

    def templates(self, left: Side, right: Side) -> tuple[tuple[Template, ...], tuple[Template, ...]]:
        """The templates of both sides, parsed as keys of these sides. RulesError if one is no template there."""
        return (
            tuple(parse_template(text, left) for text in self.left),
            tuple(parse_template(text, right) for text in self.right),
        )
