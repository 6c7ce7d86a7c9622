"""A live tree as surgery sees it: its leaves by path, their specs and values one at a time, and the paths that an nnx
filter passes. Only the requested leaves are read, so that replacing one leaf of ten thousand is quick."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from graftax.adapters import kind_of, live_leaves, optimizer_paths, spec_of_leaf
from graftax.errors import PlanError, UsageError, escape
from graftax.surgery.selecting import SelectableTree
from graftax.tree import Checkpoint, TensorSpec
from graftax.tree.sides import separator_of
from graftax.tree.training_tree import may_hold_state, own_parts


@dataclass(frozen=True, slots=True, eq=False)
class LiveTree:
    """`leaves`: path -> leaf, taken out of boxes and Variables; `kind`: the result of `adapters.kind_of`; `optimizer`:
    the result of `adapters.optimizer_paths`."""

    native: Any
    kind: str
    label: str
    leaves: Mapping[str, Any]
    optimizer: Mapping[str, int]

    @property
    def torch(self) -> bool:
        return self.kind in ("torch state_dict", "torch module")

    def spec(self, path: str) -> TensorSpec:
        """FormatError for a leaf whose dtype no checkpoint can hold."""
        return spec_of_leaf(self.leaves[path])

    def host(self, path: str) -> Any:
        """The values of a leaf as a read-only NumPy array; packed types as their bytes. PlanError if it has no
        values."""
        leaf = self.leaves[path]
        if self.torch:
            from graftax.adapters.torch_arrays import to_numpy

            return to_numpy(leaf, escape(path))
        from graftax.adapters.jax_arrays import to_host

        return to_host(leaf, self.spec(path), escape(path))

    def traced(self, path: str) -> bool:
        """Is the leaf inside jit, grad or vmap?"""
        from graftax.adapters.jax_arrays import is_tracer

        return is_tracer(self.leaves[path])

    def require_values(self, path: str) -> None:
        """PlanError for an abstract leaf. A traced leaf passes: it gets values when the traced code runs."""
        leaf = self.leaves[path]
        if self.traced(path):
            return
        if self.torch:
            from graftax.adapters.torch_arrays import has_values

            abstract = not has_values(leaf)
        else:
            from graftax.adapters.jax_arrays import is_abstract

            abstract = is_abstract(leaf)
        if abstract:
            raise PlanError(
                f"is abstract ({type(leaf).__name__}): it has a shape and a dtype, but no values",
                next="Port or initialise the tree first, then replace.",
            )

    def selectable(self) -> SelectableTree:
        flat = self.kind == "container" and "/" not in "".join(self.leaves)  # its names may be torch keys
        flat = flat and all(type(leaf).__module__.partition(".")[0] == "numpy" for leaf in self.leaves.values())
        side = "torch" if self.torch else separator_of(self.leaves) if flat else "flax"
        return SelectableTree(
            self.label,
            side,
            self.leaves,
            self.leaves.__getitem__,
            lambda path: self.spec(path).shape,
            (lambda wanted: _filtered(self.native, self.kind, self.leaves, wanted))
            if self.kind.startswith("nnx")
            else None,
            self.other_names,
            self.state(),
        )

    def state(self) -> Mapping[str, int]:
        """The leaves of optimizer state, by types and names; in NNX objects by types alone."""
        if self.kind != "container" or not may_hold_state(self.leaves):
            return self.optimizer
        return {**own_parts({path: spec_of_leaf(leaf) for path, leaf in self.leaves.items()}), **self.optimizer}

    def other_names(self) -> Mapping[str, str]:
        """Another name of a shared leaf -> the name that counts. torch lists both names, NNX one."""
        if self.torch:
            from graftax.adapters.torch_tree import aliases_of

            return aliases_of(dict(self.leaves))
        return self.opened().storage.aliases if self.kind.startswith("nnx") else {}

    def opened(self) -> Checkpoint:
        """The same tree as a Checkpoint, whose modules tell the layouts."""
        from graftax.execute.opening import open_tree

        return open_tree(self.native)


def live_tree(obj: Any, modules: bool = False) -> LiveTree:
    """The leaves of an object that `replace` edits; with `modules` of a torch Module too. UsageError for other objects;
    it says how to edit them."""
    if isinstance(obj, (str, PathLike, Checkpoint)):
        raise UsageError(
            "replace edits a live tree, not a file",
            next="On the command line: graftax replace CKPT SELECT ... -o OUT.",
        )
    kind = kind_of(obj)
    if kind == "torch module" and not modules:
        raise UsageError(
            "replace gives a new tree and leaves the old one alone; a torch Module is changed in place",
            next="gx.load_into(module, gx.replace(module.state_dict(), ...))",
        )
    if kind == "linen model":
        raise UsageError("gx.linen(...) has shapes and no values", next="Pass the variables that module.init gave.")
    label = {"torch state_dict": "the state_dict", "container": "the tree"}
    label |= dict.fromkeys(("nnx module", "torch module"), type(obj).__name__)
    return LiveTree(obj, kind, label.get(kind, "the State"), live_leaves(obj), optimizer_paths(obj))


def _filtered(obj: Any, kind: str, leaves: Mapping[str, Any], wanted: Any) -> list[str]:
    """The paths of the Variables that an nnx filter passes, never random state and caches. Optimizer state counts only
    if the filter names it, that is, if it does not pass a plain Variable at another path."""
    from graftax.adapters.containers import is_optimizer_variable, path_of

    nnx = sys.modules["flax.nnx"]
    state = nnx.state(obj) if kind == "nnx module" else obj[1] if kind == "nnx split" else obj
    passes = nnx.filterlib.to_predicate(wanted)

    def chosen(keys: tuple[Any, ...], leaf: Any) -> bool:
        return passes(keys, leaf) and not (is_optimizer_variable(leaf) and passes(("",), nnx.Variable(0)))

    held = {path_of(tuple(keys)) for keys, leaf in nnx.to_flat_state(state) if chosen(tuple(keys), leaf)}
    if all(path in leaves for path in held):
        return [path for path in leaves if path in held]
    return [path for path in leaves if any(path == one or path.startswith(f"{one}/") for one in held)]
