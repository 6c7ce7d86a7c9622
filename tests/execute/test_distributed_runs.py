"""Conversion by 2 and 4 processes on loopback, each of its own: the same bits as by one; failures and kills."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graftax as gx

CHILD = Path(__file__).parent / "distributed_child.py"
LAYERS, WIDTH, HEADS = 6, 96, 4

RULES = [
    {
        "torch": "layers.{i}.attn.in_proj_weight",
        "flax": [f"params/layers_{{i}}/attn/{part}/kernel" for part in ("query", "key", "value")],
        "heads": HEADS,
        "fused": "block",
    },
    {"torch": "layers.{i}.fc.weight", "flax": "params/fc/kernel", "stack": {"i": 0}},
    {"torch": "layers.{i}.fc.bias", "flax": "params/layers_{i}/fc/bias"},
    {"torch": "embed.weight", "flax": "params/embed/embedding"},
    {"torch": "gain.weight", "flax": "params/gain"},
    {"torch": "steps", "flax": "params/steps"},
]


def torch_tensors(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape, np.float32)

    out = {"embed.weight": normal(1000, WIDTH), "gain.weight": normal(7), "steps": np.arange(5, dtype=np.int64) << 40}
    for i in range(LAYERS):
        out[f"layers.{i}.attn.in_proj_weight"] = normal(3 * WIDTH, WIDTH)
        out[f"layers.{i}.fc.weight"] = normal(4 * WIDTH, WIDTH)
        out[f"layers.{i}.fc.bias"] = normal(4 * WIDTH)
    return out


def flax_like() -> dict[str, Any]:
    head = (WIDTH, HEADS, WIDTH // HEADS)
    shapes: dict[str, Any] = {
        "embed": {"embedding": (1000, WIDTH)},
        "fc": {"kernel": (LAYERS, WIDTH, 4 * WIDTH)},
        "gain": (7,),
        "steps": (5,),
    }
    for i in range(LAYERS):
        attn = {part: {"kernel": head} for part in ("query", "key", "value")}
        shapes[f"layers_{i}"] = {"attn": attn, "fc": {"bias": (4 * WIDTH,)}}

    def zeros(node: Any, name: str = "") -> Any:
        if isinstance(node, dict):
            return {key: zeros(child, key) for key, child in node.items()}
        return np.zeros(node, np.int64 if name == "steps" else np.float32)

    return {"params": zeros(shapes)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a torch checkpoint, another of the same names, and a like."""
    folder = tmp_path_factory.mktemp("together")
    from safetensors.numpy import save_file

    save_file(torch_tensors(), folder / "source.safetensors")
    save_file(torch_tensors(1), folder / "other.safetensors")
    save_file(_flat(flax_like()), folder / "like.safetensors")
    return folder


def _flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray[Any, Any]]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    below = ((f"{prefix}/{key}" if prefix else key, child) for key, child in tree.items())
    return {name: leaf for path, child in below for name, leaf in _flat(child, path).items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Run:
    """`count` processes that port one checkpoint; what each printed, and how each ended."""

    def __init__(
        self, place: Path, out: Path, count: int, *more: str, options: Any = None, sources: Any = None
    ) -> None:
        port = free_port()
        options = {"rules": RULES, **(options or {})}
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, str(CHILD), str(index), str(count), str(port)),
                    *((sources or {}).get(index, str(place / "source.safetensors")), str(place / "like.safetensors")),
                    *(str(out), "--options", json.dumps(options), *more),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]

    def ended(self, timeout: float = 90) -> Run:
        self.lines: list[list[Any]] = []
        self.errors: list[str] = []
        until = time.monotonic() + timeout
        try:
            for process in self.processes:
                out, err = process.communicate(timeout=until - time.monotonic())
                self.lines.append([json.loads(line) for line in out.splitlines() if line.startswith("{")])
                self.errors.append(err)
        finally:
            for process in self.processes:
                process.kill()
        self.codes = [process.returncode for process in self.processes]
        return self

    def succeeded(self) -> list[Any]:
        self.ended()
        assert self.codes == [0] * len(self.codes), self.errors
        return [lines[-1]["receipt"] for lines in self.lines]


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of every file of a folder."""
    found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {str(p.relative_to(path.parent)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def values(path: Path) -> dict[str, tuple[str, bytes]]:
    opened = gx.open_checkpoint(path)
    return {name: (str(spec), opened.read(name).tobytes()) for name, spec in opened.items()}


def alone(place: Path, out: Path, **options: Any) -> Any:
    return gx.port_file(place / "source.safetensors", place / "like.safetensors", out, RULES, **options)


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".graftax-" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("out.safetensors", 2), ("out.safetensors", 4), ("out.msgpack", 2)])
def test_a_file_by_several_processes_is_the_same_file(place: Path, tmp_path: Path, name: str, count: int):
    (tmp_path / "one").mkdir()
    receipt = alone(place, tmp_path / "one" / name)
    receipts = Run(place, tmp_path / name, count, options={"max_memory": "4MiB"}).succeeded()
    assert digests(tmp_path / name) == digests(tmp_path / "one" / name)
    for told in receipts:
        assert (told["leaves"], told["bytes"]) == (receipt.leaves, receipt.nbytes)
    assert not left_over(tmp_path)


@pytest.mark.slow
def test_a_sharded_folder_by_several_processes_is_the_same_folder(place: Path, tmp_path: Path):
    options = {"format": "hf_folder", "shard_size": 300_000}
    (tmp_path / "one").mkdir()
    alone(place, tmp_path / "one" / "out", **options)
    Run(place, tmp_path / "out", 4, options=options).succeeded()
    assert digests(tmp_path / "out") == digests(tmp_path / "one" / "out")
    assert len(digests(tmp_path / "out")) > 5
    assert not left_over(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 1), (4, 2)])
def test_orbax_by_several_processes_has_the_same_values(place: Path, tmp_path: Path, count: int, devices: int):
    import orbax.checkpoint as ocp

    alone(place, tmp_path / "one")
    Run(place, tmp_path / "out", count, "--devices", str(devices)).succeeded()
    assert values(tmp_path / "out") == values(tmp_path / "one")
    assert (tmp_path / "out" / "ocdbt.process_1").is_dir(), "one process wrote all"
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "out")
        same = checkpointer.restore(tmp_path / "one")
    assert {name: leaf.tobytes() for name, leaf in _flat(tree).items()} == {
        name: leaf.tobytes() for name, leaf in _flat(same).items()
    }
    assert not left_over(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.safetensors", "out"])
def test_what_is_measured_is_measured_once(place: Path, tmp_path: Path, name: str):
    from safetensors.numpy import save_file

    like = {
        path: leaf.astype(np.float16) if leaf.dtype == np.float32 else leaf for path, leaf in _flat(flax_like()).items()
    }
    (tmp_path / "like").mkdir()
    save_file(like, tmp_path / "like" / "like.safetensors")
    save_file(torch_tensors(), tmp_path / "like" / "source.safetensors")
    (tmp_path / "one").mkdir()
    receipt = alone(tmp_path / "like", tmp_path / "one" / name, dtype="like")
    receipts = Run(tmp_path / "like", tmp_path / name, 2, options={"dtype": "like", "max_memory": "4MiB"}).succeeded()
    for told in receipts:
        for key in ("casts", "measured", "lossless"):
            assert told[key] == receipt.as_json()[key]
    assert values(tmp_path / name) == values(tmp_path / "one" / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "code"), [("out.safetensors", "fail", 3), ("out", "fail", 3), ("out", "full", 5)]
)
def test_a_failure_in_one_is_raised_by_all_at_once(place: Path, tmp_path: Path, name: str, kind: str, code: int):
    alone(place, tmp_path / name)
    before = values(tmp_path / name)
    more = ("--injure", kind, "--victim", "1", "--at", "2", "--slow", "0.1")
    run = Run(place, tmp_path / name, 3, *more, options={"max_memory": "4MiB"}).ended()
    ended = time.time()
    assert run.codes == [code] * 3, run.errors
    told = [lines[-1] for lines in run.lines]
    assert {line["error"] for line in told} == {"FormatError" if code == 3 else "StorageError"}
    assert len({line["text"] for line in told}) == 1
    assert "process 1 of 3" in told[0]["text"]
    struck = run.lines[1][0]["struck"]
    assert max(line["raised"] for line in told) - struck < 2
    assert ended - struck < 5  # nothing waits at the end
    assert values(tmp_path / name) == before
    if kind == "full":  # Orbax may still be writing in another process when the staging folder is removed
        alone(place, tmp_path / name)
    assert not left_over(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "victim", "at"),
    [("out.safetensors", "kill", 1, 1), ("out.safetensors", "kill", 0, 2), ("out", "kill-orbax", 1, 1)],
)
def test_a_kill_leaves_what_was_there(place: Path, tmp_path: Path, name: str, kind: str, victim: int, at: int):
    out = tmp_path / name
    alone(place, out)
    before = digests(out)
    more = ("--injure", kind, "--victim", str(victim), "--at", str(at), "--slow", "0.05")
    run = Run(place, out, 2, *more, options={"max_memory": "4MiB"}).ended()
    ended = time.time()
    assert run.codes[victim] == -9
    assert run.codes[1 - victim] != 0
    assert ended - run.lines[victim][0]["struck"] < 12 + 2  # the heartbeat, and what JAX takes to notice
    assert digests(out) == before
    alone(place, out)  # the next run clears what was left
    assert not left_over(tmp_path)
    assert name == "out" or digests(out) == before


@pytest.mark.slow
def test_different_files_are_refused(place: Path, tmp_path: Path):
    out = tmp_path / "out.safetensors"
    other = tmp_path / "source.safetensors"
    other.write_bytes((place / "other.safetensors").read_bytes())
    run = Run(place, out, 2, sources={1: str(other)}).ended()
    assert run.codes == [1, 1], run.errors
    assert len({lines[-1]["text"] for lines in run.lines}) == 1
    assert "different work" in run.lines[0][-1]["text"]
    assert not out.exists()
