"""A ViT-like classifier whose learned positions are resized from the grid they were trained on. torch has the fused
nn.MultiheadAttention, Flax its own attention modules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as fn
from flax import nnx
from torch import nn
from torch.nn import functional as F

from .base import Batch, Kind, Settings
from .layers import FLAX_ACTIVATIONS, TORCH_ACTIVATIONS

PATCH = 3


@dataclass(frozen=True, slots=True)
class ViTSettings(Settings):
    """trained: the grid of the learned positions; grid: that of the images. resize: how Flax gets from one to the
    other: linear (as torch), antialias, nearest, cubic, corners (aligned), transposed."""

    trained: tuple[int, int] = (6, 5)
    grid: tuple[int, int] = (4, 3)
    width: int = 24
    heads: int = 4
    inner: int = 36
    depth: int = 2
    classes: int = 7
    activation: str = "gelu"
    epsilon: float = 1e-6
    resize: str = "linear"
    gain_scores: float = 1.0
    residual: bool = True
    patch_padding: Any = "VALID"
    fast: bool = False
    dtype: Any = None


# ---------------------------------------------------------------- torch


class TorchBlock(nn.Module):
    def __init__(self, s: ViTSettings) -> None:
        super().__init__()
        self.s = s
        self.norm1 = nn.LayerNorm(s.width, eps=s.epsilon)
        self.attn = nn.MultiheadAttention(s.width, s.heads, batch_first=True)
        self.norm2 = nn.LayerNorm(s.width, eps=s.epsilon)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(s.width, s.inner), "fc2": nn.Linear(s.inner, s.width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        h = self.mlp["fc2"](TORCH_ACTIVATIONS[self.s.activation](self.mlp["fc1"](self.norm2(x))))
        return x + h if self.s.residual else h


class TorchViT(nn.Module):
    """(N, 3, H, W) -> (logits (N, classes), features (N, 1 + patches, D))."""

    def __init__(self, s: ViTSettings) -> None:
        super().__init__()
        self.s = s
        self.patch_embed = nn.Conv2d(3, s.width, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, s.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + s.trained[0] * s.trained[1], s.width))
        self.blocks = nn.ModuleList(TorchBlock(s.block(i)) for i in range(s.depth))
        self.norm = nn.LayerNorm(s.width, eps=s.epsilon)
        self.head = nn.Linear(s.width, s.classes)

    def positions(self) -> torch.Tensor:
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        maps = rest.reshape(1, *self.s.trained, -1).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, size=self.s.grid, mode="bilinear", align_corners=False)
        return torch.cat([first, maps.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions()
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0]), x


# ---------------------------------------------------------------- Flax


def resized(positions: jax.Array, s: ViTSettings) -> jax.Array:
    """Learned positions (1, 1 + h * w, D) on the images' grid."""
    first, rest = positions[:, :1], positions[:, 1:]
    maps = rest.reshape(1, *s.trained, -1)
    if s.resize == "transposed":
        maps = rest.reshape(1, *s.trained[::-1], -1).swapaxes(1, 2)
    shape = (1, *s.grid, maps.shape[-1])
    if s.resize == "corners":
        rows, columns = (jnp.linspace(0, taken - 1, given) for taken, given in zip(s.trained, s.grid, strict=True))
        at = jnp.meshgrid(rows, columns, indexing="ij")
        one = partial(jax.scipy.ndimage.map_coordinates, coordinates=at, order=1)
        maps = jax.vmap(one, in_axes=-1, out_axes=-1)(maps[0])[None]
    else:
        method = s.resize if s.resize in ("nearest", "cubic") else "linear"
        maps = jax.image.resize(maps, shape, method, antialias=s.resize == "antialias")
    return jnp.concatenate([first, maps.reshape(1, -1, maps.shape[-1])], axis=1)


def scaled_attention(gain: float, attention: Any) -> Any:
    """Flax's attention with scores that are `gain` times as large; itself for 1."""
    if gain == 1.0:
        return attention
    return lambda query, key, value, **options: attention(query * gain, key, value, **options)


class LinenBlock(fn.Module):
    s: ViTSettings

    @fn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s = self.s
        h = fn.LayerNorm(epsilon=s.epsilon, use_fast_variance=s.fast, name="ln1")(x)
        attention_fn = scaled_attention(s.gain_scores, fn.dot_product_attention)
        x = x + fn.MultiHeadDotProductAttention(s.heads, attention_fn=attention_fn, name="attn")(h)
        h = fn.LayerNorm(epsilon=s.epsilon, use_fast_variance=s.fast, name="ln2")(x)
        h = FLAX_ACTIVATIONS[s.activation](fn.Dense(s.inner, dtype=s.dtype, name="fc1")(h))
        h = fn.Dense(s.width, name="fc2")(h)
        return x + h if s.residual else h


class LinenViT(fn.Module):
    """(N, H, W, 3) -> (logits (N, classes), features (N, 1 + patches, D))."""

    s: ViTSettings

    @fn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        s = self.s
        x = fn.Conv(s.width, (PATCH, PATCH), PATCH, padding=s.patch_padding, name="patch_embedding")(x)
        x = x.reshape(x.shape[0], -1, s.width)
        first = self.param("cls", fn.initializers.zeros, (1, 1, s.width))
        pos = self.param("pos_embedding", fn.initializers.normal(0.02), (1, 1 + s.trained[0] * s.trained[1], s.width))
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, s.width)), x], axis=1) + resized(pos, s)
        for i in range(s.depth):
            x = LinenBlock(s.block(i), name=f"block_{i}")(x)
        x = fn.LayerNorm(epsilon=s.epsilon, use_fast_variance=s.fast, name="norm")(x)
        return fn.Dense(s.classes, name="head")(x[:, 0]), x


class NNXBlock(nnx.Module):
    def __init__(self, s: ViTSettings, rngs: nnx.Rngs) -> None:
        self.s = s
        norm = partial(nnx.LayerNorm, s.width, epsilon=s.epsilon, use_fast_variance=s.fast, rngs=rngs)
        self.norm1 = norm()
        self.attention = nnx.MultiHeadAttention(
            s.heads,
            s.width,
            attention_fn=scaled_attention(s.gain_scores, nnx.dot_product_attention),
            decode=False,
            rngs=rngs,
        )
        self.norm2 = norm()
        self.linear1 = nnx.Linear(s.width, s.inner, dtype=s.dtype, rngs=rngs)
        self.linear2 = nnx.Linear(s.inner, s.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        h = self.linear2(FLAX_ACTIVATIONS[self.s.activation](self.linear1(self.norm2(x))))
        return x + h if self.s.residual else h


class NNXViT(nnx.Module):
    """(N, H, W, 3) -> (logits (N, classes), features (N, 1 + patches, D))."""

    def __init__(self, s: ViTSettings, rngs: nnx.Rngs) -> None:
        self.s = s
        self.patch = nnx.Conv(3, s.width, (PATCH, PATCH), PATCH, padding=s.patch_padding, rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, s.width)))
        self.pos_embed = nnx.Param(jnp.zeros((1, 1 + s.trained[0] * s.trained[1], s.width)))
        self.layers = nnx.List(NNXBlock(s.block(i), rngs) for i in range(s.depth))
        self.final_norm = nnx.LayerNorm(s.width, epsilon=s.epsilon, use_fast_variance=s.fast, rngs=rngs)
        self.classifier = nnx.Linear(s.width, s.classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.patch(x).reshape(x.shape[0], -1, self.s.width)
        first = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, self.s.width))
        x = jnp.concatenate([first, x], axis=1) + resized(self.pos_embed[...], self.s)
        for layer in self.layers:
            x = layer(x)
        x = self.final_norm(x)
        return self.classifier(x[:, 0]), x


def inputs(s: ViTSettings, rng: np.random.Generator) -> Batch:
    x = rng.normal(size=(3, 3, s.grid[0] * PATCH, s.grid[1] * PATCH)).astype(np.float32)
    return Batch((torch.from_numpy(x),), (jnp.asarray(x.transpose(0, 2, 3, 1)),))


def variants() -> tuple[ViTSettings, ...]:
    base = ViTSettings()
    return (
        base,
        *(replace(base, activation=name) for name in ("gelu_tanh", "quick_gelu", "relu")),
        replace(base, epsilon=1e-5, fast=True),
        replace(base, trained=(3, 2), grid=(4, 3)),
        replace(base, trained=(4, 3), grid=(4, 3), heads=3),
    )


def loud(module: TorchViT) -> None:
    module.patch_embed.bias += 30.0
    module.cls_token += 30.0


VIT = Kind("vit", ViTSettings(), TorchViT, LinenViT, NNXViT, inputs, variants=variants, loud=loud)
