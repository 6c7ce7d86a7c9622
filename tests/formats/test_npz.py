"""graftax.formats.npz: archives are read as numpy.load reads them, hostile ones are refused, and what is written is
read by numpy.load bit for bit."""

import io
import struct
import subprocess
import sys
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graftax.errors import FormatError, PlanError, StorageError, UnsafeInputError
from graftax.formats import npz, open_path
from graftax.formats.base import Output
from graftax.formats.io import zip_read, zip_write
from graftax.formats.io.source import open_stamped
from graftax.formats.table import FORMATS
from graftax.report.inspecting import inspection, inspection_text
from graftax.tree import TensorSpec
from graftax.tree.dtypes import numpy_dtype, spec_of

HELD = sorted(FORMATS["npz"].holds)


def every_bit_pattern(name, count=300):
    """An array of random bytes as dtype `name`: NaN payloads, -0.0 and subnormals are among them."""
    dtype = numpy_dtype(name)
    data = np.random.default_rng(0).integers(0, 256, count * dtype.itemsize, np.uint8)
    return (data % 2).view(bool) if name == "bool" else data.view(dtype)


def check_same(path, arrays):
    got = npz.open(path)
    assert list(got) == list(arrays)
    for key, array in arrays.items():
        assert got[key] == spec_of(array)
        value = got.read(key)
        assert value.flags.c_contiguous
        assert value.dtype == array.dtype.newbyteorder("=")
        assert value.shape == array.shape
        assert value.tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes()
    return got


def output(arrays, side="flax"):
    return Output({key: spec_of(array) for key, array in arrays.items()}, arrays.items(), side)


def npy(header, data=b"", version=(1, 0), pad=True):
    """A .npy file with any header."""
    text = header.encode("latin1") if isinstance(header, str) else header
    if pad:
        text = text.ljust(117) + b"\n"
    form = "<H" if version == (1, 0) else "<I"
    return b"\x93NUMPY" + bytes(version) + struct.pack(form, len(text)) + text + data


def header(descr="'<f4'", fortran="False", shape="(2,)"):
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


def archive(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


# ---------------------------------------------------------------- reading, against NumPy


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", HELD)
def test_every_dtype(tmp_path, name, save):
    arrays = {
        "params/Dense_0/kernel": every_bit_pattern(name).reshape(4, 75),
        "fortran": np.asfortranarray(every_bit_pattern(name).reshape(5, 6, 10)),
        "scalar": every_bit_pattern(name, 1).reshape(()),
        "empty": every_bit_pattern(name, 0).reshape(0, 3),
        "big": every_bit_pattern(name).astype(numpy_dtype(name).newbyteorder(">")),
    }
    save(tmp_path / "x.npz", **arrays)
    assert check_same(tmp_path / "x.npz", arrays).side == "flax"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_array(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "x.npz"
    dtype = data.draw(st.sampled_from(HELD).map(numpy_dtype))
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
    array = array.transpose(data.draw(st.permutations(range(array.ndim))))
    name = data.draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
    arrays = {name: array, f"{name}2": array[..., None]}
    npz.write(path, output(arrays))
    check_same(path, arrays)
    with np.load(path) as loaded:
        assert list(loaded) == list(arrays)
        assert all(loaded[key].tobytes() == value.tobytes() for key, value in arrays.items())


def test_versions_of_the_header(tmp_path):
    data = np.arange(2, dtype="<f4").tobytes()
    members = [(f"v{n}.npy", npy(header(), data, (n, 0))) for n in (1, 2, 3)]
    got = npz.open(archive(tmp_path / "x.npz", members))
    assert [got.read(key).tolist() for key in got] == [[0, 1]] * 3


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(3, 4),
        np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
        np.arange(4, dtype=">i4"),
        np.float32(3),
        np.zeros((0, 3)),
        np.array([1 + 2j]),
        np.array([True, False]),
    ],
)
def test_a_lone_npy_is_one_leaf(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    got = npz.open(tmp_path / "x.npy")
    assert list(got) == ["array"]
    assert got.side is None
    expected = np.load(tmp_path / "x.npy")
    value = got.read("array")
    assert np.array_equal(value, expected)
    assert value.dtype == expected.dtype.newbyteorder("=")
    if got.storage.by_position("array"):
        buffer = bytearray(got["array"].nbytes)
        got.storage.span("array", 0, memoryview(buffer))
        assert bytes(buffer) == value.tobytes()


def test_a_lone_npy_that_is_malformed(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6.0))
    data = (tmp_path / "x.npy").read_bytes()
    path = tmp_path / "y.npy"
    for length in range(6, len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError, match="one NumPy array"):
            npz.open(path)
    path.write_bytes(data + b"0")
    with pytest.raises(FormatError):
        npz.open(path)
    np.save(path, np.array(["a"]))
    with pytest.raises(FormatError, match=r"one NumPy array.*text"):
        npz.open(path)
    np.save(path, np.array([{}], dtype=object))
    with pytest.raises(UnsafeInputError, match="would run code"):
        npz.open(path)


def test_sides_and_empty_archives(tmp_path):
    np.savez(tmp_path / "t.npz", **{"fc.weight": np.ones(2), "fc.bias": np.ones(1)})
    assert npz.open(tmp_path / "t.npz").side == "torch"
    np.savez(tmp_path / "n.npz", np.ones(2))
    assert npz.open(tmp_path / "n.npz").side is None
    np.savez(tmp_path / "e.npz")
    assert len(npz.open(tmp_path / "e.npz")) == 0
    for name in "tne":
        assert npz.sniff(tmp_path / f"{name}.npz", (tmp_path / f"{name}.npz").read_bytes()[:512])
    assert npz.sniff(tmp_path / "x.npy", b"\x93NUMPY\x01\x00")
    assert not npz.sniff(tmp_path / "x", b"PK\x03\x04")


def test_header_imports_no_numpy(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones((2, 3)))
    code = (
        "import sys\nfrom pathlib import Path\nfrom graftax.formats import npz\n"
        f"c = npz.open(Path({str(tmp_path / 'x.npz')!r}))\nassert str(c['a']) == 'float64[2,3]'\n"
        "assert not {'numpy', 'zipfile'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- hostile and unfit files


def test_object_arrays_are_unsafe(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.savez(tmp_path / "x.npz", fine=np.ones(2), bad=np.array([{}], dtype=object))
    with pytest.raises(UnsafeInputError, match="bad: this is an object array") as info:
        npz.open(tmp_path / "x.npz")
    assert info.value.exit_code == 4


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "int4"])
def test_void_bytes_are_explained(tmp_path, name):
    np.savez(tmp_path / "x.npz", a=np.ones(2).astype(getattr(ml_dtypes, name)))
    with pytest.raises(FormatError, match=r"bytes without a type .*bfloat16.*safetensors"):
        npz.open(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "array",
    [np.zeros(2, "f4,i4"), np.zeros(2, "M8[s]"), np.zeros(2, np.longdouble)],
    ids=lambda array: str(array.dtype),
)
def test_other_dtypes(tmp_path, array):
    np.savez(tmp_path / "x.npz", a=array, b=array, c=np.ones(1))
    with pytest.raises(FormatError, match="2 of its members") as info:
        npz.open(tmp_path / "x.npz")
    assert [failure.key for failure in info.value.failures] == ["a", "b"]


@pytest.mark.parametrize(
    ("member", "text"),
    [
        (npy(header(shape="(3,)"), b"\0" * 8), "takes 12 bytes, found 8"),
        (npy(header(), b"\0" * 9), "takes 8 bytes, found 9"),
        (npy(header(shape="(-2,)"), b"\0" * 8), "axis cannot have"),
        (npy(header(shape="(True, 2)"), b"\0" * 8), "axis cannot have"),
        (npy(header(shape="(2.0,)"), b"\0" * 8), "axis cannot have"),
        (npy(header(shape="[2]"), b"\0" * 8), "malformed"),
        (npy(header(shape=f"({2**62}, {2**62})")), "larger than any array"),
        (npy(header(shape=f"(0, {2**62})")), "larger than any array"),
        (npy(header(shape=f"({'1,' * 65})"), b"\0" * 4, (2, 0), pad=False), "larger than any array"),
        (npy(header(fortran="0"), b"\0" * 8), "malformed"),
        (npy(header(shape="(2)"), b"\0" * 8), "malformed"),
        (npy(header(shape="(02,)"), b"\0" * 8), "not a dict of plain values"),
        (npy(header(shape="(2,,)"), b"\0" * 8), "not a dict of plain values"),
        (npy(header(shape="(,)"), b"\0" * 8), "not a dict of plain values"),
        (npy(header(shape="(2 2,)"), b"\0" * 8), "not a dict of plain values"),
        (npy(header(descr="'f4'"), b"\0" * 8), "dtype"),
        (npy(header(descr="'|f4'"), b"\0" * 8), "dtype"),
        (npy(header(descr="''"), b"\0" * 8), "dtype"),
        (npy(header(descr="4"), b"\0" * 8), "record"),
        (npy("{'descr': '<f4', 'shape': (2,)}", b"\0" * 8), "must have the keys"),
        (npy(header()[:-1] + "'more': 1}", b"\0" * 8), "must have the keys"),
        (npy("__import__('os').system('true')"), "not a dict of plain values"),
        (npy("(" * 9000, pad=False), "not a dict of plain values"),
        (npy("-" * 9000 + "1", pad=False), "not a dict of plain values"),
        (npy(" " * 60000, pad=False), "its header is truncated or too long"),
        (npy(header(), b"\0" * 8, (4, 0)), "version 4.0"),
        (npy(header(), b"\0" * 8)[1:], "does not begin"),
        (b"", "does not begin"),
    ],
)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_claims_of_a_header(tmp_path, member, text):
    fine = npy(header(), b"\0" * 8)
    path = archive(tmp_path / "x.npz", [("a.npy", fine), ("b.npy", member)])
    with pytest.raises(FormatError, match=text) as info:
        npz.open(path)
    assert [failure.key for failure in info.value.failures] == ["b"]


def test_members_that_are_no_arrays(tmp_path):
    path = archive(tmp_path / "x.npz", [("a.npy", npy(header(), b"\0" * 8)), ("readme.txt", "hi")])
    with pytest.raises(FormatError, match=r"readme\.txt: it is not a \.npy file"):
        npz.open(path)


def test_bomb_duplicates_trailing_truncated(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.zeros(50_000_000, np.uint8))
    with pytest.raises(UnsafeInputError, match="GRAFTAX_LIMIT_RATIO"):
        npz.open(path)
    with pytest.warns(UserWarning, match="Duplicate"):
        archive(path, [("a.npy", npy(header(), b"\0" * 8))] * 2)
    with pytest.raises(FormatError, match="two members have one name"):
        npz.open(path)
    np.savez(path, a=np.ones(3))
    data = path.read_bytes()
    path.write_bytes(data + b"\0")
    with pytest.raises(FormatError, match="bytes follow it"):
        npz.open(path)
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError):
            npz.open(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_flipped_bytes_are_seen(tmp_path, save):
    """Every change is either an error or leaves names and values as they are (in fields that nothing depends on)."""
    path = tmp_path / "x.npz"
    arrays = {"a": np.arange(5.0), "b": np.arange(3)}
    save(path, **arrays)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(data), 400):
        changed = bytearray(data)
        changed[at] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            got = npz.open(path)
            values = {key: got.read(key) for key in got}
        except (FormatError, UnsafeInputError):
            continue
        assert [value.tobytes() for value in values.values()] == [value.tobytes() for value in arrays.values()]


def test_bytes_before_the_archive(tmp_path):
    """Also where the table of contents accounts for them, as in a self-extracting archive."""
    path = tmp_path / "x.npz"
    path.write_bytes(b"#!/bin/sh\n")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("a.npy", npy(header(), b"\0" * 8))
    with pytest.raises(FormatError, match="before the first member"):
        npz.open(path)


def test_zip_that_can_be_read_in_two_ways(tmp_path):
    """Local headers that differ from the table, overlapping members, bytes before the first one."""
    fine = npy(header(), b"\0" * 8)
    path = archive(tmp_path / "x.npz", [("a.npy", fine), ("b.npy", fine)])
    data = path.read_bytes()
    path.write_bytes(data.replace(b"a.npy", b"c.npy", 1))
    with pytest.raises(FormatError, match="disagrees with the table of contents"):
        npz.open(path)
    table = data.rfind(b"PK\x01\x02")
    overlap = data[: table + 42] + struct.pack("<I", 0) + data[table + 46 :]
    path.write_bytes(overlap)
    with pytest.raises(FormatError):
        npz.open(path)
    path.write_bytes(b"#!/bin/sh\n" + data)
    with pytest.raises(FormatError):
        npz.open(path)
    archive(path, [("a.npy", fine)], zipfile.ZIP_BZIP2)
    with pytest.raises(FormatError, match="compressed by method 12"):
        npz.open(path)
    encrypted = bytearray(archive(path, [("a.npy", fine)]).read_bytes())
    encrypted[encrypted.find(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(encrypted)
    with pytest.raises(UnsafeInputError, match="encrypted"):
        npz.open(path)


def test_deflate_that_gives_more_or_less(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.arange(1000))
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02") + 24
    (size,) = struct.unpack_from("<I", data, at)
    member = next(iter(zip_read.zip_members(open_stamped(path)).values()))
    assert member.size == size
    for wrong in (size - 8, size + 8):
        struct.pack_into("<I", data, at, wrong)
        path.write_bytes(data)
        changed = next(iter(zip_read.zip_members(open_stamped(path)).values()))
        with pytest.raises(FormatError):
            zip_read.read_member(open_stamped(path), changed)


def test_file_that_changes(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(2))
    got = npz.open(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", a=np.ones(9))
    with pytest.raises(StorageError, match="changed"):
        got.read("a")


# ---------------------------------------------------------------- writing


def test_written_archives(tmp_path):
    arrays = {name: every_bit_pattern(name).reshape(4, 75).T for name in HELD}
    arrays |= {"params/ä/kernel": np.zeros((0, 3)), "scalar": np.array(2**40)}
    npz.write(tmp_path / "a.npz", output(arrays))
    backwards = Output({key: spec_of(arrays[key]) for key in arrays}, list(reversed(arrays.items())), "flax")
    npz.write(tmp_path / "b", backwards)
    data = (tmp_path / "a.npz").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    check_same(tmp_path / "a.npz", arrays)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        assert file.testzip() is None
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with np.load(tmp_path / "a.npz", allow_pickle=False) as loaded:
        assert list(loaded) == list(arrays)
        for key, array in arrays.items():
            assert loaded[key].tobytes() == array.tobytes()
            assert loaded[key].shape == array.shape
    places, _ = zip_write.places({"x": 5, "long" * 50: 0})
    assert all(place.data % 64 == 0 for place in places.values())


def test_many_members(tmp_path):
    """More members than the 16-bit count of a plain zip."""
    members, end = zip_write.places({f"a{i}": 0 for i in range(65_600)})
    with open(tmp_path / "x.zip", "wb") as file:
        for name, place in members.items():
            file.seek(place.start)
            file.write(zip_write.member_header(name, place, 0))
        file.write(zip_write.directory(members, dict.fromkeys(members, 0), end))
    assert list(zip_read.zip_members(open_stamped(tmp_path / "x.zip"))) == list(members)
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert archive.namelist() == list(members)


def test_zip64_sizes():
    """Sizes and offsets beyond 32 bits, as zipfile reads them."""
    size = 5 << 30
    members, start = zip_write.places({"big": size, "next": 3})
    table = zip_write.directory(members, {"big": 1, "next": 2}, start)

    class Sparse(io.RawIOBase):
        at = 0

        def seekable(self):
            return True

        def seek(self, offset, whence=0):
            self.at = offset + (start + len(table) if whence == 2 else self.at if whence == 1 else 0)
            return self.at

        def tell(self):
            return self.at

        def read(self, count=-1):
            begin = self.at - start
            found = table[begin : begin + count if count >= 0 else None]
            self.at += len(found)
            return found

    infos = zipfile.ZipFile(Sparse()).infolist()
    assert [(info.filename, info.file_size, info.header_offset) for info in infos] == [
        ("big", size, 0),
        ("next", 3, members["next"].start),
    ]
    assert members["next"].start == members["big"].data + size


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e5m2", "int4"])
def test_dtypes_that_numpy_does_not_own(tmp_path, dtype):
    specs = {"a": TensorSpec((2,), dtype), "b": TensorSpec((2,), "float32")}
    with pytest.raises(PlanError, match="npz cannot hold 1 of 2 leaves") as info:
        npz.write(tmp_path / "x.npz", Output(specs, [], "flax"))
    assert [failure.key for failure in info.value.failures] == ["a"]
    assert not (tmp_path / "x.npz").exists()
    if dtype != "int4":
        assert "safetensors" in str(info.value)


def test_text_beside_weights_is_left_out(tmp_path):
    np.savez(
        tmp_path / "a.npz",
        **{"fc.weight": np.ones((2, 3)), "names": np.array(["a", "bb"]), "raw": np.array([b"x"])},
    )
    found = npz.open(tmp_path / "a.npz")
    assert list(found) == ["fc.weight"]
    assert found.storage.metadata == {"names": "text (<U2), not read", "raw": "text (|S1), not read"}
    assert inspection_text(inspection(found)).endswith("beside the weights, not read: names, raw")
    np.savez(tmp_path / "a.npz", names=np.array(["a"]))
    with pytest.raises(FormatError, match="no tensors"):
        open_path(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", a=np.ones(2), names=np.array(["a", None]))
    with pytest.raises(UnsafeInputError, match="Python objects"):
        open_path(tmp_path / "a.npz")
