"""graftax.formats.torch_pt: every file is read as torch.load(weights_only=True) reads it, hostile ones are refused, and
what is written comes back bit for bit."""

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import hashlib
import io
import operator
import os
import pathlib
import pickle
import runpy
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftax.errors import FormatError, PlanError, StorageError, UnsafeInputError
from graftax.formats import torch_pt
from graftax.formats.base import Output
from graftax.formats.table import FORMATS
from graftax.tree.dtypes import numpy_dtype, spec_of

HELD = sorted(FORMATS["torch"].holds)
PARAMS = "torch._utils\n_rebuild_tensor_v2\n"


def raw(tensor):
    """The values of a torch tensor as bytes, in C order."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    whole = torch.empty(plain.shape, dtype=plain.dtype).copy_(plain).reshape(-1)
    return whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b""


def every_bit_pattern(name, count=300):
    """An array of random bytes as dtype `name`: NaN payloads, -0.0 and subnormals are among them."""
    dtype = numpy_dtype(name)
    data = np.random.default_rng(0).integers(0, 256, count * dtype.itemsize, np.uint8)
    return (data % 2).view(bool) if name == "bool" else data.view(dtype)


def to_torch(array):
    if not array.size:
        return torch.empty(array.shape, dtype=getattr(torch, array.dtype.name))
    flat = torch.from_numpy(np.array(array, copy=True).reshape(-1).view(np.uint8))
    return flat.view(getattr(torch, array.dtype.name)).reshape(array.shape)


def save(path, obj, **kwargs):
    with open(path, "wb") as file:
        torch.save(obj, file, **kwargs)
    return path


def check_same(path, expected, legacy_aliases=None):
    """The file gives the tensors of `expected`, in order, bit for bit."""
    got = torch_pt.open(path)
    assert list(got) == list(expected)
    for key, tensor in expected.items():
        assert got[key].shape == tuple(tensor.shape)
        assert got[key].dtype == str(tensor.dtype).removeprefix("torch.")
        array = got.read(key)
        assert array.flags.c_contiguous
        assert spec_of(array) == got[key]
        assert array.tobytes() == raw(tensor), key
    return got


def rezip(path, change, out=None, method=zipfile.ZIP_STORED):
    """The archive with members changed: `change(name, data)` gives the new data, or None to leave it out."""
    with zipfile.ZipFile(path) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(out or path, "w", method) as new:
        for name, data in members:
            data = change(name, data)
            if data is not None:
                new.writestr(name, data)
    return out or path


def change_pickle(path, change, out=None):
    return rezip(path, lambda name, data: change(data) if name.endswith("data.pkl") else data, out)


# ---------------------------------------------------------------- reading, against torch


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", HELD)
def test_every_dtype(tmp_path, name, legacy):
    tensors = OrderedDict(
        a=to_torch(every_bit_pattern(name).reshape(4, 75)),
        scalar=to_torch(every_bit_pattern(name, 1).reshape(())),
        empty=to_torch(every_bit_pattern(name, 0).reshape(0, 3)),
    )
    path = save(tmp_path / "x.pt", tensors, _use_new_zipfile_serialization=not legacy)
    if not (legacy and ("float8" in name or name in ("uint16", "uint32", "uint64"))):
        check_same(path, torch.load(path, weights_only=True))
    got = check_same(path, tensors)  # torch 2.13 cannot load the legacy files of these dtypes that it writes
    assert got.side == "torch"
    assert got.storage.format == "torch"


@pytest.mark.parametrize("legacy", [False, True])
def test_views_aliases_parameters(tmp_path, legacy):
    base = torch.arange(240.0)
    weight = torch.nn.Parameter(torch.randn(3, 5))
    weight.tag = "state beside the data"
    attribute = torch.ones(3)
    attribute.tag = 1
    tensors = OrderedDict(
        transposed=base.reshape(12, 20).t(),
        strided=base[7:200:3],
        sliced=base.reshape(4, 5, 12)[1:3, ::2, 5:6],
        expanded=base[3].expand(4, 2),
        tied=weight,
        again=weight,
        channels_last=torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        attribute=attribute,
        buffer=torch.nn.Buffer(torch.zeros(2)),
        int64=torch.tensor([2**40, -(2**62), 2**63 - 1]),
        one=torch.randn(1, 7)[:, ::7],
        same_start=base[:0],
        conj=torch.view_as_complex(torch.randn(5, 2)).conj(),
        neg=torch.view_as_complex(torch.randn(5, 2)).conj().imag,
    )
    path = save(tmp_path / "x.pt", tensors, _use_new_zipfile_serialization=not legacy)
    got = check_same(path, torch.load(path, weights_only=True))
    assert got.storage.aliases == {"again": "tied"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path, protocol):
    tensors = {"a.weight": torch.randn(3), "b": torch.ones(2, dtype=torch.int8)}
    check_same(save(tmp_path / "x.pt", tensors, pickle_protocol=protocol), tensors)


def test_module_state_dict_with_extra_state(tmp_path):
    class Extra(torch.nn.Linear):
        def get_extra_state(self):
            return {"version": 3}

    model = torch.nn.Sequential(Extra(3, 4), torch.nn.BatchNorm1d(4))
    path = save(tmp_path / "x.bin", model.state_dict())
    got = torch_pt.open(path)
    assert list(got) == [key for key in model.state_dict() if not key.endswith("_extra_state")]
    assert got.storage.metadata == {"0._extra_state": "mapping of 1"}


def test_big_endian(tmp_path):
    path = save(tmp_path / "x.pt", {"a": torch.tensor([1.0, -2.5]), "c": torch.tensor([1 + 2j]), "b": torch.ones(3)})
    expected = {key: raw(tensor) for key, tensor in torch.load(path, weights_only=True).items()}
    swap = {"data/0": 4, "data/1": 4, "data/2": 4}

    def change(name, data):
        inner = name.partition("/")[2]
        if inner == "byteorder":
            return b"big"
        return np.frombuffer(data, f"u{swap[inner]}").byteswap().tobytes() if inner in swap else data

    got = torch_pt.open(rezip(path, change))
    assert {key: got.read(key).tobytes() for key in got} == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_views(tmp_path_factory, data):
    """Any chain of slices, permutations and expansions reads as torch reads it."""
    path = tmp_path_factory.mktemp("views") / "x.pt"
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex64]))
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    base = torch.arange(int(np.prod(shape))).to(dtype).reshape(shape)
    views = {}
    for i in range(data.draw(st.integers(1, 4))):
        view = base
        for axis in range(view.ndim):
            start = data.draw(st.integers(0, view.shape[axis]))
            view = view[(slice(None),) * axis + (slice(start, None, data.draw(st.integers(1, 3))),)]
        view = view.permute(data.draw(st.permutations(range(view.ndim))))
        views[f"v{i}"] = view.unsqueeze(0).expand(data.draw(st.integers(1, 3)), *view.shape)
    legacy = data.draw(st.booleans())
    save(path, views, _use_new_zipfile_serialization=not legacy)
    check_same(path, torch.load(path, weights_only=True))


def test_compressed_archive_and_no_crc(tmp_path):
    tensors = {"a": torch.randn(100), "b": torch.randn(3)}
    path = save(tmp_path / "x.pt", tensors)
    rezip(path, lambda name, data: data, tmp_path / "packed.pt", zipfile.ZIP_DEFLATED)
    check_same(tmp_path / "packed.pt", tensors)
    torch.serialization.set_crc32_options(False)
    try:
        check_same(save(tmp_path / "nocrc.pt", tensors), tensors)
    finally:
        torch.serialization.set_crc32_options(True)


def test_reads_without_torch(tmp_path):
    """Opening and reading import neither torch nor, for names and shapes, NumPy."""
    import subprocess
    import sys

    path = save(tmp_path / "x.pt", {"a": torch.ones(2)})
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\nfrom graftax.formats import torch_pt\n"
        f"c = torch_pt.open(Path({str(path)!r}))\nassert str(c['a']) == 'float32[2]' and 'numpy' not in sys.modules\n"
        "assert c.read('a').tolist() == [1, 1]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- containers


WEIGHTS = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
OTHER = {"fc.weight": torch.zeros(2, 3), "fc.bias": torch.ones(2)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2, 3), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    ("content", "container"),
    [
        (WEIGHTS, ""),
        ({"state_dict": WEIGHTS, "optimizer": OPTIMIZER, "epoch": 3}, "state_dict"),
        ({"step": 1, "model_state": WEIGHTS, "optimizer_state": OPTIMIZER}, "model_state"),
        ({"model": {"module": WEIGHTS, "rank": 0}, "opt": OPTIMIZER, "iteration": torch.tensor(5)}, "model/module"),
        ({"params": WEIGHTS, "lr_schedulers": [{"last": torch.ones(3)}], "rng_state": torch.ones(9)}, ""),
        ({"params": WEIGHTS, "rng_state": torch.get_rng_state()}, "params"),
        ({"anything": WEIGHTS}, "anything"),
    ],
)
def test_container_is_found(tmp_path, content, container):
    path = save(tmp_path / "x.pt", content)
    if not container and content is not WEIGHTS:
        # a tensor that may be a weight stands beside the container: nothing is dropped
        assert set(torch_pt.open(path)) >= {"params.fc.weight", "params.fc.bias"}
        return
    got = check_same(path, WEIGHTS)
    assert got.storage.metadata.get("container", "") == container
    left = set(content) - set(WEIGHTS) - {container.partition("/")[0]}
    assert left <= set(got.storage.metadata)


def test_left_out_is_listed(tmp_path):
    content = {"model": WEIGHTS, "optimizer": OPTIMIZER, "epoch": 3, "name": "run", "none": None}
    got = torch_pt.open(save(tmp_path / "x.pt", content))
    assert got.storage.metadata == {
        "container": "model",
        "optimizer": "mapping of 2, 2 tensors, not read",
        "epoch": "int 3",
        "name": "str run",
        "none": "NoneType None",
    }


def test_two_containers_are_a_question(tmp_path):
    path = save(tmp_path / "run.pt", {"model": WEIGHTS, "ema": OTHER, "optimizer": OPTIMIZER})
    with pytest.raises(PlanError) as info:
        torch_pt.open(path)
    assert [failure.key for failure in info.value.failures] == [f"{path}::model", f"{path}::ema"]
    assert "optimizer" not in str(info.value)
    assert torch_pt.open_container(path, "ema").read("fc.bias").tolist() == [1, 1]
    assert torch_pt.open_container(path, "model").read("fc.bias").tolist() == [0, 0]
    everything = torch_pt.open_container(path, ".")
    assert {"model.fc.weight", "ema.fc.weight", "optimizer.state.0.exp_avg"} <= set(everything)
    assert everything.real_keys["optimizer.state.0"] == 0


def test_parts_without_a_usual_name_are_one_tree(tmp_path):
    path = save(tmp_path / "x.pt", {"encoder": WEIGHTS, "decoder": OTHER})
    assert list(torch_pt.open(path)) == [f"{part}.{key}" for part in ("encoder", "decoder") for key in WEIGHTS]
    assert list(torch_pt.open_container(path, "decoder")) == list(OTHER)


def test_container_names(tmp_path):
    content = {"a": {"b": WEIGHTS, "b.c": {"d": OTHER}}, "model": {"x": torch.ones(1)}, "list": [WEIGHTS, OTHER]}
    path = save(tmp_path / "x.pt", content)
    for name in ("a/b", "a.b"):
        assert torch_pt.open_container(path, name).read("fc.bias").tolist() == [0, 0]
    for name in ("a.b.c.d", "a/b.c/d", "list/1"):
        assert torch_pt.open_container(path, name).read("fc.bias").tolist() == [1, 1]
    with pytest.raises(PlanError, match=r"no container 'modle'\nNear: model"):
        torch_pt.open_container(path, "modle")
    with pytest.raises(PlanError, match="no container"):
        torch_pt.open_container(path, "model/x")


def test_nested_names_that_clash(tmp_path):
    path = save(tmp_path / "x.pt", {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}})
    with pytest.raises(FormatError, match=r"both called a\.b"):
        torch_pt.open(path)
    path = save(tmp_path / "y.pt", {0: torch.ones(1), "0": torch.zeros(1)})
    with pytest.raises(FormatError, match="both called 0"):
        torch_pt.open(path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], None, {"a": {}}])
def test_no_tensors(tmp_path, content):
    with pytest.raises(FormatError, match="holds no tensors"):
        torch_pt.open(save(tmp_path / "x.pt", content))


@pytest.mark.parametrize(
    "name", ["upscaler", "strng", "loops2d_head", "optimizer_head", "optics", "schedulerNet", "scaler"]
)
def test_a_name_that_holds_a_word_of_training_says_nothing(tmp_path, name):
    content = {"generator": WEIGHTS, name: {"w.weight": torch.ones(5, 3)}}
    got = torch_pt.open(save(tmp_path / "x.pt", content))
    assert set(got) == {"generator.fc.weight", "generator.fc.bias", f"{name}.w.weight"}
    with pytest.raises(PlanError, match="2 containers") as info:
        torch_pt.open(save(tmp_path / "y.pt", {"model": WEIGHTS, name: {"w.weight": torch.ones(5, 3)}}))
    assert [failure.key.rpartition("::")[2] for failure in info.value.failures] == ["model", name]


ONE = torch.ones(())
GRAD_SCALER = {"scale": ONE, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9, "_growth_tracker": ONE}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", {"exp_avg": torch.ones(2, 3)}),
        ("optimizer_states", [OPTIMIZER]),
        ("optimizers", {"a": OPTIMIZER, "b": OPTIMIZER}),
        ("lastOptimizerState", {"momentum_buffer": torch.ones(2)}),
        ("optim_g_1", OPTIMIZER),
        ("anything", OPTIMIZER),
        ("anything", {"a": OPTIMIZER, "b": [OPTIMIZER]}),
        ("lr_scheduler", {"base": torch.ones(3)}),
        ("LRScheduler", {"base": torch.ones(3)}),
        ("scheduler", {"lr": torch.ones(1)}),
        ("grad_scaler", GRAD_SCALER),
        ("amp_scaler", {"scale": ONE}),
        ("native", GRAD_SCALER),
        ("rng_state", [torch.get_rng_state()]),
        ("rng", {"cpu": torch.get_rng_state(), "cuda": [torch.get_rng_state()]}),
        ("random_states", {"torch": torch.get_rng_state()}),
        ("cuda_rng_state_all", [torch.get_rng_state()]),
        ("rng_state", torch.get_rng_state()),
        ("callbacks", {"EarlyStopping": {"best_score": ONE}}),
        ("loops", {"fit_loop": {"total": ONE}}),
        ("hparams", {"weight_decay": ONE}),
        ("optimizer", {"fp32_groups": [torch.ones(6)], "base": OPTIMIZER}),
        ("optimizer", {"state": {0: torch.ones(2)}}),
        ("losses", [ONE, ONE]),
    ],
)
def test_what_training_saves_beside_weights(tmp_path, name, value):
    got = torch_pt.open(save(tmp_path / "x.pt", {"model": WEIGHTS, name: value}))
    assert list(got) == list(WEIGHTS)
    assert list(got.storage.metadata) == ["container", name]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0,), (2,)])
@pytest.mark.parametrize("name", ["logit_scale", "alpha", "best", "step_size", "loss_weight", "optimizer", "rng"])
def test_no_tensor_beside_a_container_is_dropped(tmp_path, name, shape):
    content = {"model": WEIGHTS, name: torch.full(shape, 2.5), "optim": OPTIMIZER, "epoch": 3}
    got = torch_pt.open(save(tmp_path / "x.pt", content))
    assert set(got) == {"model.fc.weight", "model.fc.bias", name}
    assert list(got.storage.metadata) == ["optim", "epoch"]


@pytest.mark.parametrize(
    "name", ["epoch", "global_step", "iteration", "best_acc1", "best_loss", "bestScore", "lr", "learning_rate", "seed"]
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_count_of_training_is_no_weight(tmp_path, name, shape):
    got = torch_pt.open(save(tmp_path / "x.pt", {"model": WEIGHTS, name: torch.full(shape, 2.5)}))
    assert list(got) == list(WEIGHTS)
    assert list(got.storage.metadata) == ["container", name]
    got = torch_pt.open(save(tmp_path / "x.pt", {"model": WEIGHTS, name: torch.ones(2)}))
    assert len(got) == 3


def test_only_what_may_be_a_weight_is_read_with_the_weights(tmp_path):
    known = {"best_acc1": ONE, "rng_state": torch.get_rng_state(), "lr_scheduler": {"base": torch.ones(3)}, "epoch": 3}
    got = torch_pt.open(
        save(tmp_path / "x.pt", {"model": WEIGHTS, "logit_scale": ONE, "optimizer": OPTIMIZER, **known})
    )
    assert set(got) == {"model.fc.weight", "model.fc.bias", "logit_scale"}
    assert set(got.storage.metadata) == {"optimizer", *known}
    parts = {"encoder": WEIGHTS, "decoder": OTHER, "loss": ONE, "heads": {"w": torch.ones(2)}}
    assert {key.partition(".")[0] for key in torch_pt.open(save(tmp_path / "y.pt", parts))} == set(parts)


@pytest.mark.parametrize("model", ["model", "encoder"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", OTHER),
        ("opt_state", {"m": OTHER, "v": OTHER}),
        ("callbacks", OTHER),
        ("hparams", {"class_weights": torch.ones(3)}),
        ("lr_scheduler", {"table": torch.ones(5, 4)}),
        ("rng", {"table": torch.ones(4, 4, dtype=torch.int64)}),
    ],
)
def test_a_name_of_training_alone_is_a_question(tmp_path, model, name, value):
    for content, above in (
        ({model: WEIGHTS, name: value}, ""),
        ({"state_dict": {model: WEIGHTS, name: value}}, "state_dict/"),
    ):
        path = save(tmp_path / "x.pt", content)
        with pytest.raises(PlanError, match="2 containers") as info:
            torch_pt.open(path)
        assert [failure.key for failure in info.value.failures] == [f"{path}::{above}{part}" for part in (model, name)]
        assert "PATH::." in str(info.value)
        assert list(torch_pt.open_container(path, f"{above}{model}")) == list(WEIGHTS)


def test_lightning_says_what_is_beside_its_state_dict(tmp_path):
    run = {"state_dict": WEIGHTS, "hyper_parameters": {"w": torch.ones(3)}, "callbacks": {"EMA": OTHER}}
    got = torch_pt.open(save(tmp_path / "x.ckpt", run | {"pytorch-lightning_version": "2.1"}))
    assert list(got) == list(WEIGHTS)


def test_networks_with_an_optimizer_each_are_a_question(tmp_path):
    nets = {"G": {"state_dict": WEIGHTS, "optimizer": OPTIMIZER}, "D": {"net": OTHER, "opt": OPTIMIZER}}
    path = save(tmp_path / "x.pt", nets | {"epoch": 3})
    with pytest.raises(PlanError, match="2 containers") as info:
        torch_pt.open(path)
    assert [failure.key for failure in info.value.failures] == [f"{path}::G/state_dict", f"{path}::D/net"]
    got = torch_pt.open(save(tmp_path / "y.pt", {"nets": list(nets.values())}))
    assert {key.rpartition(".fc")[0] for key in got} == {"nets.0.state_dict", "nets.1.net"}
    assert {"nets.0.optimizer", "nets.1.opt"} <= set(got.left)


def test_a_list_of_weights_beside_a_container_is_not_dropped(tmp_path):
    path = save(tmp_path / "x.pt", {"model": WEIGHTS, "heads": [{"weight": torch.ones(2)}, torch.ones(())]})
    assert set(torch_pt.open(path)) == {"model.fc.weight", "model.fc.bias", "heads.0.weight", "heads.1"}


def test_optimizers_beside_parts_are_left_out_and_listed(tmp_path):
    path = save(tmp_path / "x.pt", {"generator": WEIGHTS, "upscaler": OTHER, "opt": {"g": OPTIMIZER, "d": OPTIMIZER}})
    got = torch_pt.open(path)
    assert {key.partition(".")[0] for key in got} == {"generator", "upscaler"}
    assert got.storage.metadata == {"opt": "mapping of 2, 4 tensors, not read"}
    assert len(torch_pt.open_container(path, ".")) == 8
    assert len(torch_pt.open(save(tmp_path / "y.pt", {"opt": OPTIMIZER}))) == 2


def test_inspect_says_what_was_not_read(tmp_path):
    from graftax.report.inspecting import inspection, inspection_text

    content = {"model": {**WEIGHTS, "alpha": 3.0}, "optimizer": OPTIMIZER, "epoch": 3, "container": "a"}
    got = torch_pt.open(save(tmp_path / "x.pt", content))
    assert got.storage.metadata["container"] == "model"
    assert got.storage.metadata["alpha"] == "float 3.0"
    last = inspection_text(inspection(got)).splitlines()[-1]
    assert last == "beside the weights, not read: optimizer, epoch, ./container, alpha"
    got = torch_pt.open(save(tmp_path / "x.pt", WEIGHTS | {f"a\x1b{i}": i for i in range(20)}))
    last = inspection_text(inspection(got)).splitlines()[-1]
    assert last.endswith("a\\x1b11 and 8 more (--json)")
    got = torch_pt.open(save(tmp_path / "x.pt", WEIGHTS))
    assert "not read" not in inspection_text(inspection(got))


# ---------------------------------------------------------------- objects beside the weights


class Mode(enum.Enum):
    A = 1


@dataclasses.dataclass
class Settings:
    rate: float = 0.1
    tensor: object = None


class Attributes(dict):
    pass


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 2)


def activation(x):
    return x


OBJECTS = {
    "a NumPy scalar": np.float64(0.5),
    "numpy.ndarray": np.ones(3),
    "numpy.dtype": np.dtype("f4"),
    "numpy.random.Generator": np.random.default_rng(0),
    "argparse.Namespace": argparse.Namespace(lr=0.1),
    "pathlib.PurePosixPath": pathlib.PurePosixPath("/x"),
    "datetime.datetime": datetime.datetime(2020, 1, 1),
    "_io.BytesIO": io.BytesIO(b"a"),
    "decimal.Decimal": decimal.Decimal(1),
    "builtins.slice": slice(1),
    "builtins.frozenset": frozenset({1}),
    "Mode": Mode.A,
    "Settings": Settings(),
    "Settings, 1 tensors, not read": Settings(tensor=torch.ones(2)),
    "Attributes": Attributes(a=1),
    "activation": activation,
    "torch.nn.modules.loss.CrossEntropyLoss": torch.nn.CrossEntropyLoss(),
    "torch._C._VariableFunctionsClass.relu": torch.relu,
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.filterwarnings("ignore")
def test_an_object_beside_the_weights_is_a_name(tmp_path, name, legacy, protocol):
    options = {"_use_new_zipfile_serialization": not legacy, "pickle_protocol": protocol}
    path = save(tmp_path / "x.pt", {"state_dict": WEIGHTS, "extra": OBJECTS[name]}, **options)
    got = check_same(path, WEIGHTS)
    assert got.storage.metadata["extra"].removeprefix("object ").endswith(name)
    assert got.left == {"extra": got.storage.metadata["extra"]}
    assert list(torch_pt.open_container(path, "state_dict")) == list(WEIGHTS)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.filterwarnings("ignore")
def test_an_object_among_the_weights_is_refused(tmp_path, name, legacy):
    content = {"state_dict": {**WEIGHTS, "fc.extra": OBJECTS[name]}}
    path = save(tmp_path / "x.pt", content, _use_new_zipfile_serialization=not legacy)
    for way in (torch_pt.open, lambda path: torch_pt.open_container(path, "state_dict")):
        with pytest.raises(UnsafeInputError, match=r"fc\.extra: an object of"):
            way(path)


def test_keys_and_containers_of_objects(tmp_path):
    content = {
        "state_dict": collections.defaultdict(dict, WEIGHTS),
        "callbacks": {pathlib.PurePosixPath("/a"): {"best": Mode.A}, Net: 1, ("a", 1): 2, None: 3},
        pathlib.PurePosixPath("/b"): 1,
        "hyper_parameters": Attributes(lr=0.1),
        "args": [argparse.Namespace(a=Settings())],
    }
    got = check_same(save(tmp_path / "x.pt", content), WEIGHTS)
    assert set(got.left) == {"callbacks", "pathlib.PurePosixPath", "hyper_parameters", "args"}


def test_notes_of_a_run_beside_bare_weights(tmp_path):
    notes = {"args": argparse.Namespace(a=1), "epoch": np.int64(3), "fc._extra_state": io.BytesIO(b"a")}
    got = check_same(save(tmp_path / "x.pt", {**WEIGHTS, **notes}), WEIGHTS)
    assert set(got.left) == set(notes)
    with pytest.raises(UnsafeInputError, match="weird: an object of"):
        torch_pt.open(save(tmp_path / "y.pt", {**WEIGHTS, "weird": Settings()}))


@pytest.mark.parametrize(
    "content",
    [
        Net(),
        {"model": Net(), "epoch": 3},
        {"model": Net(), "optimizer": OPTIMIZER},
        {"encoder": WEIGHTS, "decoder": Net()},
        {"model": Attributes(WEIGHTS)},
        [Net()],
        {"a": np.ones(3)},
    ],
)
def test_weights_that_are_objects_are_refused(tmp_path, content):
    path = save(tmp_path / "x.pt", content)
    with pytest.raises(UnsafeInputError) as info:
        torch_pt.open(path)
    assert info.value.exit_code == 4
    if isinstance(content, dict) and "model" in content:
        with pytest.raises(UnsafeInputError):
            torch_pt.open_container(path, "model")


def test_a_module_beside_a_state_dict_is_a_question(tmp_path):
    path = save(tmp_path / "x.pt", {"state_dict": WEIGHTS, "ema": Net()})
    with pytest.raises(PlanError, match="2 containers"):
        torch_pt.open(path)
    assert list(torch_pt.open_container(path, "state_dict")) == list(WEIGHTS)


def test_arguments_alone_are_no_weights(tmp_path):
    with pytest.raises(FormatError, match=r"no tensors.*\nIt holds: object .*Settings"):
        torch_pt.open(save(tmp_path / "training_args.bin", Settings()))


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def __call__(self):
        raise AssertionError("called")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        Call(os.system, "touch gotcha"),
        Call(exec, "1"),
        Call(__import__, "os"),
        Call(getattr, 1, "real"),
        Call(getattr, Call(getattr, Settings, "__init__"), "__globals__"),
        Call(Call(getattr, Net(), "forward"), 1),
        Call(subprocess.Popen, "true"),
        Call(pickle.loads, b"N."),
        Call(runpy.run_path, "x"),
        Call(functools.partial, os.system, "x"),
        Call(operator.methodcaller, "x"),
        Call(torch.load, "x"),
        Call(np.load, "x"),
        Call(activation, 1),
        os.system,
        eval,
    ],
)
def test_a_call_of_a_function_beside_the_weights_is_refused(tmp_path, monkeypatch, call, legacy):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "x.pt", {"state_dict": WEIGHTS, "extra": call}, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeInputError):
        torch_pt.open_container(path, "state_dict")
    assert not (tmp_path / "gotcha").exists()


def test_objects_that_hold_each_other(tmp_path):
    """A cycle of objects beside the weights, and one shared a thousand times."""
    first, second = Settings(), Settings()
    first.tensor, second.tensor = [second] * 1000, first
    got = check_same(save(tmp_path / "x.pt", {"state_dict": WEIGHTS, "extra": first}), WEIGHTS)
    assert got.left["extra"].endswith("Settings")


def test_protocol_0_and_1_objects(tmp_path):
    """INST, OBJ and NEWOBJ_EX make names, too; a number of thousands of digits is no crash."""
    path = save(tmp_path / "x.pt", {"a": torch.ones(4)})
    for made in (b"(imine\nThing\n", b"(cmine\nThing\no", b"cmine\nThing\n)}\x92", b"cmine\nthing\n)\x81"):
        tail = b"X\x04\0\0\0args" + made + b"s"
        change_pickle(path, lambda data, tail=tail: tensor_pickle((4,), (1,), tail=tail))
        assert torch_pt.open(path).left["args"].startswith("object mine.")
    chained = b"cmine\nsubprocess.Run\n)R", b"cmine\nPopen\n)R", b"cmine\nA.__init__\n"
    for made in (b"(ios\nsystem\n", b"(cos\nsystem\no", b"cos\nsystem\n)\x81", b"cmine\nthing\n)R", *chained):
        tail = b"X\x04\0\0\0args" + made + b"s"
        change_pickle(path, lambda data, tail=tail: tensor_pickle((4,), (1,), tail=tail))
        with pytest.raises(UnsafeInputError):
            torch_pt.open(path)
    change_pickle(path, lambda data: tensor_pickle((4,), (1,), tail=b"X\x01\0\0\0nI" + b"9" * 5000 + b"\ns"))
    with pytest.raises(FormatError):
        torch_pt.open(path)


@pytest.mark.parametrize("tensor", [torch.ones(3, 4), torch.nn.Parameter(torch.ones(2))])
def test_a_bare_tensor_is_one_leaf(tmp_path, tensor):
    got = check_same(save(tmp_path / "x.pt", tensor), {"tensor": tensor})
    assert got.side == "torch"


SHAPES = [OrderedDict((key, torch.Size(tensor.shape)) for key, tensor in WEIGHTS.items())]
EMPTY = {key: torch.empty(0, dtype=torch.float16) for key in WEIGHTS}


@pytest.mark.parametrize(
    "content",
    [
        {"module": EMPTY, "param_shapes": SHAPES, "ds_version": "0.14"},
        {"module": {**EMPTY, "bn.running_mean": torch.ones(2)}, "ds_version": "0.14"},
        {"module": {**EMPTY, "bn.num_batches_tracked": torch.tensor(3)}},
        EMPTY,
    ],
)
def test_zero3_placeholders_are_refused_by_name(tmp_path, content):
    path = save(tmp_path / "mp_rank_00_model_states.pt", content)
    with pytest.raises(FormatError, match=r"empty tensors.*DeepSpeed ZeRO(.|\n)*zero_to_fp32"):
        torch_pt.open(path)
    if "module" in content:
        with pytest.raises(FormatError, match="DeepSpeed ZeRO"):
            torch_pt.open_container(path, "module")


def test_some_empty_tensors_are_no_placeholders(tmp_path):
    tensors = {**WEIGHTS, "empty": torch.empty(0), "rows": torch.empty(0, 3)}
    check_same(save(tmp_path / "x.pt", tensors), tensors)
    check_same(save(tmp_path / "y.pt", {"rows": torch.empty(0, 3)}), {"rows": torch.empty(0, 3)})


# ---------------------------------------------------------------- tensors that are refused


def test_quantized_by_scheme(tmp_path):
    tensor = torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8)
    path = save(tmp_path / "x.pt", {"fc.weight": tensor, "fc.bias": torch.ones(2)})
    with pytest.raises(PlanError, match=r"quantized tensors \(per_channel_affine\)") as info:
        torch_pt.open(path)
    assert info.value.exit_code == 1
    assert [failure.key for failure in info.value.failures] == ["fc.weight"]


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("sparse", torch.eye(3).to_sparse()),
        ("sparse", torch.eye(3).to_sparse_csr()),
        ("meta", torch.ones(3, device="meta")),
        ("nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        ("dtype", torch.zeros(3, dtype=torch.complex32)),
        ("dtype", torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_tensors_are_named(tmp_path, kind, tensor):
    path = save(tmp_path / "x.pt", {"fine": torch.ones(2), "odd.weight": tensor})
    with pytest.raises(FormatError, match=f"odd.weight: {kind} tensor"):
        torch_pt.open(path)


# ---------------------------------------------------------------- hostile files


class Evil:
    def __reduce__(self):
        return (os.system, ("touch gotcha",))


class Builtin:
    def __reduce__(self):
        return (eval, ("1",))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("content", "name"),
    [(Evil(), "system"), ({"a": torch.ones(2), "b": Evil()}, "system"), ([Builtin()], "builtins.eval")],
)
def test_code_is_refused(tmp_path, monkeypatch, content, name, legacy):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "x.pt", content, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeInputError, match=name) as info:
        torch_pt.open(path)
    assert info.value.exit_code == 4
    assert "weights_only" not in str(info.value)
    assert not (tmp_path / "gotcha").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_bare_pickles(tmp_path, protocol):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"a": Evil()}, protocol))
    assert torch_pt.sniff(path, path.read_bytes()[:512])
    with pytest.raises((UnsafeInputError, FormatError)) as info:
        torch_pt.open(path)
    if protocol >= 2:
        assert info.value.exit_code == 4
    path.write_bytes(pickle.dumps({"a": 1}, protocol))
    with pytest.raises(FormatError):
        torch_pt.open(path)


def test_every_refused_global_is_listed(tmp_path):
    path = save(tmp_path / "x.pt", {"a": Evil(), "b": Builtin(), "c": np.float32(1)})
    with pytest.raises(UnsafeInputError) as info:
        torch_pt.open(path)
    assert len(info.value.failures) >= 3


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_modules_are_refused(tmp_path, legacy):
    path = save(tmp_path / "x.pt", torch.nn.Linear(2, 2), _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeInputError, match=r"a pickled module \(torch.nn.modules.linear.Linear\)"):
        torch_pt.open(path)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "x.pt"))
    head = (tmp_path / "x.pt").read_bytes()[:512]
    assert torch_pt.sniff(tmp_path / "x.pt", head)
    with pytest.raises(UnsafeInputError, match="TorchScript"):
        torch_pt.open(tmp_path / "x.pt")


def test_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.pt", "w") as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert torch_pt.sniff(tmp_path / "x.pt", (tmp_path / "x.pt").read_bytes()[:512])
    with pytest.raises(UnsafeInputError, match="tar file"):
        torch_pt.open(tmp_path / "x.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_truncation_at_every_byte(tmp_path, legacy):
    """No prefix of a file opens and reads."""
    path = save(tmp_path / "x.pt", {"a": torch.ones(5), "b": torch.ones(3)}, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    cut = tmp_path / "cut.pt"
    for length in range(1, len(data), 1 if len(data) < 700 else 7):
        cut.write_bytes(data[:length])
        with pytest.raises(FormatError):
            torch_pt.open(cut)


@pytest.mark.parametrize("legacy", [False, True])
def test_trailing_bytes(tmp_path, legacy):
    path = save(tmp_path / "x.pt", {"a": torch.ones(5)}, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(FormatError):
        torch_pt.open(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_flipped_bytes(tmp_path, legacy):
    """A changed byte is an error of ours or a checkpoint, never another exception; in a zip the tensors' bytes are
    guarded by their CRC."""
    path = save(tmp_path / "x.pt", {"a": torch.ones(5), "b": torch.ones(3)}, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    accepted = 0
    for at in rng.integers(0, len(data), 400):
        changed = bytearray(data)
        changed[at] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            got = torch_pt.open(path)
            values = {key: got.read(key).tolist() for key in got}
        except (FormatError, UnsafeInputError, PlanError):
            continue
        accepted += 1
        assert legacy or values == {"a": [1] * 5, "b": [1] * 3}
    assert accepted < 400


def test_crc_of_a_part(tmp_path):
    """The record is checked, too, when only a slice of it is asked for."""
    path = save(tmp_path / "x.pt", {"a": torch.arange(1000.0)[10:20]})
    data = bytearray(path.read_bytes())
    at = data.find(struct.pack("<f", 900.0))
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="damaged"):
        torch_pt.open(path).read("a")


def test_zip_bomb(tmp_path):
    path = save(tmp_path / "x.pt", {"a": torch.zeros(50_000_000, dtype=torch.uint8)})
    rezip(path, lambda name, data: data, tmp_path / "bomb.pt", zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    with pytest.raises(UnsafeInputError, match="GRAFTAX_LIMIT_RATIO"):
        torch_pt.open(tmp_path / "bomb.pt")


def test_zip_with_duplicates_and_gaps(tmp_path):
    path = save(tmp_path / "x.pt", {"a": torch.ones(2)})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", b"\0" * 8)
    with pytest.raises(FormatError, match="two members have one name"):
        torch_pt.open(path)
    save(path, {"a": torch.ones(2)})
    path.write_bytes(b"MZ" + path.read_bytes())
    with pytest.raises(FormatError):
        torch_pt.open(path)


def test_missing_and_short_records(tmp_path):
    path = save(tmp_path / "x.pt", {"a": torch.ones(20), "b": torch.ones(3)})
    short = rezip(path, lambda name, data: data[:-4] if name.endswith("data/0") else data, tmp_path / "short.pt")
    with pytest.raises(FormatError, match=r"expected 80 bytes, found 76 bytes"):
        torch_pt.open(short)
    missing = rezip(path, lambda name, data: None if name.endswith("data/1") else data, tmp_path / "missing.pt")
    with pytest.raises(FormatError, match=r"storage 1 is missing.*expected 12 bytes, found none"):
        torch_pt.open(missing)


def tensor_pickle(shape, strides, offset=0, numel=4, tail=b""):
    """A handmade data.pkl: {'a': a tensor of any claim about a storage of `numel` floats}."""

    def number(value):
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value

    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + number(numel) + b"tQ"
    rest = number(offset) + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)R"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"
    return b"\x80\x02}" + text(b"a") + call + b"s" + tail + b"."


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "numel", "error"),
    [
        ((2**36,), (0,), 0, 4, UnsafeInputError),
        ((2**30, 2**30), (0, 0), 0, 4, FormatError),
        ((2**62, 2**62), (0, 0), 0, 4, FormatError),
        ((5,), (1,), 0, 4, FormatError),
        ((4,), (1,), 1, 4, FormatError),
        ((4,), (-1,), 3, 4, FormatError),
        ((-4,), (1,), 0, 4, FormatError),
        ((4,), (1,), -1, 4, FormatError),
        ((4,), (1, 1), 0, 4, FormatError),
        ((2**40,), (1,), 0, 2**40, FormatError),
        ((1,) * 65, (1,) * 65, 0, 4, FormatError),
        ((0, 2**62), (1, 1), 0, 4, FormatError),
    ],
)
def test_claims_of_a_tensor(tmp_path, shape, strides, offset, numel, error):
    path = save(tmp_path / "x.pt", {"a": torch.ones(4)})
    change_pickle(path, lambda data: tensor_pickle((4,), (1,)))
    assert torch_pt.open(path).read("a").tolist() == [1] * 4
    change_pickle(path, lambda data: tensor_pickle(shape, strides, offset, numel))
    with pytest.raises(error):
        torch_pt.open(path)


def test_many_views_of_one_storage(tmp_path):
    """Each view is within the limit, all together ask for more than 1000 times the file."""
    base = torch.zeros(100)
    path = save(tmp_path / "x.pt", {f"v{i}": base[:1].expand(4, 10_000, 100) for i in range(40)})
    with pytest.raises(UnsafeInputError, match="the tensors of"):
        torch_pt.open(path)


def test_one_greedy_view_in_a_large_file(tmp_path):
    """The file as a whole is within the limit, one tensor is not."""
    path = save(tmp_path / "x.pt", {"fine": torch.ones(1_000_000), "greedy": torch.ones(1).expand(10_000_000)})
    with pytest.raises(UnsafeInputError, match="greedy needs too much memory"):
        torch_pt.open(path)


def test_legacy_lengths(tmp_path):
    """The element count before the bytes of a storage must be the pickle's."""
    path = save(tmp_path / "x.pt", {"a": torch.ones(5)}, _use_new_zipfile_serialization=False)
    data = bytearray(path.read_bytes())
    assert data[-28:-20] == struct.pack("<q", 5)
    data[-28:-20] = struct.pack("<q", 4)
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"storage .* is damaged"):
        torch_pt.open(path)


@pytest.mark.parametrize("kind", ["list", "tuple key", "dict"])
def test_shared_references(tmp_path, kind):
    """A few hundred bytes that unfold to 2**60 objects."""
    value = torch.ones(1) if kind != "tuple key" else 1
    for _ in range(60):
        value = {"a": value, "b": value} if kind == "dict" else [value, value] if kind == "list" else (value, value)
    path = tmp_path / "x.pt"
    if kind == "tuple key":
        # pickling would hash the key, which takes as long: made by hand, with one memo entry
        body = b"\x80\x02}K\x01" + b"q\x00h\x00\x86" * 60 + b"K\x01s."
        save(path, {"a": torch.ones(1)})
        change_pickle(path, lambda data: body)
    else:
        save(path, {"model": value})
    with pytest.raises((UnsafeInputError, FormatError)):
        torch_pt.open(path)


def test_cycles_and_depth(tmp_path):
    loop = {"a": torch.ones(1)}
    loop["self"] = loop
    with pytest.raises(FormatError, match="contains itself"):
        torch_pt.open(save(tmp_path / "x.pt", loop))
    deep = torch.ones(1)
    for _ in range(80):
        deep = {"d": deep}
    with pytest.raises(UnsafeInputError, match="levels of nesting"):
        torch_pt.open(save(tmp_path / "x.pt", deep))
    path = save(tmp_path / "x.pt", {"a": torch.ones(4)})
    for body in (b"\x80\x02" + b"(" * 100_000 + b".", b"\x80\x02" + b"]" + b"]a" * 5 + b"\x85" * 100_000 + b"."):
        change_pickle(path, lambda data, body=body: body)
        with pytest.raises((UnsafeInputError, FormatError)):
            torch_pt.open(path)


def test_object_bomb(tmp_path):
    path = save(tmp_path / "x.pt", {"a": torch.ones(4)})
    change_pickle(path, lambda data: b"\x80\x02" + b"}" * 9_000_000 + b".")
    with pytest.raises(UnsafeInputError, match="GRAFTAX_LIMIT_LEAVES"):
        torch_pt.open(path)


def test_file_that_changes(tmp_path):
    path = save(tmp_path / "x.pt", {"a": torch.ones(4)})
    got = torch_pt.open(path)
    save(path, {"a": torch.zeros(5)})
    with pytest.raises(StorageError, match="changed"):
        got.read("a")
    with pytest.raises(StorageError):
        torch_pt.open(tmp_path / "absent.pt")


def test_other_zips_are_not_ours(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(2))
    assert not torch_pt.sniff(tmp_path / "x.npz", (tmp_path / "x.npz").read_bytes()[:512])
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("hello.txt", "hi")
    assert torch_pt.sniff(tmp_path / "x.pt", (tmp_path / "x.pt").read_bytes()[:512])
    with pytest.raises(FormatError, match=r"no data\.pkl"):
        torch_pt.open(tmp_path / "x.pt")


# ---------------------------------------------------------------- writing


def output(arrays, **kwargs):
    return Output({key: spec_of(array) for key, array in arrays.items()}, arrays.items(), "torch", **kwargs)


def test_write_is_what_torch_writes(tmp_path):
    arrays = {name: every_bit_pattern(name).reshape(4, 75).T for name in HELD}
    arrays |= {"scalar": np.array(2**40), "empty": np.zeros((0, 3), np.float32)}
    torch_pt.write(tmp_path / "staging-1", output(arrays))
    torch_pt.write(tmp_path / "other.pt", output(arrays))
    digests = {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("staging-1", "other.pt")}
    assert len(digests) == 1
    loaded = torch.load(tmp_path / "other.pt", weights_only=True)
    assert type(loaded) is OrderedDict
    assert list(loaded) == list(arrays)
    for key, array in arrays.items():
        assert raw(loaded[key]) == array.tobytes()
        assert loaded[key].is_contiguous()
    again = torch_pt.open(tmp_path / "other.pt")
    assert all(again.read(key).tobytes() == array.tobytes() for key, array in arrays.items())


def test_write_container_and_order(tmp_path):
    arrays = {"b": np.ones(2), "a": np.zeros(3)}
    specs = {key: spec_of(array) for key, array in arrays.items()}
    backwards = Output(specs, reversed(list(arrays.items())), "torch", container="run/model")
    torch_pt.write(tmp_path / "x.pt", backwards)
    assert list(torch.load(tmp_path / "x.pt", weights_only=True)["run"]["model"]) == ["b", "a"]
    assert list(torch_pt.open_container(tmp_path / "x.pt", "run/model")) == ["b", "a"]


def test_write_refuses(tmp_path):
    import ml_dtypes

    from graftax.tree import TensorSpec

    packed = {"a": np.zeros(2, np.uint8)}
    with pytest.raises(PlanError, match="int4"):
        torch_pt.write(tmp_path / "x.pt", Output({"a": TensorSpec((4,), "int4")}, packed.items(), "torch"))
    assert np.dtype(ml_dtypes.int4)
    assert not (tmp_path / "x.pt").exists()
