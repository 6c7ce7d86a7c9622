"""The weights of a checkpoint: the parameters of a training state, without its optimizer, counters and random keys.

A reader returns a tree as it is stored, so that inspect, select and replace see all of it. A plan uses the result of
this module: the same leaves without those that `training_tree` identifies as training state, which are listed in
`left`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftax.errors import Failure, PlanError, escape
from graftax.tree import Checkpoint
from graftax.tree.parts import sub_checkpoint
from graftax.tree.training_tree import TrainingState, find_training_state


def weights_of(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without the training state beside its weights, which is listed in `left`. If one container
    (`model`) holds all of the weights, its name is removed from their paths; `params` stays, as in Linen's variables.

    The module types of a live module show what its weights are; the readers of .pt files have already decided it.
    Raises PlanError if several containers hold the weights (an average of them counts too), or if a part has the name
    of an optimizer's state but its structure does not confirm it: then the user must name the container.
    """
    if checkpoint.chosen or checkpoint.live.modules or checkpoint.side == "torch":
        return checkpoint
    found = find_training_state(checkpoint.specs)
    if found.copies:
        raise _several(checkpoint, found)
    if found.doubtful:
        raise _doubtful(checkpoint, found)
    if not found.left:
        return checkpoint
    return _inside(_without(checkpoint, found), found, checkpoint)


def _without(whole: Checkpoint, found: TrainingState) -> Checkpoint:
    specs = {path: spec for path, spec in whole.specs.items() if not found.leaves_out(path)}
    aliases = {path: to for path, to in whole.storage.aliases.items() if path in specs and to in specs}
    return replace(
        whole,
        specs=specs,
        storage=replace(whole.storage, aliases=aliases),
        live=replace(whole.live, buffers=frozenset(path for path in whole.live.buffers if path in specs)),
        real_keys={path: key for path, key in whole.real_keys.items() if not found.leaves_out(path)},
        containers={path: kind for path, kind in whole.containers.items() if not found.leaves_out(path)},
        left={**whole.left, **found.left},
        chosen=True,
    )


def _inside(weights: Checkpoint, found: TrainingState, whole: Checkpoint) -> Checkpoint:
    """The weights below the container that holds all of them."""
    if not found.prefix:
        return weights
    return replace(sub_checkpoint(weights, found.prefix), label=whole.label, left=weights.left, chosen=True)


# ---------------------------------------------------------------- questions to the user


def _named(checkpoint: Checkpoint, path: str) -> str:
    """How the user names this part of the checkpoint."""
    if checkpoint.storage.format == "live":
        return "".join(f'["{escape(part)}"]' for part in path.split("/"))
    return f"{escape(checkpoint.label)}::{escape(path)}"


def _several(checkpoint: Checkpoint, found: TrainingState) -> PlanError:
    names = [_named(checkpoint, path) for path in found.copies]
    live = checkpoint.storage.format == "live"
    return PlanError(
        f"{escape(checkpoint.label)} holds weights in {len(names)} containers",
        [
            Failure(_leaves(checkpoint, path), file="" if live else checkpoint.label, key=name)
            for path, name in zip(found.copies, names, strict=True)
        ],
        next=f"Pass one of them, for example tree{names[0]}."
        if live
        else f"Choose one with PATH::NAME, for example {names[0]}; PATH::. takes everything.",
    )


def _doubtful(checkpoint: Checkpoint, found: TrainingState) -> PlanError:
    tops = list(dict.fromkeys(path.partition("/")[0] for path in checkpoint if not _within(path, found.doubtful)))
    tops = [top for top in tops if top not in checkpoint and top not in found.left]
    names = [_named(checkpoint, top) for top in tops[:3]] or ["the container of the weights"]
    live = checkpoint.storage.format == "live"
    return PlanError(
        f"{escape(checkpoint.label)} may hold an optimizer's state beside its weights, but its structure does not "
        "confirm it",
        [
            Failure(
                f"{len(odd)} leaves match no weight, for example {escape(odd[0])}"
                if odd
                else "a copy of the weights without a step counter: optimizer moments or another network",
                key=path,
            )
            for path, odd in found.doubtful.items()
        ],
        next=f"Pass the weights alone: {' or '.join(f'tree{name}' for name in names)}. "
        'If everything in it is weights: {"params": tree}.'
        if live
        else f"Name the weights: {' or '.join(names)}; if everything in it is weights: {escape(checkpoint.label)}::.",
    )


def _within(path: str, parts: Mapping[str, Any]) -> bool:
    return any(path.startswith(f"{part}/") for part in parts)


def _leaves(checkpoint: Checkpoint, path: str) -> str:
    return f"{sum(name.startswith(f'{path}/') for name in checkpoint)} leaves"
