"""Every answer that a question offers is taken, settles what it was offered for, and opens nothing: over pairs that
are made here, and over renamed, cut and stacked variations of solved pairs, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import graftax as gx
from graftax.errors import GraftaxError
from graftax.match.planning import make_plan
from graftax.plans import Plan, PlanOptions
from graftax.tree import Checkpoint, Side, Storage, TensorSpec

MOST = 10
_SIDES = {False: ("torch", "flax"), True: ("flax", "torch")}
Arrays = Mapping[str, np.ndarray[Any, Any]]


def _checkpoint(arrays: Arrays, side: Side, values: bool) -> Checkpoint:
    specs = {name: TensorSpec(array.shape, str(array.dtype)) for name, array in arrays.items()}
    return Checkpoint(f"the {side} side", side, specs, Storage(arrays.__getitem__ if values else None))


def _entries(plan: Plan) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    return {name: (frozenset(e.sources), frozenset(e.targets)) for e in plan.entries for name in e.targets}


def faults(torch: Arrays, flax: Arrays, reverse: bool = False) -> Iterator[str]:
    """What is wrong with the answers that the plan of this pair offers."""
    ends = [(torch, "torch", True), (flax, "flax", False)]
    source, like = (_checkpoint(a, side, n == 0) for n, (a, side, _) in enumerate(ends[:: -1 if reverse else 1]))

    def planned(rule: str = "") -> Plan:
        return make_plan(source, like, PlanOptions(rules=[rule] if rule else None))

    plan = planned()
    before = _entries(plan)
    for question in plan.questions:
        if len(question.candidates) > MOST:
            yield f"{question.text}: {len(question.candidates)} candidates"
        for candidate in question.candidates[:MOST]:
            try:
                answered = planned(candidate.rule)
            except GraftaxError as error:
                yield f"{candidate.rule} is refused: {error}"
                continue
            after = _entries(answered)
            if len(answered.failures) > len(plan.failures):
                yield f"{candidate.rule} does not fit: {answered.failures[-1]}"
            elif len(after) <= len(before):
                yield f"{candidate.rule} settles nothing: {len(before)} leaves were settled, then {len(after)}"
            for name, ends_of in before.items():
                if name not in after:
                    yield f"{candidate.rule} opens {name}"
                    break
                if after[name][0] != ends_of[0] or not after[name][1] >= ends_of[1]:
                    yield f"{candidate.rule} changes {name}: {ends_of} became {after[name]}"
                    break


D = 8
SQUARE = "o i -> i o"
PAIRS: dict[str, list[tuple[Any, ...]]] = {
    "heads that only shapes pair": [
        *((f"{a}.weight", f"params/{b}/kernel", (D, D), SQUARE) for a, b in (("alpha", "x"), ("be", "y"), ("c", "z"))),
        ("stem.weight", "params/stem/kernel", (D, 5), SQUARE),
    ],
    "more ways than one question lists": [
        *((f"net.{a}.weight", f"params/{b}/kernel", (D, D), SQUARE) for a, b in zip("abcde", "vwxyz", strict=True)),
    ],
    "experts of unknown names": [
        (
            [f"layers.{i}.moe.experts.{e}.{a}.weight" for e in range(D)],
            f"params/layer_{i}_moe/{b}",
            (D, D),
            lambda *w: (np.stack([x.T for x in w]),),
        )
        for i in range(2) for a, b in (("w1", "wi_0"), ("w3", "wi_1"), ("w2", "wo"))
    ],
    "squares of several towers": [
        (f"{t}.{{0..2}}.{a}.weight", f"params/{u}_{{0..2}}/{b}/kernel", (D, D), SQUARE)
        for t, u in (("left", "one"), ("right", "two")) for a, b in (("p", "q"), ("r", "s"))
    ],
    "transposed convolutions": [
        (f"main.{n}.weight", f"params/ConvTranspose_{k}/kernel", (D, D, 4, 4), "i o kh kw -> kh kw i o")
        for k, n in enumerate((0, 3, 6))
    ],
    "layers that the other side stacks": [
        ([f"body.{i}.{a}" for i in range(4)], f"params/stack/{b}", (D,), lambda *v: (np.stack(v, 1),))
        for a, b in (("first", "uno"), ("second", "dos"))
    ],
    "a map before two heads": [
        ("conv.weight", "params/conv/kernel", (D, 3, 3, 3), "o i kh kw -> kh kw i o"),
        ("a.weight", "params/x/kernel", (5, D * 9), SQUARE), ("b.weight", "params/y/kernel", (5, D * 9), SQUARE),
    ],
    "fused parts": [
        (
            f"h.{i}.qkv.weight",
            [f"params/h_{i}/{p}/kernel" for p in "qkv"],
            (3 * D, D),
            lambda w: [p.T for p in np.split(w, 3)],
        )
        for i in range(2)
    ] + [("h.{0..1}.out.weight", "params/h_{0..1}/out/kernel", (D, D), SQUARE)],
    "fused in another order": [
        (f"h.{i}.mlp.gate_up.{n}", f"params/h_{i}/mlp/up_gate/{m}", s, p) for i in range(2)
        for n, m, s, p in (("weight", "kernel", (2 * D, 5), SQUARE), ("bias", "bias", (2 * D,), ""))
    ],
    "a tied head": [
        (
            "model.embed_tokens.weight",
            ["params/model/embed/embedding", "params/lm_head/kernel"],
            (13, D),
            lambda w: (w, w.T),
        ),
        ("model.norm.weight", "params/model/norm/scale", (D,)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True], ids=["to flax", "to torch"])
@pytest.mark.parametrize("name", PAIRS)
def test_every_offered_answer_settles(pairing: Callable[..., Any], name: str, reverse: bool) -> None:
    pair = pairing(PAIRS[name])
    assert list(faults(pair.torch, pair.flax, reverse)) == []
    source, like = (pair.flax, pair.torch) if reverse else (pair.torch, pair.flax)
    plan = gx.plan(dict(source), dict(like), **dict(zip(("source_side", "to"), _SIDES[reverse], strict=True)))
    assert any(question.candidates for question in plan.questions) or (reverse and name == "a tied head")


def _mutated(mutate: ModuleType, folder: Path | None, count: int, seed: int, reverse: bool) -> list[str]:
    out: list[str] = []
    for kind, case in mutate.mutations(mutate.load_cases(folder), list(mutate.KINDS), count, seed):
        out += [f"{case.name}, {kind}: {fault}" for fault in faults(case.torch, case.flax, reverse)]
    return out


@pytest.mark.parametrize("reverse", [False, True], ids=["to flax", "to torch"])
def test_every_offered_answer_settles_in_mutations(mutate: ModuleType, zoo: Path, reverse: bool) -> None:
    assert _mutated(mutate, zoo, 60, 21, reverse) == []


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True], ids=["to flax", "to torch"])
def test_every_offered_answer_settles_in_more_mutations(mutate: ModuleType, zoo: Path, reverse: bool) -> None:
    assert _mutated(mutate, zoo, 250, 22, reverse) == []
