"""What rules and config.json state, in the form that matching needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftax.match.groups import Style, heads_of, owner
from graftax.ops import Concat, Op, Rearrange, Split
from graftax.ops.rearrange import parse_pattern
from graftax.plans import Entry


@dataclass(slots=True)
class Hints:
    """anchors: torch leaf -> Flax leaf, for leaves that rules pair one to one (each stacked leaf with its stack);
    styles: module of a fused torch or Flax leaf -> the layout of the parts that a rule states;
    fused: the leaves of these rules."""

    anchors: dict[str, str] = field(default_factory=dict[str, str])
    styles: dict[str, Style] = field(default_factory=dict[str, Style])
    fused: set[str] = field(default_factory=set[str])


def read_hints(entries: Iterable[Entry], turned: bool) -> Hints:
    """The hints in the entries of rules. `turned`: they run Flax -> torch."""
    out = Hints()
    for entry in entries:
        torch, flax = (entry.targets, entry.sources) if turned else (entry.sources, entry.targets)
        cut, joined = (any(isinstance(op, kind) for op in entry.ops) for kind in (Split, Concat))
        if len(flax) == 1 and torch and cut == joined:  # both: its parts are put in another order
            out.anchors |= dict.fromkeys(torch, flax[0])
        elif torch and flax and cut != joined:
            at, op = next((i, op) for i, op in enumerate(entry.ops) if isinstance(op, (Concat, Split)))
            woven = _woven(entry.ops, at)
            heads = heads_of(entry.ops) if woven else None
            parts = tuple(map(owner, flax if cut else torch))[: len(op.sizes)]
            style = Style("interleaved" if woven else "block", heads, parts)
            out.styles |= {owner(name): style for name in torch}
            out.fused |= {*torch, *flax}
    return out


def _woven(ops: Sequence[Op], at: int) -> bool:
    """True if the parts lie within another axis of the fused tensor: (h t d), (g s d). A Rearrange takes that axis
    apart before the Split at `at`, or makes it after the Concat there."""
    op = ops[at]
    assert isinstance(op, (Concat, Split))
    near = ops[:at] if isinstance(op, Split) else ops[at + 1 :]
    for step in near:
        if isinstance(step, Rearrange):
            left, right = parse_pattern(step.pattern)
            cut, fused = (right, left) if isinstance(op, Split) else (left, right)
            name = cut[op.axis][0] if op.axis < len(cut) else None
            if any(name in group and group[0] != name for group in fused):
                return True
    return False


def head_count(config: Mapping[str, Any] | None) -> int | None:
    """num_attention_heads from config.json, under its usual names."""
    names = ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
    found = ((config or {}).get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
