"""Containers of arrays (Linen variables, nnx.State, plain nested dicts) as a Checkpoint, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graftax.adapters import containers, jax_arrays, notes
from graftax.errors import Failure, FormatError, GraftaxError, PlanError, escape
from graftax.tree import Checkpoint, Key, Live, Side, SideBy, Storage, TensorSpec, dtypes, nearest, unescape_part
from graftax.tree.sides import Signs, renamed, split_at_dots

if TYPE_CHECKING:
    import numpy as np

Make = Callable[[str, Any, Any], Any]
"""(path, the leaf that was there, the new array) -> the new leaf"""


def open_container(tree: Any, label: str, side: Side | None = None) -> Checkpoint:
    """The weights of a nested container as a Checkpoint.

    The names of a flat dict of arrays are taken as they are: as paths, or as torch keys. jax arrays, Variables and
    boxes are Flax's. Dicts and lists of NumPy arrays declare no side: then `side` decides, or else all names together
    (`sides`). Raises UsageError for a leaf that is not an array, FormatError for dtypes that weights cannot have.
    """
    if is_flat(tree):
        return _open_flat(tree, label, side)
    arrays = containers.found_in(tree)
    found = _table(arrays.weights, label)
    real_keys, kinds = containers.shape_of_tree(tree)
    leading = {path[:i] for path in found for i in (*_slashes(path), len(path))}
    told, side_by = _side_of(found, _is_plain(tree), side)
    opened = Checkpoint(
        label=label,
        side=told,
        side_by=side_by,
        specs=specs_of(found, label),
        storage=Storage(reader=reader_of(found), metadata=_left_out(arrays)),
        live=Live(object=tree, rebuild=_rebuilder(tree, found, told), placed=lambda: notes.notes_of(tree)),
        real_keys={path: key for path, key in real_keys.items() if path in leading},
        containers=kinds,
        left=_left_out(arrays),
    )
    return _keyed(opened) if told == "torch" else opened


def _rebuilder(tree: Any, found: Mapping[str, Any], side: Side | None) -> Callable[..., Any]:
    """A function that makes a tree like this from new arrays; from NumPy arrays if it is a torch tree of NumPy
    arrays."""
    host = side == "torch" and _all_numpy(found)

    def rebuild(arrays: Mapping[str, Any], sharding: Any = None, adopt: bool = False) -> Any:
        return rebuild_container(tree, arrays, "host" if host else sharding, adopt)

    return rebuild


def _all_numpy(found: Mapping[str, Any]) -> bool:
    return all(type(leaf).__module__.partition(".")[0] == "numpy" for leaf in found.values())


def _side_of(found: Mapping[str, Any], plain: bool, stated: Side | None) -> tuple[Side | None, SideBy]:
    """(side, what decided it). Flax's containers and classes are Flax's. So are jax arrays in plain dicts, unless their
    names are torch's: `safetensors.flax.load_file` also gives jax arrays for a torch file."""
    signs = Signs.of(found)
    if not plain and not (signs.torch and signs.side == "torch"):
        return "flax", "kind"
    if stated is not None and not (stated == "torch" and signs.contradicts(stated)):
        return stated, "stated"
    if _all_numpy(found):
        return signs.side, "names"
    return ("flax", "kind") if plain and signs.allows("flax") else (None, "metadata")


def _is_plain(tree: Any) -> bool:
    """True if it consists only of dicts, lists and tuples, without a container or box of Flax."""
    if containers.is_plain_array(type(tree)):
        return True
    children = containers.children_of(tree)
    if children is None:
        return not containers.is_variable(tree) and containers.is_array(tree)
    return type(tree).__module__ in ("builtins", "collections") and all(_is_plain(child) for _, child in children)


def _keyed(opened: Checkpoint) -> Checkpoint:
    """A nested torch tree by its keys: the keys of nested levels are joined by '.', as in a .pt file."""
    keys = {".".join(map(unescape_part, path.split("/"))): path for path in opened}
    if len(keys) < len(opened):
        raise FormatError(f"{escape(opened.label)}: two leaves have the same key", next="Rename one.")
    real_keys = {".".join(map(unescape_part, path.split("/"))): key for path, key in opened.real_keys.items()}
    return replace(renamed(opened, keys), real_keys=real_keys, containers={})


def _slashes(path: str) -> list[int]:
    return [i for i, char in enumerate(path) if char == "/"]


def leaf_table(tree: Any, label: str, optimizer: bool = False) -> dict[str, Any]:
    """path -> leaf of every weight; with `optimizer` also the optimizer leaves. FormatError if two keys give the same
    path ('1' and 1)."""
    if is_flat(tree):
        return _flat_table(tree, label)
    arrays = containers.found_in(tree)
    kept = [(keys, leaf) for keys, leaf, _ in arrays.optimizer] if optimizer else []
    return _table([*arrays.weights, *kept], label)


def _table(pairs: Iterable[tuple[tuple[Key, ...], Any]], label: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for keys, leaf in pairs:
        path = containers.path_of(keys)
        if path in found:
            raise FormatError(f"{escape(label)}: two leaves have the path {escape(path)!r}", next="Rename a key.")
        found[path] = leaf
    return found


def _left_out(arrays: containers.TreeArrays) -> dict[str, str]:
    """Where an optimizer's state lies -> what it is."""
    counts = Counter(containers.path_of(keys[:1] if keys else ()) for keys, _, _ in arrays.optimizer)
    return {name: f"optimizer state: {count} leaves" for name, count in counts.items()}


def specs_of(found: Mapping[str, Any], label: str) -> dict[str, TensorSpec]:
    """path -> spec. FormatError that lists every leaf whose dtype a checkpoint cannot hold."""
    specs: dict[str, TensorSpec] = {}
    failures: list[Failure] = []
    for path, leaf in found.items():
        try:
            specs[path] = dtypes.spec_of(leaf)
        except (GraftaxError, TypeError):
            failures.append(Failure("a checkpoint cannot hold this dtype", key=path, found=escape(leaf.dtype)))
    if failures:
        raise FormatError(f"{escape(label)} has {len(failures)} leaves that cannot be weights", failures)
    return specs


def reader_of(found: Mapping[str, Any]) -> Callable[[str], np.ndarray[Any, Any]] | None:
    """path -> values; None if no leaf has values."""
    if found and all(jax_arrays.is_abstract(leaf) for leaf in found.values()):
        return None
    return lambda path: jax_arrays.to_host(found[path], dtypes.spec_of(found[path]), escape(path))


# ---------------------------------------------------------------- back


def rebuild_container(tree: Any, arrays: Mapping[str, Any], sharding: Any = None, adopt: bool = False) -> Any:
    """A container like `tree` with `arrays` as its leaves. The leaves are jax arrays placed as the old leaves are; with
    sharding="host" NumPy arrays; with sharding="given" the arrays as they are; with a jax Sharding they are placed by
    it. Dtypes are those of `arrays`, as the plan decided. adopt: see `jax_arrays`."""
    return make_container(tree, arrays, maker(sharding, adopt), any_dtype=True)


def maker(sharding: Any = None, adopt: bool = False) -> Make:
    """A function that makes new leaves."""
    given = jax_arrays.once(adopt)

    def make(path: str, old: Any, new: Any) -> Any:
        if sharding == "given":
            return new
        plain = jax_arrays.from_storage(new, dtypes.spec_of(old))
        if sharding == "host":
            return jax_arrays.own(plain, given(plain))
        return jax_arrays.to_jax(plain, old if sharding is None else _Placement(sharding), adopt=given(plain))

    return make


class _Placement:
    """A stand-in for a leaf, of which only the sharding matters."""

    __slots__ = ("sharding",)

    def __init__(self, sharding: Any) -> None:
        self.sharding = sharding


def make_container(tree: Any, arrays: Mapping[str, Any], make: Make, any_dtype: bool = False) -> Any:
    """A copy of `tree` in which `make` makes the leaves that `arrays` names; every other leaf is the same object.

    Raises one PlanError for all paths that are not in the tree, and all shape or (unless `any_dtype`) dtype mismatches.
    """
    found: dict[str, Any] = {}
    misfits: list[str] = []

    def visit(path: str, old: Any) -> Any:
        if path not in arrays:
            return old
        if path in found:
            raise FormatError(f"two leaves have the path {escape(path)!r}", next="Rename a key.")
        found[path] = old
        if any_dtype and type(old.shape) is tuple and getattr(arrays[path], "shape", None) == old.shape:
            return make(path, old, arrays[path])
        if _misfit(path, found, arrays[path], any_dtype):
            misfits.append(path)
            return old
        return make(path, old, arrays[path])

    if is_flat(tree):
        new = containers.with_children(tree, {key: visit(_name_of(key), old) for key, old in tree.items()})
    else:
        new = containers.remade(tree, visit)
    if misfits or len(found) != len(arrays):  # search the whole tree only to name the nearest paths
        check_fit(leaf_table(tree, "the tree", optimizer=True), arrays, "the tree", any_dtype)
    return new


def check_fit(found: Mapping[str, Any], arrays: Mapping[str, Any], label: str, any_dtype: bool = False) -> None:
    """PlanError unless every array belongs to an existing path and has its shape and dtype; it lists all that do
    not."""
    failures = [misfit for path in arrays if (misfit := _misfit(path, found, arrays[path], any_dtype))]
    if failures:
        raise PlanError(f"{len(failures)} of {len(arrays)} arrays do not fit {escape(label)}", failures)


def _misfit(path: str, found: Mapping[str, Any], array: Any, any_dtype: bool) -> Failure | None:
    if path not in found:
        near = nearest(path, found)
        return Failure("unexpected key", key=path, next=f"Near: {near}" if near else "")
    spec = dtypes.spec_of(found[path])
    if spec.packed and str(getattr(array, "dtype", "")) == "uint8" and tuple(array.shape) == (spec.nbytes,):
        return None
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        return Failure("not an array", key=path, expected=str(spec), found=type(array).__name__)
    try:
        given = dtypes.spec_of(array)
    except (GraftaxError, TypeError):
        return Failure("not a NumPy or jax array", key=path, expected=str(spec), found=escape(array.dtype))
    if given.shape != spec.shape or (given.dtype != spec.dtype and not any_dtype):
        return Failure("shape or dtype mismatch", key=path, expected=str(spec), found=str(given))
    return None


# ---------------------------------------------------------------- flat dicts


def is_flat(tree: Any) -> bool:
    """True for a dict of one level that holds only arrays. Its names may be whole paths, also as the tuples that
    `flatten_dict(params)` gives."""
    if not isinstance(tree, Mapping) or not tree:
        return False
    kind = tuple if type(next(iter(tree))) is tuple else str
    return all(
        isinstance(key, kind) and containers.is_array(leaf) and not containers.is_variable(leaf)
        for key, leaf in tree.items()
    )


def _name_of(key: Key) -> str:
    """A key of a flat dict as a path; the items of a tuple become its parts."""
    return containers.path_of(key) if isinstance(key, tuple) else str(key)


def _flat_table(tree: Mapping[Any, Any], label: str) -> dict[str, Any]:
    found = {_name_of(key): leaf for key, leaf in tree.items()}
    if len(found) < len(tree):
        raise FormatError(f"{escape(label)}: two leaves have the same path", next="Rename a key.")
    return found


def _open_flat(tree: Mapping[Any, Any], label: str, stated: Side | None) -> Checkpoint:
    found = _flat_table(tree, label)
    side, side_by = _side_of(found, _is_plain(tree), stated)
    opened = Checkpoint(
        label=label,
        side=side,
        side_by=side_by,
        specs=specs_of(found, label),
        storage=Storage(reader_of(found)),
        live=Live(
            object=tree,
            rebuild=_rebuilder(tree, found, side),
            placed=lambda: {path: notes.note_of_leaf(leaf) for path, leaf in found.items()},
        ),
        containers=containers.shape_of_tree(tree)[1],
    )
    if side == "torch" and isinstance(next(iter(tree)), tuple):
        return _keyed(opened)
    return split_at_dots(opened) if side == "flax" else opened
