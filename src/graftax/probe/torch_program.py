"""A torch model as the steps of a program, as a Flax model is: its ops without mutation, a parameter at a time.

A model whose leaves are looked for must be followed while some of them are unknown. torch.func.functionalize gives the
ops of one run without changes in place; ops that use several parameters are written out (x @ W, then + b).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from graftax.adapters import nests, torch_tree
from graftax.errors import GraftaxError, ModelError, escape
from graftax.probe.hashes import sha, steps_hash
from graftax.probe.program import INDEX, RUN, Program
from graftax.probe.redraw import probe_copy
from graftax.probe.torch_nests import plain_array, tensors, to_torch
from graftax.probe.torch_norms import NORMS, along_channels
from graftax.probe.torch_run import float64_run

_SAME = frozenset(("detach", "alias", "clone", "contiguous", "lift_fresh", "lift_fresh_copy", "_to_copy", "to"))
"""Ops that give what they take."""
_RESHAPES = frozenset(("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "squeeze", "unsqueeze"))
_ORDERS = frozenset(("permute", "transpose", "t"))
_PRODUCTS = {
    "mm": (((1,), (0,)), ((), ())),
    "bmm": (((2,), (1,)), ((0,), (0,))),
    "mv": (((1,), (0,)), ((), ())),
    "dot": (((0,), (0,)), ((), ())),
}
_STRICT = {"convolution": "conv_general_dilated", **dict.fromkeys(("embedding", "index_select", "index"), "gather")}
"""Ops that must make a value that the source made, by the names of such steps of a program."""
_PAIRWISE = {"add": "add", "sub": "sub", "mul": "mul", "div": "div"}


@dataclass(slots=True)
class TorchForward:
    """A torch model that can be followed step by step; see flax_side.FlaxForward.

    module  a float64 copy in eval mode; `others`: another name of a tied weight -> the path that is looked for
    """

    module: nn.Module
    call: Callable[..., Any] | None
    kind: str
    paths: tuple[str, ...]
    specs: tuple[Any, ...]
    others: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(cls, module: nn.Module, call: Callable[..., Any] | None) -> TorchForward:
        made = probe_copy(module, _SEED)
        state = torch_tree.tensors_of(made)
        own = torch_tree.own_names(made, state)
        aliases = torch_tree.aliases_of(state)
        floating = {key: tensor for key, tensor in state.items() if tensor.is_floating_point() and key in own}
        paths = tuple(key for key in floating if key not in aliases)
        others = {key: aliases[key] for key in floating if key in aliases}
        return cls(made, call, type(module).__name__, paths, tuple(floating[key] for key in paths), others)

    def program(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
        """The steps of one call. ModelError if the model cannot be followed."""
        try:
            return _traced(self, tuple(args), dict(kwargs))
        except GraftaxError:
            raise
        except Exception as error:
            raise ModelError(
                f"the torch model {escape(self.kind)} cannot be followed on these inputs: {type(error).__name__}: "
                f"{escape(str(error).strip(), 500)}"
            ) from error

    def code(self, program: Program) -> tuple[str, str]:
        """(which side, sha256 of its code)."""
        return "like", sha(repr(self.module), steps_hash(program))


_SEED = 2
"""Of the weights with which the model is traced: not those of the redraws that find and confirm."""


class _Called(nn.Module):
    """The model with the call that the inputs state, so that its weights can be given as arguments."""

    def __init__(self, module: nn.Module, call: Callable[..., Any] | None) -> None:
        super().__init__()
        self.module = module
        self.run = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs) if self.run is None else self.run(self.module, *args, **kwargs)


def _traced(forward: TorchForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    from graftax.probe.flax_side import input_arrays

    state = torch_tree.tensors_of(forward.module)
    own = torch_tree.own_names(forward.module, state)
    weights = {f"module.{own[path][0]}": state[path].detach() for path in forward.paths}
    given = nests.mapped((args, kwargs), nests.is_array, to_torch)
    program = Program()
    steps = TorchSteps(program)
    for path in forward.paths:
        program.leaves[path] = steps.begin(weights[f"module.{own[path][0]}"])
    program.inputs = [steps.begin(tensor) for tensor in input_arrays(*given)]
    called = _Called(forward.module, forward.call)

    def run(weights: Any, call: Any) -> list[torch.Tensor]:
        out = torch.func.functional_call(called, weights, *call)
        return [t for _, t in nests.leaves(out, lambda item: isinstance(item, torch.Tensor)) if t.is_floating_point()]

    with float64_run(forward.module, steps.placed(forward.module), steps):
        outs = torch.func.functionalize(run)(weights, given)
    program.outputs = [steps.number(t) for t in outs]
    return program


class TorchSteps(TorchDispatchMode):
    """Writes every op that depends on weights or inputs as a step of the program, while it is active."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self._numbers: dict[int, int] = {}
        self._moving: set[int] = set()
        self._strays: dict[int, str] = {}
        self._alive: list[Any] = []
        self._inside: list[str] = []

    @contextlib.contextmanager
    def placed(self, module: nn.Module) -> Iterator[None]:
        """Inside this context a step says in which module it was made."""
        hooks: list[Any] = []
        for path, item in module.named_modules():
            if path:
                hooks.append(item.register_forward_pre_hook(lambda *_, path=path: self._inside.append(path)))
                hooks.append(item.register_forward_hook(lambda *_: self._inside.pop() and None, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin(self, tensor: torch.Tensor) -> int:
        """The number of a weight or an input."""
        return self._new(tensor)

    def number(self, tensor: torch.Tensor) -> int:
        """The number of a tensor: a constant if nothing that is followed made it."""
        if id(tensor) in self._strays:
            raise ModelError(f"the torch model uses a second result of {escape(self._strays[id(tensor)])}")
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = self.program.constant(np.array(plain_array(tensor)))
            self._alive.append(tensor)
        return self._numbers[id(tensor)]

    def _new(self, tensor: torch.Tensor) -> int:
        number = self.program.value(tuple(tensor.shape), plain_array(tensor.new_empty(())).dtype)
        self._same(tensor, number)
        self._moving.add(number)
        return number

    def _same(self, tensor: torch.Tensor, number: int) -> None:
        self._numbers[id(tensor)] = number
        self._alive.append(tensor)

    def _moves(self, tensor: torch.Tensor) -> bool:
        return self._numbers.get(id(tensor)) in self._moving or id(tensor) in self._strays

    # ------------------------------------------------------------ one op

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(tensors((args, kwargs)))
        if not any(map(self._moves, given)):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if self._by_data(func, name, args):
            raise ModelError(
                f"the torch model has a {escape(name)} that depends on data: only the branch, or the shapes, that this "
                "run happened to have would be probed"
            )
        if func._schema.is_mutable:
            raise ModelError(f"the torch model changes a tensor in place by {escape(name)}")
        apart = _APART.get(name)
        if apart is not None and (found := apart(args, kwargs)) is not None:
            with self:
                made = found()
            return self._with_rest(func, args, kwargs, name, made)
        out = func(*args, **kwargs)
        self._write(name, func, args, kwargs, given, out)
        return out

    def _by_data(self, func: Any, name: str, args: Any) -> bool:
        """True for an op whose value is read by Python, or whose shape depends on what it takes."""
        if name == "index":  # only a mask selects a number of entries that depends on data
            return any(index is not None and index.dtype == torch.bool and self._moves(index) for index in args[1])
        return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags

    def _with_rest(self, func: Any, args: Any, kwargs: Any, name: str, made: torch.Tensor) -> Any:
        """The result of an op that was written out. Its other results (a mean, a variance) cannot be used."""
        if len(func._schema.returns) == 1:
            return made
        _, *rest = func(*args, **kwargs)
        self._strays.update((id(t), name) for t in tensors(rest))
        self._alive += rest
        return (made, *rest)

    def _write(self, name: str, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor], out: Any) -> None:
        made = list(tensors(out))
        first = given[0]
        if name in _SAME and made[0].shape == first.shape and self._kind(made[0]) == self._kind(first):
            self._same(made[0], self.number(first))
            return
        ins = [self.number(t) for t in given]
        step = self._plain(name, args, kwargs, first, made)
        kind, params = step or (_STRICT.get(name, f"torch.{name}"), {RUN: _runner(func, args, kwargs)})
        self.program.step(kind, ins, [self._new(t) for t in made], (self._inside or [""])[-1], **params)

    @staticmethod
    def _kind(tensor: torch.Tensor) -> bool:
        return tensor.is_floating_point()

    @staticmethod
    def _plain(
        name: str, args: Any, kwargs: Any, x: torch.Tensor, made: Sequence[torch.Tensor]
    ) -> tuple[str, dict[str, Any]] | None:
        """(name, parameters) of the step that does what an op does, as Flax's steps do; None if there is none."""
        if name in _PRODUCTS:
            return "dot_general", {"dimension_numbers": _PRODUCTS[name]}
        if name in _RESHAPES and made[0].numel() == x.numel():
            return "reshape", {"new_sizes": tuple(made[0].shape)}
        if name in _ORDERS:
            return "transpose", {"permutation": _order(name, x.ndim, args[1:])}
        if name == "expand" and made[0].ndim >= x.ndim:
            lead = made[0].ndim - x.ndim
            places = tuple(range(lead, made[0].ndim))
            return "broadcast_in_dim", {"shape": tuple(made[0].shape), "broadcast_dimensions": places}
        if name == "cat":
            axis = (args[1:] or (kwargs.get("dim", 0),))[0]
            return "concatenate", {"dimension": axis % made[0].ndim}
        if name in ("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk"):
            axis = (args[2:] or (kwargs.get("dim", 0),))[0] % x.ndim
            return "split", {"axis": axis, "sizes": tuple(t.shape[axis] for t in made)}
        if name == "slice":
            return _sliced(x, args)
        if name == "select" and args[1] % x.ndim == 0:
            return INDEX, {"at": args[2] % x.shape[0]}
        floats = all(isinstance(item, torch.Tensor) and item.is_floating_point() for item in args)
        if name in _PAIRWISE and floats and len(args) == 2 and not kwargs:
            return _PAIRWISE[name], {}
        return None


def _sliced(x: torch.Tensor, args: Any) -> tuple[str, dict[str, Any]]:
    given: tuple[Any, ...] = (*args[1:], *(0, None, None, 1)[len(args) - 1 :])
    axis, stride = int(given[0]), int(given[3])
    start, stop, _ = slice(given[1], given[2]).indices(x.shape[axis])
    starts, stops, strides = [0] * x.ndim, list(x.shape), [1] * x.ndim
    starts[axis], stops[axis], strides[axis] = start, max(start, stop), stride
    cut = {"start_indices": tuple(starts), "limit_indices": tuple(stops)}
    return "slice", {**cut, "strides": tuple(strides) if stride != 1 else None}


def _order(name: str, rank: int, rest: Any) -> tuple[int, ...]:
    if name == "permute":
        return tuple(axis % rank for axis in rest[0])
    order = list(range(rank))
    one, other = rest if name != "t" else (0, max(rank - 1, 0))
    order[one], order[other] = order[other], order[one]
    return tuple(order)


# ---------------------------------------------------------------- one step again


def _runner(func: Any, args: Any, kwargs: Any) -> Callable[..., tuple[Any, ...]]:
    """(arrays of its tensors, in order) -> what an op gives for them, as arrays."""

    def run(*arrays: Any) -> tuple[Any, ...]:
        left = iter(arrays)
        again, named = _filled((args, kwargs), left)
        with torch.no_grad():
            return tuple(plain_array(t) for t in tensors(func(*again, **named)))

    return run


def _filled(nest: Any, left: Iterator[Any]) -> Any:
    if isinstance(nest, torch.Tensor):
        made = to_torch(next(left))
        return made.to(nest.dtype) if made.dtype != nest.dtype else made
    if isinstance(nest, (list, tuple)):
        return type(nest)(_filled(item, left) for item in nest)
    if isinstance(nest, dict):
        return {key: _filled(item, left) for key, item in nest.items()}
    return nest


# ---------------------------------------------------------------- ops with several parameters


def _addmm(args: Any, kwargs: Any) -> Callable[[], torch.Tensor] | None:
    bias, x, y = args
    return None if kwargs else lambda: torch.mm(x, y) + bias


def _baddbmm(args: Any, kwargs: Any) -> Callable[[], torch.Tensor] | None:
    bias, x, y = args
    return None if kwargs else lambda: torch.bmm(x, y) + bias


def _convolution(args: Any, kwargs: Any) -> Callable[[], torch.Tensor] | None:
    x, weight, bias, *rest = args
    if bias is None:
        return None
    return lambda: torch.ops.aten.convolution(x, weight, None, *rest) + along_channels(bias, x)


def _norm(name: str) -> Callable[[Any, Any], Callable[[], torch.Tensor] | None]:
    return lambda args, kwargs: lambda: NORMS[name](args)[-1][0]


_APART: Mapping[str, Callable[[Any, Any], Callable[[], torch.Tensor] | None]] = {
    "addmm": _addmm,
    "baddbmm": _baddbmm,
    "convolution": _convolution,
    **{name: _norm(name) for name in NORMS},
}
"""Op -> what writes it out, a parameter at a time."""
