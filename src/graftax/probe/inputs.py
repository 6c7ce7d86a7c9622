"""The inputs with which two models are run: the same for both sides, or different ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from graftax.adapters import nests
from graftax.adapters.layouts import declared, with_layout
from graftax.adapters.linen_tree import LinenModel
from graftax.errors import UsageError

Call = tuple[tuple[Any, ...], dict[str, Any]]
Layouts = str | Mapping[str, str] | None
"""'NCHW -> NHWC', or one for each path of a nest."""


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The calls of the two models, if one array for both is not enough.

        gx.Inputs(images, layout="NCHW -> NHWC")
        gx.Inputs(torch=((ids,), {"attention_mask": mask}), flax=((ids, mask), {}))

    both          the inputs of both sides, as torch takes them: an array, a tuple of them, or (args, kwargs)
    torch, flax   (args, kwargs), or args alone; None: the other side's, converted
    torch_call    function (module, *args, **kwargs) -> outputs: picks outputs or calls another method
    flax_call     the same for the Flax side; `module` is a bound Linen module or an nnx.Module
    layout        how Flax's inputs lie, from torch's, where only one side's are given
    out_layout    the same for the outputs
    """

    both: Any = None
    torch: Any = None
    flax: Any = None
    torch_call: Callable[..., Any] | None = None
    flax_call: Callable[..., Any] | None = None
    layout: Layouts = None
    out_layout: Layouts = None

    def __post_init__(self) -> None:
        if self.both is not None and (self.torch is not None or self.flax is not None):
            raise UsageError(
                "gx.Inputs: inputs for both sides, and for one of them",
                next="Pass gx.Inputs(x), or gx.Inputs(torch=..., flax=...).",
            )

    def side(self, name: str) -> Call | None:
        """(args, kwargs) of a side, or None where it is not given."""
        given = self.both if self.both is not None and name == "torch" else getattr(self, name)
        return None if given is None else call_of(given)


def call_of(given: Any) -> Call:
    """(args, kwargs) from the form a user writes: (args, {kw}), a tuple or list of args, {kw}, or one array."""
    if (
        isinstance(given, tuple)
        and len(given) == 2
        and isinstance(given[0], (tuple, list))
        and isinstance(given[1], Mapping)
        and all(isinstance(name, str) for name in given[1])
    ):
        return tuple(given[0]), dict(given[1])
    if isinstance(given, (tuple, list)):
        return tuple(given), {}
    if isinstance(given, Mapping):
        return (), {str(name): value for name, value in given.items()}
    return (given,), {}


def inputs_of(given: Any, layout: Layouts = None, out_layout: Layouts = None) -> Inputs:
    """What a user gives as inputs as an Inputs. layout and out_layout given beside them count before its own."""
    made = given if isinstance(given, Inputs) else Inputs(given)
    if not any(True for side in (made.both, made.torch, made.flax) for _ in nests.leaves(side, nests.is_array)):
        raise UsageError(
            f"there are no inputs: {type(given).__name__} holds no array",
            next="Pass an array, a tuple of arrays, (args, kwargs) or gx.Inputs(...); inputs=False does not run them.",
        )
    return replace(
        made,
        layout=made.layout if layout is None else layout,
        out_layout=made.out_layout if out_layout is None else out_layout,
    )


def calls_of(inputs: Inputs, like: Any, torch_module: Any = None) -> tuple[Call, Call]:
    """(torch's call, Flax's call) in NumPy. If only one is given, `layout` converts it for the other. Arguments of
    gx.linen(...) that are not arrays (`train=False`) are part of Flax's call. Of a call given for both sides, torch
    gets no flag that the forward of `torch_module` does not take."""
    turn = declared(inputs.layout)
    torch, flax = inputs.side("torch"), inputs.side("flax")
    given = torch if torch is not None else flax
    common = inputs.torch is None and inputs.torch_call is None and torch_module is not None
    if given is None:
        raise UsageError("there are no inputs", next="Pass an array, a tuple of arrays, or gx.Inputs(torch=, flax=).")
    if torch is None:
        back = {path: one.inverse for path, one in turn.items()} if isinstance(turn, Mapping) else turn and turn.inverse
        torch = _turned(given, back)
    if common:
        torch = _taken_by(torch_module, torch)
    return on_host(torch), with_example(_turned(given, turn) if flax is None else on_host(flax), like)


def _taken_by(module: Any, call: Call) -> Call:
    """The call without the flags (arguments that hold no array) that the module's forward does not take."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (AttributeError, TypeError, ValueError):  # a forward without a signature
        return call
    args, kwargs = call
    kinds = [parameter.kind for parameter in parameters]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        names = {p.name for p in parameters if p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)}
        kwargs = {name: value for name, value in kwargs.items() if name in names or not _is_flag(value)}
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        most = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
        while len(args) > most and _is_flag(args[-1]):
            args = args[:-1]
    return args, kwargs


def _is_flag(value: Any) -> bool:
    return not any(True for _ in nests.leaves(value, nests.is_array))


def _turned(call: Call, layout: Any) -> Call:
    args, kwargs = on_host(call)
    return tuple(with_layout(args, layout)), dict(with_layout(kwargs, layout))


def with_example(call: Call, like: Any) -> Call:
    """The call, plus the flags of gx.linen(...) that it lacks."""
    if not isinstance(like, LinenModel):
        return call
    args, kwargs = call
    args += tuple(value for value in like.args[len(args) :] if not nests.is_array(value))
    flags = {name: value for name, value in like.kwargs.items() if not nests.is_array(value)}
    return args, {**flags, **kwargs}


def on_host(nest: Any) -> Any:
    """A nest with its tensors and jax arrays as NumPy arrays; random keys and flags unchanged."""
    return nests.rebuilt(nest, nests.is_array, [_to_host(leaf) for _, leaf in nests.leaves(nest, nests.is_array)])


def _to_host(array: Any) -> Any:
    import numpy as np

    if isinstance(array, (np.ndarray, np.generic)):
        return np.asarray(array)
    if type(array).__module__.startswith("torch"):
        from graftax.adapters import torch_arrays

        return torch_arrays.to_numpy(array, "an input")
    if "key<" in str(array.dtype):
        return array
    return np.asarray(array)
