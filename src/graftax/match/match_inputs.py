"""The inputs of a match: both ends, and what is known about them before names are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graftax.match.bare_rules import Said
from graftax.match.calls import NO_CALLS, Calls
from graftax.match.groups import Style
from graftax.match.kinds import Kinds
from graftax.match.traced import Traces
from graftax.ops import Op
from graftax.tree import Side, TensorSpec


@dataclass(frozen=True, slots=True)
class Ends:
    """Both sides' specs, the syntax of their names, and the leaves that rules have settled in groups.

    anchors: torch leaf -> Flax leaf, one to one, from rules; named: anchors of rules that state nothing else;
    ruled: torch leaf -> the ops of its rule, torch -> Flax; styles: torch module -> how a rule lays out its parts;
    traces: of live models; calls: the order of calls on the Flax side, if it is traced; heads: from config.json;
    aliases: first name -> all names of a tied tensor; fused: leaves that rules about fused tensors settle, which stay
    evidence for what is around them; crossed: shapes show calls that are not in the order of the other side's numbers.
    """

    torch: Mapping[str, TensorSpec]
    flax: Mapping[str, TensorSpec]
    torch_side: Side
    flax_side: Side
    torch_skip: frozenset[str] = frozenset()
    flax_skip: frozenset[str] = frozenset()
    anchors: Mapping[str, str] = field(default_factory=dict[str, str])
    styles: Mapping[str, Style] = field(default_factory=dict[str, Style])
    heads: int | None = None
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])
    kinds: Kinds = field(default_factory=Kinds)
    named: Mapping[str, Said] = field(default_factory=dict[str, Said])
    traces: Traces = field(default_factory=Traces)
    calls: Calls = NO_CALLS
    renames: Mapping[str, str] = field(default_factory=dict[str, str])
    fused: frozenset[str] = frozenset()
    crossed: bool = False
    ruled: Mapping[str, tuple[Op, ...]] = field(default_factory=dict[str, "tuple[Op, ...]"])
