"""A Flax Linen module that can be run with a tap: the Linen `Runner`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax import errors as flax_errors
from flax import linen as nn
from flax.core import FrozenDict, tracers

from graftax.adapters import containers, linen_tree
from graftax.adapters.linen_tree import LinenModel
from graftax.errors import ModelError, ReplayError, UsageError, escape
from graftax.parity import flax_program, flax_values, lazy_weights, linen_replay
from graftax.parity.flax_program import Program
from graftax.parity.lazy_weights import LazyLeaves, Supply
from graftax.parity.linen_lazy_weights import ScopeFiller
from graftax.parity.linen_replay import Surveyed
from graftax.parity.listening import Owner
from graftax.parity.records import Site, Tap
from graftax.tree import Module, join_path

NOT_CALLS = frozenset({"setup", "initialize_carry"})
"""Methods that compute nothing of a model's forward."""


class LinenRunner:
    """`records.Runner` for Flax Linen.

    model      gx.linen(...), or a Linen module (a bound one too: its variables are then the default)
    variables  collections of arrays; jax.ShapeDtypeStruct leaves if `run` gets `supply`
    method     the method to call instead of `__call__`; `call`: function (bound module, *args, **kwargs) -> outputs
    rngs       {name: key or seed} for modules that draw random numbers
    modules    `Live.modules` of the model, if the caller has it already
    compiled   True: under jax.jit; False: eager; None: compiled unless the model cannot be traced
    precision  of matrix products; None: the caller's own
    """

    def __init__(
        self,
        model: LinenModel | nn.Module,
        variables: Any = None,
        *,
        method: Any = None,
        rngs: Any = None,
        call: Callable[..., Any] | None = None,
        modules: Mapping[str, Module] | None = None,
        compiled: bool | None = None,
        precision: str | None = flax_program.PRECISION,
    ) -> None:
        self._wrapper = model if isinstance(model, LinenModel) else None
        module: Any = model.module if isinstance(model, LinenModel) else model
        if not isinstance(module, nn.Module):
            raise UsageError(f"LinenRunner takes gx.linen(...) or a flax.linen Module, not {type(module).__name__}")
        if variables is None and module.scope is not None:
            variables = module.variables
        self.module: nn.Module = module
        self.variables: Any = {} if variables is None else variables
        self.method = method if method is not None or self._wrapper is None else self._wrapper.method
        self.rngs = {name: _key(value) for name, value in rngs.items()} if isinstance(rngs, Mapping) else _key(rngs)
        self.call = call
        self._modules = modules
        self._example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._survey: dict[str, Surveyed] | None = None
        self._placed: Any = None
        self._mutable: Any = False
        self._blame: tuple[str, str] = ("", type(module).__name__)
        self._failed: BaseException | None = None
        self._filler = ScopeFiller(LazyLeaves(None))
        self._program = Program(self._forward, self._explain, self._mend, compiled, precision)

    # ------------------------------------------------------------ the protocol

    @property
    def modules(self) -> Mapping[str, Module]:
        if self._modules is None:
            wrapper = self._wrapper
            if wrapper is None:
                args, kwargs = self._given()
                wrapper = LinenModel(self.module, args, kwargs, self.rngs, self.method)
            self._modules = linen_tree.open_linen(wrapper, "the Flax model").live.modules
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
        weights, lazy = self._weights(supply)
        self._filler = ScopeFiller(lazy)
        try:
            return self._program.run((weights, self.rngs), args, kwargs, watch, tap, False if lazy.owned else compiled)
        finally:
            self._filler = ScopeFiller(LazyLeaves(None))

    def program(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Program, Any]:
        """(the program, the weights that it takes), for runs of another kind: with a listener, with marks, interpreted.
        args, kwargs: the call that it is wanted for."""
        self._example = (tuple(args), dict(kwargs))
        return self._program, (self._weights(None)[0], self.rngs)

    def with_weights(self, variables: Any) -> LinenRunner:
        """A runner of the same model with other variables of the same structure; the two share compiled programs."""
        other = copy.copy(self)
        other.variables, other._placed = variables, None
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
        seen = self.survey().get(path)
        if seen is None:
            raise ReplayError(f"the Flax model calls no module {escape(path)!r}")
        module, variables = linen_replay.alone(seen, self.variables, dict(settings or {}), dict(leaves or {}), call)
        function = getattr(type(module), method or "__call__", None)
        if function is None:
            raise ReplayError(f"{type(module).__name__} at {escape(path)} has no method {escape(method)}")
        given, named = flax_values.to_device(tuple(args)), flax_values.to_device(dict(kwargs))
        with jax.default_matmul_precision(flax_program.PRECISION):
            try:
                out = self._applied(lambda bound: function(bound, *given, **named), module, variables, self.rngs)
            except Exception as error:
                if self._mend(error):
                    return self.replay(path, args, kwargs, settings=settings, leaves=leaves, call=call, method=method)
                raise ReplayError(f"{escape(path)} cannot be run alone: {escape(str(error).strip(), 400)}") from error
            return flax_values.values_of(out)

    # ------------------------------------------------------------ running

    def _forward(self, weights: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        variables, rngs = weights
        self._failed = None
        self._blame = ("", type(self.module).__name__)
        number = self._program.current.number

        def body(bound: nn.Module) -> Any:
            return self._called(self._marked(bound, number), args, kwargs)

        with nn.intercept_methods(self._intercept):
            return self._applied(body, self.module, variables, rngs)

    def _marked(self, bound: nn.Module, number: int) -> nn.Module:
        """The module with a mark in its scope's flags. nn.jit finds earlier traces by a fingerprint that includes the
        flags: the mark keeps it from reusing a trace made without a tap or for other watched modules."""
        scope: Any = bound.scope
        scope.flags = FrozenDict({**scope.flags, "graftax": (id(self), number)})
        return bound

    def _called(self, bound: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (self.call or method_call(self.method))(bound, *args, **kwargs)

    def _applied(self, body: Callable[[nn.Module], Any], module: nn.Module, variables: Any, rngs: Any) -> Any:
        """body(module bound to the variables). Its writes to collections are discarded."""
        options: dict[str, Any] = {} if not rngs else {"rngs": rngs}
        if self._mutable is False:
            return nn.apply(body, module)(variables, **options)
        return nn.apply(body, module, mutable=self._mutable)(variables, **options)[0]

    def _mend(self, error: Exception) -> bool:
        """Is another try worthwhile after this error? At first nothing is mutable, as in an ordinary apply. Once a
        module has tried to update statistics or a cache, it may do so from then on."""
        if self._mutable is False and isinstance(error, flax_errors.ModifyScopeVariableError):
            self._mutable = nn.DenyList(("params", "intermediates", "perturbations"))
            return True
        return False

    def _intercept(self, proceed: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module, method = context.module, context.method_name
        if module.scope is None:
            return proceed(*args, **kwargs)
        path = join_path(module.path)
        kind = type(module)
        try:
            with self._filler.fill(module, path, method):
                if hasattr(kind, method) and _is_call(method, args, kwargs):  # lifted functions are no methods
                    out = self._program.channel.call(
                        path, method, args, kwargs, proceed, lambda: Owner(module, linen_replay.variables_of(module))
                    )
                else:
                    out = proceed(*args, **kwargs)
                return flax_values.waited(out) if path in self._filler.lazy.owned else out
        except Exception as error:
            if error is not self._failed:
                self._failed, self._blame = error, (path, kind.__name__)
            raise

    def _explain(self, error: Exception, given: Any) -> ModelError:
        path, kind = self._blame if error is self._failed else ("", type(self.module).__name__)
        return flax_program.model_error(error, path, kind, given)

    # ------------------------------------------------------------ weights

    def _weights(self, supply: Supply | None) -> tuple[Any, LazyLeaves]:
        """(variables as jax arrays, the leaves without values)."""
        missing = lazy_weights.abstract_leaves(self.variables)
        if not missing:
            if self._placed is None:
                self._placed = jax.tree.map(jax.numpy.asarray, self.variables)
            return self._placed, LazyLeaves(None)
        survey = self.survey()
        owned = lazy_weights.by_owner(missing, survey, collection=True)
        lazy = LazyLeaves(supply, self.modules if self._wrapper or self._modules else {}, owned)
        now: dict[Any, Any] = {}
        for path in [path for path in owned if path in survey and survey[path].nested]:
            now |= lazy.values(path)  # leaves that a lifted transformation takes as input need values first
            del owned[path]
        return lazy_weights.filled(self.variables, now), lazy

    # ------------------------------------------------------------ survey

    def _given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._example is not None:
            return self._example
        if self._wrapper is not None:
            return self._wrapper.args, dict(self._wrapper.kwargs)
        raise UsageError(
            "the modules of a plain Linen module are known only after a run", next="Wrap it: gx.linen(module, *example)"
        )

    def survey(self) -> Mapping[str, Surveyed]:
        """module path -> the module as an abstract run on the last inputs (or the example) saw it."""
        if self._survey is not None:
            return self._survey
        seen: dict[str, Surveyed] = {}
        base: list[Any] = []
        arrays, node = flax_values.spread(self._given())

        def look(proceed: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if module.scope is not None and hasattr(type(module), context.method_name):
                path = join_path(module.path)
                if path not in seen or context.method_name != "setup":
                    inner = {keys: tuple(leaf.shape) for keys, leaf in containers.leaves(module.variables)}
                    first = seen.get(path)
                    nested = tracers.current_trace() != base[0] or (first is not None and first.nested)
                    seen[path] = Surveyed(module if first is None else first.module, nested, inner)
            return proceed(*args, **kwargs)

        def top(weights: Any, given: list[Any]) -> int:
            base.append(tracers.current_trace())
            args, kwargs = flax_values.refill(node, given)
            with nn.intercept_methods(look):
                self._applied(lambda bound: self._called(self._marked(bound, -1), args, kwargs), self.module, *weights)
            return 0

        try:
            jax.eval_shape(top, (self.variables, self.rngs), arrays)
        except Exception as error:
            if self._mend(error):
                return self.survey()
            raise ReplayError(
                f"{escape(type(self.module).__name__)} cannot be traced: {type(error).__name__}: {escape(error, 400)}"
            ) from error
        self._survey = seen
        return seen


def method_call(method: Any) -> Callable[..., Any]:
    """A function (bound module, *args, **kwargs) -> outputs that calls this method (None: `__call__`)."""
    if method is None or isinstance(method, str):
        return lambda bound, *args, **kwargs: getattr(bound, method or "__call__")(*args, **kwargs)
    return getattr(method, "__func__", method)


def _is_call(method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Does calling this method from outside count as a call of the module? Methods other than `__call__` must be public
    and get an array."""
    if method == "__call__":
        return True
    if method.startswith("_") or method in NOT_CALLS:
        return False
    return bool(flax_values.spread((args, kwargs))[0])


def _key(value: Any) -> Any:
    """A seed as a key."""
    return jax.random.key(value) if isinstance(value, int) else value
