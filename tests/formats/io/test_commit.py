"""save: the old, the new or nothing, whatever happens; and what must not be replaced is refused."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftax.errors import PlanError, StorageError, UsageError
from graftax.formats import Output, open_path, safetensors_file, save
from graftax.formats.io import commit, files
from graftax.tree import Side
from graftax.tree.dtypes import spec_of

Arrays = dict[str, np.ndarray[Any, Any]]
OLD: Arrays = {"a.weight": np.zeros((2, 3), np.float32)}
NEW: Arrays = {"a.weight": np.ones((2, 3), np.float32), "a.bias": np.ones(2, np.float32)}
TARGETS = ["x.safetensors", "folder"]  # a file and a folder: they are put in place in different ways


def output_of(arrays: Arrays, side: Side = "torch", **more: Any) -> Output:
    return Output({k: spec_of(v) for k, v in arrays.items()}, list(arrays.items()), side, **more)


def failing(arrays: Arrays, exc: BaseException) -> Output:
    """An output whose second tensor never comes."""

    def tensors() -> Iterator[tuple[str, Any]]:
        yield next(iter(arrays.items()))
        raise exc

    return Output({k: spec_of(v) for k, v in arrays.items()}, tensors(), "torch")


def everything(folder: Path) -> dict[str, bytes]:
    """All files below a folder and their bytes, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- the ordinary case


@pytest.mark.parametrize("name", TARGETS)
def test_new_and_replaced(tmp_path: Path, name: str):
    out = tmp_path / name
    save(out, output_of(OLD))
    assert open_path(out).read("a.weight").sum() == 0
    first = everything(tmp_path)
    saved = save(out, output_of(NEW))
    assert saved.path == out
    assert saved.notes == ()
    assert open_path(out).read("a.weight").sum() == 6
    save(out, output_of(OLD))
    assert everything(tmp_path) == first
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("name", "side", "options", "format_"),
    [
        ("x.safetensors", "torch", {}, "safetensors"),
        ("x.SafeTensors", "flax", {}, "safetensors"),
        ("x", "torch", {}, "hf_folder"),
        ("run-1.5", "torch", {}, "hf_folder"),
        ("x", "flax", {"format": "safetensors"}, "safetensors"),
        ("x.pt", "flax", {"format": "safetensors"}, "safetensors"),
        ("x.pt", "flax", {"format": ".safetensors"}, "safetensors"),
        ("x", "flax", {"format": "hf_folder"}, "hf_folder"),
    ],
)
def test_the_ending_picks_the_format(tmp_path: Path, name: str, side: Side, options: Any, format_: str):
    assert save(tmp_path / name, output_of(NEW, side), **options).format == format_
    assert open_path(tmp_path / name).storage.format == format_


@pytest.mark.parametrize(
    ("name", "side", "options", "error", "text"),
    [
        ("x.h5", "torch", {}, UsageError, "no format has the ending '.h5'"),
        ("x.json", "torch", {}, UsageError, "holds no values"),
        ("x", "torch", {"format": "hdf5"}, UsageError, "unknown format 'hdf5'"),
        ("x", "torch", {"format": "spec"}, UsageError, "holds no values"),
        ("x.pt", "flax", {}, PlanError, "this is a flax tree"),
        ("x.msgpack", "torch", {}, PlanError, "this is a torch tree"),
        ("x.safetensors", "torch", {"shard": 5}, UsageError, "needs a folder"),
        ("::a", "torch", {}, UsageError, "PATH::NAME"),
        ("x.safetensors::", "torch", {}, UsageError, "PATH::NAME"),
        ("no/x.safetensors", "torch", {}, StorageError, "mkdir -p"),
        ("file/x.safetensors", "torch", {}, StorageError, "is not a folder"),
        ("x\0", "torch", {}, StorageError, r"x\\x00"),
        ("..", "torch", {}, StorageError, "is not a name that can be written"),
    ],
)
def test_what_is_refused_by_name(
    tmp_path: Path, monkeypatch: Any, name: str, side: Side, options: Any, error: Any, text: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    shard = options.pop("shard", None)
    with pytest.raises(error, match=text):
        save(name, output_of(NEW, side, shard_size=shard), **options)
    assert os.listdir(tmp_path) == ["file"]


def test_out_with_a_name_inside(tmp_path: Path):
    save(f"{tmp_path}/x.safetensors::model/enc", output_of(NEW))
    assert list(open_path(tmp_path / "x.safetensors")) == ["model.enc.a.weight", "model.enc.a.bias"]
    tree = {"blocks/0/kernel": np.ones(1)}
    out = output_of(tree, "flax", real_keys={"blocks/0": 0}, containers={"blocks": "list", "": "FrozenDict"})
    save(f"{tmp_path}/y.safetensors::items/params", out)
    found = open_path(tmp_path / "y.safetensors")
    assert list(found) == ["items/params/blocks/0/kernel"]
    assert found.real_keys == {"items/params/blocks/0": 0}
    assert found.containers == {"items/params/blocks": "list", "items/params": "FrozenDict"}
    part = open_path(tmp_path / "y.safetensors::items/params")
    assert part.real_keys == out.real_keys
    assert part.containers == out.containers


def test_a_path_with_colons_that_exists_is_that_file(tmp_path: Path):
    save(tmp_path / "x.safetensors", output_of(OLD), format="safetensors")
    odd = tmp_path / "x.safetensors::model"
    odd.write_bytes((tmp_path / "x.safetensors").read_bytes())
    save(odd, output_of(NEW), format="safetensors")
    assert len(open_path(odd)) == 2
    assert len(open_path(tmp_path / "x.safetensors")) == 1


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask_or_what_is_replaced(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        for name in TARGETS:
            save(tmp_path / name, output_of(NEW))
        folder = tmp_path / "folder"
        made = [tmp_path / "x.safetensors", *folder.iterdir()]
        assert {stat.S_IMODE(p.stat().st_mode) for p in made} == {0o666 & ~umask}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
        made[0].chmod(0o640)
        (folder / "model.safetensors.index.json").chmod(0o604)
        folder.chmod(0o750)
        for name in TARGETS:
            save(tmp_path / name, output_of(OLD))
        assert stat.S_IMODE(made[0].stat().st_mode) == 0o640
        assert stat.S_IMODE((folder / "model.safetensors.index.json").stat().st_mode) == 0o604
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    finally:
        os.umask(before)


# ---------------------------------------------------------------- refused destinations


@pytest.mark.parametrize("name", TARGETS)
def test_no_clobber(tmp_path: Path, name: str):
    save(tmp_path / name, output_of(OLD), clobber=False)
    before = everything(tmp_path)
    with pytest.raises(StorageError, match="clobber=False"):
        save(tmp_path / name, output_of(NEW), clobber=False)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_no_clobber_also_where_it_comes_to_be_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, supported: bool
):
    if not supported:
        monkeypatch.setattr(commit, "_renameat2", unsupported)

    def tensors() -> Iterator[Any]:
        if name == "folder":
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_text("theirs")
        yield from NEW.items()

    with pytest.raises(StorageError, match="was created meanwhile"):
        save(tmp_path / name, Output(output_of(NEW).specs, tensors(), "torch"), clobber=False)
    assert os.listdir(tmp_path) == [name]
    assert everything(tmp_path) == ({} if name == "folder" else {name: b"theirs"})


def unsupported(*_: Any) -> None:
    raise OSError(errno.EINVAL, "not here")


def test_a_folder_with_other_files(tmp_path: Path):
    out = tmp_path / "folder"
    save(out, output_of(OLD))
    for name in ("config.json", "sub/notes.txt", ".hidden"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
        before = everything(tmp_path)
        with pytest.raises(StorageError, match="1 files that replacing it would delete") as caught:
            save(out, output_of(NEW))
        assert [f.key for f in caught.value.failures] == [name]
        assert everything(tmp_path) == before
        (out / name).unlink()
    (out / "link").symlink_to(tmp_path)
    with pytest.raises(StorageError, match="link"):
        save(out, output_of(NEW))


def test_an_orbax_folder_is_replaced_whole(tmp_path: Path):
    """The default of a Flax tree without an ending; also with the files that its writer puts beside the arrays."""
    tree = {"params/a/kernel": np.zeros((2, 3), np.float32)}
    out = tmp_path / "run"
    assert save(out, output_of(tree, "flax")).format == "orbax"
    assert save(out, output_of(tree | {"params/a/bias": np.ones(2)}, "flax")).format == "orbax"
    assert list(open_path(f"{out}::params/a")) == ["kernel", "bias"]
    assert {stat.S_IMODE(p.stat().st_mode) & 0o600 for p in out.rglob("*") if p.is_file()} == {0o600}
    (out / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"notes\.txt"):
        save(out, output_of(tree, "flax"))
    (out / "notes.txt").unlink()
    found = open_path(out)
    with pytest.raises(StorageError, match="is also an input"):
        save(out, output_of(tree, "flax"), inputs=[found])
    with pytest.raises(StorageError, match="is also an input"):
        save(out / "more", output_of(tree, "flax"), inputs=[out])
    assert os.listdir(tmp_path) == ["run"]


def test_a_folder_that_is_no_checkpoint(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    save(tmp_path / "folder", output_of(NEW))  # an empty one is nobody's
    assert len(open_path(tmp_path / "folder")) == 2
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(StorageError, match="not a checkpoint that graftax can read"):
        save(tmp_path / "home", output_of(NEW))
    assert (tmp_path / "home" / "thesis.tex").read_text() == "x"


def test_files_folders_and_others_do_not_replace_each_other(tmp_path: Path):
    save(tmp_path / "folder", output_of(OLD))
    with pytest.raises(StorageError, match="is a folder"):
        save(tmp_path / "folder", output_of(NEW), format="safetensors")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is a file"):
        save(tmp_path / "file", output_of(NEW))
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(StorageError, match="named pipe"):
        save(tmp_path / "pipe.safetensors", output_of(NEW))
    with pytest.raises(StorageError, match="character device"):
        save("/dev/null", output_of(NEW), format="safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(StorageError, match="link to a folder"):
        save(tmp_path / "link", output_of(NEW))


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path):
    """It may be a snapshot's link into the hub cache, whose blobs are named by their hash."""
    save(tmp_path / "blob", output_of(OLD), format="safetensors")
    (tmp_path / "x.safetensors").symlink_to("blob")
    save(tmp_path / "x.safetensors", output_of(NEW))
    assert not (tmp_path / "x.safetensors").is_symlink()
    assert len(open_path(tmp_path / "blob")) == 1
    assert len(open_path(tmp_path / "x.safetensors")) == 2


# ---------------------------------------------------------------- the input is not the output


def same_path(source: Path) -> Path:
    return source


def hard_link(source: Path) -> Path:
    other = source.with_name("hard.safetensors")
    os.link(source, other)
    return other


def soft_link(source: Path) -> Path:
    other = source.with_name("soft.safetensors")
    other.symlink_to(source)
    return other


def detour(source: Path) -> Path:
    (source.parent / "sub").mkdir()
    return source.parent / "sub" / ".." / source.name


@pytest.mark.parametrize("other", [same_path, hard_link, soft_link, detour])
@pytest.mark.parametrize("kind", [open_path, Path, str])
def test_the_input_is_never_the_output(tmp_path: Path, other: Callable[[Path], Path], kind: Any):
    source = tmp_path / "x.safetensors"
    save(source, output_of(OLD))
    out = other(source)
    before = everything(tmp_path)
    with pytest.raises(StorageError, match="is also an input"):
        save(out, output_of(NEW), inputs=[kind(source)])
    assert everything(tmp_path) == before
    save(tmp_path / "y.safetensors", output_of(NEW), inputs=[kind(source)])


def test_neither_a_folder_nor_a_shard_of_the_input(tmp_path: Path):
    folder = tmp_path / "folder"
    save(folder, output_of(NEW, shard_size=8))
    source = open_path(folder)
    shard = next(folder.glob("model-00001*"))
    for out, options in ((folder, {}), (shard, {"format": "safetensors"})):
        with pytest.raises(StorageError, match="is also an input"):
            save(out, output_of(OLD), inputs=[source], **options)
    with pytest.raises(StorageError, match="is also an input"):
        save(folder / "x.safetensors", output_of(OLD), inputs=[folder])
    save(folder / "flax.safetensors", output_of(OLD), inputs=[source])  # beside the shards is nobody's place


# ---------------------------------------------------------------- failures leave nothing


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("exc", [ValueError("user code"), KeyboardInterrupt(), PlanError("no"), MemoryError()])
def test_a_failure_on_the_way_leaves_what_was_there(tmp_path: Path, exc: BaseException, name: str, exists: bool):
    if exists:
        save(tmp_path / name, output_of(OLD))
    before = everything(tmp_path)
    with pytest.raises(type(exc)):
        save(tmp_path / name, failing(NEW, exc))
    assert everything(tmp_path) == before
    assert os.listdir(tmp_path) == ([name] if exists else [])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync", "replace", "mkdir"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int):
    save(tmp_path / "x.safetensors", output_of(OLD))
    before = everything(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(StorageError) as caught:
            save(tmp_path / "x.safetensors", output_of(NEW))
    assert caught.value.exit_code == 5
    if code == errno.ENOSPC:
        assert "the disk is full" in str(caught.value)
    assert everything(tmp_path) == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_full_disk_that_a_library_wraps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool):
    def write(path: Path, output: Output) -> None:
        if wrapped:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as exc:
                raise RuntimeError("PytorchStreamWriter failed") from exc
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

    monkeypatch.setattr(safetensors_file, "write", write)
    with pytest.raises(StorageError, match="the disk is full"):
        save(tmp_path / "x.safetensors", output_of(NEW))


def test_a_real_limit_on_file_size(tmp_path: Path):
    code = (
        "import resource, sys\nimport numpy as np\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "from graftax.errors import StorageError\nfrom graftax.formats import Output, save\n"
        "from graftax.tree import TensorSpec\n"
        "spec = {'a': TensorSpec((5000,), 'float64')}\n"
        "try:\n    save(sys.argv[1], Output(spec, [('a', np.zeros(5000))], 'torch'))\n"
        "except StorageError as exc:\n    print(exc)\n"
    )
    for name in TARGETS:
        out = str(tmp_path / name)
        done = subprocess.run([sys.executable, "-c", code, out], capture_output=True, text=True, check=True)
        assert "it is larger than files may be here" in done.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", TARGETS)
def test_a_writer_that_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    from graftax.formats import hf_folder

    for module in (safetensors_file, hf_folder):
        monkeypatch.setattr(module, "write", lambda path, output: None)
    with pytest.raises(StorageError, match="nothing was written"):
        save(tmp_path / name, output_of(NEW))
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- exchange, and without it


def test_folders_are_exchanged_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At no moment is the destination missing: seen at every rename."""
    out = tmp_path / "folder"
    save(out, output_of(OLD))
    calls: list[int] = []
    real = commit._renameat2

    def watched(source: Path, target: Path, flags: int) -> None:
        calls.append(flags)
        assert out.is_dir()
        real(source, target, flags)
        assert out.is_dir()

    monkeypatch.setattr(commit, "_renameat2", watched)
    save(out, output_of(NEW))
    assert calls == [2]
    assert len(open_path(out)) == 2


def test_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "folder"
    save(out, output_of(OLD))
    monkeypatch.setattr(commit, "_renameat2", unsupported)
    save(out, output_of(NEW))
    assert len(open_path(out)) == 2
    assert os.listdir(tmp_path) == ["folder"]


def test_without_exchange_a_failed_rename_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "folder"
    save(out, output_of(OLD))
    before = everything(tmp_path)
    monkeypatch.setattr(commit, "_renameat2", unsupported)
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if Path(target) == out and ".graftax-old" not in str(source):
            raise OSError(errno.EIO, "broken")
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        with pytest.raises(StorageError):
            save(out, output_of(NEW))
    assert everything(tmp_path) == before


def test_the_next_run_restores_what_was_put_aside(tmp_path: Path):
    """Killed between the two renames: the old folder is back before anything else, also if the run then fails."""
    out, old = tmp_path / "folder", tmp_path / "folder.graftax-old"
    save(out, output_of(OLD))
    os.rename(out, old)
    with pytest.raises(StorageError, match=r"folder\.graftax-old was put aside by a stopped run"):
        open_path(out)
    with pytest.raises(StorageError, match="clobber=False"):
        save(out, output_of(NEW), clobber=False)
    assert len(open_path(out)) == 1
    os.rename(out, old)
    saved = save(out, output_of(NEW))
    assert len(saved.notes) == 1
    assert "restored" in saved.notes[0]
    assert len(open_path(out)) == 2
    assert os.listdir(tmp_path) == ["folder"]


def test_the_next_run_removes_what_was_replaced(tmp_path: Path):
    save(tmp_path / "folder", output_of(OLD))
    save(tmp_path / "folder.graftax-old", output_of(OLD), format="hf_folder")
    saved = save(tmp_path / "folder", output_of(NEW))
    assert "had replaced" in saved.notes[0]
    assert os.listdir(tmp_path) == ["folder"]


# ---------------------------------------------------------------- staging folders of killed runs


@pytest.mark.parametrize("name", [*TARGETS, "x" * 240 + ".safetensors", "é" * 115 + ".safetensors"])
def test_a_stale_staging_folder_is_cleared_by_the_next_run(tmp_path: Path, name: str):
    out = tmp_path / name
    save(out, output_of(OLD))
    place, lock = commit._make_staging(out)
    (place / "big").write_bytes(bytes(100))
    save(out, output_of(NEW))
    assert place.exists()  # its run is alive
    os.close(lock)
    other, other_lock = commit._make_staging(tmp_path / "another.safetensors")
    saved = save(out, output_of(NEW))
    assert not place.exists()
    assert "which a stopped run left" in saved.notes[0]
    assert other.exists()
    os.close(other_lock)


def test_a_file_system_without_locks_clears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    place, lock = commit._make_staging(tmp_path / "x.safetensors")
    os.close(lock)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    save(tmp_path / "x.safetensors", output_of(NEW))
    assert place.exists()
    assert len(open_path(tmp_path / "x.safetensors")) == 2


def test_a_staging_folder_that_vanishes_under_the_lock_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another run may clear it between its making and its locking: then a new one is made."""
    real = fcntl.flock
    lost: list[Path] = []

    def flock(fd: int, how: int) -> None:
        if not lost:
            (place,) = tmp_path.iterdir()
            lost.append(place)
            place.rmdir()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    save(tmp_path / "x.safetensors", output_of(NEW))
    assert len(open_path(tmp_path / "x.safetensors")) == 2
    assert lost


KILLED = """
import sys, time
import numpy as np
from graftax.formats import Output, save
from graftax.formats.io import commit
from graftax.tree import TensorSpec
if sys.argv[3] == "plain":
    def refuse(*_):
        raise OSError(22, "not here")
    commit._renameat2 = refuse
specs = {f"x.{i}": TensorSpec((1 << 15,), "float64") for i in range(8)}
def tensors():
    for name in specs:
        yield name, np.full(1 << 15, float(sys.argv[2]))
shard_size = None if sys.argv[1].endswith(".safetensors") else 1 << 19
while True:
    print("go", flush=True)
    save(sys.argv[1], Output(specs, tensors(), "torch", shard_size=shard_size))
"""


def kill_at_random(out: Path, times: int, exchange: str) -> None:
    """SIGKILL a process that saves in a loop: what is there afterwards is whole, and the next run tidies up."""
    rng = random.Random(0)
    for i in range(times):
        args = [sys.executable, "-c", KILLED, str(out), str(i), exchange]
        with subprocess.Popen(args, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "go\n"
            if i == 0:  # from then on there is an old one
                process.stdout.readline()
            time.sleep(rng.random() * 0.15)
            process.send_signal(signal.SIGKILL)
        if not out.exists():
            assert exchange == "plain"
            commit.clear_stale(out)
        found = open_path(out)
        values = {float(v) for name in found for v in np.unique(found.read(name))}
        assert len(values) == 1
        assert len(found) == 8
    save(out, output_of(NEW))
    assert os.listdir(out.parent) == [out.name]


@pytest.mark.parametrize(("name", "exchange"), [("x.safetensors", "x"), ("folder", "exchange"), ("folder", "plain")])
def test_kills_leave_the_old_or_the_new(tmp_path: Path, name: str, exchange: str):
    kill_at_random(tmp_path / name, 6, exchange)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "exchange"), [("x.safetensors", "x"), ("folder", "exchange"), ("folder", "plain")])
def test_hundreds_of_kills_leave_the_old_or_the_new(tmp_path: Path, name: str, exchange: str):
    kill_at_random(tmp_path / name, 150, exchange)


def test_ctrl_c_in_a_process(tmp_path: Path):
    out = tmp_path / "x.safetensors"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out), "1", "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        time.sleep(0.01)
        process.send_signal(signal.SIGINT)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert len(open_path(out)) == 8


def test_everything_is_synced_before_it_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files, then their folders, then the rename, then the folder that holds the name."""
    log: list[str] = []
    real_sync, real_rename = os.fsync, commit._renameat2

    def fsync(fd: int) -> None:
        log.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real_sync(fd)

    def rename(*args: Any) -> None:
        log.append("exchange")
        real_rename(*args)

    save(tmp_path / "folder", output_of(OLD))
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(commit, "_renameat2", rename)
    save(tmp_path / "folder", output_of(NEW))
    at = log.index("exchange")
    assert set(log[:at]) == {"model-00001-of-00001.safetensors", "model.safetensors.index.json", "folder"}
    assert log[at + 1 :] == [tmp_path.name]


def test_a_file_that_shrinks_while_it_is_read_does_not_kill_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The input is cut while its tensors stream into the output: an error, and the old output."""
    source = tmp_path / "in.safetensors"
    save(source, output_of({f"x.{i}": np.ones(1 << 16) for i in range(4)}))
    save(tmp_path / "out.safetensors", output_of(OLD))
    found = open_path(source)

    def tensors() -> Iterator[Any]:
        for i, name in enumerate(found):
            if i == 2:
                os.truncate(source, 1000)
            yield name, found.read(name)

    with pytest.raises(StorageError, match=r"in\.safetensors changed while it was read"):
        save(tmp_path / "out.safetensors", Output(found.specs, tensors(), "torch"), inputs=[found])
    assert len(open_path(tmp_path / "out.safetensors")) == 1
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "out.safetensors"]
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(StorageError, match="changed"):
        files.read_bytes(tmp_path / "out.safetensors", files.stamp(tmp_path / "out.safetensors"), 0, 8)
