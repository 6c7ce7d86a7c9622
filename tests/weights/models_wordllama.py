"""WordLlama: one table of token embeddings in half precision, averaged. Ours, with the checkpoint's name.

Source: wordllama 0.4.0.post1, wordllama/inference.py: the table is widened to float32, then the mean over tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch
from flax import linen as nn
from flax import nnx

import graftax as gx

TOKENS, WIDTH = 32000, 256


class Torch(torch.nn.Module):
    """Tokens (N, T), mask (N, T) -> (N, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(TOKENS, WIDTH, dtype=torch.float16)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        counted = mask[..., None].to(torch.get_default_dtype())
        x = self.embedding(tokens).to(counted.dtype)
        return (x * counted).sum(1) / counted.sum(1).clamp(min=1)


def mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    counted = mask[..., None].astype(jnp.float32)
    return (x.astype(jnp.float32) * counted).sum(1) / jnp.maximum(counted.sum(1), 1)


class Linen(nn.Module):
    """Tokens (N, T), mask (N, T) -> (N, 256); the table stays in half precision."""

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return mean(nn.Embed(TOKENS, WIDTH, param_dtype=jnp.float16)(tokens), mask)


class Nnx(nnx.Module):
    """The same in float32, as a Flax model is unless it says otherwise."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(TOKENS, WIDTH, rngs=rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return mean(self.embed(tokens), mask)


def linen_like() -> object:
    return gx.linen(Linen(), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))


def nnx_like() -> Nnx:
    return nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))
