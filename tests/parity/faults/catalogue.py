"""CATALOGUE(seed): which faults are injected. From every table a sample by seed, so many of a kind and model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from .base import Fault
from .making import Making
from .tables_attention import decoder, encoder, vit
from .tables_plain import cnn, mlp, tagger

TABLES: dict[str, Callable[[str], Making]] = {
    "mlp": mlp, "cnn": cnn, "encoder": encoder, "vit": vit, "decoder": decoder, "tagger": tagger,
}  # fmt: skip
HELD_OUT = (("tagger", "linen"), ("tagger", "nnx"), ("decoder", "nnx"))
"""Kept out of the development of the tracer and of the cause finder; reported apart."""
PER_KIND = 2
"""So many faults of one kind from one model and API, if the table has them; kinds that few models have get more."""
LEAST = 8


def all_faults() -> list[Fault]:
    """Every fault of the tables, each once; the seed is still 0."""
    found = [fault for table in TABLES.values() for api in ("linen", "nnx") for fault in table(api).faults]
    names = Counter((f.kind, f.model, f.api, f.text) for f in found)
    unique: dict[tuple[str, ...], Fault] = {}
    for fault in found:
        text = (
            fault.text if names[fault.kind, fault.model, fault.api, fault.text] == 1 else f"{fault.text}, {said(fault)}"
        )
        unique[fault.kind, fault.model, fault.api, text] = replace(fault, text=text)
    return list(unique.values())


def said(fault: Fault) -> str:
    """How the torch side of a fault differs from its model's defaults."""
    plain = type(fault.right)()
    changed = [n for n in plain.__dataclass_fields__ if n != "odd" and getattr(plain, n) != getattr(fault.right, n)]
    return " ".join(f"{name}={getattr(fault.right, name)}" for name in changed) or "default"


def catalogue(seed: int = 0, per_kind: int = PER_KIND) -> list[Fault]:
    """A sample by seed, in the tables' order: `per_kind` of a kind, model and API, more where a kind would have fewer
    than LEAST; every fault gets weights and inputs of its own."""
    rng = random.Random(seed)
    groups: dict[tuple[str, str, str], list[Fault]] = {}
    pool = all_faults()
    for fault in pool:
        groups.setdefault((fault.kind, fault.model, fault.api), []).append(fault)
    for group in groups.values():
        rng.shuffle(group)
    chosen = {key: group[:per_kind] for key, group in groups.items()}
    for kind in dict.fromkeys(fault.kind for fault in pool):
        mine = [key for key in groups if key[0] == kind]
        while sum(len(chosen[key]) for key in mine) < LEAST and any(len(groups[k]) > len(chosen[k]) for k in mine):
            for key in mine:
                chosen[key] = groups[key][: len(chosen[key]) + 1]
    order = {id(fault): place for place, fault in enumerate(pool)}
    picked = sorted((fault for group in chosen.values() for fault in group), key=lambda f: order[id(f)])
    return [replace(fault, seed=weights_seed(seed, place)) for place, fault in enumerate(picked)]


def weights_seed(seed: int, place: int) -> int:
    """Three sets of weights in turn: what is shared between faults is made once."""
    return 100 * seed + place % 3


def kinds(faults: Sequence[Fault]) -> dict[str, int]:
    return dict(Counter(fault.kind for fault in faults))
