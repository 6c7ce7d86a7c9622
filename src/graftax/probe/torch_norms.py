"""torch's norms written out: each value on the way, and the parameters that are used with the one before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Made = tuple[torch.Tensor, Sequence[Any]]
"""A value, and the parameters that make it of the value before."""


def _layer_norm(args: Sequence[Any]) -> list[Made]:
    x, shape, weight, bias, eps = _filled(args, 5)
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    return [(centred, ()), *_affine(normed, weight, bias, lambda p: p)]


def _rms_norm(args: Sequence[Any]) -> list[Made]:
    x, shape, weight, eps = _filled(args, 4)
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    normed = x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)
    return _affine(normed, weight, None, lambda p: p)


def _group_norm(args: Sequence[Any]) -> list[Made]:
    x, weight, bias, n, _, _, groups, eps = args[:8]
    apart = x.reshape(n, groups, -1)
    centred = apart - apart.mean(-1, keepdim=True)
    normed = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).reshape(x.shape)
    return [(centred.reshape(x.shape), ()), *_affine(normed, weight, bias, lambda p: along_channels(p, x))]


def _batch_norm(args: Sequence[Any]) -> list[Made]:
    x, weight, bias, mean, var = args[:5]
    if mean is None:
        axes = (0, *range(2, x.ndim))
        centred = x - x.mean(axes, keepdim=True)
        var = centred.square().mean(axes)
    else:
        centred = x - along_channels(mean, x)
    eps = next((a for a in reversed(args) if isinstance(a, float)), 1e-5)
    normed = centred * torch.rsqrt(along_channels(var, x) + eps)
    first, *rest = _affine(normed, weight, bias, lambda p: along_channels(p, x))
    return [(centred, (mean,)), (first[0], (var, weight)), *rest]


def _affine(normed: torch.Tensor, weight: Any, bias: Any, along: Callable[[Any], Any]) -> list[Made]:
    """normed, then * weight, then + bias."""
    made: list[Made] = [(normed, (weight,))]
    if weight is not None:
        made.append((normed * along(weight), (weight,)))
    if bias is not None:
        made.append((made[-1][0] + along(bias), (bias,)))
    return made


def along_channels(parameter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A parameter with an entry for each channel, as it is added to x (N, C, ...)."""
    return parameter.reshape(1, -1, *(1,) * (x.ndim - 2))


def _filled(args: Sequence[Any], count: int) -> tuple[Any, ...]:
    """The first arguments; None for those that are left out."""
    return (*args[:count], *(None,) * (count - len(args)))


NORMS: dict[str, Callable[[Sequence[Any]], list[Made]]] = {
    "native_layer_norm": _layer_norm, "native_group_norm": _group_norm, "_fused_rms_norm": _rms_norm,
    "native_batch_norm": _batch_norm, "_native_batch_norm_legit": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
}  # fmt: skip
"""Op of torch -> its arguments -> the values on the way; the last is what it gives."""
