"""Torch Modules and state_dicts as checkpoints, and back."""

from __future__ import annotations

from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graftax import adapters
from graftax.adapters.torch_arrays import torch_dtypes
from graftax.errors import FormatError, PlanError, UsageError
from graftax.execute import opening
from graftax.tree import TensorSpec


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits of a dtype, NaN payloads included."""
    dtype = torch_dtypes()[name]
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    size = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
    bits = np.random.default_rng(0).integers(0, 2 if name == "bool" else 256, size, np.uint8)
    return torch.from_numpy(bits).view(dtype).reshape(shape)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, (5, 3), stride=2, padding=(2, 1), groups=3, bias=False)
        self.bn = nn.BatchNorm2d(6, eps=1e-3, momentum=0.2)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.register_buffer("table", torch.arange(4), persistent=True)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_module_shows_specs_kinds_settings_and_leaves():
    checkpoint = opening.open_tree(Net())
    assert checkpoint.side == "torch"
    assert list(checkpoint) == list(Net().state_dict())
    assert checkpoint["conv.weight"] == TensorSpec((6, 1, 5, 3), "float32")
    assert checkpoint["bn.num_batches_tracked"] == TensorSpec((), "int64")
    assert checkpoint.live.buffers == {"table", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    conv = checkpoint.live.modules["conv"]
    assert conv.kind == "Conv2d"
    assert "torch.nn.modules.conv._ConvNd" in conv.bases
    assert conv.settings["kernel_size"] == (5, 3)
    assert conv.settings["groups"] == 3
    assert conv.settings["padding"] == (2, 1)
    assert conv.settings["padding_mode"] == "zeros"
    assert conv.settings["bias"] is False
    assert conv.leaves == {"weight": "conv.weight"}
    bn = checkpoint.live.modules["bn"]
    assert (bn.settings["eps"], bn.settings["momentum"], bn.settings["affine"]) == (1e-3, 0.2, True)
    assert set(bn.leaves) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert checkpoint.live.modules["blocks"].leaves["1.bias"] == "blocks.1.bias"
    assert checkpoint.live.modules[""].leaves["blocks.1.bias"] == "blocks.1.bias"
    assert list(checkpoint.live.modules) == ["", "conv", "bn", "blocks", "blocks.0", "blocks.1"]


def test_settings_of_attention_and_recurrent_modules():
    attention = opening.open_tree(nn.MultiheadAttention(8, 2, bias=False, kdim=6, batch_first=True)).live.modules[""]
    assert attention.settings["num_heads"] == 2
    assert attention.settings["batch_first"] is True
    assert attention.settings["in_proj_weight"] is False
    assert attention.settings["k_proj_weight"] is True
    assert attention.settings["in_proj_bias"] is False
    assert not attention.settings["bias_k"]
    lstm = opening.open_tree(nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)).live.modules[""]
    for key, value in {"num_layers": 2, "bidirectional": True, "proj_size": 2, "bias": True, "mode": "LSTM"}.items():
        assert lstm.settings[key] == value


def test_meta_module_has_specs_and_no_values():
    with torch.device("meta"):
        module = nn.Linear(10**6, 10**6)
    checkpoint = opening.open_tree(module)
    assert checkpoint["weight"].size == 10**12
    assert not checkpoint.has_values
    with pytest.raises(PlanError, match="no values"):
        checkpoint.read("weight")


def test_meta_module_rebuilds_on_the_cpu():
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    out = opening.open_tree(module).live.rebuild(
        {"weight": np.ones((3, 2), np.float32), "bias": np.zeros(3, np.float32)}
    )
    assert out["weight"].device.type == "cpu"
    assert torch.equal(out["weight"], torch.ones(3, 2))


@pytest.mark.parametrize("name", sorted(torch_dtypes()))
@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (1, 5, 1)])
def test_every_dtype_goes_to_numpy_and_back_bit_for_bit(name, shape):
    tensor = random_tensor(name, shape)
    checkpoint = opening.open_tree({"a.b": tensor})
    array = checkpoint.read("a.b")
    assert checkpoint["a.b"] == TensorSpec(shape, name)
    assert array.dtype.name == name
    assert array.shape == shape
    assert array.tobytes() == raw(tensor)
    assert not array.flags.writeable
    back = checkpoint.live.rebuild({"a.b": array})["a.b"]
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert raw(back) == raw(tensor)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e5m2", "int64", "bool"])
def test_strided_tensors_are_read_in_their_own_order(name):
    base = random_tensor(name, (4, 6))
    for view in (base.t(), base[1::2, ::3], base[:, 2], base[2, 3]):
        array = opening.open_tree({"a.b": view}).read("a.b")
        assert array.tobytes() == raw(view.clone())
        assert array.shape == tuple(view.shape)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(sorted(torch_dtypes())), st.randoms())
def test_any_permutation_of_any_shape_survives(shape, name, random):
    tensor = random_tensor(name, tuple(shape))
    order = list(range(len(shape)))
    random.shuffle(order)
    view = tensor.permute(order)
    checkpoint = opening.open_tree({"x.y": view})
    back = checkpoint.live.rebuild({"x.y": checkpoint.read("x.y")})["x.y"]
    assert back.is_contiguous()
    assert raw(back) == raw(view)


def test_conjugate_and_negative_views_are_resolved():
    z = torch.tensor([1 + 2j, 3 - 1j])
    checkpoint = opening.open_tree({"a.c": z.conj(), "a.n": torch._neg_view(torch.tensor([1.0, -2.0]))})
    assert checkpoint.read("a.c").tolist() == [1 - 2j, 3 + 1j]
    assert checkpoint.read("a.n").tolist() == [-1.0, 2.0]


def test_gradients_do_not_stand_in_the_way():
    weight = nn.Parameter(torch.ones(2, 2))
    assert opening.open_tree({"fc.weight": weight * 2}).read("fc.weight").tolist() == [[2, 2], [2, 2]]


def test_rebuild_owns_its_memory_and_needs_no_gradient():
    module = Net()
    checkpoint = opening.open_tree(module)
    before = {key: raw(value) for key, value in module.state_dict().items()}
    out = checkpoint.live.rebuild({key: checkpoint.read(key) for key in checkpoint})
    assert type(out) is OrderedDict
    assert list(out) == list(module.state_dict())
    for tensor in out.values():
        assert not tensor.requires_grad
        tensor.zero_()
    assert {key: raw(value) for key, value in module.state_dict().items()} == before


def test_rebuild_never_shares_memory_with_what_others_hold():
    checkpoint = opening.open_tree({"a.x": torch.zeros(3), "a.y": torch.zeros(3)})
    whole = np.arange(6, dtype=np.float32)
    out = checkpoint.live.rebuild({"a.x": whole[:3], "a.y": whole[3:]})
    whole[:] = -1
    assert out["a.x"].tolist() == [0, 1, 2]
    mine = np.ones(3, np.float32)
    out = checkpoint.live.rebuild({"a.x": mine, "a.y": mine})
    mine[:] = 0
    assert out["a.x"].tolist() == [1, 1, 1]


def test_arrays_that_are_given_away_are_used_once():
    checkpoint = opening.open_tree({"a.x": torch.zeros(3), "a.y": torch.zeros(3), "a.z": torch.zeros(3)})
    mine, whole = np.ones(3, np.float32), np.ones(6, np.float32)
    out = checkpoint.live.rebuild({"a.x": mine, "a.y": mine, "a.z": whole[:3]}, adopt=True)
    out["a.x"].zero_()
    assert not mine.any()
    assert out["a.y"].tolist() == [1, 1, 1]
    out["a.z"].zero_()
    assert whole.all()


def test_tied_weights_are_aliases_and_stay_one_tensor():
    for device in ("meta", "cpu"):
        with torch.device(device):
            module = nn.Module()
            module.embed = nn.Embedding(5, 4)
            module.head = nn.Linear(4, 5, bias=False)
            module.other = nn.Linear(4, 5, bias=False)
        module.head.weight = module.embed.weight
        for thing in (module, module.state_dict()):
            checkpoint = opening.open_tree(thing)
            assert checkpoint.storage.aliases == {"head.weight": "embed.weight"}
            assert set(checkpoint) == {"embed.weight", "head.weight", "other.weight"}
    table = np.ones((5, 4), np.float32)
    out = checkpoint.live.rebuild({"embed.weight": table, "head.weight": table.copy()})
    assert out["head.weight"] is out["embed.weight"]
    out = checkpoint.live.rebuild({"embed.weight": table, "head.weight": table * 2})
    assert out["head.weight"].sum() == 40


def test_views_that_only_overlap_and_empty_tensors_are_no_aliases():
    base = torch.arange(6.0).reshape(2, 3)
    state = {"a.x": base, "a.t": base.t(), "a.row": base[0], "a.e": torch.empty(0), "a.f": torch.empty(0)}
    assert opening.open_tree(state).storage.aliases == {}


def test_parametrizations_and_old_weight_norm_keep_their_leaf_names():
    new = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    shown = opening.open_tree(new).live.modules[""]
    assert shown.kind == "Linear"
    assert set(shown.leaves) == {
        "bias", "parametrizations.weight.original0", "parametrizations.weight.original1",
    }  # fmt: skip
    assert shown.settings["weight"] is True
    old = torch.nn.utils.weight_norm(nn.Linear(3, 4))
    assert set(opening.open_tree(old).live.modules[""].leaves) == {"bias", "weight_g", "weight_v"}
    spectral = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    assert "parametrizations.weight.0._u" in opening.open_tree(spectral).live.modules[""].leaves


def test_wrappers_keep_their_prefixes():
    compiled = torch.compile(nn.Linear(2, 3))
    checkpoint = opening.open_tree(compiled)
    assert set(checkpoint) == {"_orig_mod.weight", "_orig_mod.bias"}
    assert checkpoint.live.modules["_orig_mod"].kind == "Linear"
    assert set(opening.open_tree(nn.DataParallel(nn.Linear(2, 3)))) == {"module.weight", "module.bias"}


def test_scripted_modules_open():
    checkpoint = opening.open_tree(torch.jit.script(nn.Linear(2, 3)))
    assert set(checkpoint) == {"weight", "bias"}
    assert checkpoint.live.modules[""].kind == "Linear"


def test_lazy_quantized_and_sparse_tensors_are_refused_by_key():
    with pytest.raises(FormatError, match=r"weight.*run the module once"):
        opening.open_tree(nn.LazyLinear(3))
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    with pytest.raises(PlanError, match="quantized"):
        opening.open_tree({"fc.weight": quantized, "fc.bias": torch.ones(2)})
    with pytest.raises(FormatError, match="sparse"):
        opening.open_tree({"fc.weight": torch.eye(3).to_sparse()})


def test_config_of_a_module_is_its_evidence():
    module = nn.Linear(2, 2)
    module.config = type("Config", (), {"to_dict": lambda self: {"num_heads": 3}})()
    assert opening.open_tree(module).config == {"num_heads": 3}
    assert opening.open_tree(nn.Linear(2, 2)).config is None


# ---------------------------------------------------------------- state_dicts and what they lie in


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model", "anything"])
def test_the_container_of_weights_is_found(name):
    module = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tree = {name: module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "rng": torch.get_rng_state()}
    checkpoint = opening.open_tree(tree)
    assert set(checkpoint) == {"weight", "bias"}
    assert checkpoint.label.endswith(f"::{name}")


def test_several_containers_are_named_and_not_chosen():
    one = nn.Linear(2, 3).state_dict()
    with pytest.raises(PlanError, match="2 containers") as caught:
        opening.open_tree({"model": one, "model_ema": nn.Linear(2, 3).state_dict()})
    assert [failure.key for failure in caught.value.failures] == ["model", "model_ema"]
    assert "Pass one of them" in str(caught.value)


def test_live_and_filed_containers_are_chosen_alike(tmp_path):
    inner = nn.Linear(2, 3).state_dict()
    for i, tree in enumerate(
        [{"state_dict": inner}, {"encoder": inner, "decoder": dict(inner)}, {"a": {"model": inner}}]
    ):
        path = tmp_path / f"{i}.pt"
        torch.save(tree, path)
        assert dict(opening.open_tree(tree)) == dict(opening.open_tree(path))


@pytest.mark.parametrize(
    "extra",
    [
        {"upscaler": {"w": torch.ones(5, 3)}},
        {"optimizer_head": {"w": torch.ones(5, 3)}},
        {"logit_scale": torch.tensor(2.5)},
        {"logit_scale": torch.ones(1, 1)},
        {"heads": [torch.ones(2)]},
        {"epoch": torch.tensor(3), "note": 2.5},
        {"optimizers": [{"state": {0: {"m": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}], "epoch": 3},
    ],
)
@pytest.mark.parametrize("name", ["model", "generator"])
def test_nothing_beside_a_container_is_dropped_unsaid(tmp_path, name, extra):
    tree = {name: nn.Linear(2, 3).state_dict(), **extra}
    torch.save(tree, tmp_path / "x.pt")
    if name == "model" and isinstance(next(iter(extra.values())), dict):
        for form in (tree, tmp_path / "x.pt"):
            with pytest.raises(PlanError) as caught:
                opening.open_tree(form)
            assert [failure.key.rpartition("::")[2] for failure in caught.value.failures] == [name, *extra]
        return
    filed = opening.open_tree(tmp_path / "x.pt")
    live = opening.open_tree(tree)
    assert dict(live) == dict(filed)
    assert dict(live.storage.metadata) == dict(filed.storage.metadata)
    said = {key.partition(".")[0] for key in live} | set(live.storage.metadata)
    assert said >= set(extra)


def test_a_number_in_a_state_dict_is_listed():
    checkpoint = opening.open_tree({**nn.Linear(2, 3).state_dict(), "alpha": 3.0})
    assert dict(checkpoint.storage.metadata) == {"alpha": "float 3.0"}


def test_tensors_beside_other_arrays_are_refused():
    with pytest.raises(UsageError, match="mixes torch tensors with other arrays"):
        opening.open_tree({"fc.weight": torch.ones(2, 2), "fc.bias": np.ones(2)})


# ---------------------------------------------------------------- assign and map


def test_assign_writes_into_the_same_parameters():
    module = Net()
    held = dict(module.named_parameters())
    checkpoint = opening.open_tree(module)
    new = {key: (np.ones(spec.shape) * 3).astype(spec.dtype) for key, spec in checkpoint.items()}
    adapters.assign(module, new)
    assert dict(module.named_parameters()) == held
    assert all(module.get_parameter(name) is parameter for name, parameter in held.items())
    assert all(bool((value == 3).all()) for value in module.state_dict().values())
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(
    ("key", "array", "words"),
    [
        ("conv.weight", np.ones((6, 1, 3, 5), np.float32), r"float32\[6,1,5,3\]"),
        ("conv.weight", np.ones((6, 1, 5, 3), np.float64), "float64"),
        ("conv.weigth", np.ones((6, 1, 5, 3), np.float32), "Near: .*conv.weight"),
    ],
)
def test_assign_checks_everything_first(key, array, words):
    module = Net()
    before = {name: raw(value) for name, value in module.state_dict().items()}
    with pytest.raises(PlanError, match=words):
        adapters.assign(module, {"blocks.0.bias": np.ones(6, np.float32), key: array})
    assert {name: raw(value) for name, value in module.state_dict().items()} == before


def test_assign_refuses_what_cannot_be_written():
    with pytest.raises(UsageError, match="to_empty"):
        adapters.assign(nn.Linear(2, 3, device="meta"), {"bias": np.ones(3, np.float32)})
    module = nn.Module()
    module.register_buffer("b", torch.zeros(1).expand(3))
    with pytest.raises(UsageError, match="expanded"):
        adapters.assign(module, {"b": np.ones(3, np.float32)})
    with torch.inference_mode():
        frozen = nn.Linear(2, 3)
    with pytest.raises(UsageError, match="inference_mode"):
        adapters.assign(frozen, {"bias": np.ones(3, np.float32)})


def test_assign_refuses_two_values_for_tied_weights():
    module = nn.Module()
    module.a, module.b = nn.Linear(2, 2), nn.Linear(2, 2)
    module.b.weight = module.a.weight
    one = np.ones((2, 2), np.float32)
    with pytest.raises(PlanError, match="two values"):
        adapters.assign(module, {"a.weight": one, "b.weight": one * 2})
    adapters.assign(module, {"a.weight": one, "b.weight": one.copy()})
    assert module.b.weight.sum() == 4


def test_assign_finishes_before_an_interrupt(monkeypatch):
    module = nn.Linear(2, 3)
    real, calls = torch.Tensor.copy_, []

    def copy_(self, other):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(self, other)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    with pytest.raises(KeyboardInterrupt):
        adapters.assign(module, {"weight": np.ones((3, 2), np.float32), "bias": np.ones(3, np.float32)})
    assert module.weight.sum() == 6
    assert module.bias.sum() == 3


def test_map_keeps_type_metadata_order_and_every_other_object():
    state = Net().state_dict()
    new = adapters.map_leaves(state, {"bn.weight": np.full(6, 2, np.float32)})
    assert type(new) is OrderedDict
    assert new._metadata == state._metadata
    assert list(new) == list(state)
    assert [key for key in state if new[key] is not state[key]] == ["bn.weight"]
    assert new["bn.weight"].tolist() == [2] * 6
    assert state["bn.weight"].tolist() == [1] * 6


def test_map_reaches_into_containers_and_keeps_parameters():
    tree = {
        "epoch": 3,
        "model": {"fc.weight": nn.Parameter(torch.ones(2, 2)), "fc.bias": torch.ones(2)},
        "opt": {"a": 1},
    }
    new = adapters.map_leaves(tree, {"fc.weight": np.zeros((2, 2), np.float32)})
    assert list(new) == ["epoch", "model", "opt"]
    assert isinstance(new["model"]["fc.weight"], nn.Parameter)
    assert new["model"]["fc.bias"] is tree["model"]["fc.bias"]
    assert new["opt"] is tree["opt"]
    assert tree["model"]["fc.weight"].sum() == 4


def test_map_of_a_module_gives_a_state_dict_and_leaves_it_alone():
    module = nn.Linear(2, 3)
    before = raw(module.weight)
    new = adapters.map_leaves(module, {"weight": np.zeros((3, 2), np.float32)})
    assert type(new) is OrderedDict
    assert new["weight"].sum() == 0
    assert raw(module.weight) == before


def test_map_copies_what_it_is_given():
    array = np.ones((3, 2), np.float32)
    new = adapters.map_leaves(nn.Linear(2, 3), {"weight": array})
    array[:] = 7
    assert new["weight"].sum() == 6


def test_live_leaves_are_the_objects_themselves():
    state = nn.Linear(2, 3).state_dict()
    assert adapters.live_leaves(state)["weight"] is state["weight"]


def test_bf16_stays_bf16_through_to_torch():
    array = np.array([1.0, 3.140625, -0.0], ml_dtypes.bfloat16)
    tensor = adapters.to_torch(array)
    assert tensor.dtype == torch.bfloat16
    assert raw(tensor) == array.tobytes()


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no four-bit floats")
def test_four_bit_floats_travel_as_their_bytes():
    tensor = torch.arange(6, dtype=torch.uint8).reshape(2, 3).view(torch.float4_e2m1fn_x2)
    checkpoint = opening.open_tree({"a.w": tensor})
    assert checkpoint["a.w"] == TensorSpec((2, 6), "float4_e2m1fn")
    array = checkpoint.read("a.w")
    assert array.tolist() == list(range(6))
    back = checkpoint.live.rebuild({"a.w": array})["a.w"]
    assert back.dtype == tensor.dtype
    assert back.view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()
