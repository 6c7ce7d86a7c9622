"""Find the weights in the content of a .pt file, and give them flat names.

A file made by torch.save holds whatever its author put in it: a state_dict, or a dict with the state_dict, optimizer
states, counters and settings. `choose` finds the state_dict if only one reading is possible. Tensors beside it that may
be weights are read too, so that the plan asks about them. `training_state` knows what is not a weight.

Objects of other classes (`inert.Object`) are listed if they stand beside the weights. The file is refused as unsafe if
such an object stands among the weights, or if only an object holds tensors: reading those weights would need the class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from graftax.errors import Failure, FormatError, PlanError, UnsafeInputError, escape, option
from graftax.tree import Key, nearest
from graftax.tree.inert import (
    ALLOWED,
    Global,
    Object,
    OpaqueValue,
    RefusedTensor,
    Tensor,
    TorchStorage,
    objects_in,
    unsafe_pickle,
)
from graftax.tree.limits import check_limit, limit
from graftax.tree.placeholders import refuse_placeholders
from graftax.tree.training_state import (
    has_training_name,
    holds_optimizer,
    is_count,
    is_counter,
    is_lightning,
    is_note,
    is_optimizer,
    is_random_bytes,
    is_training_state,
    is_usual,
)

LONE = "tensor"
"""The name of the leaf of a file that holds one bare tensor."""
WHOLE = "."
"""`PATH::.` is the whole content, with all containers flattened into one tree."""


@dataclass(frozen=True, slots=True)
class ChosenWeights:
    """The weights: flat name -> tensor, the container's name, and what was left out (name -> what it is)."""

    tensors: dict[str, Tensor]
    container: str
    left: dict[str, str]
    real_keys: dict[str, Key]


@dataclass(slots=True)
class _Census:
    """The number of tensors and nodes in each container. A shared part counts as often as it is reached."""

    label: str
    known: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    active: set[int] = field(default_factory=set[int])

    def tensors(self, value: Any) -> int:
        return self.count(value)[0]

    def count(self, value: Any, depth: int = 0) -> tuple[int, int]:
        if isinstance(value, (Tensor, RefusedTensor)):
            return 1, 1
        if not isinstance(value, (dict, list, tuple)):
            return 0, 1
        if id(value) in self.known:
            return self.known[id(value)]
        if id(value) in self.active:
            raise FormatError(f"{self.label} holds a container that contains itself")
        check_limit("depth", depth, self.label)
        self.active.add(id(value))
        tensors, nodes = 0, 1
        for child in value.values() if isinstance(value, dict) else value:
            more, below = self.count(child, depth + 1)
            tensors, nodes = tensors + more, nodes + below
        self.active.discard(id(value))
        check_limit("leaves", max(tensors, nodes // 8), self.label)
        self.known[id(value)] = tensors, nodes
        return tensors, nodes


def choose(root: Any, name: str | None, label: str) -> ChosenWeights:
    """The weights in `root`, or in its container `name` ('model', 'a/b', 'a.b'; '.' for everything).

    Raises PlanError if several containers are possible (each is named), if `name` does not exist, and for quantized
    tensors; FormatError if there are no tensors, or tensors that a flat tree cannot hold.
    """
    census = _Census(label)
    census.count(root)
    path: list[str] = []
    node: Any = root
    if name is not None and name != WHOLE:
        node = _resolve(root, name, label, census)
        path = [name]
    left: dict[str, str] = {}
    while name != WHOLE and isinstance(node, dict) and (key := _only(node, path, label, census)) is not None:
        left |= {_shown(other): describe(value, census) for other, value in node.items() if other != key}
        node = node[key]
        path.append(_text(key, label))
    if name != WHOLE and isinstance(node, dict):
        aside = _aside(node, census)
        if aside and any(census.tensors(value) for key, value in node.items() if key not in aside):
            left |= {_shown(key): describe(value, census) for key, value in aside.items()}
            node = {key: value for key, value in node.items() if key not in aside}
        if _is_run(node):
            node = _without_optimizers(node, "", left, census)
    if isinstance(node, (Tensor, RefusedTensor)):
        node = {LONE: node}
    if not isinstance(node, (dict, list, tuple)) or not census.tensors(node):
        raise _nothing(node, name, label, census)
    chosen = _flatten(node, "/".join(path), label, left, census, objects_are_beside=name == WHOLE)
    run = root if isinstance(root, dict) else {}
    refuse_placeholders(chosen.tensors, label, sharded=not _SHARDED.isdisjoint(k for k in run if isinstance(k, str)))
    return chosen


_SHARDED = frozenset({"param_shapes", "ds_config", "ds_version", "zero_stage"})
"""Keys that DeepSpeed writes beside a module whose parameters may lie in other files."""


def _nothing(node: Any, name: str | None, label: str, census: _Census) -> FormatError | UnsafeInputError:
    """The error for a node without tensors of its own; an object in it may hold some."""
    classes, tensors = objects_in(node)
    if "numpy.ndarray" in classes and not tensors:
        return _among_weights({escape(name or "the file"): classes}, label)
    if classes and (tensors or (isinstance(node, Object) and node.name.startswith("torch.nn.modules."))):
        return unsafe_pickle(label, classes)
    return FormatError(
        f"{label} holds no tensors" + (f" in {escape(name)!r}" if name else "") + ", so there are no weights to read",
        next=f"It holds: {describe(node, census)}",
    )


def metadata(container: str, left: dict[str, str]) -> dict[str, str]:
    """A checkpoint's metadata: what stands beside the weights, and under `container` where the weights were found. An
    entry that is itself called `container` becomes `./container`."""
    return ({"container": container} if container else {}) | {
        "./container" if name == "container" else name: what for name, what in left.items()
    }


def describe(value: Any, census: _Census) -> str:
    """A value in a few words, for the metadata of a checkpoint and for messages."""
    if isinstance(value, (dict, list, tuple)):
        kind = "mapping" if isinstance(value, dict) else "list"
        count = census.tensors(value)
        return f"{kind} of {len(value)}" + (f", {count} tensors, not read" if count else "")
    if isinstance(value, Tensor):
        return f"tensor {value.dtype}{list(value.shape)}, not read"
    if isinstance(value, RefusedTensor):
        return f"{value.kind} tensor"
    if isinstance(value, TorchStorage):
        return f"storage of {value.nbytes} bytes"
    if isinstance(value, Object):
        count = objects_in(value)[1]
        return f"object {escape(value.name)}" + (f", {count} tensors, not read" if count else "")
    if isinstance(value, (OpaqueValue, Global)):
        return escape(value.text if isinstance(value, OpaqueValue) else value.name)
    return f"{type(value).__name__} {escape(value)}"


def _only(node: dict[Any, Any], path: list[str], label: str, census: _Census) -> Any:
    """The key of the one container in `node` that holds the weights; None if `node` itself is that container."""
    filled = {key: value for key, value in node.items() if census.tensors(value)}
    lightning = is_lightning(node)
    nested = {
        k: value for k, value in filled.items() if _is_nested(value) and not is_training_state(k, value, lightning)
    }
    direct = {k: v for k, v in filled.items() if not _is_nested(v) and not is_random_bytes(k, v)}
    found = [key for key, value in nested.items() if isinstance(value, dict)]
    # an object with tensors, under the name of a model, may hold the weights that are meant
    found += [key for key in _holding(node) if is_usual(key)]
    usual = [key for key in found if is_usual(key)]
    # networks with an optimizer each are separate; a part that may be training state is not part of a network
    apart = [key for key in found if has_training_name(key) or _is_run(node[key])] if len(found) > 1 else []
    if not found or (len(found) > 1 and not usual and not apart):
        return None
    mixed = any(not is_counter(key, value) for key, value in direct.items())
    if not apart and (mixed or any(not isinstance(value, dict) for value in nested.values())):
        return None  # possible weights stand at this level: nested containers belong to them
    if len(found) == 1:
        return found[0] if usual or not (direct or _holding(node)) else None
    prefix = "/".join(path)
    ends = {
        "/".join([*path, *way]): end for way, end in (_down(node[k], _text(k, label), label, census) for k in found)
    }
    names = list(ends)
    raise PlanError(
        f"{label} holds weights in {len(found)} containers" + (f" of {escape(prefix)!r}" if prefix else ""),
        [
            Failure(describe(end, census).removesuffix(", not read"), file=label, key=f"{label}::{name}")
            for name, end in ends.items()
        ],
        next=f"Choose one with PATH::NAME, for example {label}::{escape(names[0])}; PATH::. takes all of them.",
    )


def _down(node: Any, name: str, label: str, census: _Census) -> tuple[list[str], Any]:
    """Go down from a run to the container of its weights: the names on the way, and the container."""
    path, end = [name], node
    try:
        while _is_run(end) and (key := _only(end, path, label, census)) is not None:
            end = end[key]
            path.append(_text(key, label))
    except PlanError:  # several
        return [name], node
    return path, end


def _is_run(value: Any) -> bool:
    """True for a network in training: weights, and the state of their optimizer."""
    return isinstance(value, dict) and holds_optimizer(value) and not is_optimizer(value)


def _holding(node: dict[Any, Any]) -> list[Any]:
    """The keys of objects that hold tensors and are not run metadata, for example modules."""
    return [k for k, value in node.items() if isinstance(value, Object) and not is_note(k) and objects_in(value)[1]]


def _aside(node: dict[Any, Any], census: _Census) -> dict[Any, Any]:
    """The part of `node` that is never read as weights: optimizer states and, if a container with a usual name shows
    that `node` is a training checkpoint, everything else with the name of training state."""
    run = any(is_usual(key) and isinstance(value, dict) and census.tensors(value) for key, value in node.items())
    lightning = is_lightning(node)

    def out(key: Any, value: Any) -> bool:
        if not run or not census.tensors(value):
            return is_optimizer(value)
        return (
            is_training_state(key, value, lightning)
            if _is_nested(value)
            else is_random_bytes(key, value) or is_counter(key, value)
        )

    return {key: value for key, value in node.items() if out(key, value)}


def _without_optimizers(node: Any, prefix: str, left: dict[str, str], census: _Census) -> dict[Any, Any]:
    """A nest without the optimizer states anywhere in it; they are listed in `left`."""
    kept: dict[Any, Any] = {}
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        name = f"{prefix}{_shown(key)}"
        if is_optimizer(value):
            left[name] = describe(value, census)
        else:
            kept[key] = _without_optimizers(value, f"{name}.", left, census) if holds_optimizer(value) else value
    return kept


def _is_nested(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple))


def _resolve(root: Any, name: str, label: str, census: _Census) -> Any:
    """The value that `name` picks. It tries, in this order: an exact key; the longest key that `name` starts with, then
    the rest below it; the entries whose keys have `name` as a prefix ("module." of DataParallel). It looks in the whole
    file first, then in the container of weights that is read by default."""
    found = next(_ways(root, name, 0), None)
    if found is None:
        found = next(_ways(_default(root, label, census), name, 0), None)
    if found is not None:
        return found
    for node in (root, _default(root, label, census)):
        one = {str(key): value for key, value in node.items()}.get(name) if isinstance(node, dict) else None
        if one is not None and not isinstance(one, Object) and census.tensors(one):
            raise PlanError(
                f"{label}: {escape(name)} is one tensor, not a container of tensors",
                next=f"As the tensor that a replacement takes: {option('key', escape(name))}",
            )
    keys = [_text(key, label) for key, value in root.items() if census.tensors(value)] if isinstance(root, dict) else []
    near = nearest(name, keys) or ", ".join(escape(key) for key in keys[:10])
    raise PlanError(f"{label} has no container {escape(name)!r}", next=f"Near: {near}" if near else "")


def _ways(node: Any, name: str, depth: int) -> Iterator[Any]:
    if depth > limit("depth"):
        return
    children = node if isinstance(node, dict) else dict(enumerate(node)) if isinstance(node, (list, tuple)) else {}
    named = {str(key): value for key, value in children.items() if isinstance(key, (str, int))}
    if name in named and isinstance(named[name], (dict, list, tuple, Object)):
        yield named[name]
    for at in sorted((i for i, char in enumerate(name) if char in "/."), reverse=True):
        if name[:at] in named:
            yield from _ways(named[name[:at]], name[at + 1 :], depth + 1)
    for start in dict.fromkeys((f"{name.rstrip('/.')}.", f"{name.rstrip('/.').replace('/', '.')}.")):
        below = {key[len(start) :]: value for key, value in named.items() if key.startswith(start)}
        if below:
            yield below


def _default(node: Any, label: str, census: _Census) -> Any:
    """The container of weights that is read if no name is given; as far down as the choice is clear."""
    try:
        while isinstance(node, dict) and (key := _only(node, [], label, census)) is not None:
            node = node[key]
    except PlanError:  # several
        pass
    return node


def _shown(key: Any) -> str:
    """A key, as the list of left-out entries shows it."""
    if isinstance(key, (Object, Global, OpaqueValue)):
        return escape(key.text if isinstance(key, OpaqueValue) else key.name)
    return _text(key, "") if isinstance(key, (bytes, str)) else escape(str(key))


def _text(key: Any, label: str) -> str:
    """A key as text. FormatError for a key that cannot be a name."""
    if isinstance(key, bytes):
        return key.decode("utf-8", "backslashreplace")
    if isinstance(key, (str, int)) and not isinstance(key, bool):
        return str(key)
    raise FormatError(f"{label} holds a dict with a key of type {type(key).__name__}; names are text or whole numbers")


def _flatten(
    node: Any, container: str, label: str, left: dict[str, str], census: _Census, objects_are_beside: bool = False
) -> ChosenWeights:
    tensors: dict[str, Tensor] = {}
    real_keys: dict[str, Key] = {}
    refused: list[tuple[str, RefusedTensor]] = []
    objects: dict[str, list[str]] = {}

    def visit(value: Any, prefix: str, depth: int) -> None:
        check_limit("depth", depth, label)
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in pairs:
            holds = isinstance(child, (Tensor, RefusedTensor)) or census.tensors(child)
            text = _text(key, label) if holds else _shown(key)
            name = f"{prefix}.{text}" if prefix else text
            if type(key) is int:
                real_keys[name] = key
            if isinstance(child, RefusedTensor):
                refused.append((name, child))
            elif not isinstance(child, Tensor):
                if holds:
                    visit(child, name, depth + 1)
                    continue
                left[name] = describe(child, census)
                if (classes := objects_in(child)[0]) and not _is_aside(key, depth):
                    objects[name] = classes
            elif name in tensors:
                raise FormatError(f"{label} holds two tensors that are both called {escape(name)}")
            else:
                tensors[name] = child

    visit(node, "", 0)
    if objects and not objects_are_beside:
        raise _among_weights(objects, label)
    if refused:
        raise _refusal(refused, label)
    return ChosenWeights(tensors, container, left, {key: real_keys[key] for key in real_keys if key not in left})


def _is_aside(key: Any, depth: int) -> bool:
    """True if an object of any class may have this name among weights: the name under which torch keeps extra state of
    a module or, at the top, a name of run metadata."""
    name = key if isinstance(key, str) else ""
    return name.rpartition(".")[2] == "_extra_state" or (depth == 0 and (is_count(name) or is_note(name)))


def _among_weights(objects: dict[str, list[str]], label: str) -> UnsafeInputError:
    names = list(dict.fromkeys(name for classes in objects.values() for name in classes))
    failures = [Failure(f"an object of {escape(classes[0])}", label, key) for key, classes in objects.items()]
    if all(name.startswith(("numpy.", "a NumPy")) for name in names):
        return UnsafeInputError(
            f"{label} holds NumPy objects where weights are expected, and they are pickled",
            failures,
            next="Where the file was made: torch.from_numpy(array) for each, or numpy.savez(path, **arrays).",
        )
    return unsafe_pickle(label, names, failures)


def _refusal(refused: list[tuple[str, RefusedTensor]], label: str) -> FormatError | PlanError | UnsafeInputError:
    foreign = [item.detail for _, item in refused if item.kind == "subclass" and _is_class(item.detail)]
    if foreign:
        return unsafe_pickle(label, list(dict.fromkeys(foreign)))
    other = [(name, item) for name, item in refused if item.kind != "quantized"]
    failures = [
        Failure(f"{item.kind} tensor" + (f", {escape(item.detail)}" if item.detail else ""), file=label, key=name)
        for name, item in other or refused
    ]
    if other:
        return FormatError(
            f"{label} holds {len(other)} tensors that are not plain dense ones",
            failures,
            next="Where the file was made: tensor.to_dense(), .cpu(), or a dtype that graftax knows; then save again.",
        )
    schemes = ", ".join(sorted({item.detail.removeprefix("torch.") or "quantized" for _, item in refused}))
    return PlanError(
        f"{label} holds {len(refused)} quantized tensors ({escape(schemes)}); their codes alone are not weights",
        failures,
        next="Dequantize where the file was made: tensor.dequantize().",
    )


def _is_class(name: str) -> bool:
    """True if this is the name of a class that torch's own reader does not know."""
    return "." in name and name not in ALLOWED
