"""Parity cases of MultiheadAttention, fused projections and PReLU."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import torch
from flax import linen as fn
from flax import nnx
from torch import nn

from .cases_dense import HFConv1D
from .harness import Case


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


def fused(name: str, how: str, i: int, heads: int, kv: int, head: int, *, flat: bool = False, **more: Any) -> Case:
    """One projection of a user's own attention against three; its output is compared as query, key, value."""
    rows = (heads + 2 * kv) * head
    swapped = more.pop("swapped", False)
    group = heads // kv
    ops = {} if flat else {"ops": "i (h d) -> i h d" if swapped else "(h d) i -> i h d"}

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
        (2, 3, i), on_torch=on_torch, variant=f"fused {how}", by="shapes",
        rule={"fused": how, "heads": heads} | ops, **more,
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
