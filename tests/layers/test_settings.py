"""Settings that must agree: read from real modules, agreeing and not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flax import linen as fn
from flax import nnx
from torch import nn

from graftax.layers import settings_differ
from graftax.layers.conv_settings import flax_transposed_padding, halves

from .harness import live


def differences(torch_module, flax_module) -> dict[str, tuple]:
    return {d.setting.name: (d.want, d.have) for d in settings_differ(live(torch_module), live(flax_module))}


R = nnx.Rngs(0)
CONV = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
SAME_CONV = {"strides": (2, 1), "padding": [(1, 1), (2, 2)], "kernel_dilation": (1, 2)}


@pytest.mark.parametrize(
    ("torch_module", "flax_module"),
    [
        (nn.LayerNorm(5), fn.LayerNorm(epsilon=1e-5)),
        (nn.LayerNorm(5), nnx.LayerNorm(5, epsilon=1e-5, rngs=R)),
        (nn.RMSNorm(5), fn.RMSNorm(epsilon=float(np.finfo(np.float32).eps))),
        (nn.BatchNorm1d(5), fn.BatchNorm(momentum=0.9)),
        (nn.BatchNorm1d(5, momentum=0.3), nnx.BatchNorm(5, momentum=0.7, rngs=R)),
        (nn.GroupNorm(2, 6), fn.GroupNorm(num_groups=2, epsilon=1e-5)),
        (nn.GroupNorm(2, 6), nnx.GroupNorm(6, num_groups=None, group_size=3, epsilon=1e-5, rngs=R)),
        (nn.Conv2d(4, 6, (3, 2), **CONV), fn.Conv(6, (3, 2), **SAME_CONV)),
        (nn.Conv2d(4, 6, (3, 2), **CONV), nnx.Conv(4, 6, (3, 2), rngs=R, **SAME_CONV)),
        (nn.Conv2d(4, 6, 3, padding=1), fn.Conv(6, (3, 3))),  # SAME at stride 1 is padding 1 of a kernel of 3
        (nn.Conv2d(4, 6, 3, padding=1), fn.Conv(6, (3, 3), padding=1)),
        (nn.Conv2d(4, 6, 3), fn.Conv(6, (3, 3), padding="VALID")),
        (nn.Conv2d(4, 6, 4, padding="same"), fn.Conv(6, (4, 4))),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), fn.Conv(6, (3, 3), padding="CIRCULAR")),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), fn.Conv(6, (3, 3), padding="REFLECT")),
        (nn.Conv1d(4, 6, 3, groups=2), fn.Conv(6, (3,), padding="VALID", feature_group_count=2)),
        (
            nn.ConvTranspose2d(4, 6, (3, 4), stride=2, padding=(1, 2), output_padding=(1, 0), dilation=(2, 1)),
            fn.ConvTranspose(6, (3, 4), strides=(2, 2), padding=[(3, 4), (1, 1)], kernel_dilation=(2, 1)),
        ),
        (nn.RNN(5, 3), fn.SimpleCell(3)),
        (nn.RNNCell(5, 3, nonlinearity="relu"), fn.SimpleCell(3, activation_fn=fn.relu)),
        (nn.LSTMCell(5, 3), nnx.LSTMCell(5, 3, rngs=R)),
        (nn.MultiheadAttention(6, 2), nnx.MultiHeadAttention(2, 6, decode=False, rngs=R)),
        (nn.Embedding(7, 3), fn.Embed(7, 3)),
        (nn.Linear(5, 3), fn.Dense(3)),
        (nn.Linear(5, 3), fn.LayerNorm()),  # no pair of the table
        (nn.Sequential(), fn.Dense(3)),
    ],
)
def test_agree(torch_module, flax_module):
    assert differences(torch_module, flax_module) == {}


@pytest.mark.parametrize(
    ("torch_module", "flax_module", "want"),
    [
        (nn.LayerNorm(5), fn.LayerNorm(), {"epsilon": (1e-5, 1e-6)}),
        (nn.RMSNorm(5), nnx.RMSNorm(5, rngs=R), {"epsilon": (float(np.finfo(np.float32).eps), 1e-6)}),
        (nn.BatchNorm1d(5), fn.BatchNorm(), {"momentum": (0.9, 0.99)}),
        (nn.GroupNorm(2, 64), fn.GroupNorm(epsilon=1e-5), {"num_groups": (2, 32)}),
        (nn.Conv2d(4, 6, 3), fn.Conv(6, (3, 3)), {"padding": (((0, 0), (0, 0)), ((1, 1), (1, 1)))}),
        (
            nn.Conv2d(4, 6, 3, stride=2, padding=1), fn.Conv(6, (3, 3), strides=2),
            {"padding": (((1, 1), (1, 1)), "SAME")},
        ),
        (nn.Conv1d(4, 6, 3, stride=2), fn.Conv(6, (3,), padding="VALID"), {"strides": ((2,), (1,))}),
        (
            nn.Conv1d(4, 6, 3, dilation=2), nnx.Conv(4, 6, (3,), padding="VALID", rngs=R),
            {"kernel_dilation": ((2,), (1,))},
        ),
        (nn.Conv1d(4, 6, 3, groups=2), fn.Conv(6, (3,), padding="VALID"), {"feature_group_count": (2, 1)}),
        (nn.ConvTranspose1d(4, 6, 3), fn.ConvTranspose(6, (3,)), {"padding": (((2, 2),), ((1, 1),))}),
        (nn.RNN(5, 3, nonlinearity="relu"), fn.SimpleCell(3), {"activation": ("relu", "tanh")}),
        (nn.LSTM(5, 3), fn.OptimizedLSTMCell(4), {"hidden size": (3, 4)}),
        (nn.MultiheadAttention(6, 2), fn.MultiHeadDotProductAttention(3), {"num_heads": (2, 3)}),
    ],
)  # fmt: skip
def test_differ(torch_module, flax_module, want):
    found = differences(torch_module, flax_module)
    assert found.keys() == want.keys()
    for name, pair in want.items():
        assert found[name] == pytest.approx(pair) if name in ("epsilon", "momentum") else found[name] == pair


def test_modes_of_padding_without_a_name_in_flax_say_so():
    (found,) = settings_differ(
        live(nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular")), live(fn.Conv(6, (3, 3), padding="CIRCULAR"))
    )
    assert "pad by hand" in str(found.want)
    (found,) = settings_differ(
        live(nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate")), live(fn.Conv(6, (3, 3), padding=1))
    )
    assert "replicate" in str(found)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dilation", [1, 2])
def test_named_padding_is_the_pairs_that_the_comparison_takes_it_for(size, dilation):
    x = np.random.default_rng(size).standard_normal((1, 11, 2)).astype(np.float32)
    weight = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(0))
    kernel = weight.permute(2, 1, 0).numpy()
    (pair,) = halves((size,), (dilation,))
    for mode, flax_mode in (("constant", "SAME"), ("circular", "CIRCULAR"), ("reflect", "REFLECT")):
        padded = nn.functional.pad(torch.from_numpy(x).transpose(1, 2), pair, mode)
        want = nn.functional.conv1d(padded, weight, dilation=dilation).transpose(1, 2).numpy()
        module = fn.Conv(3, (size,), padding=flax_mode, kernel_dilation=dilation, use_bias=False)
        found = np.asarray(module.apply({"params": {"kernel": kernel}}, x))
        assert np.abs(found - want).max() < 1e-5, (mode, size)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("name", ["SAME", "VALID"])
def test_named_padding_of_a_transposed_convolution(size, stride, name):
    make = lambda padding: fn.ConvTranspose(  # noqa: E731
        3, (size,), strides=(stride,), padding=padding, kernel_dilation=(2,), use_bias=False
    )
    x = np.random.default_rng(size).standard_normal((1, 5, 2)).astype(np.float32)
    kernel = np.random.default_rng(stride).standard_normal((size, 2, 3)).astype(np.float32)
    pairs = flax_transposed_padding(live(make(name)).settings)
    out = [np.asarray(make(padding).apply({"params": {"kernel": kernel}}, x)) for padding in (name, list(pairs))]
    np.testing.assert_array_equal(*out)
