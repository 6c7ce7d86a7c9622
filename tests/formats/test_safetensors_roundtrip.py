"""What is written comes back bit for bit, in every dtype, and the official library reads and writes the same."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftax.errors import FormatError, PlanError
from graftax.formats import Output, open_path, safetensors_file, save
from graftax.formats.safetensors_header import CODES, NAMES
from graftax.tree import DTYPES, Checkpoint, Key, Side, TensorSpec
from graftax.tree.dtypes import from_storage, numpy_dtype, spec_of, storage_bytes, unpack

Arrays = dict[str, np.ndarray[Any, Any]]


def output_of(arrays: Arrays, side: Side = "torch", **more: Any) -> Output:
    return Output({k: spec_of(v) for k, v in arrays.items()}, list(arrays.items()), side, **more)


def raw_of(found: Checkpoint, path: str) -> bytes:
    return storage_bytes(found.read(path), found[path]).tobytes()


def random_raw(spec: TensorSpec, seed: int) -> bytes:
    """Any bytes are a value (NaNs with payloads too), but for booleans and what fills a packed type's last byte."""
    raw = np.random.default_rng(seed).integers(0, 256, spec.nbytes, dtype=np.uint8)
    return (raw & 1 if spec.dtype == "bool" else raw).tobytes()


# ---------------------------------------------------------------- write, then read


specs = st.builds(
    lambda dtype, shape: TensorSpec(tuple(shape), dtype),
    st.sampled_from(sorted(CODES)),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 8]), max_size=5) | st.just([1] * 60),
).filter(lambda spec: spec.size * spec.bits % 8 == 0)
names = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")


@settings(max_examples=150, deadline=None)
@given(tree=st.dictionaries(names, specs, max_size=6), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_write_read_identity(tmp_path_factory: pytest.TempPathFactory, tree: Any, seed: int, data: Any):
    raw = {name: random_raw(spec, seed + i) for i, (name, spec) in enumerate(tree.items())}
    arrays = [(name, from_storage(raw[name], spec)) for name, spec in tree.items()]
    order = data.draw(st.permutations(arrays))
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    save(path, Output(tree, iter(order), "flax"))
    found = open_path(path)
    assert dict(found) == tree
    assert list(found) == list(tree)
    for name in tree:
        assert raw_of(found, name) == raw[name]
    again = path.with_name("y.safetensors")
    save(again, Output(tree, iter(arrays), "flax"))
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", sorted(CODES))
def test_every_code_of_every_dtype(tmp_path: Path, name: str):
    """All bytes of the small types, all 16-bit patterns of the others: NaN payloads, -0.0, subnormals."""
    bits = DTYPES[name][0]
    raw = b"\0\1" if name == "bool" else np.arange(2**16, dtype="<u2").tobytes()
    raw *= 3 if bits == 6 else 1
    spec = TensorSpec((len(raw) * 8 // bits,), name)
    save(tmp_path / "x.safetensors", Output({"x": spec}, [("x", from_storage(raw, spec))], "torch"))
    assert raw_of(open_path(tmp_path / "x.safetensors"), "x") == raw


@pytest.mark.parametrize("name", [n for n in CODES if DTYPES[n][0] < 8])
def test_packed_types_may_come_as_codes(tmp_path: Path, name: str):
    spec = TensorSpec((3, 8), name)
    raw = random_raw(spec, 1)
    codes = unpack(np.frombuffer(raw, np.uint8), spec)
    assert spec_of(codes) == spec
    save(tmp_path / "x.safetensors", Output({"x": spec}, [("x", codes)], "torch"))
    assert raw_of(open_path(tmp_path / "x.safetensors"), "x") == raw


def test_strided_views_are_written_in_their_own_order(tmp_path: Path):
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    views = {
        "t": base.T,
        "step": base[:, ::2],
        "back": base[::-1],
        "same": np.broadcast_to(np.float32(3), (2, 2)),
        "big": base.astype(">f4"),
        "fortran": np.asfortranarray(base),
        "bf16": base.astype(ml_dtypes.bfloat16).T,
    }
    save(tmp_path / "x.safetensors", output_of(views))
    found = open_path(tmp_path / "x.safetensors")
    official = safetensors.torch.load_file(tmp_path / "x.safetensors")
    for name, view in views.items():
        np.testing.assert_array_equal(found.read(name), view)
        np.testing.assert_array_equal(official[name].float().numpy(), view.astype(np.float32))


def test_read_arrays_belong_to_the_caller(tmp_path: Path):
    save(tmp_path / "x.safetensors", output_of({"x": np.zeros(3)}))
    found = open_path(tmp_path / "x.safetensors")
    found.read("x")[:] = 1
    assert found.read("x").tolist() == [0, 0, 0]


def test_a_tensor_can_be_read_in_pieces(tmp_path: Path):
    save(tmp_path / "x.safetensors", output_of({"a": np.ones(3), "x": np.arange(10, dtype=np.int16)}))
    native = open_path(tmp_path / "x.safetensors").storage.native
    assert native.read_bytes("x", 4, 8) == np.arange(2, 4, dtype=np.int16).tobytes()
    with pytest.raises(IndexError):
        native.read_bytes("x", 4, 21)


# ---------------------------------------------------------------- against the official library


def test_the_official_library_reads_ours(tmp_path: Path):
    """Alignment too: torch cannot view bytes that lie askew. Types the library does not take from NumPy go by torch."""
    kinds = [name for name in CODES if DTYPES[name][0] >= 8 and name != "float8_e8m0fnu"]
    arrays = {
        f"x.{name}": from_storage(random_raw(s := TensorSpec((3, 5), name), i), s) for i, name in enumerate(kinds)
    }
    arrays["scalar"] = np.array(7, np.int64)
    arrays["empty"] = np.zeros((0, 4), np.float16)
    path = tmp_path / "x.safetensors"
    save(path, output_of(arrays))
    official = safetensors.torch.load_file(path)
    assert official.keys() == arrays.keys()
    for name, array in arrays.items():
        tensor = official[name]
        assert tuple(tensor.shape) == array.shape
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert raw == array.tobytes()
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata()["format"] == "pt"


def test_ours_reads_the_official_librarys(tmp_path: Path):
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for code, dtype in safetensors.torch._TYPES.items():
        width = torch.empty((), dtype=dtype).element_size()
        raw = torch.randint(0, 2 if code == "BOOL" else 256, (6 * width,), dtype=torch.uint8)
        tensors[f"m.{code}"] = raw.view(dtype).reshape(2, 3).clone()
    tensors["m.scalar"] = torch.tensor(3.5)
    tensors["m.empty"] = torch.zeros(0, 2)
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    found = open_path(path)
    assert found.side == "torch"
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        assert raw_of(found, name) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), name
        if name.count(".") and (code := name.split(".")[1]) in NAMES:
            assert found[name].dtype == NAMES[code]


def test_all_numpy_dtypes_of_the_official_library(tmp_path: Path):
    rng = np.random.default_rng(0)
    arrays = {n: from_storage(random_raw(s := TensorSpec((4, 3), n), int(rng.integers(99))), s)
              for n in ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
                        "float16", "float32", "float64", "complex64")}  # fmt: skip
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    found = open_path(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        assert found.read(name).tobytes() == array.tobytes()
        assert found.read(name).dtype == numpy_dtype(name)


def test_the_dtypes_of_the_official_library_are_ours():
    """A code the library has and this table has not would be refused as unknown."""
    binary = Path(safetensors.__file__).parent.glob("_safetensors_rust*")
    text = b"".join(path.read_bytes() for path in binary)
    assert all(code.encode() in text for code in ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"))
    assert set(safetensors.torch._TYPES) <= set(NAMES)


# ---------------------------------------------------------------- the header we write


def header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert length % 8 == 0
    return json.loads(raw[8 : 8 + length])


def test_metadata_brings_the_tree_back(tmp_path: Path):
    arrays = {"blocks/0/kernel": np.ones(2), "scales/kernel": np.ones(1), "t/0": np.ones(1)}
    keys: dict[str, Key] = {"blocks/0": 0, "scales/kernel": ("kernel",), "t/0": 0}
    containers = {"": "FrozenDict", "blocks": "list", "t": "tuple"}
    save(tmp_path / "x.safetensors", output_of(arrays, "flax", real_keys=keys, containers=containers))
    found = open_path(tmp_path / "x.safetensors")
    assert found.real_keys == keys
    assert found.containers == containers
    metadata = header_of(tmp_path / "x.safetensors")["__metadata__"]
    assert metadata["format"] == "flax"
    assert json.loads(metadata["graftax"]) == {
        "schema": 1,
        "containers": containers,
        "keys": {"blocks/0": 0, "scales/kernel": ["kernel"], "t/0": 0},
    }


@pytest.mark.parametrize("side", ["torch", "flax"])
def test_the_side_of_our_own_files_is_kept(tmp_path: Path, side: Side):
    """Also where the names tell nothing, or something else."""
    save(tmp_path / "x.safetensors", output_of({"norm.scale": np.ones(2), "a/b": np.ones(2)}, side))
    assert open_path(tmp_path / "x.safetensors").side == side
    save(tmp_path / "y.safetensors", output_of({"bias": np.ones(2)}, side))
    assert open_path(tmp_path / "y.safetensors").side == side


def test_the_side_of_others_files_is_what_they_declare_or_all_names_tell(tmp_path: Path):
    cases: list[tuple[str, dict[str, str], Side | None]] = [
        ("a/kernel", {"format": "pt"}, None),  # one of the two is a mistake
        ("a.kernel", {"format": "pt"}, "torch"),
        ("a.weight", {"format": "flax"}, "flax"),
        ("a.weight", {"format": "np"}, "torch"),
        ("a.kernel", {"format": "tf"}, None),
        ("bias", {"format": "pt"}, "torch"),
        ("bias", {"format": "np"}, None),
        ("bias", {}, None),
    ]
    for name, metadata, side in cases:
        safetensors.numpy.save_file({name: np.ones(2)}, tmp_path / "x.safetensors", metadata)
        assert open_path(tmp_path / "x.safetensors").side == side, (name, metadata)


def test_wide_types_come_first_and_names_keep_their_order(tmp_path: Path):
    arrays = {"a": np.ones(3, np.uint8), "b": np.ones(1, np.float32), "c": np.ones(1), "d": np.ones(1, np.float16)}
    save(tmp_path / "x.safetensors", output_of(arrays))
    header = header_of(tmp_path / "x.safetensors")
    assert [k for k in header if k != "__metadata__"] == list("abcd")
    for name, array in arrays.items():
        assert header[name]["data_offsets"][0] % array.itemsize == 0
    assert list(open_path(tmp_path / "x.safetensors")) == list("abcd")


# ---------------------------------------------------------------- what cannot be written


@pytest.mark.parametrize(
    ("path", "spec", "text"),
    [
        ("a", TensorSpec((2,), "int4"), "Formats that can"),
        ("a", TensorSpec((2,), "complex128"), "npz"),
        ("a", TensorSpec((3,), "float4_e2m1fn"), "whole bytes"),
        ("__metadata__", TensorSpec((2,), "float32"), "keeps this name"),
        ("\ud800", TensorSpec((2,), "float32"), "UTF-8"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, path: str, spec: Any, text: str):
    def tensors():
        raise AssertionError("nothing may be asked for")
        yield

    with pytest.raises(PlanError, match=text):
        save(tmp_path / "x.safetensors", Output({path: spec}, tensors(), "flax"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ([], "never came"),
        ([("a", np.ones(2)), ("a", np.ones(2))], "came twice"),
        ([("b", np.ones(2))], "without a spec"),
        ([("a", np.ones(3))], "does not match its spec"),
        ([("a", np.ones(2, np.float32))], "does not match its spec"),
    ],
)
def test_tensors_that_are_not_what_was_announced(tmp_path: Path, given_: Any, text: str):
    with pytest.raises((PlanError, FormatError), match=text):
        save(tmp_path / "x.safetensors", Output({"a": TensorSpec((2,), "float64")}, given_, "torch"))
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_at_a_time(tmp_path: Path):
    """The writer keeps no tensor: each is gone when the next is made."""
    import weakref

    alive: list[weakref.ref[Any]] = []

    class Watched(np.ndarray):
        pass

    def tensors():
        for name in tree:
            array = np.zeros(1000).view(Watched)
            alive.append(weakref.ref(array))
            yield name, array
            del array
            assert sum(ref() is not None for ref in alive) == 0

    tree = {f"x{i}": TensorSpec((1000,), "float64") for i in range(5)}
    safetensors_file.write(tmp_path / "x.safetensors", Output(tree, tensors(), "torch"))
    assert len(alive) == 5
