"""Record one float64 run of a torch model: its values, op by op and parameter by parameter, and their twins.

An op that uses several parameters is written out one at a time (x @ W, then + b; x - mean, then xhat, then xhat * w),
so that each Flax leaf can be decided alone. Only what torch itself computes on the way is written out: values that
nobody makes are found by chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graftax.ops import FoldWeightNorm
from graftax.probe.record import Record
from graftax.probe.torch_nests import array_of, tensors
from graftax.probe.torch_norms import NORMS, Made

_VIEWS = frozenset((
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "split", "split_with_sizes",
    "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "chunk", "unbind", "slice", "select", "narrow",
    "squeeze",
    "unsqueeze", "expand", "alias", "clone", "contiguous", "flatten", "unfold", "detach", "_to_copy", "lift_fresh",
    "movedim", "swapaxes", "diagonal", "as_strided", "to", "numpy_T", "mT",
))  # fmt: skip
"""Ops that move values and compute none."""
_COPIES = frozenset(("clone", "contiguous", "alias", "detach", "_to_copy", "lift_fresh", "to"))
"""Views and copies that keep the order of the entries."""
_PIECES = 64
"""Most pieces that one product, or one stack of weights, is cut into."""

_JOINED = 4
"""Most values whose joining is noted."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Which entries of a source a tensor holds: their flat numbers, in the tensor's layout."""

    source: int
    index: torch.Tensor


@dataclass(slots=True)
class _Shadow:
    """What is known of a product x @ W + b (or a convolution), or of a view of it: the product without b, the column
    (channel) of the product that each entry comes from, and the entries of W and b that belong to each column.

    given   the value of x
    parts   where x joins several values: the product of each with its own rows of W, seen in the same way
    """

    product: torch.Tensor
    columns: torch.Tensor
    weight: _Place
    bias: _Place | None
    given: int | None
    parts: tuple[_Shadow, ...] = ()


class TorchRecorder(TorchDispatchMode):
    """Records while it is active. parameters: id of a tensor of the state_dict -> its source."""

    def __init__(self, record: Record, parameters: Mapping[int, int]) -> None:
        super().__init__()
        self.record = record
        self._of: dict[int, frozenset[int]] = {key: frozenset((source,)) for key, source in parameters.items()}
        """id of a tensor made from parameters alone -> the sources."""
        self._whole = dict(parameters)
        """id of a tensor that is a parameter, or a view of all of it -> the source."""
        self._places: dict[int, _Place] = {}
        self._number: dict[int, int | None] = {}
        self._shadows: dict[int, _Shadow] = {}
        self._left: dict[int, torch.Tensor] = {}
        """id of a product of two data -> its left factor."""
        self._padded: dict[int, torch.Tensor] = {}
        """id of a tensor padded with zeros -> the tensor without."""
        self._joins: dict[tuple[int, bool], list[int]] = {}
        """(a value, along its channels or its last axis?) -> the lengths of the values that were joined in it."""
        self._alive: list[Any] = []

    def begin(self, inputs: Iterable[torch.Tensor]) -> None:
        """Record the inputs."""
        for tensor in inputs:
            self.value(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        name = name.rstrip("_") if func._schema.is_mutable else name
        before = _before(name, args)
        out = func(*args, **kwargs)
        self._note(name, func, args, kwargs, out, before)
        return out

    # ------------------------------------------------------------ one op

    def _note(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, before: Any) -> None:
        given, made = list(tensors((args, kwargs))), list(tensors(out))
        self._alive += made
        sources = frozenset[int]().union(*(self._of.get(id(t), frozenset()) for t in given))
        only = bool(given) and all(id(t) in self._of for t in given)
        for t in made:
            if only:
                self._of[id(t)] = sources
            elif id(t) in self._of and func._schema.is_mutable:
                self._of.pop(id(t))
        if name in _VIEWS and given:
            self._moved(name, func, args, kwargs, given[0], made)
            if id(given[0]) in self._left and name not in ("select", "slice"):
                self._left.update((id(t), self._left[id(given[0])]) for t in made)
            return
        if only and name in ("add", "mul", "div", "_weight_norm_interface", "_weight_norm"):
            self._derived(name, given, made, sources)
        if only and len(given) == 2 and made and all(id(t) in self._whole for t in given):
            self.record.alone(self.value(made[0]), tuple(self._whole[id(t)] for t in given))
        if only:
            alone = (self._of[id(t)] for t in given if len(self._of[id(t)]) == 1)
            self.record.fed.update(dict.fromkeys(source for (source,) in alone))
        numbers = {id(t): self.value(t) for t in given if id(t) not in self._whole}
        write = _WRITE_OUT.get(name)
        if name in NORMS:
            self._norm(args[0], NORMS[name](args))
        elif write is not None:
            write(self, args, kwargs, made, before)
        else:
            self._pairs(given, numbers)
        if name == "mm" or (name == "bmm" and id(args[1]) in self._whole):
            self._product(args[0], args[1], None, made[0], made[0])
        if name == "add":
            self._biased(given, made)
            if len(given) == 2 and not func._schema.is_mutable:
                self._summed(given[0], given[1], made[0])
        if name == "constant_pad_nd":
            self._padded[id(made[0])] = given[0]
        if name == "cat" and 1 < len(given) <= _JOINED:
            self._joined(given, made[0], (args[1:] or (0,))[0] % made[0].ndim)
        if name in ("bmm", "add", "mul"):
            self._by_item(name, given, made[0])
        if name == "bmm" and not any(id(t) in self._of for t in given):
            self._left[id(made[0])] = args[0]
        if name in ("mul", "div"):
            self._scaled(name, args, made[0])
        for t in made:
            self._number.pop(id(t), None)
            if name not in _PRODUCTS:
                self._shadows.pop(id(t), None)
            self.value(t)
            if only and t.ndim > 2 and t.shape[0] > 1 and bool((t[0] == t).all()):  # one for each item of the batch
                self.record.values.add(array_of(t[0]))
            if name == "bmm" and 1 < t.shape[0] <= 64:
                for row in t.unbind(0):
                    self.record.values.add(array_of(row))

    def value(self, tensor: torch.Tensor) -> int | None:
        """The number of a tensor's value, recorded if it is new."""
        key = id(tensor)
        if key not in self._number:
            self._number[key] = self.record.values.add(array_of(tensor)) if tensor.numel() > 1 else None
            self._alive.append(tensor)
        return self._number[key]

    def _pairs(self, given: Sequence[torch.Tensor], numbers: Mapping[int, int | None]) -> None:
        """Every parameter met every other operand."""
        for t in given:
            for source in self._sources(t):
                others = [u for u in given if u is not t]
                for other in others:
                    number = numbers.get(id(other))
                    self.record.meets(self.value(other) if number is None else number, source)
                if not others:
                    self.record.meets(None, source)

    def _sources(self, tensor: Any) -> list[int]:
        """The sources that a tensor stands for: itself if it is a parameter, else all that it was made from."""
        if tensor is None:
            return []
        key = id(tensor)
        if key in self._whole:
            return [self._whole[key]]
        return sorted(self._of.get(key, ()))

    def _moved(
        self, name: str, func: Any, args: Any, kwargs: Any, given: torch.Tensor, made: Sequence[torch.Tensor]
    ) -> None:
        """A view, or a copy, of a tensor."""
        key = id(given)
        place = self._place(given)
        if place is not None:
            index = [place.index.contiguous()] if name in _COPIES else _viewed(func, place.index, args, kwargs)
            for t, one in zip(made, index, strict=False):
                if one.shape == t.shape:
                    self._places[id(t)] = _Place(place.source, one)
        for t in made:
            repeated = name == "expand" and t.ndim == 3 and given.ndim == 2  # what x @ W makes of W for a batch
            if key in self._whole and (t.numel() == given.numel() or repeated or given.ndim == t.ndim == 3):
                self._whole[id(t)] = self._whole[key]
            elif key in self._of:
                self._part(t)
            elif t.numel() == given.numel():
                number = self.value(given)
                self._number[id(t)] = number
                if number is not None:
                    self.record.values.items[number].shapes.add(tuple(t.shape))
            elif name != "expand":
                self._number.pop(id(t), None)
                self.value(t)
        shadow = self._shadows.get(key)
        if shadow is not None and name not in ("expand", "unfold", "as_strided", "diagonal"):
            self._cut(func, args, kwargs, shadow, made)

    def _place(self, tensor: torch.Tensor) -> _Place | None:
        """Where the entries of a parameter, or of a view of one, lie in its source."""
        key = id(tensor)
        if key not in self._places and key in self._whole:
            whole = self.record.sources[self._whole[key]]
            if whole.rows is None and whole.array.shape == tuple(tensor.shape):
                index = torch.arange(tensor.numel()).reshape(tensor.shape)
                self._places[key] = _Place(self._whole[key], index)
        return self._places.get(key)

    def _part(self, made: torch.Tensor) -> None:
        """Some rows of a parameter: W[a:b], W.chunk(3)[i], W[:, a:b], W[i]."""
        place = self._places.get(id(made))
        source = None if place is None else self._located(place)
        if source is not None:
            self._whole[id(made)] = source

    def _located(self, place: _Place) -> int | None:
        """The source that holds these entries: all, or some rows along one axis. None if it is neither."""
        shape = self.record.sources[place.source].array.shape
        index = place.index
        spans: list[tuple[int, ...]] = [(int(at),) for at in np.unravel_index(int(index.reshape(-1)[0]), shape)]
        count = 1
        for axis, size in enumerate(index.shape):
            line = index[tuple(slice(None) if a == axis else 0 for a in range(index.ndim))].numpy()
            at = np.unravel_index(line, shape)
            moved = [a for a, row in enumerate(at) if (row != row[0]).any()]
            if not moved:  # repeated
                continue
            if len(moved) > 1:
                return place.source if index.numel() == int(np.prod(shape)) else None
            spans[moved[0]] = tuple(int(row) for row in at[moved[0]])
            count *= size
        if count != int(np.prod([len(span) for span in spans])):
            return None
        return self._piece(place.source, spans)

    def _piece(self, source: int, spans: Sequence[tuple[int, ...]]) -> int | None:
        """The source of these rows along each axis."""
        shape = self.record.sources[source].array.shape
        short = [axis for axis, span in enumerate(spans) if len(span) < shape[axis]]
        if not short:
            return source
        rows = spans[short[0]]
        if len(short) > 1 or list(rows) != sorted(rows):
            return None
        return self.record.piece(source, rows, short[0], len(rows) == 1 and len(shape) > 1)

    def _cut(self, func: Any, args: Any, kwargs: Any, shadow: _Shadow, made: Sequence[torch.Tensor]) -> None:
        """A view of a product: the same view of the product without its bias, and what remains of the weight."""
        columns = _viewed(func, shadow.columns, args, kwargs)
        if not len(columns) == len(made) <= _PIECES:
            return
        self._alive += columns
        whole, *parts = (self._cut_alike(func, args, kwargs, one, columns) for one in (shadow, *shadow.parts))
        for n, (t, one) in enumerate(zip(made, whole, strict=False)):
            self._shadows[id(t)] = replace(one, parts=tuple(part[n] for part in parts if len(part) == len(made)))

    def _cut_alike(
        self, func: Any, args: Any, kwargs: Any, shadow: _Shadow, columns: Sequence[torch.Tensor]
    ) -> list[_Shadow]:
        """What a view makes of one shadow; [] where its memory does not allow that."""
        products = _viewed(func, shadow.product, args, kwargs)
        if len(products) != len(columns):
            return []
        out: list[_Shadow] = []
        for product, column in zip(products, columns, strict=True):
            self._alive.append(product)
            if column.numel() == shadow.columns.numel():
                number = self._number[id(product)] = self.value(shadow.product)
                if number is not None:
                    self.record.values.items[number].shapes.add(tuple(product.shape))
            else:
                number = self.value(product)
                kept = np.zeros(shadow.weight.index.numel(), bool)
                kept[column.reshape(-1).numpy()] = True
                if not kept.all():
                    self._meets_part(shadow.given, shadow.weight, kept)
                if shadow.bias is not None:
                    self._meets_part(number, shadow.bias, kept)
            out.append(replace(shadow, product=product, columns=column, parts=()))
        return out

    def _meets_part(self, number: int | None, place: _Place, kept: Any) -> None:
        """The model used the part of a source that makes some columns of a product with this value."""
        shape = self.record.sources[place.source].array.shape
        flat = place.index.reshape(-1).numpy()
        full, part = np.unravel_index(flat, shape), np.unravel_index(flat[kept], shape)
        spans = [
            tuple(range(size)) if (one == one[0]).all() else tuple(int(row) for row in np.unique(some))
            for size, one, some in zip(shape, full, part, strict=True)
        ]
        moved = [len(span) for span, one in zip(spans, full, strict=True) if not (one == one[0]).all()]
        source = self._piece(place.source, spans) if int(np.prod(moved)) == int(kept.sum()) else None
        if source is not None:
            self.record.meets(number, source)

    def _by_item(self, name: str, given: Sequence[torch.Tensor], made: torch.Tensor) -> None:
        """Weights stacked along their first axis (experts): every item met its own row of the data."""
        for t in given:
            place = self._place(t)
            rows = len(made) if made.ndim > 1 else 0
            others = [u for u in given if u is not t and u.ndim == made.ndim and len(u) == rows]
            if place is None or t.ndim != made.ndim or len(t) != rows or not 1 < rows <= _PIECES or not others:
                continue
            if name != "bmm" and (t.ndim < 3 or 1 not in t.shape[1:]):
                continue
            items = [self._located(_Place(place.source, place.index[n])) for n in range(rows)]
            if len(set(items)) == rows:
                for n, item in enumerate(items):
                    if item is not None:
                        self.record.meets(self.record.values.add(array_of(others[0][n])), item)
                        self.record.values.add(array_of(made[n]))

    def _derived(
        self, name: str, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor], sources: frozenset[int]
    ) -> None:
        """A tensor computed from parameters alone, if graftax can compute it too: a sum, a weight norm."""
        if len(made) == 0 or any(self.record.sources[s].rows is not None for s in sources):
            return
        out = array_of(made[0])
        items = [self.record.sources[s] for s in sorted(sources)]
        if name == "div" and len(items) == 3 and id(given[0]) in self._whole:
            self._spectral(self._whole[id(given[0])], sources, out, made[0])
        elif name == "add" and len(items) == 2 and all(item.array.shape == out.shape for item in items):
            if np.allclose(items[0].array + items[1].array, out):
                self._whole[id(made[0])] = self.record.derived("sum", sorted(sources), items[0].array + items[1].array)
        elif len(items) == 2 and {item.array.ndim for item in items} == {out.ndim}:
            for g, v in (sorted(sources), sorted(sources, reverse=True)):
                self._folded(g, v, out, made[0])

    def _spectral(self, weight: int, sources: frozenset[int], out: Any, made: torch.Tensor) -> None:
        """W / (u W v), with W as a matrix of one axis and the rest."""
        w = self.record.sources[weight].array
        u, v = (source for source in sources if source != weight)
        for one, other in ((u, v), (v, u)):
            left, right = self.record.sources[one].array, self.record.sources[other].array
            for axis in range(min(w.ndim, 2)):
                matrix = np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
                fits = (*left.shape, *right.shape) == matrix.shape and w.shape == out.shape
                if fits and np.allclose(w / (left @ matrix @ right), out):
                    self._whole[id(made)] = self.record.derived("spectral_norm", (weight, one, other), out)
                    return

    def _folded(self, g: int, v: int, out: Any, made: torch.Tensor) -> None:
        scale, weight = self.record.sources[g].array, self.record.sources[v].array
        axes = [axis for axis in range(weight.ndim) if scale.shape == _kept(weight.shape, axis)]
        for axis in axes if weight.shape == out.shape else ():
            if np.allclose(FoldWeightNorm(axis).apply((scale, weight))[0], out):
                self._whole[id(made)] = self.record.derived(f"weight_norm {axis}", (g, v), out)
                return

    def _biased(self, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> None:
        """x @ W + b, where b is added by itself."""
        pairs = [(one, other) for one in given for other in given if one is not other]
        for product, bias in pairs:
            shadow, place = self._shadows.get(id(product)), self._place(bias)
            if shadow is None or shadow.bias is not None or place is None:
                continue
            if place.index.numel() == shadow.weight.index.numel() == product.shape[-1] and _along_last(shadow.columns):
                self._shadows[id(made[0])] = replace(shadow, bias=place)
                return

    def _summed(self, one: torch.Tensor, other: torch.Tensor, made: torch.Tensor) -> None:
        """x @ W + a, plus h @ V + b: the sum of the products alone, with which a model may use a + b."""
        a, b = self._shadows.get(id(one)), self._shadows.get(id(other))
        if a is None or b is None or not torch.equal(a.columns, b.columns):
            return
        product = a.product + b.product
        self._alive.append(product)
        bias = a.bias or b.bias
        if a.bias is not None and b.bias is not None:
            pair = sorted((a.bias.source, b.bias.source))
            arrays = [self.record.sources[source].array for source in pair]
            plain = all(self.record.sources[source].rows is None for source in pair) and pair[0] != pair[1]
            if not plain or arrays[0].shape != arrays[1].shape or not torch.equal(a.bias.index, b.bias.index):
                return
            bias = _Place(self.record.derived("sum", pair, arrays[0] + arrays[1]), a.bias.index)
        parts = (replace(a, bias=bias, parts=()), replace(b, bias=bias, parts=()))
        if bias is not None:
            kept = np.zeros(bias.index.numel(), bool)
            kept[a.columns.reshape(-1).numpy()] = True
            for number in (self.value(part) for part in (product, a.product, b.product)):
                if number is not None:
                    self._meets_part(number, bias, kept)
        else:
            self.value(product)
        self._shadows[id(made)] = _Shadow(product, a.columns, a.weight, bias, None, parts)

    def _scaled(self, name: str, args: Any, made: torch.Tensor) -> None:
        """A product, or the left factor of one, by a number: what it is if the number is part of the weight."""
        x, factor = args[:2]
        if not isinstance(x, torch.Tensor):
            x, factor = factor, x
        one = x if id(x) in self._shadows else self._left.get(id(x))
        shadow = None if one is None else self._shadows.get(id(one))
        self._shadows.pop(id(made), None)
        if isinstance(factor, torch.Tensor):
            if factor.numel() != 1 or id(factor) in self._of:
                return
            factor = float(factor)
        factor = 1 / factor if name == "div" else factor
        if one is None or shadow is None:
            return
        product = shadow.product * factor
        self._alive += [product, one]
        number = self.value(product)
        if shadow.bias is not None:
            self.record.values.add(array_of(one * factor))
            bias = self._located(shadow.bias)
            if bias is not None:
                self.record.meets(number, bias)
        if one is x:
            self._shadows[id(made)] = replace(shadow, product=product, parts=())

    # ------------------------------------------------------------ ops with several parameters

    def _product(self, x: Any, turned: Any, bias: Any, out: torch.Tensor, product: torch.Tensor) -> None:
        """x @ W, with W as torch multiplies by it: (in, out)."""
        number = self.value(product)
        weights = self._sources(turned)
        for source in weights:
            self.record.meets(self.value(x), source)
        for source in self._sources(x):
            self.record.meets(self.value(turned), source)
        for source in self._sources(bias):
            self.record.meets(number, source)
        place = self._place(turned)
        if place is not None and 1 < product.shape[-1] == turned.shape[-1]:
            columns = torch.arange(product.shape[-1]).expand(product.shape)
            added = None if bias is None else self._place(bias)
            if added is not None and added.index.numel() != product.shape[-1]:
                added = None
            shadow = _Shadow(product, columns, _along(place, turned.ndim - 1), added, self.value(x))
            if turned.ndim == 2:
                shadow = self._by_part(shadow, x, turned, place, 0, torch.matmul)
            self._shadows[id(out)] = shadow
            self._alive += [product, columns]

    def _joined(self, given: Sequence[torch.Tensor], made: torch.Tensor, axis: int) -> None:
        """Values that are joined along the last axis, or along the channels."""
        number = self.value(made)
        lengths = [t.shape[axis] for t in given]
        if number is not None and axis == made.ndim - 1:
            self.record.joined(number, [(self.value(t), t.shape[-1]) for t in given])
            self._joins.setdefault((number, False), lengths)
        if number is not None and axis == 1:
            self._joins.setdefault((number, True), lengths)

    def _by_part(
        self, shadow: _Shadow, x: torch.Tensor, weight: torch.Tensor, place: _Place, axis: int, product: Any
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
            rows = _Place(place.source, place.index.narrow(axis, at, length))
            at += length
            self._alive += [part, made]
            number, source = self.value(part), self._located(rows)
            pieces.append(source)
            if source is not None:
                self.record.meets(number, source)
            bias = None if shadow.bias is None else self._located(shadow.bias)
            if bias is not None:
                self.record.meets(self.value(made), bias)
            parts.append(replace(shadow, product=made, weight=_along(rows, 1 - axis), given=number))
        if all(piece is not None for piece in pieces):
            self.record.cuts[place.source, shadow.given] = [piece for piece in pieces if piece is not None]
        return replace(shadow, parts=tuple(parts))

    def _addmm(self, args: Any, kwargs: Any, made: Sequence[torch.Tensor], before: Any) -> None:
        bias, x, weight = args[:3]
        product = before if before is not None else torch.mm(x, weight)
        self._alive.append(product)
        self._product(x, weight, bias, made[0], product)

    def _convolution(self, args: Any, kwargs: Any, made: Sequence[torch.Tensor], before: Any) -> None:
        x, weight, bias = args[:3]
        given = self.value(x)
        for source in self._sources(weight):
            self.record.meets(given, source)
            if id(x) in self._padded:  # which a model may leave to the convolution
                self.record.meets(self.value(self._padded[id(x)]), source)
        for source in self._sources(x):
            self.record.meets(self.value(weight), source)
        plain = made[0]
        if bias is not None:
            plain = made[0] - bias.reshape(1, -1, *(1,) * (made[0].ndim - 2))
            number = self.value(plain)
            for source in self._sources(bias):
                self.record.meets(number, source)
        place, transposed, groups = self._place(weight), args[6], args[8]
        if place is None or made[0].shape[1] < 2 or (transposed and groups > 1):
            return
        columns = torch.arange(made[0].shape[1]).reshape(-1, *(1,) * (made[0].ndim - 2)).expand(made[0].shape)
        added = None if bias is None else self._place(bias)
        shadow = _Shadow(plain, columns, _along(place, 1 if transposed else 0), added, given)
        if groups == 1 and not transposed:
            more = (None, *args[3:])
            shadow = self._by_part(shadow, x, weight, place, 1, lambda part, rows: torch.convolution(part, rows, *more))
        self._shadows[id(made[0])] = shadow
        self._alive += [plain, columns]

    def _attention(self, args: Any, kwargs: Any, made: Sequence[torch.Tensor], before: Any) -> None:
        """The scores of a fused attention."""
        q, k = args[:2]
        k = k if q.ndim < 4 or k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = q @ k.transpose(-1, -2)
        self._left[id(scores)] = q
        self._alive.append(scores)
        self.value(scores)
        scale = kwargs.get("scale")
        self._scaled("mul", (scores, q.shape[-1] ** -0.5 if scale is None else scale), scores)

    def _norm(self, x: torch.Tensor, steps: Sequence[Made]) -> None:
        """x, then each value that is made of it, with the parameters that are used with the one before."""
        number = self.value(x)
        for value, parameters in steps:
            for parameter in parameters:
                for source in self._sources(parameter):
                    self.record.meets(number, source)
            self._alive.append(value)
            number = self.value(value)


_PRODUCTS = frozenset(("mm", "bmm", "addmm", "convolution", "add", "mul", "div"))
_WRITE_OUT = {
    "addmm": TorchRecorder._addmm, "convolution": TorchRecorder._convolution,
    "_scaled_dot_product_flash_attention_for_cpu": TorchRecorder._attention,
}  # fmt: skip


def _before(name: str, args: Any) -> Any:
    """What must be computed before an op that may change its operands: the product of addmm."""
    return torch.mm(args[1], args[2]) if name == "addmm" else None


def _along(place: _Place, axis: int) -> _Place:
    """The entries along one axis of a weight: one for each column of its products."""
    first = place.index[tuple(slice(None) if a == axis else 0 for a in range(place.index.ndim))]
    return _Place(place.source, first)


def _along_last(columns: torch.Tensor) -> bool:
    """True if the columns of a product lie along its last axis."""
    row = columns[(0,) * (columns.ndim - 1)]
    return bool((row == torch.arange(len(row))).all())


def _kept(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return tuple(size if a == axis else 1 for a, size in enumerate(shape))


def _viewed(func: Any, tensor: torch.Tensor, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The same view of another tensor; [] where its memory does not allow that."""
    try:
        return list(tensors(func(tensor, *args[1:], **kwargs)))
    except RuntimeError:
        try:
            return list(tensors(func(tensor.contiguous(), *args[1:], **kwargs)))
        except RuntimeError:
            return []
