"""Values read by position are those that `read` gives, in every format; what lies otherwise is left to `read`."""

from __future__ import annotations

import random
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
import torch

import graftax as gx
from graftax.errors import FormatError, StorageError
from graftax.formats import msgpack_file, open_path
from graftax.tree import Checkpoint

BIG = np.arange(70 * 90, dtype=np.float32).reshape(70, 90)


def spans_agree(checkpoint: Checkpoint, expected_whole: set[str]) -> None:
    assert checkpoint.storage.span is not None
    assert checkpoint.storage.whole == expected_whole
    rng = random.Random(0)
    for name, spec in checkpoint.specs.items():
        if name in expected_whole:
            assert not checkpoint.storage.by_position(name)
            continue
        raw = np.ascontiguousarray(checkpoint.read(name)).tobytes()
        for _ in range(8):
            start = rng.randrange(spec.nbytes + 1)
            buffer = bytearray(rng.randrange(spec.nbytes - start + 1))
            checkpoint.storage.span(name, start, memoryview(buffer))
            assert buffer == raw[start : start + len(buffer)], name
        with pytest.raises((FormatError, IndexError)):
            checkpoint.storage.span(name, 0, memoryview(bytearray(spec.nbytes + 1)))


@pytest.mark.parametrize("legacy", [False, True])
def test_torch(tmp_path: Path, legacy: bool) -> None:
    big = torch.from_numpy(BIG)
    state = {
        "plain": big,
        "rows": big[3:20],  # a part of a storage, contiguous
        "turned": big.t(),
        "columns": big[:, 2:5],
        "half": big.to(torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "conj": torch.ones(3, dtype=torch.complex64).conj(),
    }
    with open(tmp_path / "x.pt", "wb") as file:
        torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    spans_agree(open_path(tmp_path / "x.pt"), {"turned", "columns", "conj"})
    inside = open_path(f"{tmp_path / 'x.pt'}::.")
    assert inside.storage.whole == {"turned", "columns", "conj"}


def test_torch_big_endian_and_compressed(tmp_path: Path) -> None:
    with open(tmp_path / "x.pt", "wb") as file:
        torch.save({"a": torch.from_numpy(BIG), "b": torch.ones(3, dtype=torch.uint8)}, file)
    with zipfile.ZipFile(tmp_path / "x.pt") as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as new:
        for name, raw in parts.items():
            new.writestr(name, b"big" if name.endswith("byteorder") else raw)
    spans_agree(open_path(tmp_path / "big.pt"), {"a"})
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name, raw in parts.items():
            new.writestr(name, raw, zipfile.ZIP_STORED if name.endswith("data/1") else None)
    spans_agree(open_path(tmp_path / "packed.pt"), {"a"})


def test_npz(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "plain": BIG,
        "fortran": np.asfortranarray(BIG),
        "vector": np.asfortranarray(BIG[0]),
        "swapped": BIG.astype(">f4"),
        "bytes": np.arange(9, dtype=np.int8),
        "scalar": np.array(7),
        "empty": np.zeros((0, 3)),
    }
    np.savez(tmp_path / "x.npz", **arrays)
    spans_agree(open_path(tmp_path / "x.npz"), {"fortran", "swapped"})
    np.savez_compressed(tmp_path / "y.npz", **arrays)
    spans_agree(open_path(tmp_path / "y.npz"), set(arrays))


def test_msgpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
    tree = {
        "chunked": BIG,
        "small": BIG[:2, :3].copy(),
        "half": BIG[0].astype(ml_dtypes.bfloat16),
        "packed": np.arange(5).astype(ml_dtypes.int4),
        "number": 3,
        "list": [np.ones(2), np.zeros((0, 3))],
    }
    (tmp_path / "x.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    opened = open_path(tmp_path / "x.msgpack")
    assert opened.read("chunked").tobytes() == BIG.tobytes()
    spans_agree(opened, {"packed", "number"})
    assert msgpack_file.CHUNK == 1 << 30


@pytest.mark.parametrize("name", ["x.npz", "x.pt"])
def test_a_damaged_member_is_found_before_a_byte_of_it_is_given_out(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "x.npz":
        np.savez(path, a=BIG)
    else:
        with open(path, "wb") as file:
            torch.save({"a": torch.from_numpy(BIG)}, file)
    raw = bytearray(path.read_bytes())
    at = bytes(raw).index(BIG.tobytes())
    raw[at + BIG.nbytes - 1] ^= 1
    path.write_bytes(raw)
    span = open_path(path).storage.span
    assert span is not None
    with pytest.raises(FormatError, match="damaged"):
        span("a", 0, memoryview(bytearray(4)))
    opened = open_path(path)
    path.write_bytes(raw + b"x")
    assert opened.storage.span is not None
    with pytest.raises(StorageError, match="changed"):
        opened.storage.span("a", 0, memoryview(bytearray(4)))


@pytest.mark.parametrize("name", ["s.pt", "s.npz", "s.msgpack"])
def test_a_port_reads_them_by_position(tmp_path: Path, name: str) -> None:
    array = np.arange(1200 * 900, dtype=np.float32).reshape(1200, 900)
    if name == "s.pt":
        with open(tmp_path / name, "wb") as file:
            torch.save({"fc.weight": torch.from_numpy(array)}, file)
    elif name == "s.npz":
        np.savez(tmp_path / name, allow_pickle=False, **{"fc.weight": array})
    else:
        (tmp_path / name).write_bytes(flax.serialization.msgpack_serialize({"fc": {"kernel": array}}))
    found = open_path(tmp_path / name)
    storage = replace(found.storage, reader=lambda path: pytest.fail(f"{path} was read whole"))
    opened = replace(found, storage=storage)
    rules = [{"torch": "fc.weight", "flax": "fc/kernel", "layout": "linear"}]
    side = "torch" if name == "s.msgpack" else "flax"
    gx.port_file(opened, None, tmp_path / "o.safetensors", rules=rules, to=side, max_memory="2MiB")
    made = open_path(tmp_path / "o.safetensors")
    assert np.array_equal(made.read(next(iter(made))), array.T)
