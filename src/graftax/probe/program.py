"""A Flax model as a flat list of steps: one jaxpr, its calls inlined and its scans unrolled, its weights as arguments.

Linen and NNX give the same steps, so nothing after this module knows which of the two it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftax.errors import ModelError, escape

SCAN_MOST = 4096
"""Scan iterations that are unrolled, in all."""
INLINE = frozenset((
    "pjit", "jit", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "checkpoint", "remat", "remat2",
    "closed_call", "core_call", "custom_lin", "shard_map",
))  # fmt: skip
"""Primitives that call an inner jaxpr with the same operands."""
_SAME = frozenset(
    ("copy", "copy_p", "stop_gradient", "reduce_precision", "sharding_constraint", "optimization_barrier")
)
"""Primitives that give what they take."""
_BRANCHES = frozenset(("while", "cond"))
_CALLBACKS = frozenset(("pure_callback", "io_callback", "debug_callback", "python_callback"))
INDEX, JOIN = "index", "join"
"""Steps of our own: element `at` of axis 0, and values stacked along a new axis 0 (what a scan takes and gives)."""
RUN = "run"
"""The parameter of a step that brings its own function, as the ops of torch do: arrays -> a tuple of arrays."""


@dataclass(frozen=True, slots=True)
class Step:
    """One primitive: its name and parameters, the numbers of the values it takes and gives, and where the model's code
    calls it."""

    name: str
    params: Mapping[str, Any]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    where: str = ""
    source: Any = None


@dataclass(slots=True)
class Program:
    """A model's forward.

    shapes, floating  of each value, by its number
    constants         value -> array
    leaves            path -> value, for the weights
    inputs, outputs   the values of the model's inputs and outputs, flat
    """

    steps: list[Step] = field(default_factory=list[Step])
    shapes: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    dtypes: list[Any] = field(default_factory=list[Any])
    constants: dict[int, Any] = field(default_factory=dict[int, Any])
    leaves: dict[str, int] = field(default_factory=dict[str, int])
    inputs: list[int] = field(default_factory=list[int])
    outputs: list[int] = field(default_factory=list[int])

    def value(self, shape: Sequence[int], dtype: Any) -> int:
        """The number of a new value."""
        self.shapes.append(tuple(shape))
        self.dtypes.append(dtype)
        return len(self.shapes) - 1

    def constant(self, array: Any) -> int:
        number = self.value(np.shape(array), getattr(array, "dtype", np.asarray(array).dtype))
        self.constants[number] = array
        return number

    def step(self, name: str, ins: Sequence[int], outs: Sequence[int], where: str = "", **params: Any) -> None:
        self.steps.append(Step(name, params, tuple(ins), tuple(outs), where))

    def floating(self, number: int) -> bool:
        return _floating(self.dtypes[number])


def _floating(dtype: Any) -> bool:
    try:
        kind = np.dtype(dtype)
    except TypeError:  # a random key
        return False
    return kind.kind == "f" or "float" in kind.name


def program_of(closed: Any, paths: Sequence[str], inputs: int) -> Program:
    """The steps of a closed jaxpr whose first arguments are the leaves at `paths`, followed by `inputs` input arrays.
    ModelError for what cannot be followed."""
    program = Program()
    env: dict[Any, int] = {}
    for n, variable in enumerate(closed.jaxpr.invars):
        number = program.value(variable.aval.shape, variable.aval.dtype)
        env[variable] = number
        if n < len(paths):
            program.leaves[paths[n]] = number
        else:
            program.inputs.append(number)
    for variable, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        env[variable] = program.constant(value)
    walk = _Inliner(program, {*program.leaves.values(), *program.inputs})
    walk.run(closed.jaxpr, env)
    program.outputs = [walk.atom(env, atom) for atom in closed.jaxpr.outvars]
    return program


@dataclass(slots=True)
class _Inliner:
    program: Program
    moving: set[int]
    """Values that depend on inputs or leaves."""
    unrolled: int = 0

    def atom(self, env: dict[Any, int], atom: Any) -> int:
        return self.program.constant(np.asarray(atom.val)) if hasattr(atom, "val") else env[atom]

    def run(self, jaxpr: Any, env: dict[Any, int]) -> None:
        for eqn in jaxpr.eqns:
            given = [self.atom(env, atom) for atom in eqn.invars]
            name = eqn.primitive.name
            inner = inner_of(eqn) if name in INLINE else None
            if inner is not None:
                made = self._call(inner, given)
            elif name == "scan":
                made = self._scan(eqn, given)
            elif name in _SAME or (name == "convert_element_type" and self._widens(eqn, given[0])):
                made = given
            else:
                if name in _BRANCHES and any(n in self.moving for n in (given[:1] if name == "cond" else given)):
                    raise ModelError(
                        f"the Flax model has a {name} that depends on data: only the branch that happened to run would "
                        "be probed"
                    )
                if name in _CALLBACKS:
                    raise ModelError(f"the Flax model calls back into Python ({escape(name)}): it cannot be probed")
                made = [self.program.value(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
                step = Step(name, eqn.params, tuple(given), tuple(made), _where(eqn), eqn)
                self.program.steps.append(step)
                if any(n in self.moving for n in given):
                    self.moving.update(made)
            for variable, number in zip(eqn.outvars, made, strict=True):
                env[variable] = number

    def _widens(self, eqn: Any, given: int) -> bool:
        """True for a cast between floating dtypes: in a float64 run it does nothing."""
        program = self.program
        return program.floating(given) and _floating(eqn.params["new_dtype"])

    def _call(self, closed: Any, given: Sequence[int]) -> list[int]:
        """The outputs of an inner jaxpr, its steps added to the program."""
        jaxpr, consts = closed
        env: dict[Any, int] = dict(zip(jaxpr.invars, given, strict=True))
        env |= {v: self.program.constant(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}
        self.run(jaxpr, env)
        return [self.atom(env, atom) for atom in jaxpr.outvars]

    def _scan(self, eqn: Any, given: Sequence[int]) -> list[int]:
        params, program = eqn.params, self.program
        consts, carried, length = params["num_consts"], params["num_carry"], params["length"]
        self.unrolled += length
        if self.unrolled > SCAN_MOST:
            raise ModelError(f"the Flax model scans over {self.unrolled} steps: at most {SCAN_MOST} are unrolled")
        fixed, carry, scanned = (
            list(given[:consts]),
            list(given[consts : consts + carried]),
            list(given[consts + carried :]),
        )
        closed = params["jaxpr"]
        rows: list[list[int]] = []
        order = range(length - 1, -1, -1) if params["reverse"] else range(length)
        for i in order:
            items: list[int] = []
            for number in scanned:
                made = program.value(program.shapes[number][1:], program.dtypes[number])
                program.step(INDEX, (number,), (made,), at=i)
                self.moving.update((made,) if number in self.moving else ())
                items.append(made)
            out = self._call((closed.jaxpr, closed.consts), [*fixed, *carry, *items])
            carry = out[:carried]
            rows.append(out[carried:])
        if params["reverse"]:
            rows.reverse()
        stacked: list[int] = []
        for n, variable in enumerate(eqn.outvars[carried:]):
            made = program.value(variable.aval.shape, variable.aval.dtype)
            program.step(JOIN, [row[n] for row in rows], (made,))
            self.moving.update((made,) if any(row[n] in self.moving for row in rows) else ())
            stacked.append(made)
        return [*carry, *stacked]


def inner_of(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """(jaxpr, its constants) of a call with the same operands."""
    for value in eqn.params.values():
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns") and len(jaxpr.invars) == len(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars):
            return jaxpr, getattr(value, "consts", ())
    return None


def _where(eqn: Any) -> str:
    """The line of the model's code."""
    try:
        from jax.extend import source_info_util  # pyright: ignore
    except ImportError:
        return str(getattr(eqn.source_info, "name_stack", ""))
    return source_info_util.summarize(eqn.source_info)


def trace(call: Callable[..., Any], leaves: Sequence[Any], inputs: Sequence[Any], paths: Sequence[str]) -> Program:
    """The program of `call(leaves, inputs)`, both flat lists of arrays."""
    import jax

    with jax.default_matmul_precision("highest"):
        closed = jax.make_jaxpr(call)(list(leaves), list(inputs))
    return program_of(closed, paths, len(inputs))
