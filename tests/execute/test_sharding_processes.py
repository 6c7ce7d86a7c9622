"""Loading into shards by 2 and 4 processes on loopback: the same bits as by one; what fails in one fails in all."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

CHILD = Path(__file__).parent / "sharding_child.py"
DEVICES = 8

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes")
    run(path, 1, "--case", "write")
    whole = (path / "model.safetensors").read_bytes()
    (path / "torn.safetensors").write_bytes(whole[:-100])
    return path


def run(folder: Path, count: int, *more: str) -> list[list[dict[str, Any]]]:
    """What each process said, line by line; then {"ended": when} and {"status": how}."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ["--count", str(count), "--port", str(port), "--devices", str(DEVICES // count), "--folder", str(folder)]
    started = [
        subprocess.Popen(
            [sys.executable, str(CHILD), "--index", str(index), *common, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    ended: dict[int, float] = {}
    limit = time.time() + 120
    while len(ended) < count and time.time() < limit:
        ended |= {i: time.time() for i, p in enumerate(started) if i not in ended and p.poll() is not None}
        time.sleep(0.02)
    out: list[list[dict[str, Any]]] = []
    for index, process in enumerate(started):
        if index not in ended:
            process.kill()
        text, errors = process.communicate()
        said = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        assert index in ended, errors[-3000:]
        out.append([*said, {"ended": ended[index]}, {"status": process.returncode, "errors": errors[-3000:]}])
    return out


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, str]:
    [[said, *_]] = run(folder, 1)
    return said["digests"]


@pytest.mark.parametrize("count", [2, 4])
def test_the_bits_are_those_of_one_process(folder: Path, alone: dict[str, str], count: int) -> None:
    found = run(folder, count)
    assert [said[-1]["status"] for said in found] == [0] * count, found[0][-1]["errors"]
    joined: dict[str, str] = {}
    for said in found:
        joined |= said[0]["digests"]
    assert joined == alone
    size = (folder / "model.safetensors").stat().st_size
    for said in found:
        assert said[0]["needed"] < size
        assert said[0]["read"] <= 2 * said[0]["needed"] or said[0]["over"]


@pytest.mark.parametrize("count", [2])
def test_a_module_is_loaded_in_place(folder: Path, count: int) -> None:
    found = run(folder, count, "--case", "module")
    assert [said[-1]["status"] for said in found] == [0] * count, found[0][-1]["errors"]
    [[one, *_]] = run(folder, 1, "--case", "module")
    joined: dict[str, str] = {}
    for said in found:
        joined |= said[0]["digests"]
    assert joined == one["digests"]
    assert any(name.startswith("table") for name in joined)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("injury", "words"),
    [
        ("plan", "heads"),
        ("file", "torn.safetensors"),
        ("bytes", "the tensor is torn"),
        ("differ", "given different work"),
    ],
)
def test_what_fails_in_one_fails_in_all_with_one_message(folder: Path, injury: str, words: str, victim: int) -> None:
    found = run(folder, 2, "--injure", injury, "--victim", str(victim))
    messages = [next(line for line in said if "error" in line) for said in found]
    assert messages[0]["error"] == messages[1]["error"]
    assert words in messages[0]["error"]
    assert messages[0]["kind"] == messages[1]["kind"] != "GraftaxError"
    assert abs(messages[0]["at"] - messages[1]["at"]) < 2
    struck = [line["struck"] for said in found for line in said if "struck" in line]
    for when in struck:
        assert all(message["at"] - when < 2 for message in messages)


def test_an_error_that_is_not_ours_is_told_to_the_others(folder: Path) -> None:
    found = run(folder, 2, "--injure", "bug", "--victim", "1")
    first, second = (next(line for line in said if "error" in line) for said in found)
    assert second["kind"] == "ZeroDivisionError"
    assert "process 1 of 2" in first["error"]
    assert "ZeroDivisionError: in the user's own code" in first["error"]


@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_is_killed_all_end_soon_after_the_heartbeat(folder: Path, victim: int) -> None:
    found = run(folder, 2, "--injure", "kill", "--victim", str(victim))
    struck = next(line["struck"] for line in found[victim] if "struck" in line)
    other = found[1 - victim]
    assert other[-1]["status"] != 0 or any("error" in line for line in other)
    assert other[-2]["ended"] - struck < 10 + 2 + 1  # the heartbeat, two seconds, and this test's own look
