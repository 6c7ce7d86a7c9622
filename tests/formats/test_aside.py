"""graftax.formats.aside: arrays that stand in folders beside a msgpack file are read, as Orbax reads them, or named."""

import json
import shutil
from pathlib import Path

import flax.serialization
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from flax import config
from flax.training import checkpoints

from graftax.errors import FormatError, PlanError, UnsafeInputError
from graftax.formats import open_path

KERNEL = np.random.default_rng(0).standard_normal((4, 3)).astype("float32")
SCALE = np.arange(5).astype(ml_dtypes.bfloat16)


def store(folder: Path, array: np.ndarray, driver: str = "zarr") -> None:
    """As Orbax and T5X do it."""
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{folder}/"}}
    opened = tensorstore.open(spec, create=True, dtype=array.dtype.name, shape=array.shape).result()
    opened.write(array).result()


def old_item(folder: Path) -> Path:
    """An item of Orbax before 0.5."""
    folder.mkdir(parents=True)
    store(folder / "params.a.kernel", KERNEL)
    store(folder / "params.b.scale", SCALE)
    tree = {
        "params": {
            "a": {"bias": np.ones(3, "float32"), "kernel": "PLACEHOLDER://params.a.kernel"},
            "b": {"scale": "PLACEHOLDER://params.b.scale"},
        },
        "step": np.int32(3),
    }
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
    return folder


def test_orbax_before_0_5(tmp_path: Path):
    item = old_item(tmp_path / "run" / "10" / "default")
    theirs = ocp.PyTreeCheckpointer().restore(item)["params"]
    for path in (item, item / "checkpoint", item.parent, item.parent.parent):
        found = open_path(path)
        assert set(found) == {"params/a/bias", "params/a/kernel", "params/b/scale", "step"}
        assert found.read("params/a/kernel").tobytes() == KERNEL.tobytes() == theirs["a"]["kernel"].tobytes()
        assert found.read("params/b/scale").tobytes() == SCALE.tobytes()
        assert found.read("params/a/bias").tobytes() == np.ones(3, "float32").tobytes()
        assert item / "params.a.kernel" / ".zarray" in found.storage.files
    assert set(open_path(f"{item}::params/a")) == {"bias", "kernel"}


def test_its_steps(tmp_path: Path):
    for step in ("10", "20"):
        old_item(tmp_path / step / "default")
    with pytest.raises(PlanError, match="2 steps"):
        open_path(tmp_path)
    assert "params/a/kernel" in open_path(tmp_path / "20")


def test_arrays_that_are_not_there_are_named(tmp_path: Path):
    item = old_item(tmp_path / "item")
    shutil.rmtree(item / "params.a.kernel")
    for path in (item, item / "checkpoint"):
        with pytest.raises(FormatError, match=r"Orbax before 0\.5; 1 of its arrays") as caught:
            open_path(path)
        assert [failure.key for failure in caught.value.failures] == ["params/a/kernel"]
        assert "PLACEHOLDER://params.a.kernel" in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "/gone/checkpoint_1000/", "gs://bucket/checkpoint_1000/"])
def test_t5x(tmp_path: Path, prefix: str):
    folder = tmp_path / "checkpoint_1000"
    store(folder / "target.logits.kernel", KERNEL)
    spec = {"driver": "zarr", "dtype": "float32", "metadata": {"chunks": [4, 3], "shape": [4, 3]}}
    spec["kvstore"] = {"driver": "file", "path": f"{prefix}target.logits.kernel"}
    target = {"logits": {"kernel": spec}, "norm": {"scale": np.ones(3, "float32")}}
    state = {"version": 3, "optimizer": {"target": target}}
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(state))
    for path in (folder, folder / "checkpoint", tmp_path):
        found = open_path(path)
        assert set(found) == {"version", "optimizer/target/logits/kernel", "optimizer/target/norm/scale"}
        assert found.read("optimizer/target/logits/kernel").tobytes() == KERNEL.tobytes()
    shutil.rmtree(folder / "target.logits.kernel")
    with pytest.raises(FormatError, match="T5X"):
        open_path(folder)


def test_arrays_that_processes_shared(tmp_path: Path):
    store(tmp_path / "checkpoint_5_gda" / "params" / "a", KERNEL)
    tree = {"params": {"a": "//GDAPlaceholder:params/a"}}
    (tmp_path / "checkpoint_5").write_bytes(flax.serialization.msgpack_serialize(tree))
    assert open_path(tmp_path / "checkpoint_5").read("params/a").tobytes() == KERNEL.tobytes()


@pytest.mark.parametrize("name", ["../a", "/etc", "a/../../b", "link"])
def test_out_of_the_folder(tmp_path: Path, name: str):
    (tmp_path / "item").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "item" / "link").symlink_to(tmp_path / "a")
    tree = {"a": f"PLACEHOLDER://{name}"}
    (tmp_path / "item" / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
    with pytest.raises(UnsafeInputError, match="names"):
        open_path(tmp_path / "item")


def test_an_array_that_asks_for_too_much(tmp_path: Path):
    store(tmp_path / "a", np.ones(4, "float32"))
    meta = json.loads((tmp_path / "a" / ".zarray").read_text())
    (tmp_path / "a" / ".zarray").write_text(json.dumps(meta | {"shape": [1 << 34], "chunks": [1 << 30]}))
    (tmp_path / "checkpoint").write_bytes(flax.serialization.msgpack_serialize({"a": "PLACEHOLDER://a"}))
    with pytest.raises(UnsafeInputError, match="too much"):
        open_path(tmp_path)


def test_text_alone_is_no_checkpoint(tmp_path: Path):
    (tmp_path / "a.msgpack").write_bytes(flax.serialization.msgpack_serialize({"note": "PLACEHOLDER"}))
    with pytest.raises(FormatError, match=r"no tensors\nIt holds: note"):
        open_path(tmp_path / "a.msgpack")


def test_what_flax_saved_in_a_folder(tmp_path: Path):
    """flax.training.checkpoints without Orbax: files without an ending."""
    before = config.flax_use_orbax_checkpointing
    config.update("flax_use_orbax_checkpointing", False)
    try:
        checkpoints.save_checkpoint(tmp_path, {"params": {"k": KERNEL}}, 9)
        for path in (tmp_path, tmp_path / "checkpoint_9"):
            assert open_path(path).read("params/k").tobytes() == KERNEL.tobytes()
        checkpoints.save_checkpoint(tmp_path, {"params": {"k": KERNEL}}, 10, keep=2)
    finally:
        config.update("flax_use_orbax_checkpointing", before)
    with pytest.raises(PlanError, match=r"2 steps[^$]*latest is .*checkpoint_10"):
        open_path(tmp_path)
    assert list(open_path(f"{tmp_path}::checkpoint_9/params")) == ["k"]
