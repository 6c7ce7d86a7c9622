"""The inert values of a pickle of tensors: records for tensors, storages and objects, and the results of torch's own
functions. Nothing is imported and nothing is called.

Sources: the arguments of the torch functions were read from what torch.save of torch 1.x to 2.13 writes. The tests
compare every reading with torch.load(weights_only=True).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from graftax.errors import Failure, UnsafeInputError, escape, with_article

# torch storage class -> (dtype, bytes of an element). None: a type that a flat tree cannot hold.
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

_NO_WEIGHTS = {  # torch dtypes that a pickle may name beside weights; a tensor of one is refused
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
class TorchStorage:
    """Bytes outside the pickle. `start` and `nbytes` are a window into record `key`, which has `total` bytes."""

    key: str
    kind: str
    start: int
    nbytes: int
    total: int


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A strided view of a storage; `offset` and `strides` count elements. `conj`, `neg`: torch's lazy bits."""

    storage: TorchStorage
    dtype: str
    itemsize: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conj: bool = False
    neg: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class RefusedTensor:
    """A tensor that a flat tree cannot hold: `kind` is "quantized", "sparse", "meta", ...; `detail` is its scheme."""

    dtype: ClassVar[str] = ""  # among tensors it is asked for its dtype and shape: it has neither
    shape: ClassVar[None] = None
    kind: str
    detail: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class OpaqueValue:
    """Any other value that torch's own reader allows beside weights: a device, a layout, a set."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Object:
    """An object of a class that torch's own reader does not know: the name of the class, and what the pickle gives
    it."""

    name: str
    held: list[Any] = field(default_factory=list[Any])


class Malformed(Exception):
    """The pickle does not make sense; `load` turns it into a FormatError with the file's name."""


def is_foreign(value: Any) -> bool:
    """True for an object, class or function that torch's own reader does not know."""
    return isinstance(value, Object) or (isinstance(value, Global) and value.name not in ALLOWED)


def objects_in(value: Any) -> tuple[list[str], int]:
    """(names of the foreign classes, number of tensors) in an inert value. Each part is visited once."""
    names: dict[str, None] = {}
    tensors = 0
    seen: set[int] = set()
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, (Tensor, RefusedTensor)):
            tensors += id(part) not in seen
        elif is_foreign(part):
            names[part.name] = None
        if id(part) not in seen and isinstance(part, (dict, list, tuple, Object)):
            todo.extend(reversed(children(part)))
        seen.add(id(part))
    return list(names), tensors


def children(value: dict[Any, Any] | list[Any] | tuple[Any, ...] | Object) -> list[Any]:
    """The values that a container or an object holds."""
    if isinstance(value, Object):
        return value.held
    return list(value.values() if isinstance(value, dict) else value)


def brief(value: Any) -> str:
    """A value for a message. A container is shown by its type alone, because its text can be exponentially long."""
    return escape(value, 40) if isinstance(value, (str, int, float, bytes)) else type(value).__name__


# ---------------------------------------------------------------- what may be called


def _ints(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or any(type(item) is not int for item in value):
        raise Malformed(f"{brief(value)} is not a shape or stride")
    return tuple(value)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None, bits: Any = None) -> Any:
    if isinstance(storage, RefusedTensor):
        return storage
    if not isinstance(storage, TorchStorage) or type(offset) is not int:
        raise Malformed("a tensor without a storage")
    if dtype is None:
        name, itemsize = STORAGES[storage.kind]
    else:
        short = dtype.name.removeprefix("torch.") if isinstance(dtype, Global) else ""
        name, itemsize = DTYPES.get(short, (None, 1))
    if name is None:
        found = dtype.name if isinstance(dtype, Global) else f"torch.{storage.kind}"
        return RefusedTensor("quantized" if "Q" in storage.kind else "dtype", found)
    bits = bits or {}
    if not isinstance(bits, dict) or set(bits) - {"conj", "neg"}:
        return RefusedTensor("subclass", "a plain tensor with a state of its own")
    shape, strides = _ints(shape), _ints(strides)
    if len(shape) != len(strides):
        raise Malformed(f"a tensor with {len(shape)} extents and {len(strides)} strides")
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
    if not isinstance(data, (Tensor, RefusedTensor)):
        raise Malformed("a parameter without a tensor")
    return data


def _typed(function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """A tensor with attributes of its own (they are dropped), or of a subclass."""
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise Malformed("the type of a tensor is not a class")
    plain = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
    if not isinstance(kind, Global) or kind.name not in plain:
        return RefusedTensor("subclass", kind.name if isinstance(kind, Global) else "")
    return CALLS[function.name](*args) if function.name in CALLS else RefusedTensor("subclass", function.name)


def _quantized(storage: Any, offset: Any, shape: Any, strides: Any, scheme: Any = None, *_: Any) -> RefusedTensor:
    first = scheme[0] if isinstance(scheme, tuple) and scheme else None
    return RefusedTensor("quantized", first.name if isinstance(first, Global) else "")


def _ordered(items: Any = ()) -> dict[Any, Any]:
    if isinstance(items, dict):
        return dict(items)
    out: dict[Any, Any] = {}
    for item in items:
        if not isinstance(item, (list, tuple)) or len(item) != 2:
            raise Malformed("a dict is made of items that are not pairs")
        set_item(out, item[0], item[1])
    return out


def _defaultdict(factory: Any = None, *_: Any) -> dict[Any, Any]:
    return {}


def set_item(target: Any, key: Any, value: Any) -> None:
    """`target[key] = value`, for keys that are cheap to hash."""
    if isinstance(target, OpaqueValue):
        return
    if isinstance(target, Object):
        target.held.append(value)
        return
    if not isinstance(target, dict):
        raise Malformed("an item is set on a value that is not a dict")
    if (
        (isinstance(key, tuple) and len(key) <= 64 and all(isinstance(part, (str, int, float)) for part in key))
        or key is None
        or isinstance(key, (str, int, float, bytes, Global, OpaqueValue, Object))
    ):
        target[key] = value
    else:  # nested tuples can take exponential time to hash
        raise Malformed(f"{with_article(type(key).__name__.lower())} as a key")


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise Malformed("bytes are in an encoding other than latin1")
    return text.encode("latin1")


def _size(items: Any = ()) -> tuple[int, ...]:
    return _ints(items)


def _aside(kind: str) -> Callable[..., Any]:
    return lambda *args: RefusedTensor(kind)


def _opaque(name: str) -> Callable[..., Any]:
    return lambda *args: OpaqueValue(f"{name}({', '.join(map(brief, args[:2]))})")


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "collections.Counter": _ordered,
    "collections.defaultdict": _defaultdict,
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


def unsafe_pickle(label: str, names: list[str], where: list[Failure] | None = None) -> UnsafeInputError:
    """The error for a file whose weights cannot be read without these classes or functions; `where` lists the places
    that need them."""
    modules = [name for name in names if name.startswith(("torch.nn.modules.", "torch.jit.", "torch.fx."))]
    if modules:
        what = f"a pickled module ({escape(modules[0])}), which is code and not only weights"
    else:
        what = "objects whose classes would have to be imported and run"
    return UnsafeInputError(
        f"{label} holds {what}",
        [*(where or ()), *(Failure("refused global", file=label, key=name) for name in names)],
        next="Where the file was made, save the weights alone: torch.save(model.state_dict(), path), or .safetensors.",
    )
