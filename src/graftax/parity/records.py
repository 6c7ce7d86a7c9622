"""The parts of a traced run: sites, records, the reference made from a torch run, and the two protocols between the
comparison and a framework (Runner, Tap). No framework is imported here.

`Values` below means: nested tuples, lists, dicts and dataclass-like outputs whose array leaves are NumPy arrays on the
host; other leaves (None, numbers, text) are themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from graftax.tree import Module

UNIT = 2.0**-24
"""Half the spacing of float32 at 1: the smallest error that float32 can be held to (DESIGN section 6)."""
THRESHOLD = 5.0
"""An error is an alarm above THRESHOLD x max(torch float32's own error, UNIT). One number for layers and outputs."""


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One call of one module in a run: the module's path on its own side ('' is the root; torch 'layer.0.fc1', Flax
    'layer_0/fc1' without the collection) and which call of it, from 0. An iteration of a scan counts as a call."""

    path: str
    call: int = 0

    def __str__(self) -> str:
        name = self.path or "(the model)"
        return f"{name} (call {self.call + 1})" if self.call else name


@dataclass(frozen=True, slots=True)
class Record:
    """The reference at one site, and torch float32's error against it when it gets the reference input.

    args, kwargs, output   Values of the float64 run, kept as float32 (integers and booleans unchanged)
    in_error, out_error    relative L2 of torch float32: of the input that arrives here when the layers before gave the
                           reference output, and of this module's output for the reference input
    free_error             relative L2 of torch float32's output here in an ordinary run
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    in_error: float = 0.0
    out_error: float = 0.0
    free_error: float = 0.0


@dataclass(frozen=True, slots=True)
class Reference:
    """Everything that is kept of the torch side; a golden file holds it. `order`: the sites in the order in which their
    calls ended. `events`: ("in" | "out", site) in the order in which calls began and ended."""

    modules: Mapping[str, Module]
    order: tuple[Site, ...]
    records: Mapping[Site, Record]
    outputs: Any
    outputs_float32: Any
    not_traced: Mapping[str, str] = field(default_factory=dict[str, str])
    seconds: float = 0.0
    events: tuple[tuple[str, Site], ...] = ()

    @property
    def began(self) -> tuple[Site, ...]:
        """The sites in the order in which their calls began; if that is unknown, in the order in which they ended."""
        return tuple(site for what, site in self.events if what == "in") or self.order


class Tap(Protocol):
    """Listens at the watched modules of a run, and may put other values in their place.

    `enter` gets the Values that arrive and returns None (leave them) or (args, kwargs) of the same structure to call
    the module with. `leave` gets the output and returns None or the output that the caller shall receive instead. A tap
    that only listens may declare `replaces = False`, which is cheaper in compiled code. The tap may keep the arrays.
    """

    def enter(
        self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None: ...

    def leave(self, site: Site, output: Any) -> Any: ...


class Runner(Protocol):
    """A live model of one framework that can be run with a tap. Implemented by torch_runner, linen_runner, nnx_runner.

    The user's object is never changed: after a run, weights, running statistics, rng streams, hooks and classes are as
    before, also if the run raises. An exception of the user's own code becomes a ModelError that names the code that
    failed (framework, module path, file and line).
    """

    @property
    def modules(self) -> Mapping[str, Module]: ...

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        watch: Collection[str] = (),
        tap: Tap | None = None,
    ) -> Any:
        """The model's output as Values. `watch` names the modules whose calls the tap sees."""
        ...

    def replay(
        self,
        path: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        settings: Mapping[str, Any] | None = None,
        leaves: Mapping[str, Any] | None = None,
    ) -> Any:
        """The output of one module alone on these Values: with other settings (attribute name -> value) and other
        weights (leaf path -> array) if given. Raises ReplayError if the module cannot be run alone."""
        ...

    def not_traced(self) -> Mapping[str, str]:
        """Module path -> why its calls were not seen in the last run ('never called', 'inside nn.vmap', ...)."""
        ...
