"""Find one call of one module in an eager run of a Flax model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftax.errors import GraftaxError, PlanError, ReplayError, UsageError, counted, escape
from graftax.parity.flax_program import Program
from graftax.parity.listening import Heard, Listener, Marks, in_loop, marked_calls, positions
from graftax.parity.records import Site

Index = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Selected:
    """The call that was looked for. member: its position among the members of the vmaps around it."""

    site: Site
    method: str
    owner: Any
    call: Heard
    member: Index
    output: Heard | None = None

    @property
    def members(self) -> Index:
        return self.call.members

    def taken(self) -> Any:
        """(args, kwargs, the module's variables before the call)."""
        return self.call.at(self.member)

    def returned(self) -> Any:
        assert self.output is not None
        return self.output.at(self.member)


def select_call(
    runner: Any, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, call: int, index: Index
) -> Selected:
    """The call number `call` of those at this index. The model runs once; before, it is traced to see the loops."""
    program, weights = runner.program(args, kwargs)
    loops = _loops(program, weights, path, args, kwargs)
    where = list(positions(loops)) if in_loop(loops) else None
    search = _Search(where, call, index)
    program.run(weights, args, kwargs, [path], search, compiled=False, unrolled=where is not None)
    if where is not None and search.heard and search.heard != len(where):
        raise ReplayError(f"its program has {counted(len(where), 'call')}, its run made {search.heard}")
    if search.found is None or search.found.output is None:
        raise search.missing(escape(path) or "the model", runner.not_traced().get(path, ""))
    return search.found


def _loops(program: Program, weights: Any, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    try:
        return marked_calls(program.jaxpr(weights, args, kwargs, [path], Marks()))
    except Exception:  # code that needs values cannot be traced, nor stand in a loop of jax
        return ()


class _Search(Listener):
    """where: the iterations of each call in the order of the run; None: no loop is around any call."""

    def __init__(self, where: Sequence[Index] | None, call: int, index: Index) -> None:
        self.where, self.call, self.index = where, call, index
        self.restart()

    def restart(self) -> None:
        self.found: Selected | None = None
        self.heard = self.matching = 0
        self.sizes: dict[int, list[_Around]] = {}
        """how many loops are around a call -> the loops, outermost first"""

    def began(self, site: Site, method: str, owner: Any, call: Heard) -> None:
        self.heard += 1
        at: Index = ()
        if self.where is not None:
            if site.call >= len(self.where):
                return
            at = self.where[site.call]
        kinds = ["scan"] * len(at) + ["vmap"] * len(call.members)
        loops = self.sizes.setdefault(len(kinds), [_Around(kind) for kind in kinds])
        for loop, size in zip(loops, (*(i + 1 for i in at), *call.members), strict=True):
            loop.size = max(loop.size, size)
        member = self.index[len(at) :]
        inside = len(self.index) == len(loops) and all(i < n for i, n in zip(member, call.members, strict=False))
        if not inside or self.index[: len(at)] != at:
            return
        if self.matching == self.call:
            self.found = Selected(site, method, owner, call, member)
        self.matching += 1

    def ended(self, site: Site, output: Heard) -> None:
        if self.found is not None and self.found.site == site:
            self.found.output = output

    def missing(self, name: str, why: str) -> GraftaxError:
        """Why there is no such call. why: the reason why the calls of the module were not heard, if it is known."""
        if not self.heard:
            if why and "never" not in why:
                return ReplayError(f"its calls cannot be heard: {why}")
            hint = "Pass inputs with which the model calls it, or take a module above or below it."
            return PlanError(f"these inputs never reach {name}: it is not called", next=hint)
        loops = self.sizes.get(len(self.index))
        if loops is None:
            depth, loops = max(self.sizes.items(), key=lambda item: item[0])
            if not depth:
                return UsageError(f"{name} stands in no scan or vmap", next="Leave index out.")
            index = "a number" if depth == 1 else f"a tuple of {depth} numbers"
            return UsageError(f"{name} stands in {_described(loops)}", next=f"Pass index={_ranges(loops)} ({index}).")
        if any(i >= loop.size for i, loop in zip(self.index, loops, strict=True)):
            given = self.index[0] if len(self.index) == 1 else self.index
            return UsageError(
                f"index={given} is out of range: {name} stands in {_described(loops)}",
                next=f"Pass index={_ranges(loops)}.",
            )
        times = counted(self.matching, "time")
        return UsageError(
            f"call={self.call} is out of range: {name} is called {times}{' there' if self.index else ''}",
            next=f"Pass call={_span(self.matching)}.",
        )


@dataclass(slots=True)
class _Around:
    """A loop around a call: what runs through it, and how many there are."""

    what: str
    size: int = 0


def _described(loops: Sequence[_Around]) -> str:
    return " in ".join(f"a {loop.what} of {loop.size}" for loop in reversed(loops))


def _ranges(loops: Sequence[_Around]) -> str:
    return ", ".join(_span(loop.size) for loop in loops)


def _span(size: int) -> str:
    return "0" if size == 1 else f"0 to {size - 1}"
