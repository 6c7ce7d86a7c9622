"""A residual MLP for rows of features. Linen is compact with automatic names, NNX has names of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import torch
from flax import linen as fn
from flax import nnx
from torch import nn

from .base import Batch, Kind, Settings, both
from .layers import FLAX_ACTIVATIONS, TORCH_ACTIVATIONS


@dataclass(frozen=True, slots=True)
class MLPSettings(Settings):
    """residual, gain: what a block's branch is added with. fast: Flax's fast variance."""

    features: int = 12
    width: int = 20
    depth: int = 3
    classes: int = 7
    activation: str = "gelu"
    epsilon: float = 1e-5
    residual: bool = True
    gain: float = 1.0
    fast: bool = True
    dtype: Any = None


# ---------------------------------------------------------------- torch


class TorchBlock(nn.Module):
    def __init__(self, s: MLPSettings) -> None:
        super().__init__()
        self.s = s
        self.norm = nn.LayerNorm(s.width, eps=s.epsilon)
        self.fc1 = nn.Linear(s.width, s.width)
        self.fc2 = nn.Linear(s.width, s.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.fc2(TORCH_ACTIVATIONS[self.s.activation](self.fc1(self.norm(x))))
        return x + self.s.gain * out if self.s.residual else self.s.gain * out


class TorchMLP(nn.Module):
    """(N, features) -> logits (N, classes)."""

    def __init__(self, s: MLPSettings) -> None:
        super().__init__()
        self.stem = nn.Linear(s.features, s.width)
        self.blocks = nn.ModuleList(TorchBlock(s.block(i)) for i in range(s.depth))
        self.norm = nn.LayerNorm(s.width, eps=s.epsilon)
        self.head = nn.Linear(s.width, s.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# ---------------------------------------------------------------- Linen


class LinenBlock(fn.Module):
    s: MLPSettings

    @fn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s = self.s
        h = fn.LayerNorm(epsilon=s.epsilon, use_fast_variance=s.fast)(x)
        h = FLAX_ACTIVATIONS[s.activation](fn.Dense(s.width, dtype=s.dtype)(h))
        h = fn.Dense(s.width)(h) * s.gain
        return x + h if s.residual else h


class LinenMLP(fn.Module):
    """(N, features) -> logits (N, classes)."""

    s: MLPSettings

    @fn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = fn.Dense(self.s.width, name="inp")(x)
        for i in range(self.s.depth):
            x = LinenBlock(self.s.block(i))(x)
        x = fn.LayerNorm(epsilon=self.s.epsilon, use_fast_variance=self.s.fast, name="final_norm")(x)
        return fn.Dense(self.s.classes, name="out")(x)


# ---------------------------------------------------------------- NNX


class NNXBlock(nnx.Module):
    def __init__(self, s: MLPSettings, rngs: nnx.Rngs) -> None:
        self.s = s
        self.ln = nnx.LayerNorm(s.width, epsilon=s.epsilon, use_fast_variance=s.fast, rngs=rngs)
        self.up = nnx.Linear(s.width, s.width, dtype=s.dtype, rngs=rngs)
        self.down = nnx.Linear(s.width, s.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.s.gain * self.down(FLAX_ACTIVATIONS[self.s.activation](self.up(self.ln(x))))
        return x + h if self.s.residual else h


class NNXMLP(nnx.Module):
    """(N, features) -> logits (N, classes)."""

    def __init__(self, s: MLPSettings, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(s.features, s.width, rngs=rngs)
        self.layers = nnx.List(NNXBlock(s.block(i), rngs) for i in range(s.depth))
        self.final_norm = nnx.LayerNorm(s.width, epsilon=s.epsilon, use_fast_variance=s.fast, rngs=rngs)
        self.classifier = nnx.Linear(s.width, s.classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.final_norm(x))


def inputs(s: MLPSettings, rng: np.random.Generator) -> Batch:
    return both(rng.normal(size=(6, s.features)).astype(np.float32))


def rules(s: MLPSettings, api: str) -> str:
    """'stem' and 'inp' have no word in common."""
    return f'{{ torch = "stem.weight", flax = "{"params/inp" if api == "linen" else "embed"}/kernel" }},'


def variants() -> tuple[MLPSettings, ...]:
    base = MLPSettings()
    return (
        base,
        *(replace(base, activation=name) for name in ("gelu_tanh", "relu", "silu", "quick_gelu", "elu", "tanh")),
        replace(base, epsilon=1e-6),
        replace(base, residual=False),
        replace(base, gain=0.5, fast=False),
    )


def loud(module: TorchMLP) -> None:
    module.stem.bias += 30.0


MLP = Kind("mlp", MLPSettings(), TorchMLP, LinenMLP, NNXMLP, inputs, rules, variants, loud=loud)
