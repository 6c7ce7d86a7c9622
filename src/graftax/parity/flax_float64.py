"""A Flax model in float64: the `Runner` of a Flax reference.

The model is traced as it is, in its own dtypes, and the program is interpreted step by step in NumPy
(`probe.evaluate`), with all floating values in float64. So a cast between floating dtypes does nothing: modules with
`dtype=bfloat16`, and casts inside the model's code, are followed in float64 too. Under jax's x64 mode they would stay
what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from graftax.adapters import nests
from graftax.errors import ModelError, escape
from graftax.parity.flax_program import MARK
from graftax.parity.records import UNIT, Tap
from graftax.probe.evaluate import evaluate, matrices, widened
from graftax.probe.program import INLINE, Step, inner_of
from graftax.tree import Module

Array = Any
EACH = 0.425 * UNIT
"""RMS of the relative error of one float32 addition, as in `summing`."""
BLOCKS = 8
"""Partial sums are computed at this many places of a contraction, as in `summing`."""
FLOAT32_MAX = float(np.finfo(np.float32).max)


class Float64Runner:
    """`records.Runner` for a Flax model in float64. A tap gets float32 arrays; finite values stay finite.

    runner  the LinenRunner or NnxRunner of the model
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    @property
    def modules(self) -> Mapping[str, Module]:
        return self.runner.modules

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        watch: Collection[str] = (),
        tap: Tap | None = None,
        in_a_row: int | None = None,
    ) -> Any:
        """See `records.Runner`. in_a_row: add to contractions the expected error of summing in float32, one term after
        the other, with signs from this seed (`summing`). ModelError if the program has a step that has no float64
        form."""
        noise = None if in_a_row is None else SummingNoise(np.random.default_rng(in_a_row))

        def interpret(closed: Any, hosts: list[Callable[..., Any]], given: list[Any]) -> list[Any]:
            run = Interpreter(hosts, noise)
            outs = run.run(closed.jaxpr, closed.consts, [widened(value) for value in given])
            return [narrowed(value) for value in outs]

        program, weights = self.runner.program(args, kwargs)
        return program.interpreted(weights, args, kwargs, watch, None if tap is None else _Narrow(tap), interpret)

    def replay(self, path: str, *args: Any, **options: Any) -> Any:
        return self.runner.replay(path, *args, **options)

    def not_traced(self) -> Mapping[str, str]:
        return self.runner.not_traced()


class Float32Runner:
    """`records.Runner` for the same model as it is; runs with an error of summing are those of `Float64Runner`."""

    def __init__(self, runner: Any, wide: Float64Runner) -> None:
        self.runner, self.wide = runner, wide

    @property
    def modules(self) -> Mapping[str, Module]:
        return self.runner.modules

    def run(self, args: Any, kwargs: Any, *, in_a_row: int | None = None, **options: Any) -> Any:
        if in_a_row is not None:
            return self.wide.run(args, kwargs, in_a_row=in_a_row, **options)
        return self.runner.run(args, kwargs, **options)

    def replay(self, path: str, *args: Any, **options: Any) -> Any:
        return self.runner.replay(path, *args, **options)

    def not_traced(self) -> Mapping[str, str]:
        return self.runner.not_traced()


@dataclass(frozen=True, slots=True)
class _Narrow:
    """A tap behind float32."""

    tap: Any

    def enter(self, site: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = _narrow((args, kwargs))
        return self.tap.enter(site, args, kwargs)

    def leave(self, site: Any, output: Any) -> Any:
        return self.tap.leave(site, _narrow(output))

    def restart(self) -> None:
        if hasattr(self.tap, "restart"):
            self.tap.restart()


def _narrow(nest: Any) -> Any:
    return nests.mapped(nest, lambda item: isinstance(item, np.ndarray), narrowed)


def narrowed(array: Array) -> Array:
    """A float64 array as float32, complex128 as complex64; a finite value stays finite. A random key is unchanged."""
    dtype = getattr(array, "dtype", None)
    if dtype == np.complex128:
        return array.astype(np.complex64)
    if dtype != np.float64:
        return array
    with np.errstate(over="ignore"):
        made = np.asarray(array, np.float32)
    lost = np.isinf(made) & np.isfinite(array)
    return np.where(lost, np.copysign(np.float32(FLOAT32_MAX), made), made) if lost.any() else made


# ---------------------------------------------------------------- the interpreter


@dataclass(slots=True)
class Interpreter:
    """Runs a jaxpr on float64 values.

    hosts  functions on the host, by the number in their mark's name
    noise  what is added to contractions
    """

    hosts: Sequence[Callable[..., Any]]
    noise: SummingNoise | None = None
    _last: dict[int, tuple[Any, list[list[Any]]]] = field(default_factory=dict[int, Any])

    def run(self, jaxpr: Any, consts: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        """The outputs. A value is released after its last use."""
        env: dict[Any, Any] = dict(zip(jaxpr.invars, given, strict=True))
        env.update(zip(jaxpr.constvars, map(widened, consts), strict=True))

        def value(atom: Any) -> Any:
            return widened(atom.val) if hasattr(atom, "val") else env[atom]

        for eqn, unused in zip(jaxpr.eqns, self._unused_after(jaxpr), strict=True):
            made = self._step(eqn, [value(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, made, strict=True))
            for variable in unused:
                env.pop(variable, None)
        return [value(atom) for atom in jaxpr.outvars]

    def _unused_after(self, jaxpr: Any) -> list[list[Any]]:
        """For each equation, the variables that nothing after it uses."""
        if id(jaxpr) not in self._last:
            kept = {atom for atom in jaxpr.outvars if not hasattr(atom, "val")}
            out: list[list[Any]] = []
            for eqn in reversed(jaxpr.eqns):
                touched = {atom for atom in (*eqn.invars, *eqn.outvars) if not hasattr(atom, "val")}
                out.append(list(touched - kept))
                kept |= touched
            self._last[id(jaxpr)] = jaxpr, out[::-1]  # the jaxpr is kept, and so is its id
        return self._last[id(jaxpr)][1]

    def _step(self, eqn: Any, given: list[Any]) -> Sequence[Any]:
        name = eqn.primitive.name
        params: Mapping[str, Any] = eqn.params
        called = str(params.get("name", ""))
        if called.startswith(MARK):
            made = self.hosts[int(called.removeprefix(MARK))](*given[1:])
            return [given[0], *(widened(value) for value in made)]
        inner = inner_of(eqn) if name in INLINE else None
        if inner is not None:
            return self.run(inner[0], inner[1], given)
        if name == "scan":
            return self._scan(params, given, eqn.outvars)
        if name == "while":
            return self._while(params, given)
        if name == "cond":
            branches = params["branches"]
            taken = branches[min(max(int(given[0]), 0), len(branches) - 1)]
            return self.run(taken.jaxpr, taken.consts, given[1:])
        try:
            made = evaluate(Step(name, params, (), (), "", eqn), given)
        except Exception as error:
            raise ModelError(
                f"the Flax reference cannot be run in float64: its step {escape(name)} fails there: "
                f"{type(error).__name__}: {escape(str(error).strip(), 300)}"
            ) from error
        return made if self.noise is None else self.noise.added(eqn, given, made)

    def _scan(self, params: Mapping[str, Any], given: list[Any], outvars: Sequence[Any]) -> list[Any]:
        consts, carried, length = params["num_consts"], params["num_carry"], params["length"]
        fixed, carry, scanned = given[:consts], given[consts : consts + carried], given[consts + carried :]
        body, rows = params["jaxpr"], []
        for i in reversed(range(length)) if params["reverse"] else range(length):
            out = self.run(body.jaxpr, body.consts, [*fixed, *carry, *(xs[i] for xs in scanned)])
            carry = out[:carried]
            rows.append(out[carried:])
        rows = rows[::-1] if params["reverse"] else rows
        stacked = [_stacked([row[n] for row in rows], v.aval) for n, v in enumerate(outvars[carried:])]
        return [*carry, *stacked]

    def _while(self, params: Mapping[str, Any], given: list[Any]) -> list[Any]:
        test, body = params["cond_jaxpr"], params["body_jaxpr"]
        tested, fixed = params["cond_nconsts"], params["body_nconsts"]
        carry = given[tested + fixed :]
        while bool(self.run(test.jaxpr, test.consts, [*given[:tested], *carry])[0]):
            carry = self.run(body.jaxpr, body.consts, [*given[tested : tested + fixed], *carry])
        return carry


def _stacked(rows: list[Any], aval: Any) -> Any:
    if not rows:
        return widened(np.zeros(aval.shape, aval.dtype))
    return np.stack(rows) if isinstance(rows[0], (np.ndarray, np.generic)) else jax.numpy.stack(rows)


# ---------------------------------------------------------------- the error of summing


@dataclass(slots=True)
class SummingNoise:
    """The expected error of float32 contractions that add their terms one after the other; its sign is drawn. See
    `summing`, which does the same in torch."""

    random: np.random.Generator

    def added(self, eqn: Any, given: list[Any], made: Sequence[Any]) -> Sequence[Any]:
        """The outputs of an equation, with the error if it is a contraction of floats."""
        name, out = eqn.primitive.name, made[0]
        if name not in ("dot_general", "conv_general_dilated") or np.asarray(out).dtype != np.float64:
            return made
        spread = self._of_dot(eqn, given) if name == "dot_general" else self._of_convolution(eqn, given, out)
        off = EACH * np.sqrt(np.maximum(spread, 0.0))
        signs = np.where(self.random.random(out.shape) < 0.5, -1.0, 1.0)
        return [out + np.nan_to_num(off * signs, nan=0.0, posinf=0.0, neginf=0.0)]

    def _of_dot(self, eqn: Any, given: list[Any]) -> Array:
        left, right, shape = matrices(eqn.params, *given)
        return np.reshape(in_a_row(left, right), shape)

    def _of_convolution(self, eqn: Any, given: list[Any], out: Array) -> Array:
        kernel = given[1].shape
        places = eqn.params["dimension_numbers"].rhs_spec
        terms = math.prod(kernel) // kernel[places[0]]
        squares = evaluate(Step(eqn.primitive.name, eqn.params, (), (), "", eqn), [array**2 for array in given])[0]
        return terms * (out * out / 3 + squares / 6)


def in_a_row(a: Array, b: Array) -> Array:
    """For each value of a @ b, the sum of its squared partial sums. a (..., M, K), b (..., K, N) -> (..., M, N)."""
    blocks = BLOCKS if a.shape[-1] >= 4 * BLOCKS else 1
    total = spread = np.zeros(())
    for left, right in _blocks(a, b, blocks):
        before, total = total, total + left @ right
        between = (left * left) @ (right * right) / 6
        spread = spread + left.shape[-1] * ((before * before + before * total + total * total) / 3 + between)
    return spread


def _blocks(a: Array, b: Array, blocks: int) -> Iterator[tuple[Array, Array]]:
    return zip(np.array_split(a, blocks, -1), np.array_split(b, blocks, -2), strict=True)
