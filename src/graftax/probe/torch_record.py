"""Record one float64 run of a torch model: its values, op by op and parameter by parameter, and their twins.

An op that uses several parameters is written out one at a time (x @ W, then + b; x - mean, then xhat, then xhat * w),
so that each Flax leaf can be decided alone. Only what torch itself computes on the way is written out: values that
nobody makes are found by chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graftax.probe import torch_derived
from graftax.probe.record import Record
from graftax.probe.torch_nests import array_of, tensors
from graftax.probe.torch_norms import NORMS, Made, along_channels
from graftax.probe.torch_numbers import Numbers
from graftax.probe.torch_places import Place, Places
from graftax.probe.torch_products import PIECES, Products

_VIEWS = frozenset((
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "split", "split_with_sizes",
    "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "chunk", "unbind", "slice", "select", "narrow",
    "squeeze",
    "unsqueeze", "expand", "alias", "clone", "contiguous", "flatten", "unfold", "detach", "_to_copy", "lift_fresh",
    "movedim", "swapaxes", "diagonal", "as_strided", "to", "numpy_T", "mT",
))  # fmt: skip
"""Ops that move values and compute none."""
_JOINED = 4
"""Most values whose joining is noted."""


class TorchRecorder(TorchDispatchMode):
    """Records while it is active. parameters: id of a tensor of the state_dict -> its source."""

    def __init__(self, record: Record, parameters: Mapping[int, int]) -> None:
        super().__init__()
        self.record = record
        self._of: dict[int, frozenset[int]] = {key: frozenset((source,)) for key, source in parameters.items()}
        """id of a tensor made from parameters alone -> the sources."""
        self._whole = dict(parameters)
        """id of a tensor that is a parameter, or a view of all of it -> the source."""
        self._numbers = Numbers(record)
        self._places = Places(record, self._whole)
        self._products = Products(record, self._numbers, self._places, self._of)
        self._padded: dict[int, torch.Tensor] = {}
        """id of a tensor padded with zeros -> the tensor without."""

    def begin(self, inputs: Iterable[torch.Tensor]) -> None:
        """Record the inputs."""
        for tensor in inputs:
            self._numbers.of(tensor)

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
        self._numbers.keep(*made)
        sources = frozenset[int]().union(*(self._of.get(id(t), frozenset()) for t in given))
        only = bool(given) and all(id(t) in self._of for t in given)
        for t in made:
            if only:
                self._of[id(t)] = sources
            elif id(t) in self._of and func._schema.is_mutable:
                self._of.pop(id(t))
        if name in _VIEWS and given:
            self._moved(name, func, args, kwargs, given[0], made)
            return
        if only and made and name in torch_derived.OPS:
            first = self._whole.get(id(given[0]))
            source = torch_derived.derived(self.record, name, first, sources, array_of(made[0]))
            if source is not None:
                self._whole[id(made[0])] = source
        if only and len(given) == 2 and made and all(id(t) in self._whole for t in given):
            self.record.alone(self._numbers.of(made[0]), tuple(self._whole[id(t)] for t in given))
        if only:
            alone = (self._of[id(t)] for t in given if len(self._of[id(t)]) == 1)
            self.record.fed.update(dict.fromkeys(source for (source,) in alone))
        numbers = {id(t): self._numbers.of(t) for t in given if id(t) not in self._whole}
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
            self._products.biased(given, made[0])
            if len(given) == 2 and not func._schema.is_mutable:
                self._products.summed(given[0], given[1], made[0])
        if name == "constant_pad_nd":
            self._padded[id(made[0])] = given[0]
        if name == "cat" and 1 < len(given) <= _JOINED:
            self._products.joined(given, made[0], (args[1:] or (0,))[0] % made[0].ndim)
        if name in ("bmm", "add", "mul"):
            self._by_item(name, given, made[0])
        if name == "bmm" and not any(id(t) in self._of for t in given):
            self._products.scores(args[0], made[0])
        if name in ("mul", "div"):
            self._products.scaled(name, args, made[0])
        for t in made:
            self._numbers.again(t)
            if name not in _PRODUCTS:
                self._products.forget(t)
            if only and t.ndim > 2 and t.shape[0] > 1 and bool((t[0] == t).all()):  # one for each item of the batch
                self.record.values.add(array_of(t[0]))
            if name == "bmm" and 1 < t.shape[0] <= PIECES:
                for row in t.unbind(0):
                    self.record.values.add(array_of(row))

    def _pairs(self, given: Sequence[torch.Tensor], numbers: Mapping[int, int | None]) -> None:
        """Every parameter met every other operand."""
        for t in given:
            for source in self._sources(t):
                others = [u for u in given if u is not t]
                for other in others:
                    number = numbers.get(id(other))
                    self.record.meets(self._numbers.of(other) if number is None else number, source)
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
        self._places.moved(name, func, args, kwargs, given, made)
        for t in made:
            repeated = name == "expand" and t.ndim == 3 and given.ndim == 2  # what x @ W makes of W for a batch
            if key in self._whole and (t.numel() == given.numel() or repeated or given.ndim == t.ndim == 3):
                self._whole[id(t)] = self._whole[key]
            elif key in self._of:
                self._places.part(t)
            elif t.numel() == given.numel():
                self._numbers.same(t, given)
            elif name != "expand":
                self._numbers.again(t)
        self._products.moved(name, func, args, kwargs, given, made)

    def _by_item(self, name: str, given: Sequence[torch.Tensor], made: torch.Tensor) -> None:
        """Weights stacked along their first axis (experts): every item met its own row of the data."""
        for t in given:
            place = self._places.of(t)
            rows = len(made) if made.ndim > 1 else 0
            others = [u for u in given if u is not t and u.ndim == made.ndim and len(u) == rows]
            if place is None or t.ndim != made.ndim or len(t) != rows or not 1 < rows <= PIECES or not others:
                continue
            if name != "bmm" and (t.ndim < 3 or 1 not in t.shape[1:]):
                continue
            items = [self._places.located(Place(place.source, place.index[n])) for n in range(rows)]
            if len(set(items)) == rows:
                for n, item in enumerate(items):
                    if item is not None:
                        self.record.meets(self.record.values.add(array_of(others[0][n])), item)
                        self.record.values.add(array_of(made[n]))

    # ------------------------------------------------------------ ops with several parameters

    def _product(self, x: Any, turned: Any, bias: Any, out: torch.Tensor, product: torch.Tensor) -> None:
        """x @ W, with W as torch multiplies by it: (in, out)."""
        number = self._numbers.of(product)
        weights = self._sources(turned)
        for source in weights:
            self.record.meets(self._numbers.of(x), source)
        for source in self._sources(x):
            self.record.meets(self._numbers.of(turned), source)
        for source in self._sources(bias):
            self.record.meets(number, source)
        self._products.linear(x, turned, bias, out, product)

    def _addmm(self, args: Any, kwargs: Any, made: Sequence[torch.Tensor], before: Any) -> None:
        bias, x, weight = args[:3]
        self._numbers.keep(before)
        self._product(x, weight, bias, made[0], before)

    def _convolution(self, args: Any, kwargs: Any, made: Sequence[torch.Tensor], before: Any) -> None:
        x, weight, bias = args[:3]
        given = self._numbers.of(x)
        for source in self._sources(weight):
            self.record.meets(given, source)
            if id(x) in self._padded:  # which a model may leave to the convolution
                self.record.meets(self._numbers.of(self._padded[id(x)]), source)
        for source in self._sources(x):
            self.record.meets(self._numbers.of(weight), source)
        plain = made[0]
        if bias is not None:
            plain = made[0] - along_channels(bias, made[0])
            number = self._numbers.of(plain)
            for source in self._sources(bias):
                self.record.meets(number, source)
        self._products.convolution(args, made[0], plain)

    def _attention(self, args: Any, kwargs: Any, made: Sequence[torch.Tensor], before: Any) -> None:
        """The scores of a fused attention."""
        q, k = args[:2]
        k = k if q.ndim < 4 or k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = q @ k.transpose(-1, -2)
        self._products.scores(q, scores)
        self._numbers.keep(scores)
        self._numbers.of(scores)
        scale = kwargs.get("scale")
        self._products.scaled("mul", (scores, q.shape[-1] ** -0.5 if scale is None else scale), scores)

    def _norm(self, x: torch.Tensor, steps: Sequence[Made]) -> None:
        """x, then each value that is made of it, with the parameters that are used with the one before."""
        number = self._numbers.of(x)
        for value, parameters in steps:
            for parameter in parameters:
                for source in self._sources(parameter):
                    self.record.meets(number, source)
            self._numbers.keep(value)
            number = self._numbers.of(value)


_PRODUCTS = frozenset(("mm", "bmm", "addmm", "convolution", "add", "mul", "div"))
_WRITE_OUT = {
    "addmm": TorchRecorder._addmm, "convolution": TorchRecorder._convolution,
    "_scaled_dot_product_flash_attention_for_cpu": TorchRecorder._attention,
}  # fmt: skip


def _before(name: str, args: Any) -> Any:
    """What must be computed before an op that may change its operands: the product of addmm."""
    return torch.mm(args[1], args[2]) if name == "addmm" else None
