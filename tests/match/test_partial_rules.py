"""A rule for one instance of a block settles that instance and takes nothing away from the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import graftax as gx

D, F, N = 16, 24, 5
LIN = "o i -> i o"
ROWS = [
    ("enc.layer.{i:0..4}.attn.q.weight", "params/blocks_{i}/attn/query/kernel", (D, D), LIN),
    ("enc.layer.{i:0..4}.attn.k.weight", "params/blocks_{i}/attn/key/kernel", (D, D), LIN),
    ("enc.layer.{i:0..4}.fc1.weight", "params/blocks_{i}/fc1/kernel", (F, D), LIN),
    ("enc.layer.{i:0..4}.fc1.bias", "params/blocks_{i}/fc1/bias", (F,)),
    ("enc.layer.{i:0..4}.fc2.weight", "params/blocks_{i}/fc2/kernel", (D, F), LIN),
    ("enc.layer.{i:0..4}.ln.weight", "params/blocks_{i}/ln/scale", (D,)),
]


def _rule(torch: str, flax: str, **more: str) -> str:
    rest = "".join(f', {name} = "{value}"' for name, value in more.items())
    return f'rules = [{{ torch = "{torch}", flax = "{flax}"{rest} }}]'


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    ("torch", "flax", "more"),
    [
        ("attn.q.weight", "attn/query/kernel", {"layout": "linear"}),
        ("fc1.weight", "fc1/kernel", {"layout": "linear"}),
        ("fc1.bias", "fc1/bias", {}),
        ("ln.weight", "ln/scale", {}),
    ],
)
def test_a_true_rule_for_one_layer_leaves_the_others_as_they_were(
    pairing: Callable[..., Any], at: int, torch: str, flax: str, more: dict[str, str]
) -> None:
    pair = pairing(ROWS)
    found = pair.infer(rules=_rule(f"enc.layer.{at}.{torch}", f"params/blocks_{at}/{flax}", **more))
    assert pair.judge(found) == ("exact", []), [str(q) for q in found.questions]


def test_another_layout_for_one_layer_is_asked_for_the_others_and_offered_first(pairing: Callable[..., Any]) -> None:
    pair = pairing(ROWS)
    rule = _rule("enc.layer.3.attn.q.weight", "params/blocks_3/attn/query/kernel", layout="identity")
    found = pair.infer(rules=rule)
    (question,) = found.questions
    waiting = {f"params/blocks_{i}/attn/query/kernel" for i in (0, 1, 2, 4)}
    assert waiting <= set(question.targets)
    assert 'layout = "identity"' in question.candidates[0].rule
    filled = {name for entry in found.entries for name in entry.targets}
    assert filled == set(pair.flax) - waiting


def test_another_partner_for_one_layer_is_asked_for_the_others_and_offered_first(pairing: Callable[..., Any]) -> None:
    pair = pairing(ROWS)
    rule = _rule("enc.layer.3.attn.q.weight", "params/blocks_3/attn/key/kernel", layout="linear")
    found = pair.infer(rules=rule)
    asked = {name for question in found.questions for name in question.targets}
    assert {f"params/blocks_{i}/attn/{k}/kernel" for i in (0, 1, 2, 4) for k in ("query", "key")} <= asked
    first = next(q for q in found.questions if q.candidates).candidates[0].rule
    assert 'attn.q.weight", flax = "params/blocks_{l}/attn/key/kernel"' in first
    assert not any("attn" in name for entry in found.entries for name in entry.targets if "blocks_3" not in name)


def test_an_answer_covers_the_whole_column(pairing: Callable[..., Any]) -> None:
    """Blocks that are numbered by stage on one side and through on the other, stages of unequal length."""
    sizes = (2, 3, 1)
    rows: list[Any] = []
    n = 0
    for stage, count in enumerate(sizes):
        for j in range(count):
            for a, b in (("x", "m"), ("y", "n")):
                rows.append((f"stages.{stage}.{j}.{a}.weight", f"params/b_{n}/{b}/kernel", (D, D), LIN))
            rows.append((f"stages.{stage}.{j}.out.weight", f"params/b_{n}/out/kernel", (F, D), LIN))
            n += 1
    pair = pairing(rows)
    found = pair.infer()
    (question,) = found.questions
    assert len(question.candidates) == 2
    verdict, answers, _ = pair.settle()
    assert (verdict, answers) == ("exact", 1)


def test_a_rule_for_one_leaf_of_a_recurrent_layer_leaves_the_rest_to_the_layer_table() -> None:
    gates = "ifgo"
    torch = {
        "rnn.weight_ih_l0": np.zeros((32, 6), "f4"),
        "rnn.weight_hh_l0": np.zeros((32, 8), "f4"),
        "rnn.bias_ih_l0": np.zeros(32, "f4"),
        "rnn.bias_hh_l0": np.zeros(32, "f4"),
        "fc.weight": np.zeros((3, 8), "f4"),
    }
    cell = {f"i{g}": {"kernel": np.zeros((6, 8), "f4")} for g in gates}
    cell |= {f"h{g}": {"kernel": np.zeros((8, 8), "f4"), "bias": np.zeros(8, "f4")} for g in gates}
    flax = {"params": {"rnn": cell, "fc": {"kernel": np.zeros((8, 3), "f4")}}}
    plain = gx.plan(torch, flax)
    assert plain.complete
    targets = [f"params/rnn/i{g}/kernel" for g in gates]
    rule = {"torch": "rnn.weight_ih_l0", "flax": targets, "fused": "block", "layout": "linear"}
    ruled = gx.plan(torch, flax, rules=[rule])
    assert ruled.complete, str(ruled)
    assert {e.targets for e in ruled.entries} == {e.targets for e in plain.entries}
    crossed = gx.plan(
        torch, flax, rules=[{**rule, "flax": [t.replace("/i", "/h") for t in targets], "torch": "rnn.weight_hh_l0"}]
    )
    assert crossed.complete, str(crossed)


def _same_rows(fused: dict[str, Any], parts: dict[str, Any], sizes: dict[str, int]) -> bool:
    """The bias of every part is made of the rows of which its kernel is made."""
    for x, n in sizes.items():
        columns = parts[x]["kernel"].T
        rows = [np.flatnonzero((fused["a.qkv.weight"] == columns[c]).all(1))[0] for c in range(n)]
        if not (parts[x]["bias"] == fused["a.qkv.bias"][rows]).all():
            return False
    return True


@pytest.mark.parametrize("more", [{"fused": "block"}, {"fused": "interleaved", "heads": 2}], ids=["block", "woven"])
def test_a_bias_lies_as_the_rule_for_its_weight_says(more: dict[str, Any]) -> None:
    """The parts in the order of the rule, whatever their names, and in its form."""
    rng = np.random.default_rng(0)
    fused = {"a.qkv.weight": rng.standard_normal((24, 6), "f4"), "a.qkv.bias": rng.standard_normal(24, "f4")}
    flax = {"a": {x: {"kernel": np.zeros((6, 8), "f4"), "bias": np.zeros(8, "f4")} for x in "qkv"}}
    rule = {"torch": "a.qkv.weight", "flax": [f"a/{x}/kernel" for x in "kqv"], **more}
    found = gx.port(fused, flax, rules=[rule])["a"]
    assert _same_rows(fused, found, dict.fromkeys("qkv", 8))


def test_a_bias_of_grouped_heads_lies_as_the_rule_for_its_weight_says() -> None:
    rng = np.random.default_rng(0)
    fused = {"a.qkv.weight": rng.standard_normal((16, 6), "f4"), "a.qkv.bias": rng.standard_normal(16, "f4")}
    sizes = {"q": 8, "k": 4, "v": 4}
    flax = {"a": {x: {"kernel": np.zeros((6, n), "f4"), "bias": np.zeros(n, "f4")} for x, n in sizes.items()}}
    rule = {"torch": "a.qkv.weight", "flax": [f"a/{x}/kernel" for x in "qkv"], "fused": "interleaved", "heads": 4}
    found = gx.port(fused, flax, rules=[rule])["a"]
    assert _same_rows(fused, found, sizes)
    assert not (found["q"]["bias"] == fused["a.qkv.bias"][:8]).all()


def test_gates_in_an_order_of_their_own_say_nothing_of_the_others() -> None:
    """A rule that lists the gates otherwise than the layer table contradicts it: the rest of the layer is asked."""
    gates = "igfo"
    torch = {"x.weight_ih_l0": np.zeros((32, 8), "f4"), "x.weight_hh_l0": np.zeros((32, 8), "f4")}
    torch |= {f"x.bias_{end}_l0": np.zeros(32, "f4") for end in ("ih", "hh")}
    cell = {f"i{g}": {"kernel": np.zeros((8, 8), "f4")} for g in gates}
    cell |= {f"h{g}": {"kernel": np.zeros((8, 8), "f4"), "bias": np.zeros(8, "f4")} for g in gates}
    targets = [f"params/x/i{g}/kernel" for g in gates]
    rule = {"torch": "x.weight_ih_l0", "flax": targets, "fused": "block", "layout": "linear"}
    assert not gx.plan(torch, {"params": {"x": cell}}, rules=[rule]).complete
    rule["flax"] = [f"params/x/i{g}/kernel" for g in "ifgo"]
    assert gx.plan(torch, {"params": {"x": cell}}, rules=[rule]).complete
