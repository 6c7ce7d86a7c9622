"""What arrives is another of torch's activations: a layer was not applied, or not where torch applies it.

In the forced pass every layer hands on torch's output, so code that takes the wrong one is given it bit for bit.
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
    """Where torch has an activation: what arrives at a call ('in') or what it gives ('out')."""

    site: Site
    where: Where
    norm: bool

    @property
    def text(self) -> str:
        owner = f"torch's {self.site}" if self.site.path else "the torch model"
        return f"{'the input' if self.where == 'in' else 'the output'} of {owner}"


def misplaced(divergence: Divergence, want: Array, have: Array, bar: Bar, *, sure: bool) -> list[Explanation]:
    """What torch's and Flax's code took instead of each other, found among torch's activations, behind the same
    activation function; [] where Flax's is none. sure: only what a norm explains that is not applied, or not in its
    place; a sum that lacks a term may be an activation, too."""
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
    """All that went into torch's calls and came out of them, but what is compared itself."""
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
    """As torch has it; the channels last; for a recurrent layer time first."""
    turned = [array]
    if array.ndim > 2:
        turned += [np.moveaxis(array, 1, -1), np.swapaxes(array, 0, 1)]
    found = [other for other in turned if other.shape == shape]
    yield from found or [array]


def is_norm(modules: Mapping[str, Module], path: str) -> bool:
    """Is a torch module a norm, by the name of its class or its own, and not one that holds others?"""
    if not path or path not in modules or any(other.startswith(f"{path}.") for other in modules):
        return False
    return "norm" in modules[path].kind.lower() or "norm" in path.rpartition(".")[2].lower()


def _by_norm(
    divergence: Divergence, right: Sequence[ActivationPlace], wrong: Sequence[ActivationPlace], bar: Bar
) -> Explanation | None:
    """A norm whose input was taken for its output, or the other way round, or that stands later in torch."""
    what = _what(divergence)
    skipped = {place.site for place in wrong if place.where == "in"} & {
        place.site for place in right if place.norm and place.where == "out"
    }
    if skipped:
        site = min(skipped)
        text = f"{site} is not applied: {what} is its input, in torch its output"
        return Explanation(NOT_APPLIED, text, f"take the output of {site}", bar.bar)
    more = {place.site for place in right if place.where == "in"} & {
        place.site for place in wrong if place.norm and place.where == "out"
    }
    if more:
        site = min(more)
        text = f"{site} is applied, and in torch it is not: {what} is its output, in torch its input"
        return Explanation(ORDER, text, f"take the input of {site}", bar.bar)
    began = _order(divergence, divergence.row.site_torch, divergence.where)
    later = [place for place in wrong if _order(divergence, place.site, place.where) > began]
    if not later:
        return None
    site, instead = divergence.row.site_torch, _best(right).text if right else "something else"
    if divergence.where == "in" and is_norm(divergence.reference.modules, site.path):
        text = f"{site} is applied too late: it gets {_best(later).text}, in torch {instead}"
        return Explanation(ORDER, text, f"apply {site} to {instead}", bar.bar)
    early = next((place for place in later if place.norm and place.where == "out"), None)
    if early is None:
        return None
    text = f"{early.site} is applied too early: {what} is {early.text}, in torch {instead}"
    return Explanation(ORDER, text, f"take {instead}, and apply {early.site} where torch does", bar.bar)


def _order(divergence: Divergence, site: Site, where: Where) -> int:
    """The place of an event in torch's run."""
    events = divergence.reference.events
    return events.index((where, site)) if (where, site) in events else -1


def _otherwise(
    divergence: Divergence, right: Sequence[ActivationPlace], wrong: Sequence[ActivationPlace], bar: Bar
) -> Explanation:
    instead = _best(right).text if right else "something else"
    text = f"{_what(divergence)} is {_best(wrong).text}, in torch it is {instead}"
    return Explanation(OTHER, text, f"take {instead}", bar.bar)


def _what(divergence: Divergence) -> str:
    return "what arrives" if divergence.where == "in" else "what it gives"


def _best(places: Sequence[ActivationPlace]) -> ActivationPlace:
    """What a layer gives says more than what it gets, and either more than what the whole model does."""
    return min(places, key=lambda place: (not place.site.path, place.where == "in", not place.norm))
