"""New paths for the leaves of a checkpoint: what is known under the old paths, under the new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Renaming:
    """New paths for some leaves; the others are left out.

    new   old path -> new path, or None: the leaf is left out
    old   new path -> old path
    root  the old path of the module or container that becomes the root, where one does
    """

    new: Callable[[str], str | None]
    old: Callable[[str], str]
    root: str | None = None

    @classmethod
    def below(cls, prefix: str) -> Renaming:
        """The leaves whose paths start with `prefix` ('model.', 'items/params/'), without it."""
        cut = len(prefix)
        return cls(
            lambda path: path[cut:] if path.startswith(prefix) else None, lambda path: prefix + path, prefix[:-1]
        )

    @classmethod
    def by(cls, names: Mapping[str, str]) -> Renaming:
        """The leaves that `names` lists, new path -> old path."""
        return cls({old: new for new, old in names.items()}.get, names.__getitem__)

    def paths(self, paths: Iterable[str]) -> frozenset[str]:
        """The new paths of those that are kept."""
        return frozenset(new for path in paths if (new := self.new(path)) is not None)

    def leaves(self, mapping: Mapping[str, Value]) -> dict[str, Value]:
        """A mapping from leaves, of those that are kept."""
        return {new: value for path, value in mapping.items() if (new := self.new(path)) is not None}

    def nodes(self, mapping: Mapping[str, Value]) -> dict[str, Value]:
        """A mapping from modules or containers, of those that are kept; the root's path is ''."""
        top = {} if self.root is None or self.root not in mapping else {"": mapping[self.root]}
        return top | self.leaves(mapping)
