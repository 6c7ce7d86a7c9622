"""Listen to the calls of a module as the module itself gets them: native containers, random keys, its own variables.

A Tap sees Values and may replace them; a Listener changes nothing and gets enough to make the call again alone. Marks
tell beforehand in which loops of a program the calls stand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import io_callback

from graftax.errors import ReplayError
from graftax.parity import flax_values
from graftax.parity.records import Site


@dataclass(frozen=True, slots=True, eq=False)
class Owner:
    """The module of a call: the object (a bound Linen module, an NNX GraphDef) and its variables before the call."""

    object: Any
    state: Any


Own = Callable[[], Owner]


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """A nest as it passed by. members: the sizes of the axes that vmap runs over, outermost first.

    Arrays that a traced program handed out are on the host; they become jax arrays when the nest is taken.
    """

    nest: Any
    node: flax_values.Node | None = None
    arrays: Sequence[Any] = ()
    weak: Sequence[bool] = ()
    members: tuple[int, ...] = ()

    def at(self, member: tuple[int, ...] = ()) -> Any:
        """The nest; of a vmapped call that of one member."""
        if self.node is None:
            return self.nest
        member = member if self.members else ()
        return flax_values.refill(
            self.node, [_restored(array[member], weak) for array, weak in zip(self.arrays, self.weak, strict=True)]
        )


def snapshot(nest: Any) -> Any:
    """The nest with its own lists and dicts: the model may change those it passes."""
    if type(nest) in (list, tuple):
        return type(nest)(map(snapshot, nest))
    return {key: snapshot(child) for key, child in nest.items()} if type(nest) is dict else nest


def _restored(array: Any, weak: bool) -> Any:
    """A jax array, weakly typed if it was: the next op would promote it differently otherwise."""
    if not weak:
        return jax.numpy.asarray(array)
    return jax.numpy.broadcast_to(jax.numpy.asarray(array.dtype.type(0).item()), array.shape).at[...].set(array)


class Listener(ABC):
    """Hears the calls of the watched modules of an eager run, in the order of the program. `began` and `ended` must not
    compute with jax: they may run in a callback."""

    replaces = False

    @abstractmethod
    def began(self, site: Site, method: str, owner: Any, call: Heard) -> None:
        """owner: `Owner.object`; call: (args, kwargs, `Owner.state`)."""

    @abstractmethod
    def ended(self, site: Site, output: Heard) -> None: ...

    @abstractmethod
    def restart(self) -> None:
        """Forget a run that did not finish."""


def passed(nest: Any, vmapped: bool, hear: Callable[[Heard], None]) -> Any:
    """`nest` in traced code, after a callback that hands it to `hear` when the code runs. Inside vmap one callback gets
    all members, and its results must be used, so that it runs."""
    arrays, node = flax_values.spread(nest, keys=True)
    weak = [bool(getattr(array, "weak_type", False)) for array in arrays]

    def host(*given: Any) -> tuple[Any, ...]:
        copies = tuple(np.array(item) for item in given)  # XLA reuses its buffers
        extra = copies[0].ndim - len(np.shape(arrays[0])) if copies else 0
        hear(Heard(None, node, copies, weak, copies[0].shape[:extra] if copies else ()))
        return copies

    def only_hear(*given: Any) -> None:
        host(*given)

    if not vmapped:
        io_callback(only_hear, None, *arrays, ordered=True)
        return nest
    shapes = tuple(jax.ShapeDtypeStruct(np.shape(a), jax.dtypes.canonicalize_dtype(a.dtype)) for a in arrays)
    made = jax.pure_callback(host, shapes, *arrays, vmap_method="broadcast_all")
    return flax_values.refill(node, flax_values.kept(arrays, made, [True] * len(arrays)))


# ---------------------------------------------------------------- loops


_MARK = "graftax_call_"


@dataclass(slots=True)
class Marks:
    """Marks the calls of one module in a program while it is traced, by a jitted function that changes nothing."""

    count: int = 0

    def mark(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: Any) -> tuple[Any, Any]:
        """(args, kwargs) behind the mark."""
        arrays, node = flax_values.spread((args, kwargs, state), keys=True)

        def same(number: Any, *given: Any) -> Any:
            return given

        same.__name__ = f"{_MARK}{self.count}"
        self.count += 1
        args, kwargs, _ = flax_values.refill(node, jax.jit(same)(jax.numpy.zeros(()), *arrays))
        return args, kwargs


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop with marked calls inside. kind: the primitive (scan, while, cond)."""

    kind: str
    length: int
    backward: bool
    body: tuple[Any, ...]


def marked_calls(jaxpr: Any) -> tuple[Loop | None, ...]:
    """The marked calls of a program in its order (None), in their loops."""
    return tuple(_marked(jaxpr))


def _marked(jaxpr: Any) -> Iterator[Loop | None]:
    for equation in jaxpr.eqns:
        params: Mapping[str, Any] = equation.params
        kind = equation.primitive.name
        if str(params.get("name", "")).startswith(_MARK):
            yield None
            continue
        inside = tuple(item for part in _parts(params) for item in _marked(part))
        if inside and kind in ("scan", "while", "cond"):
            yield Loop(kind, params.get("length", 0), params.get("reverse", False), inside)
        else:
            yield from inside


def _parts(params: Mapping[str, Any]) -> Iterator[Any]:
    """The inner programs of an equation."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def positions(calls: Sequence[Loop | None], at: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """The iterations in which the calls happen, one tuple (outermost scan first) for each call, in the order in which
    an unrolled program makes them. ReplayError where a program does not tell them."""
    for item in calls:
        if item is None:
            yield at
        elif item.kind == "scan":
            order = range(item.length)
            for number in reversed(order) if item.backward else order:
                yield from positions(item.body, (*at, number))
        else:
            what = "a while loop, whose steps" if item.kind == "while" else "a branch of a condition, whose calls"
            raise ReplayError(f"it is called in {what} cannot be counted beforehand")


def in_loop(calls: Sequence[Loop | None]) -> bool:
    """Is a call in a loop? A branch of a condition is none."""
    return any(item is not None and (item.kind != "cond" or in_loop(item.body)) for item in calls)
