"""The weights that a user gives for one Flax model: checked leaf by leaf before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftax.errors import Failure, PlanError, UsageError, escape
from graftax.execute.opening import open_weights
from graftax.parity.prepare import Read
from graftax.tree import Checkpoint, Module

Array = Any


def weights_for(given: Any, tree: Checkpoint, name: str) -> Mapping[str, Array]:
    """path -> array for the model's leaves, read when it is requested. PlanError if they do not fit."""
    weights = open_weights(given)
    label = f"{name} ({escape(weights.label)})" if weights.storage.format != "live" else name
    if weights.side == "torch":
        raise PlanError(f"{label} is a torch checkpoint", next="Port it first: gx.port(source, like), or graftax port.")
    if not weights.has_values:
        raise PlanError(f"{label} has shapes, but no values")
    names = dict.fromkeys(tree)
    bare = {f"params/{path}": path for path in weights}
    own = (
        bare
        if len(names.keys() & bare.keys()) > len(names.keys() & weights.keys())
        else {path: path for path in weights}
    )
    failures = [Failure("is a missing key", key=path) for path in names if path not in own]
    failures += [
        Failure("is an unexpected key: the model has no such leaf", key=path) for path in own if path not in tree
    ]
    failures += [
        Failure("has another shape", key=path, expected=str(tree[path].shape), found=str(weights[own[path]].shape))
        for path in names
        if path in own and weights[own[path]].shape != tree[path].shape
    ]
    if failures:
        raise PlanError(
            f"{label} does not hold the weights of the model:",
            failures,
            next="Pass the whole variables of the model (or params alone, if it has no other collection).",
        )
    read = Read(weights)
    return _Renamed(read, {path: own[path] for path in names})


class _Renamed(Mapping[str, Array]):
    """Arrays by the model's paths."""

    def __init__(self, arrays: Mapping[str, Array], names: Mapping[str, str]) -> None:
        self.arrays, self.names = arrays, names

    def __getitem__(self, path: str) -> Array:
        return self.arrays[self.names[path]]

    def __iter__(self) -> Any:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def require_same_model(one: Mapping[str, Module], other: Mapping[str, Module], name: str, named: str) -> None:
    """UsageError if two NNX modules differ in their classes or in what they declare: weights alone are compared."""
    found: list[Failure] = []
    for path in dict.fromkeys((*one, *other)):
        left, right = one.get(path), other.get(path)
        if left is None or right is None:
            found.append(Failure("is a module of one of the two only", key=path or "(the model)"))
        elif left.kind != right.kind:
            found.append(Failure("is of another class", key=path, expected=left.kind, found=right.kind))
        else:
            found += [
                Failure(
                    f"{setting} differs",
                    key=path or "(the model)",
                    expected=escape(left.settings.get(setting)),
                    found=escape(right.settings.get(setting)),
                )
                for setting in dict.fromkeys((*left.settings, *right.settings))
                if not _same_setting(left.settings.get(setting), right.settings.get(setting))
            ]
    if found:
        raise UsageError(
            f"{name} and {named} are not one model with two sets of weights:",
            found,
            next=f"Give both the settings of one, or compare two models: gx.check_parity({name}, {named}, inputs).",
        )


def _same_setting(one: Any, other: Any) -> bool:
    return one == other or (one != one and other != other)
