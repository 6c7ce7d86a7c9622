"""Surgery on a file runs as a port does: in tiles of bounded memory, resumable, in every format, and the report's
hashes are those of the whole leaves."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

import graftax as gx
from graftax.errors import PlanError, RulesError, StorageError, UsageError
from graftax.execute import streamed
from graftax.execute.receipt import Receipt
from graftax.execute.streamed import Stream
from graftax.formats.io import journal
from graftax.ops import same_bits
from graftax.surgery import write_replacement
from graftax.surgery.files import checkpoint_tree
from graftax.surgery.given import prepared
from graftax.surgery.planning import plan_replacement
from graftax.surgery.selecting import choose, edits_of

from ..execute.stopping import Stopped, content, stop_after, tiles_handed_out

SHAPES = {"wide.weight": (300, 700), "square.weight": (260, 260), "wide.bias": (300,), "none": (0, 3), "one": ()}
OUTS = ["out.safetensors", "out", "out.npz", "out.msgpack", "out.pt"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SYNC_BYTES", 1 << 17)
    monkeypatch.setattr(streamed, "_LEAST", 1 << 16)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.standard_normal(shape, dtype=np.float32)) for name, shape in SHAPES.items()}


@pytest.fixture
def source(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "source.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    return path


@pytest.fixture
def flax_donor(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    path = tmp_path / "in" / "donor.safetensors"
    kernel = np.asfortranarray(arrays["wide.weight"][::-1].T) * 3
    safetensors.numpy.save_file({"params/fc/kernel": np.ascontiguousarray(kernel)}, path, metadata={"format": "flax"})
    return path


def written(source: Path, out: Path, value: Any, selector: str = "*.weight", **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"max_memory": "256KiB"}
    if out.suffix == "" and "format" not in options:
        given |= {"format": "hf_folder", "shard_size": "300KB"}
    if out.suffix == ".msgpack":
        given |= {"format": "msgpack"}
    return write_replacement(gx.open_checkpoint(source), selector, value, out, **given | options)


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_a_leaf_in_many_tiles_has_the_values_and_hashes_of_the_whole(
    source: Path, arrays: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile is 64 KiB here and the leaf 840 KB. These values never hold it whole."""
    out = tmp_path / "out.safetensors"
    old = arrays["wide.weight"]
    values = (gx.scaled(3), gx.constant(0.1), gx.zeros(), gx.rounded("bfloat16"), gx.normal(2, 0), gx.add_normal(2, 1))
    for value in values:
        report: list[Any] = []
        run = lambda: report.append(written(source, out, value, "wide.weight"))  # noqa: B023, E731
        assert tiles_handed_out(monkeypatch, run) > 20
        expected = gx.replace({"wide.weight": old}, "wide.weight", value)["wide.weight"]
        new = gx.open_checkpoint(out)
        assert all(same_bits(new.read(name), expected if name == "wide.weight" else arrays[name]) for name in arrays)
        (change,) = report[0]["changes"]
        assert (change["before"], change["after"]) == (digest(old), digest(expected))
        assert change["changed"] == np.count_nonzero(old.view("u4") != expected.view("u4"))
        assert change["largest"] == np.abs(old.astype("f8") - expected.astype("f8")).max()
        assert report[0]["untouched"] == {name: digest(a) for name, a in arrays.items() if name != "wide.weight"}


def test_a_donor_is_laid_out_tile_by_tile(
    source: Path, flax_donor: Path, arrays: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Flax kernel goes transposed into a torch weight, and its hash is still that of the leaf in order."""
    out = tmp_path / "out.safetensors"
    report: list[Any] = []
    value = gx.from_checkpoint(flax_donor, "params/fc/kernel")
    assert tiles_handed_out(monkeypatch, lambda: report.append(written(source, out, value, "wide.weight"))) > 20
    expected = arrays["wide.weight"][::-1] * 3
    assert same_bits(gx.open_checkpoint(out).read("wide.weight"), np.ascontiguousarray(expected))
    assert report[0]["changes"][0]["after"] == digest(expected)
    assert report[0]["changes"][0]["before"] == digest(arrays["wide.weight"])


def test_a_donor_of_another_dtype_is_cast_where_asked(
    source: Path, arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    donor, out = tmp_path / "in" / "half.safetensors", tmp_path / "out.safetensors"
    half = arrays["wide.weight"].astype(np.float16)
    safetensors.numpy.save_file({"w.weight": half, "x": half[0]}, donor, metadata={"format": "pt"})
    with pytest.raises(PlanError, match="cast=True"):
        written(source, out, gx.from_checkpoint(donor, "w.weight"), "wide.weight")
    written(source, out, gx.from_checkpoint(donor, "w.weight", cast=True), "wide.weight")
    assert same_bits(gx.open_checkpoint(out).read("wide.weight"), half.astype(np.float32))


def test_one_tensor_of_a_donor_goes_into_several_leaves(tmp_path: Path) -> None:
    path, donor, out = (tmp_path / name for name in ("m.safetensors", "d.safetensors", "o.safetensors"))
    safetensors.numpy.save_file({f"{n}.bias": np.zeros(4, "f4") for n in "abc"}, path, metadata={"format": "pt"})
    safetensors.numpy.save_file({"new.bias": np.arange(4, dtype="f4")}, donor, metadata={"format": "pt"})
    report = write_replacement(gx.open_checkpoint(path), "*.bias", gx.from_checkpoint(donor), out)
    assert len(report["selected"]) == 3
    assert all((gx.open_checkpoint(out).read(f"{n}.bias") == np.arange(4)).all() for n in "abc")


def test_what_needs_the_leaf_whole_is_refused_beyond_the_budget(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(PlanError, match="max_memory") as caught:
        written(source, out, gx.quantized(4))
    assert {failure.key for failure in caught.value.failures} == {"wide.weight", "square.weight"}
    assert not out.exists()
    written(source, out, gx.quantized(4), max_memory="4MiB")


@pytest.mark.parametrize("name", OUTS)
def test_every_format_of_a_port(source: Path, arrays: dict[str, np.ndarray], tmp_path: Path, name: str) -> None:
    if name == "out.msgpack":  # holds Flax trees
        renamed = {name.replace(".", "/"): array for name, array in arrays.items()}
        safetensors.numpy.save_file(renamed, source, metadata={"format": "flax"})
    out = tmp_path / name
    report = written(source, out, gx.scaled(2), "wide.weight" if name != "out.msgpack" else "wide/weight")
    new = gx.open_checkpoint(out)
    for path, array in arrays.items():
        path = path.replace(".", "/") if name == "out.msgpack" else path
        assert same_bits(new.read(path), array * 2 if path.startswith("wide") and "w" in path[5:] else array), path
    assert len(report["untouched"]) == 4
    if name == "out":
        assert len(list(out.glob("*.safetensors"))) > 1


def test_to_orbax(tmp_path: Path) -> None:
    path, out = tmp_path / "m.safetensors", tmp_path / "o"
    kernel = np.arange(6, dtype="f4").reshape(2, 3)
    safetensors.numpy.save_file({"params/a/kernel": kernel, "params/a/bias": kernel[0]}, path)
    report = write_replacement(gx.open_checkpoint(path), "**/kernel", gx.scaled(2), out, format="orbax")
    assert same_bits(gx.open_checkpoint(out).read("params/a/kernel"), kernel * 2)
    assert report["changes"][0]["after"] == digest(kernel * 2)
    assert report["untouched"] == {"params/a/bias": digest(kernel[0])}


# ---------------------------------------------------------------- resume, and what is noticed


@pytest.mark.parametrize(
    ("name", "share"),
    [("out.safetensors", 0.2), ("out.safetensors", 0.5), ("out", 0.4), ("out.npz", 0.5), ("out.pt", 0.3)],
)
def test_a_stopped_run_goes_on(
    source: Path, flax_donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, share: float
) -> None:
    """The file and the report are those of a run that was never stopped."""
    edits = {"wide.weight": gx.from_checkpoint(flax_donor, "params/fc/kernel"), "square.weight": gx.add_normal(1, 0)}
    out, other = tmp_path / name, tmp_path / "other" / name
    other.parent.mkdir()
    write = lambda where, **more: write_edits(source, where, edits, **more)  # noqa: E731
    whole = write(other)
    count = tiles_handed_out(monkeypatch, lambda: write(other))
    for _ in range(2):  # the second run is stopped too
        with monkeypatch.context() as patch:
            patch.setattr(Stream, "tiles", stop_after(int(count * share)))
            with pytest.raises(Stopped):
                write(out, resume=True)
    assert not out.exists()
    report: list[dict[str, Any]] = []
    made = tiles_handed_out(monkeypatch, lambda: report.append(write(out, resume=True)))
    assert made < count
    assert any("resumed" in note for note in report[0].pop("notes"))
    whole.pop("notes")
    assert report[0] == whole
    assert content(out) == content(other)


def test_a_part_from_a_donor_is_data(source: Path, flax_donor: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    value = gx.from_checkpoint(flax_donor, "params/fc/kernel")
    plain = written(source, out, value, "wide.weight[1:3]", max_memory="4MiB")
    resumed = written(source, out, value, "wide.weight[1:3]", max_memory="4MiB", resume=True)
    assert plain == resumed
    assert plain["changes"][0]["changed"] == 2 * 700
    assert flax_donor.name in str(plain["edits"])
    with pytest.raises(StorageError, match="is also an input"):
        written(source, flax_donor, value, "wide.weight[1:3]", max_memory="4MiB")


def write_edits(source: Path, out: Path, edits: dict[str, Any], **more: Any) -> dict[str, Any]:
    return written(source, out, None, edits, **more)  # pyright: ignore[reportArgumentType]


def test_another_value_starts_anew(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "tiles", stop_after(10))
        with pytest.raises(Stopped):
            written(source, out, gx.scaled(2), resume=True)
    report = written(source, out, gx.scaled(3), resume=True)
    assert any("started anew" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"wide.weight[0]": np.zeros(700, np.float32)}, "array in memory"),
        (lambda old: old, "Python function"),
        (np.zeros((300, 700), np.float32), "array in memory"),
        (gx.from_checkpoint({"w": np.zeros((300, 700), np.float32)}, "w", layout="identity"), "not stored in files"),
    ],
)
def test_resume_needs_values_that_are_data(source: Path, tmp_path: Path, value: Any, words: str) -> None:
    edits = value if isinstance(value, dict) else {"wide.weight": value}
    with pytest.raises(UsageError, match=words):
        write_edits(source, tmp_path / "out.safetensors", edits, resume=True, max_memory="8MiB")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("which", ["source", "donor"])
def test_a_file_that_changes_while_it_is_read_is_noticed(
    source: Path, flax_donor: Path, tmp_path: Path, which: str
) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"what was there")
    changed: list[int] = []

    def advance(count: int) -> None:
        if not changed:
            os.utime({"source": source, "donor": flax_donor}[which], ns=(1, 1))
        changed.append(count)

    value = gx.from_checkpoint(flax_donor, "params/fc/kernel")
    with pytest.raises(StorageError, match="changed"):
        written(source, out, value, "wide.weight", advance=advance)
    assert out.read_bytes() == b"what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.safetensors"]


def test_no_clobber(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(StorageError, match="exists"):
        written(source, out, gx.zeros(), clobber=False)
    assert out.read_bytes() == b"mine"


# ---------------------------------------------------------------- the plan


def test_the_plan_is_run_by_every_executor(source: Path, arrays: dict[str, np.ndarray]) -> None:
    """Streamed (above), eager and sharded give the same leaves."""
    values = {"wide.weight": gx.scaled(2), "square.weight": gx.quantized(4), "wide.bias": lambda old: old + 1}
    made = plan_replacement(gx.open_checkpoint(source), values)
    expected = gx.replace(arrays, values)
    eager = made.plan.run(made.source, sharding="host")
    for name in arrays:
        assert same_bits(np.asarray(eager[name]), np.asarray(expected[name])), name
    stream = Stream(made.plan, made.source, None, Receipt(), None)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for name in ("wide.weight", "square.weight", "wide.bias"):
        assert same_bits(np.asarray(stream.sharded(name, place)), np.asarray(expected[name]))


def test_a_plan_says_all_of_a_value(source: Path) -> None:
    """What a resumed run compares: every value gives data of its own."""
    donor = gx.from_checkpoint(source, "wide.weight")
    values = [gx.constant(1), gx.constant(2), gx.constant(float("nan")), gx.constant(0.5), gx.zeros(), gx.mean()]
    values += [gx.normal(1, 0), gx.normal(1, 1), gx.add_normal(1, 0), gx.add_normal(1, 0, relative=True), gx.scaled(2)]
    values += [gx.rounded("float16"), gx.quantized(4), gx.quantized(4, axis=1), gx.quantized(4, group=7)]
    values += [gx.mix(donor, 0.5), gx.mix(donor, 0.25)]
    checkpoint = gx.open_checkpoint(source)
    for picked in ("wide.weight", "wide.weight[:2]"):
        made = []
        for value in values:
            chosen, failures = choose(checkpoint_tree(checkpoint), prepared(edits_of(picked, value)), 1)
            assert not failures
            found = plan_replacement(checkpoint, chosen)
            assert not found.failures
            made.append(json.dumps(found.plan.as_json()["entries"]))
        assert len(set(made)) == len(values)


def test_a_plan_with_a_function_runs_and_is_not_saved(source: Path, tmp_path: Path) -> None:
    checkpoint = gx.open_checkpoint(source)
    plan = plan_replacement(checkpoint, {"one": lambda old: old}).plan
    assert plan.complete
    for unsaved in (plan, plan_replacement(checkpoint, {"one": np.float32(2)}).plan):
        with pytest.raises(PlanError, match="not written into a plan"):
            unsaved.save(tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()
    with pytest.raises(PlanError, match="cannot be undone"):
        _ = plan.inverse
    data = plan_replacement(checkpoint, {"one": gx.scaled(2)}).plan
    assert "one -> one   becomes scaled(2)" in str(data)
    assert "lossless: yes (1 replaced, listed above)" in str(data)
    data.save(tmp_path / "plan.json")
    with pytest.raises(RulesError, match="replaces leaves is not read"):
        gx.load_plan(tmp_path / "plan.json")


def test_the_memo_of_plans_keeps_no_array(source: Path) -> None:
    import gc
    import weakref

    array = np.zeros(300, np.float32)
    held = weakref.ref(array)
    plan_replacement(gx.open_checkpoint(source), {"wide.bias": array})
    del array
    gc.collect()
    assert held() is None
