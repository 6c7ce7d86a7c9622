"""gx.inspect and gx.diff: what the commands print, for whatever the library takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import torch
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import graftax as gx
from graftax.cli import run
from graftax.errors import GraftaxError, PlanError, UsageError
from graftax.types import Diff, DifferenceRow, Inspection, LeafRow

X = jnp.ones((1, 3))


def variables() -> dict[str, Any]:
    return {"params": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.zeros(4)}}


def train_state(scale: float = 0.0) -> TrainState:
    state = TrainState.create(apply_fn=len, params=variables()["params"], tx=optax.adam(1.0))
    return gx.replace(state, "opt_state/**/mu/kernel", gx.constant(scale))


def linear() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 4)


def paths(found: Inspection) -> list[str]:
    return [row.path for row in found.rows]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file({"params/kernel": np.ones((3, 4), np.float32), "params/bias": np.zeros(4)}, path)
    return path


# ---------------------------------------------------------------- inspect


@pytest.mark.parametrize("flags", [[], ["--stats"], ["--hashes"]])
def test_inspect_is_what_the_command_prints(file: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    found = gx.inspect(file, stats="--stats" in flags, hashes="--hashes" in flags)
    assert run(["inspect", str(file), *flags]) == 0
    assert capsys.readouterr().out == f"{found}\n" == f"{found!r}\n"
    assert run(["inspect", str(file), *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == json.loads(json.dumps(found.as_json()))
    row = {row.path: row for row in found.rows}["params/kernel"]
    assert (row.shape, row.dtype) == ((3, 4), "float32")
    assert (row.stats is not None, row.sha256 is not None) == ("--stats" in flags, "--hashes" in flags)
    assert row.stats is None or row.stats["mean"] == 1
    assert isinstance(row, LeafRow)


LIVE = {
    "variables": (variables, ["params/kernel", "params/bias"]),
    "linen": (lambda: gx.linen(nn.Dense(4), X), ["params/kernel", "params/bias"]),
    "abstract": (lambda: jax.eval_shape(variables), ["params/bias", "params/kernel"]),
    "module": (lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0)), ["bias", "kernel"]),
    "state": (lambda: nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0))), ["bias", "kernel"]),
    "torch module": (linear, ["weight", "bias"]),
    "meta": (lambda: torch.nn.Linear(3, 4, device="meta"), ["weight", "bias"]),
    "state_dict": (lambda: linear().state_dict(), ["weight", "bias"]),
    "optimizer": (
        lambda: train_state().opt_state,
        ["0/count", "0/mu/bias", "0/mu/kernel", "0/nu/bias", "0/nu/kernel"],
    ),
}


@pytest.mark.parametrize("name", LIVE)
def test_inspect_takes_live_trees(name: str) -> None:
    make, names = LIVE[name]
    tree = make()
    found = gx.inspect(tree)
    assert sorted(paths(found)) == sorted(names)
    assert str(found).startswith(tuple(found.as_json()["label"]))
    if name in ("linen", "abstract", "meta"):
        assert all(row.shape in ((3, 4), (4, 3), (4,)) for row in found.rows)
        with pytest.raises(PlanError, match="no values"):
            gx.inspect(tree, stats=True)
    else:
        stats = {row.path: row.stats for row in gx.inspect(tree, stats=True).rows}
        assert all(found is not None and found["nan"] == 0 for found in stats.values())


def test_a_train_state_shows_its_optimizer_as_its_file_does(tmp_path: Path) -> None:
    state = train_state()
    path = tmp_path / "run.msgpack"
    path.write_bytes(flax.serialization.to_bytes(state))
    live, stored = gx.inspect(state, hashes=True), gx.inspect(path, hashes=True)
    assert {row for row in stored.rows if row.path != "step"} == set(live.rows)
    assert "beside the weights, not ported: opt_state" in str(live)
    assert gx.inspect(f"{path}::opt_state/0/mu").as_json()["leaves"] == 2
    optimizer = nnx.Optimizer(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), optax.adam(1.0), wrt=nnx.Param)
    assert {"opt_state/0/mu/kernel", "step"} <= set(paths(gx.inspect(optimizer)))
    assert "not read" not in str(gx.inspect(optimizer))


@pytest.mark.parametrize("thing", [3, nn.Dense(4), {}, object()])
def test_what_is_no_tree_is_refused(thing: Any) -> None:
    with pytest.raises(UsageError):
        gx.inspect(thing)


# ---------------------------------------------------------------- diff


def test_diff_is_what_the_command_prints(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.safetensors"
    arrays = {"params/kernel": np.ones((3, 4), np.float32), "params/scale": np.zeros(4)}
    arrays["params/kernel"][0, :2] = 3
    safetensors.numpy.save_file(arrays, other)
    found = gx.diff(other, file)
    assert run(["diff", str(other), str(file)]) == 1
    assert capsys.readouterr().out == f"{found}\n" == f"{found!r}\n"
    assert run(["diff", str(other), str(file), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["result"] == found.as_json()
    assert not found.equal
    first, *rest = found.rows
    assert (first.path, first.what, first.count, first.of, first.max_abs) == ("params/kernel", "values", 2, 12, 2)
    assert first.relative == pytest.approx((8 / 12) ** 0.5)
    assert rest == [DifferenceRow("params/scale", "only_in_a"), DifferenceRow("params/bias", "only_in_b")]
    same = gx.diff(file, file)
    assert same.equal
    assert same.rows == ()
    assert str(same) == "2 leaves equal, 0 differ"


@pytest.mark.parametrize("equal", [True, False])
def test_a_diff_has_no_truth_value(equal: bool) -> None:
    found = gx.diff(variables(), variables() if equal else gx.replace(variables(), "kernel", gx.zeros()))
    assert isinstance(found, Diff)
    assert found.equal is equal
    for question in (bool, lambda diff: not diff, lambda diff: diff and 1):
        with pytest.raises(TypeError, match=r"diff\.equal"):
            question(found)


def test_diff_ports_a_to_the_side_of_b() -> None:
    torch_net, like = linear(), gx.linen(nn.Dense(4), X)
    ported = gx.port(torch_net, like)
    apart = gx.diff(torch_net, ported)
    assert not apart.equal
    assert "A is torch and B is flax: give like= or plan=." in str(apart)
    assert gx.diff(torch_net, ported, like=like).equal
    plan = gx.plan(torch_net, like)
    assert gx.diff(torch_net, ported, plan=plan).equal
    edited = gx.replace(ported, "params/kernel[0, 1]", gx.constant(9))
    (row,) = gx.diff(torch_net, edited, like=edited).rows
    assert (row.path, row.count) == ("params/kernel", 1)
    assert gx.diff(torch_net, edited, like=edited, atol=100.0).equal
    with pytest.raises(UsageError, match="plan= or like=, not both"):
        gx.diff(torch_net, ported, like=like, plan=plan)
    with pytest.raises(UsageError, match="Dense has no values"):
        gx.diff(torch_net, like)
    with pytest.raises(PlanError, match=r"gx\.plan\(a, like, rules=\.\.\.\)"):
        gx.diff({"weight": torch.ones(4, 5)}, ported, like=like)


def test_diff_of_a_saved_plan(tmp_path: Path) -> None:
    source, target = tmp_path / "t.pt", tmp_path / "f.safetensors"
    torch.save(linear().state_dict(), source)
    like = gx.linen(nn.Dense(4), X)
    gx.port_file(source, like, target)
    gx.plan(source, like).save(tmp_path / "plan.json")
    assert gx.diff(source, target, plan=tmp_path / "plan.json").equal


def test_optimizer_state_counts_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    (row,) = gx.diff(train_state(1.0), train_state(2.0)).rows
    assert row.path == "opt_state/0/mu/kernel"
    assert gx.diff(train_state(1.0), train_state(1.0)).equal
    assert gx.diff(train_state(1.0), train_state(2.0), like=train_state()).equal  # a port moves weights
    path = tmp_path / "run.pt"
    torch.save({"model": linear().state_dict(), "optimizer": {"state": {0: torch.ones(2)}, "param_groups": []}}, path)
    found = gx.diff(path, linear())
    assert found.equal
    assert str(found).endswith("not compared: optimizer")


def test_diff_raises_the_graver_of_two_errors(tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no header")
    with pytest.raises(GraftaxError) as caught:
        gx.diff(tmp_path / "none.pt", bad)
    assert caught.value.exit_code == 3


def test_codes_are_counted_not_bytes() -> None:
    import ml_dtypes

    codes = np.array([1, 2, 3, 4, 5], ml_dtypes.int4)
    (row,) = gx.diff({"q": codes}, {"q": np.array([2, 1, 3, 4, 6], ml_dtypes.int4)}).rows
    assert (row.count, row.of) == (3, 5)
