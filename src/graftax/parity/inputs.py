"""The inputs of a parity check: the same for both sides, or different ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The calls of the two models, if one array for both is not enough.

        gx.Inputs(torch=((ids,), {"attention_mask": mask}), flax=((ids, mask), {}))

    torch, flax   (args, kwargs), or args alone; None: the other side's, converted
    torch_call    function (module, *args, **kwargs) -> outputs: picks outputs or calls another method
    flax_call     the same for the Flax side; `module` is a bound Linen module or an nnx.Module
    """

    torch: Any = None
    flax: Any = None
    torch_call: Callable[..., Any] | None = None
    flax_call: Callable[..., Any] | None = None

    def side(self, name: str) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """(args, kwargs) of a side, or None where it is not given."""
        given = self.torch if name == "torch" else self.flax
        return None if given is None else call_of(given)


def call_of(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) from the form a user writes: (args, {kw}), a tuple or list of args, {kw}, or one array."""
    if (
        isinstance(given, tuple)
        and len(given) == 2
        and isinstance(given[0], (tuple, list))
        and isinstance(given[1], Mapping)
        and all(isinstance(name, str) for name in given[1])
    ):
        return tuple(given[0]), dict(given[1])
    if isinstance(given, (tuple, list)):
        return tuple(given), {}
    if isinstance(given, Mapping):
        return (), {str(name): value for name, value in given.items()}
    return (given,), {}
