"""A ResNet-like image classifier: NCHW in torch, NHWC in Flax, so that the flatten before the head needs a rule."""

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

from .base import Batch, Kind, Settings
from .layers import FLAX_ACTIVATIONS, TORCH_ACTIVATIONS

Padding = Any
HEIGHT, WIDTH = 16, 12


@dataclass(frozen=True, slots=True)
class CNNSettings(Settings):
    """Flax's side of it; torch has what the defaults say but for channels, classes, activation, epsilon, residual.

    padding     of the 3x3 convolutions of stride 1; down_padding: of those of stride 2
    pool_padding  of the 3x3 pool of stride 2 behind the stem
    stride_in   where a block of stride 2 has its stride: 1, its first convolution, or 2
    training    batch statistics instead of running ones
    flatten     the order in which Flax flattens: HWC, or CHW as torch does
    """

    channels: int = 8
    classes: int = 7
    activation: str = "relu"
    epsilon: float = 1e-5
    residual: bool = True
    momentum: float = 0.9
    training: bool = False
    padding: Padding = ((1, 1), (1, 1))
    down_padding: Padding = ((1, 1), (1, 1))
    pool_padding: Padding = ((1, 1), (1, 1))
    skip_offset: int = 0
    flatten: str = "HWC"
    dtype: Any = None

    @property
    def widths(self) -> tuple[tuple[int, int, int], ...]:
        """(in, out, stride) of each block."""
        c = self.channels
        return ((c, c, 1), (c, c, 1), (c, c + 4, 2))


# ---------------------------------------------------------------- torch


class TorchBlock(nn.Module):
    def __init__(self, s: CNNSettings, taken: int, given: int, stride: int) -> None:
        super().__init__()
        self.s = s
        self.conv1 = nn.Conv2d(taken, given, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(given, eps=s.epsilon)
        self.conv2 = nn.Conv2d(given, given, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(given, eps=s.epsilon)
        self.downsample = None
        if stride != 1 or taken != given:
            self.downsample = nn.Sequential(
                nn.Conv2d(taken, given, 1, stride, bias=False), nn.BatchNorm2d(given, eps=s.epsilon)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        act = TORCH_ACTIVATIONS[self.s.activation]
        out = self.bn2(self.conv2(act(self.bn1(self.conv1(x)))))
        if self.s.residual:
            out = out + (x if self.downsample is None else self.downsample(x))
        return act(out)


class TorchCNN(nn.Module):
    """(N, 3, H, W) -> logits (N, classes)."""

    def __init__(self, s: CNNSettings) -> None:
        super().__init__()
        self.s = s
        self.conv1 = nn.Conv2d(3, s.channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(s.channels, eps=s.epsilon)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.ModuleList(TorchBlock(s.block(i), *sizes) for i, sizes in enumerate(s.widths))
        self.fc = nn.Linear(s.widths[-1][1] * (HEIGHT // 4) * (WIDTH // 4), s.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(TORCH_ACTIVATIONS[self.s.activation](self.bn1(self.conv1(x))))
        for block in self.layer1:
            x = block(x)
        return self.fc(torch.flatten(x, 1))


# ---------------------------------------------------------------- Linen


class LinenBlock(fn.Module):
    s: CNNSettings
    sizes: tuple[int, int, int]

    @fn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s, (taken, given, stride) = self.s, self.sizes
        act = FLAX_ACTIVATIONS[s.activation]
        norm = partial(fn.BatchNorm, use_running_average=not s.training, momentum=s.momentum, epsilon=s.epsilon)
        padding = s.padding if stride == 1 else s.down_padding
        out = fn.Conv(given, (3, 3), stride, padding=padding, use_bias=False, dtype=s.dtype, name="conv1")(x)
        out = act(norm(name="norm1")(out))
        out = fn.Conv(given, (3, 3), padding=s.padding, use_bias=False, name="conv2")(out)
        out = norm(name="norm2")(out)
        if not s.residual:
            return act(out)
        if stride != 1 or taken != given:
            x = jnp.roll(x, -s.skip_offset, axis=1) if s.skip_offset else x
            x = norm(name="skip_norm")(fn.Conv(given, (1, 1), stride, use_bias=False, name="skip_conv")(x))
        return act(out + x)


class LinenCNN(fn.Module):
    """(N, H, W, 3) -> logits (N, classes)."""

    s: CNNSettings

    @fn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s = self.s
        x = fn.Conv(s.channels, (3, 3), padding=s.padding, use_bias=False, dtype=s.dtype, name="stem")(x)
        x = fn.BatchNorm(not s.training, momentum=s.momentum, epsilon=s.epsilon, name="stem_norm")(x)
        x = fn.max_pool(FLAX_ACTIVATIONS[s.activation](x), (3, 3), (2, 2), s.pool_padding)
        for i, sizes in enumerate(s.widths):
            x = LinenBlock(s.block(i), sizes, name=f"block_{i}")(x)
        return fn.Dense(s.classes, name="head")(flatten(x, s.flatten))


def flatten(x: jax.Array, order: str) -> jax.Array:
    """(N, H, W, C) -> (N, H W C), in the order of the letters."""
    return x.transpose(0, *(1 + "HWC".index(axis) for axis in order)).reshape(x.shape[0], -1)


# ---------------------------------------------------------------- NNX


class NNXBlock(nnx.Module):
    def __init__(self, s: CNNSettings, taken: int, given: int, stride: int, rngs: nnx.Rngs) -> None:
        self.s = s
        norm = partial(
            nnx.BatchNorm, given, use_running_average=not s.training, momentum=s.momentum, epsilon=s.epsilon, rngs=rngs
        )
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        padding = s.padding if stride == 1 else s.down_padding
        self.conv1 = conv(taken, given, (3, 3), stride, padding=padding, dtype=s.dtype)
        self.bn1 = norm()
        self.conv2 = conv(given, given, (3, 3), padding=s.padding)
        self.bn2 = norm()
        self.shortcut = nnx.data(None)
        if stride != 1 or taken != given:
            self.shortcut = nnx.Sequential(conv(taken, given, (1, 1), stride), norm())

    def __call__(self, x: jax.Array) -> jax.Array:
        act = FLAX_ACTIVATIONS[self.s.activation]
        out = self.bn2(self.conv2(act(self.bn1(self.conv1(x)))))
        if self.s.residual:
            if self.shortcut is not None:
                x = self.shortcut(jnp.roll(x, -self.s.skip_offset, axis=1) if self.s.skip_offset else x)
            out = out + x
        return act(out)


class NNXCNN(nnx.Module):
    """(N, H, W, 3) -> logits (N, classes)."""

    def __init__(self, s: CNNSettings, rngs: nnx.Rngs) -> None:
        self.s = s
        self.conv_in = nnx.Conv(3, s.channels, (3, 3), padding=s.padding, use_bias=False, dtype=s.dtype, rngs=rngs)
        self.norm_in = nnx.BatchNorm(
            s.channels, use_running_average=not s.training, momentum=s.momentum, epsilon=s.epsilon, rngs=rngs
        )
        self.blocks = nnx.List(NNXBlock(s.block(i), *sizes, rngs) for i, sizes in enumerate(s.widths))
        self.fc = nnx.Linear(s.widths[-1][1] * (HEIGHT // 4) * (WIDTH // 4), s.classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = FLAX_ACTIVATIONS[self.s.activation](self.norm_in(self.conv_in(x)))
        x = nnx.max_pool(x, (3, 3), (2, 2), self.s.pool_padding)
        for block in self.blocks:
            x = block(x)
        return self.fc(flatten(x, self.s.flatten))


def inputs(s: CNNSettings, rng: np.random.Generator) -> Batch:
    x = rng.normal(size=(4, 3, HEIGHT, WIDTH)).astype(np.float32)
    return Batch((torch.from_numpy(x),), (jnp.asarray(x.transpose(0, 2, 3, 1)),))


def rules(s: CNNSettings, api: str) -> str:
    """The map that torch flattened is not in any file; 'conv1' and 'stem' have no word in common."""
    head, stem = ("params/head/kernel", "params/stem/kernel") if api == "linen" else ("fc/kernel", "conv_in/kernel")
    sizes = f"C={s.widths[-1][1]} H={HEIGHT // 4} W={WIDTH // 4}"
    return (
        f'{{ torch = "fc.weight", flax = "{head}", flatten = "{sizes}" }},\n'
        f'{{ torch = "conv1.weight", flax = "{stem}" }},'
    )


def variants() -> tuple[CNNSettings, ...]:
    base = CNNSettings()
    return (
        base,
        *(replace(base, activation=name) for name in ("gelu", "silu", "relu6", "leaky_relu", "elu", "tanh")),
        replace(base, epsilon=1e-3),
        replace(base, channels=6),
        replace(base, channels=6, classes=5, epsilon=1e-6),
    )


CNN = Kind("cnn", CNNSettings(), TorchCNN, LinenCNN, NNXCNN, inputs, rules, variants)
