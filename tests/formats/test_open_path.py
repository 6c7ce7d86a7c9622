"""open_path: what a thing is, is told by its content; what cannot be opened is called by its name."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from graftax.errors import FormatError, GraftaxError, PlanError, StorageError, UnsafeInputError, UsageError
from graftax.formats import FORMATS, Output, open_path, save
from graftax.formats.io import strict_json
from graftax.formats.spec_file import dump_spec
from graftax.tree import Checkpoint, Live, Module, Side, Storage, TensorSpec, Trace
from graftax.tree.dtypes import spec_of
from graftax.tree.parts import sub_checkpoint

Arrays = dict[str, np.ndarray[Any, Any]]
TORCH: Arrays = {"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "fc.bias": np.ones(2, np.float32)}
FLAX: Arrays = {"params/fc/kernel": np.arange(6, dtype=np.float32).reshape(3, 2), "params/fc/bias": np.ones(2)}


def output_of(arrays: Arrays, side: Side = "torch", **more: Any) -> Output:
    return Output({k: spec_of(v) for k, v in arrays.items()}, list(arrays.items()), side, **more)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A safetensors file in a folder of its own."""
    folder = tmp_path / "model"
    folder.mkdir()
    save(folder / "x.safetensors", output_of(TORCH))
    return folder / "x.safetensors"


# ---------------------------------------------------------------- content, not ending


@pytest.mark.parametrize("name", ["x", "x.pt", "x.npz", "x.msgpack", "x.json", "x.safetensors", "x.SAFETENSORS"])
def test_content_tells_the_format(model: Path, name: str):
    path = model.rename(model.with_name(name))
    assert open_path(path).storage.format == "safetensors"
    assert open_path(str(path)).read("fc.weight").tolist() == TORCH["fc.weight"].tolist()


def test_every_format_opens_what_it_wrote(tmp_path: Path):
    for row in FORMATS.values():
        for side, arrays in (("torch", TORCH), ("flax", FLAX)):
            if side not in row.sides or row.name == "spec":
                continue
            path = tmp_path / f"{row.name}-{side}"
            assert save(path, output_of(arrays, side), format=row.name).format == row.name
            found = open_path(path)
            assert found.side == side, row.name
            for name, array in arrays.items():
                assert found[name] == spec_of(array)
                np.testing.assert_array_equal(found.read(name), array)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "Git LFS pointer"),
        (b"\n  <!DOCTYPE html><html><body>404</body></html>", "HTML page"),
        (b"<HTML><head>", "HTML page"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><Error>AccessDenied</Error>", "XML"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"GGUF\3\0\0\0" + bytes(100), "GGUF"),
        (b"\x93NUMPY\1\0" + bytes(100), "one NumPy array"),
        (b"\x1f\x8b\x08" + bytes(100), "gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "zstd"),
        (b"\xc1\x01" * 40, r"begins with \\xc1\\x01"),
        (b"\xff" * 100, "not in a format"),
        (b"PK\x05\x06" + bytes(18), "format|zip"),
        (b'{"hello": 1}', "not a spec file"),
        (b'{"hello": ', "broken JSON"),
    ],
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x"])
def test_what_no_format_knows(tmp_path: Path, content: bytes, text: str, name: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FormatError, match=text) as caught:
        open_path(path)
    assert caught.value.exit_code == 3
    assert name in str(caught.value)


def test_unknown_content_names_the_known_formats(tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes(b"\xc1garbage\x1b[0m")
    with pytest.raises(FormatError, match=r"though it ends in \.safetensors") as caught:
        open_path(tmp_path / "x.safetensors")
    assert all(name in str(caught.value) for name in FORMATS)
    assert "\x1b" not in str(caught.value)


# ---------------------------------------------------------------- what is not there, or no file


def test_a_missing_file_says_what_is_near(model: Path):
    with pytest.raises(StorageError, match=r"does not exist\nNear: .*x\.safetensors"):
        open_path(model.with_name("x.safetensor"))
    with pytest.raises(StorageError, match=r"Near: .*x\.safetensors"):
        open_path(model.with_name("something"))
    with pytest.raises(StorageError, match=r"The folder .*nowhere does not exist either"):
        open_path(model.parent / "nowhere" / "x.safetensors")
    with pytest.raises(StorageError, match=r"y\.safetensors does not exist"):
        open_path(f"{model.parent}/y.safetensors::model")


def test_a_folder_put_aside_is_named(tmp_path: Path):
    (tmp_path / "run.graftax-old").mkdir()
    with pytest.raises(StorageError, match=r"run\.graftax-old was put aside by a stopped run"):
        open_path(tmp_path / "run")


@pytest.mark.parametrize("text", ["a\0b", "a\0::b"])
def test_a_nul_in_a_name(text: str):
    with pytest.raises(StorageError, match=r"a\\x00"):
        open_path(text)


def test_names_that_the_system_refuses(tmp_path: Path):
    with pytest.raises(StorageError):
        open_path(tmp_path / ("x" * 5000))
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(StorageError, match="link"):
        open_path(tmp_path / "a")
    (tmp_path / "c").symlink_to("nothing")
    with pytest.raises(StorageError, match="link to nothing"):
        open_path(tmp_path / "c")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        open_path(tmp_path / "file" / "x.safetensors")


def test_pipes_devices_and_sockets_are_named_and_do_not_hang(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(StorageError, match="named pipe"):
        open_path(tmp_path / "pipe.safetensors")
    with pytest.raises(StorageError, match="character device"):
        open_path("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # the name of a socket is short
        try:
            server.bind("s")
            with pytest.raises(StorageError, match="socket"):
                open_path("s")
        finally:
            os.chdir(here)


def test_a_file_without_permission(model: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Any, *rest: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)  # root may read everything, so a mode would prove nothing
    with pytest.raises(StorageError, match="permission denied"):
        open_path(model)


def test_a_folder_without_a_checkpoint(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FormatError, match="a folder, but not a checkpoint"):
        open_path(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save(tmp_path / name, output_of(TORCH))
    with pytest.raises(FormatError, match=r"Name one of the checkpoints inside: .*a\.safetensors, .*b\.safetensors"):
        open_path(tmp_path)


# ---------------------------------------------------------------- PATH::NAME


def test_a_part_of_a_checkpoint(tmp_path: Path):
    tree = FLAX | {"params/l/0": np.ones(1)}
    save(
        tmp_path / "x.safetensors", output_of(tree, "flax", real_keys={"params/l/0": 0}, containers={"params": "list"})
    )
    found = open_path(f"{tmp_path}/x.safetensors::params/fc")
    assert list(found) == ["kernel", "bias"]
    assert found.side == "flax"
    assert found.label.endswith("x.safetensors::params/fc")
    assert found.read("kernel").tolist() == FLAX["params/fc/kernel"].tolist()
    params = open_path(tmp_path / "x.safetensors::params")
    assert params.real_keys == {"l/0": 0}
    assert params.containers == {"": "list"}


def test_a_part_on_the_torch_side(tmp_path: Path):
    save(tmp_path / "x.safetensors", output_of({"model.enc.fc.weight": np.ones(2), "model.b": np.ones(1)}))
    for name in ("model.enc", "model/enc", "model.enc."):
        assert list(open_path(f"{tmp_path}/x.safetensors::{name}")) == ["fc.weight"]


@pytest.mark.parametrize("form", ["pt", "legacy", "safetensors", "npz"])
def test_a_prefix_of_keys_picks_them_in_every_format(tmp_path: Path, form: str):
    torch = pytest.importorskip("torch")
    arrays = {f"module.enc.{key}": value for key, value in TORCH.items()}
    tensors = {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}
    path = tmp_path / f"x.{'pt' if form == 'legacy' else form}"
    if form in ("pt", "legacy"):
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "pt")
    elif form == "npz":
        np.savez(path, **arrays)
    else:
        safetensors.numpy.save_file(arrays, path)
    for name in ("module.enc", "module/enc", "module.enc."):
        found = open_path(f"{path}::{name}")
        assert sorted(found) == sorted(TORCH)
        assert found.side == "torch"
    with pytest.raises(PlanError):
        open_path(f"{path}::module.en")


def test_a_prefix_inside_a_container(tmp_path: Path):
    torch = pytest.importorskip("torch")
    tensors = {f"module.{key}": torch.from_numpy(value.copy()) for key, value in TORCH.items()}
    torch.save({"state_dict": tensors, "epoch": 1}, tmp_path / "last.ckpt")
    for name in ("state_dict.module", "state_dict/module", "module"):
        assert sorted(open_path(f"{tmp_path}/last.ckpt::{name}")) == sorted(TORCH)
    save(tmp_path / "x.msgpack", output_of(FLAX, "flax"))
    assert list(open_path(f"{tmp_path}/x.msgpack::params.fc")) == ["kernel", "bias"]


def test_a_folder_of_several_lists_them_all(tmp_path: Path):
    torch = pytest.importorskip("torch")
    names = [f"run{i}.safetensors" for i in range(8)]
    for name in names:
        save(tmp_path / name, output_of(TORCH))
    torch.save({"w": torch.ones(1)}, tmp_path / "last.ckpt")
    save(tmp_path / "step", output_of(FLAX, "flax"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FormatError, match="holds 10 checkpoints") as caught:
        open_path(tmp_path)
    assert all(name in str(caught.value) for name in (*names, "last.ckpt", "step"))


def test_the_file_of_a_folder_that_was_opened_is_said(tmp_path: Path):
    for name in ("model.safetensors", "other.safetensors"):
        save(tmp_path / name, output_of(TORCH))
    assert open_path(tmp_path).label == str(tmp_path / "model.safetensors")


def test_no_such_part(model: Path):
    with pytest.raises(PlanError, match=r"nothing below 'fx'\nIt has: fc"):
        open_path(f"{model}::fx")
    with pytest.raises(PlanError, match="key="):
        open_path(f"{model}::fc.weight")
    with pytest.raises(UsageError, match="PATH::NAME"):
        open_path(f"{model}::")


def test_a_path_that_exists_wins(model: Path):
    other = model.with_name("x.safetensors::fc")
    safetensors.numpy.save_file({"other.weight": np.ones(1)}, other)
    assert list(open_path(other)) == ["other.weight"]
    assert list(open_path(f"{other}::other")) == ["weight"]
    other.unlink()
    assert list(open_path(other)) == ["weight", "bias"]


def test_a_part_may_be_a_folder_below(tmp_path: Path):
    (tmp_path / "run" / "7").mkdir(parents=True)
    (tmp_path / "run" / "notes.txt").write_text("x")
    save(tmp_path / "run" / "7" / "items", output_of(TORCH), format="hf_folder")
    assert list(open_path(f"{tmp_path}/run::7/items")) == list(TORCH)
    assert list(open_path(f"{tmp_path}/run::7/items/fc")) == ["weight", "bias"]
    with pytest.raises(FormatError, match="not a checkpoint"):
        open_path(f"{tmp_path}/run::8/items")


def test_all_evidence_moves_with_a_part():
    full = Checkpoint(
        label="live",
        side="torch",
        specs={p: TensorSpec((2,), "float32") for p in ("m.a.weight", "m.b.weight", "m.b.mean", "n.weight")},
        storage=Storage(aliases={"m.b.weight": "m.a.weight", "m.a.weight": "n.weight"}),
        live=Live(
            modules={"m.a": Module("m.a", "Linear", leaves={"weight": "m.a.weight"}), "n": Module("n", "Linear")},
            buffers=frozenset({"m.b.mean"}),
        ),
        config={"heads": 4},
    )
    part = sub_checkpoint(full, "m")
    assert list(part) == ["a.weight", "b.weight", "b.mean"]
    assert part.live.modules == {"a": Module("a", "Linear", leaves={"weight": "a.weight"})}
    assert part.storage.aliases == {"b.weight": "a.weight"}
    assert part.live.buffers == {"b.mean"}
    assert part.config == {"heads": 4}
    assert not part.has_values


def test_a_part_is_read_and_rebuilt_by_the_names_of_the_whole():
    data = {name: np.arange(4, dtype=np.uint8) + i for i, name in enumerate(("m.a.weight", "m.b.weight", "n.weight"))}
    model = object()

    def span(path: str, start: int, buffer: memoryview) -> None:
        buffer[:] = data[path][start : start + len(buffer)].tobytes()

    def scatter(path: str, start: int, buffers: list[memoryview]) -> int:
        for buffer in buffers:
            span(path, start, buffer)
            start += len(buffer)
        return start

    full = Checkpoint(
        label="whole",
        side="torch",
        specs={name: spec_of(array) for name, array in data.items()},
        storage=Storage(
            data.__getitem__,
            span=span,
            scatter=scatter,
            whole=frozenset({"m.b.weight", "n.weight"}),
            format="some",
            files=(Path("file"),),
            metadata={"format": "pt"},
            folder=Path("folder"),
            stored={"m.a.weight": "a", "n.weight": "n"},
            native=object(),
        ),
        live=Live(
            modules={"m": Module("m", "Net", leaves={"a/weight": "m.a.weight"}), "": Module("", "Whole")},
            trace=lambda: Trace({"": 0, "m": 1, "m.a": 2}, {"m.a.weight": (("c", 4),)}, {"n.weight": (("c", 4),)}),
            placed=lambda: {"m.a.weight": "here", "n.weight": "there"},
            rebuild=lambda arrays, **options: (arrays, options),
            object=model,
        ),
        real_keys={"m.a": 0, "n": 1},
        containers={"m": "list", "m.b": "tuple", "n": "list"},
    )
    part = sub_checkpoint(full, "m")
    storage, live = part.storage, part.live
    assert part.read("b.weight") is data["m.b.weight"]
    assert (part.real_keys, part.containers) == ({"a": 0}, {"": "list", "b": "tuple"})
    assert (storage.by_position("a.weight"), storage.by_position("b.weight")) == (True, False)
    assert (storage.in_parts(["a.weight"]), storage.in_parts(part)) == (True, False)
    assert (storage.format, storage.files, storage.metadata) == ("some", (Path("file"),), {"format": "pt"})
    assert (storage.whole, storage.stored) == ({"b.weight"}, {"a.weight": "a"})
    assert (storage.folder, storage.native) == (None, None)  # a part is no model folder and no whole file
    buffer, rest = bytearray(2), bytearray(1)
    assert storage.span is not None
    storage.span("a.weight", 1, memoryview(buffer))
    assert bytes(buffer) == b"\1\2"
    assert storage.scatter is not None
    assert storage.scatter("b.weight", 1, [memoryview(buffer), memoryview(rest)]) == 4
    assert bytes(buffer + rest) == b"\2\3\4"

    assert live.modules == {"": Module("", "Net", leaves={"a/weight": "a.weight"})}
    assert live.trace is not None
    assert live.trace() == Trace({"": 1, "a": 2}, {"a.weight": (("c", 4),)}, {})
    assert live.placed is not None
    assert live.placed() == {"a.weight": "here"}
    assert live.rebuild is not None
    assert live.rebuild({"a.weight": 1}, sharding="host") == ({"m.a.weight": 1}, {"sharding": "host"})
    assert live.object is model


# ---------------------------------------------------------------- config.json


def test_config_beside_a_file(model: Path):
    assert open_path(model).config is None
    beside = model.with_name("config.json")
    beside.write_text('{"num_attention_heads": 4}')
    assert open_path(model).config == {"num_attention_heads": 4}
    assert open_path(model.parent).config == {"num_attention_heads": 4}
    assert open_path(f"{model}::fc").config == {"num_attention_heads": 4}
    for broken in ("{", "[1]", '{"a": 1, "a": 2}'):
        beside.write_text(broken)
        assert open_path(model).config is None
        with pytest.raises(FormatError, match=r"config\.json"):
            open_path(model.parent)


# ---------------------------------------------------------------- sharded folders


def shards(tmp_path: Path, name: str = "s", **more: Any) -> Path:
    """A set of two shards with one tensor each."""
    save(tmp_path / name, output_of(TORCH, shard_size=8), format="hf_folder", **more)
    return tmp_path / name


def reindex(folder: Path, weight_map: Any) -> None:
    text = weight_map if isinstance(weight_map, str) else json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_a_sharded_folder(tmp_path: Path):
    folder = shards(tmp_path)
    assert sorted(os.listdir(folder)) == [ONE, TWO, "model.safetensors.index.json"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 32}, "weight_map": {"fc.weight": ONE, "fc.bias": TWO}}
    for path in (folder, folder / "model.safetensors.index.json"):
        found = open_path(path)
        assert (found.storage.format, found.side) == ("hf_folder", "torch")
        assert {p.name for p in found.storage.files} == set(os.listdir(folder))
        assert list(found) == list(TORCH)
        for name, array in TORCH.items():
            assert found.read(name).tolist() == array.tolist()


def test_the_official_library_reads_our_shards(tmp_path: Path):
    folder = shards(tmp_path)
    assert list(safetensors.numpy.load_file(folder / ONE)) == ["fc.weight"]
    assert safetensors.numpy.load_file(folder / TWO)["fc.bias"].tolist() == [1, 1]


def test_shards_fill_up_to_their_size(tmp_path: Path):
    arrays = {f"x.{i}": np.zeros(n, np.uint8) for i, n in enumerate([3, 3, 4, 20, 1, 9, 0])}
    save(tmp_path / "s", output_of(arrays, shard_size=10))
    found = {}
    for path in sorted((tmp_path / "s").glob("*.safetensors")):
        found[path.name] = list(safetensors.numpy.load_file(path))
    assert list(found.values()) == [["x.0", "x.1", "x.2"], ["x.3"], ["x.4", "x.5", "x.6"]]


def test_tree_metadata_is_spread_over_shards_and_comes_back(tmp_path: Path):
    arrays = {"blocks/0/kernel": np.ones(2), "blocks/1/kernel": np.ones(2), "head/kernel": np.ones(2)}
    keys = {"blocks/0": 0, "blocks/1": 1}
    out = output_of(arrays, "flax", shard_size=16, real_keys=keys, containers={"blocks": "list", "": "FrozenDict"})
    save(tmp_path / "s", out, format="hf_folder")
    found = open_path(tmp_path / "s")
    assert found.side == "flax"
    assert found.real_keys == keys
    assert found.containers == {"blocks": "list", "": "FrozenDict"}


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x", "a\\b", "", ".", "a//b", "./x", "nul\0", "..\\x"]
)
def test_a_shard_name_that_leaves_the_folder(tmp_path: Path, name: str):
    folder = shards(tmp_path)
    save(tmp_path / "x.safetensors", output_of({"fc.bias": TORCH["fc.bias"]}))
    reindex(folder, {"fc.weight": ONE, "fc.bias": name})
    with pytest.raises(UnsafeInputError) as caught:
        open_path(folder)
    assert caught.value.exit_code == 4
    assert "\0" not in str(caught.value)


def test_a_link_out_of_the_folder(tmp_path: Path):
    folder = shards(tmp_path)
    os.rename(folder / TWO, tmp_path / "elsewhere.safetensors")
    (folder / TWO).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UnsafeInputError, match="link out of its folder"):
        open_path(folder)
    (folder / TWO).unlink()
    (folder / "sub").symlink_to(tmp_path)
    reindex(folder, {"fc.weight": ONE, "fc.bias": "sub/elsewhere.safetensors"})
    with pytest.raises(UnsafeInputError, match="link out of its folder"):
        open_path(folder)


def test_links_and_folders_inside_the_folder_are_fine(tmp_path: Path):
    folder = shards(tmp_path)
    (folder / "sub").mkdir()
    os.rename(folder / TWO, folder / "sub" / "two")
    (folder / TWO).symlink_to("sub/two")
    assert open_path(folder).read("fc.bias").tolist() == [1, 1]
    (tmp_path / "link").symlink_to(folder)
    assert open_path(tmp_path / "link").read("fc.bias").tolist() == [1, 1]


def test_a_single_file_that_is_a_link_out_of_its_folder(model: Path):
    other = model.parent.parent / "other"
    other.mkdir()
    (other / "model.safetensors").symlink_to(model)
    with pytest.raises(UnsafeInputError, match="name that file itself"):
        open_path(other)
    assert open_path(other / "model.safetensors").keys() == TORCH.keys()


def test_a_missing_shard(tmp_path: Path):
    folder = shards(tmp_path)
    (folder / TWO).unlink()
    with pytest.raises(StorageError, match=TWO) as caught:
        open_path(folder)
    assert [f.key for f in caught.value.failures] == [TWO]
    reindex(folder, {"fc.weight": ONE, "fc.bias": "../x"})
    with pytest.raises(UnsafeInputError):  # 4 before 5
        open_path(folder)
    (folder / ONE).write_bytes(b"")
    reindex(folder, {"fc.weight": ONE, "fc.bias": TWO})
    with pytest.raises(FormatError) as caught:  # 3 before 5
        open_path(folder)
    assert len(caught.value.failures) == 2


@pytest.mark.parametrize(
    ("weight_map", "text"),
    [
        ({"fc.weight": TWO, "fc.bias": TWO}, "fc.weight"),
        ({"fc.weight": ONE, "fc.bias": TWO, "fc.more": ONE}, "fc.more"),
        ({"fc.weight": ONE}, ""),
        ({"fc.bias": TWO, "fc.weight": TWO}, "in no shard"),
        (f'{{"weight_map": {{"fc.weight": "{ONE}", "fc.weight": "{TWO}"}}}}', "occurs twice"),
        ('{"metadata": {}}', "expected `weight_map`"),
        ('{"weight_map": ["a"]}', "expected `weight_map`"),
        ('{"weight_map": {"a": 1}}', "expected `weight_map`"),
        ("{", "broken JSON"),
        ("[]", "expected a JSON object"),
    ],
)
def test_an_index_that_disagrees_with_its_shards(tmp_path: Path, weight_map: Any, text: str):
    folder = shards(tmp_path)
    reindex(folder, weight_map)
    if weight_map == {"fc.weight": ONE}:
        assert list(open_path(folder)) == ["fc.weight"]  # a shard that is not named is not opened
        return
    with pytest.raises(FormatError, match=text):
        open_path(folder)


def test_a_tensor_in_two_shards(tmp_path: Path):
    folder = shards(tmp_path)
    safetensors.numpy.save_file(TORCH, folder / ONE)
    with pytest.raises(FormatError, match="the index does not list it"):
        open_path(folder)


def test_a_shard_that_changes_while_it_is_read(tmp_path: Path):
    folder = shards(tmp_path)
    found = open_path(folder)
    os.truncate(folder / TWO, (folder / TWO).stat().st_size - 1)
    assert found.read("fc.weight").shape == (2, 3)
    with pytest.raises(StorageError, match="changed"):
        found.read("fc.bias")


def test_one_file_of_a_hugging_face_folder(tmp_path: Path):
    """The single file goes before the index, safetensors before the rest, and what is no model is left alone."""
    folder = shards(tmp_path)
    save(folder / "model.safetensors", output_of({"one.weight": np.ones(1)}))
    (folder / "training_args.bin").write_bytes(b"junk")
    assert list(open_path(folder)) == ["one.weight"]
    (folder / "model.safetensors").unlink()
    assert list(open_path(folder)) == list(TORCH)


def test_shards_may_be_of_other_formats(tmp_path: Path):
    torch = pytest.importorskip("torch")
    folder = tmp_path / "bin"
    folder.mkdir()
    torch.save({"a.weight": torch.ones(2)}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"b.weight": torch.zeros(2)}, folder / "pytorch_model-00002-of-00002.bin")
    names = {f"{n}.weight": f"pytorch_model-0000{i}-of-00002.bin" for n, i in (("a", 1), ("b", 2))}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    found = open_path(folder)
    assert found.side == "torch"
    assert found.read("a.weight").tolist() == [1, 1]


# ---------------------------------------------------------------- the hub cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with org/name as the hub lays it out: the snapshot's files are links into ../../blobs."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / "abc123"
    shards(tmp_path, "made")
    for folder in (repo / "blobs", snapshot, repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123\n")
    (tmp_path / "made" / "config.json").write_text('{"heads": 2}')
    for i, path in enumerate(sorted((tmp_path / "made").iterdir())):
        os.rename(path, repo / "blobs" / f"blob{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{i}")
    return repo


def test_a_hub_id(cache: Path):
    found = open_path("org/name")
    assert found.label == "org/name"
    assert found.read("fc.bias").tolist() == [1, 1]
    assert found.config == {"heads": 2}
    assert list(open_path("org/name::fc")) == ["weight", "bias"]
    assert open_path(cache / "snapshots" / "abc123").keys() == found.keys()


def test_where_the_cache_is(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_CACHE")
    with pytest.raises(StorageError, match="As a hub id it is not in the cache"):
        open_path("org/name")
    for name, value in (("HF_HOME", tmp_path), ("XDG_CACHE_HOME", tmp_path / "xdg"), ("HOME", tmp_path / "home")):
        with monkeypatch.context() as env:
            env.setenv(name, str(value))
            root = {"HF_HOME": value, "XDG_CACHE_HOME": value / "huggingface"}.get(name, value / ".cache/huggingface")
            root.mkdir(parents=True, exist_ok=True)
            if not (root / "hub").exists():
                (root / "hub").symlink_to(tmp_path / "hub")
            assert open_path("org/name").keys() == TORCH.keys()


def test_a_path_goes_before_a_hub_id(cache: Path, tmp_path: Path):
    (tmp_path / "org").mkdir()
    save(tmp_path / "org" / "name", output_of({"own.weight": np.ones(1)}), format="safetensors")
    assert list(open_path("org/name")) == ["own.weight"]


def test_a_cache_that_is_not_whole(cache: Path):
    ref = cache / "refs" / "main"
    for text in ("../../..", "/etc", "..", ""):
        ref.write_text(text)
        with pytest.raises(FormatError, match="does not hold a revision"):
            open_path("org/name")
    ref.write_text("fff")
    with pytest.raises(StorageError, match="incomplete"):
        open_path("org/name")
    ref.unlink()
    assert len(open_path("org/name")) == 2  # the only snapshot
    (cache / "snapshots" / "other").mkdir()
    with pytest.raises(StorageError, match="its `main` is not"):
        open_path("org/name")


def test_a_snapshot_may_not_link_past_its_blobs(cache: Path, tmp_path: Path):
    link = cache / "snapshots" / "abc123" / TWO
    os.rename(link.resolve(), tmp_path / "out.safetensors")
    link.unlink()
    link.symlink_to(tmp_path / "out.safetensors")
    with pytest.raises(UnsafeInputError):
        open_path("org/name")


# ---------------------------------------------------------------- spec files


def test_a_spec_says_all_but_the_values(tmp_path: Path):
    out = output_of(
        FLAX | {"é/0": np.zeros((0, 2), np.int8)}, "flax", real_keys={"é/0": 0}, containers={"": "FrozenDict"}
    )
    save(tmp_path / "x.safetensors", out)
    full = open_path(tmp_path / "x.safetensors")
    (tmp_path / "like").write_text(dump_spec(full))
    spec = open_path(tmp_path / "like")
    assert (spec.storage.format, spec.side, dict(spec), list(spec)) == ("spec", "flax", dict(full), list(full))
    assert spec.real_keys == {"é/0": 0}
    assert spec.containers == {"": "FrozenDict"}
    assert dump_spec(spec) == dump_spec(full)
    assert not spec.has_values
    with pytest.raises(PlanError, match="no values"):
        spec.read("params/fc/bias")
    value = json.loads(dump_spec(full))
    assert value["graftax_spec"] == 1
    assert value["tensors"]["params/fc/kernel"] == {"shape": [3, 2], "dtype": "float32"}


def test_an_empty_spec(tmp_path: Path):
    (tmp_path / "like.json").write_text(dump_spec(Checkpoint("x", None, {})))
    assert len(open_path(tmp_path / "like.json")) == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"graftax_spec": 2}, "version 2"),
        ({"side": "tf"}, "side is 'tf'"),
        ({"tensors": []}, "expected `tensors`"),
        ({"tensors": {"a": {"shape": [-1], "dtype": "float32"}}}, "whole numbers"),
        ({"tensors": {"a": {"shape": [True], "dtype": "float32"}}}, "whole numbers"),
        ({"tensors": {"a": {"shape": [1], "dtype": "F32"}}}, "unknown dtype"),
        ({"tensors": {"a": [1]}}, "whole numbers"),
        ({"keys": {"a/0": {"x": 1}}}, "is not a key"),
        ({"keys": {"a/0": True}}, "is not a key"),
        ({"keys": {"a/0": 1}}, "cannot end in"),
        ({"containers": {"a": "set"}}, "'set'"),
        ({"containers": {"a": ["list"]}}, "'list'"),
        ({"containers": 1}, "must be JSON objects"),
    ],
)
def test_a_spec_that_is_not_well_formed(tmp_path: Path, change: dict[str, Any], text: str):
    good = {"graftax_spec": 1, "side": "flax", "tensors": {}, "keys": {}, "containers": {}}
    (tmp_path / "like.json").write_text(json.dumps(good | change))
    with pytest.raises(FormatError, match=text):
        open_path(tmp_path / "like.json")


def test_a_spec_lists_all_faults(tmp_path: Path):
    tensors = {f"a{i}": {"shape": [1], "dtype": "x"} for i in range(9)}
    (tmp_path / "l").write_text(json.dumps({"graftax_spec": 1, "side": None, "tensors": tensors}))
    with pytest.raises(FormatError) as caught:
        open_path(tmp_path / "l")
    assert len(caught.value.failures) == 9


# ---------------------------------------------------------------- any bytes at all


def test_no_bytes_make_it_fail_otherwise(tmp_path: Path):
    """Cut, flipped and random bytes of a good file: an error of ours or a checkpoint, never another exception."""
    save(tmp_path / "x.safetensors", output_of(FLAX, "flax"))
    good = (tmp_path / "x.safetensors").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "y"
    for i in range(400):
        bad = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            bad[int(rng.integers(0, len(bad) if i % 2 else 60))] = int(rng.integers(0, 256))
        path.write_bytes(bad if i % 5 else struct.pack("<Q", 50) + b"{" + rng.bytes(60))
        try:
            found = open_path(path)
            for name in found:
                found.read(name)
        except GraftaxError:
            pass


# ---------------------------------------------------------------- what would never end


@pytest.mark.parametrize(
    "maps",
    [
        {"model.safetensors": "model.safetensors.index.json"},
        {"model.safetensors": "b.safetensors.index.json", "b.safetensors": "model.safetensors.index.json"},
        {"model.safetensors": "s/m.safetensors.index.json", "s/m.safetensors": "m.safetensors.index.json"},
        {"odd": "odd.index.json"},
    ],
)
def test_an_index_is_no_shard(tmp_path: Path, maps: dict[str, str]):
    for file, target in maps.items():
        (tmp_path / f"{file}.index.json").parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.index.json").write_text(json.dumps({"weight_map": {"a": target}}))
    for path in (tmp_path, *tmp_path.glob("*.index.json")):
        with pytest.raises((FormatError, UnsafeInputError)):
            open_path(path)


def header(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + bytes(4)


DEEP = {
    "a.safetensors": (
        lambda v: header(f'{{"x":{{"dtype":"F32","shape":{v},"data_offsets":[0,4]}}}}'),
        lambda v: header(f'{{"x":{{"dtype":{v},"shape":[1],"data_offsets":[0,4]}}}}'),
        lambda v: header(f'{{"__metadata__":{{"a":{v}}},"x":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}'),
    ),
    "spec.json": (
        str.encode,
        lambda v: f'{{"graftax_spec":{v}}}'.encode(),
        lambda v: f'{{"graftax_spec":1,"side":null,"tensors":{{"x":{{"shape":{v},"dtype":{v}}}}}}}'.encode(),
    ),
    "model.safetensors.index.json": (
        lambda v: f'{{"weight_map":{v}}}'.encode(),
        lambda v: f'{{"weight_map":{{"a":{v}}}}}'.encode(),
    ),
    "_METADATA": (
        lambda v: f'{{"tree_metadata":{v}}}'.encode(),
        lambda v: f'{{"tree_metadata":{{"a":{{"key_metadata":[{{"key":{v},"key_type":{v}}}]}}}}}}'.encode(),
    ),
    "a.msgpack": (lambda v: b"\x81\xa1a" + b"\x91" * v.count("[") + b"\x01",),
    "a.pt": (lambda v: b"\x80\x02)" + b"\x85" * v.count("[") + b".",),
}


@pytest.mark.parametrize("depth", [65, 950, 100_000])
@pytest.mark.parametrize("name", DEEP)
def test_nothing_nests_without_end(tmp_path: Path, name: str, depth: int):
    """Near Python's own limit a value may be parsed and not be shown, or be walked from a deeper place."""
    for make in DEEP[name]:
        for value in ("[" * depth + "1" + "]" * depth, '{"[":' * depth + "1" + "}" * depth):
            (tmp_path / name).write_bytes(make(value))
            with pytest.raises((FormatError, UnsafeInputError)):
                open_path(tmp_path if name == "_METADATA" else tmp_path / name)


def test_json_is_no_deeper_than_trees():
    assert strict_json.parse(b"[" * 64 + b"]" * 64, "x")
    for text in (b"[" * 66 + b"]" * 66, b'{"a":[' * 40 + b"]}" * 40):
        with pytest.raises(FormatError, match="nested too deeply"):
            strict_json.parse(text, "x")
    assert strict_json.parse(b'"' + b"[" * 100 + b'"', "x") == "[" * 100
    assert len(strict_json.parse(b"[" + b",".join([b"[[1]]"] * 100) + b"]", "x")) == 100


@pytest.mark.parametrize("separator", "/.")
def test_names_are_no_deeper_than_trees(tmp_path: Path, separator: str):
    for depth in (64, 66, 5000):
        name = separator.join(["a"] * depth)
        (tmp_path / "a.safetensors").write_bytes(
            header(f'{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}')
        )
        if depth == 64:
            assert list(open_path(tmp_path / "a.safetensors")) == [name]
        else:
            with pytest.raises(UnsafeInputError, match="levels of nesting"):
                open_path(tmp_path / "a.safetensors")


def test_a_folder_with_one_checkpoint_of_no_known_ending_is_that_one(tmp_path: Path):
    torch = pytest.importorskip("torch")
    torch.save({"a.weight": torch.ones(2, 2)}, tmp_path / "last.ckpt")
    (tmp_path / "config.json").write_text('{"width": 2}')
    found = open_path(tmp_path)
    assert (list(found), found.side, found.config) == (["a.weight"], "torch", {"width": 2})
    assert list(open_path(f"{tmp_path}::a")) == ["weight"]
    torch.save({"a.weight": torch.ones(2, 2)}, tmp_path / "best.ckpt")
    with pytest.raises(FormatError, match="holds 2 checkpoints"):
        open_path(tmp_path)
