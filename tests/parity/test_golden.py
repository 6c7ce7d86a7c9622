"""Golden files: everything comes back, arrays shared as they were; what is broken is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from graftax.errors import FormatError, StorageError, UsageError
from graftax.ops import same_bits
from graftax.parity.golden import KEY, Golden, load_golden, save_golden
from graftax.parity.golden_values import TextOnly
from graftax.parity.records import Record, Reference, Site
from graftax.tree import Module, TensorSpec


def golden() -> Golden:
    rng = np.random.default_rng(0)
    x, hidden, y = (rng.normal(size=(2, n)).astype("f4") for n in (3, 5, 4))
    mask = np.array([[True, False, True]])
    records = {
        Site("fc"): Record((x,), {"mask": mask, "scale": 0.5, "cache": None}, hidden, 1e-8, math.inf, 3e-8),
        Site("act"): Record((hidden,), {"impl": object()}, (hidden, [y, 3])),
        Site("act", 1): Record((hidden,), {}, {"y": y, 0: math.nan}),
    }
    settings = {"eps": 1e-12, "padding": (1, 1), "limit": math.inf, "inplace": False, "pole": 1j}
    modules = {
        "": Module("", "Net", ("torch.nn.modules.module.Module",)),
        "fc": Module("fc", "Linear", ("torch.nn.modules.linear.Linear",), settings, {"weight": "fc.weight"}),
    }
    outputs = {"logits": y, "half": hidden.astype(ml_dtypes.bfloat16), "empty": np.zeros((0, 2), "i8"), "n": 7}
    events = (("in", Site("fc")), ("out", Site("fc")), ("in", Site("act")), ("out", Site("act", 1)))
    return Golden(
        Reference(modules, tuple(records), records, outputs, {"logits": y + 1}, {"drop": "never called"}, 0.0, events),
        (x, np.arange(6, dtype="i4")),
        {"train": False, "mask": mask},
        {"fc.weight": TensorSpec((5, 3), "float32"), "fc.count": TensorSpec((), "int64")},
        frozenset({"fc.count"}),
        {"head.weight": "fc.weight"},
        "Net",
        "N C -> N C",
        None,
        {"torch": "2.13.0"},
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and same_bits(a, b)
    if type(a) is not type(b):
        return isinstance(b, TextOnly)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def test_everything_comes_back(tmp_path: Path):
    old, path = golden(), tmp_path / "g.safetensors"
    save_golden(path, old, layers=True)
    new = load_golden(path)
    assert same(old.flax_args, new.flax_args)
    assert same(old.flax_kwargs, new.flax_kwargs)
    assert same(old.reference.outputs, new.reference.outputs)
    assert same(old.reference.outputs_float32, new.reference.outputs_float32)
    assert new.reference.modules == old.reference.modules
    assert new.reference.order == old.reference.order
    assert new.reference.events == old.reference.events
    for site in old.reference.order:
        a, b = old.reference.records[site], new.reference.records[site]
        assert same(a.args, b.args)
        assert same(a.kwargs, b.kwargs)
        assert same(a.output, b.output)
        assert (a.in_error, a.out_error, a.free_error) == (b.in_error, b.out_error, b.free_error)
    assert isinstance(new.reference.records[Site("act")].kwargs["impl"], TextOnly)
    for name in ("specs", "buffers", "aliases", "torch_name", "layout", "out_layout", "versions"):
        assert getattr(new, name) == getattr(old, name), name
    assert new.reference.not_traced == {"drop": "never called"}


def test_an_array_is_stored_once_and_shared_again(tmp_path: Path):
    path = tmp_path / "g.safetensors"
    save_golden(path, golden(), layers=True)
    assert sorted(load_file(path)) == [
        "inputs/0", "inputs/1", "inputs/mask", "layers/fc/0/out", "outputs/empty", "outputs/half", "outputs/logits",
        "outputs_float32/logits",
    ]  # fmt: skip
    records = load_golden(path).reference.records
    assert records[Site("fc")].output is records[Site("act")].args[0]


def test_layers_are_left_out_unless_asked_for(tmp_path: Path):
    save_golden(tmp_path / "g.safetensors", golden())
    new = load_golden(tmp_path / "g.safetensors")
    assert new.reference.records == {}
    assert new.reference.order == ()
    assert new.reference.events == ()
    assert not any(name.startswith("layers/") for name in load_file(tmp_path / "g.safetensors"))


def test_the_checkpoint_can_be_planned_from(tmp_path: Path):
    import graftax as gx

    source = golden().checkpoint()
    rules = '{ torch = "fc.weight", flax = "params/fc/kernel" }\n{ torch = "fc.count", drop = "counter" }'
    plan = gx.plan(source, {"params": {"fc": {"kernel": np.zeros((3, 5), "f4")}}}, rules=rules)
    assert plan.complete
    assert not source.has_values


def test_inputs_that_cannot_be_kept_are_named(tmp_path: Path):
    from dataclasses import replace

    bad = replace(golden(), flax_kwargs={"config": object()})
    with pytest.raises(UsageError, match=r"inputs/config is a builtins\.object"):
        save_golden(tmp_path / "g.safetensors", bad)
    assert not (tmp_path / "g.safetensors").exists()


def test_another_file_is_not_replaced(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros(3, "f4")}, path)
    before = path.read_bytes()
    with pytest.raises(StorageError, match="is not a golden file"):
        save_golden(path, golden())
    assert path.read_bytes() == before
    save_golden(tmp_path / "g.safetensors", golden())
    save_golden(tmp_path / "g.safetensors", golden(), layers=True)  # an older golden file is
    assert load_golden(tmp_path / "g.safetensors").reference.records


# ---------------------------------------------------------------- malformed


def edited(tmp_path: Path, **changes: Any) -> Path:
    """The golden file with other values in its JSON; None takes a key away."""
    path = tmp_path / "g.safetensors"
    save_golden(path, golden(), layers=True)
    with safe_open(path, "np") as file:
        data = json.loads(file.metadata()[KEY])
    tensors = load_file(path)
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    out = tmp_path / "edited.safetensors"
    save_file(tensors, out, {"format": "golden", KEY: json.dumps(data)})
    return out


BROKEN = {
    "missing": ({"outputs": None}, "'outputs' is missing"),
    "schema": ({"schema": 99}, "schema 99; this graftax knows 1"),
    "no array": ({"outputs": {"a": "gone"}}, "names the array 'gone'"),
    "array is a list": ({"outputs": {"a": ["x"]}}, "not a value that graftax writes"),
    "unknown value": ({"outputs": {"z": 1}}, "not a value that graftax writes"),
    "bare list": ({"outputs": [1]}, "not a value that graftax writes"),
    "args": ({"args": {"d": []}}, "expected a tuple, found dict"),
    "specs": ({"specs": {"w": [[2, -1], "float32"]}}, "whole number from 0, found -1"),
    "dtype": ({"specs": {"w": [[2], "float31"]}}, "unknown dtype"),
    "modules": ({"modules": [["fc", "Linear"]]}, "malformed golden file"),
    "modules kind": ({"modules": {"fc": 1}}, "'modules' must be a list"),
    "bases": ({"modules": [["fc", "Linear", [3], {"d": []}, {}]]}, "expected text, found 3"),
    "layer": ({"layers": [["fc", 0, {"t": []}, {"d": []}, None]]}, "a layer has 0 errors, not 3"),
    "call": ({"layers": [["fc", True, {"t": []}, {"d": []}, None, 0, 0, 0]]}, "whole number from 0, found True"),
    "errors": ({"layers": [["fc", 0, {"t": []}, {"d": []}, None, "x", 0, 0]]}, "expected a number, found 'x'"),
    "events": ({"events": [["in", 3]]}, "malformed golden file"),
    "event": ({"events": [["on", 0]]}, "expected one of in, out, found 'on'"),
    "text": ({"torch": 5}, "expected text, found 5"),
    "layout": ({"layout": ["N"]}, "expected text"),
    "aliases": ({"aliases": [1]}, "malformed golden file"),
    "pairs": ({"kwargs": {"d": [["a"]]}}, "not a value that graftax writes"),
    "complex": ({"outputs": {"c": ["x", "y"]}}, "not a value that graftax writes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_file_is_refused(tmp_path: Path, name: str):
    changes, message = BROKEN[name]
    with pytest.raises(FormatError) as caught:
        load_golden(edited(tmp_path, **changes))
    assert message in str(caught.value)
    assert "edited.safetensors" in str(caught.value)


def test_deep_nests_are_refused(tmp_path: Path):
    value: Any = 1
    for _ in range(60):
        value = {"t": [value]}
    with pytest.raises(FormatError):
        load_golden(edited(tmp_path, outputs=value))


def test_other_files_are_refused(tmp_path: Path):
    save_file({"w": np.zeros(3, "f4")}, tmp_path / "w.safetensors")
    with pytest.raises(FormatError, match="is no golden file"):
        load_golden(tmp_path / "w.safetensors")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(FormatError, match="is empty"):
        load_golden(tmp_path / "empty")
    save_golden(tmp_path / "g.safetensors", golden())
    whole = (tmp_path / "g.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-5])
    with pytest.raises(FormatError, match="truncated"):
        load_golden(tmp_path / "cut.safetensors")
    with pytest.raises(StorageError):
        load_golden(tmp_path / "gone.safetensors")
