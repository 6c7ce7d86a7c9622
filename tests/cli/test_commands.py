"""The command line: exit codes, messages, JSON; each fault kind by code and message."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from graftax.cli import run


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """A torch Linear(3 -> 5) and the Flax Dense to produce."""
    rng = np.random.default_rng(0)
    save_file(
        {"fc.weight": rng.normal(size=(5, 3)).astype("f4"), "fc.bias": rng.normal(size=5).astype("f4")},
        tmp_path / "m.safetensors",
    )
    save_file(
        {"params/fc/kernel": np.zeros((3, 5), "f4"), "params/fc/bias": np.zeros(5, "f4")}, tmp_path / "like.safetensors"
    )
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = run([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert len(err.encode()) <= 2048
    return code, out, err


def result(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    code, out, _ = call(capsys, *argv, "--json")
    document = json.loads(out)
    assert set(document) == {"schema", "command", "ok", "exit", "result", "errors"}
    assert document["schema"] == 1
    assert document["exit"] == code
    assert document["ok"] is (code == 0)
    return document


# ---------------------------------------------------------------- 0: done


def test_port_transposes_a_linear(linear: Path, capsys):
    out = linear / "out.safetensors"
    code, text, err = call(capsys, "port", linear / "m.safetensors", "--like", linear / "like.safetensors", "-o", out)
    assert (code, err) == (0, "")
    assert "2 leaves" in text
    assert "lossless: yes" in text
    torch, flax = load_file(linear / "m.safetensors"), load_file(out)
    np.testing.assert_array_equal(flax["params/fc/kernel"], torch["fc.weight"].T)
    np.testing.assert_array_equal(flax["params/fc/bias"], torch["fc.bias"])


def test_port_back_gives_the_same_bytes(linear: Path, capsys):
    there, back = linear / "there.safetensors", linear / "back.safetensors"
    assert call(capsys, "port", linear / "m.safetensors", "--like", linear / "like.safetensors", "-o", there)[0] == 0
    assert call(capsys, "port", there, "--like", linear / "m.safetensors", "-o", back)[0] == 0
    torch, again = load_file(linear / "m.safetensors"), load_file(back)
    assert {k: v.tobytes() for k, v in torch.items()} == {k: v.tobytes() for k, v in again.items()}


def test_a_saved_plan_ports_the_same(linear: Path, capsys):
    plan, one, two = linear / "p.json", linear / "one.safetensors", linear / "two.safetensors"
    m, like = linear / "m.safetensors", linear / "like.safetensors"
    code, text, _ = call(capsys, "plan", m, "--like", like, "-o", plan)
    assert code == 0
    assert "fc.weight -> params/fc/kernel" in text
    assert "complete: yes" in text
    assert call(capsys, "port", m, "--plan", plan, "-o", one)[0] == 0
    assert call(capsys, "port", m, "--like", like, "-o", two)[0] == 0
    assert one.read_bytes() == two.read_bytes()


def test_spec_file_is_a_like(linear: Path, capsys):
    code, spec, _ = call(capsys, "inspect", linear / "like.safetensors", "--spec")
    assert code == 0
    (linear / "like.json").write_text(spec)
    out = linear / "o.safetensors"
    assert call(capsys, "port", linear / "m.safetensors", "--like", linear / "like.json", "-o", out)[0] == 0
    assert load_file(out)["params/fc/kernel"].shape == (3, 5)


def test_inspect_stats_and_hashes(linear: Path, capsys):
    document = result(capsys, "inspect", linear / "m.safetensors", "--stats", "--hashes")
    row = document["result"]["tensors"]["fc.weight"]
    weight = load_file(linear / "m.safetensors")["fc.weight"]
    assert row["shape"] == [5, 3]
    assert row["stats"]["max"] == pytest.approx(float(weight.max()))
    import hashlib

    assert row["sha256"] == hashlib.sha256(weight.tobytes()).hexdigest()


def test_dry_run_writes_nothing(linear: Path, capsys):
    out = linear / "o.safetensors"
    args = ("port", linear / "m.safetensors", "--like", linear / "like.safetensors", "-o", out, "--dry-run")
    code, text, _ = call(capsys, *args)
    assert code == 0
    assert "not written" in text
    assert not out.exists()


def test_diff_equal_and_ported(linear: Path, capsys):
    m, like, out = linear / "m.safetensors", linear / "like.safetensors", linear / "o.safetensors"
    call(capsys, "port", m, "--like", like, "-o", out)
    assert call(capsys, "diff", m, m)[0] == 0
    assert call(capsys, "diff", m, out, "--like", like)[0] == 0


# ---------------------------------------------------------------- 1: the answer is no


def test_1_an_unfilled_leaf_is_named(linear: Path, capsys):
    like = {**load_file(linear / "like.safetensors"), "params/head/kernel": np.zeros((7, 2), "f4")}
    save_file(like, linear / "like.safetensors")
    out = linear / "o.safetensors"
    args = ("port", linear / "m.safetensors", "--like", linear / "like.safetensors", "-o", out)
    code, _, err = call(capsys, *args)
    assert code == 1
    assert "params/head/kernel" in err
    assert not out.exists()
    document = result(capsys, *args)
    assert document["result"]["questions"][0]["targets"] == ["params/head/kernel"]
    assert call(capsys, *args, "--missing", "zeros")[0] == 0
    assert not load_file(out)["params/head/kernel"].any()
    like["params/head/kernel"][:] = 3
    save_file(like, linear / "like.safetensors")
    assert call(capsys, *args, "--missing", "keep")[0] == 0
    assert (load_file(out)["params/head/kernel"] == 3).all()


def test_1_an_unused_tensor_is_named(linear: Path, capsys):
    save_file({**load_file(linear / "m.safetensors"), "head.weight": np.ones((7, 2), "f4")}, linear / "m.safetensors")
    args = ("port", linear / "m.safetensors", "--like", linear / "like.safetensors", "-o", linear / "o.safetensors")
    code, _, err = call(capsys, *args)
    assert code == 1
    assert "head.weight" in err
    assert "--unused" in err
    code, text, _ = call(capsys, *args, "--unused", "drop")
    assert code == 0
    assert "head.weight" in text


def test_1_floating_dtypes_that_differ_show_both_ways_out(linear: Path, capsys):
    half = {k: v.astype("f2") for k, v in load_file(linear / "m.safetensors").items()}
    save_file(half, linear / "m.safetensors")
    out = linear / "o.safetensors"
    args = ("port", linear / "m.safetensors", "--like", linear / "like.safetensors", "-o", out)
    code, _, err = call(capsys, *args)
    assert code == 1
    assert "--dtype like" in err
    assert "--dtype source" in err
    assert call(capsys, *args, "--dtype", "source")[0] == 0
    assert load_file(out)["params/fc/kernel"].dtype == np.float16
    assert call(capsys, *args, "--dtype", "like")[0] == 0
    np.testing.assert_array_equal(load_file(out)["params/fc/kernel"], half["fc.weight"].T.astype("f4"))


def test_1_an_overflowing_cast_is_an_error(linear: Path, capsys):
    big = load_file(linear / "m.safetensors")
    big["fc.bias"][0] = 1e30
    save_file(big, linear / "m.safetensors")
    out = linear / "o.safetensors"
    args = ("port", linear / "m.safetensors", "--like", linear / "like.safetensors", "-o", out, "--dtype", "float16")
    code, _, err = call(capsys, *args)
    assert code == 1
    assert "float16" in err
    assert not out.exists()


def test_overflow_saturates_where_it_is_asked_to(linear: Path, capsys):
    big = load_file(linear / "m.safetensors")
    big["fc.bias"][:2] = 1e30, -1e30
    save_file(big, linear / "m.safetensors")
    args = (linear / "m.safetensors", "--like", linear / "like.safetensors", "--dtype", "float16")
    out = linear / "o.safetensors"
    code, _, err = call(capsys, "port", *args, "-o", out)
    assert (code, "--overflow saturate" in err) == (1, True)
    assert call(capsys, "port", *args, "-o", out, "--overflow", "error")[0] == 1
    assert not out.exists()
    code, text, _ = call(capsys, "port", *args, "-o", out, "--overflow", "saturate")
    assert (code, "2 saturated" in text) == (0, True)
    assert load_file(out)["params/fc/bias"][:2].tolist() == [65504, -65504]
    plan = linear / "plan.json"
    assert call(capsys, "plan", *args, "--overflow", "saturate", "-o", plan)[0] == 0
    planned = ("port", linear / "m.safetensors", "--like", linear / "like.safetensors", "--plan", plan, "-o", out)
    assert call(capsys, *planned)[0] == 0
    assert load_file(out)["params/fc/bias"][:2].tolist() == [65504, -65504]
    code, _, err = call(capsys, *planned, "--overflow", "error")
    assert (code, "--overflow cannot change it" in err) == (2, True)
    assert call(capsys, "plan", *args, "--overflow", "propagate")[0] == 2


def test_a_cast_says_how_far_it_moves_values(linear: Path, capsys):
    given = load_file(linear / "m.safetensors")
    given["fc.bias"][0] = 1 + 2**-9  # lies between two neighbours of bfloat16, 1 and 1 + 2**-7
    save_file(given, linear / "m.safetensors")
    args = ("port", linear / "m.safetensors", "--like", linear / "like.safetensors", "--dtype", "bfloat16")
    code, text, _ = call(capsys, *args, "-o", linear / "o.safetensors")
    assert code == 0
    assert "params/fc/bias: the cast changes values by up to 0." in text
    assert "come back" not in text
    code, text, _ = call(capsys, *args, "-o", linear / "o.safetensors", "--json")
    receipt = json.loads(text)["result"]["receipt"]
    bias = given["fc.bias"].astype("f8")
    made = bias.astype("f4").astype(ml_dtypes.bfloat16).astype("f8")
    changes = {tuple(m["targets"]): m["change"] for m in receipt["measured"]}
    assert changes["params/fc/bias",] == pytest.approx(np.max(np.abs(made - bias) / np.abs(bias)))
    assert receipt["casts"]["change"] == max(changes.values())


def test_1_int64_never_becomes_int32(linear: Path, capsys):
    m, like = load_file(linear / "m.safetensors"), load_file(linear / "like.safetensors")
    save_file({**m, "fc.steps": np.array([2**40], "i8")}, linear / "m.safetensors")
    save_file({**like, "params/fc/steps": np.zeros(1, "i4")}, linear / "like.safetensors")
    out = linear / "o.safetensors"
    args = ("port", linear / "m.safetensors", "--like", linear / "like.safetensors", "-o", out)
    for extra in ((), ("--dtype", "like"), ("--dtype", "float32")):
        code, _, err = call(capsys, *args, *extra)
        assert code == 1
        assert "int32" in err
        assert not out.exists()
    assert call(capsys, *args, "--dtype", "source")[0] == 0
    assert load_file(out)["params/fc/steps"].tolist() == [2**40]


def test_1_diff_names_what_differs(linear: Path, capsys):
    other = load_file(linear / "m.safetensors")
    other["fc.bias"][2] += 0.25
    save_file(other, linear / "n.safetensors")
    code, text, _ = call(capsys, "diff", linear / "m.safetensors", linear / "n.safetensors")
    assert code == 1
    assert "fc.bias" in text
    assert "1 of 5" in text
    assert call(capsys, "diff", linear / "m.safetensors", linear / "n.safetensors", "--atol", "0.3")[0] == 0


def test_1_strict_assumptions(linear: Path, capsys):
    args = ("plan", linear / "m.safetensors", "--like", linear / "like.safetensors", "--strict-assumptions")
    document = result(capsys, *args)
    assert document["exit"] == (1 if document["result"]["assumptions"] else 0)


def test_1_suggestions_are_written_and_load(linear: Path, capsys):
    like = {**load_file(linear / "like.safetensors"), "params/head/kernel": np.zeros((7, 2), "f4")}
    save_file(like, linear / "like.safetensors")
    rules = linear / "r.toml"
    args = ("plan", linear / "m.safetensors", "--like", linear / "like.safetensors")
    assert call(capsys, *args, "--suggest", rules)[0] == 1
    assert "params/head/kernel" in rules.read_text()
    assert call(capsys, *args, "--rules", rules, "--missing", "zeros")[0] == 0


# ---------------------------------------------------------------- 2: usage


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (("port",), "source"),
        (("port", "m.safetensors", "-o", "o.safetensors"), "--like"),
        (("frobnicate",), "frobnicate"),
        (("inspect", "m.safetensors", "--frobnicate"), "--frobnicate"),
        (("port", "m.safetensors", "--like", "like.safetensors", "-o", "o", "--missing", "maybe"), "maybe"),
        (("plan", "m.safetensors", "--like", "like.safetensors", "--dtype", "float99"), "float99"),
        (("plan", "m.safetensors", "--like", "like.safetensors", "--to", "torch"), "--to"),
        (("plan", "m.safetensors", "--like", "no_such_module_here:factory"), "no_such_module_here"),
        (("replace", "m.safetensors", "fc.bias", "-o", "o.safetensors"), "--constant"),
        (("replace", "m.safetensors", "fc.bias", "--zeros", "--constant", "1", "-o", "o.safetensors"), "exactly one"),
        (("replace", "m.safetensors", "fc.bias", "--normal", "1", "-o", "o.safetensors"), "--seed"),
    ],
)
def test_2_usage(linear: Path, capsys, monkeypatch, argv, word):
    monkeypatch.chdir(linear)
    code, _, err = call(capsys, *argv)
    assert code == 2, err
    assert word.lower() in err.lower()


def test_2_a_rules_file_names_the_line(linear: Path, capsys):
    (linear / "r.toml").write_text('rules = [\n  { torch = "fc.weight", flacks = "fc/kernel" },\n]\n')
    args = ("plan", linear / "m.safetensors", "--like", linear / "like.safetensors", "--rules", linear / "r.toml")
    code, _, err = call(capsys, *args)
    assert code == 2
    assert "line 2" in err
    assert "flacks" in err


def test_2_a_damaged_plan(linear: Path, capsys):
    (linear / "p.json").write_text('{"graftax_plan": 1, "source": {}}')
    out = linear / "o.safetensors"
    code, _, err = call(capsys, "port", linear / "m.safetensors", "--plan", linear / "p.json", "-o", out)
    assert code == 2
    assert "p.json" in err


# ---------------------------------------------------------------- 3, 4, 5: bad, unsafe, missing


def test_3_truncated(linear: Path, capsys):
    raw = (linear / "m.safetensors").read_bytes()
    (linear / "cut.safetensors").write_bytes(raw[:-4])
    code, _, err = call(capsys, "inspect", linear / "cut.safetensors")
    assert code == 3
    assert "cut.safetensors" in err


def test_3_an_lfs_pointer_is_called_one(linear: Path, capsys):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    (linear / "lfs.safetensors").write_text(pointer)
    code, _, err = call(capsys, "inspect", linear / "lfs.safetensors")
    assert code == 3
    assert "LFS" in err


def test_4_a_pickle_that_would_run_code(linear: Path, capsys):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"w": Evil()}, linear / "evil.pt")
    code, _, err = call(capsys, "inspect", linear / "evil.pt")
    assert code == 4
    assert "weights_only=False" not in err


def test_5_missing(linear: Path, capsys):
    code, _, err = call(capsys, "inspect", linear / "nothing.safetensors")
    assert code == 5
    assert "nothing.safetensors" in err


def test_5_the_input_is_not_the_output(linear: Path, capsys):
    m = linear / "m.safetensors"
    before = m.read_bytes()
    code, _, err = call(capsys, "replace", m, "fc.bias", "--zeros", "-o", m)
    assert code == 5
    assert m.read_bytes() == before
    assert "m.safetensors" in err


def test_5_no_clobber(linear: Path, capsys):
    out = linear / "o.safetensors"
    out.write_bytes(b"mine")
    args = ("port", linear / "m.safetensors", "--like", linear / "like.safetensors", "-o", out)
    assert call(capsys, *args, "--no-clobber")[0] == 5
    assert out.read_bytes() == b"mine"
    assert call(capsys, *args)[0] == 0


def test_several_failures_take_the_graver_code(linear: Path, capsys):
    (linear / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    code, _, _ = call(capsys, "plan", linear / "missing.safetensors", "--like", linear / "bad.safetensors")
    assert code == 3


# ---------------------------------------------------------------- 70, 130


def test_70_a_factory_that_raises_is_named(linear: Path, capsys, monkeypatch):
    (linear / "broken_factory_module.py").write_text("def make():\n    raise ValueError('the user made this')\n")
    monkeypatch.chdir(linear)
    code, _, err = call(capsys, "plan", linear / "m.safetensors", "--like", "broken_factory_module:make")
    assert code == 70
    assert "the user made this" in err
    assert "broken_factory_module" in err


def test_130_interrupted(linear: Path, capsys, monkeypatch):
    import graftax.report.inspecting as inspecting

    def interrupt(*_: object, **__: object):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspecting, "inspection", interrupt)
    assert call(capsys, "inspect", linear / "m.safetensors")[0] == 130


# ---------------------------------------------------------------- text


def test_json_is_printed_whatever_happens(linear: Path, capsys):
    assert result(capsys, "inspect", linear / "nothing.safetensors")["exit"] == 5
    assert result(capsys, "inspect", linear / "m.safetensors", "--nonsense")["exit"] == 2
    assert result(capsys, "layers")["ok"]


def test_names_from_files_are_escaped(linear: Path, capsys):
    save_file({"a\x1b[31m.weight\u202e": np.zeros(3, "f4")}, linear / "esc.safetensors")
    code, text, _ = call(capsys, "inspect", linear / "esc.safetensors")
    assert code == 0
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize("reader", ["true", "head -1"])
@pytest.mark.parametrize(
    ("words", "code"), [("inspect a", 0), ("diff a b", 1), ("diff a b --json", 1), ("inspect c", 5), ("--help", 0)]
)
def test_a_closed_pipe_changes_no_answer(tmp_path: Path, words: str, code: int, reader: str):
    for name, value in (("a", 0.0), ("b", 1.0)):
        leaves = {f"h.{i}.weight": np.full(2, value, "f4") for i in range(2000)}  # more than a pipe holds
        save_file(leaves, tmp_path / f"{name}.safetensors")
    words = " ".join(f"{word}.safetensors" if len(word) == 1 else word for word in words.split())
    command = f"{sys.executable} -m graftax.cli {words} | {reader}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "roken pipe" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize(("file", "code"), [("/dev/full", 5), ("&-", 0)])
def test_a_stdout_that_takes_nothing(linear: Path, file: str, code: int):
    command = f"{sys.executable} -m graftax.cli inspect {linear / 'm.safetensors'} >{file}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert ("No space left" in done.stderr) is (code == 5)


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("-2", -2), ("1e-3", 1e-3)])
def test_a_constant_is_the_number_that_was_written(linear: Path, capsys, text, value):
    out = linear / "o.safetensors"
    assert call(capsys, "replace", linear / "m.safetensors", "fc.bias", f"--constant={text}", "-o", out)[0] == 0
    assert (load_file(out)["fc.bias"] == np.float32(value)).all()


def test_a_constant_int64_is_exact(linear: Path, capsys):
    save_file({"steps": np.zeros(2, "i8"), "a.weight": np.ones((2, 2), "f4")}, linear / "i.safetensors")
    out = linear / "o.safetensors"
    assert call(capsys, "replace", linear / "i.safetensors", "steps", "--constant", 2**53 + 1, "-o", out)[0] == 0
    assert load_file(out)["steps"].tolist() == [2**53 + 1] * 2
    assert call(capsys, "replace", linear / "i.safetensors", "steps", "--constant", "many", "-o", out)[0] == 2


def test_outputs_of_plan_never_replace_another_file(linear: Path, capsys):
    args = ("plan", linear / "m.safetensors", "--like", linear / "like.safetensors")
    mine = linear / "notes.json"
    mine.write_text("mine")
    assert call(capsys, *args, "-o", mine)[0] == 5
    assert call(capsys, *args, "--suggest", mine)[0] == 5
    assert mine.read_text() == "mine"
    plan = linear / "p.json"
    assert call(capsys, *args, "-o", plan)[0] == 0
    assert call(capsys, *args, "-o", plan)[0] == 0


def test_an_incomplete_plan_is_not_written(linear: Path, capsys):
    like = {**load_file(linear / "like.safetensors"), "params/head/kernel": np.zeros((7, 2), "f4")}
    save_file(like, linear / "like.safetensors")
    plan = linear / "p.json"
    assert call(capsys, "plan", linear / "m.safetensors", "--like", linear / "like.safetensors", "-o", plan)[0] == 1
    assert not plan.exists()


def test_suggestions_in_use_are_not_overwritten(linear: Path, capsys):
    rules = linear / "r.toml"
    args = ("plan", linear / "m.safetensors", "--like", linear / "like.safetensors", "--suggest", rules)
    assert call(capsys, *args)[0] == 0
    assert call(capsys, *args)[0] == 0
    used = rules.read_text().replace("]", '{ torch = "fc.weight", flax = "params/fc/kernel" },\n]')
    rules.write_text(used)
    assert call(capsys, *args)[0] == 5
    assert rules.read_text() == used


def test_replace_refuses_to_leave_an_optimizer_behind(linear: Path, capsys):
    torch = pytest.importorskip("torch")
    torch.save({"model": {"a.weight": torch.ones(2, 3)}, "epoch": 3}, linear / "run.pt")
    out = linear / "o.pt"
    code, _, err = call(capsys, "replace", linear / "run.pt", "a.weight", "--zeros", "-o", out)
    assert code == 1
    assert "epoch" in err
    assert "run.pt::model" in err
    assert call(capsys, "replace", f"{linear / 'run.pt'}::model", "a.weight", "--zeros", "-o", out)[0] == 0
    assert not torch.load(out, weights_only=True)["a.weight"].any()


def test_a_folder_with_a_file_of_the_users_is_not_replaced(linear: Path, capsys):
    folder = linear / "mine"
    folder.mkdir()
    (folder / "best.safetensors").write_bytes((linear / "m.safetensors").read_bytes())
    args = ("port", linear / "m.safetensors", "--like", linear / "like.safetensors", "-o", folder)
    assert call(capsys, *args)[0] == 5
    assert (folder / "best.safetensors").exists()


@pytest.mark.parametrize("command", ["", "inspect", "plan", "port", "replace", "ablate", "verify", "diff", "layers"])
def test_help_is_wrapped_once(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "[default: False]" not in text
    lists = [block.splitlines() for block in text.split("\n\n") if ":\n" in block]
    assert lists
    for lines in lists:
        assert all(line.startswith("  ") for line in lines[1:])
        assert max(map(len, lines)) <= 80
        for line in lines[1:]:
            assert line.startswith("      ") or ":" in line, line


# ---------------------------------------------------------------- finished plans


def test_1_a_plan_does_not_skip_what_it_was_not_made_for(linear: Path, capsys):
    m, plan, out = linear / "m.safetensors", linear / "p.json", linear / "o.safetensors"
    assert call(capsys, "plan", m, "--like", linear / "like.safetensors", "-o", plan)[0] == 0
    assert call(capsys, "port", m, "--plan", plan, "-o", out)[0] == 0
    before = out.read_bytes()
    extra = linear / "extra.safetensors"
    save_file(load_file(m) | {"extra.weight": np.ones(3, "f4"), "more.weight": np.ones(3, "f4")}, extra)
    code, _, err = call(capsys, "port", extra, "--plan", plan, "-o", out)
    assert code == 1
    assert "extra.weight" in err
    assert "more.weight" in err
    assert "Plan again" in err
    assert out.read_bytes() == before
    code, _, err = call(capsys, "diff", extra, out, "--plan", plan)
    assert code == 1
    assert "extra.weight" in err
    assert call(capsys, "diff", m, out, "--plan", plan)[0] == 0


@pytest.mark.parametrize(("option", "value"), [("--unused", "error"), ("--unused", "drop"), ("--missing", "zeros")])
def test_2_a_finished_plan_takes_no_policies(linear: Path, capsys, option, value):
    m, plan, out = linear / "m.safetensors", linear / "p.json", linear / "o.safetensors"
    assert call(capsys, "plan", m, "--like", linear / "like.safetensors", "-o", plan)[0] == 0
    code, _, err = call(capsys, "port", m, "--plan", plan, option, value, "-o", out)
    assert code == 2
    assert option in err
    assert not out.exists()


# ---------------------------------------------------------------- what was meant


def test_2_a_plan_and_a_rules_file_are_told_apart(linear: Path, capsys):
    m, like, out = linear / "m.safetensors", linear / "like.safetensors", linear / "o.safetensors"
    plan, rules, text = linear / "p.json", linear / "r.toml", linear / "rules"
    assert call(capsys, "plan", m, "--like", like, "-o", plan)[0] == 0
    rules.write_text("# to be edited")
    text.write_text('# mine\n{ torch = "fc.weight", flax = "params/fc/kernel" }\n')
    code, _, err = call(capsys, "port", m, "--like", like, "--rules", plan, "-o", out)
    assert code == 2
    assert "p.json is a plan" in err
    assert "--plan" in err
    for file in (rules, text):
        code, _, err = call(capsys, "port", m, "--plan", file, "-o", out)
        assert code == 2
        assert f"{file.name} is a rules file" in err
        assert "--rules" in err
    (linear / "broken.json").write_text('{"graftax_plan": 1,')
    code, _, err = call(capsys, "port", m, "--plan", linear / "broken.json", "-o", out)
    assert code == 2
    assert "is not JSON" in err


@pytest.mark.parametrize("linked", [False, True])
def test_5_rules_and_plans_are_not_written_over(linear: Path, capsys, linked):
    m, like, plan, rules = (linear / name for name in ("m.safetensors", "like.safetensors", "p.json", "r.toml"))
    assert call(capsys, "plan", m, "--like", like, "-o", plan)[0] == 0
    rules.write_text('rules = [\n  { torch = "fc.weight", flax = "params/fc/kernel" },\n]\n')
    for words in (("--like", like, "--rules", rules), ("--plan", plan)):
        own = words[-1]
        before, out = own.read_bytes(), own
        if linked:
            out = linear / "link"
            out.unlink(missing_ok=True)
            out.symlink_to(own)
        for target in (out, f"{out}::model"):
            code, _, err = call(capsys, "port", m, *words, "-o", target, "--format", "safetensors")
            assert code == 5
            assert "is also an input" in err
            assert own.read_bytes() == before


def test_5_the_donor_is_not_the_output(linear: Path, capsys):
    donor = linear / "donor.safetensors"
    save_file({"fc.bias": np.ones(5, "f4")}, donor)
    before = donor.read_bytes()
    code, _, err = call(capsys, "replace", linear / "m.safetensors", "fc.bias", "--from", donor, "-o", donor)
    assert code == 5
    assert "is also an input" in err
    assert donor.read_bytes() == before


def test_diff_names_its_own_way_out(linear: Path, capsys):
    m, like, rules = linear / "m.safetensors", linear / "like.safetensors", linear / "r.toml"
    save_file({**load_file(like), "params/head/kernel": np.zeros((7, 2), "f4")}, like)
    code, _, err = call(capsys, "diff", m, like, "--like", like)
    assert code == 1
    assert "params/head/kernel" in err
    assert f"graftax plan {m} --like {like} --rules R.toml -o plan.json" in err
    assert f"graftax diff {m} {like} --plan plan.json" in err
    assert "--rules R.toml);" not in err
    document = result(capsys, "diff", m, like, "--like", like)
    assert "params/head/kernel" in document["errors"][0]["what"]
    rules.write_text('rules = [\n  { flax = "params/head/kernel", missing = "zeros" },\n]\n')
    plan = linear / "plan.json"
    assert call(capsys, "plan", m, "--like", like, "--rules", rules, "-o", plan)[0] == 0
    assert call(capsys, "diff", m, like, "--plan", plan)[0] == 1


def test_replace_takes_every_layout_that_its_message_offers(linear: Path, capsys):
    torch, like, out = linear / "t.safetensors", linear / "f.safetensors", linear / "o.safetensors"
    kernel = np.arange(81, dtype="f4").reshape(3, 3, 3, 3)
    save_file({"up.weight": kernel}, torch)
    save_file({"params/up/kernel": np.zeros_like(kernel)}, like)
    words = ("replace", like, "**/kernel", "--from", torch, "-o", out)
    code, _, err = call(capsys, *words)
    assert code == 1
    offered = [one or other for one, other in re.findall(r"--layout (?:'([^']+)'|(\w+))", err)]
    assert "conv_transpose default" in offered
    made = {}
    for layout in offered:
        assert call(capsys, *words, "--layout", layout)[0] == 0
        made[layout] = load_file(out)["params/up/kernel"]
    np.testing.assert_array_equal(made["identity"], kernel)
    np.testing.assert_array_equal(made["conv"], kernel.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(made["conv_transpose default"], kernel.transpose(2, 3, 0, 1)[::-1, ::-1])
    code, _, err = call(capsys, *words, "--layout", "sideways")
    assert code == 2
    assert "conv_transpose default" in err


def test_replace_takes_the_options_of_writing(linear: Path, capsys):
    m, out, donor = linear / "m.safetensors", linear / "shards", linear / "half.safetensors"
    before = load_file(m)
    save_file({"fc.bias": np.full(before["fc.bias"].shape, 0.5, "f2")}, donor)
    words = ("replace", m, "fc.*", "--exclude", "fc.weight", "--from", donor, "-o", out)
    code, _, err = call(capsys, *words)
    assert code == 1
    assert "--cast" in err
    more = ("--cast", "--format", "hf_folder", "--shard-size", "64", "--max-memory", "1MiB", "--resume")
    document = result(capsys, *words, *more)
    assert document["ok"]
    assert document["result"]["selected"] == ["fc.bias"]
    assert set(document["result"]["untouched"]) == set(before) - {"fc.bias"}
    assert len(list(out.glob("*.safetensors"))) > 1
    assert call(capsys, *words, *more, "--no-clobber")[0] == 5
    assert call(capsys, "replace", m, "fc.bias", "--zeros", "--cast", "-o", out)[0] == 2


def test_2_replace_takes_one_selector(linear: Path, capsys):
    out = linear / "o.safetensors"
    words = ("replace", linear / "m.safetensors", "fc.bias", "fc.weight", "--zeros", "-o", out)
    code, _, err = call(capsys, *words)
    assert code == 2
    assert "fc.weight" in err
    assert "one SELECT" in err
    assert "glob" in err
    assert "Unused Tokens" not in err
    assert "one SELECT" in result(capsys, *words)["errors"][0]["what"]
    code, _, err = call(capsys, "inspect", linear / "m.safetensors", "more")
    assert code == 2
    assert "more" in err
    assert "SELECT" not in err


def test_5_verify_writes_over_none_of_its_inputs(linear: Path, capsys):
    rules, source = linear / "r.toml", linear / "m.safetensors"
    rules.write_text("rules = []\n")
    words = ("verify", "--torch", "no_such:one", "--flax", "no_such:two", "--source", source, "--rules", rules)
    for option, own in (("--report", rules), ("--record", source)):
        before = own.read_bytes()
        code, _, err = call(capsys, *words, option, own)
        assert code == 5
        assert "is also an input" in err
        assert own.read_bytes() == before


def test_the_weights_of_several_containers_can_be_operated_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict()
    weights = {part: {"w.weight": torch.ones(3, 3)} for part in ("encoder", "decoder")}
    path, out = tmp_path / "g.pt", tmp_path / "o.pt"
    torch.save({**weights, "optimizer": optimizer}, path)
    code, _, err = call(capsys, "replace", path, "encoder.w.weight", "--zeros", "-o", out)
    assert code == 1
    assert f"{path}::." in err
    code, _, _ = call(capsys, "replace", f"{path}::.", "encoder.w.weight", "--zeros", "-o", out)
    assert code == 0
    found = torch.load(out)
    assert not found["encoder.w.weight"].any()
    assert found["decoder.w.weight"].all()
