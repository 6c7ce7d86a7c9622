"""Which part of what a .pt file holds are the weights, and the flat names in it.

A file made by torch.save holds whatever its author put in it: a state_dict, or a dict with the state_dict, optimizer
states, counters and settings. `choose` finds the state_dict where only one reading is possible: what may be a weight
beside it is read with it, so that it is asked for. The module `beside` knows what is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from graftax.errors import Failure, FormatError, PlanError, escape
from graftax.formats.beside import is_beside, is_counter, is_optimizer, is_random_bytes
from graftax.formats.limits import check_limit, limit
from graftax.formats.pickles import Global, Opaque, Refused, Storage, Tensor
from graftax.tree import Key, nearest

USUAL = frozenset(
    {"state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "state", "variables"}
    | {"params", "parameters", "weights", "ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema"}
    | {"ema_params", "params_ema", "g_ema", "teacher", "student"}
)
"""Names that training scripts give the container of a model's weights."""
WHOLE = "."
"""`PATH::.` is the whole content, all containers flattened into one tree."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The weights: flat name -> tensor, the container's name, and what was left out (name -> what it is)."""

    tensors: dict[str, Tensor]
    container: str
    left: dict[str, str]
    real_keys: dict[str, Key]


@dataclass(slots=True)
class _Census:
    """How many tensors and nodes each container holds, shared ones counted as often as they are reached."""

    label: str
    known: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    active: set[int] = field(default_factory=set[int])

    def tensors(self, value: Any) -> int:
        return self.count(value)[0]

    def count(self, value: Any, depth: int = 0) -> tuple[int, int]:
        if isinstance(value, (Tensor, Refused)):
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


def choose(root: Any, name: str | None, label: str) -> Chosen:
    """The weights in `root`, or in the container `name` of it ('model', 'a/b', 'a.b'; '.' for all of it).

    Raises PlanError where several containers could be meant (each is named), where `name` is not there, and for
    quantized tensors; FormatError where there are no tensors or some that no flat tree can hold.
    """
    census = _Census(label)
    census.count(root)
    path: list[str] = []
    node = root
    if name is not None and name != WHOLE:
        node = _resolve(root, name, label, census)
        path = [name]
    left: dict[str, str] = {}
    while name != WHOLE and isinstance(node, dict) and (key := _only(node, path, label, census)) is not None:
        left |= {_text(other, label): describe(value, census) for other, value in node.items() if other != key}
        node = node[key]
        path.append(_text(key, label))
    if name != WHOLE and isinstance(node, dict):
        aside = _aside(node, census)
        if aside and any(census.tensors(value) for key, value in node.items() if key not in aside):
            left |= {_text(key, label): describe(value, census) for key, value in aside.items()}
            node = {key: value for key, value in node.items() if key not in aside}
    if not isinstance(node, (dict, list, tuple)) or not census.tensors(node):
        raise FormatError(
            f"{label} holds no tensors" + (f" in {escape(name)!r}" if name else ""),
            next=f"It holds: {describe(node, census)}",
        )
    return _flatten(node, "/".join(path), label, left, census)


def metadata(container: str, left: dict[str, str]) -> dict[str, str]:
    """A checkpoint's metadata: what is beside the weights, and under `container` where the weights were found. What is
    itself called so is `./container`."""
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
    if isinstance(value, Refused):
        return f"{value.kind} tensor"
    if isinstance(value, Storage):
        return f"storage of {value.nbytes} bytes"
    if isinstance(value, (Opaque, Global)):
        return escape(value.text if isinstance(value, Opaque) else value.name)
    return f"{type(value).__name__} {escape(value)}"


def _only(node: dict[Any, Any], path: list[str], label: str, census: _Census) -> Any:
    """The key of the one container in `node` that holds the weights; None where `node` itself is that container."""
    filled = {key: value for key, value in node.items() if census.tensors(value)}
    nested = {key: value for key, value in filled.items() if _is_nested(value) and not is_beside(key, value)}
    direct = {k: v for k, v in filled.items() if not _is_nested(v) and not is_random_bytes(k, v)}
    found = [key for key, value in nested.items() if isinstance(value, dict)]
    usual = [key for key in found if _is_usual(key)]
    if not found or (len(found) > 1 and not usual):
        return None
    if len(nested) > len(found) or any(not is_counter(key, value) for key, value in direct.items()):
        return None  # what may be weights stands here already: what is nested below belongs to them
    if len(found) == 1:
        return found[0] if usual or not direct else None
    prefix = "/".join(path)
    names = ["/".join([*path, _text(key, label)]) for key in found]
    raise PlanError(
        f"{label} holds weights in {len(found)} containers" + (f" of {escape(prefix)!r}" if prefix else ""),
        [
            Failure(describe(node[key], census).removesuffix(", not read"), file=label, key=f"{label}::{name}")
            for key, name in zip(found, names, strict=True)
        ],
        next=f"Choose one with PATH::NAME, for example {label}::{escape(names[0])}; PATH::. takes all of them.",
    )


def _aside(node: dict[Any, Any], census: _Census) -> dict[Any, Any]:
    """What of `node` is read with none of the rest: the states of optimizers and, where a container with a usual name
    shows that `node` is a training checkpoint, whatever else has the name of what training saves."""
    run = any(_is_usual(key) and isinstance(value, dict) and census.tensors(value) for key, value in node.items())

    def out(key: Any, value: Any) -> bool:
        if not run or not census.tensors(value):
            return is_optimizer(value)
        return is_beside(key, value) if _is_nested(value) else is_random_bytes(key, value) or is_counter(key, value)

    return {key: value for key, value in node.items() if out(key, value)}


def _is_usual(key: Any) -> bool:
    return isinstance(key, str) and key.lower() in USUAL


def _is_nested(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple))


def _resolve(root: Any, name: str, label: str, census: _Census) -> Any:
    """What `name` picks: a key as it is, else the longest key that it starts with, then the rest below that, else what
    bears it as a prefix of its keys ("module." of DataParallel); in the whole file, else in the container of weights
    that is read where none is named."""
    found = next(_ways(root, name, 0), None)
    if found is None:
        found = next(_ways(_default(root, label, census), name, 0), None)
    if found is not None:
        return found
    keys = [_text(key, label) for key, value in root.items() if census.tensors(value)] if isinstance(root, dict) else []
    near = nearest(name, keys) or ", ".join(escape(key) for key in keys[:10])
    raise PlanError(f"{label} has no container {escape(name)!r}", next=f"Near: {near}" if near else "")


def _ways(node: Any, name: str, depth: int) -> Iterator[Any]:
    if depth > limit("depth"):
        return
    children = node if isinstance(node, dict) else dict(enumerate(node)) if isinstance(node, (list, tuple)) else {}
    named = {str(key): value for key, value in children.items() if isinstance(key, (str, int))}
    if name in named and isinstance(named[name], (dict, list, tuple)):
        yield named[name]
    for at in sorted((i for i, char in enumerate(name) if char in "/."), reverse=True):
        if name[:at] in named:
            yield from _ways(named[name[:at]], name[at + 1 :], depth + 1)
    for start in dict.fromkeys((f"{name.rstrip('/.')}.", f"{name.rstrip('/.').replace('/', '.')}.")):
        below = {key[len(start) :]: value for key, value in named.items() if key.startswith(start)}
        if below:
            yield below


def _default(node: Any, label: str, census: _Census) -> Any:
    """The container of weights that is read where none is named, as far as there is one."""
    try:
        while isinstance(node, dict) and (key := _only(node, [], label, census)) is not None:
            node = node[key]
    except PlanError:  # several
        pass
    return node


def _text(key: Any, label: str) -> str:
    """A key as text. FormatError for one that no name can be made of."""
    if isinstance(key, bytes):
        return key.decode("utf-8", "backslashreplace")
    if isinstance(key, (str, int)) and not isinstance(key, bool):
        return str(key)
    raise FormatError(f"{label} holds a dict with a key of type {type(key).__name__}; names are text or whole numbers")


def _flatten(node: Any, container: str, label: str, left: dict[str, str], census: _Census) -> Chosen:
    tensors: dict[str, Tensor] = {}
    real_keys: dict[str, Key] = {}
    refused: list[tuple[str, Refused]] = []

    def visit(value: Any, prefix: str, depth: int) -> None:
        check_limit("depth", depth, label)
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in pairs:
            text = _text(key, label)
            name = f"{prefix}.{text}" if prefix else text
            if type(key) is int:
                real_keys[name] = key
            if isinstance(child, (dict, list, tuple)) and census.tensors(child):
                visit(child, name, depth + 1)
            elif isinstance(child, Refused):
                refused.append((name, child))
            elif not isinstance(child, Tensor):
                left[name] = describe(child, census)
            elif name in tensors:
                raise FormatError(f"{label} holds two tensors that are both called {escape(name)}")
            else:
                tensors[name] = child

    visit(node, "", 0)
    if refused:
        raise _refusal(refused, label)
    return Chosen(tensors, container, left, {key: real_keys[key] for key in real_keys if key not in left})


def _refusal(refused: list[tuple[str, Refused]], label: str) -> FormatError | PlanError:
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
        f"{label} holds {len(refused)} quantized tensors ({escape(schemes)}); their codes alone are no weights",
        failures,
        next="Dequantize where the file was made: tensor.dequantize().",
    )
