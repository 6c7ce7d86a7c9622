"""The parity cases: one row a layer and variant. Dimensions are distinct unless the name says otherwise."""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as fn
from flax import nnx
from torch import nn

from .harness import Case


def ints(high: int, *shape: int) -> Any:
    return lambda rng: rng.integers(0, high, shape)


# ---------------------------------------------------------------- dense


def dense_general(name: str, i: tuple[int, ...], o: tuple[int, ...], **more: Any) -> Case:
    """A Linear over the flattened last axes against DenseGeneral with `i` contracted and `o` produced axes."""
    axes = tuple(range(-len(i), 0))
    flat = (int(np.prod(i)), int(np.prod(o)))
    return Case(
        name,
        "Linear",
        lambda: nn.Linear(*flat),
        lambda: fn.DenseGeneral(o, axis=axes),
        lambda r: nnx.LinearGeneral(i, o, axis=axes, rngs=r),
        (2, 3, flat[0]),
        on_flax=lambda m, x: m(x.reshape(2, 3, *i)).reshape(2, 3, flat[1]),
        **more,
    )


def einsum(
    name: str, equation: str, kernel: tuple[int, ...], i: tuple[int, ...], o: tuple[int, ...], **more: Any
) -> Case:
    flat = (int(np.prod(i)), int(np.prod(o)))
    bias = more.pop("bias", None)
    return Case(
        name,
        "Linear",
        lambda: nn.Linear(*flat, bias=bias is not None),
        lambda: fn.Einsum(kernel, equation, use_bias=bias is not None),
        lambda r: nnx.Einsum(equation, kernel, bias, rngs=r),
        (2, 3, flat[0]),
        on_flax=lambda m, x: m(x.reshape(2, 3, *i)).reshape(2, 3, flat[1]),
        variant="einsum",
        **more,
    )


class HFConv1D(nn.Module):
    """What transformers.pytorch_utils.Conv1D is: a weight stored (in, out)."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.normal_(nn.Linear(o, i).weight.detach().clone()))
        self.bias = nn.Parameter(nn.Linear(i, o).bias.detach().clone())

    def forward(self, x: Any) -> Any:
        return x @ self.weight + self.bias


HFConv1D.__module__, HFConv1D.__qualname__, HFConv1D.__name__ = "transformers.pytorch_utils", "Conv1D", "Conv1D"


def linear(name: str, i: int, o: int, bias: bool = True, **more: Any) -> Case:
    return Case(
        name,
        "Linear",
        lambda: nn.Linear(i, o, bias),
        lambda: fn.Dense(o, use_bias=bias),
        lambda r: nnx.Linear(i, o, use_bias=bias, rngs=r),
        (2, 3, i),
        variant="linear",
        **more,
    )


def flatten(name: str, shape: tuple[int, ...], out: int) -> Case:
    """NCHW flattened in torch, NHWC in Flax."""
    total = int(np.prod(shape))
    return Case(
        name,
        "Linear",
        lambda: nn.Linear(total, out),
        lambda: fn.Dense(out),
        lambda r: nnx.Linear(total, out, rngs=r),
        (2, *shape),
        on_torch=lambda m, x: m(x.flatten(1)),
        on_flax=lambda m, x: m(jnp.moveaxis(x, 1, -1).reshape(2, -1)),
        variant="flatten C H W",
        hints={"flatten": shape},
    )


DENSE = [
    linear("linear 5 to 3", 5, 3),
    linear("linear square", 4, 4),
    linear("linear without bias", 5, 3, bias=False),
    linear("linear 1 to 1", 1, 1),
    linear("linear 7 to 1", 7, 1),
    linear("linear 1 to 7", 1, 7),
    dense_general("heads out", (5,), (2, 3), variant="linear, out split"),
    dense_general("heads out, square", (6,), (2, 3), variant="linear, out split"),
    dense_general("heads out, cubic", (4,), (4, 4), variant="linear, out split"),
    dense_general("heads in", (2, 3), (5,), variant="linear, in merged"),
    dense_general("heads in, square", (2, 3), (6,), variant="linear, in merged"),
    dense_general("heads of one", (5,), (1, 3), variant="linear, out split"),
    dense_general("heads in of one", (3, 1), (5,), variant="linear, in merged"),
    dense_general("in and out split", (2, 3), (5, 4), variant="linear, split"),
    dense_general("in and out split, equal", (2, 2), (2, 2), variant="linear, split", file="first"),
    einsum("einsum out split", "abc,cde->abde", (5, 2, 3), (5,), (2, 3), bias=(2, 3)),
    einsum("einsum heads first", "BTD,NDH->BTNH", (2, 5, 3), (5,), (2, 3)),
    einsum("einsum heads first, cubic", "BTD,NDH->BTNH", (3, 3, 3), (3,), (3, 3), file="among"),
    einsum("einsum in merged", "BTNH,NHD->BTD", (2, 3, 5), (2, 3), (5,), bias=(5,)),
    einsum("einsum swapped heads", "BTD,DHN->BTNH", (5, 3, 2), (5,), (2, 3), file="none"),
    Case(
        "linear as 2d 1x1 convolution", "Linear as 1x1 convolution",
        lambda: nn.Linear(5, 3), lambda: fn.Conv(3, (1, 1)), lambda r: nnx.Conv(5, 3, (1, 1), rngs=r),
        (2, 4, 6, 5), variant="linear to 2d 1x1 kernel",
    ),
    Case(
        "1x1 convolution as dense", "1x1 convolution as Dense",
        lambda: nn.Conv2d(5, 3, 1), lambda: fn.Dense(3), lambda r: nnx.Linear(5, 3, rngs=r),
        (2, 5, 4, 6), channels=True, variant="2d 1x1 kernel to linear",
    ),
    Case(
        "hf conv1d", "HF Conv1D",
        lambda: HFConv1D(5, 3), lambda: fn.Dense(3), lambda r: nnx.Linear(5, 3, rngs=r), (2, 5),
        variant="conv1d (in, out)",
    ),
    Case(
        "hf conv1d square", "HF Conv1D",
        lambda: HFConv1D(4, 4), lambda: fn.Dense(4), lambda r: nnx.Linear(4, 4, rngs=r), (2, 4),
        variant="conv1d (in, out)", file="among",
    ),
    flatten("flatten chw", (5, 2, 3), 4),
    flatten("flatten cube", (3, 3, 3), 27),
    flatten("flatten one channel", (1, 2, 3), 4),
    flatten("flatten 1d", (3, 5), 4),
    flatten("flatten 3d", (2, 3, 4, 5), 4),
    *(
        Case(
            f"embedding {v}x{d}", "Embedding",
            lambda v=v, d=d: nn.Embedding(v, d), lambda v=v, d=d: fn.Embed(v, d),
            lambda r, v=v, d=d: nnx.Embed(v, d, rngs=r), (2, 3), make_x=ints(v, 2, 3), variant="embedding",
        )
        for v, d in ((7, 3), (4, 4), (5, 1))
    ),
]  # fmt: skip


# ---------------------------------------------------------------- convolutions

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


# ---------------------------------------------------------------- norms


def _eval(m: Any, x: Any) -> Any:
    return m(x, use_running_average=True)


NORMS = [
    *(
        Case(
            f"batch norm {len(x) - 2}d", "BatchNorm", lambda kind=kind, n=n: kind(n),
            lambda: fn.BatchNorm(epsilon=1e-5),
            lambda r, n=n: nnx.BatchNorm(n, epsilon=1e-5, rngs=r), x, channels=True, on_flax=_eval,
            variant="batch norm",
        )
        for kind, n, x in (
            (nn.BatchNorm1d, 5, (3, 5)), (nn.BatchNorm1d, 5, (3, 5, 4)), (nn.BatchNorm2d, 3, (2, 3, 4, 5)),
            (nn.BatchNorm3d, 1, (2, 1, 4, 3, 5)),
        )
    ),
    Case(
        "batch norm without affine", "BatchNorm", lambda: nn.BatchNorm1d(5, affine=False),
        lambda: fn.BatchNorm(epsilon=1e-5, use_scale=False, use_bias=False),
        lambda r: nnx.BatchNorm(5, epsilon=1e-5, use_scale=False, use_bias=False, rngs=r), (3, 5), on_flax=_eval,
        variant="batch norm",
    ),
    Case(
        "instance norm with statistics", "BatchNorm",
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        lambda: fn.BatchNorm(epsilon=1e-5), lambda r: nnx.BatchNorm(3, epsilon=1e-5, rngs=r), (2, 3, 4, 5),
        channels=True, on_flax=_eval, variant="batch norm",
    ),
    Case(
        "layer norm", "LayerNorm", lambda: nn.LayerNorm(5), lambda: fn.LayerNorm(epsilon=1e-5),
        lambda r: nnx.LayerNorm(5, epsilon=1e-5, rngs=r), (2, 3, 5), variant="layer norm",
    ),
    Case(
        "layer norm without bias", "LayerNorm", lambda: nn.LayerNorm(5, bias=False),
        lambda: fn.LayerNorm(epsilon=1e-5, use_bias=False),
        lambda r: nnx.LayerNorm(5, epsilon=1e-5, use_bias=False, rngs=r), (2, 3, 5),
    ),
    *(
        Case(
            f"layer norm over {a}x{b}", "LayerNorm", lambda a=a, b=b: nn.LayerNorm((a, b)),
            lambda: fn.LayerNorm(epsilon=1e-5, reduction_axes=(-2, -1), feature_axes=(-2, -1)),
            lambda r, a=a, b=b: nnx.LayerNorm(
                a * b, epsilon=1e-5, reduction_axes=(-2, -1), feature_axes=(-2, -1), rngs=r
            ),
            (2, a, b),
        )
        for a, b in ((3, 5), (4, 4), (1, 5))
    ),
    *(
        Case(
            f"group norm {n} in {g}", "GroupNorm", lambda g=g, n=n: nn.GroupNorm(g, n),
            lambda g=g: fn.GroupNorm(num_groups=g, epsilon=1e-5),
            lambda r, g=g, n=n: nnx.GroupNorm(n, num_groups=g, epsilon=1e-5, rngs=r), (2, n, 3, 4), channels=True,
            variant="group norm", file="first",
        )
        for g, n in ((2, 6), (1, 3), (4, 4))
    ),
    *(
        Case(
            f"instance norm {len(x) - 2}d", "InstanceNorm", lambda kind=kind: kind(3, affine=True),
            lambda: fn.InstanceNorm(epsilon=1e-5), lambda r: nnx.InstanceNorm(3, epsilon=1e-5, rngs=r), x,
            channels=True, variant="instance norm",
        )
        for kind, x in (
            (nn.InstanceNorm1d, (2, 3, 5)), (nn.InstanceNorm2d, (2, 3, 4, 5)), (nn.InstanceNorm3d, (2, 3, 2, 4, 3)),
        )
    ),
    Case(
        "rms norm", "RMSNorm", lambda: nn.RMSNorm(5, eps=1e-6), lambda: fn.RMSNorm(epsilon=1e-6),
        lambda r: nnx.RMSNorm(5, epsilon=1e-6, rngs=r), (2, 3, 5), variant="rms norm",
    ),
    Case(
        "rms norm, default eps", "RMSNorm", lambda: nn.RMSNorm(5), lambda: fn.RMSNorm(epsilon=2.0**-23),
        lambda r: nnx.RMSNorm(5, epsilon=2.0**-23, rngs=r), (2, 3, 5), variant="rms norm",
    ),
]  # fmt: skip


class ZeroCentred(nn.RMSNorm):
    """An RMSNorm whose weight is the scale less one."""

    def forward(self, x: Any) -> Any:
        return nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


NORMS.append(
    Case(
        "rms norm, zero-centred", "RMSNorm", lambda: ZeroCentred(16, eps=1e-6), lambda: fn.RMSNorm(epsilon=1e-6),
        lambda r: nnx.RMSNorm(16, epsilon=1e-6, rngs=r), (2, 3, 16), variant="rms norm, zero-centred",
        hints={"layout": "zero-centred"}, exact=False,
    )
)  # fmt: skip


# ---------------------------------------------------------------- attention, PReLU


def _attend(m: Any, x: Any) -> Any:
    return m(x, x, x, need_weights=False)[0]


def attention(name: str, width: int, heads: int, bias: bool = True) -> Case:
    return Case(
        name, "MultiheadAttention", lambda: nn.MultiheadAttention(width, heads, bias=bias, batch_first=True),
        lambda: fn.MultiHeadDotProductAttention(heads, use_bias=bias),
        lambda r: nnx.MultiHeadAttention(heads, width, use_bias=bias, decode=False, rngs=r), (2, 3, width),
        on_torch=_attend, on_flax=lambda m, x: m(x, x, x), variant="fused in_proj_weight", blind=("key/bias",),
    )  # fmt: skip


def _cross(m: Any, x: Any) -> Any:
    return m(x[..., :6], x[..., 6:11], x[..., 11:], need_weights=False)[0]


class Cross(nnx.Module):
    """nnx.MultiHeadAttention has one in_features for all three; kdim and vdim need projections of their own."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        make = lambda i: nnx.LinearGeneral(i, (2, 3), rngs=rngs)  # noqa: E731
        self.query, self.key, self.value = make(6), make(5), make(4)
        self.out = nnx.LinearGeneral((2, 3), 6, axis=(-2, -1), rngs=rngs)

    def __call__(self, q: Any, k: Any, v: Any) -> Any:
        return self.out(nnx.dot_product_attention(self.query(q), self.key(k), self.value(v)))


ATTENTION = [
    attention("attention 6 in 2", 6, 2),
    attention("attention 6 in 3, no bias", 6, 3, bias=False),
    attention("attention one head", 4, 1),
    attention("attention heads of one", 4, 4),
    attention("attention 4 in 2", 4, 2),
    attention("attention 9 in 3", 9, 3),
    Case(
        "attention with kdim and vdim", "MultiheadAttention",
        lambda: nn.MultiheadAttention(6, 2, kdim=5, vdim=4, batch_first=True),
        lambda: fn.MultiHeadDotProductAttention(2, qkv_features=6, out_features=6), lambda r: Cross(r), (2, 3, 15),
        on_torch=_cross, on_flax=lambda m, x: m(x[..., :6], x[..., 6:11], x[..., 11:]),
        variant="separate q, k, v weights", blind=("key/bias",),
    ),
    Case(
        "prelu", "PReLU", lambda: nn.PReLU(), lambda: fn.PReLU(), lambda r: nnx.PReLU(), (2, 5), variant="prelu",
    ),
]  # fmt: skip

# ---------------------------------------------------------------- fused query, key, value


def fused(name: str, how: str, i: int, heads: int, kv: int, head: int, *, flat: bool = False, **more: Any) -> Case:
    """One projection of a user's own attention against three; its output is compared as query, key, value."""
    rows = (heads + 2 * kv) * head
    swapped = more.pop("swapped", False)
    group = heads // kv

    def on_torch(m: Any, x: Any) -> Any:
        y = m(x)
        if how == "block":
            return y
        y = y.reshape(*y.shape[:-1], kv, group + 2, head)
        parts = (y[..., :group, :], y[..., group, :], y[..., group + 1, :])
        return torch.cat([part.flatten(2) for part in parts], -1)

    class Linen(fn.Module):
        @fn.compact
        def __call__(self, x: Any) -> Any:
            make = lambda n, name: fn.DenseGeneral(n * head if flat else (n, head), name=name)  # noqa: E731
            parts = [make(n, name)(x) for n, name in ((heads, "query"), (kv, "key"), (kv, "value"))]
            return jnp.concatenate([part.reshape(*x.shape[:-1], -1) for part in parts], -1)

    class Nnx(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            make = lambda n: nnx.LinearGeneral(i, n * head if flat else (n, head), rngs=rngs)  # noqa: E731
            self.q_proj, self.k_proj, self.v_proj = make(heads), make(kv), make(kv)

        def __call__(self, x: Any) -> Any:
            parts = [part(x) for part in (self.q_proj, self.k_proj, self.v_proj)]
            return jnp.concatenate([part.reshape(*x.shape[:-1], -1) for part in parts], -1)

    return Case(
        name, "Fused query, key, value", lambda: HFConv1D(i, rows) if swapped else nn.Linear(i, rows), Linen, Nnx,
        (2, 3, i), on_torch=on_torch, variant=f"fused {how}", hints={"fused": how, "heads": heads}, by="shapes", **more,
    )  # fmt: skip


FUSED = [
    fused("fused block", "block", 5, 2, 2, 3),
    fused("fused block, equal", "block", 4, 4, 4, 4),
    fused("fused block, grouped heads", "block", 5, 4, 2, 3),
    fused("fused block, flat kernels", "block", 5, 2, 1, 3, flat=True),
    fused("fused block, hf conv1d", "block", 5, 2, 2, 3, swapped=True),
    fused("fused interleaved", "interleaved", 5, 2, 2, 3),
    fused("fused interleaved, equal", "interleaved", 4, 4, 4, 4),
    fused("fused interleaved, grouped heads", "interleaved", 5, 6, 2, 3),
    fused("fused interleaved, flat kernels", "interleaved", 5, 6, 2, 3, flat=True),
]


# ---------------------------------------------------------------- recurrent

_LINEN_CELLS = {
    "LSTM": fn.LSTMCell, "optimized LSTM": fn.OptimizedLSTMCell, "GRU": fn.GRUCell, "RNN": fn.SimpleCell,
}  # fmt: skip
_NNX_CELLS = {
    "LSTM": nnx.LSTMCell, "optimized LSTM": nnx.OptimizedLSTMCell, "GRU": nnx.GRUCell, "RNN": nnx.SimpleCell,
}  # fmt: skip


class LinenStack(fn.Module):
    """Layers of cells, one or both directions, made in the order of their calls."""

    cell: Any
    layers: int
    directions: int

    @fn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.layers):
            if self.directions == 2:
                x = fn.Bidirectional(fn.RNN(self.cell()), fn.RNN(self.cell()))(x)
            else:
                x = fn.RNN(self.cell())(x)
        return x


class NnxStack(nnx.Module):
    def __init__(self, cell: Any, i: int, hidden: int, layers: int, directions: int, rngs: nnx.Rngs) -> None:
        made = []
        for layer in range(layers):
            width = i if layer == 0 else hidden * directions
            rnns = [nnx.RNN(cell(width, hidden, rngs=rngs), rngs=rngs) for _ in range(directions)]
            made.append(nnx.Bidirectional(*rnns, rngs=rngs) if directions == 2 else rnns[0])
        self.layers = nnx.List(made)

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


def recurrent(cell: str, i: int, hidden: int, layers: int = 1, directions: int = 1, **more: Any) -> Case:
    torch_kind = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}[cell.rpartition(" ")[2]]
    relu = {"nonlinearity": "relu"} if more.pop("relu", False) else {}
    flax_relu = {"activation_fn": fn.relu} if relu else {}
    plain = layers == directions == 1
    return Case(
        f"{cell} {i} to {hidden}, {layers} x {directions}{', relu' if relu else ''}", cell.rpartition(" ")[2],
        lambda: torch_kind(i, hidden, layers, bidirectional=directions == 2, batch_first=True, **relu),
        lambda: LinenStack(lambda: _LINEN_CELLS[cell](hidden, **flax_relu), layers, directions),
        lambda r: NnxStack(
            lambda a, b, rngs: _NNX_CELLS[cell](a, b, rngs=rngs, **flax_relu), i, hidden, layers, directions, r
        ),
        (2, 5, i), on_torch=lambda m, x: m(x)[0], exact=False,
        variant="one cell" if plain else f"{layers} layers, {'bidirectional' if directions == 2 else 'one direction'}",
        by="modules" if plain else "convention", **more,
    )  # fmt: skip


def without_hidden_bias(module: Any) -> None:
    """Zero b_hn of every layer: what nnx.GRUCell can represent."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if "bias_hh" in name:
                tensor[2 * tensor.shape[0] // 3 :] = 0


def cell(name: str, layer: str, torch_kind: Any, linen: Any, nnx_: Any, i: int, hidden: int, **more: Any) -> Case:
    """One step of a torch cell against one Flax cell; the state is the first columns of the input."""
    pair = layer == "LSTM"

    def on_torch(m: Any, x: Any) -> Any:
        h, c = x[:, i : i + hidden], x[:, i + hidden :]
        return torch.cat(m(x[:, :i], (h, c)), 1) if pair else m(x[:, :i], h)

    def on_flax(m: Any, x: Any) -> Any:
        h, c = x[:, i : i + hidden], x[:, i + hidden :]
        carry, out = m((c, h) if pair else h, x[:, :i])
        return jnp.concatenate([out, carry[0]], 1) if pair else out

    return Case(
        name, layer, lambda: torch_kind(i, hidden), lambda: linen(hidden), lambda r: nnx_(i, hidden, rngs=r),
        (3, i + 2 * hidden), on_torch=on_torch, on_flax=on_flax, exact=False, variant="one cell", **more,
    )  # fmt: skip


RECURRENT = [
    recurrent("LSTM", 5, 3),
    recurrent("LSTM", 4, 4, 2),
    recurrent("optimized LSTM", 5, 3, 2, 2),
    recurrent("optimized LSTM", 4, 2, 2, 2, file="first"),
    recurrent("optimized LSTM", 3, 1),
    recurrent("GRU", 5, 3, prepare=without_hidden_bias, blind=("hn/bias",)),
    recurrent("GRU", 3, 3, 2, 2, prepare=without_hidden_bias, blind=("hn/bias",)),
    recurrent("RNN", 5, 3),
    recurrent("RNN", 3, 3, 2, 2),
    recurrent("RNN", 5, 3, relu=True),
    cell("LSTM cell", "LSTM", nn.LSTMCell, fn.LSTMCell, nnx.LSTMCell, 5, 3),
    cell("LSTM cell, optimized", "LSTM", nn.LSTMCell, fn.OptimizedLSTMCell, nnx.OptimizedLSTMCell, 3, 3),
    cell("GRU cell", "GRU", nn.GRUCell, fn.GRUCell, nnx.GRUCell, 5, 3, prepare=without_hidden_bias, blind=("hn/bias",)),
    Case(
        "GRU with b_hn", "GRU", lambda: nn.GRU(5, 3, batch_first=True), lambda: fn.RNN(fn.GRUCell(3)), None, (2, 4, 5),
        on_torch=lambda m, x: m(x)[0], exact=False, variant="one cell",
    ),
    cell("RNN cell", "RNN", nn.RNNCell, fn.SimpleCell, nnx.SimpleCell, 5, 3),
]  # fmt: skip

# ---------------------------------------------------------------- weight norm, spectral norm


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
        "conv_transpose default square", new_norm, "kept", axes=-2, hints={"layout": "conv_transpose default"}
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

CASES = [*DENSE, *CONV, *NORMS, *ATTENTION, *FUSED, *RECURRENT, *REPARAM]
