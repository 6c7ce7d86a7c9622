"""Evaluate one step of a program in float64: NumPy for the common primitives, jax itself for all others.

jax run step by step compiles each new shape (tens of milliseconds); NumPy needs microseconds. A cast between floating
dtypes does nothing here, so a model that computes in bfloat16 is followed in float64 too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from graftax.probe.program import INDEX, JOIN, RUN, Step

Array = Any


def evaluate(step: Step, given: Sequence[Array]) -> tuple[Array, ...]:
    """The outputs of a step. Floating arrays are float64 in and out."""
    if RUN in step.params:
        return step.params[RUN](*given)
    rule = _RULES.get(step.name)
    if rule is not None:
        with np.errstate(all="ignore"):  # a candidate that does not fit may well overflow
            out = rule(step.params, *given)
        return out if isinstance(out, tuple) else (out,)
    return _by_jax(step, given)


def widened(array: Any) -> Array:
    """An array as NumPy; floating dtypes as float64. A random key stays what it is."""
    dtype = getattr(array, "dtype", None)
    if dtype is not None and type(dtype).__module__.startswith("jax"):
        return array
    made = np.asarray(array)
    return (
        made.astype(np.float64)
        if made.dtype.kind == "f" or made.dtype.kind == "V" or "float" in made.dtype.name
        else made
    )


def _by_jax(step: Step, given: Sequence[Array]) -> tuple[Array, ...]:
    import jax

    params = dict(step.params)
    eqn = step.source
    if step.name in ("while", "cond"):  # typed inside: run as it was traced
        ready = [_as_traced(array, atom) for array, atom in zip(given, eqn.invars, strict=True)]
        out = eqn.primitive.bind(*ready, **params)
        return tuple(widened(array) for array in (out if isinstance(out, (tuple, list)) else [out]))
    scatter = _SCATTERS.get(step.name.replace("_", "-"))
    if scatter is not None:  # its parameters hold a function of the traced dtype
        kept = {name: params[name] for name in ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")}
        with jax.enable_x64(True):
            return (widened(getattr(jax.lax, scatter)(*map(jax.numpy.asarray, given), **kept)),)
    if params.get("preferred_element_type") is not None:
        params["preferred_element_type"] = np.float64
    with jax.enable_x64(True):
        ready = [
            array if not isinstance(array, (np.ndarray, np.generic)) else jax.numpy.asarray(array) for array in given
        ]
        out = eqn.primitive.bind(*ready, **params)
        return tuple(widened(array) for array in (out if isinstance(out, (tuple, list)) else [out]))


_SCATTERS = {f"scatter{how}": f"scatter{how.replace('-', '_')}" for how in ("", "-add", "-mul", "-min", "-max")}


def _as_traced(array: Any, atom: Any) -> Any:
    import jax

    return jax.numpy.asarray(array, atom.aval.dtype) if isinstance(array, (np.ndarray, np.generic)) else array


# ---------------------------------------------------------------- primitives

Rule = Callable[..., Any]


def _convert(params: Mapping[str, Any], x: Array) -> Array:
    dtype = np.dtype(params["new_dtype"])
    floating = dtype.kind == "f" or "float" in dtype.name
    return np.asarray(x).astype(np.float64 if floating else dtype, copy=False)


def matrices(params: Mapping[str, Any], x: Array, y: Array) -> tuple[Array, Array, tuple[int, ...]]:
    """The operands of a dot_general as matrices (batch..., M, K) and (batch..., K, N), and the shape of its output."""
    (cx, cy), (bx, by) = params["dimension_numbers"]
    fx = [a for a in range(x.ndim) if a not in cx and a not in bx]
    fy = [a for a in range(y.ndim) if a not in cy and a not in by]
    batch = [x.shape[a] for a in bx]
    inner = int(np.prod([x.shape[a] for a in cx], dtype=int))
    left = x.transpose(*bx, *fx, *cx).reshape(*batch, -1, inner)
    right = y.transpose(*by, *cy, *fy).reshape(*batch, inner, -1)
    return left, right, (*batch, *(x.shape[a] for a in fx), *(y.shape[a] for a in fy))


def _dot(params: Mapping[str, Any], x: Array, y: Array) -> Array:
    left, right, shape = matrices(params, x, y)
    return (left @ right).reshape(shape)


def _broadcast(params: Mapping[str, Any], x: Array, *_: Any) -> Array:
    shape, places = params["shape"], params["broadcast_dimensions"]
    made = [1] * len(shape)
    for axis, place in enumerate(places):
        made[place] = x.shape[axis]
    return np.broadcast_to(np.reshape(x, made), shape)


def _reduced(function: Any) -> Rule:
    return lambda params, x: function(x, axis=tuple(params["axes"]))


def _slice(params: Mapping[str, Any], x: Array) -> Array:
    strides = params["strides"] or (1,) * x.ndim
    cut = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return x[tuple(slice(a, b, s) for a, b, s in cut)]


def _dynamic_slice(params: Mapping[str, Any], x: Array, *starts: Array) -> Array:
    sizes = params["slice_sizes"]
    at = [min(max(int(s), 0), n - size) for s, n, size in zip(starts, x.shape, sizes, strict=True)]
    return x[tuple(slice(a, a + size) for a, size in zip(at, sizes, strict=True))]


def _split(params: Mapping[str, Any], x: Array) -> tuple[Array, ...]:
    return tuple(np.split(x, np.cumsum(params["sizes"])[:-1], axis=params["axis"]))


def _select(params: Mapping[str, Any], which: Array, *cases: Array) -> Array:
    if len(cases) == 2:
        return np.where(np.asarray(which).astype(bool), cases[1], cases[0])
    return np.choose(which, cases)


def _integer_pow(params: Mapping[str, Any], x: Array) -> Array:
    return x ** params["y"] if params["y"] >= 0 else 1.0 / x ** -params["y"]


def _reshape(params: Mapping[str, Any], x: Array, *_: Any) -> Array:
    if params.get("dimensions") is not None:
        x = np.transpose(x, params["dimensions"])
    return np.reshape(x, params["new_sizes"])


def _iota(params: Mapping[str, Any], *_: Any) -> Array:
    shape, axis = params["shape"], params["dimension"]
    view = [1] * len(shape)
    view[axis] = shape[axis]
    dtype = np.dtype(params["dtype"])
    made = np.arange(shape[axis]).reshape(view)
    return np.broadcast_to(made.astype(np.float64 if dtype.kind == "f" else dtype), shape)


def _divided(params: Mapping[str, Any], x: Array, y: Array) -> Array:
    if np.asarray(x).dtype.kind in "iu":  # lax.div of integers truncates
        return (np.sign(x) * np.sign(y) * (np.abs(x) // np.maximum(np.abs(y), 1))).astype(np.asarray(x).dtype)
    return np.divide(x, y)


def _plain(function: Any) -> Rule:
    return lambda params, *given: function(*given)


def _special(name: str) -> Rule:
    def run(params: Mapping[str, Any], *given: Array) -> Array:
        from scipy import special

        return getattr(special, name)(*given)

    return run


_RULES: dict[str, Rule] = {
    "convert_element_type": _convert, "dot_general": _dot, "broadcast_in_dim": _broadcast, "reshape": _reshape,
    "transpose": lambda params, x: np.transpose(x, params["permutation"]),
    "squeeze": lambda params, x: np.squeeze(x, tuple(params["dimensions"])),
    "expand_dims": lambda params, x: np.expand_dims(x, tuple(params["dimensions"])),
    "rev": lambda params, x: np.flip(x, tuple(params["dimensions"])),
    "concatenate": lambda params, *xs: np.concatenate(xs, axis=params["dimension"]),
    "slice": _slice, "dynamic_slice": _dynamic_slice, "split": _split, "select_n": _select, "iota": _iota,
    "reduce_sum": _reduced(np.sum), "reduce_max": _reduced(np.max), "reduce_min": _reduced(np.min),
    "reduce_prod": _reduced(np.prod), "reduce_and": _reduced(np.all), "reduce_or": _reduced(np.any),
    "add": _plain(np.add), "add_any": _plain(np.add), "sub": _plain(np.subtract), "mul": _plain(np.multiply),
    "div": _divided, "max": _plain(np.maximum), "min": _plain(np.minimum), "pow": _plain(np.power),
    "neg": _plain(np.negative), "exp": _plain(np.exp), "exp2": _plain(np.exp2), "log": _plain(np.log),
    "log1p": _plain(np.log1p), "expm1": _plain(np.expm1), "tanh": _plain(np.tanh), "sin": _plain(np.sin),
    "cos": _plain(np.cos), "tan": _plain(np.tan), "sqrt": _plain(np.sqrt), "abs": _plain(np.abs),
    "sign": _plain(np.sign), "floor": _plain(np.floor), "ceil": _plain(np.ceil), "square": _plain(np.square),
    "rsqrt": _plain(lambda x: 1.0 / np.sqrt(x)), "cbrt": _plain(np.cbrt),
    "logistic": _special("expit"), "erf": _special("erf"), "erfc": _special("erfc"), "erf_inv": _special("erfinv"),
    "lgamma": _special("gammaln"), "digamma": _special("digamma"),
    "integer_pow": _integer_pow, "is_finite": _plain(np.isfinite), "stop_gradient": _plain(lambda x: x),
    "eq": _plain(np.equal), "ne": _plain(np.not_equal), "lt": _plain(np.less), "le": _plain(np.less_equal),
    "gt": _plain(np.greater), "ge": _plain(np.greater_equal), "and": _plain(np.bitwise_and),
    "or": _plain(np.bitwise_or), "xor": _plain(np.bitwise_xor), "not": _plain(np.invert),
    "clamp": _plain(lambda low, x, high: np.clip(x, low, high)),
    "copy": _plain(lambda x: x), "copy_p": _plain(lambda x: x), "reduce_precision": _plain(lambda x: x),
    "sharding_constraint": _plain(lambda x: x), "optimization_barrier": lambda params, *xs: xs,
    "rem": _plain(lambda x, y: np.fmod(x, y)), "atan2": _plain(np.arctan2),
    "argmax": lambda params, x: np.argmax(x, axis=params["axes"][0]).astype(params["index_dtype"]),
    "argmin": lambda params, x: np.argmin(x, axis=params["axes"][0]).astype(params["index_dtype"]),
    "cumsum": lambda params, x: np.flip(np.cumsum(np.flip(x, params["axis"]), params["axis"]), params["axis"])
    if params["reverse"] else np.cumsum(x, params["axis"]),
    INDEX: lambda params, x: x[params["at"]],
    JOIN: lambda params, *xs: np.stack(xs),
}  # fmt: skip
