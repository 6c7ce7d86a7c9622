"""On which axes a Linen model stacks its leaves (nn.scan, nn.vmap), read from the jaxpr of its call.

Shapes do not show it where a model has as many layers as each is wide. Inside its own call a module sees its leaves
without the stacked axes: there each leaf is marked by a reduction over all axes that it has. In the jaxpr of the whole
call the mark reduces every axis but those of vmap; those of scan are gone where its body begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from graftax.adapters import containers

_MARK = "graftax_marked_leaf"
_SAME = frozenset(
    ("copy", "copy_p", "convert_element_type", "stop_gradient", "optimization_barrier", "reduce_precision")
)


@contextmanager
def marked() -> Iterator[None]:
    """Inside this context every Linen module that is called marks the leaves that it holds directly."""
    import jax
    from flax import linen as nn

    def graftax_marked_leaf(leaf: Any) -> Any:
        return jax.numpy.max(leaf)

    assert graftax_marked_leaf.__name__ == _MARK
    mark = jax.jit(graftax_marked_leaf)

    def watch(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "setup" and "<" not in context.method_name:
            for keys, leaf in containers.leaves(context.module.variables):
                if len(keys) == 2 and leaf.ndim and jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
                    mark(leaf)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
        yield


@dataclass(frozen=True, slots=True)
class _Part:
    """A leaf, or a part of it inside loops: its axes that are left, in order, and those that scans have taken."""

    name: str
    axes: tuple[int, ...]
    scanned: tuple[int, ...] = ()


def stacked_axes(jaxpr: Any, names: list[str]) -> dict[str, tuple[int, ...]]:
    """leaf -> the axes on which it is stacked, from the front; () if it is not. The first arguments of the jaxpr are
    the leaves `names`. A leaf that is used in different ways is left out."""
    walk = _Walk()
    ends = zip(names, jaxpr.invars, strict=False)
    walk.run(jaxpr, {variable: _Part(name, tuple(range(variable.aval.ndim))) for name, variable in ends})
    return {name: next(iter(found)) for name, found in walk.found.items() if len(found) == 1}


@dataclass(slots=True)
class _Walk:
    found: dict[str, set[tuple[int, ...]]] = field(default_factory=dict[str, "set[tuple[int, ...]]"])

    def run(self, jaxpr: Any, env: dict[Any, _Part]) -> None:
        for eqn in jaxpr.eqns:
            given = [None if hasattr(atom, "val") else env.get(atom) for atom in eqn.invars]
            if not any(given):
                continue
            name, params = eqn.primitive.name, eqn.params
            if params.get("name") == _MARK:
                self._note(given[0], params["jaxpr"].jaxpr)
            elif name == "scan":
                self._scan(params, given)
            elif name == "transpose" and given[0] is not None:
                env[eqn.outvars[0]] = replace(given[0], axes=tuple(given[0].axes[a] for a in params["permutation"]))
            elif name in _SAME and given[0] is not None:
                env[eqn.outvars[0]] = given[0]
            else:
                for inner in _inner(params, len(given)):
                    made = {var: part for var, part in zip(inner.invars, given, strict=True) if part is not None}
                    self.run(inner, made)
                    outs = zip(eqn.outvars, inner.outvars, strict=False)
                    env |= {out: made[var] for out, var in outs if not hasattr(var, "val") and var in made}

    def _note(self, part: _Part | None, marked: Any) -> None:
        if part is None or len(marked.eqns) != 1:
            return
        gone = {int(axis) for axis in marked.eqns[0].params.get("axes", ())}
        left = tuple(axis for place, axis in enumerate(part.axes) if place not in gone)
        self.found.setdefault(part.name, set()).add(tuple(sorted((*part.scanned, *left))))

    def _scan(self, params: Mapping[str, Any], given: list[_Part | None]) -> None:
        inner = params["jaxpr"].jaxpr
        consts, first = params["num_consts"], params["num_consts"] + params["num_carry"]
        env: dict[Any, _Part] = {}
        for n, (variable, part) in enumerate(zip(inner.invars, given, strict=True)):
            if part is None or consts <= n < first:
                continue
            env[variable] = (
                part if n < consts else replace(part, axes=part.axes[1:], scanned=(*part.scanned, part.axes[0]))
            )
        self.run(inner, env)


def _inner(params: Mapping[str, Any], count: int) -> list[Any]:
    """The jaxprs of an equation that take its operands."""
    found = [getattr(value, "jaxpr", value) for value in params.values()]
    return [jaxpr for jaxpr in found if hasattr(jaxpr, "eqns") and len(jaxpr.invars) == count]
