"""A tagger: embedding, LSTM in one or both directions, linear."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import torch
from flax import linen as fn
from flax import nnx
from torch import nn

from .base import Batch, Kind, Settings, both, int_ids
from .layers import FLAX_ACTIVATIONS, TORCH_ACTIVATIONS

LENGTH = 7


@dataclass(frozen=True, slots=True)
class TaggerSettings(Settings):
    """hidden: of one direction. The embedding's width is `hidden` too unless `width` says otherwise, so that both
    kernels of a gate are square. reversed_too: a second direction."""

    vocabulary: int = 40
    width: int = 12
    hidden: int = 12
    tags: int = 5
    reversed_too: bool = True
    activation: str = "gelu"
    embed_scale: float = 1.0
    epsilon: float = 1e-5
    dtype: Any = None


class TorchTagger(nn.Module):
    """Ids (N, T) -> scores (N, T, tags)."""

    def __init__(self, s: TaggerSettings) -> None:
        super().__init__()
        self.s = s
        self.embedding = nn.Embedding(s.vocabulary, s.width)
        self.lstm = nn.LSTM(s.width, s.hidden, batch_first=True, bidirectional=s.reversed_too)
        both_ways = s.hidden * (1 + s.reversed_too)
        self.norm = nn.LayerNorm(both_ways, eps=s.epsilon)
        self.dense = nn.Linear(both_ways, both_ways)
        self.classifier = nn.Linear(both_ways, s.tags)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(self.embedding(ids) * self.s.embed_scale)
        x = TORCH_ACTIVATIONS[self.s.activation](self.dense(self.norm(x)))
        return self.classifier(x)


class LinenTagger(fn.Module):
    """Ids (N, T) -> scores (N, T, tags)."""

    s: TaggerSettings

    @fn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        s = self.s
        x = fn.Embed(s.vocabulary, s.width, name="embed")(ids) * s.embed_scale
        forward = fn.RNN(fn.OptimizedLSTMCell(s.hidden), name="lstm_forward")
        if s.reversed_too:
            x = fn.Bidirectional(forward, fn.RNN(fn.OptimizedLSTMCell(s.hidden), name="lstm_backward"))(x)
        else:
            x = forward(x)
        x = fn.LayerNorm(epsilon=s.epsilon, name="norm")(x)
        x = FLAX_ACTIVATIONS[s.activation](fn.Dense(x.shape[-1], dtype=s.dtype, name="dense")(x))
        return fn.Dense(s.tags, name="tags")(x)


class NNXTagger(nnx.Module):
    """Ids (N, T) -> scores (N, T, tags)."""

    def __init__(self, s: TaggerSettings, rngs: nnx.Rngs) -> None:
        self.s = s
        self.embed = nnx.Embed(s.vocabulary, s.width, rngs=rngs)
        forward = nnx.RNN(nnx.OptimizedLSTMCell(s.width, s.hidden, rngs=rngs))
        if s.reversed_too:
            backward = nnx.RNN(nnx.OptimizedLSTMCell(s.width, s.hidden, rngs=rngs))
            self.lstm = nnx.Bidirectional(forward, backward)
        else:
            self.lstm = forward
        both_ways = s.hidden * (1 + s.reversed_too)
        self.norm = nnx.LayerNorm(both_ways, epsilon=s.epsilon, rngs=rngs)
        self.dense = nnx.Linear(both_ways, both_ways, dtype=s.dtype, rngs=rngs)
        self.out = nnx.Linear(both_ways, s.tags, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.lstm(self.embed(ids) * self.s.embed_scale)
        return self.out(FLAX_ACTIVATIONS[self.s.activation](self.dense(self.norm(x))))


def inputs(s: TaggerSettings, rng: np.random.Generator) -> Batch:
    return both(int_ids(rng, s.vocabulary, (3, LENGTH)))


def rules(s: TaggerSettings, api: str) -> str:
    """'classifier' says something that 'tags' and 'out' do not."""
    head = "params/tags" if api == "linen" else "out"
    return f'{{ torch = "classifier.weight", flax = "{head}/kernel" }},'


def variants() -> tuple[TaggerSettings, ...]:
    base = TaggerSettings()
    return (
        base,
        replace(base, reversed_too=False),
        replace(base, width=10),
        replace(base, activation="relu", epsilon=1e-6),
        replace(base, embed_scale=12**0.5, activation="tanh"),
    )


TAGGER = Kind("tagger", TaggerSettings(), TorchTagger, LinenTagger, NNXTagger, inputs, rules, variants)
