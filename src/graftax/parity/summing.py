"""Add to torch float32 the error of another order of summing: each contraction gets the error of adding its terms one
after the other (sequential summing).

One float32 run shows one order of summing and one draw of its rounding errors. XLA may sum in another order: a single
row sequentially, where torch sums in lanes. And if one value dominates an output, torch's error may be near zero by
luck. The expected error needs no draw: a sequential sum of K terms is off by about EACH x sqrt(sum of its squared
partial sums), which grows with K and with cancellation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from graftax.parity.records import UNIT

Tensor = torch.Tensor
EACH = 0.425 * UNIT
"""RMS of the relative error of one addition: uniform over half a step, for numbers spread evenly on a log scale."""
BLOCKS = 8
"""Partial sums are computed at this many places of a contraction; between them terms count as in random order."""


class _SummedInARow(TorchDispatchMode):
    """Adds to the float32 result of each contraction the error of sequential summing. The size of each error is the
    expected one, not a draw; its sign is random."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        spread = SPREADS.get(func)
        if spread is None or out.dtype is not torch.float32 or out.device.type != "cpu":
            return out
        off = EACH * spread(func, args, kwargs, out).clamp_(min=0).sqrt_()
        signs = torch.rand(out.shape, generator=self.generator) < 0.5
        return out + torch.where(signs, off, -off).nan_to_num_(0.0, 0.0, 0.0)


@contextmanager
def summed_in_a_row(module: torch.nn.Module, seed: int) -> Iterator[None]:
    """Inside this context float32 contractions on the CPU have the error of sequential summing. Fused kernels
    (attention, LSTM) are taken apart so that their contractions are seen."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(item, torch.nn.LSTM) for item in module.modules()):
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", UserWarning)  # it is about a precision that only other devices have
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(_SummedInARow(seed))
        yield


# ---------------------------------------------------------------- sums of squared partial sums


def in_a_row(a: Tensor, b: Tensor) -> Tensor:
    """For each value of a @ b, the sum of its squared partial sums. a (..., M, K), b (..., K, N) -> (..., M, N)."""
    terms = a.shape[-1]
    blocks = BLOCKS if terms >= 4 * BLOCKS else 1
    total = spread = torch.zeros(())
    for left, right in zip(a.chunk(blocks, -1), b.chunk(blocks, -2), strict=True):
        before, total = total, total + left @ right
        between = (left * left) @ (right * right) / 6
        spread = spread + left.shape[-1] * ((before * before + before * total + total * total) / 3 + between)
    return spread


def _matrices(first: int) -> Callable[..., Tensor]:
    """For an op whose arguments from number `first` on are the matrices (..., M, K) and (..., K, N); the summand stands
    before them."""

    def spread(func: Any, args: Any, kwargs: Mapping[str, Any], out: Tensor) -> Tensor:
        a, b = args[first], args[first + 1]
        a = a[None] if a.ndim == 1 else a
        b = b[:, None] if b.ndim == 1 else b
        return (in_a_row(a, b) * kwargs.get("alpha", 1) ** 2).reshape(out.shape)

    return spread


def _convolution(func: Any, args: Any, kwargs: Mapping[str, Any], out: Tensor) -> Tensor:
    """Terms: the places of the kernel x the channels of a group, fewer at the borders."""
    x, weight, _, *options = args
    transposed, groups = options[3], options[5]
    channels = x.shape[1] // groups
    blocks = min(BLOCKS, channels) if groups == 1 else 1
    places = math.prod(weight.shape[2:])
    total = spread = torch.zeros(())
    parts = zip(x.chunk(blocks, 1), weight.chunk(blocks, 0 if transposed else 1 if groups == 1 else 0), strict=True)
    for left, right in parts:
        before, total = total, total + func(left, right, None, *options)
        between = func(left * left, right * right, None, *options) / 6
        terms = places * left.shape[1] // groups
        spread = spread + terms * ((before * before + before * total + total * total) / 3 + between)
    return spread


def _trilinear(func: Any, args: Any, kwargs: Mapping[str, Any], out: Tensor) -> Tensor:
    """torch.nn.Bilinear: (N, I), (O, I, J), (N, J); terms: I x J."""
    squares = func(*(factor * factor for factor in args[:3]), *args[3:], **kwargs)
    return math.prod(args[1].shape[1:]) * (out * out / 3 + squares / 6)


_ATEN = torch.ops.aten
SPREADS: Mapping[Any, Callable[..., Tensor]] = {
    _ATEN.mm.default: _matrices(0),
    _ATEN.bmm.default: _matrices(0),
    _ATEN.mv.default: _matrices(0),
    _ATEN.dot.default: _matrices(0),
    _ATEN.addmm.default: _matrices(1),
    _ATEN.baddbmm.default: _matrices(1),
    _ATEN.addmv.default: _matrices(1),
    _ATEN.convolution.default: _convolution,
    _ATEN._trilinear.default: _trilinear,
}
"""Op -> the sum of squared partial sums for each value that it gives."""
