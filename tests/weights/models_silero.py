"""Silero VAD at 16 kHz: is this speech? Ours, with the names and settings of the checkpoint.

Source: silero-vad 6.2.3, silero_vad/tinygrad_model.py. A convolution whose filters are sines and cosines makes the
spectrogram; four convolutions, one step of an LSTM a frame, and a projection follow.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch
from flax import linen as nn
from flax import nnx
from torch.nn import functional as F

import graftax as gx

WINDOW, HOP, PAD, BINS = 256, 128, 64, 129
SAMPLES = 64 + 512
"""A frame with its context."""
STRIDES = (1, 2, 2, 1)
SIZES = (BINS, 128, 64, 64, 128)
HIDDEN = 128


class Torch(torch.nn.Module):
    """(T, N, 576) frames, in order -> (T, N) probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = torch.nn.Conv1d(1, 2 * BINS, WINDOW, HOP, bias=False)
        for i, stride in enumerate(STRIDES):
            setattr(self, f"conv{i + 1}", torch.nn.Conv1d(SIZES[i], SIZES[i + 1], 3, stride, padding=1))
        self.lstm_cell = torch.nn.LSTMCell(HIDDEN, HIDDEN)
        self.final_conv = torch.nn.Conv1d(HIDDEN, 1, 1)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        state, out = None, []
        for frame in frames:
            x = self.stft_conv(F.pad(frame[:, None], (0, PAD), mode="reflect"))
            x = torch.sqrt(x[:, :BINS] ** 2 + x[:, BINS:] ** 2)
            for i in range(len(STRIDES)):
                x = torch.relu(getattr(self, f"conv{i + 1}")(x))
            state = self.lstm_cell(x.squeeze(-1), state)
            out.append(torch.sigmoid(self.final_conv(torch.relu(state[0])[..., None])).mean((1, 2)))
        return torch.stack(out)


def spectrum(x: jax.Array) -> jax.Array:
    """(N, L, 258) sines and cosines -> (N, L, 129) magnitudes."""
    real, imaginary = jnp.split(x, 2, axis=-1)
    return jnp.sqrt(real**2 + imaginary**2)


class Linen(nn.Module):
    """(T, N, 576) frames, in order -> (T, N) probabilities."""

    @nn.compact
    def __call__(self, frames: jax.Array) -> jax.Array:
        time, count, _ = frames.shape
        x = jnp.pad(frames.reshape(time * count, -1), ((0, 0), (0, PAD)), mode="reflect")
        stft = nn.Conv(2 * BINS, (WINDOW,), strides=HOP, padding="VALID", use_bias=False, name="stft")
        x = spectrum(stft(x[..., None]))
        for size, stride in zip(SIZES[1:], STRIDES, strict=True):
            x = nn.relu(nn.Conv(size, (3,), strides=stride, padding=1)(x))
        x = nn.RNN(nn.LSTMCell(HIDDEN, name="lstm"), time_major=True)(x.reshape(time, count, HIDDEN))
        return nn.sigmoid(nn.Dense(1, name="head")(nn.relu(x)))[..., 0]


class Nnx(nnx.Module):
    """The same, frame by frame, with the projection as a convolution of one."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stft_conv = nnx.Conv(1, 2 * BINS, WINDOW, HOP, padding="VALID", use_bias=False, rngs=rngs)
        for i, stride in enumerate(STRIDES):
            setattr(self, f"conv{i + 1}", nnx.Conv(SIZES[i], SIZES[i + 1], 3, stride, padding=1, rngs=rngs))
        self.lstm_cell = nnx.OptimizedLSTMCell(HIDDEN, HIDDEN, rngs=rngs)
        self.final_conv = nnx.Conv(HIDDEN, 1, 1, rngs=rngs)

    def __call__(self, frames: jax.Array) -> jax.Array:
        carry, out = (jnp.zeros((frames.shape[1], HIDDEN)),) * 2, []
        for frame in frames:
            x = spectrum(self.stft_conv(jnp.pad(frame, ((0, 0), (0, PAD)), mode="reflect")[..., None]))
            for i in range(len(STRIDES)):
                x = nnx.relu(getattr(self, f"conv{i + 1}")(x))
            carry, hidden = self.lstm_cell(carry, x[:, 0])
            out.append(nnx.sigmoid(self.final_conv(nnx.relu(hidden)[:, None]))[:, 0, 0])
        return jnp.stack(out)


def linen_like() -> object:
    return gx.linen(Linen(), jnp.zeros((1, 1, SAMPLES)))


def nnx_like() -> Nnx:
    return nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))
