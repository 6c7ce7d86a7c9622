"""Make the new value of one leaf from whatever the user gave, in the leaf's shape and dtype, or refuse."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, ClassVar

from graftax.adapters import spec_of_leaf
from graftax.errors import Failure, GraftaxError, PlanError, UsageError, escape, with_article
from graftax.ops import LeafValue, Misfit, misfit_of
from graftax.ops.replace_op import not_data, value_data
from graftax.surgery.array_parts import as_array, as_codes, as_stored, host_part, leaf_part
from graftax.surgery.donors import FromCheckpoint, Target, donor_key, misfit_hint, owner, readings_of, same_leaf
from graftax.surgery.roles import role_in
from graftax.surgery.selecting import Edit, Parts
from graftax.surgery.values import AddNormal, Constant, Mean, Mix, Normal, Quantized, Rounded, Scaled, Zeros
from graftax.surgery.values.base import is_arraylike
from graftax.tree import Checkpoint, LeafIndex, TensorSpec

VALUES = (Constant, Zeros, Normal, AddNormal, Scaled, Mean, Mix, Rounded, Quantized, FromCheckpoint)


def prepared(edits: tuple[Edit, ...]) -> tuple[Edit, ...]:
    """The edits with every donor open, each checked to be a value that a leaf can take.

    Raises what opening a donor raises; UsageError for what is no value.
    """
    return tuple(Edit(edit.selector, _prepared(edit.value)) for edit in edits)


def _prepared(value: Any) -> Any:
    from graftax.adapters.containers import axis_value, is_axis_box, is_variable, variable_value

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


# ---------------------------------------------------------------- one leaf


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


@dataclass(frozen=True, slots=True, eq=False)
class InParts:
    """New values in parts of the leaf; the other elements stay. `home`: as in `new_leaf`."""

    reads: ClassVar[bool] = True
    parts: Parts
    home: Callable[[], Checkpoint]

    @property
    def text(self) -> str:
        shown = (("" if index is None else f"{index.text} ") + value_text(value) for index, value in self.parts.items)
        return ", ".join(shown)

    def apply(self, path: str, spec: TensorSpec, old: Any) -> Any:
        return _with_parts(path, spec, self.parts, lambda: own_copy(old), lambda: old, self.home)

    def as_data(self) -> Any:
        items = [
            {"index": None if index is None else index.text, "value": value_data(_kind_of(value))}
            for index, value in self.parts.items
        ]
        return {"kind": "parts", "items": items}


def value_text(value: Any) -> str:
    """A value as the report shows it."""
    return _kind_of(value).text


def _kind_of(value: Any) -> LeafValue:
    """What the user gave, as a value of any leaf, not yet compared with one."""
    if isinstance(value, VALUES):
        return value
    return Computed(value) if callable(value) and not is_arraylike(value) else Given(value)


def leaf_value(
    path: str, spec: TensorSpec, value: Any, home: Callable[[], Checkpoint], index: LeafIndex | None = None
) -> LeafValue:
    """What the user gave, as the value of the leaf at `path`.

    home   the tree as a Checkpoint, whose modules tell the layout for a donor
    index  the part of the leaf that is replaced; `spec` is then that of the part

    Misfit if an array does not fit the leaf; PlanError.
    """
    from graftax.adapters.containers import is_tensor

    if isinstance(value, Parts):
        return InParts(value, home)
    name = path if index is None else f"{path}{index.text}"
    if isinstance(value, FromCheckpoint):
        target = target_of(home(), path)
        return replace(value, target=target if index is None else replace(target, module=None))
    if isinstance(value, Mix):
        donor = leaf_value(path, spec, value.donor, home, index)
        return replace(value, donor=donor.array if isinstance(donor, Given) else donor)
    if isinstance(value, Quantized):
        return replace(value, role=role_in(path, spec, value, home, index))
    made = _kind_of(value)
    if isinstance(made, Given):
        new = given(name, spec, value)
        if len(spec.shape) > 1 and is_tensor(value):
            _refuse_two_readings(path, name, spec, value, home)
        return Given(new)
    return made


def check_leaf(
    path: str, spec: TensorSpec, value: Any, home: Callable[[], Checkpoint], index: LeafIndex | None = None
) -> None:
    """Raise what `new_leaf` would, as far as the shape and dtype of a leaf tell. The arguments are those of
    `leaf_value`. Nothing is known of a function."""
    check = getattr(leaf_value(path, spec, value, home, index), "check", None)
    if check is not None:
        check(path if index is None else f"{path}{index.text}", spec)


def new_leaf(
    path: str,
    spec: TensorSpec,
    value: Any,
    leaf: Callable[[], Any],
    host: Callable[[], Any],
    home: Callable[[], Checkpoint],
    index: LeafIndex | None = None,
) -> Any:
    """The new leaf at `path`: an array of `spec` (packed types also as their bytes).

    leaf   the old leaf, given to a user's function, which may change it
    host   its values as NumPy
    home   the tree as a Checkpoint, whose modules tell the layout for a donor
    index  the part of the leaf that is replaced; `spec`, `leaf` and `host` are then those of the part

    Raises Misfit and other GraftaxErrors. An exception of a user's function passes through, with the path as a note.
    """
    if isinstance(value, Parts):
        return _with_parts(path, spec, value, leaf, host, home)
    name = path if index is None else f"{path}{index.text}"
    made = leaf_value(path, spec, value, home, index)
    if isinstance(made, Computed):
        return made.of(name, spec, leaf())
    return made.apply(name, spec, host() if made.reads else None)


def traced_leaf(
    path: str,
    spec: TensorSpec,
    value: Any,
    leaf: Any,
    home: Callable[[], Checkpoint],
    index: LeafIndex | None = None,
) -> Any:
    """The new leaf inside jit, grad or vmap, from a value for which `is_traced` is true; the other arguments are those
    of `leaf_value`."""
    made: Any = leaf_value(path, spec, value, home, index)
    return made.traced(path if index is None else f"{path}{index.text}", spec, leaf)


def is_traced(value: Any, leaf: Any) -> bool:
    """True if the new leaf is computed from traced values: the leaf's own, or those of a donor."""
    from graftax.adapters.jax_arrays import is_tracer

    if not isinstance(value, VALUES) or not value.reads or is_tensor_leaf(leaf):
        return False
    return is_tracer(leaf) or (isinstance(value, Mix) and is_tracer(value.donor))


def _refuse_two_readings(path: str, name: str, spec: TensorSpec, tensor: Any, home: Callable[[], Checkpoint]) -> None:
    """Misfit for a torch tensor that fits a Flax leaf both unchanged and transposed from torch's layout: a square
    weight. An array of NumPy or jax is taken unchanged."""
    from graftax.execute.opening import open_tree

    target = target_of(home(), path)
    if target.side != "torch":
        target = replace(target, side="flax", module=target.module if name == path else None)
        readings = readings_of(open_tree({"weight": tensor}), "weight", path, spec, target)
        if len(readings) > 1:
            raise Misfit(
                Failure(
                    "a torch tensor of this shape fits in more than one way",
                    key=name,
                    next=f'Write gx.from_checkpoint({{"weight": tensor}}, layout=...): {" or ".join(readings)}.',
                )
            )


def target_of(tree: Checkpoint, path: str) -> Target:
    """A leaf as a donor sees it: its side and the live module that holds it."""
    module, role = owner(tree, same_leaf(tree, path) or path)
    return Target(tree.side, module, role, tree.side_by == "names")


def _called(function: Callable[..., Any], path: str, leaf: Any) -> Any:
    from graftax.adapters.containers import is_variable, variable_value

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


def given(path: str, spec: TensorSpec, value: Any, who: str = "") -> Any:
    """The array that the user gave, if it has `spec`; it is never broadcast and never cast."""
    from graftax.adapters.jax_arrays import is_tracer

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
    from graftax.adapters.containers import is_tensor

    if is_tensor(value):
        from graftax.adapters.torch_arrays import to_numpy

        return to_numpy(value, escape(path))
    from graftax.adapters.jax_arrays import is_abstract, is_tracer

    if is_abstract(value) and not is_tracer(value):
        raise PlanError(f"got {type(value).__name__}, which has a shape and a dtype, but no values")
    return value


# ---------------------------------------------------------------- parts of one leaf


def _with_parts(
    path: str,
    spec: TensorSpec,
    parts: Parts,
    leaf: Callable[[], Any],
    host: Callable[[], Any],
    home: Callable[[], Checkpoint],
) -> Any:
    """The old leaf with new values in its parts; every other element keeps its bits. A leaf on several devices stays
    there: of its shards only those are read and written that a part reaches. PlanError that lists every part that does
    not fit."""
    from graftax.adapters.jax_arrays import is_tracer
    from graftax.adapters.jax_parts import is_split, traced_with_part, with_parts

    old = leaf()
    base: Any = None
    made: list[tuple[LeafIndex, Any]] = []
    failures: list[Failure] = []
    for index, value in parts.items:
        try:
            if index is not None:
                made.append((index, _new_part(path, spec, index, value, old, host, home)))
            elif is_traced(value, old):
                base = traced_leaf(path, spec, value, old, home)
            else:
                base = new_leaf(path, spec, value, leaf, host, home)
        except GraftaxError as error:
            if error.exit_code != PlanError.exit_code:
                raise
            failures += misfit_of(path if index is None else f"{path}{index.text}", error).failures
    if failures:
        raise Misfit(*failures)
    if any(map(is_tracer, (old, base, *(part for _, part in made)))):
        if is_tensor_leaf(old):
            raise PlanError("a torch tensor cannot take a traced value")
        whole = old if base is None else base
        for index, part in made:
            whole = traced_with_part(whole, index.key, part)
        return whole
    if base is None and is_split(old):
        ranged = [(index.ranges(spec.shape), part) for index, part in made]
        return with_parts(old, [(at, as_array(part).reshape([*map(len, at)])) for at, part in ranged])
    if base is not None or is_tensor_leaf(old) or type(old).__module__ != "numpy":
        whole = as_codes(host() if base is None else base, spec).copy()
    else:
        whole = as_codes(old, spec)  # it is a copy already
    for index, part in made:
        whole[index.key] = as_array(part)
    return as_stored(whole, spec)


def _new_part(
    path: str,
    spec: TensorSpec,
    index: LeafIndex,
    value: Any,
    old: Any,
    host: Callable[[], Any],
    home: Callable[[], Checkpoint],
) -> Any:
    """The new values of a part."""
    part = TensorSpec(index.part_shape(spec.shape), spec.dtype)
    value = _for_part(path, spec, part, index, value, home)
    if is_traced(value, old):
        return traced_leaf(path, part, value, old[index.key], home, index)
    return new_leaf(
        path,
        part,
        value,
        lambda: leaf_part(path, spec, index, old, host),
        lambda: host_part(path, spec, index, old, host),
        home,
        index,
    )


def _for_part(
    path: str, spec: TensorSpec, part: TensorSpec, index: LeafIndex, value: Any, home: Callable[[], Checkpoint]
) -> Any:
    """The value for a part of a leaf. A donor that has the size of the whole leaf gives the same part of itself."""
    if isinstance(value, Mix):
        return replace(value, donor=_for_part(path, spec, part, index, value.donor, home))
    if not isinstance(value, FromCheckpoint):
        return value
    donor: Any = value.opened().source
    key = donor_key(donor, value.key, path) if value.plan is None else None
    if key is None or donor[key].size == spec.size != part.size:
        whole = leaf_value(path, spec, replace(value, key=key), home).apply(path, spec, None)
        return as_array(as_codes(whole, spec)[index.key])
    return replace(value, key=key)


def is_tensor_leaf(leaf: Any) -> bool:
    from graftax.adapters.containers import is_tensor

    return is_tensor(leaf)


def own_copy(leaf: Any) -> Any:
    """The old leaf for a user's function: a copy if it could be changed in place."""
    from graftax.adapters.containers import is_tensor

    if is_tensor(leaf):
        return leaf.detach().clone()
    return leaf.copy() if type(leaf).__module__ == "numpy" else leaf
