"""File to file: torch's checkpoint in, Flax's out, against `cp` and fsync of the same file.

Every contender is a process of its own. Seconds are those of the job, from the first byte read until all is on the
disk, without the start-up and the imports (`process` has those, too). The source is in the page cache, nothing else is
waiting to be written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import checkpoints, environments
from benchmarks.measuring import Contender, Group, NotRun, Sample, Wrong, measure
from benchmarks.processes import Child, worker
from benchmarks.settings import Settings

BASELINE = "cp, fsync"
SMOKE_SCALE = 0.0004
MAX_MEMORY = "64MiB"

# contender -> (worker, what Python runs it: None for this one)
WORKERS: dict[str, tuple[str, Callable[[Path | None], Path] | None]] = {
    "graftax": ("graftax", None),
    "safetensors.numpy, .T": ("naive_numpy", None),
    "safetensors.torch, .T": ("naive_torch", None),
    "torch.load, .T": ("torch_load", None),
    "transformers 4.57": ("transformers", environments.hugging),
    "weightbridge": ("weightbridge", environments.weightbridge),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help=f"one of {', '.join(checkpoints.KINDS)}")
    parser.add_argument("--peers", help="of the others only those whose name holds one of these, with commas between")
    parser.add_argument("--envs", type=Path, help="make the environments of transformers and weightbridge here")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a contender is given up")


def run(args: argparse.Namespace, settings: Settings) -> Iterator[Group]:
    for name in checkpoints.KINDS:
        if not args.only or name == args.only:
            yield _group(name, args, settings)


def _group(name: str, args: argparse.Namespace, settings: Settings) -> Group:
    # A model of a few thousand tensors is small anyhow: one of fifty will do for a smoke test.
    scale = settings.scale * (SMOKE_SCALE * (25 if name == "resnet" else 1) if settings.smoke else 1)
    settings.say(f"making {checkpoints.KINDS[name].title}")
    made = checkpoints.make(name, settings.folder, scale, settings.seed)
    contenders = [_copy(made, settings.folder)]
    peers = None if args.peers is None else [part.strip() for part in args.peers.split(",") if part.strip()]
    for title, (work, python) in WORKERS.items():
        if work != "graftax" and peers is not None and not any(part in title for part in peers):
            continue
        contenders.append(_contender(title, work, python, made, scale, args, settings))
    group = measure(made.title, contenders, BASELINE, settings.repeats, settings.seed, made.nbytes, say=settings.say)
    group.facts |= {"scale": scale, "max_memory": MAX_MEMORY}
    return group


def _contender(
    title: str,
    work: str,
    python: Callable[[Path | None], Path] | None,
    made: checkpoints.Made,
    scale: float,
    args: argparse.Namespace,
    settings: Settings,
) -> Contender:
    out = settings.folder / "out" / ("out.msgpack" if work == "transformers" else "out.safetensors")
    job = {
        "source": str(made.source),
        "bin": str(made.bin),
        "like": str(made.like),
        "truth": str(made.truth),
        "config": str(made.folder),
        "out": str(out),
        "kind": made.folder.name,
        "scale": scale,
        "hugging": made.kind.hugging,
        "max_memory": MAX_MEMORY,
    }

    def once() -> Sample:
        interpreter = sys.executable if python is None else python(args.envs)
        if work == "torch_load" and not made.bin.exists():
            raise NotRun("torch is not installed")
        command = worker("file_workers", work, job, interpreter)
        try:
            return Child(command, prepare=lambda: _prepare(out, made), limit=args.limit)()
        finally:
            out.unlink(missing_ok=True)

    return Contender(title, once, required=work == "graftax")


def _copy(made: checkpoints.Made, folder: Path) -> Contender:
    out = folder / "out" / "copy.safetensors"
    command = ["sh", "-c", 'cp --reflink=never "$0" "$1" && sync "$1"', made.source, out]
    if sys.platform == "darwin":
        command[2] = 'cp "$0" "$1" && sync'

    def check() -> int:
        with made.source.open("rb") as left, out.open("rb") as right:
            while block := left.read(1 << 24):
                if right.read(len(block)) != block:
                    raise Wrong("the copy differs")
        return sum(leaf.nbytes // checkpoints.WIDTHS[leaf.dtype] for leaf in made.leaves)

    def once() -> Sample:
        try:
            return Child(command, spoken=False, prepare=lambda: _prepare(out, made), check=check)()
        finally:
            out.unlink(missing_ok=True)

    return Contender(BASELINE, once, required=True)


def _prepare(out: Path, made: checkpoints.Made) -> None:
    """The same for everybody: nothing there, nothing to be written back, the sources in the page cache."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    for path in (made.source, made.bin):
        if path.exists():
            with path.open("rb", buffering=0) as file:
                room = bytearray(1 << 22)
                while file.readinto(room):
                    pass
    os.sync()
