"""Parity cases of weight norm and spectral norm."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from flax import linen as fn
from flax import nnx
from torch import nn

from .harness import Case


def old_norm(module: Any, dim: Any = 0) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, dim=dim)


def new_norm(module: Any, dim: Any = 0) -> Any:
    return nn.utils.parametrizations.weight_norm(module, dim=dim)


def transposed_conv(mode: bool, i: int = 3, o: int = 5) -> tuple[Any, Any, Any]:
    f = {"padding": [(3, 3), (1, 1)], "transpose_kernel": mode}
    return (
        lambda: nn.ConvTranspose2d(i, o, (4, 2)),
        lambda: fn.ConvTranspose(o, (4, 2), **f),
        lambda r: nnx.ConvTranspose(i, o, (4, 2), rngs=r, **f),
    )


_INNER = {
    "linear": (lambda: nn.Linear(5, 3), lambda: fn.Dense(3), lambda r: nnx.Linear(5, 3, rngs=r)),
    "square linear": (lambda: nn.Linear(4, 4), lambda: fn.Dense(4), lambda r: nnx.Linear(4, 4, rngs=r)),
    "conv": (
        lambda: nn.Conv2d(5, 3, (2, 4), bias=False), lambda: fn.Conv(3, (2, 4), padding="VALID", use_bias=False),
        lambda r: nnx.Conv(5, 3, (2, 4), padding="VALID", use_bias=False, rngs=r),
    ),
    "conv_transpose": transposed_conv(True, 5, 3),
    "conv_transpose default": transposed_conv(False, 5, 3),
    "conv_transpose default square": transposed_conv(False, 5, 5),
}  # fmt: skip


class LinenWrapped(fn.Module):
    """A layer in a wrapper, in a compact parent: the layer's leaves and the wrapper's are siblings."""

    wrap: Any
    layer: Any

    @fn.compact
    def __call__(self, x: Any) -> Any:
        return self.wrap(self.layer())(x)


class LinenSpectral(fn.Module):
    layer: Any

    @fn.compact
    def __call__(self, x: Any, update_stats: bool) -> Any:
        return fn.SpectralNorm(self.layer())(x, update_stats=update_stats)


def weight_norm(inner: str, norm: Any, way: str, axes: Any = -1, dim: Any = 0, lone: bool = False, **more: Any) -> Case:
    """`way`: kept (Flax WeightNorm), folded (a plain Flax layer), from plain (a plain torch layer)."""
    make, linen, nnx_ = _INNER[inner]
    plain = way == "folded"
    wrap_linen = lambda m: fn.WeightNorm(m, feature_axes=axes)  # noqa: E731
    wrap_nnx = lambda m, r: nnx.WeightNorm(m, feature_axes=axes, rngs=r)  # noqa: E731
    variant = inner.replace("square ", "").replace(" square", "")
    return Case(
        f"weight norm, {'new' if norm is new_norm else 'old'}, {inner}, {way}{', lone' if lone else ''}", "Weight norm",
        make if way == "from plain" else lambda: norm(make(), dim),
        linen if plain else (lambda: wrap_linen(linen())) if lone else lambda: LinenWrapped(wrap_linen, linen),
        nnx_ if plain else lambda r: wrap_nnx(nnx_(r), r),
        (2, 5, 6, 7) if "conv" in inner else (2, make().in_features), channels="conv" in inner,
        variant=f"{variant}, {way}", exact=way == "kept", concrete=not plain,
        by="shapes" if "transpose" in inner and not plain else "modules", **more,
    )  # fmt: skip


def converged(module: Any) -> None:
    """u and v of the largest singular value."""
    with torch.no_grad():
        state = module.state_dict()
        weight = next(state[name] for name in state if name.endswith(("orig", "original")))
        left, _, right = np.linalg.svd(weight.double().numpy().reshape(weight.shape[0], -1))
        for name, tensor in state.items():
            if name.endswith("_u"):
                tensor.copy_(torch.from_numpy(left[:, 0]))
            if name.endswith("_v"):
                tensor.copy_(torch.from_numpy(right[0]))


def spectral_norm(inner: str, norm: Any) -> Case:
    make, linen, nnx_ = _INNER[inner]
    return Case(
        f"spectral norm, {norm.__module__.rpartition('.')[2]}, {inner}", "Spectral norm", lambda: norm(make()),
        lambda: LinenSpectral(linen), lambda r: nnx.SpectralNorm(nnx_(r), rngs=r),
        (2, 5, 6, 7) if inner == "conv" else (2, make().in_features), channels=inner == "conv",
        on_flax=lambda m, x: m(x, update_stats=False), prepare=converged, exact=False,
        variant=f"{inner.removeprefix('square ')}, spectral norm", blind=("~1sigma", "~1u"),
    )  # fmt: skip


REPARAM = [
    *(
        weight_norm(inner, norm, way)
        for inner in ("linear", "square linear", "conv", "conv_transpose")
        for norm, way in ((old_norm, "kept"), (new_norm, "folded"))
    ),
    weight_norm("linear", new_norm, "kept"),
    weight_norm("linear", old_norm, "kept", lone=True),
    weight_norm("conv", old_norm, "folded"),
    weight_norm("conv_transpose default", old_norm, "kept", axes=-2),
    weight_norm(
        "conv_transpose default square", new_norm, "kept", axes=-2, layout="conv_transpose default"
    ),
    weight_norm("conv_transpose default", new_norm, "folded"),
    weight_norm("linear", old_norm, "from plain"),
    weight_norm("conv", old_norm, "from plain"),
    *(
        spectral_norm(inner, norm)
        for inner in ("linear", "square linear", "conv")
        for norm in (nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm)
    ),
]  # fmt: skip
