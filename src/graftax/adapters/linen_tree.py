"""Linen modules: `linen(module, *example_args)`, and what a traced call of it shows. Only jax.eval_shape runs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from graftax.adapters import containers, flax_tree, settings
from graftax.errors import GraftaxError, UsageError, escape
from graftax.tree import Checkpoint, Live, Module, TensorSpec, Trace, join_path

if TYPE_CHECKING:
    from flax import linen as nn


@dataclass(frozen=True, slots=True, eq=False)
class LinenModel:
    """A Linen module with example inputs, as `graftax.linen` returns it. Its shapes are traced on use."""

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rngs: Any = None
    method: Any = None

    def __repr__(self) -> str:
        return f"gx.linen({type(self.module).__name__}(...))"


def linen(module: nn.Module, *example_args: Any, rngs: Any = None, method: Any = None, **kwargs: Any) -> LinenModel:
    """A Linen module as `like` or as the other end of a port. Nothing is computed; only shapes are traced.

      example_args, kwargs  the arguments of the module's call; arrays may be jax.ShapeDtypeStruct
      rngs                  as for `module.init`; their values do not matter here
      method                the method to call, if not `__call__`

    Raises UsageError if `module` is not a Linen module.
    """
    from flax import linen as nn

    if not isinstance(module, nn.Module):
        what = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise UsageError(f"linen() takes a flax.linen Module and example inputs, not {what}")
    return LinenModel(module, tuple(example_args), dict(kwargs), rngs, method)


@dataclass(slots=True)
class Seen:
    """What the trace saw of one module: its object, its place in the call order, and the shapes inside its first
    call."""

    module: Any
    order: int
    called: bool = False
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    inner: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])


def open_linen(model: LinenModel, label: str) -> Checkpoint:
    """The variables that `model.module.init` would make, with its modules in call order. Nothing is computed.

    Raises GraftaxError (exit code 70) if the module fails on its example inputs.
    """
    variables, seen = trace(model)
    base = flax_tree.open_container(variables, label)
    return Checkpoint(
        label=label,
        side="flax",
        specs=base.specs,
        live=Live(
            modules=modules_of(seen, base.specs),
            object=model,
            trace=lambda: maps_of(model, variables),
            rebuild=lambda arrays, sharding=None, adopt=False: flax_tree.rebuild_container(
                variables, arrays, sharding, adopt
            ),
            placed=base.live.placed,
        ),
        real_keys=base.real_keys,
        containers=base.containers,
    )


def trace(model: LinenModel) -> tuple[Any, dict[tuple[str, ...], Seen]]:
    """(abstract variables in the order in which init makes them, path -> what was seen), by jax.eval_shape.

    Collections that are not weights (`containers.LINEN_STATE`) are left out.
    """
    import jax
    from flax import linen as nn

    seen: dict[tuple[str, ...], Seen] = {}
    kept: list[Any] = []

    def watch(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        path = tuple(context.module.path)
        if context.method_name == "setup" or "<" in context.method_name:  # lifted modules call through a lambda
            return next_fun(*args, **kwargs)
        info = seen.setdefault(path, Seen(context.module, len(seen)))
        out = next_fun(*args, **kwargs)
        if context.method_name == "__call__" and not info.called:
            info.called = True
            info.input_shape = _shape_of([*args, *kwargs.values()])
            info.output_shape = _shape_of([out])
            info.inner = _inner_shapes(context.module)
        return out

    dynamic, static = _split((model.args, dict(model.kwargs)))

    def init(arrays: list[Any]) -> Any:
        args, kwargs = _join(arrays, static)
        rngs = jax.random.key(0) if model.rngs is None else _rngs(model.rngs)
        options = {} if model.method is None else {"method": model.method}
        with nn.intercept_methods(watch):
            variables = model.module.init(rngs, *args, **options, **kwargs)
        kept.append(_order(variables))
        return variables

    try:
        variables = jax.eval_shape(init, dynamic)
    except GraftaxError:
        raise
    except Exception as exc:
        name = type(model.module).__name__
        raise GraftaxError(
            f"{escape(name)} failed on its example inputs: {type(exc).__name__}: {escape(exc, 600)}",
            next="Call it as in training: gx.linen(module, *example_args, **kwargs), for example train=False.",
        ) from exc
    ordered = _reorder(variables, kept[0])
    return {name: tree for name, tree in ordered.items() if name not in containers.LINEN_STATE}, seen


def maps_of(model: LinenModel, variables: Any) -> Trace:
    """The axes of flattened maps, from a second traced call. The result is empty if the call cannot be followed."""
    from graftax.adapters import linen_trace

    dynamic, static = _split((model.args, dict(model.kwargs)))

    def call(weights: Any, arrays: list[Any]) -> Any:
        args, kwargs = _join(arrays, static)
        options = {} if model.method is None else {"method": model.method}
        return model.module.apply(weights, *args, rngs=_call_rngs(model.rngs), mutable=True, **options, **kwargs)

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return linen_trace.trace_call(call, variables, dynamic)
    except Exception:  # the call differs from init (state that only init makes): the flatten stays a question
        return Trace()


def _call_rngs(rngs: Any) -> Any:
    import jax

    made = jax.random.key(0) if rngs is None else _rngs(rngs)
    return made if isinstance(made, Mapping) else {"params": made}


def modules_of(seen: Mapping[tuple[str, ...], Seen], specs: Mapping[str, TensorSpec]) -> dict[str, Module]:
    """module path -> Module, in the order of first calls. Its leaves: path below the module -> path with the
    collection."""
    below: dict[str, dict[str, str]] = {join_path(path): {} for path in seen}
    for full in sorted(specs, key=lambda path: not path.startswith("params/")):
        collection, _, inside = full.partition("/")
        parts = inside.split("/")
        for i in range(len(parts)):
            leaves = below.get("/".join(parts[:i]))
            if leaves is not None:
                role = "/".join(parts[i:])
                leaves[role if role not in leaves else f"{collection}/{role}"] = full
    return {name: _module(name, info, below[name], specs) for name, info in zip(below, seen.values(), strict=True)}


def _module(path: str, info: Seen, leaves: dict[str, str], specs: Mapping[str, TensorSpec]) -> Module:
    kind = type(info.module)
    own = {f.name: getattr(info.module, f.name, None) for f in fields(kind) if f.name not in {"parent", "name"}}
    plain = settings.collect(own.items())
    plain["order"] = info.order
    if info.input_shape is not None:
        plain["input_shape"] = info.input_shape
    if info.output_shape is not None:
        plain["output_shape"] = info.output_shape
    inner = {role: shape for role, shape in info.inner.items() if role in leaves and shape != specs[leaves[role]].shape}
    if inner:
        plain["inner_shapes"] = inner
    told = *settings.calls_of(kind, own), settings.code_of(kind)
    return Module(path, kind.__name__, settings.bases(kind), plain, leaves, *told)


def _inner_shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's leaves as its own call sees them: without the axes that scan or vmap stack."""
    try:
        variables = module.variables
    except Exception:  # an unbound module has none
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    for keys, leaf in containers.leaves(variables):
        if len(keys) > 1:
            shapes.setdefault(join_path(keys[1:]), tuple(leaf.shape))
    return shapes


def _shape_of(values: list[Any]) -> tuple[int, ...] | None:
    """The shape of the first array in `values`."""
    import jax

    for leaf in jax.tree.leaves(values):
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            return tuple(leaf.shape)
    return None


# ---------------------------------------------------------------- arguments and key order


def _split(value: Any) -> tuple[list[Any], Any]:
    """(the arrays in `value`, the rest with a hole for each). Flags and text are not traced; they stay as they are."""
    import jax

    leaves, structure = jax.tree.flatten(value)
    dynamic = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
    return [leaves[i] for i in dynamic], (leaves, dynamic, structure)


def _join(arrays: list[Any], static: Any) -> Any:
    leaves, dynamic, structure = static
    filled = list(leaves)
    for i, array in zip(dynamic, arrays, strict=True):
        filled[i] = array
    return structure.unflatten(filled)


def _rngs(rngs: Any) -> Any:
    """Seeds as keys: gx.linen also accepts `rngs=0` and `rngs={"params": 0}`."""
    import jax

    if isinstance(rngs, Mapping):
        return {name: _rngs(value) for name, value in rngs.items()}
    return jax.random.key(rngs) if isinstance(rngs, int) else rngs


def _order(tree: Any) -> Any:
    """The keys of nested mappings in their own order, which eval_shape replaces by sorted order."""
    if isinstance(tree, Mapping):
        return {key: _order(child) for key, child in tree.items()}
    return None


def _reorder(tree: Any, order: Any) -> Any:
    if isinstance(tree, Mapping) and isinstance(order, Mapping):
        return containers.with_children(tree, {key: _reorder(tree[key], order[key]) for key in order})
    return tree
