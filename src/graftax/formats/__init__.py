"""Checkpoint formats: one module for each, and one table. Opening recognises a format by content; saving is atomic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftax.formats.base import Output
from graftax.formats.opening import open_path
from graftax.formats.table import FORMATS

if TYPE_CHECKING:
    from graftax.formats.saving import save

__all__ = ["FORMATS", "Output", "open_path", "save"]


def __getattr__(name: str) -> Any:
    """Import `save` on first use: inspecting a header needs none of its imports."""
    if name == "save":
        from graftax.formats.saving import save

        return save
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
