"""Into the shards of jax arrays, by one process and by several on loopback, against Orbax's safetensors loader.

A decoder in bfloat16: torch's (out, in) weights become (in, out) kernels, queries, keys and values with split heads.
The mesh cuts the inputs over the processes, which are the columns of torch's rows: the runs that a process needs are
short. Orbax gives the same values to the same devices as torch has them: it transposes nothing. Every process compares
its shards with the file. Memory is the peak of resident pages of the fullest process, from the moment before the load.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measuring import Contender, Group, NotRun, Sample, Wrong, measure
from benchmarks.settings import Settings

SCRIPTS = Path(__file__).resolve().parents[1]
OURS, THEIRS = "graftax", "Orbax, safetensors, no .T"
DEVICES = 8
WIDTH, HEAD, LAYERS, INNER, WORDS = 2048, 64, 16, 4, 16000
SMOKE_SCALE = 1 / 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cold", action="store_true", help="the file is out of the page cache before every load")
    parser.add_argument("--processes", default="1,2,4", help="how many processes share the eight devices")


def run(args: argparse.Namespace, settings: Settings) -> list[Group]:
    """One group for each number of processes; facts: what the processes said in the last run of each contender."""
    path, nbytes = make(settings.folder, settings.scale * (SMOKE_SCALE if settings.smoke else 1), settings.seed)
    groups: list[Group] = []
    for count in [int(part) for part in args.processes.split(",")]:
        several = [_Several(name, path, count, args.cold) for name in (OURS, THEIRS)]
        contenders = [Contender(one.name, one, required=one.name == OURS) for one in several]
        title = f"{count} process{'es' * (count > 1)}, {nbytes / 1e9:.3g} GB in eight shards, {'cold' * args.cold}"
        title = title.removesuffix(", ")
        group = measure(title, contenders, THEIRS, settings.repeats, settings.seed, nbytes, say=settings.say)
        group.facts.update({one.name: one.said for one in several})
        groups.append(group)
    return groups


# ---------------------------------------------------------------- the checkpoint


def tensors(scale: float) -> dict[str, tuple[int, ...]]:
    """torch names and shapes; `scale` multiplies the layers and the words, and below a sixteenth the width."""
    width = WIDTH if scale >= 1 / LAYERS else WIDTH // 8
    out: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (max(64, int(WORDS * min(scale, 1)) // 8 * 8), width)}
    for i in range(max(1, round(LAYERS * scale))):
        out |= {f"layers.{i}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        out |= {f"layers.{i}.mlp.{part}_proj.weight": (INNER * width, width) for part in ("gate", "up")}
        out[f"layers.{i}.mlp.down_proj.weight"] = (width, INNER * width)
        out[f"layers.{i}.norm.weight"] = (width,)
    return out


def make(folder: Path, scale: float, seed: int) -> tuple[Path, int]:
    """The file, random bits that are finite numbers; made once."""
    import numpy as np

    shapes = tensors(scale)
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        head[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    path = folder / f"decoder-{end}-{seed}.safetensors"
    if not path.exists():
        text = json.dumps(head).encode()
        text += b" " * (-len(text) % 8)
        rng = np.random.default_rng(seed)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for shape in shapes.values():
                bits = rng.integers(0, 1 << 16, int(np.prod(shape)), np.uint16)
                file.write((bits & 0xBFFF).tobytes())
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    return path, end


# ---------------------------------------------------------------- several processes, one contender


@dataclass(slots=True)
class _Several:
    """Runs a contender in `count` processes at once. said: what each told, in the last run."""

    name: str
    path: Path
    count: int
    cold: bool
    said: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])

    def __call__(self) -> Sample:
        if self.cold:
            _forget(self.path)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"path": str(self.path), "count": self.count, "port": port, "devices": DEVICES // self.count}
        command = [sys.executable, "-m", "benchmarks.sharded_worker", "ours" if self.name == OURS else "theirs"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SCRIPTS)}
        started = [
            subprocess.Popen(
                [*command, json.dumps(job | {"index": index})],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for index in range(self.count)
        ]
        try:
            ended = [process.communicate(timeout=1200) for process in started]
        except subprocess.TimeoutExpired as error:
            raise NotRun("took more than 1200 s") from error
        finally:
            for process in started:
                process.kill()
        for process, (_, errors) in zip(started, ended, strict=True):
            if process.returncode:
                last = errors.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
                raise NotRun(f"failed: {last[0][:300]}")
        self.said = [json.loads(text.strip().splitlines()[-1]) for text, _ in ended]
        wrong = next((said["wrong"] for said in self.said if said["wrong"]), "")
        if wrong:
            raise Wrong(wrong)
        fullest = max(self.said, key=lambda said: said["peak"] or 0)
        return Sample(
            max(said["seconds"] for said in self.said),
            before=fullest["before"],
            resident=fullest["peak"],
            checked=sum(said["checked"] for said in self.said),
        )


def _forget(path: Path) -> None:
    """Takes a file out of the page cache. NotRun where the system cannot."""
    if not hasattr(os, "posix_fadvise"):
        raise NotRun("this system cannot take a file out of its cache")
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
