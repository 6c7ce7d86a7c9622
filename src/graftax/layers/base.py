"""What a row of the layer table is made of, and what connecting two parts takes and gives. Pure Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from graftax.ops import Op
from graftax.plans import Entry
from graftax.tree import Module, Side, TensorSpec

By = Literal["modules", "convention", "shapes"]
"""What speaks for a connection: live module kinds, the field's convention for these roles and ranks, or shapes only."""
STRENGTH: tuple[By, ...] = ("modules", "convention", "shapes")

Shape = tuple[int, ...]
Settings = Mapping[str, Any]
Ops = str | tuple[Op, ...]
"""A pattern of `Rearrange`, or ops."""


@dataclass(frozen=True, slots=True)
class Part:
    """One side of a pairing. `leaves`: role -> full path; a role is the path below the module ('weight',
    'out_proj.weight'; 'kernel', 'query/kernel', 'mean' without its collection). `specs` holds those paths."""

    path: str
    side: Side
    leaves: Mapping[str, str]
    specs: Mapping[str, TensorSpec]
    module: Module | None = None

    def shapes(self) -> dict[str, Shape]:
        return {role: self.specs[path].shape for role, path in self.leaves.items()}


@dataclass(frozen=True, slots=True)
class Connection:
    """One way to connect two parts.

    layer     the row
    entries   torch -> Flax; invert the plan for the other direction
    evidence  what speaks for it, the strongest first
    variant   which of the row's forms: 'linear', 'conv', 'conv_transpose default', 'flatten C H W'
    rule      the keys of a rule that pick it, such as `layout = "linear"`
    by        what the evidence rests on
    assumes   what no file shows and this connection relies on
    left      roles that it leaves alone (partial connections only), torch's and Flax's
    """

    layer: str
    entries: tuple[Entry, ...]
    evidence: tuple[str, ...]
    variant: str = ""
    rule: str = ""
    by: By = "convention"
    assumes: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """What a row may look at: the shapes by role and the live settings of both sides, and the hints of a rule
    (layout, heads, fused, flatten)."""

    torch: Mapping[str, Shape]
    flax: Mapping[str, Shape]
    torch_settings: Settings = field(default_factory=dict[str, Any])
    flax_settings: Settings = field(default_factory=dict[str, Any])
    hints: Mapping[str, Any] = field(default_factory=dict[str, Any])
    torch_kind: str = ""
    flax_kind: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of a form: torch roles -> Flax roles. A role may list alternatives: `weight|gamma`.

    ops       a Rearrange pattern, ops, or a function of the facts; '' or () is identity
    optional  both sides may lack it (a bias)
    """

    torch: str | tuple[str, ...]
    flax: str | tuple[str, ...]
    ops: Ops | Callable[[Facts], Ops] = ()
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Form:
    """One way a row connects. It fits where its steps use every role of both sides and every shape comes out right.

    layout   the value of a rule's `layout` that picks it; `rule` says it where other keys are needed
    by       what speaks for it where no live module does
    settled  a live module that lists the row settles the form too; False where it leaves more than one
    holds    a condition on the facts
    offered  False: no file shows it, so only a rule or a hint picks it (zero-centred norms)
    """

    variant: str
    steps: tuple[Step, ...]
    layout: str = ""
    rule: str = ""
    by: By = "convention"
    why: str = ""
    settled: bool = True
    holds: Callable[[Facts], bool] | None = None
    offered: bool = True
    assumes: tuple[str, ...] = ()

    @property
    def rule_text(self) -> str:
        return self.rule or (f'layout = "{self.layout}"' if self.layout else "")


@dataclass(frozen=True, slots=True)
class Makes:
    """Forms that depend on shapes or settings, and the lines that say what they are."""

    make: Callable[[Facts], Iterable[Form]]
    lines: tuple[str, ...]


Forms = Form | Makes


@dataclass(frozen=True, slots=True)
class Refusal:
    """What has no counterpart: when, why, and how to rewrite the model or the weights so that it has one."""

    when: Callable[[Facts], bool]
    what: str
    reason: str
    rewrite: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that must agree for the outputs to agree: `want` makes the Flax value out of torch's settings, `have`
    the same form out of Flax's. None from either: nothing to compare."""

    name: str
    torch: str
    flax: str
    want: Callable[[Settings], Any]
    have: Callable[[Settings], Any]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer type: a row of the table.

    torch, linen, nnx   class names; an empty tuple means any module (bare parameters)
    forms       the ways to connect the leaves
    settings    to compare for parity
    exactness   'exact' (every bit survives there and back) or 'measured' (value ops; and which)
    refusals    what has no counterpart
    flax_decides  a live Flax module alone settles the form
    note        traps, and where the fact was seen
    """

    name: str
    torch: tuple[str, ...]
    linen: tuple[str, ...]
    nnx: tuple[str, ...]
    forms: tuple[Forms, ...]
    settings: tuple[Setting, ...] = ()
    exactness: str = "exact"
    refusals: tuple[Refusal, ...] = ()
    flax_decides: bool = True
    note: str = ""
