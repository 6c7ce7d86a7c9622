"""Checkpoint formats: a module each, one table. Opening tells what a thing is by its content; saving is atomic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftax.formats.base import Output
from graftax.formats.opening import open_path
from graftax.formats.table import FORMATS

if TYPE_CHECKING:
    from graftax.formats.saving import save

__all__ = ["FORMATS", "Output", "open_path", "save"]


def __getattr__(name: str) -> Any:
    """`save` when it is first asked for: inspecting a header needs none of what it imports."""
    if name == "save":
        from graftax.formats.saving import save

        return save
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
