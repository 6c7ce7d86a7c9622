"""Load arrays into a live module in place, all of them or none: the last step of `gx.load_into`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftax.errors import Failure, PlanError, UsageError, escape
from graftax.surgery.donors import misfit_hint
from graftax.tree import Checkpoint, nearest

_KINDS = ("torch module", "nnx module")


def require_module(module: Any) -> None:
    """UsageError for an object that is not changed in place; it says what to do instead. Cheap: call it before any
    work."""
    from graftax.adapters import kind_of

    if isinstance(module, (str, Checkpoint)):
        raise UsageError(
            "load_into changes a live module, not a file", next="gx.port_file(source, like, out) writes one."
        )
    kind = kind_of(module)
    if kind in _KINDS:
        return
    if kind == "torch state_dict":
        raise UsageError(
            "load_into changes a torch Module or an nnx.Module, not a state_dict",
            next="gx.port(source, state_dict) gives a new one.",
        )
    what = "gx.linen(...)" if kind == "linen model" else "a State" if kind.startswith("nnx") else "a tree of variables"
    raise UsageError(
        f"{what} is immutable: gx.port(source, like) returns new variables",
        next="load_into changes a torch Module or an nnx.Module in place.",
    )


def load_arrays(module: Any, arrays: Mapping[str, Any], given: bool = False) -> Any:
    """Set every weight of a live torch Module or nnx.Module from `arrays` (path -> array), in place; gives the module.

    `arrays` must name every weight and no other, each of its own shape and dtype; tensors that the module ties must get
    equal values. Everything is checked, and every new leaf made, before the first is assigned: on an error nothing has
    changed. Then the module is read back. If it does not hold what it was given (its hooks change values, or its
    state_dict returns copies), it gets its old values again. Random state and caches are untouched. given: the caller
    gives the arrays away; an nnx.Module takes them as its leaves, on whatever device they are.

    Raises PlanError that lists every misfit, UsageError for an object that is not changed in place.
    """
    require_module(module)
    from graftax.adapters import assign
    from graftax.execute.opening import open_tree

    opened = open_tree(module)
    failures = _failures(opened, arrays)
    if failures:
        raise PlanError(f"nothing was loaded into {escape(opened.label)}:", failures)
    assign(module, arrays, given)
    return module


def _failures(module: Checkpoint, arrays: Mapping[str, Any]) -> list[Failure]:
    from graftax.adapters import spec_of_leaf

    out: list[Failure] = []
    for path, spec in module.items():
        if path not in arrays:
            out.append(Failure("missing key: no array is given for it", module.label, path, expected=str(spec)))
            continue
        array = arrays[path]
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            out.append(Failure("gets no array", module.label, path, str(spec), type(array).__name__))
            continue
        found = spec_of_leaf(array)
        as_bytes = spec.packed and found.dtype == "uint8" and found.shape == (spec.nbytes,)
        if found != spec and not as_bytes:
            kinds = [
                n for n, off in (("shape", found.shape != spec.shape), ("dtype", found.dtype != spec.dtype)) if off
            ]
            hint = misfit_hint(found.shape, spec.shape, None)
            out.append(Failure(f"gets another {' and '.join(kinds)}", module.label, path, str(spec), str(found), hint))
    for path in arrays:
        if path not in module:
            near = nearest(path, module)
            out.append(
                Failure(
                    "unexpected key: no weight of the module has this name",
                    module.label,
                    path,
                    next=f"Near: {near}" if near else "",
                )
            )
    return out
