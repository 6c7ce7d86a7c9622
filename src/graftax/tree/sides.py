"""Decide the side, torch or Flax: a declaration of the checkpoint counts first; without one, all names are judged
together.

A checkpoint declares its side by its kind (a .pt file, a msgpack or Orbax tree, a live module, torch tensors), or by
the metadata of a safetensors file. Names give an assumption at best. '/' between parts is how Flax trees are flattened,
'.' is how torch writes keys; `kernel` and `embedding` are Flax leaves, `weight` is a torch leaf. If these signs
disagree, or '.' is the only sign, nothing is decided, and the user must name the side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from graftax.errors import counted
from graftax.tree import Checkpoint, Side, SideBy, escape_part
from graftax.tree.renaming import Renaming

OTHER: dict[Side, Side] = {"torch": "flax", "flax": "torch"}
FLAX_LEAVES = frozenset({"kernel", "embedding"})
_FLAX_TOO = frozenset({"scale", "bias", "mean", "var"})
"""Leaf names of Flax's own modules that torch code uses as well: RMSNorm's `scale`."""
_TORCH = re.compile(
    r"weight(?:_(?:g|v|orig|u|[ih]h_l[0-9]+\w*|hr_l[0-9]+\w*))?|[qkv]_proj_weight|in_proj_(?:weight|bias)"
    r"|running_(?:mean|var)|num_batches_tracked|bias_[ih]h_l[0-9]+\w*"
)
_TORCH_ALONE = re.compile(
    r"in_proj_(?:weight|bias)|running_(?:mean|var)|num_batches_tracked|(?:weight|bias)_[ih]h_l[0-9]+\w*"
)
"""Leaf names that no Flax module uses."""


@dataclass(frozen=True, slots=True)
class Signs:
    """Counts of the signs in the names: names whose last separator is '/' or '.', and modules (the text before that
    separator) that have a leaf with a name of Flax only, of Flax and others, or of torch."""

    slashed: int
    dotted: int
    modules: int
    flax: int
    scale: int
    torch: int
    torch_alone: int
    bare_flax: bool

    @classmethod
    def of(cls, names: Iterable[str]) -> Signs:
        slashed = dotted = 0
        leaves: dict[str, list[str]] = {}
        for name in names:
            at = max(name.rfind("/"), name.rfind("."))
            if at >= 0:
                slashed += name[at] == "/"
                dotted += name[at] == "."
            leaves.setdefault(name[: at + 1], []).append(name[at + 1 :])
        flax = scale = torch = alone = 0
        for found in leaves.values():
            told = any(leaf in FLAX_LEAVES for leaf in found)
            flax += told
            torch += any(_TORCH.fullmatch(leaf) is not None for leaf in found)
            alone += any(_TORCH_ALONE.fullmatch(leaf) is not None for leaf in found)
            scale += "scale" in found and not told
        own = {leaf for found in leaves.values() for leaf in found}
        bare_flax = own <= FLAX_LEAVES | _FLAX_TOO and not {"scale", *FLAX_LEAVES}.isdisjoint(own)
        return cls(slashed, dotted, len(leaves), flax, scale, torch, alone, bare_flax)

    @property
    def side(self) -> Side | None:
        """The side that all names together show; None if they show none or disagree."""
        if self.slashed and self.dotted:
            return None
        if self.slashed:
            return "flax" if self.torch <= self.flax else None
        if self.dotted:  # '.' alone decides nothing: flatten_dict(params, sep=".") writes it too
            return "torch" if self.torch and self.torch >= 2 * self.flax else None
        return "flax" if self.bare_flax else None

    @property
    def silent(self) -> bool:
        """True if the names show nothing for either side."""
        return not (self.slashed or self.dotted or self.flax or self.scale or self.torch)

    def contradicts(self, side: Side) -> bool:
        """True if the names contradict `side` so clearly that a declaration of it must be a mistake."""
        if side == "torch":
            return bool(self.slashed and not self.dotted and self.flax > self.torch)
        return bool(self.dotted and not self.slashed and self.torch_alone and not self.flax)

    def allows(self, side: Side) -> bool:
        """True if these names, of jax arrays or of a part, may belong to `side` when something else says so. False if
        more leaves have names of the other side. With '.', which torch writes, Flax leaf names must be the clear
        majority."""
        if side == "torch":
            return not self.flax or self.torch >= 2 * self.flax
        if self.torch_alone or self.torch > self.flax:
            return False
        return self.slashed > 0 or not self.dotted or self.flax >= max(1, 2 * self.torch)

    @property
    def text(self) -> str:
        """What the names show, for a message."""
        seps = [f"{counted(n, 'name')} with '{sep}'" for sep, n in (("/", self.slashed), (".", self.dotted)) if n]
        kinds = (("a kernel or embedding", self.flax), ("a scale", self.scale), ("a weight or the like", self.torch))
        modules = [f"{counted(n, 'module')} with {what}" for what, n in kinds if n]
        return ", ".join([*(seps or ["no name with '/' or '.'"]), *modules])


def side_of_names(names: Iterable[str]) -> Side | None:
    """The side that all names together show; None if they show none or disagree."""
    return Signs.of(names).side


def side_of_part(whole: Side | None, names: Iterable[str]) -> Side | None:
    """The side that the names of a part show. If they only allow the side of the whole (`weight` and `bias`, without a
    separator), it is the side of the whole."""
    signs = Signs.of(names)
    return signs.side or (whole if whole is not None and signs.allows(whole) else None)


def separator_of(names: Iterable[str]) -> Side:
    """The side whose separator the names use: selectors read them this way if the side itself is unknown."""
    signs = Signs.of(names)
    return "torch" if signs.dotted and not signs.slashed else "flax"


def settled(declared: Side | None, names: Iterable[str]) -> tuple[Side | None, SideBy]:
    """(side, what decided it), from the side that metadata declare (or None) and all names. No side if the names flatly
    contradict the metadata: one of the two is a mistake."""
    signs = Signs.of(names)
    if declared is None:
        return signs.side, "names"
    return (None if signs.contradicts(declared) else declared), "metadata"


def declared_by(checkpoint: Checkpoint) -> Side | None:
    """The side that a checkpoint's metadata declare, whatever its names show."""
    return (
        SIDE_OF_FORMAT.get(checkpoint.storage.metadata.get("format", "")) if checkpoint.side_by == "metadata" else None
    )


SIDE_OF_FORMAT: dict[str, Side] = {"pt": "torch", "flax": "flax"}
"""`format` in the metadata of safetensors. np, tf, mlx and others declare no side."""


# ---------------------------------------------------------------- the names in a checkpoint


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The leaves that `names` lists (new name -> old name), under their new names."""
    renaming = Renaming.by(names)
    return replace(
        checkpoint,
        specs={new: checkpoint.specs[old] for new, old in names.items()},
        storage=checkpoint.storage.renamed(renaming),
        live=checkpoint.live.renamed(renaming),
    )


def split_at_dots(checkpoint: Checkpoint) -> Checkpoint:
    """A Flax tree whose names are joined by '.', as transformers writes them, with '/'-paths instead."""
    if not all("/" not in name for name in checkpoint) or not any("." in name for name in checkpoint):
        return checkpoint
    names = {"/".join(map(escape_part, name.split("."))): name for name in checkpoint}
    split = renamed(checkpoint, names)
    return replace(split, storage=replace(split.storage, stored=names))


def in_own_names(checkpoint: Checkpoint) -> Checkpoint:
    """A file's names as its side writes them: names that the metadata declare as Flax are split at their dots."""
    return split_at_dots(checkpoint) if checkpoint.side == "flax" and checkpoint.side_by == "metadata" else checkpoint


def read_as(checkpoint: Checkpoint, side: Side | None) -> Checkpoint:
    """The checkpoint as one of `side`, unless it declares its own side. Names that are clearly Flax's stay as they
    are."""
    if side is None or (checkpoint.side is not None and checkpoint.side_by != "names"):
        return checkpoint
    if checkpoint.side is not None and side == "torch" and Signs.of(checkpoint).contradicts(side):
        return checkpoint
    stated = replace(checkpoint, side=side, side_by="stated")
    return split_at_dots(stated) if side == "flax" else stated
