"""Rules that do not fit two checkpoints: one failure each, which says the key, what is wrong and the line to check."""

from __future__ import annotations

import time

import pytest

import graftax as gx
from graftax.errors import RulesError
from graftax.plans import End, Plan
from graftax.rules import apply_rules, load_rules
from graftax.tree import Checkpoint

from .harness import abstract, failures, outcome

QKV = ["attn/query/kernel", "attn/key/kernel", "attn/value/kernel"]
TORCH = {
    "attn.qkv.weight": (117, 40), "fc.weight": (10, 72), "fc2.weight": (10, 10), "blob.weight": (4, 4),
    "conv1.weight": (6, 1, 3, 3), "conv2.weight": (8, 6, 3, 3), "a.weight": (4, 6), "b.weight": (5, 6),
}  # fmt: skip
TORCH |= {"c.0.w": (2,), "a2.weight": (4, 6), "d.0": (3, 6), "d.1": (3, 6)}
TORCH |= {f"layers.{i}.w": (4, 6) for i in (0, 1, 3)}
TORCH |= {f"l.{i}.e.{e}.w": (4, 6) for i in range(3) for e in range(4) if (i, e) != (1, 2)}
FLAX = dict.fromkeys(QKV, (40, 10, 4)) | {
    "fc/kernel": (72, 10), "fc2/kernel": (10, 10), "s4": (4, 6, 4), "s3": (3, 6, 4), "m": (3, 4, 6, 4),
    "blob/wi": (4, 4), "conv1/kernel": (3, 3, 1, 6), "ab/kernel": (6, 9), "c0/w": (2,),
    "aa/kernel": (6, 8), "d3": (6, 2, 2), "d4": (6, 2),
}  # fmt: skip
LAYERS = {"torch": "layers.{l}.w", "stack": {"l": 0}, "layout": "linear"}


@pytest.mark.parametrize(
    ("rule", "key", "said"),
    [
        ({"torch": "attn.qkv.weight", "flax": QKV, "heads": 10, "fused": "block"},
         f"attn.qkv.weight -> {', '.join(QKV)}",
         ("axis 0 has 117 rows; 3 x heads=10 x head_dim=4 needs 120", "Check `heads` in rules, item 1.")),
        ({"torch": "attn.qkv.weight", "flax": QKV, "heads": 10, "fused": "interleaved"},
         f"attn.qkv.weight -> {', '.join(QKV)}", ("3 x heads=10 x head_dim=4 needs 120",)),
        ({"torch": "attn.qkv.weight", "flax": QKV[0], "heads": 3}, f"attn.qkv.weight -> {QKV[0]}",
         ("has 4680 values", "has 1600")),
        ({"torch": "fc.weight", "flax": "fc/kernel", "heads": 7}, "fc.weight -> fc/kernel", ("heads=7",)),
        ({"torch": "fc.weight", "flax": "fc/kernel", "flatten": "C=5 H W"}, "fc.weight -> fc/kernel",
         ("axis 1 has 72 columns; flatten C=5 x H x W needs a multiple of 5", "`flatten` in rules, item 1")),
        ({"torch": "fc.weight", "flax": "fc/kernel", "flatten": "8 3 4"}, "fc.weight -> fc/kernel",
         ("flatten C=8 x H=3 x W=4 needs 96",)),
        ({"torch": "fc.weight", "flax": "fc/kernel", "flatten": "H C=2 W"}, "fc.weight -> fc/kernel",
         ("needs the size of H",)),
        ({"torch": "fc.weight", "flax": "fc/kernel", "flatten": "W H C=2"}, "fc.weight -> fc/kernel",
         ("needs the size of W, H",)),
        ({"torch": "conv1.weight", "flax": "conv1/kernel", "flatten": "C H W"}, "conv1.weight -> conv1/kernel",
         ("two axes, not for (6, 1, 3, 3)",)),
        ({"torch": "fc.weihgt", "flax": "fc/kernel"}, "fc.weihgt",
         ("matches no key of torch.safetensors", "Near: fc.weight", "rules, item 1")),
        ({"torch": "fc.weight", "flax": "fc/kernl"}, "fc/kernl",
         ("flax.safetensors has no such key", "sends fc.weight there", "Near: fc/kernel")),
        ({"torch": "fc2.weight", "flax": "fc/kernel"}, "fc2.weight -> fc/kernel", ("has 100 values", "has 720")),
        ({"torch": "fc2.weight", "flax": "fc/kernel", "ops": "o i"}, "fc2.weight -> fc/kernel",
         ("axis 0 has 10 rows; o=72 needs 72", "`ops` in rules, item 1")),
        ({"torch": "fc.weight", "flax": "fc/kernel", "ops": "o i k"}, "fc.weight -> fc/kernel",
         ("the tensor's own axes are o i",)),
        ({"torch": "fc.weight", "flax": "fc/kernel", "ops": "(h d) i -> i h d", "h": 3}, "fc.weight -> fc/kernel",
         ("h=3 x d needs a multiple of 3",)),
        ({"torch": "fc.weight", "flax": "fc/kernel", "layout": "identity"}, "fc.weight -> fc/kernel",
         ("as identity, (10, 72) becomes (10, 72), not (72, 10)", "`layout`")),
        ({"torch": "fc.weight", "flax": "fc/kernel", "layout": "conv"}, "fc.weight -> fc/kernel", ("'conv'",)),
        ({"torch": "blob.weight", "flax": "blob/wi"}, "blob.weight -> blob/wi",
         ("in 2 ways", 'layout = "linear"', 'layout = "identity"')),
        (LAYERS | {"flax": "s4"}, "layers.2.w", ("l = 2 is missing among l = 0..3",)),
        (LAYERS | {"flax": "s4", "l": "0..1"}, "layers.0.w, layers.1.w -> s4",
         ("axis 0 of (4, 6, 4) has 4 entries; there are 2 values of l, 0..1", "`stack`")),
        (LAYERS | {"flax": "s3", "l": [0, 1, 3], "stack": {"l": 5}}, "layers.0.w, layers.1.w, layers.3.w -> s3",
         ("3 axes has no axis 5 for l",)),
        (LAYERS | {"flax": "s3", "l": "7..9"}, "layers.{l}.w", ("no key is within its ranges",)),
        (LAYERS | {"flax": "s3", "l": [0, 1, 2]}, "layers.2.w", ("l = 2 is missing",)),
        ({"torch": "c.{i}.w", "flax": "c{i}/w", "i": [0, 2]}, "c.{i}.w", ("i = 2 has no key", "`i` in rules")),
        ({"torch": "l.{l}.e.{e}.w", "flax": "m", "ops": "l e i o"}, "l.1.e.2.w", ("no key for l = 1, e = 2",)),
        (LAYERS | {"flax": "s3", "l": [0, 1, 3], "repeat": "z"}, "layers.0.w, layers.1.w, layers.3.w -> s3",
         ("(o i) has no axis 'z'",)),
        (LAYERS | {"flax": "s3", "l": [0, 1, 3], "pad": {5: 1}}, "layers.0.w, layers.1.w, layers.3.w -> s3",
         ("no axis 5",)),
        ({"torch": ["a.weight", "b.weight"], "flax": "ab/kernel", "fused": "interleaved", "heads": 2},
         "a.weight, b.weight -> ab/kernel", ("5 rows are no multiple of heads=2",)),
        ({"torch": ["a.weight", "b.weight"], "flax": "ab/kernel", "fused": "interleaved"},
         "a.weight, b.weight -> ab/kernel", ("needs `heads`",)),
        ({"torch": ["a.weight", "a2.weight"], "flax": "aa/kernel", "fused": "interleaved", "heads": 4, "kv_heads": 2},
         "a.weight, a2.weight -> aa/kernel", ("(4, 4) rows are not those of heads=4 and kv_heads=2",)),
        (LAYERS | {"flax": "s3", "l": [0, 1, 3], "stack": {"l": -4}}, "layers.0.w, layers.1.w, layers.3.w -> s3",
         ("3 axes has no axis -4 for l",)),
        ({"torch": "l.{l}.e.{e}.w", "flax": "m", "l": [0, 2], "stack": {"l": 0, "e": -4}, "layout": "linear"},
         "l.0.e.0.w, l.0.e.1.w, l.0.e.2.w and 5 more -> m", ("on one axis",)),
        ({"torch": "d.{l}", "flax": ["d3", "d4"], "fused": "block", "stack": {"l": -1}}, "d.0, d.1 -> d3, d4",
         ("different axes of the list's tensors",)),
        ({"torch": ["a.weight", "b.weight"], "flax": "ab/kernel", "fused": "tied"},
         "a.weight, b.weight -> ab/kernel", ("tensors of one shape",)),
        ({"torch": ["a.weight", "b.weight"], "flax": "ab/kernel", "stack": 0, "layout": "linear"},
         "a.weight, b.weight -> ab/kernel", ("axis 0 of (6, 9) has 6 entries; there are 2 tensors in the list",)),
        ({"flax": "fc2/kernal", "missing": "zeros"}, "fc2/kernal",
         ("matches no key of flax.safetensors", "fc2/kernel")),
        ({"flax": "zz", "fill": 1}, "zz", ("matches no key",)),
        ({"torch": "zz", "drop": "x"}, "zz", ("matches no key of torch.safetensors",)),
        ({"source": "a", "target": "b"}, "a", ("matches no key of torch.safetensors",)),
    ],
)  # fmt: skip
def test_one_failure(rule, key, said):
    found = failures([rule], TORCH, FLAX)
    assert [failure.key for failure in found] == [key]
    text = str(found[0])
    for part in said:
        assert part in text, text
    assert "rules, item 1" in text


def test_the_message_of_the_design():
    """The whole error as it is printed."""
    rules = load_rules([{"torch": "attn.qkv.weight", "flax": QKV, "heads": 10, "fused": "block"}])
    source, like = abstract(TORCH, "torch", "model.safetensors"), abstract(FLAX, "flax")
    only = Checkpoint("model.safetensors", "torch", {"attn.qkv.weight": source["attn.qkv.weight"]})
    target = Checkpoint("like", "flax", {name: like[name] for name in QKV})
    plan = Plan.build(
        End.of(only, "torch"), End.of(target, "flax"), apply_rules(rules, only, target, "torch", "flax").proposal
    )
    assert not plan.questions, "keys that a failure speaks for are not asked about again"
    with pytest.raises(Exception, match="misfit") as error:
        plan.require_complete()
    assert str(error.value) == (
        "the plan for model.safetensors -> like has 1 misfit:\n"
        "  attn.qkv.weight -> attn/query/kernel, attn/key/kernel, attn/value/kernel: "
        "axis 0 has 117 rows; 3 x heads=10 x head_dim=4 needs 120\n"
        "    Check `heads` in rules, item 1."
    )


def test_grouped_heads_in_the_message():
    flax = {"q/kernel": (40, 10, 4), "k/kernel": (40, 2, 4), "v/kernel": (40, 2, 4)}
    rule = {"torch": "qkv.weight", "flax": list(flax), "fused": "block"}
    (found,) = failures([rule], {"qkv.weight": (60, 40)}, flax)
    assert "heads=(10 + 2 + 2) x head_dim=4 needs 56" in found.what
    for key, value, said in (("heads", 8, "10 heads, but the rule says heads=8"), ("kv_heads", 1, "at least 2 heads")):
        rule = {"torch": "qkv.weight", "flax": list(flax), "fused": "block", "heads": 10, "kv_heads": 2} | {key: value}
        (found,) = failures([rule], {"qkv.weight": (56, 40)}, flax)
        assert said in found.what


def test_a_missing_rule_is_a_policy_for_what_is_left():
    rules = [{"torch": "b.weight", "flax": "b/bias", "layout": "identity"}, {"flax": "**/bias", "missing": "zeros"}]
    found = outcome(rules, abstract({"b.weight": (4,)}, "torch"), abstract({"a/bias": (3,), "b/bias": (4,)}, "flax"))
    assert not found.proposal.failures
    assert found.missing == {"a/bias": "zeros", "b/bias": "zeros"}


def test_rules_alone_that_make_a_leaf_of_a_folder():
    rules = [{"torch": "a.weight", "flax": "x"}, {"torch": "b.weight", "flax": "x/kernel"}]
    found = outcome(rules, abstract({"a.weight": (4,), "b.weight": (4, 3)}, "torch"), None, "flax").proposal
    assert [(f.key, f.what) for f in found.failures] == [("x", "would be a leaf and a subtree")]


def test_two_rules_for_one_key():
    rules = [
        {"torch": "a.*", "flax": "fc/*"}, {"torch": "a.weight", "drop": "no"},
        {"torch": "b.weight", "flax": "fc/weight", "layout": "identity"},
    ]  # fmt: skip
    found = failures(rules, {"a.weight": (4, 6), "b.weight": (4, 6)}, {"fc/weight": (4, 6)})
    assert [(f.key, f.what) for f in found] == [
        ("a.weight", "is named by rules, item 1 and by rules, item 2"),
        ("fc/weight", "is named by rules, item 1 and by rules, item 3"),
    ]


def test_one_rule_that_names_a_key_twice():
    found = failures(
        [{"torch": ["a.weight", "a.weight"], "flax": "x", "fused": "tied"}], {"a.weight": (4, 6)}, {"x": (6, 4)}
    )
    assert len(found) == 1
    assert "twice" in found[0].what


def test_many_failures_of_one_rule_are_folded():
    torch = {f"l.{i}.weight": (3, 4) for i in range(80)}
    flax = {f"l/{i}/kernel": (4, 5) for i in range(80)}
    found = failures([{"torch": "l.{i}.weight", "flax": "l/{i}/kernel"}], torch, flax)
    assert len(found) == 3
    assert "77 more of this rule" in found[-1].next


def test_what_a_flatten_leaves_open():
    rule = {"torch": "fc.weight", "flax": "fc/kernel", "flatten": "C H W"}
    flax = {"fc/kernel": (72, 10)}

    def found(convolutions):
        return outcome(
            [rule], abstract({"fc.weight": (10, 72)} | convolutions, "torch"), abstract(flax, "flax")
        ).proposal

    chained = found({"c.2.weight": (8, 6, 3, 3), "c.10.weight": (4, 8, 3, 3), "c.1.weight": (6, 1, 3, 3)})
    assert not chained.failures
    assert "C=4 channels: c.10.weight, the last of 3 convolutions that follow each other" in chained.assumptions[0].text
    only = found({"x.weight": (6, 1, 3, 3), "y.weight": (5, 9, 3, 3)})
    assert "C=6 channels: the only channels of a convolution that divide its 72 columns" in only.assumptions[0].text
    several = found({"x.weight": (6, 1, 3, 3), "y.weight": (8, 9, 3, 3)})
    assert "leaves C open: the channels of 2 convolutions divide 72 (6, 8)" in several.failures[0].what
    assert "flatten = 'C=8 H W'" in several.failures[0].what
    none = found({})
    assert "no convolution's channels divide 72" in none.failures[0].what


def test_the_params_collection_is_not_guessed_where_others_match_too():
    flax = {"params/x/w": (2, 3), "batch_stats/x/w": (2, 3)}
    found = outcome(
        [{"torch": "x.w", "flax": "x/w"}], abstract({"x.w": (2, 3)}, "torch"), abstract(flax, "flax")
    ).proposal
    assert len(found.failures) == 1
    assert "params/x/w" in found.failures[0].next
    assert "batch_stats/x/w" in found.failures[0].next


def test_a_refusal_of_the_layer_table_keeps_its_reason():
    found = failures([{"torch": "p.weight", "flax": "p/negative_slope"}], {"p.weight": (5,)}, {"p/negative_slope": ()})
    assert len(found) == 1
    assert "one scalar slope" in str(found[0])


def test_ends_of_one_side_need_source_and_target():
    rule = {"torch": "a", "flax": "b"}
    (found,) = outcome([rule], abstract({"a": (2,)}, "flax"), abstract({"b": (2,)}, "flax")).proposal.failures
    assert "both ends are flax" in str(found)
    assert "Write `source` and `target`" in str(found)
    (found,) = outcome(
        [{"torch": "a", "drop": "x"}], abstract({"a": (2,)}, "flax"), abstract({"b": (2,)}, "flax")
    ).proposal.failures
    assert "neither end is torch" in str(found)


def test_no_like_and_a_stack_that_does_not_begin_at_zero():
    rule = {"torch": "l.{l}.w", "flax": "w", "ops": "l i o"}
    source = abstract({f"l.{i}.w": (4, 6) for i in range(3, 6)}, "torch")
    (found,) = outcome([rule], source, None, "flax").proposal.failures
    assert 'write l = "3..5"' in str(found)
    assert not outcome([rule | {"l": "3..5"}], source, None, "flax").proposal.failures


def test_the_time_of_rules_grows_with_the_number_of_keys():
    """Four times the keys take about four times as long, not sixteen times."""
    leaves = [f"block{b}.part{p}" for b in range(5) for p in range(10)]
    rules = load_rules(
        [
            {"torch": f"layers.{{i}}.{leaf}.weight", "flax": f"layers_{{i}}/{leaf.replace('.', '/')}/kernel"}
            for leaf in leaves
        ]
    )
    seconds: list[float] = []
    for layers in (50, 200):
        torch = {f"layers.{i}.{leaf}.weight": (4, 6) for i in range(layers) for leaf in leaves}
        flax = {f"layers_{i}/{leaf.replace('.', '/')}/kernel": (6, 4) for i in range(layers) for leaf in leaves}
        ends = abstract(torch, "torch"), abstract(flax, "flax")
        times: list[float] = []
        for _ in range(3):
            start = time.process_time()
            found = apply_rules(rules, *ends, "torch", "flax")
            times.append(time.process_time() - start)
        assert len(found.proposal.entries) == len(torch) == 50 * layers
        assert not found.proposal.failures
        seconds.append(min(times))
    assert seconds[1] < 9 * seconds[0], seconds


LINES = [
    {"torch": "fc2.weight", "flax": "fc2/kernel"},
    {"torch": "fc2.weight", "flax": "fc2/kernel", "layout": "linear"},
    {"torch": "blob.weight", "flax": "blob/wi", "layout": "identity"},
    {"torch": ["a.weight", "a2.weight"], "flax": "aa/kernel", "fused": "block"},
    {"torch": "d.{i}", "flax": "d4", "stack": {"i": 2}, "layout": "linear"},
    {"torch": "conv1.weight", "flax": "conv1/kernel"},
]


@pytest.mark.parametrize(
    "keys",
    [{"heads": 7}, {"kv_heads": 2}, {"heads": 2, "kv_heads": 3}, {"parts": "q k v -> k q v", "q": 7, "k": 6, "v": 5}],
)
@pytest.mark.parametrize("rule", LINES)
def test_a_key_that_cannot_be_obeyed_is_refused(rule, keys):
    source, like = (abstract(shapes, side) for shapes, side in ((TORCH, "torch"), (FLAX, "flax")))
    try:
        plan = gx.plan(source, like, rules=[rule | keys])
    except RulesError:
        return
    names = [rule["flax"]]
    assert plan.failures
    assert not [entry for entry in plan.entries if set(names) & set(entry.targets)]
