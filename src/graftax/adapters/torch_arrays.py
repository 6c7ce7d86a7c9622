"""Tensors <-> NumPy arrays, bit for bit: bf16 and f8 are reinterpreted, never widened. Imports torch."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from graftax.adapters.jax_arrays import own
from graftax.errors import FormatError, PlanError, UsageError, escape, with_article
from graftax.tree import TensorSpec, dtypes

if TYPE_CHECKING:
    import numpy as np
    import torch

PAIRS = {"float4_e2m1fn_x2": "float4_e2m1fn"}
"""Torch dtypes that hold two codes in one element."""
NAMES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16"),
    *("float32", "float64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("complex64", "complex128"),
)
"""dtypes with the same name in torch and graftax."""


@cache
def torch_dtypes() -> dict[str, torch.dtype]:
    """name -> torch dtype, for the dtypes of the installed torch."""
    import torch

    return {name: getattr(torch, name) for name in NAMES if hasattr(torch, name)}


def spec_of_tensor(tensor: torch.Tensor) -> TensorSpec:
    """The spec of a tensor, without its values. FormatError for a tensor that is not plain and dense: quantized,
    sparse, nested, not yet initialised."""
    import torch

    if torch.nn.parameter.is_lazy(tensor):
        raise FormatError("has no shape yet (a lazy module): run the module once on an example")
    if tensor.is_quantized:
        raise FormatError(f"is quantized ({tensor.dtype}): use tensor.dequantize()")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise FormatError(f"is not a plain dense tensor ({tensor.layout}): use tensor.to_dense()")
    name = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(int(extent) for extent in tensor.shape)
    if name in PAIRS:
        return TensorSpec((*shape[:-1], shape[-1] * 2), PAIRS[name])
    if name not in torch_dtypes():
        raise FormatError(f"has dtype {escape(name)}, which a checkpoint cannot hold")
    return TensorSpec(shape, name)


def has_values(tensor: torch.Tensor) -> bool:
    """False for tensors on the meta device and for fake tensors."""
    return tensor.device.type != "meta" and type(tensor).__name__ != "FakeTensor"


def to_numpy(tensor: torch.Tensor, name: str = "") -> np.ndarray[Any, Any]:
    """The values as a read-only array, which is a view if the tensor is dense on the CPU; packed types as their bytes.

    PlanError for a tensor without values, FormatError for a tensor whose values are not in plain memory.
    """
    if not has_values(tensor):
        raise PlanError(f"{name or 'the tensor'} has a shape and a dtype, but no values (device {tensor.device})")
    spec = spec_of_tensor(tensor)
    if hasattr(tensor, "full_tensor"):  # a DTensor: gather its shards
        tensor = tensor.full_tensor()  # pyright: ignore
    try:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg()
        return _view(plain, spec)
    except (RuntimeError, NotImplementedError) as exc:  # a subclass without plain memory
        raise FormatError(
            f"{name or 'the tensor'}, {with_article(type(tensor).__name__)}, cannot be read: {escape(exc, 300)}"
        ) from exc


def _view(plain: torch.Tensor, spec: TensorSpec) -> np.ndarray[Any, Any]:
    import torch

    if spec.packed:
        view = plain.contiguous().view(torch.uint8).numpy().reshape(-1).view()
    elif spec.dtype in dtypes.NUMPY_OWN:
        view = plain.numpy().view()
    else:
        codes = torch.uint16 if spec.bits == 16 else torch.uint8
        view = plain.view(codes).numpy().view(dtypes.numpy_dtype(spec.dtype))
    view.flags.writeable = False
    return view


def to_torch(array: Any, like: Any = None, *, adopt: bool = False) -> torch.Tensor:
    """`array` (NumPy or jax) as a dense tensor of the same dtype, in its own memory, without gradient. It is on the
    device of `like` if that is a tensor with values, else on the CPU.

    adopt: the caller gives the array away, and it is used without a copy if possible. FormatError if the installed
    torch does not have the dtype.
    """
    import numpy as np
    import torch

    host = own(np.asarray(array), adopt)
    name = dtypes.dtype_name(host.dtype)
    dtype = torch_dtypes().get(name)
    if dtype is None:
        raise FormatError(f"torch {torch.__version__} has no dtype {name}")
    if name in dtypes.NUMPY_OWN:
        tensor = torch.from_numpy(host)
    else:
        codes = np.uint16 if host.dtype.itemsize == 2 else np.uint8
        tensor = torch.from_numpy(host.view(codes)).view(dtype)
    if isinstance(like, torch.Tensor) and has_values(like) and like.device.type != "cpu":
        return tensor.to(like.device)
    return tensor


def from_packed(array: Any, spec: TensorSpec, like: Any = None) -> torch.Tensor:
    """A tensor with two codes per element, from the bytes of a packed tensor."""
    import torch

    found = next((name for name, plain in PAIRS.items() if plain == spec.dtype and hasattr(torch, name)), None)
    if found is None or not spec.shape or spec.shape[-1] % 2:
        raise UsageError(f"torch {torch.__version__} cannot hold {spec}")
    raw = to_torch(array, like).reshape(*spec.shape[:-1], spec.shape[-1] // 2)
    return raw.view(getattr(torch, found))
