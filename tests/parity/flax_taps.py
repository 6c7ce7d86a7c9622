"""Taps that the tests of the Flax runners listen with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftax.parity.records import Site


@dataclass
class Listener:
    """Keeps what it hears; `replaces` False: runs need not wait for an answer."""

    replaces: bool = False
    order: list[tuple[str, str]] = field(default_factory=list)
    inputs: dict[Site, Any] = field(default_factory=dict)
    outputs: dict[Site, Any] = field(default_factory=dict)

    def enter(self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.order.append(("in", str(site)))
        self.inputs[site] = (args, dict(kwargs))

    def leave(self, site: Site, output: Any) -> Any:
        self.order.append(("out", str(site)))
        self.outputs[site] = output


@dataclass
class Forcing:
    """Puts the inputs and outputs of a reference run in, and keeps what would have been there."""

    reference: Listener
    inputs: dict[Site, Any] = field(default_factory=dict)
    outputs: dict[Site, Any] = field(default_factory=dict)

    def enter(self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self.inputs[site] = (args, dict(kwargs))
        return self.reference.inputs[site]

    def leave(self, site: Site, output: Any) -> Any:
        self.outputs[site] = output
        return self.reference.outputs[site]


@dataclass
class Changing:
    """Puts `change(output)` in at every exit."""

    change: Callable[[Site, Any], Any]

    def enter(self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        return None

    def leave(self, site: Site, output: Any) -> Any:
        return self.change(site, output)


def same(one: Any, other: Any) -> bool:
    """Two Values, bit for bit."""
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def close(one: Any, other: Any, rtol: float = 1e-5) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[k], other[k], rtol) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(close(a, b, rtol) for a, b in zip(one, other, strict=True))
    return one is other or np.allclose(np.asarray(one), np.asarray(other), rtol=rtol, atol=1e-5)
