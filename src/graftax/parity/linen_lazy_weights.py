"""Fill the leaves of bound Linen modules for the time of a call (see `lazy_weights`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flax import linen as nn

from graftax.adapters import containers
from graftax.parity.lazy_weights import Keys, LazyLeaves


@dataclass(slots=True, eq=False)
class _FilledScope:
    """The arrays that were put into one bound module's scope, and what the scope held before."""

    module: nn.Module
    arrays: dict[Keys, Any]
    before: dict[str, Any]
    depth: int = 0


@dataclass(slots=True, eq=False)
class ScopeFiller:
    """Puts values into the scope of a bound module when one of its methods begins, and takes them out when it ends.

    `_held`: the attributes to which setup() assigned such an array. They are emptied and filled together with the
    scope.
    """

    lazy: LazyLeaves
    _filled: dict[int, _FilledScope] = field(default_factory=dict[int, _FilledScope])
    _held: dict[int, tuple[nn.Module, dict[str, Keys]]] = field(default_factory=dict[int, Any])

    @contextlib.contextmanager
    def fill(self, module: nn.Module, path: str, method: str) -> Iterator[None]:
        if path not in self.lazy.owned or not self._is_there(module, path):
            yield
            return
        filled = self._filled.get(id(module))
        if filled is None:
            filled = self._filled[id(module)] = self._open(module, path)
        filled.depth += 1
        try:
            yield
        finally:
            filled.depth -= 1
            if not filled.depth and method != "setup":  # after setup the method itself follows
                self._close(filled, path)

    def _is_there(self, module: nn.Module, path: str) -> bool:
        """Does the module's scope hold the leaves? Flax also tries setup() on an empty scope."""
        scope: Any = module.scope
        return {keys[0] for keys in self.lazy.owned[path]} <= scope.variables().keys()

    def _open(self, module: nn.Module, path: str) -> _FilledScope:
        scope: Any = module.scope
        arrays = self.lazy.values(path)
        collections = scope.variables()
        depth = len(scope.path)
        before = dict(collections)
        for name in {keys[0] for keys in arrays}:
            inside = {containers.path_of(k[1 + depth :]): array for k, array in arrays.items() if k[0] == name}
            collections[name] = containers.remade(
                collections[name], lambda path, leaf, inside=inside: inside.get(path, leaf)
            )
        for name, keys in self._held.get(id(module), (module, {}))[1].items():
            object.__setattr__(module, name, arrays[keys])
        return _FilledScope(module, arrays, before)

    def _close(self, filled: _FilledScope, path: str) -> None:
        module: Any = filled.module
        collections = module.scope.variables()
        collections.update({name: filled.before[name] for name in {keys[0] for keys in filled.arrays}})
        by_id = {id(array): keys for keys, array in filled.arrays.items()}
        for name, value in list(vars(module).items()):
            keys = by_id.get(id(value))
            if keys is not None:
                self._held.setdefault(id(module), (module, {}))[1][name] = keys
                object.__setattr__(module, name, self.lazy.owned[path][keys])
        del self._filled[id(module)]
