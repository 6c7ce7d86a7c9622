"""Connect traced Flax modules with the tap: one Channel for each runner, used by Linen and NNX alike.

In eager code the tap is called directly. In code that jax traces (jit, scan, remat, cond) an ordered io_callback stands
at the module's entry and exit, so every iteration is a call of its own, in the order of the program. Callbacks use
NumPy only and never raise: an exception of a tap is kept and raised when the run is over.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from flax.core import tracers
from jax.experimental import io_callback

from graftax.parity import flax_values, listening
from graftax.parity.listening import Heard, Listener, Marks, Own, Owner
from graftax.parity.records import Site, Tap

R = TypeVar("R")
VMAP = "inside vmap"
NO_CALLBACK = {
    ("jax/_src/api.py", "vmap_f"): VMAP,
    ("jax/_src/api.py", "value_and_grad_f"): "inside a gradient",
    ("jax/_src/api.py", "vjp"): "inside a gradient",
    ("jax/_src/api.py", "jvp"): "inside a gradient",
    ("jax/_src/api.py", "linearize"): "inside a gradient",
    ("jax/_src/shard_map.py", "wrapped"): "inside shard_map",
}
"""Functions of jax in which an ordered callback cannot stand -> the reason given for a module called inside."""
ELSEWHERE = "inside a jax transformation that takes no ordered callbacks"
BRANCH = "in a branch that was not taken, or a loop of no steps"
NEVER = "never called"


@dataclass(slots=True)
class Traced:
    """What was learned when a program was traced; it holds for later runs of the same compiled program too.

    emitted   modules with a callback in the program
    refused   module path -> why no callback could stand there
    inner     module path -> {(collection and keys): shape} of its leaves as a scan's body sees them
    """

    emitted: set[str] = field(default_factory=set[str])
    refused: dict[str, str] = field(default_factory=dict[str, str])
    inner: dict[str, dict[tuple[str, ...], tuple[int, ...]]] = field(default_factory=dict[str, Any])


@dataclass(slots=True, eq=False)
class Channel:
    """The calls of a runner's watched modules on their way to the tap.

    tap       the tap, listener or marks of this run; callbacks of compiled code find it here
    blocked   no callbacks in traced code (the retry after a transformation refused them)
    jit_disabled  the caller's own setting, which holds inside modules that a listener hears
    emit      (function of arrays on the host, arrays) -> what stands in traced code instead of a callback
    """

    tap: Any = None
    jit_disabled: bool = False
    watch: frozenset[str] = frozenset()
    blocked: bool = False
    emit: Callable[[Callable[..., Any], list[Any]], Any] | None = None
    traced: Traced = field(default_factory=Traced)
    base: Any = None
    seen: dict[str, int] = field(default_factory=dict[str, int])
    methods: dict[Site, str] = field(default_factory=dict[Site, str])
    failure: BaseException | None = None
    _open: dict[str, list[Site]] = field(default_factory=dict[str, list[Site]])
    _active: list[str] = field(default_factory=list[str])
    _waiting: bool = False
    _busy: int = 0

    # ------------------------------------------------------------ a run

    def begin(self, watch: Collection[str], tap: Tap | Listener | Marks | None, traced: Traced, blocked: bool) -> None:
        self.tap, self.watch, self.traced, self.blocked = tap, frozenset(watch), traced, blocked
        self.base = tracers.current_trace()
        self.seen, self.methods, self._open, self._active = {}, {}, {}, []
        self.failure, self._waiting, self._busy = None, False, 0

    def end(self) -> None:
        """Close the run: wait for all callbacks, then raise the tap's own failure, before any other."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the run itself raises it
            jax.effects_barrier()
        self.tap = None
        self._active, self._open = [], {}
        if self.failure is not None:
            raise self.failure

    def not_traced(self) -> dict[str, str]:
        """Watched module -> why the tap did not see it."""
        out: dict[str, str] = {}
        for path in sorted(self.watch - self.seen.keys()):
            out[path] = self.traced.refused.get(path) or (BRANCH if path in self.traced.emitted else NEVER)
        return out

    @property
    def tracing(self) -> bool:
        """Is jax tracing the code that runs now, instead of computing it?"""
        return tracers.current_trace() != self.base

    # ------------------------------------------------------------ a call

    def call(
        self,
        path: str,
        method: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        proceed: Callable[..., Any],
        own: Own,
    ) -> Any:
        """The output of a module's call, with the tap at its entry and exit. If the module calls a method on itself,
        that is part of the same call. `own`: the module itself, for a listener."""
        if self.tap is None or path not in self.watch or path in self._active:
            return proceed(*args, **kwargs)
        if self._busy == threading.get_ident():  # the tap itself runs something
            return proceed(*args, **kwargs)
        tracing = self.tracing
        if tracing:
            where = _place()
            if where == "":  # Flax traces this only to discard it
                return proceed(*args, **kwargs)
            if isinstance(self.tap, Marks):
                return self._within(path, proceed, *self.tap.mark(args, dict(kwargs), own().state))
            if where == VMAP and isinstance(self.tap, Listener):
                return self._heard(path, method, args, kwargs, proceed, own(), vmapped=True)
            reason = where or (ELSEWHERE if self.blocked else None)
            if reason is not None:
                self.traced.refused.setdefault(path, reason)
                return proceed(*args, **kwargs)
            self.traced.emitted.add(path)
        if isinstance(self.tap, Listener):
            return self._heard(path, method, args, kwargs, proceed, own(), vmapped=False)
        args, kwargs = self._pass((args, dict(kwargs)), tracing, path, method, self._entering)
        out = self._within(path, proceed, args, kwargs)
        return self._pass(out, tracing, path, method, self._leaving)

    def _within(self, path: str, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._active.append(path)
        try:
            return proceed(*args, **kwargs)
        finally:
            self._active.pop()

    def _pass(self, nest: Any, tracing: bool, path: str, method: str, ask: Callable[..., Any]) -> Any:
        """`nest`, or the nest that the tap returns instead."""
        arrays, node = flax_values.spread(nest)
        if not tracing:
            self._await_callbacks()
            held = [flax_values.to_host(array) for array in arrays]
            new = ask(path, method, node, held)
            if self.failure is not None:
                raise self.failure
            if new is None:
                return nest
            made = [jax.numpy.asarray(item) for item in new]
            return flax_values.refill(
                node, flax_values.kept(arrays, made, [n is not h for n, h in zip(new, held, strict=True)])
            )

        def host(*given: Any) -> Any:
            copies = _copies(given)
            new = ask(path, method, node, copies)
            return copies if new is None else new

        if self.emit is not None:
            return flax_values.refill(node, self.emit(host, arrays))
        self._waiting = True
        if not getattr(self.tap, "replaces", True):

            def listen(*given: Any) -> None:
                ask(path, method, node, _copies(given))

            io_callback(listen, None, *arrays, ordered=True)
            return nest
        shapes = [jax.ShapeDtypeStruct(np.shape(a), jax.dtypes.canonicalize_dtype(a.dtype)) for a in arrays]
        made = io_callback(host, shapes, *arrays, ordered=True)
        return flax_values.refill(node, flax_values.kept(arrays, made, [True] * len(made)))

    def _entering(self, path: str, method: str, node: flax_values.Node, held: list[Any]) -> list[Any] | None:
        """Report a call to the tap. Returns the arrays to call the module with, or None."""
        site = self._next(path, method)
        self._open.setdefault(path, []).append(site)
        return self._through_tap(lambda tap, given: tap.enter(site, given[0], given[1]), site, node, held)

    def _next(self, path: str, method: str) -> Site:
        site = Site(path, self.seen.get(path, 0))
        self.seen[path] = site.call + 1
        if method != "__call__":
            self.methods[site] = method
        return site

    def _leaving(self, path: str, method: str, node: flax_values.Node, held: list[Any]) -> list[Any] | None:
        site = self._open[path].pop()
        return self._through_tap(lambda tap, given: tap.leave(site, given), site, node, held)

    def _through_tap(
        self, ask: Callable[[Tap, Any], Any], site: Site, node: flax_values.Node, held: list[Any]
    ) -> list[Any] | None:
        def asked() -> list[Any] | None:
            given = flax_values.plain(node, held)
            new = ask(self.tap, given)
            return None if new is None else flax_values.replaced(given, held, new, f"Flax {site}")

        return self._guarded(asked)

    def _guarded(self, ask: Callable[[], R]) -> R | None:
        """What the tap answers; None if it fails, or failed before. Its exception must not pass through XLA, and is
        raised when the run is over."""
        if self.tap is None or self.failure is not None:
            return None
        self._busy = threading.get_ident()
        try:
            return ask()
        except BaseException as failure:
            self.failure = failure
            return None
        finally:
            self._busy = 0

    def _await_callbacks(self) -> None:
        """Callbacks of traced code come before what eager code tells."""
        if self._waiting:
            jax.effects_barrier()
            self._waiting = False

    # ------------------------------------------------------------ a call that a listener hears

    def _heard(
        self,
        path: str,
        method: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        proceed: Callable[..., Any],
        owner: Owner,
        vmapped: bool,
    ) -> Any:
        listener: Listener = self.tap
        fixed = self._next(path, method) if vmapped else None  # callbacks inside vmap have no order

        def began(call: Heard) -> None:
            site = fixed
            if site is None:
                site = self._next(path, method)
                self._open.setdefault(path, []).append(site)
            listener.began(site, method, owner.object, call)

        def ended(output: Heard) -> None:
            listener.ended(self._open[path].pop() if fixed is None else fixed, output)

        tracing = self.tracing
        args, kwargs, _ = self._tell((args, kwargs, owner.state), tracing, vmapped, began)
        with jax.disable_jit(self.jit_disabled):
            out = self._within(path, proceed, args, kwargs)
        return self._tell(out, tracing, vmapped, ended)

    def _tell(self, nest: Any, tracing: bool, vmapped: bool, hear: Callable[[Heard], None]) -> Any:
        if tracing:
            self._waiting = True
            return listening.passed(nest, vmapped, lambda heard: self._guarded(lambda: hear(heard)))
        self._await_callbacks()
        heard = Heard(listening.snapshot(nest))
        self._guarded(lambda: hear(heard))
        if self.failure is not None:
            raise self.failure
        return nest


def _copies(given: Any) -> list[Any]:
    """Copies of the arrays: a callback gets XLA's buffers, which XLA reuses."""
    return [np.array(item) for item in given]


def _place() -> str | None:
    """Can an ordered callback stand in the code traced now? None: yes. '': Flax traces a scan's body here only to
    discard it. Other text: why not. jax does not tell, so the functions on the stack are examined."""
    frame: FrameType | None = sys._getframe(2)
    found: str | None = None
    while frame is not None:
        code = frame.f_code
        name = code.co_name
        if name == "body_fn" and code.co_filename.endswith("axes_scan.py") and frame.f_locals.get("init_mode"):
            return ""
        if found is None and name in _NAMES:
            file = code.co_filename.replace("\\", "/")
            found = next((why for (end, n), why in NO_CALLBACK.items() if n == name and file.endswith(end)), None)
        frame = frame.f_back
    return found


_NAMES = frozenset(name for _, name in NO_CALLBACK)
