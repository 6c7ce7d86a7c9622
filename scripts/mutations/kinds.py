"""The kinds of mutation: what is done to a case."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from mutations import renaming as names
from mutations.cases import Arrays, Case

Change = Callable[[Arrays, str], "Arrays | None"]
Kind = Callable[[Case, random.Random], "Case | None"]


def _rename(case: Case, sides: str, change: Change) -> Case | None:
    torch = change(case.torch, ".") if "t" in sides else case.torch
    flax = change(case.flax, "/") if "f" in sides else case.flax
    if torch is None or flax is None:
        return None
    return replace(case, torch=torch, flax=flax)


def _after(case: Case, rng: random.Random, first: Kind, *kinds: str) -> Case | None:
    found = first(case, rng)
    for kind in kinds:
        if found is None:
            return None
        found = KINDS[kind](found, rng)
    return found


# ---------------------------------------------------------------- tensors that are gone, or too many


def _missing(case: Case, rng: random.Random) -> Case | None:
    """A true tensor is gone, and an unrelated one of its shape is there."""
    sole = _sole(case)
    if not sole:
        return None
    name = rng.choice(list(sole))
    torch = {n: a for n, a in case.torch.items() if n != name}
    stray = rng.choice(("adapter.weight", "ema_scratch", "probe.proj.weight", name.rpartition(".")[0] + ".lora_aux"))
    if stray in torch:
        return None
    torch[stray] = _noise(rng, case.torch[name])
    return replace(case, torch=torch, gone=case.gone | {id(case.flax[sole[name]])})


def _sole(case: Case) -> dict[str, str]:
    """torch tensor -> the one leaf of like that holds its values, where nothing else does: found by sorted values."""
    marks: defaultdict[tuple[int, bytes], list[str]] = defaultdict(list)
    for name, array in case.flax.items():
        marks[_mark(array)].append(name)
    mine: defaultdict[tuple[int, bytes], list[str]] = defaultdict(list)
    for name, array in case.torch.items():
        if array.ndim and array.size > 1:
            mine[_mark(array)].append(name)
    return {
        found[0]: marks[mark][0] for mark, found in mine.items() if len(found) == 1 and len(marks.get(mark, ())) == 1
    }


def _mark(array: np.ndarray[Any, Any]) -> tuple[int, bytes]:
    return array.size, np.sort(array.ravel())[:64].tobytes()


def _extra(case: Case, rng: random.Random) -> Case | None:
    """Copies of shapes that go nowhere, under names of their own."""
    torch = dict(case.torch)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([n for n in case.torch if case.torch[n].ndim])
        new = rng.choice(("aux_head.", "ema.", "teacher.", "momentum_encoder.")) + name
        torch[new] = _noise(rng, case.torch[name])
    return replace(case, torch=torch)


def _noise(rng: random.Random, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.random.default_rng(rng.randint(0, 9**9)).standard_normal(like.shape).astype(like.dtype)


# ---------------------------------------------------------------- stacks


def _stacked(case: Case, axis: int, word: str = r"layers?|blocks?|h|block") -> Case | None:
    """The Flax side keeps what repeats in one leaf each, on `axis`."""
    pattern = re.compile(rf"/({word})(?:/|_)(\d+)/")
    groups: defaultdict[str, dict[int, np.ndarray[Any, Any]]] = defaultdict(dict)
    out: Arrays = {}
    for name, array in case.flax.items():
        match = pattern.search(name)
        if match is None:
            out[name] = array
        else:
            groups[f"{name[: match.start()]}/{match[1]}/{name[match.end() :]}"][int(match[2])] = array
    if not groups or len({len(g) for g in groups.values()}) != 1 or len(next(iter(groups.values()))) < 2:
        return None
    for name, members in groups.items():
        if len({a.shape for a in members.values()}) != 1 or any(a.ndim < axis for a in members.values()):
            return None
        out[name] = np.stack([members[i] for i in sorted(members)], axis)
    return replace(case, flax=out)


def _stacked_experts(case: Case, axis: int) -> Case | None:
    """The experts of a layer in one leaf each."""
    return _stacked(case, axis, "experts")


def _layers_by_experts(case: Case, axis: int) -> Case | None:
    """Layers x experts in one leaf each, the layers outside."""
    inner = _stacked(case, 0, "experts")
    return _stacked(inner, axis) if inner else None


def _stacked_cycles(case: Case, axis: int) -> Case | None:
    return _stacked(case, axis, "cycles")


# ---------------------------------------------------------------- names that count calls

_AUTO = {"kernel": "Dense", "scale": "LayerNorm", "embedding": "Embed"}


def _auto_named(case: Case, rng: random.Random, shuffle: bool) -> Case | None:
    """The Flax side names its modules by a counter per kind, in the order of torch's names or in another order. Where
    the numbers of torch's names and the shapes show that the order is another one, the plan must ask."""
    groups: defaultdict[tuple[str, str], dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, array in case.flax.items():
        parts = name.split("/")
        if parts[-1] in _AUTO and parts[0] == "params" and len(parts) > 2 and not parts[-2].isdigit():
            word = _AUTO[parts[-1]]
            word = "Conv" if word == "Dense" and array.ndim > 2 else word
            groups[("/".join(parts[1:-2]), word)][parts[-2]] = array.shape
    table: dict[str, str] = {}
    order = {name: i for i, name in enumerate(case.torch)}
    turns: dict[str, float] = {}
    traced = False
    for (parent, word), shapes in groups.items():
        plain = sorted(shapes, key=lambda n: min((order[t] for t in order if t.split(".")[-2:-1] == [n]), default=0))
        members = list(plain)
        if shuffle:
            # One class, one order of calls: the same in every instance of a block.
            mark = re.sub(r"\d+", "", parent) + word
            members.sort(key=lambda n: turns.setdefault(mark + n, rng.random()))
        counted = [n for n in members if re.search(r"\d$", n)]
        by_number = sorted(counted, key=lambda n: (re.sub(r"\d+$", "", n), int(re.findall(r"\d+$", n)[0])))
        traced = traced or [shapes[n] for n in counted] != [shapes[n] for n in by_number]
        for i, member in enumerate(members):
            table[f"{parent}/{member}" if parent else member] = f"{word}_{i}"
    if not table:
        return None
    out: Arrays = {}
    for name, array in case.flax.items():
        parts = name.split("/")
        key = "/".join(parts[1:-1])
        if key in table:
            parts[-2] = table[key]
        new = "/".join(parts)
        if new in out:
            return None
        out[new] = array
    return replace(case, flax=out, assumed=not traced)


# ---------------------------------------------------------------- the table

KINDS: dict[str, Kind] = {}
for _word, _others in (("", False), ("other-", True)):
    for _p in (0.3, 0.7, 1.0):
        for _side, _sides in (("torch", "t"), ("flax", "f"), ("both", "tf")):
            KINDS[f"{_word}{_side}-{_p:g}"] = lambda c, r, p=_p, on=_sides, o=_others: _rename(
                c, on, lambda a, s: names.synonyms(a, s, p, r, o)
            )
for _side, _sides in (("torch", "t"), ("flax", "f"), ("both", "tf")):
    KINDS[f"anonymous-{_side}"] = lambda c, r, on=_sides: _rename(
        c, on, lambda a, s: names.anonymous(a, s, r.choice((0.2, 0.5)), r)
    )
KINDS |= {
    "blank-flax": lambda c, r: _rename(c, "f", lambda a, s: names.anonymous(a, s, 1.0, r)),
    "offset": lambda c, r: _rename(c, r.choice(("t", "f")), lambda a, s: names.offset(a, s, r)),
    "merged": lambda c, r: _rename(c, r.choice(("t", "f")), lambda a, s: names.merged(a, s, r)),
    "nested": lambda c, r: _rename(c, r.choice(("t", "f", "tf")), lambda a, s: names.nested(a, s, r)),
    "nested-inside": lambda c, r: _rename(c, r.choice(("t", "f")), lambda a, s: names.nested_inside(a, s, r)),
    "flattened": lambda c, r: _rename(c, r.choice(("t", "f")), lambda a, s: names.flattened(a, s, r)),
    "styled": lambda c, r: _rename(c, r.choice(("t", "f")), lambda a, s: names.styled(a, s, r)),
    "mixed-styles": lambda c, r: _rename(c, r.choice(("t", "f")), lambda a, s: names.mixed_styles(a, s, r)),
    "missing": _missing,
    "missing-renamed": lambda c, r: _after(c, r, _missing, "both-0.7"),
    "extra": _extra,
    "extra-renamed": lambda c, r: _after(c, r, _extra, "flax-0.7"),
    "stack-0": lambda c, _: _stacked(c, 0),
    "stack-1": lambda c, _: _stacked(c, 1),
    "stack-renamed": lambda c, r: _after(c, r, lambda d, q: _stacked(d, q.choice((0, 1))), "torch-0.7"),
    "experts": lambda c, r: _stacked_experts(c, r.choice((0, 1))),
    "experts-renamed": lambda c, r: _after(c, r, lambda d, q: _stacked_experts(d, q.choice((0, 1))), "both-0.7"),
    "layers-by-experts": lambda c, r: _layers_by_experts(c, r.choice((0, 1))),
    "cycles": lambda c, r: _stacked_cycles(c, r.choice((0, 1))),
    "cycles-renamed": lambda c, r: _after(c, r, lambda d, q: _stacked_cycles(d, q.choice((0, 1))), "both-0.3"),
    "auto-named": lambda c, r: _auto_named(c, r, False),
    "auto-named-other-order": lambda c, r: _auto_named(c, r, True),
    "mixed": lambda c, r: _after(c, r, KINDS["styled"], "offset", "both-0.3", "nested"),
}
"""name -> what it does to a case; None where it does not apply. `torch-0.7`: synonyms on torch's side with probability
0.7; `other-`: words of other authors."""
