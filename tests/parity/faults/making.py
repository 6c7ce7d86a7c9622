"""How the tables of faults are written: a Making collects the faults of one model and API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..zoo import KINDS
from ..zoo.base import Edit, initial
from . import base
from .base import Fault


@dataclass(slots=True)
class Making:
    """paths: role -> Flax path, with {i} for the block. Kernels are found from it: `leaf`."""

    model: str
    api: str
    paths: Mapping[str, str]
    faults: list[Fault] = field(default_factory=list[Fault])

    @property
    def settings(self) -> Any:
        return KINDS[self.model].settings

    def path(self, role: str, i: int | None = None) -> str:
        return self.paths[role].format(i=i)

    def leaf(self, role: str, name: str = "kernel", i: int | None = None, collection: str = "params") -> str:
        return (f"{collection}/" if self.api == "linen" else "") + f"{self.path(role, i)}/{name}"

    def wrong(self, kind: str, text: str, layers: Sequence[str], wrong: Any, right: Any = None, **more: Any) -> None:
        """A fault of settings."""
        right = self.settings if right is None else right
        self.faults.append(Fault(kind, self.model, self.api, text, tuple(layers), right, wrong, **more))

    def edited(self, kind: str, text: str, layers: Sequence[str], edit: Edit, right: Any = None, **more: Any) -> None:
        """A fault of the weights."""
        right = self.settings if right is None else right
        self.faults.append(Fault(kind, self.model, self.api, text, tuple(layers), right, right, edit, **more))

    def kernel(self, kind: str, role: str, change: Any, i: int | None = None, **more: Any) -> None:
        """A fault of one kernel, named first at its own layer."""
        where = more.pop("layers", None) or [self.path(role, i)]
        name = more.pop("name", "kernel")
        text = f"{self.path(role, i)}/{name}" + more.pop("text", "")
        self.edited(kind, text, where, base.at(self.leaf(role, name, i), change), **more)

    def swap(self, first: str, second: str, layers: Sequence[str] | None = None, **more: Any) -> None:
        """Two modules of equal shapes have each other's weights. `first` is called before `second`."""
        prefix = "params/" if self.api == "linen" else ""
        edit = base.swapped(f"{prefix}{first}/", f"{prefix}{second}/")
        self.edited("swapped layers", f"{first} and {second}", layers or [first], edit, **more)

    def initial(self, role: str, name: str, i: int | None = None, **more: Any) -> None:
        """A leaf that no torch tensor was written to."""
        where = more.pop("layers", None) or [self.path(role, i)]
        path = self.leaf(role, name, i, more.pop("collection", "params"))
        edit = base.at(path, lambda old: initial(path, old.shape))
        self.edited("initial value", path, where, edit, **more)

    def blocks(self, kind: str, layers: Callable[[int], Sequence[str]], over: Sequence[int], **changes: Any) -> None:
        """The same wrong settings in one block at a time, and in all."""
        also = changes.pop("also", ())
        loud = changes.pop("loud", False)
        right = changes.pop("right", self.settings)
        beside = changes.pop("text", "")
        said = ", ".join(f"{name}={value}" for name, value in changes.items())
        for i in over:
            text = f"{said} in block {i}{beside}"
            self.wrong(kind, text, layers(i), right.but_block(i, **changes), right, also=also, loud=loud)
