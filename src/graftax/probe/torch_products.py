"""Products x @ W + b (and convolutions) as a record follows them through views, sums and factors: without b, column by
column, part by part, as a model makes them that keeps the parts of W or b apart."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from graftax.probe.record import Record
from graftax.probe.torch_nests import array_of
from graftax.probe.torch_numbers import Numbers
from graftax.probe.torch_places import Place, Places, viewed

PIECES = 64
"""Most pieces that one product, or one stack of weights, is cut into."""


@dataclass(slots=True)
class _Shadow:
    """What is known of a product x @ W + b (or a convolution), or of a view of it: the product without b, the column
    (channel) of the product that each entry comes from, and the entries of W and b that belong to each column.

    given   the value of x
    parts   where x joins several values: the product of each with its own rows of W, seen in the same way
    """

    product: torch.Tensor
    columns: torch.Tensor
    weight: Place
    bias: Place | None
    given: int | None
    parts: tuple[_Shadow, ...] = ()


class Products:
    """The products of a run. fixed: ids of the tensors that are made from parameters alone."""

    def __init__(self, record: Record, numbers: Numbers, places: Places, fixed: Container[int]) -> None:
        self.record, self.numbers, self.places, self.fixed = record, numbers, places, fixed
        self._shadows: dict[int, _Shadow] = {}
        self._left: dict[int, torch.Tensor] = {}
        """id of a product of two data -> its left factor."""
        self._joins: dict[tuple[int, bool], list[int]] = {}
        """(a value, along its channels or its last axis?) -> the lengths of the values that were joined in it."""

    # ------------------------------------------------------------ products

    def linear(
        self, x: torch.Tensor, turned: torch.Tensor, bias: Any, out: torch.Tensor, product: torch.Tensor
    ) -> None:
        """x @ W, with W as torch multiplies by it: (in, out)."""
        place = self.places.of(turned)
        if place is not None and 1 < product.shape[-1] == turned.shape[-1]:
            columns = torch.arange(product.shape[-1]).expand(product.shape)
            added = None if bias is None else self.places.of(bias)
            if added is not None and added.index.numel() != product.shape[-1]:
                added = None
            shadow = _Shadow(product, columns, place.along(turned.ndim - 1), added, self.numbers.of(x))
            if turned.ndim == 2:
                shadow = self._by_part(shadow, x, turned, place, 0, torch.matmul)
            self._shadows[id(out)] = shadow
            self.numbers.keep(product, columns)

    def convolution(self, args: Any, out: torch.Tensor, plain: torch.Tensor) -> None:
        """A convolution: `plain` is its output without the bias."""
        x, weight, bias = args[:3]
        place, transposed, groups = self.places.of(weight), args[6], args[8]
        if place is None or out.shape[1] < 2 or (transposed and groups > 1):
            return
        columns = torch.arange(out.shape[1]).reshape(-1, *(1,) * (out.ndim - 2)).expand(out.shape)
        added = None if bias is None else self.places.of(bias)
        shadow = _Shadow(plain, columns, place.along(1 if transposed else 0), added, self.numbers.of(x))
        if groups == 1 and not transposed:
            more = (None, *args[3:])
            shadow = self._by_part(shadow, x, weight, place, 1, lambda part, rows: torch.convolution(part, rows, *more))
        self._shadows[id(out)] = shadow
        self.numbers.keep(plain, columns)

    def _by_part(
        self, shadow: _Shadow, x: torch.Tensor, weight: torch.Tensor, place: Place, axis: int, product: Any
    ) -> _Shadow:
        """The shadow of x @ W where x joins several values: also the product of each with its rows of W, along `axis`
        of W, as a model makes it that keeps them apart."""
        channels = axis == 1
        lengths = self._joins.get((shadow.given, channels)) if shadow.given is not None else None
        if lengths is None or sum(lengths) != weight.shape[axis]:
            return shadow
        pieces: list[int | None] = []
        parts: list[_Shadow] = []
        at = 0
        for length in lengths:
            part = x.narrow(1 if channels else x.ndim - 1, at, length).contiguous()
            made = product(part, weight.narrow(axis, at, length))
            rows = Place(place.source, place.index.narrow(axis, at, length))
            at += length
            self.numbers.keep(part, made)
            number, source = self.numbers.of(part), self.places.located(rows)
            pieces.append(source)
            if source is not None:
                self.record.meets(number, source)
            bias = None if shadow.bias is None else self.places.located(shadow.bias)
            if bias is not None:
                self.record.meets(self.numbers.of(made), bias)
            parts.append(replace(shadow, product=made, weight=rows.along(1 - axis), given=number))
        if all(piece is not None for piece in pieces):
            self.record.cuts[place.source, shadow.given] = [piece for piece in pieces if piece is not None]
        return replace(shadow, parts=tuple(parts))

    def joined(self, given: Sequence[torch.Tensor], made: torch.Tensor, axis: int) -> None:
        """Values that are joined along the last axis, or along the channels."""
        number = self.numbers.of(made)
        lengths = [t.shape[axis] for t in given]
        if number is not None and axis == made.ndim - 1:
            self.record.joined(number, [(self.numbers.of(t), t.shape[-1]) for t in given])
            self._joins.setdefault((number, False), lengths)
        if number is not None and axis == 1:
            self._joins.setdefault((number, True), lengths)

    def scores(self, left: torch.Tensor, made: torch.Tensor) -> None:
        """A product of two data."""
        self._left[id(made)] = left

    def forget(self, made: torch.Tensor) -> None:
        """An op has written the tensor: it is no product any more."""
        self._shadows.pop(id(made), None)

    # ------------------------------------------------------------ views

    def moved(
        self, name: str, func: Any, args: Any, kwargs: Any, given: torch.Tensor, made: Sequence[torch.Tensor]
    ) -> None:
        """A view, or a copy, of a product."""
        shadow = self._shadows.get(id(given))
        if shadow is not None and name not in ("expand", "unfold", "as_strided", "diagonal"):
            self._cut(func, args, kwargs, shadow, made)
        if id(given) in self._left and name not in ("select", "slice"):
            self._left.update((id(t), self._left[id(given)]) for t in made)

    def _cut(self, func: Any, args: Any, kwargs: Any, shadow: _Shadow, made: Sequence[torch.Tensor]) -> None:
        """A view of a product: the same view of the product without its bias, and what remains of the weight."""
        columns = viewed(func, shadow.columns, args, kwargs)
        if not len(columns) == len(made) <= PIECES:
            return
        self.numbers.keep(*columns)
        whole, *parts = (self._cut_alike(func, args, kwargs, one, columns) for one in (shadow, *shadow.parts))
        for n, (t, one) in enumerate(zip(made, whole, strict=False)):
            self._shadows[id(t)] = replace(one, parts=tuple(part[n] for part in parts if len(part) == len(made)))

    def _cut_alike(
        self, func: Any, args: Any, kwargs: Any, shadow: _Shadow, columns: Sequence[torch.Tensor]
    ) -> list[_Shadow]:
        """What a view makes of one shadow; [] where its memory does not allow that."""
        products = viewed(func, shadow.product, args, kwargs)
        if len(products) != len(columns):
            return []
        out: list[_Shadow] = []
        for product, column in zip(products, columns, strict=True):
            self.numbers.keep(product)
            if column.numel() == shadow.columns.numel():
                self.numbers.same(product, shadow.product)
            else:
                number = self.numbers.of(product)
                kept = np.zeros(shadow.weight.index.numel(), bool)
                kept[column.reshape(-1).numpy()] = True
                if not kept.all():
                    self._meets_part(shadow.given, shadow.weight, kept)
                if shadow.bias is not None:
                    self._meets_part(number, shadow.bias, kept)
            out.append(replace(shadow, product=product, columns=column, parts=()))
        return out

    def _meets_part(self, number: int | None, place: Place, kept: Any) -> None:
        """The model used the part of a source that makes some columns of a product with this value."""
        source = self.places.columns(place, kept)
        if source is not None:
            self.record.meets(number, source)

    # ------------------------------------------------------------ sums and factors

    def biased(self, given: Sequence[torch.Tensor], made: torch.Tensor) -> None:
        """x @ W + b, where b is added by itself."""
        pairs = [(one, other) for one in given for other in given if one is not other]
        for product, bias in pairs:
            shadow, place = self._shadows.get(id(product)), self.places.of(bias)
            if shadow is None or shadow.bias is not None or place is None:
                continue
            if place.index.numel() == shadow.weight.index.numel() == product.shape[-1] and _along_last(shadow.columns):
                self._shadows[id(made)] = replace(shadow, bias=place)
                return

    def summed(self, one: torch.Tensor, other: torch.Tensor, made: torch.Tensor) -> None:
        """x @ W + a, plus h @ V + b: the sum of the products alone, with which a model may use a + b."""
        a, b = self._shadows.get(id(one)), self._shadows.get(id(other))
        if a is None or b is None or not torch.equal(a.columns, b.columns):
            return
        product = a.product + b.product
        self.numbers.keep(product)
        bias = a.bias or b.bias
        if a.bias is not None and b.bias is not None:
            pair = sorted((a.bias.source, b.bias.source))
            arrays = [self.record.sources[source].array for source in pair]
            plain = all(self.record.sources[source].rows is None for source in pair) and pair[0] != pair[1]
            if not plain or arrays[0].shape != arrays[1].shape or not torch.equal(a.bias.index, b.bias.index):
                return
            bias = Place(self.record.derived("sum", pair, arrays[0] + arrays[1]), a.bias.index)
        parts = (replace(a, bias=bias, parts=()), replace(b, bias=bias, parts=()))
        if bias is not None:
            kept = np.zeros(bias.index.numel(), bool)
            kept[a.columns.reshape(-1).numpy()] = True
            for number in (self.numbers.of(part) for part in (product, a.product, b.product)):
                if number is not None:
                    self._meets_part(number, bias, kept)
        else:
            self.numbers.of(product)
        self._shadows[id(made)] = _Shadow(product, a.columns, a.weight, bias, None, parts)

    def scaled(self, name: str, args: Any, made: torch.Tensor) -> None:
        """A product, or the left factor of one, by a number: what it is if the number is part of the weight."""
        x, factor = args[:2]
        if not isinstance(x, torch.Tensor):
            x, factor = factor, x
        one = x if id(x) in self._shadows else self._left.get(id(x))
        shadow = None if one is None else self._shadows.get(id(one))
        self._shadows.pop(id(made), None)
        if isinstance(factor, torch.Tensor):
            if factor.numel() != 1 or id(factor) in self.fixed:
                return
            factor = float(factor)
        factor = 1 / factor if name == "div" else factor
        if one is None or shadow is None:
            return
        product = shadow.product * factor
        self.numbers.keep(product, one)
        number = self.numbers.of(product)
        if shadow.bias is not None:
            self.record.values.add(array_of(one * factor))
            bias = self.places.located(shadow.bias)
            if bias is not None:
                self.record.meets(number, bias)
        if one is x:
            self._shadows[id(made)] = replace(shadow, product=product, parts=())


def _along_last(columns: torch.Tensor) -> bool:
    """True if the columns of a product lie along its last axis."""
    row = columns[(0,) * (columns.ndim - 1)]
    return bool((row == torch.arange(len(row))).all())
