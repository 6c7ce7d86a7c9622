"""scripts/bench.py: its smoke mode runs, checks values and writes what it says; wrong values are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "bench.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "140"})


@pytest.fixture(autouse=True)
def scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def rows_of(found: dict[str, Any], command: str) -> list[dict[str, Any]]:
    assert found["commands"][command], f"{command} measured nothing"
    return [row for group in found["commands"][command] for row in group["rows"]]


def test_file_to_file_in_smoke_mode(tmp_path: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    done = bench("file", "--smoke", "--only", "gpt2", "--peers", "numpy,weightbridge", "--json", out, "--svg", picture)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    rows = {row["name"]: row for row in rows_of(found, "file")}
    assert rows["cp, fsync"]["ratio"] == 1
    assert set(rows) == {"cp, fsync", "graftax", "safetensors.numpy, .T", "weightbridge"}
    for name in ("graftax", "safetensors.numpy, .T"):
        [run] = rows[name]["runs"]
        assert run["checked"] > 100_000
        assert 0 < run["seconds"] < run["process"]
    assert "--envs FOLDER" in rows["weightbridge"]["not_run"]
    assert "graftax" in done.stdout
    assert "weightbridge: not run" in done.stdout
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


@pytest.mark.slow
def test_everything_in_smoke_mode(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = bench("all", "--smoke", "--json", out, "--svg", tmp_path / "out.svg")
    assert done.returncode == 0, done.stderr + done.stdout
    for rows in (rows_of(json.loads(out.read_text()), command) for command in ("matching", "file", "small")):
        assert any(row["runs"] for row in rows)


# ---------------------------------------------------------------- the harness


def test_a_wrong_value_is_found(tmp_path: Path) -> None:
    from benchmarks import checkpoints
    from benchmarks.measuring import Wrong

    made = checkpoints.make("gpt2", tmp_path, 0.0001)
    found, truth = checkpoints.read(made.truth), checkpoints.read(made.truth)
    assert checkpoints.check(found, truth) == sum(array.size for array in found.values())
    name = "h/0/attn/c_proj/kernel"
    bent = found[name].copy()
    bent[3, 1] ^= 1
    with pytest.raises(Wrong, match="h/0/attn/c_proj/kernel differs"):
        checkpoints.check(found | {name: bent}, truth)
    with pytest.raises(Wrong, match=r"is uint32\[64, 64\]|differs"):
        checkpoints.check(found | {name: np.ascontiguousarray(found[name].T)}, truth)
    with pytest.raises(Wrong, match="other names"):
        checkpoints.check({"x": bent}, truth)


def test_the_truth_is_the_source_transposed(tmp_path: Path) -> None:
    from benchmarks import checkpoints

    for name, leaf, axes in (
        ("gpt2", "h.0.mlp.c_fc.weight", (1, 0)),
        ("resnet", "blocks.1.conv.weight", (2, 3, 1, 0)),
        ("llama", "embed_tokens.weight", (0, 1)),
    ):
        made = checkpoints.make(name, tmp_path, 0.0001)
        source, truth = checkpoints.read(made.source), checkpoints.read(made.truth)
        [target] = [entry.flax for entry in made.leaves if entry.torch == leaf]
        assert target is not None
        np.testing.assert_array_equal(truth[target], source[leaf].transpose(axes))
        assert made.nbytes == sum(array.nbytes for array in source.values())


def test_full_sizes_are_those_of_the_models() -> None:
    from benchmarks import checkpoints

    sizes = {name: sum(leaf.nbytes for leaf in kind.leaves(1.0)) for name, kind in checkpoints.KINDS.items()}
    assert 1.4e9 < sizes["gpt2"] < 1.45e9
    assert 2.4e9 < sizes["llama"] < 2.6e9
    assert 4900 < len(checkpoints.KINDS["resnet"].leaves(1.0)) < 5100


def test_rounds_medians_and_ratios() -> None:
    from benchmarks.measuring import Contender, NotRun, Sample, Wrong, measure

    order: list[str] = []

    def contender(name: str, seconds: list[float]) -> Contender:
        left = iter(seconds)

        def run() -> Sample:
            order.append(name)
            return Sample(next(left), checked=1)

        return Contender(name, run)

    def refuses() -> Sample:
        order.append("absent")
        raise NotRun("no such package")

    def lies() -> Sample:
        raise Wrong("x differs")

    six = [contender("a", [1, 2, 3, 4, 9, 3]), contender("b", [4, 6, 6, 6, 8, 6])]
    group = measure("job", [*six, Contender("absent", refuses), Contender("liar", lies, True)], "a", 6, seed=1)
    a, b, absent, liar = group.rows
    assert (a.median(), a.minimum(), b.median(), b.minimum()) == (3, 1, 6, 4)
    assert (group.ratio(b), group.ratio(b, "minimum"), group.ratio(absent)) == (2, 4, None)
    assert (absent.not_run, absent.ok) == ("no such package", True)
    assert (liar.wrong, liar.ok) == ("x differs", False)
    assert order.count("absent") == 1  # it is not asked again
    pairs = [tuple(name for name in order if name in "ab")[i : i + 2] for i in range(0, 12, 2)]
    assert set(pairs) == {("a", "b"), ("b", "a")}  # both orders occur


def test_memory_of_a_child_is_seen_from_outside(tmp_path: Path) -> None:
    from benchmarks.measuring import NotRun
    from benchmarks.processes import Child, memory

    if not memory():
        pytest.skip("this system does not tell what memory a process has")
    code = (
        "import json, sys, time\n"
        "held = bytearray(b'x' * (64 << 20)); time.sleep(0.1); del held\n"
        "print(json.dumps({'seconds': 0.25, 'before': 7}), flush=True)\n"
        "sys.stdin.readline()\n"
        "late = bytearray(b'x' * (256 << 20)); time.sleep(0.1)\n"
        "print(json.dumps({'checked': 3}), flush=True)\n"
    )
    sample = Child([sys.executable, "-c", code])()
    assert sample.anonymous is not None
    assert 64 << 20 < sample.anonymous < 250 << 20  # what is there after the job does not count
    assert (sample.seconds, sample.before, sample.checked) == (0.25, 7, 3)
    with pytest.raises(NotRun, match=r"more than 0\.2 s"):
        Child([sys.executable, "-c", "import time; time.sleep(30)"], limit=0.2)()
    with pytest.raises(NotRun, match="ValueError: so it is"):
        Child([sys.executable, "-c", "raise ValueError('so it is')"])()
