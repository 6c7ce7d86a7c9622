"""Arrays into a live module, in place, all of them or none: what `gx.load_into` does once its plan has run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftax.errors import Failure, PlanError, UsageError, escape
from graftax.surgery.donors import misfit_hint
from graftax.tree import Checkpoint, nearest

_KINDS = ("torch module", "nnx module")


def require_module(module: Any) -> None:
    """UsageError for what is not changed in place, with what to do instead. Cheap: to be asked before any work."""
    from graftax.adapters import kind_of

    if isinstance(module, (str, Checkpoint)):
        raise UsageError("a file is not loaded into", next="gx.port_file(source, like, out) writes one.")
    kind = kind_of(module)
    if kind in _KINDS:
        return
    if kind == "torch state_dict":
        raise UsageError(
            "a state_dict is not loaded into: a torch Module or an nnx.Module is",
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
    equal values. All of it is checked, and every new leaf made, before the first is assigned: on an error nothing has
    changed. Then the module is read back: where it does not hold what it was given (its hooks change values, or its
    state_dict gives copies that it does not take back), it gets its old values again. Random state and caches stay
    theirs. given: the arrays are given away; an nnx.Module takes them as its leaves, wherever they lie.

    Raises PlanError with everything that does not fit, UsageError for what is not changed in place.
    """
    require_module(module)
    from graftax.adapters import assign
    from graftax.opening import open_tree

    opened = open_tree(module)
    failures = _failures(opened, arrays)
    if failures:
        raise PlanError(f"nothing was loaded into {escape(opened.label)}:", failures)
    assign(module, arrays, given)
    return module


def _failures(module: Checkpoint, arrays: Mapping[str, Any]) -> list[Failure]:
    from graftax.surgery.live import spec_of_leaf

    out: list[Failure] = []
    for path, spec in module.items():
        if path not in arrays:
            out.append(Failure("gets no value", module.label, path, expected=str(spec)))
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
            out.append(Failure("is no weight of the module", module.label, path, next=f"Near: {near}" if near else ""))
    return out
