"""Open whatever names or holds weights: a path, a hub id, `pkg.mod:factory`, a live object."""

from __future__ import annotations

import os
from typing import Any

from graftax.adapters import open_live
from graftax.execute.factories import call_factory, is_factory, made_by
from graftax.tree import Checkpoint, Side
from graftax.tree.sides import read_as
from graftax.tree.weights import weights_of

__all__ = ["call_factory", "is_factory", "open_text", "open_tree", "open_weights"]


def open_tree(obj: Any, label: str | None = None, side: Side | None = None) -> Checkpoint:
    """The Checkpoint of anything that the library takes as a source or a like. It computes nothing and reads no values.
    `side` applies only if `obj` does not declare its own side.

    Raises UsageError for an unsupported object; for a path, also the errors of reading it.
    """
    if isinstance(obj, Checkpoint):
        return read_as(obj, side)
    if isinstance(obj, (str, os.PathLike)):
        return read_as(open_text(os.fspath(obj), side), side)  # pyright: ignore
    return open_live(obj, label, side)


def open_weights(obj: Any, side: Side | None = None) -> Checkpoint:
    """As `open_tree`, without the training state that stands beside the weights. PlanError if it is unclear what is
    training state."""
    return weights_of(open_tree(obj, side=side))


def open_text(text: str, side: Side | None = None) -> Checkpoint:
    """The checkpoint that `text` names: an existing path, `pkg.mod:factory`, or anything that `formats.open_path`
    finds.

    Raises UsageError (exit code 2) if a factory cannot be imported, GraftaxError (70) if the factory itself fails.
    """
    if is_factory(text):
        return made_by(text, side)
    from graftax.formats import open_path

    return open_path(text)
