"""A stopped run goes on where it was: the file, and what was measured, are those of a run that was never stopped."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import graftax as gx
from graftax import cli
from graftax.errors import StorageError, UsageError
from graftax.execute import streamed
from graftax.execute.streamed import Stream
from graftax.formats.io import commit, journal

from .stopping import Stopped, content, counting, stop_after, tiles_handed_out

RULES = """rules = [
  { torch = "wide.weight", flax = "wide/kernel", layout = "linear" },
  { torch = "qkv.weight", flax = ["q/kernel", "k/kernel", "v/kernel"], fused = "block" },
  { torch = "conv.weight", flax = "conv/kernel", layout = "conv" },
  { torch = ["b_ih", "b_hh"], flax = "bias", fused = "sum" },
  { torch = "none", flax = "none", layout = "identity" },
  { torch = "plain", flax = "plain", layout = "identity" },
]"""
OUTS = ["out.safetensors", "out", "out.npz", "out.msgpack", "back.pt"]


def make_source(path: Path, scale: int = 1) -> Path:
    rng = np.random.default_rng(0)
    tensors = {
        "wide.weight": rng.standard_normal((300 * scale, 700), dtype=np.float32),
        "qkv.weight": rng.standard_normal((768 * scale, 300), dtype=np.float32),
        "conv.weight": rng.standard_normal((60, 70 * scale, 3, 5), dtype=np.float32),
        "b_ih": rng.standard_normal(300_000 * scale, dtype=np.float32),
        "b_hh": rng.standard_normal(300_000 * scale, dtype=np.float32),
        "none": np.zeros((0, 3), np.float32),
        "plain": rng.standard_normal((300, 500 * scale), dtype=np.float32),
    }
    save_file(tensors, path, {"format": "pt"})
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return make_source(tmp_path / "in" / "source.safetensors")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SYNC_BYTES", 1 << 18)
    monkeypatch.setattr(streamed, "_LEAST", 1 << 17)


def port(source: Path, out: Path, resume: bool = True, **more: Any) -> gx.types.Receipt:
    options: dict[str, Any] = {"max_memory": "512KiB", "dtype": "source", "to": "flax", "rules": RULES}
    if out.suffix == ".pt":
        options |= {"to": "torch"}
    if not out.suffix:
        options |= {"format": "hf_folder", "shard_size": "2MB"}
    like = None
    if out.suffix != ".npz":  # the casts are counted too
        options["dtype"] = "float16"
    return gx.port_file(source, like, out, resume=resume, **options | more)


def told(receipt: Any) -> dict[str, Any]:
    data = receipt.as_json()
    for key in ("notes", "bytes_read"):  # what the run did, not what it made
        data.pop(key, None)
    return data


def stopped_run(patch: pytest.MonkeyPatch, source: Path, out: Path, tiles: int) -> None:
    patch.setattr(Stream, "tiles", stop_after(tiles))
    with pytest.raises(Stopped):
        port(source, out)


def tiles_of(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    return tiles_handed_out(monkeypatch, lambda: port(source, out))


def durable(patch: pytest.MonkeyPatch, place: Path, copy: Path) -> None:
    """Keeps in `copy` what a power failure would leave of the staging folder: what was there when it was last noted."""
    inner = journal.Journal._append  # pyright: ignore[reportPrivateUsage]

    def appended(self: Any, record: Any) -> None:
        inner(self, record)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(place, copy)

    patch.setattr(journal.Journal, "_append", appended)


def put_back(place: Path, copy: Path) -> None:
    """The bytes of `copy` in the files of `place`, which stay the files that they are."""
    for path in [p for p in place.rglob("*") if p.is_file()]:
        kept = copy / path.relative_to(place)
        if kept.exists():
            path.write_bytes(kept.read_bytes())
        else:
            path.unlink()


@pytest.mark.parametrize("name", OUTS)
def test_stopped_between_tiles_and_resumed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "back.pt":
        port(source, tmp_path / "in" / "flax.safetensors", resume=False, dtype="source")
        source = tmp_path / "in" / "flax.safetensors"
    (tmp_path / "whole").mkdir()
    whole = port(source, tmp_path / "whole" / name, resume=False)
    out = tmp_path / name
    tiles = tiles_of(source, tmp_path / "whole" / f"again-{name}", monkeypatch)
    assert tiles > 10
    place = commit.resume_place(out)
    for step in range(3):
        with monkeypatch.context() as patch:
            durable(patch, place, tmp_path / "copy")
            stopped_run(patch, source, out, tiles * (step + 1) // 4)
        assert place.is_dir()
        assert not out.exists()
        put_back(place, tmp_path / "copy")
        again = tmp_path / f"{step}{out.suffix}"
        made: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(Stream, "tiles", counting(made))
            resumed = port(source, out)
        assert len(made) < tiles, "nothing was left out"
        assert any("resumed after" in note for note in resumed.notes)
        assert content(out) == content(tmp_path / "whole" / name)
        assert told(resumed) == told(whole)
        assert not place.exists()
        out.rename(again)


@pytest.mark.parametrize("name", ["out.safetensors", "out"])
@pytest.mark.parametrize("point", ["journal", "settle", "put", "after"])
def test_stopped_while_it_is_put_in_place(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, point: str
) -> None:
    """Also where an old folder has taken the place of the new one in the staging folder."""
    out = tmp_path / name
    port(source, out, resume=False, dtype="source")
    old = content(out)
    port(source, tmp_path / f"whole-{name}", resume=False)
    new = {key.replace("whole-", ""): value for key, value in content(tmp_path / f"whole-{name}").items()}

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stopped

    def put_and_stop(*args: Any) -> None:
        inner(*args)
        raise Stopped

    inner = commit._put  # pyright: ignore[reportPrivateUsage]
    with monkeypatch.context() as patch:
        if point == "journal":
            patch.setattr(journal.Journal, "close", stop)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a kill removes nothing
        if point == "settle":
            patch.setattr(commit, "_settle", stop)
        elif point != "journal":
            patch.setattr(commit, "_put", stop if point == "put" else put_and_stop)
        with pytest.raises(Stopped):
            port(source, out)
    assert content(out) == (new if point == "after" else old)
    port(source, out)
    assert content(out) == new
    assert not commit.resume_place(out).exists()


@pytest.mark.parametrize("form", ["out.safetensors", "./out.safetensors"])
def test_an_output_in_the_current_folder_is_resumed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stopped_run(patch, source, Path(form), 12)
    assert any("resumed after" in note for note in port(source, Path(form)).notes)


def test_a_run_that_is_refused_removes_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what can be resumed, nor folders whose names only look like ours."""
    out = tmp_path / "out.safetensors"
    mine = [tmp_path / ".out.safetensors.graftax-notes", tmp_path / "out.safetensors.graftax-old"]
    with monkeypatch.context() as patch:
        stopped_run(patch, source, out, 12)
    out.write_bytes(b"here")
    for folder in mine:
        folder.mkdir()
    with pytest.raises(StorageError, match="clobber=False"):
        port(source, out, resume=False, clobber=False)
    assert commit.resume_place(out).is_dir()
    assert all(folder.is_dir() for folder in mine)
    out.unlink()
    mine[1].rmdir()
    assert any("resumed after" in note for note in port(source, out).notes)
    assert mine[0].is_dir()


def test_what_cannot_be_put_in_place_is_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.safetensors"

    def fail(*args: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(commit, "_put", fail)
        with pytest.raises(StorageError):
            port(source, out)
    made: list[int] = []
    monkeypatch.setattr(Stream, "tiles", counting(made))
    assert any("resumed after" in note for note in port(source, out).notes)
    assert not made, "all of it was there"


@pytest.mark.parametrize("what", ["source", "touched", "plan", "option", "torn", "lost", "version"])
def test_what_is_not_the_same_starts_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    out = tmp_path / "out.safetensors"
    with monkeypatch.context() as patch:
        stopped_run(patch, source, out, 12)
    place = commit.resume_place(out)
    assert commit.journal_path(place / out.name).read_bytes().count(b"\n") > 2
    more: dict[str, Any] = {}
    if what == "source":  # as large as before, and of the same time
        stat = os.stat(source)
        raw = bytearray(source.read_bytes())
        raw[-1000:] = b"\1" * 1000
        source.write_bytes(raw)
        os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif what == "touched":
        os.utime(source)
    elif what == "plan":
        more["rules"] = RULES.replace('layout = "linear"', 'layout = "identity"')
    elif what == "option":
        more["dtype"] = "source"
    elif what == "torn":
        journal_file = commit.journal_path(place / out.name)
        journal_file.write_bytes(b"x" + journal_file.read_bytes())
    elif what == "lost":
        (place / out.name).unlink()
    else:
        from graftax.formats import saving

        monkeypatch.setattr(saving, "version", lambda name: "another")
    receipt = port(source, out, **more)
    assert not any("resumed" in note for note in receipt.notes)
    assert what == "torn" or any("started anew" in note for note in receipt.notes)
    port(source, tmp_path / "in" / "whole.safetensors", resume=False, **more)
    assert out.read_bytes() == (tmp_path / "in" / "whole.safetensors").read_bytes()


def test_a_torn_line_counts_for_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.safetensors"
    with monkeypatch.context() as patch:
        stopped_run(patch, source, out, 12)
    path = commit.journal_path(commit.resume_place(out) / out.name)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:-5])
    receipt = port(source, out)
    assert any("resumed" in note for note in receipt.notes)
    port(source, tmp_path / "in" / "whole.safetensors", resume=False)
    assert out.read_bytes() == (tmp_path / "in" / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["out.safetensors", "out.npz"])
def test_another_budget_goes_on_from_the_last_whole_tensor(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out = tmp_path / name
    whole = port(source, tmp_path / "in" / name, resume=False)
    for stop in (5, 7, 9, 11):  # in the middle of one tensor or another
        with monkeypatch.context() as patch:
            stopped_run(patch, source, out, stop)
        receipt = port(source, out, max_memory="2MiB")
        assert told(receipt) == told(whole)
        assert out.read_bytes() == (tmp_path / "in" / name).read_bytes()


def test_an_output_called_journal(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "journal"
    with monkeypatch.context() as patch:
        stopped_run(patch, source, out, 12)
    assert any("resumed" in note for note in port(source, out).notes)
    port(source, tmp_path / "in" / "journal", resume=False)
    assert content(out) == content(tmp_path / "in" / "journal")


def test_two_runs_do_not_resume_the_same(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    place = commit.resume_place(out)
    place.mkdir(mode=0o700)
    fd = os.open(place, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with pytest.raises(StorageError, match="another resumable run is writing"):
            port(source, out)
        port(source, out, resume=False)  # has a place of its own
        assert place.is_dir()
    finally:
        os.close(fd)
    receipt = port(source, out, resume=False)
    assert not place.exists()
    assert any("stopped run left" in note for note in receipt.notes)


def test_a_place_that_others_may_write_to_is_refused(source: Path, tmp_path: Path) -> None:
    place = commit.resume_place(tmp_path / "out.safetensors")
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(StorageError, match="others may write to it"):
        port(source, tmp_path / "out.safetensors")


def test_without_resume_nothing_is_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "tiles", stop_after(5))
    with pytest.raises(Stopped):
        port(source, tmp_path / "out.safetensors", resume=False)
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_what_is_not_in_files_is_not_resumed(tmp_path: Path) -> None:
    tree = {"a": np.ones((2, 3), np.float32)}
    with pytest.raises(UsageError, match="not stored in files"):
        gx.port_file(tree, tree, tmp_path / "o.npz", to="flax", resume=True)


def test_orbax_says_that_it_starts_anew(source: Path, tmp_path: Path) -> None:
    rules = "\n".join(rule for rule in RULES.splitlines() if '"none"' not in rule)
    receipt = gx.port_file(source, None, tmp_path / "out", rules=rules, to="flax", unused="drop", resume=True)
    assert any("orbax is written as a whole" in note for note in receipt.notes)


def test_orbax_says_that_a_tensor_is_larger_than_the_budget(tmp_path: Path) -> None:
    tree = {"a": np.zeros((1024, 600), np.float32), "b": np.zeros((1024, 600), np.float32)}
    for budget, told in (
        ("1MiB", ["orbax is handed each tensor whole, the largest of 2.46 MB, beyond the 1.05 MB of"]),
        ("4MiB", []),
    ):
        receipt = gx.port_file(tree, tree, tmp_path / budget, to="flax", max_memory=budget)
        assert len(receipt.notes) == len(told)
        assert all(text in note for text, note in zip(told, receipt.notes, strict=True))


def test_the_command_line_resumes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.toml").write_text(RULES)
    out = tmp_path / "out.safetensors"
    line = ["port", str(source), "--rules", str(tmp_path / "r.toml"), "--to", "flax", "-o", str(out)]
    line += ["--max-memory", "512KiB", "--resume", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "tiles", stop_after(12))
        assert cli.run(line) == 70
    capsys.readouterr()
    assert not out.exists()
    assert cli.run(line) == 0
    notes = json.loads(capsys.readouterr().out)["result"]["receipt"]["notes"]
    assert any("resumed after" in note for note in notes)


# ---------------------------------------------------------------- killed

CHILD = """
import sys
from graftax import cli
from graftax.formats.io import journal
journal.SYNC_BYTES = 1 << 20
from graftax.execute.streamed import Stream
print("ready", flush=True)
sys.exit(cli.run(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kills"), [("out.safetensors", 20), ("out", 4), ("out.npz", 4), ("out.msgpack", 4)])
def test_killed_at_random_moments_and_resumed(tmp_path: Path, name: str, kills: int) -> None:
    (tmp_path / "in").mkdir()
    source = make_source(tmp_path / "in" / "source.safetensors", 12)
    (tmp_path / "r.toml").write_text(RULES)
    line = [sys.executable, "-c", CHILD, "port", str(source), "--rules", str(tmp_path / "r.toml"), "--to", "flax"]
    line += ["--max-memory", "4MiB", "--json"]
    line += [] if "." in name else ["--format", "hf_folder", "--shard-size", "20MB"]
    whole = tmp_path / "in" / name
    begin = time.monotonic()
    subprocess.run([*line, "-o", str(whole)], check=True, capture_output=True, timeout=120)
    lasts = time.monotonic() - begin
    out, rng, resumed = tmp_path / name, random.Random(0), 0
    for _ in range(kills):
        killed, most = 0, rng.choice([1, 1, 2])
        while True:  # killed as often as it takes to be killed at least once
            child = subprocess.Popen([*line, "-o", str(out), "--resume"], stdout=subprocess.PIPE)
            assert child.stdout is not None
            child.stdout.readline()
            if killed < most:
                time.sleep(rng.random() * lasts * 0.7)
                child.send_signal(signal.SIGKILL)
            text = child.stdout.read()
            if child.wait() == -signal.SIGKILL:
                killed += 1
                continue
            assert child.returncode == 0
            break
        resumed += b"resumed after" in text
        assert content(out) == content(whole)
        assert sorted(os.listdir(tmp_path)) == sorted({"in", "r.toml", name})
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert resumed >= kills // 3, "the kills came before anything was written"
