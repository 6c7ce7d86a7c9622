"""A Flax NNX module that can be run with a tap: the NNX `Runner`."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from flax.core import tracers

from graftax.adapters import containers, jax_arrays, nnx_tree
from graftax.errors import ModelError, ReplayError, UsageError, escape
from graftax.parity import flax_program, flax_values, lazy_weights, nnx_cover
from graftax.parity.flax_program import Program
from graftax.parity.lazy_weights import LazyLeaves, Supply
from graftax.parity.linen_replay import sliced
from graftax.parity.listening import Owner
from graftax.parity.records import Site, Tap
from graftax.tree import Module

_numbers = itertools.count()


class NnxRunner:
    """`records.Runner` for Flax NNX.

    module    an nnx.Module. Every run uses a copy with the values that the module had when the runner was made; weights
              may be abstract if `run` gets `supply`
    method    the name of the method to call instead of `__call__`; `call`: function (module, *args, **kwargs) ->
              outputs
    modules   `Live.modules` of the model, if the caller has it already
    compiled  True: under jax.jit; False: eager; None: compiled unless the model cannot be traced
    precision of matrix products; None: the caller's own
    """

    def __init__(
        self,
        module: nnx.Module,
        *,
        method: str | None = None,
        call: Callable[..., Any] | None = None,
        modules: Mapping[str, Module] | None = None,
        compiled: bool | None = None,
        precision: str | None = flax_program.PRECISION,
    ) -> None:
        if not isinstance(module, nnx.Module):
            raise UsageError(f"NnxRunner takes a flax.nnx.Module, not {type(module).__name__}")
        self.module = module
        self.method = method
        self.call = call
        self._modules = modules
        graphdef, state = nnx.split(module)
        self._graphdef: Any = graphdef
        self._state: Any = jax.tree.map(_own, state)
        self._missing = lazy_weights.abstract_leaves(self._state)
        self._paths = [_path(keys) for keys, _ in nnx.iter_modules(module)]
        self._name = next(_numbers)
        self._example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._look: dict[str, tuple[bool, dict[Any, tuple[int, ...]]]] | None = None
        self._base: Any = None
        self._survey: dict[str, tuple[bool, dict[Any, tuple[int, ...]]]] | None = None
        self._blame = ("", type(module).__name__)
        self._failed: BaseException | None = None
        self._lazy = LazyLeaves(None)
        self._filling: set[str] = set()
        self._program = Program(self._forward, self._explain, compiled=compiled, precision=precision)

    # ------------------------------------------------------------ the protocol

    @property
    def modules(self) -> Mapping[str, Module]:
        if self._modules is None:
            self._modules = nnx_tree.open_nnx(self.module, "the Flax model").live.modules
        return self._modules

    @property
    def compile_seconds(self) -> float:
        """Seconds spent on compiling in all runs so far."""
        return self._program.compile_seconds

    @property
    def methods(self) -> Mapping[Site, str]:
        """Site -> the method ('attend', 'decode'), for the calls of the last run that did not go through `__call__`."""
        return dict(self._program.channel.methods)

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        watch: Collection[str] = (),
        tap: Tap | None = None,
        supply: Supply | None = None,
        compiled: bool | None = None,
    ) -> Any:
        """See `records.Runner`. `supply`: gives the values of abstract leaves when their module is called; they are
        released when the call ends (`lazy_weights.Supply`). Such a run is eager. `compiled` overrides the runner's
        own."""
        self._example = (tuple(args), dict(kwargs))
        state, lazy = self._weights(supply)
        self._lazy, self._filling = lazy, set()
        try:
            return self._program.run(state, args, kwargs, watch, tap, False if lazy.owned else compiled)
        finally:
            self._lazy = LazyLeaves(None)

    def program(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Program, Any]:
        """(the program, the weights that it takes), for runs of another kind: with a listener, with marks, interpreted.
        args, kwargs: the call that it is wanted for."""
        self._example = (tuple(args), dict(kwargs))
        return self._program, self._weights(None)[0]

    def with_weights(self, module: nnx.Module) -> NnxRunner:
        """A runner of the same model with the state of `module`, a module of the same structure; the two share compiled
        programs."""
        other = copy.copy(self)
        other.module = module
        other._state = jax.tree.map(_own, nnx.split(module)[1])
        return other

    def not_traced(self) -> Mapping[str, str]:
        return self._program.channel.not_traced()

    def replay(
        self,
        path: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        settings: Mapping[str, Any] | None = None,
        leaves: Mapping[str, Any] | None = None,
        call: int = 0,
        method: str | None = None,
    ) -> Any:
        """See `records.Runner`. `call`: the slice of stacked leaves, if a scan runs the module; `method`: another
        method than `__call__`."""
        if path not in self._paths:
            raise ReplayError(f"the Flax model has no module {escape(path)!r}")
        state = self._state_of(path, dict(leaves or {}), call)
        with jax.default_matmul_precision(flax_program.PRECISION):
            whole = nnx.merge(self._graphdef, state, copy=True)
            module: Any = next(item for keys, item in nnx.iter_modules(whole) if _path(keys) == path)
            for name, value in (settings or {}).items():
                if not hasattr(module, name):
                    known = ", ".join(sorted(self.modules[path].settings)) if path in self.modules else ""
                    raise ReplayError(
                        f"{type(module).__name__} at {escape(path)} has no setting {escape(name)}",
                        next=f"It has {known}." if known else "",
                    )
                setattr(module, name, value)
            function = getattr(module, method or "__call__", None)
            if function is None:
                raise ReplayError(f"{type(module).__name__} at {escape(path)} has no method {escape(method)}")
            try:
                out = function(*flax_values.to_device(tuple(args)), **flax_values.to_device(dict(kwargs)))
            except Exception as error:
                raise ReplayError(f"{escape(path)} cannot be run alone: {escape(str(error).strip(), 400)}") from error
            return flax_values.values_of(out)

    def _state_of(self, path: str, leaves: dict[str, Any], call: int) -> Any:
        """The state with other leaves in one module, and its stacked leaves sliced."""
        depth = len(path.split("/")) if path else 0
        inner = self.survey().get(path, (False, {}))[1] if self._example is not None else {}
        used: set[str] = set()
        now: dict[Any, Any] = {}
        for keys, leaf in containers.leaves(self._state):
            full = containers.path_of(keys)
            if path and not full.startswith(f"{path}/"):
                continue
            used.add(full)
            value = leaves.get(full, leaf)
            if jax_arrays.is_abstract(value):
                raise ReplayError(f"{escape(full)} has a shape and a dtype, but no values: pass it in `leaves`")
            value = sliced(value, inner.get(keys[depth:]), call, full)
            if value is not leaf:
                now[keys] = jax.numpy.asarray(value)
        outside = sorted(leaves.keys() - used)
        if outside:
            raise ReplayError(f"{escape(outside[0])} is no leaf of {escape(path) or 'the model'}")
        return lazy_weights.filled(self._state, now)

    # ------------------------------------------------------------ running

    def _forward(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._failed = None
        self._blame = ("", type(self.module).__name__)
        return self._seen(state, args, kwargs, f"{self._name}.{self._program.current.number}")

    def _seen(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: str) -> Any:
        module: Any = nnx.merge(self._graphdef, state, copy=True)
        for keys, item in nnx.iter_modules(module):
            setattr(item, nnx_cover.TAG, f"{run}:{_path(keys)}")
        with nnx_cover.covering(module, self._see):
            if self.call is not None:
                return self.call(module, *args, **kwargs)
            return getattr(module, self.method or "__call__")(*args, **kwargs)

    def _see(
        self,
        module: Any,
        tag: str,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        proceed: Callable[..., Any],
    ) -> Any:
        path = tag.partition(":")[2]
        if not tag.startswith(f"{self._name}."):
            return proceed(*args, **kwargs)
        if self._look is not None:
            self._note(path, module)
            return proceed(*args, **kwargs)
        try:
            with self._supplied(module, path):
                if method == "__call__" or flax_values.spread((args, kwargs))[0]:
                    out = self._program.channel.call(
                        path, method, args, kwargs, proceed, lambda: Owner(*nnx_cover.taken(module))
                    )
                else:
                    out = proceed(*args, **kwargs)
                return flax_values.waited(out) if path in self._lazy.owned else out
        except Exception as error:
            if error is not self._failed:
                self._failed, self._blame = error, (path, type(module).__name__)
            raise

    def _explain(self, error: Exception, given: Any) -> ModelError:
        path, kind = self._blame if error is self._failed else ("", type(self.module).__name__)
        return flax_program.model_error(error, path, kind, given)

    # ------------------------------------------------------------ weights

    def _weights(self, supply: Supply | None) -> tuple[Any, LazyLeaves]:
        """(the state as jax arrays, the leaves without values)."""
        if not self._missing:
            return self._state, LazyLeaves(None)
        owned = lazy_weights.by_owner(self._missing, self._paths, collection=False)
        survey = self.survey()
        lazy = LazyLeaves(supply, self.modules, owned)
        now: dict[Any, Any] = {}
        for path in [path for path in owned if path in survey and survey[path][0]]:
            now |= lazy.values(path)  # leaves that a transformation takes as input need values first
            del owned[path]
        return lazy_weights.filled(self._state, now), lazy

    @contextlib.contextmanager
    def _supplied(self, module: Any, path: str) -> Iterator[None]:
        """Fill the module's own abstract leaves for a call of one of its methods."""
        if path not in self._lazy.owned or path in self._filling:
            yield
            return
        depth = len(path.split("/")) if path else 0
        own = {tuple(keys): item for keys, item in nnx.iter_graph(module) if isinstance(item, nnx.Variable)}
        replaced: list[tuple[Any, Any]] = []
        self._filling.add(path)
        try:
            for keys, array in self._lazy.values(path).items():
                variable = own.get(tuple(keys[depth:]))
                if variable is None:
                    raise ModelError(
                        f"Flax: {escape(containers.path_of(keys))} is not an nnx.Variable, so it cannot be supplied",
                        next="Pass weights that hold it.",
                    )
                replaced.append((variable, containers.variable_value(variable)))
                containers.set_variable(variable, array)
            yield
        finally:
            self._filling.discard(path)
            for variable, before in replaced:
                containers.set_variable(variable, before)

    # ------------------------------------------------------------ survey

    def survey(self) -> Mapping[str, tuple[bool, dict[Any, tuple[int, ...]]]]:
        """module path -> (does jax trace its call separately?, the shapes of its leaves inside that call), from an
        abstract run on the inputs of the last run."""
        if self._survey is not None:
            return self._survey
        if self._example is None:
            raise UsageError("the calls of an NNX module are known only after a run")
        arrays, node = flax_values.spread(self._example)

        def top(state: Any, given: list[Any]) -> int:
            self._base = tracers.current_trace()
            args, kwargs = flax_values.refill(node, given)
            self._seen(state, args, kwargs, f"{self._name}.survey")
            return 0

        self._look = {}
        try:
            jax.eval_shape(top, self._state, arrays)
            self._survey = self._look
        except Exception as error:
            name = escape(type(self.module).__name__)
            raise ReplayError(f"{name} cannot be traced: {type(error).__name__}: {escape(error, 400)}") from error
        finally:
            self._look = None
        return self._survey

    def _note(self, path: str, module: Any) -> None:
        assert self._look is not None
        inner = {keys: tuple(leaf.shape) for keys, leaf in containers.leaves(nnx.state(module))}
        before = self._look.get(path, (False, {}))[0]
        self._look[path] = (before or tracers.current_trace() != self._base, inner)


def _own(leaf: Any) -> Any:
    """A leaf of the state as a jax array; an abstract leaf and a random key unchanged."""
    if jax_arrays.is_abstract(leaf) or containers.is_random_key(leaf):
        return leaf
    return jax.numpy.asarray(leaf)


def _path(keys: Any) -> str:
    return containers.path_of(tuple(keys))
