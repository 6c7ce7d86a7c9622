"""A part of a checkpoint: the leaves below a name, as a checkpoint of their own."""

from __future__ import annotations

import re
from dataclasses import replace

from graftax.errors import PlanError, escape, option
from graftax.tree.checkpoint import Checkpoint
from graftax.tree.renaming import Renaming
from graftax.tree.selectors import nearest
from graftax.tree.sides import side_of_part
from graftax.tree.specs import Side


def sub_checkpoint(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The leaves below `name` ('model', 'items/params', 'state_dict.encoder'), which is stripped from their paths.

    '.' is all of it, training state and all. Raises PlanError where nothing is below `name`.
    """
    if name == ".":
        return replace(checkpoint, left={}, chosen=True)
    prefix = next((p for p in _prefixes(name, checkpoint.side) if any(path.startswith(p) for path in checkpoint)), "")
    if not prefix:
        raise _no_such_part(checkpoint, name)
    names = Renaming.below(prefix)
    specs = names.leaves(checkpoint.specs)
    return Checkpoint(
        label=f"{checkpoint.label}::{name}",
        side=side_of_part(checkpoint.side, specs) if checkpoint.side_by == "names" else checkpoint.side,
        side_by=checkpoint.side_by,
        specs=specs,
        storage=checkpoint.storage.below(prefix),
        live=checkpoint.live.below(prefix),
        config=checkpoint.config,
        real_keys=names.leaves(checkpoint.real_keys),
        containers=names.nodes(checkpoint.containers),
    )


def _prefixes(name: str, side: Side | None) -> list[str]:
    """How `name` can stand before a path: as it is, or with '.' and '/' for each other. The side's own separator comes
    first."""
    name = name.rstrip("/.")
    if not name:
        return []
    forms = [(name, re.sub("[./]", sep, name), sep) for sep in ("./" if side == "torch" else "/.")]
    return [f"{form}{sep}" for *written, sep in forms for form in dict.fromkeys(written)]


def _no_such_part(checkpoint: Checkpoint, name: str) -> PlanError:
    label = escape(checkpoint.label)
    if name in checkpoint:
        return PlanError(
            f"{label}::{escape(name)} is one tensor, expected a container or sub-tree",
            next=f"Name a tensor with {option('key')}.",
        )
    sep = "." if checkpoint.side == "torch" else "/"
    tops = [top for top in dict.fromkeys(path.partition(sep)[0] for path in checkpoint) if top not in checkpoint]
    near = nearest(name, tops) or ", ".join(escape(top) for top in tops[:10])
    return PlanError(f"{label} has nothing below {escape(name)!r}", next=f"It has: {near}" if near else "")
