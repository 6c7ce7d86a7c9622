"""Prepare both sides of a check: models, weights and inputs, in whatever form they come."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from graftax.adapters import kind_of
from graftax.adapters.linen_tree import LinenModel
from graftax.api import host_arrays
from graftax.api import plan as make_plan
from graftax.errors import PlanError, UsageError, escape, with_article
from graftax.execute.opening import open_weights
from graftax.parity.audit import Expected
from graftax.parity.records import Runner, Tap
from graftax.plans import Plan
from graftax.probe.inputs import Call
from graftax.tree import Checkpoint

HELD = 1 << 30
"""The most bytes of weights that are made at once for a Flax model without values. Larger weights are read and ported
module by module when a module is called, again in each run."""


@dataclass(frozen=True, slots=True, eq=False)
class FlaxSide:
    """The Flax model with its weights.

    tree      its leaves: names, specs, modules
    weights   path -> array, read when it is requested
    runner    runs the model
    ported    the plan made the weights from torch's
    again     leaves -> a runner of the same model with these leaves in place of its own
    """

    tree: Checkpoint
    weights: Mapping[str, Any]
    runner: Runner
    ported: bool
    name: str
    again: Callable[[Mapping[str, Any]], Runner]


class Read(Mapping[str, Any]):
    """The leaves of a checkpoint as a mapping of arrays, each read when it is requested."""

    def __init__(self, tree: Checkpoint) -> None:
        self.tree = tree

    def __getitem__(self, path: str) -> Any:
        if path not in self.tree:
            raise KeyError(path)
        return self.tree.read(path)

    def __iter__(self) -> Any:
        return iter(self.tree)

    def __len__(self) -> int:
        return len(self.tree)


# ---------------------------------------------------------------- the Flax side


def flax_like(model: Any, call: Call) -> Any:
    """The Flax model as gx.plan takes it: a Linen module is wrapped with the inputs of the check."""
    from flax import linen as nn

    if isinstance(model, nn.Module):
        return LinenModel(model, call[0], call[1])
    if isinstance(model, LinenModel):
        if model.args or model.kwargs:
            return model
        return LinenModel(model.module, call[0], call[1], model.rngs, model.method)
    kind = kind_of(model)
    if kind not in {"nnx module", "nnx split"}:
        raise UsageError(
            f"the Flax side is {with_article(kind)}, which cannot be run",
            next="Pass gx.linen(module, *example) with weights=, a Linen module, or an nnx.Module.",
        )
    if kind == "nnx split":
        from flax import nnx

        return nnx.merge(*model, copy=True)
    return model


def class_name(model: Any) -> str:
    """The class of a model; of gx.linen(...), that of its module."""
    return type(model.module if isinstance(model, LinenModel) else model).__name__


def weights_of(
    like: Any, tree: Checkpoint, weights: Any, plan: Plan | None, source: Checkpoint
) -> tuple[Mapping[str, Any], bool]:
    """(path -> array for every leaf of the Flax side, were they ported?). The arrays come from `weights`; without it
    from the model; if the model has none, from torch through the plan. Large weights are made when they are requested.
    PlanError if they do not fit."""
    if weights is None:
        if tree.has_values:
            return Read(tree), False
        if plan is None:
            raise UsageError("the Flax model has no values", next="Pass weights=.")
        return _ported(plan, source, tree), True
    given = open_weights(weights)
    if given.side == "torch":
        fits = plan is not None and all(given.get(name) == spec for name, spec in plan.source.specs.items())
        made = plan if plan is not None and fits else make_plan(given, like, dtype="like", inputs=False)
        return _ported(made, given, tree), True
    missing = [name for name in tree if name not in given]
    if not missing and all(given[name].shape == tree[name].shape for name in tree):
        return Read(given), False
    bare = {f"params/{name}": name for name in given}
    if set(bare) == set(tree):
        arrays = Read(given)
        return {path: arrays[name] for path, name in bare.items()}, False
    made = make_plan(given, like, dtype="like", inputs=False)
    if not made.complete:
        raise PlanError(
            f"weights do not fit the Flax model: {len(missing)} of {len(tree)} leaves are missing keys, "
            f"the first is {escape(missing[0] if missing else next(iter(tree)))}",
            next="Pass the variables that the model's init or gx.port gives.",
        )
    return _ported(made, given, tree), False


def _ported(plan: Plan, source: Checkpoint, tree: Checkpoint) -> Mapping[str, Any]:
    plan.require_complete()
    if large(tree) and not any(entry.unfilled for entry in plan.entries):
        return Expected(plan, source)
    return host_arrays(plan, source, tree)[0]


def large(tree: Checkpoint) -> bool:
    """Is it a model without values whose weights exceed HELD bytes?"""
    return not tree.has_values and sum(spec.nbytes for spec in tree.specs.values()) > HELD


class LazyRunner:
    """A Flax runner that gives each module its weights when the module is called."""

    def __init__(self, runner: Any, tree: Checkpoint, weights: Mapping[str, Any]) -> None:
        self.runner, self.tree, self.weights = runner, tree, weights

    @property
    def modules(self) -> Mapping[str, Any]:
        return self.tree.live.modules

    @property
    def compile_seconds(self) -> float:
        return self.runner.compile_seconds

    def run(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, watch: Collection[str] = (), tap: Tap | None = None
    ) -> Any:
        return self.runner.run(args, kwargs, watch=watch, tap=tap, supply=lambda path: self.weights)

    def replay(
        self,
        path: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        leaves: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        own = {name: self.weights[name] for name in self.tree.live.modules[path].leaves.values()}
        return self.runner.replay(path, args, kwargs, leaves={**own, **(leaves or {})}, **options)

    def not_traced(self) -> Mapping[str, str]:
        return self.runner.not_traced()


@dataclass(slots=True, eq=False)
class FlaxRunners:
    """Makes runners of one Flax model with different weights. They share compiled programs.

    like    gx.linen(...) or an nnx.Module; `tree` is what open_tree gives for it
    rngs    for modules that draw random numbers; seed: for the random state of an nnx.Module that has none
    call    as `flax_call` of gx.Inputs
    whole   hold a large model's weights too
    """

    like: Any
    tree: Checkpoint
    rngs: Any = None
    seed: int = 0
    call: Any = None
    whole: bool = False
    _first: Any = None

    def of(self, weights: Mapping[str, Any] | None) -> Runner:
        """A runner with these weights (path -> array); None: with those that an nnx.Module holds. Weights of a `large`
        model are read when a module is called."""
        if large(self.tree) and not self.whole:
            assert weights is not None
            return LazyRunner(self._first or self._made(self._abstract()), self.tree, weights)
        if weights is None:
            return self._made(self.like)
        assert self.tree.live.rebuild is not None
        if isinstance(self.like, LinenModel):
            return self._made(self.tree.live.rebuild(dict(weights)))
        return self._made(self.tree.live.rebuild(dict(weights), rngs=self.seed if self.rngs is None else self.rngs))

    def _abstract(self) -> Any:
        if not isinstance(self.like, LinenModel):
            return self.like
        from graftax.adapters.linen_tree import trace

        return trace(self.like)[0]

    def _made(self, holder: Any) -> Any:
        """The runner of Linen variables or of an nnx.Module."""
        if self._first is not None:
            return self._first.with_weights(holder)
        modules = self.tree.live.modules
        if isinstance(self.like, LinenModel):
            from graftax.parity.linen_runner import LinenRunner

            self._first = LinenRunner(self.like, holder, rngs=self.rngs, call=self.call, modules=modules)
        else:
            from graftax.parity.nnx_runner import NnxRunner

            self._first = NnxRunner(holder, call=self.call, modules=modules)
        return self._first


def flax_side(
    like: Any,
    tree: Checkpoint,
    weights: Any,
    plan: Plan | None,
    source: Checkpoint,
    rngs: Any = None,
    seed: int = 0,
    call: Any = None,
) -> FlaxSide:
    """The Flax model with its weights, ready to run. Raises what `weights_of` raises."""
    arrays, ported = weights_of(like, tree, weights, plan, source)
    own = weights is None and tree.has_values  # an nnx.Module's
    runners = FlaxRunners(like, tree, rngs, seed, call)

    def again(leaves: Mapping[str, Any]) -> Runner:
        return runners.of(ChainMap(dict(leaves), arrays))  # pyright: ignore

    return FlaxSide(tree, arrays, runners.of(None if own else arrays), ported, class_name(like), again)
