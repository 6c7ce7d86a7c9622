"""How a torch Module reshapes its feature maps, and in which order it calls its parts, found by torch.fx without
inputs.

The module itself never runs; a copy without values and hooks does. Anything that fx cannot follow (control flow on
values) is unknown; then each Sequential inside is followed by itself.
"""

from __future__ import annotations

import contextlib
import copy
import io
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from graftax.adapters import flow
from graftax.adapters.flow import BATCH, LEAF, OUT, Atom, Dims, Notes, channels, dim, joined, reshaped
from graftax.tree import Trace

_MOST = 5_000  # a module with more parts is not traced


@dataclass(frozen=True, slots=True)
class _Size:
    """`x.shape`, or one entry, or a product of entries: the dims whose lengths it holds."""

    dims: Dims
    one: bool = False


Value = Any
"""Dims, a _Size, a plain argument, or None if unknown."""


def trace_module(module: nn.Module) -> Trace:
    """The order of calls and the axes of flattened maps, as far as fx can follow them. Never raises for a module that
    cannot be traced: the result is then empty."""
    if sum(1 for _ in module.modules()) > _MOST:
        return Trace()
    hollow = _hollow(module)
    if hollow is None:
        return Trace()
    run = _Run(hollow)
    graph = _graph(hollow)
    if graph is not None:
        run.follow(graph, "")
    order = run.order
    for path, part in hollow.named_modules():
        if type(part).forward is not nn.Sequential.forward or len(part) == 0:  # pyright: ignore
            continue
        if graph is None and not any(path.startswith(f"{done}.") or not done for done in run.roots):
            inner = _graph(part)
            if inner is not None:
                run.roots.append(path)
                run.follow(inner, path)
        for n, name in enumerate(dict(part.named_children())):
            order.setdefault(f"{path}.{name}" if path else name, n)
    return run.notes.trace(order)


def _hollow(module: nn.Module) -> nn.Module | None:
    """A copy of the module's structure on the meta device, without hooks; None if it cannot be copied."""
    memo: dict[int, Any] = {}
    try:
        for tensor in [*module.parameters(), *module.buffers()]:
            if not nn.parameter.is_lazy(tensor):
                empty = torch.empty_like(tensor, device="meta")
                memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
        made = copy.deepcopy(module, memo)
    except Exception:  # the user's attributes may refuse to be copied
        return None
    for part in made.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(part, name, {}).clear()
    return made.eval()


def _graph(module: nn.Module) -> fx.Graph | None:
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fx.Tracer().trace(module)
    except Exception:  # the user's forward runs on stand-ins for tensors: on any error nothing is known
        return None


# ---------------------------------------------------------------- the walk


@dataclass(slots=True)
class _Run:
    """One walk over a graph: the values of its nodes, and the findings."""

    root: nn.Module
    notes: Notes = field(default_factory=Notes)
    order: dict[str, int] = field(default_factory=dict[str, int])
    roots: list[str] = field(default_factory=list[str])
    values: dict[fx.Node, Value] = field(default_factory=dict[fx.Node, Value])

    def follow(self, graph: fx.Graph, prefix: str) -> None:
        for node in graph.nodes:
            args = [self._value(arg) for arg in node.args]
            kwargs = {name: self._value(arg) for name, arg in node.kwargs.items()}
            found: Value = None
            path = f"{prefix}.{node.target}" if prefix else str(node.target)
            if node.op == "call_module":
                self._called(path, prefix)
                found = self._module(path, self.root.get_submodule(path), args)
            elif node.op == "get_attr":
                found = self._leaf(path)
            elif node.op == "call_function":
                found = self._function(_names().get(node.target, getattr(node.target, "__name__", "")), args, kwargs)
            elif node.op == "call_method":
                found = self._function(str(node.target), args, kwargs)
            self.values[node] = found

    def _value(self, arg: Any) -> Value:
        if isinstance(arg, fx.Node):
            return self.values.get(arg)
        if isinstance(arg, (list, tuple)):
            return [self._value(item) for item in arg]
        return arg

    def _called(self, path: str, prefix: str) -> None:
        parts = path.split(".")
        for n in range(len(prefix.split(".")) + 1 if prefix else 1, len(parts) + 1):  # the parents are not called yet
            self.order.setdefault(".".join(parts[:n]), len(self.order))

    def _leaf(self, path: str) -> Value:
        """A bare parameter, with its own axes."""
        found: Any = self.root
        for part in path.split("."):
            found = getattr(found, part, None)
        if not isinstance(found, torch.Tensor):
            return None
        return tuple(dim(f"{LEAF}{path}:{n}", size) for n, size in enumerate(found.shape))

    # ------------------------------------------------------------ modules

    def _module(self, path: str, module: nn.Module, args: Sequence[Value]) -> Value:
        given = args[0] if args and isinstance(args[0], tuple) else None
        source = type(module).__module__.removeprefix("torch.nn.modules.")
        if source == "conv":
            return self._conv(module, given)
        if isinstance(module, nn.Linear):
            return self._linear(path, module, given)
        if isinstance(module, nn.Flatten):
            return _flatten(given, module.start_dim, module.end_dim) if given else None
        if isinstance(module, nn.Unflatten):
            at: Any = module.dim
            return _unflatten(given, at, module.unflattened_size) if given and isinstance(at, int) else None
        if source in ("pooling", "padding", "upsampling"):
            return _pooled(given, getattr(module, "output_size", None))
        if source in ("activation", "dropout", "batchnorm", "instancenorm", "normalization") or isinstance(
            module, nn.Identity
        ):
            self._norm(path, module, given)
            return None if isinstance(module, (nn.GLU, nn.MultiheadAttention)) else given
        return None

    def _conv(self, module: Any, given: Value) -> Value:
        kernel = len(module.kernel_size)
        if given is not None and len(given) == kernel + 2:
            self.notes.into_map(given[1], given[2:])
        batch = given[0] if given is not None and len(given) == kernel + 2 else (Atom(BATCH),)
        return channels(module.out_channels, batch, [None] * kernel)

    def _linear(self, path: str, module: nn.Linear, given: Value) -> Value:
        leaf = f"{path}.weight"
        self.notes.inputs(leaf, given[-1] if given else None)
        made = dim(f"{OUT}{leaf}", module.out_features)
        self.notes.vector(f"{path}.bias", made)
        return ((Atom(BATCH),), made) if given is None else (*given[:-1], made)

    def _norm(self, path: str, module: nn.Module, given: Value) -> None:
        """Record that a norm's vectors run over the axes that it normalises."""
        vectors = [name for name, found in [*module.named_parameters(), *module.named_buffers()] if found.ndim == 1]
        if not vectors or isinstance(module, nn.PReLU):
            return
        at = -1 if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else 1
        axis = given[at] if given is not None and len(given) > 1 else None
        for name in vectors:
            self.notes.vector(f"{path}.{name}", axis)

    # ------------------------------------------------------------ functions and methods

    def _function(self, name: str, args: list[Value], kwargs: dict[str, Value]) -> Value:
        given = args[0] if args else kwargs.pop("input", None)
        rest = args[1:]
        if isinstance(given, _Size):
            return _size_function(name, given, rest)
        if name == "mul" and rest and isinstance(rest[0], _Size):
            return _size_function(name, rest[0], [given])
        if name in _PRODUCTS:
            matrix = rest[0] if rest else kwargs.get("weight", kwargs.get("other", kwargs.get("mat2")))
            self.notes.product(matrix if isinstance(matrix, tuple) else None, -1 if name == "linear" else 0)
            return None
        if name in _BINARY:
            ends = given, rest[0] if rest else kwargs.get("other")
            maps = [value for value in ends if isinstance(value, tuple)]
            known = all(isinstance(value, (tuple, int, float)) for value in ends)
            return (joined(*maps) if len(maps) > 1 else (*maps, None)[0]) if known else None
        if name == "cat":
            axis = rest[0] if rest else kwargs.get("dim", 0)
            parts = [part if isinstance(part, tuple) else None for part in given] if isinstance(given, list) else []
            return flow.concatenated(parts, axis) if isinstance(axis, int) else None
        if not isinstance(given, tuple):
            return None
        if name in _SAME:
            return given
        if name in _POOLS:
            sizes = rest[0] if rest else kwargs.get("output_size")
            return _pooled(given, sizes if "adaptive" in name else None)
        changed = _CHANGES.get(name)
        try:
            return changed(given, *rest, **kwargs) if changed is not None else None
        except (IndexError, TypeError, ValueError):  # arguments that are not plain values
            return None


_PRODUCTS = frozenset(("linear", "matmul", "mm"))
_BINARY = frozenset(
    ("add", "sub", "mul", "truediv", "div", "iadd", "imul", "isub", "add_", "mul_", "maximum", "minimum")
)
_SAME = frozenset((
    "relu", "relu_", "gelu", "silu", "elu", "elu_", "leaky_relu", "leaky_relu_", "sigmoid", "tanh", "softplus",
    "hardswish", "hardtanh", "hardsigmoid", "relu6", "mish", "selu", "celu", "softsign", "logsigmoid", "rrelu",
    "prelu", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
    "batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm", "local_response_norm", "normalize",
    "exp", "log", "sqrt", "rsqrt", "clamp", "abs", "pow", "neg", "contiguous", "clone", "detach", "float",
    "half", "double", "bfloat16", "to", "type", "type_as", "cpu", "cuda", "requires_grad_", "softmax",
    "log_softmax", "square", "sin", "cos", "clip", "nan_to_num",
))  # fmt: skip
_POOLS = frozenset((
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
    "interpolate", "upsample", "pad",
))  # fmt: skip


@cache
def _names() -> dict[Any, str]:
    """function -> its name; several functions of torch.nn.functional have the name `fn`."""
    out = {
        getattr(operator, name): name
        for name in ("add", "sub", "mul", "truediv", "iadd", "imul", "isub", "getitem", "matmul")
    }
    for name in _POOLS | _SAME | {"linear"}:
        if hasattr(functional, name):
            out[getattr(functional, name)] = name
    out[getattr] = "getattr"
    return out


def _size_function(name: str, given: _Size, rest: Sequence[Value]) -> Value:
    if name == "getitem" and not given.one and rest:
        index = rest[0]
        if isinstance(index, slice):
            return _Size(given.dims[index])
        return _Size((given.dims[index],), True) if isinstance(index, int) else None
    if name == "mul" and given.one and rest:
        other = rest[0]
        if isinstance(other, _Size) and other.one:
            return _Size((given.dims[0] + other.dims[0],), True)
        return given if other == 1 else None
    return None


def _getattr(given: Dims, name: str) -> Value:
    if name in ("T", "mT") and len(given) == 2:
        return given[::-1]
    return _Size(given) if name == "shape" else None


def _size(given: Dims, dim: int | None = None) -> Value:
    return _Size(given) if dim is None else _Size((given[dim],), True)


def _view(given: Dims, *sizes: Any) -> Value:
    wanted: list[Any] = []
    for size in sizes[0] if len(sizes) == 1 and isinstance(sizes[0], list) else sizes:
        wanted += size.dims if isinstance(size, _Size) else [size]
    return reshaped(given, wanted) if all(isinstance(size, (int, tuple)) for size in wanted) else None


def _flatten(given: Dims, start_dim: int = 0, end_dim: int = -1) -> Value:
    first, last = start_dim % len(given), end_dim % len(given)
    return (*given[:first], tuple(atom for of in given[first : last + 1] for atom in of), *given[last + 1 :])


def _unflatten(given: Dims, dim: int, sizes: Any) -> Value:
    made = reshaped((given[dim],), list(sizes)) if all(isinstance(size, int) for size in sizes) else None
    return None if made is None else (*given[: dim % len(given)], *made, *given[dim % len(given) + 1 :])


def _permute(given: Dims, *dims: Any) -> Value:
    order = dims[0] if isinstance(dims[0], list) else dims
    return tuple(given[axis] for axis in order) if len(order) == len(given) else None


def _transpose(given: Dims, dim0: int, dim1: int) -> Value:
    out = list(given)
    out[dim0], out[dim1] = out[dim1], out[dim0]
    return tuple(out)


def _reduced(given: Dims, dim: Any = None, keepdim: bool = False) -> Value:
    gone = {axis % len(given) for axis in ([dim] if isinstance(dim, int) else dim or ())}
    return tuple(() if n in gone else of for n, of in enumerate(given) if keepdim or n not in gone) if gone else None


def _squeeze(given: Dims, dim: Any = None) -> Value:
    if dim is None:
        known = all(atom.size is not None or atom.name == BATCH for of in given for atom in of)
        return tuple(of for of in given if of) if known else None
    gone = {axis % len(given) for axis in ([dim] if isinstance(dim, int) else dim)}
    return tuple(of for n, of in enumerate(given) if n not in gone or of)


def _unsqueeze(given: Dims, dim: int) -> Value:
    at = dim % (len(given) + 1)
    return (*given[:at], (), *given[at:])


_CHANGES: dict[str, Callable[..., Value]] = {
    "getattr": _getattr, "size": _size, "view": _view, "reshape": _view, "flatten": _flatten,
    "permute": _permute, "t": lambda given: given[::-1],
    "transpose": _transpose, "swapaxes": _transpose, "mean": _reduced, "sum": _reduced,
    "amax": _reduced, "squeeze": _squeeze, "unsqueeze": _unsqueeze, "unflatten": _unflatten,
}  # fmt: skip
"""The arguments have the names that torch's have; others are not followed."""


def _pooled(given: Value, output: Any) -> Value:
    """Batch and channels unchanged; spatial axes with another length: `output` of an adaptive pool, else unknown."""
    if given is None or len(given) < 3:
        return None
    spatial = given[2:]
    wanted = list(output) if isinstance(output, (list, tuple)) else [output] * len(spatial)
    if len(wanted) != len(spatial):
        return None
    made = [flow.resized(of, size if isinstance(size, int) else None) for of, size in zip(spatial, wanted, strict=True)]
    return None if any(of is None for of in made) else (*given[:2], *made)
