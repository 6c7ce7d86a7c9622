"""Find the weights in a live nest of torch tensors: the same result that the .pt reader gives for a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from graftax.adapters import containers
from graftax.errors import FormatError, PlanError, UsageError, escape
from graftax.tree import Key, inert, torch_nest

if TYPE_CHECKING:
    import torch


_NOWHERE = inert.TorchStorage("", "", 0, 0, 0)


@dataclass(frozen=True, slots=True)
class LiveWeights:
    """The weights of a nest: name -> tensor; name -> its keys from the top; the name of the container; keys that are
    not text; and what was left out (name -> what it is)."""

    tensors: dict[str, torch.Tensor]
    places: dict[str, tuple[Any, ...]]
    container: str
    real_keys: dict[str, Key]
    left: dict[str, str]


def choose(tree: Mapping[Any, Any], label: str) -> LiveWeights:
    """The state_dict in `tree`: the tree itself, or its only container of weights.

    Raises PlanError if several containers are possible (each is named) and for quantized tensors; FormatError for
    tensors that are not plain and dense.
    """
    found: dict[int, tuple[torch.Tensor, tuple[Any, ...]]] = {}
    proxies: list[Any] = []  # keeps them alive, so that no id is reused
    others: list[tuple[Any, ...]] = []

    def proxy(node: Any, keys: tuple[Any, ...]) -> Any:
        if len(keys) > containers.DEPTH:
            raise FormatError(f"{escape(label)} is nested deeper than {containers.DEPTH} levels")
        if containers.is_tensor(node):
            made = _proxy_of(node)
            found[id(made)] = (node, keys)
            proxies.append(made)
            return made
        if isinstance(node, Mapping):
            return {key: proxy(child, (*keys, key)) for key, child in node.items()}
        if isinstance(node, (list, tuple)):
            return [proxy(child, (*keys, index)) for index, child in enumerate(node)]
        if containers.is_array(node) and node.shape:
            others.append(keys)
        return (
            node
            if node is None or isinstance(node, (bool, int, float, str))
            else inert.OpaqueValue(type(node).__name__)
        )

    root = proxy(tree, ())
    try:
        chosen = torch_nest.choose(root, None, label)
    except PlanError as exc:
        if not all(failure.key.startswith(f"{label}::") for failure in exc.failures):
            raise
        failures = [replace(failure, key=failure.key.removeprefix(f"{label}::")) for failure in exc.failures]
        raise PlanError(
            f"{escape(label)} holds weights in {len(failures)} containers", failures, next="Pass one of them."
        ) from None
    pairs = {name: found[id(made)] for name, made in chosen.tensors.items()}
    within = {keys[:-1] for _, keys in pairs.values()}
    mixed = [keys for keys in others if keys[:-1] in within]
    if mixed:
        raise UsageError(
            f"{escape(label)} mixes torch tensors with other arrays, for example "
            f"{escape('.'.join(map(str, mixed[0])))}",
            next="Convert them to tensors, or pass them separately.",
        )
    return LiveWeights(
        {name: tensor for name, (tensor, _) in pairs.items()},
        {name: keys for name, (_, keys) in pairs.items()},
        chosen.container,
        chosen.real_keys,
        chosen.left,
    )


def _proxy_of(tensor: torch.Tensor) -> inert.Tensor | inert.RefusedTensor:
    """The record that the .pt reader makes for a tensor. The place of its values does not matter here."""
    import torch

    if tensor.is_quantized:
        return inert.RefusedTensor("quantized", str(tensor.dtype))
    if tensor.layout is not torch.strided:
        return inert.RefusedTensor("sparse", str(tensor.layout))
    if tensor.is_nested:
        return inert.RefusedTensor("nested")
    shape = (1,) if torch.nn.parameter.is_lazy(tensor) else tuple(tensor.shape)
    return inert.Tensor(_NOWHERE, str(tensor.dtype).removeprefix("torch."), 1, 0, shape, shape)


def replaced(tree: Any, new: Mapping[tuple[Any, ...], Any]) -> Any:
    """`tree` with new leaves at the keys of `new`. The containers on the way are new, with the same type, order and
    attributes; everything else is the same object."""
    ways = {keys[:i] for keys in new for i in range(len(keys))}

    def visit(node: Any, keys: tuple[Any, ...]) -> Any:
        if keys in new:
            return new[keys]
        if keys not in ways:
            return node
        children = containers.children_of(node) or []
        return containers.with_children(node, {key: visit(child, (*keys, key)) for key, child in children})

    return visit(tree, ())
