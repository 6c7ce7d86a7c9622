"""Live objects of torch, Linen and NNX <-> flat trees. A framework is imported only when an object of it appears."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from graftax.errors import UsageError, escape
from graftax.tree import Checkpoint, Side, TensorSpec

if TYPE_CHECKING:
    import torch

    from graftax.adapters.linen_tree import LinenModel

ACCEPTED = (
    "a path, a hub id in the local cache or 'pkg.mod:factory'; a torch Module or state_dict; Linen variables or "
    "gx.linen(module, example); an nnx.Module, nnx.State or (GraphDef, State); a nest of arrays or ShapeDtypeStruct, "
    "also in dataclasses that are registered with jax"
)


def open_live(obj: Any, label: str | None = None, side: Side | None = None) -> Checkpoint:
    """A live tree as a Checkpoint. Nothing is computed and no values are read. `side` applies only if the object does
    not declare its own side.

    Raises UsageError if the object is not a live tree of weights.
    """
    kind = kind_of(obj)
    name = label or _LABELS.get(kind, type(obj).__name__)
    if kind == "torch module":
        from graftax.adapters import torch_tree

        return torch_tree.open_module(obj, label or type(obj).__name__)
    if kind == "torch state_dict":
        from graftax.adapters import torch_tree

        return torch_tree.open_state_dict(obj, name)
    if kind == "linen model":
        from graftax.adapters import linen_tree

        return linen_tree.open_linen(obj, label or type(obj.module).__name__)
    if kind in {"nnx module", "nnx state", "nnx split"}:
        from graftax.adapters import nnx_tree

        return nnx_tree.open_nnx(obj, label or (type(obj).__name__ if kind == "nnx module" else name))
    from graftax.adapters import flax_tree

    opened = flax_tree.open_container(obj, name, side)
    if not opened and not opened.left:  # a live module without weights is fine
        raise UsageError(f"{escape(name)} holds no weights: it contains no arrays")
    return opened


_LABELS = {
    "torch state_dict": "the state_dict",
    "nnx state": "the State",
    "nnx split": "the State",
    "container": "the tree",
}


def kind_of(obj: Any) -> str:
    """The adapter that an object belongs to: "torch module", "torch state_dict", "linen model", "nnx module", "nnx
    state", "nnx split" (GraphDef, State), or "container". UsageError for anything else, with what to pass instead."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(obj, torch.nn.Module):
        return "torch module"
    linen_tree = sys.modules.get("graftax.adapters.linen_tree")
    if linen_tree is not None and isinstance(obj, linen_tree.LinenModel):
        return "linen model"
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None:
        if isinstance(obj, nnx.State):
            return "nnx state"
        if isinstance(obj, tuple) and len(obj) == 2 and isinstance(obj[0], nnx.GraphDef):
            return "nnx split"
        if isinstance(obj, (nnx.Module, getattr(nnx, "Pytree", nnx.Module))):
            return "nnx module"
    _refuse(obj, nnx)
    from graftax.adapters import torch_tree

    return "torch state_dict" if torch_tree.is_torch_tree(obj) else "container"


def optimizer_paths(obj: Any) -> dict[str, int]:
    """path -> the number of its parts that belong to the optimizer (3 of opt_state/0/mu/Dense_0/kernel), for each leaf
    of `live_leaves` that belongs to an optimizer. They are recognised by type: an nnx.Optimizer, a state of optax, the
    `opt_state` of a class."""
    obj = _live(obj)
    kind = kind_of(obj)
    if kind not in {"nnx module", "nnx state", "nnx split", "container"}:
        return {}
    from graftax.adapters import containers

    if kind == "nnx module":
        from graftax.adapters import nnx_tree

        obj = nnx_tree.split_module(obj).state
    tree = obj[1] if kind == "nnx split" else obj
    return {containers.path_of(keys): own for keys, _, own in containers.found_in(tree).optimizer}


def _refuse(obj: Any, nnx: Any) -> None:
    """UsageError for an object that is not a tree of arrays, with the way to get one if it is known."""
    if isinstance(obj, (Mapping, list)) or (isinstance(obj, tuple) and not _is_graphdef(obj, nnx)):
        if obj:
            return
        raise UsageError(f"an empty {type(obj).__name__} holds no weights")
    if _is_tree_class(obj, nnx):
        return
    linen = sys.modules.get("flax.linen")
    name = obj.__name__ if isinstance(obj, type) else type(obj).__name__
    hint = f"Accepted: {ACCEPTED}."
    if linen is not None and isinstance(obj, linen.Module):
        hint = f"A Linen module has no shapes until it is called: use gx.linen({escape(name)}(...), example_input)."
    elif isinstance(obj, type):
        hint = f"{escape(name)} is a class: pass an instance of it."
    elif _is_graphdef(obj, nnx):
        hint = "Pass (GraphDef, State) with one State: nnx.merge_state joins several."
    raise UsageError(f"{type(obj).__module__}.{escape(name)} is not a tree of weights", next=hint)


def _is_tree_class(obj: Any, nnx: Any) -> bool:
    """True for an object of a class that is registered with jax as a tree, with arrays in it."""
    from graftax.adapters import containers

    if _is_graphdef(obj, nnx) or containers.is_variable(obj) or containers.children_of(obj) is None:
        return False
    found = containers.found_in(obj)
    return bool(found.weights or found.optimizer)


def _is_graphdef(obj: Any, nnx: Any) -> bool:
    if nnx is None:
        return False
    return isinstance(obj, nnx.GraphDef) or (isinstance(obj, tuple) and bool(obj) and isinstance(obj[0], nnx.GraphDef))


def linen(module: Any, *example_args: Any, rngs: Any = None, method: Any = None, **kwargs: Any) -> LinenModel:
    """A Linen module as `like` or source side. The shapes of its variables are traced on the example inputs; nothing is
    computed.

      example_args, kwargs  the arguments of the module's call; arrays may be jax.ShapeDtypeStruct
      rngs                  as for `module.init`; also a seed, or {name: seed}
      method                the method to call, if not `__call__`

    Raises UsageError if `module` is not a Linen module.
    """
    from graftax.adapters import linen_tree

    return linen_tree.linen(module, *example_args, rngs=rngs, method=method, **kwargs)


def assign(obj: Any, arrays: Mapping[str, Any], given: bool = False) -> None:
    """Set the weights at the paths of `arrays` in a live torch Module or nnx.Module, in place: all or none. given: the
    arrays may be used as they are, and an nnx.Module takes them as its leaves. Otherwise they are copied, and placed as
    the module's leaves are. Assigned values are read back.

    Everything is checked first. Raises PlanError for arrays that do not fit, UsageError for an immutable object.
    """
    kind = kind_of(obj)
    if kind == "torch module":
        from graftax.adapters import torch_load

        return torch_load.assign_module(obj, arrays, given)
    if kind == "nnx module":
        from graftax.adapters import nnx_tree

        return nnx_tree.assign_module(obj, arrays, given)
    raise UsageError(
        f"{_LABELS.get(kind, 'a Linen module')} cannot be changed in place; only a torch Module or an nnx.Module can",
        next="gx.port(source, like) returns a new tree.",
    )


def map_leaves(obj: Any, new: Mapping[str, Any]) -> Any:
    """The same kind of object with new leaves at the paths of `new`; every other leaf is the same object.

    Containers keep their type, key order, boxes and attributes. A new leaf gets the old leaf's dtype (checked),
    framework, sharding and device. A Module gives a new Module (nnx) or a state_dict (torch). `obj` does not change.
    Raises PlanError for paths, shapes and dtypes that do not fit, UsageError for gx.linen(...), which has no leaves.
    """
    obj = _live(obj)
    kind = kind_of(obj)
    if kind in {"torch module", "torch state_dict"}:
        from graftax.adapters import torch_tree

        return torch_tree.map_module(obj, new) if kind == "torch module" else torch_tree.map_state(obj, new)
    if kind == "linen model":
        raise UsageError("gx.linen(...) has only shapes, no leaves to replace; pass the variables")
    if kind == "nnx module":
        from graftax.adapters import nnx_tree

        return nnx_tree.map_module(obj, new, _like_old)
    from graftax.adapters import flax_tree

    if kind == "nnx split":
        return flax_tree.make_container(obj[1], new, _like_old)
    return flax_tree.make_container(obj, new, _like_old)


def live_leaves(obj: Any) -> dict[str, Any]:
    """path -> the leaf itself as the object holds it (a tensor, a jax or NumPy array, a ShapeDtypeStruct), including
    optimizer leaves (`optimizer_paths`).

    UsageError for gx.linen(...), which has no leaves.
    """
    obj = _live(obj)
    kind = kind_of(obj)
    if kind in {"torch module", "torch state_dict"}:
        from graftax.adapters import torch_tree

        return torch_tree.leaf_table(obj)
    if kind == "linen model":
        raise UsageError("gx.linen(...) has only shapes, no leaves; pass the variables")
    from graftax.adapters import flax_tree

    if kind == "nnx module":
        from graftax.adapters import nnx_tree

        return flax_tree.leaf_table(nnx_tree.split_module(obj).state, "the module", optimizer=True)
    tree = obj[1] if kind == "nnx split" else obj
    return flax_tree.leaf_table(tree, "the tree", optimizer=True)


def spec_of_leaf(leaf: Any) -> TensorSpec:
    """The spec of an array of any framework. FormatError for a dtype that no checkpoint can hold."""
    from graftax.adapters.containers import is_tensor

    if is_tensor(leaf):
        from graftax.adapters.torch_arrays import spec_of_tensor

        return spec_of_tensor(leaf)
    from graftax.tree.dtypes import spec_of

    return spec_of(leaf)


def leaf_reader(leaves: Mapping[str, Any]) -> Callable[[str], Any] | None:
    """path -> the values of a NumPy or jax leaf as a read-only NumPy array; None if no leaf has values."""
    from graftax.adapters import flax_tree

    return flax_tree.reader_of(leaves)


def _live(obj: Any) -> Any:
    """The live object behind a Checkpoint."""
    if not isinstance(obj, Checkpoint):
        return obj
    if obj.live.object is None:
        raise UsageError(f"{escape(obj.label)} is not a live object: it was read from a file")
    return obj.live.object


def _like_old(path: str, old: Any, new: Any) -> Any:
    """A NumPy array if the old leaf was one, else a jax array placed as the old leaf; always a copy."""
    import numpy as np

    from graftax.adapters import jax_arrays
    from graftax.tree import dtypes

    plain = jax_arrays.from_storage(new, dtypes.spec_of(old))
    if isinstance(old, (np.ndarray, np.generic)) and not jax_arrays.is_tracer(plain):
        made = jax_arrays.own(np.asarray(plain))
        return made[()] if isinstance(old, np.generic) else made
    return jax_arrays.to_jax(plain, old)


def plain_tree(
    end: Any, arrays: Mapping[str, Any], host: bool = False, adopt: bool = False, final: bool = False
) -> Any:
    """`arrays` in the plain container of a side: an OrderedDict of tensors (torch), or a nested dict of jax arrays
    (Flax, with the keys and lists of `end.real_keys` and `end.containers`). host=True gives NumPy arrays. adopt=True:
    `arrays` may become part of the result (see `jax_arrays`). final=True: they are the leaves (Flax).

    end: anything with `side`, `specs`, `real_keys` and `containers`: a Checkpoint, or the end of a plan.
    """
    from graftax.adapters import plain

    return plain.plain_tree(end, arrays, host, adopt, final)


def to_jax(array: Any, like_leaf: Any = None) -> Any:
    """`array` as a jax array of the same dtype, in its own memory, placed as `like_leaf` is. A dtype that jax would
    narrow (64 bits without jax_enable_x64) stays a NumPy array."""
    from graftax.adapters import jax_arrays

    return jax_arrays.to_jax(array, like_leaf)


def to_torch(array: Any, like_leaf: Any = None) -> torch.Tensor:
    """`array` as a tensor of the same dtype (bf16 and f8 too), in its own memory, on the device of `like_leaf`."""
    from graftax.adapters import torch_arrays

    return torch_arrays.to_torch(array, like_leaf)
