"""A BERT-like encoder: word, position and type embeddings, post-norm blocks, padding mask, pooler. Its torch side has
Hugging Face's names; Linen keeps heads apart (DenseGeneral, setup), NNX reshapes (Linear)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as fn
from flax import nnx
from torch import nn
from torch.nn import functional as F

from .base import Batch, Kind, Settings, both, int_ids
from .layers import FLAX_ACTIVATIONS, TORCH_ACTIVATIONS, attend, padding_mask

LENGTH = 10


@dataclass(frozen=True, slots=True)
class EncoderSettings(Settings):
    """positions: 'arange', or 'mask' as RoBERTa counts (pad_id, then one more for every token that counts);
    pos_offset: what is added to every position; scale: of attention scores, None for head_dim ** -0.5."""

    vocabulary: int = 40
    positions_in_all: int = 24
    width: int = 24
    heads: int = 4
    inner: int = 36
    depth: int = 3
    activation: str = "gelu"
    epsilon: float = 1e-12
    scale: float | None = None
    mask: str = "right"
    positions: str = "arange"
    pos_offset: int = 0
    left_padded: bool = False
    embed_scale: float = 1.0
    residual: bool = True
    gain: float = 1.0
    fast: bool = False
    dtype: Any = None

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale


# ---------------------------------------------------------------- torch


class TorchEmbeddings(nn.Module):
    def __init__(self, s: EncoderSettings) -> None:
        super().__init__()
        self.s = s
        self.word_embeddings = nn.Embedding(s.vocabulary, s.width, padding_idx=0)
        self.position_embeddings = nn.Embedding(s.positions_in_all, s.width)
        self.token_type_embeddings = nn.Embedding(2, s.width)
        self.LayerNorm = nn.LayerNorm(s.width, eps=s.epsilon)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if self.s.positions == "mask":
            positions = torch.cumsum(mask, 1) * mask
        x = self.word_embeddings(ids) * self.s.embed_scale
        x = x + self.token_type_embeddings(types) + self.position_embeddings(positions + self.s.pos_offset)
        return self.LayerNorm(x)


class TorchSelfAttention(nn.Module):
    def __init__(self, s: EncoderSettings) -> None:
        super().__init__()
        self.s = s
        self.query = nn.Linear(s.width, s.width)
        self.key = nn.Linear(s.width, s.width)
        self.value = nn.Linear(s.width, s.width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).view(*x.shape[:2], self.s.heads, self.s.head_dim).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) * self.s.attention_scale
        scores = scores + (1.0 - mask[:, None, None, :].to(scores.dtype)) * torch.finfo(scores.dtype).min
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


class TorchOutput(nn.Module):
    def __init__(self, s: EncoderSettings, taken: int) -> None:
        super().__init__()
        self.s = s
        self.dense = nn.Linear(taken, s.width)
        self.LayerNorm = nn.LayerNorm(s.width, eps=s.epsilon)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        out = self.dense(x) * self.s.gain
        return self.LayerNorm(out + skip if self.s.residual else out)


class TorchLayer(nn.Module):
    def __init__(self, s: EncoderSettings) -> None:
        super().__init__()
        self.s = s
        self.attention = nn.Module()
        self.attention.self = TorchSelfAttention(s)
        self.attention.output = TorchOutput(replace(s, residual=True, gain=1.0), s.width)
        self.intermediate = nn.Linear(s.width, s.inner)
        self.output = TorchOutput(s, s.inner)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.attention.output(self.attention.self(x, mask), x)
        return self.output(TORCH_ACTIVATIONS[self.s.activation](self.intermediate(x)), x)


class TorchEncoder(nn.Module):
    """Ids (N, T), mask (N, T) of 1 and 0, types (N, T) -> {"hidden": (N, T, D), "pooled": (N, D)}."""

    def __init__(self, s: EncoderSettings) -> None:
        super().__init__()
        self.embeddings = TorchEmbeddings(s)
        self.layer = nn.ModuleList(TorchLayer(s.block(i)) for i in range(s.depth))
        self.pooler = nn.Linear(s.width, s.width)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embeddings(ids, mask, types)
        for layer in self.layer:
            x = layer(x, mask)
        return {"hidden": x, "pooled": F.tanh(self.pooler(x[:, 0]))}


# ---------------------------------------------------------------- Linen


def position_ids(s: EncoderSettings, mask: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
    if s.positions == "mask":
        positions = jnp.cumsum(mask, axis=1) * mask
    return positions + s.pos_offset


class LinenLayer(fn.Module):
    s: EncoderSettings

    def setup(self) -> None:
        s = self.s
        heads = (s.heads, s.head_dim)
        self.query = fn.DenseGeneral(heads)
        self.key = fn.DenseGeneral(heads)
        self.value = fn.DenseGeneral(heads)
        self.out = fn.DenseGeneral(s.width, axis=(-2, -1))
        self.attention_norm = fn.LayerNorm(epsilon=s.epsilon, use_fast_variance=s.fast)
        self.fc1 = fn.Dense(s.inner, dtype=s.dtype)
        self.fc2 = fn.Dense(s.width)
        self.mlp_norm = fn.LayerNorm(epsilon=s.epsilon, use_fast_variance=s.fast)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        s = self.s
        mixed = attend(self.query(x), self.key(x), self.value(x), padding_mask(mask, s.mask), s.attention_scale)
        x = self.attention_norm(x + self.out(mixed))
        h = self.fc2(FLAX_ACTIVATIONS[s.activation](self.fc1(x))) * s.gain
        return self.mlp_norm(x + h if s.residual else h)


class LinenEncoder(fn.Module):
    """Ids (N, T), mask (N, T) of 1 and 0, types (N, T) -> {"hidden": (N, T, D), "pooled": (N, D)}."""

    s: EncoderSettings

    def setup(self) -> None:
        s = self.s
        self.word_embed = fn.Embed(s.vocabulary, s.width)
        self.position_embed = fn.Embed(s.positions_in_all, s.width)
        self.type_embed = fn.Embed(2, s.width)
        self.embed_norm = fn.LayerNorm(epsilon=s.epsilon, use_fast_variance=s.fast)
        self.layers = [LinenLayer(s.block(i)) for i in range(s.depth)]
        self.pooler = fn.Dense(s.width)

    def __call__(self, ids: jax.Array, mask: jax.Array, types: jax.Array) -> dict[str, jax.Array]:
        x = self.word_embed(ids) * self.s.embed_scale
        x = self.embed_norm(x + self.position_embed(position_ids(self.s, mask)) + self.type_embed(types))
        for layer in self.layers:
            x = layer(x, mask)
        return {"hidden": x, "pooled": fn.tanh(self.pooler(x[:, 0]))}


# ---------------------------------------------------------------- NNX


class NNXAttention(nnx.Module):
    def __init__(self, s: EncoderSettings, rngs: nnx.Rngs) -> None:
        self.s = s
        self.q = nnx.Linear(s.width, s.width, rngs=rngs)
        self.k = nnx.Linear(s.width, s.width, rngs=rngs)
        self.v = nnx.Linear(s.width, s.width, rngs=rngs)
        self.o = nnx.Linear(s.width, s.width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        s = self.s
        q, k, v = (part(x).reshape(*x.shape[:2], s.heads, s.head_dim) for part in (self.q, self.k, self.v))
        return self.o(attend(q, k, v, padding_mask(mask, s.mask), s.attention_scale).reshape(x.shape))


class NNXLayer(nnx.Module):
    def __init__(self, s: EncoderSettings, rngs: nnx.Rngs) -> None:
        self.s = s
        self.attn = NNXAttention(s, rngs)
        self.norm1 = nnx.LayerNorm(s.width, epsilon=s.epsilon, use_fast_variance=s.fast, rngs=rngs)
        self.wi = nnx.Linear(s.width, s.inner, dtype=s.dtype, rngs=rngs)
        self.wo = nnx.Linear(s.inner, s.width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(s.width, epsilon=s.epsilon, use_fast_variance=s.fast, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.norm1(x + self.attn(x, mask))
        h = self.wo(FLAX_ACTIVATIONS[self.s.activation](self.wi(x))) * self.s.gain
        return self.norm2(x + h if self.s.residual else h)


class NNXEncoder(nnx.Module):
    """Ids (N, T), mask (N, T) of 1 and 0, types (N, T) -> {"hidden": (N, T, D), "pooled": (N, D)}."""

    def __init__(self, s: EncoderSettings, rngs: nnx.Rngs) -> None:
        self.s = s
        self.tokens = nnx.Embed(s.vocabulary, s.width, rngs=rngs)
        self.positions = nnx.Embed(s.positions_in_all, s.width, rngs=rngs)
        self.segments = nnx.Embed(2, s.width, rngs=rngs)
        self.embed_norm = nnx.LayerNorm(s.width, epsilon=s.epsilon, use_fast_variance=s.fast, rngs=rngs)
        self.blocks = nnx.List(NNXLayer(s.block(i), rngs) for i in range(s.depth))
        self.pooler = nnx.Linear(s.width, s.width, rngs=rngs)

    def __call__(self, ids: jax.Array, mask: jax.Array, types: jax.Array) -> dict[str, jax.Array]:
        x = self.tokens(ids) * self.s.embed_scale
        x = self.embed_norm(x + self.positions(position_ids(self.s, mask)) + self.segments(types))
        for block in self.blocks:
            x = block(x, mask)
        return {"hidden": x, "pooled": jnp.tanh(self.pooler(x[:, 0]))}


def inputs(s: EncoderSettings, rng: np.random.Generator) -> Batch:
    """Three texts of 10, 7 and 4 tokens, padded behind or (left_padded) before."""
    ids = int_ids(rng, s.vocabulary, (3, LENGTH))
    mask = (np.arange(LENGTH)[None] < np.array([LENGTH, 7, 4])[:, None]).astype(np.int32)
    types = rng.integers(0, 2, ids.shape).astype(np.int32)
    if s.left_padded:
        mask = mask[:, ::-1].copy()
    return both(ids * mask, mask, types)


def variants() -> tuple[EncoderSettings, ...]:
    base = EncoderSettings()
    return (
        base,
        *(replace(base, activation=name) for name in ("gelu_tanh", "relu", "silu")),
        replace(base, epsilon=1e-5, fast=True),
        replace(base, positions="mask", pos_offset=1, left_padded=True),
        replace(base, scale=1.0),
        replace(base, embed_scale=24**0.5),
        replace(base, heads=3, inner=48),
    )


def loud(module: TorchEncoder) -> None:
    module.embeddings.word_embeddings.weight += 30.0
    for layer in module.layer:
        layer.attention.output.dense.bias += 30.0
        layer.output.dense.bias += 30.0


ENCODER = Kind(
    "encoder", EncoderSettings(), TorchEncoder, LinenEncoder, NNXEncoder, inputs, variants=variants, loud=loud
)
