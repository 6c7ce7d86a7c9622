"""The call on which a study runs a Flax model: the user's inputs, or the example of gx.linen(...) if it is a real
batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graftax.adapters import jax_arrays, nests
from graftax.adapters.linen_tree import LinenModel
from graftax.errors import UsageError, escape, option
from graftax.parity.prepare import flax_like
from graftax.probe.inputs import Call, calls_of, inputs_of


@dataclass(frozen=True, slots=True, eq=False)
class Runnable:
    """A Flax model and what it is run on.

    model  gx.linen(...) with an example, or an nnx.Module
    call   (args, kwargs)
    own    the user's function that calls the model, if there is one
    """

    model: Any
    call: Call
    own: Callable[..., Any] | None


def runnable(like: Any, inputs: Any, *, constant: bool = False) -> Runnable:
    """A Flax model with the call that it is to make.

    like      gx.linen(...), a Linen module, an nnx.Module or (GraphDef, State)
    inputs    an array, a tuple of them, (args, kwargs), gx.Inputs(...), or None for the example of gx.linen(...)
    constant  an example that holds one value everywhere is taken too

    UsageError for a model that cannot be run; for inputs without values; for an example that is no batch (nothing but
    constant arrays, shapes alone); and if there is no example.
    """
    from flax import linen as nn

    like = LinenModel(like) if isinstance(like, nn.Module) else like
    call, own = (_example(like, constant), None) if inputs is None else _given(like, inputs)
    return Runnable(flax_like(like, call), call, own)


def _given(like: Any, inputs: Any) -> tuple[Call, Callable[..., Any] | None]:
    given = inputs_of(inputs)
    for call in (given.both, given.flax, given.torch):
        for path, leaf in nests.leaves(call, nests.is_array):
            if jax_arrays.is_abstract(leaf):
                raise UsageError(f"{option('inputs')} {escape(path) or 'the array'} has a shape, but no values")
    return calls_of(given, like)[1], given.flax_call


def _example(like: Any, constant: bool) -> Call:
    held: Mapping[str, Any] = {}
    if isinstance(like, LinenModel):
        named = [*((f"argument {i}", value) for i, value in enumerate(like.args)), *like.kwargs.items()]
        held = {
            escape(f"{name}/{path}" if path else name): leaf
            for name, value in named
            for path, leaf in nests.leaves(value, nests.is_array)
        }
    if not held:
        what = "gx.linen(...) holds no example" if isinstance(like, LinenModel) else "an nnx.Module has no example"
        raise UsageError(f"{what} to run on", next=f"Pass a real batch: {option('inputs')}.")
    hint = f"Wrap the model with a real batch, gx.linen(module, *batch), or pass one: {option('inputs')}."
    for name, leaf in held.items():
        if jax_arrays.is_abstract(leaf):
            raise UsageError(f"the example of gx.linen(...) has only the shape of {name}", next=hint)
    telling = {name: leaf for name, leaf in held.items() if _is_floating(leaf) and _several(leaf)} or held
    if not constant and all(map(_is_constant, telling.values())):
        raise UsageError(
            f"the example of gx.linen(...) is no batch: {next(iter(telling))} holds one value everywhere, so its "
            "result would say nothing about real inputs",
            next=hint,
        )
    assert isinstance(like, LinenModel)
    return tuple(like.args), dict(like.kwargs)


def _is_constant(array: Any) -> bool:
    """Is it an array of several values that are all the same? A random key is not looked at."""
    import numpy as np

    if "key<" in str(array.dtype) or not _several(array):
        return False
    flat = np.asarray(array).reshape(-1)
    return bool((flat == flat[0]).all())


def _several(array: Any) -> bool:
    return math.prod(array.shape) > 1


def _is_floating(array: Any) -> bool:
    import numpy as np

    return "key<" not in str(array.dtype) and np.dtype(array.dtype).kind in "fcV"
