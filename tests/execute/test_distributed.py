"""Agreement of several processes, here threads with one store between them; how work is divided."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftax.errors import Failure, FormatError, GraftaxError, PlanError, StorageError, UsageError
from graftax.execute import partition, shared_write
from graftax.execute.distributed import Peers, agree, peers, processes
from graftax.execute.same_work import sample
from graftax.formats import orbax_write
from graftax.ops import Rearrange
from graftax.plans import Entry
from graftax.tree import TensorSpec


class Store:
    """The coordinator's store in memory."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self.changed = threading.Condition()

    def put(self, key: str, text: str, again: bool = False) -> bool:
        with self.changed:
            if key in self.held and not again:
                return False
            self.held[key] = text
            self.changed.notify_all()
            return True

    def wait(self, key: str, seconds: float) -> str | None:
        with self.changed:
            self.changed.wait_for(lambda: key in self.held, seconds)
            return self.held.get(key)

    def folder(self, prefix: str) -> dict[str, str]:
        with self.changed:
            return {key.rpartition("/")[2]: text for key, text in self.held.items() if key.startswith(prefix + "/")}


def in_processes(count: int, work: Callable[[Peers], Any]) -> list[Any]:
    """What `work` gave, or raised, in each of `count` processes."""
    store = Store()

    def run(index: int) -> Any:
        try:
            return work(Peers(index, count, store))
        except BaseException as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_alone_nothing_is_asked():
    assert processes() == (0, 1)
    assert peers() is None
    assert agree("read", give=3) == [3]
    with pytest.raises(FormatError, match="torn"):
        agree("read", FormatError("torn"))


def test_processes_are_counted_without_importing_jax():
    code = (
        "import sys; from graftax.execute.distributed import processes; assert processes() == (0, 1); "
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_go_on_with_what_each_gave():
    def work(own: Peers) -> list[Any]:
        own.agree("plan")
        return own.agree("count", give={"bytes": own.index})

    assert in_processes(4, work) == [[{"bytes": i} for i in range(4)]] * 4


def test_a_failure_of_one_is_raised_by_all_with_the_same_text_at_once():
    def work(own: Peers) -> None:
        failed = StorageError("disk full", [Failure("no room", file="a.bin", key="w")]) if own.index == 2 else None
        own.agree("write", failed)

    began = time.monotonic()
    raised = in_processes(4, work)
    assert time.monotonic() - began < 1
    assert {type(error) for error in raised} == {StorageError}
    assert len({str(error) for error in raised}) == 1
    assert "process 2 of 4" in str(raised[0])
    assert "disk full" in str(raised[0])
    assert "w: no room" in str(raised[0])
    assert all(error.failures == (Failure("no room", file="a.bin", key="w"),) for error in raised)


def test_several_failures_give_one_text():
    def work(own: Peers) -> None:
        own.agree("write", StorageError(f"own trouble {own.index}"))

    assert len({str(error) for error in in_processes(4, work)}) == 1


def test_who_works_sees_another_fail():
    def work(own: Peers) -> None:
        with own.joint_stage("write"):
            if own.index == 1:
                raise FormatError("torn")
            for _ in range(100):
                time.sleep(0.02)
                own.look()
            raise AssertionError("nothing was seen")

    began = time.monotonic()
    raised = in_processes(3, work)
    assert time.monotonic() - began < 1.5
    assert len({str(error) for error in raised}) == 1
    assert {type(error) for error in raised} == {FormatError}


def test_an_error_of_another_kind_is_told_and_stays_what_it_is():
    def work(own: Peers) -> None:
        with own.joint_stage("write"):
            if own.index == 0:
                raise ZeroDivisionError("a bug")

    own, other = in_processes(2, work)
    assert isinstance(own, ZeroDivisionError)
    assert type(other) is GraftaxError
    assert other.exit_code == 70
    assert "process 0 of 2" in str(other)
    assert "ZeroDivisionError: a bug" in str(other)


def test_what_all_know_of_is_not_told_again():
    def inner(own: Peers) -> None:
        try:
            with own.joint_stage("inner"):
                if own.index == 0:
                    raise OSError(28, "full")
        except OSError as error:
            raise StorageError("wrapped") from error

    def outer(own: Peers) -> None:
        with own.joint_stage("outer"):
            inner(own)

    def work(own: Peers) -> Any:
        with pytest.raises(GraftaxError, match="full" if own.index else "wrapped"):
            outer(own)
        return own.agree("again", give=own.index, timeout=2)

    assert in_processes(2, work) == [[0, 1]] * 2


def test_what_must_end_ends_everywhere_before_any_raises():
    ended: list[int] = []

    def work(own: Peers) -> Any:
        def action() -> None:
            if own.index == 1:
                raise OSError(28, "full")
            time.sleep(0.3)
            ended.append(own.index)

        try:
            own.finish("write", action)
        finally:
            assert sorted(ended) == [0, 2]

    raised = in_processes(3, work)
    assert {type(error) for error in raised} == {GraftaxError}
    assert len({str(error) for error in raised}) == 1
    assert "process 1 of 3" in str(raised[0])
    assert "full" in str(raised[0])


def test_what_ends_well_everywhere_raises_nothing():
    assert in_processes(2, lambda own: own.finish("write", lambda: None)) == [None, None]


def test_who_finishes_late_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    from graftax.execute import distributed

    for name in ("_BEAT", "_WAIT"):
        monkeypatch.setattr(distributed, name, 0.05)

    def work(own: Peers) -> None:
        own.finish("write", lambda: time.sleep(1.2 * own.index), timeout=0.4)

    assert in_processes(2, work) == [None, None]


def test_an_interrupt_is_told():
    def work(own: Peers) -> None:
        with own.joint_stage("write"):
            if own.index == 0:
                raise KeyboardInterrupt

    own, other = in_processes(2, work)
    assert isinstance(own, KeyboardInterrupt)
    assert "process 0 of 2" in str(other)
    assert "was interrupted" in str(other)


def test_after_a_failure_they_agree_again():
    def work(own: Peers) -> list[Any]:
        with pytest.raises(StorageError):
            own.agree("write", StorageError("full") if own.index else None)
        return own.agree("again", give=own.index)

    assert in_processes(3, work) == [[0, 1, 2]] * 3


def test_who_does_not_come_is_named_by_all_also_when_late():
    late = threading.Event()

    def work(own: Peers) -> None:
        if own.index == 1:
            late.wait(5)
        try:
            own.agree("plan", timeout=0.3)
        finally:
            late.set()

    raised = in_processes(3, work)
    assert {type(error) for error in raised} == {StorageError}
    assert len({str(error) for error in raised}) == 1
    assert "1 of 3 processes (1)" in str(raised[0])
    assert "'plan'" in str(raised[0])


def test_who_works_long_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    from graftax.execute import distributed

    for name in ("_BEAT", "_WAIT"):
        monkeypatch.setattr(distributed, name, 0.05)

    def work(own: Peers) -> list[Any]:
        with own.joint_stage("outer", timeout=0.5):
            own.agree("first")
            time.sleep(1.2 * own.index)
            own.agree("second", timeout=0.5)
            time.sleep(1.2 * own.index)
        return own.agree("after", give=own.index)

    assert in_processes(2, work) == [[0, 1]] * 2


def test_processes_at_different_steps_are_told_apart():
    raised = in_processes(2, lambda own: own.agree(f"step {own.index}"))
    assert {type(error) for error in raised} == {UsageError}
    assert "process 0 at 'step 0'; process 1 at 'step 1'" in str(raised[0])
    assert str(raised[0]) == str(raised[1])


def test_different_work_is_refused_with_the_names_of_what_differs():
    def work(own: Peers) -> None:
        same = {f"w{i}": "f32[2]" for i in range(9)}
        if own.index == 2:
            same |= {"w3": "f32[3]", "extra": "x"}
            del same["w7"]
        own.agree("plan", same=same)

    raised = in_processes(3, work)
    assert {type(error) for error in raised} == {PlanError}
    assert len({str(error) for error in raised}) == 1
    assert {failure.key for failure in raised[0].failures} == {"w3", "w7", "extra"}
    assert all("process 2" in failure.what for failure in raised[0].failures)


def test_the_same_work_is_done():
    assert in_processes(2, lambda own: own.agree("plan", same={"a": "1"}, give=own.index)) == [[0, 1]] * 2


def test_what_travels_is_bounded():
    def work(own: Peers) -> None:
        many = [Failure("x" * 10_000, key=str(i)) for i in range(1000)]
        own.agree("read", FormatError("bad", many) if own.index else None)

    raised = in_processes(2, work)
    assert len(str(raised[0]).encode()) <= 2000
    assert len(raised[0].failures) == 20
    assert len(raised[0].failures[0].what) == 400


def test_a_store_that_has_gone_is_told():
    class Gone(Store):
        def put(self, key: str, text: str, again: bool = False) -> bool:
            raise RuntimeError("UNAVAILABLE: Socket closed\nmore")

    with pytest.raises(StorageError, match=r"coordinator.*UNAVAILABLE: Socket closed$|UNAVAILABLE"):
        Peers(1, 2, Gone()).agree("plan")


def test_a_file_system_that_is_not_shared_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared_write, "_SEEN", 0.1)
    (tmp_path / "job").write_text("mine")
    shared_write._find(tmp_path / "job", "mine")
    with pytest.raises(StorageError, match="share no file system"):
        shared_write._find(tmp_path / "job", "another's")
    with pytest.raises(StorageError, match="share no file system"):
        shared_write._find(tmp_path / "absent" / "job", "mine")


def test_files_that_differ_anywhere_much_are_told_apart(tmp_path: Path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(rng.bytes(300_000))
    (tmp_path / "c").write_bytes((tmp_path / "a").read_bytes())
    (tmp_path / "d").write_bytes((tmp_path / "a").read_bytes() + b"x")
    assert sample(tmp_path / "a") == sample(tmp_path / "c")
    assert len({sample(tmp_path / name) for name in "abd"}) == 3
    with pytest.raises(StorageError, match="does not exist"):
        sample(tmp_path / "absent")


# ---------------------------------------------------------------- dividing

GROUPS = st.lists(st.lists(st.lists(st.integers(1, 1000), min_size=1, max_size=9), min_size=1, max_size=3), max_size=12)


@given(GROUPS, st.integers(1, 9))
def test_every_tile_is_made_once_and_shares_are_even(sizes: list[list[list[int]]], count: int):
    groups = [{f"{i}.{j}": tiles for j, tiles in enumerate(group)} for i, group in enumerate(sizes)]
    divided = partition.divide_tiles(groups, count)
    made = [(name, number) for part in divided for name, (start, stop) in part.items() for number in range(start, stop)]
    assert sorted(made) == sorted((n, i) for group in groups for n, tiles in group.items() for i in range(len(tiles)))
    for group in groups:
        if len(group) > 1:
            assert len({i for i, part in enumerate(divided) for name in group if name in part}) == 1
    load = [sum(sum(dict(_flat(groups))[name][a:b]) for name, (a, b) in part.items()) for part in divided]
    largest = max((sum(map(sum, g)) if len(g) > 1 else max(map(max, g)) for g in sizes), default=0)
    assert max(load) <= sum(load) / count + largest


def _flat(groups: list[dict[str, list[int]]]) -> list[tuple[str, list[int]]]:
    return [item for group in groups for item in group.items()]


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 9))
def test_every_file_has_one_writer_and_shares_are_even(sizes: list[int], count: int):
    owners = partition.divide_whole(sizes, count)
    load = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == i) for i in range(count)]
    assert max(load) - min(load) <= max(sizes, default=0)


@given(st.lists(st.integers(0, 100), max_size=4), st.integers(1, 64))
def test_axes_are_cut_evenly(shape: list[int], count: int):
    parts = partition.parts_per_axis(tuple(shape), count, range(len(shape)))
    assert all(extent % part == 0 for extent, part in zip(shape, parts, strict=True))
    assert count % int(np.prod(parts, dtype=np.int64)) == 0


def test_axes_are_cut_as_far_as_they_can_be():
    assert partition.parts_per_axis((6, 32), 16, [0, 1]) == [2, 8]
    assert partition.parts_per_axis((6, 32), 16, [1, 0]) == [1, 16]
    assert partition.parts_per_axis((7,), 4, [0]) == [1]


def test_a_transposed_kernel_is_cut_where_its_source_is():
    entry = Entry(("w",), ("kernel",), (Rearrange("a b -> b a"),))
    assert partition.best_order(entry, "kernel", (8, 64), {"w": TensorSpec((64, 8), "float32")}) == [1, 0]
    plain = Entry(("w",), ("kernel",))
    assert partition.best_order(plain, "kernel", (64, 8), {"w": TensorSpec((64, 8), "float32")}) == [0, 1]


def test_counts_are_added_and_taken_apart():
    assert partition.sum_counts([[1, True, [2]], [3, False, [4]]]) == [4, False, [6]]
    assert partition.subtract_counts([4, True, [6]], [3, True, [4]]) == [1, True, [2]]
    assert partition.subtract_counts([4], None) == [4]


def test_a_leaf_written_in_parts_is_checked_part_by_part():
    import hashlib

    spec = TensorSpec((4, 6), "float32")
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    pieces = {f"{r}:{r + 2},0:6": hashlib.sha256(array[r : r + 2].tobytes()).hexdigest() for r in (0, 2)}
    assert orbax_write.is_digest(pieces, spec)
    assert orbax_write.intact(array, spec, pieces)
    assert orbax_write.intact(array, spec, hashlib.sha256(array.tobytes()).hexdigest())
    array[3, 5] = 7
    assert not orbax_write.intact(array, spec, pieces)
    assert not orbax_write.intact(array, spec, {"0:2,0:6": pieces["0:2,0:6"]}), "a part without a digest"


def test_a_leaf_without_axes_has_one_part():
    spec = TensorSpec((), "float32")
    _, pieces = orbax_write.host_leaf(np.asarray(2, np.float32), spec)
    assert orbax_write.is_digest(pieces, spec)
    assert orbax_write.intact(np.asarray(2, np.float32), spec, pieces)
    assert not orbax_write.intact(np.asarray(3, np.float32), spec, pieces)


@pytest.mark.parametrize(
    "odd", [3, None, ["0:4,0:6"], {"0:4": "x"}, {"0:4,0:7": "x"}, {"0:4,0:6": 3}, {"-1:4,0:6": "x"}]
)
def test_what_is_no_digest_is_refused(odd: Any):
    assert not orbax_write.is_digest(odd, TensorSpec((4, 6), "float32"))
