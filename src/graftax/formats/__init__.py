"""Checkpoint formats: a module each, one table. Opening tells what a thing is by its content; saving is atomic."""

from __future__ import annotations

from graftax.formats.opening import open_path, sub_checkpoint
from graftax.formats.table import FORMATS

__all__ = ["FORMATS", "open_path", "sub_checkpoint"]
