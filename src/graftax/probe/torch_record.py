"""Record one float64 run of a torch model: its values, op by op and parameter by parameter, and their twins.

An op that uses several parameters is written out one at a time (x @ W, then + b; x - mean, then xhat, then xhat * w), so
that each Flax leaf can be decided alone. Only what torch itself computes on the way is written out: values that nobody
makes are found by chance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graftax.adapters import torch_float64
from graftax.errors import ModelError, escape
from graftax.probe.record import Record, Source
from graftax.probe.recurrent import stepwise
from graftax.probe.values import Values

_VIEWS = frozenset((
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "split", "split_with_sizes",
    "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "chunk", "unbind", "slice", "select", "narrow", "squeeze",
    "unsqueeze", "expand", "alias", "clone", "contiguous", "flatten", "unfold", "detach", "_to_copy", "lift_fresh",
    "movedim", "swapaxes", "diagonal", "as_strided", "to", "numpy_T", "mT",
))  # fmt: skip
"""Ops that move values and compute none."""
_PIECES = 16
"""Most pieces that one product is cut into."""


@dataclass(slots=True)
class _Shadow:
    """What is known of a product x @ W + b, or of a view of it: the product without b, the row of W that each entry
    comes from, and the sources W and b."""

    product: torch.Tensor
    rows: torch.Tensor
    weight: int
    bias: int | None
    given: int | None


class TorchRecorder(TorchDispatchMode):
    """Records while it is active. parameters: id of a tensor of the state_dict -> its source."""

    def __init__(self, record: Record, parameters: Mapping[int, int]) -> None:
        super().__init__()
        self.record = record
        self._of: dict[int, frozenset[int]] = {key: frozenset((source,)) for key, source in parameters.items()}
        """id of a tensor made from parameters alone -> the sources."""
        self._whole = dict(parameters)
        """id of a tensor that is a parameter, or a view of all of it -> the source."""
        self._number: dict[int, int | None] = {}
        self._shadows: dict[int, _Shadow] = {}
        self._alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = (
            func._schema.name.removeprefix("aten::").rstrip("_")
            if func._schema.is_mutable
            else func._schema.name.removeprefix("aten::")
        )
        before = _before(name, args)
        out = func(*args, **kwargs)
        self._note(name, func, args, kwargs, out, before)
        return out

    # ------------------------------------------------------------ one op

    def _note(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, before: Any) -> None:
        given = [t for t in _tensors((args, kwargs))]
        made = [t for t in _tensors(out)]
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
            return
        if only and name in ("add", "mul", "div", "_weight_norm_interface", "_weight_norm"):
            self._derived(name, given, made, sources)
        numbers = {id(t): self._value(t) for t in given if id(t) not in self._whole}
        write = _WRITE_OUT.get(name)
        if write is not None:
            write(self, args, kwargs, made, before)
        else:
            self._pairs(given, numbers)
        if name == "mm" or (name == "bmm" and id(args[1]) in self._whole):
            self._product(args[0], args[1], None, made[0], made[0])
        if name == "add":
            self._biased(given, made)
        for t in made:
            self._number.pop(id(t), None)
            if name not in _PRODUCTS:
                self._shadows.pop(id(t), None)
            self._value(t)
            if name == "bmm" and 1 < t.shape[0] <= 64:
                for row in t.unbind(0):
                    self.record.values.add(_array(row))

    def _value(self, tensor: torch.Tensor) -> int | None:
        """The number of a tensor's value, recorded if it is new."""
        key = id(tensor)
        if key not in self._number:
            self._number[key] = self.record.values.add(_array(tensor)) if tensor.numel() > 1 else None
            self._alive.append(tensor)
        return self._number[key]

    def _pairs(self, given: Sequence[torch.Tensor], numbers: Mapping[int, int | None]) -> None:
        """Every parameter met every other operand."""
        for t in given:
            for source in self._sources(t):
                others = [u for u in given if u is not t]
                for other in others:
                    number = numbers.get(id(other))
                    self.record.meets(self._value(other) if number is None else number, source)
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
        for t in made:
            repeated = name == "expand" and t.ndim == 3 and given.ndim == 2  # what x @ W makes of W for a batch
            if key in self._whole and (t.numel() == given.numel() or repeated or given.ndim == t.ndim == 3):
                self._whole[id(t)] = self._whole[key]
            elif key in self._of:
                self._part(given, t)
            elif t.numel() == given.numel():
                number = self._value(given)
                self._number[id(t)] = number
                if number is not None:
                    self.record.values.items[number].shapes.add(tuple(t.shape))
            elif name != "expand":
                self._number.pop(id(t), None)
                self._value(t)
        shadow = self._shadows.get(key)
        if shadow is not None and name not in ("expand", "unfold", "as_strided", "diagonal"):
            self._cut(func, args, kwargs, shadow, made)

    def _part(self, given: torch.Tensor, made: torch.Tensor) -> None:
        """Some rows of a parameter: W[a:b], W.chunk(3)[i]."""
        source = self._whole.get(id(given))
        if source is None or made.ndim == 0 or made.dtype != given.dtype or given.ndim == 0:
            return
        whole = self.record.sources[source].array
        if whole.shape != tuple(given.shape) or made.ndim != given.ndim or made.shape[1:] != given.shape[1:]:
            return
        start = (made.storage_offset() - given.storage_offset()) // max(given.stride(0), 1)
        if made.stride() == given.stride() and 0 <= start <= whole.shape[0] - made.shape[0]:
            self._whole[id(made)] = self.record.piece(source, tuple(range(start, start + made.shape[0])))

    def _cut(self, func: Any, args: Any, kwargs: Any, shadow: _Shadow, made: Sequence[torch.Tensor]) -> None:
        """A view of a product: the same view of the product without its bias, and the rows of the weight that remain."""
        products = list(_tensors(func(shadow.product, *args[1:], **kwargs)))
        rows = list(_tensors(func(shadow.rows, *args[1:], **kwargs)))
        if len(products) != len(made) or len(made) > _PIECES:
            return
        for t, product, row in zip(made, products, rows, strict=True):
            self._alive += [product, row]
            now = _Shadow(product, row, shadow.weight, shadow.bias, shadow.given)
            count = self.record.sources[shadow.weight].array.shape[0]
            number = self._value(product)
            if row.numel() < shadow.rows.numel():
                kept = _in_order(row)
                if 1 <= len(kept) < count:
                    self.record.meets(shadow.given, self.record.piece(shadow.weight, kept))
                    if shadow.bias is not None:
                        self.record.meets(number, self.record.piece(shadow.bias, kept))
            self._shadows[id(t)] = now

    def _derived(
        self, name: str, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor], sources: frozenset[int]
    ) -> None:
        """A tensor computed from parameters alone, if graftax can compute it too: a sum, a weight norm."""
        if len(made) == 0 or any(self.record.sources[s].rows is not None for s in sources):
            return
        out = _array(made[0])
        items = [self.record.sources[s] for s in sorted(sources)]
        if name == "add" and len(items) == 2 and all(item.array.shape == out.shape for item in items):
            if np.allclose(items[0].array + items[1].array, out):
                self._whole[id(made[0])] = self.record.total(sorted(sources))
        elif len(items) == 2 and {item.array.ndim for item in items} == {out.ndim}:
            for g, v in (sorted(sources), sorted(sources, reverse=True)):
                self._folded(g, v, out, made[0])

    def _folded(self, g: int, v: int, out: Any, made: torch.Tensor) -> None:
        scale, weight = self.record.sources[g].array, self.record.sources[v].array
        axes = [axis for axis in range(weight.ndim) if scale.shape == _kept(weight.shape, axis)]
        for axis in axes if weight.shape == out.shape else ():
            others = tuple(a for a in range(weight.ndim) if a != axis)
            if np.allclose(scale * weight / np.sqrt((weight**2).sum(others, keepdims=True)), out):
                self._whole[id(made)] = self.record.folded((g, v), axis, out)
                return

    def _biased(self, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> None:
        """x @ W + b, where b is added by itself."""
        pairs = [(one, other) for one in given for other in given if one is not other]
        for product, bias in pairs:
            shadow, sources = self._shadows.get(id(product)), self._sources(bias)
            if shadow is not None and shadow.bias is None and len(sources) == 1 and id(bias) in self._whole:
                self._shadows[id(made[0])] = replace(shadow, bias=sources[0])
                return

    # ------------------------------------------------------------ ops with several parameters

    def _product(self, x: Any, turned: Any, bias: Any, out: torch.Tensor, product: torch.Tensor) -> None:
        """x @ W, with W as torch multiplies by it: (in, out)."""
        number = self._value(product)
        weights = self._sources(turned)
        for source in weights:
            self.record.meets(self._value(x), source)
        for source in self._sources(x):
            self.record.meets(self._value(turned), source)
        for source in self._sources(bias):
            self.record.meets(number, source)
        if len(weights) == 1 and id(turned) in self._whole:
            shape = self.record.sources[weights[0]].array.shape
            if len(shape) >= 2 and shape[0] == product.shape[-1]:
                rows = torch.arange(shape[0]).expand(product.shape)
                biases = self._sources(bias)
                self._shadows[id(out)] = _Shadow(
                    product, rows, weights[0], biases[0] if len(biases) == 1 else None, self._value(x)
                )
                self._alive += [product, rows]

    def _addmm(self, args: Any, kwargs: Any, made: Sequence[torch.Tensor], before: Any) -> None:
        bias, x, weight = args[:3]
        product = before if before is not None else torch.mm(x, weight)
        self._alive.append(product)
        self._product(x, weight, bias, made[0], product)

    def _convolution(self, args: Any, kwargs: Any, made: Sequence[torch.Tensor], before: Any) -> None:
        x, weight, bias = args[:3]
        given = self._value(x)
        for source in self._sources(weight):
            self.record.meets(given, source)
        for source in self._sources(x):
            self.record.meets(self._value(weight), source)
        if bias is not None:
            plain = made[0] - bias.reshape(1, -1, *(1,) * (made[0].ndim - 2))
            number = self._value(plain)
            for source in self._sources(bias):
                self.record.meets(number, source)

    def _norm(self, x: torch.Tensor, steps: Sequence[tuple[torch.Tensor, Sequence[Any]]]) -> None:
        """x, then each value that is made of it, with the parameters that are used with the one before."""
        number = self._value(x)
        for value, parameters in steps:
            for parameter in parameters:
                for source in self._sources(parameter):
                    self.record.meets(number, source)
            self._alive.append(value)
            number = self._value(value)

    def _layer_norm(self, args: Any, kwargs: Any, made: Sequence[torch.Tensor], before: Any) -> None:
        x, shape, weight, bias, eps = (*args, *(None,) * 5)[:5]
        axes = tuple(range(x.ndim - len(shape), x.ndim))
        centred = x - x.mean(axes, keepdim=True)
        normed = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
        self._affine(x, centred, normed, weight, bias, lambda p: p)

    def _rms_norm(self, args: Any, kwargs: Any, made: Sequence[torch.Tensor], before: Any) -> None:
        x, shape, weight, eps = (*args, *(None,) * 4)[:4]
        axes = tuple(range(x.ndim - len(shape), x.ndim))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        normed = x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)
        self._norm(x, [(normed, ()), *([(normed * weight, (weight,))] if weight is not None else [])])

    def _group_norm(self, args: Any, kwargs: Any, made: Sequence[torch.Tensor], before: Any) -> None:
        x, weight, bias, n, c, _, groups, eps = args[:8]
        apart = x.reshape(n, groups, -1)
        centred = apart - apart.mean(-1, keepdim=True)
        normed = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).reshape(x.shape)
        self._affine(x, centred.reshape(x.shape), normed, weight, bias, lambda p: _along_channels(p, x))

    def _batch_norm(self, args: Any, kwargs: Any, made: Sequence[torch.Tensor], before: Any) -> None:
        x, weight, bias, mean, var = args[:5]
        if mean is None:
            axes = (0, *range(2, x.ndim))
            centred = x - x.mean(axes, keepdim=True)
            var = centred.square().mean(axes)
        else:
            centred = x - _along_channels(mean, x)
        eps = next((a for a in reversed(args) if isinstance(a, float)), 1e-5)
        normed = centred * torch.rsqrt(_along_channels(var, x) + eps)
        steps: list[tuple[torch.Tensor, Sequence[Any]]] = [(centred, (mean,)), (normed, (var, weight))]
        if weight is not None:
            steps.append((normed * _along_channels(weight, x), (weight,)))
        if bias is not None:
            steps.append((made[0], (bias,)))
        self._norm(x, steps)

    def _affine(self, x: Any, centred: Any, normed: Any, weight: Any, bias: Any, along: Any) -> None:
        steps: list[tuple[torch.Tensor, Sequence[Any]]] = [(centred, ()), (normed, (weight,))]
        if weight is not None:
            steps.append((normed * along(weight), (weight,)))
        if bias is not None:
            steps.append((steps[-1][0] + along(bias), (bias,)))
        self._norm(x, steps)


_PRODUCTS = frozenset(("mm", "bmm", "addmm", "add"))
_WRITE_OUT = {
    "addmm": TorchRecorder._addmm, "convolution": TorchRecorder._convolution,
    "native_layer_norm": TorchRecorder._layer_norm, "native_group_norm": TorchRecorder._group_norm,
    "native_batch_norm": TorchRecorder._batch_norm, "_native_batch_norm_legit_no_training": TorchRecorder._batch_norm,
    "_native_batch_norm_legit": TorchRecorder._batch_norm, "_fused_rms_norm": TorchRecorder._rms_norm,
}  # fmt: skip


def _before(name: str, args: Any) -> Any:
    """What must be computed before an op that may change its operands: the product of addmm."""
    return torch.mm(args[1], args[2]) if name == "addmm" else None


def _along_channels(parameter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return parameter.reshape(1, -1, *(1,) * (x.ndim - 2))


def _kept(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return tuple(size if a == axis else 1 for a, size in enumerate(shape))


def _in_order(rows: torch.Tensor) -> tuple[int, ...]:
    """The distinct rows, in the order in which they first occur."""
    flat = rows.reshape(-1).numpy()
    found, first = np.unique(flat, return_index=True)
    return tuple(int(row) for row in found[np.argsort(first)])


def _tensors(nest: Any) -> Iterator[torch.Tensor]:
    if isinstance(nest, torch.Tensor):
        yield nest
    elif isinstance(nest, (list, tuple)):
        for item in nest:
            yield from _tensors(item)
    elif isinstance(nest, dict):
        for item in nest.values():
            yield from _tensors(item)


def _array(tensor: torch.Tensor) -> Any:
    """A tensor as float64 NumPy, a copy: ops may change it in place later."""
    plain = tensor.detach()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.to(torch.float64, copy=True).contiguous().numpy()


def record_torch(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], call: Any = None, most: int = 4 << 30
) -> Record:
    """The record of one run of `module`, whose floating tensors are float64. ModelError if the model fails, or if it
    draws random numbers."""
    state = module.state_dict(keep_vars=True)
    record = Record(Values(most=most))
    parameters: dict[int, int] = {}
    names: dict[int, list[str]] = {}
    for key, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            names.setdefault(_identity(tensor), []).append(key)
    first: dict[int, int] = {}
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        same = names[_identity(tensor)]
        if same[0] == key:
            first[_identity(tensor)] = len(record.sources)
            record.sources.append(Source((key,), _array(tensor), names=tuple(same[1:])))
        parameters[id(tensor)] = first[_identity(tensor)]
    drawn: list[str] = []
    run = call or (lambda module, *args, **kwargs: module(*args, **kwargs))
    fast = torch.backends.mha.get_fastpath_enabled()
    recorder = TorchRecorder(record, parameters)
    with contextlib.ExitStack() as stack:
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        stack.enter_context(torch.no_grad())
        stack.enter_context(stepwise(module))
        stack.enter_context(recorder)
        stack.enter_context(torch_float64.precision(torch.float64, on_random=drawn.append))
        for tensor in _tensors((tuple(args), dict(kwargs))):
            recorder._value(tensor)
        out = run(module, *args, **kwargs)
    if drawn:
        raise ModelError(f"the torch model draws random numbers ({escape(drawn[0])}): two runs of it differ")
    record.outputs = [_array(t) for t in _tensors(_flat(out)) if t.is_floating_point()]
    return record


def _flat(out: Any) -> Any:
    """Model outputs that are data classes or named mappings, as nested tuples."""
    if hasattr(out, "to_tuple"):
        return out.to_tuple()
    if hasattr(out, "values") and not isinstance(out, torch.Tensor):
        return tuple(out.values())
    if hasattr(out, "__dataclass_fields__"):
        return tuple(getattr(out, name) for name in out.__dataclass_fields__)
    return out


def _identity(tensor: torch.Tensor) -> Any:
    """Equal for two tensors that share all their values."""
    return (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())) if tensor.numel() else id(tensor)
