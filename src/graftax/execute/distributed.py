"""Agreement between the processes of one `jax.distributed` job. Each process reports that it is ready or what failed;
then all continue, or all raise the same error.

The processes talk through the coordinator's key-value store. This costs milliseconds and moves no weights. JAX reports
a killed process: it ends the others with its own message once the heartbeat is overdue.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from graftax import errors
from graftax.errors import Failure, GraftaxError, PlanError, StorageError, escape

TIMEOUT = 300.0
"""Seconds without a sign of life after which a process counts as missing."""
_LOOK = 0.25  # seconds between two checks for a peer's failure while working
_BEAT = 5.0  # seconds between two signs of life; a thread gives them while the process works
_WAIT = 1.0  # seconds of one wait; signals are handled after it
_SHOWN = 5  # differing names that a message shows
_FAILURES = 20  # failures that travel with an error
_TEXT = 400  # characters of one of their fields


class Store(Protocol):
    """The coordinator's key-value store. Raises RuntimeError if the store is gone."""

    def put(self, key: str, text: str, again: bool = False) -> bool:
        """Store a text. False if the key exists already; `again`: replace its text."""
        ...

    def wait(self, key: str, seconds: float) -> str | None:
        """The text of a key, as soon as it exists; None after `seconds`."""
        ...

    def folder(self, prefix: str) -> dict[str, str]:
        """The texts of all keys directly below `prefix/`, by the last part of the key. Does not wait."""
        ...


# ---------------------------------------------------------------- the processes


def processes() -> tuple[int, int]:
    """(index, count) of this process in its `jax.distributed` job; (0, 1) without a job. Never imports jax."""
    found = _runtime()
    return (0, 1) if found is None else found[1:]


def peers() -> Peers | None:
    """This process and the others of its job; None if the process is alone."""
    global _joined
    found = _runtime()
    if found is None or found[2] < 2:
        return None
    client, index, count = found
    if _joined is None or _joined[0] is not client:
        _joined = client, Peers(index, count, _JaxStore(client))
    return _joined[1]


def agree(
    stage: str,
    error: GraftaxError | None = None,
    same: Mapping[str, str] | None = None,
    give: Any = None,
    timeout: float = TIMEOUT,
) -> list[Any]:
    """`Peers.agree` of this job. A process that is alone raises `error`, or returns `[give]`."""
    joined = peers()
    if joined is not None:
        return joined.agree(stage, error, same, give, timeout)
    if error is not None:
        raise error
    return [give]


_joined: tuple[Any, Peers] | None = None


def _runtime() -> tuple[Any, int, int] | None:
    """(client, index, count) of an initialised jax.distributed. Only this function looks inside jax: jax 0.5 to 0.10
    has no public way to the store, and `jax.process_index()` would start the backend."""
    module = sys.modules.get("jax._src.distributed")
    if module is None:
        return None
    state = getattr(module, "global_state", None)
    client = getattr(state, "client", None)
    if client is None:
        return None
    return client, int(getattr(state, "process_id", 0)), int(getattr(state, "num_processes", 0) or 1)


@dataclass(frozen=True, slots=True)
class _JaxStore:
    """The store of jax's DistributedRuntimeClient."""

    client: Any

    def put(self, key: str, text: str, again: bool = False) -> bool:
        try:
            self.client.key_value_set(key, text, allow_overwrite=again)
        except RuntimeError as error:
            if "ALREADY_EXISTS" in str(error):
                return False
            raise
        return True

    def wait(self, key: str, seconds: float) -> str | None:
        try:
            return self.client.blocking_key_value_get(key, max(1, int(seconds * 1000)))
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def folder(self, prefix: str) -> dict[str, str]:
        try:
            return {key.rpartition("/")[2]: text for key, text in self.client.key_value_dir_get(prefix)}
        except RuntimeError as error:
            if "NOT_FOUND" in str(error):
                return {}
            raise


# ---------------------------------------------------------------- agreeing


@dataclass(slots=True, eq=False)
class Peers:
    """This process (`index` of `count`) and the others. All must call `agree` equally often and in the same order."""

    index: int
    count: int
    store: Store
    _turn: int = 0
    _looked: float = 0.0
    _failed: BaseException | None = None  # the last error that every process has raised

    def agree(
        self,
        stage: str,
        error: GraftaxError | None = None,
        same: Mapping[str, str] | None = None,
        give: Any = None,
        timeout: float = TIMEOUT,
    ) -> list[Any]:
        """Wait until every process reports that it finished `stage`. Returns what each process gave (JSON data, by
        index).

          error    what failed in this process: all processes raise it as soon as they wait or look
          same     name -> text that must be equal in all processes; PlanError names those that differ
          timeout  seconds without a sign of life of a process after which all raise StorageError
        """
        turn, self._turn = self._turn, self._turn + 1
        if error is not None:
            self._decide(turn, _error_record(self._name(), error))
            raised = self._failed = _error_of(self._verdict(turn, stage, timeout))
            raised.questions = error.questions
            raise raised from error
        digest = "" if same is None else _digest("\n".join(f"{name}\t{text}" for name, text in sorted(same.items())))
        record = json.dumps({"stage": stage, "same": digest, "give": give})
        self._put(turn, "here", str(self.index), record)
        here = self._folder(turn, "here")
        if len(here) == self.count:  # the last process to arrive sees all records
            self._decide(turn, _verdict_on([json.loads(here[str(i)]) for i in range(self.count)]))
        verdict = self._verdict(turn, stage, timeout)
        if "text" in verdict:
            self._failed = _error_of(verdict)
            raise self._failed
        if verdict["differ"]:
            self._raise_difference(same or {}, timeout)
        if not verdict["gave"]:
            return [None] * self.count
        here = self._folder(turn, "here")
        return [json.loads(here[str(i)])["give"] for i in range(self.count)]

    def look(self) -> None:
        """Call this while working: it raises an error that another process has reported meanwhile. It asks the store
        only a few times a second."""
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return
        self._looked = now
        for text in self._folder(self._turn, "verdict").values():
            verdict = json.loads(text)
            if "text" in verdict:
                raise _error_of(verdict)

    @contextmanager
    def joint_stage(self, stage: str, timeout: float = TIMEOUT) -> Iterator[None]:
        """Run the block as a stage that all processes finish or fail together: `agree` at its end, with the error that
        the block raised. An error that all processes have already raised passes unchanged. An error that is not a
        GraftaxError is reported to the others and raised here unchanged. Until the end of the block this process counts
        as alive."""
        try:
            with self._alive():
                yield
        except GraftaxError as error:
            if self._failed is not None and self._failed in (error, error.__cause__):
                raise
            self.agree(stage, error, timeout=timeout)
        except BaseException as error:
            if error is self._failed:
                raise
            turn, self._turn = self._turn, self._turn + 1
            what = "was interrupted" if isinstance(error, KeyboardInterrupt) else _line(error)
            self._decide(turn, _error_record(self._name(), GraftaxError(what)))
            self._failed = error
            raise
        else:
            self.agree(stage, timeout=timeout)

    def finish(self, stage: str, action: Callable[[], None], timeout: float = TIMEOUT) -> None:
        """Run an action that must not be cut short. Every process completes it, with or without an error, before any
        process raises an error of another. Until then this process counts as alive."""
        failed: Exception | None = None
        try:
            with self._alive():
                action()
        except Exception as error:
            failed = error
        what = failed if failed is None or isinstance(failed, GraftaxError) else GraftaxError(_line(failed))
        told = self.agree(stage, give=None if what is None else _error_record(self._name(), what), timeout=timeout)
        first = next((verdict for verdict in told if verdict is not None), None)
        if first is not None:
            self._failed = _error_of(first)
            raise self._failed from failed

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Give signs of life while the block runs, so that processes waiting for this one keep waiting."""
        ended = threading.Event()

        def beat() -> None:
            number = 0
            while not ended.wait(_BEAT):
                number += 1
                try:
                    self._put(self._turn, "alive", str(self.index), str(number), again=True)
                except GraftaxError:  # the coordinator is gone: JAX ends this process
                    return

        threading.Thread(target=beat, name="graftax-alive", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    # ------------------------------------------------------------ the store

    def _put(self, turn: int, kind: str, name: str, text: str, again: bool = False) -> None:
        with _reached():
            self.store.put(f"graftax/{turn}/{kind}/{name}", text, again)

    def _folder(self, turn: int, kind: str) -> dict[str, str]:
        with _reached():
            return self.store.folder(f"graftax/{turn}/{kind}")

    def _decide(self, turn: int, verdict: Mapping[str, Any]) -> None:
        """Store the verdict of a turn. The first verdict stands; a later one is ignored."""
        self._put(turn, "verdict", "0", json.dumps(verdict))

    def _verdict(self, turn: int, stage: str, timeout: float) -> dict[str, Any]:
        """Wait for the verdict of a turn. The wait ends when a process gives no sign of life for too long."""
        signs: tuple[dict[str, str], dict[str, str]] | None = None
        since = looked = time.monotonic()
        while True:
            left = max(0.01, since + timeout - time.monotonic())
            with _reached():
                text = self.store.wait(f"graftax/{turn}/verdict/0", min(_WAIT, left))
            if text is not None:
                return json.loads(text)
            now = time.monotonic()
            if now - looked < _BEAT and now - since < timeout:
                continue
            looked = now
            seen = self._folder(turn, "here"), self._folder(turn, "alive")
            if seen != signs:
                since = now if signs is not None else since
                signs = seen
            if now - since >= timeout:
                gone = [i for i in range(self.count) if str(i) not in seen[0]]
                self._decide(turn, _missing(gone, self.count, stage, timeout))

    def _name(self) -> str:
        return f"process {self.index} of {self.count} (on {escape(platform.node() or 'this host')})"

    def _raise_difference(self, same: Mapping[str, str], timeout: float) -> None:
        """Raise the same PlanError in every process, naming what differs from process 0."""
        first = self.agree("what process 0 has", give=dict(same) if self.index == 0 else None, timeout=timeout)[0]
        names = [*first, *(name for name in same if name not in first)]
        mine = [name for name in names if first.get(name) != same.get(name)]
        told = self.agree("what differs", give=[len(mine), mine[:_SHOWN]], timeout=timeout)
        self._failed = PlanError(
            f"the {self.count} processes were given different work; nothing was written",
            [
                Failure(f"differs between process 0 and process {i} ({count} differences)", key=name)
                for i, (count, shown) in enumerate(told)
                for name in shown
            ],
            next="Give every process the same source, like, rules and options, and the same files.",
        )
        raise self._failed


@contextmanager
def _reached() -> Iterator[None]:
    """Handle an error of the store: process 0 keeps the store, so process 0 is gone."""
    try:
        yield
    except GraftaxError:
        raise
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise StorageError(
            f"the coordinator of jax.distributed (process 0) cannot be reached: {escape(first)}",
            next="See the messages of process 0: it has ended, or the network to it has failed.",
        ) from error


# ---------------------------------------------------------------- verdicts


def _verdict_on(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The verdict on the reports of all processes."""
    stages = [record["stage"] for record in records]
    if len(set(stages)) > 1:
        at = "; ".join(f"process {stages.index(stage)} at {escape(stage)!r}" for stage in dict.fromkeys(stages))
        text = f"the processes are not at the same step: {at}. Call graftax in the same order in every process."
        return {"kind": "UsageError", "text": text, "failures": []}
    return {
        "differ": len({record["same"] for record in records}) > 1,
        "gave": any(record["give"] is not None for record in records),
    }


def _error_record(name: str, error: GraftaxError) -> dict[str, Any]:
    failures = [{k: v[:_TEXT] for k, v in asdict(failure).items()} for failure in error.failures[:_FAILURES]]
    return {"kind": type(error).__name__, "text": f"{name} failed: {error}", "failures": failures}


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _missing(gone: list[int], count: int, stage: str, timeout: float) -> dict[str, Any]:
    which = ", ".join(map(str, gone[:_SHOWN])) + (", ..." if len(gone) > _SHOWN else "")
    text = (
        f"{len(gone)} of {count} processes ({which}) gave no sign of life for {timeout:.0f} s at {escape(stage)!r}\n"
        "See their messages; every process must make the same calls."
    )
    return {"kind": "StorageError", "text": text, "failures": []}


def _error_of(verdict: Mapping[str, Any]) -> GraftaxError:
    """The error of a verdict, with the same text in every process."""
    kind = getattr(errors, verdict["kind"], GraftaxError)
    known = isinstance(kind, type) and issubclass(kind, GraftaxError)
    error = (kind if known else GraftaxError)(verdict["text"])
    error.failures = tuple(Failure(**failure) for failure in verdict["failures"])
    return error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
