"""What users give as the value of a leaf, checked: values of surgery, arrays, and functions of the old leaf."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, ClassVar

from graftax.adapters import spec_of_leaf
from graftax.adapters.containers import axis_value, is_axis_box, is_tensor, is_variable, variable_value
from graftax.adapters.jax_arrays import is_abstract, is_tracer
from graftax.errors import Failure, PlanError, UsageError, escape, with_article
from graftax.ops import LeafValue, Misfit
from graftax.ops.replace_op import not_data
from graftax.surgery.array_parts import own_copy
from graftax.surgery.donors import FromCheckpoint, misfit_hint
from graftax.surgery.selecting import Edit
from graftax.surgery.values import AddNormal, Constant, Mean, Mix, Normal, Quantized, Rounded, Scaled, Zeros
from graftax.surgery.values.base import is_arraylike
from graftax.tree import TensorSpec

VALUES = (Constant, Zeros, Normal, AddNormal, Scaled, Mean, Mix, Rounded, Quantized, FromCheckpoint)


def prepared(edits: tuple[Edit, ...]) -> tuple[Edit, ...]:
    """The edits with every donor open, each checked to be a value that a leaf can take.

    Raises what opening a donor raises; UsageError for what is no value.
    """
    return tuple(Edit(edit.selector, _prepared(edit.value)) for edit in edits)


def _prepared(value: Any) -> Any:
    if is_axis_box(value):
        return _prepared(axis_value(value))
    if is_variable(value):
        return _prepared(variable_value(value))
    if isinstance(value, FromCheckpoint):
        return value.opened()
    if isinstance(value, Mix) and isinstance(value.donor, FromCheckpoint):
        return replace(value, donor=value.donor.opened())
    if isinstance(value, VALUES) or is_arraylike(value) or isinstance(value, (bool, int, float, complex)):
        return value
    if isinstance(value, (type, Mapping)):
        what = f"the class {value.__name__}" if isinstance(value, type) else with_article(type(value).__name__)
        raise UsageError(
            f"{escape(what)} is no value for a leaf",
            next="Select leaves and give an array, gx.constant(v) or another value, or a function of the old leaf.",
        )
    if callable(value):
        _takes_path(value)
        return value
    hint = {list: "numpy.asarray(..., dtype)", tuple: "numpy.asarray(..., dtype)"}.get(type(value), "")
    if isinstance(value, (str, PathLike)):
        hint = "gx.from_checkpoint(path, key)"
    raise UsageError(
        f"{escape(repr(value), 60)} ({type(value).__name__}) is no value for a leaf",
        next=f"Give an array, gx.constant(v) or another value, or a function of the old leaf{hint and f': {hint}'}.",
    )


# ---------------------------------------------------------------- as values


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """An array in memory, of the leaf's shape and dtype."""

    reads: ClassVar[bool] = False
    array: Any

    @property
    def text(self) -> str:
        return escape(type(self.array).__name__)

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Any:
        return given(path, spec, self.array)

    def as_data(self) -> Any:
        raise not_data("an array in memory")


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """What the user's function makes of the old leaf. In memory it gets the leaf itself, from a file a NumPy array; if
    it can be changed in place, a copy. An exception of the function passes through, with the path as a note."""

    reads: ClassVar[bool] = True
    function: Callable[..., Any]

    @property
    def text(self) -> str:
        return escape(type(self.function).__name__)

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Any:
        return self.of(path, spec, own_copy(old))

    def of(self, path: str, spec: TensorSpec, old: Any) -> Any:
        """As `apply`, for an old leaf that the function may change."""
        return given(path, spec, _called(self.function, path, old), "the function gave")

    def as_data(self) -> Any:
        raise not_data("a Python function")


def value_text(value: Any) -> str:
    """A value as the report shows it."""
    return kind_of(value).text


def kind_of(value: Any) -> LeafValue:
    """What the user gave, as a value of any leaf, not yet compared with one."""
    if isinstance(value, VALUES):
        return value
    return Computed(value) if callable(value) and not is_arraylike(value) else Given(value)


# ---------------------------------------------------------------- functions


def _called(function: Callable[..., Any], path: str, leaf: Any) -> Any:
    arguments = (path, leaf) if _takes_path(function) else (leaf,)
    try:
        out = function(*arguments)
    except Exception as error:
        error.add_note(f"in the function that replaces {escape(path)}")
        raise
    return variable_value(out) if is_variable(out) else out


def _takes_path(function: Callable[..., Any]) -> bool:
    """True for a function of (path, leaf): exactly two positional parameters have no default. UsageError for one that
    neither (leaf) nor (path, leaf) fits."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # some compiled functions have none
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in signature.parameters.values() if p.kind in positional and p.default is p.empty]
    arguments = ("path", "leaf") if len(required) == 2 else ("leaf",)
    try:
        signature.bind(*arguments)
    except TypeError as error:
        name = escape(getattr(function, "__qualname__", repr(function)), 60)
        raise UsageError(
            f"{name}{escape(str(signature), 60)} takes neither (leaf) nor (path, leaf): {escape(str(error), 80)}",
            next="A function that gives a leaf its value takes the old leaf, or the leaf's path and the old leaf.",
        ) from None
    return len(required) == 2


# ---------------------------------------------------------------- arrays


def given(path: str, spec: TensorSpec, value: Any, who: str = "") -> Any:
    """The array that the user gave, if it has `spec`; it is never broadcast and never cast."""
    shape = getattr(value, "shape", None)
    number = isinstance(value, (bool, int, float, complex))
    if number or (shape is not None and tuple(shape) == () and spec.shape != ()):
        shown = f"{escape(value, 40)}" if number else f"{escape(value, 40)} of shape ()"
        fill = (
            f"constant({escape(_plain(value), 40)})" if not is_tracer(value) else "a function: jnp.full_like(leaf, x)"
        )
        raise Misfit(
            Failure(
                f"{who or 'got'} a bare number where an array belongs",
                key=path,
                expected=str(spec),
                found=shown,
                next=f"To fill the leaf with it, write {fill}.",
            )
        )
    if not is_arraylike(value):
        raise Misfit(
            Failure(f"{who or 'got'} no array", key=path, expected=str(spec), found=escape(type(value).__name__))
        )
    found = spec_of_leaf(value)
    if found != spec:
        raise Misfit(_misfit(path, spec, found, who))
    return _readable(value, path)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _misfit(path: str, spec: TensorSpec, found: TensorSpec, who: str) -> Failure:
    hints: list[str] = []
    if found.shape != spec.shape:
        hint = misfit_hint(found.shape, spec.shape, None)
        if hint and len(spec.shape) == 2:
            hint += " torch keeps a Linear weight as (out, in), Flax as (in, out)."
        hints.append(hint or ("Its transpose would not fit either." if len(spec.shape) > 1 else ""))
    if found.dtype != spec.dtype:
        hints.append(f"Nothing is cast unasked: round it yourself, .astype({spec.dtype!r}).")
    differs = {"shape": found.shape != spec.shape, "dtype": found.dtype != spec.dtype}
    kinds = " and ".join(name for name, off in differs.items() if off)
    return Failure(
        f"{who + ' an array of' if who else 'has'} another {kinds}",
        key=path,
        expected=str(spec),
        found=str(found),
        next=" ".join(hint for hint in hints if hint),
    )


def _readable(value: Any, path: str) -> Any:
    """The array in a form that every adapter takes (tensors as NumPy). PlanError for an array without values."""
    if is_tensor(value):
        from graftax.adapters.torch_arrays import to_numpy

        return to_numpy(value, escape(path))
    if is_abstract(value) and not is_tracer(value):
        raise PlanError(f"got {type(value).__name__}, which has a shape and a dtype, but no values")
    return value
