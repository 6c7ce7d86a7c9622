"""The Flax side of a probe: a Linen model with example inputs, or an NNX module, as a program of its own forward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from graftax.adapters import containers, jax_arrays, linen_tree, nests
from graftax.adapters.linen_tree import LinenModel
from graftax.errors import GraftaxError, ModelError, escape
from graftax.probe.evaluate import widened
from graftax.probe.hashes import steps_hash
from graftax.probe.program import Program, trace

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


class Forward(Protocol):
    """A model that can be followed step by step while its leaves are unknown; see FlaxForward."""

    @property
    def paths(self) -> tuple[str, ...]: ...

    @property
    def fixed(self) -> Mapping[str, Any]: ...

    @property
    def others(self) -> Mapping[str, str]: ...

    def program(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program: ...

    def code(self, program: Program) -> tuple[str, str]: ...


@dataclass(frozen=True, slots=True)
class FlaxForward:
    """A Flax model that can be traced.

    paths, specs  its floating weights, and an array or ShapeDtypeStruct of each
    fixed         its other leaves (counters, keys), with their values
    run           (path -> array, args, kwargs) -> outputs
    positive      weights that are statistics: variances among them must not be negative
    kind          the class name of the model
    others        another path of a leaf -> the path that is looked for: none, since Flax lists a leaf once
    """

    paths: tuple[str, ...]
    specs: tuple[Any, ...]
    fixed: Mapping[str, Any]
    run: Callable[[Mapping[str, Any], tuple[Any, ...], Mapping[str, Any]], Any]
    kind: str
    positive: frozenset[str] = frozenset()
    others: Mapping[str, str] = field(default_factory=dict[str, str])

    def code(self, program: Program) -> tuple[str, str]:
        """(which side, sha256 of its code)."""
        return "flax", steps_hash(program)

    def program(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
        """The steps of one call. ModelError if the model cannot be traced."""
        import jax

        flat, structure = jax.tree.flatten((tuple(args), dict(kwargs)))
        places = [n for n, leaf in enumerate(flat) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

        def call(leaves: list[Any], arrays: list[Any]) -> list[Any]:
            full = list(flat)
            for n, array in zip(places, arrays, strict=True):
                full[n] = array
            given, named = structure.unflatten(full)
            weights = dict(zip((*self.paths, *self.fixed), leaves, strict=True))
            return [leaf for leaf in jax.tree.leaves(self.run(weights, given, named)) if hasattr(leaf, "shape")]

        try:
            specs = [*(jax.ShapeDtypeStruct(s.shape, s.dtype) for s in self.specs), *self.fixed.values()]
            return trace(call, specs, [flat[n] for n in places], [*self.paths, *self.fixed])
        except GraftaxError:
            raise
        except Exception as error:
            raise ModelError(
                f"the Flax model {escape(self.kind)} cannot be traced on these inputs: {type(error).__name__}: "
                f"{escape(str(error).strip(), 500)}"
            ) from error


def input_arrays(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arrays among the arguments, in the order of a program's inputs."""
    import jax

    return [leaf for leaf in jax.tree.leaves((tuple(args), dict(kwargs))) if hasattr(leaf, "shape")]


def flax_forward(model: Any, call: Callable[..., Any] | None = None) -> FlaxForward:
    """The forward of gx.linen(...) or an nnx.Module. `call`: (module, *args, **kwargs) -> outputs."""
    return _linen(model, call) if isinstance(model, LinenModel) else _nnx(model, call)


def _linen(model: LinenModel, call: Callable[..., Any] | None) -> FlaxForward:
    variables, _ = linen_tree.trace(model)
    found = [(containers.path_of(keys), leaf) for keys, leaf in containers.leaves(variables)]
    floating = [(path, leaf) for path, leaf in found if _floating(leaf)]
    fixed = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in found if not _floating(leaf)}

    def run(weights: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        tree = containers.remade(variables, lambda path, leaf: weights[path])
        if call is not None:
            return call(model.module.bind(tree), *args, **kwargs)
        options = {} if model.method is None else {"method": model.method}
        return model.module.apply(tree, *args, mutable=False, **options, **kwargs)

    paths = tuple(path for path, _ in floating)
    statistics = frozenset(path for path in paths if not path.startswith("params/"))
    return FlaxForward(paths, tuple(leaf for _, leaf in floating), fixed, run, type(model.module).__name__, statistics)


def _nnx(module: Any, call: Callable[..., Any] | None) -> FlaxForward:
    from flax import nnx

    graph, state = nnx.split(module)
    flat: list[tuple[Any, Any]] = [(tuple(keys), variable) for keys, variable in nnx.to_flat_state(state)]
    weights = {containers.path_of(keys): leaf for keys, leaf in containers.leaves(state)}
    floating: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    for keys, variable in flat:
        path, value = containers.path_of(keys), variable.get_value()
        if path in weights and _floating(value):
            floating[path] = value
        elif jax_arrays.is_abstract(value):
            fixed[path] = _made_up(value)
        else:
            fixed[path] = value

    def run(given: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        made = [(keys, variable.replace(given[containers.path_of(keys)])) for keys, variable in flat]
        model = nnx.merge(graph, nnx.from_flat_state(made))
        model.eval()
        return call(model, *args, **kwargs) if call is not None else model(*args, **kwargs)

    statistics = frozenset(
        path for keys, variable in flat if (path := containers.path_of(keys)) in floating and not _is_param(variable)
    )
    return FlaxForward(tuple(floating), tuple(floating.values()), fixed, run, type(module).__name__, statistics)


def _is_param(variable: Any) -> bool:
    from flax import nnx

    return isinstance(variable, nnx.Param)


def _made_up(value: Any) -> Any:
    """A value for a leaf that is no weight and has only a shape: a random key, or zeros."""
    import jax

    if jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return np.zeros(value.shape, value.dtype)


def _floating(leaf: Any) -> bool:
    import jax

    return jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)


def fixed_values(program: Program, forward: Forward, inputs: Sequence[Any]) -> dict[int, Any]:
    """value -> array of a program's inputs and of the leaves that are no unknowns."""
    out = {program.leaves[path]: widened(value) for path, value in forward.fixed.items()}
    out.update({n: widened(array) for n, array in zip(program.inputs, inputs, strict=True)})
    return out


def as_arrays(call: Call) -> Call:
    """A call with its arrays as NumPy."""
    return nests.mapped(call, nests.is_array, np.asarray)


def is_flax(obj: Any) -> bool:
    """True for gx.linen(...) and an nnx.Module."""
    nnx = sys.modules.get("flax.nnx")
    return isinstance(obj, LinenModel) or (nnx is not None and isinstance(obj, nnx.Module))
