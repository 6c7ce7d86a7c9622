"""Run a plan and place the output leaves: as shards of a given sharding, on jax's default device, or in NumPy."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from graftax.adapters import live_leaves
from graftax.adapters.jax_arrays import all_to_jax, from_storage, once, own
from graftax.adapters.shardings import HOST, Place, jax_narrows
from graftax.errors import UsageError, escape
from graftax.execute import distributed
from graftax.execute.eager import in_order, load, workers_for
from graftax.execute.receipt import Receipt
from graftax.execute.same_work import same_work as same_work_of
from graftax.execute.sharded import local_bytes
from graftax.execute.streamed import SCRATCH, Stream
from graftax.formats.io.files import kept_open
from graftax.ops import Keep
from graftax.plans import Plan
from graftax.tree import Checkpoint, TensorSpec
from graftax.tree.gc_paused import gc_paused

IN_FLIGHT = 256 << 20
"""Bytes of shards that may be on their way to devices at once. Beyond this the host waits. Only devices with memory of
their own count."""


@contextmanager
def joint_stage(stage: str, spans: bool) -> Iterator[None]:
    """If a load `spans` several processes, they all finish the block, or all raise the error of the one that failed."""
    peers = distributed.peers() if spans else None
    if peers is None:
        yield
        return
    with peers.joint_stage(stage):
        yield


def same_work(
    plan: Plan, source: Checkpoint, like: Checkpoint | None, places: Mapping[str, Place], spans: bool
) -> None:
    """If a load spans several processes, raise PlanError in all of them unless all will make the same leaves in the
    same way from the same tensors."""
    if not spans:
        return
    with joint_stage("reading the source", spans):
        work = same_work_of(plan, source, like)
        meshes = {id(mesh): mesh for place in places.values() if (mesh := getattr(place, "mesh", None)) is not None}
        devices = {key: hashlib.sha256(mesh.device_ids.tobytes()).hexdigest()[:16] for key, mesh in meshes.items()}
        work |= {
            f"place of {name}": f"{place} {devices.get(id(getattr(place, 'mesh', None)), '')}"
            for name, place in places.items()
        }
    distributed.agree("planning", same=work)


def place_leaves(
    plan: Plan, source: Checkpoint, like: Checkpoint | None, places: Mapping[str, Place], receipt: Receipt, spans: bool
) -> dict[str, Any]:
    """path -> leaf, placed as `places` says, in like's order, each in its own memory. Each process reads only what its
    own devices hold. Without a sharding, a dtype that jax would narrow stays a NumPy array.

    Raises the errors of `Stream`, and UsageError for a kept leaf whose values lie in other processes.
    """
    run = Stream(plan, source, like, receipt, None)
    peers = distributed.peers() if spans else None
    kept = [name for e in plan.entries if e.ops and isinstance(e.ops[0], Keep) for name in e.targets]
    remote = _remote(like, kept)
    specs = plan.like.specs
    whole = [name for name in specs if name not in remote and _on_one_device(places.get(name), specs[name])]
    out: dict[str, Any] = dict.fromkeys(specs)
    before = receipt.bytes_read
    arrays = {name: from_storage(array, specs[name]) for name, array in load(run, source, whole).items()}
    receipt.bytes_needed += receipt.bytes_read - before
    given = once(adopt=True)
    for name in whole:
        if places.get(name) == HOST:
            array = arrays.pop(name)
            out[name] = own(array, given(array))
    out.update(all_to_jax(arrays, places, given))
    for name, leaf in remote.items():
        out[name] = _kept(name, leaf, places.get(name))
    _place_shards(run, plan, {name: places[name] for name in specs if out[name] is None}, peers, out)
    receipt.over_read = {name: receipt.over_read[name] for name in specs if name in receipt.over_read}
    run.close()
    return out


def _place_shards(
    run: Stream, plan: Plan, places: Mapping[str, Any], peers: distributed.Peers | None, out: dict[str, Any]
) -> None:
    """Make the leaves of these shardings and put them into `out`. One thread makes the leaves of one entry, one after
    another; one thread also makes all leaves that need whole tensors."""
    if not places:
        return
    jobs: list[list[str]] = [[]]  # the first: leaves made from whole tensors
    for entry in plan.entries:
        names = [name for name in entry.targets if name in places]
        if run.apart(entry):
            jobs.append(names)
        else:
            jobs[0] += names
    workers = workers_for(local_bytes(plan.like.specs[name], place) for name, place in places.items())
    lock, flight = threading.Lock(), _Flight()

    def worker() -> Callable[[list[str]], None]:
        reader = run.reader(SCRATCH // workers)

        def make(names: list[str]) -> None:
            for name in names:
                array = run.sharded(name, places[name], reader)
                run.done(name)
                with lock:
                    out[name] = array
                    flight.add(array)
                    if peers is not None:
                        peers.look()
            reader.let_go()

        return make

    with gc_paused(), kept_open():
        in_order([names for names in jobs if names], worker, workers)


def _on_one_device(place: Place, spec: TensorSpec) -> bool:
    """True if this process makes the whole leaf, for the host or for one device."""
    if place is None or place == HOST or jax_narrows(spec):
        return True
    return len(place.device_set) == 1 and len(place.addressable_devices) == 1


class _Flight:
    """Arrays on their way to devices. The host waits when they exceed IN_FLIGHT bytes."""

    __slots__ = ("_arrays", "_nbytes")

    def __init__(self) -> None:
        self._arrays: deque[tuple[Any, int]] = deque()
        self._nbytes = 0

    def add(self, array: Any) -> None:
        nbytes = sum(shard.data.nbytes for shard in array.addressable_shards)
        self._arrays.append((array, nbytes))
        self._nbytes += nbytes
        while self._nbytes > IN_FLIGHT:
            oldest, nbytes = self._arrays.popleft()
            oldest.block_until_ready()
            self._nbytes -= nbytes


# ---------------------------------------------------------------- leaves kept from like


def _remote(like: Checkpoint | None, kept: list[str]) -> dict[str, Any]:
    """The kept leaves of which this process holds only a part."""
    if like is None or not kept:
        return {}
    leaves = live_leaves(like)
    return {name: leaves[name] for name in kept if not getattr(leaves[name], "is_fully_addressable", True)}


def _kept(name: str, leaf: Any, place: Place) -> Any:
    """A leaf that spans several processes, copied in place."""
    import jax

    if place == HOST or place is None or not leaf.sharding.is_equivalent_to(place, leaf.ndim):
        raise UsageError(
            f"{escape(name)} is kept from like, where it spans several processes as {escape(leaf.sharding)}",
            next="Pass that sharding, or gather the leaf first.",
        )
    shards = [jax.numpy.copy(shard.data) for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, place, shards, dtype=leaf.dtype)
