"""Plain containers for trees that do not come from a live object."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from graftax.adapters import jax_arrays
from graftax.errors import UsageError
from graftax.tree import Key, nest


def plain_tree(end: Any, arrays: Mapping[str, Any], host: bool, adopt: bool, final: bool) -> Any:
    """See `adapters.plain_tree`."""
    if final:
        return with_lists(nest(arrays, end.real_keys), end.containers)
    given = jax_arrays.once(adopt)
    plain = {path: jax_arrays.from_storage(array, end.specs[path]) for path, array in arrays.items()}
    if end.side == "torch":
        if host:
            return OrderedDict((path, jax_arrays.own(array, given(array))) for path, array in plain.items())
        try:
            import torch  # noqa: F401
        except ModuleNotFoundError as error:
            raise UsageError(
                "the result would be torch tensors, but torch is not installed",
                next='pip install "graftax[torch]", or sharding="host" for NumPy arrays.',
            ) from error
        from graftax.adapters import torch_arrays

        return OrderedDict((path, torch_arrays.to_torch(array, adopt=given(array))) for path, array in plain.items())
    leaves = {
        path: jax_arrays.own(array, given(array)) if host else jax_arrays.to_jax(array, adopt=given(array))
        for path, array in plain.items()
    }
    return with_lists(nest(leaves, end.real_keys), end.containers)


def with_lists(tree: dict[Key, Any], kinds: Mapping[str, str], prefix: str = "") -> Any:
    """Nested dicts with the lists and tuples that `kinds` names. A FrozenDict becomes a plain dict."""
    from graftax.tree import escape_part

    if not kinds:
        return tree
    children: dict[Key, Any] = {}
    for key, child in tree.items():
        path = f"{prefix}/{escape_part(key)}" if prefix else escape_part(key)
        children[key] = with_lists(child, kinds, path) if isinstance(child, dict) else child
    kind = kinds.get(prefix)
    if kind in {"list", "tuple"} and sorted(map(str, children)) == sorted(map(str, range(len(children)))):
        items = [children[key] for key in sorted(children, key=lambda key: int(str(key)))]
        return items if kind == "list" else tuple(items)
    return children
