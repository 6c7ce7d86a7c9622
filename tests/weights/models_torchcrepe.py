"""CREPE, tiny: a pitch estimator of six convolutions over 64 ms of sound. Ours, with torchcrepe's names and settings.

Source: torchcrepe 0.0.24, torchcrepe/model.py. Each block pads, convolves, rectifies, normalises, pools (in that
order), and the classifier reads the last map position by position: (N, C, H, 1) -> (N, H * C).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch
from flax import linen as nn
from flax import nnx
from torch.nn import functional as F

import graftax as gx

CHANNELS = (128, 16, 16, 16, 32, 64)
PITCHES = 360
EPSILON = 0.0010000000474974513
SAMPLES = 1024

Padding = tuple[int, int]


def block(index: int) -> tuple[int, int, Padding]:
    """(window, stride, padding) of block `index`, all along time."""
    return (512, 4, (254, 254)) if index == 0 else (64, 1, (31, 32))


class Torch(torch.nn.Module):
    """(N, 1024) samples -> (N, 360) probabilities."""

    def __init__(self) -> None:
        super().__init__()
        for i, (taken, given) in enumerate(zip((1, *CHANNELS), CHANNELS, strict=False)):
            window, stride, _ = block(i)
            setattr(self, f"conv{i + 1}", torch.nn.Conv2d(taken, given, (window, 1), (stride, 1)))
            setattr(self, f"conv{i + 1}_BN", torch.nn.BatchNorm2d(given, eps=EPSILON, momentum=0.0))
        self.classifier = torch.nn.Linear(4 * CHANNELS[-1], PITCHES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None, :, None]
        for i in range(len(CHANNELS)):
            x = F.pad(x, (0, 0, *block(i)[2]))
            x = F.relu(getattr(self, f"conv{i + 1}")(x))
            x = F.max_pool2d(getattr(self, f"conv{i + 1}_BN")(x), (2, 1))
        x = x.permute(0, 2, 1, 3).flatten(1)
        return torch.sigmoid(self.classifier(x))


class Linen(nn.Module):
    """(N, 1024) samples -> (N, 360) probabilities. Names as Flax numbers them: Conv_0..5, BatchNorm_0..5, Dense_0."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x[:, :, None, None]
        for i, features in enumerate(CHANNELS):
            window, stride, padding = block(i)
            x = nn.Conv(features, (window, 1), strides=(stride, 1), padding=(padding, (0, 0)))(x)
            x = nn.BatchNorm(use_running_average=True, epsilon=EPSILON)(nn.relu(x))
            x = nn.max_pool(x, (2, 1), strides=(2, 1))
        return nn.sigmoid(nn.Dense(PITCHES)(x.reshape(x.shape[0], -1)))


class Nnx(nnx.Module):
    """The same with convolutions of one axis, since the other has length 1: kernels of (k, I, O)."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.convs, self.norms = nnx.List(), nnx.List()
        for i, (taken, given) in enumerate(zip((1, *CHANNELS), CHANNELS, strict=False)):
            window, stride, padding = block(i)
            conv = nnx.Conv(taken, given, window, strides=stride, padding=(padding,), rngs=rngs)
            self.convs.append(conv)
            self.norms.append(nnx.BatchNorm(given, epsilon=EPSILON, use_running_average=True, rngs=rngs))
        self.classifier = nnx.Linear(4 * CHANNELS[-1], PITCHES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x[:, :, None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.max_pool(norm(nnx.relu(conv(x))), (2,), strides=(2,))
        return nnx.sigmoid(self.classifier(x.reshape(x.shape[0], -1)))


def linen_like() -> object:
    return gx.linen(Linen(), jnp.zeros((1, SAMPLES)))


def nnx_like() -> Nnx:
    return nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))
