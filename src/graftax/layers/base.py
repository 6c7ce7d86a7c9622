"""The parts of a row of the layer table, and what connecting two parts takes and gives. Pure Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from graftax.ops import Op, Rearrange
from graftax.plans import Entry
from graftax.tree import Module, Side, TensorSpec

By = Literal["modules", "convention", "shapes"]
"""The evidence for a connection: live module kinds, the field's convention for these roles and ranks, or shapes
only."""
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
    evidence  the evidence for it, the strongest first
    variant   the form of the row: 'linear', 'conv', 'conv_transpose default', 'flatten C H W'
    rule      the keys of a rule that pick it, such as `layout = "linear"`
    by        the kind of evidence
    assumes   what no file shows but this connection relies on
    left      roles that it does not connect (partial connections only), torch's and Flax's
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
class LayerFacts:
    """What a row may look at: the shapes by role and the live settings of both sides, and the `layout` of a rule."""

    torch: Mapping[str, Shape]
    flax: Mapping[str, Shape]
    torch_settings: Settings = field(default_factory=dict[str, Any])
    flax_settings: Settings = field(default_factory=dict[str, Any])
    layout: str = ""
    torch_kind: str = ""
    flax_kind: str = ""


Holds = Callable[[LayerFacts], bool] | None


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of a form: torch roles -> Flax roles. A role may list alternatives: `weight|gamma`.

    ops       a Rearrange pattern, or ops; '' or () is identity
    optional  True if both sides may lack it (a bias)
    """

    torch: str | tuple[str, ...]
    flax: str | tuple[str, ...]
    ops: Ops = ()
    optional: bool = False

    @property
    def chain(self) -> tuple[Op, ...]:
        return ((Rearrange(self.ops),) if self.ops else ()) if isinstance(self.ops, str) else self.ops


def present(role: str, shapes: Mapping[str, Shape]) -> str:
    """The alternative of a step's role that a side has; '' for none."""
    return next((name for name in role.split("|") if name in shapes), "")


@dataclass(frozen=True, slots=True)
class LayerForm:
    """One way in which a row connects. It fits if its steps use every role of both sides and every shape comes out
    right.

    layout   the value of a rule's `layout` that picks it; `rule` states other keys if they are needed
    by       the kind of evidence if no live module decides
    settled  True if a live module that lists the row also settles the form; False if it leaves several
    holds    a condition on the facts
    offered  False: no file shows it, so only a rule picks it (zero-centred norms)
    """

    variant: str
    steps: tuple[Step, ...]
    layout: str = ""
    rule: str = ""
    by: By = "convention"
    why: str = ""
    settled: bool = True
    holds: Holds = None
    offered: bool = True
    assumes: tuple[str, ...] = ()

    @property
    def rule_text(self) -> str:
        return self.rule or (f'layout = "{self.layout}"' if self.layout else "")


BIAS = Step("bias", "bias", optional=True)


def kernel_form(
    variant: str, ops: Ops, layout: str, why: str, by: By = "convention", settled: bool = True, holds: Holds = None
) -> LayerForm:
    """A weight that becomes a kernel, and its bias."""
    steps = (Step("weight", "kernel", ops), BIAS)
    return LayerForm(variant, steps, layout, by=by, why=why, settled=settled, holds=holds)


@dataclass(frozen=True, slots=True)
class Makes:
    """Forms that depend on shapes or settings, and the lines that describe them."""

    make: Callable[[LayerFacts], Iterable[LayerForm]]
    lines: tuple[str, ...]


Forms = LayerForm | Makes


@dataclass(frozen=True, slots=True)
class Refusal:
    """A case without a counterpart: the condition, the reason, and how to rewrite the model or the weights."""

    when: Callable[[LayerFacts], bool]
    what: str
    reason: str
    rewrite: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that must agree for the outputs to agree. `want` computes the Flax value from torch's settings, `have`
    reads it from Flax's in the same form. If either gives None, nothing is compared."""

    name: str
    torch: str
    flax: str
    want: Callable[[Settings], Any]
    have: Callable[[Settings], Any]
    note: str = ""

    @classmethod
    def same(cls, torch: str, flax: str = "", name: str = "") -> Setting:
        """A setting with one meaning on both sides."""
        flax = flax or torch
        return cls(name or flax, torch, flax, lambda t: t.get(torch), lambda f: f.get(flax))


@dataclass(frozen=True, slots=True)
class LeafAxes:
    """What the axes of a layer's leaf are on one side.

    side    the side of the leaf
    roles   the roles of the leaves, as a regular expression
    axes    the names of the axes, outermost first. `(groups in)` is one axis that merges two, `*k` any number of axes.
            `stack` counts matrices, `k` are positions of a convolution. A function of the live settings gives (axes,
            inputs), or None if they show nothing
    inputs  those of the names that the layer sums over, in the order of its flat input; the others are outputs
    shape   the shape of the leaf by the live settings, without axes that a transform such as vmap stacked; None if they
            do not show it
    kinds   the classes of the row that this is about; empty: all of them
    """

    side: Side
    roles: str
    axes: str | Callable[[Settings, int], tuple[str, str] | None]
    inputs: str = ""
    shape: Callable[[Settings], Shape | None] = lambda _: None
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer type: a row of the table.

    torch, linen, nnx   class names; an empty tuple means any module (bare parameters), for nnx the names of linen
    forms       the ways to connect the leaves
    settings    settings to compare for parity
    exactness   'exact' (every bit survives there and back) or 'measured' (value ops; and which)
    refusals    cases without a counterpart
    axes        what the axes of its leaves are (`roles.role_of`); a class is named in one row that has them
    flax_decides  True if a live Flax module alone settles the form
    note        traps, and the source of the fact
    """

    name: str
    torch: tuple[str, ...] = ()
    linen: tuple[str, ...] = ()
    nnx: tuple[str, ...] = ()
    forms: tuple[Forms, ...] = ()
    settings: tuple[Setting, ...] = ()
    exactness: str = "exact"
    refusals: tuple[Refusal, ...] = ()
    axes: tuple[LeafAxes, ...] = ()
    flax_decides: bool = True
    note: str = ""

    @property
    def flax(self) -> tuple[str, ...]:
        return (*self.linen, *self.nnx)
