"""Parity cases of Linear in all its forms, HF Conv1D and Embedding."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as fn
from flax import nnx
from torch import nn

from .harness import Case


def ints(high: int, *shape: int) -> Any:
    return lambda rng: rng.integers(0, high, shape)


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


class FlaxConv1D(fn.Module):
    """What transformers.models.gpt2.modeling_flax_gpt2.FlaxConv1D is: a kernel stored (out, in)."""

    features: int

    @fn.compact
    def __call__(self, x: Any) -> Any:
        bias = self.param("bias", fn.initializers.zeros, (self.features,))
        kernel = self.param("kernel", fn.initializers.normal(0.02), (self.features, x.shape[-1]))
        return x @ kernel.transpose() + bias


FlaxConv1D.__module__ = "transformers.models.gpt2.modeling_flax_gpt2"


class Bilinear(fn.Module):
    """Flax has no such layer; this is what users write."""

    second: int
    features: int

    @fn.compact
    def __call__(self, x: Any, y: Any) -> Any:
        kernel = self.param("kernel", fn.initializers.normal(), (x.shape[-1], self.second, self.features))
        bias = self.param("bias", fn.initializers.zeros, (self.features,))
        return jnp.einsum("bi,bj,ijo->bo", x, y, kernel) + bias


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
        rule={"flatten": " ".join(map(str, shape))},
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
        "linear as 2d 1x1 convolution", "Linear and 1x1 convolution",
        lambda: nn.Linear(5, 3), lambda: fn.Conv(3, (1, 1)), lambda r: nnx.Conv(5, 3, (1, 1), rngs=r),
        (2, 4, 6, 5), variant="linear to 2d 1x1 kernel",
    ),
    Case(
        "1x1 convolution as dense", "Linear and 1x1 convolution",
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
    *(
        Case(
            f"hf flax conv1d {i}x{o}", "HF FlaxConv1D",
            lambda i=i, o=o: HFConv1D(i, o), lambda o=o: FlaxConv1D(o), None, (2, i),
            variant="conv1d (in, out) to (out, in)",
        )
        for i, o in ((5, 3), (4, 4))
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
    Case(
        "embedding bag", "Embedding",
        lambda: nn.EmbeddingBag(7, 3), lambda: fn.Embed(7, 3), lambda r: nnx.Embed(7, 3, rngs=r), (2, 4),
        make_x=ints(7, 2, 4), on_flax=lambda m, x: m(x).mean(-2), variant="embedding",
    ),
    Case(
        "bilinear", "Bilinear",
        lambda: nn.Bilinear(5, 4, 3), lambda: Bilinear(4, 3), None, (2, 9),
        on_torch=lambda m, x: m(x[:, :5], x[:, 5:]), on_flax=lambda m, x: m(x[:, :5], x[:, 5:]),
        variant="bilinear", file="none",
    ),
]  # fmt: skip
