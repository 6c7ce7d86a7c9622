"""A part of a checkpoint: the leaves below a name, as a checkpoint of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftax.errors import PlanError, escape, option
from graftax.tree.checkpoint import Checkpoint
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
    cut = len(prefix)

    def within(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return {path[cut:]: value for path, value in mapping.items() if path.startswith(prefix)}

    specs = within(checkpoint.specs)
    reader, span, scatter = checkpoint.reader, checkpoint.span, checkpoint.scatter
    containers = within(checkpoint.containers)
    if (root := checkpoint.containers.get(prefix[:-1])) is not None:
        containers[""] = root
    aliases = {path: to[cut:] for path, to in within(checkpoint.aliases).items() if to.startswith(prefix)}
    return Checkpoint(
        label=f"{checkpoint.label}::{name}",
        side=side_of_part(checkpoint.side, specs) if checkpoint.side_by == "names" else checkpoint.side,
        side_by=checkpoint.side_by,
        specs=specs,
        reader=None if reader is None else lambda path: reader(prefix + path),
        span=None if span is None else lambda path, start, buffer: span(prefix + path, start, buffer),
        scatter=None if scatter is None else lambda path, start, buffers: scatter(prefix + path, start, buffers),
        whole=frozenset(path[cut:] for path in checkpoint.whole if path.startswith(prefix)),
        format=checkpoint.format,
        files=checkpoint.files,
        metadata=checkpoint.metadata,
        modules={
            path: replace(module, path=path, leaves={role: leaf[cut:] for role, leaf in module.leaves.items()})
            for path, module in within(checkpoint.modules).items()
        },
        aliases=aliases,
        buffers=frozenset(path[cut:] for path in checkpoint.buffers if path.startswith(prefix)),
        config=checkpoint.config,
        real_keys=within(checkpoint.real_keys),
        containers=containers,
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
