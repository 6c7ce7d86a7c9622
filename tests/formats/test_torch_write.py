"""A .pt file written tile by tile is what torch.save writes: by torch's own reader, and call by call of its pickle."""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import graftax as gx
from graftax.formats import torch_pt
from graftax.formats.base import Output
from graftax.tree import TensorSpec
from graftax.tree.inert import DTYPES

SHAPES = [(), (0,), (0, 3), (2, 0), (1,), (5,), (2, 3), (3, 1, 2), (300, 70)]


def tensors() -> OrderedDict[str, torch.Tensor]:
    """Every dtype, and every shape."""
    made: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name in DTYPES:
        raw = torch.arange(24, dtype=torch.uint8) % 2 if name == "bool" else torch.arange(48, dtype=torch.uint8)
        made[f"of.{name}"] = raw.view(getattr(torch, name)).reshape(3, -1).contiguous()
    for i, shape in enumerate(SHAPES):
        made[f"shape.{i}"] = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)
    made["n\u00e4me \u4e2d \ud800"] = torch.ones(1)
    return made


def written(path: Path, state: OrderedDict[str, torch.Tensor], container: str | None = None) -> Path:
    arrays: dict[str, Any] = {}
    specs: dict[str, TensorSpec] = {}
    for name, tensor in state.items():
        short = str(tensor.dtype).removeprefix("torch.")
        dtype = np.dtype(getattr(ml_dtypes, short, None) or short)
        arrays[name] = tensor.reshape(-1).view(torch.uint8).numpy().view(dtype).reshape(tuple(tensor.shape))
        specs[name] = TensorSpec(tuple(tensor.shape), short)
    torch_pt.write(path, Output(specs, arrays.items(), "torch", container=container))
    return path


class Calls(pickle.Unpickler):
    """What a pickle asks to be called, without calling it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return type(name, (), {"__new__": lambda cls, *args: (f"{module}.{name}", args), "__module__": module})

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, *rest = pid
        return (kind, f"{storage.__module__}.{storage.__name__}", *rest)


def calls(path: Path) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, type):
            return f"{value.__module__}.{value.__name__}"
        if isinstance(value, dict):
            return type(value).__name__, [(key, plain(item)) for key, item in value.items()]
        return tuple(map(plain, value)) if isinstance(value, tuple) else value

    with zipfile.ZipFile(path) as archive:
        return plain(Calls(io.BytesIO(archive.read("archive/data.pkl"))).load())


@pytest.mark.parametrize("container", [None, "run/model"])
def test_the_pickle_asks_for_the_same_as_that_of_torch(tmp_path: Path, container: str | None) -> None:
    state = tensors()
    ours = written(tmp_path / "ours.pt", state, container)
    with open(tmp_path / "theirs.pt", "wb") as file:
        torch.save({"run": {"model": state}} if container else state, file)
    assert calls(ours) == calls(tmp_path / "theirs.pt")
    with zipfile.ZipFile(ours) as a, zipfile.ZipFile(tmp_path / "theirs.pt") as b:
        assert a.testzip() is None
        assert [n for n in b.namelist() if not n.endswith(".data/serialization_id")] == a.namelist()
        for name in a.namelist():
            if not name.endswith("data.pkl"):
                assert a.read(name) == b.read(name), name


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_it(tmp_path: Path, mmap: bool) -> None:
    state = tensors()
    loaded = torch.load(written(tmp_path / "x.pt", state), weights_only=True, mmap=mmap)
    assert type(loaded) is OrderedDict
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        got = loaded[name]
        assert (got.dtype, got.shape, got.stride()) == (tensor.dtype, tensor.shape, tensor.stride()), name
        assert got.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name
        assert got.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
        assert not mmap or not got.numel() or got.data_ptr() % 64 == 0 or got.numel() * got.itemsize < 64


def test_it_is_written_in_tiles_and_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = np.arange(900 * 1100, dtype=np.float32).reshape(900, 1100)
    np.savez(tmp_path / "s.npz", **{"fc/kernel": big, "fc/bias": np.ones(3, np.float32)})
    rules = [
        {"torch": "fc.weight", "flax": "fc/kernel", "layout": "linear"},
        {"torch": "fc.bias", "flax": "fc/bias", "layout": "identity"},
    ]
    real = torch
    monkeypatch.setitem(sys.modules, "torch", None)
    gx.port_file(tmp_path / "s.npz", None, tmp_path / "o.pt", rules=rules, to="torch", max_memory="1MiB")
    monkeypatch.setitem(sys.modules, "torch", real)
    loaded = torch.load(tmp_path / "o.pt", weights_only=True)
    assert np.array_equal(loaded["fc.weight"].numpy(), big.T)
    assert loaded["fc.bias"].tolist() == [1, 1, 1]
