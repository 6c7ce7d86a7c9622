"""Pickles of tensors, read as inert values: nothing is imported, nothing is called, and what a pickle asks for is only
written down. This is what makes a .pt file safe to open, with or without torch.

`load` runs a pickle on a stack machine whose values are dicts, lists, tuples, numbers, text and the records below. A
global outside ALLOWED (the classes and functions that torch's own restricted reader knows) refuses the file.

Sources: the opcodes are those of Python's pickletools; what the torch functions take is read off what torch.save of
torch 1.x to 2.13 writes, and every reading is compared with torch.load(weights_only=True) in the tests.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from graftax.errors import Failure, FormatError, UnsafeInputError, escape, with_article
from graftax.formats.limits import check_limit, limit

# torch storage class -> (dtype, bytes of an element). None: a type that no flat tree holds.
STORAGES: dict[str, tuple[str | None, int]] = {
    "FloatStorage": ("float32", 4), "DoubleStorage": ("float64", 8), "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2), "LongStorage": ("int64", 8), "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2), "CharStorage": ("int8", 1), "ByteStorage": ("uint8", 1), "BoolStorage": ("bool", 1),
    "ComplexFloatStorage": ("complex64", 8), "ComplexDoubleStorage": ("complex128", 16),
    "UntypedStorage": (None, 1), "QInt8Storage": (None, 1), "QUInt8Storage": (None, 1), "QInt32Storage": (None, 4),
    "QUInt4x2Storage": (None, 1), "QUInt2x4Storage": (None, 1),
}  # fmt: skip
DTYPES: dict[str, tuple[str, int]] = {
    "uint8": ("uint8", 1), "int8": ("int8", 1), "int16": ("int16", 2), "int32": ("int32", 4), "int64": ("int64", 8),
    "uint16": ("uint16", 2), "uint32": ("uint32", 4), "uint64": ("uint64", 8), "bool": ("bool", 1),
    "float16": ("float16", 2), "bfloat16": ("bfloat16", 2), "float32": ("float32", 4), "float64": ("float64", 8),
    "complex64": ("complex64", 8), "complex128": ("complex128", 16),
    "float8_e4m3fn": ("float8_e4m3fn", 1), "float8_e5m2": ("float8_e5m2", 1),
    "float8_e4m3fnuz": ("float8_e4m3fnuz", 1), "float8_e5m2fnuz": ("float8_e5m2fnuz", 1),
    "float8_e8m0fnu": ("float8_e8m0fnu", 1),
}  # fmt: skip
"""torch dtype -> (our name, bytes of an element)."""

_NO_WEIGHTS = {  # torch dtypes that may be named beside weights, or refused tensor by tensor
    "complex32", "quint8", "qint8", "qint32", "quint4x2", "quint2x4", "float4_e2m1fn_x2",
    *(f"{sign}int{bits}" for sign in ("u", "") for bits in range(1, 8)), *(f"bits{kind}" for kind in ("8", "16")),
    "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric",
    "per_channel_affine_float_qparams",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Global:
    """A class, function or constant that the pickle names."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes outside the pickle. `start` and `nbytes` are a window into record `key`, whose length is `total`."""

    key: str
    kind: str
    start: int
    nbytes: int
    total: int


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A strided view of a storage; `offset` and `strides` count elements. `conj`, `neg`: torch's lazy bits."""

    storage: Storage
    dtype: str
    itemsize: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conj: bool = False
    neg: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Refused:
    """A tensor that no flat tree can hold: `kind` is "quantized", "sparse", "meta", ...; `detail` its scheme."""

    kind: str
    detail: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """Anything else that is allowed beside weights: a device, a layout, a storage of its own."""

    text: str


class _Malformed(Exception):
    """The pickle does not make sense; `load` turns it into a FormatError with the file's name."""


def _brief(value: Any) -> str:
    """A value for a message; a container by its type alone, because its text can be exponentially long."""
    return escape(value, 40) if isinstance(value, (str, int, float, bytes)) else type(value).__name__


# ---------------------------------------------------------------- what may be called


def _ints(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or any(type(item) is not int for item in value):
        raise _Malformed(f"{_brief(value)} is no shape or stride")
    return tuple(value)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None, bits: Any = None) -> Any:
    if isinstance(storage, Refused):
        return storage
    if not isinstance(storage, Storage) or type(offset) is not int:
        raise _Malformed("a tensor without a storage")
    if dtype is None:
        name, itemsize = STORAGES[storage.kind]
    else:
        short = dtype.name.removeprefix("torch.") if isinstance(dtype, Global) else ""
        name, itemsize = DTYPES.get(short, (None, 1))
    if name is None:
        found = dtype.name if isinstance(dtype, Global) else f"torch.{storage.kind}"
        return Refused("quantized" if "Q" in storage.kind else "dtype", found)
    bits = bits or {}
    if not isinstance(bits, dict) or set(bits) - {"conj", "neg"}:
        return Refused("subclass", "a plain tensor with a state of its own")
    shape, strides = _ints(shape), _ints(strides)
    if len(shape) != len(strides):
        raise _Malformed(f"a tensor with {len(shape)} extents and {len(strides)} strides")
    return Tensor(storage, name, itemsize, offset, shape, strides, bool(bits.get("conj")), bool(bits.get("neg")))


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any = None, hooks: Any = None, bits: Any = None
) -> Any:
    return _tensor(storage, offset, shape, strides, None, bits)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, bits: Any = None
) -> Any:
    return _tensor(storage, offset, shape, strides, dtype, bits)


def _parameter(data: Any, *_: Any) -> Any:
    if not isinstance(data, (Tensor, Refused)):
        raise _Malformed("a parameter without a tensor")
    return data


def _typed(function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """A tensor with attributes of its own (they are left out), or of a subclass."""
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise _Malformed("a tensor of a type that is none")
    plain = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
    if not isinstance(kind, Global) or kind.name not in plain:
        return Refused("subclass", kind.name if isinstance(kind, Global) else "")
    return CALLS[function.name](*args) if function.name in CALLS else Refused("subclass", function.name)


def _quantized(storage: Any, offset: Any, shape: Any, strides: Any, scheme: Any = None, *_: Any) -> Refused:
    first = scheme[0] if isinstance(scheme, tuple) and scheme else None
    return Refused("quantized", first.name if isinstance(first, Global) else "")


def _ordered(items: Any = ()) -> dict[Any, Any]:
    if isinstance(items, dict):
        return dict(items)
    out: dict[Any, Any] = {}
    for item in items:
        if not isinstance(item, (list, tuple)) or len(item) != 2:
            raise _Malformed("a dict made of no pairs")
        _set(out, item[0], item[1])
    return out


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise _Malformed("bytes in an encoding that is not latin1")
    return text.encode("latin1")


def _size(items: Any = ()) -> tuple[int, ...]:
    return _ints(items)


def _aside(kind: str) -> Callable[..., Any]:
    return lambda *args: Refused(kind)


def _opaque(name: str) -> Callable[..., Any]:
    return lambda *args: Opaque(f"{name}({', '.join(map(_brief, args[:2]))})")


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "collections.Counter": _ordered,
    "_codecs.encode": _encode,
    "builtins.bytearray": _opaque("bytearray"),
    "builtins.set": _opaque("set"),
    "builtins.complex": _opaque("complex"),
    "torch.Size": _size,
    "torch.device": _opaque("device"),
    "torch.serialization._get_layout": _opaque("layout"),
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_sparse_tensor": _aside("sparse"),
    "torch._utils._rebuild_meta_tensor_no_storage": _aside("meta"),
    "torch._utils._rebuild_nested_tensor": _aside("nested"),
    "torch._utils._rebuild_wrapper_subclass": _aside("subclass"),
}
ALLOWED = frozenset(
    {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
    | set(CALLS)
    | {f"torch.{name}" for name in (*STORAGES, *DTYPES, *_NO_WEIGHTS)}
    | {"torch.storage.UntypedStorage"}
)


# ---------------------------------------------------------------- the machine


@dataclass(slots=True)
class _State:
    stack: list[Any] = field(default_factory=list[Any])
    marks: list[list[Any]] = field(default_factory=list[list[Any]])
    memo: dict[int, Any] = field(default_factory=dict[int, Any])
    refused: dict[str, None] = field(default_factory=dict[str, None])
    made: int = 0
    label: str = ""
    most: int = 0  # objects
    deepest: int = 0  # marks


def _since_mark(state: _State) -> list[Any]:
    items = state.stack
    state.stack = state.marks.pop()
    return items


def _set(target: Any, key: Any, value: Any) -> None:
    if isinstance(target, Opaque):
        return
    if not isinstance(target, dict):
        raise _Malformed("an item set on what is no dict")
    if (
        (isinstance(key, tuple) and len(key) <= 64 and all(isinstance(part, (str, int, float)) for part in key))
        or key is None
        or isinstance(key, (str, int, float, bytes, Global, Opaque))
    ):
        target[key] = value
    else:  # nested tuples can take exponential time to hash
        raise _Malformed(f"{with_article(type(key).__name__.lower())} as a key")


def _push(state: _State, value: Any) -> None:
    state.stack.append(value)


def _made(state: _State, value: Any) -> None:
    state.made += 1
    if state.made > state.most:
        check_limit("leaves", state.made, state.label)
    state.stack.append(value)


def _global(state: _State, arg: Any) -> None:
    module, _, name = str(arg).partition(" ")
    if module == "__builtin__":  # Python 2's name, which protocol 2 still writes
        module = "builtins"
    full = f"{module}.{name}"
    if full not in ALLOWED:
        state.refused[full] = None
        state.stack.append(Opaque(full))
    else:
        state.stack.append(Global(full))


def _stack_global(state: _State, arg: Any) -> None:
    name, module = state.stack.pop(), state.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise _Malformed("a global without a name")
    _global(state, f"{module} {name}")


def _reduce(state: _State, arg: Any) -> None:
    args, function = state.stack.pop(), state.stack.pop()
    if isinstance(function, Opaque) and function.text in state.refused:
        return _made(state, function)
    if not isinstance(function, Global) or function.name not in CALLS or not isinstance(args, tuple):
        raise _Malformed(f"a call of {escape(getattr(function, 'name', type(function).__name__))}")
    try:
        made = CALLS[function.name](*args)
    except (TypeError, RecursionError) as error:
        raise _Malformed(f"a call of {function.name} with the wrong arguments") from error
    return _made(state, made)


def _build(state: _State, arg: Any) -> None:
    """The state of an object: an OrderedDict's `_metadata`, or what a refused class would have taken."""
    state.stack.pop()
    if not isinstance(state.stack[-1], (dict, Opaque)):
        raise _Malformed("a state set on what has none")


def _append(state: _State, arg: Any) -> None:
    item = state.stack.pop()
    _extend(state.stack[-1], [item])


def _appends(state: _State, arg: Any) -> None:
    items = _since_mark(state)
    _extend(state.stack[-1], items)


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Opaque):
        raise _Malformed("an item appended to what is no list")


def _setitem(state: _State, arg: Any) -> None:
    value, key = state.stack.pop(), state.stack.pop()
    _set(state.stack[-1], key, value)


def _setitems(state: _State, arg: Any) -> None:
    items = _since_mark(state)
    if len(items) % 2:
        raise _Malformed("a key without a value")
    target = state.stack[-1]
    for i in range(0, len(items), 2):
        _set(target, items[i], items[i + 1])


def _mark(state: _State, arg: Any) -> None:
    if len(state.marks) > state.deepest:
        check_limit("depth", len(state.marks), state.label)
    state.marks.append(state.stack)
    state.stack = []


def _tuple(count: int) -> Callable[[_State, Any], None]:
    def handler(state: _State, arg: Any) -> None:
        if len(state.stack) < count:
            raise _Malformed("a tuple of what is not there")
        items = tuple(state.stack[-count:])
        del state.stack[-count:]
        _made(state, items)

    return handler


def _get(state: _State, arg: Any) -> None:
    state.stack.append(state.memo[arg])


def _put(state: _State, arg: Any) -> None:
    state.memo[arg] = state.stack[-1]


def _persistent(state: _State, arg: Any) -> None:
    """A storage: ('storage', class, key, location, elements[, None or (key, offset, elements) of a window])."""
    pid = state.stack.pop()
    if isinstance(pid, tuple) and pid and pid[0] in ("module", b"module"):
        # torch < 0.4 kept a module's source text here; the class itself is refused as a global
        named = pid[1] if len(pid) > 1 else None
        return _push(state, named if isinstance(named, Opaque) else Opaque("a module"))
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] not in ("storage", b"storage"):
        raise _Malformed("a persistent object that is no storage")
    kind = pid[1].name.rpartition(".")[2] if isinstance(pid[1], Global) else ""
    key, count = _text(pid[2]), pid[4]
    if kind not in STORAGES or key is None or type(count) is not int or count < 0:
        raise _Malformed(f"a storage of {kind or _brief(pid[1])}")
    itemsize = STORAGES[kind][1]
    start, length = 0, count
    if len(pid) == 6 and pid[5] is not None:
        window = pid[5]
        if not isinstance(window, tuple) or len(window) != 3 or any(type(n) is not int for n in window[1:]):
            raise _Malformed("a storage's window that is none")
        start, length = window[1], window[2]
        if start < 0 or length < 0 or start + length > count:
            raise _Malformed("a storage's window beyond its end")
    return _made(state, Storage(key, kind, start * itemsize, length * itemsize, count * itemsize))


def _text(key: Any) -> str | None:
    if isinstance(key, bytes):
        return key.decode("latin1")
    return str(key) if type(key) in (str, int) else None


_ARGUMENTS = (
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "SHORT_BINSTRING BINSTRING SHORT_BINBYTES BINBYTES"
)
_MACHINE: dict[str, Callable[[_State, Any], None]] = {
    **dict.fromkeys(_ARGUMENTS.split(), _push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda state, arg: None),
    "NONE": lambda state, arg: _push(state, None),
    "NEWTRUE": lambda state, arg: _push(state, True),
    "NEWFALSE": lambda state, arg: _push(state, False),
    "EMPTY_TUPLE": lambda state, arg: _push(state, ()),
    "EMPTY_DICT": lambda state, arg: _made(state, {}),
    "EMPTY_LIST": lambda state, arg: _made(state, []),
    "EMPTY_SET": lambda state, arg: _made(state, Opaque("set()")),
    "ADDITEMS": lambda state, arg: _since_mark(state).clear(),
    "MARK": _mark,
    "TUPLE": lambda state, arg: _made(state, tuple(_since_mark(state))),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _setitem,
    "SETITEMS": _setitems,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": lambda state, arg: _put(state, len(state.memo)),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "BUILD": _build,
    "BINPERSID": _persistent,
}


def load(stream: BinaryIO, label: str) -> Any:
    """The value of the pickle that starts at the stream's position; the stream stands behind it afterwards.

    Raises UnsafeInputError, naming every global that is not allowed or the limit that is passed, and FormatError for
    a pickle that is truncated or makes no sense. Nothing is imported and nothing of the file is called.
    """
    # Of a tensor's 7 objects 4 stay, and tensors stand in optimizers, too; a tensor takes four marks, a container one.
    state = _State(label=label, most=3 * limit("leaves"), deepest=4 * limit("depth"))
    problem: Exception | None = None
    try:
        for opcode, arg, _ in pickletools.genops(stream):
            handler = _MACHINE.get(opcode.name)
            if handler is None:
                raise _Malformed(f"the opcode {opcode.name}, which no checkpoint needs")
            handler(state, arg)
        if len(state.stack) != 1 or state.marks:
            raise _Malformed("values are left over at its end")
    except (_Malformed, ValueError, IndexError, KeyError, OverflowError, EOFError) as error:
        problem = error
    if state.refused:
        raise _unsafe(label, list(state.refused))
    if problem is not None:
        text = str(problem) if isinstance(problem, _Malformed) else "it is truncated or damaged"
        raise FormatError(f"{label}: its pickle cannot be read: {text}") from problem
    return state.stack[0]


def _unsafe(label: str, names: list[str]) -> UnsafeInputError:
    modules = [name for name in names if name.startswith(("torch.nn.modules.", "torch.jit.", "torch.fx."))]
    if modules:
        what = f"a pickled module ({escape(modules[0])}), which is code and not only weights"
    else:
        what = "objects whose classes would have to be imported and run"
    return UnsafeInputError(
        f"{label} holds {what}",
        [Failure("refused global", file=label, key=name) for name in names],
        next="Where the file was made, save the weights alone: torch.save(model.state_dict(), path), or .safetensors.",
    )
