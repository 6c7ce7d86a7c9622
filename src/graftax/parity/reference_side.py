"""The model that the Flax model is checked against: a torch module, or another Flax model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from graftax.adapters.linen_tree import LinenModel
from graftax.errors import UsageError, escape, option
from graftax.parity.records import Runner
from graftax.parity.report.model import ReferenceKind
from graftax.probe.inputs import Call
from graftax.tree import Checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceSide:
    """A reference that can be run.

    tree          its names, specs and modules; `values`: where its weights are read
    wide, narrow  runners in float64 and float32
    name          its class; `side`: "torch" or "flax"
    notes         what was done to get here
    """

    tree: Checkpoint
    values: Checkpoint
    wide: Runner
    narrow: Any
    name: str
    side: ReferenceKind = "torch"
    notes: tuple[str, ...] = ()

    @property
    def whose(self) -> str:
        return "torch's" if self.side == "torch" else "the reference's"


def is_flax_model(obj: Any) -> bool:
    """True for gx.linen(...), a Linen module, an nnx.Module and (GraphDef, State)."""
    linen = sys.modules.get("flax.linen")
    return isinstance(obj, LinenModel) or (linen is not None and isinstance(obj, linen.Module)) or is_nnx_model(obj)


def is_nnx_model(obj: Any) -> bool:
    """True for an nnx.Module and (GraphDef, State)."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return False
    pair = isinstance(obj, tuple) and len(obj) == 2 and isinstance(obj[0], nnx.GraphDef)  # pyright: ignore
    return pair or isinstance(obj, nnx.Module)


def torch_side(module: Any, source: Any, call: Any) -> ReferenceSide:
    """A torch.nn.Module, with the weights of `source` if they are given. UsageError for any other object."""
    from graftax.execute.opening import open_tree, open_weights
    from graftax.parity.torch_runner import runners

    module = getattr(module, "_orig_mod", module)  # the module inside torch.compile's wrapper
    tree = open_tree(module)
    values = tree if source is None else open_weights(source)
    wide, narrow = runners(module, None if source is None else values, call)
    return ReferenceSide(tree, values, wide, narrow, type(module).__name__)


def flax_reference(
    model: Any, given: Call, source: Any, fallback: Any, call: Any, rngs: Any = None, seed: int = 0
) -> ReferenceSide:
    """A Flax model as the reference.

    given     the call of the model, for a Linen module without an example
    source    its weights; None: those that it holds (an nnx.Module, a bound Linen module), else those of `fallback`
    fallback  weights of the Flax model that is checked, which are ported to the reference

    UsageError if there are no weights; PlanError if they do not fit.
    """
    from graftax.execute.opening import open_tree
    from graftax.parity import prepare
    from graftax.parity.flax_float64 import Float32Runner, Float64Runner

    if getattr(model, "scope", None) is not None:  # a bound Linen module
        model, held = model.unbind()
        source = held if source is None else source
    like = prepare.flax_like(model, given)
    tree = open_tree(like)
    notes: tuple[str, ...] = ()
    if source is None and not tree.has_values:
        if fallback is None:
            raise UsageError(
                f"the reference {escape(tree.label)} has no values", next=f"Pass its weights: {option('source')}."
            )
        source, notes = fallback, ("the reference's weights are those of the Flax model, ported by the plan",)
    arrays, _ = prepare.weights_of(like, tree, source, None, tree)
    runner = prepare.FlaxRunners(like, tree, rngs, seed, call, whole=True).of(None if source is None else arrays)
    wide = Float64Runner(runner)
    values = replace(tree, storage=replace(tree.storage, reader=_reader(arrays)))
    return ReferenceSide(tree, values, wide, Float32Runner(runner, wide), prepare.class_name(like), "flax", notes)


def _reader(arrays: Mapping[str, Any]) -> Any:
    import numpy as np

    return lambda path: np.asarray(arrays[path])
