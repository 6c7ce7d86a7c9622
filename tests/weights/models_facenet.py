"""MTCNN's three networks (P, R and O) for faces. Ours, with facenet-pytorch's names and settings.

Source: facenet-pytorch 2.6.0, facenet_pytorch/models/mtcnn.py. Pooling rounds its output up (ceil_mode). R and O
flatten their last map in the order W H C: torch permutes (N, C, H, W) to (N, W, H, C) first.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import torch
from flax import linen as nn
from flax import nnx
from torch.nn import functional as F

import graftax as gx

# ---------------------------------------------------------------- torch


class TorchP(torch.nn.Module):
    """(N, 3, H, W) -> (boxes (N, 4, h, w), faces (N, 2, h, w)): a network of convolutions for any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 10, 3)
        self.prelu1 = torch.nn.PReLU(10)
        self.conv2 = torch.nn.Conv2d(10, 16, 3)
        self.prelu2 = torch.nn.PReLU(16)
        self.conv3 = torch.nn.Conv2d(16, 32, 3)
        self.prelu3 = torch.nn.PReLU(32)
        self.conv4_1 = torch.nn.Conv2d(32, 2, 1)
        self.conv4_2 = torch.nn.Conv2d(32, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = F.max_pool2d(self.prelu1(self.conv1(x)), 2, ceil_mode=True)
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_2(x), self.conv4_1(x).softmax(1)


class TorchR(torch.nn.Module):
    """(N, 3, 24, 24) -> (boxes (N, 4), faces (N, 2))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 28, 3)
        self.prelu1 = torch.nn.PReLU(28)
        self.conv2 = torch.nn.Conv2d(28, 48, 3)
        self.prelu2 = torch.nn.PReLU(48)
        self.conv3 = torch.nn.Conv2d(48, 64, 2)
        self.prelu3 = torch.nn.PReLU(64)
        self.dense4 = torch.nn.Linear(576, 128)
        self.prelu4 = torch.nn.PReLU(128)
        self.dense5_1 = torch.nn.Linear(128, 2)
        self.dense5_2 = torch.nn.Linear(128, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = F.max_pool2d(self.prelu1(self.conv1(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = self.prelu3(self.conv3(x)).permute(0, 3, 2, 1).flatten(1)
        x = self.prelu4(self.dense4(x))
        return self.dense5_2(x), self.dense5_1(x).softmax(1)


class TorchO(torch.nn.Module):
    """(N, 3, 48, 48) -> (boxes (N, 4), landmarks (N, 10), faces (N, 2))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 32, 3)
        self.prelu1 = torch.nn.PReLU(32)
        self.conv2 = torch.nn.Conv2d(32, 64, 3)
        self.prelu2 = torch.nn.PReLU(64)
        self.conv3 = torch.nn.Conv2d(64, 64, 3)
        self.prelu3 = torch.nn.PReLU(64)
        self.conv4 = torch.nn.Conv2d(64, 128, 2)
        self.prelu4 = torch.nn.PReLU(128)
        self.dense5 = torch.nn.Linear(1152, 256)
        self.prelu5 = torch.nn.PReLU(256)
        self.dense6_1 = torch.nn.Linear(256, 2)
        self.dense6_2 = torch.nn.Linear(256, 4)
        self.dense6_3 = torch.nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = F.max_pool2d(self.prelu1(self.conv1(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu3(self.conv3(x)), 2, 2, ceil_mode=True)
        x = self.prelu4(self.conv4(x)).permute(0, 3, 2, 1).flatten(1)
        x = self.prelu5(self.dense5(x))
        return self.dense6_2(x), self.dense6_3(x), self.dense6_1(x).softmax(1)


# ---------------------------------------------------------------- Flax


def pool(x: jax.Array, window: int) -> jax.Array:
    """Max pooling with stride 2 that rounds its output up: (N, H, W, C)."""
    ends = [(0, max(0, -(-(size - window) // 2) * 2 + window - size)) for size in x.shape[1:3]]
    return nn.max_pool(x, (window, window), strides=(2, 2), padding=ends)


class PReLU(nn.Module):
    """One slope a channel; Linen's own PReLU has one for all."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        slope = self.param("negative_slope", nn.initializers.constant(0.25), (x.shape[-1],))
        return jnp.where(x >= 0, x, slope * x)


class LinenP(nn.Module):
    """(N, H, W, 3) -> (boxes (N, h, w, 4), faces (N, h, w, 2))."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        x = pool(PReLU()(nn.Conv(10, (3, 3), padding="VALID")(x)), 2)
        x = PReLU()(nn.Conv(16, (3, 3), padding="VALID")(x))
        x = PReLU()(nn.Conv(32, (3, 3), padding="VALID")(x))
        faces = nn.Conv(2, (1, 1), name="faces")(x)
        return nn.Conv(4, (1, 1), name="boxes")(x), nn.softmax(faces)


class LinenO(nn.Module):
    """(N, 48, 48, 3) -> (boxes (N, 4), landmarks (N, 10), faces (N, 2))."""

    def setup(self) -> None:
        self.conv1 = nn.Conv(32, (3, 3), padding="VALID")
        self.conv2 = nn.Conv(64, (3, 3), padding="VALID")
        self.conv3 = nn.Conv(64, (3, 3), padding="VALID")
        self.conv4 = nn.Conv(128, (2, 2), padding="VALID")
        self.prelu1, self.prelu2, self.prelu3, self.prelu4, self.prelu5 = (PReLU() for _ in range(5))
        self.dense = nn.Dense(256)
        self.faces, self.boxes, self.landmarks = nn.Dense(2), nn.Dense(4), nn.Dense(10)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        x = pool(self.prelu1(self.conv1(x)), 3)
        x = pool(self.prelu2(self.conv2(x)), 3)
        x = pool(self.prelu3(self.conv3(x)), 2)
        x = self.prelu4(self.conv4(x))
        x = self.prelu5(self.dense(x.reshape(x.shape[0], -1)))
        return self.boxes(x), self.landmarks(x), nn.softmax(self.faces(x))


class ChannelPReLU(nnx.Module):
    """One slope a channel; NNX's own PReLU has one for all."""

    def __init__(self, features: int) -> None:
        self.slope = nnx.Param(jnp.full((features,), 0.25))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.where(x >= 0, x, self.slope * x)


class NnxR(nnx.Module):
    """(N, 24, 24, 3) -> (boxes (N, 4), faces (N, 2))."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        sizes: Sequence[tuple[int, int, int]] = ((3, 28, 3), (28, 48, 3), (48, 64, 2))
        self.convs = nnx.List([nnx.Conv(i, o, (k, k), padding="VALID", rngs=rngs) for i, o, k in sizes])
        self.prelus = nnx.List([ChannelPReLU(n) for n in (28, 48, 64, 128)])
        self.dense = nnx.Linear(576, 128, rngs=rngs)
        self.faces = nnx.Linear(128, 2, rngs=rngs)
        self.boxes = nnx.Linear(128, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        x = pool(self.prelus[0](self.convs[0](x)), 3)
        x = pool(self.prelus[1](self.convs[1](x)), 3)
        x = self.prelus[2](self.convs[2](x))
        x = self.prelus[3](self.dense(x.reshape(x.shape[0], -1)))
        return self.boxes(x), nnx.softmax(self.faces(x))


def linen_p_like() -> object:
    return gx.linen(LinenP(), jnp.zeros((1, 12, 12, 3)))


def nnx_r_like() -> NnxR:
    return nnx.eval_shape(lambda: NnxR(nnx.Rngs(0)))


def linen_o_like() -> object:
    return gx.linen(LinenO(), jnp.zeros((1, 48, 48, 3)))
