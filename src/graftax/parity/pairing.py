"""Which torch module is which Flax module, from the plan's entries."""

from __future__ import annotations

from dataclasses import dataclass

from graftax.plans import Entry


@dataclass(frozen=True, slots=True)
class Pair:
    """A torch module and the Flax module that does the same, by their paths ('' is the model itself).

    entries      the plan's entries that join their leaves
    leaf         no smaller pair lies inside: this is a layer and not a container
    step, steps  the Flax module holds `steps` torch modules stacked (a scan), and this one is number `step`: its call c
                 is the Flax module's call c * steps + step
    kinds        the two class names
    """

    torch: str
    flax: str
    entries: tuple[Entry, ...] = ()
    leaf: bool = True
    step: int = 0
    steps: int = 1
    kinds: tuple[str, str] = ("", "")

    def flax_call(self, torch_call: int) -> int:
        """The call of the Flax module that is this call of the torch module."""
        return torch_call * self.steps + self.step
