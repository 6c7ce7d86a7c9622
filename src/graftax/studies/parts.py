"""`part`: one module of a Flax model alone, with the weights and the inputs that it has inside the model's run."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import errors as flax_errors
from flax import linen as nn
from flax import nnx
from jax.core import Tracer

from graftax.adapters import containers, jax_arrays, kind_of, nests
from graftax.adapters.linen_tree import LinenModel
from graftax.errors import GraftaxError, PlanError, ReplayError, UsageError, counted, escape, option
from graftax.execute.opening import open_tree
from graftax.parity import flax_values, linen_replay, nnx_cover
from graftax.parity.linen_runner import LinenRunner
from graftax.parity.metrics import relative_l2
from graftax.parity.nnx_runner import NnxRunner
from graftax.parity.prepare import class_name, weights_of
from graftax.probe.inputs import Call, Inputs
from graftax.studies.calls import Selected, select_call
from graftax.studies.example_inputs import runnable
from graftax.tree import Checkpoint, nearest
from graftax.tree.dtypes import same_bits

VMAPPED = 64
"""Inside vmap the members are computed together, and a product may be summed in another order than alone. The outputs
may then differ by this many units of their precision (relative L2)."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One module of a Flax model, as a model of its own.

    like     what gx.linen gives, or an nnx.Module: the module with the arguments of its call as the example
    weights  its weights in that call. Linen: variables. NNX: the module, or a State if the model's weights were a State
    inputs   the arguments of its call, as `inputs=` takes them: (args, kwargs); a gx.Inputs if another method than an
             nnx.Module's `__call__` was called
    output   what it returned inside the model
    """

    like: Any
    weights: Any
    inputs: Any
    output: Any

    def __repr__(self) -> str:
        given = self.inputs.both if isinstance(self.inputs, Inputs) else self.inputs
        return f"Part({class_name(self.like)}: {_shapes(given)} -> {_shapes(self.output)})"


def part(like: Any, weights: Any, path: str, *, inputs: Any = None, call: int = 0, index: Any = None) -> Part:
    """One module of a Flax model alone, with the weights and inputs that it has when the model runs.

    like     gx.linen(module, *example), or an nnx.Module
    weights  as for gx.check_parity; None: the values that an nnx.Module holds
    path     the module, as weights name it: "layer_3/attention", also "params/layer_3/attention"
    inputs   the model's inputs, as for gx.check_parity; None: the example of gx.linen
    call     which of its calls, from 0, if the module is called several times
    index    the iteration of the scan (or the member of the vmap) that the module stands in, from 0; a tuple, outermost
             first and vmaps last, if there are several

    The model runs eagerly, with the precision of the caller; a scan around the module runs step by step. The module is
    then run alone, and its output must be what it returned inside, bit for bit (inside vmap: but for rounding).

    Raises PlanError for a path that is no module of the model or that the inputs do not reach, UsageError for a wrong
    `call` or `index`, ReplayError for a module that does not give the same output alone, ModelError if the model fails.
    """
    model = _model(like, weights, inputs)
    where = _module_path(path, model)
    try:
        found = select_call(model.runner, where, *model.call, call=_number("call", call), index=_index(index))
        made = _nnx_part(found, weights) if model.rngs is _NNX else _linen_part(found, model.rngs)
        _require_same(made, found)
    except ReplayError as error:
        raise ReplayError(f"{escape(where) or 'the model'} cannot be taken out of the model: {error}") from error
    return made


# ---------------------------------------------------------------- the model


_NNX = object()


@dataclass(frozen=True, slots=True, eq=False)
class _Model:
    """The model ready to run. rngs: those of gx.linen, or _NNX. held: the paths of all leaves of the weights."""

    runner: Any
    tree: Checkpoint
    call: Call
    rngs: Any
    held: tuple[str, ...]


def _model(like: Any, weights: Any, inputs: Any) -> _Model:
    run = runnable(like, inputs, constant=True)
    like, call, own = run.model, run.call, run.own
    tree = open_tree(like)
    if isinstance(like, LinenModel):
        variables = _variables(like, tree, weights)
        rngs = like.rngs if isinstance(like.rngs, Mapping) else None
        runner = LinenRunner(like, variables, rngs=rngs, call=own, modules=tree.live.modules, precision=None)
        held = tuple(containers.path_of(keys) for keys, _ in containers.leaves(variables))
        return _Model(runner, tree, call, like.rngs, held)
    module = like
    if weights is not None and weights is not like:
        assert tree.live.rebuild is not None
        module = tree.live.rebuild(dict(weights_of(like, tree, weights, None, tree)[0]))
    elif not tree.has_values:
        raise UsageError("the Flax model has no values", next=f"Pass {option('weights')}.")
    return _Model(NnxRunner(module, call=own, precision=None), tree, call, _NNX, tuple(tree))


def _variables(like: LinenModel, tree: Checkpoint, weights: Any) -> Any:
    """The variables of the model: the given ones themselves if they fit, else made from them."""
    if isinstance(weights, Mapping) and weights and kind_of(weights) == "container":
        for variables in (weights, {"params": weights}):
            found = {containers.path_of(keys): leaf for keys, leaf in containers.leaves(variables)}
            fits = (path in found and tuple(found[path].shape) == spec.shape for path, spec in tree.items())
            if all(fits) and not any(map(jax_arrays.is_abstract, found.values())):
                return variables
    assert tree.live.rebuild is not None
    return tree.live.rebuild(dict(weights_of(like, tree, weights, None, tree)[0]))


# ---------------------------------------------------------------- arguments


def _module_path(path: Any, model: _Model) -> str:
    """The path of a module without its collection. PlanError if it is none."""
    if not isinstance(path, str):
        raise UsageError(f"path is text, not {type(path).__name__}", next='For example "layer_3/attention".')
    modules = model.tree.live.modules
    name = path.strip("/")
    linen = model.rngs is not _NNX
    head, _, rest = name.partition("/")
    inside = rest if linen and head in {full.partition("/")[0] for full in model.held} | {"params"} else name
    for candidate in (name, inside):
        if candidate in modules:
            return candidate
        shared = None if linen else _listed(model.runner.module, candidate)
        if shared is not None:
            return shared
    leaves = {full.partition("/")[2] if linen else full: full for full in model.held}
    if name in leaves.values() or inside in leaves:
        raise PlanError(
            f"{escape(path)} is a leaf, not a module",
            next=f"Take the module that holds it: {escape(repr(inside.rpartition('/')[0]))}.",
        )
    near = nearest(inside, [other for other in modules if other], 5)
    hint = f"Nearest: {near}." if near else f"Modules: {', '.join(escape(m) for m in list(modules)[:8] if m)}."
    if any(full.startswith(f"{inside}/") for full in leaves):
        raise PlanError(f"{escape(path)} holds weights, but the inputs never reach a module of that path", next=hint)
    raise PlanError(f"the model has no module {escape(path)}", next=hint)


def _listed(module: Any, path: str) -> str | None:
    """The path under which a shared NNX module is listed, for any of its paths."""
    node: Any = module
    for key in path.split("/"):
        if isinstance(node, (list, tuple, nnx.List)) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            node = node.get(key) if isinstance(node, Mapping) else getattr(node, key, None)
    if not isinstance(node, nnx.Module):
        return None
    found: Any = (keys for keys, item in nnx.iter_modules(module) if item is node)
    return next((containers.path_of(tuple(keys)) for keys in found), None)


def _number(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise UsageError(f"{name} is a whole number, not {type(value).__name__}") from None
    if isinstance(value, bool) or number < 0:
        raise UsageError(f"{name}={value!r}: it counts from 0")
    return number


def _index(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(_number("index", item) for item in (value if isinstance(value, (tuple, list)) else (value,)))


# ---------------------------------------------------------------- the part


def _linen_part(found: Selected, rngs: Any) -> Part:
    args, kwargs, variables = found.taken()
    module = linen_replay.unbound(found.owner)
    method = None if found.method == "__call__" else found.method
    like = LinenModel(module, args, kwargs, rngs, method)
    return Part(like, _needed(variables, like), (args, kwargs), found.returned())


def _needed(variables: Mapping[str, Any], like: LinenModel) -> Any:
    """The variables without leaves that this call does not make: those of other methods."""
    try:
        made = open_tree(like)
    except GraftaxError:  # its init needs more than its call: it can be run, not ported
        return variables
    return {
        name: tree if name in containers.LINEN_STATE else _kept(tree, name, made) for name, tree in variables.items()
    }


def _kept(tree: Any, path: str, made: Checkpoint) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    below = {key: _kept(child, f"{path}/{containers.path_of((key,))}", made) for key, child in tree.items()}
    return {
        key: child
        for key, child in below.items()
        if (child if isinstance(child, Mapping) else f"{path}/{containers.path_of((key,))}" in made)
    }


def _nnx_part(found: Selected, weights: Any) -> Part:
    args, kwargs, leaves = found.taken()
    module = nnx_cover.alone(found.owner, leaves)
    own = nnx.state(module) if isinstance(weights, nnx.State) else module
    given: Any = (args, kwargs)
    if found.method != "__call__":
        given = Inputs(given, flax_call=_calling(found.method))
    return Part(module, own, given, found.returned())


def _calling(method: str) -> Callable[..., Any]:
    return lambda module, *args, **kwargs: getattr(module, method)(*args, **kwargs)


def _require_same(made: Part, found: Selected) -> None:
    """ReplayError unless the module alone gives the output that it gave inside."""
    args, kwargs, _ = found.taken()
    handed = [item for _, item in nests.leaves((args, kwargs), lambda item: isinstance(item, (nn.Module, nnx.Module)))]
    if handed:
        raise ReplayError(
            f"its call takes a module ({type(handed[0]).__name__}) as an argument",
            next="Take the module that calls it.",
        )
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs, made.weights))):
        raise ReplayError("it gets values that a jax transformation does not hand out")
    runner: Any
    if isinstance(made.like, LinenModel):
        runner = LinenRunner(made.like, made.weights, precision=None)
    else:
        runner = NnxRunner(made.like, method=found.method, precision=None)
    try:
        alone = runner.run(args, kwargs, compiled=False)
    except GraftaxError as error:
        drawn = isinstance(error.__cause__, flax_errors.InvalidRngError)
        if drawn or any(isinstance(item, nnx.Rngs) for item in (*args, *kwargs.values())):
            where = "which depend on its place in the model" if drawn else "from an nnx.Rngs that it is called with"
            raise ReplayError(f"it draws random numbers, {where}", next="Run the model deterministically.") from error
        raise ReplayError(f"alone it fails: {error}") from error
    inside = nests.arrays(flax_values.values_of(made.output))
    outside = nests.arrays(alone)
    if [path for path, _ in inside] == [path for path, _ in outside] and all(
        _same(a, b, bool(found.members)) for (_, a), (_, b) in zip(inside, outside, strict=True)
    ):
        return
    apart = max((relative_l2(b, a) for (_, a), (_, b) in zip(inside, outside, strict=False)), default=float("inf"))
    raise ReplayError(
        f"alone it gives another output (relative L2 {apart:.2g})",
        next="Its output depends on more than its weights and inputs, for example on the module's place in the model.",
    )


def _same(inside: Any, alone: Any, vmapped: bool) -> bool:
    if same_bits(inside, alone):
        return True
    if not vmapped or inside.shape != alone.shape or inside.dtype != alone.dtype or inside.dtype.kind in "biu":
        return False
    return relative_l2(alone, inside) <= VMAPPED * float(jax.numpy.finfo(inside.dtype).eps)


def _shapes(nest: Any) -> str:
    shown = [f"{array.dtype}{list(array.shape)}" for array in flax_values.spread(nest)[0]]
    return ", ".join(shown[:4]) + (f", ... ({counted(len(shown), 'array')})" if len(shown) > 4 else "")
