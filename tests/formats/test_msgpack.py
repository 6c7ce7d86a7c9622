"""graftax.formats.msgpack_file: the bytes are those of flax.serialization, both ways; hostile files are refused."""

import struct
import subprocess
import sys

import flax.serialization
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftax.errors import FormatError, PlanError, StorageError, UnsafeInputError
from graftax.formats import msgpack_file
from graftax.formats.base import Output
from graftax.formats.table import FORMATS
from graftax.tree import DTYPES, TensorSpec, flatten, join_path
from graftax.tree.dtypes import numpy_dtype, pack, spec_of, unpack

HELD = sorted(FORMATS["msgpack"].holds)
PACKED = sorted(name for name, (bits, _) in DTYPES.items() if bits < 8)


def every_bit_pattern(name, count=300):
    """An array of random bytes as dtype `name`: NaN payloads, -0.0 and subnormals are among them."""
    dtype = numpy_dtype(name)
    data = np.random.default_rng(0).integers(0, 256, count * dtype.itemsize, np.uint8)
    return (data % 2).view(bool) if name == "bool" else data.view(dtype)


def opened(tmp_path, data):
    path = tmp_path / "x.msgpack"
    path.write_bytes(data)
    return msgpack_file.open(path)


def by_flax(tree):
    return flax.serialization.msgpack_serialize(tree, in_place=True)


def output(tree, containers=None):
    """An Output of a nested tree of arrays, with its keys that are not text."""
    flat = [(join_path(keys), leaf) for keys, leaf in flatten(tree)]
    real = {join_path(keys[: i + 1]): keys[i] for keys, _ in flatten(tree) for i in range(len(keys))}
    specs = {path: spec_of(leaf) for path, leaf in flat}
    return Output(specs, flat, "flax", {p: k for p, k in real.items() if type(k) is int}, containers or {})


def written(tmp_path, out):
    msgpack_file.write(tmp_path / "out.msgpack", out)
    return (tmp_path / "out.msgpack").read_bytes()


def same(a, b):
    return np.asarray(a).dtype == np.asarray(b).dtype and np.shape(a) == np.shape(b) and a.tobytes() == b.tobytes()


# ---------------------------------------------------------------- against flax


@pytest.mark.parametrize("name", [name for name in HELD if name not in PACKED])
def test_every_dtype_both_ways(tmp_path, name):
    tree = {
        "params": {
            "a": every_bit_pattern(name).reshape(4, 75),
            "scalar": every_bit_pattern(name, 1).reshape(()),
            "empty": every_bit_pattern(name, 0).reshape(0, 3),
        }
    }
    data = by_flax(tree)
    got = opened(tmp_path, data)
    for keys, leaf in flatten(tree):
        assert got[join_path(keys)] == spec_of(leaf)
        assert same(got.read(join_path(keys)), leaf)
    assert written(tmp_path, output(tree)) == data
    back = flax.serialization.msgpack_restore(data)
    assert same(back["params"]["a"], tree["params"]["a"])


@pytest.mark.parametrize("name", PACKED)
def test_types_below_a_byte(tmp_path, name):
    """One byte an element in the file, packed in graftax."""
    bits = DTYPES[name][0]
    codes = np.arange(2**bits, dtype=np.uint8)
    spec = TensorSpec((2, 2 ** (bits - 1)), name)
    array = unpack(pack(codes, bits), spec)
    data = by_flax({"a": array})
    got = opened(tmp_path, data)
    assert got["a"] == spec
    assert got.read("a").tobytes() == pack(codes, bits).tobytes()
    assert written(tmp_path, Output({"a": spec}, [("a", pack(codes, bits))], "flax")) == data
    assert written(tmp_path, Output({"a": spec}, [("a", array)], "flax")) == data
    with pytest.raises(FormatError, match="not a code of"):
        opened(tmp_path, data[:-1] + b"\x7f").read("a")


@pytest.mark.parametrize("name", ["int4", "uint4"])
def test_four_bits_as_flax_has_them(tmp_path, name):
    """Values as flax gives them back; of int4 a byte may have its sign in the upper half, or zeros."""
    values = np.arange(-8, 8) if name == "int4" else np.arange(16)
    tree = {"a": values.astype(name).reshape(4, 4), "odd": values[:3].astype(name)}
    data = by_flax(tree)
    got = opened(tmp_path, data)
    for key, array in tree.items():
        assert unpack(got.read(key), got[key]).tobytes() == array.tobytes()
    assert written(tmp_path, output(tree)) == data
    back = flax.serialization.msgpack_restore(
        written(tmp_path, Output(got.specs, ((k, got.read(k)) for k in got), "flax"))
    )
    assert all(np.array_equal(back[key], tree[key]) for key in tree)
    widened = data[:-1] + (b"\xfa" if name == "int4" else b"\x02")
    wanted = unpack(np.array([0x98, 0x0A], "uint8"), TensorSpec((3,), name)) if name == "int4" else tree["odd"]
    assert np.array_equal(unpack(opened(tmp_path, widened).read("odd"), TensorSpec((3,), name)), wanted)
    for byte in (0x10, 0x7F, 0xF0, 0xE9) if name == "int4" else (0x10, 0xF1, 0xFF):
        with pytest.raises(FormatError, match=f"not a code of {name}"):
            opened(tmp_path, data[:-1] + bytes([byte])).read("odd")


LEAVES = st.builds(
    lambda name, shape: every_bit_pattern(name, int(np.prod(shape))).reshape(shape),
    st.sampled_from([name for name in HELD if name not in PACKED]),
    st.lists(st.integers(0, 4), max_size=3),
)
KEYS = st.one_of(st.text(max_size=40), st.integers(-(2**40), 2**40))
TREES = st.recursive(LEAVES, lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=4), max_leaves=12).filter(
    lambda tree: isinstance(tree, dict)
)


def plain(tree):
    """No two keys of one dict that read alike."""
    return not isinstance(tree, dict) or (
        len({str(key) for key in tree}) == len(tree) and all(plain(child) for child in tree.values())
    )


@settings(max_examples=150, deadline=None)
@given(TREES.filter(plain))
def test_any_tree(tmp_path_factory, tree):
    tmp_path = tmp_path_factory.mktemp("tree")
    data = by_flax(tree)
    got = opened(tmp_path, data)
    leaves = {join_path(keys): leaf for keys, leaf in flatten(tree)}
    assert list(got) == list(leaves)
    assert all(same(got.read(path), leaf) for path, leaf in leaves.items())
    values = [(path, got.read(path)) for path in reversed(list(got))]
    again = Output(got.specs, values, "flax", got.real_keys, got.containers)
    assert written(tmp_path, again) == data


def test_every_length_of_payload(tmp_path):
    """Around the sizes at which msgpack's marks change, and the fixed extensions."""
    for size in [*range(40), 200, 225, 226, 227, 240, 255, 256, 65495, 65520, 65535, 65536]:
        tree = {"k" * (size % 300): np.arange(size % 256, size % 256 + size, dtype=np.int64).astype(np.uint8)}
        assert written(tmp_path, output(tree)) == by_flax(tree)


def test_sorted_keys_equal_the_default_call(tmp_path):
    tree = {"a": {"b": np.ones(2), "c": np.zeros(3)}, "d": np.ones((), np.int32)}
    assert written(tmp_path, output(tree)) == flax.serialization.msgpack_serialize(tree)
    target = {"a": {"b": jnp.zeros(2), "c": jnp.ones(3)}, "d": jnp.zeros((), jnp.int32)}
    assert flax.serialization.from_bytes(target, written(tmp_path, output(tree)))["a"]["b"].tolist() == [1, 1]


@pytest.mark.parametrize("chunk", [64, 100])
def test_chunked_arrays(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk)
    monkeypatch.setattr(msgpack_file, "CHUNK", chunk)
    tree = {
        "big": np.arange(400, dtype=np.float32).reshape(20, 20),
        "in": {"bf": every_bit_pattern("bfloat16", 99), "fits": np.zeros(chunk, np.uint8)},
        "over": np.arange(chunk + 1).astype(np.uint8),
    }
    leaves = {join_path(keys): leaf for keys, leaf in flatten(tree)}
    ours = written(tmp_path, output(tree))
    data = by_flax(tree)  # changes the tree in place
    assert ours == data
    got = opened(tmp_path, data)
    assert {path: got[path] for path in got} == {path: spec_of(leaf) for path, leaf in leaves.items()}
    assert all(same(got.read(path), leaf) for path, leaf in leaves.items())


def test_keys_lists_and_values_that_are_no_arrays(tmp_path):
    tree = {
        "blocks": {0: np.ones(1), 1: {"k": np.zeros(2)}},
        "list": [np.ones(1), {"x": np.ones(2)}],
        "text": {"0": np.ones(3)},
        "step": 2**40,
        "huge": 2**64 - 1,
        "rate": -0.0,
        "flag": True,
        "z": 1 - 2j,
        "np": np.float16(2.5),
        "name": "a\x1bb",
        "raw": b"xyz",
        "none": None,
        "empty": {},
        "a/b": {"~": np.ones(1)},
    }
    got = opened(tmp_path, by_flax(tree))
    assert list(got)[:5] == ["blocks/0", "blocks/1/k", "list/0", "list/1/x", "text/0"]
    assert "a~1b/~0" in got
    assert got.real_keys == {"blocks/0": 0, "blocks/1": 1, "list/0": 0, "list/1": 1}
    assert got.containers == {"list": "list"}
    scalars = {"step": np.int64, "huge": np.uint64, "rate": np.float64, "flag": np.bool_, "z": np.complex128}
    for key, dtype in scalars.items():
        assert same(got.read(key), np.array(tree[key], dtype))
        assert got.storage.metadata[key].startswith("a Python ")
    assert got.read("np") == np.float16(2.5)
    assert got.storage.metadata["name"] == "str a\\x1bb"
    assert {"raw", "none", "empty"} <= set(got.storage.metadata)
    part = {key: tree[key] for key in ("blocks", "list", "text")}
    assert written(tmp_path, output(part, {"list": "list"})) == by_flax(part)


def test_any_order_of_arrival_and_bad_arrivals(tmp_path):
    out = output({"a": np.ones(3), "b": {"c": np.arange(4)}})
    data = written(tmp_path, out)
    assert written(tmp_path, Output(out.specs, list(reversed(list(out.tensors))), "flax")) == data
    with pytest.raises(PlanError, match="never came"):
        written(tmp_path, Output(out.specs, list(out.tensors)[:1], "flax"))
    with pytest.raises(PlanError, match="twice"):
        written(tmp_path, Output(out.specs, [*out.tensors, *out.tensors], "flax"))
    with pytest.raises(FormatError, match="does not match its spec"):
        written(tmp_path, Output(out.specs, [("a", np.ones(4))], "flax"))


def test_keys_that_msgpack_cannot_hold(tmp_path):
    specs = {"wn/scale": TensorSpec((1,), "float32")}
    bad = Output(specs, [("wn/scale", np.ones(1, np.float32))], "flax", {"wn": ("a", "b")})
    with pytest.raises(PlanError, match=r"wn/scale: a key is a tuple") as info:
        written(tmp_path, bad)
    assert "safetensors" in str(info.value)
    holes = {f"l/{i}": TensorSpec((), "float32") for i in (0, 2)}
    with pytest.raises(PlanError, match="a list with the items 0, 2"):
        written(tmp_path, Output(holes, [], "flax", {"l/0": 0, "l/2": 2}, {"l": "list"}))


def test_header_imports_nothing_heavy(tmp_path):
    path = tmp_path / "x.msgpack"
    path.write_bytes(by_flax({"a": {"b": np.ones((2, 3), np.float32)}}))
    code = (
        "import sys\nfrom pathlib import Path\nfrom graftax.formats import msgpack_file\n"
        f"c = msgpack_file.open(Path({str(path)!r}))\nassert str(c['a/b']) == 'float32[2,3]'\n"
        "assert not {'numpy', 'jax', 'flax', 'msgpack'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sniff(tmp_path):
    path = tmp_path / "x.msgpack"
    for tree in ({"a": np.ones(1)}, {0: np.ones(1)}, {}, {f"k{i}": None for i in range(70000)}):
        assert msgpack_file.sniff(path, by_flax(tree)[:512])
    for head in (b"", b"\x80\x02}q", b"PK\x03\x04", b"\x93NUMPY", b"{", b"\x81", b"\x81\xc1", b"\x81\xc0", b"\xdf\0\0"):
        assert not msgpack_file.sniff(path, head)


# ---------------------------------------------------------------- hostile files


def array(shape=(2,), dtype="float32", data=b"\0" * 8, code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data)))


def chunked(**changes):
    parts = {"0": array((2,)), "1": array((1,), data=b"\0" * 4)}
    whole = {"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": parts} | changes
    return {key: value for key, value in whole.items() if value is not None}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (array((3,)), "takes 12 bytes, found 8"),
        (array((-2,)), "axis cannot have"),
        (array((2, -1, -1)), "axis cannot have"),
        (array((2.0,)), "axis cannot have"),
        (array((True, 2)), "axis cannot have"),
        (array((2**62, 2**62)), "larger than any array"),
        (array((0, 2**62), data=b""), "larger than any array"),
        (array((1,) * 65), "lacks its shape, dtype or bytes"),
        (array((2,), "<U1"), "dtype '<U1'"),
        (array((2,), "object"), "dtype 'object'"),
        (array((2,), "str32"), "dtype"),
        (array((2,), "V4"), "dtype"),
        (array((2,), "O" * 100), "dtype"),
        (array((2,), ["float32"]), "dtype 'array'"),
        (array((2,), "float32", [0]), "takes 8 bytes"),
        (array(5), "lacks its shape, dtype or bytes"),
        (array((2,), code=3), "takes 8 bytes"),
        (array((2,), code=4), "extension type 4"),
        (msgpack.Timestamp(1), "extension type -1"),
        (msgpack.ExtType(1, b""), "array without shape|truncated"),
        (msgpack.ExtType(1, b"\x93"), "array without shape|truncated"),
        (msgpack.ExtType(1, msgpack.packb(((2,), "float32", b"\0" * 8)) + b"\0"), "takes 8 bytes"),
        (msgpack.ExtType(2, msgpack.packb((1.0, 2.0, 3.0))), "not a pair"),
        (msgpack.ExtType(2, msgpack.packb((1.0, "x"))), "not a pair"),
        (chunked(shape={"0": 4}), "do not add up"),
        (chunked(shape={"0": -3}), "axis cannot have"),
        (chunked(shape={"1": 3}), "not numbered"),
        (chunked(shape=[3]), "lacks its shape or chunks"),
        (chunked(shape=None), "lacks its shape or chunks"),
        (chunked(extra=1), "lacks its shape or chunks"),
        (chunked(chunks={}), "not flat arrays of one dtype"),
        (chunked(chunks={"0": array((1, 2)), "1": array((1,), data=b"\0" * 4)}), "not flat"),
        (chunked(chunks={"0": array((2,)), "1": array((1,), "int32", b"\0" * 4)}), "one dtype"),
        (chunked(chunks={"0": array((2,)), "1": 3}), "not flat"),
    ],
)
def test_claims_of_an_array(tmp_path, value, text):
    with pytest.raises(FormatError, match=text):
        opened(tmp_path, msgpack.packb({"ok": array(), "bad": value}))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x82" + msgpack.packb("a") + b"\x01" + msgpack.packb("a") + b"\x02", "holds the key a twice"),
        (b"\x82\x01\xc0\xcc\x01\xc0", "holds the key 1 twice"),
        (b"\x82" + b"\x01" + msgpack.packb(array()) + msgpack.packb("1") + msgpack.packb(array()), "both called 1"),
        (b"\x81\xc0\x01", "of kind none"),
        (b"\x81\xcb" + struct.pack(">d", 1.0) + b"\x01", "of kind number"),
        (b"\x81\x91\x01\x01", "of kind array"),
        (b"\x81\xa1\xff\x01", "not UTF-8"),
        (b"\x81\xa1a\xc1", "begins no msgpack value"),
        (b"\x81\xa1a\x01\x00", "1 bytes after its end"),
        (b"\x05", "not a tree"),
        (msgpack.packb(array()), "not a tree"),
        (b"\xdf\xff\xff\xff\xff", "truncated"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "truncated"),
        (b"\x81\xdb\xff\xff\xff\xff", "truncated"),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "truncated"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "truncated"),
    ],
)
def test_malformed(tmp_path, data, text):
    with pytest.raises(FormatError, match=text):
        opened(tmp_path, data)


def test_depth_and_count(tmp_path, monkeypatch):
    with pytest.raises(UnsafeInputError, match="levels of nesting"):
        opened(tmp_path, b"\x81\xa1a" * 1000 + b"\x01")
    with pytest.raises(UnsafeInputError, match="levels of nesting"):
        opened(tmp_path, b"\x81\xa1a" + b"\x91" * 100_000)
    monkeypatch.setenv("GRAFTAX_LIMIT_LEAVES", "1000")
    with pytest.raises(UnsafeInputError, match="GRAFTAX_LIMIT_LEAVES"):
        opened(tmp_path, b"\x81\xa1a\xdd\x00\x01\x00\x00" + b"\xc0" * 65536)
    monkeypatch.setenv("GRAFTAX_LIMIT_HEADER", "1000")
    with pytest.raises(UnsafeInputError, match="GRAFTAX_LIMIT_HEADER"):
        opened(tmp_path, b"\x81\xda\x20\x00" + b"a" * 8192 + b"\xc0")


def test_truncation_and_flips(tmp_path):
    tree = {"a": np.arange(4.0), "b": {0: every_bit_pattern("bfloat16", 5)}, "c": [np.ones(2), 1j, None]}
    data = by_flax(tree)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            opened(tmp_path, data[:length])
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(data), 250):
        changed = bytearray(data)
        changed[at] ^= int(rng.integers(1, 256))
        try:
            got = opened(tmp_path, bytes(changed))
            for path in got:
                got.read(path)
        except (FormatError, UnsafeInputError):
            pass


def test_file_that_changes(tmp_path):
    got = opened(tmp_path, by_flax({"a": np.ones(2)}))
    (tmp_path / "x.msgpack").write_bytes(by_flax({"a": np.ones(3)}))
    with pytest.raises(StorageError, match="changed"):
        got.read("a")
