"""Loading gives what the ops give on whole arrays, whatever is cut, shared and threaded; and one and the same error."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import graftax as gx
from graftax.errors import PlanError
from graftax.execute import eager, fill_tile, strided
from graftax.execute.receipt import Receipt
from graftax.execute.streamed import Stream
from graftax.ops import apply_chain, invert_chain
from graftax.ops.rearrange import Rearrange
from graftax.plans import End, Entry, Plan
from graftax.tree import Checkpoint, Storage, TensorSpec
from graftax.tree.gc_paused import gc_paused

from . import chains

DTYPES = ["bool", "int8", "float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e4m3fn"]
Array = np.ndarray[Any, Any]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is cut as large tensors are."""
    monkeypatch.setattr(eager, "_JOB", 1 << 10)
    monkeypatch.setattr(eager, "_VALUES", 100)
    monkeypatch.setattr(eager, "SCRATCH", 1 << 16)
    monkeypatch.setattr(strided, "SMALL", 64)
    monkeypatch.setattr(fill_tile, "_NEAR", 1 << 8)
    monkeypatch.setattr(fill_tile, "SHORT", 64)


def checkpoint(arrays: dict[str, Array], by_position: str) -> Checkpoint:
    """A source in memory that is read whole ("no"), by position ("span") or by position into many buffers ("rows")."""
    raw = {name: np.ascontiguousarray(array).reshape(-1).view(np.uint8) for name, array in arrays.items()}

    def span(name: str, start: int, buffer: memoryview) -> None:
        buffer[:] = raw[name].data[start : start + len(buffer)]

    def scatter(name: str, start: int, buffers: list[memoryview]) -> int:
        for buffer in buffers:
            span(name, start, buffer)
            start += len(buffer)
        return sum(map(len, buffers))

    specs = {name: TensorSpec(array.shape, array.dtype.name) for name, array in arrays.items()}
    return Checkpoint(
        "source",
        "torch",
        specs,
        Storage(
            reader=arrays.__getitem__,
            span=None if by_position == "no" else span,
            scatter=scatter if by_position == "rows" else None,
        ),
    )


def planned(source: Checkpoint, entries: tuple[Entry, ...], specs: dict[str, TensorSpec]) -> Plan:
    return Plan(End("source", "torch", source.specs), End("like", "flax", specs), entries)


def loaded(plan: Plan, source: Checkpoint, workers: int | None) -> tuple[dict[str, Array], Receipt]:
    receipt = Receipt()
    run = Stream(plan, source, None, receipt, None)
    made = eager.load(run, source, plan.like.specs, workers)
    run.close()
    return made, receipt


def same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.ascontiguousarray(a).tobytes() == b.tobytes()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("by_position", ["no", "span", "rows"])
def test_random_chains(small_parts: None, workers: int, by_position: str) -> None:
    rng = random.Random(f"{workers} {by_position}")
    for _ in range(60):
        arrays = chains.sources(rng)
        ops, _ = chains.chain(rng, tuple(TensorSpec(a.shape, "float32") for a in arrays))
        ops, specs = chains.bound(ops, arrays)
        try:
            wanted = apply_chain(ops, arrays)
            apply_chain(invert_chain(ops), wanted)  # which is how it is measured
        except PlanError:  # a crop of rows that are not zero
            continue
        source = checkpoint({f"s{i}": array for i, array in enumerate(arrays)}, by_position)
        targets = {f"t{i}": spec for i, spec in enumerate(specs)}
        plan = planned(source, (Entry(tuple(source), tuple(targets), ops),), targets)
        made, _ = loaded(plan, source, workers)
        assert list(made) == list(targets)
        for name, want in zip(targets, wanted, strict=True):
            assert np.array_equal(made[name], want), (ops, arrays[0].shape)


@pytest.mark.parametrize("by_position", ["no", "span", "rows"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_permutations_of_every_dtype(by_position: str, data: st.DataObject) -> None:
    names = "abcde"[: data.draw(st.integers(1, 5))]
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 17, 40]), min_size=len(names), max_size=len(names))))
    dtype = data.draw(st.sampled_from(DTYPES))
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    codes = np.random.default_rng(0).integers(0, 256, (int(np.prod(shape)), kind.itemsize), np.uint8)
    array = (codes % 2 if dtype == "bool" else codes).view(kind).reshape(shape)
    order = data.draw(st.permutations(names))
    source = checkpoint({"s": array}, by_position)
    spec = {"t": TensorSpec(tuple(shape[names.index(name)] for name in order), dtype)}
    plan = planned(source, (Entry(("s",), ("t",), (Rearrange(f"{' '.join(names)} -> {' '.join(order)}"),)),), spec)
    made, _ = loaded(plan, source, data.draw(st.sampled_from([1, 2])))
    assert same(array.transpose([names.index(name) for name in order]), made["t"])


RULES = [
    {"torch": "wide.weight", "flax": "wide/kernel", "layout": "linear"},
    {"torch": "long.weight", "flax": "long/kernel", "layout": "linear"},
    {"torch": "conv.weight", "flax": "conv/kernel", "layout": "conv"},
    {"torch": "qkv.weight", "flax": ["q/kernel", "k/kernel", "v/kernel"], "fused": "block"},
    {"torch": ["b_ih", "b_hh"], "flax": "bias", "fused": "sum"},
    {"torch": "plain.{i}", "flax": "plain/{i}"},
]


def tensors() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "wide.weight": rng.standard_normal((1100, 900), dtype=np.float32),
        "long.weight": rng.standard_normal((3, 400_000), dtype=np.float32).astype(ml_dtypes.bfloat16),
        "conv.weight": rng.standard_normal((300, 140, 3, 3), dtype=np.float32),
        "qkv.weight": rng.standard_normal((768, 700), dtype=np.float32),
        "b_ih": rng.standard_normal(3000, dtype=np.float32),
        "b_hh": rng.standard_normal(3000, dtype=np.float32),
        **{f"plain.{i}": rng.standard_normal(70 * i, dtype=np.float32) for i in range(30)},
    }


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_files_whatever_the_threads(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: array for name, array in tensors().items() if ending != "npz" or array.dtype == np.float32}
    path = tmp_path / f"source.{ending}"
    if ending == "npz":
        np.savez(path, **given)  # pyright: ignore[reportArgumentType]
    else:
        save_file(given, path, {"format": "pt"})
    rules = [rule for rule in RULES if ending != "npz" or rule["torch"] != "long.weight"]
    plan = gx.plan(path, None, rules=rules, to="flax", dtype={"**/kernel": "float16"})
    source = gx.open_checkpoint(path)
    receipt = Receipt()
    run = Stream(plan, source, None, receipt, None)
    wanted = dict(run.arrays())
    run.close()
    monkeypatch.setattr(eager, "_JOB", 1 << 16)
    for workers in (1, 2, 4):
        made, counted = loaded(plan, source, workers)
        assert list(made) == list(wanted)
        assert all(same(made[name], wanted[name]) for name in wanted)
        assert counted.casts == receipt.casts
        assert counted.cast_leaves == receipt.cast_leaves > 3
        assert counted.measured == receipt.measured
        assert counted.bytes_read >= sum(array.nbytes for array in given.values())


def test_sources_that_are_read_whole_are_read_once(small_parts: None) -> None:
    arrays = {"qkv": np.arange(96.0 * 50).reshape(96, 50)}
    source = checkpoint(arrays, "no")
    reads: list[str] = []
    storage = replace(source.storage, reader=lambda name: (reads.append(name), arrays[name])[1])
    counted = replace(source, storage=storage)
    rules = [{"torch": "qkv", "flax": ["q/kernel", "k/kernel", "v/kernel"], "fused": "block", "layout": "linear"}]
    plan = gx.plan(counted, None, rules=rules, to="flax")
    made, _ = loaded(plan, counted, 2)
    assert reads == ["qkv"]
    assert np.array_equal(made["k/kernel"], arrays["qkv"][32:64].T)


def test_the_first_error_whatever_the_threads(small_parts: None) -> None:
    """Values that float16 cannot hold, in several tensors: the first of them is named, as by one thread."""
    arrays = {f"w{i:02}": np.full((40, 30), 1.0, np.float32) for i in range(20)}
    for i in (7, 8, 15):
        arrays[f"w{i:02}"][35, 20 + i // 8] = 1e9 * i
    source = checkpoint(arrays, "rows")
    rules = [{"torch": name, "flax": f"{name}/kernel", "layout": "linear"} for name in arrays]
    plan = gx.plan(source, None, rules=rules, to="flax", dtype="float16")
    texts: set[str] = set()
    for workers in (1, 2, 3, 8) * 3:
        with pytest.raises(PlanError, match=r"w07.*do not fit float16") as caught:
            loaded(plan, source, workers)
        texts.add(str(caught.value))
    assert len(texts) == 1


# ---------------------------------------------------------------- jobs in order


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_jobs_are_done_once_each(workers: int) -> None:
    done: list[int] = []
    eager.in_order(range(100), lambda: done.append, workers)
    assert sorted(done) == list(range(100))


def test_the_first_job_that_fails_is_raised_and_none_begun_after() -> None:
    begun: list[int] = []

    def worker() -> Callable[[int], None]:
        def do(job: int) -> None:
            begun.append(job)
            if job == 3:
                time.sleep(0.05)  # so that a later one fails first
            if job >= 3:
                raise ValueError(job)

        return do

    with pytest.raises(ValueError, match=r"^3$"):
        eager.in_order(range(50), worker, 4)
    assert {0, 1, 2, 3} <= set(begun)
    assert max(begun) < 10


def test_an_interrupt_stops_all_threads() -> None:
    main = threading.current_thread()
    begun: list[int] = []

    def worker() -> Callable[[int], None]:
        def do(job: int) -> None:
            begun.append(job)
            time.sleep(0.01)
            if threading.current_thread() is main:
                raise KeyboardInterrupt

        return do

    with pytest.raises(KeyboardInterrupt):
        eager.in_order(range(1000), worker, 2)
    assert threading.active_count() < 50
    count = len(begun)
    time.sleep(0.05)
    assert len(begun) == count < 10


def test_without_more_threads_one_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[int] = []
    eager.in_order(range(10), lambda: done.append, 4)
    assert done == list(range(10))


def test_collection_is_paused_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import gc

    def fail() -> Iterator[None]:
        with gc_paused():
            assert not gc.isenabled()
            yield
            raise ValueError

    steps = fail()
    next(steps)
    with pytest.raises(ValueError, match=r"^$"):
        next(steps)
    assert gc.isenabled()


# ---------------------------------------------------------------- handed over


def test_torch_and_jax_take_over_what_was_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy on the way: the tensors and arrays lie where the loader wrote them."""
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    save_file(tensors(), tmp_path / "s.safetensors", {"format": "pt"})
    places: set[int] = set()
    allocate_all = eager.allocate_all

    def watched(sizes: list[int]) -> list[Array]:
        made = allocate_all(sizes)
        places.update(array.__array_interface__["data"][0] for array in made)
        return made

    monkeypatch.setattr(eager, "allocate_all", watched)
    flax = gx.plan(tmp_path / "s.safetensors", None, rules=RULES[:4] + RULES[5:], to="flax", unused="drop")
    tree = flax.run(tmp_path / "s.safetensors")
    wide = tree["wide"]["kernel"]
    assert wide.unsafe_buffer_pointer() in places
    assert tree["long"]["kernel"].unsafe_buffer_pointer() in places
    assert np.array_equal(wide, tensors()["wide.weight"].T)
    rules = [rule for rule in RULES if isinstance(rule["torch"], str)]
    back = gx.port(tree, None, rules=rules, to="torch")
    assert back["wide.weight"].data_ptr() in places
    assert back["long.weight"].data_ptr() in places
    back["wide.weight"].zero_()
    assert np.array_equal(wide, tensors()["wide.weight"].T), "nothing is shared with the source"


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "npz"])
def test_what_does_not_lie_in_order_is_read_whole(tmp_path: Path, kind: str, large: bool) -> None:
    """A transposed view in torch's files, Fortran order and big-endian values in npz."""

    shape = (2100, 2100) if large else (6, 4)
    values = np.arange(np.prod(shape), dtype="float32").reshape(shape)
    if kind == "npz":
        path = tmp_path / "a.npz"
        np.savez(
            path, **{"x.weight": np.asfortranarray(values), "y.weight": values[:5].astype(">f4"), "z.bias": values[0]}
        )
    else:
        torch = pytest.importorskip("torch")
        path = tmp_path / "a.pt"
        tensors = {
            "x.weight": torch.tensor(values.T.copy()).T,
            "y.weight": torch.tensor(values)[:5],
            "z.bias": torch.tensor(values[0]),
        }
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    shapes = {"x": {"kernel": shape[::-1]}, "y": {"kernel": (shape[1], 5)}, "z": {"bias": (shape[1],)}}
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, "float32"), shapes, is_leaf=lambda s: isinstance(s, tuple))
    linear = [{"torch": f"{name}.weight", "flax": f"{name}/kernel", "layout": "linear"} for name in "xy"]
    made = gx.port(path, like, rules=linear)
    assert (np.asarray(made["x"]["kernel"]) == values.T).all()
    assert (np.asarray(made["y"]["kernel"]) == values[:5].T).all()
    assert (np.asarray(made["z"]["bias"]) == values[0]).all()
