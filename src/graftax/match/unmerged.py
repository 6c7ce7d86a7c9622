"""Weights that the file holds unmerged: parametrised, pruned or adapted ones.

Some function makes the weight from `parametrizations.weight.original`, and the file does not hold that function. A
weight beside low-rank adapters lacks what was trained. Both would have the right shape and wrong values if they were
ported as they are, so they are refused by name, unless the other end keeps them unmerged too, or rules or the layer
table settle them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass

from graftax.errors import Failure, PlanError, escape
from graftax.tree import Checkpoint


@dataclass(frozen=True, slots=True)
class Unmerged:
    """Leaves with a part of the path (or its end) that fits `pattern`. `beside`: only if a leaf with this last part
    exists too; `marks`: the path holds one of these texts."""

    name: str
    pattern: re.Pattern[str]
    next: str
    marks: tuple[str, ...]
    beside: str = ""


_ADAPTER = "Merge the adapter into the weights before saving (peft: merge_and_unload()), or write a rule for each leaf."
SCHEMES = (
    Unmerged(
        "a parametrised weight",
        re.compile(r"(?:^|[./])parametrizations[./][^./]+[./]original$"),
        "Make the weights plain before saving (torch.nn.utils.parametrize.remove_parametrizations with "
        "leave_parametrized=True), or write a rule for each leaf.",
        ("parametrizations",),
    ),
    Unmerged(
        "a pruned weight",
        re.compile(r"(?:^|[./])[^./]+_mask$"),
        "Make the pruning permanent before saving (torch.nn.utils.prune.remove), or write a rule for each leaf.",
        ("_mask",),
        beside="_orig",
    ),
    Unmerged(
        "a spectrally normed weight",
        re.compile(r"(?:^|[./])[^./]+_u$"),
        "Make the weights plain before saving (torch.nn.utils.remove_spectral_norm), wrap the Flax layer in "
        "SpectralNorm under the same name, or write a rule for each leaf.",
        ("_u",),
        beside="_orig",
    ),
    Unmerged(
        "a low-rank adapter",
        re.compile(r"(?:^|[./])(?:lora_(?:embedding_)?[abAB]|lora_(?:down|up)|lora[./](?:down|up)|lora_magnitude_vector)"
                   r"(?:[./]|$)"),
        _ADAPTER,
        ("lora",),
    ),
    Unmerged(
        "an adapter",
        re.compile(r"(?:^|[./])(?:ia3_l|oft_[rsR]|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|vera_lambda_[bd])(?:[./]|$)"),
        _ADAPTER,
        ("ia3_", "oft_", "hada_", "lokr_", "vera_"),
    ),
)  # fmt: skip
"""The names that torch.nn.utils.parametrize, torch.nn.utils.prune, peft and flax.nnx.LoRA write."""


def refuse_unmerged(source: Checkpoint, like: Checkpoint, settled: Iterable[str]) -> None:
    """PlanError that names every leaf of an end that is one part of a weight, if the other end holds fewer of them.

    `settled`: the leaves of either end that rules or the layer table have settled.
    """
    known = set(settled)
    failures: list[Failure] = []
    hints: dict[str, None] = {}
    text = "\n".join((*source, *like))
    for scheme in SCHEMES:
        if not any(mark in text for mark in scheme.marks):
            continue
        ends = [(end, _leaves(end, scheme)) for end in (source, like)]
        if len(ends[0][1]) == len(ends[1][1]):
            continue
        for end, found in ends:
            if (left := [name for name in found if name not in known]) and len(found) == max(len(f) for _, f in ends):
                failures += [Failure(scheme.name, end.label, name, found=str(end[name])) for name in left]
                hints[scheme.next] = None
    if failures:
        labels = dict.fromkeys(escape(failure.file) for failure in failures)
        raise PlanError(f"{', '.join(labels)} holds weights in parts:", failures, next=" ".join(hints))


def _leaves(end: Checkpoint, scheme: Unmerged) -> list[str]:
    return [name for name in end if scheme.pattern.search(name) and _beside(name, scheme.beside, end.specs.keys())]


def _beside(name: str, ending: str, names: Set[str]) -> bool:
    return not ending or name.rpartition("_")[0] + ending in names


_NORMED = (("_g", "_v"), ("_u", "_orig"), (".original0", ".original1"), (".0._u", ".original"))
"""The ends of the names of a factor of a normed weight, and of the weight."""


def normed_parts(end: Checkpoint) -> set[str]:
    """The leaves of torch that make a weight together with others of their module: the g and v of weight norm, the
    weight, u and v of spectral norm. One alone is no weight."""
    out: set[str] = set()
    for name in end:
        for factor, whole in _NORMED:
            stem = name.removesuffix(factor)
            if stem != name and stem + whole in end and _is_factor(end[name].shape, end[stem + whole].shape):
                out |= {stem + other for other in (factor, whole, factor.replace("_u", "_v")) if stem + other in end}
    return out


def _is_factor(factor: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """True if the first shape is that of norms or of a singular vector: one axis, of a matrix or more. `w_g` beside
    `w_v` may as well be two matrices, a gate and a value."""
    return len(whole) > 1 and sum(size > 1 for size in factor) < 2
