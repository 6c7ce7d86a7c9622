"""Run torch code in another floating precision without changing the model. Every floating tensor is widened when an op
uses it and released afterwards, so a model runs even if its float64 copy would not fit in memory.

Two modes work together. The function mode sees whole functions (`F.linear`, `lstm`), whose dtype checks require equal
dtypes, and only this mode sees Parameters. The dispatch mode sees the ops inside, where code casts to float32 by name
(`x.float()`, `softmax(dtype=float32)`): such a dtype becomes the wide one. `module.double()` is not a float64 reference
for models that cast inside.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WIDER = {
    torch.float64: {
        torch.float32: torch.float64,
        torch.float16: torch.float64,
        torch.bfloat16: torch.float64,
        torch.complex32: torch.complex128,
        torch.complex64: torch.complex128,
    },
    torch.float32: {
        torch.float16: torch.float32,
        torch.bfloat16: torch.float32,
        torch.complex32: torch.complex64,
    },
}
"""Precision of the run -> {a dtype: the dtype it is widened to}."""
KEPT = 64 << 20
"""Bytes of widened weights kept for the next use: a cell that is called in a loop uses the same ones at every step."""
METADATA = frozenset(
    {
        *("size", "dim", "numel", "nelement", "ndimension", "stride", "storage_offset", "element_size", "data_ptr"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_inference", "is_set_to", "get_device"),
        *("untyped_storage", "requires_grad_", "__len__", "__hash__", "__repr__"),
    }
)
"""Functions that ask about a tensor and do not use its values."""
VALUE_GETTERS = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})

Fill = Callable[[torch.Tensor], torch.Tensor | None]


class Widening:
    """The part that both modes share: widening a value."""

    def __init__(self, dtype: torch.dtype, fill: Fill | None) -> None:
        self.dtype = dtype
        self.wider = WIDER[dtype]
        self.fill = fill
        self.used: set[int] = set()
        """id of every Parameter that an op has used."""
        self.on_random: Callable[[str], None] | None = None
        self._kept: OrderedDict[int, tuple[torch.Tensor, int, torch.Tensor]] = OrderedDict()
        self._bytes = 0

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        """The tensor in the wide dtype, with its values from the file if it is a meta Parameter."""
        wanted = self.wider.get(value.dtype)
        if value.is_meta and self.fill is not None:
            return self._weight(value, wanted)
        if wanted is None:
            return value
        if isinstance(value, torch.nn.Parameter):
            return self._weight(value, wanted)
        return value.to(wanted)

    def _weight(self, value: torch.Tensor, wanted: torch.dtype | None) -> torch.Tensor:
        held = self._kept.get(id(value))
        if held is not None and held[0] is value and held[1] == value._version:
            self._kept.move_to_end(id(value))
            return held[2]
        filled = self.fill(value) if value.is_meta and self.fill is not None else None
        full = value if filled is None else filled
        made = full.detach().to(wanted) if wanted is not None else full
        size = made.numel() * made.element_size()
        if size <= KEPT // 4:
            self._kept[id(value)] = (value, value._version, made)
            self._bytes += size
            while self._bytes > KEPT:
                _, (_, _, old) = self._kept.popitem(last=False)
                self._bytes -= old.numel() * old.element_size()
        return made

    def value(self, value: Any) -> Any:
        """Tensors and dtypes inside nested lists, tuples and dicts, widened; any other value unchanged."""
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, torch.dtype):
            return self.wider.get(value, value)
        if isinstance(value, (list, tuple)):
            items = [self.value(item) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if type(value) is dict:
            return {name: self.value(item) for name, item in value.items()}
        return value


class _Functions(TorchFunctionMode):
    """Widens the arguments of whole functions."""

    def __init__(self, widening: Widening) -> None:
        super().__init__()
        self.widening = widening

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in METADATA:
            return func(*args, **kwargs)
        if name == "__get__":
            return self._getter(func, args, kwargs)
        for value in args:
            self._note(value)
        for value in kwargs.values():
            self._note(value)
        widen = self.widening.value
        # The first argument of an in-place function is left alone: the dispatch mode writes the result back.
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name[:3] == "__i"
        first = 1 if in_place and args else 0
        wide = (*args[:first], *(widen(value) for value in args[first:]))
        return func(*wide, **{key: widen(value) for key, value in kwargs.items()})

    def _note(self, value: Any) -> None:
        if isinstance(value, torch.nn.Parameter):
            self.widening.used.add(id(value))
        elif isinstance(value, (list, tuple)):
            for item in value:
                self._note(item)

    def _getter(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Attributes of tensors: `.T` and `.data` return widened values; `.dtype` and `.device` return what ops will
        see."""
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in VALUE_GETTERS:
            self._note(args[0])
            return func(self.widening.tensor(args[0]), *args[1:], **kwargs)
        found = func(*args, **kwargs)
        if name == "dtype":
            return self.widening.wider.get(found, found)
        if name == "device" and found.type == "meta" and self.widening.fill is not None:
            return torch.device("cpu")
        return found


class _Ops(TorchDispatchMode):
    """Widens the arguments of single ops, and notices ops that draw random numbers."""

    def __init__(self, widening: Widening) -> None:
        super().__init__()
        self.widening = widening

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        widening = self.widening
        watched = widening.on_random is not None and torch.Tag.nondeterministic_seeded in func.tags
        before = torch.default_generator.get_state() if watched else None
        wide = tuple(widening.value(value) for value in args)
        out = func(*wide, **{name: widening.value(value) for name, value in kwargs.items()})
        if before is not None and not torch.equal(before, torch.default_generator.get_state()):
            assert widening.on_random is not None
            widening.on_random(func._schema.name.removeprefix("aten::"))
        return self._written_back(func, args, wide, out) if func._schema.is_mutable else out

    @staticmethod
    def _written_back(func: Any, args: Any, wide: Any, out: Any) -> Any:
        """An op that writes to a narrow tensor wrote to its wide copy: copy the values back."""
        for argument, old, new in zip(func._schema.arguments, args, wide, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(old, torch.Tensor) and new is not old:
                old.copy_(new)
                out = old if out is new else out
        return out


@contextmanager
def precision(
    dtype: torch.dtype, fill: Fill | None = None, on_random: Callable[[str], None] | None = None
) -> Iterator[Widening]:
    """Inside this context torch computes in `dtype` (float64, or float32 for models held in half precision).

    fill        meta Parameter -> its values; None if they are unknown
    on_random   called with an op's name whenever one draws from the default generator
    """
    widening = Widening(dtype, fill)
    widening.on_random = on_random
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _Ops(widening), _Functions(widening):
            yield widening
    finally:
        torch.set_default_dtype(default)
