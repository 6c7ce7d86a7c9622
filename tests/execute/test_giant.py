"""A tensor of 3 GB is transposed within --max-memory 64MiB: memory does not depend on how large a tensor is."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROWS, COLUMNS, OTHERS = 32768, 24576, 4  # 3.2 GB; the others are 805 MB each
RULES = """rules = [
  { torch = "giant.weight", flax = "giant/kernel", layout = "linear" },
  { torch = "layers.{i}.weight", flax = "layers/{i}/kernel", layout = "linear" },
]"""
RUN = "import sys; from graftax import cli; sys.exit(cli.run(sys.argv[1:]))"


def make_sparse(path: Path, rows: int, columns: int) -> dict[str, tuple[int, int, int]]:
    """A file of zeros but for the values of `marks`; gives name -> (begin, rows, columns) of its tensors."""
    header: dict[str, object] = {}
    places: dict[str, tuple[int, int, int]] = {}
    at = 0
    shapes = {"giant.weight": (rows, columns)} | {f"layers.{i}.weight": (rows, columns // 4) for i in range(OTHERS)}
    for name, shape in shapes.items():
        size = shape[0] * shape[1] * 4
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        places[name] = (at, *shape)
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
        rng = random.Random(0)
        for name, (begin, high, wide) in places.items():
            for _ in range(500):
                i, j = rng.randrange(high), rng.randrange(wide)
                file.seek(8 + len(text) + begin + (i * wide + j) * 4)
                file.write(struct.pack("<f", mark(name, i, j)))
    return places


def mark(name: str, i: int, j: int) -> float:
    """What stands at a place of a tensor; exact in float32."""
    return float((i * 31 + j * 17 + sum(map(ord, name))) % 9973 + 1)


def marks_agree(path: Path) -> None:
    """The transposed file has just the marks: every value that is not zero is the mark of its place."""
    import numpy as np

    import graftax as gx

    made = gx.open_checkpoint(path)
    assert made.storage.span is not None
    for name, spec in made.specs.items():
        source = name.replace("/kernel", ".weight").replace("/", ".")
        found = 0
        step = 64 << 20
        for start in range(0, spec.nbytes, step):
            block = np.empty(min(step, spec.nbytes - start) // 4, np.float32)
            made.storage.span(name, start, memoryview(block.view(np.uint8).data))
            for place in np.flatnonzero(block).tolist():
                column, row = divmod(start // 4 + place, spec.shape[1])
                assert block[place] == mark(source, row, column), (name, row, column)
                found += 1
        assert 490 <= found <= 500


def peak_of(line: list[str]) -> float:
    """MiB of anonymous memory that a run has at most, as sampled."""
    child = subprocess.Popen([sys.executable, "-c", RUN, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    peak = 0
    while child.poll() is None:
        try:
            text = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            break
        peak = max([peak, *(int(row.split()[1]) for row in text.splitlines() if row.startswith("RssAnon"))])
        time.sleep(0.005)
    out, err = child.communicate()
    assert child.returncode == 0, (out + err)[-2000:]
    return peak / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_three_gigabytes_within_64_mebibytes(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 10 << 30:
        pytest.skip("needs 10 GB of disk")
    (tmp_path / "r.toml").write_text(RULES)
    options = ["--rules", str(tmp_path / "r.toml"), "--to", "flax", "--max-memory", "64MiB"]
    try:
        make_sparse(tmp_path / "small.safetensors", 64, 128)
        small = peak_of(["port", str(tmp_path / "small.safetensors"), "-o", str(tmp_path / "a.safetensors"), *options])
        make_sparse(tmp_path / "giant.safetensors", ROWS, COLUMNS)
        giant = peak_of(["port", str(tmp_path / "giant.safetensors"), "-o", str(tmp_path / "b.safetensors"), *options])
        assert os.path.getsize(tmp_path / "b.safetensors") > 6 << 30
        print(f"anonymous memory: {giant:.0f} MiB, of a small file {small:.0f} MiB")
        assert giant - small <= 128
        marks_agree(tmp_path / "b.safetensors")
    finally:
        for name in ("giant", "b"):
            (tmp_path / f"{name}.safetensors").unlink(missing_ok=True)
