"""Surgery from file to file: the selected leaves change, every other byte stays, and the report proves it."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

import graftax as gx
from graftax.errors import PlanError, StorageError, UsageError
from graftax.ops import same_bits
from graftax.surgery import replace_checkpoint, select, write_replacement
from graftax.tree.dtypes import numpy_dtype

DTYPES = ["float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2", "int64", "int8", "uint8", "bool"]


def bits(dtype: str, shape: tuple[int, ...] = (3, 5)) -> np.ndarray:
    """Any bits at all: NaN payloads, -0.0, subnormals."""
    kind = numpy_dtype(dtype)
    raw = np.random.default_rng(1).integers(0, 256, (*shape, kind.itemsize), np.uint8)
    if dtype == "bool":
        return (raw[..., 0] % 2).astype(bool)
    array = raw.view(kind)[..., 0]
    if dtype == "float32":
        array.view(np.uint32)[0, 0] = 0x7FC01234  # a NaN with a payload
    return array


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    arrays = {f"layer.{dtype}": bits(dtype) for dtype in DTYPES} | {"fc.weight": np.ones((4, 3), np.float32)}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    return path


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_one_leaf_changes_and_every_other_bit_stays(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    report = write_replacement(gx.open_checkpoint(model), "fc.weight", gx.constant(0.5), out, expect=1)
    before, after = gx.open_checkpoint(model), gx.open_checkpoint(out)
    assert dict(before.specs) == dict(after.specs)
    for path in before:
        if path == "fc.weight":
            np.testing.assert_array_equal(after.read(path), np.full((4, 3), 0.5, np.float32))
        else:
            assert same_bits(np.asarray(before.read(path)), np.asarray(after.read(path)))
            assert report["untouched"][path] == digest(before.read(path))
    (change,) = report["changes"]
    assert change["path"] == "fc.weight"
    assert change["before"] == digest(np.ones((4, 3), np.float32))
    assert change["after"] == digest(np.full((4, 3), 0.5, np.float32))
    assert change["changed"] == change["values"] == 12
    assert change["largest"] == 0.5
    assert report["leaves"] == len(before)
    assert report["edits"] == [{"selector": "'fc.weight'", "value": "constant(0.5)"}]
    json.dumps(report)


def test_a_change_to_nan_has_no_largest_difference(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    report = write_replacement(gx.open_checkpoint(model), "fc.weight[0, 0]", gx.constant(float("nan")), out)
    (change,) = report["changes"]
    assert (change["changed"], change["largest"]) == (1, None)


def test_the_same_edit_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    outs = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for out in outs:
        write_replacement(gx.open_checkpoint(model), "fc.*", gx.normal(0.02, 5), out)
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_a_dry_run_looks_at_the_selected_leaves_only(model: Path, tmp_path: Path) -> None:
    report = write_replacement(gx.open_checkpoint(model), "fc.weight", gx.scaled(1), None)
    assert report["changes"][0]["changed"] == 0
    assert report["changes"][0]["before"] == report["changes"][0]["after"]
    assert report["untouched"] == {}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("selector", "value", "expect", "words"),
    [
        ("fc.weight", gx.constant(1e39), None, "overflows float32"),
        ("fc.wieght", gx.zeros(), None, "Near: fc.weight"),
        ("fc", gx.zeros(), None, "subtree of 1 leaf"),
        ("layer.*", gx.zeros(), 3, "expected 3, found 10"),
        ("layer.*", gx.normal(1, 0), None, "layer.int64"),
        ("fc.weight", np.zeros((3, 4), np.float32), None, "Its transpose would fit"),
        ("fc.weight", lambda old: 0.5, None, "bare number"),
        ("layer.float32", gx.quantized(8, axis=0), None, "NaN or infinity"),
    ],
)
def test_a_refusal_writes_nothing(
    model: Path, tmp_path: Path, selector: str, value: Any, expect: int | None, words: str
) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"what was there")
    with pytest.raises(PlanError, match=words) as caught:
        write_replacement(gx.open_checkpoint(model), selector, value, out, expect=expect)
    assert caught.value.exit_code == 1
    assert out.read_bytes() == b"what was there"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "out.safetensors"]
    with pytest.raises(PlanError, match=words):
        write_replacement(gx.open_checkpoint(model), selector, value, None, expect=expect)


def test_values_that_do_not_fit_are_all_listed(model: Path) -> None:
    with pytest.raises(PlanError) as caught:
        write_replacement(gx.open_checkpoint(model), "**", gx.constant(0.5), None)
    assert {failure.key for failure in caught.value.failures} == {
        f"layer.{d}" for d in ("int64", "int8", "uint8", "bool")
    }


def test_nothing_comes_after_a_failure(model: Path) -> None:
    """What was refused is not followed by tensors that a writer might take for the whole."""
    checkpoint = gx.open_checkpoint(model)
    order = list(checkpoint)
    whole = {f"layer.{d}" for d in ("int64", "int8", "uint8", "bool")}
    first_refused = min(order.index(path) for path in whole)
    # What shapes and dtypes tell is refused before the first tensor, what values tell with their leaf.
    for value, before in (
        (gx.constant(0.5), 0),
        (lambda old: old if old.dtype.kind not in "iub" else 1, first_refused),
    ):
        _, tensors, _ = replace_checkpoint(checkpoint, {"**": value})
        came: list[str] = []
        with pytest.raises(PlanError) as caught:
            came.extend(path for path, _ in tensors)
        assert came == order[:before]
        assert {failure.key for failure in caught.value.failures} == whole


def test_the_input_is_never_the_output(model: Path) -> None:
    before = model.read_bytes()
    with pytest.raises(StorageError):
        write_replacement(gx.open_checkpoint(model), "fc.weight", gx.zeros(), model)
    assert model.read_bytes() == before


def test_tensors_come_one_at_a_time(model: Path) -> None:
    """Nothing is read before it is asked for, and nothing is kept."""
    checkpoint = gx.open_checkpoint(model)
    specs, tensors, report = replace_checkpoint(checkpoint, {"fc.weight": gx.zeros()})
    assert report.selected == ("fc.weight",)
    assert report.changes == []
    assert list(specs) == list(checkpoint)
    first, _ = next(tensors)
    assert [change.path for change in report.changes] == [first]
    rest = [path for path, _ in tensors]
    assert {first, *rest} == set(checkpoint)
    assert report.untouched == len(checkpoint) - 1


def test_several_edits_at_once(model: Path) -> None:
    edits = {"layer.float*": gx.zeros(), "layer.float32": gx.constant(2)}
    _, tensors, report = replace_checkpoint(gx.open_checkpoint(model), edits, expect=5)
    found = dict(tensors)
    assert (found["layer.float32"] == 2).all()
    assert not found["layer.float16"].any()
    assert not found["layer.float8_e5m2"].astype(float).any()
    assert report.untouched == 6


def test_from_format_to_format(model: Path, tmp_path: Path) -> None:
    """torch file in, safetensors out and back; a Flax tree keeps its keys that are not text."""
    pt, st = tmp_path / "m.pt", tmp_path / "m.safetensors"
    torch.save(OrderedDict([("a.weight", torch.ones(2, 3, dtype=torch.bfloat16)), ("n", torch.tensor(3))]), pt)
    write_replacement(gx.open_checkpoint(pt), "a.weight", gx.scaled(0.5), st)
    again = gx.open_checkpoint(st)
    assert again.side == "torch"
    assert again["a.weight"].dtype == "bfloat16"
    assert (again.read("a.weight").astype(float) == 0.5).all()
    assert int(again.read("n")) == 3
    write_replacement(again, "a.weight", gx.scaled(2), tmp_path / "back.pt")
    assert torch.equal(torch.load(tmp_path / "back.pt")["a.weight"], torch.ones(2, 3, dtype=torch.bfloat16))


def test_a_flax_file_and_a_torch_donor(tmp_path: Path) -> None:
    flax, donor, out = (tmp_path / name for name in ("f.safetensors", "d.pt", "o.safetensors"))
    safetensors.numpy.save_file({"params/fc/kernel": np.zeros((3, 5), np.float32)}, flax)
    weight = torch.arange(15.0).reshape(5, 3)
    torch.save({"fc.weight": weight}, donor)
    write_replacement(gx.open_checkpoint(flax), "fc/kernel", gx.from_checkpoint(donor, "fc.weight"), out)
    np.testing.assert_array_equal(gx.open_checkpoint(out).read("params/fc/kernel"), weight.numpy().T)


def test_a_tie_that_parts_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "tied.pt"
    weight = torch.ones(4, 3)
    torch.save(OrderedDict([("embed.weight", weight), ("head.weight", weight)]), path)
    report = write_replacement(gx.open_checkpoint(path), "head.weight", gx.zeros(), None)
    assert report["untied"] == [["head.weight", "embed.weight"]]
    assert write_replacement(gx.open_checkpoint(path), "*.weight", gx.zeros(), None)["untied"] == []


def test_packed_tensors_pass_untouched(tmp_path: Path) -> None:
    """Two codes a byte: they travel as their bytes, and no value but themselves goes into them."""
    path = tmp_path / "f4.safetensors"
    codes = bytes(range(6))
    header = {
        "q": {"dtype": "F4", "shape": [3, 4], "data_offsets": [0, 6]},
        "w": {"dtype": "F32", "shape": [1], "data_offsets": [6, 10]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + codes + np.float32(3).tobytes())
    checkpoint = gx.open_checkpoint(path)
    _, tensors, report = replace_checkpoint(checkpoint, {"w": gx.zeros()})
    assert bytes(dict(tensors)["q"]) == codes
    assert report.untouched == 1
    with pytest.raises(PlanError, match="float4"):
        write_replacement(checkpoint, "q", gx.zeros(), None)


def test_a_spec_has_no_values(model: Path) -> None:
    import dataclasses

    opened = gx.open_checkpoint(model)
    bare = dataclasses.replace(opened, storage=dataclasses.replace(opened.storage, reader=None))
    with pytest.raises(PlanError, match="no values"):
        replace_checkpoint(bare, {"fc.weight": gx.zeros()})


def test_select_in_a_file(model: Path) -> None:
    checkpoint = gx.open_checkpoint(model)
    assert select(checkpoint, "fc.*") == ["fc.weight"]
    assert select(checkpoint, lambda path, spec: spec.floating and len(spec.shape) == 2 and "16" in path) == [
        "layer.bfloat16",
        "layer.float16",
    ]
    with pytest.raises(UsageError):
        gx.replace(checkpoint, "fc.weight", gx.zeros())
    with pytest.raises(UsageError, match="NNX"):
        select(checkpoint, int)


def test_the_difference_counts_bits_and_measures_values() -> None:
    """-0.0 is another bit pattern, NaN that stays is no distance, and a value that is not finite is infinitely far."""
    from graftax.surgery.changes import difference as _difference

    old = np.array([0.0, 1.0, np.nan, np.inf, 2.0], np.float32)
    new = np.array([-0.0, 1.0, np.nan, np.inf, 2.5], np.float32)
    assert _difference(old, new, "f") == (2, 0.5)
    assert _difference(old.astype(ml_dtypes.bfloat16), new.astype(ml_dtypes.bfloat16), "f") == (2, 0.5)
    assert _difference(np.ones(1, np.float32), np.full(1, np.inf, np.float32), "f") == (1, np.inf)
    assert _difference(np.array([1.0, 2.0]), np.array([np.nan, 2.5]), "f") == (2, np.inf)
    assert _difference(np.array([1, 2]), np.array([1, 9]), "i") == (1, 7.0)
    assert _difference(np.array([1j]), np.array([2j]), "c") == (1, None)


ADAM = {
    "step": 3,
    "params": {"fc": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)}},
    "opt_state": {
        "0": {
            "count": np.array(3),
            "mu": {"fc": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)}},
        },
        "1": {},
    },
    "note": "hi",
    "none": None,
    "empty": [],
    "raw": b"abc",
}


@pytest.mark.parametrize(
    ("selector", "picked"),
    [
        ("**/kernel", ("params/fc/kernel",)),
        ("**/k*", ("params/fc/kernel",)),
        ("**", ("params/fc/bias", "params/fc/kernel")),
        ("**/mu/**/kernel", ("opt_state/0/mu/fc/kernel",)),
        ("opt_state/**/bias", ("opt_state/0/mu/fc/bias",)),
        ("**/count", ("opt_state/0/count",)),
        ("step", ("step",)),
    ],
)
@pytest.mark.parametrize("kind", ["file", "live"])
def test_training_state_is_picked_by_selectors_that_name_it(
    tmp_path: Path, selector: str, picked: tuple[str, ...], kind: str
) -> None:
    import flax.serialization

    arrays = {"step": np.array(3), "params": ADAM["params"], "opt_state": ADAM["opt_state"]}
    tree: Any = arrays
    if kind == "file":
        path = tmp_path / "run.msgpack"
        path.write_bytes(flax.serialization.msgpack_serialize(arrays))
        tree = gx.open_checkpoint(path)
    assert tuple(sorted(select(tree, selector))) == picked


def test_a_glob_that_finds_training_state_only_says_so() -> None:
    with pytest.raises(PlanError, match=r"matches optimizer state only"):
        select(
            {"params": ADAM["params"], "opt_state": {"mu": ADAM["params"], "trace": ADAM["params"]}}, "*/*/fc/kernel"
        )


def test_a_training_checkpoint_keeps_all_but_the_selected_leaf(tmp_path: Path) -> None:
    """Python numbers, text, None, bytes and empty containers included: the file is what flax would write."""
    import copy

    import flax.serialization

    path, out = tmp_path / "run.msgpack", tmp_path / "out.msgpack"
    path.write_bytes(flax.serialization.msgpack_serialize(copy.deepcopy(ADAM)))
    write_replacement(gx.open_checkpoint(path), "**/kernel", gx.zeros(), out, expect=1)
    expected = flax.serialization.msgpack_restore(path.read_bytes())
    expected["params"]["fc"]["kernel"] = np.zeros((2, 3), np.float32)
    assert out.read_bytes() == flax.serialization.msgpack_serialize(expected)
    write_replacement(gx.open_checkpoint(path), "step", gx.constant(7), out)
    assert flax.serialization.msgpack_restore(out.read_bytes())["step"] == 7


@pytest.mark.parametrize("kind", ["pt", "npy"])
def test_a_file_of_one_array_is_a_donor(tmp_path: Path, kind: str) -> None:
    values = np.arange(3, dtype=np.float32)
    path = tmp_path / f"bias.{kind}"
    if kind == "pt":
        torch.save(torch.from_numpy(values), path)
    else:
        np.save(path, values)
    out = gx.replace(ADAM["params"], "fc/bias", gx.from_checkpoint(path))
    assert np.array_equal(out["fc"]["bias"], values)
