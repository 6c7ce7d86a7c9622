"""Several processes of one `jax.distributed` job agree: each says that it is ready or what failed, and all go on, or
all raise the same error.

Everything goes through the coordinator's key-value store, which costs milliseconds and moves no weights. A process that
is killed is told of by JAX: the others are ended with its message once the heartbeat is overdue.
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
_LOOK = 0.25  # seconds between two looks for a peer's failure while working
_BEAT = 5.0  # seconds between two signs of life, which a thread gives while a process works
_WAIT = 1.0  # seconds of one wait, after which signals are served
_SHOWN = 5  # names of what differs
_FAILURES = 20  # failures that travel with an error
_TEXT = 400  # characters of one of their fields


class Store(Protocol):
    """The coordinator's key-value store. RuntimeError where it is gone."""

    def put(self, key: str, text: str, again: bool = False) -> bool:
        """False where the key is there already; `again`: replace it."""
        ...

    def wait(self, key: str, seconds: float) -> str | None:
        """The text of a key as soon as it is there; None after `seconds`."""
        ...

    def folder(self, prefix: str) -> dict[str, str]:
        """All keys right below `prefix/`, by their last part. Does not wait."""
        ...


# ---------------------------------------------------------------- who is there


def processes() -> tuple[int, int]:
    """(index, count) of this process in its `jax.distributed` job; (0, 1) where there is none. Never imports jax."""
    found = _runtime()
    return (0, 1) if found is None else found[1:]


def peers() -> Peers | None:
    """This process among the others of its job; None where it is alone."""
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
    """`Peers.agree` of this job; alone it raises `error`, or gives `[give]`."""
    joined = peers()
    if joined is not None:
        return joined.agree(stage, error, same, give, timeout)
    if error is not None:
        raise error
    return [give]


_joined: tuple[Any, Peers] | None = None


def _runtime() -> tuple[Any, int, int] | None:
    """(client, index, count) of an initialised jax.distributed. The only place that looks inside jax: there is no
    public way to the store (jax 0.5 to 0.10), and `jax.process_index()` would start the backend."""
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
    """This process (`index` of `count`) and the others. All must call `agree` equally often, in the same order."""

    index: int
    count: int
    store: Store
    _turn: int = 0
    _looked: float = 0.0
    _failed: BaseException | None = None  # what was raised last, and all know of

    def agree(
        self,
        stage: str,
        error: GraftaxError | None = None,
        same: Mapping[str, str] | None = None,
        give: Any = None,
        timeout: float = TIMEOUT,
    ) -> list[Any]:
        """Waits until every process has said that it is done with `stage`; gives what each gave (JSON data, by index).

        error    what failed here: all processes raise it, as soon as they wait or look
        same     name -> text, which must not differ between processes: PlanError with the names that do
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
        if len(here) == self.count:  # whoever comes last sees all
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
        """While working: raises what another process failed with meanwhile. Asks a few times a second at most."""
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
        """`agree` at the end of the block, with what it raised; what all have raised already passes. An error that is
        no GraftaxError is told to the others and raised here as it is. Until then this process counts as alive."""
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
        """Runs what must not be cut short: all processes end it, however it ends, before any raises what failed in one.
        Until then this process counts as alive."""
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
        """Signs of life while the block runs: who waits for this process goes on waiting."""
        ended = threading.Event()

        def beat() -> None:
            number = 0
            while not ended.wait(_BEAT):
                number += 1
                try:
                    self._put(self._turn, "alive", str(self.index), str(number), again=True)
                except GraftaxError:  # the coordinator has gone: JAX ends this process
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
        """The first verdict of a turn stands; a later one is not taken."""
        self._put(turn, "verdict", "0", json.dumps(verdict))

    def _verdict(self, turn: int, stage: str, timeout: float) -> dict[str, Any]:
        """The verdict of a turn, waited for; a process that gives no sign of life for too long ends the wait."""
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
        """Every process raises the same PlanError, with the names of what differs from process 0."""
        first = self.agree("what process 0 has", give=dict(same) if self.index == 0 else None, timeout=timeout)[0]
        names = [*first, *(name for name in same if name not in first)]
        mine = [name for name in names if first.get(name) != same.get(name)]
        told = self.agree("what differs", give=[len(mine), mine[:_SHOWN]], timeout=timeout)
        self._failed = PlanError(
            f"the {self.count} processes were given different work; nothing was written",
            [
                Failure(f"is not the same in process {i} as in process 0 ({count} such)", key=name)
                for i, (count, shown) in enumerate(told)
                for name in shown
            ],
            next="Give every process the same source, like, rules and options, and the same files.",
        )
        raise self._failed


@contextmanager
def _reached() -> Iterator[None]:
    """An error of the store: process 0 keeps it, and has gone."""
    try:
        yield
    except GraftaxError:
        raise
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise StorageError(
            f"the coordinator of jax.distributed (process 0) cannot be reached: {escape(first)}",
            next="See the messages of process 0: it has ended, or the network between has.",
        ) from error


# ---------------------------------------------------------------- verdicts


def _verdict_on(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The verdict on what all processes said."""
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
    """The error of a verdict: the same text in every process."""
    kind = getattr(errors, verdict["kind"], GraftaxError)
    known = isinstance(kind, type) and issubclass(kind, GraftaxError)
    error = (kind if known else GraftaxError)(verdict["text"])
    error.failures = tuple(Failure(**failure) for failure in verdict["failures"])
    return error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
