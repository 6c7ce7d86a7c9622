"""Another of torch's activations arrives: a layer was not applied, or was applied at another place than in torch.

In the forced pass every layer passes on torch's output. Code that takes the wrong activation therefore gets it bit for
bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftax.parity.causes.activations import ACTIVATIONS, apply
from graftax.parity.causes.elementwise import Explanation, Operand, sampled
from graftax.parity.causes.numbers import Array, Bar, arrays, is_number, relative
from graftax.parity.divergence import Divergence
from graftax.parity.records import Site
from graftax.parity.report.model import Where
from graftax.tree import Module

NOT_APPLIED, ORDER, OTHER = "norm not applied", "norm order", "other activation"


@dataclass(frozen=True, slots=True)
class ActivationPlace:
    """The place of an activation in torch: the input ('in') or the output ('out') of a call."""

    site: Site
    where: Where
    norm: bool

    @property
    def text(self) -> str:
        owner = f"torch's {self.site}" if self.site.path else "the torch model"
        return f"{'the input' if self.where == 'in' else 'the output'} of {owner}"


def misplaced(divergence: Divergence, want: Array, have: Array, bar: Bar, *, sure: bool) -> list[Explanation]:
    """Explain a divergence by torch's activations: torch's code took one, Flax's code took another, with the same
    activation function behind it. [] if Flax's array is none of them. sure: accept only a norm that is not applied, or
    is applied at another place; a sum that lacks a term may equal an activation too."""
    places, operands = _activations(divergence, want)
    at, values = sampled(want, operands)
    a, b = want[at].astype(np.float64), have[at].astype(np.float64)
    for name in ACTIVATIONS:
        made = [None if value is None else apply(name, value) for value in values]
        right = [place for place, value in zip(places, made, strict=True) if _is(value, a, bar)]
        if not right and name != "identity":
            continue
        wrong = [place for place, value in zip(places, made, strict=True) if _is(value, b, bar)]
        found = _by_norm(divergence, right, wrong, bar) if wrong else None
        if found is None and wrong and not sure:
            found = _otherwise(divergence, right, wrong, bar)
        if found is not None:
            return [found]
    return []


def _is(value: Array | None, other: Array, bar: Bar) -> bool:
    return value is not None and relative(value, other) <= bar.bar


def _activations(divergence: Divergence, want: Array) -> tuple[list[ActivationPlace], list[Operand]]:
    """The inputs and outputs of all torch calls, except the array that is compared."""
    places: list[ActivationPlace] = []
    operands: list[Operand] = []
    modules = divergence.reference.modules
    for site, record in divergence.reference.records.items():
        norm = is_norm(modules, site.path)
        sides: dict[Where, Any] = {"in": (record.args, dict(record.kwargs)), "out": record.output}
        for where, nest in sides.items():
            if site == divergence.row.site_torch and where == divergence.where:
                continue
            for _, array in arrays(nest):
                if is_number(array) and array.size == want.size and array.size > 1:
                    for other in _layouts(array, want.shape):
                        places.append(ActivationPlace(site, where, norm))
                        operands.append(Operand(str(site), other))
    return places, operands


def _layouts(array: Array, shape: tuple[int, ...]) -> Iterator[Array]:
    """The array in torch's layout, with channels last, and with time first (for a recurrent layer), if that gives
    `shape`."""
    turned = [array]
    if array.ndim > 2:
        turned += [np.moveaxis(array, 1, -1), np.swapaxes(array, 0, 1)]
    found = [other for other in turned if other.shape == shape]
    yield from found or [array]


def is_norm(modules: Mapping[str, Module], path: str) -> bool:
    """Is a torch module a norm? It is if its class or its own name contains 'norm', and it holds no other module."""
    if not path or path not in modules or any(other.startswith(f"{path}.") for other in modules):
        return False
    return "norm" in modules[path].kind.lower() or "norm" in path.rpartition(".")[2].lower()


def _by_norm(
    divergence: Divergence, right: Sequence[ActivationPlace], wrong: Sequence[ActivationPlace], bar: Bar
) -> Explanation | None:
    """A norm whose input was taken instead of its output, or the reverse, or that comes later in torch."""
    what = _what(divergence)
    skipped = {place.site for place in wrong if place.where == "in"} & {
        place.site for place in right if place.norm and place.where == "out"
    }
    if skipped:
        site = min(skipped)
        text = f"{site} is not applied: {what} is the norm's input; in torch it is the norm's output"
        return Explanation(NOT_APPLIED, text, f"take the output of {site}", bar.bar)
    more = {place.site for place in right if place.where == "in"} & {
        place.site for place in wrong if place.norm and place.where == "out"
    }
    if more:
        site = min(more)
        text = f"{site} is applied, but not in torch: {what} is the norm's output; in torch it is the norm's input"
        return Explanation(ORDER, text, f"take the input of {site}", bar.bar)
    began = _order(divergence, divergence.row.site_torch, divergence.where)
    later = [place for place in wrong if _order(divergence, place.site, place.where) > began]
    if not later:
        return None
    site, instead = divergence.row.site_torch, _best(right).text if right else "something else"
    if divergence.where == "in" and is_norm(divergence.reference.modules, site.path):
        text = f"{site} is applied too late: it gets {_best(later).text}; in torch it gets {instead}"
        return Explanation(ORDER, text, f"apply {site} to {instead}", bar.bar)
    early = next((place for place in later if place.norm and place.where == "out"), None)
    if early is None:
        return None
    text = f"{early.site} is applied too early: {what} is {early.text}; in torch it is {instead}"
    return Explanation(ORDER, text, f"take {instead}, and apply {early.site} where torch does", bar.bar)


def _order(divergence: Divergence, site: Site, where: Where) -> int:
    """The index of an event in torch's run; -1 if it is not there."""
    events = divergence.reference.events
    return events.index((where, site)) if (where, site) in events else -1


def _otherwise(
    divergence: Divergence, right: Sequence[ActivationPlace], wrong: Sequence[ActivationPlace], bar: Bar
) -> Explanation:
    instead = _best(right).text if right else "something else"
    text = f"{_what(divergence)} is {_best(wrong).text}; in torch it is {instead}"
    return Explanation(OTHER, text, f"take {instead}", bar.bar)


def _what(divergence: Divergence) -> str:
    return "the input that arrives" if divergence.where == "in" else "the output"


def _best(places: Sequence[ActivationPlace]) -> ActivationPlace:
    """Prefer a layer's output to its input, and either to the whole model's; prefer norms."""
    return min(places, key=lambda place: (not place.site.path, place.where == "in", not place.norm))
