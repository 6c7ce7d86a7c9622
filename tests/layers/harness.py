"""Forward parity of one layer: torch against Linen and NNX, there and back. A case is one row of cases.CASES."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from graftax.adapters import settings
from graftax.layers import Connection, Part, connect
from graftax.ops import apply_chain, invert_chain
from graftax.rules import apply_rules, escape_key, load_rules
from graftax.tree import Checkpoint, Module, Side, TensorSpec, join_path

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiling costs more than running here."""
UNIT = 2.0**-24
ALARM = 5.0


def call(module: Any, x: Any) -> Any:
    return module(x)


@dataclass(frozen=True)
class Case:
    """One layer on three sides.

    layer     the row of the table it proves
    torch, linen, nnx   make the module (nnx is given Rngs); None: that side has no such layer
    x         the shape of the input, torch's layout; `channels` moves axis 1 to the end for Flax and back
    on_torch, on_flax   how to call; `on_flax` sees a bound Linen module or an NNX one
    file      what the names and shapes alone give: 'first' the same connection, 'among' it is one of several
    exact     the way there and back gives the same bits
    rule      what a rule states where the row has no form of its own
    make_x    another input than standard normal values
    """

    name: str
    layer: str
    torch: Callable[[], torch.nn.Module]
    linen: Callable[[], Any] | None
    nnx: Callable[[nnx.Rngs], Any] | None
    x: tuple[int, ...]
    channels: bool = False
    variant: str = ""
    on_torch: Callable[[Any, Any], Any] = call
    on_flax: Callable[[Any, Any], Any] = call
    file: str = "first"
    exact: bool = True
    layout: str = ""
    rule: Mapping[str, Any] = field(default_factory=dict)
    make_x: Callable[[np.random.Generator], np.ndarray] | None = None
    prepare: Callable[[torch.nn.Module], None] | None = None
    alarm: float = ALARM
    by: str = "modules"
    blind: tuple[str, ...] = ()  # leaves that do not change the output: softmax ignores the bias of the keys
    concrete: bool = False  # nnx.eval_shape hides raw arrays

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(self.name.encode()))


# ---------------------------------------------------------------- the three sides


def randomise(module: torch.nn.Module, rng: np.random.Generator) -> None:
    """Every tensor random and distinct, variances positive."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                values = rng.standard_normal(tensor.shape) * 0.5
                if name.endswith("var"):
                    values = 0.5 + np.abs(values)
                if name.endswith(("_g", "original0")):
                    values = 0.5 + np.abs(values)
                tensor.copy_(torch.from_numpy(np.asarray(values)))
            else:
                tensor.fill_(7)


def torch_arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}


def live(module: Any) -> Module:
    """What an adapter says of a module: kind, bases, settings."""
    kind = type(module)
    return Module("", kind.__name__, settings.bases(kind), settings.collect(vars(module).items()))


def part(side: Side, arrays: Mapping[str, np.ndarray], roles: Mapping[str, str], module: Any = None) -> Part:
    specs = {path: TensorSpec(arrays[path].shape, arrays[path].dtype.name) for path in arrays}
    leaves = {role: path for path, role in roles.items()}
    assert len(leaves) == len(roles), "two leaves have one role"
    return Part("layer", side, leaves, specs, live(module) if module is not None else None)


def quick(function: Any) -> Any:
    return jax.jit(function, compiler_options=QUICK)


class LinenSide:
    """A Linen module: its leaves as {path: array}, and its output on such leaves."""

    def __init__(self, case: Case, x: np.ndarray) -> None:
        assert case.linen is not None
        self.case, self.x, self.forward = case, x, None
        self.module = case.linen()
        variables = jax.eval_shape(lambda: self.module.init(jax.random.key(0), x, method=case.on_flax))
        flat = jax.tree_util.tree_flatten_with_path(variables)
        self.tree = flat[1]
        self.keys = [tuple(key.key for key in path) for path, _ in flat[0]]
        self.shapes = {join_path(keys): leaf for keys, (_, leaf) in zip(self.keys, flat[0], strict=True)}

    def roles(self) -> dict[str, str]:
        return {join_path(keys): join_path(keys[1:]) for keys in self.keys}

    def run(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        leaves = [jax.numpy.asarray(arrays[join_path(keys)]) for keys in self.keys]
        return self.call(jax.tree_util.tree_unflatten(self.tree, leaves))

    def call(self, variables: Any) -> np.ndarray:
        if self.forward is None:
            self.forward = quick(lambda v, x: self.module.apply(v, x, method=self.case.on_flax))
        with jax.default_matmul_precision("highest"):
            return np.asarray(self.forward(variables, self.x))


class NnxSide:
    """An NNX module: its weights as {path: array}, and its output on such weights."""

    def __init__(self, case: Case, x: np.ndarray) -> None:
        assert case.nnx is not None
        self.case, self.x, self.forward = case, x, None
        make = lambda: case.nnx(nnx.Rngs(0))  # noqa: E731
        self.module = make() if case.concrete else nnx.eval_shape(make)
        self.graph, self.weights, self.rest = nnx.split(self.module, self.is_weight, ...)
        self.flat = list(nnx.to_flat_state(self.weights))
        self.shapes = {join_path(keys): self._value(leaf) for keys, leaf in self.flat}

    @staticmethod
    def is_weight(path: Any, value: Any) -> bool:
        return not isinstance(value, (nnx.RngState, nnx.Cache))

    @staticmethod
    def _value(leaf: Any) -> Any:
        return leaf.get_value() if hasattr(leaf, "get_value") else leaf

    def roles(self) -> dict[str, str]:
        return {path: path for path in self.shapes}

    def run(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        leaves = []
        for keys, leaf in self.flat:
            value = jax.numpy.asarray(arrays[join_path(keys)])
            leaves.append((keys, leaf.replace(value) if hasattr(leaf, "replace") else value))
        return self.call(nnx.from_flat_state(leaves))

    def call(self, state: Any) -> np.ndarray:
        if self.forward is None:
            graph, on_flax = self.graph, self.case.on_flax
            self.forward = quick(lambda state, rest, x: on_flax(nnx.merge(graph, state, rest), x))
        fill = lambda s: jax.random.key(0) if "key" in str(s.dtype) else jax.numpy.zeros(s.shape, s.dtype)  # noqa: E731
        with jax.default_matmul_precision("highest"):
            return np.asarray(self.forward(state, jax.tree.map(fill, self.rest), self.x))


SIDES = {"linen": LinenSide, "nnx": NnxSide}


# ---------------------------------------------------------------- a run


@dataclass
class Run:
    """What one case gave on one side: the inputs of a check, for tests that go on from there."""

    case: Case
    module: torch.nn.Module
    side: Any
    torch_part: Part
    flax_part: Part
    connections: list[Connection]
    arrays: dict[str, np.ndarray]
    x: np.ndarray
    want: np.ndarray
    unit: float

    @property
    def connection(self) -> Connection:
        return self.connections[0]


def to_flax(case: Case, x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1).copy() if case.channels else x


def from_flax(case: Case, y: np.ndarray) -> np.ndarray:
    return np.moveaxis(y, -1, 1) if case.channels else y


def relative(found: np.ndarray, want: np.ndarray) -> float:
    assert found.shape == want.shape, f"{found.shape} is not {want.shape}"
    error = np.linalg.norm(found.astype(np.float64) - want) / max(np.linalg.norm(want), 1e-30)
    return float("inf") if np.isnan(error) else float(error)


def twin(case: Case, state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A module of the case with these tensors (old weight norm cannot be deep-copied)."""
    module = case.torch().eval()
    module.load_state_dict(state)
    return module


def ways(case: Case, torch_part: Part, flax_part: Part) -> list[Connection]:
    """What the layer table gives, or the rule of the case for the weight and the bias."""
    if not case.rule:
        return connect(torch_part, flax_part, layout=case.layout)
    tables: list[dict[str, Any]] = []
    for role, leaf in (("weight", "kernel"), ("bias", "bias")):
        roles = sorted((r for r in flax_part.leaves if r.rpartition("/")[2] == leaf), key=lambda r: "qkv".find(r[0]))
        keys = dict(case.rule) if role == "weight" else {k: v for k, v in case.rule.items() if k in ("fused", "heads")}
        tables.append({"torch": role, "flax": [escape_key(flax_part.leaves[r]) for r in roles], **keys})
    ends = (Checkpoint(label=p.side, side=p.side, specs=dict(p.specs)) for p in (torch_part, flax_part))
    made = apply_rules(load_rules(tables), *ends, "torch", "flax").proposal
    assert not made.failures, made.failures
    return [Connection(case.layer, made.entries, (), case.variant, by="modules")]


def start(case: Case, api: str) -> Run:
    rng = case.rng
    torch.manual_seed(0)
    module = case.torch().eval()
    randomise(module, rng)
    if case.prepare is not None:
        case.prepare(module)
    x = case.make_x(rng) if case.make_x is not None else rng.standard_normal(case.x).astype(np.float32)
    tensor = torch.from_numpy(x)
    with torch.no_grad():
        wide = twin(case, module.state_dict()).double()
        want = case.on_torch(wide, tensor.double() if tensor.is_floating_point() else tensor).numpy()
        narrow = case.on_torch(module, tensor).numpy()
    side = SIDES[api](case, to_flax(case, x))
    arrays = torch_arrays(module)
    torch_part = part("torch", arrays, {name: name for name in arrays}, module)
    flax_specs = {p: np.empty(s.shape, s.dtype) for p, s in side.shapes.items()}
    flax_part = part("flax", flax_specs, side.roles(), side.module)
    found = ways(case, torch_part, flax_part)
    unit = max(relative(narrow, want), UNIT)
    return Run(case, module, side, torch_part, flax_part, found, arrays, x, want, unit)


def carry(connection: Connection, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The Flax leaves that a connection makes of torch arrays."""
    out: dict[str, np.ndarray] = {}
    for entry in connection.entries:
        made = apply_chain(entry.ops, tuple(arrays[name] for name in entry.sources))
        out |= dict(zip(entry.targets, made, strict=True))
    return out


def carry_back(connection: Connection, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for entry in connection.entries:
        made = apply_chain(invert_chain(entry.ops), tuple(arrays[name] for name in entry.targets))
        out |= dict(zip(entry.sources, made, strict=True))
    return out


def error_of(run: Run, flax: Mapping[str, np.ndarray]) -> float:
    """Relative L2 of the Flax output against torch in float64, in units of what float32 costs torch."""
    return relative(from_flax(run.case, run.side.run(flax)), run.want) / run.unit


def disturbed(array: np.ndarray) -> np.ndarray:
    """The same values, moved by one along the first axis that has more than one; a lone value half as large again."""
    axis = next((i for i, extent in enumerate(array.shape) if extent > 1), None)
    return array * np.float32(1.5) if axis is None else np.roll(array, 1, axis)


def error_back(run: Run, arrays: Mapping[str, np.ndarray]) -> float:
    """The same for a torch module that was given `arrays`."""
    module = twin(run.case, {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    with torch.no_grad():
        return relative(run.case.on_torch(module, torch.from_numpy(run.x)).numpy(), run.want) / run.unit
