"""Settings that must agree between two live modules: parity names a difference as a cause before it computes
anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graftax.layers.base import Setting
from graftax.layers.connect import known_kind, rows_for
from graftax.tree import Module


@dataclass(frozen=True, slots=True)
class SettingDifference:
    """A setting whose Flax value differs from what torch's settings require."""

    setting: Setting
    want: Any
    have: Any

    def __str__(self) -> str:
        return f"{self.setting.flax} should be {self.want!r}, is {self.have!r}"


def settings_differ(torch: Module, flax: Module, layer: str | None = None) -> list[SettingDifference]:
    """The settings that differ between two paired modules, by the row that lists both kinds (or the row named `layer`).
    A setting that one side does not show is not a difference."""
    out: list[SettingDifference] = []
    kinds = known_kind(torch, "torch"), known_kind(flax, "flax")
    if not all(kinds):
        return out
    for row in rows_for(*kinds):
        if (layer is not None and row.name != layer) or not row.torch or not row.flax:
            continue
        for setting in row.settings:
            want, have = setting.want(torch.settings), setting.have(flax.settings)
            differs = abs(want - have) > 1e-12 if isinstance(want, float) and isinstance(have, float) else want != have
            if want is not None and have is not None and differs:
                out.append(SettingDifference(setting, want, have))
    return out
