"""What arrives is another of torch's activations: a layer was not applied, or not where torch applies it.

In the forced pass every layer hands on torch's output, so code that takes the wrong one is given it bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graftax.parity.causes.activations import ACTIVATIONS, apply
from graftax.parity.causes.numbers import Array, Bar, arrays, is_number, relative
from graftax.parity.causes.recipes import Difference, Source, sampled
from graftax.parity.records import Site
from graftax.parity.report_model import Where
from graftax.parity.suspect import Suspect

NOT_APPLIED, ORDER, OTHER = "norm not applied", "norm order", "other activation"


@dataclass(frozen=True, slots=True)
class Place:
    """Where torch has an activation: what arrives at a call ('in') or what it gives ('out')."""

    site: Site
    where: Where
    norm: bool

    @property
    def text(self) -> str:
        return f"{'the input' if self.where == 'in' else 'the output'} of torch's {self.site}"


def misplaced(suspect: Suspect, want: Array, have: Array, bar: Bar) -> list[Difference]:
    """What torch's and Flax's code took instead of each other, both found among torch's activations, behind the same
    activation function; [] where one of them is none."""
    places, sources = _activations(suspect, want)
    at, values = sampled(want, sources)
    a, b = want[at].astype(np.float64), have[at].astype(np.float64)
    for name in ACTIVATIONS:
        made = [None if value is None else apply(name, value) for value in values]
        right = [place for place, value in zip(places, made, strict=True) if _is(value, a, bar)]
        if not right and name != "identity":
            continue
        wrong = [place for place, value in zip(places, made, strict=True) if _is(value, b, bar)]
        if wrong:
            return [_difference(suspect, right, wrong, bar)]
    return []


def _is(value: Array | None, other: Array, bar: Bar) -> bool:
    return value is not None and relative(value, other) <= bar.bar


def _activations(suspect: Suspect, want: Array) -> tuple[list[Place], list[Source]]:
    """All that went into torch's calls and came out of them, but what is compared itself."""
    places: list[Place] = []
    sources: list[Source] = []
    for site, record in suspect.reference.records.items():
        module = suspect.reference.modules.get(site.path)
        norm = is_norm("" if module is None else module.kind, site.path)
        for where, nest in (("in", (record.args, dict(record.kwargs))), ("out", record.output)):
            if site == suspect.row.site_torch and where == suspect.where:
                continue
            for _, array in arrays(nest):
                if is_number(array) and array.size == want.size and array.size > 1:
                    for other in _layouts(array, want.shape):
                        places.append(Place(site, where, norm))
                        sources.append(Source(str(site), other))
    return places, sources


def _layouts(array: Array, shape: tuple[int, ...]) -> Iterator[Array]:
    """As torch has it; the channels last; for a recurrent layer time first."""
    turned = [array]
    if array.ndim > 2:
        turned += [np.moveaxis(array, 1, -1), np.swapaxes(array, 0, 1)]
    found = [other for other in turned if other.shape == shape]
    yield from found or [array]


def is_norm(kind: str, path: str) -> bool:
    """Is a module a norm, by the name of its class or its own?"""
    return "norm" in kind.lower() or "norm" in path.rpartition(".")[2].lower()


def _difference(suspect: Suspect, right: Sequence[Place], wrong: Sequence[Place], bar: Bar) -> Difference:
    what = "what arrives" if suspect.where == "in" else "what it gives"
    gives = {place.site: place for place in right if place.where == "out"}
    takes = {place.site: place for place in right if place.where == "in"}
    skipped = [gives[place.site] for place in wrong if place.where == "in" and place.site in gives]
    for place in sorted(skipped, key=lambda place: not place.norm):
        name = NOT_APPLIED if place.norm else OTHER
        text = f"{place.site} is not applied: {what} is its input, in torch its output"
        return Difference(name, text, f"take the output of {place.site}", bar.bar)
    more = [place for place in wrong if place.where == "out" and place.site in takes]
    for place in sorted(more, key=lambda place: not place.norm):
        name = ORDER if place.norm else OTHER
        text = f"{place.site} is applied, and in torch it is not: {what} is its output, in torch its input"
        return Difference(name, text, f"take the input of {place.site}", bar.bar)
    norms = [place for place in (*wrong, *right) if place.norm]
    first, instead = _best(wrong), _best(right).text if right else "something else"
    at = suspect.row.site_torch
    if suspect.where == "in" and is_norm(suspect.row.kind, at.path):
        text = f"{at} is applied in another place: it gets {first.text}, in torch {instead}"
        return Difference(ORDER, text, f"apply {at} where torch does, to {instead}", bar.bar)
    text = f"{what} is {first.text}, in torch it is {instead}"
    applied = [place for place in norms if place.where == "out"]
    if applied:
        text += f": {applied[0].site} is {'applied too early' if applied[0] in wrong else 'not applied'}"
        return Difference(ORDER if applied[0] in wrong else NOT_APPLIED, text, f"take {instead}", bar.bar)
    return Difference(OTHER, text, f"take {instead}", bar.bar)


def _best(places: Sequence[Place]) -> Place:
    """What a layer gives says more than what it gets."""
    return min(places, key=lambda place: (place.where == "in", not place.norm))
