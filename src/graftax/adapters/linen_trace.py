"""Which axes of a feature map each matrix of a Linen model takes and makes, and on which axes its leaves are stacked,
read from the jaxpr of its call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from graftax.adapters.flow import LEAF, OUT, Dim, Dims, Notes, channels, concatenated, dim, joined, reshaped, resized
from graftax.adapters.linen_stacks import MARK, marked, stacked_axes
from graftax.tree import Trace, join_path

Value = Dims | None

_SAME = frozenset((
    "add", "sub", "mul", "div", "max", "min", "pow", "exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic",
    "rsqrt", "sqrt", "neg", "abs", "sign", "integer_pow", "erf", "erf_inv", "square", "select_n",
    "convert_element_type", "copy", "stop_gradient", "sin", "cos", "floor", "clamp", "eq", "ne", "lt", "le",
    "gt", "ge", "and", "or", "not", "is_finite", "reduce_precision", "optimization_barrier", "add_any",
    "copy_p", "sharding_constraint",
))  # fmt: skip
"""Elementwise operations: every output axis is the same input axis."""
_INSIDE = frozenset((
    "pjit", "jit", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "checkpoint", "remat",
    "remat2", "closed_call", "core_call", "custom_lin",
))  # fmt: skip
"""Calls of an inner jaxpr with the same operands."""
_REDUCES = frozenset(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"))


def trace_call(call: Callable[[Any, list[Any]], Any], variables: Any, arrays: list[Any]) -> Trace:
    """call: (variables, arrays) -> outputs, traceable by jax. Raises any error of tracing."""
    import jax

    with marked():
        closed = jax.make_jaxpr(call)(variables, arrays)
    notes = Notes()
    env: dict[Any, Value] = {}
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    names = [join_path(_keys(path)) for path, _ in leaves]
    for n, variable in enumerate(closed.jaxpr.invars):
        label = f"{LEAF}{names[n]}:" if n < len(names) else f"x{n}:"
        env[variable] = tuple(dim(f"{label}{axis}", size) for axis, size in enumerate(variable.aval.shape))
    _walk(closed.jaxpr, env, notes)
    shapes = {name: tuple(variable.aval.shape) for name, variable in zip(names, closed.jaxpr.invars, strict=False)}
    return replace(notes.trace(), stacked=stacked_axes(shapes, notes))


def _keys(path: Any) -> list[Any]:
    """The dict keys of a path; boxes around a leaf (partitioning metadata) have none."""
    return [part.key for part in path if hasattr(part, "key")]


def _walk(jaxpr: Any, env: dict[Any, Value], notes: Notes) -> None:
    for eqn in jaxpr.eqns:
        given = [_read(env, atom) for atom in eqn.invars]
        name, params = eqn.primitive.name, eqn.params
        if str(params.get("name")).startswith(MARK):
            for reduction in params["jaxpr"].jaxpr.eqns:
                dims = None if given[0] is None else [given[0][axis] for axis in reduction.params.get("axes", ())]
                notes.mark(params["name"].removeprefix(MARK), dims)
        elif name == "scan":  # of its body only the marks are noted
            body, first, carry = params["jaxpr"].jaxpr, params["num_consts"], params["num_carry"]
            slices = [of if of is None else of[1:] for of in given[first + carry :]]
            parts = [*given[:first], *[None] * carry, *slices]
            _walk(body, dict(zip(body.invars, parts, strict=True)), Notes(marked=notes.marked))
        inner = _inner(eqn) if name in _INSIDE else None
        if inner is not None:
            inside: dict[Any, Value] = dict(zip(inner.invars, given, strict=True))
            _walk(inner, inside, notes)
            made: list[Value] = [_read(inside, atom) for atom in inner.outvars]
        else:
            first = _equation(name, eqn, given, notes) if len(eqn.outvars) == 1 or name in _SAME else None
            made = [first] * len(eqn.outvars)
        for variable, value in zip(eqn.outvars, made, strict=True):
            env[variable] = value if value is not None and len(value) == len(variable.aval.shape) else None


def _read(env: Mapping[Any, Value], atom: Any) -> Value:
    """The value of a variable. A literal is a scalar or unknown."""
    if hasattr(atom, "val"):
        return () if not getattr(atom.val, "shape", ()) else None
    return env.get(atom)


def _inner(eqn: Any) -> Any:
    for value in eqn.params.values():
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns") and len(jaxpr.invars) == len(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars):
            return jaxpr
    return None


def _equation(name: str, eqn: Any, given: list[Value], notes: Notes) -> Value:
    params, shape = eqn.params, tuple(eqn.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        return _conv(params["dimension_numbers"], given, shape, notes)
    if name == "dot_general":
        return _dot(params["dimension_numbers"], given, eqn, notes)
    if name in _SAME:
        return _together(given, shape, notes)
    if not given or given[0] is None:
        return None
    one = given[0]
    if name == "reshape":
        return reshaped(one, list(shape)) if params.get("dimensions") is None else None
    if name == "transpose":
        return tuple(one[axis] for axis in params["permutation"])
    if name == "broadcast_in_dim":
        out: list[Dim] = [()] * len(shape)
        for axis, place in enumerate(params["broadcast_dimensions"]):
            out[place] = one[axis]
        return tuple(out)
    if name == "squeeze" or name in _REDUCES:
        gone = set(params["dimensions" if name == "squeeze" else "axes"])
        return tuple(of for axis, of in enumerate(one) if axis not in gone)
    if name == "concatenate":
        return concatenated(given, params["dimension"])
    if name.startswith("reduce_window") or name in ("pad", "slice", "dynamic_slice"):
        before = tuple(eqn.invars[0].aval.shape)
        made = [of if size == old else _cropped(of, size) for of, size, old in zip(one, shape, before, strict=True)]
        return None if any(of is None for of in made) else tuple(of for of in made if of is not None)
    return None


def _conv(numbers: Any, given: list[Value], shape: tuple[int, ...], notes: Notes) -> Value:
    lhs, out = numbers.lhs_spec, numbers.out_spec
    if not 1 <= len(out) - 2 <= 3:
        return None
    image = given[0]
    if image is not None:
        notes.into_map(image[lhs[1]], [image[axis] for axis in lhs[2:]])
    made = channels(shape[out[1]], image[lhs[0]] if image is not None else (), [shape[axis] for axis in out[2:]])
    dims: list[Dim] = [()] * len(out)
    for axis, of in zip(out, made, strict=True):
        dims[axis] = of
    return tuple(dims)


def _dot(numbers: Any, given: list[Value], eqn: Any, notes: Notes) -> Value:
    """x @ kernel, with a kernel (in, out); any other product is unknown."""
    (left, right), batch = numbers
    x, kernel = given
    leaf = _leaf_of(kernel)
    shapes = [tuple(atom.aval.shape) for atom in eqn.invars]
    if not any(batch) and len(left) == 1:
        notes.product(kernel, right[0])
        notes.product(x, left[0])
    if any(batch) or len(left) != 1 or not leaf or len(shapes[1]) != 2 or tuple(right) != (0,):
        for value in given:  # a leaf with a second kind of use becomes unknown
            if _leaf_of(value):
                notes.inputs(_leaf_of(value), None)
        return None
    notes.inputs(leaf, x[left[0]] if x is not None else None)
    rest = x if x is not None else ((),) * len(shapes[0])
    return (*(of for axis, of in enumerate(rest) if axis != left[0]), dim(f"{OUT}{leaf}", shapes[1][1]))


def _leaf_of(value: Value) -> str:
    """The leaf that a value is, with its axes in their own order; '' if it is not a leaf."""
    names = {atom.name.rpartition(":")[0] for of in value or () for atom in of}
    places = [atom.name.rpartition(":")[2] for of in value or () for atom in of]
    name = names.pop() if len(names) == 1 else ""
    return name.removeprefix(LEAF) if name.startswith(LEAF) and places == sorted(places) else ""


def _together(given: list[Value], shape: tuple[int, ...], notes: Notes) -> Value:
    """Combine values of one shape, or scalars, elementwise. A vector among them runs over the axes of the others. An
    unknown value (the statistics of a norm) gets the axes of the others too."""
    full = [value for value in given if value is not None and (value != () or not shape)]
    if not full:
        return None if None in given else ((),) * len(shape)
    out: Value = ((),) * len(shape)
    for value in full:
        out = joined(out, value) if out is not None and len(value) == len(shape) else None
    for value in full if len(full) > 1 else ():
        for axis, of in enumerate(value):
            vector = len(of) == 1 and of[0].name.startswith(LEAF) and not of[0].part and _rank(value, of[0].name) == 1
            if vector and (out is None or out[axis] != of):
                notes.vector(of[0].name.removeprefix(LEAF).rpartition(":")[0], out[axis] if out is not None else None)
    return out


def _rank(value: Dims, name: str) -> int:
    """The number of axes of the leaf that has an axis `name`."""
    leaf = name.rpartition(":")[0]
    return sum(atom.name.rpartition(":")[0] == leaf for of in value for atom in of)


def _cropped(of: Dim, size: int) -> Dim | None:
    """A spatial axis with another length. Channels with another length are no longer those of the convolution."""
    return resized(of, size) if of and of[0].name in ("d", "h", "w") else None
