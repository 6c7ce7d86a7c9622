"""The inputs of a check from the command line: a file of arrays, a factory, or the example of gx.linen(...)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from graftax.adapters.linen_tree import LinenModel
from graftax.errors import Failure, UsageError, escape, option
from graftax.execute import factories
from graftax.probe.inputs import Inputs

_POSITION = re.compile(r"(?:arg|arr_)(0|[1-9][0-9]{0,3})")
_SIDE = re.compile(r"(torch|flax)[./](.+)", re.DOTALL)
_HOW = (
    "Name them arg0, arg1, ... (by position) or as the parameter (by keyword); where the sides differ, put torch. or "
    "flax. before every name."
)


def read_inputs(text: str) -> Any:
    """The inputs that `pkg.mod:factory` returns, or the arrays of a file, as gx.check_parity takes them.

    In a file `arg0`, `arg1` ... (also NumPy's own `arr_0` ...) are positional and any other name is a keyword.
    `torch.arg0` and `flax.arg0` are for one side only; then every name must start with its side.

    Raises UsageError for names that do not form a call, and what reading the file raises.
    """
    if factories.is_factory(text):
        return factories.call_factory(text)
    from graftax.formats import open_path

    checkpoint = open_path(text)
    if not checkpoint.has_values:
        raise UsageError(f"{escape(text)} has no values, so it cannot be an input")
    return named_inputs({name: checkpoint.read(name) for name in checkpoint}, escape(text))


def named_inputs(arrays: Mapping[str, Any], label: str) -> Any:
    """(args, kwargs) for both sides, or Inputs if the names start with a side."""
    sides: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        match = _SIDE.fullmatch(name)
        sides.setdefault(match[1] if match else "", {})[match[2] if match else name] = array
    if not sides:
        raise UsageError(f"{label} holds no arrays", next=_HOW)
    if "" in sides:
        if len(sides) > 1:
            bare = ", ".join(escape(name) for name in list(sides[""])[:5])
            raise UsageError(f"{label}: some names start with torch. or flax. and some do not: {bare}", next=_HOW)
        return _call(sides[""], label)
    calls = {side: _call(named, label) for side, named in sides.items()}
    return Inputs(torch=calls.get("torch"), flax=calls.get("flax"))


def _call(named: Mapping[str, Any], label: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    positions: dict[int, Any] = {}
    kwargs: dict[str, Any] = {}
    failures: list[Failure] = []
    for name, array in named.items():
        match = _POSITION.fullmatch(name)
        if match is not None:
            if int(match[1]) in positions:
                failures.append(Failure(f"position {match[1]} is given twice", key=name))
            positions[int(match[1])] = array
        elif name.isidentifier():
            kwargs[name] = array
        else:
            failures.append(Failure("is neither a position nor the name of a parameter", key=name))
    failures += [
        Failure(f"arg{i} is missing, but a later position is given")
        for i in range(max(positions, default=-1))
        if i not in positions
    ]
    if failures:
        raise UsageError(f"{label}: its names do not form a call:", failures, next=_HOW)
    return tuple(positions[i] for i in sorted(positions)), kwargs


# ---------------------------------------------------------------- the example of a Linen wrapper


def example_inputs(model: Any) -> tuple[Inputs, tuple[str, ...]]:
    """(inputs in Flax's layout, notes) from the example of gx.linen(...). Floats that prove nothing (a constant, or a
    shape alone) are drawn from a normal distribution with seed 0; integers are not changed.

    UsageError if there is no example.
    """
    if not isinstance(model, LinenModel) or not any(map(_is_array, [*model.args, *model.kwargs.values()])):
        what = "gx.linen(...) was given no example" if isinstance(model, LinenModel) else "the Flax side has no example"
        raise UsageError(
            f"{what} to run both models on",
            next=f"Give {option('inputs')}: a file of arrays (.npz, .safetensors) or pkg.mod:factory.",
        )
    import numpy as np

    draw = np.random.Generator(np.random.Philox(0))
    notes: list[str] = []
    args = tuple(_filled(value, f"argument {i}", draw, notes) for i, value in enumerate(model.args) if _is_array(value))
    kwargs = {
        name: _filled(value, escape(name), draw, notes) for name, value in model.kwargs.items() if _is_array(value)
    }
    return Inputs(flax=(args, kwargs)), tuple(notes)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _filled(value: Any, name: str, draw: Any, notes: list[str]) -> Any:
    """The example, or drawn values if the example proves little."""
    import numpy as np

    floating = np.dtype(value.dtype).kind in "fV"
    if type(value).__name__ == "ShapeDtypeStruct":
        if not floating:
            raise UsageError(
                f"gx.linen(...) has only the shape of {name} ({np.dtype(value.dtype)}), and such values are not drawn",
                next=f"Give {option('inputs')} with real values.",
            )
        array = None
    else:
        array = np.asarray(value)
        constant = array.size and bool((array == array.reshape(-1)[0]).all())
        if not constant:
            return array
        if not floating:
            if array.size > 1:
                notes.append(
                    f"{name} is one integer everywhere, as in the example: give {option('inputs')} to prove more"
                )
            return array
    notes.append(f"{name} was drawn from a normal distribution (seed 0): the example gives only its shape")
    return draw.standard_normal(tuple(value.shape)).astype(np.dtype(value.dtype))
