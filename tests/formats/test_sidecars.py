"""graftax.formats.sidecars: what stands beside the weights in a model folder comes along, byte for byte."""

import json
import os
from collections import OrderedDict
from pathlib import Path

import flax.serialization
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch

import graftax as gx
from graftax.errors import StorageError
from graftax.formats import open_path
from graftax.formats.sidecars import beside
from graftax.surgery import write_replacement
from graftax.surgery.values import constant

WEIGHTS = {"model.a.weight": np.ones((4, 8), "float32"), "model.b.weight": np.ones((4, 4), "float32")}
SIDECARS = {
    "config.json": b'{"model_type": "x"}\r\n',
    "tokenizer.json": b"{}",
    "tokenizer.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0",
    "merges.txt": "#version: 0.2\n\u0120 t".encode(),
    "vocab.txt.gz": b"\x1f\x8b\x08x",
    "modeling_x.py": b"x = 1\n",
    "empty.txt": b"",
    "1_Pooling/config.json": b"{}",
}
OTHERS = {
    "flax_model.msgpack": b"\x81\xa1a\x01",
    "tf_model.h5": b"\x89HDF\r\n\x1a\n",
    "onnx/model.onnx": b"\x08\x07\x12\x07pytorch",
    "optimizer.pt": b"x",
    "pytorch_model.bin.index.json": b"{}",
    "weights": b"\x08\x07\x12\x07pytorch",
}
UNSEEN = {".cache/x": b"x", ".gitattributes": b"x", "__pycache__/x.pyc": b"x"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    index = {"metadata": {}, "weight_map": {}}
    for i, (name, array) in enumerate(WEIGHTS.items()):
        (folder / "x").parent.mkdir(exist_ok=True)
        safetensors.numpy.save_file({name: array}, folder / f"part-{i}.safetensors", {"format": "pt"})
        index["weight_map"][name] = f"part-{i}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, content in (SIDECARS | OTHERS | UNSEEN).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder but its weights."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("model")} | {
        name: path.read_bytes() for name, path in found.items() if name == "modeling_x.py"
    }


def replaced(model: Path, out: Path) -> list[str]:
    return write_replacement(open_path(model), "model.a.weight", constant(2.0), out)["notes"]


def test_replace(model: Path, tmp_path: Path):
    notes = replaced(model, tmp_path / "out")
    assert content(tmp_path / "out") == SIDECARS
    assert (open_path(tmp_path / "out").read("model.a.weight") == 2).all()
    assert "config.json" in notes[0]
    assert all(name in notes[1] for name in OTHERS)


def test_an_index_stands_for_its_folder(model: Path, tmp_path: Path):
    replaced(model / "model.safetensors.index.json", tmp_path / "out")
    assert content(tmp_path / "out") == SIDECARS


def test_a_file_does_not(model: Path, tmp_path: Path):
    replaced(model / "part-0.safetensors", tmp_path / "out")
    assert content(tmp_path / "out") == {}


def test_again_over_what_was_written(model: Path, tmp_path: Path):
    out = tmp_path / "out"
    replaced(model, out)
    replaced(model, out)
    assert content(out) == SIDECARS
    (out / "tokenizer.json").write_text("mine")
    with pytest.raises(StorageError, match=r"holds 1 files.*\n.*tokenizer\.json"):
        replaced(model, out)
    (out / "tokenizer.json").write_bytes(SIDECARS["tokenizer.json"])
    (out / "mine.txt").write_text("x")
    with pytest.raises(StorageError, match=r"mine\.txt"):
        replaced(model, out)
    assert content(out) == SIDECARS | {"mine.txt": b"x"}


@pytest.mark.parametrize("resume", [False, True])
def test_port_into_a_folder_like_it(model: Path, tmp_path: Path, resume: bool):
    safetensors.numpy.save_file(
        {k: v * 3 for k, v in WEIGHTS.items()}, tmp_path / "tuned.safetensors", {"format": "pt"}
    )
    receipt = gx.port_file(str(tmp_path / "tuned.safetensors"), model, tmp_path / "out", resume=resume)
    assert content(tmp_path / "out") == SIDECARS
    assert any("config.json" in note for note in receipt.notes)
    assert (open_path(tmp_path / "out").read("model.b.weight") == 3).all()
    gx.port_file(str(tmp_path / "tuned.safetensors"), model, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").is_file()


def test_port_of_a_folder_whose_leaves_stay(model: Path, tmp_path: Path):
    like = OrderedDict((name, torch.zeros(array.shape)) for name, array in WEIGHTS.items())
    gx.port_file(model, like, tmp_path / "out")
    assert content(tmp_path / "out") == SIDECARS
    renamed = OrderedDict((f"net.{name}", tensor) for name, tensor in like.items())
    gx.port_file(model, renamed, tmp_path / "renamed")
    assert content(tmp_path / "renamed") == {}  # the settings are those of other names


def test_links(model: Path, tmp_path: Path):
    (tmp_path / "secret").write_text("x")
    (model / "evil.txt").symlink_to(tmp_path / "secret")
    (model / "linked.json").symlink_to("tokenizer.json")
    (model / "loop").symlink_to("loop")
    (model / "up").symlink_to(tmp_path)
    os.mkfifo(model / "pipe")
    notes = replaced(model, tmp_path / "out")
    assert content(tmp_path / "out") == SIDECARS | {"linked.json": b"{}"}
    assert not (tmp_path / "out" / "linked.json").is_symlink()
    assert "evil.txt" in notes[1]


def test_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    safetensors.numpy.save_file(WEIGHTS, repo / "blobs" / "1", {"format": "pt"})
    (repo / "blobs" / "2").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    write_replacement(open_path("org/name"), "model.a.weight", constant(2.0), tmp_path / "out")
    assert content(tmp_path / "out") == {"config.json": b"{}"}
    assert not (tmp_path / "out" / "config.json").is_symlink()


def test_into_orbax(tmp_path: Path):
    """A Flax folder's OUT without an ending: its settings come along, and come along again; Orbax minds neither."""
    folder = tmp_path / "flax"
    folder.mkdir()
    (folder / "flax_model.msgpack").write_bytes(
        flax.serialization.msgpack_serialize({"params": {"d": {"kernel": np.zeros((2, 3), "float32")}}})
    )
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    for source, out in ((folder, "one"), (tmp_path / "one", "two"), (tmp_path / "one", "two")):
        write_replacement(open_path(source), "**/kernel", constant(1.0), tmp_path / out)
        assert {"config.json", "tokenizer.json"} <= set(os.listdir(tmp_path / out))
    assert open_path(tmp_path / "two").config == {}
    assert (ocp.StandardCheckpointer().restore(tmp_path / "two")["params"]["d"]["kernel"] == 1).all()


def test_what_changes_while_it_is_copied(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    found = beside(open_path(model))
    assert found is not None
    copyfile = shutil.copyfile

    def meanwhile(source, target):
        copyfile(source, target)
        Path(source).write_bytes(b"another")

    monkeypatch.setattr(shutil, "copyfile", meanwhile)
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match="changed"):
        found.copy(tmp_path / "out")
