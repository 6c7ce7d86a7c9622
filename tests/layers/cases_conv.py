"""Parity cases of convolutions and transposed convolutions."""

from __future__ import annotations

from typing import Any

from flax import linen as fn
from flax import nnx
from torch import nn

from .harness import Case

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def conv(
    name: str, i: int, o: int, size: tuple[int, ...], *, flax_padding: Any = None, extent: int = 6, **t: Any
) -> Case:
    """A convolution; `t` are torch's settings."""
    n = len(size)

    def wide(value: Any) -> tuple[int, ...]:
        return (value,) * n if isinstance(value, int) else tuple(value)

    padding = flax_padding or [(p, p) for p in wide(t.get("padding", 0))]
    f = {
        "strides": wide(t.get("stride", 1)),
        "kernel_dilation": wide(t.get("dilation", 1)),
        "feature_group_count": t.get("groups", 1),
        "padding": padding,
        "use_bias": t.get("bias", True),
    }
    return Case(
        name, "Conv",
        lambda: _CONV[n](i, o, size, **t), lambda: fn.Conv(o, size, **f), lambda r: nnx.Conv(i, o, size, rngs=r, **f),
        (2, i, *range(extent, extent + n)), channels=True, variant="conv",
    )  # fmt: skip


def transposed(name: str, i: int, o: int, size: tuple[int, ...], mode: bool, **t: Any) -> Case:
    n = len(size)
    more = {k: t.pop(k) for k in ("file",) if k in t}

    def wide(key: str, default: int) -> tuple[int, ...]:
        value = t.get(key, default)
        return (value,) * n if isinstance(value, int) else tuple(value)

    rows = zip(wide("dilation", 1), size, wide("padding", 0), wide("output_padding", 0), strict=True)
    f = {
        "strides": wide("stride", 1),
        "kernel_dilation": wide("dilation", 1),
        "padding": [(d * (k - 1) - p, d * (k - 1) - p + e) for d, k, p, e in rows],
        "use_bias": t.get("bias", True),
        "transpose_kernel": mode,
    }
    return Case(
        name, "ConvTranspose",
        lambda: _TRANSPOSED[n](i, o, size, **t), lambda: fn.ConvTranspose(o, size, **f),
        lambda r: nnx.ConvTranspose(i, o, size, rngs=r, **f), (2, i, *range(4, 4 + n)), channels=True,
        variant="conv_transpose" if mode else "conv_transpose default", **more,
    )  # fmt: skip


CONV = [
    conv("conv1d", 3, 5, (4,)),
    conv("conv2d", 3, 5, (2, 4)),
    conv("conv3d", 2, 3, (1, 2, 3), extent=4),
    conv("conv2d equal", 3, 3, (3, 3)),
    conv("conv3d equal", 2, 2, (2, 2, 2), extent=4),
    conv("conv2d stride 2 padding 1", 3, 5, (3, 3), stride=2, padding=1),
    conv("conv2d stride, padding, dilation by axis", 3, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    conv("conv2d two groups", 4, 6, (3, 2), groups=2),
    conv("conv2d depthwise", 4, 4, (3, 3), groups=4, padding=1),
    conv("conv1d depthwise with multiplier", 3, 6, (3,), groups=3),
    conv("conv2d 1x1", 3, 5, (1, 1), bias=False),
    conv("conv2d one channel", 1, 5, (3, 3)),
    conv("conv2d circular", 3, 4, (3, 3), padding=1, padding_mode="circular", flax_padding="CIRCULAR"),
    conv("conv2d reflect", 3, 4, (3, 3), padding=1, padding_mode="reflect", flax_padding="REFLECT"),
    conv("conv2d same", 3, 4, (4, 3), padding="same", flax_padding="SAME"),
    *(
        transposed(f"conv_transpose{len(size)}d {'kernel' if mode else 'default'}", 2, 3, size, mode)
        for size in ((4,), (2, 3), (2, 1, 3))
        for mode in (True, False)
    ),
    *(
        transposed(
            f"conv_transpose2d strided {'kernel' if mode else 'default'}", 2, 3, (3, 4), mode,
            stride=(2, 3), padding=(1, 2), output_padding=(1, 0), dilation=(1, 2),
        )
        for mode in (True, False)
    ),
    transposed("conv_transpose2d equal kernel", 3, 3, (3, 3), True, file="among"),
    transposed("conv_transpose2d equal default", 3, 3, (3, 3), False, file="among"),
    transposed("conv_transpose1d without bias", 1, 2, (3,), False, bias=False),
    transposed("conv_transpose2d two groups kernel", 4, 6, (2, 3), True, groups=2),
    transposed("conv_transpose2d two groups default", 4, 6, (2, 3), False, groups=2),
    transposed("conv_transpose1d four groups", 4, 4, (3,), False, groups=4, stride=2, file="among"),
]  # fmt: skip
