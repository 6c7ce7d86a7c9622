"""Torch Modules (also on the meta device) and state_dicts as checkpoints, and back."""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from graftax.adapters import containers, jax_arrays, settings, torch_arrays, torch_containers
from graftax.errors import Failure, FormatError, GraftaxError, PlanError, escape
from graftax.tree import Checkpoint, Live, Module, Storage, TensorSpec, Trace, nearest
from graftax.tree.torch_nest import metadata

if TYPE_CHECKING:
    import torch


def open_module(module: torch.nn.Module, label: str) -> Checkpoint:
    """A torch Module: the keys of its state_dict, and the class and settings of every module. FormatError for tensors
    that are not plain and dense."""
    state = tensors_of(module)
    specs = _specs(state, label)
    names = own_names(module, state)
    own = {key: names[key][0] for key in names}
    return Checkpoint(
        label=label,
        side="torch",
        specs=specs,
        storage=Storage(reader=_reader(state), aliases=aliases_of(state)),
        live=Live(
            modules=modules_of(module, specs, own),
            buffers=_buffers(module, state, own),
            object=module,
            trace=lambda: _trace(module),
            rebuild=lambda arrays, sharding=None, adopt=False: rebuild_state(state, arrays, sharding, adopt),
        ),
        config=_config(module),
    )


def open_state_dict(tree: Mapping[Any, Any], label: str) -> Checkpoint:
    """A state_dict, or the one that a training checkpoint holds. Its metadata list what is left out.

    PlanError if several containers are possible; FormatError for tensors that are not plain and dense.
    """
    chosen = torch_containers.choose(tree, label)
    state = chosen.tensors
    return Checkpoint(
        label=f"{label}::{chosen.container}" if chosen.container else label,
        side="torch",
        specs=_specs(state, label),
        storage=Storage(
            reader=_reader(state),
            aliases=aliases_of(state),
            metadata=metadata(chosen.container, chosen.left),
        ),
        live=Live(
            object=tree,
            rebuild=lambda arrays, sharding=None, adopt=False: rebuild_state(state, arrays, sharding, adopt),
        ),
        real_keys=chosen.real_keys,
        left=chosen.left,
        chosen=True,
    )


def is_torch_tree(tree: Any) -> bool:
    """True if a nest of mappings and lists holds a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and _holds(tree, torch.Tensor, 0)


def _holds(node: Any, kind: type, depth: int) -> bool:
    if depth > containers.DEPTH:
        return False
    return any(
        not containers.is_plain_array(type(child)) and (isinstance(child, kind) or _holds(child, kind, depth + 1))
        for _, child in containers.children_of(node) or ()
    )


def state_of(module: torch.nn.Module, keep_vars: bool = False) -> Mapping[str, Any]:
    """The state_dict, also from overrides that do not accept `keep_vars`."""
    return module.state_dict(**taken(module.state_dict, keep_vars=keep_vars))


def taken(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The `options` that an override of torch's method accepts."""
    known = inspect.signature(function).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    return {name: value for name, value in options.items() if anything or name in known}


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a Module's state_dict, as its own Parameters if it returns them; see `_tensors`."""
    return _tensors(state_of(module, keep_vars=True))


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors without `_extra_state`, counters and settings. FormatError for quantized weights packed into a
    tuple."""
    packed = [key for key, value in state.items() if _holds_quantized(value)]
    if packed:
        failures = [
            Failure("holds quantized weights", key=key, next="Port the model before quantizing it.") for key in packed
        ]
        raise FormatError(f"{len(packed)} entries of the state_dict are not plain tensors", failures)
    return {key: value for key, value in state.items() if containers.is_tensor(value)}


def _holds_quantized(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and any(containers.is_tensor(item) and item.is_quantized for item in value)


def own_names(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """key of the state_dict -> the names of the Parameters and buffers that are this same tensor, its own name first. A
    key whose tensor is a copy, or another view, is left out."""
    import torch

    places: dict[Any, list[str]] = {}
    own: list[tuple[str, torch.Tensor]] = [*module.named_parameters(remove_duplicate=False)]
    own += module.named_buffers(remove_duplicate=False)
    for name, tensor in own:
        if not torch.nn.parameter.is_lazy(tensor):
            places.setdefault(_place(tensor), []).append(name)
    found = {key: places.get(_place(tensor), []) for key, tensor in state.items()}
    return {key: tuple(sorted(names, key=lambda name: name != key)) for key, names in found.items() if names}


def _buffers(module: torch.nn.Module, state: Mapping[str, torch.Tensor], own: Mapping[str, str]) -> frozenset[str]:
    names = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return frozenset(key for key in state if own.get(key, key) in names)


def _specs(state: Mapping[str, torch.Tensor], label: str) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    failures: list[Failure] = []
    for key, tensor in state.items():
        try:
            specs[key] = torch_arrays.spec_of_tensor(tensor)
        except GraftaxError as exc:
            failures.append(Failure(str(exc), key=key))
    if failures:
        raise FormatError(f"{escape(label)} has {len(failures)} tensors that a checkpoint cannot hold", failures)
    return specs


def _reader(state: Mapping[str, torch.Tensor]) -> Callable[[str], Any] | None:
    if state and not any(torch_arrays.has_values(tensor) for tensor in state.values()):
        return None
    return lambda key: torch_arrays.to_numpy(state[key], escape(key))


def aliases_of(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """key -> an earlier key with the same memory, read the same way. Empty tensors have no alias."""
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for key, tensor in state.items():
        if not tensor.numel():
            continue
        place = _place(tensor)
        if place in first:
            aliases[key] = first[place]
        else:
            first[place] = key
    return aliases


def _place(tensor: torch.Tensor) -> Any:
    """Where a tensor's values are, and how they are read. An empty tensor has a place of its own."""
    if not tensor.numel():
        return "empty", id(tensor)
    return _address(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def span_of(tensor: torch.Tensor) -> tuple[str, int, int]:
    """(storage, first byte, byte after the last) of a tensor that has values."""
    last = sum((extent - 1) * step for extent, step in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = tensor.storage_offset() * tensor.element_size(), tensor.element_size()
    return str(_address(tensor)), int(start), int(start + last * size + size)


def _address(tensor: torch.Tensor) -> Any:
    """A value that identifies a storage. A meta tensor has no address, so its identity is used."""
    if not torch_arrays.has_values(tensor):
        return "meta", tensor.untyped_storage()._cdata
    try:
        return str(tensor.device), tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # subclasses that wrap others have no storage
        return "object", id(tensor)


# ---------------------------------------------------------------- modules


def modules_of(
    module: torch.nn.Module, specs: Iterable[str], own: Mapping[str, str] | None = None
) -> dict[str, Module]:
    """Every module with its class, bases, settings and the leaves below it, in the order of registration. own: key ->
    the module's own name for the tensor, if a hook saves it under another."""
    found = dict(module.named_modules(remove_duplicate=False))
    below: dict[str, dict[str, str]] = {path: {} for path in found}
    for key in specs:
        parts = (own or {}).get(key, key).split(".")
        for i in range(len(parts)):
            leaves = below.get(".".join(parts[:i]))
            if leaves is not None:
                leaves[".".join(parts[i:])] = key
    copied = {key.rpartition(".")[0] for key in specs if own is not None and key not in own}
    return {path: _module(path, item, below[path], path in copied) for path, item in found.items()}


def _module(path: str, module: torch.nn.Module, leaves: dict[str, str], copied: bool) -> Module:
    """copied: the state_dict gives other tensors than the module holds, possibly in another layout."""
    kind = type(module)
    if hasattr(module, "parametrizations"):  # torch puts its own class in front
        kind = kind.__mro__[1]
    name = getattr(module, "original_name", kind.__name__)  # the class name of a scripted module
    plain = settings.collect((key, value) for key, value in vars(module).items() if key != "training")
    for role, value in [*module._parameters.items(), *module._buffers.items()]:
        plain.setdefault(role, value is not None)  # whether it has a bias
    if hasattr(module, "parametrizations"):
        for role in module.parametrizations:  # pyright: ignore
            plain.setdefault(role, True)
    name = name if isinstance(name, str) else kind.__name__
    bases = settings.bases(kind)
    calls, own_math = settings.calls_of(kind, vars(module), _hooks(module))
    if copied:
        calls, own_math = (f"{bases[0]}.state_dict", *calls), True
    return Module(path, name, bases, plain, leaves, calls, own_math, settings.code_of(kind))


def _hooks(module: torch.nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _trace(module: torch.nn.Module) -> Trace:
    from graftax.adapters import torch_trace

    return torch_trace.trace_module(module)


def _config(module: torch.nn.Module) -> Mapping[str, Any] | None:
    """The module's own config, as the config.json that saving it would write."""
    config = getattr(module, "config", None)
    as_dict = getattr(config, "to_dict", None)
    made = as_dict() if callable(as_dict) and not isinstance(config, type) else None
    return made if isinstance(made, Mapping) else None


# ---------------------------------------------------------------- back


def rebuild_state(
    state: Mapping[str, torch.Tensor], arrays: Mapping[str, Any], sharding: Any = None, adopt: bool = False
) -> Any:
    """An OrderedDict of tensors with the keys of `state`. If `state` has one tensor under two keys and their new values
    are equal, the result does too. Dtypes are those of `arrays`, as the plan decided. sharding="host" gives NumPy
    arrays. adopt: see `jax_arrays`.

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
        if first in out and same_values(arrays[first], arrays[key]):
            out[key] = out[first]
        else:
            out[key] = make(key, old, arrays[key])
    return out


def same_values(a: Any, b: Any) -> bool:
    """True if equal bit for bit, including NaN."""
    import numpy as np

    from graftax.tree.dtypes import same_bits

    return a is b or same_bits(np.asarray(a), np.asarray(b))


def maker(sharding: Any = None, adopt: bool = False) -> Callable[[str, Any, Any], Any]:
    """A function that makes new tensors."""
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
    """PlanError unless every array belongs to an existing key and has its shape and dtype; it lists all that do not."""
    from graftax.tree import dtypes

    failures: list[Failure] = []
    for key, array in arrays.items():
        if key not in state:
            near = nearest(key, state)
            failures.append(Failure("unexpected key", key=key, next=f"Near: {near}" if near else ""))
            continue
        spec = torch_arrays.spec_of_tensor(state[key])
        if spec.packed and tuple(getattr(array, "shape", ())) == (spec.nbytes,):
            continue
        given = torch_arrays.spec_of_tensor(array) if containers.is_tensor(array) else dtypes.spec_of(array)
        if given.shape != spec.shape or (given.dtype != spec.dtype and not any_dtype):
            failures.append(Failure("shape or dtype mismatch", key=key, expected=str(spec), found=str(given)))
    if failures:
        raise PlanError(f"{len(failures)} of {len(arrays)} arrays do not fit the module", failures)


def map_state(tree: Mapping[Any, Any], arrays: Mapping[str, Any]) -> Any:
    """A state_dict (or the dict around it) of the same type, order and attributes, with new tensors at the keys of
    `arrays`, on the devices of the old ones. Every other value is the same object."""
    chosen = torch_containers.choose(tree, "the state_dict")
    check_fit(chosen.tensors, arrays)
    return torch_containers.replaced(
        tree, {chosen.places[key]: _like_old(chosen.tensors[key], array) for key, array in arrays.items()}
    )


def map_module(module: torch.nn.Module, arrays: Mapping[str, Any]) -> Any:
    """The state_dict of a Module with new tensors at the keys of `arrays`. The Module does not change."""
    state = state_of(module)
    check_fit(_tensors(state), arrays)
    return torch_containers.replaced(state, {(key,): _like_old(state[key], array) for key, array in arrays.items()})


def leaf_table(tree: Any) -> dict[str, torch.Tensor]:
    """key -> tensor of a Module or a state_dict."""
    import torch

    if isinstance(tree, torch.nn.Module):
        return tensors_of(tree)
    return torch_containers.choose(tree, "the state_dict").tensors


def _like_old(old: torch.Tensor, new: Any) -> torch.Tensor:
    """A new tensor, as a copy, on the device of the old one; a Parameter if the old one is."""
    import torch

    spec = torch_arrays.spec_of_tensor(old)
    made = torch_arrays.from_packed(new, spec, old) if spec.packed else torch_arrays.to_torch(new, old)
    return torch.nn.Parameter(made, old.requires_grad) if isinstance(old, torch.nn.Parameter) else made
