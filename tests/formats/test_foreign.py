"""graftax.formats.foreign: formats that are not read are named, with the way out; what looks like one is read."""

import io
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.distributed.checkpoint

import graftax as gx
from graftax.errors import FormatError, StorageError, UnsafeInputError
from graftax.formats import open_path
from graftax.formats.foreign import FOREIGN, foreign_file


def zipped(*names: str) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        for name in names:
            archive.writestr(name, "{}")
    return raw.getvalue()


FILES = {
    "m.keras": (zipped("metadata.json", "config.json", "model.weights.h5"), "Keras"),
    "renamed": (zipped("metadata.json", "config.json", "model.weights.h5"), "Keras"),
    "m.weights.h5": (b"\x89HDF\r\n\x1a\n" + bytes(600), "Keras"),
    "m.onnx": (b"\x08\x07\x12\x07pytorch", "ONNX"),
    "exported": (b"\x08\x08\x12\x08tf2onnx", "ONNX"),
    "saved_model.pb": (b"\x08\x01\x12\x10", "SavedModel"),
    "m.ckpt.index": (b"\0\0\x02", "TensorFlow"),
    "m.ckpt.data-00000-of-00001": (b"\x81\xa1abcd" * 9, "TensorFlow"),
    "checkpoint": (b'model_checkpoint_path: "m.ckpt"\n', "TensorFlow"),
    "m.tflite": (b"\x1c\0\0\0TFL3", "TensorFlow Lite"),
    "m.gguf": (b"GGUF\3\0\0\0", "GGUF"),
    "m.mlmodel": (b"\x08\x04\x12\x10", "Core ML"),
    "m.engine": (b"ftrt\0", "TensorRT"),
    "m.xml": (b'<?xml version="1.0"?>\n<net name="x">', "OpenVINO"),
    "m.pdparams": (pickle.dumps({"a": np.ones(2)}, 2), "Paddle"),
    "__0_0.distcp": (zipped("archive/data.pkl"), "dcp_to_torch_save"),
    ".zarray": (b"{}", "zarr"),
    "m.params": (b"\x12\x01" + bytes(20), "MXNet"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_others(tmp_path: Path, name: str):
    content, text = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=text) as caught:
        open_path(tmp_path / name)
    assert "\n" in str(caught.value)  # what to do
    with pytest.raises(FormatError):
        open_path(f"{tmp_path / name}::part")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_arrays_would_run_code(tmp_path: Path, protocol: int):
    (tmp_path / "p.pkl").write_bytes(pickle.dumps({"linear": {"w": np.ones((2, 3), "float32")}}, protocol))
    with pytest.raises(UnsafeInputError, match="a pickle of NumPy arrays"):
        open_path(tmp_path / "p.pkl")


@pytest.mark.parametrize("length", [0x108, 0x112, 0x280, 0x8B1F, 0x9C78])
def test_a_header_whose_length_begins_like_another_format(tmp_path: Path, length: int):
    """The first bytes of safetensors are a number: they may be those of a pickle, of gzip, of a protobuf."""
    head = b'{"__metadata__":{"by":"pytorch onnx numpy jax"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "a").write_bytes(struct.pack("<Q", length) + head.ljust(length) + bytes(4))
    assert list(open_path(tmp_path / "a")) == ["a"]


def test_torch_pickles_that_speak_of_numpy_are_torchs(tmp_path: Path):
    content = {"note": "numpy, jax and joblib", "a": torch.ones(2)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert list(open_path(tmp_path / "a.pt")) == ["a"]


def test_every_row_has_a_sign_and_a_way_out():
    assert all((row.begins or row.names or row.inside) and row.next for row in FOREIGN)
    assert not any(row.inside and (row.begins or row.names or row.contains) for row in FOREIGN)
    assert foreign_file("model.safetensors", b"\x80\0\0\0\0\0\0\0{") is None


# ---------------------------------------------------------------- folders


@pytest.fixture
def dcp(tmp_path: Path) -> Path:
    torch.distributed.checkpoint.save(
        {"model": {"w": torch.full((2, 3), 5.0)}}, checkpoint_id=str(tmp_path / "run" / "step-10"), no_dist=True
    )
    return tmp_path / "run"


@pytest.mark.parametrize("name", [".", "step-10", "step-10/__0_0.distcp", "step-10/.metadata"])
def test_torch_distributed_checkpoint(dcp: Path, name: str):
    with pytest.raises(FormatError, match=r"torch\.distributed\.checkpoint.*\n.*dcp_to_torch"):
        open_path(dcp / name)


def test_the_way_out_of_a_distributed_checkpoint(dcp: Path, tmp_path: Path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(str(dcp / "step-10"), str(tmp_path / "weights.pt"))
    assert (open_path(tmp_path / "weights.pt").read("w") == 5).all()


FOLDERS = {
    "a SavedModel": (["saved_model.pb", "variables/variables.index"], "SavedModel"),
    "a checkpoint": (["m.index", "m.data-00000-of-00001", "checkpoint"], "TensorFlow checkpoint"),
    "TensorFlow.js": (["model.json", "group1-shard1of1.bin"], r"TensorFlow\.js"),
    "Core ML": (["Manifest.json", "Data/m"], "Core ML"),
    "zarr 2": ([".zgroup", "a/.zarray"], "zarr"),
    "zarr 3": (["zarr.json"], "zarr"),
    "zarr below": (["a/.zarray", "b/.zarray"], "zarr"),
    "ZeRO": (["zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"], "zero_to_fp32"),
    "ZeRO below": (["latest", "global_step1/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "zero_to_fp32"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_others(tmp_path: Path, kind: str):
    names, text = FOLDERS[kind]
    for name in names:
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(b"\0\0\x01")
    with pytest.raises(FormatError, match=text):
        open_path(tmp_path / "f")


def test_a_model_folder_beside_other_formats_is_read(tmp_path: Path):
    safetensors.numpy.save_file({"a": np.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "tf_model.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    assert list(open_path(tmp_path)) == ["a"]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model\.onnx is an ONNX model"):
        open_path(tmp_path)


def test_a_tensorflow_checkpoint_by_its_prefix(tmp_path: Path):
    (tmp_path / "m.ckpt.index").write_bytes(b"\0\0\x01")
    with pytest.raises(FormatError, match="TensorFlow checkpoint"):
        open_path(tmp_path / "m.ckpt")
    with pytest.raises(StorageError):
        open_path(tmp_path / "m")


# ---------------------------------------------------------------- slices

SETS = {
    "consolidated.{:02d}.pth": True,
    "mp_rank_{:02d}_model_states.pt": True,
    "layer_00-model_{:02d}-model_states.pt": True,
    "checkpoint_last-model_part-{}.pt": True,
    "model-rank-{}-part-0.safetensors": True,
    "shard-{:05d}-model-00001-of-00001.safetensors": False,
}
"""name -> does it say by itself that it is a slice?"""


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file({"w": np.ones((2, 4), "float32")}, path)
    else:
        torch.save({"w": torch.ones(2, 4)}, path)


@pytest.mark.parametrize("form", SETS)
def test_slices_of_tensors(tmp_path: Path, form: str):
    first, second = (tmp_path / form.format(i) for i in range(2))
    save(first)
    assert list(open_path(first)) == ["w"]  # the only one: all of it
    save(second)
    for path in (tmp_path, first, second, f"{second}::w"):
        with pytest.raises(FormatError, match=r"slices.*\n?.*Join them"):
            open_path(path)
    first.unlink()
    if SETS[form]:
        with pytest.raises(FormatError, match="slices"):
            open_path(second)
    else:
        assert list(open_path(second)) == ["w"]


def test_folders_of_megatron(tmp_path: Path):
    for rank in ("mp_rank_00_000", "mp_rank_00_001"):
        save(tmp_path / "iter_0001000" / rank / "model_optim_rng.pt")
    for path in (tmp_path, tmp_path / "iter_0001000", tmp_path / "iter_0001000" / rank / "model_optim_rng.pt"):
        with pytest.raises(FormatError, match="Megatron"):
            open_path(path)
    shutil.rmtree(tmp_path / "iter_0001000" / "mp_rank_00_001")
    assert list(open_path(tmp_path / "iter_0001000" / "mp_rank_00_000" / "model_optim_rng.pt")) == ["w"]


@pytest.mark.parametrize(
    "form",
    [
        "model.tp{}.pt",
        "model_tp_rank_{:02d}.safetensors",
        "rank{}.safetensors",
        "rank{}/m.safetensors",
        "top_rank_{}.pt",
        "fold-shard{}.pt",
        "camera-mp{}.pt",
        "model_part-{}.pt",
        "mp_rank_{}/m.pt",
        "consolidated.{}.pth",
    ],
)
def test_what_may_be_slices_or_an_ensemble_is_opened_and_hinted_at_where_it_does_not_fit(tmp_path: Path, form: str):
    for i in (1, 2):
        save(tmp_path / form.format(i))
        assert list(open_path(tmp_path / form.format(i))) == ["w"]
    source = f"{tmp_path / form.format(2)}"
    said = {} if form.endswith((".pt", ".pth")) else {"source_side": "torch"}
    assert gx.plan(source, {"w": np.zeros((2, 4), "float32")}, to="torch", **said).complete
    plan = gx.plan(source, {"w": np.zeros((4, 4), "float32")}, to="torch", **said)
    hinted = "may be tensor-parallel slices" in str(plan.failures)
    assert not plan.complete
    assert hinted == ("consolidated" not in form)
    if "/" not in form:
        with pytest.raises(FormatError, match="holds 2 checkpoints"):
            open_path(tmp_path)
    (tmp_path / form.format(1)).unlink()
    assert list(open_path(source)) == ["w"]


@pytest.mark.parametrize("name", ["best.data-00000-of-00001.pt", "group1-shard1of1.bin", "zarr.json.pt", "m.onnx_data"])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saved_is_torch_under_any_name(tmp_path: Path, name: str, zipped: bool):
    torch.save({"w": torch.ones(2, 4)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    found = open_path(tmp_path / name)
    assert (found.side, list(found)) == ("torch", ["w"])


def test_other_numbers_are_no_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The rank of an adapter, states of random generators, epochs; also by a relative name."""
    for name in ("lora_rank_1.pt", "lora_rank_2.pt", "rng_state_0.pth", "rng_state_1.pth", "epoch_0.pt", "epoch_1.pt"):
        save(tmp_path / name)
        assert list(open_path(tmp_path / name)) == ["w"]
    save(tmp_path / "consolidated.00.pth")
    save(tmp_path / "consolidated.01.pth")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match="slices"):
        open_path("consolidated.00.pth")


def test_mlx_keeps_channels_last(tmp_path: Path):
    arrays = {"fc.weight": np.ones((2, 3), "float32"), "conv.weight": np.ones((4, 3, 3, 3), "float32")}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors", {"format": "mlx"})
    with pytest.raises(FormatError, match=r"MLX.*\n.*conv\.weight"):
        open_path(tmp_path / "a.safetensors")
    del arrays["conv.weight"]
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors", {"format": "mlx"})
    assert open_path(tmp_path / "a.safetensors").side == "torch"


def test_folders_that_cannot_be_looked_into_say_nothing(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere", tmp_path / "link")
    with pytest.raises(FormatError, match="not a checkpoint"):
        open_path(tmp_path)
