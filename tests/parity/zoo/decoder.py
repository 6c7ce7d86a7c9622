"""A causal language model as Llama and Gemma are built: rotary positions, grouped key-value heads, RMSNorm, SwiGLU,
sliding window, softcaps, tied or untied head."""

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

from .base import Batch, Kind, Settings, both, int_ids
from .layers import FLAX_ACTIVATIONS, TORCH_ACTIVATIONS, attend

LENGTH = 9


@dataclass(frozen=True, slots=True)
class DecoderSettings(Settings):
    """theta, interleave, q_offset: of the rotary positions (q_offset: the queries' against the keys'); window: how far
    back a token sees; softcap: of the logits, attention_softcap: of the scores; zero_centred: norms times (1 + weight);
    grouping: 'repeat', each key head for neighbouring query heads, or 'tile'; mask: causal, ignored, inverted or
    strict (a token does not see itself)."""

    vocabulary: int = 40
    width: int = 24
    heads: int = 4
    kv_heads: int = 2
    inner: int = 32
    depth: int = 3
    activation: str = "silu"
    epsilon: float = 1e-6
    theta: float = 10000.0
    interleave: bool = False
    q_offset: int = 0
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    attention_softcap: float | None = None
    embed_scale: float = 1.0
    zero_centred: bool = False
    tied: bool = False
    grouping: str = "repeat"
    mask: str = "causal"
    residual: bool = True
    gain: float = 1.0
    dtype: Any = None

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale


# ---------------------------------------------------------------- torch


class TorchRMSNorm(nn.Module):
    def __init__(self, s: DecoderSettings) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(s.width))
        self.variance_epsilon = s.epsilon
        self.zero_centred = s.zero_centred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return x * (1 + self.weight) if self.zero_centred else x * self.weight


def torch_rotary(s: DecoderSettings, length: int, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin (T, 1, h), both halves of a head turned by the same angles."""
    dtype = torch.get_default_dtype()
    inverse = 1.0 / s.theta ** (torch.arange(0, s.head_dim, 2, dtype=dtype) / s.head_dim)
    angles = torch.outer(torch.arange(length, dtype=dtype) + offset, inverse)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class TorchAttention(nn.Module):
    def __init__(self, s: DecoderSettings) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.width, s.heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.width, s.kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.width, s.kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.width, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        s, (n, t, _) = self.s, x.shape
        q = self.q_proj(x).view(n, t, s.heads, s.head_dim)
        k = self.k_proj(x).view(n, t, s.kv_heads, s.head_dim)
        v = self.v_proj(x).view(n, t, s.kv_heads, s.head_dim)
        cos, sin = torch_rotary(s, t)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = (part.repeat_interleave(s.heads // s.kv_heads, dim=2) for part in (k, v))
        scores = torch.einsum("nthd,nshd->nhts", q, k) * s.attention_scale
        if s.attention_softcap is not None:
            scores = s.attention_softcap * torch.tanh(scores / s.attention_softcap)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return self.o_proj(torch.einsum("nhts,nshd->nthd", scores.softmax(-1), v).reshape(n, t, -1))


class TorchMLP(nn.Module):
    def __init__(self, s: DecoderSettings) -> None:
        super().__init__()
        self.s = s
        self.gate_proj = nn.Linear(s.width, s.inner, bias=False)
        self.up_proj = nn.Linear(s.width, s.inner, bias=False)
        self.down_proj = nn.Linear(s.inner, s.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(TORCH_ACTIVATIONS[self.s.activation](self.gate_proj(x)) * self.up_proj(x))


class TorchLayer(nn.Module):
    def __init__(self, s: DecoderSettings) -> None:
        super().__init__()
        self.s = s
        self.input_layernorm = TorchRMSNorm(s)
        self.self_attn = TorchAttention(s)
        self.post_attention_layernorm = TorchRMSNorm(s)
        self.mlp = TorchMLP(s)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask)
        h = self.mlp(self.post_attention_layernorm(x)) * self.s.gain
        return x + h if self.s.residual else h


class TorchDecoder(nn.Module):
    """Ids (N, T), mask (N, T) of 1 and 0 -> logits (N, T, V)."""

    def __init__(self, s: DecoderSettings) -> None:
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(s.vocabulary, s.width)
        self.layers = nn.ModuleList(TorchLayer(s.block(i)) for i in range(s.depth))
        self.norm = TorchRMSNorm(s)
        self.lm_head = nn.Linear(s.width, s.vocabulary, bias=False)
        if s.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        t = ids.shape[1]
        seen = torch.ones(t, t, dtype=torch.bool, device=ids.device).tril()
        if self.s.window is not None:
            seen = seen.triu(1 - self.s.window)
        seen = seen[None, None] & (mask[:, None, None, :] != 0)
        x = self.embed_tokens(ids) * self.s.embed_scale
        for layer in self.layers:
            x = layer(x, seen)
        logits = self.lm_head(self.norm(x))
        return logits if self.s.softcap is None else self.s.softcap * torch.tanh(logits / self.s.softcap)


# ---------------------------------------------------------------- Flax


def rotary(x: jax.Array, s: DecoderSettings, offset: int = 0) -> jax.Array:
    """(N, T, H, h) turned by its positions: halves against each other, or (interleave) neighbours."""
    inverse = 1.0 / s.theta ** (jnp.arange(0, s.head_dim, 2) / s.head_dim)
    angles = (jnp.arange(x.shape[1]) + offset)[:, None, None] * inverse
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if s.interleave:
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def grouped_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, s: DecoderSettings
) -> jax.Array:
    """(N, T, H, h) and (N, T, K, h) -> (N, T, H, h)."""
    q, k = rotary(q, s, s.q_offset), rotary(k, s)
    times = s.heads // s.kv_heads
    k, v = (
        jnp.tile(part, (1, 1, times, 1)) if s.grouping == "tile" else jnp.repeat(part, times, axis=2) for part in (k, v)
    )
    return attend(q, k, v, mask, s.attention_scale, s.attention_softcap)


def decoder_mask(mask: jax.Array, s: DecoderSettings) -> jax.Array | None:
    if s.mask == "ignored":
        return None
    t = mask.shape[1]
    seen = jnp.tril(jnp.ones((t, t), bool), -1 if s.mask == "strict" else 0)
    if s.window is not None:
        seen = jnp.triu(seen, 1 - s.window)
    seen = seen[None, None] & (mask[:, None, None, :] != 0)
    return ~seen if s.mask == "inverted" else seen


def capped(logits: jax.Array, cap: float | None) -> jax.Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


class LinenZeroCentredNorm(fn.Module):
    epsilon: float

    @fn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", fn.initializers.zeros, (x.shape[-1],))
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.epsilon) * (1 + scale)


def linen_norm(s: DecoderSettings, name: str) -> fn.Module:
    return LinenZeroCentredNorm(s.epsilon, name=name) if s.zero_centred else fn.RMSNorm(s.epsilon, name=name)


class LinenAttention(fn.Module):
    s: DecoderSettings

    @fn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        s = self.s
        q = fn.DenseGeneral((s.heads, s.head_dim), use_bias=False, name="query")(x)
        k = fn.DenseGeneral((s.kv_heads, s.head_dim), use_bias=False, name="key")(x)
        v = fn.DenseGeneral((s.kv_heads, s.head_dim), use_bias=False, name="value")(x)
        mixed = grouped_attention(q, k, v, mask, s)
        return fn.DenseGeneral(s.width, axis=(-2, -1), use_bias=False, name="out")(mixed)


class LinenLayer(fn.Module):
    s: DecoderSettings

    @fn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        s = self.s
        x = x + LinenAttention(s, name="attention")(linen_norm(s, "attention_norm")(x), mask)
        h = linen_norm(s, "mlp_norm")(x)
        gate = FLAX_ACTIVATIONS[s.activation](fn.Dense(s.inner, use_bias=False, dtype=s.dtype, name="gate")(h))
        h = gate * fn.Dense(s.inner, use_bias=False, name="up")(h)
        h = fn.Dense(s.width, use_bias=False, name="down")(h) * s.gain
        return x + h if s.residual else h


class LinenDecoder(fn.Module):
    """Ids (N, T), mask (N, T) of 1 and 0 -> logits (N, T, V)."""

    s: DecoderSettings

    @fn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        s = self.s
        embed = fn.Embed(s.vocabulary, s.width, name="embedder")
        x = embed(ids) * s.embed_scale
        seen = decoder_mask(mask, s)
        for i in range(s.depth):
            x = LinenLayer(s.block(i), name=f"layers_{i}")(x, seen)
        x = linen_norm(s, "final_norm")(x)
        logits = embed.attend(x) if s.tied else fn.Dense(s.vocabulary, use_bias=False, name="lm_head")(x)
        return capped(logits, s.softcap)


class NNXZeroCentredNorm(nnx.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.epsilon) * (1 + self.scale[...])


def nnx_norm(s: DecoderSettings, rngs: nnx.Rngs) -> nnx.Module:
    if s.zero_centred:
        return NNXZeroCentredNorm(s.width, s.epsilon)
    return nnx.RMSNorm(s.width, epsilon=s.epsilon, rngs=rngs)


class NNXLayer(nnx.Module):
    def __init__(self, s: DecoderSettings, rngs: nnx.Rngs) -> None:
        self.s = s
        self.norm1 = nnx_norm(s, rngs)
        self.wq = nnx.Linear(s.width, s.heads * s.head_dim, use_bias=False, rngs=rngs)
        self.wk = nnx.Linear(s.width, s.kv_heads * s.head_dim, use_bias=False, rngs=rngs)
        self.wv = nnx.Linear(s.width, s.kv_heads * s.head_dim, use_bias=False, rngs=rngs)
        self.wo = nnx.Linear(s.heads * s.head_dim, s.width, use_bias=False, rngs=rngs)
        self.norm2 = nnx_norm(s, rngs)
        self.gate = nnx.Linear(s.width, s.inner, use_bias=False, dtype=s.dtype, rngs=rngs)
        self.up = nnx.Linear(s.width, s.inner, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(s.inner, s.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        s, h = self.s, self.norm1(x)
        heads = lambda part, count: part.reshape(*part.shape[:2], count, s.head_dim)  # noqa: E731
        q, k, v = heads(self.wq(h), s.heads), heads(self.wk(h), s.kv_heads), heads(self.wv(h), s.kv_heads)
        x = x + self.wo(grouped_attention(q, k, v, mask, s).reshape(*x.shape[:2], -1))
        h = self.norm2(x)
        h = self.down(FLAX_ACTIVATIONS[s.activation](self.gate(h)) * self.up(h)) * s.gain
        return x + h if s.residual else h


class NNXDecoder(nnx.Module):
    """Ids (N, T), mask (N, T) of 1 and 0 -> logits (N, T, V)."""

    def __init__(self, s: DecoderSettings, rngs: nnx.Rngs) -> None:
        self.s = s
        self.embed = nnx.Embed(s.vocabulary, s.width, rngs=rngs)
        self.layers = nnx.List(NNXLayer(s.block(i), rngs) for i in range(s.depth))
        self.final_norm = nnx_norm(s, rngs)
        if not s.tied:
            self.head = nnx.Linear(s.width, s.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.embed(ids) * self.s.embed_scale
        seen = decoder_mask(mask, self.s)
        for layer in self.layers:
            x = layer(x, seen)
        x = self.final_norm(x)
        return capped(self.embed.attend(x) if self.s.tied else self.head(x), self.s.softcap)


def inputs(s: DecoderSettings, rng: np.random.Generator) -> Batch:
    """Two texts of 9 and 6 tokens, padded behind."""
    ids = int_ids(rng, s.vocabulary, (2, LENGTH))
    mask = (np.arange(LENGTH)[None] < np.array([LENGTH, 6])[:, None]).astype(np.int32)
    return both(ids * mask, mask)


def gemma(base: DecoderSettings) -> DecoderSettings:
    """What Gemma does otherwise than Llama."""
    return replace(
        base,
        embed_scale=24**0.5,
        zero_centred=True,
        tied=True,
        softcap=3.0,
        attention_softcap=2.0,
        activation="gelu_tanh",
    )


def variants() -> tuple[DecoderSettings, ...]:
    base = DecoderSettings()
    return (
        base,
        gemma(base),
        replace(base, tied=True),
        replace(base, epsilon=1e-5, theta=500.0),
        replace(base, window=4),
        replace(base, softcap=2.0),
        replace(base, attention_softcap=2.0, scale=0.3),
        replace(base, kv_heads=4),
        replace(base, activation="gelu"),
    )


DECODER = Kind("decoder", DecoderSettings(), TorchDecoder, LinenDecoder, NNXDecoder, inputs, variants=variants)
