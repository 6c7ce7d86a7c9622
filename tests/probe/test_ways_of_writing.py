"""One layer, written in two ways: what torch does at once Flax does in parts, or the other way round. All widths are
equal, so that shapes tell nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import linen as fn
from torch import nn

import graftax as gx
from graftax.probe.search import PASSES

from .pairs import Pair, State, flat, redrawn, same

WIDTH = 4


class Cropped(nn.Module):
    """A causal convolution: padded on both sides, then cropped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(WIDTH, WIDTH, 3, padding=2), nn.Conv1d(WIDTH, WIDTH, 3, padding=2)

    def forward(self, x: Any) -> Any:
        return self.out(F.silu(self.conv(x)[..., : x.shape[-1]]))[..., : x.shape[-1]].transpose(1, 2)


class FlaxCausal(fn.Module):
    @fn.compact
    def __call__(self, x: Any) -> Any:
        x = fn.silu(fn.Conv(WIDTH, (3,), padding="CAUSAL")(x))
        return fn.Conv(WIDTH, (3,), padding="CAUSAL")(x)


def _causal(sd: State) -> dict[str, np.ndarray]:
    names = (("conv", "Conv_0"), ("out", "Conv_1"))
    return {f"params/{f}/kernel": sd[f"{t}.weight"].transpose(2, 1, 0) for t, f in names} | {
        f"params/{f}/bias": sd[f"{t}.bias"] for t, f in names
    }


class JoinedCell(nn.Module):
    """A recurrent cell with one matrix for cat[x, h]; its gates are split."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(2 * WIDTH, 2 * WIDTH)

    def forward(self, x: Any) -> Any:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            z, n = self.gates(torch.cat([x[:, t], h], -1)).chunk(2, -1)
            h = torch.tanh(n) + torch.sigmoid(z) * h
        return h


class FlaxCell(fn.Module):
    @fn.compact
    def __call__(self, x: Any) -> Any:
        h = jnp.zeros_like(x[:, 0])
        given, before = fn.Dense(2 * WIDTH, name="given"), fn.Dense(2 * WIDTH, use_bias=False, name="before")
        for t in range(x.shape[1]):
            z, n = jnp.split(given(x[:, t]) + before(h), 2, -1)
            h = fn.tanh(n) + fn.sigmoid(z) * h
        return h


def _cell(sd: State) -> dict[str, np.ndarray]:
    kernel = sd["gates.weight"].T
    return {
        "params/given/kernel": kernel[:WIDTH],
        "params/before/kernel": kernel[WIDTH:],
        "params/given/bias": sd["gates.bias"],
    }


class TwoBiases(nn.Module):
    """The same cell with a matrix and a bias each for x and h."""

    def __init__(self) -> None:
        super().__init__()
        self.x2h, self.h2h = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Any) -> Any:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            z, n = (self.x2h(x[:, t]) + self.h2h(h)).chunk(2, -1)
            h = torch.tanh(n) + torch.sigmoid(z) * h
        return h


def _summed(sd: State) -> dict[str, np.ndarray]:
    return {
        "params/given/kernel": sd["x2h.weight"].T,
        "params/before/kernel": sd["h2h.weight"].T,
        "params/given/bias": sd["x2h.bias"] + sd["h2h.bias"],
    }


class HeadByHead(nn.Module):
    """Graph attention, a head at a time: scores from the two halves of one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))
        self.a = nn.ParameterList(nn.Parameter(torch.randn(2 * WIDTH, 1)) for _ in range(2))

    def forward(self, x: Any) -> Any:
        out: list[Any] = []
        for w, a in zip(self.w, self.a, strict=True):
            z = x @ w
            out.append(torch.tanh(torch.softmax(torch.tanh(z @ a[:WIDTH] + (z @ a[WIDTH:]).T), 1) @ z))
        return torch.stack(out, 1)


class FlaxHeads(fn.Module):
    @fn.compact
    def __call__(self, x: Any) -> Any:
        init = fn.initializers.normal(1.0)
        z = jnp.einsum("nd,hdf->nhf", x, self.param("w", init, (2, WIDTH, WIDTH)))
        a, b = ((z * self.param(name, init, (2, WIDTH))).sum(-1) for name in ("from", "to"))
        return fn.tanh(jnp.einsum("nmh,mhf->nhf", fn.softmax(fn.tanh(a[:, None] + b[None]), 1), z))


def _heads(sd: State) -> dict[str, np.ndarray]:
    a = np.stack([sd[f"a.{h}"][:, 0] for h in range(2)])
    return {
        "params/w": np.stack([sd[f"w.{h}"] for h in range(2)]),
        "params/from": a[:, :WIDTH],
        "params/to": a[:, WIDTH:],
    }


class Latents(nn.Module):
    """Latents that are normed and projected before they meet any data."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.norm, self.q, self.k = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        z = self.norm(self.latents.expand(len(x), -1, -1))
        return torch.softmax(self.q(z) @ self.k(x).transpose(1, 2), -1) @ x


class FlaxLatents(fn.Module):
    @fn.compact
    def __call__(self, x: Any) -> Any:
        z = self.param("z", fn.initializers.normal(1.0), (WIDTH, WIDTH))
        z = fn.LayerNorm(epsilon=1e-5)(jnp.broadcast_to(z, (len(x), WIDTH, WIDTH)))
        return fn.softmax(fn.Dense(WIDTH)(z) @ fn.Dense(WIDTH)(x).swapaxes(1, 2)) @ x


def _latents(sd: State) -> dict[str, np.ndarray]:
    out = {"params/z": sd["latents"], "params/LayerNorm_0/scale": sd["norm.weight"]}
    out["params/LayerNorm_0/bias"] = sd["norm.bias"]
    for t, f in (("q", "Dense_0"), ("k", "Dense_1")):
        out |= {f"params/{f}/kernel": sd[f"{t}.weight"].T, f"params/{f}/bias": sd[f"{t}.bias"]}
    return out


class Padded(nn.Module):
    """A convolution of a padded map, which another layer takes joined."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.join = nn.Conv2d(WIDTH, WIDTH, 3, 2), nn.Conv2d(2 * WIDTH, WIDTH, 1)

    def forward(self, x: Any) -> Any:
        up = F.interpolate(self.down(F.pad(x, (0, 1, 0, 1))), scale_factor=2.0, mode="nearest")
        return self.join(torch.cat([up, x], 1)).permute(0, 2, 3, 1)


class FlaxPadded(fn.Module):
    @fn.compact
    def __call__(self, x: Any) -> Any:
        low = fn.Conv(WIDTH, (3, 3), 2, padding=((0, 1), (0, 1)))(x)
        return fn.Conv(WIDTH, (1, 1))(jnp.concatenate([low.repeat(2, 1).repeat(2, 2), x], -1))


def _padded(sd: State) -> dict[str, np.ndarray]:
    names = (("down", "Conv_0"), ("join", "Conv_1"))
    return {f"params/{f}/kernel": sd[f"{t}.weight"].transpose(2, 3, 1, 0) for t, f in names} | {
        f"params/{f}/bias": sd[f"{t}.bias"] for t, f in names
    }


def _noise(*shape: int) -> Callable[[], tuple[np.ndarray, ...]]:
    return lambda: (np.random.default_rng(0).standard_normal(shape).astype(np.float32),)


SEQUENCE = np.zeros((1, 5, WIDTH), np.float32)
WAYS = (
    Pair("cropped", Cropped, lambda: (FlaxCausal(), (SEQUENCE,)), _noise(2, WIDTH, 5), _causal,
         fx=lambda x: (x.transpose(0, 2, 1),)),
    Pair("joined", JoinedCell, lambda: (FlaxCell(), (SEQUENCE,)), _noise(3, 3, WIDTH), _cell),
    Pair("two biases", TwoBiases, lambda: (FlaxCell(), (SEQUENCE,)), _noise(3, 3, WIDTH), _summed),
    Pair("head by head", HeadByHead, lambda: (FlaxHeads(), (SEQUENCE[0],)), _noise(5, WIDTH), _heads),
    Pair("latents", Latents, lambda: (FlaxLatents(), (SEQUENCE,)), _noise(2, 5, WIDTH), _latents),
    Pair("padded", Padded, lambda: (FlaxPadded(), (np.zeros((1, 4, 4, WIDTH), np.float32),)),
         _noise(2, WIDTH, 4, 4), _padded, fx=lambda x: (x.transpose(0, 2, 3, 1),)),
)  # fmt: skip


@pytest.mark.parametrize("pair", WAYS, ids=lambda pair: pair.name)
def test_one_layer_written_in_two_ways(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Already the strictest pass finds the map: each leaf where its value first meets data."""
    monkeypatch.setattr("graftax.probe.search.PASSES", PASSES[:1])
    module = redrawn(pair.torch_model())
    plan = gx.plan(module, pair.like(), inputs=pair.call())
    assert plan.proof is not None
    got = flat(plan.run(module))
    assert all(same(got[path], value) for path, value in pair.true_map(pair.state(module)).items())


class Shuffled(nn.Module):
    """Channels (c r r) become a map that is r times as high and wide."""

    def __init__(self, width: int, r: int) -> None:
        super().__init__()
        self.r, self.body, self.out = r, nn.Conv2d(3, width * r * r, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Any) -> Any:
        return self.out(F.pixel_shuffle(self.body(x), self.r))


class FlaxShuffled(fn.Module):
    width: int
    r: int

    @fn.compact
    def __call__(self, x: Any) -> Any:
        r, c = self.r, self.width
        y = fn.Conv(c * r * r, (3, 3), padding=1, name="body")(x)
        b, h, w, _ = y.shape
        y = y.reshape(b, h, w, r, r, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * r, w * r, c)
        return fn.Conv(3, (3, 3), padding=1, name="out")(y)


@pytest.mark.parametrize(("width", "r"), [(3, 2), (5, 2), (2, 3)])
def test_channels_that_become_a_larger_map_are_in_another_order(width: int, r: int) -> None:
    net, model = Shuffled(width, r), FlaxShuffled(width, r)
    x = np.random.default_rng(0).standard_normal((1, 4, 5, 3)).astype("float32")
    made = gx.plan(net, gx.linen(model, jnp.asarray(x))).run(net)
    order = np.arange(width * r * r).reshape(width, r * r).T.ravel()
    body = net.body.weight.detach().numpy().transpose(2, 3, 1, 0)[..., order]
    assert np.array_equal(made["params"]["body"]["kernel"], body)
    assert np.array_equal(made["params"]["body"]["bias"], net.body.bias.detach().numpy()[order])
