"""What a live tree shows of its modules: evidence of the highest rank, and how to make another tree like it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from graftax.tree.renaming import Renaming


@dataclass(frozen=True, slots=True)
class Module:
    """A live module: evidence of the highest rank.

    kind      its class name
    bases     the qualified names along the method resolution order
    leaves    role ('weight', 'kernel', 'query/kernel') -> the full path of the leaf
    calls     what its call runs: functions set on this one module, then those of `bases` that define the call, the one
              that runs first
    own_math  that one overrides another and does not hand its weights on to the base's call or function
    code      a hash of the user's own code that it runs; "" if all of it is a framework's
    """

    path: str
    kind: str
    bases: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    leaves: Mapping[str, str] = field(default_factory=dict[str, str])
    calls: tuple[str, ...] = ()
    own_math: bool = False
    code: str = ""

    def renamed(self, path: str, names: Renaming) -> Module:
        """The module at its new path, with those of its leaves that `names` keeps."""
        leaves = {role: new for role, leaf in self.leaves.items() if (new := names.new(leaf)) is not None}
        return replace(self, path=path, leaves=leaves)


Axes = tuple[tuple[str, int | None], ...]
"""The axes of a map, outermost first: c is its channels, d h w are spatial; the length where it is known."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a traced call of a live model shows.

    order    module path -> its place in the order of first calls
    columns  matrix -> the axes of the flattened map that it takes; one axis (c, or x for what a matrix made) for no map
    rows     matrix -> the axes of the map that its outputs are unflattened to; vector -> those that it is applied to
    stacked  leaf -> the axes on which it is stacked, from the front; () if it is not
    summed   matrix -> its axis that a product with the input sums over
    """

    order: Mapping[str, int] = field(default_factory=dict[str, int])
    columns: Mapping[str, Axes] = field(default_factory=dict[str, Axes])
    rows: Mapping[str, Axes] = field(default_factory=dict[str, Axes])
    stacked: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, "tuple[int, ...]"])
    summed: Mapping[str, int] = field(default_factory=dict[str, int])

    def renamed(self, names: Renaming) -> Trace:
        """What the trace shows of the leaves and modules that `names` keeps."""
        order, stacked, summed = names.nodes(self.order), names.leaves(self.stacked), names.leaves(self.summed)
        return Trace(order, names.leaves(self.columns), names.leaves(self.rows), stacked, summed)


@dataclass(frozen=True, slots=True, eq=False)
class Live:
    """The evidence of a live tree. An empty one has no modules: a file has none.

    modules  module path -> Module
    buffers  paths that are buffers and not parameters
    trace    () -> Trace, where the tree can be called without data; nothing is computed
    placed   () -> path -> what the tree says of where a leaf lies (adapters.notes.Note), where it is a Flax tree
    rebuild  {path: array} -> an object of the same kind; sharding= and (NNX) rngs= say more
    object   the live object itself
    """

    modules: Mapping[str, Module] = field(default_factory=dict[str, Module])
    buffers: frozenset[str] = frozenset()
    trace: Callable[[], Trace] | None = None
    placed: Callable[[], Mapping[str, Any]] | None = None
    rebuild: Callable[..., Any] | None = None
    object: Any = None

    def renamed(self, names: Renaming) -> Live:
        """The evidence of the leaves that `names` keeps, under their new paths, and of the modules that it keeps. The
        object stays the whole one, and `rebuild` gives one like it that has only these leaves."""
        trace, placed, rebuild = self.trace, self.placed, self.rebuild

        def rebuilt(arrays: Mapping[str, Any], **options: Any) -> Any:
            assert rebuild is not None
            return rebuild({names.old(path): array for path, array in arrays.items()}, **options)

        return replace(
            self,
            modules={path: module.renamed(path, names) for path, module in names.nodes(self.modules).items()},
            buffers=names.paths(self.buffers),
            trace=None if trace is None else lambda: trace().renamed(names),
            placed=None if placed is None else lambda: names.leaves(placed()),
            rebuild=rebuild and rebuilt,
        )

    def below(self, prefix: str) -> Live:
        """The evidence of the leaves and modules below `prefix`."""
        return self.renamed(Renaming.below(prefix))
