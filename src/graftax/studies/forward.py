"""Run a Flax model on one input with many sets of weights: one jitted function, whose arguments are the weights.

The precision of products and the devices are the caller's own, so that an output has the bits of the caller's own
jitted call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import errors as flax_errors
from flax import linen as nn
from flax import nnx

from graftax.adapters import kind_of, nests
from graftax.adapters.linen_tree import LinenModel
from graftax.errors import GraftaxError, UsageError, with_article
from graftax.execute.opening import open_tree
from graftax.parity.flax_program import model_error
from graftax.parity.prepare import class_name
from graftax.probe.inputs import Call
from graftax.studies.example_inputs import runnable
from graftax.studies.model_weights import weights_for
from graftax.tree import Checkpoint

MODELS = frozenset({"linen model", "nnx module"})
"""The kinds of object that can be run."""


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """A model and its input. `forward(weights)` gives the outputs.

    weights  Linen: variables, or params alone (`bare`); NNX: a State, or a part of one (the model has the rest)
    """

    model: Any
    call: Call
    run: Callable[[Any], Any]
    bare: bool

    def __call__(self, weights: Any) -> Any:
        try:
            return self.run(weights)
        except GraftaxError:
            raise
        except Exception as error:
            self._require_fit(weights)
            raise model_error(error, "", self.name, self.call) from error

    @property
    def name(self) -> str:
        return class_name(self.model)

    def tree(self) -> Checkpoint:
        """The model's leaves and modules. A Linen model is traced for it."""
        return open_tree(self.model)

    def _require_fit(self, weights: Any) -> None:
        """PlanError if the weights are not those of a Linen model whose own leaves can be seen. An nnx.Module has
        leaves of its own for those that a State lacks."""
        try:
            tree = self.tree()
        except GraftaxError:
            return
        if isinstance(self.model, LinenModel):
            weights_for(weights, tree, "params")


def forward_of(what: Any, weights: Any, inputs: Any = None) -> Forward:
    """The forward of a Flax model: gx.linen(...), or a Linen module or an nnx.Module with `inputs`. Raises what
    `runnable` raises."""
    found = runnable(what, inputs)
    model, call = found.model, found.call
    if isinstance(model, LinenModel):
        bare = not (isinstance(weights, Mapping) and "params" in weights)
        return Forward(model, call, _linen(model, call, bare, found.own), bare)
    return Forward(model, call, _nnx(model, call, found.own), False)


def state_of(weights: Any) -> Any:
    """The weights as a forward takes them: the State of an nnx.Module or of a (GraphDef, State) pair, else as they
    are."""
    kind = kind_of(weights)
    if kind == "nnx module":
        return nnx.split(weights)[1]
    return weights[1] if kind == "nnx split" else weights


def is_model(what: Any) -> bool:
    """True for an object that `forward_of` runs. UsageError for one that is neither a model nor a function of the
    weights."""
    if isinstance(what, (nn.Module, LinenModel)):
        return True
    if isinstance(what, type) or not (callable(what) or _kind(what) in MODELS):
        named = f"the class {what.__name__}" if isinstance(what, type) else with_article(_kind(what) or "object")
        raise UsageError(
            f"{named} cannot be run",
            next="Give gx.linen(model, *example), an nnx.Module, or a function of the weights.",
        )
    kind = _kind(what)
    if kind == "torch module":
        raise UsageError(
            "a torch Module changes in place, and is no function of its weights",
            next="Give one, and the state_dict: lambda weights: torch.func.functional_call(module, weights, (x,)).",
        )
    return kind in MODELS


def _kind(what: Any) -> str:
    try:
        return kind_of(what)
    except UsageError:
        return ""


# ---------------------------------------------------------------- one jitted function


def _linen(model: LinenModel, call: Call, bare: bool, own: Callable[..., Any] | None) -> Callable[[Any], Any]:
    module, rngs = model.module, None if model.rngs is None else _keys(model.rngs)
    mutable: Any = False

    def forward(weights: Any, args: Any, kwargs: Any) -> Any:
        variables = {"params": weights} if bare else weights
        if own is None:
            out = module.apply(variables, *args, rngs=rngs, method=model.method, mutable=mutable, **kwargs)
        else:
            out = nn.apply(own, module, mutable=mutable)(variables, *args, rngs=rngs, **kwargs)
        return out if mutable is False else out[0]

    jitted = _jitted(forward, call)

    def run(weights: Any) -> Any:
        nonlocal mutable
        try:
            return jitted(weights)
        except flax_errors.ModifyScopeVariableError:
            if mutable is not False:
                raise
            mutable = nn.DenyList(("params", "intermediates", "perturbations"))  # what it writes is discarded
            return jitted(weights)

    return run


def _nnx(model: nnx.Module, call: Call, own: Callable[..., Any] | None) -> Callable[[Any], Any]:
    graph, rest = nnx.split(model)

    def forward(state: Any, args: Any, kwargs: Any) -> Any:
        module = nnx.merge(graph, state)
        return module(*args, **kwargs) if own is None else own(module, *args, **kwargs)  # pyright: ignore

    jitted = _jitted(forward, call)
    return lambda weights: jitted(nnx.merge_state(rest, weights))


def _jitted(forward: Callable[[Any, Any, Any], Any], call: Call) -> Callable[[Any], Any]:
    """`forward` of the weights, compiled once. The arrays of the call are arguments, its flags are constants."""
    arrays = [jax.numpy.asarray(array) for _, array in nests.leaves(call, nests.is_array)]

    def program(weights: Any, given: list[Any]) -> Any:
        args, kwargs = nests.rebuilt(call, nests.is_array, given)
        return forward(weights, args, kwargs)

    function = jax.jit(program)
    return lambda weights: function(weights, arrays)


def _keys(rngs: Any) -> Any:
    """Seeds as keys, as gx.linen takes them."""
    if isinstance(rngs, Mapping):
        return {name: _keys(value) for name, value in rngs.items()}
    return jax.random.key(rngs) if isinstance(rngs, int) else rngs
