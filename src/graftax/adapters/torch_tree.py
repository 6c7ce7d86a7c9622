"""Torch: Modules (on the meta device too) and state_dicts."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from graftax.adapters import containers, jax_arrays, settings, torch_arrays, torch_containers
from graftax.errors import Failure, FormatError, GraftaxError, PlanError, UsageError, escape
from graftax.formats.torch_tree import metadata
from graftax.tree import Checkpoint, Module, TensorSpec, Trace, nearest

if TYPE_CHECKING:
    import torch


def open_module(module: torch.nn.Module, label: str) -> Checkpoint:
    """A torch Module: the keys of its state_dict, and the kind and settings of every module. FormatError for tensors
    that are not plain dense ones."""
    state = _tensors(module.state_dict(keep_vars=True))
    specs = _specs(state, label)
    return Checkpoint(
        label=label,
        side="torch",
        specs=specs,
        reader=_reader(state),
        modules=modules_of(module, specs),
        aliases=aliases_of(state),
        config=_config(module),
        buffers=frozenset(state) & {name for name, _ in module.named_buffers(remove_duplicate=False)},
        native=module,
        trace=lambda: _trace(module),
        rebuild=lambda arrays, sharding=None, adopt=False: rebuild_state(state, arrays, sharding, adopt),
    )


def open_state_dict(tree: Mapping[Any, Any], label: str) -> Checkpoint:
    """A state_dict, or the one that a training checkpoint holds. What is left out is in its metadata.

    PlanError where several containers could be meant; FormatError for tensors that are not plain dense ones.
    """
    chosen = torch_containers.choose(tree, label)
    state = chosen.tensors
    return Checkpoint(
        label=f"{label}::{chosen.container}" if chosen.container else label,
        side="torch",
        specs=_specs(state, label),
        reader=_reader(state),
        aliases=aliases_of(state),
        real_keys=chosen.real_keys,
        metadata=metadata(chosen.container, chosen.left),
        native=tree,
        rebuild=lambda arrays, sharding=None, adopt=False: rebuild_state(state, arrays, sharding, adopt),
    )


def is_torch_tree(tree: Any) -> bool:
    """Does a nest of mappings and lists hold a torch tensor?"""
    torch = sys.modules.get("torch")
    return torch is not None and _holds(tree, torch.Tensor, 0)


def _holds(node: Any, kind: type, depth: int) -> bool:
    if depth > containers.DEPTH:
        return False
    return any(
        not containers.is_plain_array(type(child)) and (isinstance(child, kind) or _holds(child, kind, depth + 1))
        for _, child in containers.children_of(node) or ()
    )


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Without `_extra_state`, counters and settings."""
    return {key: value for key, value in state.items() if containers.is_tensor(value)}


def _specs(state: Mapping[str, torch.Tensor], label: str) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    failures: list[Failure] = []
    for key, tensor in state.items():
        try:
            specs[key] = torch_arrays.spec_of_tensor(tensor)
        except GraftaxError as exc:
            failures.append(Failure(str(exc), key=key))
    if failures:
        raise FormatError(f"{escape(label)} has {len(failures)} tensors that no checkpoint can hold", failures)
    return specs


def _reader(state: Mapping[str, torch.Tensor]) -> Callable[[str], Any] | None:
    if state and not any(torch_arrays.has_values(tensor) for tensor in state.values()):
        return None
    return lambda key: torch_arrays.to_numpy(state[key], escape(key))


def aliases_of(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """key -> an earlier key that is the same memory, read the same way. Empty tensors are nobody's alias."""
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for key, tensor in state.items():
        if not tensor.numel():
            continue
        place = (_address(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if place in first:
            aliases[key] = first[place]
        else:
            first[place] = key
    return aliases


def _address(tensor: torch.Tensor) -> Any:
    """What tells one storage from another; a meta tensor's has no address, so its own identity."""
    if not torch_arrays.has_values(tensor):
        return "meta", tensor.untyped_storage()._cdata
    try:
        return str(tensor.device), tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # subclasses that wrap others have no storage
        return "object", id(tensor)


# ---------------------------------------------------------------- modules


def modules_of(module: torch.nn.Module, specs: Iterable[str]) -> dict[str, Module]:
    """Every module with its class, bases, settings and the leaves below it, in the order of registration."""
    found = dict(module.named_modules(remove_duplicate=False))
    below: dict[str, dict[str, str]] = {path: {} for path in found}
    for key in specs:
        parts = key.split(".")
        for i in range(len(parts)):
            leaves = below.get(".".join(parts[:i]))
            if leaves is not None:
                leaves[".".join(parts[i:])] = key
    return {path: _module(path, item, below[path]) for path, item in found.items()}


def _module(path: str, module: torch.nn.Module, leaves: dict[str, str]) -> Module:
    kind = type(module)
    if hasattr(module, "parametrizations"):  # torch puts a class of its own in front
        kind = kind.__mro__[1]
    name = getattr(module, "original_name", kind.__name__)  # of a scripted module
    plain = settings.collect((key, value) for key, value in vars(module).items() if key != "training")
    for role, value in [*module._parameters.items(), *module._buffers.items()]:
        plain.setdefault(role, value is not None)  # is there a bias?
    if hasattr(module, "parametrizations"):
        for role in module.parametrizations:  # pyright: ignore
            plain.setdefault(role, True)
    return Module(path, name if isinstance(name, str) else kind.__name__, settings.bases(kind), plain, leaves)


def _trace(module: torch.nn.Module) -> Trace:
    from graftax.adapters import torch_trace

    return torch_trace.trace_module(module)


def _config(module: torch.nn.Module) -> Mapping[str, Any] | None:
    """The module's own config as the config.json that it would be saved with."""
    config = getattr(module, "config", None)
    as_dict = getattr(config, "to_dict", None)
    made = as_dict() if callable(as_dict) and not isinstance(config, type) else None
    return made if isinstance(made, Mapping) else None


# ---------------------------------------------------------------- back


def rebuild_state(
    state: Mapping[str, torch.Tensor], arrays: Mapping[str, Any], sharding: Any = None, adopt: bool = False
) -> Any:
    """An OrderedDict of tensors with the keys of `state`; where it has one tensor under two keys and their new values
    are equal, so does the result. Their dtypes are those of `arrays`, as a plan has settled them. sharding="host" gives
    NumPy arrays. adopt: see `jax_arrays`.

    PlanError for a key or an array that does not fit.
    """
    check_fit(state, arrays, any_dtype=True)
    shared = aliases_of(state)
    make = maker(sharding, adopt)
    out: OrderedDict[str, Any] = OrderedDict()
    for key, old in state.items():
        if key not in arrays:
            continue
        first = shared.get(key)
        if first in out and _same(arrays[first], arrays[key]):
            out[key] = out[first]
        else:
            out[key] = make(key, old, arrays[key])
    return out


def _same(a: Any, b: Any) -> bool:
    """Bit for bit, NaN and all."""
    import numpy as np

    first, second = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a is b or (first.dtype == second.dtype and first.tobytes() == second.tobytes())


def maker(sharding: Any = None, adopt: bool = False) -> Callable[[str, Any, Any], Any]:
    """How new tensors are made."""
    given = jax_arrays.once(adopt)

    def make(key: str, old: Any, new: Any) -> Any:
        if sharding == "host":
            return jax_arrays.own(new, given(new))
        spec = torch_arrays.spec_of_tensor(old)
        if spec.packed:
            return torch_arrays.from_packed(new, spec, old)
        return torch_arrays.to_torch(new, old, adopt=given(new))

    return make


def check_fit(state: Mapping[str, torch.Tensor], arrays: Mapping[str, Any], any_dtype: bool = False) -> None:
    """Is every array of a key that exists, and of its shape and dtype? PlanError that lists what is not."""
    from graftax import dtypes

    failures: list[Failure] = []
    for key, array in arrays.items():
        if key not in state:
            near = nearest(key, state)
            failures.append(Failure("no such tensor", key=key, next=f"Near: {near}" if near else ""))
            continue
        spec = torch_arrays.spec_of_tensor(state[key])
        if spec.packed and tuple(getattr(array, "shape", ())) == (spec.nbytes,):
            continue
        given = torch_arrays.spec_of_tensor(array) if containers.is_tensor(array) else dtypes.spec_of(array)
        if given.shape != spec.shape or (given.dtype != spec.dtype and not any_dtype):
            failures.append(Failure("another shape or dtype", key=key, expected=str(spec), found=str(given)))
    if failures:
        raise PlanError(f"{len(failures)} of {len(arrays)} arrays do not fit the module", failures)


def map_state(tree: Mapping[Any, Any], arrays: Mapping[str, Any]) -> Any:
    """A state_dict (or the dict around it) of the same type, order and attributes with other tensors at the keys of
    `arrays`, on the old ones' devices; every other value is the same object."""
    chosen = torch_containers.choose(tree, "the state_dict")
    check_fit(chosen.tensors, arrays)
    return torch_containers.replaced(
        tree, {chosen.places[key]: _like_old(chosen.tensors[key], array) for key, array in arrays.items()}
    )


def map_module(module: torch.nn.Module, arrays: Mapping[str, Any]) -> Any:
    """The state_dict of a Module with other tensors at the keys of `arrays`; the Module is not changed."""
    state = module.state_dict()
    check_fit(_tensors(state), arrays)
    return torch_containers.replaced(state, {(key,): _like_old(state[key], array) for key, array in arrays.items()})


def leaf_table(tree: Any) -> dict[str, torch.Tensor]:
    """key -> tensor of a Module or a state_dict."""
    import torch

    if isinstance(tree, torch.nn.Module):
        return _tensors(tree.state_dict(keep_vars=True))
    return torch_containers.choose(tree, "the state_dict").tensors


def _like_old(old: torch.Tensor, new: Any) -> torch.Tensor:
    """A new tensor, a copy, on the device of the old one, and a Parameter where that is one."""
    import torch

    spec = torch_arrays.spec_of_tensor(old)
    made = torch_arrays.from_packed(new, spec, old) if spec.packed else torch_arrays.to_torch(new, old)
    return torch.nn.Parameter(made, old.requires_grad) if isinstance(old, torch.nn.Parameter) else made


def assign_module(module: torch.nn.Module, arrays: Mapping[str, Any]) -> None:
    """Copy `arrays` into a Module's parameters and buffers in place; tensors, optimizers and hooks stay theirs.

    Everything is checked and every tensor made before the first is written; an interrupt waits for the last.
    """
    import torch

    state = _tensors(module.state_dict(keep_vars=True))
    check_fit(state, arrays)
    stuck = [Failure(why, key=key) for key in arrays if (why := _not_writable(state[key]))]
    if stuck:
        raise UsageError(
            f"{len(stuck)} tensors cannot be written in place",
            stuck,
            next="gx.port(source, module) gives a state_dict.",
        )
    differ = [
        Failure(f"is the same memory as {escape(first)}, and is given other values", key=key)
        for key, first in aliases_of(state).items()
        if key in arrays and first in arrays and not _same(arrays[key], arrays[first])
    ]
    if differ:
        raise PlanError(f"{len(differ)} tied tensors would take two values", differ)
    make = maker()
    jobs = [(state[key], make(key, state[key], array)) for key, array in arrays.items()]
    interrupted: KeyboardInterrupt | None = None
    with torch.no_grad():
        for target, new in jobs:
            try:
                target.copy_(new)
            except KeyboardInterrupt as exc:
                interrupted = exc
                target.copy_(new)
    if interrupted is not None:
        raise interrupted


def _not_writable(tensor: torch.Tensor) -> str:
    import torch

    if not torch_arrays.has_values(tensor):
        return "has no values (device meta): use module.to_empty(device='cpu') first"
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was made under torch.inference_mode"
    if any(step == 0 and extent > 1 for step, extent in zip(tensor.stride(), tensor.shape, strict=True)):
        return "is expanded: several elements are one place in memory"
    return ""
