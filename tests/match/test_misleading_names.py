"""Pairs whose names or parts mislead: what nothing decides is asked or refused, never taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import graftax as gx
from graftax.errors import PlanError
from graftax.plans import Plan
from graftax.tree import Checkpoint, Storage, TensorSpec

Shapes = dict[str, tuple[int, ...]]


def ends(torch: Shapes, flax: Shapes) -> tuple[Checkpoint, Checkpoint]:
    """Both ends, random values on the torch side only."""
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype("f4") for name, shape in torch.items()}
    left, right = ({n: TensorSpec(s, "float32") for n, s in some.items()} for some in (torch, flax))
    return Checkpoint("torch", "torch", left, Storage(values.__getitem__)), Checkpoint("flax", "flax", right)


def plan(torch: Shapes, flax: Shapes, **options: Any) -> Plan:
    return gx.plan(*ends(torch, flax), **options)


def taken(found: Plan) -> dict[str, str]:
    """target -> source, of what is decided."""
    return {t: ", ".join(entry.sources) for entry in found.entries for t in entry.targets if entry.sources}


def blocks(torch: Shapes, flax: Shapes, count: int = 4) -> tuple[Shapes, Shapes]:
    """The leaves of one block, `count` times."""
    return (
        {f"h.{i}.{name}": shape for i in range(count) for name, shape in torch.items()},
        {f"h_{i}/{name}": shape for i in range(count) for name, shape in flax.items()},
    )


# ---------------------------------------------------------------- parts of weights


PARTS: dict[str, tuple[Shapes, Shapes, str]] = {
    "parametrised": (
        {"fc.parametrizations.weight.original": (8, 5), "fc.bias": (8,)},
        {"fc/kernel": (5, 8), "fc/bias": (8,)},
        "parametrised",
    ),
    "spectral norm against a plain kernel": (
        {
            "fc.parametrizations.weight.original": (8, 5),
            "fc.parametrizations.weight.0._u": (8,),
            "fc.parametrizations.weight.0._v": (5,),
            "h.weight": (3, 8),
        },
        {"fc/kernel": (5, 8), "h/kernel": (8, 3)},
        "parametrised",
    ),
    "lora": ({"fc.weight": (8, 5), "fc.lora_A": (2, 5), "fc.lora_B": (8, 2)}, {"fc/kernel": (5, 8)}, "adapter"),
    "lora in a wrapper": (
        {
            "fc.base_layer.weight": (8, 5),
            "fc.lora_A.default.weight": (2, 5),
            "fc.lora_B.default.weight": (8, 2),
        },
        {"fc/kernel": (5, 8)},
        "adapter",
    ),
    "pruned": ({"fc.weight_orig": (8, 5), "fc.weight_mask": (8, 5)}, {"fc/kernel": (5, 8)}, "pruned"),
}


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize("turned", [False, True])
def test_weights_in_parts_are_refused(case: str, turned: bool) -> None:
    torch, flax, what = PARTS[case]
    pair = ends(torch, flax)[::-1] if turned else ends(torch, flax)
    with pytest.raises(PlanError) as caught:
        gx.plan(*pair, unused="drop", missing="zeros")
    assert what in str(caught.value)
    assert "before saving" in str(caught.value)


def test_adapters_on_both_ends_are_a_pair_like_any_other() -> None:
    found = plan(
        {"fc.weight": (8, 5), "fc.lora_A": (2, 5), "fc.lora_B": (8, 2)},
        {"fc/kernel": (5, 8), "fc/lora_a": (5, 2), "fc/lora_b": (2, 8)},
    )
    assert taken(found)["fc/kernel"] == "fc.weight"


def test_a_rule_may_say_what_a_parametrised_weight_becomes() -> None:
    torch, flax, _ = PARTS["parametrised"]
    line = '{torch="fc.parametrizations.weight.original", flax="fc/kernel", layout="linear"}'
    assert plan(torch, flax, rules=f"rules=[{line}]").complete


def test_a_text_encoder_mask_is_no_pruned_weight() -> None:
    source = {"fc.weight": np.ones((8, 5), "f4"), "attn_mask": np.triu(np.full((5, 5), -np.inf, "f4"), 1)}
    assert gx.plan(source, {"fc": {"kernel": np.ones((5, 8), "f4")}}).complete
    learned = source | {"attn_mask": np.random.default_rng(0).normal(size=(5, 5)).astype("f4")}
    assert not gx.plan(learned, {"fc": {"kernel": np.ones((5, 8), "f4")}}).complete


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("order", [["l.1.a.weight", "l.01.a.weight"], ["l.01.a.weight", "l.1.a.weight"]])
def test_a_number_with_a_zero_before_it_is_another_module(order: list[str]) -> None:
    found = plan(dict.fromkeys(order, (8, 5)), {"l_1/a/kernel": (5, 8)}, unused="drop")
    assert taken(found).get("l_1/a/kernel", "l.1.a.weight") == "l.1.a.weight"
    both = plan(dict.fromkeys(order, (8, 5)), {"l_1/a/kernel": (5, 8), "l_01/a/kernel": (5, 8)})
    assert taken(both) == {"l_1/a/kernel": "l.1.a.weight", "l_01/a/kernel": "l.01.a.weight"}
    assert "l.01.a.weight" in str(both)


def test_padded_numbers_count_blocks() -> None:
    torch = {f"h.{i:02}.{k}.weight": (8, 8) for i in range(12) for k in ("q", "k")}
    flax = {f"h_{i}/{k}/kernel": (8, 8) for i in range(12) for k in ("q", "k")}
    found = plan(torch, flax)
    assert found.complete
    assert taken(found)["h_7/q/kernel"] == "h.07.q.weight"


def test_more_digits_than_a_number_has_are_a_word() -> None:
    long = "9" * 5000
    found = plan({f"l.{long}.weight": (8, 5), "m.weight": (3, 8)}, {f"l_{long}/kernel": (5, 8), "m/kernel": (8, 3)})
    assert found.complete
    assert plan({f"l.{long}.weight": (8, 5)}, {"x/kernel": (5, 7)}).questions


def test_a_key_without_a_module_has_rules_that_settle_it() -> None:
    pair = {".weight": (8, 5), "b.weight": (8, 5)}, {"x/kernel": (5, 8), "y/kernel": (5, 8)}
    lines = [c.rule for q in plan(*pair).questions for c in q.candidates]
    line = next(line for line in lines if '".weight"' in line and '"x/kernel"' in line)
    assert taken(plan(*pair, rules=f"rules=[{line}]"))["x/kernel"] == ".weight"


# ---------------------------------------------------------------- recurrent layers


LSTM = {"weight_ih_l0": (32, 8), "weight_hh_l0": (32, 8), "bias_ih_l0": (32,), "bias_hh_l0": (32,)}


def recurrent(torch: str, flax: str) -> tuple[Shapes, Shapes]:
    """One LSTM a side, under these names, and one Linear."""
    kernels = {f"{flax}/{way}{gate}/kernel": (8, 8) for way in "ih" for gate in "ifgo"}
    biases = {f"{flax}/h{gate}/bias": (8,) for gate in "ifgo"}
    left = {f"{torch}.{name}": shape for name, shape in LSTM.items()}
    return {**left, "fc.weight": (3, 8)}, {**kernels, **biases, "fc/kernel": (8, 3)}


@pytest.mark.parametrize(
    "names",
    [("encoder.lstm", "decoder/lstm"), ("fwd", "bwd"), ("actor.rnn", "critic/rnn"), ("speaker.lstm", "mel/lstm")],
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_only_recurrent_layer_is_not_taken_against_its_name(names: tuple[str, str], turned: bool) -> None:
    pair = ends(*recurrent(*names))
    found = gx.plan(*(pair[::-1] if turned else pair))
    assert not found.complete
    assert set(taken(found)) == {"fc.weight" if turned else "fc/kernel"}


@pytest.mark.parametrize(
    "names", [("rnn", "lstm"), ("net.lstm", "OptimizedLSTMCell_0"), ("encoder.rnn", "seq2seq/encoder_lstm/cell")]
)
def test_the_only_recurrent_layer_is_taken_where_names_agree(names: tuple[str, str]) -> None:
    assert plan(*recurrent(*names)).complete


# ---------------------------------------------------------------- nothing else fits


STRANGERS = [
    ("linear.weight", "gate/kernel", (8, 8)),
    ("proj.weight", "mlp_out/kernel", (8, 8)),
    ("adapter.weight", "shared/kernel", (8, 8)),
    ("fc1.weight", "wo/kernel", (8, 8)),
    ("attn.c_proj.weight", "c_proj/kernel", (8, 8)),
]


@pytest.mark.parametrize(("torch", "flax", "shape"), STRANGERS)
def test_what_blocks_have_over_is_not_taken_for_want_of_another(torch: str, flax: str, shape: tuple[int, ...]) -> None:
    """Its shape is that of its neighbours, and its names have nothing in common."""
    left, right = {"attn.q.weight": (8, 8), "attn.k.weight": (8, 8)}, {"attn/q/kernel": (8, 8), "attn/k/kernel": (8, 8)}
    found = plan(*blocks({**left, torch: shape}, {**right, flax: shape[::-1]}))
    assert set(taken(found)) == {f"h_{i}/attn/{k}/kernel" for i in range(4) for k in "qk"}


@pytest.mark.parametrize(
    ("torch", "flax"),
    [("mask_head.fc", "class_head"), ("aux_classifier", "head"), ("domain_classifier.2", "logits")],
)
def test_a_head_that_says_more_is_not_any_head(torch: str, flax: str) -> None:
    found = plan(
        {"b.l1.weight": (9, 5), "b.l2.weight": (11, 9), f"{torch}.weight": (4, 11)},
        {"b/l1/kernel": (5, 9), "b/l2/kernel": (9, 11), f"{flax}/kernel": (11, 4)},
    )
    assert f"{flax}/kernel" not in taken(found)
    assert not found.complete


def test_an_answer_leaves_the_rest_a_question() -> None:
    pair = {"a.weight": (8, 5), "b.weight": (8, 5)}, {"x/kernel": (5, 8), "y/kernel": (5, 8)}
    found = plan(*pair, rules='rules=[{torch="a.weight", flax="x/kernel", layout="linear"}]')
    assert set(taken(found)) == {"x/kernel"}
    assert [c.rule for q in found.questions for c in q.candidates]


@pytest.mark.parametrize(("torch", "flax"), [("lm_head", "logits_dense"), ("classifier", "head"), ("head.fc", "head")])
def test_a_head_that_says_no_more_is_taken(torch: str, flax: str) -> None:
    found = plan({"b.l1.weight": (9, 5), f"{torch}.weight": (4, 9)}, {"b/l1/kernel": (5, 9), f"{flax}/kernel": (9, 4)})
    assert found.complete


def test_no_answer_crosses_parts_that_both_sides_name() -> None:
    """Shapes alone fit any square of the encoder to any of the decoder."""
    torch = {f"{t}.mid.{a}.weight": (8, 8) for t in ("encoder", "decoder") for a in ("to_q", "to_k", "to_v", "to_out")}
    flax = {f"{t}/mid/Dense_{i}/kernel": (8, 8) for t in ("encoder", "decoder") for i in range(4)}
    rules = [candidate.rule for question in plan(torch, flax).questions for candidate in question.candidates]
    assert rules
    assert all(("encoder." in line) == ("encoder/" in line) for rule in rules for line in rule.split("}, {"))


def test_calls_in_another_order_in_one_block_leave_the_numbers_of_all_untold() -> None:
    """The sizes of the encoder's layers show that the author calls the second one first."""
    torch = {f"encoder.{i}.fc{n}.weight": shape for i in range(2) for n, shape in ((1, (9, 8)), (2, (7, 9)))}
    flax = {f"encoder_{i}/Dense_{n}/kernel": shape for i in range(2) for n, shape in ((0, (9, 7)), (1, (8, 9)))}
    torch |= {f"decoder.{i}.fc{n}.weight": (8, 8) for i in range(2) for n in (1, 2)}
    flax |= {f"decoder_{i}/Dense_{n}/kernel": (8, 8) for i in range(2) for n in (0, 1)}
    found = taken(plan(torch, flax))
    assert not any(target.startswith("decoder") for target in found)


def test_a_number_of_calls_means_the_same_only_in_blocks_of_one_kind() -> None:
    """The projection is called first, in the one block that has it."""
    torch = {f"h.{i}.conv{n}.weight": (8, 8, 3, 3) for i in (0, 1, 3) for n in (1, 2)}
    flax = {f"h_{i}/Conv_{n}/kernel": (3, 3, 8, 8) for i in (0, 1, 3) for n in (0, 1)}
    torch |= {"h.2.conv1.weight": (8, 8, 3, 3), "h.2.conv2.weight": (8, 8, 3, 3), "h.2.shortcut.weight": (8, 8, 1, 1)}
    flax |= {"h_2/Conv_0/kernel": (1, 1, 8, 8), "h_2/Conv_1/kernel": (3, 3, 8, 8), "h_2/Conv_2/kernel": (3, 3, 8, 8)}
    found = plan(torch, flax)
    wrong = {t: s for t, s in taken(found).items() if t[2] != "2" and int(t[9]) + 1 != int(s[8])}
    assert wrong == {}
    assert taken(found)["h_2/Conv_0/kernel"] == "h.2.shortcut.weight"


@pytest.mark.parametrize("bias", [False, True])
def test_the_outer_of_two_nested_calls_has_the_first_number(bias: bool) -> None:
    """Dense(8)(relu(Dense(9)(x))): Dense_0 is the second layer, and has the shape of the first one's torch weight."""
    torch = {"mlp.fc1.weight": (9, 8), "mlp.fc2.weight": (8, 9)}
    flax = {"mlp/Dense_0/kernel": (9, 8), "mlp/Dense_1/kernel": (8, 9)}
    if bias:
        torch |= {"mlp.fc1.bias": (9,), "mlp.fc2.bias": (8,)}
        flax |= {"mlp/Dense_0/bias": (8,), "mlp/Dense_1/bias": (9,)}
    found = plan(torch, flax)
    assert not taken(found)
    right = next(
        c.rule for q in found.questions for c in q.candidates if '"mlp/Dense_0/kernel", layout = "linear"' in c.rule
    )
    assert taken(plan(torch, flax, rules=[right]))["mlp/Dense_0/kernel"] == "mlp.fc2.weight"


def test_a_norm_does_not_stand_for_a_scale_of_the_same_place() -> None:
    torch, flax = blocks(
        {"attn_norm.weight": (8,), "mlp_norm.weight": (8,), "mlp.up.weight": (9, 8)},
        {"pre_norm/scale": (8,), "post_norm/scale": (8,), "ffn_scale/scale": (8,), "mlp/up/kernel": (8, 9)},
    )
    assert not any("ffn_scale" in target for target in taken(plan(torch, flax)))
