"""Tiles within a budget make the same files as whole tensors do, and memory stays in it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import graftax as gx
from graftax.errors import PlanError
from graftax.execute import fill_tile, streamed
from graftax.execute.loop_nests import NotLocal
from graftax.execute.meter import Meter
from graftax.execute.pushdown import SourceView, TilePiece
from graftax.tree import TensorSpec

RULES = """rules = [
  { torch = "wide.weight", flax = "wide/kernel", layout = "linear" },
  { torch = "qkv.weight", flax = ["q/kernel", "k/kernel", "v/kernel"], heads = 4, fused = "block" },
  { torch = "conv.weight", flax = "conv/kernel", layout = "conv" },
  { torch = "layers.{i}.w.weight", flax = "layers/w/kernel", ops = "i o d -> i d o", stack = {i = 0} },
  { torch = "plain", flax = "plain" },
  { torch = "none", flax = "none" },
  { torch = ["b_ih", "b_hh"], flax = "bias", fused = "sum" },
]"""
RULES = RULES.replace('ops = "i o d -> i d o", ', 'layout = "linear", ')


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("streamed") / "source.safetensors"
    tensors: dict[str, Any] = {
        "wide.weight": rng.standard_normal((1500, 900), dtype=np.float32),
        "qkv.weight": rng.standard_normal((768, 700), dtype=np.float32).astype(ml_dtypes.bfloat16),
        "conv.weight": rng.standard_normal((160, 140, 3, 5), dtype=np.float32),
        "plain": rng.standard_normal((700, 1000), dtype=np.float32),
        "none": np.zeros((0, 3), np.float32),
        "b_ih": rng.standard_normal(3000, dtype=np.float32),
        "b_hh": rng.standard_normal(3000, dtype=np.float32),
    }
    for i in range(5):
        tensors[f"layers.{i}.w.weight"] = rng.standard_normal((300, 200), dtype=np.float32)
    save_file(tensors, path, {"format": "pt"})
    return path


def like(source: Path) -> dict[str, Any]:
    import jax

    specs = gx.open_checkpoint(source)
    out: dict[str, Any] = {
        "wide": {"kernel": (900, 1500)},
        "q": {"kernel": (700, 4, 64)},
        "k": {"kernel": (700, 4, 64)},
        "v": {"kernel": (700, 4, 64)},
        "conv": {"kernel": (3, 5, 140, 160)},
        "layers": {"w": {"kernel": (5, 200, 300)}},
        "plain": (700, 1000),
        "none": (0, 3),
        "bias": (3000,),
    }

    def abstract(node: Any, name: str = "") -> Any:
        if isinstance(node, dict):
            return {key: abstract(child, f"{name}/{key}") for key, child in node.items()}
        dtype = "bfloat16" if name[1:2] in "qkv" and "kernel" in name else "float32"
        return jax.ShapeDtypeStruct(node, dtype)

    assert specs
    return abstract(out)


@pytest.mark.parametrize("ending", [".safetensors", ".msgpack"])
@pytest.mark.parametrize("budget", ["1GiB", "4MiB"])
def test_files_are_the_same_whatever_the_budget(source: Path, tmp_path: Path, ending: str, budget: str) -> None:
    tree = gx.port(source, like(source), rules=RULES, sharding="host")
    out = tmp_path / f"out{ending}"
    receipt = gx.port_file(source, like(source), out, rules=RULES, max_memory=budget)
    written = gx.open_checkpoint(out)
    for name in written:
        node = tree
        for part in name.split("/"):
            node = node[part]
        assert written.read(name).tobytes() == np.ascontiguousarray(node).tobytes(), name
    assert receipt.leaves == len(written) == 9
    [lossy] = receipt.measured
    assert lossy.total == 6000


def test_npz_is_written_in_tiles(tmp_path: Path) -> None:
    array = np.arange(900 * 1100, dtype=np.float32).reshape(900, 1100)
    save_file({"fc.weight": array, "e.weight": np.zeros((0, 4), np.float32)}, tmp_path / "s.safetensors")
    rules = [
        {"torch": "fc.weight", "flax": "fc/kernel", "layout": "linear"},
        {"torch": "e.weight", "flax": "e/x", "layout": "identity"},
    ]
    gx.port_file(tmp_path / "s.safetensors", None, tmp_path / "o.npz", rules=rules, to="flax", max_memory="1MiB")
    with np.load(tmp_path / "o.npz") as made:
        assert np.array_equal(made["fc/kernel"], array.T)
        assert made["e/x"].shape == (0, 4)


def test_shards_are_written_in_tiles(source: Path, tmp_path: Path) -> None:
    whole = gx.port(source, like(source), rules=RULES, sharding="host")
    gx.port_file(
        source, like(source), tmp_path / "out", rules=RULES, format="hf_folder", shard_size="3MB", max_memory="4MiB"
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    made = gx.open_checkpoint(tmp_path / "out")
    assert made.read("wide/kernel").tobytes() == np.ascontiguousarray(whole["wide"]["kernel"]).tobytes()


def test_an_entry_that_needs_its_tensors_whole_is_refused_beyond_the_budget(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(*args: Any, **kwargs: Any) -> Any:
        raise NotLocal("needs whole tensors")

    gx.port_file(source, like(source), tmp_path / "a.safetensors", rules=RULES)
    monkeypatch.setattr(streamed, "push", whole)
    gx.port_file(source, like(source), tmp_path / "b.safetensors", rules=RULES)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with pytest.raises(PlanError, match=r"wide.*max_memory"):
        gx.port_file(source, like(source), tmp_path / "c.safetensors", rules=RULES, max_memory="1MiB")
    assert not (tmp_path / "c.safetensors").exists()


CHILD = """
import sys
import graftax as gx, jax
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024
like = {"big": {"kernel": jax.ShapeDtypeStruct((6000, 12000), "float32")}}
plan = gx.plan(sys.argv[1], like, rules='rules = [{ torch = "big.weight", flax = "big/kernel", layout = "linear" }]')
before, seen = anonymous(), []
import graftax.execute.streamed as streamed
inner = streamed.Stream.tiles
def watched(self, *args, **kwargs):
    for tile in inner(self, *args, **kwargs):
        seen.append(anonymous())
        yield tile
streamed.Stream.tiles = watched
gx.port_file(sys.argv[1], like, sys.argv[2], plan=plan, max_memory="32MiB")
print(max(seen) - before, len(seen))
"""


def test_memory_is_bounded_by_the_budget_not_by_the_tensor(tmp_path: Path) -> None:
    array = np.arange(12000 * 6000, dtype=np.float32).reshape(12000, 6000)  # 288 MB
    save_file({"big.weight": array}, tmp_path / "s.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "s.safetensors"), str(tmp_path / "o.safetensors")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grown, tiles = done.stdout.split()
    assert float(grown) < 64, "MiB"
    assert int(tiles) > 30
    with safe_open(tmp_path / "o.safetensors", "np") as made:
        assert np.array_equal(made.get_tensor("big/kernel"), array.T)


def test_what_a_plan_takes_for_granted_of_the_values_is_looked_at_again(tmp_path: Path) -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    rules = [{"torch": ["emb.weight", "head.weight"], "flax": "emb/embedding", "fused": "tied"}]
    save_file({"emb.weight": table, "head.weight": table.copy()}, tmp_path / "tied.safetensors")
    save_file({"emb.weight": table, "head.weight": table + 1}, tmp_path / "untied.safetensors")
    made = gx.plan(tmp_path / "tied.safetensors", None, rules=rules, to="flax")
    made.save(tmp_path / "plan.json")
    loaded = gx.load_plan(tmp_path / "plan.json")
    assert loaded.run(tmp_path / "tied.safetensors")["emb"]["embedding"].shape == (4, 3)
    with pytest.raises(PlanError, match="tied"):
        loaded.run(tmp_path / "untied.safetensors")
    with pytest.raises(PlanError, match="tied"):
        gx.port_file(tmp_path / "untied.safetensors", None, tmp_path / "o.safetensors", plan=loaded)


def test_sources_that_cannot_be_read_by_position_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.arange(1200 * 900, dtype=np.float32).reshape(1200, 900)
    np.savez_compressed(tmp_path / "s.npz", allow_pickle=False, **{"qkv.weight": array})
    rules = [{"torch": "qkv.weight", "flax": ["q/kernel", "k/kernel", "v/kernel"], "fused": "block"}]
    opened = gx.open_checkpoint(tmp_path / "s.npz")
    assert not opened.storage.by_position("qkv.weight")
    assert opened.storage.reader is not None
    reads: list[str] = []
    reader = opened.storage.reader
    storage = replace(opened.storage, reader=lambda name: (reads.append(name), reader(name))[1])
    counted = replace(opened, storage=storage)
    gx.port_file(counted, None, tmp_path / "o.safetensors", rules=rules, to="flax", max_memory="4MiB")
    assert reads == ["qkv.weight"]
    with safe_open(tmp_path / "o.safetensors", "np") as made:
        assert np.array_equal(made.get_tensor("k/kernel"), array[400:800].T)


def test_a_meter_counts_what_is_read_straight_into_its_place() -> None:
    array = np.arange(40, dtype=np.float32)
    raw = memoryview(array.tobytes())
    source = fill_tile.Stored(TensorSpec((40,), "float32"), lambda start, buffer: _copied(buffer, raw[start:]))
    out, meter = np.zeros(30, np.float32), Meter(exact=False)
    fill_tile.fill_tile(
        out, [TilePiece((30,), 0, (1,), SourceView(0, 5, (1,)))], [source], np.zeros(1 << 16, np.uint8), meter
    )
    assert np.array_equal(out, array[5:35])
    assert (meter.equal, meter.total) == (30, 30)


def _copied(buffer: memoryview, raw: memoryview) -> None:
    buffer[:] = raw[: len(buffer)]
