"""A speaker encoder: three LSTMs and a projection. Ours, with Resemblyzer's names and settings.

Source: Resemblyzer 0.1.4, resemblyzer/voice_encoder.py. The checkpoint also holds `similarity_weight` and
`similarity_bias` of the training loss, which the encoder has no use for, and the optimizer's state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch
from flax import linen as nn
from flax import nnx

import graftax as gx

MELS, HIDDEN, LAYERS = 40, 256, 3


class Torch(torch.nn.Module):
    """(N, T, 40) mel frames -> (N, 256) embeddings of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(MELS, HIDDEN, LAYERS, batch_first=True)
        self.linear = torch.nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, (hidden, _) = self.lstm(x)
        x = torch.relu(self.linear(hidden[-1]))
        return x / x.norm(dim=1, keepdim=True)


class Linen(nn.Module):
    """(N, T, 40) mel frames -> (N, 256) embeddings of length 1."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(LAYERS):
            x = nn.RNN(nn.OptimizedLSTMCell(HIDDEN))(x)
        x = nn.relu(nn.Dense(HIDDEN)(x[:, -1]))
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)


class Nnx(nnx.Module):
    """The same; its LSTMs keep the four gates in one kernel."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        sizes = (MELS, *[HIDDEN] * (LAYERS - 1))
        cells = [nnx.OptimizedLSTMCell(size, HIDDEN, rngs=rngs) for size in sizes]
        self.lstm = nnx.List([nnx.RNN(cell) for cell in cells])
        self.linear = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.lstm:
            x = layer(x)
        x = nnx.relu(self.linear(x[:, -1]))
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def linen_like() -> object:
    return gx.linen(Linen(), jnp.zeros((1, 2, MELS)))


def nnx_like() -> Nnx:
    """Not abstract: an nnx.RNN draws its carry from the random state that the module holds."""
    return Nnx(nnx.Rngs(0))
