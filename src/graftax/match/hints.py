"""What rules and config.json say, in the form that matching needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graftax.match.groups import owner
from graftax.ops import Concat, Rearrange, Split
from graftax.plans import Entry


@dataclass(slots=True)
class Hints:
    """anchors: torch leaf -> Flax leaf where rules pair them one to one (stacked ones each to the stack);
    styles: torch module -> `block` or `interleaved` where a rule has said how a fused tensor lies."""

    anchors: dict[str, str] = field(default_factory=dict[str, str])
    styles: dict[str, str] = field(default_factory=dict[str, str])


def read_hints(entries: Iterable[Entry], turned: bool) -> Hints:
    """The hints in the entries of rules. `turned`: they run Flax -> torch."""
    out = Hints()
    for entry in entries:
        torch, flax = (entry.targets, entry.sources) if turned else (entry.sources, entry.targets)
        if len(flax) == 1 and torch and not any(isinstance(op, (Concat, Split)) for op in entry.ops):
            out.anchors |= dict.fromkeys(torch, flax[0])
        elif (len(torch) == 1 and flax) or (len(flax) == 1 and torch):
            woven = any(isinstance(op, Rearrange) and "(h t d)" in op.pattern for op in entry.ops)
            woven = woven or _woven(entry)
            for name in torch:
                out.styles[owner(name)] = "interleaved" if woven else "block"
    return out


def _woven(entry: Entry) -> bool:
    """A Rearrange stands where the fused tensor is: it undoes (or makes) the interleaving."""
    places = [i for i, op in enumerate(entry.ops) if isinstance(op, (Split, Concat))]
    if not places:
        return False
    at = places[0]
    near = entry.ops[:at] if isinstance(entry.ops[at], Split) else entry.ops[at + 1 :]
    return any(isinstance(op, Rearrange) and op.pattern.count("(") >= 2 for op in near)


def head_count(config: Mapping[str, Any] | None) -> int | None:
    """num_attention_heads of a config.json, under its usual names."""
    for name in ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"):
        value = (config or {}).get(name)
        if isinstance(value, int) and value > 0:
            return value
    return None
