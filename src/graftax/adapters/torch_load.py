"""Load arrays into a live torch Module in place: through its own `load_state_dict`, then read back bit for bit; on any
difference nothing is loaded.

A Module's state_dict may hold anything: copies, other names, values that a hook changes. Only a trial shows what the
Module accepts: its hooks run as for every checkpoint, then its state_dict is read again. If it differs from what was
loaded, every parameter, buffer and attribute is restored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from graftax.adapters import torch_arrays, torch_tree
from graftax.errors import Failure, PlanError, UsageError, escape
from graftax.tree.dtypes import same_bits

if TYPE_CHECKING:
    import torch


def assign_module(module: torch.nn.Module, arrays: Mapping[str, Any], given: bool = False) -> None:
    """Load `arrays` (key of the state_dict -> array) into a Module in place. Optimizers and hooks stay as they are.

    Everything is checked and every tensor made before the first is written; an interrupt waits until the last is
    written. given: the arrays may be used without a copy.

    Raises PlanError for arrays that do not fit or do not read back as loaded, UsageError for tensors that cannot be
    written. After an error the Module is unchanged.
    """
    state = torch_tree.tensors_of(module)
    torch_tree.check_fit(state, arrays)
    stuck = [Failure(why, key=key) for key in arrays if (why := _not_writable(state[key]))]
    if stuck:
        raise UsageError(
            f"{len(stuck)} tensors cannot be written in place",
            stuck,
            next="gx.port(source, module) returns a state_dict.",
        )
    differ = [
        Failure(f"shares memory with {escape(first)}, but gets other values", key=key)
        for key, first in torch_tree.aliases_of(state).items()
        if key in arrays and first in arrays and not torch_tree.same_values(arrays[key], arrays[first])
    ]
    if differ:
        raise PlanError(f"{len(differ)} tied tensors would take two values", differ)
    make = torch_tree.maker(adopt=given)
    new = {key: make(key, state[key], array) for key, array in arrays.items()}
    _load(module, state, new)


def _not_writable(tensor: torch.Tensor) -> str:
    import torch

    if not torch_arrays.has_values(tensor):
        return "has no values (device meta): use module.to_empty(device='cpu') first"
    if hasattr(tensor, "full_tensor"):
        return "is a DTensor, whose shards lie in several processes: use torch.distributed.checkpoint.state_dict"
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was made under torch.inference_mode"
    if any(step == 0 and extent > 1 for step, extent in zip(tensor.stride(), tensor.shape, strict=True)):
        return "is expanded: several elements share one place in memory"
    return ""


# ---------------------------------------------------------------- loading


def _load(module: torch.nn.Module, state: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> None:
    """Try each way of loading until the state_dict reads back as `new`."""
    before = _Before.of(module)
    failures: list[Failure] = []
    interrupts: list[KeyboardInterrupt] = []
    try:
        for way in _ways(module, state, new):
            failures = _tried(module, way, new, interrupts)
            if not failures:
                break
            before.restore()
    except BaseException:
        before.restore()
        raise
    if interrupts:
        raise interrupts[0]
    if failures:
        raise PlanError(
            f"nothing was loaded into the {escape(type(module).__name__)}: it does not accept its own state_dict",
            [*_overlaps(state, new), *failures],
            next="gx.port(source, module) returns the state_dict: load it in the module's own way.",
        )


def _ways(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]
) -> Iterator[Mapping[str, Any]]:
    """The state_dicts that a Module may accept: one like its own and, if hooks rename keys on saving, one with the
    names of its parameters and buffers, provided that each tensor is known to be one of these."""
    whole: Any = copy.copy(torch_tree.state_of(module))  # keep its `_metadata`, which hooks read
    for key, tensor in new.items():
        whole[key] = tensor
    yield whole
    names = torch_tree.own_names(module, state)
    if all(key in names for key in new) and any(names[key] != (key,) for key in new):
        yield {name: tensor for key, tensor in new.items() for name in names[key]}


def _tried(
    module: torch.nn.Module,
    way: Mapping[str, Any],
    new: Mapping[str, torch.Tensor],
    interrupts: list[KeyboardInterrupt],
) -> list[Failure]:
    """What went wrong; empty if everything reads back as loaded. Keys that the Module omits from its state_dict are
    missing here too, so loading is not strict; reading back is."""
    load: Callable[..., Any] = module.load_state_dict
    options = torch_tree.taken(load, strict=False)
    try:
        try:
            load(way, **options)
        except KeyboardInterrupt as exc:
            interrupts.append(exc)
            load(way, **options)
        return _not_loaded(module, new)
    except Exception as exc:  # from the user's hooks, or torch's list of mismatches
        return [Failure(f"load_state_dict failed: {type(exc).__name__}: {escape(exc, 600)}")]


def _not_loaded(module: torch.nn.Module, new: Mapping[str, torch.Tensor]) -> list[Failure]:
    """The keys whose tensors in the state_dict differ from the new ones in any bit."""
    now = torch_tree.tensors_of(module)
    failures: list[Failure] = []
    for key, tensor in new.items():
        if key not in now:
            failures.append(Failure("is no longer in the state_dict", key=key))
        elif not same_bits(torch_arrays.to_numpy(now[key], key), torch_arrays.to_numpy(tensor, key)):
            failures.append(Failure("does not read back as loaded", key=key))
    return failures


def _overlaps(state: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> list[Failure]:
    """A failure for each tensor that shares part of its memory with another, because their new values may differ
    there."""
    spans = sorted(
        (*torch_tree.span_of(state[key]), key) for key in new if state[key].numel() and not state[key].is_meta
    )
    out: list[Failure] = []
    for (store, _, end, first), (other, start, _, key) in pairwise(spans):
        if store == other and start < end:
            text = f"overlaps in memory with {escape(first)}, where their new values differ"
            out.append(Failure(text, key=key, next="Give each its own memory: p.data = p.data.clone()."))
    return out


# ---------------------------------------------------------------- the state before loading


@dataclass(frozen=True, slots=True)
class _Before:
    """A Module's attributes, and the values of all its tensors. The copies need as much memory as the Module."""

    attributes: list[tuple[torch.nn.Module, dict[str, Any]]]
    tensors: list[tuple[torch.nn.Module, str, torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, module: torch.nn.Module) -> _Before:
        import torch

        attributes: list[tuple[torch.nn.Module, dict[str, Any]]] = []
        tensors: list[tuple[torch.nn.Module, str, torch.Tensor, torch.Tensor]] = []
        copies: dict[int, torch.Tensor] = {}
        for part in module.modules():
            attributes.append((part, dict(vars(part))))
            plain = ((name, value) for name, value in vars(part).items() if isinstance(value, torch.Tensor))
            own = *part.named_parameters(recurse=False), *part.named_buffers(recurse=False), *plain
            for name, tensor in own:
                if id(tensor) not in copies:
                    copies[id(tensor)] = tensor.detach().clone()
                tensors.append((part, name, tensor, copies[id(tensor)]))
        return cls(attributes, tensors)

    def restore(self) -> None:
        import torch

        for part, held in self.attributes:  # including values that hooks derive from weights
            now = vars(part)
            for name in now.keys() - held.keys():
                del now[name]
            now.update(held)
        with torch.no_grad():
            for part, name, tensor, old in self.tensors:
                if getattr(part, name, None) is not tensor and not isinstance(part, torch.jit.ScriptModule):
                    setattr(part, name, tensor)
                if not tensor.is_meta:
                    tensor.copy_(old)
