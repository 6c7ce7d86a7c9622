"""Headers as nobody should write them: each is refused before anything is allocated, with the code it deserves."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from graftax.errors import FormatError, StorageError, UnsafeInputError
from graftax.formats import open_path, safetensors_file
from graftax.tree.limits import variable


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def file_of(tmp_path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header (text, bytes or JSON) and data, true or not."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


EIGHT = bytes(8)
MALFORMED: dict[str, tuple[Any, bytes, str]] = {
    "duplicate tensor": ('{"a":%s,"a":%s}' % ((json.dumps(entry()),) * 2), EIGHT, "occurs twice"),
    "duplicate field": ('{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', EIGHT, "occurs twice"),
    "duplicate metadata": ('{"__metadata__":{"k":"1","k":"2"}}', b"", "occurs twice"),
    "not JSON": ('{"a":', b"", "broken JSON"),
    "JSON with a tail": ('{}{"a":1}', b"", "broken JSON"),
    "not UTF-8": (b'{"\xff":1}', b"", "not UTF-8"),
    "half a surrogate": (f'{{"\\ud800":{json.dumps(entry())}}}', EIGHT, "not UTF-8"),
    "not an object": (b"[1, 2]", b"", "not in a format"),
    "starts with a space": (b" {}", b"", "not in a format"),
    "NaN": ('{"a":NaN}', b"", "NaN is not JSON"),
    "nested too deeply": ("{" + '"a":{' * 100_000, b"", "nested too deeply"),
    "huge integer": ('{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % ("9" * 5000), EIGHT, "header"),
    "entry is a list": ({"a": [1]}, b"", "must have dtype"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT, "must have dtype"),
    "field too many": ({"a": entry(strides=[1])}, EIGHT, "nothing else"),
    "unknown dtype": ({"a": entry("F128")}, EIGHT, "unknown dtype 'F128'"),
    "dtype no text": ({"a": entry(["F32"])}, EIGHT, "unknown dtype"),
    "negative extent": ({"a": entry(shape=[-2, -1])}, EIGHT, "whole numbers from 0"),
    "extent as float": ({"a": entry(shape=[2.0])}, EIGHT, "whole numbers from 0"),
    "extent as bool": ({"a": entry(shape=[2, True])}, EIGHT, "whole numbers from 0"),
    "shape no list": ({"a": entry(shape="2")}, EIGHT, "whole numbers from 0"),
    "too many axes": ({"a": entry(shape=[2] + [1] * 70)}, EIGHT, "axes"),
    "product overflows": ({"a": entry(shape=[2**62, 4])}, EIGHT, "larger than any file"),
    "overflow hidden by 0": ({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}, b"", "larger than any file"),
    "hidden by a first 0": ({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}, b"", "larger than any file"),
    "shape and length differ": ({"a": entry(shape=[3])}, EIGHT, "which takes 12 bytes"),
    "offsets turned round": ({"a": entry(offsets=[8, 0])}, EIGHT, "do not hold"),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, EIGHT, "whole numbers"),
    "one offset": ({"a": entry(offsets=[8])}, EIGHT, "two whole numbers"),
    "offset as bool": ({"a": entry("U8", [1], [False, True])}, b"1", "two whole numbers"),
    "half a byte": ({"a": entry("F4", [3], [0, 2])}, b"12", "whole bytes"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "overlaps"),
    "same bytes twice": ({"a": entry(), "b": entry()}, EIGHT, "overlaps"),
    "hole": ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), "hole of 4 bytes"),
    "hole at the start": ({"a": entry(offsets=[4, 12])}, bytes(12), "hole of 4 bytes"),
    "bytes left over": ({"a": entry()}, bytes(9), "1 bytes follow"),
    "bytes without tensors": ({}, b"x", "1 bytes follow"),
    "data missing": ({"a": entry()}, bytes(7), "truncated"),
    "metadata no text": ({"__metadata__": {"k": 1}}, b"", "text to text"),
    "metadata a list": ({"__metadata__": ["k"]}, b"", "text to text"),
    "own metadata broken": ({"__metadata__": {"graftax": "{"}}, b"", "metadata `graftax`"),
    "own metadata of the future": ({"__metadata__": {"graftax": '{"schema": 2}'}}, b"", "schema 2"),
    "own key renames": (
        {"__metadata__": {"graftax": '{"schema":1,"containers":{},"keys":{"a/0":7}}'}},
        b"",
        "cannot end in the key 7",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_header_is_bad_input(tmp_path: Path, name: str):
    header, data, text = MALFORMED[name]
    path = file_of(tmp_path, header, data)
    with pytest.raises(FormatError, match=text) as caught:
        open_path(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).encode()) <= 2000


@pytest.mark.parametrize("size", range(10))
def test_every_short_file_is_refused(tmp_path: Path, size: int):
    path = tmp_path / "x.safetensors"
    path.write_bytes((struct.pack("<Q", 2) + b"{}")[:size])
    with pytest.raises(FormatError):
        open_path(path)
    with pytest.raises(FormatError):
        safetensors_file.open(path)


def test_every_cut_of_a_file_is_refused(tmp_path: Path):
    whole = file_of(tmp_path, {"a": entry(), "b": entry("U8", [3], [8, 11])}, bytes(11)).read_bytes()
    for size in range(8, len(whole)):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            open_path(path)


@pytest.mark.parametrize("length", [100_000_001, 2**40, 2**63, 2**64 - 1])
def test_a_header_over_the_limit_is_unsafe_even_where_the_file_is_short(tmp_path: Path, length: int):
    with pytest.raises(UnsafeInputError, match="100,000,000"):
        open_path(file_of(tmp_path, "{}", length=length))


def test_the_limits_have_an_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = file_of(tmp_path, {"a": entry(), "b": entry("U8", [1], [8, 9])}, bytes(9))
    monkeypatch.setenv(variable("header"), "20")
    with pytest.raises(UnsafeInputError, match=variable("header")):
        open_path(path)
    monkeypatch.setenv(variable("header"), "2000")
    monkeypatch.setenv(variable("leaves"), "1")
    with pytest.raises(UnsafeInputError, match=variable("leaves")):
        open_path(path)
    monkeypatch.setenv(variable("leaves"), "2")
    assert len(open_path(path)) == 2


def test_all_bad_entries_are_listed(tmp_path: Path):
    header = {f"t{i}": entry("F9") for i in range(40)}
    with pytest.raises(FormatError) as caught:
        open_path(file_of(tmp_path, header, EIGHT))
    assert [f.key for f in caught.value.failures] == list(header)
    assert "and 35 more" in str(caught.value)


def test_names_are_escaped(tmp_path: Path):
    with pytest.raises(FormatError) as caught:
        open_path(file_of(tmp_path, {"\x1b[2Jx\u202e" + "y" * 10_000: entry("F9")}, EIGHT))
    assert "\x1b" not in str(caught.value)
    assert "\u202e" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_odd_but_legal_headers_open(tmp_path: Path):
    header = {
        "": entry("U8", [], [0, 1]),
        "empty": entry("F64", [0, 5], [1, 1]),
        "\n": entry("U8", [1] * 64, [1, 2]),
        "ü/日": entry("F6_E2M3", [4], [2, 5]),
        "__metadata__": {"format": "pt"},
    }
    found = open_path(file_of(tmp_path, json.dumps(header, indent=2, ensure_ascii=False) + " \n", b"abcde"))
    assert found.keys() == header.keys() - {"__metadata__"}
    assert found["empty"].shape == (0, 5)
    assert found.read("ü/日").tobytes() == b"cde"
    assert found.read("\n").shape == (1,) * 64
    assert dict(open_path(file_of(tmp_path, {"__metadata__": None}))) == {}


def test_a_hostile_header_costs_neither_time_nor_memory(tmp_path: Path):
    """Lists are 20 times their text in memory, so a big header is looked through before it is parsed. In a process of
    its own: the peak is what counts."""
    n = 30_000_000
    cases = {
        "lists": b'{"a":[' + b"[]," * (n // 3) + b"[]]}",
        "numbers": b'{"a":[' + b"0," * (n // 2) + b"0]}",
        "objects": b'{"a":[' + b"{}," * (n // 3) + b"{}]}",
        "entries": b'{"a":[' + b'"data_offsets",' * (n // 15) + b"0]}",
    }
    code = (
        "import resource, sys, time\n"
        "from graftax.formats import open_path\n"
        "from graftax.errors import GraftaxError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "start = time.perf_counter()\n"
        "try:\n    open_path(sys.argv[1])\n"
        "except GraftaxError as exc:\n    code = exc.exit_code\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(code, grown, time.perf_counter() - start)\n"
    )
    for name, header in cases.items():
        path = file_of(tmp_path, header)
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        exit_code, grown, seconds = done.stdout.split()
        assert exit_code == "4", name
        assert int(grown) < 200_000, name  # kB; the header itself is 30 MB
        assert float(seconds) < 3, name


def test_a_sparse_file_that_promises_terabytes_opens_without_them(tmp_path: Path):
    path = file_of(tmp_path, {"a": entry("U8", [2**40], [0, 2**40])})
    os.truncate(path, path.stat().st_size + 2**40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert open_path(path)["a"].nbytes == 2**40
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("how", ["grow", "shrink", "rewrite", "replace", "remove"])
def test_a_file_that_changes_after_it_was_opened_is_noticed(tmp_path: Path, how: str):
    path = file_of(tmp_path, {"a": entry()}, EIGHT)
    found = open_path(path)
    assert found.read("a").tolist() == [0, 0]
    size = path.stat().st_size
    if how == "grow":
        os.truncate(path, size + 1)
    elif how == "shrink":
        os.truncate(path, size - 1)
    elif how == "rewrite":
        time.sleep(0.02)
        path.write_bytes(path.read_bytes())
    elif how == "replace":
        copy = tmp_path / "copy"
        copy.write_bytes(path.read_bytes())
        os.replace(copy, path)
    else:
        path.unlink()
    with pytest.raises(StorageError, match="does not exist" if how == "remove" else "changed while it was read"):
        found.read("a")


def test_a_pipe_in_the_place_of_the_file_does_not_hang(tmp_path: Path):
    path = file_of(tmp_path, {"a": entry()}, EIGHT)
    found = open_path(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StorageError, match="changed while it was read"):
        found.read("a")


def test_a_header_of_100_000_tensors_opens_in_seconds(tmp_path: Path):
    n = 100_000
    header = {f"layers.{i}.weight": entry("F32", [2, 1], [8 * i, 8 * i + 8]) for i in range(n)}
    path = file_of(tmp_path, header, bytes(8 * n))
    start = time.process_time()
    assert len(open_path(path)) == n
    assert time.process_time() - start < 10  # 0.8 s on a quiet core


def test_opening_imports_no_numpy(tmp_path: Path):
    path = file_of(tmp_path, {"a": entry()}, EIGHT)
    code = (
        "import sys\nfrom graftax.formats import open_path\nfound = open_path(sys.argv[1])\n"
        "print(found['a'], sorted({'numpy', 'torch', 'jax', 'ml_dtypes', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "float32[2] []\n"
