"""The settings of a live module as plain data: numbers, text, tuples, dtype names. Arrays and modules are left out."""

from __future__ import annotations

import enum
import hashlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from functools import cache, partial
from types import CellType, CodeType, FunctionType
from typing import Any

from graftax.tree import whole_words

SKIP = object()
"""Stands for a value that is not a setting."""
_DEPTH = 4


def simple(value: Any, depth: int = 0) -> Any:
    """`value` as plain data, or SKIP. Dtypes and functions are given by name, lists as tuples."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or type(value) in (bool, int, float, str, complex):
        return value
    if isinstance(value, (list, tuple)) and depth < _DEPTH:
        items = [simple(item, depth + 1) for item in value]
        return SKIP if any(item is SKIP for item in items) else tuple(items)
    if isinstance(value, dict) and depth < _DEPTH:
        pairs = {key: simple(item, depth + 1) for key, item in value.items() if isinstance(key, (str, int))}
        return SKIP if any(item is SKIP for item in pairs.values()) or len(pairs) < len(value) else pairs
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()  # pyright: ignore
    name = _dtype_name(value)
    if name is not None:
        return name
    if callable(value) and not isinstance(value, type) and not hasattr(value, "shape"):
        return getattr(value, "__name__", SKIP)
    return SKIP


def _dtype_name(value: Any) -> str | None:
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.dtype):
        return str(value)
    if isinstance(value, type):  # numpy.float32, ml_dtypes.bfloat16, jax.numpy.float32
        declared = getattr(value, "dtype", None)
        if isinstance(declared, numpy.dtype):
            return str(declared)
        return str(numpy.dtype(value)) if issubclass(value, numpy.generic) else None
    return None


def collect(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs whose value is a setting. Names that begin with '_' are left out."""
    out: dict[str, Any] = {}
    for name, value in pairs:
        if not isinstance(name, str) or name.startswith("_"):  # items of an nnx.List have numbers as names
            continue
        plain = simple(value)
        if plain is not SKIP:
            out[name] = plain
    return out


def bases(kind: type) -> tuple[str, ...]:
    """The qualified names of a class and its bases, in method resolution order."""
    return tuple(map(_qualified, kind.__mro__[:-1]))


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# ---------------------------------------------------------------- the code that a call runs

_FUNCTIONS = frozenset(("linear", "bilinear", "embedding", "conv1d", "conv2d", "conv3d", "_conv_forward"))
_FUNCTIONS |= {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_FUNCTIONS |= {"layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm"}
"""Functions that take the weights of the framework's layers, in the layout that the layer keeps."""
_MOVES = frozenset(("t", "T", "mT", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint"))
_MOVES |= {"einsum", "matmul", "mm", "addmm", "bmm", "dot", "tensordot", "dot_general", "inner"}


_WEIGHTS = frozenset(("weight", "kernel", "embedding", "parameters", "_parameters", "named_parameters", "getattr"))
_WEIGHTS |= {"state_dict", "__dict__", "vars"}
_CALL = ("forward", "__call__")
_TURNS = _MOVES - {"einsum", "matmul", "mm", "addmm", "bmm", "dot", "tensordot", "dot_general", "inner"}
_SUPPLIED = frozenset(("promote_dtype", "einsum", "einsum_cls"))
_FRAMEWORKS = ("torch", "jax", "flax", "jaxlib")


def calls_of(kind: type, held: Mapping[str, Any], hooks: Iterable[Any] = ()) -> tuple[tuple[str, ...], bool]:
    """`calls` of a live module of the class, which has the attributes `held` and runs `hooks` around its call.
    Functions set on the module itself come first: its own forward, a hook, a product other than the framework's."""
    names, own_math = calls(kind)
    base_names = frozenset(cls.__name__ for cls in kind.__mro__)
    first: list[str] = []
    for name, value in held.items():
        overridden = getattr(kind, name, None) if whole_words(name) & {"forward", "call"} else None
        if callable(value) and callable(overridden):
            if getattr(value, "__func__", None) is not overridden:
                first.append(_function_name(value))
                own_math = own_math or not _hands_on(value, base_names)
        elif name in _SUPPLIED or {"dot", "general"} <= whole_words(name) or {"conv", "general"} <= whole_words(name):
            function = _inner(value)
            if callable(function) and not _of_framework(function):
                first.append(_function_name(function))
                code = getattr(function, "__code__", None)
                own_math = own_math or code is None or bool(_names_of(code) & _TURNS)
    first += [_function_name(hook) for hook in map(_inner, hooks) if not _of_framework(hook)]
    return (*first, *names), own_math


@cache
def code_of(kind: type) -> str:
    """A hash of the code of a class and of its bases that no framework defines, with the settings that it closes over:
    equal for a class that is defined twice in the same way. "" if a framework defines all of it."""
    digest = hashlib.sha256()
    own = [cls for cls in kind.__mro__[:-1] if not _of_framework(cls)]
    for cls in own:
        for name, value in sorted(vars(cls).items()):
            for part in (value.fget, value.fset) if isinstance(value, property) else (value,):
                function: Any = getattr(part, "__func__", part)
                function = inspect.unwrap(function) if callable(function) else None
                if isinstance(function, FunctionType):
                    digest.update(repr((name, _fingerprint(function))).encode())
    return digest.hexdigest() if own else ""


def _fingerprint(function: FunctionType) -> Any:
    held = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    given = [simple(value) for value in (*held, *(function.__defaults__ or ()))]
    return _code_text(function.__code__), [value for value in given if value is not SKIP]


def _filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that is not bound yet
        return False


def _code_text(code: CodeType) -> Any:
    inner = [_code_text(part) if isinstance(part, CodeType) else repr(part) for part in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, inner


def _inner(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return inspect.unwrap(function) if callable(function) else function


def _of_framework(function: Any) -> bool:
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.partition(".")[0] in _FRAMEWORKS


def _function_name(function: Any) -> str:
    function = _inner(function)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


@cache
def calls(kind: type) -> tuple[tuple[str, ...], bool]:
    """The classes that define what a call of the class runs, the first to run first; and whether one of them overrides
    another without passing its weights on to it or to its function. In that case the weights may have another layout
    than the base class's."""
    mro = kind.__mro__[:-1]
    found: list[tuple[type, list[Any]]] = []
    for place, cls in enumerate(mro):
        own = {name: value for name, value in vars(cls).items() if whole_words(name) & {"forward", "call"}}
        held = [value for name, value in own.items() if name in _CALL
                or any(name in vars(base) for base in mro[place + 1 :])]  # fmt: skip
        if held:
            found.append((cls, held))
    if not found:
        return (), False
    base_names = frozenset(cls.__name__ for cls in mro)
    own_math = False
    for cls, held in found[:-1]:
        own_math = own_math or not all(_hands_on(method, base_names - {cls.__name__}) for method in held)
        if _of_framework(cls) or not any(_on_base(_names_in(method), base_names) for method in held):
            break  # it calls none of the methods that it overrides
    return tuple(_qualified(cls) for cls, _ in found), own_math


def _hands_on(method: Any, bases: frozenset[str]) -> bool:
    """True if a method calls the one it overrides, or the layer's function, and does not move axes of the weights
    itself."""
    code = _code(method)
    if code is None:
        return True  # an attribute or a compiled function: there is no code to read
    names = _names_of(code)
    on_base = _on_base(names, bases) or any(name in _CALL for name in _closed_over(method))
    if on_base and code.co_name in _CALL and names & frozenset(_CALL) and not names & _WEIGHTS:
        return True  # it moves only axes of activations
    return not names & _MOVES and (on_base or bool(names & _FUNCTIONS))


def _on_base(names: set[str], bases: frozenset[str]) -> bool:
    """True for a call by `super()`, or of the form `Linear.forward(self, x)`."""
    return "__class__" in names or bool(names & frozenset(_CALL) and names & bases)


def _closed_over(function: Any) -> list[str]:
    """The names of the functions in a closure."""
    variables = inspect.getclosurevars(function).nonlocals if inspect.isroutine(function) else {}
    return [getattr(value, "__name__", "") for value in variables.values() if callable(value)]


def _code(method: Any) -> CodeType | None:
    return getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None


def _names_in(method: Any) -> set[str]:
    code = _code(method)
    return set() if code is None else _names_of(code)


def _names_of(code: CodeType) -> set[str]:
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    said = {part for part in code.co_consts if isinstance(part, str) and part.isidentifier()}
    return {*code.co_names, *code.co_freevars}.union(said & _WEIGHTS, *map(_names_of, inner))
