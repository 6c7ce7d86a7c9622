"""Correct ports whose calls or shapes differ from torch's: a cell that torch steps itself, a map that torch pads before
the layer and Flax inside it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import linen as fn
from flax import nnx
from torch import nn

import graftax as gx

IN, HIDDEN, TIME, BATCH = 6, 6, 4, 3
"""IN is HIDDEN: input and state fit each other."""
FRAMES = np.random.default_rng(0).normal(size=(TIME, BATCH, IN)).astype(np.float32)


class Stepped(nn.Module):
    """A projection and a cell, frame by frame; the first call has no state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(IN, IN)
        self.cell = nn.LSTMCell(IN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        state, out = None, []
        for frame in frames:
            state = self.cell(torch.tanh(self.inner(frame)), state)
            out.append(self.head(state[0]))
        return torch.stack(out)


class LinenLoop(fn.Module):
    """All frames at once through the projection, and nn.RNN over a cell."""

    @fn.compact
    def __call__(self, frames: jax.Array) -> jax.Array:
        x = jnp.tanh(fn.Dense(IN, name="inner")(frames.reshape(-1, IN))).reshape(frames.shape)
        x = fn.RNN(fn.LSTMCell(HIDDEN, name="cell"), time_major=True)(x)
        return fn.Dense(2, name="head")(x)


class NnxLoop(nnx.Module):
    """Frame by frame, as torch; the state starts as zeros."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(IN, IN, rngs=rngs)
        self.cell = nnx.OptimizedLSTMCell(IN, HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, 2, rngs=rngs)

    def __call__(self, frames: jax.Array) -> jax.Array:
        carry, out = (jnp.zeros((frames.shape[1], HIDDEN)),) * 2, []
        for frame in frames:
            carry, hidden = self.cell(carry, jnp.tanh(self.inner(frame)))
            out.append(self.head(hidden))
        return jnp.stack(out)


def like_of(api: str) -> Any:
    return gx.linen(LinenLoop(), FRAMES) if api == "linen" else NnxLoop(nnx.Rngs(0))


@pytest.fixture
def module() -> Stepped:
    torch.manual_seed(0)
    return Stepped().eval()


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_cell_that_torch_steps_itself(module: Stepped, api: str):
    like = like_of(api)
    report = gx.check_parity(module, like if api == "linen" else gx.port(module, like), FRAMES)
    assert report, str(report)
    cells = [row for row in report.layers if row.site_torch.path == "cell"]
    assert [row.site_flax.path for row in cells] == ["cell"] * TIME
    assert all(row.status == "ok" for row in cells)


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("which", ["cell/hf/bias", "cell/ii/kernel"])
def test_a_fault_in_the_cell_is_found_there(module: Stepped, api: str, which: str):
    like = like_of(api)
    weights = gx.port(module, like)
    path = (
        f"params/{which}"
        if api == "linen"
        else {"cell/hf/bias": "cell/dense_h/bias", "cell/ii/kernel": "cell/dense_i/kernel"}[which]
    )
    wrong = gx.replace(weights, path, lambda leaf: leaf + 0.05, expect=1)
    report = gx.check_parity(module, like if api == "linen" else wrong, FRAMES, wrong if api == "linen" else None)
    assert not report
    assert report.first is not None
    assert report.first.site_torch.path == "cell"


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_fault_before_the_cell_is_not_the_cell(module: Stepped, api: str):
    like = like_of(api)
    weights = gx.port(module, like)
    path = "params/inner/bias" if api == "linen" else "inner/bias"
    wrong = gx.replace(weights, path, lambda leaf: leaf + 0.05, expect=1)
    report = gx.check_parity(module, like if api == "linen" else wrong, FRAMES, wrong if api == "linen" else None)
    assert not report
    assert report.first is not None
    where = report.first.site_torch.path, report.where
    # Linen runs all frames at once through the projection: its calls cannot be compared, what arrives behind it can.
    assert where == (("inner", "out") if api == "nnx" else ("cell", "in"))


class Padded(nn.Module):
    """Pads the map itself, as `same` with a stride takes it: (B, 1, 16, 1) becomes (B, 1, 19, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, (4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 0, 1, 2)))


class PaddedInside(fn.Module):
    @fn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return fn.Conv(16, (4, 1), padding=((1, 2), (0, 0)), name="conv")(x)


def test_a_map_that_torch_pads_before_the_layer():
    torch.manual_seed(1)
    x = np.random.default_rng(1).normal(size=(5, 1, 16, 1)).astype(np.float32)
    report = gx.check_parity(Padded().eval(), PaddedInside(), x, layout="NCHW -> NHWC", out_layout="NCHW -> NHWC")
    assert report, str(report)


class Cancelling(nn.Module):
    """A wide layer whose terms cancel, so that float32 loses digits in it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4096, 8)
        self.head = nn.Linear(8, 2)
        with torch.no_grad():
            self.inner.weight[:, 2048:] = -self.inner.weight[:, :2048] * (1 + 1e-2 * torch.randn(8, 2048))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x))


class InPieces(nnx.Module):
    """Uses the weights of the wide layer without calling it, and sums in another order."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(4096, 8, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, out = self.inner.kernel[...], self.inner.bias[...]
        for part in range(0, 4096, 64):
            out = out + x[:, part : part + 64] @ kernel[part : part + 64]
        return self.head(out)


def test_a_layer_that_flax_never_calls_does_not_alarm_the_next_one():
    torch.manual_seed(0)
    x = np.tile(np.abs(np.random.default_rng(0).normal(size=(4, 2048))), 2).astype(np.float32) + 3
    module, model = Cancelling().eval(), InPieces(nnx.Rngs(0))
    report = gx.check_parity(module, gx.port(module, model), x)
    assert report, str(report)
