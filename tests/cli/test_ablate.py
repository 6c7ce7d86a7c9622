"""`graftax ablate`: the rows of gx.ablate, value flags that repeat, the page, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from graftax.cli import run
from graftax.cli.value_flags import VALUES, values_given
from graftax.errors import UsageError

MODEL = """
import graftax as gx, numpy as np
from flax import linen as nn

def make():
    return gx.linen(nn.Sequential([nn.Dense(4), nn.Dense(2)]), np.eye(3, dtype="float32"))

def largest(out):
    return {"largest": out.max(), "sum": out.sum()}

number = 3
"""


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command up to SELECT."""
    draw = np.random.default_rng(0)
    leaves = {"layers_0/kernel": (3, 4), "layers_0/bias": (4,), "layers_1/kernel": (4, 2), "layers_1/bias": (2,)}
    save_file(
        {f"params/{path}": draw.normal(size=shape).astype("f4") for path, shape in leaves.items()},
        tmp_path / "w.safetensors",
    )
    (tmp_path / "ablated_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return ["ablate", "--flax", "ablated_model:make", "--weights", "w.safetensors"]


def call(capsys: pytest.CaptureFixture[str], words: list[str], *more: str) -> tuple[int, str, str]:
    code = run([*words, *more])
    return code, *capsys.readouterr()


def result(capsys: pytest.CaptureFixture[str], words: list[str], *more: str) -> dict[str, Any]:
    code, out, err = call(capsys, words, *more, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)["result"]


def test_values_repeat_and_the_page_is_written(words, capsys):
    flags = ("--zeros", "--scaled", "0.5", "--scaled", "2", "--report", "s.html")
    code, out, err = call(capsys, words, "**/kernel", *flags)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Sequential: 6 runs, one leaf at a time"
    assert lines[2].split() == ["baseline", "0", "1"]
    assert sum("scaled(2)" in line for line in lines) == 2
    assert "params/layers_1/kernel" in Path("s.html").read_text()
    assert lines[-1] == "wrote s.html"


def test_a_metric_names_its_numbers(words, capsys):
    more = ("*", "--each", "module", "--exclude", "**/bias", "--zeros", "--metric", "ablated_model:largest")
    found = result(capsys, words, *more)
    assert found["each"] == "module"
    assert [row["leaves"] for row in found["rows"]] == [[], ["params/layers_0/kernel"], ["params/layers_1/kernel"]]
    for row in found["rows"]:
        assert set(row["numbers"]) == set(row["change"]) == {"largest", "sum"}


def test_a_draw_is_the_same_again(words, capsys):
    more = ("**/kernel", "--add-normal", "0.1", "--seed", "4")
    assert result(capsys, words, *more) == result(capsys, words, *more)


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["**/kernel"], 2, "at least one of --constant, --zeros"),
        (["**/kernel", "--add-normal", "1"], 2, "--add-normal needs --seed"),
        (["**/kernel", "--zeros", "--seed", "0"], 2, "--seed goes with --normal or --add-normal"),
        (["**/kernel", "--zeros", "--axis", "-1"], 2, "--axis goes with --quantized"),
        (["**/kernel", "--zeros", "--metric", "ablated_model:number"], 2, "not a function"),
        (["**/nothing", "--zeros"], 1, "matches nothing"),
        (["a", "b", "--zeros"], 2, "one SELECT is taken"),
        (["**/kernel", "--zeros", "--report", "w.safetensors"], 5, "also an input"),
    ],
)
def test_what_is_refused(words, capsys, more, code, said):
    got, out, err = call(capsys, words, *more)
    assert (got, out) == (code, "")
    assert said in err


def test_a_linen_model_needs_weights(words, capsys):
    code, _, err = call(capsys, words[:3], "**/kernel", "--zeros")
    assert (code, "--weights" in err) == (2, True)


def test_each_value_flag_makes_its_value():
    given = {"constant": "1", "normal": 1.0, "add_normal": 1.0, "scaled": 2.0, "quantized": 4, "from_": "w.npz"}
    given |= {"rounded": "bfloat16"}
    for row in VALUES:
        (value,) = values_given({row.name: given.get(row.name, True), "seed": 0 if "seed" in row.details else None})
        assert value.text.startswith(row.flag[2:].replace("-", "_") if row.name != "from_" else "from_checkpoint")
    details = {"add_normal": 0.5, "seed": 1, "relative": True, "quantized": [4, 8], "axis": "0,-1", "group": 2}
    assert [value.text for value in values_given(details, several=True)] == [
        "add_normal(0.5, seed=1, relative=True)",
        *(f"quantized({bits}, axis=(0, -1), group=2)" for bits in (4, 8)),
    ]
    assert values_given({"quantized": 4, "axis": "()"})[0].text == "quantized(4, axis=())"
    with pytest.raises(UsageError, match="no axis"):
        values_given({"quantized": 4, "axis": "last"})
    with pytest.raises(UsageError, match="exactly one"):
        values_given({"zeros": True, "scaled": 2.0})
