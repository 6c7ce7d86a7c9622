"""What messages say: the caller's own options, and missing, unexpected and misshapen keys in the field's words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import graftax as gx
from graftax.cli import run
from graftax.errors import command_line_words, counted, option, worded

_FLAG = re.compile(r"(?<![\w-])--[a-z]")
_KEYWORD = re.compile(r"\b(missing|unused|dtype|to|rules|max_memory)=")


def _ends(shape: tuple[int, int], other: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    source = {"body.weight": np.ones((8, 6), "f4"), "layers.0.head.weight": np.ones(shape, "f4")}
    like = {"body": {"kernel": np.ones((6, 8), "f4")}, "layers_0": {"head": {"kernel": np.ones(other, "f4")}}}
    return source, like


def test_an_option_is_named_as_its_caller_writes_it():
    assert option("max_memory", "64MiB") == 'max_memory="64MiB"'
    assert (option("rules"), worded("a", "b")) == ("rules=", "b")
    with command_line_words():
        assert option("max_memory", "64MiB") == "--max-memory 64MiB"
        assert (option("rules"), worded("a", "b")) == ("--rules", "a")
    assert option("rules") == "rules="
    assert [counted(n, "question") for n in (0, 1, 2)] == ["0 questions", "1 question", "2 questions"]


def test_a_shape_mismatch_is_one_line_with_both_ends():
    with pytest.raises(gx.errors.PlanError) as caught:
        gx.port(*_ends((7, 8), (8, 5)))
    line = "shape mismatch: layers.0.head.weight float32[7,8] -> layers_0/head/kernel float32[8,5]"
    assert [line in text for text in str(caught.value).splitlines()].count(True) == 1
    assert "missing key" not in str(caught.value)
    assert "unexpected key" not in str(caught.value)
    assert [question.kind for question in caught.value.questions] == ["shape"]


def test_the_policies_settle_a_shape_mismatch_as_they_settle_both_keys():
    source, like = _ends((7, 8), (8, 5))
    out = gx.port(source, like, missing="keep", unused="drop")
    assert np.array_equal(out["layers_0"]["head"]["kernel"], like["layers_0"]["head"]["kernel"])
    half = gx.plan(source, like, missing="keep")
    assert [question.text for question in half.questions] == [
        "unexpected key: shape mismatch: layers.0.head.weight float32[7,8] -> layers_0/head/kernel float32[8,5]"
    ]
    other = gx.plan(source, like, unused="drop")
    assert [question.text for question in other.questions] == [
        "missing key: shape mismatch: layers.0.head.weight float32[7,8] -> layers_0/head/kernel float32[8,5]"
    ]


def test_names_that_both_sides_tie_leave_the_rest_of_their_modules_matched():
    torch = pytest.importorskip("torch")
    from flax import nnx

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 5), torch.nn.Linear(4, 5)
            self.b.weight = self.a.weight

    class Flax(nnx.Module):
        def __init__(self) -> None:
            self.a, self.b = nnx.Linear(4, 5, rngs=nnx.Rngs(0)), nnx.Linear(4, 5, rngs=nnx.Rngs(1))
            self.b.kernel = self.a.kernel

    plan = gx.plan(Flax(), Torch(), missing="error", unused="error")
    assert plan.complete, str(plan)
    assert {(entry.sources, entry.targets) for entry in plan.entries} == {
        (("a/kernel",), ("a.weight", "b.weight")), (("a/bias",), ("a.bias",)), (("b/bias",), ("b.bias",)),
    }  # fmt: skip


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_a_head_of_any_other_shape_is_told_with_both_ends(rows: int, columns: int, wide: int, high: int):
    source, like = _ends((rows, columns), (wide, high))
    plan = gx.plan(source, like)
    if (rows, columns) in ((high, wide), (wide, high)):  # a Linear, or a weight that is stored as Flax stores it
        assert plan.complete
        return
    told = " ".join(map(str, (*plan.questions, *plan.failures)))
    assert not plan.complete
    assert "layers.0.head.weight" in told
    assert "layers_0/head/kernel" in told


def test_missing_and_unexpected_keys_are_called_so():
    plan = gx.plan({"a.weight": np.ones((2, 3), "f4")}, {"b": {"kernel": np.ones((4, 5), "f4")}}, to="flax")
    assert [question.text for question in plan.questions] == [
        "missing key: b/kernel float32[4,5]: no source tensor fills it",
        "unexpected key: a.weight float32[2,3]: no leaf of like takes it",
    ]


def test_the_library_names_its_options_and_the_command_line_its_own(tmp_path: Path, capsys: Any):
    source, like = _ends((7, 8), (8, 5))
    np.savez(tmp_path / "source.npz", **source)
    np.savez(tmp_path / "like.npz", **{"body/kernel": like["body"]["kernel"], "head2/kernel": np.ones((8, 5), "f4")})
    ends = str(tmp_path / "source.npz"), str(tmp_path / "like.npz")
    with pytest.raises(gx.errors.PlanError) as caught:
        gx.port(*ends)
    assert _KEYWORD.search(str(caught.value))
    assert not _FLAG.search(str(caught.value))
    assert run(["port", ends[0], "--like", ends[1], "-o", str(tmp_path / "out.msgpack")]) == 1
    shown = capsys.readouterr().err
    assert _FLAG.search(shown)
    assert not _KEYWORD.search(shown)


def test_an_open_question_is_answered_in_the_callers_way(tmp_path: Path, capsys: Any):
    source = {"a.weight": np.ones((4, 4), "f4"), "b.weight": np.ones((4, 4), "f4")}
    like = {"x/kernel": np.zeros((4, 4), "f4"), "y/kernel": np.zeros((4, 4), "f4")}
    np.savez(tmp_path / "source.npz", **source)
    np.savez(tmp_path / "like.npz", **like)
    ends = str(tmp_path / "source.npz"), str(tmp_path / "like.npz")
    with pytest.raises(gx.errors.PlanError, match=r"\.answer\(0, 0\)"):
        gx.port(*ends)
    assert run(["port", ends[0], "--like", ends[1], "-o", str(tmp_path / "out.msgpack")]) == 1
    shown = capsys.readouterr().err
    assert "--rules R.toml" in shown
    assert ".answer(" not in shown


def test_a_side_by_names_is_told_by_what_the_names_show(tmp_path: Path):
    from safetensors.numpy import save_file

    save_file({"fc.weight": np.ones((3, 2), "f4")}, tmp_path / "t.safetensors")
    (found,) = gx.plan(
        tmp_path / "t.safetensors", {"params": {"fc": {"kernel": np.ones((2, 3), "f4")}}}, to="flax"
    ).assumptions
    assert found.text == (
        f"side: {tmp_path / 't.safetensors'} does not say whether it is torch or Flax; its names look like torch "
        "(1 name with '.', 1 module with a weight or the like)"
    )
    assert found.check == 'source_side="torch" states it'


def test_codes_and_their_scales_are_named():
    codes = {"a.weight": np.ones((2, 4), "i1"), "a.weight_scale": np.ones(2, "f4")}
    with pytest.raises(gx.errors.PlanError) as caught:
        gx.plan(codes, {"params": {"a": {"kernel": np.ones((4, 2), "f4")}}}, source_side="torch", to="flax")
    (failure,) = caught.value.failures
    assert str(failure) == (
        "a.weight: holds quantized codes; a.weight_scale holds their scales (expected plain values, found int8[2,4])"
    )
    assert "config.json" not in str(caught.value)


def test_a_failure_leaves_out_the_end_it_does_not_know():
    assert str(gx.errors.Failure("is odd", found="float32[2]")) == "is odd (found float32[2])"
    assert str(gx.errors.Failure("is odd", expected="2", found="3")) == "is odd (expected 2, found 3)"


def test_a_tensor_is_no_container_and_a_name_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch = pytest.importorskip("torch")
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "t.pt")
    assert run(["inspect", f"{tmp_path / 't.pt'}::fc.weight"]) == 1
    assert "fc.weight is one tensor, not a container of tensors" in (told := capsys.readouterr().err)
    assert "--key fc.weight" in told
    assert run(["inspect", ""]) == 5
    assert "the name of the checkpoint is empty" in capsys.readouterr().err
    path = str(tmp_path / "t.pt")
    assert run(["replace", path, "fc.weight", "--from", path, "--layout", "foo", "-o", str(tmp_path / "o.pt")]) == 2
    assert "--layout foo is not one of linear, " in capsys.readouterr().err


def test_a_rule_that_matches_nothing_says_what_its_braces_stand_for():
    source = {"bn.x.w": np.ones((2, 2), "f4")}
    rules = 'rules = [{ torch = "bn.{x}.w", flax = "params/bn_{x}/kernel" }]'
    like = {"params": {"bn_0": {"kernel": np.ones((2, 2), "f4")}}}
    (failure, *_) = gx.plan(source, like, rules, source_side="torch", to="flax").failures
    assert failure.what.startswith("matches no key of ")
    assert "{x} stands for a number; use * for any text in a part." in failure.next
