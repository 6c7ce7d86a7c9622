"""Open whatever names or holds weights: a path, a hub id, `pkg.mod:factory`, a live object."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from graftax.adapters import leaf_reader, live_leaves, open_live, optimizer_paths, spec_of_leaf
from graftax.execute.factories import call_factory, is_factory, made_by
from graftax.tree import Checkpoint, Side
from graftax.tree.sides import read_as
from graftax.tree.weights import weights_of

__all__ = ["call_factory", "is_factory", "open_all", "open_text", "open_tree", "open_weights"]


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


def open_all(obj: Any, label: str | None = None, side: Side | None = None) -> Checkpoint:
    """As `open_tree`, with the optimizer state of a live tree among its leaves, as it is among those of a file."""
    opened = open_tree(obj, label, side)
    native = opened.live.object
    if native is None or not optimizer_paths(native):
        return opened
    leaves = live_leaves(native)
    metadata = opened.storage.metadata
    listed = {path[:i] for path in leaves for i in (len(path), *(i for i, char in enumerate(path) if char == "/"))}
    aside = {**{name: metadata[name] for name in metadata if name in listed}, **opened.left}
    return replace(
        opened,
        specs={path: spec_of_leaf(leaf) for path, leaf in leaves.items()},
        storage=replace(
            opened.storage,
            reader=leaf_reader(leaves),
            metadata={name: metadata[name] for name in metadata if name not in listed},
        ),
        left=aside if opened.specs else {},
    )


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
