"""Readings that the traces of both live models settle: the order in which each model flattens a map, or makes one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from graftax.match.choose import Choice
from graftax.match.flatten import Suspect
from graftax.match.pairs import Label, Link, Scope
from graftax.match.sides import Module
from graftax.ops import Op, Rearrange
from graftax.tree import Axes, Trace

WHY = "traced"
_NO_MAP = f"{WHY}: its input is no map"


@dataclass
class Traces:
    """The traces of both ends, made on first use."""

    torch_trace: Callable[[], Trace] | None = None
    flax_trace: Callable[[], Trace] | None = None

    @cached_property
    def torch(self) -> Trace:
        return Trace() if self.torch_trace is None else self.torch_trace()

    @cached_property
    def flax(self) -> Trace:
        return Trace() if self.flax_trace is None else self.flax_trace()

    def stacked(self, leaf: str, flax: bool) -> tuple[int, ...] | None:
        """The axes on which a leaf is stacked, from the front; None if no trace shows it."""
        return (self.flax if flax else self.torch).stacked.get(leaf)


def by_trace(link: Link, scope: Scope, choice: Choice, traces: Traces) -> Choice:
    """The choice for a leaf whose values may be a flattened map (`trapped` has opened it). It is settled if both traces
    show its order. Else it stays open, and the sizes that a trace shows are offered."""
    trap = choice.trap
    if trap is None or trap.raw is not None or len(choice.open) != 1:
        return choice
    (label,) = choice.open
    matrix = label[1] == "linear"
    if label[0] or not (matrix or label[1] == "identity"):
        return choice
    if trap.makes is not None:  # what the trace says about the inputs leaves the outputs open
        told = [by_trace(link, scope, replace(choice, trap=one), traces) for one in trap.each(matrix)]
        maps = [one for one in told if one.label is not None and one.why != _NO_MAP]
        known = maps if maps else [one for one in told if len(told) == sum(one.label is not None for one in told)][:1]
        return known[0] if len(known) == 1 else choice
    to_flax = dict(scope.keys)
    found: set[tuple[Axes, Axes] | None] = set()
    guess: Axes | None = None
    for key, paths in link.torch.paths.items():
        other = link.flax.paths.get(to_flax.get(key, ()))
        if other is None:
            continue
        left, right = _axes(traces.torch, paths[0], trap.vector), _axes(traces.flax, other[0], trap.vector)
        found.add(_agreed(left, right, link.torch.shapes[key][0 if trap.vector else -1]))
        guess = guess or right or left
    settled = found.pop() if len(found) == 1 else None
    if settled is None:
        return replace(choice, trap=_offered(trap, guess))
    left, right = settled
    if [name for name, _ in left] == [name for name, _ in right]:
        return Choice(label, f"{WHY}: the map is {_text(left)} on both sides" if len(left) > 1 else _NO_MAP)
    made: Label = ((), "traced")
    chain = _chain(left, right, matrix, trap.vector)
    for source, target in {(source, target) for _, source, target in link.chains}:
        link.chains[(made, source, target)] = chain
    link.labels |= {made}
    return Choice(made, f"{WHY}: the map is {_text(left)} in torch and {_text(right)} in Flax")


def shown(trace: Trace, modules: Iterable[Module]) -> dict[int, Suspect]:
    """id of a module -> its suspect, for modules that take a flattened map, or make one, by torch's own trace."""
    out: dict[int, Suspect] = {}
    for module in modules:
        for role in ("weight", "bias"):
            column = module.roles.get(role)
            path = column.path if column is not None else ""
            for rows, axes in ((False, trace.columns.get(path)), (True, trace.rows.get(path))):
                sizes = dict(axes or ())
                if column is None or len(sizes) < 2 or id(module) in out:
                    continue
                shape = next(iter(column.shapes.values()))
                width, channels = shape[0 if rows else -1], sizes.get("c") or 1
                norm = len(shape) == 1 and role == "weight"
                out[id(module)] = Suspect(channels, width // channels, rows and not norm, norm)
    return out


def _axes(trace: Trace, leaf: str, rows: bool) -> Axes | None:
    return (trace.rows if rows else trace.columns).get(leaf)


def _agreed(left: Axes | None, right: Axes | None, width: int) -> tuple[Axes, Axes] | None:
    """Both orders with every length known and without axes of length 1. None if they contradict each other or a length
    is not known."""
    for one in (left, right):
        if one is not None and len(one) == 1 and one[0][1] == width:
            return one, one  # if one side has no map here, neither has the other
    if left is None or right is None:
        return None
    sizes: dict[str, int] = {}
    for name, size in (*left, *right):
        if size is not None and sizes.setdefault(name, size) != size:
            return None
    names = [{name for name, _ in axes if sizes.get(name) != 1} for axes in (left, right)]
    if names[0] != names[1] or not names[0] <= sizes.keys() or math.prod(sizes[name] for name in names[0]) != width:
        return None
    one, two = (tuple((name, sizes[name]) for name, _ in axes if sizes[name] != 1) for axes in (left, right))
    return one, two


def _chain(left: Axes, right: Axes, matrix: bool, rows: bool) -> tuple[Op, ...]:
    one, two = (f"({' '.join(name for name, _ in axes)})" for axes in (left, right))
    pattern = f"{one} -> {two}"
    if matrix:
        pattern = f"{one} i -> i {two}" if rows else f"o {one} -> {two} o"
    return (Rearrange(pattern, tuple(sorted((name, size) for name, size in left if size is not None))),)


def _text(axes: Axes) -> str:
    return " ".join(f"{name.upper()}={size}" for name, size in axes)


def _offered(trap: Suspect, axes: Axes | None) -> Suspect:
    """The suspect, with the map that a trace shows as the first candidate."""
    sizes = dict(axes or ())
    channels, height = sizes.get("c"), sizes.get("h") or 1
    if channels is None or trap.width % channels or len(sizes) < 2 or (sizes.get("d") or 1) > 1:
        return trap
    positions = trap.width // channels
    width = sizes.get("w") or (positions // height if positions % height == 0 and sizes.get("h") else None)
    return replace(trap, seen=(channels, height, width) if width and height * width == positions else (channels, 0, 0))
