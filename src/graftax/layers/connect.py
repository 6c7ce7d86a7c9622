"""Connect a torch part and a Flax part by the layer table: every form that fits, the strongest first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

from graftax.errors import Failure, LayoutError, RulesError, escape
from graftax.layers.base import STRENGTH, By, Connection, Layer, LayerFacts, LayerForm, Part, Setting, Step, present
from graftax.layers.patterns import same_effect
from graftax.layers.table import LAYERS
from graftax.ops import bind_chain
from graftax.plans import Entry
from graftax.tree import Module, Side, TensorSpec

_FRAMEWORKS = ("torch", "flax", "transformers")


@cache
def _known_kinds() -> Mapping[Side, frozenset[str]]:
    return {
        "torch": frozenset(kind for layer in LAYERS for kind in layer.torch),
        "flax": frozenset(kind for layer in LAYERS for kind in layer.flax),
    }


def known_kind(module: Module | None, side: Side) -> str:
    """The class name of a live module in the table: the first of its bases that a framework defines and a row lists; ''
    if there is none. A user's own class of the same name does not count."""
    if module is None:
        return ""
    kinds = _known_kinds()[side]
    names = [base.rpartition(".")[2] for base in module.bases if _of_framework(base)]
    for name in names if module.bases else [module.kind]:
        if name in kinds:
            return name
    return ""


_LAYERS_OF: Mapping[Side, tuple[str, ...]] = {
    "torch": ("torch.nn.modules.", "torch.ao.nn."),
    "flax": ("flax.linen.", "flax.nnx."),
}
_HOLDERS = frozenset(("Module", "Sequential"))


def overriding(module: Module | None, side: Side) -> tuple[str, str] | None:
    """(the class whose own call runs, or the function set on the module, the listed kind whose call it overrides)."""
    known = known_kind(module, side)
    if module is None or not known or not module.calls:
        return None
    base = next(name for name in module.bases if name.rpartition(".")[2] == known and _of_framework(name))
    first = module.calls[0]
    own = first not in module.bases or module.bases.index(first) < module.bases.index(base)
    return (first, known) if own else None


def own_layout(module: Module | None, side: Side) -> bool:
    """True if a live module may store its weights in another way than the table, or the field, says: a framework layer
    that no row lists, a class of the user's own, or a subclass that computes with them itself."""
    if module is None or known_kind(module, side):
        return bool(module is not None and module.own_math and overriding(module, side))
    layers = [call.rpartition(".")[2] for call in module.calls if call.startswith(_LAYERS_OF[side])]
    return bool(module.calls) and (not _of_framework(module.calls[0]) or not _HOLDERS.issuperset(layers))


def _of_framework(name: str) -> bool:
    return name.partition(".")[0] in _FRAMEWORKS


def rows_for(torch_kind: str, flax_kind: str) -> list[Layer]:
    """The rows that may connect modules of these kinds ('' is unknown)."""
    return [layer for layer in LAYERS if _listed(layer, torch_kind, flax_kind)]


def _listed(layer: Layer, torch_kind: str, flax_kind: str) -> bool:
    sides = ((torch_kind, layer.torch), (flax_kind, layer.flax))
    return all(not kind or not known or kind in known for kind, known in sides)


def connect(torch: Part, flax: Part, *, layout: str = "", partial: bool = False) -> list[Connection]:
    """Every way to connect the two parts, the strongest evidence first; [] if nothing fits. If there are several, the
    caller settles the ambiguity by other evidence, or asks; `settled` gives the one that stands out.

    layout   the form that a rule names
    partial  optional leaves (biases) may be on one side only; `Connection.left` names them

    Raises LayoutError with the reason, and the rewrite if one exists, for what the table refuses.
    """
    facts = _facts(torch, flax, layout)
    if not layout and _unknown_layout(torch, flax):
        return []
    rows = rows_for(facts.torch_kind, facts.flax_kind)
    refuse(rows, facts, torch, flax)
    found: list[Connection] = []
    for layer in rows:
        for form in _forms(layer, facts):
            connection = _fit(layer, form, facts, torch, flax, partial)
            if connection is not None and not any(_alike(connection, other) for other in found):
                found.append(connection)
    if len(found) > 1 and partial:
        least = min(len(connection.left) for connection in found)
        found = [connection for connection in found if len(connection.left) == least]
    return _ranked(found, facts)


def _unknown_layout(torch: Part, flax: Part) -> bool:
    """True if a side is a module that may lay out a matrix in its own way."""
    matrices = any(len(shape) > 1 for part in (torch, flax) for shape in part.shapes().values())
    return matrices and any(own_layout(part.module, part.side) for part in (torch, flax))


def settled(found: Sequence[Connection]) -> Connection | None:
    """The connection with stronger evidence than every other; None if two are equally strong."""
    if not found or (len(found) > 1 and found[0].by == found[1].by):
        return None
    return found[0]


def refuse(rows: Iterable[Layer], facts: LayerFacts, torch: Part, flax: Part) -> None:
    """LayoutError for the first case about these parts that a row refuses."""
    for layer in rows:
        for refusal in layer.refusals:
            if refusal.when(facts):
                failure = Failure(
                    f"{refusal.what} cannot be represented: {refusal.reason}",
                    key=f"{torch.path or next(iter(torch.leaves.values()), '')} -> {flax.path}".strip(),
                    next=refusal.rewrite,
                )
                raise LayoutError(f"{layer.name}: {escape(torch.path)} has no counterpart", [failure])


def leaf_connections(
    torch_role: str,
    torch_spec: TensorSpec,
    flax_role: str,
    flax_spec: TensorSpec,
    torch_module: Module | None = None,
    flax_module: Module | None = None,
    layout: str = "",
) -> list[Connection]:
    """The ways to convert one torch leaf into one Flax leaf (a donor of surgery, a rule); the paths in the entries are
    the roles. `layout` names the form ('linear', 'conv', 'conv_transpose', 'conv_transpose default', 'identity').

    Raises RulesError if no form has that `layout`, LayoutError if the table refuses.
    """
    if torch_module is None and flax_module is None:
        return list(_plain_leaf_connections(torch_role, torch_spec, flax_role, flax_spec, layout))
    torch, flax = _leaf("torch", torch_role, torch_spec, torch_module), _leaf("flax", flax_role, flax_spec, flax_module)
    return connect(torch, flax, layout=layout, partial=True)


def _leaf(side: Side, role: str, spec: TensorSpec, module: Module | None) -> Part:
    return Part("", side, {role: role}, {role: spec}, module)


@lru_cache(maxsize=65536)
def _plain_leaf_connections(
    torch_role: str, torch_spec: TensorSpec, flax_role: str, flax_spec: TensorSpec, layout: str
) -> tuple[Connection, ...]:
    """The same without live modules, cached: a checkpoint asks for few distinct pairs, each many times."""
    torch, flax = _leaf("torch", torch_role, torch_spec, None), _leaf("flax", flax_role, flax_spec, None)
    return tuple(connect(torch, flax, layout=layout, partial=True))


def layouts() -> tuple[str, ...]:
    """The values that a rule's `layout` can take."""
    known = ("linear", "identity", "conv", "conv_transpose", "conv_transpose default")
    forms = (form.layout for layer in LAYERS for form in layer.forms if isinstance(form, LayerForm) and form.layout)
    return tuple(dict.fromkeys((*known, *forms)))


# ---------------------------------------------------------------- forms


def _facts(torch: Part, flax: Part, layout: str) -> LayerFacts:
    if layout and layout not in layouts():
        raise RulesError(f"unknown layout {escape(layout)!r}; known: {', '.join(layouts())}")
    return LayerFacts(
        torch.shapes(),
        flax.shapes(),
        torch.module.settings if torch.module else {},
        flax.module.settings if flax.module else {},
        layout,
        known_kind(torch.module, "torch"),
        known_kind(flax.module, "flax"),
    )


def _forms(layer: Layer, facts: LayerFacts) -> Iterable[LayerForm]:
    layout = facts.layout
    for entry in layer.forms:
        for form in (entry,) if isinstance(entry, LayerForm) else entry.make(facts):
            if form.layout not in ("", layout) if layout else not form.offered:
                continue
            if form.holds is None or form.holds(facts):
                yield form


def _fit(layer: Layer, form: LayerForm, facts: LayerFacts, torch: Part, flax: Part, partial: bool) -> Connection | None:
    """The form with its entries, if every role is used and every shape fits; else None."""
    used = _used(form, facts, partial)
    if used is None:
        return None
    left = set(facts.torch).difference(*(sources for _, sources, _ in used))
    left_flax = set(facts.flax).difference(*(targets for _, _, targets in used))
    if left or left_flax:
        optional = {name for s in form.steps if s.optional for names in (s.torch, s.flax) for name in _names(names)}
        if not partial or not left | left_flax <= optional:
            return None
    evidence = form.why or f"the roles and shapes fit the form {form.variant!r}"
    entries: list[Entry] = []
    for step, sources, targets in used:
        here, there = [torch.leaves[role] for role in sources], [flax.leaves[role] for role in targets]
        try:
            bound, out = bind_chain(step.chain, tuple(torch.specs[path] for path in here))
        except LayoutError:
            return None
        if [spec.shape for spec in out] != [flax.specs[path].shape for path in there]:  # the plan checks dtypes
            return None
        entries.append(Entry(tuple(here), tuple(there), bound, (evidence,)))
    return Connection(
        layer.name,
        tuple(entries),
        (evidence,),
        form.variant,
        form.rule_text,
        _by(layer, form, facts),
        form.assumes,
        (*sorted(left), *sorted(left_flax)),
    )


def _used(form: LayerForm, facts: LayerFacts, partial: bool) -> list[tuple[Step, list[str], list[str]]] | None:
    """The steps whose roles both sides have; None if a side lacks a leaf that it needs, or no step is left."""
    out: list[tuple[Step, list[str], list[str]]] = []
    for step in form.steps:
        sources, targets = _present(step.torch, facts.torch), _present(step.flax, facts.flax)
        roles = (*sources, *targets)
        if all(roles):
            out.append((step, sources, targets))
        # One side lacks a leaf. That is allowed for an optional leaf if partial connections are, or if both sides lack
        # the whole entry.
        elif not (step.optional and (partial or not any(roles))) and not (partial and not any(roles)):
            return None
    return out or None


def _by(layer: Layer, form: LayerForm, facts: LayerFacts) -> By:
    decided = (facts.torch_kind and layer.torch) or (facts.flax_kind and layer.flax_decides and layer.flax)
    return "modules" if decided and form.settled else form.by


def _names(roles: str | tuple[str, ...]) -> list[str]:
    return [name for role in ((roles,) if isinstance(roles, str) else roles) for name in role.split("|")]


def _present(roles: str | tuple[str, ...], shapes: Mapping[str, Any]) -> list[str]:
    """The roles of a side for a step, with alternatives resolved; '' for one that is missing."""
    every = (roles,) if isinstance(roles, str) else roles
    return [present(role, shapes) for role in every]


# ---------------------------------------------------------------- order


def _alike(a: Connection, b: Connection) -> bool:
    """True for the same entries with the same effect: ops that differ only in axes of length one count as equal."""
    if a.left != b.left or len(a.entries) != len(b.entries):
        return False
    key = {(e.sources, e.targets): e.ops for e in b.entries}
    return all((e.sources, e.targets) in key and same_effect(e.ops, key[(e.sources, e.targets)]) for e in a.entries)


def _ranked(found: list[Connection], facts: LayerFacts) -> list[Connection]:
    """The connections, the strongest first. What live modules settle has their kinds as evidence."""
    kinds = [kind for kind in (facts.torch_kind, facts.flax_kind) if kind]
    told = f"the live module{'s are' if len(kinds) > 1 else ' is'} {' and '.join(kinds)}"
    return [
        replace(
            one,
            entries=tuple(replace(entry, evidence=(told,)) for entry in one.entries),
            evidence=(told, *one.evidence),
        )
        if one.by == "modules"
        else one
        for one in sorted(found, key=lambda connection: STRENGTH.index(connection.by))
    ]


# ---------------------------------------------------------------- settings


@dataclass(frozen=True, slots=True)
class SettingDifference:
    """A setting whose Flax value differs from what torch's settings require."""

    setting: Setting
    want: Any
    have: Any

    def __str__(self) -> str:
        return f"{self.setting.flax} should be {self.want!r}, is {self.have!r}"


def settings_differ(torch: Module, flax: Module, layer: str | None = None) -> list[SettingDifference]:
    """The settings that differ between two paired modules, by the row that lists both kinds (or the row named `layer`).
    A setting that one side does not show is not a difference."""
    out: list[SettingDifference] = []
    kinds = known_kind(torch, "torch"), known_kind(flax, "flax")
    if not all(kinds):
        return out
    for row in rows_for(*kinds):
        if (layer is not None and row.name != layer) or not row.torch or not row.flax:
            continue
        for setting in row.settings:
            want, have = setting.want(torch.settings), setting.have(flax.settings)
            differs = abs(want - have) > 1e-12 if isinstance(want, float) and isinstance(have, float) else want != have
            if want is not None and have is not None and differs:
                out.append(SettingDifference(setting, want, have))
    return out
