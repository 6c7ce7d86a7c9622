"""A Linear behind a flattened map: asked about until something says in which order it was flattened."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graftax.match.planning import make_plan
from graftax.ops import apply_chain, invert_chain
from graftax.plans import Plan, PlanOptions
from graftax.tree import Checkpoint, Storage, TensorSpec

C, H, W, OUT = 8, 4, 4, 10
TORCH = {"conv.weight": (C, 3, 3, 3), "conv.bias": (C,), "fc.weight": (OUT, C * H * W), "fc.bias": (OUT,)}
FLAX = {
    "params/conv/kernel": (3, 3, 3, C),
    "params/conv/bias": (C,),
    "params/fc/kernel": (C * H * W, OUT),
    "params/fc/bias": (OUT,),
}
BARE = {"torch": "fc.weight", "flax": "params/fc/kernel"}


def end(shapes: dict[str, tuple[int, ...]], side: Any) -> Checkpoint:
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    return Checkpoint(side, side, {n: TensorSpec(s, "float32") for n, s in shapes.items()}, Storage(values.__getitem__))


def planned(
    rules: Any = None, torch: dict[str, Any] | None = None, flax: dict[str, Any] | None = None, back: bool = False
) -> Plan:
    left, right = end(torch or TORCH, "torch"), end(flax or FLAX, "flax")
    return (
        make_plan(right, left, PlanOptions(rules=rules)) if back else make_plan(left, right, PlanOptions(rules=rules))
    )


def ops(plan: Plan, target: str) -> str:
    (entry,) = [entry for entry in plan.entries if target in entry.targets]
    return ", ".join(op.text for op in entry.ops)


FOLDED = f"o (c h w) -> (h w c) o [c={C} h={H} w={W}]"
TURNED = f"o (c hw) -> (hw c) o [c={C} hw={H * W}]"
"""Both say the same: height and width stay neighbours."""


# ---------------------------------------------------------------- a rule that only names the pair

SILENT: dict[str, Any] = {
    "bare": [BARE],
    "with a scale": [{**BARE, "scale": 2.0}],
    "of the bias": [{"torch": "fc.bias", "flax": "params/fc/bias"}],
    "of both": [BARE, {"torch": "fc.bias", "flax": "params/fc/bias"}],
}


@pytest.mark.parametrize("back", [False, True], ids=["to flax", "to torch"])
@pytest.mark.parametrize("name", SILENT)
def test_a_rule_that_names_a_pair_does_not_answer_in_which_order(name: str, back: bool) -> None:
    plan = planned(SILENT[name], back=back)
    (question,) = plan.questions
    assert question.kind == "flatten"
    assert "C=8 H=4 W=4" in question.candidates[0].rule
    assert not plan.failures
    plan = plan.answer(0, 0)
    assert plan.complete, str(plan)
    assert len(plan.entries) == len(TORCH)


@pytest.mark.parametrize(
    ("more", "made"),
    [
        ({"flatten": "C=8 H=4 W=4"}, FOLDED),
        ({"flatten": "C H W"}, TURNED),
        ({"layout": "linear"}, "o i -> i o"),
        ({"transpose": True}, "o i -> i o"),
        ({"ops": "o (c h w) -> (h w c) o", "c": 8, "h": 4, "w": 4}, FOLDED),
    ],
)
def test_a_rule_that_says_the_order_is_not_asked_about(more: dict[str, Any], made: str) -> None:
    plan = planned([{**BARE, **more}])
    assert plan.complete, str(plan)
    assert ops(plan, "params/fc/kernel") == made


def test_the_answer_stands_beside_the_bare_rule() -> None:
    """What a user does who pastes the line below the one that is there already, in either order."""
    answer = {**BARE, "flatten": "C=8 H=4 W=4"}
    for rules in ([BARE, answer], [answer, BARE]):
        plan = planned(rules)
        assert plan.complete, str(plan)
        assert ops(plan, "params/fc/kernel") == FOLDED
    two = planned([BARE, BARE])
    assert "is named by" in two.failures[0].what
    other = planned([{**BARE, "torch": "fc.bias", "flax": "params/fc/kernel"}, answer])
    assert other.failures


def test_a_stack_of_linears_behind_a_flatten() -> None:
    """An ensemble: the rule says how the members are stacked, and not how each was flattened."""
    torch = {f"m.{i}.{name}": shape for i in range(5) for name, shape in TORCH.items()}
    flax = {f"m/{name[7:]}": (5, *shape) for name, shape in FLAX.items()}
    plan = planned([{"torch": "m.{i}.fc.weight", "flax": "m/fc/kernel", "stack": {"i": 0}}], torch, flax)
    (question,) = plan.questions
    assert question.kind == "flatten"
    plan = plan.answer(0, 0)
    assert plan.complete, str(plan)
    assert ops(plan, "m/fc/kernel") == f"{FOLDED}, stack 5 on axis 0"


def test_a_choice_between_two_heads_says_in_which_order() -> None:
    torch = {"conv.weight": (C, 3, 3, 3), "p.weight": (OUT, C * H * W), "q.weight": (OUT, C * H * W)}
    flax = {"conv/kernel": (3, 3, 3, C), "a/kernel": (C * H * W, OUT), "b/kernel": (C * H * W, OUT)}
    plan = planned(None, torch, flax)
    (question,) = plan.questions
    assert question.kind == "match"
    said = {("flatten" in c.rule, "linear" in c.rule) for c in question.candidates}
    assert said == {(True, False), (False, True)}
    assert all("p.weight" in c.rule and "q.weight" in c.rule for c in question.candidates)
    assert plan.answer(0, 0).complete


def test_a_norm_behind_the_flatten_is_asked_with_it() -> None:
    torch = {**TORCH, "norm.weight": (C * H * W,), "norm.bias": (C * H * W,)}
    flax = {**FLAX, "params/norm/scale": (C * H * W,), "params/norm/bias": (C * H * W,)}
    rules = [
        BARE,
        {"torch": "norm.weight", "flax": "params/norm/scale"},
        {"torch": "norm.bias", "flax": "params/norm/bias"},
    ]
    plan = planned(rules, torch, flax)
    assert {question.targets[0] for question in plan.questions} == {
        "params/fc/kernel", "params/norm/scale",
    }  # fmt: skip
    while plan.questions:
        assert all("layout" in c.rule or "ops" in c.rule or "flatten" in c.rule for c in plan.questions[0].candidates)
        plan = plan.answer(0, 0)
    assert plan.complete, str(plan)
    assert ops(plan, "params/norm/scale").startswith("(c h w) -> (h w c)")


# ---------------------------------------------------------------- what else a bare rule leaves open

SQ = (8, 8, 3, 3)
OPEN: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "a square transposed convolution": (
        {"up.weight": SQ}, {"up/kernel": (3, 3, 8, 8)}, {"torch": "up.weight", "flax": "up/kernel"},
    ),
    "as many heads as each is wide": (
        {"a.x.weight": (16, 16)}, {"a/x/w": (16, 4, 4)}, {"torch": "a.x.weight", "flax": "a/x/w"},
    ),
    "as many heads as each is wide, the count said": (
        {"a.x.weight": (16, 16)}, {"a/x/w": (16, 4, 4)}, {"torch": "a.x.weight", "flax": "a/x/w", "heads": 4},
    ),
    "block or interleaved": (
        {"a.qkv.weight": (48, 16)}, {"a/qkv/kernel": (16, 3, 4, 4)}, {"torch": "a.qkv.weight", "flax": "a/qkv/kernel"},
    ),
    "a norm over a map": (
        {"c.weight": (64, 3, 3, 3), "ln.weight": (64, 8, 8)}, {"c/kernel": (3, 3, 3, 64), "ln/scale": (8, 8, 64)},
        {"torch": "ln.weight", "flax": "ln/scale"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN)
def test_a_bare_rule_leaves_the_layout_open(name: str) -> None:
    torch, flax, rule = OPEN[name]
    torch, flax = {**torch, "b.weight": (5, 3)}, {**flax, "b/kernel": (3, 5)}
    plan = planned([rule], torch, flax)
    (question,) = plan.questions
    assert not plan.failures
    assert question.targets == (rule["flax"],)
    for n in range(len(question.candidates)):
        again = planned([rule], torch, flax).answer(0, n)
        assert again.complete, str(again)


def test_heads_that_contradict_the_order_of_the_axes_are_refused() -> None:
    torch, flax = {"a.x.weight": (16, 12), "b.weight": (5, 3)}, {"a/x/kernel": (12, 2, 8), "b/kernel": (3, 5)}
    rule = {"torch": "a.x.weight", "flax": "a/x/kernel"}
    assert planned([{**rule, "heads": 2}], torch, flax).complete
    (failure,) = planned([{**rule, "heads": 8}], torch, flax).failures
    assert "heads=8" in failure.what


def test_a_bare_rule_takes_the_habit_of_its_siblings() -> None:
    """The rectangular Linears are stored (in, out): so is the square one, which the rule only names."""
    torch = {"h.0.c_fc.weight": (8, 16), "h.1.c_fc.weight": (8, 16), "h.0.sq.weight": (8, 8), "h.1.sq.weight": (8, 8)}
    flax = {name.replace(".", "/").replace("weight", "kernel"): shape for name, shape in torch.items()}
    plan = planned([{"torch": "h.{i}.sq.weight", "flax": "h/{i}/sq/kernel"}], torch, flax)
    assert plan.complete, str(plan)
    assert ops(plan, "h/0/sq/kernel") == ""
    entry = next(entry for entry in plan.entries if entry.targets == ("h/0/sq/kernel",))
    assert entry.evidence[0] == "rules item 1"


def test_a_bare_rule_for_one_block_leaves_the_others_matched() -> None:
    torch = {f"h.{i}.{name}.weight": (8, 6) for i in range(4) for name in ("q", "k")}
    flax = {f"h/{i}/{name}/kernel": (6, 8) for i in range(4) for name in ("q", "k")}
    assert planned([{"torch": "h.2.q.weight", "flax": "h/2/q/kernel"}], torch, flax).complete
    crossed = planned([{"torch": "h.{i}.q.weight", "flax": "h/{i}/k/kernel"}], torch, flax)
    assert {e.targets for e in crossed.entries if e.sources == ("h.1.q.weight",)} == {("h/1/k/kernel",)}


# ---------------------------------------------------------------- channels that no convolution has


def test_channels_that_no_convolution_has_are_refused() -> None:
    plan = planned([{**BARE, "flatten": "C=4 H=8 W=4"}])
    (failure,) = plan.failures
    assert "C=4" in failure.what
    assert "they have 8" in failure.what
    assert "rules, item 1" in failure.next
    assert planned([{**BARE, "ops": "o (c h w) -> (h w c) o", "c": 4, "h": 8, "w": 4}]).complete


def test_channels_of_joined_maps_show_in_a_norm() -> None:
    torch = {**TORCH, "bn.weight": (16,), "bn.running_mean": (16,), "bn.running_var": (16,), "bn.bias": (16,)}
    flax = {**FLAX, "params/bn/scale": (16,), "params/bn/bias": (16,)}
    flax |= {"batch_stats/bn/mean": (16,), "batch_stats/bn/var": (16,)}
    assert not planned([{**BARE, "flatten": "C=16 H=4 W=2"}], torch, flax).failures


def test_without_convolutions_any_channels_may_be() -> None:
    torch, flax = {"fc.weight": (5, 48), "b.weight": (4, 5)}, {"params/fc/kernel": (48, 5), "params/b/kernel": (5, 4)}
    assert planned([{**BARE, "flatten": "C=3 H=4 W=4"}], torch, flax).complete


# ---------------------------------------------------------------- other leaves that may take a map, or make one

GRU = {"rnn.weight_ih_l0": (21, C * H), "rnn.weight_hh_l0": (21, 7), "rnn.bias_ih_l0": (21,), "rnn.bias_hh_l0": (21,)}
CELL = {
    **{f"params/rnn/i{gate}/kernel": (C * H, 7) for gate in "rzn"},
    **{f"params/rnn/h{gate}/kernel": (7, 7) for gate in "rzn"},
    **{f"params/rnn/{gate}/bias": (7,) for gate in ("ir", "iz", "in", "hn")},
}
CONV = {"conv.weight": (C, 3, 3, 3)}, {"params/conv/kernel": (3, 3, 3, C)}
INTO: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "a recurrent cell": (
        GRU, CELL, "params/rnn/ir/kernel", f"split axis 0 into 7+7+7, o (c p) -> (p c) o [c={C} p={H}]",
    ),
    "a bare matrix": (
        {"out.w": (C * H * W, 5)}, {"params/out/w": (C * H * W, 5)}, "params/out/w",
        f"(c h w) i -> (h w c) i [c={C} h={H} w={W}]",
    ),
    "a bare matrix as wide as it is long": (
        {"proj": (C * H, C * H)}, {"params/proj": (C * H, C * H)}, "params/proj",
        f"(c h w) i -> (h w c) i [c={C} h={H // 2} w=2]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("back", [False, True], ids=["to flax", "to torch"])
@pytest.mark.parametrize("name", INTO)
def test_what_takes_a_flattened_map_is_asked_in_which_order(name: str, back: bool) -> None:
    torch, flax, leaf, made = INTO[name]
    plan = planned(torch=CONV[0] | torch, flax=CONV[1] | flax, back=back)
    (question,) = plan.questions
    assert question.kind == "flatten"
    assert planned([question.candidates[-1].rule], CONV[0] | torch, CONV[1] | flax, back).complete
    plan = plan.answer(0, 0)
    assert plan.complete, str(plan)
    assert back or ops(plan, leaf) == made


@pytest.mark.parametrize("width", [C, 5])
def test_a_width_that_something_else_makes_is_no_map(width: int) -> None:
    cell = {n: s if len(s) < 2 or s[0] == 7 else (width, 7) for n, s in CELL.items()}
    torch = CONV[0] | GRU | {"rnn.weight_ih_l0": (21, width)} | ({"fc.weight": (5, C)} if width == 5 else {})
    plan = planned(torch=torch, flax=CONV[1] | cell | ({"params/fc/kernel": (C, 5)} if width == 5 else {}))
    assert plan.complete, str(plan)


@pytest.mark.parametrize("first", [False, True], ids=["the map first", "the others first"])
def test_a_map_joined_with_other_values_is_asked_about(first: bool) -> None:
    n = C * H * W
    torch, flax = CONV[0] | {"fc.weight": (5, n + 3)}, CONV[1] | {"params/fc/kernel": (n + 3, 5)}
    plan = planned(torch=torch, flax=flax)
    assert [question.kind for question in plan.questions] == ["flatten"]
    plan = plan.answer(0, int(first))
    assert plan.complete, str(plan)
    weight = np.arange(5 * (n + 3.0), dtype="f4").reshape(5, n + 3)
    (entry,) = [entry for entry in plan.entries if "params/fc/kernel" in entry.targets]
    (kernel,) = apply_chain(entry.ops, (weight,))
    order = np.arange(n).reshape(C, H, W).transpose(1, 2, 0).reshape(-1)
    columns = [np.arange(3), 3 + order] if first else [order, n + np.arange(3)]
    assert np.array_equal(kernel, weight.T[np.concatenate(columns)])
    assert np.array_equal(apply_chain(invert_chain(entry.ops), (kernel,))[0], weight)


def test_a_square_linear_that_may_make_a_map_is_asked_with_its_bias() -> None:
    torch = {"fc.weight": (4 * C, 4 * C), "fc.bias": (4 * C,), "up.weight": (3, C, 3, 3)}
    flax = {"params/fc/kernel": (4 * C, 4 * C), "params/fc/bias": (4 * C,), "params/up/kernel": (3, 3, C, 3)}
    asked = {name for question in planned(torch=torch, flax=flax).questions for name in question.targets}
    assert asked == {"params/fc/kernel", "params/fc/bias"}
