"""Run a Flax model of either API: compiled if possible, else eagerly, with a Channel to the tap.

Compiled is the default: the first eager run compiles op by op, and a compiled run with callbacks takes less than a warm
eager one without (12 layers of hidden size 256: 0.9 s against 1.3 s, first runs 5.5 s and 5.6 s on two cores).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from graftax.errors import GraftaxError, ModelError, escape
from graftax.parity import flax_values
from graftax.parity.flax_tap import Channel, Traced
from graftax.parity.listening import Listener, Marks
from graftax.parity.records import Tap

PRECISION = "highest"
"""With a lower precision the matrix products of the CPU and TPU backends are not float32 products (DESIGN section
6)."""
MARK = "graftax_pass_"
_KEPT = 6  # compiled programs of one runner


@dataclass(slots=True, eq=False)
class Built:
    """A program for one kind of call, that is, one set of watched modules and one structure of arguments."""

    function: Callable[..., Any] | None = None
    output: Any = None
    node: Any = None
    number: int = 0
    marked: tuple[Any, list[Callable[..., Any]]] | None = None
    traced: Traced = field(default_factory=Traced)


@dataclass(slots=True, eq=False)
class Program:
    """A model's forward, made to run with a tap.

    forward    (weights, args, kwargs) -> outputs; it arranges that every module's call goes through channel.call
    explain    an exception of the model -> ModelError
    mend       an exception of the model -> is another try worthwhile?
    compiled   True, False, or None: compiled unless it cannot be
    precision  of matrix products; None: the caller's own
    """

    forward: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
    explain: Callable[[Exception, Any], ModelError]
    mend: Callable[[Exception], bool] = lambda error: False
    compiled: bool | None = None
    precision: str | None = PRECISION
    channel: Channel = field(default_factory=Channel)
    current: Built = field(default_factory=Built)
    compile_seconds: float = 0.0
    """Seconds spent on tracing and compiling so far."""
    _built: OrderedDict[Any, Built] = field(default_factory=OrderedDict[Any, Built])
    _lock: Any = field(default_factory=threading.RLock)
    _numbers: int = 0

    def run(
        self,
        weights: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        watch: Collection[str],
        tap: Tap | Listener | None,
        compiled: bool | None = None,
        unrolled: bool = False,
    ) -> Any:
        """The outputs as Values. ModelError if the model fails; an exception of the tap passes through unchanged.
        unrolled: in an eager run, loops and jitted functions run step by step, except inside the watched modules."""
        arrays, node = flax_values.spread((tuple(args), dict(kwargs)))
        wanted = self.compiled if compiled is None else compiled
        ways = [(True, False)] if wanted is not False else []
        ways += [(False, False), (False, True)] if wanted is not True else []
        before = bool(jax.config.jax_disable_jit)  # pyright: ignore
        self.channel.jit_disabled = before
        with self._lock, self._exact(), jax.disable_jit(before or unrolled):
            given = [jax.numpy.asarray(array) for array in arrays]
            while True:
                jit, blocked = ways[0]
                try:
                    out = self._attempt(weights, given, node, watch, tap, jit, blocked)
                except GraftaxError:
                    raise
                except Exception as error:
                    if error is self.channel.failure:
                        raise
                    again = self.mend(error)
                    if not again:
                        ways.pop(0)
                        # Code that needs concrete values cannot be traced. The eager run shows if that was so.
                        again = bool(ways) and ((jit and not self.channel.seen) or _refuses_callbacks(error))
                    if not again:
                        raise self.explain(error, (args, kwargs)) from error
                    if self.channel.seen and hasattr(tap, "restart"):
                        tap.restart()  # pyright: ignore
                    continue
                if not jit and self.compiled is None and compiled is None:
                    self.compiled = False
                return out

    def jaxpr(
        self, weights: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], watch: Collection[str], marks: Marks
    ) -> Any:
        """The program of a call, in which the calls of the watched modules are marked. Raises what tracing raises."""
        arrays, node = flax_values.spread((tuple(args), dict(kwargs)))
        with self._lock, self._exact(), jax.disable_jit(False):
            given = [jax.numpy.asarray(array) for array in arrays]
            while True:
                self._numbers += 1
                built = self.current = Built(node=node, number=self._numbers)
                self.channel.begin(watch, marks, built.traced, False)
                try:
                    return jax.make_jaxpr(self._whole(built))(weights, given).jaxpr
                except Exception as error:
                    if not self.mend(error):
                        raise
                finally:
                    self.channel.end()

    def _exact(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.precision is None else jax.default_matmul_precision(self.precision)

    def interpreted(
        self,
        weights: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        watch: Collection[str],
        tap: Tap | None,
        interpret: Callable[[Any, list[Callable[..., Any]], list[Any]], list[Any]],
    ) -> Any:
        """The outputs as Values, of a run that `interpret` does: (the closed jaxpr of the model, functions on the host,
        the values of its arguments) -> the values of its outputs. A call of a jitted function named `MARK` and a number
        stands for a call of that function on the host, with its arguments but the first."""
        arrays, node = flax_values.spread((tuple(args), dict(kwargs)))
        with self._lock, self._exact():
            given = [jax.numpy.asarray(array) for array in arrays]
            while True:
                built = self.current = self._find(
                    weights, given, node, frozenset(watch) if tap else frozenset(), tap, None
                )
                self.channel.begin(watch if tap else (), tap, built.traced, False)
                try:
                    if built.marked is None:
                        built.marked = self._marked(built, weights, given)
                    outs = interpret(*built.marked, jax.tree.leaves((weights, given)))
                except GraftaxError:
                    raise
                except Exception as error:
                    if error is self.channel.failure:
                        raise
                    if not self.mend(error):
                        raise self.explain(error, (args, kwargs)) from error
                    if hasattr(tap, "restart"):
                        tap.restart()  # pyright: ignore
                    continue
                finally:
                    self.channel.end()
                return flax_values.plain(built.output, outs)

    def _marked(self, built: Built, weights: Any, given: list[Any]) -> tuple[Any, list[Callable[..., Any]]]:
        """(the closed jaxpr, the functions on the host that its marks stand for)."""
        hosts: list[Callable[..., Any]] = []

        def mark(host: Callable[..., Any], values: list[Any]) -> Any:
            def same(*values: Any) -> Any:
                return jax.lax.optimization_barrier(values)  # so that jax does not see that it changes nothing

            same.__name__ = f"{MARK}{len(hosts)}"
            hosts.append(host)
            return jax.jit(same)(jax.numpy.zeros(()), *values)[1:]

        self.channel.emit = mark
        try:
            return jax.make_jaxpr(self._whole(built))(weights, given), hosts
        finally:
            self.channel.emit = None

    def _attempt(
        self, weights: Any, given: list[Any], node: Any, watch: Any, tap: Any, jit: bool, blocked: bool
    ) -> Any:
        built = self.current = self._find(weights, given, node, frozenset(watch) if tap else frozenset(), tap, jit)
        channel = self.channel
        channel.begin(watch, tap, built.traced, blocked)
        try:
            if jit:
                function = built.function
                if function is None:
                    start = time.perf_counter()
                    try:
                        function = built.function = jax.jit(self._whole(built)).lower(weights, given).compile()
                    finally:
                        self.compile_seconds += time.perf_counter() - start
                outs, out = function(weights, given), built.output
            else:
                args, kwargs = flax_values.refill(node, given)
                outs, out = flax_values.spread(self.forward(weights, args, kwargs))
            made = [flax_values.to_host(array) for array in outs]
        finally:
            channel.end()
        return flax_values.plain(out, made)

    def _whole(self, built: Built) -> Callable[[Any, list[Any]], list[Any]]:
        """The forward as a function of the weights and the arrays of the arguments."""

        def program(weights: Any, arrays: list[Any]) -> list[Any]:
            args, kwargs = flax_values.refill(built.node, arrays)
            outs, built.output = flax_values.spread(self.forward(weights, args, kwargs))
            return outs

        return program

    def _find(
        self, weights: Any, given: list[Any], node: Any, watch: frozenset[str], tap: Any, jit: bool | None
    ) -> Built:
        """The program for such a call; jit: compiled, eager, or (None) interpreted. Its number becomes part of the
        cache keys of functions that the model jits itself, so that code traced for other watched modules, or without a
        tap, is not reused."""
        shapes = tuple((jax.numpy.shape(leaf), str(leaf.dtype)) for leaf in [*given, *jax.tree.leaves(weights)])
        replaces = tap is not None and getattr(tap, "replaces", True)
        key = (jit, watch, tap is None, replaces, shapes, flax_values.fingerprint(node))
        built = self._built.get(key)
        if built is None:
            self._numbers += 1
            built = self._built[key] = Built(node=node, number=self._numbers)
            while len(self._built) > _KEPT:
                self._built.popitem(last=False)
        self._built.move_to_end(key)
        return built


def _refuses_callbacks(error: Exception) -> bool:
    text = str(error).lower()
    return "callback" in text or "ordered effect" in text or "effects not supported" in text


# ---------------------------------------------------------------- whose code failed


def model_error(error: Exception, path: str, kind: str, given: Any) -> ModelError:
    """The ModelError for an exception of the user's model: the module that was running, the line, and the model's
    arguments."""
    line = _line(error.__traceback__)
    shapes = [f"{array.dtype}{list(array.shape)}" for array in flax_values.spread(given)[0]]
    called = f"The model was called with {', '.join(shapes[:6])}." if shapes else ""
    return ModelError(
        f"the Flax model failed in {escape(kind)} at {escape(path) or '(the model)'}: "
        f"{type(error).__name__}: {escape(str(error).strip(), 600)}",
        next=" ".join(part for part in (f"Raised at {escape(line, 300)}." if line else "", called) if part),
    )


def _line(trace: TracebackType | None) -> str:
    """file:line of the last frame in the user's code, not in jax, Flax, NumPy or graftax."""
    libraries = [Path(str(sys.modules[name].__file__)).parent for name in ("jax", "flax", "graftax", "numpy")]
    line = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        parents = Path(code.co_filename).parents
        if not any(library in parents for library in libraries):
            line = f"{code.co_filename}:{trace.tb_lineno} in {code.co_name}"
        trace = trace.tb_next
    return line
