"""What the notes of the table claim, seen in the frameworks themselves."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from flax import linen as fn
from flax import nnx

from graftax.layers import connect
from graftax.ops import Offset, apply_chain, same_bits

from .cases import CASES
from .harness import carry, error_of, live, part, start, torch_arrays

BY_NAME = {case.name: case for case in CASES}
RNG = np.random.default_rng(0)


def test_a_boolean_mask_means_the_opposite():
    run = start(BY_NAME["attention 6 in 2"], "linen")
    flax = carry(run.connection, run.arrays)
    params: dict = {}
    for path, array in flax.items():
        _, module, leaf = path.split("/")
        params.setdefault(module, {})[leaf] = array
    attend = np.tril(np.ones((3, 3), bool))
    x = torch.from_numpy(run.x)
    with torch.no_grad():
        want = run.module(x, x, x, attn_mask=torch.from_numpy(~attend), need_weights=False)[0].numpy()
    found = [run.side.module.apply({"params": params}, run.x, run.x, run.x, mask=mask) for mask in (attend, ~attend)]
    assert np.abs(found[0] - want).max() < 1e-5
    assert np.abs(found[1] - want).max() > 0.1


@pytest.mark.parametrize("kind", ["layer", "group"])
def test_fast_variance_loses_precision_at_a_large_mean(kind):
    x = (RNG.standard_normal((4, 8)) + 1000).astype(np.float32)
    make = {"layer": torch.nn.LayerNorm(8), "group": torch.nn.GroupNorm(2, 8)}[kind]
    with torch.no_grad():
        want = make.double()(torch.from_numpy(x).double()).numpy()
    params = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    errors = []
    for fast in (True, False):
        settings = {"epsilon": 1e-5, "use_fast_variance": fast}
        module = fn.LayerNorm(**settings) if kind == "layer" else fn.GroupNorm(num_groups=2, **settings)
        errors.append(np.abs(np.asarray(module.apply({"params": params}, x)) - want).max())
    assert errors[0] > 20 * errors[1]
    assert errors[1] < 1e-3


def test_gelu_defaults_differ():
    x = RNG.standard_normal(100).astype(np.float32)
    want = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    assert np.abs(jax.nn.gelu(x, approximate=False) - want).max() < 1e-6
    assert np.abs(jax.nn.gelu(x) - want).max() > 1e-4


@pytest.mark.parametrize(("std", "survive"), [(1.0, 0.57), (0.3, 0.26), (0.1, 0.08), (0.02, 0.02)])
def test_zero_centred_scales_survive_by_their_size(std, survive):
    x = (RNG.standard_normal(20000) * std).astype(np.float32)
    there = apply_chain((Offset(1.0),), (x,))
    (back,) = apply_chain((Offset(1.0).inverse,), there)
    assert np.mean(back == x) == pytest.approx(survive, abs=0.02)
    around_one = (1 + x * 0.1).astype(np.float32)
    (again,) = apply_chain((Offset(-1.0), Offset(1.0)), (around_one,))
    assert same_bits(again, around_one) or std >= 1


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_spectral_norm_takes_one_more_step_in_evaluation(api):
    name = next(name for name in BY_NAME if name.startswith("spectral norm") and name.endswith(" linear"))
    run = start(BY_NAME[name], api)
    u = next(n for n in run.arrays if n.endswith("_u"))
    v = next(n for n in run.arrays if n.endswith("_v"))
    weight = next(n for n in run.arrays if n.endswith(("orig", "original")))
    arrays = dict(run.arrays)
    arrays[u] = np.float32([0, 1, 0])  # not converged: torch divides by u W v as they are, Flax steps once more
    arrays[v] = arrays[weight][1] / np.linalg.norm(arrays[weight][1])
    module = run.case.torch().eval()
    module.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    with torch.no_grad():
        want = module(torch.from_numpy(run.x)).numpy()
    found = run.side.run(carry(run.connection, arrays))
    assert np.abs(found - want).max() > 0.01 * np.abs(want).max()
    assert error_of(run, carry(run.connection, run.arrays)) < 5


def test_nnx_weight_norm_writes_back_and_hides_its_scales_when_abstract():
    make = lambda: nnx.WeightNorm(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))  # noqa: E731
    module = make()
    before = np.asarray(module.layer_instance.kernel.get_value())
    module(np.ones((1, 5), np.float32))
    assert not np.allclose(before, module.layer_instance.kernel.get_value())
    flat = [keys for keys, _ in nnx.to_flat_state(nnx.state(make()))]
    assert ("scales", ("kernel",)) in flat
    assert ("scales", ("kernel",)) not in [keys for keys, _ in nnx.to_flat_state(nnx.state(make(), nnx.Param))]
    assert ("scales", ("kernel",)) not in [keys for keys, _ in nnx.to_flat_state(nnx.state(nnx.eval_shape(make)))]


def test_g_of_a_transposed_convolution_is_per_input_channel():
    case = BY_NAME["weight norm, old, conv_transpose, kept"]
    assert torch_arrays(case.torch())["weight_g"].shape == (5, 1, 1, 1)  # (I, 1, 1, 1) of (I, O, kh, kw)


def test_same_is_not_padding_one_with_a_stride():
    conv = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
    flax = part("flax", {"kernel": np.empty((3, 3, 3, 4)), "bias": np.empty(4)}, {"kernel": "kernel", "bias": "bias"})
    arrays = torch_arrays(conv)
    (found,) = connect(part("torch", arrays, {name: name for name in arrays}, conv), flax)
    params = carry(found, arrays)
    x = RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        want = conv(torch.from_numpy(x)).numpy()
    error = {
        str(padding): np.abs(
            np.moveaxis(
                fn.Conv(4, (3, 3), strides=2, padding=padding).apply({"params": params}, x.transpose(0, 2, 3, 1)), -1, 1
            )
            - want
        ).max()
        for padding in (1, "SAME")
    }
    assert error["1"] < 1e-5
    assert error["SAME"] > 0.5


def test_adapters_settings_are_what_the_table_reads():
    assert live(fn.ConvTranspose(3, (2,), transpose_kernel=True)).settings["transpose_kernel"] is True
    assert live(nnx.ConvTranspose(2, 3, (2,), rngs=nnx.Rngs(0))).settings["transpose_kernel"] is False
    assert live(fn.Einsum((5, 2), "ab,bc->ac")).settings["einsum_str"] == "ab,bc->ac"
    assert live(nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=nnx.Rngs(0))).settings["axis"] == (-2, -1)
    assert live(torch.nn.ConvTranspose1d(4, 6, 2, groups=2)).settings["groups"] == 2
    assert live(nnx.WeightNorm(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))).settings["feature_axes"] == -1
